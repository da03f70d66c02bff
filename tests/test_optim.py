"""Optimizers, schedules and the moving average: exact, resumable, the same on two processes."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LAUNCH, copy_pairs, run, small_config, suffix_dataset, write_config
from safetensors import safe_open
from safetensors.torch import load_file

import train_qwen_edit as script
from utils import UserError, load_config

OPTIMIZERS = {
    "adamw": {"lr": 1e-2},
    "adamw8bit": {"lr": 1e-2, "min_8bit_size": 16},  # the tiny LoRA's tensors are small
    "adafactor": {"lr": 0.5},
    "prodigy": {"d0": 1e-4, "d_coef": 100},
    "schedulefree": {"lr": 1e-2},
    "torch.optim.SGD": {"lr": 1.0, "momentum": 0.9},
}


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """Four pairs (one held out) and a cache that all runs here fill and share."""
    folder = tmp_path_factory.mktemp("optim")
    return copy_pairs(folder / "data"), folder / "cache"


@pytest.fixture
def short_run(checkpoints, shared, tmp_path):
    """short_run(name, **changes) -> trainer of a run of 6 steps into tmp_path/name."""
    data, cache = shared

    def make(name, **changes):
        settings = {
            "cache.cache_dir": str(cache),
            "logging.output_dir": str(tmp_path / name),
            "logging.log_every": 1,
            "data.dataset_configs": [suffix_dataset(data, holdout=["hubble0"])],
            "model.lora.target_modules": ["to_q", "to_v", "img_mlp.net.2"],
            "train.max_train_steps": 6,
            "train.checkpointing_steps": 100,
            **changes,
        }
        file = write_config(tmp_path, small_config(checkpoints["2511"], tmp_path, **settings))
        return script.QwenImageEditTrainer(load_config(script.Config, ["--config", str(file)]))

    return make


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder, name):
    return {row["step"]: row[name] for row in metrics_of(folder) if name in row}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items())


# -- optimizers


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stopped_halfway_and_resumed_it_ends_bit_equal(name, short_run, tmp_path):
    """And neither a checkpoint nor a validation on the way changes a bit."""
    changes = {
        "optimizer.class_path": name,
        "optimizer.init_args": OPTIMIZERS[name],
        "lr_scheduler.scheduler_type": "cosine" if name != "schedulefree" else "constant",
        "lr_scheduler.warmup_steps": 2,
    }
    straight = short_run("straight", **changes)
    straight.fit()
    saving = {"train.checkpointing_steps": 3}
    saving |= {"validation.steps": 3, "validation.num_inference_steps": 2}
    short_run("saving", **changes, **saving).fit()
    (tmp_path / "resumed").mkdir()
    (tmp_path / "saving" / "checkpoint-3").rename(tmp_path / "resumed" / "checkpoint-3")
    resumed = short_run("resumed", **changes, **{"train.resume_from_checkpoint": "latest"})
    resumed.fit()
    files = {
        n: load_file(tmp_path / n / script.LORA_FILE) for n in ("straight", "saving", "resumed")
    }
    assert same(files["straight"], files["saving"]) and same(files["straight"], files["resumed"])
    assert sum(t.abs().sum() for n, t in files["straight"].items() if "lora_B" in n) > 0.01
    for value in ("loss", "lr", "grad_norm"):
        ours, theirs = curve(tmp_path / "straight", value), curve(tmp_path / "resumed", value)
        assert {s: v for s, v in ours.items() if s > 3} == theirs
    path = script.OPTIMIZERS.get(name, (name, {}))[0]
    assert type(straight.optimizer.optimizer) is script.import_class(path)
    if name == "adamw8bit":
        states = [s["state1"] for s in straight.optimizer.state.values()]
        assert states and {s.dtype for s in states} == {torch.uint8}


def test_what_schedulefree_saves_is_its_average_and_what_it_trains_is_not(short_run, tmp_path):
    trainer = short_run(
        "out",
        **{
            "optimizer.class_path": "schedulefree",
            "optimizer.init_args": {"lr": 1e-2},
            "train.checkpointing_steps": 3,
        },
    )
    trainer.fit()
    state = torch.load(tmp_path / "out/checkpoint-3/training_state.pt", weights_only=True)
    saved = load_file(tmp_path / "out/checkpoint-3" / script.LORA_FILE)
    names = [n for n, p in trainer.bare_transformer().named_parameters() if p.requires_grad]
    for number, name in enumerate(names):
        name = name.replace(".default", "")
        y, z = state["adapter"][name], state["optimizer"]["state"][number]["z"]
        beta = state["optimizer"]["param_groups"][0]["betas"][0]
        x = (y - (1 - beta) * z) / beta  # y = beta x + (1 - beta) z
        torch.testing.assert_close(saved[f"transformer.{name}"], x, rtol=1e-5, atol=1e-6)
        assert not torch.equal(saved[f"transformer.{name}"], y)
    # after fit() the trainer holds what it saved
    assert same(
        {f"transformer.{n}": t for n, t in script.lora_tensors(trainer.bare_transformer()).items()},
        load_file(tmp_path / "out" / script.LORA_FILE),
    )


def test_the_logged_rate_is_the_effective_one(short_run, tmp_path):
    prodigy = {"optimizer.class_path": "prodigy", "optimizer.init_args": {"d_coef": 100}}
    trainer = short_run("out", **prodigy)
    trainer.fit()
    group = trainer.optimizer.param_groups[0]
    rates = curve(tmp_path / "out", "lr")
    assert rates[6] == group["d"] * group["lr"] and group["lr"] == 1.0
    assert rates[1] < rates[6] < 0.1 and group["safeguard_warmup"]
    own_warmup = short_run(
        "own",
        **{
            "optimizer.class_path": "schedulefree",
            "optimizer.init_args": {"lr": 0.1, "warmup_steps": 10},
        },
    )
    own_warmup.fit()
    assert curve(tmp_path / "own", "lr") == pytest.approx({s: s * 0.01 for s in range(1, 7)})


def test_init_args_go_over_the_defaults_of_a_name_or_its_path():
    weights = [torch.nn.Parameter(torch.zeros(2))]

    def rate(**settings):
        made = script.make_optimizer(script.OptimizerConfig(**settings), weights)
        return made.param_groups[0]["lr"]

    assert rate() == rate(class_path="torch.optim.AdamW") == 1e-4
    assert rate(init_args={"betas": [0.8, 0.9]}) == 1e-4 and rate(init_args={"lr": 3e-4}) == 3e-4
    assert rate(class_path="adafactor") == 1e-2 and rate(class_path="prodigyopt.Prodigy") == 1.0
    assert rate(class_path="torch.optim.SGD", init_args={"lr": 0.5}) == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.class_path": "prodigy"}, "pip install prodigyopt"),
        ({"optimizer.class_path": "adamv"}, "no 'adamv', did you mean 'adamw'"),
        ({"optimizer.class_path": "torch.optim.Adamm"}, "torch.optim has no Adamm"),
        ({"optimizer.init_args": {"lr": -1}}, "Invalid learning rate: -1"),
        (
            {"optimizer.class_path": "schedulefree", "train.use_ema": True},
            "schedulefree averages by itself",
        ),
    ],
)
def test_mistakes_are_told_before_any_model_loads(changes, message, short_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)  # as if it were not installed
    trainer = short_run("out", **{"optimizer.init_args": {}, **changes})
    with pytest.raises(UserError, match=message):
        trainer.fit()
    assert trainer.transformer is trainer.vae is trainer.qwen_vl is None


def test_unusual_settings_are_warned_of(caplog):
    def warned(optimizer, **schedule):
        caplog.clear()
        config = script.Config(
            optimizer=script.OptimizerConfig(**optimizer),
            lr_scheduler=script.LrSchedulerConfig(**schedule),
        )
        weights = [torch.nn.Parameter(torch.zeros(2))]
        made = script.make_optimizer(config.optimizer, weights)
        assert script.check_optimizer(made, config) == []
        return caplog.text

    assert "lr is meant to be 1, not 0.0001" in warned(
        {"class_path": "prodigy", "init_args": {"lr": 1e-4}}
    )
    assert "needs no schedule" in warned({"class_path": "schedulefree"}, scheduler_type="cosine")
    for name in ("adamw", "adamw8bit", "adafactor", "prodigy", "schedulefree"):
        assert warned({"class_path": name}) == ""


# -- schedules

WARM = {"warmup_steps": 4}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, lambda n: 1.0),
        (WARM, lambda n: min(1, n / 4)),
        ({"scheduler_type": "constant_with_warmup", **WARM}, lambda n: min(1, n / 4)),
        ({"scheduler_type": "linear", **WARM}, lambda n: min(n / 4, (20 - n) / 16)),
        (
            {"scheduler_type": "cosine", **WARM},
            lambda n: n / 4 if n < 4 else (1 + math.cos(math.pi * (n - 4) / 16)) / 2,
        ),
        (
            {"scheduler_type": "cosine", "num_cycles": 1.5},
            lambda n: (1 + math.cos(3 * math.pi * n / 20)) / 2,
        ),
        (
            {"scheduler_type": "cosine_with_restarts", "num_cycles": 2},
            lambda n: (1 + math.cos(math.pi * (n % 10) / 10)) / 2 if n < 20 else 0.0,
        ),
        (
            {"scheduler_type": "polynomial", "power": 2, **WARM},
            lambda n: n / 4 if n < 4 else (1 - 1e-7) * ((20 - n) / 16) ** 2 + 1e-7,
        ),
        (
            {"scheduler_type": "piecewise_constant", "step_rules": "1:5,0.1:12,1e-2"},
            lambda n: 1 if n < 5 else 0.1 if n < 12 else 0.01,
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_schedules_follow_their_closed_forms(settings, expected):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = script.make_schedule(script.LrSchedulerConfig(**settings), optimizer, 20)
    rates = []
    for _ in range(21):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([expected(n) for n in range(21)], abs=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_a_run_shorter_than_its_warm_up_only_warms_up(kind):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    settings = script.LrSchedulerConfig(scheduler_type=kind, warmup_steps=5)
    schedule = script.make_schedule(settings, optimizer, 5)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == [1.0]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"scheduler_type": "piecewise_constant"}, "step_rules go together"),
        ({"step_rules": "1:5,0.1"}, "step_rules go together"),
        ({"scheduler_type": "piecewise_constant", "step_rules": "1:5"}, "is not like '1:100"),
        ({"scheduler_type": "piecewise_constant", "step_rules": "1:x,2"}, "is not like '1:100"),
        ({"scheduler_type": "piecewise_constant", "step_rules": "1:9,2:5,3"}, "must go up"),
        (
            {"scheduler_type": "piecewise_constant", "step_rules": "1:5,2", "warmup_steps": 3},
            "has no warm-up",
        ),
    ],
)
def test_bad_step_rules_are_told_with_the_config(schedule, message, tmp_path):
    file = write_config(tmp_path, {"lr_scheduler": schedule})
    with pytest.raises(UserError, match=f"lr_scheduler: .*{message}"):
        load_config(script.Config, ["--config", str(file)])


@pytest.mark.slow
def test_two_processes_see_the_rates_of_one(checkpoints, shared, tmp_path):
    """The schedule counts optimizer steps; the moving average is the same too."""
    data, cache = shared
    config = small_config(
        checkpoints["2511"],
        tmp_path,
        **{
            "cache.cache_dir": str(cache),
            "data.dataset_configs": [suffix_dataset(data)],
            "model.lora.target_modules": ["to_q", "to_v"],
            "logging.log_every": 1,
            "lr_scheduler.scheduler_type": "cosine",
            "lr_scheduler.warmup_steps": 2,
            "train.max_train_steps": 5,
            "train.use_ema": True,
        },
    )
    file = write_config(tmp_path, config)
    launch = [*LAUNCH, "--multi_gpu", "--num_processes", "2"]
    pair = ["--logging.output_dir", tmp_path / "two", "--data.batch_size", 1]
    run(script.__file__, "--config", file)
    run(script.__file__, "--config", file, *pair, launch=launch, env={"CUDA_VISIBLE_DEVICES": ""})
    rates = curve(tmp_path / "two", "lr")
    assert rates == curve(tmp_path / "out", "lr") and rates.keys() == set(range(1, 6))
    assert rates[2] == 1e-2 and rates[5] == pytest.approx(0, abs=1e-9)
    ours, theirs = (load_file(tmp_path / n / script.EMA_FILE) for n in ("two", "out"))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=2e-4)


# -- moving average


def recorded_fit(trainer):
    """fit(); returns the trained weights after every step, the start first, as fp64 arrays."""
    seen = []
    step = trainer._step

    def look():
        named = trainer.bare_transformer().named_parameters()
        seen.append({n: p.detach().double().numpy().copy() for n, p in named if p.requires_grad})

    def wrapped(*args):
        if not seen:
            look()
        done = step(*args)
        look()
        return done

    trainer._step = wrapped
    trainer.fit()
    return seen


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_average_is_the_closed_form_in_fp32(interval, precision, short_run, tmp_path):
    trainer = short_run(
        "out",
        **{
            "train.use_ema": True,
            "train.ema_decay": 0.3,  # (1 + n) / (10 + n) is smaller for n < 3
            "train.ema_update_interval": interval,
            "train.mixed_precision": precision,
        },
    )
    seen = recorded_fit(trainer)
    assert len(seen) == 7
    for name, average in trainer.ema.averages.items():
        expected = seen[0][name]
        for n in range(interval, 7, interval):
            decay = min(0.3, (1 + n) / (10 + n)) ** interval
            expected = decay * expected + (1 - decay) * seen[n][name]
        assert average.dtype == torch.float32
        np.testing.assert_allclose(average.numpy(), expected, rtol=0, atol=1e-7)
        assert np.abs(expected - seen[6][name]).max() > 1e-5  # not just the last weights


def test_both_files_are_saved_and_the_raw_weights_stay(short_run, tmp_path):
    """The average under its own name, in checkpoints and at the end; training never sees it."""
    short_run("plain").fit()
    trainer = short_run(
        "ema",
        **{
            "train.use_ema": True,
            "train.checkpointing_steps": 2,
            "validation.steps": 2,
            "validation.num_inference_steps": 2,
        },
    )
    trainer.fit()
    out = tmp_path / "ema"
    raw, averaged = (load_file(out / name) for name in (script.LORA_FILE, script.EMA_FILE))
    assert same(raw, load_file(tmp_path / "plain" / script.LORA_FILE))
    named = {f"transformer.{n.replace('.default', '')}": t for n, t in trainer.ema.averages.items()}
    assert same(averaged, named) and not same(averaged, raw)
    trained = script.lora_tensors(trainer.bare_transformer())
    assert same(raw, {f"transformer.{n}": t for n, t in trained.items()})
    assert not (tmp_path / "plain" / script.EMA_FILE).exists()
    for folder in script.list_checkpoints(out):
        assert {script.LORA_FILE, script.EMA_FILE} <= {f.name for f in folder.iterdir()}
        assert script.valid_checkpoint(folder)
    with safe_open(out / script.EMA_FILE, "pt") as file:
        assert json.loads(file.metadata()["image_edit_lora"])["step"] == 6


def test_the_average_resumes_bit_equal_also_on_another_device(short_run, tmp_path):
    ema = {"train.use_ema": True, "train.ema_decay": 0.5}
    short_run("straight", **ema).fit()
    short_run("first", **ema, **{"train.checkpointing_steps": 3}).fit()
    (tmp_path / "resumed").mkdir()
    (tmp_path / "first" / "checkpoint-3").rename(tmp_path / "resumed" / "checkpoint-3")
    latest = {"train.resume_from_checkpoint": "latest", "train.ema_device": "cpu"}
    short_run("resumed", **ema, **latest).fit()
    for name in (script.LORA_FILE, script.EMA_FILE):
        ours, theirs = (load_file(tmp_path / run / name) for run in ("straight", "resumed"))
        assert same(ours, theirs)


def test_an_average_cannot_begin_in_the_middle(short_run, tmp_path):
    short_run("out").fit()
    trainer = short_run("out", **{"train.use_ema": True, "train.resume_from_checkpoint": "latest"})
    with pytest.raises(UserError, match=r"train\.use_ema: was False, is True"):
        trainer.fit()


def test_weights_come_back_to_the_bit_even_after_an_error(short_run):
    trainer = short_run("out", **{"train.use_ema": True})
    trainer.fit()
    before = {n: p.clone() for n, p in trainer.ema.parameters.items()}
    with pytest.raises(RuntimeError, match="inside"), trainer.averaged(ema=True):
        assert same(trainer.ema.averages, dict(trainer.ema.parameters))
        raise RuntimeError("inside")
    assert same(before, dict(trainer.ema.parameters))


def test_the_script_can_be_copied_without_the_optional_packages():
    """They are imported where they are used."""
    text = Path(script.__file__).read_text()
    for package in ("bitsandbytes", "prodigyopt", "schedulefree"):
        assert f"import {package}" not in text
