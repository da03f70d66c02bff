"""Train a LoRA for Qwen-Image-Edit (2508, 2509, 2511) on (references, instruction) -> target.

Page: docs/train_qwen_edit.md

    accelerate launch train_qwen_edit.py --config configs/demo_qwen_edit.yaml          # CPU demo
    accelerate launch train_qwen_edit.py --config configs/x.yaml                       # one GPU
    accelerate launch --multi_gpu --num_processes 2 train_qwen_edit.py --config configs/x.yaml
    ... --train.resume_from_checkpoint latest        # go on after a stop
    ... --plan | --print_config | --help             # memory and time; settings; all settings

This is no library: copy the file, change it, run it; only utils.py must lie beside it.
`# EDIT HERE:` marks what an ablation changes, `# KEEP:` what breaks otherwise.

Shapes: B samples, T text tokens, D text width (3584), H W pixels, h w = H/8 W/8 latents (16
channels), S = (h/2)(w/2) image tokens of 64 channels each, K references. Pixels lie in [-1, 1],
latents are normalised per channel, sigma runs from 0 (picture) to 1 (noise), velocity = noise - x0.
"""

from __future__ import annotations

import bisect
import contextlib
import csv
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
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pydantic import Field, field_validator, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm.auto import tqdm

from utils import (
    IMAGE_SUFFIXES,
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
    track_picture,
    uniform,
    write_entry,
    write_report,
    write_tensors,
)

# KEEP: diffusers, transformers, peft and accelerate are imported where they are used, so that a
# mistake in the config or the data is reported within seconds, before any of them is loaded.

LORA_FILE = "pytorch_lora_weights.safetensors"
EMA_FILE = "pytorch_lora_weights_ema.safetensors"
SIZE_MULTIPLE = 32  # px; the pipelines round every side to it, so training does too
AREA_1MP = 1024 * 1024
VISION_AREA = 384 * 384  # area_px of the pictures shown to the text encoder by Edit-Plus
ASPECT_TOLERANCE = 0.02  # references whose log aspect differs less share the target's crop

TABLES = {  # T2ITrainer's shapes, width x height; each is used transposed as well
    2048: "1024x2560 1152x2816 1280x3072 1280x2816 1408x3008 1536x2816 1664x2688 1792x2368 "
    "1920x2240 2048x2560 2176x2304 2048x2048 2048x2304",
    1536: "768x1920 896x2112 960x2304 960x2112 1056x2240 1152x2112 1248x2048 1344x1792 1408x1664 "
    "1536x1920 1632x1728 1536x1536 1536x1728",
    1328: "640x1664 768x1856 832x1984 832x1856 896x1920 1024x1856 1088x1728 1152x1536 1280x1472 "
    "1344x1664 1408x1472 1344x1344 1344x1472",
    1024: "512x1280 576x1408 640x1536 640x1408 704x1504 768x1408 832x1344 896x1184 960x1120 "
    "1024x1280 1088x1152 1024x1024 1024x1152",
    768: "384x960 448x1056 512x1152 512x1056 512x1088 576x1056 640x1024 672x896 704x832 768x960 "
    "832x896 768x768 768x832",
    512: "256x640 320x704 320x768 320x640 384x768 384x704 448x704 448x576 512x576 512x640 576x576 "
    "512x512 576x640",
    384: "192x480 240x528 240x576 240x480 288x576 288x528 336x528 336x432 384x432 384x480 432x432 "
    "384x384 432x480",
}

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
        if int(last or first) > 999:
            raise ValueError(f"'{part}': there are not so many blocks")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def check_step_rules(text: str) -> None:
    """Raises ValueError unless `text` is like "1:100,0.1:200,0.01", with steps that go up."""
    number = r"\d*\.?\d+(?:[eE][-+]?\d+)?"
    if not re.fullmatch(rf"(?:{number}:\d+,)+{number}", text.replace(" ", "")):
        raise ValueError(
            f"step_rules: '{text}' is not like '1:100,0.1:200,0.01' (factor:up to step, ..., "
            "factor of the rest)"
        )
    steps = [int(step) for step in re.findall(r":(\d+),", text)]
    if steps != sorted(set(steps)):
        raise ValueError(f"step_rules: the steps of '{text}' must go up")


def check_extension(text: str) -> str:
    """`text`, if it is like ".txt". Raises ValueError."""
    if not re.fullmatch(r"\.[^./\\]+", text):
        raise ValueError(f"'{text}' is no extension such as .txt")
    return text


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

    @field_validator("target_modules")
    @classmethod
    def _expression(cls, value: list[str] | str) -> list[str] | str:
        try:
            re.compile(value if isinstance(value, str) else "")
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from error
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

    @field_validator("ext")
    @classmethod
    def _dot(cls, value: str) -> str:
        return check_extension(value)


class BatchConfig(Section):
    """One combination of target, references and caption; one is drawn per visit."""

    target_config: str
    """A name of target_configs."""
    caption_config: str
    """A name of caption_configs."""
    reference_config: str | None = None
    """A name of reference_configs; null: no references for the transformer."""
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
    resolution: int = Field(1024, ge=64, multiple_of=16)
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
    selected_control_indexes: list[Annotated[int, Field(ge=1)]] = []
    """Of several references per sample only these, from 1; [] means all."""

    @field_validator("caption_ext")
    @classmethod
    def _dot(cls, value: str) -> str:
        return check_extension(value)

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
        combined = ["target_configs", "reference_configs", "caption_configs", "batch_configs"]
        unread = {  # what this layout does not look at
            "image_configs": [
                *("caption", "caption_ext", "mask_dir", "hf_split"),
                *("selected_control_indexes", "conditioning_multidataset_sampling"),
            ],
            "target_dir": [*combined, "hf_split"],
            "table": [*combined, "caption_ext", "mask_dir", "hf_split"],
            "hf_dataset": [*combined, "caption_ext", "mask_dir"],
        }
        layout = next(name for name in unread if getattr(self, name))
        fields = type(self).model_fields
        if idle := [n for n in unread[layout] if getattr(self, n) != fields[n].default]:
            raise ValueError(f"{', '.join(idle)}: not read beside {layout}; leave it out")
        if self.views == 1 and (self.view_flip or self.view_scale < 1):
            raise ValueError("view_flip and view_scale are about random crops: set views above 1")
        if self.image_configs and not self.batch_configs:
            raise ValueError("batch_configs is empty: name at least one combination")
        if sum(b.weight or 0 for b in self.batch_configs) > 1 + 1e-9:
            raise ValueError("the weights of batch_configs sum to more than 1")
        resized = [t.resize for targets in self.target_configs.values() for t in targets]
        missing = {r for r in (self.resolution, *resized) if r} - set(TABLES)
        if self.buckets == "table" and missing:
            wrong = ", ".join(map(str, sorted(missing)))
            there = ", ".join(map(str, TABLES))
            raise ValueError(f"buckets: table has no resolution {wrong}; take one of {there}")
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
    reference_area: Literal["1mp", "target"] | Annotated[int, Field(ge=1024)] = "1mp"
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

    class_path: str = "adamw"
    """adamw, adamw8bit, adafactor, prodigy, schedulefree, or any importable class."""
    init_args: dict[str, Any] = {}
    """Its arguments, over those in OPTIMIZERS (lr 1e-4; prodigy 1; adafactor's is relative)."""


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

    @model_validator(mode="after")
    def _rules(self) -> LrSchedulerConfig:
        if (self.scheduler_type == "piecewise_constant") != (self.step_rules is not None):
            raise ValueError("scheduler_type: piecewise_constant and step_rules go together")
        if self.step_rules is not None:
            check_step_rules(self.step_rules)
            if self.warmup_steps:
                raise ValueError("piecewise_constant has no warm-up: write it into step_rules")
        return self


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
    memory_mb: int = Field(512, ge=0)
    """Entries that each reading process keeps in memory, so that small data sets are read once."""
    vae_encoder_device: str | None = None
    """E.g. cuda:1; null: the training device."""
    text_encoder_device: str | None = None
    """E.g. cuda:2; null: the training device."""


class PredictDevices(Section):
    """A device per component; null: the training device."""

    vae: str | None = None
    """E.g. cuda:1; null: the training device."""
    text_encoder: str | None = None
    """E.g. cuda:2; null: the training device."""
    transformer: str | None = None
    """E.g. cuda:0; null: the training device."""


class PredictConfig(Section):
    """Inference with trainer.predict()."""

    devices: PredictDevices = PredictDevices()


