"""Train a LoRA for Qwen-Image-Edit (2508, 2509, 2511) or Qwen-Image-2.1 on edits from pictures.

Page: docs/train_qwen_edit.md

    python train_qwen_edit.py --config configs/demo_qwen_edit.yaml          # CPU demo
    python train_qwen_edit.py --config configs/x.yaml                       # one GPU
    accelerate launch --multi_gpu --num_processes 2 train_qwen_edit.py --config configs/x.yaml
    ... --train.resume_from_checkpoint latest        # go on after a stop
    ... --plan | --print_config | --help | --help loss

This is no library: copy the file, change it, run it; only utils.py must lie beside it.
`# EDIT HERE:` marks what an ablation changes, `# KEEP:` what breaks otherwise.

Shapes: B samples, T text tokens, D text width (3584; 2.1: 4096), H W pixels, C h w latents (16 H/8
W/8; 2.1: 64 H/16 W/16), S image tokens, one per 16 x 16 px, of 64 channels, K references. Pixels
lie in [-1, 1], latents are normalised per channel, sigma runs from 0 (picture) to 1 (noise),
velocity = noise - x0.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import dataclasses
import functools
import gc
import importlib.util
import itertools
import json
import logging
import math
import os
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field, PrivateAttr
from safetensors import safe_open
from safetensors.torch import load_file
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm.auto import tqdm

import utils
from utils import RunLog, Section, UserError, cache_key, draw_key, listed, nearest, normal, uniform

# KEEP: diffusers, transformers, peft and accelerate are imported where they are used, so that a
# mistake in the config or the data is reported within seconds, before any of them is loaded.

LORA_FILE, EMA_FILE = "pytorch_lora_weights.safetensors", "pytorch_lora_weights_ema.safetensors"
SIZE_MULTIPLE = 32  # px; the pipelines round every side to it, so training does too
AREA_1MP, VISION_AREA = 1024 * 1024, 384 * 384  # px; VISION: of pictures in Edit-Plus' prompts
near = functools.partial(utils.from_tool, "check", "near", "")  # of a place that does not exist
log = logging.getLogger("train_qwen_edit")


# --- 1. objective ---------------------------------------------------------------------------------


class LossConfig(Section):
    """What is minimised, and at which noise levels."""

    loss_type: str = "mse"
    """Error of the velocity: mse, huber, or another name of LOSSES."""
    huber_c: float = Field(0.1, gt=0)
    """Error of the velocity above which loss_type huber counts linearly."""
    mask: Literal["none", "file"] = "none"
    """Weigh the loss by region, with a mask per sample."""
    foreground_weight: float = Field(2.0, ge=0)
    """Weight of the loss where the mask is white; divided by the mean weight."""
    background_weight: float = Field(1.0, ge=0)
    """Weight of the loss where the mask is black."""
    timestep_density: Literal["logit_normal", "uniform"] = "logit_normal"
    """How noise levels (sigma, 0 to 1) are drawn, before timestep_shift."""
    logit_mean: float = 0.0
    """Mean of timestep_density logit_normal (of the logit of sigma); larger means noisier."""
    logit_std: float = Field(1.0, gt=0)
    """Standard deviation of timestep_density logit_normal; larger means wider."""
    timestep_shift: Literal["model"] | Annotated[float, Field(gt=0)] = "model"
    """Shift of sigma: as at inference ("model"), or s in s sigma / (1 + (s - 1) sigma)."""
    noise_levels_per_sample: int = Field(1, ge=1, le=64)
    """Noise levels per visit of a sample; 2.1 computes text and references once for all of them."""
    guidance: Literal["model"] | Annotated[float, Field(ge=1)] = "model"
    """Guidance that the base has built in and the target gets, too; 1: none; model: of 2.1 3."""
    preserve: float = Field(0.0, ge=0)
    """Weight of a second loss: the base's answer stays, to preserve_prompts or where masks end."""
    preserve_prompts: list[str] = []
    """Other instructions for the same references, to which the answer shall stay the base's."""
    preserve_every: int = Field(1, ge=1)
    """Optimizer steps from one with the second loss to the next."""

    def rules(self) -> dict[str, Any]:
        """Return {problem: whether it is there}."""
        weights, name = self.foreground_weight + self.background_weight, self.loss_type
        return {
            f"loss_type: no loss '{name}'{nearest(name, LOSSES)}": name not in LOSSES,
            "foreground_weight and background_weight are both 0": weights == 0,
            "preserve: needs preserve_prompts, or mask: file": self.preserve
            and not self.preserve_prompts
            and self.mask == "none",
            "preserve_prompts: not read while preserve is 0": self.preserve_prompts
            and not self.preserve,
        }

    def captions(self, flavour: Flavour) -> dict[str, list[str]]:
        """Return the further instructions that a sample is shown with, by what they are for."""
        guided = (flavour.built_in if self.guidance == "model" else self.guidance) > 1
        found = {"unguided": [""] * guided, "kept": self.preserve_prompts}
        return {name: texts for name, texts in found.items() if texts}


def mse(velocity: torch.Tensor, target: torch.Tensor, loss: LossConfig) -> torch.Tensor:
    """Return (velocity - target)^2 (rectified flow) of each element; (B, C, 1, h, w) fp32."""
    return (velocity - target).square()


def huber(velocity: torch.Tensor, target: torch.Tensor, loss: LossConfig) -> torch.Tensor:
    """Return the pseudo-Huber error (Khrapov et al. 2024): squares below huber_c, then linear."""
    error, c = velocity - target, loss.huber_c
    return 2 * c * ((error.square() + c * c).sqrt() - c)


# EDIT HERE: a loss is a function (velocity, target, settings) -> error, and its name in this tuple
LOSSES: dict[str, Callable[..., torch.Tensor]] = {f.__name__: f for f in (mse, huber)}


def compute_loss(
    trainer: Trainer, batch: dict[str, Any], model: Any = None, shift: bool = True
) -> torch.Tensor:
    """Return the loss per sample, (B,) fp32, of a batch of encoded() with noise and sigma (B,).

    model: None is the transformer being trained, with its distributed wrapper. Of k noise levels
    per sample, noise (k, B, C, 1, h, w) and sigma (k, B), the mean.
    """
    loss, noise, sigma = trainer.config.loss, batch["noise"], batch["sigma"].float()
    if sigma.dim() == 2:
        seen, levels = {**batch, "prefix": {}}, zip(noise, sigma, strict=True)
        # KEEP a prefix for each instruction (and in base_velocity() one without the adapter)
        seen |= {n: {**batch[n], "prefix": {}} for n in ("unguided", "kept") if n in batch}
        parts = [{**seen, "noise": n, "sigma": s} for n, s in levels]
        return torch.stack([compute_loss(trainer, part, model, shift) for part in parts]).mean(0)
    x0, wanted = batch["pixel_latent"].float(), loss.timestep_shift
    if shift:
        mu = model_mu(trainer.scheduler.config, trainer.flavour.tokens(x0))
        sigma = shift_sigma(sigma, mu if wanted == "model" else math.log(wanted))
    noisy = add_noise(batch.get("start_latent", x0).float(), noise, sigma)
    target, training, model = noise - x0, model is None, model or trainer.transformer
    if "unguided" in batch:
        target = add_guidance(trainer, target, noisy, sigma, batch)
    with trainer.accelerator.autocast():
        velocity = trainer.flavour.velocity(model, noisy, sigma, batch).float()
    black, white, region = loss.background_weight, loss.foreground_weight, batch.get("region")
    weight = None if region is None else black + (white - black) * region
    value = weighted_mean(LOSSES[loss.loss_type](velocity, target, loss), weight)
    whole = "kept" not in batch and region is None  # a sample without a mask: nothing is outside
    if whole or not (loss.preserve and training) or trainer.global_step % loss.preserve_every:
        return value
    outside = None if "kept" in batch else 1 - batch["region"]
    if "kept" in batch:
        batch = {**batch, **batch["kept"]}
        with trainer.accelerator.autocast():
            velocity = trainer.flavour.velocity(model, noisy, sigma, batch).float()
    kept = (velocity - base_velocity(trainer, noisy, sigma, batch)).square()
    return value + loss.preserve * weighted_mean(kept, outside)


