"""Train a LoRA for Stable Diffusion 1.5: DreamBooth, or a change from before/after pairs.

Page: docs/train_dreambooth_pairs.md

    python train_dreambooth_pairs.py --pretrained_model_name_or_path DIR \\
        --use_image_pairs --before_data_dir data/before --after_data_dir data/after --output_dir out
    ... --pair_objective difference             # what a pair teaches: a function of OBJECTIVES
    ... --sequence_dirs a b c --sequence_scales -1,0,1      # more than two times
    ... --instance_data_dir data/dog --instance_prompt "a photo of sks dog"    # DreamBooth
    ... --config configs/x.yaml | --plan | --print_config | --help

The flags are those of diffusers' DreamBooth LoRA script. Copy the file, change it, run it: it needs
only utils.py. `# EDIT HERE:` marks what an ablation changes, `# KEEP:` what breaks otherwise.

Shapes: B samples, H W pixels in [-1, 1], latents z (B, 4, h, w) = posterior mode * 0.18215, h w =
H/8 W/8, text (B, 77, 768). Noised: z_t = a z + s e with a^2 = alphas_cumprod[t], s^2 = 1 - a^2.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from pydantic import AliasChoices, BeforeValidator, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

import utils
from utils import RunLog, Section, UserError, cache_key, draw_key, listed, nearest, normal, uniform

# KEEP: diffusers, transformers, accelerate are imported where they are used; mistakes show at once
log = logging.getLogger("train_dreambooth_pairs")


class ObjectiveConfig(Section):
    """What a pair teaches."""

    pair_objective: str = "slider"
    """What a pair teaches: slider, difference, joint or another function of OBJECTIVES."""
    pair_multiplier: float = Field(1.0, gt=0)
    """Strength of the adapter while it trains; below 1 it learns more than it shows."""


class Noised(NamedTuple):
    """Two times of the same samples under the SAME noise and timestep; (B, 4, h, w), fp32."""

    low: torch.Tensor  # the earlier one, noised
    high: torch.Tensor  # the later one; of single pictures the only one
    low_scale: torch.Tensor  # (B,) where they lie on the slider, times pair_multiplier
    high_scale: torch.Tensor
    noise: torch.Tensor
    base: Callable[[torch.Tensor], torch.Tensor]  # noised -> the base's prediction, no gradient


class Pass(NamedTuple):
    """One slice of the fused batch: noisy input, target noise, active adapters."""

    name: str
    noisy: torch.Tensor
    target: torch.Tensor
    active: BatchPart
    weight: float = 1.0
    prompt: str = "instance"  # or class


def slider(n: Noised) -> list[Pass]:  # EDIT HERE: the objective; add yours to OBJECTIVES
    """Teach true noise on both sides, the adapter at each side's scale (Gandikota et al. 2023).

    What the sides have in common cancels. -1 and 1 are the two sides, 0 lies between them.
    """
    return [
        Pass("after", n.high, n.noise, (Active("change", n.high_scale),)),
        Pass("before", n.low, n.noise, (Active("change", n.low_scale),)),
    ]


def difference(n: Noised) -> list[Pass]:
    """Teach the adapter to make of one side's noised latents what the base says of the other's.

    With the same noise, O_t = T_t - a (T - O), so the target is the score of the base's pictures
    moved by T - O: 1 is the whole change, -1 undoes it (the direct difference of TrainTrain).
    """
    of_high, of_low = n.base(torch.cat([n.high, n.low])).chunk(2)
    step = (n.high_scale - n.low_scale) / 2
    return [
        Pass("forward", n.high, of_low, (Active("change", step),)),
        Pass("backward", n.low, of_high, (Active("change", -step),)),
    ]


def joint(n: Noised) -> list[Pass]:
    """Teach both sides with the adapter on: the scenes, not the change; a yardstick."""
    sides = (("after", n.high), ("before", n.low))
    return [Pass(name, noisy, n.noise, (Active("change"),)) for name, noisy in sides]


def instance(n: Noised) -> list[Pass]:
    """Teach single pictures, or the afters alone: DreamBooth (Ruiz et al. 2022)."""
    return [Pass("instance", n.high, n.noise, (Active("change"),))]


OBJECTIVES = {f.__name__: f for f in (slider, difference, joint, instance)}


class NoiseConfig(Section):
    """Under which noise, and how errors are weighed."""

    region_weight: float = Field(0.0, ge=0, le=1)
    """Share (0 to 1) of the loss that follows |before - after|, normalised by its mean."""
    prior_loss_weight: float = Field(1.0, ge=0)
    """Weight of the prior-preservation loss."""
    loss_type: Literal["mse", "huber"] = "mse"
    """Error between predicted and wanted noise: a name of ERRORS."""
    huber_c: float = Field(0.1, gt=0)
    """Errors above this count linearly (loss_type huber)."""
    snr_gamma: float | None = Field(None, gt=0)
    """Min-SNR weighting: min(1, snr_gamma / SNR); 5 is usual, null is none."""
    timestep_min: int = Field(0, ge=0, le=999)
    """Lowest timestep (0..999) trained: 200 to 400 for style, 500 to 999 for shape."""
    timestep_max: int = Field(999, ge=0, le=999)
    """Highest timestep (0..999) trained, included."""
    noise_offset: float = Field(0.0, ge=0)
    """Strength of noise common to all pixels of a channel; lets pictures get brighter or darker."""


def huber_error(error: torch.Tensor, c: float) -> torch.Tensor:
    """Return 2 c (sqrt(e^2 + c^2) - c): e^2 for small errors, 2 c |e| for large ones."""
    return 2 * c * ((error**2 + c**2).sqrt() - c)


ERRORS = {"mse": lambda error, _c: error**2, "huber": huber_error}


def snr_weight(alphas_cumprod: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return min(1, gamma / SNR) (Hang et al. 2023) with SNR = a^2 / s^2."""
    return (gamma * (1 - alphas_cumprod) / alphas_cumprod).clamp(max=1)


def region_weights(change: torch.Tensor, share: float) -> torch.Tensor:
    """Return weights of mean 1: (1 - share) + share * change / mean(change); (B, 1, h, w)."""
    mean = change.mean(dim=(1, 2, 3), keepdim=True)
    return (1 - share) + share * change / mean.clamp(min=1e-8)


