"""Pairing, audit, geometry, and which samples meet in which step."""

import collections
import json
import math

import numpy as np
import pytest
import torch
from conftest import PAIRS, copy_pairs, run, small_config, suffix_dataset, write_config
from PIL import Image
from safetensors.torch import save_file

import train_qwen_edit as script
from utils import FileIndex, UserError, load_config


def samples_of(dataset, tmp_path, **changes):
    config = script.Config.model_validate(
        {
            "data": {"dataset_configs": [dataset], **changes},
            "logging": {"output_dir": str(tmp_path / "out")},
        }
    )
    return script.find_samples(config, FileIndex(None))


@pytest.mark.parametrize(
    ("stem", "suffixes", "role"),
    [
        ("a_T", ["_T", "_R"], "_T"),
        ("a_DT", ["_T", "_D"], None),
        ("a_DT", ["_T", "_D", "_DT"], "_DT"),
        ("a_DT", ["T", "_DT"], "_DT"),
        ("a_T1", ["_T"], None),
        ("cat_Toy_R", ["_T", "_R"], "_R"),
        ("sub/_T", ["_T"], None),
        ("a_t", ["_T"], None),
        ("a", ["_T", ""], ""),
        ("a_T", ["_T", ""], "_T"),
    ],
)
def test_a_stem_ends_with_its_suffix_and_the_longest_wins(stem, suffixes, role):
    assert script.role_of(stem, suffixes) == role


def test_two_references_in_the_order_of_the_config(tmp_path):
    dataset = suffix_dataset(PAIRS, on_missing="skip")
    dataset["image_configs"]["tones"] = {"suffix": "_D"}
    for order in (["before", "tones"], ["tones", "before"]):
        dataset["reference_configs"]["before"] = [{"image": name} for name in order]
        samples, problems = samples_of(dataset, tmp_path)
        assert not problems and len(samples) == 13
        variant = next(s for s in samples if s.name == "coffee1").variants[0]
        names = {"before": "coffee1_R.png", "tones": "coffee1_D.png"}
        assert [r.path.name for r in variant.references] == [names[name] for name in order]
        assert variant.target.name == "coffee1_T.jpg" and variant.caption.startswith("give it")


def test_folders_layout_pairs_by_relative_stem_whatever_the_extension(tmp_path):
    names = {"t/a.png": 1, "t/sub/b.jpg": 2, "r1/a.webp": 3, "r1/sub/b.png": 4, "r2/a.jpg": 5}
    names["r2/sub/b.bmp"] = 6
    for name, grey in names.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (grey, grey, grey)).save(tmp_path / name)
    (tmp_path / "t/a.txt").write_text("one")
    (tmp_path / "t/sub/b.txt").write_text("\ufefftwo\n", encoding="utf-8")
    dataset = {"train_data_dir": str(tmp_path), "target_dir": "t", "reference_dirs": ["r2", "r1"]}
    samples, problems = samples_of(dataset, tmp_path)
    assert not problems and [s.name for s in samples] == ["a", "sub/b"]
    assert [r.path.name for r in samples[1].variants[0].references] == ["b.bmp", "b.png"]
    assert [s.variants[0].caption for s in samples] == ["one", "two"]
    samples, _ = samples_of({**dataset, "caption": "all alike"}, tmp_path)
    assert {s.variants[0].caption for s in samples} == {"all alike"}


