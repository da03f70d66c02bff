"""Every way to describe data: suffixes, folders, tables, masks, dropout, what is held out."""

import csv
import itertools
import json
import unicodedata
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import train_qwen_edit as script

FLAVOUR = script.Flavour("edit-v3", "", script.VISION_AREA)


def found(tmp_path, *datasets, **changes):
    """(data, problems) of data sets; `changes` are settings, dotted in a section."""
    settings = {"data": {"dataset_configs": list(datasets)}, "cache": {"use_cache": False}}
    settings["logging"] = {"output_dir": str(tmp_path / "out")}
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        (settings.setdefault(section, {}) if section else settings)[name] = value
    return script.find_samples(script.Config.model_validate(settings), FLAVOUR)


def plan_of(data, rank=0, processes=1, first=0):
    processes = SimpleNamespace(process_index=rank, num_processes=processes)
    return script.StepPlan(data, processes, first)


def draws_of(steps):
    return [draw for step in steps for batch in step for draw in batch]


def picture(path, grey=None, size=(64, 48)):
    """A picture of one grey; by default each path has a colour of its own."""
    own = zlib.crc32(str(path).encode()).to_bytes(4, "big")[:3]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey,) * 3 if grey is not None else tuple(own)).save(path)
    return path


def many_roles(folder, names="abcd", roles="TRD"):
    """a_T.png a_R.png a_D.png a_T.txt ..., every picture of another grey."""
    for i, name in enumerate(names):
        for j, role in enumerate(roles):
            picture(folder / f"{name}_{role}.png", 10 * i + j)
        (folder / f"{name}_T.txt").write_text(f"edit {name}")
    return folder


COMBINATION = {"target_config": "T", "caption_config": "c", "reference_config": "RD"}


def three_roles(folder, **changes):
    """A data set of many_roles() with two references."""
    dataset = {"train_data_dir": str(folder), "resolution": 64, "batch_configs": [COMBINATION]}
    dataset["image_configs"] = {role: {"suffix": f"_{role}"} for role in "TRD"}
    dataset["target_configs"] = {"T": [{"image": "T"}]}
    dataset["reference_configs"] = {"RD": [{"image": "R"}, {"image": "D"}]}
    return dataset | {"caption_configs": {"c": {"image": "T"}}} | changes


def folders(root, **changes):
    """A data set of the folders layout with one instruction for all."""
    dataset = {"train_data_dir": str(root), "target_dir": "t", "reference_dirs": ["r"]}
    return dataset | {"caption": "x", "resolution": 64} | changes


def test_a_stem_ends_with_its_suffix_and_the_longest_wins(tmp_path):
    for stem in ("a_T", "a_DT", "a_D", "a_T1", "cat_Toy_D", "sub/_T", "sub/a_T", "a_t"):
        picture(tmp_path / f"{stem}.png")
    named = {
        "a": {"_T": "a_T", "_DT": "a_DT", "_D": "a_D"},
        "cat_Toy": {"_D": "cat_Toy_D"},
        "sub/a": {"_T": "a_T"},
    }
    rest = {"a_T1": {"": "a_T1"}, "a_t": {"": "a_t"}, "sub/_T": {"": "_T"}}
    for suffixes, wanted in ((["_T", "_D", "_DT"], named), (["", "_T", "_D", "_DT"], named | rest)):
        roles = {suffix: script.ImageConfig(suffix=suffix) for suffix in suffixes}
        dataset = SimpleNamespace(train_data_dir=tmp_path, image_configs=roles)
        rows, problems = script.group_by_suffix(dataset)
        stems = {n: {k: f.stem for k, f in row.files.items()} for n, row in rows.items()}
        assert stems == wanted and not problems


