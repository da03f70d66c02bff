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


# --- 1. objective ---------------------------------------------------------------------------------


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
    """Weight of the loss where the mask is white; divided by the mean weight."""
    background_weight: float = Field(1.0, ge=0)
    """Weight of the loss where the mask is black."""
    difference_threshold: float = Field(0.1, gt=0, le=1)
    """Mean change of a channel, 0 to 1, that counts as wholly changed."""
    timestep_density: Literal["logit_normal", "uniform", "mode", "sigmoid"] = "logit_normal"
    """Density of sigma before the shift (mode: that of SD3)."""
    logit_mean: float = 0.0
    """Mean of logit_normal; larger means noisier."""
    logit_std: float = Field(1.0, gt=0)
    """Standard deviation of logit_normal; larger means wider."""
    mode_scale: float = 1.29
    """Scale of mode; above 0 favours the middle."""
    sigmoid_scale: float = Field(1.0, gt=0)
    """Scale of sigmoid(scale x normal); larger means wider."""
    timestep_shift: Literal["model"] | Annotated[float, Field(gt=0)] = "model"
    """Shift of sigma: as at inference ("model"), or s in s sigma / (1 + (s - 1) sigma)."""

    def rules(self) -> dict[str, Any]:
        """Return {problem: whether it is there}."""
        weights, name = self.foreground_weight + self.background_weight, self.loss_type
        return {
            f"loss_type: no loss '{name}'{nearest(name, LOSSES)}": name not in LOSSES,
            "foreground_weight and background_weight are both 0": weights == 0,
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
    trainer: QwenImageEditTrainer, batch: dict[str, Any], model: Any = None, shift: bool = True
) -> torch.Tensor:
    """Loss per sample, (B,) fp32, of a batch as collate() makes it, with noise and sigma (B,).

    model: None is the transformer being trained, with its distributed wrapper.
    """
    loss, noise, sigma = trainer.config.loss, batch["noise"], batch["sigma"].float()
    x0 = batch["pixel_latent"].float()
    if shift:
        sigma = shift_sigma(sigma, trainer.shift_mu(math.prod(token_grid(x0))))
    noisy = add_noise(batch.get("start_latent", x0).float(), noise, sigma)
    velocity = trainer.velocity(batch, noisy, sigma, model or trainer.transformer)
    error = LOSSES[loss.loss_type](velocity.float(), noise - x0, loss)
    if "region" not in batch:
        return error.flatten(1).mean(1)
    weight = region_weight(batch["region"], loss).expand_as(error).flatten(1)
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


