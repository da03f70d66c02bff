"""Losses, weights, noise levels and what a sample brings along, against closed forms."""

import numpy as np
import pytest
import torch
from conftest import copy_pairs, suffix_dataset
from diffusers.training_utils import compute_density_for_timestep_sampling
from PIL import Image
from qwen import a_batch, curve, ready

import train_qwen_edit as script


@pytest.fixture
def told(make_trainer, monkeypatch):
    """told(batch, error, **settings) -> (loss, what the model got), where it is off by `error`."""

    def compute(batch, error=0.0, **changes):
        trainer, seen = make_trainer(**changes), {}
        trainer.setup_accelerator()
        trainer.load_model(["scheduler"])
        trainer.transformer = torch.nn.Linear(1, 1)

        def predict(model, noisy, sigma, batch):
            seen.update(noisy=noisy, sigma=sigma)
            return batch["noise"] - batch["pixel_latent"] + error

        monkeypatch.setattr(script, "predict_velocity", predict)
        return script.compute_loss(trainer, batch), seen

    return compute


@pytest.mark.parametrize(
    ("name", "error", "expected"),
    [
        ("mse", 0.0, 0.0),
        ("mse", 0.5, 0.25),
        ("huber", 1e-3, 1e-6),  # squares below
        ("huber", 5.0, 2 * 0.1 * 5 - 0.02),  # and a line above
    ],
)
def test_losses_at_known_errors(name, error, expected, told):
    """One Euler step along the true velocity lands on the picture."""
    batch = a_batch()
    loss, seen = told(batch, error, **{"loss.loss_type": name, "loss.huber_c": 0.1})
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.full((2,), expected), rtol=0.01, atol=1e-9)
    sigma = seen["sigma"].view(-1, 1, 1, 1, 1)
    landed = seen["noisy"] - sigma * (batch["noise"] - batch["pixel_latent"])
    torch.testing.assert_close(landed, batch["pixel_latent"])


def test_a_region_keeps_the_scale_and_moves_the_emphasis(told):
    """Divided by the mean weight; an empty mask without background is a loss of 0, not a NaN."""
    batch, error = a_batch(), a_batch(seed=4)["noise"]
    plain, _ = told(batch, error)
    batch["region"] = torch.zeros(2, 1, 1, 8, 8)
    batch["region"][..., :4] = 1

    def weighted(white, black):
        changes = {"loss.foreground_weight": white, "loss.background_weight": black}
        return told(batch, error, **changes)[0]

    only, rest = weighted(3.0, 0.0), weighted(0.0, 1.0)
    torch.testing.assert_close(weighted(7.0, 7.0), plain)
    torch.testing.assert_close((only + rest) / 2, plain)
    torch.testing.assert_close(weighted(3.0, 1.0), (3 * only + rest) / 4)
    batch["region"][0] = 0
    torch.testing.assert_close(weighted(2.0, 0.0), torch.stack([torch.tensor(0.0), only[1]]))


@pytest.mark.parametrize("shift", [3.0, "model"])
def test_from_image_is_noised_at_the_shifted_level_and_the_target_is_learned(shift, told):
    batch = a_batch() | {"start_latent": a_batch(seed=5)["noise"]}
    loss, seen = told(batch, **{"loss.timestep_shift": shift})
    assert loss.tolist() == [0, 0]
    factor = shift  # of 16 tokens; the rule itself is tested against the pipeline's
    if shift == "model":
        factor = np.exp(script.model_mu({"max_image_seq_len": 8192, "max_shift": 0.9}, 16))
    level = factor * batch["sigma"] / (1 + (factor - 1) * batch["sigma"])
    torch.testing.assert_close(seen["sigma"], level)
    level = level.view(-1, 1, 1, 1, 1)
    expected = (1 - level) * batch["start_latent"] + level * batch["noise"]
    torch.testing.assert_close(seen["noisy"], expected)


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


def test_zero_mode_zeroes_the_whole_condition_at_its_length(make_trainer, monkeypatch):
    changes = {"data.caption_dropout_rate": 0.5, "data.caption_dropout_mode": "zero"}
    trainer, seen = ready(make_trainer(**changes)), []
    prompts = [job for job in trainer.cache_jobs().values() if job.kind == "prompt"]
    assert len(prompts) == 13 and all(job.caption for job in prompts)  # no empty one is needed
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
        trainer = ready(make_trainer(**{"data.dataset_configs": datasets}))
        with torch.no_grad():
            batches = [trainer.data.batch([script.Draw(0, number)]) for number in (0, 1)]
            losses[weight] = [trainer.training_step(batch).item() for batch in batches]
    assert losses[3.0] == pytest.approx([losses[1.0][0], 3 * losses[1.0][1]])


def everything_together(folder):
    """A data set with from_image, masks, dropouts, views and sizes per item."""
    copy_pairs(folder)
    for file in list(folder.glob("*_T.*g")):
        mask = Image.fromarray(np.eye(64, dtype=np.uint8) * 255)
        mask.resize(Image.open(file).size).save(folder / f"{file.stem[:-2]}_M.png")
    dataset = suffix_dataset(folder, views=2, view_scale=0.7)
    dataset["image_configs"] |= {"tones": {"suffix": "_D"}, "mask": {"suffix": "_M"}}
    dataset["target_configs"]["after"][0]["from_image"] = "tones"
    dataset["reference_configs"]["before"].append({"image": "tones", "resize": 96})
    dataset["caption_configs"]["text"]["reference_list"] |= {"dropout": 0.5, "min_length": 0}
    dataset["batch_configs"][0] |= {"mask": "mask", "caption_dropout": 0.3}
    return dataset


@pytest.mark.parametrize("kind", ["2508", "2509", "2511"])
def test_cached_and_uncached_training_lose_the_same_bit_for_bit(kind, make_trainer, tmp_path):
    if kind == "2511":
        changes = {"loss.mask": "file", "loss.loss_type": "huber"}
        changes["data.dataset_configs"] = [everything_together(tmp_path / "data")]
    else:
        dataset = suffix_dataset(copy_pairs(tmp_path / "data"), views=2, view_scale=0.6)
        dataset["caption_configs"]["text"]["reference_list"] = None
        changes = {"data.dataset_configs": [dataset], "data.caption_dropout_rate": 0.5}
    losses = []
    for cached in (True, False):
        how = {"cache.use_cache": cached, "logging.log_every": 1}
        make_trainer(kind, **changes, **how).fit()
        losses.append(curve(tmp_path / "out", "loss"))
    assert losses[0] == losses[1] and np.isfinite(list(losses[0].values())).all()
    assert len(set(losses[0].values())) == len(losses[0]) == 4


def test_a_loader_of_ones_own_gets_noise_of_full_strength_that_does_not_repeat(make_trainer):
    trainer = make_trainer(**{"loss.timestep_density": "uniform"})
    trainer.set_lora()
    batch = {k: v for k, v in a_batch(3).items() if k not in ("noise", "sigma")}
    chance = ("loader", "sigma", 0, 0, 0)
    sigma = [script.sample_sigma(trainer.config.loss, 0, *chance, i) for i in range(3)]
    noise = script.normal(batch["pixel_latent"].shape, 0, "loader", "noise", 0, 0, 0)
    with torch.no_grad():
        given = trainer.training_step({**batch, "noise": noise, "sigma": torch.tensor(sigma)})
        first, second = (trainer.training_step(batch) for _ in range(2))
    assert first == given != second
