"""Train a LoRA for Stable Diffusion 1.5: DreamBooth, or a change from before/after pairs.

Page: docs/train_dreambooth_pairs.md

    accelerate launch train_dreambooth_pairs.py --pretrained_model_name_or_path DIR \\
        --use_image_pairs --before_data_dir data/before --after_data_dir data/after \\
        --instance_prompt "a photo showing the change" --output_dir lora/change
    ... --pair_objective difference             # what a pair teaches: an entry of OBJECTIVES
    ... --sequence_dirs a b c --sequence_scales -1,0,1      # more than two times
    ... --video clip.mp4 --frame_gap 24         # pairs of frames
    ... --instance_data_dir data/dog --instance_prompt "a photo of sks dog"    # DreamBooth
    ... --config configs/x.yaml | --plan | --print_config | --help

The flags are those of diffusers' DreamBooth LoRA script. This is no library: copy the file, change
it, run it; only utils.py must lie beside it. `# EDIT HERE:` marks what an ablation changes,
`# KEEP:` what breaks otherwise.

Shapes: B samples, H W pixels in [-1, 1], latents z (B, 4, h, w) = posterior mode * 0.18215, h w =
H/8 W/8, text (B, 77, 768). Noised: z_t = a z + s e with a^2 = alphas_cumprod[t], s^2 = 1 - a^2.
"""

from __future__ import annotations

import bisect
import contextlib
import datetime
import fcntl
import functools
import gc
import hashlib
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pydantic import Field, field_validator, model_validator
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
    shuffled,
    track_picture,
    uniform,
    write_entry,
    write_report,
)

# KEEP: diffusers, transformers and accelerate are imported where they are used, so that a mistake
# in the settings or the data is reported within seconds, before any of them is loaded.

LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"
# differs: the UNet halves its 8 px latents three times
SIZE_MULTIPLE = 64
TARGETS = {  # EDIT HERE: layers with an adapter, by the end of their names; counts of SD 1.5
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),  # 128
    "transformer": (  # 192
        "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out",
    ),
    "self-attention+conv": (  # no cross-attention: not bound to the prompt of training
        "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
        "conv1", "conv2", "conv_shortcut", "samplers.0.conv",
    ),
}  # fmt: skip
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")  # 48

log = logging.getLogger("train_dreambooth_pairs")


# --- 1. config ------------------------------------------------------------------------------------

NOT_HERE = {  # flags of diffusers' script, and why there is none of the name here
    "revision": "download it (hf download NAME --revision R) and give the folder",
    "variant": "the full weights are read and held in mixed_precision",
    "tokenizer_name": "the checkpoint's own tokenizer is used",
    "pre_compute_text_embeddings": "prompts are encoded once and cached, always",
    "dataloader_num_workers": "latents are cached; nothing is decoded during training",
    "enable_xformers_memory_efficient_attention": "torch's own fused attention is used",
    "image_interpolation_mode": "pictures are resized with Lanczos",
    "prior_generation_precision": "class pictures are drawn in mixed_precision",
    "logging_dir": "everything lies in output_dir",
    "push_to_hub": "upload it afterwards: hf upload NAME output_dir",
    "local_rank": "accelerate launch knows it",
    **dict.fromkeys(
        ("tokenizer_max_length", "text_encoder_use_attention_mask", "class_labels_conditioning"),
        "for DeepFloyd IF, not for Stable Diffusion",
    ),
}


