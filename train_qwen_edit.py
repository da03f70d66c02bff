"""Train a LoRA for Qwen-Image-Edit (2508, 2509, 2511) on (references, instruction) -> target.

Page: docs/train_qwen_edit.md

    accelerate launch train_qwen_edit.py --config configs/demo_qwen_edit.yaml          # CPU demo
    accelerate launch train_qwen_edit.py --config configs/x.yaml                       # one GPU
    accelerate launch --multi_gpu --num_processes 2 train_qwen_edit.py --config configs/x.yaml
    ... --train.resume_from_checkpoint latest        # go on after a stop
    ... --print_config | --help

This is no library: copy the file, change it, run it; only utils.py must lie beside it.
`# EDIT HERE:` marks what an ablation changes, `# KEEP:` what breaks otherwise.

Shapes: B samples, T text tokens, D text width (3584), H W pixels, h w = H/8 W/8 latents (16
channels), S = (h/2)(w/2) image tokens of 64 channels each, K references. Pixels lie in [-1, 1],
latents are normalised per channel, sigma runs from 0 (picture) to 1 (noise), velocity = noise - x0.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import difflib
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
import resource
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pydantic import Field, field_validator, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from utils import (
    FileIndex,
    MetricLog,
    Section,
    StopSignal,
    UserError,
    cache_key,
    draw_key,
    entry_path,
    hash_file,
    list_images,
    listed,
    load_config,
    normal,
    read_entry,
    run_record,
    run_script,
    save_atomic,
    save_folder_atomic,
    shuffled,
    uniform,
    write_entry,
    write_tensors,
)

# KEEP: diffusers, transformers, peft and accelerate are imported where they are used, so that a
# mistake in the config or the data is reported within seconds, before any of them is loaded.

LORA_FILE = "pytorch_lora_weights.safetensors"
SIZE_MULTIPLE = 32  # px; the pipelines round every side to it, so training does too
AREA_1MP = 1024 * 1024
VISION_AREA = 384 * 384  # area_px of the pictures shown to the text encoder by Edit-Plus
ASPECT_TOLERANCE = 0.02  # references whose log aspect differs less share the target's crop

log = logging.getLogger("train_qwen_edit")


# --- 1. config ------------------------------------------------------------------------------------


def parse_blocks(text: str) -> set[int]:
    """ "0-10, 50-59, 7" -> {0, ..., 10, 7, 50, ..., 59}; "" -> {}. Raises ValueError."""
    found: set[int] = set()
    for part in text.replace(" ", "").split(","):
        first, dash, last = part.partition("-")
        if not part:
            continue
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"'{part}' is no block or range of blocks such as 0-10")
        if dash and int(first) >= int(last):
            raise ValueError(f"'{part}': a range goes up")
        found |= set(range(int(first), int(last or first) + 1))
    return found


class LoraConfig(Section):
    """The adapter on the transformer; everything else stays frozen."""

    r: int = Field(16, ge=1)
    """Rank. File size and memory grow linearly with it."""
    lora_alpha: float | None = Field(None, gt=0)
    """Strength is lora_alpha / r; null means lora_alpha = r."""
    method: Literal["lora", "dora", "lokr"] = "lora"
    """dora: LoRA with learned column norms; lokr: Kronecker product of two small matrices."""
    lokr_factor: int = Field(-1, ge=-1)
    """lokr: size of the smaller matrix; -1: about the square root of the layer."""
    init_lora_weights: Literal["gaussian", "kaiming"] = "gaussian"
    """How A starts; B starts at zero, so step 0 is the base model."""
    target_modules: list[str] | str = "attn-image"
    """A named set (attn-image, attn-all, attn+mlp, all-linear), names of linear layers (matched
    from the end), or one regular expression."""
    exclude_blocks: str = ""
    """Blocks without an adapter: "59" or "0-10, 50-59"."""
    pretrained_weight: Path | None = None
    """Start from this LoRA file (same method, r and target_modules) instead of from nothing."""

    @field_validator("exclude_blocks")
    @classmethod
    def _ranges(cls, value: str) -> str:
        parse_blocks(value)
        return value


class ModelConfig(Section):
    """The base model. Which of 2508, 2509, 2511 it is stands in its own files."""

    pretrained_model_name_or_path: str = "Qwen/Qwen-Image-Edit-2511"
    """Folder in diffusers layout, or a Hub id."""
    base_model_precision: Literal[
        "no_change", "int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto", "nf4-bnb"
    ] = "no_change"
    """Weights of the frozen transformer blocks; embedders, modulation and output stay in bf16."""
    quantize: bool = False
    """Short for base_model_precision: fp8-quanto."""
    quantize_via: Literal["cpu", "accelerator"] = "accelerator"
    """Where a block is quantised while it loads."""
    quantize_activations: bool = False
    """Also the inputs of the quantised layers, in the same type (quanto int8 and fp8 only)."""
    devices: list[str] = []
    """Spread the transformer's blocks over these, e.g. [cuda:0, cuda:1]; one process."""
    blocks_to_swap: int = Field(0, ge=0)
    """Blocks that wait in CPU memory until they are needed; with gradient checkpointing."""
    lora: LoraConfig = LoraConfig()

    @model_validator(mode="after")
    def _one_precision(self) -> ModelConfig:
        if self.quantize and self.base_model_precision not in ("no_change", "fp8-quanto"):
            raise ValueError("quantize: true means fp8-quanto; leave it out beside another type")
        if self.quantize_activations and self.precision not in ("int8-quanto", "fp8-quanto"):
            raise ValueError("quantize_activations goes with int8-quanto or fp8-quanto")
        if self.blocks_to_swap and self.precision == "nf4-bnb":
            raise ValueError("blocks_to_swap goes with every precision but nf4-bnb")
        if self.blocks_to_swap and len(self.devices) > 1:
            raise ValueError("blocks_to_swap or several devices, not both")
        return self

    @property
    def precision(self) -> str:
        """What the blocks are stored in, `quantize` resolved."""
        return "fp8-quanto" if self.quantize else self.base_model_precision


class ImageConfig(Section):
    """One role of the suffix layout."""

    suffix: str = ""
    """What a stem ends with: "_T" for a_T.png. "" takes stems that end with no other suffix."""


class TargetItem(Section):
    """The picture that is learned."""

    image: str
    """A name of image_configs: what training moves towards."""
    from_image: str | None = None
    """A name of image_configs: what is noised instead of the target."""
    from_image_mode: Literal["bridge", "consistent", "replace"] = "bridge"
    """x = (1 - sigma) from + sigma noise. bridge: the velocity leads to `image` as if x came from
    it (noise - image); consistent: from x exactly to `image` ((x - image) / sigma); replace:
    `from_image` is the target itself."""
    resize: int | None = Field(None, ge=64)
    """Resolution of this target instead of the data set's."""


class ReferenceItem(Section):
    """One picture of a reference list."""

    image: str
    """A name of image_configs."""
    resize: int | None = Field(None, ge=64)
    """Side of the square of equal area, px, instead of data.reference_area."""
    sample_type: Literal["from_same_name", "from_subdir"] = "from_same_name"
    """from_subdir: other pictures, at random, from the folder of `image`."""
    suffix: str = ""
    """from_subdir: only pictures whose stem ends with this."""
    count: int = Field(1, ge=1)
    """from_subdir: how many pictures."""
    draws: int = Field(1, ge=1)
    """from_subdir: how many such choices each sample has; one is drawn per visit, all are
    cached."""


class ReferenceListConfig(Section):
    """The pictures shown to the text encoder together with the instruction."""

    reference_config: str
    """A name of reference_configs."""
    resize: int | None = Field(None, ge=32)
    """Side of the square of equal area, px. null means what the model's pipeline does (384)."""
    dropout: float = Field(0.0, ge=0, le=1)
    """Chance to leave a picture out, drawn per visit."""
    min_length: int = Field(1, ge=0)
    """At least this many pictures stay."""


class CaptionConfig(Section):
    """Where the instruction comes from."""

    image: str
    """The caption file lies beside this picture."""
    ext: str = ".txt"
    """Its extension."""
    instruction: str | None = None
    """Replaces the model's own system instruction; generate.py reads it from the LoRA file."""
    reference_list: ReferenceListConfig | None = None
    """null: the references of the batch config, which is what inference does."""


class BatchConfig(Section):
    """One combination of target, references and caption; one is drawn per visit."""

    target_config: str
    caption_config: str
    reference_config: str | None = None
    """null: no references for the transformer."""
    mask: str | None = None
    """A name of image_configs: white where the loss counts more (loss.mask)."""
    caption_dropout: float | None = Field(None, ge=0, le=1)
    """Chance of training without the instruction; null: data's rate."""
    reference_dropout: float = Field(0.0, ge=0, le=1)
    """Chance, at each reference in turn, to leave it and all later ones out of the transformer."""
    weight: float | None = Field(None, gt=0)
    """Chance of this combination (all together at most 1); those without one share the rest."""


class DatasetConfig(Section):
    """One data set: suffix layout (image_configs), folders layout (target_dir), table or Hub."""

    id: str = ""
    """Name of the data set, for validation.eval_dataset_id and the log; default: its folder's."""
    train_data_dir: Path = Path()
    """Folder of the data set; it is only read."""
    resolution: int = Field(1024, ge=64, multiple_of=SIZE_MULTIPLE)
    """Side of the square whose area the targets get, px; aspect ratios are kept (buckets)."""
    buckets: Literal["fine", "table"] = "fine"
    """fine: every size in steps of 32 px; table: the 13 shapes (and their transposes) that
    T2ITrainer's resolutions have, nearest ratio."""
    repeats: int = Field(1, ge=1)
    """Visits of each sample per epoch."""
    loss_weight: float = Field(1.0, gt=0)
    """Factor of this data set's loss."""
    recreate_cache: bool = False
    """Encode again even what is in the cache."""
    recreate_cache_target: bool = False
    """... only the targets."""
    recreate_cache_reference: bool = False
    """... only the references."""
    recreate_cache_caption: bool = False
    """... only the captions."""
    holdout: list[str] = []
    """Samples kept out of training; validation uses them."""
    holdout_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of the samples kept out in addition, drawn by the seed."""
    on_missing: Literal["error", "skip", "allow_fewer"] = "error"
    """What to do with a sample that lacks a file or a caption. allow_fewer: train it with the
    references it has, if it has one (the rest as with error)."""
    views: int = Field(1, ge=1)
    """Cached views per sample: the whole picture, then views - 1 random crops."""
    view_scale: float = Field(1.0, gt=0, le=1)
    """Smallest side of a random crop, relative to the whole picture."""
    view_flip: bool = False
    """Mirror half of the random crops. Not for edits that know left from right."""
    conditioning_type: Literal["auto", "reference_strict", "reference_loose"] = "auto"
    """reference_strict: every reference gets the target's crop; reference_loose: its own frame
    whole; auto: strict for references of the target's aspect, loose for the others."""
    conditioning_multidataset_sampling: Literal["combined", "random"] = "combined"
    """combined: all references of a sample; random: one of them per visit."""
    caption_lines: bool | None = None
    """Each line of a caption file is a caption of its own, one is drawn per visit; null: true in
    the folders layout, false in the suffix layout."""
    image_configs: dict[str, ImageConfig] = {}
    """Suffix layout: role -> suffix."""
    target_configs: dict[str, list[TargetItem]] = {}
    """Suffix layout: name -> [the target]."""
    reference_configs: dict[str, list[ReferenceItem]] = {}
    """Suffix layout: name -> references, in the order the model sees them."""
    caption_configs: dict[str, CaptionConfig] = {}
    """Suffix layout: name -> caption."""
    batch_configs: list[BatchConfig] = []
    """Suffix layout: combinations, drawn at random per visit."""
    target_dir: Path | None = None
    """Folders layout: folder of the targets, relative to train_data_dir."""
    reference_dirs: list[Path] = []
    """Folders layout: folders of the references, in order; same relative stem, any extension.
    More of one sample in one folder: a.png, a_control_1.png, a_control_2.png."""
    mask_dir: Path | None = None
    """Folders layout: masks of the same stem; without it a_mask.png beside target or reference."""
    caption_ext: str = ".txt"
    """Folders layout: caption files lie beside the targets (or the first references)."""
    caption: str | None = None
    """One instruction for every sample, instead of files or columns."""
    table: Path | None = None
    """CSV or JSONL: path_target, path_control, path_control_1, ..., prompt, path_mask (or target,
    references, prompt, mask); paths from train_data_dir or the table's folder."""
    hf_dataset: str | None = None
    """Hub id or folder of a Hugging Face data set with the columns target_image, control_images,
    prompt and, if there are masks, control_mask."""
    hf_split: str = "train"
    """Its split."""
    selected_control_indexes: list[int] = []
    """Of several references per sample only these, from 1; [] means all."""

    @model_validator(mode="after")
    def _one_layout(self) -> DatasetConfig:
        layouts = {
            "image_configs (suffix layout: a_T.png a_R.png)": self.image_configs,
            "target_dir and reference_dirs (folders layout)": self.target_dir,
            "table": self.table,
            "hf_dataset": self.hf_dataset,
        }
        if sum(map(bool, layouts.values())) != 1:
            raise ValueError(f"give one of {', '.join(layouts)}")
        if self.target_dir and not self.reference_dirs:
            raise ValueError("reference_dirs is empty: name at least one folder")
        if self.reference_dirs and not self.target_dir:
            raise ValueError("reference_dirs belongs to the folders layout: name target_dir too")
        if self.views == 1 and (self.view_flip or self.view_scale < 1):
            raise ValueError("view_flip and view_scale are about random crops: set views above 1")
        if self.image_configs and not self.batch_configs:
            raise ValueError("batch_configs is empty: name at least one combination")
        if sum(b.weight or 0 for b in self.batch_configs) > 1 + 1e-9:
            raise ValueError("the weights of batch_configs sum to more than 1")
        return self

    @property
    def name(self) -> str:
        """`id`, or what the data set is read from."""
        source = self.hf_dataset or self.table or self.train_data_dir
        return self.id or Path(source).name or str(source)


class DataConfig(Section):
    """Pairs, batches, and the size of references."""

    dataset_configs: list[DatasetConfig] = []
    """The data sets; all of them are mixed."""
    batch_size: int = Field(1, ge=1)
    """Samples per forward pass and process (of one shape: targets and references)."""
    max_tokens_per_batch: int | None = Field(None, ge=1)
    """Fewer samples per forward pass where pictures are large: image tokens (target and
    references) of a pass stay below this, if one sample does."""
    num_workers: int = Field(2, ge=0)
    """Processes that read the cache; changes no result."""
    shuffle: bool = True
    """A new order every epoch."""
    caption_dropout_rate: float = Field(0.0, ge=0, le=1)
    """Chance of training without the instruction."""
    caption_dropout_mode: Literal["empty", "zero"] = "empty"
    """empty: the empty instruction with the same references, which is what guidance uses; zero:
    the whole embedding (pictures too) is zeros of the same length."""
    reference_area: Literal["1mp", "target"] | int = "1mp"
    """Area of each reference in the transformer: 1mp is what the pipelines do; "target" makes it
    as large as the target (2.8 times fewer operations at 512 px); or a number of pixels. It is
    written into the LoRA file, and generate.py follows it."""


