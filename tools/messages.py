"""Every message about a mistake that the scripts can print, for docs/troubleshooting.md.

python tools/messages.py        # writes the list on that page, between its two marks

Texts are read from the code, not kept a second time; what is to be done, where a message does not
say it, stands in messages.yaml beside this file.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import UserError, load_tool, run_script, save_text

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/troubleshooting.md"
MARKS = re.compile(r"(<!-- messages -->\n).*?(<!-- end -->)", re.DOTALL)
RAISED = {"UserError", "ValueError", "OSError"}
TOLD = {"problems", "found", "wrong", "refused", "left_out", "lines"}  # lists that end in one
CALLED = {"named", "warning"}  # functions that print their texts
QUIET = {"plan.py", "cards.py", "messages.py"}  # lists of others
NO_MESSAGE = (
    r"look at files|the base model|a picture in memory|--before_data_dir .*|usage: .*"
    r"|\(/.*|python .*"
)


def text_of(node: ast.AST) -> str:
    """Return a text of the code, "…" for what is filled in; "" of another node."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = re.sub(r"%(\.\d)?[sdfg]", "…", node.value)
    elif isinstance(node, ast.JoinedStr):
        text = "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
    else:
        return ""
    text = re.sub(r"…(\s*…)+", "…", " ".join(text.replace("\n…", "").split()))
    return text.strip(" ;,:")


def texts_below(node: ast.AST) -> Iterator[str]:
    """Yield the texts in a piece of code, whole ones: not the parts of an f-string."""
    if text := text_of(node):
        yield text
    elif not isinstance(node, ast.JoinedStr):
        for child in ast.iter_child_nodes(node):
            yield from texts_below(child)


def is_message(text: str) -> bool:
    """Return whether a text is a sentence, not a name or a pattern."""
    words = re.findall(r"[a-zA-Z_]{2,}", text)
    return len(words) >= 3 and " " in text and not re.fullmatch(NO_MESSAGE, text)


def values(function: ast.FunctionDef) -> dict[str, list[ast.expr]]:
    """Return what each variable of a function is set to."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.NamedExpr | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in (part for target in targets for part in ast.walk(target)):
                if isinstance(name, ast.Name):
                    found.setdefault(name.id, []).append(node.value)
    return found


def printed(node: ast.AST, lists: bool) -> list[ast.AST]:
    """Return the pieces of a piece of code that are printed; `lists`: it returns problems."""
    if isinstance(node, ast.AugAssign) and getattr(node.target, "id", "") in TOLD:
        return [node.value]
    if isinstance(node, ast.Yield | ast.Return | ast.Assign | ast.AugAssign):
        return [node.value] if lists and node.value else []
    call = node.exc if isinstance(node, ast.Raise) else node
    if not isinstance(call, ast.Call):
        return []
    name, _, end = ast.unparse(call.func).rpartition(".")
    if end in RAISED | CALLED:
        return [call]
    return [*call.args] if end in ("append", "extend", "insert", "add") and name in TOLD else []


def of_function(function: ast.FunctionDef) -> Iterator[str]:
    """Yield the texts of a function that can end in a message."""
    names, body = values(function), list(ast.walk(function))
    returns = ast.unparse(function.returns) if function.returns else ""
    lists = "list[str]" in returns or bool(names.keys() & {"problems", "rules", "wrong"})
    lists |= bool(re.match("rules|check|audit|problems|instead|no_checkpoint|room", function.name))
    for node in [piece for part in body for piece in printed(part, lists)]:
        yield from texts_below(node)
        for name in ast.walk(node):
            if isinstance(name, ast.Name):
                for value in names.get(name.id, ()):
                    yield from texts_below(value)


@functools.cache
def collect() -> dict[str, str]:
    """Return {message: where: its file, or "rules" of settings}, in the order of the files."""
    found: dict[str, str] = {}
    for file in [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("tools/*.py"))]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for function in functions if file.name not in QUIET else []:
            for text in filter(is_message, of_function(function)):
                found.setdefault(text, "rules" if function.name == "rules" else file.name)
    return found


@functools.cache
def advice() -> dict[str, dict[str, str]]:
    """Return what messages.yaml says: `groups` (name: expression) and `advice`."""
    return yaml.safe_load((Path(__file__).with_suffix(".yaml")).read_text(encoding="utf-8"))


def grouped() -> dict[str, list[str]]:
    """Return the messages of each group, in alphabetical order of their words."""
    topics = advice()["groups"]  # of a message the first whose expression is in it
    groups: dict[str, list[str]] = {name: [] for name in topics}
    for text, place in collect().items():
        found = [name for name, words in topics.items() if re.search(words, f"{place} | {text}")]
        groups[found[0] if found else next(iter(topics))].append(text)
    for texts in groups.values():
        texts.sort(key=lambda text: re.sub(r"[^a-z]", "", text.lower()))
    return groups


def listing() -> str:
    """Return the list as Markdown: a section per group, a line per message. Raises UserError."""
    ways = advice()["advice"]
    if unknown := sorted(ways.keys() - collect().keys()):
        raise UserError(f"messages.yaml: nothing says {unknown}")
    text = []
    for name, texts in grouped().items():
        text += [f"### {name}", ""]
        for message in texts:
            mark = "``" if "`" in message else "`"
            then = f" → {ways[message]}" if message in ways else ""
            text.append(f"- {mark}{message}{mark}{then}")
        text.append("")
    text += ["### Settings that went, or are called otherwise elsewhere", ""]
    gone: dict[str, list[str]] = {}
    for setting, way in load_tool("settings").GONE.items():
        gone.setdefault(way, []).append(f"`{setting}`")
    text += [f"- {', '.join(names)} → {way}" for way, names in gone.items()]
    return "\n".join(text) + "\n"


def page() -> str:
    """Return docs/troubleshooting.md with the list as it is now."""
    text = PAGE.read_text(encoding="utf-8")
    return MARKS.sub(lambda marks: marks[1] + listing() + marks[2], text)


def main() -> None:
    """Write the list on the page."""
    save_text(PAGE, page())


if __name__ == "__main__":
    run_script(main)
