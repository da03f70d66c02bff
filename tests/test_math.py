"""Formulas of train_qwen_edit.py against closed forms and the diffusers pipelines."""

import dataclasses

import diffusers
import numpy as np
import pytest
import torch
from conftest import PAIRS, copy_pairs, suffix_dataset, with_lora_noise
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus
from PIL import Image
from qwen import ready

import train_qwen_edit as script

QWEN = {"base_image_seq_len": 256, "max_image_seq_len": 8192, "base_shift": 0.5, "max_shift": 0.9}


def test_pack_is_the_pipelines_and_unpack_undoes_it():
    latents = torch.randn(2, 16, 1, 6, 10)
    tokens = script.pack_latents(latents)
    reference = plus.QwenImageEditPlusPipeline._pack_latents(latents, 2, 16, 6, 10)
    assert tokens.shape == (2, 15, 64) and torch.equal(tokens, reference)
    assert torch.equal(script.unpack_latents(tokens, latents), latents)


@pytest.mark.parametrize("tokens", [16, 1872, 4096, 4104, 8192])
def test_the_shift_is_the_pipelines_and_the_schedulers(tokens):
    order = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = plus.calculate_shift(tokens, *(QWEN[name] for name in order))
    assert script.model_mu(QWEN, tokens) == pytest.approx(mu, abs=1e-12)
    assert script.model_mu({}, tokens) == pytest.approx(plus.calculate_shift(tokens), abs=1e-12)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    sigma = torch.linspace(0.01, 0.99, 50)
    expected = scheduler.time_shift(mu, 1.0, sigma)
    torch.testing.assert_close(script.shift_sigma(sigma, mu), expected)


@pytest.mark.parametrize("size", [(320, 213), (3000, 2000), (64, 640), (640, 64), (777, 776)])
def test_sizes_are_the_pipelines(size):
    ratio = size[0] / size[1]
    for area in (script.AREA_1MP, script.VISION_AREA, 768 * 768):
        width, height, *_ = plus.calculate_dimensions(area, ratio)
        assert script.pick_size(area, ratio) == (width, height)
        assert script.pick_size(area, ratio) == tuple(edit.calculate_dimensions(area, ratio)[:2])
    assert (plus.VAE_IMAGE_SIZE, plus.CONDITION_IMAGE_SIZE) == (2**20, 384**2)
    assert (script.AREA_1MP, script.VISION_AREA) == (2**20, 384**2)


def stock(trainer):
    """The diffusers pipeline of the trainer's models."""
    return getattr(diffusers, trainer.flavour.pipeline_class)(
        scheduler=trainer.scheduler,
        vae=trainer.vae,
        text_encoder=trainer.qwen_vl,
        tokenizer=trainer.tokenizer,
        processor=trainer.processor,
        transformer=trainer.transformer,
    )


@pytest.mark.parametrize(
    ("kind", "guidance", "lora", "size"),
    [
        ("2508", 1.0, True, (128, 96)),
        ("2508", 4.0, False, (None, None)),
        ("2509", 4.0, True, (128, 96)),
        ("2511", 1.0, False, (128, 96)),
        ("2511", 4.0, True, (None, None)),
    ],
)
def test_predict_gives_the_pipelines_pixels(kind, guidance, lora, size, make_trainer, monkeypatch):
    """Also where the output's size is left to them; 1 MP is 128^2 px here, 384^2 is 64^2."""
    area = 128 * 128
    monkeypatch.setattr(plus, "VAE_IMAGE_SIZE", area)
    monkeypatch.setattr(plus, "CONDITION_IMAGE_SIZE", 64 * 64)
    for module in (edit, plus):
        sizes = module.calculate_dimensions
        monkeypatch.setattr(
            module,
            "calculate_dimensions",
            lambda a, ratio, sizes=sizes: sizes(area if a == 1024 * 1024 else a, ratio),
        )
    monkeypatch.setattr(script, "AREA_1MP", area)
    trainer = make_trainer(kind, **{"data.reference_area": "1mp"})
    vision = None if kind == "2508" else 64 * 64
    trainer.flavour = dataclasses.replace(trainer.flavour, vision_area=vision)
    trainer.setup_predict()
    if lora:
        trainer.set_lora()
        with_lora_noise(trainer.transformer).eval()
    images = [Image.open(PAIRS / f"{name}_R.png") for name in ("astronaut0", "chelsea1")]
    images = images[0] if kind == "2508" else images
    how = {"num_inference_steps": 3, "width": size[0], "height": size[1]}
    how |= {"true_cfg_scale": guidance, "negative_prompt": "" if guidance > 1 else None}
    ours = trainer.predict(images, "make it blue", seed=3, **how)
    generator = torch.Generator().manual_seed(3)
    theirs = stock(trainer)(image=images, prompt="make it blue", generator=generator, **how)
    assert ours.std() > 5
    np.testing.assert_array_equal(ours, np.asarray(theirs.images[0]))


