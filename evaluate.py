"""Figures over results: how near they are to the true after, how strong the edit is, what it costs.

Page: docs/evaluate.md

    python evaluate.py --results out --after_dir data/my_pairs/after    # what generate.py wrote
    ... --before_dir pairs --before_suffix _R --after_dir pairs --after_suffix _T
    ... --results base=out_a --results lora=out_b                       # two folders, side by side
    python evaluate.py --before_dir a --after_dir b --edited_dir base=c --edited_dir lora=d
    ... --metrics psnr,ssim,region,gain                                 # these need no network
    ... --html                                      # and a page with a divider over the pictures

Writes evaluation.csv (a row per picture), evaluation.json (means, ranking, curve, what was skipped
and why) and evaluation.png. A column is what is compared: a scale, or a folder. Before and after
are cropped and resized to the edited picture, which stays as it is. A metric whose package or
weights are not at hand is skipped and says so; nothing takes its place.

Shapes: H W pixels of one picture, (3, H, W) in 0..1, fp32; D numbers of an embedding.
"""

from __future__ import annotations

import csv
import difflib
import functools
import importlib.util
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from pydantic import Field, field_validator
from tqdm.auto import tqdm

from utils import (
    PageRow,
    Section,
    UserError,
    hash_file,
    list_images,
    listed,
    load_config,
    run_script,
    save_atomic,
    write_page,
)

SETTINGS_KEY = "image_edit"  # PNG text chunk


class Figure(NamedTuple):
    """One number of a picture."""

    metric: str
    better: int  # 1: higher, -1: lower, 0: neither
    text: str


# Without an ending: to the true after. `_before`: to the picture before the edit.
FIGURES = {
    "psnr": Figure("psnr", 1, "dB, peak signal to noise ratio to the after; 100 if equal"),
    "psnr_before": Figure("psnr", 0, "dB, to the before"),
    "ssim": Figure("ssim", 1, "structural similarity to the after, 1 if equal"),
    "ssim_before": Figure("ssim", 0, "to the before"),
    "error_inside": Figure("region", -1, "squared error to the after in the edit region, 0..1"),
    "error_outside": Figure("region", -1, "squared error to the after outside of it"),
    "region_share": Figure("region", 0, "share of the pixels that are edit region"),
    "change": Figure("region", 0, "root mean square change from the before, 0..1"),
    "change_inside": Figure("region", 0, "the same in the edit region"),
    "change_outside": Figure("region", -1, "the same outside of it"),
    "gain": Figure("gain", 0, "share of the true change that was made: 1 is all of it"),
    "lpips": Figure("lpips", -1, "LPIPS (AlexNet) to the after, 0 if equal"),
    "lpips_before": Figure("lpips", 0, "to the before"),
    "clip_image": Figure("clip_image", 1, "cosine of the CLIP embeddings of edited and after"),
    "clip_image_before": Figure("clip_image", 0, "of edited and before"),
    "clip_text": Figure("clip_text", 1, "CLIP logit to the prompt, edited minus before"),
    "clip_direction": Figure("clip_direction", 1, "cosine of the change made and the true change"),
    "dino": Figure("dino", 1, "cosine of the DINO embeddings of edited and after"),
    "dino_before": Figure("dino", 0, "of edited and before"),
}
METRICS = tuple(dict.fromkeys(figure.metric for figure in FIGURES.values()))
INPUTS: dict[str, tuple[set[str], ...]] = {  # a picture needs all of one of these sets
    "psnr": ({"after"}, {"before"}),
    "ssim": ({"after"}, {"before"}),
    "region": ({"before"}, {"after", "mask"}),
    "gain": ({"before", "after"},),
    "lpips": ({"after"}, {"before"}),
    "clip_image": ({"after"}, {"before"}),
    "clip_text": ({"before", "prompt"},),
    "clip_direction": ({"before", "after"},),
    "dino": ({"after"}, {"before"}),
}
# EDIT HERE: the first figure that all columns have decides
RANKED_BY = (
    *("error_inside", "psnr", "ssim", "lpips", "clip_direction", "clip_image", "dino"),
    "clip_text",
)
STRENGTHS = ("gain", "clip_direction", "clip_text", "change")
CONTENTS = ("lpips_before", "change_outside", "dino_before")
SHOWN = (
    *("error_inside", "error_outside", "gain", "psnr", "ssim", "lpips"),
    *("clip_image", "clip_text", "clip_direction", "dino"),
)


# --- 1. config ------------------------------------------------------------------------------------


