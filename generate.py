"""Apply Qwen-Image-Edit LoRAs: one edit, a strip over strengths, a folder, a table.

Page: docs/generate.md

    python generate.py --pretrained_model_name_or_path DIR --lora FILE --image a.png \\
        --prompt "make it snow" --output snow.png
    ... --image a.png --image b.png           # several references, in this order
    ... --lora A.safetensors:0.8 --lora B.safetensors
    ... --scales 0,0.5,1 --output strip.png   # every LoRA times 0, 0.5 and 1, side by side
    ... --input_dir photos --output_dir out   # a folder; captions beside the photos or --prompt
    ... --table jobs.jsonl --output_dir out   # {"images": [...], "prompt": "...", "name": "..."}

Everything runs through the diffusers pipelines and load_lora_weights. A finished picture whose
settings are the same is not made again, so a stopped run goes on where it was.
"""

from __future__ import annotations

import bisect
import contextlib
import csv
import difflib
import functools
import importlib.util
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from pydantic import Field, field_validator
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from utils import Section, UserError, hash_file, list_images, load_config, run_script, save_atomic

SIZE_MULTIPLE = 32  # px; the pipelines round every side to it, so training does too
AREA_1MP = 1024 * 1024
VISION_AREA = 384 * 384  # area_px of the pictures shown to the text encoder by Edit-Plus
SETTINGS_KEY = "image_edit"  # PNG text chunk


# --- 1. config ------------------------------------------------------------------------------------


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
    seed: list[int] = [0]
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
    return problems


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
            if flavour and trained != flavour:
                print(f"note: {path} was trained on {trained}, this model is {flavour}")
        except ValueError as error:
            problems.append(str(error))
    if flavour == "edit-v1" and any(len(job.images) > 1 for job in jobs):
        problems.append("2508 takes one reference; 2509 and 2511 take more")
    problems += check_device("--device", config.device)
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
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    device = config.device or (accelerator.type if accelerator else "cpu")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[
        config.dtype or ("fp32" if device == "cpu" else "bf16")
    ]
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


def set_scales(pipeline: Any, config: Config, times: float) -> None:
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
            return json.loads(image.info.get(SETTINGS_KEY, "null"))
    except (OSError, SyntaxError, ValueError):
        return None


def save_picture(path: Path, image: Image.Image, settings: dict[str, Any]) -> None:
    """PNG with its settings, complete or absent."""
    info = PngInfo()
    info.add_itxt(SETTINGS_KEY, json.dumps(settings, ensure_ascii=False))
    save_atomic(path, lambda file: image.save(file, format="PNG", pnginfo=info))


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
    if total > 1:
        write_sheet(config, jobs, plan)


def write_sheet(config: Config, jobs: Sequence[Job], plan: Sequence[Sequence[Any]]) -> None:
    """References, then every scale side by side; a row per job and seed."""
    columns = len(config.scales or [1.0])
    most = max(len(job.images) for job in jobs)
    rows, captions = [], []
    for job, pictures in zip(jobs, plan, strict=True):
        references = [open_rgb(path) for path in job.images] + [None] * (most - len(job.images))
        for start in range(0, len(pictures), columns):
            part = pictures[start : start + columns]
            rows.append([*references, *(open_rgb(path) for path, _ in part)])
            captions.append(f"{job.name}, seed {part[0][1]['seed']}: {job.prompt}")
    heads = [f"reference {i + 1}" for i in range(most)]
    heads += [f"scale {times:g}" for times in config.scales or [1.0]]
    sheet = contact_sheet(rows, heads, captions)
    path = sheet_path(config)
    save_atomic(path, lambda file: sheet.save(file, format="PNG"))
    print(f"sheet: {path}")


def main() -> None:
    """Settings -> check -> pictures."""
    generate(load_config(Config, check=check))


if __name__ == "__main__":
    run_script(main)
