"""Apply LoRAs: edits with Qwen-Image-Edit, sliders with FLUX.1, changes with Stable Diffusion 1.x.

Page: docs/generate.md

Qwen-Image-Edit (the checkpoint says which it is):

    python generate.py --pretrained_model_name_or_path DIR --lora FILE --image a.png \\
        --prompt "make it snow" --output snow.png
    ... --image a.png b.png                   # several references, in this order; or none
    ... --lora A.safetensors:0.8 B.safetensors
    ... --scales 0,0.5,1 --output strip.png   # every LoRA times 0, 0.5 and 1, side by side
    ... --input_dir photos --output_dir out   # a folder; captions beside the photos or --prompt
    ... --table jobs.jsonl --output_dir out   # {"images": [...], "prompt": "...", "name": "..."}

FLUX.1:

    python generate.py --c train_image        # all that configs/train_image.yaml trains, and photos
    python generate.py --pretrained_model_name_or_path DIR --lora FILE --prompt "a person" \\
        --scales 0,0.5,1 --skip 14 --output strip.png
    ... --lora A.safetensors:0.8 B.safetensors:1:10   # FILE:scale:skip
    ... --image photo.png                     # edit a photo, without training on it

Stable Diffusion 1.x:

    python generate.py --pretrained_model_name_or_path DIR --lora FILE --prompt "a person" \\
        --scales=-1,0,1 --seed 0,1 --output strip.png
    ... --image photo.png                     # change a photo; or --input_dir, --output_dir

    ... --script my_fork.py                   # draw as this training script does
    ... --help [edit | slider | runs | change | all]

Qwen runs through the diffusers pipelines and load_lora_weights: the LoRA file works everywhere. The
others are drawn by their training script (a LoRA belongs to the code that trained it), loaded by
path. A finished picture whose settings are the same is not made again, so a stopped run goes on.

Shapes: B scales drawn at once, H W pixels in [-1, 1], h w latents (H/8 W/8), C channels; FLUX.1: S
= (h/2)(w/2) tokens of 4C, sigma from 0 (picture) to 1 (noise), velocity = d latents / d sigma.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import importlib
import json
import math
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from pydantic import AfterValidator, BeforeValidator, Field, create_model
from safetensors import safe_open
from tqdm.auto import tqdm

import utils
from utils import (
    Section,
    UserError,
    listed,
    load_config,
    load_tool,
    named,
    nearest,
    normal,
    open_rgb,
)

AREA_1MP = 1024 * 1024
VISION_AREA = 384 * 384  # area_px of the pictures shown to the text encoder by Edit-Plus
SETTINGS_KEY = "image_edit"  # PNG text chunk
hash_of = functools.cache(utils.hash_file)  # many pictures have one reference
PUBLISHED_FLUX = "black-forest-labs/FLUX.1-dev"


# --- 1. settings ----------------------------------------------------------------------------------


def split_commas(value: Any) -> Any:
    """Split "0,1,2" into ["0", "1", "2"]; one number is a list, too."""
    parts = value if isinstance(value, list) else [value]
    return [piece for part in parts for piece in str(part).split(",")]


def as_list(value: Any) -> Any:
    """Return a list: of one for a text alone, empty for null."""
    return [value] if isinstance(value, str) else value or []


Numbers = Annotated[list[float], BeforeValidator(split_commas)]
Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], BeforeValidator(split_commas)]
Texts = Annotated[list[str], BeforeValidator(as_list)]
Device = Annotated[str | None, AfterValidator(lambda d: f"cuda:{d}" if d and d.isdecimal() else d)]
Dtype = Literal["bf16", "fp32"] | None


class JobsConfig(Section):
    """What to draw, and where it goes; nearly all other settings decide the pixels."""

    lora: Texts = []
    """LoRA file, or FILE:scale (sliders also FILE:scale:skip); repeat it for several."""
    scales: Annotated[Numbers, BeforeValidator(as_list)] = []
    """Strip: the scale of every LoRA times each of these, e.g. -1,0,0.5,1; 0 is the base model."""
    prompt: Texts = []
    """Instruction, or what the picture shows; repeat the flag for several. []: the .txt beside an
    image, or what the LoRA was trained with (Stable Diffusion)."""
    seed: Seeds = [0]
    """Seed, or several: 0,1,2. Drawn on the CPU: the same noise on every device."""
    image: Annotated[list[Path], BeforeValidator(as_list)] = []
    """Reference pictures, in order, or none (Qwen); one photo to change (the others)."""
    input_dir: Path | None = None
    """Folder of pictures to edit, each alone."""
    table: Path | None = None
    """Table of edits, .csv or .jsonl: images (";" between several), prompt, name, seed."""
    height: int | None = Field(None, ge=32, le=8192, multiple_of=16)
    """Height of the results, px; null: by the picture's aspect and the size of the training."""
    width: int | None = Field(None, ge=32, le=8192, multiple_of=16)
    """Width of the results, px; see height."""
    output: Path | None = None
    """The picture (PNG); with several scales, seeds or prompts the strip, pictures beside it."""
    output_dir: Path | None = None
    """Folder for the results of input_dir or table, and their contact_sheet.png."""
    html: bool = False
    """Also write a page to compare them: page.html, or output's name with .html."""
    device: Device = None
    """Number of a GPU, or cpu, cuda:0, mps; null: the fastest there is."""
    script: Path | None = None
    """Training script whose sampling is used, e.g. your fork; null: the family's own."""

    @property
    def photo(self) -> bool:
        """Return whether there are pictures to start from."""
        return bool(self.image or self.input_dir or self.table)

    def rules(self) -> dict[str, Any]:
        """Return {problem: whether it is there} of what to draw and where results go."""
        ways = [name for name in ("image", "input_dir", "table") if getattr(self, name)]
        many, output = self.input_dir or self.table, self.output
        png = f"output: {output} must end in .png, which keeps the settings"
        return {
            f"give one of image, input_dir, table (given: {', '.join(ways)})": len(ways) > 1,
            "output_dir: is missing; input_dir and table need it": many and not self.output_dir,
            "output_dir: goes with input_dir or table": self.output_dir and not many,
            "output: goes with image or prompt": output and many,
            "output_dir: lies in input_dir, and would be read next time": self.input_dir
            and self.output_dir
            and self.output_dir.resolve().is_relative_to(self.input_dir.resolve()),
            "output: is missing": not output and not many,
            png: output and output.suffix != ".png",
            f"input_dir: no folder {self.input_dir}": self.input_dir
            and not self.input_dir.is_dir(),
            "height, width: give both or none": bool(self.height) != bool(self.width),
            "scales: need a lora": self.scales and not self.lora,
        }


class EditConfig(JobsConfig):
    """generate.py with Qwen-Image-Edit: edits of pictures."""

    pretrained_model_name_or_path: str
    """Checkpoint: a folder in diffusers layout, or a Hub id."""
    negative_prompt: str = ""
    """Instruction that guidance leads away from; "" is the empty one."""
    num_inference_steps: int = Field(40, ge=2, le=1000)
    """Euler steps of a picture, at least 2 (one divides by zero in the scheduler)."""
    true_cfg_scale: float | None = Field(None, ge=1)
    """Guidance against negative_prompt; 1 is none; null is 4, for 2.1 and lightning none."""
    fixed_lora: list[str] = []
    """LoRA file, or FILE:scale, of every picture, whatever `scales` says (few-step LoRAs)."""
    schedule: Literal["model", "lightning"] = "model"
    """Noise levels: the model's, or those of Lightning LoRAs (4 or 8 steps)."""
    reference_area: Literal["lora", "1mp", "target"] | Annotated[int, Field(ge=1024)] = "lora"
    """Size of the references: what the LoRA was trained with, 1 MP, the output's, or px."""
    dtype: Dtype = None
    """Precision of the model; null: bf16, on a CPU fp32."""
    offload: Literal["none", "model", "sequential"] = "none"
    """Keep on the GPU only the model (or the layer) in use."""

    def rules(self) -> dict[str, Any]:
        """Return {problem: whether it is there}."""
        steps = "num_inference_steps: lightning has 4 or 8"
        few = self.schedule == "lightning" and self.num_inference_steps not in (4, 8)
        return super().rules() | {steps: few}


