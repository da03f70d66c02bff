"""demo.py pairedit: what its pictures are, how they are measured, the base model that ships."""

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, run
from PIL import Image

import demo

BASE = ROOT / demo.FLUX_BASE_DIR


@pytest.fixture(scope="module")
def base():
    pipeline = diffusers.FluxPipeline.from_pretrained(BASE, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def faces(count=50, seed=5):
    rng = np.random.RandomState(seed)
    return [demo.random_face(rng) for _ in range(count)]


def ages_of(pictures):
    return np.array([demo.face_age(picture, demo.from_centre(picture)) for picture in pictures])


def test_a_drawn_face_is_measured_as_it_was_drawn():
    for face in faces():
        picture = demo.draw_face(face)
        assert picture.shape == (32, 32, 3) and 0 <= picture.min() < picture.max() <= 1
        x, y = demo.from_centre(picture)
        assert x[0, 0] == pytest.approx(0.5 - face.x, abs=0.2)
        assert y[0, 0] == pytest.approx(0.5 - face.y, abs=0.2)
        assert demo.face_age(picture, (x, y)) == pytest.approx(face.age, abs=0.02)


def test_age_changes_the_hair_and_nothing_else():
    for face in faces():
        young, old = (demo.draw_face(face._replace(age=age)) for age in (0.1, 0.9))
        place = demo.from_centre(young)
        assert demo.content_change(young, old, place) == 0
        assert np.abs(young - old).max() > 0.5


@pytest.mark.parametrize("field", ["background", "skin", "x", "y", "width", "eye", "mouth"])
def test_any_other_change_is_a_change_of_content(field):
    one, other = faces(2)
    changed = one._replace(**{field: getattr(other, field)})
    before, after = demo.draw_face(one), demo.draw_face(changed)
    assert demo.content_change(before, after, demo.from_centre(before)) > 1e-3


def test_the_pairs_differ_in_age_only():
    sources = sorted((ROOT / demo.FACE_PAIRS_DIR / "age" / "source").glob("*.png"))
    assert len(sources) == 3
    for path in sources:
        source, target = (
            demo.to_array(Image.open(path.parents[1] / stage / path.name))
            for stage in ("source", "target")
        )
        place = demo.from_centre(source)
        measured = [demo.face_age(picture, place) for picture in (source, target)]
        assert measured == pytest.approx([*demo.PAIR_AGES.values()], abs=0.02)
        assert demo.content_change(source, target, place) == 0


def test_a_linear_autoencoder_in_the_stock_class_is_the_same():
    torch.manual_seed(0)
    model, std = demo.LinearAutoencoder(width=34, levels=1), torch.rand(16) + 0.5
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    vae = demo.to_flux_vae(model, std, scaling_factor=1.0)
    with torch.no_grad():
        latents = model.encode(pixels)
        stock = vae.encode(pixels).latent_dist.mode()
        torch.testing.assert_close(stock * std.view(-1, 1, 1), latents, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(vae.decode(stock).sample, model(pixels), rtol=1e-3, atol=1e-3)


def test_the_base_is_small_and_of_flux_types(base):
    assert sum(file.stat().st_size for file in BASE.rglob("*") if file.is_file()) <= 4e6
    assert type(base.transformer) is diffusers.FluxTransformer2DModel
    assert base.transformer.config.guidance_embeds and base.transformer.config.in_channels == 64
    assert type(base.vae) is diffusers.AutoencoderKL and base.vae_scale_factor == 2
    published = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256}
    assert published.items() <= dict(base.scheduler.config).items()


def test_the_autoencoder_keeps_the_pictures(base):
    pictures = [demo.draw_face(face) for face in faces()]
    pixels = demo.stack_pixels([picture.astype(np.float32) * 2 - 1 for picture in pictures])
    with torch.no_grad():
        latents = base.vae.encode(pixels).latent_dist.mode()
        decoded = base.vae.decode(latents).sample
    assert 10 * np.log10(4 / (decoded - pixels).square().mean()) > 38  # dB
    assert (latents * base.vae.config.scaling_factor).std() == pytest.approx(1, abs=0.1)


def test_the_base_draws_faces_of_all_kinds_and_hears_their_age(base):
    drawn = {}
    for prompt in ("image of a person", *demo.AGE_PROMPTS[-2:]):
        drawn[prompt] = base(
            prompt=[prompt] * 16,
            width=32,
            height=32,
            num_inference_steps=28,
            guidance_scale=3.5,
            max_sequence_length=demo.TEXT_TOKENS,
            generator=[torch.Generator().manual_seed(seed) for seed in range(16)],
            output_type="np",
        ).images
    pictures, young, old = drawn.values()
    ages = ages_of(pictures)
    assert 0.25 < ages.mean() < 0.55 and ages.std() > 0.08  # room for the slider both ways
    assert ages_of(old).mean() - ages_of(young).mean() > 0.15
    corners = pictures[:, 0, 0]  # (16, 3): backgrounds differ
    assert (corners.std(0) > 0.1).all()
    assert sum(map(looks_like_a_face, pictures)) >= 14


def looks_like_a_face(picture):
    """Red below the middle, no dark cheek, dark eyes."""
    x, y = demo.from_centre(picture)
    mouth, cheek = (picture[np.hypot(x, y - below) < 1.5].mean(0) for below in (7, 3.5))
    eyes = (abs(abs(x) - 4) < 2.5) & (abs(y - 1.5) < 2.5)
    red = mouth[0] - mouth[1:].max() > 0.3
    return red and cheek.max() > 0.75 and picture[eyes].max(1).min() < 0.35


def test_the_demo_moves_the_hair_and_leaves_the_rest(tmp_path):
    """The whole way with the real commands, as a user runs it, in a copy of the project."""
    for name in ("demo", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    run("demo.py", "pairedit", cwd=tmp_path)
    folder = tmp_path / demo.FACE_OUTPUT_DIR
    found = json.loads((folder / "demo.json").read_text())
    ages, one = np.array(found["age_change"]), found["scales"].index(1)
    assert ages[one] >= 0.8 * found["pair_change"]
    assert (np.diff(ages) > 0).all() and ages[0] == 0
    assert found["content_change"][one] < 0.02
    photo = np.array(found["photo"]["age_change"])
    assert photo[one] >= 0.8 * found["pair_change"] and photo[0] == 0
    assert found["photo"]["content_change"][one] < 0.03
    assert Image.open(folder / "demo.png").size == (720, 798)
