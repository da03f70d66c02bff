"""Train a slider: one visual change, learned from a few before/after pairs, on FLUX.1-dev.

Page: docs/train_pairedit.md

    accelerate launch train_pairedit.py --config configs/pairedit_age.yaml     # or --c pairedit_age
    ... --python_name train_image_wocontent     # an ablation: an entry of LOSSES
    ... --python_name train_image_real          # inversion LoRA of single photos (image_ids)
    ... --python_name slider_text               # from two prompts, without pictures
    ... --resume_from_checkpoint latest         # go on after a stop; finished runs are skipped
    ... --plan | --print_config | --help        # memory and time; settings; all settings

One run per data set, version and noise scale, in one process; the models are loaded once.
generate.py takes the same file and draws the strips. PairEdit: arXiv 2506.07992.

This is no library: copy the file, change it, run it; only utils.py must lie beside it.
`# EDIT HERE:` marks what an ablation changes, `# KEEP:` what breaks otherwise.

Shapes: B samples, H W pixels, h w latents (FLUX: H/8 W/8, C = 16 channels), S = (h/2)(w/2) image
tokens of 4C channels, T text tokens. Pixels lie in [-1, 1], latents are (mode - shift) * scaling,
sigma runs from 0 (picture) to 1 (noise), velocity = d latents / d sigma.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import datetime
import functools
import gc
import importlib.util
import itertools
import json
import logging
import math
import os
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pydantic import Field, field_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
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
    track_picture,
    uniform,
    write_entry,
    write_report,
)

# KEEP: diffusers, transformers and accelerate are imported where they are used, so that a mistake
# in the config or the data is reported within seconds, before any of them is loaded.

# differs: FLUX packs 2 x 2 latents of 8 px
SIZE_MULTIPLE = 16
ATTENTION = (  # EDIT HERE: layers with an adapter; 19 * 8 + 38 * 3 = 266 of FLUX.1-dev
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip
KEYS_AND_VALUES = (
    "attn.to_k",
    "attn.to_v",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
)
PUBLISHED_MODEL = "black-forest-labs/FLUX.1-dev"
PUBLISHED_TRANSFORMER = {"guidance_embeds": True}  # the rest of its config are the class's defaults

log = logging.getLogger("train_pairedit")


# --- 1. config ------------------------------------------------------------------------------------


class Config(Section):
    """train_pairedit.py: sliders from pairs, on FLUX.1-dev.

    Names and defaults are those of PairEdit; its hidden constants are settings here. The last
    block is read by generate.py; training draws its preview strips with it.
    """

    # the model
    pretrained_model_name_or_path: str = PUBLISHED_MODEL
    """Folder in diffusers layout, or a Hub id."""
    device: int | str | None = None
    """Number of a GPU, or cpu, cuda:0, mps; null: the launcher's."""
    base_model_precision: Literal[
        "no_change", "int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto", "nf4-bnb"
    ] = "no_change"
    """Weights of the frozen transformer's blocks."""
    mixed_precision: Literal["bf16", "no"] = "bf16"
    """bf16: base in bf16; LoRA, loss and optimizer in fp32. no: all in fp32."""
    gradient_checkpointing: bool = True
    """Saves memory, costs about a third more time."""
    max_sequence_length: int = Field(512, ge=1, le=512)
    """T5 tokens of a prompt; padded to it, as the pipeline does."""
    cache_dir: Path = Path("cache")
    """Latents and prompt embeddings, named by their content; runs may share it."""

    # what is learned
    python_name: Literal[
        "train_image",
        "train_image_wocontent",
        "train_image_wocfg",
        "train_image_fm",
        "train_image_sliders",
        "train_image_real",
        "slider_text",
    ] = "train_image"  # EDIT HERE: add yours here and to LOSSES
    """The variant: a name of LOSSES."""
    datasets_folder: Path = Path("datasets")
    """<datasets_folder>/<data set>/<source_folder>/<stem>.* and .../<target_folder>/<stem>.*"""
    datasets: list[str] = Field(["age"], min_length=1)
    """Concepts, trained one after another (slider_text: only names)."""
    source_folder: str = "source"
    """Before."""
    target_folder: str = "target"
    """After; stems as in source_folder."""
    stages: list[str] = []
    """Folders of a sequence instead of source and target, e.g. [child, adult, old]."""
    stage_scales: list[float] = []
    """The slider's position at each stage; one must be 0 (what the others start from). []: evenly
    from 0 to 1."""
    image_ids: list[str] = []
    """train_image_real: stems in source_folder, a LoRA each."""
    on_missing: Literal["error", "skip"] = "error"
    """What to do with a stem that some folder lacks."""
    resolution: int = Field(512, ge=32, multiple_of=16)
    """Side of the square whose area the pictures get, px; aspect ratios are kept (buckets)."""
    train_prompt: str = ""
    """The prompt of training (all variants but slider_text)."""
    target_prompt: str = "picture of a person"
    """slider_text: what the slider is applied to."""
    positive_prompt: str = "photo of a person, smiling, happy"
    """slider_text: where it leads."""
    negative_prompt: str = "photo of a person, frowning"
    """slider_text: where it leads with a negative scale."""

    # noise
    num_inference_steps: int = Field(28, ge=1)
    """N: sigma is one of the N values of an inference of N steps."""
    start_step: int = Field(0, ge=0)
    """First step whose sigma is trained; 0 is pure noise."""
    end_step: int = Field(27, ge=0)
    """Last one, included."""
    guidance_scale: float = 3.5
    """Embedded guidance of FLUX.1-dev, in training and in pictures."""
    cfg_eta: float = 4.0
    """eta: how far the target lies beyond the pair's difference, which makes up for the steps
    that inference skips."""
    noise_scales: list[float] = Field([1.0], min_length=1)
    """beta of the content-preserving schedule x + sigma beta noise; a run each."""
    num_noise_seeds: int | None = Field(31, ge=1)
    """Different noises in a run; 31 is what PairEdit has. null: new noise in every sample."""

    # LoRA and optimizer
    rank: int = Field(16, ge=1)
    """Rank of each adapter."""
    alpha: float = Field(1.0, gt=0)
    """Strength is alpha / rank."""
    train_method: Literal["full", "xattn", "xattn-strict"] = "full"
    """full: both factors of the attention layers. xattn: the upper one stays at random orthonormal
    columns. xattn-strict: that, on keys and values only."""
    learning_rate: float = Field(0.002, gt=0)
    """Constant; AdamW."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's."""
    batch_size: int = Field(1, ge=1)
    """Draws of (pair, sigma, noise) per step and process, sigmas spread evenly; of one shape."""
    train_iteration: int = Field(500, ge=1)
    """Optimizer steps of a run."""
    save_per_steps: int = Field(500, ge=1)
    """Steps between two saves (LoRA files, checkpoint, preview); the end is always saved."""
    train_start: int = Field(1, ge=0)
    """Number of the first version."""
    train_count: int = Field(1, ge=1)
    """How many versions: repeats with other draws."""
    seed: int = 0
    """Every draw belongs to (seed, version, step)."""
    resume_from_checkpoint: Literal["latest"] | None = None
    """latest: skip finished runs, go on with the newest valid checkpoint of the others."""
    checkpoints_total_limit: int | None = Field(1, ge=1)
    """Keep only the newest checkpoints of a run; LoRA files stay."""

    # results
    config_name: str = Field("base", pattern=r"^[^/\\]+$")
    """Free tag, enters names."""
    output_folder: Path = Path("output/models/image/")
    """<output_folder>/<data set>/<run>/ holds everything a run leaves."""
    save_original_format: bool = True
    """Also write <name>.pt, the format of PairEdit and Concept Sliders."""
    log_every: int = Field(10, ge=1)
    """Steps between two log lines; only then the loop waits for the GPU."""
    report_to: Literal["none", "tensorboard", "wandb", "all"] = "none"
    """Trackers beside metrics.jsonl, which is always written."""
    preview: bool = True
    """A strip over `scales` at every save, with generate.py's settings below."""

    # generate.py
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
    html: bool = False
    """Also write page.html beside the sheet: a divider to drag, a slider over the scales."""
    output_folder_gen: Path = Path("output/eval/image/")
    """Where generate.py draws."""
    semantic_lora_path: str = ""
    """train_image_real: the slider that edits the photo."""
    semantic_cfg_scale: float = 0.75
    """train_image_real: share of the slider's velocity, gamma."""

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

    @property
    def stage_table(self) -> list[tuple[float, str]]:
        """(scale, folder) of each stage; the one at scale 0, where the others start, is first."""
        if self.python_name == "train_image_real":
            return [(0.0, self.source_folder)]
        folders = self.stages or [self.source_folder, self.target_folder]
        even = [i / max(1, len(folders) - 1) for i in range(len(folders))]
        table = zip(self.stage_scales or even, folders, strict=False)  # check_settings compares
        return sorted(table, key=lambda stage: stage[0] != 0)


