"""Train a LoRA for Qwen-Image-Edit (2508, 2509, 2511) on (references, instruction) -> target.

Page: docs/train_qwen_edit.md

    accelerate launch train_qwen_edit.py --config configs/demo_qwen_edit.yaml          # CPU demo
    accelerate launch train_qwen_edit.py --config configs/x.yaml                       # one GPU
    accelerate launch --multi_gpu --num_processes 2 train_qwen_edit.py --config configs/x.yaml
    ... --train.resume_from_checkpoint latest        # go on after a stop
    ... --plan | --print_config | --help | --help loss

This is no library: copy the file, change it, run it; only utils.py must lie beside it.
`# EDIT HERE:` marks what an ablation changes, `# KEEP:` what breaks otherwise.

Shapes: B samples, T text tokens, D text width (3584), H W pixels, h w = H/8 W/8 latents (16
channels), S = (h/2)(w/2) image tokens of 64 channels each, K references. Pixels lie in [-1, 1],
latents are normalised per channel, sigma runs from 0 (picture) to 1 (noise), velocity = noise - x0.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import datetime
import functools
import gc
import importlib
import importlib.util
import inspect
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
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm.auto import tqdm

import utils
from utils import (
    RunLog,
    Section,
    UserError,
    cache_key,
    draw_key,
    listed,
    memory_gb,
    nearest,
    normal,
    progress,
    read_model_json,
    uniform,
)

# KEEP: diffusers, transformers, peft and accelerate are imported where they are used, so that a
# mistake in the config or the data is reported within seconds, before any of them is loaded.

LORA_FILE, EMA_FILE = "pytorch_lora_weights.safetensors", "pytorch_lora_weights_ema.safetensors"
SIZE_MULTIPLE = 32  # px; the pipelines round every side to it, so training does too
AREA_1MP, VISION_AREA = 1024 * 1024, 384 * 384  # px; VISION: of pictures in Edit-Plus' prompts
log = logging.getLogger("train_qwen_edit")


# --- 1. objective: what is minimised, at which noise levels ---------------------------------------


class LossConfig(Section):
    """What is minimised, and at which noise levels."""

    loss_type: str = "mse"
    """Error of the velocity: a name of LOSSES (mse, huber)."""
    huber_c: float = Field(0.1, gt=0)
    """Error above which huber counts linearly."""
    mask: Literal["none", "file", "difference"] = "none"
    """Weigh the loss by region: a mask file, or where the target differs from reference 1."""
    mask_loss: bool = False
    """Short for mask: file."""
    foreground_weight: float = Field(2.0, ge=0)
    """Weight of the loss where the mask is white; the sum is divided by all weights."""
    background_weight: float = Field(1.0, ge=0)
    """Weight of the loss where the mask is black."""
    difference_threshold: float = Field(0.1, gt=0, le=1)
    """Mean change of a channel, 0 to 1, that counts as wholly changed (mask: difference)."""
    timestep_density: Literal["logit_normal", "uniform", "mode", "sigmoid"] = "logit_normal"
    """Density of sigma before the shift (mode: that of SD3; sigmoid: of sigmoid_scale x normal)."""
    logit_mean: float = 0.0
    """Mean of logit_normal; larger means noisier."""
    logit_std: float = Field(1.0, gt=0)
    """Standard deviation of logit_normal; larger means wider."""
    mode_scale: float = 1.29
    """Scale of mode; above 0 favours the middle."""
    sigmoid_scale: float = Field(1.0, gt=0)
    """Scale of sigmoid; larger means wider."""
    timestep_shift: Literal["model"] | Annotated[float, Field(gt=0)] = "model"
    """Shift of sigma: that of inference ("model"), or s in s sigma / (1 + (s - 1) sigma)."""
    rollout_steps: int = Field(0, ge=0)
    """Scheduled sampling: Euler steps by which the model itself makes the noisy picture; 0 is off."""
    rollout_probability: float = Field(0.5, ge=0, le=1)
    """Share of the samples that are rolled out."""
    rollout_warmup_steps: int = Field(0, ge=0)
    """Steps over which the rolled-out share grows from 0."""
    rollout_span: float = Field(1 / 30, gt=0, le=1)
    """Sigma that one rollout step covers; 1/30 is a step of an inference with 30."""
    rollout_target: Literal["corrected", "plain"] = "corrected"
    """Target after a rollout: (x - x0) / sigma from where it ended (corrected) or noise - x0."""

    def rules(self) -> dict[str, Any]:
        """Return {problem: whether it is there}."""
        weights, region = self.foreground_weight + self.background_weight, self.region != "none"
        name = self.loss_type
        return {
            f"loss_type: no loss '{name}'{nearest(name, LOSSES)}": name not in LOSSES,
            "foreground_weight and background_weight are both 0": region and not weights,
        }

    @property
    def region(self) -> str:
        """Return `mask`, with `mask_loss` resolved."""
        return "file" if self.mask_loss and self.mask == "none" else self.mask


def mse(velocity: torch.Tensor, target: torch.Tensor, loss: LossConfig) -> torch.Tensor:
    """Rectified flow: (velocity - target)^2 of each element; all (B, 16, 1, h, w) fp32."""
    return (velocity - target).square()


def huber(velocity: torch.Tensor, target: torch.Tensor, loss: LossConfig) -> torch.Tensor:
    """Pseudo-Huber, 2c (sqrt(error^2 + c^2) - c): squares below c, 2c |error| above.

    Source: Khrapov et al. 2024, "Improving Diffusion Models's Data-Corruption Resistance".
    """
    error, c = velocity - target, loss.huber_c
    return 2 * c * ((error.square() + c * c).sqrt() - c)


# EDIT HERE: a loss is a function (velocity, target, settings) -> error, and its name in this tuple
LOSSES: dict[str, Callable[..., torch.Tensor]] = {f.__name__: f for f in (mse, huber)}


def compute_loss(
    trainer: QwenImageEditTrainer,
    batch: dict[str, Any],
    transformer: Any = None,
    shift: bool = True,
) -> torch.Tensor:
    """Loss per sample, (B,) fp32, of a batch as collate() makes it, with noise and sigma (B,).

    transformer: None is the one being trained, with its distributed wrapper. shift: sigma is still
    without the timestep shift.
    """
    loss, noise = trainer.config.loss, batch["noise"]
    x0, sigma = batch["pixel_latent"].float(), batch["sigma"].float()
    if shift:
        sigma = shift_sigma(sigma, trainer.shift_mu(math.prod(token_grid(x0))))
    noisy = add_noise(batch.get("start_latent", x0).float(), noise, sigma)
    target = noise - x0
    if "rollout_chance" in batch:
        noisy, target = rolled_out(trainer, batch, noisy, target, sigma)
    velocity = trainer.velocity(batch, noisy, sigma, transformer or trainer.transformer)
    error = LOSSES[loss.loss_type](velocity.float(), target, loss)
    return weighted_mean(error, region_weight(batch["region"], loss) if "region" in batch else None)


def weighted_mean(error: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Mean over all but the first axis: sum(weight error) / sum(weight)."""
    if weight is None:
        return error.flatten(1).mean(1)
    weight = weight.expand_as(error).flatten(1)
    # KEEP the minimum: a weight of 0 and an empty mask leave nothing to learn, not a NaN
    return (weight * error.flatten(1)).sum(1) / weight.sum(1).clamp(min=1e-6)


def region_weight(level: torch.Tensor, loss: LossConfig) -> torch.Tensor:
    """Weight per latent from the mask or the change of a region, (B, 1, 1, h, w) in [0, 1]."""
    level = level / loss.difference_threshold if loss.region == "difference" else level
    black = torch.full_like(level, loss.background_weight)
    return torch.lerp(black, torch.full_like(level, loss.foreground_weight), level.clamp(0, 1))


def sample_sigma(loss: LossConfig, *parts: object) -> float:  # EDIT HERE: timestep density
    """Draw a noise level in (0, 1), before the shift, that belongs to the parts.

    logit_normal and mode: Esser et al. 2024 (SD3), section 3.1; sigmoid: sigmoid(scale x normal).
    """
    if loss.timestep_density in ("uniform", "mode"):
        u = uniform(*parts)
        if loss.timestep_density == "mode":
            u = 1 - u - loss.mode_scale * (math.cos(math.pi / 2 * u) ** 2 - 1 + u)
        return min(max(u, 1e-4), 1 - 1e-4)
    mean, std = loss.logit_mean, loss.logit_std
    if loss.timestep_density == "sigmoid":
        mean, std = 0.0, loss.sigmoid_scale
    return torch.sigmoid(mean + std * normal((), *parts)).item()


def model_mu(scheduler_config: Any, tokens: int) -> float:
    """The model's own resolution shift: linear in the target tokens (pipeline: calculate_shift)."""
    get = scheduler_config.get
    least, most = get("base_image_seq_len", 256), get("max_image_seq_len", 4096)
    low, high = get("base_shift", 0.5), get("max_shift", 1.15)
    slope = (high - low) / (most - least)
    return slope * tokens + low - slope * least


def shift_sigma(sigma: torch.Tensor, mu: float) -> torch.Tensor:
    """e^mu / (e^mu + 1/sigma - 1): exponential time shift of FlowMatchEulerDiscreteScheduler."""
    return math.exp(mu) / (math.exp(mu) + 1 / sigma - 1)


def per_sample(values: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 1, 1, 1, 1), to go with latents."""
    return values.view(-1, 1, 1, 1, 1)


def add_noise(x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """(1 - sigma) x0 + sigma noise; sigma (B,)."""
    return (1 - per_sample(sigma)) * x0 + per_sample(sigma) * noise


MIN_SIGMA = 0.02  # below, (x - x0) / sigma would blow up what little is left to predict


@torch.no_grad()
def roll_out(
    predict: Callable[..., torch.Tensor],
    x0: torch.Tensor,
    noise: torch.Tensor,
    sigma: torch.Tensor,
    loss: LossConfig,
) -> torch.Tensor:
    """Scheduled sampling: what the model itself makes of x0 on its way down to sigma.

    Starts at sigma + rollout_steps x rollout_span (at most 1) with the true noise and takes Euler
    steps with predict(x, sigma (B,)). x0, noise, result (B, 16, 1, h, w) fp32.
    """
    steps = loss.rollout_steps
    start = (sigma + steps * loss.rollout_span).clamp(max=1.0)
    x = add_noise(x0, noise, start)
    for number in range(steps):
        levels = [torch.lerp(start, sigma, (number + i) / steps) for i in (0, 1)]
        x = x + per_sample(levels[1] - levels[0]) * predict(x, levels[0]).float()
    return x


def rolled_out(
    trainer: QwenImageEditTrainer,
    batch: dict[str, Any],
    noisy: torch.Tensor,
    target: torch.Tensor,
    sigma: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (noisy, target velocity) with a rollout of the samples whose chance comes up."""
    loss, share = trainer.config.loss, trainer.config.loss.rollout_probability
    if loss.rollout_warmup_steps:
        share *= min(1.0, trainer.global_step / loss.rollout_warmup_steps)
    numbers = [i for i, chance in enumerate(batch["rollout_chance"]) if chance < share]
    if not numbers:
        return noisy, target
    # KEEP: indexed with a list, every tensor would wait for the GPU
    rows = torch.tensor(numbers).to(noisy.device, non_blocking=True)
    chosen: dict[str, Any] = {k: v[rows] for k, v in batch.items() if isinstance(v, torch.Tensor)}
    chosen["control_latent"] = [control[rows] for control in batch["control_latent"]]
    transformer, x0 = trainer.bare_transformer(), chosen["pixel_latent"].float()
    rolled = roll_out(
        lambda x, level: trainer.velocity(chosen, x, level, transformer),
        *(chosen.get("start_latent", x0).float(), chosen["noise"], sigma[rows], loss),
    )
    noisy, target = noisy.clone(), target.clone()
    noisy[rows] = rolled
    if loss.rollout_target == "corrected":  # the velocity that leads straight to x0
        target[rows] = (rolled - x0) / per_sample(sigma[rows].clamp(min=MIN_SIGMA))
    return noisy, target


# --- 2. one training step, the loop ---------------------------------------------------------------


class TrainConfig(Section):
    """The loop."""

    max_train_steps: int = Field(1000, ge=1)
    """Optimizer steps after which the run stops."""
    num_epochs: int | None = Field(None, ge=1)
    """Passes over the data after which the run stops, if that is earlier."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Forward passes per optimizer step and process."""
    checkpointing_steps: int = Field(500, ge=1)
    """Steps between two checkpoints."""
    checkpoints_total_limit: int | None = Field(None, ge=1)
    """Keep only so many of the newest checkpoints (older ones go after a new one is safe)."""
    resume_from_checkpoint: str | None = None
    """"latest" (the newest valid one; from step 0 if there is none) or a checkpoint folder."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Norm that gradients are scaled down to."""
    use_ema: bool = False
    """Keep a moving average of the adapter in fp32; saved beside it, under its own name."""
    ema_decay: float = Field(0.995, ge=0, lt=1)
    """Share of the moving average that stays per step; at step n at most (1 + n) / (10 + n)."""
    ema_device: Literal["accelerator", "cpu"] = "accelerator"
    """Where the moving average lives; cpu saves GPU memory, but the loop waits at every update."""
    mixed_precision: Literal["bf16", "no"] = "bf16"
    """Of the frozen base; LoRA, loss and optimizer are fp32. (fp16 would overflow.)"""
    gradient_checkpointing: bool = True
    """Compute activations again in the backward pass: half the memory, 1.4 times the time."""


class LoggingConfig(Section):
    """Where results go."""

    output_dir: Path = Path("outputs/qwen_edit")
    """Folder of everything a run leaves (but for the cache)."""
    log_every: int = Field(10, ge=1)
    """Steps between two log lines; only then the loop waits for the GPU."""
    report_to: Literal["none", "tensorboard", "wandb", "all"] = "none"
    """Trackers beside metrics.jsonl, which is always written."""
    tracker_project_name: str = "qwen-image-edit"
    """Project name for the trackers."""


Step = tuple[list[str], dict[str, torch.Tensor]]  # names of its samples, its losses


def train_step(trainer: QwenImageEditTrainer, batches: list[dict[str, Any]]) -> Step:
    """Take one optimizer step over the micro-batches of this process."""
    if "error" in batches[0]:
        raise UserError(f"{batches[0]['error']}. Repair: cache_embeddings.py --verify")
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


def train_loop(
    trainer: QwenImageEditTrainer, loader: Iterable[Any], run_log: RunLog, stop: utils.StopSignal
) -> bool:
    """Train up to total_steps(); return whether a signal ended it early."""
    config, total = trainer.config, trainer.total_steps()
    every, validates = config.logging.log_every, config.validation.steps
    stopped, ask_every, steps = False, 1, []  # steps since the last log line
    if validates and trainer.global_step == 0:
        validate(trainer, run_log)
    bar = progress(None, "train", total=total, initial=trainer.global_step, unit="step")
    clock = time.monotonic()
    for batches in itertools.islice(loader, max(0, total - trainer.global_step)):
        steps.append(train_step(trainer, batches if isinstance(batches, list) else [batches]))
        bar.update()
        step = trainer.global_step
        stopped = stop.agreed(trainer.accelerator, step % ask_every == 0)
        last = stopped or step == total
        saving = last or step % config.train.checkpointing_steps == 0
        validating = bool(validates) and not stopped and (last or step % (validates or 1) == 0)
        if saving or validating or step % every == 0:
            log_steps(trainer, run_log, steps, clock, lr=effective_lr(trainer.optimizer))
            ask_every = stop_interval(trainer, (time.monotonic() - clock) / len(steps))
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


def stop_interval(trainer: QwenImageEditTrainer, pace: float) -> int:
    """Return after how many steps the processes compare whether one received a signal.

    About every 5 s, for a preempted machine has little time; it waits for the GPU.
    """
    # KEEP the mean over processes: else they would ask at different steps and wait forever
    mean = trainer.accelerator.reduce(torch.tensor(pace, device=trainer.device), "mean").item()
    return max(1, min(trainer.config.logging.log_every, 100, round(5 / max(mean, 1e-3))))


def log_steps(
    trainer: Any,
    run_log: RunLog,
    steps: Sequence[tuple[Sequence[str], dict[str, torch.Tensor]]],
    clock: float,
    **more: float,
) -> None:
    """Log the mean of each loss over these steps and all processes; waits for the GPU.

    steps: (names of the samples, losses) of each; clock: time.monotonic() when the first of them
    began; more: other figures.

    Raises:
        UserError: a loss is not finite; the message names the samples of the first bad step.
    """
    losses = torch.stack([torch.stack([*values.values()]) for _, values in steps])
    losses = trainer.accelerator.reduce(losses, "mean").cpu()  # (steps, losses)
    step, names = trainer.global_step, list(steps[0][1])
    if len(bad := (~losses.isfinite().all(1)).nonzero()):
        first = int(bad[0])
        kept = ["the start", *(folder.name for folder in trainer.checkpoints.folders())]
        raise UserError(
            f"step {step - len(steps) + first + 1}: {', '.join(names)} = {losses[first].tolist()}; "
            f"samples of this process: {', '.join(steps[first][0]) or 'unknown'}. Nothing was "
            f"saved since {kept[-1]}; lower the learning rate or look at those files"
        )
    means = dict(zip(names, losses.mean(0).tolist(), strict=True))
    pace = (time.monotonic() - clock) / len(steps)  # the GPU is done with them
    more |= {"seconds_per_step": pace, "memory_gb": memory_gb(trainer.device)}
    run_log.values(step, means | more)
    if trainer.accelerator.is_main_process:
        figures = " ".join(f"{name} {value:.4g}" for name, value in {**means, **more}.items())
        left = datetime.timedelta(seconds=round(pace * (trainer.total_steps() - step)))
        tqdm.write(f"step {step}/{trainer.total_steps()} {figures} eta {left}")


# --- 3. adapter -----------------------------------------------------------------------------------


class LoraConfig(Section):
    """The adapter on the transformer; everything else stays frozen."""

    r: int = Field(16, ge=1)
    """Rank of the adapter. File size and memory grow linearly with it."""
    lora_alpha: float | None = Field(None, gt=0)
    """Strength of the adapter is lora_alpha / r; null means lora_alpha = r."""
    method: Literal["lora", "dora", "lokr"] = "lora"
    """dora: LoRA with learned column norms; lokr: Kronecker product of two small matrices."""
    lokr_factor: int = Field(-1, ge=-1)
    """Size of LoKr's smaller matrix; -1 is about the square root of the layer."""
    init_lora_weights: Literal["gaussian", "kaiming"] = "gaussian"
    """How the factor A starts; B starts at zero, so step 0 is the base model."""
    target_modules: list[str] | str = "attn-image"
    """Layers with an adapter: a name of TARGET_SETS, ends of names, or a regular expression."""
    exclude_blocks: str = ""
    """Blocks without an adapter: "59" or "0-10, 50-59"."""
    pretrained_weight: Path | None = None
    """LoRA file to start from (same method, r and target_modules) instead of from nothing."""

    def rules(self) -> dict[str, Any]:
        """Return {problem: whether it is there}."""
        try:
            parse_blocks(self.exclude_blocks)
            re.compile(self.target_modules if isinstance(self.target_modules, str) else "")
        except (ValueError, re.error) as error:
            return {f"exclude_blocks, target_modules: {error}": True}
        return {}


ATTN_IMAGE = ["to_q", "to_k", "to_v", "to_out.0"]
ATTN_TEXT = ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
MLP = [f"{stream}_mlp.net.{layer}" for stream in ("img", "txt") for layer in ("0.proj", "2")]
TARGET_SETS = {  # EDIT HERE: names for model.lora.target_modules
    "attn-image": ATTN_IMAGE,
    "attn-all": ATTN_IMAGE + ATTN_TEXT,
    "attn+mlp": ATTN_IMAGE + ATTN_TEXT + MLP,
    "all-linear": [*ATTN_IMAGE, *ATTN_TEXT, *MLP, "img_mod.1", "txt_mod.1"],
}