class ValidationSample(Section):
    """An edit without a target."""

    prompt: str
    """The instruction."""
    images: list[Path] = Field(min_length=1)
    """References, in order."""
    negative_prompt: str | None = None
    """null: validation's."""
    height: int | None = Field(None, ge=32, multiple_of=16)
    """px; null (both): validation.resolution in the last reference's aspect."""
    width: int | None = Field(None, ge=32, multiple_of=16)
    """px; see height."""
    num_inference_steps: int | None = Field(None, ge=2)
    """null: validation's."""
    true_cfg_scale: float | None = Field(None, ge=1)
    """null: validation's."""
    seed: int | None = None
    """null: validation's."""

    @model_validator(mode="after")
    def _whole_size(self) -> ValidationSample:
        if (self.height is None) != (self.width is None):
            raise ValueError("give height and width, or neither")
        return self


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
    """Pictures: side of the square of equal area, px; null: as in training (samples: what
    predict() does). The loss is always of the training size."""
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
    """train_qwen_edit.py: a LoRA for Qwen-Image-Edit from before/after pairs.

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
    """Order, noise, noise levels, dropout, crops and the start of the LoRA."""


# --- 2. pairing: files -> samples, audited before any model loads ---------------------------------


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
    start_mode: str = "bridge"
    mask: Path | None = None
    instruction: str | None = None  # system instruction; None: the model's own
    caption_dropout: float = 0.0
    reference_dropout: float = 0.0
    vision_dropout: float = 0.0
    vision_min: int = 0
    weight: float = 1.0

    def files(self) -> list[Path]:
        """Every picture file it uses."""
        shown = [reference.path for reference in (*self.references, *self.vision)]
        return [self.target, *shown, *(f for f in (self.start, self.mask) if f)]


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


class Found(NamedTuple):
    """What a layout finds: rows by name, roles that every row needs, problems."""

    rows: dict[str, Row]
    needed: list[str]
    problems: list[str]


def nearest(name: str, names: Iterable[str]) -> str:
    """' (did you mean ...?)' or the list of what there is."""
    names = list(names)
    if close := difflib.get_close_matches(name, names, n=1, cutoff=0.4):
        return f", did you mean '{close[0]}'?"
    return f" (there is: {', '.join(names[:10]) or 'none'}{', ...' if len(names) > 10 else ''})"


def check_names(ds: DatasetConfig, where: str) -> list[str]:
    """Problems of the names inside one data set: every name must point at something."""
    problems = []
    tables: dict[str, dict[str, Any]] = {
        "image_config": ds.image_configs,
        "target_config": ds.target_configs,
        "reference_config": ds.reference_configs,
        "caption_config": ds.caption_configs,
    }

    def need(name: str | None, kind: str, place: str, meant: str | None = None) -> None:
        if name is None or name in tables[kind]:
            return
        other = next((k for k, table in tables.items() if name in table), None)
        wrong = f"is one of {other}s, not of {kind}s" if other else f"is no {kind}"
        hint = f", did you mean '{meant}'?" if meant else nearest(name, tables[kind])
        problems.append(f"{where}.{place}: '{name}' {wrong}{hint}")

    for name, targets in ds.target_configs.items():
        if len(targets) != 1:
            problems.append(f"{where}.target_configs.{name}: wanted one target, got {len(targets)}")
        for i, target in enumerate(targets):
            need(target.image, "image_config", f"target_configs.{name}.{i}.image")
            need(target.from_image, "image_config", f"target_configs.{name}.{i}.from_image")
    for name, references in ds.reference_configs.items():
        for i, reference in enumerate(references):
            need(reference.image, "image_config", f"reference_configs.{name}.{i}.image")
        if not references:
            problems.append(f"{where}.reference_configs.{name}: the list is empty")
    shown = {}
    for name, caption in ds.caption_configs.items():
        place = f"caption_configs.{name}"
        need(caption.image, "image_config", f"{place}.image")
        if caption.reference_list:
            shown[name] = caption.reference_list.reference_config
            need(shown[name], "reference_config", f"{place}.reference_list.reference_config")
    for i, batch in enumerate(ds.batch_configs):
        place = f"batch_configs.{i}"
        need(batch.target_config, "target_config", f"{place}.target_config")
        need(batch.caption_config, "caption_config", f"{place}.caption_config")
        need(batch.mask, "image_config", f"{place}.mask")
        # most likely meant: the references that the caption shows
        meant = shown.get(batch.caption_config)
        meant = meant if meant in ds.reference_configs else None
        need(batch.reference_config, "reference_config", f"{place}.reference_config", meant)
    return problems


def role_of(stem: str, suffixes: Iterable[str]) -> str | None:
    """The longest suffix that `stem` ends with ("" only if no other fits); None if none fits."""
    fits = [s for s in suffixes if stem.endswith(s) and Path(stem).name != s]
    return max(fits, key=len) if fits else None


def one_file(root: Path, stem: str, entries: Sequence[os.DirEntry[str]]) -> tuple[Path, list[str]]:
    """The file of a stem, and the problem if there are several."""
    names = ", ".join(entry.name for entry in entries)
    several = [f"{root}: '{stem}' is ambiguous, keep one of {names}"] if len(entries) > 1 else []
    return Path(entries[0].path), several


def used_roles(ds: DatasetConfig) -> list[str]:
    """Suffix layout: the image_configs that any combination uses."""
    used = set()
    for batch in ds.batch_configs:
        caption = ds.caption_configs[batch.caption_config]
        target = ds.target_configs[batch.target_config][0]
        lists = [batch.reference_config]
        lists += [caption.reference_list.reference_config] if caption.reference_list else []
        used |= {item.image for name in lists if name for item in ds.reference_configs[name]}
        used |= {target.image, caption.image, *filter(None, (target.from_image, batch.mask))}
    return sorted(used)


def group_by_suffix(ds: DatasetConfig, root: Path) -> Found:
    """Suffix layout (a_T.png a_R.png a_T.txt); roles are the names of image_configs."""
    suffixes = {config.suffix for config in ds.image_configs.values()}
    rows: dict[str, Row] = {}
    problems: list[str] = []
    for stem, entries in list_images(root).items():
        suffix = role_of(stem, suffixes)
        if suffix is None:
            continue
        file, several = one_file(root, stem, entries)
        problems += several
        for role, config in ds.image_configs.items():
            if config.suffix == suffix:
                name = stem[: len(stem) - len(suffix)]
                rows.setdefault(name, Row({})).files[role] = file
    return Found(rows, used_roles(ds), problems)


def group_by_folder(ds: DatasetConfig, root: Path) -> Found:
    """Folders layout; roles "target", "mask" and "reference 1", "reference 1.1", "reference 2".

    "reference 1.1" is a_control_1.png in the first reference folder: more of them, as many as a
    sample has.
    """
    assert ds.target_dir is not None, "checked by DatasetConfig"
    folders = {"target": root / ds.target_dir}
    folders |= {f"reference {i + 1}": root / d for i, d in enumerate(ds.reference_dirs)}
    folders |= {"mask": root / ds.mask_dir} if ds.mask_dir else {}
    rows: dict[str, Row] = {}
    problems: list[str] = []
    for role, folder in folders.items():
        if not folder.is_dir():
            problems.append(f"{role} folder {folder} does not exist")
            continue
        stems = list_images(folder)
        for stem, entries in stems.items():
            file, several = one_file(folder, stem, entries)
            problems += several
            more = re.fullmatch(r"(.+)_control_(\d+)", stem)
            name = stem.removesuffix("_mask")
            if name != stem and not ds.mask_dir and (name in stems or name in rows):
                rows.setdefault(name, Row({})).files.setdefault("mask", file)
            elif more and role.startswith("reference") and more[1] in rows and stem not in rows:
                rows.setdefault(more[1], Row({})).files[f"{role}.{more[2]}"] = file
            else:
                rows.setdefault(stem, Row({})).files[role] = file
    return Found(rows, [role for role in folders if role != "mask"], problems)


NUMBERED_CONTROL = r"(?:path_)?control_(\d+)"
TABLE_COLUMNS = {  # what a table may call them
    "target": ("target", "path_target", "target_image", "image"),
    "references": ("references", "control_images", "path_control", "control"),
    "prompt": ("prompt", "caption"),
    "mask": ("mask", "path_mask", "control_mask"),
    "name": ("name", "id"),
}


def from_columns(record: dict[str, Any]) -> dict[str, Any]:
    """A record of a table under our names; control, control_1, ... control_10 become a list."""
    row: dict[str, Any] = {}
    for column, names in TABLE_COLUMNS.items():
        row[column] = next((record[n] for n in names if record.get(n) not in (None, "")), None)
    if not isinstance(row["references"], list):
        numbered = [(0, row["references"])] + [
            (int(match[1]), value)
            for column, value in record.items()
            if (match := re.fullmatch(NUMBERED_CONTROL, str(column)))
        ]
        row["references"] = [value for _, value in sorted(numbered, key=lambda n: n[0]) if value]
    prompts = row["prompt"] if isinstance(row["prompt"], list) else [row["prompt"]]
    row["prompt"] = tuple(str(prompt).strip() for prompt in prompts if prompt)
    return row


def rows_of_records(
    ds: DatasetConfig, records: Iterable[dict[str, Any]], locate: Callable[[Any, str], Path]
) -> Found:
    """Records of a table or a Hub data set -> rows; `locate` finds the file of a picture."""
    rows: dict[str, Row] = {}
    problems = []
    for number, record in enumerate(records, 1):
        if None in record:  # csv.DictReader: more cells than columns
            problems.append(f"row {number}: more cells than columns; quote a text with commas")
            continue
        row = from_columns(record)
        if row["target"] is None or not row["references"] or None in row["references"]:
            problems.append(f"row {number}: no {'reference' if row['target'] else 'target'}")
            continue
        files = {"target": locate(row["target"], f"{number}_target")}
        for i, reference in enumerate(row["references"], 1):
            files[f"reference {i}"] = locate(reference, f"{number}_reference_{i}")
        if row["mask"] is not None:
            files["mask"] = locate(row["mask"], f"{number}_mask")
        name = str(row["name"] or (files["target"].stem if ds.table else number))
        problems += [f"row {number}: no file {f}" for f in files.values() if not f.is_file()]
        name = f"{name}#{number}" if name in rows else name
        rows[name] = Row(files, row["prompt"])
    return Found(rows, ["target"], problems)


def read_records(ds: DatasetConfig, root: Path) -> Found:
    """A CSV or JSONL table; relative paths count from train_data_dir or the table's folder."""
    assert ds.table is not None
    table = next((t for t in (root / ds.table, ds.table) if t.is_file()), None)
    if table is None:
        return Found({}, [], [f"no table {root / ds.table}"])
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            if table.suffix == ".csv":
                records: list[Any] = list(csv.DictReader(file))
            else:
                records = [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        return Found({}, [], [f"table {table}: {error}"])
    if wrong := [i for i, record in enumerate(records, 1) if not isinstance(record, dict)]:
        return Found({}, [], [f"table {table}: row {wrong[0]} is no record"])

    names = {str(column) for record in records for column in record if column is not None}
    unread = names - {*itertools.chain(*TABLE_COLUMNS.values())}
    if unread := {column for column in unread if not re.fullmatch(NUMBERED_CONTROL, column)}:
        log.warning("table %s: columns not read: %s", table, ", ".join(sorted(unread)))

    def locate(value: Any, name: str) -> Path:
        places = [root / str(value), table.parent / str(value)]
        return next((place for place in places if place.is_file()), places[0])

    try:
        found = rows_of_records(ds, records, locate)
    except OSError as error:  # a name that no file can have
        return Found({}, [], [f"table {table}: {error}"])
    return found._replace(problems=[f"{table}: {problem}" for problem in found.problems])


def read_hub_dataset(ds: DatasetConfig, cache_dir: Path) -> Found:
    """A Hugging Face data set; its pictures are written once, as they are, into the cache."""
    try:
        import datasets
    except ImportError:
        return Found({}, [], ["hf_dataset needs the package datasets: pip install datasets"])
    name = str(ds.hf_dataset)
    try:
        if (Path(name) / "dataset_info.json").is_file():
            table = datasets.load_from_disk(name)
        elif (Path(name) / "dataset_dict.json").is_file():
            table = datasets.load_from_disk(name)[ds.hf_split]
        else:
            table = datasets.load_dataset(name, split=ds.hf_split)
    except Exception as error:  # network, rights, spelling, format: the library has many classes
        return Found({}, [], [f"hf_dataset {name}, split {ds.hf_split}: {error}"])
    for column, feature in dict(table.features).items():  # KEEP: bytes as stored, not decoded
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(column, type(feature)(datasets.Image(decode=False)))
    stats = [(file["filename"], Path(file["filename"]).stat()) for file in table.cache_files]
    stamp = cache_key("hub", name=name, files=[(f, s.st_size, s.st_mtime_ns) for f, s in stats])

    def locate(value: Any, name: str) -> Path:
        if not isinstance(value, dict):  # another kind of column: a file that is not there
            return Path(str(value))
        if value.get("path") and Path(value["path"]).is_file():
            return Path(value["path"])
        file = cache_dir / "hub" / stamp / name
        if not file.exists():
            save_atomic(file, lambda temporary: temporary.write_bytes(value["bytes"]))
        return file

    return rows_of_records(ds, table, locate)


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


class VariantMaker:
    """Rows of one data set -> variants of a sample."""

    def __init__(self, config: Config, ds: DatasetConfig) -> None:
        self.ds, self.seed, self.rate = ds, config.seed, config.data.caption_dropout_rate
        self._siblings: dict[Path, list[Path]] = {}

    def make(self, name: str, row: Row) -> tuple[Variant, ...]:
        """Every combination of one sample. Raises ValueError for a bad caption."""
        return self._by_config(name, row.files) if self.ds.image_configs else self._plain(row)

    def _plain(self, row: Row) -> tuple[Variant, ...]:
        """Folders, tables, Hub: all references, or each alone (random)."""
        ds, files = self.ds, row.files
        roles = sorted(
            (role for role in files if role.startswith("reference")),
            key=lambda role: [int(n) for n in role.split()[1].split(".")],
        )
        if ds.selected_control_indexes:
            most = max(ds.selected_control_indexes)
            if most > len(roles) and ds.on_missing != "allow_fewer":
                raise ValueError(
                    f"{files['target']} has {len(roles)} reference(s), selected_control_indexes "
                    f"asks for number {most}"
                )
            roles = [roles[i - 1] for i in ds.selected_control_indexes if i <= len(roles)]
        if not roles:
            raise ValueError(f"no reference for {files['target']}")
        captions = (ds.caption,) if ds.caption else row.captions
        if captions is None:
            beside = [files[role].with_suffix(ds.caption_ext) for role in ("target", roles[0])]
            there = next((path for path in beside if path.exists()), beside[0])
            captions = read_captions(there, ds.caption_lines is not False)
        if not captions:
            raise ValueError(f"no prompt for {files['target']}: fill its column, or set caption")
        references = tuple(Reference(files[role]) for role in roles)
        alone = ds.conditioning_multidataset_sampling == "random"
        return tuple(
            Variant(
                files["target"],
                shown,
                shown,
                caption,
                ds.resolution,
                mask=files.get("mask"),
                caption_dropout=self.rate,
            )
            for shown in ([(one,) for one in references] if alone else [references])
            for caption in captions
        )

    def _by_config(self, name: str, files: dict[str, Path]) -> tuple[Variant, ...]:
        """Suffix layout: one variant per batch config, choice of from_subdir and caption."""
        ds, variants = self.ds, []
        for batch, weight in zip(ds.batch_configs, batch_weights(ds.batch_configs), strict=True):
            captions = ds.caption_configs[batch.caption_config]
            target = ds.target_configs[batch.target_config][0]
            shown = captions.reference_list
            lists = [batch.reference_config, shown.reference_config if shown else None]
            items = [i for n in lists if n for i in ds.reference_configs[n]]
            draws = max([item.draws for item in items], default=1)
            lines = read_captions(
                files[captions.image].with_suffix(captions.ext), bool(ds.caption_lines)
            )
            for draw, caption in itertools.product(range(draws), lines):
                references = self._references(name, batch.reference_config, files, draw)
                vision = tuple(Reference(reference.path) for reference in references)
                vision_dropout, vision_min = 0.0, 0
                if shown:
                    area = shown.resize**2 if shown.resize else None
                    found = self._references(name, shown.reference_config, files, draw)
                    vision = tuple(Reference(reference.path, area) for reference in found)
                    vision_dropout, vision_min = shown.dropout, shown.min_length
                replaced = target.from_image_mode == "replace" and target.from_image
                learned = files[target.from_image if replaced else target.image]  # type: ignore
                start = files[target.from_image] if target.from_image and not replaced else None
                rate = self.rate if batch.caption_dropout is None else batch.caption_dropout
                variant = Variant(
                    target=learned,
                    references=references,
                    vision=vision,
                    caption=caption,
                    resolution=target.resize or ds.resolution,
                    start=start,
                    start_mode=target.from_image_mode,
                    mask=files[batch.mask] if batch.mask else None,
                    instruction=captions.instruction,
                    caption_dropout=rate,
                    reference_dropout=batch.reference_dropout,
                    vision_dropout=vision_dropout,
                    vision_min=vision_min,
                    weight=weight / draws / len(lines),
                )
                variants.append(variant)
        return tuple(variant for variant in variants if variant.weight)

    def _references(
        self, sample: str, name: str | None, files: dict[str, Path], draw: int
    ) -> tuple[Reference, ...]:
        """The pictures of a reference_config, those the sample lacks left out."""
        if name is None:
            return ()
        found = []
        for number, item in enumerate(self.ds.reference_configs[name]):
            paths = [files[item.image]] if item.image in files else []
            if item.sample_type == "from_subdir" and paths:
                # KEEP: none of the sample's own; its target would show the answer
                own = set(files.values())
                others = [p for p in self._beside(paths[0], item.suffix) if p not in own]
                if len(others) < item.count:
                    raise ValueError(
                        f"reference_configs.{name}.{number}: wanted {item.count} other pictures "
                        f"beside {paths[0]}, there are {len(others)}"
                    )
                chance = ("from_subdir", self.seed, sample, name, number, draw % item.draws)
                paths = [others[i] for i in shuffled(len(others), *chance)[: item.count]]
            area = item.resize**2 if item.resize else None
            found += [Reference(path, area) for path in paths]
        return tuple(found)

    def _beside(self, path: Path, suffix: str) -> list[Path]:
        """Pictures in the folder of `path` whose stem ends with `suffix`, sorted."""
        if path.parent not in self._siblings:
            with os.scandir(path.parent) as entries:
                names = sorted(e.name for e in entries if e.is_file())
            pictures = [n for n in names if n.lower().endswith(IMAGE_SUFFIXES)]
            self._siblings[path.parent] = [path.parent / name for name in pictures]
        return [file for file in self._siblings[path.parent] if file.stem.endswith(suffix)]


def batch_weights(configs: Sequence[BatchConfig]) -> list[float]:
    """Chance of each combination: given weights, the rest shared equally; they sum to 1."""
    given = sum(config.weight or 0 for config in configs)
    without = sum(config.weight is None for config in configs)
    share = max(0.0, round((1 - given) / without, 9)) if without else 0.0
    weights = [share if config.weight is None else config.weight for config in configs]
    return [weight / sum(weights) for weight in weights]


def scan_dataset(config: Config, ds: DatasetConfig) -> Found:
    """The rows of a data set, whatever its layout."""
    root = ds.train_data_dir
    if not root.is_dir():
        return Found({}, [], [f"train_data_dir: folder {root} does not exist"])
    if ds.hf_dataset:
        return read_hub_dataset(ds, config.cache.cache_dir)
    if ds.table:
        return read_records(ds, root)
    return (group_by_folder if ds.target_dir else group_by_suffix)(ds, root)


def find_dataset(config: Config, number: int) -> tuple[list[Sample], list[str], list[str]]:
    """Samples, problems and skipped samples of one data set."""
    ds = config.data.dataset_configs[number]
    where = f"data.dataset_configs.{number}"
    if problems := check_names(ds, where):
        return [], problems, []
    rows, needed, problems = scan_dataset(config, ds)
    if problems:
        return [], [f"{where}: {p}" for p in problems], []
    maker, variants, broken = VariantMaker(config, ds), {}, []
    for name in sorted(rows):
        files = rows[name].files
        if not any(role in files for role in needed):  # only pictures that nothing uses
            if "mask" in files and not ds.image_configs:
                broken.append(f"{where}: mask {files['mask']} has no target of its name")
            continue
        lacking = [role for role in needed if role not in files]
        if lacking and not (ds.on_missing == "allow_fewer" and only_references(ds, lacking, files)):
            places = (f"{role} ({expected(ds, role, name)})" for role in lacking)
            broken.append(f"{where}: sample '{name}' lacks its {' and '.join(places)}")
            continue
        try:
            variants[name] = maker.make(name, rows[name])
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
        problems.append(f"{where}: no sample to train on in {ds.hf_dataset or ds.train_data_dir}")
    return samples, problems, skipped


def expected(ds: DatasetConfig, role: str, name: str) -> str:
    """Where the file of a role is looked for."""
    if ds.image_configs:
        return f"{name}{ds.image_configs[role].suffix}.*"
    folders = {"target": ds.target_dir}
    folders |= {f"reference {i + 1}": folder for i, folder in enumerate(ds.reference_dirs)}
    return f"{folders[role]}/{name}.*"


def only_references(ds: DatasetConfig, lacking: Sequence[str], files: dict[str, Path]) -> bool:
    """Whether only references are lacking, and every combination still has one."""
    if not ds.image_configs:
        there = any(role.startswith("reference") for role in files)
        return there and all(role.startswith("reference") for role in lacking)
    needed = {target.image for targets in ds.target_configs.values() for target in targets}
    needed |= {str(t.from_image) for targets in ds.target_configs.values() for t in targets}
    needed |= {c.image for c in ds.caption_configs.values()} | {
        str(b.mask) for b in ds.batch_configs
    }
    lists = [
        ds.reference_configs[b.reference_config] for b in ds.batch_configs if b.reference_config
    ]
    each = all(any(item.image in files for item in items) for items in lists)
    return each and not needed & set(lacking)


def choose_holdout(config: Config, number: int, names: Sequence[str]) -> set[str]:
    """Samples of a data set that are not trained: named, drawn by the seed, or all."""
    ds = config.data.dataset_configs[number]
    if ds.name in config.validation.eval_dataset_id:
        return set(names)
    by_chance = sorted(names, key=lambda name: uniform("holdout", config.seed, ds.name, name))
    return {*ds.holdout, *by_chance[: round(ds.holdout_ratio * len(names))]}


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
        {path for sample in samples for variant in sample.variants for path in variant.files()}
    )


