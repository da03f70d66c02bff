"""Write the table that train_qwen_edit.py reads, from data that lies in another form.

Page: docs/pair_table.md

    python tools/pair_table.py --hf_dataset owner/name --output my_pairs/pairs.jsonl
    python tools/pair_table.py --table train.csv --output my_pairs/pairs.jsonl
    python tools/pair_table.py --target_dir photos/after --reference_dirs photos/before
    ... --selected_control_indexes 1 3 | --help | --help choice

Hub data sets, tables of other trainers, and folders with several references of one sample
(a.png, a_control_1.png, a_control_2.png). A line of the table is one pair:

    {"target": ..., "references": [...], "prompt": ..., "mask": ...}

Pictures of a Hub data set are written beside the table, byte for byte. Running the tool again
writes the same files. A training names the table: data.dataset_configs.0.table: pairs.jsonl
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pair_rows import Found, Pair, pairs_of_records, read_table, tell_unread

from train_qwen_edit import DatasetConfig, group_by_folder, read_captions
from utils import (
    FORMATS,
    Section,
    UserError,
    check_setup,
    listed,
    load_config,
    run_script,
    save_atomic,
    save_text,
)

# --- 1. records: rows of a table or of a Hub data set ---------------------------------------------


class ColumnsConfig(Section):
    """What the columns of a table or a Hub data set are called."""

    columns: dict[Literal["target", "references", "prompt", "mask", "name"], str] = {}
    """Columns by names that are not known here, e.g. --columns.target edited_image."""


# --- 2. tables of other trainers ------------------------------------------------------------------


class TableConfig(Section):
    """A table: CSV, JSONL, or JSON (a list)."""

    table: Path | None = None
    """Table to read; relative paths in it count from train_data_dir or from the table's folder."""
    train_data_dir: Path = Path()
    """Folder that relative paths count from, also target_dir and reference_dirs."""


def from_table(config: Config) -> Found:
    """Read a table of another trainer."""
    return read_table(Path(config.table or ""), config.train_data_dir, config.columns)


# --- 3. Hub data sets -----------------------------------------------------------------------------


class HubConfig(Section):
    """A data set of the Hugging Face Hub (needs: pip install datasets)."""

    hf_dataset: str | None = None
    """Hub id, or a folder: Parquet files, or what save_to_disk() wrote."""
    hf_split: str = "train"
    """Split of the Hub data set, e.g. train."""


def load_hub_dataset(name: str, split: str) -> Any:
    """Return the data set with its pictures as they are stored, not decoded. Raises UserError."""
    try:
        import datasets
    except ImportError as error:
        text = "hf_dataset needs the package datasets: pip install datasets"
        raise UserError(text) from error
    try:
        if (Path(name) / "dataset_info.json").is_file():
            rows = datasets.load_from_disk(name)
        elif (Path(name) / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(name)[split]
        else:
            rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # network, rights, spelling, format: the library has many classes
        raise UserError(f"hf_dataset {name}, split {split}: {error}") from error
    stored = datasets.Image(decode=False)
    for column, feature in dict(rows.features).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, stored)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            rows = rows.cast_column(column, type(feature)(stored))
    return rows


def picture_format(data: bytes) -> str:
    """Return "png", "jpeg" ... of the bytes of a picture, or "" where they are none."""
    with contextlib.suppress(OSError), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return str(image.format).lower()
    return ""


def from_hub(config: Config) -> Found:
    """Write the pictures of a Hub data set beside the table."""
    try:
        rows = load_hub_dataset(config.hf_dataset or "", config.hf_split)
    except UserError as error:
        return Found([], [str(error)], [])
    folder = config.output.with_suffix("")

    def locate(value: Any, role: str, name: str) -> Path:
        stored = value if isinstance(value, dict) else {"path": value}
        data: bytes = stored.get("bytes") or b""
        if not data and stored["path"] and Path(str(stored["path"])).is_file():
            return Path(str(stored["path"]))
        kind = picture_format(data)
        if not kind:
            raise ValueError(f"{role}: {stored['path'] or 'what is stored'} is no picture")
        file = folder / role / f"{name}.{kind}"
        if not file.is_file() or file.read_bytes() != data:
            save_atomic(file, lambda temporary: temporary.write_bytes(data))
        return file

    tell_unread(rows.column_names, config.columns)
    return pairs_of_records(rows, config.columns, locate)


