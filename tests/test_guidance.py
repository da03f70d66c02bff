"""Second targets: guidance that a base has built in, and answers that shall stay the base's."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from qwen import assert_same, ready
from torch import nn

import train_qwen_edit as script
from benchmarks import preserve
from utils import UserError

SCALE, MEAN, STD = 3.0, {"instruction": 1.0, "": -0.5}, {"instruction": 0.3, "": 0.8}


def velocity_of(name, noisy, sigma):
    """E[noise - x0 | noisy] where x0 is normal: the best answer to plain targets."""
    variance = (1 - sigma) ** 2 * STD[name] ** 2 + sigma**2
    slope = (sigma - (1 - sigma) * STD[name] ** 2) / variance
    return -MEAN[name] + slope * (noisy - (1 - sigma) * MEAN[name])


class World(nn.Module):
    """A base whose answer has guidance built in, and an adapter a + b (noisy) on top of it."""

    def __init__(self):
        super().__init__()
        self.adapter, self.on = nn.Parameter(torch.zeros(2)), True

    def forward(self, noisy, sigma, name):
        s = sigma.view(-1, 1, 1, 1, 1)
        own, plain = velocity_of(name, noisy, s), velocity_of("", noisy, s)
        base = plain + SCALE * (own - plain)
        return base + self.on * (self.adapter[0] + self.adapter[1] * noisy)


@pytest.mark.parametrize(("guidance", "drifts"), [(1.0, True), (SCALE, False)])
def test_a_distilled_base_stays_guided(guidance, drifts, monkeypatch):
    """Trained on its own data: plain targets lead back to the unguided answer."""
    world, sigma = World(), 0.6
    monkeypatch.setattr(
        script, "use_adapters", lambda t, trained=True, fixed=False: setattr(world, "on", trained)
    )
    flavour = SimpleNamespace(
        built_in=1.0, velocity=lambda model, noisy, s, batch: world(noisy, s, batch["name"])
    )
    loss = script.LossConfig(guidance=guidance)
    trainer = SimpleNamespace(
        config=SimpleNamespace(loss=loss), flavour=flavour, transformer=world, global_step=0
    )
    trainer.bare_transformer = lambda: world
    trainer.accelerator = SimpleNamespace(autocast=contextlib.nullcontext)
    optimizer = torch.optim.Adam(world.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(400):
        x0 = 1.0 + 0.3 * torch.randn(4096, 1, 1, 1, 1, generator=generator)
        batch = {"pixel_latent": x0, "name": "instruction", "sigma": torch.full((4096,), sigma)}
        batch["noise"] = torch.randn(x0.shape, generator=generator)
        if guidance > 1:
            batch |= {"unguided": {"name": ""}, "guidance": torch.full((4096,), guidance)}
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / 400)
        optimizer.zero_grad()
        script.compute_loss(trainer, batch, shift=False).mean().backward()
        optimizer.step()
    noisy = torch.linspace(-1, 1.5, 9).view(-1, 1, 1, 1, 1)
    level = torch.full((9,), sigma)
    world.on = True
    found = world(noisy, level, "instruction")
    world.on = False
    guided = world(noisy, level, "instruction")
    plain = velocity_of("instruction", noisy, torch.tensor(sigma))
    wanted, other = (plain, guided) if drifts else (guided, plain)
    assert (found - wanted).abs().max() < 0.05 < (found - other).abs().max() / 4


def batch_of(trainer, names=(0, 1)):
    """A batch as the loader makes it."""
    return trainer.data.batch([script.Draw(5 + n, n) for n in names])


def test_guidance_and_preservation_are_their_formulas(make_trainer):
    """On the real class; also one batch is its samples, and encoders in the loop = the cache."""
    settings = {
        "loss.guidance": 2.5,
        "loss.preserve": 0.7,
        "loss.preserve_prompts": ["make it green", "add a much larger hat"],
        "loss.preserve_every": 2,
    }
    trainer = ready(make_trainer(**settings))
    loss, one = trainer.config.loss, batch_of(trainer, [0])
    assert one["guidance"].tolist() == [2.5] and set(one) >= {"unguided", "kept"}
    noise, sigma, x0 = one["noise"], one["sigma"], one["pixel_latent"].float()
    mu = script.model_mu(trainer.scheduler.config, trainer.flavour.tokens(x0))
    level = script.shift_sigma(sigma, mu)
    noisy = script.add_noise(x0, noise, level)
    transformer = trainer.transformer

    def velocity(texts, on):
        (transformer.enable_adapters if on else transformer.disable_adapters)()
        with torch.no_grad():
            return script.predict_velocity(transformer, noisy, level, {**one, **texts})

    plain, kept = velocity(one["unguided"], False), velocity(one["kept"], False)
    target = plain + 2.5 * (noise - x0 - plain)
    expected = (velocity({}, True) - target).square().mean()
    second = 0.7 * (velocity(one["kept"], True) - kept).square().mean()
    found = script.compute_loss(trainer, one)
    torch.testing.assert_close(found[0], expected + second)
    trainer.global_step = 1
    torch.testing.assert_close(script.compute_loss(trainer, one)[0], expected)
    trainer.global_step = 0
    assert second > 1e-3
    trained = trainer.trainable()
    found.sum().backward()
    alone = [p.grad.clone() for p in trained]
    transformer.zero_grad()
    both = script.compute_loss(trainer, batch_of(trainer))
    torch.testing.assert_close(both[0], found[0])
    assert all(gradient.abs().sum() > 0 for gradient in alone if gradient.numel() > 8)
    direct = make_trainer(**settings, **{"cache.use_cache": False})
    direct.setup_accelerator()
    direct.find_data()
    direct.set_lora()
    script.copy_into(direct.trainable(), trained)
    torch.testing.assert_close(direct.training_step(batch_of(direct)), both.mean())
    with pytest.raises(UserError, match="no unguided, kept"):
        trainer.training_step({k: v for k, v in one.items() if k not in ("unguided", "kept")})
    assert loss.captions(trainer.flavour)["unguided"] == [""]


@pytest.mark.slow
def test_preservation_keeps_other_answers_and_the_edit_is_learned(tmp_path, monkeypatch):
    """On the demo's base, in 80 steps at 64 px (benchmarks/preserve.py: 1,000 at 160 px)."""
    monkeypatch.chdir(ROOT)
    data = {"resolution": 64, "repeats": 1, "views": 1, "view_scale": 1, "view_flip": False}
    settings = {f"data.dataset_configs.0.{name}": value for name, value in data.items()}
    settings["optimizer.init_args.fused"] = True  # quicker on a CPU, too
    found = {}
    for weight in (0, 0.3):
        found[weight] = preserve.measure(preserve.trained(weight, 80, 1, tmp_path, **settings)[0])
    (plain, *moved), (skill, *kept) = found.values()
    assert plain > 0.3 and skill > plain - 0.03
    for far, near in zip(moved, kept, strict=True):  # one of preserve_prompts, one never trained
        assert far > 15 and near < far / 3, found