READS_NOISE_SCALE = ("train_image", "train_image_wocontent", "train_image_wocfg")
NO_PAIRS = ("train_image_real", "slider_text")


def check_settings(config: Config) -> list[str]:
    """Settings that do not go together.

    KEEP: no validator of Config; the audit looks at the data even when these are wrong.
    """
    name, scales = config.python_name, config.noise_scales
    first, last, steps = config.start_step, config.end_step, config.num_inference_steps
    stages, positions = config.stages, config.stage_scales
    named: list[Any] = [*scales, *config.image_ids]
    start = config.skips[0] + (name != "train_image_real")  # first step of the preview's slider
    twice = [value for value in named if named.count(value) > 1]
    checks = {
        f"start_step {first} <= end_step {last} < num_inference_steps {steps} does not hold": (
            not first <= last < steps
        ),
        f"noise_scales: {name} has none; leave one value": (
            len(scales) > 1 and name not in READS_NOISE_SCALE
        ),
        f"noise_scales, image_ids: {twice[:1]} is there twice": bool(twice),
        "image_ids and python_name: train_image_real go together": (
            bool(config.image_ids) != (name == "train_image_real")
        ),
        f"stages: {name} reads no pairs": bool(stages) and name in NO_PAIRS,
        "stages: name two folders or more": len(stages) == 1,
        "stage_scales: one for each of stages": bool(positions) and len(positions) != len(stages),
        "stage_scales: exactly one must be 0": bool(positions) and positions.count(0.0) != 1,
        f"skips: {min(config.skips)}; -1 is the least, and is all steps": min(config.skips) < -1,
        f"skips: {config.skips[0]} of {steps} steps, so the slider would never act; lower it, or "
        "preview: false": config.preview and start >= steps,
    }
    return [problem for problem, wrong in checks.items() if wrong]


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


# --- 2. runs and pairs ----------------------------------------------------------------------------


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


class Pair(NamedTuple):
    """The same scene at every stage; the first file is the one at scale 0."""

    name: str
    files: tuple[Path, ...]


def find_pairs(config: Config, dataset: str) -> tuple[list[Pair], list[str], list[str]]:
    """Files of the same stem in every stage's folder -> (pairs, what was left out, problems)."""
    root = config.datasets_folder / dataset
    folders = [root / folder for _, folder in config.stage_table]
    if lacking := [folder for folder in folders if not folder.is_dir()]:
        return [], [], [f"{dataset}: no folder {folder}" for folder in lacking]
    stages = [list_images(folder) for folder in folders]
    wanted = sorted(set().union(*stages))
    if config.python_name == "train_image_real":
        wanted = config.image_ids or wanted
    pairs: list[Pair] = []
    left_out: list[str] = []
    problems: list[str] = []
    for stem in wanted:
        lacking = [f for f, found in zip(folders, stages, strict=True) if stem not in found]
        twice = [found[stem] for found in stages if len(found.get(stem, [])) > 1]
        if lacking:
            text = f"{dataset}: no picture {stem}.* in {', '.join(map(str, lacking))}"
            (left_out if config.on_missing == "skip" else problems).append(text)
        elif twice:
            several = ", ".join(entry.path for entry in twice[0])
            problems.append(f"{dataset}: {several} have the same name; keep one")
        else:
            pairs.append(Pair(stem, tuple(Path(found[stem][0].path) for found in stages)))
    if not pairs and not problems:
        problems.append(f"{dataset}: no pair in {', '.join(map(str, folders))}")
    return pairs, left_out, problems


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


def check_pairs(pairs: Sequence[Pair], index: FileIndex) -> tuple[list[str], list[str]]:
    """Look at the pictures -> (what is odd, problems): unreadable, equal, of another shape."""
    files = sorted({file for pair in pairs for file in pair.files})
    problems = check_pictures(files, index)
    readable = {file for file in files if file.exists() and index.get(file, file.stat())}
    index_content(sorted(readable), index)
    odd = []
    for pair in (pair for pair in pairs if readable.issuperset(pair.files)):
        first, *others = pair.files
        for other in others:
            if index.content(first) == index.content(other):
                problems.append(f"{first} and {other} are the same picture: no change to learn")
            elif abs(math.log(index.aspect(first) / index.aspect(other))) > 0.02:
                odd.append(f"{other} has another shape than {first}; both are cropped to one size")
    return odd, problems


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


def device_name(device: int | str | None) -> str | None:
    """Of the config's device: 1 is cuda:1."""
    return f"cuda:{device}" if isinstance(device, int) else device


# differs: each script audits its own config
def audit(config: Config) -> list[str]:
    """Everything that can be known to be wrong before a model loads: one line per problem.

    What was found, left out or is odd is printed and lies in output_folder/audit.json.
    """
    problems = check_settings(config) + check_device("device", device_name(config.device))
    problems += check_precision(config.base_model_precision)
    wanted = {"none": [], "all": []}.get(config.report_to, [config.report_to])
    for package in (name for name in wanted if not importlib.util.find_spec(name)):
        problems.append(f"report_to: {package} is not installed: pip install {package}")
    problems += check_checkpoint(config.pretrained_model_name_or_path)
    found: dict[str, Any] = {}
    index = None
    for name, folder in (("output_folder", config.output_folder), ("cache_dir", config.cache_dir)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            problems.append(f"{name}: cannot write there: {error}")
    with contextlib.suppress(OSError):
        index = FileIndex(config.cache_dir)
    for number, dataset in enumerate(config.datasets):
        try:
            prompts_of(config, number)
        except UserError as error:
            problems.append(str(error))
        if config.python_name == "slider_text":
            continue
        pairs, left_out, wrong = find_pairs(config, dataset)
        odd, unreadable = check_pairs(pairs, index or FileIndex(None))
        problems += wrong + unreadable
        if left_out or odd:
            log.warning("%s: note\n%s", dataset, listed(left_out + odd))
        found[dataset] = {"pairs": [pair.name for pair in pairs], "left_out": left_out, "odd": odd}
    report = json.dumps({"datasets": found, "problems": problems}, indent=2, ensure_ascii=False)
    path = config.output_folder / "audit.json"
    with contextlib.suppress(OSError):
        save_atomic(path, lambda file: file.write_text(report, encoding="utf-8"))
    problems = list(dict.fromkeys(problems))
    if len(problems) > 10:
        problems = [*problems[:10], f"and {len(problems) - 10} more, all of them in {path}"]
    return problems


# --- 3. geometry, encoding and cache --------------------------------------------------------------


class Picture(NamedTuple):
    """One picture as the model gets it: where it comes from and the transform."""

    source: Path | Image.Image
    content: str  # blake2b of the file, or of the pixels of a picture in memory
    size: tuple[int, int]  # (W, H) px after the transform
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)  # left top right bottom, relative
    flip: bool = False


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


def fit_pair(config: Config, pair: Pair, index: FileIndex) -> tuple[Picture, ...]:
    """All stages of a pair in the bucket of its first picture, each cropped around its middle."""
    fact = index.known(pair.files[0])
    size = nearest_bucket(fact["width"], fact["height"], config.resolution)
    return tuple(
        Picture(file, index.content(file), size, cover_box(index.aspect(file), size[0] / size[1]))
        for file in pair.files
    )


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