def test_everything_wrong_is_named_at_once(checkpoints, tmp_path):
    folder = copy_pairs(
        tmp_path / "data", ("astronaut1", "chelsea0", "coffee0", "hubble0", "hubble1")
    )
    (folder / "astronaut1_R.png").unlink()
    (folder / "chelsea0_R.png").write_bytes((folder / "chelsea0_R.png").read_bytes()[:5000])
    (folder / "coffee0_T.txt").write_text(" \n")
    (folder / "hubble0_T.txt").unlink()
    (folder / "hubble1_R.png").write_bytes(b"")
    config = small_config(checkpoints["2511"], tmp_path)
    config["data"]["dataset_configs"] = [suffix_dataset(folder)]
    config["train"]["max_train_stepz"] = 1
    config["model"]["lora"]["rnk"] = 2
    config["optimzer"] = {}
    with pytest.raises(UserError) as error:
        load_config(script.Config, ["--config", str(write_config(tmp_path, config))], script.audit)
    text = str(error.value)
    for part in (
        "max_train_stepz: unknown setting, did you mean 'max_train_steps'?",
        "model.lora.rnk",
        "optimzer: unknown setting, did you mean 'optimizer'?",
        "sample 'astronaut1' lacks its before",
        "chelsea0_R.png cannot be read",
        "coffee0_T.txt is empty",
        "hubble0_T.txt is missing",
        "hubble1_R.png cannot be read",
        "8 problem(s)",
    ):
        assert part in text, f"{part}\n{text}"
    report = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert len(report["problems"]) == 5


def test_on_missing_skip_goes_on_with_the_rest(tmp_path):
    folder = copy_pairs(tmp_path / "data")
    (folder / "coffee0_R.png").unlink()
    samples, problems = samples_of(suffix_dataset(folder, on_missing="skip"), tmp_path)
    assert [s.name for s in samples] == ["astronaut1", "chelsea0", "hubble0"] and not problems
    assert "coffee0" in json.loads((tmp_path / "out/audit.json").read_text())["skipped"][0]


def test_an_orphan_reference_is_a_missing_target(tmp_path):
    folder = copy_pairs(tmp_path / "data")
    (folder / "coffee0_T.png").unlink()
    _, problems = samples_of(suffix_dataset(folder), tmp_path)
    assert len(problems) == 1 and "sample 'coffee0' lacks its after" in problems[0]


def test_two_files_for_one_role_are_ambiguous(tmp_path):
    folder = copy_pairs(tmp_path / "data")
    Image.open(folder / "coffee0_T.png").save(folder / "coffee0_T.jpg")
    _, problems = samples_of(suffix_dataset(folder), tmp_path)
    assert "coffee0_T.jpg, coffee0_T.png" in problems[0]


def test_names_inside_the_config_must_point_at_something(tmp_path):
    dataset = suffix_dataset(PAIRS)
    dataset["batch_configs"][0]["reference_config"] = "after"  # a target's name
    dataset["caption_configs"]["text"]["image"] = "aftr"
    _, problems = samples_of(dataset, tmp_path)
    wrong = "reference_config: 'after' is one of image_configs, not of reference_configs"
    assert any(wrong in p and "did you mean 'before'?" in p for p in problems)
    assert any("did you mean 'after'?" in p for p in problems)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16", "LA", "1", "exif"])
def test_every_kind_of_picture_opens_as_upright_rgb(mode, tmp_path):
    ramp = np.linspace(0, 255, 64 * 32).reshape(32, 64).astype(np.uint8)
    image = Image.fromarray(ramp)
    path = tmp_path / "a.png"
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
    elif mode == "exif":
        path = tmp_path / "a.jpg"
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 90 degrees
        image.convert("RGB").save(path, exif=exif, quality=100)
    elif mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(Image.new("L", image.size, 0))  # invisible: white
    else:
        image = image.convert(mode)
    if mode == "CMYK":
        path = tmp_path / "a.jpg"
    if mode != "exif":
        image.save(path)
    opened = script.open_rgb(path)
    assert opened.mode == "RGB"
    pixels = np.asarray(opened)
    if mode == "exif":
        assert opened.size == (32, 64)
        index = FileIndex(None)
        assert script.check_pictures([path], index) == []
        fact = index.known(path)
        assert (fact["width"], fact["height"]) == (32, 64)
    elif mode in ("RGBA", "LA"):
        assert (pixels == 255).all()
    elif mode in ("L", "I;16", "P"):
        assert np.abs(pixels[..., 0].astype(int) - ramp).max() <= 4