def check_masks(config: Config, samples: Sequence[Sample]) -> list[str]:
    """loss.mask: file needs masks; says how many samples have one."""
    if config.loss.region != "file" or not samples:
        return []
    masked = sum(any(v.mask for v in sample.variants) for sample in samples)
    if not masked:
        return ["loss.mask: file, but no sample has a mask (see docs/data.md)"]
    log.info("masks: %d of %d samples have one", masked, len(samples))
    return []


def check_shapes(config: Config, samples: Iterable[Sample], index: FileIndex) -> list[str]:
    """Pictures that must lie on their target's pixels, but have another aspect."""
    problems = []
    for sample in samples:
        ds = config.data.dataset_configs[sample.dataset]
        strict = ds.conditioning_type == "reference_strict"
        for variant in sample.variants:
            aligned = {}
            if config.loss.region == "file" and variant.mask:
                aligned[variant.mask] = "a mask"
            if config.loss.region == "difference" and variant.references and not sample.held_out:
                aligned[variant.references[0].path] = "loss.mask: difference"
            if strict:
                why = "conditioning_type: reference_strict (reference_loose takes other frames)"
                aligned |= {reference.path: why for reference in variant.references}
            aspect = index.aspect(variant.target)
            for path, why in aligned.items():
                if not aligns(index.aspect(path), aspect):
                    problems.append(
                        f"data.dataset_configs.{sample.dataset}: {path} has aspect "
                        f"{index.aspect(path):.3f}, its target {aspect:.3f}; one frame is wanted "
                        f"by {why}"
                    )
    return list(dict.fromkeys(problems))


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
    if samples and all(sample.held_out for sample in samples):
        groups.append(["data.dataset_configs: every sample is held out, none is left to train on"])
    unreadable = check_pictures(all_pictures(samples) + validation_pictures(config), index)
    groups += [unreadable, [] if unreadable else check_shapes(config, samples, index)]
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


PUBLISHED = {  # so that a plan and an audit need no network
    "Qwen/Qwen-Image-Edit": Flavour("edit-v1", "QwenImageEditPipeline", None),
    "Qwen/Qwen-Image-Edit-2509": Flavour("edit-v2", "QwenImageEditPlusPipeline", VISION_AREA),
    "Qwen/Qwen-Image-Edit-2511": Flavour("edit-v3", "QwenImageEditPlusPipeline", VISION_AREA),
}


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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"no folder {repository}, and not on the Hub: {reason}") from error


def fetch_checkpoint(name: str, *patterns: str) -> Path:
    """Folder of a Hub repository, as far as the patterns go (none: all of it). Raises UserError."""
    from huggingface_hub import snapshot_download

    wanted = ["model_index.json", *patterns] if patterns else None
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # network, rights, disk: the hub library has many classes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} cannot be fetched from the Hub: {reason}") from error


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


def check_parts(folder: Path) -> list[str]:
    """Components that a checkpoint folder lacks, e.g. after a download that broke off."""
    parts = ("scheduler", "tokenizer", "processor", "text_encoder", "vae", "transformer")
    lacking = [part for part in parts if not (folder / part).is_dir()]
    problem = f"model.pretrained_model_name_or_path: {folder} has no {', '.join(lacking)} folder"
    return [problem] if folder.is_dir() and lacking else []


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


def validation_pictures(config: Config) -> list[Path]:
    """The picture files of validation.samples, once, sorted; none when nothing is validated."""
    samples = config.validation.samples if config.validation.steps else []
    return sorted({path for sample in samples for path in sample.images})


def check_validation(
    config: Config, flavour: Flavour | None, samples: Sequence[Sample]
) -> list[str]:
    """Problems of the validation settings (pictures: check_pictures)."""
    settings, problems = config.validation, []
    something = settings.samples or any(sample.held_out for sample in samples)
    if settings.steps and samples and not something:
        problems.append(
            "validation.steps is set, but no data set names samples in holdout (or holdout_ratio, "
            "or eval_dataset_id), and validation.samples is empty"
        )
    if flavour and flavour.name == "edit-v1":
        numbers = (i for i, sample in enumerate(settings.samples) if len(sample.images) > 1)
        problems += [f"validation.samples.{i}.images: 2508 takes one reference" for i in numbers]
    return problems


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
    else:
        problems += check_parts(Path(config.model.pretrained_model_name_or_path))
    try:
        config.logging.output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=config.logging.output_dir):
            pass
    except OSError as error:
        problems.append(f"logging.output_dir: cannot write there: {error}")
    try:
        samples, wrong = find_samples(config, open_index(config))
    except UserError as error:
        return [*problems, str(error)]
    problems += wrong + check_masks(config, samples)
    if flavour and flavour.name == "edit-v1":
        problems += check_2508(samples)
    names = [ds.name for ds in config.data.dataset_configs]
    for name in config.validation.eval_dataset_id:
        if names.count(name) > 1:
            problems.append(f"validation.eval_dataset_id: several data sets are '{name}'; set id")
        if name not in names:
            problems.append(
                f"validation.eval_dataset_id: no data set '{name}'{nearest(name, names)}"
            )
    problems += check_validation(config, flavour, samples)
    return problems


def check_2508(samples: Sequence[Sample]) -> list[str]:
    """What 2508 cannot do: its prompt has a place for exactly one picture."""
    problems = []
    first = {sample.dataset: sample for sample in reversed(samples)}
    for number, sample in sorted(first.items()):
        where = f"data.dataset_configs.{number}"
        if any(len(v.references) != 1 or v.reference_dropout for v in sample.variants):
            problems.append(f"{where}: 2508 takes one reference; 2509 and 2511 take more")
        for variant in sample.variants:
            same = [r.path for r in variant.vision] == [r.path for r in variant.references]
            fewer = variant.vision_dropout and variant.vision_min < 1
            if not same or fewer or any(r.area for r in (*variant.vision, *variant.references)):
                problems.append(
                    f"{where}: 2508 shows its encoder the picture that the VAE gets; leave out "
                    "every resize of references and the dropout, and use the same references"
                )
                break
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
    references: int | None = None  # so many stay, from the first on; None: all
    vision: tuple[int, ...] | None = None  # which vision references stay; None: all
    dropped: bool = False  # train without the instruction


class Region(NamedTuple):
    """Where the loss counts more, at the size of the target."""

    mask: Picture | None  # white there
    change: tuple[Picture, Picture] | None = None  # or where these two differ

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """What it is made of."""
        return (self.mask,) if self.mask else self.change or ()


class Example(NamedTuple):
    """What a Draw resolves to."""

    name: str
    target: Picture
    references: tuple[Picture, ...]
    vision: tuple[Picture, ...]
    caption: str
    instruction: str | None = None
    start: Picture | None = None
    region: Region | None = None


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


@functools.lru_cache
def table_buckets(resolution: int) -> list[tuple[int, int]]:
    """The shapes of TABLES (W, H), upright and lying."""
    sizes = [tuple(map(int, size.split("x"))) for size in TABLES[resolution].split()]
    return sorted({(w, h) for a, b in sizes for w, h in ((a, b), (b, a))})


@functools.lru_cache(maxsize=4096)
def nearest_bucket(
    width: int,
    height: int,
    resolution: int,
    sizes: Callable[[int], list[tuple[int, int]]] = buckets,
) -> tuple[int, int]:
    """The bucket of nearest log aspect; among equals the one of nearest area."""
    aspect, area = math.log(width / height), resolution**2

    def distance(size: tuple[int, int]) -> tuple[float, float]:
        w, h = size
        return round(abs(aspect - math.log(w / h)), 9), abs(math.log(w * h / area))

    return min(sizes(resolution), key=distance)


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


def picture_of(image: Image.Image, area_px: float) -> Picture:
    """A picture in memory, whole, resized to about that area."""
    content = f"{draw_key(image.size, image.tobytes()):016x}"
    return Picture(image, content, pick_size(area_px, image.width / image.height))


def opened(example: Example) -> Example:
    """The same example with its pictures loaded, so that worker processes do it."""

    def ready(picture: Picture) -> Picture:
        return Picture(load_picture(picture), picture.content, picture.size)

    references, vision = (tuple(map(ready, p)) for p in (example.references, example.vision))
    return example._replace(
        target=ready(example.target),
        references=references,
        vision=vision,
        start=ready(example.start) if example.start else None,
    )


def aligns(aspect: float, other: float) -> bool:
    """Whether two pictures of these aspects are taken as showing the same frame."""
    return abs(math.log(aspect / other)) < ASPECT_TOLERANCE


class Frame(NamedTuple):
    """The ONE geometric transform of a visit: crop and flip of the target's frame."""

    aspect: float  # of the whole target picture
    size: tuple[int, int]  # (W, H) px of the target
    box: tuple[float, float, float, float]
    flip: bool


def choose_frame(
    ds: DatasetConfig, seed: int, draw: Draw, sample: Sample, index: FileIndex
) -> Frame:
    """Bucket and crop of a visit; view 0 is the whole picture."""
    variant = sample.variants[draw.variant]
    fact = index.known(variant.target)
    aspect = fact["width"] / fact["height"]
    table = ds.buckets == "table" and variant.resolution in TABLES
    sizes = table_buckets if table else buckets
    size = nearest_bucket(fact["width"], fact["height"], variant.resolution, sizes)
    box, flip = cover_box(aspect, size[0] / size[1]), False
    if draw.view:  # EDIT HERE: augmentation (each view is cached)
        chance = ("view", seed, sample.dataset, sample.name, draw.view)
        scale = 1 - (1 - ds.view_scale) * uniform("scale", *chance)
        x, y = uniform("x", *chance), uniform("y", *chance)
        box = cover_box(aspect, size[0] / size[1], scale, x, y)
        flip = ds.view_flip and uniform("flip", *chance) < 0.5
    return Frame(aspect, size, box, flip)


def resolve(
    config: Config, flavour: Flavour, samples: Sequence[Sample], draw: Draw, index: FileIndex
) -> Example:
    """Draw -> pictures with ONE geometric transform for the target and all that lies on it."""
    sample = samples[draw.sample]
    variant = sample.variants[draw.variant]
    ds = config.data.dataset_configs[sample.dataset]
    frame = choose_frame(ds, config.seed, draw, sample, index)
    size, wanted = frame.size, frame.size[0] / frame.size[1]

    def on_target(path: Path) -> Picture:
        """At the target's size: with its crop, or the middle of another frame."""
        same = aligns(index.aspect(path), frame.aspect)
        box = frame.box if same else cover_box(index.aspect(path), wanted)
        return Picture(path, index.content(path), size, box, frame.flip and same)

    def shown(reference: Reference, area_px: float) -> Picture:
        own, area_px = index.aspect(reference.path), float(reference.area or area_px)
        content = index.content(reference.path)
        # KEEP: aligned references get the target's crop, or the edit no longer lies on its pixels
        if ds.conditioning_type != "reference_loose" and aligns(own, frame.aspect):
            size = pick_size(area_px, wanted)
            return Picture(reference.path, content, size, frame.box, frame.flip)
        return Picture(reference.path, content, pick_size(area_px, own))

    area_px = reference_area_px(config.data.reference_area, size)
    vision_area = float(flavour.vision_area or area_px)
    stay = range(len(variant.vision)) if draw.vision is None else draw.vision
    target, region = on_target(variant.target), None
    if config.loss.region == "file" and variant.mask:
        region = Region(on_target(variant.mask))
    elif config.loss.region == "difference" and variant.references:
        region = Region(None, (on_target(variant.references[0].path), target))
    without_text = draw.dropped and config.data.caption_dropout_mode == "empty"
    return Example(
        name=sample.name,
        target=target,
        references=tuple(shown(r, area_px) for r in variant.references[: draw.references]),
        vision=tuple(shown(variant.vision[i], vision_area) for i in stay),
        caption="" if without_text else variant.caption,
        instruction=variant.instruction,
        start=on_target(variant.start) if variant.start else None,
        region=region,
    )


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


def region_map(region: Region) -> torch.Tensor:
    """Region -> (1, h, w) fp32 in [0, 1] per latent: mean of the mask, or mean |change|."""
    images = [np.asarray(load_picture(p), np.float32) / 255 for p in region.pictures]
    level = images[0] if len(images) == 1 else np.abs(images[1] - images[0])
    level = level.mean(-1)  # (H, W)
    h, w = level.shape[0] // 8, level.shape[1] // 8
    return torch.from_numpy(level).view(1, h, 8, w, 8).mean((2, 4))


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


