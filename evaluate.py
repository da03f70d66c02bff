"""Figures over results: how near they are to the true after, how strong the edit is, what it costs.

Page: docs/evaluate.md

    python evaluate.py --results out --after_dir pairs/after    # what generate.py wrote
    ... --results base=out_a --results lora=out_b               # two folders, side by side
    ... --before_dir pairs --before_suffix _R --after_dir pairs --after_suffix _T
    python evaluate.py --before_dir a --after_dir b --edited_dir base=c --edited_dir lora=d
    ... --metrics psnr,ssim,region,gain                         # these need no network
    ... --html                                  # and a page with a divider over the pictures

Writes evaluation.csv (a row per picture), evaluation.json (means, ranking, curve, what was
skipped and why) and evaluation.png. A column is what is compared: a scale, or a folder.
A metric whose package or weights are not at hand is skipped and says so.

Shapes: H W pixels of one picture, (3, H, W) in 0..1, fp32; D numbers of an embedding.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from pydantic import Field, field_validator

import utils
from utils import Section, UserError, load_config, load_tool, nearest, open_rgb, progress

SETTINGS_KEY = "image_edit"  # PNG text chunk
hash_of = functools.cache(utils.hash_file)  # many results have one reference


# --- 1. metrics -----------------------------------------------------------------------------------


def squared_error(a: torch.Tensor, b: torch.Tensor, where: Any = slice(None)) -> Any:
    """Return the mean squared error over the pixels in `where` (H, W); nan if there is none."""
    return (a - b).square()[:, where].mean()


def change(a: torch.Tensor, b: torch.Tensor, where: Any = slice(None)) -> Any:
    """Return the root of the mean squared error."""
    return squared_error(a, b, where).sqrt()


def share(where: torch.Tensor) -> Any:
    """Return the share of the pixels that are in `where` (H, W), 0..1."""
    return where.float().mean()


def psnr(a: torch.Tensor, b: torch.Tensor) -> Any:
    """Return the peak signal-to-noise ratio, dB; at most 100, which is equality."""
    return -10 * squared_error(a, b).clamp_min(1e-10).log10()


def ssim(a: torch.Tensor, b: torch.Tensor) -> Any:
    """Return the structural similarity (Wang et al. 2004), mean over channels; nan below 11 px.

    Gaussian window of sigma 1.5 px cut at 11 px, population covariances, over windows that lie
    inside. KEEP: in fp64, fp32 is 3e-4 off where a picture is flat.
    """
    if min(a.shape[1:]) < 11:
        return math.nan
    place = "cpu" if a.device.type == "mps" else a.device  # mps has no fp64
    a, b = (x[:, None].to(place).double() for x in (a, b))
    window = torch.softmax(-torch.arange(-5.0, 6).to(a).square() / (2 * 1.5**2), 0)
    maps = torch.cat([a, b, a * a, b * b, a * b])
    maps = F.conv2d(F.conv2d(maps, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    mean_a, mean_b, aa, bb, ab = maps.chunk(5)
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * (ab - mean_a * mean_b) + c2) / (aa - mean_a**2 + bb - mean_b**2 + c2)
    return (luminance * structure).mean()


def gain(edited: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> Any:
    """Return <edited - before, after - before> / |after - before|^2; nan if after equals before.

    0: nothing was made, 1: the whole change (and perhaps others).
    """
    made, wanted = edited - before, after - before
    return (made * wanted).sum() / wanted.square().sum()


def logit_gain(prompt: torch.Tensor, edited: torch.Tensor, before: torch.Tensor) -> Any:
    """Return CLIP's logit to the prompt (whose vector holds the scale), edited minus before."""
    return prompt @ (edited - before)


