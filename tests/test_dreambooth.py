"""train_dreambooth_pairs.py: what pairs teach, the commands of the user's document, mistakes."""

import itertools
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import diffusers
import numpy as np
import pytest
import torch
import yaml
from conftest import LAUNCH, PAIRS, ROOT, run
from PIL import Image
from safetensors.torch import load_file, save_file
from test_presets import unexplained

import cache_embeddings
import train_dreambooth_pairs as script
from utils import UserError, load_config

NAMES = ("chelsea0", "coffee0", "hubble0")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """before/, after/ and single/ of three photos."""
    folder = tmp_path_factory.mktemp("pictures")
    for place, role in (("before", "R"), ("after", "T"), ("single", "T")):
        (folder / place).mkdir()
        for name in NAMES:
            file = next(f for f in PAIRS.glob(f"{name}_{role}.*") if f.suffix != ".txt")
            Image.open(file).convert("RGB").save(folder / place / f"{name}.png")
    return folder


@pytest.fixture
def make(checkpoints, pictures, tmp_path):
    """make(**flags) -> trainer on the pairs, CPU, fp32, 64 px."""

    def build(folder=tmp_path, **changes):
        settings = {
            "pretrained_model_name_or_path": checkpoints["sd"],
            "use_image_pairs": True,
            "before_data_dir": pictures / "before",
            "after_data_dir": pictures / "after",
            "instance_prompt": "a photo",
            "output_dir": folder / "out",
            "cache_dir": folder / "cache",
            "resolution": 64,
            "train_batch_size": 2,
            "max_train_steps": 4,
            "checkpointing_steps": 2,
            "learning_rate": 1e-2,
            **changes,
        }
        argv = [
            f"--{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in settings.items()
        ]
        config = load_config(script.Config, [a for a in argv if not a.endswith("=None")])
        return script.DreamBoothPairsTrainer(config)

    return build


def loaded(trainer):
    """The trainer with data, cache and models."""
    trainer.cache_embeddings()
    trainer.load_models()
    return trainer


