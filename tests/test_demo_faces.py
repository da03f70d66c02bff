"""demo/rebuild.py: faces, how they are measured, the two base models that draw them."""

import json

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import demo
from utils import load_script

rebuild = load_script(ROOT / "demo/rebuild.py")
KINDS = {"flux": demo.FLUX_BASE_DIR, "sd": demo.SD_BASE_DIR}
SIDE = rebuild.FACE_PX
PAIRS = [
    (demo.FACE_PAIRS_DIR / "age", rebuild.PAIR_AGES, 3),
    (demo.HAIR_PAIRS_DIR, rebuild.HAIR_AGES, 10),
]


@pytest.fixture(scope="module")
def bases():
    """{"flux", "sd": pipeline} as they ship."""
    found = {
        "flux": diffusers.FluxPipeline.from_pretrained(
            ROOT / demo.FLUX_BASE_DIR, dtype=torch.float32
        ),
        "sd": diffusers.StableDiffusionPipeline.from_pretrained(
            ROOT / demo.SD_BASE_DIR, dtype=torch.float32, safety_checker=None
        ),
    }
    found["sd"].scheduler = diffusers.DDIMScheduler.from_config(found["sd"].scheduler.config)
    for pipeline in found.values():
        pipeline.set_progress_bar_config(disable=True)
    return found


def faces(count=50, seed=5):
    rng = np.random.RandomState(seed)
    return [rebuild.random_face(rng) for _ in range(count)]


def age_of(picture):
    return rebuild.face_age(picture, rebuild.from_centre(picture))


def looks_like_a_face(picture):
    """Red below the middle, dark pupils, a cheek between them that is not dark."""
    x, y = rebuild.from_centre(picture)
    mouth, cheek = (picture[np.hypot(x, y - below) < 1].mean(0) for below in (7.3, 5.4))
    eyes = (abs(abs(x) - 3.6) < 2) & (abs(y - 1.4) < 2)
    red = mouth[0] - mouth[1:].max() > 0.3
    return red and cheek.max() > 0.5 and picture[eyes].max(1).min() < 0.35


# --- drawn and measured ---------------------------------------------------------------------------


def test_a_drawn_face_is_measured_as_it_was_drawn():
    for face in faces():
        picture = rebuild.draw_face(face)
        assert picture.shape == (SIDE, SIDE, 3) and 0 <= picture.min() < picture.max() <= 1
        x, y = rebuild.from_centre(picture)
        assert x[0, 0] == pytest.approx(16 / SIDE - face.x, abs=0.2)
        assert y[0, 0] == pytest.approx(16 / SIDE - face.y, abs=0.2)
        assert rebuild.face_age(picture, (x, y)) == pytest.approx(face.age, abs=0.02)
        assert looks_like_a_face(picture)


def test_age_is_no_change_of_content_and_all_else_is():
    for face in faces():
        young, old = (rebuild.draw_face(face._replace(age=age)) for age in (0.1, 0.9))
        assert rebuild.content_change(young, old, rebuild.from_centre(young)) == 0
        assert np.abs(young - old).max() > 0.5
    one, other = faces(2)
    before = rebuild.draw_face(one)
    for field in ("background", "clothes", "skin", "x", "y", "width", "eye", "mouth"):
        changed = rebuild.draw_face(one._replace(**{field: getattr(other, field)}))
        change = rebuild.content_change(before, changed, rebuild.from_centre(before))
        assert change > 2e-4, field


@pytest.mark.parametrize(("folder", "ages", "count"), PAIRS)
def test_the_pairs_differ_in_age_only(folder, ages, count):
    sides = [sorted((ROOT / folder / stage).glob("*.png")) for stage in ages]
    pairs = list(zip(*sides, strict=True))
    assert len(pairs) == count
    for files in pairs:
        before, after = (np.asarray(Image.open(file), float) / 255 for file in files)
        place = rebuild.from_centre(before)
        measured = [rebuild.face_age(picture, place) for picture in (before, after)]
        assert measured == pytest.approx([*ages.values()], abs=0.02)
        assert rebuild.content_change(before, after, place) == 0


