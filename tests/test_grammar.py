"""Every way to describe data: the suffix grammar, folders, tables, Hub data sets, masks."""

import csv
import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import PAIRS, copy_pairs, suffix_dataset
from PIL import Image
from pydantic import ValidationError

import train_qwen_edit as script
from utils import FileIndex

FLAVOUR = script.Flavour("edit-v3", "", 384 * 384)


def found(tmp_path, *datasets, **changes):
    """(config, samples, problems, index) of data sets; `changes` are dotted settings."""
    settings = {"data": {"dataset_configs": list(datasets)}}
    settings["logging"] = {"output_dir": str(tmp_path / "out")}
    for key, value in changes.items():
        section, name = key.split(".")
        settings.setdefault(section, {})[name] = value
    config = script.Config.model_validate(settings)
    index = FileIndex(None)
    samples, problems = script.find_samples(config, index)
    script.index_content(script.all_pictures(samples), index)
    return config, samples, problems, index


def picture(path, grey=0, size=(64, 48)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(path)
    return path


def many_roles(folder, names=("a", "b", "c", "d"), roles="TRDM"):
    """a_T.png a_R.png a_D.png a_M.png a_T.txt ..., every picture of another grey."""
    for i, name in enumerate(names):
        for j, role in enumerate(roles):
            picture(folder / f"{name}_{role}.png", 10 * i + j)
        (folder / f"{name}_T.txt").write_text(f"edit {name}")
    return folder


def three_roles(folder, **changes):
    """A data set of many_roles() with two references."""
    dataset = suffix_dataset(folder)
    dataset["image_configs"] = {"T": {"suffix": "_T"}, "R": {"suffix": "_R"}, "D": {"suffix": "_D"}}
    dataset["target_configs"] = {"T": [{"image": "T"}]}
    dataset["reference_configs"] = {"RD": [{"image": "R"}, {"image": "D"}]}
    dataset["caption_configs"] = {"c": {"image": "T"}}
    dataset["batch_configs"] = [
        {"target_config": "T", "caption_config": "c", "reference_config": "RD"}
    ]
    return dataset | changes


# --- suffix grammar -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "chances"),
    [
        ((0.5, None, None), (0.5, 0.25, 0.25)),
        ((0.2, 0.3), (0.4, 0.6)),
        ((None, None), (0.5, 0.5)),
        ((None,), (1.0,)),
        ((0.7, 0.6), None),
    ],
)
def test_weights_of_batch_configs(given, chances, tmp_path):
    batches = [
        {"target_config": "T", "caption_config": "c", "reference_config": "RD", "weight": weight}
        for weight in given
    ]
    dataset = three_roles(tmp_path, batch_configs=batches)
    if chances is None:
        with pytest.raises(ValidationError, match="more than 1"):
            script.DatasetConfig.model_validate(dataset)
        return
    ds = script.DatasetConfig.model_validate(dataset)
    assert script.batch_weights(ds.batch_configs) == pytest.approx(chances)


def test_data_set_and_batch_config_are_drawn_at_random_and_reproducibly(tmp_path):
    """Two data sets in the proportion samples x repeats, mixed; two combinations by weight."""
    one, two = many_roles(tmp_path / "one"), many_roles(tmp_path / "two", ("x", "y"))
    combination = {"target_config": "T", "caption_config": "c", "reference_config": "RD"}
    batches = [{**combination, "weight": 0.25}, combination]
    datasets = [
        three_roles(one, repeats=3, batch_configs=batches),
        three_roles(two, repeats=2, batch_configs=batches),
    ]
    config, samples, problems, _ = found(tmp_path, *datasets)
    assert not problems and len(samples) == 6
    plan = script.StepPlan(config, samples, lambda d: ((64, 64),), 0, 800)
    draws = [d for step in plan for batch in step for d in batch]
    by_dataset = Counter(samples[d.sample].dataset for d in draws)
    assert by_dataset == {0: 600, 1: 200}
    assert np.mean([d.variant for d in draws]) == pytest.approx(0.75, abs=0.05)
    neighbours = [
        samples[a.sample].dataset == samples[b.sample].dataset for a, b in itertools.pairwise(draws)
    ]
    assert np.mean(neighbours) == pytest.approx(0.625, abs=0.06)  # independent of the one before
    again = script.StepPlan(config, samples, lambda d: ((64, 64),), 0, 800)
    assert [d for step in again for batch in step for d in batch] == draws


