"""train_pairedit.py end to end: whole runs, stops, caches, two processes, the user's document."""

import gc
import json
import os
import re
import shutil
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LAUNCH, ROOT, concept, run, slider_settings, write_config
from PIL import Image
from safetensors.torch import load_file

import cache_embeddings
import train_pairedit as script
from utils import UserError, load_config

SEEDS = ROOT / "tests" / "seeds"
SHORT = {"num_inference_steps": 4, "end_step": 3, "skips": [1], "scales": "0,1"}
SEVERAL = {"datasets": ["age", "smile"], "noise_scales": [1, 3], "checkpoints_total_limit": None}


def trainer_of(checkpoint, folder, **changes):
    """Audited as the command does it."""
    file = write_config(folder, slider_settings(checkpoint, folder, **(SHORT | changes)))
    config = load_config(script.Config, ["--config", str(file)], script.audit)
    return script.PairEditTrainer(config)


def fit(checkpoint, folder, **changes):
    trainer = trainer_of(checkpoint, folder, **changes)
    trainer.fit()
    return trainer


def loras(folder):
    """{path below folder: tensors} of every LoRA of the last step."""
    files = [f for f in folder.rglob("*_4epoch*.safetensors") if "earlier" not in str(f)]
    return {str(file.relative_to(folder)): load_file(file) for file in files}


def assert_same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys() and ours
    for file, tensors in ours.items():
        assert tensors.keys() == theirs[file].keys()
        for name, tensor in tensors.items():
            if tolerance:
                torch.testing.assert_close(tensor, theirs[file][name], **tolerance)
            else:
                assert torch.equal(tensor, theirs[file][name]), f"{file}: {name}"


def run_folders(folder, **changes):
    config = script.Config(output_folder=folder / "out", **changes)
    return [script.run_folder(config, run) for run in script.all_runs(config)]


