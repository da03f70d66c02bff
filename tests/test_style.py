"""Rules of the house that a reader of the code relies on."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = sorted(ROOT.glob("*.py"))
NAMES = {path.stem for path in SCRIPTS}


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_a_script_needs_only_utils_beside_it(path):
    others = NAMES & set(imports(ast.parse(path.read_text())))
    assert others <= {"utils"}, f"{path.name} imports {others}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_nothing_runs_at_import(path):
    allowed = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign
    for node in ast.parse(path.read_text()).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        main = isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
        # utils.py teaches its YAML loader YAML 1.2 scalars
        teaches = ast.unparse(node).startswith("_Loader.add_implicit_resolver")
        typed = isinstance(node, ast.AnnAssign)
        assert isinstance(node, allowed) or docstring or main or teaches or typed, ast.unparse(node)


@pytest.mark.parametrize("tool", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]])
def test_linters_pass(tool):
    done = subprocess.run([sys.executable, "-m", *tool], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
