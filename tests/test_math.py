"""Formulas of train_qwen_edit.py against closed forms and the diffusers pipelines."""

import math

import diffusers
import numpy as np
import pytest
import torch
from conftest import PAIRS, suffix_dataset, with_lora_noise
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus
from PIL import Image

import train_qwen_edit as script
from utils import UserError

QWEN = {"base_image_seq_len": 256, "max_image_seq_len": 8192, "base_shift": 0.5, "max_shift": 0.9}


def test_pack_is_the_pipelines_and_unpack_undoes_it():
    latents = torch.randn(2, 16, 1, 6, 10)
    tokens = script.pack_latents(latents)
    reference = plus.QwenImageEditPlusPipeline._pack_latents(latents, 2, 16, 6, 10)
    assert tokens.shape == (2, 15, 64) and torch.equal(tokens, reference)
    assert torch.equal(script.unpack_latents(tokens, 48, 80), latents)


@pytest.mark.parametrize(("tokens", "mu"), [(1872, 0.58145), (4096, 0.69355), (4104, 0.69395)])
def test_model_shift_at_known_token_counts(tokens, mu):
    assert script.model_mu(QWEN, tokens) == pytest.approx(mu, abs=1e-5)


def test_shift_is_the_schedulers_time_shift():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    sigma = torch.linspace(0.01, 0.99, 50)
    expected = scheduler.time_shift(0.7, 1.0, sigma)
    torch.testing.assert_close(script.shift_sigma(sigma, 0.7), expected)
    explicit = 3.0  # an explicit shift s is mu = ln s
    torch.testing.assert_close(
        script.shift_sigma(sigma, math.log(explicit)), explicit * sigma / (1 + 2 * sigma)
    )


def test_noise_levels_have_the_asked_density():
    loss = script.LossConfig()
    sigmas = torch.tensor([script.sample_sigma(loss, 0, i) for i in range(4000)])
    logits = torch.logit(sigmas.double())
    assert abs(logits.mean()) < 0.05 and abs(logits.std() - 1) < 0.05
    moved = script.LossConfig(logit_mean=1.0, logit_std=0.5)
    logits = torch.logit(torch.tensor([script.sample_sigma(moved, 0, i) for i in range(4000)]))
    assert abs(logits.mean() - 1) < 0.05 and abs(logits.std() - 0.5) < 0.03
    flat = script.LossConfig(timestep_density="uniform")
    sigmas = torch.tensor([script.sample_sigma(flat, 0, i) for i in range(4000)])
    assert torch.histc(sigmas, 4, 0, 1).sub(1000).abs().max() < 120


def test_flow_loss_closed_form_and_a_perfect_prediction():
    x0, noise = torch.randn(3, 16, 1, 4, 4), torch.randn(3, 16, 1, 4, 4)
    goal, settings = noise - x0, script.LossConfig()
    assert torch.equal(script.flow_loss(goal, goal, None, settings), torch.zeros(3))
    off = script.flow_loss(goal + 0.5, goal, None, settings)
    torch.testing.assert_close(off, torch.full((3,), 0.25))
    assert script.flow_loss(goal.bfloat16(), goal, None, settings).dtype == torch.float32


def test_one_euler_step_along_the_true_velocity_lands_on_the_picture():
    x0, noise, sigma = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([0.3, 0.9])
    noisy = script.add_noise(x0, noise, sigma)
    torch.testing.assert_close(noisy - sigma.view(-1, 1, 1, 1) * (noise - x0), x0)


def test_sampling_sigmas_end_as_the_scheduler_says(make_trainer):
    trainer = make_trainer()
    trainer.load_model(["scheduler"])
    mu = script.model_mu(trainer.scheduler.config, 4096)
    trainer.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 20, 20), mu=mu)
    sigmas = trainer.scheduler.sigmas
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert sigmas[-2].item() == pytest.approx(0.02, abs=1e-6)  # shift_terminal
    assert sigmas[-3].item() == pytest.approx(0.1138, abs=1e-4)


