"""Whatever a file or a flag holds: it is taken, or named in a UserError; never a traceback.

FUZZ_EXAMPLES=3000 python -m pytest tests/test_fuzz.py -n 2    # about ten minutes
"""

import contextlib
import copy
import json
import os

import pytest
import torch
import yaml
from conftest import PAIRS, slider_settings, small_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

import evaluate
import generate
import train_dreambooth_pairs
import train_pairedit
import train_qwen_edit
import utils
from utils import UserError, load_config, load_tool

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))
settings.register_profile(
    "fuzz",
    max_examples=EXAMPLES,
    deadline=20_000,  # ms
    derandomize=EXAMPLES == 25,
    suppress_health_check=[*HealthCheck],
    database=None,
)
settings.load_profile("fuzz")
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["", "~", "1e400", "no", "null", "0x1", "a.b", "[1", "{a: b", "\0", "é"])
    | st.just(10**400)
)
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=8), v, max_size=3)
)
TEXTS = st.text(max_size=200) | st.sampled_from(
    ["[" * 3000, "{" * 3000, '{"a":' * 3000, "&a [*a]", "a: &a {b: *a}", "? ", "a: b: c", "\t- x"]
)
SCRIPTS = {
    "qwen": train_qwen_edit.Config,
    "pairedit": train_pairedit.Config,
    "sd": train_dreambooth_pairs.Config,
    "edit": generate.EditConfig,
    "slider": generate.SliderConfig,
    "change": generate.ChangeConfig,
    "evaluate": evaluate.Config,
    "table": load_tool("pair_table").Config,
    "between": load_tool("interpolate_sd").Config,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def outcome(function, *args):
    """What a call returns; a UserError's text must say something."""
    try:
        return function(*args)
    except UserError as error:
        assert str(error).strip()
        return None


def places(value, path=()):
    """Every path into nested mappings and lists."""
    yield path
    value = dict(enumerate(value)) if isinstance(value, list) else value
    for key, item in value.items() if isinstance(value, dict) else ():
        yield from places(item, (*path, key))


def hurt(whole, number, value):
    """A copy with the part at one of its places replaced."""
    _, *below = places(whole)
    [*_, last] = path = below[number % len(below)]
    changed = copy.deepcopy(whole)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[last] = value
    return changed


@pytest.mark.parametrize("kind", SCRIPTS)
@given(st.data())
def test_configs(kind, folder, data):
    """A config with a part that is something else, or a file that is no config."""
    whole = {
        "qwen": small_config("base", folder),
        "pairedit": slider_settings("base", folder),
        "sd": {"before_data_dir": "a", "after_data_dir": "b", "use_image_pairs": True},
        "table": {"table": "a.csv", "columns": {"target": "x"}},
        "evaluate": {"results": ["a"], "metrics": ["psnr"]},
    }.get(
        kind, {"lora": ["a.safetensors"], "image": ["a.png"], "scales": [0, 1], "output": "a.png"}
    )
    if data.draw(st.booleans()):
        changed = hurt(whole, data.draw(st.integers(0, 500)), data.draw(VALUES))
        text = yaml.safe_dump(changed, allow_unicode=True)
    else:
        text = data.draw(TEXTS)
    file = folder / "config.yaml"
    file.write_bytes(text.encode(errors="surrogatepass"))
    outcome(load_config, SCRIPTS[kind], ["--config", str(file)])


@pytest.mark.parametrize("kind", SCRIPTS)
@given(st.data())
def test_flags(kind, data):
    names = [path for path, _ in utils.settings(SCRIPTS[kind])]
    known = st.sampled_from(names).map(lambda name: "--" + name.replace("*", "0"))
    words = (
        known
        | st.text(max_size=12)
        | st.sampled_from(["--", "---", "-x", "--a.0.b", "--=", "{", "[1,"])
    )
    argv = data.draw(st.lists(words, max_size=6))
    if not {"--help", "-h", "--print_config"} & {word.partition("=")[0] for word in argv}:
        outcome(load_config, SCRIPTS[kind], argv)


NAMES = st.sampled_from(
    ["a", "b", "a_T", "a_R", "a_mask", "a_T_mask", "é", "e\u0301", "_T", "a.b", "sub/a", "A", "a b"]
)
ENDS = st.sampled_from([".png", ".PNG", ".jpg", ".txt", ".gif", ".heic", ".csv", "", ".png/x.png"])


@given(st.lists(st.tuples(st.sampled_from("tr"), NAMES, ENDS), max_size=8), st.booleans())
def test_pairing(tmp_path_factory, files, by_folder):
    place = tmp_path_factory.mktemp("pairs")
    for side, name, end in files:
        with contextlib.suppress(OSError):  # a name that is a folder already
            file = place / side / f"{name}{end}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("a caption" if end == ".txt" else "")
    data = {"train_data_dir": str(place), "target_dir": "t", "reference_dirs": ["r"]}
    if not by_folder:
        data = small_config("b", place)["data"]["dataset_configs"][0] | {
            "train_data_dir": str(place)
        }
    config = train_qwen_edit.Config.model_validate({"data": {"dataset_configs": [data]}})
    samples, problems, _ = train_qwen_edit.find_dataset(config, 0)
    assert all(path.is_file() for sample in samples for v in sample.variants for path in v.files())
    assert samples or problems


CELLS = st.sampled_from(["", "coffee0_T.png", "coffee0_R.png", "no.png", "\0", "a" * 300, ".", "x"])
COLUMN = st.sampled_from(
    [
        "target",
        "references",
        "reference_1",
        "reference_2",
        "control",
        "prompt",
        "mask",
        "image",
        "images",
        "name",
        "seed",
        "",
        "más",
        "target;prompt",
    ]
)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
@given(st.data())
def test_tables(kind, folder, data):
    table = folder / f"table.{kind}"
    if data.draw(st.booleans()):
        rows = data.draw(st.lists(st.dictionaries(COLUMN, CELLS | VALUES, max_size=5), max_size=3))
        rows = rows + data.draw(st.lists(VALUES, max_size=1))
        if kind == "csv":
            head = data.draw(st.lists(COLUMN, max_size=4))
            lines = data.draw(st.lists(st.lists(CELLS, max_size=5), max_size=3))
            text = "\n".join(",".join(line) for line in [head, *lines])
        else:
            text = "\n".join(map(json.dumps, rows)) if kind == "jsonl" else json.dumps(rows)
    else:
        text = data.draw(TEXTS)
    table.write_bytes(text.encode(errors="surrogatepass"))
    found = load_tool("pair_rows").read_table(table, PAIRS)
    assert found.pairs or found.problems or found.broken or kind == "json"
    assert all(pair.target.is_file() for pair in found.pairs)
    rows, problems = generate.read_jobs(table)
    assert rows or problems


TENSORS = {"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(3, 2)}
ABOUT = {"format": "pt", "image_edit_lora": '{"r": 2}', "lora_adapter_metadata": '{"r": 2}'}


def damaged(data, whole):
    """Bytes of a file with some of them changed, cut off or put in."""
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "text"]))
    at = data.draw(st.integers(0, len(whole) - 1))
    if kind == "flip":
        return whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at + 1 :]
    if kind == "cut":
        return whole[:at]
    if kind == "insert":
        return whole[:at] + data.draw(st.binary(max_size=8)) + whole[at:]
    return data.draw(TEXTS).encode(errors="surrogatepass")


