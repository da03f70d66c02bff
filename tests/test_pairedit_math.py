"""Formulas of train_pairedit.py against closed forms, diffusers' FluxPipeline and PEFT."""

import json
import math
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.pipelines.flux import pipeline_flux
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file

import train_pairedit as script
from train_pairedit import Active, PairBatch, Sample
from utils import UserError

DEV = {  # the scheduler of FLUX.1-dev
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
SIGMAS_512_PX = """1.0000 .9807 .9606 .9399 .9185 .8962 .8732 .8492 .8244 .7985 .7717 .7437 .7146
    .6842 .6525 .6194 .5848 .5485 .5106 .4707 .4289 .3849 .3387 .2899 .2383 .1839 .1262 .0650"""
CPU = torch.device("cpu")
SIZE = (64, 64)


@pytest.fixture
def make_slider(make_slider, tmp_path_factory):
    """All tests of this file encode the same pictures: once."""
    shared = {"cache_dir": str(tmp_path_factory.getbasetemp() / "slider_cache")}
    return lambda **changes: make_slider(**(shared | changes))


def prepared(trainer):
    """A trainer that can take a step of its first run."""
    trainer.setup_accelerator()
    trainer.find_data()
    trainer.cache_embeddings()
    trainer.start_run(script.all_runs(trainer.config)[0])
    return trainer


def filled(trainer, scale=0.3):
    """Both factors of every adapter random and large, so that mistakes show."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in script.adapters_of(trainer.config.python_name):
            for layer in script.adapted_layers(trainer.bare, name).values():
                for factor in (layer.down[name], layer.up[name]):
                    factor.copy_(torch.randn(factor.shape, generator=draw) * scale)
    return trainer


def pipeline_of(checkpoint):
    pipeline = diffusers.FluxPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def inputs_of(transformer, batch=1, dtype=torch.float32, grid=(4, 4), text_tokens=8):
    """Random arguments of a Flux transformer."""
    draw, config = torch.Generator().manual_seed(1), transformer.config

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    return {
        "hidden_states": normal(batch, math.prod(grid), config.in_channels),
        "timestep": torch.full((batch,), 0.7, dtype=dtype),
        "guidance": torch.full((batch,), 3.5),
        "encoder_hidden_states": normal(batch, text_tokens, config.joint_attention_dim),
        "pooled_projections": normal(batch, config.pooled_projection_dim),
        "txt_ids": torch.zeros(text_tokens, 3),
        "img_ids": script.position_ids(grid, CPU, torch.float32),
        "return_dict": False,
    }


# --- sampling and geometry as FLUX has them -------------------------------------------------------


@pytest.mark.parametrize(("steps", "size"), [(28, (512, 512)), (28, (1024, 1024)), (4, (640, 416))])
def test_sigmas_are_those_of_the_pipeline_and_of_pairedit(steps, size, tmp_path):
    tokens = size[0] * size[1] // 256
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**DEV)
    scheduler.save_pretrained(tmp_path / "scheduler")
    mu = pipeline_flux.calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    pipeline_flux.retrieve_timesteps(scheduler, sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    table = script.sigma_table(tmp_path, steps, tokens)
    assert table.dtype == torch.float32 and torch.equal(table, scheduler.sigmas)
    if size == (512, 512):
        expected = torch.tensor([*map(float, SIGMAS_512_PX.split()), 0.0])
        torch.testing.assert_close(table, expected, rtol=0, atol=1e-4)


def test_packing_and_positions_are_the_pipelines():
    latents, other = torch.randn(2, 16, 6, 10), torch.randn(2, 16, 6, 10)
    tokens = script.pack_tokens(latents)
    assert torch.equal(tokens, diffusers.FluxPipeline._pack_latents(latents, 2, 16, 6, 10))
    assert torch.equal(script.unpack_tokens(tokens, (3, 5)), latents)
    theirs = diffusers.FluxPipeline._prepare_latent_image_ids(2, 3, 5, CPU, torch.float32)
    assert torch.equal(script.position_ids((3, 5), CPU, torch.float32), theirs)
    packed = F.mse_loss(tokens, script.pack_tokens(other))
    torch.testing.assert_close(packed, F.mse_loss(latents, other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_transformer_gets_what_the_pipeline_passes(dtype, checkpoints):
    pipeline = pipeline_of(checkpoints["flux"]).to(dtype)
    passed = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: passed.append(kwargs), with_kwargs=True
    )
    options = {"height": 64, "width": 96, "guidance_scale": 3.5, "max_sequence_length": 16}
    options |= {"num_inference_steps": 3, "output_type": "latent"}
    drawn = pipeline("a person", generator=torch.Generator().manual_seed(5), **options).images
    theirs = list(passed)
    with torch.no_grad():
        embed, pooled, _ = pipeline.encode_prompt("a person", None, max_sequence_length=16)
    text = {"embed": embed, "pooled": pooled}
    sigmas = script.sigma_table(checkpoints["flux"], 3, 4 * 6)
    noise = script.first_noise(5, 16, (4, 6), dtype, CPU)
    switch = script.AdapterSwitch()
    predict = script.flux_velocity(pipeline.transformer, switch, text, (4, 6), 3.5)
    ours = script.draw_strip(predict, noise, sigmas.tolist(), [0.0])
    hook.remove()
    assert len(passed) == 6
    for mine, other in zip(passed[3:], theirs, strict=True):
        given = {key: value for key, value in other.items() if value is not None}
        given.pop("joint_attention_kwargs", None)
        assert mine.keys() - {"hidden_states"} == given.keys() - {"hidden_states"}
        for key in given.keys() - {"hidden_states", "return_dict"}:
            torch.testing.assert_close(mine[key], given[key], rtol=1e-6, atol=0, msg=key)
    assert torch.equal(passed[3]["hidden_states"], theirs[0]["hidden_states"])
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 0.05}
    torch.testing.assert_close(ours, drawn.float(), **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_transformer_is_loaded_as_diffusers_does_it(dtype, checkpoints):
    ours = script.load_flux(checkpoints["flux"], "no_change", dtype, CPU)
    theirs = diffusers.FluxTransformer2DModel.from_pretrained(
        checkpoints["flux"], subfolder="transformer", torch_dtype=dtype
    )
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in ours.state_dict().items())
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_latents_and_prompts_are_the_pipelines(checkpoints):
    vae = script.load_vae(checkpoints["flux"], CPU)
    pixels = torch.rand(1, 3, 64, 48) * 2 - 1
    latents = script.encode_pixels(vae, pixels)
    mean = vae.encode(pixels).latent_dist.mean
    torch.testing.assert_close(latents, (mean - 0.1159) * 0.3611)
    with torch.no_grad():
        torch.testing.assert_close(script.decode_latents(vae, latents), vae.decode(mean).sample)
    pipeline = pipeline_of(checkpoints["flux"])
    prompts = ["", "a person, smiling"]
    texts = script.encode_texts(checkpoints["flux"], prompts, 32, torch.float32, CPU)
    for prompt, text in texts.items():
        embed, pooled, _ = pipeline.encode_prompt(prompt, None, max_sequence_length=32)
        torch.testing.assert_close(text["embed"], embed)
        torch.testing.assert_close(text["pooled"], pooled)


# --- adapters -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    return script.empty_flux(script.PUBLISHED_TRANSFORMER)


def test_flux_dev_has_266_layers_with_an_adapter(published):
    assert sum(p.numel() for p in published.parameters()) == 11_901_408_320
    full = script.target_layers(published, "full")
    assert {(x.in_features, x.out_features) for x in full.values()} == {(3072, 3072)}
    in_attention = [
        f"{path}.{name}"
        for path, module in published.named_modules()
        if type(module).__name__ == "FluxAttention"
        for name, child in module.named_modules()
        if isinstance(child, torch.nn.Linear)
    ]
    assert len(full) == 266 and sorted(full) == sorted(in_attention)
    assert script.target_layers(published, "xattn") == full
    strict = script.target_layers(published, "xattn-strict")
    kept = [p for p in full if "to_q" not in p and "out" not in p.split("attn.")[1]]
    assert len(strict) == 19 * 5 + 38 * 2 == 171 and sorted(strict) == sorted(kept)


@pytest.mark.parametrize("method", ["full", "xattn", "xattn-strict"])
def test_a_new_adapter_changes_no_bit_and_starts_as_pairedits(method, make_slider):
    trainer = prepared(make_slider(train_method=method))
    arguments = inputs_of(trainer.bare)
    clean = script.load_flux(trainer.folder, "no_change", torch.float32, CPU)(**arguments)[0]
    trainer.switch.parts = [(Active("content"), Active("semantic"))]
    assert torch.equal(trainer.bare(**arguments)[0], clean)
    layers = script.adapted_layers(trainer.bare, "semantic").values()
    for layer in layers:
        down, up = layer.down["semantic"], layer.up["semantic"]
        assert down.requires_grad and up.requires_grad == (method == "full")
        if method == "full":
            bound = math.sqrt(3 / 64)
            assert 0.95 * bound < down.abs().max() <= bound and not up.any()
            assert down.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        else:
            torch.testing.assert_close(up.T @ up, torch.eye(16), rtol=0, atol=1e-5)
    first = [layer.down["semantic"].clone() for layer in layers]
    run = script.all_runs(trainer.config)[0]
    trainer.start_run(run)
    assert all(torch.equal(a, x.down["semantic"]) for a, x in zip(first, layers, strict=True))
    trainer.start_run(run._replace(version=2))
    assert method != "full" or not torch.equal(first[0], next(iter(layers)).down["semantic"])


def test_scale_0_and_an_adapter_that_is_off_change_no_bit(make_slider):
    trainer = filled(prepared(make_slider()))
    arguments = inputs_of(trainer.bare)
    clean = script.load_flux(trainer.folder, "no_change", torch.float32, CPU)(**arguments)[0]
    for parts in ([()], [(Active("semantic", 0.0),)]):
        trainer.switch.parts = parts
        assert torch.equal(trainer.bare(**arguments)[0], clean)
    trainer.switch.parts = [(Active("semantic"),)]
    assert (trainer.bare(**arguments)[0] - clean).abs().max() > 0.01


def test_the_same_factors_in_peft_give_the_same_output(make_slider):
    """alpha 1, rank 16: a strength of 1/16."""
    trainer = filled(prepared(make_slider()))
    arguments = inputs_of(trainer.bare)
    trainer.switch.parts = [(Active("semantic", 1.0),)]
    ours = trainer.bare(**arguments)[0]
    other = script.load_flux(trainer.folder, "no_change", torch.float32, CPU)
    other.add_adapter(LoraConfig(r=16, lora_alpha=1, target_modules=list(script.ATTENTION)))
    layers = script.adapted_layers(trainer.bare, "semantic")
    adapted = [name for name, m in other.named_modules() if hasattr(m, "lora_A")]
    assert sorted(adapted) == sorted(layers)
    for path, layer in layers.items():
        theirs = other.get_submodule(path)
        theirs.lora_A["default"].weight.data = layer.down["semantic"].data
        theirs.lora_B["default"].weight.data = layer.up["semantic"].data
    torch.testing.assert_close(ours, other(**arguments)[0], rtol=1e-5, atol=1e-5)


def test_parts_and_scales_belong_to_their_samples(make_slider):
    trainer = filled(prepared(make_slider()))
    arguments = inputs_of(trainer.bare, batch=4)

    def alone(number, part):
        trainer.switch.parts = [part]
        names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
        few = {key: arguments[key][number : number + 1] for key in (*names, "guidance")}
        return trainer.bare(**(arguments | few))[0]

    trainer.switch.parts = [(Active("content"),), (Active("semantic", torch.tensor([0.5, -2.0])),)]
    together = trainer.bare(**arguments)[0]
    parts = [(Active("content"),)] * 2 + [(Active("semantic", scale),) for scale in (0.5, -2.0)]
    expected = torch.cat([alone(i, part) for i, part in enumerate(parts)])
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("precision", "error"), [("int8-quanto", 0.02), ("int4-quanto", 0.2), ("nf4-bnb", 0.2)]
)
def test_a_quantised_base_says_nearly_the_same_and_trains(precision, error, make_slider):
    """Modulation (FLUX: norm*.linear of a block) is 8-bit in all of them."""
    plain = prepared(make_slider())
    trainer = prepared(make_slider(base_model_precision=precision, gradient_checkpointing=True))
    kinds = {}
    for block in (*trainer.bare.transformer_blocks, *trainer.bare.single_transformer_blocks):
        for name, layer in block.named_modules():
            if isinstance(layer, torch.nn.Linear):
                qtype = getattr(getattr(layer.weight, "qtype", None), "name", "nf4")
                kinds.setdefault(name.startswith("norm"), []).append(qtype)
    assert len(kinds[True]) == 2 * 2 + 2 and set(kinds[True]) == {"qint8"}
    assert len(kinds[False]) == 2 * 12 + 2 * 5
    assert set(kinds[False]) == {{"int": f"q{precision[:4]}"}.get(precision[:3], "nf4")}
    arguments = inputs_of(plain.bare)
    ours, exact = (x.bare(**arguments)[0].detach() for x in (trainer, plain))
    assert 0 < (ours - exact).norm() / exact.norm() < error
    script.training_loss(trainer, *script.next_batch(trainer))[0].backward()
    ups = [grads[1] for grads in gradients(trainer, "semantic").values()]
    assert len(ups) == 2 * 8 + 2 * 3 and all(grad.any() for grad in ups)


def test_a_lora_of_another_model_is_named_layer_by_layer(make_slider):
    trainer = prepared(make_slider())
    wrong = {
        f"transformer_blocks.{i}.attn.to_q": (torch.zeros(4, 7), torch.zeros(9, 4)) for i in "01"
    }
    with pytest.raises(UserError, match=r"blocks.0.attn.to_q"):
        script.add_slider(trainer.bare, trainer.switch, "x", wrong, 1.0)


# --- the objective --------------------------------------------------------------------------------


def numbers(batch=2, beta=3.0, eta=4.0):
    draw = torch.Generator().manual_seed(0)
    x_a, x_b, e, *teacher = (torch.randn(batch, 6, 8, generator=draw) for _ in range(6))
    sigma = torch.tensor([0.25, 0.9][:batch]).view(-1, 1, 1)
    return PairBatch(x_a, x_b, e, sigma, beta, eta, tuple(teacher))


def expected_passes(objective, xa, xb, e, s, beta, eta, teacher):
    """[(model input, target, {adapter: scale, 0 if frozen})], in PairEdit's own letters."""
    n = beta * e
    z, straight = xa + s * n, (1 - s) * xa + s * e
    both = {"content": 0, "semantic": 1}
    if objective == "slider_text":
        target, positive, negative = teacher
        g = target + eta * (positive - negative)
        lengths = [p.norm() / x.norm() for p, x in zip(positive, g, strict=True)]
        goal = torch.stack([x * k for x, k in zip(g, lengths, strict=True)])
        return [(xa, goal, {"semantic": 1})]
    return {
        "train_image": [(z, n, {"content": 1}), (z, n + eta * (xa - xb), both)],
        "train_image_wocontent": [(z, n + eta * (xa - xb), {"semantic": 1})],
        "train_image_wocfg": [(z, n, {"content": 1}), (xb + s * n, n, both)],
        "train_image_fm": [
            (straight, e - xa, {"content": 1}),
            (straight, e - xa + eta * (xa - xb), both),
        ],
        "train_image_sliders": [
            ((1 - s) * xb + s * e, e - xb, {"semantic": 1}),
            (straight, e - xa, {"semantic": -1}),
        ],
        "train_image_real": [(straight, e - xa, {"content": 1})],
    }[objective]


@pytest.mark.parametrize("objective", list(script.LOSSES))
def test_every_objective_is_its_closed_form(objective):
    batch = numbers()
    passes, expected = script.LOSSES[objective](batch), expected_passes(objective, *batch)
    for ours, (noisy, velocity, switches) in zip(passes, expected, strict=True):
        torch.testing.assert_close(ours.noisy, noisy)
        torch.testing.assert_close(ours.target, velocity)
        assert {a.adapter: 0 if a.frozen else a.scale for a in ours.active} == switches
        assert ours.weight == 1


@pytest.mark.parametrize("objective", ["train_image", "train_image_wocontent", "train_image_fm"])
def test_one_euler_step_from_z_to_sigma_0_moves_eta_sigma_of_the_way(objective):
    """z -> x_A + eta sigma (x_B - x_A), towards the target; the content pass lands on x_A."""
    batch = numbers(beta=1.0)
    *content, semantic = script.LOSSES[objective](batch)
    change = batch.eta * batch.sigma * (batch.target - batch.source)
    for part, moved in ((semantic, change), *((part, 0) for part in content)):
        end = part.noisy + (0 - batch.sigma) * part.target
        torch.testing.assert_close(end, batch.source + moved, rtol=1e-5, atol=1e-5)


# --- one fused pass instead of two ----------------------------------------------------------------


def gradients(trainer, name):
    """{path: (d down, d up)} of one adapter."""
    layers = script.adapted_layers(trainer.bare, name).items()
    return {path: (layer.down[name].grad, layer.up[name].grad) for path, layer in layers}


def backward(trainer, passes, only=None):
    """Gradients of the sum of all passes (or of one) in one forward."""
    trainer.bare.zero_grad(set_to_none=True)
    noisy = torch.cat([part.noisy for part in passes])
    trainer.switch.parts = [part.active for part in passes]
    arguments = inputs_of(trainer.bare, 1, torch.float64)
    for key in ("timestep", "guidance", "encoder_hidden_states", "pooled_projections"):
        arguments[key] = arguments[key].repeat(len(noisy), *[1] * (arguments[key].dim() - 1))
    velocity = trainer.bare(**(arguments | {"hidden_states": noisy}))[0].chunk(len(passes))
    losses = [F.mse_loss(v, part.target) for v, part in zip(velocity, passes, strict=True)]
    (losses[only] if only is not None else sum(losses)).backward()
    return {name: gradients(trainer, name) for name in ("content", "semantic")}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_fused_pass_has_the_gradients_of_pairedits_two_passes(checkpointing, make_slider):
    """Reference: content on, backward; then content's parameters frozen, both on, backward."""
    trainer = filled(prepared(make_slider(gradient_checkpointing=checkpointing)))
    trainer.bare.double()
    draw = torch.Generator().manual_seed(3)
    shape = 2, 16, trainer.bare.config.in_channels
    latents = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(3))
    sigma = torch.full((2, 1, 1), 0.7, dtype=torch.float64)
    passes = script.train_image(PairBatch(*latents, sigma, 1.0, 4.0))
    ours = backward(trainer, passes)
    for number, (own, other) in enumerate([("content", "semantic"), ("semantic", "content")]):
        alone = backward(trainer, passes, only=number)
        assert all(grad.abs().max() > 0 for grads in alone[own].values() for grad in grads)
        for grads in alone[other].values():  # no loss reaches into the other adapter
            assert all(grad is None or not grad.any() for grad in grads)
    content = backward(trainer, [passes[0]._replace(active=(Active("content"),))])["content"]
    for layer in script.adapted_layers(trainer.bare, "content").values():
        layer.down["content"].requires_grad_(False)
        layer.up["content"].requires_grad_(False)
    second = passes[1]._replace(active=(Active("content"), Active("semantic")))
    semantic = backward(trainer, [second])["semantic"]
    for name, reference in (("content", content), ("semantic", semantic)):
        for path, grads in reference.items():
            for mine, theirs in zip(ours[name][path], grads, strict=True):
                assert theirs.norm() > 1e-7, f"{name} {path}: nothing to compare"
                assert (mine - theirs).norm() / theirs.norm() < 1e-12, f"{name} {path}"