@pytest.mark.parametrize("resolution", [160, 512, 768, 1024, 1328, 2048])
def test_the_bucket_is_the_nearest_aspect_and_keeps_the_picture(resolution):
    for aspect in (1, 4 / 3, 3 / 2, 16 / 9, 3 / 4, 2 / 3, 9 / 16, 2.4):
        w, h = script.nearest_bucket(round(3000 * aspect), 3000, resolution)
        distance = abs(math.log(w / h / aspect))
        others = [abs(math.log(a / b / aspect)) for a, b in script.buckets(resolution)]
        assert distance == pytest.approx(min(others), abs=1e-4) and w % 32 == 0 and h % 32 == 0
        if resolution >= 512:
            assert math.exp(-distance) >= 0.96  # share of the picture that survives the crop
            assert abs(w * h / resolution**2 - 1) < 0.06
    assert (
        script.nearest_bucket(500, 500, resolution) == (resolution, resolution)
        or resolution == 1328
    )


def test_pick_size_is_the_pipelines():
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions

    for aspect in (0.4, 0.75, 1, 1.5, 1.7778, 3):
        for area in (384 * 384, 1024 * 1024):
            assert script.pick_size(area, aspect) == calculate_dimensions(area, aspect)


def test_one_transform_keeps_pixels_aligned(tmp_path):
    """A coordinate grid as target and (twice as large) reference stays the same grid."""
    y, x = np.mgrid[0:96, 0:160]
    grid = np.stack([x * 255 / 159, y * 255 / 95, 0 * x], -1).astype(np.uint8)
    Image.fromarray(grid).save(tmp_path / "a_T.png")
    Image.fromarray(grid).resize((320, 192), Image.Resampling.BICUBIC).save(tmp_path / "a_R.png")
    Image.new("RGB", (128, 32)).save(tmp_path / "a_D.png")
    (tmp_path / "a_T.txt").write_text("x")
    dataset = suffix_dataset(tmp_path, views=6, view_scale=0.5, view_flip=True)
    dataset["image_configs"]["tones"] = {"suffix": "_D"}
    dataset["reference_configs"]["before"].append({"image": "tones"})
    config = script.Config.model_validate(
        {
            "data": {"dataset_configs": [dataset], "reference_area": "target"},
            "logging": {"output_dir": str(tmp_path / "out")},
        }
    )
    index = FileIndex(None)
    samples, problems = script.find_samples(config, index)
    assert not problems
    script.index_content(script.all_pictures(samples), index)
    flavour = script.Flavour("edit-v3", "", 384 * 384)
    boxes, flips = set(), set()
    for view in range(6):
        draw = script.Draw(0, 0, view=view)
        e = script.resolve(config, flavour, samples, draw, index)
        target = np.asarray(script.load_picture(e.target)).astype(int)
        reference = np.asarray(script.load_picture(e.references[0])).astype(int)
        assert np.abs(target - reference).max() <= 6, f"view {view} is not aligned"
        assert e.target.size == e.references[0].size
        assert e.references[1].box == (0, 0, 1, 1) and not e.references[1].flip  # another aspect
        assert e.vision[0].box == e.target.box and e.vision[0].size[0] % 32 == 0
        boxes.add(e.target.box)
        flips.add(e.target.flip)
    assert len(boxes) == 6 and flips == {False, True}


@pytest.mark.parametrize(
    ("policy", "size"), [("1mp", (1024, 1024)), ("target", (64, 64)), (256 * 256, (256, 256))]
)
def test_reference_area_policies(policy, size, tmp_path):
    folder = copy_pairs(tmp_path / "data", ("chelsea0",))
    config = script.Config.model_validate(
        {
            "data": {"dataset_configs": [suffix_dataset(folder)], "reference_area": policy},
            "logging": {"output_dir": str(tmp_path / "out")},
        }
    )
    index = FileIndex(None)
    samples, _ = script.find_samples(config, index)
    script.index_content(script.all_pictures(samples), index)
    flavour = script.Flavour("edit-v3", "", 384 * 384)
    example = script.resolve(config, flavour, samples, script.Draw(0, 0), index)
    assert example.references[0].size == size and example.target.size == (64, 64)


