"""The audit, the one transform of a sample, what is cached, which samples meet in which step."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import copy_pairs, run, small_config, suffix_dataset, write_config
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions
from PIL import Image
from safetensors.torch import save_file
from test_grammar import COMBINATION, draws_of, found, many_roles, plan_of, three_roles

import train_qwen_edit as script
import utils
from utils import UserError, load_config


def problems_of(checkpoint, folder, **changes):
    """What a command would say of a small config with these changes, a line each."""
    file = write_config(folder, small_config(checkpoint, folder, **changes))
    try:
        load_config(script.Config, ["--config", str(file)], check=script.audit)
    except UserError as error:
        return str(error).splitlines()[1:]
    return []


def test_everything_wrong_is_named_at_once(checkpoints, tmp_path):
    """First the settings, then what they lead to: devices, folders and every file."""
    names = [f"{name}{number}" for name in ("chelsea", "coffee", "hubble") for number in range(3)]
    folder = copy_pairs(tmp_path / "data", names)
    (folder / "chelsea0_R.png").unlink()
    (folder / "chelsea1_R.png").write_bytes((folder / "chelsea1_R.png").read_bytes()[:5000])
    (folder / "chelsea2_R.png").write_bytes(b"")
    (folder / "coffee0_T.txt").write_text(" \n")
    (folder / "coffee1_T.txt").unlink()
    (folder / "coffee2_T.txt").write_bytes(b"\xff\xfe\x00")
    next(file for file in folder.glob("hubble0_T.*") if file.suffix != ".txt").unlink()
    Image.new("RGB", (8, 8)).save(folder / "hubble1_T.bmp")  # one stem, two files
    Image.new("RGB", (8, 8)).save(folder / "hubble2_D.bmp")  # nothing uses D
    dataset = suffix_dataset(folder, holdout=["coffe0"])
    changes = {"data.dataset_configs": [dataset], "model.devices": ["gpu"]}
    wrong = {  # setting: what was meant
        "train.max_train_stepz": "'max_train_steps'",
        "model.lora.rnk": "'r'",
        "optimzer": "'optimizer'",
        "data.suffix": "data.dataset_configs.0.image_configs.*.suffix",
    }
    lines = problems_of(checkpoints["2511"], tmp_path, **changes, **dict.fromkeys(wrong, 1))
    assert len(lines) == 4 and not (tmp_path / "out").exists()
    for path, meant in wrong.items():
        assert any(f"{path}: " in line and meant in line for line in lines), path
    lines = problems_of(checkpoints["2511"], tmp_path, **changes)
    named = ["'chelsea0'", "chelsea1_R.png", "chelsea2_R.png", "coffee0_T.txt", "coffee1_T.txt"]
    named += ["coffee2_T.txt", "'hubble0'", "hubble1_T.bmp", "'coffe0'", "model.devices.0"]
    assert all(any(name in line for line in lines) for name in named) and len(lines) == 10
    assert len(json.loads((tmp_path / "out/audit.json").read_text())["problems"]) == 9
    none = {"data.dataset_configs": [], "logging.output_dir": str(tmp_path / "none")}
    [line] = problems_of(checkpoints["2511"], tmp_path, **none)
    assert "no data set is named" in line and not (tmp_path / "none/audit.json").exists()
    left_out = {"on_missing": "skip", "holdout": []}  # goes on without the incomplete ones
    data, problems = found(tmp_path, dataset | left_out)
    assert [s.name for s in data.samples] == ["chelsea1", "chelsea2", "hubble1", "hubble2"]
    report = json.loads((tmp_path / "out/audit.json").read_text())
    assert len(problems) == 3 and len(report["skipped"]) == 5


def test_a_mistake_ends_a_command_before_any_model_library(checkpoints, tmp_path):
    folder = copy_pairs(tmp_path / "data")
    (folder / "coffee0_R.png").unlink()
    changes = {"data.dataset_configs": [suffix_dataset(folder)]}
    file = write_config(tmp_path, small_config(checkpoints["2511"], tmp_path, **changes))
    code = (
        "import sys, train_qwen_edit as script, utils, atexit\n"
        "heavy = {'diffusers', 'transformers', 'peft', 'accelerate'}\n"
        "atexit.register(lambda: print(utils.draw_key(1, 'x'), *heavy & {*sys.modules}))\n"
        f"sys.argv = ['train_qwen_edit.py', '--config', '{file}']\n"
        "utils.run_script(script.main)"
    )
    done = run("-c", code, check=False)
    # another process draws the same, too
    assert (done.returncode, done.stdout.split()) == (2, [str(utils.draw_key(1, "x"))])
    assert "coffee0" in done.stderr and "Traceback" not in done.stderr


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
        for area in (script.VISION_AREA, script.AREA_1MP):
            assert script.pick_size(area, aspect) == calculate_dimensions(area, aspect)


def test_one_transform_keeps_pixels_aligned(tmp_path):
    """A coordinate grid as target, mask, start and (twice as large) reference stays that grid."""
    y, x = np.mgrid[0:96, 0:160]
    grid = Image.fromarray(np.stack([x * 255 / 159, y * 255 / 95, 0 * x], -1).astype(np.uint8))
    for role in "TMS":
        grid.save(tmp_path / f"a_{role}.png")
    grid.resize((320, 192), Image.Resampling.BICUBIC).save(tmp_path / "a_R.png")
    Image.new("RGB", (128, 32)).save(tmp_path / "a_D.png")
    (tmp_path / "a_T.txt").write_text("x")
    dataset = three_roles(tmp_path, views=6, view_scale=0.5, view_flip=True, resolution=128)
    dataset["image_configs"] |= {"M": {"suffix": "_M"}, "S": {"suffix": "_S"}}
    dataset["target_configs"] = {"T": [{"image": "T", "from_image": "S"}]}
    dataset["batch_configs"] = [COMBINATION | {"mask": "M"}]
    changes = {"data.reference_area": "target", "loss.mask": "file"}
    data, problems = found(tmp_path, dataset, **changes)
    boxes, flips = set(), set()
    for view in range(6):
        shown = data.resolve(script.Draw(0, 0, view=view)).pictures
        [target], [reference, other] = shown["pixel"], shown["control"]
        pixels = np.asarray(script.load_picture(target)).astype(int)
        for same in (reference, *shown["region"], *shown["start"]):
            assert same.size == target.size, view
            assert np.abs(pixels - np.asarray(script.load_picture(same))).max() <= 6, view
        assert other.box == (0, 0, 1, 1) and not other.flip  # another aspect: whole
        assert shown["vision"][0].box == target.box and shown["vision"][1].box == other.box
        w, h = target.size
        means = pixels.reshape(h // 8, 8, w // 8, 8, 3).mean((1, 3, 4)) / 255
        level = script.region_map(script.load_picture(shown["region"][0]))  # a weight per latent
        np.testing.assert_allclose(level[0, 0], means, atol=1e-5)
        boxes.add(target.box)
        flips.add(target.flip)
    assert not problems and len(boxes) == 6 and flips == {False, True}
    grid.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "a_M.png")
    again, _ = found(tmp_path, dataset, **changes)
    pictures = [d.resolve(script.Draw(0, 0)).pictures["region"] for d in (data, again)]
    assert len({script.Job("region", region).key({"region": ""}) for region in pictures}) == 2


@pytest.mark.parametrize(
    ("changed", "kinds"),
    [("a_T.png", ["latent"]), ("a_R.png", ["latent", "prompt"]), ("a_T.txt", ["prompt"])],
)
def test_one_changed_byte_renames_what_depends_on_it(changed, kinds, make_trainer, tmp_path):
    """Entries are named by content: what keeps its name is not built again."""
    folder, other = many_roles(tmp_path / "d", "ab"), many_roles(tmp_path / "e", "x")
    datasets = [three_roles(folder), three_roles(other, recreate_cache=True)]

    def jobs(**how):
        trainer = make_trainer(**{"data.dataset_configs": datasets})
        trainer.setup_accelerator()
        trainer.find_data()
        return trainer.cache_jobs(**how)

    before = jobs()
    assert Counter(job.kind for job in jobs(renewed=True).values()) == {"latent": 3, "prompt": 1}
    data = bytearray((folder / changed).read_bytes())
    data[-1] ^= 1  # of a PNG: behind its pixels
    (folder / changed).write_bytes(bytes(data))
    after = jobs()
    assert sorted(job.kind for key, job in after.items() if key not in before) == kinds
    assert len(before) == 9  # a and x are the same pictures: encoded once


def test_one_other_layer_is_another_encoder(tmp_path):
    weights = {f"block{i}.weight": torch.full((1024, 1024), float(i)) for i in range(8)}
    merged = {**weights, "block1.weight": weights["block1.weight"] + 1}
    for name, tensors in (("base", weights), ("copy", weights), ("merged", merged)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    base, copy, other = (script.fingerprint([tmp_path / n]) for n in ("base", "copy", "merged"))
    assert base == copy != other


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Eleven samples of two shapes."""
    folder = tmp_path_factory.mktemp("shapes")
    many_roles(folder, [f"s{i:02}" for i in range(11)])
    for number in range(0, 11, 2):
        Image.new("RGB", (48, 96)).save(folder / f"s{number:02}_T.png")
    return folder