def direction(edited: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> Any:
    """Return cos(edited - before, after - before) (Gal et al. 2021); nan if one is rounding."""
    made, wanted = edited - before, after - before
    least = min(made.norm(), wanted.norm())
    return F.cosine_similarity(made, wanted, dim=0) if least >= 1e-4 else math.nan


class Metric(NamedTuple):
    """One figure of a picture: all that is to be known of it."""

    measure: Callable[..., Any]  # its number; nan: undefined
    needs: str  # what `measure` is called with
    better: int  # 1: higher, -1: lower, 0: neither
    unit: str
    group: str = ""  # what --metrics calls it, if not by its name
    shown: bool = True  # printed; all are in the CSV and JSON


# EDIT HERE: one entry is all that a metric takes. It may need edited, before, after, (3, H, W);
# region and outside, (H, W) bool; what NETWORKS say, e.g. clip.edited, clip.prompt
METRICS = {
    "psnr": Metric(psnr, "edited after", 1, "dB to the after, 100 if equal"),
    "psnr_before": Metric(psnr, "edited before", 0, "dB, to the before", "psnr", shown=False),
    "ssim": Metric(ssim, "edited after", 1, "to the after, 1 if equal"),
    "ssim_before": Metric(ssim, "edited before", 0, "to the before", "ssim", shown=False),
    "error_inside": Metric(
        squared_error, "edited after region", -1, "squared error in the edit region", "region"
    ),
    "error_outside": Metric(
        squared_error, "edited after outside", -1, "squared error outside of it", "region"
    ),
    "region_share": Metric(share, "region", 0, "share of the pixels in it", "region", shown=False),
    "change": Metric(change, "edited before", 0, "root mean square change", "region"),
    "change_inside": Metric(
        change, "edited before region", 0, "the same in the edit region", "region", shown=False
    ),
    "change_outside": Metric(
        change, "edited before outside", -1, "the same outside of it", "region", shown=False
    ),
    "gain": Metric(gain, "edited before after", 0, "share of the true change that was made"),
    "lpips": Metric(float, "lpips.after", -1, "to the after, 0 if equal"),
    "lpips_before": Metric(float, "lpips.before", 0, "to the before", "lpips", shown=False),
    "clip_image": Metric(torch.dot, "clip.edited clip.after", 1, "cosine of CLIP embeddings"),
    "clip_image_before": Metric(
        torch.dot, "clip.edited clip.before", 0, "to the before", "clip_image", shown=False
    ),
    "clip_text": Metric(
        logit_gain, "clip.prompt clip.edited clip.before", 1, "logit to the prompt, minus before's"
    ),
    "clip_direction": Metric(
        direction, "clip.edited clip.before clip.after", 1, "cosine of made and true change"
    ),
    "dino": Metric(torch.dot, "dino.edited dino.after", 1, "cosine of DINO embeddings"),
    "dino_before": Metric(
        torch.dot, "dino.edited dino.before", 0, "to the before", "dino", shown=False
    ),
}
# The first that all columns have; where there is none, any other that is shown ranks, too
RANKED_BY = (
    *("error_inside", "psnr", "ssim", "lpips"),
    *("clip_direction", "clip_image", "dino", "clip_text"),
)
STRENGTHS = ("gain", "clip_direction", "clip_text", "change")
CONTENTS = ("lpips_before", "change_outside", "dino_before")


def option_of(name: str) -> str:
    """Return what --metrics calls a figure."""
    return METRICS[name].group or name


# --- 2. settings, pictures: find, match, open -----------------------------------------------------


class Config(Section):
    """evaluate.py: figures over a folder of results."""

    results: list[str] = []
    """Folder that generate.py wrote, or NAME=FOLDER; repeat the flag for several."""
    edited_dir: list[str] = []
    """Folder of edited pictures named like the afters, or NAME=FOLDER; repeat for several."""
    before_dir: Path | None = None
    """Folder of pictures before the edit; null: a result's reference, else its scale 0."""
    after_dir: Path | None = None
    """Folder of the true afters, named like the results."""
    mask_dir: Path | None = None
    """Folder of edit regions (white), by name; null: where before and after differ."""
    before_suffix: str = ""
    """End of the file names in before_dir, e.g. _R; results may have it, too."""
    after_suffix: str = ""
    """End of the file names in after_dir, e.g. _T."""
    prompt: str | None = None
    """Prompt for the metric clip_text; null: that of the result, else the .txt beside the after."""
    metrics: list[str] = Field(list(dict.fromkeys(map(option_of, METRICS))), min_length=1)
    """Metrics to compute, e.g. psnr,ssim,region,gain, which need no network."""
    region_threshold: float = Field(0.1, ge=0, lt=1)
    """Edit region: before and after differ by more than this (0..1, mean over the channels)."""
    strengths: list[float] | None = None
    """Edit strengths at which content is compared; null: 1 (gain), or the largest all reach."""
    clip_model: str = "openai/clip-vit-base-patch32"
    """Network of the metric: a folder, or a Hub id."""
    dino_model: str = "facebook/dinov2-small"
    """Network of the metric: a folder, or a Hub id."""
    batch_size: int = Field(8, ge=1, le=4096)
    """Results that are embedded at once, by CLIP or DINO."""
    html: bool = False
    """Also write evaluation.html: before, every column, after, with a divider to drag."""
    device: str | None = None
    """Device: cuda, cpu, mps ...; null: the fastest there is."""
    output_dir: Path | None = None
    """Folder of evaluation.*; null: the first folder of results."""

    @field_validator("metrics", "strengths", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """Split "a,b" into ["a", "b"], alone or in a list."""
        texts = value if isinstance(value, list) else [value]
        return value and ",".join(map(str, texts)).split(",")

    def rules(self) -> dict[str, Any]:
        """Return {problem: whether it is there}."""
        folders, options = [*self.results, *self.edited_dir], [*map(option_of, METRICS)]
        names = [name for name, _ in named_folders(folders)]
        compared = self.results or self.before_dir or self.after_dir
        return {
            "nothing to compare: give --results or --edited_dir": not folders,
            "--edited_dir needs --after_dir or --before_dir": not compared,
            "--after_suffix belongs to --after_dir": self.after_suffix and not self.after_dir,
            **{f"metrics: no '{m}'{nearest(m, options)}": m not in options for m in self.metrics},
            **{f"two folders are called {n}; give NAME=FOLDER": names.count(n) > 1 for n in names},
            f"clip_model: no folder {self.clip_model}": not is_model(self.clip_model),
            f"dino_model: no folder {self.dino_model}": not is_model(self.dino_model),
        }


def is_model(name: str) -> bool:
    """Return whether a name is a folder that is there, or may be a Hub id."""
    return Path(name).is_dir() or (name.count("/") == 1 and name[0] not in "./~")


class Result(NamedTuple):
    """An edited picture, the files it is compared with, and its figures."""

    series: str  # model, run or folder; "" if there is one
    scale: float | None
    name: str
    seed: int | None
    prompt: str | None
    edited: Path
    before: Path | None = None
    after: Path | None = None
    mask: Path | None = None
    figures: dict[str, float] = {}

    @property
    def column(self) -> str:
        """Return what it is an example of."""
        scale = "" if self.scale is None else f"scale {self.scale:g}"
        return f"{self.series} {scale}".strip() or "edited"

    @property
    def strip(self) -> tuple[Any, ...]:
        """Return what it shares with its picture at scale 0."""
        return self.series, self.edited.parent, self.name, self.seed, self.prompt


def read_settings(path: Path) -> dict[str, Any]:
    """Return what a finished picture says about itself; {} if there is none, or from elsewhere."""
    with contextlib.suppress(Exception), utils.open_regular(path) as file:
        info = Image.open(file, formats=utils.FORMATS).info
        return dict(json.loads(info.get(SETTINGS_KEY) or info.get("comment", "{}")))
    return {}


def reference_of(about: dict[str, Any]) -> Path | None:
    """Return the first reference of an edit, if it is still the file that was edited."""
    for image in about.get("images", [])[:1]:
        file = Path(image["file"])
        if file.is_file() and hash_of(file) == image["blake2b"]:
            return file
    return None


def by_stem(folder: Path, suffix: str = "") -> dict[str, Path]:
    """Return {relative stem without the suffix: picture} of names that end with it.

    Raises UserError: there is none, or two pictures have one name.
    """
    found = {
        stem.removesuffix(suffix): files
        for stem, files in utils.list_images(folder).items()
        if stem.endswith(suffix)
    }
    if not found:
        what = f"picture whose name ends with '{suffix}'" if folder.is_dir() else "such folder"
        raise UserError(f"{folder}: no {what}")
    if twice := [stem for stem, files in found.items() if len(files) > 1]:
        raise UserError(f"{folder}: several pictures are called {', '.join(twice[:5])}")
    return {stem: files[0] for stem, files in found.items()}


def named_folders(texts: list[str]) -> list[tuple[str, Path]]:
    """Read NAME=FOLDER or FOLDER as (name, folder); of several it is the folder's own name."""
    found = []
    for text in texts:
        name, _, path = ("", "", text) if Path(text).is_dir() else text.rpartition("=")
        if not path:
            raise UserError(f"'{text}' names no folder")
        found.append((name or (Path(path).name if len(texts) > 1 else ""), Path(path)))
    return found


def find_results(config: Config, series: str, folder: Path, edited: bool) -> list[Result]:
    """Return pictures that generate.py wrote, by what stands in them, or with `edited` all.

    Several runs are several series. Raises UserError.
    """
    rows = []
    for stem, path in by_stem(folder).items():
        about: Any = {"name": stem} if edited else read_settings(path)
        if "name" not in about or stem.startswith("evaluation"):
            continue  # a sheet, from elsewhere, or our own
        with utils.named(f"{path}: its settings are not as generate.py writes them"):
            name = unicodedata.normalize("NFC", about["name"]).removesuffix(config.before_suffix)
            name = name.removesuffix(config.after_suffix)
            run, scale, seed, prompt = map(about.get, ("run", "scale", "seed", "prompt"))
            if not math.isfinite(float(scale or 0)) or not isinstance(prompt, str | None):
                raise ValueError(f"scale {scale}, prompt {prompt!r}")
            row = Result(run or "", scale, name, seed, config.prompt or prompt, path)
            rows.append(row._replace(before=reference_of(about)))
    if not rows:
        raise UserError(f"{folder}: nothing of generate.py (else: --edited_dir)")
    if len({row.series for row in rows}) == 1:
        return [row._replace(series=series) for row in rows]
    return [row._replace(series=f"{series} {row.series}".strip()) for row in rows]


def match(rows: list[Result], folders: dict[str, Any], notes: list[str]) -> list[Result]:
    """Give rows their before, after, mask and prompt; leave out, and note, those without."""
    base = {row.strip: row.edited for row in rows if row.scale == 0}
    references = {row.name: row.before for row in rows if row.before}
    befores = [row.before or references.get(row.name) or base.get(row.strip) for row in rows]
    rows = [row._replace(before=before) for row, before in zip(rows, befores, strict=True)]
    for kind, files in folders.items():
        if lost := [row.name for row in rows if row.name not in files]:
            some = ", ".join(sorted({*lost})[:5]) + ")" + nearest(lost[0], files)
            notes.append(f"{len(lost)} picture(s) left out: no {kind} of that name ({some}")
        rows = [row._replace(**{kind: files[row.name]}) for row in rows if row.name in files]
    return [row._replace(prompt=row.prompt or caption_of(row.after)) for row in rows]


def caption_of(picture: Path | None) -> str | None:
    """Return the text of the .txt beside a picture."""
    file = picture and picture.with_suffix(".txt")
    try:
        return file.read_text(encoding="utf-8-sig").strip() if file and file.is_file() else None
    except ValueError as error:
        raise UserError(f"{file} is no text in UTF-8: {error}") from error


def same_pictures(rows: list[Result], notes: list[str]) -> list[Result]:
    """Return rows whose names are in every column, so that means can be compared."""
    names: dict[str, set[str]] = {}
    for row in rows:
        names.setdefault(row.column, set()).add(row.name)
    if not (shared := set.intersection(*names.values())):
        notes.append("no picture is in every column: means are of different ones")
        return rows
    kept = [row for row in rows if row.name in shared]
    if lost := len(rows) - len(kept):
        notes.append(f"{lost} picture(s) left out: their names are not in every column")
    return kept


def find_comparisons(config: Config) -> tuple[list[Result], list[str], list[str]]:
    """Return (what is measured, notes on what is not, every problem of the folders)."""
    rows: list[Result] = []
    folders: dict[str, dict[str, Path]] = {}
    notes: list[str] = []
    problems: list[str] = []
    for number, named in enumerate(named_folders([*config.results, *config.edited_dir])):
        try:
            rows += find_results(config, *named, edited=number >= len(config.results))
        except UserError as error:
            problems.append(str(error))
    for kind, place, suffix in (
        ("before", config.before_dir, config.before_suffix),
        ("after", config.after_dir, config.after_suffix),
        ("mask", config.mask_dir, ""),
    ):
        try:
            if place:
                folders[kind] = by_stem(place, suffix)
        except UserError as error:
            problems.append(f"--{kind}_dir: {error}")
    if problems:
        return [], [], problems
    rows = match(rows, folders, notes)
    if not rows:
        some = ", ".join(sorted(next(iter(folders.values())))[:5])
        problems = [*notes, f"there is {some} (--before_suffix, --after_suffix)"]
        return [], [], ["; ".join(problems)]
    rows = same_pictures(rows, notes)
    rows.sort(key=lambda row: (row.series, row.scale or 0.0, row.name, row.seed or 0))
    return rows, notes, []


def check_comparison(config: Config) -> list[str]:
    """Return everything that is wrong; every picture is read once."""
    rows, _, problems = find_comparisons(config)
    files = {path for row in rows for path in (row.edited, row.before, row.after, row.mask) if path}
    index = utils.FileIndex(None)
    problems += index.update(sorted(files), utils.look_at_picture)
    problems += [] if problems else utils.from_tool("check", "check_shapes", [], rows, index)
    if config.html:
        load_tool("page")  # raises UserError where it was not copied along
    if problems:
        return problems + utils.check_setup(devices={"device": config.device})
    folder = output_folder(config)
    there = [f for f in folder.glob("evaluation.*") if f.suffix in (".csv", ".png", ".html")]
    with contextlib.suppress(OSError, ValueError):
        ours = '"columns"' in utils.read_text(folder / "evaluation.json", 2**30)
        there = [] if ours else [folder / "evaluation.json"]
    if there:
        problems = [f"{there[0]} is not of evaluate.py; name another output_dir"]
    return problems + utils.check_setup(
        devices={"device": config.device}, writes={"results": folder}
    )


def output_folder(config: Config) -> Path:
    """Return the named folder, or the first folder of results."""
    return config.output_dir or named_folders([*config.results, *config.edited_dir])[0][1]


def open_images(row: Result) -> Images:
    """Open {edited, before, after, mask}, cropped and resized to the edited one."""
    edited = open_rgb(row.edited)
    files = {"before": row.before, "after": row.after, "mask": row.mask}
    others = {
        kind: ImageOps.fit(open_rgb(path), edited.size, Image.Resampling.LANCZOS)
        for kind, path in files.items()
        if path
    }
    return {"edited": edited, **others}


def to_tensor(image: Image.Image, device: torch.device) -> torch.Tensor:
    """Return a picture as (3, H, W) in 0..1, fp32."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(device).float() / 255


# --- 3. measure -----------------------------------------------------------------------------------

Images = dict[str, Image.Image]  # edited, before, after, mask of a picture
Prompts = list[str | None]
Network = Callable[[list[Images], Prompts], list[dict[str, Any]]]
ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"


def load_lpips(config: Config, device: torch.device) -> Network:
    """Load LPIPS (Zhang et al. 2018) on AlexNet, nan below 32 px. Raises UserError."""
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        net = LearnedPerceptualImagePatchSimilarity("alex", normalize=True).to(device)
    except Exception as error:  # the libraries have many classes
        place = Path(torch.hub.get_dir()) / "checkpoints"
        text = f"it needs torchvision (pip install torchvision) and {ALEXNET} in {place}"
        raise UserError(f"{text}: {str(error).splitlines()[0]}") from error

    @torch.inference_mode()
    def measure(pictures: list[Images], prompts: Prompts) -> list[dict[str, Any]]:
        found = []
        for images in pictures:
            pixels = {kind: to_tensor(image, device)[None] for kind, image in images.items()}
            large = min(images["edited"].size) >= 32
            found.append({k: net(pixels["edited"], p) for k, p in pixels.items() if large})
        return found

    return measure


def load_embedder(
    flag: str, kind: tuple[str, ...], config: Config, device: torch.device
) -> Network:
    """Return an embedder: unit vectors (D,) of images; CLIP's prompts too, times its logit scale.

    Raises UserError: no such network, or a part of it is missing.
    """
    import transformers

    name, tokenizer = getattr(config, flag), None
    try:
        file = utils.fetch_checkpoint(name, "config.json") / "config.json"
        family = json.loads(file.read_text(encoding="utf-8")).get("model_type", "")
        if not family.startswith(kind):
            raise UserError(f"it is a network of type {family}")
        transformers.utils.logging.disable_progress_bar()
        how: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
        network, info = transformers.AutoModel.from_pretrained(name, **how)
        processor = transformers.AutoImageProcessor.from_pretrained(name, backend="pil")
        if info["missing_keys"]:
            raise UserError(f"weights are missing: {sorted(info['missing_keys'])[0]}, ...")
        if family == "clip":
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            if len(tokenizer) < network.config.text_config.vocab_size // 2:
                raise UserError("the words of its tokenizer are missing")  # it would be made empty
    except Exception as error:  # the libraries have many classes
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{text} ({name}; a folder goes with --{flag})") from error
    network.to(device).eval()

    @torch.inference_mode()
    def embed(pictures: list[Images], prompts: Prompts) -> list[dict[str, Any]]:
        images = [image for its in pictures for image in its.values()]
        inputs = processor(images, return_tensors="pt")
        says: list[dict[str, Any]] = [{} for _ in prompts]
        if tokenizer:
            length = network.config.text_config.max_position_embeddings  # CLIP ends there
            how = {"padding": True, "truncation": True, "max_length": length}
            texts = tokenizer([p or "" for p in prompts], return_tensors="pt", **how)
            out = network(**inputs.to(device), **texts.to(device))
            vectors, texts = out.image_embeds, network.logit_scale.exp() * out.text_embeds
            for told, prompt, text in zip(says, prompts, texts.cpu().double(), strict=True):
                told |= {"prompt": text} if prompt else {}
        else:
            tokens = network(**inputs.to(device)).last_hidden_state  # (N, 1 + patches, D)
            vectors = F.normalize(tokens[:, 0], dim=-1)
        rest = iter(vectors.cpu().double())
        for its, told in zip(pictures, says, strict=True):
            told |= {kind: next(rest) for kind in its}
        return says

    return embed


NETWORKS: dict[str, Callable[[Config, torch.device], Network]] = {
    "lpips": load_lpips,
    "clip": functools.partial(load_embedder, "clip_model", ("clip",)),
    "dino": functools.partial(load_embedder, "dino_model", ("dino", "vit")),
}


def load_networks(
    config: Config, device: torch.device, skipped: dict[str, str]
) -> dict[str, Network]:
    """Load the networks that metrics need; `skipped` says why one is missing."""
    networks: dict[str, Network] = {}
    for network, load in NETWORKS.items():
        needed = {option_of(name) for name, m in METRICS.items() if f"{network}." in m.needs}
        if users := needed.intersection(config.metrics):
            try:
                networks[network] = load(config, device)
            except UserError as error:
                skipped |= dict.fromkeys(sorted(users), str(error))
    return networks


def measure(
    config: Config, rows: list[Result], networks: dict[str, Network], device: torch.device
) -> list[Result]:
    """Give every row the figures that were asked for, but those that are undefined."""
    found = []
    for start in progress(range(0, len(rows), config.batch_size), "evaluate"):
        part = rows[start : start + config.batch_size]
        pictures = [open_images(row) for row in part]
        inputs = [pixel_inputs(images, config.region_threshold, device) for images in pictures]
        for name, network in networks.items():
            said = network(pictures, [row.prompt for row in part])
            for its, values in zip(inputs, said, strict=True):
                its |= {f"{name}.{kind}": value for kind, value in values.items()}
        for row, its in zip(part, inputs, strict=True):
            found.append(row._replace(figures=figures_of(its, config.metrics)))
    return found


def pixel_inputs(images: Images, threshold: float, device: torch.device) -> dict[str, Any]:
    """Return {edited, before, after, region, outside}; takes the mask out of `images`."""
    mask = images.pop("mask", None)
    inputs: dict[str, Any] = {kind: to_tensor(i, device) for kind, i in images.items()}
    if mask:
        inputs["region"] = to_tensor(mask, device).mean(0) > 0.5
    elif "before" in inputs and "after" in inputs:
        inputs["region"] = (inputs["before"] - inputs["after"]).abs().mean(0) > threshold
    if "region" in inputs:
        inputs["outside"] = ~inputs["region"]
    return inputs


def figures_of(inputs: dict[str, Any], options: list[str]) -> dict[str, float]:
    """Return the figures of one picture, as far as it has their inputs."""
    figures = {}
    for name, metric in METRICS.items():
        words = metric.needs.split()
        if option_of(name) in options and inputs.keys() >= set(words):
            figures[name] = float(metric.measure(*(inputs[word] for word in words)))
    return {name: value for name, value in figures.items() if math.isfinite(value)}


# --- 4. means, ranking, curve, report -------------------------------------------------------------


def means_by_column(rows: list[Result]) -> dict[str, Any]:
    """Return {column: {series, scale, pictures, means}}, in the order of the rows."""
    columns: dict[str, Any] = {}
    for title in dict.fromkeys(row.column for row in rows):
        its = [row for row in rows if row.column == title]
        names = dict.fromkeys(name for row in its for name in row.figures)
        means = {n: [row.figures[n] for row in its if n in row.figures] for n in names}
        columns[title] = {
            "series": its[0].series,
            "scale": its[0].scale,
            "pictures": len(its),
            "means": {name: float(np.mean(values)) for name, values in means.items()},
        }
    return columns


def first_shared(names: Iterable[str], means: Sequence[dict[str, float]]) -> str | None:
    """Return the first figure that all of some columns have; None without columns."""
    return next((n for n in names if means and all(n in mean for mean in means)), None)


def rank(columns: dict[str, Any]) -> dict[str, Any]:
    """Sort columns, best first, by the first figure that all have."""
    names = [*RANKED_BY, *(name for name, m in METRICS.items() if m.better and m.shown)]
    name = first_shared(names, [column["means"] for column in columns.values()])
    if not name:
        why = f"all columns need one of {', '.join(RANKED_BY)}"
        return {"by": None, "columns": list(columns), "why": why}
    better = METRICS[name].better
    order = sorted(columns, key=lambda column: -better * columns[column]["means"][name])
    return {"by": name, "columns": order}


def curve(columns: dict[str, Any], strengths: list[float] | None) -> dict[str, Any]:
    """Return edit strength against content change, by the first figures all scales have.

    At scale 0 nothing may have changed: what is then undefined (clip_direction) is 0.
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
        cost = column["means"][content]  # 0: nothing has changed; a cosine is then 1
        point["content"] = 1 - cost if content == "dino_before" else cost
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
    """Return the content change where a curve first has this strength, linear between scales."""
    for a, b in zip(points, points[1:] or points, strict=False):
        low, high = a["strength"], b["strength"]
        if min(low, high) <= strength <= max(low, high):
            part = (strength - low) / (high - low) if high != low else 0.0
            return a["content"] + part * (b["content"] - a["content"])
    return None


def shown_figures(report: dict[str, Any]) -> list[str]:
    """Return the figures to print, first the one that columns are ranked by."""
    means = [column["means"] for column in report["columns"].values()]
    there = [name for name in METRICS if any(name in mean for mean in means)]
    shown = [name for name in there if METRICS[name].shown] or there
    return sorted(shown, key=lambda name: name != report["ranking"]["by"])


def table(report: dict[str, Any]) -> str:
    """Return the means as text, best column first."""
    names = shown_figures(report)
    lines = [["", "pictures", *names]]
    for title in report["ranking"]["columns"]:
        column = report["columns"][title]
        means = [f"{column['means'].get(name, math.nan):.4g}" for name in names]
        lines.append([title, str(column["pictures"]), *means])
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a line per picture; what is undefined is empty."""
    there = [name for name in METRICS if any(name in row["figures"] for row in rows)]
    names = [*(name for name in rows[0] if name != "figures"), *there]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(row | row["figures"] for row in rows)


def draw_report(path: Path, report: dict[str, Any]) -> None:
    """Draw a PNG: four means, a bar per column, and the curve, if there is one."""
    from matplotlib.figure import Figure  # no window: savefig draws with Agg

    found, order = report["curve"], report["ranking"]["columns"]
    names = shown_figures(report)[:4] + ["curve"] * ("series" in found) or ["nothing"]
    canvas = Figure((4.5 * len(names), max(5.0, 2 + 0.5 * len(order))), layout="constrained")
    panels: Any = canvas.subplot_mosaic([names])  # type: ignore[list-item]
    for name in shown_figures(report)[:4]:
        means = [report["columns"][title]["means"].get(name, math.nan) for title in order]
        axes = panels[name]
        axes.bar_label(axes.barh(order, means), fmt="%.3g", padding=2)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_title(name)
    for name, points in found.get("series", {}).items():
        x, y = ([point[kind] for point in points] for kind in ("strength", "content"))
        axes = panels["curve"]
        axes.plot(x, y, "o-", label=name or "all")
        for point, *place in zip(points, x, y, strict=True):
            axes.annotate(f"{point['scale']:g}", place)
        axes.set_xlabel(f"edit strength ({found['strength']})")
        axes.set_ylabel(f"change of what should stay ({found['content']})")
        axes.legend(title="points: scales")
    canvas.savefig(path, format="png", dpi=120)


def print_summary(report: dict[str, Any]) -> None:
    """Print what was left out, the means, what they are ranked by, the curve."""
    ranking, found = report["ranking"], report["curve"]
    for name, why in report["skipped"].items():
        if name in report["settings"]["metrics"]:
            print(f"skipped {name}: {why}")
    print(*report["notes"], table(report), sep="\n")
    if ranking["by"]:
        print(f"best first, by {ranking['by']}: {METRICS[ranking['by']].unit}")
    for point in found.get("matched", []):
        cells = [f"{n or 'all'} {v:.4g}" for n, v in point["content"].items() if v is not None]
        print(
            f"content change ({found['content']}) at strength {point['strength']:.3g}"
            f" ({found['strength']}): {', '.join(cells) or 'not reached'}"
        )


def evaluate(config: Config, rows: list[Result], notes: list[str]) -> dict[str, Any]:
    """Measure, write evaluation.*, print the means; return what the JSON holds."""
    here = torch.accelerator.is_available() and torch.accelerator.current_accelerator()
    device = torch.device(config.device or here or "cpu")
    skipped: dict[str, str] = {}
    networks = load_networks(config, device, skipped)
    rows = measure(config, rows, networks, device)
    columns = means_by_column(rows)
    there = {option_of(name) for row in rows for name in row.figures} | skipped.keys()
    for name, metric in METRICS.items():
        if option_of(name) not in there:
            why = f"it needs {metric.needs} (--before_dir, --after_dir, --prompt), and a change"
            asked = option_of(name) in config.metrics
            skipped[option_of(name)] = why if asked else "not asked for (--metrics)"
    report: dict[str, Any] = {
        "settings": config.model_dump(mode="json"),
        "figures": {
            name: {"metric": option_of(name), "better": metric.better, "text": metric.unit}
            for name, metric in METRICS.items()
        },
        "columns": columns,
        "ranking": rank(columns),
        "curve": curve(columns, config.strengths),
        "skipped": skipped,
        "notes": notes,
        "rows": [{"column": row.column} | row._asdict() for row in rows],
    }
    folder = output_folder(config)
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False, default=str)
    utils.save_text(folder / "evaluation.json", text)
    utils.save_atomic(folder / "evaluation.csv", lambda file: write_csv(file, report["rows"]))
    utils.save_atomic(folder / "evaluation.png", lambda file: draw_report(file, report))
    print_summary(report)
    if config.html:
        page, title = load_tool("page"), f"evaluation of {folder.resolve().name}"
        page.write_page(folder / "evaluation.html", title, page.views_of(rows, report["ranking"]))
    print(f"results: {folder / 'evaluation.json'} (.csv, .png{', .html' * config.html})")
    return report


def main() -> None:
    """Read the settings, check them, write the figures."""
    config = load_config(Config, check=check_comparison)
    rows, notes, _ = find_comparisons(config)
    evaluate(config, rows, notes)


if __name__ == "__main__":
    utils.run_script(main)