# --- 4. model and LoRA ----------------------------------------------------------------------------


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


def target_layers(transformer: Any, train_method: str) -> list[str]:
    """Paths of the linear layers that get an adapter."""
    ends = KEYS_AND_VALUES if train_method == "xattn-strict" else ATTENTION
    return [path for path, _ in transformer.named_modules() if path.endswith(ends)]


def start_factors(shapes: dict[str, Any], rank: int, train_method: str, *parts: object) -> dict:
    """Factors of a new adapter that changes nothing yet; they belong to `parts`.

    shapes: {path: (out, in)}. full: down is Kaiming-uniform with a = 1, up is zero. xattn: up is
    fixed, with random orthonormal columns, and down starts at zero.
    """
    factors = {}
    for path, (n_out, n_in) in shapes.items():
        if train_method == "full":
            draw = torch.Generator().manual_seed(draw_key(*parts, path))
            down = (torch.rand(rank, n_in, generator=draw) * 2 - 1) * math.sqrt(3 / n_in)
            factors[path] = down, torch.zeros(n_out, rank)
        else:
            up = torch.linalg.qr(normal((n_out, rank), *parts, path)).Q
            factors[path] = torch.zeros(rank, n_in), up
    return factors


def save_slider(path: Path, transformer: Any, name: str, about: dict[str, Any]) -> None:
    """Write diffusers/PEFT names, with alpha / r folded into lora_B.

    Loaders differ in where they look for alpha (metadata, `.alpha` keys, nowhere), so the file says
    alpha = r: the strength is right everywhere. Exact when alpha / r is a power of two (1 / 16).
    """
    from peft import LoraConfig

    tensors = {}
    for layer_path, layer in slider_layers(transformer, name).items():
        where, strength = f"transformer.{layer_path}", layer.strength[name]
        tensors[f"{where}.lora_A.weight"] = layer.down[name].detach().cpu().clone()
        tensors[f"{where}.lora_B.weight"] = (layer.up[name].detach() * strength).cpu()
        rank = layer.down[name].shape[0]
    layers = sorted(slider_layers(transformer, name))
    settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers).to_dict()
    settings["target_modules"] = layers
    plain = str | int | float | bool | list | dict | None
    adapter = {f"transformer.{k}": v for k, v in settings.items() if isinstance(v, plain)}
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(adapter, sort_keys=True),
        "image_edit_lora": json.dumps(about, sort_keys=True),
    }
    save_atomic(path, lambda file: save_file(tensors, file, metadata=metadata))


def save_original(path: Path, transformer: Any, name: str) -> None:
    """Write the format of PairEdit and Concept Sliders: lora_unet_* keys with alpha, torch.save."""
    tensors = {}
    for layer_path, layer in slider_layers(transformer, name).items():
        where = "lora_unet_" + layer_path.replace(".", "_")
        tensors[f"{where}.lora_down.weight"] = layer.down[name].detach().cpu().clone()
        tensors[f"{where}.lora_up.weight"] = layer.up[name].detach().cpu().clone()
        alpha = layer.strength[name] * layer.down[name].shape[0]
        tensors[f"{where}.alpha"] = torch.tensor(alpha)
    save_atomic(path, lambda file: torch.save(tensors, file))


# --- 5. objective ---------------------------------------------------------------------------------


class Given(NamedTuple):
    """What a loss is made of; latents are tokens (B, S, 4C), fp32."""

    source: torch.Tensor  # x_A, the stage at scale 0
    target: torch.Tensor  # x_B
    noise: torch.Tensor
    sigma: torch.Tensor  # (B, 1, 1)
    scale: torch.Tensor  # (B,) position of the target on the slider; 1 for a pair
    noise_scale: float  # beta
    eta: float
    teacher: tuple[torch.Tensor, ...] = ()  # slider_text: velocities of target, +, - prompts


class Pass(NamedTuple):
    """One part of the fused batch: what the model sees, what it should say, what is on."""

    name: str  # of its loss in the log
    noisy: torch.Tensor  # (B, S, 4C)
    velocity: torch.Tensor  # (B, S, 4C), the target
    lane: Lane


CONTENT, FROZEN_CONTENT = On("content"), On("content", frozen=True)


def train_image(g: Given) -> list[Pass]:  # EDIT HERE: the objective; ablations follow
    """PairEdit: content LoRA rebuilds x_A, semantic LoRA adds eta times the change.

    The content-preserving schedule x_A + sigma n never attenuates the picture, so n is its
    velocity; -(x_B - x_A) moves a sample towards x_B, for sampling lowers sigma.
    """
    n = g.noise_scale * g.noise
    noisy = g.source + g.sigma * n
    change = g.eta * (g.source - g.target)
    return [
        Pass("content", noisy, n, (CONTENT,)),
        Pass("semantic", noisy, n + change, (FROZEN_CONTENT, On("semantic", g.scale))),
    ]


def train_image_wocontent(g: Given) -> list[Pass]:
    """Without the content LoRA: the semantic one has to learn content, too."""
    n = g.noise_scale * g.noise
    velocity = n + g.eta * (g.source - g.target)
    return [Pass("semantic", g.source + g.sigma * n, velocity, (On("semantic", g.scale),))]


def train_image_wocfg(g: Given) -> list[Pass]:
    """Without guidance: the semantic LoRA only denoises x_B."""
    n = g.noise_scale * g.noise
    return [
        Pass("content", g.source + g.sigma * n, n, (CONTENT,)),
        Pass("semantic", g.target + g.sigma * n, n, (FROZEN_CONTENT, On("semantic", g.scale))),
    ]


def train_image_fm(g: Given) -> list[Pass]:
    """With the ordinary schedule (1 - sigma) x_A + sigma noise."""
    noisy = (1 - g.sigma) * g.source + g.sigma * g.noise
    velocity = g.noise - g.source
    change = g.eta * (g.source - g.target)
    return [
        Pass("content", noisy, velocity, (CONTENT,)),
        Pass("semantic", noisy, velocity + change, (FROZEN_CONTENT, On("semantic", g.scale))),
    ]


def train_image_sliders(g: Given) -> list[Pass]:
    """Concept Sliders from pictures (Gandikota et al. 2023): +scale on x_B, -scale on x_A."""
    noisy = [(1 - g.sigma) * x + g.sigma * g.noise for x in (g.target, g.source)]
    return [
        Pass("positive", noisy[0], g.noise - g.target, (On("semantic", g.scale),)),
        Pass("negative", noisy[1], g.noise - g.source, (On("semantic", -g.scale),)),
    ]


def train_image_real(g: Given) -> list[Pass]:
    """Inversion LoRA: overfit one photo, so that any noise leads to it."""
    noisy = (1 - g.sigma) * g.source + g.sigma * g.noise
    return [Pass("content", noisy, g.noise - g.source, (CONTENT,))]


def slider_text(g: Given) -> list[Pass]:
    """Concept Sliders from text: v_t + eta (v_+ - v_-), as long as v_+. source: noisy tokens."""
    neutral, positive, negative = g.teacher
    guided = neutral + g.eta * (positive - negative)
    norms = (v.flatten(1).norm(dim=1).view(-1, 1, 1) for v in (positive, guided))
    length, own = norms
    return [Pass("semantic", g.source, guided * (length / own), (On("semantic", g.scale),))]


LOSSES: dict[str, Callable[[Given], list[Pass]]] = {
    "train_image": train_image,
    "train_image_wocontent": train_image_wocontent,
    "train_image_wocfg": train_image_wocfg,
    "train_image_fm": train_image_fm,
    "train_image_sliders": train_image_sliders,
    "train_image_real": train_image_real,
    "slider_text": slider_text,
}


def empty_passes(variant: str) -> list[Pass]:
    """A variant's passes of nothing, to look at their names and lanes."""
    x = torch.zeros(1, 1, 1)
    return LOSSES[variant](Given(x, x, x, x, x.view(1), 1.0, 1.0, (x, x, x)))