class SliderConfig(JobsConfig):
    """generate.py with FLUX.1: sliders, on prompts or on photos."""

    pretrained_model_name_or_path: str = PUBLISHED_FLUX
    """Checkpoint: a folder in diffusers layout, or a Hub id."""
    base_model_precision: Literal[
        "no_change", "int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto", "nf4-bnb"
    ] = "no_change"
    """Precision of the weights of the frozen transformer's blocks."""
    dtype: Dtype = None
    """Precision of the model; null: bf16, on a CPU fp32."""
    resolution: int = Field(512, ge=32, le=8192, multiple_of=16)
    """Side of the square whose area the pictures get, px; photos keep their aspect (buckets)."""
    num_inference_steps: int = Field(28, ge=1, le=1000)
    """Euler steps of a picture; more is slower and finer."""
    guidance_scale: float = Field(3.5, ge=0, le=100)
    """Embedded guidance of FLUX.1-dev; has no effect on models without it."""
    max_sequence_length: int = Field(512, ge=1, le=512)
    """T5 tokens of a prompt; padded to it, as the pipeline does."""
    skip: int = 14
    """Sliders act in steps i > skip (with inversion_lora i >= skip); a higher one keeps more of the
    picture, -1 lets them act in all steps."""
    compose: Literal["merge", "blend"] | None = None
    """merge: all LoRAs in one pass. blend: v + sum of gamma (v_slider - v), a pass each; null:
    merge, with inversion_lora blend."""
    gamma: float = 0.75
    """compose blend: share of each slider's velocity."""
    inversion_lora: Path | None = None
    """LoRA that was trained on one photo (train_image_real) and stands in for it."""
    allow_pickle: bool = False
    """Load LoRA files that are no .safetensors (tensors only, no code)."""

    @property
    def blend(self) -> bool:
        """Return whether velocities are blended."""
        return self.compose == "blend" or (not self.compose and self.inversion_lora is not None)

    def rules(self) -> dict[str, Any]:
        """Return {problem: whether it is there}."""
        alone, many = self.inversion_lora, self.input_dir or self.table
        return super().rules() | {
            "compose: needs a lora": self.compose and not self.lora,
            "a photo needs a lora to be edited with": self.photo and not self.lora and not alone,
            "gamma: is read by compose blend": "gamma" in self.model_fields_set and not self.blend,
            "inversion_lora: is of one photo; no input_dir, no table": alone and many,
        }


class ChangeConfig(JobsConfig):
    """generate.py with Stable Diffusion 1.x: states of a change, also of photos."""

    pretrained_model_name_or_path: str
    """Checkpoint: a folder in diffusers layout, or a Hub id."""
    dtype: Dtype = None
    """Precision of UNet and text encoder; null: bf16, on a CPU fp32. The VAE is always fp32."""
    resolution: int | None = Field(None, ge=64, le=8192, multiple_of=64)
    """Side of the square whose area the pictures get, px; photos keep their aspect (buckets).
    null: what the LoRA was trained with, else the base model's own (mostly 512)."""
    num_inference_steps: int = Field(50, ge=1, le=500)
    """DDIM steps of a picture; more is slower and finer."""
    guidance_scale: float | None = Field(None, ge=1, le=100)
    """Classifier-free guidance; 1 is none. null: 7.5, on photos 1."""
    negative_prompt: str = ""
    """Prompt that guidance leads away from; "" is the empty prompt."""
    inversion: Literal["ddpm", "ddim"] = "ddpm"
    """How a photo becomes noise: ddpm (edit-friendly) gets more of the change, ddim is smoother and
    draws nothing by chance."""
    skip: float = Field(0.2, ge=0, lt=1)
    """Photos: share of the steps left out at the noisy end; more keeps more of the photo."""
    restore_detail: bool = False
    """Photos: add what the VAE loses, photo - decode(encode(photo)), to every result."""
    mask: Path | None = None
    """Photo: what is white here may change, the rest stays (grey: partly)."""

    def rules(self) -> dict[str, Any]:
        """Return {problem: whether it is there}."""
        photo, steps = self.photo, self.num_inference_steps
        lone = ", ".join(sorted({"inversion", "skip", "restore_detail"} & self.model_fields_set))
        still = photo and self.inversion == "ddim" and len(self.seed) > 1
        unguided = self.guidance_scale == 1 or (photo and not self.guidance_scale)
        return super().rules() | {
            "a photo needs a lora to be changed with": photo and not self.lora,
            f"{lone}: only photos are inverted": lone and not photo,
            "mask: goes with image": self.mask and not self.image,
            f"mask: no file {self.mask}": self.mask and not self.mask.is_file(),
            "seed: several, but ddim inversion draws nothing": still,
            "negative_prompt: needs a guidance_scale above 1": self.negative_prompt and unguided,
            f"skip: {self.skip} leaves none of {steps} steps": round(self.skip * steps) == steps,
        }


class RunStripsConfig(Section):
    """generate.py with the file of train_pairedit.py (--c NAME): the sliders that it trains.

    All settings of that script are taken as well.
    """

    use_trained_lora_path: bool = False
    """Take trained_lora_path instead of what this file trains."""
    trained_lora_path: str = ""
    """LoRA file for use_trained_lora_path (train_image_real: of the inversion)."""
    use_prompts_file: bool = False
    """Draw each picture with a line of prompts_file instead of `prompt`."""
    prompts_file: list[str] = Field(["prompts-person.yaml"], min_length=1)
    """Files in configs/prompts/ (or paths): YAML lists; entry k for data set k."""
    count_gen: int = Field(2, ge=1, le=10_000)
    """Number of seeds drawn, from start_seed_gen on."""
    use_random_seed: bool = False
    """Draw the seeds from 0..32768 (by `seed`) instead of counting up."""
    output_folder_gen: Path = Path("output/eval/image/")
    """Folder where generate.py writes pictures and sheets."""
    image_format: Literal["jpg", "png"] = "jpg"
    """jpg (quality 95) is what PairEdit writes; png loses nothing, for measurements."""
    semantic_lora_path: str = ""
    """train_image_real: LoRA file of the slider that edits the photo."""
    semantic_cfg_scale: float = 0.75
    """train_image_real: share of the slider's velocity, gamma."""
    dtype: Dtype = None
    """Precision of the model; null: bf16, on a CPU fp32."""
    html: bool = False
    """Also write page.html beside the sheets."""
    allow_pickle: bool = False
    """Load LoRA files that are no .safetensors (tensors only, no code)."""
    script: Path | None = None
    """Training script whose sampling is used, e.g. your fork; null: train_pairedit.py."""

    def rules(self) -> dict[str, Any]:
        """Return {problem: whether it is there}; those of training do not matter here."""
        config: Any = self
        named = {text: there for text, there in super().rules().items() if "datasets" in text}
        real, trained = config.python_name == "train_image_real", self.use_trained_lora_path
        no_slider = "semantic_lora_path: is missing; train_image_real needs the slider that edits"
        return named | {
            "image_ids: go with python_name train_image_real": real != bool(config.image_ids),
            no_slider: real and not self.semantic_lora_path,
            "trained_lora_path: is missing": trained and not self.trained_lora_path,
        }


# --- 2. what to draw: strips, checked before a model loads ----------------------------------------


class Lora(NamedTuple):
    """A LoRA file and how it acts."""

    file: Path
    scale: float = 1.0
    start: int = 0  # sliders: first step in which it is on


class Strip(NamedTuple):
    """Pictures that differ only in the scale of their LoRAs."""

    name: str  # of the results, without scale, seed and number of the prompt
    prompt: str
    seed: int
    size: tuple[int, int]  # (W, H) px
    scales: tuple[float, ...]
    files: tuple[Path, ...]  # one for each scale
    loras: tuple[Lora, ...] = ()
    images: tuple[Path, ...] = ()  # references, or the photo
    sheet: Path | None = None  # strips of the same sheet are its rows
    run: str = ""  # of RunStripsConfig: the run that trained the slider
    gamma: float | None = None  # share of each slider's velocity; None: merged, not blended
    inversion: Path | None = None  # LoRA that draws the photo


def parse_lora(text: str) -> tuple[Path, float, int | None]:
    """Return FILE, FILE:scale or FILE:scale:skip as (file, scale, skip). Raises UserError."""
    head, ends = text, list[str]()
    try:
        while ":" in head and not Path(head).exists() and len(ends) < 2:
            head, _, end = head.rpartition(":")
            ends.insert(0, end)
        scale, skip = float(ends[0]) if ends else 1.0, int(ends[1]) if ends[1:] else None
        if not math.isfinite(scale):
            raise ValueError("the scale is not finite")
    except (OSError, ValueError) as error:  # OSError: the name is too long
        wanted = "wanted FILE, FILE:scale or FILE:scale:skip"
        raise UserError(f"lora {text}: {wanted} ({error})") from error
    return Path(head), scale, skip


def find_loras(config: JobsConfig, texts: Sequence[str]) -> tuple[list[Lora], list[str]]:
    """Return the LoRAs of --lora (or --fixed_lora), and what is wrong with these texts."""
    loras, problems = [], []
    for text in texts:
        try:
            file, scale, skip = parse_lora(text)
        except UserError as error:
            problems.append(str(error))
            continue
        start = 0
        if isinstance(config, SliderConfig):
            start = (config.skip if skip is None else skip) + (config.inversion_lora is None)
        elif skip is not None:
            problems.append(f"lora {text}: only sliders of FLUX.1 have a skip")
        loras.append(Lora(file, scale, start))
    return loras, problems


def find_lora(path: Path, allow_pickle: bool | None = None) -> Path:
    """Return the file to load: instead of a .pt that is not allowed the .safetensors beside it.

    allow_pickle: None where the family takes none. Raises UserError: no file, or not allowed.
    """
    if allow_pickle and path.is_file():
        return path
    ends = (".safetensors", ".pt")
    pair = [path.with_suffix(end) for end in ends] if path.suffix in ends else [path]
    files = [file for file in pair if file.is_file()]
    if not files:
        folder, name = (path, "") if path.is_dir() else (path.parent, path.name)
        there = sorted(file.name for file in folder.glob("*.safetensors"))
        raise UserError(f"LoRA {path} is no file{nearest(name, there)}")
    if files[0].suffix != ".safetensors" and not allow_pickle:
        way = "; tools/convert_lora.py makes one of a slider (or --allow_pickle true)"
        way = "" if allow_pickle is None else way
        raise UserError(f"LoRA {files[0]}: a .pt can hold a program; wanted .safetensors{way}")
    return files[0]