@given(st.data())
def test_entries_of_the_cache(folder, data):
    utils.save_tensors(folder / "entry.safetensors", TENSORS)
    whole = (folder / "entry.safetensors").read_bytes()
    (folder / "entry.safetensors").write_bytes(damaged(data, whole))
    read = outcome(utils.read_entry, folder / "entry.safetensors")
    assert not read or all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)


@given(st.data())
def test_the_index_of_the_cache(tmp_path_factory, data):
    place = tmp_path_factory.mktemp("index")
    picture = PAIRS / "coffee0_T.png"
    facts = {"width": 3}
    utils.FileIndex(place).update([picture], lambda path: facts)
    file = place / "index.jsonl"
    file.write_bytes(damaged(data, file.read_bytes()))
    index = utils.FileIndex(place)
    assert index.update([picture], lambda path: facts) == []


@given(st.data())
def test_loras(folder, data):
    """As bytes that are hurt, or whole with strange metadata and tensors."""
    file = folder / "lora.safetensors"
    if data.draw(st.booleans()):
        file.write_bytes(damaged(data, save(TENSORS, ABOUT)))
    else:
        texts = st.sampled_from(
            [
                "{}",
                "[]",
                "3",
                '{"r": "x"}',
                '{"alpha_pattern": {"(a+)+$": 1}}',
                '{"image_edit_lora": []}',
                '{"flavour": 3, "reference_area": {}}',
            ]
        )
        told = st.dictionaries(st.sampled_from([*ABOUT, "crc32", "x"]), texts | TEXTS, max_size=3)
        ends = st.sampled_from(
            [
                "a.lora_A.weight",
                "a.lora_B.weight",
                "a.lora_down.weight",
                "a.alpha",
                "a.lora_up.weight",
                "transformer.a.lokr_w1",
                "x",
                "a.diff",
            ]
        )
        shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
        fill = st.sampled_from([0.0, 1.0, float("nan"), float("inf")])
        made = st.dictionaries(
            ends, st.tuples(shapes, fill).map(lambda x: torch.full(*x)), max_size=3
        )
        names = {name: str(text) for name, text in data.draw(told).items()}
        file.write_bytes(save(data.draw(made), names))
    found = outcome(load_tool("check").check_lora, file)
    generate.read_about(file)
    read = outcome(load_tool("lora_names").read_tensors, file)
    assert found is not None and (found or read is not None)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