def parse_blocks(text: str) -> set[int]:
    """ "0-10, 50-59, 7" -> {0, ..., 10, 7, 50, ..., 59}; "" -> {}. Raises ValueError."""
    found: set[int] = set()
    for part in filter(None, text.replace(" ", "").split(",")):
        match = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", part)
        if not match or int(match[1]) > int(match[2] or match[1]):
            raise ValueError(f"'{part}' is no block or rising range of blocks such as 0-10")
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return found


def matches(layer: str, targets: Sequence[str] | str) -> bool:
    """Whether PEFT would take the layer: ends of names, or one regular expression."""
    if isinstance(targets, str):
        return re.fullmatch(targets, layer) is not None
    return any(f".{layer}".endswith(f".{target}") for target in targets)


def adapter_config(transformer: Any, lora: LoraConfig) -> Any:
    """PEFT's own config for model.lora. Raises UserError for a name without a layer."""
    from peft import LoKrConfig
    from peft import LoraConfig as PeftLoraConfig

    layers = [n for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)]
    named = lora.target_modules
    targets = TARGET_SETS.get(named, named) if isinstance(named, str) else list(named)
    each = [targets] if isinstance(targets, str) else [[target] for target in targets]
    wrong = [str(t) for t in each if not any(matches(n, t) for n in layers)]
    if wrong or not targets:
        short = sorted({n.split(".", 2)[2] for n in layers if n.startswith("transformer_blocks.")})
        raise UserError(
            f"model.lora.target_modules: no layer matches {', '.join(wrong) or 'an empty list'}; "
            f"there are the sets {', '.join(TARGET_SETS)} and the layers {', '.join(short)}"
        )
    # the last block's text queries and outputs: nothing reads them, so they get no gradient
    last = len(transformer.transformer_blocks) - 1
    dead = rf"{last}\.(attn\.(add_q_proj|to_add_out)|txt_mlp\..*)"
    blocks = [rf"{number}\..*" for number in sorted(parse_blocks(lora.exclude_blocks))]
    excluded = rf"transformer_blocks\.({'|'.join([dead, *blocks])})"
    if not any(matches(n, targets) and not re.fullmatch(excluded, n) for n in layers):
        raise UserError("model.lora.exclude_blocks: no layer is left to train")
    alpha: Any = lora.lora_alpha or lora.r
    # KEEP exclude_modules: DDP waits forever for parameters that never get a gradient
    common: dict[str, Any] = {"r": lora.r, "target_modules": targets, "exclude_modules": excluded}
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
    if lora.method == "dora":
        start_magnitudes(transformer)


@torch.no_grad()
def start_magnitudes(transformer: Any) -> None:
    """DoRA's column norms once more, in fp32: rounded to bf16 they would change step 0."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight

    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            weight = dequantize_module_weight(layer.get_base_layer()).float()
            magnitude: Any = layer.lora_magnitude_vector["default"]
            magnitude.weight.copy_(torch.linalg.norm(weight, dim=1))


def lora_tensors(transformer: Any) -> dict[str, torch.Tensor]:
    """Return the adapter as it trains: PEFT names, fp32."""
    from peft.utils import get_peft_model_state_dict

    return get_peft_model_state_dict(transformer)


def strengthen(tensors: dict[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
    """Multiply the adapter's change by `factor`, in lora_B or lokr_w1.

    DoRA's magnitudes stay: it is m (W + s B A) / |W + s B A|, with s only beside B.
    """
    return {
        name: tensor * factor if ".lora_B." in name or name.endswith(".lokr_w1") else tensor
        for name, tensor in tensors.items()
    }


def strength_of(transformer: Any) -> float:
    """Return alpha / r of the adapter."""
    settings = transformer.peft_config["default"]
    return (settings.alpha if settings.peft_type == "LOKR" else settings.lora_alpha) / settings.r


def save_lora_file(path: Path, transformer: Any, about: dict[str, Any]) -> None:
    """Write diffusers/PEFT names, with alpha / r folded into the weights.

    Loaders differ in where they look for alpha (metadata, `.alpha` keys, nowhere), so B is stored
    times alpha / r and the file says alpha = r: the strength is right everywhere. Exact when
    alpha / r is a power of two, else to fp32 rounding.
    """
    tensors = {n: t.detach().float().cpu().clone() for n, t in lora_tensors(transformer).items()}
    settings = transformer.peft_config["default"].to_dict()
    settings["lora_alpha" if "lora_alpha" in settings else "alpha"] = settings["r"]
    settings["target_modules"] = sorted({re.split(r"\.lo(?:ra|kr)_", name)[0] for name in tensors})
    settings["exclude_modules"] = None
    plain = str | int | float | bool | list | dict | None
    adapter = {f"transformer.{k}": v for k, v in settings.items() if isinstance(v, plain)}
    weights = strengthen(tensors, strength_of(transformer))
    weights = {f"transformer.{name}": tensor for name, tensor in weights.items()}
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(adapter, sort_keys=True),
        "image_edit_lora": json.dumps(about, sort_keys=True),
    }
    utils.save_atomic(path, lambda file: save_file(weights, file, metadata=metadata))


def start_from_lora(transformer: Any, path: Path, lora: LoraConfig) -> None:
    """Copy a LoRA file into the adapter; alpha / r is taken out of the weights again.

    Raises:
        UserError: unreadable, or of another method, rank or layers than the adapter there.
    """
    from peft.utils import set_peft_model_state_dict

    try:
        tensors = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.lora.pretrained_weight {path}: {error}") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in lora_tensors(transformer).items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if other := sorted(wanted.items() ^ found.items()):
        names = listed([f"{name} {shape}" for name, shape in other], 3)
        text = "other layers, method or rank than model.lora asks for"
        raise UserError(f"model.lora.pretrained_weight {path}: {text}\n{names}")
    if transformer.device.type != "meta":  # preflight() only compares
        set_peft_model_state_dict(transformer, strengthen(tensors, 1 / strength_of(transformer)))


Argument = Annotated[
    int | float | bool | list[float] | str | None, Field(union_mode="left_to_right")
]


class OptimizerConfig(Section):
    """The optimizer."""

    class_path: str = "torch.optim.AdamW"
    """Any importable class: bitsandbytes.optim.AdamW8bit, prodigyopt.Prodigy, ..."""
    init_args: dict[str, Argument] = {}
    """Arguments of the class; lr is 1e-4 where it is not given."""


class LrSchedulerConfig(Section):
    """Learning rate schedule of diffusers; counts optimizer steps, whatever the processes."""

    scheduler_type: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Steps from 0 to the full rate."""
    num_cycles: float = Field(0.5, gt=0)
    """Half waves / 2 (cosine), or restarts, whole (cosine_with_restarts)."""
    power: float = Field(1.0, gt=0)
    """Exponent of polynomial."""


def make_optimizer(settings: OptimizerConfig, parameters: Iterable[torch.nn.Parameter]) -> Any:
    """What the config names. Raises UserError: no such class, or arguments it does not take."""
    module, _, name = settings.class_path.rpartition(".")
    try:
        optimizer_class = getattr(importlib.import_module(module), name)
        return optimizer_class(parameters, **{"lr": 1e-4, **settings.init_args})
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        where = f"optimizer {settings.class_path} with {settings.init_args}"
        missing = f"; pip install {module.split('.')[0]}?" if isinstance(error, ImportError) else ""
        raise UserError(f"{where}: {error}{missing}") from error


def make_schedule(settings: LrSchedulerConfig, optimizer: Any, steps: int) -> Any:
    """The learning rate schedule over `steps` optimizer steps."""
    from diffusers.optimization import get_cosine_schedule_with_warmup, get_scheduler

    name, warmup = settings.scheduler_type, settings.warmup_steps
    steps = max(steps, warmup + 1)  # KEEP: polynomial divides by steps - warmup
    if name == "cosine":  # KEEP: get_scheduler() would drop num_cycles
        return get_cosine_schedule_with_warmup(optimizer, warmup, steps, settings.num_cycles)
    return get_scheduler(
        "constant_with_warmup" if name == "constant" else name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        num_cycles=max(1, round(settings.num_cycles)),
        power=settings.power,
    )


def effective_lr(optimizer: Any) -> float:
    """Return the rate a step is made with: Prodigy's is its lr times the d it has found."""
    group = optimizer.param_groups[0]
    rate = group.get("scheduled_lr", group["lr"])  # schedule-free has a warm-up of its own
    # Prodigy keeps its learned step size in `d` (and `d0`); Adafactor's `d` is a clipping threshold
    return float(rate * group["d"] if "d0" in group else rate)


class MovingAverage:
    """Exponential moving average of parameters, fp32 whatever they are trained in."""

    def __init__(self, parameters: list[torch.nn.Parameter], train: TrainConfig) -> None:
        self.parameters, self.decay = parameters, train.ema_decay
        places = ["cpu" if train.ema_device == "cpu" else p.device for p in parameters]
        pairs = zip(parameters, places, strict=True)
        self.averages = [p.detach().to(place, torch.float32, copy=True) for p, place in pairs]

    def update(self, step: int) -> None:
        """After optimizer step `step`, from 1: average += (1 - d) (weight - average).

        d = min(decay, (1 + step) / (10 + step)).
        """
        pairs = zip(self.parameters, self.averages, strict=True)
        decay = min(self.decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(self.averages, [p.detach().to(a) for p, a in pairs], None)


def copy_into(parameters: Iterable[torch.nn.Parameter], values: Iterable[torch.Tensor]) -> None:
    """Overwrite parameters, in place."""
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


# === machinery: read it when you change it ========================================================


# --- 4. pairing: files -> samples, audited before any model loads ---------------------------------


class ImageConfig(Section):
    """One role of the suffix layout."""

    suffix: str = ""
    """What a stem ends with: "_T" for a_T.png. "" takes stems that end with no other suffix."""


class TargetItem(Section):
    """The picture that is learned."""

    image: str
    """Name of the image_config that training moves towards."""
    from_image: str | None = None
    """Name of the image_config that is noised instead; the velocity is still noise - image."""
    resize: int | None = Field(None, ge=64)
    """Resolution of this target instead of the data set's."""


class ReferenceItem(Section):
    """One picture of a reference list."""

    image: str
    """Name of an image_config."""
    resize: int | None = Field(None, ge=64)
    """Side of the square of equal area, px, instead of data.reference_area."""


class ReferenceListConfig(Section):
    """The pictures shown to the text encoder together with the instruction."""

    reference_config: str
    """Name of a reference_config."""
    resize: int | None = Field(None, ge=32)
    """Side of the square of equal area, px; null is what the model's pipeline does (384)."""
    dropout: float = Field(0.0, ge=0, le=1)
    """Chance to leave a picture out, drawn per visit."""
    min_length: int = Field(1, ge=0)
    """How many pictures stay at least."""


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
    """Name of a target_config."""
    caption_config: str
    """Name of a caption_config."""
    reference_config: str | None = None
    """Name of a reference_config; null is no references for the transformer."""
    mask: str | None = None
    """Name of the image_config that is white where the loss counts more (loss.mask: file)."""
    caption_dropout: float | None = Field(None, ge=0, le=1)
    """Chance of training without the instruction; null is data.caption_dropout_rate."""
    reference_dropout: float = Field(0.0, ge=0, le=1)
    """Chance, at each reference in turn, to leave it and all later ones out of the transformer."""
    weight: float | None = Field(None, gt=0)
    """Chance of this combination (all together at most 1); those without one share the rest."""


class DatasetConfig(Section):
    """One data set: suffix layout (image_configs), folders layout (target_dir) or a table."""

    id: str = ""
    """Name of the data set, for validation.eval_dataset_id and the log; default is its folder's."""
    train_data_dir: Path = Path()
    """Folder of the data set; it is only read."""
    resolution: int = Field(1024, ge=64, multiple_of=16)
    """Side of the square whose area the targets get, px; aspect ratios are kept (buckets)."""
    repeats: int = Field(1, ge=1)
    """Visits of each sample per epoch."""
    loss_weight: float = Field(1.0, gt=0)
    """Factor of this data set's loss."""
    recreate_cache: bool = False
    """Encode again even what is in the cache."""
    holdout: list[str] = []
    """Samples kept out of training; validation uses them."""
    holdout_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of the samples kept out in addition, drawn by the seed."""
    on_missing: Literal["error", "skip"] = "error"
    """What to do with a sample that lacks a file or a caption."""
    views: int = Field(1, ge=1)
    """Cached views per sample: the whole picture, then views - 1 random crops."""
    view_scale: float = Field(1.0, gt=0, le=1)
    """Smallest side of a random crop, relative to the whole picture."""
    view_flip: bool = False
    """Mirror half of the random crops. Not for edits that know left from right."""
    conditioning_type: Literal["auto", "reference_strict", "reference_loose"] = "auto"
    """References get the target's crop (strict), their own frame whole (loose), or by aspect."""
    conditioning_multidataset_sampling: Literal["combined", "random"] = "combined"
    """All references of a sample, or one of them per visit."""
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
    """Folders layout: folders of the references, in order; same relative stem, any extension."""
    mask_dir: Path | None = None
    """Folders layout: masks of the same stem; without it a_mask.png beside target or reference."""
    caption_ext: str = Field(".txt", pattern=r"^\.[^./\\]+$")
    """Folders layout: caption files lie beside the targets (or the first references)."""
    caption: str | None = None
    """One instruction for every sample, instead of files or a column."""
    table: Path | None = None
    """CSV or JSONL of target, references (list) or reference_1, ..., prompt, mask (pair_table.py)."""

    def rules(self) -> dict[str, Any]:
        """Return {problem: whether it is there}."""
        layouts = {
            "image_configs": self.image_configs,
            "target_dir": self.target_dir,
            "table": self.table,
        }
        given = [name for name, value in layouts.items() if value]
        idle = {"caption", "caption_ext", "mask_dir", "conditioning_multidataset_sampling"}
        if self.target_dir or self.table:
            idle = {"target_configs", "reference_configs", "caption_configs", "batch_configs"}
            idle |= {"caption_ext", "mask_dir", "reference_dirs"} if self.table else set()
        idle = {
            name for name in idle if getattr(self, name) != type(self).model_fields[name].default
        }
        weights = sum(batch.weight or 0 for batch in self.batch_configs)
        crops = self.view_flip or self.view_scale < 1
        return {
            f"give one of {', '.join(layouts)}": len(given) != 1,
            f"{', '.join(sorted(idle))}: not read beside {given[:1]}; leave it out": idle,
            "reference_dirs: name at least one folder": self.target_dir and not self.reference_dirs,
            "view_flip and view_scale are about crops: set views above 1": self.views == 1
            and crops,
            "batch_configs: name one": self.image_configs and not self.batch_configs,
            "batch_configs: the weights sum to more than 1": weights > 1 + 1e-9,
        }

    @property
    def name(self) -> str:
        """Return `id`, or what the data set is read from."""
        return self.id or Path(self.table or self.train_data_dir).name or str(self.train_data_dir)


class DataConfig(Section):
    """Pairs, batches, and the size of references."""

    dataset_configs: list[DatasetConfig] = []
    """Data sets; all of them are mixed."""
    batch_size: int = Field(1, ge=1)
    """Samples per forward pass and process (of one shape: targets and references)."""
    num_workers: int = Field(2, ge=0)
    """Processes that read the cache; changes no result."""
    shuffle: bool = True
    """Visit the samples in a new order every epoch."""
    caption_dropout_rate: float = Field(0.0, ge=0, le=1)
    """Chance of training without the instruction."""
    caption_dropout_mode: Literal["empty", "zero"] = "empty"
    """The empty instruction with the same references (as guidance does), or zeros for both."""
    reference_area: Literal["1mp", "target"] | Annotated[int, Field(ge=1024)] = "1mp"
    """Area of references in the transformer: 1mp as the pipelines do, "target" as large as the
    target (2.8 times fewer operations at 512 px), or px. generate.py reads it in the LoRA file."""


class Reference(NamedTuple):
    """A picture the model sees, and how large."""

    path: Path
    area: int | None = None  # px; None: what the config or the pipeline says


class Variant(NamedTuple):
    """A sample as one batch config sees it, with one of its captions."""

    target: Path
    references: tuple[Reference, ...]  # what the transformer sees, in order
    vision: tuple[Reference, ...]  # what the text encoder sees, in order
    caption: str
    resolution: int
    start: Path | None = None  # from_image: noised instead of the target
    mask: Path | None = None
    caption_dropout: float = 0.0
    reference_dropout: float = 0.0
    vision_dropout: float = 0.0
    vision_min: int = 0
    weight: float = 1.0

    def files(self) -> list[Path]:
        """Return every picture file it uses."""
        shown = [reference.path for reference in (*self.references, *self.vision)]
        return [self.target, *shown, *(f for f in (self.start, self.mask) if f)]


# differs: a row of the data and the ways to show it
class Sample(NamedTuple):
    """One row of the data: a name and its variants."""

    name: str
    dataset: int
    held_out: bool
    variants: tuple[Variant, ...]


class Row(NamedTuple):
    """One sample as a layout finds it, before captions are read."""

    files: dict[str, Path]  # role -> file
    captions: tuple[str, ...] | None = None  # None: they are in files


Rows = tuple[dict[str, Row], list[str]]  # what a layout finds: rows by name, problems


def links(ds: DatasetConfig) -> Iterator[tuple[str, str, str]]:
    """Yield (place, kind, name) of every name by which one config of a data set means another."""
    for name, [target] in ds.target_configs.items():
        for key in ("image", "from_image"):
            yield f"target_configs.{name}.0.{key}", "image", getattr(target, key)
    for name, references in ds.reference_configs.items():
        for i, reference in enumerate(references):
            yield f"reference_configs.{name}.{i}.image", "image", reference.image
    for name, caption in ds.caption_configs.items():
        place, shown = f"caption_configs.{name}", caption.reference_list
        yield f"{place}.image", "image", caption.image
        if shown:
            yield f"{place}.reference_list.reference_config", "reference", shown.reference_config
    for i, batch in enumerate(ds.batch_configs):
        for kind in ("target", "caption", "reference"):
            yield f"batch_configs.{i}.{kind}_config", kind, getattr(batch, f"{kind}_config")
        yield f"batch_configs.{i}.mask", "image", batch.mask or ""


def check_names(ds: DatasetConfig, where: str) -> list[str]:
    """Problems of the names inside one data set: every one must point at something."""
    kinds = ("image", "target", "reference", "caption")
    tables = {kind: getattr(ds, f"{kind}_configs") for kind in kinds}
    named, problems = {place: name for place, _, name in links(ds)}, []
    for place, kind, name in links(ds):
        if name and name not in tables[kind]:
            other = next((k for k, table in tables.items() if name in table), None)
            wrong = f"is a {other}_config, no {kind}_config" if other else f"is no {kind}_config"
            # most likely meant: the references that the caption shows
            caption = named.get(place.replace("reference_config", "caption_config"))
            shown = named.get(f"caption_configs.{caption}.reference_list.reference_config")
            hint = f", did you mean '{shown}'?" if shown else nearest(name, tables[kind])
            problems.append(f"{where}.{place}: '{name}' {wrong}{hint}")
    return problems


def used_roles(ds: DatasetConfig) -> list[str]:
    """Return the image_configs that any combination uses."""
    roles, todo = set(), ["batch_configs."]
    for start in todo:
        for place, kind, name in links(ds):
            if name and place.startswith(start) and kind == "image":
                roles.add(name)
            elif name and place.startswith(start):
                todo.append(f"{kind}_configs.{name}.")
    return sorted(roles)


def role_of(stem: str, suffixes: Iterable[str]) -> str | None:
    """The longest suffix that `stem` ends with ("" only if no other fits); None if none fits."""
    fits = [s for s in suffixes if stem.endswith(s) and Path(stem).name != s]
    return max(fits, key=len) if fits else None


def one_file(files: Sequence[Path], problems: list[str]) -> Path:
    """Return the file of a stem; that there are several is a problem."""
    if len(files) > 1:
        problems.append(f"'{files[0].stem}' is ambiguous, keep one of {', '.join(map(str, files))}")
    return files[0]


def group_by_suffix(ds: DatasetConfig) -> Rows:
    """Suffix layout (a_T.png a_R.png a_T.txt); roles are the names of image_configs."""
    suffixes = {config.suffix for config in ds.image_configs.values()}
    rows: dict[str, Row] = {}
    problems: list[str] = []
    for stem, files in utils.list_images(ds.train_data_dir).items():
        suffix = role_of(stem, suffixes)
        if suffix is not None:
            row = rows.setdefault(stem[: len(stem) - len(suffix)], Row({}))
            roles = [role for role, c in ds.image_configs.items() if c.suffix == suffix]
            row.files.update(dict.fromkeys(roles, one_file(files, problems)))
    return rows, problems


def role_folders(ds: DatasetConfig) -> dict[str, Path]:
    """Folders layout: {"target" | "reference 1" | ... | "mask": folder}."""
    named: dict[str, Path | None] = {"target": ds.target_dir}
    named |= {f"reference {i}": folder for i, folder in enumerate(ds.reference_dirs, 1)}
    named["mask"] = ds.mask_dir
    return {role: ds.train_data_dir / folder for role, folder in named.items() if folder}


def group_by_folder(ds: DatasetConfig) -> Rows:
    """Folders layout; without mask_dir a_mask.png beside target or reference is the mask of a."""
    rows: dict[str, Row] = {}
    problems: list[str] = []
    for role, folder in role_folders(ds).items():
        if not folder.is_dir():
            problems.append(f"{role} folder {folder} does not exist")
            continue
        stems = utils.list_images(folder)
        for stem, files in stems.items():
            name = stem.removesuffix("_mask")
            is_mask = name != stem and not ds.mask_dir and (name in stems or name in rows)
            row = rows.setdefault(name if is_mask else stem, Row({}))
            row.files.setdefault("mask" if is_mask else role, one_file(files, problems))
    return rows, problems


def read_table(ds: DatasetConfig) -> Rows:
    """A CSV or JSONL table; relative paths count from train_data_dir or the table's folder."""
    table = Path(ds.table or "")
    table = table if table.is_file() else ds.train_data_dir / table
    rows: dict[str, Row] = {}
    problems: list[str] = []
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file) if table.suffix == ".csv" else map(json.loads, file)
            records: list[Any] = list(lines)
    except (OSError, ValueError, csv.Error) as error:
        return {}, [f"table {table}: {error}"]
    for number, record in enumerate(records, 1):
        try:
            row = table_row(record, (ds.train_data_dir, table.parent))
            name = row.files["target"].stem
            rows[f"{name}#{number}" if name in rows else name] = row
        except ValueError as error:
            problems.append(f"{table}: row {number}: {error}")
    columns = {column for record in records if isinstance(record, dict) for column in record}
    if unread := {str(c) for c in columns if not re.fullmatch(TABLE_COLUMNS, str(c))}:
        log.warning("table %s: columns not read: %s", table, ", ".join(sorted(unread)))
    return rows, problems