def draw_timestep(config: Config, visit: int) -> int:
    """Draw from timestep_min..timestep_max; every 10 visits fall into its 10 equal parts."""
    part = utils.shuffled(10, config.seed, "strata", visit // 10)[visit % 10]
    u = (part + uniform(config.seed, "timestep", visit)) / 10
    return config.timestep_min + int(u * (config.timestep_max - config.timestep_min + 1))


def mix_noise(x: torch.Tensor, noise: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
    """Return a x + s noise; alphas (B,): alphas_cumprod at each sample's timestep."""
    alphas = alphas.view(-1, 1, 1, 1)
    return alphas.sqrt() * x + (1 - alphas).sqrt() * noise


# --- one step, the loop ---------------------------------------------------------------------------


def compute_losses(trainer: SDTrainer, draws: Sequence[Draw]) -> dict[str, torch.Tensor]:
    """Return the weighted loss of every pass, all of them from one forward."""
    config = trainer.config
    t = torch.tensor([draw_timestep(config, draw.visit) for draw in draws])
    noised, change = noised_batch(trainer, draws, t)
    passes = OBJECTIVES[config.objective](noised)
    if config.with_prior_preservation:
        passes.append(class_pass(trainer, draws, t))
    parts = [each.active for each in passes]
    prompts = {"instance": config.instance_prompt, "class": config.class_prompt or ""}
    texts = [prompts[each.prompt] for each in passes for _ in draws]
    embeds = trainer.embeds(texts, parts)
    noisy, times = torch.cat([each.noisy for each in passes]), trainer.put(t).repeat(len(passes))
    trainer.switch.parts = parts
    predicted = predict_noise(trainer.models["unet"], noisy, times, embeds)
    weights = trainer.put(snr_weight(trainer.alphas[t], config.snr_gamma or math.inf))
    losses: dict[str, torch.Tensor] = {}
    for each, noise in zip(passes, predicted.chunk(len(passes)), strict=True):
        error = ERRORS[config.loss_type](noise - each.target, config.huber_c)
        if change is not None and each.prompt == "instance":
            error = error * region_weights(change, config.region_weight)
        loss = each.weight * (weights * error.mean(dim=(1, 2, 3))).mean()
        losses[each.name] = losses.get(each.name, 0) + loss
    return losses


def predict_noise(
    unet: Any, noisy: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor
) -> torch.Tensor:
    """Return the UNet's noise, fp32, under its switch; t (B,), embeds (B or 1, 77, 768)."""
    noisy = noisy.to(embeds.dtype).contiguous(memory_format=torch.channels_last)
    embeds = embeds.expand(len(noisy), -1, -1)
    return unet(noisy, t, encoder_hidden_states=embeds, return_dict=False)[0].float()


def noised_batch(trainer: SDTrainer, draws: Sequence[Draw], t: torch.Tensor) -> tuple[Noised, Any]:
    """Return the noised batch, and (with region_weight) where it changes, (B, 1, h, w)."""
    config, rows, scales, changes = trainer.config, [], [], []
    for draw in draws:
        tensors = trainer.entry(draw.sample)
        low, high = tensors["latents"][[draw.low, draw.high]]
        noise = normal(low.shape, config.seed, "noise", draw.visit)
        if config.noise_offset:
            shift = normal((low.shape[0], 1, 1), config.seed, "offset", draw.visit)
            noise = noise + config.noise_offset * shift
        rows.append((low, high, noise))
        scales.append((draw.sample.scales[draw.low], draw.sample.scales[draw.high]))
        if config.region_weight:
            changes.append(tensors[f"change {draw.low} {draw.high}"])
    low, high, noise = (trainer.put(torch.stack(column)) for column in zip(*rows, strict=True))
    alphas = trainer.put(trainer.alphas[t])

    @torch.no_grad()
    def base(noisy: torch.Tensor) -> torch.Tensor:
        trainer.switch.parts = [()]
        times = trainer.put(t).repeat(len(noisy) // len(t))
        texts = trainer.texts[config.instance_prompt][1]
        return predict_noise(trainer.models["unet"], noisy, times, texts)

    low_scale, high_scale = (config.pair_multiplier * trainer.put(torch.tensor(scales))).T
    low, high = mix_noise(low, noise, alphas), mix_noise(high, noise, alphas)
    change = trainer.put(torch.stack(changes)) if changes else None
    return Noised(low, high, low_scale, high_scale, noise, base), change


def class_pass(trainer: SDTrainer, draws: Sequence[Draw], t: torch.Tensor) -> Pass:
    """Return the pass of prior preservation: pictures of the class under noise of their own."""
    config, rows = trainer.config, []
    for draw in draws:
        number = int(uniform(config.seed, "class", draw.visit) * len(trainer.class_samples))
        sample = trainer.class_samples[number]._replace(size=draw.sample.size)
        [latent] = trainer.entry(sample)["latents"]
        rows.append((latent, normal(latent.shape, config.seed, "class noise", draw.visit)))
    latents, noise = (trainer.put(torch.stack(column)) for column in zip(*rows, strict=True))
    noisy = mix_noise(latents, noise, trainer.put(trainer.alphas[t]))
    return Pass("class", noisy, noise, (Active("change"),), config.prior_loss_weight, "class")


class TrainingConfig(Section):
    """How long, how much at once, and how fast."""

    max_train_steps: int | None = Field(None, ge=1, le=100_000_000)
    """Optimizer steps of the run; null: num_train_epochs says it."""
    num_train_epochs: int = Field(1, ge=1, le=100_000_000)
    """Passes over the data (epochs); read where max_train_steps is null."""
    train_batch_size: int = Field(4, ge=1, le=4096)
    """Samples per forward pass and process; a pair is one sample."""
    gradient_accumulation_steps: int = Field(1, ge=1, le=4096)
    """Forward passes per optimizer step and process."""
    seed: int = 0
    """Seed of every random draw; a draw belongs to (seed, purpose, sample number)."""
    learning_rate: float = Field(5e-4, gt=0)
    """Learning rate after the warm-up."""
    scale_lr: bool = False
    """Multiply learning_rate by processes x accumulation steps x batch size."""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    """Shape of the learning rate over the run."""
    lr_warmup_steps: int = Field(0, ge=0, le=100_000_000)
    """Optimizer steps from 0 to the full learning rate (lr_scheduler constant has none)."""
    lr_num_cycles: int = Field(1, ge=1, le=1000)
    """How often lr_scheduler cosine_with_restarts starts."""
    lr_power: float = Field(1.0, gt=0)
    """Exponent of lr_scheduler polynomial."""
    use_8bit_adam: bool = False
    """AdamW with 8-bit moments (needs: pip install bitsandbytes)."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of AdamW's mean of the gradients."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of AdamW's mean of the squared gradients."""
    adam_weight_decay: float = Field(1e-2, ge=0)
    """Weight decay of AdamW."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """Small number added to AdamW's divisor."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the frozen base; LoRA, loss and optimizer are fp32."""
    gradient_checkpointing: bool = False
    """Compute activations twice: saves memory, costs about a third more time."""
    allow_tf32: bool = False
    """Faster fp32 products on Ampere and newer; they round more."""
    compile: bool = False
    """torch.compile the UNet: slower to start, faster steps on a GPU."""


def train_step(trainer: SDTrainer) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Take one optimizer step; return the samples' names and the mean losses, still on the GPU."""
    config, accelerator = trainer.config, trainer.accelerator
    names, found = [], []
    first = trainer.global_step * trainer.passes_per_step + accelerator.process_index
    for micro in range(config.gradient_accumulation_steps):
        draws = draw_batch(trainer, first + micro * accelerator.num_processes)
        losses = compute_losses(trainer, draws)
        loss = torch.stack([*losses.values()]).sum()
        accelerator.backward(loss / config.gradient_accumulation_steps)
        names += [draw.sample.name for draw in draws]
        found.append({name: x.detach() for name, x in {"loss": loss, **losses}.items()})
    average_gradients(trainer)
    accelerator.clip_grad_norm_(trainer.trained, config.max_grad_norm)
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.global_step += 1
    return names, {name: torch.stack([x[name] for x in found]).mean() for name in found[0]}


def average_gradients(trainer: SDTrainer) -> None:
    """Average the gradients over processes: one message, as an adapter is small."""
    grads = [p.grad for p in trainer.trained if p.grad is not None]
    if trainer.accelerator.num_processes > 1:
        mean = trainer.accelerator.reduce(torch.cat([grad.flatten() for grad in grads]), "mean")
        for grad, part in zip(grads, mean.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))


def train_loop(trainer: SDTrainer, stop: utils.StopSignal) -> bool:
    """Train to the end or to a stop signal; return whether it was a signal."""
    config, total, stopped = trainer.config, trainer.total_steps(), False
    validation_steps = config.validation_steps or config.checkpointing_steps
    if config.validation_epochs:
        validation_steps = config.validation_epochs * trainer.epoch_steps()
    steps, clock = [], time.monotonic()
    bar = utils.progress(None, "train", total=total, initial=trainer.global_step, unit="step")
    while trainer.global_step < total and not stopped:
        steps.append(train_step(trainer))
        step = trainer.global_step
        bar.update()
        logs = step % config.logging_steps == 0
        stopped = stop.agreed(trainer.accelerator, ask=logs or step % 100 == 0)
        saves = stopped or step == total or step % config.checkpointing_steps == 0
        draws = not stopped and (step == total or step % validation_steps == 0)
        if logs or saves or draws:
            rate = trainer.lr_scheduler.get_last_lr()[0]
            log_steps(trainer, trainer.run_log, steps, clock, lr=rate)
            if saves:
                trainer.save_checkpoint()
            if draws:
                validate(trainer)
            steps, clock = [], time.monotonic()
    bar.close()
    return stopped


def make_adam(trainer: SDTrainer) -> tuple[Any, Any]:
    """Return (AdamW, learning rate schedule) of the adapter's parameters."""
    from diffusers.optimization import get_scheduler

    config, rate = trainer.config, trainer.config.learning_rate
    if config.scale_lr:
        rate *= config.train_batch_size * trainer.passes_per_step
    betas, eps = (config.adam_beta1, config.adam_beta2), config.adam_epsilon
    decay = config.adam_weight_decay
    if config.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        optimizer: Any = AdamW8bit(trainer.trained, rate, betas, eps, decay)
    else:
        fused = trainer.device.type == "cuda"
        optimizer = torch.optim.AdamW(trainer.trained, rate, betas, eps, decay, fused=fused)
    kind, warmup, steps = config.lr_scheduler, config.lr_warmup_steps, trainer.total_steps()
    cycles, power = config.lr_num_cycles, config.lr_power
    schedule = get_scheduler(kind, optimizer, None, warmup, steps, cycles, power)
    return trainer.accelerator.prepare(optimizer), schedule


# --- the adapter ----------------------------------------------------------------------------------

TARGETS = {  # EDIT HERE: layers with an adapter, by the end of their names; counts of SD 1.5
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),  # 128
    "transformer": (  # 192
        "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out",
    ),
    "self-attention+conv": (  # no cross-attention: not bound to the prompt of training
        "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
        "conv1", "conv2", "conv_shortcut", "samplers.0.conv",
    ),
    "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),  # 48
}  # fmt: skip


class AdapterConfig(Section):
    """Which layers learn, and how much they can learn."""

    lora_rank: int = Field(4, ge=1, le=4096, validation_alias=AliasChoices("lora_rank", "rank"))
    """Rank of the LoRA; `rank` is taken as well."""
    lora_alpha: float | None = Field(None, gt=0)
    """Strength of the LoRA is lora_alpha / lora_rank; null means lora_alpha = lora_rank."""
    target_modules: Literal["attention", "transformer", "self-attention+conv"] = "attention"
    """Layers of the UNet that get an adapter: a name of TARGETS."""
    train_text_encoder: bool = False
    """Also train an adapter on the attention of CLIP, the text encoder."""


class Active(NamedTuple):
    """An adapter that is switched on for a part of the batch."""

    adapter: str
    scale: float | torch.Tensor = 1.0  # or one for each sample, (b,)
    frozen: bool = False  # its weights get no gradient from these samples


BatchPart = tuple[Active, ...]  # what is on in one of the equal parts of a batch; () is the base


class AdapterSwitch:
    """Which adapters are on; every SliderLinear of a model looks here.

    KEEP: parts change only between a backward and the next forward. Gradient checkpointing runs
    the forward again during backward, and must find the same parts.
    """

    def __init__(self) -> None:
        self.parts: Sequence[BatchPart] = [()]


class SliderLinear(torch.nn.Module):
    """A frozen layer and its adapters: base(x) + sum of scale * strength * up(down(x)).

    The batch is cut into as many equal parts as the switch has, so one forward pass serves samples
    with different adapters. What is off costs nothing.
    """

    def __init__(self, base: Any, switch: AdapterSwitch) -> None:
        super().__init__()
        self.base, self.switch = base, switch
        self.down, self.up = torch.nn.ParameterDict(), torch.nn.ParameterDict()  # (r, in), (out, r)
        self.strength: dict[str, float] = {}  # alpha / r

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output: x (B, ..., in) -> (B, ..., out)."""
        y, parts = self.base(x), self.switch.parts
        if not any(active.adapter in self.down for part in parts for active in part):
            return y
        if len(parts) == 1:
            return self._adapted(x, y, parts[0])
        cut = zip(x.chunk(len(parts)), y.chunk(len(parts)), parts, strict=True)
        return torch.cat([self._adapted(*each) for each in cut])

    def _adapted(self, x: torch.Tensor, y: torch.Tensor, part: BatchPart) -> torch.Tensor:
        for active in part:
            if active.adapter not in self.down:
                continue
            down, up = self.down[active.adapter], self.up[active.adapter]
            if active.frozen:
                down, up = down.detach(), up.detach()
            scale = active.scale * self.strength[active.adapter]
            change = self.change(x, down.to(x.dtype), up.to(x.dtype))
            if isinstance(scale, torch.Tensor):
                change, scale = change * scale.to(x).view(-1, *[1] * (x.dim() - 1)), 1
            y = torch.add(y, change, alpha=scale)
        return y

    def change(self, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return up(down(x))."""
        return F.linear(F.linear(x, down), up)


class SliderConv(SliderLinear):
    """The same for a convolution: down has its kernel, stride and padding, up is 1 x 1."""

    def change(self, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return up(down(x))."""
        low = F.conv2d(x, down, None, self.base.stride, self.base.padding)
        return F.conv2d(low, up)


def adapted_layers(model: Any, name: str) -> dict[str, SliderLinear]:
    """Return {path: layer} of those that have the adapter `name`."""
    layers = model.named_modules()
    return {p: x for p, x in layers if isinstance(x, SliderLinear) and name in x.down}


def adaptable(model: Any, switch: AdapterSwitch, path: str) -> SliderLinear:
    """Return the linear or convolution layer at a path, wrapped so that it can have adapters."""
    layer = model.get_submodule(path)
    if not isinstance(layer, SliderLinear):
        kind = SliderConv if isinstance(layer, torch.nn.Conv2d) else SliderLinear
        layer = kind(layer, switch)
        model.set_submodule(path, layer)
    return layer


def set_adapter(layer: SliderLinear, name: str, down: Any, up: Any, strength: float) -> None:
    """Give a layer an adapter of two factors; strength is alpha / rank. Raises ValueError."""
    weight = layer.base.weight
    if (len(up), down.shape[1]) != weight.shape[:2]:
        raise ValueError(f"factors {[*down.shape]}, {[*up.shape]} do not fit {[*weight.shape]}")
    layer.down[name] = torch.nn.Parameter(down.to(weight.device))
    layer.up[name] = torch.nn.Parameter(up.to(weight.device))
    layer.strength[name] = strength


def add_adapter(
    model: Any,
    switch: AdapterSwitch,
    name: str,
    ends: tuple,
    rank: int,
    alpha: float,
    *seed: object,
) -> None:
    """Give a new adapter, Gaussian down (by `seed`) and zero up, to layers whose names end so."""
    endings = tuple(f".{end}" for end in ends)
    for path in [path for path, _ in model.named_modules() if path.endswith(endings)]:
        layer = adaptable(model, switch, path)
        n_out, n_in, *kernel = layer.base.weight.shape
        down = normal((rank, n_in, *kernel), *seed, name, path) / rank  # EDIT HERE: its start
        up = torch.zeros(n_out, rank, *[1] * len(kernel))
        set_adapter(layer, name, down, up, alpha / rank)


# === machinery: read it when you change it ========================================================


def split_commas(value: Any) -> Any:
    """Split "0,1,2" into ["0", "1", "2"]; one number is a list, too."""
    parts = value if isinstance(value, list) else [value]
    return [piece for part in parts for piece in str(part).split(",")]


Numbers = Annotated[list[float], BeforeValidator(split_commas)]


class PicturesConfig(Section):
    """The base model, and what it is trained on."""

    pretrained_model_name_or_path: str
    """Stable Diffusion 1.x: a folder in diffusers layout, or a Hub id."""
    use_image_pairs: bool = False
    """Learn a change from before_data_dir and after_data_dir, or from sequence_dirs."""
    before_data_dir: Path | None = None
    """Folder of the pictures before the change."""
    after_data_dir: Path | None = None
    """Folder of the pictures after the change; a pair has one file name (stem) in both folders."""
    sequence_dirs: list[Path] = []
    """Folders of more than two times, instead of before and after; a stem needs two of them."""
    sequence_scales: Numbers = []
    """Position of each of sequence_dirs on the slider; [] is evenly from -1 to 1."""
    on_missing: Literal["error", "skip"] = "error"
    """What to do with a picture that lacks its partner."""
    instance_data_dir: Path | None = None
    """Folder of the subject's pictures (DreamBooth, instead of pairs)."""
    instance_prompt: str = ""
    """Prompt of training; of both sides of a pair, too."""
    with_prior_preservation: bool = False
    """Also learn to keep the class of the subject, from pictures in class_data_dir."""
    class_data_dir: Path | None = None
    """Folder of pictures of the class; what is missing is drawn by the base model."""
    class_prompt: str | None = None
    """Prompt of the class pictures, e.g. "a photo of a dog"."""
    num_class_images: int = Field(100, ge=1, le=100_000)
    """How many class pictures there must be."""
    sample_batch_size: int = Field(4, ge=1, le=4096)
    """Class pictures drawn at once."""
    resolution: int = Field(512, ge=64, le=8192, multiple_of=64)
    """Side of the square whose area the pictures get, px; aspect ratios are kept (buckets)."""
    center_crop: bool = False
    """Crop to a square of `resolution` instead."""
    random_flip: bool = False
    """Mirror half of the visits, both sides of a pair alike."""

    @property
    def stages(self) -> list[tuple[float, Path]]:
        """Return (scale, folder) of each time, rising; empty without pairs."""
        sides = self.before_data_dir, self.after_data_dir
        folders = self.sequence_dirs or [folder for folder in sides if folder]
        last = max(1, len(folders) - 1)
        scales = self.sequence_scales or [2 * i / last - 1 for i in range(len(folders))]
        return sorted(zip(scales, folders, strict=True))


# differs from the other scripts: what SD trains on
class Sample(NamedTuple):
    """The same scene at two times or more; or one picture of DreamBooth."""

    name: str
    files: tuple[Path, ...]
    scales: tuple[float, ...]  # of each file on the slider, rising
    content: tuple[str, ...] = ()  # blake2b of the files
    size: tuple[int, int] = (0, 0)  # (W, H) px, as the model gets them
    flip: bool = False  # mirrored


Found = tuple[list[Sample], list[str], list[str]]  # samples, notes, problems


def match_pictures(config: Config) -> Found:
    """Find what the settings train on."""
    stages = config.stages or [(1.0, config.instance_data_dir or Path())]
    folders = [folder for _, folder in stages]
    kind = "Before/After" if config.use_image_pairs else "Instance"
    if lacking := [folder for folder in folders if not folder.is_dir()]:
        names = [f"{place}{utils.from_tool('check', 'near', '', place)}" for place in lacking]
        return [], [], [f"{kind} images root doesn't exist: {name}" for name in names]
    stems = [utils.list_images(folder) for folder in folders]
    if not config.use_image_pairs:
        samples = single_pictures(folders[0])
        return samples, [], [] if samples else [f"instance_data_dir: no picture in {folders[0]}"]
    found: Found = [], [], []
    samples, notes, problems = found
    least = 2 if len(stages) > 2 else len(stages)  # a sequence may have holes
    for stem in sorted(set().union(*stems)):
        there = [(s, f[stem]) for (s, _), f in zip(stages, stems, strict=True) if stem in f]
        if twice := [same for _, same in there if len(same) > 1]:
            problems.append(f"{', '.join(map(str, twice[0]))}: same stem; keep one")
        elif len(there) < least:
            lacking = [d for d, f in zip(folders, stems, strict=True) if stem not in f]
            text = f"no picture {stem}.* in {', '.join(map(str, lacking))}"
            if config.on_missing == "skip":
                notes.append(text)
            else:
                problems.append(f"{text}; on_missing: skip leaves it out")
        else:
            scales, times = zip(*((scale, file) for scale, [file] in there), strict=True)
            samples.append(Sample(stem, times, scales))
    if not samples:
        counts = ", ".join(f"{len(f)} in {d}" for d, f in zip(folders, stems, strict=True))
        problems.insert(0, f"No matching image pairs found: {counts}")
    return found


def single_pictures(folder: Path) -> list[Sample]:
    """Return every picture in a folder as a sample of its own."""
    files = sorted(itertools.chain(*utils.list_images(folder).values()))
    return [Sample(file.stem, (file,), (1.0,)) for file in files]


def draw_class_pictures(trainer: SDTrainer, folder: Path) -> None:
    """Draw what is missing of the class with the base model, each from a seed of its own."""
    config, lacking = trainer.config, trainer.config.num_class_images - len(single_pictures(folder))
    if lacking <= 0:
        return
    import diffusers

    pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(
        trainer.folder, dtype=trainer.dtype, feature_extractor=None, safety_checker=None
    )  # KEEP None: only the parts that train are fetched from the Hub
    pipeline.to(trainer.device).set_progress_bar_config(disable=True)
    # KEEP: only names that are free, or a deleted one would be drawn over one that is there
    free = (n for n in itertools.count() if not (folder / f"class-{n:05d}.png").exists())
    numbers, size = list(itertools.islice(free, lacking)), config.sample_batch_size
    for first in utils.progress(range(0, lacking, size), "draw class pictures"):
        batch, side = numbers[first : first + size], config.resolution
        seeds = [draw_key(config.seed, "class", number) for number in batch]
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        prompts = [config.class_prompt or ""] * len(batch)
        images = pipeline(prompts, height=side, width=side, generator=draws).images
        for number, image in zip(batch, images, strict=True):
            path = folder / f"class-{number:05d}.png"
            utils.save_atomic(path, functools.partial(image.save, format="PNG"))


# --- the audit: what is wrong is named before a model loads ---------------------------------------


def audit(config: Config) -> list[str]:
    """Return everything that can be known to be wrong before a model loads; see audit.json."""
    problems = check_base(config.pretrained_model_name_or_path) + check_folders(config)
    trackers = {"none": [], "all": []}.get(config.report_to, [config.report_to])
    packages = [*trackers, *["bitsandbytes"] * config.use_8bit_adam]
    texts = {name: text for name, text in config if name.endswith("prompt") and text}
    how = {"packages": packages, "texts": texts, "hub": config.push_to_hub}
    problems += utils.check_setup(**how, one_card=True)
    if os.environ.get("RANK", "0") != "0":  # the first process looks at the pictures
        return problems
    samples, left_out, wrong = match_pictures(config)
    problems += check_warmup(config, len(samples))
    if config.with_prior_preservation and config.class_data_dir:
        samples += single_pictures(config.class_data_dir)
    index = utils.FileIndex(config.cache_dir)
    _, notes, bad = check_samples(config, samples, index)
    report = {"samples": [x.name for x in samples], "notes": left_out + notes}
    report["problems"] = problems + wrong + bad
    if report["notes"]:
        log.warning("note\n%s", listed(report["notes"]))
    with contextlib.suppress(UserError):
        utils.save_text(config.output_dir / "audit.json", json.dumps(report, indent=2))
    return report["problems"]


def steps_of(config: Config, samples: int, processes: int) -> tuple[int, int]:
    """Return the optimizer steps of (a pass over the data, the whole run)."""
    size = config.train_batch_size * config.gradient_accumulation_steps * processes
    epoch = math.ceil(samples / size)
    return epoch, config.max_train_steps or epoch * config.num_train_epochs


def check_warmup(config: Config, samples: int) -> list[str]:
    """Return a problem where the learning rate has no steps left to fall in."""
    processes, kind = int(os.environ.get("WORLD_SIZE", "1")), config.lr_scheduler
    warmup, steps = config.lr_warmup_steps, steps_of(config, samples, processes)[1]
    if kind.startswith("constant") or not 0 < steps <= warmup:
        return []
    text = f"lr_warmup_steps: {warmup} of the {steps} steps of this run"
    return [f"{text}; lr_scheduler {kind} needs some after them"]


def check_base(name: str) -> list[str]:
    """Return the problems of a base model: another kind, parts missing or cut off."""
    what = f"pretrained_model_name_or_path: {name}"
    try:
        kind = utils.read_model_json(name, "model_index.json").get("_class_name")
        if kind != "StableDiffusionPipeline":
            return [f"{what} is a {kind}; wanted Stable Diffusion 1.x"]
        scheduler = utils.read_model_json(name, "scheduler/scheduler_config.json")
        target = scheduler.get("prediction_type", "epsilon")
        channels = utils.read_model_json(name, "unet/config.json").get("in_channels")
        if (target, channels) != ("epsilon", 4):
            return [f"{what} predicts {target} from {channels} channels; wanted epsilon from 4"]
    except UserError as error:
        return [f"{what}: {error}"]
    return utils.check_setup(model=("pretrained_model_name_or_path", name, SD_CLASSES))


def check_folders(config: Config) -> list[str]:
    """Return the problems of folders that are read with all below them, or written."""
    classes = config.class_data_dir if config.with_prior_preservation else None
    read: dict[str, Any] = {f"stage {scale:g}": folder for scale, folder in config.stages}
    read["instance_data_dir"] = config.instance_data_dir
    written: dict[str, Any] = {"output_dir": config.output_dir, "cache_dir": config.cache_dir}
    lacks = classes and len(single_pictures(classes)) < config.num_class_images
    (written if lacks else read)["class_data_dir"] = classes
    apart = {name: folder for name, folder in read.items() if folder}
    return utils.check_setup(writes=written, apart=apart)


def check_samples(config: Config, samples: list[Sample], index: utils.FileIndex) -> Found:
    """Look at the pictures of samples, and give them content and size."""
    files = sorted({file for sample in samples for file in sample.files})
    problems = index.update(files, utils.look_at_picture)
    readable = {f for f in files if not (problems and index.update([f], utils.look_at_picture))}
    seen = [("samples", index[f], config.resolution**2, False) for f in files if f in readable]
    notes = utils.from_tool("check", "notes", [], seen)
    samples = [sample for sample in samples if readable.issuperset(sample.files)]
    for first, other in (pair for s in samples for pair in itertools.pairwise(s.files)):
        if index[first]["pixels"] == index[other]["pixels"]:
            problems.append(f"{first} and {other} are the same picture: no change to learn")
        elif abs(math.log(index[first]["aspect"] / index[other]["aspect"])) > 0.02:
            notes.append(f"{other} has another shape than {first}; both are cropped")
    return [fit_sample(config, sample, index) for sample in samples], notes, problems


# differs from the other scripts: the UNet halves its 8 px latents three times
SIZE_MULTIPLE = 64


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


def fit_sample(config: Config, sample: Sample, index: utils.FileIndex) -> Sample:
    """Return the sample with its content and its size: the bucket of its first picture."""
    content = tuple(index[file]["content"] for file in sample.files)
    facts, side = index[sample.files[0]], config.resolution
    size = nearest_bucket(facts["width"], facts["height"], side)
    return sample._replace(content=content, size=(side, side) if config.center_crop else size)


def load_pictures(sample: Sample) -> list[Image.Image]:
    """Open, crop around the middle, resize (Lanczos) to RGB of sample.size. Raises UserError."""
    fit = functools.partial(ImageOps.fit, size=sample.size, method=Image.Resampling.LANCZOS)
    images = [fit(utils.open_rgb(file)) for file in sample.files]
    turned = Image.Transpose.FLIP_LEFT_RIGHT
    return [image.transpose(turned) for image in images] if sample.flip else images


def to_pixels(image: Image.Image) -> torch.Tensor:
    """Turn RGB into (1, 3, H, W) fp32 in [-1, 1]."""
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = data.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255.0
    return (2.0 * pixels - 1.0)[None]


def to_image(pixels: torch.Tensor) -> Image.Image:
    """Turn (3, H, W) in [-1, 1] into RGB."""
    data = (pixels * 0.5 + 0.5).clamp(0, 1).float() * 255
    return Image.fromarray(data.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def encode_sample(vae: Any, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
    """Return {"latents": (n, 4, h, w), "change 0 1": (1, h, w) mean |after - before|, ...}."""
    pixels = [to_pixels(image) for image in images]
    tensors = {"latents": torch.cat([encode_sd(vae, x) for x in pixels])}
    factor = pixels[0].shape[-1] // tensors["latents"].shape[-1]  # 8
    for i, j in itertools.combinations(range(len(pixels)), 2):
        change = (pixels[j] - pixels[i]).abs().mean(1, keepdim=True) / 2
        tensors[f"change {i} {j}"] = F.avg_pool2d(change, factor)[0]
    return tensors


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


# --- sampling: the interface of generate.py, which loads this file --------------------------------

# unet = load_part(fetch_sd(name), "unet", dtype, device); switch = AdapterSwitch()
# load_adapter({"unet": unet}, switch, "change", file); switch.parts = [(Active("change", 0.5),)]
# predict_noise(unet, latents, t, embeds) is then half of the change; schedule: the scheduler's JSON
DIFFUSION = "diffusion_pytorch_model.safetensors"
SD_CLASSES = {  # of a part: how its name begins
    "unet": "UNet2DCondition",
    "vae": "AutoencoderKL$",
    "text_encoder": "CLIPText",
    **{"tokenizer": "", "scheduler": "(?!FlowMatch)"},
}
PARTS = {"unet": DIFFUSION, "vae": DIFFUSION, "text_encoder": "model.safetensors"}


def fetch_sd(name: str) -> Path:
    """Return the folder of a Stable Diffusion checkpoint; of the Hub's only what is read here."""
    names = [f"{part}/{file}" for part in PARTS for file in ("config.json", PARTS[part])]
    return utils.fetch_checkpoint(name, *names, "tokenizer/*", "scheduler/*")


@utils.named("the base model cannot be loaded")
def load_part(folder: Path, part: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Load the unet, vae or text_encoder of a checkpoint, frozen."""
    import diffusers
    import transformers

    classes = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    model_class: Any = classes.get(part, transformers.CLIPTextModel)
    dtype = torch.float32 if part == "vae" else dtype  # in fp16 that of SD 1.5 overflows
    model = model_class.from_pretrained(folder, subfolder=part, dtype=dtype)
    layout = torch.channels_last if part == "unet" else torch.preserve_format
    return model.eval().requires_grad_(False).to(device, memory_format=layout)


@torch.no_grad()
def encode_sd(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Encode (B, 3, H, W) to latents (B, 4, h, w): posterior mode times the scaling factor."""
    mode = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    return mode.float() * vae.config.scaling_factor


@torch.no_grad()
def decode_sd(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode (B, 4, h, w) to pixels (B, 3, H, W), about [-1, 1]."""
    return vae.decode(latents.to(vae.device, vae.dtype) / vae.config.scaling_factor).sample


@utils.named("the base model cannot be loaded")
@torch.no_grad()
def encode_prompts(
    folder: Path, prompts: Sequence[str], dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return {prompt: (token ids (1, 77), embeddings (1, 77, 768))}, as the pipeline makes them."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder, length = load_part(folder, "text_encoder", dtype, device), tokenizer.model_max_length
    options = {"padding": "max_length", "max_length": length, "truncation": True}
    found = {}
    for prompt in prompts:
        ids = tokenizer([prompt], return_tensors="pt", **options).input_ids.to(device)
        found[prompt] = ids, encoder(ids)[0]
        if len(tokenizer.tokenize(prompt)) > length - 2:  # start and end
            log.warning("cut off after %d tokens: %s", length - 2, prompt)
    return found


Predict = Callable[[torch.Tensor, int], torch.Tensor]  # (latents (B, 4, h, w), timestep) -> noise
PredictAt = Callable[[torch.Tensor], Predict]  # (strengths (B,) of the adapter) -> Predict
Levels = list[tuple[int, float, float]]  # timestep, alphas_cumprod, that after the step; N
LatentPath = list[torch.Tensor]  # latents (B, 4, h, w) at every level, then the clean ones


@torch.no_grad()
def draw_sd(
    predict_at: PredictAt, noise: torch.Tensor, schedule: Any, steps: int, scales: list[float]
) -> torch.Tensor:
    """Draw by DDIM at every strength -> (scales, 4, h, w); 0 alone: the base's, bit for bit."""
    import diffusers

    # KEEP: latents are no pixels; where a config says nothing, DDIM would clip them
    scheduler = diffusers.DDIMScheduler.from_config(schedule, clip_sample=False)
    scheduler.set_timesteps(steps)  # on the CPU: on a GPU each step would wait for its timestep
    drawn: dict[float, torch.Tensor] = {}
    moved = sorted({scale for scale in scales if scale})
    for strengths in [[0.0]] * (0 in scales) + [moved] * bool(moved):
        predict = predict_at(torch.tensor(strengths, device=noise.device))
        latents = noise.expand(len(strengths), -1, -1, -1)
        for t in scheduler.timesteps:
            latents = scheduler.step(predict(latents, t), t, latents).prev_sample
        drawn |= zip(strengths, latents, strict=True)
    return torch.stack([drawn[scale] for scale in scales])


def sd_levels(schedule: Any, steps: int, skip: float = 0.0) -> Levels:
    """Return DDIM's noise levels, noisy first, omitting the noisiest `skip` fraction."""
    import diffusers

    scheduler = diffusers.DDIMScheduler.from_config(schedule)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps[round(skip * steps) :].tolist()
    # KEEP alphas_cumprod[0] at the end, not 1: the last step of DDPM needs a variance above 0
    alphas = scheduler.alphas_cumprod.double()[[*timesteps, 0]].tolist()
    return list(zip(timesteps, alphas[:-1], alphas[1:], strict=True))


def step_mean(
    x: torch.Tensor, noise: torch.Tensor, alpha: float, following: float, eta: float
) -> torch.Tensor:
    """Return the mean of the next latents: sqrt(a') x0 + sqrt(1 - a' - s^2) e.

    x0 = (x - sqrt(1 - a) e) / sqrt(a), s^2 = eta^2 (1 - a') / (1 - a) (1 - a / a'); a: alpha, a':
    following; eta 0: DDIM, also backwards, 1: DDPM (Song et al. 2020, arXiv 2010.02502, eq. 12).
    """
    clean = (x - math.sqrt(1 - alpha) * noise) / math.sqrt(alpha)
    variance = eta**2 * (1 - following) / (1 - alpha) * (1 - alpha / following)
    return math.sqrt(following) * clean + math.sqrt(1 - following - variance) * noise


def ddpm_path(photo: torch.Tensor, levels: Levels, noises: torch.Tensor) -> LatentPath:
    """Return the path of a photo (B, 4, h, w) with its own noise (N, B, 4, h, w) at each level."""
    # edit-friendly (Huberman-Spiegelglas et al. 2023, 2304.06140): residuals carry the layout
    pairs = zip(levels, noises, strict=True)
    return [*(math.sqrt(a) * photo + math.sqrt(1 - a) * noise for (_, a, _), noise in pairs), photo]


def guided(
    unet: Any, switch: AdapterSwitch, part: BatchPart, texts: Sequence[Any], guidance: float
) -> Predict:
    """Return what predicts noise with the embeddings of a prompt and (guidance > 1) a negative."""

    def predict(latents: torch.Tensor, t: int) -> torch.Tensor:
        switch.parts = [part]
        times = torch.full((len(latents),), int(t), device=latents.device)
        found = [predict_noise(unet, latents, times, x) for x in texts]
        return found[-1] + guidance * (found[0] - found[-1]) if guidance > 1 else found[0]

    return predict


def ddim_path(photo: torch.Tensor, levels: Levels, predict: Predict) -> LatentPath:
    """Return the path of a photo (B, 4, h, w) by DDIM's steps backwards."""
    path = [photo]
    for t, alpha, following in reversed(levels):  # KEEP: t is where the step leads to
        path.insert(0, step_mean(path[0], predict(path[0], t), following, alpha, 0.0))
    return path


def path_means(path: LatentPath, levels: Levels, predict: Predict, eta: float) -> LatentPath:
    """Return where each step from the path leads; path[k + 1] - means[k] is its residual."""
    pairs = zip(path[:-1], levels, strict=True)
    return [step_mean(x, predict(x, t), a, b, eta) for x, (t, a, b) in pairs]


def follow_path(
    path: LatentPath, means: LatentPath, levels: Levels, predict: Predict, eta: float, mask: Any = 1
) -> torch.Tensor:
    """Return edited latents: x' = mean(x) + (path' - mean(path)), from the path's first ones.

    With the predictor of the path the path itself comes out. mask (1, 1, h, w): 0 keeps the path.
    """
    x = path[0]
    for kept, usual, (t, alpha, following) in zip(path[1:], means, levels, strict=True):
        x = kept + mask * (step_mean(x, predict(x, t), alpha, following, eta) - usual)
    return x


LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_PARTS = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
LORA_NAMES = {  # what kohya and older diffusers have for parts of the names of PEFT
    "lora_unet_": "unet_", "lora_te_": "text_encoder_", "lora_te1_": "text_encoder_",
    "_processor_to_": "_to_", "_to_out_lora_": "_to_out_0_lora_",
    "_lora_linear_layer_": "_lora_", "_lora_down_": "_lora_A_", "_lora_up_": "_lora_B_",
}  # fmt: skip


def adapter_tensors(models: dict[str, Any], name: str, factor: float) -> dict[str, torch.Tensor]:
    """Return {"unet.<path>.lora_A.weight": ...}; strength and `factor` are folded into lora_B."""
    tensors = {}
    for part, model in models.items():
        for path, layer in adapted_layers(model, name).items():
            where = f"{part}.{path_in_file(part, path)}"
            strength = layer.strength[name] * factor
            tensors[f"{where}.lora_A.weight"] = layer.down[name].detach().cpu().clone()
            tensors[f"{where}.lora_B.weight"] = (layer.up[name].detach() * strength).cpu()
    return tensors


def path_in_file(part: str, path: str) -> str:
    """Return the path of a layer as LoRA files have it: transformers 5 left `text_model` out."""
    return path if part == "unet" else f"text_model.{path.removeprefix('text_model.')}"


def save_lora(path: Path, tensors: Any, about: dict[str, Any], export: str = "kohya") -> None:
    """Write a LoRA. kohya: lora_unet_* and lora_te_*, alpha = rank; peft: the names of `tensors`.

    KEEP kohya the default: diffusers, ComfyUI, Forge and sd-scripts load it whole. Of PEFT's names
    ComfyUI and Forge find convolutions only, and leave attention out with a line in their log.
    """
    if export == "peft":
        return utils.save_tensors(path, tensors, image_edit_lora=about)
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        layer, side = name.removesuffix(".weight").split(".lora_")
        part, _, path_in_part = layer.partition(".")
        where = KOHYA_PARTS[part] + path_in_part.replace(".", "_")
        renamed[f"{where}.lora_{'down' if side == 'A' else 'up'}.weight"] = tensor
        if side == "A":
            renamed[f"{where}.alpha"] = torch.tensor(float(len(tensor)))
    rank = f"{len(next(iter(tensors.values())))}"
    metadata = {"ss_network_module": "networks.lora", "ss_base_model_version": "sd_v1"}
    metadata |= {"ss_network_dim": rank, "ss_network_alpha": rank, "format": "pt"}
    metadata |= {"image_edit_lora": json.dumps(about, sort_keys=True)}
    metadata["crc32"] = utils.checksum(renamed)
    utils.save_atomic(path, lambda file: save_file(renamed, file, metadata=metadata))


def load_adapter(models: dict[str, Any], switch: AdapterSwitch, name: str, file: Path) -> Any:
    """Give {"unet": ..., "text_encoder": ...} a LoRA file; return its `about`. Raises UserError."""
    tensors: dict[str, torch.Tensor] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            about = json.loads(metadata.get("image_edit_lora", "{}"))
            peft = json.loads(metadata.get("lora_adapter_metadata", "{}"))  # of other programs
            for key in opened.keys():  # noqa: SIM118 (not a dict)
                known = key.replace(".", "_")
                for theirs, ours in LORA_NAMES.items():
                    known = known.replace(theirs, ours)
                tensors[known] = opened.get_tensor(key).float()
        if not any("_lora_A" in key for key in tensors):
            raise ValueError("it holds no factor of a LoRA")
        for part, model in models.items():
            if peft.get(f"{part}.alpha_pattern"):
                raise ValueError(f"{part}.alpha_pattern in its metadata is not read here")
            root = math.sqrt if peft.get(f"{part}.use_rslora") else float
            for path, _ in list(model.named_modules()):
                known = f"{part}.{path_in_file(part, path)}".replace(".", "_")
                down, up = (tensors.pop(f"{known}_lora_{side}_weight", None) for side in "AB")
                if down is not None and up is not None:
                    usual = peft.get(f"{part}.lora_alpha", len(down))
                    strength = float(tensors.pop(f"{known}_alpha", usual)) / root(len(down))
                    set_adapter(adaptable(model, switch, path), name, down, up, strength)
        if tensors:
            raise ValueError(f"no such layers\n{listed(sorted(tensors), 3)}")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"LoRA {file} is damaged or of another model: {error}") from error
    return about


class ResultsConfig(Section):
    """What a run leaves, and what it goes on from."""

    output_dir: Path = Path("lora-dreambooth-model")
    """Folder of everything a run leaves (but for the cache)."""
    cache_dir: Path = Path("cache")
    """Folder of the latents, named by their content; runs may share it."""
    logging_steps: int = Field(10, ge=1)
    """Optimizer steps between two log lines; only then the loop waits for the GPU."""
    report_to: Literal["none", "tensorboard", "wandb", "all"] = "none"
    """Trackers beside metrics.jsonl, which is always written."""
    push_to_hub: str | None = None
    """Repository (USER/NAME) of the Hub for the finished LoRA; a new one is private."""
    checkpointing_steps: int = Field(500, ge=1)
    """Optimizer steps between two checkpoints."""
    checkpoints_total_limit: int | None = Field(None, ge=1)
    """How many checkpoints are kept, the newest ones; null keeps all."""
    resume_from_checkpoint: str | None = None
    """"latest" (the newest valid one; from step 0 if there is none) or a checkpoint folder."""
    calibrate: bool | None = None
    """Scale the saved LoRA so that strength 1 is one full change; null: with difference only."""
    export: Literal["kohya", "peft"] = "kohya"
    """Names in LoRA files. kohya: diffusers, ComfyUI, Forge, sd-scripts; peft: diffusers, PEFT."""
    validation_prompt: str | None = None
    """Prompt of the validation sheets; null draws none."""
    num_validation_images: int = Field(4, ge=1, le=1000)
    """Images per validation sheet and strength (seeds 0..n-1)."""
    validation_steps: int | None = Field(None, ge=1)
    """Steps between two validation sheets; null: with the checkpoints."""
    validation_epochs: int | None = Field(None, ge=1)
    """Passes over the data between two validation sheets, instead of validation_steps."""
    validation_scales: Numbers = Field([-1.0, -0.5, 0.0, 0.5, 1.0], min_length=1)
    """LoRA strengths drawn on the validation sheet."""
    validation_inference_steps: int = Field(25, ge=1, le=1000)
    """DDIM steps of a validation image."""
    validation_guidance_scale: float = Field(7.5, ge=1, le=100)
    """Classifier-free guidance of the validation images; 1 is none."""


def predictor(trainer: SDTrainer, prompt: str, guidance: float) -> PredictAt:
    """Return what predicts the noise of a prompt, under classifier-free guidance if above 1."""

    def predict_at(strengths: torch.Tensor) -> Predict:
        part: BatchPart = (Active("change", strengths),) if strengths.any() else ()
        prompts = [prompt, ""] if guidance > 1 else [prompt]
        texts = [trainer.embeds([p] * len(strengths), [part]) for p in prompts]
        return guided(trainer.models["unet"], trainer.switch, part, texts, guidance)

    return predict_at


@torch.no_grad()
def validate(trainer: SDTrainer) -> None:
    """Write samples/step-<n>.png: validation_prompt at every strength, a row per seed."""
    config, step, prompt = trainer.config, trainer.global_step, trainer.config.validation_prompt
    if prompt is not None and trainer.accelerator.is_main_process:
        predict_at = predictor(trainer, prompt, config.validation_guidance_scale)
        vae = load_part(trainer.folder, "vae", trainer.dtype, trainer.device)
        side = config.resolution // 2 ** (len(vae.config.block_out_channels) - 1)
        steps, scales = config.validation_inference_steps, config.validation_scales
        rows, captions = [], []
        for seed in range(config.num_validation_images):
            draw = torch.Generator().manual_seed(seed)
            noise = torch.randn((1, 4, side, side), generator=draw, dtype=trainer.dtype)
            noise = trainer.put(noise).float()
            latents = draw_sd(predict_at, noise, trainer.scheduler_config, steps, scales)
            rows.append([to_image(decode_sd(vae, x[None])[0]) for x in latents])
            captions.append(f"step {step}, seed {seed}: {prompt}")
        sheet = utils.contact_sheet(rows, [f"strength {scale:g}" for scale in scales], captions)
        trainer.run_log.picture(f"step-{step:06d}", sheet, step)


@torch.no_grad()
def full_change(trainer: SDTrainer, most: int = 8, steps: int = 20, skip: float = 0.2) -> float:
    """Return the strength at which edits (edit-friendly DDPM) go the whole way to the afters."""
    strengths = trainer.config.pair_multiplier * torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0])
    levels = sd_levels(trainer.scheduler_config, steps, skip)
    predict_at = predictor(trainer, trainer.config.instance_prompt, 1.0)
    span = max(sample.scales[-1] - sample.scales[0] for sample in trainer.samples)
    whole = [s for s in trainer.samples if s.scales[-1] - s.scales[0] == span]
    shares = []
    for sample in whole[:most]:
        latents = trainer.put(trainer.entry(sample)["latents"])
        first, change = latents[:1], latents[-1:] - latents[:1]
        noises = [normal(first.shape, "calibrate", k) for k in range(len(levels))]
        path = ddpm_path(first, levels, trainer.put(torch.stack(noises)))
        means = path_means(path, levels, predict_at(torch.zeros(1)), 1.0)
        path = [x.expand(len(strengths), -1, -1, -1) for x in path]
        edited = follow_path(path, means, levels, predict_at(trainer.put(strengths)), 1.0)
        # <edit - before, after - before> / |after - before|^2
        share = ((edited - first) * change).sum((1, 2, 3)) / change.square().sum()
        shares.append(share.cpu())
    went = torch.stack(shares).mean(0)
    told = [f"{s:g}: {w:.2f}" for s, w in zip(strengths.tolist(), went.tolist(), strict=True)]
    log.info("share of the change at each strength: %s", ", ".join(told))
    if (went < 1).all():
        log.warning("%.2f of a whole change is the most; train longer", went.max())
        # near 0 the strengths tell nothing
        return strengths[went.argmax()].item() if went.max() > 0.25 else 1.0
    high = int((went >= 1).nonzero()[0])
    share = (1 - went[high - 1]) / (went[high] - went[high - 1])
    return torch.lerp(strengths[high - 1], strengths[high], share).item()


def about_run(trainer: SDTrainer, calibration: float = 1.0) -> dict[str, Any]:
    """Return what a LoRA file says about itself."""
    about: dict[str, Any] = {"script": Path(__file__).name, "objective": trainer.config.objective}
    about |= {"step": trainer.global_step, "calibration": calibration}
    return trainer.trained_as | about


def save_result(trainer: SDTrainer, calibrated: bool) -> None:
    """Write the LoRA of the run, at the strength that `calibrate` asks for, and its card."""
    config, factor = trainer.config, 1.0
    wanted = config.objective == "difference" if config.calibrate is None else config.calibrate
    if calibrated and wanted:
        factor = full_change(trainer)
        log.info("strength 1 of the file is %.3g times the trained strength", factor)
    tensors, about = adapter_tensors(trainer.models, "change", factor), about_run(trainer, factor)
    save_lora(config.output_dir / LORA_FILE, tensors, about, config.export)
    utils.save_text(config.output_dir / "README.md", CARD.format(**about, file=LORA_FILE))


CARD = """---
base_model: {pretrained_model_name_or_path}
library_name: diffusers
tags: [text-to-image, lora, stable-diffusion, {objective}]
---
Trained with {script} ({objective}) to step {step}; calibration {calibration:g} is folded in.
Prompt: "{instance_prompt}".

    pipe = diffusers.StableDiffusionPipeline.from_pretrained("{pretrained_model_name_or_path}")
    pipe.load_lora_weights(".", weight_name="{file}", adapter_name="change")
    pipe.set_adapters("change", 0.5)  # half of it
"""


# --- the trainer ----------------------------------------------------------------------------------

MAY_DIFFER = {  # beside ResultsConfig, settings that a run which goes on may change
    "before_data_dir", "after_data_dir", "sequence_dirs", "instance_data_dir", "class_data_dir",
    "on_missing", "sample_batch_size", "gradient_accumulation_steps", "allow_tf32", "compile",
    "gradient_checkpointing", "max_train_steps", "num_train_epochs",
}  # fmt: skip


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


# differs from the other scripts: a pair of times
class Draw(NamedTuple):
    """Everything random about one visit of a sample but its noise."""

    visit: int  # number over the whole run; timestep and noise hang on it
    sample: Sample
    low: int  # which of its times
    high: int


class Batches:
    """Which samples each forward pass sees: of one shape, and in the long run all equally often.

    A round has as many batches as there are samples, in a new order each time; a shape has as many
    of them as samples, and they go through those again and again, each time in another order.
    """

    def __init__(self, shapes: Sequence[object], size: int, seed: int) -> None:
        self.shapes, self.size = shapes, size
        self.alike = {x: [n for n, shape in enumerate(shapes) if shape == x] for x in {*shapes}}
        # a run asks for the same orders again and again
        self.order = functools.lru_cache(64)(lambda n, *what: utils.shuffled(n, seed, *what))

    def __getitem__(self, batch: int) -> list[int]:
        """Return the samples of forward pass number `batch` of the whole run."""
        number, place = divmod(batch, len(self.shapes))
        order = self.order(len(self.shapes), "round", number)
        shape = self.shapes[order[place]]
        alike = self.alike[shape]
        earlier = sum(self.shapes[sample] == shape for sample in order[:place])
        first = (number * len(alike) + earlier) * self.size
        visits = (divmod(i, len(alike)) for i in range(first, first + self.size))
        return [alike[self.order(len(alike), "scenes", shape, n)[k]] for n, k in visits]


def draw_batch(trainer: SDTrainer, batch: int) -> list[Draw]:
    """Draw forward pass number `batch` of the whole run, over all processes and accumulation."""
    config, seed, draws = trainer.config, trainer.config.seed, []
    for number, place in enumerate(trainer.batches[batch]):
        visit, sample = batch * config.train_batch_size + number, trainer.samples[place]
        times = utils.shuffled(len(sample.files), seed, "times", visit)[:2]
        flip = config.random_flip and uniform(seed, "flip", visit) < 0.5
        draws.append(Draw(visit, sample._replace(flip=flip), min(times), max(times)))
    return draws


class SDTrainer:
    """Hold the state of a run. fit() does it all, method by method."""

    def __init__(self, config: Config) -> None:
        self.config, self.cache_dir = config, config.cache_dir
        self.checkpoints = utils.Checkpoints(config.output_dir, config.checkpoints_total_limit)
        dtypes = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        self.dtype = dtypes[config.mixed_precision]
        self.switch = AdapterSwitch()
        self.global_step = 0

    def setup_accelerator(self) -> None:
        """Set up processes, devices, trackers."""
        config = self.config
        # bf16: layers cast by themselves, as in inference; fp16 needs the scaler
        mixed = "fp16" if config.mixed_precision == "fp16" else "no"
        self.accelerator: Any = utils.make_accelerator(
            config.report_to, config.output_dir, mixed_precision=mixed
        )
        self.device: torch.device = self.accelerator.device
        self.passes_per_step = config.gradient_accumulation_steps * self.accelerator.num_processes
        if config.allow_tf32:
            torch.set_float32_matmul_precision("high")
        log.setLevel(logging.INFO if self.accelerator.is_main_process else logging.ERROR)

    def find_data(self) -> None:
        """Pair and hash the pictures, draw missing ones of the class. Raises UserError."""
        config = self.config
        self.class_samples: list[Sample] = []
        with self.accelerator.main_process_first():
            index = utils.FileIndex(self.cache_dir)  # KEEP: inside, to see what process 0 recorded
            samples, _, problems = match_pictures(config)
            self.samples, _, bad = check_samples(config, samples, index)
            if problems := problems + bad:
                raise UserError(f"{len(problems)} problem(s)\n{listed(problems)}")
            self.folder = fetch_sd(config.pretrained_model_name_or_path)
            self.vae_hash = fingerprint([self.folder / "vae"])
            if (folder := config.class_data_dir) and config.with_prior_preservation:
                draw_class_pictures(self, folder)
                samples = single_pictures(folder)[: config.num_class_images]
                self.class_samples = check_samples(config, samples, index)[0]
        shapes = [sample.size for sample in self.samples]
        self.batches = Batches(shapes, config.train_batch_size, config.seed)

    def epoch_steps(self) -> int:
        """Return the optimizer steps of a pass over the data."""
        return steps_of(self.config, len(self.samples), self.accelerator.num_processes)[0]

    def total_steps(self) -> int:
        """Return max_train_steps, or what num_train_epochs come to."""
        return steps_of(self.config, len(self.samples), self.accelerator.num_processes)[1]

    def key_of(self, sample: Sample) -> str:
        """Return the name of a sample's entry."""
        place = {"content": sample.content, "size": sample.size, "flip": sample.flip}
        return cache_key("sd", vae=self.vae_hash, **place)

    def cache_jobs(self) -> dict[str, Sample]:
        """Return every entry that training can ask for: {key: sample}."""
        flips, sizes = {False, self.config.random_flip}, {sample.size for sample in self.samples}
        jobs = [sample._replace(flip=flip) for sample in self.samples for flip in flips]
        jobs += [sample._replace(size=size) for sample in self.class_samples for size in sizes]
        return {self.key_of(sample): sample for sample in jobs}

    def cache_embeddings(self) -> int:
        """Encode what is missing in the cache, a share per process; return how much that was."""
        from accelerate.utils import release_memory

        jobs = self.cache_jobs()
        # KEEP: shares of ALL entries; what is missing changes while other processes write
        share = sorted(jobs)[self.accelerator.process_index :: self.accelerator.num_processes]
        todo = []
        for key in share:
            try:
                utils.read_entry(path := utils.entry_path(self.cache_dir, key))
            except UserError as error:
                if path.exists():
                    log.warning("%s; it is built again", error)
                todo.append(key)
        log.info("cache: %d entries, %d to encode", len(jobs), len(todo))
        vae = load_part(self.folder, "vae", self.dtype, self.device) if todo else None
        loaded = zip(todo, utils.ahead(lambda key: load_pictures(jobs[key]), todo), strict=True)
        for key, images in utils.progress(loaded, "encode pictures", total=len(todo)):
            utils.save_tensors(utils.entry_path(self.cache_dir, key), encode_sample(vae, images))
        del vae
        release_memory()
        self.accelerator.wait_for_everyone()
        return len(todo)

    @functools.lru_cache(maxsize=2048)  # noqa: B019 (as long as the trainer)
    def entry(self, sample: Sample) -> dict[str, torch.Tensor]:
        """Return the tensors of a sample's entry, on the CPU. Raises UserError."""
        return utils.read_entry(utils.entry_path(self.cache_dir, self.key_of(sample)))

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor on the device. KEEP pinned: the loop must not wait for the GPU here."""
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def embeds(self, prompts: Sequence[str], parts: Sequence[BatchPart]) -> torch.Tensor:
        """Return (B, 77, 768) of the prompts; through the adapted text encoder if there is one."""
        ids, embeds = (torch.cat(x) for x in zip(*(self.texts[p] for p in prompts), strict=True))
        if "text_encoder" not in self.models:
            return embeds
        self.switch.parts = parts
        return self.models["text_encoder"](ids)[0].to(self.dtype)

    def load_models(self) -> None:
        """Encode the prompts, load the frozen UNet (and CLIP), give them adapters, an optimizer."""
        import diffusers

        config = self.config
        given = (config.instance_prompt, config.class_prompt, config.validation_prompt, "")
        prompts = [prompt for prompt in given if prompt is not None]
        self.texts = encode_prompts(self.folder, prompts, self.dtype, self.device)
        parts = ["unet"] + ["text_encoder"] * config.train_text_encoder
        self.models = {x: load_part(self.folder, x, self.dtype, self.device) for x in parts}
        for part, model in self.models.items():
            ends = TARGETS[config.target_modules if part == "unet" else part]
            rank, alpha = config.lora_rank, config.lora_alpha or config.lora_rank
            add_adapter(model, self.switch, "change", ends, rank, alpha, config.seed, part)
        if config.gradient_checkpointing:
            self.models["unet"].enable_gradient_checkpointing()
        if config.compile:
            self.models["unet"].compile()
        self.trained = [p for m in self.models.values() for p in m.parameters() if p.requires_grad]
        self.optimizer, self.lr_scheduler = make_adam(self)
        name = "scheduler/scheduler_config.json"
        self.scheduler_config = utils.read_model_json(str(self.folder), name)
        self.alphas = diffusers.DDPMScheduler.from_config(self.scheduler_config).alphas_cumprod

    def fit(self) -> None:
        """Cache, load, train, calibrate, save."""
        self.setup_accelerator()
        config, main = self.config, self.accelerator.is_main_process
        with self.checkpoints.only_run() if main else contextlib.nullcontext():
            self.find_data()
            found = self.checkpoints.find(config.resume_from_checkpoint, self.trained_as)
            if main and not found:
                self.checkpoints.set_aside("*.safetensors")
            self.cache_embeddings()
            self.load_models()
            if found:
                self.restore(*found)
            self.run_log = RunLog(self.accelerator, config.output_dir, config, self.global_step)
            if main:
                utils.run_record(config.output_dir, config, Path(__file__))
                few = self.samples[:8]
                names = [sample.name for sample in few]
                sheet = utils.contact_sheet([*map(load_pictures, few)], captions=names)
                self.run_log.picture("pairs", sheet, self.global_step)
            with utils.StopSignal() as stop:
                stopped = train_loop(self, stop)
            if main:
                save_result(self, calibrated=not stopped)
                utils.from_tool("after", "tell", None, config.output_dir, stopped)
            self.accelerator.wait_for_everyone()
            self.accelerator.end_training()
        what, file = "stopped" if stopped else "done", config.output_dir / LORA_FILE
        log.info("%s at step %d: %s", what, self.global_step, file)

    @functools.cached_property
    def trained_as(self) -> dict[str, Any]:
        """Return all that decides what a run learns; a run that goes on must share it."""
        config = self.config
        content = [sample.content for sample in self.samples + self.class_samples]
        base = [self.folder / part for part in ("unet", "text_encoder", "scheduler")]
        found = config.model_dump(mode="json", exclude={*MAY_DIFFER, *ResultsConfig.model_fields})
        found["pictures (hash)"], found["base (hash)"] = draw_key(content), fingerprint(base)
        found["forward passes per step"] = self.passes_per_step
        if not config.lr_scheduler.startswith("constant"):  # the rate hangs on the length
            found["max_train_steps"] = self.total_steps()
        return found

    def save_checkpoint(self) -> None:
        """Write checkpoint-<step>/: LoRA file, raw adapters, optimizer, schedule."""
        if not torch.stack([p.isfinite().all() for p in self.trained]).all():
            text = "weights are not finite, nothing of it was saved; lower learning_rate"
            raise UserError(f"step {self.global_step}: {text}")
        if self.accelerator.is_main_process:
            training = {
                "adapters": [p.detach().cpu() for p in self.trained],
                "optimizer": self.optimizer.state_dict(),
                "lr_scheduler": self.lr_scheduler.state_dict(),
                "scaler": self.accelerator.scaler and self.accelerator.scaler.state_dict(),
            }

            def write(folder: Path) -> None:
                tensors = adapter_tensors(self.models, "change", 1.0)
                save_lora(folder / LORA_FILE, tensors, about_run(self), self.config.export)

            self.checkpoints.save(self.global_step, self.trained_as, training, write)

    @torch.no_grad()
    @utils.named("the checkpoint does not fit this run")
    def restore(self, folder: Path, step: int) -> None:
        """Set adapters, optimizer and schedule to those of a checkpoint."""
        saved = torch.load(folder / "training_state.pt", "cpu", weights_only=True)
        for parameter, value in zip(self.trained, saved["adapters"], strict=True):
            parameter.copy_(value)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.lr_scheduler.load_state_dict(saved["lr_scheduler"])
        if saved["scaler"]:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.global_step = step
        log.info("resumed from %s (step %d)", folder, step)


# the last class comes first in --help and config.yaml
class Config(
    ResultsConfig, AdapterConfig, TrainingConfig, NoiseConfig, ObjectiveConfig, PicturesConfig
):
    """train_dreambooth_pairs.py: LoRAs for Stable Diffusion 1.5, from single pictures or pairs."""

    @property
    def objective(self) -> str:
        """Return a name of OBJECTIVES."""
        return self.pair_objective if self.use_image_pairs else "instance"

    def rules(self) -> dict[str, Any]:
        """Return {problem: whether it is there}."""
        pairs, times, scales = self.use_image_pairs, self.sequence_dirs, self.sequence_scales
        sides, name = [self.before_data_dir, self.after_data_dir], self.pair_objective
        prior, single = self.with_prior_preservation, self.instance_data_dir
        no_class = not (self.class_data_dir and self.class_prompt)
        folders = "before_data_dir with after_data_dir, or sequence_dirs"
        unlike = len(set(scales)) == len(scales) == len(times)
        objective = f"no '{name}'{nearest(name, OBJECTIVES)}; more are in experiments/"
        learns_change = self.objective not in ("joint", "instance")
        return {
            f"pair_objective: {objective}": name not in OBJECTIVES,
            f"use_image_pairs: give {folders}": pairs and any(sides) + bool(times) != 1,
            f"{folders}: add --use_image_pairs": not pairs and (any(sides) or times),
            "before_data_dir and after_data_dir go together": any(sides) and not all(sides),
            "sequence_dirs: two folders or more": len(times) == 1,
            "sequence_scales: one for each of sequence_dirs, no two alike": scales and not unlike,
            "give instance_data_dir, or use_image_pairs and folders": not pairs and not single,
            "instance_prompt: single pictures need one": single
            and not self.instance_prompt.strip(),
            "with_prior_preservation needs class_data_dir and class_prompt": prior and no_class,
            "region_weight: only pairs have a region of change": self.region_weight and not pairs,
            f"calibrate: {self.objective} learns no change": self.calibrate and not learns_change,
            "timestep_min is above timestep_max": self.timestep_min > self.timestep_max,
        }


def main() -> None:
    """Train, or with --plan say what the run would be."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    argv = [arg for arg in sys.argv[1:] if arg != "--plan"]
    if len(argv) < len(sys.argv) - 1:
        print(utils.load_tool("plan").planned(sys.modules[__name__], argv))
    else:
        SDTrainer(utils.load_config(Config, argv, check=audit)).fit()


if __name__ == "__main__":
    utils.run_script(main)
