"""tools/pair_table.py: what it writes is what train_qwen_edit.py then trains on."""

import csv
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run
from PIL import Image

import train_qwen_edit as script
from utils import UserError, load_config, load_script, open_rgb

TOOL = ROOT / "tools" / "pair_table.py"
tool = load_script(TOOL)


def picture(path, grey=None, size=(64, 48)):
    """A picture of one grey; by default each path has a colour of its own."""
    own = zlib.crc32(str(path).encode()).to_bytes(4, "big")[:3]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey,) * 3 if grey is not None else tuple(own)).save(path)
    return path


def write(tmp_path, *flags):
    """The lines of the table that these flags write."""
    argv = [*map(str, flags), "--output", str(tmp_path / "out/pairs.jsonl")]
    config = load_config(tool.Config, argv, check=tool.check)
    tool.write_table(config)
    return list(map(json.loads, config.output.read_text().splitlines()))


def mistakes(tmp_path, *flags):
    """What is said; nothing is written."""
    with pytest.raises(UserError) as error:
        write(tmp_path, *flags)
    assert not (tmp_path / "out/pairs.jsonl").exists()
    return str(error.value)


def trained(tmp_path):
    """[(name, names of the references, captions, mask)] of the samples that a training finds."""
    data = {"table": str(tmp_path / "out/pairs.jsonl"), "resolution": 64}
    settings = {"data": {"dataset_configs": [data]}, "cache": {"use_cache": False}}
    settings["logging"] = {"output_dir": str(tmp_path / "run")}
    config = script.Config.model_validate(settings)
    found, problems = script.find_samples(config, script.Flavour("edit-v3", "", 384 * 384))
    assert not problems
    rows = []
    for sample in found.samples:
        first = sample.variants[0]
        captions = [variant.caption for variant in sample.variants]
        references = [Path(reference.path).name for reference in first.references]
        rows.append((sample.name, references, captions, first.mask and Path(first.mask)))
    return rows


# --- folders --------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    """a with four references, b with one; a mask beside a target and one beside a reference."""
    root = tmp_path / "photos"
    for name in ("a", "b"):
        picture(root / f"images/{name}.png")
        (root / f"images/{name}.txt").write_text(f"first of {name}\n\nsecond of {name}\n")
        picture(root / f"control/{name}.jpg")
    for i in (1, 2, 10):
        picture(root / f"control/a_control_{i}.png")
    picture(root / "images/a_mask.png")
    picture(root / "control/b_mask.png")
    return ["--train_data_dir", root, "--target_dir", "images", "--reference_dirs", "control"]


def test_numbered_references_masks_and_captions_of_folders(photos, tmp_path):
    write(tmp_path, *photos)
    extra = ["a_control_1.png", "a_control_2.png", "a_control_10.png"]
    root = tmp_path / "photos"
    assert trained(tmp_path) == [
        ("a", ["a.jpg", *extra], ["first of a", "second of a"], root / "images/a_mask.png"),
        ("b", ["b.jpg"], ["first of b", "second of b"], root / "control/b_mask.png"),
    ]
    whole = write(tmp_path, *photos, "--caption_lines", "false")
    assert [line["prompt"] for line in whole] == ["first of a\n\nsecond of a", whole[1]["prompt"]]


def test_references_are_chosen_and_a_sample_that_lacks_one_is_named_left_out_or_kept(
    photos, tmp_path
):
    chosen = [*photos, "--caption", "x", "--selected_control_indexes", "3", "1"]
    assert "b.png has 1 reference(s)" in mistakes(tmp_path, *chosen)
    write(tmp_path, *chosen, "--on_missing", "skip")
    assert [row[:3] for row in trained(tmp_path)] == [("a", ["a_control_2.png", "a.jpg"], ["x"])]
    write(tmp_path, *chosen, "--on_missing", "allow_fewer")
    assert [row[1] for row in trained(tmp_path)] == [["a_control_2.png", "a.jpg"], ["b.jpg"]]


def test_a_line_for_each_reference(photos, tmp_path):
    flags = ["--selected_control_indexes", "1", "2", "--on_missing", "allow_fewer"]
    write(tmp_path, *photos, *flags, "--conditioning_multidataset_sampling", "random")
    names = [("a", ["a.jpg"]), ("a#2", ["a_control_1.png"]), ("b", ["b.jpg"])]
    assert [row[:2] for row in trained(tmp_path)] == names


