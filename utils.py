"""What the scripts must agree on at run time, and what nobody edits.

What a researcher may want to change (objective, noise, pairing, bucketing, LoRA targets, devices)
lives in the scripts. A script runs with only this file beside it.
"""

from __future__ import annotations

import contextlib
import datetime
import difflib
import functools
import gc
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import os
import platform
import re
import shutil
import signal
import stat
import sys
import time
import types
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import numpy as np
import psutil
import torch
import yaml
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ValidationError, ValidationInfo, field_validator, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

MAX_PIXELS = 2**28  # of a picture that is read; a larger one takes more than 1 GB of memory
CACHE_FORMAT = 3  # raise it when entries change their meaning: old ones are then built again
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")  # never EPS: it runs Ghostscript
DISK_FULL = "No space left|Disk quota|File too large|file write failed|unexpected pos"  # torch's
SRGB_CRC32 = (0, 0x182EA552)  # no colour profile; sRGB IEC61966-2.1, which most programs write
OTHER_PICTURES = r".*\.(heic|heif|jxl|psd|svg|eps|tga|ppm|exr|jp2|dng|cr2|nef|arw|ico|pdf)"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".tif", *(f".{name.lower()}" for name in FORMATS))
_SORTED = json.JSONEncoder(sort_keys=True, default=str)
Facts = dict[str, Any]
C = TypeVar("C", bound="Section")

log = logging.getLogger("utils")


# --- 1. errors and signals ------------------------------------------------------------------------


class UserError(Exception):
    """A mistake the user can mend: printed as text, exit code 2, never a traceback."""


def run_script(main: Callable[[], None]) -> None:
    """Run `main`; a UserError becomes its message and exit code 2, Ctrl-C exit code 130."""
    name, rank = Path(sys.argv[0]).name, os.environ.get("RANK", "0")
    again = "resume_from_checkpoint: latest goes on" if "train_" in name else "run it again"
    if sys.getfilesystemencoding() != "utf-8":  # LC_ALL=C: file names could not be written out
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    gc.set_threshold(50_000)  # rows of large data sets are many objects, none of them garbage
    quiet = Path(__file__).parent / "tools/quiet.py"  # without it libraries say more
    tool = load_tool("quiet") if quiet.is_file() else None
    try:
        with tool.quiet() if tool else contextlib.nullcontext():
            main()
        if os.environ.get("WORLD_SIZE", "1") != "1":
            sys.stdout.flush()
            # KEEP: DDP holds the process group; its threads may abort an interpreter that ends
            os._exit(0)
        return
    except UserError as error:
        code, text = 2, f"{name}: {error}"
    except BrokenPipeError:  # `... --help | head`
        _hush(sys.stdout)
        sys.exit(0)
    except (OSError, RuntimeError, SafetensorError) as error:
        if not re.search(DISK_FULL, str(error)) and not getattr(error, "filename", None):
            raise
        code, text = 2, f"{name}: {error} (what was saved is complete; {again})"
    except KeyboardInterrupt:
        code, text = 130, f"stopped; what was saved is complete ({again})"
    text += from_tool("check", "room", "", text) if re.search(DISK_FULL, text) else ""
    if rank != "0" and os.environ.get("WORLD_SIZE", "1") != "1":
        time.sleep(3)  # let process 0 report in full before the launcher ends it
        text = f"process {rank}: {text.splitlines()[0]}"
    text = tool.paint(text, "red", sys.stderr) if tool else text
    print(f"\n{text}", file=sys.stderr, flush=True)
    sys.exit(code)


def _hush(*streams: Any) -> None:
    for stream in streams:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def listed(problems: Sequence[str], shown: int = 10) -> str:
    """Join problems one per line, the first `shown` in full, with a count of the rest."""
    rest = [f"  ... and {len(problems) - shown} more"] if len(problems) > shown else []
    return "\n".join([f"  - {problem}" for problem in problems[:shown]] + rest)