@pytest.mark.parametrize("objective", list(script.LOSSES))
def test_a_training_step_is_the_sum_of_its_passes_one_by_one(objective, make_slider, monkeypatch):
    """In fp32, through the trainer's own loss, with gradient checkpointing."""
    ids = {"image_ids": ["7001"]} if objective == "train_image_real" else {}
    trainer = make_slider(python_name=objective, batch_size=2, gradient_checkpointing=True, **ids)
    trainer = filled(prepared(trainer))
    samples, batch = script.next_batch(trainer)
    loss, losses = script.training_loss(trainer, samples, batch)
    loss.backward()
    torch.testing.assert_close(losses["loss"], sum(losses.values()) - losses["loss"])
    names = script.adapters_of(objective)
    ours = {name: gradients(trainer, name) for name in names}
    trainer.bare.zero_grad(set_to_none=True)
    original = script.LOSSES[objective]
    for number in range(len(losses) - 1):
        monkeypatch.setitem(script.LOSSES, objective, lambda b, n=number: [original(b)[n]])
        script.training_loss(trainer, samples, batch)[0].backward()
    for name in names:
        for path, grads in gradients(trainer, name).items():
            for mine, theirs in zip(ours[name][path], grads, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max())


def test_a_text_slider_learns_where_the_base_really_gets_at_each_samples_own_sigma(make_slider):
    """Every sample as if it were alone, whatever the size of the batch."""
    settings = {"num_inference_steps": 8, "end_step": 7, "batch_size": 4}
    trainer = prepared(make_slider(python_name="slider_text", **settings))
    _, batch = script.next_batch(trainer)
    table = trainer.sigmas(SIZE)
    levels = [table.tolist().index(sigma) for sigma in batch.sigma.flatten().tolist()]
    assert len(set(levels)) == 4
    prompts = [trainer.config.target_prompt, trainer.config.positive_prompt]
    for number, level in enumerate(levels):
        tokens = batch.noise[number : number + 1]
        predict, other = (trainer.predictor(trainer.texts[p], SIZE) for p in prompts)
        with torch.no_grad():
            for i in range(level):
                tokens = tokens + (table[i + 1] - table[i]) * predict(tokens, table[i], [()])
            teacher = other(tokens, table[level], [()])
        torch.testing.assert_close(batch.source[number], tokens[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(batch.teacher[1][number], teacher[0], rtol=1e-4, atol=1e-5)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "xattn"])
