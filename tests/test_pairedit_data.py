"""What train_pairedit.py makes of folders and settings: samples, sizes, and mistakes by name."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, concept, run, slider_settings, write_config
from PIL import Image

import train_pairedit as script
from utils import UserError, load_config


@pytest.fixture
def problems(checkpoints, tmp_path):
    """problems(**settings) -> what load_config and the audit say, a line each."""
    concept(tmp_path / "datasets/age")
    flux = checkpoints["flux"]

    def find(**changes):
        file = write_config(tmp_path, slider_settings(flux, tmp_path, **changes))
        try:
            load_config(script.Config, ["--config", str(file)], check=script.audit)
        except UserError as error:
            return str(error).splitlines()[1:]
        return []

    return find


def samples_of(trainer):
    trainer.setup_accelerator()
    trainer.find_data()
    return trainer.data["age"]


# --- pairs ----------------------------------------------------------------------------------------


def test_pairs_have_the_same_stem_whatever_the_ending(make_slider, tmp_path):
    for name in ("source", "target"):
        (tmp_path / "datasets/age" / name / "sub").mkdir(parents=True)
    folder = concept(tmp_path / "datasets/age", ("7000", "7001", "sub/7002"))
    for name, ending in (("7000", "jpg"), ("7001", "webp"), ("sub/7002", "JPEG")):
        with Image.open(folder / f"target/{name}.png") as image:
            image.save(folder / f"target/{name}.{ending}")
        (folder / f"target/{name}.png").unlink()
    (folder / "target/notes.txt").write_text("no picture")
    (folder / "target/.hidden.png").write_text("no picture")
    samples = samples_of(make_slider())
    assert [sample.name for sample in samples] == ["7000", "7001", "sub/7002"]
    for sample in samples:
        before, after = sample.files
        assert before == folder / f"source/{sample.name}.png"
        assert after.parent == (folder / "target" / sample.name).parent


def test_a_missing_partner_is_named_or_left_out(problems, make_slider, tmp_path):
    (tmp_path / "datasets/age/target/7001.png").unlink()
    (line,) = problems()
    assert "7001" in line and str(tmp_path / "datasets/age/target") in line
    assert [s.name for s in samples_of(make_slider(on_missing="skip"))] == ["7000", "7002"]


def test_everything_wrong_with_the_pictures_is_named_at_once(problems, tmp_path):
    folder = concept(tmp_path / "datasets/age", ("7000", "7001", "7002", "7003"))
    (folder / "source/7000.png").write_bytes((folder / "source/7000.png").read_bytes()[:150])
    (folder / "target/7001.png").write_bytes(b"")
    with Image.open(folder / "source/7002.png") as image:
        image.save(folder / "target/7002.png", compress_level=0)  # other bytes, equal pixels
    shutil.copyfile(folder / "target/7003.png", folder / "target/7003.jpg")
    lines = problems(datasets=["age", "smile"], device=99)
    wrong = ("cuda:99", "7003.jpg", "source/7000.png", "target/7001.png", "target/7002.png")
    for what in (*wrong, "smile/source", "smile/target"):
        assert sum(what in line for line in lines) == 1, (what, lines)
    assert len(lines) == 7


def test_no_pair_at_all(problems, tmp_path):
    for file in (tmp_path / "datasets/age/target").iterdir():
        file.unlink()
    (line,) = problems(on_missing="skip")
    assert "age" in line


# --- geometry -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "bucket"), [((512, 512), (64, 64)), ((90, 160), (48, 80)), ((320, 200), (80, 48))]
)
def test_pictures_keep_their_aspect_and_their_place(size, bucket, make_slider, tmp_path):
    """A coordinate grid through both pictures of a pair, the second one twice as large."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    grid = np.stack([x * 255 / (size[0] - 1), y * 255 / (size[1] - 1), 9 + 0 * x], -1)
    before = Image.fromarray(grid.astype(np.uint8))
    grid[..., 2] = 200
    after = Image.fromarray(grid.astype(np.uint8))
    folder = tmp_path / "datasets/age"
    for name, image, side in (("source", before, 1), ("target", after, 2)):
        (folder / name).mkdir(parents=True)
        larger = image.resize((size[0] * side, size[1] * side), Image.Resampling.BICUBIC)
        larger.save(folder / name / "a.png")
    (sample,) = samples_of(make_slider())
    a, b = (np.asarray(image).astype(int) for image in script.fit_pictures(sample))
    assert sample.size == bucket and a.shape == b.shape == (*bucket[::-1], 3)
    assert abs(a[..., :2] - b[..., :2]).max() <= 4 and (b[..., 2] - a[..., 2]).min() > 150
    columns, rows = np.ptp(a[..., 0].mean(0)), np.ptp(a[..., 1].mean(1))
    assert columns * rows > 0.85 * 255**2  # most of the picture is seen