def test_two_noise_levels_share_each_instruction(make_trainer):
    settings = {"loss.noise_levels_per_sample": 2, "loss.preserve": 1.0}
    settings |= {"loss.preserve_prompts": ["make it green"]}
    trainer = ready(make_trainer("2.1", **settings | {"data.reference_area": "target"}))
    batch = batch_of(trainer, [0])
    assert batch["guidance"].tolist() == [3.0]  # 2.1 has it built in
    together = script.compute_loss(trainer, batch)
    together.mean().backward()
    named = [(n, p) for n, p in trainer.transformer.named_parameters() if p.requires_grad]
    grads = {n: p.grad.clone() for n, p in named}
    trainer.transformer.zero_grad()
    parts = zip(batch["noise"], batch["sigma"], strict=True)
    alone = [script.compute_loss(trainer, batch | {"noise": n, "sigma": s}) for n, s in parts]
    torch.stack(alone).mean().backward()
    torch.testing.assert_close(together, torch.stack(alone).mean(0), rtol=0, atol=1e-5)
    assert_same({n: p.grad for n, p in named}, grads, atol=1e-5)


def test_outside_the_mask_the_base_is_kept(make_trainer, tmp_path):
    rng = np.random.default_rng(0)
    for folder in ("before", "after"):
        (tmp_path / "d" / folder).mkdir(parents=True)
        pixels = rng.integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "d" / folder / "a.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[:32] = 255
    Image.fromarray(mask).save(tmp_path / "d/after/a_mask.png")
    dataset = {"train_data_dir": str(tmp_path / "d"), "target_dir": "after", "resolution": 64}
    dataset |= {"reference_dirs": ["before"], "caption": "make it blue"}
    settings = {"data.dataset_configs": [dataset], "loss.mask": "file", "data.batch_size": 1}
    plain, kept = (ready(make_trainer(**settings, **{"loss.preserve": p})) for p in (0.0, 2.0))
    script.copy_into(kept.trainable(), plain.trainable())
    batch = batch_of(plain, [0])
    x0 = batch["pixel_latent"].float()
    mu = script.model_mu(kept.scheduler.config, kept.flavour.tokens(x0))
    level = script.shift_sigma(batch["sigma"], mu)
    noisy = script.add_noise(x0, batch["noise"], level)
    velocities = []
    for switch in (kept.transformer.disable_adapters, kept.transformer.enable_adapters):
        switch()
        with torch.no_grad():
            velocities.append(script.predict_velocity(kept.transformer, noisy, level, batch))
    outside = (velocities[1] - velocities[0]).square()[..., 4:, :].mean()  # the lower half
    difference = script.compute_loss(kept, batch)[0] - script.compute_loss(plain, batch)[0]
    torch.testing.assert_close(difference, 2 * outside)
    assert outside > 1e-3
    # a sample without a mask has no outside: nothing of it is pulled back to the base
    bare = {name: value for name, value in batch.items() if name != "region"}
    losses = [script.compute_loss(each, bare) for each in (kept, plain)]
    assert torch.equal(*losses)
