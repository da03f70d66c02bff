"""What other trainers of this kind promise and break; each test fails on one of them."""

import gc
import json
import weakref

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import PAIRS, copy_pairs, suffix_dataset, with_lora_noise
from PIL import Image

import train_qwen_edit as script
from utils import FileIndex


def three_references(folder, names=("coffee0", "hubble0"), size=(64, 64)):
    """Pairs with a third reference, every picture of the same aspect."""
    copy_pairs(folder, names)
    rng = np.random.default_rng(0)
    for name in names:
        for end in "RDM":
            noise = rng.integers(0, 255, (*size, 3), np.uint8)
            Image.fromarray(noise).save(folder / f"{name}_{end}.png")
    dataset = suffix_dataset(folder, holdout=[names[1]])
    dataset["image_configs"] |= {"second": {"suffix": "_D"}, "third": {"suffix": "_M"}}
    items = [{"image": role} for role in ("before", "second", "third")]
    dataset["reference_configs"]["before"] = items
    return dataset


def prepared(make_trainer, **changes):
    trainer = make_trainer(**changes)
    trainer.setup_accelerator()
    trainer.find_data()
    trainer.cache_embeddings()
    trainer.set_lora()
    trainer.load_model(["scheduler"])
    with_lora_noise(trainer.transformer)
    return trainer


@pytest.mark.parametrize("changed", ["R", "D", "M"])
def test_each_of_three_references_changes_the_loss_and_the_validation_picture(
    changed, make_trainer, tmp_path
):
    dataset = three_references(tmp_path / "data")
    changes = {"data.dataset_configs": [dataset], "validation.steps": 1}
    changes["validation.num_inference_steps"] = 2

    def look():
        trainer = prepared(make_trainer, **changes)
        batch = script.PairDataset(trainer, True).batch([script.Draw(0, 0)])
        with torch.no_grad():
            loss = trainer.training_step(batch).item()
            (edit,) = trainer.validation_edits()
            picture = trainer._validation_picture(edit, trainer._edit_inputs(edit))
        return loss, picture.tobytes()

    before = look()
    assert look() == before
    for name in ("coffee0", "hubble0"):
        file = tmp_path / "data" / f"{name}_{changed}.png"
        Image.open(file).transpose(Image.Transpose.ROTATE_90).save(file)
    after = look()
    assert after[0] != before[0] and after[1] != before[1]


@pytest.mark.parametrize("size", [(320, 160), (120, 300)])
def test_a_reference_keeps_its_aspect_for_both_encoders(size, tmp_path):
    folder = copy_pairs(tmp_path / "data", ("chelsea0",))
    Image.new("RGB", size).save(folder / "chelsea0_R.png")
    dataset = suffix_dataset(folder)
    dataset["caption_configs"]["text"]["reference_list"] = None
    config = script.Config.model_validate(
        {"data": {"dataset_configs": [dataset]}, "logging": {"output_dir": str(tmp_path / "out")}}
    )
    index = FileIndex(None)
    samples, _ = script.find_samples(config, index)
    script.index_content(script.all_pictures(samples), index)
    flavour = script.Flavour("edit-v3", "", script.VISION_AREA)
    e = script.resolve(config, flavour, samples, script.Draw(0, 0), index)
    for picture, area in ((e.references[0], script.AREA_1MP), (e.vision[0], script.VISION_AREA)):
        w, h = picture.size
        assert w / h == pytest.approx(size[0] / size[1], rel=0.07) and picture.box == (0, 0, 1, 1)
        assert w * h == pytest.approx(area, rel=0.1)