def test_the_seeds_mistake_gets_the_name_that_was_meant(tmp_path):
    dataset = three_roles(many_roles(tmp_path / "d"))
    dataset["target_configs"] = {"target_train": [{"image": "T"}]}
    dataset["reference_configs"] = {"reference_train": [{"image": "R"}], "other": [{"image": "D"}]}
    dataset["caption_configs"]["c"]["reference_list"] = {"reference_config": "reference_train"}
    dataset["batch_configs"] = [
        {"target_config": "target_train", "caption_config": "c", "reference_config": "target_train"}
    ]
    _, _, problems, _ = found(tmp_path, dataset)
    assert problems == [
        "data.dataset_configs.0.batch_configs.0.reference_config: 'target_train' is one of "
        "target_configs, not of reference_configs, did you mean 'reference_train'?"
    ]


@pytest.mark.parametrize("mode", ["bridge", "consistent", "replace"])
def test_from_image(mode, tmp_path):
    dataset = three_roles(many_roles(tmp_path / "d"))
    item = {"image": "T", "from_image": "D", "from_image_mode": mode}
    dataset["target_configs"] = {"T": [item]}
    config, samples, problems, index = found(tmp_path, dataset)
    assert not problems
    e = script.resolve(config, FLAVOUR, samples, script.Draw(0, 0), index)
    if mode == "replace":
        assert e.target.source.name == "a_D.png" and e.start is None
    else:
        assert e.target.source.name == "a_T.png" and e.start.source.name == "a_D.png"
        assert (e.start.size, e.start.box) == (e.target.size, e.target.box)


def test_resize_per_item(tmp_path):
    dataset = three_roles(many_roles(tmp_path / "d"))
    dataset["target_configs"]["T"][0]["resize"] = "128"
    dataset["reference_configs"]["RD"][1]["resize"] = 96
    dataset["caption_configs"]["c"]["reference_list"] = {"reference_config": "RD", "resize": "64"}
    config, samples, _, index = found(tmp_path, dataset, **{"data.reference_area": 256 * 256})
    e = script.resolve(config, FLAVOUR, samples, script.Draw(0, 0), index)
    assert e.target.size == script.nearest_bucket(64, 48, 128)
    wanted = e.target.size[0] / e.target.size[1]
    assert [p.size for p in e.references] == [
        script.pick_size(256 * 256, wanted), script.pick_size(96 * 96, wanted)
    ]  # fmt: skip
    assert {p.size for p in e.vision} == {script.pick_size(64 * 64, wanted)}


def test_from_subdir_takes_other_pictures_by_the_seed(tmp_path):
    dataset = three_roles(many_roles(tmp_path / "d"))
    item = {"image": "R", "sample_type": "from_subdir", "suffix": "_R", "count": 2, "draws": 3}
    dataset["reference_configs"] = {"RD": [{"image": "D"}, item]}
    _, samples, problems, _ = found(tmp_path, dataset)
    assert not problems and len(samples[0].variants) == 3
    chosen = set()
    for variant in samples[0].variants:
        first, *others = (r.path.name for r in variant.references)
        assert first == "a_D.png" and len(set(others)) == 2
        assert set(others) <= {"b_R.png", "c_R.png", "d_R.png"}  # never its own
        assert variant.vision == variant.references  # the encoder sees the same choice
        chosen.add(tuple(others))
    assert len(chosen) > 1
    assert found(tmp_path, dataset)[1] == samples
    item["count"] = 4
    assert "wanted 4 other pictures" in found(tmp_path, dataset)[2][0]