class LoggingConfig(Section):
    """Where results go."""

    output_dir: Path = Path("outputs/qwen_edit")
    """Everything a run leaves lies here (but for the cache)."""
    log_every: int = Field(10, ge=1)
    """Steps between two log lines; only then the loop waits for the GPU."""
    report_to: Literal["none", "tensorboard", "wandb", "all"] = "none"
    """Trackers beside metrics.jsonl, which is always written."""
    tracker_project_name: str = "qwen-image-edit"
    """Project name for the trackers."""


class OptimizerConfig(Section):
    """The optimizer."""

    class_path: str = "torch.optim.AdamW"
    """adamw, adamw8bit, adafactor, prodigy, schedulefree, or any importable class."""
    init_args: dict[str, Any] = {"lr": 1e-4}
    """Its arguments."""


class LrSchedulerConfig(Section):
    """Learning rate schedule of diffusers; counts optimizer steps, whatever the processes."""

    scheduler_type: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "piecewise_constant",
    ] = "constant"
    """Shape after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Steps from 0 to the full rate."""
    num_cycles: float = Field(0.5, gt=0)
    """cosine: half waves / 2; cosine_with_restarts: restarts (whole)."""
    power: float = Field(1.0, gt=0)
    """polynomial: exponent."""
    step_rules: str | None = None
    """piecewise_constant: "1:100,0.1:200,0.01": factor 1 up to step 100, 0.1 up to 200, ..."""


class TrainConfig(Section):
    """The loop."""

    max_train_steps: int = Field(1000, ge=1)
    """Optimizer steps; the run stops there."""
    num_epochs: int | None = Field(None, ge=1)
    """Stop earlier, after this many passes over the data."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Forward passes per optimizer step and process."""
    checkpointing_steps: int = Field(500, ge=1)
    """Steps between two checkpoints."""
    checkpoints_total_limit: int | None = Field(None, ge=1)
    """Keep only the newest ones (older ones go after a new one is safe)."""
    resume_from_checkpoint: str | None = None
    """"latest" (the newest valid one; from step 0 if there is none) or a checkpoint folder."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    use_ema: bool = False
    """Keep a moving average of the adapter in fp32; saved beside it, under its own name."""
    ema_decay: float = Field(0.995, ge=0, lt=1)
    """Share that stays per step; at step n at most (1 + n) / (10 + n)."""
    ema_device: Literal["accelerator", "cpu"] = "accelerator"
    """cpu saves its memory on the GPU; the loop then waits at every update."""
    ema_update_interval: int = Field(1, ge=1)
    """Steps between two updates; the decay is raised to that power."""
    mixed_precision: Literal["bf16", "no"] = "bf16"
    """bf16: base in bf16, LoRA, loss and optimizer in fp32. no: all in fp32. (No fp16: the
    activations of Qwen-Image leave its range.)"""
    gradient_checkpointing: bool = True
    """Saves memory (95 -> 45 GB at 1024 px with one 1 MP reference), costs 1.4 times the time."""


class CacheConfig(Section):
    """Latents and embeddings are computed once, on these devices, before the transformer loads."""

    use_cache: bool = True
    """false: encode in every step (VAE and text encoder stay in memory)."""
    cache_dir: Path = Path("cache")
    """May be shared by runs; entries are named by their content."""
    vae_encoder_device: str | None = None
    """E.g. cuda:1; null: the training device."""
    text_encoder_device: str | None = None
    """E.g. cuda:2; null: the training device."""


class PredictDevices(Section):
    """A device per component; null: the training device."""

    vae: str | None = None
    text_encoder: str | None = None
    transformer: str | None = None


class PredictConfig(Section):
    """Inference with trainer.predict()."""

    devices: PredictDevices = PredictDevices()


class ValidationSample(Section):
    """An edit without a target."""

    prompt: str
    """The instruction."""
    images: list[Path]
    """References, in order."""
    negative_prompt: str | None = None
    """null: validation's."""
    height: int | None = Field(None, ge=32, multiple_of=16)
    """px; null: validation.resolution."""
    width: int | None = Field(None, ge=32, multiple_of=16)
    """px; see height."""
    num_inference_steps: int | None = Field(None, ge=2)
    """null: validation's."""
    true_cfg_scale: float | None = Field(None, ge=1)
    """null: validation's."""
    seed: int | None = None
    """null: validation's."""


class ValidationConfig(Section):
    """Pictures and loss on held-out samples (holdout, holdout_ratio, eval_dataset_id)."""

    steps: int | None = Field(None, ge=1)
    """Steps between two validations; null: none."""
    eval_dataset_id: list[str] = []
    """Data sets (id) that are kept out of training whole."""
    samples: list[ValidationSample] = []
    """More edits to draw, without a target."""
    max_samples: int = Field(4, ge=1)
    """Held-out samples drawn on the sheet; the loss takes all."""
    seed: int = 42
    """Noise of the pictures and of the loss; the same every time."""
    resolution: int | None = Field(None, ge=64)
    """Side of the square of equal area, px; null: the target's own size (samples: 1 MP)."""
    num_inference_steps: int = Field(20, ge=2)
    """Euler steps of the pictures (a single one divides by zero in the scheduler)."""
    true_cfg_scale: float = Field(4.0, ge=1)
    """1: no guidance. Else against negative_prompt, as in the pipeline."""
    negative_prompt: str = ""
    """"" is the empty instruction with the same references."""


class LossConfig(Section):
    """What is minimised, and at which noise levels."""

    loss_type: Literal["mse", "huber"] = "mse"  # EDIT HERE: add yours here and to LOSSES
    """A name of LOSSES."""
    huber_c: float = Field(0.1, gt=0)
    """huber: errors above this count linearly."""
    mask: Literal["none", "file", "difference"] = "none"
    """Weigh the loss by region: a mask file (where there is none, all counts alike), or where the
    target differs from the first reference. Divided by the sum of the weights."""
    mask_loss: bool = False
    """Short for mask: file."""
    foreground_weight: float = Field(2.0, ge=0)
    """Weight where the mask is white."""
    background_weight: float = Field(1.0, ge=0)
    """Weight where it is black."""
    difference_threshold: float = Field(0.1, gt=0, le=1)
    """difference: mean change of a channel (0..1) that counts as changed altogether."""
    timestep_density: Literal["logit_normal", "uniform", "mode", "sigmoid"] = "logit_normal"
    """Density of sigma before the shift (mode: SD3's; sigmoid: of sigmoid_scale x normal)."""
    logit_mean: float = 0.0
    """logit_normal: larger means noisier."""
    logit_std: float = Field(1.0, gt=0)
    """logit_normal: larger means wider."""
    mode_scale: float = 1.29
    """mode: above 0 favours the middle."""
    sigmoid_scale: float = Field(1.0, gt=0)
    """sigmoid: larger means wider."""
    timestep_shift: Literal["model"] | float = "model"
    """"model": the shift that inference uses at this resolution; a number s > 0:
    sigma' = s sigma / (1 + (s - 1) sigma); 1: none."""
    rollout_steps: int = Field(0, ge=0)
    """Scheduled sampling: Euler steps of the model itself that lead to the noisy picture it is
    then trained on; 0: off."""
    rollout_probability: float = Field(0.5, ge=0, le=1)
    """Share of the samples that are rolled out."""
    rollout_warmup_steps: int = Field(0, ge=0)
    """Steps over which the share grows from 0."""
    rollout_span: float = Field(1 / 30, gt=0, le=1)
    """Sigma that one rollout step covers; 1/30: a step of an inference with 30."""
    rollout_target: Literal["corrected", "plain"] = "corrected"
    """corrected: velocity from where the rollout ended to the picture, (x - x0) / sigma; plain:
    noise - x0, as if it had not moved."""

    @model_validator(mode="after")
    def _possible(self) -> LossConfig:
        if self.timestep_shift != "model" and float(self.timestep_shift) <= 0:
            raise ValueError("timestep_shift must be 'model' or a number above 0")
        if self.region != "none" and self.foreground_weight + self.background_weight == 0:
            raise ValueError("foreground_weight and background_weight are both 0")
        return self

    @property
    def region(self) -> str:
        """`mask`, with `mask_loss` resolved."""
        return "file" if self.mask_loss and self.mask == "none" else self.mask


class Config(Section):
    """train_qwen_edit.py: a LoRA for Qwen-Image-Edit from before/after pairs."""

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
    """Order, noise, noise levels, dropout, crops and the start of the LoRA."""


# --- 2. pairing: files -> samples, audited before any model loads ---------------------------------


class Variant(NamedTuple):
    """A sample as one batch config sees it."""

    target: Path
    references: tuple[Path, ...]
    vision: tuple[Path, ...]  # what the text encoder sees, in order
    caption: str
    caption_dropout: float
    vision_dropout: float
    vision_min: int
    vision_area: int | None  # px; None: what the pipeline does
    weight: float


class Sample(NamedTuple):
    """One row of the data: a name and its variants."""

    name: str
    dataset: int
    held_out: bool
    variants: tuple[Variant, ...]


def nearest(name: str, names: Iterable[str]) -> str:
    """' (did you mean ...?)' or the list of what there is."""
    names = list(names)
    if close := difflib.get_close_matches(name, names, n=1, cutoff=0.4):
        return f", did you mean '{close[0]}'?"
    return f" (there is: {', '.join(names[:10]) or 'none'}{', ...' if len(names) > 10 else ''})"


def check_names(ds: DatasetConfig, where: str) -> list[str]:
    """Problems of the names inside one data set: every name must point at something."""
    problems = []

    def need(name: str, table: Iterable[str], place: str, kind: str) -> None:
        if name not in table:
            problems.append(f"{where}.{place}: '{name}' is no {kind}{nearest(name, table)}")

    lists = {"target_configs": ds.target_configs, "reference_configs": ds.reference_configs}
    for section, table in lists.items():
        for name, items in table.items():
            for i, item in enumerate(items):
                need(item.image, ds.image_configs, f"{section}.{name}.{i}.image", "image_config")
            if not items:
                problems.append(f"{where}.{section}.{name}: the list is empty")
    for name, target in ds.target_configs.items():
        if len(target) > 1:
            problems.append(f"{where}.target_configs.{name}: one target per sample, not several")
    for name, caption in ds.caption_configs.items():
        place = f"caption_configs.{name}"
        need(caption.image, ds.image_configs, f"{place}.image", "image_config")
        if caption.reference_list:
            listed_in = caption.reference_list.reference_config
            need(listed_in, ds.reference_configs, f"{place}.reference_list", "reference_config")
    for i, batch in enumerate(ds.batch_configs):
        place = f"batch_configs.{i}"
        need(batch.target_config, ds.target_configs, f"{place}.target_config", "target_config")
        need(batch.caption_config, ds.caption_configs, f"{place}.caption_config", "caption_config")
        need(
            batch.reference_config,
            ds.reference_configs,
            f"{place}.reference_config",
            "reference_config",
        )
    return problems


def role_of(stem: str, suffixes: Iterable[str]) -> str | None:
    """The longest suffix that `stem` ends with ("" only if no other fits); None if none fits."""
    fits = [s for s in suffixes if stem.endswith(s) and Path(stem).name != s]
    return max(fits, key=len) if fits else None


def group_by_suffix(
    ds: DatasetConfig, root: Path
) -> tuple[dict[str, dict[str, Path]], list[str], list[str]]:
    """Suffix layout -> {sample: {role: file}}, roles every sample needs, problems."""
    suffixes = {config.suffix for config in ds.image_configs.values()}
    files: dict[str, dict[str, Path]] = {}
    problems = []
    for stem, entries in list_images(root).items():
        suffix = role_of(stem, suffixes)
        if suffix is None:
            continue
        name = stem[: len(stem) - len(suffix)]
        if len(entries) > 1:
            names = ", ".join(entry.name for entry in entries)
            problems.append(f"{root}: '{stem}' is ambiguous, keep one of {names}")
        for role, config in ds.image_configs.items():
            if config.suffix == suffix:
                files.setdefault(name, {})[role] = Path(entries[0].path)
    used = {
        item.image
        for batch in ds.batch_configs
        for item in ds.target_configs[batch.target_config]
        + ds.reference_configs[batch.reference_config]
    }
    for caption in (ds.caption_configs[b.caption_config] for b in ds.batch_configs):
        used.add(caption.image)
        if caption.reference_list:
            vision = ds.reference_configs[caption.reference_list.reference_config]
            used |= {item.image for item in vision}
    return files, sorted(used), problems


def group_by_folder(
    ds: DatasetConfig, root: Path
) -> tuple[dict[str, dict[str, Path]], list[str], list[str]]:
    """Folders layout -> {sample: {role: file}}, roles ("target", "reference 1", ...), problems."""
    assert ds.target_dir is not None, "checked by DatasetConfig"
    folders = {"target": root / ds.target_dir}
    folders |= {f"reference {i + 1}": root / d for i, d in enumerate(ds.reference_dirs)}
    files: dict[str, dict[str, Path]] = {}
    problems = []
    for role, folder in folders.items():
        if not folder.is_dir():
            problems.append(f"{role} folder {folder} does not exist")
            continue
        for stem, entries in list_images(folder).items():
            if len(entries) > 1:
                names = ", ".join(entry.name for entry in entries)
                problems.append(f"{folder}: '{stem}' is ambiguous, keep one of {names}")
            files.setdefault(stem, {})[role] = Path(entries[0].path)
    return files, list(folders), problems


def read_caption(path: Path) -> str:
    """Text of a caption file.

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
    return text


def make_variants(ds: DatasetConfig, files: dict[str, Path], rate: float) -> tuple[Variant, ...]:
    """Every combination of one sample. Raises ValueError for a bad caption."""
    if ds.target_dir:
        target, *references = (files[role] for role in ("target", *list(files)[1:]))
        caption = ds.caption or read_caption(target.with_suffix(ds.caption_ext))
        refs = tuple(references)
        return (Variant(target, refs, refs, caption, rate, 0.0, 0, None, 1.0),)
    variants = []
    for batch in ds.batch_configs:
        refs = tuple(files[item.image] for item in ds.reference_configs[batch.reference_config])
        captions = ds.caption_configs[batch.caption_config]
        vision, dropout, least, area = refs, 0.0, 0, None
        if shown := captions.reference_list:
            vision = tuple(files[i.image] for i in ds.reference_configs[shown.reference_config])
            area = shown.resize**2 if shown.resize else None
            dropout, least = shown.dropout, shown.min_length
        variants.append(
            Variant(
                target=files[ds.target_configs[batch.target_config][0].image],
                references=refs,
                vision=vision,
                caption=read_caption(files[captions.image].with_suffix(captions.ext)),
                caption_dropout=rate if batch.caption_dropout is None else batch.caption_dropout,
                vision_dropout=dropout,
                vision_min=least,
                vision_area=area,
                weight=batch.weight,
            )
        )
    return tuple(variants)


def find_dataset(config: Config, number: int) -> tuple[list[Sample], list[str], list[str]]:
    """Samples, problems and skipped samples of one data set."""
    ds = config.data.dataset_configs[number]
    where, root = f"data.dataset_configs.{number}", ds.train_data_dir
    if not root.is_dir():
        return [], [f"{where}.train_data_dir: folder {root} does not exist"], []
    if problems := check_names(ds, where):
        return [], problems, []
    files, roles, problems = (group_by_folder if ds.target_dir else group_by_suffix)(ds, root)
    if problems:
        return [], [f"{where}: {p}" for p in problems], []
    samples, broken = [], []
    for name in sorted(files):
        here = {role: files[name][role] for role in roles if role in files[name]}
        if not here:
            continue  # only pictures that no combination uses
        if lacking := [role for role in roles if role not in here]:
            broken.append(f"{where}: sample '{name}' lacks its {' and '.join(lacking)}")
            continue
        try:
            variants = make_variants(ds, here, config.data.caption_dropout_rate)
        except ValueError as error:
            broken.append(f"{where}: {error}")
            continue
        samples.append(Sample(name, number, name in ds.holdout, variants))
    for name in sorted(set(ds.holdout) - set(files)):
        problems.append(f"{where}.holdout: no sample '{name}'{nearest(name, sorted(files))}")
    skipped = broken if ds.on_missing == "skip" else []
    problems += [] if skipped else broken
    if not any(not sample.held_out for sample in samples) and not problems:
        problems.append(f"{where}: no sample to train on in {root}")
    return samples, problems, skipped


def on_white(image: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white."""
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def open_rgb(path: Path) -> Image.Image:
    """Any still picture as upright 8-bit RGB: EXIF turned, alpha on white, 16 bit scaled, CMYK ...

    Raises:
        OSError: unreadable or cut off.
    """
    with Image.open(path) as opened_file:
        image: Image.Image = ImageOps.exif_transpose(opened_file)
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey saturates in convert()
        deep = image.convert("F")
        scale = 255 / max(65535 if image.mode != "F" else 255, np.asarray(deep).max())
        image = deep.point(lambda v: v * scale).convert("L")
    return on_white(image)


