"""Rows of a table of pairs, or of a Hub data set; used by train_qwen_edit.py and pair_table.py."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import UserError, named, progress, read_text

log = logging.getLogger("pair_rows")


class Pair(NamedTuple):
    """One sample of a source."""

    target: Path
    references: list[Path]
    prompts: list[str]
    mask: Path | None = None
    record: Any = None  # the row as it stands


class Found(NamedTuple):
    """What a source holds."""

    pairs: list[Pair]
    problems: list[str]  # nothing can be written
    broken: list[str]  # of single samples: on_missing decides


COLUMNS = {  # what other trainers call them; the first one that is filled counts
    "target": ("target", "path_target", "target_image", "image", "image_path"),
    "references": (
        *("references", "control_images", "edit_image"),
        *("path_control", "control_path", "control"),
    ),
    "prompt": ("prompt", "caption"),
    "mask": ("mask", "path_mask", "control_mask"),
    "name": ("name", "id"),
}
NUMBERED = r"(?:(?:path_)?control|control_path|reference)_(\d+)"  # more references, one a column


def known_of(name: str, columns: dict[Any, str]) -> tuple[str, ...]:
    """Return the columns that may hold target, references, prompt, mask or name."""
    return (columns[name],) if name in columns else COLUMNS[name]


def values_of(record: dict[str, Any], columns: dict[Any, str]) -> dict[str, Any]:
    """Return a record under our names; references and prompts as lists. Raises ValueError."""
    if None in record:  # csv.DictReader
        raise ValueError("more cells than columns; quote a text with commas")
    row = {}
    for name in COLUMNS:
        filled = [n for n in known_of(name, columns) if record.get(n) not in (None, "", [])]
        if len(filled) > 1 and name != "name":
            raise ValueError(f"{' and '.join(filled)} are filled; leave one")
        row[name] = record[filled[0]] if filled else None
    shown = row["references"]
    places = [(int(m[1]), n) for n in record if (m := re.fullmatch(NUMBERED, n))]
    numbered = dict(places)
    if len(numbered) < len(places):
        raise ValueError(f"{', '.join(sorted(n for _, n in places))}: a number stands there twice")
    if isinstance(shown, list) and (more := [n for n in numbered.values() if record[n]]):
        raise ValueError(f"a list of references, and {', '.join(sorted(more))}; leave one of them")
    if not isinstance(shown, list):
        first = [shown] if {*known_of("references", columns)} & record.keys() else []
        shown = [*first, *(record[numbered[i]] for i in sorted(numbered))]
        while shown and not shown[-1]:  # rows may have fewer than others
            shown.pop()
    prompts = row["prompt"] if isinstance(row["prompt"], list) else [row["prompt"]]
    if wrong := [p for p in prompts if not isinstance(p, str | None)]:
        raise ValueError(f"prompt {wrong[0]!r} is no text")
    row["prompt"] = [text for p in prompts if p and (text := p.strip())]
    named = numbered or {*known_of("references", columns)} & record.keys()
    if not row["target"] or not all(shown) or not named:
        lacking = "reference before the last one" if any(shown) else "reference, not even an empty"
        raise ValueError(f"no {lacking if row['target'] else 'target'}")
    return row | {"references": shown}


def pairs_of_records(
    records: Iterable[Any], columns: dict[Any, str], locate: Callable[[Any, str, str], Path]
) -> Found:
    """Make pairs of records. `locate(value, role, name of the sample)` returns a picture's file."""
    found, seen = Found([], [], []), set[str]()
    for number, record in enumerate(progress(records, "pairs", unit="row"), 1):
        try:
            row = values_of(record, columns)
            name = re.sub(r"[^\w.-]+", "_", str(row["name"] or number))
            name = f"{name}_{number}" if name in seen else name
            seen.add(name)
            roles = enumerate(row["references"], 1)
            references = [locate(value, f"reference_{i}", name) for i, value in roles]
            mask = locate(row["mask"], "mask", name) if row["mask"] else None
            target = locate(row["target"], "target", name)
            found.pairs.append(Pair(target, references, row["prompt"], mask, record))
        except (ValueError, OSError) as error:  # OSError: a name that no file can have
            found.broken.append(f"row {number}: {error}")
    return found


def tell_unread(names: Iterable[str], columns: dict[Any, str]) -> None:
    """Name the columns that nothing reads."""
    known = {*columns.values(), *(n for known in COLUMNS.values() for n in known)}
    if unread := sorted(n for n in names if n not in known and not re.fullmatch(NUMBERED, n)):
        log.warning("columns that hold nothing of a pair: %s", ", ".join(unread))


def read_csv(text: str) -> list[Any]:
    """Return the rows of a CSV table; spaces around the names of columns do not count."""
    lines = io.StringIO(text.removeprefix("sep=,").lstrip("\r\n"), newline="")
    reader = csv.DictReader(lines, skipinitialspace=True)
    names = [name.strip() for name in reader.fieldnames or []]
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise ValueError(f"two columns are called {twice[0]}")
    reader.fieldnames = names
    return list(reader)


def read_records(table: Path) -> list[Any]:
    """Return the rows of a CSV, JSONL or JSON table. Raises UserError, with its name."""
    with named(f"table {table}"):
        try:
            text, kind = read_text(table, 2**30), table.suffix.lower()
        except UnicodeDecodeError as error:
            raise ValueError(f"no text in UTF-8 (in Excel: save as CSV UTF-8): {error}") from error
        if kind == ".csv":
            return read_csv(text)
        if kind == ".json":
            return list(json.loads(text))
        if kind == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        raise ValueError("wanted a name that ends in .csv, .jsonl or .json")


def read_table(table: Path, folder: Path, columns: dict[Any, str] | None = None) -> Found:
    """Read a table of pairs, under `folder` too; so are the pictures it names."""
    table = table if table.is_file() else folder / table
    try:
        records = read_records(table)
    except UserError as error:
        return Found([], [str(error)], [])
    if wrong := [i for i, record in enumerate(records, 1) if not isinstance(record, dict)]:
        return Found([], [f"table {table}: row {wrong[0]} is no record"], [])
    names = sorted({str(name) for record in records for name in record if name})
    if not {*known_of("target", columns or {})} & {*names}:
        there = f"its columns are {', '.join(names)}" if records else "it has no rows"
        there += "; commas are wanted between columns" if re.search("[;\t]", "".join(names)) else ""
        return Found([], [f"table {table}: no column 'target': {there}"], [])

    def locate(value: Any, role: str, name: str) -> Path:
        places = [folder / str(value), table.parent / str(value)]
        if there := [place for place in places if place.is_file()]:
            return there[0]
        raise ValueError(f"no file {places[0]}")

    tell_unread(names, columns or {})
    return pairs_of_records(records, columns or {}, locate)