@pytest.mark.parametrize("kind", ["2508", "2511"])
def test_training_shows_and_embeds_a_pair_as_the_pipeline_does(kind, make_trainer, monkeypatch):
    """The cached prompt of a sample is the pipeline's encode_prompt() of its reference."""
    dataset = suffix_dataset(PAIRS)
    dataset["caption_configs"]["text"]["reference_list"] = None
    trainer = make_trainer(
        kind, **{"data.dataset_configs": [dataset], "data.reference_area": "1mp"}
    )
    trainer.setup_accelerator()
    trainer.find_data()
    number = next(i for i, s in enumerate(trainer.data.samples) if s.name == "hubble0")
    example = trainer.data.resolve(script.Draw(0, number))
    [job] = script.jobs_of(example)["prompt_embed"]
    assert trainer.through_cache(job).equal(trainer.through_cache(job))
    picture = Image.open(example.pictures["vision"][0].source)
    assert picture.width == picture.height  # the bucket's aspect: nothing is cropped
    pipeline = stock(trainer)
    side = 384 if kind == "2511" else 1024
    shown = pipeline.image_processor.resize(picture.convert("RGB"), side, side)
    shown = [shown] if kind == "2511" else shown
    theirs, mask = pipeline.encode_prompt(image=shown, prompt=example.caption, device="cpu")
    assert mask is None  # diffusers drops a mask that hides nothing
    assert torch.equal(trainer.through_cache(job), theirs[0])


def test_stills_in_2d_equal_the_video_vae(checkpoints):
    kind = diffusers.AutoencoderKLQwenImage
    whole = kind.from_pretrained(checkpoints["2511"], subfolder="vae")
    fast = script.encode_stills_in_2d(kind.from_pretrained(checkpoints["2511"], subfolder="vae"))
    for shape in ((1, 3, 1, 64, 96), (1, 3, 5, 64, 64)):  # a clip still takes the 3-D path
        with torch.no_grad():
            pixels = torch.rand(shape) * 2 - 1
            latents, ours = (vae.encode(pixels)[0].mode() for vae in (whole, fast))
            assert latents.shape[1:3] == (16, 1 if shape[2] == 1 else 2)
            torch.testing.assert_close(ours, latents, rtol=0, atol=1e-5)
            pictures = [v.decode(latents, return_dict=False)[0] for v in (whole, fast)]
            torch.testing.assert_close(pictures[1], pictures[0], rtol=0, atol=1e-5)


