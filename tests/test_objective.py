"""Losses, weights, noise levels and what a sample brings along, against closed forms."""

import json

import numpy as np
import pytest
import torch
from conftest import PAIRS, copy_pairs, suffix_dataset, with_lora_noise
from diffusers.training_utils import compute_density_for_timestep_sampling
from PIL import Image

import train_qwen_edit as script
from utils import normal


def latents(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch_of(n=2, k=1):
    return {
        "pixel_latent": latents(n, 16, 1, 8, 8),
        "control_latent": [latents(n, 16, 1, 8, 8, seed=1 + i) for i in range(k)],
        "prompt_embed": latents(n, 6, 64, seed=9),
        "noise": latents(n, 16, 1, 8, 8, seed=10),
        "sigma": torch.tensor([0.3, 0.7, 0.5, 0.9][:n]),
    }


@pytest.fixture
def told(make_trainer, monkeypatch):
    """told(batch, error=0, **settings) -> (loss, what the model got) where the model is off by it.

    The model of that batch is perfect but for `error`: it says noise - target + error.
    """

    def compute(batch, error=0.0, **changes):
        trainer = make_trainer(**changes)
        trainer.setup_accelerator()
        trainer.load_model(["scheduler"])
        seen = {}

        def predict(model, noisy, sigma, batch):
            seen.update(noisy=noisy, sigma=sigma)
            return (batch["noise"] - batch["pixel_latent"] + error).bfloat16().float()

        monkeypatch.setattr(script, "predict_velocity", predict)
        trainer.transformer = torch.nn.Linear(1, 1)
        return script.compute_loss(trainer, batch), seen

    return compute


def test_a_perfect_prediction_loses_nothing_and_the_rest_is_the_closed_form(told):
    batch = batch_of()
    batch = {k: v.bfloat16().float() if "latent" in k or k == "noise" else v
             for k, v in batch.items() if k != "control_latent"}  # fmt: skip
    target = (batch["noise"] - batch["pixel_latent"]).bfloat16().float()
    batch["noise"] = batch["pixel_latent"] + target
    loss, seen = told(batch)
    assert loss.shape == (2,) and loss.dtype == torch.float32 and loss.abs().max() < 1e-4
    sigma = seen["sigma"].view(-1, 1, 1, 1, 1)
    expected = (1 - sigma) * batch["pixel_latent"] + sigma * batch["noise"]
    torch.testing.assert_close(seen["noisy"], expected)
    # one Euler step along the true velocity lands on the picture
    torch.testing.assert_close(seen["noisy"] - sigma * target, batch["pixel_latent"])


@pytest.mark.parametrize(
    ("name", "error", "expected"),
    [
        ("mse", 0.5, 0.25),
        ("huber", 1e-3, 1e-6),  # squares below
        ("huber", 5.0, 2 * 0.1 * 5 - 0.02),  # and a line above
    ],
)
def test_losses_at_known_errors(name, error, expected):
    target, settings = torch.zeros(1, 16, 1, 4, 4), script.LossConfig(huber_c=0.1)
    loss = script.LOSSES[name](target + error, target, settings)
    assert loss.shape == target.shape
    torch.testing.assert_close(loss, torch.full_like(loss, expected), rtol=0.01, atol=0)


def test_a_region_keeps_the_scale_and_moves_the_emphasis(told):
    """Divided by the mean weight; an empty mask without background is a loss of 0, not a NaN."""
    batch, error = batch_of(), latents(2, 16, 1, 8, 8, seed=4)
    batch["region"] = torch.zeros(2, 1, 1, 8, 8)
    batch["region"][..., :4] = 1
    plain, _ = told({k: v for k, v in batch.items() if k != "region"}, error)
    same, _ = told(batch, error, **{"loss.foreground_weight": 7.0, "loss.background_weight": 7.0})
    torch.testing.assert_close(same, plain)
    only, _ = told(batch, error, **{"loss.foreground_weight": 3.0, "loss.background_weight": 0.0})
    rest, _ = told(batch, error, **{"loss.foreground_weight": 0.0, "loss.background_weight": 1.0})
    torch.testing.assert_close((only + rest) / 2, plain)
    weighted, _ = told(batch, error, **{"loss.foreground_weight": 3.0})
    torch.testing.assert_close(weighted, (3 * only + rest) / 4)
    batch["region"][0] = 0
    empty, _ = told(batch, error, **{"loss.background_weight": 0.0})
    torch.testing.assert_close(empty, torch.stack([torch.tensor(0.0), only[1]]))


def test_from_image_is_noised_and_the_target_is_still_learned(told):
    batch = batch_of() | {"start_latent": latents(2, 16, 1, 8, 8, seed=5)}
    loss, seen = told(batch)
    sigma = seen["sigma"].view(-1, 1, 1, 1, 1)
    expected = (1 - sigma) * batch["start_latent"] + sigma * batch["noise"]
    torch.testing.assert_close(seen["noisy"], expected)
    assert loss.max() < 1e-3


@pytest.mark.parametrize(("shift", "factor"), [(3.0, 3.0), ("model", None)])
def test_sigma_is_shifted_as_asked(shift, factor, told):
    _, seen = told(batch_of(), **{"loss.timestep_shift": shift})
    sigma = batch_of()["sigma"]
    if factor is None:  # 16 tokens; the rule itself is tested against the pipeline's
        factor = np.exp(script.model_mu({"max_image_seq_len": 8192, "max_shift": 0.9}, 16))
    torch.testing.assert_close(seen["sigma"], factor * sigma / (1 + (factor - 1) * sigma))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, ("logit_normal", 0.0, 1.0)),
        ({"logit_mean": 0.5, "logit_std": 0.7}, ("logit_normal", 0.5, 0.7)),
        ({"timestep_density": "uniform"}, ("none", None, None)),
    ],
)
def test_densities_are_those_of_diffusers(ours, theirs):
    n, (scheme, mean, std) = 6000, theirs
    mine = torch.tensor([script.sample_sigma(script.LossConfig(**ours), i) for i in range(n)])
    generator = torch.Generator().manual_seed(0)
    other = compute_density_for_timestep_sampling(scheme, n, mean, std, generator=generator)
    points = torch.linspace(0.05, 0.95, 19)
    gap = torch.quantile(mine, points) - torch.quantile(other, points)
    assert gap.abs().max() < 0.03 and mine.min() > 0 and mine.max() < 1