VERIFY_SECONDS = 4.0  # new pictures are decoded for this long; the others when they are encoded


def check_pictures(paths: Sequence[Path], index: FileIndex) -> list[str]:
    """Record width and height of every picture (upright) in `index`; returns what is unreadable."""
    deadline = time.monotonic() + VERIFY_SECONDS

    def check(path: Path) -> str | tuple[Path, os.stat_result, dict[str, Any]] | None:
        try:
            stat = path.stat()
            if index.get(path, stat):
                return None
            with Image.open(path) as image:
                width, height = image.size
                if image.getexif().get(0x0112, 1) >= 5:  # EXIF orientation: turned by 90 degrees
                    width, height = height, width
                if time.monotonic() < deadline:
                    image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return f"picture {path} cannot be read: {error}"
        return path, stat, {"width": width, "height": height}

    problems = []
    with ThreadPoolExecutor() as pool:
        for found in pool.map(check, paths):
            if isinstance(found, str):
                problems.append(found)
            elif found:
                index.put(*found)
    index.commit()
    return problems


def all_pictures(samples: Iterable[Sample]) -> list[Path]:
    """Every picture file the samples use, once, sorted."""
    return sorted(
        {
            path
            for sample in samples
            for variant in sample.variants
            for path in (variant.target, *variant.references, *variant.vision)
        }
    )


def open_index(config: Config) -> FileIndex:
    """The file index of the cache; in memory when there is no cache."""
    try:
        return FileIndex(config.cache.cache_dir if config.cache.use_cache else None)
    except OSError as error:
        raise UserError(f"cache.cache_dir: cannot write there: {error}") from error


def find_samples(config: Config, index: FileIndex) -> tuple[list[Sample], list[str]]:
    """Pair, read captions and check every picture. Returns (samples, first problems of each kind).

    Everything is in output_dir/audit.json.
    """
    samples: list[Sample] = []
    groups: list[list[str]] = []
    skipped: list[str] = []
    if not config.data.dataset_configs:
        groups.append(["data.dataset_configs: no data set is named"])
    for number in range(len(config.data.dataset_configs)):
        found, wrong, left_out = find_dataset(config, number)
        samples += found
        groups.append(wrong)
        skipped += left_out
    groups.append(check_pictures(all_pictures(samples), index))
    report = {
        "samples": len(samples),
        "problems": list(itertools.chain(*groups)),
        "skipped": skipped,
    }
    with contextlib.suppress(OSError):  # an unwritable output_dir is reported by audit()
        config.logging.output_dir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report, indent=2, ensure_ascii=False)
        save_atomic(config.logging.output_dir / "audit.json", lambda f: f.write_text(text))
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


def fetch_from_hub(repository: str, file: str) -> Path:
    """One small file of a Hub repository, from the local copy if there is one. Raises UserError."""
    from huggingface_hub import hf_hub_download, model_info
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, file, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        pass
    try:
        model_info(repository, timeout=4)  # answers at once; the download would retry for long
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # network, rights, spelling: the hub library has many classes
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"no folder {repository}, and not on the Hub: {reason}") from error


def read_model_json(name_or_path: str, file: str) -> dict[str, Any]:
    """A JSON file of a checkpoint folder or Hub repository. Raises UserError."""
    path = Path(name_or_path) / file
    if not Path(name_or_path).is_dir():
        if name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~")):
            raise UserError(f"no folder {name_or_path}")
        path = fetch_from_hub(name_or_path, file)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: no diffusers checkpoint: {error}") from error


def detect_flavour(name_or_path: str) -> Flavour:
    """2508, 2509 or 2511, from model_index.json and transformer/config.json.

    Raises:
        UserError: no such checkpoint, or not a Qwen-Image-Edit one.
    """
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
    return []


def audit(config: Config) -> list[str]:
    """Everything that can be known to be wrong before a model loads: one line per problem."""
    problems = []
    if config.cache.use_cache:
        problems += check_device("cache.vae_encoder_device", config.cache.vae_encoder_device)
        problems += check_device("cache.text_encoder_device", config.cache.text_encoder_device)
    problems += check_model(config, config.model.precision)
    start = config.model.lora.pretrained_weight
    if start and not start.is_file():
        problems.append(f"model.lora.pretrained_weight: no file {start}")
    try:
        flavour = detect_flavour(config.model.pretrained_model_name_or_path)
    except UserError as error:
        problems.append(f"model.pretrained_model_name_or_path: {error}")
        flavour = None
    try:
        config.logging.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problems.append(f"logging.output_dir: cannot write there: {error}")
    try:
        samples, wrong = find_samples(config, open_index(config))
    except UserError as error:
        return [*problems, str(error)]
    problems += wrong
    if flavour and flavour.name == "edit-v1":
        first = {sample.dataset: sample for sample in reversed(samples)}
        for number, sample in sorted(first.items()):
            where = f"data.dataset_configs.{number}"
            if any(len(v.references) > 1 for v in sample.variants):
                problems.append(f"{where}: 2508 takes one reference; 2509 and 2511 take more")
            if any(v.vision_area or v.vision != v.references for v in sample.variants):
                problems.append(
                    f"{where}: 2508 shows its encoder the picture that the VAE gets; leave out "
                    "reference_list.resize and use the same references"
                )
    if config.validation.steps and samples and not any(s.held_out for s in samples):
        problems.append("validation.steps is set, but no data set names samples in holdout")
    return problems


# --- 3. geometry, encoding and cache --------------------------------------------------------------


class Picture(NamedTuple):
    """One picture as the model gets it: where it comes from and the transform."""

    source: Path | Image.Image
    content: str  # blake2b of the file, or of the pixels of a picture in memory
    size: tuple[int, int]  # (W, H) px after the transform
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)  # left top right bottom, relative
    flip: bool = False


class Draw(NamedTuple):
    """One visit of a sample: everything random about it but the noise, decided ahead."""

    visit: int  # number of the visit over the whole run; the noise hangs on it
    sample: int
    variant: int = 0
    view: int = 0
    vision: tuple[int, ...] | None = None  # which vision references stay; None: all
    empty: bool = False  # train with the empty instruction


class Example(NamedTuple):
    """What a Draw resolves to."""

    name: str
    target: Picture
    references: tuple[Picture, ...]
    vision: tuple[Picture, ...]
    caption: str


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


def reference_area_px(config: Config, size: tuple[int, int]) -> float:
    """data.reference_area in pixels, for a target of `size`."""
    area = config.data.reference_area
    return float({"1mp": AREA_1MP, "target": size[0] * size[1]}.get(str(area), area))


def picture_of(image: Image.Image, area_px: float) -> Picture:
    """A picture in memory, whole, resized to about that area."""
    content = f"{draw_key(image.size, image.tobytes()):016x}"
    return Picture(image, content, pick_size(area_px, image.width / image.height))


def opened(example: Example) -> Example:
    """The same example with its pictures loaded, so that worker processes do it."""

    def ready(picture: Picture) -> Picture:
        return Picture(load_picture(picture), picture.content, picture.size)

    references, vision = (tuple(map(ready, p)) for p in (example.references, example.vision))
    return example._replace(target=ready(example.target), references=references, vision=vision)


def resolve(
    config: Config, flavour: Flavour, samples: Sequence[Sample], draw: Draw, index: FileIndex
) -> Example:
    """Draw -> pictures with ONE geometric transform for the target and every aligned reference."""
    sample = samples[draw.sample]
    variant = sample.variants[draw.variant]
    ds = config.data.dataset_configs[sample.dataset]

    fact = index.known(variant.target)
    aspect = fact["width"] / fact["height"]
    size = nearest_bucket(fact["width"], fact["height"], ds.resolution)
    box, flip = cover_box(aspect, size[0] / size[1]), False
    if draw.view:  # EDIT HERE: augmentation (each view is cached)
        chance = ("view", config.seed, sample.dataset, sample.name, draw.view)
        scale = 1 - (1 - ds.view_scale) * uniform("scale", *chance)
        x, y = uniform("x", *chance), uniform("y", *chance)
        box = cover_box(aspect, size[0] / size[1], scale, x, y)
        flip = ds.view_flip and uniform("flip", *chance) < 0.5

    def reference(path: Path, area_px: float) -> Picture:
        known = index.known(path)
        own = known["width"] / known["height"]
        # KEEP: aligned references get the target's crop, or the edit no longer lies on its pixels
        if abs(math.log(own / aspect)) < ASPECT_TOLERANCE:
            aligned = pick_size(area_px, size[0] / size[1])
            return Picture(path, known["content"], aligned, box, flip)
        return Picture(path, known["content"], pick_size(area_px, own))

    area_px = reference_area_px(config, size)
    vision_area = variant.vision_area or flavour.vision_area or area_px
    stay = range(len(variant.vision)) if draw.vision is None else draw.vision
    return Example(
        name=sample.name,
        target=Picture(variant.target, fact["content"], size, box, flip),
        references=tuple(reference(path, area_px) for path in variant.references),
        vision=tuple(reference(variant.vision[i], float(vision_area)) for i in stay),
        caption="" if draw.empty else variant.caption,
    )


def same_aspect(a: Image.Image, b: Image.Image) -> bool:
    """Whether two pictures are taken as showing the same frame."""
    return abs(math.log(a.width * b.height / (a.height * b.width))) < ASPECT_TOLERANCE


def crop(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """Cut out a box given relative to the picture, at whole pixels."""
    left, top, right, bottom = box
    w, h = image.size
    return image.crop((round(left * w), round(top * h), round(right * w), round(bottom * h)))


def load_picture(picture: Picture) -> Image.Image:
    """Open, crop and resize (Lanczos, as the pipelines do) -> RGB of picture.size."""
    source = picture.source
    try:
        image = source if isinstance(source, Image.Image) else open_rgb(source)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"picture {source} cannot be read: {error}") from error
    image = crop(image, picture.box).resize(picture.size, Image.Resampling.LANCZOS)
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


def picture_id(picture: Picture) -> list[Any]:
    """What of a picture enters a cache key."""
    return [picture.content, picture.size, picture.box, picture.flip]


class CacheKeys:
    """Names of cache entries for one checkpoint and precision."""

    def __init__(self, folder: Path, flavour: Flavour, dtype: torch.dtype) -> None:
        kind = (flavour.pipeline_class, str(dtype))
        self.vae = fingerprint([folder / "vae"], *kind)
        names = ("text_encoder", "tokenizer", "processor")
        template = template_text(flavour.pipeline_class)
        parts = [folder / name for name in names]
        self.text = fingerprint(parts, *kind, processor_name(), template)

    def latent(self, picture: Picture) -> str:
        """Entry with `latent` (16, 1, h, w)."""
        return cache_key("latent", encoder=self.vae, picture=picture_id(picture))

    def prompt(self, example: Example) -> str:
        """Entry with `embed` (T, D): the pictures are part of it."""
        pictures = [picture_id(picture) for picture in example.vision]
        return cache_key("prompt", encoder=self.text, caption=example.caption, pictures=pictures)


def template_text(pipeline_class: str) -> str:
    """The lines of the pipeline's source that hold its prompt template, without importing it."""
    spec = importlib.util.find_spec("diffusers")
    assert spec and spec.origin, "diffusers is in requirements.txt"
    name = "pipeline_qwenimage_edit" + ("_plus" if "Plus" in pipeline_class else "")
    file = Path(spec.origin).parent / "pipelines" / "qwenimage" / f"{name}.py"
    return "".join(line for line in file.open(encoding="utf-8") if "prompt_template" in line)


