"""Train a slider: one visual change, learned from a few before/after pairs, on FLUX.1-dev.

Page: docs/train_pairedit.md

    python train_pairedit.py --config configs/pairedit_age.yaml     # or --c pairedit_age
    ... --python_name train_image_wocontent     # an ablation: a name of LOSSES
    ... --python_name train_image_real          # inversion LoRA of single photos (image_ids)
    ... --python_name slider_text               # from two prompts, without pictures
    ... --resume_from_checkpoint latest         # go on after a stop; finished runs are skipped
    ... --plan | --print_config | --help | --help variant

One run per data set, version and noise scale. generate.py takes the same settings. PairEdit: arXiv
2506.07992. Copy this file, change it, run it; only utils.py must lie beside it. `# EDIT HERE:` is
what an ablation changes, `# KEEP:` what breaks otherwise.

Shapes: B samples, H W pixels, h w latents (FLUX: H/8 W/8, C = 16 channels), S = (h/2)(w/2) image
tokens of 4C channels, T text tokens. Pixels lie in [-1, 1], latents are (mode - shift) * scaling,
sigma runs from 0 (picture) to 1 (noise), velocity = d latents / d sigma.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from safetensors import safe_open
from tqdm.auto import tqdm

import utils
from utils import RunLog, Section, UserError, cache_key, draw_key, listed, read_model_json

# KEEP: diffusers, transformers and accelerate are imported where they are used, so that a mistake
# in the config or the data is reported within seconds, before any of them is loaded.

log = logging.getLogger("train_pairedit")


# --- 1. objective ---------------------------------------------------------------------------------
class VariantConfig(Section):
    """What is learned, and at which noise levels."""

    python_name: Literal[*LOSSES] = "train_image"  # type: ignore[valid-type]
    """The objective: a function of LOSSES."""
    cfg_eta: float = 4.0
    """eta: factor on the pair's difference as it is learned, as inference skips the first steps."""
    noise_scales: Numbers = Field([1.0], min_length=1)
    """beta of the content-preserving schedule x + sigma beta noise; a run for each value."""
    num_noise_seeds: int | None = Field(31, ge=1, le=1000)
    """Number of different noises in a run (PairEdit has 31); null: new noise in every sample."""
    num_inference_steps: int = Field(28, ge=1, le=1000)
    """N: sigma is one of the N noise levels of an inference of N steps."""
    start_step: int = Field(0, ge=0)
    """First of the N steps whose noise level is trained; 0 is pure noise."""
    end_step: int = Field(27, ge=0)
    """Last of the N steps whose noise level is trained (included)."""
    guidance_scale: float = Field(3.5, ge=0, le=100)
    """Embedded guidance of FLUX.1-dev, in training and in pictures."""


class Active(NamedTuple):
    """An adapter that is switched on for a part of the batch."""

    adapter: str
    scale: float | torch.Tensor = 1.0  # or one for each sample, (b,)
    frozen: bool = False  # its weights get no gradient from these samples


BatchPart = tuple[Active, ...]  # what is on in one of the equal parts of a batch; () is the base
CONTENT, SEMANTIC = (Active("content"),), (Active("semantic"),)
BOTH = Active("content", frozen=True), Active("semantic")


class PairBatch(NamedTuple):
    """What an objective is made of: pairs, noise, noise levels. Latents are tokens (B, S, 4C)."""

    source: torch.Tensor  # x_A, before; of slider_text noisy tokens that the base has drawn
    target: torch.Tensor  # x_B, after
    noise: torch.Tensor
    sigma: torch.Tensor  # (B, 1, 1)
    noise_scale: float  # beta
    eta: float
    teacher: tuple[torch.Tensor, ...] = ()  # slider_text: the base's velocities of its 3 prompts


# differs from the other scripts: its target is a velocity
class Pass(NamedTuple):
    """One slice of the fused batch: noisy input, target velocity, active adapters."""

    name: str  # of its loss in the log
    noisy: torch.Tensor  # (B, S, 4C)
    target: torch.Tensor  # (B, S, 4C), the velocity to learn
    active: BatchPart
    weight: float = 1.0  # of its mean squared error


Objective = Callable[[PairBatch], list[Pass]]
LOSSES: dict[str, Objective] = {}  # the functions below, by name


def objective(function: Objective) -> Objective:
    """Make a function a choice of --python_name."""
    LOSSES[function.__name__] = function
    return function


@objective
def train_image(b: PairBatch) -> list[Pass]:  # EDIT HERE: the objective; ablations follow
    """Rebuild x_A with the content LoRA, add eta times the change with the semantic LoRA: PairEdit.

    The content-preserving schedule x_A + sigma n never attenuates the picture, so n is its
    velocity; -(x_B - x_A) moves a sample towards x_B, for sampling lowers sigma.
    """
    n = b.noise_scale * b.noise
    noisy = b.source + b.sigma * n
    change = b.eta * (b.source - b.target)
    return [Pass("content", noisy, n, CONTENT), Pass("semantic", noisy, n + change, BOTH)]


@objective
def train_image_wocontent(b: PairBatch) -> list[Pass]:
    """Leave out the content LoRA: the semantic one has to learn content, too."""
    n = b.noise_scale * b.noise
    velocity = n + b.eta * (b.source - b.target)
    return [Pass("semantic", b.source + b.sigma * n, velocity, SEMANTIC)]


@objective
def train_image_wocfg(b: PairBatch) -> list[Pass]:
    """Leave out guidance: the semantic LoRA only denoises x_B."""
    n = b.noise_scale * b.noise
    before, after = b.source + b.sigma * n, b.target + b.sigma * n
    return [Pass("content", before, n, CONTENT), Pass("semantic", after, n, BOTH)]


@objective
def train_image_fm(b: PairBatch) -> list[Pass]:
    """Take the ordinary schedule (1 - sigma) x_A + sigma noise."""
    noisy = (1 - b.sigma) * b.source + b.sigma * b.noise
    velocity = b.noise - b.source
    change = b.eta * (b.source - b.target)
    content = Pass("content", noisy, velocity, CONTENT)
    return [content, Pass("semantic", noisy, velocity + change, BOTH)]


@objective
def train_image_sliders(b: PairBatch) -> list[Pass]:
    """Learn x_B at scale 1 and x_A at scale -1: Concept Sliders (Gandikota et al. 2023)."""
    after = (1 - b.sigma) * b.target + b.sigma * b.noise
    before = (1 - b.sigma) * b.source + b.sigma * b.noise
    return [
        Pass("positive", after, b.noise - b.target, SEMANTIC),
        Pass("negative", before, b.noise - b.source, (Active("semantic", -1.0),)),
    ]


@objective
def train_image_real(b: PairBatch) -> list[Pass]:
    """Overfit one photo, so that any noise leads to it: an inversion LoRA."""
    noisy = (1 - b.sigma) * b.source + b.sigma * b.noise
    return [Pass("content", noisy, b.noise - b.source, CONTENT)]


@objective
def slider_text(b: PairBatch) -> list[Pass]:
    """Learn v_t + eta (v_+ - v_-), as long as v_+: Concept Sliders from text."""
    neutral, positive, negative = b.teacher
    guided = neutral + b.eta * (positive - negative)
    length, own = (v.flatten(1).norm(dim=1).view(-1, 1, 1) for v in (positive, guided))
    return [Pass("semantic", b.source, guided * (length / own), SEMANTIC)]


def adapters_of(name: str) -> list[str]:
    """Return the adapters that an objective trains; the last one is what it is for."""
    x = torch.ones(1, 2, 4)
    passes = LOSSES[name](PairBatch(x, x, x, torch.ones(1, 1, 1), 1.0, 1.0, (x, x, x)))
    return list(dict.fromkeys(active.adapter for part in passes for active in part.active))


