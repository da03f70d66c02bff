"""Apply LoRAs: edits with Qwen-Image-Edit, sliders with FLUX.1, changes with Stable Diffusion 1.x.

Page: docs/generate.md

Qwen-Image-Edit (the checkpoint says which it is):

    python generate.py --pretrained_model_name_or_path DIR --lora FILE --image a.png \\
        --prompt "make it snow" --output snow.png
    ... --image a.png --image b.png           # several references, in this order
    ... --lora A.safetensors:0.8 --lora B.safetensors
    ... --scales 0,0.5,1 --output strip.png   # every LoRA times 0, 0.5 and 1, side by side
    ... --input_dir photos --output_dir out   # a folder; captions beside the photos or --prompt
    ... --table jobs.jsonl --output_dir out   # {"images": [...], "prompt": "...", "name": "..."}

FLUX.1:

    python generate.py --c train_image        # all that configs/train_image.yaml trains, and photos
    python generate.py --pretrained_model_name_or_path DIR --lora FILE --prompt "a person" \\
        --scales 0,0.5,1 --skip 14 --output strip.png
    ... --lora A.safetensors:0.8 --lora B.safetensors:1:10   # FILE:scale:skip
    ... --image photo.png                     # edit a photo, without training on it

Stable Diffusion 1.x:

    python generate.py --pretrained_model_name_or_path DIR --lora FILE --prompt "a person" \\
        --scales=-1,0,1 --seed 0,1 --output strip.png
    ... --image photo.png                     # change a photo; or --input_dir, --output_dir
    ... --image a.png --image b.png --frames 9   # between two pictures, without --lora

Qwen and Stable Diffusion run through the diffusers pipelines and load_lora_weights, FLUX.1 through
a few functions that share the steps before the slider acts and draw all its positions as one batch;
photos through functions of their own. A finished picture
whose settings are the same is not made again, so a stopped run goes on where it was.

Shapes (FLUX.1): B samples, H W pixels, h w latents (H/8 W/8, C = 16 channels), S = (h/2)(w/2) image
tokens of 4C channels. Latents are (mode - shift) * scaling, sigma runs from 0 (picture) to 1
(noise), velocity = d latents / d sigma.
"""

from __future__ import annotations

import bisect
import contextlib
import csv
import ctypes
import difflib
import functools
import gc
import importlib.util
import itertools
import json
import math
import os
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from pydantic import Field, field_validator, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from utils import (
    PageRow,
    Section,
    UserError,
    cache_key,
    draw_key,
    hash_file,
    help_text,
    list_images,
    listed,
    load_config,
    normal,
    parse_args,
    run_script,
    save_atomic,
    shuffled,
    uniform,
    write_page,
)

SIZE_MULTIPLE = 32  # px; the pipelines round every side to it, so training does too
AREA_1MP = 1024 * 1024
VISION_AREA = 384 * 384  # area_px of the pictures shown to the text encoder by Edit-Plus
SETTINGS_KEY = "image_edit"  # PNG text chunk
PUBLISHED_MODEL = "black-forest-labs/FLUX.1-dev"