def test_folders_pair_by_relative_stem(tmp_path):
    """Whatever the extension, also where one system spells an accent with two characters."""
    accent = unicodedata.normalize("NFD", "é")
    for name in ("t/a.png", "t/sub/b.jpg", "t/é.png", "r1/a.webp", "r1/sub/b.png", "r2/a.jpg"):
        picture(tmp_path / name)
    for name in ("r2/sub/b.bmp", f"r1/{accent}.png", f"r2/{accent}.png"):
        picture(tmp_path / name)
    picture(tmp_path / "t/a_mask.png")
    picture(tmp_path / "r1/sub/b_mask.png")
    (tmp_path / "t/a.txt").write_text("one\n\nor two\n")
    (tmp_path / "t/sub/b.txt").write_text("\ufeffthree\n", encoding="utf-8")
    (tmp_path / "r2" / f"{accent}.txt").write_text("four")
    dataset = folders(tmp_path, caption=None, reference_dirs=["r2", "r1"])
    data, problems = found(tmp_path, dataset)
    assert not problems and [s.name for s in data.samples] == ["a", "sub/b", "é"]
    a, b, _ = (sample.variants for sample in data.samples)
    assert [Path(r.path).name for r in b[0].references] == ["b.bmp", "b.png"]
    captions = [v.caption for s in data.samples for v in s.variants]
    assert captions == ["one", "or two", "three", "four"]
    assert (Path(a[0].mask).name, Path(b[0].mask).name) == ("a_mask.png", "b_mask.png")
    whole, _ = found(tmp_path, dataset | {"caption_lines": False})
    assert [v.caption for v in whole.samples[0].variants] == ["one\n\nor two"]
    alike, _ = found(tmp_path, dataset | {"caption": "all"})
    assert {v.caption for s in alike.samples for v in s.variants} == {"all"}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_tables(kind, tmp_path, caplog):
    """11 and 1 references, one a column: in the order of their numbers, not of the columns."""
    first = {f"reference_{i}": f"r/a{i}.png" for i in range(1, 12)}
    first |= {"target": "t/a.png", "prompt": "blue", "note": "not read"}
    second = {"target": "t/b.png", "reference_1": "r/b.png", "prompt": "red", "mask": "m/b.png"}
    for row in (first, second):
        for name in (v for v in row.values() if v.endswith(".png")):
            picture(tmp_path / name)
    if kind == "csv":
        with (tmp_path / "table.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [*sorted(first), "mask"])
            writer.writeheader()
            writer.writerows([first, second])
    else:
        second |= {"references": [second.pop("reference_1")], "prompt": ["red", "red!"]}
        (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, (first, second))))
    dataset = {"train_data_dir": str(tmp_path), "table": f"table.{kind}", "resolution": 64}
    data, problems = found(tmp_path, dataset)
    assert not problems and [s.name for s in data.samples] == ["a", "b"]
    a, b = (sample.variants for sample in data.samples)
    assert [Path(r.path).name for r in a[0].references] == [f"a{i}.png" for i in range(1, 12)]
    assert [v.caption for v in b] == (["red"] if kind == "csv" else ["red", "red!"])
    assert Path(b[0].mask).name == "b.png" and "note" in caplog.text


def test_weights_of_combinations(tmp_path):
    folder = many_roles(tmp_path, "a")
    for given, chances in (
        ((0.5, None, None), [0.5, 0.25, 0.25]),
        ((0.2, 0.3), [0.2, 0.3]),
        ((0.4, 0.6, None), [0.4, 0.6]),  # nothing is left for the third
        ((None,), [1.0]),
    ):
        batches = [COMBINATION | {"weight": weight} for weight in given]
        data, _ = found(tmp_path, three_roles(folder, batch_configs=batches))
        assert [v.weight for v in data.samples[0].variants] == pytest.approx(chances)


def test_data_sets_and_combinations_are_drawn_at_random_by_the_seed(tmp_path):
    """Two data sets in the proportion samples x repeats, mixed; two combinations by weight."""
    one, two = many_roles(tmp_path / "one"), many_roles(tmp_path / "two", "xy")
    batches = [COMBINATION | {"weight": 0.25}, COMBINATION]
    datasets = [
        three_roles(one, repeats=3, batch_configs=batches),
        three_roles(two, repeats=2, batch_configs=batches),
    ]
    changes = {"train.max_train_steps": 800, "data.caption_dropout_rate": 0.25}
    data, problems = found(tmp_path, *datasets, **changes)
    draws = draws_of(plan_of(data))
    numbers = [data.samples[draw.sample].dataset for draw in draws]
    assert not problems and Counter(numbers) == {0: 600, 1: 200}
    assert np.mean([draw.variant for draw in draws]) == pytest.approx(0.75, abs=0.05)
    assert np.mean([draw.dropped for draw in draws]) == pytest.approx(0.25, abs=0.05)
    assert {draw.dropped for draw in data.possible_draws()} == {True, False}  # both are cached
    alike = [a == b for a, b in itertools.pairwise(numbers)]
    assert np.mean(alike) == pytest.approx(0.625, abs=0.06)  # independent of the one before
    assert draws_of(plan_of(data)) == draws


