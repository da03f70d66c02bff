"""What users really have on their disks: each case is read rightly, or named, and nothing hangs."""

import json
import math
import os
import re
import shutil
import signal
import unicodedata

import numpy as np
import pytest
import tiny
import torch
from bad_inputs import pictures
from conftest import PAIRS, ROOT, run, slider_settings, small_config, write_config
from PIL import Image, ImageCms
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_generate import trained

import evaluate
import generate
import train_dreambooth_pairs
import train_pairedit
import train_qwen_edit
import utils
from utils import UserError, load_config

TRAINERS = {"qwen": train_qwen_edit, "pairedit": train_pairedit, "sd": train_dreambooth_pairs}


@pytest.fixture(autouse=True)
def no_hang():
    """A case that takes 20 s has no end."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("no end after 20 s"))
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def world(tmp_path):
    """Three pairs in pairs/before and pairs/after, with captions."""
    for number, name in enumerate("abc"):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 64, 3), np.uint8)
        for side, image in (("before", pixels), ("after", 255 - pixels)):
            folder = tmp_path / "pairs" / side
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("make it blue")
    return tmp_path


@pytest.fixture
def audit(world, checkpoints):
    """audit("qwen" | "pairedit" | "sd", **settings) -> what is said of them before models load."""

    def find(kind, **changes):
        pairs, base = world / "pairs", {"qwen": "2511", "pairedit": "flux"}.get(kind, kind)
        if kind == "qwen":
            data = {"train_data_dir": str(pairs), "target_dir": "after", "resolution": 64}
            data["reference_dirs"] = ["before"]
            settings = small_config(checkpoints[base], world, **{"data.dataset_configs": [data]})
        elif kind == "pairedit":
            settings = slider_settings(checkpoints[base], world, datasets_folder=str(world))
            settings |= {"datasets": ["pairs"], "source_folder": "before", "target_folder": "after"}
        else:
            settings = {"pretrained_model_name_or_path": str(checkpoints[base]), "resolution": 64}
            settings |= {f"{side}_data_dir": str(pairs / side) for side in ("before", "after")}
            settings |= {"use_image_pairs": True, "instance_prompt": "a photo"}
            settings |= {"output_dir": str(world / "out"), "cache_dir": str(world / "cache")}
        argv = ["--config", str(write_config(world, settings))]
        argv += [f"--{name}={value}" for name, value in changes.items()]
        script = TRAINERS[kind]
        try:
            load_config(script.Config, argv, script.audit)
        except UserError as error:
            return str(error)
        return ""

    return find


@pytest.mark.parametrize("kind", TRAINERS)
def test_three_plain_pairs_are_taken(kind, audit):
    assert audit(kind) == ""


# -- pictures


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("name", pictures.REFUSED)
def test_a_picture_that_cannot_be_trusted_is_named(name, kind, audit, world):
    write, said = pictures.REFUSED[name]
    for old in (world / "pairs").glob("*/b.*"):
        old.unlink() if old.suffix != ".txt" else None
    place = world / "pairs/before" / f"b.{name.rpartition('.')[2]}"
    write(place)
    Image.new("RGB", (64, 32), "red").save(world / "pairs/after/b.png")
    text = audit(kind)
    assert re.search(f"{place}.*{said}", text) and text.count(str(place)) == 1, text


@pytest.mark.parametrize("name", pictures.READ)
def test_a_picture_arrives_as_it_is_meant(name, tmp_path):
    write, grey = pictures.READ[name]
    write(tmp_path / name)
    [[found]] = utils.list_images(tmp_path).values()
    facts, image = utils.look_at_picture(found), utils.open_rgb(found)
    assert (facts["width"], facts["height"]) == image.size == (64, 32)
    assert np.abs(np.asarray(image).astype(float) - grey[..., None]).max() <= 5


def test_a_wide_gamut_picture_keeps_its_colours(tmp_path):
    """Display P3 beside sRGB: what looks alike has the same pixels, so that no shift is learned."""
    file = tmp_path / "p3.png"
    Image.new("RGB", (8, 8), (200, 60, 40)).save(file, icc_profile=display_p3())
    red, green, _ = np.asarray(utils.open_rgb(file))[0, 0].astype(int)
    assert red > 205 and green < 55  # of the wider gamut's red more
    plain = tmp_path / "srgb.png"
    Image.fromarray(np.asarray(utils.open_rgb(file))).save(plain)
    assert utils.look_at_picture(file)["pixels"] == utils.look_at_picture(plain)["pixels"]
    assert utils.look_at_picture(file)["content"] != utils.look_at_picture(plain)["content"]


def display_p3():
    """An sRGB profile with the primaries of Display P3, as SMPTE EG 432-1 has them (D50)."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
    }
    for k in range(int.from_bytes(data[128:132], "big")):
        tag = bytes(data[132 + 12 * k : 136 + 12 * k])
        place = int.from_bytes(data[136 + 12 * k : 140 + 12 * k], "big")
        for i, value in enumerate(primaries.get(tag, ())):
            number = round(value * 65536).to_bytes(4, "big", signed=True)
            data[place + 8 + 4 * i : place + 12 + 4 * i] = number
    return bytes(data).replace("sRGB".encode("utf-16-be"), "DsP3".encode("utf-16-be"))


