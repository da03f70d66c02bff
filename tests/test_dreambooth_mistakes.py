"""train_dreambooth_pairs.py: mistakes of a new user are named at once, before a model loads."""

# ruff: noqa: F811 (fixtures are imported, and named again as arguments)
import json
import resource
import shutil
import struct
import wave

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from test_dreambooth import loaded, make, pictures, write_video  # noqa: F401 (fixtures)

import train_dreambooth_pairs as script
from utils import UserError, load_config

UPRIGHT = (2**16, 0, 0, 0, 2**16, 0)  # the matrix of an mp4 track, 16.16 fixed point
TURNED = (0, 2**16, 0, -(2**16), 0, 0)  # by 90 degrees, clockwise


@pytest.fixture
def problems_of(make):
    """problems_of(**flags) -> what the audit says of them, lines joined."""

    def audit(**changes):
        return "\n".join(script.audit(make(**changes).config))

    return audit


@pytest.fixture
def alone(pictures, tmp_path):
    """Flags of DreamBooth with prior preservation instead of pairs."""
    shutil.copytree(pictures / "single", tmp_path / "single")
    return {
        "use_image_pairs": False,
        "before_data_dir": None,
        "after_data_dir": None,
        "instance_data_dir": tmp_path / "single",
        "with_prior_preservation": True,
        "class_data_dir": tmp_path / "class",
        "class_prompt": "a dog",
        "num_class_images": 3,
    }


# --- folders --------------------------------------------------------------------------------------


def test_a_wrong_folder_comes_with_what_is_there(problems_of, pictures, tmp_path):
    said = problems_of(before_data_dir=pictures / "befor")
    assert (
        f"images root doesn't exist: {pictures}/befor; in {pictures} there is (after, bef" in said
    )
    (tmp_path / "file").touch()
    assert "file is a file, no folder" in problems_of(after_data_dir=tmp_path / "file")


def test_folders_that_would_read_each_other_are_refused(problems_of, alone, pictures, tmp_path):
    shutil.copytree(pictures / "before", tmp_path / "before")
    shutil.copytree(pictures / "after", tmp_path / "before/after")
    sides = {"before_data_dir": tmp_path / "before", "after_data_dir": tmp_path / "before/after"}
    assert "before/after lies in" in problems_of(**sides)
    single = tmp_path / "single"
    assert "samples would become" in problems_of(**alone, output_dir=single / "out")
    assert "must lie apart" in problems_of(**{**alone, "class_data_dir": single / "class"})
    assert "must lie apart" in problems_of(**{**alone, "class_data_dir": single})
    assert not problems_of(**alone)


def test_class_pictures_are_looked_at_before_any_is_drawn(problems_of, alone, tmp_path):
    (tmp_path / "class").touch()
    assert "class is a file" in problems_of(**alone)
    (tmp_path / "class").unlink()
    (tmp_path / "class").mkdir()
    (tmp_path / "class/a.png").touch()
    assert "class/a.png cannot be read" in problems_of(**alone)


def test_a_deleted_class_picture_is_drawn_again_beside_the_others(make, alone):
    trainer = make(**alone)
    trainer.setup_accelerator()
    trainer.find_data()
    folder = alone["class_data_dir"]
    kept = (folder / "class-00002.png").read_bytes()
    (folder / "class-00000.png").unlink()
    again = make(**alone)
    again.setup_accelerator()
    again.find_data()
    assert len(again.class_pictures) == 3
    assert (folder / "class-00002.png").read_bytes() == kept


def test_class_pictures_need_only_the_parts_that_are_fetched(make, alone, checkpoints, tmp_path):
    """The index of Stable Diffusion 1.5 names a feature extractor; nothing here reads it."""
    folder = shutil.copytree(checkpoints["sd"], tmp_path / "sd")
    index = json.loads((folder / "model_index.json").read_text())
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    trainer = make(**alone, pretrained_model_name_or_path=folder)
    trainer.setup_accelerator()
    trainer.find_data()
    assert len(trainer.class_pictures) == 3


def test_very_long_pictures_are_named(make, tmp_path, caplog):
    for side, color in (("before", "red"), ("after", "blue")):
        (tmp_path / side).mkdir()
        Image.new("RGB", (700, 100), color).save(tmp_path / side / "a.png")
    sides = {f"{side}_data_dir": tmp_path / side for side in ("before", "after")}
    assert not script.audit(make(**sides).config)
    assert caplog.text.count("a.png is longer than 3:1; its ends are cut off") == 2