@pytest.mark.parametrize(("rate", "kept"), [(1.0, {0}), (0.0, {None}), (0.5, {None, 0, 1, 2})])
def test_reference_dropout_stops_at_one_and_drops_all_later(rate, kept, tmp_path):
    shown = tuple(script.Reference(tmp_path / str(i)) for i in range(3))
    variant = script.Variant(tmp_path, shown, shown, "x", 64, reference_dropout=rate)
    found_ = [script.keep_first(variant, 0, visit) for visit in range(3000)]
    assert set(found_) == kept
    if rate == 0.5:
        assert Counter(found_)[0] / 3000 == pytest.approx(0.5, abs=0.03)
        assert Counter(found_)[2] / 3000 == pytest.approx(0.125, abs=0.02)


@pytest.mark.parametrize("least", [0, 1, 2, 3, 9])
def test_min_length_means_at_least_n(least, tmp_path):
    shown = tuple(script.Reference(tmp_path / str(i)) for i in range(3))
    variant = script.Variant(tmp_path, shown, shown, "x", 64, vision_dropout=1.0, vision_min=least)
    assert len(script.keep_references(variant, 0, 5)) == min(least, 3)


def test_dropped_references_shape_the_batch_and_its_embedding(tmp_path):
    dataset = three_roles(many_roles(tmp_path / "d"))
    dataset["batch_configs"][0]["reference_dropout"] = 0.5
    config, samples, _, index = found(tmp_path, dataset)
    draw = script.Draw(0, 0)
    whole = script.resolve(config, FLAVOUR, samples, draw, index)
    one = script.resolve(config, FLAVOUR, samples, draw._replace(references=1), index)
    assert one.references == whole.references[:1] and one.vision == whole.vision
    fewer = script.resolve(config, FLAVOUR, samples, draw._replace(vision=(1,)), index)
    assert fewer.vision == whole.vision[1:] and fewer.references == whole.references


@pytest.mark.parametrize(
    ("resolution", "aspect", "size"),
    [
        (1024, 1, (1024, 1024)), (1024, 4 / 3, (1184, 896)), (1024, 3 / 2, (1344, 832)),
        (1024, 16 / 9, (1408, 768)), (1024, 9 / 16, (768, 1408)), (1024, 3 / 4, (896, 1184)),
        (512, 4 / 3, (576, 448)), (512, 3 / 2, (704, 448)), (512, 16 / 9, (704, 384)),
        (512, 1, (512, 512)),
    ],
)  # fmt: skip
def test_table_buckets_by_true_nearest_ratio(resolution, aspect, size):
    sizes = script.table_buckets
    assert script.nearest_bucket(round(6000 * aspect), 6000, resolution, sizes) == size
    assert set(script.TABLES) == {2048, 1536, 1328, 1024, 768, 512, 384}
    for table in script.TABLES:
        shapes = sizes(table)
        assert all(w % 16 == h % 16 == 0 and (h, w) in shapes for w, h in shapes)
        for ratio in (1, 4 / 3, 3 / 2, 16 / 9, 3 / 4, 9 / 16):
            w, h = script.nearest_bucket(round(6000 * ratio), 6000, table, sizes)
            assert min(w / h / ratio, ratio * h / w) >= 0.91  # what survives the crop
    # the fine buckets keep more: 3:2 whole
    assert script.nearest_bucket(6000, 4000, 1024) == (1248, 832)


def test_holdout_ratio_and_repeats(tmp_path):
    folder = many_roles(tmp_path / "d", [f"s{i:02}" for i in range(20)])
    config, samples, problems, _ = found(
        tmp_path, three_roles(folder, holdout_ratio=0.1, repeats=8)
    )
    assert not problems and sum(s.held_out for s in samples) == 2
    assert len(script.StepPlan(config, samples, lambda d: ((64, 64),), 0, 1).visits) == 144
    assert found(tmp_path, three_roles(folder, holdout_ratio=0.1))[1] == samples


def test_eval_dataset_id_is_never_trained(tmp_path):
    train, held = many_roles(tmp_path / "train"), many_roles(tmp_path / "held", ("x", "y"))
    datasets = [three_roles(train), three_roles(held, id="eval")]
    config, samples, problems, _ = found(
        tmp_path, *datasets, **{"validation.eval_dataset_id": ["eval"]}
    )
    assert not problems
    assert {s.name for s in samples if s.held_out} == {"x", "y"}
    plan = script.StepPlan(config, samples, lambda d: ((64, 64),), 0, 30)
    trained = {samples[d.sample].name for step in plan for batch in step for d in batch}
    assert trained == set("abcd")


