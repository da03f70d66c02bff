"""What the scripts must agree on at run time, and nothing else.

Config files, errors, the cache on disk, randomness, run records. What a researcher may want to
change (objective, pairing, bucketing, LoRA targets, devices) lives in the scripts. A script runs
with only this file beside it.
"""

from __future__ import annotations

import contextlib
import datetime
import difflib
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, TypeVar, get_args, get_origin

import torch
import yaml
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
        text = "stopped; what was saved is complete"
        print(f"\n{text} (training goes on with resume_from_checkpoint: latest)", file=sys.stderr)
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


def run_record(output_dir: Path, config: Section, script: Path) -> None:
    """Write run.json (argv, config, versions, git, hashes), config.yaml, the script and utils.py.

    In a copy-and-modify project the code is part of the config. Earlier records of the same folder
    stay in run.json under `earlier`.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    code = {path.name: path for path in (script.resolve(), Path(__file__).resolve())}
    target = output_dir / "run.json"
    earlier = None
    with contextlib.suppress(FileNotFoundError, ValueError):  # none yet, or damaged
        earlier = json.loads(target.read_text(encoding="utf-8"))
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
    save_atomic(
        target, lambda file: file.write_text(json.dumps(record, indent=2), encoding="utf-8")
    )
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