# --- 1. config ------------------------------------------------------------------------------------


Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Config(Section):
    """generate.py: edit pictures with Qwen-Image-Edit and LoRAs."""

    pretrained_model_name_or_path: str
    """Folder in diffusers layout, or a Hub id."""
    lora: list[str] = []
    """LoRA file, or FILE:scale; repeat the flag for several."""
    scales: list[float] | None = None
    """Strip: every LoRA's scale times each of these, e.g. 0,0.5,1."""
    image: list[Path] = []
    """Reference; repeat the flag for several, in order."""
    prompt: str | None = None
    """The instruction."""
    negative_prompt: str = ""
    """Used by guidance; "" is the empty instruction."""
    seed: list[Seed] = [0]
    """Seed, or several: 0,1,2. Drawn on the CPU: the same picture on every device."""
    num_inference_steps: int = Field(40, ge=2)
    """Euler steps (a single one divides by zero in the scheduler)."""
    true_cfg_scale: float = Field(4.0, ge=1)
    """Guidance; 1 switches it off and halves the time."""
    height: int | None = Field(None, ge=32, multiple_of=16)
    """px; null: 1 MP in the aspect of the last picture, or the LoRA's training size."""
    width: int | None = Field(None, ge=32, multiple_of=16)
    """px; see height."""
    reference_area: Literal["lora", "1mp", "target"] | int = "lora"
    """Size of the references: what the LoRA was trained with, 1 MP, the output's, or pixels."""
    output: Path | None = None
    """One edit: the picture (PNG); with several scales or seeds: the strip."""
    output_dir: Path | None = None
    """Many edits: folder of the pictures and of contact_sheet.png."""
    input_dir: Path | None = None
    """Many edits: every picture of this folder."""
    table: Path | None = None
    """Many edits: .csv or .jsonl with images (";" between several), prompt, name, seed."""
    html: bool = False
    """Also write page.html beside the sheet: a divider to drag, a slider over the scales."""
    device: str | None = None
    """cuda, cpu, mps ...; null: the fastest there is."""
    dtype: Literal["bf16", "fp32"] | None = None
    """null: bf16, on a CPU fp32."""
    offload: Literal["none", "model", "sequential"] = "none"
    """Keep on the GPU only the model (or the layer) in use."""

    @field_validator("seed", "scales", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """ "0,1,2" -> ["0", "1", "2"], alone or in a list."""
        parts = value if isinstance(value, list) else [value]
        if value is None:
            return None
        return [p for part in parts for p in (part.split(",") if isinstance(part, str) else [part])]


class FluxConfig(Section):
    """What the two ways to draw FLUX.1 sliders have in common."""

    pretrained_model_name_or_path: str = PUBLISHED_MODEL
    """Folder in diffusers layout, or a Hub id."""
    device: int | str | None = None
    """Number of a GPU, or cpu, cuda:0, mps; null: the fastest there is."""
    dtype: Literal["bf16", "fp32"] | None = None
    """null: bf16, on a CPU fp32."""
    base_model_precision: Literal[
        "no_change", "int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto", "nf4-bnb"
    ] = "no_change"
    """Weights of the frozen transformer's blocks."""
    max_sequence_length: int = Field(512, ge=1, le=512)
    """T5 tokens of a prompt; padded to it, as the pipeline does."""
    resolution: int = Field(512, ge=32, multiple_of=16)
    """Side of the square whose area the pictures get, px; aspect ratios are kept (buckets)."""
    num_inference_steps: int = Field(28, ge=1)
    """N: sigma is one of the N values of an inference of N steps."""
    guidance_scale: float = 3.5
    """Embedded guidance of FLUX.1-dev, in training and in pictures."""
    html: bool = False
    """Also write page.html beside the sheet: a divider to drag, a slider over the scales."""
    allow_pickle: bool = False
    """Load LoRA files that are no .safetensors (tensors only, no code)."""


class StripConfig(FluxConfig):
    """generate.py with a FLUX.1 checkpoint: sliders by flags, on prompts or on photos."""

    lora: list[str] = []
    """Slider: FILE, FILE:scale or FILE:scale:skip; repeat the flag for several."""
    scales: list[float] | None = None
    """Strip: every slider's scale times each of these, e.g. 0,0.5,1; 0 is the base model."""
    skip: int = 14
    """Sliders act in steps i > skip (inversion_lora: i >= skip); a higher one keeps more of the
    picture, -1 lets them act in all steps."""
    compose: Literal["merge", "blend"] | None = None
    """merge: all LoRAs in one pass. blend: v + sum of gamma (v_slider - v), a pass each; null:
    merge, with inversion_lora blend."""
    gamma: float = 0.75
    """blend: share of each slider's velocity."""
    inversion_lora: Path | None = None
    """LoRA that was trained on one photo (train_image_real) and stands in for it."""
    prompt: str = ""
    """Of the picture; of a photo: what it shows."""
    seed: list[Seed] = [0]
    """Seed, or several: 0,1,2. Drawn on the CPU: the same picture on every device."""
    height: int | None = Field(None, ge=32, multiple_of=16)
    """px; null: by resolution and the photo's aspect."""
    width: int | None = Field(None, ge=32, multiple_of=16)
    """px; see height."""
    image: list[Path] = Field([], max_length=1)
    """Photo to edit, without training on it (with inversion_lora: only its size is read)."""
    input_dir: Path | None = None
    """Edit every picture of this folder."""
    output: Path | None = None
    """The picture (PNG); with several scales or seeds: the strip, single pictures beside it."""
    output_dir: Path | None = None
    """input_dir: folder of the pictures and of contact_sheet.png."""

    @field_validator("seed", "scales", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """ "0,1,2" -> ["0", "1", "2"], alone or in a list."""
        parts = value if isinstance(value, list) else [value]
        if value is None:
            return None
        return [p for part in parts for p in (part.split(",") if isinstance(part, str) else [part])]


class SDConfig(Section):
    """generate.py with a Stable Diffusion 1.x checkpoint: states of a change, also of photos."""

    pretrained_model_name_or_path: str
    """Folder in diffusers layout, or a Hub id."""
    lora: list[str] = []
    """LoRA file (diffusers, PEFT or kohya), or FILE:scale; repeat the flag for several."""
    scales: list[float] | None = None
    """Strip: every LoRA's scale times each of these, e.g. -1,0,1; 0 is the base model."""
    prompt: list[str] = []
    """Repeat the flag for several; of a photo: what it shows. []: what the LoRA was trained on."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    seed: list[Seed] = [0]
    """Seed, or several: 0,1,2. Drawn on the CPU: the same picture on every device."""
    num_inference_steps: int = Field(50, ge=1, le=500)
    """DDIM steps."""
    guidance_scale: float | None = Field(None, ge=1)
    """Classifier-free guidance; 1 is none. null: 7.5, on photos 1."""
    resolution: int | None = Field(None, ge=64, multiple_of=64)
    """Side of the square whose area the pictures get, px; photos keep their aspect (buckets).
    null: what the LoRA was trained with, else the base model's own (mostly 512)."""
    height: int | None = Field(None, ge=32, multiple_of=8)
    """px; null: by resolution and the photo's aspect."""
    width: int | None = Field(None, ge=32, multiple_of=8)
    """px; see height."""
    batch_size: int = Field(4, ge=1)
    """Seeds, prompts or photos of one size that are drawn at once."""
    image: list[Path] = []
    """Photo to change; with frames the two pictures."""
    input_dir: Path | None = None
    """Change every picture of this folder."""
    inversion: Literal["ddpm", "ddim"] = "ddpm"
    """How a photo becomes noise: ddpm (edit-friendly) gets more of the change, ddim is smoother
    and draws nothing by chance."""
    skip: float = Field(0.2, ge=0, lt=1)
    """Photos: share of the steps left out at the noisy end; more keeps more of the photo."""
    restore_detail: bool = False
    """Photos: add what the VAE loses, photo - decode(encode(photo)), to every result."""
    mask: Path | None = None
    """Photo: what is white here may change, the rest stays (grey: partly)."""
    frames: int | None = Field(None, ge=3)
    """Draw the way from one --image to another, in this many pictures, the two included."""
    even_frames: bool = True
    """frames: equally far apart, which draws them twice."""
    fit_steps: int = Field(200, ge=1)
    """frames: steps of AdamW on the LoRA that is fitted to each of the two (kept beside output)."""
    fit_rank: int = Field(16, ge=1)
    """frames: its rank."""
    fit_learning_rate: float = Field(2e-4, gt=0)
    """frames: its rate."""
    output: Path | None = None
    """The picture (PNG); with several scales, seeds or prompts: the strip, pictures beside it; with
    frames also an animation (GIF)."""
    output_dir: Path | None = None
    """input_dir: folder of the pictures and of contact_sheet.png."""
    html: bool = False
    """Also write page.html beside the sheet: a divider to drag, a slider over the scales."""
    device: str | None = None
    """cuda, cpu, mps ...; null: the fastest there is."""
    dtype: Literal["bf16", "fp32"] | None = None
    """null: bf16, on a CPU fp32. The VAE is always fp32."""

    @field_validator("seed", "scales", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """ "0,1,2" -> ["0", "1", "2"], alone or in a list."""
        parts = value if isinstance(value, list) else [value]
        if value is None:
            return None
        return [p for part in parts for p in (part.split(",") if isinstance(part, str) else [part])]


class SliderConfig(FluxConfig):
    """generate.py with the file of train_pairedit.py (--c NAME): the sliders it trains.

    What only training reads is left aside.
    """

    # which sliders
    python_name: Literal[
        "train_image",
        "train_image_wocontent",
        "train_image_wocfg",
        "train_image_fm",
        "train_image_sliders",
        "train_image_real",
        "slider_text",
    ] = "train_image"
    """The variant: a name of LOSSES."""
    datasets_folder: Path = Path("datasets")
    """<datasets_folder>/<data set>/<source_folder>/<stem>.* and .../<target_folder>/<stem>.*"""
    datasets: list[str] = Field(["age"], min_length=1)
    """Concepts, trained one after another (slider_text: only names)."""
    source_folder: str = "source"
    """Before."""
    image_ids: list[str] = []
    """train_image_real: stems in source_folder, a LoRA each."""
    cfg_eta: float = 4.0
    """eta: how far the target lies beyond the pair's difference, which makes up for the steps
    that inference skips."""
    noise_scales: list[float] = Field([1.0], min_length=1)
    """beta of the content-preserving schedule x + sigma beta noise; a run each."""
    train_method: Literal["full", "xattn", "xattn-strict"] = "full"
    """full: both factors of the attention layers. xattn: the upper one stays at random orthonormal
    columns. xattn-strict: that, on keys and values only."""
    train_iteration: int = Field(500, ge=1)
    """Optimizer steps of a run."""
    train_start: int = Field(1, ge=0)
    """Number of the first version."""
    train_count: int = Field(1, ge=1)
    """How many versions: repeats with other draws."""
    seed: int = 0
    """Every draw belongs to (seed, version, step)."""
    config_name: str = Field("base", pattern=r"^[^/\\]+$")
    """Free tag, enters names."""
    output_folder: Path = Path("output/models/image/")
    """<output_folder>/<data set>/<run>/ holds everything a run leaves."""

    # what to draw
    use_trained_lora_path: bool = False
    """Take trained_lora_path instead of what this file trains."""
    trained_lora_path: str = ""
    """A LoRA file (train_image_real: of the inversion)."""
    prompt: list[str] = Field(["image of a person"], min_length=1)
    """Entry k for data set k, the last one for the rest."""
    use_prompts_file: bool = False
    """A line of prompts_file for each picture instead of `prompt`."""
    prompts_file: list[str] = Field(["prompts-person.yaml"], min_length=1)
    """Files in configs/prompts/ (or paths): YAML lists; entry k for data set k."""
    scales: list[float] = Field([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], min_length=1)
    """Positions of the slider; "0,0.5,1" or a list. Negative ones reverse the change."""
    skips: list[int] = Field([14], min_length=1)
    """The slider acts in steps i > skip (train_image_real: i >= skip); a set of strips each."""
    start_seed_gen: int = 6666
    """First seed of the pictures."""
    count_gen: int = Field(2, ge=1)
    """How many seeds."""
    use_random_seed: bool = False
    """Seeds drawn from 0..32768 (by `seed`) instead of counted up."""
    output_folder_gen: Path = Path("output/eval/image/")
    """Where generate.py draws."""
    image_format: Literal["jpg", "png"] = "jpg"
    """jpg (quality 95) is what PairEdit writes; png loses nothing, for measurements."""
    semantic_lora_path: str = ""
    """train_image_real: the slider that edits the photo."""
    semantic_cfg_scale: float = 0.75
    """train_image_real: share of the slider's velocity, gamma."""

    @model_validator(mode="before")
    @classmethod
    def _drop(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if key not in TRAINING_ONLY}

    @field_validator("scales", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """ "0,1,2" -> ["0", "1", "2"]; one number is a list, too."""
        parts = value if isinstance(value, list) else [value]
        return [p for part in parts for p in (part.split(",") if isinstance(part, str) else [part])]

    @field_validator("datasets")
    @classmethod
    def _names(cls, value: list[str]) -> list[str]:
        if wrong := [name for name in value if name in ("", ".", "..") or set(name) & set("/\\")]:
            raise ValueError(f"'{wrong[0]}' is no name of a folder")
        if len(set(value)) < len(value):
            raise ValueError("a name is there twice")
        return value


TRAINING_ONLY = {  # settings of train_pairedit.py that change no picture once the LoRA is there
    "mixed_precision", "gradient_checkpointing", "cache_dir", "target_folder", "stages",
    "stage_scales", "on_missing", "train_prompt", "target_prompt", "positive_prompt",
    "negative_prompt", "start_step", "end_step", "num_noise_seeds", "rank", "alpha",
    "learning_rate", "weight_decay", "batch_size", "save_per_steps", "resume_from_checkpoint",
    "checkpoints_total_limit", "save_original_format", "log_every", "report_to", "preview",
}  # fmt: skip


def with_named_config(argv: Sequence[str]) -> list[str]:
    """`--c NAME` and `--c=NAME` become `--config configs/NAME.yaml`, here or beside the script."""
    given = list(argv)
    for at, arg in enumerate(given):
        flag, equals, name = arg.partition("=")
        if flag != "--c":
            continue
        name = name if equals else "".join(given[at + 1 : at + 2])
        file = Path("configs") / f"{name.removesuffix('.yaml')}.yaml"
        beside = Path(__file__).parent / file
        place = beside if beside.exists() and not file.exists() else file
        return [*given[:at], "--config", str(place), *given[at + (1 if equals else 2) :]]
    return given


# --- 2. jobs: what to make, checked before the model loads ----------------------------------------


class Job(NamedTuple):
    """One row: references, instruction, and where the pictures go."""

    name: str
    images: tuple[Path, ...]
    prompt: str
    seeds: tuple[int, ...]
    folder: Path


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


def parse_lora(text: str) -> tuple[Path, float]:
    """ "FILE" or "FILE:scale" -> (file, scale)."""
    head, colon, tail = text.rpartition(":")
    if colon and not Path(text).exists():
        with contextlib.suppress(ValueError):
            return Path(head), float(tail)
    return Path(text), 1.0


def read_lora_about(path: Path) -> dict[str, Any]:
    """What the trainer wrote into the file; {} for a LoRA from elsewhere. Raises ValueError."""
    if path.is_dir():
        there = ", ".join(sorted(file.name for file in path.glob("*.safetensors"))) or "none"
        raise ValueError(f"--lora {path}: a folder; name one of its .safetensors files ({there})")
    if path.suffix != ".safetensors":
        hint = "; after the colon a number is wanted" if ".safetensors:" in path.name else ""
        raise ValueError(f"--lora {path}: only .safetensors files are loaded{hint}")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("image_edit_lora", "{}"))
            if not any("transformer_blocks" in name for name in file.keys()):  # noqa: SIM118
                raise ValueError(f"--lora {path}: no LoRA for this transformer")
            return about
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"--lora {path}: {error}") from error


def is_of_unet(path: Path) -> bool:
    """A LoRA of Stable Diffusion: its transformer blocks lie in `attentions` of a UNet."""
    with safe_open(path, framework="pt") as file:
        return any("attentions" in name for name in file.keys())  # noqa: SIM118 (not a dict)


COLUMNS = ("images", "image", "prompt", "name", "seed")


def read_table(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of a .csv or .jsonl table and their problems; relative paths: from here or the table."""
    rows: list[Any] = []
    problems: list[str] = []
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            rows = list(csv.DictReader(text.splitlines()))
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            problems.append(f"--table {path}: a .csv or .jsonl file is wanted")
        if not rows and not problems:
            problems.append(f"--table {path}: no row in it")
    except (OSError, ValueError) as error:
        problems.append(f"--table {path}: {error}")
    good = []
    for number, row in enumerate(rows, 1):
        wrong = check_row(row)
        problems += [f"{path} row {number}: {problem}" for problem in wrong]
        if wrong:
            continue
        images = row.get("images") or row.get("image")
        images = images.split(";") if isinstance(images, str) else images
        row["images"] = [p if (p := Path(i.strip())).exists() else path.parent / p for i in images]
        good.append(row)
    return good, problems


def check_row(row: Any) -> list[str]:
    """Problems of one row of a table."""
    if not isinstance(row, dict):
        return [f'wanted {{"images": [...], "prompt": "..."}}, got {str(row)[:40]}']
    problems = []
    for key in set(row) - set(COLUMNS):
        close = difflib.get_close_matches(str(key), COLUMNS, n=1)
        hint = f", did you mean '{close[0]}'?" if close else f"; there is {', '.join(COLUMNS)}"
        problems.append(f"unknown column '{key}'{hint}")
    images = row.get("images") or row.get("image")
    names = images if isinstance(images, list) else [images]
    if not images or not all(isinstance(name, str) for name in names):
        problems.append("no image")
    if not str(row.get("seed") or 0).strip().isdigit():
        problems.append(f"seed '{row['seed']}' is no whole number")
    return problems


def check_ways(config: Config) -> list[str]:
    """Problems of what to edit and where results go."""
    problems = []
    ways = [f"--{way}" for way in ("image", "input_dir", "table") if getattr(config, way)]
    if len(ways) != 1:
        given = ", ".join(ways) or "none"
        problems.append(f"give one of --image, --input_dir, --table (given: {given})")
    if config.image and not config.output:
        problems.append("--image needs --output FILE.png")
    if config.output and config.output.suffix.lower() != ".png":
        problems.append(f"--output {config.output}: wanted a .png, which keeps the settings")
    if (config.input_dir or config.table) and not config.output_dir:
        problems.append("--input_dir and --table need --output_dir")
    if config.input_dir and not config.input_dir.is_dir():
        problems.append(f"--input_dir: no folder {config.input_dir}")
    return problems


def find_rows(config: Config) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows {images, prompt, name, seed} from whichever source is given, and their problems."""
    if config.image and config.output:
        return [{"images": config.image, "name": config.output.stem}], []
    if config.table:
        return read_table(config.table)
    if config.input_dir and config.input_dir.is_dir():
        found = list_images(config.input_dir)
        rows = [{"images": [Path(e.path)], "name": stem} for stem, es in found.items() for e in es]
        return rows, [] if rows else [f"--input_dir {config.input_dir}: no picture in it"]
    return [], []


def make_jobs(config: Config) -> tuple[list[Job], list[str]]:
    """All rows as jobs, and everything wrong with them."""
    rows, problems = find_rows(config)
    problems = check_ways(config) + problems
    folder = config.output.parent if config.image and config.output else config.output_dir
    jobs = []
    for row in rows:
        images = tuple(row["images"])
        problems += [f"no picture {image}" for image in images if not Path(image).is_file()]
        prompt = row.get("prompt") or config.prompt
        beside = images[0].with_suffix(".txt") if images else None
        if not prompt and beside and beside.is_file():
            prompt = beside.read_text(encoding="utf-8-sig").strip()
        name = str(row.get("name") or "+".join(image.stem for image in images))
        if not prompt:
            problems.append(f"{name}: no prompt (--prompt, a prompt column, or a .txt beside it)")
        seeds = (int(row["seed"]),) if row.get("seed") not in (None, "") else tuple(config.seed)
        jobs.append(Job(name, images, prompt or "", seeds, folder or Path()))
    return jobs, problems + check_results(config, jobs)


def picture_paths(config: Config, job: Job) -> list[tuple[int, float, Path]]:
    """(seed, scale, file) of every picture of a job."""
    found = []
    for seed in job.seeds:
        for times in config.scales or [1.0]:
            name = job.name + (f"_seed{seed}" if len(job.seeds) > 1 else "")
            name += f"_scale{times:g}" if config.scales else ""
            found.append((seed, times, job.folder / f"{name}.png"))
    return found


def sheet_path(config: Config) -> Path:
    """Where the strip or contact sheet goes."""
    if config.image and config.output:
        return config.output
    return (config.output_dir or Path()) / "contact_sheet.png"


def check_results(config: Config, jobs: Sequence[Job]) -> list[str]:
    """Results must not meet each other, leave their folder or overwrite a reference."""
    files = [path for job in jobs for _, _, path in picture_paths(config, job)]
    problems = [
        f"'{job.name}': a name must stay inside the output folder"
        for job in jobs
        if Path(job.name).is_absolute() or ".." in Path(job.name).parts
    ]
    if len(files) > 1:
        files.append(sheet_path(config))
    seen = Counter(path.resolve() for path in files)
    inputs = {Path(image).resolve() for job in jobs for image in job.images}
    problems += [f"two results are called {path}" for path, count in seen.items() if count > 1]
    problems += [f"{path} would be overwritten: it is a reference" for path in inputs & set(seen)]
    problems += [
        f"{path} is a folder; wanted the name of a picture" for path in seen if path.is_dir()
    ]
    return problems


def check_writable(folder: Path) -> list[str]:
    """One problem if nothing can be written there, or where the folder is going to be made."""
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            return []
    except OSError as error:
        return [f"results cannot be written to {folder}: {error}"]


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


def check(config: Config) -> list[str]:
    """Problems that can be seen without a model."""
    jobs, problems = make_jobs(config)
    for path in sorted({Path(image) for job in jobs for image in job.images}):
        try:
            with Image.open(path) as image:
                image.load()
        except FileNotFoundError:
            pass  # make_jobs has named it
        except (OSError, SyntaxError, ValueError) as error:
            problems.append(f"picture {path} cannot be read: {error}")
    flavour = ""
    try:
        flavour = detect_flavour(config.pretrained_model_name_or_path).name
    except UserError as error:
        problems.append(f"--pretrained_model_name_or_path: {error}")
    for text in config.lora:
        path, _ = parse_lora(text)
        try:
            trained = read_lora_about(path).get("flavour", flavour)
            if is_of_unet(path):
                problems.append(f"--lora {path}: made for Stable Diffusion, this model has no UNet")
            if flavour and trained != flavour:
                print(f"note: {path} was trained on {trained}, this model is {flavour}")
        except ValueError as error:
            problems.append(str(error))
    if flavour == "edit-v1" and any(len(job.images) > 1 for job in jobs):
        problems.append("2508 takes one reference; 2509 and 2511 take more")
    problems += check_device("--device", config.device)
    problems += check_writable(config.output_dir or (config.output or Path()).parent)
    if config.scales and not config.lora:
        problems.append("--scales needs a --lora")
    if (config.height is None) != (config.width is None):
        problems.append("give both --height and --width, or none")
    return problems


# --- 3. sizes: references as the LoRA was trained -------------------------------------------------


class Rule(NamedTuple):
    """How large references are, and why."""

    reference_area: str | int  # 1mp | target | px
    vision_area: int | None  # px; None: the pipeline's own
    resolution: int | None  # training resolution, px
    instruction: str | None  # system instruction; None: the model's own
    why: str


def reference_rule(config: Config) -> Rule:
    """From --reference_area, else from the LoRA files. Raises UserError if they disagree."""
    about = {text: read_lora_about(parse_lora(text)[0]) for text in config.lora}
    known = {text: values for text, values in about.items() if values}
    first: dict[str, Any] = next(iter(known.values()), {})
    area, why = first.get("reference_area", "1mp"), "as the LoRA was trained"
    if config.reference_area != "lora":
        area, why = config.reference_area, "as --reference_area says"
    elif not known:
        why = "as the stock pipeline does"
    for name in ("reference_area", "vision_area", "instruction"):
        values = {text: values.get(name) for text, values in known.items()}
        if len(set(values.values())) > 1 and config.reference_area == "lora":
            lines = "\n  ".join(f"{text}: {value}" for text, value in values.items())
            raise UserError(
                f"the LoRAs were trained with different {name}; set --reference_area to go by the "
                f"first one\n  {lines}"
            )
    names = ("vision_area", "resolution", "instruction")
    vision, resolution, instruction = (first.get(name) for name in names)
    return Rule(area, vision, resolution, instruction, why)


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


def crop(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """Cut out a box given relative to the picture, at whole pixels."""
    left, top, right, bottom = box
    w, h = image.size
    return image.crop((round(left * w), round(top * h), round(right * w), round(bottom * h)))


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


@contextlib.contextmanager
def reference_sizes(pipeline: Any, area_px: int, vision_area: int | None) -> Iterator[None]:
    """Let the pipeline encode references at `area_px` (VAE) and `vision_area` (text encoder).

    The pipelines read these from their module: two constants (Plus), or the first argument of
    calculate_dimensions (2508, one size for both).
    """
    module: Any = importlib.import_module(type(pipeline).__module__)
    if hasattr(module, "VAE_IMAGE_SIZE"):
        change: dict[str, Any] = {"VAE_IMAGE_SIZE": area_px}
        change |= {"CONDITION_IMAGE_SIZE": vision_area or VISION_AREA}
    else:
        original = module.calculate_dimensions
        change = {"calculate_dimensions": lambda area, ratio: original(area_px, ratio)}
    before = {name: getattr(module, name) for name in change}
    try:
        for name, value in change.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


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


def output_size(config: Config, rule: Rule, image: Image.Image) -> tuple[int, int]:
    """(W, H) px of the result."""
    if config.width and config.height:
        return config.width, config.height
    if rule.reference_area == "target" and rule.resolution:
        return nearest_bucket(image.width, image.height, rule.resolution)
    return pick_size(AREA_1MP, image.width / image.height)


# --- 4. pipeline ----------------------------------------------------------------------------------


def pick_device(name: str | None) -> torch.device:
    """The named one, or the fastest there is."""
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device(name) if name else here or torch.device("cpu")


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """bf16 | fp32; None: fp32 on a CPU, else bf16."""
    bf16 = name == "bf16" or (name is None and device.type != "cpu")
    return torch.bfloat16 if bf16 else torch.float32


def has_torchvision() -> bool:
    """transformers' stock video processor, which nothing here needs, wants torchvision."""
    return importlib.util.find_spec("torchvision") is not None


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


def load_lora(pipeline: Any, path: Path, name: str) -> None:
    """load_lora_weights; it refuses LoKr files, which the transformer takes."""
    with safe_open(path, framework="pt") as file:
        lokr = any(".lokr_" in key for key in file.keys())  # noqa: SIM118 (not a dict)
    if not lokr:
        try:
            pipeline.load_lora_weights(str(path), adapter_name=name)
        except RuntimeError as error:  # sizes that do not fit, all of them on many lines
            lines = str(error).strip().splitlines()
            raise UserError(
                f"--lora {path} does not fit this model: {lines[-1].strip()}"
            ) from error
        return
    tensors, metadata = pipeline.lora_state_dict(
        str(path), use_safetensors=True, return_lora_metadata=True
    )
    pipeline.load_lora_into_transformer(
        tensors, pipeline.transformer, adapter_name=name, metadata=metadata, _pipeline=pipeline
    )


def load_pipeline(config: Config) -> Any:
    """The checkpoint's own pipeline with all LoRAs (named lora0, lora1 ...), on its device."""
    import diffusers

    folder = Path(config.pretrained_model_name_or_path)
    if not folder.is_dir():
        folder = fetch_checkpoint(config.pretrained_model_name_or_path)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        folder, processor=load_processor(folder / "processor"), dtype=dtype, use_safetensors=True
    )
    if type(pipeline).__name__ not in ("QwenImageEditPipeline", "QwenImageEditPlusPipeline"):
        raise UserError(f"{folder} is a {type(pipeline).__name__}, no Qwen-Image-Edit checkpoint")
    for number, text in enumerate(config.lora):
        load_lora(pipeline, parse_lora(text)[0], f"lora{number}")
    pipeline.set_progress_bar_config(leave=False)
    if config.offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif config.offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        pipeline.to(device)
    return pipeline


def set_scales(pipeline: Any, config: Config | SDConfig, times: float) -> None:
    """Every LoRA at its own scale times `times`; 0 is the bare base model."""
    if not config.lora:
        return
    if times == 0:
        pipeline.disable_lora()
        return
    pipeline.enable_lora()
    names = [f"lora{number}" for number in range(len(config.lora))]
    weights = [parse_lora(text)[1] * times for text in config.lora]
    pipeline.set_adapters(names, adapter_weights=weights)


# --- 5. pictures ----------------------------------------------------------------------------------


def open_references(
    config: Config, job: Job, size: tuple[int, int], rule: Rule
) -> list[Image.Image]:
    """The pictures; with references at the output's size, cropped to its aspect as in training."""
    images = [open_rgb(path) for path in job.images]
    if rule.reference_area != "target":
        return images
    wanted = size[0] / size[1]
    aspects = [image.width / image.height for image in images]
    # the frame that references share: the last one's, or of the one nearest to --width x --height
    aspect = min(aspects, key=lambda a: abs(math.log(a / wanted))) if config.width else aspects[-1]

    def cut(image: Image.Image) -> Image.Image:
        own = image.width / image.height
        return crop(image, cover_box(own, wanted)) if abs(math.log(own / aspect)) < 0.02 else image

    return [cut(image) for image in images]


def settings_of(
    config: Config, rule: Rule, job: Job, seed: int, times: float, size: tuple[int, int]
) -> dict[str, Any]:
    """All that decides the pixels of one picture; written into its PNG."""
    return {
        "model": config.pretrained_model_name_or_path,
        "loras": [
            {"file": str(p), "scale": s * times, "blake2b": hash_file(p)}
            for p, s in map(parse_lora, config.lora)
        ],
        "images": [{"file": str(path), "blake2b": hash_file(path)} for path in job.images],
        "prompt": job.prompt,
        "negative_prompt": config.negative_prompt,
        "seed": seed,
        "num_inference_steps": config.num_inference_steps,
        "true_cfg_scale": config.true_cfg_scale,
        "width": size[0],
        "height": size[1],
        "reference_area": rule.reference_area,
        "vision_area": rule.vision_area,
        "instruction": rule.instruction,
        "dtype": config.dtype,
    }


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings inside a finished picture; None if there is none, or from elsewhere."""
    try:
        with Image.open(path) as image:
            return json.loads(image.info.get(SETTINGS_KEY) or image.info.get("comment", "null"))
    except (OSError, SyntaxError, ValueError):
        return None


def save_picture(path: Path, image: Image.Image, settings: dict[str, Any]) -> None:
    """PNG or JPEG with its settings (text chunk or comment), complete or absent."""
    text = json.dumps(settings, ensure_ascii=False)
    info = PngInfo()
    info.add_itxt(SETTINGS_KEY, text)
    options: dict[str, Any] = {"format": "PNG", "pnginfo": info}
    if path.suffix == ".jpg":
        options = {"format": "JPEG", "quality": 95, "comment": text.encode()}
    save_atomic(path, lambda file: image.save(file, **options))


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


def run_pipeline(
    pipeline: Any, references: Sequence[Image.Image], settings: dict[str, Any]
) -> Image.Image:
    """One picture."""
    plus = type(pipeline).__name__ == "QwenImageEditPlusPipeline"
    width, height, area = settings["width"], settings["height"], settings["reference_area"]
    area_px = {"1mp": AREA_1MP, "target": width * height}.get(str(area), area)
    guided = settings["true_cfg_scale"] > 1
    with (
        reference_sizes(pipeline, int(area_px), settings["vision_area"]),
        system_instruction(pipeline, settings["instruction"]),
    ):
        return pipeline(
            image=list(references) if plus else references[0],
            prompt=settings["prompt"],
            negative_prompt=settings["negative_prompt"] if guided else None,
            true_cfg_scale=settings["true_cfg_scale"],
            num_inference_steps=settings["num_inference_steps"],
            width=width,
            height=height,
            generator=torch.Generator().manual_seed(settings["seed"]),
        ).images[0]


def plan_pictures(config: Config, rule: Rule, jobs: Sequence[Job]) -> list[list[tuple[Path, dict]]]:
    """Per job its pictures: (file, settings) for every seed and scale."""
    plan = []
    for job in jobs:
        with Image.open(job.images[-1]) as image:
            size = output_size(config, rule, ImageOps.exif_transpose(image))
        pictures = []
        for seed, times, path in picture_paths(config, job):
            settings = settings_of(config, rule, job, seed, times, size)
            pictures.append((path, settings | {"times": times}))
        plan.append(pictures)
    return plan


def generate(config: Config) -> None:
    """Make what is missing, then the strip or contact sheet."""
    jobs, _ = make_jobs(config)
    rule = reference_rule(config)
    print(f"references: {rule.reference_area}, {rule.why}")
    plan = plan_pictures(config, rule, jobs)
    todo = [
        (job, path, settings)
        for job, pictures in zip(jobs, plan, strict=True)
        for path, settings in pictures
        if read_settings(path) != settings
    ]
    total = sum(len(pictures) for pictures in plan)
    print(f"{total} picture(s), {total - len(todo)} already there")
    pipeline = load_pipeline(config) if todo else None
    for job, path, settings in tqdm(todo, "generate", unit="picture"):
        set_scales(pipeline, config, settings["times"])
        references = open_references(config, job, (settings["width"], settings["height"]), rule)
        save_picture(path, run_pipeline(pipeline, references, settings), settings)
    rows = page_rows(config, jobs, plan)
    if total > 1:
        write_sheet(config, rows)
    if config.html:
        write_pages({sheet_path(config).parent / "page.html": rows})


def page_rows(config: Config, jobs: Sequence[Job], plan: Sequence[Sequence[Any]]) -> list[PageRow]:
    """A row per job and seed: its references, then the picture at every scale."""
    heads = [f"scale {times:g}" for times in config.scales or [1.0]]
    rows = []
    for job, pictures in zip(jobs, plan, strict=True):
        columns = {f"reference {i + 1}": path for i, path in enumerate(job.images)}
        for start in range(0, len(pictures), len(heads)):
            part = pictures[start : start + len(heads)]
            drawn = dict(zip(heads, (path for path, _ in part), strict=True))
            rows.append(PageRow(job.name, columns | drawn, job.prompt, part[0][1]["seed"]))
    return rows


def write_sheet(config: Config, rows: Sequence[PageRow]) -> None:
    """References, then every scale side by side."""
    heads = max((list(row.columns) for row in rows), key=len)  # of the row with most references
    pictures = [
        [open_rgb(row.columns[head]) if head in row.columns else None for head in heads]
        for row in rows
    ]
    captions = [f"{row.name}, seed {row.seed}: {row.prompt}" for row in rows]
    sheet = contact_sheet(pictures, heads, captions)
    path = sheet_path(config)
    save_atomic(path, lambda file: sheet.save(file, format="PNG"))
    print(f"sheet: {path}")


def write_pages(pages: Mapping[Path, Sequence[PageRow]]) -> None:
    """Each page of its rows, titled by its folder."""
    for path, rows in pages.items():
        write_page(path, path.resolve().parent.name, rows)
        print(f"page: {path}")


# --- 6. FLUX.1 and LoRA files ---------------------------------------------------------------------


class Text(NamedTuple):
    """A prompt as FLUX takes it."""

    embed: torch.Tensor  # (1, T, 4096), T5
    pooled: torch.Tensor  # (1, 768), CLIP


def load_vae(folder: Path, device: torch.device) -> Any:
    """AutoencoderKL in fp32: the pair's difference is multiplied by eta, and rounding with it."""
    import diffusers

    vae_class = diffusers.AutoencoderKL
    vae = vae_class.from_pretrained(folder, subfolder="vae", dtype=torch.float32)
    return vae.to(device).eval().requires_grad_(False)


@torch.no_grad()
def encode_pixels(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1] -> latents (B, C, h, w): (posterior mode - shift) * scaling."""
    mode = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    return (mode.float() - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> pixels (B, 3, H, W), about [-1, 1]."""
    latents = latents.to(vae.device, vae.dtype)
    return vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample


def load_text_encoders(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A FluxPipeline that can only encode prompts."""
    import diffusers

    pipeline = diffusers.FluxPipeline.from_pretrained(
        folder, transformer=None, vae=None, dtype=dtype
    )
    return pipeline.to(device)


@torch.no_grad()
def encode_prompt_flux(pipeline: Any, prompt: str, max_sequence_length: int) -> Text:
    """T5 states and CLIP's pooled state, as the pipeline makes them."""
    embed, pooled, _ = pipeline.encode_prompt(
        prompt=prompt, prompt_2=None, max_sequence_length=max_sequence_length
    )
    return Text(embed, pooled)


# differs: diffusers' names
QUANTO_TYPES = {"fp8": "float8", "int8": "int8", "int4": "int4", "int2": "int2"}


# Behind the precisions that end so: (module, its name for pip).
PACKAGES = {"quanto": ("optimum.quanto", "optimum-quanto"), "bnb": ("bitsandbytes", "bitsandbytes")}
QUANTO_EXTENSIONS = ("quanto_cpp", "quanto_cuda", "quanto_hip", "quanto_mps")
QUANTO_TYPES = {"fp8": "qfloat8", "int8": "qint8", "int4": "qint4", "int2": "qint2"}
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


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


def return_freed_memory() -> None:
    """Give the holes that large tensors have left between small ones back to the system.

    KEEP: else the process ends up larger than the model in full precision, for glibc holds them.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


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


def empty_flux(settings: dict[str, Any]) -> Any:
    """FluxTransformer2DModel without weights (meta device)."""
    import diffusers
    from accelerate import init_empty_weights

    with init_empty_weights():
        return diffusers.FluxTransformer2DModel.from_config(settings)


def load_flux(folder: Path, precision: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The frozen transformer; blocks go from disk to the device and are quantised one by one.

    Without quantisation it equals from_pretrained(dtype=dtype) bit for bit.

    Raises:
        UserError: weights are missing, damaged or of another model.
    """
    model = empty_flux(read_model_json(str(folder), "transformer/config.json"))
    weights = find_weights(folder / "transformer")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_weights({name: shape for name, (_, shape) in weights.items()}, shapes)
    blocks = [
        name for name, part in model.named_children() if isinstance(part, torch.nn.ModuleList)
    ]
    numbered = [f"{name}.{i}" for name in blocks for i in range(len(model.get_submodule(name)))]
    others = [name for name, _ in model.named_children() if name not in blocks]
    for name in progress([*others, *numbered], "load transformer", leave=False):
        part = model.get_submodule(name)
        files = {file for key, (file, _) in weights.items() if key.startswith(f"{name}.")}
        tensors = {}
        for path in files:  # KEEP: open only for this part; what was read counts as memory
            with safe_open(path, framework="pt") as file:
                for key in (k for k, (f, _) in weights.items() if f == path):
                    if key.startswith(f"{name}."):
                        tensor = file.get_tensor(key).to(device, dtype, copy=True)
                        tensors[key.removeprefix(f"{name}.")] = tensor
        part.load_state_dict(tensors, assign=True)
        if name in numbered and precision != "no_change":
            quantize_layers(part, precision)
        return_freed_memory()
    return model.eval().requires_grad_(False)


def quantize_layers(part: torch.nn.Module, precision: str) -> None:
    """Replace the linear layers of a block by quantised ones on the same device."""
    linear = [name for name, x in part.named_modules() if isinstance(x, torch.nn.Linear)]
    for name in linear:
        layer: Any = part.get_submodule(name)
        nf4 = precision == "nf4-bnb"
        part.set_submodule(name, quantize_nf4(layer) if nf4 else quantize_quanto(layer, precision))


def progress(items: Iterable[Any] | None, label: str, **options: Any) -> Any:
    """A progress bar on the first process, none on the others."""
    options["disable"] = options.get("disable", False) or os.environ.get("RANK", "0") != "0"
    return tqdm(items, desc=label, **options)


class On(NamedTuple):
    """An adapter that is switched on for a part of the batch."""

    adapter: str
    scale: float | torch.Tensor = 1.0  # or one for each sample, (b,)
    frozen: bool = False  # its weights get no gradient from these samples


Lane = tuple[On, ...]  # what is on for one of the equal parts of a batch; () is the base model


class Switchboard:
    """Which adapters are on; all SliderLinear layers of a transformer look here.

    KEEP: lanes change only between a backward and the next forward. Gradient checkpointing runs
    the forward again during backward, and must find the same lanes.
    """

    def __init__(self) -> None:
        self.lanes: Sequence[Lane] = [()]


class SliderLinear(torch.nn.Module):
    """A frozen linear layer and its adapters: base(x) + sum of scale * strength * up(down(x)).

    The batch is cut into as many equal parts as there are lanes, so one forward pass can serve
    samples with different adapters. What is off costs nothing.
    """

    def __init__(self, base: Any, board: Switchboard) -> None:
        super().__init__()
        self.base, self.board = base, board
        self.down, self.up = torch.nn.ParameterDict(), torch.nn.ParameterDict()  # (r, in), (out, r)
        self.strength: dict[str, float] = {}  # alpha / r

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, ..., in) -> (B, ..., out)."""
        y = self.base(x)
        lanes = self.board.lanes
        if not any(on.adapter in self.down for lane in lanes for on in lane):
            return y
        parts = zip(x.chunk(len(lanes)), y.chunk(len(lanes)), lanes, strict=True)
        return torch.cat([self._changed(a, b, lane) for a, b, lane in parts])

    def _changed(self, x: torch.Tensor, y: torch.Tensor, lane: Lane) -> torch.Tensor:
        for on in lane:
            if on.adapter not in self.down:
                continue
            down, up = self.down[on.adapter], self.up[on.adapter]
            if on.frozen:
                down, up = down.detach(), up.detach()
            change = F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))
            scale = on.scale * self.strength[on.adapter]
            if isinstance(scale, torch.Tensor):
                scale = scale.to(x).view(-1, *[1] * (x.dim() - 1))
            y = y + scale * change
        return y


def slider_layers(transformer: Any, name: str) -> dict[str, SliderLinear]:
    """{path: layer} of those that have the adapter `name`."""
    return {
        path: layer
        for path, layer in transformer.named_modules()
        if isinstance(layer, SliderLinear) and name in layer.down
    }


def add_slider(
    transformer: Any, board: Switchboard, name: str, factors: dict[str, Any], strength: float
) -> None:
    """Give layers an adapter. factors: {path: (down (r, in), up (out, r))}, fp32.

    Raises:
        UserError: no such layer, or another shape; the message names the first three.
    """
    layers = dict(transformer.named_modules())
    wrong = []
    for path, (down, up) in factors.items():
        layer = layers.get(path)
        inner = layer.base if isinstance(layer, SliderLinear) else layer
        shape = getattr(inner, "out_features", None), getattr(inner, "in_features", None)
        if shape != (up.shape[0], down.shape[1]) or down.shape[0] != up.shape[1]:
            wrong.append(f"{path}: {shape} here, {(up.shape[0], down.shape[1])} in the LoRA")
    if wrong:
        raise UserError(f"{len(wrong)} layers do not fit this transformer\n{listed(wrong, 3)}")
    device = transformer.device
    for path, (down, up) in factors.items():
        layer = layers[path]
        if not isinstance(layer, SliderLinear):
            layer = SliderLinear(layer, board)
            transformer.set_submodule(path, layer)
        layer.down[name] = torch.nn.Parameter(down.to(device, torch.float32, copy=True))
        layer.up[name] = torch.nn.Parameter(up.to(device, torch.float32, copy=True))
        layer.strength[name] = strength


def drop_sliders(transformer: Any) -> None:
    """Take every adapter off again."""
    for layer in transformer.modules():
        if isinstance(layer, SliderLinear):
            layer.down.clear()
            layer.up.clear()


def nearest(name: str, names: Iterable[str]) -> str:
    """' (did you mean ...?)' or the list of what there is."""
    names = list(names)
    if close := difflib.get_close_matches(name, names, n=1, cutoff=0.4):
        return f", did you mean '{close[0]}'?"
    return f" (there is: {', '.join(names[:10]) or 'none'}{', ...' if len(names) > 10 else ''})"


def find_lora(path: Path, allow_pickle: bool) -> Path:
    """The file to load: instead of a .pt that may not be loaded the .safetensors beside it.

    Raises:
        UserError: no such file, or a pickle that was not allowed.
    """
    if allow_pickle and path.is_file():
        return path
    pair = [path.with_suffix(".safetensors"), path.with_suffix(".pt")]
    files = [f for f in (pair if path.suffix in (".safetensors", ".pt") else [path]) if f.is_file()]
    if not files:
        there = [file.name for file in path.parent.glob("*.safetensors")]
        raise UserError(f"no LoRA file {path}{nearest(path.name, sorted(there))}")
    if files[0].suffix != ".safetensors" and not allow_pickle:
        raise UserError(
            f"{files[0]} is a pickle, not loaded unless you say --allow_pickle true (only tensors "
            "are read); tools/convert_lora.py makes a .safetensors of it"
        )
    return files[0]


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file or a pickle of tensors. Raises UserError."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = file.keys()  # not a dict
                return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise many kinds
        raise UserError(f"LoRA {path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(tensors, dict) or not all(torch.is_tensor(x) for x in tensors.values()):
        raise UserError(f"LoRA {path}: wanted a dict of tensors")
    return tensors, {}


FACTORS = {
    ".lora_A.weight": "down",
    ".lora_down.weight": "down",
    ".lora_B.weight": "up",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}


LOST = re.compile(r"dora|^lora_te|^text_encoder|diff")  # what diffusers' conversion leaves out


def sort_keys(
    tensors: dict[str, torch.Tensor], transformer: Any
) -> tuple[dict[str, dict[str, torch.Tensor]], list[str]]:
    """{layer: {"down", "up", "alpha"}} and the names that belong to no layer here.

    Layers are named as in the model, with or without "transformer.", or as in PairEdit's files.
    KEEP: its names are made from the layers; underscores cannot be turned back into dots.
    """
    names: dict[str, str] = {}
    for path, _ in transformer.named_modules():
        original = "lora_unet_" + path.replace(".", "_")
        names |= dict.fromkeys((path, f"transformer.{path}", original), path)
    found: dict[str, dict[str, torch.Tensor]] = {}
    left = []
    for key, tensor in tensors.items():
        end = next((end for end in FACTORS if key.endswith(end)), None)
        layer = names.get(key.removesuffix(end)) if end else None
        if end and layer:
            found.setdefault(layer, {})[FACTORS[end]] = tensor
        else:
            left.append(key)
    return found, left


def lora_strength(layer: str, parts: dict[str, torch.Tensor], settings: dict[str, Any]) -> float:
    """alpha / rank: by the file's own .alpha, else its PEFT settings, else 1."""
    rank = parts["down"].shape[0]
    if "alpha" in parts:
        return float(parts["alpha"]) / rank
    if "lora_alpha" not in settings:
        return 1.0
    own = (settings.get("alpha_pattern") or {}).items()  # PEFT: an ending of the name, a regex
    fits = (alpha for ending, alpha in own if re.fullmatch(rf"(.*\.)?({ending})", layer))
    alpha = next(fits, settings["lora_alpha"])
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def read_slider(
    path: Path, transformer: Any, allow_pickle: bool = False
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A LoRA file as {layer: (down (r, in), up (out, r))}, fp32; its strength is folded into up.

    Takes diffusers/PEFT files, those of PairEdit and Concept Sliders (lora_unet_*), and what
    FluxPipeline.lora_state_dict converts (kohya, XLabs, Black Forest Labs ...).

    Raises:
        UserError: not readable, or tensors in it that are no part of a LoRA for this transformer.
    """
    import diffusers

    tensors, metadata = read_tensors(find_lora(path, allow_pickle))
    found, left = sort_keys(tensors, transformer)
    if left and not any(LOST.search(key) for key in left):
        with contextlib.suppress(Exception):  # converters raise many kinds; `left` tells the user
            converted, alphas = diffusers.FluxPipeline.lora_state_dict(
                dict(tensors), return_alphas=True
            )
            found, left = sort_keys(converted | (alphas or {}), transformer)
    left += [layer for layer, parts in found.items() if not {"down", "up"} <= parts.keys()]
    if left or not found:
        raise UserError(
            f"LoRA {path}: {len(left)} of {len(tensors)} tensors are no part of a LoRA for this "
            f"transformer\n{listed(left, 3)}"
        )
    prefix = "transformer."
    settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    settings = {key.removeprefix(prefix): value for key, value in settings.items()}
    return {
        layer: (parts["down"].float(), parts["up"].float() * lora_strength(layer, parts, settings))
        for layer, parts in found.items()
    }


PUBLISHED_TRANSFORMER = {"guidance_embeds": True}  # the rest of its config are the class's defaults


def flux_layers(name: str) -> Any:
    """The transformer of a checkpoint without weights; the published one needs no network."""
    if name == PUBLISHED_MODEL and not Path(name).is_dir():
        return empty_flux(PUBLISHED_TRANSFORMER)
    return empty_flux(read_model_json(name, "transformer/config.json"))


# --- 7. sampling with sliders ---------------------------------------------------------------------


def to_pixels(image: Image.Image) -> torch.Tensor:
    """RGB -> (1, 3, H, W) fp32 in [-1, 1]."""
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = data.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255.0
    return (2.0 * pixels - 1.0)[None]


def to_image(pixels: torch.Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> RGB."""
    data = (pixels * 0.5 + 0.5).clamp(0, 1).float() * 255
    return Image.fromarray(data.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def model_mu(scheduler_config: Any, tokens: int) -> float:
    """The model's own resolution shift: linear in the target tokens (pipeline: calculate_shift)."""
    get = scheduler_config.get
    least, most = get("base_image_seq_len", 256), get("max_image_seq_len", 4096)
    low, high = get("base_shift", 0.5), get("max_shift", 1.15)
    slope = (high - low) / (most - least)
    return slope * tokens + low - slope * least


def sigma_table(scheduler_config: Any, steps: int, tokens: int) -> torch.Tensor:
    """The N + 1 sigmas of an inference of N steps, from 1 to 0; (N + 1,), fp32, CPU."""
    import diffusers

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(scheduler_config)
    mu = model_mu(scheduler.config, tokens)
    sigmas = np.linspace(1.0, 1 / steps, steps)
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    return scheduler.sigmas


def pack_tokens(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B, S, 4C): row by row; within a token channel, row, column."""
    b, c, h, w = latents.shape
    tokens = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(b, (h // 2) * (w // 2), 4 * c)


def unpack_tokens(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(B, S, 4C) of a grid of (rows, columns) tokens -> (B, C, h, w)."""
    b, _, channels = tokens.shape
    rows, columns = grid
    latents = tokens.view(b, rows, columns, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(b, channels // 4, 2 * rows, 2 * columns)


@functools.lru_cache(maxsize=64)
def position_ids(grid: tuple[int, int], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(S, 3): 0, row, column of every image token."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1)
    return ids.view(-1, 3).to(device, dtype)


def flux_velocity(
    transformer: Any,
    tokens: torch.Tensor,
    sigma: torch.Tensor,
    text: Text,
    grid: tuple[int, int],
    guidance_scale: float,
    guided: bool,
) -> torch.Tensor:
    """What the transformer says; tokens (B, S, 4C), sigma (B,), text of 1 or B -> (B, S, 4C) fp32.

    Arguments as FluxPipeline passes them, rounding included. guided: the model embeds guidance.
    """
    n, dtype, device = len(tokens), text.embed.dtype, tokens.device
    guidance = torch.full((n,), guidance_scale, device=device) if guided else None
    return transformer(
        hidden_states=tokens.to(dtype),
        timestep=(sigma * 1000).to(dtype) / 1000,
        guidance=guidance,
        encoder_hidden_states=text.embed.expand(n, -1, -1),
        pooled_projections=text.pooled.expand(n, -1),
        txt_ids=torch.zeros(text.embed.shape[1], 3, device=device, dtype=dtype),
        img_ids=position_ids(grid, device, dtype),
        return_dict=False,
    )[0].float()


Predict = Callable[[torch.Tensor, float | torch.Tensor, Sequence[Lane]], torch.Tensor]
"""(tokens (B, S, 4C), sigma or (B,), lanes) -> velocity (B, S, 4C)"""


class Knob(NamedTuple):
    """A slider at inference: its scale is turned by the strip's positions."""

    adapter: str
    scale: float = 1.0
    start: int = 0  # first step in which it is on
    gamma: float = 1.0  # share of its velocity when velocities are blended


def turned_velocity(
    predict: Predict,
    tokens: torch.Tensor,
    sigma: float,
    base: Lane,
    knobs: Sequence[Knob],
    positions: torch.Tensor,
    blend: bool,
) -> torch.Tensor:
    """Velocity with the knobs at `positions` (B,).

    Merged: one pass with base and all knobs on. Blended: v_base + sum of gamma (v_knob - v_base),
    where v_knob has only that knob on; K + 1 passes in one batch.
    """
    if not knobs:
        return predict(tokens, sigma, [base])
    turned: list[Lane] = [(On(knob.adapter, knob.scale * positions),) for knob in knobs]
    if not blend:
        return predict(tokens, sigma, [base + tuple(on for lane in turned for on in lane)])
    lanes = [base, *turned]
    plain, *others = predict(tokens.repeat(len(lanes), 1, 1), sigma, lanes).chunk(len(lanes))
    changes = [k.gamma * (v - plain) for k, v in zip(knobs, others, strict=True)]
    return plain + torch.stack(changes).sum(0)


def first_noise(
    seed: int, channels: int, grid: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """(1, S, 4C), fp32: the noise that FluxPipeline starts from with a CPU generator of `seed`."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn((1, channels, 2 * grid[0], 2 * grid[1]), generator=draw, dtype=dtype)
    return pack_tokens(noise).to(device, torch.float32)


@torch.no_grad()
def draw_strip(
    predict: Predict,
    noise: torch.Tensor,
    sigmas: Sequence[float],
    positions: Sequence[float],
    knobs: Sequence[Knob] = (),
    base: Lane = (),
    blend: bool = False,
    batch_size: int = 8,
) -> torch.Tensor:
    """Euler from `noise` (1, S, 4C) at every position of the slider -> (positions, S, 4C).

    Steps before the first knob are the same for all positions and are made once; the others go
    in batches. Position 0 goes alone and is what the base model draws, bit for bit.
    """
    steps = range(len(sigmas) - 1)
    first = min((knob.start for knob in knobs), default=len(steps))
    for i in steps[:first]:
        noise = noise + (sigmas[i + 1] - sigmas[i]) * predict(noise, sigmas[i], [base])
    moved = sorted({p for p in positions if p != 0})
    groups = [[0.0]] if 0 in positions else []
    groups += [moved[k : k + batch_size] for k in range(0, len(moved), batch_size)]
    drawn: dict[float, torch.Tensor] = {}
    for group in groups:
        tokens = noise.expand(len(group), -1, -1)
        turned = torch.tensor(group, device=noise.device)
        for i in steps[first:]:
            live = [knob for knob in knobs if knob.start <= i and any(group)]
            velocity = turned_velocity(predict, tokens, sigmas[i], base, live, turned, blend)
            tokens = tokens + (sigmas[i + 1] - sigmas[i]) * velocity
        drawn.update(zip(group, tokens, strict=True))
    return torch.stack([drawn[position] for position in positions])


@torch.no_grad()
def edit_photo(
    predict: Predict,
    photo: torch.Tensor,
    sigmas: Sequence[float],
    positions: Sequence[float],
    knobs: Sequence[Knob],
    seed: int,
    blend: bool = False,
    batch_size: int = 8,
) -> torch.Tensor:
    """Latents x of a photo (1, S, 4C) at every position of the slider -> (positions, S, 4C).

    FlowEdit (Kulikov et al. 2024, arXiv 2412.08629) with a slider instead of a second prompt; the
    photo is never inverted. From z = x, in every step in which a knob is on, with new noise e:

        source = (1 - sigma) x + sigma e          edited = z + source - x
        z <- z + (sigma' - sigma) (v_slider(edited) - v_base(source))

    All positions share e, source and its velocity; position 0 is the photo itself, bit for bit.
    """
    first = min(knob.start for knob in knobs)
    moved = sorted({p for p in positions if p != 0})
    drawn = {0.0: photo[0]}
    for k in range(0, len(moved), batch_size):
        group = moved[k : k + batch_size]
        turned = torch.tensor([0.0, *group], device=photo.device)
        tokens = photo.expand(len(group), -1, -1)
        for i in range(first, len(sigmas) - 1):
            live = [knob for knob in knobs if knob.start <= i]
            noise = normal(photo.shape, seed, "edit", i).to(photo)
            source = (1 - sigmas[i]) * photo + sigmas[i] * noise
            both = torch.cat([source, tokens + source - photo])
            velocity = turned_velocity(predict, both, sigmas[i], (), live, turned, blend)
            tokens = tokens + (sigmas[i + 1] - sigmas[i]) * (velocity[1:] - velocity[:1])
        drawn.update(zip(group, tokens, strict=True))
    return torch.stack([drawn[position] for position in positions])


# --- 8. strips: what to draw, checked before the model loads --------------------------------------


class Slider(NamedTuple):
    """A LoRA file and how it acts."""

    file: Path
    scale: float
    start: int  # first step in which it is on


class Strip(NamedTuple):
    """Pictures that differ only in the slider's position."""

    caption: str
    prompt: str
    seed: int
    size: tuple[int, int]  # (W, H) px
    positions: tuple[float, ...]
    files: tuple[Path, ...]  # one for each position
    sheet: Path | None  # strips of the same sheet are its rows
    sliders: tuple[Slider, ...]
    gamma: float | None = None  # share of each slider's velocity; None: merged, not blended
    inversion: Path | None = None  # LoRA that draws the photo
    photo: Path | None = None  # without an inversion LoRA it is edited itself

    @property
    def loras(self) -> dict[str, Path]:
        """{adapter: file} of what must be attached."""
        named = {f"slider{k}": slider.file for k, slider in enumerate(self.sliders)}
        return named | ({"content": self.inversion} if self.inversion else {})


class Run(NamedTuple):
    """One LoRA to train."""

    dataset: str
    version: int
    noise_scale: float
    image_id: str = ""  # train_image_real


def all_runs(config: Any) -> list[Run]:
    """Data sets x versions x noise scales (or photos), in the order they are trained."""
    versions = range(config.train_start, config.train_start + config.train_count)
    last = [(beta, "") for beta in config.noise_scales]
    if config.python_name == "train_image_real":
        last = [(config.noise_scales[0], image_id) for image_id in config.image_ids]
    return [Run(name, v, *each) for name in config.datasets for v in versions for each in last]


def run_name(config: Any, run: Run) -> str:
    """The run's own folder; floats as Python writes them: 4.0, 2.25."""
    if run.image_id:
        parts = [run.dataset, run.image_id, f"v{config.python_name}", config.config_name]
    else:
        scales = f"{float(config.cfg_eta)}eta", f"{float(run.noise_scale)}ns"
        method = config.train_method
        parts = [run.dataset, f"v{config.python_name}", *scales, method, config.config_name]
    return "_".join([*parts, f"v{run.version}"])


def run_folder(config: Any, run: Run) -> Path:
    """Everything a run leaves lies here."""
    return config.output_folder / run.dataset / run_name(config, run)


def lora_stem(config: Any, run: Run, step: int) -> str:
    """Name of a run's LoRA file after `step` optimizer steps, without its ending."""
    head = [run.dataset, f"{float(config.cfg_eta)}eta", f"{float(run.noise_scale)}ns"]
    if run.image_id:
        head = [run.dataset, run.image_id]
    return "_".join([*head, f"{config.num_inference_steps}inf", f"{step}epoch"])


def prompts_of(config: Any, number: int) -> list[str]:
    """What data set `number` is drawn with: its prompt, or the lines of its prompts file.

    Raises:
        UserError: no such file, or it is no list of texts.
    """
    if not config.use_prompts_file:
        return [config.prompt[min(number, len(config.prompt) - 1)]]
    name = config.prompts_file[min(number, len(config.prompts_file) - 1)]
    beside = Path(__file__).parent / "configs/prompts" / name
    path = next((p for p in (Path(name), Path("configs/prompts") / name) if p.is_file()), beside)
    try:
        lines = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"prompts_file {name}: {error}") from error
    if not isinstance(lines, list) or not lines or not all(isinstance(x, str) for x in lines):
        raise UserError(f"prompts_file {path}: wanted a YAML list of prompts")
    return lines


def flux_buckets(resolution: int) -> list[tuple[int, int]]:
    """Sizes (W, H) as in train_pairedit.py: FLUX.1 takes multiples of 16 px."""
    widths = range(16, 2 * resolution + 1, 16)
    sizes = [(w, round(resolution**2 / w / 16) * 16) for w in widths]
    return [(w, h) for w, h in sizes if h and 1 / 3 <= w / h <= 3]


@functools.cache  # asked for by the check and by the drawing; a photo is decoded once
def photo_size(
    photo: Path | None,
    resolution: int,
    sizes: Callable[[int], list[tuple[int, int]]] = flux_buckets,
) -> tuple[int, int]:
    """(W, H) px of what is drawn: a photo's bucket, else the square. Raises UserError."""
    if not photo:
        return resolution, resolution
    try:
        image = open_rgb(photo)
    except FileNotFoundError as error:
        raise UserError(f"no picture {photo}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"picture {photo} cannot be read: {error}") from error
    return nearest_bucket(image.width, image.height, resolution, sizes)


def parse_slider(text: str) -> tuple[Path, float, float | None]:
    """ "FILE", "FILE:scale" or "FILE:scale:skip" -> (file, scale, skip or None)."""
    head, last = parse_lora(text)
    file, scale = parse_lora(str(head))
    return (head, last, None) if file == head else (file, scale, last)


def attempt(problems: list[str], default: Any, function: Callable[..., Any], *args: Any) -> Any:
    """function(*args); a UserError goes to `problems`, and the default comes back."""
    try:
        return function(*args)
    except UserError as error:
        problems.append(str(error))
        return default


def wrong_places(config: StripConfig | SDConfig) -> dict[str, Any]:
    """{problem: whether it is there} of what to draw and where results go."""
    output, folder = config.output, config.input_dir
    ends = (".png", ".gif") if getattr(config, "frames", None) else (".png",)
    not_png = output and output.suffix.lower() not in ends
    return {
        "give one of --image and --input_dir": config.image and folder,
        "--input_dir needs --output_dir": folder and not config.output_dir,
        "--output_dir goes with --input_dir": config.output_dir and not folder,
        "--output goes with --image or a prompt": output and folder,
        "--output FILE.png is missing": not output and not folder,
        f"--output {output}: wanted a .png, which keeps the settings": not_png,
        f"--input_dir: no folder {folder}": folder and not folder.is_dir(),
        "give both --height and --width, or none": bool(config.height) != bool(config.width),
        "--scales is empty": config.scales == [],
        "--scales needs a --lora": config.scales and not config.lora,
    }


def check_strip_ways(config: StripConfig) -> list[str]:
    """Problems of settings that do not go together."""
    folder, lora = config.input_dir, config.lora
    blend = config.compose == "blend" or (config.compose is None and config.inversion_lora)
    wrong = wrong_places(config) | {
        "--compose needs a --lora": config.compose and not lora,
        "a photo needs a --lora to be edited with": (
            (config.image or folder) and not lora and not config.inversion_lora
        ),
        "--gamma is read by --compose blend": "gamma" in config.model_fields_set and not blend,
        "an inversion_lora is of one photo: no --input_dir": config.inversion_lora and folder,
    }
    return [text for text, applies in wrong.items() if applies]


def parse_sliders(config: StripConfig) -> tuple[tuple[Slider, ...], list[str]]:
    """--lora, --skip -> sliders and their problems."""
    sliders, problems = [], []
    for text in config.lora:
        file, scale, own = parse_slider(text)
        skip = config.skip if own is None else own
        if not math.isfinite(scale) or not float(skip).is_integer():
            problems.append(f"--lora {text}: scale {scale}, skip {skip}; wanted a whole number")
            continue
        if ":" in file.name and not file.exists():
            problems.append(f"--lora {text}: wanted FILE, FILE:scale or FILE:scale:skip")
        sliders.append(Slider(file, scale, int(skip) + (config.inversion_lora is None)))
    return tuple(sliders), problems


def find_photos(config: StripConfig | SDConfig) -> tuple[dict[str, Path | None], list[str]]:
    """{name of the results: photo or None}, and problems."""
    if config.input_dir and config.input_dir.is_dir():
        found = list_images(config.input_dir)
        twice = [entries[0].path for entries in found.values() if len(entries) > 1]
        problems = [f"{path}: another picture has the same name" for path in twice]
        problems += [] if found else [f"--input_dir {config.input_dir}: no picture in it"]
        return {stem: Path(entries[0].path) for stem, entries in found.items()}, problems
    stem = config.output.stem if config.output else "strip"
    return {stem: config.image[0] if config.image else None}, []


def plan_strips(config: StripConfig) -> tuple[list[Strip], list[str]]:
    """A strip for each photo (or the prompt) and seed, and everything wrong with the settings."""
    sliders, problems = parse_sliders(config)
    photos, unfound = find_photos(config)
    problems = check_strip_ways(config) + problems + unfound
    positions = config.scales or ([1.0] if config.lora else [0.0])
    blend = config.compose or ("blend" if config.inversion_lora else "merge")
    several = len(photos) * len(config.seed) * len(positions) > 1
    folder = config.output_dir or (config.output or Path()).parent
    strips = []
    for name, photo in photos.items():
        square = config.resolution, config.resolution
        size = attempt(problems, square, photo_size, photo, config.resolution)
        for seed in config.seed:
            stem = name + (f"_seed{seed}" if len(config.seed) > 1 else "")
            files = [
                f"{stem}_scale{p:g}.png" if config.scales else f"{stem}.png" for p in positions
            ]
            strips.append(
                Strip(
                    caption=f"{name}, seed {seed}: {config.prompt}",
                    prompt=config.prompt,
                    seed=seed,
                    size=(config.width, config.height) if config.width and config.height else size,
                    positions=tuple(positions),
                    files=tuple(folder / file for file in files),
                    sheet=(config.output or folder / "contact_sheet.png") if several else None,
                    sliders=sliders,
                    gamma=config.gamma if blend == "blend" and sliders else None,
                    inversion=config.inversion_lora,
                    photo=photo,
                )
            )
    return strips, problems


def prompt_in_name(prompt: str, limit: int = 120) -> str:
    """A prompt as part of a file name, at most `limit` bytes and a hash; white space becomes _."""
    name = "_".join(prompt.split())
    plain = re.sub(r"[/\\\0]", "-", name).encode()[:limit].decode(errors="ignore")
    return plain if plain == name else f"{plain}-{draw_key(prompt):016x}"


def find_photo(config: SliderConfig, run: Run) -> Path | None:
    """The photo of an inversion run; None for the other variants. Raises UserError."""
    if not run.image_id:
        return None
    folder = config.datasets_folder / run.dataset / config.source_folder
    found = list_images(folder) if folder.is_dir() else {}
    if run.image_id not in found:
        raise UserError(f"no picture {run.image_id}.* in {folder}, whose size is the result's")
    return Path(found[run.image_id][0].path)


def picture_seeds(config: SliderConfig) -> list[int]:
    """Counted up, or drawn without repetition."""
    if config.use_random_seed:
        return shuffled(32769, config.seed, "picture seeds")[: config.count_gen]
    return [config.start_seed_gen + i for i in range(config.count_gen)]


def run_strip(
    config: SliderConfig, run: Run, size: tuple[int, int], skip: int, seed: int, prompt: str
) -> Strip:
    """The strip of one run, skip and seed, where PairEdit puts it."""
    lora = run_folder(config, run) / f"{lora_stem(config, run, config.train_iteration)}.safetensors"
    if config.use_trained_lora_path:
        lora = Path(config.trained_lora_path)
    first, last = config.scales[0], config.scales[-1]
    span = f"{first:.2f}-{last:.2f}" if len(config.scales) > 1 else f"{first:.2f}"
    folder = config.output_folder_gen / run.dataset / run_name(config, run)
    head = f"{seed}_{run.dataset}_skip{skip}_{config.train_iteration}epoch"
    end = f"{prompt_in_name(prompt)}.{config.image_format}"
    places = (f"origin/{seed}/{head}_scale{scale:.2f}_{end}" for scale in config.scales)
    strip = Strip(
        caption=f"seed {seed}, skip {skip}: {prompt} ({lora.name})",
        prompt=prompt,
        seed=seed,
        size=size,
        positions=tuple(config.scales),
        files=tuple(folder / place for place in places),
        sheet=folder / f"{head}_{span}_{end}",
        sliders=(Slider(lora, 1.0, skip + 1),),
    )
    if not run.image_id:
        return strip
    slider = Slider(Path(config.semantic_lora_path), 1.0, skip)  # KEEP: i >= skip, as PairEdit does
    return strip._replace(sliders=(slider,), gamma=config.semantic_cfg_scale, inversion=lora)


def run_prompts(config: SliderConfig, dataset: str) -> list[str]:
    """The prompt of every picture of a data set: the same for all runs, skips and scales."""
    lines = prompts_of(config, config.datasets.index(dataset))
    draws = (uniform(config.seed, "prompt", dataset, k) for k in range(config.count_gen))
    return [lines[int(draw * len(lines))] for draw in draws]


def plan_runs(config: SliderConfig) -> tuple[list[Strip], list[str]]:
    """A strip for each run, skip and seed, and everything wrong with the settings."""
    real = config.python_name == "train_image_real"
    wrong = {
        "image_ids and python_name: train_image_real go together": bool(config.image_ids) != real,
        "semantic_lora_path: train_image_real needs the slider that edits": (
            real and not config.semantic_lora_path
        ),
        "trained_lora_path: use_trained_lora_path is on, but this is empty": (
            config.use_trained_lora_path and not config.trained_lora_path
        ),
    }
    problems = [text for text, applies in wrong.items() if applies]
    strips: list[Strip] = []
    for run in all_runs(config) if not problems else []:
        photo = attempt(problems, None, find_photo, config, run)
        square = config.resolution, config.resolution
        size = attempt(problems, square, photo_size, photo, config.resolution)
        prompts = attempt(problems, [""] * config.count_gen, run_prompts, config, run.dataset)
        for skip in config.skips:
            for seed, prompt in zip(picture_seeds(config), prompts, strict=True):
                strip = run_strip(config, run, size, skip, seed, prompt)
                strips.append(strip._replace(photo=photo))
    return strips, list(dict.fromkeys(problems))


def plan_sliders(config: FluxConfig) -> tuple[list[Strip], list[str]]:
    """All strips of either kind of config, and everything wrong with it."""
    if isinstance(config, SliderConfig):
        return plan_runs(config)
    assert isinstance(config, StripConfig)
    return plan_strips(config)


def check_checkpoint(name: str) -> list[str]:
    """Problems of the base model: no such folder, another kind, parts missing."""
    if name == PUBLISHED_MODEL:  # a plan and an audit need no network
        return []
    try:
        kind = read_model_json(name, "model_index.json").get("_class_name")
    except UserError as error:
        return [f"pretrained_model_name_or_path: {error}"]
    if kind != "FluxPipeline":
        return [f"pretrained_model_name_or_path: {name} is a {kind}; wanted FluxPipeline"]
    parts = ["scheduler", "transformer", "vae", "text_encoder", "text_encoder_2"]
    parts += ["tokenizer", "tokenizer_2"]
    lacking = [part for part in parts if not (Path(name) / part).is_dir()]
    if Path(name).is_dir() and lacking:
        return [f"pretrained_model_name_or_path: {name} has no {', '.join(lacking)} folder"]
    return []


def device_name(device: int | str | None) -> str | None:
    """Of the config's device: 1 is cuda:1."""
    return f"cuda:{device}" if isinstance(device, int) else device


def check_loras(config: FluxConfig, strips: Sequence[Strip], known: bool) -> list[str]:
    """Problems of LoRA files: missing, damaged, (`known` model:) made for another model."""
    transformer = flux_layers(config.pretrained_model_name_or_path) if known else None
    problems = []
    for path in sorted({path for strip in strips for path in strip.loras.values()}):
        try:
            find_lora(path, config.allow_pickle)
            if transformer:
                factors = read_slider(path, transformer, config.allow_pickle)
                add_slider(transformer, Switchboard(), "checked", factors, 1.0)
        except UserError as error:
            text = "; ".join(line.strip(" -") for line in str(error).splitlines())
            problems.append(text if str(path) in text else f"{path}: {text}")
    return problems


def check_sliders(config: FluxConfig) -> list[str]:
    """Problems that can be seen without a model's weights."""
    strips, problems = plan_sliders(config)
    problems += check_device("device", device_name(config.device))
    problems += check_precision(config.base_model_precision)
    unknown = check_checkpoint(config.pretrained_model_name_or_path)
    problems += unknown + check_loras(config, strips, not unknown)
    steps = config.num_inference_steps
    for start in sorted({slider.start for strip in strips for slider in strip.sliders}):
        if not 0 <= start < steps:
            text = f"skip: the slider would act from step {start}, but there are 0..{steps - 1}"
            problems.append(text)
    return problems + check_strip_files(strips)


NAME_BYTES = 230  # of 255 in most file systems; save_atomic's temporary name is longer


def check_strip_files(strips: Sequence[Strip]) -> list[str]:
    """Results must not meet each other or overwrite a photo; their folder must be writable."""
    seen = Counter(file.resolve() for strip in strips for file in strip.files)
    seen += Counter(strip.resolve() for strip in {strip.sheet for strip in strips if strip.sheet})
    photos = {strip.photo.resolve() for strip in strips if strip.photo}
    long = {path for path in seen if len(os.fsencode(path.name)) > NAME_BYTES}
    problems = [f"two results are called {path}" for path, count in seen.items() if count > 1]
    problems += [f"{path} would be overwritten: it is a photo" for path in photos & set(seen)]
    problems += [
        f"{path} is a folder; wanted the name of a picture"
        for path in seen.keys() - long
        if path.is_dir()
    ]
    problems += [f"{path}: a name has at most {NAME_BYTES} bytes here" for path in sorted(long)]
    for strip in strips[:1]:  # the others lie beside it
        problems += check_writable(strip.files[0].parent)
    return problems


# --- 9. strips: drawing ---------------------------------------------------------------------------


class Painter:
    """FLUX.1 that draws strips. Its prompts are encoded first, then the encoders leave the memory.

    >>> Painter(config, [strip.prompt]).draw(strip, [0.0, 0.5, 1.0])  # three PIL images
    """

    def __init__(self, config: FluxConfig, prompts: Sequence[str]) -> None:
        name = config.pretrained_model_name_or_path
        folder = Path(name) if Path(name).is_dir() else fetch_checkpoint(name, "*/*")
        self.config = config
        self.device = pick_device(device_name(config.device))
        dtype = pick_dtype(config.dtype, self.device)
        encoders = load_text_encoders(folder, dtype, self.device)
        length = config.max_sequence_length
        self.texts = {prompt: encode_prompt_flux(encoders, prompt, length) for prompt in prompts}
        del encoders  # KEEP: never in memory together with the transformer
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.dtype = dtype
        self.vae = load_vae(folder, self.device)
        self.token_px = 2 * 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.scheduler = read_model_json(str(folder), "scheduler/scheduler_config.json")
        self.transformer = load_flux(folder, config.base_model_precision, dtype, self.device)
        self.board = Switchboard()
        self.attached: dict[str, Path] = {}

    def attach(self, loras: dict[str, Path]) -> None:
        """Make these the adapters that are there."""
        if loras == self.attached:
            return
        drop_sliders(self.transformer)
        for name, path in loras.items():
            factors = read_slider(path, self.transformer, self.config.allow_pickle)
            add_slider(self.transformer, self.board, name, factors, 1.0)
        self.attached = loras

    def predictor(self, prompt: str, grid: tuple[int, int]) -> Predict:
        """Velocity under a prompt, as a function of (tokens, sigma, lanes)."""
        guided = self.transformer.config.guidance_embeds

        def predict(
            tokens: torch.Tensor, sigma: float | torch.Tensor, lanes: Sequence[Lane]
        ) -> torch.Tensor:
            self.board.lanes = lanes
            sigmas = torch.as_tensor(sigma, device=tokens.device).expand(len(tokens))
            scale, text = self.config.guidance_scale, self.texts[prompt]
            return flux_velocity(self.transformer, tokens, sigmas, text, grid, scale, guided)

        return predict

    def draw_tokens(self, strip: Strip, positions: Sequence[float]) -> torch.Tensor:
        """A strip's latents at some of its positions, (positions, S, 4C)."""
        self.attach(strip.loras)
        grid = self.grid(strip)
        steps = self.config.num_inference_steps
        sigmas = sigma_table(self.scheduler, steps, math.prod(grid)).tolist()
        predict, blend = self.predictor(strip.prompt, grid), strip.gamma is not None
        knobs = [
            Knob(f"slider{k}", slider.scale, slider.start, strip.gamma or 0.0)
            for k, slider in enumerate(strip.sliders)
        ]
        if strip.photo and not strip.inversion:
            pixels = to_pixels(fit_photo(strip.photo, strip.size))
            photo = pack_tokens(encode_pixels(self.vae, pixels))
            return edit_photo(predict, photo, sigmas, positions, knobs, strip.seed, blend)
        channels = self.transformer.config.in_channels // 4
        noise = first_noise(strip.seed, channels, grid, self.dtype, self.device)
        base: Lane = (On("content"),) if strip.inversion else ()
        return draw_strip(predict, noise, sigmas, positions, knobs, base, blend)

    def grid(self, strip: Strip) -> tuple[int, int]:
        """(rows, columns) of tokens."""
        return strip.size[1] // self.token_px, strip.size[0] // self.token_px

    def draw(self, strip: Strip, positions: Sequence[float]) -> list[Image.Image]:
        """Pictures of a strip at some of its positions."""
        latents = unpack_tokens(self.draw_tokens(strip, positions), self.grid(strip))
        return [to_image(decode_latents(self.vae, x[None])[0]) for x in latents]


def fit_photo(path: Path, size: tuple[int, int]) -> Image.Image:
    """A photo cropped around its middle and resized to (W, H) px."""
    image = open_rgb(path)
    box = cover_box(image.width / image.height, size[0] / size[1])
    return crop(image, box).resize(size, Image.Resampling.LANCZOS)


def strip_settings(
    config: FluxConfig, strip: Strip, contents: dict[Path, str]
) -> list[dict[str, Any]]:
    """For each picture of a strip all that decides its pixels. contents: hashes of the files."""
    shared = {
        "model": config.pretrained_model_name_or_path,
        "inversion": contents[strip.inversion] if strip.inversion else None,
        "gamma": strip.gamma,
        "photo": contents[strip.photo] if strip.photo else None,
        "prompt": strip.prompt,
        "seed": strip.seed,
        "width": strip.size[0],
        "height": strip.size[1],
    }
    names = ("num_inference_steps", "guidance_scale", "max_sequence_length", "dtype")
    shared |= {name: getattr(config, name) for name in (*names, "base_model_precision")}
    return [
        shared
        | {
            "position": position,
            "sliders": [
                {"file": str(s.file), "scale": s.scale, "start": s.start}
                | {"blake2b": contents[s.file]}
                for s in strip.sliders
            ],
        }
        for position in strip.positions
    ]


def draw_sliders(config: FluxConfig) -> None:
    """Make the pictures that are missing, then the sheets."""
    strips, _ = plan_sliders(config)
    files = {path for strip in strips for path in strip.loras.values()}
    contents = {path: hash_file(find_lora(path, config.allow_pickle)) for path in files}
    contents |= {strip.photo: hash_file(strip.photo) for strip in strips if strip.photo}
    plan = [strip_settings(config, strip, contents) for strip in strips]
    todo = [
        [k for k, file in enumerate(strip.files) if read_settings(file) != settings[k]]
        for strip, settings in zip(strips, plan, strict=True)
    ]
    total, missing = sum(len(strip.files) for strip in strips), sum(map(len, todo))
    print(f"{total} picture(s), {total - missing} already there")
    prompts = [strip.prompt for strip, lacking in zip(strips, todo, strict=True) if lacking]
    painter = Painter(config, list(dict.fromkeys(prompts))) if missing else None
    with tqdm(total=missing, desc="generate", unit="picture", disable=not missing) as bar:
        for strip, settings, lacking in zip(strips, plan, todo, strict=True):
            if painter and lacking:
                images = painter.draw(strip, [strip.positions[k] for k in lacking])
                for k, image in zip(lacking, images, strict=True):
                    save_picture(strip.files[k], image, settings[k])
                bar.update(len(lacking))
    rows: dict[Path, list[int]] = {}
    for number, strip in enumerate(strips):
        if strip.sheet:
            rows.setdefault(strip.sheet, []).append(number)
    for sheet, numbers in rows.items():
        write_strip_sheet(sheet, [strips[n] for n in numbers], [plan[n] for n in numbers])
    if config.html:
        write_pages(strip_pages(strips))


def strip_columns(strip: Strip, heads: Sequence[str] = ()) -> dict[str, Path]:
    """{head: picture}: the photo, if there is one, then every position."""
    photo = {"photo": strip.photo} if strip.photo else {}
    heads = heads or [f"scale {position:g}" for position in strip.positions]
    return photo | dict(zip(heads, strip.files, strict=True))


def strip_pages(strips: Sequence[Strip], heads: Sequence[str] = ()) -> dict[Path, list[PageRow]]:
    """{page.html beside the sheets: a row per strip}."""
    pages: dict[Path, list[PageRow]] = {}
    for strip in strips:
        name = strip.caption.replace(f": {strip.prompt}", "")  # the prompt has its own place
        row = PageRow(name, strip_columns(strip, heads), strip.prompt, strip.seed)
        pages.setdefault((strip.sheet or strip.files[0]).parent / "page.html", []).append(row)
    return pages


def write_strip_sheet(
    sheet: Path, strips: Sequence[Strip], settings: Any, heads: Sequence[str] = ()
) -> None:
    """The photo, if there is one, then every position; a row per strip. Made anew if it changed."""
    about = {"pictures": f"{draw_key(json.dumps(settings)):016x}"}
    if read_settings(sheet) == about:
        return
    columns = [strip_columns(strip, heads) for strip in strips]
    rows = [[open_rgb(file) for file in row.values()] for row in columns]
    captions = [strip.caption for strip in strips]
    save_picture(sheet, contact_sheet(rows, list(columns[0]), captions), about)
    print(f"sheet: {sheet}")


# --- 10. Stable Diffusion: what to draw, checked before the model loads ---------------------------


def sd_buckets(resolution: int) -> list[tuple[int, int]]:
    """Sizes (W, H) as in train_dreambooth_pairs.py: the UNet halves its latents three times."""
    widths = range(64, 2 * resolution + 1, 64)
    sizes = [(w, round(resolution**2 / w / 64) * 64) for w in widths]
    return [(w, h) for w, h in sizes if h and 1 / 3 <= w / h <= 3]


def base_resolution(name: str) -> int:
    """Side of the pictures that the base model is made for, px; 512 where it does not say."""
    try:
        latents_px = read_model_json(name, "unet/config.json")["sample_size"]
        halvings = len(read_model_json(name, "vae/config.json")["block_out_channels"]) - 1
        return max(64, latents_px * 2**halvings // 64 * 64)
    except (UserError, KeyError, TypeError):
        return 512


def with_lora_wishes(config: SDConfig) -> SDConfig:
    """What is not given is what the LoRA files say about their training, else the usual."""
    name, about = config.pretrained_model_name_or_path, dict[str, Any]()
    for text in reversed(config.lora):
        with contextlib.suppress(ValueError):  # which the check of the files will tell
            about |= read_lora_about(parse_lora(text)[0])
    photo = bool(config.image or config.input_dir)
    prompt = about.get("instance_prompt", "" if photo else None)
    update = {
        "resolution": config.resolution or about.get("resolution") or base_resolution(name),
        "guidance_scale": config.guidance_scale or (1.0 if photo else 7.5),
        "prompt": config.prompt or ([prompt] if prompt is not None else []),
    }
    return config.model_copy(update=update)


def plan_sd(config: SDConfig) -> tuple[list[Strip], list[str]]:
    """A strip for each photo or prompt and seed, and what is wrong with the files."""
    photos, problems = find_photos(config)
    positions = tuple(config.scales or ([1.0] if config.lora else [0.0]))
    prompts, seeds, side = config.prompt, config.seed, config.resolution or 512
    several = len(photos) * len(prompts) * len(seeds) * len(positions) > 1
    folder = config.output_dir or (config.output or Path()).parent
    strips = []
    for name, photo in photos.items():
        size = attempt(problems, (side, side), photo_size, photo, side, sd_buckets)
        size = (config.width, config.height) if config.width and config.height else size
        for k, seed in itertools.product(range(len(prompts)), seeds):
            stem = name + (f"_prompt{k}" if len(prompts) > 1 else "")
            stem += f"_seed{seed}" if len(seeds) > 1 else ""
            ends = [f"_scale{p:g}" if config.scales else "" for p in positions]
            sheet = (config.output or folder / "contact_sheet.png") if several else None
            strips.append(
                Strip(
                    caption=f"{name}, seed {seed}: {prompts[k]}",
                    prompt=prompts[k],
                    seed=seed,
                    size=size,
                    positions=positions,
                    files=tuple(folder / f"{stem}{end}.png" for end in ends),
                    sheet=sheet,
                    sliders=(),
                    photo=photo,
                )
            )
    return strips, problems


def check_frames(config: SDConfig, given: set[str]) -> list[str]:
    """Problems of settings that do not go together where in-betweens are drawn."""
    unread = given & {"lora", "scales", "mask", "inversion", "skip", "negative_prompt"}
    unread |= given & {"input_dir", "output_dir", "batch_size", "guidance_scale"}
    wrong = wrong_places(config) | {
        f"--frames: takes two --image (given: {len(config.image)})": len(config.image) != 2,
        f"--frames does not read {', '.join(sorted(unread))}": unread,
        "--frames: one --prompt, or one for each picture": len(config.prompt) > 2,
        "--frames: one --seed": len(config.seed) > 1,
    }
    return [text for text, applies in wrong.items() if applies]


def check_sd_ways(config: SDConfig, given: set[str]) -> list[str]:
    """Problems of settings that do not go together; of a config with its LoRA's wishes."""
    if config.frames:
        return check_frames(config, given)
    photo = bool(config.image or config.input_dir)
    steps, mask = config.num_inference_steps, config.mask
    lone = sorted(given & {"inversion", "skip", "restore_detail"})
    fitted = sorted(given & {"even_frames", "fit_steps", "fit_rank", "fit_learning_rate"})
    wrong = wrong_places(config) | {
        "--image: one photo, or two with --frames; --input_dir takes many": len(config.image) > 1,
        f"{', '.join(fitted)}: read with --frames": fitted,
        "a photo needs a --lora to be changed with": photo and not config.lora,
        "no prompt: --prompt, or a LoRA that says its own": not config.prompt,
        "--prompt: one for photos": photo and len(config.prompt) > 1,
        f"{', '.join(lone)}: only photos are inverted": lone and not photo,
        "--mask goes with --image": mask and not config.image,
        f"--mask: no file {mask}": mask and not mask.is_file(),
        "--seed: several, but ddim inversion draws nothing": (
            photo and config.inversion == "ddim" and len(config.seed) > 1
        ),
        "--negative_prompt needs guidance: --guidance_scale above 1": (
            config.negative_prompt and config.guidance_scale == 1
        ),
        f"--skip {config.skip}: leaves none of {steps} steps": round(config.skip * steps) == steps,
    }
    return [text for text, applies in wrong.items() if applies]


def check_mask(config: SDConfig) -> list[str]:
    """The mask must be readable and as large as the photo."""
    if not (config.mask and config.mask.is_file() and config.image):
        return []
    try:
        sizes = {path: open_rgb(path).size for path in (config.image[0], config.mask)}
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return [f"--mask {config.mask}, or the photo, cannot be read: {error}"]
    text = ", ".join(f"{path} is {w} x {h} px" for path, (w, h) in sizes.items())
    return [f"--mask must have the photo's size: {text}"] if len(set(sizes.values())) > 1 else []


def check_base(name: str) -> list[str]:
    """Problems of the base model: no such folder, another kind, parts missing."""
    try:
        kind = read_model_json(name, "model_index.json").get("_class_name")
        scheduler = read_model_json(name, "scheduler/scheduler_config.json")
    except UserError as error:
        return [f"pretrained_model_name_or_path: {error}"]
    if kind != "StableDiffusionPipeline":
        return [f"pretrained_model_name_or_path: {name} is a {kind}; wanted Stable Diffusion 1.x"]
    if scheduler.get("prediction_type", "epsilon") != "epsilon":
        kind = scheduler["prediction_type"]
        return [f"pretrained_model_name_or_path: {name} predicts {kind}; wanted epsilon (SD 1.x)"]
    parts = ("scheduler", "unet", "vae", "text_encoder", "tokenizer")
    lacking = [part for part in parts if not (Path(name) / part).is_dir()]
    if Path(name).is_dir() and lacking:
        return [f"pretrained_model_name_or_path: {name} has no {', '.join(lacking)} folder"]
    return []


def empty_unet(name: str) -> Any:
    """UNet2DConditionModel without weights."""
    import diffusers
    from accelerate import init_empty_weights

    with init_empty_weights():
        return diffusers.UNet2DConditionModel.from_config(read_model_json(name, "unet/config.json"))


def check_fit(path: Path, unet: Any) -> None:
    """Every tensor must belong to a layer of the UNet (or the text encoder) and fit its shape.

    Raises:
        UserError: the first three that do not.
    """
    import diffusers
    from diffusers.utils import convert_unet_state_dict_to_peft

    try:
        tensors, _ = diffusers.StableDiffusionPipeline.lora_state_dict(
            str(path), use_safetensors=True
        )
        tensors = {n: x for n, x in tensors.items() if not n.startswith("text_encoder.")}
        found = {name.removeprefix("unet."): tensor for name, tensor in tensors.items()}
        if found and not any(".lora_A." in name for name in found):
            found = convert_unet_state_dict_to_peft(found)
    except Exception as error:  # converters raise many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"LoRA {path} cannot be read: {reason}") from error
    layers = dict(unet.named_modules())
    wrong = []
    for name, tensor in found.items():
        layer, _, end = name.rpartition(".lora_")
        wanted = getattr(layers.get(layer), "weight", None)
        axis = {"A.weight": 1, "B.weight": 0}.get(end)  # in, out
        if wanted is None:
            wrong.append(f"{name}: no such layer")
        elif axis is not None and tensor.shape[axis] != wanted.shape[axis]:
            wrong.append(f"{name}: {tensor.shape[axis]}, here it is {wanted.shape[axis]}")
    if wrong:
        raise UserError(
            f"LoRA {path}: {len(wrong)} tensors do not fit this UNet\n{listed(wrong, 3)}"
        )


def check_sd_loras(config: SDConfig, known: bool) -> list[str]:
    """Problems of LoRA files: missing, damaged, (`known` model:) made for another model."""
    problems: list[str] = []
    unet = empty_unet(config.pretrained_model_name_or_path) if known else None
    for text in config.lora:
        path, scale = parse_lora(text)
        if not math.isfinite(scale):
            problems.append(f"--lora {text}: wanted a number after the colon")
        if path.suffix == ".safetensors" and not path.exists():
            there = sorted(file.name for file in path.parent.glob("*.safetensors"))
            problems.append(f"no LoRA file {path}{nearest(path.name, there)}")
            continue
        try:
            read_lora_about(path)
            if unet is not None:
                check_fit(path, unet)
        except (UserError, ValueError) as error:
            problems.append("; ".join(line.strip(" -") for line in str(error).splitlines()))
    return problems


def check_sd(config: SDConfig) -> list[str]:
    """Problems that can be seen without a model's weights."""
    given, config = config.model_fields_set, with_lora_wishes(config)
    problems = check_sd_ways(config, given) + check_mask(config)
    problems += check_device("--device", config.device)
    unknown = check_base(config.pretrained_model_name_or_path)
    problems += unknown + check_sd_loras(config, not unknown)
    strips, unfound = plan_sd(config) if not config.frames else ([], [])
    if config.frames and len(config.image) == 2:
        [strip], unfound = plan_between(config)
        strips = [strip] + [strip._replace(files=(), sheet=None, photo=p) for p in config.image]
    return list(dict.fromkeys(problems + unfound + check_strip_files(strips)))


# --- 11. Stable Diffusion: drawing ----------------------------------------------------------------


SDPredict = Callable[[torch.Tensor, int], torch.Tensor]
"""(latents (B, 4, h, w), timestep) -> noise (B, 4, h, w)"""


class Levels(NamedTuple):
    """Noise levels from noisy to clean: N timesteps, N + 1 alphas_cumprod, the last one t = 0's.

    KEEP alphas_cumprod[0] at the end, not 1: the last step of DDPM needs a variance above 0.
    """

    timesteps: list[int]
    alphas: list[float]


def sd_levels(scheduler_config: Any, steps: int, skip: float = 0.0) -> Levels:
    """Those of DDIM without the first `skip` (share) of them."""
    import diffusers

    scheduler = diffusers.DDIMScheduler.from_config(scheduler_config)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps[round(skip * steps) :].tolist()
    table = scheduler.alphas_cumprod.double()
    return Levels(timesteps, [*table[timesteps].tolist(), table[0].item()])


def step_mean(
    x: torch.Tensor, noise: torch.Tensor, alpha: float, following: float, eta: float
) -> torch.Tensor:
    """Mean of the next latents; alpha, following: alphas_cumprod now (a) and after the step (a').

    sqrt(a') x0 + sqrt(1 - a' - s^2) e with x0 = (x - sqrt(1 - a) e) / sqrt(a) and
    s^2 = eta^2 (1 - a') / (1 - a) (1 - a / a'); eta 0 is DDIM, 1 DDPM (Song et al. 2020, arXiv
    2010.02502, eq. 12 and 16). With eta 0 also a step towards more noise.
    """
    clean = (x - math.sqrt(1 - alpha) * noise) / math.sqrt(alpha)
    variance = eta**2 * (1 - following) / (1 - alpha) * (1 - alpha / following)
    return math.sqrt(following) * clean + math.sqrt(1 - following - variance) * noise


def ddpm_path(photo: torch.Tensor, levels: Levels, noises: torch.Tensor) -> list[torch.Tensor]:
    """The photo at every level, sqrt(a) x + sqrt(1 - a) e, with noise of its own; then the photo.

    photo (B, 4, h, w), noises (N, B, 4, h, w). Edit-friendly inversion (Huberman-Spiegelglas et
    al. 2023, arXiv 2304.06140): independent noises make the steps' residuals large, so they carry
    the photo's layout through an edit.
    """
    alphas = levels.alphas[:-1]
    noisy = [
        math.sqrt(a) * photo + math.sqrt(1 - a) * e for a, e in zip(alphas, noises, strict=True)
    ]
    return [*noisy, photo]


def ddim_path(photo: torch.Tensor, levels: Levels, predict: SDPredict) -> list[torch.Tensor]:
    """The photo at every level by DDIM's steps backwards, then the photo (B, 4, h, w).

    KEEP: the noise is asked for at the timestep that the step leads to (Dhariwal & Nichol 2021).
    """
    path = [photo]
    for k in reversed(range(len(levels.timesteps))):
        noise = predict(path[0], levels.timesteps[k])
        path.insert(0, step_mean(path[0], noise, levels.alphas[k + 1], levels.alphas[k], 0.0))
    return path


def path_means(
    path: Sequence[torch.Tensor], levels: Levels, predict: SDPredict, eta: float
) -> list[torch.Tensor]:
    """Where every step from the path leads by itself; path[k + 1] - means[k] is its residual."""
    return [
        step_mean(path[k], predict(path[k], t), levels.alphas[k], levels.alphas[k + 1], eta)
        for k, t in enumerate(levels.timesteps)
    ]


def follow_path(
    path: Sequence[torch.Tensor],
    means: Sequence[torch.Tensor],
    levels: Levels,
    predict: SDPredict,
    eta: float,
    mask: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """Edited latents: from the path's first ones with the path's own residuals.

    x' = mean(x) + (path' - mean(path)). Of a DDPM path these residuals are s z of the edit-friendly
    inversion; of a DDIM path they are its errors. With the predictor of the path the path itself
    comes out, whatever the guidance. mask (1, 1, h, w): where it is 0 the path is kept.
    """
    x = path[0]
    for k, t in enumerate(levels.timesteps):
        mean = step_mean(x, predict(x, t), levels.alphas[k], levels.alphas[k + 1], eta)
        x = path[k + 1] + mask * (mean - means[k])
    return x


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """dB between two pictures in [-1, 1]; 200 at most."""
    error = (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean().item()
    return 200.0 if error < 4e-20 else 10 * math.log10(4 / error)


def load_sd_vae(folder: Path, device: torch.device) -> Any:
    """AutoencoderKL in fp32: in fp16 that of SD 1.5 overflows."""
    import diffusers

    vae_class = diffusers.AutoencoderKL
    vae = vae_class.from_pretrained(folder, subfolder="vae", dtype=torch.float32)
    return vae.to(device).eval().requires_grad_(False)


@torch.no_grad()
def encode_sd(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> latents (B, 4, h, w): posterior mode times the scaling factor."""
    mode = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    return mode.float() * vae.config.scaling_factor


@torch.no_grad()
def decode_sd(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """(B, 4, h, w) -> pixels (B, 3, H, W), about [-1, 1]."""
    return vae.decode(latents.to(vae.device, vae.dtype) / vae.config.scaling_factor).sample


def load_sd(config: SDConfig) -> Any:
    """StableDiffusionPipeline with DDIM and all LoRAs (named lora0, lora1 ...), on its device."""
    import diffusers

    folder = Path(config.pretrained_model_name_or_path)
    if not folder.is_dir():
        parts = ("scheduler", "unet", "text_encoder", "vae", "tokenizer")
        ends = ("config.json", "diffusion_pytorch_model.safetensors", "model.safetensors")
        names = [f"{part}/{end}" for part in parts for end in ends]
        folder = fetch_checkpoint(str(folder), *names, "tokenizer/*", "scheduler/*")
    device = pick_device(config.device)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        folder,
        vae=load_sd_vae(folder, device),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        dtype=pick_dtype(config.dtype, device),
        use_safetensors=True,
    )
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(
        pipeline.scheduler.config, clip_sample=False
    )
    diffusers.utils.logging.set_verbosity_error()  # a LoRA may well be of the UNet alone
    warnings.filterwarnings("ignore", "Already found a .peft_config")  # as there are several
    for number, text in enumerate(config.lora):
        load_lora(pipeline, parse_lora(text)[0], f"lora{number}")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


class Inverted(NamedTuple):
    """Photos of one size, and what gives them back."""

    pixels: list[torch.Tensor]  # (1, 3, H, W) each
    kept: list[torch.Tensor]  # the same of what the VAE keeps: decode(encode(photo))
    path: list[torch.Tensor]  # N + 1 of (B, 4, h, w), the last one clean
    means: list[torch.Tensor]  # N; see path_means
    levels: Levels
    eta: float


class SDPainter:
    """Stable Diffusion that draws strips, several of one size at once.

    >>> draw, _ = SDPainter(config).open([strip])
    >>> draw(0.5)[0]  # a PIL image: the first strip at scale 0.5
    """

    def __init__(self, config: SDConfig) -> None:
        self.config = config
        self.pipeline = load_sd(config)
        self.unet, self.vae = self.pipeline.unet, self.pipeline.vae
        self.device, self.dtype = self.unet.device, self.unet.dtype

    def open(self, strips: Sequence[Strip]) -> tuple[Callable[[float], list[Any]], list[Any]]:
        """(scale -> a picture of each strip, what there is to say about each)."""
        if strips[0].photo:
            return self.open_photos(strips)
        return functools.partial(self.draw_texts, strips), [{} for _ in strips]

    @torch.no_grad()
    def draw_texts(self, strips: Sequence[Strip], scale: float) -> list[Image.Image]:
        """Pictures of prompts at a scale, by diffusers' pipeline."""
        set_scales(self.pipeline, self.config, scale)
        width, height = strips[0].size
        factor = self.pipeline.vae_scale_factor
        shape = 1, self.unet.config.in_channels, height // factor, width // factor
        draws = (torch.Generator().manual_seed(strip.seed) for strip in strips)
        noise = torch.cat([torch.randn(shape, generator=d, dtype=self.dtype) for d in draws])
        latents = self.pipeline(
            [strip.prompt for strip in strips],
            negative_prompt=[self.config.negative_prompt] * len(strips),
            latents=noise.to(self.device),
            height=height,
            width=width,
            num_inference_steps=self.config.num_inference_steps,
            guidance_scale=self.config.guidance_scale,
            output_type="latent",
        ).images
        return [to_image(decode_sd(self.vae, x[None])[0]) for x in latents]

    def predictor(self, prompts: Sequence[str]) -> SDPredict:
        """Noise for a batch, a prompt each, under guidance, with the LoRAs as they are set now."""
        scale = self.config.guidance_scale or 1.0
        negative = [self.config.negative_prompt] * len(prompts)
        text, empty = self.pipeline.encode_prompt(
            list(prompts), self.device, 1, scale > 1, negative_prompt=negative
        )
        embeds = torch.cat([empty, text]) if scale > 1 else text

        def predict(latents: torch.Tensor, t: int) -> torch.Tensor:
            x = torch.cat([latents, latents]) if scale > 1 else latents
            noise = self.unet(x.to(self.dtype), t, encoder_hidden_states=embeds).sample.float()
            if scale == 1:
                return noise
            plain, asked = noise.chunk(2)
            return plain + scale * (asked - plain)

        return predict

    @torch.no_grad()
    def invert(self, strips: Sequence[Strip]) -> Inverted:
        """Photos of one size as noise, with the base model."""
        config, prompts = self.config, [strip.prompt for strip in strips]
        levels = sd_levels(self.pipeline.scheduler.config, config.num_inference_steps, config.skip)
        images = [fit_photo(strip.photo, strip.size) for strip in strips if strip.photo]
        pixels = [to_pixels(image).to(self.device) for image in images]
        latents = torch.cat([encode_sd(self.vae, x) for x in pixels])
        set_scales(self.pipeline, config, 0.0)
        predict, eta = self.predictor(prompts), float(config.inversion == "ddpm")
        if eta:
            steps, shape = range(len(levels.timesteps)), latents.shape[1:]
            noises = [[normal(shape, s.seed, "invert", k) for s in strips] for k in steps]
            noise = torch.stack([torch.stack(row) for row in noises]).to(self.device)
            path = ddpm_path(latents, levels, noise)
        else:
            path = ddim_path(latents, levels, predict)
        means = path_means(path, levels, predict, eta)
        kept = [decode_sd(self.vae, x[None]) for x in latents]
        return Inverted(pixels, kept, path, means, levels, eta)

    @torch.no_grad()
    def edit(
        self, strips: Sequence[Strip], photos: Inverted, mask: torch.Tensor, scale: float
    ) -> list[torch.Tensor]:
        """Pixels (1, 3, H, W) of each photo at a scale; mask (1, 1, H, W) in 0..1."""
        set_scales(self.pipeline, self.config, scale)
        predict = self.predictor([strip.prompt for strip in strips])
        coarse = F.interpolate(mask, photos.path[0].shape[-2:], mode="area")
        latents = follow_path(photos.path, photos.means, photos.levels, predict, photos.eta, coarse)
        edited = [decode_sd(self.vae, x[None]) for x in latents]
        # the decoder looks at the whole picture, so the mask counts for pixels, too
        return [b + mask * (x - b) for x, b in zip(edited, photos.kept, strict=True)]

    def open_photos(
        self, strips: Sequence[Strip]
    ) -> tuple[Callable[[float], list[Any]], list[dict[str, float]]]:
        """Invert photos -> (scale -> pictures, {"scale0_db", "vae_db"} of each).

        scale0_db: scale 0 against decode(encode(photo)); vae_db: that against the photo.
        """
        photos = self.invert(strips)
        mask = torch.ones_like(photos.pixels[0][:, :1])
        if self.config.mask:
            white = to_pixels(fit_photo(self.config.mask, strips[0].size)).to(self.device)
            mask = (white.mean(1, keepdim=True) + 1) / 2

        zero = self.edit(strips, photos, mask, 0.0)

        def draw(scale: float) -> list[Image.Image]:
            found = self.edit(strips, photos, mask, scale) if scale else zero
            if self.config.restore_detail:
                lost = [a - b for a, b in zip(photos.pixels, photos.kept, strict=True)]
                found = [x + y for x, y in zip(found, lost, strict=True)]
            return [to_image(x[0]) for x in found]

        return draw, [
            {"scale0_db": round(psnr(x, b), 1), "vae_db": round(psnr(a, b), 1)}
            for x, a, b in zip(zero, photos.pixels, photos.kept, strict=True)
        ]


def sd_settings(config: SDConfig, strip: Strip, contents: dict[Path, str]) -> list[dict[str, Any]]:
    """For each picture of a strip all that decides its pixels. contents: hashes of the files."""
    names = ("negative_prompt", "num_inference_steps", "guidance_scale", "dtype")
    shared = {
        "model": config.pretrained_model_name_or_path,
        "prompt": strip.prompt,
        "seed": strip.seed,
        "width": strip.size[0],
        "height": strip.size[1],
        **{name: getattr(config, name) for name in names},
    }
    if strip.photo:
        shared |= {
            "photo": contents[strip.photo],
            "inversion": config.inversion,
            "skip": config.skip,
            "restore_detail": config.restore_detail,
            "mask": contents[config.mask] if config.mask else None,
        }
    loras = [(path, scale) for path, scale in map(parse_lora, config.lora)]
    return [
        shared
        | {
            "position": position,
            "loras": [
                {"file": str(path), "scale": scale * position, "blake2b": contents[path]}
                for path, scale in loras
            ],
        }
        for position in strip.positions
    ]


def is_made(file: Path, settings: dict[str, Any]) -> bool:
    """A picture with these settings is there; it may say more about itself."""
    found = read_settings(file)
    return found is not None and settings.items() <= found.items()


def draw_sd_strips(config: SDConfig) -> None:
    """Make the pictures that are missing, a batch after another, then the sheet."""
    config = with_lora_wishes(config)
    strips, _ = plan_sd(config)
    files = [parse_lora(text)[0] for text in config.lora]
    files += [path for path in (config.mask, *(s.photo for s in strips)) if path]
    contents = {path: hash_file(path) for path in set(files)}
    plan = [sd_settings(config, strip, contents) for strip in strips]
    todo: dict[tuple[int, int], list[int]] = {}  # strips with missing pictures, by size
    missing = 0
    for number, strip in enumerate(strips):
        lacking = [not is_made(*pair) for pair in zip(strip.files, plan[number], strict=True)]
        missing += sum(lacking)
        if any(lacking):
            todo.setdefault(strip.size, []).append(number)
    total = sum(len(strip.files) for strip in strips)
    print(f"{total} picture(s), {total - missing} already there")
    painter = SDPainter(config) if missing else None
    with tqdm(total=missing, desc="generate", unit="picture", disable=not missing) as bar:
        for numbers in todo.values():
            for first in range(0, len(numbers), config.batch_size):
                batch = numbers[first : first + config.batch_size]
                if painter:
                    draw_batch(painter, [strips[n] for n in batch], [plan[n] for n in batch], bar)
    if strips[0].sheet:
        write_strip_sheet(strips[0].sheet, strips, plan)
    if config.html:
        write_pages(strip_pages(strips))


def draw_batch(painter: SDPainter, strips: Sequence[Strip], plan: Any, bar: Any) -> None:
    """Strips of one size: what is missing, scale by scale."""
    draw, about = painter.open(strips)
    for strip, facts in zip(strips, about, strict=True):
        if facts:
            bar.write(
                f"{strip.photo}: scale 0 is decode(encode(photo)) at {facts['scale0_db']} dB, "
                f"which is the photo at {facts['vae_db']} dB"
            )
    for k, position in enumerate(strips[0].positions):
        lacking = [n for n, s in enumerate(strips) if not is_made(s.files[k], plan[n][k])]
        images = draw(position) if lacking else []
        for n in lacking:
            save_picture(strips[n].files[k], images[n], plan[n][k] | about[n])
        bar.update(len(lacking))


# --- 12. Stable Diffusion: between two pictures ---------------------------------------------------

# DiffMorpher (Zhang et al. 2023, arXiv 2312.07409) with three changes: the LoRAs' products are
# interpolated, not their factors (lerp(BA) - lerp(B) lerp(A) = a (1 - a) (B0 - B1)(A0 - A1)); every
# step gets the residuals of both ends' inversions, so both pictures come back exactly; frames are
# spaced by the distance of pictures.
FIT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
ATTENTION_SHARE = 0.6  # EDIT HERE: share of the steps in which frames look at both ends


def slerp(first: torch.Tensor, last: torch.Tensor, share: float) -> torch.Tensor:
    """(sin((1 - a) w) first + sin(a w) last) / sin(w), w the angle between the whole tensors.

    Noises keep their length on the way, which a straight line shortens (Shoemake 1985). fp64
    inside; norms are not made equal.
    """
    a, b = first.double(), last.double()
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = cosine.clamp(-1 + 1e-7, 1 - 1e-7).acos()
    mixed = torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b
    return (mixed / torch.sin(angle)).to(first.dtype)


def adain(x: torch.Tensor, first: torch.Tensor, last: torch.Tensor, share: float) -> torch.Tensor:
    """x (1, C, h, w) with each channel's mean and std between those of the ends."""
    mean, std = (
        torch.lerp(f(first), f(last), share)
        for f in (lambda z: z.mean((2, 3), keepdim=True), lambda z: z.std((2, 3), keepdim=True))
    )
    return (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True) * std + mean


def even_shares(shares: Sequence[float], distances: Sequence[float]) -> list[float]:
    """New places of frames, equally far apart; distances: between neighbours at `shares`.

    Inverts the distance from the first frame, taken as linear between two frames.
    """
    way = np.concatenate([[0.0], np.cumsum(distances)])
    if way[-1] == 0:
        return list(shares)
    return np.interp(np.linspace(0, way[-1], len(shares)), way, shares).tolist()


class EndsAttention:
    """Self-attention of one layer whose keys and values may come from both ends' hidden states.

    role 0 or 1: this is an end, remember what it looks at; a share: look at the mix of both.
    """

    def __init__(self, plain: Any) -> None:
        self.plain = plain
        self.seen: dict[int, torch.Tensor] = {}
        self.role: int | float | None = None

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, **rest: Any
    ) -> torch.Tensor:
        """What the layer's own processor makes of it; hidden_states (B, S, C)."""
        if isinstance(self.role, int):
            self.seen[self.role] = hidden_states
        elif self.role is not None:
            encoder_hidden_states = torch.lerp(self.seen[0], self.seen[1], self.role)
        return self.plain(attn, hidden_states, encoder_hidden_states, **rest)


def fit_file(config: SDConfig, strip: Strip, photo: Path, prompt: str) -> Path:
    """Where the LoRA of one picture lies, named by all that decides it."""
    names = ("pretrained_model_name_or_path", "fit_steps", "fit_rank", "fit_learning_rate", "dtype")
    settings = {name: getattr(config, name) for name in names}
    settings |= {"photo": hash_file(photo), "size": strip.size, "prompt": prompt}
    key = cache_key("fitted", seed=strip.seed, **settings)
    return strip.files[0].parent / f"{photo.stem}-fitted-{key[:16]}.safetensors"


def fit_lora(
    unet: Any, latents: torch.Tensor, embed: torch.Tensor, alphas: Any, config: SDConfig, seed: int
) -> dict[str, torch.Tensor]:
    """A LoRA on attention that draws one picture: plain noise loss, AdamW; diffusers' names.

    latents (1, 4, h, w), embed (1, 77, C), alphas: alphas_cumprod. Draws belong to `seed`.
    """
    from peft import LoraConfig, get_peft_model_state_dict

    rank, steps = config.fit_rank, config.fit_steps
    options: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": FIT_TARGETS}
    unet.requires_grad_(False).add_adapter(LoraConfig(**options), adapter_name="fit")
    unet.set_adapters("fit")
    factors = {name: x for name, x in unet.named_parameters() if ".fit." in name}
    for name, x in factors.items():
        start = normal(x.shape, seed, "fit", name) / rank
        x.data = (
            start.to(x.device) if ".lora_A." in name else torch.zeros_like(x, dtype=start.dtype)
        )
    optimizer = torch.optim.AdamW(factors.values(), lr=config.fit_learning_rate)
    for step in tqdm(range(steps), "fit", unit="step", leave=False):
        t = int(uniform(seed, "fit level", step) * len(alphas))
        noise = normal(latents.shape, seed, "fit noise", step).to(latents)
        noisy = alphas[t].sqrt() * latents + (1 - alphas[t]).sqrt() * noise
        predicted = unet(noisy.to(unet.dtype), t, encoder_hidden_states=embed).sample
        F.mse_loss(predicted.float(), noise).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = get_peft_model_state_dict(unet, adapter_name="fit")
    tensors = {f"unet.{name}": x.detach().cpu().contiguous() for name, x in found.items()}
    unet.delete_adapters("fit")
    return tensors


class Morph:
    """Two pictures, inverted with a LoRA of their own each, and what lies between them."""

    def __init__(self, painter: SDPainter, strip: Strip) -> None:
        self.painter, self.unet = painter, painter.unet
        config, device = painter.config, painter.device
        self.pixels = [to_pixels(fit_photo(p, strip.size)).to(device) for p in config.image]
        latents = [encode_sd(painter.vae, x) for x in self.pixels]
        self.kept = [decode_sd(painter.vae, x) for x in latents]
        self.prompts = config.prompt * (3 - len(config.prompt))  # one prompt is that of both
        with torch.no_grad():
            encode = painter.pipeline.encode_prompt
            self.embeds = [encode(prompt, device, 1, False)[0] for prompt in self.prompts]
        self.attach_loras(strip, latents)
        plain = self.unet.attn_processors
        self.attention = {
            name: EndsAttention(processor)
            for name, processor in plain.items()
            if name.startswith("up_blocks") and ".attn1." in name
        }
        self.unet.set_attn_processor(plain | self.attention)
        self.levels = sd_levels(painter.pipeline.scheduler.config, config.num_inference_steps)
        self.paths, self.means = zip(*map(self.invert, latents, (0.0, 1.0)), strict=True)

    def attach_loras(self, strip: Strip, latents: Sequence[torch.Tensor]) -> None:
        """Fit what is not there from an earlier run; the UNet gets the adapters first and last."""
        config, pipeline = self.painter.config, self.painter.pipeline
        files = []
        for k, photo in enumerate(config.image):
            files.append(fit_file(config, strip, photo, self.prompts[k]))
            if not files[k].is_file():
                alphas = pipeline.scheduler.alphas_cumprod
                found = fit_lora(self.unet, latents[k], self.embeds[k], alphas, config, strip.seed)
                save_atomic(files[k], functools.partial(save_file, found))
        self.unet.load_lora_adapter(str(files[0]), prefix="unet", adapter_name="first")
        self.unet.load_lora_adapter(str(files[1]), prefix="unet", adapter_name="last")

    @torch.no_grad()
    def invert(
        self, latents: torch.Tensor, share: float
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(path, means) of an end under its own LoRA, DDIM; see follow_path."""
        predict = functools.partial(self.predict, share=share)
        path = ddim_path(latents, self.levels, predict)
        return path, path_means(path, self.levels, predict, 0.0)

    def predict(
        self, x: torch.Tensor, t: int, share: float, role: int | float | None = None
    ) -> torch.Tensor:
        """Noise of the model that is (1 - share) the first picture's and share the last one's."""
        for layer in self.attention.values():
            layer.role = role
        self.unet.set_adapters(["first", "last"], [1.0 - share, share])
        embed = torch.lerp(self.embeds[0], self.embeds[1], share)
        x = x.to(self.painter.dtype)
        return self.unet(x, t, encoder_hidden_states=embed).sample.float()

    @torch.no_grad()
    def draw(self, shares: Sequence[float]) -> list[torch.Tensor]:
        """Pixels (1, 3, H, W) at every share, from 0 to 1; step by step, the ends first."""
        first, last = (path[0] for path in self.paths)
        frames = [adain(slerp(first, last, a), first, last, a) for a in shares]
        frames[0], frames[-1] = first, last  # the same, but for rounding
        end, alphas = len(shares) - 1, self.levels.alphas
        mixed = round(ATTENTION_SHARE * len(self.levels.timesteps))
        for k, t in enumerate(tqdm(self.levels.timesteps, "between", unit="step", leave=False)):
            for n in (0, end, *range(1, end)):
                role = {0: 0, end: 1}.get(n, shares[n]) if k < mixed else None
                noise = self.predict(frames[n], t, shares[n], role)
                mean = step_mean(frames[n], noise, alphas[k], alphas[k + 1], 0.0)
                wanted = torch.lerp(self.paths[0][k + 1], self.paths[1][k + 1], shares[n])
                own = torch.lerp(self.means[0][k], self.means[1][k], shares[n])
                frames[n] = wanted + (mean - own)
        pixels = [decode_sd(self.painter.vae, x) for x in frames]
        if self.painter.config.restore_detail:
            one, other = (a - b for a, b in zip(self.pixels, self.kept, strict=True))
            pixels = [x + torch.lerp(one, other, a) for x, a in zip(pixels, shares, strict=True)]
        return pixels


def plan_between(config: SDConfig) -> tuple[list[Strip], list[str]]:
    """One strip with a file for each frame, and what is wrong with the two pictures."""
    problems: list[str] = []
    output, side = config.output or Path("between.png"), config.resolution or 512
    sizes = [
        attempt(problems, (side, side), photo_size, image, side, sd_buckets)
        for image in config.image
    ]
    size = (config.width, config.height) if config.width and config.height else sizes[0]
    last = (config.frames or 0) - 1
    strip = Strip(
        caption=f"{' to '.join(path.name for path in config.image)}, {last + 1} frames",
        prompt=" -> ".join(dict.fromkeys(config.prompt)),
        seed=config.seed[0],
        size=size,
        positions=tuple(n / last for n in range(last + 1)),
        files=tuple(output.with_name(f"{output.stem}_frame{n:02d}.png") for n in range(last + 1)),
        sheet=output.with_suffix(".png"),
        sliders=(),
    )
    return [strip], problems


def draw_between(config: SDConfig) -> None:
    """All frames, if one is missing, then the sheet and the animation."""
    config = with_lora_wishes(config)
    [strip], _ = plan_between(config)
    names = ("num_inference_steps", "fit_steps", "fit_rank", "fit_learning_rate", "even_frames")
    shared = {
        "model": config.pretrained_model_name_or_path,
        "photos": [hash_file(path) for path in config.image],
        "prompt": config.prompt,
        "seed": strip.seed,
        "width": strip.size[0],
        "height": strip.size[1],
        **{name: getattr(config, name) for name in (*names, "restore_detail", "dtype")},
    }
    settings = [shared | {"frame": n, "frames": config.frames} for n in range(len(strip.files))]
    made = all(is_made(*pair) for pair in zip(strip.files, settings, strict=True))
    print(f"{len(strip.files)} frame(s), {'all' if made else 'not all'} already there")
    if not made:
        morph, shares = Morph(SDPainter(config), strip), list(strip.positions)
        pixels = morph.draw(shares)
        if config.even_frames:
            pairs = itertools.pairwise(pixels)  # EDIT HERE: the distance of two pictures
            shares = even_shares(shares, [(b - a).square().mean().sqrt().item() for a, b in pairs])
            pixels = morph.draw(shares)
        wanted = morph.pixels if config.restore_detail else morph.kept
        decibels = [round(psnr(pixels[end], wanted[end]), 1) for end in (0, -1)]
        kind = "the pictures" if config.restore_detail else "decode(encode(picture))"
        print(f"the ends are {kind} at {decibels[0]} and {decibels[1]} dB")
        for n, x in enumerate(pixels):
            about = {"share": round(shares[n], 6), "ends_db": decibels}
            save_picture(strip.files[n], to_image(x[0]), settings[n] | about)
    assert strip.sheet
    heads = [path.stem[-7:] for path in strip.files]
    write_strip_sheet(strip.sheet, [strip], [settings], heads)
    if config.html:
        write_pages(strip_pages([strip], heads))
    if config.output and config.output.suffix == ".gif":
        frames = [open_rgb(file) for file in strip.files]
        frames += frames[-2:0:-1]  # and back
        options: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "loop": 0}
        options |= {"format": "GIF", "duration": 1000 // 12}  # ms a frame
        save_atomic(config.output, functools.partial(frames[0].save, **options))
        print(f"animation: {config.output}")


# --- 13. main -------------------------------------------------------------------------------------


def pick_family(given: dict[str, Any]) -> type[Config] | type[FluxConfig] | type[SDConfig]:
    """By the settings, else by the checkpoint: Qwen-Image-Edit, Stable Diffusion, FLUX.1's two."""
    flat = SliderConfig.model_fields.keys() | TRAINING_ONLY
    flags = flags_of(Config, StripConfig, SDConfig)
    named = given.keys() & {"python_name", "datasets"}
    if named or (given.keys() & flat - flags and not given.keys() & flags - flat):
        return SliderConfig
    name = str(given.get("pretrained_model_name_or_path", ""))
    kind = "FluxPipeline" if name == PUBLISHED_MODEL else ""
    if name in PUBLISHED:
        kind = PUBLISHED[name].pipeline_class
    with contextlib.suppress(UserError):  # which the check of the settings will tell
        kind = kind or read_model_json(name, "model_index.json").get("_class_name", "")
    # a model that cannot be read is told by a setting that only one family has
    only_flux = StripConfig.model_fields.keys() - Config.model_fields.keys()
    only_sd = SDConfig.model_fields.keys() - flags_of(Config, StripConfig)
    if kind == "StableDiffusionPipeline" or (not kind and given.keys() & only_sd):
        return SDConfig
    flux = kind == "FluxPipeline" or (not kind and given.keys() & only_flux)
    return StripConfig if flux else Config


def flags_of(*families: type[Section]) -> set[str]:
    """Names of all their settings."""
    return {name for family in families for name in family.model_fields}


def check_foreign(given: dict[str, Any], family: type[Section]) -> list[str]:
    """Settings that belong to another family than the checkpoint's."""
    known = {
        "Qwen-Image-Edit": flags_of(Config),
        "Stable Diffusion": flags_of(SDConfig),
        "FLUX.1": flags_of(StripConfig, SliderConfig) | TRAINING_ONLY,
    }
    own = "Stable Diffusion" if family is SDConfig else "FLUX.1"
    instead = {"offload": "; base_model_precision makes FLUX.1 smaller"} if own == "FLUX.1" else {}
    owners = {
        name: next((owner for owner, names in known.items() if name in names), "")
        for name in sorted(given.keys() - known[own])
    }
    return [
        f"{name}: a setting of {owner}, not of {own}{instead.get(name, '')}"
        for name, owner in owners.items()
        if owner
    ]


def main() -> None:
    """Settings -> check -> pictures."""
    argv = with_named_config(sys.argv[1:])
    given, flags, _ = parse_args(argv, set())
    if "help" in flags:
        families = (Config, StripConfig, SliderConfig, SDConfig)
        print("\n\n".join(help_text(family) for family in families))
        return
    family = pick_family(given)
    foreign = check_foreign(given, family) if family is not Config else []
    if issubclass(family, FluxConfig):
        draw_sliders(load_config(family, argv, lambda config: foreign + check_sliders(config)))
    elif issubclass(family, SDConfig):
        config = load_config(family, argv, lambda config: foreign + check_sd(config))
        (draw_between if config.frames else draw_sd_strips)(config)
    else:
        generate(load_config(family, argv, check))


if __name__ == "__main__":
    run_script(main)