def test_the_saved_slider_has_its_strength_in_diffusers(method, make_slider, checkpoints, tmp_path):
    """alpha 1, rank 16 in training; at scale 1 in the pipeline the same output."""
    trainer = filled(prepared(make_slider(train_method=method)))
    file = tmp_path / "slider.safetensors"
    script.save_slider(file, trainer.bare, "semantic", {"step": 4})
    pipeline = pipeline_of(checkpoints["flux"])
    pipeline.load_lora_weights(str(file))
    arguments = inputs_of(trainer.bare)
    for scale in (1.0, -0.5):
        pipeline.set_adapters(pipeline.get_active_adapters(), [scale])
        trainer.switch.parts = [(Active("semantic", scale),)]
        ours = trainer.bare(**arguments)[0]
        torch.testing.assert_close(pipeline.transformer(**arguments)[0], ours, rtol=1e-5, atol=1e-5)
    trainer.switch.parts = [()]
    assert (trainer.bare(**arguments)[0] - ours).abs().max() > 1e-3
    tensors = load_file(file)
    for path, layer in script.adapted_layers(trainer.bare, "semantic").items():
        assert torch.equal(tensors[f"transformer.{path}.lora_A.weight"], layer.down["semantic"])
        assert torch.equal(tensors[f"transformer.{path}.lora_B.weight"] * 16, layer.up["semantic"])
    with safe_open(file, framework="pt") as opened:
        assert json.loads(opened.metadata()["image_edit_lora"]) == {"step": 4}


