"""Optimizers, schedules and the moving average: exact and resumable."""

import copy
import json
import math
import sys

import numpy as np
import pytest
import torch
from conftest import copy_pairs, suffix_dataset
from peft.utils import get_peft_model_state_dict
from qwen import assert_same, assert_same_files, curve, ready
from safetensors import safe_open
from safetensors.torch import load_file

import train_qwen_edit as script
from utils import Checkpoints, UserError

OPTIMIZERS = {
    "torch.optim.AdamW": {"lr": 1e-2},
    "bitsandbytes.optim.AdamW8bit": {"lr": 1e-2, "min_8bit_size": 16},  # the tensors are small
    "transformers.Adafactor": {"lr": 0.5, "relative_step": False},
    "prodigyopt.Prodigy": {"lr": 1.0, "d0": 1e-4, "d_coef": 100},
    "schedulefree.AdamWScheduleFree": {"lr": 1e-2},
    "torch.optim.SGD": {"lr": 1.0, "momentum": 0.9},
}


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """Four pairs (one held out) and a cache that all runs here fill and share."""
    folder = tmp_path_factory.mktemp("optim")
    return copy_pairs(folder / "data"), folder / "cache"


@pytest.fixture
def short_run(make_trainer, shared, tmp_path):
    """short_run(name, **changes) -> trainer of a run of 6 steps into tmp_path/name."""
    data, cache = shared

    def make(name, **changes):
        settings = {
            "cache.cache_dir": str(cache),
            "logging.output_dir": str(tmp_path / name),
            "logging.log_every": 1,
            "data.dataset_configs": [suffix_dataset(data, holdout=["hubble0"])],
            "train.max_train_steps": 6,
            "train.checkpointing_steps": 3,
        }
        return make_trainer(**settings | changes)

    return make


def optimizer(path, **more):
    return {"optimizer.class_path": path, "optimizer.init_args": OPTIMIZERS.get(path, {}) | more}


def held(trainer):
    """The adapter as a LoRA file names it."""
    tensors = get_peft_model_state_dict(trainer.bare_transformer())
    return {f"transformer.{name}": tensor for name, tensor in tensors.items()}


# -- optimizers


@pytest.mark.parametrize("path", OPTIMIZERS)
def test_stopped_halfway_and_resumed_it_ends_bit_equal(path, short_run, tmp_path):
    """And a checkpoint with a validation on the way changes nothing."""
    free = "schedulefree" in path
    changes = optimizer(path) | {"lr_scheduler.warmup_steps": 2}
    changes["lr_scheduler.scheduler_type"] = "constant" if free else "cosine"
    if free or path == "torch.optim.AdamW":
        changes |= {"validation.steps": 3, "validation.num_inference_steps": 2}
    changes |= {} if free else {"train.use_ema": True, "train.ema_decay": 0.5}
    straight = short_run("straight", **changes)
    straight.fit()
    (tmp_path / "resumed").mkdir()
    (tmp_path / "straight/checkpoint-3").rename(tmp_path / "resumed/checkpoint-3")
    latest = {"train.resume_from_checkpoint": "latest"}
    short_run("resumed", **changes | latest | {"validation.steps": None}).fit()
    names = [script.LORA_FILE] if free else [script.LORA_FILE, script.EMA_FILE]
    assert_same_files(tmp_path / "straight", tmp_path / "resumed", names=names)
    for value in ("loss", "lr", "grad_norm"):
        ours, theirs = (curve(tmp_path / f, value) for f in ("straight", "resumed"))
        assert {step: v for step, v in ours.items() if step > 3} == theirs
    if path.endswith("8bit"):
        states = [state["state1"] for state in straight.optimizer.state.values()]
        assert states and {state.dtype for state in states} == {torch.uint8}


def test_what_schedulefree_saves_is_its_average_and_what_it_trains_is_not(short_run, tmp_path):
    trainer = short_run("out", **optimizer("schedulefree.AdamWScheduleFree"))
    trainer.fit()
    place = tmp_path / "out/checkpoint-3"
    state = torch.load(place / "training_state.pt", weights_only=True)
    saved = load_file(place / script.LORA_FILE)
    names = [n for n, p in trainer.bare_transformer().named_parameters() if p.requires_grad]
    for number, name in enumerate(names):
        name = name.replace(".default", "")
        y, z = state["adapter"][name], state["optimizer"]["state"][number]["z"]
        beta = state["optimizer"]["param_groups"][0]["betas"][0]
        x = (y - (1 - beta) * z) / beta  # y = beta x + (1 - beta) z
        torch.testing.assert_close(saved[f"transformer.{name}"], x, rtol=1e-5, atol=1e-6)
        assert not torch.equal(saved[f"transformer.{name}"], y)
    # after fit() the trainer holds what it saved
    assert_same(held(trainer), load_file(tmp_path / "out" / script.LORA_FILE))