def adapters_of(variant: str) -> list[str]:
    """The adapters that a variant trains; the last one is what it is for."""
    return list(dict.fromkeys(on.adapter for part in empty_passes(variant) for on in part.lane))


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


# --- 6. sampling ----------------------------------------------------------------------------------

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


def first_noise(
    seed: int, channels: int, grid: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """(1, S, 4C), fp32: the noise that FluxPipeline starts from with a CPU generator of `seed`."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn((1, channels, 2 * grid[0], 2 * grid[1]), generator=draw, dtype=dtype)
    return pack_tokens(noise).to(device, torch.float32)


# --- 7. checkpoints -------------------------------------------------------------------------------

NOT_LEARNED_FROM = {  # settings that may differ between a checkpoint and the run that continues it
    "device", "gradient_checkpointing", "batch_size", "report_to", "cache_dir",
    "datasets_folder", "datasets", "image_ids",
    "noise_scales", "on_missing", "train_iteration", "save_per_steps", "train_start", "train_count",
    "resume_from_checkpoint", "checkpoints_total_limit", "output_folder", "config_name",
    "save_original_format", "log_every", "preview", "use_trained_lora_path", "trained_lora_path",
    "prompt", "use_prompts_file", "prompts_file", "scales", "skips", "start_seed_gen", "count_gen",
    "use_random_seed", "output_folder_gen", "html", "semantic_lora_path", "semantic_cfg_scale",
}  # fmt: skip


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


def set_earlier_aside(folder: Path) -> None:
    """Move what an earlier run left into earlier-<n>/."""
    old = [*list_checkpoints(folder), *folder.glob("*epoch*.safetensors"), *folder.glob("*.pt")]
    names = ("samples", "metrics.jsonl", "report.html")
    old += [folder / name for name in names if (folder / name).exists()]
    if not old:
        return
    numbers = (n for n in itertools.count(1) if not (folder / f"earlier-{n}").exists())
    place = folder / f"earlier-{next(numbers)}"
    place.mkdir()
    for path in old:
        path.rename(place / path.name)
    log.warning(
        "%s holds an earlier run: it is now in %s (to go on with it: move it back, "
        "--resume_from_checkpoint latest)",
        folder,
        place.name,
    )


def newest_checkpoint(folder: Path, now: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """The newest valid checkpoint of a run. `now`: what this run is trained as.

    Raises:
        UserError: it was trained with other settings.
    """
    for place in reversed(list_checkpoints(folder)):
        state = valid_checkpoint(place)
        if not state:
            log.warning("%s is damaged; looking for an older one", place)
            continue
        before = state["trained_as"]
        changed = [k for k in sorted(now.keys() | before.keys()) if now.get(k) != before.get(k)]
        if changed:
            lines = [f"{key}: was {before.get(key)}, is {now.get(key)}" for key in changed]
            raise UserError(
                f"{place} was trained with other settings; set them back, or start anew without "
                f"resume_from_checkpoint\n{listed(lines)}"
            )
        return place, state
    return None


# --- 8. loop --------------------------------------------------------------------------------------


class Visit(NamedTuple):
    """One sample of a step: everything random about it."""

    pair: int
    stage: int  # from 1
    step_index: int  # of the sigma table
    noise: tuple[object, ...] | int  # what the noise belongs to, or the number of its seed


def draw_visits(
    config: Config, version: int, step: int, groups: Sequence[Sequence[int]], count: int
) -> list[Visit]:
    """The `count` samples of an optimizer step, over all processes.

    The first pair is drawn from all, the others from those of its shape (groups[pair]), so each
    pair is as likely. Sigmas are drawn from `count` equal parts of start_step..end_step.
    """
    key = config.seed, version, step
    first = int(uniform(*key, "pair", 0) * len(groups))
    stages = len(config.stage_table) - 1
    levels = config.end_step - config.start_step + 1
    visits = []
    for number in range(count):
        group = groups[first]
        other = group[int(uniform(*key, "pair", number) * len(group))]
        stage = 1 + int(uniform(*key, "stage", number) * stages) if stages else 0
        part = (number + uniform(*key, "sigma", number)) / count
        noise = (*key, "noise", number)
        seeds = config.num_noise_seeds
        visits.append(
            Visit(
                other if number else first,
                stage,
                config.start_step + int(part * levels),
                int(uniform(*noise) * seeds) if seeds else noise,
            )
        )
    return visits


def draw_noise(visit: Visit, shape: Sequence[int]) -> torch.Tensor:
    """(S, 4C), drawn in the shape of tokens, as PairEdit does; numbered seeds are torch's own."""
    if isinstance(visit.noise, int):
        return torch.randn(1, *shape, generator=torch.Generator().manual_seed(visit.noise))[0]
    return normal(shape, *visit.noise)


def progress(items: Iterable[Any] | None, label: str, **options: Any) -> Any:
    """A progress bar on the first process, none on the others."""
    options["disable"] = options.get("disable", False) or os.environ.get("RANK", "0") != "0"
    return tqdm(items, desc=label, **options)


def memory_gb(device: torch.device) -> float:
    """Peak memory so far: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class PairEditTrainer:
    """Cache, train, preview. fit() does it all; every method can be called alone.

    >>> PairEditTrainer(load_config(Config, ["--config", "configs/pairedit_age.yaml"])).fit()
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.cache_dir = config.cache_dir
        self.dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
        self.accelerator: Any = None
        self.index: FileIndex
        self.pairs: dict[str, list[Pair]] = {}
        self.board = Switchboard()
        self.transformer: Any = None  # as it trains: wrapped when there are several processes
        self.bare: Any = None
        self.optimizer: Any = None
        self.step = 0

    def setup_accelerator(self) -> None:
        """Processes and devices."""
        if self.accelerator:
            return
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

        self.accelerator = Accelerator(
            mixed_precision="no",  # KEEP: layers cast by themselves, in training as in inference
            cpu=not torch.accelerator.is_available(),
            device_placement=False,
            log_with=None if self.config.report_to == "none" else self.config.report_to,
            project_dir=self.config.output_folder,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2)),
                DistributedDataParallelKwargs(broadcast_buffers=False),
            ],
        )
        log.setLevel(logging.INFO if self.accelerator.is_main_process else logging.ERROR)
        if self.config.device is not None and self.accelerator.num_processes > 1:
            log.warning("device is not read: each process has a device of its own")

    @property
    def device(self) -> torch.device:
        """Where the models live."""
        name = device_name(self.config.device)
        several = self.accelerator.num_processes > 1
        return torch.device(name) if name and not several else self.accelerator.device

    def find_data(self) -> None:
        """Pair and hash the pictures. Raises UserError with every problem."""
        if wrong := check_settings(self.config):
            raise UserError(listed(wrong))
        if self.pairs or self.config.python_name == "slider_text":
            return
        with self.accelerator.main_process_first():
            self.index = FileIndex(self.cache_dir)  # KEEP: inside, to see what process 0 recorded
            problems = []
            for dataset in self.config.datasets:
                self.pairs[dataset], _, wrong = find_pairs(self.config, dataset)
                problems += wrong + check_pairs(self.pairs[dataset], self.index)[1]
            if problems:
                raise UserError(f"{len(problems)} problem(s)\n{listed(problems)}")

    # -- cache

    @functools.cached_property
    def folder(self) -> Path:
        """The checkpoint; from the Hub if it is not a folder."""
        name = self.config.pretrained_model_name_or_path
        return Path(name) if Path(name).is_dir() else fetch_checkpoint(name, "*/*")

    @functools.cached_property
    def _encoders(self) -> tuple[str, str]:
        text = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        return (
            fingerprint([self.folder / "vae"]),
            fingerprint([self.folder / part for part in text], str(self.dtype)),
        )

    def latent_key(self, picture: Picture) -> str:
        """Name of a picture's entry: VAE, content, size and crop."""
        place = picture.content, picture.size, picture.box
        return cache_key("flux latent", vae=self._encoders[0], picture=place)

    def prompt_key(self, prompt: str) -> str:
        """Name of a prompt's entry: text encoders, text, length."""
        length = self.config.max_sequence_length
        return cache_key("flux prompt", encoders=self._encoders[1], prompt=prompt, length=length)

    def photos(self, run: Run) -> list[Pair]:
        """What a run is trained on."""
        pairs = self.pairs.get(run.dataset, [])
        return [pair for pair in pairs if run.image_id in ("", pair.name)]

    def preview_prompt(self, run: Run) -> str:
        """What its strips are drawn with."""
        return prompts_of(self.config, self.config.datasets.index(run.dataset))[0]

    def cache_jobs(self) -> dict[str, Picture | str]:
        """Every entry that training and previews can ask for: {key: picture or prompt}."""
        config = self.config
        prompts = [config.train_prompt]
        if config.python_name == "slider_text":
            prompts = [config.target_prompt, config.positive_prompt, config.negative_prompt]
        if config.preview:
            prompts += [self.preview_prompt(run) for run in all_runs(config)]
        jobs: dict[str, Picture | str] = {self.prompt_key(prompt): prompt for prompt in prompts}
        for pair in (pair for pairs in self.pairs.values() for pair in pairs):
            for picture in fit_pair(config, pair, self.index):
                jobs[self.latent_key(picture)] = picture
        return jobs

    def _intact(self, key: str) -> bool:
        path = entry_path(self.cache_dir, key)
        try:
            return path.exists() and bool(read_entry(path))
        except ValueError as error:
            log.warning("%s; it is built again", error)
            return False

    def cache_embeddings(self) -> int:
        """Encode what is missing, a share per process; VAE and text encoders one after the other.

        Returns how many entries this process encoded; with nothing to do no model is loaded.
        """
        self.setup_accelerator()
        self.find_data()
        jobs = self.cache_jobs()
        # KEEP: shares of ALL entries; what is missing changes while other processes write
        share = sorted(jobs)[self.accelerator.process_index :: self.accelerator.num_processes]
        mine = {key: jobs[key] for key in share if not self._intact(key)}
        pictures = {key: job for key, job in mine.items() if isinstance(job, Picture)}
        prompts = {key: job for key, job in mine.items() if isinstance(job, str)}
        log.info("cache: %d entries, %d to encode", len(jobs), len(mine))
        if pictures:
            vae = load_vae(self.folder, self.device)
            for key, picture in progress(pictures.items(), "encode pictures"):
                latent = encode_pixels(vae, to_pixels(load_picture(picture)))
                write_entry(self.cache_dir, key, {"latent": latent[0].cpu()})
            vae = None  # KEEP: the encoders are never in memory together
            self._free()
        if prompts:
            encoders = load_text_encoders(self.folder, self.dtype, self.device)
            for key, prompt in progress(prompts.items(), "encode prompts"):
                text = encode_prompt_flux(encoders, prompt, self.config.max_sequence_length)
                write_entry(self.cache_dir, key, text._asdict())
            encoders = None
            self._free()
        self.accelerator.wait_for_everyone()
        return len(mine)

    def _free(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _entry(self, key: str) -> dict[str, torch.Tensor]:
        try:
            return read_entry(entry_path(self.cache_dir, key))
        except ValueError as error:
            raise UserError(f"{error}. Repair: cache_embeddings.py --verify") from error

    @functools.lru_cache(maxsize=16)  # noqa: B019 (as long as the trainer)
    def text(self, prompt: str) -> Text:
        """A prompt's embeddings on the device."""
        entry = self._entry(self.prompt_key(prompt))
        return Text(**{name: tensor.to(self.device) for name, tensor in entry.items()})

    def latents(self, pair: Pair) -> torch.Tensor:
        """All stages of a pair, (stages, C, h, w), fp32, CPU."""
        pictures = fit_pair(self.config, pair, self.index)
        return torch.stack([self._entry(self.latent_key(p))["latent"] for p in pictures])

    # -- model

    def load_transformer(self) -> None:
        """The frozen base and the adapters of this variant."""
        if self.transformer:
            return
        config = self.config
        self.bare = load_flux(self.folder, config.base_model_precision, self.dtype, self.device)
        self.guided = self.bare.config.guidance_embeds
        if config.gradient_checkpointing:
            self.bare.enable_gradient_checkpointing()
        paths = target_layers(self.bare, config.train_method)
        layers = dict(self.bare.named_modules())
        self.shapes = {p: (layers[p].out_features, layers[p].in_features) for p in paths}
        if not paths:
            raise UserError(f"{self.folder}: its transformer has none of the layers {ATTENTION}")
        for name in adapters_of(config.python_name):
            factors = self._start_factors(name, config.train_start)
            add_slider(self.bare, self.board, name, factors, config.alpha / config.rank)
            for layer in slider_layers(self.bare, name).values():
                layer.up[name].requires_grad_(config.train_method == "full")
        # KEEP: DDP must wrap the transformer itself, or gradients are never averaged
        self.transformer = self.accelerator.prepare(self.bare)
        scheduler = read_model_json(str(self.folder), "scheduler/scheduler_config.json")
        self.scheduler_config = scheduler

    def _start_factors(self, name: str, version: int) -> dict[str, Any]:
        config = self.config
        parts = config.seed, version, "start", name
        return start_factors(self.shapes, config.rank, config.train_method, *parts)

    def begin(self, run: Run) -> None:
        """New adapters, optimizer and data of a run; the transformer stays."""
        config = self.config
        with torch.no_grad():
            for name in adapters_of(config.python_name):
                factors = self._start_factors(name, run.version)
                for path, layer in slider_layers(self.bare, name).items():
                    layer.down[name].copy_(factors[path][0])
                    layer.up[name].copy_(factors[path][1])
        self.trained = [p for p in self.bare.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.step, self.run = 0, run
        photos = self.photos(run)
        latents = [self.latents(pair) for pair in photos]
        self.names = [pair.name for pair in photos]
        self.grids = [(x.shape[-2] // 2, x.shape[-1] // 2) for x in latents]
        self.tokens = [pack_tokens(x) for x in latents]  # (stages, S, 4C) each
        if config.python_name == "slider_text":
            self.names, self.grids, self.tokens = [run.dataset], [self.square()], []
        alike: dict[tuple[int, int], list[int]] = {}
        for i, grid in enumerate(self.grids):
            alike.setdefault(grid, []).append(i)
        self.groups = [alike[grid] for grid in self.grids]
        self.prompt = self.text(config.train_prompt) if self.tokens else None

    def square(self) -> tuple[int, int]:
        """(rows, columns) of tokens of a picture of resolution x resolution px."""
        vae = read_model_json(str(self.folder), "vae/config.json")
        side = self.config.resolution // (2 * 2 ** (len(vae["block_out_channels"]) - 1))
        return side, side

    @functools.lru_cache(maxsize=64)  # noqa: B019 (as long as the trainer)
    def sigmas(self, tokens: int) -> torch.Tensor:
        """sigma_table() for a picture of so many tokens."""
        return sigma_table(self.scheduler_config, self.config.num_inference_steps, tokens)

    # -- objective

    def predictor(self, model: Any, text: Text, grid: tuple[int, int]) -> Predict:
        """Velocity of `model` under a prompt, as a function of (tokens, sigma, lanes)."""

        def predict(
            tokens: torch.Tensor, sigma: float | torch.Tensor, lanes: Sequence[Lane]
        ) -> torch.Tensor:
            self.board.lanes = lanes
            sigmas = torch.as_tensor(sigma, device=tokens.device).expand(len(tokens))
            scale = self.config.guidance_scale
            return flux_velocity(model, tokens, sigmas, text, grid, scale, self.guided)

        return predict

    def given(self, visits: Sequence[Visit]) -> Given:
        """Tensors of these samples on the device."""
        table = self.sigmas(math.prod(self.grids[visits[0].pair]))
        scales = [scale for scale, _ in self.config.stage_table]
        parts = (
            torch.stack([self.tokens[v.pair][0] for v in visits]),
            torch.stack([self.tokens[v.pair][v.stage] for v in visits]),
            torch.stack([draw_noise(v, self.tokens[v.pair].shape[1:]) for v in visits]),
            table[[v.step_index for v in visits]].view(-1, 1, 1),
            torch.tensor([scales[v.stage] for v in visits]),
        )
        x_a, x_b, noise, sigma, scale = (x.to(self.device, non_blocking=True) for x in parts)
        eta = self.config.cfg_eta
        return Given(x_a, x_b, noise, sigma, scale, self.run.noise_scale, eta)

    @torch.no_grad()
    def given_text(self, visits: Sequence[Visit]) -> Given:
        """slider_text: pictures that the base has drawn up to a step, and its velocities there.

        All are drawn as one batch; a sample stays as it is from its own step on.
        """
        config, grid, count = self.config, self.grids[0], len(visits)
        texts = [config.target_prompt, config.positive_prompt, config.negative_prompt]
        prompts = [self.text(prompt) for prompt in texts]
        shape = math.prod(grid), self.bare.config.in_channels
        sigmas = self.sigmas(shape[0]).to(self.device)
        ends = torch.tensor([v.step_index for v in visits], device=self.device)
        tokens = torch.stack([draw_noise(v, shape) for v in visits]).to(self.device)
        draw = self.predictor(self.bare, prompts[0], grid)
        for i in range(max(v.step_index for v in visits)):
            width = (sigmas[i + 1] - sigmas[i]) * (ends > i)  # (B,)
            tokens = tokens + width.view(-1, 1, 1) * draw(tokens, sigmas[i], [()])
        every = (
            torch.cat([part.expand(count, *part.shape[1:]) for part in parts])
            for parts in zip(*prompts, strict=True)
        )
        teach = self.predictor(self.bare, Text(*every), grid)
        teacher = teach(tokens.repeat(3, 1, 1), sigmas[ends].repeat(3), [()]).chunk(3)
        sigma, scale = sigmas[ends].view(-1, 1, 1), torch.ones(count, device=self.device)
        return Given(tokens, tokens, tokens, sigma, scale, 1.0, config.cfg_eta, teacher)

    def training_loss(self, visits: Sequence[Visit]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Sum of the passes' squared errors, all passes in one forward; and each by name."""
        config = self.config
        g = self.given(visits) if self.tokens else self.given_text(visits)
        passes = LOSSES[config.python_name](g)
        text = self.prompt or self.text(config.target_prompt)
        predict = self.predictor(self.transformer, text, self.grids[visits[0].pair])
        noisy = torch.cat([part.noisy for part in passes])
        sigmas = g.sigma.flatten().repeat(len(passes))
        velocity = predict(noisy, sigmas, [part.lane for part in passes]).chunk(len(passes))
        losses = {
            part.name: F.mse_loss(v, part.velocity)
            for part, v in zip(passes, velocity, strict=True)
        }
        return torch.stack(list(losses.values())).sum(), losses

    # -- the loop

    def fit(self) -> None:
        """Cache, load once, train every run, save."""
        self.setup_accelerator()
        self.find_data()
        runs, found = all_runs(self.config), {}
        if self.config.resume_from_checkpoint:
            for run in runs:
                found[run] = newest_checkpoint(run_folder(self.config, run), self.trained_as(run))
        self.cache_embeddings()
        with StopSignal() as stop:
            for number, run in enumerate(runs, 1):
                folder, start = run_folder(self.config, run), found.get(run)
                log.info("run %d of %d: %s", number, len(runs), folder)
                if start and start[1]["step"] >= self.config.train_iteration:
                    log.info("it is finished (step %d)", start[1]["step"])
                    continue
                self.load_transformer()
                # a signal may have come while models were loaded or the last preview was drawn
                if self._agree(stop.requested, True) or self.train(run, stop, start):
                    log.info("stopped at step %d; --resume_from_checkpoint latest", self.step)
                    break
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def trained_as(self, run: Run) -> dict[str, Any]:
        """All that decides what a run learns: settings, pictures, noise scale."""
        settings = self.config.model_dump(mode="json", exclude=NOT_LEARNED_FROM)
        pictures = [self.index.content(file) for pair in self.photos(run) for file in pair.files]
        return {
            **settings,
            "noise_scale": run.noise_scale,
            "pictures": draw_key(pictures),
            "batch_size x processes": self.config.batch_size * self.accelerator.num_processes,
        }

    def train(
        self, run: Run, stop: StopSignal, start: tuple[Path, dict[str, Any]] | None = None
    ) -> bool:
        """One run, from its beginning or a checkpoint; returns whether a signal ended it early."""
        config, folder = self.config, run_folder(self.config, run)
        main = self.accelerator.is_main_process
        self.begin(run)
        if start:
            self._restore(*start)
        elif main:
            set_earlier_aside(folder)
        metrics = None
        if main:
            run_record(folder, config, Path(__file__))
            metrics = MetricLog(folder / "metrics.jsonl", self.step)
            self._draw_pairs(folder)
        if config.report_to != "none":
            self.accelerator.init_trackers(
                folder.name,
                {"config": config.model_dump_json(), "noise_scale": run.noise_scale},
                {"wandb": {"dir": str(folder)}},
            )
        stopped = self._loop(run, stop, metrics)
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []  # the next run has its own
        if metrics:
            metrics.close()
            self._write_card(run)
            write_report(folder)
        return stopped

    def _loop(self, run: Run, stop: StopSignal, metrics: MetricLog | None) -> bool:
        config, stopped = self.config, False
        rank, count = self.accelerator.process_index, config.batch_size
        total = count * self.accelerator.num_processes
        window: list[tuple[list[str], torch.Tensor]] = []  # (pairs, losses) since the last log line
        bar = progress(None, "train", total=config.train_iteration, initial=self.step, unit="step")
        clock = time.monotonic()  # of the window; stands still while saving
        while self.step < config.train_iteration and not stopped:
            visits = draw_visits(config, run.version, self.step, self.groups, total)
            visits = visits[rank * count : (rank + 1) * count]
            loss, losses = self.training_loss(visits)
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            bar.update()
            values = torch.stack([value.detach() for value in losses.values()])
            window.append(([self.names[visit.pair] for visit in visits], values))
            logging_now = self.step % config.log_every == 0
            stopped = self._agree(stop.requested, logging_now or self.step % 100 == 0)
            saving = stopped or self.step % config.save_per_steps == 0
            saving = saving or self.step == config.train_iteration
            if saving or logging_now:
                pace = (time.monotonic() - clock) / len(window)
                self._log(bar, metrics, dict(zip(losses, self._means(window), strict=True)), pace)
                window, clock = [], time.monotonic()
            if saving:
                pause = time.monotonic()
                self.save(run)
                if config.preview and not stopped:
                    self.preview(run)
                clock += time.monotonic() - pause
        bar.close()
        return stopped

    def _agree(self, requested: bool, now: bool) -> bool:
        """Whether any process got a stop signal; several ask each other only when it is `now`."""
        if self.accelerator.num_processes == 1:
            return requested
        if not now:
            return False
        if requested:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def _means(self, window: Sequence[tuple[list[str], torch.Tensor]]) -> list[float]:
        """Mean of each loss over steps and processes. Raises UserError when it is not finite."""
        losses = torch.stack([values for _, values in window])  # (steps, losses)
        losses = self.accelerator.reduce(losses, "mean")
        bad = (~torch.isfinite(losses).all(dim=1)).nonzero()
        if len(bad):
            first = int(bad[0])
            kept = list_checkpoints(run_folder(self.config, self.run))
            raise UserError(
                f"the loss of step {self.step - len(window) + first + 1} is "
                f"{losses[first].tolist()}; pairs of this process: {', '.join(window[first][0])}. "
                f"Nothing was saved since {kept[-1].name if kept else 'the start'}; lower "
                "learning_rate or look at those pictures"
            )
        return losses.mean(dim=0).tolist()

    def _log(
        self, bar: Any, metrics: MetricLog | None, losses: dict[str, float], pace: float
    ) -> None:
        """One line on the screen, the same values in metrics.jsonl and the trackers."""
        steps = self.config.train_iteration
        values = {
            "loss": sum(losses.values()),
            **{f"loss_{name}": value for name, value in losses.items()},
            "lr": self.config.learning_rate,
            "seconds_per_step": pace,
            "memory_gb": memory_gb(self.device),
        }
        left = datetime.timedelta(seconds=round(pace * (steps - self.step)))
        parts = " ".join(f"{name} {value:.4f}" for name, value in losses.items())
        if metrics:
            bar.write(
                f"step {self.step}/{steps} loss {values['loss']:.4f} ({parts}) "
                f"lr {values['lr']:.1e} {pace:.3f} s/step {values['memory_gb']:.1f} GB eta {left}"
            )
            metrics.write(self.step, **values)
        self.accelerator.log(values, step=self.step)

    # -- what a run leaves

    def save(self, run: Run) -> None:
        """LoRA files of this step, then the checkpoint to go on from; complete or absent."""
        if not torch.stack([p.isfinite().all() for p in self.trained]).all():
            raise UserError(
                f"the weights of step {self.step} are not finite; nothing of it was saved. Lower "
                "learning_rate"
            )
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            folder = run_folder(self.config, run)
            stem = lora_stem(self.config, run, self.step)
            *helpers, main = adapters_of(self.config.python_name)
            for name, suffix in [(main, ""), *((helper, "_0") for helper in helpers)]:
                about = self._about(run) | {"adapter": name}
                save_slider(folder / f"{stem}{suffix}.safetensors", self.bare, name, about)
                if self.config.save_original_format:
                    save_original(folder / f"{stem}{suffix}.pt", self.bare, name)
            self._save_checkpoint(run, folder)
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, run: Run, folder: Path) -> None:
        training = {
            "adapters": [p.detach().cpu() for p in self.trained],
            "optimizer": self.optimizer.state_dict(),
        }

        def write(place: Path) -> None:
            torch.save(training, place / "training_state.pt")
            state = {
                "step": self.step,
                "files": {file.name: hash_file(file) for file in place.iterdir()},
                "trained_as": self.trained_as(run),
            }
            (place / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")

        place = folder / f"checkpoint-{self.step}"
        save_folder_atomic(place, write)
        if limit := self.config.checkpoints_total_limit:
            kept = list_checkpoints(folder)
            kept = kept[: kept.index(place) + 1]  # a later one is damaged: it counts for nothing
            for old in kept[:-limit]:
                shutil.rmtree(old)

    def _restore(self, place: Path, state: dict[str, Any]) -> None:
        saved = torch.load(place / "training_state.pt", map_location="cpu", weights_only=True)
        with torch.no_grad():
            for parameter, value in zip(self.trained, saved["adapters"], strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = state["step"]
        log.info("resumed from %s (step %d)", place, self.step)

    def _about(self, run: Run) -> dict[str, Any]:
        """What a LoRA file says about itself."""
        config = self.config
        keys = (
            "python_name", "rank", "alpha", "cfg_eta", "resolution", "guidance_scale",
            "num_inference_steps", "train_prompt", "train_method", "seed",
        )  # fmt: skip
        return {
            "script": "train_pairedit.py",
            "base_model": config.pretrained_model_name_or_path,
            "dataset": run.dataset,
            "version": run.version,
            "noise_scale": run.noise_scale,
            "step": self.step,
            **{key: getattr(config, key) for key in keys},
        }

    def _draw_pairs(self, folder: Path) -> None:
        """samples/pairs.png: what the model sees."""
        photos = self.photos(self.run)[:8]
        if not photos:
            return
        rows = [[load_picture(p) for p in fit_pair(self.config, x, self.index)] for x in photos]
        heads = [f"{name} (scale {scale:g})" for scale, name in self.config.stage_table]
        sheet = contact_sheet(rows, heads, [pair.name for pair in photos])
        save_atomic(folder / "samples/pairs.png", lambda file: sheet.save(file, format="PNG"))

    @torch.no_grad()
    def preview(self, run: Run) -> None:
        """samples/step-<n>.png: the slider at `scales`, as generate.py draws it.

        Of an inversion LoRA: the photo, and what the LoRA makes of noise.
        """
        if self.accelerator.is_main_process:
            config, real = self.config, self.config.python_name == "train_image_real"
            grid = self.grids[0] if real else self.square()
            prompt = self.preview_prompt(run)
            channels = self.bare.config.in_channels // 4
            noise = first_noise(config.start_seed_gen, channels, grid, self.dtype, self.device)
            predict = self.predictor(self.bare, self.text(prompt), grid)
            sigmas = self.sigmas(math.prod(grid)).tolist()
            knobs = [Knob("semantic", start=config.skips[0] + 1)]
            if real:
                tokens = draw_strip(predict, noise, sigmas, [0.0], base=(CONTENT,))
            else:
                tokens = draw_strip(predict, noise, sigmas, config.scales, knobs)
            vae = load_vae(self.folder, self.device)
            row = [to_image(decode_latents(vae, x[None])[0]) for x in unpack_tokens(tokens, grid)]
            heads = [f"scale {scale:g}" for scale in config.scales]
            if real:
                [photo] = fit_pair(config, self.photos(run)[0], self.index)
                row, heads = [load_picture(photo), *row], ["photo", "inversion LoRA"]
            caption = f"step {self.step}, seed {config.start_seed_gen}, skip {config.skips[0]}: "
            sheet = contact_sheet([row], heads, [caption + prompt])
            path = run_folder(config, run) / f"samples/step-{self.step:06d}.png"
            save_atomic(path, lambda file: sheet.save(file, format="PNG"))
            track_picture(self.accelerator, "validation", sheet, self.step)
        self.accelerator.wait_for_everyone()

    def _write_card(self, run: Run) -> None:
        """README.md: the model card."""
        about, real = self._about(run), self.config.python_name == "train_image_real"
        file = f"{lora_stem(self.config, run, self.step)}.safetensors"
        use, flag = (REAL_USE, "--inversion_lora") if real else (SLIDER_USE, "--lora")
        text = (SLIDER_CARD + use).format(
            **about,
            command=f"{flag} {file}",
            prompt=self.preview_prompt(run),
            skip=self.config.skips[0],
        )
        path = run_folder(self.config, run) / "README.md"
        save_atomic(path, lambda file: file.write_text(text, encoding="utf-8"))


SLIDER_CARD = """---
base_model: {base_model}
library_name: diffusers
tags: [text-to-image, lora, flux, pairedit]
---
# LoRA "{dataset}" for {base_model}

Trained with train_pairedit.py ({python_name}) to step {step}: rank {rank}, alpha {alpha:g} (folded
into the weights), eta {cfg_eta:g}, noise scale {noise_scale:g}.
"""
SLIDER_USE = """
Scale 1 is the change it was taught. A slider acts in the later steps only, so that the picture
stays the same:

    python generate.py --pretrained_model_name_or_path {base_model} {command} \\
        --prompt "{prompt}" --scales 0,0.5,1 --output strip.png \\
        --skip {skip} --num_inference_steps {num_inference_steps} --resolution {resolution}
"""
REAL_USE = """
It draws one photo, whatever the noise. A slider edits it:

    python generate.py --pretrained_model_name_or_path {base_model} {command} \\
        --lora slider.safetensors --prompt "{prompt}" --scales 0,0.5,1 --output strip.png \\
        --skip {skip} --num_inference_steps {num_inference_steps} --resolution {resolution}
"""


# --- 9. plan: memory, disk and time, before anything is loaded ------------------------------------

TFLOPS = {"RTX 4090": 165, "A100": 312, "H100, H200": 790}
TEXT_ENCODERS_GB = 9.8  # T5-XXL and CLIP-L of FLUX.1-dev in bf16
# of a weight, its scales included
WEIGHT_BITS = {"int8": 8, "fp8": 8, "int4": 4.25, "int2": 2.25, "nf4": 4.5}


def planned_flux(config: Config) -> Any:
    """The config's transformer without weights; the published one needs no network."""
    name = config.pretrained_model_name_or_path
    if name == PUBLISHED_MODEL and not Path(name).is_dir():
        return empty_flux(PUBLISHED_TRANSFORMER)
    return empty_flux(read_model_json(name, "transformer/config.json"))


def token_area_px(config: Config) -> int:
    """Pixels behind one token: 2 x 2 latents of the VAE's 8 x 8."""
    name, levels = config.pretrained_model_name_or_path, 4
    if Path(name).is_dir():
        levels = len(read_model_json(name, "vae/config.json")["block_out_channels"])
    return (2 * 2 ** (levels - 1)) ** 2


def forward_tflop(transformer: Any, tokens: int) -> float:
    """Of one sample: 2 per weight and token, and attention's 4 n^2 width per block.

    A token passes half of a double block's weights (the other half is for text, or for pictures);
    modulation runs once per sample and is left out.
    """

    def weights(blocks: Any) -> float:
        layers = (m for name, m in blocks.named_modules() if "norm" not in name)
        return sum(m.weight.numel() for m in layers if isinstance(m, torch.nn.Linear))

    double, single = transformer.transformer_blocks, transformer.single_transformer_blocks
    width = transformer.inner_dim
    linear = 2 * tokens * (weights(double) / 2 + weights(single))
    return (linear + 4 * tokens**2 * width * (len(double) + len(single))) / 1e12


def adapter_size(config: Config, transformer: Any) -> int:
    """Numbers in one adapter."""
    layers = dict(transformer.named_modules())
    paths = target_layers(transformer, config.train_method)
    return sum(config.rank * (layers[p].in_features + layers[p].out_features) for p in paths)


def needed_gb(config: Config, transformer: Any, tokens: int) -> dict[str, float]:
    """Estimated memory of a training step, by what it is for; tokens: of a sample, text included.

    A block keeps about 34 numbers per token and channel for the backward pass; with gradient
    checkpointing only its input, and one block at a time the rest.
    """
    rows = config.batch_size * len(empty_passes(config.python_name))
    size = 4.0 if config.mixed_precision == "no" else 2.0
    bits = WEIGHT_BITS.get(config.base_model_precision.partition("-")[0], 8 * size)
    blocks = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
    kept = (blocks + 34) if config.gradient_checkpointing else 34 * blocks
    adapters = adapter_size(config, transformer) * len(adapters_of(config.python_name))
    return {
        "weights": sum(p.numel() for p in transformer.parameters()) * bits / 8e9,
        "adapters": adapters * 16 / 1e9,  # fp32: weight, gradient, two moments
        "activations": rows * tokens * transformer.inner_dim * kept * size / 1e9,
    }


def planned_sizes(config: Config) -> dict[tuple[int, int], int]:
    """{(W, H) px: pairs of that bucket}; of text sliders one square."""
    if config.python_name == "slider_text":
        return {(config.resolution, config.resolution): 1}
    index, sizes = FileIndex(config.cache_dir), Counter[tuple[int, int]]()
    for dataset in config.datasets:
        for pair in find_pairs(config, dataset)[0]:
            sizes[fit_pair(config, pair, index)[0].size] += 1
    return dict(sizes)


def plan_results(config: Config, transformer: Any) -> list[str]:
    """What will lie on the disk."""
    runs, names = all_runs(config), adapters_of(config.python_name)
    size = adapter_size(config, transformer) * len(names) / 1e9
    formats = 2 if config.save_original_format else 1
    saves = math.ceil(config.train_iteration / config.save_per_steps) * len(runs)
    pictures = len(config.scales) * config.count_gen * len(config.skips) * len(runs)
    lora = config.trained_lora_path if config.use_trained_lora_path else "the LoRA of each run"
    if config.semantic_lora_path:
        lora += f" with {config.semantic_lora_path} (gamma {config.semantic_cfg_scale:g})"
    page = " and pages" if config.html else ""
    seeds = "random seeds" if config.use_random_seed else f"seeds from {config.start_seed_gen}"
    return [
        f"Disk         {4 * size * formats * saves:.2f} GB of LoRA files, "
        f"{12 * size:.2f} GB a checkpoint",
        f"generate.py  {pictures} pictures{page} in {config.output_folder_gen}, {seeds}: {lora}",
    ]


def plan_memory(config: Config, transformer: Any, tokens: int) -> list[str]:
    """Where each model lives, how much a step needs, whether that fits here, and what lowers it."""
    parts = needed_gb(config, transformer, tokens)
    total = sum(parts.values())
    said = ", ".join(f"{name} {gb:.1f}" for name, gb in parts.items())
    lines = [
        f"Memory       about {total:.1f} GB while training ({said})",
        f"             before that the VAE, then the text encoders ({TEXT_ENCODERS_GB} GB), alone",
    ]
    if torch.cuda.is_available():
        room = torch.cuda.get_device_properties(0).total_memory / 1e9
        lines.append(f"  {'fits' if total < room else 'DOES NOT FIT'}: {room:.1f} GB here")
    ways = ("gradient_checkpointing", True), ("base_model_precision", "int8-quanto")
    for name, value in (*ways, ("base_model_precision", "nf4-bnb")):
        lower = sum(
            needed_gb(config.model_copy(update={name: value}), transformer, tokens).values()
        )
        if lower < total - 0.05:
            lines.append(f"  {name}: {value} would lower it to {lower:.1f} GB")
    return lines


# differs: each script plans its own run
def plan(config: Config) -> str:
    """Runs, data, where each model lives, memory, disk, time. Loads no model."""
    transformer, runs, sizes = planned_flux(config), all_runs(config), planned_sizes(config)
    tokens = max(w * h for w, h in sizes) // token_area_px(config) + config.max_sequence_length
    rows = config.batch_size * len(empty_passes(config.python_name))
    forward = rows * forward_tflop(transformer, tokens)
    tflop = forward * (3 if config.gradient_checkpointing else 2)
    if config.python_name == "slider_text":  # the way to its noise level, and three teachers
        tflop += forward * ((config.start_step + config.end_step) / 2 + 3)
    steps = config.train_iteration * len(runs)
    layers, names = target_layers(transformer, config.train_method), adapters_of(config.python_name)
    lines = [
        f"Runs         {len(runs)} of {config.train_iteration} steps ({config.python_name})",
        *(f"  {run_folder(config, run)}" for run in runs[:5]),
        *([f"  ... and {len(runs) - 5} more"] if len(runs) > 5 else []),
        f"Pictures     {', '.join(f'{n} of {w} x {h} px' for (w, h), n in sizes.items())}",
        f"Tokens       {tokens}, {config.max_sequence_length} of them text; {rows} rows a step",
        f"Transformer  {sum(p.numel() for p in transformer.parameters()) / 1e9:.2f} billion "
        f"parameters ({config.base_model_precision}); {' and '.join(names)} adapter on "
        f"{len(layers)} layers, {adapter_size(config, transformer) / 1e6:.1f} million each",
        *plan_memory(config, transformer, tokens),
        *plan_results(config, transformer),
        f"Compute      {tflop:.1f} TFLOP a step",
    ]
    for name, speed in TFLOPS.items():
        each = tflop / (speed / 2)
        lines.append(
            f"  {name} at half its speed: {each:.2f} s a step, {steps * each / 60:.1f} minutes"
        )
    return "\n".join(lines)


# --- 10. main -------------------------------------------------------------------------------------


def main() -> None:
    """Config -> audit -> fit, or with --plan only what it would be."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    argv = with_named_config(sys.argv[1:])
    given = [arg for arg in argv if arg != "--plan"]
    config = load_config(Config, given, check=audit)
    if len(given) < len(argv):
        print(plan(config))
    else:
        PairEditTrainer(config).fit()


if __name__ == "__main__":
    run_script(main)