def test_a_turned_video_is_trained_upright(make, tmp_path):
    """A telephone stores lying frames and says in the file by how much to turn them."""
    pytest.importorskip("av")
    frames = []
    for number in range(3):
        frame = np.zeros((64, 64, 3), np.uint8)
        frame[:, :32] = 90 * number + 60  # left half
        frames.append(frame)
    write_video(tmp_path / "clip.mp4", frames)
    data = (tmp_path / "clip.mp4").read_bytes()
    upright, turned = (struct.pack(">9i", *m, 0, 0, 2**30) for m in (UPRIGHT, TURNED))
    track = data.index(b"tkhd")
    (tmp_path / "clip.mp4").write_bytes(data[:track] + data[track:].replace(upright, turned, 1))
    sides = {"before_data_dir": None, "after_data_dir": None}
    config = make(**sides, video=tmp_path / "clip.mp4", frame_gap=2).config
    (scene,), _, problems = script.find_scenes(config)
    shown = np.asarray(Image.open(scene.files[1]).convert("L")).astype(int)
    assert not problems
    assert shown[:28].mean() > shown[36:].mean() + 100  # turned clockwise, left is above


def test_what_is_no_video_is_named(problems_of, tmp_path):
    pytest.importorskip("av")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(8000))
    (tmp_path / "text.mp4").write_text("no video")
    sides = {"before_data_dir": None, "after_data_dir": None}
    for name in ("sound.wav", "text.mp4"):
        assert f"{name} cannot be read" in problems_of(**sides, video=tmp_path / name)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "partner"),
    [
        ({"frame_gap": 3}, "video"),
        ({"class_prompt": "a dog"}, "with_prior_preservation"),
        ({"huber_c": 0.5}, "loss_type huber"),
        ({"validation_epochs": 2}, "validation_prompt"),
        ({"num_validation_images": 2}, "validation_prompt"),
        ({"num_class_images": 3}, "with_prior_preservation"),
        ({"lr_warmup_steps": 5}, "another lr_scheduler"),
        ({"lr_power": 2.0, "lr_scheduler": "cosine"}, "lr_scheduler polynomial"),
        ({"pair_multiplier": 0.25, "pair_objective": "copier"}, "slider or difference"),
    ],
    ids=str,
)
def test_a_setting_that_nothing_would_read_is_named(setting, partner, problems_of):
    said = problems_of(**setting)
    assert f"{next(iter(setting))}: nothing reads it without" in said and partner in said


def test_an_objective_of_pairs_without_pairs_is_named(problems_of, alone):
    assert "pair_objective: nothing" in problems_of(**alone, pair_objective="difference")


def test_a_subject_needs_words(problems_of, alone):
    assert "instance_prompt: single pictures need" in problems_of(**alone, instance_prompt="")


def test_a_prompt_that_is_cut_off_is_named(make, caplog):
    make(instance_prompt="a red thing " * 40).cache_embeddings()
    assert "cut off after 75 tokens: a red thing" in caplog.text


def test_wrong_scales_hide_no_problem_of_the_folders(problems_of, pictures, tmp_path):
    shutil.copytree(pictures / "after", tmp_path / "after")
    (tmp_path / "after/coffee0.png").unlink()
    said = problems_of(after_data_dir=tmp_path / "after", sequence_scales="[1]")
    assert "no picture coffee0.*" in said and "one for each of sequence_dirs" in said


def test_lists_can_be_given_with_spaces_and_not_empty(make):
    argv = ["--sequence_scales", "-1", "0", "1", "--validation_scales", "0,2"]
    argv = script.repeat_flags([*argv, "--pretrained_model_name_or_path=x"])
    config = load_config(script.Config, argv)
    assert config.sequence_scales == [-1, 0, 1] and config.validation_scales == [0, 2]
    with pytest.raises(UserError, match="validation_scales"):
        make(validation_scales="[]")


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
        (cut_off, "unet/diffusion_pytorch_model.safetensors cannot be read"),
        (for_inpainting, "takes 9 channels"),
        (lambda f: (f / "vae/diffusion_pytorch_model.safetensors").unlink(), "No such file"),
        (lambda f: (f / "text_encoder/config.json").unlink(), "text_encoder/config.json"),
        (lambda f: [x.unlink() for x in (f / "tokenizer").iterdir()], "holds no vocab.json"),
    ],
)
def test_a_damaged_base_is_named_before_it_is_loaded(
    damage, said, problems_of, checkpoints, tmp_path
):
    folder = shutil.copytree(checkpoints["sd"], tmp_path / "sd")
    damage(folder)
    assert said in problems_of(pretrained_model_name_or_path=folder)


# --- resume ---------------------------------------------------------------------------------------


def test_a_missing_checkpoint_is_named_with_those_there_are(problems_of, make):
    make().fit()
    said = problems_of(resume_from_checkpoint="checkpoint-9", learning_rate=1e-2)
    assert "checkpoint-9 is missing or damaged" in said and "(checkpoint-2, checkpoint-4" in said
    assert not problems_of(resume_from_checkpoint="checkpoint-4")


