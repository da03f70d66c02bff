"""train_dreambooth_pairs.py: what pairs teach, whole runs, what they leave."""

import functools
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import diffusers
import pytest
import torch
import yaml
from conftest import PAIRS, ROOT, launch, run
from PIL import Image
from safetensors.torch import load_file, save_file

import cache_embeddings
import train_dreambooth_pairs as script
from utils import UserError, load_config

NAMES = ("chelsea0", "coffee0", "hubble0")
NO_PAIRS = {"use_image_pairs": False, "before_data_dir": None, "after_data_dir": None}
ALPHAS = diffusers.DDPMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
).alphas_cumprod


def photo(name, role):
    return next(f for f in PAIRS.glob(f"{name}_{role}.*") if f.suffix != ".txt")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """before/, after/ and single/ of three photos."""
    folder = tmp_path_factory.mktemp("pictures")
    for (place, role), name in itertools.product(
        (("before", "R"), ("after", "T"), ("single", "T")), NAMES
    ):
        (folder / place).mkdir(exist_ok=True)
        Image.open(photo(name, role)).convert("RGB").save(folder / place / f"{name}.png")
    return folder


def command_line(checkpoints, pictures, folder, **changes):
    """The flags of a quick run on the pairs: CPU, fp32, 64 px."""
    settings = {
        "pretrained_model_name_or_path": checkpoints["sd"],
        "use_image_pairs": True,
        "before_data_dir": pictures / "before",
        "after_data_dir": pictures / "after",
        "instance_prompt": "a photo",
        "output_dir": folder / "out",
        "cache_dir": pictures / "cache",  # the same for all tests: encoded once
        "resolution": 64,
        "train_batch_size": 2,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "learning_rate": 1e-2,
        **changes,
    }
    return [f"--{k}={v}" for k, v in settings.items() if v is not None]


@pytest.fixture(scope="session")
def flags(checkpoints, pictures):
    """flags(folder, **changes) -> a command line."""
    return functools.partial(command_line, checkpoints, pictures)


@pytest.fixture
def make(checkpoints, pictures, tmp_path):
    """make(**flags) -> trainer."""

    def build(folder=tmp_path, **changes):
        argv = command_line(checkpoints, pictures, folder, **changes)
        return script.SDTrainer(load_config(script.Config, argv))

    return build


