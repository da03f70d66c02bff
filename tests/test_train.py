"""train_qwen_edit.py and cache_embeddings.py end to end, as commands and in a notebook's way."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import (
    LAUNCH,
    PAIRS,
    ROOT,
    copy_pairs,
    read_page,
    run,
    small_config,
    suffix_dataset,
    with_lora_noise,
    write_config,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import train_qwen_edit as script
from utils import UserError, load_config

ALL_TARGETS = [
    "to_q",
    "to_k",
    "to_out.0",
    "to_add_out",
    "img_mlp.net.2",
    "txt_mlp.net.2",
    "img_mod.1",
]


def lora_of(folder):
    return load_file(folder / "out" / script.LORA_FILE)


def assert_same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys() and len(ours) > 0
    for name, tensor in ours.items():
        if tolerance:
            torch.testing.assert_close(tensor, theirs[name], **tolerance)
        else:
            assert torch.equal(tensor, theirs[name]), name


@pytest.fixture(scope="session")
def straight_run(checkpoints, tmp_path_factory):
    """12 steps without interruption; its cache serves the other runs."""
    folder = tmp_path_factory.mktemp("straight")
    pairs = copy_pairs(folder / "data", ("astronaut1", "chelsea0", "coffee0", "hubble0", "hubble1"))
    dataset = suffix_dataset(pairs, holdout=["hubble1"], views=2, view_scale=0.7)
    changes = {
        "data.dataset_configs": [dataset],
        "data.caption_dropout_rate": 0.3,
        "model.lora.target_modules": ALL_TARGETS,
        "train.max_train_steps": 12,
        "train.checkpointing_steps": 2,
        "lr_scheduler.scheduler_type": "cosine",
        "lr_scheduler.warmup_steps": 2,
        "validation.steps": 6,
        "validation.num_inference_steps": 2,
        "validation.true_cfg_scale": 2.0,
        "logging.log_every": 3,
    }
    config = small_config(checkpoints["2511"], folder, **changes)
    file = write_config(folder, config)
    run(script.__file__, "--config", file)
    return folder, file


def rerun(straight_run, tmp_path, *overrides, launch=(), check=True, env=None):
    """The same run into another folder, on the same cache."""
    return run(
        script.__file__,
        "--config",
        straight_run[1],
        "--logging.output_dir",
        tmp_path / "out",
        *overrides,
        launch=launch,
        check=check,
        env=env,
    )


def test_a_run_leaves_what_the_house_promises(straight_run):
    out = straight_run[0] / "out"
    for name in (
        "run.json",
        "config.yaml",
        "README.md",
        "audit.json",
        "train_qwen_edit.py",
        "utils.py",
    ):
        assert (out / name).stat().st_size > 0, name
    record = json.loads((out / "run.json").read_text())
    assert record["config"]["train"]["max_train_steps"] == 12 and record["versions"]["torch"]
    assert (out / "train_qwen_edit.py").read_bytes() == Path(script.__file__).read_bytes()
    assert len(script.list_checkpoints(out)) == 6 and not list(out.glob(".*"))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    # a line every 3 steps and at every checkpoint
    assert len(losses) == 8 and all(np.isfinite(losses))
    assert [r["step"] for r in rows if "validation_loss" in r] == [0, 6, 12]
    sheets = {file.name for file in (out / "samples").iterdir()}
    assert sheets == {"first_batch.png"} | {f"step_{s:06d}.png" for s in (0, 6, 12)}
    again = load_config(script.Config, ["--config", str(out / "config.yaml")])
    assert again.model_dump(mode="json") == record["config"]


def test_validation_shows_references_base_lora_target(straight_run):
    sheets = straight_run[0] / "out" / "samples"
    start, end = (Image.open(sheets / f"step_{s:06d}.png") for s in (0, 12))
    assert start.size == end.size == (4 * 264 + 8, 24 + 256 + 32)
    columns = [
        [sheet.crop((8 + 264 * i, 24, 264 * (i + 1), 280)) for i in range(4)]
        for sheet in (start, end)
    ]
    assert columns[0][1].tobytes() == columns[0][2].tobytes()  # step 0: the LoRA does nothing
    assert columns[1][1].tobytes() != columns[1][2].tobytes()
    assert columns[0][1].tobytes() == columns[1][1].tobytes()  # the base never changes


@pytest.mark.slow
def test_killed_at_five_moments_and_resumed_it_ends_bit_equal(straight_run, tmp_path):
    """SIGKILL while loading, before the first checkpoint, while writing one, later, at the end."""
    command = [sys.executable, script.__file__, "--config", str(straight_run[1])]
    command += [
        "--logging.output_dir",
        str(tmp_path / "out"),
        "--train.resume_from_checkpoint",
        "latest",
    ]
    out = tmp_path / "out"

    def moments(name):
        return {
            "loading": lambda: (out / "run.json").exists(),
            "first steps": lambda: (out / "samples" / "step_000000.png").exists(),
            "a checkpoint being written": lambda: any(out.glob(".checkpoint-*.tmp")),
            "between": lambda: (out / "checkpoint-8").exists(),
            "the end": lambda: (out / "checkpoint-12").exists(),
        }[name]

    killed = []
    for name in ("loading", "first steps", "a checkpoint being written", "between", "the end"):
        reached = moments(name)
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while not reached() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        killed.append(process.wait() == -signal.SIGKILL)
        if name == "loading":
            (out / "run.json").unlink(missing_ok=True)
    assert sum(killed) >= 4, "the kills came too late to test anything"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "resumed from" in done.stderr + done.stdout
    assert_same(lora_of(tmp_path), lora_of(straight_run[0]))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    expected = (straight_run[0] / "out/metrics.jsonl").read_text().splitlines()
    losses = {r["step"]: r["loss"] for r in rows if "loss" in r}
    for row in map(json.loads, expected):
        if "loss" in row and row["step"] in (2, 6, 12):
            assert losses[row["step"]] == pytest.approx(row["loss"], rel=1e-3)


def test_sigterm_saves_and_exits_0_and_the_rest_is_bit_equal(straight_run, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, script.__file__, "--config", str(straight_run[1])]
    command += ["--logging.output_dir", str(out)]
    for _ in range(3):  # on a busy machine the signal may come after the last step
        shutil.rmtree(out, ignore_errors=True)
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        while not (out / "checkpoint-2").exists() and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 0, printed
        step = int(script.list_checkpoints(out)[-1].name.split("-")[1])
        if step < 12:
            break
    assert step < 12 and (out / script.LORA_FILE).exists()
    rerun(straight_run, tmp_path, "--train.resume_from_checkpoint", "latest")
    assert_same(lora_of(tmp_path), lora_of(straight_run[0]))


def test_num_workers_changes_no_bit(straight_run, tmp_path):
    rerun(straight_run, tmp_path, "--data.num_workers", 2, "--train.checkpointing_steps", 100)
    assert_same(lora_of(tmp_path), lora_of(straight_run[0]))


@pytest.mark.slow
def test_two_processes_learn_the_same(straight_run, tmp_path):
    launch = [*LAUNCH, "--config_file", str(ROOT / "configs/accelerate/ddp.yaml")]
    done = rerun(
        straight_run,
        tmp_path,
        "--data.batch_size",
        1,
        launch=launch,
        env={"CUDA_VISIBLE_DEVICES": ""},
    )
    assert "2 samples a step" in done.stderr
    assert_same(lora_of(tmp_path), lora_of(straight_run[0]), rtol=0, atol=2e-4)
    name, tensor = max(lora_of(straight_run[0]).items(), key=lambda item: item[1].abs().max())
    assert tensor.abs().max() > 0.01, f"{name}: nothing was learned"


def worker(folder, rank):
    """Process id of one rank of the run that writes into `folder`."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            command = (place / "cmdline").read_bytes()
            environment = (place / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if str(folder).encode() in command and f"RANK={rank}".encode() in environment:
            return int(place.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.slow
def test_a_stop_signal_to_one_of_two_processes_saves_and_ends_both(straight_run, tmp_path):
    """Although no log line is due for long: they ask each other every few seconds."""
    out = tmp_path / "out"
    command = [*LAUNCH, "--config_file", str(ROOT / "configs/accelerate/ddp.yaml")]
    command += [script.__file__, "--config", str(straight_run[1]), "--logging.output_dir", str(out)]
    command += ["--train.max_train_steps", "1000000", "--train.checkpointing_steps", "20"]
    command += ["--logging.log_every", "1000000", "--data.batch_size", "1"]
    command += ["--train.checkpoints_total_limit", "1", "--validation.steps", "null"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    while not script.list_checkpoints(out) and process.poll() is None:
        time.sleep(0.05)
    os.kill(worker(out, 1), signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed[-3000:]
    (saved,) = script.list_checkpoints(out)
    assert script.valid_checkpoint(saved) and (out / script.LORA_FILE).exists()
    assert int(saved.name.split("-")[1]) < 1000


@pytest.mark.slow
def test_accumulation_learns_the_same(straight_run, tmp_path):
    split = ["--data.batch_size", 1, "--train.gradient_accumulation_steps", 2]
    rerun(straight_run, tmp_path, *split)
    assert_same(lora_of(tmp_path), lora_of(straight_run[0]), rtol=0, atol=2e-4)


def test_a_new_run_in_the_folder_of_an_earlier_one_sets_that_aside(straight_run, tmp_path):
    shutil.copytree(straight_run[0] / "out", tmp_path / "out")
    done = rerun(straight_run, tmp_path, "--train.max_train_steps", 3)
    assert "holds an earlier run" in done.stderr
    names = [f.name for f in script.list_checkpoints(tmp_path / "out")]
    assert names == ["checkpoint-2", "checkpoint-3"]
    earlier = tmp_path / "out" / "earlier-1"
    assert len(script.list_checkpoints(earlier)) == 6 and (earlier / "metrics.jsonl").exists()
    assert all(script.valid_checkpoint(f) for f in script.list_checkpoints(earlier))
    assert read_page(earlier / "report.html")  # with its pictures


def test_resume_refuses_what_would_be_another_run(straight_run, tmp_path):
    out = straight_run[0] / "out"
    done = run(
        script.__file__,
        "--config",
        straight_run[1],
        "--train.resume_from_checkpoint",
        "checkpoint-3",
        check=False,
    )
    assert done.returncode == 2 and "checkpoint-3 is missing" in done.stderr
    changed = ["--train.resume_from_checkpoint", "latest", "--optimizer.init_args.lr", "0.5"]
    done = run(script.__file__, "--config", straight_run[1], *changed, check=False)
    assert done.returncode == 2 and "optimizer.init_args.lr: was 0.01, is 0.5" in done.stderr
    assert "Traceback" not in done.stderr and len(script.list_checkpoints(out)) == 6


def test_latest_passes_over_a_damaged_checkpoint(straight_run, tmp_path):
    shutil.copytree(straight_run[0] / "out", tmp_path / "out")
    state = tmp_path / "out" / "checkpoint-12" / "training_state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    done = rerun(straight_run, tmp_path, "--train.resume_from_checkpoint", "latest")
    assert "checkpoint-12 is damaged" in done.stderr
    assert re.search(r"resumed from \S*checkpoint-10", done.stderr)
    assert_same(lora_of(tmp_path), lora_of(straight_run[0]))


def test_a_new_checkpoint_is_not_pruned_in_favour_of_a_damaged_later_one(straight_run, tmp_path):
    shutil.copytree(straight_run[0] / "out", tmp_path / "out")
    for step in (6, 8, 10):
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{step}")
    (tmp_path / "out" / "checkpoint-12" / "training_state.pt").write_bytes(b"")
    limits = ["--train.checkpoints_total_limit", 1, "--train.max_train_steps", 6]
    rerun(straight_run, tmp_path, "--train.resume_from_checkpoint", "latest", *limits)
    folders = script.list_checkpoints(tmp_path / "out")
    assert [f.name for f in folders if script.valid_checkpoint(f)] == ["checkpoint-6"]


def test_an_older_checkpoint_is_not_mixed_with_newer_ones(straight_run, tmp_path):
    shutil.copytree(straight_run[0] / "out", tmp_path / "out")
    named = ["--train.resume_from_checkpoint", "checkpoint-4", "--train.checkpoints_total_limit", 1]
    done = rerun(straight_run, tmp_path, *named, check=False)
    assert done.returncode == 2 and "checkpoint-12, newer than checkpoint-4" in done.stderr
    for step in (6, 8, 10, 12):
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{step}")
    rerun(straight_run, tmp_path, *named)
    assert [f.name for f in script.list_checkpoints(tmp_path / "out")] == ["checkpoint-12"]
    assert_same(lora_of(tmp_path), lora_of(straight_run[0]))


def test_resume_notices_another_data_set_but_not_another_path(straight_run, tmp_path):
    shutil.copytree(straight_run[0] / "out", tmp_path / "out")
    shutil.copytree(straight_run[0] / "data", tmp_path / "data")
    moved = ["--data.dataset_configs.0.train_data_dir", tmp_path / "data"]
    latest = ["--train.resume_from_checkpoint", "latest", "--train.max_train_steps", 12]
    rerun(straight_run, tmp_path, *moved, *latest)
    for file in (tmp_path / "data").glob("coffee0_*"):
        file.unlink()
    done = rerun(straight_run, tmp_path, *moved, *latest, check=False)
    assert done.returncode == 2 and "samples (names, captions, pictures): was" in done.stderr


@pytest.mark.parametrize("ends", ["_T.txt", "_R.png"])
def test_resume_notices_an_edited_caption_or_picture(ends, straight_run, tmp_path):
    pairs = shutil.copytree(straight_run[0] / "data", tmp_path / "data")
    if ends == "_T.txt":
        (pairs / f"coffee0{ends}").write_text("something else")
    else:
        Image.open(pairs / f"coffee0{ends}").transpose(Image.Transpose.ROTATE_180).save(
            pairs / f"coffee0{ends}"
        )
    shutil.copytree(straight_run[0] / "out", tmp_path / "out")
    changed = ["--data.dataset_configs.0.train_data_dir", pairs]
    changed += ["--train.resume_from_checkpoint", "latest"]
    done = rerun(straight_run, tmp_path, *changed, check=False)
    assert done.returncode == 2 and "samples (names, captions, pictures)" in done.stderr


def test_num_epochs_shortens_the_run_and_its_schedule(make_trainer):
    trainer = make_trainer(
        **{
            "data.dataset_configs": [suffix_dataset(PAIRS)],
            "train.num_epochs": 1,
            "train.max_train_steps": 1000,
            "train.checkpointing_steps": 1000,
            "lr_scheduler.scheduler_type": "linear",
        }
    )
    trainer.fit()
    assert trainer.global_step == 7 == trainer.step_plan().steps  # 13 pairs, 2 a step
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-9)


def test_old_checkpoints_go_after_the_new_one_is_safe(straight_run, tmp_path):
    rerun(straight_run, tmp_path, "--train.checkpoints_total_limit", 2)
    names = [f.name for f in script.list_checkpoints(tmp_path / "out")]
    assert names == ["checkpoint-10", "checkpoint-12"]


def test_a_nan_names_its_samples_and_saves_nothing(straight_run, tmp_path):
    fork = (tmp_path / "train_nan.py", tmp_path / "utils.py")
    text = Path(script.__file__).read_text()
    text = text.replace("return error.flatten(1).mean(1)", "return error.flatten(1).mean(1) / 0")
    fork[0].write_text(text)
    shutil.copy(ROOT / "utils.py", fork[1])
    done = run(
        fork[0], "--config", straight_run[1], "--logging.output_dir", tmp_path / "out", check=False
    )
    assert done.returncode == 2 and "the loss of step 1 is inf" in done.stderr
    assert re.search(r"samples of this process: (astronaut1|chelsea0|coffee0|hubble0)", done.stderr)
    assert not script.list_checkpoints(tmp_path / "out")


def test_a_nan_gradient_is_noticed_although_the_loss_is_finite(make_trainer, tmp_path, monkeypatch):
    def poisoned(velocity, goal, weight, loss):
        return script.flow_loss(velocity, goal, weight, loss) + (velocity.sum() * 0).abs().sqrt()

    monkeypatch.setitem(script.LOSSES, "mse", poisoned)
    trainer = make_trainer(**{"train.max_train_steps": 1})
    with pytest.raises(UserError, match="gradient norm nan"):
        trainer.fit()
    assert not (tmp_path / "out" / script.LORA_FILE).exists()
    assert not script.list_checkpoints(tmp_path / "out")


def test_a_fork_of_two_files_trains_with_another_loss(straight_run, tmp_path):
    """Copy and modify is the product: the script and utils.py alone, another objective."""
    folder = tmp_path / "fork"
    folder.mkdir()
    for name in ("train_qwen_edit.py", "utils.py"):
        shutil.copy(ROOT / name, folder / name)
    file = folder / "train_qwen_edit.py"
    text = file.read_text().replace(
        "target_velocity.float()).square(), weight)", "target_velocity.float()).abs(), weight)"
    )
    assert text != file.read_text()
    file.write_text(text)
    done = subprocess.run(
        [
            sys.executable,
            file.name,
            "--config",
            straight_run[1],
            "--logging.output_dir",
            tmp_path / "out",
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr
    fork, original = (
        json.loads((f / "out/metrics.jsonl").read_text().splitlines()[1])["loss"]
        for f in (tmp_path, straight_run[0])
    )
    assert fork < original * 0.8  # mean |e| against mean e^2 at a loss above 1
    learned = lora_of(tmp_path)
    assert any(not torch.equal(t, learned[n]) for n, t in lora_of(straight_run[0]).items())


def test_it_learns(make_trainer, tmp_path):
    """Overfitting one pair brings the validation loss of that pair down."""
    pairs = copy_pairs(tmp_path / "data", ("chelsea0", "coffee0"))
    for end in ("_R.png", "_T.png", "_T.txt"):  # the held-out pair is a copy of the trained one
        shutil.copy(pairs / f"chelsea0{end}", pairs / f"coffee0{end}")
    trainer = make_trainer(
        **{
            "data.dataset_configs": [suffix_dataset(pairs, holdout=["coffee0"])],
            "train.max_train_steps": 40,
            "validation.steps": 20,
            "validation.num_inference_steps": 2,
            "model.lora.r": 16,
            "model.lora.target_modules": [*ALL_TARGETS, "to_v", "img_mlp.net.0.proj"],
        }
    )
    trainer.fit()
    rows = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    losses = [r["validation_loss"] for r in map(json.loads, rows) if "validation_loss" in r]
    assert len(losses) == 3 and losses[2] < 0.8 * losses[0]


@pytest.mark.parametrize(("r", "alpha"), [(4, 8.0), (4, 1.0), (8, 12.0)])
def test_a_fresh_pipeline_loads_the_lora_at_its_strength(
    r, alpha, make_trainer, tmp_path, checkpoints
):
    trainer = make_trainer(
        **{
            "model.lora.r": r,
            "model.lora.lora_alpha": alpha,
            "model.lora.target_modules": ALL_TARGETS,
        }
    )
    trainer.set_lora()
    trainer.load_model(["scheduler"])
    with_lora_noise(trainer.transformer)
    arguments = (
        torch.randn(1, 16, 1, 8, 8),
        [torch.randn(1, 16, 1, 8, 8)],
        torch.randn(1, 9, 64),
        None,
        torch.tensor([0.5]),
    )
    with torch.no_grad():
        expected = script.predict_velocity(trainer.transformer, *arguments)
        trainer.transformer.disable_adapters()
        base = script.predict_velocity(trainer.transformer, *arguments)
    file = trainer.save_lora(tmp_path)
    pipeline = diffusers.QwenImageEditPlusPipeline.from_pretrained(
        checkpoints["2511"], processor=script.load_processor(checkpoints["2511"] / "processor")
    )
    pipeline.load_lora_weights(file)
    with torch.no_grad():
        loaded = script.predict_velocity(pipeline.transformer, *arguments)
    assert (expected - base).abs().max() > 0.01
    exact = np.log2(alpha / r) % 1 == 0  # powers of two commute with rounding
    torch.testing.assert_close(loaded, expected, rtol=0, atol=0 if exact else 2e-6)
    # ComfyUI and kohya loaders read W += (alpha / r) B A with alpha = r unless an .alpha key says
    # otherwise: the bare product must already be the whole change
    tensors = load_file(file)
    assert not [name for name in tensors if name.endswith(".alpha")]
    name = "transformer.transformer_blocks.0.attn.to_q"
    change = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    layer = trainer.transformer.transformer_blocks[0].attn.to_q
    torch.testing.assert_close(change, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-6)
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["image_edit_lora"])
    assert about["reference_area"] == "target" and about["lora_alpha"] == alpha

    trainer.transformer.enable_adapters()
    trainer.merge_lora()
    with torch.no_grad():
        merged = script.predict_velocity(trainer.transformer, *arguments)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    again = make_trainer()
    again.load_lora(file)
    with torch.no_grad():
        reloaded = script.predict_velocity(again.transformer, *arguments)
    torch.testing.assert_close(reloaded, loaded, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["suffix", "folders"])
def test_two_references_train_in_both_layouts(layout, make_trainer, tmp_path):
    """References of another shape, mixed with single ones: batches of one shape each."""
    pairs = copy_pairs(tmp_path / "data")
    if layout == "suffix":
        dataset = suffix_dataset(pairs, holdout=["hubble0"])
        dataset["image_configs"]["tones"] = {"suffix": "_D"}
        both = [{"image": "before"}, {"image": "tones"}]
        dataset["reference_configs"]["both"] = both
        batch = dataset["batch_configs"][0]
        dataset["batch_configs"].append({**batch, "reference_config": "both"})
        dataset["caption_configs"]["text"]["reference_list"]["reference_config"] = "both"
    else:
        for end, name in (("T", "after"), ("R", "before"), ("D", "tones")):
            (pairs / name).mkdir()
            for file in pairs.glob(f"*_{end}.*"):
                file.rename(pairs / name / file.name.replace(f"_{end}", ""))
        dataset = {"train_data_dir": str(pairs), "resolution": 64, "target_dir": "after"}
        dataset |= {"reference_dirs": ["before", "tones"], "holdout": ["hubble0"]}
    trainer = make_trainer(
        **{
            "data.dataset_configs": [dataset],
            "train.max_train_steps": 6,
            "validation.steps": 6,
            "validation.num_inference_steps": 2,
        }
    )
    trainer.fit()
    seen = set()
    for step in trainer.train_dataloader():
        for batch in step:
            seen.add(len(batch["control_latent"]))
            assert {tuple(c.shape[-2:]) for c in batch["control_latent"][1:]} <= {(4, 16)}
    assert trainer.global_step == 6 and seen == ({1, 2} if layout == "suffix" else {2})
    sheet = Image.open(tmp_path / "out" / "samples" / "step_000006.png")
    columns = 5 if layout == "folders" else 4  # references, base, LoRA, target
    assert sheet.width == columns * 264 + 8


def test_training_can_start_from_a_lora_file(make_trainer, tmp_path):
    trainer = make_trainer(**{"model.lora.lora_alpha": 16.0})
    trainer.set_lora()
    with_lora_noise(trainer.transformer)
    file = trainer.save_lora(tmp_path / "start.safetensors")
    other = make_trainer(
        **{"model.lora.lora_alpha": 16.0, "model.lora.pretrained_weight": str(file)}
    )
    other.set_lora()
    assert_same(script.lora_tensors(other.transformer), script.lora_tensors(trainer.transformer))
    wrong = make_trainer(**{"model.lora.r": 8, "model.lora.pretrained_weight": str(file)})
    with pytest.raises(UserError, match=r"it is a lora of rank 4.* asks for lora of rank 8"):
        wrong.set_lora()


def test_a_lora_of_other_layers_is_refused_before_the_weights_load(make_trainer, tmp_path):
    trainer = make_trainer(**{"model.lora.target_modules": "attn-all"})
    trainer.set_lora()
    file = trainer.save_lora(tmp_path / "all.safetensors")
    other = make_trainer(**{"model.lora.pretrained_weight": str(file)})
    other.setup_accelerator()
    with pytest.raises(UserError, match=r"other layers than model.lora asks for"):
        other.preflight()
    assert other.transformer is None


@pytest.mark.parametrize("method", ["lora", "dora", "lokr"])
def test_a_start_of_every_method_passes_the_check_before_the_weights_load(
    method, make_trainer, tmp_path
):
    trainer = make_trainer(**{"model.lora.method": method})
    trainer.set_lora()
    file = trainer.save_lora(tmp_path / "start.safetensors")
    start = {"model.lora.method": method, "model.lora.pretrained_weight": str(file)}
    other = make_trainer(**start)
    other.setup_accelerator()
    other.preflight()


def test_a_target_that_matches_nothing_is_an_error_with_the_names(make_trainer):
    trainer = make_trainer(**{"model.lora.target_modules": ["to_qq"]})
    with pytest.raises(UserError, match=r"to_qq.*attn\.add_k_proj.*img_mlp"):
        trainer.set_lora()


def test_a_regex_chooses_targets(make_trainer):
    trainer = make_trainer(
        **{"model.lora.target_modules": r".*transformer_blocks\.1\.attn\.to_[qk]"}
    )
    trainer.set_lora()
    names = {name.split(".lora_")[0] for name in script.lora_tensors(trainer.transformer)}
    assert names == {f"transformer_blocks.1.attn.to_{x}" for x in "qk"}


def test_every_trained_parameter_gets_a_gradient(make_trainer):
    """DDP would wait forever for the others (text outputs of the last block)."""
    trainer = make_trainer(
        **{"model.lora.target_modules": [*ALL_TARGETS, "add_q_proj", "txt_mod.1"]}
    )
    trainer.set_lora()
    trainer.load_model(["scheduler"])
    with_lora_noise(trainer.transformer)
    batch = {
        "pixel_latent": torch.randn(1, 16, 1, 8, 8),
        "control_latent": [torch.randn(1, 16, 1, 8, 8)],
        "prompt_embed": torch.randn(1, 6, 64),
    }
    trainer.training_step(batch).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainer.trainable())


@pytest.mark.parametrize("kind", ["2508", "2509", "2511"])
def test_cached_and_uncached_training_lose_the_same_bit_for_bit(kind, make_trainer):
    changes = {"data.caption_dropout_rate": 0.5, "data.batch_size": 2}
    dataset = suffix_dataset(PAIRS, views=2, view_scale=0.6)
    if kind == "2508":
        dataset["caption_configs"]["text"]["reference_list"] = None
        changes["data.reference_area"] = 64 * 64
    losses = {}
    for cached in (True, False):
        trainer = make_trainer(
            kind, **{"cache.use_cache": cached, "data.dataset_configs": [dataset], **changes}
        )
        trainer.setup_accelerator()
        trainer.find_data()
        if cached:
            trainer.cache_embeddings()
        trainer.set_lora()
        loader = iter(trainer.train_dataloader())
        with torch.no_grad():
            losses[cached] = [
                trainer.training_step(batch).item() for _ in range(4) for batch in next(loader)
            ]
    assert losses[True] == losses[False] and len(set(losses[True])) > 3


def test_the_uncached_command_ends_with_the_cached_commands_lora(straight_run, tmp_path):
    rerun(straight_run, tmp_path, "--cache.use_cache", "false")
    assert_same(lora_of(tmp_path), lora_of(straight_run[0]))


@pytest.mark.parametrize("precision", ["fp8-quanto", "int8-quanto", "int4-quanto", "int2-quanto"])
def test_quantised_bases_train_and_their_lora_loads(precision, make_trainer, tmp_path):
    trainer = make_trainer(
        **{
            "model.base_model_precision": precision,
            "train.max_train_steps": 2,
            "train.gradient_checkpointing": True,
        }
    )
    trainer.fit()
    from optimum.quanto import QLinear

    block = trainer.bare_transformer().transformer_blocks[0]
    assert isinstance(block.attn.to_q.base_layer, QLinear)
    assert type(block.img_mod[1]) is torch.nn.Linear  # modulation keeps its precision
    assert all(p.dtype == torch.float32 for p in trainer.trainable())
    tensors = load_file(tmp_path / "out" / script.LORA_FILE)
    assert any(t.abs().sum() > 0 for n, t in tensors.items() if "lora_B" in n)
    with pytest.raises(UserError, match="quantised"):
        trainer.merge_lora()


def test_bf16_keeps_lora_optimizer_and_loss_in_fp32(make_trainer):
    trainer = make_trainer(
        **{
            "train.mixed_precision": "bf16",
            "train.max_train_steps": 2,
            "train.gradient_checkpointing": True,
        }
    )
    trainer.fit()
    transformer = trainer.bare_transformer()
    assert transformer.transformer_blocks[0].attn.to_v.base_layer.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in trainer.trainable())
    moments = [s["exp_avg"] for s in trainer.optimizer.state_dict()["state"].values()]
    assert moments and all(m.dtype == torch.float32 for m in moments)


def test_gradient_checkpointing_changes_no_gradient(make_trainer):
    batch = {
        "pixel_latent": torch.randn(1, 16, 1, 8, 8),
        "control_latent": [torch.randn(1, 16, 1, 8, 8)],
        "prompt_embed": torch.randn(1, 6, 64),
        "noise": torch.randn(1, 16, 1, 8, 8),
        "sigma": torch.tensor([0.5]),
    }
    found = []
    for on in (False, True):
        trainer = make_trainer(**{"train.gradient_checkpointing": on})
        trainer.set_lora()
        trainer.load_model(["scheduler"])
        with_lora_noise(trainer.transformer)
        assert trainer.transformer.gradient_checkpointing == on
        trainer.training_step(batch).backward()
        found.append([p.grad for p in trainer.trainable()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_seeds_notebook_examples(make_trainer, tmp_path):
    """Construct, cache, fit, save, predict; a loader may be given or left out."""
    trainer = make_trainer(**{"model.lora.lora_alpha": 8.0})
    photos = [np.asarray(Image.open(PAIRS / f"coffee0_{x}.png").convert("RGB")) for x in "RT"]
    batch = {"image": [photos[1]], "control": [[photos[0]]], "prompt": ["sunset"]}
    # 1 MP pictures through a random encoder take long: 64 px here
    batch = {k: [v[0][::4, ::4]] if k == "image" else v for k, v in batch.items()}
    batch["control"] = [[photos[0][::4, ::4]]]
    items = trainer.cache_step(batch, "cpu", "cpu")
    names = {"pixel_latent", "control_latent", "prompt_embed", "prompt_embeds_mask"}
    names |= {"empty_prompt_embed", "empty_prompt_embeds_mask"}
    assert set(items[0]) == names and items[0]["pixel_latent"].shape == (16, 1, 8, 8)
    assert trainer.cache_exist and trainer.cache_embeddings([batch]) == 1
    trainer.set_lora()
    trainer.fit([batch, batch])
    assert trainer.global_step == 4
    folder = tmp_path / "lora"
    trainer.save_lora(folder)
    trainer.setup_predict()
    picture = trainer.predict(photos[0], "sunset", num_inference_steps=2)
    assert picture.dtype == np.uint8 and picture.shape == (64, 64, 3)
    embeds, mask = trainer.encode_prompt_image_embedding("sunset", photos[0][:64, :64])
    empty, empty_mask = trainer._encode_empty_prompt(photos[0][:64, :64])
    assert embeds.shape[:2] == mask.shape and len(empty) == len(empty_mask) < embeds.shape[1]
    latents = trainer.encode_image_embedding(photos[0][:64, :96])
    assert latents.shape == (1, 16, 1, 8, 12)
    assert trainer.decode_vae_latent(latents).shape == (1, 64, 96, 3)
    other = make_trainer()
    other.quantize = True
    other.setup_predict()
    assert other.transformer.quantized_to == "fp8-quanto"
    assert other.predict(photos[0], "sunset", num_inference_steps=2).shape == (64, 64, 3)


def test_a_loader_that_runs_dry_is_an_error(make_trainer):
    trainer = make_trainer()
    photo = Image.open(PAIRS / "coffee0_R.png").resize((64, 64))
    batch = {"image": [photo], "control": [photo], "prompt": ["x"]}
    with pytest.raises(UserError, match="no more batches"):
        trainer.fit(b for b in [batch])
    with pytest.raises(UserError, match="uint8"):
        make_trainer().cache_step({**batch, "image": [np.zeros((64, 64, 3))]})


def test_what_needs_no_weights_is_checked_before_they_load(make_trainer, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    trainer = make_trainer(
        **{
            "model.lora.target_modules": ["to_q", "to_kk"],
            "optimizer.init_args": {"lrr": 1},
            "logging.report_to": "wandb",
        }
    )
    with pytest.raises(UserError) as error:
        trainer.fit()
    text = str(error.value)
    assert "no layer matches to_kk" in text and "lrr" in text and "wandb is not installed" in text
    assert trainer.transformer is trainer.vae is None


def test_touching_one_byte_rebuilds_exactly_what_contains_it(checkpoints, tmp_path):
    pairs = copy_pairs(tmp_path / "data")
    dataset = suffix_dataset(pairs)
    dataset["image_configs"]["tones"] = {"suffix": "_D"}
    dataset["reference_configs"]["before"].append({"image": "tones"})
    changes = {"data.dataset_configs": [dataset], "data.caption_dropout_rate": 0.1}
    file = write_config(tmp_path, small_config(checkpoints["2511"], tmp_path, **changes))

    def fill(*overrides):
        before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("??/??/*")}
        trainer = script.QwenImageEditTrainer(
            load_config(script.Config, ["--config", str(file), *overrides])
        )
        count = trainer.cache_embeddings()
        after = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("??/??/*")}
        changed = {p for p in after if after[p] != before.get(p)}
        assert len(changed) == count
        return [next(iter(safe_open(p, "pt").keys())) for p in changed]

    assert sorted(fill()) == ["embed"] * 8 + ["latent"] * 12  # 4 x (full, empty), 4 x 3 pictures
    assert fill() == []
    swatch = pairs / "coffee0_D.png"
    image = Image.open(swatch).convert("RGB")
    image.putpixel((5, 5), (1, 2, 3))
    image.save(swatch)
    assert sorted(fill()) == [
        "embed",
        "embed",
        "latent",
    ]  # the picture and the prompts that show it
    target = pairs / "coffee0_T.png"
    Image.open(target).transpose(Image.Transpose.ROTATE_180).save(target)
    assert fill() == ["latent"]
    (pairs / "hubble0_T.txt").write_text("another instruction")
    assert fill() == ["embed"]
    everything = ["embed"] * 8 + ["latent"] * 12
    assert fill("--data.dataset_configs.0.resolution", "96").count("latent") == 12
    assert fill("--data.reference_area", "target") == []
    assert fill("--data.reference_area", "16384") == ["latent"] * 8  # only the references
    os.utime(pairs / "astronaut1_R.png")  # touched, not changed
    assert fill() == []
    AcceleratorState._reset_state(reset_partial_state=True)
    assert sorted(fill("--train.mixed_precision", "bf16")) == everything
    AcceleratorState._reset_state(reset_partial_state=True)
    other_order = json.dumps([{"image": "tones"}, {"image": "before"}])
    order = ["--data.dataset_configs.0.reference_configs.before", other_order]
    assert fill(*order) == ["embed"] * 8  # "Picture 1" is another one; the latents are there
    # what changes no entry
    for same in (
        ["--model.base_model_precision", "int8-quanto"],
        ["--data.dataset_configs.0.batch_configs.0.reference_dropout", "0.5"],
        ["--data.caption_dropout_rate", "0.9"],
        ["--loss.loss_type", "huber"],
    ):
        assert fill(*same) == [], same


def test_a_damaged_entry_is_reported_and_rebuilt(straight_run, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(straight_run[0] / "cache", cache)
    (cache / "index.sqlite").unlink()  # it knows the old times
    entries = sorted(cache.glob("??/??/*"))
    sound = entries[0].read_bytes()
    entries[0].write_bytes(sound[:-5] + b"wrong")
    entries[1].write_bytes(b"")
    command = ["cache_embeddings.py", "--config", straight_run[1], "--cache.cache_dir", cache]
    command += ["--logging.output_dir", tmp_path / "out"]
    done = run(*command)
    assert "checksum is wrong; it is built again" in done.stderr
    assert "process 0: 2 entries encoded" in done.stdout and entries[0].read_bytes() == sound
    entries[2].write_bytes(b"x")
    done = run(*command, "--verify")
    assert "verified: 1 damaged" in done.stdout and "process 0: 1 entries encoded" in done.stdout
    extra = cache / "00" / "00" / f"{'0' * 32}.safetensors"
    extra.parent.mkdir(parents=True, exist_ok=True)
    extra.write_bytes(sound)
    assert "not used by this config: 1" in run(*command, "--stats").stdout
    assert "pruned: 1 entries" in run(*command, "--prune").stdout and not extra.exists()
    assert sorted(cache.glob("??/??/*")) == entries


def test_bit_rot_that_keeps_the_time_stops_training_with_a_message(straight_run, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(straight_run[0] / "cache", cache)
    for entry in cache.glob("??/??/*"):
        stat = entry.stat()
        entry.write_bytes(entry.read_bytes()[:-1] + b"x")
        os.utime(entry, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    index = sqlite3.connect(cache / "index.sqlite")
    old, new = str(straight_run[0] / "cache"), str(cache)
    index.execute("UPDATE files SET path = replace(path, ?, ?)", (old, new))
    index.commit()
    place = ["--cache.cache_dir", cache, "--validation.steps", "null"]
    for workers in (0, 1):
        number = ["--data.num_workers", workers]
        done = rerun(straight_run, tmp_path, *place, *number, check=False)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "its checksum is wrong. Repair: cache_embeddings.py --verify" in done.stderr
    command = ["cache_embeddings.py", "--config", straight_run[1], *place[:2]]
    assert "damaged" in run(*command, "--logging.output_dir", tmp_path / "out", "--verify").stdout
    rerun(straight_run, tmp_path, *place)
    assert_same(lora_of(tmp_path), lora_of(straight_run[0]))


def test_a_second_fill_loads_no_model_and_reads_no_picture(straight_run, tmp_path):
    """Neither the libraries of the models nor the picture decoder are touched."""
    code = (
        "import sys, PIL.Image\n"
        "def never(*a, **k): raise AssertionError('a picture was opened')\n"
        "PIL.Image.open = never\n"
        f"sys.argv = ['cache_embeddings.py', '--config', {str(straight_run[1])!r},"
        f" '--logging.output_dir', {str(tmp_path / 'out')!r}]\n"
        "import cache_embeddings; cache_embeddings.main()\n"
        "print('loaded', [m for m in ('diffusers.models.autoencoders.autoencoder_kl_qwenimage',"
        " 'transformers.models.qwen2_5_vl.modeling_qwen2_5_vl') if m in sys.modules])\n"
    )
    done = run("-c", code)
    assert "0 entries encoded" in done.stdout and "loaded []" in done.stdout


@pytest.mark.slow
def test_two_processes_fill_one_cache(straight_run, tmp_path):
    launch = [*LAUNCH, "--multi_gpu", "--num_processes", "2"]
    done = run(
        "cache_embeddings.py",
        "--config",
        straight_run[1],
        "--cache.cache_dir",
        tmp_path / "cache",
        "--logging.output_dir",
        tmp_path / "out",
        launch=launch,
    )
    counts = [int(n) for n in re.findall(r"process \d: (\d+) entries encoded", done.stdout)]
    ours, theirs = (
        {p.name: p.read_bytes() for p in (f / "cache").glob("??/??/*")}
        for f in (tmp_path, straight_run[0])
    )
    assert len(counts) == 2 and min(counts) > 0 and sum(counts) == len(theirs)
    assert ours == theirs


@pytest.mark.slow
def test_under_accelerate_launch_a_mistake_is_a_message(straight_run, tmp_path):
    done = run(
        "train_qwen_edit.py",
        "--config",
        straight_run[1],
        "--model.lora.rr",
        3,
        launch=[*LAUNCH, "--quiet"],
        check=False,
    )
    assert done.returncode != 0  # the launcher turns every code into 1
    assert "model.lora.rr: unknown setting, did you mean 'r'?" in done.stderr
    assert "Traceback" not in done.stderr