def weighted_mean(error: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Return the mean of each sample, (B,), by weights (B, 1, 1, h, w) or none."""
    if weight is None:
        return error.flatten(1).mean(1)
    weight = weight.expand_as(error).flatten(1)
    # KEEP the minimum: a weight of 0 and an empty mask leave nothing to learn, not a NaN
    return (weight * error.flatten(1)).sum(1) / weight.sum(1).clamp(min=1e-6)


def add_guidance(
    trainer: Trainer, target: torch.Tensor, noisy: torch.Tensor, sigma: torch.Tensor, batch: Any
) -> torch.Tensor:
    """Return u + w (target - u), u: the base's velocity without the instruction.

    A base that was distilled to be sampled without guidance gives u + w (c - u); trained on plain
    targets it would drift back to c. As ai-toolkit and musubi-tuner #1045, but u has no adapter.
    """
    plain = base_velocity(trainer, noisy, sigma, {**batch, **batch["unguided"]})
    return plain + batch["guidance"].view(-1, 1, 1, 1, 1) * (target - plain)


@torch.no_grad()
def base_velocity(
    trainer: Trainer, noisy: torch.Tensor, sigma: torch.Tensor, batch: Any
) -> torch.Tensor:
    """Return the velocity of the base, the adapter switched off."""
    if "prefix" in batch:
        batch = {**batch, "prefix": batch["prefix"].setdefault("base", {})}
    use_adapters(trainer, trained=False)
    try:
        with trainer.accelerator.autocast():
            bare = trainer.bare_transformer()
            return trainer.flavour.velocity(bare, noisy, sigma, batch).float()
    finally:
        use_adapters(trainer)


def sample_sigma(loss: LossConfig, *parts: object) -> float:  # EDIT HERE: timestep density
    """Draw a noise level in (0, 1), before the shift, that belongs to the parts."""
    if loss.timestep_density == "uniform":
        return min(max(uniform(*parts), 1e-4), 1 - 1e-4)
    return torch.sigmoid(loss.logit_mean + loss.logit_std * normal((), *parts)).item()


def model_mu(scheduler_config: Any, tokens: int) -> float:
    """Return the model's resolution shift: linear in target tokens (pipeline: calculate_shift)."""
    get = scheduler_config.get
    least, most = get("base_image_seq_len", 256), get("max_image_seq_len", 4096)
    low, high = get("base_shift", 0.5), get("max_shift", 1.15)
    slope = (high - low) / (most - least)
    return slope * tokens + low - slope * least


def shift_sigma(sigma: torch.Tensor, mu: float) -> torch.Tensor:
    """Return e^mu / (e^mu + 1/sigma - 1): FlowMatchEulerDiscreteScheduler's exponential shift."""
    return math.exp(mu) / (math.exp(mu) + 1 / sigma - 1)


def add_noise(x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Return (1 - sigma) x0 + sigma noise; sigma (B,)."""
    sigma = sigma.view(-1, 1, 1, 1, 1)
    return (1 - sigma) * x0 + sigma * noise


# --- 2. one training step, the loop ---------------------------------------------------------------


class TrainConfig(Section):
    """The loop."""

    max_train_steps: int = Field(1000, ge=1, le=100_000_000)
    """Optimizer steps after which the run stops."""
    num_epochs: int | None = Field(None, ge=1, le=100_000_000)
    """Passes over the data after which the run stops, if that is earlier."""
    gradient_accumulation_steps: int = Field(1, ge=1, le=4096)
    """Forward passes per optimizer step and process."""
    checkpointing_steps: int = Field(500, ge=1)
    """Optimizer steps between two checkpoints."""
    checkpoints_total_limit: int | None = Field(None, ge=1)
    """How many checkpoints are kept, the newest ones; null keeps all."""
    resume_from_checkpoint: str | None = None
    """"latest" (the newest valid one; from step 0 if there is none) or a checkpoint folder."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    use_ema: bool = False
    """Keep a moving average of the adapter in fp32; saved beside it, under its own name."""
    ema_decay: float = Field(0.995, ge=0, lt=1)
    """Share of the moving average that stays per step; at step n at most (1 + n) / (10 + n)."""
    mixed_precision: Literal["bf16", "no"] = "bf16"
    """Precision of the frozen base; LoRA, loss and optimizer are fp32. (fp16 would overflow.)"""
    gradient_checkpointing: bool = True
    """Compute activations again in the backward pass: half the memory, 1.4 times the time."""
    compile: Literal["none", "blocks"] = "none"
    """torch.compile of the repeated blocks, which takes a minute or more at the first step."""


class LoggingConfig(Section):
    """Where results go."""

    output_dir: Path = Path("outputs/qwen_edit")
    """Folder of everything a run leaves (but for the cache)."""
    log_every: int = Field(10, ge=1)
    """Optimizer steps between two log lines; only then the loop waits for the GPU."""
    report_to: Literal["none", "tensorboard", "wandb", "all"] = "none"
    """Trackers beside metrics.jsonl, which is always written."""
    push_to_hub: str | None = None
    """Repository (USER/NAME) of the Hub for the finished LoRA; a new one is private."""


def train_step(trainer: Trainer, batches: list[Any]) -> tuple[list[str], dict[str, Any]]:
    """Take one optimizer step over micro-batches; return the names of the samples, the losses."""
    if "error" in batches[0]:
        raise UserError(batches[0]["error"])
    accelerator, total = trainer.accelerator, sum(batch_size(batch) for batch in batches)
    loss = torch.zeros((), device=trainer.device)
    for number, batch in enumerate(batches):
        # processes average their gradients once, with the last micro-batch
        silent = number < len(batches) - 1
        with accelerator.no_sync(trainer.transformer) if silent else contextlib.nullcontext():
            part = trainer.training_step(batch) * (batch_size(batch) / total)
            accelerator.backward(part)
        loss += part.detach()
    trained = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    norm = accelerator.clip_grad_norm_(trained, trainer.config.train.max_grad_norm)
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.global_step += 1
    if trainer.ema:
        trainer.ema.update(trainer.global_step)
    trainer.drawn = 0
    names = [str(name) for batch in batches for name in batch.get("names", [])]
    return names, {"loss": loss, "grad_norm": norm}


def train_loop(trainer: Trainer, loader: Any, run_log: RunLog, stop: utils.StopSignal) -> bool:
    """Train up to total_steps(); return whether a signal ended it early."""
    config, accelerator, total = trainer.config, trainer.accelerator, trainer.total_steps()
    every, saves = config.logging.log_every, config.train.checkpointing_steps
    validates = config.validation.steps or math.inf
    stopped, ask_every, steps = False, 1, []  # steps since the last log line
    if config.validation.steps and trainer.global_step == 0:
        validate(trainer, run_log)
    bar = utils.progress(None, "train", total=total, initial=trainer.global_step, unit="step")
    clock = time.monotonic()
    for batches in itertools.islice(loader, max(0, total - trainer.global_step)):
        steps.append(train_step(trainer, batches if isinstance(batches, list) else [batches]))
        bar.update()
        step = trainer.global_step
        stopped = stop.agreed(accelerator, step % ask_every == 0)
        last = stopped or step == total
        saving = last or step % saves == 0
        validating = not stopped and (step % validates == 0 or (last and validates < math.inf))
        if saving or validating or step % every == 0:
            log_steps(trainer, run_log, steps, clock, lr=effective_lr(trainer.optimizer))
            # KEEP the mean over processes: all ask about a signal at the same steps, every 5 s
            pace = torch.tensor((time.monotonic() - clock) / len(steps), device=trainer.device)
            pace = accelerator.reduce(pace, "mean").item()
            ask_every = max(1, min(every, 100, round(5 / max(pace, 1e-3))))
            steps = []
            if saving:
                trainer.save_checkpoint(trainer.epoch(), step)
            if validating:
                validate(trainer, run_log)
            clock = time.monotonic()  # saving and validation do not count
        if last:
            break
    bar.close()
    return stopped


def log_steps(trainer: Any, run_log: RunLog, steps: Any, clock: float, **more: float) -> None:
    """Log the mean of each loss over steps (names of samples, losses) and processes.

    Waits for the GPU. clock: time.monotonic() when the first one began. Raises UserError where a
    loss is not finite, with the samples of that step.
    """
    losses = torch.stack([torch.stack([*values.values()]) for _, values in steps])
    losses = trainer.accelerator.reduce(losses, "mean").cpu()  # (steps, losses)
    step, names = trainer.global_step, list(steps[0][1])
    if len(bad := (~losses.isfinite().all(1)).nonzero()):
        first = int(bad[0])
        raise UserError(
            f"step {step - len(steps) + first + 1}: {', '.join(names)} = {losses[first].tolist()}; "
            f"samples of this process: {', '.join(steps[first][0]) or 'unknown'}. Nothing of it "
            "was saved; lower the learning rate or look at those files"
        )
    means = dict(zip(names, losses.mean(0).tolist(), strict=True))
    pace = (time.monotonic() - clock) / len(steps)  # the GPU is done with them
    more |= {"seconds_per_step": pace, "memory_gb": utils.memory_gb(trainer.device)}
    run_log.values(step, means | more)
    if trainer.accelerator.is_main_process:
        figures = " ".join(f"{name} {value:.4g}" for name, value in {**means, **more}.items())
        tqdm.write(f"step {step}/{trainer.total_steps()} {figures}")


# --- 3. adapter -----------------------------------------------------------------------------------


class LoraConfig(Section):
    """The adapter on the transformer; everything else stays frozen."""

    r: int = Field(16, ge=1, le=4096)
    """Rank of the adapter. File size and memory grow linearly with it."""
    lora_alpha: float | None = Field(None, gt=0)
    """Strength of the adapter is lora_alpha / r; null means lora_alpha = r."""
    method: Literal["lora", "dora", "lokr"] = "lora"
    """dora: LoRA with learned column norms; lokr: Kronecker product of two small matrices."""
    lokr_factor: int = Field(-1, ge=-1, le=4096)
    """Size of LoKr's smaller matrix; -1 is about the square root of the layer."""
    init_lora_weights: Literal["gaussian", "kaiming"] = "gaussian"
    """How factor A of the LoRA starts; B starts at zero, so step 0 is the base model."""
    lora_plus_ratio: float = Field(1.0, ge=1)
    """Learning rate of factors B over that of A (LoRA+, arXiv 2402.12354); 1 is the same."""
    target_modules: list[str] | str = "attn-image"
    """Layers with an adapter: a name of TARGET_SETS, ends of names, or a regular expression."""
    pretrained_weight: Path | None = None
    """LoRA file to start from (same method, r and target_modules) instead of from nothing."""


ATTN_IMAGE = ["to_q", "to_k", "to_v", "to_out.0"]
ATTN_TEXT = ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
MLP_21 = ["img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out"]
MLP = [f"{stream}_mlp.net.{layer}" for stream in ("img", "txt") for layer in ("0.proj", "2")]
TARGET_SETS = {  # EDIT HERE: names for model.lora.target_modules; layers a model lacks are left out
    "attn-image": ATTN_IMAGE,
    "attn-all": ATTN_IMAGE + ATTN_TEXT,
    "attn+mlp": ATTN_IMAGE + ATTN_TEXT + MLP + MLP_21,
    "all-linear": [*ATTN_IMAGE, *ATTN_TEXT, *MLP, *MLP_21, "img_mod.1", "txt_mod.1"],
}


def matches(layer: str, targets: Sequence[str] | str) -> bool:
    """Return whether PEFT would take the layer: ends of names, or one regular expression."""
    if not isinstance(targets, str):
        return any(f".{layer}".endswith(f".{target}") for target in targets)
    with contextlib.suppress(re.error):
        return re.fullmatch(targets, layer) is not None
    return False


def adapter_config(transformer: Any, lora: LoraConfig) -> Any:
    """Return PEFT's own config for model.lora. Raises UserError for a name without a layer."""
    from peft import LoKrConfig
    from peft import LoraConfig as PeftLoraConfig

    # the last block's text queries and outputs: nothing reads them, so they get no gradient, and
    # KEEP: DDP waits forever for parameters that never get one
    last = rf"transformer_blocks\.{len(transformer.transformer_blocks) - 1}"
    dead = rf"{last}\.(attn\.(add_q_proj|to_add_out)|txt_mlp\..*)"
    linear = [n for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)]
    layers = [n for n in linear if not re.fullmatch(dead, n)]
    named: Any = lora.target_modules
    if isinstance(named, str) and named in TARGET_SETS:
        named = [one for one in TARGET_SETS[named] if any(matches(n, [one]) for n in layers)]
    named = named if isinstance(named, str) else list(named)
    each = [named] if isinstance(named, str) else [[name] for name in named]
    if wrong := [one for one in each if not any(matches(n, one) for n in layers)] or not named:
        short = sorted({n.split(".", 2)[2] for n in layers if n.startswith("transformer_blocks.")})
        raise UserError(
            f"model.lora.target_modules: no layer matches {wrong}; there are the sets "
            f"{', '.join(TARGET_SETS)} and the layers {', '.join(short)}"
        )
    if isinstance(named, str):  # a pattern may fit norms, too; PEFT would refuse them
        named = [layer for layer in layers if matches(layer, named)]
    common: dict[str, Any] = {"target_modules": named, "exclude_modules": dead, "r": lora.r}
    alpha: Any = lora.lora_alpha or lora.r
    if lora.method == "lokr":
        return LoKrConfig(alpha=alpha, decompose_factor=lora.lokr_factor, **common)
    init: Any = True if lora.init_lora_weights == "kaiming" else "gaussian"
    dora = lora.method == "dora"
    return PeftLoraConfig(lora_alpha=alpha, init_lora_weights=init, use_dora=dora, **common)


def add_lora(transformer: Any, lora: LoraConfig, seed: int) -> None:
    """Freeze the base, add the adapter in fp32. Raises UserError for a name without a layer."""
    from diffusers.training_utils import cast_training_params

    settings = adapter_config(transformer, lora)
    transformer.requires_grad_(False)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no modules were excluded.*")
        torch.manual_seed(draw_key(seed, "lora"))
        transformer.add_adapter(settings)
    place_adapter(transformer)
    cast_training_params(transformer)  # KEEP: bf16 would round small updates away
    for layer in transformer.modules():
        if hasattr(layer, "cast_input_dtype_enabled"):  # autocast would undo it: a copy for nothing
            layer.cast_input_dtype_enabled = lora.method == "dora"  # whose norms are in fp32


def strengthen(tensors: dict[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
    """Multiply the adapter's change, in lora_B or lokr_w1; DoRA's magnitudes stay."""
    own = [name for name in tensors if ".lora_B." in name or name.endswith(".lokr_w1")]
    return {**tensors, **{name: tensors[name] * factor for name in own}}


def save_lora_file(path: Path, transformer: Any, about: dict[str, Any]) -> None:
    """Write diffusers/PEFT names, with alpha / r folded into B and alpha = r in the metadata.

    Loaders differ in where they look for alpha (metadata, `.alpha` keys, nowhere); so the strength
    is right in all of them: exactly if alpha / r is a power of two, else to fp32 rounding.
    """
    from peft.utils import get_peft_model_state_dict

    settings = transformer.peft_config["default"].to_dict()
    alpha = "alpha" if "alpha" in settings else "lora_alpha"
    strength = settings[alpha] / settings["r"]
    tensors = get_peft_model_state_dict(transformer)
    layers = {re.split(r"\.lo(?:ra|kr)_", name)[0] for name in tensors}
    settings |= {alpha: settings["r"], "target_modules": sorted(layers), "exclude_modules": None}
    plain = str | int | float | bool | list | dict | None
    adapter = {f"transformer.{k}": v for k, v in settings.items() if isinstance(v, plain)}
    weights = strengthen({f"transformer.{n}": t.float() for n, t in tensors.items()}, strength)
    utils.save_tensors(path, weights, lora_adapter_metadata=adapter, image_edit_lora=about)


def start_from_lora(transformer: Any, lora: LoraConfig) -> None:
    """Copy lora.pretrained_weight into the adapter, alpha / r taken out. Raises UserError."""
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    if not lora.pretrained_weight:
        return
    where = f"model.lora.pretrained_weight {lora.pretrained_weight}"
    with utils.named(where):
        stored = load_file(lora.pretrained_weight)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    wanted = get_peft_model_state_dict(transformer)
    sizes = [{(n, *t.shape) for n, t in each.items()} for each in (tensors, wanted)]
    if other := sorted(sizes[0] ^ sizes[1]):
        names = listed([str(each) for each in other], 3)
        text = "other layers, method or rank than model.lora asks for"
        raise UserError(f"{where}: {text}\n{names}")
    if transformer.device.type != "meta":  # preflight() only compares
        set_peft_model_state_dict(
            transformer, strengthen(tensors, lora.r / (lora.lora_alpha or lora.r))
        )


Argument = Annotated[
    int | float | bool | list[float] | str | None, Field(union_mode="left_to_right")
]


class OptimizerConfig(Section):
    """The optimizer."""

    class_path: str = "torch.optim.AdamW"
    """Optimizer class, any importable: bitsandbytes.optim.AdamW8bit, prodigyopt.Prodigy, ..."""
    init_args: dict[str, Argument] = {}
    """Arguments of the optimizer's class; lr is 1e-4 where it is not given."""


class LrSchedulerConfig(Section):
    """Learning rate schedule of diffusers; counts optimizer steps, whatever the processes."""

    scheduler_type: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: int = Field(0, ge=0, le=100_000_000)
    """Optimizer steps in which the learning rate rises from 0 to its full value."""
    num_cycles: int = Field(1, ge=1, le=1000)
    """How often scheduler_type cosine_with_restarts starts."""
    power: float = Field(1.0, gt=0)
    """Exponent of scheduler_type polynomial."""


def make_optimizer(settings: OptimizerConfig, parameters: Iterable[Any], cuda: bool = False) -> Any:
    """Make the config's optimizer. Raises UserError: no such class, or wrong arguments."""
    module, _, name = settings.class_path.rpartition(".")
    try:
        arguments: Any = {"lr": 1e-4, **settings.init_args}
        if cuda and settings.class_path == "torch.optim.AdamW" and "foreach" not in arguments:
            arguments.setdefault("fused", True)  # all weights in one kernel
        if type(arguments["lr"]) not in (int, float) or not arguments["lr"] > 0:
            raise ValueError("lr must be a number above 0")
        return getattr(importlib.import_module(module), name)(parameters, **arguments)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        where = f"optimizer {settings.class_path} with {settings.init_args}"
        missing = f"; pip install {module.split('.')[0]}?" if isinstance(error, ImportError) else ""
        raise UserError(f"{where}: {error}{missing}") from error


def make_schedule(settings: LrSchedulerConfig, optimizer: Any, steps: int) -> Any:
    """Make the learning rate schedule over `steps` optimizer steps."""
    from diffusers.optimization import get_scheduler

    name, warmup = settings.scheduler_type, settings.warmup_steps
    return get_scheduler(
        "constant_with_warmup" if name == "constant" else name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=max(steps, warmup + 1),  # KEEP: polynomial divides by steps - warmup
        num_cycles=settings.num_cycles,
        power=settings.power,
    )


def effective_lr(optimizer: Any) -> float:
    """Return the rate a step is made with: Prodigy's is its lr times the d it has found."""
    group = optimizer.param_groups[0]
    rate = group.get("scheduled_lr", group["lr"])  # schedule-free has a warm-up of its own
    # only Prodigy has `d0` beside `d`; Adafactor's `d` is a clipping threshold
    return float(rate * group["d"] if "d0" in group else rate)


class MovingAverage:
    """Exponential moving average of parameters, fp32 whatever they are trained in."""

    def __init__(self, parameters: list[torch.nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.averages = [p.detach().to(torch.float32, copy=True) for p in parameters]

    def update(self, step: int) -> None:
        """Move the averages by 1 - d of the way, d = min(decay, (1 + step) / (10 + step))."""
        decay = min(self.decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(self.averages, [p.detach() for p in self.parameters], None)


@torch.no_grad()
def copy_into(parameters: Iterable[torch.Tensor], values: Iterable[torch.Tensor]) -> None:
    """Overwrite parameters, in place."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


# === machinery: read it when you change it ========================================================

# --- 4. pairing: files -> samples, audited before any model loads ---------------------------------


class ImageConfig(Section):
    """One role of the suffix layout."""

    suffix: str = ""
    """What a stem ends with: "_T" for a_T.png. "" takes stems that end with no other suffix."""


class ReferenceItem(Section):
    """One picture of a reference list."""

    image: str
    """Name of the image_config of this reference."""
    resize: int | None = Field(None, ge=64, le=8192)
    """Size of this reference: side of the square of equal area, px; null is the usual one."""


class TargetItem(ReferenceItem):
    """The picture that is learned."""

    from_image: str | None = None
    """Image_config that is noised instead of the target; the velocity is still noise - image."""


class ReferenceListConfig(Section):
    """The pictures shown to the text encoder together with the instruction."""

    reference_config: str
    """Name of the reference_config whose pictures the text encoder sees."""
    resize: int | None = Field(None, ge=32, le=8192)
    """Size of the pictures: side of the square of equal area, px; null: as the pipeline (384)."""
    dropout: float = Field(0.0, ge=0, le=1)
    """Chance (0 to 1) to leave out a picture of the text encoder, drawn per visit."""
    min_length: int = Field(1, ge=0)
    """How many pictures of the text encoder stay after dropout, at least."""


class CaptionConfig(Section):
    """Where the instruction comes from."""

    image: str
    """Name of the image_config beside whose picture the caption file lies."""
    ext: str = Field(".txt", pattern=r"^\.[^./\\]+$")
    """Extension of the caption file."""
    reference_list: ReferenceListConfig | None = None
    """Pictures for the text encoder; null is the references of the batch, as at inference."""


class BatchConfig(Section):
    """One combination of target, references and caption; one is drawn per visit."""

    target_config: str
    """Name of the target_config that is trained."""
    caption_config: str
    """Name of the caption_config that gives the instruction."""
    reference_config: str | None = None
    """Name of the reference_config for the transformer; null is no references."""
    mask: str | None = None
    """Name of the image_config that is white where the loss counts more (loss.mask: file)."""
    caption_dropout: float | None = Field(None, ge=0, le=1)
    """Chance (0 to 1) to train without the instruction; null is data.caption_dropout_rate."""
    weight: float | None = Field(None, gt=0)
    """Chance (0 to 1) that a visit draws this combination; those without one share the rest."""


class DatasetConfig(Section):
    """One data set: suffix layout (image_configs), folders layout (target_dir) or a table."""

    id: str = ""
    """Name of the data set, for validation.eval_dataset_id; default is its folder's."""
    train_data_dir: Path = Path()
    """Folder of the data set; it is only read."""
    resolution: int = Field(1024, ge=64, le=65_536, multiple_of=16)
    """Side of the square whose area the targets get, px; aspect ratios are kept (buckets)."""
    repeats: int = Field(1, ge=1, le=10_000)
    """How often an epoch visits each sample of this data set."""
    loss_weight: float = Field(1.0, gt=0)
    """Factor of this data set's loss."""
    recreate_cache: bool = False
    """Encode this data set again, even what is in the cache."""
    holdout: list[str] = []
    """Samples (stems) kept out of training; validation uses them."""
    holdout_ratio: float = Field(0.0, ge=0, lt=1)
    """Share (0 to 1) of the samples kept out of training besides holdout, drawn by the seed."""
    on_missing: Literal["error", "skip"] = "error"
    """What to do with a sample that lacks a file or a caption."""
    views: int = Field(1, ge=1, le=1000)
    """Cached views per sample: the whole picture, then views - 1 random crops."""
    view_scale: float = Field(1.0, gt=0, le=1)
    """Smallest side of a random crop, as a share (0 to 1) of the whole picture's."""
    view_flip: bool = False
    """Mirror half of the random crops. Not for edits that know left from right."""
    conditioning_type: Literal["auto", "reference_strict", "reference_loose"] = "auto"
    """References get the target's crop (strict), their own frame whole (loose), or by aspect."""
    caption_lines: bool | None = None
    """Each line of a caption file is a caption; null is true in the folders layout only."""
    image_configs: dict[str, ImageConfig] = {}
    """Suffix layout: role -> suffix."""
    target_configs: dict[str, Annotated[list[TargetItem], Field(min_length=1, max_length=1)]] = {}
    """Suffix layout: name -> [the target]."""
    reference_configs: dict[str, Annotated[list[ReferenceItem], Field(min_length=1)]] = {}
    """Suffix layout: name -> references, in the order the model sees them."""
    caption_configs: dict[str, CaptionConfig] = {}
    """Suffix layout: name -> caption."""
    batch_configs: list[BatchConfig] = []
    """Suffix layout: combinations, drawn at random per visit."""
    target_dir: Path | None = None
    """Folders layout: folder of the targets, relative to train_data_dir."""
    reference_dirs: list[Path] = []
    """Folders layout: folders of the references, in order; same relative stem; [] is none."""
    mask_dir: Path | None = None
    """Folders layout: masks of the same stem; default: a_mask.png beside a.png."""
    caption_ext: str = Field(".txt", pattern=r"^\.[^./\\]+$")
    """Folders layout: extension of the caption beside the target (or first reference)."""
    caption: str | None = None
    """One instruction for every sample, instead of files or a column."""
    table: Path | None = None
    """CSV or JSONL: target, references (list) or reference_1, ..., prompt, mask."""

    def rules(self) -> dict[str, Any]:
        """Return {problem: whether it is there}."""
        layouts = [name for name in ("image_configs", "target_dir", "table") if getattr(self, name)]
        idle = {"caption", "caption_ext", "mask_dir"}
        if self.target_dir or self.table:
            idle = {f"{kind}_configs" for kind in ("target", "reference", "caption", "batch")}
            idle |= {"caption_ext", "mask_dir", "reference_dirs"} if self.table else set()
        unread = sorted(n for n in idle if getattr(self, n) != type(self).model_fields[n].default)
        crops = self.view_flip or self.view_scale < 1
        weights = sum(batch.weight or 0 for batch in self.batch_configs)
        problems = {
            "give one of image_configs, target_dir, table": len(layouts) != 1,
            f"{', '.join(unread)}: not read beside {layouts[:1]}; leave it out": unread,
            "reference_dirs: name at least one, or [] for pictures without": self.target_dir
            and "reference_dirs" not in self.model_fields_set,
            "views: view_flip and view_scale need more than 1": self.views == 1 and crops,
            "batch_configs: name one": self.image_configs and not self.batch_configs,
            "batch_configs: the weights sum to more than 1": weights > 1 + 1e-9,
        }
        for place, kind, name in links(self):
            there = getattr(self, f"{kind}_configs")
            text = f"{place}: '{name}' is no {kind}_config{nearest(name, there)}"
            problems[text] = name not in there
        return problems

    @property
    def name(self) -> str:
        """Return `id`, or what the data set is read from."""
        return self.id or Path(self.table or self.train_data_dir).name or str(self.train_data_dir)


class DataConfig(Section):
    """Pairs, batches, and the size of references."""

    dataset_configs: list[DatasetConfig] = []
    """Data sets of the training; all of them are mixed."""
    batch_size: int = Field(1, ge=1, le=4096)
    """Samples per forward pass and process (of one shape: targets and references)."""
    num_workers: int = Field(2, ge=0, le=64)
    """Processes that read the cache; changes no result."""
    shuffle: bool = True
    """Visit the samples in a new order every epoch."""
    caption_dropout_rate: float = Field(0.0, ge=0, le=1)
    """Chance (0 to 1), per visit, of training without the instruction."""
    caption_dropout_mode: Literal["empty", "zero"] = "empty"
    """Without the instruction: empty text, same references (as in guidance), or zeros for both."""
    reference_area: Literal["1mp", "target"] | Annotated[int, Field(ge=1024, le=2**26)] = "1mp"
    """Area of references: 1mp as the pipelines do, "target" as large as the target, or px."""


class Reference(NamedTuple):
    """A picture the model sees, and how large."""

    path: str
    area: int | None = None  # px; None: what the config or the pipeline says


class Variant(NamedTuple):
    """A sample as one batch config sees it, with one of its captions."""

    target: str  # KEEP: text; 100,000 pairs of Path objects are 55 MB more
    references: tuple[Reference, ...]  # what the transformer sees, in order
    vision: tuple[Reference, ...]  # what the text encoder sees, in order
    caption: str
    resolution: int
    start: str | None = None  # from_image: noised instead of the target
    mask: str | None = None
    caption_dropout: float = 0.0
    vision_dropout: float = 0.0
    vision_min: int = 0
    weight: float = 1.0

    def files(self) -> list[str]:
        """Return every picture file it uses."""
        shown = [reference.path for reference in (*self.references, *self.vision)]
        return [self.target, *shown, *filter(None, (self.start, self.mask))]


# differs from the other scripts: a row of the data and the ways to show it
class Sample(NamedTuple):
    """One row of the data: a name and its variants."""

    name: str
    dataset: int
    held_out: bool
    variants: tuple[Variant, ...]


class Row(NamedTuple):
    """One sample as a layout finds it, before captions are read."""

    files: dict[str, Path]  # role -> file
    captions: list[str] | None = None  # None: they are in files
    record: Any = None  # of a table: the row as it stands


def links(ds: DatasetConfig) -> Iterator[tuple[str, str, str]]:
    """Yield (place, kind, name) of every name by which one config of a data set means another."""
    kinds = dict.fromkeys(("image", "from_image", "mask"), "image")
    kinds |= {f"{kind}_config": kind for kind in ("target", "reference", "caption")}
    for place, name in flat_settings(ds.model_dump()).items():
        kind = kinds.get(place.rpartition(".")[2])
        if kind and name:
            yield place, kind, name


def used_roles(ds: DatasetConfig) -> list[str]:
    """Return the image_configs that any combination uses."""
    roles, todo = set(), ["batch_configs."]
    for start in todo:
        for place, kind, name in links(ds):
            if place.startswith(start) and kind == "image":
                roles.add(name)
            elif place.startswith(start):
                todo.append(f"{kind}_configs.{name}.")
    return sorted(roles)


def one_file(files: Sequence[Path], problems: list[str]) -> Path:
    """Return the file of a stem; that there are several is a problem."""
    if len(files) > 1:
        problems.append(f"'{files[0].stem}' is ambiguous, keep one of {', '.join(map(str, files))}")
    return files[0]


def group_by_suffix(ds: DatasetConfig) -> tuple[dict[str, Row], list[str]]:
    """Group the suffix layout (a_T.png a_R.png a_T.txt); roles: names of image_configs."""
    rows: dict[str, Row] = {}
    problems: list[str] = []
    longest_first = sorted((c.suffix for c in ds.image_configs.values()), key=len, reverse=True)
    for stem, files in utils.list_images(ds.train_data_dir).items():
        for suffix in longest_first:
            if stem.endswith(suffix) and Path(stem).name != suffix:
                row = rows.setdefault(stem[: len(stem) - len(suffix)], Row({}))
                roles = [role for role, c in ds.image_configs.items() if c.suffix == suffix]
                row.files.update(dict.fromkeys(roles, one_file(files, problems)))
                break
    return rows, problems


def group_by_folder(ds: DatasetConfig) -> tuple[dict[str, Row], list[str]]:
    """Group the folders layout; without mask_dir, a_mask.png beside a picture masks it."""
    rows: dict[str, Row] = {}
    problems: list[str] = []
    named: dict[str, Path | None] = {"target": ds.target_dir}
    named |= {f"reference {i}": folder for i, folder in enumerate(ds.reference_dirs, 1)}
    named["mask"] = ds.mask_dir
    places = {role: ds.train_data_dir / (folder or "") for role, folder in named.items()}
    if gone := [role for role, place in places.items() if not place.is_dir()]:
        return rows, [f"{r} folder {places[r]} does not exist{near(places[r])}" for r in gone]
    for role, place in places.items():
        stems = utils.list_images(place) if named[role] else {}
        for stem, files in stems.items():
            rows.setdefault(stem, Row({})).files[role] = one_file(files, problems)
    for stem in [stem for stem in rows if stem.endswith("_mask") and not ds.mask_dir]:
        row, of = rows[stem], rows.get(stem.removesuffix("_mask"))
        whole = len(row.files) == 1 + len(ds.reference_dirs)
        if of and not (whole and caption_beside(ds, row.files).exists()):
            if whole:
                text = "is a pair without a caption, or two masks; name mask_dir or remove one"
                problems.append(f"{row.files['target']} {text}")
            of.files["mask"] = next(iter(rows.pop(stem).files.values()))
    return rows, problems


def caption_beside(ds: DatasetConfig, files: dict[str, Path]) -> Path:
    """Return the caption file of a row: beside its target, or else its first reference."""
    shown = (files[role] for role in ("target", "reference 1") if role in files)
    beside = (file.with_suffix(ds.caption_ext) for file in shown)
    return next(filter(Path.exists, beside), None) or files["target"].with_suffix(ds.caption_ext)


def read_table(ds: DatasetConfig) -> tuple[dict[str, Row], list[str]]:
    """Read a table with tools/pair_rows.py; relative paths: in train_data_dir, or beside it."""
    found = utils.load_tool("pair_rows").read_table(Path(ds.table or ""), ds.train_data_dir)
    rows: dict[str, Row] = {}
    for number, pair in enumerate(found.pairs, 1):
        files = {f"reference {i}": file for i, file in enumerate(pair.references, 1)}
        files |= {"target": pair.target} | ({"mask": pair.mask} if pair.mask else {})
        name = pair.target.stem
        rows[f"{name}#{number}" if name in rows else name] = Row(files, pair.prompts, pair.record)
    return rows, found.problems + [f"{ds.table}: {text}" for text in found.broken]


def read_captions(path: Path, lines: bool) -> list[str]:
    """Read the captions of a file: its lines, or the whole text as one. Raises UserError."""
    with utils.named(f"caption {path} cannot be read"):
        text = utils.read_text(path).strip()
    if not text:
        raise UserError(f"caption {path} is empty")
    return [line.strip() for line in text.splitlines() if line.strip()] if lines else [text]


def plain_variants(config: Config, ds: DatasetConfig, row: Row) -> Iterator[Variant]:
    """Make one variant per caption, with all references (folders, tables). Raises ValueError."""
    files, captions = {role: str(file) for role, file in row.files.items()}, row.captions
    shown = tuple(Reference(file) for role, file in files.items() if role.startswith("reference"))
    if ds.caption:
        captions = [ds.caption]
    elif captions is None:
        captions = read_captions(caption_beside(ds, row.files), ds.caption_lines is not False)
    if not captions:
        raise ValueError(f"no prompt for {files['target']}: fill its column, or set caption")
    rate = config.data.caption_dropout_rate
    for caption in captions:
        what = files["target"], shown, shown, caption, ds.resolution
        yield Variant(*what, mask=files.get("mask"), caption_dropout=rate)


def combined_variants(config: Config, ds: DatasetConfig, row: Row) -> Iterator[Variant]:
    """Make one variant per batch config and caption (suffix layout). Raises ValueError."""
    files, batches = {role: str(file) for role, file in row.files.items()}, ds.batch_configs
    rest = 1 - sum(batch.weight or 0 for batch in batches)
    share = max(0, round(rest / max(1, sum(b.weight is None for b in batches)), 9))
    for batch in batches:
        caption = ds.caption_configs[batch.caption_config]
        [target] = ds.target_configs[batch.target_config]
        items = ds.reference_configs[batch.reference_config] if batch.reference_config else []
        references = tuple(Reference(files[i.image], i.resize and i.resize**2) for i in items)
        vision, shown = references, caption.reference_list
        if shown:
            area = shown.resize and shown.resize**2
            items = ds.reference_configs[shown.reference_config]
            vision = tuple(Reference(files[item.image], area) for item in items)
        weight, rate = batch.weight or share, batch.caption_dropout
        text = row.files[caption.image].with_suffix(caption.ext)
        lines = read_captions(text, bool(ds.caption_lines)) if weight else []
        for line in lines:
            yield Variant(
                target=files[target.image],
                references=references,
                vision=vision,
                caption=line,
                resolution=target.resize or ds.resolution,
                start=files[target.from_image] if target.from_image else None,
                mask=files[batch.mask] if batch.mask else None,
                caption_dropout=config.data.caption_dropout_rate if rate is None else rate,
                vision_dropout=shown.dropout if shown else 0.0,
                vision_min=shown.min_length if shown else 0,
                weight=weight / len(lines),
            )


def find_dataset(config: Config, number: int) -> tuple[list[Sample], list[str], list[str]]:
    """Return samples, problems and skipped samples of one data set."""
    ds = config.data.dataset_configs[number]
    where, place = f"data.dataset_configs.{number}: ", ds.train_data_dir
    if not place.is_dir():
        return [], [f"{where}folder {place} does not exist{near(place)}"], []
    group, make, needed = read_table, plain_variants, []
    if ds.target_dir:
        group = group_by_folder
        needed = ["target", *(f"reference {i + 1}" for i in range(len(ds.reference_dirs)))]
    elif ds.image_configs:
        group, make, needed = group_by_suffix, combined_variants, used_roles(ds)
    rows, problems = group(ds)
    names, variants, broken = sorted(rows), {}, []
    for name, row in ((name, rows.pop(name)) for name in names):  # whose memory is used again
        lacking = [role for role in needed if role not in row.files]
        if lacking and not ds.target_dir and len(lacking) == len(needed):
            continue  # pictures that nothing uses
        try:
            if lacking:
                there = f"there is {', '.join(map(str, row.files.values()))}"
                text = f"'{name}' lacks its {', '.join(lacking)} ({there})"
                raise ValueError(f"{text}; on_missing: skip leaves it out")
            variants[name] = tuple(make(config, ds, row))
        except (UserError, ValueError) as error:
            broken.append(str(error))
    # not trained: the named ones and a share drawn by the seed, or all
    chance = functools.partial(uniform, "holdout", config.seed, ds.name)
    count = round(ds.holdout_ratio * len(variants))
    drawn = sorted(variants, key=chance)[:count] if count else []
    whole = ds.name in config.validation.eval_dataset_id
    held_out = set(variants) if whole else {*ds.holdout, *drawn}
    samples = [Sample(name, number, name in held_out, v) for name, v in variants.items()]
    for name in sorted(set(ds.holdout).difference(names)):
        problems.append(f"holdout: no sample '{name}'{nearest(name, names)}")
    skipped = broken if ds.on_missing == "skip" else []
    problems += [] if skipped else broken
    if not problems and not any(whole or not sample.held_out for sample in samples):
        problems.append(f"no sample to train on in {place}")
    return samples, [where + text for text in problems], [where + text for text in skipped]


# --- 5. audit -------------------------------------------------------------------------------------


def check_frames(data: PairData) -> list[str]:
    """Return problems of pictures that must show the same frame as their target, or another."""
    wrong, index = set(), data.index
    for number, sample in enumerate(data.samples):
        strict = data.dataset(Draw(0, number)).conditioning_type == "reference_strict"
        for variant in sample.variants:
            target, shown = variant.target, [r.path for r in variant.references]
            for path in (*shown * strict, *filter(None, [variant.mask])):
                if not aligns(index[path]["aspect"], index[target]["aspect"]):
                    text = "another aspect than its target; masks and reference_strict want one"
                    wrong.add(f"{path}: {text} frame")
            white, loss = variant.mask and index[variant.mask].get("dark", 255), data.config.loss
            if white == 1 or (white == 0 and not loss.background_weight):
                wrong.add(f"{variant.mask} has no white (255): nothing of it would be trained")
            pixels = index[target]["pixels"]
            for path in (path for path in shown if index[path]["pixels"] == pixels):
                wrong.add(f"{path} is the same picture as {target}: no change to learn")
    return sorted(wrong)


def notes_on(data: PairData) -> list[str]:
    """Return what is done to samples unasked, and the setting that changes it."""
    seen, found = [], []
    for s in data.samples:
        ds, facts = data.config.data.dataset_configs[s.dataset], data.index[s.variants[0].target]
        lines = ds.target_dir and ds.caption_lines is None and len(s.variants) > 1
        shown = [data.index[r.path]["aspect"] for r in s.variants[0].references]
        place, own = f"data.dataset_configs.{s.dataset}", facts["aspect"]
        seen.append((place, facts, ds.resolution**2, lines, not shown))
        if shown and own not in shown and not any(aligns(aspect, own) for aspect in shown):
            found.append(f"{s.variants[0].target}: no reference has its aspect; crop both alike")
    return utils.from_tool("check", "notes", [], seen) + found


def find_samples(config: Config, flavour: Flavour) -> tuple[PairData, list[str]]:
    """Pair, read captions, look at all pictures; return (data, first problems of each kind)."""
    found = [find_dataset(config, number) for number in range(len(config.data.dataset_configs))]
    index = utils.FileIndex(config.cache.cache_dir if config.cache.use_cache else None)
    samples = [sample for mine, _, _ in found for sample in mine]
    skipped = [text for _, _, left_out in found for text in left_out]
    variants = [variant for sample in samples for variant in sample.variants]
    edits = config.validation.samples if config.validation.steps else []
    files = {path for variant in variants for path in variant.files()}
    files |= {str(path) for edit in edits for path in edit.images}
    unreadable = index.update(sorted(files), utils.look_at_picture)
    held_out, masks = [s.held_out for s in samples], any(v.mask for v in variants)
    idle = config.validation.steps and samples and not any(held_out) and not edits
    rules = {
        "validation.steps: nothing is held out (few pairs?); name holdout, or take null": idle,
        "data.dataset_configs: no data set is named (--config FILE? see configs/)": not found,
        "data.dataset_configs: every sample is held out": samples and all(held_out),
        "loss.mask: file, but no sample has a mask": config.loss.mask == "file" and not masks,
    }
    data = PairData(config, flavour, samples, index)
    groups = [*(wrong for _, wrong, _ in found), unreadable]
    groups += [[p for p, is_so in rules.items() if is_so], [] if unreadable else check_frames(data)]
    texts = {f"caption of {s.name}": v.caption for s in samples for v in s.variants}
    texts |= {"validation.negative_prompt": config.validation.negative_prompt or ""}
    texts |= {f"validation.samples.{i}": edit.prompt for i, edit in enumerate(edits)}
    groups += [utils.check_setup(texts=texts)]
    problems, notes = list(itertools.chain(*groups)), [] if unreadable else notes_on(data)
    report = {"samples": len(samples), "notes": notes, "problems": problems, "skipped": skipped}
    if notes:
        log.warning("note\n%s", listed(notes))
    if found:
        with contextlib.suppress(UserError):  # an unwritable output_dir is reported by audit()
            text = json.dumps(report, indent=2, ensure_ascii=False)
            utils.save_text(config.logging.output_dir / "audit.json", text)
    if skipped:
        log.warning("%d sample(s) skipped (on_missing: skip)\n%s", len(skipped), listed(skipped))
    shown = []
    for group in groups:  # ten of each kind by name; a data set may lack thousands of files
        more = [f"... and {len(group) - 10} more, all of them in audit.json"]
        shown += group[:10] + (more if len(group) > 10 else [])
    return data, shown


def check_model(config: Config, precision: str) -> list[str]:
    """Return problems of the model and its settings; reads no weights; `precision`: of blocks."""
    model, lora, name = config.model, config.model.lora, config.model.pretrained_model_name_or_path
    try:
        flavour = detect_flavour(name)
        settings = flavour.transformer
        if name not in PUBLISHED:
            settings = utils.read_model_json(name, "transformer/config.json")
    except UserError as error:
        return [f"model.pretrained_model_name_or_path: {error}"]
    n_blocks = settings.get("num_layers", flavour.transformer["num_layers"])
    several, nf4 = os.environ.get("WORLD_SIZE", "1") != "1", precision == "nf4-bnb"
    # modulation is held by quanto in every quantised base, and PEFT has no DoRA for that
    quanto = precision.endswith("quanto") or (nf4 and lora.target_modules == "all-linear")
    rules = {
        "devices: for one process; several need it whole": model.devices and several,
        f"lora.method: no dora on layers in {precision}": lora.method == "dora" and quanto,
        "lora.method: no dora on weights that FSDP shards": lora.method == "dora" and sharding(),
        f"base_model_precision: FSDP shards no {precision} weights; a card that holds them takes "
        "configs/accelerate/ddp.yaml": precision != "no_change" and sharding(),
        "blocks_to_swap: not with FSDP": model.blocks_to_swap and sharding(),
        "base_model_precision: tools/quantize.py was not copied along": precision != "no_change"
        and not Path(utils.__file__).with_name("tools").joinpath("quantize.py").is_file(),
        "lora.method: no lokr on nf4-bnb": lora.method == "lokr" and nf4,
        "lora.lora_plus_ratio: lokr has no B": lora.lora_plus_ratio > 1 and lora.method == "lokr",
        f"blocks_to_swap: the model has {n_blocks} blocks": model.blocks_to_swap > n_blocks,
        "blocks_to_swap: not with nf4-bnb": model.blocks_to_swap and nf4,
        "blocks_to_swap: not with several devices": model.blocks_to_swap and model.devices[1:],
    }
    problems = [f"model.{problem}" for problem, there in rules.items() if there]
    levels = config.loss.noise_levels_per_sample > 1
    constant = flavour.prefix_is_constant and settings.get("causal_condition", True)
    if levels and not constant:
        text = "needs a model whose text and references do not depend on the noise (2.1)"
        problems.append(f"loss.noise_levels_per_sample: {text}")
    if sharding() and flavour.prefix_is_constant and config.data.batch_size > 1:
        problems.append("data.batch_size: 1 for 2.1 under FSDP; each length of text is a pass")
    if config.data.caption_dropout_mode == "zero" and flavour.prefix_is_constant:
        problems.append("data.caption_dropout_mode: zero would hide where 2.1 has its pictures")
    named = lora.target_modules
    return problems + utils.check_setup(
        model=("model.pretrained_model_name_or_path", name, flavour.parts),
        packages=["bitsandbytes"] * nf4 + [config.optimizer.class_path],
        patterns={"model.lora.target_modules": named} if isinstance(named, str) else {},
        folded=[lora.pretrained_weight] if lora.pretrained_weight else [],
    )


# differs from the other scripts: each script audits its own config
def audit(config: Config) -> list[str]:
    """Return everything that can be known to be wrong before a model loads, one line each."""
    model, cache, results = config.model, config.cache, config.logging
    problems = check_model(config, model.base_model_precision)
    writes = {"logging.output_dir": results.output_dir}
    devices = {f"predict.devices.{part}": d for part, d in config.predict.devices}
    devices |= {f"model.devices.{i}": device for i, device in enumerate(model.devices)}
    if cache.use_cache:
        devices["cache.vae_encoder_device"] = cache.vae_encoder_device
        devices["cache.text_encoder_device"] = cache.text_encoder_device
        writes["cache.cache_dir"] = cache.cache_dir
    packages = [] if results.report_to in ("none", "all") else [results.report_to]
    reads = []
    for ds in config.data.dataset_configs:
        own = [ds.target_dir, *ds.reference_dirs, ds.mask_dir] if ds.target_dir else [Path()]
        reads += [ds.train_data_dir / d for d in own if d is not None and not ds.table]
    how: dict[str, Any] = {"devices": devices, "packages": packages, "hub": results.push_to_hub}
    problems += utils.check_setup(writes=writes, reads=reads, **how)
    flavour = None if problems else detect_flavour(model.pretrained_model_name_or_path)
    data, wrong = find_samples(config, flavour or PUBLISHED["Qwen/Qwen-Image-Edit-2511"])
    config._audited = None if problems or wrong else data
    if flavour and not flavour.vision_area:
        wrong += utils.from_tool("check", "shared_pictures", [], data, flavour)
    return problems + wrong


# --- 6. model families ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Flavour:
    """Which model a checkpoint is, by its own files, and how it is fed: here Qwen-Image-Edit.

    EDIT HERE: another model is a subclass that does its own way what differs, and its checkpoints.
    """

    name: str  # edit-v1 (2508) | edit-v2 (2509) | edit-v3 (2511) | 2.1
    pipeline_class: str
    vision_area: int | None  # px; None: the encoder sees the same picture as the VAE (2508, 2.1)
    # the published config, where it is not the default of its class
    transformer: dict[str, Any] = dataclasses.field(default_factory=dict)
    most_references: int = 1000

    channels, latent_px, multiple_px = 16, 8, 16  # of latents; of a result's sides
    picture_mode, vision_px = "RGB", 28  # px per token of the text encoder
    guidance, built_in = 4.0, 1.0  # of a picture (true_cfg_scale); in the weights, by distillation
    vae_class, processor_class = "AutoencoderKLQwenImage", "Qwen2VLProcessor"
    prefix_is_constant = False  # text and references do not depend on noise and target
    licence = "apache-2.0"  # of the base, as a model card names it
    parts = {  # of a checkpoint: how the name of its class begins
        "transformer": "QwenImageTransformer",
        "vae": "AutoencoderKLQwenImage",
        "text_encoder": "Qwen2_5_VL",
        **{"scheduler": "FlowMatch", "tokenizer": "", "processor": ""},
    }

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return (C, 1, h, w) of the latents of a picture of (W, H) px."""
        return self.channels, 1, size[1] // self.latent_px, size[0] // self.latent_px

    def tokens(self, latents: torch.Tensor) -> int:
        """Return S of latents (..., h, w)."""
        return math.prod(latents.shape[-2:]) * self.latent_px**2 // 256

    def denormalise(
        self, latents: torch.Tensor, mean: torch.Tensor, std: torch.Tensor
    ) -> torch.Tensor:
        """Return latents as the VAE decodes them, in the pipeline's own arithmetic."""
        return latents / (1.0 / std) + mean  # KEEP: times std differs in the last bit

    def encode_prompt(self, pipeline: Any, prompt: str, images: list[Any], device: Any) -> Any:
        """Return the embedding (1, T, D) of an instruction with its pictures."""
        shown: Any = images if self.vision_area else images[0]  # 2508's template has one slot
        return pipeline.encode_prompt(prompt=prompt, image=shown or None, device=device)[0]

    def velocity(self, *inputs: Any) -> torch.Tensor:
        """Return predict_velocity(transformer, noisy, sigma, batch)."""
        return predict_velocity(*inputs)

    def guide(self, velocity: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
        """Return the guided velocity, each token rescaled to the norm of the positive one."""
        own, other = pack_latents(velocity), pack_latents(negative)
        guided = other + scale * (own - other)
        norms = [torch.norm(v, dim=-1, keepdim=True) for v in (own, guided)]
        return unpack_latents(guided * (norms[0] / norms[1]), velocity)

    def sigmas(self, name_or_path: str, steps: int) -> Any:
        """Return the noise levels of sampling before the shift."""
        return np.linspace(1.0, 1 / steps, steps)


class Flavour21(Flavour):
    """Qwen-Image-2.1: text and pictures in one causal sequence; alpha; sampled without guidance.

    Pictures stand in the text, at the text encoder's slots (2 x 2 latents each). A prompt's
    embedding has one channel more, (T, D + 1): 1 at the slots.
    """

    channels, latent_px, multiple_px = 64, 16, 32
    picture_mode, vision_px = "RGBA", 32
    guidance, built_in = 1.0, 3.0
    vae_class, processor_class = "AutoencoderKLQwenImage21", "Qwen3VLProcessor"
    prefix_is_constant = True
    licence = "other\nlicense_name: qwen-research"
    parts = {
        "transformer": "QwenImage21Transformer",
        "vae": "AutoencoderKLQwenImage21",
        "text_encoder": "Qwen3VL",
        **{"scheduler": "FlowMatch", "processor": ""},
    }

    def denormalise(
        self, latents: torch.Tensor, mean: torch.Tensor, std: torch.Tensor
    ) -> torch.Tensor:
        """Return latents as the VAE decodes them, in the pipeline's own arithmetic."""
        return latents * std + mean

    def encode_prompt(self, pipeline: Any, prompt: str, images: list[Any], device: Any) -> Any:
        """Return the embedding (1, T, D + 1) of an instruction with its pictures."""
        seen = {"prompt": prompt, "image": images or None, "device": device}
        embeds, _, slots = pipeline.encode_prompt(**seen)
        return torch.cat([embeds, slots.unsqueeze(-1).to(embeds)], -1)

    def velocity(
        self, transformer: Any, noisy: torch.Tensor, sigma: torch.Tensor, batch: Any
    ) -> torch.Tensor:
        """Return the target's velocity, shape of `noisy`, (B, 64, 1, h, w).

        batch["prefix"], an empty dict at first, keeps keys and values of text and references: the
        next call with it computes the target alone. Gradients flow through it.
        """
        embeds, padding = batch["prompt_embed"], batch.get("prompt_embeds_mask")
        controls, remembered = batch["control_latent"], batch.get("prefix")
        if padding is not None:
            # KEEP: RoPE counts padding before the target, so one text length goes at a time
            found, lengths = torch.empty_like(noisy), padding.sum(1).tolist()
            for length in sorted(set(lengths)):
                rows = [row for row, own in enumerate(lengths) if own == length]
                part: dict[str, Any] = {"prompt_embed": embeds[rows, :length]}
                part["control_latent"] = [control[rows] for control in controls]
                if remembered is not None:
                    part["prefix"] = remembered.setdefault(length, {})
                velocity = self.velocity(transformer, noisy[rows], sigma[rows], part)
                found[rows] = velocity.to(found)
            return found
        how: dict[str, Any] = {}
        if remembered is not None:
            how["kv_cache_mode"] = "cached" if "cache" in remembered else "extract"
            from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

            bare = getattr(transformer, "module", transformer)  # of a distributed wrapper
            new = QwenImage21KVCache(len(bare.transformer_blocks))
            how["kv_cache"] = remembered.setdefault("cache", new)
        slots = embeds[..., -1] > 0.5
        target = slots.new_ones(len(noisy), self.tokens(noisy) // 4)
        tokens = [picture.flatten(2).transpose(1, 2) for picture in (*controls, noisy)]
        velocity = transformer(
            hidden_states=torch.cat(tokens, dim=1).to(embeds.dtype),  # (B, sum Sk + S, 64)
            timestep=sigma,
            encoder_hidden_states=embeds[..., :-1],
            img_shapes=[[(1, *p.shape[-2:]) for p in (*controls, noisy)]] * len(noisy),
            img_mask=torch.cat([slots, target], dim=1),
            return_dict=False,
            **how,
        )[0]
        return velocity[:, -self.tokens(noisy) :].transpose(1, 2).reshape(noisy.shape)

    def guide(self, velocity: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
        """Return the guided velocity."""
        return negative + scale * (velocity - negative)

    def sigmas(self, name_or_path: str, steps: int) -> Any:
        """Return the noise levels of sampling before the shift: the checkpoint's own, if any."""
        own = utils.read_model_json(name_or_path, "model_index.json").get("sample_sigmas")
        return own or super().sigmas(name_or_path, steps)


PLUS = "QwenImageEditPlusPipeline"
EDIT_CONFIG = {"_class_name": "QwenImageTransformer2DModel", "num_layers": 60}
CONFIG_21 = {"_class_name": "QwenImage21Transformer2DModel", "num_layers": 32}
PUBLISHED = {  # so that a plan and an audit need no network
    "Qwen/Qwen-Image-Edit": Flavour("edit-v1", "QwenImageEditPipeline", None, EDIT_CONFIG, 1),
    "Qwen/Qwen-Image-Edit-2509": Flavour("edit-v2", PLUS, VISION_AREA, EDIT_CONFIG),
    "Qwen/Qwen-Image-Edit-2511": Flavour(
        "edit-v3", PLUS, VISION_AREA, EDIT_CONFIG | {"zero_cond_t": True}
    ),
    "Qwen/Qwen-Image-2.1": Flavour21("2.1", "QwenImage21Pipeline", None, CONFIG_21, 10),
}


def detect_flavour(name_or_path: str) -> Flavour:
    """Return which model it is, by model_index.json, transformer/config.json. Raises UserError."""
    if name_or_path in PUBLISHED:
        return PUBLISHED[name_or_path]
    kind = utils.read_model_json(name_or_path, "model_index.json").get("_class_name")
    settings = utils.read_model_json(name_or_path, "transformer/config.json")
    conditioned = bool(settings.get("zero_cond_t"))
    for flavour in PUBLISHED.values():
        expected = bool(flavour.transformer.get("zero_cond_t"))
        if flavour.pipeline_class == kind and conditioned == expected:
            return flavour
    kinds = sorted({flavour.pipeline_class for flavour in PUBLISHED.values()})
    raise UserError(f"{name_or_path} is a {kind or 'folder'}; wanted {' or '.join(kinds)}")


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """Pack (B, 16, 1, h, w) to tokens (B, h/2 * w/2, 64): channel, row, column in patch."""
    b, c, _, h, w = latents.shape
    tokens = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(b, (h // 2) * (w // 2), c * 4)


def unpack_latents(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Unpack tokens (B, S, 64) to latents of the shape of `like`, (B, 16, 1, h, w)."""
    b, c, _, h, w = like.shape
    latents = tokens.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(b, c, 1, h, w)


def token_grid(latents: torch.Tensor) -> tuple[int, int, int]:
    """Return (frames, rows, columns) of the tokens of (B, 16, 1, h, w)."""
    return 1, latents.shape[-2] // 2, latents.shape[-1] // 2


def predict_velocity(
    transformer: Any, noisy: torch.Tensor, sigma: torch.Tensor, batch: dict[str, Any]
) -> torch.Tensor:
    """Return the target's velocity at (noisy, sigma (B,)), shape of `noisy`, (B, 16, 1, h, w).

    Of the batch: control_latent K x (B, 16, 1, hk, wk), never noised; prompt_embed (B, T, D), whose
    dtype all get; prompt_embeds_mask (B, T) or None.
    """
    pictures = [noisy, *batch["control_latent"]]
    tokens = torch.cat([pack_latents(p) for p in pictures], dim=1)  # (B, S + sum Sk, 64)
    velocity = transformer(
        hidden_states=tokens.to(batch["prompt_embed"].dtype),
        timestep=sigma,
        encoder_hidden_states=batch["prompt_embed"],
        # KEEP: None when nothing is padded (flash attention)
        encoder_hidden_states_mask=batch.get("prompt_embeds_mask"),
        # KEEP: RoPE takes the shapes of sample 0 for all, so a batch has one shape
        img_shapes=[[token_grid(p) for p in pictures]] * len(noisy),
        return_dict=False,
    )[0]
    return unpack_latents(velocity[:, : math.prod(token_grid(noisy))], noisy)


# --- 7. geometry, encoding and cache --------------------------------------------------------------


class CacheConfig(Section):
    """Latents and embeddings are computed once, on these devices, before the transformer loads."""

    use_cache: bool = True
    """Keep what is encoded on disk; false encodes in every step, with both encoders in memory."""
    cache_dir: Path = Path("cache")
    """Folder of the cache; runs may share it, entries are named by their content."""
    vae_encoder_device: str | None = None
    """Device of the VAE, e.g. cuda:1; null is the training device."""
    text_encoder_device: str | None = None
    """Device of the text encoder, e.g. cuda:2; null is the training device."""


class Picture(NamedTuple):
    """One picture as the model gets it: where it comes from and the transform."""

    source: str | Path | Image.Image
    content: str  # hash of the file, or of the pixels of a picture in memory
    size: tuple[int, int]  # (W, H) px after the transform
    box: tuple[float, ...] = (0.0, 0.0, 1.0, 1.0)  # left, top, right, bottom, relative
    flip: bool = False

    @property
    def aspect(self) -> float:
        """Return width / height after the transform."""
        return self.size[0] / self.size[1]


class Draw(NamedTuple):
    """One visit of a sample: everything random about it but the noise, decided ahead."""

    visit: int  # number of the visit over the whole run; the noise hangs on it
    sample: int
    variant: int = 0
    view: int = 0
    vision: tuple[int, ...] | None = None  # which vision references stay; None: all
    dropped: bool = False  # train without the instruction


class Example(NamedTuple):
    """What a Draw resolves to: pictures by kind.

    pixel (the target), control (references), start (what is noised instead of the target), vision
    (for the text encoder), region (a mask). All but the last two go through the VAE and come into
    the batch as <kind>_latent.
    """

    name: str
    caption: str
    pictures: dict[str, tuple[Picture, ...]]


class Job(NamedTuple):
    """One entry of the cache: what is encoded."""

    kind: str  # latent | prompt | region
    pictures: tuple[Picture, ...]
    caption: str = ""

    def key(self, encoders: dict[str, str]) -> str:
        """Return the name of the entry; a prompt's pictures are part of it."""
        pictures = [[p.content, p.size, p.box, p.flip] for p in self.pictures]
        return cache_key(self.kind, of=encoders[self.kind], pictures=pictures, text=self.caption)


def jobs_of(example: Example) -> dict[str, list[Job]]:
    """Return the entries of an example by their names in a batch."""
    jobs = {}
    for kind, pictures in example.pictures.items():
        if kind == "vision":
            jobs["prompt_embed"] = [Job("prompt", pictures, example.caption)]
        elif kind == "region":
            jobs[kind] = [Job(kind, pictures)]
        else:
            jobs[f"{kind}_latent"] = [Job("latent", (picture,)) for picture in pictures]
    return jobs


@functools.lru_cache(maxsize=4096)
def pick_size(area_px: float, aspect: float) -> tuple[int, int]:
    """Return (W, H) of that area and aspect, rounded to 32 px as diffusers' pipelines do."""
    width = math.sqrt(area_px * aspect)
    sides = (round(side / SIZE_MULTIPLE) * SIZE_MULTIPLE for side in (width, width / aspect))
    width_px, height_px = (max(side, SIZE_MULTIPLE) for side in sides)
    return width_px, height_px


@functools.lru_cache
def buckets(resolution: int) -> list[tuple[int, int]]:  # EDIT HERE: bucketing
    """Return target sizes (W, H) with about resolution^2 pixels and aspects from 1:3 to 3:1."""
    widths = range(SIZE_MULTIPLE, 2 * resolution + 1, SIZE_MULTIPLE)
    sizes = [(w, round(resolution**2 / w / SIZE_MULTIPLE) * SIZE_MULTIPLE) for w in widths]
    return [(w, h) for w, h in sizes if h and 1 / 3 <= w / h <= 3]


@functools.lru_cache(maxsize=4096)
def nearest_bucket(width: int, height: int, resolution: int) -> tuple[int, int]:
    """Return the bucket of nearest log aspect; among equals the one of nearest area."""
    aspect, area = math.log(width / height), resolution**2

    def distance(size: tuple[int, int]) -> tuple[float, float]:
        w, h = size
        return round(abs(aspect - math.log(w / h)), 9), abs(math.log(w * h / area))

    return min(buckets(resolution), key=distance)


@functools.lru_cache(maxsize=4096)
def cover_box(
    aspect: float, wanted: float, scale: float = 1.0, x: float = 0.5, y: float = 0.5
) -> tuple[float, ...]:
    """Crop to aspect `wanted`, `scale` of the largest at x, y -> (left, top, right, bottom)."""
    width, height = min(1.0, wanted / aspect) * scale, min(1.0, aspect / wanted) * scale
    left, top = x * (1 - width), y * (1 - height)
    return tuple(round(side, 6) for side in (left, top, left + width, top + height))


def aligns(aspect: float, other: float) -> bool:
    """Return whether pictures of these aspects are taken as showing the same frame."""
    return abs(math.log(aspect / other)) < 0.02


class Frame(NamedTuple):
    """The ONE geometric transform of a visit: crop and flip of the target's frame."""

    aspect: float  # of the whole target picture
    size: tuple[int, int]  # (W, H) px of the target
    box: tuple[float, ...] | None = None  # None: the middle
    flip: bool = False

    def on_target(self, whole: Picture, size: tuple[int, int] | None = None) -> Picture:
        """Return a picture at the target's size: with its crop, or the middle of another frame."""
        same = aligns(whole.aspect, self.aspect)
        box = (same and self.box) or cover_box(whole.aspect, self.size[0] / self.size[1])
        return Picture(whole.source, whole.content, size or self.size, box, self.flip and same)

    def show(self, whole: Picture, area: int | str, strict: bool = True) -> Picture:
        """Return a reference of an area ("1mp", "target", px): the target's crop, or all of it."""
        area_px = {"1mp": AREA_1MP, "target": math.prod(self.size)}.get(str(area), area)
        # KEEP: aligned references get the target's crop, or the edit no longer lies on its pixels
        if strict and aligns(whole.aspect, self.aspect):
            return self.on_target(whole, pick_size(float(area_px), self.size[0] / self.size[1]))
        return whole._replace(size=pick_size(float(area_px), whole.aspect))


def whole_picture(source: Any, index: Any = None) -> Picture:
    """Return a picture as it is: a file that the index knows; without one what as_image() takes."""
    if index is None:
        image = as_image(source)
        return Picture(image, f"{draw_key(image.size, image.tobytes()):016x}", image.size)
    facts = index[source]
    return Picture(source, facts["content"], (facts["width"], facts["height"]))


class PairData(torch.utils.data.Dataset):
    """The samples of a run; as a data set it turns lists of Draws into batches."""

    def __init__(self, config: Config, flavour: Flavour, samples: list[Sample], index: Any) -> None:
        self.config, self.flavour, self.samples, self.index = config, flavour, samples, index
        self.encoders: dict[str, str] = {}  # see encoder_hashes(); needed to read the cache
        self.held_out = [i for i, sample in enumerate(samples) if sample.held_out]
        self._shapes: dict[Any, tuple[Any, ...]] = {}  # of (sample, variant); equal ones are one

    def dataset(self, draw: Draw) -> DatasetConfig:
        """Return the data set that a draw's sample comes from."""
        return self.config.data.dataset_configs[self.samples[draw.sample].dataset]

    def resolve(self, draw: Draw, resolution: int | None = None) -> Example:
        """Return what a Draw shows, at `resolution` if given."""
        sample, ds, config = self.samples[draw.sample], self.dataset(draw), self.config
        variant, strict = sample.variants[draw.variant], ds.conditioning_type != "reference_loose"
        whole = functools.partial(whole_picture, index=self.index)
        target = whole(variant.target)
        size = nearest_bucket(*target.size, resolution or variant.resolution)
        frame = Frame(target.aspect, size, cover_box(target.aspect, size[0] / size[1]))
        if draw.view:  # EDIT HERE: augmentation (each view is cached); view 0 is the whole picture
            chance = ("view", config.seed, sample.dataset, sample.name, draw.view)
            scale = 1 - (1 - ds.view_scale) * uniform("scale", *chance)
            place = scale, uniform("x", *chance), uniform("y", *chance)
            box = cover_box(target.aspect, size[0] / size[1], *place)
            flip = ds.view_flip and uniform("flip", *chance) < 0.5
            frame = frame._replace(box=box, flip=flip)
        area, stay = config.data.reference_area, draw.vision
        vision = [r for i, r in enumerate(variant.vision) if stay is None or i in stay]

        def show(reference: Reference, usual: int | str) -> Picture:
            return frame.show(whole(reference.path), reference.area or usual, strict)

        pictures: dict[str, Any] = {
            "pixel": [frame.on_target(target)],
            "control": [show(reference, area) for reference in variant.references],
            "vision": [show(reference, self.flavour.vision_area or area) for reference in vision],
        }
        if variant.start:
            pictures["start"] = [frame.on_target(whole(variant.start))]
        if config.loss.mask == "file" and variant.mask:
            pictures["region"] = [frame.on_target(whole(variant.mask))]
        empty = draw.dropped and config.data.caption_dropout_mode == "empty"
        pictures = {kind: tuple(each) for kind, each in pictures.items()}
        if resolution is None:  # all draws of a variant have one shape
            kinds = sorted(pictures.keys() - {"vision"})
            shape = tuple((kind, *(each.size for each in pictures[kind])) for kind in kinds)
            self._shapes[draw.sample, draw.variant] = self._shapes.setdefault(shape, shape)
        return Example(sample.name, "" if empty else variant.caption, pictures)

    def shape(self, draw: Draw) -> tuple[Any, ...]:
        """Return what the samples of a batch share: kinds and sizes of the transformer's input."""
        if (key := (draw.sample, draw.variant)) not in self._shapes:
            self.resolve(draw)
        return self._shapes[key]

    def possible_draws(self) -> Iterator[Draw]:
        """Yield every Draw that can happen, so that everything it needs is cached."""
        for number, sample in enumerate(self.samples):
            trained = not sample.held_out
            views = self.dataset(Draw(0, number)).views if trained else 1
            for which, variant in enumerate(sample.variants):
                subsets: list[tuple[int, ...] | None] = [None]
                if variant.vision_dropout and trained:
                    n = len(variant.vision)
                    sizes = range(min(variant.vision_min, n), n + 1)
                    subsets = [s for k in sizes for s in itertools.combinations(range(n), k)]
                dropped = (False, True) if variant.caption_dropout > 0 and trained else (False,)
                for view, subset, drop in itertools.product(range(views), subsets, dropped):
                    yield Draw(0, number, which, view, subset, drop)

    def __getitem__(self, micro_batches: list[list[Draw]]) -> list[dict[str, Any]]:
        try:
            return [self.batch(draws) for draws in micro_batches]
        except (UserError, ValueError) as error:  # a worker's own would arrive as a traceback
            return [{"error": str(error)}]

    def batch(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """Make a micro-batch, with sigma (B,) before the shift; draws the noise as well."""
        seed, data, loss = self.config.seed, self.config.data, self.config.loss
        examples = [self.resolve(draw) for draw in draws]
        captions = loss.captions(self.flavour).items()
        chances = [(seed, draw.visit) for draw in draws]
        others = {  # one of the texts each
            name: [texts[int(uniform("kept", *chance) * len(texts))] for chance in chances]
            for name, texts in captions
        }
        batch: dict[str, Any] = {"examples": examples, "others": others}
        if self.config.cache.use_cache:
            batch = encoded(examples, self.read, others)
        shape = self.flavour.latent_shape(examples[0].pictures["pixel"][0].size)
        # KEEP: the first noise level is the same, however many there are; of one no axis is left
        levels = [(level,) * (level > 0) for level in range(loss.noise_levels_per_sample)]
        noise = [[normal(shape, seed, "noise", d.visit, *n) for d in draws] for n in levels]
        sigma = [[sample_sigma(loss, seed, "sigma", d.visit, *n) for d in draws] for n in levels]
        batch["noise"] = torch.stack([torch.stack(each) for each in noise]).squeeze(0)
        batch["sigma"] = torch.tensor(sigma).squeeze(0)
        if "unguided" in others:  # a visit without the instruction is what guidance leads away from
            scale = self.flavour.built_in if loss.guidance == "model" else loss.guidance
            batch["guidance"] = torch.tensor([1.0 if draw.dropped else scale for draw in draws])
        batch["names"] = [example.name for example in examples]
        weights = [self.dataset(draw).loss_weight for draw in draws]
        if any(weight != 1 for weight in weights):
            batch["loss_weight"] = torch.tensor(weights)
        if data.caption_dropout_mode == "zero" and any(draw.dropped for draw in draws):
            batch["zeroed"] = torch.tensor([draw.dropped for draw in draws])
        return batch

    def read(self, job: Job) -> torch.Tensor:
        """Return what lies in the cache. Raises UserError where it is missing or damaged."""
        path = utils.entry_path(self.config.cache.cache_dir, job.key(self.encoders))
        return utils.read_entry(path)[job.kind]


def pad_text(embeds: list[torch.Tensor]) -> dict[str, Any]:
    """Collate embeddings (T, D) to prompt_embed (B, T, D) and prompt_embeds_mask (B, T) or None."""
    lengths = torch.tensor([len(embed) for embed in embeds])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]  # (B, T)
    return {
        "prompt_embed": torch.nn.utils.rnn.pad_sequence(embeds, batch_first=True),
        "prompt_embeds_mask": mask if bool((lengths != lengths[0]).any()) else None,
    }


def encoded(
    examples: Iterable[Example],
    encode: Callable[[Job], torch.Tensor],
    others: dict[str, list[str]] | None = None,
) -> dict[str, Any]:
    """Collate tensors of examples of one shape to a batch; text is padded with zeros.

    others: further instructions, {name: one per example}; become {name: pad_text()}.

    prompt_embed (B, T, D); prompt_embeds_mask (B, T) bool, None if nothing is padded; pixel_latent,
    start_latent (B, C, 1, h, w); control_latent K x (B, C, 1, hk, wk); region (B, 1, 1, h, w).
    """
    rows = [jobs_of(example) for example in examples]
    items = [{name: [encode(job) for job in jobs] for name, jobs in row.items()} for row in rows]
    batch = pad_text([item.pop("prompt_embed")[0] for item in items])
    for name, texts in (others or {}).items():
        shown = zip(rows, texts, strict=True)
        jobs = [row["prompt_embed"][0]._replace(caption=text) for row, text in shown]
        batch[name] = pad_text([encode(job) for job in jobs])
    for name in items[0]:
        stacked = [torch.stack(each) for each in zip(*(item[name] for item in items), strict=True)]
        batch[name] = stacked if name == "control_latent" else stacked[0]
    return batch


def load_picture(picture: Picture, mode: str = "RGB") -> Image.Image:
    """Open, crop at whole pixels, resize (Lanczos, as the pipelines do) to picture.size.

    mode: RGB (alpha on white) or RGBA.
    """
    source, (left, top, right, bottom) = picture.source, picture.box
    read: Any = utils.to_rgb if isinstance(source, Image.Image) else utils.open_rgb
    image = read(source, mode)
    w, h = image.size
    box = (round(left * w), round(top * h), round(right * w), round(bottom * h))
    image = image.crop(box).resize(picture.size, Image.Resampling.LANCZOS)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if picture.flip else image


def region_map(mask: Image.Image, latent_px: int = 8) -> torch.Tensor:
    """Turn a mask into (1, 1, h, w) fp32 in [0, 1], the mean of each latent's pixels."""
    level: Any = (np.asarray(mask, np.float32) / 255).mean(-1)
    (height, width), n = level.shape, latent_px
    level = torch.from_numpy(level).view(1, 1, height // n, n, width // n, n)
    return level.mean((3, 5))


def encode_stills_in_2d(vae: torch.nn.Module) -> torch.nn.Module:
    """Let the video VAE treat one frame with 2-D convolutions: 2.4 times faster on a CPU.

    A causal 3-D convolution pads one frame with zeros in front: only its last slice sees data.
    """

    def bind(conv: Any) -> None:
        whole, side = conv.forward, conv.kernel_size[-1] // 2

        def forward(x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
            if x.shape[2] != 1 or cache_x is not None:
                return whole(x, cache_x)
            y = F.conv2d(x[:, :, 0], conv.weight[:, :, -1], conv.bias, padding=side)
            return y.unsqueeze(2)

        conv.forward = forward

    for module in vae.modules():
        if type(module).__name__ == "QwenImageCausalConv3d" and set(module.stride) == {1}:  # type: ignore
            bind(module)
    return vae


def vae_statistics(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return per-channel mean and std of the latents, (1, C, 1, 1, 1) each."""
    values = (vae.config.latents_mean, vae.config.latents_std)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1).to(like) for v in values)
    return mean, std


def load_processor(folder: Path, kind: str = "Qwen2VLProcessor") -> Any:
    """Load a processor of that class; without torchvision one for stills only (all we need)."""
    import transformers

    stock: Any = getattr(transformers, kind)

    class StillsProcessor(stock):
        def __init__(
            self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
        ) -> None:
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
            start = transformers.ProcessorMixin.__init__
            start(self, image_processor, tokenizer, chat_template=chat_template)

    both = importlib.util.find_spec("torchvision")
    return (stock if both else StillsProcessor).from_pretrained(folder)


def fingerprint(folders: Sequence[Path], *extra: str) -> str:
    """Hash a model's part: files whole, large ones by size and 64 KB of every 4 MB."""
    parts: list[Any] = list(extra)
    for file in sorted(f for folder in folders for f in folder.rglob("*") if f.is_file()):
        size = file.stat().st_size
        parts.append([file.name, size])
        with file.open("rb") as stream:
            # KEEP every 4 MB: a LoRA merged into some layers leaves the others and the header alone
            for place in range(0, size, 2**16 if size < 2**26 else 2**22):
                stream.seek(place)
                parts.append(draw_key(stream.read(2**16)))
    return cache_key("encoder", parts=parts)


def encoder_hashes(folder: Path, flavour: Flavour, dtype: torch.dtype) -> dict[str, str]:
    """Return a hash per kind of job of all that its result depends on beside pictures and text."""
    kind = (flavour.pipeline_class, str(dtype))
    # diffusers has the prompt template; the two image processors differ in rounding
    library = "torchvision" if importlib.util.find_spec("torchvision") else "PIL"
    parts = [folder / name for name in ("text_encoder", "tokenizer", "processor")]
    prompt = fingerprint(parts, *kind, library, f"diffusers {version('diffusers')}")
    return {"latent": fingerprint([folder / "vae"], *kind), "prompt": prompt, "region": ""}


def fill_cache(trainer: Trainer, jobs: dict[str, Job], again: Iterable[str]) -> int:
    """Encode what is missing and `again`, a share per process; return how many this one encoded."""
    accelerator, index = trainer.accelerator, trainer.data.index
    places = {key: utils.entry_path(trainer.cache_dir, key) for key in sorted(jobs)}
    # KEEP: shares of ALL entries; what is missing changes while other processes write
    share = list(places)[accelerator.process_index :: accelerator.num_processes]

    def check(path: Path) -> dict[str, Any]:
        """Read an entry; one that is damaged is deleted."""
        try:
            utils.read_entry(path)
        except UserError:
            path.unlink(missing_ok=True)
            raise
        return {}

    for problem in index.update([places[key] for key in share if places[key].exists()], check):
        log.warning("%s; it is built again", problem)
    mine = [key for key in share if key in again or not places[key].exists()]
    log.info("cache: %d entries, process 0 has %d to encode", len(jobs), len(mine))
    for label, kinds in (("pictures", ("latent", "region")), ("prompts", ("prompt",))):
        todo = [key for key in mine if jobs[key].kind in kinds]
        loaded = zip(todo, utils.ahead(lambda key: trainer.load(jobs[key]), todo), strict=True)
        for key, images in utils.progress(loaded, f"encode {label}", total=len(todo)):
            tensor = trainer.encode(jobs[key], shown=images)
            utils.save_tensors(places[key], {jobs[key].kind: tensor})
        trainer.unload("vae", "text_encoder")  # KEEP: they are never in memory together
    index.update((places[key] for key in mine), lambda path: {})
    accelerator.wait_for_everyone()
    if lost := sum(not path.exists() for path in places.values()):
        raise UserError(f"{lost} cache entries were not written; run it again")
    return len(mine)


# --- 8. the base model: weights, devices ----------------------------------------------------------


class ModelConfig(Section):
    """The base model. Which of 2508, 2509, 2511 it is stands in its own files."""

    pretrained_model_name_or_path: str = "Qwen/Qwen-Image-Edit-2511"
    """Base model: a folder in diffusers layout, or a Hub id."""
    base_model_precision: Literal[
        "no_change", "int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto", "nf4-bnb"
    ] = "no_change"
    """Precision of frozen blocks' weights; modulation is 8-bit then, embedders and output bf16."""
    devices: list[str] = []
    """Devices that the transformer's blocks are spread over, e.g. [cuda:0, cuda:1]; one process."""
    blocks_to_swap: int = Field(0, ge=0)
    """Blocks that wait in CPU memory until they are needed; with gradient checkpointing."""
    lora: LoraConfig = LoraConfig()


MODULATION = ("img_mod.", "txt_mod.", "norm")  # how names of modulation begin in a block


def fill_parts(
    model: Any, folder: Path, dtype: torch.dtype, parts: dict[str, torch.device], precision: str
) -> None:
    """Give a model without weights its parts, one by one, on their devices; blocks are quantised.

    One block at a time is in memory unquantised. With no_change the model equals
    from_pretrained(dtype=dtype) bit for bit. Raises UserError: weights are missing or damaged.
    """
    files: dict[str, Path] = {}  # of each tensor
    with utils.named(str(folder)):
        for file in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                files |= dict.fromkeys(opened.keys(), file)
        if wrong := sorted(files.keys() ^ model.state_dict().keys()):
            raise UserError(f"{folder}: weights missing or not expected\n{listed(wrong, 3)}")
        for name, device in utils.progress(parts.items(), "load transformer", leave=False):
            tensors = {}
            for key in [key for key in files if key.startswith(f"{name}.")]:
                # KEEP: closed again; what was read of an open file counts as memory
                with safe_open(files[key], framework="pt") as opened:
                    tensors[key] = opened.get_tensor(key).to(device, dtype, copy=True)
            model.load_state_dict(tensors, strict=False, assign=True)
            tensors.clear()  # KEEP: each weight goes as soon as it is quantised
            if name[-1].isdigit() and precision != "no_change":
                quantize_block(model.get_submodule(name), precision)
            return_freed_memory()
    model.eval().requires_grad_(False)


def return_freed_memory() -> None:
    """Call malloc_trim(0): glibc keeps freed pages, so loading would need twice the memory."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def quantize_block(block: torch.nn.Module, precision: str) -> None:
    """Replace the linear layers one by one by quantised ones; modulation is 8-bit at least."""
    linear = [name for name, x in block.named_modules() if isinstance(x, torch.nn.Linear)]
    for name in linear:
        fine = precision.startswith(("int8", "fp8")) or not name.startswith(MODULATION)
        here = precision if fine else "int8-quanto"
        layer = utils.load_tool("quantize").quantize_linear(block.get_submodule(name), here)
        block.set_submodule(name, layer)
        return_freed_memory()


def placement(transformer: Any, devices: Sequence[torch.device], swap: int) -> dict[str, Any]:
    """Return {block or embedder: (where its weights live, where it computes)}.

    Blocks are spread over `devices` in equal runs; `swap` of them, evenly, live on the CPU.
    """
    blocks, found = transformer.transformer_blocks, {}
    for name, part in transformer.named_children():
        if part is not blocks and part.state_dict():
            found[name] = (devices[-1 if name in ("norm_out", "proj_out") else 0],) * 2
    swapped = {(2 * number + 1) * len(blocks) // (2 * swap) for number in range(swap)}
    for number in range(len(blocks)):
        device = devices[number * len(devices) // len(blocks)]
        home = torch.device("cpu") if number in swapped else device
        found[f"transformer_blocks.{number}"] = home, device
    return found


def empty_transformer(settings: dict[str, Any]) -> Any:
    """Build the transformer without weights (meta device)."""
    import diffusers
    from accelerate import init_empty_weights

    with init_empty_weights():
        kind = settings.get("_class_name", "QwenImageTransformer2DModel")
        return getattr(diffusers, kind).from_config(settings)


def sharding() -> bool:
    """Return whether the launcher asks for FSDP: several processes share the frozen weights."""
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")
    return wanted and os.environ.get("WORLD_SIZE", "1") != "1"


def share_weights(module: torch.nn.Module, *whole: torch.nn.Parameter) -> None:
    """Leave each process its share of a module's weights (FSDP2); `whole` ones stay with all."""
    from torch.distributed.fsdp import fully_shard

    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # of changes in place: there are none
    fully_shard(module, ignored_params=set(whole))


def load_transformer(
    folder: Path,
    dtype: torch.dtype,
    precision: str,
    devices: Sequence[torch.device],
    swap: int,
    shard: bool = False,
) -> Any:
    """Load the frozen transformer, each part read (and quantised) straight to where it lives."""
    model = empty_transformer(utils.read_model_json(str(folder), "config.json"))
    places = placement(model, devices, swap)
    homes = {name: home for name, (home, _) in places.items()}
    for parts in [{name: home} for name, home in homes.items()] if shard else [homes]:
        fill_parts(model, folder, dtype, parts, precision)
        for name in [name for name in parts if shard and name[-1].isdigit()]:
            share_weights(model.get_submodule(name))
    if shard:  # KEEP the common root: it fetches a block while another one computes
        share_weights(model, *model.parameters())  # embedders stay whole, the adapter does, too
    model.is_loaded_in_4bit = precision == "nf4-bnb"  # PEFT looks there
    connect(model, places)
    return model


def connect(transformer: Any, places: dict[str, Any]) -> None:
    """Add hooks that carry activations between devices, or weights between CPU and device."""
    from accelerate.utils import send_to_device

    first, last = next(iter(places.values()))[1], places["proj_out"][1]
    parts = {name: transformer.get_submodule(name) for name in places}
    if swapped := [name for name, (home, device) in places.items() if home != device]:
        blocks = {int(name.rpartition(".")[2]): parts[name] for name in swapped}
        transformer.block_swap = BlockSwap(blocks, first)
        transformer.register_forward_pre_hook(lambda *_: transformer.block_swap.begin())
        return_freed_memory()  # pinned memory has taken its place
    if first == last:
        return

    def carry(device: torch.device, module: Any, args: Any, kwargs: Any) -> Any:
        return send_to_device(args, device), send_to_device(kwargs, device)

    # temb, text, rope, mask ... go to each block's device, the result back to the first
    for name, part in parts.items():
        if name[-1].isdigit() or name == "norm_out":
            hook = functools.partial(carry, places[name][1])
            part.register_forward_pre_hook(hook, with_kwargs=True)
    transformer.register_forward_hook(lambda *args: send_to_device(args[-1], first))


def map_tensor(tensor: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply `change` to a tensor, or to the ones that a quanto tensor is made of.

    KEEP: quanto's own .to() and .clone() pick a kernel or undo the quantisation.
    """
    if not hasattr(tensor, "__tensor_flatten__"):
        return change(tensor)
    names, meta = tensor.__tensor_flatten__()
    inner = {name: map_tensor(getattr(tensor, name), change) for name in names}
    return type(tensor).__tensor_unflatten__(inner, meta, tensor.size(), tensor.stride())


class BlockSwap:
    """Blocks whose frozen weights lie in (pinned) CPU memory and visit the device for their turn.

    While one works, the next is copied. Gradient checkpointing makes the order known: up in the
    forward pass, down in the backward pass, where every block is computed once more. Parameter
    objects are replaced, not `.data`: autograd keeps the GPU copy until the block's backward.
    """

    def __init__(self, blocks: dict[int, torch.nn.Module], device: torch.device) -> None:
        self.numbers, self.device = sorted(blocks), device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # {block: [(table of parameters, name, the one in CPU memory)]}
        self.homes: dict[int, list[tuple[dict[str, Any], str, torch.nn.Parameter]]] = {}
        self.here: dict[int, tuple[list[torch.nn.Parameter], Any]] = {}  # copies, their event
        self.keep: int | None = None  # not to be removed after its turn
        self.last = -1  # the block that worked last in this pass
        for number, block in blocks.items():
            self.homes[number] = [
                (part._parameters, name, self._pinned(value))
                for part in block.modules()
                for name, value in part._parameters.items()
                if value is not None
            ]
            for name, buffer in block.named_buffers():  # quanto's scales
                owner, _, last = name.rpartition(".")
                block.get_submodule(owner)._buffers[last] = buffer.to(device)
            self._put(number, [home for *_, home in self.homes[number]])
            block.register_forward_pre_hook(functools.partial(self._enter, number))
            # KEEP always_call: recomputation ends blocks early, by an exception
            leave = functools.partial(self._leave, number)
            block.register_forward_hook(leave, always_call=True)

    def _pinned(self, value: torch.nn.Parameter) -> torch.nn.Parameter:
        pinned = map_tensor(value, torch.Tensor.pin_memory) if self.stream else value
        return torch.nn.Parameter(pinned, requires_grad=False)

    def _put(self, number: int, parameters: Iterable[torch.nn.Parameter]) -> None:
        for (table, name, _), parameter in zip(self.homes[number], parameters, strict=True):
            table[name] = parameter

    def begin(self) -> None:
        """Start the first block on its way, before each forward pass."""
        self.last = -1
        self._fetch(self.numbers[0])

    @torch.no_grad()
    def _fetch(self, number: int) -> None:
        def copy(tensor: torch.Tensor) -> torch.Tensor:
            # KEEP: allocated on the computing stream, so that it takes the place of a block that
            # has had its turn, however far the host runs ahead
            there = torch.empty_like(tensor, device=self.device)
            with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
                return there.copy_(tensor, non_blocking=True)

        if number in self.here:
            return
        if self.stream:  # KEEP: that block may still be at work
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        homes = [home for *_, home in self.homes[number]]
        copies = [torch.nn.Parameter(map_tensor(home, copy), False) for home in homes]
        self.here[number] = copies, self.stream.record_event() if self.stream else None

    def _arrive(self, number: int) -> list[torch.nn.Parameter]:
        copies, event = self.here[number]
        if event:
            torch.cuda.current_stream(self.device).wait_event(event)
        return copies

    def _next(self, number: int) -> int | None:
        """Return the swapped block whose turn comes after this one."""
        place = self.numbers.index(number)
        if number <= self.last:  # backward pass
            return self.numbers[place - 1] if place else None
        if place + 1 < len(self.numbers):
            return self.numbers[place + 1]
        return number if torch.is_grad_enabled() else None  # the backward pass begins with it

    def _enter(self, number: int, *_: Any) -> None:
        self._fetch(number)
        self._put(number, self._arrive(number))
        following = self._next(number)
        for other in set(self.here) - {number, following}:  # only after a pass that broke off
            self._arrive(other)
            del self.here[other]
        if following is not None:
            self._fetch(following)
        self.keep, self.last = following, number

    def _leave(self, number: int, *_: Any) -> None:
        self._put(number, [home for *_, home in self.homes[number]])
        if self.keep != number:
            self.here.pop(number, None)


def place_adapter(transformer: Any) -> None:
    """Put the adapters of swapped blocks on the device, where they stay."""
    swap: Any = getattr(transformer, "block_swap", None)
    for name, parameter in transformer.named_parameters():
        if swap and re.search(r"\.lo(ra|kr)_", name):
            parameter.data = parameter.data.to(swap.device)


# --- 9. sampling and validation -------------------------------------------------------------------


class PredictDevices(Section):
    """A device per component for trainer.predict(); null is the training device."""

    vae: str | None = None
    """Device of the VAE in predict(), e.g. cuda:1; null is the training device."""
    text_encoder: str | None = None
    """Device of the text encoder in predict(), e.g. cuda:2; null is the training device."""
    transformer: str | None = None
    """Device of the transformer in predict(), e.g. cuda:0; null is the training device."""


class PredictConfig(Section):
    """Inference with trainer.predict()."""

    devices: PredictDevices = PredictDevices()


class ValidationSample(Section):
    """An edit without a target."""

    prompt: str
    """Instruction of the edit."""
    images: list[Path] = Field(min_length=1)
    """Reference pictures of the edit, in order."""


SCHEDULES: dict[str, dict[str, Any]] = {  # settings of the scheduler; lightning: shift 3
    "model": {},
    "lightning": {
        **dict.fromkeys(("base_shift", "max_shift"), math.log(3)),
        **{"shift_terminal": None, "use_dynamic_shifting": True, "time_shift_type": "exponential"},
    },
}


class SamplingConfig(Section):
    """How a picture is drawn."""

    seed: int = 42
    """Seed of the noise; of the validation loss, too."""
    num_inference_steps: int = Field(20, ge=2, le=1000)
    """Euler steps of a picture, at least 2 (one divides by zero in the scheduler)."""
    true_cfg_scale: float | None = Field(None, ge=1)
    """Guidance of a picture against negative_prompt; 1 is none; null: 4; 2.1, lightning: none."""
    negative_prompt: str | None = ""
    """Instruction that guidance leads away from; "" with the same references; null: no guidance."""
    schedule: Literal["model", "lightning"] = "model"
    """Noise levels of a picture: the model's, or those of Lightning LoRAs (4 or 8 steps)."""

    def guidance(self, flavour: Flavour) -> float:
        """Return the scale of guidance; 1 is none."""
        if self.negative_prompt is None:
            return 1.0
        return self.true_cfg_scale or (flavour.guidance if self.schedule == "model" else 1.0)

    def sigmas(self, flavour: Flavour, name_or_path: str) -> Any:
        """Return the noise levels before the shift."""
        steps = self.num_inference_steps
        if self.schedule == "model":
            return flavour.sigmas(name_or_path, steps)
        return np.linspace(1.0, 1 / steps, steps)


class ValidationConfig(SamplingConfig):
    """Pictures and loss on held-out samples (holdout, holdout_ratio, eval_dataset_id)."""

    steps: int | None = Field(None, ge=1)
    """Optimizer steps between two validations; null is none."""
    eval_dataset_id: list[str] = []
    """Data sets (id) that are kept out of training whole."""
    samples: list[ValidationSample] = []
    """Edits to draw besides the held-out pairs, without a target."""
    max_samples: int = Field(4, ge=1, le=1000)
    """Held-out samples drawn on the sheet; the loss takes all."""
    resolution: int | None = Field(None, ge=64, le=8192)
    """Side of the square whose area pictures get, px; null is that of training, or of predict()."""
    fixed_lora: str | None = None
    """LoRA file, or FILE:scale, that every picture is drawn with (a few-step LoRA); not trained."""

    def rules(self) -> dict[str, Any]:
        """Return {problem: whether it is there}."""
        steps = self.schedule == "lightning" and self.num_inference_steps not in (4, 8)
        return {"num_inference_steps: lightning has 4 or 8": self.steps and steps}


def prompt_jobs(example: Example, how: SamplingConfig, flavour: Flavour) -> list[Job]:
    """Return the prompt of an example and, for guidance, the negative one."""
    [prompt] = jobs_of(example)["prompt_embed"]
    if how.guidance(flavour) <= 1:
        return [prompt]
    return [prompt, prompt._replace(caption=how.negative_prompt or "")]


@torch.no_grad()
def draw_edit(
    trainer: Trainer, example: Example, how: SamplingConfig, encode: Callable[[Job], torch.Tensor]
) -> Image.Image:
    """Draw an example, step for step as the pipelines do; encode(job): what the cache has."""
    transformer, flavour = trainer.bare_transformer(), trainer.flavour
    device = transformer.device
    shape = (1, *flavour.latent_shape(example.pictures["pixel"][0].size))
    embeds = [encode(job)[None].to(device) for job in prompt_jobs(example, how, flavour)]
    dtype, generator = embeds[0].dtype, torch.Generator().manual_seed(how.seed)
    controls = [encode(job)[None].to(device, dtype) for job in jobs_of(example)["control_latent"]]
    batches: Any = [{"control_latent": controls, "prompt_embed": e, "prefix": {}} for e in embeds]
    latents = torch.randn(shape, generator=generator, dtype=dtype).to(device)
    stock, settings = trainer.scheduler, SCHEDULES[how.schedule]
    scheduler = type(stock).from_config(stock.config, **settings)  # set_timesteps() changes it
    mu = model_mu(scheduler.config, flavour.tokens(latents))
    name = trainer.config.model.pretrained_model_name_or_path
    scheduler.set_timesteps(sigmas=how.sigmas(flavour, name), device=device, mu=mu)
    scheduler.set_begin_index(0)
    # fp32 LoRA on a bf16 base: as in training
    mixed = bool(getattr(transformer, "peft_config", None)) and dtype != torch.float32
    with torch.autocast(device.type, dtype, enabled=mixed):
        for t in scheduler.timesteps:
            inputs = transformer, latents, t.expand(1).to(dtype) / 1000
            velocity, *negative = (flavour.velocity(*inputs, batch) for batch in batches)
            if negative:
                velocity = flavour.guide(velocity, negative[0], how.guidance(flavour))
            latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
    return Image.fromarray(trainer.decode_vae_latent(latents)[0])


def edit_example(
    trainer: Trainer, pictures: Sequence[Picture], prompt: str, size: Sequence[int | None] = ()
) -> Example:
    """Return what an edit without a target shows the model, by the rules of training.

    The main picture (the last) is drawn at `size` (W, H) px, down to a multiple of 16 (2.1: 32);
    default: 1 MP, or the training size if references are as large as the target.
    """
    datasets = trainer.config.data.dataset_configs
    main, multiple = pictures[-1], trainer.flavour.multiple_px
    area, seen = (areas[0] for areas in inference_rules(trainer).values())
    aligned, usual = area == "target", pick_size(AREA_1MP, main.aspect)
    if aligned and datasets:
        usual = nearest_bucket(*main.size, datasets[0].resolution)
    wanted = zip(size or (None, None), usual, strict=True)
    width, height = ((side or own) // multiple * multiple for side, own in wanted)
    # the frame that references share: the main one's, or of the one nearest to width x height
    aspects = [picture.aspect for picture in pictures]
    near = min(aspects, key=lambda aspect: abs(math.log(aspect / (width / height))))
    frame = Frame(near if any(size) else main.aspect, (width, height))
    shown: dict[str, Any] = {"pixel": (main._replace(size=frame.size),)}
    shown["control"] = tuple(frame.show(picture, area, aligned) for picture in pictures)
    shown["vision"] = tuple(frame.show(picture, seen or area, aligned) for picture in pictures)
    return Example("", prompt, shown)


def validation_edits(trainer: Trainer) -> list[tuple[Example, bool]]:
    """Return the sheet's rows: (example, whether it has a target), held-out pairs, then samples."""
    wanted, data = trainer.config.validation, trainer.data
    side_px, numbers = wanted.resolution, data.held_out[: wanted.max_samples]
    if not wanted.steps:
        return []
    edits = [(data.resolve(Draw(0, number), side_px), True) for number in numbers]
    for sample in wanted.samples:
        if problems := data.index.update(sample.images, utils.look_at_picture):
            raise UserError(f"validation.samples\n{listed(problems)}")
        pictures = [whole_picture(path, data.index) for path in sample.images]
        size = pick_size(side_px**2, pictures[-1].aspect) if side_px else ()
        example = edit_example(trainer, pictures, sample.prompt, size)
        edits.append((example._replace(name=sample.images[-1].stem), False))
    return edits


@torch.no_grad()
def validate(trainer: Trainer, run_log: RunLog) -> None:
    """Draw the sheet (base | LoRA | EMA | target); log the loss, q1 (least noise) to q4, too."""
    step, transformer = trainer.global_step, trainer.bare_transformer()
    edits = validation_edits(trainer)
    examples, values = [example for example, _ in edits], {}
    transformer.eval()
    if not trainer.base_pictures:
        trainer.base_pictures = draw_edits(trainer, examples, trained=False)
    columns = {"base": trainer.base_pictures}
    for head in ("LoRA", "EMA") if trainer.ema else ("LoRA",):
        with trainer.averaged(ema=head == "EMA"):
            columns[head] = draw_edits(trainer, examples)
            losses = validation_losses(trainer).mean(0).tolist()
        name = "validation_loss_ema" if head == "EMA" else "validation_loss"
        values[name] = sum(losses) / 8
        values |= {f"{name}_q{i + 1}": sum(losses[2 * i : 2 * i + 2]) / 2 for i in range(4)}
    transformer.train()
    if trainer.data.held_out:
        run_log.values(step, values)
        targets = [load_picture(e.pictures["pixel"][0]) if known else None for e, known in edits]
        columns["target"] = targets
    if edits and trainer.accelerator.is_main_process:
        if trainer.data.held_out:
            tqdm.write(f"step {step} validation loss {values['validation_loss']:.4f}")
        rows = list(zip(*columns.values(), strict=True))
        run_log.picture(f"step_{step:06d}", edit_sheet(examples, rows, list(columns)), step)
    trainer.accelerator.wait_for_everyone()


def validation_losses(trainer: Trainer) -> torch.Tensor:
    """Return the loss of each held-out pair at each sigma, (pairs, 8); always the same noise."""
    accelerator, data, seed = trainer.accelerator, trainer.data, trainer.config.validation.seed
    losses = torch.zeros(len(data.held_out), 8, device=trainer.device)
    for row in trainer.share(len(losses)):
        example = data.resolve(Draw(0, data.held_out[row]))
        batch = trainer.to_device(encoded([example], trainer.through_cache))
        for column in range(8):
            sigma = (column + 0.5) / 8  # two in each quarter
            noise = normal(batch["pixel_latent"].shape, seed, example.name, sigma)
            drawn = trainer.to_device({"noise": noise, "sigma": torch.tensor([sigma])})
            # KEEP the bare transformer: processes do not call it equally often
            loss = compute_loss(trainer, batch | drawn, trainer.bare_transformer(), shift=False)
            losses[row, column] = loss[0]
    # each is 0 on all processes but one, or the same on all
    return accelerator.reduce(losses, "mean" if trainer.sharded else "sum")


def use_adapters(trainer: Trainer, trained: bool = True, fixed: bool = False) -> None:
    """Switch the trained adapter, and that of validation.fixed_lora, on or off."""
    from diffusers.utils import set_weights_and_activate_adapters

    transformer = trainer.bare_transformer()
    scales = {"default": 1.0} if trained else {}
    scales |= {"fixed": trainer.fixed_scale} if fixed and trainer.fixed_scale else {}
    if not scales:
        transformer.disable_adapters()
        return
    transformer.enable_adapters()
    if trainer.fixed_scale:
        set_weights_and_activate_adapters(transformer, [*scales], [*scales.values()])


def draw_edits(trainer: Trainer, examples: Any, trained: bool = True) -> list[Image.Image | None]:
    """Draw the examples, a share per process; None is one that the memory was too small for."""
    use_adapters(trainer, trained, fixed=True)
    try:
        return draw_shares(trainer, examples)
    finally:
        use_adapters(trainer)  # KEEP: PEFT lets only active adapters have gradients


def draw_shares(trainer: Trainer, examples: Any) -> list[Image.Image | None]:
    """Draw a share of the examples on each process, with the adapters as they are; gather them."""
    from accelerate.utils import gather_object

    how, drawn = trainer.config.validation, []
    for number in utils.progress(trainer.share(len(examples)), "validation pictures", leave=False):
        image = None
        try:
            image = draw_edit(trainer, examples[number], how, trainer.through_cache)
        except torch.OutOfMemoryError:
            text = "out of memory, left out (a smaller validation.resolution helps)"
            tqdm.write(f"validation of {examples[number].name}: {text}; training goes on")
        drawn.append((number, image))
        if trainer.use_cache:  # KEEP: not in the except clause, where the error holds the tensors
            trainer.unload("vae", "text_encoder")
    return [image for _, image in sorted(dict(gather_object(drawn)).items())]


def edit_sheet(examples: Sequence[Example], results: Any, heads: list[str]) -> Image.Image:
    """Draw the references of each row, however many it has | its results, under `heads`."""
    shown = [[load_picture(file) for file in e.pictures["control"]] for e in examples]
    most = max(map(len, shown))
    pairs = zip(shown, results, strict=True)
    rows = [[*its, *[None] * (most - len(its)), *row] for its, row in pairs]
    names = [f"reference {i + 1}" for i in range(most)] if most > 1 else ["before"][:most]
    captions = [f"{example.name}: {example.caption or '(empty)'}" for example in examples]
    return utils.contact_sheet(rows, names + heads, captions)


# --- 10. the order of samples ---------------------------------------------------------------------


class StepPlan:
    """For every optimizer step the micro-batches of this process, from `first_step` on.

    One step takes `size` samples, however the work is split: process r of n gets the r-th n-th, cut
    into micro-batches of one shape, all into equally many. An epoch visits each sample `repeats`
    times; its last step is filled up from its beginning.
    """

    def __init__(self, data: PairData, accelerator: Any, first_step: int = 0) -> None:
        self.data, self.first_step, train = data, first_step, data.config.train
        self.rank, self.processes = accelerator.process_index, accelerator.num_processes
        self.size = data.config.data.batch_size * train.gradient_accumulation_steps * self.processes
        repeats = [d.repeats for d in data.config.data.dataset_configs]
        trained = [(n, sample) for n, sample in enumerate(data.samples) if not sample.held_out]
        self.visits = [n for n, sample in trained for _ in range(repeats[sample.dataset])]
        self.steps_per_epoch = math.ceil(len(self.visits) / self.size)
        epochs = train.num_epochs or math.inf
        self.steps = int(min(train.max_train_steps, epochs * self.steps_per_epoch))

    def draw(self, visit: int, number: int) -> Draw:
        """Return everything random about one visit but its noise."""
        seed, variants = self.data.config.seed, self.data.samples[number].variants
        below = list(itertools.accumulate(variant.weight for variant in variants))
        chance = uniform(seed, "batch_config", visit) * below[-1]
        which = bisect.bisect_right(below, chance, hi=len(below) - 1)
        view = int(uniform(seed, "view", visit) * self.data.dataset(Draw(0, number)).views)
        vision = keep_references(variants[which], seed, visit)
        dropped = uniform(seed, "caption_dropout", visit) < variants[which].caption_dropout
        return Draw(visit, number, which, view, vision, dropped)

    def epoch(self, epoch: int) -> list[list[Draw]]:
        """Return the steps of an epoch; steps of one shape as far as they fill, the rest mixed."""
        seed, shuffle = self.data.config.seed, self.data.config.data.shuffle

        def order(n: int, purpose: str) -> Sequence[int]:
            return utils.shuffled(n, seed, purpose, epoch) if shuffle else range(n)

        by_shape: dict[object, list[Draw]] = {}
        for place in order(len(self.visits), "order"):
            draw = self.draw(epoch * len(self.visits) + place, self.visits[place])
            by_shape.setdefault(self.data.shape(draw), []).append(draw)
        full, rest = [], []
        for draws in by_shape.values():
            whole = len(draws) - len(draws) % self.size
            full += [draws[i : i + self.size] for i in range(0, whole, self.size)]
            rest += draws[whole:]
        again = itertools.cycle(rest + [draw for step in full for draw in step])
        rest += [next(again) for _ in range(-len(rest) % self.size)]
        steps = full + [rest[i : i + self.size] for i in range(0, len(rest), self.size)]
        return [steps[i] for i in order(len(steps), "steps")]

    def __iter__(self) -> Iterator[list[list[Draw]]]:
        step, share = self.first_step, self.size // self.processes
        while step < self.steps:
            epoch, place = divmod(step, self.steps_per_epoch)
            for draws in self.epoch(epoch)[place : place + self.steps - step]:
                cut = [self.micro_batches(draws[i : i + share]) for i in range(0, self.size, share)]
                mine = cut[self.rank]
                while len(mine) < max(map(len, cut)):
                    mine.append([max(mine, key=len).pop()])
                yield mine
                step += 1

    def micro_batches(self, draws: Sequence[Draw]) -> list[list[Draw]]:
        """Cut into batches of one shape, at most batch_size each."""
        batches: list[list[Draw]] = []
        filling: dict[object, list[Draw]] = {}
        for draw in draws:
            batch = filling.setdefault(self.data.shape(draw), [])
            if len(batch) % self.data.config.data.batch_size == 0:
                batch = filling[self.data.shape(draw)] = []
                batches.append(batch)
            batch.append(draw)
        return batches


def keep_references(variant: Variant, *parts: object) -> tuple[int, ...] | None:
    """Return vision references that survive dropout (at least vision_min of them); None: all."""
    n = len(variant.vision)
    if not variant.vision_dropout:
        return None
    chances = [uniform("vision_dropout", i, *parts) for i in range(n)]
    kept = [i for i in range(n) if chances[i] >= variant.vision_dropout]
    if len(kept) < variant.vision_min:  # the luckiest ones stay
        kept = sorted(sorted(range(n), key=lambda i: -chances[i])[: variant.vision_min])
    return tuple(kept)


# --- 11. the trainer ------------------------------------------------------------------------------


class QwenImageEditTrainer:
    """Load, cache, train, sample. Every method can be called alone, e.g. in a notebook:

    >>> trainer = QwenImageEditTrainer(load_config(Config, ["--config", "configs/x.yaml"]))
    >>> trainer.fit()
    >>> trainer.setup_predict()
    >>> image = trainer.predict(prompt_image, "make it snow")
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.accelerator: Any = None
        self.optimizer: Any = None
        self.lr_scheduler: Any = None
        self.ema: MovingAverage | None = None
        self.global_step = 0
        self.vae: Any = None
        self.qwen_vl: Any = None  # Qwen2.5-VL; 2.1: Qwen3-VL
        self.transformer: Any = None
        self.tokenizer: Any = None  # Qwen2Tokenizer
        self.processor: Any = None
        self.scheduler: Any = None  # FlowMatchEulerDiscreteScheduler
        self.text_pipeline: Any = None  # the pipeline without VAE and transformer: encode_prompt()
        self.quantize = False  # true: fp8-quanto where the config says no_change
        self.loaded_as: Any = None  # precision and places of the transformer
        self.fixed_scale = 0.0  # of the adapter "fixed", if there is one
        self.sharded = False  # each process holds its share of the frozen blocks (FSDP2)
        self.use_cache, self.cache_dir = config.cache.use_cache, config.cache.cache_dir
        self.cache_exist = any(self.cache_dir.glob("??/??/*.safetensors"))
        bf16 = config.train.mixed_precision == "bf16"
        self.weight_dtype = torch.bfloat16 if bf16 else torch.float32
        self.flavour = detect_flavour(config.model.pretrained_model_name_or_path)
        self.data = PairData(config, self.flavour, [], utils.FileIndex(None))
        limit = config.train.checkpoints_total_limit
        self.checkpoints = utils.Checkpoints(config.logging.output_dir, limit)
        self.base_pictures: list[Any] = []  # of the validation sheet, without the LoRA
        self.drawn = 0  # batches of this step, from a loader of the user's, that got noise here

    @property
    def device(self) -> torch.device:
        """Return the training device; of several the first."""
        self.setup_accelerator()
        return torch.device([*self.config.model.devices, self.accelerator.device][0])

    @property
    def precision(self) -> str:
        """Return what blocks are stored in; `trainer.quantize = True` before loading means fp8."""
        precision = self.config.model.base_model_precision
        return "fp8-quanto" if self.quantize and precision == "no_change" else precision

    def checkpoint(self, *parts: str) -> Path:
        """Return the folder of the base; from the Hub only these parts are fetched."""
        name = self.config.model.pretrained_model_name_or_path
        return utils.fetch_checkpoint(name, *(f"{part}/*" for part in parts))

    @utils.named("the base model cannot be loaded")
    def load_model(
        self, parts: Sequence[str] = ("vae", "text_encoder", "transformer", "scheduler")
    ) -> None:
        """Load what is named and not there yet, frozen, in `weight_dtype`; to the CPU, but the
        transformer, which goes to its device.
        """
        import diffusers

        how: dict[str, Any] = {"dtype": self.weight_dtype, "use_safetensors": True}
        if "scheduler" in parts and self.scheduler is None:
            kind: Any = diffusers.FlowMatchEulerDiscreteScheduler
            folder = self.checkpoint("scheduler")
            self.scheduler = kind.from_pretrained(folder, subfolder="scheduler")
        if "vae" in parts and self.vae is None:
            kind = getattr(diffusers, self.flavour.vae_class)
            self.vae = kind.from_pretrained(self.checkpoint("vae"), subfolder="vae", **how)
            encode_stills_in_2d(self.vae.eval().requires_grad_(False))
        if "text_encoder" in parts and self.text_pipeline is None:
            folder = self.checkpoint("text_encoder", "tokenizer", "processor", "scheduler")
            how["processor"] = load_processor(folder / "processor", self.flavour.processor_class)
            kind = getattr(diffusers, self.flavour.pipeline_class)
            pipeline = kind.from_pretrained(folder, transformer=None, vae=None, **how)
            self.text_pipeline, self.qwen_vl = pipeline, pipeline.text_encoder
            self.qwen_vl.eval().requires_grad_(False)
            self.processor = pipeline.processor
            self.tokenizer = pipeline.processor.tokenizer
        if "transformer" in parts and self.transformer is None:
            self.place_transformer(self.device)

    def place_transformer(self, device: torch.device | str) -> None:
        """Load the transformer to where the config wants it; if it is elsewhere, load it again."""
        model = self.config.model
        # an empty tensor knows the number of "cuda"
        devices = [torch.empty(0, device=n).device for n in model.devices or [str(device)]]
        wanted = self.precision, devices, model.blocks_to_swap, self.sharded
        if self.transformer is not None and self.loaded_as == wanted:
            return
        with tempfile.TemporaryDirectory() as adapter:
            if trained := getattr(self.transformer, "peft_config", None):
                self.save_lora(adapter)
            self.unload("transformer")
            folder = self.checkpoint("transformer") / "transformer"
            self.transformer = load_transformer(folder, self.weight_dtype, *wanted)
            self.loaded_as = wanted
            if trained:
                self.load_lora(adapter)

    def unload(self, *parts: str) -> None:
        """Forget components ("vae", "text_encoder", "transformer") and free their memory."""
        for part in parts:
            for name in ("qwen_vl", "text_pipeline") if part == "text_encoder" else (part,):
                setattr(self, name, None)
        gc.collect()
        torch.cuda.empty_cache()

    def bare_transformer(self) -> Any:
        """Return the transformer without its distributed wrapper."""
        wrapped = self.accelerator and self.transformer is not None
        return self.accelerator.unwrap_model(self.transformer) if wrapped else self.transformer

    def setup_accelerator(self) -> None:
        """Set up devices, precision, processes, trackers."""
        if self.accelerator:
            return
        self.sharded = sharding()  # accelerate is not told: for it this is plain data parallel
        told, precision = self.config.logging, self.config.train.mixed_precision
        how = {"mixed_precision": precision, "device_placement": False}  # the layout places it
        self.accelerator = utils.make_accelerator(told.report_to, told.output_dir, **how)
        logging.basicConfig(format="%(message)s")
        log.setLevel(logging.INFO if self.accelerator.is_main_process else logging.ERROR)

    def find_data(self) -> None:
        """Pair, audit and hash the data set. Raises UserError with every problem."""
        if self.data.samples:
            return
        if self.config._audited:  # by the command, a moment ago
            self.data, self.config._audited = self.config._audited, None
        else:
            with self.accelerator.main_process_first():  # the others see what process 0 recorded
                self.data, problems = find_samples(self.config, self.flavour)
            if problems:
                raise UserError(f"{len(problems)} problem(s)\n{listed(problems)}")
        self.find_encoders()

    def find_encoders(self) -> None:
        """Hash the encoders; their hashes are part of the names of cache entries."""
        if self.use_cache and not self.data.encoders:
            folder = self.checkpoint("vae", "text_encoder", "tokenizer", "processor")
            self.data.encoders = encoder_hashes(folder, self.flavour, self.weight_dtype)

    @torch.no_grad()
    def encode_image_embedding(self, image: Any, device: Any = None) -> torch.Tensor:
        """Encode a picture (sides: multiples of 16 px) to its normalised mode (1, C, 1, h, w)."""
        from diffusers.image_processor import VaeImageProcessor

        self.load_model(["vae"])
        self.vae.to(device or self.device)
        shown = as_image(image, self.flavour.picture_mode)
        [pixels] = VaeImageProcessor(do_resize=False).preprocess(shown)  # (3 or 4, H, W)
        pixels = pixels[None, :, None].to(self.vae.device, self.vae.dtype)
        latents = self.vae.encode(pixels).latent_dist.mode()
        mean, std = vae_statistics(self.vae, latents)
        return (latents - mean) / std

    @torch.no_grad()
    def encode_prompt_image_embedding(
        self, prompt: str, image: Any, device: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode instruction and picture(s) to embedding (1, T, D), mask (1, T) of ones.

        Of 2.1 (1, T, D + 1): the last channel marks the slots of the pictures.
        """
        self.load_model(["text_encoder"])
        place = torch.device(device or self.device)
        self.qwen_vl.to(place)
        several = image if isinstance(image, list | tuple) else [image]
        shown = [as_image(one, self.flavour.picture_mode) for one in several]
        embeds = self.flavour.encode_prompt(self.text_pipeline, prompt, shown, place)
        return embeds, torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)

    def _encode_empty_prompt(self, image: Any, device: Any = None) -> tuple[Any, Any]:
        embeds, mask = self.encode_prompt_image_embedding("", image, device)
        return embeds[0], mask[0]  # (T, D), (T,)

    @torch.no_grad()
    def decode_vae_latent(self, latents: torch.Tensor) -> np.ndarray:
        """Decode normalised latents (B, C, 1, h, w) to pictures (B, H, W, 3; 2.1: 4) uint8."""
        from diffusers.image_processor import VaeImageProcessor

        self.load_model(["vae"])
        latents = latents.to(self.vae.device, self.vae.dtype)
        mean, std = vae_statistics(self.vae, latents)
        latents = self.flavour.denormalise(latents, mean, std)
        pixels = self.vae.decode(latents, return_dict=False)[0][:, :, 0]
        return np.stack([np.asarray(image) for image in VaeImageProcessor().postprocess(pixels)])

    def load(self, job: Job) -> list[Image.Image]:
        """Return the pictures that encode() takes."""
        mode = "RGB" if job.kind == "region" else self.flavour.picture_mode
        return [load_picture(picture, mode) for picture in job.pictures]

    def encode(self, job: Job, vae: Any = None, text_encoder: Any = None, shown: Any = None) -> Any:
        """Return what the cache holds: latent (C, 1, h, w), prompt (T, D), region (1, 1, h, w)."""
        images, cache = self.load(job) if shown is None else shown, self.config.cache
        if job.kind == "region":
            return region_map(images[0], self.flavour.latent_px)
        if job.kind == "latent":
            return self.encode_image_embedding(images[0], vae or cache.vae_encoder_device)[0].cpu()
        device = text_encoder or cache.text_encoder_device
        return self.encode_prompt_image_embedding(job.caption, images, device)[0][0].cpu()

    def through_cache(self, job: Job, *devices: Any) -> torch.Tensor:
        """Read an entry, or encode and write it."""
        if not self.use_cache:
            return self.encode(job, *devices)
        self.find_encoders()
        with contextlib.suppress(UserError):  # missing or damaged: encode it
            return self.data.read(job)
        tensors = {job.kind: self.encode(job, *devices)}
        utils.save_tensors(utils.entry_path(self.cache_dir, job.key(self.data.encoders)), tensors)
        return self.data.read(job)

    def examples_of(self, batch: dict[str, Any]) -> list[Example]:
        """Return the Examples of lists "image", "control", "prompt"; pictures: PIL or HWC uint8."""
        found = []
        rows = zip(batch["image"], batch["control"], batch["prompt"], strict=True)
        for image, control, prompt in rows:
            target = whole_picture(image)
            size = pick_size(math.prod(target.size), target.aspect)
            several = control if isinstance(control, list | tuple) else [control]
            example = edit_example(self, [whole_picture(one) for one in several], prompt, size)
            example.pictures["pixel"] = (target._replace(size=size),)
            found.append(example)
        return found

    def cache_step(self, batch: Any, vae_device: Any = None, text_device: Any = None) -> list[Any]:
        """Encode a batch of pictures and prompts into the cache; return the tensors per sample."""
        items = []
        for example in self.examples_of(batch):
            jobs, item = jobs_of(example), {}
            jobs["empty_prompt_embed"] = jobs_of(example._replace(caption=""))["prompt_embed"]
            for name, parts in jobs.items():
                tensors: Any = [self.through_cache(job, vae_device, text_device) for job in parts]
                item[name] = tensors if name == "control_latent" else tensors[0]
                if name.endswith("embed"):
                    item[f"{name}s_mask"] = torch.ones(len(tensors[0])).long()
            items.append(item)
        return items

    def cache_jobs(self, renewed: bool = False) -> dict[str, Job]:
        """Return {key: what to encode} of all that can be asked for; renewed: by recreate_cache."""
        further = [*itertools.chain(*self.config.loss.captions(self.flavour).values())]
        jobs: dict[str, Job] = {}
        for draw in self.data.possible_draws():
            if self.data.dataset(draw).recreate_cache or not renewed:
                own = jobs_of(self.data.resolve(draw))
                wanted = [own["prompt_embed"][0]._replace(caption=text) for text in further]
                wanted += itertools.chain(*own.values())
                jobs |= {job.key(self.data.encoders): job for job in wanted}
        for example, _ in [] if renewed else validation_edits(self):
            wanted = prompt_jobs(example, self.config.validation, self.flavour)
            wanted += jobs_of(example)["control_latent"]
            jobs |= {job.key(self.data.encoders): job for job in wanted}
        return jobs

    def cache_embeddings(self, train_dataloader: Iterable[dict[str, Any]] | None = None) -> int:
        """Encode what is missing, or a loader's batches; return how many entries (or samples)."""
        self.setup_accelerator()
        if train_dataloader is None:
            self.find_data()
            return fill_cache(self, self.cache_jobs(), self.cache_jobs(renewed=True))
        count = sum(len(self.cache_step(batch)) for batch in train_dataloader)
        self.unload("vae", "text_encoder")
        return count

    def quantize_model(self, model: Any, device: Any = None) -> Any:
        """Quantise the blocks of a loaded transformer in place (no_change: to fp8), on `device`."""
        if getattr(model, "peft_config", None) or hasattr(model, "block_swap"):
            raise UserError("quantise before that: set trainer.quantize before loading")
        precision = "fp8-quanto" if self.precision == "no_change" else self.precision
        for block in utils.progress(model.transformer_blocks, f"quantize to {precision}"):
            quantize_block(block.to(device) if device else block, precision)
        model.is_loaded_in_4bit = precision == "nf4-bnb"
        return model

    def set_lora(self) -> None:
        """Put the transformer on the training device and add the adapter to it."""
        self.setup_accelerator()
        self.transformer = self.bare_transformer()  # a second fit() finds it wrapped
        self.place_transformer(self.device)
        self.load_model(["scheduler"])
        if getattr(self.transformer, "peft_config", None):
            return
        add_lora(self.transformer, self.config.model.lora, self.config.seed)
        start_from_lora(self.transformer, self.config.model.lora)
        if fixed := self.config.validation.fixed_lora:
            load = utils.load_tool("fixed_lora").load
            self.fixed_scale = load(self.transformer, self.flavour.pipeline_class, fixed)
            place_adapter(self.transformer)
            use_adapters(self)
        self.transformer.train()
        if self.config.train.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        if self.config.train.compile == "blocks":
            self.transformer.compile_repeated_blocks()
        # every process has read the frozen weights itself: DDP need not send them
        frozen = [name for name, p in self.transformer.named_parameters() if not p.requires_grad]
        frozen += [name for name, _ in self.transformer.named_buffers()]
        ddp = torch.nn.parallel.DistributedDataParallel
        ddp._set_params_and_buffers_to_ignore_for_model(self.transformer, frozen)
        count = sum(parameter.numel() for parameter in self.trainable())
        log.info("LoRA: %.2f million parameters, fp32", count / 1e6)

    def parameter_groups(self) -> list[Any]:
        """Return what the optimizer gets: the trained parameters, or two groups for LoRA+."""
        groups: list[Any] = [{"params": []}, {"params": []}]
        for name, parameter in self.transformer.named_parameters():
            if parameter.requires_grad:
                groups[".lora_B." in name]["params"].append(parameter)
        ratio = self.config.model.lora.lora_plus_ratio
        groups[1]["lr"] = ratio * float(self.config.optimizer.init_args.get("lr") or 1e-4)  # type: ignore[arg-type]
        return self.trainable() if ratio == 1 else groups

    def trainable(self) -> list[torch.nn.Parameter]:
        """Return the parameters that are trained."""
        return [p for p in self.transformer.parameters() if p.requires_grad]

    def save_lora(self, path: str | Path) -> Path:
        """Write the adapter to a .safetensors file, or into a folder under its usual name."""
        path = Path(path)
        file = path if path.suffix == ".safetensors" else path / LORA_FILE
        save_lora_file(file, self.bare_transformer(), about_lora(self))
        return file

    def load_lora(self, path: str | Path) -> None:
        """Load a LoRA file (or folder) for inference, at the strength it was trained with."""
        import diffusers

        file = Path(path) if Path(path).is_file() else Path(path) / LORA_FILE
        if not file.is_file():
            raise UserError(f"no LoRA file {file}")
        self.load_model(["transformer"])
        read = getattr(diffusers, self.flavour.pipeline_class).lora_state_dict
        tensors, about = read(str(file), use_safetensors=True, return_lora_metadata=True)
        if getattr(self.transformer, "peft_config", None):
            self.transformer.delete_adapters("default")
        # unlike the pipeline's load_lora_weights it takes LoKr files as well
        self.transformer.load_lora_adapter(tensors, metadata=about, adapter_name="default")
        place_adapter(self.transformer)

    def merge_lora(self) -> None:
        """Add the adapter's change to the base weights, for any method, and drop the adapter."""
        transformer = self.bare_transformer()
        if any(type(m).__name__ in ("QLinear", "Linear4bit") for m in transformer.modules()):
            raise UserError("a quantised base cannot take the LoRA up; merge into the bf16 model")
        if hasattr(transformer, "block_swap"):  # its weights are on the CPU, the adapter is not
            for number in transformer.block_swap.numbers:
                transformer.transformer_blocks[number].to("cpu")
        transformer.fuse_lora()
        transformer.unload_lora()

    def setup_predict(self) -> None:
        """Load everything onto predict.devices; takes the LoRA just trained, or the config's."""
        devices, start = self.config.predict.devices, self.config.model.lora.pretrained_weight
        self.transformer = self.bare_transformer()
        self.place_transformer(devices.transformer or self.device)
        self.load_model()
        if start and not getattr(self.transformer, "peft_config", None):
            self.load_lora(start)
        self.vae.to(devices.vae or self.device)
        self.qwen_vl.to(devices.text_encoder or self.device)
        self.transformer.eval()

    def predict(
        self,
        prompt_image: Any,
        prompt: str,
        negative_prompt: str | None = "",
        num_inference_steps: int = 20,
        true_cfg_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
    ) -> np.ndarray:
        """Edit a picture (or a list) to (H, W, 3; 2.1: 4) uint8; setup_predict() comes first.

        prompt_image: HWC uint8 or PIL; height, width: px, down to a multiple of 16 (default: 1 MP,
        or the training size if references are as large as the target); negative_prompt: None is no
        guidance. The pixels are those of the diffusers pipeline for the same seed (CPU generator).
        """
        if self.transformer is None or self.vae is None or self.qwen_vl is None:
            raise UserError("call setup_predict() first")
        images = prompt_image if isinstance(prompt_image, list | tuple) else [prompt_image]
        pictures = [whole_picture(image) for image in images]
        example = edit_example(self, pictures, prompt, (width, height))
        how = SamplingConfig(
            seed=seed,
            num_inference_steps=num_inference_steps,
            true_cfg_scale=true_cfg_scale and max(1.0, true_cfg_scale),
            negative_prompt=negative_prompt,
        )
        places = {"vae": self.vae.device, "text_encoder": self.qwen_vl.device}
        return np.asarray(draw_edit(self, example, how, functools.partial(self.encode, **places)))

    def configure_optimizers(self) -> None:
        """Make optimizer, learning rate schedule (counts optimizer steps) and moving average."""
        config = self.config
        cuda = self.device.type == "cuda"
        self.optimizer = make_optimizer(config.optimizer, self.parameter_groups(), cuda)
        # KEEP: accelerate must not wrap it, or it would go as many steps as there are processes
        steps = self.total_steps()
        self.lr_scheduler = make_schedule(config.lr_scheduler, self.optimizer, steps)
        if config.train.use_ema:
            self.ema = MovingAverage(self.trainable(), config.train.ema_decay)

    def training_step(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return the mean loss of a batch: of cached tensors, or of pictures and prompts."""
        if "sigma" not in batch:  # a loader of the user's: noise levels are drawn here
            chance, loss, rows = self._loader_chance("sigma"), self.config.loss, batch_size(batch)
            levels = [(level,) * (level > 0) for level in range(loss.noise_levels_per_sample)]
            sigmas = [[sample_sigma(loss, *chance, i, *n) for i in range(rows)] for n in levels]
            batch = {**batch, "sigma": torch.tensor(sigmas).squeeze(0)}
        if "prompt_embed" in batch and "pixel_latent" in batch and "control_latent" in batch:
            return self._training_step_cached(batch)
        return self._training_step_compute(batch)

    def _loader_chance(self, purpose: str) -> tuple[object, ...]:
        rank = self.accelerator.process_index
        return self.config.seed, "loader", purpose, rank, self.global_step, self.drawn

    def _training_step_cached(self, batch: dict[str, Any]) -> torch.Tensor:
        if "noise" not in batch:  # before the batch goes to the device, all of it together
            levels = batch["sigma"].shape[:-1]  # () or (k,)
            shape = (*levels, *batch["pixel_latent"].shape)
            noise = normal(shape, *self._loader_chance("noise"))
            batch, self.drawn = {**batch, "noise": noise}, self.drawn + 1
        batch = self.to_device(batch)
        if not isinstance(batch["control_latent"], list):
            batch["control_latent"] = [batch["control_latent"]]
        batch["prompt_embed"] = embeds = batch["prompt_embed"].to(self.weight_dtype)
        if "zeroed" in batch:  # caption_dropout_mode: zero
            batch["prompt_embed"] = embeds.masked_fill(batch["zeroed"].view(-1, 1, 1), 0)
        if lacks := [n for n in self.config.loss.captions(self.flavour) if n not in batch]:
            text = "give them as encoded() does, or set loss.guidance: 1 and loss.preserve: 0"
            raise UserError(f"the data loader's batches have no {', '.join(lacks)}: {text}")
        loss = self._compute_loss(batch)
        return (loss * batch["loss_weight"] if "loss_weight" in batch else loss).mean()

    def _training_step_compute(self, batch: dict[str, Any]) -> torch.Tensor:
        examples, others = batch.get("examples") or self.examples_of(batch), batch.get("others")
        return self._training_step_cached(batch | encoded(examples, self.encode, others))

    def _compute_loss(self, batch: dict[str, Any]) -> torch.Tensor:
        return compute_loss(self, batch)  # (B,)

    def to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Send the tensors of a batch to the training device, without waiting for it."""
        from accelerate.utils import send_to_device

        pictures = ("examples", "others", "image", "control")
        tensors = {name: value for name, value in batch.items() if name not in pictures}
        return send_to_device(tensors, self.device, non_blocking=True)

    def share(self, count: int) -> range:
        """Return which of `count` tasks are this process': all, if sharded weights need all."""
        if self.sharded:
            return range(count)
        return range(self.accelerator.process_index, count, self.accelerator.num_processes)

    def step_plan(self, first_step: int = 0) -> StepPlan:
        """Return which samples meet in which step, for this process."""
        return StepPlan(self.data, self.accelerator, first_step)

    def total_steps(self) -> int:
        """Return the optimizer steps of the whole run."""
        return self.step_plan().steps if self.data.samples else self.config.train.max_train_steps

    def epoch(self) -> int:
        """Return the number of passes over the data that are done."""
        each = self.step_plan().steps_per_epoch if self.data.samples else math.inf
        return int(self.global_step // each)

    def train_dataloader(self, first_step: int = 0) -> Any:
        """Return the loader fit() uses: a list of micro-batches per optimizer step."""
        self.setup_accelerator()
        self.find_data()
        workers = self.config.data.num_workers
        return torch.utils.data.DataLoader(
            self.data,
            sampler=self.step_plan(first_step),  # type: ignore[arg-type]
            batch_size=None,
            num_workers=workers,
            collate_fn=list,
            pin_memory=self.use_cache and self.device.type == "cuda",
            prefetch_factor=4 if workers else None,
        )

    def preflight(self) -> None:
        """Check what needs the libraries, but no weights. Raises UserError with every problem."""
        from accelerate import init_empty_weights

        config, name = self.config, self.config.model.pretrained_model_name_or_path
        problems = check_model(config, self.precision)
        try:
            empty = empty_transformer(utils.read_model_json(name, "transformer/config.json"))
            with init_empty_weights():
                add_lora(empty, config.model.lora, config.seed)
            start_from_lora(empty, config.model.lora)
            if fixed := config.validation.fixed_lora:
                utils.load_tool("fixed_lora").load(empty, self.flavour.pipeline_class, fixed)
            optimizer = make_optimizer(config.optimizer, [torch.nn.Parameter(torch.zeros(2, 2))])
            if hasattr(optimizer, "eval") and config.train.use_ema:
                text = f"{config.optimizer.class_path} averages by itself; leave one of the two out"
                problems.append(f"train.use_ema: {text}")
        except UserError as error:
            problems.append(str(error))
        if problems:
            raise UserError(f"{len(problems)} problem(s)\n{listed(problems)}")

    def fit(self, train_dataloader: Iterable[Any] | None = None) -> None:
        """Do the whole run: audit, cache, load, train, save.

        train_dataloader: in place of the config's data sets; yields batches for training_step(), or
        lists of them (the micro-batches of one step), and decides about caption dropout.
        """
        self.setup_accelerator()
        config, accelerator, checkpoints = self.config, self.accelerator, self.checkpoints
        main, output_dir = accelerator.is_main_process, checkpoints.output_dir
        with checkpoints.only_run() if main else contextlib.nullcontext():
            if train_dataloader is None:
                self.find_data()
            self.preflight()
            wanted = config.train.resume_from_checkpoint if self.global_step == 0 else None
            found = checkpoints.find(wanted, trained_as(self))
            if main:
                if not found and self.global_step == 0:
                    checkpoints.set_aside(LORA_FILE, EMA_FILE)
                utils.run_record(output_dir, config, Path(__file__))
            if train_dataloader is None and self.use_cache:
                self.cache_embeddings()
            elif not self.use_cache:
                self.load_model(["vae", "text_encoder"])
            self.set_lora()
            self.configure_optimizers()
            if found:
                self._restore(*found)
            self.optimizer = accelerator.prepare(self.optimizer)
            # KEEP: DDP must wrap the transformer itself, or gradients are never averaged
            if self.sharded:  # accelerate would refuse the shards, which DDP leaves alone
                self.transformer = torch.nn.parallel.DistributedDataParallel(self.transformer)
            else:
                self.transformer = accelerator.prepare(self.transformer)
            run_log = RunLog(accelerator, output_dir, config, self.global_step)
            if train_dataloader is None:
                loader: Any = self.train_dataloader(self.global_step)
                announce(self, run_log)
            else:
                loader = again_and_again(train_dataloader)
            self.optimizer.train()
            with utils.StopSignal() as stop:
                stopped = train_loop(self, loader, run_log, stop)
            if main:
                self._save_adapters(output_dir)
                utils.from_tool("after", "tell", None, output_dir, stopped)
            self.optimizer.eval()  # what predict() and save_lora() meet is what was saved
            accelerator.wait_for_everyone()
            accelerator.end_training()
        word = "stopped" if stopped else "done"
        log.info("%s at step %d: %s", word, self.global_step, output_dir / LORA_FILE)

    @contextlib.contextmanager
    def averaged(self, ema: bool = False) -> Iterator[None]:
        """Swap in the averaged weights (EMA, or schedule-free's) for previews and saving."""
        parameters = self.trainable()
        trained = [p.detach().clone() for p in parameters]
        self.optimizer.eval()
        if ema and self.ema:
            copy_into(parameters, self.ema.averages)
        try:
            yield
        finally:
            self.optimizer.train()
            # KEEP: schedule-free's own way back is a lerp, right to rounding only
            copy_into(parameters, trained)

    def _save_adapters(self, folder: Path) -> None:
        with self.averaged():
            self.save_lora(folder)
        if self.ema:
            with self.averaged(ema=True):
                self.save_lora(folder / EMA_FILE)

    def save_checkpoint(self, epoch: int, global_step: int) -> None:
        """Write checkpoint-<step>/: LoRA files, raw adapter, optimizer, schedule."""
        from peft.utils import get_peft_model_state_dict

        if not torch.stack([p.isfinite().all() for p in self.trainable()]).all():
            text = "nothing of it was saved. Lower the learning rate"
            raise UserError(f"the weights of step {global_step} are not finite; {text}")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            adapter = get_peft_model_state_dict(self.bare_transformer())
            training = {
                # as it trains; the LoRA file has alpha folded in
                "adapter": {k: v.detach().cpu().clone() for k, v in adapter.items()},
                "optimizer": self.optimizer.state_dict(),
                "lr_scheduler": self.lr_scheduler.state_dict(),
                "ema": self.ema.averages if self.ema else None,
                "epoch": epoch,
            }
            self.checkpoints.save(global_step, trained_as(self), training, self._save_adapters)
        self.accelerator.wait_for_everyone()

    @utils.named("the checkpoint does not fit this run")
    def _restore(self, folder: Path, step: int) -> None:
        """Go on from adapter, optimizer, schedule and step of a checkpoint."""
        from peft.utils import get_peft_model_state_dict

        saved = torch.load(folder / "training_state.pt", "cpu", weights_only=True)
        adapter = get_peft_model_state_dict(self.transformer)
        if adapter.keys() != saved["adapter"].keys():
            raise ValueError(f"{folder} has other adapted layers")
        copy_into(adapter.values(), [saved["adapter"][name] for name in adapter])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.lr_scheduler.load_state_dict(saved["lr_scheduler"])
        if self.ema:
            copy_into(self.ema.averages, saved["ema"])
        self.global_step = step
        log.info("resumed from %s (step %d)", folder, step)


Trainer = QwenImageEditTrainer


def as_image(value: Any, mode: str = "RGBA") -> Image.Image:
    """Turn a PIL picture, HWC uint8 array or tensor into a picture. Raises UserError for others."""
    if not isinstance(value, Image.Image):
        array = np.asarray(value)
        if array.dtype != np.uint8 or array.ndim != 3:
            raise UserError(f"wanted a picture as (H, W, 3) uint8, got {array.shape} {array.dtype}")
        value = Image.fromarray(array)
    with utils.named("a picture in memory"):
        return utils.to_rgb(value, mode)


def again_and_again(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield pass after pass over a loader. Raises UserError when a pass yields nothing."""
    number = 1
    while number:
        number = 0
        for number, batch in enumerate(loader, 1):  # noqa: B007
            yield batch
    raise UserError("the data loader has no more batches: give one that starts again")


def batch_size(batch: dict[str, Any]) -> int:
    """Return the number of samples in a batch."""
    return len(next(batch[k] for k in ("pixel_latent", "examples", "image") if k in batch))


FREE_TO_CHANGE = (  # settings that may differ between a checkpoint and the run that continues it
    r"train\.(max_train_steps|num_epochs|checkpointing_steps|checkpoints_total_limit"
    r"|resume_from_checkpoint|gradient_checkpointing|gradient_accumulation_steps)"
    r"|data\.(batch_size|num_workers)|data\.dataset_configs\.\d+\.(train_data_dir|recreate_cache)"
    r"|model\.(devices.*|blocks_to_swap)"
)


def flat_settings(value: Any, path: str = "") -> dict[str, Any]:
    """Return {dotted path: value} of every leaf of nested mappings and lists."""
    if not isinstance(value, dict | list):
        return {path.lstrip("."): value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return {p: v for key, item in pairs for p, v in flat_settings(item, f"{path}.{key}").items()}


def trained_as(trainer: Trainer) -> dict[str, Any]:
    """Return what decides the result; a run that continues must have the same."""
    config, index = trainer.config, trainer.data.index
    sections = {"model", "data", "optimizer", "lr_scheduler", "train", "loss", "seed"}
    values = flat_settings(config.model_dump(mode="json", include=sections))
    seen = []
    for sample in trainer.data.samples:
        contents = [(v.caption, [index[f]["content"] for f in v.files()]) for v in sample.variants]
        seen.append((sample.dataset, sample.name, sample.held_out, contents))
    size = config.data.batch_size * config.train.gradient_accumulation_steps
    steady = config.lr_scheduler.scheduler_type.startswith("constant")
    return {
        **{path: value for path, value in values.items() if not re.fullmatch(FREE_TO_CHANGE, path)},
        "samples (names, captions, pictures)": cache_key("samples", seen=seen),
        "samples per step": size * trainer.accelerator.num_processes,
        "steps that the rate falls over": None if steady else trainer.total_steps(),
    }


def inference_rules(trainer: Trainer) -> dict[str, list[Any]]:
    """Return the sizes of references in training, most frequent first; inference takes that."""
    variants = [v for s in trainer.data.samples for v in s.variants if not s.held_out]
    area, seen = trainer.config.data.reference_area, trainer.flavour.vision_area
    shown = Counter(r.area or area for v in variants for r in v.references)
    vision = Counter(r.area or seen for v in variants for r in v.vision)
    areas: Any = {"reference_area": shown or {area: 1}, "vision_area": vision or {seen: 1}}
    return {k: sorted(found, key=lambda a: -found[a]) for k, found in areas.items()}


def about_lora(trainer: Trainer) -> dict[str, Any]:
    """Return what generate.py must know to sample as in training, and what the card says."""
    datasets, lora = trainer.config.data.dataset_configs, trainer.config.model.lora
    prompts = {v.caption for sample in trainer.data.samples for v in sample.variants}
    return {
        "script": Path(__file__).name,
        "base_model": trainer.config.model.pretrained_model_name_or_path,
        "flavour": trainer.flavour.name,
        "pipeline_class": trainer.flavour.pipeline_class,
        "license": trainer.flavour.licence,
        **{name: values[0] for name, values in inference_rules(trainer).items()},
        "resolution": datasets[0].resolution if datasets else None,
        "step": trainer.global_step,
        "method": lora.method,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha or lora.r,
        "prompts": sorted(prompts)[:5],
    }


def announce(trainer: Trainer, run_log: RunLog) -> None:
    """Log what is about to happen; draw the first step's pictures."""
    for name, (first, *others) in inference_rules(trainer).items():
        if others:
            log.warning("%s: inference uses %s, but %s is trained, too", name, first, others)
    data, plan = trainer.data, trainer.step_plan(trainer.global_step)
    log.info(
        f"{trainer.flavour.name} on {trainer.device}, {trainer.weight_dtype} | "
        f"{len(data.samples)} samples, {len(data.held_out)} held out | {plan.size} a step, "
        f"{plan.steps_per_epoch} steps an epoch | steps {plan.first_step}..{plan.steps}"
    )
    if plan.first_step == 0 and trainer.accelerator.is_main_process:
        draws = itertools.chain(*next(iter(plan), []))
        examples = [data.resolve(draw) for draw in itertools.islice(draws, 8)]
        heads = {"start": "from", "region": "mask", "pixel": "target"}
        shown = [kind for kind in heads if all(kind in e.pictures for e in examples)]
        rows = [[load_picture(e.pictures[kind][0]) for kind in shown] for e in examples]
        sheet = edit_sheet(examples, rows, [heads[kind] for kind in shown])
        run_log.picture("first_batch", sheet, 0)


# --- 12. config, main -----------------------------------------------------------------------------


class Config(Section):
    """train_qwen_edit.py: a LoRA for Qwen-Image-Edit or 2.1 from before/after pairs.

    --plan shows data, tokens, memory, disk and time; it loads and downloads nothing."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    logging: LoggingConfig = LoggingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lr_scheduler: LrSchedulerConfig = LrSchedulerConfig()
    train: TrainConfig = TrainConfig()
    cache: CacheConfig = CacheConfig()
    predict: PredictConfig = PredictConfig()
    validation: ValidationConfig = ValidationConfig()
    loss: LossConfig = LossConfig()
    seed: int = 0
    """Seed of order, noise, noise levels, dropout, crops and the start of the LoRA."""
    _audited: PairData | None = PrivateAttr(None)  # what audit() found, for find_data()

    def rules(self) -> dict[str, Any]:
        """Return {problem: whether it is there}."""
        swap, again = self.model.blocks_to_swap, self.train.gradient_checkpointing
        names = [ds.name for ds in self.data.dataset_configs]
        problems: dict[str, Any] = {
            f"validation.eval_dataset_id: wanted one data set '{n}'{nearest(n, names)}": True
            for n in self.validation.eval_dataset_id
            if names.count(n) != 1
        }
        text = "needs train.gradient_checkpointing, or the backward pass holds every block"
        return problems | {f"model.blocks_to_swap: {text}": swap and not again}


def main() -> None:
    """Read the config, audit, fit; with --plan only say what the run would be."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    given = [arg for arg in sys.argv[1:] if arg != "--plan"]
    if len(given) < len(sys.argv) - 1:
        print(utils.load_tool("plan").planned(sys.modules[__name__], given))
    else:
        QwenImageEditTrainer(utils.load_config(Config, given, check=audit)).fit()


if __name__ == "__main__":
    utils.run_script(main)