def test_alpha_grey_turned_and_unequal_pictures(make_slider, tmp_path):
    folder = concept(tmp_path / "datasets/age", ("a", "b", "c", "d"), (96, 64))
    Image.new("RGBA", (96, 64), (0, 0, 0, 0)).save(folder / "source/a.png")
    Image.new("L", (96, 64), 128).save(folder / "source/b.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (64, 96), "blue").save(folder / "source/c.jpg", exif=exif)
    (folder / "source/c.png").unlink()
    Image.new("RGB", (120, 60), "red").save(folder / "target/d.png")  # another shape: cropped
    shown = {}
    for sample in samples_of(make_slider()):
        images = script.fit_pictures(sample)
        assert {(image.mode, image.size) for image in images} == {("RGB", (80, 48))}
        shown[sample.name] = np.asarray(images[0]).reshape(-1, 3).mean(0)
    np.testing.assert_allclose(shown["a"], 255)
    np.testing.assert_allclose(shown["b"], 128)
    assert shown["c"][2] > 240


def test_pictures_are_looked_at_once(make_slider, monkeypatch):
    make_slider()
    monkeypatch.setattr(Image, "open", lambda *args, **options: pytest.fail("a picture was opened"))
    make_slider()


# --- mistakes in settings -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"python_name": "train_img"}, "python_name"),
        ({"image_ids": [610]}, "image_ids"),
        ({"python_name": "train_image_real"}, "image_ids"),
        ({"python_name": "train_image_real", "image_ids": [9]}, "9.*"),
        ({"num_inference_steps": 20}, "end_step 27 < num_inference_steps 20"),
        ({"start_step": 20, "end_step": 10}, "start_step 20 <= end_step 10"),
        ({"noise_scales": [1, 1.0]}, "noise_scales"),
        ({"datasets": ["age", "age"]}, "datasets"),
        ({"datasets": ["../age"]}, "../age"),
        ({"datasets": [".."]}, "datasets"),
        ({"config_name": "a/b"}, "config_name"),
        ({"skips": [-2]}, "skips"),
        ({"skips": [27], "preview": True}, "skips: 27"),
        ({"scales": []}, "scales"),
        ({"scales": "0,much"}, "scales"),
        ({"device": "gpu"}, "device"),
        ({"resolution": 500}, "resolution"),
        ({"noise_scale": 3}, "did you mean 'noise_scales'"),
        ({"train_iteration": True}, "train_iteration"),
        ({"resume_from_checkpoint": "checkpoint-5"}, "resume_from_checkpoint"),
        ({"pretrained_model_name_or_path": "/no/such"}, "/no/such"),
        ({"stages": ["child", "adult"]}, "stages"),
        ({"stage_scales": [0, 1]}, "stage_scales"),
    ],
)
def test_a_mistake_is_the_only_thing_reported(changes, setting, problems):
    (line,) = problems(**changes)
    assert setting in line


def test_a_checkpoint_of_another_kind_or_in_pieces(problems, checkpoints, tmp_path):
    (line,) = problems(pretrained_model_name_or_path=str(checkpoints["sd"]))
    assert "StableDiffusionPipeline" in line
    shutil.copytree(checkpoints["flux"], tmp_path / "flux")
    shutil.rmtree(tmp_path / "flux/vae")
    (line,) = problems(pretrained_model_name_or_path=str(tmp_path / "flux"))
    assert "vae" in line


def test_missing_packages_and_folders_that_cannot_be_written(problems, tmp_path, monkeypatch):
    monkeypatch.setattr(script.utils.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "file").write_text("")
    places = {"output_folder": str(tmp_path / "file/out"), "cache_dir": str(tmp_path / "file/c")}
    lines = problems(base_model_precision="nf4-bnb", report_to="wandb", **places)
    for what in ("bitsandbytes", "wandb", "output_folder", "cache_dir"):
        assert sum(what in line for line in lines) == 1, (what, lines)