def plan_of(n, tmp_path, *, shapes=1, rank=0, processes=1, first=0, steps=10, **data):
    dataset = suffix_dataset(tmp_path, repeats=data.pop("repeats", 1))
    train = {"gradient_accumulation_steps": data.pop("accumulate", 1)}
    config = script.Config.model_validate(
        {"data": {"dataset_configs": [dataset], **data}, "train": train}
    )
    variant = script.Variant(tmp_path, (), (), "x", 64, caption_dropout=0.25)
    samples = [script.Sample(f"s{i}", 0, False, (variant,)) for i in range(n)]

    def shape_of(draw):
        return ((16 * (1 + draw.sample % shapes), 16),)

    plan = script.StepPlan(config, samples, shape_of, first, steps, rank, processes)
    return plan, list(plan)


def flat(step):
    return [draw for batch in step for draw in batch]


def test_an_epoch_visits_every_sample_as_often_as_its_repeats(tmp_path):
    plan, steps = plan_of(10, tmp_path, shapes=3, batch_size=5, repeats=2, steps=8)
    assert plan.steps_per_epoch == 4
    for epoch in (steps[:4], steps[4:]):
        visits = collections.Counter(d.sample for step in epoch for d in flat(step))
        assert set(visits.values()) == {2} and len(visits) == 10
    assert [d.sample for d in flat(steps[0])] != [d.sample for d in flat(steps[4])]
    for step in steps:
        for batch in step:
            assert len({d.sample % 3 for d in batch}) == 1 and len(batch) <= 5


@pytest.mark.parametrize(
    ("processes", "batch_size", "accumulate"),
    [(1, 4, 1), (1, 2, 2), (2, 2, 1), (4, 1, 1), (2, 1, 2)],
)
def test_the_same_samples_meet_however_the_step_is_split(
    processes, batch_size, accumulate, tmp_path
):
    split = {"processes": processes, "batch_size": batch_size, "accumulate": accumulate}
    _, whole = plan_of(11, tmp_path, shapes=2, batch_size=4, steps=12)
    parts = [
        plan_of(11, tmp_path, shapes=2, rank=r, steps=12, **split)[1] for r in range(processes)
    ]
    for number, step in enumerate(whole):
        met = [d for part in parts for d in flat(part[number])]
        assert sorted(met, key=lambda d: d.visit) == sorted(flat(step), key=lambda d: d.visit)
        assert len({len(flat(part[number])) for part in parts}) == 1


def test_a_plan_that_starts_late_is_the_rest_of_the_plan(tmp_path):
    _, whole = plan_of(7, tmp_path, batch_size=2, steps=20)
    for first in (1, 4, 9, 19, 20):
        assert plan_of(7, tmp_path, batch_size=2, steps=20, first=first)[1] == whole[first:]


def test_caption_dropout_happens_at_its_rate(tmp_path):
    _, steps = plan_of(40, tmp_path, batch_size=4, steps=500)
    draws = [d for step in steps for d in flat(step)]
    assert np.mean([d.dropped for d in draws]) == pytest.approx(0.25, abs=0.03)
    assert len({d.visit for d in draws}) == len(draws)  # every visit has its own noise


def test_batch_configs_are_drawn_by_weight(tmp_path):
    dataset = suffix_dataset(PAIRS)
    dataset["batch_configs"] = [
        {**dataset["batch_configs"][0], "weight": weight} for weight in (0.1, 0.3)
    ]
    config = script.Config.model_validate({"data": {"dataset_configs": [dataset]}})
    samples, _ = samples_of(dataset, tmp_path)
    plan = script.StepPlan(config, samples, lambda d: ((64, 64),), 0, 300)
    which = [d.variant for step in plan for d in flat(step)]
    assert np.mean(which) == pytest.approx(0.75, abs=0.06)