def read_about(path: Path) -> dict[str, Any]:
    """Return what a trainer of ours wrote into a LoRA; {} if it cannot be read or is another's."""
    # check_lora() says what is wrong
    with contextlib.suppress(Exception), safe_open(path.with_suffix(".safetensors"), "pt") as file:
        return dict(json.loads((file.metadata() or {}).get("image_edit_lora", "{}")))
    return {}


Row = dict[str, Any]  # name, images, and what a table says of prompt and seed


def find_rows(config: JobsConfig) -> tuple[list[Row], list[str]]:
    """Return rows from whichever source is given, and their problems."""
    if config.table:
        return read_jobs(config.table)
    if config.input_dir:
        found = utils.list_images(config.input_dir)
        rows = [{"images": [file], "name": stem} for stem, its in found.items() for file in its]
        return rows, [] if rows else [f"input_dir: no picture in {config.input_dir}"]
    assert config.output  # a rule of JobsConfig
    return [{"images": config.image, "name": config.output.stem}], []


def read_jobs(path: Path) -> tuple[list[Row], list[str]]:
    """Return rows of a table; relative paths are from here, or from the table."""
    try:
        rows = load_tool("pair_rows").read_records(path)
    except UserError as error:
        return [], [str(error)]
    good, problems = [], [] if rows else [f"table: no row in {path}"]
    for number, row in enumerate(rows, 1):
        if wrong := load_tool("check").check_row(row):
            problems += [f"{path} row {number}: {problem}" for problem in wrong]
            continue
        images = row.get("images") or row.get("image")
        names = images.split(";") if isinstance(images, str) else images or []
        files = [Path(name.strip()) for name in names]
        try:
            files = [file if file.exists() else path.parent / file for file in files]
        except OSError as error:  # a name that no file can have
            problems.append(f"{path} row {number}: {error}")
            continue
        name = str(row.get("name") or "+".join(file.stem for file in files))
        good.append({**row, "images": files, "name": name})
    return good, problems


def prompts_of(painter: Painter, row: Row) -> list[str]:
    """Return the prompts of a row: its own, --prompt, the .txt beside its image, the usual one.

    Raises:
        UserError: there is none, or the .txt is no text.
    """
    own, usual = row.get("prompt"), painter.usual_prompt
    prompts = [own] if own else list(painter.config.prompt)
    for image in row["images"][:1]:
        beside = image.parent / f"{image.stem}.txt"
        if not prompts and beside.is_file():
            try:
                prompts = [beside.read_text(encoding="utf-8-sig").strip()]
            except ValueError as error:
                raise UserError(f"{beside}: {error}") from error
    if usual is None and not any(map(str.strip, prompts)):
        text = "no prompt (--prompt, a prompt column, a .txt beside the image)"
        learnt = [f"; LoRA: {about['prompts']}" for about in painter.about if "prompts" in about]
        raise UserError(f"{row['name']}: {text}{''.join(learnt[:1])}")
    return prompts or [usual or ""]


def plan_jobs(painter: Painter) -> tuple[list[Strip], list[str]]:
    """Return a strip for each row, prompt and seed, and everything wrong with them."""
    config, strips = painter.config, list[Strip]()
    rows, problems = find_rows(config)
    scales = tuple(config.scales or ([1.0] if config.lora else [0.0]))
    folder = config.output_dir or (config.output or Path()).parent
    index = utils.FileIndex(None)
    read = dict.fromkeys(file for row in rows for file in row["images"])
    problems += index.update(read, utils.look_at_picture)
    for row in rows:
        name, images, size = row["name"], tuple(row["images"]), (config.width, config.height)
        if Path(name).is_absolute() or ".." in Path(name).parts:
            problems.append(f"'{name}': a name must stay inside the output folder")
        with contextlib.suppress(KeyError):  # a picture that could not be read
            size = size if all(size) else painter.size([index[file] for file in images])
        try:
            prompts = prompts_of(painter, row)
        except UserError as error:
            problems.append(str(error))
            prompts = [""]
        seeds = config.seed if row.get("seed") in (None, "") else [int(row["seed"])]
        for k, prompt in enumerate(prompts):
            for seed in seeds:
                stem = name + (f"_prompt{k}" if len(prompts) > 1 else "")
                stem += f"_seed{seed}" if len(seeds) > 1 else ""
                ends = [f"_scale{scale:g}" if config.scales else "" for scale in scales]
                files = tuple(folder / f"{stem}{end}.png" for end in ends)
                strip = Strip(name, prompt, seed, size, scales, files, tuple(painter.loras), images)
                strips.append(strip)
    if sum(len(strip.files) for strip in strips) > 1:
        sheet = config.output or folder / "contact_sheet.png"
        strips = [strip._replace(sheet=sheet) for strip in strips]
    if isinstance(config, SliderConfig):
        gamma = config.gamma if config.blend and config.lora else None
        strips = [s._replace(gamma=gamma, inversion=config.inversion_lora) for s in strips]
    return strips, problems


# --- 3. what a file of train_pairedit.py draws ----------------------------------------------------


def plan_runs(painter: Painter, config: Any) -> tuple[list[Strip], list[str]]:
    """Return a strip for each run, skip and seed, and everything wrong with the settings."""
    problems: list[str] = []
    strips: list[Strip] = []
    prompts: dict[str, list[str]] = {}
    for number, dataset in enumerate(config.datasets):
        try:
            lines = prompt_lines(config, number)
            chance = functools.partial(utils.uniform, config.seed, "prompt", dataset)
            draws = [chance(k) for k in range(config.count_gen)]
            prompts[dataset] = [lines[int(draw * len(lines))] for draw in draws]
        except UserError as error:
            problems.append(str(error))
            prompts[dataset] = [""] * config.count_gen
    index = utils.FileIndex(None)
    for run in painter.script.all_runs(config):
        photos: list[Path] = []
        if run.image_id:
            folder = config.datasets_folder / run.dataset / config.source_folder
            there = utils.list_images(folder) if folder.is_dir() else {}
            photos = there.get(run.image_id, [])[:1]
            if not photos:
                problems.append(
                    f"no picture {run.image_id}.* in {folder}; its size is the result's"
                )
            problems += index.update(photos, utils.look_at_picture)
        size = config.resolution, config.resolution
        with contextlib.suppress(KeyError):  # a picture that could not be read
            size = painter.size([index[photo] for photo in photos])
        for skip in config.skips:
            for seed, prompt in zip(picture_seeds(config), prompts[run.dataset], strict=True):
                strip = run_strip(painter.script, config, run, skip, seed, prompt)
                strips.append(strip._replace(size=size, images=tuple(photos)))
    return strips, list(dict.fromkeys(problems))


def prompt_lines(config: Any, number: int) -> list[str]:
    """Return what data set `number` is drawn with: its prompt, or the lines of its prompts file.

    Raises:
        UserError: no such file, or it is no list of texts.
    """
    if not config.use_prompts_file:
        return [config.prompt[min(number, len(config.prompt) - 1)]]
    name = config.prompts_file[min(number, len(config.prompts_file) - 1)]
    beside = Path(__file__).parent / "configs/prompts" / name
    path = next((p for p in (Path(name), Path("configs/prompts") / name) if p.is_file()), beside)
    with named(f"prompts_file {name}"):
        lines = yaml.safe_load(utils.read_text(path))
    if not isinstance(lines, list) or not lines or not all(isinstance(x, str) for x in lines):
        raise UserError(f"prompts_file {path}: wanted a YAML list of prompts")
    return lines


def picture_seeds(config: Any) -> list[int]:
    """Return the seeds: counted up, or drawn without repetition."""
    if config.use_random_seed:
        return utils.shuffled(32769, config.seed, "picture seeds")[: config.count_gen]
    return [config.start_seed_gen + i for i in range(config.count_gen)]


def run_strip(
    script: ModuleType, config: Any, run: Any, skip: int, seed: int, prompt: str
) -> Strip:
    """Return the strip of one run, skip and seed, where PairEdit puts it."""
    place = script.run_folder(config, run)
    lora = place / f"{script.lora_stem(config, run, config.train_iteration)}.safetensors"
    if config.use_trained_lora_path:
        lora = Path(config.trained_lora_path)
    first, last = config.scales[0], config.scales[-1]
    span = f"{first:.2f}-{last:.2f}" if len(config.scales) > 1 else f"{first:.2f}"
    folder = config.output_folder_gen / run.dataset / place.name
    head = f"{seed}_{run.dataset}_skip{skip}_{config.train_iteration}epoch"
    end = f"{prompt_in_name(prompt)}.{config.image_format}"
    strip = Strip(
        name=f"{run.dataset}_skip{skip}",
        prompt=prompt,
        seed=seed,
        size=(config.resolution, config.resolution),
        scales=tuple(config.scales),
        files=tuple(folder / f"origin/{seed}/{head}_scale{s:.2f}_{end}" for s in config.scales),
        loras=(Lora(lora, 1.0, skip + 1),),
        sheet=folder / f"{head}_{span}_{end}",
        run=place.name,
    )
    if not run.image_id:
        return strip
    slider = Lora(Path(config.semantic_lora_path), 1.0, skip)  # KEEP: i >= skip, as PairEdit does
    return strip._replace(loras=(slider,), gamma=config.semantic_cfg_scale, inversion=lora)


