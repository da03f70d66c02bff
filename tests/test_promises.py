"""What other trainers of this kind promise and break; each test fails on one of them."""

import json

import numpy as np
import pytest
import torch
from conftest import PAIRS, copy_pairs, suffix_dataset, with_lora_noise
from PIL import Image

import train_qwen_edit as script


def prepared(make_trainer, **changes):
    trainer = make_trainer(**changes)
    trainer.setup_accelerator()
    trainer.find_data()
    trainer.cache_embeddings()
    trainer.set_lora()
    with_lora_noise(trainer.transformer)
    return trainer


def test_each_of_three_references_changes_the_loss_and_the_validation_picture(
    make_trainer, tmp_path
):
    names, rng = ("coffee0", "hubble0"), np.random.default_rng(0)
    folder = copy_pairs(tmp_path / "data", names)
    for file in (folder / f"{name}_{end}.png" for name in names for end in "RDM"):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(file)
    dataset = suffix_dataset(folder, holdout=["hubble0"])
    dataset["image_configs"] |= {"second": {"suffix": "_D"}, "third": {"suffix": "_M"}}
    items = [{"image": role} for role in ("before", "second", "third")]
    dataset["reference_configs"]["before"] = items
    changes = {"data.dataset_configs": [dataset], "validation.steps": 1}
    changes["validation.num_inference_steps"] = 2

    def look():
        trainer = prepared(make_trainer, **changes)
        with torch.no_grad():
            loss = trainer.training_step(trainer.data.batch([script.Draw(0, 0)])).item()
        [(example, _)] = script.validation_edits(trainer)
        [picture] = script.draw_edits(trainer, [example])
        return loss, picture.tobytes()

    before = look()
    assert look() == before
    for end in "RDM":
        for name in names:
            file = folder / f"{name}_{end}.png"
            Image.open(file).transpose(Image.Transpose.ROTATE_90).save(file)
        after = look()
        assert after[0] != before[0] and after[1] != before[1]
        before = after


@pytest.mark.parametrize("size", [(320, 160), (120, 300)])
def test_a_reference_keeps_its_aspect_for_both_encoders(size, make_trainer, tmp_path):
    folder = copy_pairs(tmp_path / "data", ("chelsea0",))
    Image.new("RGB", size).save(folder / "chelsea0_R.png")
    dataset = suffix_dataset(folder)
    dataset["caption_configs"]["text"]["reference_list"] = None
    changes = {"data.dataset_configs": [dataset], "data.reference_area": "1mp"}
    trainer = make_trainer(**changes)
    trainer.setup_accelerator()
    trainer.find_data()
    shown = trainer.data.resolve(script.Draw(0, 0)).pictures
    for kind, area in (("control", script.AREA_1MP), ("vision", script.VISION_AREA)):
        (w, h), box = shown[kind][0].size, shown[kind][0].box
        assert w / h == pytest.approx(size[0] / size[1], rel=0.07) and box == (0, 0, 1, 1)
        assert w * h == pytest.approx(area, rel=0.1)


def test_a_step_of_mixed_shapes_is_the_mean_of_its_samples(make_trainer, tmp_path):
    """Loss and gradient; shapes, text lengths and numbers of references differ."""
    folder = copy_pairs(tmp_path / "data", ("coffee0", "hubble0", "chelsea0"))
    for end, colour in (("T", "red"), ("R", "blue"), ("D", "green")):
        Image.new("RGB", (120, 60), colour).save(folder / f"coffee0_{end}.png")
    one, both = copy_pairs(tmp_path / "one", ("hubble1",)), suffix_dataset(folder)
    both["image_configs"]["tones"] = {"suffix": "_D"}
    both["reference_configs"]["before"].append({"image": "tones"})
    changes = {"data.dataset_configs": [both, suffix_dataset(one)], "data.batch_size": 4}
    trainer = prepared(make_trainer, **changes)
    step = next(iter(trainer.step_plan()))
    assert len(step) >= 3 and sum(map(len, step)) == 4

    def backward(groups):
        losses = []
        for draws in groups:
            loss = trainer.training_step(trainer.data.batch(draws)) * len(draws) / 4
            loss.backward()
            losses.append(loss.item())
        gradients = [p.grad.clone() for p in trainer.trainable()]
        trainer.transformer.zero_grad()
        return sum(losses), gradients

    whole = backward(step)
    alone = backward([[draw] for draws in step for draw in draws])
    assert whole[0] == pytest.approx(alone[0], rel=1e-5)
    for ours, theirs in zip(whole[1], alone[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["2508", "2509", "2511"])
def test_cached_and_uncached_training_lose_the_same_bit_for_bit(kind, make_trainer):
    dataset = suffix_dataset(PAIRS, views=2, view_scale=0.6)
    changes = {"data.dataset_configs": [dataset], "data.caption_dropout_rate": 0.5}
    if kind == "2508":
        dataset["caption_configs"]["text"]["reference_list"] = None
    losses = {}
    for cached in (True, False):
        trainer = make_trainer(kind, **changes, **{"cache.use_cache": cached})
        trainer.setup_accelerator()
        trainer.find_data()
        if cached:
            trainer.cache_embeddings()
        trainer.set_lora()
        loader = iter(trainer.train_dataloader())
        with torch.no_grad():
            batches = [batch for _ in range(4) for batch in next(loader)]
            losses[cached] = [trainer.training_step(batch).item() for batch in batches]
    assert losses[True] == losses[False] and len(set(losses[True])) > 3


@pytest.mark.parametrize(("grey", "expected"), [(0, -1.0), (255, 1.0)])
def test_black_and_white_pictures_are_pictures(grey, expected, make_trainer, monkeypatch):
    """The VAE sees -1 and 1."""
    trainer, seen = make_trainer(), []
    trainer.load_model(["vae"])
    encode = trainer.vae.encode
    monkeypatch.setattr(trainer.vae, "encode", lambda pixels: seen.append(pixels) or encode(pixels))
    trainer.encode_image_embedding(Image.new("RGB", (32, 32), (grey,) * 3))
    assert (seen[0] == expected).all() and seen[0].shape == (1, 3, 1, 32, 32)


def test_the_logged_loss_is_the_loss_whatever_the_accumulation(make_trainer, tmp_path):
    logged = []
    for batch_size, accumulate in ((4, 1), (1, 4)):
        changes = {"data.batch_size": batch_size, "train.max_train_steps": 2}
        changes |= {"train.gradient_accumulation_steps": accumulate, "logging.log_every": 1}
        make_trainer(**changes).fit()
        rows = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
        logged.append([json.loads(row)["loss"] for row in rows])
    assert len(logged[0]) == 2 and logged[0] == pytest.approx(logged[1], rel=1e-4)