# --- 4. folders with several references of a sample -----------------------------------------------


class FoldersConfig(Section):
    """A folder of targets and folders of references; same stem, nested folders kept."""

    target_dir: Path | None = None
    """Folder of the targets."""
    reference_dirs: list[Path] = []
    """Folders of the references, in order; a_control_1.png, a_control_2.png are more of a.png."""
    mask_dir: Path | None = None
    """Folder of masks of the same stem; null: a_mask.png beside a.png."""
    caption_ext: str = Field(".txt", pattern=r"^\.[^./\\]+$")
    """Extension of the caption beside the target (or first reference)."""
    caption_lines: bool = True
    """Each line of a caption file is a caption; false: the whole file is one."""


def from_folders(config: Config) -> Found:
    """Pair the pictures of folders as the trainer does, and join the references of one sample."""
    names = ("train_data_dir", "target_dir", "reference_dirs", "mask_dir", "caption_ext")
    ds = DatasetConfig.model_validate({name: getattr(config, name) for name in names})
    rows, problems = group_by_folder(ds)
    for name, row in sorted(rows.items()):
        more = re.fullmatch(r"(.+)_control_(\d+)", name)
        if more and more[1] in rows and "target" not in row.files:
            del rows[name]
            its = {f"{role}.{more[2]}": file for role, file in row.files.items()}
            rows[more[1]].files.update(its)
    found = Found([], problems, [])
    for name, row in sorted(rows.items()):
        roles = sorted((r for r in row.files if r.startswith("reference")), key=role_order)
        needed = ["target", *(f"reference {i + 1}" for i in range(len(config.reference_dirs)))]
        lacking = [role for role in needed if role not in row.files]
        fewer = config.on_missing == "allow_fewer" and roles and "target" in row.files
        if len(lacking) == len(needed):
            found.broken.append(f"mask {row.files['mask']} has no target of its name")
        elif lacking and not fewer:
            there = ", ".join(map(str, row.files.values()))
            found.broken.append(f"'{name}' lacks its {', '.join(lacking)} (there is {there})")
        else:
            references = [row.files[role] for role in roles]
            prompts = [config.caption or ""]
            try:
                if not config.caption:
                    prompts = beside(row.files["target"], references[0], config)
                pair = Pair(row.files["target"], references, prompts, row.files.get("mask"))
                found.pairs.append(pair)
            except ValueError as error:
                found.broken.append(str(error))
    return found


def role_order(role: str) -> list[int]:
    """Return the numbers of a role: "reference 2.10" -> [2, 10]."""
    return [int(number) for number in role.split()[1].split(".")]


def beside(target: Path, reference: Path, config: Config) -> list[str]:
    """Return the captions beside a target or its first reference. Raises ValueError."""
    places = [file.with_suffix(config.caption_ext) for file in (target, reference)]
    there = next((path for path in places if path.exists()), places[0])
    return list(read_captions(there, config.caption_lines))


# --- 5. pairs -> lines of the table ---------------------------------------------------------------


class ChoiceConfig(Section):
    """What becomes of a sample."""

    caption: str | None = None
    """One instruction for every sample, instead of files or a column."""
    selected_control_indexes: list[Annotated[int, Field(ge=1)]] = []
    """References to take, counted from 1, in this order; [] is all."""
    conditioning_multidataset_sampling: Literal["combined", "random"] = "combined"
    """One line with all references of a sample, or one line for each of them."""
    on_missing: Literal["error", "skip", "allow_fewer"] = "error"
    """What to do with a sample that lacks a file or a caption; allow_fewer: lacks references."""


def choose_references(config: ChoiceConfig, pair: Pair) -> list[Path]:
    """Return the references of a pair that are wanted, in order. Raises ValueError."""
    wanted, there = config.selected_control_indexes, pair.references
    chosen = [there[i - 1] for i in wanted if i <= len(there)] if wanted else there
    if not chosen or (len(chosen) < len(wanted) and config.on_missing != "allow_fewer"):
        text = f"selected_control_indexes asks for number {max(wanted, default=1)}"
        raise ValueError(f"{pair.target} has {len(there)} reference(s), {text}")
    return chosen


