"""demo.py dreambooth: its pictures, how they are measured, the base model that ships."""

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, run
from PIL import Image
from test_demo_pairedit import ages_of, faces, looks_like_a_face

import demo

BASE = ROOT / demo.SD_BASE_DIR


@pytest.fixture(scope="module")
def base():
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        BASE, dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_larger_face_is_the_same_face_and_measured_as_it_was_drawn():
    for face in faces():
        picture = demo.draw_face(face, demo.PHOTO_PX)
        assert picture.shape == (64, 64, 3) and 0 <= picture.min() < picture.max() <= 1
        halved = picture.reshape(32, 2, 32, 2, 3).mean((1, 3))
        assert np.abs(halved - demo.draw_face(face)).mean() < 5e-3
        x, y = place = demo.from_centre(picture)
        assert x[0, 0] == pytest.approx(0.25 - face.x, abs=0.2)
        assert y[0, 0] == pytest.approx(0.25 - face.y, abs=0.2)
        assert demo.face_age(picture, place) == pytest.approx(face.age, abs=0.02)


def test_the_pairs_differ_in_age_only():
    befores = sorted((ROOT / demo.HAIR_PAIRS_DIR / "before").glob("*.png"))
    assert len(befores) == 10
    for path in befores:
        before, after = (
            demo.to_array(Image.open(path.parents[1] / stage / path.name))
            for stage in demo.HAIR_AGES
        )
        place = demo.from_centre(before)
        measured = [demo.face_age(picture, place) for picture in (before, after)]
        assert measured == pytest.approx([*demo.HAIR_AGES.values()], abs=0.02)
        assert demo.content_change(before, after, place) == 0


def test_rank_correlation_is_spearmans():
    assert demo.rank_correlation([-1, 0, 2, 9], [-0.3, 0.1, 0.2, 0.21]) == pytest.approx(1)
    assert demo.rank_correlation([-1, 0, 2, 9], [0.9, 0.1, 0.02, 0]) == pytest.approx(-1)
    assert demo.rank_correlation([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)


def test_the_words_of_the_prompts_are_whole_tokens():
    tokenizer = demo.build_clip_tokenizer(demo.age_words())
    assert tokenizer.tokenize("picture of an old person") == [
        f"{word}</w>" for word in ("picture", "of", "an", "old", "person")
    ]
    assert tokenizer.tokenize("cat") == ["c", "a", "t</w>"]


def test_the_base_is_small_and_of_stable_diffusion_types(base):
    assert sum(file.stat().st_size for file in BASE.rglob("*") if file.is_file()) <= 5e6
    index = json.loads((BASE / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["scheduler"] == ["diffusers", "PNDMScheduler"]
    assert index["safety_checker"] == [None, None]
    assert base.vae_scale_factor == 4 and base.unet.config.in_channels == 4
    published = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "set_alpha_to_one": False, "steps_offset": 1, "num_train_timesteps": 1000,
    }  # fmt: skip
    assert published.items() <= dict(base.scheduler.config).items()
    assert base.scheduler.config.prediction_type == "epsilon"


def test_the_autoencoder_keeps_the_pictures(base):
    pictures = [demo.draw_face(face, demo.PHOTO_PX) for face in faces()]
    decoded = [demo.reconstruct(base.vae, picture) for picture in pictures]
    assert demo.psnr_db(decoded, pictures) > 34
    pixels = demo.stack_pixels([picture.astype(np.float32) * 2 - 1 for picture in pictures])
    with torch.no_grad():
        latents = base.vae.encode(pixels).latent_dist.mode()
    assert (latents * base.vae.config.scaling_factor).std() == pytest.approx(1, abs=0.1)


def test_the_base_draws_whole_faces_and_hears_their_age(base):
    drawn = {}
    for prompt in demo.AGE_PROMPTS[-3:]:
        drawn[prompt] = base(
            prompt=[prompt] * 16,
            width=demo.PHOTO_PX,
            height=demo.PHOTO_PX,
            num_inference_steps=25,
            guidance_scale=1.0,
            generator=[torch.Generator().manual_seed(seed) for seed in range(16)],
            output_type="np",
        ).images
    pictures, young, old = drawn.values()
    ages = ages_of(pictures)
    assert 0.25 < ages.mean() < 0.55 and ages.std() > 0.05  # room for the change both ways
    assert ages_of(old).mean() - ages_of(young).mean() > 0.1
    corners = pictures[:, 2, 2]  # (16, 3): backgrounds differ
    assert (corners.std(0) > 0.07).all()
    assert sum(map(looks_like_a_face, pictures)) >= 14


def test_the_demo_moves_the_hair_on_new_faces_and_on_photos(tmp_path):
    """The whole way with the real commands, as a user runs it, in a copy of the project."""
    for name in ("demo", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    run("demo.py", "dreambooth", cwd=tmp_path, timeout=1200)
    folder = tmp_path / demo.HAIR_OUTPUT_DIR
    found = json.loads((folder / "demo.json").read_text())
    change, after_only, photos = (found[name] for name in ("lora", "after_only", "photos"))
    assert found["rank_correlation"] == pytest.approx(1)
    assert change["scale_0_is_base"] and after_only["scale_0_is_base"]
    assert change["age_change"][-1] >= 0.5 * found["pair_change"]
    assert 0 < found["content_ratio"] < 1 / 3  # of after-only training, at equal change of hair
    assert after_only["age_change"][1] < change["age_change"][-1]
    assert photos["mse_scale_1"] <= photos["mse_before"] / 2
    assert photos["mse_scale_1"] < photos["mse_scale_0.5"] < photos["mse_scale_0"]
    assert photos["scale_0_psnr_db"] >= 40
    assert (folder / "demo.png").exists()