def cached(lengths, references=((8, 8), (4, 8))):
    """The batch of samples whose texts have these lengths, and a batch of each alone."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def encoded(rows):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "jobs_of", lambda row: row[0])
            batch = script.encoded(rows, lambda tensor: tensor)
        noise, sigma = (torch.stack(parts) for parts in zip(*(row[1] for row in rows), strict=True))
        return batch | {"noise": noise, "sigma": sigma}

    rows = []
    for number, length in enumerate(lengths):
        shown = [normal(16, 1, *size) for size in references]
        embed, latent = normal(length, 64), normal(16, 1, 8, 8)
        item = {"pixel_latent": [latent], "control_latent": shown, "prompt_embed": [embed]}
        rows.append((item, (normal(16, 1, 8, 8), torch.tensor(0.9 - 0.3 * number))))
    return encoded(rows), [encoded([row]) for row in rows]


@pytest.mark.parametrize("kind", ["2509", "2511"])
def test_a_batch_of_n_is_n_batches_of_1(kind, make_trainer):
    """Loss and gradients, where text of other lengths is padded; the mask is why.

    Gradient checkpointing keeps the mask, and every bit.
    """
    whole, alone = cached((5, 9, 12))
    assert whole["prompt_embeds_mask"].sum(1).tolist() == [5, 9, 12]
    assert not whole["prompt_embed"][0, 5:].any()
    found = []
    for again in (False, True):
        trainer = make_trainer(kind, **{"train.gradient_checkpointing": again})
        trainer.set_lora()
        with_lora_noise(trainer.transformer)

        def backward(batches, trainer=trainer):
            losses = [trainer.training_step(dict(batch)) / len(batches) for batch in batches]
            sum(losses).backward()
            gradients = [p.grad.clone() for p in trainer.trainable()]
            trainer.transformer.zero_grad()
            return [sum(losses).detach(), *gradients]

        found.append(backward([whole]))
        for ours, theirs in zip(found[-1], backward(alone), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
        unmasked = backward([whole | {"prompt_embeds_mask": None}])
        assert (unmasked[0] - found[-1][0]).abs() > 1e-4
    assert all(map(torch.equal, *found))


def test_a_step_of_mixed_shapes_is_the_mean_of_its_samples(make_trainer, tmp_path):
    """Loss and gradient; shapes, text lengths and numbers of references differ."""
    folder = copy_pairs(tmp_path / "data", ("coffee0", "hubble0", "chelsea0"))
    for end, colour in (("T", "red"), ("R", "blue"), ("D", "green")):
        Image.new("RGB", (120, 60), colour).save(folder / f"coffee0_{end}.png")
    one, both = copy_pairs(tmp_path / "one", ("hubble1",)), suffix_dataset(folder)
    both["image_configs"]["tones"] = {"suffix": "_D"}
    both["reference_configs"]["before"].append({"image": "tones"})
    changes = {"data.dataset_configs": [both, suffix_dataset(one)], "data.batch_size": 4}
    trainer = ready(make_trainer(**changes))
    step = next(iter(trainer.step_plan()))
    assert len(step) >= 3 and sum(map(len, step)) == 4
    found = []
    for groups in (step, [[draw] for draws in step for draw in draws]):
        batches = [trainer.data.batch(draws) for draws in groups]
        losses = [trainer.training_step(b) * script.batch_size(b) / 4 for b in batches]
        sum(losses).backward()
        found.append([sum(losses).detach(), *(p.grad.clone() for p in trainer.trainable())])
        trainer.transformer.zero_grad()
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    trainer.configure_optimizers()
    names, logged = script.train_step(trainer, [trainer.data.batch(draws) for draws in step])
    norm = torch.stack([gradient.norm() for gradient in found[1][1:]]).norm()
    for value, expected in ((logged["loss"], found[1][0]), (logged["grad_norm"], norm)):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-6)
    assert sorted(names) == ["chelsea0", "coffee0", "hubble0", "hubble1"]


def test_nothing_padded_is_no_mask(make_trainer, monkeypatch):
    """Neither in the batch nor in what attention gets."""
    trainer = make_trainer()
    trainer.set_lora()
    masks, attend = [], torch.nn.functional.scaled_dot_product_attention

    def watched(*args, **how):
        masks.append(how.get("attn_mask") is not None)
        return attend(*args, **how)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    for lengths, masked in (((5, 5), False), ((5, 6), True)):
        batch, _ = cached(lengths)
        assert (batch["prompt_embeds_mask"] is not None) == masked
        masks.clear()
        trainer.training_step(batch)
        assert set(masks) == {masked}


def test_every_reference_and_their_order_reach_the_loss(make_trainer):
    trainer = make_trainer()
    trainer.set_lora()
    batch, _ = cached((6,), [(8, 8)] * 3)
    controls = batch["control_latent"]
    ways = [controls, [controls[i] for i in (1, 0, 2)], controls[:2]]
    ways += [[-c if i == k else c for i, c in enumerate(controls)] for k in range(3)]
    ways += [[]]  # a sample may have no reference at all
    with torch.no_grad():
        losses = [trainer.training_step({**batch, "control_latent": way}) for way in ways]
    assert len({loss.item() for loss in losses}) == len(ways)


@pytest.mark.parametrize(("kind", "name"), [("2508", 1), ("2509", 2), ("2511", 3)])
def test_the_checkpoint_says_which_model_it_is(kind, name, checkpoints):
    flavour = script.detect_flavour(str(checkpoints[kind]))
    assert flavour.name == f"edit-v{name}" and (flavour.vision_area is None) == (kind == "2508")


def test_references_of_a_size_of_their_own_are_what_predict_uses(make_trainer, caplog):
    """Inference takes the one trained most, and says that there are others."""
    dataset = suffix_dataset(PAIRS)
    items = [{"image": "before", "resize": 96}, {"image": "before", "resize": 128}]
    dataset["reference_configs"] |= {"other": items, "third": items[:1]}
    first = dataset["batch_configs"][0]
    dataset["batch_configs"] = [first | {"reference_config": name} for name in ("other", "third")]
    trainer = make_trainer(**{"data.dataset_configs": [dataset], "data.reference_area": "1mp"})
    trainer.fit()
    assert script.inference_rules(trainer)["reference_area"] == [96 * 96, 128 * 128]
    assert script.about_lora(trainer)["reference_area"] == 96 * 96
    assert "reference_area" in caplog.text and str(128 * 128) in caplog.text
    picture = script.whole_picture(Image.new("RGB", (200, 200)))
    example = script.edit_example(trainer, [picture], "x", (64, 64))
    assert [part.size for part in example.pictures["control"]] == [(96, 96)]