@pytest.fixture(scope="session")
def straight(flags, tmp_path_factory):
    """The folder of a finished run: checkpoints at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("straight")
    script.SDTrainer(load_config(script.Config, flags(folder))).fit()
    return folder / "out"


def loaded(trainer, seed=None):
    """The trainer with data, cache and models; with a seed, adapters that change the output."""
    trainer.setup_accelerator()
    trainer.find_data()
    trainer.cache_embeddings()
    trainer.load_models()
    if seed is not None:
        draw = torch.Generator().manual_seed(seed)
        for parameter in trainer.trained:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1
    return trainer


def predict(trainer, noisy, t, embeds, parts):
    trainer.switch.parts = parts
    return script.predict_noise(trainer.models["unet"], noisy, t, embeds)


def losses_of(trainer, batch=0):
    return script.compute_losses(trainer, script.draw_batch(trainer, batch))


def gradients(trainer, losses):
    torch.stack(list(losses.values())).sum().backward()
    found = [p.grad.clone() for p in trainer.trained]
    for parameter in trainer.trained:
        parameter.grad = None
    return found


def same_files(a, b):
    ours, theirs = load_file(a), load_file(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def on(scale=1.0):
    return (script.Active("change", scale),)


# --- formulas -------------------------------------------------------------------------------------


def noised(low, high, t=600, base=None):
    noise = torch.randn(low.shape, generator=torch.Generator().manual_seed(1))
    alpha = ALPHAS[t].expand(len(low))
    scales = torch.full((len(low),), -1.0), torch.full((len(low),), 1.0)
    both = (script.mix_noise(x, noise, alpha) for x in (low, high))
    return script.Noised(*both, *scales, noise, base or (lambda x: x * 0)), ALPHAS[t]


def test_alphas_and_snr_weights_are_those_of_stable_diffusion():
    alphas = ALPHAS.double()
    known = {0: 0.999150, 20: 0.981314, 200: 0.753692, 500: 0.276333, 999: 0.004660}
    for t, value in known.items():
        assert alphas[t].item() == pytest.approx(value, abs=2e-6)
    five, one = (script.snr_weight(alphas, gamma) for gamma in (5, 1))
    assert five[[0, 1, 20]].tolist() == pytest.approx([0.00425, 0.00853, 0.09521], abs=1e-5)
    assert (five[200:] == 1).all() and (one[380:] == 1).all()
    assert one[[20, 200, 300]].tolist() == pytest.approx([0.01904, 0.32680, 0.69348], abs=2e-5)
    assert (script.snr_weight(alphas, float("inf")) == 1).all()


def test_the_objectives_are_their_formulas():
    low, high = torch.randn(2, 2, 4, 8, 8)
    n, alpha = noised(low, high, base=lambda x: 3 * x)
    torch.testing.assert_close(n.low, n.high - alpha.sqrt() * (high - low))  # the change alone
    after, before = script.slider(n)
    assert torch.equal(after.noisy, n.high) and torch.equal(before.noisy, n.low)
    forward, backward = script.difference(n)
    assert torch.equal(forward.noisy, n.high) and torch.equal(forward.target, 3 * n.low)
    assert torch.equal(backward.noisy, n.low) and torch.equal(backward.target, 3 * n.high)
    for each, scale in ((after, 1), (before, -1), (forward, 1), (backward, -1)):
        assert each.active[0].scale.tolist() == [scale, scale]
    true_noise = (after, before, *script.joint(n), *script.instance(n))
    assert {id(each.target) for each in true_noise} == {id(n.noise)}
    assert [each.active for each in script.joint(n)] == [on(), on()]


def test_huber_is_the_square_near_zero_and_a_line_far_away():
    small, large = torch.tensor([1e-3]).double(), torch.tensor([100.0])
    assert script.huber_error(small, 0.1).item() == pytest.approx(1e-6, rel=1e-2)
    slope = script.huber_error(large + 1, 0.1) - script.huber_error(large, 0.1)
    assert slope.item() == pytest.approx(0.2, rel=1e-3)


def test_region_weights_have_mean_one_and_follow_the_change(make):
    change = torch.zeros(1, 1, 4, 4)
    change[..., :2, :2] = 0.5
    assert torch.equal(script.region_weights(change, 0.0), torch.ones_like(change))
    weights = script.region_weights(change, 1.0)
    assert weights.mean().item() == pytest.approx(1) and (weights[..., 2:, :] == 0).all()
    assert script.region_weights(change, 0.5)[0, 0, 3, 3].item() == pytest.approx(0.5)
    error = torch.rand(1, 1, 4, 4).requires_grad_()
    (error**2 * weights).mean().backward()
    assert (error.grad[..., 2:, :] == 0).all() and (error.grad[..., :2, :2] != 0).all()
    weighted, plain = (losses_of(loaded(make(region_weight=share))) for share in (1.0, 0.0))
    assert weighted["after"].item() != pytest.approx(plain["after"].item(), rel=1e-3)


def test_snr_gamma_weighs_the_loss(make):
    at = {"timestep_min": 20, "timestep_max": 20}
    weighted, plain = (losses_of(loaded(make(snr_gamma=gamma, **at))) for gamma in (5, None))
    for name, loss in plain.items():
        assert weighted[name].item() == pytest.approx(0.09521 * loss.item(), rel=1e-3)


def test_noise_offset_shifts_whole_channels(make):
    noises = []
    for strength in (0.0, 0.5):
        trainer, t = loaded(make(noise_offset=strength)), torch.tensor([600, 20])
        draws = [script.draw_batch(trainer, batch) for batch in range(20)]
        noises.append(torch.cat([script.noised_batch(trainer, d, t)[0].noise for d in draws]))
    shift = noises[1] - noises[0]
    torch.testing.assert_close(shift, shift[..., :1, :1].expand_as(shift), atol=1e-6, rtol=0)
    for dim in (0, 1):  # every sample has its own, and every channel
        assert shift[..., 0, 0].std(dim).mean().item() == pytest.approx(0.5, rel=0.2)


def test_gradients_are_scaled_down_to_max_grad_norm(make):
    trainer, norms = loaded(make(), seed=0), []
    step = trainer.optimizer.step

    def noted():
        norms.append(torch.cat([p.grad.flatten() for p in trainer.trained]).norm().item())
        step()

    trainer.optimizer.step = noted
    for limit in (1e-3, 1e6):
        trainer.config = trainer.config.model_copy(update={"max_grad_norm": limit})
        script.train_step(trainer)
    assert norms[0] == pytest.approx(1e-3, rel=1e-2) and 1e-2 < norms[1] < 1e6


def test_timesteps_are_spread_over_the_range_and_never_collapse(make):
    config = make(timestep_min=200, timestep_max=399).config
    drawn = [script.draw_timestep(config, visit) for visit in range(1000)]
    assert min(drawn) < 203 and max(drawn) > 396 and min(drawn) >= 200 and max(drawn) <= 399
    for start in range(0, 1000, 10):
        assert sorted((t - 200) // 20 for t in drawn[start : start + 10]) == list(range(10))
    assert len(set(drawn)) > 190
    ends = make(timestep_min=999, timestep_max=999).config
    assert {script.draw_timestep(ends, visit) for visit in range(20)} == {999}


def test_every_sample_is_seen_equally_often_and_batches_are_of_one_shape():
    shapes = ["square"] * 5 + ["wide"] * 2 + ["tall"]
    batches = script.Batches(shapes, 3, seed=0)
    drawn = [batches[number] for number in range(4 * 8)]
    assert all(len({shapes[sample] for sample in batch}) == 1 for batch in drawn)
    assert Counter(sample for batch in drawn for sample in batch) == dict.fromkeys(range(8), 12)
    assert drawn[:8] != drawn[8:16] and len({tuple(sorted(b)) for b in drawn[:8]}) > 3
    assert script.Batches(shapes, 3, seed=0)[17] == drawn[17]
    assert [script.Batches(shapes, 3, seed=1)[n] for n in range(8)] != drawn[:8]


def test_both_sides_of_a_pair_get_one_transform(make, tmp_path):
    """A picture of coordinates, wide, flipped and cropped: the sides stay pixel upon pixel."""
    y, x = torch.meshgrid(torch.arange(150), torch.arange(240), indexing="ij")
    grid = Image.fromarray(torch.stack([x, y, torch.zeros_like(x)], -1).to(torch.uint8).numpy())
    for side, image in (("before", grid), ("after", grid.resize((480, 300)))):
        (tmp_path / side).mkdir()
        image.save(tmp_path / side / "grid.png")
    sides = {f"{side}_data_dir": tmp_path / side for side in ("before", "after")}
    trainer = make(**sides, resolution=128)
    trainer.setup_accelerator()
    trainer.find_data()
    for flip in (False, True):
        sample = trainer.samples[0]._replace(flip=flip)
        low, high = (script.to_pixels(image) for image in script.load_pictures(sample))
        assert low.shape == high.shape and (low - high).abs().mul(127.5).max() < 3
        assert bool(low[0, 0, 64, -1] < low[0, 0, 64, 0]) == flip


# --- the adapter ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "layers", "per_rank"), [("attention", 128, 199_296), ("transformer", 192, 423_936)]
)
def test_layers_and_parameters_of_stable_diffusion(targets, layers, per_rank):
    from accelerate import init_empty_weights

    with init_empty_weights():
        unet = diffusers.UNet2DConditionModel(
            cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
        )
        script.add_adapter(unet, script.AdapterSwitch(), "change", script.TARGETS[targets], 4, 4)
    found = script.adapted_layers(unet, "change")
    numbers = sum(x.down["change"].numel() + x.up["change"].numel() for x in found.values())
    assert len(found) == layers and numbers == 4 * per_rank


def test_an_empty_adapter_changes_no_bit_and_one_that_is_off_neither(make):
    trainer = loaded(make(target_modules="self-attention+conv"))
    noisy, t, embeds = torch.randn(2, 4, 8, 8), torch.tensor([600, 20]), torch.randn(1, 77, 32)
    plain = predict(trainer, noisy, t, embeds, [()])
    for scale in (1.0, -3.0):
        assert torch.equal(plain, predict(trainer, noisy, t, embeds, [on(scale)]))
    for parameter in trainer.trained:
        parameter.data += 0.1
    assert not torch.equal(plain, predict(trainer, noisy, t, embeds, [on()]))
    assert torch.equal(plain, predict(trainer, noisy, t, embeds, [()]))


def test_two_parts_are_two_passes(make):
    trainer = loaded(make(), seed=0)
    x, embeds, t = torch.randn(2, 4, 8, 8), torch.randn(1, 77, 32), torch.tensor([600])
    parts = [on(), on(-1.0)]
    together = predict(trainer, x, t.repeat(2), embeds, parts)
    alone = [predict(trainer, x[i : i + 1], t, embeds, [parts[i]]) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kernel", [None, 1, 3], ids=["linear", "1 x 1", "3 x 3"])
def test_an_adapter_is_a_change_of_the_weights_and_linear_in_strength(kernel):
    base = torch.nn.Linear(6, 5)
    if kernel:
        base = torch.nn.Conv2d(6, 5, kernel, stride=2, padding=kernel // 2)
    model = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"b": base})})
    switch = script.AdapterSwitch()
    script.add_adapter(model, switch, "change", ("b",), 3, 1.5)
    layer = model["a"]["b"]
    draw = torch.Generator().manual_seed(0)
    layer.up["change"].data = torch.randn(layer.up["change"].shape, generator=draw)
    x = torch.randn(4, 6, 8, 8) if kernel else torch.randn(4, 7, 6)
    tensors = script.adapter_tensors({"unet": model}, "change", factor=1.0)
    down, up = (tensors[f"unet.a.b.lora_{k}.weight"] for k in "AB")
    change = (up.flatten(1) @ down.flatten(1)).view_as(base.weight)
    plain = base.weight.detach().clone()
    for scale in (1.0, -2.5):
        switch.parts = [on(scale)]
        found = layer(x)
        base.weight.data = plain + scale * change
        switch.parts = [()]
        torch.testing.assert_close(found, layer(x), atol=1e-5, rtol=1e-5)
        base.weight.data = plain
    twice = script.adapter_tensors({"unet": model}, "change", factor=2.0)
    torch.testing.assert_close(twice["unet.a.b.lora_B.weight"], 2 * up)


def test_gradients_are_finite_differences(make):
    """Central differences in float64, of the loss of a slider on a whole UNet."""
    trainer = loaded(make(train_batch_size=1), seed=0)
    unet = trainer.models["unet"].double()
    draw = torch.Generator().manual_seed(0)
    noisy, noise = torch.randn(2, 2, 4, 8, 8, generator=draw, dtype=torch.float64)
    text = torch.randn(2, 77, 32, generator=draw, dtype=torch.float64)
    trainer.switch.parts = [on(), on(-1.0)]

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


def without_change(trainer):
    """Both sides of every sample become its first one."""
    trainer.samples = [
        s._replace(content=s.content[:1] * 2, files=s.files[:1] * 2) for s in trainer.samples
    ]
    trainer.cache_embeddings()
    return trainer


def test_difference_starts_at_the_bases_own_difference_and_needs_a_change(make):
    trainer = loaded(make(pair_objective="difference"))
    draws = script.draw_batch(trainer, 0)
    t = torch.tensor([script.draw_timestep(trainer.config, draw.visit) for draw in draws])
    n, _ = script.noised_batch(trainer, draws, t)
    expected = (n.base(n.high) - n.base(n.low)).square().mean()
    losses = losses_of(trainer)
    assert losses["forward"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert losses["backward"].item() == pytest.approx(expected.item(), rel=1e-4)
    losses = losses_of(without_change(trainer))
    assert all(loss.item() < 1e-12 for loss in losses.values())
    assert all(g.abs().max() < 1e-9 for g in gradients(trainer, losses))


def test_the_halves_of_a_slider_cancel_where_nothing_changes(make):
    trainer = without_change(loaded(make()))
    one = gradients(trainer, {"after": losses_of(trainer)["after"]})
    both = gradients(trainer, losses_of(trainer))
    names = [n for n, p in trainer.models["unet"].named_parameters() if p.requires_grad]
    most = {"down": 0.0, "up": 0.0}
    for name, gradient in zip(names, one, strict=True):
        end = name.split(".")[-2]
        most[end] = max(most[end], gradient.abs().max().item())
    assert most["up"] > 1e-4 and most["down"] == 0  # up is zero, so down has no gradient yet
    assert max(g.abs().max() for g in both) < 1e-6


def test_turned_around_difference_is_that_of_the_swapped_pair(make):
    trainer = loaded(make(pair_objective="difference"), seed=0)
    losses = losses_of(trainer)
    trainer.samples = [
        s._replace(files=s.files[::-1], content=s.content[::-1], scales=s.scales[::-1])
        for s in trainer.samples
    ]
    trainer.cache_embeddings()
    swapped = losses_of(trainer)
    assert swapped["forward"].item() == pytest.approx(losses["backward"].item(), rel=1e-5)
    assert swapped["backward"].item() == pytest.approx(losses["forward"].item(), rel=1e-5)


def test_targets_and_the_base_get_no_gradient(make):
    trainer = loaded(make(pair_objective="difference"), seed=0)
    n, _ = script.noised_batch(trainer, script.draw_batch(trainer, 0), torch.tensor([600, 20]))
    assert not any(each.target.requires_grad for each in script.difference(n))
    first = gradients(trainer, losses_of(trainer))
    n.base(n.low)  # a pass of the base in between
    again = gradients(trainer, losses_of(trainer))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    trained = {id(p) for p in trainer.trained}
    others = [p for p in trainer.models["unet"].parameters() if id(p) not in trained]
    assert others and all(p.grad is None and not p.requires_grad for p in others)


@pytest.mark.parametrize("objective", ["slider", "difference"])
def test_halves_one_after_the_other_are_the_whole(objective, make):
    trainer = loaded(make(pair_objective=objective), seed=0)
    whole = gradients(trainer, losses_of(trainer))
    for name in losses_of(trainer):
        losses_of(trainer)[name].backward()
    for a, b in zip(whole, [p.grad for p in trainer.trained], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def fit_toy(objective, multiplier=1.0, steps=1000, one_noise=True):
    """(cosine, gain) of an adapter's effect at strength 1 with that of a whole change.

    The base knows N(0, I) in 16 dimensions, so its noise is s x; the adapter is a free vector for
    each of five timesteps; the whole change moves the noise by -s a (after - before).
    """
    draw = torch.Generator().manual_seed(1)
    alphas = ALPHAS[[550, 650, 750, 850, 950]]
    before, after = torch.randn(2, 1, 16, 1, 1, generator=draw)
    vectors = torch.zeros(5, 16, 1, 1, requires_grad=True)
    optimizer = torch.optim.Adam([vectors], lr=0.03)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    scales = torch.full((1,), multiplier)
    for step in range(steps):
        level = step % 5
        alpha = alphas[level : level + 1]
        noise, other = torch.randn(2, 1, 16, 1, 1, generator=draw)
        low = script.mix_noise(before, noise if one_noise else other, alpha)
        high = script.mix_noise(after, noise, alpha)
        spread = (1 - alpha).sqrt()
        n = script.Noised(low, high, -scales, scales, noise, lambda x, s=spread: s * x)
        loss = 0.0
        for each in script.OBJECTIVES[objective](n):
            scale = torch.as_tensor(each.active[0].scale)
            predicted = spread * each.noisy + scale * vectors[level]
            loss = loss + (predicted - each.target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    whole = (-((1 - alphas) * alphas).sqrt().view(5, 1, 1, 1) * (after - before)).flatten()
    found = vectors.detach().flatten() * multiplier
    return torch.cosine_similarity(found, whole, 0).item(), (found @ whole / (whole @ whole)).item()


def test_what_the_objectives_learn_where_the_answer_is_known():
    """A slider learns half of the change, the difference all of it, the after alone the picture."""
    for objective, multiplier, expected in (
        ("difference", 1.0, 1.0),
        ("difference", 0.25, 1.0),
        ("slider", 1.0, 0.5),
    ):
        cosine, gain = fit_toy(objective, multiplier)
        assert cosine > 0.999 and gain == pytest.approx(expected, abs=0.03)
    assert fit_toy("slider", steps=200, one_noise=False)[0] < fit_toy("slider", steps=200)[0]
    assert fit_toy("instance")[0] < 0.8


# --- whole runs -----------------------------------------------------------------------------------


def test_an_ablation_is_one_function(make, monkeypatch):
    """The example of the page, named in OBJECTIVES."""

    def keeps_before(n):
        keep = script.Pass("keep", n.low, n.base(n.low), on(), weight=0.5)
        return [*script.difference(n), keep]

    monkeypatch.setitem(script.OBJECTIVES, "keeps_before", keeps_before)
    trainer = make(pair_objective="keeps_before", max_train_steps=1)
    trainer.fit()
    assert any(t.abs().max() > 0 for t in trainer.trained)
    lines = (trainer.config.output_dir / "metrics.jsonl").read_text().splitlines()
    assert {"loss", "forward", "backward", "keep", "lr"} <= json.loads(lines[-1]).keys()


def test_resume_is_bit_exact_for_a_plain_run(straight, make, tmp_path):
    shutil.copytree(straight, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/checkpoint-4")
    make(resume_from_checkpoint="latest").fit()
    assert same_files(straight / script.LORA_FILE, tmp_path / "out" / script.LORA_FILE)
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]
    assert (tmp_path / "out/samples/pairs.png").exists()


def test_ctrl_c_finishes_the_step_and_the_run_goes_on_bit_exactly(make, tmp_path, monkeypatch):
    rich = {
        "pair_objective": "difference", "train_text_encoder": True, "random_flip": True,
        "noise_offset": 0.1, "snr_gamma": 5, "gradient_accumulation_steps": 2, "calibrate": True,
    }  # fmt: skip
    make(tmp_path / "straight", **rich).fit()
    draw_batch = script.draw_batch

    def interrupted(trainer, batch):
        if batch == 5:  # in the third step
            os.kill(os.getpid(), signal.SIGINT)
        return draw_batch(trainer, batch)

    with monkeypatch.context() as patched:
        patched.setattr(script, "draw_batch", interrupted)
        make(**rich).fit()
    out = tmp_path / "out"
    assert sorted(f.name for f in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    make(**rich, resume_from_checkpoint="latest").fit()
    assert same_files(tmp_path / "straight/out" / script.LORA_FILE, out / script.LORA_FILE)


@pytest.mark.slow
def test_killed_and_resumed_it_ends_bit_equal(make, tmp_path):
    trainer = make(tmp_path / "straight", max_train_steps=12, train_batch_size=1)
    trainer.fit()
    out, file = tmp_path / "out", tmp_path / "config.yaml"
    settings = trainer.config.model_dump(mode="json", exclude_unset=True)
    settings |= {"output_dir": str(out), "resume_from_checkpoint": "latest"}
    file.write_text(yaml.safe_dump(settings))
    command = [sys.executable, script.__file__, "--config", str(file)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (out / "checkpoint-6").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the kill came too late to test anything"
    run(script.__file__, "--config", file)
    assert same_files(trainer.config.output_dir / script.LORA_FILE, out / script.LORA_FILE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pairs", "subject"])
def test_two_processes_learn_what_one_learns_with_twice_the_batches(kind, make, pictures, tmp_path):
    settings = {
        "pairs": {"region_weight": 0.5, "train_text_encoder": True},
        "subject": {
            **NO_PAIRS, "instance_data_dir": pictures / "single", "class_prompt": "a thing",
            "class_data_dir": pictures / "before", "with_prior_preservation": True,
            "num_class_images": 3,
        },
    }[kind]  # fmt: skip
    settings |= {"learning_rate": 1e-3, "random_flip": True}
    single = make(tmp_path / "one", **settings, gradient_accumulation_steps=2)
    single.fit()
    given = single.config.model_dump(mode="json", exclude_unset=True)
    given |= {"output_dir": str(tmp_path / "two"), "gradient_accumulation_steps": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given))
    run(script.__file__, "--config", tmp_path / "config.yaml", processes=2)
    folders = single.config.output_dir, tmp_path / "two"
    ours, theirs = (load_file(folder / script.LORA_FILE) for folder in folders)
    assert any(tensor.abs().max() > 1e-4 for name, tensor in ours.items() if "lora_up" in name)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["pairs", "dreambooth"])
def test_the_documents_command(kind, checkpoints, pictures, tmp_path, monkeypatch):
    """As it stands, but for the script's and the data's places, the model, 64 px and 2 steps."""
    text = (ROOT / f"tests/seeds/004_{kind}.sh").read_text().replace("\\\n", " ")
    for theirs, ours in {
        "accelerate launch lora/train_dreambooth_lora.py": "",
        "runwayml/stable-diffusion-v1-5": checkpoints["sd"],
        "data/before_images": pictures / "before",
        "data/after_images": pictures / "after",
        "data/single_images": pictures / "single",
        "lora_ckpt/": f"{tmp_path}/",
        "--resolution=512": "--resolution=64",
        "_steps=500": "_steps=2",
        "_steps=200": "_steps=2",
    }.items():
        text = text.replace(theirs, str(ours))
    argv = [*shlex.split(text), "--cache_dir", str(pictures / "cache")]
    if kind == "pairs":
        launch(script.__file__, *argv)
    else:
        monkeypatch.setattr(sys, "argv", [script.__file__, *argv])
        script.main()
    (file,) = tmp_path.glob(f"*/{script.LORA_FILE}")
    tensors = load_file(file)
    assert next(t for n, t in tensors.items() if ".lora_down." in n).shape[0] == 16
    assert any(t.abs().max() > 0 for n, t in tensors.items() if ".lora_up." in n)


def test_a_compiled_unet_learns_the_same_and_is_compiled_once(make, monkeypatch):
    compiled = diffusers.UNet2DConditionModel.compile
    monkeypatch.setattr(
        diffusers.UNet2DConditionModel, "compile", lambda unet: compiled(unet, backend="eager")
    )
    losses = {}
    for compile in (False, True):
        trainer = loaded(make(compile=compile))
        losses[compile] = [losses_of(trainer)]
        with torch.compiler.set_stance("fail_on_recompile" if compile else "default"):
            losses[compile] += [losses_of(trainer, n) for n in (1, 2)]
    for plain, other in zip(*losses.values(), strict=True):
        torch.testing.assert_close(plain, other, atol=1e-6, rtol=1e-5)


def test_the_cache_can_be_filled_ahead(flags, pictures, tmp_path, monkeypatch, capsys):
    """Of pairs and mirrored ones; a damaged entry, and one whose picture has changed, is redone."""
    monkeypatch.setitem(sys.modules, "train_dreambooth_pairs", script)  # and back afterwards
    shutil.copytree(pictures / "after", tmp_path / "after")
    sides = ["--sequence_dirs", str(pictures / "before"), str(tmp_path / "after")]
    plain = flags(tmp_path, before_data_dir=None, after_data_dir=None, cache_dir=tmp_path / "cache")

    def command(*more):
        argv = ["cache_embeddings.py", "--script", script.__file__, *plain, *sides, *more]
        monkeypatch.setattr(sys, "argv", argv)
        cache_embeddings.main()
        return capsys.readouterr().out

    assert "process 0: 3 entries encoded" in command()
    assert "process 0: 0 entries encoded" in command()
    entry = cache_embeddings.entry_files(tmp_path / "cache")[1]
    entry.write_bytes(entry.read_bytes()[:-8])
    out = command("--verify")
    assert "verified: 1 damaged" in out and "1 entries encoded" in out
    assert "missing: 3 of 6" in command("--stats", "--random_flip")
    Image.open(tmp_path / "after/coffee0.png").rotate(180).save(tmp_path / "after/coffee0.png")
    assert "missing: 1 of 3" in command("--stats")


SCENARIOS = sorted((ROOT / "configs").glob("dreambooth_*.yaml"))


@pytest.mark.parametrize("file", SCENARIOS, ids=lambda p: p.stem)
def test_a_scenario_trains_as_it_stands_and_says_why(file, checkpoints, tmp_path, monkeypatch):
    """Only the model, the size and the number of steps and pictures are replaced."""
    lines = file.read_text().splitlines()
    assert len(SCENARIOS) == 4 and all("#" in line for line in lines)
    monkeypatch.chdir(tmp_path)
    argv = ["--config", str(file), f"--pretrained_model_name_or_path={checkpoints['sd']}"]
    argv += ["--resolution=64", "--max_train_steps=1", "--lr_warmup_steps=0"]
    argv += ["--validation_inference_steps=1", "--num_validation_images=1"]
    for number, (_, folder) in enumerate(load_config(script.Config, argv).stages):
        folder.mkdir(parents=True)
        for name in NAMES:
            image = Image.open(photo(name, "RT"[number % 2])).convert("RGB")
            image.rotate(90 * (number // 2)).save(folder / f"{name}.png")
    config = load_config(script.Config, argv, script.audit)
    script.SDTrainer(config).fit()
    assert (config.output_dir / "samples/step-000001.png").exists()
    assert any(t.abs().max() > 0 for t in load_file(config.output_dir / script.LORA_FILE).values())


@pytest.fixture
def subject(pictures, tmp_path):
    """Flags of DreamBooth with prior preservation instead of pairs."""
    return {
        **NO_PAIRS,
        "instance_data_dir": pictures / "single",
        "class_data_dir": tmp_path / "class",
        "class_prompt": "a thing",
        "with_prior_preservation": True,
        "num_class_images": 3,
        "sample_batch_size": 2,
    }


def test_class_pictures_are_drawn_and_keep_the_class(make, subject, checkpoints, tmp_path):
    """Also where the index names parts that nobody fetched; a deleted one is drawn again."""
    base = shutil.copytree(checkpoints["sd"], tmp_path / "sd")
    index = json.loads((base / "model_index.json").read_text())
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (base / "model_index.json").write_text(json.dumps(index))
    trainer = loaded(make(**subject, pretrained_model_name_or_path=base))
    files = sorted((tmp_path / "class").glob("*.png"))
    half = losses_of(trainer)
    assert len(files) == 3 and set(half) == {"instance", "class"}
    trainer.config = trainer.config.model_copy(update={"prior_loss_weight": 0.5})
    assert losses_of(trainer)["class"].item() == pytest.approx(half["class"].item() / 2)
    seen, entry = set(), trainer.entry
    trainer.entry = lambda sample: seen.add(sample.name) or entry(sample)
    for batch in range(9):
        script.class_pass(trainer, script.draw_batch(trainer, batch), torch.tensor([600, 600]))
    assert seen == {sample.name for sample in trainer.class_samples} and len(seen) == 3
    kept = files[2].read_bytes()
    files[0].unlink()
    again = make(**subject)
    again.setup_accelerator()
    again.find_data()
    assert len(again.class_samples) == 3 and files[0].exists() and files[2].read_bytes() == kept


def test_a_sequence_trains_all_its_times(flags, pictures, tmp_path):
    shutil.copytree(pictures / "single", tmp_path / "third")
    for file in (tmp_path / "third").glob("*.png"):
        Image.open(file).rotate(180).save(file)
    (tmp_path / "third/coffee0.png").unlink()  # a sequence may have holes
    argv = flags(tmp_path, before_data_dir=None, after_data_dir=None, region_weight=0.5)
    folders = [pictures / "before", pictures / "after", tmp_path / "third"]
    argv += ["--sequence_dirs", *map(str, folders), "--sequence_scales", "-1,0,1"]
    trainer = script.SDTrainer(load_config(script.Config, argv, script.audit))
    trainer.fit()
    assert [s.scales for s in trainer.samples] == [(-1, 0, 1), (-1, 0), (-1, 0, 1)]
    draws = [draw for batch in range(20) for draw in script.draw_batch(trainer, batch)]
    assert {(draw.low, draw.high) for draw in draws} == {(0, 1), (0, 2), (1, 2)}


def test_validation_draws_what_the_pipeline_draws(make, checkpoints, monkeypatch):
    settings = {"validation_prompt": "a photo", "num_validation_images": 1}
    trainer = loaded(make(**settings, validation_inference_steps=3), seed=0)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(checkpoints["sd"])
    config = pipeline.scheduler.config
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = pipeline(
        "a photo", num_inference_steps=3, guidance_scale=7.5, latents=noise, output_type="latent"
    ).images
    predict_at = script.predictor(trainer, "a photo", 7.5)
    with torch.no_grad():
        ours = script.draw_sd(predict_at, noise, trainer.scheduler_config, 3, [-1.0, 0.0, 1.0])
    torch.testing.assert_close(ours[1:2], theirs, atol=1e-4, rtol=1e-3)
    assert (ours[0] - ours[1]).abs().max() > 0.1 and (ours[0] - ours[2]).abs().max() > 0.1
    sheets = []
    trainer.run_log = type(
        "Log", (), {"picture": lambda _, name, image, step: sheets.append(image)}
    )()
    script.validate(trainer)
    cells = [sheets[0].crop((8 + k * 264, 24, 72 + k * 264, 88)).tobytes() for k in range(5)]
    assert len(set(cells)) == 5


def test_validation_comes_every_so_many_epochs(make, monkeypatch):
    trainer = make(validation_epochs=2, max_train_steps=9, checkpointing_steps=100)
    seen = []
    monkeypatch.setattr(script, "validate", lambda trainer: seen.append(trainer.global_step))
    trainer.fit()
    assert seen == [4, 8, 9]  # three pairs in batches of two: an epoch is two steps


# --- files, calibration ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("export", "targets"),
    [("kohya", "attention"), ("kohya", "transformer"), ("kohya", "self-attention+conv"),
     ("peft", "attention")],
)  # fmt: skip
def test_files_load_in_diffusers_and_here_at_the_trained_strength(
    export, targets, make, checkpoints
):
    settings = {"lora_alpha": 2, "train_text_encoder": True, "target_modules": targets}
    trainer, file = loaded(make(export=export, **settings), seed=0), script.LORA_FILE
    trainer.config.output_dir.mkdir()
    script.save_result(trainer, calibrated=False)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(checkpoints["sd"])
    pipeline.load_lora_weights(str(trainer.config.output_dir), weight_name=file)
    noisy, t = torch.randn(1, 4, 8, 8), torch.tensor([600])
    ids = trainer.texts["a photo"][0]
    with torch.no_grad():
        theirs = pipeline.text_encoder(ids)[0]
        ours = trainer.embeds(["a photo"], [on()])
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
        moved = pipeline.unet(noisy, t, encoder_hidden_states=theirs).sample
        mine = predict(trainer, noisy, t, theirs, [on()])
        plain = predict(trainer, noisy, t, theirs, [()])
        parts = ("unet", "text_encoder")
        place = trainer.folder, torch.float32, torch.device("cpu")
        models = {part: script.load_part(place[0], part, *place[1:]) for part in parts}
        switch = script.AdapterSwitch()
        about = script.load_adapter(models, switch, "x", trainer.config.output_dir / file)
        switch.parts = [(script.Active("x"),)]
        again = script.predict_noise(models["unet"], noisy, t, models["text_encoder"](ids)[0])
    torch.testing.assert_close(mine, moved, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(mine, again, atol=1e-4, rtol=1e-3)
    assert (plain - mine).abs().max() > 1e-2
    names = load_file(trainer.config.output_dir / file).keys()
    assert about["instance_prompt"] == "a photo"
    if export == "peft":
        start = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A"
    else:
        start = "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down"
    assert f"{start}.weight" in names  # whatever transformers calls its layers


@pytest.mark.parametrize("targets", ["transformer", "self-attention+conv"])
def test_kohya_files_of_convolutions_come_back_equal(targets, make, tmp_path):
    """Read as WebUIs read them: strength = alpha / rank, up times down."""
    trainer = loaded(make(lora_alpha=1, target_modules=targets), seed=0)
    tensors = script.adapter_tensors(trainer.models, "change", 1.0)
    script.save_lora(tmp_path / script.LORA_FILE, tensors, {})
    found = load_file(tmp_path / script.LORA_FILE)
    layers, kernels = script.adapted_layers(trainer.models["unet"], "change"), set()
    for path, layer in layers.items():
        name = f"lora_unet_{path.replace('.', '_')}"
        down, up = found.pop(f"{name}.lora_down.weight"), found.pop(f"{name}.lora_up.weight")
        strength = found.pop(f"{name}.alpha").item() / 4
        ours = layer.up["change"].flatten(1) @ layer.down["change"].flatten(1) / 4
        change = strength * (up.flatten(1) @ down.flatten(1))
        torch.testing.assert_close(change, ours.detach(), atol=1e-6, rtol=1e-5)
        kernels.add(tuple(down.shape[2:]))
    assert not found and len(layers) > 20
    assert kernels == ({(), (1, 1)} if targets == "transformer" else {(), (1, 1), (3, 3)})


def test_a_lora_of_another_model_is_named(make, checkpoints, tmp_path):
    unet = loaded(make()).models["unet"]
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    file = tmp_path / "x.safetensors"
    for layer, width, named in (
        ("nowhere", 32, "no such layers\n.*unet_nowhere_lora_A_weight"),
        (name, 7, r"\[1, 7\], \[1, 1\] do not fit"),
    ):
        shapes = {"A": (1, width), "B": (1, 1)}
        tensors = {f"unet.{layer}.lora_{k}.weight": torch.ones(x) for k, x in shapes.items()}
        save_file(tensors, file)
        with pytest.raises(UserError, match=named):
            script.load_adapter({"unet": unet}, script.AdapterSwitch(), "x", file)
    file.write_bytes(b"no LoRA")
    with pytest.raises(UserError, match=r"x\.safetensors is damaged.*header"):
        script.load_adapter({"unet": unet}, script.AdapterSwitch(), "x", file)


@pytest.mark.parametrize("alpha", ["in the metadata of PEFT", "as a tensor of kohya", "not at all"])
def test_the_strength_of_a_lora_of_another_program_is_kept(alpha, tmp_path):
    tensors = {f"unet.a.b.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8})}
    if "kohya" in alpha:
        tensors = {f"lora_unet_a_b.lora_{way}.weight": torch.ones(4, 4) for way in ("up", "down")}
        tensors["lora_unet_a_b.alpha"] = torch.tensor(8.0)
    save_file(tensors, tmp_path / "x.safetensors", metadata if "PEFT" in alpha else None)
    model = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"b": torch.nn.Linear(4, 4)})})
    script.load_adapter({"unet": model}, script.AdapterSwitch(), "x", tmp_path / "x.safetensors")
    assert model["a"]["b"].strength["x"] == (1 if alpha == "not at all" else 2)


@pytest.mark.parametrize("multiplier", [1.0, 0.25])
def test_calibration_finds_the_strength_of_one_full_change(multiplier, make, monkeypatch):
    """A base that knows N(0, 1), and an adapter that moves it by the change at strength 1.7.

    An edit from timestep 801 on goes 1 - alphas_cumprod of the way (a closed form).
    """
    trainer = loaded(make(pair_objective="difference", pair_multiplier=multiplier))
    trainer.samples = trainer.samples[:1]
    low, high = trainer.entry(trainer.samples[0])["latents"]

    def known(unet, noisy, t, embeds):
        alpha, [part] = trainer.alphas[t[0]], trainer.switch.parts
        strength = part[0].scale / (1.7 * multiplier) if part else torch.zeros(1)
        moved = alpha.sqrt() * strength.view(-1, 1, 1, 1) * (high - low)
        return (1 - alpha).sqrt() * (noisy - moved)

    monkeypatch.setattr(script, "predict_noise", known)
    wanted = 1.7 * multiplier / (1 - trainer.alphas[801].item())
    assert script.full_change(trainer, steps=100) == pytest.approx(wanted, rel=0.02)
    assert script.full_change(trainer) == pytest.approx(wanted, rel=0.1)


def test_an_adapter_that_learnt_nothing_keeps_its_strength(make):
    trainer = loaded(make(pair_objective="difference", pair_multiplier=0.5), seed=0)
    for parameter in trainer.trained:
        parameter.data *= 1e-3
    assert script.full_change(trainer) == 1.0


def test_a_whole_change_is_that_of_the_whole_sequence(make, pictures, tmp_path):
    """A sample that lacks the last time shows half the change: it must not halve the strength."""
    folders = [tmp_path / name for name in ("first", "second", "third")]
    for number, folder in enumerate(folders):
        shutil.copytree(pictures / "before", folder)
        for file in folder.iterdir():
            Image.open(file).rotate(90 * number).save(file)
    (tmp_path / "third/coffee0.png").unlink()
    settings = {"before_data_dir": None, "after_data_dir": None, "pair_objective": "difference"}
    settings |= {"sequence_dirs": json.dumps([str(folder) for folder in folders])}
    trainer, asked = loaded(make(**settings)), []
    entry = trainer.entry
    trainer.entry = lambda sample: asked.append(sample.name) or entry(sample)
    script.full_change(trainer, steps=2)
    assert sorted(asked) == ["chelsea0", "hubble0"]