def add_noise(x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """(1 - sigma) x0 + sigma noise; sigma (B,)."""
    sigma = sigma.view(-1, 1, 1, 1, 1)
    return (1 - sigma) * x0 + sigma * noise


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
    """How many of the newest checkpoints are kept."""
    resume_from_checkpoint: str | None = None
    """"latest" (the newest valid one; from step 0 if there is none) or a checkpoint folder."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Norm that gradients are scaled down to."""
    use_ema: bool = False
    """Keep a moving average of the adapter in fp32; saved beside it, under its own name."""
    ema_decay: float = Field(0.995, ge=0, lt=1)
    """Share of the moving average that stays per step; at step n at most (1 + n) / (10 + n)."""
    ema_device: Literal["accelerator", "cpu"] = "accelerator"
    """Where the moving average lives; cpu saves GPU memory and waits at every step."""
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
    config, accelerator, total = trainer.config, trainer.accelerator, trainer.total_steps()
    every, saves = config.logging.log_every, config.train.checkpointing_steps
    validates = config.validation.steps or math.inf
    stopped, ask_every, steps = False, 1, []  # steps since the last log line
    if config.validation.steps and trainer.global_step == 0:
        validate(trainer, run_log)
    bar = progress(None, "train", total=total, initial=trainer.global_step, unit="step")
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
    pretrained_weight: Path | None = None
    """LoRA file to start from (same method, r and target_modules) instead of from nothing."""

    def rules(self) -> dict[str, Any]:
        """Return {problem: whether it is there}."""
        try:
            re.compile(self.target_modules if isinstance(self.target_modules, str) else "")
        except re.error as error:
            return {f"target_modules: no regular expression: {error}": True}
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
    named: Any = lora.target_modules
    named = TARGET_SETS.get(named, named) if isinstance(named, str) else list(named)
    each = [named] if isinstance(named, str) else [[name] for name in named]
    if wrong := [one for one in each if not any(matches(n, one) for n in layers)] or not named:
        short = sorted({n.split(".", 2)[2] for n in layers if n.startswith("transformer_blocks.")})
        raise UserError(
            f"model.lora.target_modules: no layer matches {wrong}; there are the sets "
            f"{', '.join(TARGET_SETS)} and the layers {', '.join(short)}"
        )
    # the last block's text queries and outputs: nothing reads them, so they get no gradient, and
    # KEEP: DDP waits forever for parameters that never get one
    last = rf"transformer_blocks\.{len(transformer.transformer_blocks) - 1}"
    dead = rf"{last}\.(attn\.(add_q_proj|to_add_out)|txt_mlp\..*)"
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
    """Multiply the adapter's change, in lora_B or lokr_w1; DoRA's magnitudes stay."""
    own = [name for name in tensors if ".lora_B." in name or name.endswith(".lokr_w1")]
    return {**tensors, **{name: tensors[name] * factor for name in own}}


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
    told = {"lora_adapter_metadata": adapter, "image_edit_lora": about}
    metadata = {name: json.dumps(value, sort_keys=True) for name, value in told.items()}
    metadata["format"] = "pt"
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


def copy_into(parameters: Iterable[torch.Tensor], values: Iterable[torch.Tensor]) -> None:
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
    weight: float | None = Field(None, gt=0)
    """Chance of this combination; those without one share the rest."""


class DatasetConfig(Section):
    """One data set: suffix layout (image_configs), folders layout (target_dir) or a table."""

    id: str = ""
    """Name of the data set, for validation.eval_dataset_id; default is its folder's."""
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
    """Folders layout: folders of the references, in order; same relative stem."""
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
        given = [name for name in ("image_configs", "target_dir", "table") if getattr(self, name)]
        idle = {"caption", "caption_ext", "mask_dir", "conditioning_multidataset_sampling"}
        if self.target_dir or self.table:
            idle = {f"{kind}_configs" for kind in ("target", "reference", "caption", "batch")}
            idle |= {"caption_ext", "mask_dir", "reference_dirs"} if self.table else set()
        fields = DatasetConfig.model_fields
        unread = sorted(name for name in idle if getattr(self, name) != fields[name].default)
        crops = self.view_flip or self.view_scale < 1
        weights = sum(batch.weight or 0 for batch in self.batch_configs)
        problems = {
            "give one of image_configs, target_dir, table": len(given) != 1,
            f"{', '.join(unread)}: not read beside {given[:1]}; leave it out": unread,
            "reference_dirs: name at least one": self.target_dir and not self.reference_dirs,
            "view_flip, view_scale: for crops; set views above 1": self.views == 1 and crops,
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
    """Area of references: 1mp as the pipelines do, "target" as large as the target, or px."""


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
    found: list[tuple[str, str, str | None]] = []
    for name, [target] in ds.target_configs.items():
        place = f"target_configs.{name}.0"
        found.append((f"{place}.image", "image", target.image))
        found.append((f"{place}.from_image", "image", target.from_image))
    for name, references in ds.reference_configs.items():
        place = f"reference_configs.{name}"
        found += [(f"{place}.{i}.image", "image", r.image) for i, r in enumerate(references)]
    for name, caption in ds.caption_configs.items():
        place, shown = f"caption_configs.{name}", caption.reference_list
        found.append((f"{place}.image", "image", caption.image))
        meant = shown.reference_config if shown else None
        found.append((f"{place}.reference_list.reference_config", "reference", meant))
    for i, batch in enumerate(ds.batch_configs):
        for kind in ("target", "caption", "reference"):
            key = f"{kind}_config"
            found.append((f"batch_configs.{i}.{key}", kind, getattr(batch, key)))
        found.append((f"batch_configs.{i}.mask", "image", batch.mask))
    yield from ((place, kind, name) for place, kind, name in found if name)


def used_roles(ds: DatasetConfig) -> list[str]:
    """Return the image_configs that any combination uses."""
    roles, todo = set(), ["batch_configs."]
    for start in todo:
        for _, kind, name in (link for link in links(ds) if link[0].startswith(start)):
            if kind == "image":
                roles.add(name)
            else:
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


TABLE_COLUMNS = r"target|references|reference_\d+|prompt|mask"


def read_table(ds: DatasetConfig) -> Rows:
    """A CSV or JSONL table; relative paths count from train_data_dir or the table's folder."""
    table = Path(ds.table or "")
    table = table if table.is_file() else ds.train_data_dir / table
    rows: dict[str, Row] = {}
    problems: list[str] = []
    unread: set[str] = set()
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
            unread |= {c for c in record if not re.fullmatch(TABLE_COLUMNS, c)}
        except ValueError as error:
            problems.append(f"{table}: row {number}: {error}")
    if unread:
        log.warning("table %s: columns not read: %s", table, ", ".join(sorted(unread)))
    return rows, problems


def table_row(record: Any, roots: Sequence[Path]) -> Row:
    """Return the row of a record. Raises ValueError where it is none, or a file is missing."""
    if not isinstance(record, dict) or None in record:  # None: csv.DictReader
        raise ValueError("no record, or more cells than columns (quote a text with commas)")
    numbered = [column for column in record if column.startswith("reference_")]
    shown = record.get("references") or []
    shown = [shown] if isinstance(shown, str) else [*shown]
    shown += [record[c] for c in sorted(numbered, key=lambda c: (len(c), c)) if record[c]]
    if not record.get("target") or not shown:
        raise ValueError(f"no {'reference' if record.get('target') else 'target'}")
    named = {f"reference {i}": value for i, value in enumerate(shown, 1)}
    named |= {"target": record["target"], "mask": record.get("mask")}
    files = {}
    for role, value in named.items():
        places = [root / str(value) for root in roots if value]
        if there := [place for place in places if place.is_file()]:
            files[role] = there[0]
        elif value:
            raise ValueError(f"no file {places[0]}")
    prompts = record.get("prompt") or []
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
    files = row.files

    def shown_by(name: str | None) -> tuple[Reference, ...]:
        items = ds.reference_configs[name] if name else []
        return tuple(Reference(files[item.image], square(item.resize)) for item in items)

    for batch, weight in zip(ds.batch_configs, batch_weights(ds.batch_configs), strict=True):
        caption = ds.caption_configs[batch.caption_config]
        [target] = ds.target_configs[batch.target_config]
        references, shown = shown_by(batch.reference_config), caption.reference_list
        vision = shown_by(shown.reference_config) if shown else references
        area, rate = square(shown.resize) if shown else None, batch.caption_dropout
        text = files[caption.image].with_suffix(caption.ext)
        lines = read_captions(text, bool(ds.caption_lines)) if weight else ()
        for line in lines:
            yield Variant(
                target=files[target.image],
                references=references,
                vision=tuple(Reference(reference.path, area) for reference in vision),
                caption=line,
                resolution=target.resize or ds.resolution,
                start=files[target.from_image] if target.from_image else None,
                mask=files[batch.mask] if batch.mask else None,
                caption_dropout=config.data.caption_dropout_rate if rate is None else rate,
                vision_dropout=shown.dropout if shown else 0.0,
                vision_min=shown.min_length if shown else 0,
                weight=weight / len(lines),
            )


def square(side_px: int | None) -> int | None:
    """Return the area of a square, or None."""
    return side_px and side_px**2


def batch_weights(configs: Sequence[BatchConfig]) -> list[float]:
    """Chance of each combination: given weights, the rest shared equally; they sum to 1."""
    given = sum(config.weight or 0 for config in configs)
    without = sum(config.weight is None for config in configs)
    share = max(0.0, round((1 - given) / without, 9)) if without else 0.0
    weights = [share if config.weight is None else config.weight for config in configs]
    return [weight / sum(weights) for weight in weights]


def find_dataset(config: Config, number: int) -> tuple[list[Sample], list[str], list[str]]:
    """Samples, problems and skipped samples of one data set."""
    ds, root = (
        config.data.dataset_configs[number],
        config.data.dataset_configs[number].train_data_dir,
    )
    if not root.is_dir():
        return [], [f"data.dataset_configs.{number}: folder {root} does not exist"], []
    group, make = (read_table, plain_variants) if ds.table else (group_by_folder, plain_variants)
    needed = [role for role in role_folders(ds) if role != "mask"]
    if ds.image_configs:
        group, make, needed = group_by_suffix, combined_variants, used_roles(ds)
    rows, problems = group(ds)
    variants, broken = {}, []
    for name, row in sorted(rows.items()):
        lacking = [expected(ds, role, name) for role in needed if role not in row.files]
        if needed and len(lacking) == len(needed):  # only pictures that nothing uses
            mask = row.files.get("mask") if ds.target_dir else None
            broken += [f"mask {mask} has no target of its name"] if mask else []
        elif lacking:
            broken.append(f"sample '{name}' lacks its {' and '.join(lacking)}")
        else:
            try:
                variants[name] = tuple(make(config, ds, row))
            except ValueError as error:
                broken.append(str(error))
    held_out = choose_holdout(config, number, list(variants))
    samples = [Sample(name, number, name in held_out, v) for name, v in variants.items()]
    for name in sorted(set(ds.holdout) - set(rows)):
        problems.append(f"holdout: no sample '{name}'{nearest(name, sorted(rows))}")
    skipped = broken if ds.on_missing == "skip" else []
    problems += [] if skipped else broken
    evaluated = ds.name in config.validation.eval_dataset_id
    if not problems and not any(s.held_out == evaluated for s in samples):
        problems.append(f"no sample to train on in {root}")
    where = f"data.dataset_configs.{number}: "
    return samples, [where + p for p in problems], [where + text for text in skipped]


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


def check_regions(data: PairData) -> list[str]:
    """Problems of pictures that must lie on their target's pixels."""
    region, wrong = data.config.loss.region, {}
    for number, sample in enumerate(data.samples):
        strict = data.dataset(Draw(0, number)).conditioning_type == "reference_strict"
        for v in sample.variants:
            first = [r.path for r in v.references[: None if strict else region == "difference"]]
            aspect = data.index.aspect(v.target)
            for path in first + [v.mask] * (region == "file" and v.mask is not None):
                own = data.index.aspect(path)
                if not aligns(own, aspect):
                    text = "must show the same frame (loss.mask, reference_strict)"
                    wrong[f"{path}: aspect {own:.3f}, its target {aspect:.3f}; {text}"] = True
    return [*wrong]


def find_samples(config: Config, flavour: Flavour) -> tuple[PairData, list[str]]:
    """Pair, read captions, look at every picture -> (data, first problems of each kind).

    Everything is in output_dir/audit.json.
    """
    index = utils.FileIndex(config.cache.cache_dir if config.cache.use_cache else None)
    numbers = range(len(config.data.dataset_configs))
    found = [find_dataset(config, number) for number in numbers]
    samples = [sample for mine, _, _ in found for sample in mine]
    skipped = [text for _, _, left_out in found for text in left_out]
    unreadable = index.update(
        all_pictures(samples) + validation_pictures(config), utils.look_at_picture
    )
    trained = [sample for sample in samples if not sample.held_out]
    masked = sum(any(variant.mask for variant in sample.variants) for sample in samples)
    rules = {
        "data.dataset_configs: no data set is named": not found,
        "data.dataset_configs: every sample is held out": samples and not trained,
        "loss.mask: file, but no sample has a mask": config.loss.region == "file" and not masked,
    }
    groups = [
        *(wrong for _, wrong, _ in found),
        unreadable,
        [p for p, is_so in rules.items() if is_so],
    ]
    data = PairData(config, flavour, samples, index)
    groups.append([] if unreadable else check_regions(data))
    problems = [problem for group in groups for problem in group]
    report = {"samples": len(samples), "masks": masked, "problems": problems, "skipped": skipped}
    with contextlib.suppress(OSError):  # an unwritable output_dir is reported by audit()
        path = config.logging.output_dir / "audit.json"
        utils.save_text(path, json.dumps(report, indent=2, ensure_ascii=False))
    if skipped:
        log.warning("%d sample(s) skipped (on_missing: skip)\n%s", len(skipped), listed(skipped))
    shown = []
    for group in groups:  # ten of each kind by name; a data set may lack thousands of files
        more = [f"... and {len(group) - 10} more, all of them in audit.json"]
        shown += group[:10] + (more if len(group) > 10 else [])
    return data, shown


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


def transformer_settings(name_or_path: str) -> dict[str, Any]:
    """transformer/config.json; of the published models what differs from diffusers' defaults."""
    if name_or_path in PUBLISHED:  # no network for a plan or an audit
        return {"zero_cond_t": PUBLISHED[name_or_path].name == "edit-v3"}
    return read_model_json(name_or_path, "transformer/config.json")


def detect_flavour(name_or_path: str) -> Flavour:
    """2508, 2509 or 2511, from model_index.json and transformer/config.json. Raises UserError."""
    if name_or_path in PUBLISHED:
        return PUBLISHED[name_or_path]
    kind = read_model_json(name_or_path, "model_index.json").get("_class_name", "")
    named = {flavour.pipeline_class: flavour for flavour in PUBLISHED.values()}
    if kind not in named:
        raise UserError(f"{name_or_path} is a {kind or 'folder'}; wanted {' or '.join(named)}")
    conditioned = transformer_settings(name_or_path).get("zero_cond_t")
    return (
        named[kind]._replace(name="edit-v2") if "Plus" in kind and not conditioned else named[kind]
    )


def check_model(config: Config, precision: str) -> list[str]:
    """Problems of the model and of its settings that need no weights; `precision` of the blocks."""
    model, lora, name = config.model, config.model.lora, config.model.pretrained_model_name_or_path
    try:
        detect_flavour(name)
        n_blocks = transformer_settings(name).get("num_layers", 60)
    except UserError as error:
        return [f"model.pretrained_model_name_or_path: {error}"]
    parts = ("scheduler", "tokenizer", "processor", "text_encoder", "vae", "transformer")
    lacking = [part for part in parts if Path(name).is_dir() and not (Path(name) / part).is_dir()]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    nf4, dora = precision == "nf4-bnb", lora.method == "dora"
    # modulation is held by quanto in every quantised base, and PEFT has no DoRA for that
    quanto = precision.endswith("quanto") or (nf4 and lora.target_modules == "all-linear")
    rules = {
        f"pretrained_model_name_or_path: {name} has no {', '.join(lacking)} folder": lacking,
        "devices: for one process; several need it whole": model.devices and processes > 1,
        f"lora.method: no dora on layers in {precision}": dora and quanto,
        "lora.method: no lokr on nf4-bnb": nf4 and lora.method == "lokr",
        f"blocks_to_swap: the model has {n_blocks} blocks": model.blocks_to_swap > n_blocks,
    }
    problems = [f"model.{problem}" for problem, there in rules.items() if there]
    return problems + check_packages(*(["bitsandbytes"] if nf4 else []))


def check_2508(samples: Sequence[Sample]) -> list[str]:
    """Problems of data that 2508 cannot take: its prompt has a place for exactly one picture."""
    wrong = set()
    for sample in samples:
        for v in sample.variants:
            other = [r.path for r in v.vision] != [r.path for r in v.references]
            resized = any(r.area for r in (*v.vision, *v.references))
            fewer = v.vision_dropout and v.vision_min < 1
            if len(v.references) != 1 or other or resized or fewer:
                wrong.add(sample.dataset)
    text = (
        "2508 takes one reference, and shows its encoder what the VAE gets: no resize, no dropout"
    )
    return [f"data.dataset_configs.{number}: {text}" for number in sorted(wrong)]


def check_validation(config: Config, samples: Sequence[Sample], is_2508: bool) -> list[str]:
    """Problems of the validation settings (their pictures: find_samples)."""
    wanted, names = config.validation, [ds.name for ds in config.data.dataset_configs]
    something = wanted.samples or any(sample.held_out for sample in samples)
    rules: dict[str, Any] = {
        f"eval_dataset_id: wanted one data set '{name}'{nearest(name, names)}": names.count(name)
        != 1
        for name in wanted.eval_dataset_id
    }
    rules["steps: nothing to draw; name holdout, holdout_ratio, eval_dataset_id or samples"] = (
        wanted.steps and samples and not something
    )
    for i, sample in enumerate(wanted.samples):
        rules[f"samples.{i}.images: 2508 takes one"] = is_2508 and len(sample.images) > 1
    return [f"validation.{problem}" for problem, there in rules.items() if there]


# differs: each script audits its own config
def audit(config: Config) -> list[str]:
    """Return everything that can be known to be wrong before a model loads, one line each."""
    model, cache, tracker = config.model, config.cache, config.logging.report_to
    problems = check_model(config, model.precision)
    devices = {f"predict.devices.{part}": device for part, device in config.predict.devices}
    devices |= {f"model.devices.{i}": device for i, device in enumerate(model.devices)}
    places = {"logging.output_dir": config.logging.output_dir}
    if cache.use_cache:
        devices["cache.vae_encoder_device"] = cache.vae_encoder_device
        devices["cache.text_encoder_device"] = cache.text_encoder_device
        places["cache.cache_dir"] = cache.cache_dir
    problems += [problem for item in devices.items() for problem in check_device(*item)]
    problems += [problem for item in places.items() for problem in utils.check_writable(*item)]
    problems += check_packages(*([] if tracker in ("none", "all") else [tracker]))
    if model.lora.pretrained_weight and not model.lora.pretrained_weight.is_file():
        problems.append(f"model.lora.pretrained_weight: no file {model.lora.pretrained_weight}")
    flavour = detect_flavour(model.pretrained_model_name_or_path) if not problems else None
    data, wrong = find_samples(config, flavour or PUBLISHED["Qwen/Qwen-Image-Edit-2511"])
    is_2508 = flavour is not None and not flavour.vision_area
    problems += wrong + (check_2508(data.samples) if is_2508 else [])
    return problems + check_validation(config, data.samples, is_2508)


# --- 6. geometry, encoding and cache --------------------------------------------------------------


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

    source: Path | Image.Image
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
    box: tuple[float, ...] | None = None  # None: the middle
    flip: bool = False

    def on_target(self, whole: Picture) -> Picture:
        """Return a picture at the target's size: with its crop, or the middle of another frame."""
        same = aligns(whole.aspect, self.aspect)
        middle = cover_box(whole.aspect, self.size[0] / self.size[1])
        box = self.box if same and self.box else middle
        return whole._replace(size=self.size, box=box, flip=self.flip and same)

    def show(self, whole: Picture, area_px: float, strict: bool = True) -> Picture:
        """Return a reference of about that area: with the target's crop, or its own frame whole."""
        # KEEP: aligned references get the target's crop, or the edit no longer lies on its pixels
        if strict and aligns(whole.aspect, self.aspect):
            size = pick_size(area_px, self.size[0] / self.size[1])
            return self.on_target(whole)._replace(size=size)
        return whole._replace(size=pick_size(area_px, whole.aspect))


def whole_picture(source: Path | Image.Image, index: Any = None) -> Picture:
    """Return a picture as it is: of a file that the index knows, or in memory."""
    if isinstance(source, Image.Image):
        content = f"{draw_key(source.size, source.tobytes()):016x}"
        return Picture(source, content, source.size)
    facts = index[source]
    return Picture(source, facts["content"], (facts["width"], facts["height"]))


class PairData(torch.utils.data.Dataset):
    """The samples of a run; as a data set it turns lists of Draws into batches."""

    def __init__(self, config: Config, flavour: Flavour, samples: list[Sample], index: Any) -> None:
        self.config, self.flavour, self.samples, self.index = config, flavour, samples, index
        self.encoders: dict[str, str] = {}  # see encoder_hashes(); needed to read the cache
        self.held_out = [i for i, sample in enumerate(samples) if sample.held_out]
        self._examples: dict[tuple[Any, ...], Example] = {}
        self._tensors: dict[Path, torch.Tensor] = {}
        self._room = 2**29  # bytes left for _tensors: small data sets are read once

    def dataset(self, draw: Draw) -> DatasetConfig:
        """Return the data set that a draw's sample comes from."""
        return self.config.data.dataset_configs[self.samples[draw.sample].dataset]

    def resolve(self, draw: Draw, resolution: int | None = None) -> Example:
        """Return what a Draw shows, at `resolution` if given; remembered."""
        key = (*draw[1:], resolution)
        if key not in self._examples:
            self._examples[key] = self._resolve(draw, resolution)
        return self._examples[key]

    def _resolve(self, draw: Draw, resolution: int | None) -> Example:
        """ONE geometric transform for the target and all that lies on it."""
        sample, ds, data = self.samples[draw.sample], self.dataset(draw), self.config.data
        variant = sample.variants[draw.variant]
        whole = functools.partial(whole_picture, index=self.index)
        target = whole(variant.target)
        size = nearest_bucket(*target.size, resolution or variant.resolution)
        wanted = size[0] / size[1]
        frame = Frame(target.aspect, size, cover_box(target.aspect, wanted))
        if draw.view:  # EDIT HERE: augmentation (each view is cached); view 0 is the whole picture
            chance = ("view", self.config.seed, sample.dataset, sample.name, draw.view)
            scale = 1 - (1 - ds.view_scale) * uniform("scale", *chance)
            place = uniform("x", *chance), uniform("y", *chance)
            flip = ds.view_flip and uniform("flip", *chance) < 0.5
            frame = frame._replace(box=cover_box(target.aspect, wanted, scale, *place), flip=flip)

        def show(references: Iterable[Reference], area_px: float) -> tuple[Picture, ...]:
            strict = ds.conditioning_type != "reference_loose"
            return tuple(frame.show(whole(r.path), r.area or area_px, strict) for r in references)

        area_px = reference_area_px(data.reference_area, size)
        stay = range(len(variant.vision)) if draw.vision is None else draw.vision
        pictures = {
            "pixel": (frame.on_target(target),),
            "control": show(variant.references, area_px),
            "vision": show([variant.vision[i] for i in stay], self.flavour.vision_area or area_px),
        }
        if variant.start:
            pictures["start"] = (frame.on_target(whole(variant.start)),)
        region = self.config.loss.region
        if region == "file" and variant.mask:
            pictures["region"] = (frame.on_target(whole(variant.mask)),)
        elif region == "difference" and variant.references:
            before = frame.on_target(whole(variant.references[0].path))
            pictures["region"] = (before, *pictures["pixel"])
        empty = draw.dropped and data.caption_dropout_mode == "empty"
        return Example(sample.name, "" if empty else variant.caption, pictures)

    def shape(self, draw: Draw) -> tuple[Any, ...]:
        """Return what the samples of a batch share: kinds and sizes of the transformer's input."""
        pictures = self.resolve(draw._replace(view=0, vision=None, dropped=False)).pictures
        kinds = sorted(pictures.keys() - {"vision"})
        return tuple((kind, *(p.size for p in pictures[kind])) for kind in kinds)

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
        """One micro-batch, with sigma (B,) before the shift; the noise is drawn here as well."""
        seed, data, loss = self.config.seed, self.config.data, self.config.loss
        examples = [self.resolve(draw) for draw in draws]
        batch: dict[str, Any] = {"examples": examples}
        if self.config.cache.use_cache:
            batch = encoded(examples, self.read)
        width, height = examples[0].pictures["pixel"][0].size
        shape = (16, 1, height // 8, width // 8)
        batch |= {
            "noise": torch.stack([normal(shape, seed, "noise", d.visit) for d in draws]),
            "sigma": torch.tensor([sample_sigma(loss, seed, "sigma", d.visit) for d in draws]),
            "names": [example.name for example in examples],
        }
        weights = [self.dataset(draw).loss_weight for draw in draws]
        if any(weight != 1 for weight in weights):
            batch["loss_weight"] = torch.tensor(weights)
        if data.caption_dropout_mode == "zero" and any(draw.dropped for draw in draws):
            batch["zeroed"] = torch.tensor([draw.dropped for draw in draws])
        return batch

    def read(self, job: Job) -> torch.Tensor:
        """Return what lies in the cache. Raises ValueError where it is missing or damaged."""
        path = utils.entry_path(self.config.cache.cache_dir, job.key(self.encoders))
        if path in self._tensors:
            return self._tensors[path]
        [tensor] = utils.read_entry(path).values()
        if tensor.nbytes <= self._room:
            self._room -= tensor.nbytes
            self._tensors[path] = tensor
        return tensor


def encoded(examples: Iterable[Example], encode: Callable[[Job], torch.Tensor]) -> dict[str, Any]:
    """Tensors of examples of one shape -> a batch; text is padded with zeros.

    prompt_embed (B, T, D); prompt_embeds_mask (B, T) bool, None if nothing is padded;
    control_latent K x (B, 16, 1, hk, wk); pixel_latent, start_latent (B, 16, 1, h, w); region
    (B, 1, 1, h, w).
    """
    rows = [jobs_of(example) for example in examples]
    items = [{name: [encode(job) for job in jobs] for name, jobs in row.items()} for row in rows]
    embeds = [item.pop("prompt_embed")[0] for item in items]
    lengths = torch.tensor([len(embed) for embed in embeds])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]  # (B, T)
    batch: dict[str, Any] = {
        "prompt_embed": torch.nn.utils.rnn.pad_sequence(embeds, batch_first=True),
        "prompt_embeds_mask": mask if bool((lengths != lengths[0]).any()) else None,
    }
    for name in items[0]:
        stacked = [torch.stack(each) for each in zip(*(item[name] for item in items), strict=True)]
        batch[name] = stacked if name == "control_latent" else stacked[0]
    if "region" in batch:
        batch["region"] = batch["region"][:, :, None]
    return batch


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


def fill_cache(trainer: Trainer, jobs: dict[str, Job], again: Iterable[str]) -> int:
    """Encode what is missing and `again`, a share per process; return how many this one encoded.

    VAE and text encoder are loaded one after the other; with nothing to do none is.
    """
    accelerator, index = trainer.accelerator, trainer.data.index
    places = {key: utils.entry_path(trainer.cache_dir, key) for key in sorted(jobs)}
    # KEEP: shares of ALL entries; what is missing changes while other processes write
    share = list(places)[accelerator.process_index :: accelerator.num_processes]

    def check(path: Path) -> dict[str, Any]:
        """Read an entry; one that is damaged is deleted."""
        try:
            return {"tensors": len(utils.read_entry(path))}
        except ValueError:
            path.unlink(missing_ok=True)
            raise

    for problem in index.update([places[key] for key in share if places[key].exists()], check):
        log.warning("%s; it is built again", problem)
    mine = [key for key in share if key in again or not places[key].exists()]
    log.info("cache: %d entries, process 0 has %d to encode", len(jobs), len(mine))
    for label, is_prompt in (("pictures", False), ("prompts", True)):
        keys = [key for key in mine if (jobs[key].kind == "prompt") == is_prompt]
        for key in progress(keys, f"encode {label}", disable=not keys):
            utils.write_entry(trainer.cache_dir, key, {jobs[key].kind: trainer.encode(jobs[key])})
        if keys:  # KEEP: the encoders are never in memory together
            trainer.unload("vae", "text_encoder")
    index.update((places[key] for key in mine), lambda path: {})
    accelerator.wait_for_everyone()
    if lost := [key for key, path in places.items() if not path.exists()]:
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
    devices: list[str] = []
    """Devices that the transformer's blocks are spread over, e.g. [cuda:0, cuda:1]; one process."""
    blocks_to_swap: int = Field(0, ge=0)
    """Blocks that wait in CPU memory until they are needed; with gradient checkpointing."""
    lora: LoraConfig = LoraConfig()

    def rules(self) -> dict[str, Any]:
        """Return {problem: whether it is there}."""
        kind, swap = self.base_model_precision, self.blocks_to_swap
        other = self.quantize and kind not in ("no_change", "fp8-quanto")
        return {
            "quantize: true means fp8-quanto; leave it out beside another type": other,
            "blocks_to_swap: not with nf4-bnb": swap and kind == "nf4-bnb",
            "blocks_to_swap or several devices, not both": swap and len(self.devices) > 1,
        }

    @property
    def precision(self) -> str:
        """Return what the blocks are stored in, `quantize` resolved."""
        return "fp8-quanto" if self.quantize else self.base_model_precision


def check_device(name: str, value: str | None) -> list[str]:
    """Problems of a device setting on this machine; None is the default device."""
    try:
        torch.empty(0, device=value)
    except (RuntimeError, AssertionError) as error:
        return [f"{name}: '{value}': {str(error).splitlines()[0]}"]
    return []


def check_packages(*names: str) -> list[str]:
    """Problems of packages that the settings need and that are not installed."""
    lacking = [name for name in names if importlib.util.find_spec(name) is None]
    return [f"{name} is not installed: pip install {name}" for name in lacking]


QUANTO_TYPES = {"fp8": "qfloat8", "int8": "qint8", "int4": "qint4", "int2": "qint2"}
MODULATION = ("img_mod.", "txt_mod.", "norm")  # how names of modulation begin in a block


def find_weights(folder: Path) -> dict[str, Path]:
    """{tensor: file} of a diffusers component, one file or shards. Raises UserError."""
    name = "diffusion_pytorch_model.safetensors"
    if (folder / f"{name}.index.json").is_file():
        named = read_model_json(str(folder), f"{name}.index.json").get("weight_map", {})
        return {tensor: folder / file for tensor, file in named.items()}
    try:
        with safe_open(folder / name, framework="pt") as file:
            return dict.fromkeys(file.keys(), folder / name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"weights {folder / name} cannot be read: {error}") from error


def fill_parts(
    model: Any, folder: Path, dtype: torch.dtype, parts: dict[str, torch.device], precision: str
) -> Iterator[torch.nn.Module]:
    """Give a model without weights its parts, one by one, on their devices; blocks are quantised.

    One block at a time is in memory unquantised. With no_change the model equals
    from_pretrained(dtype=dtype) bit for bit.

    Raises:
        UserError: weights are missing, damaged or of another model.
    """
    weights = find_weights(folder)
    if wrong := sorted(weights.keys() ^ model.state_dict().keys()):
        raise UserError(f"{folder}: weights missing or not expected\n{listed(wrong, 3)}")
    for name, device in parts.items():
        part, tensors = model.get_submodule(name), {}
        mine = {key: file for key, file in weights.items() if key.startswith(f"{name}.")}
        try:
            for key, path in mine.items():
                # KEEP: closed again; what was read of an open file counts as memory
                with safe_open(path, framework="pt") as file:
                    tensor = file.get_tensor(key).to(device, dtype, copy=True)
                tensors[key.removeprefix(f"{name}.")] = tensor
            part.load_state_dict(tensors, assign=True)
        except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: another shape
            raise UserError(f"{folder}, {name}: {error}") from error
        if name[-1].isdigit() and precision != "no_change":
            quantize_block(part, precision)
        return_freed_memory()
        yield part.requires_grad_(False)


def return_freed_memory() -> None:
    """Call malloc_trim(0): glibc keeps freed pages, so loading would need twice the memory."""
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
        weight: Any = Params4bit(linear.weight.data, module=layer, **how)
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
    """Let quanto unpack 4 and 2 bits with torch; its own code is compiled at the first use."""
    from optimum import quanto

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        shifted = [packed >> shift for shift in range(0, 8, bits)]  # lowest bits first
        return torch.cat([part & (2**bits - 1) for part in shifted])

    for name in ("quanto_cpp", "quanto_cuda", "quanto_hip", "quanto_mps"):
        if quanto.is_extension_available(name):
            extension = quanto.get_extension(name)
            extension._lib = extension._lib or SimpleNamespace(unpack=unpack)


Places = dict[str, tuple[torch.device, torch.device]]


def placement(transformer: Any, devices: Sequence[torch.device], swap: int) -> Places:
    """{block or embedder: (where its weights live, where it computes)}.

    Blocks are spread over `devices` in order, in runs of equal length; `swap` of them, evenly
    spread so that there is time to copy, live in CPU memory.
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
    """QwenImageTransformer2DModel without weights (meta device)."""
    import diffusers
    from accelerate import init_empty_weights

    with init_empty_weights():
        return diffusers.QwenImageTransformer2DModel.from_config(settings)


def load_transformer(
    folder: Path, dtype: torch.dtype, precision: str, devices: Sequence[torch.device], swap: int
) -> Any:
    """The transformer, frozen, each part read (and quantised) straight to where it lives."""
    model = empty_transformer(read_model_json(str(folder), "config.json"))
    places, plain = placement(model, devices, swap), precision == "no_change"
    ways = {name: home if plain else device for name, (home, device) in places.items()}
    parts = fill_parts(model, folder, dtype, ways, precision)
    for home, _ in progress(places.values(), "load transformer", leave=False):
        move(next(parts), home)
    mark_quantized(model.eval().requires_grad_(False), precision)
    connect(model, places)
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


def place(transformer: Any, places: Places) -> None:
    """Move a transformer that is already loaded. Raises UserError if its blocks are swapped."""
    if hasattr(transformer, "block_swap"):
        raise UserError("with model.blocks_to_swap the transformer stays on its device")
    for name, (home, _) in places.items():
        move(transformer.get_submodule(name), home)
    connect(transformer, places)


def connect(transformer: Any, places: Places) -> None:
    """Add hooks that carry activations between devices, or weights between CPU and device."""
    from accelerate.utils import send_to_device

    transformer.places = places
    blocks = {name: transformer.get_submodule(name) for name in places if name[-1].isdigit()}
    swapped = {
        int(name.rpartition(".")[2]): block
        for name, block in blocks.items()
        if places[name][0] != places[name][1]
    }
    first, last = next(iter(places.values()))[1], places["proj_out"][1]
    if swapped:
        transformer.block_swap = BlockSwap(swapped, first)
        transformer.register_forward_pre_hook(lambda *_: transformer.block_swap.begin())
        return_freed_memory()  # pinned memory has taken its place
    if first == last:
        return

    def carry(device: torch.device, module: Any, args: Any, kwargs: Any) -> Any:
        return send_to_device(args, device), send_to_device(kwargs, device)

    # temb, text, rope, mask ... go to each block's device, the result back to the first
    for name, part in {**blocks, "norm_out": transformer.norm_out}.items():
        hook = functools.partial(carry, places[name][1])
        part.register_forward_pre_hook(hook, with_kwargs=True)
    transformer.register_forward_hook(lambda *args: send_to_device(args[-1], first))


class BlockSwap:
    """Blocks whose frozen weights lie in (pinned) CPU memory and visit the device for their turn.

    While one works, the next is copied; there are never more on the device. Gradient checkpointing
    makes the order known: up in the forward pass, down in the backward pass, where every block is
    computed once more. Parameter objects are replaced, not `.data`: autograd keeps the GPU copy
    until the block's backward, and it goes with that.
    """

    def __init__(self, blocks: dict[int, torch.nn.Module], device: torch.device) -> None:
        self.numbers, self.device = sorted(blocks), device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.homes: dict[int, list[tuple[dict[str, Any], str, torch.nn.Parameter]]] = {}
        self.here: dict[int, tuple[list[torch.nn.Parameter], Any]] = {}  # copies, their event
        self.keep: int | None = None  # not to be removed after its turn
        self.last = -1  # the block that worked last in this pass
        for number, block in blocks.items():
            homes = self.homes[number] = []
            for part in block.modules():
                for name, value in part._parameters.items():
                    if value is not None:
                        pin = torch.Tensor.pin_memory
                        home = frozen(map_tensor(value, pin)) if self.stream else value
                        homes.append((part._parameters, name, home))
                for name, buffer in part._buffers.items():  # quanto's scales
                    part._buffers[name] = buffer.to(device) if buffer is not None else None
            self._put(number, [home for *_, home in homes])
            block.register_forward_pre_hook(functools.partial(self._enter, number))
            # KEEP always_call: recomputation ends blocks early, by an exception
            leave = functools.partial(self._leave, number)
            block.register_forward_hook(leave, always_call=True)

    def _put(self, number: int, parameters: Iterable[torch.nn.Parameter]) -> None:
        for (table, name, _), parameter in zip(self.homes[number], parameters, strict=True):
            table[name] = parameter

    def begin(self) -> None:
        """Start the first block on its way, before each forward pass."""
        self.last = -1
        self._fetch(self.numbers[0])

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
        with torch.no_grad():
            copies = [frozen(map_tensor(home, copy)) for *_, home in self.homes[number]]
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
    """Seed of the noise of the pictures and of the loss."""
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


class Sampling(NamedTuple):
    """How a picture is drawn."""

    steps: int = 20
    true_cfg_scale: float = 4.0
    negative_prompt: str | None = ""  # None: no guidance
    seed: int = 0

    def jobs(self, example: Example) -> list[Job]:
        """Return the prompt of an example and, for guidance, the negative one."""
        [prompt] = jobs_of(example)["prompt_embed"]
        if self.true_cfg_scale <= 1 or self.negative_prompt is None:
            return [prompt]
        return [prompt, prompt._replace(caption=self.negative_prompt)]


def draw_edit(
    trainer: Trainer, example: Example, how: Sampling, encode: Callable[[Job], torch.Tensor]
) -> Image.Image:
    """Draw the target of an example: the pixels that the diffusers pipelines give.

    encode(job) gives what lies in the cache.
    """
    transformer, (width, height) = trainer.bare_transformer(), example.pictures["pixel"][0].size
    references = [encode(job)[None] for job in jobs_of(example)["control_latent"]]
    embeds = [encode(job)[None] for job in how.jobs(example)]
    device, dtype = transformer.device, embeds[0].dtype
    generator, shape = torch.Generator().manual_seed(how.seed), (1, 16, 1, height // 8, width // 8)
    noise = torch.randn(shape, generator=generator, dtype=dtype).to(device)
    scheduler = type(trainer.scheduler).from_config(trainer.scheduler.config)
    references = [reference.to(device, dtype) for reference in references]
    positive, *negative = (embed.to(device) for embed in embeds)
    # fp32 LoRA on a bf16 base: as in training
    mixed = bool(getattr(transformer, "peft_config", None)) and dtype != torch.float32
    with torch.autocast(device.type, dtype, enabled=mixed):
        latents = denoise(
            *(transformer, scheduler, noise, references, positive, how.steps),
            *(negative[0] if negative else None, how.true_cfg_scale),
        )
    return Image.fromarray(trainer.decode_vae_latent(latents)[0])


def edit_example(
    trainer: Trainer, pictures: Sequence[Picture], prompt: str, size: Sequence[int | None] = ()
) -> Example:
    """What an edit without a target shows the model, by the rules of training.

    pictures: each whole, at its own size. `pixel` of the result is the main one (2508: the first,
    else the last) at the size that is drawn: `size` (W, H) px, down to a multiple of 16, or 1 MP
    (the training size if references are as large as the target).
    """
    datasets, about = trainer.config.data.dataset_configs, about_lora(trainer)
    main = pictures[-1 if trainer.flavour.vision_area else 0]
    aligned, usual = about["reference_area"] == "target", pick_size(AREA_1MP, main.aspect)
    if aligned and datasets:
        usual = nearest_bucket(*main.size, datasets[0].resolution)
    given = [side or own for side, own in zip(size or (None, None), usual, strict=True)]
    width, height = (side // 16 * 16 for side in given)
    aspects = [picture.aspect for picture in pictures]
    # the frame that references share: the main one's, or of the one nearest to width x height
    near = min(aspects, key=lambda aspect: abs(math.log(aspect / (width / height))))
    frame = Frame(near if any(size) else main.aspect, (width, height))
    area_px = reference_area_px(about["reference_area"], frame.size)
    areas = {"control": area_px, "vision": float(about["vision_area"] or area_px)}
    shown = {kind: tuple(frame.show(p, a, aligned) for p in pictures) for kind, a in areas.items()}
    return Example("", prompt, {"pixel": (main._replace(size=frame.size),), **shown})


# two in each quarter: fixed noise levels of the validation loss
VALIDATION_SIGMAS = tuple((i + 0.5) / 8 for i in range(8))


def validation_pictures(config: Config) -> list[Path]:
    """The picture files of validation.samples, once, sorted; none when nothing is validated."""
    samples = config.validation.samples if config.validation.steps else []
    return sorted({path for sample in samples for path in sample.images})


def validation_sampling(config: Config) -> Sampling:
    """Return how validation draws."""
    wanted = config.validation
    steps, scale = wanted.num_inference_steps, wanted.true_cfg_scale
    return Sampling(steps, scale, wanted.negative_prompt, wanted.seed)


def validation_edits(trainer: Trainer) -> list[tuple[Example, bool]]:
    """Rows of the sheet: (example, whether it has a target), held-out pairs, then samples."""
    wanted, data = trainer.config.validation, trainer.data
    side_px, numbers = wanted.resolution, data.held_out[: wanted.max_samples]
    if not wanted.steps:
        return []
    edits = [(data.resolve(Draw(0, number), side_px), True) for number in numbers]
    for sample in wanted.samples:
        pictures = [whole_picture(path, data.index) for path in sample.images]
        main = pictures[-1 if trainer.flavour.vision_area else 0]
        size = pick_size(side_px**2, main.aspect) if side_px else ()
        example = edit_example(trainer, pictures, sample.prompt, size)
        edits.append((example._replace(name=sample.images[-1].stem), False))
    return edits


@torch.no_grad()
def validate(trainer: Trainer, run_log: RunLog) -> None:
    """Losses and the sheet; the work is shared out over the processes."""
    step, main = trainer.global_step, trainer.accelerator.is_main_process
    transformer = trainer.bare_transformer()
    transformer.eval()
    values, rows = validation_losses(trainer), validation_rows(trainer)
    transformer.train()
    if values:
        run_log.values(step, values)
        if main:
            tqdm.write(f"step {step} validation loss {values['validation_loss']:.4f}")
    if rows and main:
        heads = ["base", "LoRA", *(["EMA"] if trainer.ema else [])]
        heads += ["target"] if trainer.data.held_out else []
        sheet = edit_sheet([e for e, _ in rows], [row for _, row in rows], heads)
        run_log.picture(f"step_{step:06d}", sheet, step)
    trainer.accelerator.wait_for_everyone()


def validation_losses(trainer: Trainer) -> dict[str, float]:
    """validation_loss, and by quartile of sigma (q1: the least noise); again for the EMA."""
    values = {}
    for suffix in ("", "_ema") if trainer.ema else ("",):
        with trainer.averaged(ema=bool(suffix)):
            losses = fixed_noise_losses(trainer).mean(0).tolist()
        values[f"validation_loss{suffix}"] = sum(losses) / len(losses)
        for i in range(4):
            values[f"validation_loss{suffix}_q{i + 1}"] = sum(losses[2 * i : 2 * i + 2]) / 2
    return values if trainer.data.held_out else {}


def fixed_noise_losses(trainer: Trainer) -> torch.Tensor:
    """Loss of every held-out pair at every sigma, (pairs, 8) fp32, on every process.

    Always the same noise, so small changes mean something; no dropout, sigma not shifted.
    """
    accelerator, data, seed = trainer.accelerator, trainer.data, trainer.config.validation.seed
    losses = torch.zeros(len(data.held_out), len(VALIDATION_SIGMAS), device=trainer.device)
    every = list(itertools.product(*map(range, losses.shape)))
    mine = every[accelerator.process_index :: accelerator.num_processes]
    for row, places in itertools.groupby(mine, key=lambda place: place[0]):
        example = data.resolve(Draw(0, data.held_out[row]))
        batch = trainer.to_device(encoded([example], trainer.through_cache))
        for _, column in places:
            level = VALIDATION_SIGMAS[column]
            noise = normal(batch["pixel_latent"].shape, seed, example.name, level)
            drawn = trainer.to_device({"noise": noise, "sigma": torch.tensor([level])})
            # KEEP the bare transformer: processes do not call it equally often
            loss = compute_loss(trainer, batch | drawn, trainer.bare_transformer(), shift=False)
            losses[row, column] = loss[0]
    return accelerator.reduce(losses, "sum")  # each is 0 on all processes but one


def validation_rows(trainer: Trainer) -> list[tuple[Example, list[Any]]]:
    """Rows of the sheet, drawn by all processes: base | LoRA | EMA | target, as far as there."""
    from accelerate.utils import gather_object

    accelerator, edits, drawn = trainer.accelerator, validation_edits(trainer), []
    mine = range(accelerator.process_index, len(edits), accelerator.num_processes)
    for number in progress(mine, "validation pictures", leave=False):
        example, has_target = edits[number]
        try:
            row: list[Any] = draw_row(trainer, number, example)
            target = load_picture(example.pictures["pixel"][0]) if has_target else None
            drawn.append((number, [*row, target] if trainer.data.held_out else row))
        except torch.OutOfMemoryError:
            text = "out of memory, left out (a smaller validation.resolution helps)"
            tqdm.write(f"validation of {example.name}: {text}; training goes on")
        if trainer.use_cache:  # KEEP: not in the except clause, where the error holds the tensors
            trainer.unload("vae", "text_encoder")
    rows = sorted(gather_object(drawn), key=lambda row: row[0])
    return [(edits[number][0], row) for number, row in rows]


def draw_row(trainer: Trainer, number: int, example: Example) -> list[Image.Image]:
    """Base, LoRA and, if there is one, EMA; the base is drawn once in a run."""
    transformer, how = trainer.bare_transformer(), validation_sampling(trainer.config)
    draw = functools.partial(draw_edit, trainer, example, how, trainer.through_cache)
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


# --- 9. the order of samples ----------------------------------------------------------------------


class StepPlan:
    """For every optimizer step the micro-batches of this process, from `first_step` on.

    One step takes `size` samples, whatever the processes, batch size and accumulation; process r
    of n gets the r-th n-th of them, cut into micro-batches of one shape. So the same samples meet
    in a step, however the work is split. Every epoch visits each sample `repeats` times (the last
    step of an epoch is filled up from its beginning).
    """

    def __init__(self, data: PairData, accelerator: Any, first_step: int = 0) -> None:
        self.data, self.first_step, train = data, first_step, data.config.train
        self.rank, self.processes = accelerator.process_index, accelerator.num_processes
        batch_size = data.config.data.batch_size
        self.size = batch_size * train.gradient_accumulation_steps * self.processes
        numbers = sorted(set(range(len(data.samples))) - set(data.held_out))
        repeats = {number: data.dataset(Draw(0, number)).repeats for number in numbers}
        self.visits = [number for number in numbers for _ in range(repeats[number])]
        self.steps_per_epoch = math.ceil(len(self.visits) / self.size)
        epochs = train.num_epochs or math.inf
        self.steps = int(min(train.max_train_steps, epochs * self.steps_per_epoch))

    def draw(self, visit: int, number: int) -> Draw:
        """Return everything random about one visit but its noise."""
        seed, sample = self.data.config.seed, self.data.samples[number]
        views = self.data.dataset(Draw(0, number)).views
        chance = uniform(seed, "batch_config", visit) * sum(v.weight for v in sample.variants)
        which = 0
        while which < len(sample.variants) - 1 and chance >= sample.variants[which].weight:
            chance -= sample.variants[which].weight
            which += 1
        variant, view = sample.variants[which], int(uniform(seed, "view", visit) * views)
        dropped = uniform(seed, "caption_dropout", visit) < variant.caption_dropout
        return Draw(visit, number, which, view, keep_references(variant, seed, visit), dropped)

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
                yield self.micro_batches(draws[self.rank * share : (self.rank + 1) * share])
                step += 1

    def micro_batches(self, draws: Sequence[Draw]) -> list[list[Draw]]:
        """Cut into batches of one shape, at most batch_size each."""
        batches: list[list[Draw]] = []
        for draw in draws:
            shape = self.data.shape(draw)
            alike = [batch for batch in batches if self.data.shape(batch[0]) == shape]
            if alike and len(alike[-1]) < self.data.config.data.batch_size:
                alike[-1].append(draw)
            else:
                batches.append([draw])
        return batches

    def __len__(self) -> int:
        return max(0, self.steps - self.first_step)


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


# --- 10. the trainer ------------------------------------------------------------------------------

Device = torch.device | str | None


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
        self.data = PairData(config, self.flavour, [], utils.FileIndex(None))
        limit = config.train.checkpoints_total_limit
        self.checkpoints = utils.Checkpoints(config.logging.output_dir, limit)
        self.base_pictures: dict[int, Image.Image] = {}  # row of the validation sheet: no LoRA
        self.drawn = 0  # batches of this step, from a loader of the user's, that got noise here

    # -- loading and devices

    @property
    def device(self) -> torch.device:
        """Return the training device; of several the first."""
        from accelerate import PartialState

        if self.config.model.devices:
            return torch.device(self.config.model.devices[0])
        state = self.accelerator or PartialState(cpu=not torch.accelerator.is_available())
        return state.device

    @property
    def cache_exist(self) -> bool:
        """Return whether cache_dir holds any entry."""
        return any(self.cache_dir.glob("??/??/*.safetensors"))

    def checkpoint(self, *parts: str) -> Path:
        """Return the folder of the base; from the Hub only these parts are fetched."""
        name = self.config.model.pretrained_model_name_or_path
        return utils.fetch_checkpoint(name, *(f"{part}/*" for part in parts))

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
            folder = self.checkpoint("scheduler")
            self.scheduler = kind.from_pretrained(folder, subfolder="scheduler")
        if "vae" in parts and self.vae is None:
            kind = diffusers.AutoencoderKLQwenImage
            self.vae = kind.from_pretrained(self.checkpoint("vae"), subfolder="vae", **how)
            encode_stills_in_2d(self.vae.eval().requires_grad_(False))
        if "text_encoder" in parts and self.text_pipeline is None:
            folder = self.checkpoint("text_encoder", "tokenizer", "processor", "scheduler")
            how |= {"processor": load_processor(folder / "processor")}
            kind = getattr(diffusers, self.flavour.pipeline_class)
            pipeline = kind.from_pretrained(folder, transformer=None, vae=None, **how)
            self.text_pipeline, self.qwen_vl = pipeline, pipeline.text_encoder
            self.qwen_vl.eval().requires_grad_(False)
            self.tokenizer, self.processor = pipeline.tokenizer, pipeline.processor
        if "transformer" in parts and self.transformer is None:
            self.place_transformer(self.device)

    def unload(self, *parts: str) -> None:
        """Forget components ("vae", "text_encoder", "transformer") and free their memory."""
        names = {"text_encoder": ("qwen_vl", "text_pipeline")}
        for part in parts:
            for name in names.get(part, (part,)):
                setattr(self, name, None)
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
        if self.data.samples:
            return
        with self.accelerator.main_process_first():  # the others see what process 0 recorded
            self.data, problems = find_samples(self.config, self.flavour)
        if problems:
            raise UserError(f"{len(problems)} problem(s)\n{listed(problems)}")
        self.find_encoders()

    def find_encoders(self) -> None:
        """Hash the encoders, whose hashes are part of every cache entry's name."""
        if self.use_cache:
            folder = self.checkpoint("vae", "text_encoder", "tokenizer", "processor")
            self.data.encoders = encoder_hashes(folder, self.flavour, self.weight_dtype)

    # -- encoding

    @torch.no_grad()
    def encode_image_embedding(self, image: Any, device: Device = None) -> torch.Tensor:
        """Picture (sides a multiple of 16 px) -> normalised posterior mode (1, 16, 1, h, w)."""
        self.load_model(["vae"])
        self.vae.to(device or self.device)
        pixels = to_pixels(as_image(image)).to(self.vae.device, self.vae.dtype).unsqueeze(2)
        latents = self.vae.encode(pixels).latent_dist.mode()
        mean, std = vae_statistics(self.vae, latents)
        return (latents - mean) / std

    @torch.no_grad()
    def encode_prompt_image_embedding(
        self, prompt: str, image: Any, device: Device = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Instruction and picture(s) -> embedding (1, T, D), mask (1, T) of ones."""
        self.load_model(["text_encoder"])
        place = torch.device(device or self.device)
        self.qwen_vl.to(place)
        shown: Any = [as_image(i) for i in (image if isinstance(image, list | tuple) else [image])]
        if not self.flavour.vision_area:  # 2508's template has one picture slot
            [shown] = shown
        encode = self.text_pipeline.encode_prompt
        embeds, _ = encode(prompt=prompt, image=shown or None, device=place)
        return embeds, torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)

    def _encode_empty_prompt(
        self, image: Any, device: Device = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The empty instruction with the same pictures -> embedding (T, D), mask (T,)."""
        embeds, mask = self.encode_prompt_image_embedding("", image, device)
        return embeds[0], mask[0]

    @torch.no_grad()
    def decode_vae_latent(self, latents: torch.Tensor) -> np.ndarray:
        """Normalised latents (B, 16, 1, h, w) -> pictures (B, H, W, 3) uint8."""
        self.load_model(["vae"])
        latents = latents.to(self.vae.device, self.vae.dtype)
        mean, std = vae_statistics(self.vae, latents)
        # KEEP: divided by 1/std as the pipeline does; times std differs in the last bit
        pixels = self.vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0][:, :, 0]
        return np.stack([np.asarray(to_image(each)) for each in pixels])

    def encode(self, job: Job, vae: Device = None, text_encoder: Device = None) -> torch.Tensor:
        """Return what lies in the cache: latent (16, 1, h, w), prompt (T, D), region (1, h, w).

        vae, text_encoder: devices; None is what the config says.
        """
        if job.kind == "region":
            return region_map(job.pictures)
        cache, images = self.config.cache, [load_picture(picture) for picture in job.pictures]
        if job.kind == "latent":
            return self.encode_image_embedding(images[0], vae or cache.vae_encoder_device)[0].cpu()
        device = text_encoder or cache.text_encoder_device
        return self.encode_prompt_image_embedding(job.caption, images, device)[0][0].cpu()

    def through_cache(self, job: Job, *devices: Device) -> torch.Tensor:
        """Read an entry, or encode and write it."""
        if not self.use_cache:
            return self.encode(job, *devices)
        with contextlib.suppress(ValueError):  # missing or damaged: encode it
            return self.data.read(job)
        tensors = {job.kind: self.encode(job, *devices)}
        utils.write_entry(self.cache_dir, job.key(self.data.encoders), tensors)
        return self.data.read(job)

    def examples_of(self, batch: dict[str, Any]) -> list[Example]:
        """Pictures of a batch {"image": [...], "control": [[...]], "prompt": [...]} -> Examples.

        Pictures are PIL or HWC uint8; "control" holds a picture or a list of them per sample.
        """
        found = []
        rows = zip(batch["image"], batch["control"], batch["prompt"], strict=True)
        for image, control, prompt in rows:
            several = control if isinstance(control, list | tuple) else [control]
            target, *wholes = (whole_picture(as_image(i)) for i in (image, *several))
            size = pick_size(target.size[0] * target.size[1], target.aspect)
            area_px = reference_area_px(self.config.data.reference_area, size)
            areas = {"control": area_px, "vision": self.flavour.vision_area or area_px}
            frame = Frame(target.aspect, size)
            shown = {k: tuple(frame.show(w, a, False) for w in wholes) for k, a in areas.items()}
            found.append(Example("", prompt, {"pixel": (target._replace(size=size),), **shown}))
        return found

    def cache_step(
        self, batch: dict[str, Any], vae_device: Device = None, text_device: Device = None
    ) -> list[dict[str, Any]]:
        """Encode the pictures and prompts of a batch and keep them in the cache.

        Returns per sample: pixel_latent, control_latent (list), prompt_embed and
        empty_prompt_embed (T, D) with their masks (T,).
        """
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
        """Return every entry that training and validation can ask for: {key: what to encode}.

        renewed: only those of data sets with recreate_cache.
        """
        jobs: list[Job] = []
        for draw in self.data.possible_draws():
            if self.data.dataset(draw).recreate_cache or not renewed:
                jobs += itertools.chain(*jobs_of(self.data.resolve(draw)).values())
        for example, _ in [] if renewed else validation_edits(self):
            jobs += jobs_of(example)["control_latent"]
            jobs += validation_sampling(self.config).jobs(example)
        return {job.key(self.data.encoders): job for job in jobs}

    def cache_embeddings(self, train_dataloader: Iterable[dict[str, Any]] | None = None) -> int:
        """Encode what is missing: all that the config can ask for, or the batches of a loader.

        Returns how many entries this process encoded (of a loader: samples).
        """
        self.setup_accelerator()
        if train_dataloader is None:
            self.find_data()
            return fill_cache(self, self.cache_jobs(), self.cache_jobs(renewed=True))
        self.find_encoders()
        count = sum(len(self.cache_step(batch)) for batch in train_dataloader)
        self.unload("vae", "text_encoder")
        return count

    # -- LoRA and quantisation

    @property
    def precision(self) -> str:
        """Return what blocks are stored in; `trainer.quantize = True` before loading means fp8."""
        precision = self.config.model.precision
        return "fp8-quanto" if self.quantize and precision == "no_change" else precision

    def quantize_model(self, model: Any, device: Device = None) -> Any:
        """Quantise the blocks of a loaded transformer in place (no_change: to fp8), on `device`.

        What the trainer loads itself is quantised while it loads, which takes less memory.
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
        if self.transformer is None:
            folder = self.checkpoint("transformer") / "transformer"
            how = self.weight_dtype, self.precision, devices, model.blocks_to_swap
            self.transformer = load_transformer(folder, *how)
        elif self.precision != "no_change" and not hasattr(self.transformer, "quantized_to"):
            self.quantize_model(self.transformer)
        places = placement(self.transformer, devices, model.blocks_to_swap)
        if getattr(self.transformer, "places", None) != places:
            place(self.transformer, places)

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
        pictures = [whole_picture(as_image(image)) for image in images]
        example = edit_example(self, pictures, prompt, (width, height))
        places = {"vae": self.vae.device, "text_encoder": self.qwen_vl.device}
        how = Sampling(num_inference_steps, true_cfg_scale, negative_prompt, seed)
        return np.asarray(draw_edit(self, example, how, functools.partial(self.encode, **places)))

    # -- training

    def configure_optimizers(self) -> None:
        """Make optimizer, learning rate schedule (counts optimizer steps) and moving average."""
        config = self.config
        self.optimizer = make_optimizer(config.optimizer, self.trainable())
        # KEEP: accelerate must not wrap it, or it would go as many steps as there are processes
        steps = self.total_steps()
        self.lr_scheduler = make_schedule(config.lr_scheduler, self.optimizer, steps)
        if config.train.use_ema:
            self.ema = MovingAverage(self.trainable(), config.train)

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
        return self._training_step_cached(batch | encoded(examples, self.encode))

    def _compute_loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """Loss per sample, (B,): compute_loss()."""
        return compute_loss(self, batch)

    def to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Send the tensors of a batch to the training device, without waiting for it."""
        from accelerate.utils import send_to_device

        pictures = ("examples", "image", "control")
        tensors = {name: value for name, value in batch.items() if name not in pictures}
        return send_to_device(tensors, self.device, non_blocking=True)

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
            if main:
                self._save_adapters(output_dir)
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
            text = "nothing of it was saved. Lower the learning rate"
            raise UserError(f"the weights of step {global_step} are not finite; {text}")
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
        if self.ema:
            copy_into(self.ema.averages, saved["ema"])
        self.global_step = step
        log.info("resumed from %s (step %d)", folder, step)


Trainer = QwenImageEditTrainer


def _as_is(value: Any) -> Any:
    """Collate function of a loader whose data set makes whole batches."""
    return value


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


def batch_size(batch: dict[str, Any]) -> int:
    """Samples in a batch."""
    return len(next(batch[k] for k in ("pixel_latent", "examples", "image") if k in batch))


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


def trained_as(trainer: Trainer) -> dict[str, Any]:
    """What decides the result; a run that continues must have the same."""
    config, index = trainer.config, trainer.data.index
    sections = {"model", "data", "optimizer", "lr_scheduler", "train", "loss", "seed"}
    values = flat_settings(config.model_dump(mode="json", include=sections))
    seen = [
        (
            *(sample.dataset, sample.name, sample.held_out),
            [(v.caption, [index[f]["content"] for f in v.files()]) for v in sample.variants],
        )
        for sample in trainer.data.samples
    ]
    size = config.data.batch_size * config.train.gradient_accumulation_steps
    return {
        **{path: value for path, value in values.items() if not re.fullmatch(FREE_TO_CHANGE, path)},
        "samples (names, captions, pictures)": cache_key("samples", seen=seen),
        "samples per step": size * trainer.accelerator.num_processes,
    }


def inference_rules(trainer: Trainer) -> dict[str, list[Any]]:
    """How large references were shown in training; inference takes the first of each."""
    variants = [v for s in trainer.data.samples for v in s.variants if not s.held_out]
    usual = trainer.config.data.reference_area, trainer.flavour.vision_area
    shown = Counter(r.area or usual[0] for v in variants for r in v.references)
    seen = Counter(r.area or usual[1] for v in variants for r in v.vision)
    rules = {"reference_area": [v for v, _ in shown.most_common()] or [usual[0]]}
    return rules | {"vision_area": [v for v, _ in seen.most_common()] or [usual[1]]}


def about_lora(trainer: Trainer) -> dict[str, Any]:
    """What generate.py must know to sample as this LoRA was trained, and the model card says."""
    datasets, lora = trainer.config.data.dataset_configs, trainer.config.model.lora
    prompts = {v.caption for sample in trainer.data.samples for v in sample.variants}
    return {
        "script": Path(__file__).name,
        "base_model": trainer.config.model.pretrained_model_name_or_path,
        "flavour": trainer.flavour.name,
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
            text = "several %s are trained (%s): predict() and generate.py use the first"
            log.warning(text, name, ", ".join(map(str, (first, *others))))
    data, plan = trainer.data, trainer.step_plan(trainer.global_step)
    log.info(
        "%s on %s, %s | %d samples, %d held out | %d a step, %d steps an epoch | steps %d..%d",
        *(trainer.flavour.name, trainer.device, trainer.weight_dtype),
        *(len(data.samples), len(data.held_out), plan.size, plan.steps_per_epoch),
        *(plan.first_step, plan.steps),
    )
    if plan.first_step == 0 and trainer.accelerator.is_main_process:
        draws = [draw for batch in next(iter(plan), []) for draw in batch][:8]
        examples = [data.resolve(draw) for draw in draws]
        heads = {"start": "from", "region": "mask", "pixel": "target"}
        heads = {
            k: v for k, v in heads.items() if all(len(e.pictures.get(k, ())) == 1 for e in examples)
        }
        rows = [[load_picture(e.pictures[kind][0]) for kind in heads] for e in examples]
        run_log.picture("first_batch", edit_sheet(examples, rows, list(heads.values())), 0)


# --- 11. config, main -----------------------------------------------------------------------------


class Config(Section):
    """train_qwen_edit.py: a LoRA for Qwen-Image-Edit from before/after pairs.

    --plan shows data, tokens, memory, disk and time; it loads and downloads nothing."""

    not_here = {
        **dict.fromkeys(("hf_dataset", "hf_split"), "tools/pair_table.py writes a table"),
        **dict.fromkeys(("rollout_steps", "rollout_span"), "experiments/rollout.patch"),
        "selected_control_indexes": "tools/pair_table.py chooses references",
        "quantize_activations": "only weights are quantised",
        "from_image_mode": "from_image always leads to the target (bridge)",
        "step_rules": "take another lr_scheduler.scheduler_type",
        "max_tokens_per_batch": "batches have one shape; set data.batch_size",
        "exclude_blocks": "target_modules takes a regular expression",
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
        swap, again = self.model.blocks_to_swap, self.train.gradient_checkpointing
        text = "without it the backward pass holds every block"
        return {f"blocks_to_swap needs train.gradient_checkpointing: {text}": swap and not again}


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