def test_two_folders_of_references_some_of_them_missing(tmp_path):
    for name in ("t/a", "t/b", "t/c", "r1/a", "r1/b", "r2/a"):
        picture(tmp_path / f"{name}.png")
    picture(tmp_path / "m/typo.png")
    flags = ["--train_data_dir", tmp_path, "--target_dir", "t", "--reference_dirs", "r1", "r2"]
    flags += ["--mask_dir", "m", "--caption", "x"]
    text = mistakes(tmp_path, *flags)
    for problem in ("'b' lacks its reference 2", f"{tmp_path}/r1/b", "'c' lacks", "typo.png has"):
        assert problem in text
    (tmp_path / "m/typo.png").unlink()
    text = mistakes(tmp_path, *flags, "--on_missing", "allow_fewer")
    assert "'c' lacks" in text and "'b' lacks" not in text
    (tmp_path / "t/c.png").unlink()
    write(tmp_path, *flags, "--on_missing", "allow_fewer")
    assert [len(row[1]) for row in trained(tmp_path)] == [2, 1]


# --- tables of other trainers ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_tables_of_qwen_image_finetune(kind, tmp_path):
    """11 and 1 references, one a column; the order is that of the numbers, not of the columns."""
    first = {"path_target": "t/a.png", "path_control": "r/a.png", "prompt": "make it blue"}
    first |= {f"path_control_{i}": f"r/a{i}.png" for i in range(1, 11)}
    second = {"path_target": "t/b.png", "path_control": "r/b.png", "prompt": "make it red"}
    second["path_mask"] = "m/b.png"
    for row in (first, second):
        for name in [row[column] for column in row if column.startswith("path_")]:
            picture(tmp_path / name)
    table = tmp_path / f"table.{kind}"
    if kind == "csv":
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*sorted(first), "path_mask"])
            writer.writeheader()
            writer.writerows([first, second])
    else:
        second["prompt"] = ["make it red", "red!"]
        table.write_text("\n".join(map(json.dumps, (first, second))))
    write(tmp_path, "--table", table)
    captions = ["make it red"] if kind == "csv" else ["make it red", "red!"]
    assert trained(tmp_path) == [
        ("a", ["a.png", *(f"a{i}.png" for i in range(1, 11))], ["make it blue"], None),
        ("b", ["b.png"], captions, tmp_path / "m/b.png"),
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"image": "t.png", "prompt": "x", "edit_image": ["r.png", "s.png"]},  # DiffSynth-Studio
        {  # musubi-tuner
            "image_path": "t.png",
            "caption": "x",
            "control_path_0": "r.png",
            "control_path_1": "s.png",
        },
        {"target": "t.png", "prompt": "x", "control": "r.png", "control_1": "s.png"},
        {"target": "t.png", "prompt": "x", "reference_1": "r.png", "reference_2": "s.png"},
    ],
)
def test_names_of_columns(row, tmp_path):
    for name in ("t.png", "r.png", "s.png"):
        picture(tmp_path / name)
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    write(tmp_path, "--table", tmp_path / "rows.json")
    assert trained(tmp_path) == [("t", ["r.png", "s.png"], ["x"], None)]


def test_columns_can_be_named_and_those_that_are_not_read_are(tmp_path, caplog):
    for name in ("t.png", "r.png"):
        picture(tmp_path / name)
    row = {"chosen": "t.png", "rejected": "r.png", "prompt": "x", "image": "no.png", "masc": "m"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    flags = ["--columns.target", "chosen", "--columns.references", "rejected"]
    write(tmp_path, "--table", "rows.jsonl", "--train_data_dir", tmp_path, *flags)
    assert trained(tmp_path) == [("t", ["r.png"], ["x"], None)]
    assert "masc" in caplog.text


def test_a_tables_mistakes_are_named_by_row_all_at_once(tmp_path):
    picture(tmp_path / "a.png")
    rows = [
        {"target": "a.png", "references": ["no.png"], "prompt": "x"},
        {"references": ["a.png"], "prompt": "x"},
        {"target": "a.png", "prompt": "x"},
        {"target": "a.png", "references": ["a.png", None], "prompt": "x"},
        {"target": "a.png", "references": [f"{'x' * 300}.png"], "prompt": "x"},
        {"target": "a.png", "references": "a.png"},
    ]
    table = tmp_path / "t.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    text = mistakes(tmp_path, "--table", table)
    for words in ("row 1: no file", "row 2: no target", "row 3: no reference", "row 4: no ref"):
        assert words in text
    assert "row 5" in text and "no prompt" in text
    for name, content in (("cut.jsonl", '{"target": '), ("list.jsonl", "[1]"), ("o.json", "1")):
        (tmp_path / name).write_text(content)
        assert name in mistakes(tmp_path, "--table", tmp_path / name)
    (tmp_path / "t.csv").write_text("target,control,prompt\na.png,a.png,red, then blue\n")
    assert "row 1" in mistakes(tmp_path, "--table", tmp_path / "t.csv")
    assert "none.csv" in mistakes(tmp_path, "--table", "none.csv")


# --- Hub data sets --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """(folder of Parquet files, folder of save_to_disk(), pictures) of a small data set."""
    datasets = pytest.importorskip("datasets")
    folder, rng = tmp_path_factory.mktemp("hub"), np.random.default_rng(0)
    names = ("one", "two", "three")
    images = {n: Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8)) for n in names}
    features = datasets.Features(
        id=datasets.Value("string"),
        target_image=datasets.Image(),
        control_images=datasets.List(datasets.Image()),
        control_mask=datasets.Image(),
        prompt=datasets.Value("string"),
    )
    rows = [
        {"id": "s/1", "target_image": images["one"], "control_images": [images["two"]],
         "control_mask": None, "prompt": "make it blue"},
        {"id": "s2", "target_image": images["two"], "prompt": "make it red",
         "control_images": [images["three"], images["one"]], "control_mask": images["one"]},
    ]  # fmt: skip
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(folder / "parquet" / "data" / "train-0.parquet")
    table.save_to_disk(folder / "disk")
    return folder / "parquet", folder / "disk", images