# -- captions, tables, folders


CAPTIONS = {
    "empty": (b" \n", "is empty"),
    "binary": (b"\xff\xfe\x00blue", "cannot be read"),
    "of a megabyte": (b"blue " * 300_000, "larger than"),
    "of a book's chapter": (b"blue " * 5_000, "24,999 characters"),
    "with a place for a picture": (b"<|image_pad|> make it blue", "control token"),
    "that ends the turn": (b"make it blue<|im_end|>", "control token"),
    "with a video": (b"<|vision_start|><|video_pad|><|vision_end|>", "control token"),
    "with a nought": (b"make it\0blue", "is no text"),
}


@pytest.mark.parametrize("name", CAPTIONS)
def test_a_caption_that_cannot_be_meant_is_named(name, audit, world):
    data, said = CAPTIONS[name]
    (world / "pairs/after/b.txt").write_bytes(data)
    text = audit("qwen")
    assert re.search(rf"\bb\b.*{said}", text) and len(text) < 600, text


def test_a_caption_that_is_a_pipe_or_a_loop_is_named(audit, world):
    place = world / "pairs/after/b.txt"
    place.unlink()
    os.mkfifo(place)
    assert "pipe or device" in audit("qwen")
    place.unlink()
    place.symlink_to(place)
    assert "b.txt" in audit("qwen")


@pytest.mark.parametrize("kind", ["pairedit", "sd"])
@pytest.mark.parametrize("token", ["<|endoftext|>", "</s>", "<extra_id_0>", "a\0b"])
def test_control_tokens_in_prompts_are_named(kind, token, audit):
    name = "train_prompt" if kind == "pairedit" else "instance_prompt"
    said = "is no text" if "\0" in token else "is a control token"
    assert re.search(f"{name}: .* {said}", audit(kind, **{name: f"a {token} photo"}))


@pytest.mark.parametrize("kind", TRAINERS)
def test_links_that_lead_back_and_names_of_other_systems(kind, audit, world, caplog):
    """A loop is walked once; a name that is no UTF-8 is named, other pictures are, too."""
    for side in ("before", "after"):
        (world / "pairs" / side / "up").symlink_to("..")
        (world / "pairs" / side / "again").symlink_to(".")
    (world / "pairs/before/raw.heic").write_bytes(b"")
    assert audit(kind) == "" and "raw.heic is left out" in caplog.text
    (world / "pairs/before" / os.fsdecode(b"\xff.png")).write_bytes(b"")
    assert "udcff" in audit(kind)


def test_the_same_name_in_two_unicode_forms_is_one(audit, world):
    for side, form in (("before", "NFD"), ("after", "NFC")):
        for old in sorted((world / "pairs" / side).glob("b.*")):
            old.rename(old.with_name(unicodedata.normalize(form, f"café{old.suffix}")))
    assert [audit(kind) for kind in TRAINERS] == [""] * 3


def test_a_picture_called_mask_with_partner_and_caption_is_a_sample(audit, world):
    pairs = world / "pairs"
    for side in ("before", "after"):
        (pairs / side / "c.png").rename(pairs / side / "b_mask.png")
    (pairs / "after/c.txt").rename(pairs / "after/b_mask.txt")
    assert audit("qwen") == ""
    names = json.loads((world / "out/audit.json").read_text())["samples"]
    assert names == 3
    (pairs / "after/b_mask.txt").unlink()  # a pair without a caption, or two masks?
    assert "b_mask.png is a pair without a caption, or two masks" in audit("qwen")


