"""The notebooks run from top to bottom, on a CPU with tiny models; the repository has no outputs.

Their cells run in a Jupyter kernel; what they start with `!python` runs in forks, as all commands
of the tests do: `python` is a program that asks this process for them.
"""

import json
import re
import shutil
import socketserver
import sys
import threading

import nbformat
import pytest
from conftest import ROOT, run
from nbclient import NotebookClient
from PIL import Image

import train_pairedit
import train_qwen_edit
from utils import load_tool

NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
TINY = {  # notebook: flags; the demos' base models, two steps
    "qwen_edit": "--model.pretrained_model_name_or_path {root}/demo/qwen_edit_base "
    "--model.base_model_precision no_change --model.blocks_to_swap 0 "
    "--data.dataset_configs.0.resolution 64 --data.num_workers 0 --train.mixed_precision no "
    "--train.gradient_accumulation_steps 1 --train.max_train_steps 2 "
    "--validation.num_inference_steps 2 --validation.true_cfg_scale 1",
    "pairedit": "--pretrained_model_name_or_path {root}/demo/flux_slider_base "
    "--base_model_precision no_change --mixed_precision no --resolution 32 "
    "--max_sequence_length 16 --train_iteration 2",
    "dreambooth_pairs": "--pretrained_model_name_or_path {root}/demo/sd_pairs_base "
    "--mixed_precision no --resolution 64 --max_train_steps 2 --num_validation_images 1 "
    "--validation_inference_steps 2",
}
ASK = """#!{python} -SE
import json, os, socket, sys
with socket.create_connection(("127.0.0.1", {port})) as place:
    place.sendall(json.dumps([os.getcwd(), sys.argv[1:]]).encode() + b"\\n")
    code, said = json.loads(place.makefile().read())
print(said)
sys.exit(code)
"""


class Fork(socketserver.StreamRequestHandler):
    def handle(self):
        cwd, words = json.loads(self.rfile.readline())
        done = run(*words, cwd=cwd, check=False)
        said = json.dumps([done.returncode, done.stdout + done.stderr[-4000:]])
        self.wfile.write(said.encode())


@pytest.fixture
def forks(tmp_path):
    """A folder whose `python` runs scripts in forks."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Fork) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        programs = tmp_path / "bin"
        programs.mkdir()
        text = ASK.format(python=sys.executable, port=server.server_address[1])
        (programs / "python").write_text(text)
        (programs / "python").chmod(0o755)
        yield programs
        server.shutdown()


@pytest.fixture
def clone(tmp_path):
    """The project in a folder of its own, with a place for data."""
    place = tmp_path / "clone"
    for name in ("notebooks", "data"):
        (place / name).mkdir(parents=True)
    (place / "data/photo_pairs").symlink_to(ROOT / "data/photo_pairs")
    for path in [*ROOT.glob("*.py"), ROOT / "configs", ROOT / "tools"]:
        (place / path.name).symlink_to(path)
    return place


def zip_of_pairs(folder, file):
    """Twelve pairs in before/ and after/ of a folder, as `file`.zip."""
    for side, colour in (("before", 40), ("after", 90)):
        (folder / "pairs" / side).mkdir(parents=True)
        for number in range(12):
            image = Image.new("RGB", (96, 96), (colour, 20 * number, 120))
            image.save(folder / f"pairs/{side}/{number}.png")
            (folder / f"pairs/{side}/{number}.txt").write_text("an edit")
    shutil.make_archive(file, "zip", folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_a_notebook_trains_shows_and_draws(name, clone, forks, monkeypatch):
    monkeypatch.setenv("PATH", str(forks), prepend=":")
    monkeypatch.setenv("NOTEBOOK_FLAGS", TINY[name].format(root=ROOT))
    if name == "qwen_edit":  # own pairs, dropped into the list of files
        zip_of_pairs(clone.parent / "mine", clone / "my_pairs")
    notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)
    where = {"metadata": {"path": str(clone / "notebooks")}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [o for o in outputs if "image/png" in o.get("data", {})]
    shown += [o for o in outputs if "image/jpeg" in o.get("data", {})]
    assert len(shown) >= 2  # the sheet of the training, what was drawn
    out = clone / f"outputs/{name.removesuffix('_pairs')}_notebook"
    assert list(out.rglob("checkpoint-2/state.json")) and list(out.rglob("*.safetensors"))
    if name == "qwen_edit":
        names = {path.name for path in (clone / "data/my_pairs/before").glob("*.png")}
        assert names == {f"{number}.png" for number in range(12)}
    strips = [*out.rglob("strip.png"), *out.glob("strips/**/*.jpg")]
    assert strips
    for strip in strips:
        with Image.open(strip) as image:
            assert image.width >= 32


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_repositorys_notebooks_are_valid_and_have_no_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stem in TINY
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    for name in re.findall(r"\b(?:configs|docs|tools)/\w+\.\w+", path.read_text()):
        assert (ROOT / name).exists(), name


def choices(name):
    """The table of a notebook: {GB that a card must have: flags}."""
    notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)
    [cell] = [cell.source for cell in notebook.cells if "choices = {" in cell.source]
    table = re.search(r"choices = (\{.*?\n\})", cell, re.DOTALL)[1]
    return eval(table)  # ours


@pytest.mark.parametrize(
    ("name", "script"), [("qwen_edit", train_qwen_edit), ("pairedit", train_pairedit)]
)
def test_what_a_notebook_chooses_fits_the_card(name, script, clone, monkeypatch):
    """T4 to H100: --plan's peak of what is chosen is below what the card has."""
    monkeypatch.chdir(clone)
    cards, planned = load_tool("cards"), load_tool("plan").planned
    sides = {"qwen_edit": ("data/my_pairs", "before", "after")}.get(
        name, ("datasets/age", "source", "target")
    )
    for side in sides[1:]:
        (clone / sides[0] / side).mkdir(parents=True)
        for number in range(6):
            image = Image.new("RGB", (256, 256), (number, 40, ord(side[0])))
            image.save(clone / sides[0] / side / f"{number}.png")
            (clone / sides[0] / side / f"{number}.txt").write_text("an edit")
    peaks = {}
    for flags in set(choices(name).values()):
        words = [*flags.split(), *(["--datasets", "age"] if name == "pairedit" else [])]
        said = planned(script, getattr(script, "with_named_config", list)(words))
        found = re.search(r"(?:training |Memory +about) +(\d+\.\d) GB", said)
        peaks[flags] = float(found[1])
    for card in ("T4", "L4", "A100 40 GB", "H100 80 GB"):
        room = cards.CARDS[card][0]
        assert peaks[cards.pick(choices(name), room)] < room, card
    with pytest.raises(SystemExit, match="is needed"):
        cards.pick(choices(name), 8.0)
