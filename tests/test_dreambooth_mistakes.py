"""train_dreambooth_pairs.py: mistakes of a new user are named at once, before a model loads."""

# ruff: noqa: F811 (fixtures are imported, and named again as arguments)
import json
import resource
import shutil

import pytest
from conftest import run
from PIL import Image
from safetensors.torch import load_file, save_file
from test_dreambooth import NO_PAIRS, flags, loaded, make, pictures, straight, subject  # noqa: F401

import train_dreambooth_pairs as script
from utils import Checkpoints, UserError, load_config


@pytest.fixture
def problems_of(make):
    """problems_of(**flags) -> what the audit says of them, lines joined."""

    def audit(**changes):
        return "\n".join(script.audit(make(**changes).config))

    return audit


def refused(flags, folder, **changes):
    """What load_config says of settings that do not go together."""
    with pytest.raises(UserError) as caught:
        load_config(script.Config, flags(folder, **changes), script.audit)
    return str(caught.value)


# --- folders and pictures -------------------------------------------------------------------------


def test_a_wrong_folder_comes_with_what_is_there(problems_of, pictures, tmp_path):
    said = problems_of(before_data_dir=pictures / "befor")
    assert f"{pictures}/befor" in said and "'before'" in said and "\n" not in said
    (tmp_path / "file").touch()
    assert f"{tmp_path}/file" in problems_of(after_data_dir=tmp_path / "file")


def test_pairs_that_are_none_are_named_all_at_once(problems_of, pictures, tmp_path):
    assert str(pictures / "before") in problems_of(after_data_dir=pictures / "before")
    (tmp_path / "empty").mkdir()
    said = problems_of(after_data_dir=tmp_path / "empty")
    assert "No matching image pairs found" in said and "coffee0.*" in said
    other = shutil.copytree(pictures / "after", tmp_path / "other")
    Image.open(pictures / "before/hubble0.png").save(other / "hubble0.bmp")
    (other / "hubble0.png").unlink()  # other bytes than the before, the same pixels
    (other / "coffee0.png").write_bytes(b"")
    (other / "chelsea0.png").unlink()
    said = problems_of(after_data_dir=other).splitlines()
    assert len(said) == 3
    for line, name in zip(sorted(said), ("hubble0.bmp", "chelsea0", "coffee0.png"), strict=True):
        assert name in line
    assert len(problems_of(after_data_dir=other, on_missing="skip").splitlines()) == 2
    report = json.loads((tmp_path / "out/audit.json").read_text())
    assert any("chelsea0" in note for note in report["notes"]) and len(report["problems"]) == 2
    (other / "chelsea0.jpg").touch()
    (other / "chelsea0.png").touch()
    assert "keep one" in problems_of(after_data_dir=other)


def test_folders_that_would_read_each_other_are_refused(problems_of, subject, pictures, tmp_path):
    shutil.copytree(pictures / "before", tmp_path / "before")
    shutil.copytree(pictures / "after", tmp_path / "before/after")
    sides = {"before_data_dir": tmp_path / "before", "after_data_dir": tmp_path / "before/after"}
    assert str(tmp_path / "before/after") in problems_of(**sides)
    single = shutil.copytree(pictures / "single", tmp_path / "single")
    subject["instance_data_dir"] = single
    assert not problems_of(**subject)
    assert str(single / "out") in problems_of(**subject, output_dir=single / "out")
    for folder in (single, single / "class"):
        assert str(folder) in problems_of(**{**subject, "class_data_dir": folder})


def test_class_pictures_are_looked_at_before_any_is_drawn(problems_of, subject, tmp_path):
    (tmp_path / "class").touch()
    assert "class_data_dir" in problems_of(**subject)
    (tmp_path / "class").unlink()
    (tmp_path / "class").mkdir()
    (tmp_path / "class/a.png").touch()
    assert "class/a.png" in problems_of(**subject)


def test_very_long_pictures_are_noted(make, tmp_path):
    for side, color in (("before", "red"), ("after", "blue")):
        (tmp_path / side).mkdir()
        Image.new("RGB", (700, 100), color).save(tmp_path / side / "a.png")
    sides = {f"{side}_data_dir": tmp_path / side for side in ("before", "after")}
    assert not script.audit(make(**sides).config)
    notes = json.loads((tmp_path / "out/audit.json").read_text())["notes"]
    assert len(notes) == 1 and "2 sample(s) are longer than 3:1" in notes[0]