def test_dropped_references_are_drawn_per_visit_and_cached(tmp_path):
    shown = tuple(script.Reference(tmp_path / str(i)) for i in range(3))
    variant = script.Variant(tmp_path, shown, shown, "x", 64, vision_dropout=0.5, vision_min=1)
    kept = [script.keep_references(variant, 0, visit) for visit in range(2000)]
    assert all(k is not None and len(k) >= 1 for k in kept)
    assert len(set(kept)) == 7  # every subset of at least one
    assert np.mean([0 in k for k in kept]) == pytest.approx(0.5 + 0.125 / 3, abs=0.04)
    config = script.Config.model_validate({"data": {"dataset_configs": [suffix_dataset(tmp_path)]}})
    sample = script.Sample("a", 0, False, (variant,))
    possible = {d.vision for d in script.possible_draws(config, [sample])}
    assert set(kept) <= possible


def test_held_out_samples_never_train(tmp_path):
    dataset = suffix_dataset(PAIRS, holdout=["coffee2", "chelsea1"])
    config = script.Config.model_validate({"data": {"dataset_configs": [dataset]}})
    samples, problems = samples_of(dataset, tmp_path)
    plan = script.StepPlan(config, samples, lambda d: ((64, 64),), 0, 40)
    trained = {samples[d.sample].name for step in plan for d in flat(step)}
    assert not problems and len(trained) == 11 and not trained & {"coffee2", "chelsea1"}
    _, problems = samples_of(suffix_dataset(PAIRS, holdout=["coffe2"]), tmp_path)
    assert "no sample 'coffe2', did you mean 'coffee2'?" in problems[0]


def test_refused_within_ten_seconds_and_before_any_model_library(checkpoints, tmp_path):
    import time

    folder = copy_pairs(tmp_path / "data")
    (folder / "coffee0_R.png").unlink()
    config = small_config(checkpoints["2511"], tmp_path)
    config["data"]["dataset_configs"] = [suffix_dataset(folder)]
    config["train"]["max_train_stepz"] = 1
    file = write_config(tmp_path, config)
    started = time.monotonic()
    done = run("train_qwen_edit.py", "--config", file, check=False)
    assert time.monotonic() - started < 10
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "max_train_steps" in done.stderr and "coffee0" in done.stderr
    code = "import sys, train_qwen_edit; print('diffusers' in sys.modules, 'peft' in sys.modules)"
    assert run("-c", code).stdout.strip() == "False False"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.pretrained_model_name_or_path", "no/such/folder", "no folder no/such/folder"),
        ("data.dataset_configs", [], "no data set is named"),
        ("logging.output_dir", "/dev/null/x", "logging.output_dir: cannot write there"),
        ("cache.cache_dir", "/dev/null/x", "cache.cache_dir: cannot write there"),
        ("cache.vae_encoder_device", "cuda:7", "this machine has"),
        ("cache.text_encoder_device", "gpu", "is no device"),
        ("validation.steps", 2, "no data set names samples in holdout"),
        ("model.lora.pretrained_weight", "no.safetensors", "no file no.safetensors"),
    ],
)
def test_mistakes_get_their_own_words(key, value, words, checkpoints, tmp_path):
    if key == "cache.vae_encoder_device" and torch.cuda.device_count() > 7:
        value = "cuda:99"
    config = small_config(checkpoints["2511"], tmp_path, **{key: value})
    with pytest.raises(UserError, match=words):
        load_config(script.Config, ["--config", str(write_config(tmp_path, config))], script.audit)


def test_2508_takes_one_reference(checkpoints, tmp_path):
    dataset = suffix_dataset(PAIRS)
    dataset["image_configs"]["tones"] = {"suffix": "_D"}
    dataset["reference_configs"]["before"].append({"image": "tones"})
    config = small_config(checkpoints["2508"], tmp_path, **{"data.dataset_configs": [dataset]})
    file = write_config(tmp_path, config)
    with pytest.raises(UserError, match=r"2508.*takes one reference"):
        load_config(script.Config, ["--config", str(file)], script.audit)


def test_one_other_layer_is_another_fingerprint(tmp_path):
    weights = {f"block{i}.weight": torch.full((1024, 1024), float(i)) for i in range(8)}
    merged = {**weights, "block1.weight": weights["block1.weight"] + 1}
    for name, tensors in (("base", weights), ("merged", merged)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    assert script.fingerprint([tmp_path / "base"]) != script.fingerprint([tmp_path / "merged"])