# --- 2. one training step, the loop ---------------------------------------------------------------
class LoopConfig(Section):
    """How long it trains and what it saves: all of it may change when a run goes on."""

    train_iteration: int = Field(500, ge=1, le=100_000_000)
    """Optimizer steps of a run."""
    batch_size: int = Field(1, ge=1, le=4096)
    """Draws of (pair, sigma, noise) per step and process; one shape, sigmas spread evenly."""
    save_per_steps: int = Field(500, ge=1)
    """Optimizer steps between two saves (LoRA, checkpoint, preview); the end is always saved."""
    save_original_format: bool = True
    """Also write <name>.pt, the format of PairEdit and Concept Sliders."""
    resume_from_checkpoint: Literal["latest"] | None = None
    """latest: skip finished runs, continue the others from their newest valid checkpoint."""
    checkpoints_total_limit: int | None = Field(1, ge=1)
    """Number of checkpoints kept of a run, the newest ones; LoRA files stay."""
    log_every: int = Field(10, ge=1)
    """Optimizer steps between two log lines; only then the loop waits for the GPU."""
    report_to: Literal["none", "tensorboard", "wandb", "all"] = "none"
    """Trackers beside metrics.jsonl, which is always written."""
    push_to_hub: str | None = None
    """Repository (USER/NAME) of the Hub for the finished LoRA; a new one is private. Each of
    several runs gets a folder of its own there."""