def test_from_image_and_sizes_of_ones_own(tmp_path):
    dataset = three_roles(many_roles(tmp_path / "d", "a"))
    dataset["target_configs"] = {"T": [{"image": "T", "from_image": "D", "resize": "128"}]}
    dataset["reference_configs"] = {"RD": [{"image": "R"}, {"image": "D", "resize": 96}]}
    dataset["caption_configs"]["c"]["reference_list"] = {"reference_config": "RD", "resize": "64"}
    dataset["batch_configs"] = [COMBINATION, COMBINATION | {"reference_config": None}]
    data, problems = found(tmp_path, dataset, **{"data.reference_area": 256 * 256})
    shown = data.resolve(script.Draw(0, 0)).pictures
    [target], [start] = shown["pixel"], shown["start"]
    names = [Path(picture.source).name for picture in (target, start)]
    assert not problems and names == ["a_T.png", "a_D.png"]
    assert (start.size, start.box) == (target.size, target.box)
    assert target.size == script.nearest_bucket(64, 48, 128)
    sizes = [script.pick_size(side**2, target.aspect) for side in (256, 96, 64, 64)]
    assert [p.size for p in shown["control"] + shown["vision"]] == sizes
    assert not data.resolve(script.Draw(0, 0, variant=1)).pictures["control"]


@pytest.mark.parametrize("least", [0, 1, 2, 3, 9])
def test_dropped_references_are_drawn_per_visit_and_cached(least, tmp_path):
    dataset = three_roles(many_roles(tmp_path / "d", "a"))
    shown = {"reference_config": "RD", "dropout": 0.5, "min_length": least}
    dataset["caption_configs"]["c"]["reference_list"] = shown
    data, _ = found(tmp_path, dataset)
    [variant] = data.samples[0].variants
    kept = Counter(script.keep_references(variant, 0, visit) for visit in range(600))
    assert min(map(len, kept)) == min(least, 2)
    assert set(kept) == {draw.vision for draw in data.possible_draws()}  # what is in the cache
    if least == 0:
        assert all(count == pytest.approx(150, abs=45) for count in kept.values())
    whole, fewer = (data.resolve(script.Draw(0, 0, vision=v)).pictures for v in (None, (1,)))
    assert fewer["vision"] == whole["vision"][1:] and fewer["control"] == whole["control"]


def test_what_is_held_out_never_trains(tmp_path):
    """By name, by a share that the seed draws, or as a whole data set."""
    one = many_roles(tmp_path / "one", [f"s{i:02}" for i in range(20)])
    two = many_roles(tmp_path / "two", "xy")
    datasets = [
        three_roles(one, holdout=["s03"], holdout_ratio=0.1, repeats=8),
        three_roles(two, id="eval"),
    ]
    changes = {"validation.eval_dataset_id": ["eval"], "train.max_train_steps": 136}
    data, problems = found(tmp_path, *datasets, **changes)
    names = {s.name for s in data.samples if s.held_out}
    assert not problems and {"s03", "x", "y"} < names and len(names) == 5
    visits = Counter(data.samples[draw.sample].name for draw in draws_of(plan_of(data)))
    assert set(visits.values()) == {8} and len(visits) == 17 and not names & visits.keys()
    assert found(tmp_path, *datasets, **changes)[0].samples == data.samples
    other, _ = found(tmp_path, *datasets, **changes, seed=1)
    assert {s.name for s in other.samples if s.held_out} != names


def test_strict_loose_auto(tmp_path):
    """strict refuses another frame by name; loose never crops; auto decides by the aspect."""
    picture(tmp_path / "d/t/a.png", size=(96, 48))
    picture(tmp_path / "d/r/a.png", size=(192, 96))
    picture(tmp_path / "d/r2/a.png", size=(64, 64))
    dataset = folders(tmp_path / "d", views=4, view_scale=0.5)

    def cropped(**changes):
        data, problems = found(tmp_path, dataset | changes)
        shown = data.resolve(script.Draw(0, 0, view=2)).pictures
        return problems or [p.box == shown["pixel"][0].box for p in shown["control"]]

    both = {"reference_dirs": ["r", "r2"]}
    assert cropped(conditioning_type="reference_strict") == [True]
    assert cropped(**both) == [True, False]
    assert cropped(**both, conditioning_type="reference_loose") == [False, False]
    [problem] = cropped(**both, conditioning_type="reference_strict")
    assert str(tmp_path / "d/r2/a.png") in problem