def steps_of(shapes, tmp_path, rank=0, first=0, processes=1, repeats=1, **changes):
    """The steps of a plan, each as its micro-batches."""
    data, _ = found(tmp_path, three_roles(shapes, repeats=repeats), **changes)
    return data, list(plan_of(data, rank, processes, first))


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_visits_every_sample_as_often_as_its_repeats(shuffle, shapes, tmp_path):
    changes = {"data.batch_size": 4, "train.num_epochs": 2, "data.shuffle": shuffle}
    data, steps = steps_of(shapes, tmp_path, repeats=4, **changes)
    epochs = [draws_of(steps[:11]), draws_of(steps[11:])]
    for epoch in epochs:
        visits = Counter(draw.sample for draw in epoch)
        assert set(visits.values()) == {4} and len(visits) == 11
    assert ([d.sample for d in epochs[0]] != [d.sample for d in epochs[1]]) == shuffle
    assert len({draw.visit for draw in draws_of(steps)}) == 88  # every visit has its own noise
    for batch in itertools.chain(*steps):
        assert len({data.shape(draw) for draw in batch}) == 1 and len(batch) <= 4


@pytest.mark.parametrize(
    ("processes", "batch_size", "accumulate"), [(1, 2, 2), (2, 2, 1), (4, 1, 1), (2, 1, 2)]
)
def test_a_step_may_be_split(processes, batch_size, accumulate, shapes, tmp_path):
    """The same samples meet, whatever the processes, and in a run that goes on."""
    whole = {"train.max_train_steps": 12, "data.batch_size": 4}
    split = {"data.batch_size": batch_size, "train.gradient_accumulation_steps": accumulate}
    _, steps = steps_of(shapes, tmp_path, **whole)
    ranks = range(processes)
    parts = [steps_of(shapes, tmp_path, rank, 0, processes, **whole | split)[1] for rank in ranks]
    for number, step in enumerate(steps):
        met = [draw for part in parts for draw in draws_of([part[number]])]
        assert sorted(met) == sorted(draws_of([step])) and len(met) == 4
    for first in (1, 5, 12):
        assert steps_of(shapes, tmp_path, first=first, **whole)[1] == steps[first:]