def fingerprint(folders: Sequence[Path], *extra: str) -> str:
    """Hash of a component: small files whole, weights by size and 3 samples of 64 KB each."""
    parts: list[Any] = list(extra)
    for file in sorted(f for folder in folders if folder.is_dir() for f in folder.rglob("*")):
        if not file.is_file() or file.name.startswith("."):
            continue
        size = file.stat().st_size
        if size < 2**20:
            parts.append([file.name, hash_file(file)])
            continue
        with file.open("rb") as stream:
            for place in (0, size // 2, size - 2**16):
                stream.seek(place)
                parts.append([file.name, size, draw_key(stream.read(2**16))])
    return cache_key("encoder", parts=parts)


def index_content(paths: Sequence[Path], index: FileIndex) -> None:
    """Add the content hash of every picture that has none yet, or has changed since."""
    new = [p for p in paths if "content" not in (index.get(p, p.stat()) or {})]
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(hash_file, new)
        pairs = zip(new, hashes, strict=True)
        few = len(new) < 500
        for path, content in progress(pairs, "hash pictures", total=len(new), disable=few):
            stat = path.stat()
            index.put(path, stat, {**(index.get(path, stat) or {}), "content": content})
    index.commit()


# --- 4. model, devices, LoRA ----------------------------------------------------------------------


def has_torchvision() -> bool:
    """transformers' stock video processor, which nothing here needs, wants torchvision."""
    return importlib.util.find_spec("torchvision") is not None


def processor_name() -> str:
    """The image processor in use; it enters the cache keys, for the two differ in rounding."""
    return "torchvision" if has_torchvision() else "PIL"


def load_processor(folder: Path) -> Any:
    """Qwen2VLProcessor; without torchvision one that handles stills only (all we need)."""
    from transformers import ProcessorMixin, Qwen2VLProcessor

    if has_torchvision():
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


def check_zero_cond_t(transformer_config: dict[str, Any], accepted: Iterable[str]) -> None:
    """Refuse a diffusers that would silently drop 2511's zero_cond_t. Raises UserError."""
    if transformer_config.get("zero_cond_t") and "zero_cond_t" not in accepted:
        raise UserError(
            "this checkpoint needs zero_cond_t (2511), which this version of diffusers would "
            "ignore: pip install -U diffusers"
        )


# Behind the precisions that end so: (module, its name for pip).
PACKAGES = {"quanto": ("optimum.quanto", "optimum-quanto"), "bnb": ("bitsandbytes", "bitsandbytes")}
QUANTO_TYPES = {"fp8": "qfloat8", "int8": "qint8", "int4": "qint4", "int2": "qint2"}


def check_precision(precision: str) -> list[str]:
    """One problem if the package behind a precision is not installed."""
    kind = precision.rpartition("-")[2]
    if kind not in PACKAGES:
        return []
    module, name = PACKAGES[kind]
    with contextlib.suppress(ModuleNotFoundError):  # find_spec imports the package around it
        if importlib.util.find_spec(module):
            return []
    return [f"model.base_model_precision: {precision} needs {name}: pip install {name}"]


def check_model(config: Config, precision: str) -> list[str]:
    """Problems of the model's settings that need no weights; `precision` of the blocks."""
    model, method = config.model, config.model.lora.method
    problems = []
    for number, name in enumerate(model.devices):
        problems += check_device(f"model.devices.{number}", name)
    if not problems and len({torch.device(name).type for name in model.devices}) > 1:
        problems.append("model.devices: wanted devices of one type")
    if model.devices and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problems.append("model.devices: for one process; several need the whole model each")
    if model.blocks_to_swap and not config.train.gradient_checkpointing:
        problems.append(
            "model.blocks_to_swap needs train.gradient_checkpointing: without it the backward pass "
            "holds the weights of every block"
        )
    if method == "dora" and precision.endswith("quanto"):
        problems.append(f"model.lora.method: dora goes with no_change or nf4-bnb, not {precision}")
    if method == "lokr" and precision == "nf4-bnb":
        problems.append("model.lora.method: lokr goes with every precision but nf4-bnb")
    with contextlib.suppress(UserError):  # the checkpoint is checked elsewhere
        path = model.pretrained_model_name_or_path
        n_blocks = read_model_json(path, "transformer/config.json").get("num_layers", 60)
        problems += check_block_numbers(model, n_blocks)
    return problems


def check_block_numbers(model: ModelConfig, n_blocks: int) -> list[str]:
    """Problems of the settings that count blocks."""
    problems = []
    if model.blocks_to_swap > n_blocks:
        problems.append(f"model.blocks_to_swap: {model.blocks_to_swap} of {n_blocks} blocks")
    if beyond := [b for b in parse_blocks(model.lora.exclude_blocks) if b >= n_blocks]:
        last = n_blocks - 1
        problems.append(f"model.lora.exclude_blocks: no block {min(beyond)}, the last is {last}")
    return problems


# Weights: read, quantised and placed block by block.

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


def find_weights(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """{tensor: (file, shape)} of a diffusers component, one file or shards; reads only headers.

    Raises:
        UserError: a file is missing or damaged; the message names it.
    """
    index, names = folder / f"{WEIGHTS_FILE}.index.json", [WEIGHTS_FILE]
    if index.is_file():
        names = sorted(set(read_model_json(str(folder), index.name).get("weight_map", {}).values()))
    found = {}
    for path in (folder / name for name in names):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    found[name] = path, tuple(file.get_slice(name).get_shape())
        except (OSError, SafetensorError) as error:
            raise UserError(f"weights {path} cannot be read: {error}") from error
    return found


def check_weights(found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    """Names and shapes must be the same. Raises UserError with the first differences."""
    differences = {
        "missing": wanted.keys() - found.keys(),
        "unexpected": found.keys() - wanted.keys(),
        "of another shape": {n for n in wanted.keys() & found.keys() if wanted[n] != found[n]},
    }
    lines = [
        f"{len(names)} {what}:\n{listed(sorted(names), shown=3)}"
        for what, names in differences.items()
        if names
    ]
    if lines:
        raise UserError("\n".join(["the weights do not fit transformer/config.json", *lines]))


class Layout(NamedTuple):
    """Where a transformer lives."""

    devices: list[torch.device]  # the blocks are spread over these, in order
    blocks_to_swap: int = 0  # of a single device: so many blocks wait in CPU memory


def split_blocks(n_blocks: int, devices: Sequence[torch.device]) -> list[torch.device]:
    """Device of each block: runs of equal length (or one apart), in the order of `devices`."""
    return [devices[number * len(devices) // n_blocks] for number in range(n_blocks)]


def swapped_blocks(n_blocks: int, count: int) -> list[int]:
    """Which blocks wait in CPU memory: `count`, evenly spread, so that there is time to copy."""
    return [(2 * number + 1) * n_blocks // (2 * count) for number in range(count)]


def placement(transformer: Any, layout: Layout) -> list[tuple[str, torch.device, torch.device]]:
    """(name, where its weights live, where it computes) of every block and embedder."""
    blocks = transformer.transformer_blocks
    swapped = swapped_blocks(len(blocks), layout.blocks_to_swap)
    found = []
    for name, part in transformer.named_children():
        if part is not blocks and part.state_dict():
            device = layout.devices[-1 if name in ("norm_out", "proj_out") else 0]
            found.append((name, device, device))
    for number, device in enumerate(split_blocks(len(blocks), layout.devices)):
        home = torch.device("cpu") if number in swapped else device
        found.append((f"transformer_blocks.{number}", home, device))
    return found


def empty_transformer(settings: dict[str, Any]) -> Any:
    """QwenImageTransformer2DModel without weights (meta device); its rope tables are real.

    Raises:
        UserError: this diffusers is too old for the checkpoint.
    """
    import diffusers
    from accelerate import init_empty_weights

    model_class = diffusers.QwenImageTransformer2DModel
    check_zero_cond_t(settings, inspect.signature(model_class.__init__).parameters)
    with init_empty_weights():
        return model_class.from_config(settings)


class TransformerLoader:
    """Fills an empty transformer part by part; one block at a time is in memory unquantised.

    cache_dir: where quantised parts are kept for the next start; None: nowhere.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        precision: str = "no_change",
        cache_dir: Path | None = None,
    ) -> None:
        if problems := check_precision(precision):
            raise UserError(problems[0])
        self.folder, self.dtype, self.precision = folder, dtype, precision
        self.model = empty_transformer(read_model_json(str(folder), "config.json"))
        self.shapes = {name: tuple(t.shape) for name, t in self.model.state_dict().items()}
        self.kept: Path | None = None
        if cache_dir and precision != "no_change":
            library = PACKAGES[precision.rpartition("-")[2]][1]
            key = fingerprint([folder], precision, str(dtype), library, version(library))
            self.kept = cache_dir / "quantized" / key

    def load(self, layout: Layout, quantize_via: str = "accelerator") -> Any:
        """The transformer, frozen, each part read straight to where it lives.

        Without quantisation it equals from_pretrained(dtype=dtype) bit for bit.

        Raises:
            UserError: weights are missing, damaged or of another model.
        """
        model = self.model
        parts = placement(model, layout)
        for name, home, device in progress(parts, "load transformer", leave=False):
            self.fill(name, home, torch.device("cpu") if quantize_via == "cpu" else device)
            return_freed_memory()
        model.eval().requires_grad_(False)
        mark_quantized(model, self.precision)
        connect(model, layout)
        return model

    def fill(self, name: str, home: torch.device, via: torch.device) -> None:
        """Give a part its weights on `home`; a block is quantised on `via` before."""
        part = self.model.get_submodule(name)
        precision = self.precision if name.startswith("transformer_blocks.") else "no_change"
        file = self.kept / f"{name}.safetensors" if self.kept else None
        if file and (tensors := read_kept(file, home)):
            restore_part(part, precision, tensors)
            return
        place = home if precision == "no_change" else via
        part.load_state_dict(self.read(f"{name}.", place), assign=True)
        quantize_part(part, precision)
        if file:
            write_tensors(file, part.state_dict())
        move(part, home)

    @functools.cached_property
    def weights(self) -> dict[str, tuple[Path, tuple[int, ...]]]:
        """find_weights(), checked; not asked for when every part is kept."""
        found = find_weights(self.folder)
        check_weights({name: shape for name, (_, shape) in found.items()}, self.shapes)
        return found

    def read(self, prefix: str, device: torch.device) -> dict[str, torch.Tensor]:
        """The tensors below `prefix`, without it, as copies on `device`."""
        names = [name for name in self.weights if name.startswith(prefix)]
        tensors = {}
        for path in {self.weights[name][0] for name in names}:
            # KEEP: open only for this part; what was read of an open file counts as memory
            with safe_open(path, framework="pt") as file:
                for name in names:
                    if self.weights[name][0] == path:
                        tensor = file.get_tensor(name).to(device, self.dtype, copy=True)
                        tensors[name.removeprefix(prefix)] = tensor
        return tensors


def return_freed_memory() -> None:
    """Give the holes that large tensors have left between small ones back to the system.

    KEEP: else the process ends up larger than the model in full precision, for glibc holds them.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def read_kept(path: Path, device: torch.device) -> dict[str, torch.Tensor] | None:
    """Tensors of a quantised part from the cache, as copies; None if absent or damaged."""
    if not path.exists():
        return None
    try:
        return {name: t.to(device, copy=True) for name, t in read_entry(path).items()}
    except ValueError as error:
        log.warning("%s; it is built again", error)
        return None


def quantized_layers(part: torch.nn.Module, precision: str) -> list[str]:
    """Names of a block's linear layers but for the modulation, which sets the scale of the rest."""
    if precision == "no_change":
        return []
    names = [name for name, layer in part.named_modules() if isinstance(layer, torch.nn.Linear)]
    return [name for name in names if not name.startswith(("img_mod.", "txt_mod."))]


def quantize_part(part: torch.nn.Module, precision: str) -> None:
    """Replace the layers one by one by quantised ones on the same device."""
    for name in quantized_layers(part, precision):
        linear: Any = part.get_submodule(name)
        nf4 = precision == "nf4-bnb"
        layer = quantize_nf4(linear) if nf4 else quantize_quanto(linear, precision)
        part.set_submodule(name, layer)
        del linear
        return_freed_memory()


def restore_part(part: torch.nn.Module, precision: str, tensors: dict[str, torch.Tensor]) -> None:
    """Fill an empty part with the state_dict() of a quantised one."""
    for name in quantized_layers(part, precision):
        linear: Any = part.get_submodule(name)
        own = {n: t for n, t in tensors.items() if n.startswith(f"{name}.")}
        tensors = {n: t for n, t in tensors.items() if n not in own}
        own = {n.removeprefix(f"{name}."): t for n, t in own.items()}
        nf4 = precision == "nf4-bnb"
        layer = restore_nf4(linear, own) if nf4 else restore_quanto(linear, own, precision)
        part.set_submodule(name, layer)
    part.load_state_dict(tensors, assign=True, strict=precision == "no_change")


def frozen(tensor: torch.Tensor) -> torch.nn.Parameter:
    """A parameter that is not trained."""
    return torch.nn.Parameter(tensor, requires_grad=False)


def unpack_bits(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 holding 8 / bits values each -> all values, the lowest bits of every byte first."""
    mask = 2**bits - 1
    return torch.cat([(packed >> shift) & mask for shift in range(0, 8, bits)])


def quanto_type(precision: str) -> Any:
    """The qtype of a precision.

    KEEP: quanto unpacks 4 and 2 bits with an extension that it compiles at the first use, on CUDA
    with nvcc; unpack_bits takes its place.
    """
    from optimum import quanto
    from optimum.quanto.library.extensions import extension

    for known in extension._extensions.values():
        known._lib = known._lib or SimpleNamespace(unpack=unpack_bits)
    return getattr(quanto, QUANTO_TYPES[precision.partition("-")[0]])


@torch.no_grad()
def quantize_quanto(linear: torch.nn.Linear, precision: str) -> torch.nn.Linear:
    """QLinear, per output channel (8 bits) or group (4, 2 bits)."""
    from optimum import quanto

    kind = quanto_type(precision)
    layer = quanto.QLinear.from_module(linear, weights=kind)
    if kind.bits == 8:
        how = {"scale": layer.optimizer(linear.weight, qtype=kind, axis=0)}
    else:
        group = layer.weight_group_size
        scale, shift = layer.optimizer(linear.weight, qtype=kind, axis=0, group_size=group)
        how = {"scale": scale, "shift": shift, "group_size": group}
    # KEEP optimized=False: the fp8 kernel that quanto 0.2.7 would choose on CUDA leaves out the
    # bias and wants nvcc, its int4 kernel is made for a few tokens
    weight = quanto.quantize_weight(linear.weight, qtype=kind, axis=0, **how, optimized=False)
    layer.weight = frozen(weight)
    return layer


def restore_quanto(
    linear: torch.nn.Linear, tensors: dict[str, torch.Tensor], precision: str
) -> torch.nn.Linear:
    """The layer whose state_dict() `tensors` is."""
    from optimum import quanto

    kind = quanto_type(precision)
    layer = quanto.QLinear.from_module(linear, weights=kind)
    how: dict[str, Any] = {"qtype": kind, "axis": 0, "missing_keys": []}
    how |= {"size": linear.weight.size(), "stride": linear.weight.stride()}
    if kind.bits == 8:
        loader = quanto.WeightQBytesTensor.load_from_state_dict
        weight = loader(tensors, "weight.", activation_qtype=None, **how)
    else:
        loader = quanto.WeightQBitsTensor.load_from_state_dict
        weight = loader(tensors, "weight.", group_size=layer.weight_group_size, **how)
    layer.weight, layer.bias = frozen(weight), frozen(tensors["bias"])
    layer.input_scale, layer.output_scale = tensors["input_scale"], tensors["output_scale"]
    return layer


def empty_nf4(linear: torch.nn.Linear) -> Any:
    """Linear4bit of the same shape, without weights."""
    from bitsandbytes.nn import Linear4bit

    return Linear4bit(
        linear.in_features,
        linear.out_features,
        compute_dtype=linear.weight.dtype,
        compress_statistics=False,
        quant_type="nf4",
        device="meta",
    )


def quantize_nf4(linear: torch.nn.Linear) -> torch.nn.Linear:
    """Linear4bit: blocks of 64 weights, scales in fp32, computes in the dtype of `linear`."""
    from bitsandbytes.nn import Params4bit

    layer = empty_nf4(linear)
    weight: Any = Params4bit(
        linear.weight.data, compress_statistics=False, quant_type="nf4", module=layer
    )
    layer.weight, layer.bias = weight.to(linear.weight.device), linear.bias  # .to() quantises
    return layer


def restore_nf4(linear: torch.nn.Linear, tensors: dict[str, torch.Tensor]) -> torch.nn.Linear:
    """The layer whose state_dict() `tensors` is."""
    from bitsandbytes.nn import Params4bit

    layer = empty_nf4(linear)
    state = {n.removeprefix("weight."): t for n, t in tensors.items() if n.startswith("weight.")}
    weight, device = tensors["weight"], tensors["weight"].device
    layer.weight = Params4bit.from_prequantized(weight, state, device=device, module=layer)
    layer.bias = frozen(tensors["bias"])
    return layer


def mark_quantized(transformer: Any, precision: str) -> None:
    """Note the precision where PEFT and this script look for it."""
    if precision != "no_change":
        transformer.quantized_to = precision
        transformer.is_loaded_in_4bit = precision == "nf4-bnb"


def map_tensor(tensor: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`change` applied to a tensor, or to the ones that a quanto tensor is made of.

    KEEP: quanto's own .to() and .clone() pick a kernel or undo the quantisation.
    """
    if not hasattr(tensor, "__tensor_flatten__"):
        return change(tensor)
    names, meta = tensor.__tensor_flatten__()
    inner = {name: map_tensor(getattr(tensor, name), change) for name in names}
    return type(tensor).__tensor_unflatten__(inner, meta, tensor.size(), tensor.stride())


def move(module: torch.nn.Module, device: torch.device) -> None:
    """module.to(device) that leaves quanto's weights as they are."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            quanto = parameter is not None and hasattr(parameter, "__tensor_flatten__")
            if quanto and parameter.device != device:  # type: ignore[union-attr]
                part._parameters[name] = frozen(map_tensor(parameter, lambda t: t.to(device)))
    module.to(device)


def place(transformer: Any, layout: Layout) -> None:
    """Move a transformer that is already loaded. Raises UserError if its blocks are swapped."""
    if hasattr(transformer, "block_swap"):
        raise UserError("with model.blocks_to_swap the transformer stays on its device")
    for name, home, _ in placement(transformer, layout):
        move(transformer.get_submodule(name), home)
    connect(transformer, layout)


def connect(transformer: Any, layout: Layout) -> None:
    """Hooks that carry activations between devices, or weights between CPU and device."""
    transformer.layout = layout
    blocks, device = transformer.transformer_blocks, layout.devices[0]
    if len(layout.devices) > 1:
        carry_activations(transformer, layout.devices)
    if layout.blocks_to_swap:
        numbers = swapped_blocks(len(blocks), layout.blocks_to_swap)
        transformer.block_swap = BlockSwap({n: blocks[n] for n in numbers}, device)
        transformer.register_forward_pre_hook(lambda *_: transformer.block_swap.begin())
        return_freed_memory()  # pinned memory has taken its place


def carry_activations(transformer: Any, devices: Sequence[torch.device]) -> None:
    """Before each block its inputs (temb, text, rope, mask ... too) go to its device."""
    from accelerate.utils import send_to_device

    def carry(device: torch.device, module: Any, args: Any, kwargs: Any) -> Any:
        return send_to_device(args, device), send_to_device(kwargs, device)

    blocks = list(transformer.transformer_blocks)
    places = [*split_blocks(len(blocks), devices), devices[-1]]
    for part, device in zip([*blocks, transformer.norm_out], places, strict=True):
        part.register_forward_pre_hook(functools.partial(carry, device), with_kwargs=True)
    transformer.register_forward_hook(lambda *args: send_to_device(args[-1], devices[0]))


class BlockSwap:
    """Blocks whose frozen weights lie in (pinned) CPU memory and visit the device for their turn.

    While one works, the next is copied; there are never more on the device. Gradient checkpointing
    makes the order known: up in the forward pass, down in the backward pass, where every block is
    computed once more. A module's parameters are exchanged as objects, so what autograd has saved
    for the backward pass of a block stays valid after its turn, and goes with it.
    """

    def __init__(self, blocks: dict[int, torch.nn.Module], device: torch.device) -> None:
        self.numbers, self.device = sorted(blocks), device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.homes: dict[int, list[tuple[dict[str, Any], str, torch.nn.Parameter]]] = {}
        self.here: dict[int, tuple[list[torch.nn.Parameter], Any]] = {}  # copies, their event
        self.keep: int | None = None  # not to be removed after its turn
        self.last = -1  # the block that worked last in this pass
        for number, block in blocks.items():
            self.homes[number] = [
                (part._parameters, name, self._pinned(parameter))
                for part in block.modules()
                for name, parameter in part._parameters.items()
                if parameter is not None
            ]
            self._put(number, [home for *_, home in self.homes[number]])
            for part in block.modules():  # scales of activations, if any
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


def target_modules(transformer: Any, targets: Sequence[str] | str) -> list[str] | str:
    """Names or regex for PEFT; every one matches a layer. Raises UserError with what there is."""
    layers = [n for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)]
    named = TARGET_SETS.get(targets, targets) if isinstance(targets, str) else list(targets)
    each = {named: named} if isinstance(named, str) else {name: [name] for name in named}
    wrong = [text for text, t in each.items() if not any(matches(n, t) for n in layers)]
    if wrong or not named:
        short = sorted({n.split(".", 2)[2] for n in layers if n.startswith("transformer_blocks.")})
        raise UserError(
            f"model.lora.target_modules: no layer matches {', '.join(wrong) or 'an empty list'}; "
            f"there are the sets {', '.join(TARGET_SETS)} and the layers {', '.join(short)}"
        )
    return named


def excluded_modules(transformer: Any, exclude_blocks: str) -> str:
    """Regex of the layers without an adapter: of excluded blocks, and those nothing depends on."""
    last = len(transformer.transformer_blocks) - 1
    # the last block's text queries and outputs: nothing reads them, so they get no gradient
    dead = rf"{last}\.(attn\.(add_q_proj|to_add_out)|txt_mlp\..*)"
    blocks = [rf"{number}\..*" for number in sorted(parse_blocks(exclude_blocks))]
    return rf"transformer_blocks\.({'|'.join([dead, *blocks])})"


def adapter_config(transformer: Any, lora: LoraConfig) -> Any:
    """PEFT's own config for model.lora. Raises UserError for a name without a layer."""
    from peft import LoKrConfig
    from peft import LoraConfig as PeftLoraConfig

    targets = target_modules(transformer, lora.target_modules)
    excluded = excluded_modules(transformer, lora.exclude_blocks)
    layers = (n for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear))
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
    settings = adapter_config(transformer, lora)
    transformer.requires_grad_(False)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no modules were excluded.*")
        torch.manual_seed(draw_key(seed, "lora"))
        transformer.add_adapter(settings)
    place_adapter(transformer)
    for parameter in transformer.parameters():
        if parameter.requires_grad:  # KEEP: bf16 would round small updates away
            parameter.data = parameter.data.float()
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
    """The adapter as it trains: PEFT names, fp32."""
    from peft.utils import get_peft_model_state_dict

    return get_peft_model_state_dict(transformer)


def check_start(path: Path, lora: LoraConfig) -> None:
    """Raises UserError unless the file has the method and rank that model.lora asks for."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            about = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
            factors = [name for name in names if ".lora_A." in name]
            ranks = {file.get_slice(name).get_shape()[0] for name in factors}
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"model.lora.pretrained_weight {path}: {error}") from error
    method = "lora"
    if any(".lora_magnitude_vector" in name for name in names):
        method = "dora"
    if any(".lokr_" in name for name in names):  # the shapes of its factors do not tell the rank
        method, ranks = "lokr", {about.get("transformer.r", lora.r)}
    if ranks != {lora.r} or method != lora.method:
        raise UserError(
            f"model.lora.pretrained_weight {path}: it is a {method} of rank "
            f"{', '.join(map(str, sorted(ranks))) or 'unknown'}, model.lora asks for {lora.method} "
            f"of rank {lora.r}"
        )


def strengthen(tensors: dict[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
    """The adapter's change times `factor`, put into lora_B or lokr_w1.

    DoRA's magnitudes stay: it is m (W + s B A) / |W + s B A|, with s only beside B.
    """
    return {
        name: tensor * factor if ".lora_B." in name or name.endswith(".lokr_w1") else tensor
        for name, tensor in tensors.items()
    }


def strength_of(transformer: Any) -> float:
    """alpha / r of the adapter."""
    settings = transformer.peft_config["default"]
    alpha = settings.alpha if settings.peft_type == "LOKR" else settings.lora_alpha
    return alpha / settings.r


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
    save_atomic(path, lambda file: save_file(weights, file, metadata=metadata))


CALIBRATION_STEPS = 4  # training steps that set the scales of the inputs


def quantize_inputs(transformer: Any) -> list[Any]:
    """Let every quanto layer quantise its input too; returns the layers. Scales come later."""
    from optimum import quanto

    layers = [m for m in transformer.modules() if isinstance(m, quanto.QLinear)]
    for layer in layers:
        layer.activation_qtype = layer.weight_qtype
        layer.register_forward_pre_hook(layer.quantize_input)
    return layers


# --- 5. objective ---------------------------------------------------------------------------------


def sample_sigma(loss: LossConfig, *parts: object) -> float:  # EDIT HERE: timestep density
    """A noise level in (0, 1) before the shift; belongs to the parts."""
    if loss.timestep_density == "uniform":
        return min(max(uniform(*parts), 1e-4), 1 - 1e-4)
    return torch.sigmoid(loss.logit_mean + loss.logit_std * normal((), *parts)).item()


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
    sigma = sigma.view(-1, *[1] * (x0.dim() - 1))
    return (1 - sigma) * x0 + sigma * noise


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


def flow_loss(
    velocity: torch.Tensor, noise: torch.Tensor, target_latents: torch.Tensor
) -> torch.Tensor:  # EDIT HERE: the objective
    """Rectified flow: mean over elements of (velocity - (noise - x0))^2, fp32, (B,)."""
    error = velocity.float() - (noise.float() - target_latents.float())
    return error.square().flatten(1).mean(1)


LOSSES: dict[str, Callable[..., torch.Tensor]] = {"mse": flow_loss}


# --- 6. sampling ----------------------------------------------------------------------------------


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


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    heads: Sequence[str] = (),
    captions: Sequence[str] = (),
    cell_px: int = 256,
) -> Image.Image:
    """Pictures in rows on white, each fitted into a cell; heads above, a caption under each row."""
    font = ImageFont.load_default(size=15)
    gap, line = 8, 24
    fitted = [[ImageOps.contain(image, (cell_px, cell_px)) for image in row] for row in rows]
    heights = [max(image.height for image in row) + (line if captions else gap) for row in fitted]
    width = max(len(row) for row in rows) * (cell_px + gap) + gap
    top = line if heads else gap
    sheet = Image.new("RGB", (width, top + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for x, head in enumerate(heads):
        draw.text((gap + x * (cell_px + gap), 3), head, "black", font)
    for y, row in enumerate(fitted):
        for x, image in enumerate(row):
            sheet.paste(image, (gap + x * (cell_px + gap), top))
        top += heights[y]
        if captions:
            draw.text((gap, top - line + 3), captions[y][: width // 8], "dimgray", font)
    return sheet


# --- 7. checkpoints -------------------------------------------------------------------------------

FREE_TO_CHANGE = {  # settings that may differ between a checkpoint and the run that continues it
    "max_train_steps", "num_epochs", "checkpointing_steps", "checkpoints_total_limit",
    "resume_from_checkpoint", "gradient_checkpointing", "gradient_accumulation_steps",
    "batch_size", "num_workers", "recreate_cache", "train_data_dir",
    "devices", "blocks_to_swap", "quantize_via",
}  # fmt: skip
TRAINS = ("model", "data", "optimizer", "lr_scheduler", "train", "loss", "seed")


def flat_settings(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every setting that decides what is learned."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in pairs:
        if key in FREE_TO_CHANGE:
            continue
        if isinstance(item, dict | list):
            yield from flat_settings(item, f"{path}{key}.")
        else:
            yield f"{path}{key}", item


def valid_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Its state.json, if every file it lists is there and unharmed."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        unharmed = all(hash_file(folder / name) == h for name, h in state["files"].items())
    except (OSError, json.JSONDecodeError, KeyError):
        return None
    return state if unharmed else None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """checkpoint-<step> folders, oldest first; half-written ones have another name."""
    folders = output_dir.glob("checkpoint-*")
    return sorted(
        (f for f in folders if f.is_dir() and f.name.rpartition("-")[2].isdigit()),
        key=lambda f: int(f.name.rpartition("-")[2]),
    )


def set_aside(output_dir: Path) -> None:
    """Move the checkpoints, metrics and samples of an earlier run into earlier-<n>/."""
    if not list_checkpoints(output_dir):
        return
    numbers = (n for n in itertools.count(1) if not (output_dir / f"earlier-{n}").exists())
    place = output_dir / f"earlier-{next(numbers)}"
    place.mkdir()
    for old in (
        *list_checkpoints(output_dir),
        output_dir / "samples",
        output_dir / "metrics.jsonl",
    ):
        if old.exists():
            old.rename(place / old.name)
    log.warning(
        "%s holds an earlier run: its checkpoints, metrics and samples are now in %s "
        "(to go on with it: --train.resume_from_checkpoint latest)",
        output_dir,
        place,
    )


def find_checkpoint(config: Config, now: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """What train.resume_from_checkpoint names. `now`: what this run is trained as.

    Raises:
        UserError: a named checkpoint is missing, damaged or older than others there, or settings
            differ.
    """
    wanted, output_dir = config.train.resume_from_checkpoint, config.logging.output_dir
    there = list_checkpoints(output_dir)
    if wanted is None:
        return None
    if wanted == "latest":
        found = None
        for folder in reversed(there):
            if state := valid_checkpoint(folder):
                found = folder, state
                break
            log.warning("%s is damaged; looking for an older one", folder)
        if not found:
            log.info("resume: no checkpoint in %s, starting from step 0", output_dir)
            return None
    else:
        folder = Path(wanted) if Path(wanted).exists() else output_dir / wanted
        named = valid_checkpoint(folder)
        if not named:
            raise UserError(
                f"train.resume_from_checkpoint: {wanted} is missing or damaged"
                f" (there is: {', '.join(f.name for f in there) or 'none'})"
            )
        found = folder, named
    newer = [f.name for f in there if int(f.name.rpartition("-")[2]) > found[1]["step"]]
    if newer and wanted != "latest":
        raise UserError(
            f"{output_dir} also holds {', '.join(newer)}, newer than {wanted}: delete them, or "
            "choose another --logging.output_dir"
        )
    before = found[1]["trained_as"]
    changed = [k for k in sorted(now.keys() | before.keys()) if now.get(k) != before.get(k)]
    if changed:
        lines = [f"{key}: was {before.get(key)}, is {now.get(key)}" for key in changed]
        raise UserError(f"{found[0]} was trained with other settings:\n{listed(lines)}")
    return found


# --- 8. batches and loop --------------------------------------------------------------------------


class StepPlan:
    """For every optimizer step the micro-batches of this process, from `first_step` on.

    One step takes `size` samples, whatever the processes, batch size and accumulation; process r
    of n gets the r-th n-th of them, cut into micro-batches of one shape. So the same samples meet
    in a step, however the work is split. Every epoch visits each sample `repeats` times (the last
    step of an epoch is filled up from its beginning).
    """

    def __init__(
        self,
        config: Config,
        samples: Sequence[Sample],
        shape_of: Callable[[Draw], object],
        first_step: int,
        steps: int,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.config, self.samples, self.shape_of = config, samples, shape_of
        self.first_step, self.steps, self.rank, self.processes = first_step, steps, rank, processes
        data, train = config.data, config.train
        self.size = data.batch_size * train.gradient_accumulation_steps * processes
        self.visits = [
            number
            for number, sample in enumerate(samples)
            if not sample.held_out
            for _ in range(data.dataset_configs[sample.dataset].repeats)
        ]
        self.steps_per_epoch = math.ceil(len(self.visits) / self.size)

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
            vision=keep_references(variant, seed, visit),
            empty=uniform(seed, "caption_dropout", visit) < variant.caption_dropout,
        )

    def epoch(self, epoch: int) -> list[list[Draw]]:
        """The steps of an epoch; steps of one shape as far as they fill, the rest mixed."""
        seed, n = self.config.seed, len(self.visits)
        order = shuffled(n, seed, "order", epoch) if self.config.data.shuffle else range(n)
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
            order = shuffled(len(steps), seed, "steps", epoch)
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
    """Every Draw that can happen, so that everything it needs is cached."""
    for number, sample in enumerate(samples):
        views = 1 if sample.held_out else config.data.dataset_configs[sample.dataset].views
        for which, variant in enumerate(sample.variants):
            subsets: list[tuple[int, ...] | None] = [None]
            n = len(variant.vision)
            if variant.vision_dropout and not sample.held_out:
                least = min(variant.vision_min, n)
                subsets = [
                    s for k in range(least, n + 1) for s in itertools.combinations(range(n), k)
                ]
            for view, subset, empty in itertools.product(range(views), subsets, (False, True)):
                yield Draw(0, number, which, view, subset, empty)


class PairDataset(torch.utils.data.Dataset):
    """Micro-batches (lists of Draws) -> batches: cached tensors, or pictures to be encoded."""

    def __init__(self, trainer: QwenImageEditTrainer, cached: bool) -> None:
        self.config, self.samples = trainer.config, trainer.samples
        self.index, self.keys, self.flavour = trainer.index, trainer.keys, trainer.flavour
        self.cached = cached
        self._known: dict[Draw, tuple[Example, list[Path]]] = {}

    def __getitem__(self, micro_batches: list[list[Draw]]) -> list[dict[str, Any]]:
        try:
            return [self.batch(draws) for draws in micro_batches]
        except (UserError, ValueError) as error:  # a worker's own would arrive as a traceback
            return [{"error": str(error)}]

    def batch(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """One micro-batch, with sigma (B,) before the shift; the noise is drawn here as well."""
        known = [self.resolved(draw) for draw in draws]
        seed, loss = self.config.seed, self.config.loss
        batch = (
            collate([read_entries(paths) for _, paths in known])
            if self.cached
            else {"examples": [opened(example) for example, _ in known]}
        )
        width, height = known[0][0].target.size
        shape = (16, 1, height // 8, width // 8)
        return batch | {
            "noise": torch.stack([normal(shape, seed, "noise", d.visit) for d in draws]),
            "sigma": torch.tensor([sample_sigma(loss, seed, "sigma", d.visit) for d in draws]),
            "names": [example.name for example, _ in known],
        }

    def resolved(self, draw: Draw) -> tuple[Example, list[Path]]:
        """The example of a draw and its cache entries: target, references, prompt; remembered."""
        draw = draw._replace(visit=0)
        if draw not in self._known:
            e = resolve(self.config, self.flavour, self.samples, draw, self.index)
            keys: list[str] = []
            if self.cached:
                keys = [self.keys.latent(p) for p in (e.target, *e.references)]
                keys.append(self.keys.prompt(e))
            folder = self.config.cache.cache_dir
            self._known[draw] = e, [entry_path(folder, key) for key in keys]
        return self._known[draw]


def read_entries(paths: Sequence[Path]) -> dict[str, Any]:
    """Cache entries (target, references, prompt) -> item of a batch. Raises ValueError."""
    target, *references = (read_entry(path)["latent"] for path in paths[:-1])
    return {
        "pixel_latent": target,
        "control_latent": references,
        "prompt_embed": read_entry(paths[-1])["embed"],
    }


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Items of one shape -> a batch: text padded with zeros, its mask None if nothing is padded.

    pixel_latent (B, 16, 1, h, w); control_latent K x (B, 16, 1, hk, wk); prompt_embed (B, T, D);
    prompt_embeds_mask (B, T) bool or None.
    """
    lengths = torch.tensor([len(item["prompt_embed"]) for item in items])
    embeds = [item["prompt_embed"] for item in items]
    padded = bool((lengths != lengths[0]).any())
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]  # (B, T)
    return {
        "pixel_latent": torch.stack([item["pixel_latent"] for item in items]),
        "control_latent": [
            torch.stack(k) for k in zip(*(i["control_latent"] for i in items), strict=True)
        ],
        "prompt_embed": torch.nn.utils.rnn.pad_sequence(embeds, batch_first=True),
        "prompt_embeds_mask": mask if padded else None,
    }


def progress(items: Iterable[Any] | None, label: str, **options: Any) -> Any:
    """A progress bar on the first process, none on the others."""
    options["disable"] = options.get("disable", False) or os.environ.get("RANK", "0") != "0"
    return tqdm(items, desc=label, **options)


def as_image(value: Any) -> Image.Image:
    """PIL picture, HWC uint8 array or tensor -> RGB. Raises UserError for other arrays."""
    if isinstance(value, Image.Image):
        return on_white(value)
    array = np.asarray(value)
    if array.dtype != np.uint8 or array.ndim != 3:
        raise UserError(f"wanted a picture as (H, W, 3) uint8, got {array.shape} {array.dtype}")
    return on_white(Image.fromarray(array))


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors inside lists and dicts to the device, without waiting for it."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return [to_device(item, device) for item in value] if isinstance(value, list) else value


def import_class(path: str) -> Any:
    """The class behind a dotted path. Raises UserError with what to install."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, ValueError) as error:
        package = module.split(".")[0]
        raise UserError(f"optimizer.class_path {path}: {error}; pip install {package}?") from error
    except AttributeError as error:
        raise UserError(f"optimizer.class_path: {module} has no {name}") from error


def memory_gb(device: torch.device) -> float:
    """Peak memory so far: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


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
        self.global_step = 0
        self.vae: Any = None  # AutoencoderKLQwenImage
        self.qwen_vl: Any = None  # Qwen2_5_VLForConditionalGeneration
        self.transformer: Any = None  # QwenImageTransformer2DModel
        self.tokenizer: Any = None  # Qwen2Tokenizer
        self.processor: Any = None  # Qwen2VLProcessor
        self.scheduler: Any = None  # FlowMatchEulerDiscreteScheduler
        self.text_pipeline: Any = None  # the pipeline without VAE and transformer: encode_prompt()
        self.use_cache = config.cache.use_cache
        self.cache_dir = config.cache.cache_dir
        self.quantize = config.model.quantize
        self.weight_dtype = (
            torch.bfloat16 if config.train.mixed_precision == "bf16" else torch.float32
        )
        self.flavour = detect_flavour(config.model.pretrained_model_name_or_path)
        self.samples: list[Sample] = []
        self.index = FileIndex(None)
        self._keys: CacheKeys | None = None
        self._base_pictures: dict[str, Image.Image] = {}  # validation pictures without the LoRA
        self._drawn = 0  # batches of this step, from a loader of the user's, that got noise here
        self._shapes: dict[tuple[int, int], object] = {}  # of (sample, variant)
        self.samples_per_step = 1

    # -- loading and devices

    @property
    def device(self) -> torch.device:
        """The training device; of several the first."""
        if self.config.model.devices:
            return torch.device(self.config.model.devices[0])
        if self.accelerator:
            return self.accelerator.device
        from accelerate import PartialState

        return PartialState(cpu=not torch.accelerator.is_available()).device

    @property
    def cache_exist(self) -> bool:
        """Whether cache_dir holds any entry."""
        return any(self.cache_dir.glob("??/??/*.safetensors"))

    @property
    def keys(self) -> CacheKeys:
        """Names of the cache entries for this checkpoint."""
        if self._keys is None:
            folder = self.checkpoint("vae/*", "text_encoder/*", "tokenizer/*", "processor/*")
            self._keys = CacheKeys(folder, self.flavour, self.weight_dtype)
        return self._keys

    def checkpoint(self, *patterns: str) -> Path:
        """Folder of the checkpoint; from the Hub only what the patterns name is fetched."""
        name = self.config.model.pretrained_model_name_or_path
        if Path(name).is_dir():
            return Path(name)
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=["model_index.json", *patterns]))

    def load_model(
        self, parts: Sequence[str] = ("vae", "text_encoder", "transformer", "scheduler")
    ) -> None:
        """Load what is named and not there yet, frozen, in `weight_dtype`.

        The transformer goes to its device (blocks in their precision), the others to the CPU.
        """
        import diffusers
        from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

        dtype = self.weight_dtype
        if "scheduler" in parts and self.scheduler is None:
            folder = self.checkpoint("scheduler/*")
            scheduler_class = diffusers.FlowMatchEulerDiscreteScheduler
            self.scheduler = scheduler_class.from_pretrained(folder, subfolder="scheduler")
        if "vae" in parts and self.vae is None:
            folder = self.checkpoint("vae/*")
            vae_class = diffusers.AutoencoderKLQwenImage
            self.vae = vae_class.from_pretrained(
                folder, subfolder="vae", dtype=dtype, use_safetensors=True
            )
            encode_stills_in_2d(self.vae.eval().requires_grad_(False))
        if "text_encoder" in parts and self.qwen_vl is None:
            folder = self.checkpoint("text_encoder/*", "tokenizer/*", "processor/*", "scheduler/*")
            self.qwen_vl = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                folder / "text_encoder", dtype=dtype, use_safetensors=True
            )
            self.qwen_vl.eval().requires_grad_(False)
            self.tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
            self.processor = load_processor(folder / "processor")
            self.load_model(["scheduler"])
            self.text_pipeline = getattr(diffusers, self.flavour.pipeline_class)(
                scheduler=self.scheduler,
                vae=None,
                text_encoder=self.qwen_vl,
                tokenizer=self.tokenizer,
                processor=self.processor,
                transformer=None,
            )
        if "transformer" in parts and self.transformer is None:
            self._place_transformer(self.device)

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
        """Devices, precision, processes, trackers."""
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
        logging.basicConfig(format="%(message)s")
        main = self.accelerator.is_main_process
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
            index_content(all_pictures(self.samples), self.index)

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

    def _latent(self, picture: Picture, device: torch.device | str | None) -> torch.Tensor:
        """(16, 1, h, w) on the CPU, as it lies in the cache."""
        return self.encode_image_embedding(load_picture(picture), device)[0].cpu()

    def _embed(self, example: Example, device: torch.device | str | None) -> torch.Tensor:
        """(T, D) on the CPU, as it lies in the cache."""
        images = [load_picture(picture) for picture in example.vision]
        return self.encode_prompt_image_embedding(example.caption, images, device)[0][0].cpu()

    def _encode(self, example: Example) -> dict[str, Any]:
        """What read_entries() reads, computed."""
        cache = self.config.cache
        pictures = (example.target, *example.references)
        target, *references = (self._latent(p, cache.vae_encoder_device) for p in pictures)
        return {
            "pixel_latent": target,
            "control_latent": references,
            "prompt_embed": self._embed(example, cache.text_encoder_device),
        }

    def examples_of(self, batch: dict[str, Any]) -> list[Example]:
        """Pictures of a batch {"image": [...], "control": [[...]], "prompt": [...]} -> Examples.

        Pictures are PIL or HWC uint8; "control" holds a picture or a list of them per sample.
        """
        found = []
        for target, control, prompt in zip(
            batch["image"], batch["control"], batch["prompt"], strict=True
        ):
            image = as_image(target)
            size = pick_size(image.width * image.height, image.width / image.height)
            area_px = reference_area_px(self.config, size)
            controls = control if isinstance(control, list | tuple) else [control]
            pictures = [as_image(c) for c in controls]
            found.append(
                Example(
                    name="",
                    target=picture_of(image, image.width * image.height),
                    references=tuple(picture_of(p, area_px) for p in pictures),
                    vision=tuple(
                        picture_of(p, self.flavour.vision_area or area_px) for p in pictures
                    ),
                    caption=prompt,
                )
            )
        return found

    def cache_step(
        self,
        batch: dict[str, Any],
        vae_device: torch.device | str | None = None,
        text_device: torch.device | str | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """Encode the pictures and prompts of a batch and keep them in the cache.

        Returns per sample: pixel_latent, control_latent (list), prompt_embed and
        empty_prompt_embed (T, D) with their masks (T,).
        """
        items = []
        for example in self.examples_of(batch):
            empty = example._replace(caption="")
            item: dict[str, Any] = {
                "pixel_latent": self._through_cache(example.target, vae_device),
                "control_latent": [self._through_cache(p, vae_device) for p in example.references],
                "prompt_embed": self._through_cache(example, text_device),
                "empty_prompt_embed": self._through_cache(empty, text_device),
            }
            for name in ("prompt_embed", "empty_prompt_embed"):
                item[name.replace("embed", "embeds_mask")] = torch.ones(len(item[name])).long()
            items.append(item)
        return items

    def _through_cache(
        self, what: Picture | Example, device: torch.device | str | None
    ) -> torch.Tensor:
        """Read the entry of a picture's latents or an example's prompt, or encode and write it."""
        kind = "latent" if isinstance(what, Picture) else "embed"
        encode: Any = self._latent if isinstance(what, Picture) else self._embed
        if not self.use_cache:
            return encode(what, device)
        key = self.keys.latent(what) if isinstance(what, Picture) else self.keys.prompt(what)
        path = entry_path(self.cache_dir, key)
        if path.exists():
            with contextlib.suppress(ValueError):  # damaged: encode it again
                return read_entry(path)[kind]
        write_entry(self.cache_dir, key, {kind: encode(what, device)})
        return read_entry(path)[kind]

    def cache_jobs(self, fresh: bool = False) -> dict[str, Picture | Example]:
        """Every entry that training and validation can ask for: {key: what to encode}.

        fresh: only those of data sets with recreate_cache.
        """
        jobs: dict[str, Picture | Example] = {}
        for draw in possible_draws(self.config, self.samples):
            dataset = self.config.data.dataset_configs[self.samples[draw.sample].dataset]
            if fresh and not dataset.recreate_cache:
                continue
            example = resolve(self.config, self.flavour, self.samples, draw, self.index)
            for picture in (example.target, *example.references):
                jobs.setdefault(self.keys.latent(picture), picture)
            jobs.setdefault(self.keys.prompt(example), example)
        return jobs

    def _intact(self, key: str) -> bool:
        """Whether an entry is there and unharmed; a file that has not changed is not read again."""
        path = entry_path(self.cache_dir, key)
        try:
            stat = path.stat()
        except OSError:
            return False
        if self.index.get(path, stat):
            return True
        try:
            read_entry(path)
        except ValueError as error:
            log.warning("%s; it is built again", error)
            return False
        self.index.put(path, stat, {"intact": True})
        return True

    def cache_embeddings(self, train_dataloader: Iterable[dict[str, Any]] | None = None) -> int:
        """Encode what is missing, a share per process; VAE and text encoder one after the other.

        Without an argument: all that the config can ask for. With a loader: its batches (see
        cache_step). Returns how many entries this process encoded; with nothing to do no model is
        loaded and no picture is read.
        """
        self.setup_accelerator()
        cache = self.config.cache
        vae_device = torch.device(cache.vae_encoder_device or self.device)
        text_device = torch.device(cache.text_encoder_device or self.device)
        if train_dataloader is not None:
            batches = [self.cache_step(b, vae_device, text_device) for b in train_dataloader]
            self.unload("vae", "text_encoder")
            return sum(len(items) for items in batches)
        self.find_data()
        jobs, fresh = self.cache_jobs(), self.cache_jobs(fresh=True)
        # KEEP: shares of ALL entries; what is missing changes while other processes write
        share = sorted(jobs)[self.accelerator.process_index :: self.accelerator.num_processes]
        mine = [key for key in share if key in fresh or not self._intact(key)]
        latents = [key for key in mine if isinstance(jobs[key], Picture)]
        prompts = [key for key in mine if isinstance(jobs[key], Example)]
        log.info("cache: %d entries, process 0 has %d to encode", len(jobs), len(mine))
        for key in progress(latents, "encode pictures", disable=not latents):
            latent = self._latent(jobs[key], vae_device)  # type: ignore[arg-type]
            self._keep(key, {"latent": latent})
        self.unload("vae")  # KEEP: the encoders are never in memory together
        self.index.commit()
        for key in progress(prompts, "encode prompts", disable=not prompts):
            embed = self._embed(jobs[key], text_device)  # type: ignore[arg-type]
            self._keep(key, {"embed": embed})
        self.unload("text_encoder")
        self.index.commit()
        self.accelerator.wait_for_everyone()
        if lost := [key for key in jobs if not entry_path(self.cache_dir, key).exists()]:
            raise UserError(f"{len(lost)} cache entries were not written; run it again")
        return len(mine)

    def _keep(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        path = write_entry(self.cache_dir, key, tensors)
        self.index.put(path, path.stat(), {"intact": True})

    # -- LoRA and quantisation

    @property
    def precision(self) -> str:
        """What the blocks are stored in; `trainer.quantize = True` before loading means fp8."""
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
            if device:
                block.to(device)
            quantize_part(block, precision)
        mark_quantized(model, precision)
        return model

    def _layout(self, device: torch.device | str) -> Layout:
        """model.devices, or all on `device`; with blocks_to_swap."""
        model = self.config.model
        names = model.devices or [str(device)]
        # an empty tensor knows the number of "cuda"
        devices = [torch.empty(0, device=name).device for name in names]
        return Layout(devices, model.blocks_to_swap)

    def _place_transformer(self, device: torch.device | str) -> None:
        """Load the transformer to where the config wants it, or move the one that is there."""
        layout = self._layout(device)
        if self.transformer is None:
            folder = self.checkpoint("transformer/*") / "transformer"
            cache_dir = self.cache_dir if self.use_cache else None
            loader = TransformerLoader(folder, self.weight_dtype, self.precision, cache_dir)
            self.transformer = loader.load(layout, self.config.model.quantize_via)
        elif self.precision != "no_change" and not hasattr(self.transformer, "quantized_to"):
            self.quantize_model(self.transformer)
        if getattr(self.transformer, "layout", None) != layout:
            place(self.transformer, layout)

    def set_lora(self) -> None:
        """Put the transformer on the training device and add the adapter to it."""
        self.setup_accelerator()
        if problems := check_model(self.config, self.precision):
            raise UserError("\n".join(problems))
        self._place_transformer(self.device)
        self.load_model(["scheduler"])
        if getattr(self.transformer, "peft_config", None):
            return
        lora = self.config.model.lora
        add_lora(self.transformer, lora, self.config.seed)
        self.transformer.train()
        if self.config.train.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        if lora.pretrained_weight:
            self._start_from(lora.pretrained_weight)
        # every process has read the frozen weights itself: DDP need not send them
        frozen_names = [n for n, p in self.transformer.named_parameters() if not p.requires_grad]
        torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            self.transformer, frozen_names
        )
        count = sum(p.numel() for p in self.trainable())
        log.info("LoRA: %.2f million parameters, fp32", count / 1e6)

    def calibrate(self, batches: Iterable[Any] | None = None) -> None:
        """With model.quantize_activations: measure the layers' inputs, quantise them from now on.

        The scale of a layer is its largest input in CALIBRATION_STEPS of `batches` (as fit() takes
        them, an iterator loses these; None: the first training steps) on all processes. So the same
        batches give the same scales. What has been calibrated stays as it is.
        """
        transformer = self.bare_transformer()
        if not self.config.model.quantize_activations or hasattr(transformer, "calibrated"):
            return
        from optimum.quanto import Calibration

        layers, found = quantize_inputs(transformer), []
        batches = self.train_dataloader() if batches is None else batches
        steps = itertools.islice(batches, CALIBRATION_STEPS)
        for step in progress(steps, "calibrate", total=CALIBRATION_STEPS, leave=False):
            for batch in step if isinstance(step, list) else [step]:
                if "error" in batch:
                    raise UserError(batch["error"])
                for layer in layers:
                    layer.input_scale = torch.ones_like(layer.input_scale)  # 1: not known yet
                with torch.no_grad(), Calibration(streamline=False):
                    self.training_step(batch)
                found.append(torch.stack([layer.input_scale.float() for layer in layers]))
        if not found:
            raise UserError("the data loader has no batch to calibrate the activations with")
        scales = self.accelerator.gather(torch.stack(found).amax(0)[None]).amax(0)
        for layer, scale in zip(layers, scales, strict=True):
            layer.input_scale = scale.to(layer.input_scale.device)
        transformer.calibrated, self._drawn = True, 0

    def trainable(self) -> list[torch.nn.Parameter]:
        """The parameters that are trained."""
        return [p for p in self.transformer.parameters() if p.requires_grad]

    def _start_from(self, path: Path) -> None:
        """Copy a LoRA file into the adapter; alpha / r is taken out of the weights again."""
        from peft.utils import set_peft_model_state_dict

        check_start(path, self.config.model.lora)
        tensors = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
        there = lora_tensors(self.transformer)
        if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in there.items()}:
            raise UserError(f"{path}: other layers than model.lora asks for")
        tensors = strengthen(tensors, 1 / strength_of(self.transformer))
        set_peft_model_state_dict(self.transformer, tensors)

    def bare_transformer(self) -> Any:
        """The transformer without its distributed wrapper."""
        if self.accelerator and self.transformer is not None:
            return self.accelerator.unwrap_model(self.transformer)
        return self.transformer

    def about_lora(self) -> dict[str, Any]:
        """What generate.py must know to sample as this LoRA was trained."""
        data = self.config.data
        areas = {
            v.vision_area or self.flavour.vision_area for s in self.samples for v in s.variants
        }
        return {
            "base_model": self.config.model.pretrained_model_name_or_path,
            "flavour": self.flavour.name,
            "reference_area": data.reference_area,
            "vision_area": min((a for a in areas if a), default=self.flavour.vision_area),
            "resolution": data.dataset_configs[0].resolution if data.dataset_configs else None,
            "step": self.global_step,
            "method": self.config.model.lora.method,
            "r": self.config.model.lora.r,
            "lora_alpha": self.config.model.lora.lora_alpha or self.config.model.lora.r,
        }

    def save_lora(self, path: str | Path) -> Path:
        """Write the adapter to a .safetensors file, or into a folder under its usual name."""
        path = Path(path)
        file = path if path.suffix == ".safetensors" else path / LORA_FILE
        save_lora_file(file, self.bare_transformer(), self.about_lora())
        return file

    def load_lora(self, path: str | Path) -> None:
        """Load a LoRA file (or folder) for inference, at the strength it was trained with."""
        import diffusers

        path = Path(path)
        file = path if path.is_file() else path / LORA_FILE
        if not file.is_file():
            raise UserError(f"no LoRA file {file}")
        self.load_model(["transformer"])
        pipeline_class = getattr(diffusers, self.flavour.pipeline_class)
        tensors, metadata = pipeline_class.lora_state_dict(
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
        problems = [
            p
            for name in PredictDevices.model_fields
            for p in check_device(f"predict.devices.{name}", getattr(devices, name))
        ]
        if problems:
            raise UserError("\n".join(problems))
        self.transformer = self.bare_transformer()
        self._place_transformer(devices.transformer or self.device)
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
        pictures = [as_image(image) for image in images]
        main = pictures[0] if self.flavour.name == "edit-v1" else pictures[-1]
        data = self.config.data
        aligned = data.reference_area == "target"
        size = pick_size(AREA_1MP, main.width / main.height)
        if aligned and data.dataset_configs:
            size = nearest_bucket(main.width, main.height, data.dataset_configs[0].resolution)
        width, height = (width or size[0]) // 16 * 16, (height or size[1]) // 16 * 16
        area_px = reference_area_px(self.config, (width, height))
        if aligned:  # as in training: cropped to the target's aspect
            box = cover_box(main.width / main.height, width / height)
            pictures = [crop(p, box) if same_aspect(p, main) else p for p in pictures]
        vision_area = float(self.about_lora()["vision_area"] or area_px)

        def fit(image: Image.Image, area_px: float) -> Image.Image:
            size = pick_size(area_px, image.width / image.height)
            return image.resize(size, Image.Resampling.LANCZOS)

        references = [
            self.encode_image_embedding(fit(p, area_px), self.vae.device) for p in pictures
        ]
        shown = [fit(p, vision_area) for p in pictures]
        device = self.qwen_vl.device
        embeds, _ = self.encode_prompt_image_embedding(prompt, shown, device)
        negative = None
        if negative_prompt is not None and true_cfg_scale > 1:
            negative, _ = self.encode_prompt_image_embedding(negative_prompt, shown, device)
        latents = self._sample(
            height, width, references, embeds, negative, num_inference_steps, true_cfg_scale, seed
        )
        return self.decode_vae_latent(latents)[0]

    def _sample(
        self,
        height: int,
        width: int,
        references: Sequence[torch.Tensor],
        embeds: torch.Tensor,
        negative: torch.Tensor | None,
        steps: int,
        scale: float,
        seed: int,
    ) -> torch.Tensor:
        """Latents (1, 16, 1, h, w) of one picture; noise as the pipelines draw it."""
        transformer = self.bare_transformer()
        device, dtype = transformer.device, embeds.dtype
        generator = torch.Generator().manual_seed(seed)
        shape = (1, 16, 1, height // 8, width // 8)
        noise = torch.randn(shape, generator=generator, dtype=dtype).to(device)
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        references = [reference.to(device, dtype) for reference in references]
        negative = None if negative is None else negative.to(device)
        # fp32 LoRA on a bf16 base: as in training
        mixed = bool(getattr(transformer, "peft_config", None)) and dtype != torch.float32
        with torch.autocast(device.type, dtype, enabled=mixed):
            return denoise(
                transformer, scheduler, noise, references, embeds.to(device), steps, negative, scale
            )

    # -- training

    def configure_optimizers(self) -> None:
        """Optimizer and learning rate schedule from the config."""
        from diffusers.optimization import get_scheduler

        settings = self.config.optimizer
        optimizer_class = import_class(settings.class_path)
        self.optimizer = optimizer_class(self.trainable(), **settings.init_args)
        schedule = self.config.lr_scheduler
        name, cycles = schedule.scheduler_type, schedule.num_cycles
        if name == "constant" and schedule.warmup_steps:
            name = "constant_with_warmup"
        if name == "cosine_with_restarts":
            cycles = max(1, round(cycles))
        self.lr_scheduler = get_scheduler(
            name,
            self.optimizer,
            num_warmup_steps=schedule.warmup_steps,
            num_training_steps=self.total_steps(),
            num_cycles=cycles,  # type: ignore[arg-type]
            power=schedule.power,
        )

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
        return self.config.seed, "loader", purpose, rank, self.global_step, self._drawn

    def _training_step_cached(self, batch: dict[str, Any]) -> torch.Tensor:
        batch = to_device(batch, self.device)
        control = batch["control_latent"]
        noise = batch.get("noise")
        if noise is None:
            chance = self._loader_chance("noise")
            noise = normal(batch["pixel_latent"].shape, *chance).to(self.device)
            self._drawn += 1
        return self._compute_loss(
            batch["pixel_latent"],
            control if isinstance(control, list) else [control],
            batch["prompt_embed"],
            batch.get("prompt_embeds_mask"),
            noise,
            batch["sigma"],
        ).mean()

    def _training_step_compute(self, batch: dict[str, Any]) -> torch.Tensor:
        """Encode with the same functions the cache is filled with, then go on as from the cache."""
        examples = batch.get("examples") or self.examples_of(batch)
        items = [self._encode(example) for example in examples]
        drawn = {key: batch[key] for key in ("noise", "sigma") if key in batch}
        return self._training_step_cached(collate(items) | drawn)

    def _compute_loss(
        self,
        pixel_latents: torch.Tensor,
        control_latents: Sequence[torch.Tensor],
        prompt_embeds: torch.Tensor,
        prompt_embeds_mask: torch.Tensor | None,
        noise: torch.Tensor,
        sigma: torch.Tensor,
        transformer: Any = None,
    ) -> torch.Tensor:
        """Loss per sample, (B,) fp32. Noise and sigma in fp32; sigma is shifted here.

        transformer: None for the one being trained, with its distributed wrapper.
        """
        loss, dtype = self.config.loss, self.weight_dtype
        tokens = math.prod(token_grid(pixel_latents))
        mu = (
            model_mu(self.scheduler.config, tokens)
            if loss.timestep_shift == "model"
            else math.log(float(loss.timestep_shift))
        )
        sigma = shift_sigma(sigma.float(), mu)
        target = pixel_latents.float()
        noisy = add_noise(target, noise, sigma).to(dtype)
        with self.accelerator.autocast():
            velocity = predict_velocity(
                transformer or self.transformer,
                noisy,
                [control.to(dtype) for control in control_latents],
                prompt_embeds.to(dtype),
                prompt_embeds_mask,
                sigma,
            )
        return LOSSES[loss.loss_type](velocity, noise, target)

    def trained_as(self) -> dict[str, Any]:
        """What decides the result; a run that continues must have the same."""
        config = self.config.model_dump(mode="json")
        values = dict(flat_settings({section: config[section] for section in TRAINS}, ""))
        names = [(sample.dataset, sample.name, sample.held_out) for sample in self.samples]
        values["samples (names and number)"] = cache_key("samples", names=names)
        return values | {"samples per step": self.samples_per_step}

    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.step_plan().steps if self.samples else self.config.train.max_train_steps

    def train_dataloader(self, first_step: int = 0) -> Any:
        """The loader fit() uses: one list of micro-batches per optimizer step of this process."""
        self.setup_accelerator()
        self.find_data()
        plan = self.step_plan(first_step)
        workers = self.config.data.num_workers
        return torch.utils.data.DataLoader(
            PairDataset(self, self.use_cache),
            sampler=plan,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=self.use_cache and self.device.type == "cuda",
            prefetch_factor=4 if workers else None,
        )

    def step_plan(self, first_step: int = 0) -> StepPlan:
        """Which samples meet in which step, for this process."""

        def shape_of(draw: Draw) -> object:
            example = resolve(self.config, self.flavour, self.samples, draw, self.index)
            return example.target.size, tuple(p.size for p in example.references)

        def remembered(draw: Draw) -> object:  # crops and dropout do not change the shape
            key = draw.sample, draw.variant
            if key not in self._shapes:
                self._shapes[key] = shape_of(draw)
            return self._shapes[key]

        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        steps = self.config.train.max_train_steps
        plan = StepPlan(self.config, self.samples, remembered, first_step, steps, rank, processes)
        if self.config.train.num_epochs:
            plan.steps = min(steps, self.config.train.num_epochs * plan.steps_per_epoch)
        return plan

    def preflight(self) -> None:
        """What can only be checked with the libraries loaded, but needs no weights.

        Raises:
            UserError: with every problem.
        """
        config, lora = self.config, self.config.model.lora
        problems = check_precision(self.precision) + check_model(config, self.precision)
        path = config.model.pretrained_model_name_or_path
        try:
            empty = empty_transformer(read_model_json(path, "transformer/config.json"))
            adapter_config(empty, lora)
            if lora.pretrained_weight:
                check_start(lora.pretrained_weight, lora)
        except UserError as error:
            problems.append(str(error))
        args = config.optimizer.init_args
        try:
            optimizer_class = import_class(config.optimizer.class_path)
            optimizer_class([torch.nn.Parameter(torch.zeros(1))], **args)
        except (UserError, TypeError, ValueError) as error:
            problems.append(f"optimizer {config.optimizer.class_path} with {args}: {error}")
        trackers: list[str] = {"none": [], "all": []}.get(
            config.logging.report_to, [config.logging.report_to]
        )
        for package in (name for name in trackers if not importlib.util.find_spec(name)):
            problems.append(f"{package} is not installed: pip install {package}")
        if problems:
            raise UserError(f"{len(problems)} problem(s)\n{listed(problems)}")

    def fit(self, train_dataloader: Iterable[Any] | None = None) -> None:
        """The whole run: audit, cache, load, train, save.

        train_dataloader: optional; yields batches for training_step, or lists of them (the
        micro-batches of one optimizer step), and decides about caption dropout. Without it the
        config's data sets are used.
        """
        self.setup_accelerator()
        train = self.config.train
        if train_dataloader is None:
            self.find_data()
        self.preflight()
        self.samples_per_step = self.config.data.batch_size * train.gradient_accumulation_steps
        self.samples_per_step *= self.accelerator.num_processes
        found = find_checkpoint(self.config, self.trained_as()) if self.global_step == 0 else None
        if self.accelerator.is_main_process:
            if not found and self.global_step == 0:
                set_aside(self.config.logging.output_dir)
            run_record(self.config.logging.output_dir, self.config, Path(__file__))
        if train_dataloader is None and self.use_cache:
            self.cache_embeddings()
        elif not self.use_cache:
            self.load_model(["vae", "text_encoder"])
        self.set_lora()
        self.calibrate(train_dataloader)
        self.configure_optimizers()
        if found:
            self._restore(*found)
        # KEEP: DDP must wrap the transformer itself, or gradients are never averaged
        self.transformer, self.optimizer = self.accelerator.prepare(
            self.transformer, self.optimizer
        )
        if self.config.logging.report_to != "none":
            name = self.config.logging.tracker_project_name
            self.accelerator.init_trackers(name, {"config": self.config.model_dump_json()})
        steps = self.total_steps()
        loader: Iterable[Any]
        if train_dataloader is None:
            loader = self.train_dataloader(self.global_step)
            self._announce(steps)
        else:
            loader = again_and_again(train_dataloader)
        metrics = None
        if self.accelerator.is_main_process:
            metrics = MetricLog(self.config.logging.output_dir / "metrics.jsonl", self.global_step)
        with StopSignal() as stop:
            share = self.samples_per_step // self.accelerator.num_processes
            stopped = self._loop(loader, steps, share, stop, metrics)
        if self.accelerator.is_main_process:
            self.save_lora(self.config.logging.output_dir)
            self._write_card()
        if metrics:
            metrics.close()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        word = "stopped" if stopped else "done"
        log.info(
            "%s at step %d: %s", word, self.global_step, self.config.logging.output_dir / LORA_FILE
        )

    def _announce(self, steps: int) -> None:
        """Log what is about to happen; draw the first step's pictures."""
        plan = self.step_plan(self.global_step)
        training = sum(not sample.held_out for sample in self.samples)
        log.info(
            "%s on %s, %s | %d samples (%d held out) | %d samples a step, %d steps an epoch | "
            "steps %d..%d",
            self.flavour.name,
            self.device,
            self.weight_dtype,
            training,
            len(self.samples) - training,
            plan.size,
            plan.steps_per_epoch,
            self.global_step,
            steps,
        )
        if self.global_step == 0 and self.accelerator.is_main_process:
            draws = list(itertools.chain.from_iterable(next(iter(plan), [])))[:8]
            rows, captions = [], []
            for draw in draws:
                e = resolve(self.config, self.flavour, self.samples, draw, self.index)
                rows.append([load_picture(p) for p in (*e.references, e.target)])
                captions.append(f"{e.name}: {e.caption or '(empty)'}")
            heads = [f"reference {i + 1}" for i in range(len(rows[0]) - 1)] + ["target"]
            self._save_sheet("first_batch", contact_sheet(rows, heads, captions))

    def _save_sheet(self, name: str, sheet: Image.Image) -> None:
        folder = self.config.logging.output_dir / "samples"
        save_atomic(folder / f"{name}.png", lambda file: sheet.save(file, format="PNG"))

    def _loop(
        self,
        loader: Iterable[Any],
        steps: int,
        share: int,
        stop: StopSignal,
        metrics: MetricLog | None,
    ) -> bool:
        """Train up to `steps`; returns whether a signal ended it early."""
        every, saves = self.config.logging.log_every, self.config.train.checkpointing_steps
        window: list[tuple[list[str], torch.Tensor, torch.Tensor]] = []  # since the last log line
        stopped = False
        if self.global_step == 0:
            self._validate(metrics)
        bar = progress(None, "train", total=steps, initial=self.global_step, unit="step")
        clock = time.monotonic()  # of the window; stands still while saving and validating
        for batches in itertools.islice(loader, max(0, steps - self.global_step)):
            names, loss, norm = self._step(batches, share)
            window.append((names, loss, norm))
            bar.update()
            stopped = self._agree(stop.requested)
            last = stopped or self.global_step == steps
            saving = last or self.global_step % saves == 0
            if saving or self.global_step % every == 0:
                value = self._mean_loss(window)  # waits for the GPU
                pace = (time.monotonic() - clock) / len(window)
                values = {"loss": value, "grad_norm": float(norm), "seconds_per_step": pace}
                self._log(bar, metrics, steps, values)
                window, clock = [], time.monotonic()
            pause = time.monotonic()
            if saving:
                self.save_checkpoint(self._epoch(), self.global_step)
            if not stopped:
                self._validate(metrics, last)
            clock += time.monotonic() - pause
            if last:
                break
        bar.close()
        return stopped

    def _step(self, batches: Any, share: int) -> tuple[list[str], torch.Tensor, torch.Tensor]:
        """One optimizer step over micro-batches; returns sample names, mean loss, gradient norm."""
        accelerator = self.accelerator
        batches = batches if isinstance(batches, list) else [batches]
        if "error" in batches[0]:
            raise UserError(f"{batches[0]['error']}. Repair: cache_embeddings.py --verify")
        total = share if "noise" in batches[0] else sum(batch_size(b) for b in batches)
        loss = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches):
            # processes average their gradients once, with the last micro-batch
            silent = number < len(batches) - 1
            with accelerator.no_sync(self.transformer) if silent else contextlib.nullcontext():
                part = self.training_step(batch) * (batch_size(batch) / total)
                accelerator.backward(part)
            loss += part.detach()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = accelerator.clip_grad_norm_(trained, self.config.train.max_grad_norm)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.global_step += 1
        self._drawn = 0
        names = [str(name) for batch in batches for name in batch.get("names", [])]
        return names, loss, norm

    def _agree(self, requested: bool) -> bool:
        """Whether any process got a stop signal; all must leave at the same step.

        Several processes ask each other only when they log, for that waits for the GPU anyway.
        """
        if self.accelerator.num_processes == 1:
            return requested
        if self.global_step % self.config.logging.log_every:
            return False
        if requested:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def _mean_loss(self, window: Sequence[tuple[list[str], torch.Tensor, torch.Tensor]]) -> float:
        """Mean over steps and processes of (sample names, loss, gradient norm).

        Raises:
            UserError: it is not finite; the message names the samples of the first bad step.
        """
        losses = self.accelerator.reduce(torch.stack([loss for _, loss, _ in window]), "mean")
        norms = torch.stack([norm for _, _, norm in window])
        bad = (~torch.isfinite(losses + norms)).nonzero()
        if len(bad):
            first = int(bad[0])
            step = self.global_step - len(window) + first + 1
            kept = list_checkpoints(self.config.logging.output_dir)
            raise UserError(
                f"the loss of step {step} is {losses[first].item()}, its gradient norm "
                f"{norms[first].item()}; samples of this process: "
                f"{', '.join(window[first][0]) or 'unknown'}. Nothing was saved since "
                f"{kept[-1].name if kept else 'the start'}; lower the learning rate or look at "
                "those files"
            )
        return losses.mean().item()

    def _epoch(self) -> int:
        return self.global_step // self.step_plan().steps_per_epoch if self.samples else 0

    def _log(
        self, bar: Any, metrics: MetricLog | None, steps: int, values: dict[str, float]
    ) -> None:
        """One line on the screen, the same values in metrics.jsonl and the trackers."""
        values |= {"lr": self.lr_scheduler.get_last_lr()[0], "memory_gb": memory_gb(self.device)}
        left = datetime.timedelta(
            seconds=round(values["seconds_per_step"] * (steps - self.global_step))
        )
        line = (
            f"step {self.global_step}/{steps} loss {values['loss']:.4f} "
            f"grad {values['grad_norm']:.3f} lr {values['lr']:.1e} "
            f"{values['seconds_per_step']:.3f} s/step {values['memory_gb']:.1f} GB eta {left}"
        )
        if metrics:
            bar.write(line)
            metrics.write(self.global_step, **values)
        self.accelerator.log(values, step=self.global_step)

    def save_checkpoint(self, epoch: int, global_step: int) -> None:
        """checkpoint-<step>/: LoRA file, raw adapter, optimizer, schedule; complete or absent."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            output_dir = self.config.logging.output_dir
            transformer = self.bare_transformer()
            adapter = {k: v.detach().cpu().clone() for k, v in lora_tensors(transformer).items()}
            training = {
                "adapter": adapter,  # as it trains; the LoRA file has alpha folded in
                "optimizer": self.optimizer.state_dict(),
                "lr_scheduler": self.lr_scheduler.state_dict(),
            }

            def write(folder: Path) -> None:
                save_lora_file(folder / LORA_FILE, transformer, self.about_lora())
                torch.save(training, folder / "training_state.pt")
                state = {
                    "step": global_step,
                    "epoch": epoch,
                    "files": {file.name: hash_file(file) for file in folder.iterdir()},
                    "trained_as": self.trained_as(),
                }
                (folder / "state.json").write_text(json.dumps(state, indent=2))

            save_folder_atomic(output_dir / f"checkpoint-{global_step}", write)
            limit = self.config.train.checkpoints_total_limit
            if limit:
                for old in list_checkpoints(output_dir)[:-limit]:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _restore(self, folder: Path, state: dict[str, Any]) -> None:
        """Adapter, optimizer, schedule and step of a checkpoint."""
        from peft.utils import set_peft_model_state_dict

        saved = torch.load(folder / "training_state.pt", map_location="cpu", weights_only=True)
        set_peft_model_state_dict(self.transformer, saved["adapter"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.lr_scheduler.load_state_dict(saved["lr_scheduler"])
        self.global_step = state["step"]
        log.info("resumed from %s (step %d)", folder, self.global_step)

    def _write_card(self) -> None:
        """README.md: the model card."""
        about = self.about_lora()
        load = LOAD_LOKR if about["method"] == "lokr" else LOAD_LORA
        prompts = sorted({v.caption for s in self.samples for v in s.variants})[:5]
        text = MODEL_CARD.format(
            **about,
            prompts="\n".join(f"- {prompt}" for prompt in prompts),
            pipeline=self.flavour.pipeline_class,
            load=load.format(file=LORA_FILE),
        )
        path = self.config.logging.output_dir / "README.md"
        save_atomic(path, lambda file: file.write_text(text, encoding="utf-8"))

    # -- validation

    def _validate(self, metrics: MetricLog | None, last: bool = False) -> None:
        """Every validation.steps, at the start and the end: loss and sheet of held-out pairs."""
        settings = self.config.validation
        held_out = [number for number, sample in enumerate(self.samples) if sample.held_out]
        if not settings.steps or not held_out:
            return
        if self.global_step % settings.steps and not last:
            return
        if self.accelerator.is_main_process:
            items = [self._validation_item(number) for number in held_out]
            transformer = self.bare_transformer()
            transformer.eval()
            with torch.no_grad():
                loss = self._validation_loss(items)
                self._validation_sheet(items[: settings.max_samples])
            transformer.train()
            tqdm.write(f"step {self.global_step} validation loss {loss:.4f}")
            if metrics:
                metrics.write(self.global_step, validation_loss=loss)
            self.accelerator.log({"validation_loss": loss}, step=self.global_step)
        self.accelerator.wait_for_everyone()

    def _validation_item(self, number: int) -> tuple[Example, dict[str, Any], torch.Tensor]:
        """Example, its batch of one, and the embedding of the empty instruction."""
        data, draw = PairDataset(self, self.use_cache), Draw(0, number)
        example, paths = data.resolved(draw)
        if self.use_cache:
            item = read_entries(paths)
            empty = read_entries(data.resolved(draw._replace(empty=True))[1])
        else:
            item, empty = self._encode(example), self._encode(example._replace(caption=""))
        return example, collate([item]), empty["prompt_embed"][None]

    def _validation_loss(self, items: Sequence[tuple[Example, dict[str, Any], Any]]) -> float:
        """Mean over the held-out pairs at four noise levels, with the same noise every time."""
        levels, total = (0.125, 0.375, 0.625, 0.875), 0.0
        for example, batch, _ in items:
            batch = to_device(batch, self.device)
            for level in levels:
                latents = batch["pixel_latent"]
                noise = normal(latents.shape, self.config.validation.seed, example.name, level)
                loss = self._compute_loss(
                    latents,
                    batch["control_latent"],
                    batch["prompt_embed"],
                    None,
                    noise.to(self.device),
                    torch.tensor([level], device=self.device),
                    self.bare_transformer(),  # only this process validates
                )
                total += loss.item()
        return total / len(items) / len(levels)

    def _validation_sheet(self, items: Sequence[tuple[Example, dict[str, Any], Any]]) -> None:
        """references | base | LoRA | target, one row per pair."""
        transformer = self.bare_transformer()
        rows, captions = [], []
        for example, batch, empty in progress(items, "validation pictures", leave=False):
            if example.name not in self._base_pictures:
                transformer.disable_adapters()
                self._base_pictures[example.name] = self._validation_picture(example, batch, empty)
                transformer.enable_adapters()
            references = [load_picture(p) for p in example.references]
            base = self._base_pictures[example.name]
            edited = self._validation_picture(example, batch, empty)
            rows.append([*references, base, edited, load_picture(example.target)])
            captions.append(f"{example.name}: {example.caption}")
        if self.use_cache:
            self.unload("vae")
        heads = [f"reference {i + 1}" for i in range(len(rows[0]) - 3)] + ["base", "LoRA", "target"]
        self._save_sheet(f"step_{self.global_step:06d}", contact_sheet(rows, heads, captions))

    def _validation_picture(
        self, example: Example, batch: dict[str, Any], empty: torch.Tensor
    ) -> Image.Image:
        """One sampled picture at the target's size, from cached latents and embeddings."""
        settings = self.config.validation
        width, height = example.target.size
        latents = self._sample(
            height,
            width,
            batch["control_latent"],
            batch["prompt_embed"],
            empty if settings.true_cfg_scale > 1 else None,
            settings.num_inference_steps,
            settings.true_cfg_scale,
            settings.seed,
        )
        self.load_model(["vae"])
        self.vae.to(self.config.cache.vae_encoder_device or self.device)
        return to_image(decode_latents_qwen(self.vae, latents)[0])


def again_and_again(loader: Iterable[Any]) -> Iterator[Any]:
    """Pass after pass over a loader. Raises UserError when a pass yields nothing."""
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise UserError("the data loader has no more batches: give one that starts again")


def _as_is(value: Any) -> Any:
    """Collate function of a loader whose data set makes whole batches."""
    return value


def batch_size(batch: dict[str, Any]) -> int:
    """Samples in a batch."""
    return len(next(batch[k] for k in ("pixel_latent", "examples", "image") if k in batch))


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


# --- 9. main --------------------------------------------------------------------------------------


def main() -> None:
    """Config -> audit -> fit."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    config = load_config(Config, check=audit)
    QwenImageEditTrainer(config).fit()


if __name__ == "__main__":
    run_script(main)