def nearest(name: str, names: Iterable[str]) -> str:
    """Return ", did you mean '...'?", or the list of the names there are."""
    if close := difflib.get_close_matches(name, there := list(names), n=1, cutoff=0.4):
        return f", did you mean '{close[0]}'?"
    return f" (there is: {', '.join(there[:10]) or 'none'}{', ...' if len(there) > 10 else ''})"


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
    """Turn what goes wrong in `with`, in a library that reads foreign files, into a UserError."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # each library that reads them has classes of its own
        reason = re.sub(r"^\[Errno \d+\] ", "", " ".join(str(error).split()))[:300]
        raise UserError(f"{what}: {reason or type(error).__name__}") from error


class StopSignal:
    """A context in which SIGTERM, SIGHUP or Ctrl-C sets `requested`; after one Ctrl-C stops."""

    def __enter__(self) -> StopSignal:
        self.requested, self._process = False, os.getpid()
        numbers = {signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)}
        numbers -= {n for n in numbers if signal.getsignal(n) == signal.SIG_IGN}  # as nohup has it
        self._before = {n: signal.signal(n, self._handle) for n in numbers}
        return self

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if os.getpid() != self._process:  # a data worker: it goes on until the loop has ended
            return
        if self.requested and number != signal.SIGTERM:  # which launchers pass on once more
            raise KeyboardInterrupt
        self.requested = True
        try:
            print(f"\n{signal.strsignal(number)}: saves, then stops (Ctrl-C: now)", file=sys.stderr)
        except OSError:  # the terminal is gone
            _hush(sys.stdout, sys.stderr)

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, accelerator: Any, ask: bool) -> bool:
        """Return whether any process got a signal; several ask each other (and wait) on `ask`."""
        if accelerator.num_processes == 1:
            return self.requested
        if ask and self.requested:
            accelerator.set_trigger()
        return ask and accelerator.check_trigger()


# --- 2. config: pydantic sections <- YAML or JSON <- dotted overrides -----------------------------


def expanded(path: str) -> Path:
    """Return the path with ~ replaced. Raises ValueError where it is empty or ~ names nobody."""
    with contextlib.suppress(RuntimeError):
        if path:  # Path("") is the working directory
            return Path(path).expanduser()
    raise ValueError(f"'{path}' is no place: empty, or the home of nobody")


class Section(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
):
    """Base of every config class: unknown keys are errors; a field's docstring is its help."""

    def rules(self) -> dict[str, Any]:
        """Return {problem: whether it is there} of settings that depend on one another."""
        return {}

    @field_validator("*", mode="before")
    @classmethod
    def _plain_path(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        if Path in (kind, *get_args(kind)):
            if isinstance(value, list):
                return [expanded(v) if isinstance(v, str) else v for v in value]
            return expanded(value) if isinstance(value, str) else value
        return value

    @model_validator(mode="after")
    def _follows_rules(self) -> Any:
        if wrong := [problem for problem, there in self.rules().items() if there]:
            raise ValueError("\n".join(wrong))
        return self


class _Loader(yaml.SafeLoader):
    """Every scalar but null is text, so that the type of the setting decides what `no` is."""

    yaml_implicit_resolvers = {  # type: ignore[misc]
        first: [pair for pair in pairs if pair[0].endswith((":null", ":merge"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if not key.tag.endswith(":merge")]
        if twice := [key for key in keys if keys.count(key) > 1]:
            problem = f"duplicate key '{twice[0]}'"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def settings(kind: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, field) of every leaf setting, also inside list[...] and dict[...]."""
    for arg in get_args(kind):
        nested = isinstance(arg, type) and issubclass(arg, Section) and type(None) in get_args(kind)
        yield from settings(arg, path if nested else f"{path}.*")
    if isinstance(kind, type) and issubclass(kind, Section):
        for name, field in kind.model_fields.items():
            below = list(settings(field.annotation, f"{path}.{name}"))
            yield from below or [(f"{path}.{name}".lstrip("."), field)]


def _assign(data: Any, key: str, value: Any) -> None:
    """Set a dotted key; missing sections are made, a list may be continued at its end."""
    name, _, rest = key.partition(".")
    place: Any = int(name) if isinstance(data, list) else name
    if isinstance(data, list) and place == len(data):
        data.append(None)
    if rest:
        below = data[place] if isinstance(data, list) else data.get(place)
        if not isinstance(below, dict | list):
            below = [] if rest.split(".")[0].isdigit() else {}
        _assign(below, rest, value)
        value = below
    data[place] = value


def _value(text: str) -> Any:
    """Read null, `{...}` and `[...]` as YAML does; all else stays text."""
    with contextlib.suppress(yaml.YAMLError):
        if text == "null" or text.lstrip()[:1] in ("{", "["):
            return yaml.load(text, _Loader)
    return text


def parse_args(argv: Sequence[str]) -> dict[str, list[list[str]]]:
    """Parse ["--a", "1", "2", "--a=3", "--b"] to {"a": [["1", "2"], ["3"]], "b": [[]]}."""
    given: dict[str, list[list[str]]] = {}
    for arg in argv:
        if arg.startswith("--") or arg == "-h":
            key, equals, text = ("help" if arg == "-h" else arg[2:]).partition("=")
            given.setdefault(key, []).append([text] if equals else [])
        elif not given:
            raise UserError(f"expected --name value, got '{arg}' (a file: --config FILE)")
        else:
            given[key][-1].append(arg)
    return given


def merge_overrides(data: Any, given: dict[str, list[list[str]]], lists: set[str]) -> list[str]:
    """Put flags into `data`, the last of equal ones or, in `lists`, all; return the problems."""
    problems = []
    for key, found in given.items():
        value, *more = [_value(text) for text in found[-1]] or ["true"]
        if re.sub(r"\.\d+(?=\.|$)", ".*", key) in lists and not isinstance(value, list | None):
            value = [_value(text) for texts in found for text in texts]
        elif more:
            problems.append(f"--{key}: one value is wanted, got {' '.join(found[-1])}")
        try:
            _assign(data, key, value)
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            problems.append(f"cannot set --{key} (a list wants a number, from 0): {error}")
    return problems


def read_config(text: str) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file. Raises UserError."""
    with named(f"--config {text or '(no file named)'}"):
        if not (path := expanded(text)).exists():
            raise ValueError(f"no such file{from_tool('check', 'near', '', path)}")
        if not isinstance(data := yaml.load(read_text(path), _Loader) or {}, dict):
            raise ValueError("the file must hold `name: value` pairs")
        return data


def load_config(
    cls: type[C], argv: Sequence[str] | None = None, check: Callable[[C], list[str]] | None = None
) -> C:
    """Build `cls` from `--config FILE` plus overrides such as `--model.lora.r 32`, which win.

    Raises UserError with every problem of the settings, or else with all that `check(config)` says.
    """
    given = parse_args(sys.argv[1:] if argv is None else argv)
    if "help" in given:
        print(load_tool("settings").help_text(cls, "".join(given["help"][-1])))
        sys.exit(0)
    data = read_config(" ".join(given.pop("config")[-1])) if "config" in given else {}
    shown = given.pop("print_config", None)
    lists = {path for path, field in settings(cls) if get_origin(field.annotation) is list}
    problems = merge_overrides(data, given, lists)
    try:
        config = cls.model_validate(data)
    except ValidationError as error:
        problems += from_tool("settings", "explain", [str(error)], cls, data, error)
    except OSError as error:  # of a rule that looks at a path
        problems.append(str(error))
    else:
        if shown and not problems:
            print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
            sys.exit(0)
        problems = [*dict.fromkeys(problems or (check(config) if check else []))]
    if count := len(problems):
        raise UserError(f"{count} problem(s), nothing was loaded\n{listed(problems, count)}")
    return config


def load_script(path: Path) -> types.ModuleType:
    """Import a script by its path: a training script, a fork of one, a tool. Raises UserError."""
    if not path.is_file() or path.suffix != ".py":
        raise UserError(f"no script {path}")
    spec: Any = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # KEEP: pydantic and pickle look classes up there
    with named(f"script {path}"):
        spec.loader.exec_module(module)
    return module


@functools.cache
def load_tool(name: str) -> types.ModuleType:
    """Import tools/<name>.py beside this file. Raises UserError where it was not copied along."""
    return load_script(Path(__file__).parent / "tools" / f"{name}.py")


def from_tool(name: str, function: str, otherwise: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function of a tool that a run does not need; `otherwise`, said, without the tool."""
    if (Path(__file__).parent / "tools" / f"{name}.py").is_file():
        return getattr(load_tool(name), function)(*args, **kwargs)
    log.warning("%s() is left out: tools/%s.py was not copied along", function, name)
    return otherwise


check_setup = functools.partial(from_tool, "check", "problems", [])  # before a model loads


# --- 3. randomness: every draw is a function of (seed, purpose, index) ----------------------------


def draw_key(*parts: object) -> int:
    """Return a 63-bit hash of the parts: the same on every machine, in every process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def uniform(*parts: object) -> float:
    """Return a draw from [0, 1) that belongs to the parts, e.g. `uniform(seed, "view", visit)`."""
    return draw_key(*parts) / 2**63


def normal(shape: Iterable[int], *parts: object) -> torch.Tensor:
    """Return standard normal noise that belongs to the parts; (shape), fp32, CPU."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(draw_key(*parts)))


def shuffled(n: int, *parts: object) -> list[int]:
    """Return a permutation of range(n) that belongs to the parts."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(draw_key(*parts))).tolist()


# --- 4. files and pictures ------------------------------------------------------------------------


def list_images(folder: Path) -> dict[str, list[Path]]:
    """Return {relative stem ("sub/a"): image files}, with nested folders, without hidden names."""
    found: dict[str, list[Path]] = {}
    for place, folders, names in os.walk(folder, followlinks=True):
        here = Path(place)
        above = {here.resolve(), *here.resolve().parents}  # a link may lead back
        folders[:] = sorted(f for f in folders if f[0] != "." and (here / f).resolve() not in above)
        prefix = Path(os.path.relpath(place, folder)).as_posix() + "/"
        for name in sorted(name for name in names if not name.startswith(".")):
            if not name.isascii() and re.search("[\ud800-\udfff]", name):  # no UTF-8
                raise UserError(f"{place}: a file is called {name!a}: rename it")
            stem, _, end = (prefix.removeprefix("./") + name).rpartition(".")
            if f".{end.lower()}" in IMAGE_SUFFIXES:
                found.setdefault(unicodedata.normalize("NFC", stem), []).append(here / name)
            elif re.fullmatch(OTHER_PICTURES, name.lower()):
                log.warning("%s is left out: convert it to PNG or JPEG", here / name)
    return found


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file for reading. Raises OSError also for a pipe or device, which may never end."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # of a pipe: at once
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("a folder, pipe or device where a file is wanted")
    return os.fdopen(descriptor, "rb")


def read_text(path: Path, most_bytes: int = 2**20) -> str:
    """Read a text file in UTF-8. Raises OSError or ValueError: none, or larger than is read."""
    with open_regular(path) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"larger than {most_bytes:,} bytes")
    return data.decode("utf-8-sig")


def hash_file(path: Path) -> str:
    """Return blake2b of a file's bytes, 32 hex digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


class FileIndex:
    """Facts about files by path, size and time; processes append to `folder/index.jsonl`."""

    def __init__(self, folder: Path | None) -> None:
        self._facts: dict[str, tuple[str, dict[str, Any]]] = {}  # path: (stamp, facts)
        self._file = folder / "index.jsonl" if folder else None
        if self._file and self._file.is_file():
            with self._file.open(encoding="utf-8", errors="replace") as file:
                while lines := [line.rstrip("\n") for line in file.readlines(2**20)]:
                    whole = [x[9:] for x in lines if x[:8] == f"{zlib.crc32(x[9:].encode()):08x}"]
                    self._facts |= {p: (s, f) for p, s, f in json.loads(f"[{','.join(whole)}]")}

    def update(self, paths: Iterable[Any], look: Callable[[Path], dict[str, Any]]) -> list[str]:
        """Record `look(path)` of every file that is new or has changed; return what it raised."""
        new: list[tuple[str, str]] = []
        for path in map(os.fspath, paths):
            stamp = ""
            with contextlib.suppress(OSError):
                found = os.stat(path)  # noqa: PTH116 - 200,000 Paths would take 0.4 s
                stamp = f"{CACHE_FORMAT}:{found.st_size}:{found.st_mtime_ns}"
            if not stamp or self._facts.get(path, ("", {}))[0] != stamp:
                new.append((path, stamp))

        def attempt(entry: tuple[str, str]) -> dict[str, Any] | str:
            try:
                return look(Path(entry[0]))
            except (OSError, ValueError, UserError) as error:
                return str(error)

        looks = ahead(attempt, new)
        seen = list(progress(looks, "look at files", total=len(new), disable=len(new) < 500))
        rows = [(p, s, f) for (p, s), f in zip(new, seen, strict=True) if isinstance(f, dict)]
        self._facts |= {path: (stamp, facts) for path, stamp, facts in rows}
        if self._file and rows and (self._file.is_file() or not self._file.exists()):
            with contextlib.suppress(OSError):  # it is looked at again
                self._file.parent.mkdir(parents=True, exist_ok=True)
                with self._file.open("a", encoding="utf-8") as file:
                    texts = map(json.dumps, rows)
                    file.writelines(f"\n{zlib.crc32(t.encode()):08x} {t}\n" for t in texts)
        return [problem for problem in seen if isinstance(problem, str)]

    def __getitem__(self, path: str | Path) -> dict[str, Any]:
        """Return the facts last recorded, without a look at the disk."""
        return self._facts[os.fspath(path)][1]


def _fsync(path: Path) -> None:
    # Windows opens no folders, some mounted buckets sync none
    with contextlib.suppress(OSError if path.is_dir() else PermissionError):
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        os.fsync(descriptor)
        os.close(descriptor)


def save_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)`, fsync, rename: a crash leaves the old or the whole new file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with named(f"{path} cannot be written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            _fsync(temporary)
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8: whole or not at all."""
    save_atomic(path, lambda file: file.write_text(text, encoding="utf-8"))


def to_rgb(file: Image.Image, mode: str = "RGB") -> Image.Image:
    """Return a picture as upright 8-bit sRGB; odd ones by tools/pictures.py.

    mode: RGB (alpha on white) or RGBA.
    """
    if file.width * file.height > MAX_PIXELS or max(file.size) > 100 * min(file.size):
        raise ValueError(f"{file.width} x {file.height} px; at most utils.MAX_PIXELS, and 100:1")
    deep = file.mode[0] in "IF" or ";16" in str(getattr(file, "tile", None))
    profile, frames = zlib.crc32(file.info.get("icc_profile", b"")), getattr(file, "n_frames", 1)
    odd = deep or profile not in SRGB_CRC32 or "gamma" in file.info or frames > 1
    image = load_tool("pictures").plain(file) if odd else ImageOps.exif_transpose(file)
    if mode == "RGB" and ("A" in image.getbands() or "transparency" in image.info):
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert(mode)


def open_rgb(path: Path, mode: str = "RGB") -> Image.Image:
    """Open a still picture with to_rgb(). Raises UserError where it is unreadable or cut off."""
    # KEEP the stream: of a path, Pillow maps a turned TIFF into memory and mixes up its rows
    with named(f"picture {path} cannot be read"), open_regular(path) as stream:
        Image.MAX_IMAGE_PIXELS = None  # to_rgb() has its own
        try:
            file = Image.open(stream, formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"none of {', '.join(FORMATS)}") from None
        return to_rgb(file, mode)


def look_at_picture(path: Path) -> dict[str, Any]:
    """Return width, height, aspect (upright), hashes of file and pixels. Raises UserError."""
    image = open_rgb(path)
    pixels = hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()
    size = {"width": image.width, "height": image.height, "aspect": image.width / image.height}
    size |= {"dark": high} if (high := int(np.asarray(image).max())) < 128 else {}
    return {**size, "content": hash_file(path), "pixels": pixels}


def contact_sheet(
    rows: Any, heads: Sequence[str] = (), captions: Sequence[str] = (), cell_px: int = 256
) -> Image.Image:
    """Draw rows of pictures, fitted to cells (None: empty); heads above, captions under rows."""
    gap, line, words = 8, 24, " ".join([*heads, *captions])
    font = ImageFont.load_default(size=15)
    font = font if words.isascii() else from_tool("pictures", "font_of", font, words, font)
    fitted = [[i and ImageOps.contain(i, (cell_px, cell_px)) for i in row] for row in rows]
    height = max((image.height for row in fitted for image in row if image), default=0)
    across, down = cell_px + gap, height + gap + (line if captions else 0)
    width, top = max(map(len, rows)) * across + gap, line if heads else gap
    sheet = Image.new("RGB", (width, top + len(rows) * down), "white")
    draw = ImageDraw.Draw(sheet)

    def write(x: int, y: int, text: str, colour: str, width_px: float) -> None:
        text = " ".join(unicodedata.normalize("NFC", text).split())
        fits = int(len(text) * width_px / max(1, font.getlength(text)))
        draw.text((x, y), text if fits >= len(text) else text[: fits - 1] + "…", colour, font)

    for x, head in enumerate(heads):
        write(gap + x * across, 3, head, "black", cell_px)
    for y, row in enumerate(fitted):
        for x, image in enumerate(row):
            if image:
                sheet.paste(image, (gap + x * across, top + y * down))
        if captions:
            write(gap, top + y * down + height + 3, captions[y], "dimgray", width - 2 * gap)
    return sheet


# --- 5. cache (a safetensors file per entry, named by what went into it), base models -------------


def cache_key(kind: str, **inputs: object) -> str:
    """Name an entry: blake2b (32 hex digits) of format, kind and every input that shapes it."""
    text = _SORTED.encode([CACHE_FORMAT, kind, inputs])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def entry_path(cache_dir: Path, key: str) -> Path:
    """Return cache_dir/ab/cd/<key>.safetensors."""
    return cache_dir / key[:2] / key[2:4] / f"{key}.safetensors"


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    """Return the CRC-32 of names, shapes, dtypes and values of tensors, 8 hex digits."""
    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.shape} {tensor.dtype}".encode(), crc)
        crc = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], **told: object) -> None:
    """Write a safetensors file atomically; metadata: a checksum, and what is told, as JSON."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = {name: json.dumps(value, sort_keys=True) for name, value in told.items()}
    about |= {"crc32": checksum(tensors)} | ({"format": "pt"} if told else {})
    save_atomic(path, lambda file: save_file(tensors, file, about))


def read_entry(path: Path) -> dict[str, torch.Tensor]:
    """Read an entry's tensors. Raises UserError, with its name, where missing or damaged."""
    what = f"cache entry {path} (cache_embeddings.py --verify mends it)"
    with named(what), safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if checksum(tensors) != (file.metadata() or {}).get("crc32"):
            raise ValueError("its checksum is wrong")
    return tensors


def fetch_checkpoint(name: str, *patterns: str) -> Path:
    """Return a checkpoint's folder; from the Hub as far as the patterns go. Raises UserError."""
    with named("the base model"):
        place = expanded(name)
    if place.is_dir():
        return place
    if place.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(from_tool("check", "no_checkpoint", f"no folder {name}", name))
    from huggingface_hub import snapshot_download

    wanted = ["model_index.json", *patterns] if patterns else None
    with named(f"no folder {name}, and not on the Hub"):
        return Path(snapshot_download(name, allow_patterns=wanted, etag_timeout=4))


def read_model_json(name_or_path: str, file: str) -> dict[str, Any]:
    """Read a JSON file of a checkpoint folder or Hub repository. Raises UserError."""
    path = fetch_checkpoint(name_or_path, file) / file
    with named(f"{path}: no diffusers checkpoint"):
        if isinstance(found := json.loads(read_text(path)), dict):
            return found
        raise ValueError("no mapping of names to values")


def progress(items: Iterable[Any] | None, label: str, **options: Any) -> Any:
    """Return a progress bar on the first process, none on the others or where total is 0."""
    silent = options.get("total") == 0 or os.environ.get("RANK", "0") != "0"
    return tqdm(items, desc=label, **options | {"disable": silent or options.get("disable", False)})


def ahead(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Yield function(item) in the order of the items; threads compute the next 16 meanwhile."""
    with ThreadPoolExecutor() as pool:
        futures = (pool.submit(function, item) for item in items)
        waiting = list(itertools.islice(futures, 16))
        while waiting:
            yield waiting.pop(0).result()
            waiting.extend(itertools.islice(futures, 1))


def memory_gb(device: torch.device) -> float:
    """Return the peak memory of the GPU so far, GB; without one what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9


# --- 6. a run: its checkpoints, its record, its log -----------------------------------------------


def make_accelerator(report_to: str, output_dir: Path, **settings: Any) -> Any:
    """Make an Accelerator that is the script's own: `accelerate config` adds nothing to it."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    for name in [n for n in os.environ if re.match("ACCELERATE_(?!USE_)|ACCELERATE_USE_FSDP", n)]:
        del os.environ[name]
    if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") == "0":
        log.warning("waiting for %s processes (WORLD_SIZE, MASTER_ADDR)", os.environ["WORLD_SIZE"])
    timeout = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2))
    # KEEP: quantised weights are buffers; sending them would hang validation
    buffers = DistributedDataParallelKwargs(broadcast_buffers=False)
    settings |= {"log_with": None if report_to == "none" else report_to}
    settings |= {"project_dir": output_dir, "kwargs_handlers": [timeout, buffers]}
    with named("the environment that a launcher has set (RANK, WORLD_SIZE, MASTER_ADDR ...)"):
        return Accelerator(cpu=not torch.accelerator.is_available(), **settings)


class Checkpoints:
    """The checkpoint-<step>/ folders of a run: complete or absent, every file hash-checked.

    state.json holds step, hashes, and `trained_as`: the settings and data that decide the result.
    """

    def __init__(self, output_dir: Path, limit: int | None = None) -> None:
        self.output_dir, self.limit = output_dir, limit  # limit: so many are kept

    @contextlib.contextmanager
    def only_run(self) -> Iterator[None]:
        """Keep other runs out of output_dir inside `with`. Raises UserError where one writes."""
        writer, lock = self.output_dir / ".writer", self.output_dir / ".lock"
        free = from_tool("check", "takes_no_locks", False, self.output_dir)
        try:
            with contextlib.nullcontext() if free else FileLock(lock, timeout=0):
                save_text(writer, f"process {os.getpid()} on {platform.node()}")
                yield
        except Timeout as error:
            who = writer.read_text(encoding="utf-8") if writer.exists() else "it has just begun"
            text = f"another run ({who}) writes into {self.output_dir}; wait, or take another"
            raise UserError(text) from error

    def folders(self) -> list[Path]:
        """Return the checkpoint folders, oldest first; half-written ones have another name."""
        names = (folder.name.rpartition("-") for folder in self.output_dir.glob("checkpoint-*"))
        steps = sorted(int(step) for head, _, step in names if step.isdecimal())
        return [self.output_dir / f"checkpoint-{step}" for step in steps]

    @staticmethod
    def state(folder: Path) -> dict[str, Any] | None:
        """Return state.json of a checkpoint; None where a file is missing or altered."""
        with contextlib.suppress(Exception):  # whatever is wrong with it
            state = json.loads(read_text(folder / "state.json", 2**26))
            whole = state.pop("hash") == cache_key("state", **state)
            whole = whole and folder.name == f"checkpoint-{int(state['step'])}"
            if whole and all(hash_file(folder / name) == h for name, h in state["files"].items()):
                return {"step": int(state["step"]), "trained_as": dict(state["trained_as"])}
        return None

    def find(self, wanted: str | None, trained_as: dict[str, Any]) -> tuple[Path, int] | None:
        """Return (folder, step) of the newest valid checkpoint ("latest") or the named one.

        Raises UserError where that is missing, damaged or older than others, or settings differ.
        """
        there, named, found = self.folders(), Path(wanted or ""), None
        named = named if named.is_dir() else self.output_dir / named
        for folder in reversed(there if wanted == "latest" else [named] if wanted else []):
            if found := self.state(folder):
                break
            if wanted != "latest":
                names = nearest(named.name, ["latest", "null", *(f.name for f in there)])
                raise UserError(f"resume_from_checkpoint: no valid checkpoint {named}{names}")
            log.warning("%s is damaged; looking for an older one", folder)
        if not found:
            log.info("%s: starting from step 0", self.output_dir)
            return None
        newer = [f.name for f in there if int(f.name.rpartition("-")[2]) > found["step"]]
        if newer and wanted != "latest":
            raise UserError(f"{folder}: {', '.join(newer)} are newer; delete them, or take latest")
        before, keys = found["trained_as"], trained_as.keys() | found["trained_as"].keys()
        was_is = {key: (before.get(key), trained_as.get(key)) for key in sorted(keys)}
        if changed := [f"{k}: was {a}, is {b}" for k, (a, b) in was_is.items() if a != b]:
            text = "was trained with other settings; set them back, or do not resume from it"
            raise UserError(f"{folder} {text}\n{listed(changed)}")
        return folder, found["step"]

    def set_aside(self, *patterns: str) -> None:
        """Move what an earlier run left (checkpoints, `patterns`) into earlier-<n>/."""
        names = "checkpoint-* samples metrics.jsonl report.html run.json config.yaml README.md"
        old = [p for name in (*names.split(), *patterns) for p in self.output_dir.glob(name)]
        if old:
            numbered = (self.output_dir / f"earlier-{n}" for n in itertools.count(1))
            place = next(folder for folder in numbered if not folder.exists())
            place.mkdir()
            for path in old:
                shutil.move(path, place / path.name)
            log.warning("an earlier run is now in %s; to go on: move it back, resume latest", place)

    def save(
        self, step: int, trained_as: Facts, training: Facts, write: Callable[[Path], object]
    ) -> None:
        """Write checkpoint-<step>/: training_state.pt, and what `write(folder)` adds; prune."""
        place = self.output_dir / f"checkpoint-{step}"
        half = place.with_name(f".{place.name}.tmp")
        shutil.rmtree(half, ignore_errors=True)  # left by a run that was killed here
        try:
            half.mkdir(parents=True)
            write(half)  # by save_atomic(), as all here
            save_atomic(half / "training_state.pt", lambda file: torch.save(training, file))
            state = {"step": step, "files": {f.name: hash_file(f) for f in half.iterdir()}}
            state |= {"trained_as": json.loads(json.dumps(trained_as))}
            state["hash"] = cache_key("state", **state)
            save_text(half / "state.json", json.dumps(state, indent=2))
            shutil.rmtree(place, ignore_errors=True)  # it is damaged
            shutil.move(half, place)  # copies where folders cannot be renamed
            _fsync(place.parent)
        finally:
            shutil.rmtree(half, ignore_errors=True)
        kept = self.folders()[: self.folders().index(place) + 1]  # a later one is damaged
        for old in kept[: -self.limit] if self.limit else []:
            shutil.rmtree(old)


def run_record(output_dir: Path, config: Section, script: Path) -> None:
    """Write run.json (argv, config, versions), config.yaml, the script and utils.py."""
    packages = {package.name: package.version for package in metadata.distributions()}
    cpu = f"cpu, {torch.get_num_threads()} threads"
    record = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "argv": sys.argv,
        "config": config.model_dump(mode="json"),
        "versions": {"python": platform.python_version(), **packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
    }
    save_text(output_dir / "run.json", json.dumps(record, indent=2))
    text = yaml.safe_dump(record["config"], sort_keys=False, allow_unicode=True)
    save_text(output_dir / "config.yaml", text)
    for path in (script.resolve(), Path(__file__).resolve()):  # they are part of the config
        if path != (output_dir / path.name).resolve():
            save_atomic(output_dir / path.name, functools.partial(shutil.copyfile, path))


class RunLog:
    """What a loop tells: figures in metrics.jsonl, pictures in samples/, both to the trackers."""

    def __init__(self, accelerator: Any, output_dir: Path, config: Section, step: int) -> None:
        self.accelerator, self.output_dir = accelerator, output_dir
        self.file, about = output_dir / "metrics.jsonl", {"config": config.model_dump_json()}
        accelerator.init_trackers(output_dir.name, about, {"wandb": {"dir": str(output_dir)}})
        if accelerator.is_main_process:  # a run that goes on keeps the lines up to this step
            text = self.file.read_text("utf-8", "replace") if step and self.file.exists() else ""
            lines = re.finditer(r'\{"step": (\d+).*\}\n', text)  # not what a kill cut off
            save_text(self.file, "".join(line[0] for line in lines if int(line[1]) <= step))

    def values(self, step: int, values: Mapping[str, float]) -> None:
        """Write figures to metrics.jsonl, at once, and to the trackers."""
        if self.accelerator.is_main_process:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        self.accelerator.log(dict(values), step=step)

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """Write samples/<name>.png; trackers that take pictures get it, too."""
        save_atomic(self.output_dir / f"samples/{name}.png", lambda f: image.save(f, format="PNG"))
        shown = {re.sub("step.*", "validation", name): np.asarray(image)[None]}
        for tracker in (t for t in self.accelerator.trackers if hasattr(t, "log_images")):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images(shown, step=step, **layout)