@contextlib.contextmanager
def system_instruction(pipe: Any, instruction: str | None) -> Iterator[None]:
    """Let a pipeline's prompt template begin with another system instruction; None: its own."""
    template, start = pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx
    turn = "<|im_start|>user\n"
    if instruction:
        head = f"<|im_start|>system\n{instruction}<|im_end|>\n{turn}"
        # KEEP: all tokens before the user's turn are dropped from the embedding, as in the original
        pipe.prompt_template_encode_start_idx = len(pipe.tokenizer(head).input_ids)
        escaped = head.replace("{", "{{").replace("}", "}}")
        pipe.prompt_template_encode = escaped + template.split(turn, 1)[1]
    try:
        yield
    finally:
        pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = template, start


@torch.no_grad()
def encode_prompt_qwen(
    pipe: Any,
    caption: str,
    images: Sequence[Image.Image],
    device: torch.device,
    instruction: str | None = None,
) -> torch.Tensor:
    """Instruction and pictures -> embedding (T, D), through the pipeline's own template."""
    # 2508's template has one picture slot; the Plus template numbers a list
    single = type(pipe).__name__ == "QwenImageEditPipeline"
    shown = (images[0] if single else list(images)) if images else None
    with system_instruction(pipe, instruction):
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
        text = [example.instruction, example.caption] if example.instruction else example.caption
        return cache_key("prompt", encoder=self.text, caption=text, pictures=pictures)

    @staticmethod
    def region(region: Region) -> str:
        """Entry with `region` (1, h, w)."""
        return cache_key("region", pictures=[picture_id(p) for p in region.pictures])

    def of(self, what: Picture | Example | Region) -> str:
        """The entry of a picture's latents, an example's prompt or a region."""
        if isinstance(what, Picture):
            return self.latent(what)
        return self.prompt(what) if isinstance(what, Example) else self.region(what)


def template_text(pipeline_class: str) -> str:
    """The lines of the pipeline's source that hold its prompt template, without importing it."""
    spec = importlib.util.find_spec("diffusers")
    assert spec and spec.origin, "diffusers is in requirements.txt"
    name = "pipeline_qwenimage_edit" + ("_plus" if "Plus" in pipeline_class else "")
    file = Path(spec.origin).parent / "pipelines" / "qwenimage" / f"{name}.py"
    return "".join(line for line in file.open(encoding="utf-8") if "prompt_template" in line)


def fingerprint(folders: Sequence[Path], *extra: str) -> str:
    """Hash of a component: small files whole, weights by size and 64 KB of every 4 MB.

    KEEP every 4 MB: a LoRA merged into some layers leaves the other layers and the header alone.
    """
    parts: list[Any] = list(extra)
    for file in sorted(f for folder in folders if folder.is_dir() for f in folder.rglob("*")):
        if not file.is_file() or file.name.startswith("."):
            continue
        size = file.stat().st_size
        if size < 2**20:
            parts.append([file.name, hash_file(file)])
            continue
        with file.open("rb") as stream:
            for place in (*range(0, size - 2**16, 2**22), size - 2**16):
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
QUANTO_EXTENSIONS = ("quanto_cpp", "quanto_cuda", "quanto_hip", "quanto_mps")
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
    return [f"base_model_precision: {precision} needs {name}: pip install {name}"]


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
        n_blocks = transformer_settings(model.pretrained_model_name_or_path).get("num_layers", 60)
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

    for name in filter(quanto.is_extension_available, QUANTO_EXTENSIONS):
        extension = quanto.get_extension(name)
        extension._lib = extension._lib or SimpleNamespace(unpack=unpack_bits)
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

    layer = Linear4bit(
        linear.in_features,
        linear.out_features,
        compute_dtype=linear.weight.dtype,
        compress_statistics=False,
        quant_type="nf4",
        device="meta",
    )
    # KEEP: some CPUs would repack the weights in eval mode, and nothing could train after that
    layer.support_avx512bf16_for_cpu = False
    return layer


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
    layer.compute_dtype = layer.bias.dtype  # KEEP: not that of the empty `linear`
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


def check_start(path: Path, lora: LoraConfig, transformer: Any) -> None:
    """Raises UserError unless the file has the method, rank and layers of the adapter there."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            about = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
            factors = [name for name in names if ".lora_A." in name]
            ranks = {file.get_slice(name).get_shape()[0] for name in factors}
            shapes = {
                n.removeprefix("transformer."): tuple(file.get_slice(n).get_shape()) for n in names
            }
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
    if shapes != {name: tuple(t.shape) for name, t in lora_tensors(transformer).items()}:
        raise UserError(f"{path}: other layers than model.lora asks for")


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
    """A noise level in (0, 1) before the shift; belongs to the parts.

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
    velocity: torch.Tensor,
    target_velocity: torch.Tensor,
    weight: torch.Tensor | None,
    loss: LossConfig,
) -> torch.Tensor:  # EDIT HERE: the objective
    """Rectified flow: mean of (velocity - target)^2 over elements, fp32, (B,).

    weight: None or (B, 1, 1, h, w), e.g. of an edit mask; the mean is divided by its sum, so that
    the loss keeps its scale.
    """
    return weighted_mean((velocity.float() - target_velocity.float()).square(), weight)


def huber_loss(
    velocity: torch.Tensor,
    target_velocity: torch.Tensor,
    weight: torch.Tensor | None,
    loss: LossConfig,
) -> torch.Tensor:
    """Pseudo-Huber, 2c (sqrt(error^2 + c^2) - c): squares below c, 2c |error| above. See flow_loss.

    Source: Khrapov et al. 2024, "Improving Diffusion Models's Data-Corruption Resistance".
    """
    error, c = velocity.float() - target_velocity.float(), loss.huber_c
    return weighted_mean(2 * c * ((error.square() + c * c).sqrt() - c), weight)


