"""What the scripts must agree on at run time, and nothing else.

Config files, errors, the cache on disk, randomness, run records. What a researcher may want to
change (objective, pairing, bucketing, LoRA targets, devices) lives in the scripts. A script runs
with only this file beside it.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import difflib
import hashlib
import html
import itertools
import json
import math
import mimetypes
import os
import platform
import re
import shutil
import signal
import sqlite3
import string
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NamedTuple, TypeVar, get_args, get_origin
from urllib.parse import quote

import numpy as np
import torch
import yaml
from PIL import Image
from pydantic import BaseModel, ValidationError, ValidationInfo, field_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

CACHE_FORMAT = (
    1  # raise it when the meaning of an entry changes: every old entry is then built again
)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


# --- 1. errors ------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake the user can mend: printed as text, exit code 2, never a traceback."""


def run_script(main: Callable[[], None]) -> None:
    """Run `main`; a UserError becomes its message and exit code 2, Ctrl-C exit code 130."""
    rank = os.environ.get("RANK", "0")
    try:
        main()
    except UserError as error:
        text = str(error)
        if rank != "0":
            time.sleep(3)  # let process 0 report in full before the launcher ends it
            text = f"process {rank}: {text.splitlines()[0]}"
        print(f"\n{Path(sys.argv[0]).name}: {text}", file=sys.stderr, flush=True)
        sys.exit(2)
    except BrokenPipeError:  # `... --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        trains = Path(sys.argv[0]).name.startswith("train_")
        again = "training goes on with resume_from_checkpoint: latest" if trains else "run it again"
        print(f"\nstopped; what was saved is complete ({again})", file=sys.stderr)
        sys.exit(130)


def listed(problems: list[str], shown: int = 10) -> str:
    """Join problems one per line, the first `shown` in full, with a count of the rest."""
    rest = [f"  ... and {len(problems) - shown} more"] if len(problems) > shown else []
    return "\n".join([f"  - {problem}" for problem in problems[:shown]] + rest)