TABLE_COLUMNS = r"target|references|reference_\d+|prompt|mask"


def table_row(record: Any, roots: Sequence[Path]) -> Row:
    """Return the row of a record. Raises ValueError where it is none, or a file is missing."""
    if not isinstance(record, dict) or None in record:  # None: csv.DictReader
        raise ValueError("no record, or more cells than columns (quote a text with commas)")
    numbered = [column for column in record if re.fullmatch(r"reference_\d+", column)]
    numbered.sort(key=lambda column: int(column[10:]))
    listed_ones, prompts = record.get("references") or [], record.get("prompt") or []
    shown = [listed_ones] if isinstance(listed_ones, str) else [*listed_ones]
    shown += [record[column] for column in numbered if record[column]]
    if not record.get("target") or not shown:
        raise ValueError(f"no {'reference' if record.get('target') else 'target'}")
    named = {f"reference {i}": value for i, value in enumerate(shown, 1)}
    named = {"target": record["target"], "mask": record.get("mask"), **named}
    files = {}
    for role, value in named.items():
        if value:
            places = [root / str(value) for root in roots]
            files[role] = next((place for place in places if place.is_file()), places[0])
            if not files[role].is_file():
                raise ValueError(f"no file {files[role]}")
    prompts = [prompts] if isinstance(prompts, str) else prompts
    return Row(files, tuple(str(prompt).strip() for prompt in prompts))


def read_captions(path: Path, lines: bool) -> tuple[str, ...]:
    """The captions of a file: its lines, or the whole text as one.

    Raises:
        ValueError: missing, empty or not UTF-8; says which.
    """
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        raise ValueError(f"caption {path} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"caption {path} cannot be read: {error}") from error
    if not text:
        raise ValueError(f"caption {path} is empty")
    return tuple(line.strip() for line in text.splitlines() if line.strip()) if lines else (text,)


def plain_variants(config: Config, ds: DatasetConfig, row: Row) -> Iterator[Variant]:
    """Folders and tables: all references of a row, or each alone. Raises ValueError."""
    files, captions = row.files, (ds.caption,) if ds.caption else row.captions
    shown = tuple(Reference(file) for role, file in files.items() if role.startswith("reference"))
    if captions is None:
        beside = [file.with_suffix(ds.caption_ext) for file in (files["target"], shown[0].path)]
        there = next((path for path in beside if path.exists()), beside[0])
        captions = read_captions(there, ds.caption_lines is not False)
    if not captions:
        raise ValueError(f"no prompt for {files['target']}: fill its column, or set caption")
    alone = ds.conditioning_multidataset_sampling == "random"
    for references in [(one,) for one in shown] if alone else [shown]:
        for caption in captions:
            variant = Variant(files["target"], references, references, caption, ds.resolution)
            rate = config.data.caption_dropout_rate
            yield variant._replace(mask=files.get("mask"), caption_dropout=rate)


def combined_variants(config: Config, ds: DatasetConfig, row: Row) -> Iterator[Variant]:
    """Suffix layout: one variant per batch config and caption. Raises ValueError."""

    def shown_by(name: str | None) -> tuple[Reference, ...]:
        items = ds.reference_configs[name] if name else []
        return tuple(Reference(row.files[i.image], i.resize and i.resize**2) for i in items)

    for batch, weight in zip(ds.batch_configs, batch_weights(ds.batch_configs), strict=True):
        caption, [target] = (
            ds.caption_configs[batch.caption_config],
            ds.target_configs[batch.target_config],
        )
        references, shown = shown_by(batch.reference_config), caption.reference_list
        vision = shown_by(shown.reference_config) if shown else references
        area = shown.resize**2 if shown and shown.resize else None
        file = row.files[caption.image].with_suffix(caption.ext)
        lines, rate = read_captions(file, bool(ds.caption_lines)), batch.caption_dropout
        for line in lines if weight else ():
            yield Variant(
                target=row.files[target.image],
                references=references,
                vision=tuple(Reference(reference.path, area) for reference in vision),
                caption=line,
                resolution=target.resize or ds.resolution,
                start=row.files[target.from_image] if target.from_image else None,
                mask=row.files[batch.mask] if batch.mask else None,
                caption_dropout=config.data.caption_dropout_rate if rate is None else rate,
                reference_dropout=batch.reference_dropout,
                vision_dropout=shown.dropout if shown else 0.0,
                vision_min=shown.min_length if shown else 0,
                weight=weight / len(lines),
            )


def batch_weights(configs: Sequence[BatchConfig]) -> list[float]:
    """Chance of each combination: given weights, the rest shared equally; they sum to 1."""
    given = sum(config.weight or 0 for config in configs)
    without = sum(config.weight is None for config in configs)
    share = max(0.0, round((1 - given) / without, 9)) if without else 0.0
    weights = [share if config.weight is None else config.weight for config in configs]
    return [weight / sum(weights) for weight in weights]


def find_dataset(config: Config, number: int) -> tuple[list[Sample], list[str], list[str]]:
    """Samples, problems and skipped samples of one data set."""
    ds, where = config.data.dataset_configs[number], f"data.dataset_configs.{number}"
    if not ds.train_data_dir.is_dir():
        return [], [f"{where}.train_data_dir: folder {ds.train_data_dir} does not exist"], []
    if problems := check_names(ds, where):
        return [], problems, []
    group = (
        group_by_suffix if ds.image_configs else group_by_folder if ds.target_dir else read_table
    )
    make = combined_variants if ds.image_configs else plain_variants
    rows, problems = group(ds)
    problems = [f"{where}: {problem}" for problem in problems]
    needed = used_roles(ds) if ds.image_configs else [r for r in role_folders(ds) if r != "mask"]
    variants, broken = {}, []
    for name, row in sorted(rows.items()):
        lacking = [expected(ds, role, name) for role in needed if role not in row.files]
        if needed and len(lacking) == len(needed):  # only pictures that nothing uses
            if ds.target_dir and "mask" in row.files:
                broken.append(f"{where}: mask {row.files['mask']} has no target of its name")
        elif lacking:
            broken.append(f"{where}: sample '{name}' lacks its {' and '.join(lacking)}")
        else:
            try:
                variants[name] = tuple(make(config, ds, row))
            except ValueError as error:
                broken.append(f"{where}: {error}")
    held_out = choose_holdout(config, number, list(variants))
    samples = [Sample(name, number, name in held_out, v) for name, v in variants.items()]
    for name in sorted(set(ds.holdout) - set(rows)):
        problems.append(f"{where}.holdout: no sample '{name}'{nearest(name, sorted(rows))}")
    skipped = broken if ds.on_missing == "skip" else []
    problems += [] if skipped else broken
    evaluated = ds.name in config.validation.eval_dataset_id
    if not problems and not any(s.held_out == evaluated for s in samples):
        problems.append(f"{where}: no sample to train on in {ds.train_data_dir}")
    return samples, problems, skipped


def expected(ds: DatasetConfig, role: str, name: str) -> str:
    """Return a role and where its file is looked for."""
    suffixes = {role: config.suffix for role, config in ds.image_configs.items()}
    place = f"{name}{suffixes[role]}" if suffixes else f"{role_folders(ds)[role]}/{name}"
    return f"{role} ({place}.*)"


def choose_holdout(config: Config, number: int, names: Sequence[str]) -> set[str]:
    """Samples of a data set that are not trained: named, drawn by the seed, or all."""
    ds = config.data.dataset_configs[number]
    if ds.name in config.validation.eval_dataset_id:
        return set(names)
    by_chance = sorted(names, key=lambda name: uniform("holdout", config.seed, ds.name, name))
    return {*ds.holdout, *by_chance[: round(ds.holdout_ratio * len(names))]}


def all_pictures(samples: Iterable[Sample]) -> list[Path]:
    """Every picture file the samples use, once, sorted."""
    return sorted(
        {path for sample in samples for variant in sample.variants for path in variant.files()}
    )


# --- 5. audit -------------------------------------------------------------------------------------


def check_regions(config: Config, samples: Sequence[Sample], index: utils.FileIndex) -> list[str]:
    """Problems of pictures that must lie on their target's pixels, and of masks."""
    problems, region = [], config.loss.region
    masked = sum(any(variant.mask for variant in sample.variants) for sample in samples)
    if region == "file" and samples:
        problems += [] if masked else ["loss.mask: file, but no sample has a mask (docs/data.md)"]
        log.info("masks: %d of %d samples have one", masked, len(samples))
    for sample in samples:
        number, aligned = sample.dataset, {}
        ds = config.data.dataset_configs[number]
        for v in sample.variants:
            if region == "file" and v.mask:
                aligned[v.mask, v.target] = "a mask"
            if region == "difference" and v.references and not sample.held_out:
                aligned[v.references[0].path, v.target] = "loss.mask: difference"
            if ds.conditioning_type == "reference_strict":
                aligned |= {(r.path, v.target): "reference_strict" for r in v.references}
        for (path, target), why in aligned.items():
            aspects = index.aspect(path), index.aspect(target)
            if not aligns(*aspects):
                text = f"{path} has aspect {aspects[0]:.3f}, its target {aspects[1]:.3f}"
                problems.append(f"data.dataset_configs.{number}: {text}; {why} wants one frame")
    return problems


def open_index(config: Config) -> utils.FileIndex:
    """The file index of the cache; in memory when there is no cache."""
    return utils.FileIndex(config.cache.cache_dir if config.cache.use_cache else None)


def find_samples(config: Config, index: utils.FileIndex) -> tuple[list[Sample], list[str]]:
    """Pair, read captions, look at every picture -> (samples, first problems of each kind).

    Everything is in output_dir/audit.json.
    """
    numbers = range(len(config.data.dataset_configs))
    found = [find_dataset(config, number) for number in numbers]
    samples = [sample for mine, _, _ in found for sample in mine]
    skipped = [text for _, _, left_out in found for text in left_out]
    general = [] if found else ["data.dataset_configs: no data set is named"]
    if samples and all(sample.held_out for sample in samples):
        general.append("data.dataset_configs: every sample is held out, none is left to train on")
    pictures = all_pictures(samples) + validation_pictures(config)
    unreadable = index.update(pictures, utils.look_at_picture)
    groups = [*(wrong for _, wrong, _ in found), general, unreadable]
    groups += [] if unreadable else [check_regions(config, samples, index)]
    problems = [problem for group in groups for problem in group]
    report = {"samples": len(samples), "problems": problems, "skipped": skipped}
    with contextlib.suppress(OSError):  # an unwritable output_dir is reported by audit()
        path = config.logging.output_dir / "audit.json"
        utils.save_text(path, json.dumps(report, indent=2, ensure_ascii=False))
    if skipped:
        log.warning("%d sample(s) skipped (on_missing: skip)\n%s", len(skipped), listed(skipped))
    shown = []
    for group in groups:  # ten of each kind by name; a data set may lack thousands of files
        more = [f"... and {len(group) - 10} more, all of them in audit.json"]
        shown += group[:10] + (more if len(group) > 10 else [])
    return samples, shown


class Flavour(NamedTuple):
    """Which Qwen-Image-Edit a checkpoint is; read from its own files."""

    name: str  # edit-v1 (2508) | edit-v2 (2509) | edit-v3 (2511)
    pipeline_class: str
    vision_area: int | None  # px; None: the encoder sees the same picture as the VAE (2508)


PUBLISHED = {  # so that a plan and an audit need no network
    "Qwen/Qwen-Image-Edit": Flavour("edit-v1", "QwenImageEditPipeline", None),
    "Qwen/Qwen-Image-Edit-2509": Flavour("edit-v2", "QwenImageEditPlusPipeline", VISION_AREA),
    "Qwen/Qwen-Image-Edit-2511": Flavour("edit-v3", "QwenImageEditPlusPipeline", VISION_AREA),
}
PARTS = ("scheduler", "tokenizer", "processor", "text_encoder", "vae", "transformer")


def transformer_settings(name_or_path: str) -> dict[str, Any]:
    """transformer/config.json; of the published models what differs from diffusers' defaults."""
    if name_or_path in PUBLISHED:  # no network for a plan or an audit
        return {"zero_cond_t": PUBLISHED[name_or_path].name == "edit-v3"}
    return read_model_json(name_or_path, "transformer/config.json")


def detect_flavour(name_or_path: str) -> Flavour:
    """2508, 2509 or 2511, from model_index.json and transformer/config.json.

    Raises:
        UserError: no such checkpoint, or not a Qwen-Image-Edit one.
    """
    if name_or_path in PUBLISHED:
        return PUBLISHED[name_or_path]
    pipeline_class = read_model_json(name_or_path, "model_index.json").get("_class_name", "")
    if pipeline_class == "QwenImageEditPipeline":
        return Flavour("edit-v1", pipeline_class, None)
    if pipeline_class == "QwenImageEditPlusPipeline":
        conditioned = read_model_json(name_or_path, "transformer/config.json").get("zero_cond_t")
        return Flavour("edit-v3" if conditioned else "edit-v2", pipeline_class, VISION_AREA)
    raise UserError(
        f"{name_or_path} is a {pipeline_class or 'checkpoint without a class name'}; "
        "wanted QwenImageEditPipeline or QwenImageEditPlusPipeline"
    )


def check_model(config: Config, precision: str) -> list[str]:
    """Problems of the model and of its settings that need no weights; `precision` of the blocks."""
    model, lora, name = config.model, config.model.lora, config.model.pretrained_model_name_or_path
    try:
        detect_flavour(name)
        n_blocks = transformer_settings(name).get("num_layers", 60)
    except UserError as error:
        return [f"model.pretrained_model_name_or_path: {error}"]
    lacking = [part for part in PARTS if Path(name).is_dir() and not (Path(name) / part).is_dir()]
    devices = {f"model.devices.{i}": device for i, device in enumerate(model.devices)}
    problems = [problem for item in devices.items() for problem in check_device(*item)]
    kinds = {torch.device(device).type for device in model.devices} if not problems else set()
    processes, beyond = (
        int(os.environ.get("WORLD_SIZE", "1")),
        max(parse_blocks(lora.exclude_blocks), default=0),
    )
    nf4, dora = precision == "nf4-bnb", lora.method == "dora"
    # modulation is held by quanto in every quantised base, and PEFT has no DoRA for that
    quanto = precision.endswith("quanto") or (nf4 and lora.target_modules == "all-linear")
    rules = {
        f"pretrained_model_name_or_path: {name} has no {', '.join(lacking)} folder": lacking,
        "devices: wanted devices of one type": len(kinds) > 1,
        "devices: for one process; several need the whole model each": devices and processes > 1,
        f"lora.method: no dora on layers in {precision}": dora and quanto,
        "lora.method: lokr goes with every precision but nf4-bnb": nf4 and lora.method == "lokr",
        f"blocks_to_swap: the model has {n_blocks} blocks": model.blocks_to_swap > n_blocks,
        f"lora.exclude_blocks: no block {beyond}, the last is {n_blocks - 1}": beyond >= n_blocks,
    }
    problems += [f"model.{problem}" for problem, there in rules.items() if there]
    return problems + check_packages(*(["bitsandbytes"] if nf4 else []))


def check_2508(samples: Sequence[Sample]) -> list[str]:
    """Problems of data that 2508 cannot take: its prompt has a place for exactly one picture."""
    problems = []
    first = {sample.dataset: sample for sample in reversed(samples)}
    for number, sample in sorted(first.items()):
        for v in sample.variants:
            other = [r.path for r in v.vision] != [r.path for r in v.references]
            fewer = v.reference_dropout or (v.vision_dropout and v.vision_min < 1)
            resized = any(r.area for r in (*v.vision, *v.references))
            if len(v.references) != 1 or other or fewer or resized:
                problems.append(
                    f"data.dataset_configs.{number}: 2508 takes one reference and shows its "
                    "encoder the picture that the VAE gets: no resize of it, no dropout, no other"
                )
                break
    return problems


def check_validation(config: Config, samples: Sequence[Sample], is_2508: bool) -> list[str]:
    """Problems of the validation settings (their pictures: find_samples)."""
    wanted, names = config.validation, [ds.name for ds in config.data.dataset_configs]
    problems = [
        f"validation.eval_dataset_id: {names.count(name)} data sets are '{name}', one is wanted"
        f"{nearest(name, names)}"
        for name in wanted.eval_dataset_id
        if names.count(name) != 1
    ]
    something = wanted.samples or any(sample.held_out for sample in samples)
    if wanted.steps and samples and not something:
        problems.append(
            "validation.steps is set, but no data set names samples in holdout (or holdout_ratio, "
            "or eval_dataset_id), and validation.samples is empty"
        )
    several = (i for i, sample in enumerate(wanted.samples) if is_2508 and len(sample.images) > 1)
    return problems + [f"validation.samples.{i}.images: 2508 takes one reference" for i in several]


# differs: each script audits its own config
def audit(config: Config) -> list[str]:
    """Return everything that can be known to be wrong before a model loads, one line each."""
    model, cache = config.model, config.cache
    problems = check_model(config, model.precision)
    devices = {f"predict.devices.{part}": device for part, device in config.predict.devices}
    places = {"logging.output_dir": config.logging.output_dir}
    if cache.use_cache:
        devices["cache.vae_encoder_device"] = cache.vae_encoder_device
        devices["cache.text_encoder_device"] = cache.text_encoder_device
        places["cache.cache_dir"] = cache.cache_dir
    problems += [problem for item in devices.items() for problem in check_device(*item)]
    problems += [problem for item in places.items() for problem in utils.check_writable(*item)]
    if model.lora.pretrained_weight and not model.lora.pretrained_weight.is_file():
        problems.append(f"model.lora.pretrained_weight: no file {model.lora.pretrained_weight}")
    trackers = {"none": [], "all": []}.get(config.logging.report_to, [config.logging.report_to])
    samples, wrong = find_samples(config, open_index(config))
    is_2508 = (
        detect_flavour(model.pretrained_model_name_or_path)[2] is None if not problems else False
    )
    problems += check_packages(*trackers) + wrong + (check_2508(samples) if is_2508 else [])
    return problems + check_validation(config, samples, is_2508)


# --- 6. geometry, encoding and cache --------------------------------------------------------------


class CacheConfig(Section):
    """Latents and embeddings are computed once, on these devices, before the transformer loads."""

    use_cache: bool = True
    """Keep what is encoded on disk; false encodes in every step, with both encoders in memory."""
    cache_dir: Path = Path("cache")
    """Folder of the cache; runs may share it, entries are named by their content."""
    memory_mb: int = Field(512, ge=0)
    """Entries that each reading process keeps in memory, so that small data sets are read once."""
    vae_encoder_device: str | None = None
    """Device of the VAE, e.g. cuda:1; null is the training device."""
    text_encoder_device: str | None = None
    """Device of the text encoder, e.g. cuda:2; null is the training device."""


Box = tuple[float, float, float, float]  # left, top, right, bottom, relative to a picture


class Picture(NamedTuple):
    """One picture as the model gets it: where it comes from and the transform."""

    source: Path | Image.Image
    content: str  # hash of the file, or of the pixels of a picture in memory
    size: tuple[int, int]  # (W, H) px after the transform
    box: Box = (0.0, 0.0, 1.0, 1.0)
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
    references: int | None = None  # so many stay, from the first on; None: all
    vision: tuple[int, ...] | None = None  # which vision references stay; None: all
    dropped: bool = False  # train without the instruction


class Example(NamedTuple):
    """What a Draw resolves to: pictures by kind.

    pixel (the target), control (references), start (what is noised instead of the target), region
    (a mask, or the two pictures whose difference it is), vision (for the text encoder). Every kind
    but the last two goes through the VAE and comes into the batch as <kind>_latent.
    """

    name: str
    caption: str
    pictures: dict[str, tuple[Picture, ...]]


class Job(NamedTuple):
    """One entry of the cache: what is encoded."""

    kind: str  # latent | prompt | region
    pictures: tuple[Picture, ...]
    caption: str = ""


def jobs_of(example: Example) -> dict[str, list[Job]]:
    """Return the entries of an example by their names in a batch."""
    pictures = dict(example.pictures)
    jobs = {"prompt_embed": [Job("prompt", pictures.pop("vision"), example.caption)]}
    if region := pictures.pop("region", None):
        jobs["region"] = [Job("region", region)]
    latents = {kind: [Job("latent", (one,)) for one in each] for kind, each in pictures.items()}
    return jobs | {f"{kind}_latent": each for kind, each in latents.items()}


def pick_size(area_px: float, aspect: float) -> tuple[int, int]:
    """(W, H) of that area and aspect, rounded to 32 px as diffusers' pipelines round."""
    width = math.sqrt(area_px * aspect)
    sides = (round(side / SIZE_MULTIPLE) * SIZE_MULTIPLE for side in (width, width / aspect))
    width_px, height_px = (max(side, SIZE_MULTIPLE) for side in sides)
    return width_px, height_px


@functools.lru_cache
def buckets(resolution: int) -> list[tuple[int, int]]:  # EDIT HERE: bucketing
    """Target sizes (W, H) with about resolution^2 pixels and aspects from 1:3 to 3:1."""
    widths = range(SIZE_MULTIPLE, 2 * resolution + 1, SIZE_MULTIPLE)
    sizes = [(w, round(resolution**2 / w / SIZE_MULTIPLE) * SIZE_MULTIPLE) for w in widths]
    return [(w, h) for w, h in sizes if h and 1 / 3 <= w / h <= 3]


@functools.lru_cache(maxsize=4096)
def nearest_bucket(width: int, height: int, resolution: int) -> tuple[int, int]:
    """The bucket of nearest log aspect; among equals the one of nearest area."""
    aspect, area = math.log(width / height), resolution**2

    def distance(size: tuple[int, int]) -> tuple[float, float]:
        w, h = size
        return round(abs(aspect - math.log(w / h)), 9), abs(math.log(w * h / area))

    return min(buckets(resolution), key=distance)


def cover_box(
    aspect: float, wanted: float, scale: float = 1.0, x: float = 0.5, y: float = 0.5
) -> tuple[float, float, float, float]:
    """Crop of aspect `wanted` from a picture of `aspect`, `scale` of the largest one, at x, y.

    Returns (left, top, right, bottom) relative to the picture, 0..1.
    """
    width, height = min(1.0, wanted / aspect) * scale, min(1.0, aspect / wanted) * scale
    left, top = x * (1 - width), y * (1 - height)
    return tuple(round(v, 6) for v in (left, top, left + width, top + height))  # type: ignore


def reference_area_px(area: str | int, size: tuple[int, int]) -> float:
    """data.reference_area in pixels, for a target of `size`."""
    return float({"1mp": AREA_1MP, "target": size[0] * size[1]}.get(str(area), area))


def aligns(aspect: float, other: float) -> bool:
    """Return whether pictures of these aspects are taken as showing the same frame."""
    return abs(math.log(aspect / other)) < 0.02


class Frame(NamedTuple):
    """The ONE geometric transform of a visit: crop and flip of the target's frame."""

    aspect: float  # of the whole target picture
    size: tuple[int, int]  # (W, H) px of the target
    box: Box | None = None  # None: the middle
    flip: bool = False

    def on_target(self, whole: Picture) -> tuple[Picture]:
        """Return a picture at the target's size: with its crop, or the middle of another frame."""
        same = aligns(whole.aspect, self.aspect)
        box = (
            self.box if same and self.box else cover_box(whole.aspect, self.size[0] / self.size[1])
        )
        return (whole._replace(size=self.size, box=box, flip=self.flip and same),)

    def show(self, whole: Picture, area_px: float, strict: bool = True) -> Picture:
        """Return a reference of about that area: with the target's crop, or its own frame whole."""
        # KEEP: aligned references get the target's crop, or the edit no longer lies on its pixels
        if strict and aligns(whole.aspect, self.aspect):
            [picture] = self.on_target(whole)
            return picture._replace(size=pick_size(area_px, self.size[0] / self.size[1]))
        return whole._replace(size=pick_size(area_px, whole.aspect))


def whole_picture(source: Path | Image.Image, index: utils.FileIndex) -> Picture:
    """Return a picture as it is: of a file that the index knows, or in memory."""
    if isinstance(source, Image.Image):
        content = f"{draw_key(source.size, source.tobytes()):016x}"
        return Picture(source, content, source.size)
    facts = index[source]
    return Picture(source, facts["content"], (facts["width"], facts["height"]))


def resolve(
    config: Config, flavour: Flavour, samples: Sequence[Sample], draw: Draw, index: utils.FileIndex
) -> Example:
    """Draw -> pictures with ONE geometric transform for the target and all that lies on it."""
    sample = samples[draw.sample]
    variant, ds = sample.variants[draw.variant], config.data.dataset_configs[sample.dataset]
    whole = functools.partial(whole_picture, index=index)
    target = whole(variant.target)
    size = nearest_bucket(*target.size, variant.resolution)
    wanted = size[0] / size[1]
    frame = Frame(target.aspect, size, cover_box(target.aspect, wanted))
    if draw.view:  # EDIT HERE: augmentation (each view is cached); view 0 is the whole picture
        chance = ("view", config.seed, sample.dataset, sample.name, draw.view)
        scale = 1 - (1 - ds.view_scale) * uniform("scale", *chance)
        place = uniform("x", *chance), uniform("y", *chance)
        flip = ds.view_flip and uniform("flip", *chance) < 0.5
        frame = frame._replace(box=cover_box(target.aspect, wanted, scale, *place), flip=flip)

    def show(references: Iterable[Reference], area_px: float) -> tuple[Picture, ...]:
        strict = ds.conditioning_type != "reference_loose"
        return tuple(frame.show(whole(r.path), r.area or area_px, strict) for r in references)

    area_px = reference_area_px(config.data.reference_area, size)
    stay = range(len(variant.vision)) if draw.vision is None else draw.vision
    pictures = {
        "pixel": frame.on_target(target),
        "control": show(variant.references[: draw.references], area_px),
        "vision": show([variant.vision[i] for i in stay], flavour.vision_area or area_px),
    }
    if variant.start:
        pictures["start"] = frame.on_target(whole(variant.start))
    if config.loss.region == "file" and variant.mask:
        pictures["region"] = frame.on_target(whole(variant.mask))
    elif config.loss.region == "difference" and variant.references:
        before = frame.on_target(whole(variant.references[0].path))
        pictures["region"] = (*before, *pictures["pixel"])
    empty = draw.dropped and config.data.caption_dropout_mode == "empty"
    return Example(sample.name, "" if empty else variant.caption, pictures)


def load_picture(picture: Picture) -> Image.Image:
    """Open, crop at whole pixels, resize (Lanczos, as the pipelines do) -> RGB of picture.size."""
    source, (left, top, right, bottom) = picture.source, picture.box
    image = source if isinstance(source, Image.Image) else utils.open_rgb(source)
    w, h = image.size
    box = (round(left * w), round(top * h), round(right * w), round(bottom * h))
    image = image.crop(box).resize(picture.size, Image.Resampling.LANCZOS)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if picture.flip else image


def to_pixels(image: Image.Image) -> torch.Tensor:
    """RGB -> (1, 3, H, W) fp32 in [-1, 1]."""
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = data.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255.0
    return (2.0 * pixels - 1.0)[None]


def to_image(pixels: torch.Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> RGB."""
    data = (pixels * 0.5 + 0.5).clamp(0, 1).float() * 255
    return Image.fromarray(data.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def region_map(pictures: Sequence[Picture]) -> torch.Tensor:
    """Mask, or two pictures -> (1, h, w) fp32 in [0, 1] per latent: its mean, or mean |change|."""
    images = [np.asarray(load_picture(picture), np.float32) / 255 for picture in pictures]
    level: Any = images[0] if len(images) == 1 else np.abs(images[1] - images[0])
    height, width = level.shape[:2]
    level = torch.from_numpy(level.mean(-1)).view(1, height // 8, 8, width // 8, 8)
    return level.mean((2, 4))


def encode_stills_in_2d(vae: torch.nn.Module) -> torch.nn.Module:
    """Let the video VAE treat one frame with 2-D convolutions: 2.4 times faster on a CPU.

    A causal 3-D convolution pads a single frame with zeros in front, so only the last temporal
    slice of its kernel sees data. Same result to 1e-5.
    """

    def bind(conv: torch.nn.Conv3d) -> None:
        whole = conv.forward
        side = conv.kernel_size[-1] // 2

        def forward(x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
            if x.shape[2] != 1 or cache_x is not None:
                return whole(x, cache_x)  # type: ignore[call-arg]
            y = F.conv2d(x[:, :, 0], conv.weight[:, :, -1], conv.bias, padding=side)
            return y.unsqueeze(2)

        conv.forward = forward  # type: ignore

    for module in vae.modules():
        if type(module).__name__ == "QwenImageCausalConv3d" and set(module.stride) == {1}:  # type: ignore
            bind(module)  # type: ignore[arg-type]
    return vae


def vae_statistics(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-channel mean and std of the latents, (1, C, 1, 1, 1) each."""
    values = (vae.config.latents_mean, vae.config.latents_std)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1).to(like) for v in values)
    return mean, std