def shaken(trainer, seed=0):
    """The adapters with values that change the output."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in trainer.trained:
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1
    return trainer


def turns_of(trainer, batch=0):
    return script.draw_turns(trainer.config, batch, trainer.scenes, trainer.batches)


# --- formulas -------------------------------------------------------------------------------------


def noised(low, high, t=600, base=None, progress=0.0):
    alphas = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).alphas_cumprod
    noise = torch.randn(low.shape, generator=torch.Generator().manual_seed(1))
    alpha = alphas[t].expand(len(low))
    scales = torch.full((len(low),), -1.0), torch.full((len(low),), 1.0)
    both = (script.add_noise_sd(x, noise, alpha) for x in (low, high))
    return script.Noised(*both, *scales, noise, base or (lambda x: x * 0), progress), alphas[t]


def test_alphas_and_snr_weights_are_those_of_stable_diffusion():
    alphas = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).alphas_cumprod.double()
    known = {0: 0.999150, 20: 0.981314, 200: 0.753692, 500: 0.276333, 999: 0.004660}
    for t, value in known.items():
        assert alphas[t].item() == pytest.approx(value, abs=2e-6)
    five, one = (script.snr_weight(alphas, gamma) for gamma in (5, 1))
    assert five[[0, 1, 20]].tolist() == pytest.approx([0.00425, 0.00853, 0.09521], abs=1e-5)
    assert (five[200:] == 1).all() and (one[380:] == 1).all()
    assert one[[20, 200, 300]].tolist() == pytest.approx([0.01904, 0.32680, 0.69348], abs=2e-5)
    assert (script.snr_weight(alphas, None) == 1).all()


def test_with_one_noise_the_sides_differ_by_the_change_alone():
    low, high = torch.randn(2, 2, 4, 8, 8)
    n, alpha = noised(low, high)
    torch.testing.assert_close(n.low, n.high - alpha.sqrt() * (high - low))


def test_the_objectives_are_their_formulas():
    low, high = torch.randn(2, 2, 4, 8, 8)
    n, _ = noised(low, high, base=lambda x: 3 * x)
    after, before = script.slider(n)
    assert torch.equal(after.noisy, n.high) and torch.equal(after.target, n.noise)
    assert torch.equal(before.noisy, n.low) and torch.equal(before.target, n.noise)
    assert after.lane[0].scale.tolist() == [1, 1] and before.lane[0].scale.tolist() == [-1, -1]
    forward, backward = script.difference(n)
    assert torch.equal(forward.noisy, n.high) and torch.equal(forward.target, 3 * n.low)
    assert torch.equal(backward.noisy, n.low) and torch.equal(backward.target, 3 * n.high)
    assert forward.lane[0].scale.tolist() == [1, 1] and backward.lane[0].scale.tolist() == [-1, -1]
    (first,) = script.copier(n)
    (second,) = script.copier(n._replace(progress=0.5))
    assert torch.equal(first.noisy, n.low) and [on.adapter for on in first.lane] == ["copied"]
    assert torch.equal(second.noisy, n.high) and second.lane[0].frozen
    assert [on.adapter for on in second.lane] == ["copied", "change"]
    assert {id(term.target) for term in (*script.joint(n), first, second)} == {id(n.noise)}
    assert [term.lane[0].scale for term in script.joint(n)] == [1.0, 1.0]


def test_huber_is_the_square_near_zero_and_a_line_far_away():
    small, large = torch.tensor([1e-3]).double(), torch.tensor([100.0])
    assert script.huber_error(small, 0.1).item() == pytest.approx(1e-6, rel=1e-2)
    slope = script.huber_error(large + 1, 0.1) - script.huber_error(large, 0.1)
    assert slope.item() == pytest.approx(0.2, rel=1e-3)


def test_region_weights_have_mean_one_and_follow_the_change():
    change = torch.zeros(1, 1, 4, 4)
    change[..., :2, :2] = 0.5
    assert torch.equal(script.region_weights(change, 0.0), torch.ones_like(change))
    weights = script.region_weights(change, 1.0)
    assert weights.mean().item() == pytest.approx(1) and weights[0, 0, 3, 3] == 0
    assert script.region_weights(change, 0.5)[0, 0, 3, 3].item() == pytest.approx(0.5)
    error = torch.rand(1, 1, 4, 4)
    other = error.clone()
    other[..., 2:, :] = 9  # outside the region nothing counts
    assert torch.equal((weights * error).sum(), (weights * other).sum())


def test_timesteps_are_spread_over_the_range_and_never_collapse(make):
    config = make(timestep_min=200, timestep_max=399).config
    drawn = [script.draw_timestep(config, visit) for visit in range(1000)]
    assert min(drawn) < 203 and max(drawn) > 396 and min(drawn) >= 200 and max(drawn) <= 399
    for start in range(0, 1000, 10):
        assert sorted((t - 200) // 20 for t in drawn[start : start + 10]) == list(range(10))
    assert len(set(drawn)) > 190
    ends = make(timestep_min=999, timestep_max=999).config
    assert {script.draw_timestep(ends, visit) for visit in range(20)} == {999}


def test_every_scene_is_seen_equally_often_and_batches_are_of_one_shape():
    shapes = ["square"] * 5 + ["wide"] * 2 + ["tall"]
    batches = script.Batches(shapes, 3, seed=0)
    drawn = [batches[number] for number in range(4 * 8)]
    assert all(len({shapes[scene] for scene in batch}) == 1 for batch in drawn)
    assert Counter(scene for batch in drawn for scene in batch) == dict.fromkeys(range(8), 12)
    assert drawn[:8] != drawn[8:16] and len({tuple(sorted(b)) for b in drawn[:8]}) > 3
    assert script.Batches(shapes, 3, seed=0)[17] == drawn[17]
    assert [script.Batches(shapes, 3, seed=1)[n] for n in range(8)] != drawn[:8]


def test_both_sides_of_a_pair_get_one_transform(make, tmp_path):
    """A picture of coordinates, wide, flipped and cropped: the sides stay pixel upon pixel."""
    y, x = torch.meshgrid(torch.arange(150), torch.arange(240), indexing="ij")
    grid = torch.stack([x, y, torch.zeros_like(x)], -1).to(torch.uint8)
    for side in ("before", "after"):
        (tmp_path / side).mkdir()
        Image.fromarray(grid.numpy()).save(tmp_path / side / "grid.png")
    Image.fromarray(grid.numpy()).resize((480, 300)).save(tmp_path / "after/grid.png")
    data = {"before_data_dir": tmp_path / "before", "after_data_dir": tmp_path / "after"}
    trainer = make(**data, resolution=128, random_flip=True)
    trainer.setup_accelerator()
    trainer.find_data()
    for flip in (False, True):
        pictures = script.fit_scene(trainer.config, trainer.scenes[0], trainer.index, flip)
        low, high = (script.to_pixels(script.load_picture(p)) for p in pictures)
        assert low.shape == high.shape and (low - high).abs().mul(127.5).max() < 3
        assert bool(low[0, 0, 64, -1] < low[0, 0, 64, 0]) == flip


# --- the adapter ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_unet():
    """The UNet of Stable Diffusion 1.5 without weights."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        return lambda: diffusers.UNet2DConditionModel(
            cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
        )


@pytest.mark.parametrize(
    ("targets", "layers", "per_rank"), [("attention", 128, 199_296), ("transformer", 192, 423_936)]
)
def test_layers_and_parameters_of_stable_diffusion(targets, layers, per_rank, full_unet):
    from accelerate import init_empty_weights

    with init_empty_weights():
        unet = full_unet()
        script.add_adapter(unet, script.Switchboard(), "change", script.TARGETS[targets], 4, 4)
    found = script.adapted_layers(unet, "change")
    numbers = sum(x.down["change"].numel() + x.up["change"].numel() for x in found.values())
    assert len(found) == layers and numbers == 4 * per_rank


def test_an_empty_adapter_changes_no_bit_at_any_strength(make):
    trainer = loaded(make(target_modules="self-attention+conv"))
    noisy, t = torch.randn(2, 4, 8, 8), torch.tensor([600, 20])
    embeds = torch.randn(1, 77, 32)
    unet = trainer.bare["unet"]
    plain = trainer.predict(unet, noisy, t, embeds, [()])
    for scale in (1.0, -3.0):
        assert torch.equal(
            plain, trainer.predict(unet, noisy, t, embeds, [(script.On("change", scale),)])
        )
    shaken(trainer)
    moved = trainer.predict(unet, noisy, t, embeds, [(script.On("change", 1.0),)])
    assert not torch.equal(plain, moved)
    assert torch.equal(plain, trainer.predict(unet, noisy, t, embeds, [()]))