def test_a_step_of_mixed_shapes_is_the_mean_of_its_samples(make_trainer, tmp_path):
    """Loss and gradient; shapes, text lengths and numbers of references differ."""
    folder = copy_pairs(tmp_path / "data", ("coffee0", "hubble0", "chelsea0"))
    Image.new("RGB", (120, 60), "red").save(folder / "coffee0_T.png")
    Image.new("RGB", (120, 60), "blue").save(folder / "coffee0_R.png")
    (folder / "hubble0_D.png").unlink()
    dataset = suffix_dataset(folder, on_missing="allow_fewer")
    dataset["image_configs"]["tones"] = {"suffix": "_D"}
    dataset["reference_configs"]["before"].append({"image": "tones"})
    trainer = prepared(make_trainer, **{"data.dataset_configs": [dataset], "data.batch_size": 3})
    plan = trainer.step_plan()
    (step,) = list(script.StepPlan(trainer.config, trainer.samples, plan.shape_of, 0, 1))
    data = script.PairDataset(trainer, True)
    assert len(step) >= 2 and sum(map(len, step)) == 3

    def backward(groups):
        losses = []
        for draws in groups:
            loss = trainer.training_step(data.batch(draws)) * len(draws) / 3
            loss.backward()
            losses.append(loss.item())
        gradients = [p.grad.clone() for p in trainer.trainable()]
        for p in trainer.trainable():
            p.grad = None
        return sum(losses), gradients

    whole = backward(step)
    alone = backward([[draw] for draws in step for draw in draws])
    assert whole[0] == pytest.approx(alone[0], rel=1e-5)
    for ours, theirs in zip(whole[1], alone[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_training_and_inference_embed_a_pair_alike_bit_for_bit(make_trainer):
    """The cached prompt of a sample = what predict() encodes for its picture and instruction."""
    dataset = suffix_dataset(PAIRS)
    dataset["caption_configs"]["text"]["reference_list"] = None
    trainer = make_trainer(**{"data.dataset_configs": [dataset], "data.reference_area": "1mp"})
    trainer.setup_accelerator()
    trainer.find_data()
    number = next(i for i, s in enumerate(trainer.samples) if s.name == "hubble0")
    example, _ = script.PairDataset(trainer, True).resolved(script.Draw(0, number))
    cached = trainer._embed(example, None)
    seen = []
    original = trainer._embed
    trainer._embed = lambda *a: seen.append(original(*a)) or seen[-1]
    trainer._sample = lambda *a: torch.zeros(1, 16, 1, 8, 8)
    trainer.setup_predict()
    picture = script.open_rgb(trainer.samples[number].variants[0].references[0].path)
    assert picture.width == picture.height  # the bucket's aspect: nothing is cropped
    trainer.predict(picture, example.caption, negative_prompt=None)
    assert torch.equal(seen[0], cached)


@pytest.mark.parametrize("grey", [0, 255])
def test_black_and_white_pictures_are_pictures(grey):
    pixels = script.to_pixels(Image.new("RGB", (8, 8), (grey,) * 3))
    assert (pixels == (1.0 if grey else -1.0)).all()


def test_gradient_checkpointing_keeps_the_text_mask(make_trainer):
    mask = torch.arange(6)[None] < torch.tensor([[6], [2]])
    batch = {
        "pixel_latent": torch.randn(2, 16, 1, 8, 8),
        "control_latent": [torch.randn(2, 16, 1, 8, 8)],
        "prompt_embed": torch.randn(2, 6, 64) * mask[..., None],
        "prompt_embeds_mask": mask,
        "noise": torch.randn(2, 16, 1, 8, 8),
        "sigma": torch.tensor([0.5, 0.2]),
    }
    losses = []
    for on in (True, False):
        trainer = make_trainer(**{"train.gradient_checkpointing": on})
        trainer.set_lora()
        trainer.load_model(["scheduler"])
        with_lora_noise(trainer.transformer)
        losses.append(trainer.training_step(batch).item())
        unmasked = trainer.training_step(batch | {"prompt_embeds_mask": None}).item()
        assert unmasked != losses[-1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_encoders_and_transformer_are_never_in_memory_together(make_trainer, monkeypatch):
    trainer = make_trainer(**{"train.max_train_steps": 1})
    alive, most = weakref.WeakSet(), []
    original = script.QwenImageEditTrainer.load_model

    def watched(self, *args):
        original(self, *args)
        models = {getattr(self, name) for name in ("vae", "qwen_vl", "transformer")} - {None}
        if models - set(alive):  # a new one was loaded
            alive.update(models)
            del models
            gc.collect()
            most.append(sorted(type(model).__name__ for model in alive))

    monkeypatch.setattr(script.QwenImageEditTrainer, "load_model", watched)
    trainer.fit()
    assert all(len(models) <= 1 for models in most), most
    assert len({tuple(models) for models in most if models}) == 3


def test_a_warm_cache_trains_without_opening_a_picture(make_trainer, monkeypatch):
    trainer = prepared(make_trainer)
    data = script.PairDataset(trainer, True)
    monkeypatch.setattr(PIL.Image, "open", lambda *a, **k: pytest.fail("a picture was opened"))
    for step in trainer.step_plan():
        for draws in step:
            assert torch.isfinite(trainer.training_step(data.batch(draws)))


def test_the_logged_loss_is_the_loss_whatever_the_accumulation(make_trainer, tmp_path):
    logged = []
    for batch_size, accumulate in ((4, 1), (1, 4)):
        changes = {
            "data.batch_size": batch_size,
            "train.gradient_accumulation_steps": accumulate,
            "train.max_train_steps": 2,
            "logging.log_every": 1,
        }
        make_trainer(**changes).fit()
        rows = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
        logged.append([json.loads(row)["loss"] for row in rows])
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("0-10, 50-59", {*range(11), *range(50, 60)}), ("", set()), ("59", {59}),
        ("0-2,7", {0, 1, 2, 7}), ("5-5", None), ("9-3", None), ("a-b", None),
    ],
)  # fmt: skip
def test_ranges_of_blocks(text, blocks):
    if blocks is None:
        with pytest.raises(ValueError, match=r"range|block"):
            script.LoraConfig(exclude_blocks=text)
    else:
        assert script.parse_blocks(script.LoraConfig(exclude_blocks=text).exclude_blocks) == blocks


def test_inference_takes_what_was_trained_most_and_says_so(make_trainer, tmp_path, caplog):
    dataset = suffix_dataset(PAIRS)
    dataset["image_configs"]["tones"] = {"suffix": "_D"}
    items = [{"image": "before", "resize": 96}, {"image": "tones", "resize": 128}]
    dataset["reference_configs"] |= {"other": items}
    base = dataset["batch_configs"][0]
    dataset["batch_configs"] = [base, base | {"reference_config": "other"}]
    trainer = make_trainer(**{"data.dataset_configs": [dataset], "train.max_train_steps": 1})
    trainer.fit()
    rules = trainer.inference_rules()
    assert rules["reference_area"] == ["target", 96 * 96, 128 * 128]
    assert trainer.about_lora()["reference_area"] == "target"
    assert "several reference_area are trained (target, 9216, 16384)" in caplog.text
    assert "several vision_area" not in caplog.text


@pytest.mark.parametrize("memory_mb", [0, 512])
def test_what_is_kept_in_memory_changes_nothing_but_the_reading(
    memory_mb, make_trainer, monkeypatch
):
    trainer = prepared(make_trainer, **{"cache.memory_mb": memory_mb})
    data, reads = script.PairDataset(trainer, True), []
    original = script.read_entry
    monkeypatch.setattr(script, "read_entry", lambda path: reads.append(path) or original(path))
    first, again = (data.batch([script.Draw(v, 3), script.Draw(v, 3)]) for v in (0, 0))
    assert torch.equal(first["pixel_latent"], again["pixel_latent"])
    assert torch.equal(first["prompt_embed"], again["prompt_embed"])
    assert len(reads) == (12 if memory_mb == 0 else 3)  # target, reference, prompt