@torch.no_grad()
def encode_image_qwen(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1] -> normalised posterior mode (B, 16, 1, h, w)."""
    pixels = pixels.to(vae.device, vae.dtype).unsqueeze(2)  # (B, 3, 1, H, W)
    latents = vae.encode(pixels).latent_dist.mode()
    mean, std = vae_statistics(vae, latents)
    return (latents - mean) / std


@torch.no_grad()
def decode_latents_qwen(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Normalised (B, 16, 1, h, w) -> pixels (B, 3, H, W), about [-1, 1]."""
    latents = latents.to(vae.device, vae.dtype)
    mean, std = vae_statistics(vae, latents)
    # KEEP: divided by 1/std as the pipeline does; times std differs in the last bit
    return vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0][:, :, 0]


@torch.no_grad()
def encode_prompt_qwen(
    pipe: Any, caption: str, images: Sequence[Image.Image], device: torch.device
) -> torch.Tensor:
    """Instruction and pictures -> embedding (T, D), through the pipeline's own template."""
    # 2508's template has one picture slot; the Plus template numbers a list
    single = type(pipe).__name__ == "QwenImageEditPipeline"
    shown = (images[0] if single else list(images)) if images else None
    embeds, _ = pipe.encode_prompt(prompt=caption, image=shown, device=device)
    return embeds[0]  # (T, D); one prompt has no padding


def load_processor(folder: Path) -> Any:
    """Qwen2VLProcessor; without torchvision one that handles stills only (all we need)."""
    from transformers import ProcessorMixin, Qwen2VLProcessor

    if importlib.util.find_spec("torchvision"):
        return Qwen2VLProcessor.from_pretrained(folder)

    class ImageOnlyQwen2VLProcessor(Qwen2VLProcessor):
        def __init__(
            self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
        ) -> None:
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    return ImageOnlyQwen2VLProcessor.from_pretrained(folder)


def template_text(pipeline_class: str) -> str:
    """The lines of the pipeline's source that hold its prompt template, without importing it."""
    spec = importlib.util.find_spec("diffusers")
    assert spec and spec.origin, "diffusers is in requirements.txt"
    name = "pipeline_qwenimage_edit" + ("_plus" if "Plus" in pipeline_class else "")
    file = Path(spec.origin).parent / "pipelines" / "qwenimage" / f"{name}.py"
    return "".join(line for line in file.open(encoding="utf-8") if "prompt_template" in line)


def fingerprint(folders: Sequence[Path], *extra: str) -> str:
    """Hash of a model's part: files whole, large ones by size and 64 KB of every 4 MB.

    KEEP every 4 MB: a LoRA merged into some layers leaves the other layers and the header alone.
    """
    parts: list[Any] = list(extra)
    for file in sorted(f for folder in folders for f in folder.rglob("*") if f.is_file()):
        size = file.stat().st_size
        parts.append([file.name, size])
        with file.open("rb") as stream:
            for place in range(0, size, 2**16 if size < 2**26 else 2**22):
                stream.seek(place)
                parts.append(draw_key(stream.read(2**16)))
    return cache_key("encoder", parts=parts)


def encoder_hashes(folder: Path, flavour: Flavour, dtype: torch.dtype) -> dict[str, str]:
    """Return a hash per kind of job of all that its result depends on beside pictures and text."""
    kind = (flavour.pipeline_class, str(dtype))
    # the two image processors differ in rounding
    library = "torchvision" if importlib.util.find_spec("torchvision") else "PIL"
    parts = [folder / name for name in ("text_encoder", "tokenizer", "processor")]
    prompt = fingerprint(parts, *kind, library, template_text(flavour.pipeline_class))
    return {"latent": fingerprint([folder / "vae"], *kind), "prompt": prompt, "region": ""}


def key_of(job: Job, encoders: dict[str, str]) -> str:
    """Return the name of a job's cache entry; a prompt's pictures are part of it."""
    pictures = [[p.content, p.size, p.box, p.flip] for p in job.pictures]
    return cache_key(job.kind, of=encoders[job.kind], pictures=pictures, caption=job.caption)


def read_tensor(path: Path) -> torch.Tensor:
    """Return the one tensor of a cache entry. Raises ValueError."""
    return next(iter(utils.read_entry(path).values()))


def check_entry(path: Path) -> dict[str, Any]:
    """Read a cache entry; one that is damaged is deleted. Raises ValueError."""
    try:
        utils.read_entry(path)
    except ValueError:
        path.unlink(missing_ok=True)
        raise
    return {}


def fill_cache(trainer: QwenImageEditTrainer, jobs: dict[str, Job], again: Iterable[str]) -> int:
    """Encode what is missing and `again`, a share per process; return how many this one encoded.

    VAE and text encoder are loaded one after the other; with nothing to do none is.
    """
    accelerator, cache_dir = trainer.accelerator, trainer.cache_dir
    # KEEP: shares of ALL entries; what is missing changes while other processes write
    share = sorted(jobs)[accelerator.process_index :: accelerator.num_processes]
    paths = {key: utils.entry_path(cache_dir, key) for key in share}
    for problem in trainer.index.update((p for p in paths.values() if p.exists()), check_entry):
        log.warning("%s; it is built again", problem)
    mine = [key for key in share if key in again or not paths[key].exists()]
    log.info("cache: %d entries, process 0 has %d to encode", len(jobs), len(mine))
    for label, is_prompt in (("pictures", False), ("prompts", True)):
        keys = [key for key in mine if (jobs[key].kind == "prompt") == is_prompt]
        for key in progress(keys, f"encode {label}", disable=not keys):
            utils.write_entry(cache_dir, key, {jobs[key].kind: trainer.encode(jobs[key])})
        if keys:  # KEEP: the encoders are never in memory together
            trainer.unload("vae", "text_encoder")
    trainer.index.update((paths[key] for key in mine), lambda path: {})
    accelerator.wait_for_everyone()
    if lost := [key for key in jobs if not utils.entry_path(cache_dir, key).exists()]:
        raise UserError(f"{len(lost)} cache entries were not written; run it again")
    return len(mine)


# --- 7. the base model: weights, devices ----------------------------------------------------------


class ModelConfig(Section):
    """The base model. Which of 2508, 2509, 2511 it is stands in its own files."""

    pretrained_model_name_or_path: str = "Qwen/Qwen-Image-Edit-2511"
    """Folder in diffusers layout, or a Hub id."""
    base_model_precision: Literal[
        "no_change", "int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto", "nf4-bnb"
    ] = "no_change"
    """Weights of the frozen blocks; modulation is 8-bit then, embedders and output stay bf16."""
    quantize: bool = False
    """Short for base_model_precision: fp8-quanto."""
    quantize_via: Literal["cpu", "accelerator"] = "accelerator"
    """Where a block is quantised while it loads."""
    devices: list[str] = []
    """Devices that the transformer's blocks are spread over, e.g. [cuda:0, cuda:1]; one process."""
    blocks_to_swap: int = Field(0, ge=0)
    """Blocks that wait in CPU memory until they are needed; with gradient checkpointing."""
    lora: LoraConfig = LoraConfig()

    def rules(self) -> dict[str, Any]:
        """Return {problem: whether it is there}."""
        other, swap = self.base_model_precision, self.blocks_to_swap
        return {
            "quantize: true means fp8-quanto; leave it out beside another type": self.quantize
            and other not in ("no_change", "fp8-quanto"),
            "blocks_to_swap goes with every precision but nf4-bnb": swap and other == "nf4-bnb",
            "blocks_to_swap or several devices, not both": swap and len(self.devices) > 1,
        }

    @property
    def precision(self) -> str:
        """Return what the blocks are stored in, `quantize` resolved."""
        return "fp8-quanto" if self.quantize else self.base_model_precision