class Config(Section):
    """train_dreambooth_pairs.py: LoRAs for Stable Diffusion 1.5, from single pictures or pairs.

    Names and defaults are those of diffusers' DreamBooth LoRA script, where it has them.
    """

    not_here = NOT_HERE

    pretrained_model_name_or_path: str
    """Folder in diffusers layout, or a Hub id."""
    output_dir: Path = Path("lora-dreambooth-model")
    """Everything a run leaves lies here (but for the cache)."""
    cache_dir: Path = Path("cache")
    """Latents and prompt embeddings, named by their content; runs may share it."""

    # pairs
    use_image_pairs: bool = False
    """Learn a change from before_data_dir and after_data_dir (or a sequence, or a video)."""
    before_data_dir: Path | None = None
    """Pictures before the change."""
    after_data_dir: Path | None = None
    """Pictures of the same stems after it."""
    sequence_dirs: list[Path] = []
    """Folders of more than two times, instead of before and after; a stem needs two of them."""
    sequence_scales: list[float] = []
    """Their positions on the slider; [] is evenly from -1 to 1."""
    video: Path | None = None
    """Pairs of frames of this video, instead of folders (needs: pip install av)."""
    frame_gap: int = Field(24, ge=1)
    """video: frames between before and after."""
    on_missing: Literal["error", "skip"] = "error"
    """What to do with a stem that lacks its partner."""
    pair_objective: Literal["slider", "difference", "copier", "joint"] = "slider"
    """What a pair teaches: a name of OBJECTIVES."""
    pair_multiplier: float = Field(1.0, gt=0)
    """Strength of the adapter in training; below 1 it learns more than it shows."""
    calibrate: bool | None = None
    """Scale the saved LoRA so that strength 1 is one full change; null: with difference only."""
    region_weight: float = Field(0.0, ge=0, le=1)
    """Share of the loss that follows |before - after| of each pair, normalised by its mean."""

    # single pictures
    instance_data_dir: Path | None = None
    """DreamBooth: pictures of the subject."""
    instance_prompt: str = ""
    """The prompt of training, of both sides of a pair too."""
    class_data_dir: Path | None = None
    """Prior preservation: pictures of the class; what is missing is drawn by the base model."""
    class_prompt: str | None = None
    """Their prompt."""
    with_prior_preservation: bool = False
    """Also learn to keep the class."""
    prior_loss_weight: float = Field(1.0, ge=0)
    """Weight of that."""
    num_class_images: int = Field(100, ge=1)
    """How many class pictures there must be."""
    sample_batch_size: int = Field(4, ge=1)
    """How many of them are drawn at once."""

    # pictures
    resolution: int = Field(512, ge=64, multiple_of=64)
    """Side of the square whose area the pictures get, px; aspect ratios are kept (buckets)."""
    center_crop: bool = False
    """Crop to a square instead."""
    random_flip: bool = False
    """Mirror half of the visits, both sides of a pair alike."""

    # noise and loss
    timestep_min: int = Field(0, ge=0, le=999)
    """Lowest noise level (0..999): 200 to 400 for style, 500 to 999 for shape."""
    timestep_max: int = Field(999, ge=0, le=999)
    """Highest one, included."""
    loss_type: Literal["mse", "huber"] = "mse"
    """A name of ERRORS."""
    huber_c: float = Field(0.1, gt=0)
    """huber: errors above this count linearly."""
    snr_gamma: float | None = Field(None, gt=0)
    """min-SNR: weight min(1, gamma / SNR); 5 is usual."""
    noise_offset: float = Field(0.0, ge=0)
    """Noise common to all pixels of a channel; lets pictures become brighter or darker."""

    # adapter
    lora_rank: int = Field(4, ge=1)
    """Rank (`rank` is taken as well)."""
    lora_alpha: float | None = Field(None, gt=0)
    """Strength is lora_alpha / lora_rank; null means lora_alpha = lora_rank."""
    target_modules: Literal["attention", "transformer", "self-attention+conv"] = "attention"
    """A name of TARGETS."""
    train_text_encoder: bool = False
    """Also an adapter on CLIP's attention."""

    # optimizer and loop
    learning_rate: float = Field(5e-4, gt=0)
    """Rate after the warm-up."""
    scale_lr: bool = False
    """Times processes, accumulation and batch."""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    """Shape of the rate."""
    lr_warmup_steps: int = Field(0, ge=0)
    """Steps from 0 to the full rate (constant has none)."""
    lr_num_cycles: int = Field(1, ge=1)
    """cosine_with_restarts: restarts."""
    lr_power: float = Field(1.0, gt=0)
    """polynomial: exponent."""
    use_8bit_adam: bool = False
    """AdamW with 8-bit moments (needs: pip install bitsandbytes)."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """AdamW."""
    adam_weight_decay: float = Field(1e-2, ge=0)
    """AdamW."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """AdamW."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    train_batch_size: int = Field(4, ge=1)
    """Samples per forward pass and process; a pair is one sample."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Forward passes per optimizer step."""
    num_train_epochs: int = Field(1, ge=1)
    """Passes over the data, where max_train_steps says nothing."""
    max_train_steps: int | None = Field(None, ge=1)
    """Optimizer steps."""
    checkpointing_steps: int = Field(500, ge=1)
    """Steps between two checkpoints."""
    checkpoints_total_limit: int | None = Field(None, ge=1)
    """Keep only the newest ones."""
    resume_from_checkpoint: str | None = None
    """"latest" (the newest valid one; from step 0 if there is none) or a checkpoint folder."""
    gradient_checkpointing: bool = False
    """Saves memory, costs about a third more time."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Of the frozen base; LoRA, loss and optimizer are fp32."""
    allow_tf32: bool = False
    """Faster fp32 products on Ampere and newer; they round more."""
    compile: bool = False
    """torch.compile the UNet: slower to start, faster steps on a GPU."""
    seed: int = 0
    """Every draw belongs to (seed, step)."""
    logging_steps: int = Field(10, ge=1)
    """Steps between two log lines; only then the loop waits for the GPU."""
    report_to: Literal["none", "tensorboard", "wandb", "all"] = "none"
    """Trackers beside metrics.jsonl, which is always written."""

    # validation and results
    validation_prompt: str | None = None
    """Draw it with the LoRA during training."""
    num_validation_images: int = Field(4, ge=1)
    """Seeds of it."""
    validation_steps: int | None = Field(None, ge=1)
    """Steps between two such sheets; null: with the checkpoints."""
    validation_epochs: int | None = Field(None, ge=1)
    """The same in passes over the data, instead."""
    validation_scales: list[float] = Field([-1.0, -0.5, 0.0, 0.5, 1.0], min_length=1)
    """Strengths of it."""
    validation_inference_steps: int = Field(25, ge=1)
    """DDIM steps of it."""
    validation_guidance_scale: float = Field(7.5, ge=1)
    """Classifier-free guidance of it; 1 is none."""
    export: Literal["none", "kohya"] = "none"
    """kohya: also write the format of WebUIs."""

    @model_validator(mode="before")
    @classmethod
    def _other_names(cls, data: Any) -> Any:
        if isinstance(data, dict) and "rank" in data:
            data = {**data, "lora_rank": data["rank"]}
            del data["rank"]
        return data

    @field_validator("sequence_scales", "validation_scales", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """ "0,1,2" -> ["0", "1", "2"]; one number is a list, too."""
        parts = value if isinstance(value, list) else [value]
        return [p for part in parts for p in (part.split(",") if isinstance(part, str) else [part])]

    @property
    def stages(self) -> list[tuple[float, Path]]:
        """(scale, folder) of each time, rising; empty without pairs in folders."""
        folders = list(self.sequence_dirs)
        if not folders and self.before_data_dir and self.after_data_dir:
            folders = [self.before_data_dir, self.after_data_dir]
        last = max(1, len(folders) - 1)
        even = [2 * i / last - 1 for i in range(len(folders))]
        fits = len(self.sequence_scales) == len(folders)  # else check_flags names it
        return sorted(zip(self.sequence_scales if fits else even, folders, strict=True))

    @property
    def objective(self) -> str:
        """A name of OBJECTIVES."""
        return self.pair_objective if self.use_image_pairs else "instance"


LISTS = ("--sequence_dirs", "--sequence_scales", "--validation_scales")


def repeat_flags(argv: Sequence[str]) -> list[str]:
    """`--sequence_dirs a b c` becomes the flag three times, which load_config collects."""
    found: list[str] = []
    flag = ""
    for arg in argv:
        if arg.startswith("--"):
            flag = arg
            found.append(arg)
        elif flag in LISTS and found[-1] != flag:
            found += [flag, arg]
        else:
            found.append(arg)
    return found


# --- 2. pairs -------------------------------------------------------------------------------------


class Scene(NamedTuple):
    """The same scene at two times or more; or one picture of DreamBooth."""

    name: str
    files: tuple[Path, ...]
    scales: tuple[float, ...]  # of each file on the slider, rising


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


def index_pixels(paths: Sequence[Path], index: FileIndex) -> None:
    """Add a hash of the pixels, for VERIFY_SECONDS: one picture may lie in two formats."""
    deadline = time.monotonic() + VERIFY_SECONDS

    def look(path: Path) -> str | None:
        if time.monotonic() > deadline:
            return None
        with contextlib.suppress(OSError, SyntaxError, ValueError):  # named when it is encoded
            image = open_rgb(path)
            return hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()
        return None

    new = [p for p in paths if "pixels" not in (index.get(p, p.stat()) or {})]
    with ThreadPoolExecutor() as pool:
        for path, pixels in zip(new, pool.map(look, new), strict=True):
            if pixels:
                stat = path.stat()
                index.put(path, stat, {**(index.get(path, stat) or {}), "pixels": pixels})
    index.commit()


def group_scenes(config: Config) -> tuple[list[Scene], list[str], list[str]]:
    """Files of the same stem in the folders of `stages` -> (scenes, left out, problems)."""
    stages = config.stages
    if lacking := [folder for _, folder in stages if not folder.is_dir()]:
        return [], [], [f"Before/After images root doesn't exist: {not_there(f)}" for f in lacking]
    if len({folder.resolve() for _, folder in stages}) < len(stages):
        return [], [], [f"{stages[0][1]} is named twice: before and after must differ"]
    pairs = itertools.permutations([folder for _, folder in stages], 2)
    if nested := [f"{a} lies in {b}: move one of them" for a, b in pairs if lies_in(a, b)]:
        return [], [], nested
    found = [list_images(folder) for _, folder in stages]
    scenes: list[Scene] = []
    left_out: list[str] = []
    problems: list[str] = []
    least = 2 if len(stages) > 2 else len(stages)  # a sequence may have holes
    for stem in sorted(set().union(*found)):
        there = [(s, f[stem]) for (s, _), f in zip(stages, found, strict=True) if stem in f]
        if twice := [entries for _, entries in there if len(entries) > 1]:
            problems.append(f"{', '.join(e.path for e in twice[0])}: same stem; keep one")
        elif len(there) < least:
            folders = [str(d) for (_, d), f in zip(stages, found, strict=True) if stem not in f]
            text = f"no picture {stem}.* in {', '.join(folders)}"
            (left_out if config.on_missing == "skip" else problems).append(text)
        else:
            files = tuple(Path(entries[0].path) for _, entries in there)
            scenes.append(Scene(stem, files, tuple(scale for scale, _ in there)))
    if not scenes:
        counts = ", ".join(
            f"{len(f)} stems in {folder}{_first_names(f)}"
            for (_, folder), f in zip(stages, found, strict=True)
        )
        problems.insert(0, f"No matching image pairs found: {counts}")
    return scenes, left_out, problems


def not_there(folder: Path) -> str:
    """`folder`, and what is in its place."""
    if folder.exists():
        return f"{folder} is a file, no folder"
    parent = next(place for place in folder.absolute().parents if place.is_dir())
    names = (path.name for path in parent.iterdir())
    return f"{folder}; in {parent} there is{_first_names(names) or ' nothing'}"


def lies_in(inner: Path, outer: Path) -> bool:
    """Whether a scan of `outer` goes through `inner`; also where they are the same."""
    return inner.resolve().is_relative_to(outer.resolve())


def _first_names(stems: Iterable[str]) -> str:
    names = sorted(stems)[:3]
    return f" ({', '.join(names)}, ...)" if names else ""


def frame_scenes(config: Config) -> tuple[list[Scene], list[str], list[str]]:
    """Frames of the video, frame_gap apart -> scenes; still pictures and cuts are left out.

    Frames lie in cache_dir/video/<hash of the file>-<gap>/; the video is decoded once.
    """
    assert config.video
    if not config.video.is_file():
        return [], [], [f"video: no file {config.video}"]
    gap = config.frame_gap
    folder = config.cache_dir / "video" / f"{hash_file(config.video)}-{gap}"
    if not folder.is_dir():
        try:
            save_folder_atomic(folder, lambda place: extract_frames(config.video, gap, place))
        except UserError as error:
            return [], [], [str(error)]
    small = np.load(folder / "small.npy").astype(np.float32) / 255  # (frames, 32, 32, 3)
    steps = [float(np.abs(b - a).mean()) for a, b in itertools.pairwise(small)]
    usual = float(np.median(steps)) if steps else 0.0
    scenes, left_out = [], []
    for first in range(0, len(small) - gap, frame_stride(gap)):
        last = first + gap
        name = f"{first:05d}-{last:05d}"
        if max(steps[first:last]) > max(0.15, 8 * usual):
            left_out.append(f"frames {name}: there is a cut between them")
        elif np.abs(small[last] - small[first]).mean() < 0.004:
            left_out.append(f"frames {name}: nothing changes")
        else:
            files = tuple(folder / f"{number:05d}.png" for number in (first, last))
            scenes.append(Scene(name, files, (-1.0, 1.0)))
    if scenes:
        return scenes, left_out, []
    text = f"No matching image pairs found: {len(small)} frames in {config.video}, frame_gap {gap}"
    return [], left_out, [text]


def frame_stride(gap: int) -> int:
    """Frames from one pair to the next: they overlap by half."""
    return max(1, gap // 2)


def extract_frames(video: Path | None, gap: int, folder: Path) -> None:
    """The frames of pairs as 00000.png ..., all of them tiny in small.npy.

    Raises:
        UserError: no decoder, unreadable.
    """
    try:
        import av
    except ImportError as error:
        raise UserError("video: needs a decoder: pip install av") from error
    stride, small = frame_stride(gap), []
    try:
        with av.open(str(video)) as container:
            total = container.streams.video[0].frames or None
            frames = progress(container.decode(video=0), "decode video", total=total)
            for number, frame in enumerate(frames):
                image = frame.to_image().rotate(frame.rotation, expand=True)  # telephones turn
                small.append(np.asarray(image.resize((32, 32))))
                if number % stride == 0 or (number >= gap and (number - gap) % stride == 0):
                    image.save(folder / f"{number:05d}.png")
    except (av.error.FFmpegError, IndexError) as error:
        raise UserError(f"video: {video} cannot be read: {error}") from error
    if not small:
        raise UserError(f"video: {video} holds no frame")
    np.save(folder / "small.npy", np.stack(small))


def find_scenes(config: Config) -> tuple[list[Scene], list[str], list[str]]:
    """Whatever the settings train on -> (scenes, what was left out, problems)."""
    if config.video:
        return frame_scenes(config)
    if config.use_image_pairs:
        return group_scenes(config)
    folder = config.instance_data_dir
    if not folder or not folder.is_dir():
        return [], [], [f"Instance images root doesn't exist: {folder and not_there(folder)}"]
    entries = [entry for found in list_images(folder).values() for entry in found]
    scenes = [Scene(Path(e.path).stem, (Path(e.path),), (1.0,)) for e in entries]
    return scenes, [], [] if scenes else [f"instance_data_dir: no picture in {folder}"]


def check_scenes(scenes: Sequence[Scene], index: FileIndex) -> tuple[list[str], list[str]]:
    """Look at the pictures -> (what is odd, problems)."""
    files = sorted({file for scene in scenes for file in scene.files})
    problems = check_pictures(files, index)
    readable = {file for file in files if file.exists() and index.get(file, file.stat())}
    index_content(sorted(readable), index)
    index_pixels(sorted({f for s in scenes if len(s.files) > 1 for f in s.files} & readable), index)
    odd = []
    for file in sorted(readable):
        if not 1 / 3 <= index.aspect(file) <= 3:
            odd.append(f"{file} is longer than 3:1; its ends are cut off")
    for scene in (scene for scene in scenes if readable.issuperset(scene.files)):
        for first, other in itertools.pairwise(scene.files):
            pixels = [index.known(file).get("pixels", file) for file in (first, other)]
            if index.content(first) == index.content(other) or pixels[0] == pixels[1]:
                problems.append(f"{first} and {other} are the same picture: no change to learn")
            elif abs(math.log(index.aspect(first) / index.aspect(other))) > 0.02:
                odd.append(f"{other} has another shape than {first}; both are cropped to one size")
    return odd, problems


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


def check_flags(config: Config) -> list[str]:
    """Settings that do not go together."""
    folders = config.before_data_dir, config.after_data_dir
    sources = {
        "before_data_dir and after_data_dir": any(folders),
        "sequence_dirs": config.sequence_dirs,
        "video": config.video,
    }
    given = [name for name, value in sources.items() if value]
    pairs, prior, scales = (
        config.use_image_pairs,
        config.with_prior_preservation,
        len(config.sequence_scales),
    )
    said = " and ".join(given) or "none"
    wrong = {
        f"use_image_pairs: give one of {', '.join(sources)} (given: {said})": pairs
        and len(given) != 1,
        "before_data_dir and after_data_dir go together": any(folders) and not all(folders),
        f"{said}: add --use_image_pairs": given and not pairs,
        "instance_data_dir: not read beside --use_image_pairs": pairs and config.instance_data_dir,
        "give --instance_data_dir, or --use_image_pairs with two folders": not pairs
        and not given
        and not config.instance_data_dir,
        "instance_prompt: single pictures need the words that shall mean them": not pairs
        and config.instance_data_dir
        and not config.instance_prompt.strip(),
        "sequence_dirs: two folders or more": len(config.sequence_dirs) == 1,
        "sequence_scales: one for each of sequence_dirs": scales
        and scales != len(config.sequence_dirs),
        "sequence_scales: a number is there twice": len(set(config.sequence_scales)) < scales,
        "with_prior_preservation needs class_data_dir and class_prompt": prior
        and not (config.class_data_dir and config.class_prompt),
        "with_prior_preservation: not read beside --use_image_pairs": prior and pairs,
        "region_weight: only pairs have a region of change": config.region_weight and not pairs,
        f"calibrate: {config.objective} learns no change": config.calibrate
        and config.objective in ("joint", "instance"),
        "validation_steps and validation_epochs: give one": config.validation_steps
        and config.validation_epochs,
        "timestep_min is above timestep_max": config.timestep_min > config.timestep_max,
        "pair_objective copier: needs before and after, not a sequence": config.sequence_dirs
        and config.objective == "copier",
        f"train_text_encoder: not with pair_objective {config.objective}": config.train_text_encoder
        and config.objective in ("difference", "copier"),
    }
    return [text for text, is_wrong in wrong.items() if is_wrong] + check_unread(config)


def check_unread(config: Config) -> list[str]:
    """Settings that differ from their default and that nothing in this run reads."""
    prior, strength = config.with_prior_preservation, config.objective in ("slider", "difference")
    cycles, drawn = config.lr_scheduler == "cosine_with_restarts", config.validation_prompt
    readers: dict[str, tuple[object, str]] = {
        "pair_objective": (config.use_image_pairs, "use_image_pairs"),
        "pair_multiplier": (strength, "use_image_pairs and pair_objective slider or difference"),
        "frame_gap": (config.video, "video"),
        "class_data_dir": (prior, "with_prior_preservation"),
        "class_prompt": (prior, "with_prior_preservation"),
        "prior_loss_weight": (prior, "with_prior_preservation"),
        "num_class_images": (prior, "with_prior_preservation"),
        "lr_warmup_steps": (config.lr_scheduler != "constant", "another lr_scheduler"),
        "lr_num_cycles": (cycles, "lr_scheduler cosine_with_restarts"),
        "lr_power": (config.lr_scheduler == "polynomial", "lr_scheduler polynomial"),
        "huber_c": (config.loss_type == "huber", "loss_type huber"),
        "num_validation_images": (drawn is not None, "validation_prompt"),
        **{
            name: (drawn is not None, "validation_prompt")
            for name in Config.model_fields
            if name.startswith("validation_") and name != "validation_prompt"
        },
    }
    default = {name: field.default for name, field in Config.model_fields.items()}
    return [
        f"{name}: nothing reads it without {partner}"
        for name, (is_read, partner) in readers.items()
        if not is_read and getattr(config, name) != default[name]
    ]


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


def check_weight_files(folder: Path) -> list[str]:
    """Problems of the parts of a checkpoint folder: files missing or cut off, another UNet."""
    if not folder.is_dir():  # on the Hub
        return []
    weights = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
    problems = []
    for part in ("unet", "vae", "text_encoder"):
        file = folder / part / f"{weights.get(part, 'model')}.safetensors"
        try:
            settings = read_model_json(str(folder), f"{part}/config.json")
            with safe_open(file, framework="pt"):  # its length must be what its header says
                pass
        except (OSError, SafetensorError, UserError) as error:
            problems.append(f"{file} cannot be read: {error}; fetch it again")
            continue
        if part == "unet" and (channels := settings.get("in_channels")) != 4:
            problems.append(f"{folder / part} takes {channels} channels (inpainting?); wanted 4")
    tokenizer = folder / "tokenizer"
    if not any((tokenizer / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        problems.append(f"{tokenizer} holds no vocab.json and no tokenizer.json")
    return [f"pretrained_model_name_or_path: {problem}" for problem in problems]


def check_class(config: Config, index: FileIndex) -> list[str]:
    """Problems of class_data_dir: no folder, mixed up with the instances, unreadable pictures."""
    folder, single = config.class_data_dir, config.instance_data_dir
    if not (config.with_prior_preservation and folder):
        return []
    if single and (lies_in(folder, single) or lies_in(single, folder)):
        return [f"class_data_dir: {folder} and instance_data_dir {single} must lie apart"]
    if folder.exists() and not folder.is_dir():
        return [f"class_data_dir: {folder} is a file, no folder"]
    found = list_images(folder).values() if folder.exists() else []
    files = sorted(Path(entry.path) for entries in found for entry in entries)
    few = len(files) < config.num_class_images
    return check_pictures(files, index) + (try_folder("class_data_dir", folder) if few else [])


def try_folder(name: str, folder: Path) -> list[str]:
    """Make the folder; a problem where nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return []
    except OSError as error:
        return [f"{name}: cannot write there: {error}"]


def check_places(config: Config) -> list[str]:
    """Problems of what a run writes and goes on from."""
    problems = []
    for name, folder in (("output_dir", config.output_dir), ("cache_dir", config.cache_dir)):
        problems += try_folder(name, folder)
    read = [folder for _, folder in config.stages]
    read += [f for f in (config.instance_data_dir, config.class_data_dir) if f]
    for folder in (folder for folder in read if lies_in(config.output_dir, folder)):
        problems.append(
            f"output_dir: {config.output_dir} lies in {folder}, which is read with its folders: "
            "samples would become training pictures"
        )
    wanted = config.resume_from_checkpoint
    if wanted and wanted != "latest":
        place = checkpoint_place(wanted, config.output_dir)
        if not valid_checkpoint(place):
            there = [folder.name for folder in list_checkpoints(config.output_dir)]
            problems.append(
                f"resume_from_checkpoint: {place} is missing or damaged; in {config.output_dir} "
                f"there is{_first_names(there) or ' none'}"
            )
    return problems


# differs: each script audits its own settings
def audit(config: Config) -> list[str]:
    """Everything that can be known to be wrong before a model loads: one line per problem.

    What was found, left out or is odd is printed and lies in output_dir/audit.json.
    """
    problems = check_flags(config)
    name = config.pretrained_model_name_or_path
    problems += check_base(name) or check_weight_files(Path(name))
    wanted: list[str] = {"none": [], "all": []}.get(config.report_to, [config.report_to])
    wanted += ["bitsandbytes"] if config.use_8bit_adam else []
    for package in (name for name in wanted if not importlib.util.find_spec(name)):
        problems.append(f"{package} is not installed: pip install {package}")
    problems += check_places(config)
    index = FileIndex(None)
    with contextlib.suppress(OSError):
        index = FileIndex(config.cache_dir)
    scenes: list[Scene] = []
    given = config.stages or config.video if config.use_image_pairs else config.instance_data_dir
    # KEEP: one process; all of them would decode the same video
    if given and os.environ.get("RANK", "0") == "0":
        scenes, left_out, wrong = find_scenes(config)
        odd, bad = check_scenes(scenes, index)
        problems += wrong + bad + check_class(config, index)
        if left_out or odd:
            log.warning("note\n%s", listed(left_out + odd))
        report = {
            "scenes": [scene.name for scene in scenes],
            "left_out": left_out,
            "odd": odd,
            "problems": problems,
        }
        text = json.dumps(report, indent=2, ensure_ascii=False)
        with contextlib.suppress(OSError):
            path = config.output_dir / "audit.json"
            save_atomic(path, lambda file: file.write_text(text, encoding="utf-8"))
    problems = list(dict.fromkeys(problems))
    if len(problems) > 10:
        more = f"and {len(problems) - 10} more, all of them in {config.output_dir}/audit.json"
        problems = [*problems[:10], more]
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


def fit_scene(
    config: Config, scene: Scene, index: FileIndex, flip: bool = False
) -> tuple[Picture, ...]:
    """All pictures of a scene in the bucket of its first one, each cropped around its middle."""
    fact = index.known(scene.files[0])
    size = nearest_bucket(fact["width"], fact["height"], config.resolution)
    if config.center_crop:
        size = config.resolution, config.resolution
    wanted = size[0] / size[1]
    return tuple(
        Picture(file, index.content(file), size, cover_box(index.aspect(file), wanted), flip)
        for file in scene.files
    )


def change_map(first: Picture, last: Picture, factor: int) -> torch.Tensor:
    """(1, h, w): mean of |after - before| over channels and each latent's pixels, 0 to 1."""
    before, after = (to_pixels(load_picture(picture)) for picture in (first, last))
    return F.avg_pool2d((after - before).abs().mean(1, keepdim=True) / 2, factor)[0]


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


def load_clip(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """(tokenizer, text encoder), frozen."""
    from transformers import CLIPTextModel, CLIPTokenizer

    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder.eval().requires_grad_(False)
    return tokenizer, torch.nn.Module.to(encoder, device)


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> torch.Tensor:
    """(B, 77) token ids, padded and cut as the pipeline does."""
    length = tokenizer.model_max_length
    options = {"padding": "max_length", "max_length": length, "truncation": True}
    return tokenizer(list(prompts), return_tensors="pt", **options).input_ids


# --- 4. model and adapter -------------------------------------------------------------------------


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


class SliderConv(SliderLinear):
    """The same for a convolution: down has its kernel, stride and padding, up is 1 x 1."""

    def _changed(self, x: torch.Tensor, y: torch.Tensor, lane: Lane) -> torch.Tensor:
        for on in lane:
            if on.adapter not in self.down:
                continue
            down, up = self.down[on.adapter], self.up[on.adapter]
            if on.frozen:
                down, up = down.detach(), up.detach()
            low = F.conv2d(x, down.to(x.dtype), None, self.base.stride, self.base.padding)
            change = F.conv2d(low, up.to(x.dtype))
            scale = on.scale * self.strength[on.adapter]
            if isinstance(scale, torch.Tensor):
                scale = scale.to(x).view(-1, 1, 1, 1)
            y = y + scale * change
        return y


def adapted_layers(model: Any, name: str) -> dict[str, SliderLinear]:
    """{path: layer} of those that have the adapter `name`."""
    layers = model.named_modules()
    return {p: x for p, x in layers if isinstance(x, SliderLinear) and name in x.down}


def add_adapter(
    model: Any, board: Switchboard, name: str, ends: Sequence[str], rank: int, alpha: float
) -> None:
    """Give an empty adapter to the linear and convolution layers whose names end so."""
    for path, layer in list(model.named_modules()):
        kinds = (torch.nn.Linear, torch.nn.Conv2d)
        inner = layer.base if isinstance(layer, SliderLinear) else layer
        if not path.endswith(tuple(f".{end}" for end in ends)) or not isinstance(inner, kinds):
            continue
        if not isinstance(layer, SliderLinear):
            kind = SliderConv if isinstance(inner, torch.nn.Conv2d) else SliderLinear
            layer = kind(inner, board)
            model.set_submodule(path, layer)
        n_out, n_in, *kernel = inner.weight.shape
        device = inner.weight.device
        ones = [1] * len(kernel)
        layer.down[name] = torch.nn.Parameter(torch.zeros(rank, n_in, *kernel, device=device))
        layer.up[name] = torch.nn.Parameter(torch.zeros(n_out, rank, *ones, device=device))
        layer.strength[name] = alpha / rank


@torch.no_grad()
def start_adapter(model: Any, name: str, *parts: object) -> None:
    """Gaussian down (std 1 / rank), zero up, as diffusers starts it; belongs to `parts`."""
    for path, layer in adapted_layers(model, name).items():
        down = layer.down[name]
        down.copy_(normal(down.shape, *parts, path) / down.shape[0])
        layer.up[name].zero_()


def adapter_tensors(models: dict[str, Any], name: str, factor: float) -> dict[str, torch.Tensor]:
    """{"unet.<path>.lora_A.weight": ...}; strength and `factor` are folded into lora_B."""
    tensors = {}
    for part, model in models.items():
        for path, layer in adapted_layers(model, name).items():
            strength = layer.strength[name] * factor
            if part == "text_encoder":  # KEEP: transformers 5 left it out, WebUIs wait for it
                path = f"text_model.{path.removeprefix('text_model.')}"
            tensors[f"{part}.{path}.lora_A.weight"] = layer.down[name].detach().cpu().clone()
            tensors[f"{part}.{path}.lora_B.weight"] = (layer.up[name].detach() * strength).cpu()
    return tensors


def save_lora(path: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Diffusers/PEFT names; the file says alpha = r, so that every loader applies its strength."""
    from peft import LoraConfig

    plain = str | int | float | bool | list | dict | None
    adapter: dict[str, Any] = {}
    for part in sorted({name.split(".")[0] for name in tensors}):
        downs = {n: t for n, t in tensors.items() if n.startswith(part) and ".lora_A." in n}
        layers = sorted(name.removesuffix(".lora_A.weight")[len(part) + 1 :] for name in downs)
        rank = next(iter(downs.values())).shape[0]
        layers = [name.removeprefix("text_model.") for name in layers]  # PEFT compares the ends
        settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers).to_dict()
        settings["target_modules"] = layers
        adapter |= {f"{part}.{k}": v for k, v in settings.items() if isinstance(v, plain)}
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(adapter, sort_keys=True),
        "image_edit_lora": json.dumps(about, sort_keys=True),
    }
    save_atomic(path, lambda file: save_file(tensors, file, metadata=metadata))


def save_kohya(path: Path, tensors: dict[str, torch.Tensor], alpha: float) -> None:
    """The format of WebUIs: lora_unet_* and lora_te_* with .alpha; equal strength.

    tensors: from adapter_tensors(), strength folded into lora_B; alpha / r is taken out again.
    """
    renamed = {}
    for name, down in tensors.items():
        if ".lora_A." not in name:
            continue
        module = name.removesuffix(".lora_A.weight")
        part, _, layer = module.partition(".")
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part]
        where, rank = prefix + layer.replace(".", "_"), down.shape[0]
        renamed[f"{where}.lora_down.weight"] = down
        renamed[f"{where}.lora_up.weight"] = tensors[f"{module}.lora_B.weight"] * (rank / alpha)
        renamed[f"{where}.alpha"] = torch.tensor(float(alpha))
    rank = next(iter(tensors.values())).shape[0]
    metadata = {
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(alpha)),
        "ss_network_module": "networks.lora",
        "ss_base_model_version": "sd_v1",
    }
    save_atomic(path, lambda file: save_file(renamed, file, metadata=metadata))


# --- 5. objective ---------------------------------------------------------------------------------


class Noised(NamedTuple):
    """Two times of the same scenes under the SAME noise and timestep; (B, 4, h, w), fp32."""

    low: torch.Tensor  # the earlier one, noised
    high: torch.Tensor  # the later one; of single pictures the only one
    low_scale: torch.Tensor  # (B,) where they lie on the slider
    high_scale: torch.Tensor
    noise: torch.Tensor
    base: Callable[[torch.Tensor], torch.Tensor]  # noised -> the base's prediction, no gradient
    progress: float = 0.0  # share of the run that is done


class Term(NamedTuple):
    """One part of the fused batch: what the UNet sees, what it should say, what is on."""

    name: str
    noisy: torch.Tensor
    target: torch.Tensor
    lane: Lane
    weight: float = 1.0
    prompt: str = "instance"  # or class


def slider(n: Noised) -> list[Term]:  # EDIT HERE: the objective; others follow
    """True noise for both sides, the adapter at each side's scale (Gandikota et al. 2023).

    What the sides have in common cancels. -1 and 1 are the two sides, 0 lies between them.
    """
    return [
        Term("after", n.high, n.noise, (On("change", n.high_scale),)),
        Term("before", n.low, n.noise, (On("change", n.low_scale),)),
    ]


def difference(n: Noised) -> list[Term]:
    """The adapter makes of one side's noised latents what the base says of the other's.

    With the same noise, O_t = T_t - a (T - O), so the target is the score of the base's pictures
    moved by T - O: 1 is the whole change, -1 undoes it (the direct difference of TrainTrain).
    """
    of_high, of_low = n.base(torch.cat([n.high, n.low])).chunk(2)
    step = (n.high_scale - n.low_scale) / 2
    return [
        Term("forward", n.high, of_low, (On("change", step),)),
        Term("backward", n.low, of_high, (On("change", -step),)),
    ]


def copier(n: Noised) -> list[Term]:
    """First an adapter that copies the before; then, with it frozen, one that makes the after.

    Only the second one is kept (the copier of TrainTrain, the differential LoRA of DiffSynth).
    """
    if n.progress < 0.5:
        return [Term("copy", n.low, n.noise, (On("copied"),))]
    return [Term("change", n.high, n.noise, (On("copied", frozen=True), On("change")))]


def joint(n: Noised) -> list[Term]:
    """Both sides under the prompt, with the adapter on: DreamBooth (Ruiz et al. 2022) on both.

    It learns the scenes, not the change: the yardstick for the others.
    """
    sides = (("after", n.high), ("before", n.low))
    return [Term(name, noisy, n.noise, (On("change"),)) for name, noisy in sides]


def instance(n: Noised) -> list[Term]:
    """DreamBooth (Ruiz et al. 2022): the noise of single pictures."""
    return [Term("instance", n.high, n.noise, (On("change"),))]


OBJECTIVES: dict[str, Callable[[Noised], list[Term]]] = {
    "slider": slider,
    "difference": difference,
    "copier": copier,
    "joint": joint,
    "instance": instance,
}


def squared_error(error: torch.Tensor, _c: float) -> torch.Tensor:
    """e^2."""
    return error**2


def huber_error(error: torch.Tensor, c: float) -> torch.Tensor:
    """2 c (sqrt(e^2 + c^2) - c): e^2 for small errors, 2 c |e| for large ones."""
    return 2 * c * ((error**2 + c**2).sqrt() - c)


ERRORS = {"mse": squared_error, "huber": huber_error}


def snr_weight(alphas_cumprod: torch.Tensor, gamma: float | None) -> torch.Tensor:
    """min(1, gamma / SNR) (Hang et al. 2023), SNR = a^2 / s^2; ones without gamma."""
    if gamma is None:
        return torch.ones_like(alphas_cumprod)
    return (gamma * (1 - alphas_cumprod) / alphas_cumprod).clamp(max=1)


def region_weights(change: torch.Tensor, share: float) -> torch.Tensor:
    """Weights of mean 1: (1 - share) + share * change / mean(change); change (B, 1, h, w)."""
    mean = change.mean(dim=(1, 2, 3), keepdim=True)
    return (1 - share) + share * change / mean.clamp(min=1e-8)


def add_noise_sd(x: torch.Tensor, noise: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
    """a x + s noise; alphas (B,): alphas_cumprod at each sample's timestep."""
    alphas = alphas.view(-1, 1, 1, 1)
    return alphas.sqrt() * x + (1 - alphas).sqrt() * noise


STRATA = 10


def draw_timestep(config: Config, visit: int) -> int:
    """timestep_min..timestep_max, both included; every 10 visits fall into its 10 equal parts."""
    part = shuffled(STRATA, config.seed, "strata", visit // STRATA)[visit % STRATA]
    u = (part + uniform(config.seed, "timestep", visit)) / STRATA
    return config.timestep_min + int(u * (config.timestep_max - config.timestep_min + 1))


# --- 6. sampling ----------------------------------------------------------------------------------


Predict = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]
"""(latents (B, 4, h, w), timestep, scales (B,)) -> noise (B, 4, h, w)"""


@torch.no_grad()
def draw_sd(
    predict: Predict,
    noise: torch.Tensor,
    scheduler_config: Any,
    steps: int,
    scales: Sequence[float],
) -> torch.Tensor:
    """DDIM from `noise` (1, 4, h, w) at every strength -> (scales, 4, h, w).

    Strength 0 goes alone: it is what the base model draws, bit for bit.
    """
    import diffusers

    # KEEP: latents are no pixels; where a config says nothing, DDIM would clip them
    scheduler = diffusers.DDIMScheduler.from_config(scheduler_config, clip_sample=False)
    scheduler.set_timesteps(steps, device=noise.device)
    drawn: dict[float, torch.Tensor] = {}
    moved = sorted({scale for scale in scales if scale})
    for group in ([0.0] if 0 in scales else [], moved):
        if not group:
            continue
        latents = noise.expand(len(group), -1, -1, -1)
        strengths = torch.tensor(group, device=noise.device)
        for t in scheduler.timesteps:
            latents = scheduler.step(predict(latents, t, strengths), t, latents).prev_sample
        drawn.update(zip(group, latents, strict=True))
    return torch.stack([drawn[scale] for scale in scales])


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


# --- 7. checkpoints -------------------------------------------------------------------------------

MAY_DIFFER = {  # settings that may differ between a checkpoint and the run that continues it
    "output_dir", "cache_dir", "before_data_dir", "after_data_dir", "sequence_dirs", "video",
    "on_missing", "instance_data_dir", "class_data_dir", "sample_batch_size",
    "gradient_accumulation_steps", "checkpointing_steps", "checkpoints_total_limit", "allow_tf32",
    "resume_from_checkpoint", "gradient_checkpointing", "compile", "logging_steps", "report_to",
    "num_train_epochs",
    "validation_prompt", "num_validation_images", "validation_steps", "validation_scales",
    "validation_epochs", "validation_inference_steps", "validation_guidance_scale", "export",
}  # fmt: skip


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 2) for value in values.tolist()]


HASHED = {  # of what a checkpoint knows only a hash
    "pictures": "pictures: some came, went or have changed",
    "base": "pretrained_model_name_or_path: another model lies there now",
}


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


def set_run_aside(output_dir: Path) -> None:
    """Move what an earlier run left into earlier-<n>/."""
    old = [*list_checkpoints(output_dir), *output_dir.glob("*.safetensors")]
    names = ("samples", "metrics.jsonl", "report.html")
    old += [output_dir / name for name in names if (output_dir / name).exists()]
    if not old:
        return
    numbered = (output_dir / f"earlier-{number}" for number in itertools.count(1))
    place = next(folder for folder in numbered if not folder.exists())
    place.mkdir()
    for path in old:
        path.rename(place / path.name)
    last = "".join(f"/{folder.name}" for folder in list_checkpoints(place)[-1:])
    advice = f"; to go on with it: --resume_from_checkpoint {place.name}{last}" if last else ""
    log.warning("%s holds an earlier run: it is now in %s%s", output_dir, place.name, advice)


@contextlib.contextmanager
def only_run(output_dir: Path) -> Iterator[None]:
    """No other run trains into output_dir meanwhile. Raises UserError where one does."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            text = f"output_dir: another run writes into {output_dir}; wait for it or name another"
            raise UserError(text) from error
        except OSError:  # a network disk without locks
            log.warning("%s cannot be locked: start no second run there", output_dir)
        yield


def checkpoint_place(wanted: str, output_dir: Path) -> Path:
    """The folder that `wanted` names: a path, or a name in output_dir."""
    return Path(wanted) if Path(wanted).is_dir() else output_dir / wanted


def resume_point(
    wanted: str | None, output_dir: Path, now: dict[str, Any]
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that `wanted` names. `now`: what this run is trained as.

    Raises:
        UserError: a named one is missing or damaged, or settings differ.
    """
    if wanted is None:
        return None
    folders = list(reversed(list_checkpoints(output_dir)))
    if wanted != "latest":
        folders = [checkpoint_place(wanted, output_dir)]
    for folder in folders:
        state = valid_checkpoint(folder)
        if not state:
            if wanted != "latest":
                raise UserError(f"resume_from_checkpoint: {folder} is missing or damaged")
            log.warning("%s is damaged; looking for an older one", folder)
            continue
        before = state["trained_as"]
        changed = [k for k in sorted(now.keys() | before.keys()) if now.get(k) != before.get(k)]
        if changed:
            lines = [
                HASHED.get(key, f"{key}: was {before.get(key)}, is {now.get(key)}")
                for key in changed
            ]
            raise UserError(
                f"{folder} was trained with other settings; set them back, or start anew without "
                f"resume_from_checkpoint\n{listed(lines)}"
            )
        return folder, state
    log.info("resume: no checkpoint in %s, starting from step 0", output_dir)
    return None


# --- 8. loop --------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """One sample of a forward pass: everything random about it but the noise."""

    visit: int  # number over the whole run; timestep and noise hang on it
    scene: int
    low: int  # which of its times
    high: int
    flip: bool


class Batches:
    """Which scenes each forward pass sees: of one shape, and in the long run all equally often.

    A round has as many batches as there are scenes, in a new order each time; a shape has as many
    of them as scenes, and they go through those again and again, each time in another order.

    >>> Batches(["square", "wide", "square"], size=2, seed=0)[0]  # e.g. [2, 0]
    """

    def __init__(self, shapes: Sequence[object], size: int, seed: int) -> None:
        self.shapes, self.size, self.seed = shapes, size, seed
        self.alike: dict[object, list[int]] = {}
        for scene, shape in enumerate(shapes):
            self.alike.setdefault(shape, []).append(scene)
        self._kept: dict[tuple[object, ...], Any] = {}

    def __getitem__(self, batch: int) -> list[int]:
        """Scenes of forward pass number `batch` of the whole run."""
        number, place = divmod(batch, len(self.shapes))
        shape, earlier = self._keep(self._round, number)[place]
        scenes = self.alike[shape]
        first = (number * len(scenes) + earlier) * self.size
        visits = (divmod(i, len(scenes)) for i in range(first, first + self.size))
        return [scenes[self._keep(self._order, shape, again)[k]] for again, k in visits]

    def _round(self, number: int) -> list[tuple[object, int]]:
        """(shape, how many batches of it came before in this round) of each batch."""
        count, found = Counter[object](), []
        for scene in shuffled(len(self.shapes), self.seed, "round", number):
            shape = self.shapes[scene]
            found.append((shape, count[shape]))
            count[shape] += 1
        return found

    def _order(self, shape: object, again: int) -> list[int]:
        return shuffled(len(self.alike[shape]), self.seed, "scenes", shape, again)

    def _keep(self, make: Callable[..., Any], *what: object) -> Any:
        """make(*what), kept until there are many: a run asks for the same ones again and again."""
        key = (make.__name__, *what)
        if key not in self._kept:
            if len(self._kept) > 64:
                self._kept.clear()
            self._kept[key] = make(*what)
        return self._kept[key]


def draw_turns(config: Config, batch: int, scenes: Sequence[Scene], batches: Batches) -> list[Turn]:
    """Forward pass number `batch` of the whole run, over all processes and accumulation."""
    seed, turns = config.seed, []
    for number, scene in enumerate(batches[batch]):
        visit = batch * config.train_batch_size + number
        times = len(scenes[scene].files)
        low, high = sorted(shuffled(times, seed, "times", visit)[:2]) if times > 1 else (0, 0)
        flip = config.random_flip and uniform(seed, "flip", visit) < 0.5
        turns.append(Turn(visit, scene, low, high, flip))
    return turns


class Change(NamedTuple):
    """Where two pictures of a scene differ."""

    first: Picture
    last: Picture


def progress(items: Iterable[Any] | None, label: str, **options: Any) -> Any:
    """A progress bar on the first process, none on the others."""
    options["disable"] = options.get("disable", False) or os.environ.get("RANK", "0") != "0"
    return tqdm(items, desc=label, **options)


def memory_gb(device: torch.device) -> float:
    """Peak memory so far: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class DreamBoothPairsTrainer:
    """Cache, train, draw. fit() does it all; every method can be called alone.

    >>> DreamBoothPairsTrainer(load_config(Config, ["--config", "configs/x.yaml"])).fit()
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.cache_dir = config.cache_dir
        dtypes = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        self.dtype = dtypes[config.mixed_precision]
        self.accelerator: Any = None
        self.index: FileIndex
        self.scenes: list[Scene] = []
        self.class_pictures: list[Path] = []
        self.board = Switchboard()
        self.models: dict[str, Any] = {}  # unet (and text_encoder), as they train
        self.bare: dict[str, Any] = {}
        self.optimizer: Any = None
        self.step = 0

    def setup_accelerator(self) -> None:
        """Processes, devices, trackers."""
        if self.accelerator:
            return
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

        config = self.config
        self.accelerator = Accelerator(
            # bf16: layers cast by themselves, as in inference; fp16 needs the scaler
            mixed_precision="fp16" if config.mixed_precision == "fp16" else "no",
            cpu=not torch.accelerator.is_available(),
            device_placement=False,
            log_with=None if config.report_to == "none" else config.report_to,
            project_dir=config.output_dir,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2)),
                DistributedDataParallelKwargs(
                    broadcast_buffers=False, find_unused_parameters=config.objective == "copier"
                ),
            ],
        )
        if config.allow_tf32:
            torch.set_float32_matmul_precision("high")
        log.setLevel(logging.INFO if self.accelerator.is_main_process else logging.ERROR)

    @property
    def device(self) -> torch.device:
        """Where the models live."""
        return self.accelerator.device

    def find_data(self) -> None:
        """Pair and hash the pictures. Raises UserError with every problem."""
        if self.scenes:
            return
        config = self.config
        with self.accelerator.main_process_first():
            self.index = FileIndex(self.cache_dir)  # KEEP: inside, to see what process 0 recorded
            self.scenes, _, problems = find_scenes(config)
            problems += check_scenes(self.scenes, self.index)[1]
            if problems:
                raise UserError(f"{len(problems)} problem(s)\n{listed(problems)}")
        if config.with_prior_preservation:
            self._find_class_pictures()
        sizes = [fit_scene(config, scene, self.index)[0].size for scene in self.scenes]
        self.batches = Batches(sizes, config.train_batch_size, config.seed)

    def _find_class_pictures(self) -> None:
        folder = self.config.class_data_dir
        assert folder
        folder.mkdir(parents=True, exist_ok=True)
        there = sum(len(entries) for entries in list_images(folder).values())
        if self.accelerator.is_main_process and there < self.config.num_class_images:
            self._draw_class_pictures(folder, there)
        self.accelerator.wait_for_everyone()
        found = [Path(e.path) for entries in list_images(folder).values() for e in entries]
        self.class_pictures = sorted(found)[: self.config.num_class_images]
        if problems := check_pictures(self.class_pictures, self.index):
            raise UserError(f"class_data_dir\n{listed(problems)}")
        index_content(self.class_pictures, self.index)

    def _draw_class_pictures(self, folder: Path, there: int) -> None:
        """The base model's own pictures of the class, each from a seed of its own."""
        import diffusers

        config = self.config
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
            self.folder,
            dtype=self.dtype,
            feature_extractor=None,  # KEEP: only the parts that train are fetched from the Hub
            safety_checker=None,
            requires_safety_checker=False,
        ).to(self.device)
        pipeline.set_progress_bar_config(disable=True)
        # KEEP: only names that are free, or a deleted one would be drawn over one that is there
        free = (n for n in itertools.count() if not (folder / f"class-{n:05d}.png").exists())
        numbers = list(itertools.islice(free, config.num_class_images - there))
        size, side = config.sample_batch_size, config.resolution
        for first in progress(range(0, len(numbers), size), "draw class pictures"):
            batch = numbers[first : first + size]
            seeds = [draw_key(config.seed, "class", number) for number in batch]
            images = pipeline(
                [config.class_prompt or ""] * len(batch),
                height=side,
                width=side,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            ).images
            for number, image in zip(batch, images, strict=True):
                path = folder / f"class-{number:05d}.png"
                save_atomic(path, functools.partial(image.save, format="PNG"))
        del pipeline
        self._free()

    # -- cache

    @functools.cached_property
    def folder(self) -> Path:
        """The checkpoint; from the Hub if it is not a folder."""
        name = self.config.pretrained_model_name_or_path
        if Path(name).is_dir():
            return Path(name)
        parts = ("scheduler", "unet", "vae", "text_encoder", "tokenizer")
        ends = ("config.json", "diffusion_pytorch_model.safetensors", "model.safetensors")
        names = [f"{part}/{end}" for part in parts for end in ends]
        return fetch_checkpoint(name, *names, "tokenizer/*", "scheduler/*")

    @functools.cached_property
    def _encoders(self) -> tuple[str, str]:
        text = [self.folder / part for part in ("text_encoder", "tokenizer")]
        return fingerprint([self.folder / "vae"]), fingerprint(text, str(self.dtype))

    @functools.cached_property
    def _base(self) -> str:
        return fingerprint([self.folder / "unet", self.folder / "scheduler"])

    def key_of(self, job: Picture | Change | str) -> str:
        """Name of the entry of a picture's latents, a change map or a prompt."""
        if isinstance(job, str):
            return cache_key("sd prompt", encoder=self._encoders[1], prompt=job)
        places = [
            (picture.content, picture.size, picture.box, picture.flip)
            for picture in (job if isinstance(job, Change) else [job])
        ]
        if isinstance(job, Change):  # the VAE says how many pixels a latent covers
            return cache_key("sd change", vae=self._encoders[0], pictures=places)
        return cache_key("sd latent", vae=self._encoders[0], picture=places)

    def prompts(self) -> dict[str, str]:
        """The prompts that can be asked for, by what they are for."""
        config = self.config
        found = {"instance": config.instance_prompt}
        if config.with_prior_preservation:
            found["class"] = config.class_prompt or ""
        if config.validation_prompt is not None:
            found |= {"validation": config.validation_prompt, "nothing": ""}
        return found

    def class_picture(self, path: Path, size: tuple[int, int]) -> Picture:
        """A picture of the class in a size that the instances have."""
        box = cover_box(self.index.aspect(path), size[0] / size[1])
        return Picture(path, self.index.content(path), size, box)

    def cache_jobs(self) -> dict[str, Picture | Change | str]:
        """Every entry that training and validation can ask for: {key: what to encode}."""
        config = self.config
        jobs: list[Picture | Change | str] = list(self.prompts().values())
        sizes = set()
        for scene in self.scenes:
            for flip in (False, True) if config.random_flip else (False,):
                pictures = fit_scene(config, scene, self.index, flip)
                sizes.add(pictures[0].size)
                jobs += pictures
                if config.region_weight:
                    jobs += [Change(a, b) for a, b in itertools.combinations(pictures, 2)]
        jobs += [self.class_picture(path, size) for path in self.class_pictures for size in sizes]
        return {self.key_of(job): job for job in jobs}

    def _intact(self, key: str) -> bool:
        path = entry_path(self.cache_dir, key)
        try:
            return path.exists() and bool(read_entry(path))
        except ValueError as error:
            log.warning("%s; it is built again", error)
            return False

    def cache_embeddings(self) -> int:
        """Encode what is missing, a share per process; VAE and text encoder one after the other.

        Returns how many entries this process encoded; with nothing to do no model is loaded.
        """
        self.setup_accelerator()
        self.find_data()
        jobs = self.cache_jobs()
        # KEEP: shares of ALL entries; what is missing changes while other processes write
        share = sorted(jobs)[self.accelerator.process_index :: self.accelerator.num_processes]
        mine = {key: jobs[key] for key in share if not self._intact(key)}
        pictures = {key: job for key, job in mine.items() if not isinstance(job, str)}
        prompts = {key: job for key, job in mine.items() if isinstance(job, str)}
        log.info("cache: %d entries, %d to encode", len(jobs), len(mine))
        if pictures:
            vae = load_sd_vae(self.folder, self.device)
            factor = 2 ** (len(vae.config.block_out_channels) - 1)
            for key, job in progress(pictures.items(), "encode pictures"):
                if isinstance(job, Change):
                    tensors = {"change": change_map(*job, factor)}
                else:
                    tensors = {"latent": encode_sd(vae, to_pixels(load_picture(job)))[0]}
                write_entry(self.cache_dir, key, tensors)
            vae = None
            self._free()
        if prompts:
            tokenizer, encoder = load_clip(self.folder, self.dtype, self.device)
            for key, prompt in progress(prompts.items(), "encode prompts"):
                ids = tokenize(tokenizer, [prompt])
                if len(tokenizer.tokenize(prompt)) > ids.shape[1] - 2:  # start and end
                    log.warning("cut off after %d tokens: %s", ids.shape[1] - 2, prompt)
                with torch.no_grad():
                    embed = encoder(ids.to(self.device))[0]
                write_entry(self.cache_dir, key, {"embed": embed[0], "ids": ids[0]})
            encoder = None
            self._free()
        self.accelerator.wait_for_everyone()
        return len(mine)

    def _free(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @functools.lru_cache(maxsize=4096)  # noqa: B019 (as long as the trainer; 64 KB each)
    def entry(self, job: Picture | Change | str) -> dict[str, torch.Tensor]:
        """Tensors of an entry, on the CPU."""
        try:
            return read_entry(entry_path(self.cache_dir, self.key_of(job)))
        except ValueError as error:
            raise UserError(f"{error}. Repair: cache_embeddings.py --verify") from error

    # -- model

    def load_models(self) -> None:
        """The frozen UNet (and CLIP) with the adapters of the objective, and the optimizer."""
        import diffusers

        config = self.config
        alpha = config.lora_alpha or float(config.lora_rank)
        unet = diffusers.UNet2DConditionModel.from_pretrained(
            self.folder, subfolder="unet", dtype=self.dtype
        )
        unet = unet.to(self.device, memory_format=torch.channels_last)
        self.bare = {"unet": unet.eval().requires_grad_(False)}
        names = ("change", "copied") if config.objective == "copier" else ("change",)
        for name in names:
            ends = TARGETS[config.target_modules]
            add_adapter(unet, self.board, name, ends, config.lora_rank, alpha)
        if config.train_text_encoder:
            _, encoder = load_clip(self.folder, self.dtype, self.device)
            add_adapter(encoder, self.board, "change", TEXT_TARGETS, config.lora_rank, alpha)
            self.bare["text_encoder"] = encoder
        for part, model in self.bare.items():
            for name in names:
                start_adapter(model, name, config.seed, part, name)
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        if config.compile:
            unet.compile()
        self.trained = [p for m in self.bare.values() for p in m.parameters() if p.requires_grad]
        self._make_optimizer()
        # KEEP: DDP must wrap the models themselves, or gradients are never averaged
        self.models = {name: self.accelerator.prepare(m) for name, m in self.bare.items()}
        settings = read_model_json(str(self.folder), "scheduler/scheduler_config.json")
        settings.pop("_class_name", None)
        self.scheduler_config = settings
        self.alphas = diffusers.DDPMScheduler.from_config(settings).alphas_cumprod

    def _make_optimizer(self) -> None:
        from diffusers.optimization import get_scheduler

        config, processes = self.config, self.accelerator.num_processes
        rate = config.learning_rate
        if config.scale_lr:
            rate *= config.train_batch_size * config.gradient_accumulation_steps * processes
        options: dict[str, Any] = {
            "lr": rate,
            "betas": (config.adam_beta1, config.adam_beta2),
            "weight_decay": config.adam_weight_decay,
            "eps": config.adam_epsilon,
        }
        if config.use_8bit_adam:
            from bitsandbytes.optim import AdamW8bit

            self.optimizer = AdamW8bit(self.trained, **options)
        else:
            fused = self.device.type == "cuda"
            self.optimizer = torch.optim.AdamW(self.trained, fused=fused, **options)
        self.lr_scheduler = get_scheduler(
            config.lr_scheduler,
            self.optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=self.total_steps(),
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
        self.optimizer = self.accelerator.prepare(self.optimizer)

    def epoch_steps(self) -> int:
        """Steps of a pass over the data."""
        each = self.config.train_batch_size * self.config.gradient_accumulation_steps
        return math.ceil(len(self.scenes) / (each * self.accelerator.num_processes))

    def total_steps(self) -> int:
        """max_train_steps, or what num_train_epochs come to."""
        return self.config.max_train_steps or self.epoch_steps() * self.config.num_train_epochs

    def validation_interval(self) -> int:
        """Steps between two validation sheets."""
        config = self.config
        if config.validation_epochs:
            return config.validation_epochs * self.epoch_steps()
        return config.validation_steps or config.checkpointing_steps

    # -- objective

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device. KEEP pinned: the loop must not wait for the GPU here."""
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def embeds(
        self, prompts: Sequence[str], lanes: Sequence[Lane], models: dict[str, Any]
    ) -> torch.Tensor:
        """(B, 77, 768) of each prompt; through the adapted text encoder if `models` has one."""
        if "text_encoder" not in models:
            found = torch.stack([self.entry(prompt)["embed"] for prompt in prompts])
            return self.put(found)
        self.board.lanes = lanes
        ids = torch.stack([self.entry(prompt)["ids"] for prompt in prompts])
        return models["text_encoder"](self.put(ids))[0].to(self.dtype)

    def predict(
        self, unet: Any, noisy: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor, lanes: Any
    ) -> torch.Tensor:
        """The UNet's noise, fp32; noisy (B, 4, h, w), t (B,), embeds of 1 or B."""
        self.board.lanes = lanes
        noisy = noisy.to(self.dtype).contiguous(memory_format=torch.channels_last)
        embeds = embeds.expand(len(noisy), -1, -1)
        return unet(noisy, t, encoder_hidden_states=embeds, return_dict=False)[0].float()

    def noised(self, turns: Sequence[Turn], t: torch.Tensor) -> tuple[Noised, torch.Tensor | None]:
        """The batch on the device, and where its scenes change (B, 1, h, w)."""
        config, rows = self.config, []
        changes = []
        for turn in turns:
            scene = self.scenes[turn.scene]
            pictures = fit_scene(config, scene, self.index, turn.flip)
            low, high = (self.entry(pictures[i])["latent"] for i in (turn.low, turn.high))
            noise = normal(low.shape, config.seed, "noise", turn.visit)
            if config.noise_offset:
                shift = normal((low.shape[0], 1, 1), config.seed, "offset", turn.visit)
                noise = noise + config.noise_offset * shift
            scales = [torch.tensor(scene.scales[i]) for i in (turn.low, turn.high)]
            rows.append((low, high, *scales, noise))
            if config.region_weight:
                pair = Change(pictures[turn.low], pictures[turn.high])
                changes.append(self.entry(pair)["change"])
        stacked = [torch.stack(column) for column in zip(*rows, strict=True)]
        low, high, low_scale, high_scale, noise = (self.put(x) for x in stacked)
        alphas = self.put(self.alphas[t])
        embeds = self.put(self.entry(config.instance_prompt)["embed"])[None]

        @torch.no_grad()
        def base(noisy: torch.Tensor) -> torch.Tensor:
            times = self.put(t).repeat(len(noisy) // len(t))
            return self.predict(self.bare["unet"], noisy, times, embeds, [()])

        noised = Noised(
            add_noise_sd(low, noise, alphas),
            add_noise_sd(high, noise, alphas),
            config.pair_multiplier * low_scale,
            config.pair_multiplier * high_scale,
            noise,
            base,
            self.step / self.total_steps(),
        )
        return noised, self.put(torch.stack(changes)) if changes else None

    def class_term(self, turns: Sequence[Turn], t: torch.Tensor) -> Term:
        """Prior preservation: the class keeps its look."""
        config, rows = self.config, []
        size = fit_scene(config, self.scenes[turns[0].scene], self.index)[0].size
        for turn in turns:
            number = int(uniform(config.seed, "class", turn.visit) * len(self.class_pictures))
            picture = self.class_picture(self.class_pictures[number], size)
            latent = self.entry(picture)["latent"]
            rows.append((latent, normal(latent.shape, config.seed, "class noise", turn.visit)))
        latents, noise = (self.put(torch.stack(x)) for x in zip(*rows, strict=True))
        noisy = add_noise_sd(latents, noise, self.put(self.alphas[t]))
        weight = config.prior_loss_weight
        return Term("class", noisy, noise, (On("change"),), weight, "class")

    def training_loss(self, turns: Sequence[Turn]) -> dict[str, torch.Tensor]:
        """Weighted loss of every term, all of them in one forward."""
        config = self.config
        t = torch.tensor([draw_timestep(config, turn.visit) for turn in turns])
        noised, change = self.noised(turns, t)
        terms = OBJECTIVES[config.objective](noised)
        if config.with_prior_preservation:
            terms.append(self.class_term(turns, t))
        lanes = [term.lane for term in terms]
        prompts = {"instance": config.instance_prompt, "class": config.class_prompt or ""}
        asked = [prompts[term.prompt] for term in terms for _ in turns]
        embeds = self.embeds(asked, lanes, self.models)
        noisy = torch.cat([term.noisy for term in terms])
        times = self.put(t).repeat(len(terms))
        predicted = self.predict(self.models["unet"], noisy, times, embeds, lanes)
        weights = self.put(snr_weight(self.alphas[t], config.snr_gamma))
        losses = {}
        for term, noise in zip(terms, predicted.chunk(len(terms)), strict=True):
            error = ERRORS[config.loss_type](noise - term.target, config.huber_c)
            if change is not None and term.prompt == "instance":
                error = error * region_weights(change, config.region_weight)
            losses[term.name] = term.weight * (weights * error.mean(dim=(1, 2, 3))).mean()
        return losses

    # -- the loop

    def fit(self) -> None:
        """Cache, load, train, calibrate, save."""
        self.setup_accelerator()
        alone = self.accelerator.is_main_process
        with only_run(self.config.output_dir) if alone else contextlib.nullcontext():
            self._fit()

    def _fit(self) -> None:
        self.find_data()
        config, main = self.config, self.accelerator.is_main_process
        self._check_length()
        found = resume_point(config.resume_from_checkpoint, config.output_dir, self.trained_as())
        if main and not found:
            set_run_aside(config.output_dir)
        self.cache_embeddings()
        self.load_models()
        if found:
            self._restore(*found)
        metrics = None
        if main:
            run_record(config.output_dir, config, Path(__file__))
            metrics = MetricLog(config.output_dir / "metrics.jsonl", self.step)
            self._draw_first()
        if config.report_to != "none":
            self.accelerator.init_trackers(
                "dreambooth",
                {"config": config.model_dump_json()},
                {"wandb": {"dir": str(config.output_dir)}},
            )
        with StopSignal() as stop:
            stopped = self._loop(stop, metrics)
        if metrics:
            metrics.close()
        if main:
            self.save_result(calibrated=not stopped)
            write_report(config.output_dir)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        word = "stopped" if stopped else "done"
        log.info("%s at step %d: %s", word, self.step, config.output_dir / LORA_FILE)

    def _check_length(self) -> None:
        """Raises UserError where the run is too short for its settings."""
        config, steps = self.config, self.total_steps()
        falls = not config.lr_scheduler.startswith("constant")
        if falls and config.lr_warmup_steps >= steps:
            raise UserError(
                f"lr_warmup_steps: {config.lr_warmup_steps}, but the run has {steps} steps; "
                f"lr_scheduler {config.lr_scheduler} needs some after the warm-up"
            )
        if config.objective == "copier" and steps < 2:
            raise UserError("max_train_steps: pair_objective copier has two phases: 2 or more")

    def trained_as(self) -> dict[str, Any]:
        """All that decides what a run learns."""
        config = self.config
        settings = config.model_dump(mode="json", exclude={*MAY_DIFFER, "max_train_steps"})
        # a schedule and the phases of copier hang on the length; other runs may go on for longer
        fixed = not config.lr_scheduler.startswith("constant") or config.objective == "copier"
        files = [file for scene in self.scenes for file in scene.files] + self.class_pictures
        content = [self.index.content(file) for file in files]
        batches = config.gradient_accumulation_steps * self.accelerator.num_processes
        return {
            **settings,
            "pictures": draw_key(content),
            "base": self._base,
            **({"max_train_steps": self.total_steps()} if fixed else {}),
            "batches_per_step": batches,
        }

    def _loop(self, stop: StopSignal, metrics: MetricLog | None) -> bool:
        config, accelerator, steps = self.config, self.accelerator, self.total_steps()
        each, processes = config.gradient_accumulation_steps, accelerator.num_processes
        validating = self.validation_interval()
        window: list[
            tuple[list[str], torch.Tensor]
        ] = []  # (scenes, losses) since the last log line
        bar = progress(None, "train", total=steps, initial=self.step, unit="step")
        clock, stopped = time.monotonic(), False  # the clock stands still while saving
        while self.step < steps and not stopped:
            names: list[str] = []
            parts: list[dict[str, torch.Tensor]] = []
            for micro in range(each):
                batch = (self.step * each + micro) * processes + accelerator.process_index
                turns = draw_turns(config, batch, self.scenes, self.batches)
                with self._synced(micro == each - 1):
                    losses = self.training_loss(turns)
                    accelerator.backward(torch.stack(list(losses.values())).sum() / each)
                names += [self.scenes[turn.scene].name for turn in turns]
                parts.append({name: loss.detach() for name, loss in losses.items()})
            accelerator.clip_grad_norm_(self.trained, config.max_grad_norm)
            self.optimizer.step()
            self.lr_scheduler.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            bar.update()
            values = torch.stack([torch.stack(list(part.values())) for part in parts]).mean(0)
            window.append((names, values.sum()))
            logging_now = self.step % config.logging_steps == 0
            stopped = self._agree(stop.requested, logging_now or self.step % 100 == 0)
            saving = stopped or self.step == steps or self.step % config.checkpointing_steps == 0
            if saving or logging_now:
                pace = (time.monotonic() - clock) / len(window)
                shown = dict(zip(parts[0], values.tolist(), strict=True))
                self._log(bar, metrics, self._mean(window), shown, pace)
                window, clock = [], time.monotonic()
            pause = time.monotonic()
            if saving:
                self.save_checkpoint()
            if not stopped and (self.step == steps or self.step % validating == 0):
                self.validate()
            clock += time.monotonic() - pause
        bar.close()
        return stopped

    @contextlib.contextmanager
    def _synced(self, last: bool) -> Any:
        """Processes average their gradients once, with the last forward pass of a step."""
        with contextlib.ExitStack() as stack:
            for model in self.models.values():
                stack.enter_context(
                    contextlib.nullcontext() if last else self.accelerator.no_sync(model)
                )
            yield

    def _agree(self, requested: bool, now: bool) -> bool:
        """Whether any process got a stop signal; several ask each other only when it is `now`."""
        if self.accelerator.num_processes == 1:
            return requested
        if not now:
            return False
        if requested:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def _mean(self, window: Sequence[tuple[list[str], torch.Tensor]]) -> float:
        """Mean loss over steps and processes. Raises UserError when it is not finite."""
        losses = self.accelerator.reduce(torch.stack([loss for _, loss in window]), "mean")
        bad = (~torch.isfinite(losses)).nonzero()
        if len(bad):
            first = int(bad[0])
            kept = list_checkpoints(self.config.output_dir)
            raise UserError(
                f"the loss of step {self.step - len(window) + first + 1} is "
                f"{losses[first].item()}; pictures of this process: "
                f"{', '.join(window[first][0])}. Nothing was saved since "
                f"{kept[-1].name if kept else 'the start'}; lower learning_rate or look at them"
            )
        return losses.mean().item()

    def _log(
        self, bar: Any, metrics: MetricLog | None, loss: float, last: dict[str, float], pace: float
    ) -> None:
        """One line on the screen, the same values in metrics.jsonl and the trackers."""
        steps = self.total_steps()
        values = {
            "loss": loss,
            **{f"last_{name}": value for name, value in last.items()},
            "lr": float(self.lr_scheduler.get_last_lr()[0]),
            "seconds_per_step": pace,
            "memory_gb": memory_gb(self.device),
        }
        left = datetime.timedelta(seconds=round(pace * (steps - self.step)))
        if metrics:
            bar.write(
                f"step {self.step}/{steps} loss {loss:.4f} lr {values['lr']:.1e} "
                f"{pace:.3f} s/step {values['memory_gb']:.1f} GB eta {left}"
            )
            metrics.write(self.step, **values)
        self.accelerator.log(values, step=self.step)

    # -- what a run leaves

    def save_checkpoint(self) -> None:
        """checkpoint-<step>/: LoRA file, raw adapters, optimizer, schedule; complete or absent."""
        if not torch.stack([p.isfinite().all() for p in self.trained]).all():
            raise UserError(
                f"the weights of step {self.step} are not finite; nothing of it was saved. Lower "
                "learning_rate"
            )
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            training = {
                "adapters": [p.detach().cpu() for p in self.trained],
                "optimizer": self.optimizer.state_dict(),
                "lr_scheduler": self.lr_scheduler.state_dict(),
                "scaler": scaler.state_dict() if scaler else None,
            }

            def write(place: Path) -> None:
                save_lora(
                    place / LORA_FILE, adapter_tensors(self.bare, "change", 1.0), self.about()
                )
                torch.save(training, place / "training_state.pt")
                state = {
                    "step": self.step,
                    "files": {file.name: hash_file(file) for file in place.iterdir()},
                    "trained_as": self.trained_as(),
                }
                (place / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")

            place = self.config.output_dir / f"checkpoint-{self.step}"
            try:
                save_folder_atomic(place, write)
            except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch.save
                raise UserError(
                    f"{place} cannot be written: {error}. What was saved before is complete; make "
                    "room, then --resume_from_checkpoint latest"
                ) from error
            if limit := self.config.checkpoints_total_limit:
                kept = list_checkpoints(self.config.output_dir)
                kept = kept[: kept.index(place) + 1]  # a later one is damaged: it counts nothing
                for old in kept[:-limit]:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _restore(self, place: Path, state: dict[str, Any]) -> None:
        saved = torch.load(place / "training_state.pt", map_location="cpu", weights_only=True)
        for parameter, value in zip(self.trained, saved["adapters"], strict=True):
            parameter.copy_(value)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.lr_scheduler.load_state_dict(saved["lr_scheduler"])
        if saved["scaler"]:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.step = state["step"]
        log.info("resumed from %s (step %d)", place, self.step)

    def about(self) -> dict[str, Any]:
        """What a LoRA file says about itself."""
        config = self.config
        keys = (
            "lora_rank", "target_modules", "instance_prompt", "resolution", "pair_multiplier",
            "timestep_min", "timestep_max", "train_text_encoder", "seed",
        )  # fmt: skip
        return {
            "script": "train_dreambooth_pairs.py",
            "base_model": config.pretrained_model_name_or_path,
            "objective": config.objective,
            "lora_alpha": config.lora_alpha or config.lora_rank,
            "step": self.step,
            **{key: getattr(config, key) for key in keys},
        }

    def save_result(self, calibrated: bool) -> None:
        """The LoRA file of the run, at the strength that `calibrate` asks for, and the card."""
        config, factor = self.config, 1.0
        by_itself = config.objective == "difference"
        if calibrated and (by_itself if config.calibrate is None else config.calibrate):
            factor = self.full_change()
            log.info("calibrated: one full change is %.3g times the trained strength", factor)
        tensors = adapter_tensors(self.bare, "change", factor)
        about = self.about() | {"calibration": factor}
        save_lora(config.output_dir / LORA_FILE, tensors, about)
        if config.export == "kohya":
            alpha = config.lora_alpha or float(config.lora_rank)
            save_kohya(config.output_dir / KOHYA_FILE, tensors, alpha)
        text = DREAMBOOTH_CARD.format(**about, file=LORA_FILE)
        path = config.output_dir / "README.md"
        save_atomic(path, lambda file: file.write_text(text, encoding="utf-8"))

    @torch.no_grad()
    def full_change(self, most: int = 8, steps: int = 20, skip: float = 0.2) -> float:
        """The strength at which the befores become the afters: one whole change.

        Edits the first pairs as generate.py edits photos (edit-friendly DDPM, no guidance) at
        several strengths. <edit - before, after - before> / |after - before|^2 says how far each
        went; where the mean of that is 1 is found between two of them.
        """
        strengths = self.config.pair_multiplier * torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0])
        spans = [scene.scales[-1] - scene.scales[0] for scene in self.scenes]
        scenes = [s for s, span in zip(self.scenes, spans, strict=True) if span == max(spans)]
        went = torch.stack([self._went(s, strengths, steps, skip) for s in scenes[:most]]).mean(0)
        log.info("strength %s goes %s of the way", _rounded(strengths), _rounded(went))
        if (went < 1).all():
            log.warning("%.2f of a whole change is the most; train longer", went.max())
            learnt = went.max() > 0.25  # else the strengths tell nothing
            return strengths[went.argmax()].item() if learnt else 1.0
        high = int((went >= 1).nonzero()[0])
        share = (1 - went[high - 1]) / (went[high] - went[high - 1])
        return torch.lerp(strengths[high - 1], strengths[high], share).item()

    def _went(self, scene: Scene, strengths: torch.Tensor, steps: int, skip: float) -> torch.Tensor:
        """Share of the way from first to last that edits of the first one go, (strengths)."""
        pictures = fit_scene(self.config, scene, self.index)
        ends = [self.entry(pictures[k])["latent"].to(self.device)[None] for k in (0, -1)]
        embeds = self.entry(self.config.instance_prompt)["embed"].to(self.device)[None]
        levels = sd_levels(self.scheduler_config, steps, skip)
        noises = [normal(ends[0].shape, "calibrate", k) for k in range(len(levels.timesteps))]

        def predict(latents: torch.Tensor, t: int, lane: Lane = ()) -> torch.Tensor:
            times = torch.full((len(latents),), t, device=self.device)
            return self.predict(self.bare["unet"], latents, times, embeds, [lane])

        path = ddpm_path(ends[0], levels, torch.stack(noises).to(self.device))
        means = path_means(path, levels, predict, 1.0)
        lane = (On("change", strengths.to(self.device)),)
        path = [x.expand(len(strengths), -1, -1, -1) for x in path]
        change = ends[1] - ends[0]
        edited = follow_path(path, means, levels, functools.partial(predict, lane=lane), 1.0)
        return (((edited - ends[0]) * change).sum((1, 2, 3)) / change.square().sum()).cpu()

    def _draw_first(self) -> None:
        """samples/pairs.png: what the model sees."""
        scenes = self.scenes[:8]
        rows = [[load_picture(p) for p in fit_scene(self.config, s, self.index)] for s in scenes]
        sheet = contact_sheet(rows, captions=[scene.name for scene in scenes])
        path = self.config.output_dir / "samples/pairs.png"
        save_atomic(path, lambda file: sheet.save(file, format="PNG"))

    @torch.no_grad()
    def validate(self) -> None:
        """samples/step-<n>.png: validation_prompt at every strength, a row per seed."""
        config = self.config
        if config.validation_prompt is None:
            return
        if self.accelerator.is_main_process:
            prompts = [config.validation_prompt, ""]
            unet, vae = self.bare["unet"], load_sd_vae(self.folder, self.device)
            side = config.resolution // 2 ** (len(vae.config.block_out_channels) - 1)
            rows = []
            for seed in range(config.num_validation_images):
                draw = torch.Generator().manual_seed(seed)
                noise = torch.randn(
                    (1, unet.config.in_channels, side, side), generator=draw, dtype=self.dtype
                )
                scales = config.validation_scales
                predict = self.guided(prompts)
                latents = draw_sd(
                    predict,
                    noise.to(self.device).float(),
                    self.scheduler_config,
                    config.validation_inference_steps,
                    scales,
                )
                rows.append([to_image(decode_sd(vae, x[None])[0]) for x in latents])
            heads = [f"strength {scale:g}" for scale in scales]
            captions = [
                f"step {self.step}, seed {seed}: {config.validation_prompt}"
                for seed in range(config.num_validation_images)
            ]
            sheet = contact_sheet(rows, heads, captions)
            path = config.output_dir / f"samples/step-{self.step:06d}.png"
            save_atomic(path, lambda file: sheet.save(file, format="PNG"))
            track_picture(self.accelerator, "validation", sheet, self.step)
        self.accelerator.wait_for_everyone()

    def guided(self, prompts: Sequence[str]) -> Predict:
        """Noise under classifier-free guidance with the adapter at given strengths."""
        scale = self.config.validation_guidance_scale
        bare = self.bare  # no DDP around a picture of one process

        def predict(latents: torch.Tensor, t: Any, strengths: torch.Tensor) -> torch.Tensor:
            lane: Lane = (On("change", strengths),) if strengths.any() else ()
            times = torch.full((len(latents),), int(t), device=self.device)
            found = []
            for prompt in prompts if scale > 1 else prompts[:1]:
                embeds = self.embeds([prompt] * len(latents), [lane], bare)
                found.append(self.predict(bare["unet"], latents, times, embeds, [lane]))
            return found[-1] + scale * (found[0] - found[-1]) if scale > 1 else found[0]

        return predict


DREAMBOOTH_CARD = """---
base_model: {base_model}
library_name: diffusers
tags: [text-to-image, lora, stable-diffusion, {objective}]
---
# LoRA for {base_model}

Trained with train_dreambooth_pairs.py ({objective}) to step {step}: rank {lora_rank}, alpha
{lora_alpha:g} (folded into the weights), calibration {calibration:g}. Prompt: "{instance_prompt}".

    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained("{base_model}")
    pipe.load_lora_weights(".", weight_name="{file}")
    pipe.set_adapters("default_0", 0.5)  # half of it
"""


# --- 9. plan: memory and time, before anything is loaded ------------------------------------------


TFLOPS = {"RTX 4090": 165, "A100": 312, "H100, H200": 790}  # 16 bit, dense, as published


def empty_unet(name: str) -> Any:
    """UNet2DConditionModel without weights."""
    import diffusers
    from accelerate import init_empty_weights

    with init_empty_weights():
        return diffusers.UNet2DConditionModel.from_config(read_model_json(name, "unet/config.json"))


def forward_cost(unet: Any, rows: int, area_px: float) -> tuple[float, float]:
    """(TFLOP of a forward pass, GB in 16 bit of what it keeps for backward); unet: without weights.

    Both are counted on a pass of one row of about that area; the pass computes nothing.
    """
    from torch.utils.flop_counter import FlopCounterMode

    side = round(math.sqrt(area_px) / SIZE_MULTIPLE) * SIZE_MULTIPLE // 8
    noisy = torch.empty(1, unet.config.in_channels, side, side, device="meta")
    text = torch.empty(1, 77, unet.config.cross_attention_dim, device="meta")
    weights = [p.untyped_storage() for p in unet.parameters()]
    known, kept = {id(storage) for storage in weights}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        attention = (
            tensor.dim() > 2 and tensor.shape[-2] == tensor.shape[-1] >= 256
        )  # a GPU keeps none
        if id(storage) not in known and not attention:
            kept[id(storage)] = storage, storage.nbytes() / tensor.element_size()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, hooks:
        unet(noisy.requires_grad_(), torch.zeros(1, device="meta"), encoder_hidden_states=text)
    gb = sum(numbers for _, numbers in kept.values()) * 2 / 1e9
    return rows * counter.get_total_flops() / 1e12, rows * gb


# differs: each script plans its own run
def plan(config: Config) -> str:
    """Data, adapter, memory, time. Loads no model."""
    unet = empty_unet(config.pretrained_model_name_or_path)
    index, sizes = FileIndex(config.cache_dir), Counter[tuple[int, int]]()
    scenes = find_scenes(config)[0]
    for scene in scenes:
        sizes[fit_scene(config, scene, index)[0].size] += 1
    add_adapter(unet, Switchboard(), "change", TARGETS[config.target_modules], config.lora_rank, 1)
    layers = adapted_layers(unet, "change")
    adapter = sum(x.down["change"].numel() + x.up["change"].numel() for x in layers.values())
    weights = sum(p.numel() for p in unet.parameters()) - adapter
    sides = 1 if config.objective in ("instance", "copier") else 2
    rows = config.train_batch_size * sides
    rows += config.train_batch_size if config.with_prior_preservation else 0
    area = max((w * h for w, h in sizes), default=config.resolution**2)
    size = 4 if config.mixed_precision == "no" else 2
    tflop, activations = forward_cost(unet, rows, area)
    passes = 4 if config.gradient_checkpointing else 3
    tflop *= passes + (config.objective == "difference")  # the base's own prediction
    total = weights * size / 1e9 + adapter * 16 / 1e9 + activations
    lines = [
        f"Scenes       {', '.join(f'{n} of {w} x {h} px' for (w, h), n in sizes.items())}",
        f"UNet         {weights / 1e6:.0f} million parameters; adapter on {len(layers)} layers, "
        f"{adapter / 1e6:.2f} million",
        f"Memory       about {total:.1f} GB while training (weights {weights * size / 1e9:.1f}, "
        f"adapter {adapter * 16 / 1e9:.2f}, activations {activations:.1f})",
        f"Step         {rows} rows of {config.objective}, {tflop:.1f} TFLOP",
    ]
    for name, speed in TFLOPS.items():
        lines.append(f"  {name} at a quarter of its speed: {tflop / (speed / 4):.3f} s a step")
    return "\n".join(lines)


# --- 10. main -------------------------------------------------------------------------------------


def main() -> None:
    """Settings -> audit -> fit, or with --plan only what it would be."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    argv = repeat_flags(sys.argv[1:])
    given = [arg for arg in argv if arg != "--plan"]
    config = load_config(Config, given, check=audit)
    if len(given) < len(argv):
        print(plan(config))
    else:
        DreamBoothPairsTrainer(config).fit()


if __name__ == "__main__":
    run_script(main)