def test_a_prompt_that_is_cut_off_is_named(make, caplog):
    trainer = loaded(make(instance_prompt="a red thing " * 40))
    assert "75 tokens: a red thing" in caplog.text
    assert trainer.texts[trainer.config.instance_prompt][0].shape == (1, 77)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"pair_objective": "slidr"}, "pair_objective"),
        ({"timestep_min": 500, "timestep_max": 100}, "timestep_min"),
        ({"after_data_dir": None}, "after_data_dir"),
        ({"sequence_dirs": "[a, b]"}, "sequence_dirs"),
        ({"sequence_scales": "[1]"}, "sequence_scales"),
        ({"use_image_pairs": False}, "use_image_pairs"),
        ({"use_image_pairs": False, "region_weight": 1}, "region_weight"),
        ({**NO_PAIRS}, "instance_data_dir"),
        ({**NO_PAIRS, "instance_data_dir": "x", "instance_prompt": " "}, "instance_prompt"),
        ({"with_prior_preservation": True}, "class_data_dir"),
        ({"pair_objective": "joint", "calibrate": True}, "calibrate"),
        ({"validation_scales": "[]"}, "validation_scales"),
        ({"before_data_dirs": "x"}, "before_data_dir"),
        ({"video": "clip.mp4"}, "tools/video_pairs.py"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_named(changes, name, flags, tmp_path):
    assert name in refused(flags, tmp_path, **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("length", [{"max_train_steps": 4}, {"max_train_steps": None}])
def test_a_schedule_that_is_all_warmup_is_named(length, problems_of):
    """However the steps are counted; the 3 pairs are 2 batches, num_train_epochs is 1."""
    steps = length["max_train_steps"] or 2
    for warmup, there in ((steps, True), (steps - 1, False)):
        found = problems_of(**length, lr_scheduler="polynomial", lr_warmup_steps=warmup)
        assert (f"lr_warmup_steps: {warmup} of the {steps} steps" in found) == there
    assert not problems_of(**length, lr_scheduler="constant_with_warmup", lr_warmup_steps=900)


def test_lists_can_be_given_with_spaces_or_commas_and_the_rank_by_its_short_name(flags, tmp_path):
    argv = [*flags(tmp_path), "--validation_scales", "0,2", "--rank", "8"]
    config = load_config(script.Config, [*argv, "--before_data_dir=a", "--after_data_dir=b"])
    assert config.validation_scales == [0, 2] and config.lora_rank == 8
    argv = flags(tmp_path, before_data_dir=None, after_data_dir=None)
    argv += ["--sequence_dirs", "a", "b", "c", "--sequence_scales", "-1", "0", "2"]
    config = load_config(script.Config, argv)
    assert [scale for scale, _ in config.stages] == [-1, 0, 2]


# --- the checkpoint of the base -------------------------------------------------------------------


def cut_off(folder):
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def for_inpainting(folder):
    file = folder / "unet/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"in_channels": 9}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_off, "unet: diffusion_pytorch_model.safetensors"),
        (for_inpainting, "9 channels"),
        (lambda f: (f / "vae/diffusion_pytorch_model.safetensors").unlink(), "vae: no plain"),
        (lambda f: (f / "text_encoder/config.json").unlink(), "text_encoder/config.json"),
        (lambda f: [x.unlink() for x in (f / "tokenizer").iterdir()], "tokenizer"),
    ],
)
def test_a_damaged_base_is_named_before_it_is_loaded(
    damage, said, problems_of, checkpoints, tmp_path
):
    folder = shutil.copytree(checkpoints["sd"], tmp_path / "sd")
    damage(folder)
    assert said in problems_of(pretrained_model_name_or_path=folder)