class Config(Section):
    """evaluate.py: figures over a folder of results."""

    results: list[str] = []
    """Folder that generate.py wrote, or NAME=FOLDER; repeat the flag for several."""
    edited_dir: list[str] = []
    """Folder of edited pictures named like the afters, or NAME=FOLDER; repeat for several."""
    before_dir: Path | None = None
    """Pictures before the edit; null: the reference of a result, else its picture at scale 0."""
    after_dir: Path | None = None
    """True afters, by the name of the result."""
    mask_dir: Path | None = None
    """Edit regions (white), by name; null: where before and after differ."""
    before_suffix: str = ""
    """End of the names in before_dir, e.g. _R; results may have it, too."""
    after_suffix: str = ""
    """End of the names in after_dir, e.g. _T."""
    prompt: str | None = None
    """For clip_text; null: that of the result, else the .txt beside the after."""
    metrics: list[str] = list(METRICS)
    """Which to compute; psnr,ssim,region,gain need no network."""
    region_threshold: float = Field(0.1, ge=0, lt=1)
    """Edit region: before and after differ by more than this (0..1, mean over the channels)."""
    strengths: list[float] | None = None
    """Edit strengths at which content is compared; null: 1 (gain), or the largest all reach."""
    clip_model: str = "openai/clip-vit-base-patch32"
    """Folder, or a Hub id."""
    dino_model: str = "facebook/dinov2-small"
    """Folder, or a Hub id."""
    batch_size: int = Field(8, ge=1)
    """Results that are embedded at once."""
    html: bool = False
    """Also write evaluation.html: before, every column, after, with a divider to drag."""
    device: str | None = None
    """cuda, cpu, mps ...; null: the fastest there is."""
    output_dir: Path | None = None
    """Where evaluation.* go; null: the first folder of results."""

    @field_validator("metrics", "strengths", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """ "a,b" -> ["a", "b"], alone or in a list."""
        parts = value if isinstance(value, list) else [value]
        if value is None:
            return None
        return [p for part in parts for p in (part.split(",") if isinstance(part, str) else [part])]


# --- 2. pictures: find and match ------------------------------------------------------------------

NUMBER = r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?"
RESULT = re.compile(
    rf"(?P<name>.+?)(?:_prompt\d+)?(?:_seed(?P<seed>\d+))?(?:_scale(?P<scale>{NUMBER}))?"
)
TREE = re.compile(  # generate.py with the YAML of train_pairedit.py
    rf"(?P<run>.*?)/?origin/(?P<seed>\d+)/\d+_(?P<head>[^/]+)_scale(?P<scale>{NUMBER})_(?P<end>.+)"
)


class Result(NamedTuple):
    """One edited picture and what it is compared with."""

    series: str  # model or folder; "" if there is one
    scale: float | None
    name: str
    seed: int | None
    prompt: str | None
    edited: Path
    before: Path | None = None
    after: Path | None = None
    mask: Path | None = None

    @property
    def column(self) -> str:
        """What it is an example of."""
        scale = "" if self.scale is None else f"scale {self.scale:g}"
        return f"{self.series} {scale}".strip() or "edited"

    @property
    def strip(self) -> tuple[Any, ...]:
        """What it shares with its picture at scale 0."""
        return self.series, self.name, self.seed, self.prompt

    @property
    def given(self) -> set[str]:
        """Which of before, after, mask, prompt it has."""
        return {k for k in ("before", "after", "mask", "prompt") if getattr(self, k)}


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings inside a finished picture; None if there is none, or from elsewhere."""
    try:
        with Image.open(path) as image:
            return json.loads(image.info.get(SETTINGS_KEY) or image.info.get("comment", "null"))
    except (OSError, SyntaxError, ValueError):
        return None


def by_stem(folder: Path, suffix: str = "") -> dict[str, Path]:
    """{relative stem without the suffix: picture}; names that do not end with it are left out.

    Raises:
        UserError: no folder, nothing in it, two pictures of one name.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}")
    found = {
        s.removesuffix(suffix): e for s, e in list_images(folder).items() if s.endswith(suffix)
    }
    if not found:
        raise UserError(f"{folder}: no picture" + f" whose name ends with {suffix}" * bool(suffix))
    if twice := [stem for stem, entries in found.items() if len(entries) > 1]:
        raise UserError(f"{folder}: several pictures are called {', '.join(twice[:5])}")
    return {stem: Path(entries[0].path) for stem, entries in found.items()}


def named_folders(texts: Sequence[str]) -> list[tuple[str, Path]]:
    """NAME=FOLDER or FOLDER -> (name, folder); of several the name is the folder's own."""
    pairs = [text.rpartition("=") if not Path(text).is_dir() else ("", "", text) for text in texts]
    alone = len(pairs) == 1
    return [(name or ("" if alone else Path(path).name), Path(path)) for name, _, path in pairs]


def bare(config: Config, stem: str) -> str:
    """A stem without the ending of befores or afters, which is what pictures are matched by."""
    return stem.removesuffix(config.before_suffix).removesuffix(config.after_suffix)


def read_result(config: Config, series: str, stem: str, path: Path) -> Result | None:
    """A picture that generate.py wrote, by its settings and its name; None for a sheet."""
    settings = read_settings(path)
    settings = settings if isinstance(settings, dict) else {}
    named = TREE.fullmatch(stem) or RESULT.fullmatch(stem)
    if not named or ("seed" not in settings and not named["scale"]):
        return None
    scale = settings.get("times", settings.get("position", named["scale"]))
    seed = settings.get("seed", named["seed"])
    name = bare(config, named["name"]) if named.re is RESULT else f"{named['seed']}_{named['end']}"
    if named.re is TREE:
        series = f"{series} {named['run']}/{named['head']}".strip()
    return Result(
        series=series,
        scale=None if scale is None else float(scale),
        name=name,
        seed=None if seed is None else int(seed),
        prompt=config.prompt or settings.get("prompt"),
        edited=path,
        before=reference_of(settings),
    )


def reference_of(settings: dict[str, Any]) -> Path | None:
    """The first reference of an edit, if it is still the file that was edited."""
    for image in settings.get("images", [])[:1]:
        if Path(image["file"]).is_file() and hash_file(Path(image["file"])) == image["blake2b"]:
            return Path(image["file"])
    return None