def test_transposed_factors_are_saved(make_slider, tmp_path):
    """Those of an SVD, for an adapter that starts from the weights."""
    trainer = prepared(make_slider())
    path, layer = next(iter(script.adapted_layers(trainer.bare, "semantic").items()))
    up, _, down = torch.linalg.svd(layer.base.weight)
    factors = {path: (down.T[:, :4].T, up[:, :4].T.contiguous().T)}
    script.add_slider(trainer.bare, trainer.switch, "own", factors, 1.0)
    script.save_slider(tmp_path / "own.safetensors", trainer.bare, "own", {})
    assert len(load_file(tmp_path / "own.safetensors")) == 2


def test_the_original_format_has_pairedits_keys(make_slider, tmp_path):
    trainer = filled(prepared(make_slider()))
    script.save_original(tmp_path / "slider.pt", trainer.bare, "content")
    tensors = torch.load(tmp_path / "slider.pt", weights_only=True)
    layers = script.adapted_layers(trainer.bare, "content")
    assert len(tensors) == 3 * len(layers) == 3 * (2 * 8 + 2 * 3)
    head = "lora_unet_transformer_blocks_0_attn_to_out_0"
    layer = layers["transformer_blocks.0.attn.to_out.0"]
    assert torch.equal(tensors[f"{head}.lora_down.weight"], layer.down["content"])
    assert torch.equal(tensors[f"{head}.lora_up.weight"], layer.up["content"])
    assert tensors[f"{head}.lora_down.weight"].shape == (16, 64)
    assert tensors[f"{head}.alpha"].shape == () and tensors[f"{head}.alpha"] == 1
    assert "lora_unet_single_transformer_blocks_1_attn_to_v.lora_up.weight" in tensors