def check_device(name: str, value: str | None) -> list[str]:
    """Problems of a device setting on this machine."""
    if value is None:
        return []
    try:
        device = torch.device(value)
    except RuntimeError:
        return [f"{name}: '{value}' is no device (cpu, cuda:0, mps, ...)"]
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        return [f"{name}: '{value}', but this machine has {torch.cuda.device_count()} CUDA devices"]
    here = torch.accelerator.current_accelerator()
    if device.type not in ("cpu", "cuda", here and here.type):
        return [f"{name}: '{value}', but this machine has no such device"]
    return []


def check_packages(*names: str) -> list[str]:
    """Problems of packages that the settings need and that are not installed."""
    lacking = [name for name in names if importlib.util.find_spec(name) is None]
    return [f"{name} is not installed: pip install {name}" for name in lacking]


WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
QUANTO_TYPES = {"fp8": "qfloat8", "int8": "qint8", "int4": "qint4", "int2": "qint2"}
MODULATION = ("img_mod.", "txt_mod.", "norm")  # how names of modulation begin in a block


def find_weights(folder: Path) -> dict[str, Path]:
    """{tensor: file} of a diffusers component, one file or shards. Raises UserError."""
    index = folder / f"{WEIGHTS_FILE}.index.json"
    if index.is_file():
        named = read_model_json(str(folder), index.name).get("weight_map", {})
        return {name: folder / file for name, file in named.items()}
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            return dict.fromkeys(file.keys(), folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"weights {folder / WEIGHTS_FILE} cannot be read: {error}") from error


def fill_parts(
    model: Any, folder: Path, dtype: torch.dtype, parts: dict[str, torch.device], precision: str
) -> Iterator[torch.nn.Module]:
    """Give a model without weights its parts, one by one, straight to their devices; blocks of a
    ModuleList are quantised there. Yields each part when it is filled.

    One block at a time is in memory unquantised. With no_change the model equals
    from_pretrained(dtype=dtype) bit for bit.

    Raises:
        UserError: weights are missing, damaged or of another model; the message names three.
    """
    weights = find_weights(folder)
    if wrong := sorted(weights.keys() ^ model.state_dict().keys()):
        raise UserError(f"{folder}: weights missing or not expected\n{listed(wrong, 3)}")
    for name, device in parts.items():
        part, tensors = model.get_submodule(name), {}
        mine = [key for key in weights if key.startswith(f"{name}.")]
        try:
            for path in {weights[key] for key in mine}:
                # KEEP: open only for this part; what was read of an open file counts as memory
                with safe_open(path, framework="pt") as file:
                    for key in (key for key in mine if weights[key] == path):
                        tensor = file.get_tensor(key).to(device, dtype, copy=True)
                        tensors[key.removeprefix(f"{name}.")] = tensor
            part.load_state_dict(tensors, assign=True)
        except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: another shape
            raise UserError(f"{folder}, {name}: {error}") from error
        if name[-1].isdigit() and precision != "no_change":
            quantize_block(part, precision)
        part.requires_grad_(False)
        return_freed_memory()
        yield part


def return_freed_memory() -> None:
    """Call malloc_trim(0): glibc keeps freed pages, so loading would end up larger than the model
    in full precision."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def quantize_block(block: torch.nn.Module, precision: str) -> None:
    """Replace the linear layers one by one by quantised ones; modulation is 8-bit at least."""
    linear = [name for name, x in block.named_modules() if isinstance(x, torch.nn.Linear)]
    for name in linear:
        fine = precision.startswith(("int8", "fp8")) or not name.startswith(MODULATION)
        layer = quantize_linear(block.get_submodule(name), precision if fine else "int8-quanto")
        block.set_submodule(name, layer)
        return_freed_memory()


@torch.no_grad()
def quantize_linear(linear: Any, precision: str) -> torch.nn.Module:
    """nf4: blocks of 64 weights, fp32 scales; quanto: per output channel (8 bit) or group."""
    if precision == "nf4-bnb":
        from bitsandbytes.nn import Linear4bit, Params4bit

        how: dict[str, Any] = {"compress_statistics": False, "quant_type": "nf4"}
        sizes, dtype = (linear.in_features, linear.out_features), linear.weight.dtype
        layer: Any = Linear4bit(*sizes, compute_dtype=dtype, device="meta", **how)
        # KEEP: some CPUs would repack the weights in eval mode, and nothing could train after that
        layer.support_avx512bf16_for_cpu = False
        weight = Params4bit(linear.weight.data, module=layer, **how)
        layer.weight, layer.bias = weight.to(linear.weight.device), linear.bias  # .to() quantises
        return layer
    from optimum import quanto

    unpack_without_compiler()
    kind = getattr(quanto, QUANTO_TYPES[precision.partition("-")[0]])
    layer = quanto.QLinear.from_module(linear, weights=kind)
    groups = {} if kind.bits == 8 else {"group_size": layer.weight_group_size}
    found = layer.optimizer(linear.weight, qtype=kind, axis=0, **groups)
    groups |= {"scale": found[0], "shift": found[1]} if groups else {"scale": found}
    # KEEP optimized=False: the fp8 kernel that quanto 0.2.7 would choose on CUDA leaves out the
    # bias and wants nvcc, its int4 kernel is made for a few tokens
    weight = quanto.quantize_weight(linear.weight, qtype=kind, axis=0, **groups, optimized=False)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def unpack_without_compiler() -> None:
    """Let quanto unpack 4 and 2 bits with torch: its own extension is compiled at the first use, on
    CUDA with nvcc."""
    from optimum import quanto

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        mask = 2**bits - 1  # the lowest bits of every byte first
        return torch.cat([(packed >> shift) & mask for shift in range(0, 8, bits)])

    for name in ("quanto_cpp", "quanto_cuda", "quanto_hip", "quanto_mps"):
        if quanto.is_extension_available(name):
            extension = quanto.get_extension(name)
            extension._lib = extension._lib or SimpleNamespace(unpack=unpack)


class Layout(NamedTuple):
    """Where a transformer lives."""

    devices: list[torch.device]  # the blocks are spread over these, in order
    blocks_to_swap: int = 0  # of a single device: so many blocks wait in CPU memory


def split_blocks(n_blocks: int, devices: Sequence[torch.device]) -> list[torch.device]:
    """Return the device of each block: runs of equal length (or one apart), in order."""
    return [devices[number * len(devices) // n_blocks] for number in range(n_blocks)]


def swapped_blocks(n_blocks: int, count: int) -> list[int]:
    """Return which blocks wait in CPU memory: evenly spread, so that there is time to copy."""
    return [(2 * number + 1) * n_blocks // (2 * count) for number in range(count)]


def placement(transformer: Any, layout: Layout) -> dict[str, tuple[torch.device, torch.device]]:
    """{block or embedder: (where its weights live, where it computes)}."""
    blocks, devices = transformer.transformer_blocks, layout.devices
    swapped = swapped_blocks(len(blocks), layout.blocks_to_swap)
    found = {}
    for name, part in transformer.named_children():
        if part is not blocks and part.state_dict():
            found[name] = (devices[-1 if name in ("norm_out", "proj_out") else 0],) * 2
    for number, device in enumerate(split_blocks(len(blocks), devices)):
        home = torch.device("cpu") if number in swapped else device
        found[f"transformer_blocks.{number}"] = home, device
    return found


def empty_transformer(settings: dict[str, Any]) -> Any:
    """QwenImageTransformer2DModel without weights (meta device); its rope tables are real.

    Raises UserError where this diffusers is too old for the checkpoint.
    """
    import diffusers
    from accelerate import init_empty_weights

    model_class = diffusers.QwenImageTransformer2DModel
    accepted = inspect.signature(model_class.__init__).parameters
    if settings.get("zero_cond_t") and "zero_cond_t" not in accepted:
        raise UserError(
            "this checkpoint needs zero_cond_t (2511), which this version of diffusers would "
            "ignore: pip install -U diffusers"
        )
    with init_empty_weights():
        return model_class.from_config(settings)


def load_transformer(
    folder: Path, dtype: torch.dtype, precision: str, layout: Layout, via_cpu: bool = False
) -> Any:
    """The transformer, frozen, each part read (and quantised) straight to where it lives."""
    model = empty_transformer(read_model_json(str(folder), "config.json"))
    homes, plain = placement(model, layout), precision == "no_change"
    ways = {name: home if plain else device for name, (home, device) in homes.items()}
    ways = dict.fromkeys(ways, torch.device("cpu")) if via_cpu else ways
    parts = fill_parts(model, folder, dtype, ways, precision)
    for home, _ in progress(homes.values(), "load transformer", leave=False):
        move(next(parts), home)
    mark_quantized(model.eval().requires_grad_(False), precision)
    connect(model, layout)
    return model


def mark_quantized(transformer: Any, precision: str) -> None:
    """Note the precision where PEFT and this script look for it."""
    if precision != "no_change":
        transformer.quantized_to = precision
        transformer.is_loaded_in_4bit = precision == "nf4-bnb"


def map_tensor(tensor: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply `change` to a tensor, or to the ones that a quanto tensor is made of.

    KEEP: quanto's own .to() and .clone() pick a kernel or undo the quantisation.
    """
    if not hasattr(tensor, "__tensor_flatten__"):
        return change(tensor)
    names, meta = tensor.__tensor_flatten__()
    inner = {name: map_tensor(getattr(tensor, name), change) for name in names}
    return type(tensor).__tensor_unflatten__(inner, meta, tensor.size(), tensor.stride())


def frozen(tensor: torch.Tensor) -> torch.nn.Parameter:
    """Return a parameter that is not trained."""
    return torch.nn.Parameter(tensor, requires_grad=False)


def move(module: torch.nn.Module, device: torch.device) -> None:
    """module.to(device) that leaves quanto's weights as they are."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if hasattr(value, "__tensor_flatten__") and value.device != device:  # type: ignore
                part._parameters[name] = frozen(map_tensor(value, lambda t: t.to(device)))
    module.to(device)


def place(transformer: Any, layout: Layout) -> None:
    """Move a transformer that is already loaded. Raises UserError if its blocks are swapped."""
    if hasattr(transformer, "block_swap"):
        raise UserError("with model.blocks_to_swap the transformer stays on its device")
    for name, (home, _) in placement(transformer, layout).items():
        move(transformer.get_submodule(name), home)
    connect(transformer, layout)


def connect(transformer: Any, layout: Layout) -> None:
    """Add hooks that carry activations between devices, or weights between CPU and device."""
    from accelerate.utils import send_to_device

    transformer.layout = layout
    blocks, devices = transformer.transformer_blocks, layout.devices
    if layout.blocks_to_swap:
        numbers = swapped_blocks(len(blocks), layout.blocks_to_swap)
        transformer.block_swap = BlockSwap({n: blocks[n] for n in numbers}, devices[0])
        transformer.register_forward_pre_hook(lambda *_: transformer.block_swap.begin())
        return_freed_memory()  # pinned memory has taken its place
    if len(devices) == 1:
        return

    def carry(device: torch.device, module: Any, args: Any, kwargs: Any) -> Any:
        return send_to_device(args, device), send_to_device(kwargs, device)

    # temb, text, rope, mask ... go to each block's device, the result back to the first
    places = [*split_blocks(len(blocks), devices), devices[-1]]
    for part, device in zip([*blocks, transformer.norm_out], places, strict=True):
        part.register_forward_pre_hook(functools.partial(carry, device), with_kwargs=True)
    transformer.register_forward_hook(lambda *args: send_to_device(args[-1], devices[0]))


class BlockSwap:
    """Blocks whose frozen weights lie in (pinned) CPU memory and visit the device for their turn.

    While one works, the next is copied; there are never more on the device. Gradient checkpointing
    makes the order known: up in the forward pass, down in the backward pass, where every block is
    computed once more. A module's parameters are exchanged as objects, not `.data`: autograd keeps
    the GPU copy until the block's backward, and it goes with that.
    """

    def __init__(self, blocks: dict[int, torch.nn.Module], device: torch.device) -> None:
        self.numbers, self.device = sorted(blocks), device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.homes: dict[int, list[tuple[dict[str, Any], str, torch.nn.Parameter]]] = {}
        self.here: dict[int, tuple[list[torch.nn.Parameter], Any]] = {}  # copies, their event
        self.keep: int | None = None  # not to be removed after its turn
        self.last = -1  # the block that worked last in this pass
        for number, block in blocks.items():
            tables = [part._parameters for part in block.modules()]
            self.homes[number] = [
                (table, name, self._pinned(parameter))
                for table in tables
                for name, parameter in table.items()
                if parameter is not None
            ]
            self._put(number, [home for *_, home in self.homes[number]])
            for part in block.modules():  # quanto's scales
                for name, buffer in part._buffers.items():
                    part._buffers[name] = buffer.to(device) if buffer is not None else None
            block.register_forward_pre_hook(functools.partial(self._enter, number))
            # KEEP always_call: recomputation ends blocks early, by an exception
            leave = functools.partial(self._leave, number)
            block.register_forward_hook(leave, always_call=True)

    def _pinned(self, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        return frozen(map_tensor(parameter, torch.Tensor.pin_memory)) if self.stream else parameter

    def _put(self, number: int, parameters: Iterable[torch.nn.Parameter]) -> None:
        for (table, name, _), parameter in zip(self.homes[number], parameters, strict=True):
            table[name] = parameter

    def begin(self) -> None:
        """Before each forward pass: the first block starts on its way."""
        self.last = -1
        self._fetch(self.numbers[0])

    def _fetch(self, number: int) -> None:
        if number in self.here:
            return

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            # KEEP: allocated on the computing stream, so that it takes the place of a block that
            # has had its turn, however far the host runs ahead
            there = torch.empty_like(tensor, device=self.device)
            with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
                return there.copy_(tensor, non_blocking=True)

        event = None
        if self.stream:  # KEEP: that block may still be at work
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.no_grad():
            copies = [frozen(map_tensor(home, copy)) for *_, home in self.homes[number]]
        if self.stream:
            event = self.stream.record_event()
        self.here[number] = copies, event

    def _arrive(self, number: int) -> list[torch.nn.Parameter]:
        copies, event = self.here[number]
        if event:
            torch.cuda.current_stream(self.device).wait_event(event)
        return copies

    def _next(self, number: int) -> int | None:
        """The swapped block whose turn comes after this one."""
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
    """The adapter of a swapped block lives on the device, always."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not hasattr(transformer, "block_swap"):
        return
    for number in transformer.block_swap.numbers:
        for layer in transformer.transformer_blocks[number].modules():
            if isinstance(layer, BaseTunerLayer):
                for name in layer.adapter_layer_names:
                    getattr(layer, name).to(transformer.block_swap.device)


# --- 8. sampling and validation -------------------------------------------------------------------


class PredictDevices(Section):
    """A device per component for trainer.predict()."""

    vae: str | None = None
    """Device of the VAE, e.g. cuda:1; null is the training device."""
    text_encoder: str | None = None
    """Device of the text encoder, e.g. cuda:2; null is the training device."""
    transformer: str | None = None
    """Device of the transformer, e.g. cuda:0; null is the training device."""


class PredictConfig(Section):
    """Inference with trainer.predict()."""

    devices: PredictDevices = PredictDevices()


class ValidationSample(Section):
    """An edit without a target."""

    prompt: str
    """Instruction of the edit."""
    images: list[Path] = Field(min_length=1)
    """References, in order."""