def weighted_mean(error: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Mean over all but the first axis: sum(weight error) / sum(weight)."""
    if weight is None:
        return error.flatten(1).mean(1)
    weight = weight.expand_as(error).flatten(1)
    # KEEP the minimum: a weight of 0 and an empty mask leave nothing to learn, not a NaN
    return (weight * error.flatten(1)).sum(1) / weight.sum(1).clamp(min=1e-6)


LOSSES: dict[str, Callable[..., torch.Tensor]] = {"mse": flow_loss, "huber": huber_loss}

MIN_SIGMA = 0.02  # below, (x - x0) / sigma would blow up what little is left to predict


def velocity_to(x0: torch.Tensor, noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """(x - x0) / sigma: the velocity that leads from any x straight to x0; sigma (B,)."""
    sigma = sigma.view(-1, *[1] * (x0.dim() - 1))
    return (noisy.float() - x0) / sigma.clamp(min=MIN_SIGMA)


@torch.no_grad()
def roll_out(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x0: torch.Tensor,
    noise: torch.Tensor,
    sigma: torch.Tensor,
    steps: int,
    span: float,
) -> torch.Tensor:
    """Scheduled sampling: what the model itself makes of x0 on its way down to sigma.

    Starts at sigma + steps x span (at most 1) with the true noise and takes `steps` Euler steps
    with predict(x, sigma (B,)). x0, noise, result (B, 16, 1, h, w) fp32.
    """
    start = (sigma + steps * span).clamp(max=1.0)
    x = add_noise(x0, noise, start)
    for number in range(steps):
        levels = [torch.lerp(start, sigma, (number + i) / steps) for i in (0, 1)]
        distance = (levels[1] - levels[0]).view(-1, *[1] * (x0.dim() - 1))
        x = x + distance * predict(x, levels[0]).float()
    return x


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


class Edit(NamedTuple):
    """One row of the validation sheet."""

    example: Example  # target.size is drawn; without a target the main reference stands for it
    settings: ValidationConfig  # with what a validation sample says itself
    has_target: bool

    @property
    def negative(self) -> Example | None:
        """The same pictures with the negative prompt; None: no guidance."""
        if self.settings.true_cfg_scale <= 1:
            return None
        return self.example._replace(caption=self.settings.negative_prompt)


def at_resolution(samples: Sequence[Sample], side_px: int) -> list[Sample]:
    """The same samples with targets of another resolution: all sizes follow their rules."""
    return [
        sample._replace(variants=tuple(v._replace(resolution=side_px) for v in sample.variants))
        for sample in samples
    ]


# two in each quarter: fixed noise levels of the validation loss
VALIDATION_SIGMAS = tuple((i + 0.5) / 8 for i in range(8))


class Rung(NamedTuple):
    """A way to draw a validation picture with less memory than the one before."""

    area: float  # share of the area of the picture and of its references
    tiled: bool  # decode in tiles of 256 px
    note: str


# Guidance is no rung: denoise() makes its two passes one after the other anyway.
RUNGS = (
    Rung(1.0, False, ""),
    Rung(1.0, True, "VAE in tiles"),
    Rung(0.5, True, "half the area"),
    Rung(0.25, True, "a quarter of the area"),
)


def shrunk(example: Example, area: float) -> Example:
    """The example with that share of its pictures' area; the embedding stays, it is cached."""

    def small(picture: Picture) -> Picture:
        width, height = picture.size
        return picture._replace(size=pick_size(width * height * area, width / height))

    if area == 1:  # KEEP: sizes that are no multiple of 32 stay too
        return example
    references = tuple(small(picture) for picture in example.references)
    return example._replace(target=small(example.target), references=references)


@contextlib.contextmanager
def tiled_decoding(vae: Any, on: bool) -> Iterator[None]:
    """Inside, the VAE works in overlapping tiles of 256 px; never outside."""
    if on:
        vae.enable_tiling()
    try:
        yield
    finally:  # KEEP: without a cache the same VAE encodes what is trained
        vae.disable_tiling()


@contextlib.contextmanager
def without_adapter(transformer: Any) -> Iterator[None]:
    """Inside, the transformer is the base model."""
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()


def shorten(text: str, font: Any, width_px: float) -> str:
    """`text` on one line, cut with an ellipsis where it would be wider than that."""
    text = " ".join(text.split())
    if font.getlength(text) <= width_px:
        return text
    places = range(1, len(text))
    end = bisect.bisect_right(places, width_px, key=lambda n: font.getlength(text[:n] + "…"))
    return text[:end].rstrip() + "…"


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    heads: Sequence[str] = (),
    captions: Sequence[str] = (),
    cell_px: int = 256,
) -> Image.Image:
    """Pictures in rows on white, each fitted into a cell; heads above, a caption under each row.

    None leaves a cell empty; what is too long is cut with an ellipsis.
    """
    font = ImageFont.load_default(size=15)
    gap, line = 8, 24
    fitted = [[i and ImageOps.contain(i, (cell_px, cell_px)) for i in row] for row in rows]
    below = gap + (line if captions else 0)
    heights = [max((i.height for i in row if i), default=0) + below for row in fitted]
    width = max(len(row) for row in rows) * (cell_px + gap) + gap
    top = line if heads else gap
    sheet = Image.new("RGB", (width, top + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for x, head in enumerate(heads):
        draw.text((gap + x * (cell_px + gap), 3), shorten(head, font, cell_px), "black", font)
    for y, row in enumerate(fitted):
        for x, image in enumerate(row):
            if image:
                sheet.paste(image, (gap + x * (cell_px + gap), top))
        top += heights[y]
        if captions:
            text = shorten(captions[y], font, width - 2 * gap)
            draw.text((gap, top - below + 3), text, "dimgray", font)
    return sheet


def edit_sheet(
    references: Sequence[Sequence[Image.Image]],
    results: Sequence[Sequence[Image.Image | None]],
    heads: Sequence[str],
    captions: Sequence[str],
) -> Image.Image:
    """References of each row, however many it has | its results, under `heads`."""
    most = max(map(len, references))
    rows = [
        [*shown, *[None] * (most - len(shown)), *row]
        for shown, row in zip(references, results, strict=True)
    ]
    return contact_sheet(rows, [f"reference {i + 1}" for i in range(most)] + [*heads], captions)


# --- 7. checkpoints -------------------------------------------------------------------------------

FREE_TO_CHANGE = {  # settings that may differ between a checkpoint and the run that continues it
    "max_train_steps", "num_epochs", "checkpointing_steps", "checkpoints_total_limit",
    "resume_from_checkpoint", "gradient_checkpointing", "gradient_accumulation_steps",
    "batch_size", "max_tokens_per_batch", "num_workers", "train_data_dir",
    "recreate_cache", "recreate_cache_target", "recreate_cache_reference", "recreate_cache_caption",
    "devices", "blocks_to_swap", "quantize_via", "ema_device",
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
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # cut off, overwritten
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
    if not list_checkpoints(output_dir) and not (output_dir / "metrics.jsonl").exists():
        return
    numbers = (n for n in itertools.count(1) if not (output_dir / f"earlier-{n}").exists())
    place = output_dir / f"earlier-{next(numbers)}"
    place.mkdir()
    for old in (
        *list_checkpoints(output_dir),
        output_dir / "samples",
        output_dir / "metrics.jsonl",
        output_dir / "report.html",
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
        raise UserError(
            f"{found[0]} was trained with other settings; set them back, or start anew without "
            f"train.resume_from_checkpoint\n{listed(lines)}"
        )
    return found


# --- 8. batches and loop --------------------------------------------------------------------------


Shape = tuple[tuple[int, int], ...]  # (W, H) px of the target and of each reference


def image_tokens(shape: Shape) -> int:
    """Tokens of the target and its references: one per 16 x 16 px."""
    return sum(width // 16 * (height // 16) for width, height in shape)


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
        shape_of: Callable[[Draw], Shape],
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
            references=keep_first(variant, seed, visit),
            vision=keep_references(variant, seed, visit),
            dropped=uniform(seed, "caption_dropout", visit) < variant.caption_dropout,
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
        """Cut into runs of one shape, at most batch_size and max_tokens_per_batch each."""
        batches: list[list[Draw]] = []
        for draw in draws:
            shape = self.shape_of(draw)
            last = next((b for b in batches if self.shape_of(b[0]) == shape), None)
            if last is None or len(last) == self.room(shape):
                batches.insert(0, [draw])
            else:
                last.append(draw)
        return batches[::-1]

    def room(self, shape: Shape) -> int:
        """Samples of a shape that fit into one forward pass."""
        data = self.config.data
        if data.max_tokens_per_batch is None:
            return data.batch_size
        return max(1, min(data.batch_size, data.max_tokens_per_batch // image_tokens(shape)))

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
            without = variant.caption_dropout > 0 and not sample.held_out
            for view, subset, dropped in itertools.product(
                range(views), subsets, (False, True) if without else (False,)
            ):
                yield Draw(0, number, which, view, None, subset, dropped)


class PairDataset(torch.utils.data.Dataset):
    """Micro-batches (lists of Draws) -> batches: cached tensors, or pictures to be encoded."""

    def __init__(self, trainer: QwenImageEditTrainer, cached: bool) -> None:
        self.config, self.samples = trainer.config, trainer.samples
        self.index, self.keys, self.flavour = trainer.index, trainer.keys, trainer.flavour
        self.cached = cached
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
        known = [self.resolved(draw) for draw in draws]
        seed, loss = self.config.seed, self.config.loss
        batch: dict[str, Any] = (
            collate([read_entries(paths, self.read) for _, paths in known])
            if self.cached
            else {"examples": [opened(example) for example, _ in known]}
        )
        width, height = known[0][0].target.size
        shape = (16, 1, height // 8, width // 8)
        batch |= {
            "noise": torch.stack([normal(shape, seed, "noise", d.visit) for d in draws]),
            "sigma": torch.tensor([sample_sigma(loss, seed, "sigma", d.visit) for d in draws]),
            "names": [example.name for example, _ in known],
        }
        samples = [self.samples[draw.sample] for draw in draws]
        weights = [self.config.data.dataset_configs[s.dataset].loss_weight for s in samples]
        if any(weight != 1 for weight in weights):
            batch["loss_weight"] = torch.tensor(weights)
        modes = [s.variants[d.variant].start_mode for s, d in zip(samples, draws, strict=True)]
        if "consistent" in modes:
            batch["consistent"] = torch.tensor([mode == "consistent" for mode in modes])
        if self.config.data.caption_dropout_mode == "zero" and any(d.dropped for d in draws):
            batch["zeroed"] = torch.tensor([draw.dropped for draw in draws])
        if loss.rollout_steps:
            # KEEP: numbers, not a tensor; to look at one on the GPU would wait for it
            chances = [uniform(seed, "rollout", draw.visit) for draw in draws]
            batch["rollout_chance"] = chances
        return batch

    def read(self, path: Path) -> torch.Tensor:
        """The tensor of a cache entry, from memory once there was room for it."""
        if path in self._held:
            return self._held[path]
        tensor = read_tensor(path)
        size = tensor.numel() * tensor.element_size()
        if size <= self._room:
            self._room -= size
            self._held[path] = tensor
        return tensor

    def resolved(self, draw: Draw) -> tuple[Example, dict[str, list[Path]]]:
        """The example of a draw and its cache entries by kind; remembered."""
        draw = draw._replace(visit=0)
        if draw not in self._known:
            e = resolve(self.config, self.flavour, self.samples, draw, self.index)
            what: dict[str, Sequence[Picture | Example | Region | None]] = {
                "pixel_latent": [e.target],
                "control_latent": e.references,
                "prompt_embed": [e],
                "start_latent": [e.start],
                "region": [e.region],
            }
            folder = self.config.cache.cache_dir
            paths = {
                kind: [entry_path(folder, self.keys.of(w)) for w in parts if w is not None]
                for kind, parts in what.items()
                if self.cached
            }
            self._known[draw] = e, paths
        return self._known[draw]


def read_tensor(path: Path) -> torch.Tensor:
    """The one tensor of a cache entry. Raises ValueError."""
    return next(iter(read_entry(path).values()))


def read_entries(
    paths: dict[str, list[Path]], read: Callable[[Path], torch.Tensor] = read_tensor
) -> dict[str, Any]:
    """Cache entries by kind -> item of a batch. Raises ValueError."""
    tensors = {kind: [read(path) for path in files] for kind, files in paths.items()}
    references = tensors.pop("control_latent")
    single = {kind: found[0] for kind, found in tensors.items() if found}
    return single | {"control_latent": references}


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Items of one shape -> a batch: text padded with zeros, its mask None if nothing is padded.

    pixel_latent (B, 16, 1, h, w); control_latent K x (B, 16, 1, hk, wk); prompt_embed (B, T, D);
    prompt_embeds_mask (B, T) bool or None. Only where a sample has one: start_latent (the target
    where there is none), region (B, 1, 1, h, w) (negative where there is none).
    """
    lengths = torch.tensor([len(item["prompt_embed"]) for item in items])
    embeds = [item["prompt_embed"] for item in items]
    padded = bool((lengths != lengths[0]).any())
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]  # (B, T)
    batch = {
        "pixel_latent": torch.stack([item["pixel_latent"] for item in items]),
        "control_latent": [
            torch.stack(k) for k in zip(*(i["control_latent"] for i in items), strict=True)
        ],
        "prompt_embed": torch.nn.utils.rnn.pad_sequence(embeds, batch_first=True),
        "prompt_embeds_mask": mask if padded else None,
    }
    if any("start_latent" in item for item in items):
        starts = [item.get("start_latent", item["pixel_latent"]) for item in items]
        batch["start_latent"] = torch.stack(starts)
    if any("region" in item for item in items):
        h, w = items[0]["pixel_latent"].shape[-2:]
        none = torch.full((1, h, w), -1.0)
        batch["region"] = torch.stack([item.get("region", none) for item in items])[:, :, None]
    return batch


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


# EDIT HERE: short name -> class, its arguments where init_args says nothing
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("torch.optim.AdamW", {"lr": 1e-4}),
    "adamw8bit": ("bitsandbytes.optim.AdamW8bit", {"lr": 1e-4}),
    # its lr is the largest step relative to a weight's own size, so 1e-4 would stand still
    "adafactor": ("torch.optim.Adafactor", {"lr": 1e-2}),
    "prodigy": (
        "prodigyopt.Prodigy",  # what its authors recommend for diffusion models
        {"lr": 1.0, "safeguard_warmup": True, "use_bias_correction": True, "weight_decay": 0.01},
    ),
    "schedulefree": ("schedulefree.AdamWScheduleFree", {"lr": 1e-4}),
}


def import_class(path: str) -> Any:
    """The class behind a dotted path. Raises UserError with what to install."""
    module, _, name = path.rpartition(".")
    if not module:
        raise UserError(f"optimizer.class_path: no '{path}'{nearest(path, OPTIMIZERS)}")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, ValueError) as error:
        package = module.split(".")[0]
        raise UserError(f"optimizer.class_path {path}: {error}; pip install {package}?") from error
    except AttributeError as error:
        raise UserError(f"optimizer.class_path: {module} has no {name}") from error


def stopwatch(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Start a clock; calling the result stops it and gives a function that reads the seconds.

    On a GPU it measures the GPU's own time and waits for it only when it is read.
    """
    if device.type != "cuda":
        begin = time.perf_counter()

        def stop() -> Callable[[], float]:
            seconds = time.perf_counter() - begin
            return lambda: seconds

        return stop
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()

    def record() -> Callable[[], float]:
        last.record()
        return lambda: first.elapsed_time(last) / 1000

    return record


def make_optimizer(settings: OptimizerConfig, parameters: Iterable[torch.nn.Parameter]) -> Any:
    """What the config names. Raises UserError: no such class, or arguments it does not take."""
    kinds = (kind for name, kind in OPTIMIZERS.items() if settings.class_path in (name, kind[0]))
    path, args = next(kinds, (settings.class_path, {}))
    args = args | settings.init_args
    optimizer_class = import_class(path)
    try:
        return optimizer_class(parameters, **args)
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer {path} with {args}: {error}") from error


def make_schedule(settings: LrSchedulerConfig, optimizer: Any, steps: int) -> Any:
    """The learning rate schedule over `steps` optimizer steps. Raises ValueError."""
    from diffusers.optimization import get_cosine_schedule_with_warmup, get_scheduler

    name, cycles = settings.scheduler_type, settings.num_cycles
    warmup = settings.warmup_steps
    steps = max(steps, warmup + 1)  # KEEP: polynomial divides by steps - warmup
    if name == "cosine":  # KEEP: get_scheduler() would drop num_cycles
        return get_cosine_schedule_with_warmup(optimizer, warmup, steps, cycles)
    return get_scheduler(
        "constant_with_warmup" if name == "constant" else name,
        optimizer,
        step_rules=settings.step_rules,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        num_cycles=max(1, round(cycles)),
        power=settings.power,
    )


def effective_lr(optimizer: Any) -> float:
    """The rate a step is made with: Prodigy's is its lr times the d it has found."""
    group = optimizer.param_groups[0]
    rate = group.get("scheduled_lr", group["lr"])  # schedule-free has a warm-up of its own
    return float(rate * group["d"] if "d0" in group else rate)  # d without d0: Adafactor's clipping


def check_optimizer(optimizer: Any, config: Config) -> list[str]:
    """Problems of an optimizer beside the other settings; warns of what is merely unusual."""
    problems, group = [], optimizer.param_groups[0]
    name, shape = config.optimizer.class_path, config.lr_scheduler.scheduler_type
    averages = hasattr(optimizer, "eval")
    if averages and config.train.use_ema:
        problems.append(f"train.use_ema: {name} averages by itself; leave one of the two out")
    if averages and not shape.startswith("constant"):
        log.warning("%s needs no schedule; lr_scheduler.scheduler_type is %s", name, shape)
    if "d0" in group and group["lr"] != 1:
        lr = group["lr"]
        log.warning("%s finds the rate itself: lr is meant to be 1, not %g (see d_coef)", name, lr)
    return problems


class MovingAverage:
    """Exponential moving average of named parameters, fp32 whatever they are trained in."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], train: TrainConfig) -> None:
        self.parameters = parameters
        self.decay, self.interval = train.ema_decay, train.ema_update_interval
        place = torch.device("cpu") if train.ema_device == "cpu" else None
        self.averages = {
            name: p.detach().to(place or p.device, torch.float32, copy=True)
            for name, p in parameters.items()
        }

    def update(self, step: int) -> None:
        """After optimizer step `step`, from 1: average += (1 - d) (weight - average).

        d = min(decay, (1 + step) / (10 + step)) to the power of the interval.
        """
        if step % self.interval:
            return
        averages = list(self.averages.values())
        now = [p.detach().to(a) for p, a in zip(self.parameters.values(), averages, strict=True)]
        decay = min(self.decay, (1 + step) / (10 + step)) ** self.interval
        get_ema_multi_avg_fn(decay)(averages, now, None)  # type: ignore[arg-type]

    @torch.no_grad()
    def write_to_parameters(self) -> None:
        """Put the averages in the weights' place."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.averages[name])

    def load(self, averages: dict[str, torch.Tensor]) -> None:
        """Go on from the averages of a checkpoint."""
        for name, average in self.averages.items():
            average.copy_(averages[name])


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
        self.ema: MovingAverage | None = None
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
        self._base_pictures: dict[tuple[int, int], Image.Image] = {}  # of (row, rung): no LoRA
        self._measured: dict[str, list[Callable[[], float]]] = {}
        self._rungs: dict[int, int] = {}  # row of the validation sheet -> where on the ladder
        self._ask_every = 1  # steps between two questions for a stop signal
        self._drawn = 0  # batches of this step, from a loader of the user's, that got noise here
        self._shapes: dict[tuple[int, int, int | None], Shape] = {}
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
        return fetch_checkpoint(name, *patterns)

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
        self.load_model(["text_encoder"])
        place = torch.device(device or self.device)
        self.qwen_vl.to(place)
        return encode_prompt_qwen(
            self.text_pipeline, example.caption, images, place, example.instruction
        ).cpu()

    def _encode(self, example: Example) -> dict[str, Any]:
        """What read_entries() reads, computed."""
        vae_device = self.config.cache.vae_encoder_device
        item: dict[str, Any] = {
            "pixel_latent": self._latent(example.target, vae_device),
            "control_latent": [self._latent(p, vae_device) for p in example.references],
            "prompt_embed": self._embed(example, self.config.cache.text_encoder_device),
        }
        if example.start:
            item["start_latent"] = self._latent(example.start, vae_device)
        if example.region:
            item["region"] = region_map(example.region)
        return item

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
            area_px = reference_area_px(self.config.data.reference_area, size)
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

    def encoded(
        self, what: Picture | Example | Region, device: torch.device | str | None
    ) -> dict[str, torch.Tensor]:
        """The content of a cache entry: `latent`, `embed` or `region`."""
        if isinstance(what, Picture):
            return {"latent": self._latent(what, device)}
        if isinstance(what, Region):
            return {"region": region_map(what)}
        return {"embed": self._embed(what, device)}

    def _through_cache(
        self, what: Picture | Example, device: torch.device | str | None
    ) -> torch.Tensor:
        """Read the entry of a picture's latents or an example's prompt, or encode and write it."""
        if not self.use_cache:
            return next(iter(self.encoded(what, device).values()))
        path = entry_path(self.cache_dir, self.keys.of(what))
        if path.exists():
            with contextlib.suppress(ValueError):  # damaged: encode it again
                return read_tensor(path)
        write_entry(self.cache_dir, self.keys.of(what), self.encoded(what, device))
        return read_tensor(path)

    def cache_jobs(self, fresh: bool = False) -> dict[str, Picture | Example | Region]:
        """Every entry that training and validation can ask for: {key: what to encode}.

        fresh: only those that the recreate_cache settings name.
        """
        jobs: dict[str, Picture | Example | Region] = {}
        for draw in possible_draws(self.config, self.samples):
            ds = self.config.data.dataset_configs[self.samples[draw.sample].dataset]
            flags = ds.recreate_cache_target, ds.recreate_cache_reference, ds.recreate_cache_caption
            if fresh and not (ds.recreate_cache or any(flags)):
                continue
            e = resolve(self.config, self.flavour, self.samples, draw, self.index)
            targets = [part for part in (e.target, e.start, e.region) if part]
            parts: list[Sequence[Picture | Example | Region]] = [targets, e.references, [e]]
            for again, wanted in zip(flags, parts, strict=True):
                if not fresh or again or ds.recreate_cache:
                    for part in wanted:
                        jobs.setdefault(self.keys.of(part), part)
        return jobs if fresh else jobs | self.validation_jobs()

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
        prompts = [key for key in mine if isinstance(jobs[key], Example)]
        pictures = [key for key in mine if not isinstance(jobs[key], Example)]
        log.info("cache: %d entries, process 0 has %d to encode", len(jobs), len(mine))
        for key in progress(pictures, "encode pictures", disable=not pictures):
            self._keep(key, self.encoded(jobs[key], vae_device))
        self.unload("vae")  # KEEP: the encoders are never in memory together
        self.index.commit()
        for key in progress(prompts, "encode prompts", disable=not prompts):
            self._keep(key, self.encoded(jobs[key], text_device))
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
        self.transformer = self.bare_transformer()  # a second fit() finds it wrapped
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

        check_start(path, self.config.model.lora, self.transformer)
        tensors = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
        tensors = strengthen(tensors, 1 / strength_of(self.transformer))
        set_peft_model_state_dict(self.transformer, tensors)

    def bare_transformer(self) -> Any:
        """The transformer without its distributed wrapper."""
        if self.accelerator and self.transformer is not None:
            return self.accelerator.unwrap_model(self.transformer)
        return self.transformer

    def inference_rules(self) -> dict[str, list[Any]]:
        """How the references and the instruction were shown; inference takes the first of each."""
        variants = [v for s in self.samples for v in s.variants if not s.held_out]
        usual = self.config.data.reference_area, self.flavour.vision_area
        counted: dict[str, Counter[Any]] = {
            "reference_area": Counter(r.area or usual[0] for v in variants for r in v.references),
            "vision_area": Counter(r.area or usual[1] for v in variants for r in v.vision),
            "instruction": Counter(v.instruction for v in variants),
        }
        defaults = dict(zip(counted, (*usual, None), strict=True))
        return {n: [v for v, _ in c.most_common()] or [defaults[n]] for n, c in counted.items()}

    def about_lora(self) -> dict[str, Any]:
        """What generate.py must know to sample as this LoRA was trained."""
        data, rules = self.config.data, self.inference_rules()
        return {
            "base_model": self.config.model.pretrained_model_name_or_path,
            "flavour": self.flavour.name,
            **{name: next(iter(values)) for name, values in rules.items()},
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

    def _quantize_trained(self) -> None:
        """`trainer.quantize = True` after training: the base again, quantised, with the LoRA."""
        if not hasattr(self.transformer, "quantized_to"):
            with tempfile.TemporaryDirectory() as folder:
                self.save_lora(folder)
                self.unload("transformer")
                self.load_lora(folder)

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
        if self.quantize and getattr(self.transformer, "peft_config", None):
            self._quantize_trained()
        self._place_transformer(devices.transformer or self.device)
        self.load_model()
        start = self.config.model.lora.pretrained_weight
        if start and not getattr(self.transformer, "peft_config", None):
            self.load_lora(start)
        self.vae.to(devices.vae or self.device)
        self.qwen_vl.to(devices.text_encoder or self.device)
        self.transformer.eval()

    def edit_example(
        self,
        pictures: Sequence[Picture],
        prompt: str,
        width: int | None = None,
        height: int | None = None,
    ) -> Example:
        """What an edit without a target shows the model, by the rules of training.

        pictures: each whole, at its own size. The result's target is the main one (2508: the
        first, else the last) at the size that is drawn: width x height px, down to a multiple of
        16, or 1 MP (the training size if references are as large as the target).
        """
        data, about = self.config.data, self.about_lora()
        main = pictures[0] if self.flavour.name == "edit-v1" else pictures[-1]
        aspect = main.size[0] / main.size[1]
        aligned = about["reference_area"] == "target"
        size = pick_size(AREA_1MP, aspect)
        if aligned and data.dataset_configs:
            size = nearest_bucket(*main.size, data.dataset_configs[0].resolution)
        size = (width or size[0]) // 16 * 16, (height or size[1]) // 16 * 16
        wanted, aspects = size[0] / size[1], [p.size[0] / p.size[1] for p in pictures]
        # the frame that references share: the main one's, or of the one nearest to width x height
        frame = min(aspects, key=lambda a: abs(math.log(a / wanted))) if width else aspect
        area_px = reference_area_px(about["reference_area"], size)
        vision_area = float(about["vision_area"] or area_px)

        def fit(picture: Picture, area_px: float) -> Picture:
            own = picture.size[0] / picture.size[1]
            if aligned and aligns(own, frame):
                return picture._replace(size=pick_size(area_px, wanted), box=cover_box(own, wanted))
            return picture._replace(size=pick_size(area_px, own))

        return Example(
            name="",
            target=main._replace(size=size),
            references=tuple(fit(picture, area_px) for picture in pictures),
            vision=tuple(fit(picture, vision_area) for picture in pictures),
            caption=prompt,
            instruction=about["instruction"],
        )

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
        example = self.edit_example(whole, prompt, width, height)
        width, height = example.target.size
        references = [
            self.encode_image_embedding(load_picture(p), self.vae.device)
            for p in example.references
        ]
        device = self.qwen_vl.device
        embeds, negative = self._embed(example, device)[None], None
        if negative_prompt is not None and true_cfg_scale > 1:
            negative = self._embed(example._replace(caption=negative_prompt), device)[None]
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
        """Optimizer, learning rate schedule (it counts optimizer steps) and moving average."""
        self.optimizer = make_optimizer(self.config.optimizer, self.trainable())
        # KEEP: accelerate must not wrap it, or it would go as many steps as there are processes
        self.lr_scheduler = make_schedule(
            self.config.lr_scheduler, self.optimizer, self.total_steps()
        )
        if self.config.train.use_ema:
            named = self.transformer.named_parameters()
            trained = {name: p for name, p in named if p.requires_grad}
            self.ema = MovingAverage(trained, self.config.train)

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
        if not isinstance(batch["control_latent"], list):
            batch["control_latent"] = [batch["control_latent"]]
        if "noise" not in batch:
            chance = self._loader_chance("noise")
            batch["noise"] = normal(batch["pixel_latent"].shape, *chance).to(self.device)
            self._drawn += 1
        if "zeroed" in batch:  # caption_dropout_mode: zero
            embeds = batch["prompt_embed"]
            batch["prompt_embed"] = embeds.masked_fill(batch["zeroed"].view(-1, 1, 1), 0)
        loss = self._compute_loss(batch)
        return (loss * batch["loss_weight"] if "loss_weight" in batch else loss).mean()

    def _training_step_compute(self, batch: dict[str, Any]) -> torch.Tensor:
        """Encode with the same functions the cache is filled with, then go on as from the cache."""
        examples = batch.get("examples") or self.examples_of(batch)
        items = [self._encode(example) for example in examples]
        drawn = {k: v for k, v in batch.items() if k not in ("examples", *USER_BATCH)}
        return self._training_step_cached(collate(items) | drawn)

    def _compute_loss(
        self, batch: dict[str, Any], transformer: Any = None, shift: bool = True
    ) -> torch.Tensor:
        """Loss per sample, (B,) fp32, of a batch as collate() makes it, with noise and sigma (B,).

        transformer: None for the one being trained, with its distributed wrapper. shift: sigma is
        still without the timestep shift.
        """
        loss = self.config.loss
        target, noise = batch["pixel_latent"].float(), batch["noise"]
        sigma = batch["sigma"].float()
        if shift:
            sigma = self.shifted(sigma, math.prod(token_grid(target)))
        start = batch["start_latent"].float() if "start_latent" in batch else target
        noisy = add_noise(start, noise, sigma)
        goal = noise - target
        if "consistent" in batch:
            goal = torch.where(
                per_sample(batch["consistent"]), velocity_to(target, noisy, sigma), goal
            )
        if "rollout_chance" in batch:
            noisy, goal = self._rolled_out(batch, start, noisy, goal, sigma)
        velocity = self.velocity(batch, noisy, sigma, transformer or self.transformer)
        return LOSSES[loss.loss_type](velocity, goal, self.loss_weight(batch), loss)

    def shifted(self, sigma: torch.Tensor, tokens: int) -> torch.Tensor:
        """loss.timestep_shift applied, for so many target tokens."""
        wanted = self.config.loss.timestep_shift
        model = wanted == "model"
        mu = model_mu(self.scheduler.config, tokens) if model else math.log(float(wanted))
        return shift_sigma(sigma, mu)

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

    def loss_weight(self, batch: dict[str, Any]) -> torch.Tensor | None:
        """Weight per latent (B, 1, 1, h, w) from masks or changes; None: all alike."""
        loss = self.config.loss
        if "region" not in batch:
            return None
        level = batch["region"]
        if loss.region == "difference":
            level = level / loss.difference_threshold
        weight = torch.lerp(
            torch.full_like(level, loss.background_weight),
            torch.full_like(level, loss.foreground_weight),
            level.clamp(0, 1),
        )
        return torch.where(batch["region"] < 0, 1.0, weight)  # no mask: all alike

    def _rolled_out(
        self,
        batch: dict[str, Any],
        start: torch.Tensor,
        noisy: torch.Tensor,
        goal: torch.Tensor,
        sigma: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scheduled sampling for the samples whose chance comes up: (noisy, target velocity)."""
        loss, seconds = self.config.loss, stopwatch(self.device)
        share = loss.rollout_probability
        if loss.rollout_warmup_steps:
            share *= min(1.0, self.global_step / loss.rollout_warmup_steps)
        numbers = [i for i, chance in enumerate(batch["rollout_chance"]) if chance < share]
        if not numbers:
            return noisy, goal
        # KEEP: indexed with a list, every tensor would wait for the GPU
        chosen = to_device(torch.tensor(numbers), self.device)
        part: dict[str, Any] = {
            "control_latent": [control[chosen] for control in batch["control_latent"]],
            "prompt_embed": batch["prompt_embed"][chosen],
        }
        if batch.get("prompt_embeds_mask") is not None:
            part["prompt_embeds_mask"] = batch["prompt_embeds_mask"][chosen]
        transformer = self.bare_transformer()
        rolled = roll_out(
            lambda x, level: self.velocity(part, x, level, transformer),
            start[chosen],
            batch["noise"][chosen],
            sigma[chosen],
            loss.rollout_steps,
            loss.rollout_span,
        )
        drift = (rolled - noisy[chosen]).flatten(1).norm(dim=1) / noisy[chosen].flatten(1).norm(
            dim=1
        )
        self.measure("rollout_drift", drift.mean().item)
        self.measure("rollout_seconds", seconds())
        noisy, goal = noisy.clone(), goal.clone()
        noisy[chosen] = rolled
        if loss.rollout_target == "corrected":
            x0 = batch["pixel_latent"].float()[chosen]
            goal[chosen] = velocity_to(x0, rolled, sigma[chosen])
        return noisy, goal

    def measure(self, name: str, read: Callable[[], float]) -> None:
        """Remember a figure of this step; it is read, and its mean shown, with the log line."""
        self._measured.setdefault(name, []).append(read)

    def trained_as(self) -> dict[str, Any]:
        """What decides the result; a run that continues must have the same."""
        config = self.config.model_dump(mode="json")
        values = dict(flat_settings({section: config[section] for section in TRAINS}, ""))
        seen = [
            (
                *(sample.dataset, sample.name, sample.held_out),
                [(v.caption, [self.index.content(f) for f in v.files()]) for v in sample.variants],
            )
            for sample in self.samples
        ]
        values["samples (names, captions, pictures)"] = cache_key("samples", seen=seen)
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

        def shape_of(draw: Draw) -> Shape:  # crops and what the encoder sees do not change it
            key = draw.sample, draw.variant, draw.references
            if key not in self._shapes:
                e = resolve(self.config, self.flavour, self.samples, draw, self.index)
                self._shapes[key] = tuple(p.size for p in (e.target, *e.references))
            return self._shapes[key]

        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        steps = self.config.train.max_train_steps
        plan = StepPlan(self.config, self.samples, shape_of, first_step, steps, rank, processes)
        if self.config.train.num_epochs:
            plan.steps = min(steps, self.config.train.num_epochs * plan.steps_per_epoch)
        return plan

    def preflight(self) -> None:
        """What can only be checked with the libraries loaded, but needs no weights.

        Raises:
            UserError: with every problem.
        """
        from accelerate import init_empty_weights

        config, lora = self.config, self.config.model.lora
        problems = check_precision(self.precision) + check_model(config, self.precision)
        path = config.model.pretrained_model_name_or_path
        try:
            empty = empty_transformer(read_model_json(path, "transformer/config.json"))
            adapter_config(empty, lora)
            if lora.pretrained_weight:
                with init_empty_weights():
                    add_lora(empty, lora, config.seed)
                check_start(lora.pretrained_weight, lora, empty)
        except UserError as error:
            problems.append(str(error))
        try:
            optimizer = make_optimizer(config.optimizer, [torch.nn.Parameter(torch.zeros(1))])
            make_schedule(config.lr_scheduler, optimizer, config.train.max_train_steps)
            problems += check_optimizer(optimizer, config)
        except (UserError, ValueError) as error:
            problems.append(str(error))
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
            self.accelerator.init_trackers(
                name,
                {"config": self.config.model_dump_json()},
                {"wandb": {"dir": str(self.config.logging.output_dir)}},
            )
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
        self.optimizer.train()
        with StopSignal() as stop:
            stopped = self._loop(loader, steps, stop, metrics)
        if self.accelerator.is_main_process:
            self._save_adapters(self.config.logging.output_dir)
            self._write_card()
        self.optimizer.eval()  # what predict() and save_lora() meet is what was saved
        if metrics:
            metrics.close()
            write_report(self.config.logging.output_dir)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        word = "stopped" if stopped else "done"
        log.info(
            "%s at step %d: %s", word, self.global_step, self.config.logging.output_dir / LORA_FILE
        )

    def _announce(self, steps: int) -> None:
        """Log what is about to happen; draw the first step's pictures."""
        for name, (first, *others) in self.inference_rules().items():
            if others:
                text = "several %s are trained (%s): predict() and generate.py use the first"
                log.warning(text, name, ", ".join(map(str, (first, *others))))
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
            examples = [
                resolve(self.config, self.flavour, self.samples, draw, self.index) for draw in draws
            ]
            columns: dict[str, list[Picture | None]] = {
                "from": [e.start for e in examples],
                "mask": [e.region.mask if e.region else None for e in examples],
                "target": [e.target for e in examples],
            }
            columns = {head: column for head, column in columns.items() if any(column)}
            sheet = edit_sheet(
                [[load_picture(p) for p in e.references] for e in examples],
                [
                    [load_picture(picture) if picture else None for picture in row]
                    for row in zip(*columns.values(), strict=True)
                ],
                list(columns),
                [f"{e.name}: {e.caption or '(empty)'}" for e in examples],
            )
            self._save_sheet("first_batch", sheet)

    def _save_sheet(self, name: str, sheet: Image.Image) -> None:
        folder = self.config.logging.output_dir / "samples"
        save_atomic(folder / f"{name}.png", lambda file: sheet.save(file, format="PNG"))

    def _loop(
        self, loader: Iterable[Any], steps: int, stop: StopSignal, metrics: MetricLog | None
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
            names, loss, norm = self._step(batches)
            window.append((names, loss, norm))
            bar.update()
            stopped = self._agree(stop.requested)
            last = stopped or self.global_step == steps
            saving = last or self.global_step % saves == 0
            if saving or self.global_step % every == 0:
                value = self._mean_loss(window)  # waits for the GPU
                pace = (time.monotonic() - clock) / len(window)
                self._ask_every = self._stop_interval(pace)
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

    def _step(self, batches: Any) -> tuple[list[str], torch.Tensor, torch.Tensor]:
        """One optimizer step over micro-batches; returns sample names, mean loss, gradient norm."""
        accelerator = self.accelerator
        batches = batches if isinstance(batches, list) else [batches]
        if "error" in batches[0]:
            raise UserError(f"{batches[0]['error']}. Repair: cache_embeddings.py --verify")
        total = sum(batch_size(batch) for batch in batches)
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
        if self.ema:
            self.ema.update(self.global_step)
        self._drawn = 0
        names = [str(name) for batch in batches for name in batch.get("names", [])]
        return names, loss, norm

    def _stop_interval(self, pace: float) -> int:
        """Steps between two questions for a stop signal: log_every, 100, or about five seconds."""
        shared = self.accelerator.reduce(torch.tensor(pace, device=self.device), "mean").item()
        # KEEP: of the mean over processes, or they would ask at different steps and wait forever
        return max(1, min(self.config.logging.log_every, 100, round(5 / max(shared, 1e-3))))

    def _agree(self, requested: bool) -> bool:
        """Whether any process got a stop signal; all must leave at the same step.

        Several processes ask each other with the log lines, for that waits for the GPU anyway, and
        in between where steps are slow: a preempted machine has little time.
        """
        if self.accelerator.num_processes == 1:
            return requested
        if self.global_step % self._ask_every:
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
        for name, reads in self._measured.items():
            values[name] = sum(read() for read in reads) / len(reads)
        self._measured.clear()
        values |= {"lr": effective_lr(self.optimizer), "memory_gb": memory_gb(self.device)}
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

    @contextlib.contextmanager
    def averaged(self, ema: bool = False) -> Iterator[None]:
        """Inside, the weights are those to look at and to save; outside, those that are trained.

        They differ with `ema`, and where the optimizer averages (schedule-free). Afterwards the
        trained weights are back to the bit, whatever happened inside.
        """
        parameters = self.trainable()
        trained = [p.detach().clone() for p in parameters]
        try:
            if ema and self.ema:
                self.ema.write_to_parameters()
            else:
                self.optimizer.eval()
            yield
        finally:
            self.optimizer.train()
            with torch.no_grad():
                # KEEP: schedule-free's own way back is a lerp, right to rounding only
                for parameter, bits in zip(parameters, trained, strict=True):
                    parameter.copy_(bits)

    def _save_adapters(self, folder: Path) -> None:
        """The LoRA file, and beside it the one of the moving average."""
        with self.averaged():
            self.save_lora(folder)
        if self.ema:
            with self.averaged(ema=True):
                self.save_lora(folder / EMA_FILE)

    def save_checkpoint(self, epoch: int, global_step: int) -> None:
        """checkpoint-<step>/: LoRA file, raw adapter, optimizer, schedule; complete or absent."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            output_dir = self.config.logging.output_dir
            adapter = lora_tensors(self.bare_transformer())
            training = {
                # as it trains; the LoRA file has alpha folded in
                "adapter": {k: v.detach().cpu().clone() for k, v in adapter.items()},
                "optimizer": self.optimizer.state_dict(),
                "lr_scheduler": self.lr_scheduler.state_dict(),
                "ema": self.ema.averages if self.ema else None,
            }

            def write(folder: Path) -> None:
                self._save_adapters(folder)
                torch.save(training, folder / "training_state.pt")
                state = {
                    "step": global_step,
                    "epoch": epoch,
                    "files": {file.name: hash_file(file) for file in folder.iterdir()},
                    "trained_as": self.trained_as(),
                }
                (folder / "state.json").write_text(json.dumps(state, indent=2))

            place = output_dir / f"checkpoint-{global_step}"
            save_folder_atomic(place, write)
            if limit := self.config.train.checkpoints_total_limit:
                kept = list_checkpoints(output_dir)
                kept = kept[: kept.index(place) + 1]  # a later one is damaged: it counts nothing
                for old in kept[:-limit]:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _restore(self, folder: Path, state: dict[str, Any]) -> None:
        """Adapter, optimizer, schedule and step of a checkpoint."""
        from peft.utils import set_peft_model_state_dict

        saved = torch.load(folder / "training_state.pt", map_location="cpu", weights_only=True)
        set_peft_model_state_dict(self.transformer, saved["adapter"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.lr_scheduler.load_state_dict(saved["lr_scheduler"])
        if self.ema:
            self.ema.load(saved["ema"])
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

    def validation_edits(self) -> list[Edit]:
        """Rows of the sheet: the first held-out pairs, then validation.samples.

        Raises:
            UserError: a picture of validation.samples cannot be read.
        """
        settings = self.config.validation
        if not settings.steps:
            return []
        samples = self.samples
        if settings.resolution:
            samples = at_resolution(samples, settings.resolution)
        edits = []
        for number in self._held_out()[: settings.max_samples]:
            example = resolve(self.config, self.flavour, samples, Draw(0, number), self.index)
            edits.append(Edit(example, settings, has_target=True))
        paths = validation_pictures(self.config)
        if problems := check_pictures(paths, self.index):
            raise UserError(f"validation.samples\n{listed(problems)}")
        index_content(paths, self.index)
        return edits + [self._sample_edit(sample) for sample in settings.samples]

    def _held_out(self) -> list[int]:
        return [number for number, sample in enumerate(self.samples) if sample.held_out]

    def _sample_edit(self, sample: ValidationSample) -> Edit:
        """A row without a target; what the sample says goes over validation's settings."""
        settings = self.config.validation
        own = {k: v for k, v in sample if v is not None and k in ValidationConfig.model_fields}
        known = [(path, self.index.known(path)) for path in sample.images]
        pictures = [Picture(p, f["content"], (f["width"], f["height"])) for p, f in known]
        size = sample.width, sample.height
        if settings.resolution and not sample.width:
            main = pictures[0] if self.flavour.name == "edit-v1" else pictures[-1]
            size = pick_size(settings.resolution**2, main.size[0] / main.size[1])
        example = self.edit_example(pictures, sample.prompt, *size)
        example = example._replace(name=sample.images[-1].stem)
        return Edit(example, settings.model_copy(update=own), has_target=False)

    def validation_jobs(self) -> dict[str, Picture | Example | Region]:
        """What the validation pictures ask of the cache: {key: what to encode}."""
        jobs: dict[str, Picture | Example | Region] = {}
        for edit in self.validation_edits():
            jobs |= {self.keys.latent(picture): picture for picture in edit.example.references}
            prompts = (edit.example, edit.negative)
            jobs |= {self.keys.prompt(prompt): prompt for prompt in prompts if prompt}
        return jobs

    def _validate(self, metrics: MetricLog | None, last: bool = False) -> None:
        """Every validation.steps, at the start and the end: losses and the sheet.

        The work is shared out over the processes; process 0 writes what comes of it.
        """
        every = self.config.validation.steps
        if not every or (self.global_step % every and not last):
            return
        transformer = self.bare_transformer()
        transformer.eval()
        with torch.no_grad():
            values = self._validation_losses()
            rows = self._validation_rows()
        transformer.train()
        if self.accelerator.is_main_process:
            if rows:
                sheet = self._validation_sheet(rows)
                self._save_sheet(f"step_{self.global_step:06d}", sheet)
                track_picture(self.accelerator, "validation", sheet, self.global_step)
            if values:
                tqdm.write(
                    f"step {self.global_step} validation loss {values['validation_loss']:.4f}"
                )
                self.accelerator.log(values, step=self.global_step)
            if values and metrics:
                metrics.write(self.global_step, **values)
        self.accelerator.wait_for_everyone()

    def _validation_losses(self) -> dict[str, float]:
        """validation_loss, and by quartile of sigma (q1: the least noise); again for the EMA."""
        if not self._held_out():
            return {}
        values = {}
        for suffix in ("", "_ema") if self.ema else ("",):
            with self.averaged(ema=bool(suffix)):
                losses = self._fixed_noise_losses().mean(0).tolist()
            quarters = {f"_q{i + 1}": losses[2 * i : 2 * i + 2] for i in range(4)}
            for name, part in {"": losses, **quarters}.items():
                values[f"validation_loss{suffix}{name}"] = sum(part) / len(part)
        return values

    def _fixed_noise_losses(self) -> torch.Tensor:
        """Loss of every held-out pair at every sigma, (pairs, 8) fp32, on every process.

        Always the same noise, so small changes mean something; no dropout, sigma not shifted.
        """
        settings, accelerator, pairs = self.config.validation, self.accelerator, self._held_out()
        losses = torch.zeros(len(pairs), len(VALIDATION_SIGMAS), device=self.device)
        every = list(itertools.product(range(len(pairs)), range(len(VALIDATION_SIGMAS))))
        mine = every[accelerator.process_index :: accelerator.num_processes]
        for row, places in itertools.groupby(mine, key=lambda place: place[0]):
            name, batch = self._validation_batch(pairs[row])
            for _, column in places:
                level = VALIDATION_SIGMAS[column]
                noise = normal(batch["pixel_latent"].shape, settings.seed, name, level)
                drawn = {"noise": noise, "sigma": torch.tensor([level])}
                losses[row, column] = self._compute_loss(
                    batch | to_device(drawn, self.device),
                    self.bare_transformer(),  # KEEP: processes do not call it equally often
                    shift=False,
                )[0]
        return accelerator.reduce(losses, "sum")  # each is 0 on all processes but one

    def _validation_batch(self, number: int) -> tuple[str, dict[str, Any]]:
        """Name and batch of one held-out pair, as trained but for dropout."""
        example, paths = PairDataset(self, self.use_cache).resolved(Draw(0, number))
        batch = collate([read_entries(paths) if self.use_cache else self._encode(example)])
        if self.samples[number].variants[0].start_mode == "consistent":
            batch["consistent"] = torch.tensor([True])
        return example.name, to_device(batch, self.device)

    def _validation_rows(self) -> list[tuple[Edit, list[Image.Image], str]]:
        """(edit, pictures, note) of all rows, drawn by all processes."""
        from accelerate.utils import gather_object

        edits, accelerator = self.validation_edits(), self.accelerator
        mine = range(accelerator.process_index, len(edits), accelerator.num_processes)
        drawn = [
            (number, *self._validation_row(number, edits[number]))
            for number in progress(mine, "validation pictures", leave=False)
        ]
        self._release_encoders()
        drawn = sorted(gather_object(drawn), key=lambda row: row[0])
        return [(edits[number], pictures, note) for number, pictures, note in drawn]

    def _validation_row(self, number: int, edit: Edit) -> tuple[list[Image.Image], str]:
        """Pictures of base, LoRA (and EMA) and a note; none if there is never memory enough.

        Out of memory, the row goes down RUNGS and stays there for the rest of the run.
        """
        while (rung := self._rungs.get(number, 0)) < len(RUNGS):
            area, tiled, note = RUNGS[rung]
            smaller = edit._replace(example=shrunk(edit.example, area))
            try:
                return self._draw_row((number, rung), smaller, tiled), note
            except torch.OutOfMemoryError:
                self._rungs[number] = rung + 1
                next_note = RUNGS[rung + 1].note if rung + 1 < len(RUNGS) else "left out"
                name = edit.example.name
                tqdm.write(f"validation of {name}: out of memory, from now on: {next_note}")
            # KEEP: not in the except clause, where the error still holds the tensors
            self._release_encoders()
        return [], "left out"

    def _release_encoders(self) -> None:
        """Free the memory of the VAE, and what else is free; without a cache it is needed."""
        self.unload(*(["vae", "text_encoder"] if self.use_cache else []))

    def _draw_row(self, place: tuple[int, int], edit: Edit, tiled: bool) -> list[Image.Image]:
        """Base, LoRA and, if there is one, EMA, all of one size; the base is drawn once."""
        inputs = self._edit_inputs(edit)
        if place not in self._base_pictures:
            with without_adapter(self.bare_transformer()):
                self._base_pictures[place] = self._validation_picture(edit, inputs, tiled)
        row = [self._base_pictures[place]]
        for ema in (False, True) if self.ema else (False,):
            with self.averaged(ema):
                row.append(self._validation_picture(edit, inputs, tiled))
        return row

    def _edit_inputs(self, edit: Edit) -> dict[str, Any]:
        """Latents (1, 16, 1, hk, wk) and embeddings (1, T, D) of a row, from the cache."""
        cache, example, negative = self.config.cache, edit.example, edit.negative

        def embed(prompt: Example) -> torch.Tensor:
            return self._through_cache(prompt, cache.text_encoder_device)[None]

        references = [self._through_cache(p, cache.vae_encoder_device) for p in example.references]
        return {
            "references": [reference[None] for reference in references],
            "embeds": embed(example),
            "negative": embed(negative) if negative else None,
        }

    def _validation_picture(
        self, edit: Edit, inputs: dict[str, Any], tiled: bool = False
    ) -> Image.Image:
        """What predict() gives for the same pictures and settings."""
        width, height = edit.example.target.size
        settings = edit.settings
        latents = self._sample(
            height,
            width,
            **inputs,
            steps=settings.num_inference_steps,
            scale=settings.true_cfg_scale,
            seed=settings.seed,
        )
        self.load_model(["vae"])
        self.vae.to(self.config.cache.vae_encoder_device or self.device)
        with tiled_decoding(self.vae, tiled):
            return to_image(decode_latents_qwen(self.vae, latents)[0])

    def _validation_sheet(self, rows: Sequence[tuple[Edit, list[Image.Image], str]]) -> Image.Image:
        """references | base | LoRA | EMA, if there is one | target, if there is one."""
        columns = ["base", "LoRA", *(["EMA"] if self.ema else [])]
        with_target = any(edit.has_target for edit, _, _ in rows)
        references, results, captions = [], [], []
        for edit, pictures, note in rows:
            example = edit.example
            references.append([load_picture(picture) for picture in example.references])
            row: list[Image.Image | None] = [*pictures] or [None] * len(columns)
            if with_target:
                row.append(load_picture(example.target) if edit.has_target else None)
            results.append(row)
            note = f"[out of memory: {note}] " if note else ""
            captions.append(f"{note}{example.name}: {example.caption}")
        heads = columns + (["target"] if with_target else [])
        return edit_sheet(references, results, heads, captions)


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


USER_BATCH = ("image", "control", "prompt")  # pictures and prompts, see examples_of()


def batch_size(batch: dict[str, Any]) -> int:
    """Samples in a batch."""
    return len(next(batch[k] for k in ("pixel_latent", "examples", "image") if k in batch))


def per_sample(flags: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 1, 1, 1, 1), to choose between latents."""
    return flags.view(-1, 1, 1, 1, 1)


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


# --- 9. plan: memory, disk and time, before anything is loaded ------------------------------------

TEXT_ENCODER_GB, VAE_GB = 16.6, 0.25  # Qwen2.5-VL-7B and the VAE of the three checkpoints, bf16
CONTEXT_GB = 1.0  # what CUDA and its libraries keep for themselves
# per token, block and channel: saved for the backward pass, fp32 LoRA in bf16 autocast
ACTIVATION_BYTES = 44
BITS = {  # of a quantised weight, its scale included
    "no_change": 16, "int8-quanto": 8.01, "fp8-quanto": 8.01, "int4-quanto": 4.25,
    "int2-quanto": 2.25, "nf4-bnb": 4.5,
}  # fmt: skip
# bf16, what they reach in dense products
TFLOPS = {"RTX 4090": 165, "A100": 312, "H100, H200": 790}


class Load(NamedTuple):
    """How large one kind of sample is."""

    shape: Shape
    text: int  # tokens
    visits: float  # per epoch

    @property
    def tokens(self) -> int:
        """Of target, references and text together."""
        return image_tokens(self.shape) + self.text


def text_tokens(example: Example) -> int:
    """About how many tokens an instruction with its pictures has: 28 x 28 px are one token."""
    pictures = (round(w / 28) * round(h / 28) + 6 for w, h in (p.size for p in example.vision))
    return 5 + math.ceil(len(example.caption) / 4) + sum(pictures)


def planned_transformer(config: Config) -> Any:
    """The transformer without weights, from its config.json, or as published."""
    return empty_transformer(transformer_settings(config.model.pretrained_model_name_or_path))


def weights_gb(config: Config, transformer: Any) -> tuple[float, float]:
    """Size of the transformer in the precision asked for, and of one of its blocks."""
    plain = 2 if config.train.mixed_precision == "bf16" else 4
    bits = BITS[config.model.precision]
    quantised = 0
    for name, module in transformer.named_modules():
        inside = name.startswith("transformer_blocks.") and "_mod." not in name
        if inside and isinstance(module, torch.nn.Linear):
            quantised += module.weight.numel()
    total = sum(p.numel() for p in transformer.parameters())
    quantised = quantised if config.model.precision != "no_change" else 0
    size = ((total - quantised) * plain + quantised * bits / 8) / 1e9
    return size, size / len(transformer.transformer_blocks)


def activations_gb(config: Config, transformer: Any, tokens: int) -> float:
    """What one forward pass keeps for its backward pass, for so many tokens."""
    layers, width = len(transformer.transformer_blocks), transformer.inner_dim
    if not config.train.gradient_checkpointing:
        return tokens * width * layers * ACTIVATION_BYTES / 1e9
    # the input of every block, and one block computed again
    return tokens * width * (layers * 2 + ACTIVATION_BYTES) / 1e9


def step_tflop(config: Config, transformer: Any, tokens: int) -> float:
    """Operations of one sample: forward and backward through a frozen base."""
    layers, width = len(transformer.transformer_blocks), transformer.inner_dim
    linear, attention = layers * tokens * 24 * width**2, layers * 4 * tokens**2 * width
    again = config.train.gradient_checkpointing
    return (linear * (3 if again else 2) + attention * (4.5 if again else 3.5)) / 1e12


def peak_gb(config: Config, transformer: Any, trained: int, loads: Sequence[Load]) -> float:
    """Estimated peak of a training step on the (first) training device."""
    weights, block = weights_gb(config, transformer)
    swapped = config.model.blocks_to_swap
    if swapped:
        weights -= max(0, swapped - 2) * block
    devices = max(1, len(config.model.devices))
    most = max((load.tokens * fits(config, load) for load in loads), default=0)
    adapter = trained * (16 + 4 * config.train.use_ema) / 1e9  # weight, gradient, Adam's moments
    beside = 0.0 if config.cache.use_cache else sum(encoder_sizes(config))
    own = weights + activations_gb(config, transformer, most) + adapter
    return own / devices + beside + CONTEXT_GB


def fits(config: Config, load: Load) -> int:
    """Samples of this shape in one forward pass."""
    return StepPlan(config, [], lambda draw: load.shape, 0, 0).room(load.shape)


def ways_out(config: Config, n_blocks: int) -> Iterator[tuple[str, Config]]:
    """Settings that need less memory than the config's, from the cheapest to the dearest."""

    def changed(**settings: Any) -> tuple[str, Config]:
        data = config.model_dump()
        words = []
        for path, value in settings.items():
            section, name = path.split("__")
            if data[section][name] != value:
                data[section][name] = value
                words.append(f"{section}.{name}: {str(value).lower()}")
        return ", ".join(words), Config.model_validate(data)

    if not config.train.gradient_checkpointing:
        yield changed(train__gradient_checkpointing=True)
    if config.data.batch_size > 1:
        yield changed(data__batch_size=1)
    if config.data.reference_area == "1mp":
        yield changed(data__reference_area="target")
    method, activations = config.model.lora.method, config.model.quantize_activations
    possible = {"int8-quanto": method != "dora", "nf4-bnb": method != "lokr" and not activations}
    for precision in (name for name, fine in possible.items() if fine):
        if BITS[precision] < BITS[config.model.precision] and not config.model.blocks_to_swap:
            yield changed(model__base_model_precision=precision, model__quantize=False)
    if not config.model.blocks_to_swap and config.model.precision != "nf4-bnb":
        yield changed(
            model__blocks_to_swap=n_blocks * 5 // 6,
            train__gradient_checkpointing=True,
            model__devices=[],
        )


class Outlook(NamedTuple):
    """What a run will see: its samples, and what the cache will hold."""

    samples: list[Sample]
    loads: list[Load]
    latents: int  # entries
    prompts: int
    cache_gb: float


def look_ahead(config: Config, flavour: Flavour, width: int) -> Outlook:
    """Shapes, tokens and cache size of the data; only picture headers are read."""
    index = open_index(config)
    samples, _ = find_samples(config, index)
    for path in all_pictures(samples):  # the hashes themselves do not matter here
        index.put(path, path.stat(), {**index.known(path), "content": str(path)})
    loads: Counter[tuple[Shape, int]] = Counter()
    latents: dict[Any, int] = {}
    prompts: dict[Any, int] = {}
    for draw in possible_draws(config, samples):
        sample = samples[draw.sample]
        variant = sample.variants[draw.variant]
        e = resolve(config, flavour, samples, draw, index)
        text = text_tokens(e)
        for picture in (e.target, *e.references, *([e.start] if e.start else [])):
            latents[str(picture_id(picture))] = image_tokens((picture.size,))
        prompts[str([picture_id(p) for p in e.vision]), e.caption, e.instruction] = text
        if not (sample.held_out or draw.view or draw.dropped):
            ds = config.data.dataset_configs[sample.dataset]
            shape = tuple(p.size for p in (e.target, *e.references))
            chance = variant.weight / sum(v.weight for v in sample.variants)
            loads[shape, -(-text // 64) * 64] += ds.repeats * chance  # type: ignore[assignment]
    size = 2 if config.train.mixed_precision == "bf16" else 4
    total = sum(latents.values()) * 64 * size + sum(prompts.values()) * width * size
    found = [Load(shape, text, n) for (shape, text), n in loads.most_common()]
    return Outlook(samples, found, len(latents), len(prompts), total / 1e9)


def plan(config: Config) -> str:
    """What a run would be: data, tokens, memory, disk, time. Loads nothing, downloads nothing."""
    from accelerate import init_empty_weights

    flavour = detect_flavour(config.model.pretrained_model_name_or_path)
    transformer = planned_transformer(config)
    parameters = sum(p.numel() for p in transformer.parameters())
    with init_empty_weights():
        add_lora(transformer, config.model.lora, config.seed)
    trained = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    outlook = look_ahead(config, flavour, transformer.config.joint_attention_dim)
    lines = plan_data(config, outlook)
    heaviest = max(outlook.loads, key=lambda load: load.tokens * fits(config, load))
    lines += plan_compute(config, transformer, outlook)
    weights, _ = weights_gb(config, transformer)
    lines += [
        "",
        f"Transformer  {parameters:,} parameters, {config.model.precision}: {weights:.1f} GB",
        f"Adapter      {trained:,} parameters ({config.model.lora.method}, fp32)",
        "",
        *plan_devices(config),
        "",
        "Estimated peak of GPU memory",
    ]
    encoder, vae = encoder_sizes(config)
    peak = peak_gb(config, transformer, trained, outlook.loads)
    lines += [
        f"  cache     {max(encoder, vae) + CONTEXT_GB + 1:5.1f} GB: one encoder at a time"
        if config.cache.use_cache
        else f"  encoders  {encoder + vae:5.1f} GB, beside the transformer (use_cache: false)",
        f"  training  {peak:5.1f} GB, {fits(config, heaviest)} x {heaviest.tokens} tokens a pass",
    ]
    return "\n".join([*lines, *plan_fit(config, transformer, trained, outlook, peak)])


def plan_data(config: Config, outlook: Outlook) -> list[str]:
    """Samples per data set, buckets, cache."""
    lines = ["Data"]
    for number, ds in enumerate(config.data.dataset_configs):
        mine = [s for s in outlook.samples if s.dataset == number]
        held = sum(s.held_out for s in mine)
        combinations = max((len(s.variants) for s in mine), default=0)
        lines.append(
            f"  {ds.name}: {len(mine)} samples, {held} held out, x {ds.repeats} repeats, "
            f"{combinations} combination(s), {ds.views} view(s)"
        )
    lines.append(
        "Shapes       target + references (px): text tokens, tokens in all, visits an epoch"
    )
    for load in outlook.loads[:8]:
        sizes = " + ".join(f"{w}x{h}" for w, h in load.shape)
        lines.append(f"  {sizes}: {load.text}, {load.tokens}, {load.visits:g}")
    if len(outlook.loads) > 8:
        lines.append(f"  ... and {len(outlook.loads) - 8} more")
    entries = f"{outlook.latents} latents, {outlook.prompts} prompts"
    if config.cache.use_cache:
        free = shutil.disk_usage(existing_parent(config.cache.cache_dir)).free / 1e9
        lines.append(f"Cache        {entries}: {outlook.cache_gb:.2f} GB on disk ({free:.0f} free)")
    return lines


def existing_parent(path: Path) -> Path:
    """The path itself or the nearest folder above it that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def plan_compute(config: Config, transformer: Any, outlook: Outlook) -> list[str]:
    """Operations and time of a step and of the run."""
    visits = sum(load.visits for load in outlook.loads)
    mean = sum(step_tflop(config, transformer, o.tokens) * o.visits for o in outlook.loads) / visits
    per_step = config.data.batch_size * config.train.gradient_accumulation_steps
    each = math.ceil(visits / per_step)
    steps = min(config.train.max_train_steps, each * (config.train.num_epochs or 10**9))
    lines = [
        f"Steps        {steps} of {per_step} sample(s) on each process, {each} an epoch; "
        f"{mean * per_step:.1f} TFLOP a step"
    ]
    for name, speed in TFLOPS.items():
        seconds = mean * per_step / (speed / 2)
        lines.append(
            f"  {name} at half its speed: {seconds:.2f} s a step, {steps * seconds / 3600:.1f} h"
        )
    return lines


def encoder_sizes(config: Config) -> tuple[float, float]:
    """GB of the text encoder and of the VAE."""
    folder = Path(config.model.pretrained_model_name_or_path)
    if not folder.is_dir():
        return TEXT_ENCODER_GB, VAE_GB
    parts = (folder / name for name in ("text_encoder", "vae"))
    text, vae = (sum(f.stat().st_size for f in p.glob("*.safetensors")) / 1e9 for p in parts)
    return text, vae


def plan_devices(config: Config) -> list[str]:
    """Where each model will live."""
    here = "the training device"
    cache, model = config.cache, config.model
    when = "while the cache is filled, then freed" if cache.use_cache else "all the time"
    where = ", ".join(model.devices) or here
    swap = f", {model.blocks_to_swap} blocks in CPU memory" if model.blocks_to_swap else ""
    return [
        f"Text encoder on {cache.text_encoder_device or here} {when}",
        f"VAE          on {cache.vae_encoder_device or here} {when}",
        f"Transformer  on {where}{swap}",
    ]


def plan_fit(
    config: Config, transformer: Any, trained: int, outlook: Outlook, peak: float
) -> list[str]:
    """Whether it fits, and what to change if it does not."""
    cards = [
        torch.cuda.get_device_properties(i).total_memory / 1e9
        for i in range(torch.cuda.device_count())
    ]
    room = min(cards, default=None)
    if room is None:
        lines = ["  this machine has no CUDA device; the figures are for one of them"]
    else:
        word = "fits" if peak < room else "DOES NOT FIT"
        lines = [f"  {word}: {len(cards)} CUDA device(s) here, the smallest with {room:.1f} GB"]
    ways = []
    for words, other in ways_out(config, len(transformer.transformer_blocks)):
        loads = outlook.loads
        if other.data.reference_area != config.data.reference_area:
            flavour = detect_flavour(other.model.pretrained_model_name_or_path)
            loads = look_ahead(other, flavour, 1).loads
        lower = peak_gb(other, transformer, trained, loads)
        if lower < peak - 0.05:
            enough = "" if room is None or lower >= room else ", fits"
            ways.append(f"  {words}: {lower:.1f} GB{enough}")
    return [*lines, *(["What would lower it", *ways] if ways else [])]


# --- 10. main -------------------------------------------------------------------------------------


def main() -> None:
    """Config -> audit -> fit, or with --plan only what it would be."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    given = [arg for arg in sys.argv[1:] if arg != "--plan"]
    config = load_config(Config, given, check=audit)
    if len(given) < len(sys.argv) - 1:
        print(plan(config))
    else:
        QwenImageEditTrainer(config).fit()


if __name__ == "__main__":
    run_script(main)
