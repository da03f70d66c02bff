"""What train_pairedit.py makes of folders and settings: pairs, shapes, and mistakes by name."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, concept, run, slider_settings, write_config
from PIL import Image

import train_pairedit as script
from utils import FileIndex, UserError, load_config


def problems_of(checkpoint, folder, **changes):
    """What the audit says, as text; "" if all is well."""
    file = write_config(folder, slider_settings(checkpoint, folder, **changes))
    try:
        load_config(script.Config, ["--config", str(file)], check=script.audit)
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture
def problems(checkpoints, tmp_path):
    concept(tmp_path / "datasets/age")
    return lambda **changes: problems_of(checkpoints["flux"], tmp_path, **changes)


def pairs_of(trainer, dataset="age"):
    trainer.setup_accelerator()
    trainer.find_data()
    return trainer.pairs[dataset]


# --- pairs ----------------------------------------------------------------------------------------


def test_pairs_have_the_same_stem_whatever_the_ending(make_slider, tmp_path):
    folder = concept(tmp_path / "datasets/age")
    for number, ending in ((0, "jpg"), (1, "webp"), (2, "JPEG")):
        image = Image.open(folder / f"target/700{number}.png")
        image.save(folder / f"target/700{number}.{ending}")
        (folder / f"target/700{number}.png").unlink()
    (folder / "target/notes.txt").write_text("no picture")
    (folder / "target/.hidden.png").write_text("no picture")
    pairs = pairs_of(make_slider())
    assert [p.name for p in pairs] == ["7000", "7001", "7002"]
    for pair in pairs:
        assert [f.parent.name for f in pair.files] == ["source", "target"]
        assert {f.stem for f in pair.files} == {pair.name}


def test_a_missing_partner_is_named_or_left_out(problems, make_slider, tmp_path, caplog):
    (tmp_path / "datasets/age/target/7001.png").unlink()
    text = problems()
    assert f"age: no picture 7001.* in {tmp_path / 'datasets/age/target'}" in text
    assert text.startswith("1 problem")
    trainer = make_slider(on_missing="skip")
    assert "no picture 7001" in caplog.text
    assert [p.name for p in pairs_of(trainer)] == ["7000", "7002"]
    report = json.loads((tmp_path / "out/audit.json").read_text())["datasets"]["age"]
    assert report["pairs"] == ["7000", "7002"] and "7001" in report["left_out"][0]


def test_no_pair_at_all(problems, tmp_path):
    for file in (tmp_path / "datasets/age/target").iterdir():
        file.unlink()
    assert "age: no pair in" in problems(on_missing="skip")
    shutil.rmtree(tmp_path / "datasets/age/target")
    assert f"age: no folder {tmp_path / 'datasets/age/target'}" in problems()
    assert "smile: no folder" in problems(datasets=["smile"])


def test_two_files_of_one_stem_are_a_question_to_the_user(problems, tmp_path):
    folder = tmp_path / "datasets/age/target"
    shutil.copyfile(folder / "7001.png", folder / "7001.jpg")
    text = problems()
    assert "7001.jpg" in text and "7001.png have the same name; keep one" in text


def test_unreadable_and_equal_pictures_in_one_report(problems, tmp_path):
    folder = tmp_path / "datasets/age"
    (folder / "source/7000.png").write_bytes((folder / "source/7000.png").read_bytes()[:150])
    (folder / "target/7001.png").write_bytes(b"")
    shutil.copyfile(folder / "source/7002.png", folder / "target/7002.png")
    text = problems()
    for file in ("source/7000.png", "target/7001.png"):
        assert f"picture {folder / file} cannot be read" in text
    assert f"{folder / 'target/7002.png'} are the same picture: no change to learn" in text
    assert text.startswith("3 problem")


# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "bucket"), [((512, 512), (64, 64)), ((90, 160), (48, 80)), ((320, 200), (80, 48))]
)
def test_pictures_keep_their_aspect(size, bucket, make_slider, tmp_path):
    concept(tmp_path / "datasets/age", ("7000",), size)
    trainer = make_slider()
    (pair,) = pairs_of(trainer)
    for picture in script.fit_pair(trainer.config, pair, trainer.index):
        assert picture.size == bucket and script.load_picture(picture).size == bucket
        left, top, right, bottom = picture.box
        shown = size[0] * (right - left), size[1] * (bottom - top)
        assert shown[0] / shown[1] == pytest.approx(bucket[0] / bucket[1], rel=0.01)
        assert (right - left) * (bottom - top) > 0.85


def test_every_stage_is_cut_alike(make_slider, tmp_path):
    """The same place of the scene stays at the same place: a coordinate grid through both."""
    y, x = np.mgrid[0:100, 0:180]
    grid = np.stack([x * 255 / 179, y * 255 / 99, np.full(x.shape, 9)], -1).astype(np.uint8)
    folder = concept(tmp_path / "datasets/age", ("7000",))
    Image.fromarray(grid).save(folder / "source/7000.png")
    grid[..., 2] = 200
    Image.fromarray(grid).resize((360, 200), Image.Resampling.BICUBIC).save(
        folder / "target/7000.png"
    )
    trainer = make_slider()
    (pair,) = pairs_of(trainer)
    both = [script.load_picture(p) for p in script.fit_pair(trainer.config, pair, trainer.index)]
    a, b = (np.asarray(image).astype(int) for image in both)
    assert a.shape == b.shape and abs(a[..., :2] - b[..., :2]).max() <= 4
    assert (b[..., 2] - a[..., 2]).min() > 150


def test_a_pair_of_two_shapes_is_mentioned_and_cropped(make_slider, tmp_path, caplog):
    folder = concept(tmp_path / "datasets/age", ("7000",))
    Image.new("RGB", (120, 60), "red").save(folder / "target/7000.png")
    trainer = make_slider()
    assert "7000.png has another shape than" in caplog.text
    (pair,) = pairs_of(trainer)
    sizes = {
        script.load_picture(p).size for p in script.fit_pair(trainer.config, pair, trainer.index)
    }
    assert sizes == {(64, 64)}


def test_alpha_grey_and_turned_photos(make_slider, tmp_path):
    folder = concept(tmp_path / "datasets/age", ("a", "b", "c"), (96, 64))
    Image.new("RGBA", (96, 64), (0, 0, 0, 0)).save(folder / "source/a.png")
    Image.new("L", (96, 64), 128).save(folder / "source/b.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (64, 96), "blue").save(folder / "source/c.jpg", exif=exif)
    (folder / "source/c.png").unlink()
    trainer = make_slider()
    shown = {}
    for pair in pairs_of(trainer):
        picture = script.fit_pair(trainer.config, pair, trainer.index)[0]
        image = script.load_picture(picture)
        assert image.mode == "RGB" and image.size == (80, 48)
        shown[pair.name] = np.asarray(image).reshape(-1, 3).mean(0)
    np.testing.assert_allclose(shown["a"], 255)
    np.testing.assert_allclose(shown["b"], 128)
    assert shown["c"][2] > 240


# --- mistakes in settings -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"python_name": "train_img"}, "python_name: Input should be 'train_image',"),
        ({"image_ids": [610]}, "image_ids and python_name: train_image_real go together"),
        ({"python_name": "train_image_real"}, "image_ids and python_name: train_image_real"),
        ({"python_name": "train_image_real", "image_ids": [9]}, "age: no picture 9.* in"),
        ({"num_inference_steps": 20}, "start_step 0 <= end_step 27 < num_inference_steps 20"),
        ({"start_step": 20, "end_step": 10}, "start_step 20 <= end_step 10"),
        ({"stages": ["source"]}, "stages: name two folders or more"),
        ({"stages": ["source", "target"], "stage_scales": [0]}, "stage_scales: one for each"),
        ({"stages": ["source", "target"], "stage_scales": [1, 2]}, "exactly one must be 0"),
        ({"stages": ["source", "later"]}, "age: no folder"),
        ({"python_name": "slider_text", "stages": ["a", "b"]}, "slider_text reads no pairs"),
        ({"python_name": "train_image_fm", "noise_scales": [1, 2]}, "noise_scales: train_image_fm"),
        ({"noise_scales": [1, 1.0]}, "noise_scales, image_ids: [1.0] is there twice"),
        ({"datasets": ["age", "age"]}, "datasets: a name is there twice"),
        ({"datasets": ["../age"]}, "'../age' is no name of a folder"),
        ({"datasets": [".."]}, "'..' is no name of a folder"),
        ({"config_name": "a/b"}, "config_name"),
        ({"skips": [-2]}, "skips: -2"),
        ({"skips": [27], "preview": True}, "skips: 27 of 28 steps, so the slider would never act"),
        ({"scales": []}, "scales"),
        ({"scales": "0,much"}, "scales"),
        ({"prompts_file": []}, "prompts_file"),
        ({"use_prompts_file": 1, "prompts_file": ["none.yaml"]}, "prompts_file none.yaml"),
        ({"device": 99}, "device: 'cuda:99', but this machine has"),
        ({"device": "gpu"}, "device: 'gpu' is no device"),
        ({"resolution": 500}, "resolution"),
        ({"noise_scale": 3}, "noise_scale: unknown setting, did you mean 'noise_scales'?"),
        ({"train_iteration": True}, "train_iteration: wanted a number"),
        ({"resume_from_checkpoint": "checkpoint-5"}, "resume_from_checkpoint"),
        ({"pretrained_model_name_or_path": "/no/such"}, "no folder /no/such"),
    ],
)
def test_a_mistake_is_the_only_thing_reported(changes, says, problems):
    text = problems(**changes)
    assert says in text and text.startswith("1 problem"), text


def test_a_checkpoint_of_another_kind_or_in_pieces(problems, checkpoints, tmp_path):
    text = problems(pretrained_model_name_or_path=str(checkpoints["2509"]))
    assert "QwenImageEditPlusPipeline; wanted FluxPipeline" in text
    shutil.copytree(checkpoints["flux"], tmp_path / "flux")
    shutil.rmtree(tmp_path / "flux/vae")
    assert "has no vae folder" in problems(pretrained_model_name_or_path=str(tmp_path / "flux"))


def test_a_missing_package_is_named_with_its_setting(problems, monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    text = problems(base_model_precision="nf4-bnb")
    assert "  - base_model_precision: nf4-bnb needs bitsandbytes: pip install" in text


def test_more_than_ten_problems_are_counted_and_lie_in_the_report(problems, tmp_path):
    names = [f"p{i:02}" for i in range(14)]
    concept(tmp_path / "datasets/age", names)
    for name in names:
        (tmp_path / f"datasets/age/target/{name}.png").unlink()
    text = problems()
    assert "no picture p09.*" in text and "p10" not in text and "and 4 more, all of them in" in text
    assert len(json.loads((tmp_path / "out/audit.json").read_text())["problems"]) == 14


def test_everything_wrong_is_said_at_once_before_a_model_is_loaded(checkpoints, tmp_path):
    """As a command: exit code 2, no traceback, within seconds, without diffusers."""
    folder = concept(tmp_path / "datasets/age")
    (folder / "target/7000.png").unlink()
    (folder / "source/7001.png").write_bytes(b"nothing")
    changes = {"device": 99, "num_inference_steps": 20, "learningrate": 1, "rank": "many"}
    settings = slider_settings(checkpoints["flux"], tmp_path, **changes, image_ids=[7000])
    code = (
        f"import runpy, sys; sys.argv = ['train_pairedit.py', '--config', "
        f"{str(write_config(tmp_path, settings))!r}]\n"
        "try: runpy.run_path('train_pairedit.py', run_name='__main__')\n"
        "finally: print('loaded', [m for m in ('diffusers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "loaded []" in done.stdout
    for says in (
        "7 problem(s), nothing was loaded",
        "learningrate: unknown setting, did you mean 'learning_rate'?",
        "rank: Input should be a valid integer",
        "device: 'cuda:99'",
        "end_step 27 < num_inference_steps 20",
        "image_ids and python_name",
        "no picture 7000.*",
        f"picture {folder / 'source/7001.png'} cannot be read",
    ):
        assert says in done.stderr, f"{says}\n{done.stderr}"


def test_a_folder_without_write_permission_is_named(problems, tmp_path):
    (tmp_path / "file").write_text("")
    text = problems(output_folder=str(tmp_path / "file/out"), cache_dir=str(tmp_path / "file/c"))
    assert "output_folder: cannot write there" in text and "cache_dir: cannot write" in text


# --- commands -------------------------------------------------------------------------------------


def test_c_is_short_for_a_config_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/train_image.yaml").write_text("rank: 8")
    for argv in (["--c=train_image"], ["--c", "train_image"], ["--c", "train_image.yaml"]):
        config = load_config(script.Config, script.with_named_config([*argv, "--alpha", "2"]))
        assert (config.rank, config.alpha) == (8, 2.0)
    with pytest.raises(UserError, match=r"--config configs/other.yaml"):
        load_config(script.Config, script.with_named_config(["--c=other"]))
    assert script.with_named_config(["--rank", "3"]) == ["--rank", "3"]


def test_a_plan_of_flux_dev_without_a_download(tmp_path):
    folder = concept(tmp_path / "datasets/age", size=(128, 128))
    concept(folder.parent / "smile", size=(96, 160))
    settings = slider_settings(script.PUBLISHED_MODEL, tmp_path, datasets=["age", "smile"])
    settings |= {"resolution": 512, "max_sequence_length": 512, "device": None}
    settings |= {"mixed_precision": "bf16", "train_count": 2}
    blocked = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    done = run(
        "train_pairedit.py", "--plan", "--config", write_config(tmp_path, settings), env=blocked
    )
    for words in (
        "Runs         4 of",
        "3 of 512 x 512 px, 3 of 400 x 656 px",
        "1537, 512 of them text; 2 rows a step",
        "11.90 billion parameters",
        "content and semantic adapter on 266 layers, 26.1 million each",
        "weights 23.8",
    ):
        assert words in done.stdout, f"{words}\n{done.stdout}"
    assert not list(tmp_path.rglob("*.safetensors"))


def test_all_settings_have_help_and_the_printed_config_is_the_config(capsys, tmp_path):
    with pytest.raises(SystemExit):
        load_config(script.Config, ["--help"])
    text = capsys.readouterr().out
    for name, field in script.Config.model_fields.items():
        assert f"--{name}" in text and field.description, name
    with pytest.raises(SystemExit):
        load_config(script.Config, ["--cfg_eta", "2", "--print_config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    again = load_config(script.Config, ["--config", str(tmp_path / "printed.yaml")])
    assert again == load_config(script.Config, ["--cfg_eta", "2"])


def test_pictures_are_looked_at_once(make_slider, tmp_path, monkeypatch):
    make_slider()
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: (opened.append(a), original(*a, **k))[1])
    make_slider()
    assert not opened
    index = FileIndex(tmp_path / "cache")
    assert index.aspect(tmp_path / "datasets/age/source/7000.png") == 1.0