class ValidationConfig(Section):
    """Pictures and loss on held-out samples (holdout, holdout_ratio, eval_dataset_id)."""

    steps: int | None = Field(None, ge=1)
    """Steps between two validations; null is none."""
    eval_dataset_id: list[str] = []
    """Data sets (id) that are kept out of training whole."""
    samples: list[ValidationSample] = []
    """More edits to draw, without a target."""
    max_samples: int = Field(4, ge=1)
    """Held-out samples drawn on the sheet; the loss takes all."""
    seed: int = 42
    """Seed of the noise of the pictures and of the loss; the same every time."""
    resolution: int | None = Field(None, ge=64)
    """Side of the square whose area pictures get, px; null is that of training, or of predict()."""
    num_inference_steps: int = Field(20, ge=2)
    """Euler steps of the pictures (a single one divides by zero in the scheduler)."""
    true_cfg_scale: float = Field(4.0, ge=1)
    """Guidance of the pictures against negative_prompt, as in the pipeline; 1 is none."""
    negative_prompt: str = ""
    """Instruction that guidance leads away from; "" with the same references."""


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """(B, 16, 1, h, w) -> tokens (B, h/2 * w/2, 64): channel, row in patch, column in patch."""
    b, c, _, h, w = latents.shape
    tokens = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(b, (h // 2) * (w // 2), c * 4)


def unpack_latents(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Tokens (B, S, 64) of a picture of height x width px -> (B, 16, 1, h, w)."""
    b, _, channels = tokens.shape
    h, w = height // 16, width // 16
    latents = tokens.view(b, h, w, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(b, channels // 4, 1, h * 2, w * 2)


def token_grid(latents: torch.Tensor) -> tuple[int, int, int]:
    """(B, 16, 1, h, w) -> (frames, rows, columns) of its tokens."""
    return 1, latents.shape[-2] // 2, latents.shape[-1] // 2


def predict_velocity(
    transformer: Any,
    noisy: torch.Tensor,
    references: Sequence[torch.Tensor],
    embeds: torch.Tensor,
    mask: torch.Tensor | None,
    sigma: torch.Tensor,
) -> torch.Tensor:
    """Velocity of the target, shape of `noisy`.

    noisy (B, 16, 1, h, w); references K x (B, 16, 1, hk, wk), never noised; embeds (B, T, D);
    mask (B, T) or None; sigma (B,).
    """
    pictures = [noisy, *references]
    tokens = torch.cat([pack_latents(p) for p in pictures], dim=1)  # (B, S + sum Sk, 64)
    velocity = transformer(
        hidden_states=tokens,
        timestep=sigma,
        encoder_hidden_states=embeds,
        encoder_hidden_states_mask=mask,  # KEEP: None when nothing is padded (flash attention)
        # KEEP: RoPE takes the shapes of sample 0 for all, so a batch has one shape
        img_shapes=[[token_grid(p) for p in pictures]] * len(noisy),
        return_dict=False,
    )[0]
    height, width = noisy.shape[-2] * 8, noisy.shape[-1] * 8
    return unpack_latents(velocity[:, : math.prod(token_grid(noisy))], height, width)


@torch.no_grad()
def denoise(
    transformer: Any,
    scheduler: Any,
    noise: torch.Tensor,
    references: Sequence[torch.Tensor],
    embeds: torch.Tensor,
    steps: int,
    negative_embeds: torch.Tensor | None = None,
    true_cfg_scale: float = 1.0,
) -> torch.Tensor:
    """Euler from noise (1, 16, 1, h, w) to latents, step for step what the pipelines do.

    `scheduler` is a copy of its own (set_timesteps changes it). With negative_embeds and
    true_cfg_scale > 1: classifier-free guidance, rescaled to the norm of the positive prediction.
    """
    sigmas = np.linspace(1.0, 1 / steps, steps)
    mu = model_mu(scheduler.config, math.prod(token_grid(noise)))
    scheduler.set_timesteps(sigmas=sigmas, device=noise.device, mu=mu)
    scheduler.set_begin_index(0)
    latents = noise
    for t in scheduler.timesteps:
        sigma = t.expand(len(latents)).to(latents.dtype) / 1000
        velocity = predict_velocity(transformer, latents, references, embeds, None, sigma)
        if negative_embeds is not None and true_cfg_scale > 1:
            other = predict_velocity(transformer, latents, references, negative_embeds, None, sigma)
            positive, negative = pack_latents(velocity), pack_latents(other)
            guided = negative + true_cfg_scale * (positive - negative)  # (1, S, 64)
            norms = [torch.norm(v, dim=-1, keepdim=True) for v in (positive, guided)]
            height, width = latents.shape[-2] * 8, latents.shape[-1] * 8
            velocity = unpack_latents(guided * (norms[0] / norms[1]), height, width)
        latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
    return latents


def sample_latents(
    trainer: QwenImageEditTrainer,
    size: tuple[int, int],
    references: Sequence[torch.Tensor],
    prompts: Sequence[torch.Tensor],
    steps: int,
    scale: float,
    seed: int,
) -> torch.Tensor:
    """Latents (1, 16, 1, h, w) of a picture of `size` (W, H) px; noise as the pipelines draw it.

    references (16, 1, hk, wk) and prompts (T, D) as they lie in the cache; a second prompt is the
    negative one of guidance.
    """
    transformer, (width, height) = trainer.bare_transformer(), size
    device, dtype = transformer.device, prompts[0].dtype
    shape, generator = (1, 16, 1, height // 8, width // 8), torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator, dtype=dtype).to(device)
    scheduler = type(trainer.scheduler).from_config(trainer.scheduler.config)
    latents = [reference[None].to(device, dtype) for reference in references]
    embeds, *negative = (prompt[None].to(device) for prompt in prompts)
    # fp32 LoRA on a bf16 base: as in training
    mixed = bool(getattr(transformer, "peft_config", None)) and dtype != torch.float32
    with torch.autocast(device.type, dtype, enabled=mixed):
        return denoise(
            *(transformer, scheduler, noise, latents, embeds, steps),
            *(negative[0] if negative else None, scale),
        )


def edit_example(
    trainer: QwenImageEditTrainer,
    pictures: Sequence[Picture],
    prompt: str,
    width: int | None = None,
    height: int | None = None,
) -> Example:
    """What an edit without a target shows the model, by the rules of training.

    pictures: each whole, at its own size. `pixel` of the result is the main one (2508: the first,
    else the last) at the size that is drawn: width x height px, down to a multiple of 16, or 1 MP
    (the training size if references are as large as the target).
    """
    datasets, about = trainer.config.data.dataset_configs, about_lora(trainer)
    main = pictures[0] if trainer.flavour.name == "edit-v1" else pictures[-1]
    aligned, size = about["reference_area"] == "target", pick_size(AREA_1MP, main.aspect)
    if aligned and datasets:
        size = nearest_bucket(*main.size, datasets[0].resolution)
    size = (width or size[0]) // 16 * 16, (height or size[1]) // 16 * 16
    aspects = [picture.aspect for picture in pictures]
    # the frame that references share: the main one's, or of the one nearest to width x height
    near = min(aspects, key=lambda aspect: abs(math.log(aspect / (size[0] / size[1]))))
    frame = Frame(near if width else main.aspect, size)
    area_px = reference_area_px(about["reference_area"], size)
    areas = {"control": area_px, "vision": float(about["vision_area"] or area_px)}
    shown = {kind: tuple(frame.show(p, a, aligned) for p in pictures) for kind, a in areas.items()}
    return Example("", prompt, {"pixel": (main._replace(size=size),), **shown})


# two in each quarter: fixed noise levels of the validation loss
VALIDATION_SIGMAS = tuple((i + 0.5) / 8 for i in range(8))


def validation_pictures(config: Config) -> list[Path]:
    """The picture files of validation.samples, once, sorted; none when nothing is validated."""
    samples = config.validation.samples if config.validation.steps else []
    return sorted({path for sample in samples for path in sample.images})


def held_out(trainer: QwenImageEditTrainer) -> list[int]:
    """Return the numbers of the samples that are not trained."""
    return [number for number, sample in enumerate(trainer.samples) if sample.held_out]


def validation_edits(trainer: QwenImageEditTrainer) -> list[tuple[Example, bool]]:
    """Rows of the sheet: (example, whether it has a target), held-out pairs, then samples."""
    config, side_px, edits = trainer.config, trainer.config.validation.resolution, []
    for number in held_out(trainer)[: config.validation.max_samples]:
        sample = trainer.samples[number]
        variant = sample.variants[0]  # another resolution: all sizes follow their rules
        variant = variant._replace(resolution=side_px or variant.resolution)
        samples = [sample._replace(variants=(variant,))]
        edits.append((resolve(config, trainer.flavour, samples, Draw(0, 0), trainer.index), True))
    for wanted in config.validation.samples:
        pictures = [whole_picture(path, trainer.index) for path in wanted.images]
        main = pictures[0] if trainer.flavour.name == "edit-v1" else pictures[-1]
        size = pick_size(side_px**2, main.aspect) if side_px else ()
        example = edit_example(trainer, pictures, wanted.prompt, *size)
        edits.append((example._replace(name=wanted.images[-1].stem), False))
    return edits if config.validation.steps else []


def edit_jobs(trainer: QwenImageEditTrainer, example: Example) -> tuple[list[Job], list[Job]]:
    """What a validation picture needs: its references; its prompt and, with guidance, another."""
    settings, jobs = trainer.config.validation, jobs_of(example)
    [prompt] = jobs["prompt_embed"]
    negative = prompt._replace(caption=settings.negative_prompt)
    return jobs["control_latent"], [prompt, negative][: 1 + (settings.true_cfg_scale > 1)]


@torch.no_grad()
def validate(trainer: QwenImageEditTrainer, run_log: RunLog) -> None:
    """Losses and the sheet; the work is shared out over the processes."""
    accelerator, step = trainer.accelerator, trainer.global_step
    transformer = trainer.bare_transformer()
    transformer.eval()
    values, rows = validation_losses(trainer), validation_rows(trainer)
    transformer.train()
    if values:
        run_log.values(step, values)
        if accelerator.is_main_process:
            tqdm.write(f"step {step} validation loss {values['validation_loss']:.4f}")
    if rows and accelerator.is_main_process:
        run_log.picture(f"step_{step:06d}", validation_sheet(trainer, rows), step)
    accelerator.wait_for_everyone()


def validation_losses(trainer: QwenImageEditTrainer) -> dict[str, float]:
    """validation_loss, and by quartile of sigma (q1: the least noise); again for the EMA."""
    values = {}
    for suffix in ("", "_ema") if trainer.ema else ("",):
        with trainer.averaged(ema=bool(suffix)):
            losses = fixed_noise_losses(trainer).mean(0).tolist()
        quarters = {f"_q{i + 1}": losses[2 * i : 2 * i + 2] for i in range(4)}
        for name, part in {"": losses, **quarters}.items():
            values[f"validation_loss{suffix}{name}"] = sum(part) / len(part)
    return values if held_out(trainer) else {}


def fixed_noise_losses(trainer: QwenImageEditTrainer) -> torch.Tensor:
    """Loss of every held-out pair at every sigma, (pairs, 8) fp32, on every process.

    Always the same noise, so small changes mean something; no dropout, sigma not shifted.
    """
    seed, accelerator, pairs = (
        trainer.config.validation.seed,
        trainer.accelerator,
        held_out(trainer),
    )
    losses = torch.zeros(len(pairs), len(VALIDATION_SIGMAS), device=trainer.device)
    every = list(itertools.product(range(len(pairs)), range(len(VALIDATION_SIGMAS))))
    mine = every[accelerator.process_index :: accelerator.num_processes]
    for row, places in itertools.groupby(mine, key=lambda place: place[0]):
        example, paths = PairDataset(trainer).resolved(Draw(0, pairs[row]))
        item = {name: [read_tensor(path) for path in each] for name, each in paths.items()}
        batch = trainer.to_device(collate([item]) if item else trainer.encoded([example]))
        for _, column in places:
            level = VALIDATION_SIGMAS[column]
            noise = normal(batch["pixel_latent"].shape, seed, example.name, level)
            drawn = trainer.to_device({"noise": noise, "sigma": torch.tensor([level])})
            # KEEP the bare transformer: processes do not call it equally often
            loss = compute_loss(trainer, batch | drawn, trainer.bare_transformer(), shift=False)
            losses[row, column] = loss[0]
    return accelerator.reduce(losses, "sum")  # each is 0 on all processes but one


def validation_rows(trainer: QwenImageEditTrainer) -> list[tuple[int, list[Image.Image]]]:
    """(number of the edit, its pictures) of all rows, drawn by all processes."""
    from accelerate.utils import gather_object

    accelerator, edits, drawn = trainer.accelerator, validation_edits(trainer), []
    mine = range(accelerator.process_index, len(edits), accelerator.num_processes)
    for number in progress(mine, "validation pictures", leave=False):
        try:
            drawn.append((number, draw_row(trainer, number, edits[number][0])))
        except torch.OutOfMemoryError:
            name, text = edits[number][0].name, "a smaller validation.resolution helps"
            tqdm.write(f"validation of {name}: out of memory, left out ({text}); training goes on")
        if trainer.use_cache:  # KEEP: not in the except clause, where the error holds the tensors
            trainer.unload("vae", "text_encoder")
    return sorted(gather_object(drawn), key=lambda row: row[0])


def draw_row(trainer: QwenImageEditTrainer, number: int, example: Example) -> list[Image.Image]:
    """Base, LoRA and, if there is one, EMA; the base is drawn once in a run."""
    settings, transformer = trainer.config.validation, trainer.bare_transformer()
    latents, prompts = edit_jobs(trainer, example)
    references = [trainer.through_cache(job) for job in latents]
    embeds = [trainer.through_cache(job) for job in prompts]
    how = settings.num_inference_steps, settings.true_cfg_scale, settings.seed

    def draw() -> Image.Image:
        """Draw what predict() gives for the same pictures and settings."""
        size = example.pictures["pixel"][0].size
        drawn = sample_latents(trainer, size, references, embeds, *how)
        trainer.load_model(["vae"])
        trainer.vae.to(trainer.config.cache.vae_encoder_device or trainer.device)
        return to_image(decode_latents_qwen(trainer.vae, drawn)[0])

    if number not in trainer.base_pictures:
        transformer.disable_adapters()
        try:
            trainer.base_pictures[number] = draw()
        finally:
            transformer.enable_adapters()
    row = [trainer.base_pictures[number]]
    for ema in (False, True) if trainer.ema else (False,):
        with trainer.averaged(ema):
            row.append(draw())
    return row


def validation_sheet(
    trainer: QwenImageEditTrainer, rows: Sequence[tuple[int, list[Image.Image]]]
) -> Image.Image:
    """Draw references | base | LoRA | EMA, if there is one | target, if there is one."""
    edits = validation_edits(trainer)
    heads = ["base", "LoRA", *(["EMA"] if trainer.ema else [])]
    heads += ["target"] if any(has_target for _, has_target in edits) else []
    results = []
    for number, pictures in rows:
        example, has_target = edits[number]
        target = load_picture(example.pictures["pixel"][0]) if has_target else None
        results.append([*pictures, target][: len(heads)])
    return edit_sheet([edits[number][0] for number, _ in rows], results, heads)


def edit_sheet(
    examples: Sequence[Example], results: Sequence[Any], heads: list[str]
) -> Image.Image:
    """Draw the references of each row, however many it has | its results, under `heads`."""
    most = max(len(example.pictures["control"]) for example in examples)
    rows = []
    for example, row in zip(examples, results, strict=True):
        shown = [load_picture(picture) for picture in example.pictures["control"]]
        rows.append([*shown, *[None] * (most - len(shown)), *row])
    captions = [f"{example.name}: {example.caption or '(empty)'}" for example in examples]
    return utils.contact_sheet(rows, [f"reference {i + 1}" for i in range(most)] + heads, captions)


# --- 9. batches -----------------------------------------------------------------------------------

Shape = tuple[tuple[str, tuple[int, int]], ...]  # kind and (W, H) px of what the transformer sees


class StepPlan:
    """For every optimizer step the micro-batches of this process, from `first_step` on.

    One step takes `size` samples, whatever the processes, batch size and accumulation; process r
    of n gets the r-th n-th of them, cut into micro-batches of one shape. So the same samples meet
    in a step, however the work is split. Every epoch visits each sample `repeats` times (the last
    step of an epoch is filled up from its beginning).
    """

    def __init__(
        self, trainer: QwenImageEditTrainer, shape_of: Callable[[Draw], Shape], first_step: int
    ) -> None:
        config, self.samples, self.shape_of = trainer.config, trainer.samples, shape_of
        self.config, self.first_step = config, first_step
        self.rank, self.processes = (
            trainer.accelerator.process_index,
            trainer.accelerator.num_processes,
        )
        self.size = (
            config.data.batch_size * config.train.gradient_accumulation_steps * self.processes
        )
        datasets = config.data.dataset_configs
        numbers = [number for number, sample in enumerate(self.samples) if not sample.held_out]
        self.visits = [n for n in numbers for _ in range(datasets[self.samples[n].dataset].repeats)]
        self.steps_per_epoch = math.ceil(len(self.visits) / self.size)
        epochs = config.train.num_epochs or math.inf
        self.steps = int(min(config.train.max_train_steps, epochs * self.steps_per_epoch))

    def draw(self, visit: int, number: int) -> Draw:
        """Everything random about one visit but its noise."""
        seed, sample = self.config.seed, self.samples[number]
        views = self.config.data.dataset_configs[sample.dataset].views
        chance = uniform(seed, "batch_config", visit) * sum(v.weight for v in sample.variants)
        which = 0
        while which < len(sample.variants) - 1 and chance >= sample.variants[which].weight:
            chance -= sample.variants[which].weight
            which += 1
        variant = sample.variants[which]
        return Draw(
            visit=visit,
            sample=number,
            variant=which,
            view=int(uniform(seed, "view", visit) * views),
            references=keep_first(variant, seed, visit),
            vision=keep_references(variant, seed, visit),
            dropped=uniform(seed, "caption_dropout", visit) < variant.caption_dropout,
        )

    def epoch(self, epoch: int) -> list[list[Draw]]:
        """The steps of an epoch; steps of one shape as far as they fill, the rest mixed."""
        seed, n = self.config.seed, len(self.visits)
        order = utils.shuffled(n, seed, "order", epoch) if self.config.data.shuffle else range(n)
        by_shape: dict[object, list[Draw]] = {}
        for place in order:
            draw = self.draw(epoch * n + place, self.visits[place])
            by_shape.setdefault(self.shape_of(draw), []).append(draw)
        full, rest = [], []
        for draws in by_shape.values():
            whole = len(draws) - len(draws) % self.size
            full += [draws[i : i + self.size] for i in range(0, whole, self.size)]
            rest += draws[whole:]
        if rest:
            again = itertools.cycle(rest + [draw for step in full for draw in step])
            rest += [next(again) for _ in range(-len(rest) % self.size)]
        steps = full + [rest[i : i + self.size] for i in range(0, len(rest), self.size)]
        order = range(len(steps))
        if self.config.data.shuffle:
            order = utils.shuffled(len(steps), seed, "steps", epoch)
        return [steps[i] for i in order]

    def __iter__(self) -> Iterator[list[list[Draw]]]:
        step = self.first_step
        while step < self.steps:
            epoch, place = divmod(step, self.steps_per_epoch)
            for draws in self.epoch(epoch)[place:]:
                if step >= self.steps:
                    return
                share = self.size // self.processes
                yield self.micro_batches(draws[self.rank * share : (self.rank + 1) * share])
                step += 1

    def micro_batches(self, draws: Sequence[Draw]) -> list[list[Draw]]:
        """Cut into runs of one shape, at most batch_size each."""
        batches: list[list[Draw]] = []
        for draw in draws:
            shape = self.shape_of(draw)
            last = next((b for b in batches if self.shape_of(b[0]) == shape), None)
            if last is None or len(last) == self.config.data.batch_size:
                batches.insert(0, [draw])
            else:
                last.append(draw)
        return batches[::-1]

    def __len__(self) -> int:
        return max(0, self.steps - self.first_step)


def keep_first(variant: Variant, *parts: object) -> int | None:
    """How many references the transformer keeps: at each in turn, a chance to stop; None: all."""
    if not variant.reference_dropout:
        return None
    for i in range(len(variant.references)):
        if uniform("reference_dropout", i, *parts) < variant.reference_dropout:
            return i
    return None


def keep_references(variant: Variant, *parts: object) -> tuple[int, ...] | None:
    """Vision references that survive dropout (at least vision_min of them); None: all."""
    n = len(variant.vision)
    if not variant.vision_dropout:
        return None
    chances = [uniform("vision_dropout", i, *parts) for i in range(n)]
    kept = [i for i in range(n) if chances[i] >= variant.vision_dropout]
    if len(kept) < variant.vision_min:  # the luckiest ones stay
        kept = sorted(sorted(range(n), key=lambda i: -chances[i])[: variant.vision_min])
    return tuple(kept)


def possible_draws(config: Config, samples: Sequence[Sample]) -> Iterator[Draw]:
    """Yield every Draw that can happen, so that everything it needs is cached."""
    for number, sample in enumerate(samples):
        trained = not sample.held_out
        views = config.data.dataset_configs[sample.dataset].views if trained else 1
        for which, variant in enumerate(sample.variants):
            subsets: list[tuple[int, ...] | None] = [None]
            if variant.vision_dropout and trained:
                n = len(variant.vision)
                sizes = range(min(variant.vision_min, n), n + 1)
                subsets = [s for k in sizes for s in itertools.combinations(range(n), k)]
            dropped = (False, True) if variant.caption_dropout > 0 and trained else (False,)
            for view, subset, drop in itertools.product(range(views), subsets, dropped):
                yield Draw(0, number, which, view, None, subset, drop)


class PairDataset(torch.utils.data.Dataset):
    """Micro-batches (lists of Draws) -> batches: cached tensors, or examples to be encoded."""

    def __init__(self, trainer: QwenImageEditTrainer) -> None:
        self.config, self.samples, self.index = trainer.config, trainer.samples, trainer.index
        self.flavour, self.encoders = trainer.flavour, trainer.encoders
        self._held: dict[Path, torch.Tensor] = {}
        self._room = self.config.cache.memory_mb * 2**20  # bytes left for _held
        self._known: dict[Draw, tuple[Example, dict[str, list[Path]]]] = {}

    def __getitem__(self, micro_batches: list[list[Draw]]) -> list[dict[str, Any]]:
        try:
            return [self.batch(draws) for draws in micro_batches]
        except (UserError, ValueError) as error:  # a worker's own would arrive as a traceback
            return [{"error": str(error)}]

    def batch(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """One micro-batch, with sigma (B,) before the shift; the noise is drawn here as well."""
        seed, data, loss = self.config.seed, self.config.data, self.config.loss
        known = [self.resolved(draw) for draw in draws]
        examples = [example for example, _ in known]
        batch: dict[str, Any] = {"examples": examples}
        if self.config.cache.use_cache:
            items = [{k: [self.read(p) for p in v] for k, v in paths.items()} for _, paths in known]
            batch = collate(items)
        width, height = examples[0].pictures["pixel"][0].size
        shape = (16, 1, height // 8, width // 8)
        batch |= {
            "noise": torch.stack([normal(shape, seed, "noise", d.visit) for d in draws]),
            "sigma": torch.tensor([sample_sigma(loss, seed, "sigma", d.visit) for d in draws]),
            "names": [example.name for example in examples],
        }
        datasets = [data.dataset_configs[self.samples[draw.sample].dataset] for draw in draws]
        if any(ds.loss_weight != 1 for ds in datasets):
            batch["loss_weight"] = torch.tensor([ds.loss_weight for ds in datasets])
        if data.caption_dropout_mode == "zero" and any(draw.dropped for draw in draws):
            batch["zeroed"] = torch.tensor([draw.dropped for draw in draws])
        if loss.rollout_steps:
            # KEEP: numbers, not a tensor; to look at one on the GPU would wait for it
            batch["rollout_chance"] = [uniform(seed, "rollout", draw.visit) for draw in draws]
        return batch

    def read(self, path: Path) -> torch.Tensor:
        """Return the tensor of a cache entry, from memory once there was room for it."""
        if path not in self._held:
            tensor = read_tensor(path)
            if tensor.nbytes > self._room:
                return tensor
            self._room -= tensor.nbytes
            self._held[path] = tensor
        return self._held[path]

    def resolved(self, draw: Draw) -> tuple[Example, dict[str, list[Path]]]:
        """Return the example of a draw and its cache entries by name in a batch; remembered."""
        draw, cache = draw._replace(visit=0), self.config.cache
        if draw not in self._known:
            example = resolve(self.config, self.flavour, self.samples, draw, self.index)
            paths: dict[str, list[Path]] = {}
            for name, jobs in jobs_of(example).items() if cache.use_cache else ():
                keys = [key_of(job, self.encoders) for job in jobs]
                paths[name] = [utils.entry_path(cache.cache_dir, key) for key in keys]
            self._known[draw] = example, paths
        return self._known[draw]


def collate(items: Sequence[dict[str, list[torch.Tensor]]]) -> dict[str, Any]:
    """Tensors of samples of one shape -> a batch; text is padded with zeros.

    prompt_embed (B, T, D); prompt_embeds_mask (B, T) bool, None if nothing is padded;
    control_latent K x (B, 16, 1, hk, wk); pixel_latent, start_latent (B, 16, 1, h, w); region
    (B, 1, 1, h, w).
    """
    embeds = [item["prompt_embed"][0] for item in items]
    lengths = torch.tensor([len(embed) for embed in embeds])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]  # (B, T)
    batch: dict[str, Any] = {
        "prompt_embed": torch.nn.utils.rnn.pad_sequence(embeds, batch_first=True),
        "prompt_embeds_mask": mask if bool((lengths != lengths[0]).any()) else None,
    }
    for name in items[0].keys() - {"prompt_embed"}:
        stacked = [torch.stack(each) for each in zip(*(item[name] for item in items), strict=True)]
        batch[name] = stacked if name == "control_latent" else stacked[0]
    if "region" in batch:
        batch["region"] = batch["region"][:, :, None]
    return batch


def as_image(value: Any) -> Image.Image:
    """PIL picture, HWC uint8 array or tensor -> RGB. Raises UserError for other arrays."""
    if not isinstance(value, Image.Image):
        array = np.asarray(value)
        if array.dtype != np.uint8 or array.ndim != 3:
            raise UserError(f"wanted a picture as (H, W, 3) uint8, got {array.shape} {array.dtype}")
        value = Image.fromarray(array)
    return utils.on_white(value)


def again_and_again(loader: Iterable[Any]) -> Iterator[Any]:
    """Pass after pass over a loader. Raises UserError when a pass yields nothing."""
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise UserError("the data loader has no more batches: give one that starts again")


USER_BATCH = ("image", "control", "prompt")  # pictures and prompts, see examples_of()


def batch_size(batch: dict[str, Any]) -> int:
    """Samples in a batch."""
    return len(next(batch[k] for k in ("pixel_latent", "examples", "image") if k in batch))


# --- 10. the trainer ------------------------------------------------------------------------------


class QwenImageEditTrainer:
    """Load, cache, train, sample. Every method can be called alone, e.g. in a notebook:

    >>> trainer = QwenImageEditTrainer(utils.load_config(Config, ["--config", "configs/x.yaml"]))
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
        self.vae: Any = None  # AutoencoderKLQwenImage
        self.qwen_vl: Any = None  # Qwen2_5_VLForConditionalGeneration
        self.transformer: Any = None  # QwenImageTransformer2DModel
        self.tokenizer: Any = None  # Qwen2Tokenizer
        self.processor: Any = None  # Qwen2VLProcessor
        self.scheduler: Any = None  # FlowMatchEulerDiscreteScheduler
        self.text_pipeline: Any = None  # the pipeline without VAE and transformer: encode_prompt()
        self.use_cache, self.cache_dir = config.cache.use_cache, config.cache.cache_dir
        self.quantize = config.model.quantize
        bf16 = config.train.mixed_precision == "bf16"
        self.weight_dtype = torch.bfloat16 if bf16 else torch.float32
        self.flavour = detect_flavour(config.model.pretrained_model_name_or_path)
        self.samples: list[Sample] = []
        self.index = utils.FileIndex(None)
        output_dir, limit = config.logging.output_dir, config.train.checkpoints_total_limit
        self.checkpoints = utils.Checkpoints(output_dir, limit)
        self.base_pictures: dict[int, Image.Image] = {}  # row of the validation sheet: no LoRA
        self.drawn = 0  # batches of this step, from a loader of the user's, that got noise here
        self._shapes: dict[tuple[int, int, int | None], Shape] = {}

    # -- loading and devices

    @property
    def device(self) -> torch.device:
        """Return the training device; of several the first."""
        if self.config.model.devices:
            return torch.device(self.config.model.devices[0])
        if self.accelerator:
            return self.accelerator.device
        from accelerate import PartialState

        return PartialState(cpu=not torch.accelerator.is_available()).device

    @property
    def cache_exist(self) -> bool:
        """Return whether cache_dir holds any entry."""
        return any(self.cache_dir.glob("??/??/*.safetensors"))

    @functools.cached_property
    def encoders(self) -> dict[str, str]:
        """Return hashes of the encoders, for key_of()."""
        folder = self.checkpoint("vae/*", "text_encoder/*", "tokenizer/*", "processor/*")
        return encoder_hashes(folder, self.flavour, self.weight_dtype)

    def checkpoint(self, *patterns: str) -> Path:
        """Return the folder of the base; from the Hub only what the patterns name is fetched."""
        return utils.fetch_checkpoint(self.config.model.pretrained_model_name_or_path, *patterns)

    def load_model(
        self, parts: Sequence[str] = ("vae", "text_encoder", "transformer", "scheduler")
    ) -> None:
        """Load what is named and not there yet, frozen, in `weight_dtype`.

        The transformer goes to its device (blocks in their precision), the others to the CPU.
        """
        import diffusers

        how: dict[str, Any] = {"dtype": self.weight_dtype, "use_safetensors": True}
        if "scheduler" in parts and self.scheduler is None:
            kind: Any = diffusers.FlowMatchEulerDiscreteScheduler
            folder = self.checkpoint("scheduler/*")
            self.scheduler = kind.from_pretrained(folder, subfolder="scheduler")
        if "vae" in parts and self.vae is None:
            kind = diffusers.AutoencoderKLQwenImage
            self.vae = kind.from_pretrained(self.checkpoint("vae/*"), subfolder="vae", **how)
            encode_stills_in_2d(self.vae.eval().requires_grad_(False))
        if "text_encoder" in parts and self.text_pipeline is None:
            folder = self.checkpoint("text_encoder/*", "tokenizer/*", "processor/*", "scheduler/*")
            kind, processor = self.pipeline_class(), load_processor(folder / "processor")
            pipeline = kind.from_pretrained(
                folder, transformer=None, vae=None, processor=processor, **how
            )
            self.text_pipeline, self.qwen_vl = pipeline, pipeline.text_encoder
            self.qwen_vl.eval().requires_grad_(False)
            self.tokenizer, self.processor = pipeline.tokenizer, processor
        if "transformer" in parts and self.transformer is None:
            self.place_transformer(self.device)

    def pipeline_class(self) -> Any:
        """Return the diffusers pipeline of this checkpoint."""
        import diffusers

        return getattr(diffusers, self.flavour.pipeline_class)

    def unload(self, *parts: str) -> None:
        """Forget components ("vae", "text_encoder", "transformer") and free their memory."""
        if "vae" in parts:
            self.vae = None
        if "text_encoder" in parts:
            self.qwen_vl = self.text_pipeline = None
        if "transformer" in parts:
            self.transformer = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def setup_accelerator(self) -> None:
        """Set up devices, precision, processes, trackers."""
        if self.accelerator:
            return
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

        log_with = self.config.logging.report_to
        self.accelerator = Accelerator(
            mixed_precision=self.config.train.mixed_precision,
            cpu=not torch.accelerator.is_available(),
            device_placement=False,  # the transformer is where its layout wants it
            log_with=None if log_with == "none" else log_with,
            project_dir=self.config.logging.output_dir,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2)),
                # KEEP: quantised weights are buffers; sending them would hang validation
                DistributedDataParallelKwargs(broadcast_buffers=False),
            ],
        )
        main = self.accelerator.is_main_process
        logging.basicConfig(format="%(message)s")
        log.setLevel(logging.INFO if main else logging.ERROR)

    def find_data(self) -> None:
        """Pair, audit and hash the data set. Raises UserError with every problem."""
        if self.samples:
            return
        with self.accelerator.main_process_first():
            self.index = open_index(self.config)  # KEEP: inside, to see what process 0 recorded
            self.samples, problems = find_samples(self.config, self.index)
        if problems:
            raise UserError(f"{len(problems)} problem(s)\n{listed(problems)}")

    # -- encoding

    def encode_image_embedding(
        self, image: Any, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """Picture (sides a multiple of 16 px) -> normalised latents (1, 16, 1, h, w)."""
        self.load_model(["vae"])
        self.vae.to(device or self.device)
        return encode_image_qwen(self.vae, to_pixels(as_image(image)))

    def encode_prompt_image_embedding(
        self, prompt: str, image: Any, device: torch.device | str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Instruction and picture(s) -> embedding (1, T, D), mask (1, T) of ones."""
        self.load_model(["text_encoder"])
        place = torch.device(device or self.device)
        self.qwen_vl.to(place)
        images = [as_image(i) for i in (image if isinstance(image, list | tuple) else [image])]
        embeds = encode_prompt_qwen(self.text_pipeline, prompt, images, place)[None]
        return embeds, torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)

    def _encode_empty_prompt(
        self, image: Any, device: torch.device | str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The empty instruction with the same pictures -> embedding (T, D), mask (T,)."""
        embeds, mask = self.encode_prompt_image_embedding("", image, device)
        return embeds[0], mask[0]

    def decode_vae_latent(self, latents: torch.Tensor) -> np.ndarray:
        """Normalised latents (B, 16, 1, h, w) -> pictures (B, H, W, 3) uint8."""
        self.load_model(["vae"])
        return np.stack([np.asarray(to_image(p)) for p in decode_latents_qwen(self.vae, latents)])

    def encode(self, job: Job, device: torch.device | str | None = None) -> torch.Tensor:
        """What lies in the cache, on the CPU: latent (16, 1, h, w), prompt (T, D), region (1, h, w).

        device: of the encoder; None is what cache.*_device says.
        """
        cache = self.config.cache
        if job.kind == "region":
            return region_map(job.pictures)
        images = [load_picture(picture) for picture in job.pictures]
        if job.kind == "latent":
            device = device or cache.vae_encoder_device
            return self.encode_image_embedding(images[0], device)[0].cpu()
        device = device or cache.text_encoder_device
        return self.encode_prompt_image_embedding(job.caption, images, device)[0][0].cpu()

    def encoded(self, examples: Iterable[Example]) -> dict[str, Any]:
        """Return the batch of these examples, as from the cache."""
        parts = [jobs_of(example).items() for example in examples]
        return collate([{name: [*map(self.encode, jobs)] for name, jobs in each} for each in parts])

    def through_cache(self, job: Job, device: torch.device | str | None = None) -> torch.Tensor:
        """Read an entry, or encode and write it."""
        if not self.use_cache:
            return self.encode(job, device)
        key = key_of(job, self.encoders)
        with contextlib.suppress(ValueError):  # missing or damaged: encode it
            return read_tensor(utils.entry_path(self.cache_dir, key))
        tensors = {job.kind: self.encode(job, device)}
        return read_tensor(utils.write_entry(self.cache_dir, key, tensors))

    def examples_of(self, batch: dict[str, Any]) -> list[Example]:
        """Pictures of a batch {"image": [...], "control": [[...]], "prompt": [...]} -> Examples.

        Pictures are PIL or HWC uint8; "control" holds a picture or a list of them per sample.
        """
        found = []
        rows = zip(batch["image"], batch["control"], batch["prompt"], strict=True)
        for image, control, prompt in rows:
            several = control if isinstance(control, list | tuple) else [control]
            target, *wholes = (whole_picture(as_image(i), self.index) for i in (image, *several))
            size = pick_size(target.size[0] * target.size[1], target.aspect)
            frame = Frame(target.aspect, size)
            area_px = reference_area_px(self.config.data.reference_area, size)
            areas = {"control": area_px, "vision": self.flavour.vision_area or area_px}
            shown = {
                k: tuple(frame.show(w, area, False) for w in wholes) for k, area in areas.items()
            }
            found.append(Example("", prompt, {"pixel": (target._replace(size=size),), **shown}))
        return found

    def cache_step(
        self,
        batch: dict[str, Any],
        vae_device: torch.device | str | None = None,
        text_device: torch.device | str | None = None,
    ) -> list[dict[str, Any]]:
        """Encode the pictures and prompts of a batch and keep them in the cache.

        Returns per sample: pixel_latent, control_latent (list), prompt_embed and
        empty_prompt_embed (T, D) with their masks (T,).
        """
        items = []
        for example in self.examples_of(batch):
            jobs, item = jobs_of(example), {}
            jobs["empty_prompt_embed"] = [jobs["prompt_embed"][0]._replace(caption="")]
            for name, parts in jobs.items():
                device = text_device if name.endswith("embed") else vae_device
                tensors: Any = [self.through_cache(job, device) for job in parts]
                item[name] = tensors if name == "control_latent" else tensors[0]
            masks = {
                n.replace("embed", "embeds_mask"): torch.ones(len(item[n])).long()
                for n in item
                if n.endswith("embed")
            }
            items.append(item | masks)
        return items

    def cache_jobs(self, renewed: bool = False) -> dict[str, Job]:
        """Return every entry that training and validation can ask for: {key: what to encode}.

        renewed: only those of data sets with recreate_cache.
        """
        jobs: list[Job] = []
        for draw in possible_draws(self.config, self.samples):
            ds = self.config.data.dataset_configs[self.samples[draw.sample].dataset]
            if ds.recreate_cache or not renewed:
                example = resolve(self.config, self.flavour, self.samples, draw, self.index)
                jobs += itertools.chain(*jobs_of(example).values())
        for example, _ in [] if renewed else validation_edits(self):
            jobs += itertools.chain(*edit_jobs(self, example))
        return {key_of(job, self.encoders): job for job in jobs}

    def cache_embeddings(self, train_dataloader: Iterable[dict[str, Any]] | None = None) -> int:
        """Encode what is missing: all that the config can ask for, or the batches of a loader.

        Returns how many entries this process encoded (of a loader: samples).
        """
        self.setup_accelerator()
        if train_dataloader is None:
            self.find_data()
            return fill_cache(self, self.cache_jobs(), self.cache_jobs(renewed=True))
        cache = self.config.cache
        places = cache.vae_encoder_device, cache.text_encoder_device
        count = sum(len(self.cache_step(batch, *places)) for batch in train_dataloader)
        self.unload("vae", "text_encoder")
        return count

    # -- LoRA and quantisation

    @property
    def precision(self) -> str:
        """Return what blocks are stored in; `trainer.quantize = True` before loading means fp8."""
        precision = self.config.model.precision
        return "fp8-quanto" if self.quantize and precision == "no_change" else precision

    def quantize_model(self, model: Any, device: torch.device | str | None = None) -> Any:
        """Quantise the blocks of a loaded transformer in place (no_change: to fp8).

        device: each block moves there before; None: it stays where it is. What the trainer loads
        itself is quantised while it loads, which takes less memory.
        """
        if getattr(model, "peft_config", None) or hasattr(model, "block_swap"):
            raise UserError("quantise before that: set trainer.quantize before loading")
        precision = "fp8-quanto" if self.precision == "no_change" else self.precision
        for block in progress(model.transformer_blocks, f"quantize to {precision}", leave=False):
            quantize_block(block.to(device) if device else block, precision)
        mark_quantized(model, precision)
        return model

    def place_transformer(self, device: torch.device | str) -> None:
        """Load the transformer to where the config wants it, or move the one that is there."""
        model = self.config.model
        # an empty tensor knows the number of "cuda"
        devices = [torch.empty(0, device=n).device for n in model.devices or [str(device)]]
        layout = Layout(devices, model.blocks_to_swap)
        if self.transformer is None:
            folder = self.checkpoint("transformer/*") / "transformer"
            via_cpu = model.quantize_via == "cpu"
            self.transformer = load_transformer(
                folder, self.weight_dtype, self.precision, layout, via_cpu
            )
        elif self.precision != "no_change" and not hasattr(self.transformer, "quantized_to"):
            self.quantize_model(self.transformer)
        if getattr(self.transformer, "layout", None) != layout:
            place(self.transformer, layout)

    def set_lora(self) -> None:
        """Put the transformer on the training device and add the adapter to it."""
        self.setup_accelerator()
        self.transformer = self.bare_transformer()  # a second fit() finds it wrapped
        self.place_transformer(self.device)
        self.load_model(["scheduler"])
        if getattr(self.transformer, "peft_config", None):
            return
        lora = self.config.model.lora
        add_lora(self.transformer, lora, self.config.seed)
        self.transformer.train()
        if self.config.train.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        if lora.pretrained_weight:
            start_from_lora(self.transformer, lora.pretrained_weight, lora)
        # every process has read the frozen weights itself: DDP need not send them
        frozen_names = [n for n, p in self.transformer.named_parameters() if not p.requires_grad]
        torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            self.transformer, frozen_names
        )
        log.info(
            "LoRA: %.2f million parameters, fp32", sum(p.numel() for p in self.trainable()) / 1e6
        )

    def trainable(self) -> list[torch.nn.Parameter]:
        """Return the parameters that are trained."""
        return [p for p in self.transformer.parameters() if p.requires_grad]

    def bare_transformer(self) -> Any:
        """Return the transformer without its distributed wrapper."""
        if self.accelerator and self.transformer is not None:
            return self.accelerator.unwrap_model(self.transformer)
        return self.transformer

    def save_lora(self, path: str | Path) -> Path:
        """Write the adapter to a .safetensors file, or into a folder under its usual name."""
        path = Path(path)
        file = path if path.suffix == ".safetensors" else path / LORA_FILE
        save_lora_file(file, self.bare_transformer(), about_lora(self))
        return file

    def load_lora(self, path: str | Path) -> None:
        """Load a LoRA file (or folder) for inference, at the strength it was trained with."""
        file = Path(path) if Path(path).is_file() else Path(path) / LORA_FILE
        if not file.is_file():
            raise UserError(f"no LoRA file {file}")
        self.load_model(["transformer"])
        tensors, metadata = self.pipeline_class().lora_state_dict(
            str(file), use_safetensors=True, return_lora_metadata=True
        )
        if getattr(self.transformer, "peft_config", None):
            self.transformer.delete_adapters("default")
        # unlike the pipeline's load_lora_weights it takes LoKr files as well
        self.transformer.load_lora_adapter(tensors, metadata=metadata, adapter_name="default")
        place_adapter(self.transformer)

    def merge_lora(self) -> None:
        """Add the adapter's change to the base weights, for any method, and drop the adapter."""
        transformer = self.bare_transformer()
        if hasattr(transformer, "quantized_to"):
            raise UserError("a quantised base cannot take the LoRA up; merge into the bf16 model")
        if hasattr(transformer, "block_swap"):  # its weights are on the CPU, the adapter is not
            for number in transformer.block_swap.numbers:
                transformer.transformer_blocks[number].to("cpu")
        transformer.fuse_lora()
        transformer.unload_lora()

    # -- inference

    def setup_predict(self) -> None:
        """Load everything onto predict.devices; takes the LoRA just trained, or the config's."""
        devices = self.config.predict.devices
        self.transformer = self.bare_transformer()
        trained = getattr(self.transformer, "peft_config", None)
        if self.quantize and trained and not hasattr(self.transformer, "quantized_to"):
            with (
                tempfile.TemporaryDirectory() as folder
            ):  # the base again, quantised, with the LoRA
                self.save_lora(folder)
                self.unload("transformer")
                self.load_lora(folder)
        self.place_transformer(devices.transformer or self.device)
        self.load_model()
        start = self.config.model.lora.pretrained_weight
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
        true_cfg_scale: float = 4.0,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
    ) -> np.ndarray:
        """Edit a picture (or several: a list). setup_predict() comes first.

        prompt_image: HWC uint8 array or PIL picture; height, width: px, a multiple of 16 (default:
        1 MP, or the training size if references are as large as the target). Guidance is on if
        true_cfg_scale > 1 and negative_prompt is not None ("" is the empty instruction).

        Returns:
            (H, W, 3) uint8, the pixels the diffusers pipeline gives for the same seed (CPU
            generator) and reference area.
        """
        if self.transformer is None or self.vae is None or self.qwen_vl is None:
            raise UserError("call setup_predict() first")
        if num_inference_steps < 2:
            raise UserError("num_inference_steps: 2 or more (1 divides by zero in the scheduler)")
        images = prompt_image if isinstance(prompt_image, list | tuple) else [prompt_image]
        whole = [Picture(image, "", image.size) for image in map(as_image, images)]
        example = edit_example(self, whole, prompt, width, height)
        jobs = jobs_of(example)
        [prompt_job] = jobs["prompt_embed"]
        asked = [prompt_job]
        if negative_prompt is not None and true_cfg_scale > 1:
            asked.append(prompt_job._replace(caption=negative_prompt))
        references = [self.encode(job, self.vae.device) for job in jobs["control_latent"]]
        prompts = [self.encode(job, self.qwen_vl.device) for job in asked]
        size, how = example.pictures["pixel"][0].size, (num_inference_steps, true_cfg_scale, seed)
        return self.decode_vae_latent(sample_latents(self, size, references, prompts, *how))[0]

    # -- training

    def configure_optimizers(self) -> None:
        """Make optimizer, learning rate schedule (counts optimizer steps) and moving average."""
        self.optimizer = make_optimizer(self.config.optimizer, self.trainable())
        # KEEP: accelerate must not wrap it, or it would go as many steps as there are processes
        self.lr_scheduler = make_schedule(
            self.config.lr_scheduler, self.optimizer, self.total_steps()
        )
        if self.config.train.use_ema:
            self.ema = MovingAverage(self.trainable(), self.config.train)

    def training_step(self, batch: dict[str, Any]) -> torch.Tensor:
        """Mean loss of a batch: of cached tensors, or of pictures and prompts."""
        if "sigma" not in batch:  # a loader of the user's: noise levels are drawn here
            chance = self._loader_chance("sigma")
            sigmas = [sample_sigma(self.config.loss, *chance, i) for i in range(batch_size(batch))]
            batch = {**batch, "sigma": torch.tensor(sigmas)}
        if "prompt_embed" in batch and "pixel_latent" in batch and "control_latent" in batch:
            return self._training_step_cached(batch)
        return self._training_step_compute(batch)

    def _loader_chance(self, purpose: str) -> tuple[object, ...]:
        """What the draws of a batch from the user's own loader belong to."""
        rank = self.accelerator.process_index
        return self.config.seed, "loader", purpose, rank, self.global_step, self.drawn

    def _training_step_cached(self, batch: dict[str, Any]) -> torch.Tensor:
        batch = self.to_device(batch)
        if not isinstance(batch["control_latent"], list):
            batch["control_latent"] = [batch["control_latent"]]
        if "noise" not in batch:
            chance = self._loader_chance("noise")
            batch["noise"] = normal(batch["pixel_latent"].shape, *chance).to(self.device)
            self.drawn += 1
        if "zeroed" in batch:  # caption_dropout_mode: zero
            embeds = batch["prompt_embed"]
            batch["prompt_embed"] = embeds.masked_fill(batch["zeroed"].view(-1, 1, 1), 0)
        loss = self._compute_loss(batch)
        return (loss * batch["loss_weight"] if "loss_weight" in batch else loss).mean()

    def _training_step_compute(self, batch: dict[str, Any]) -> torch.Tensor:
        """Encode with the same functions the cache is filled with, then go on as from the cache."""
        examples = batch.get("examples") or self.examples_of(batch)
        drawn = {k: v for k, v in batch.items() if k not in ("examples", *USER_BATCH)}
        return self._training_step_cached(self.encoded(examples) | drawn)

    def _compute_loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """Loss per sample, (B,): compute_loss()."""
        return compute_loss(self, batch)

    def to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Send the tensors of a batch to the training device, without waiting for it."""
        from accelerate.utils import send_to_device

        return send_to_device(batch, self.device, non_blocking=True)

    def shift_mu(self, tokens: int) -> float:
        """Return mu of loss.timestep_shift for so many target tokens."""
        wanted = self.config.loss.timestep_shift
        return model_mu(self.scheduler.config, tokens) if wanted == "model" else math.log(wanted)

    def velocity(
        self, batch: dict[str, Any], noisy: torch.Tensor, sigma: torch.Tensor, transformer: Any
    ) -> torch.Tensor:
        """What the transformer predicts for a batch at (noisy, sigma (B,))."""
        dtype = self.weight_dtype
        with self.accelerator.autocast():
            return predict_velocity(
                transformer,
                noisy.to(dtype),
                [control.to(dtype) for control in batch["control_latent"]],
                batch["prompt_embed"].to(dtype),
                batch.get("prompt_embeds_mask"),
                sigma,
            )

    def total_steps(self) -> int:
        """Return the optimizer steps of the whole run."""
        return self.step_plan().steps if self.samples else self.config.train.max_train_steps

    def epoch(self) -> int:
        """Return the number of passes over the data that are done."""
        return self.global_step // self.step_plan().steps_per_epoch if self.samples else 0

    def step_plan(self, first_step: int = 0) -> StepPlan:
        """Return which samples meet in which step, for this process."""

        def shape_of(draw: Draw) -> Shape:  # crops and what the encoder sees do not change it
            key = draw.sample, draw.variant, draw.references
            if key not in self._shapes:
                example = resolve(self.config, self.flavour, self.samples, draw, self.index)
                kinds = sorted(example.pictures.keys() - {"vision"})
                shape = tuple((kind, p.size) for kind in kinds for p in example.pictures[kind])
                self._shapes[key] = shape
            return self._shapes[key]

        return StepPlan(self, shape_of, first_step)

    def train_dataloader(self, first_step: int = 0) -> Any:
        """Return the loader fit() uses: a list of micro-batches per optimizer step."""
        self.setup_accelerator()
        self.find_data()
        workers = self.config.data.num_workers
        return torch.utils.data.DataLoader(
            PairDataset(self),
            sampler=self.step_plan(first_step),  # type: ignore[arg-type]
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=self.use_cache and self.device.type == "cuda",
            prefetch_factor=4 if workers else None,
        )

    def preflight(self) -> None:
        """Check what needs the libraries, but no weights. Raises UserError with every problem."""
        from accelerate import init_empty_weights

        config, lora = self.config, self.config.model.lora
        problems = check_model(config, self.precision)
        path = config.model.pretrained_model_name_or_path
        try:
            empty = empty_transformer(read_model_json(path, "transformer/config.json"))
            with init_empty_weights():
                add_lora(empty, lora, config.seed)
            if lora.pretrained_weight:
                start_from_lora(empty, lora.pretrained_weight, lora)
        except UserError as error:
            problems.append(str(error))
        try:
            optimizer = make_optimizer(config.optimizer, [torch.nn.Parameter(torch.zeros(1))])
            if hasattr(optimizer, "eval") and config.train.use_ema:
                text = f"{config.optimizer.class_path} averages by itself; leave one of the two out"
                problems.append(f"train.use_ema: {text}")
        except UserError as error:
            problems.append(str(error))
        if problems:
            raise UserError(f"{len(problems)} problem(s)\n{listed(problems)}")

    def fit(self, train_dataloader: Iterable[Any] | None = None) -> None:
        """The whole run: audit, cache, load, train, save.

        train_dataloader: optional; yields batches for training_step, or lists of them (the
        micro-batches of one optimizer step), and decides about caption dropout. Without it the
        config's data sets are used.
        """
        self.setup_accelerator()
        config, accelerator, output_dir = self.config, self.accelerator, self.checkpoints.output_dir
        with contextlib.ExitStack() as stack:
            if accelerator.is_main_process:
                stack.enter_context(self.checkpoints.only_run())
            if train_dataloader is None:
                self.find_data()
            self.preflight()
            wanted = config.train.resume_from_checkpoint if self.global_step == 0 else None
            found = self.checkpoints.find(wanted, trained_as(self))
            if accelerator.is_main_process:
                if not found and self.global_step == 0:
                    self.checkpoints.set_aside(LORA_FILE, EMA_FILE)
                utils.run_record(output_dir, config, Path(__file__))
            if train_dataloader is None and self.use_cache:
                self.cache_embeddings()
            elif not self.use_cache:
                self.load_model(["vae", "text_encoder"])
            self.set_lora()
            self.configure_optimizers()
            if found:
                self._restore(*found)
            # KEEP: DDP must wrap the transformer itself, or gradients are never averaged
            self.transformer, self.optimizer = accelerator.prepare(self.transformer, self.optimizer)
            run_log = RunLog(accelerator, output_dir, config, self.global_step)
            if train_dataloader is None:
                loader: Any = self.train_dataloader(self.global_step)
                announce(self, run_log)
            else:
                loader = again_and_again(train_dataloader)
            self.optimizer.train()
            with utils.StopSignal() as stop:
                stopped = train_loop(self, loader, run_log, stop)
            if accelerator.is_main_process:
                self._save_adapters(output_dir)
                write_card(self)
                run_log.report()
            self.optimizer.eval()  # what predict() and save_lora() meet is what was saved
            accelerator.wait_for_everyone()
            accelerator.end_training()
        word = "stopped" if stopped else "done"
        log.info("%s at step %d: %s", word, self.global_step, output_dir / LORA_FILE)

    @contextlib.contextmanager
    def averaged(self, ema: bool = False) -> Iterator[None]:
        """Swap in the averaged weights, for previews and saving; restore the trained ones on exit.

        They differ with `ema`, and where the optimizer averages (schedule-free).
        """
        parameters = self.trainable()
        trained = [p.detach().clone() for p in parameters]
        try:
            if ema and self.ema:
                copy_into(parameters, self.ema.averages)
            else:
                self.optimizer.eval()
            yield
        finally:
            self.optimizer.train()
            # KEEP: schedule-free's own way back is a lerp, right to rounding only
            copy_into(parameters, trained)

    def _save_adapters(self, folder: Path) -> None:
        """Write the LoRA file, and beside it the one of the moving average."""
        with self.averaged():
            self.save_lora(folder)
        if self.ema:
            with self.averaged(ema=True):
                self.save_lora(folder / EMA_FILE)

    def save_checkpoint(self, epoch: int, global_step: int) -> None:
        """Write checkpoint-<step>/: LoRA files, raw adapter, optimizer, schedule."""
        if not torch.stack([p.isfinite().all() for p in self.trainable()]).all():
            raise UserError(
                f"the weights of step {global_step} are not finite; nothing of it was saved. Lower "
                "the learning rate"
            )
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            adapter = lora_tensors(self.bare_transformer())
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

    def _restore(self, folder: Path, step: int) -> None:
        """Go on from adapter, optimizer, schedule and step of a checkpoint."""
        from peft.utils import set_peft_model_state_dict

        saved = torch.load(folder / "training_state.pt", map_location="cpu", weights_only=True)
        set_peft_model_state_dict(self.transformer, saved["adapter"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.lr_scheduler.load_state_dict(saved["lr_scheduler"])
        for average, value in zip(self.ema.averages, saved["ema"], strict=True) if self.ema else ():
            average.copy_(value)
        self.global_step = step
        log.info("resumed from %s (step %d)", folder, step)


def _as_is(value: Any) -> Any:
    """Collate function of a loader whose data set makes whole batches."""
    return value


FREE_TO_CHANGE = (  # settings that may differ between a checkpoint and the run that continues it
    r"train\.(max_train_steps|num_epochs|checkpointing_steps|checkpoints_total_limit"
    r"|resume_from_checkpoint|gradient_checkpointing|gradient_accumulation_steps|ema_device)"
    r"|data\.(batch_size|num_workers)|data\.dataset_configs\.\d+\.(train_data_dir|recreate_cache)"
    r"|model\.(devices.*|blocks_to_swap|quantize_via)"
)


def flat_settings(value: Any, path: str = "") -> dict[str, Any]:
    """Return {dotted path: value} of every leaf of nested mappings and lists."""
    if not isinstance(value, dict | list):
        return {path.lstrip("."): value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return {p: v for key, item in pairs for p, v in flat_settings(item, f"{path}.{key}").items()}


def trained_as(trainer: QwenImageEditTrainer) -> dict[str, Any]:
    """What decides the result; a run that continues must have the same."""
    config, index = trainer.config, trainer.index
    sections = {"model", "data", "optimizer", "lr_scheduler", "train", "loss", "seed"}
    values = flat_settings(config.model_dump(mode="json", include=sections))
    seen = [
        (
            *(sample.dataset, sample.name, sample.held_out),
            [(v.caption, [index[f]["content"] for f in v.files()]) for v in sample.variants],
        )
        for sample in trainer.samples
    ]
    size = config.data.batch_size * config.train.gradient_accumulation_steps
    return {
        **{path: value for path, value in values.items() if not re.fullmatch(FREE_TO_CHANGE, path)},
        "samples (names, captions, pictures)": cache_key("samples", seen=seen),
        "samples per step": size * trainer.accelerator.num_processes,
    }


def inference_rules(trainer: QwenImageEditTrainer) -> dict[str, list[Any]]:
    """How large references were shown in training; inference takes the first of each."""
    variants = [v for s in trainer.samples for v in s.variants if not s.held_out]
    usual = trainer.config.data.reference_area, trainer.flavour.vision_area
    counted: dict[str, Counter[Any]] = {
        "reference_area": Counter(r.area or usual[0] for v in variants for r in v.references),
        "vision_area": Counter(r.area or usual[1] for v in variants for r in v.vision),
    }
    defaults = dict(zip(counted, usual, strict=True))
    return {n: [v for v, _ in c.most_common()] or [defaults[n]] for n, c in counted.items()}


def about_lora(trainer: QwenImageEditTrainer) -> dict[str, Any]:
    """What generate.py must know to sample as this LoRA was trained."""
    data, lora = trainer.config.data, trainer.config.model.lora
    return {
        "base_model": trainer.config.model.pretrained_model_name_or_path,
        "flavour": trainer.flavour.name,
        **{name: values[0] for name, values in inference_rules(trainer).items()},
        "resolution": data.dataset_configs[0].resolution if data.dataset_configs else None,
        "step": trainer.global_step,
        "method": lora.method,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha or lora.r,
    }


def announce(trainer: QwenImageEditTrainer, run_log: RunLog) -> None:
    """Log what is about to happen; draw the first step's pictures."""
    for name, (first, *others) in inference_rules(trainer).items():
        if others:
            text = "several %s are trained (%s): predict() and generate.py use the first"
            log.warning(text, name, ", ".join(map(str, (first, *others))))
    plan, step, out = trainer.step_plan(trainer.global_step), trainer.global_step, held_out(trainer)
    log.info(
        "%s on %s, %s | %d samples (%d held out) | %d a step, %d steps an epoch | steps %d..%d",
        *(trainer.flavour.name, trainer.device, trainer.weight_dtype),
        *(len(trainer.samples) - len(out), len(out)),
        *(plan.size, plan.steps_per_epoch, step, plan.steps),
    )
    if step == 0 and trainer.accelerator.is_main_process:
        draws = [draw for batch in next(iter(plan), []) for draw in batch][:8]
        examples = [
            resolve(trainer.config, trainer.flavour, trainer.samples, draw, trainer.index)
            for draw in draws
        ]
        heads = {"start": "from", "region": "mask", "pixel": "target"}
        shown = [
            {k: p[0] for k, p in e.pictures.items() if k in heads and len(p) == 1} for e in examples
        ]
        kinds = [kind for kind in heads if any(kind in row for row in shown)]
        rows = [[load_picture(row[k]) if k in row else None for k in kinds] for row in shown]
        sheet = edit_sheet(examples, rows, [heads[kind] for kind in kinds])
        run_log.picture("first_batch", sheet, 0)