def test_a_hub_data_set_becomes_a_table_and_pictures_once(hub, tmp_path):
    parquet, disk, images = hub
    lines = write(tmp_path, "--hf_dataset", parquet)
    rows = trained(tmp_path)
    assert [row[:3] for row in rows] == [
        ("s2", ["s2.png", "s2.png"], ["make it red"]),
        ("s_1", ["s_1.png"], ["make it blue"]),
    ]
    assert rows[0][3] and not rows[1][3]
    folder = tmp_path / "out"
    opened = open_rgb(folder / lines[1]["references"][0])  # relative: both can be moved
    assert opened.tobytes() == images["three"].tobytes()
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.png")}
    assert write(tmp_path, "--hf_dataset", disk) == lines
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*.png")}
    assert {file.suffix for file in folder.rglob("*") if file.is_file()} == {".png", ".jsonl"}


def test_a_hub_data_set_that_cannot_be_read(hub, tmp_path):
    import datasets

    columns = {"target_image": ["a.png"] * 2, "control_images": [["b.png", None], ["b.png"]]}
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "hub"))
    text = mistakes(tmp_path, "--hf_dataset", tmp_path / "hub")
    assert "row 1" in text and "row 2" in text and "b.png" in text
    assert "hf_dataset" in mistakes(tmp_path, "--hf_dataset", tmp_path / "no")
    assert "split" in mistakes(tmp_path, "--hf_dataset", hub[0], "--hf_split", "test")


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ([], ["hf_dataset"]),
        (["--table", "a.csv", "--hf_dataset", "b"], ["hf_dataset"]),
        (["--table", "a.csv", "--mask_dir", "m"], ["mask_dir"]),
        (["--hf_dataset", "a", "--train_data_dir", "b"], ["train_data_dir"]),
        (["--target_dir", "t"], ["reference_dirs"]),
        (["--table", "out/pairs.jsonl"], ["output"]),
        (["--table", "a.csv", "--selected_control_indexes", "0"], ["selected_control_indexes.0"]),
        (["--table", "a.csv", "--columns.targt", "b", "--captoin", "x"], ["columns", "captoin"]),
    ],
)
def test_settings_that_do_not_fit_are_named(flags, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = mistakes(tmp_path, *flags)
    assert all(setting in text for setting in settings)


def test_the_command(photos, tmp_path):
    file = tmp_path / "pairs.yaml"
    names = {"train_data_dir": str(photos[1]), "target_dir": "images"}
    file.write_text(json.dumps(names | {"reference_dirs": ["control"]}))
    run(TOOL, "--config", file, "--output", tmp_path / "out/pairs.jsonl", cwd=tmp_path)
    assert [row[0] for row in trained(tmp_path)] == ["a", "b"]
    done = run(TOOL, "--config", file, "--reference_dirs", "no", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_a_gap_among_references_is_named_and_a_short_row_is_not(tmp_path):
    for name in ("t", "r", "s"):
        picture(tmp_path / f"{name}.png")
    rows = [
        "target,control,control_1,prompt",
        "t.png,,s.png,x",
        "t.png,r.png,,x",
        "t.png,r.png,s.png,x",
    ]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    config = load_config(tool.Config, ["--table", str(tmp_path / "t.csv")])
    found = tool.from_table(config)
    assert found.broken == ["row 1: no reference before the last one"]
    assert [len(pair.references) for pair in found.pairs] == [1, 2]