def test_the_logged_rate_is_the_effective_one(short_run, tmp_path):
    trainer = short_run("out", **optimizer("prodigyopt.Prodigy"))
    trainer.fit()
    group, rates = trainer.optimizer.param_groups[0], curve(tmp_path / "out", "lr")
    assert rates[6] == group["d"] * group["lr"] != rates[1] > 0
    own = optimizer("schedulefree.AdamWScheduleFree", lr=0.1, warmup_steps=10)
    short_run("own", **own).fit()
    assert curve(tmp_path / "own", "lr") == pytest.approx({s: s * 0.01 for s in range(1, 7)})


def test_the_rate_is_1e_4_where_none_is_given():
    weights = [torch.nn.Parameter(torch.zeros(2))]
    for arguments, expected in (({}, 1e-4), ({"betas": [0.8, 0.9]}, 1e-4), ({"lr": 3e-4}, 3e-4)):
        made = script.make_optimizer(script.OptimizerConfig(init_args=arguments), weights)
        assert type(made) is torch.optim.AdamW and made.param_groups[0]["lr"] == expected


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optimizer.class_path": "prodigyopt.Prodigy"}, "pip install prodigyopt"),
        ({"optimizer.class_path": "torch.optim.Adamm"}, "Adamm"),
        ({"optimizer.class_path": "adamw"}, "adamw"),
        ({"optimizer.init_args": {"lr": -1}}, "-1"),
        (optimizer("schedulefree.AdamWScheduleFree") | {"train.use_ema": True}, "train.use_ema"),
    ],
)
def test_mistakes_are_told_before_any_model_loads(changes, named, short_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)  # as if it were not installed
    trainer = short_run("out", **{"optimizer.init_args": {}, **changes})
    with pytest.raises(UserError, match=named):
        trainer.fit()
    assert trainer.transformer is trainer.vae is trainer.qwen_vl is None


# -- AdamW in one kernel, as on a GPU; here on the CPU


def random_weights(seed, step=0):
    """Of three sizes and scales; 33 is no multiple of what a vector register holds."""
    draw = torch.Generator().manual_seed(100 * seed + step)
    shapes = [(16, 33), (33, 4), (1,)]
    return [torch.randn(shape, generator=draw) / 10**k for k, shape in enumerate(shapes)]


