"""A few of the hurt runs of tests/faults/run.py; docs/reliability.md has the figures of many."""

import re
import subprocess

import pytest
from conftest import ROOT, run
from faults.run import FAULTS, TRAINERS, command, configs, loras, run_all


@pytest.mark.slow
def test_hurt_runs_end_with_the_bits_of_an_undisturbed_one(checkpoints, tmp_path):
    found = list(run_all(len(FAULTS) * len(TRAINERS), 5, checkpoints, tmp_path))
    assert {fault for _, fault, _ in found} == {*FAULTS}
    assert not [line for line in found if line[2]]


@pytest.fixture
def disk(tmp_path):
    """disk(kilobytes): a folder that is a disk of that size; while it is one, it becomes larger."""
    place = tmp_path / "disk"
    place.mkdir()

    def size(kilobytes):
        options = ["remount"] if place.is_mount() else []
        options = ",".join([*options, f"size={kilobytes}k"])
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=False)
        if done.returncode:
            # a user's machine; full disks by patched writes are tested on every one
            pytest.skip("only root may mount a disk")
        return place

    yield size
    subprocess.run(["umount", "-l", "-q", place], check=False)


@pytest.mark.slow
@pytest.mark.parametrize("script", TRAINERS)
def test_a_disk_that_is_full_is_named_and_a_larger_one_goes_on(script, disk, checkpoints, tmp_path):
    """With room for a share of what a run writes: exit code 2, and the same bits afterwards."""
    config, cache = configs(checkpoints, tmp_path)[script], tmp_path / "cache"
    program, straight = ROOT / f"{script}.py", tmp_path / "straight"
    run(program, *command(script, config, straight, cache))
    written = sum(file.stat().st_blocks * 512 for file in straight.rglob("*") if file.is_file())
    for share in (0.15, 0.6, 0.97):
        place = disk(int(share * written / 1024))
        done = run(program, *command(script, config, place, cache), check=False)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        said = done.stderr.replace("\n", " ")
        assert re.search(r"the disk is full: 0.* MB are free in .*disk", said), share
        disk(10 * written // 1024)
        run(program, *command(script, config, place, cache, resume=True))
        expected, found = loras(straight), loras(place)  # what was stopped has left more
        assert {name: found.get(name) for name in expected} == expected, share
        subprocess.run(["umount", place], check=True)