def prompt_in_name(prompt: str, limit: int = 120) -> str:
    """Return a prompt for a file name: white space is _; cut to `limit` bytes it gets a hash."""
    name = "_".join(prompt.split())
    plain = re.sub(r"[/\\\0]", "-", name).encode()[:limit].decode(errors="ignore")
    return plain if plain == name else f"{plain}-{utils.draw_key(prompt):016x}"


# --- 4. drawing: what is missing, then sheets and pages -------------------------------------------


NAME_BYTES = 230  # of 255 in most file systems; save_atomic's temporary name is longer


def check_results(strips: Sequence[Strip]) -> list[str]:
    """Return problems: results that meet each other or a picture that is read, a folder."""
    seen = Counter(file.resolve() for strip in strips for file in strip.files)
    seen += Counter(sheet.resolve() for sheet in {strip.sheet for strip in strips} if sheet)
    read = {image.resolve() for strip in strips for image in strip.images}
    long = {path for path in seen if len(os.fsencode(path.name)) > NAME_BYTES}
    folders = [path for path in seen.keys() - long if path.exists() and not path.is_file()]
    files = sorted(path for path in seen.keys() - long - read if path.is_file())
    foreign = [path for path in files if not read_settings(path)]
    problems = [f"two results are called {path}" for path, count in seen.items() if count > 1]
    problems += [f"{path} would be overwritten: it is read" for path in sorted(read & seen.keys())]
    problems += [f"{path} is not of generate.py; name another place" for path in foreign]
    problems += [f"{path} is no file; wanted the name of a picture" for path in folders]
    problems += [f"{path}: a name has at most {NAME_BYTES} bytes here" for path in sorted(long)]
    return problems


def picture_settings(painter: Painter, strip: Strip, scale: float) -> dict[str, Any]:
    """Return what a picture says about itself; "settings" holds all that decides its pixels.

    These are the whole config but for JobsConfig, paths and how the weights are held, so a new
    setting cannot be forgotten.
    """
    other = {*JobsConfig.model_fields, "offload", "allow_pickle"}
    dump = painter.config.model_dump(mode="json", exclude=other)
    chosen = {k: v for k, v in dump.items() if not isinstance(getattr(painter.config, k), Path)}
    images = [{"file": str(file), "blake2b": hash_of(file)} for file in strip.images]
    about: dict[str, Any] = {"scale": scale, "seed": strip.seed, "prompt": strip.prompt}
    decides = {
        **chosen,
        **about,
        "size": [*strip.size],
        "images": [image["blake2b"] for image in images],
        "loras": [
            {"blake2b": painter.lora_hash(lora.file), "scale": lora.scale, "start": lora.start}
            for lora in strip.loras
        ],
        "inversion_lora": strip.inversion and painter.lora_hash(strip.inversion),
        "gamma": strip.gamma,
        **painter.decides(),
    }
    names = [str(lora.file) for lora in strip.loras]
    about |= {"name": strip.name, "run": strip.run, "images": images, "loras": names}
    return about | {"settings": decides}


def read_settings(path: Path) -> dict[str, Any]:
    """Return what a finished picture says about itself; {} if there is none, or from elsewhere."""
    with contextlib.suppress(Exception), utils.open_regular(path) as file:
        info = Image.open(file, formats=utils.FORMATS).info
        return dict(json.loads(info.get(SETTINGS_KEY) or info.get("comment", "{}")))
    return {}


def save_picture(path: Path, image: Image.Image, about: dict[str, Any]) -> None:
    """Write a PNG or JPEG with what it says about itself (text chunk or comment)."""
    text = json.dumps(about, ensure_ascii=False)
    info = PngInfo()
    info.add_itxt(SETTINGS_KEY, text)
    options: dict[str, Any] = {"format": "PNG", "pnginfo": info}
    if path.suffix == ".jpg":
        options = {"format": "JPEG", "quality": 95, "comment": text.encode()}
    utils.save_atomic(path, lambda file: image.save(file, **options))


def draw_strips(painter: Painter, strips: Sequence[Strip], html: bool) -> None:
    """Draw the pictures that are missing, then the sheets, and with `html` the pages."""
    about = {
        file: picture_settings(painter, strip, scale)
        for strip in strips
        for file, scale in zip(strip.files, strip.scales, strict=True)
    }
    decides = {file: its["settings"] for file, its in about.items()}
    missing = {file for file in about if read_settings(file).get("settings") != decides[file]}
    print(f"{len(about)} picture(s), {len(about) - len(missing)} already there")
    todo = [strip for strip in strips if missing & {*strip.files}]
    if todo:
        painter.load(list(dict.fromkeys(strip.prompt for strip in todo)))
    options: dict[str, Any] = {"total": len(missing), "unit": "picture", "disable": not missing}
    with utils.progress(None, "generate", **options) as bar:
        for strip in todo:
            pairs = zip(strip.scales, strip.files, strict=True)
            places = {scale: file for scale, file in pairs if file in missing}
            for scale, image, facts in painter.draw(strip, list(places)):
                save_picture(places[scale], image, about[places[scale]] | facts)
                bar.update()
    sheets: dict[Path, list[Strip]] = {}
    for strip in strips:
        sheets.setdefault(strip.sheet or strip.files[0], []).append(strip)
    for path, rows in sheets.items():
        if rows[0].sheet:
            write_sheet(path, rows, [decides[file] for strip in rows for file in strip.files])
        print(f"written: {path}")
    if html:
        write_pages(strips)


def columns_of(strip: Strip, several: bool) -> dict[str, Path]:
    """Return {head: picture}: before or the references, then every scale."""
    heads = [f"reference {k}" if several else "before" for k in range(1, len(strip.images) + 1)]
    heads += [f"scale {scale:g}" for scale in strip.scales]
    return dict(zip(heads, [*strip.images, *strip.files], strict=True))


def write_sheet(sheet: Path, strips: Sequence[Strip], decides: list[Any]) -> None:
    """Write a row per strip, if one of its pictures or captions has changed."""
    rows = [columns_of(strip, any(len(s.images) > 1 for s in strips)) for strip in strips]
    heads = max((list(row) for row in rows), key=len)
    captions = [f"{strip.name}, seed {strip.seed}: {strip.prompt}" for strip in strips]
    about = {"pictures": f"{utils.draw_key(json.dumps([decides, heads, captions])):016x}"}
    if read_settings(sheet) == about:
        return

    def cell(file: Path | None) -> Image.Image | None:
        return ImageOps.contain(open_rgb(file), (256, 256)) if file else None  # never all whole

    pictures = [[cell(row.get(head)) for head in heads] for row in rows]
    save_picture(sheet, utils.contact_sheet(pictures, heads, captions), about)


def write_pages(strips: Sequence[Strip]) -> None:
    """Write pages beside the sheets, a row per strip: named like --output, else page.html."""
    page = load_tool("page")
    pages: dict[Path, list[Any]] = {}
    for strip in strips:
        place, columns = strip.sheet or strip.files[0], columns_of(strip, len(strip.images) > 1)
        path = place.with_name(f"{strip.name if place.stem == strip.name else 'page'}.html")
        row = page.PageRow(strip.name, columns, strip.prompt, strip.seed)
        pages.setdefault(path, []).append(row)
    for path, rows in pages.items():
        title = path.stem if path.stem != "page" else path.parent.resolve().name
        page.write_page(path, title, rows)
        print(f"page: {path}")


# --- 5. painters: one for each family of models ---------------------------------------------------

Drawn = Iterator[tuple[float, Image.Image, dict[str, Any]]]  # scale, picture, facts about it


