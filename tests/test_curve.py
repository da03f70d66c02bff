"""benchmarks/curve.py: skill over pairs, ranks and steps."""

import json

import pytest
from conftest import ROOT, run

SMALL = ["--data.dataset_configs.0.resolution", 64, "--validation.num_inference_steps", 2]


@pytest.mark.parametrize("own", [False, True], ids=["the demo's", "a config"])
def test_every_number_of_pairs_and_rank_has_a_skill_at_every_step(own, tmp_path):
    flags = ["--pairs", 1, 3, "--ranks", 2, "--steps", 1, 3, "--output_dir", tmp_path, *SMALL]
    if own:
        flags += ["--config", "configs/demo_qwen_edit.yaml"]
    printed = run(ROOT / "benchmarks/curve.py", *flags, cwd=ROOT).stdout
    found = json.loads((tmp_path / "curve.json").read_text())
    assert found["steps"] == [1, 3]
    assert [row[:2] for row in found["rows"]] == [[1, 2], [3, 2]]
    for _, _, skills in found["rows"]:
        assert len(skills) == 2 and all(skill < 1 for skill in skills)
    assert (tmp_path / "curve.png").stat().st_size > 1000
    assert "| 3 | 2 |" in printed