@given(st.data())
def test_pictures(kind, folder, data):
    image = utils.open_rgb(PAIRS / "coffee0_T.png").resize((16, 8))
    image.save(folder / "a.bin", format=kind)
    (folder / "a.png").write_bytes(damaged(data, (folder / "a.bin").read_bytes()))
    facts = outcome(utils.look_at_picture, folder / "a.png")
    assert not facts or facts["width"] * facts["height"] < utils.MAX_PIXELS


@given(st.data())
def test_checkpoints(tmp_path_factory, data):
    place = tmp_path_factory.mktemp("run")
    checkpoints = utils.Checkpoints(place)
    checkpoints.save(3, {"lr": 1}, {"x": torch.ones(2)}, lambda folder: None)
    file = place / "checkpoint-3" / data.draw(st.sampled_from(["state.json", "training_state.pt"]))
    whole = file.read_bytes()
    file.write_bytes(damaged(data, whole))
    found = outcome(checkpoints.find, "latest", {"lr": 1})
    assert (found is None) or file.read_bytes() == whole or file.name == "state.json"
    (place / "run.json").write_bytes(damaged(data, b'{"argv": ["a"], "versions": {"torch": "2"}}'))
    (place / "metrics.jsonl").write_bytes(damaged(data, b'{"step": 1, "loss": 2.0}\n' * 2))
    outcome(load_tool("page").write_report, place)


FOREIGN = {
    "t2itrainer": [{"dataset_configs": [{"train_data_dir": "x"}], "learning_rate": 1e-4}],
    "simpletuner": [{"--resolution": 1024}, [{"id": "a", "type": "local"}]],
    "qwen-image-finetune": [{"data": {"init_args": {}}, "model": {"lora": {"r": 4}}}],
}


@pytest.mark.parametrize("tool", FOREIGN)
@given(st.data())
def test_configs_of_other_trainers(tool, folder, data):
    files = []
    for number, whole in enumerate(FOREIGN[tool]):
        changed = hurt(whole, data.draw(st.integers(0, 50)), data.draw(VALUES))
        text = json.dumps(changed) if data.draw(st.booleans()) else data.draw(TEXTS)
        files.append(folder / f"foreign{number}.json")
        files[-1].write_bytes(text.encode(errors="surrogatepass"))
    outcome(load_tool("convert_config").convert, tool, files, lambda *args: None)