class Painter:
    """Draws strips with one kind of base model.

    script: the training script of the family, or a fork of it.
    """

    family: ClassVar[str]
    script_name: ClassVar[str]
    needs: ClassVar[str]  # a function of the script
    most_images = 1  # that a result may start from
    # what each family does its own way
    check_base: Callable[..., list[str]]  # () -> problems of the base model
    empty_model: Callable[..., Any]  # () -> what has the LoRAs, without weights
    check_lora: Callable[..., None]  # (file, empty model or None); raises UserError: no fit
    load: Callable[..., None]  # (prompts): load the weights
    draw: Callable[..., Drawn]  # (strip, some of its scales)
    config_class: ClassVar[type[JobsConfig]]
    usual_prompt: str | None = None  # where none is given

    def __init__(self, config: Any, script: Any) -> None:
        self.config, self.script = config, script
        self.loras, self.wrong_loras = find_loras(config, config.lora)
        self.fixed, wrong = find_loras(
            config, config.fixed_lora if isinstance(config, EditConfig) else []
        )
        self.wrong_loras += wrong
        self.about = [read_about(lora.file) for lora in self.loras]

    def problems(self, strips: Sequence[Strip]) -> list[str]:
        """Return what can be known to be wrong before a model loads."""
        texts = {f"prompt of {strip.name}": strip.prompt for strip in strips}
        problems = utils.check_setup(devices={"device": self.config.device}, texts=texts)
        problems += self.wrong_loras + (wrong := self.check_base())
        model = None
        try:
            model = None if wrong else self.empty_model()
        except UserError as error:
            problems.append(str(error))
        if any(len(strip.images) > self.most_images for strip in strips):
            problems.append("image: this model takes one picture at a time")
        files = {lora.file for strip in strips for lora in (*strip.loras, *self.fixed)}
        for file in sorted(files | {strip.inversion for strip in strips if strip.inversion}):
            try:
                path = find_lora(file, self.allow_pickle)
                problems += (unsound := utils.check_setup(loras=[path]))
                self.check_lora(path, None if unsound else model)
            except UserError as error:
                text = "; ".join(line.strip(" -") for line in str(error).splitlines())
                problems.append(text if str(file) in text else f"LoRA {file}: {text}")
        return problems

    @property
    def allow_pickle(self) -> bool | None:
        """Return whether LoRA files may be pickles; None: this family takes none."""
        return getattr(self.config, "allow_pickle", None)

    def lora_hash(self, file: Path) -> str:
        """Return the hash of the file that stands for this one."""
        return hash_of(find_lora(file, self.allow_pickle))

    @property
    def device(self) -> torch.device:
        """Return the device of the config, or the fastest there is."""
        accelerator = torch.accelerator.is_available() and torch.accelerator.current_accelerator()
        return torch.device(self.config.device or accelerator or "cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the config: null is bf16, on a CPU fp32."""
        usual = "fp32" if self.device.type == "cpu" else "bf16"
        return torch.bfloat16 if (self.config.dtype or usual) == "bf16" else torch.float32

    def decides(self) -> dict[str, Any]:
        """Return what decides the pixels beside the config: precision, and the code that draws."""
        reads = Path(__file__).parent / "tools/lora_names.py"
        files = [Path(__file__), Path(self.script.__file__), *[reads] * reads.is_file()]
        code = [hash_of(file) for file in files]
        return {"dtype": str(self.dtype), "code": code}

    def size(self, images: Sequence[dict[str, Any]]) -> tuple[int, int]:
        """Return (W, H) px of a result: the bucket of the photo, else a square."""
        side = self.config.resolution
        if not images:
            return side, side
        return self.script.nearest_bucket(images[0]["width"], images[0]["height"], side)


# --- 6. Qwen-Image-Edit ---------------------------------------------------------------------------


class Rule(NamedTuple):
    """How large references are, and why."""

    reference_area: str | int  # 1mp | target | px
    vision_area: int | None  # px; None: the pipeline's own
    resolution: int | None  # of the training, px
    why: str


def reference_rule(wanted: str | int, abouts: dict[str, dict[str, Any]]) -> Rule:
    """Return the rule of --reference_area, else of LoRAs. Raises UserError if they disagree."""
    known = {file: about for file, about in abouts.items() if about}
    first: dict[str, Any] = next(iter(known.values()), {})
    area, why = first.get("reference_area", "1mp"), "as the LoRA was trained"
    if wanted != "lora":
        area, why = int(wanted) if str(wanted).isdecimal() else wanted, "as --reference_area says"
    elif not known:
        why = "as the stock pipeline does"
    for name in ("reference_area", "vision_area") if wanted == "lora" else ():
        values = {file: about.get(name) for file, about in known.items()}
        if len({*values.values()}) > 1:
            lines = [f"{file}: {value}" for file, value in values.items()]
            raise UserError(
                f"the LoRAs were trained with different {name}; set --reference_area to go by the "
                f"first one\n{listed(lines)}"
            )
    return Rule(area, first.get("vision_area"), first.get("resolution"), why)


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


class EditPainter(Painter):
    """Qwen-Image-Edit: the checkpoint's own diffusers pipeline, LoRAs by load_lora_weights."""

    family, script_name, needs = "Qwen-Image-Edit", "train_qwen_edit.py", "detect_flavour"
    config_class = EditConfig
    most_images = 10**6

    @functools.cached_property
    def rule(self) -> Rule:
        """Return how large references are. Raises UserError."""
        files = (str(lora.file) for lora in self.loras)
        return reference_rule(self.config.reference_area, dict(zip(files, self.about, strict=True)))

    @functools.cached_property
    def flavour(self) -> Any:
        """Return which Qwen-Image-Edit this is. Raises UserError."""
        return self.script.detect_flavour(self.config.pretrained_model_name_or_path)

    def problems(self, strips: Sequence[Strip]) -> list[str]:
        """Return what can be known to be wrong before a model loads."""
        problems = super().problems(strips)
        with contextlib.suppress(UserError):  # named already
            most = self.flavour.most_references
            if any(strip.images[most:] for strip in strips):
                problems.append(f"image: this model takes {most} reference(s) at most")
            if most == 1 and not all(strip.images for strip in strips):
                problems.append("image: is missing; this model edits one picture")
            for lora, about in zip(self.loras, self.about, strict=True):
                if (trained := about.get("flavour", self.flavour.name)) != self.flavour.name:
                    text = f"was trained on {trained}, this model is {self.flavour.name}"
                    print(f"note: {lora.file} {text}")
        try:
            area, _, _, why = self.rule
            shown = any(strip.images for strip in strips)
            print(f"references: {area}, {why}" if shown else "references: none, text to image")
        except UserError as error:
            problems.append(str(error))
        return problems

    def check_base(self) -> list[str]:
        """Return problems of the base model."""
        try:
            self.script.detect_flavour(self.config.pretrained_model_name_or_path)
        except UserError as error:
            return [f"pretrained_model_name_or_path: {error}"]
        return []

    def empty_model(self) -> Any:
        """Return the transformer without weights."""
        name = self.config.pretrained_model_name_or_path
        return self.script.empty_transformer(utils.read_model_json(name, "transformer/config.json"))

    def check_lora(self, file: Path, model: Any) -> None:
        """Compare names and shapes of a LoRA with the transformer. Raises UserError."""
        if not model:
            return
        tool = load_tool("lora_names")
        layers = tool.read_layers(file, model, "QwenImageEditPlusPipeline")
        wrong = [
            f"{layer}: {text}"
            for layer, x in layers.items()
            if (text := tool.misfit(x, model.get_submodule(layer)))
        ]
        if wrong:
            text = f"{len(wrong)} layers do not fit{tool.trained_on(file)}"
            raise UserError(f"LoRA {file}: {text}\n{listed(wrong, 3)}")
        if any("lokr_w1" in parts for parts in layers.values()):
            what = f"LoRA {file}: PEFT has no LoKr with these sizes"
            with named(what), warnings.catch_warnings(action="ignore"):  # of tensors without values
                copy.deepcopy(model).load_lora_adapter(edit_tensors(file, model))

    def size(self, images: Sequence[dict[str, Any]]) -> tuple[int, int]:
        """Return (W, H) px of a result: 1 MP, or as the LoRA was trained, in the last aspect."""
        last = images[-1] if images else {"width": 1, "height": 1}
        width, height = last["width"], last["height"]
        with contextlib.suppress(UserError):  # a problem that is named
            if self.rule.reference_area == "target" and self.rule.resolution:
                return self.script.nearest_bucket(width, height, self.rule.resolution)
        return self.script.pick_size(AREA_1MP, width / height)

    def decides(self) -> dict[str, Any]:
        """Return what decides the pixels beside the config."""
        area, vision, *_ = self.rule
        fixed = [(self.lora_hash(lora.file), lora.scale) for lora in self.fixed]
        return super().decides() | {"reference_area": area, "vision_area": vision, "fixed": fixed}

    @named("the base model cannot be loaded")
    def load(self, prompts: Sequence[str]) -> None:
        """Load the pipeline with all LoRAs (named lora0, lora1 ...)."""
        import diffusers

        folder = utils.fetch_checkpoint(self.config.pretrained_model_name_or_path)
        kind = self.flavour.processor_class
        processor = self.script.load_processor(folder / "processor", kind)
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            folder, processor=processor, dtype=self.dtype, use_safetensors=True
        )
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # there are several
        for kind, loras in (("lora", self.loras), ("fixed", self.fixed)):
            for number, lora in enumerate(loras):
                load_edit_lora(pipeline, find_lora(lora.file), f"{kind}{number}")
        stock, how = pipeline.scheduler, self.script.SCHEDULES[self.config.schedule]
        pipeline.scheduler = type(stock).from_config(stock.config, **how)
        pipeline.set_progress_bar_config(leave=False)
        if self.config.offload == "model":
            pipeline.enable_model_cpu_offload(device=self.device)
        elif self.config.offload == "sequential":
            pipeline.enable_sequential_cpu_offload(device=self.device)
        else:
            pipeline.to(self.device)
        self.pipeline = pipeline

    def draw(self, strip: Strip, scales: Sequence[float]) -> Drawn:
        """Draw a strip, picture by picture."""
        for scale in scales:
            self.set_scales(strip.loras, scale)
            yield scale, self.edit(strip), {}

    def set_scales(self, loras: Sequence[Lora], times: float) -> None:
        """Set every LoRA to its own scale times `times`; 0 is the base model (with fixed ones)."""
        weights = {f"fixed{k}": lora.scale for k, lora in enumerate(self.fixed)}
        if times:
            weights |= {f"lora{k}": lora.scale * times for k, lora in enumerate(loras)}
        if weights:
            self.pipeline.enable_lora()
            self.pipeline.set_adapters([*weights], adapter_weights=[*weights.values()])
        elif self.loras:
            self.pipeline.disable_lora()

    def edit(self, strip: Strip) -> Image.Image:
        """Draw one picture with the LoRAs as they are set."""
        config, (width, height) = self.config, strip.size
        areas = {"1mp": AREA_1MP, "target": width * height}
        area_px = int(areas.get(str(self.rule.reference_area), self.rule.reference_area))
        pipeline, shown = self.pipeline, dict[str, Any]()
        if references := self.references(strip):
            shown["image"] = references if self.flavour.most_references > 1 else references[0]
        elif self.flavour.pipeline_class == "QwenImageEditPlusPipeline":
            pipeline, shown = self.text_pipeline, {"max_sequence_length": 1024}  # as of edits
        plain, steps = config.schedule == "lightning", config.num_inference_steps
        scale = config.true_cfg_scale or (1.0 if plain else self.flavour.guidance)
        guided = scale > 1
        with reference_sizes(self.pipeline, area_px, self.rule.vision_area):
            return pipeline(
                **shown,
                prompt=strip.prompt,
                negative_prompt=config.negative_prompt if guided else None,
                true_cfg_scale=scale,
                num_inference_steps=steps,
                sigmas=[1 - k / steps for k in range(steps)] if plain else None,
                width=width,
                height=height,
                generator=torch.Generator().manual_seed(strip.seed),
            ).images[0]

    @functools.cached_property
    def text_pipeline(self) -> Any:
        """Return Qwen-Image's pipeline with the template of Edit-Plus, which wants pictures."""
        import diffusers

        parts = {name: x for name, x in self.pipeline.components.items() if name != "processor"}
        pipeline: Any = diffusers.QwenImagePipeline(**parts)
        for name in ("prompt_template_encode", "prompt_template_encode_start_idx"):
            setattr(pipeline, name, getattr(self.pipeline, name))
        pipeline.set_progress_bar_config(leave=False)
        return pipeline

    def references(self, strip: Strip) -> list[Image.Image]:
        """Open the pictures; those at the output's size are cropped to it, as in training."""
        images = [open_rgb(file, self.flavour.picture_mode) for file in strip.images]
        if self.rule.reference_area != "target" or not images:
            return images
        wanted = strip.size[0] / strip.size[1]
        aspects = [image.width / image.height for image in images]
        # the frame that references share: the last one's, or of the one nearest to width x height
        near = min(aspects, key=lambda aspect: abs(math.log(aspect / wanted)))
        frame = near if self.config.width else aspects[-1]

        def cut(image: Image.Image, aspect: float) -> Image.Image:
            if not self.script.aligns(aspect, frame):
                return image
            box = self.script.cover_box(aspect, wanted)
            sides = zip(box, (image.width, image.height) * 2, strict=True)
            left, top, right, bottom = (round(share * side) for share, side in sides)
            return image.crop((left, top, right, bottom))

        return [cut(image, aspect) for image, aspect in zip(images, aspects, strict=True)]