def test_a_run_of_constant_rate_can_go_on_for_longer(make, tmp_path):
    make(folder=tmp_path / "once", max_train_steps=4).fit()
    make(folder=tmp_path / "twice", max_train_steps=2).fit()
    make(folder=tmp_path / "twice", max_train_steps=4, resume_from_checkpoint="latest").fit()
    once, twice = (
        load_file(tmp_path / place / "out" / script.LORA_FILE) for place in ("once", "twice")
    )
    assert all((once[name] == twice[name]).all() for name in once)
    shrinking = {"folder": tmp_path / "cosine", "lr_scheduler": "cosine"}
    make(**shrinking, max_train_steps=2).fit()
    with pytest.raises(UserError, match="max_train_steps: was 2, is 4"):
        make(**shrinking, max_train_steps=4, resume_from_checkpoint="latest").fit()


def test_an_earlier_run_is_kept_and_can_go_on_where_it_lies(make, tmp_path, caplog):
    make(max_train_steps=2).fit()
    out = tmp_path / "out"
    (out / "earlier-2").mkdir()  # the user has deleted the first one
    make(max_train_steps=2, learning_rate=1e-3).fit()
    advice = "--resume_from_checkpoint earlier-1/checkpoint-2"
    assert advice in caplog.text and (out / "earlier-1/checkpoint-2").is_dir()
    flags = {"resume_from_checkpoint": "earlier-1/checkpoint-2", "max_train_steps": 4}
    assert not script.audit(make(**flags).config)
    trainer = make(**flags)
    trainer.fit()
    assert trainer.step == 4


def test_a_second_run_in_the_same_folder_is_refused(make, tmp_path):
    with script.only_run(tmp_path / "out"), pytest.raises(UserError, match="another run writes"):
        make(max_train_steps=2).fit()
    make(max_train_steps=2).fit()


def test_a_full_disk_keeps_what_was_saved(make, tmp_path):
    trainer = loaded(make())
    trainer.save_checkpoint()
    trainer.step = 2
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(UserError, match="checkpoint-2 cannot be written"):
            trainer.save_checkpoint()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-0"]
    assert script.valid_checkpoint(tmp_path / "out/checkpoint-0")


def test_changed_pictures_are_named_in_words(make, pictures, tmp_path):
    shutil.copytree(pictures / "after", tmp_path / "after")
    make(after_data_dir=tmp_path / "after", max_train_steps=2).fit()
    file = tmp_path / "after/coffee0.png"
    Image.open(file).rotate(180).save(file)
    with pytest.raises(UserError, match="pictures: some came, went or have changed"):
        make(after_data_dir=tmp_path / "after", resume_from_checkpoint="latest").fit()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"pair_objective": "copier", "max_train_steps": 1}, "two phases"),
        ({"lr_scheduler": "polynomial", "lr_warmup_steps": 4}, "needs some after the warm-up"),
    ],
    ids=["copier", "warm-up"],
)
def test_a_run_too_short_for_its_settings_is_refused(flags, said, make):
    with pytest.raises(UserError, match=said):
        make(**flags).fit()


# --- numbers --------------------------------------------------------------------------------------


def test_layers_of_the_text_encoder_have_the_names_that_webuis_know(make):
    """Whatever transformers calls them: its fifth version dropped `text_model`."""
    trainer = loaded(make(train_text_encoder=True, export="kohya"))
    trainer.save_result(calibrated=False)
    for file, start in (
        (script.LORA_FILE, "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A"),
        (script.KOHYA_FILE, "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down"),
    ):
        names = set(load_file(trainer.config.output_dir / file))
        assert f"{start}.weight" in names
        text = [name for name in names if name.startswith(("text", "lora_te"))]
        assert all(name.startswith(start.partition("layers")[0]) for name in text)


def test_change_maps_of_another_vae_are_other_entries(make, checkpoints, tmp_path):
    other = shutil.copytree(checkpoints["sd"], tmp_path / "sd")
    config = json.loads((other / "vae/config.json").read_text())
    (other / "vae/config.json").write_text(json.dumps({**config, "scaling_factor": 0.5}))
    keys = []
    for folder in (checkpoints["sd"], other):
        trainer = make(pretrained_model_name_or_path=folder, region_weight=0.5)
        trainer.setup_accelerator()
        trainer.find_data()
        jobs = trainer.cache_jobs()
        keys.append({key for key, job in jobs.items() if isinstance(job, script.Change)})
    assert len(keys[0]) == 3 and keys[0].isdisjoint(keys[1])


def test_a_whole_change_is_that_of_the_whole_sequence(make, pictures, tmp_path):
    """A scene that lacks the last time shows half the change: it must not halve the strength."""
    for name in ("first", "second", "third"):
        shutil.copytree(pictures / "before", tmp_path / name)
        for file in (tmp_path / name).iterdir():
            angle = 90 * ("first", "second", "third").index(name)
            Image.open(file).rotate(angle).save(file)
    folders = [str(tmp_path / name) for name in ("first", "second", "third")]
    flags = {
        "before_data_dir": None,
        "after_data_dir": None,
        "sequence_dirs": json.dumps(folders),
        "pair_objective": "difference",
    }
    whole = loaded(make(**flags)).full_change()
    (tmp_path / "third/hubble0.png").unlink()  # of the scene that is looked at last
    assert loaded(make(**flags)).full_change() == pytest.approx(whole)