def lines_of(config: Config, pair: Pair) -> list[dict[str, Any]]:
    """Return the lines of a pair. Raises ValueError."""
    chosen = choose_references(config, pair)
    prompts = [config.caption] if config.caption else pair.prompts
    if not prompts:
        raise ValueError(f"no prompt for {pair.target}: fill its column, or give --caption")

    def place(file: Path) -> str:
        """Return a path, relative if beside the table or below, so that both can be moved."""
        path = Path(os.path.abspath(file))  # noqa: PTH100 (links stay)
        folder = Path(os.path.abspath(config.output.parent))  # noqa: PTH100
        return str(path.relative_to(folder) if path.is_relative_to(folder) else path)

    line: dict[str, Any] = {"target": place(pair.target), "references": []}
    line["prompt"] = prompts[0] if len(prompts) == 1 else prompts
    line |= {"mask": place(pair.mask)} if pair.mask else {}
    alone = config.conditioning_multidataset_sampling == "random"
    sets = [[file] for file in chosen] if alone else [chosen]
    return [line | {"references": [place(file) for file in files]} for files in sets]


# --- 6. main --------------------------------------------------------------------------------------

SOURCES = {  # setting that names a source: what reads it, the settings of its own
    "hf_dataset": (from_hub, {"hf_split", "columns"}),
    "table": (from_table, {"train_data_dir", "columns"}),
    "target_dir": (from_folders, {"train_data_dir", *FoldersConfig.model_fields}),
}


class Config(ChoiceConfig, FoldersConfig, ColumnsConfig, TableConfig, HubConfig):
    """pair_table.py: give one of hf_dataset, table and target_dir; the result is a table."""

    output: Path = Path("pairs.jsonl")
    """Table to write; pictures of a Hub data set go into a folder of its name beside it."""

    def rules(self) -> dict[str, Any]:
        """Return {problem: whether it is there}."""
        given = [name for name in SOURCES if getattr(self, name)]
        read = SOURCES[given[0]][1] if given else set()
        others = {name for _, own in SOURCES.values() for name in own} - read - {*given}
        unread = sorted(self.model_fields_set & others)
        itself = self.table and self.output.resolve() == self.table.resolve()
        return {
            f"give one of {', '.join(SOURCES)}": len(given) != 1,
            f"{', '.join(unread)}: not read beside {given[:1]}": len(given) == 1 and unread,
            "reference_dirs: name at least one": self.target_dir and not self.reference_dirs,
            "output: wanted a name that ends in .jsonl": self.output.suffix != ".jsonl",
            "output: is the table that is read; name another file": itself,
        }


def check(config: Config) -> list[str]:
    """Return what can be known to be wrong before anything is read."""
    problems = check_setup(writes={"output": config.output.parent})
    if config.output.exists() and not read_table(config.output, config.output.parent).pairs:
        problems.append(f"output: {config.output} is no table of this tool; name another file")
    return problems


def write_table(config: Config) -> str:
    """Write the table; return what it holds. Raises UserError with every problem."""
    [read] = [SOURCES[name][0] for name in SOURCES if getattr(config, name)]
    pairs, problems, broken = read(config)
    lines: list[dict[str, Any]] = []
    for pair in pairs:
        try:
            lines += lines_of(config, pair)
        except ValueError as error:
            broken.append(str(error))
    if config.on_missing == "skip" and broken:
        print(f"{len(broken)} sample(s) left out\n{listed(broken)}", file=sys.stderr)
    else:
        problems = problems + broken
    if problems or not lines:
        text = f"{len(problems)} problem(s), no table was written"
        raise UserError(f"{text}\n{listed(problems or ['there is no pair'])}")
    save_text(config.output, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
    return about(lines)


def about(lines: Sequence[dict[str, Any]]) -> str:
    """Return the numbers of a table."""
    counts = sorted({len(line["references"]) for line in lines})
    references = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    masks = sum("mask" in line for line in lines)
    return f"{len(lines)} line(s), {references} reference(s) each, {masks} mask(s)"


def main() -> None:
    """Write the table of the settings, print the setting that names it in a training."""
    config = load_config(Config, check=check)
    print(f"{config.output}: {write_table(config)}")
    print(f"for train_qwen_edit.py: data.dataset_configs.0.table: {config.output}")


if __name__ == "__main__":
    run_script(main)