def find_results(config: Config, series: str, folder: Path) -> list[Result]:
    """All results in a folder that generate.py wrote. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}")
    found = list_images(folder).items()
    rows = [read_result(config, series, stem, Path(e.path)) for stem, es in found for e in es]
    if not any(rows):
        raise UserError(
            f"{folder}: no result of generate.py (settings inside, or a name with _scale1);"
            " other folders go with --edited_dir"
        )
    return [row for row in rows if row]


def find_edited(config: Config, series: str, folder: Path) -> list[Result]:
    """All pictures of a folder of edited pictures. Raises UserError."""
    return [
        Result(series, None, bare(config, stem), None, config.prompt, path)
        for stem, path in by_stem(folder).items()
        if not stem.startswith("evaluation")
    ]


def shorten_series(rows: Sequence[Result]) -> list[Result]:
    """Leave out the folders with which the names of all series begin."""
    names = sorted({row.series for row in rows})
    first, last = names[0], names[-1]
    if first == last:
        return [row._replace(series="" if "/" in first else first) for row in rows]
    shared = next(
        (k for k, pair in enumerate(zip(first, last, strict=False)) if len({*pair}) > 1), 0
    )
    cut = first.rfind("/", 0, shared) + 1
    return [row._replace(series=row.series[cut:]) for row in rows]


def match(config: Config, rows: Sequence[Result]) -> tuple[list[Result], list[str]]:
    """Give every row its before, after and mask; rows without a wanted one go. (rows, notes)"""
    folders: dict[str, dict[str, Path] | None] = {
        "before": by_stem(config.before_dir, config.before_suffix) if config.before_dir else None,
        "after": by_stem(config.after_dir, config.after_suffix) if config.after_dir else None,
        "mask": by_stem(config.mask_dir) if config.mask_dir else None,
    }
    base = {row.strip: row.edited for row in rows if row.scale == 0}
    references = {row.name: row.before for row in rows if row.before}
    lost: dict[str, list[str]] = {}
    matched = []
    for row in rows:
        own = {k: folder.get(row.name) for k, folder in folders.items() if folder}
        if lacking := [k for k, path in own.items() if not path]:
            lost.setdefault(lacking[0], []).append(row.name)
            continue
        strip, row = row.strip, row._replace(**own)  # type: ignore[arg-type]
        beside = row.after and row.after.with_suffix(".txt")
        if not row.prompt and beside and beside.is_file():
            row = row._replace(prompt=beside.read_text(encoding="utf-8-sig").strip())
        before = row.before or references.get(row.name) or base.get(strip)
        matched.append(row._replace(before=before))
    notes = []
    for kind, names in lost.items():
        some = ", ".join(sorted(set(names))[:5])
        notes.append(f"{len(names)} picture(s) left out: no {kind} of that name ({some})")
    if not matched:
        wanted = ", ".join(sorted(next(iter(filter(None, folders.values())), {}))[:5])
        raise UserError("; ".join(notes) + f"; there is {wanted} (--before_suffix, --after_suffix)")
    return matched, notes


def same_pictures(rows: Sequence[Result]) -> tuple[list[Result], list[str]]:
    """Rows whose names are in every column, so that means can be compared. (rows, notes)"""
    columns: dict[str, set[str]] = {}
    for row in rows:
        columns.setdefault(row.column, set()).add(row.name)
    shared = set.intersection(*columns.values())
    kept = [row for row in rows if row.name in shared]
    if not kept:
        return list(rows), ["no picture is in every column: their means are of different pictures"]
    lost = len(rows) - len(kept)
    notes = [f"{lost} picture(s) left out: their names are not in every column"] if lost else []
    return kept, notes


def find_comparisons(config: Config) -> tuple[list[Result], list[str], list[str]]:
    """What is going to be measured, notes on what is not, and everything wrong with the folders."""
    rows: list[Result] = []
    problems: list[str] = []
    finders = [find_results] * len(config.results) + [find_edited] * len(config.edited_dir)
    given = named_folders([*config.results, *config.edited_dir])
    for find, (series, folder) in zip(finders, given, strict=True):
        try:
            rows += find(config, series, folder)
        except UserError as error:
            problems.append(str(error))
    for name in ("before", "after", "mask"):
        folder, suffix = getattr(config, f"{name}_dir"), getattr(config, f"{name}_suffix", "")
        try:
            _ = folder and by_stem(folder, suffix)
        except UserError as error:
            problems.append(f"--{name}_dir: {error}")
    if problems or not rows:
        return [], [], problems
    try:
        rows, notes = match(config, shorten_series(rows))
    except UserError as error:
        return [], [], [str(error)]
    rows, more = same_pictures(rows)
    rows.sort(key=lambda row: (row.series, row.scale or 0.0, row.name, row.seed or 0))
    return rows, notes + more, []


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


def fit_photo(path: Path, size: tuple[int, int]) -> Image.Image:
    """A photo cropped around its middle and resized to (W, H) px."""
    image = open_rgb(path)
    box = cover_box(image.width / image.height, size[0] / size[1])
    return crop(image, box).resize(size, Image.Resampling.LANCZOS)


# --- 3. check -------------------------------------------------------------------------------------


def check_request(config: Config) -> list[str]:
    """Problems of the settings, without a look at the pictures."""
    problems = []
    if not config.results and not config.edited_dir:
        problems.append("nothing to compare: give --results FOLDER or --edited_dir FOLDER")
    if config.edited_dir and not (config.before_dir or config.after_dir or config.results):
        problems.append("--edited_dir needs --after_dir or --before_dir to compare with")
    if config.after_suffix and not config.after_dir:
        problems.append("--after_suffix belongs to --after_dir, which is not given")
    if not config.metrics:
        problems.append(f"metrics: none given; there are {', '.join(METRICS)}")
    for name in config.metrics:
        close = difflib.get_close_matches(name, METRICS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(METRICS)}"
        problems += [] if name in METRICS else [f"metrics: no '{name}', {hint}"]
    for flag in ("clip_model", "dino_model"):
        name = getattr(config, flag)
        if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
            problems.append(f"{flag}: no folder {name}")
    names = [name for name, _ in named_folders([*config.results, *config.edited_dir])]
    twice = sorted({name for name in names if names.count(name) > 1})
    problems += [f"two folders are called {name}; give NAME=FOLDER" for name in twice]
    return problems + check_device("device", config.device)


def check_comparison(config: Config) -> list[str]:
    """Everything that can be wrong before a network loads; every picture is read once."""
    problems = check_request(config)
    rows, _, unfound = find_comparisons(config)
    files = {path for row in rows for path in (row.edited, row.before, row.after, row.mask) if path}
    unread = []
    for path in tqdm(sorted(files), "check", unit="picture", leave=False):
        try:
            open_rgb(path)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            unread.append(f"{path} cannot be read: {error}")
    problems += unfound + ([listed(unread).strip(" -")] if unread else [])
    return problems + (check_writable(output_folder(config)) if not problems else [])


def output_folder(config: Config) -> Path:
    """The named one, or the first folder of results."""
    given = [*config.results, *config.edited_dir]
    return config.output_dir or named_folders(given)[0][1]


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


# --- 4. figures of pixels -------------------------------------------------------------------------


class Shot(NamedTuple):
    """A row with its pictures open, before and after at the size of the edited one."""

    row: Result
    images: dict[str, Image.Image]  # edited, before, after, as far as they are there
    pixels: dict[str, torch.Tensor]  # the same, (3, H, W) in 0..1
    region: torch.Tensor | None  # (H, W) bool: where the edit belongs


Figures = dict[str, float]


def open_shot(row: Result, threshold: float, device: torch.device) -> Shot:
    """Read the pictures of a row."""
    edited = open_rgb(row.edited)
    images = {"edited": edited}
    images |= {k: fit_photo(p, edited.size) for k in ("before", "after") if (p := getattr(row, k))}
    pixels = {k: unit_pixels(image).to(device) for k, image in images.items()}
    region = None
    if row.mask:
        region = unit_pixels(fit_photo(row.mask, edited.size)).to(device).mean(0) > 0.5
    elif "before" in images and "after" in images:
        region = (pixels["before"] - pixels["after"]).abs().mean(0) > threshold
    return Shot(row, images, pixels, region)


def unit_pixels(image: Image.Image) -> torch.Tensor:
    """(3, H, W) in 0..1, fp32."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def to_both(
    name: str,
    things: dict[str, torch.Tensor],
    measure: Callable[[torch.Tensor, torch.Tensor], float],
) -> Figures:
    """{name: of edited and after, name_before: of edited and before}, as far as they are there."""
    pairs = {name: "after", f"{name}_before": "before"}
    edited = things["edited"]
    return {f: measure(edited, things[kind]) for f, kind in pairs.items() if kind in things}


