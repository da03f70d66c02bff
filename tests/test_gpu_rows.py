"""benchmarks/gpu.py: every row runs here, small, so that only CUDA itself is new on the day."""

import json
import sys

import pytest
import torch
from conftest import ROOT, run

sys.path.append(str(ROOT / "benchmarks"))
import gpu

SCRIPT = ROOT / "benchmarks/gpu.py"


def call(*flags):
    return run(SCRIPT, *flags, check=False)


@pytest.mark.slow
def test_every_row_runs_and_what_is_done_is_skipped(tmp_path):
    file = tmp_path / "gpu.json"
    done = call("--dry", "--out", file)
    rows = json.loads(file.read_text())
    assert not {name: row["error"] for name, row in rows.items() if "error" in row}, done.stderr
    assert done.returncode == 0 and rows.keys() == gpu.ROWS.keys()
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
    assert not (tmp_path / "y.json").exists()
    assert said.count("skipped, needs about") == len(gpu.ROWS)


SD = pytest.param("sd 1.5 512 px batch 4", marks=pytest.mark.slow)
QWEN = ["qwen 512 + 512 bf16", "qwen 2.1 1024 + 1 MP bf16"]


@pytest.mark.parametrize("row", [*QWEN, "pairedit 512 px bf16", SD])
def test_gradients_of_like_attentions_have_one_layout(row, tmp_path, monkeypatch):
    # torch takes cuDNN's backward of an attention for every other with like q, k and v,
    # and reads the gradient by the strides of the first
    attention, layouts = torch.nn.functional.scaled_dot_product_attention, {}

    def recorded(query, key, value, **how):
        out = attention(query, key, value, **how)
        alike = tuple((x.shape, x.stride()) for x in (query, key, value))
        if out.requires_grad:
            out.register_hook(lambda grad: layouts.setdefault(alike, []).append(grad.stride()))
        return out

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    for script in (gpu.train_qwen_edit, gpu.train_pairedit):
        monkeypatch.setattr(script, "fill_parts", gpu.random_parts(script))
    for name in ("load_part", "noised_batch", "encode_prompts"):  # the row changes them
        monkeypatch.setattr(
            gpu.train_dreambooth_pairs, name, getattr(gpu.train_dreambooth_pairs, name)
        )
    _, _, run_row = gpu.ROWS[row]
    run_row(tmp_path, True)
    assert max(len(seen) for seen in layouts.values()) > 1
    assert {alike: len(set(seen)) for alike, seen in layouts.items()} == dict.fromkeys(layouts, 1)