@pytest.mark.parametrize("kind", TRAINERS)
def test_nothing_to_learn_is_named(kind, audit, world):
    shutil.copy(world / "pairs/before/b.png", world / "pairs/after/b.png")
    text = audit(kind)
    assert text.count("the same picture") == 1 and "after/b.png" in text


# -- places


PLACES = {"qwen": ("logging.output_dir", "cache.cache_dir"), "sd": ("output_dir", "cache_dir")}
PLACES["pairedit"] = ("output_folder", "cache_dir")


@pytest.mark.parametrize("kind", TRAINERS)
def test_places_that_hold_each_other_are_refused(kind, audit, world):
    output, cache = PLACES[kind]
    for name in (output, cache):
        for place in ("pairs/before", "pairs/before/x", "pairs/after/../after"):
            assert f"{name}: " in audit(kind, **{name: world / place}), place
        assert f"{name}: '' is no place" in audit(kind, **{name: ""})
        (world / "file").write_text("mine")
        assert "is a file" in audit(kind, **{name: world / "file"})
        assert (world / "file").read_text() == "mine"
    same = {output: world / "same", cache: world / "same"}
    assert "lie in one another" in audit(kind, **same)


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_tilde_is_the_home(kind, audit, world, monkeypatch):
    monkeypatch.setenv("HOME", str(world / "home"))
    monkeypatch.chdir(world)
    output, cache = PLACES[kind]
    assert audit(kind, **{output: "~/out", cache: "~/cache"}) == ""
    assert (world / "home/out").is_dir() and not (world / "~").exists()


# -- settings


NUMBERS = {
    "qwen": {"model.lora.r": 10**9, "data.num_workers": 10**6, "train.max_train_steps": 10**30},
    "pairedit": {"rank": 10**9, "resolution": 2**30, "train_iteration": "9" * 5000},
    "sd": {"lora_rank": 10**9, "num_class_images": 10**12, "resolution": 64 * 10**6},
}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in NUMBERS.items() for name in names]
)
def test_absurd_numbers_are_refused(kind, name, audit):
    text = audit(kind, **{name: NUMBERS[kind][name]})
    assert f"{name}: " in text and len(text) < 400


CONFIGS = {
    "deep.yaml": ("[" * 5000, "--config"),
    "deep.json": ('{"a":' * 5000, "--config"),
    "binary.yaml": (b"\xff\xfe\0\0", "utf-8"),
    "list.yaml": ("- a\n- b\n", "name: value"),
    "tag.yaml": ("seed: !!python/object/apply:os.system ['touch hacked']\n", "tag"),
    "twice.yaml": ("seed: 1\nseed: 2\n", "duplicate"),
    "huge.yaml": ("# " + "x" * 2**21, "larger than"),
    "number.yaml": ("seed: " + "9" * 5000, "seed"),
}


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_cannot_be_read_is_named(name, kind, tmp_path, monkeypatch):
    text, said = CONFIGS[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=said) as error:
        load_config(TRAINERS[kind].Config, ["--config", str(tmp_path / name)])
    assert len(str(error.value)) < 1500 and not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_config_that_is_a_pipe_or_a_folder_is_named(kind, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "", "none.yaml"):
        with pytest.raises(UserError, match="--config"):
            load_config(TRAINERS[kind].Config, ["--config", str(tmp_path / name)])


@pytest.mark.parametrize("argv", [["--=3"], ["x"], ["--seed", "1", "2"], ["--seed", "1.5"]])
def test_flags_that_mean_nothing_are_named(argv):
    for script in TRAINERS.values():
        with pytest.raises(UserError, match=r"--|seed|unknown setting"):
            load_config(script.Config, argv)


@pytest.mark.parametrize("pattern", [r"([\w.]+)+!", "(a|a)*$x", "(", "(.*)*Z"])
def test_an_expression_without_an_end_is_named(pattern, audit):
    text = audit("qwen", **{"model.lora.target_modules": pattern})
    assert "model.lora.target_modules" in text or text == ""


# -- the base model