def test_recreate_cache_by_kind(make_trainer, tmp_path):
    folder = many_roles(tmp_path / "d", ("a", "b"))
    kinds = {
        "recreate_cache_target": (2, 0),
        "recreate_cache_reference": (4, 0),
        "recreate_cache_caption": (0, 2),
        "recreate_cache": (6, 2),
    }
    for name, (latents, prompts) in kinds.items():
        trainer = make_trainer(**{"data.dataset_configs": [three_roles(folder, **{name: True})]})
        trainer.setup_accelerator()
        trainer.find_data()
        jobs = trainer.cache_jobs(fresh=True).values()
        assert sum(isinstance(job, script.Picture) for job in jobs) == latents
        assert sum(isinstance(job, script.Example) for job in jobs) == prompts


def test_an_instruction_of_ones_own(make_trainer, tmp_path):
    """Every token before the user's turn is dropped; the embedding and its key change."""
    trainer = make_trainer()
    image = Image.open(PAIRS / "coffee0_R.png").resize((64, 64))
    trainer.load_model(["text_encoder"])
    pipe, device = trainer.text_pipeline, torch.device("cpu")
    plain = script.encode_prompt_qwen(pipe, "make it blue", [image], device)
    own = script.encode_prompt_qwen(pipe, "make it blue", [image], device, "Describe {this}.")
    assert own.shape == plain.shape and not torch.equal(own, plain)
    assert pipe.prompt_template_encode_start_idx == 64
    turn = pipe.prompt_template_encode.split("system\n")[1].split("<|im_end|>")[0]
    same = script.encode_prompt_qwen(pipe, "make it blue", [image], device, turn)
    assert torch.equal(same, plain)  # the model's own instruction given as ours
    target = script.Picture(PAIRS / "coffee0_R.png", "x", (64, 64))
    e = script.Example("a", target, (target,), (target,), "make it blue")
    keys = {trainer.keys.prompt(e._replace(instruction=text)) for text in (None, "A", "B")}
    assert len(keys) == 3


# --- folders, tables, Hub -------------------------------------------------------------------------


def test_control_n_masks_and_captions_of_the_folders_layout(tmp_path):
    """1..n references per sample, numbers in order; masks beside target or reference."""
    root = tmp_path / "root"
    for name in ("a", "b"):
        picture(root / f"images/{name}.png")
        (root / f"images/{name}.txt").write_text(f"first of {name}\n\nsecond of {name}\n")
        picture(root / f"control/{name}.jpg")
    for i in (1, 2, 10):
        picture(root / f"control/a_control_{i}.png")
    picture(root / "images/a_mask.png")
    picture(root / "control/b_mask.png")
    dataset = {
        "train_data_dir": str(root), "target_dir": "images", "reference_dirs": ["control"],
        "resolution": 64,
    }  # fmt: skip
    _, samples, problems, _ = found(tmp_path, dataset)
    assert not problems and [s.name for s in samples] == ["a", "b"]
    names = [[r.path.name for r in s.variants[0].references] for s in samples]
    extra = ["a_control_1.png", "a_control_2.png", "a_control_10.png"]
    assert names == [["a.jpg", *extra], ["b.jpg"]]
    assert [s.variants[0].mask.name for s in samples] == ["a_mask.png", "b_mask.png"]
    assert [v.caption for v in samples[0].variants] == ["first of a", "second of a"]
    whole = found(tmp_path, {**dataset, "caption_lines": False})[1]
    assert [v.caption for v in whole[0].variants] == ["first of a\n\nsecond of a"]
    some = found(tmp_path, {**dataset, "selected_control_indexes": [1, 3]})[1]
    assert [r.path.name for r in some[0].variants[0].references] == ["a.jpg", "a_control_2.png"]