# --- draws ----------------------------------------------------------------------------------------


def drawn(steps, samples="abc", processes=1, sizes=None, version=1, **changes):
    """[(name, noise level, noise)] of the samples of so many steps, of all processes."""
    config = script.Config(**changes)
    known = [Sample(x, (), (sizes or {}).get(x, SIZE)) for x in samples]
    trainer = SimpleNamespace(
        config=config,
        samples=known,
        tokens={sample: torch.zeros(2, 4, 8) for sample in known},
        run=script.Run("age", version, 1.0),
        device=CPU,
        sigmas=lambda size: torch.arange(29.0),  # so that sigma is the number of the level
    )
    found = []
    for trainer.global_step in range(steps):
        for rank in range(processes):
            trainer.accelerator = SimpleNamespace(process_index=rank, num_processes=processes)
            visited, batch = script.next_batch(trainer)
            levels = batch.sigma.flatten().int().tolist()
            found += zip([x.name for x in visited], levels, batch.noise, strict=True)
    return found


def same(a, b):
    return all(x[:2] == y[:2] and torch.equal(x[2], y[2]) for x, y in zip(a, b, strict=True))


def test_a_draw_belongs_to_seed_version_and_step_whatever_the_processes():
    torch.manual_seed(1)
    first = drawn(5, batch_size=4)
    torch.manual_seed(2)
    assert same(first, drawn(5, batch_size=4))
    assert same(first, drawn(5, batch_size=2, processes=2))
    assert not same(first[:4], first[4:8])
    for other in ({"version": 2}, {"seed": 1}):
        assert not same(first, drawn(5, batch_size=4, **other))