DAMAGES = {
    "no folder": shutil.rmtree,
    "an empty folder": lambda p: [f.unlink() for f in p.iterdir()],
    "a file": lambda p: (shutil.rmtree(p), p.write_text("x")),
    "no config": lambda p: [f.unlink() for f in p.glob("*config.json")],
    "a config that is a list": lambda p: [f.write_text("[]") for f in p.glob("*config.json")],
    "a config that is cut": lambda p: [f.write_text('{"a"') for f in p.glob("*config.json")],
    "a config in UTF-16": lambda p: [
        f.write_text(f.read_text(), encoding="utf-16") for f in p.glob("*.json")
    ],
    "cut weights": lambda p: [f.write_bytes(f.read_bytes()[:-9]) for f in p.glob("*.safetensors")],
    "no weights": lambda p: [f.unlink() for f in p.glob("*.safetensors")],
    "weights of a half precision": lambda p: [
        f.rename(f.with_suffix(".fp16.safetensors")) for f in p.glob("*.safetensors")
    ],
    "a pickle": lambda p: [f.rename(f.with_suffix(".bin")) for f in p.glob("*.safetensors")],
}
MODEL = dict.fromkeys(TRAINERS, "pretrained_model_name_or_path")
MODEL["qwen"] = f"model.{MODEL['qwen']}"
SOFT = ("scheduler", "tokenizer", "tokenizer_2", "processor")  # parts without weights
BASES = {
    "qwen": ("2511", train_qwen_edit.Flavour.parts),
    "pairedit": ("flux", train_pairedit.FLUX_PARTS),
    "sd": ("sd", train_dreambooth_pairs.SD_CLASSES),
}


@pytest.mark.parametrize(
    ("kind", "part"), [(kind, part) for kind, (_, parts) in BASES.items() for part in parts]
)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_of_the_base_is_named(kind, part, damage, audit, world, checkpoints):
    if part in SOFT and ("weights" in damage or "pickle" in damage):
        return
    if part.startswith(("tokenizer", "processor")) and damage == "no config":
        return  # not every tokenizer has one
    base = shutil.copytree(checkpoints[BASES[kind][0]], world / "base")
    DAMAGES[damage](base / part)
    name = (
        "model.pretrained_model_name_or_path" if kind == "qwen" else "pretrained_model_name_or_path"
    )
    text = audit(kind, **{name: base})
    assert re.search(f"{name}.*{part}", text), text


@pytest.mark.parametrize(
    ("kind", "part", "other"),
    [
        ("qwen", "scheduler", "sd"),
        ("qwen", "vae", "sd"),
        ("qwen", "vae", "flux"),
        ("qwen", "text_encoder", "flux"),
        ("qwen", "transformer", "flux"),
        ("pairedit", "scheduler", "sd"),
        ("pairedit", "vae", "2511"),
        ("pairedit", "text_encoder", "2511"),
        ("pairedit", "transformer", "2511"),
        ("sd", "scheduler", "2511"),
        ("sd", "scheduler", "flux"),
        ("sd", "vae", "2511"),
        ("sd", "text_encoder", "2511"),
    ],
)
def test_a_part_of_another_family_is_named(kind, part, other, audit, world, checkpoints):
    base = shutil.copytree(checkpoints[BASES[kind][0]], world / "base")
    shutil.rmtree(base / part)
    shutil.copytree(checkpoints[other] / part, base / part)
    assert re.search(f"{MODEL[kind]}.*{part}", audit(kind, **{MODEL[kind]: base}))


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_checkpoint_in_one_file_says_how_to_make_a_folder(kind, audit, world):
    (world / "model.safetensors").write_bytes(b"x")
    name = (
        "model.pretrained_model_name_or_path" if kind == "qwen" else "pretrained_model_name_or_path"
    )
    assert "from_single_file" in audit(kind, **{name: world / "model.safetensors"})


# -- LoRA files


def drawing(base):
    """The flags of a picture that the base model draws."""
    flags = ["--pretrained_model_name_or_path", base, "--prompt", "x", "--device", "cpu"]
    return [*flags, *(["--image", PAIRS / "coffee0_R.png"] if base.name == "2511" else [])]