def test_random_takes_one_reference_set_per_visit(tmp_path):
    for folder in ("t", "r1", "r2", "r3"):
        picture(tmp_path / folder / "a.png")
    dataset = {
        "train_data_dir": str(tmp_path), "target_dir": "t", "caption": "x",
        "reference_dirs": ["r1", "r2", "r3"], "conditioning_multidataset_sampling": "random",
    }  # fmt: skip
    config, samples, _, _ = found(tmp_path, dataset)
    shown = [[r.path.parent.name for r in v.references] for v in samples[0].variants]
    assert shown == [["r1"], ["r2"], ["r3"]]
    # what the encoder sees goes with it
    assert all(v.vision == v.references for v in samples[0].variants)
    plan = script.StepPlan(config, samples, lambda d: ((64, 64),), 0, 900)
    drawn = Counter(d.variant for step in plan for batch in step for d in batch)
    assert all(count == pytest.approx(300, abs=60) for count in drawn.values())


def test_allow_fewer_trains_with_the_references_there_are(tmp_path):
    for name in ("t/a", "t/b", "t/c", "r1/a", "r1/b", "r2/a"):
        picture(tmp_path / f"{name}.png")
    dataset = {
        "train_data_dir": str(tmp_path), "target_dir": "t", "reference_dirs": ["r1", "r2"],
        "caption": "x",
    }  # fmt: skip
    _, _, problems, _ = found(tmp_path, dataset)
    assert len(problems) == 2 and "'b' lacks its reference 2" in problems[0]
    _, samples, problems, _ = found(tmp_path, {**dataset, "on_missing": "allow_fewer"})
    assert [len(s.variants[0].references) for s in samples] == [2, 1]
    assert (
        len(problems) == 1
        and "lacks its reference 1 (r1/c.*) and reference 2 (r2/c.*)" in problems[0]
    )


def test_allow_fewer_in_the_suffix_layout(tmp_path):
    folder = many_roles(tmp_path / "d", ("a", "b"))
    (folder / "a_D.png").unlink()
    (folder / "b_T.png").unlink()
    _, samples, problems, _ = found(tmp_path, three_roles(folder, on_missing="allow_fewer"))
    assert [len(s.variants[0].references) for s in samples] == [1]
    assert len(problems) == 1 and "sample 'b' lacks its T" in problems[0]


def rows_of_the_spec(root):
    """Two rows, 11 and 1 references; the columns are those of the qwen-image-finetune tables."""
    first = {"path_target": "t/a.png", "path_control": "r/a.png", "prompt": "make it blue"}
    first |= {f"path_control_{i}": f"r/a{i}.png" for i in range(1, 11)}
    second = {"path_target": "t/b.png", "path_control": "r/b.png", "prompt": "make it red"}
    second["path_mask"] = "m/b.png"
    for row in (first, second):
        for column, name in row.items():
            if column.startswith("path_"):
                picture(root / name)
    return first, second


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_tables(kind, tmp_path):
    first, second = rows_of_the_spec(tmp_path)
    table = tmp_path / f"table.{kind}"
    if kind == "csv":
        with table.open("w", newline="") as file:
            columns = sorted(first)  # path_control_10 before path_control_2
            writer = csv.DictWriter(file, [*columns, "path_mask"])
            writer.writeheader()
            writer.writerows([first, second])
    else:
        second = {"target": "t/b.png", "references": ["r/b.png"], "mask": "m/b.png"}
        second["prompt"] = ["make it red", "red!"]
        table.write_text("\n".join(map(json.dumps, (first, second))))
    dataset = {"train_data_dir": str(tmp_path), "table": f"table.{kind}", "resolution": 64}
    _, samples, problems, _ = found(tmp_path, dataset)
    assert not problems and [s.name for s in samples] == ["a", "b"]
    names = [r.path.name for r in samples[0].variants[0].references]
    assert names == ["a.png", *(f"a{i}.png" for i in range(1, 11))]
    assert samples[1].variants[0].mask.name == "b.png"
    captions = [v.caption for v in samples[1].variants]
    assert captions == (["make it red"] if kind == "csv" else ["make it red", "red!"])


