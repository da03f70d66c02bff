"""Every setting of a script, as --help shows it and as the tables of the docs have it.

python train_qwen_edit.py --help [SECTION]              # what the scripts do with it
python tools/settings.py table train_qwen_edit.py       # a Markdown table, for docs/
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import Section, UserError, load_script, nearest, run_script, settings


def sections(cls: type[Section]) -> dict[str, dict[str, Any]]:
    """Return {section: {setting: field}}; in a flat config a class is a section."""
    found: dict[str, dict[str, Any]] = {}
    for path, field in settings(cls):
        name, dot, _ = path.partition(".")
        owner = next(c for c in cls.__mro__ if name in inspect.get_annotations(c))
        section = name if dot else owner.__name__.removesuffix("Config").lower() or "general"
        found.setdefault(section, {})[path] = field
    return found


def type_in_words(kind: Any) -> str:
    """Return what a setting takes: "whole number", "mse | huber", "list of text"."""
    words = {bool: "true | false", int: "whole number", float: "number", str: "text", Path: "path"}
    inner = [type_in_words(arg) for arg in get_args(kind) if arg is not type(None)]
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if hasattr(kind, "__metadata__"):  # Annotated
        return type_in_words(get_args(kind)[0])
    if get_origin(kind) is list:
        return f"list of {inner[0]}"
    return (
        " | ".join(dict.fromkeys(inner))
        if inner and get_origin(kind) is not dict
        else words.get(kind, "mapping")
    )


def default_of(field: Any) -> str:
    """Return a setting's default as YAML has it, or "required"."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return (
        {None: "null", "": '""'}.get(value, str(value))
        if isinstance(value, str | None)
        else str(value)
    )


def help_text(cls: type[Section], wanted: str) -> str:
    """Return the settings of one section, of "all", or ("") the newcomer's and the sections.

    Raises:
        UserError: no section of that name.
    """
    every, fields = sections(cls), dict(settings(cls))
    if wanted not in ("", "all", *every):
        raise UserError(f"--help {wanted}: no such section{nearest(wanted, ['all', *every])}")
    shown = {wanted: every[wanted]} if wanted in every else every
    if not wanted:
        shown = {"first": {path: fields[path] for path in cls.newcomer or fields}}
    text = [] if wanted in every else [f"{cls.__doc__}"]
    for section, its in shown.items():
        text += ["", f"[{section}]"] if wanted else [""]
        for path, field in its.items():
            text.append(f"  --{path}  ({type_in_words(field.annotation)}; {default_of(field)})")
            text += [f"      {line}" for line in (field.description or "").splitlines()]
    return "\n".join(
        [
            *text,
            "",
            "  --config FILE     YAML or JSON file, see configs/",
            "  --print_config    show what would run",
            f"  --help SECTION    {', '.join(every)}; or all",
        ]
    )


def table(cls: type[Section]) -> str:
    """Return a Markdown table of every setting: name, default, meaning."""
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for path, field in settings(cls):
        choices = type_in_words(field.annotation)
        meaning = " ".join((field.description or "").split())
        meaning += f" ({choices})" if " | " in choices else ""
        rows.append(f"| `{path}` | {default_of(field)} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def main() -> None:
    """Print the table of a script's settings."""
    match sys.argv[1:]:
        case ["table", script]:
            print(table(load_script(Path(script)).Config))
        case _:
            raise UserError("usage: python tools/settings.py table SCRIPT")


if __name__ == "__main__":
    run_script(main)
