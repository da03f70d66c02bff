"""benchmarks/gpu.py: every row runs here, small, so that only CUDA itself is new on the day."""

import json

import pytest
from conftest import ROOT, run

SCRIPT = ROOT / "benchmarks/gpu.py"


def call(*flags):
    return run(SCRIPT, *flags, check=False)


@pytest.mark.slow
def test_every_row_runs_and_what_is_done_is_skipped(tmp_path):
    file = tmp_path / "gpu.json"
    done = call("--dry", "--out", file)
    rows = json.loads(file.read_text())
    assert not {name: row["error"] for name, row in rows.items() if "error" in row}, done.stderr
    assert done.returncode == 0 and len(rows) == 26
    assert rows["resumed = straight"]["difference"] == rows["block swap = none"]["difference"] == 0
    assert rows["previews = pipeline"]["levels"] <= 1
    assert rows["loss and gradients = CPU's"]["fp32_difference"] < 1e-4
    assert all(row["int8-quanto error"] < 0.02 for n, row in rows.items() if n.startswith("int8"))
    rows["card"]["error"] = "gone"
    file.write_text(json.dumps(rows))
    again = call("--dry", "--out", file, "--rows", "card", "sd 1.5")
    assert [line.partition(":")[0] for line in again.stdout.splitlines()] == ["card"]
    assert "error" not in json.loads(file.read_text())["card"]
    page = call("--table", file).stdout
    assert page.startswith("# cpu, torch") and "| sd 1.5 512 px batch 4 | s_step" in page


def test_without_a_gpu_it_says_so(tmp_path):
    assert call("--out", tmp_path / "x.json").returncode == 2
    said = call("--dry", "--minutes", "0", "--out", tmp_path / "y.json").stdout
    assert said.count("skipped, needs about") == 26 and not (tmp_path / "y.json").exists()