def test_a_tables_mistakes_are_named_by_row(tmp_path):
    picture(tmp_path / "a.png")
    rows = [
        {"target": "a.png", "references": ["no.png"], "prompt": "x"},
        {"references": ["a.png"], "prompt": "x"},
        {"target": "a.png", "prompt": "x"},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = {"train_data_dir": str(tmp_path), "table": "t.jsonl"}
    text = "\n".join(found(tmp_path, dataset)[2])
    for words in ("row 1: no file", "row 2: no target", "row 3: no reference"):
        assert words in text
    (tmp_path / "t.jsonl").write_text('{"target": ')
    assert "t.jsonl" in found(tmp_path, dataset)[2][0]
    assert "no table" in found(tmp_path, {**dataset, "table": "none.csv"})[2][0]


def test_a_hub_data_set_with_the_row_schema(tmp_path):
    import datasets

    rng = np.random.default_rng(0)
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
        {"id": "s1", "target_image": images["one"], "control_images": [images["two"]],
         "control_mask": None, "prompt": "make it blue"},
        {"id": "s2", "target_image": images["two"], "prompt": "make it red",
         "control_images": [images["three"], images["one"]], "control_mask": images["one"]},
    ]  # fmt: skip
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(tmp_path / "hub" / "data" / "train-0.parquet")
    dataset = {"hf_dataset": str(tmp_path / "hub"), "resolution": 64}
    cache = {"cache.cache_dir": str(tmp_path / "cache")}
    _, samples, problems, _ = found(tmp_path, dataset, **cache)
    assert not problems and [s.name for s in samples] == ["s1", "s2"]
    assert [len(s.variants[0].references) for s in samples] == [1, 2]
    assert samples[0].variants[0].mask is None and samples[1].variants[0].mask
    opened = script.open_rgb(samples[1].variants[0].references[0].path)
    assert opened.tobytes() == images["three"].tobytes()
    assert found(tmp_path, dataset, **cache)[1] == samples
    table.save_to_disk(tmp_path / "disk")
    other = found(tmp_path, {**dataset, "hf_dataset": str(tmp_path / "disk")}, **cache)[1]
    assert [s.name for s in other] == ["s1", "s2"]
    assert "hf_dataset" in found(tmp_path, {"hf_dataset": str(tmp_path / "no")}, **cache)[2][0]


# --- one transform --------------------------------------------------------------------------------


def test_strict_loose_auto(tmp_path):
    """strict refuses another frame by name; loose never crops; auto decides by the aspect."""
    picture(tmp_path / "d/t/a.png", size=(96, 48))
    picture(tmp_path / "d/r1/a.png", size=(192, 96))
    picture(tmp_path / "d/r2/a.png", size=(64, 64))
    dataset = {
        "train_data_dir": str(tmp_path / "d"), "target_dir": "t", "reference_dirs": ["r1"],
        "caption": "x", "resolution": 64, "views": 4, "view_scale": 0.5,
    }  # fmt: skip

    def references(**changes):
        config, samples, problems, index = found(tmp_path, {**dataset, **changes})
        if problems:
            return problems
        e = script.resolve(config, FLAVOUR, samples, script.Draw(0, 0, view=2), index)
        return [picture.box == e.target.box for picture in e.references]

    both = {"reference_dirs": ["r1", "r2"]}
    assert references(conditioning_type="reference_strict") == [True]
    assert references(**both) == [True, False]
    assert references(**both, conditioning_type="reference_loose") == [False, False]
    (problem,) = references(**both, conditioning_type="reference_strict")
    assert "r2/a.png has aspect 1.000, its target 2.000" in problem and "reference_loose" in problem