def test_the_31_noises_are_torchs_own_of_the_seeds_0_to_30():
    seeds = {torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(k)) for k in range(31)}
    expected = {tuple(x.flatten().tolist()) for x in seeds}
    assert {tuple(noise.flatten().tolist()) for *_, noise in drawn(500)} == expected
    fresh = [noise for *_, noise in drawn(50, num_noise_seeds=None)]
    assert len({tuple(noise.flatten().tolist()) for noise in fresh}) == 50
    assert abs(torch.stack(fresh).std() - 1) < 0.05


def test_samples_and_levels_are_drawn_evenly_and_both_ends_are_included():
    names, levels, _ = zip(*drawn(3000, start_step=3, end_step=9), strict=True)
    shares = np.bincount(levels)[3:] / len(levels)
    assert len(shares) == 7 and abs(shares - 1 / 7).max() < 0.025
    assert all(abs(names.count(x) / len(names) - 1 / 3) < 0.03 for x in "abc")


def test_a_batch_has_one_size_and_spreads_its_levels_and_each_sample_is_as_likely():
    found = drawn(1500, "abcd", sizes={"b": (96, 64)}, batch_size=4)
    names, levels, _ = zip(*found, strict=True)
    for k in range(0, len(found), 4):
        assert len({name == "b" for name in names[k : k + 4]}) == 1
        assert [level // 7 for level in levels[k : k + 4]] == [0, 1, 2, 3]
    assert all(abs(names.count(x) / len(names) - 1 / 4) < 0.04 for x in "abcd")
    shares = np.bincount(levels) / len(levels)
    assert len(shares) == 28 and abs(shares - 1 / 28).max() < 0.01
