"""Losses, weights, noise levels, bridges and rollouts against closed forms."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import PAIRS, copy_pairs, suffix_dataset, with_lora_noise
from PIL import Image

import train_qwen_edit as script


def latents(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_huber_is_squares_below_and_a_line_above():
    settings = script.LossConfig(loss_type="huber", huber_c=0.1)
    goal = torch.zeros(1, 16, 1, 4, 4)
    for error, expected, tolerance in ((1e-3, 1e-6, 1e-3), (5.0, 2 * 0.1 * 5 - 0.02, 1e-2)):
        loss = script.huber_loss(goal + error, goal, None, settings)
        assert loss.item() == pytest.approx(expected, rel=tolerance)


def test_a_weight_keeps_the_scale_and_moves_the_emphasis():
    velocity, goal = latents(2, 16, 1, 4, 4), latents(2, 16, 1, 4, 4, seed=1)
    settings = script.LossConfig()
    plain = script.flow_loss(velocity, goal, None, settings)
    even = script.flow_loss(velocity, goal, torch.full((2, 1, 1, 4, 4), 7.0), settings)
    torch.testing.assert_close(even, plain)
    weight = torch.ones(2, 1, 1, 4, 4)
    weight[..., :2] = 3
    error = (velocity - goal).square().mean(1)[:, 0]  # (B, h, w)
    left, right = error[..., :2].mean((1, 2)), error[..., 2:].mean((1, 2))
    weighted = script.flow_loss(velocity, goal, weight, settings)
    torch.testing.assert_close(weighted, (3 * left + right) / 4)
    only = script.flow_loss(velocity, goal, (weight == 3).float(), settings)
    torch.testing.assert_close(only, left)  # outside the mask nothing counts


def test_densities_are_those_of_diffusers():
    from diffusers.training_utils import compute_density_for_timestep_sampling

    n = 6000
    for ours, theirs in (
        ({"timestep_density": "mode", "mode_scale": 1.29}, {"weighting_scheme": "mode"}),
        ({"logit_mean": 0.5, "logit_std": 0.7}, {"weighting_scheme": "logit_normal"}),
        ({"timestep_density": "uniform"}, {"weighting_scheme": "none"}),
    ):
        mine = torch.tensor([script.sample_sigma(script.LossConfig(**ours), i) for i in range(n)])
        other = compute_density_for_timestep_sampling(
            theirs["weighting_scheme"], n, logit_mean=0.5, logit_std=0.7, mode_scale=1.29,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        points = torch.linspace(0.05, 0.95, 19)
        gap = torch.quantile(mine, points) - torch.quantile(other, points)
        assert gap.abs().max() < 0.03, ours


def test_sigmoid_with_shift_is_simpletuners():
    """k s / (1 + (k - 1) s) of sigmoid(scale x normal): the table of its documentation."""
    shifted = script.shift_sigma(torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]), math.log(1.73))
    assert shifted.tolist() == pytest.approx([0.161, 0.366, 0.634, 0.838, 0.940], abs=1e-3)
    settings = script.LossConfig(timestep_density="sigmoid", sigmoid_scale=2.0, logit_mean=9)
    logits = torch.logit(
        torch.tensor([script.sample_sigma(settings, i) for i in range(4000)]).double()
    )
    assert abs(logits.mean()) < 0.1 and abs(logits.std() - 2) < 0.1


# --- scheduled sampling ---------------------------------------------------------------------------


def linear_field(x0, slope):
    """A model whose velocity points from x towards slope * x0: the path has a closed form."""
    return lambda x, sigma: (x - slope * x0) / sigma.view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_rollout_of_a_perfect_model_stays_on_the_path(steps):
    x0, noise, sigma = latents(3, 4, 1, 2, 2), latents(3, 4, 1, 2, 2, seed=1), torch.tensor
    level = sigma([0.2, 0.5, 0.99])
    arrived = script.roll_out(linear_field(x0, 1.0), x0, noise, level, steps, 0.1)
    torch.testing.assert_close(arrived, script.add_noise(x0, noise, level))


def test_a_rollout_of_a_wrong_model_and_its_correct_target():
    """Towards 2 x0 instead of x0: off by a known amount; the target leads to x0 from there."""
    x0, noise, sigma = (
        latents(2, 4, 1, 2, 2),
        latents(2, 4, 1, 2, 2, seed=1),
        torch.tensor([0.3, 0.6]),
    )
    arrived = script.roll_out(linear_field(x0, 2.0), x0, noise, sigma, 3, 0.05)
    start = sigma + 0.15
    ratio = (sigma / start).view(-1, 1, 1, 1, 1)
    begun = script.add_noise(x0, noise, start)
    torch.testing.assert_close(arrived, 2 * x0 + ratio * (begun - 2 * x0))
    goal = script.velocity_to(x0, arrived, sigma)
    torch.testing.assert_close(arrived - sigma.view(-1, 1, 1, 1, 1) * goal, x0)
    on_path = script.add_noise(x0, noise, sigma)
    torch.testing.assert_close(script.velocity_to(x0, on_path, sigma), noise - x0)
    tiny = script.velocity_to(x0, noise, torch.tensor([1e-6, 1e-6]))
    assert tiny.abs().max() <= (noise - x0).abs().max() / script.MIN_SIGMA


def batch_of(n=2, k=1, seed=0):
    return {
        "pixel_latent": latents(n, 16, 1, 8, 8, seed=seed),
        "control_latent": [latents(n, 16, 1, 8, 8, seed=seed + 1 + i) for i in range(k)],
        "prompt_embed": latents(n, 6, 64, seed=seed + 9),
        "noise": latents(n, 16, 1, 8, 8, seed=seed + 10),
        "sigma": torch.tensor([0.3, 0.7, 0.5, 0.9][:n]),
    }


def ready(make_trainer, **changes):
    trainer = make_trainer(**changes)
    trainer.set_lora()
    trainer.load_model(["scheduler"])
    with_lora_noise(trainer.transformer)
    return trainer


def test_no_rollout_is_bit_identical_to_off(make_trainer):
    trainer = ready(make_trainer)
    plain = trainer._compute_loss(batch_of())
    for chances in ([0.9, 0.9], [0.2, 0.9]):  # share 0.5: none, the first
        other = ready(make_trainer, **{"loss.rollout_steps": 2})
        rolled = other._compute_loss(batch_of() | {"rollout_chance": chances})
        assert torch.equal(rolled[1], plain[1])
        assert torch.equal(rolled[0], plain[0]) == (chances[0] > 0.5)
    assert set(other._measured) == {"rollout_drift", "rollout_seconds"}
    assert 0 < other._measured["rollout_drift"][0]() < 1
    assert other._measured["rollout_seconds"][0]() > 0


def test_a_rolled_out_batch_loses_what_its_samples_lose(make_trainer):
    """Different lengths of text, references of their own: nothing is mixed up."""
    trainer = ready(make_trainer, **{"loss.rollout_steps": 2})
    batch = batch_of(3, k=2) | {"rollout_chance": [0.1, 0.9, 0.2]}
    batch["prompt_embeds_mask"] = torch.arange(6)[None] < torch.tensor([[6], [4], [3]])
    whole = trainer._compute_loss(batch)
    for i in range(3):
        one = {k: v[i : i + 1] for k, v in batch.items() if k != "control_latent"}
        one["control_latent"] = [control[i : i + 1] for control in batch["control_latent"]]
        torch.testing.assert_close(trainer._compute_loss(one)[0], whole[i], rtol=1e-4, atol=1e-5)


def test_rollout_grows_over_its_warmup_and_its_cost_is_logged(make_trainer, tmp_path):
    changes = {"rollout_steps": 1, "rollout_probability": 1.0, "rollout_warmup_steps": 1000}
    trainer = ready(make_trainer, **{f"loss.{k}": v for k, v in changes.items()})
    plain = ready(make_trainer)._compute_loss(batch_of())
    chances = {"rollout_chance": [0.4, 0.6]}
    assert torch.equal(trainer._compute_loss(batch_of() | chances), plain)  # step 0: none
    trainer.global_step = 500
    half = trainer._compute_loss(batch_of() | chances)
    assert half[0] != plain[0] and half[1] == plain[1]
    trainer = make_trainer(**{"loss.rollout_steps": 1, "loss.rollout_probability": 1.0})
    trainer.fit()
    rows = [json.loads(r) for r in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert all(row["rollout_seconds"] > 0 and row["rollout_drift"] > 0 for row in rows)


# --- what a sample brings along -------------------------------------------------------------------


def captured(trainer, batch):
    """What the transformer got and what the loss compared."""
    seen = {}
    name = trainer.config.loss.loss_type
    original = script.LOSSES[name]

    def spy(velocity, goal, weight, loss):
        seen.update(velocity=velocity, goal=goal, weight=weight)
        return original(velocity, goal, weight, loss)

    def predict(batch, noisy, sigma, transformer):
        seen.update(noisy=noisy, sigma=sigma)
        return torch.zeros_like(noisy)

    trainer.velocity = predict
    script.LOSSES[name] = spy
    try:
        trainer._compute_loss(batch)
    finally:
        script.LOSSES[name] = original
    return seen


def test_bridge_and_consistent_targets(make_trainer):
    """From `from`, towards the target: noise - target, or exactly to it."""
    batch = batch_of(2)
    start = latents(2, 16, 1, 8, 8, seed=5)
    seen = captured(ready(make_trainer), batch | {"start_latent": start})
    sigma = seen["sigma"].view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(seen["noisy"], (1 - sigma) * start + sigma * batch["noise"])
    torch.testing.assert_close(seen["goal"], batch["noise"] - batch["pixel_latent"])
    mixed = batch | {"start_latent": start, "consistent": torch.tensor([False, True])}
    seen = captured(ready(make_trainer), mixed)
    landed = seen["noisy"] - sigma * seen["goal"]
    torch.testing.assert_close(landed[1], batch["pixel_latent"][1])
    torch.testing.assert_close(seen["goal"][0], (batch["noise"] - batch["pixel_latent"])[0])


def test_where_there_is_no_mask_all_counts_alike(make_trainer):
    trainer = ready(make_trainer, **{"loss.mask_loss": True, "loss.foreground_weight": 3})
    items = [
        {
            "pixel_latent": torch.zeros(16, 1, 4, 4),
            "control_latent": [],
            "prompt_embed": torch.zeros(3, 8),
        }
        for _ in range(3)
    ]
    items[0]["region"] = torch.zeros(1, 4, 4)
    items[1]["region"] = torch.eye(4)[None]
    weight = trainer.loss_weight(script.collate(items))
    assert weight.shape == (3, 1, 1, 4, 4)
    assert (weight[0] == 1).all() and (weight[2] == 1).all()
    torch.testing.assert_close(weight[1, 0, 0], 1 + 2 * torch.eye(4))
    assert trainer.loss_weight(script.collate(items[2:])) is None
    change = ready(make_trainer, **{"loss.mask": "difference", "loss.background_weight": 0})
    items[1]["region"] = torch.full((1, 4, 4), 0.05)
    weight = change.loss_weight(script.collate(items[1:2]))
    torch.testing.assert_close(weight, torch.full((1, 1, 1, 4, 4), 1.0))  # 2 x 0.05 / 0.1


def test_zero_mode_zeroes_the_whole_condition_at_its_length(make_trainer):
    dataset = suffix_dataset(PAIRS)
    dataset["batch_configs"][0]["caption_dropout"] = 0.5
    changes = {"data.dataset_configs": [dataset], "data.caption_dropout_mode": "zero"}
    trainer = make_trainer(**changes)
    trainer.setup_accelerator()
    trainer.find_data()
    prompts = [j for j in trainer.cache_jobs().values() if isinstance(j, script.Example)]
    assert len(prompts) == 13 and all(p.caption for p in prompts)  # no empty instruction needed
    trainer.cache_embeddings()
    trainer.set_lora()
    seen = []
    trainer._compute_loss = lambda batch: seen.append(batch["prompt_embed"]) or torch.zeros(1)
    data = script.PairDataset(trainer, True)
    for dropped in (False, True):
        batch = data.batch([script.Draw(0, 0, dropped=dropped)])
        trainer.training_step(batch)
    assert seen[0].shape == seen[1].shape and seen[0].abs().sum() > 0 and not seen[1].any()


def test_a_data_sets_weight_scales_its_loss(make_trainer, tmp_path):
    one = copy_pairs(tmp_path / "one", ("chelsea0",))
    two = copy_pairs(tmp_path / "two", ("coffee0",))
    datasets = [suffix_dataset(one), suffix_dataset(two, loss_weight=3.0)]
    losses = {}
    for weight in (1.0, 3.0):
        datasets[1]["loss_weight"] = weight
        trainer = make_trainer(**{"data.dataset_configs": datasets})
        trainer.setup_accelerator()
        trainer.find_data()
        trainer.cache_embeddings()
        trainer.set_lora()
        data = script.PairDataset(trainer, True)
        with torch.no_grad():
            losses[weight] = [
                trainer.training_step(data.batch([script.Draw(0, i)])).item() for i in (0, 1)
            ]
    assert losses[3.0][0] == losses[1.0][0]
    assert losses[3.0][1] == pytest.approx(3 * losses[1.0][1])


def test_everything_together_trains_cached_and_not_alike(make_trainer, tmp_path):
    """from_image, masks, dropouts, rollout, sizes per item: the same losses to the bit."""
    folder = copy_pairs(tmp_path / "data")
    for file in folder.glob("*_T.png"):
        mask = Image.fromarray(np.eye(64, dtype=np.uint8) * 255)
        mask.resize(Image.open(file).size).save(folder / file.name.replace("_T", "_M"))
    for file in folder.glob("*_T.jpg"):
        Image.new("L", Image.open(file).size, 255).save(folder / f"{file.stem[:-2]}_M.png")
    dataset = suffix_dataset(folder, views=2, view_scale=0.7)
    dataset["image_configs"] |= {"tones": {"suffix": "_D"}, "mask": {"suffix": "_M"}}
    dataset["target_configs"]["after"][0]["from_image"] = "tones"
    dataset["reference_configs"]["before"].append({"image": "tones", "resize": 96})
    dataset["caption_configs"]["text"]["reference_list"] |= {"dropout": 0.5, "min_length": 0}
    batch = {"mask": "mask", "reference_dropout": 0.3, "caption_dropout": 0.3}
    dataset["batch_configs"][0] |= batch
    changes = {
        "data.dataset_configs": [dataset],
        "loss.mask_loss": True,
        "loss.loss_type": "huber",
        "loss.rollout_steps": 1,
        "data.batch_size": 3,
        "train.max_train_steps": 3,
    }
    losses = []
    for cached in (True, False):
        make_trainer(**changes, **{"cache.use_cache": cached}).fit()
        lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == losses[1] and np.isfinite(losses).all()
    assert len(set(losses[0])) == len(losses[0]) == 2


def test_an_empty_mask_without_background_is_a_loss_of_0_not_a_nan():
    velocity = torch.ones(2, 16, 1, 4, 4, requires_grad=True)
    weight = torch.zeros(2, 1, 1, 4, 4)
    weight[1] = 1
    loss = script.flow_loss(velocity, torch.zeros_like(velocity), weight, script.LossConfig())
    loss.sum().backward()
    assert loss.tolist() == [0, 1] and torch.isfinite(velocity.grad).all()


def test_a_loaders_own_noise_does_not_change_the_strength_of_a_step(make_trainer):
    def first_loss(with_noise):
        trainer = make_trainer(**{"train.max_train_steps": 1, "loss.timestep_density": "uniform"})
        latent = torch.ones(3, 16, 1, 8, 8)
        width = trainer_width(trainer)
        batch = {
            "pixel_latent": latent,
            "control_latent": [latent],
            "prompt_embed": torch.ones(3, 5, width),
            "sigma": torch.full((3,), 0.5),
        }
        if with_noise:
            noise = script.normal(latent.shape, trainer.config.seed, "loader", "noise", 0, 0, 0)
            batch["noise"] = noise
        trainer.fit([batch])
        lines = (trainer.config.logging.output_dir / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[0])["loss"]

    assert first_loss(True) == first_loss(False)


def trainer_width(trainer):
    path = trainer.config.model.pretrained_model_name_or_path
    return script.read_model_json(path, "transformer/config.json")["joint_attention_dim"]