@pytest.mark.parametrize("kind", ["2508", "2509", "2511"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("lora", [False, True])
def test_predict_gives_the_pipelines_pixels(kind, guidance, lora, make_trainer, monkeypatch):
    area = 128 * 128
    trainer = make_trainer(kind, **{"data.reference_area": area})
    vision = None if kind == "2508" else 64 * 64
    trainer.flavour = trainer.flavour._replace(vision_area=vision)
    trainer.setup_predict()
    if lora:
        trainer.set_lora()
        with_lora_noise(trainer.transformer).eval()
    images = [Image.open(PAIRS / f"{name}_R.png") for name in ("astronaut0", "chelsea1")]
    images = images[0] if kind == "2508" else images
    options = {"num_inference_steps": 3, "height": 96, "width": 128, "true_cfg_scale": guidance}
    ours = trainer.predict(images, "make it blue", "", seed=3, **options)

    monkeypatch.setattr(plus, "VAE_IMAGE_SIZE", area)
    monkeypatch.setattr(plus, "CONDITION_IMAGE_SIZE", 64 * 64)
    dimensions = edit.calculate_dimensions
    monkeypatch.setattr(edit, "calculate_dimensions", lambda _, ratio: dimensions(area, ratio))
    pipeline = getattr(diffusers, trainer.flavour.pipeline_class)(
        scheduler=trainer.scheduler,
        vae=trainer.vae,
        text_encoder=trainer.qwen_vl,
        tokenizer=trainer.tokenizer,
        processor=trainer.processor,
        transformer=trainer.transformer,
    )
    generator = torch.Generator().manual_seed(3)
    negative = "" if guidance > 1 else None
    theirs = pipeline(
        image=images,
        prompt="make it blue",
        negative_prompt=negative,
        generator=generator,
        **options,
    ).images[0]
    assert ours.std() > 5
    np.testing.assert_array_equal(ours, np.asarray(theirs))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["2508", "2511"])
def test_predict_at_the_pipelines_own_sizes(kind, make_trainer):
    """1 MP reference and output; for the encoder 384^2, or the same 1 MP picture (2508)."""
    trainer = make_trainer(kind, **{"data.reference_area": "1mp"})
    trainer.setup_predict()
    image = Image.open(PAIRS / "astronaut1_R.png")
    ours = trainer.predict(image, "make it blue", None, num_inference_steps=2, seed=5)
    pipeline = getattr(diffusers, trainer.flavour.pipeline_class)(
        scheduler=trainer.scheduler,
        vae=trainer.vae,
        text_encoder=trainer.qwen_vl,
        tokenizer=trainer.tokenizer,
        processor=trainer.processor,
        transformer=trainer.transformer,
    )
    theirs = pipeline(
        image=image,
        prompt="make it blue",
        true_cfg_scale=1.0,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    assert ours.shape == (864, 1216, 3)
    np.testing.assert_array_equal(ours, np.asarray(theirs))


def test_stills_in_2d_equal_the_video_vae(checkpoints):
    vae_class = diffusers.AutoencoderKLQwenImage
    stock = vae_class.from_pretrained(checkpoints["2511"], subfolder="vae")
    fast = vae_class.from_pretrained(checkpoints["2511"], subfolder="vae")
    script.encode_stills_in_2d(fast)
    pixels = torch.rand(1, 3, 64, 96) * 2 - 1
    latents = script.encode_image_qwen(stock, pixels)
    assert latents.shape == (1, 16, 1, 8, 12)
    torch.testing.assert_close(script.encode_image_qwen(fast, pixels), latents, rtol=0, atol=1e-5)
    decoded = script.decode_latents_qwen(stock, latents)
    torch.testing.assert_close(
        script.decode_latents_qwen(fast, latents), decoded, rtol=0, atol=1e-5
    )
    video = torch.rand(1, 3, 5, 64, 64)  # a clip still takes the 3-D path
    torch.testing.assert_close(fast.encode(video)[0].mode(), stock.encode(video)[0].mode())


@pytest.mark.parametrize("kind", ["2509", "2511"])
def test_padded_text_changes_nothing(kind, make_trainer):
    trainer = make_trainer(kind)
    trainer.load_model(["transformer", "scheduler"])
    noisy, reference = torch.randn(2, 16, 1, 8, 8), torch.randn(2, 16, 1, 4, 6)
    embeds = [torch.randn(7, 64), torch.randn(12, 64)]
    sigma = torch.tensor([0.3, 0.8])
    item = {"pixel_latent": noisy[0], "control_latent": [reference[0]]}
    batch = script.collate([{**item, "prompt_embed": e} for e in embeds])
    assert batch["prompt_embeds_mask"].sum(1).tolist() == [7, 12]
    arguments = (batch["prompt_embed"], batch["prompt_embeds_mask"], sigma)
    together = script.predict_velocity(trainer.transformer, noisy, [reference], *arguments)
    for i, embed in enumerate(embeds):
        one = [t[i : i + 1] for t in (noisy, reference)]
        alone = script.predict_velocity(
            trainer.transformer, one[0], [one[1]], embed[None], None, sigma[i : i + 1]
        )
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=5e-6)
    unmasked = script.predict_velocity(
        trainer.transformer, noisy, [reference], batch["prompt_embed"], None, sigma
    )
    assert (unmasked[0] - together[0]).abs().max() > 1e-3  # the mask is what makes it equal


def test_text_of_one_length_needs_no_mask():
    item = {"pixel_latent": torch.zeros(16, 1, 2, 2), "control_latent": []}
    batch = script.collate([{**item, "prompt_embed": torch.zeros(5, 8)}] * 2)
    assert batch["prompt_embeds_mask"] is None


def test_a_batch_loses_what_its_samples_lose(make_trainer):
    """Mean over a padded batch = mean of the single samples (loss and gradient)."""
    trainer = make_trainer(**{"data.reference_area": "target"})
    trainer.set_lora()
    trainer.load_model(["scheduler"])
    with_lora_noise(trainer.transformer)
    items = [
        {
            "pixel_latent": torch.randn(16, 1, 8, 8),
            "control_latent": [torch.randn(16, 1, 8, 8), torch.randn(16, 1, 4, 8)],
            "prompt_embed": torch.randn(length, 64),
        }
        for length in (5, 9, 9)
    ]
    draws = [
        {"noise": torch.randn(1, 16, 1, 8, 8), "sigma": torch.tensor([s])} for s in (0.2, 0.5, 0.9)
    ]

    def gradients():
        found = [p.grad.clone() for p in trainer.trainable()]
        for p in trainer.trainable():
            p.grad = None
        return found

    single = []
    for item, draw in zip(items, draws, strict=True):
        loss = trainer.training_step(script.collate([item]) | draw)
        (loss / 3).backward()
        single.append(loss.item())
    expected = gradients()
    both = {key: torch.cat([draw[key] for draw in draws]) for key in ("noise", "sigma")}
    loss = trainer.training_step(script.collate(items) | both)
    loss.backward()
    assert loss.item() == pytest.approx(np.mean(single), rel=1e-5)
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_every_reference_reaches_the_loss(make_trainer):
    trainer = make_trainer()
    trainer.set_lora()
    trainer.load_model(["scheduler"])
    batch = {
        "pixel_latent": torch.randn(1, 16, 1, 8, 8),
        "control_latent": [torch.randn(1, 16, 1, 8, 8) for _ in range(3)],
        "prompt_embed": torch.randn(1, 6, 64),
        "noise": torch.randn(1, 16, 1, 8, 8),
        "sigma": torch.tensor([0.5]),
    }
    with torch.no_grad():
        loss = trainer.training_step(batch)
        for k in range(3):
            other = list(batch["control_latent"])
            other[k] = -other[k]
            assert trainer.training_step({**batch, "control_latent": other}) != loss
        swapped = [batch["control_latent"][i] for i in (1, 0, 2)]
        assert trainer.training_step({**batch, "control_latent": swapped}) != loss


def test_zero_cond_t_is_never_dropped():
    with pytest.raises(UserError, match="zero_cond_t"):
        script.check_zero_cond_t({"zero_cond_t": True}, ["patch_size"])
    script.check_zero_cond_t({"zero_cond_t": True}, ["patch_size", "zero_cond_t"])
    script.check_zero_cond_t({"zero_cond_t": False}, ["patch_size"])


@pytest.mark.parametrize(("kind", "name"), [("2508", 1), ("2509", 2), ("2511", 3)])
def test_the_checkpoint_says_which_model_it_is(kind, name, checkpoints):
    assert script.detect_flavour(str(checkpoints[kind])).name == f"edit-v{name}"


def test_references_of_a_size_of_their_own_are_what_predict_and_generate_use(make_trainer):
    data = suffix_dataset(PAIRS)
    data["reference_configs"] = {"before": [{"image": "before", "resize": 96}]}
    trainer = make_trainer(**{"data.dataset_configs": [data], "data.reference_area": "1mp"})
    trainer.setup_accelerator()
    trainer.find_data()
    assert trainer.about_lora()["reference_area"] == 96 * 96
    picture = script.Picture(Image.new("RGB", (200, 200)), "", (200, 200))
    shown = trainer.edit_example([picture], "x", 64, 64)
    assert [p.size for p in shown.references] == [(96, 96)]
