"""experiments/: each patch is small, applies to its script as it is, and trains."""

import shlex
import shutil
import subprocess

import pytest
from conftest import ROOT, concept, run, slider_settings, small_config, write_config
from safetensors.torch import load_file

PATCHES = sorted((ROOT / "experiments").glob("*.patch"))
TWO_STEPS = {  # the flags that end a run of each script after two steps
    "train_qwen_edit.py": ["--train.max_train_steps=2"],
    "train_pairedit.py": ["--train_iteration=2"],
    "train_dreambooth_pairs.py": ["--max_train_steps=2"],
}


def header(patch):
    """{"script": ..., "try": ...} of the comment lines that a patch begins with."""
    lines = patch.read_text().splitlines()[:3]
    assert all(line.startswith("# ") for line in lines)
    return {key: value for key, _, value in (line[2:].partition(": ") for line in lines)}


def settings(script, checkpoints, folder):
    """A quick run of a script, as a file for --config."""
    if script == "train_dreambooth_pairs.py":
        concept(folder / "data", stages=("before", "after"))
        sides = {f"{side}_data_dir": str(folder / "data" / side) for side in ("before", "after")}
        places = {"output_dir": str(folder / "out"), "cache_dir": str(folder / "cache")}
        base = {"pretrained_model_name_or_path": str(checkpoints["sd"]), "resolution": 64}
        return write_config(folder, {**base, **sides, **places, "use_image_pairs": True})
    if script == "train_pairedit.py":
        concept(folder / "datasets/age")
        return write_config(folder, slider_settings(checkpoints["flux"], folder))
    return write_config(folder, small_config(checkpoints["2511"], folder))


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.stem)
def test_a_patch_is_small_applies_and_trains(patch, checkpoints, tmp_path):
    """On a copy with only utils.py beside it."""
    about = header(patch)
    script = about["script"]
    changed = [line for line in patch.read_text().splitlines() if line[:1] in ("+", "-")]
    assert 0 < len(changed) - 2 <= 120  # +++ and --- name the file
    for name in (script, "utils.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run(["git", "apply", str(patch)], cwd=tmp_path, check=True)
    assert (tmp_path / script).read_text() != (ROOT / script).read_text()
    file = settings(script, checkpoints, tmp_path)
    flags = [*TWO_STEPS[script], *shlex.split(about["try"])]
    run(tmp_path / script, "--config", file, *flags, cwd=tmp_path)
    files = [f for f in (tmp_path / "out").rglob("*.safetensors") if "checkpoint-" not in str(f)]
    assert any(tensor.abs().max() > 0 for file in files for tensor in load_file(file).values())