def test_fused_adamw_computes_the_same_and_goes_on_from_the_other():
    settings = script.OptimizerConfig(init_args={"lr": 1e-3, "weight_decay": 0.1})

    def steps(weights, first, fused, state=None):
        weights = [torch.nn.Parameter(weight.clone()) for weight in weights]
        made = script.make_optimizer(settings, weights, fused)
        assert made.param_groups[0]["fused"] is (True if fused else None)
        if state:
            made.load_state_dict(copy.deepcopy(state))  # as from a file
        for step in range(first, first + 10):
            for weight, gradient in zip(weights, random_weights(1, step), strict=True):
                weight.grad = gradient
            made.step()
        return [weight.detach() for weight in weights], made.state_dict()

    ends = []
    for first in (False, True):
        weights, state = steps(random_weights(0), 0, first)
        ends += [steps(weights, 10, second, state)[0] for second in (False, True)]
    for end in ends[1:]:
        for ours, theirs in zip(end, ends[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("more", [{"fused": False}, {"fused": None}, {"foreach": True}])
def test_what_init_args_say_of_the_kernel_holds(more):
    settings = script.OptimizerConfig(init_args=more)
    group = script.make_optimizer(settings, random_weights(0), cuda=True).param_groups[0]
    assert not group["fused"] and {name: group[name] for name in more} == more


def test_a_checkpoint_of_the_fused_kernel_goes_on_without_a_gpu(short_run, tmp_path, monkeypatch):
    make = script.make_optimizer
    short_run("plain").fit()
    with monkeypatch.context() as patch:
        patch.setattr(
            script,
            "make_optimizer",
            lambda settings, weights, _=False: make(settings, weights, True),
        )
        short_run("fused").fit()
    (tmp_path / "resumed").mkdir()
    (tmp_path / "fused/checkpoint-3").rename(tmp_path / "resumed/checkpoint-3")
    short_run("resumed", **{"train.resume_from_checkpoint": "latest"}).fit()
    assert_same_files(tmp_path / "resumed", tmp_path / "fused", names=[script.LORA_FILE])
    assert_same_files(tmp_path / "fused", tmp_path / "plain", 1e-5, [script.LORA_FILE])


# -- schedules

SHAPES = {  # by the share of the run after the warm-up that is done
    "constant": lambda x: 1.0,
    "constant_with_warmup": lambda x: 1.0,
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "cosine_with_restarts": lambda x: (1 + math.cos(math.pi * (2 * x % 1))) / 2 if x < 1 else 0.0,
    "polynomial": lambda x: (1 - 1e-7) * (1 - x) ** 2 + 1e-7,
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(("steps", "warmup"), [(20, 4), (20, 0), (4, 4)])
def test_schedules_follow_their_closed_forms(kind, steps, warmup):
    """A run that is no longer than its warm-up only warms up."""
    settings = script.LrSchedulerConfig(
        scheduler_type=kind, warmup_steps=warmup, num_cycles=2, power=2
    )
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, rates = script.make_schedule(settings, sgd, steps), []
    for _ in range(steps + 1):
        rates.append(schedule.get_last_lr()[0])
        sgd.step()
        schedule.step()
    after = [SHAPES[kind](n / max(1, steps - warmup)) for n in range(steps - warmup + 1)]
    assert rates == pytest.approx([n / 4 for n in range(warmup)] + after, abs=1e-12)


# -- moving average


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_average_is_the_closed_form_in_fp32(precision, short_run, tmp_path, monkeypatch):
    """Saved under its own name, in checkpoints and at the end; training never sees it."""
    changes = {"train.mixed_precision": precision, "logging.log_every": 6}
    ema = {"train.use_ema": True, "train.ema_decay": 0.3}  # (1 + n) / (10 + n) is less for n < 3
    seen, train_step = [], script.train_step

    def watched(trainer, batches):
        seen.append([p.detach().double().numpy().copy() for p in trainer.trainable()])
        return train_step(trainer, batches)

    monkeypatch.setattr(script, "train_step", watched)
    short_run("plain", **changes).fit()
    seen.clear()
    trainer = short_run("ema", **changes, **ema)
    trainer.fit()
    seen.append([p.detach().double().numpy() for p in trainer.trainable()])
    assert len(seen) == 7
    for number, average in enumerate(trainer.ema.averages):
        expected = seen[0][number]
        for n in range(1, 7):
            decay = min(0.3, (1 + n) / (10 + n))
            expected = decay * expected + (1 - decay) * seen[n][number]
        assert average.dtype == torch.float32
        np.testing.assert_allclose(average.numpy(), expected, rtol=0, atol=1e-7)
        assert np.abs(expected - seen[6][number]).max() > 1e-5  # not just the last weights
    out, plain = tmp_path / "ema", tmp_path / "plain"
    raw, averaged = (load_file(out / name) for name in (script.LORA_FILE, script.EMA_FILE))
    assert_same(raw, load_file(plain / script.LORA_FILE))
    assert not (plain / script.EMA_FILE).exists()
    with trainer.averaged(ema=True):
        assert_same(averaged, held(trainer))
    assert_same(raw, held(trainer))  # back to the bit
    assert all((f / script.EMA_FILE).exists() for f in Checkpoints(out).folders())
    with safe_open(out / script.EMA_FILE, "pt") as file:
        assert json.loads(file.metadata()["image_edit_lora"])["step"] == 6
    latest = {"train.resume_from_checkpoint": "latest", "train.use_ema": False}
    with pytest.raises(UserError, match=r"train\.use_ema: was True"):
        short_run("ema", **changes, **(ema | latest)).fit()


def test_factors_b_learn_faster_with_lora_plus(make_trainer):
    """After one step of SGD B has moved ratio times as far, A the same."""
    moved = []
    for ratio in (1.0, 8.0):
        settings = {"model.lora.lora_plus_ratio": ratio, "optimizer.class_path": "torch.optim.SGD"}
        trainer = make_trainer(**settings, **{"optimizer.init_args": {"lr": 0.1}})
        trainer = ready(trainer)
        trainer.configure_optimizers()
        before = {n: p.detach().clone() for n, p in named_trained(trainer)}
        loss = script.compute_loss(trainer, trainer.data.batch([script.Draw(0, 0)]))
        loss.sum().backward()
        trainer.optimizer.step()
        moved.append({n: p.detach() - before[n] for n, p in named_trained(trainer)})
    for name, change in moved[0].items():
        factor = 8.0 if ".lora_B." in name else 1.0
        torch.testing.assert_close(moved[1][name], factor * change, rtol=1e-3, atol=2e-6)
    assert any(change.abs().max() > 0 for change in moved[0].values())


def named_trained(trainer):
    return [(n, p) for n, p in trainer.transformer.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("kind", ["2511", "2.1"])
def test_compiled_blocks_compute_the_same(kind, make_trainer, monkeypatch, tmp_path):
    """With autograd traced by dynamo; code is not generated here. Names of the LoRA stay."""
    compile_block = torch.nn.Module.compile
    compiled = []

    def traced(module, *args, **how):
        compiled.append(module)
        compile_block(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    found = []
    for how in ("none", "blocks"):
        settings = {"train.compile": how, "train.gradient_checkpointing": True}
        trainer = ready(make_trainer(kind, **settings))
        loss = script.compute_loss(trainer, trainer.data.batch([script.Draw(0, 0)]))
        loss.sum().backward()
        grads = torch.cat([p.grad.flatten() for p in trainer.trainable()])
        found.append((loss.detach(), grads))
    assert len(compiled) == 2
    for plain, faster in zip(*found, strict=True):
        torch.testing.assert_close(plain, faster, rtol=1e-4, atol=1e-5)
    names = load_file(trainer.save_lora(tmp_path / "l.safetensors"))
    assert names and not any("_orig_mod" in name for name in names)
