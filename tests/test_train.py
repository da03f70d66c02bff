"""train_qwen_edit.py and cache_embeddings.py end to end, as commands and in a notebook's way."""

import json
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import (
    PAIRS,
    ROOT,
    copy_pairs,
    launch,
    run,
    small_config,
    suffix_dataset,
    write_config,
)
from PIL import Image
from qwen import assert_same_files, curve

import train_qwen_edit as script
from utils import Checkpoints, StopSignal, UserError, load_config, read_entry

LORAS = [script.LORA_FILE, script.EMA_FILE]
TARGETS = ["to_q", "to_k", "to_out.0", "to_add_out", "img_mlp.net.2", "txt_mlp.net.2", "img_mod.1"]


def entries_of(cache):
    return sorted(cache.glob("??/??/*.safetensors"))


@pytest.fixture(scope="session")
def straight(checkpoints, tmp_path_factory):
    """12 steps without interruption: (folder, config file); its cache serves the other runs."""
    folder = tmp_path_factory.mktemp("straight")
    pairs = copy_pairs(folder / "data", ("astronaut1", "chelsea0", "coffee0", "hubble0", "hubble1"))
    dataset = suffix_dataset(pairs, holdout=["hubble1"], views=2, view_scale=0.7)
    changes = {
        "data.dataset_configs": [dataset],
        "data.caption_dropout_rate": 0.3,
        "model.lora.target_modules": TARGETS,
        "model.base_model_precision": "int8-quanto",
        "train.max_train_steps": 12,
        "train.checkpointing_steps": 3,
        "train.use_ema": True,
        "lr_scheduler.scheduler_type": "cosine",
        "lr_scheduler.warmup_steps": 2,
        "validation.steps": 6,
        "validation.num_inference_steps": 2,
        "validation.true_cfg_scale": 2.0,
        "logging.log_every": 3,
    }
    file = write_config(folder, small_config(checkpoints["2511"], folder, **changes))
    run(script.__file__, "--config", file)
    return folder, file


@pytest.fixture
def rerun(straight, tmp_path):
    """The same run into tmp_path/out, on the same cache: rerun(*overrides, **how)."""

    def command(*overrides, file=script.__file__, **how):
        out = ["--logging.output_dir", tmp_path / "out"]
        return run(file, "--config", straight[1], *out, *overrides, **how)

    return command


@pytest.fixture
def trainer_of(straight, tmp_path):
    """trainer_of(*overrides) -> trainer of the same run into tmp_path/out, in this process."""

    def make(*overrides):
        argv = ["--config", straight[1], "--logging.output_dir", tmp_path / "out", *overrides]
        config = load_config(script.Config, [str(arg) for arg in argv], script.audit)
        return script.QwenImageEditTrainer(config)

    return make


LATEST = ("--train.resume_from_checkpoint", "latest")


# -- a run, stopped and resumed, split and cached


def test_a_run_leaves_what_the_house_promises(straight):
    out = straight[0] / "out"
    names = ["run.json", "config.yaml", "audit.json", "report.html", "train_qwen_edit.py", *LORAS]
    assert all((out / name).stat().st_size > 0 for name in [*names, "README.md", "utils.py"])
    record = json.loads((out / "run.json").read_text())
    assert record["config"]["train"]["max_train_steps"] == 12 and record["versions"]["torch"]
    assert (out / "train_qwen_edit.py").read_bytes() == Path(script.__file__).read_bytes()
    again = load_config(script.Config, ["--config", str(out / "config.yaml")])
    assert again.model_dump(mode="json") == record["config"]
    checkpoints = Checkpoints(out)
    assert [checkpoints.state(f)["step"] for f in checkpoints.folders()] == [3, 6, 9, 12]
    assert all((f / name).exists() for f in checkpoints.folders() for name in LORAS)
    losses = curve(out, "loss")
    assert list(losses) == [3, 6, 9, 12] and np.isfinite(list(losses.values())).all()
    assert list(curve(out, "validation_loss")) == [0, 6, 12]
    sheets = {file.name for file in (out / "samples").iterdir()}
    assert sheets == {"first_batch.png"} | {f"step_{s:06d}.png" for s in (0, 6, 12)}
    assert not list(out.glob(".*.tmp"))


STOPPED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train_qwen_edit as script
import utils