def test_two_lanes_are_two_passes(make):
    trainer = shaken(loaded(make()))
    unet, embeds, t = trainer.bare["unet"], torch.randn(1, 77, 32), torch.tensor([600])
    x = torch.randn(2, 4, 8, 8)
    lanes = [(script.On("change", 1.0),), (script.On("change", -1.0),)]
    together = trainer.predict(unet, x, t.repeat(2), embeds, lanes)
    alone = [trainer.predict(unet, x[i : i + 1], t, embeds, [lanes[i]]) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "1 x 1", "3 x 3"])
def test_an_adapter_is_a_change_of_the_weights_and_linear_in_strength(kind):
    kernel = {"linear": None, "1 x 1": 1, "3 x 3": 3}[kind]
    base = (
        torch.nn.Linear(6, 5)
        if kernel is None
        else torch.nn.Conv2d(6, 5, kernel, stride=2, padding=kernel // 2)
    )
    model, board = (
        torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"b": base})}),
        script.Switchboard(),
    )
    script.add_adapter(model, board, "change", ["b"], rank=3, alpha=1.5)
    layer = model["a"]["b"]
    draw = torch.Generator().manual_seed(0)
    for factor in (layer.down["change"], layer.up["change"]):
        factor.data = torch.randn(factor.shape, generator=draw)
    x = torch.randn(4, 7, 6) if kernel is None else torch.randn(4, 6, 8, 8)
    tensors = script.adapter_tensors({"unet": model}, "change", factor=1.0)
    down, up = (tensors[f"unet.a.b.lora_{k}.weight"] for k in "AB")
    change = (up.flatten(1) @ down.flatten(1)).view_as(base.weight)
    plain = base.weight.detach().clone()
    for scale in (1.0, -2.5):
        board.lanes = [(script.On("change", scale),)]
        found = layer(x)
        base.weight.data = plain + scale * change
        board.lanes = [()]
        torch.testing.assert_close(found, layer(x), atol=1e-5, rtol=1e-5)
        base.weight.data = plain
    twice = script.adapter_tensors({"unet": model}, "change", factor=2.0)
    again = twice["unet.a.b.lora_B.weight"].flatten(1) @ down.flatten(1)
    torch.testing.assert_close(again.view_as(change), 2 * change)


def test_gradients_are_finite_differences(make):
    """Central differences in float64, of the loss of a slider on a whole UNet."""
    trainer = shaken(loaded(make(train_batch_size=1)))
    unet = trainer.bare["unet"].double()
    draw = torch.Generator().manual_seed(0)
    noisy, noise = torch.randn(2, 2, 4, 8, 8, generator=draw, dtype=torch.float64)
    text = torch.randn(2, 77, 32, generator=draw, dtype=torch.float64)
    trainer.board.lanes = [(script.On("change", 1.0),), (script.On("change", -1.0),)]

    def loss():
        return (unet(noisy, 600, encoder_hidden_states=text).sample - noise).square().mean()

    name, layer = next(iter(script.adapted_layers(unet, "change").items()))
    for factor in (layer.down["change"], layer.up["change"]):
        (gradient,) = torch.autograd.grad(loss(), factor)
        place = divmod(int(gradient.abs().argmax()), factor.shape[1])
        sides = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                factor[place] += step
                sides.append(loss().item())
                factor[place] -= step
        found = (sides[0] - sides[1]) / 2e-5
        assert found == pytest.approx(gradient[place].item(), rel=1e-6), name


def gradients(trainer, losses):
    torch.stack(list(losses.values())).sum().backward()
    found = [p.grad.clone() for p in trainer.trained]
    for parameter in trainer.trained:
        parameter.grad = None
    return found