def training_loss(
    trainer: PairEditTrainer, samples: Sequence[Sample], batch: PairBatch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Run all passes of a batch in ONE forward; return the loss, and the losses to log."""
    passes = LOSSES[trainer.config.python_name](batch)
    text = trainer.texts[trainer.prompts[0]]
    predict = trainer.predictor(text, samples[0].size, trainer.transformer)
    noisy, sigmas = torch.cat([part.noisy for part in passes]), batch.sigma.flatten()
    velocity = predict(noisy, sigmas.repeat(len(passes)), [part.active for part in passes])
    loss, losses = torch.zeros((), device=trainer.device), {}
    for part, v in zip(passes, velocity.chunk(len(passes)), strict=True):
        error = F.mse_loss(v, part.target)
        losses[f"loss_{part.name}"] = error.detach()
        loss = loss + part.weight * error
    return loss, {"loss": loss.detach(), **losses}


def train_step(trainer: PairEditTrainer) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Take one optimizer step; return the names of its samples and its losses."""
    samples, batch = next_batch(trainer)
    loss, losses = training_loss(trainer, samples, batch)
    trainer.accelerator.backward(loss)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.global_step += 1
    return [sample.name for sample in samples], losses


def train_loop(trainer: PairEditTrainer, run_log: RunLog, stop: utils.StopSignal) -> bool:
    """Train a run up to total_steps(); return whether a signal ended it early."""
    config, total, stopped = trainer.config, trainer.total_steps(), False
    bar = utils.progress(None, "train", total=total, initial=trainer.global_step, unit="step")
    steps, clock = [], time.monotonic()  # since the last log line
    while trainer.global_step < total and not stopped:
        steps.append(train_step(trainer))
        bar.update()
        step = trainer.global_step
        logging_now = step % config.log_every == 0
        stopped = stop.agreed(trainer.accelerator, logging_now or step % 100 == 0)
        saving = stopped or step == total or step % config.save_per_steps == 0
        if saving or logging_now:
            log_steps(trainer, run_log, steps, clock, lr=config.learning_rate)
            if saving:
                save_run(trainer)
            if saving and config.preview and not stopped:
                validate(trainer, run_log)
            steps, clock = [], time.monotonic()  # saving and previews do not count
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


def next_batch(trainer: PairEditTrainer) -> tuple[list[Sample], PairBatch]:
    """Return this process's share of the next step: of one size, its noise levels spread evenly."""
    config, accelerator = trainer.config, trainer.accelerator
    key = config.seed, trainer.run.version, trainer.global_step
    first = trainer.samples[int(utils.uniform(*key, "pair", 0) * len(trainer.samples))]
    alike = [sample for sample in trainer.samples if sample.size == first.size]
    count, rank = config.batch_size, accelerator.process_index
    samples, levels, tokens = [], [], []
    for i in range(count * rank, count * (rank + 1)):
        sample = alike[int(utils.uniform(*key, "pair", i) * len(alike))] if i else first
        part = (i + utils.uniform(*key, "sigma", i)) / (count * accelerator.num_processes)
        few, shape = config.num_noise_seeds, trainer.tokens[sample].shape[1:]
        seed = int(utils.uniform(*key, "noise", i) * few) if few else draw_key(*key, "noise", i)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        samples.append(sample)
        levels.append(config.start_step + int(part * (config.end_step - config.start_step + 1)))
        tokens.append(torch.cat([noise[None], trainer.tokens[sample]]))
    sigma = to_device(trainer.sigmas(first.size)[levels].view(-1, 1, 1), trainer.device)
    noise, *pictures = to_device(torch.stack(tokens, 1), trainer.device)  # (B, S, 4C) each
    source, target = (pictures[0], pictures[-1]) if pictures else (noise, noise)
    batch = PairBatch(source, target, noise, sigma, trainer.run.noise_scale, config.cfg_eta)
    return samples, batch if pictures else text_batch(trainer, first, batch, levels)


@torch.no_grad()
def text_batch(trainer: PairEditTrainer, sample: Sample, batch: PairBatch, ends: list) -> PairBatch:
    """Draw pictures with the base up to their noise levels, and get its velocities there."""
    texts, sigmas = [trainer.texts[p] for p in trainer.prompts], trainer.sigmas(sample.size)
    predict = trainer.predictor(texts[0], sample.size)
    ways = zip(batch.noise[:, None], ends, strict=True)
    tokens = torch.cat([draw_strip(predict, x, sigmas[: n + 1].tolist(), [0.0]) for x, n in ways])
    text = {k: torch.cat([x[k] for x in texts]).repeat_interleave(len(tokens), 0) for k in texts[0]}
    predict = trainer.predictor(text, sample.size)
    velocity = predict(tokens.repeat(3, 1, 1), batch.sigma.flatten().repeat(3), [()])
    return batch._replace(source=tokens, teacher=velocity.chunk(3))


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy without a wait for the GPU: it reads pinned memory by itself."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


# --- 3. adapter -----------------------------------------------------------------------------------
class LorasConfig(Section):
    """The LoRAs and their optimizer, AdamW; everything else stays frozen."""

    rank: int = Field(16, ge=1, le=4096)
    """Rank of each adapter."""
    alpha: float = Field(1.0, gt=0)
    """The strength of an adapter is alpha / rank."""
    train_method: Literal["full", "xattn", "xattn-strict"] = "full"
    """What is trained: full: both factors; xattn: the lower; xattn-strict: of keys and values."""
    learning_rate: float = Field(0.002, gt=0)
    """Learning rate of AdamW, constant over the run."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of AdamW."""
    seed: int = 0
    """Start values and draws are functions of seed, version and step."""


# EDIT HERE: layers with an adapter, by the end of their names; 19 * 8 + 38 * 3 = 266 of FLUX.1-dev
KEYS_AND_VALUES = ("to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
ATTENTION = ("to_q", "to_out.0", "to_add_out", *KEYS_AND_VALUES)


class AdapterSwitch:
    """Which adapters are on; every SliderLinear of a model looks here.

    KEEP: parts change only between a backward and the next forward. Gradient checkpointing runs
    the forward again during backward, and must find the same parts.
    """

    def __init__(self) -> None:
        self.parts: Sequence[BatchPart] = [()]


@functools.lru_cache(maxsize=16)  # all layers of a forward get the same two tensors
def lanes(parts: Any, ranks: Any, b: int, dtype: Any, device: Any) -> Any:
    """Return scale (fp32) and trained (0 or 1) of each sample's ranks in a layer: (B, 1, R)."""
    rows = torch.zeros(2, b, 1, sum(rank for _, rank, _ in ranks), device=device)
    for part, lane in zip(parts, rows.chunk(len(parts), dim=1), strict=True):
        on, end = {active.adapter: active for active in part}, 0
        for name, rank, strength in ranks:
            start, end = end, end + rank
            if name in on:
                lane[0, ..., start:end] = torch.as_tensor(on[name].scale * strength).view(-1, 1, 1)
                lane[1, ..., start:end] = not on[name].frozen
    return rows[0], rows[1].to(dtype)


class LowRank(torch.autograd.Function):
    """up(scale * down(x)); ranks that are not trained in a sample give its factors no gradient.

    x (B, S, in), down (R, in), up (out, R), scale and trained of lanes() -> (B, S, out).
    """

    @staticmethod
    def forward(ctx: Any, x: Any, down: Any, up: Any, scale: Any, trained: Any) -> Any:  # noqa: D102
        low = (F.linear(x, down) * scale).to(x.dtype)
        ctx.save_for_backward(x, down, up, scale, trained, low)
        return F.linear(low, up)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: D102
        (x, down, up, scale, trained, low), [out] = ctx.saved_tensors, gradients
        at_low = (out @ up * scale).to(x.dtype)
        to_down = (at_low * trained).flatten(0, 1).T @ x.flatten(0, 1)
        to_up = out.flatten(0, 1).T @ (low * trained).flatten(0, 1)
        return at_low @ down, to_down, to_up, None, None


# differs from the other scripts: one adapter at a time a step of two lanes is 28,000 kernels
class SliderLinear(torch.nn.Module):
    """A frozen layer and its adapters: base(x) + sum of scale * strength * up(down(x)).

    The batch has as many equal parts as the switch, so one forward pass serves samples with
    different adapters: those of a layer are one low-rank product, scaled for each sample.
    """

    def __init__(self, base: Any, switch: AdapterSwitch) -> None:
        super().__init__()
        self.base, self.switch = base, switch
        self.down, self.up = torch.nn.ParameterDict(), torch.nn.ParameterDict()  # (r, in), (out, r)
        self.strength: dict[str, float] = {}  # alpha / r

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output: x (B, S, in) -> (B, S, out)."""
        y, parts = self.base(x), tuple(self.switch.parts)
        on = {active.adapter for part in parts for active in part}
        if not (names := [name for name in self.down if name in on]):
            return y
        down = torch.cat([self.down[name] for name in names]).to(x.dtype)
        up = torch.cat([self.up[name] for name in names], dim=1).to(x.dtype)
        ranks = tuple((name, len(self.down[name]), self.strength[name]) for name in names)
        return y + LowRank.apply(x, down, up, *lanes(parts, ranks, len(x), x.dtype, x.device))


def adapted_layers(model: Any, name: str) -> dict[str, SliderLinear]:
    """Return {path: layer} of those that have the adapter `name`."""
    layers = model.named_modules()
    return {p: x for p, x in layers if isinstance(x, SliderLinear) and name in x.down}


def target_layers(transformer: Any, train_method: str) -> dict[str, Any]:
    """Return {path: layer} of the linear layers that get an adapter."""
    ends = KEYS_AND_VALUES if train_method == "xattn-strict" else ATTENTION
    attention = tuple(f"attn.{end}" for end in ends)
    return {p: x for p, x in transformer.named_modules() if p.endswith(attention)}


def add_slider(
    transformer: Any, switch: AdapterSwitch, name: str, factors: dict[str, Any], strength: float
) -> None:
    """Give layers an adapter: {path: (down (r, in), up (out, r))}. Raises UserError: no fit."""
    layers, wrong = dict(transformer.named_modules()), []
    for path, (down, up) in factors.items():
        inner = getattr(layers.get(path), "base", layers.get(path))
        shape = getattr(inner, "out_features", None), getattr(inner, "in_features", None)
        if shape != (len(up), down.shape[1]) or len(down) != up.shape[1]:
            wrong.append(f"{path}: {shape} here, {(len(up), down.shape[1])} in the LoRA")
    if wrong:
        raise UserError(f"{len(wrong)} layers do not fit this transformer\n{listed(wrong, 3)}")
    for path, pair in factors.items():
        layer = layers[path]
        if not isinstance(layer, SliderLinear):
            layer = SliderLinear(layer, switch)
            transformer.set_submodule(path, layer)
        # KEEP contiguous: safetensors refuses transposed factors, such as those of an SVD
        down, up = (x.to(transformer.device, torch.float32, copy=True).contiguous() for x in pair)
        layer.down[name], layer.up[name] = torch.nn.Parameter(down), torch.nn.Parameter(up)
        layer.strength[name] = strength


@torch.no_grad()
def start_slider(transformer: Any, name: str, train_method: str, *parts: object) -> None:
    """Set an adapter to values that change nothing yet: a function of `parts`."""
    for path, layer in adapted_layers(transformer, name).items():
        down, up = layer.down[name].zero_(), layer.up[name].zero_()
        if train_method == "full":  # Kaiming-uniform with a = 1
            draw = torch.Generator().manual_seed(draw_key(*parts, path))
            start = torch.rand(down.shape, generator=draw) * 2 - 1
            down.copy_(start * math.sqrt(3 / down.shape[1]))
        else:
            up.copy_(torch.linalg.qr(utils.normal(up.shape, *parts, path)).Q)  # orthonormal
            up.requires_grad_(False)


def save_slider(path: Path, transformer: Any, name: str, about: dict[str, Any]) -> None:
    """Write diffusers/PEFT names, with alpha / r folded into lora_B."""
    from peft import LoraConfig

    # KEEP alpha = r: loaders look for alpha in metadata, in `.alpha` keys, or nowhere
    layers, tensors = adapted_layers(transformer, name), {}
    for where, layer in layers.items():
        down, up = layer.down[name].detach(), layer.up[name].detach() * layer.strength[name]
        tensors[f"transformer.{where}.lora_A.weight"] = down.cpu().clone()
        tensors[f"transformer.{where}.lora_B.weight"] = up.cpu()
    settings = LoraConfig(r=len(down), lora_alpha=len(down)).to_dict()
    settings["target_modules"] = sorted(layers)
    plain = str | int | float | bool | list | dict | None
    adapter = {f"transformer.{k}": v for k, v in settings.items() if isinstance(v, plain)}
    utils.save_tensors(path, tensors, lora_adapter_metadata=adapter, image_edit_lora=about)


def save_original(path: Path, transformer: Any, name: str) -> None:
    """Write the format of PairEdit and Concept Sliders: lora_unet_* keys with alpha, torch.save."""
    tensors = {}
    for where, layer in adapted_layers(transformer, name).items():
        key, down = f"lora_unet_{where.replace('.', '_')}", layer.down[name].detach()
        tensors[f"{key}.lora_down.weight"] = down.cpu().clone()
        tensors[f"{key}.lora_up.weight"] = layer.up[name].detach().cpu().clone()
        tensors[f"{key}.alpha"] = torch.tensor(layer.strength[name] * len(down))
    utils.save_atomic(path, lambda file: torch.save(tensors, file))


# === machinery: read it when you change it ========================================================


class RunsConfig(Section):
    """Which sliders are trained, from which folders, and where they go."""

    datasets_folder: Path = Path("datasets")
    """Folder of the data sets: <data set>/<source_folder>/<stem>.* and .../<target_folder>/..."""
    datasets: list[str] = Field(["age"], min_length=1)
    """Data sets (concepts), trained one after another; slider_text: only names."""
    source_folder: str = "source"
    """Folder of the pictures before the change."""
    target_folder: str = "target"
    """Folder of the pictures after the change; stems as in source_folder."""
    image_ids: list[str] = []
    """train_image_real: stems of photos in source_folder; each gets a LoRA."""
    on_missing: Literal["error", "skip"] = "error"
    """What to do with a stem that one of the folders lacks."""
    train_start: int = Field(1, ge=0)
    """Number of the first version (repeat of a training with other draws)."""
    train_count: int = Field(1, ge=1, le=1000)
    """Number of versions, repeats of a training with other draws."""
    config_name: str = Field("base", pattern=r"^[^/\\\x00]{1,60}$")
    """Free tag in the names of runs; no slashes."""
    output_folder: Path = Path("output/models/image/")
    """Folder of all results: <output_folder>/<data set>/<run>/ holds everything a run leaves."""
    cache_dir: Path = Path("cache")
    """Folder of latents and prompt embeddings, named by their content; runs may share it."""


class Run(NamedTuple):
    """One LoRA to train."""

    dataset: str
    version: int
    noise_scale: float
    image_id: str = ""  # train_image_real


def all_runs(config: Any) -> list[Run]:
    """Return data sets x versions x noise scales (or photos), in the order they are trained."""
    versions = range(config.train_start, config.train_start + config.train_count)
    photos = [(config.noise_scales[0], photo) for photo in config.image_ids]
    last = photos or [(beta, "") for beta in config.noise_scales]
    return [Run(name, v, *each) for name in config.datasets for v in versions for each in last]


def run_folder(config: Any, run: Run) -> Path:
    """Return the folder of all that a run leaves; floats as Python writes them: 4.0, 2.25."""
    numbers = f"{float(config.cfg_eta)}eta_{float(run.noise_scale)}ns_{config.train_method}"
    parts = [run.dataset, f"v{config.python_name}", numbers, config.config_name, f"v{run.version}"]
    if run.image_id:
        parts[1:3] = run.image_id, parts[1]
    return config.output_folder / run.dataset / "_".join(parts)


def lora_stem(config: Any, run: Run, step: int) -> str:
    """Return the name of a LoRA file without its ending, after `step` optimizer steps."""
    what = run.image_id or f"{float(config.cfg_eta)}eta_{float(run.noise_scale)}ns"
    return f"{run.dataset}_{what}_{config.num_inference_steps}inf_{step}epoch"


class Sample(NamedTuple):
    """A pair of pictures; of train_image_real one photo, of slider_text none."""

    name: str
    files: tuple[Path, ...]  # before, after
    size: tuple[int, int]  # (W, H) px that they are fitted to


Found = tuple[list[Sample], list[str], list[str]]  # samples, what is odd, problems


def find_pairs(config: Config, dataset: str, index: utils.FileIndex) -> Found:
    """Find the pictures of equal stem in both folders of a data set, and look at each once."""
    if config.python_name == "slider_text":
        return [Sample(dataset, (), (config.resolution, config.resolution))], [], []
    folders = [config.datasets_folder / dataset / config.source_folder]
    if not config.image_ids:
        folders.append(config.datasets_folder / dataset / config.target_folder)
    odd: list[str] = []
    if gone := [folder for folder in folders if not folder.is_dir()]:
        near = functools.partial(utils.from_tool, "check", "near", "")
        return [], odd, [f"{dataset}: no folder {place}{near(place)}" for place in gone]
    problems: list[str] = []
    found = [utils.list_images(folder) for folder in folders]
    pairs: dict[str, tuple[Path, ...]] = {}
    for stem in config.image_ids or sorted(set().union(*found)):
        files = [stems.get(stem, []) for stems in found]
        if [] in files:
            text = f"{dataset}: no picture {stem}.* in {folders[files.index([])]}"
            if config.on_missing == "skip":
                odd.append(text)
            else:
                problems.append(f"{text}; on_missing: skip leaves it out")
        elif several := [str(file) for its in files for file in its if len(its) > 1]:
            problems.append(f"{dataset}: {', '.join(several)} have the same name; keep one")
        else:
            pairs[stem] = tuple(its[0] for its in files)
    if not pairs and not problems:
        problems.append(f"{dataset}: no pair in {', '.join(map(str, folders))}")
    problems += index.update((f for pair in pairs.values() for f in pair), utils.look_at_picture)
    samples, seen = [], []
    for name, pair in pairs.items():
        first, last = pair[0], pair[-1]
        with contextlib.suppress(KeyError):  # unreadable: not in the index
            size = nearest_bucket(index[first]["width"], index[first]["height"], config.resolution)
            samples.append(Sample(name, pair, size))
            seen.append((dataset, index[first], config.resolution**2, False))
            if first != last and index[first]["pixels"] == index[last]["pixels"]:
                problems.append(f"{first} and {last} are the same picture: no change to learn")
            elif abs(math.log(index[first]["aspect"] / index[last]["aspect"])) > 0.02:
                odd.append(f"{last} has another shape than {first}; both are cropped to one size")
    return samples, odd + utils.from_tool("check", "notes", [], seen), problems


def check_checkpoint(name: str) -> list[str]:
    """Return problems of the base model: no such folder, another kind, parts missing."""
    if name == PUBLISHED_MODEL:  # a plan and an audit need no network
        return []
    try:
        kind = read_model_json(name, "model_index.json").get("_class_name")
    except UserError as error:
        return [f"pretrained_model_name_or_path: {error}"]
    if kind != "FluxPipeline":
        return [f"pretrained_model_name_or_path: {name} is a {kind}; wanted FluxPipeline"]
    return utils.check_setup(model=("pretrained_model_name_or_path", name, FLUX_PARTS | TEXT_PARTS))


def audit(config: Config) -> list[str]:
    """Return all that can be known to be wrong before a model loads, one line each."""
    trackers = {"none": [], "all": []}.get(config.report_to, [config.report_to])
    nf4 = ["bitsandbytes"] if config.base_model_precision == "nf4-bnb" else []
    there = Path(utils.__file__).with_name("tools").joinpath("quantize.py").is_file()
    prompts = ("train_prompt", "target_prompt", "positive_prompt", "negative_prompt")
    sides = (config.source_folder, config.target_folder)
    problems = check_checkpoint(config.pretrained_model_name_or_path) + utils.check_setup(
        devices={"device": config.device},
        packages=[*trackers, *nf4],
        hub=config.push_to_hub,
        writes={"output_folder": config.output_folder, "cache_dir": config.cache_dir},
        reads=[config.datasets_folder / d / side for d in config.datasets for side in sides],
        texts={name: getattr(config, name) for name in prompts}
        | {f"prompt.{i}": text for i, text in enumerate(config.prompt)},
        one_card=True,
    )
    if config.base_model_precision != "no_change" and not there:
        problems.append("base_model_precision: tools/quantize.py was not copied along")
    index = utils.FileIndex(config.cache_dir)
    for dataset in config.datasets:
        _, odd, wrong = find_pairs(config, dataset, index)
        problems += wrong
        if odd:
            log.warning("note\n%s", listed(odd))
    return problems


# --- 4. the base model: pictures, prompts, weights ------------------------------------------------
class BaseConfig(Section):
    """The base model and its inputs."""

    pretrained_model_name_or_path: str = "black-forest-labs/FLUX.1-dev"
    """Base model: a folder in diffusers layout, or a Hub id."""
    device: Device = None
    """Number of a GPU, or cpu, cuda:0, mps; null, or several processes: the launcher's."""
    base_model_precision: Literal[
        "no_change", "int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto", "nf4-bnb"
    ] = "no_change"
    """Precision of the frozen blocks' weights; modulation is 8-bit in all but no_change."""
    mixed_precision: Literal["bf16", "no"] = "bf16"
    """bf16: the base in bf16; LoRA, loss and optimizer in fp32. no: all in fp32."""
    gradient_checkpointing: bool = True
    """Compute activations again in the backward pass: less memory, about a third more time."""
    resolution: int = Field(512, ge=32, le=8192, multiple_of=16)
    """Side of the square whose area the pictures get, px; aspect ratios are kept (buckets)."""
    max_sequence_length: int = Field(512, ge=1, le=512)
    """T5 tokens of a prompt; padded to it, as the pipeline does."""
    train_prompt: str = ""
    """Prompt of training, for all objectives but slider_text."""
    target_prompt: str = "picture of a person"
    """slider_text: what the slider is applied to."""
    positive_prompt: str = "photo of a person, smiling, happy"
    """slider_text: where a positive scale leads."""
    negative_prompt: str = "photo of a person, frowning"
    """slider_text: where a negative scale leads."""


PUBLISHED_MODEL = "black-forest-labs/FLUX.1-dev"
PUBLISHED_TRANSFORMER = {"guidance_embeds": True}  # the rest of its config are the class's defaults
TEXT_PARTS = {  # of a checkpoint: how the name of its class begins
    **{"text_encoder": "CLIPText", "text_encoder_2": "T5", "tokenizer": "", "tokenizer_2": ""}
}
FLUX_PARTS = {"scheduler": "FlowMatch", "transformer": "Flux", "vae": "AutoencoderKL$"}
# differs from the other scripts: FLUX packs 2 x 2 latents of 8 px
SIZE_MULTIPLE = 16


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


def fit_pictures(sample: Sample) -> list[Image.Image]:
    """Open, crop around the middle, resize (Lanczos, as the pipelines do) to sample.size, RGB."""
    opened = [utils.open_rgb(file) for file in sample.files]
    return [ImageOps.fit(image, sample.size, Image.Resampling.LANCZOS) for image in opened]


def to_pixels(image: Image.Image) -> torch.Tensor:
    """Turn RGB into (1, 3, H, W) fp32 in [-1, 1]."""
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = data.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255.0
    return (2.0 * pixels - 1.0)[None]


def to_image(pixels: torch.Tensor) -> Image.Image:
    """Turn (3, H, W) in [-1, 1] into RGB."""
    data = (pixels * 0.5 + 0.5).clamp(0, 1).float() * 255
    return Image.fromarray(data.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


@utils.named("the base model cannot be loaded")
def load_vae(folder: Path, device: torch.device) -> Any:
    """Load AutoencoderKL in fp32: eta multiplies the pair's difference, and rounding with it."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", dtype=torch.float32)
    return vae.to(device).eval().requires_grad_(False)


@torch.no_grad()
def encode_pixels(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Encode (B, 3, H, W) in [-1, 1] to (B, C, h, w): (posterior mode - shift) * scaling."""
    mode = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    return (mode.float() - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode (B, C, h, w) to pixels (B, 3, H, W), about [-1, 1]."""
    latents = latents.to(vae.device, vae.dtype)
    return vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample


Text = dict[str, torch.Tensor]  # a prompt: T5's "embed" (1, T, 4096), CLIP's "pooled" (1, 768)


@utils.named("the base model cannot be loaded")
@torch.no_grad()
def encode_texts(
    folder: Path, prompts: Sequence[str], length: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Text]:
    """Return {prompt: its embeddings as the pipeline makes them}, padded to `length` T5 tokens."""
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(folder, transformer=None, vae=None, dtype=dtype)
    pipeline.to(device)
    texts = {}
    for prompt in utils.progress(prompts, "encode prompts"):
        embed, pooled, _ = pipeline.encode_prompt(prompt, None, max_sequence_length=length)
        texts[prompt] = {"embed": embed, "pooled": pooled}
    return texts


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


def empty_flux(settings: dict[str, Any]) -> Any:
    """Build FluxTransformer2DModel without weights (meta device)."""
    from accelerate import init_empty_weights
    from diffusers import FluxTransformer2DModel

    with init_empty_weights():
        return FluxTransformer2DModel.from_config(settings)


@utils.named("the base model cannot be loaded")
def load_flux(folder: Path, precision: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Return the frozen transformer, quantised block by block on the device. Raises UserError."""
    model = empty_flux(read_model_json(str(folder), "transformer/config.json"))
    parts: dict[str, torch.device] = {}
    for name, part in model.named_children():
        blocks = range(len(part)) if isinstance(part, torch.nn.ModuleList) else ()
        parts |= dict.fromkeys([f"{name}.{i}" for i in blocks] or [name], device)
    fill_parts(model, folder / "transformer", dtype, parts, precision)
    for block in model.single_transformer_blocks:
        block.attn.register_forward_hook(pack_gradient)
    return model


def pack_gradient(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
    """Make the gradient of a module's output contiguous.

    KEEP: torch keeps cuDNN's attention backward by the strides of q, k, v alone. A single block's
    gradient is a slice; a double block would be read by its strides: an illegal access, or noise.
    """
    if output.requires_grad:
        output.register_hook(torch.Tensor.contiguous)


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


# --- 5. sampling ----------------------------------------------------------------------------------
# (tokens (B, S, 4C), sigma or (B,), parts of the batch) -> velocity, fp32
Predict = Callable[[torch.Tensor, float | torch.Tensor, Sequence[BatchPart]], torch.Tensor]


def pack_tokens(latents: torch.Tensor) -> torch.Tensor:
    """Pack (B, C, h, w) to (B, S, 4C): row by row; within a token channel, row, column."""
    b, c, h, w = latents.shape
    tokens = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(b, (h // 2) * (w // 2), 4 * c)


def unpack_tokens(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Unpack (B, S, 4C) of a grid of (rows, columns) tokens to (B, C, h, w)."""
    b, channels, (rows, columns) = len(tokens), tokens.shape[2] // 4, grid
    latents = tokens.view(b, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(b, channels, 2 * rows, 2 * columns)


@functools.cache
def sigma_table(folder: Path, steps: int, tokens: int) -> torch.Tensor:
    """Return the N + 1 sigmas of an inference of N steps, from 1 to 0; (N + 1,), fp32, CPU."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(tokens, *(scheduler.config[name] for name in names))
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler.sigmas


@functools.lru_cache(maxsize=64)
def position_ids(grid: tuple[int, int], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return (S, 3): 0, row, column of every image token."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1)
    return ids.view(-1, 3).to(device, dtype)


def flux_velocity(
    transformer: Any, switch: AdapterSwitch, text: Text, grid: tuple[int, int], guidance: float
) -> Predict:
    """Return the velocity under a prompt (of 1 or B); FluxPipeline's arguments and rounding."""
    guided = getattr(transformer, "module", transformer).config.guidance_embeds  # not schnell

    def predict(tokens: torch.Tensor, sigma: Any, parts: Sequence[BatchPart]) -> torch.Tensor:
        switch.parts = parts
        n, dtype, device = len(tokens), text["embed"].dtype, tokens.device
        if not isinstance(sigma, torch.Tensor):  # KEEP full(): a copy would wait for the GPU
            sigma = torch.full((n,), sigma, device=device)
        return transformer(
            hidden_states=tokens.to(dtype),
            timestep=(sigma.expand(n) * 1000).to(dtype) / 1000,
            guidance=torch.full((n,), guidance, device=device) if guided else None,
            encoder_hidden_states=text["embed"].expand(n, -1, -1),
            pooled_projections=text["pooled"].expand(n, -1),
            txt_ids=torch.zeros(text["embed"].shape[1], 3, device=device, dtype=dtype),
            img_ids=position_ids(grid, device, dtype),
            return_dict=False,
        )[0].float()

    return predict


class Slider(NamedTuple):
    """An adapter at inference: its strengths are `scale` times the strip's positions."""

    adapter: str
    scale: float = 1.0
    start: int = 0  # first step in which it is on
    gamma: float = 1.0  # share of its velocity when velocities are blended


def slider_velocity(
    predict: Predict,
    tokens: torch.Tensor,
    sigma: float,
    base: BatchPart,
    sliders: Sequence[Slider],
    positions: torch.Tensor,
    blend: bool,
) -> torch.Tensor:
    """Return the velocity with the sliders at `positions` (B,), all on in one pass."""
    moved: list[BatchPart] = [(Active(s.adapter, s.scale * positions),) for s in sliders]
    if not (blend and moved):
        return predict(tokens, sigma, [sum(moved, base)])
    parts = [base, *moved]  # each slider alone: v_base + sum of gamma (v_slider - v_base)
    plain, *others = predict(tokens.repeat(len(parts), 1, 1), sigma, parts).chunk(len(parts))
    changes = [s.gamma * (v - plain) for s, v in zip(sliders, others, strict=True)]
    return plain + torch.stack(changes).sum(0)


@torch.no_grad()
def draw_strip(
    predict: Predict,
    noise: torch.Tensor,
    sigmas: Sequence[float],
    positions: Sequence[float],
    sliders: Sequence[Slider] = (),
    base: BatchPart = (),
    blend: bool = False,
    batch_size: int = 8,
) -> torch.Tensor:
    """Draw by Euler from `noise` (1, S, 4C) at all slider positions -> (positions, S, 4C)."""
    steps = range(len(sigmas) - 1)
    first = min((slider.start for slider in sliders), default=len(steps))
    for i in steps[:first]:  # the same for all positions
        noise = noise + (sigmas[i + 1] - sigmas[i]) * predict(noise, sigmas[i], [base])
    moved = sorted({p for p in positions if p != 0})
    groups = [[0.0]] if 0 in positions else []  # KEEP alone: what the base draws, bit for bit
    groups += [moved[k : k + batch_size] for k in range(0, len(moved), batch_size)]
    drawn: dict[float, torch.Tensor] = {}
    for group in groups:
        tokens = noise.expand(len(group), -1, -1)
        scales = to_device(torch.tensor(group), noise.device)
        for i in steps[first:]:
            acting = [slider for slider in sliders if slider.start <= i and any(group)]
            velocity = slider_velocity(predict, tokens, sigmas[i], base, acting, scales, blend)
            tokens = tokens + (sigmas[i + 1] - sigmas[i]) * velocity
        drawn.update(zip(group, tokens, strict=True))
    return torch.stack([drawn[position] for position in positions])


def first_noise(
    seed: int, channels: int, grid: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return FluxPipeline's first noise with a CPU generator of `seed`, (1, S, 4C), fp32."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn((1, channels, 2 * grid[0], 2 * grid[1]), generator=draw, dtype=dtype)
    return pack_tokens(noise).to(device, torch.float32)


# --- 6. validation and results --------------------------------------------------------------------
class PreviewConfig(Section):
    """Previews, drawn as generate.py does it, which reads these settings from the same file."""

    preview: bool = True
    """Draw a strip over `scales` at every save, with the first seed and skip below."""
    prompt: list[str] = Field(["image of a person"], min_length=1)
    """Prompt of the pictures: entry k for data set k, the last one for the rest."""
    scales: Numbers = Field([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], min_length=1)
    """Positions of the slider: "0,0.5,1" or a list. Negative ones reverse the change."""
    skips: list[int] = Field([14], min_length=1)
    """The slider acts in steps i > skip (train_image_real: i >= skip); a set of strips each."""
    start_seed_gen: int = 6666
    """First seed of the pictures."""


GENERATE_ONLY = (  # settings in the same file that only generate.py reads
    *("use_prompts_file", "prompts_file", "count_gen", "use_random_seed", "output_folder_gen"),
    *("use_trained_lora_path", "trained_lora_path", "semantic_lora_path", "semantic_cfg_scale"),
    *("html", "image_format", "dtype", "allow_pickle", "script"),
)


def validate(trainer: PairEditTrainer, run_log: RunLog) -> None:
    """Draw samples/step-<n>.png: the slider at `scales`, or what an inversion makes of noise."""
    config, run, step = trainer.config, trainer.run, trainer.global_step
    if trainer.accelerator.is_main_process:
        size, scales = (config.resolution, config.resolution), config.scales
        slider = Slider(adapters_of(config.python_name)[-1], start=config.skips[0] + 1)
        if run.image_id:
            size, scales, slider = trainer.samples[0].size, [1.0], slider._replace(start=0)
        prompt, seed = trainer.preview_prompts[run.dataset], config.start_seed_gen
        predict, grid = trainer.predictor(trainer.texts[prompt], size), trainer.grid(size)
        channels = trainer.bare.config.in_channels // 4
        noise = first_noise(seed, channels, grid, trainer.dtype, trainer.device)
        tokens = draw_strip(predict, noise, trainer.sigmas(size).tolist(), scales, [slider])
        vae = load_vae(trainer.folder, trainer.device)
        row = [to_image(decode_latents(vae, x[None])[0]) for x in unpack_tokens(tokens, grid)]
        caption = f"step {step}, seed {seed}, skip {config.skips[0]}: {prompt}"
        sheet = utils.contact_sheet([row], [f"scale {scale:g}" for scale in scales], [caption])
        run_log.picture(f"step-{step:06d}", sheet, step)
    trainer.accelerator.wait_for_everyone()


def draw_pairs(trainer: PairEditTrainer, run_log: RunLog) -> None:
    """Draw samples/pairs.png: what the model sees of the first pairs."""
    shown = [sample for sample in trainer.samples[:8] if sample.files]
    folders = trainer.config.source_folder, trainer.config.target_folder
    if shown:
        rows = [fit_pictures(sample) for sample in shown]
        heads = [f"{name} (scale {k})" for k, name in enumerate(folders[: len(rows[0])])]
        sheet = utils.contact_sheet(rows, heads, [sample.name for sample in shown])
        run_log.picture("pairs", sheet, trainer.global_step)


# differs from the other scripts: each trainer its own
def trained_as(trainer: PairEditTrainer, run: Run) -> dict[str, Any]:
    """Return all that decides what a run learns: settings, pictures, noise scale."""
    free = {"device", "gradient_checkpointing", "noise_scales"}
    free |= {*LoopConfig.model_fields, *RunsConfig.model_fields, *PreviewConfig.model_fields}
    files = [file for sample in trainer.run_samples(run) for file in sample.files]
    return {
        **trainer.config.model_dump(mode="json", exclude=free),
        "noise_scale": run.noise_scale,
        "pictures": draw_key([trainer.index[file]["content"] for file in files]),
        "batch_size x processes": trainer.config.batch_size * trainer.accelerator.num_processes,
    }


def save_run(trainer: PairEditTrainer) -> None:
    """Write the LoRA files of this step, then the checkpoint to go on from. Raises UserError."""
    config, run, step = trainer.config, trainer.run, trainer.global_step
    if not torch.stack([p.isfinite().all() for p in trainer.trained]).all():
        text = f"the weights of step {step} are not finite; nothing of it was saved"
        raise UserError(f"{text}. Lower learning_rate")
    settings = trained_as(trainer, run)
    about = {"script": Path(__file__).name, "step": step, **run._asdict(), **settings}

    def write_loras(_: Path) -> None:
        for number, name in enumerate(reversed(adapters_of(config.python_name))):
            end = f"_{number - 1}" if number else ""  # content is _0, as PairEdit has it
            stem = str(trainer.output_dir / lora_stem(config, run, step)) + end
            save_slider(Path(f"{stem}.safetensors"), trainer.bare, name, about | {"adapter": name})
            if config.save_original_format:
                save_original(Path(f"{stem}.pt"), trainer.bare, name)

    if trainer.accelerator.is_main_process:
        adapters = [p.detach().cpu() for p in trainer.trained]
        training = {"adapters": adapters, "optimizer": trainer.optimizer.state_dict()}
        trainer.checkpoints.save(step, settings, training, write_loras)
    trainer.accelerator.wait_for_everyone()


SLIDER_CARD = """---
base_model: {0}
library_name: diffusers
tags: [text-to-image, lora, flux, pairedit]
---
LoRA "{1}" for {0}, trained with {3} (settings: config.yaml). To draw with it:

    {2}
"""


def write_card(trainer: PairEditTrainer) -> str:
    """Write README.md, the model card; return the command in it, which draws with the LoRA."""
    config, run = trainer.config, trainer.run
    base = config.pretrained_model_name_or_path
    lora = f"lora {trainer.output_dir / lora_stem(config, run, trainer.global_step)}.safetensors"
    lora = f"inversion_{lora} --lora slider.safetensors" if run.image_id else lora
    command = (
        f"python generate.py --pretrained_model_name_or_path {base} --{lora} --scales 0,0.5,1 "
        f'--prompt "{trainer.preview_prompts[run.dataset]}" --skip {config.skips[0]} --output '
        f"{trainer.output_dir}/strip.png --num_inference_steps {config.num_inference_steps} "
        f"--resolution {config.resolution} --max_sequence_length {config.max_sequence_length}"
    )
    card = SLIDER_CARD.format(base, run.dataset, command, Path(__file__).name)
    utils.save_text(trainer.output_dir / "README.md", card)
    return command


# --- 7. the trainer -------------------------------------------------------------------------------
class PairEditTrainer:
    """Hold the state of a run. fit() does it all, method by method."""

    transformer: Any = None  # as it trains: wrapped when there are several processes

    def __init__(self, config: Config) -> None:
        self.config, self.cache_dir = config, config.cache_dir
        self.dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
        self.switch = AdapterSwitch()
        self.prompts = [config.train_prompt]  # the first one is what the trained model is given
        if config.python_name == "slider_text":
            self.prompts = [config.target_prompt, config.positive_prompt, config.negative_prompt]
        last = len(config.prompt) - 1
        shown = {name: config.prompt[min(k, last)] for k, name in enumerate(config.datasets)}
        self.preview_prompts = shown  # of each data set
        self.all_prompts = [*self.prompts, *(shown.values() if config.preview else ())]

    def setup_accelerator(self) -> None:
        """Set up processes and devices."""
        self.accelerator: Any = utils.make_accelerator(
            self.config.report_to,
            self.config.output_folder,
            mixed_precision="no",  # KEEP: layers cast by themselves, in training as in inference
            device_placement=False,
        )
        self.device: torch.device = self.accelerator.device
        if self.config.device and self.accelerator.num_processes == 1:
            self.device = torch.device(self.config.device)
        log.setLevel(logging.INFO if self.accelerator.is_main_process else logging.ERROR)

    def total_steps(self) -> int:
        """Return the optimizer steps of a run."""
        return self.config.train_iteration

    def find_data(self) -> None:
        """Pair and hash the pictures. Raises UserError with every problem."""
        with self.accelerator.main_process_first():
            self.index = utils.FileIndex(self.cache_dir)  # KEEP: inside, to see what 0 recorded
            found = {x: find_pairs(self.config, x, self.index) for x in self.config.datasets}
        self.data = {name: samples for name, (samples, _, _) in found.items()}
        if problems := [problem for *_, wrong in found.values() for problem in wrong]:
            raise UserError(f"{len(problems)} problem(s)\n{listed(problems)}")
        self.folder = utils.fetch_checkpoint(self.config.pretrained_model_name_or_path, "*/*")
        text = [self.folder / part for part in TEXT_PARTS]
        self.encoders = fingerprint([self.folder / "vae"]), fingerprint(text, str(self.dtype))

    def run_samples(self, run: Run) -> list[Sample]:
        """Return what a run is trained on."""
        return [x for x in self.data[run.dataset] if run.image_id in ("", x.name)]

    def key_of(self, job: Sample | str) -> str:
        """Name the cache entry of a sample or prompt by all that shapes it."""
        vae, text = self.encoders
        if isinstance(job, str):
            length = self.config.max_sequence_length
            return cache_key("flux prompt", encoders=text, prompt=job, length=length)
        content = [self.index[file]["content"] for file in job.files]
        return cache_key("flux sample", vae=vae, content=content, size=job.size)

    def cached(self, job: Sample | str) -> dict[str, torch.Tensor]:
        """Return the cache entry of a sample or prompt. Raises UserError if it is damaged."""
        return utils.read_entry(utils.entry_path(self.cache_dir, self.key_of(job)))

    def cache_jobs(self) -> dict[str, Sample | str]:
        """Return every entry that training and previews ask for: {key: what is encoded}."""
        jobs: list[Sample | str] = [*self.all_prompts]
        jobs += [sample for samples in self.data.values() for sample in samples if sample.files]
        return {self.key_of(job): job for job in jobs}

    def cache_embeddings(self) -> int:
        """Encode what is missing, a share per process; return how many this one encoded."""
        jobs, accelerator, todo = self.cache_jobs(), self.accelerator, {}
        # KEEP: shares of ALL entries; what is missing changes while other processes write
        for key in sorted(jobs)[accelerator.process_index :: accelerator.num_processes]:
            try:
                self.cached(jobs[key])
            except UserError as error:
                todo[jobs[key]] = key
                if utils.entry_path(self.cache_dir, key).exists():
                    log.warning("%s; it is built again", error)
        log.info("cache: %d entries, %d to encode", len(jobs), len(todo))
        if pairs := [job for job in todo if isinstance(job, Sample)]:
            vae = load_vae(self.folder, self.device)
            loaded = zip(pairs, utils.ahead(fit_pictures, pairs), strict=True)
            for pair, images in utils.progress(loaded, "encode pictures", total=len(pairs)):
                latents = [encode_pixels(vae, to_pixels(image)) for image in images]
                tokens = pack_tokens(torch.cat(latents))
                utils.save_tensors(utils.entry_path(self.cache_dir, todo[pair]), {"tokens": tokens})
            del vae  # KEEP: the encoders are never in memory together
            accelerator.free_memory()
        if prompts := [job for job in todo if isinstance(job, str)]:
            how = self.config.max_sequence_length, self.dtype, self.device
            for prompt, text in encode_texts(self.folder, prompts, *how).items():
                utils.save_tensors(utils.entry_path(self.cache_dir, todo[prompt]), text)
            accelerator.free_memory()
        accelerator.wait_for_everyone()
        return len(todo)

    def load_models(self) -> None:
        """Load the frozen base, the adapters of this objective and all prompts."""
        config, method, rank = self.config, self.config.train_method, self.config.rank
        vae = read_model_json(str(self.folder), "vae/config.json")
        self.token_px = 2 ** len(vae["block_out_channels"])  # a token is 2 x 2 latents
        self.texts: dict[str, Text] = {}
        for prompt in self.all_prompts:
            self.texts[prompt] = {k: x.to(self.device) for k, x in self.cached(prompt).items()}
        self.bare = load_flux(self.folder, config.base_model_precision, self.dtype, self.device)
        if config.gradient_checkpointing:
            self.bare.enable_gradient_checkpointing()
        zeros = {
            path: (torch.zeros(rank, layer.in_features), torch.zeros(layer.out_features, rank))
            for path, layer in target_layers(self.bare, method).items()
        }
        for name in adapters_of(config.python_name):
            add_slider(self.bare, self.switch, name, zeros, config.alpha / rank)
            start_slider(self.bare, name, method)  # which factors are trained
        # KEEP: DDP must wrap the transformer itself, or gradients are never averaged
        self.transformer = self.accelerator.prepare(self.bare)

    def start_run(self, run: Run) -> None:
        """Take the new adapters, optimizer and samples of a run; the base stays."""
        if not self.transformer:
            self.load_models()
        config, self.run, self.global_step = self.config, run, 0
        self.output_dir = run_folder(config, run)
        self.checkpoints = utils.Checkpoints(self.output_dir, config.checkpoints_total_limit)
        for name in adapters_of(config.python_name):
            parts = config.seed, run.version, "start", name
            start_slider(self.bare, name, config.train_method, *parts)
        self.trained = [p for p in self.bare.parameters() if p.requires_grad]
        rate, decay = config.learning_rate, config.weight_decay
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.trained, rate, weight_decay=decay, fused=fused)
        self.samples, self.tokens = self.run_samples(run), {}
        for x in self.samples:
            none = torch.empty(0, math.prod(self.grid(x.size)), self.bare.config.in_channels)
            self.tokens[x] = self.cached(x)["tokens"] if x.files else none

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the (rows, columns) of tokens of a picture of (W, H) px."""
        return size[1] // self.token_px, size[0] // self.token_px

    def sigmas(self, size: tuple[int, int]) -> torch.Tensor:
        """Return the noise levels of a picture of (W, H) px, (N + 1,), CPU."""
        return sigma_table(self.folder, self.config.num_inference_steps, math.prod(self.grid(size)))

    def predictor(self, text: Text, size: tuple[int, int], model: Any = None) -> Predict:
        """Return the velocity of the base and its adapters under a prompt."""
        grid, guidance = self.grid(size), self.config.guidance_scale
        return flux_velocity(model or self.bare, self.switch, text, grid, guidance)

    def fit(self) -> None:
        """Cache, load once, train every run that is not finished."""
        self.setup_accelerator()
        self.find_data()
        starts: dict[Run, Any] = dict.fromkeys(all_runs(self.config))
        if wanted := self.config.resume_from_checkpoint:  # refused before the encoders load
            for run in starts:
                checkpoints = utils.Checkpoints(run_folder(self.config, run))
                starts[run] = checkpoints.find(wanted, trained_as(self, run))
        self.cache_embeddings()
        with utils.StopSignal() as stop:
            for run, start in starts.items():
                step, folder = start[1] if start else 0, run_folder(self.config, run)
                log.info("%s: step %d of %d", folder, step, self.total_steps())
                if step < self.total_steps() and train_run(self, run, start, stop):
                    break
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


def train_run(trainer: PairEditTrainer, run: Run, start: Any, stop: utils.StopSignal) -> bool:
    """Train from the beginning or a checkpoint (folder, step); return whether a signal ended it."""
    accelerator, folder = trainer.accelerator, run_folder(trainer.config, run)
    main = accelerator.is_main_process
    with utils.Checkpoints(folder).only_run() if main else contextlib.nullcontext():
        trainer.start_run(run)
        if stop.agreed(accelerator, True):  # it came while models were loaded or a preview drawn
            return True
        if start:
            with utils.named(f"{start[0]} cannot be read"):
                state = torch.load(start[0] / "training_state.pt", "cpu", weights_only=True)
            for parameter, value in zip(trainer.trained, state["adapters"], strict=True):
                parameter.data.copy_(value)
            trainer.optimizer.load_state_dict(state["optimizer"])
            trainer.global_step = start[1]
        elif main:
            trainer.checkpoints.set_aside("*epoch*.safetensors", "*.pt")
        run_log = RunLog(accelerator, folder, trainer.config, trainer.global_step)
        if main:
            utils.run_record(folder, trainer.config, Path(__file__))
            draw_pairs(trainer, run_log)
        stopped = train_loop(trainer, run_log, stop)
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers = []  # the next run has its own
        if main:
            command, several = write_card(trainer), len(all_runs(trainer.config)) > 1
            place = folder.name if several else ""  # of each run in the repository
            utils.from_tool("after", "tell", None, folder, stopped, command, place)
    return stopped


# --- 8. config and main ---------------------------------------------------------------------------
Numbers = Annotated[  # "0,1,2", alone or in a list
    list[float],
    BeforeValidator(lambda v: ",".join(map(str, v if isinstance(v, list) else [v])).split(",")),
]
Device = Annotated[str | None, AfterValidator(lambda d: f"cuda:{d}" if d and d.isdecimal() else d)]


class Config(PreviewConfig, LorasConfig, LoopConfig, VariantConfig, RunsConfig, BaseConfig):
    """train_pairedit.py: sliders from pairs, on FLUX.1-dev; names and defaults are PairEdit's."""

    @model_validator(mode="before")
    @classmethod
    def _leave_to_generate(cls, data: dict[str, Any]) -> dict[str, Any]:
        unread = {*GENERATE_ONLY} - cls.model_fields.keys()  # generate.py adds them to this class
        return {name: value for name, value in data.items() if name not in unread}

    def rules(self) -> dict[str, Any]:
        """Return {problem: whether it is there}."""
        first, last, steps = self.start_step, self.end_step, self.num_inference_steps
        lists = self.datasets, self.noise_scales, self.image_ids
        strange = [n for n in self.datasets if n in ("", ".", "..") or {"/", "\\"} & {*n}]
        photos, skip = self.python_name == "train_image_real", self.skips[0]
        order = f"start_step {first} <= end_step {last} < num_inference_steps {steps} does not hold"
        late = f"skips: {skip} of {steps} steps, the slider never acts; lower it, or preview: false"
        twice = "datasets, noise_scales, image_ids: a value is there twice"
        return {
            order: not first <= last < steps,
            late: self.preview and not photos and skip + 1 >= steps,
            twice: any(len({*values}) < len(values) for values in lists),
            f"datasets: {strange} are no names of folders": strange,
            "image_ids: go with python_name train_image_real": photos != bool(self.image_ids),
            "skips: -1 is the least, and is all steps": min(self.skips) < -1,
        }


def with_named_config(argv: Sequence[str]) -> list[str]:
    """Turn `--c NAME` or `--c=NAME` into `--config configs/NAME.yaml`, here or by the script."""
    given = [x for arg in argv for x in (arg.split("=", 1) if arg.startswith("--c=") else [arg])]
    if "--c" in given:
        at = given.index("--c")
        file = Path("configs") / f"{''.join(given[at + 1 : at + 2]).removesuffix('.yaml')}.yaml"
        beside = Path(__file__).parent / file
        place = beside if beside.exists() and not file.exists() else file
        given[at : at + 2] = "--config", str(place)
    return given


def main() -> None:
    """Read the config, audit, fit; with --plan only say what the run would be."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    argv = [arg for arg in sys.argv[1:] if arg != "--plan"]
    if len(argv) < len(sys.argv) - 1:
        print(utils.load_tool("plan").planned(sys.modules[__name__], with_named_config(argv)))
    else:
        PairEditTrainer(utils.load_config(Config, with_named_config(argv), check=audit)).fit()


if __name__ == "__main__":
    utils.run_script(main)