LOAD_LORA = 'pipe.load_lora_weights("{file}")'


LOAD_LOKR = """# load_lora_weights refuses LoKr files, the transformer takes them
tensors, metadata = pipe.lora_state_dict("{file}", return_lora_metadata=True)
pipe.transformer.load_lora_adapter(tensors, metadata=metadata)"""


MODEL_CARD = """---
base_model: {base_model}
library_name: diffusers
tags: [image-to-image, lora, qwen-image-edit, {flavour}]
---
# LoRA for {base_model}

Trained with train_qwen_edit.py to step {step}; {method}, r {r}, alpha {lora_alpha} (folded into
the weights: load it at scale 1). References were encoded with `reference_area: {reference_area}`;
generate.py applies that by itself.

```python
import torch
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("{base_model}", torch_dtype=torch.bfloat16)
{load}
```

Instructions it was trained with:
{prompts}
"""


def write_card(trainer: QwenImageEditTrainer) -> None:
    """Write README.md: the model card."""
    about = about_lora(trainer)
    load = LOAD_LOKR if about["method"] == "lokr" else LOAD_LORA
    prompts = sorted({v.caption for s in trainer.samples for v in s.variants})[:5]
    text = MODEL_CARD.format(
        **about,
        prompts="\n".join(f"- {prompt}" for prompt in prompts),
        pipeline=trainer.flavour.pipeline_class,
        load=load.format(file=LORA_FILE),
    )
    utils.save_text(trainer.checkpoints.output_dir / "README.md", text)


