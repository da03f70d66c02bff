"""What users really have on their disks: each case is read rightly, or named, and nothing hangs."""

import re
import signal

import numpy as np
import pytest
from bad_inputs import pictures
from conftest import slider_settings, small_config, write_config
from PIL import Image, ImageCms

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