def signal_to_noise(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal to noise ratio of two (3, H, W) in 0..1, dB; at most 100, which is equality."""
    error = (a - b).square().mean().item()
    return -10 * math.log10(max(error, 1e-10))


def windowed(values: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Weighted mean over windows that lie inside, (..., H, W) -> (..., H - n + 1, W - n + 1)."""
    rows, columns = (values.shape[dim] - len(weights) + 1 for dim in (-2, -1))
    values = sum(w * values[..., k : k + rows, :] for k, w in enumerate(weights))  # type: ignore
    return sum(w * values[..., k : k + columns] for k, w in enumerate(weights))  # type: ignore


def ssim(a: torch.Tensor, b: torch.Tensor) -> float:
    """Structural similarity (Wang et al. 2004) of two (3, H, W) in 0..1; nan below 11 px.

    Gaussian window of sigma 1.5 px cut at 11 px, population covariances, mean over the channels:
    skimage.metrics.structural_similarity(gaussian_weights=True, sigma=1.5, data_range=1,
    use_sample_covariance=False, channel_axis=0). KEEP: in fp64, fp32 is 3e-4 off where a picture is
    flat; over windows that lie inside, torchmetrics reflects the border and is 4e-3 off.
    """
    if min(a.shape[1:]) < 11:
        return math.nan
    place = "cpu" if a.device.type == "mps" else a.device  # mps has no fp64
    a, b = a.to(place).double(), b.to(place).double()
    weights = torch.softmax(-torch.arange(-5.0, 6).double().square() / (2 * 1.5**2), 0).tolist()
    mean_a, mean_b, aa, bb, ab = (windowed(x, weights) for x in (a, b, a * a, b * b, a * b))
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * (ab - mean_a * mean_b) + c2) / (aa - mean_a**2 + bb - mean_b**2 + c2)
    return (luminance * structure).mean().item()


