"""A few of the hurt runs of tests/faults/run.py; docs/reliability.md has the figures of many."""

import pytest
from faults.run import FAULTS, TRAINERS, run_all


@pytest.mark.slow
def test_hurt_runs_end_with_the_bits_of_an_undisturbed_one(checkpoints, tmp_path):
    found = list(run_all(len(FAULTS) * len(TRAINERS), 5, checkpoints, tmp_path))
    assert {fault for _, fault, _ in found} == {*FAULTS}
    assert not [line for line in found if line[2]]