def edit_tensors(path: Path, transformer: Any) -> dict[str, torch.Tensor]:
    """Return a file's tensors under diffusers' names, its strength folded in. Raises UserError."""
    read = load_tool("lora_names").read_layers
    layers = read(path, transformer, "QwenImageEditPlusPipeline").items()
    return {f"transformer.{layer}.{n}": x for layer, parts in layers for n, x in parts.items()}


def load_edit_lora(pipeline: Any, path: Path, name: str) -> None:
    """Call load_lora_weights on a file of ours, or on another's tensors; the model takes LoKr."""
    names = [*load_tool("lora_names").read_tensors(path)[0]]
    lokr = any(".lokr_" in key for key in names)
    if read_about(path) and not lokr and all(key.startswith("transformer.") for key in names):
        return pipeline.load_lora_weights(str(path), adapter_name=name)
    tensors = edit_tensors(path, pipeline.transformer)
    if not lokr:
        return pipeline.load_lora_weights(tensors, adapter_name=name)
    how = {"adapter_name": name, "_pipeline": pipeline}
    pipeline.load_lora_into_transformer(tensors, pipeline.transformer, **how)


# --- 7. FLUX.1: files of sliders ------------------------------------------------------------------


def read_factors(path: Path, transformer: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return {layer: (down (r, in), up (out, r))} of a file, fp32; its strength is folded into up.

    Takes every layout of tools/lora_names.py, and what diffusers converts for FLUX.

    Raises:
        UserError: not readable, or tensors in it that are no part of a LoRA for this transformer.
    """
    found = load_tool("lora_names").read_layers(path, transformer, "FluxPipeline")
    return {layer: (x["lora_A.weight"], x["lora_B.weight"]) for layer, x in found.items()}


def flux_layers(script: ModuleType, name: str) -> Any:
    """Return a checkpoint's transformer without weights; the published one needs no network."""
    if name == PUBLISHED_FLUX and not Path(name).is_dir():
        return script.empty_flux(script.PUBLISHED_TRANSFORMER)
    return script.empty_flux(utils.read_model_json(name, "transformer/config.json"))


# --- 8. FLUX.1: sliders ---------------------------------------------------------------------------


def batches(scales: Sequence[float], most: int = 8) -> list[list[float]]:
    """Cut scales into lists of at most so many, which are drawn at once."""
    return [list(scales[k : k + most]) for k in range(0, len(scales), most)]


@torch.no_grad()
def edit_photo(
    script: Any,
    predict: Callable[..., torch.Tensor],
    photo: torch.Tensor,
    sigmas: Sequence[float],
    scales: Sequence[float],
    sliders: Sequence[Any],
    seed: int,
    blend: bool = False,
) -> torch.Tensor:
    """Edit latents x of a photo (1, S, 4C) at every scale of the sliders -> (scales, S, 4C).

    FlowEdit (Kulikov et al. 2024, arXiv 2412.08629) with a slider instead of a second prompt; the
    photo is never inverted. From z = x, in every step in which a slider is on, with new noise e:

        source = (1 - sigma) x + sigma e          edited = z + source - x
        z <- z + (sigma' - sigma) (v_slider(edited) - v_base(source))

    All scales share e, source and its velocity; scale 0 is the photo itself, bit for bit.
    """
    first = min(slider.start for slider in sliders)
    moved = sorted({scale for scale in scales if scale})
    drawn = {0.0: photo[0]}
    for group in batches(moved):
        turned = torch.tensor([0.0, *group], device=photo.device)
        tokens = photo.expand(len(group), -1, -1)
        for i in range(first, len(sigmas) - 1):
            acting = [slider for slider in sliders if slider.start <= i]
            noise = normal(photo.shape, seed, "edit", i).to(photo)
            source = (1 - sigmas[i]) * photo + sigmas[i] * noise
            both = torch.cat([source, tokens + source - photo])
            velocity = script.slider_velocity(predict, both, sigmas[i], (), acting, turned, blend)
            tokens = tokens + (sigmas[i + 1] - sigmas[i]) * (velocity[1:] - velocity[:1])
        drawn.update(zip(group, tokens, strict=True))
    return torch.stack([drawn[scale] for scale in scales])


class SliderPainter(Painter):
    """FLUX.1. Prompts are encoded first, then the encoders leave the memory."""

    family, script_name, needs = "FLUX.1", "train_pairedit.py", "load_flux"
    config_class = SliderConfig
    usual_prompt = ""

    def problems(self, strips: Sequence[Strip]) -> list[str]:
        """Return what can be known to be wrong before a model loads."""
        problems, steps = super().problems(strips), self.config.num_inference_steps
        if self.config.base_model_precision == "nf4-bnb":
            problems += utils.check_setup(packages=["bitsandbytes"])
        for start in sorted({lora.start for strip in strips for lora in strip.loras}):
            if not 0 <= start < steps:
                text = f"the slider would act from step {start}, but there are 0..{steps - 1}"
                problems.append(f"skip: {text}")
        return problems

    def check_base(self) -> list[str]:
        """Return problems of the base model."""
        return self.script.check_checkpoint(self.config.pretrained_model_name_or_path)

    def empty_model(self) -> Any:
        """Return the transformer without weights."""
        return flux_layers(self.script, self.config.pretrained_model_name_or_path)

    def check_lora(self, file: Path, model: Any) -> None:
        """Compare a LoRA with the transformer. Raises UserError."""
        if model:
            switch = self.script.AdapterSwitch()
            self.script.add_slider(model, switch, "checked", read_factors(file, model), 1.0)

    @named("the base model cannot be loaded")
    def load(self, prompts: Sequence[str]) -> None:
        """Encode the prompts, then load the VAE and the transformer."""
        script, config, device = self.script, self.config, self.device
        self.folder = utils.fetch_checkpoint(config.pretrained_model_name_or_path, "*/*")
        length = config.max_sequence_length
        self.texts = script.encode_texts(self.folder, prompts, length, self.dtype, device)
        gc.collect()  # KEEP: the encoders are never in memory together with the transformer
        torch.cuda.empty_cache()
        self.vae = script.load_vae(self.folder, device)
        self.token_px = 2 * 2 ** (len(self.vae.config.block_out_channels) - 1)
        precision = config.base_model_precision
        self.transformer = script.load_flux(self.folder, precision, self.dtype, device)
        self.switch = script.AdapterSwitch()
        self.attached: dict[str, Path] = {}

    def attach(self, strip: Strip) -> None:
        """Give the transformer the adapters of a strip, and no others."""
        wanted = {f"slider{k}": lora.file for k, lora in enumerate(strip.loras)}
        wanted |= {"content": strip.inversion} if strip.inversion else {}
        if wanted == self.attached:
            return
        for name in self.attached:
            for layer in self.script.adapted_layers(self.transformer, name).values():
                del layer.down[name], layer.up[name]
        for name, path in wanted.items():
            factors = read_factors(find_lora(path, self.allow_pickle), self.transformer)
            self.script.add_slider(self.transformer, self.switch, name, factors, 1.0)
        self.attached = wanted

    def predictor(self, strip: Strip) -> Callable[..., torch.Tensor]:
        """Return the velocity under a strip's prompt, by (tokens, sigma, parts)."""
        text, guidance = self.texts[strip.prompt], self.config.guidance_scale
        grid = self.grid(strip)
        return self.script.flux_velocity(self.transformer, self.switch, text, grid, guidance)

    def grid(self, strip: Strip) -> tuple[int, int]:
        """Return (rows, columns) of tokens."""
        return strip.size[1] // self.token_px, strip.size[0] // self.token_px

    def sigmas(self, strip: Strip) -> list[float]:
        """Return the noise levels of a strip."""
        steps, tokens = self.config.num_inference_steps, math.prod(self.grid(strip))
        return self.script.sigma_table(self.folder, steps, tokens).tolist()

    def draw_tokens(self, strip: Strip, scales: Sequence[float]) -> torch.Tensor:
        """Return a strip's latents at some of its scales, (scales, S, 4C)."""
        self.attach(strip)
        script, grid, blend = self.script, self.grid(strip), strip.gamma is not None
        predict, sigmas = self.predictor(strip), self.sigmas(strip)
        sliders = [
            script.Slider(f"slider{k}", lora.scale, lora.start, strip.gamma or 0.0)
            for k, lora in enumerate(strip.loras)
        ]
        if strip.images and not strip.inversion:
            pixels = script.to_pixels(fit_photo(strip.images[0], strip.size))
            latents = script.encode_pixels(self.vae, pixels)
            photo_db(strip.images[0], script.decode_latents(self.vae, latents), pixels)
            photo = script.pack_tokens(latents)
            return edit_photo(script, predict, photo, sigmas, scales, sliders, strip.seed, blend)
        channels = self.transformer.config.in_channels // 4
        noise = script.first_noise(strip.seed, channels, grid, self.dtype, self.device)
        base = (script.Active("content"),) if strip.inversion else ()
        return script.draw_strip(predict, noise, sigmas, scales, sliders, base, blend)

    def draw(self, strip: Strip, scales: Sequence[float]) -> Drawn:
        """Draw a strip; its scales share what they can."""
        latents = self.script.unpack_tokens(self.draw_tokens(strip, scales), self.grid(strip))
        for scale, x in zip(scales, latents, strict=True):
            pixels = self.script.decode_latents(self.vae, x[None])
            yield scale, self.script.to_image(pixels[0]), {}


def fit_photo(path: Path, size: tuple[int, int]) -> Image.Image:
    """Return a picture cropped around its middle and resized to (W, H) px."""
    return ImageOps.fit(open_rgb(path), size, Image.Resampling.LANCZOS)


def decibels(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return dB between two pictures in [-1, 1]; 200 at most."""
    error = (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean().item()
    return 200.0 if error < 4e-20 else 10 * math.log10(4 / error)


def photo_db(path: Path, kept: torch.Tensor, pixels: torch.Tensor) -> float:
    """Return dB between decode(encode(photo)) and the photo; say it where that is no picture."""
    back = decibels(kept, pixels.to(kept))
    if back < 22:  # photos: 25 and more
        tqdm.write(
            f"{path}: this base cannot draw such a picture; its autoencoder alone gives it back at "
            f"{back:.0f} dB only (the bases in demo/ draw the demo's faces, and nothing else)"
        )
    return back


# --- 9. Stable Diffusion --------------------------------------------------------------------------


class Inverted(NamedTuple):
    """A photo, and what gives it back."""

    pixels: torch.Tensor  # (1, 3, H, W)
    kept: torch.Tensor  # what the VAE keeps of it: decode(encode(photo))
    path: list[torch.Tensor]  # N + 1 of (1, 4, h, w), the last one clean
    means: list[torch.Tensor]  # N; see path_means() of the script
    levels: Any
    eta: float


class ChangePainter(Painter):
    """Stable Diffusion 1.x. What is not given is what the LoRAs were trained with."""

    family, script_name, needs = "Stable Diffusion", "train_dreambooth_pairs.py", "guided"
    config_class = ChangeConfig

    def __init__(self, config: ChangeConfig, script: Any) -> None:
        super().__init__(config, script)
        told: dict[str, Any] = {}
        for about in reversed(self.about):
            told |= about
        self.usual_prompt = told.get("instance_prompt", "" if config.photo else None)
        side = config.resolution or told.get("resolution") or self.base_resolution()
        guidance = config.guidance_scale or (1.0 if config.photo else 7.5)
        update = {"resolution": side, "guidance_scale": guidance}
        self.config = config.model_copy(update=update)

    def base_resolution(self) -> int:
        """Return the side of the base model's own pictures, px; 512 where it does not say."""
        name = self.config.pretrained_model_name_or_path
        try:
            latents_px = utils.read_model_json(name, "unet/config.json")["sample_size"]
            halvings = len(utils.read_model_json(name, "vae/config.json")["block_out_channels"]) - 1
            return max(64, latents_px * 2**halvings // 64 * 64)
        except (UserError, KeyError, TypeError):
            return 512

    def problems(self, strips: Sequence[Strip]) -> list[str]:
        """Return what can be known to be wrong before a model loads."""
        problems, mask = super().problems(strips), self.config.mask
        if mask and strips:
            try:
                sizes = {path: open_rgb(path).size for path in (strips[0].images[0], mask)}
                if len({*sizes.values()}) > 1:
                    text = ", ".join(f"{path} is {w} x {h} px" for path, (w, h) in sizes.items())
                    problems.append(f"mask: must have the photo's size: {text}")
            except UserError as error:
                problems.append(f"mask: {error}")
        return problems

    def check_base(self) -> list[str]:
        """Return problems of the base model."""
        return self.script.check_base(self.config.pretrained_model_name_or_path)

    def empty_model(self) -> Any:
        """Return {"unet", "text_encoder"} without weights."""
        import diffusers
        import transformers
        from accelerate import init_empty_weights

        name = self.config.pretrained_model_name_or_path
        read = functools.partial(utils.read_model_json, name)
        unet, text = (read(f"{part}/config.json") for part in ("unet", "text_encoder"))
        with init_empty_weights():
            return {
                "unet": diffusers.UNet2DConditionModel.from_config(unet),
                "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)),
            }

    def check_lora(self, file: Path, model: Any) -> None:
        """Compare a LoRA with the model. Raises UserError."""
        if model:
            tool = load_tool("lora_names")
            tool.check_kind(file, tool.read_tensors(file)[0], edits=False)
            self.script.load_adapter(model, self.script.AdapterSwitch(), "checked", file)

    def decides(self) -> dict[str, Any]:
        """Return what decides the pixels beside the config."""
        mask = self.config.mask
        return super().decides() | {"mask": hash_of(mask) if mask else None}

    @named("the base model cannot be loaded")
    def load(self, prompts: Sequence[str]) -> None:
        """Load all parts of the model, and the LoRAs into them (named lora0, lora1 ...)."""
        script, dtype, device = self.script, self.dtype, self.device
        folder = script.fetch_sd(self.config.pretrained_model_name_or_path)
        self.schedule = utils.read_model_json(str(folder), "scheduler/scheduler_config.json")
        every = dict.fromkeys([*prompts, self.config.negative_prompt])
        self.texts = script.encode_prompts(folder, list(every), dtype, device)
        self.vae = script.load_part(folder, "vae", dtype, device)
        parts = ("unet", "text_encoder")
        self.models = {part: script.load_part(folder, part, dtype, device) for part in parts}
        self.switch = script.AdapterSwitch()
        for number, lora in enumerate(self.loras):
            file = find_lora(lora.file)
            script.load_adapter(self.models, self.switch, f"lora{number}", file)

    def draw(self, strip: Strip, scales: Sequence[float]) -> Drawn:
        """Draw a strip; scales other than 0 as batches."""
        facts: dict[str, Any] = {}
        if strip.images:
            pixels, facts = self.change_photo(strip, scales)
        else:
            pixels = self.draw_prompt(strip, scales)
        for scale, x in zip(scales, pixels, strict=True):
            yield scale, self.script.to_image(x[0]), facts

    @torch.no_grad()
    def draw_prompt(self, strip: Strip, scales: Sequence[float]) -> list[torch.Tensor]:
        """Return pixels (1, 3, H, W) at every scale, from the noise of the strip's seed."""
        config, (width, height) = self.config, strip.size
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        draw = torch.Generator().manual_seed(strip.seed)
        shape = 1, self.models["unet"].config.in_channels, height // factor, width // factor
        noise = torch.randn(shape, generator=draw, dtype=self.dtype).to(self.device)
        predict_at = functools.partial(self.predict_at, strip.prompt)
        steps = config.num_inference_steps
        draw_sd = functools.partial(self.script.draw_sd, predict_at, noise, self.schedule, steps)
        latents = torch.cat([draw_sd(group) for group in batches(scales)])
        return [self.script.decode_sd(self.vae, x[None]) for x in latents]

    def predict_at(self, prompt: str, scales: torch.Tensor) -> Callable[..., torch.Tensor]:
        """Return what predicts noise under guidance, the LoRAs at `scales` (B,); 0: the base."""
        script, guidance = self.script, self.config.guidance_scale
        named = enumerate(self.loras)
        part = tuple(script.Active(f"lora{k}", lora.scale * scales) for k, lora in named)
        part = part if scales.any() else ()
        prompts = [prompt, self.config.negative_prompt] if guidance > 1 else [prompt]
        self.switch.parts = [part]
        ids = [self.texts[p][0].expand(len(scales), -1) for p in prompts]
        embeds = [self.models["text_encoder"](x)[0].to(self.dtype) for x in ids]
        return script.guided(self.models["unet"], self.switch, part, embeds, guidance)

    @torch.no_grad()
    def invert(self, strip: Strip) -> Inverted:
        """Return a photo as noise, by the base model."""
        script, config = self.script, self.config
        levels = script.sd_levels(self.schedule, config.num_inference_steps, config.skip)
        pixels = script.to_pixels(fit_photo(strip.images[0], strip.size)).to(self.device)
        latents = script.encode_sd(self.vae, pixels)
        predict = self.predict_at(strip.prompt, torch.zeros(1, device=self.device))
        eta = float(config.inversion == "ddpm")
        if eta:
            noises = (normal(latents.shape, strip.seed, "invert", k) for k in range(len(levels)))
            path = script.ddpm_path(latents, levels, torch.stack([*noises]).to(latents))
        else:
            path = script.ddim_path(latents, levels, predict)
        means = script.path_means(path, levels, predict, eta)
        kept = script.decode_sd(self.vae, latents)
        return Inverted(pixels, kept, path, means, levels, eta)

    @torch.no_grad()
    def edit(self, strip: Strip, photo: Inverted, scales: list[float]) -> list[torch.Tensor]:
        """Return pixels (1, 3, H, W) of a photo at several scales, as one batch."""
        mask = torch.ones_like(photo.pixels[:, :1])
        if self.config.mask:
            white = self.script.to_pixels(fit_photo(self.config.mask, strip.size))
            mask = (white.mean(1, keepdim=True).to(mask) + 1) / 2
        coarse = F.interpolate(mask, photo.path[0].shape[-2:], mode="area")
        predict = self.predict_at(strip.prompt, torch.tensor(scales, device=self.device))
        path = [photo.path[0].expand(len(scales), -1, -1, -1), *photo.path[1:]]
        latents = self.script.follow_path(
            path, photo.means, photo.levels, predict, photo.eta, coarse
        )
        edited = [self.script.decode_sd(self.vae, x[None]) for x in latents]
        # the decoder looks at the whole picture, so the mask counts for pixels, too
        return [photo.kept + mask * (x - photo.kept) for x in edited]

    def change_photo(
        self, strip: Strip, scales: Sequence[float]
    ) -> tuple[list[torch.Tensor], dict[str, float]]:
        """Return pixels (1, 3, H, W) of a photo at every scale, and how well it came back.

        scale0_db: scale 0 against decode(encode(photo)); vae_db: that against the photo.
        """
        photo, path = self.invert(strip), strip.images[0]
        moved = sorted({scale for scale in scales if scale})
        drawn = dict(zip([0.0], self.edit(strip, photo, [0.0]), strict=True))
        same, back = decibels(drawn[0.0], photo.kept), photo_db(path, photo.kept, photo.pixels)
        for group in batches(moved):
            drawn |= zip(group, self.edit(strip, photo, group), strict=True)
        if self.config.restore_detail:
            drawn = {scale: x + photo.pixels - photo.kept for scale, x in drawn.items()}
        facts = {"scale0_db": round(same, 1), "vae_db": round(back, 1)}
        tqdm.write(
            f"{path}: scale 0 is decode(encode(photo)) at {facts['scale0_db']} dB, "
            f"which is the photo at {facts['vae_db']} dB"
        )
        return [drawn[scale] for scale in scales], facts


# --- 10. main -------------------------------------------------------------------------------------


PAINTERS: tuple[type[Painter], ...] = (EditPainter, SliderPainter, ChangePainter)
KINDS = {"FluxPipeline": SliderPainter, "StableDiffusionPipeline": ChangePainter}


def settings_given(argv: Sequence[str]) -> dict[str, Any]:
    """Return the settings of the file and of the flags, as text. Raises UserError."""
    given = utils.parse_args(argv)
    file = utils.read_config(" ".join(given["config"][-1])) if "config" in given else {}
    return file | {name.partition(".")[0]: "".join(texts[-1]) for name, texts in given.items()}


def pick_painter(given: dict[str, Any]) -> type[Painter]:
    """Return the family of the checkpoint; of one that cannot be read that of the settings."""
    name, kind = str(given.get("pretrained_model_name_or_path", "")), ""
    if name == PUBLISHED_FLUX:
        return SliderPainter
    with contextlib.suppress(UserError):  # which the check of the settings will tell
        index = utils.read_model_json(name, "model_index.json") if name else {}
        kind = index.get("_class_name", "")
    if kind:
        return KINDS.get(kind, EditPainter)
    for painter in (ChangePainter, SliderPainter):
        others = {n for p in PAINTERS if p is not painter for n in p.config_class.model_fields}
        if given.keys() & (painter.config_class.model_fields.keys() - others):
            return painter
    flux = {"python_name", "datasets"} & given.keys()
    return SliderPainter if flux or not name else EditPainter


def runs_class(script: ModuleType) -> Any:
    """Return the settings of train_pairedit.py, or a fork of it, with those of drawing."""
    return create_model(
        "Config", __base__=(RunStripsConfig, script.Config), __doc__=RunStripsConfig.__doc__
    )


def is_file_of_runs(given: dict[str, Any], script: Any) -> bool:
    """Return whether settings are of the trainer, and not flags of strips."""
    flags, runs = SliderConfig.model_fields.keys(), runs_class(script).model_fields.keys()
    named = {"python_name", "datasets"} & given.keys()
    return bool(named or (given.keys() & (runs - flags) and not given.keys() & (flags - runs)))


def note_families(given: dict[str, Any], own: type[Painter]) -> str:
    """Return lines on settings that belong to another family than the checkpoint's."""
    lines = []
    for painter in PAINTERS:
        theirs = painter.config_class.model_fields.keys() - own.config_class.model_fields.keys()
        lines += [f"{n} is a setting of {painter.family}" for n in sorted(theirs & given.keys())]
    return f"\nthis model is {own.family}\n{listed(lines)}" if lines else ""


def help_text(wanted: str, script: Callable[[type[Painter]], Any]) -> str:
    """Return the commands, or all settings of one family or of all. Raises UserError."""
    classes = {"edit": EditConfig, "slider": SliderConfig, "change": ChangeConfig}
    tool, names = load_tool("settings"), [*classes, "runs", "all"]
    if not wanted:
        first = "\n".join(tool.first(EditConfig, Path(__file__).name))
        return f"{__doc__}\n{first}\n\nSettings: --help {', --help '.join(names)}"
    if wanted not in names:
        raise UserError(f"--help {wanted}: no such family{nearest(wanted, names)}")
    kinds = classes if wanted == "all" else {wanted: classes.get(wanted)}
    texts = [tool.help_text(k or runs_class(script(SliderPainter)), "all") for k in kinds.values()]
    return "\n\n".join(text.rpartition("\n")[0] for text in texts)  # without its sections


def main() -> None:
    """Read the settings, check the strips, draw the pictures."""
    argv = sys.argv[1:]
    flags = utils.parse_args(argv)

    def script_of(kind: type[Painter], path: Any = None) -> Any:
        own = "".join(flags["script"][-1]) if "script" in flags else path
        script = utils.load_script(Path(own or Path(__file__).parent / kind.script_name))
        if not hasattr(script, kind.needs):
            text = f"no training script of {kind.family}; wanted {kind.script_name} or a fork of it"
            raise UserError(f"--script {script.__file__}: {text}")
        return script

    if any(len(texts) > 1 for texts in flags.get("prompt", [])):
        raise UserError(
            '--prompt: put it in quotes, "make it snow"; several: --prompt A --prompt B'
        )

    if "help" in flags:
        print(help_text("".join(flags["help"][-1]), script_of))
        return
    if "c" in flags:
        argv = script_of(SliderPainter).with_named_config(argv)
    given = settings_given(argv)
    kind = SliderPainter if "c" in flags else pick_painter(given)
    script = script_of(kind, given.get("script"))
    runs = kind is SliderPainter and is_file_of_runs(given, script)
    job: dict[str, Any] = {}

    def check(config: Any) -> list[str]:
        settings = config
        if runs:  # what decides the pixels has the same names
            names = SliderConfig.model_fields.keys() - {*JobsConfig.model_fields, "skip"}
            shared = {n: getattr(config, n) for n in names if hasattr(config, n)}
            more = {"output": "x.png", "device": config.device}
            settings = SliderConfig.model_validate({**shared, **more})
        painter = kind(settings, script)
        strips, problems = plan_runs(painter, config) if runs else plan_jobs(painter)
        job.update(painter=painter, strips=strips, html=config.html)
        problems += painter.problems(strips) + check_results(strips)
        folder = strips[0].files[0].parent if strips else Path()  # the others lie beside it
        return problems or utils.check_setup(writes={"results": folder})

    try:
        load_config(runs_class(script) if runs else kind.config_class, argv, check)
    except UserError as error:
        raise UserError(f"{error}{'' if runs else note_families(given, kind)}") from error
    draw_strips(**job)


if __name__ == "__main__":
    utils.run_script(main)