@pytest.fixture(scope="module")
def straight(checkpoints, tmp_path_factory):
    """Two data sets at two noise scales, four steps each, without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    concept(folder / "datasets/age")
    concept(folder / "datasets/smile", ("1", "2"), (96, 64))
    fit(checkpoints["flux"], folder, **SEVERAL, preview=True, log_every=1)
    return folder


def again(straight, checkpoints, folder, **changes):
    """The same runs into another folder, on the same pictures and cache."""
    places = {"datasets_folder": str(straight / "datasets"), "cache_dir": str(straight / "cache")}
    return trainer_of(checkpoints["flux"], folder, **(SEVERAL | places | changes))


# --- what a run leaves ----------------------------------------------------------------------------


def test_every_run_leaves_what_the_house_promises(straight):
    folders = run_folders(straight, datasets=["age", "smile"], noise_scales=[1, 3])
    assert [f.name for f in folders] == [
        f"{dataset}_vtrain_image_4.0eta_{beta}ns_full_base_v1"
        for dataset in ("age", "smile")
        for beta in ("1.0", "3.0")
    ]
    for folder in folders:
        dataset, beta = folder.parent.name, "3.0" if "3.0ns" in folder.name else "1.0"
        files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        expected = {"run.json", "config.yaml", "README.md", "metrics.jsonl", "samples/pairs.png"}
        expected |= {"train_pairedit.py", "utils.py"}
        for step in (2, 4):
            expected |= {f"samples/step-{step:06d}.png"}
            expected |= {f"checkpoint-{step}/{n}" for n in ("state.json", "training_state.pt")}
            stem = f"{dataset}_4.0eta_{beta}ns_4inf_{step}epoch"
            expected |= {f"{stem}{end}" for end in (".safetensors", "_0.safetensors", ".pt", "_0.pt")}
        assert files == expected
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        for row in rows:
            assert row["loss"] == pytest.approx(row["loss_content"] + row["loss_semantic"])
            assert np.isfinite(row["loss"]) and row["loss_content"] > 0
        assert json.loads((folder / "run.json").read_text())["config"]["rank"] == 16
        assert f"{dataset}_4.0eta_{beta}ns_4inf_4epoch.safetensors" in (folder / "README.md").read_text()


def test_the_files_hold_content_and_semantic_and_the_runs_differ(straight):
    files = loras(straight / "out")
    assert len(files) == 8
    semantic = [t for name, t in files.items() if not name.endswith("_0.safetensors")]
    name = "transformer.transformer_blocks.0.attn.to_q.lora_B.weight"
    ups = [tensors[name] for tensors in files.values()]
    for number, up in enumerate(ups):
        assert up.any() and not any(torch.equal(up, other) for other in ups[:number])
    assert len(semantic) == 4


def test_pictures_show_the_pairs_and_the_slider(straight):
    folder = run_folders(straight, noise_scales=[3])[0]
    strip = np.asarray(Image.open(folder / "samples/step-000004.png").convert("RGB")).astype(int)
    cells = strip[24:280, 8:264], strip[24:280, 272:528]
    assert all(cell.std() > 5 for cell in cells)
    assert abs(cells[0] - cells[1]).max() > 0  # scale 0 and scale 1
    first = np.asarray(Image.open(folder / "samples/step-000002.png").convert("RGB")).astype(int)
    assert np.array_equal(first[24:280, 8:264], cells[0])  # the base does not change
    pairs = Image.open(folder / "samples/pairs.png")
    assert pairs.width == 8 + 2 * 264 and pairs.height > 3 * 256


def test_the_preview_is_what_the_pipeline_draws(straight, checkpoints, tmp_path):
    """Scale 1, skip 1 of 4 steps: two steps of the base, two with the LoRA."""
    import diffusers

    trainer = again(straight, checkpoints, tmp_path, datasets=["age"], noise_scales=[3], preview=True)
    trainer.setup_accelerator()
    trainer.find_data()
    trainer.cache_embeddings()
    trainer.load_transformer()
    run_ = script.all_runs(trainer.config)[0]
    trainer.begin(run_)
    source = run_folders(straight, noise_scales=[3])[0]
    trainer._restore(source / "checkpoint-4", {"step": 4})
    drawn = []
    original = script.unpack_tokens
    script.unpack_tokens = lambda tokens, grid: (drawn.append(tokens), original(tokens, grid))[1]
    try:
        trainer.preview(run_)
    finally:
        script.unpack_tokens = original
    pipeline = diffusers.FluxPipeline.from_pretrained(checkpoints["flux"])
    pipeline.load_lora_weights(str(next(source.glob("*_4epoch.safetensors"))))

    def switch(pipe, i, t, kwargs):
        (pipe.enable_lora if i >= 1 else pipe.disable_lora)()
        return {}

    pipeline.disable_lora()
    options = {"height": 64, "width": 64, "num_inference_steps": 4, "max_sequence_length": 16}
    theirs = pipeline(
        "image of a person",
        generator=torch.Generator().manual_seed(6666),
        guidance_scale=3.5,
        output_type="latent",
        callback_on_step_end=switch,
        **options,
    ).images
    torch.testing.assert_close(drawn[0][1:], theirs, rtol=1e-4, atol=1e-4)
    assert (drawn[0][0] - drawn[0][1]).abs().max() > 1e-3


def test_a_run_alone_is_the_same_as_among_others(straight, checkpoints, tmp_path):
    again(straight, checkpoints, tmp_path, datasets=["smile"], noise_scales=[3]).fit()
    alone = loras(tmp_path / "out")
    assert len(alone) == 2
    theirs = loras(straight / "out")
    assert_same(alone, {name: theirs[name] for name in alone})


def test_versions_are_repeats_with_other_draws(straight, checkpoints, tmp_path):
    one = {"datasets": ["age"], "noise_scales": [3]}
    again(straight, checkpoints, tmp_path, **one, train_start=1, train_count=2).fit()
    files = loras(tmp_path / "out")
    assert {name.split("_v")[-1].split("/")[0] for name in files} == {"1", "2"}
    theirs = loras(straight / "out")
    first = {name: tensors for name, tensors in files.items() if "_v1/" in name}
    assert_same(first, {name: theirs[name] for name in first})
    for name, tensors in first.items():
        other = files[name.replace("_v1/", "_v2/")]
        assert not any(torch.equal(tensors[n], other[n]) for n in tensors)


def test_gradient_checkpointing_learns_the_same(straight, checkpoints, tmp_path):
    changes = {"datasets": ["smile"], "noise_scales": [3], "gradient_checkpointing": True}
    again(straight, checkpoints, tmp_path, **changes).fit()
    alone, theirs = loras(tmp_path / "out"), loras(straight / "out")
    assert_same(alone, {name: theirs[name] for name in alone}, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", list(script.LOSSES))
def test_every_variant_trains_in_bf16(variant, straight, checkpoints, tmp_path):
    changes = {"python_name": variant, "mixed_precision": "bf16", "gradient_checkpointing": True}
    changes |= {"datasets": ["age"], "noise_scales": [1], "batch_size": 2, "preview": True}
    if variant == "train_image_real":
        changes["image_ids"] = ["7002"]
    trainer = again(straight, checkpoints, tmp_path, **changes)
    trainer.fit()
    names = script.adapters_of(variant)
    files = loras(tmp_path / "out")
    assert len(files) == len(names)
    assert {p.dtype for p in trainer.trained} == {torch.float32}
    for tensors in files.values():
        assert all(t.isfinite().all() for t in tensors.values())
        assert all(t.any() for n, t in tensors.items() if "lora_B" in n)
    assert len(list((tmp_path / "out").rglob("step-000004.png"))) == 1


def test_a_tiny_model_overfits_one_photo(straight, checkpoints, tmp_path):
    changes = {"python_name": "train_image_real", "image_ids": [7000], "datasets": ["age"]}
    changes |= {"noise_scales": [1], "train_iteration": 60, "save_per_steps": 100}
    changes |= {"log_every": 1, "rank": 32, "alpha": 32.0, "learning_rate": 0.01, "batch_size": 4}
    trainer = again(straight, checkpoints, tmp_path, **changes)
    trainer.fit()
    (folder,) = (tmp_path / "out/age").iterdir()
    assert folder.name == "age_7000_vtrain_image_real_base_v1"
    assert (folder / "age_7000_4inf_60epoch.pt").exists()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss_content"] for row in rows]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5]), (losses[:5], losses[-10:])