def masked_mean(values: torch.Tensor, where: torch.Tensor) -> float:
    """Mean of (3, H, W) over the pixels in `where` (H, W); nan if there is none."""
    return values[:, where].mean().item()


def region_figures(shot: Shot) -> Figures:
    """Squared error to the after and change from the before, inside and outside the edit region."""
    edited, before, after = (shot.pixels.get(k) for k in ("edited", "before", "after"))
    assert edited is not None
    figures = {}
    if before is not None:
        figures["change"] = (edited - before).square().mean().sqrt().item()
    if shot.region is None:
        return figures
    figures["region_share"] = shot.region.float().mean().item()
    for place, where in (("inside", shot.region), ("outside", ~shot.region)):
        if after is not None:
            figures[f"error_{place}"] = masked_mean((edited - after).square(), where)
        if before is not None:
            figures[f"change_{place}"] = masked_mean((edited - before).square(), where) ** 0.5
    return figures


def gain(edited: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> float:
    """<edited - before, after - before> / |after - before|^2; nan if after and before are equal.

    0: nothing was made, 1: the whole change (and perhaps others).
    """
    change, wanted = edited - before, after - before
    return ((change * wanted).sum() / wanted.square().sum()).item()


# --- 5. figures of networks -----------------------------------------------------------------------


def pick_device(name: str | None) -> torch.device:
    """The named one, or the fastest there is."""
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device(name) if name else here or torch.device("cpu")


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


class Skipped(Exception):
    """Why a metric cannot be computed here, and how to get it."""


def need(package: str) -> None:
    """Raises Skipped if a package is not installed, or does not load."""
    try:
        importlib.import_module(package)
    except Exception as error:  # a torchvision built for another torch raises RuntimeError
        text = str(error).splitlines()[0]
        raise Skipped(f"it needs {package} ({text}): pip install {package}") from error


def load_lpips(device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], float]:
    """LPIPS (Zhang et al. 2018) on AlexNet of two (3, H, W) in 0..1; nan below 32 px."""
    need("torchmetrics")
    need("torchvision")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        net = LearnedPerceptualImagePatchSimilarity("alex", normalize=True).to(device)
    except Exception as error:  # network, rights, disk: urllib has many classes
        from torchvision.models import AlexNet_Weights

        url, folder = AlexNet_Weights.IMAGENET1K_V1.url, Path(torch.hub.get_dir()) / "checkpoints"
        raise Skipped(f"no weights of AlexNet ({error}): put {url} into {folder}") from error

    @torch.inference_mode()
    def lpips(a: torch.Tensor, b: torch.Tensor) -> float:
        if min(a.shape[1:]) < 32:
            return math.nan
        return net(a[None], b[None]).item()

    return lpips