@pytest.fixture(scope="session")
def loras(checkpoints, tmp_path_factory):
    """{"2511" | "flux" | "sd": file} as the trainers write them."""
    folder = tmp_path_factory.mktemp("loras")
    files = {"2511": trained(checkpoints, folder)[1]}
    files["flux"] = tiny.save_sliders(checkpoints["flux"], folder / "flux")
    files["sd"] = folder / "sd.safetensors"
    tiny.save_sd_lora(checkpoints["sd"], files["sd"])
    return files


def first(tensors):
    return next(name for name in sorted(tensors) if not name.endswith(".alpha"))


def renamed(change):
    return lambda tensors, told: {change(name): x for name, x in tensors.items()}


def told_of(**more):
    """A change of the metadata; the values are JSON."""
    return lambda tensors, told: told.update({k: json.dumps(v) for k, v in more.items()})


LORAS = {
    "not a number": (lambda t, _: t[first(t)].fill_(math.nan), "1 of .* not finite"),
    "infinite": (lambda t, _: t[first(t)].view(-1)[-1:].fill_(math.inf), "1 of .* not finite"),
    "another byte": (lambda t, told: t[first(t)].view(-1)[:1].add_(1), "checksum"),
    "one factor": (lambda t, told: (t.pop(first(t)), told.clear()), "."),
    "unknown blocks": (
        lambda t, told: (
            t.update({"transformer.nowhere.lora_A.weight": torch.ones(2, 2)}),
            told.clear(),
        ),
        "nowhere",
    ),
    "compiled names": (renamed(lambda name: f"_orig_mod.{name}"), "_orig_mod"),
    "names of LyCORIS": (renamed(lambda name: "lycoris_" + name.replace(".", "_")), "lycoris"),
    "metadata that is a list": (told_of(lora_adapter_metadata=[]), "metadata|mapping"),
    "metadata that is text": (told_of(lora_adapter_metadata="x"), "."),
    "a pattern without an end": (
        told_of(lora_adapter_metadata={"transformer.alpha_pattern": {r"([\w.]+)+!": 2}}),
        "no end|pattern",
    ),
}


@pytest.mark.parametrize("base", ["2511", "flux", "sd"])
@pytest.mark.parametrize("damage", LORAS)
def test_a_lora_that_cannot_be_meant_is_refused_before_a_model_loads(
    damage, base, loras, checkpoints, call_generate, tmp_path
):
    change, said = LORAS[damage]
    tensors = {name: tensor.clone() for name, tensor in load_file(loras[base]).items()}
    with safe_open(loras[base], framework="pt") as file:
        told = file.metadata()
    if damage != "another byte":
        told.pop("crc32")
    changed = change(tensors, told)
    tensors = changed if isinstance(changed, dict) else tensors
    save_file(tensors, tmp_path / "l.safetensors", told)
    command = [
        "--pretrained_model_name_or_path",
        checkpoints[base],
        "--prompt",
        "x",
        "--device",
        "cpu",
    ]
    command += ["--image", PAIRS / "coffee0_R.png"] if base == "2511" else []
    text = call_generate(*command, "--lora", "l.safetensors", "--output", "o.png", check=False)
    assert "l.safetensors" in text and re.search(said, text), text
    assert not (tmp_path / "o.png").exists() and len(text) < 1500


@pytest.mark.parametrize(("base", "other"), [("2511", "flux"), ("flux", "sd"), ("sd", "2511")])
def test_a_lora_of_another_family_is_refused(base, other, loras, checkpoints, call_generate):
    command = [
        "--pretrained_model_name_or_path",
        checkpoints[base],
        "--prompt",
        "x",
        "--device",
        "cpu",
    ]
    command += ["--image", PAIRS / "coffee0_R.png"] if base == "2511" else []
    text = call_generate(*command, "--lora", loras[other], "--output", "o.png", check=False)
    assert str(loras[other]) in text and "nothing was loaded" in text


@pytest.mark.parametrize("base", ["2511", "flux", "sd"])
def test_a_picture_of_somebody_else_is_not_overwritten(base, checkpoints, call_generate, tmp_path):
    ramp = pictures.ramp()
    ramp.save(tmp_path / "o.png")
    before = (tmp_path / "o.png").read_bytes()
    command = [
        "--pretrained_model_name_or_path",
        checkpoints[base],
        "--prompt",
        "x",
        "--device",
        "cpu",
    ]
    command += ["--image", PAIRS / "coffee0_R.png"] if base == "2511" else []
    text = call_generate(*command, "--output", "o.png", check=False)
    assert "o.png is not of generate.py" in text and (tmp_path / "o.png").read_bytes() == before