# --- 11. config, main -----------------------------------------------------------------------------


class Config(Section):
    """train_qwen_edit.py: a LoRA for Qwen-Image-Edit from before/after pairs.

    --plan shows data, tokens, memory, disk and time; it loads and downloads nothing."""

    newcomer = (
        "model.pretrained_model_name_or_path",
        "model.base_model_precision",
        "model.lora.r",
        "data.dataset_configs.*.train_data_dir",
        "data.dataset_configs.*.resolution",
        "data.reference_area",
        "logging.output_dir",
        "optimizer.init_args",
        "train.max_train_steps",
        "validation.steps",
    )
    not_here = dict.fromkeys(
        (
            "buckets",
            "max_tokens_per_batch",
            "instruction",
            "sample_type",
            "suffix",
            "count",
            "draws",
        ),
        "it is gone; experiments/ shows how a copy of the script gets what it needs",
    ) | {
        "hf_dataset": "tools/pair_table.py writes a table of a Hub data set",
        "selected_control_indexes": "tools/pair_table.py chooses references",
        "quantize_activations": "weights alone are quantised",
        "from_image_mode": "from_image always leads to the target (bridge)",
        "step_rules": "another lr_scheduler.scheduler_type",
        "ema_update_interval": "the average is updated every step; ema_decay sets its length",
        **dict.fromkeys(
            ("recreate_cache_target", "recreate_cache_reference", "recreate_cache_caption"),
            "entries are named by their content, so what changed is built again",
        ),
    }

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

    def rules(self) -> dict[str, Any]:
        """Return {problem: whether it is there}."""
        return {
            "model.blocks_to_swap needs train.gradient_checkpointing: without it the backward pass "
            "holds the weights of every block": self.model.blocks_to_swap
            and not self.train.gradient_checkpointing
        }


def main() -> None:
    """Config -> audit -> fit, or with --plan only what it would be."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    given = [arg for arg in sys.argv[1:] if arg != "--plan"]
    config = utils.load_config(Config, given, check=audit)
    if len(given) < len(sys.argv) - 1:
        print(utils.load_tool("plan").plan(sys.modules[__name__], config))
    else:
        QwenImageEditTrainer(config).fit()


if __name__ == "__main__":
    utils.run_script(main)