def test_masks_go_through_the_targets_transform(tmp_path):
    """A mask that is white where the target is bright stays so under every crop and flip."""
    y, x = np.mgrid[0:96, 0:160]
    bright = ((x // 20 + y // 24) % 2 * 255).astype(np.uint8)
    for name in ("t/a.png", "r/a.png", "t/a_mask.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(bright).save(tmp_path / name)
    dataset = {
        "train_data_dir": str(tmp_path), "target_dir": "t", "reference_dirs": ["r"],
        "caption": "x", "resolution": 128, "views": 5, "view_scale": 0.5, "view_flip": True,
    }  # fmt: skip
    config, samples, _, index = found(tmp_path, dataset, **{"loss.mask_loss": True})
    for view in range(5):
        e = script.resolve(config, FLAVOUR, samples, script.Draw(0, 0, view=view), index)
        level = script.region_map(e.region)
        w, h = e.target.size
        assert level.shape == (1, h // 8, w // 8) and level.min() >= 0 and level.max() <= 1
        target = np.asarray(script.load_picture(e.target), np.float32)[..., 0] / 255
        means = target.reshape(h // 8, 8, w // 8, 8).mean((1, 3))
        np.testing.assert_allclose(level[0], means, atol=1e-5)


def test_the_difference_region_is_where_the_pictures_differ(tmp_path):
    before = np.full((64, 64, 3), 100, np.uint8)
    after = before.copy()
    after[16:32, 32:48] = 200
    for folder, pixels in (("t", after), ("r", before)):
        (tmp_path / folder).mkdir()
        Image.fromarray(pixels).save(tmp_path / folder / "a.png")
    dataset = {
        "train_data_dir": str(tmp_path), "target_dir": "t", "reference_dirs": ["r"],
        "caption": "x", "resolution": 64,
    }  # fmt: skip
    config, samples, _, index = found(tmp_path, dataset, **{"loss.mask": "difference"})
    e = script.resolve(config, FLAVOUR, samples, script.Draw(0, 0), index)
    level = script.region_map(e.region)[0]
    expected = torch.zeros(8, 8)
    expected[2:4, 4:6] = 100 / 255
    torch.testing.assert_close(level, expected)


def test_the_difference_region_needs_one_frame(tmp_path):
    picture(tmp_path / "t/a.png", size=(96, 48))
    picture(tmp_path / "r/a.png", size=(64, 64))
    dataset = {
        "train_data_dir": str(tmp_path), "target_dir": "t", "reference_dirs": ["r"], "caption": "x",
    }  # fmt: skip
    problems = found(tmp_path, dataset, **{"loss.mask": "difference"})[2]
    assert len(problems) == 1 and "one frame is wanted by loss.mask: difference" in problems[0]
    picture(tmp_path / "r/a.png", size=(96, 48))
    picture(tmp_path / "r/a_mask.png", size=(64, 64))
    assert not found(tmp_path, dataset)[2]
    problems = found(tmp_path, dataset, **{"loss.mask": "file"})[2]
    assert len(problems) == 1 and "one frame is wanted by a mask" in problems[0]


def test_max_tokens_per_batch_cuts_passes_not_steps(tmp_path):
    folder = copy_pairs(tmp_path / "d")
    ids = {"data.batch_size": 8, "data.max_tokens_per_batch": 100}
    config, samples, _, _ = found(tmp_path, suffix_dataset(folder, repeats=4), **ids)
    shapes = {0: ((64, 64), (64, 64)), 1: ((160, 64), (64, 64)), 2: ((640, 640),)}

    def shape_of(draw):
        return shapes[draw.sample % 3]

    assert [script.image_tokens(s) for s in shapes.values()] == [32, 56, 1600]
    for step in script.StepPlan(config, samples, shape_of, 0, 10):
        assert sum(map(len, step)) == 8
        for batch in step:
            assert len(batch) <= {0: 3, 1: 1, 2: 1}[batch[0].sample % 3]


def test_from_subdir_never_shows_the_answer(tmp_path):
    item = {"image": "R", "sample_type": "from_subdir", "count": 1, "draws": 5}
    for name in ("a_T", "a_R", "b_R"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    ds = script.DatasetConfig(
        train_data_dir=tmp_path,
        image_configs={"T": {"suffix": "_T"}, "R": {"suffix": "_R"}},
        target_configs={"T": [{"image": "T"}]},
        reference_configs={"R": [item]},
        caption_configs={"T": {"image": "T"}},
        batch_configs=[{"target_config": "T", "caption_config": "T", "reference_config": "R"}],
    )
    (tmp_path / "a_T.txt").write_text("x")
    files = {"T": tmp_path / "a_T.png", "R": tmp_path / "a_R.png"}
    variants = script.VariantMaker(script.Config(), ds).make("a", script.Row(files))
    assert {r.path.name for v in variants for r in v.references} == {"b_R.png"}