def ready(make_trainer, **changes):
    trainer = make_trainer(**changes)
    trainer.setup_accelerator()
    trainer.find_data()
    trainer.cache_embeddings()
    trainer.set_lora()
    with_lora_noise(trainer.transformer)
    return trainer


def test_zero_mode_zeroes_the_whole_condition_at_its_length(make_trainer, monkeypatch):
    dataset = suffix_dataset(PAIRS)
    dataset["batch_configs"][0]["caption_dropout"] = 0.5
    changes = {"data.dataset_configs": [dataset], "data.caption_dropout_mode": "zero"}
    trainer = ready(make_trainer, **changes)
    prompts = [job for job in trainer.cache_jobs().values() if job.kind == "prompt"]
    assert len(prompts) == 13 and all(job.caption for job in prompts)  # no empty one is needed
    seen = []
    monkeypatch.setattr(
        script, "compute_loss", lambda t, batch: seen.append(batch["prompt_embed"]) or torch.ones(2)
    )
    draws = [script.Draw(0, 0), script.Draw(1, 0, dropped=True)]
    trainer.training_step(trainer.data.batch(draws))
    assert seen[0][0].any() and not seen[0][1].any()


def test_a_data_sets_weight_scales_its_loss(make_trainer, tmp_path):
    one, two = (copy_pairs(tmp_path / name, (name,)) for name in ("chelsea0", "coffee0"))
    losses = {}
    for weight in (1.0, 3.0):
        datasets = [suffix_dataset(one), suffix_dataset(two, loss_weight=weight)]
        trainer = ready(make_trainer, **{"data.dataset_configs": datasets})
        with torch.no_grad():
            batches = [trainer.data.batch([script.Draw(0, number)]) for number in (0, 1)]
            losses[weight] = [trainer.training_step(batch).item() for batch in batches]
    assert losses[3.0] == pytest.approx([losses[1.0][0], 3 * losses[1.0][1]])


def test_everything_together_trains_cached_and_not_alike(make_trainer, tmp_path):
    """from_image, masks, dropouts, views, sizes per item: the same losses to the bit."""
    folder = copy_pairs(tmp_path / "data")
    for file in list(folder.glob("*_T.*g")):
        mask = Image.fromarray(np.eye(64, dtype=np.uint8) * 255)
        mask.resize(Image.open(file).size).save(folder / f"{file.stem[:-2]}_M.png")
    dataset = suffix_dataset(folder, views=2, view_scale=0.7)
    dataset["image_configs"] |= {"tones": {"suffix": "_D"}, "mask": {"suffix": "_M"}}
    dataset["target_configs"]["after"][0]["from_image"] = "tones"
    dataset["reference_configs"]["before"].append({"image": "tones", "resize": 96})
    dataset["caption_configs"]["text"]["reference_list"] |= {"dropout": 0.5, "min_length": 0}
    dataset["batch_configs"][0] |= {"mask": "mask", "caption_dropout": 0.3}
    changes = {"data.dataset_configs": [dataset], "loss.mask": "file", "loss.loss_type": "huber"}
    changes |= {"data.batch_size": 3, "train.max_train_steps": 3, "logging.log_every": 1}
    losses = []
    for cached in (True, False):
        make_trainer(**changes, **{"cache.use_cache": cached}).fit()
        lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == losses[1] and np.isfinite(losses).all()
    assert len(set(losses[0])) == len(losses[0]) == 3


def test_a_loader_of_ones_own_gets_noise_of_full_strength_that_does_not_repeat(make_trainer):
    trainer = make_trainer(**{"loss.timestep_density": "uniform"})
    trainer.set_lora()
    batch = {k: v for k, v in batch_of(3).items() if k not in ("noise", "sigma")}
    with torch.no_grad():
        first, second = (trainer.training_step(batch) for _ in range(2))
        trainer.drawn = 0
        again = trainer.training_step(batch)
        sigma = [script.sample_sigma(trainer.config.loss, 0, "loader", "sigma", 0, 0, 0, i)
                 for i in range(3)]  # fmt: skip
        noise = normal(batch["pixel_latent"].shape, 0, "loader", "noise", 0, 0, 0)
        given = trainer.training_step({**batch, "noise": noise, "sigma": torch.tensor(sigma)})
    assert first == again == given != second