# -- messages


@pytest.mark.parametrize(
    ("kind", "flags", "said"),
    [
        ("qwen", {"optimizer.init_args": "{lr: fast}"}, "optimizer .*'lr': 'fast'"),
        (
            "qwen",
            {"train.resume_from_checkpoint": "false"},
            "no valid checkpoint .*false.*latest, null",
        ),
        ("sd", {"resume_from_checkpoint": "false"}, "no valid checkpoint .*false.*latest, null"),
        ("pairedit", {"resume_from_checkpoint": "false"}, "resume_from_checkpoint: .*'latest'"),
        ("pairedit", {"learning_rate": "fast"}, "learning_rate: .*number"),
        ("sd", {"learning_rate": "fast"}, "learning_rate: .*number"),
    ],
)
def test_values_that_are_none_are_named(kind, flags, said, audit, world, checkpoints):
    """By the audit, or by the first thing that fit() does."""
    if text := audit(kind, **flags):
        assert re.search(said, text)
        return
    argv = ["--config", str(world / "config.yaml"), *(f"--{n}={v}" for n, v in flags.items())]
    script = TRAINERS[kind]
    trainer = {"qwen": "QwenImageEditTrainer", "sd": "SDTrainer", "pairedit": "PairEditTrainer"}[
        kind
    ]
    with pytest.raises(UserError, match=said):
        getattr(script, trainer)(load_config(script.Config, argv, script.audit)).fit()