def load_network(kind: str, flag: str, name: str, families: str) -> tuple[Any, Any, Any]:
    """(network, image processor, CLIP's tokenizer) of transformers; nothing is left at random.

    Raises:
        Skipped: not there, no network of these families, or weights missing.
    """
    import transformers

    try:
        folder = Path(name) if Path(name).is_dir() else fetch_from_hub(name, "config.json").parent
        family = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if family not in families.split():
            raise UserError(f"it is a network of type {family}, wanted {families}")
        transformers.utils.logging.disable_progress_bar()
        processor = transformers.AutoImageProcessor.from_pretrained(name, backend="pil")
        tokenizer = None
        if kind == "CLIPModel":
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        load = getattr(transformers, kind).from_pretrained
        network, info = load(name, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"]:
            raise UserError(f"weights are missing: {sorted(info['missing_keys'])[0]}, ...")
        if tokenizer and len(tokenizer) < network.config.text_config.vocab_size // 2:
            raise UserError("the words of its tokenizer are missing")  # transformers makes it empty
    except Exception as error:  # the libraries have many classes
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Skipped(f"{text} ({name}; a folder goes with --{flag})") from error
    return network.eval(), processor, tokenizer


class Clip:
    """CLIP (Radford et al. 2021): unit vectors of pictures and texts."""

    def __init__(self, name: str, device: torch.device) -> None:
        network, self.processor, self.tokenizer = load_network(
            "CLIPModel", "clip_model", name, "clip"
        )
        self.network, self.device = network.to(device), device
        self.scale = network.logit_scale.exp().item()  # logits are this times the cosine

    @torch.inference_mode()
    def embed(
        self, images: Sequence[Image.Image], texts: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(pictures, D), (texts, D); texts are cut where CLIP ends (77 tokens)."""
        length = self.network.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        pixels = self.processor(list(images), return_tensors="pt")
        out = self.network(**tokens.to(self.device), **pixels.to(self.device))
        return out.image_embeds, out.text_embeds


class Dino:
    """DINOv2 (Oquab et al. 2023): the class token's unit vector."""

    def __init__(self, name: str, device: torch.device) -> None:
        families = "dinov2 dinov2_with_registers dinov3_vit vit"
        network, self.processor, _ = load_network("AutoModel", "dino_model", name, families)
        self.network, self.device = network.to(device), device

    @torch.inference_mode()
    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(pictures, D)."""
        pixels = self.processor(list(images), return_tensors="pt")
        tokens = self.network(**pixels.to(self.device)).last_hidden_state  # (N, 1 + patches, D)
        return F.normalize(tokens[:, 0], dim=-1)


def by_shot(shots: Sequence[Shot], vectors: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Rows of (all pictures of all shots, D) -> per shot {edited, before, after: (D,)}."""
    rest = iter(vectors.cpu().double())
    return [{kind: next(rest) for kind in shot.images} for shot in shots]


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two unit vectors."""
    return (a @ b).item()


def direction(
    edited: torch.Tensor, before: torch.Tensor, after: torch.Tensor, least: float = 1e-4
) -> float:
    """cos(E(edited) - E(before), E(after) - E(before)) of unit vectors (Gal et al. 2021).

    nan if a difference is only rounding.
    """
    made, wanted = edited - before, after - before
    if min(made.norm(), wanted.norm()) < least:
        return math.nan
    return F.cosine_similarity(made, wanted, dim=0).item()


def clip_figures(shots: Sequence[Shot], clip: Clip) -> list[Figures]:
    """clip_image, clip_text and clip_direction."""
    images = [image for shot in shots for image in shot.images.values()]
    vectors, texts = clip.embed(images, [shot.row.prompt or "" for shot in shots])
    rows = []
    pairs = zip(shots, by_shot(shots, vectors), texts.cpu().double(), strict=True)
    for shot, found, text in pairs:
        row = to_both("clip_image", found, cosine)
        if shot.row.prompt and "before" in found:
            row["clip_text"] = clip.scale * (text @ (found["edited"] - found["before"])).item()
        if len(found) == 3:
            row["clip_direction"] = direction(found["edited"], found["before"], found["after"])
        rows.append(row)
    return rows


def dino_figures(shots: Sequence[Shot], dino: Dino) -> list[Figures]:
    """Cosines of DINO."""
    vectors = dino.embed([image for shot in shots for image in shot.images.values()])
    return [to_both("dino", found, cosine) for found in by_shot(shots, vectors)]


# --- 6. measure -----------------------------------------------------------------------------------

Measure = Callable[[Sequence[Shot]], list[Figures]]


def load_measure(tool: str, config: Config, device: torch.device) -> Measure:
    """A function from shots to the figures of a metric (clip: of its three). Raises Skipped."""
    if tool == "clip":
        return functools.partial(clip_figures, clip=Clip(config.clip_model, device))
    if tool == "dino":
        return functools.partial(dino_figures, dino=Dino(config.dino_model, device))
    if tool == "region":
        return lambda shots: [region_figures(shot) for shot in shots]
    if tool == "gain":
        kinds = ("edited", "before", "after")
        return lambda shots: [
            {"gain": gain(*(s.pixels[k] for k in kinds))} if len(s.images) == 3 else {}
            for s in shots
        ]
    pair = load_lpips(device) if tool == "lpips" else {"psnr": signal_to_noise, "ssim": ssim}[tool]
    return lambda shots: [to_both(tool, shot.pixels, pair) for shot in shots]


def load_measures(
    config: Config, rows: Sequence[Result], device: torch.device
) -> tuple[list[Measure], dict[str, str]]:
    """What can be measured, and for every metric that cannot, why. A line is printed for each."""
    skipped = {name: "not asked for (--metrics)" for name in METRICS if name not in config.metrics}
    tools: dict[str, list[str]] = {}
    for name in config.metrics:
        if any(wanted <= row.given for row in rows for wanted in INPUTS[name]):
            tools.setdefault(name.split("_")[0], []).append(name)
            continue
        wanted = " or ".join(" and ".join(sorted(inputs)) for inputs in INPUTS[name])
        skipped[name] = f"no picture has {wanted} (--before_dir, --after_dir, --prompt)"
        print(f"skipped {name}: {skipped[name]}")
    measures = []
    for tool, names in tools.items():
        try:
            measures.append(load_measure(tool, config, device))
        except Skipped as error:
            skipped |= dict.fromkeys(names, str(error))
            print(f"skipped {', '.join(names)}: {error}")
    return measures, skipped


def measure_rows(
    config: Config, rows: Sequence[Result], measures: Sequence[Measure], device: torch.device
) -> list[Figures]:
    """The figures of every row that were asked for; what is undefined is left out."""
    found: list[Figures] = []
    with tqdm(total=len(rows), desc="evaluate", unit="picture") as bar:
        for start in range(0, len(rows), config.batch_size):
            part = rows[start : start + config.batch_size]
            shots = [open_shot(row, config.region_threshold, device) for row in part]
            merged: list[Figures] = [{} for _ in part]
            for measure in measures:
                for row, figures in zip(merged, measure(shots), strict=True):
                    row |= figures
            found += merged
            bar.update(len(part))
    wanted = [name for name, figure in FIGURES.items() if figure.metric in config.metrics]
    return [{k: row[k] for k in wanted if math.isfinite(row.get(k, math.nan))} for row in found]


# --- 7. means, ranking, curve ---------------------------------------------------------------------


def means_by_column(
    rows: Sequence[Result], figures: Sequence[Figures]
) -> dict[str, dict[str, Any]]:
    """{column: {series, scale, pictures, means}}, in the order of the rows."""
    columns: dict[str, dict[str, Any]] = {}
    for row, own in zip(rows, figures, strict=True):
        start: dict[str, Any] = {
            "series": row.series,
            "scale": row.scale,
            "pictures": 0,
            "means": {},
        }
        column = columns.setdefault(row.column, start)
        column["pictures"] += 1
        for name, value in own.items():
            column["means"].setdefault(name, []).append(value)
    for column in columns.values():
        column["means"] = {k: float(np.mean(v)) for k, v in column["means"].items()}
    return columns


def first_shared(names: Iterable[str], means: Sequence[dict[str, float]]) -> str | None:
    """The first figure that all of some columns have; None without columns."""
    return next((n for n in names if means and all(n in mean for mean in means)), None)


def rank(columns: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Columns, best first, by the first figure of RANKED_BY that all of them have."""
    name = first_shared(RANKED_BY, [column["means"] for column in columns.values()])
    if not name:
        why = f"all columns need one of {', '.join(RANKED_BY)}"
        return {"by": None, "columns": list(columns), "why": why}
    better = FIGURES[name].better
    order = sorted(columns, key=lambda column: -better * columns[column]["means"][name])
    return {"by": name, "columns": order}


def content_cost(name: str, value: float) -> float:
    """Change of what should stay, 0 for none: a distance as it is, a cosine as 1 - cosine."""
    return 1 - value if name == "dino_before" else value


def curve(columns: dict[str, dict[str, Any]], strengths: Sequence[float] | None) -> dict[str, Any]:
    """Edit strength against content change over scales, and the change at matched strengths.

    Figures of strength and content: the first that all scales have. At scale 0 nothing may have
    changed: what is then undefined (clip_direction) is 0.
    """
    scaled = [column for column in columns.values() if column["scale"] is not None]
    strength = first_shared(STRENGTHS, [c["means"] for c in scaled if c["scale"] != 0])
    content = first_shared(CONTENTS, [c["means"] for c in scaled])
    if not (strength and content):
        lacking = CONTENTS if strength else STRENGTHS
        return {"why": f"all scales need one of {', '.join(lacking)}"}
    series: dict[str, list[dict[str, float]]] = {}
    for column in scaled:
        point = {"scale": column["scale"], "strength": column["means"].get(strength, 0.0)}
        point["content"] = content_cost(content, column["means"][content])
        series.setdefault(column["series"], []).append(point)
    forward = {name: [p for p in ps if p["scale"] >= 0] or ps for name, ps in series.items()}
    reach = min(max(point["strength"] for point in points) for points in forward.values())
    wanted = strengths or [min(1.0, reach) if strength == "gain" else reach]
    matched = [
        {"strength": s, "content": {name: at_strength(p, s) for name, p in forward.items()}}
        for s in wanted
    ]
    return {"strength": strength, "content": content, "series": series, "matched": matched}


def at_strength(points: Sequence[dict[str, float]], strength: float) -> float | None:
    """Content change where a curve, straight between its scales, first has this strength."""
    for a, b in zip(points, points[1:] or points, strict=False):
        low, high = a["strength"], b["strength"]
        if min(low, high) <= strength <= max(low, high):
            share = (strength - low) / (high - low) if high != low else 0.0
            return a["content"] + share * (b["content"] - a["content"])
    return None


# --- 8. report ------------------------------------------------------------------------------------


def table(columns: dict[str, dict[str, Any]], ranking: dict[str, Any]) -> str:
    """Means as text, best column first."""
    there = {name for column in columns.values() for name in column["means"]}
    instead = {"gain": "change"}
    names = [n if n in there else instead.get(n, f"{n}_before") for n in SHOWN]
    names = [name for name in names if name in there]
    lines = [["", "pictures", *names]]
    for title in ranking["columns"]:
        means = columns[title]["means"]
        cells = [f"{means[name]:.4g}" if name in means else "-" for name in names]
        lines.append([title, str(columns[title]["pictures"]), *cells])
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0])]
            + [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]
        )
        for line in lines
    )


