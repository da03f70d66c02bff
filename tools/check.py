"""What can be known to be wrong before a model loads, beyond the settings' own types.

The scripts call problems() through utils.check_setup(); nothing here is needed for a run.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import itertools
import json
import logging
import math
import netrc
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import UserError, checksum, expanded, named, nearest, read_model_json, read_text

OURS = ("index.jsonl", "metrics.jsonl", ".lock", ".writer", "run.json", "config.yaml", "README.md")
MOST_CHARACTERS = 20_000
MOST_FACTOR = 1e5  # in a LoRA; what is larger draws black or grey
CONTROL_TOKEN = re.compile(r"<\|[^\s|<>]{1,40}\|>|</s>|<pad>|<unk>|<extra_id_\d+>|</?tool_call>")
NO_TEXT = re.compile(r"[\0\ud800-\udfff]")  # half a character, or the end of a C string
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
LAYERS = ("down_blocks.0.attentions.0.transformer_blocks.10.attn1.to_out.0", "x" * 40)
ABOUT = "image_edit_lora"  # what our trainers tell about a LoRA
SAVE = "save_pretrained('FOLDER') in Python makes a folder of plain .safetensors"

log = logging.getLogger("check")


def problems(
    model: tuple[str, str, Mapping[str, str]] | None = None,
    writes: Mapping[str, Path] | None = None,
    reads: Iterable[Path] = (),
    apart: Mapping[str, Path] | None = None,
    devices: Mapping[str, str | None] | None = None,
    packages: Iterable[str] = (),
    texts: Mapping[str, str] | None = None,
    patterns: Mapping[str, str] | None = None,
    loras: Iterable[Path] = (),
    folded: Iterable[Path] = (),
    one_card: bool = False,
    hub: str | None = None,
) -> list[str]:
    """Return every problem, one line each.

    model: (setting, folder or Hub id, {part: what the name of its class begins with}); writes:
    {setting: folder that is written}; reads: folders that are read with all below them; apart:
    {setting: such a folder that no other may share}; devices: {setting: device or None}; packages:
    that must be installed, or an optimizer's class; texts: {place: prompt or caption}; patterns:
    {setting: expression}; loras: files in .safetensors (others are left alone); folded: such whose
    alpha must be their r; one_card: the model fits one, so that FSDP is refused; hub: repository
    that the result is uploaded to.
    """
    found = check_parts(*model) if model else []
    found += check_places(writes or {}, apart or {}, reads)
    for name, device in (devices or {}).items():
        found += check_device(name, device)
    found += [text for package in packages for text in check_package(package)]
    found += [text for file in sorted(loras) for text in check_lora(file)]
    found += [text for file in sorted(folded) for text in check_lora(file, True)]
    found += check_texts(texts or {}) + check_patterns(patterns or {})
    return found + check_launcher(one_card) + (check_hub(hub) if hub is not None else [])


def check_hub(repo: str) -> list[str]:
    """Return problems of a repository that is uploaded to; does not ask the Hub."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    found = [] if get_token() else ["push_to_hub: no token of the Hub; hf auth login"]
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        return [*found, f"push_to_hub: {error}"]
    return found if "/" in repo else [*found, f"push_to_hub: {repo} is no USER/NAME"]


def check_optimizer(path: str) -> list[str]:
    """Return problems of an optimizer that a loop of gradients cannot drive."""
    module, _, name = path.rpartition(".")
    with contextlib.suppress(ImportError, AttributeError, ValueError):  # said when it is made
        step = inspect.signature(getattr(importlib.import_module(module), name).step)
        closure = step.parameters.get("closure")
        if closure and closure.default is inspect.Parameter.empty:
            return [f"optimizer.class_path: {path} wants a closure, which the loop does not have"]
        if name == "SparseAdam":
            return [f"optimizer.class_path: {path} wants sparse gradients"]
    return []


def check_package(name: str) -> list[str]:
    """Return problems of a package that the settings need: not installed, or without its key."""
    root = name.partition(".")[0]
    if root and importlib.util.find_spec(root) is None:
        return [f"{name} is not installed: pip install {root}"]
    if "." in name:
        return check_optimizer(name)
    if name != "wandb" or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return []
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        if netrc.netrc().authenticators("api.wandb.ai"):
            return []
    known = os.environ.get("WANDB_API_KEY")
    return [] if known else ["wandb has no key: wandb login, or set WANDB_MODE=offline"]