def test_the_pairs_are_what_rebuild_draws(tmp_path):
    rebuild.draw_face_pairs(tmp_path / "age", 1, 3, rebuild.PAIR_AGES)
    rebuild.draw_face_pairs(tmp_path / "hair", 1, 10, rebuild.HAIR_AGES)
    for made, (folder, _, count) in zip(("age", "hair"), PAIRS, strict=True):
        files = sorted((tmp_path / made).rglob("*.png"))
        assert len(files) == 2 * count
        for file in files:
            shipped = ROOT / folder / file.relative_to(tmp_path / made)
            assert np.array_equal(Image.open(file), Image.open(shipped))


# --- the base models ------------------------------------------------------------------------------


def test_the_words_of_the_prompts_are_whole_tokens():
    tokenizer = rebuild.build_clip_tokenizer(rebuild.age_words())
    assert tokenizer.tokenize("picture of an old person") == [
        f"{word}</w>" for word in ("picture", "of", "an", "old", "person")
    ]
    assert tokenizer.tokenize("cat") == ["c", "a", "t</w>"]


def test_the_bases_are_small_and_of_the_published_types(bases):
    for kind, most in (("flux", 4e6), ("sd", 5e6)):
        files = [file for file in (ROOT / KINDS[kind]).rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) <= most
    flux, sd = bases.values()
    assert type(flux.transformer) is diffusers.FluxTransformer2DModel
    assert flux.transformer.config.guidance_embeds and flux.transformer.config.in_channels == 64
    assert type(flux.vae) is diffusers.AutoencoderKL and flux.vae_scale_factor == 4
    published = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256}
    assert published.items() <= dict(flux.scheduler.config).items()
    index = json.loads((ROOT / demo.SD_BASE_DIR / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["scheduler"] == ["diffusers", "PNDMScheduler"]
    assert index["safety_checker"] == [None, None]
    assert sd.vae_scale_factor == 4 and sd.unet.config.in_channels == 4
    published = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "set_alpha_to_one": False, "steps_offset": 1, "num_train_timesteps": 1000,
    }  # fmt: skip
    assert published.items() <= dict(sd.scheduler.config).items()
    assert sd.scheduler.config.prediction_type == "epsilon"


@pytest.mark.parametrize(("kind", "least_db"), [("flux", 33), ("sd", 38)])
def test_the_autoencoders_keep_the_pictures(kind, least_db, bases):
    vae = bases[kind].vae
    pictures = [rebuild.draw_face(face).astype(np.float32) for face in faces()]
    pixels = rebuild.stack_pixels(pictures) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode()
        error = (vae.decode(latents).sample.clamp(-1, 1) - pixels).square().mean()
    assert 10 * np.log10(4 / error.item()) > least_db
    assert (latents * vae.config.scaling_factor).std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("kind", "prompts", "how", "older", "spread"),
    [
        (
            "flux",
            ("image of a person", *rebuild.AGE_PROMPTS[-2:]),
            {"num_inference_steps": 28, "guidance_scale": 3.5, "max_sequence_length": 16},
            0.15,
            0.07,
        ),
        (
            "sd",
            rebuild.AGE_PROMPTS[-3:],
            {"num_inference_steps": 25, "guidance_scale": 1.0},
            0.1,
            0.07,
        ),
    ],
)
def test_the_bases_draw_whole_faces_and_hear_their_age(kind, prompts, how, older, spread, bases):
    drawn = []
    for prompt in prompts:
        generator = [torch.Generator().manual_seed(seed) for seed in range(16)]
        size = {"width": SIDE, "height": SIDE}
        kwargs = {**how, **size, "generator": generator, "output_type": "np"}
        drawn.append(bases[kind](prompt=[prompt] * 16, **kwargs).images)
    ages, young, old = (np.array([age_of(picture) for picture in its]) for its in drawn)
    assert 0.25 < ages.mean() < 0.55 and ages.std() > 0.05  # room for the change both ways
    assert old.mean() - young.mean() > older
    assert (drawn[0][:, 2, 2].std(0) > spread).all()  # backgrounds differ
    assert sum(map(looks_like_a_face, drawn[0])) >= 14