def record(row: Result, figures: Figures) -> dict[str, Any]:
    """A row for CSV and JSON: what it is, its files, its figures."""
    about = {k: str(v) if isinstance(v, Path) else v for k, v in row._asdict().items()}
    return {"column": row.column, **about, "figures": figures}


def write_csv(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """A line per picture; what is undefined is empty."""
    flat = [{k: v for k, v in row.items() if k != "figures"} | row["figures"] for row in records]
    there = [name for name in FIGURES if any(name in row for row in flat)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["column", *Result._fields, *there])
        writer.writeheader()
        writer.writerows(flat)


def comparison_rows(
    rows: Sequence[Result], figures: Sequence[Figures], shown: str | None
) -> list[PageRow]:
    """A view per picture, seed and prompt: before, every column, after; the figure `shown`."""
    by_name: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        by_name.setdefault(row.name, []).append(number)
    found = []
    for name, numbers in by_name.items():
        drawn = [rows[n] for n in numbers if rows[n].seed is not None]
        views = dict.fromkeys((row.seed, row.prompt) for row in drawn)
        for view in views or [(None, None)]:  # what has no seed stands beside each of them
            there = [n for n in numbers if rows[n].seed is None or rows[n].strip[2:] == view]
            first = rows[there[0]]
            columns = {"before": first.before} if first.before else {}
            columns |= {rows[n].column: rows[n].edited for n in there}
            columns |= {"after": first.after} if first.after else {}
            told = {f"{shown}, {rows[n].column}": figures[n].get(shown or "") for n in there}
            known = {label: value for label, value in told.items() if value is not None}
            found.append(PageRow(name, columns, view[1] or first.prompt or "", view[0], known))
    return found


def draw_curve(axes: Any, found: dict[str, Any]) -> None:
    """Content change over edit strength, a line per series, its scales written on it."""
    for name, points in found["series"].items():
        x, y = ([point[k] for point in points] for k in ("strength", "content"))
        axes.plot(x, y, "o-", label=name or None)
        for point in points:
            at = point["strength"], point["content"]
            axes.annotate(f"{point['scale']:g}", at, (4, 4), textcoords="offset points", fontsize=8)
    for line in found["matched"]:
        axes.axvline(line["strength"], color="gray", linestyle=":", linewidth=1)
    axes.set_xlabel(f"edit strength ({found['strength']})")
    axes.set_ylabel(
        f"content change ({found['content'].replace('dino_before', '1 - dino_before')})"
    )
    axes.set_ylim(bottom=0)
    axes.set_title("what the edit costs (points: scales)", fontsize=10)
    if any(found["series"]):
        axes.legend(fontsize=8)


def draw_bars(axes: Any, name: str, columns: dict[str, dict[str, Any]], order: list[str]) -> None:
    """The mean of one figure, a bar per column."""
    values = [columns[title]["means"].get(name, math.nan) for title in order]
    bars = axes.barh(range(len(order)), values)
    axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
    axes.set_yticks(range(len(order)), order, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    arrow = {1: " (more is better)", -1: " (less is better)", 0: ""}[FIGURES[name].better]
    axes.set_title(name + arrow, fontsize=10)


def draw_report(path: Path, columns: dict[str, dict[str, Any]], report: dict[str, Any]) -> None:
    """PNG: the curve, if there is one, and four means as bars."""
    from matplotlib.figure import Figure as Canvas  # no window: savefig draws with Agg

    given = {name for column in columns.values() for name in column["means"]}
    names = [name for name in dict.fromkeys((*SHOWN, *FIGURES)) if name in given]
    a, b, c, d = [*names, ".", ".", ".", "."][:4]  # "." leaves a place empty
    left = ["curve"] if "series" in report["curve"] else []
    height = max(5.0, 2 + 0.5 * len(columns))
    canvas = Canvas(figsize=(8 + 5 * len(left), height), layout="constrained")
    panels = canvas.subplot_mosaic([[*left, a, b], [*left, c, d]])
    for name, axes in panels.items():
        if name == "curve":
            draw_curve(axes, report["curve"])
        else:
            draw_bars(axes, name, columns, report["ranking"]["columns"])
    canvas.savefig(path, format="png", dpi=120)


def print_summary(report: dict[str, Any]) -> None:
    """The means, what they are ranked by, what the edit costs."""
    ranking, found = report["ranking"], report["curve"]
    print(f"\n{table(report['columns'], ranking)}")
    if ranking["by"]:
        print(f"best first, by {ranking['by']}: {FIGURES[ranking['by']].text}")
    if "why" in found and any(column["scale"] is not None for column in report["columns"].values()):
        print(f"no curve: {found['why']}")
    for point in found.get("matched", []):
        cells = [f"{n or 'all'} {v:.4g}" for n, v in point["content"].items() if v is not None]
        print(
            f"content change ({found['content']}) at strength {point['strength']:.3g}"
            f" ({found['strength']}): {', '.join(cells) or 'not reached'}"
        )


def evaluate(config: Config) -> None:
    """Measure everything, write evaluation.csv, .json and .png, print the means."""
    rows, notes, _ = find_comparisons(config)
    device = pick_device(config.device)
    for note in notes:
        print(note)
    measures, skipped = load_measures(config, rows, device)
    figures = measure_rows(config, rows, measures, device)
    columns = means_by_column(rows, figures)
    there = {FIGURES[name].metric for own in figures for name in own}
    undefined = [name for name in config.metrics if name not in {*there, *skipped}]
    skipped |= dict.fromkeys(undefined, "undefined for all pictures: too small, or nothing changed")
    records = [record(row, own) for row, own in zip(rows, figures, strict=True)]
    report: dict[str, Any] = {
        "settings": config.model_dump(mode="json"),
        "figures": {name: figure._asdict() for name, figure in FIGURES.items()},
        "columns": columns,
        "ranking": rank(columns),
        "curve": curve(columns, config.strengths),
        "skipped": skipped,
        "notes": notes,
        "rows": records,
    }
    folder = output_folder(config)
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    save_atomic(folder / "evaluation.json", lambda f: f.write_text(text, encoding="utf-8"))
    save_atomic(folder / "evaluation.csv", lambda f: write_csv(f, records))
    save_atomic(folder / "evaluation.png", lambda f: draw_report(f, columns, report))
    if config.html:
        views = comparison_rows(rows, figures, report["ranking"]["by"])
        write_page(folder / "evaluation.html", folder.resolve().name, views)
    print_summary(report)
    ends = ".csv, .png, .html" if config.html else ".csv, .png"
    print(f"results: {folder / 'evaluation.json'} ({ends})")


# --- 9. main --------------------------------------------------------------------------------------


def main() -> None:
    """Settings -> check -> figures."""
    evaluate(load_config(Config, check=check_comparison))


if __name__ == "__main__":
    run_script(main)