@contextlib.contextmanager
def time_limit(seconds: int, what: str) -> Iterator[None]:
    """Raise UserError where `with` takes longer; where there are no alarms, do not."""

    def stop(*_: object) -> None:
        raise UserError(f"{what}: no end after {seconds} s")

    if not hasattr(signal, "alarm") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)  # an expression is interrupted, too
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


FSDP_SETTINGS = {  # what fully_shard() does here; all other settings of FSDP change nothing
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",  # train.gradient_checkpointing decides
}


def check_launcher(one_card: bool = False) -> list[str]:
    """Return problems of what `accelerate config` or a launcher may have set."""
    wrong = "ACCELERATE_USE_(DEEPSPEED|FSDP|MEGATRON_LM|PARALLELISM_CONFIG|TP)"
    numbers = {name: os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    if odd := [f"{name}={text}" for name, text in numbers.items() if not text.isdecimal()]:
        return [f"{', '.join(odd)}: a number is wanted; unset what a launcher has left"]
    given = [name for name, value in os.environ.items() if value.lower() in ("1", "true", "yes")]
    kinds = [name for name in given if re.fullmatch(wrong, name)]
    if kinds == ["ACCELERATE_USE_FSDP"] and not one_card:
        found = {name: os.environ.get(name, value) for name, value in FSDP_SETTINGS.items()}
        others = {name for name, value in found.items() if value.lower() != FSDP_SETTINGS[name]}
        text = "here, as in configs/accelerate/fsdp2.yaml"
        return [f"{n}={found[n]}: must be {FSDP_SETTINGS[n]} {text}" for n in sorted(others)]
    why = "what this script trains fits one card" if one_card else "what is trained is small"
    text = f"{why}; use configs/accelerate/ddp.yaml (docs/several_gpus.md has the figures)"
    return [f"{name}: {text}" for name in kinds]


def check_patterns(patterns: Mapping[str, Any]) -> list[str]:
    """Return problems of regular expressions: none, or no end on names of layers."""
    found = []
    for setting, pattern in patterns.items():
        try:
            with time_limit(5, setting):
                [re.fullmatch(pattern, name) for name in LAYERS]
        except (re.error, UserError) as error:
            found.append(f"{setting}: {error}")
    return found


PAIRED = {".lora_A": ".lora_B", ".lora_down": ".lora_up", ".lora.down": ".lora.up"}
PAIRED |= {up: down for down, up in PAIRED.items()}


def check_lora(file: Path, folded: bool = False) -> list[str]:
    """Return problems of a LoRA file: not readable, not whole, not finite, hostile settings."""
    if file.suffix != ".safetensors" and file.is_file():
        return []
    try:
        with named(f"LoRA {file}"):
            with safe_open(file, framework="pt") as opened:
                told, names = opened.metadata() or {}, list(opened.keys())
                tensors = {name: opened.get_tensor(name) for name in names}
            check_factors(tensors)
            if told.get("crc32", checksum(tensors)) != checksum(tensors):
                raise ValueError("damaged: its checksum is wrong")
            about = [json.loads(told.get(key, "{}")) for key in ("lora_adapter_metadata", ABOUT)]
            if not all(isinstance(its, dict) for its in about):
                raise ValueError("its metadata are no mappings of names to values")
            check_settings(about[0], tensors)
            if folded:
                check_folded(about[0])
            expressions: list[Any] = []  # that PEFT will match with the names of layers
            for name, value in about[0].items():
                if name.endswith("_pattern"):
                    expressions += dict(value or {})
                elif name.endswith("modules") and isinstance(value, str):
                    expressions.append(value)
    except UserError as error:
        return [str(error)]
    return check_patterns({f"LoRA {file}: {text!r}": text for text in expressions})


def check_factors(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError where a tensor is none of a LoRA, or lacks its other factor."""
    if bad := [n for n, t in tensors.items() if not (t.float().abs() <= MOST_FACTOR).all()]:
        text = f"tensors are not finite, or beyond {MOST_FACTOR:g}"
        raise ValueError(f"{len(bad)} of {len(tensors)} {text} ({bad[0]})")
    for name, tensor in tensors.items():
        end = next((end for end in PAIRED if end in name), None)
        if not end:
            continue
        if tensor.ndim < 2 or not tensor.numel() or not tensor.is_floating_point():
            shape = "x".join(map(str, tensor.shape)) or "one number"
            raise ValueError(f"{name} is no factor: {shape}, {tensor.dtype}")
        if name.replace(end, PAIRED[end]) not in tensors:
            raise ValueError(f"{name} has no {name.replace(end, PAIRED[end])} beside it")


def check_settings(settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError where PEFT's settings of a LoRA are none, or not those of its tensors."""
    ranks = {t.shape[0] for n, t in tensors.items() if ".lora_A" in n or "lora_down" in n}
    for name, value in settings.items():
        end = name.rpartition(".")[2]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if end in ("lora_alpha", "alpha", "r") and not (number and 0 < value <= MOST_FACTOR):
            text = f"wanted a number above 0, up to {MOST_FACTOR:g}"
            raise ValueError(f"{name} in its metadata is {value!r}; {text}")
        own = settings.get(f"{name.removesuffix('r')}rank_pattern")
        if end == "r" and ranks and value not in ranks and not own:
            raise ValueError(f"{name} in its metadata is {value}; its factors have {min(ranks)}")
        if end == "use_dora" and value and not any("magnitude" in key for key in tensors):
            raise ValueError(f"{name} in its metadata, but no magnitudes")


def check_folded(settings: Mapping[str, Any]) -> None:
    """Raise ValueError where a LoRA's strength is in its settings, and not in its factors."""
    for name, value in settings.items():
        part, _, end = name.rpartition(".")
        if end in ("lora_alpha", "alpha") and value != (rank := settings.get(f"{part}.r")):
            text = f"{value}, r {rank}: its strength would be lost; fold alpha / r into lora_B"
            raise ValueError(f"{name} in its metadata is {text}")
        if end == "use_rslora" and value:
            raise ValueError(f"{name} in its metadata: its strength would be lost; fold it in")


def check_shapes(rows: Iterable[Any], index: Any) -> list[str]:
    """Return problems of masks without a region; say which pictures are cropped to their result."""
    found, turned = [], []
    for row in rows:
        for path in filter(None, (row.before, row.after, row.mask)):
            aspects = index[path]["aspect"], index[row.edited]["aspect"]
            if math.log(aspects[0]) * math.log(aspects[1]) < -0.02:  # one is turned
                turned.append(str(path))
        if row.mask and "dark" in index[row.mask]:
            found.append(f"{row.mask} has no white (255): no region to look at")
    if turned:
        text = "%d picture(s) lie on another side than their results, and are cropped (%s)"
        log.warning(text, len(turned), turned[0])
    return found


COLUMNS = ("images", "image", "prompt", "name", "seed")


def check_row(row: Any) -> list[str]:
    """Return the problems of one row of a table."""
    if not isinstance(row, dict):
        return [f'wanted {{"images": [...], "prompt": "..."}}, got {str(row)[:40]}']
    problems = ["more cells than columns; quote a text with commas"] if None in row else []
    strange = sorted(row.keys() - {*COLUMNS, None})
    problems += [f"unknown column '{key}'{nearest(key, COLUMNS)}" for key in strange]
    images = row.get("images") or row.get("image")
    names = images if isinstance(images, list) else [images]
    names = [name for text in names for name in (text.split(";") if isinstance(text, str) else [0])]
    if not all(isinstance(name, str) and name.strip() for name in names):
        problems.append("no image, or one without a name")
    if not isinstance(name := row.get("name") or "", str) or name == "." or not name.isprintable():
        problems.append(f"name {name!r} is none for a file")
    if not isinstance(row.get("prompt") or "", str):
        problems.append(f"prompt {row['prompt']} is no text")
    seed = str(row.get("seed") or 0).strip()
    if not seed.isdecimal() or int(seed) >= 2**63:
        problems.append(f"seed '{seed}' is no whole number below 2^63")
    return problems


def check_texts(texts: Mapping[str, str]) -> list[str]:
    """Return problems of texts: control tokens of the model, more than an encoder takes."""
    found = []
    for place, text in texts.items():
        if NO_TEXT.search(text):
            found.append(f"{place}: {ascii(text)[:80]} is no text in UTF-8")
        elif token := CONTROL_TOKEN.search(text):
            found.append(f"{place}: {token[0]!r} is a control token of the model, not text")
        elif len(text) > MOST_CHARACTERS:
            found.append(f"{place}: {len(text):,} characters; at most {MOST_CHARACTERS:,} are read")
    return found


def check_places(
    writes: Mapping[str, Path], apart: Mapping[str, Path], reads: Iterable[Path]
) -> list[str]:
    """Return problems of folders: nothing can be written there, or one holds another."""
    found = [text for name, place in writes.items() for text in check_writable(name, place)]
    places = [*writes.items(), *apart.items(), *(("", place) for place in reads)]
    for (name, place), (_, other) in itertools.combinations(places, 2):
        a, b = place.resolve(), other.resolve()
        if name and (a.is_relative_to(b) or b.is_relative_to(a)):
            found.append(f"{name}: {place} and {other} lie in one another; move one")
    return found


NOTES = (  # what only the Qwen trainer asks
    "have a caption per line of their file; see caption_lines",
    "have no reference: they are trained as text to image",
)


def notes(samples: Iterable[Sequence[Any]]) -> list[str]:
    """Return what is done to samples unasked: a line per data set, with their number.

    samples: (data set, what look_at_picture() says, area in training in px, then of the Qwen
    trainer: caption lines? no references?).
    """
    found: Counter[tuple[str, str]] = Counter()
    for place, facts, area_px, *more in samples:
        if facts["width"] * facts["height"] * 2 < area_px:
            found[place, "are enlarged to more than twice their pixels; see resolution"] += 1
        if not 1 / 3 <= facts["aspect"] <= 3:
            found[place, "are longer than 3:1 and cut at their ends; crop them yourself"] += 1
        for text, is_so in zip(NOTES, more, strict=False):
            found[place, text] += bool(is_so)
    return [f"{place}: {n} sample(s) {text}" for (place, text), n in sorted(found.items()) if n]


def room(text: str) -> str:
    """Return how much is free at the place that a message of a full disk names."""
    named = re.search(r"(/[^\n]*?) cannot be written|: '([^'\n]+)'", text)
    place = Path((named and (named[1] or named[2])) or tempfile.gettempdir()).absolute()
    folder = next(place for place in (place, *place.parents) if place.is_dir())
    free_mb = shutil.disk_usage(folder).free / 1e6
    return f"; the disk is full: {free_mb:.1f} MB are free in {folder}; make room, then go on"


def check_writable(name: str, folder: Path) -> list[str]:
    """Make a folder; return a problem where nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            odd = [folder / n for n in OURS if (folder / n).exists() and not (folder / n).is_file()]
            return [f"{name}: {file} is no file; remove it" for file in odd]
    except FileExistsError:
        return [f"{name}: {folder} is a file; wanted a folder"]
    except (OSError, ValueError) as error:
        return [f"{name}: cannot write there: {error}"]


def takes_no_locks(folder: Path) -> bool:
    """Return whether a folder's file system refuses locks, as mounted buckets may; warn of it."""
    try:
        import fcntl  # not on Windows, whose locks are others

        folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.NamedTemporaryFile(dir=folder, prefix=".lock.")  # noqa: SIM115
    except (ImportError, OSError):
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            text = "has no locks (%s): nothing keeps a second run out of it"
            log.warning(f"the file system of %s {text}", folder, error.strerror)
            return True
    return False


def check_device(name: str, value: str | None) -> list[str]:
    """Return problems of a device setting on this machine; None is the default device."""
    try:
        if torch.empty(0, device=value).is_meta:
            return [f"{name}: meta computes nothing"]
    except (RuntimeError, AssertionError) as error:
        return [f"{name}: '{value}': {str(error).splitlines()[0]}"]
    return []


def check_parts(setting: str, name: str, parts: Mapping[str, str]) -> list[str]:
    """Return problems of a checkpoint's parts: missing, of another class, cut off.

    Reads configs and headers of weights; of a checkpoint on the Hub nothing.
    """
    found: list[str] = []
    try:
        folder = expanded(name)
    except ValueError:  # read_model_json() has named it
        return found
    for part, kind in parts.items() if folder.is_dir() else ():
        try:
            with named(f"{setting}: {folder / part}"):
                check_part(folder / part, kind)
        except UserError as error:
            text = str(error)
            found.append(text if text.startswith(setting) else f"{setting}: {text}")
    return found


def near(place: Path) -> str:
    """Return ", did you mean ...?" or what lies where a missing file or folder should lie."""
    if place.exists():
        return " (it is a file)"
    if not place.parent.is_dir():
        return f" (nor {place.parent}{near(place.parent)})"
    return nearest(place.name, sorted(x.name for x in place.parent.glob("[!.]*")))


def no_checkpoint(name: str) -> str:
    """Return what to say of a place that is no folder."""
    if not (place := expanded(name)).is_file():
        return f"no folder {name}{near(place)}"
    way = f"DiffusionPipeline.from_single_file({name!r}).save_pretrained('FOLDER')"
    return f"{name} is one file; make a folder of it: python -c with diffusers, {way}"


def check_part(place: Path, kind: str) -> None:
    """Raise ValueError, or what reading raises, where a part of a checkpoint is wrong."""
    files = {file.name for file in place.iterdir()}
    if not files:
        raise ValueError("the folder is empty")
    if place.name.startswith("tokenizer") and not files & {*VOCABULARIES}:
        raise ValueError(f"no vocabulary ({', '.join(VOCABULARIES)})")
    for file in files:
        if file.endswith(".json") and not isinstance(
            json.loads(read_text(place / file, 2**28)), dict
        ):
            raise ValueError(f"{file} is no mapping of names to values")
    if place.name.startswith(("tokenizer", "processor")):
        return
    scheduler = place.name == "scheduler"
    about = read_model_json(str(place), "scheduler_config.json" if scheduler else "config.json")
    is_a = about.get("_class_name") or ", ".join(about.get("architectures") or ["nothing known"])
    if not re.match(kind, is_a):
        raise ValueError(f"is {is_a}; another kind of model")
    if scheduler:
        return
    weights = {file for file in files if file.endswith(".safetensors")}
    for index in (file for file in files if file.endswith(".safetensors.index.json")):
        weights |= {*read_model_json(str(place), index)["weight_map"].values()}
    if not [file for file in weights if ".fp16." not in file]:
        there = ", ".join(sorted(files - {"config.json"})) or "none"
        raise ValueError(f"no plain .safetensors ({there}); {SAVE}")
    for file in weights:
        try:
            with safe_open(place / file, framework="pt"):
                pass  # its length must be what its header says
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file}: {error}") from error


def shared_pictures(data: Any, flavour: Any) -> list[str]:
    """Return problems of data for 2508 and 2.1, whose encoder sees the very pictures of the VAE."""
    config, most, smallest = data.config, flavour.most_references, math.inf
    edits = enumerate(config.validation.samples)
    wrong = {f"validation.samples.{i}" for i, edit in edits if len(edit.images) > most}
    for draw in data.possible_draws():
        v = data.samples[draw.sample].variants[draw.variant]
        if draw.view or draw.dropped or len(draw.vision or v.vision) < len(v.vision):
            continue
        whole = not any(reference.area for reference in v.references)
        wanted = 1 if most == 1 else min(len(v.references), most)
        fewer = v.vision_dropout and v.vision_min < max(1, len(v.vision))
        if len(v.references) != wanted or not whole or v.vision != v.references or fewer:
            wrong.add(f"data.dataset_configs.{data.samples[draw.sample].dataset}")
        shown = data.resolve(draw).pictures["vision"] if flavour.prefix_is_constant else ()
        smallest = min([smallest, *(math.prod(picture.size) for picture in shown)])
    count = "2508 takes one reference" if most == 1 else f"2.1 takes up to {most} references"
    text = f"{count}, and its encoder sees them as the VAE does: no resize, no dropout"
    found = [f"{place}: {text}" for place in sorted(wrong)]
    name, file = config.model.pretrained_model_name_or_path, "processor/preprocessor_config.json"
    settings = read_model_json(name, file) if Path(name).is_dir() else {}
    least = settings.get("size", {}).get("shortest_edge", 65_536)
    if smallest < least:
        text = f"{smallest} px; 2.1's encoder would enlarge what has less than {least}"
        found.append(f"data.reference_area (or resolution): a reference of {text}")
    return found