def test_mistakes_end_a_command_before_a_model_is_loaded(checkpoints, tmp_path):
    """Exit code 2, no traceback, without diffusers; first all settings, then all data."""
    folder = concept(tmp_path / "datasets/age")
    (folder / "target/7000.png").unlink()
    (folder / "source/7001.png").write_bytes(b"nothing")
    file = write_config(tmp_path, slider_settings(checkpoints["flux"], tmp_path))
    wrong = ["--num_inference_steps", "20", "--learningrate", "1", "--rank", "many"]
    for flags, said in (
        (wrong, ["learning_rate", "rank"]),
        (["--device", "99"], ["cuda:99", "7000", str(folder / "source/7001.png")]),
    ):
        code = (
            f"import runpy, sys; sys.argv = ['train_pairedit.py', '--config', {str(file)!r}, "
            f"*{flags}]\ntry: runpy.run_path('train_pairedit.py', run_name='__main__')\n"
            "finally: print([m for m in ('diffusers', 'transformers') if m in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert done.stdout.strip() == "[]" and all(what in done.stderr for what in said)


# --- commands -------------------------------------------------------------------------------------


def test_c_is_short_for_a_config_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/train_image.yaml").write_text("rank: 8")
    for argv in (["--c=train_image"], ["--c", "train_image"], ["--c", "train_image.yaml"]):
        config = load_config(script.Config, script.with_named_config([*argv, "--alpha", "2"]))
        assert (config.rank, config.alpha) == (8, 2.0)
    with pytest.raises(UserError, match=r"configs/other.yaml"):
        load_config(script.Config, script.with_named_config(["--c=other"]))
    assert script.with_named_config(["--rank", "3"]) == ["--rank", "3"]


def test_lists_are_given_as_one_likes():
    for argv in (["--scales", "0,0.5"], ["--scales", "0", "0.5"], ["--scales=[0, 0.5]"]):
        assert load_config(script.Config, argv).scales == [0, 0.5]
    config = load_config(script.Config, ["--noise_scales", "1,3", "--device", "1"])
    assert config.noise_scales == [1, 3] and config.device == "cuda:1"


def test_all_settings_have_help_and_the_printed_config_is_the_config(capsys, tmp_path):
    with pytest.raises(SystemExit):
        load_config(script.Config, ["--help", "all"])
    text = capsys.readouterr().out
    for name, field in script.Config.model_fields.items():
        assert f"--{name}" in text and field.description, name
    with pytest.raises(SystemExit):
        load_config(script.Config, ["--cfg_eta", "2", "--print_config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    again = load_config(script.Config, ["--config", str(tmp_path / "printed.yaml")])
    assert again == load_config(script.Config, ["--cfg_eta", "2"])


@pytest.mark.slow
def test_an_ablation_is_one_function(checkpoints, tmp_path):
    """A fork of four changed lines trains, with its own name and its own loss."""
    concept(tmp_path / "datasets/age")
    mine = '''def my_variant(b: PairBatch) -> list[Pass]:
    """Count the content twice."""
    content, semantic = train_image(b)
    return [content._replace(weight=2.0), semantic]


'''
    code = (ROOT / "train_pairedit.py").read_text()
    code = code.replace("LOSSES = {", f"{mine}LOSSES = {{").replace("slider_text),", "my_variant),")
    (tmp_path / "fork.py").write_text(code)
    shutil.copy(ROOT / "utils.py", tmp_path)
    changes = {"python_name": "my_variant", "train_iteration": 1, "log_every": 1}
    file = write_config(tmp_path, slider_settings(checkpoints["flux"], tmp_path, **changes))
    run(tmp_path / "fork.py", "--config", file)
    (metrics,) = (tmp_path / "out/age").glob("age_vmy_variant_*/metrics.jsonl")
    row = json.loads(metrics.read_text())
    assert row["loss"] == pytest.approx(2 * row["loss_content"] + row["loss_semantic"], rel=1e-5)
    lines = code.splitlines()
    objective = next(i for i, line in enumerate(lines, 1) if line.startswith("def train_image("))
    loop = next(i for i, line in enumerate(lines, 1) if line.startswith("def train_loop("))
    assert objective < 150 and loop < 700 and re.search("^# === machinery", code, re.M)