@pytest.mark.parametrize("kind", TRAINERS)
def test_wandb_without_a_key_is_named_at_the_start(kind, audit, monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    setting = "logging.report_to" if kind == "qwen" else "report_to"
    assert "wandb has no key" in audit(kind, **{setting: "wandb"})
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert audit(kind, **{setting: "wandb"}) == ""


def test_masks_of_other_names_are_named_with_what_is_there(tmp_path):
    for name in ("out/a.png", "after/a.png", "before/a.png", "masks/a_mask.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(PAIRS / "coffee0_T.png", tmp_path / name)
    argv = [f"--{side}_dir={tmp_path / side}" for side in ("before", "after")]
    argv += [f"--edited_dir={tmp_path / 'out'}", f"--mask_dir={tmp_path / 'masks'}"]
    with pytest.raises(UserError, match=r"no mask of that name \(a\) \(there is: a_mask\)"):
        load_config(evaluate.Config, argv, evaluate.check_comparison)


# -- what a second reading found


def lora_file(place, about=None, **tensors):
    """A LoRA file of one layer, whole but for what is given."""
    name = "transformer.transformer_blocks.0.attn.to_q"
    whole = {"lora_A": torch.ones(2, 64), "lora_B": torch.ones(64, 2), **tensors}
    told = {"lora_adapter_metadata": json.dumps(about)} if about else None
    tensors = {f"{name}.{end}.weight": t for end, t in whole.items() if t is not None}
    save_file(tensors, place / "lora.safetensors", told)
    return place / "lora.safetensors"


WRONG_LORAS = {
    "one dimension": ({"lora_A": torch.ones(64)}, None, "no factor"),
    "no rank": ({"lora_A": torch.ones(0, 64), "lora_B": torch.ones(64, 0)}, None, "no factor"),
    "whole numbers": ({"lora_A": torch.ones(2, 64, dtype=torch.int32)}, None, "int32"),
    "huge": ({"lora_A": torch.full((2, 64), 1e30)}, None, "beyond"),
    "another rank": ({}, {"transformer.r": 99}, "r in its metadata is 99; its factors have 2"),
    "a text for alpha": ({}, {"transformer.lora_alpha": "x"}, "wanted a number"),
    "huge alpha": ({}, {"transformer.lora_alpha": 1e30}, "wanted a number"),
    "dora without magnitudes": ({}, {"transformer.use_dora": True}, "no magnitudes"),
}


@pytest.mark.parametrize("name", WRONG_LORAS)
def test_factors_and_settings_that_are_none_are_named(name, tmp_path):
    tensors, about, said = WRONG_LORAS[name]
    [problem] = utils.check_setup(loras=[lora_file(tmp_path, about, **tensors)])
    assert said in problem and "lora.safetensors" in problem


def test_a_lora_to_start_from_must_have_its_strength_folded_in(audit, world):
    for about in (
        {"transformer.r": 2, "transformer.lora_alpha": 4},
        {"transformer.use_rslora": True},
    ):
        file = lora_file(world, about)
        assert "strength" in audit("qwen", **{"model.lora.pretrained_weight": file})


def linear_srgb():
    """sRGB's colours without its curves, under its own name."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for tag in (b"rTRC", b"gTRC", b"bTRC"):
        at = data.index(tag)
        offset = int.from_bytes(data[at + 4 : at + 8], "big")
        data[offset : offset + 12] = b"curv" + bytes(8)  # no entry: the identity
    return bytes(data)


def test_a_profile_is_known_by_what_it_does_not_by_its_name(tmp_path):
    grey = Image.new("RGB", (32, 32), (50, 50, 50))
    grey.save(tmp_path / "linear.png", icc_profile=linear_srgb())
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey.save(tmp_path / "own.png", icc_profile=own)
    seen = {
        n: np.asarray(utils.open_rgb(tmp_path / f"{n}.png"))[0, 0, 0] for n in ("linear", "own")
    }
    assert abs(int(seen["linear"]) - 122) <= 1 and seen["own"] == 50


TABLES = {
    "two lists": ({"references": ["a.png"], "reference_1": "b.png"}, "leave one"),
    "one number twice": ({"reference_1": "a.png", "reference_01": "b.png"}, "twice"),
    "two prompts": ({"reference_1": "a.png", "prompt": "x", "caption": "y"}, "prompt and caption"),
    "a prompt that is none": ({"reference_1": "a.png", "prompt": {"a": 1}}, "is no text"),
}


@pytest.mark.parametrize("name", TABLES)
def test_cells_that_would_be_dropped_are_named(name, world):
    row, said = TABLES[name]
    folder = world / "pairs/after"
    (folder / "t.jsonl").write_text(json.dumps({"target": "a.png", "prompt": "x", **row}))
    found = utils.load_tool("pair_rows").read_table(folder / "t.jsonl", folder)
    assert not found.pairs and said in found.broken[0]


CSV = {
    "a;b.csv": ("target;reference_1;prompt\na.png;b.png;x\n", "commas are wanted"),
    "twice.csv": ("target,reference_1,prompt,prompt\na.png,b.png,x,y\n", "two columns"),
    "utf16.csv": ("target,reference_1,prompt\n".encode("utf-16"), "CSV UTF-8"),
    "table.xlsx": (b"PK\3\4", "ends in .csv"),
    "upper.CSV": ("sep=,\r\ntarget, reference_1, prompt\r\na.png, b.png, x\r\n", None),
}


@pytest.mark.parametrize("name", CSV)
def test_what_spreadsheets_write_is_read_or_named(name, world):
    text, said = CSV[name]
    folder = world / "pairs/after"
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    found = utils.load_tool("pair_rows").read_table(folder / name, folder)
    assert said in found.problems[0] if said else found.pairs[0].prompts == ["x"]


LAUNCHER = {
    "left over": ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "launcher"),
    "no number": ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc"),
    "a device": ({"ACCELERATE_TORCH_DEVICE": "cuda:7", "ACCELERATE_DEBUG_MODE": "maybe"}, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHER)
def test_what_a_launcher_left_is_named_or_has_no_effect(name, world, audit):
    env, said = LAUNCHER[name]
    assert audit("qwen") == ""
    flags = ["--config", world / "config.yaml", "--train.max_train_steps=1"]
    done = run(ROOT / "train_qwen_edit.py", *flags, env=env, check=False)
    assert done.returncode == (2 if said else 0), done.stderr
    assert "Traceback" not in done.stderr and (said or "") in done.stderr


@pytest.mark.slow
def test_what_an_earlier_run_or_a_person_left_is_moved_aside(world, audit):
    assert audit("qwen") == ""
    out = world / "out"
    flags = ["--config", world / "config.yaml", "--train.max_train_steps=1"]
    (out / "README.md").write_text("mine")
    for seed in (1, 2):
        run(ROOT / "train_qwen_edit.py", *flags, f"--seed={seed}")
    assert (out / "earlier-1/README.md").read_text() == "mine"
    earlier = json.loads((out / "earlier-2/run.json").read_text())
    assert earlier["config"]["seed"] == 1
    assert json.loads((out / "run.json").read_text())["config"]["seed"] == 2


def test_pipes_where_results_or_records_go_are_named(world, audit):
    os.mkfifo(world / "cache.jsonl")
    (world / "cache").mkdir(exist_ok=True)
    os.mkfifo(world / "cache/index.jsonl")
    for kind in TRAINERS:
        assert "index.jsonl is no file" in audit(kind)
    os.mkfifo(world / "o.png")
    assert generate.read_settings(world / "o.png") == {}


def test_scripts_that_do_not_import_are_named(tmp_path):
    (tmp_path / "fork.py").write_text("def f(:\n")
    with pytest.raises(UserError, match=r"script .*fork\.py: invalid syntax"):
        utils.load_script(tmp_path / "fork.py")


def test_masks_that_train_nothing_are_named(world, audit):
    (world / "masks").mkdir()
    for name in "abc":
        Image.new("L", (64, 32), 1).save(world / f"masks/{name}.png")
    flags = {"loss.mask": "file", "data.dataset_configs.0.mask_dir": world / "masks"}
    assert "a.png has no white (255)" in audit("qwen", **flags)  # 0 and 1
    for name in "abc":
        Image.new("L", (64, 32), 0).save(world / f"masks/{name}.png")
    assert audit("qwen", **flags) == ""  # its background is trained
    flags["loss.background_weight"] = 0
    assert "a.png has no white (255)" in audit("qwen", **flags)


@pytest.mark.parametrize("lr", ["0", "true", "-1", "fast"])
def test_learning_rates_that_are_none_are_named(lr):
    settings = train_qwen_edit.OptimizerConfig.model_validate({"init_args": {"lr": lr}})
    with pytest.raises(UserError, match="lr"):
        train_qwen_edit.make_optimizer(settings, [torch.nn.Parameter(torch.zeros(2))])


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam"])
def test_optimizers_that_the_loop_cannot_drive_are_named(name, audit):
    assert f"torch.optim.{name} wants" in audit(
        "qwen", **{"optimizer.class_path": f"torch.optim.{name}"}
    )


def test_layers_that_nothing_reads_are_no_targets(audit, make_trainer):
    trainer = make_trainer(**{"model.lora.target_modules": "transformer_blocks.1.attn.add_q_proj"})
    with pytest.raises(UserError, match="no layer matches"):
        trainer.preflight()


def test_a_page_of_somebody_else_stays(tmp_path):
    page = utils.load_tool("page")
    page.write_page(tmp_path / "a.html", "a", [])
    page.write_page(tmp_path / "a.html", "b", [])
    (tmp_path / "b.html").write_text("<!doctype html>\n<html>mine</html>")
    with pytest.raises(UserError, match=r"b\.html is no page of this tool"):
        page.write_page(tmp_path / "b.html", "b", [])


def test_names_that_no_file_can_have_are_named_in_a_table_of_edits(tmp_path):
    (tmp_path / "t.csv").write_text(f"image,prompt\n{'a' * 300},x\n")
    rows, problems = generate.read_jobs(tmp_path / "t.csv")
    assert not rows and "row 1" in problems[0] and "too long" in problems[0]


def test_another_dtype_of_the_same_bits_is_damage(tmp_path):
    ones = {"a": torch.ones(2, 3)}
    bits = {"a": ones["a"].view(torch.int32)}
    assert utils.checksum(ones) != utils.checksum(bits)


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        (train_qwen_edit.Config, "logging.output_dir"),
        (train_qwen_edit.Config, "config"),
        (train_qwen_edit.Config, "data.dataset_configs.0.reference_dirs"),
        (train_pairedit.Config, "output_folder"),
        (train_dreambooth_pairs.Config, "output_dir"),
        (generate.EditConfig, "output_dir"),
    ],
)
@pytest.mark.parametrize("text", ["~nobody-of-that-name/x", ""])
def test_the_home_of_nobody_is_named(kind, setting, text):
    value = f"[{text!r}]" if setting.endswith("dirs") else text
    with pytest.raises(UserError, match=r"is no place|no file named"):
        load_config(kind, [f"--{setting}={value}"])