class StopSignal:
    """First SIGTERM or Ctrl-C: finish the step, save, exit 0. A second one: stop at once.

    `requested` turns True at the first signal. Use as a context manager around the loop.
    """

    def __init__(self) -> None:
        self.requested = False
        self._process = os.getpid()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data worker: it goes on until the loop has ended
            return
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        name = signal.Signals(number).name
        print(
            f"\n{name}: finishing this step, then saving (again: stop at once)",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> StopSignal:
        self._before = {n: signal.signal(n, self._handle) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


# --- 2. config: pydantic sections <- YAML or JSON <- dotted overrides -----------------------------


class Section(
    BaseModel,
    extra="forbid",
    frozen=True,
    use_attribute_docstrings=True,
    coerce_numbers_to_str=True,
    allow_inf_nan=False,
):
    """Base of every config class: unknown keys are errors; a field's docstring is its help."""

    not_here: ClassVar[dict[str, str]] = {}  # names that users may expect: why there is no such one

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse a bare `--steps`, which is true, where a number is wanted (it would become 1)."""
        kind = cls.model_fields[info.field_name].annotation if info.field_name else None
        kinds = {kind, *get_args(kind)}
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError("wanted a number")
        return value


C = TypeVar("C", bound=Section)


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars (`no` is text, 1e-4 a number); duplicate keys are errors."""

    yaml_implicit_resolvers = {  # type: ignore[misc]
        first: [
            (t, r) for t, r in pairs if not t.endswith((":bool", ":int", ":float", ":timestamp"))
        ]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        named = [key for key, _ in node.value if not key.tag.endswith(":merge")]
        keys = [self.construct_object(key, deep) for key in named]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(
                    problem=f"duplicate key '{key}'", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile("^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^(?:[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?
                |[0-9]+[eE][-+]?[0-9]+)|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)


def settings(kind: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, field) of every leaf setting, also inside list[...] and dict[...]."""
    for arg in get_args(kind):
        nested = (
            isinstance(arg, type) and issubclass(arg, Section) and get_args(kind)[-1] is type(None)
        )
        yield from settings(arg, path if nested else f"{path}.*")
    if isinstance(kind, type) and issubclass(kind, Section):
        for name, field in kind.model_fields.items():
            below = list(settings(field.annotation, f"{path}.{name}"))
            yield from below or [(f"{path}.{name}".lstrip("."), field)]


def help_text(cls: type[Section]) -> str:
    """All settings of `cls` with type, default and meaning."""
    text = [
        f"{cls.__doc__}\n",
        "  --config FILE    YAML or JSON file, see configs/",
        "  --print_config   show what would run",
    ]
    for path, field in settings(cls):
        kind = str(field.annotation) if get_args(field.annotation) else field.annotation.__name__
        default = (
            "required"
            if field.is_required()
            else f"= {field.get_default(call_default_factory=True)}"
        )
        text.append(f"  --{path}  {kind.replace('typing.', '').replace('pathlib.', '')}  {default}")
        text += [f"        {line}" for line in (field.description or "").splitlines()]
    return "\n".join(text)


def _assign(data: Any, key: str, value: Any) -> None:
    """Set a dotted key; missing sections are made, a list may be continued at its end."""
    parts = key.split(".")
    last = parts[-1]
    for part, below in itertools.pairwise(parts):
        empty: Any = [] if below.isdigit() else {}
        if isinstance(data, list):
            data.extend([empty] if int(part) == len(data) else [])
            data = data[int(part)]
        else:
            data = data.setdefault(part, empty)
    if isinstance(data, list):
        data[int(last) : int(last) + 1] = [value]
    else:
        data[last] = value


def _place(data: Any, error: Any) -> tuple[Any, ...]:
    """Where in the given settings an error lies (pydantic adds tags of union members)."""
    place: list[Any] = []
    for part in error["loc"]:
        if isinstance(data, list):  # "0,1,2" as a list flag is cut later: it may be shorter here
            data = dict(enumerate(data))
        if not isinstance(data, dict) or part not in data:
            break
        place.append(part)
        data = data[part]
    missing = [error["loc"][-1]] if error["type"] == "missing" else []
    return (*place, *missing)


def _explain(cls: type[Section], error: Any, place: tuple[Any, ...]) -> str:
    where = ".".join(str(part) for part in place) or "config"
    if error["type"] != "extra_forbidden":
        message = error["msg"].removeprefix("Value error, ")
        whole = error["type"] == "missing" or isinstance(error["input"], dict | Section)
        given = "" if whole else f" (got {str(error['input'])[:60]!r})"
        return f"{where}: {message}{given}"
    paths = [path for path, _ in settings(cls)]
    if elsewhere := [path for path in paths if path.endswith(f".{place[-1]}")]:
        return f"{where}: not a setting here, but there is {elsewhere[0]}"
    if place[-1] in cls.not_here:
        return f"{where}: no setting: {cls.not_here[place[-1]]}"
    names = {part for path in paths for part in path.split(".")}
    close = difflib.get_close_matches(str(place[-1]), names, n=1, cutoff=0.5)
    return f"{where}: unknown setting" + (
        f", did you mean '{close[0]}'?" if close else " (all settings: --help)"
    )


def _without(data: Any, places: set[tuple[Any, ...]]) -> Any:
    """Copy of `data` without the settings at `places`, so that the rest can still be checked."""

    def below(key: Any) -> set[tuple[Any, ...]]:
        return {place[1:] for place in places if place and place[0] == key}

    if isinstance(data, dict):
        return {k: _without(v, below(k)) for k, v in data.items() if () not in below(k)}
    if isinstance(data, list):
        return [_without(v, below(i)) for i, v in enumerate(data) if () not in below(i)]
    return data


def _validate(cls: type[C], data: Any) -> tuple[C | None, list[str]]:
    """The config, or what is left of it without its wrong settings, and what is wrong."""
    problems: dict[str, str] = {}
    for attempt in range(8):  # taking a wrong setting out may make its section incomplete
        try:
            return cls.model_validate(data), list(problems.values())
        except ValidationError as error:
            wrong = set()
            for item in error.errors():
                place = _place(data, item)
                text = _explain(cls, item, place)
                if attempt == 0:
                    key = ".".join(map(str, place))
                    same = problems.get(key)
                    problems[key] = f"{same.rsplit(' (got')[0]}; or {item['msg']}" if same else text
                wrong.add(place[:-1] if item["type"] == "missing" else place)
            data = {} if () in wrong else _without(data, wrong)
    return None, list(problems.values())


def _override_value(text: str) -> Any:
    """Numbers, true, false, null, `{...}` and `[...]` as in YAML; all else is text as typed."""
    if not text:
        return text
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text
    nested = isinstance(value, dict | list) and text.lstrip()[:1] in "{["
    return value if nested or isinstance(value, int | float | None) else text


def parse_args(argv: list[str], lists: set[str]) -> tuple[dict[str, Any], set[str], list[str]]:
    """Merge `--config FILE` and `--a.b value` overrides -> (settings, {"help", ...}, problems).

    Of a repeated flag the last value counts, but for the settings in `lists`: those collect all.
    """
    data: dict[str, Any] = {}
    overrides: dict[str, list[Any]] = {}
    flags: set[str] = set()
    problems: list[str] = []
    args = list(argv)
    while args:
        key, equals, text = args.pop(0).partition("=")
        if not key.startswith("--"):
            if key == "-h":
                flags.add("help")
            else:
                problems.append(f"expected --name value, got '{key}'")
            continue
        bare = not equals and (not args or args[0].startswith("--"))  # `--flag` is true
        if not equals and not bare:
            text = args.pop(0)
        if key in ("--help", "--print_config"):
            flags.add(key[2:])
        elif key == "--config":
            try:
                data = yaml.load(Path(text).read_text(encoding="utf-8"), _Loader) or {}
                if not isinstance(data, dict):
                    raise yaml.YAMLError("the file must hold `name: value` pairs")
            except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
                data = {}
                problems.append(f"--config {text or '(no file named)'}: {error}")
        else:
            value = True if bare else _override_value(text)
            overrides.setdefault(key[2:], []).append(value)
    for key, values in overrides.items():
        value = values[-1]
        if re.sub(r"\.\d+(?=\.|$)", ".*", key) in lists and not isinstance(value, list | None):
            value = values
        try:
            _assign(data, key, value)
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            problems.append(f"cannot set --{key}: {error}")
    return data, flags, problems


def load_config(
    cls: type[C], argv: list[str] | None = None, check: Callable[[C], list[str]] | None = None
) -> C:
    """Build `cls` from `--config FILE` plus overrides such as `--model.lora.r 32`, which win.

    `check(config)` may name further problems (paths, data). It runs even when settings are
    misspelt, on what is left of the config, so that one run reports everything.

    Raises:
        UserError: with every problem found.
    """
    lists = {path for path, field in settings(cls) if get_origin(field.annotation) is list}
    data, flags, problems = parse_args(sys.argv[1:] if argv is None else argv, lists)
    if "help" in flags:
        print(help_text(cls))
        sys.exit(0)
    if unread := [problem for problem in problems if problem.startswith("--config ")]:
        raise UserError("\n".join(unread))  # without the file everything else would be noise
    config, wrong = _validate(cls, data)
    problems += wrong
    if "print_config" in flags and config and not problems:
        print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
        sys.exit(0)
    if config and check:
        problems += check(config)
    if problems or config is None:
        raise UserError(
            f"{len(problems)} problem(s), nothing was loaded\n"
            + "\n".join(f"  - {p}" for p in problems)
        )
    return config


# --- 3. randomness: every draw is a function of (seed, purpose, index) ----------------------------


def draw_key(*parts: object) -> int:
    """63-bit hash of the parts: the same on every machine, in every process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def uniform(*parts: object) -> float:
    """A draw from [0, 1) that belongs to the parts, e.g. `uniform(seed, "view", visit)`."""
    return draw_key(*parts) / 2**63


def normal(shape: Iterable[int], *parts: object) -> torch.Tensor:
    """Standard normal noise that belongs to the parts; (shape), fp32, CPU."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(draw_key(*parts)))


def shuffled(n: int, *parts: object) -> list[int]:
    """A permutation of range(n) that belongs to the parts."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(draw_key(*parts))).tolist()


# --- 4. files -------------------------------------------------------------------------------------


def list_images(folder: Path) -> dict[str, list[os.DirEntry[str]]]:
    """{relative stem ("sub/a"): image files}, nested folders included, hidden names left out."""
    found: dict[str, list[os.DirEntry[str]]] = {}
    todo = [(folder, "")]
    while todo:
        place, prefix = todo.pop()
        for entry in sorted(os.scandir(place), key=lambda e: e.name):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                todo.append((Path(entry.path), f"{prefix}{entry.name}/"))
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                found.setdefault(prefix + entry.name.rsplit(".", 1)[0], []).append(entry)
    return found


def hash_file(path: Path) -> str:
    """blake2b of a file's bytes, 32 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


class FileIndex:
    """Remembers facts about files (content hash, width ...) by path, size and modification time.

    Kept in `folder/index.sqlite`, which processes may share; `folder=None` keeps it in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        self._db: sqlite3.Connection | None = None
        self._pending: list[tuple[str, str, str]] = []
        where = folder / "index.sqlite" if folder else Path(":memory:")
        try:
            rows = self._open(where)
        except sqlite3.OperationalError as error:
            raise OSError(f"{where}: {error}") from error
        except sqlite3.DatabaseError:  # damaged: what it remembers is found again
            where.unlink()
            rows = self._open(where)
        self._known = {path: (stamp, json.loads(fact)) for path, stamp, fact in rows}

    def _open(self, where: Path) -> list[tuple[str, str, str]]:
        self._db = sqlite3.connect(where, timeout=120)
        self._db.execute("CREATE TABLE IF NOT EXISTS files (path PRIMARY KEY, stamp, fact)")
        return self._db.execute("SELECT path, stamp, fact FROM files").fetchall()

    def __getstate__(self) -> dict[str, Any]:
        return {"_known": self._known, "_db": None, "_pending": []}  # a worker only reads

    def get(self, path: Path, stat: os.stat_result) -> dict[str, Any] | None:
        """The facts recorded for this file, unless its size or modification time has changed."""
        stamp, fact = self._known.get(str(path), ("", {}))
        return fact if stamp == f"{stat.st_size}:{stat.st_mtime_ns}" else None

    def known(self, path: Path) -> dict[str, Any]:
        """The facts last recorded, without a look at the disk."""
        return self._known[str(path)][1]

    def content(self, path: Path) -> str:
        """The content hash last recorded."""
        return self.known(path)["content"]

    def aspect(self, path: Path) -> float:
        """Width / height last recorded for a picture."""
        fact = self.known(path)
        return fact["width"] / fact["height"]

    def put(self, path: Path, stat: os.stat_result, fact: dict[str, Any]) -> None:
        """Record the facts of a file; `commit` makes them last."""
        stamp = f"{stat.st_size}:{stat.st_mtime_ns}"
        self._known[str(path)] = stamp, fact
        self._pending.append((str(path), stamp, json.dumps(fact)))

    def commit(self) -> None:
        """Write what was put, in one short transaction: other processes wait for it."""
        if self._db and self._pending:
            rows = self._pending
            try:
                with self._db:
                    self._db.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", rows)
            except sqlite3.OperationalError as error:  # read-only, disk full
                raise UserError(f"index.sqlite of the cache cannot be written: {error}") from error
        self._pending.clear()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """`write(temporary)`, fsync, rename: after a crash `path` is the old or the whole new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_folder_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """`write(temporary folder)`, fsync every file, rename: the folder is complete or absent."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed here
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for file in sorted(temporary.rglob("*")):
            _fsync(file)
    except BaseException:  # disk full, Ctrl-C: the half is of no use and takes room
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(path)
    temporary.rename(path)
    _fsync(path.parent)


# --- 5. cache: one safetensors file per entry, named by what went into it -------------------------


def cache_key(kind: str, **inputs: object) -> str:
    """Name of an entry: blake2b (32 hex digits) of format, kind and every input that shapes it."""
    text = json.dumps([CACHE_FORMAT, kind, inputs], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def entry_path(cache_dir: Path, key: str) -> Path:
    """cache_dir/ab/cd/<key>.safetensors"""
    return cache_dir / key[:2] / key[2:4] / f"{key}.safetensors"


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    crc = 0
    for name in sorted(tensors):
        data = tensors[name].contiguous().flatten().view(torch.uint8).numpy()
        crc = zlib.crc32(data.data, crc)
    return f"{crc:08x}"


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a file for read_entry atomically; several processes may write the same one."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_atomic(path, lambda file: save_file(tensors, file, metadata={"crc32": _checksum(tensors)}))


def write_entry(cache_dir: Path, key: str, tensors: dict[str, torch.Tensor]) -> Path:
    """Write an entry atomically, with a checksum; several processes may write the same one."""
    path = entry_path(cache_dir, key)
    write_tensors(path, tensors)
    return path


def read_entry(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of an entry, checked.

    Raises:
        ValueError: the file is missing, cut off or altered; the message names it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            expected = (file.metadata() or {}).get("crc32")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cache entry {path} cannot be read: {error}") from error
    if _checksum(tensors) != expected:
        raise ValueError(f"cache entry {path} is damaged: its checksum is wrong")
    return tensors


# --- 6. the run: record and metrics ---------------------------------------------------------------


def _git(*args: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        here = Path(sys.argv[0]).resolve().parent
        return subprocess.run(
            ["git", *args], cwd=here, capture_output=True, text=True, timeout=10
        ).stdout.strip()
    return ""


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _read_record(output_dir: Path) -> dict[str, Any]:
    """run.json of a run; {} if there is none yet or it is damaged."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return json.loads((output_dir / "run.json").read_text(encoding="utf-8"))
    return {}


def run_record(output_dir: Path, config: Section, script: Path) -> None:
    """Write run.json (argv, config, versions, git, hashes), config.yaml, the script and utils.py.

    In a copy-and-modify project the code is part of the config. Earlier records of the same folder
    stay in run.json under `earlier`.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    code = {path.name: path for path in (script.resolve(), Path(__file__).resolve())}
    earlier = _read_record(output_dir)
    record = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "argv": sys.argv,
        "config": config.model_dump(mode="json"),
        "versions": _versions(
            ["torch", "diffusers", "transformers", "peft", "accelerate", "optimum-quanto"]
        ),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"cpu, {torch.get_num_threads()} threads",
        "git": {
            "commit": _git("rev-parse", "HEAD"),
            "changed": _git("status", "--porcelain").splitlines(),
        },
        "code_blake2b": {name: hash_file(path) for name, path in code.items()},
        "earlier": [*earlier.pop("earlier", []), earlier] if earlier else [],
    }
    text = json.dumps(record, indent=2)
    save_atomic(output_dir / "run.json", lambda file: file.write_text(text, encoding="utf-8"))
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    save_atomic(output_dir / "config.yaml", lambda file: file.write_text(text, encoding="utf-8"))
    for name, path in code.items():
        if path != (output_dir / name).resolve():
            shutil.copyfile(path, output_dir / name)


class MetricLog:
    """Appends one JSON object per line; on resume, lines after the checkpoint are dropped."""

    def __init__(self, path: Path, resume_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):  # a line cut off by a kill
                kept += [line] if json.loads(line)["step"] <= resume_step else []
        save_atomic(
            path,
            lambda file: file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8"),
        )
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, **values: float) -> None:
        """Append {"step": step, **values} and flush, so that a reader sees it at once."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; `write` must not follow."""
        self._file.close()


# --- 7. pages: pictures side by side, the report of a run -----------------------------------------


class PageRow(NamedTuple):
    """One view of a page: pictures of one scene, and what is known of them."""

    name: str
    columns: Mapping[str, Path]  # label: picture; the divider starts between the first and the last
    prompt: str = ""
    seed: int | None = None
    figures: Mapping[str, float] = {}


def write_page(path: Path, title: str, rows: Sequence[PageRow], embed: bool = False) -> None:
    """Write a page that compares the pictures of each row, to be opened from disk.

    Pictures stay where they are and are linked relative to `path`; with `embed` they are copied
    into the page, which can then be sent as one file. Nothing is loaded from elsewhere.

    Raises:
        UserError: a picture cannot be read.
    """
    _save_page(path, title, "".join(_row_html(row, path.parent, embed) for row in rows))


def write_report(output_dir: Path) -> Path:
    """Write report.html of a run: curves, sheets over time, settings; returns where.

    Draws what metrics.jsonl, samples/ and run.json hold, also while the run goes on; what is
    missing is left out.

    Raises:
        UserError: the folder holds no run.
    """
    there = output_dir.is_dir()
    series = _read_series(output_dir / "metrics.jsonl") if there else {}
    about = _read_record(output_dir) if there else {}
    if not (series or about):
        raise UserError(f"{output_dir}: no run here (no metrics.jsonl, no run.json)")
    sheets = sorted(output_dir.glob("samples/*.png"))
    steps = {int(m[1]): s for s in sheets if (m := re.fullmatch(r"step[_-](\d+)", s.stem))}
    views = {
        "What the model sees": {s.stem: s for s in sheets if s.stem in ("first_batch", "pairs")},
        "Validation over time": {f"step {step}": steps[step] for step in sorted(steps)},
    }
    reached = [f"step {max(points[-1][0] for points in series.values())}"] if series else []
    facts = [*reached, *(str(about[key]) for key in ("device", "started") if key in about)]
    body = f"<p>{html.escape(' · '.join(facts))}</p>\n{_charts_html(series)}"
    body += "".join(_row_html(PageRow(n, c), output_dir, False) for n, c in views.items() if c)
    rest = {key: value for key, value in about.items() if key not in ("config", "earlier")}
    for name, part in {"Settings": about.get("config"), "Command, code, versions": rest}.items():
        if part:
            text = html.escape(yaml.safe_dump(part, sort_keys=False, allow_unicode=True))
            body += f"<details><summary>{name}</summary><pre>{text}</pre></details>\n"
    path = output_dir / "report.html"
    _save_page(path, f"Run {output_dir.resolve().name}", body)
    return path


def track_picture(accelerator: Any, name: str, picture: Any, step: int) -> None:
    """Send a PIL picture to the trackers that take pictures (TensorBoard, Weights & Biases)."""
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: np.asarray(picture)[None]}, step=step, **layout)


def _save_page(path: Path, title: str, body: str) -> None:
    text = string.Template(PAGE).substitute(title=html.escape(title), body=body)
    save_atomic(path, lambda file: file.write_text(text, encoding="utf-8"))


def _row_html(row: PageRow, folder: Path, embed: bool) -> str:
    """A section of the page: all pictures in one place, two of them shown."""
    labels, last = [html.escape(label) for label in row.columns], len(row.columns) - 1
    files = list(row.columns.values())
    try:
        sizes = [_picture_size(file) for file in files]
        links = [_link(file, folder, embed) for file in files]
    except OSError as error:  # missing, no picture
        raise UserError(f"page row '{row.name}': {error}") from error
    width, height = sizes[-1]
    pictures = ""
    for number, (label, link, (w, h)) in enumerate(zip(labels, links, sizes, strict=True)):
        # a photo that was cropped to its bucket lies on the result; another aspect is shown whole
        fit = ["cover"] * (abs(math.log(w * height / (h * width))) < 0.15)
        classes = " ".join(["left"] * (number == 0) + ["right"] * (number == last) + fit)
        pictures += f'<img class="{classes}" src="{link}" alt="{label}" loading="lazy">\n'
    seed = "" if row.seed is None else f" <span>seed {row.seed}</span>"
    about = (
        f"<figcaption>{html.escape(row.prompt)}{seed}</figcaption>" if row.prompt or seed else ""
    )
    figures = " · ".join(f"{html.escape(name)} {value:.4g}" for name, value in row.figures.items())
    slider = (
        f'<input type="range" max="{last}" value="{last}" aria-label="right picture" '
        f'aria-valuetext="{labels[-1]}">\n<ol>{"".join(f"<li>{label}" for label in labels)}</ol>\n'
    )
    return (
        f'<section class="{"" if last else "single"}" '
        f'style="--x: 50%; --w: {width}; --h: {height}; --n: {last + 1}">\n'
        f"<h2>{html.escape(row.name)} <small>{figures}</small></h2>\n"
        f"<p><b>{labels[0]}</b> <b>{labels[-1]}</b></p>\n<figure>\n{pictures}"
        '<i role="slider" tabindex="0" aria-label="divider, percent" aria-valuemin="0" '
        f'aria-valuemax="100" aria-valuenow="50"></i>\n{about}</figure>\n'
        f"{slider if last else ''}</section>\n"
    )


def _picture_size(file: Path) -> tuple[int, int]:
    """(W, H) px, upright."""
    with Image.open(file) as image:
        exif = Image.Image.getexif(image)  # KEEP: a PNG's own getexif() decodes the picture
        turned = exif.get(0x0112, 1) >= 5  # orientation: by 90 degrees
        return image.size[::-1] if turned else image.size


def _link(file: Path, folder: Path, embed: bool) -> str:
    """What an <img> takes: the way from `folder` to the file, or the file itself."""
    if not embed:
        return quote(Path(os.path.relpath(file, folder)).as_posix())
    kind = mimetypes.guess_type(file.name)[0]
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


CHARTS = {  # values of metrics.jsonl whose names begin so share a chart of this title
    "loss": "loss",
    "validation_loss": "validation loss (q1: the least noise)",
    "validation_loss_ema": "validation loss of the moving average",
    "last_": "loss of the last step, by term",
    "lr": "learning rate",
    "seconds_per_step": "seconds per step",
    "memory_gb": "memory, GB",
}


def _read_series(path: Path) -> dict[str, list[tuple[int, float]]]:
    """{name: [(step, value)]} of metrics.jsonl; what is no finite number is left out."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # a line that is being written
            values = json.loads(line)
            step = values.pop("step")
            for name, value in values.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    series.setdefault(name, []).append((step, value))
    return series


def _charts_html(series: Mapping[str, list[tuple[int, float]]]) -> str:
    """One chart per title of CHARTS, then one for each other value."""
    charts: dict[str, dict[str, list[tuple[int, float]]]] = {title: {} for title in CHARTS.values()}
    for name, points in series.items():
        start = max((start for start in CHARTS if name.startswith(start)), key=len, default="")
        charts.setdefault(CHARTS.get(start, name.replace("_", " ")), {})[name] = points
    drawn = "".join(_chart_svg(title, lines) for title, lines in charts.items() if lines)
    return f'<div class="charts">\n{drawn}</div>\n'


def _chart_svg(title: str, lines: Mapping[str, list[tuple[int, float]]]) -> str:
    """Curves over steps as inline SVG, with a legend that names their last values."""
    drawn = {name: thinned(points, 400) for name, points in lines.items()}
    every = [point for points in drawn.values() for point in points]
    left, right = min(x for x, _ in every), max(x for x, _ in every)
    low, high = min(y for _, y in every), max(y for _, y in every)
    is_loss = "loss" in title
    scale: Callable[[float], float] = math.log10 if is_loss and 0 < 10 * low < high else float
    low = low if is_loss else min(low, 0.0)  # a level is shown from zero
    low, high = (low - 1, high + 1) if low == high else (low, high)
    ticks = _ticks(low, high) if scale is float else _log_ticks(low, high)
    width, height = max(right - left, 1), scale(high) - scale(low)

    def place(x: float, y: float) -> tuple[float, float]:
        y = (scale(y) - scale(low)) / height
        return round(56 + 570 * (x - left) / width, 1), round(206 - 190 * y, 1)

    drawing, legend = "", ""
    for tick in ticks:
        y = place(left, tick)[1]
        drawing += f'<path d="M56 {y}H626"/><text x="50" y="{y}">{tick:.4g}</text>\n'
    for tick in _ticks(left, left + width, 6):
        if tick == int(tick):  # a step
            drawing += f'<text class="x" x="{place(tick, low)[0]}" y="224">{tick:g}</text>\n'
    for number, (name, points) in enumerate(drawn.items()):
        colour, places = f'class="c{number % 6}"', [place(*point) for point in points]
        line = " ".join(f"{x},{y}" for x, y in places)
        drawing += f'<polyline {colour} points="{line}"/>\n'
        for (x, y), (step, value) in zip(places, points, strict=True) if len(points) <= 60 else ():
            drawing += f'<circle {colour} cx="{x}" cy="{y}" r="2.5">'
            drawing += f"<title>step {step:g}: {value:.5g}</title></circle>\n"
        legend += f"<span {colour}>{html.escape(name)} {lines[name][-1][1]:.4g}</span> "
    title = html.escape(title)
    return (
        f'<div><h2>{title}</h2><svg viewBox="0 0 640 232" role="img" aria-label="{title}, steps '
        f'{left:g} to {right:g}">\n{drawing}</svg>\n<p>{legend}</p></div>\n'
    )


def thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` points: each the mean of as many neighbours as that takes."""
    size = math.ceil(len(points) / most)
    groups = (points[at : at + size] for at in range(0, len(points), size))
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from low to high."""
    unit = 10.0 ** math.floor(math.log10((high - low) / count))
    unit *= next(factor for factor in (1, 2, 5, 10) if unit * factor * count >= high - low)
    return [n * unit for n in range(math.ceil(low / unit), math.floor(high / unit) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from low to high; where they are few also twice and five times these."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    factors = (1, 2, 5) if len(decades) < 4 else (1,)
    found = [factor * 10.0**decade for decade in decades for factor in factors]
    return [value for value in found if low <= value <= high]


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src 'self' file: data:;
 style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; --back: #fbfbfa; --ink: #222; --quiet: #6b6b6b; --rule: #e2e2df;
  --c0: #2563a8; --c1: #c2611f; --c2: #2f855a; --c3: #8b4fa8; --c4: #a8842c; --c5: #777;
  --room: min(100vw - 3rem, 1400px); }
@media (prefers-color-scheme: dark) { :root { --back: #191a1b; --ink: #e4e4e2; --quiet: #9b9b98;
  --rule: #35373a; --c0: #74aef0; --c1: #f0a06a; --c2: #77c79b; --c3: #c79be0; --c4: #d9bd6e;
  --c5: #a5a5a5; } }
body { margin: 0 auto; width: var(--room); background: var(--back); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
header { position: sticky; top: 0; z-index: 3; display: flex; gap: 1.5rem; align-items: baseline;
  padding: .6rem 0; background: var(--back); border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
header > * { overflow: hidden; text-overflow: ellipsis; }
header small { flex: 1 999 0; }
select { max-width: 9rem; }
h1, h2 { margin: 0; font-size: 1rem; font-weight: 600; }
small { margin: 0; color: var(--quiet); font-size: .85rem; font-weight: 400; }
section { --ratio: calc(var(--w) / var(--h)); margin: 0 auto; padding: 1rem 0;
  width: var(--width); scroll-margin-top: 3rem;
  --width: min(var(--room), 76vh * var(--ratio), max(480px, var(--w) * 1px));
  content-visibility: auto;
  contain-intrinsic-size: auto calc(var(--width) / var(--ratio) + 8.5rem); }
figure { position: relative; margin: 0; aspect-ratio: var(--ratio);
  overflow: hidden; background: var(--rule); cursor: ew-resize; touch-action: pan-y;
  user-select: none; -webkit-user-select: none; }
.same figure { cursor: default; }
img { display: none; position: absolute; width: 100%; height: 100%; object-fit: contain; }
.cover { object-fit: cover; }
.left, .right { display: block; }
.left { clip-path: inset(0 calc(100% - var(--x)) 0 0); }
.right { clip-path: inset(0 0 0 var(--x)); }
.left.right { clip-path: none; }
section p { display: flex; justify-content: space-between; margin: .3rem 0; font-size: .85rem; }
section b { max-width: 48%; overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  font-weight: 500; }
i { position: absolute; inset: 0 auto 0 var(--x); width: 2px; margin-left: -1px; background: #fff;
  box-shadow: 0 0 2px #000; }
i::after { content: "\\2194"; position: absolute; top: 50%; left: 50%; width: 1.7rem; color: #222;
  font: 1rem/1.7rem system-ui; text-align: center; background: #fff; border-radius: 50%;
  translate: -50% -50%; box-shadow: 0 0 3px #000; }
.same i, .same b + b, .single p { display: none; }
:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; }
figcaption { position: absolute; inset: auto 0 0 0; padding: .4rem .6rem; color: #fff;
  background: #000b; white-space: pre-wrap; opacity: 0; transition: opacity .15s;
  pointer-events: none; }
figcaption span, h2 small { margin-left: .6rem; opacity: .75; }
figure:hover figcaption, i:focus-visible ~ figcaption { opacity: 1; }
figure:active figcaption { opacity: 0; }
input { display: block; accent-color: var(--c0); margin: .2rem 0 0;
  width: calc(100% * (1 - 1 / var(--n)) + 1rem);
  margin-left: calc(50% / var(--n) - .5rem); }
ol { display: grid; grid-template-columns: repeat(var(--n), minmax(0, 1fr)); margin: 0; padding: 0;
  list-style: none; font-size: .8rem; color: var(--quiet); }
li { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; text-align: center;
  cursor: pointer; }
li:nth-child(1):nth-last-child(n + 16) ~ li:not(.on):not(:last-child) { visibility: hidden; }
li.on { color: var(--ink); font-weight: 600; overflow: visible; }
.charts { display: grid; gap: 1rem 2rem; padding-top: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
svg { width: 100%; overflow: visible; }
svg text { fill: var(--quiet); font-size: 12px; text-anchor: end; dominant-baseline: middle; }
svg .x { text-anchor: middle; }
path { stroke: var(--rule); }
polyline { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round; }
circle { fill: var(--c); }
.c0 { --c: var(--c0) } .c1 { --c: var(--c1) } .c2 { --c: var(--c2) }
.c3 { --c: var(--c3) } .c4 { --c: var(--c4) } .c5 { --c: var(--c5) }
.charts p { margin: 0; font-size: .8rem; color: var(--quiet); }
.charts span { margin-right: .8rem; white-space: nowrap; }
.charts span::before { content: ""; display: inline-block; width: .7rem; height: .2rem;
  margin-right: .35rem; vertical-align: middle; background: var(--c); }
details { padding: .4rem 0; } summary { cursor: pointer; }
pre { overflow: auto; padding: .8rem; border: 1px solid var(--rule); font-size: .8rem; }
</style>
<header><h1>$title</h1>
<label>left <select></select></label>
<small>drag the divider &nbsp; ← → picture &nbsp; ↑ ↓ row &nbsp; shift ← → divider</small></header>
<main>
$body</main>
<script>
"use strict";
const rows = [...document.querySelectorAll("section")], left = document.querySelector("select");
let current, dragged;

function show(row) { // one picture on each side of the divider
  const pictures = [...row.querySelectorAll("img")], slider = row.querySelector("input");
  const right = pictures[slider ? slider.value : 0];
  const before = pictures.find(picture => picture.alt === left.value) || pictures[0];
  for (const picture of pictures) {
    picture.classList.toggle("left", picture === before);
    picture.classList.toggle("right", picture === right);
  }
  row.classList.toggle("same", before === right);
  const [leftLabel, rightLabel] = row.querySelectorAll("b");
  leftLabel.textContent = before.alt;
  rightLabel.textContent = right.alt;
  if (slider) slider.setAttribute("aria-valuetext", right.alt);
  row.querySelectorAll("li").forEach((label, n) => label.classList.toggle("on", n == slider.value));
}
function choose(row, number) {
  const slider = row.querySelector("input");
  if (slider) slider.value = number;
  show(use(row));
}
function divide(row, percent) {
  percent = Math.min(100, Math.max(0, percent));
  row.style.setProperty("--x", percent + "%");
  row.querySelector("i").setAttribute("aria-valuenow", Math.round(percent));
}
function drag(event) {
  const box = dragged.querySelector("figure").getBoundingClientRect();
  divide(dragged, 100 * (event.clientX - box.left) / box.width);
}
function use(row) { // all its pictures are fetched: the next one shows at once
  for (const picture of row.querySelectorAll("img")) picture.loading = "eager";
  return current = row;
}
function visible() { // the row that keys act on
  const box = current && current.getBoundingClientRect();
  if (box && box.bottom > 0 && box.top < innerHeight) return current;
  return document.elementFromPoint(innerWidth / 2, innerHeight / 2)?.closest("section");
}
addEventListener("pointerdown", event => {
  const figure = event.target.closest("figure");
  if (!figure || event.button) return;
  figure.setPointerCapture(event.pointerId);
  dragged = use(figure.parentNode);
  drag(event);
});
addEventListener("pointermove", event => dragged && drag(event));
addEventListener("pointerup", () => dragged = null);
addEventListener("pointercancel", () => dragged = null);
addEventListener("dragstart", event => event.preventDefault());
addEventListener("click", event => {
  const label = event.target.closest("li");
  if (label) choose(label.closest("section"), [...label.parentNode.children].indexOf(label));
});
addEventListener("focusin", event => {
  const row = event.target.closest("section");
  if (row) use(row);
});
addEventListener("input", event => {
  const row = event.target.closest("section");
  if (row) choose(row, event.target.value);
});
left.addEventListener("change", () => rows.forEach(show));
addEventListener("keydown", event => {
  const way = {ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1}[event.key];
  const row = way && visible();
  if (!row || event.target === left || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key === "ArrowUp" || event.key === "ArrowDown") {
    const next = rows[rows.indexOf(row) + way];
    if (!next) return;
    (next.querySelector("input") || next.querySelector("i")).focus({preventScroll: true});
    use(next).scrollIntoView();
  } else if (event.shiftKey || event.target.matches("i")) {
    divide(row, parseFloat(row.style.getPropertyValue("--x")) + 2 * way);
  } else if (row.querySelector("input")) {
    choose(row, +row.querySelector("input").value + way);
  }
  event.preventDefault();
});
const divided = document.querySelectorAll("section:not(.single) img");
for (const label of new Set([...divided].map(picture => picture.alt))) left.add(new Option(label));
for (const part of document.querySelectorAll("h1 ~ *")) part.hidden = !divided.length;
rows.forEach(show);
</script>
</html>
"""


def main() -> None:
    """`python utils.py report DIR`: draw report.html of a run again, also while it goes on."""
    match sys.argv[1:]:
        case ["report", folder]:
            print(write_report(Path(folder)))
        case _:
            raise UserError("usage: python utils.py report OUTPUT_DIR")


if __name__ == "__main__":
    run_script(main)