def test_a_mistake_ends_with_exit_code_2(checkpoints, tmp_path):
    done = run(
        script.__file__,
        "--pretrained_model_name_or_path", checkpoints["flux"],
        "--use_image_pairs", "--before_data_dir", tmp_path / "a",
        "--after_data_dir", tmp_path / "b", cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "FluxPipeline" in done.stderr and f"{tmp_path}/a" in done.stderr


# --- runs -----------------------------------------------------------------------------------------


def test_a_missing_checkpoint_is_named_with_those_there_are(straight, make, tmp_path):
    shutil.copytree(straight, tmp_path / "out")
    with pytest.raises(UserError, match=r"checkpoint-9(.|\n)*checkpoint-[24]"):
        make(resume_from_checkpoint="checkpoint-9").fit()
    with pytest.raises(UserError, match="checkpoint-4"):  # newer than the one that is named
        make(resume_from_checkpoint="checkpoint-2").fit()


def test_a_run_of_constant_rate_can_go_on_for_longer(straight, make, tmp_path):
    make(max_train_steps=2).fit()
    make(max_train_steps=4, resume_from_checkpoint="latest").fit()
    once, twice = (load_file(f / script.LORA_FILE) for f in (straight, tmp_path / "out"))
    assert all((once[name] == twice[name]).all() for name in once)
    shrinking = {"folder": tmp_path / "cosine", "lr_scheduler": "cosine"}
    make(**shrinking, max_train_steps=2).fit()
    with pytest.raises(UserError, match="max_train_steps: was 2, is 4"):
        make(**shrinking, max_train_steps=4, resume_from_checkpoint="latest").fit()


def test_an_earlier_run_is_kept_and_can_go_on_where_it_lies(straight, make, tmp_path):
    out = shutil.copytree(straight, tmp_path / "out")
    make(max_train_steps=2, learning_rate=1e-3).fit()
    assert same_names(out / "earlier-1", ["checkpoint-2", "checkpoint-4", script.LORA_FILE])
    trainer = make(resume_from_checkpoint="earlier-1/checkpoint-4", max_train_steps=5)
    trainer.fit()
    assert trainer.global_step == 5


def same_names(folder, names):
    return set(names) <= {path.name for path in folder.iterdir()}


def test_a_second_run_in_the_same_folder_is_refused(make, tmp_path):
    with Checkpoints(tmp_path / "out").only_run(), pytest.raises(UserError, match="another run"):
        make(max_train_steps=1).fit()
    make(max_train_steps=1).fit()


def test_a_full_disk_keeps_what_was_saved(make, tmp_path):
    trainer = loaded(make())
    trainer.save_checkpoint()
    trainer.global_step = 2
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(UserError, match="checkpoint-2"):
            trainer.save_checkpoint()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-0"]
    assert Checkpoints.state(tmp_path / "out/checkpoint-0")


@pytest.mark.parametrize("what", ["pictures", "base"])
def test_another_base_or_other_pictures_are_nothing_to_go_on_with(
    what, make, pictures, checkpoints, tmp_path
):
    base = shutil.copytree(checkpoints["sd"], tmp_path / "sd")
    after = shutil.copytree(pictures / "after", tmp_path / "after")
    places = {"pretrained_model_name_or_path": base, "after_data_dir": after}
    make(**places, max_train_steps=1).fit()
    if what == "pictures":
        Image.open(after / "coffee0.png").rotate(180).save(after / "coffee0.png")
    else:
        file = base / "unet/diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        weights["conv_in.bias"] += 1
        save_file(weights, file)
    with pytest.raises(UserError, match=what):
        make(**places, max_train_steps=2, resume_from_checkpoint="latest").fit()


def test_a_run_that_explodes_stops_and_keeps_the_last_good_checkpoint(make, tmp_path):
    settings = {"checkpointing_steps": 1, "max_train_steps": 9, "logging_steps": 1}
    with pytest.raises(UserError, match=r"chelsea0|coffee0|hubble0"):
        make(**settings, learning_rate=1e30).fit()
    folders = list((tmp_path / "out").glob("checkpoint-*"))
    for folder in folders:
        tensors = load_file(folder / script.LORA_FILE).values()
        assert all(tensor.isfinite().all() for tensor in tensors)
    assert folders and not (tmp_path / "out" / script.LORA_FILE).exists()


def test_weights_that_are_not_finite_are_not_saved(make, tmp_path):
    trainer = loaded(make())
    trainer.trained[0].data[0] = float("nan")
    with pytest.raises(UserError, match="learning_rate"):
        trainer.save_checkpoint()
    assert not list(tmp_path.glob("out/checkpoint-*"))