def send_before(owner, name, moment):
    original = getattr(owner, name)
    def call(*args, **how):
        if moment(args[0]):
            os.kill(os.getpid(), signal.{signal})
        return original(*args, **how)
    setattr(owner, name, call)

if os.environ.get("RANK", {rank!r}) == {rank!r}:
    send_before({moment})
utils.run_script(script.main)
"""
IN_STEP = 'script, "train_step", lambda trainer: trainer.global_step == {}'
WRITING = 'utils, "_fsync", lambda path: "checkpoint-6" in str(path)'


def stopping(folder, moment, name, rank="0"):
    """The script as a command that gets a signal at a moment, however busy the machine is."""
    text = STOPPED.format(root=str(ROOT), moment=moment, signal=name, rank=rank)
    (folder / "train_stopped.py").write_text(text)
    return folder / "train_stopped.py"


@pytest.mark.slow
def test_killed_and_stopped_and_resumed_it_ends_bit_equal(straight, rerun, tmp_path):
    out = tmp_path / "out"
    for moment, name, code, saved in (
        (IN_STEP.format(1), "SIGKILL", -signal.SIGKILL, []),
        (WRITING, "SIGKILL", -signal.SIGKILL, [3]),
        (IN_STEP.format(6), "SIGTERM", 0, [3, 6, 7]),
        (IN_STEP.format(9), "SIGINT", 0, [3, 6, 7, 9, 10]),
    ):
        done = rerun(*LATEST, file=stopping(tmp_path, moment, name), check=False)
        assert done.returncode == code, done.stderr
        places = Checkpoints(out).folders()
        assert [Checkpoints.state(place)["step"] for place in places] == saved
        assert (out / script.LORA_FILE).exists() == (code == 0)
    rerun(*LATEST, "--train.checkpoints_total_limit", 2)
    assert [f.name for f in Checkpoints(out).folders()] == ["checkpoint-10", "checkpoint-12"]
    assert_same_files(out, straight[0] / "out")
    expected = straight[0] / "out"
    assert curve(out, "validation_loss") == curve(expected, "validation_loss")
    for step in (3, 6, 9, 12):
        assert curve(out, "lr")[step] == curve(expected, "lr")[step]
    sheets = [place / "samples/step_000012.png" for place in (out, expected)]
    assert sheets[0].read_bytes() == sheets[1].read_bytes()


@pytest.mark.slow
def test_a_terminal_that_is_gone_loses_nothing(straight, tmp_path):
    """The window closes in step 4: SIGHUP comes, and nothing can be printed any more."""
    program = stopping(tmp_path, IN_STEP.format(4), "SIGHUP")
    closing = "script.train_step = closed(script.train_step)"
    text = program.read_text().replace("utils.run_script(", f"{closing}\nutils.run_script(")
    gone = """
def closed(step):
    def wait(trainer, batches):
        if trainer.global_step == 4:
            import time
            open({ready!r}, "w").close()
            time.sleep(1.5)
        return step(trainer, batches)
    return wait