def test_difference_starts_at_the_bases_own_difference_and_needs_a_change(make):
    trainer = loaded(make(pair_objective="difference"))
    turns = turns_of(trainer)
    t = torch.tensor([script.draw_timestep(trainer.config, turn.visit) for turn in turns])
    n, _ = trainer.noised(turns, t)
    expected = (n.base(n.high) - n.base(n.low)).square().mean()
    losses = trainer.training_loss(turns)
    assert losses["forward"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert losses["backward"].item() == pytest.approx(expected.item(), rel=1e-4)
    same = [scene._replace(files=scene.files[:1] * 2) for scene in trainer.scenes]
    trainer.scenes = same
    losses = trainer.training_loss(turns)
    assert all(loss.item() < 1e-12 for loss in losses.values())
    assert all(g.abs().max() < 1e-9 for g in gradients(trainer, losses))


def test_the_halves_of_a_slider_cancel_where_nothing_changes(make):
    trainer = loaded(make())
    trainer.scenes = [s._replace(files=s.files[:1] * 2) for s in trainer.scenes]
    losses = trainer.training_loss(turns_of(trainer))
    one = gradients(trainer, {"after": losses["after"]})
    losses = trainer.training_loss(turns_of(trainer))
    both = [g.abs().max() for g in gradients(trainer, losses)]
    names = [n for n, p in trainer.bare["unet"].named_parameters() if p.requires_grad]
    most = {"down": 0.0, "up": 0.0}
    for name, gradient in zip(names, one, strict=True):
        end = name.split(".")[-2]
        most[end] = max(most[end], gradient.abs().max().item())
    assert most["up"] > 1e-4 and most["down"] == 0  # up is zero, so down has no gradient yet
    assert max(both) < 1e-6


def test_turned_around_difference_is_that_of_the_swapped_pair(make):
    trainer = shaken(loaded(make(pair_objective="difference")))
    turns = turns_of(trainer)
    losses = trainer.training_loss(turns)
    trainer.scenes = [
        scene._replace(files=scene.files[::-1], scales=scene.scales[::-1])
        for scene in trainer.scenes
    ]
    swapped = trainer.training_loss(turns)
    assert swapped["forward"].item() == pytest.approx(losses["backward"].item(), rel=1e-5)
    assert swapped["backward"].item() == pytest.approx(losses["forward"].item(), rel=1e-5)


def test_targets_and_the_base_get_no_gradient(make):
    trainer = shaken(loaded(make(pair_objective="difference")))
    turns = turns_of(trainer)
    noised, _ = trainer.noised(turns, torch.tensor([600, 20]))
    assert not any(term.target.requires_grad for term in script.difference(noised))
    first = gradients(trainer, trainer.training_loss(turns))
    noised.base(noised.low)  # a pass of the base in between
    again = gradients(trainer, trainer.training_loss(turns))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    trained = {id(p) for p in trainer.trained}
    others = [p for p in trainer.bare["unet"].parameters() if id(p) not in trained]
    assert others and all(p.grad is None and not p.requires_grad for p in others)


@pytest.mark.parametrize("objective", ["slider", "difference"])
def test_halves_one_after_the_other_are_the_whole(objective, make):
    trainer = shaken(loaded(make(pair_objective=objective)))
    turns = turns_of(trainer)
    whole = gradients(trainer, trainer.training_loss(turns))
    for name in trainer.training_loss(turns):
        trainer.training_loss(turns)[name].backward()
    halves = [p.grad for p in trainer.trained]
    for a, b in zip(whole, halves, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_with_a_region_what_lies_outside_has_no_gradient(make):
    trainer = loaded(make(region_weight=1.0))
    draw = torch.Generator().manual_seed(0)
    error = torch.randn(2, 4, 8, 8, generator=draw).requires_grad_()
    change = torch.zeros(2, 1, 8, 8)
    change[..., :3] = torch.rand(2, 1, 8, 3, generator=draw)
    (error**2 * script.region_weights(change, 1.0)).mean().backward()
    assert (error.grad[..., 3:] == 0).all() and (error.grad[..., :3] != 0).all()
    plain, weighted = {}, trainer.training_loss(turns_of(trainer))
    trainer.config = trainer.config.model_copy(update={"region_weight": 0.0})
    plain = trainer.training_loss(turns_of(trainer))
    assert weighted["after"].item() != pytest.approx(plain["after"].item(), rel=1e-3)
    even = torch.full((2, 1, 8, 8), 0.3)
    torch.testing.assert_close(script.region_weights(even, 1.0), torch.ones_like(even))


LEVELS = (550, 650, 750, 850, 950)


def fit_toy(objective, multiplier=1.0, steps=1000, one_noise=True):
    """(cosine, gain) of an adapter's effect at strength 1 with that of a whole change.

    The base knows N(0, I) in 16 dimensions, so its noise is s x; the adapter is a free vector for
    each of five timesteps; the whole change moves the noise by -s a (after - before).
    """
    draw = torch.Generator().manual_seed(1)
    alphas = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).alphas_cumprod[list(LEVELS)]
    before, after = torch.randn(2, 1, 16, 1, 1, generator=draw)
    vectors = torch.zeros(5, 16, 1, 1, requires_grad=True)
    optimizer = torch.optim.Adam([vectors], lr=0.03)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    scales = torch.full((1,), multiplier)
    for step in range(steps):
        level = step % 5
        alpha = alphas[level : level + 1]
        noise, other = torch.randn(2, 1, 16, 1, 1, generator=draw)
        low = script.add_noise_sd(before, noise if one_noise else other, alpha)
        high = script.add_noise_sd(after, noise, alpha)
        spread = (1 - alpha).sqrt()
        n = script.Noised(low, high, -scales, scales, noise, lambda x, s=spread: s * x)
        loss = 0.0
        for term in script.OBJECTIVES[objective](n):
            scale = torch.as_tensor(term.lane[0].scale)
            predicted = spread * term.noisy + scale * vectors[level]
            loss = loss + (predicted - term.target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    whole = -((1 - alphas) * alphas).sqrt().view(5, 1, 1, 1) * (after - before)
    found, whole = vectors.detach().flatten() * multiplier, whole.flatten()
    return (
        torch.cosine_similarity(found, whole, 0).item(),
        (found @ whole / (whole @ whole)).item(),
    )


def test_what_the_objectives_learn_where_the_answer_is_known():
    """A slider learns half of the change, the difference all of it, the after alone the picture."""
    cosine, gain = fit_toy("difference")
    assert cosine > 0.999 and gain == pytest.approx(1, abs=0.02)
    cosine, gain = fit_toy("difference", multiplier=0.25)
    assert cosine > 0.999 and gain == pytest.approx(1, abs=0.03)
    cosine, gain = fit_toy("slider")
    assert cosine > 0.999 and gain == pytest.approx(0.5, abs=0.02)
    assert fit_toy("slider", steps=200, one_noise=False)[0] < fit_toy("slider", steps=200)[0]
    assert fit_toy("instance")[0] < 0.8


def test_the_copied_adapter_gets_no_gradient_in_the_second_phase(make):
    trainer = shaken(loaded(make(pair_objective="copier")))
    trainer.step = trainer.total_steps() - 1
    losses = trainer.training_loss(turns_of(trainer))
    losses["change"].backward()
    for name, parameter in trainer.bare["unet"].named_parameters():
        if name.endswith("copied"):
            assert parameter.grad is None
        elif name.endswith("change"):
            assert parameter.grad.abs().max() > 0


# --- whole runs -----------------------------------------------------------------------------------


def same_files(a, b):
    ours, theirs = load_file(a), load_file(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("objective", ["slider", "difference", "copier", "joint"])
def test_resume_is_bit_exact(objective, make, tmp_path):
    make(tmp_path / "a", pair_objective=objective).fit()
    make(tmp_path / "b", pair_objective=objective).fit()
    shutil.rmtree(tmp_path / "b/out/checkpoint-4")
    make(tmp_path / "b", pair_objective=objective, resume_from_checkpoint="latest").fit()
    name = script.LORA_FILE
    assert same_files(tmp_path / "a/out" / name, tmp_path / "b/out" / name)
    lines = (tmp_path / "b/out/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]


@pytest.mark.parametrize("export", ["pytorch_lora_weights", "pytorch_lora_weights_kohya"])
def test_both_formats_load_in_diffusers_at_the_trained_strength(export, make, checkpoints):
    trainer = make(lora_rank=4, lora_alpha=2, train_text_encoder=True, export="kohya")
    trainer = shaken(loaded(trainer))
    trainer.save_result(calibrated=False)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(checkpoints["sd"])
    pipeline.load_lora_weights(str(trainer.config.output_dir), weight_name=f"{export}.safetensors")
    ids = script.tokenize(pipeline.tokenizer, ["a photo"])
    lane = [(script.On("change", 1.0),)]
    noisy, t = torch.randn(1, 4, 8, 8), torch.tensor([600])
    with torch.no_grad():
        theirs = pipeline.text_encoder(ids)[0]
        ours = trainer.embeds(["a photo"], lane, trainer.bare)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
        moved = pipeline.unet(noisy, t, encoder_hidden_states=theirs).sample
        mine = trainer.predict(trainer.bare["unet"], noisy, t, theirs, lane)
        plain = trainer.predict(trainer.bare["unet"], noisy, t, theirs, [()])
    torch.testing.assert_close(mine, moved, atol=1e-4, rtol=1e-3)
    assert (plain - mine).abs().max() > 1e-2
    if "kohya" in export:
        found = load_file(trainer.config.output_dir / f"{export}.safetensors")
        alphas = {value.item() for name, value in found.items() if name.endswith(".alpha")}
        assert alphas == {2.0} and all(
            name.startswith(("lora_unet_", "lora_te_")) for name in found
        )


@pytest.mark.parametrize("kind", ["pairs", "dreambooth"])
def test_the_documents_command(kind, checkpoints, pictures, tmp_path):
    """As it stands, but for the script's and the data's places, the model, 64 px and 3 steps."""
    text = (ROOT / f"tests/seeds/004_{kind}.sh").read_text().replace("\\\n", " ")
    for theirs, ours in {
        "accelerate launch lora/train_dreambooth_lora.py": "",
        "runwayml/stable-diffusion-v1-5": checkpoints["sd"],
        "data/before_images": pictures / "before",
        "data/after_images": pictures / "after",
        "data/single_images": pictures / "single",
        "lora_ckpt/": f"{tmp_path}/",
        "--resolution=512": "--resolution=64",
        "_steps=500": "_steps=3",
        "_steps=200": "_steps=3",
    }.items():
        text = text.replace(theirs, str(ours))
    argv = [*shlex.split(text), "--cache_dir", tmp_path / "cache"]
    run(ROOT / "train_dreambooth_pairs.py", *argv, launch=LAUNCH)
    (file,) = tmp_path.glob(f"*/{script.LORA_FILE}")
    tensors = load_file(file)
    assert next(t for n, t in tensors.items() if ".lora_A." in n).shape[0] == 16
    assert any(t.abs().max() > 0 for n, t in tensors.items() if ".lora_B." in n)


@pytest.mark.slow
def test_killed_and_resumed_it_ends_bit_equal(make, tmp_path):
    """SIGKILL before the first checkpoint, while one is written, and between two."""
    trainer = make(tmp_path / "straight", max_train_steps=12, random_flip=True, snr_gamma=5)
    trainer.fit()
    file = tmp_path / "config.yaml"
    settings = trainer.config.model_dump(mode="json", exclude_unset=True)
    out = tmp_path / "out"
    file.write_text(yaml.safe_dump(settings | {"output_dir": str(out)}))
    command = [sys.executable, script.__file__, "--config", str(file)]
    command += ["--resume_from_checkpoint", "latest"]
    reached = {
        "before the first": lambda: (out / "samples/pairs.png").exists(),
        "while writing": lambda: any(out.glob(".checkpoint-*.tmp")),
        "between": lambda: (out / "checkpoint-6").exists(),
    }
    killed = []
    for moment in reached.values():
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 90
        while not moment() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        killed.append(process.wait() == -signal.SIGKILL)
    assert sum(killed) >= 2, "the kills came too late to test anything"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "resumed from" in done.stderr, done.stderr[-3000:]
    assert same_files(trainer.config.output_dir / script.LORA_FILE, out / script.LORA_FILE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pairs", "copier", "subject"])
def test_two_processes_learn_what_one_learns_with_twice_the_batches(kind, make, pictures, tmp_path):
    settings = {
        "pairs": {"region_weight": 0.5, "train_text_encoder": True},
        "copier": {"pair_objective": "copier"},
        "subject": {
            "use_image_pairs": False, "before_data_dir": None, "after_data_dir": None,
            "instance_data_dir": pictures / "single", "class_data_dir": pictures / "before",
            "class_prompt": "a thing", "with_prior_preservation": True, "num_class_images": 3,
        },
    }[kind]  # fmt: skip
    settings |= {"learning_rate": 1e-3, "random_flip": True}
    single = make(tmp_path / "one", **settings, gradient_accumulation_steps=2)
    single.fit()
    given = single.config.model_dump(mode="json", exclude_unset=True)
    given |= {"output_dir": str(tmp_path / "two"), "gradient_accumulation_steps": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given))
    launch = [*LAUNCH, "--multi_gpu", "--num_processes", "2"]
    config = ["--config", tmp_path / "config.yaml"]
    run(script.__file__, *config, launch=launch, env={"CUDA_VISIBLE_DEVICES": ""})
    folders = single.config.output_dir, tmp_path / "two"
    ours, theirs = (load_file(folder / script.LORA_FILE) for folder in folders)
    assert any(tensor.abs().max() > 1e-4 for name, tensor in ours.items() if "lora_B" in name)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-5)


def test_a_compiled_unet_learns_the_same_and_is_compiled_once(make, monkeypatch):
    compiled = diffusers.UNet2DConditionModel.compile
    monkeypatch.setattr(
        diffusers.UNet2DConditionModel, "compile", lambda unet: compiled(unet, backend="eager")
    )
    losses = {}
    for compile in (False, True):
        trainer = loaded(make(compile=compile))
        losses[compile] = [trainer.training_loss(turns_of(trainer))]
        with torch.compiler.set_stance("fail_on_recompile" if compile else "default"):
            losses[compile] += [trainer.training_loss(turns_of(trainer, n)) for n in (1, 2)]
    for plain, other in zip(*losses.values(), strict=True):
        torch.testing.assert_close(plain, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("targets", ["transformer", "self-attention+conv"])
def test_kohya_files_of_convolutions_come_back_equal(targets, make):
    """Read as WebUIs read them: strength = alpha / rank, up times down."""
    trainer = make(lora_rank=4, lora_alpha=1, target_modules=targets, export="kohya")
    trainer = shaken(loaded(trainer))
    trainer.save_result(calibrated=False)
    found = load_file(trainer.config.output_dir / script.KOHYA_FILE)
    layers = script.adapted_layers(trainer.bare["unet"], "change")
    kernels = set()
    for path, layer in layers.items():
        name = f"lora_unet_{path.replace('.', '_')}"
        down, up = found.pop(f"{name}.lora_down.weight"), found.pop(f"{name}.lora_up.weight")
        assert found.pop(f"{name}.alpha").item() == 1.0
        change = (up.flatten(1) @ down.flatten(1)) / 4
        ours = layer.up["change"].flatten(1) @ layer.down["change"].flatten(1) / 4
        torch.testing.assert_close(change, ours.detach(), atol=1e-6, rtol=1e-5)
        kernels.add(tuple(down.shape[2:]))
    assert not found and len(layers) > 20
    assert kernels == ({(), (1, 1)} if targets == "transformer" else {(), (1, 1), (3, 3)})


def test_the_cache_can_be_filled_ahead(make, pictures, tmp_path, monkeypatch, capsys):
    config = make(before_data_dir=None, after_data_dir=None, resolution=64).config
    monkeypatch.setitem(sys.modules, "train_dreambooth_pairs", script)  # and back afterwards
    settings = config.model_dump(mode="json", exclude_unset=True, exclude={"cache_dir"})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    sides = [str(pictures / "before"), str(pictures / "after")]

    def command(*flags):
        argv = ["cache_embeddings.py", "--script", script.__file__]
        argv += ["--config", str(tmp_path / "config.yaml"), "--sequence_dirs", *sides, *flags]
        monkeypatch.setattr(sys, "argv", [*argv, "--cache_dir", str(tmp_path / "other")])
        cache_embeddings.main()
        return capsys.readouterr().out

    assert "process 0: 7 entries encoded" in command()  # six pictures, a prompt
    assert "process 0: 0 entries encoded" in command()
    assert "missing: 0 of 7" in command("--stats")
    entry = cache_embeddings.entry_files(tmp_path / "other")[3]
    entry.write_bytes(entry.read_bytes()[:-8])
    out = command("--verify")
    assert "verified: 1 damaged" in out and "1 entries encoded" in out
    assert "missing: 6 of 13" in command("--stats", "--random_flip")


SCENARIOS = sorted((ROOT / "configs").glob("dreambooth_*.yaml"))


@pytest.mark.parametrize("file", SCENARIOS, ids=lambda p: p.stem)
def test_a_scenario_trains_as_it_stands_and_says_why(file, checkpoints, tmp_path, monkeypatch):
    """Only the model, the size and the number of steps are replaced."""
    text = file.read_text()
    assert not list(unexplained(yaml.compose(text), text.splitlines()))
    monkeypatch.chdir(tmp_path)
    argv = ["--config", str(file), f"--pretrained_model_name_or_path={checkpoints['sd']}"]
    argv += ["--resolution=64", "--max_train_steps=2", "--validation_inference_steps=2"]
    config = load_config(script.Config, argv)
    for number, (_, folder) in enumerate(config.stages):
        for name in NAMES:
            photo = next(
                f for f in PAIRS.glob(f"{name}_{'RT'[number % 2]}.*") if f.suffix != ".txt"
            )
            folder.mkdir(parents=True, exist_ok=True)
            Image.open(photo).convert("RGB").rotate(90 * (number // 2)).save(folder / f"{name}.png")
    config = load_config(script.Config, argv, script.audit)
    script.DreamBoothPairsTrainer(config).fit()
    assert (config.output_dir / "samples/step-000002.png").exists()
    assert any(
        tensor.abs().max() > 0
        for tensor in load_file(config.output_dir / script.LORA_FILE).values()
    )


def test_the_scenarios_differ_for_a_reason():
    chosen = [yaml.safe_load(file.read_text()) for file in SCENARIOS]
    assert len(SCENARIOS) == 4 and len({config["instance_prompt"] for config in chosen}) == 4
    for one, other in itertools.combinations(chosen, 2):
        keys = {"timestep_min", "timestep_max", "region_weight", "random_flip", "noise_offset"}
        keys |= {"pair_objective", "target_modules", "loss_type", "sequence_dirs"}
        assert sum(one.get(key) != other.get(key) for key in keys) >= 3


def test_class_pictures_are_drawn_and_keep_the_class(make, pictures, tmp_path):
    trainer = make(
        use_image_pairs=False,
        before_data_dir=None,
        after_data_dir=None,
        instance_data_dir=pictures / "single",
        class_data_dir=tmp_path / "class",
        class_prompt="a thing",
        with_prior_preservation=True,
        num_class_images=3,
        sample_batch_size=2,
    )
    trainer.fit()
    assert len(list((tmp_path / "class").glob("*.png"))) == 3
    turns = turns_of(trainer)
    half = trainer.training_loss(turns)
    assert set(half) == {"instance", "class"}
    trainer.config = trainer.config.model_copy(update={"prior_loss_weight": 0.5})
    assert trainer.training_loss(turns)["class"].item() == pytest.approx(half["class"].item() / 2)


def test_a_sequence_trains_all_its_times(make, pictures, tmp_path):
    shutil.copytree(pictures / "single", tmp_path / "third")
    for file in (tmp_path / "third").glob("*.png"):
        Image.open(file).rotate(180).save(file)
    (tmp_path / "third" / "coffee0.png").unlink()  # a sequence may have holes
    folders = [
        str(folder) for folder in (pictures / "before", pictures / "after", tmp_path / "third")
    ]
    argv = script.repeat_flags(["--sequence_dirs", *folders, "--sequence_scales", "-1,0,1"])
    other = make(before_data_dir=None, after_data_dir=None).config
    config = load_config(
        script.Config,
        [
            *argv,
            *(
                f"--{k}={getattr(other, k)}"
                for k in other.model_fields_set
                if k != "use_image_pairs"
            ),
            "--use_image_pairs",
        ],
    )
    scenes, _, problems = script.find_scenes(config)
    assert not problems and [s.scales for s in scenes] == [(-1, 0, 1), (-1, 0), (-1, 0, 1)]
    trainer = script.DreamBoothPairsTrainer(config)
    trainer.fit()
    turns = [turn for batch in range(20) for turn in turns_of(trainer, batch)]
    assert {(t.low, t.high) for t in turns} == {(0, 1), (0, 2), (1, 2)}


def problems_of(make, **changes):
    config = make(**changes).config
    return "\n".join(script.audit(config))


def test_mistakes_are_named_before_a_model_loads(make, pictures, tmp_path):
    text = problems_of(make, after_data_dir=pictures / "before")
    assert "before and after must differ" in text
    (tmp_path / "empty").mkdir()
    text = problems_of(make, after_data_dir=tmp_path / "empty")
    assert "No matching image pairs found: 3 stems in" in text and "0 stems in" in text
    text = problems_of(make, before_data_dir=tmp_path / "nowhere")
    assert f"Before/After images root doesn't exist: {tmp_path / 'nowhere'}" in text
    shutil.copytree(pictures / "before", tmp_path / "copy")
    assert text.count("\n") == 0
    text = problems_of(make, after_data_dir=tmp_path / "copy")
    assert text.count("are the same picture: no change to learn") == 3
    Image.open(tmp_path / "copy/hubble0.png").save(tmp_path / "copy/hubble0.bmp")
    (tmp_path / "copy/hubble0.png").unlink()  # other bytes, the same pixels
    (tmp_path / "copy/coffee0.png").write_bytes(b"")
    (tmp_path / "copy/chelsea0.png").unlink()
    text = problems_of(make, after_data_dir=tmp_path / "copy", timestep_min=500, timestep_max=100)
    for part in (
        "chelsea0.* in",
        "coffee0.png cannot be read",
        "timestep_min",
        "hubble0.bmp are the same",
    ):
        assert part in text
    with pytest.raises(UserError, match="unknown setting, did you mean 'before_data_dir'"):
        make(before_data_dirs="x")


def write_video(path, frames):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 64, "yuv420p", 4_000_000
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def test_frames_of_a_video_are_pairs_but_not_over_a_cut_or_when_nothing_moves(make, tmp_path):
    """12 frames that grow brighter from left to right, a cut, 12 that stand still."""
    ramp = np.linspace(0, 60, 64)[None, :, None].repeat(64, 0).repeat(3, 2)
    frames = [(ramp + 8 * n).astype(np.uint8) for n in range(12)]
    frames += [np.full((64, 64, 3), 250, np.uint8)] * 12
    write_video(tmp_path / "clip.mp4", frames)
    missing = {"before_data_dir": None, "after_data_dir": None, "frame_gap": 4}
    trainer = make(**missing, video=tmp_path / "clip.mp4", max_train_steps=2)
    scenes, left_out, problems = script.find_scenes(trainer.config)
    names = [scene.name for scene in scenes]
    assert not problems and names == [f"{n:05d}-{n + 4:05d}" for n in (0, 2, 4, 6)]
    assert sum("a cut" in text for text in left_out) == 2
    assert sum("nothing changes" in text for text in left_out) == 4
    low, high = (np.asarray(Image.open(f), float).mean() for f in scenes[0].files)
    assert high - low == pytest.approx(32, abs=3)
    trainer.fit()
    assert (trainer.config.output_dir / script.LORA_FILE).exists()
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    text = problems_of(make, **missing, video=tmp_path / "broken.mp4")
    assert "broken.mp4 cannot be read" in text and "\n" not in text
    (folder,) = (trainer.config.cache_dir / "video").glob("[!.]*")
    assert len(list(folder.glob("*.png"))) == 12  # every other frame


def test_a_video_that_is_not_there_is_named(make, tmp_path):
    missing = {"before_data_dir": None, "after_data_dir": None, "video": tmp_path / "no.mp4"}
    assert problems_of(make, **missing) == f"video: no file {tmp_path / 'no.mp4'}"


def test_validation_draws_what_the_pipeline_draws(make, checkpoints):
    flags = {"validation_prompt": "a photo", "num_validation_images": 1}
    trainer = shaken(loaded(make(**flags, validation_inference_steps=3)))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(checkpoints["sd"])
    config = pipeline.scheduler.config
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = pipeline(
        "a photo", num_inference_steps=3, guidance_scale=7.5, latents=noise, output_type="latent"
    ).images
    predict = trainer.guided(["a photo", ""])
    ours = script.draw_sd(predict, noise, trainer.scheduler_config, 3, [-1.0, 0.0, 1.0])
    torch.testing.assert_close(ours[1:2], theirs, atol=1e-4, rtol=1e-3)
    assert (ours[0] - ours[1]).abs().max() > 0.1 and (ours[0] - ours[2]).abs().max() > 0.1
    trainer.validate()
    sheet = Image.open(trainer.config.output_dir / "samples/step-000000.png")
    cells = [sheet.crop((8 + k * 264, 24, 72 + k * 264, 88)).tobytes() for k in range(5)]
    assert len(set(cells)) == 5


def test_a_mistake_ends_with_exit_code_2(checkpoints, tmp_path):
    done = run(
        ROOT / "train_dreambooth_pairs.py",
        "--pretrained_model_name_or_path", checkpoints["flux"],
        "--use_image_pairs", "--before_data_dir", tmp_path / "a",
        "--after_data_dir", tmp_path / "b", cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "is a FluxPipeline; wanted Stable Diffusion" in done.stderr
    assert "Before/After images root doesn't exist" in done.stderr


def test_flags_of_the_diffusers_script_that_are_not_needed_are_explained(make):
    with pytest.raises(UserError) as caught:
        make(dataloader_num_workers=4, push_to_hub=True, lora_dropouts=0.1)
    text = str(caught.value)
    assert "dataloader_num_workers: no setting: latents are cached" in text
    assert "push_to_hub: no setting: upload it afterwards" in text
    assert not script.NOT_HERE.keys() & script.Config.model_fields.keys()


def test_validation_comes_every_so_many_epochs(make, monkeypatch):
    trainer = make(validation_epochs=2, max_train_steps=9, checkpointing_steps=100)
    seen = []
    monkeypatch.setattr(trainer, "validate", lambda: seen.append(trainer.step))
    trainer.fit()
    assert seen == [4, 8, 9]  # three pairs in batches of two: an epoch is two steps
    assert "give one" in problems_of(make, validation_epochs=2, validation_steps=3)


@pytest.mark.parametrize("multiplier", [1.0, 0.25])
def test_calibration_finds_the_strength_of_one_full_change(multiplier, make):
    """A base that knows N(0, 1), and an adapter that moves it by the change at strength 1.7.

    An edit from timestep 801 on goes 1 - alphas_cumprod of the way (a closed form).
    """
    trainer = loaded(make(pair_objective="difference", pair_multiplier=multiplier))
    scene = trainer.scenes[0]
    pictures = script.fit_scene(trainer.config, scene, trainer.index)
    low, high = (trainer.entry(picture)["latent"] for picture in pictures)

    def predict(unet, noisy, t, embeds, lanes):
        alpha = trainer.alphas[t[0]]
        strength = lanes[0][0].scale / (1.7 * multiplier) if lanes[0] else torch.zeros(1)
        moved = alpha.sqrt() * strength.view(-1, 1, 1, 1) * (high - low)
        return (1 - alpha).sqrt() * (noisy - moved)

    trainer.predict, trainer.scenes = predict, [scene]
    wanted = 1.7 * multiplier / (1 - trainer.alphas[801].item())
    assert trainer.full_change(steps=100) == pytest.approx(wanted, rel=0.02)
    assert trainer.full_change() == pytest.approx(wanted, rel=0.1)


def test_an_adapter_that_learnt_nothing_keeps_its_strength(make, caplog):
    trainer = shaken(loaded(make(pair_objective="difference", pair_multiplier=0.5)))
    for parameter in trainer.trained:
        parameter.data *= 1e-3
    assert trainer.full_change() == 1.0
    assert "train longer" in caplog.text


def test_another_base_in_its_place_is_no_base_to_go_on_with(make, checkpoints, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(checkpoints["sd"], base)
    make(pretrained_model_name_or_path=base, max_train_steps=2).fit()
    file = base / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.bias"] += 1
    save_file(weights, file)
    with pytest.raises(UserError, match="another model lies there now"):
        make(
            pretrained_model_name_or_path=base, max_train_steps=4, resume_from_checkpoint="latest"
        ).fit()