"""
    ready = tmp_path / "ready"
    program.write_text(gone.format(ready=str(ready)) + text)
    ours, theirs = os.openpty()
    flags = ["--config", straight[1], "--logging.output_dir", tmp_path / "out"]
    command = [sys.executable, program, *flags, "--cache.cache_dir", tmp_path / "cache"]
    child = subprocess.Popen(list(map(str, command)), stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    while not ready.exists() and child.poll() is None:
        if select.select([ours], [], [], 0.1)[0]:
            said += os.read(ours, 65536)
    os.close(ours)  # from here on every print fails
    assert child.wait(60) == 0, said.decode()
    assert Checkpoints.state(Checkpoints(tmp_path / "out").folders()[-1])["step"] == 5


def test_a_signal_that_is_ignored_stays_so():
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_two_processes_learn_draw_and_stop_as_one(straight, rerun, tmp_path):
    """One of them gets the signal, both save and end; the rest of the run goes on from there."""
    out, expected = tmp_path / "out", straight[0] / "out"
    half, file = ["--data.batch_size", 1], stopping(tmp_path, IN_STEP.format(4), "SIGTERM", "1")
    half += ["--cache.cache_dir", tmp_path / "cache"]  # which both fill
    rerun(*half, file=file, processes=2)
    assert Checkpoints(out).folders()[-1].name in ("checkpoint-5", "checkpoint-6")
    rerun(*half, *LATEST, processes=2)
    assert_same_files(out, expected, atol=2e-4)
    assert curve(out, "lr")[12] == curve(expected, "lr")[12]
    for step in (0, 12):
        ours, theirs = (curve(place, "validation_loss")[step] for place in (out, expected))
        assert ours == pytest.approx(theirs, abs=1e-3 if step else 1e-6)
    ours, theirs = (Image.open(f / "samples/step_000000.png") for f in (out, expected))
    assert ours.tobytes() == theirs.tobytes()
    caches = [entries_of(folder / "cache") for folder in (tmp_path, straight[0])]
    ours, theirs = ({entry.name: entry.read_bytes() for entry in cache} for cache in caches)
    assert ours == theirs and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        (["--data.num_workers", 2, "--train.checkpointing_steps", 5], 0),
        (["--cache.use_cache", "false"], 0),
        (["--data.batch_size", 1, "--train.gradient_accumulation_steps", 2], 2e-4),
    ],
    ids=["workers", "uncached", "accumulated"],
)
def test_what_must_change_nothing_changes_nothing(overrides, tolerance, straight, rerun, tmp_path):
    rerun(*overrides)
    assert_same_files(tmp_path / "out", straight[0] / "out", atol=tolerance)
    ours, theirs = (curve(f / "out", "validation_loss") for f in (tmp_path, straight[0]))
    assert ours == pytest.approx(theirs, rel=5 * tolerance)
    if "--train.checkpointing_steps" not in overrides:  # which are log lines: means of other steps
        ours, theirs = (curve(f / "out", "loss")[12] for f in (tmp_path, straight[0]))
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.slow
def test_under_the_launcher_a_mistake_is_a_message(straight):
    done = launch("--cpu", script.__file__, "--config", straight[1], "--train.max", 3, check=False)
    assert done.returncode != 0 and "train.max" in done.stderr
    assert "problem(s), nothing was loaded" in done.stderr


@pytest.mark.parametrize("change", ["setting", "caption", "picture", "moved", "length"])
def test_resume_refuses_what_would_be_another_run(change, straight, trainer_of, tmp_path):
    """Before a model loads; another place of the same data is the same run."""
    shutil.copytree(straight[0] / "out", tmp_path / "out")
    pairs = shutil.copytree(straight[0] / "data", tmp_path / "data")
    if change == "caption":
        (pairs / "coffee0_T.txt").write_text("something else")
    elif change == "picture":
        Image.new("RGB", (64, 48)).save(pairs / "coffee0_R.png")
    rate = "0.5" if change == "setting" else "0.01"
    overrides = ["--data.dataset_configs.0.train_data_dir", pairs, "--optimizer.init_args.lr", rate]
    if change == "length":  # the rate would rise again
        overrides += ["--train.max_train_steps", 24]
    trainer = trainer_of(*overrides, *LATEST)
    if change == "moved":
        trainer.fit()
        return assert_same_files(tmp_path / "out", straight[0] / "out")
    named = {"setting": r"optimizer\.init_args\.lr: was", "length": "falls over: was 12, is 24"}
    named = named.get(change, "samples .*: was")
    with pytest.raises(UserError, match=named):
        trainer.fit()
    assert trainer.transformer is None


@pytest.mark.parametrize("what", ["loss", "infinite loss", "gradient"])
def test_what_is_not_finite_names_its_samples_and_saves_nothing(
    what, trainer_of, tmp_path, monkeypatch
):
    def poisoned(velocity, target, loss):
        bad = velocity.sum() * 0  # the gradient of |0|^0.5 is infinite
        kinds = {"loss": bad / 0, "infinite loss": bad + math.inf, "gradient": bad.abs().sqrt()}
        return script.mse(velocity, target, loss) + kinds[what]

    monkeypatch.setitem(script.LOSSES, "mse", poisoned)
    trainer = trainer_of("--validation.steps", "null")
    with pytest.raises(UserError, match=r"(astronaut1|chelsea0|coffee0|hubble0), ") as error:
        trainer.fit()
    assert "step 1" in str(error.value)
    assert ("inf" if what == "infinite loss" else "nan") in str(error.value)
    assert not Checkpoints(tmp_path / "out").folders()
    assert not (tmp_path / "out" / script.LORA_FILE).exists()


def test_weights_that_are_not_finite_are_not_saved(trainer_of, tmp_path):
    trainer = trainer_of()
    trainer.set_lora()
    trainer.trainable()[0].data[0, 0] = math.nan
    with pytest.raises(UserError, match="weights of step 7 are not finite"):
        trainer.save_checkpoint(0, 7)
    assert not Checkpoints(tmp_path / "out").folders()


def test_a_fork_of_two_files_trains_with_another_loss(straight, rerun, tmp_path):
    """Copy and modify is the product: the script and utils.py alone, another objective."""
    for name in ("train_qwen_edit.py", "utils.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    fork = tmp_path / "train_qwen_edit.py"
    added = "\n\ndef l1(velocity, target, loss):\n    return (velocity - target).abs()\n\n\n# EDIT"
    text = fork.read_text().replace("\n\n# EDIT", added, 1).replace("(mse, huber)}", "(mse, l1)}")
    fork.write_text(text)
    how = ["--loss.loss_type", "l1", "--train.max_train_steps", 2, "--validation.steps", "null"]
    done = rerun(*how, file=fork, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "tools/quantize.py was not copied along" in done.stderr
    rerun(*how, "--model.base_model_precision", "no_change", file=fork, cwd=tmp_path)
    out = tmp_path / "out"
    assert (out / "train_qwen_edit.py").read_text() == text
    assert curve(out, "loss")[2] < 0.9 * curve(straight[0] / "out", "loss")[3]


# -- in a notebook


def test_what_a_notebook_may_call_alone(make_trainer):
    """Fit, predict, save and load as the document does are in test_seeds.py."""
    trainer, picture = make_trainer(), Image.open(PAIRS / "coffee0_R.png").resize((64, 64))
    batch = {"image": [picture], "control": [[picture]], "prompt": ["sunset"]}
    [item] = trainer.cache_step(batch, "cpu", "cpu")
    names = {"pixel_latent", "control_latent", "prompt_embed", "prompt_embeds_mask"}
    assert item.keys() == names | {"empty_prompt_embed", "empty_prompt_embeds_mask"}
    assert item["pixel_latent"].shape == (16, 1, 8, 8) and len(item["control_latent"]) == 1
    assert trainer.cache_embeddings([batch]) == 1 and make_trainer().cache_exist
    embeds, mask = trainer.encode_prompt_image_embedding("sunset", picture)
    empty, empty_mask = trainer._encode_empty_prompt(picture)
    assert embeds.shape[:2] == mask.shape and len(empty) == len(empty_mask) < embeds.shape[1]
    latents = trainer.encode_image_embedding(picture)
    assert torch.equal(latents[0], item["pixel_latent"])
    assert trainer.decode_vae_latent(latents).shape == (1, 64, 64, 3)
    for mistake, named in (
        (lambda: trainer.cache_step({**batch, "image": [np.zeros((64, 64, 3))]}), "uint8"),
        (lambda: make_trainer().fit(b for b in [batch]), "no more batches"),
        (lambda: make_trainer().predict(picture, "sunset"), "setup_predict"),
    ):
        with pytest.raises(UserError, match=named):
            mistake()


# -- the cache


def test_one_changed_byte_rebuilds_what_depended_on_it_and_nothing_else(make_trainer, tmp_path):
    pairs = copy_pairs(tmp_path / "data")
    dataset, cache = suffix_dataset(pairs), tmp_path / "cache"
    dataset["image_configs"]["tones"] = {"suffix": "_D"}
    dataset["reference_configs"]["before"].append({"image": "tones"})
    changes = {"data.dataset_configs": [dataset], "data.caption_dropout_rate": 0.1}

    def fill(**more):
        AcceleratorState._reset_state(reset_partial_state=True)
        before = {p: p.stat().st_mtime_ns for p in entries_of(cache)}
        count = make_trainer(**changes | more).cache_embeddings()
        changed = [p for p in entries_of(cache) if p.stat().st_mtime_ns != before.get(p)]
        assert len(changed) == count
        return sorted(next(iter(read_entry(p))) for p in changed)

    everything = ["latent"] * 12 + ["prompt"] * 8  # 4 x 3 pictures, 4 x (instruction, empty)
    assert fill() == everything and fill() == []
    image = Image.open(pairs / "coffee0_D.png").convert("RGB")
    image.putpixel((5, 5), (1, 2, 3))
    image.save(pairs / "coffee0_D.png")
    assert fill() == ["latent", "prompt", "prompt"]  # the picture, the prompts that show it
    target = pairs / "coffee0_T.png"
    Image.open(target).transpose(Image.Transpose.ROTATE_180).save(target)
    assert fill() == ["latent"]
    (pairs / "hubble0_T.txt").write_text("another instruction")
    assert fill() == ["prompt"]
    os.utime(pairs / "astronaut1_R.png")  # touched, not changed
    same = {"model.base_model_precision": "int8-quanto", "loss.loss_type": "huber"}
    assert fill(**same, **{"data.caption_dropout_rate": 0.9}) == []
    assert fill(**{"data.reference_area": 16384}) == ["latent"] * 8  # only the references
    assert fill(**{"train.mixed_precision": "bf16"}).count("prompt") == 8
    dataset["reference_configs"]["before"].reverse()
    assert fill() == ["prompt"] * 8  # "Picture 1" is another one
    dataset["recreate_cache"] = True
    assert fill() == everything and fill() == everything


def test_a_warm_cache_opens_no_model_and_no_picture(straight, trainer_of, monkeypatch):
    trainer_of().cache_embeddings()
    kind = script.QwenImageEditTrainer
    monkeypatch.setattr(PIL.Image, "open", lambda *a, **k: pytest.fail("a picture was opened"))
    monkeypatch.setattr(kind, "load_model", lambda *a: pytest.fail("a model was loaded"))
    trainer = trainer_of("--validation.steps", "null")
    assert trainer.cache_embeddings() == 0
    for batches in trainer.train_dataloader():
        assert all(torch.isfinite(batch["pixel_latent"]).all() for batch in batches)


def cached(straight, tmp_path):
    """A copy of the cache whose index still believes in it, and the flags that name it."""
    cache = shutil.copytree(straight[0] / "cache", tmp_path / "cache")
    index = cache / "index.jsonl"
    lines = index.read_text().replace(str(straight[0] / "cache"), str(cache)).split("\n")
    texts = [line[9:] for line in lines]  # each has its checksum in front
    index.write_text("\n".join(f"{zlib.crc32(t.encode()):08x} {t}" if t else "" for t in texts))
    flags = ["--config", straight[1], "--cache.cache_dir", cache]
    return cache, [*flags, "--logging.output_dir", tmp_path / "out"]


def test_damaged_entries_are_found_and_built_again_and_unused_ones_pruned(straight, tmp_path):
    cache, flags = cached(straight, tmp_path)
    entries = entries_of(cache)
    sound = {entry: entry.read_bytes() for entry in entries}
    entries[0].write_bytes(sound[entries[0]][:-5] + b"wrong")
    entries[1].write_bytes(b"")
    entries[2].unlink()
    run("cache_embeddings.py", *flags)
    assert {entry: entry.read_bytes() for entry in entries_of(cache)} == sound
    stat = entries[3].stat()
    entries[3].write_bytes(sound[entries[3]][:-1] + b"x")  # rot that keeps the time
    os.utime(entries[3], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    extra = cache / "00" / "00" / f"{'0' * 32}.safetensors"
    extra.parent.mkdir(parents=True, exist_ok=True)
    extra.write_bytes(sound[entries[0]])
    run("cache_embeddings.py", *flags, "--stats")
    assert extra.exists() and entries[3].read_bytes() != sound[entries[3]]
    run("cache_embeddings.py", *flags, "--verify", "--prune")
    assert {entry: entry.read_bytes() for entry in entries_of(cache)} == sound


@pytest.mark.parametrize("workers", [0, 1])
def test_rot_that_keeps_the_time_stops_training_with_a_message(
    workers, straight, trainer_of, tmp_path
):
    cache, _ = cached(straight, tmp_path)
    for entry in entries_of(cache):
        stat = entry.stat()
        entry.write_bytes(entry.read_bytes()[:-1] + b"x")
        os.utime(entry, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    flags = ["--cache.cache_dir", cache, "--validation.steps", "null"]
    with pytest.raises(UserError, match=r"cache_embeddings\.py --verify.*checksum"):
        trainer_of(*flags, "--data.num_workers", workers).fit()
    assert not Checkpoints(tmp_path / "out").folders()
