"""Formulas of train_pairedit.py against closed forms, diffusers' FluxPipeline and PEFT."""

import json
import math

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import concept
from diffusers.pipelines.flux import pipeline_flux
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file

import train_pairedit as script
from train_pairedit import FROZEN_CONTENT, Given, On
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


@pytest.fixture
def make_slider(make_slider, tmp_path_factory):
    """All tests of this file encode the same pictures: once."""
    shared = {"cache_dir": str(tmp_path_factory.getbasetemp() / "slider_cache")}
    return lambda **changes: make_slider(**(shared | changes))


def prepared(trainer, run=0):
    """A trainer that can take a step."""
    trainer.setup_accelerator()
    trainer.find_data()
    trainer.cache_embeddings()
    trainer.load_transformer()
    trainer.begin(script.all_runs(trainer.config)[run])
    return trainer


def filled(trainer, scale=0.3):
    """Both factors of every adapter random and large, so that mistakes show."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in script.adapters_of(trainer.config.python_name):
            for layer in script.slider_layers(trainer.bare, name).values():
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


def test_sigmas_at_512_px_are_those_of_pairedit():
    table = script.sigma_table(DEV, 28, 1024)
    expected = torch.tensor([*map(float, SIGMAS_512_PX.split()), 0.0])
    assert table.dtype == torch.float32
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-4)
    u = 1 - torch.arange(28, dtype=torch.float64) / 28
    shift = math.exp(0.63)
    torch.testing.assert_close(table[:28].double(), shift / (shift + 1 / u - 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("steps", "size"), [(28, (1024, 1024)), (20, (640, 416)), (4, (256, 256))])
def test_sigmas_at_other_sizes_are_the_pipelines(steps, size):
    tokens = size[0] * size[1] // 256
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**DEV)
    mu = pipeline_flux.calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    pipeline_flux.retrieve_timesteps(scheduler, sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    assert torch.equal(script.sigma_table(DEV, steps, tokens), scheduler.sigmas)


def test_packing_and_positions_are_the_pipelines():
    latents = torch.randn(2, 16, 6, 10)
    tokens = script.pack_tokens(latents)
    assert torch.equal(tokens, diffusers.FluxPipeline._pack_latents(latents, 2, 16, 6, 10))
    assert torch.equal(script.unpack_tokens(tokens, (3, 5)), latents)
    theirs = diffusers.FluxPipeline._prepare_latent_image_ids(2, 3, 5, CPU, torch.float32)
    assert torch.equal(script.position_ids((3, 5), CPU, torch.float32), theirs)


def test_the_mean_squared_error_of_tokens_is_that_of_latents():
    a, b = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)
    packed = F.mse_loss(script.pack_tokens(a), script.pack_tokens(b))
    torch.testing.assert_close(packed, F.mse_loss(a, b))


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
    text = script.encode_prompt_flux(pipeline, "a person", 16)
    sigmas = script.sigma_table(pipeline.scheduler.config, 3, 4 * 6)
    noise = script.first_noise(5, 16, (4, 6), dtype, CPU)

    @torch.no_grad()
    def predict(tokens, sigma, lanes):
        sigma = torch.tensor([sigma])
        return script.flux_velocity(pipeline.transformer, tokens, sigma, text, (4, 6), 3.5, True)

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


def test_the_transformer_is_loaded_as_diffusers_does_it(checkpoints):
    for dtype in (torch.float32, torch.bfloat16):
        ours = script.load_flux(checkpoints["flux"], "no_change", dtype, CPU)
        theirs = diffusers.FluxTransformer2DModel.from_pretrained(
            checkpoints["flux"], subfolder="transformer", torch_dtype=dtype
        )
        state = theirs.state_dict()
        assert ours.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in ours.state_dict().items())
        assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_latents_are_scaled_as_the_pipelines_and_come_back(checkpoints):
    vae = script.load_vae(checkpoints["flux"], CPU)
    pixels = torch.rand(1, 3, 64, 48) * 2 - 1
    latents = script.encode_pixels(vae, pixels)
    image = diffusers.FluxImg2ImgPipeline(
        scheduler=None, vae=vae, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=None,
    )  # fmt: skip
    mean = vae.encode(pixels).latent_dist.mean
    torch.testing.assert_close(latents, (mean - 0.1159) * 0.3611)
    with torch.no_grad():
        torch.testing.assert_close(script.decode_latents(vae, latents), vae.decode(mean).sample)
    sampled = image._encode_vae_image(pixels, torch.Generator().manual_seed(0))
    expected = vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(0))
    torch.testing.assert_close(sampled, (expected - 0.1159) * 0.3611)  # the pipeline's own words


def test_prompt_embeddings_are_the_pipelines(checkpoints):
    pipeline = pipeline_of(checkpoints["flux"])
    encoders = script.load_text_encoders(checkpoints["flux"], torch.float32, CPU)
    assert encoders.transformer is None and encoders.vae is None
    for prompt in ("", "a person, smiling"):
        embed, pooled, _ = pipeline.encode_prompt(prompt, None, max_sequence_length=32)
        text = script.encode_prompt_flux(encoders, prompt, 32)
        torch.testing.assert_close(text.embed, embed)
        torch.testing.assert_close(text.pooled, pooled)
        assert text.embed.shape == (1, 32, 32)


# --- adapters -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    return script.empty_flux(script.PUBLISHED_TRANSFORMER)


def test_flux_dev_has_266_layers_with_an_adapter(published):
    assert sum(p.numel() for p in published.parameters()) == 11_901_408_320
    layers = script.target_layers(published, "full")
    linear = [published.get_submodule(path) for path in layers]
    assert len(set(layers)) == 266
    assert {(x.in_features, x.out_features) for x in linear} == {(3072, 3072)}
    assert sum(16 * (x.in_features + x.out_features) for x in linear) == 26_148_864
    in_attention = [
        f"{path}.{name}"
        for path, module in published.named_modules()
        if type(module).__name__ == "FluxAttention"
        for name, child in module.named_modules()
        if isinstance(child, torch.nn.Linear)
    ]
    assert sorted(layers) == sorted(in_attention)  # nothing forgotten, nothing else


def test_the_other_train_methods_choose_pairedits_layers(published):
    full = script.target_layers(published, "full")
    assert script.target_layers(published, "xattn") == full
    strict = script.target_layers(published, "xattn-strict")
    kept = [p for p in full if "to_q" not in p and "out" not in p.split("attn.")[1]]
    assert len(strict) == 19 * 5 + 38 * 2 == 171 and sorted(strict) == sorted(kept)


@pytest.mark.parametrize("method", ["full", "xattn", "xattn-strict"])
def test_a_new_adapter_changes_no_bit(method, make_slider):
    trainer = prepared(make_slider(train_method=method))
    arguments = inputs_of(trainer.bare)
    plain = trainer.bare(**arguments)[0]
    trainer.board.lanes = [(On("content"), On("semantic"))]
    assert torch.equal(trainer.bare(**arguments)[0], plain)
    clean = script.load_flux(trainer.folder, "no_change", torch.float32, CPU)
    assert torch.equal(clean(**arguments)[0], plain)


def test_scale_0_and_an_adapter_that_is_off_change_no_bit(make_slider):
    trainer = filled(prepared(make_slider()))
    arguments = inputs_of(trainer.bare)
    clean = script.load_flux(trainer.folder, "no_change", torch.float32, CPU)(**arguments)[0]
    trainer.board.lanes = [()]
    assert torch.equal(trainer.bare(**arguments)[0], clean)
    trainer.board.lanes = [(On("semantic", 0.0),)]
    assert torch.equal(trainer.bare(**arguments)[0], clean)
    trainer.board.lanes = [(On("semantic"),)]
    assert (trainer.bare(**arguments)[0] - clean).abs().max() > 0.01


def test_start_values_have_pairedits_distribution(published):
    path = "single_transformer_blocks.0.attn.to_q"
    factors = script.start_factors({path: (3072, 3072)}, 16, "full", 0, 1)
    down, up = factors[path]
    bound = math.sqrt(3 / 3072)
    assert down.shape == (16, 3072) and up.shape == (3072, 16) and not up.any()
    assert down.abs().max() <= bound and down.abs().max() > 0.999 * bound
    assert down.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(down.mean()) < 0.01 * bound
    other = script.start_factors({path: (3072, 3072)}, 16, "full", 0, 2)[path][0]
    assert not torch.equal(down, other)  # another version
    assert torch.equal(down, script.start_factors({path: (3072, 3072)}, 16, "full", 0, 1)[path][0])


def test_xattn_trains_only_the_lower_factor(make_slider):
    trainer = prepared(make_slider(train_method="xattn", train_iteration=1))
    layers = script.slider_layers(trainer.bare, "semantic").values()
    before = [layer.up["semantic"].clone() for layer in layers]
    for up in before:
        torch.testing.assert_close(up.T @ up, torch.eye(16), rtol=0, atol=1e-5)
    loss, _ = trainer.training_loss(visits_of(trainer))
    loss.backward()
    trainer.optimizer.step()
    for layer, up in zip(layers, before, strict=True):
        assert torch.equal(layer.up["semantic"], up) and layer.down["semantic"].abs().max() > 0


def visits_of(trainer, count=1, step=0):
    return script.draw_visits(trainer.config, 1, step, trainer.groups, count)


def test_the_same_factors_in_peft_give_the_same_output(make_slider):
    """alpha 1, rank 16: a strength of 1/16."""
    trainer = filled(prepared(make_slider()))
    arguments = inputs_of(trainer.bare)
    trainer.board.lanes = [(On("semantic", 1.0),)]
    ours = trainer.bare(**arguments)[0]
    other = script.load_flux(trainer.folder, "no_change", torch.float32, CPU)
    targets = [name.removeprefix("attn.") for name in script.ATTENTION]
    other.add_adapter(LoraConfig(r=16, lora_alpha=1, target_modules=targets))
    layers = script.slider_layers(trainer.bare, "semantic")
    adapted = [name for name, m in other.named_modules() if hasattr(m, "lora_A")]
    assert sorted(adapted) == sorted(layers)
    for path, layer in layers.items():
        theirs = other.get_submodule(path)
        theirs.lora_A["default"].weight.data = layer.down["semantic"].data
        theirs.lora_B["default"].weight.data = layer.up["semantic"].data
    torch.testing.assert_close(ours, other(**arguments)[0], rtol=1e-5, atol=1e-5)


def test_lanes_and_scales_belong_to_their_samples(make_slider):
    trainer = filled(prepared(make_slider()))
    arguments = inputs_of(trainer.bare, batch=4)

    def alone(number, lane):
        trainer.board.lanes = [lane]
        few = {k: v[number : number + 1] for k, v in arguments.items() if k.startswith("h")}
        for key in ("encoder_hidden_states", "pooled_projections", "timestep", "guidance"):
            few[key] = arguments[key][number : number + 1]
        return trainer.bare(**(arguments | few))[0]

    trainer.board.lanes = [(On("content"),), (On("semantic", torch.tensor([0.5, -2.0])),)]
    together = trainer.bare(**arguments)[0]
    lanes = [(On("content"),)] * 2 + [(On("semantic", 0.5),), (On("semantic", -2.0),)]
    expected = torch.cat([alone(i, lane) for i, lane in enumerate(lanes)])
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("precision", "kind", "error"),
    [
        ("int8-quanto", "QLinear", 0.02),
        ("int4-quanto", "QLinear", 0.2),
        ("nf4-bnb", "Linear4bit", 0.2),
    ],
)
def test_a_quantised_base_says_nearly_the_same_and_trains(precision, kind, error, make_slider):
    plain = prepared(make_slider())
    trainer = prepared(make_slider(base_model_precision=precision, gradient_checkpointing=True))
    blocks = [*trainer.bare.transformer_blocks, *trainer.bare.single_transformer_blocks]
    layers = [m for block in blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
    assert len(layers) == 2 * 14 + 2 * 6 and {type(layer).__name__ for layer in layers} == {kind}
    arguments = inputs_of(plain.bare)
    ours, exact = (x.bare(**arguments)[0].detach() for x in (trainer, plain))
    assert 0 < (ours - exact).norm() / exact.norm() < error
    loss, _ = trainer.training_loss(visits_of(trainer))
    loss.backward()
    ups = {path: grads[1] for path, grads in gradients(trainer, "semantic").items()}
    assert len(ups) == 2 * 8 + 2 * 3 and all(grad.any() for grad in ups.values())


def test_a_lora_of_another_model_is_named_layer_by_layer(make_slider):
    trainer = prepared(make_slider())
    wrong = {
        f"transformer_blocks.{i}.attn.to_q": (torch.zeros(4, 7), torch.zeros(9, 4)) for i in "01"
    }
    with pytest.raises(UserError, match=r"2 layers do not fit[^x]*blocks.0.attn.to_q"):
        script.add_slider(trainer.bare, trainer.board, "x", wrong, 1.0)


# --- the objective --------------------------------------------------------------------------------


def numbers(batch=2, scale=1.0, beta=3.0, eta=4.0):
    draw = torch.Generator().manual_seed(0)
    x_a, x_b, e, *teacher = (torch.randn(batch, 6, 8, generator=draw) for _ in range(6))
    sigma = torch.tensor([0.25, 0.9][:batch]).view(-1, 1, 1)
    return Given(x_a, x_b, e, sigma, torch.full((batch,), scale), beta, eta, tuple(teacher))


def expected_passes(variant, xa, xb, e, s, beta, eta, teacher):
    """[(model input, target, who learns, who is on at which sign)], in PairEdit's own letters."""
    n = beta * e
    if variant == "train_image":
        z = xa + s * n
        return [(z, n, {"content": 1}), (z, n + eta * (xa - xb), {"content": 0, "semantic": 1})]
    if variant == "train_image_wocontent":
        return [(xa + s * n, n + eta * (xa - xb), {"semantic": 1})]
    if variant == "train_image_wocfg":
        return [(xa + s * n, n, {"content": 1}), (xb + s * n, n, {"content": 0, "semantic": 1})]
    if variant == "train_image_fm":
        z = (1 - s) * xa + s * e
        goal = e - xa
        return [
            (z, goal, {"content": 1}),
            (z, goal + eta * (xa - xb), {"content": 0, "semantic": 1}),
        ]
    if variant == "train_image_sliders":
        return [
            ((1 - s) * xb + s * e, e - xb, {"semantic": 1}),
            ((1 - s) * xa + s * e, e - xa, {"semantic": -1}),
        ]
    if variant == "train_image_real":
        return [((1 - s) * xa + s * e, e - xa, {"content": 1})]
    target, positive, negative = teacher
    g = target + eta * (positive - negative)
    lengths = [(p.norm() / x.norm()) for p, x in zip(positive, g, strict=True)]
    return [(xa, torch.stack([x * k for x, k in zip(g, lengths, strict=True)]), {"semantic": 1})]


@pytest.mark.parametrize("variant", list(script.LOSSES))
def test_every_variant_is_its_closed_form(variant):
    """0 in the expected switches: on, but without a gradient."""
    g = numbers()
    passes = script.LOSSES[variant](g)
    expected = expected_passes(
        variant, g.source, g.target, g.noise, g.sigma, g.noise_scale, g.eta, g.teacher
    )
    assert len(passes) == len(expected)
    for ours, (noisy, velocity, switches) in zip(passes, expected, strict=True):
        torch.testing.assert_close(ours.noisy, noisy)
        torch.testing.assert_close(ours.velocity, velocity)
        on = {
            o.adapter: (0 if o.frozen else float(torch.as_tensor(o.scale).mean()))
            for o in ours.lane
        }
        assert on == switches


def test_every_setting_of_python_name_has_its_loss():
    names = script.Config.model_fields["python_name"].annotation.__args__
    assert set(names) == set(script.LOSSES)


@pytest.mark.parametrize("variant", ["train_image", "train_image_wocontent", "train_image_fm"])
def test_one_euler_step_from_z_to_sigma_0_moves_eta_sigma_of_the_way(variant):
    """z -> x_A + eta sigma (x_B - x_A): towards the target picture."""
    g = numbers(beta=1.0)
    semantic = script.LOSSES[variant](g)[-1]
    end = semantic.noisy + (0 - g.sigma) * semantic.velocity
    expected = g.source + g.eta * g.sigma * (g.target - g.source)
    torch.testing.assert_close(end, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["train_image", "train_image_fm", "train_image_real"])
def test_the_content_pass_alone_lands_on_the_source(variant):
    g = numbers(beta=1.0)
    content = script.LOSSES[variant](g)[0]
    end = content.noisy - g.sigma * content.velocity
    torch.testing.assert_close(end, g.source, rtol=1e-5, atol=1e-5)


def test_a_slider_goes_to_each_of_three_stages_at_its_own_scale(make_slider, tmp_path):
    folders = ("child", "adult", "old")
    concept(tmp_path / "datasets/age", stages=folders)
    trainer = make_slider(stages=list(folders), stage_scales=[-1, 0, 2], num_inference_steps=28)
    trainer = prepared(trainer)
    seen = {}
    for step in range(40):
        (visit,) = visits_of(trainer, step=step)
        g = trainer.given([visit])
        first, second = script.train_image(g)
        seen[g.scale.item()] = visit.stage
        middle = trainer.tokens[visit.pair][0]
        other = trainer.tokens[visit.pair][visit.stage]
        torch.testing.assert_close(first.velocity - second.velocity, 4 * (other - middle)[None])
        assert second.lane == (FROZEN_CONTENT, On("semantic", g.scale))
    assert sorted(seen) == [-1.0, 2.0] and len(set(seen.values())) == 2
    (pair, *_) = trainer.photos(trainer.run)
    assert [file.parent.name for file in pair.files] == ["adult", "child", "old"]
    even = make_slider(stages=list(folders)).config
    assert even.stage_table == [(0.0, "child"), (0.5, "adult"), (1.0, "old")]


# --- one fused pass instead of two ----------------------------------------------------------------


def gradients(trainer, name):
    """{path: (d down, d up)} of one adapter."""
    layers = script.slider_layers(trainer.bare, name).items()
    return {path: (layer.down[name].grad, layer.up[name].grad) for path, layer in layers}


def clear(trainer):
    trainer.bare.zero_grad(set_to_none=True)


def passes_on(trainer, batch=2):
    """Passes of train_image on tokens of the tiny model, fp64."""
    draw = torch.Generator().manual_seed(3)
    shape = batch, 16, trainer.bare.config.in_channels
    x_a, x_b, e = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(3))
    sigma = torch.full((batch, 1, 1), 0.7, dtype=torch.float64)
    scale = torch.ones(batch, dtype=torch.float64)
    return script.LOSSES[trainer.config.python_name](Given(x_a, x_b, e, sigma, scale, 1.0, 4.0))


def fused(trainer, passes, only=None):
    """Backward of the sum of all passes (or of one) in one forward."""
    clear(trainer)
    noisy = torch.cat([part.noisy for part in passes])
    trainer.board.lanes = [part.lane for part in passes]
    arguments = inputs_of(trainer.bare, 1, torch.float64)
    n = len(noisy)
    for key in ("timestep", "guidance", "encoder_hidden_states", "pooled_projections"):
        arguments[key] = arguments[key].repeat(n, *[1] * (arguments[key].dim() - 1))
    velocity = trainer.bare(**(arguments | {"hidden_states": noisy}))[0].chunk(len(passes))
    losses = [F.mse_loss(v, part.velocity) for v, part in zip(velocity, passes, strict=True)]
    (losses[only] if only is not None else sum(losses)).backward()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_fused_pass_has_the_gradients_of_pairedits_two_passes(checkpointing, make_slider):
    """Reference: content on, backward; then content's parameters frozen, both on, backward."""
    trainer = filled(prepared(make_slider(gradient_checkpointing=checkpointing)))
    trainer.bare.double()
    passes = passes_on(trainer)
    fused(trainer, passes)
    ours = {name: gradients(trainer, name) for name in ("content", "semantic")}
    fused(trainer, [passes[0]._replace(lane=(On("content"),))])
    content = gradients(trainer, "content")
    for layer in script.slider_layers(trainer.bare, "content").values():
        layer.down["content"].requires_grad_(False)
        layer.up["content"].requires_grad_(False)
    fused(trainer, [passes[1]._replace(lane=(On("content"), On("semantic")))])
    semantic = gradients(trainer, "semantic")
    for name, reference in (("content", content), ("semantic", semantic)):
        for path, grads in reference.items():
            for mine, theirs in zip(ours[name][path], grads, strict=True):
                assert theirs.norm() > 1e-7, f"{name} {path}: nothing to compare"
                assert (mine - theirs).norm() / theirs.norm() < 1e-12, f"{name} {path}"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_loss_reaches_into_the_other_adapter(checkpointing, make_slider):
    trainer = filled(prepared(make_slider(gradient_checkpointing=checkpointing)))
    trainer.bare.double()
    for number, (own, other) in enumerate([("content", "semantic"), ("semantic", "content")]):
        fused(trainer, passes_on(trainer), only=number)
        for path, grads in gradients(trainer, own).items():
            assert all(grad.abs().max() > 0 for grad in grads), path
        for path, grads in gradients(trainer, other).items():
            assert all(grad is None or not grad.any() for grad in grads), path


@pytest.mark.parametrize("variant", list(script.LOSSES))
def test_a_training_step_is_the_sum_of_its_passes_one_by_one(variant, make_slider, monkeypatch):
    """In fp32, through the trainer's own loss, with gradient checkpointing."""
    ids = {"image_ids": ["7001"]} if variant == "train_image_real" else {}
    trainer = make_slider(python_name=variant, batch_size=2, gradient_checkpointing=True, **ids)
    trainer = filled(prepared(trainer))
    visits = visits_of(trainer, 2)
    loss, losses = trainer.training_loss(visits)
    loss.backward()
    ours = {n: gradients(trainer, n) for n in script.adapters_of(variant)}
    clear(trainer)
    original, singles = script.LOSSES[variant], []
    for number in range(len(losses)):
        monkeypatch.setitem(script.LOSSES, variant, lambda g, n=number: [original(g)[n]])
        single, _ = trainer.training_loss(visits)
        single.backward()
        singles.append(single.detach())
    torch.testing.assert_close(loss.detach(), sum(singles), rtol=1e-5, atol=0)
    for name, layers in ours.items():
        for path, grads in gradients(trainer, name).items():
            for mine, theirs in zip(layers[path], grads, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max())


def test_groups_of_equal_shape_are_found_in_one_pass(make_slider, tmp_path):
    """Each pair's group is all pairs of its shape; members share one list."""
    folder = concept(tmp_path / "datasets/age", ("a", "c"), (64, 64))
    concept(folder, ("b", "d"), (96, 64))
    trainer = prepared(make_slider())
    assert trainer.names == ["a", "b", "c", "d"]
    assert trainer.grids == [(4, 4), (3, 5), (4, 4), (3, 5)]
    assert trainer.groups == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert trainer.groups[0] is trainer.groups[2]  # memory for 100,000 pairs stays linear


def test_a_text_slider_learns_where_the_base_really_gets_at_each_samples_own_sigma(make_slider):
    """Every sample as if it were alone, whatever the size of the batch."""
    trainer = prepared(make_slider(python_name="slider_text", num_inference_steps=8, end_step=7))
    visits = visits_of(trainer, 4)
    together, table = trainer.given_text(visits), trainer.sigmas(16)
    assert len({visit.step_index for visit in visits}) == 4
    for number, visit in enumerate(visits):
        one = trainer.given_text([visit])
        assert together.sigma[number].item() == table[visit.step_index]
        for ours, alone in (
            (together.source, one.source),
            *zip(together.teacher, one.teacher, strict=True),
        ):
            torch.testing.assert_close(ours[number], alone[0], rtol=1e-4, atol=1e-5)
    tokens = script.draw_noise(visits[2], (16, 64))[None]
    predict = trainer.predictor(trainer.bare, trainer.text("picture of a person"), (4, 4))
    with torch.no_grad():
        for i in range(visits[2].step_index):
            tokens = tokens + (table[i + 1] - table[i]) * predict(tokens, table[i], [()])
    torch.testing.assert_close(together.source[2], tokens[0], rtol=1e-4, atol=1e-5)


# --- files ----------------------------------------------------------------------------------------


def test_the_saved_slider_has_its_strength_in_diffusers(make_slider, checkpoints, tmp_path):
    """alpha 1, rank 16 in training; at scale 1 in the pipeline the same output."""
    trainer = filled(prepared(make_slider()))
    file = tmp_path / "slider.safetensors"
    script.save_slider(file, trainer.bare, "semantic", {"step": 4})
    pipeline = pipeline_of(checkpoints["flux"])
    pipeline.load_lora_weights(str(file))
    arguments = inputs_of(trainer.bare)
    for scale in (1.0, -0.5):
        pipeline.set_adapters(pipeline.get_active_adapters(), [scale])
        trainer.board.lanes = [(On("semantic", scale),)]
        ours = trainer.bare(**arguments)[0]
        torch.testing.assert_close(pipeline.transformer(**arguments)[0], ours, rtol=1e-5, atol=1e-5)
    trainer.board.lanes = [()]
    assert (trainer.bare(**arguments)[0] - ours).abs().max() > 1e-3
    tensors = load_file(file)
    for path, layer in script.slider_layers(trainer.bare, "semantic").items():
        assert torch.equal(tensors[f"transformer.{path}.lora_A.weight"], layer.down["semantic"])
        assert torch.equal(tensors[f"transformer.{path}.lora_B.weight"] * 16, layer.up["semantic"])
    with safe_open(file, framework="pt") as opened:
        assert json.loads(opened.metadata()["image_edit_lora"]) == {"step": 4}


def test_the_original_format_has_pairedits_keys(make_slider, tmp_path):
    trainer = filled(prepared(make_slider()))
    script.save_original(tmp_path / "slider.pt", trainer.bare, "content")
    tensors = torch.load(tmp_path / "slider.pt", weights_only=True)
    layers = script.slider_layers(trainer.bare, "content")
    assert len(tensors) == 3 * len(layers) == 3 * (2 * 8 + 2 * 3)
    head = "lora_unet_transformer_blocks_0_attn_to_out_0"
    layer = layers["transformer_blocks.0.attn.to_out.0"]
    assert torch.equal(tensors[f"{head}.lora_down.weight"], layer.down["content"])
    assert torch.equal(tensors[f"{head}.lora_up.weight"], layer.up["content"])
    assert tensors[f"{head}.lora_down.weight"].shape == (16, 64)
    assert tensors[f"{head}.alpha"].shape == () and tensors[f"{head}.alpha"] == 1
    assert "lora_unet_single_transformer_blocks_1_attn_to_v.lora_up.weight" in tensors


# --- draws ----------------------------------------------------------------------------------------


def config_of(**changes):
    return script.Config(pretrained_model_name_or_path="x", **changes)


def many_visits(steps=2000, count=1, groups=((0, 1, 2),) * 3, **changes):
    config = config_of(**changes)
    return [v for step in range(steps) for v in script.draw_visits(config, 1, step, groups, count)]


def test_a_draw_belongs_to_seed_version_and_step():
    config, groups = config_of(batch_size=4), [[0, 1], [0, 1]]
    torch.manual_seed(1)
    first = script.draw_visits(config, 3, 7, groups, 4)
    torch.manual_seed(2)
    assert script.draw_visits(config, 3, 7, groups, 4) == first
    for other in ((config, 4, 7), (config, 3, 8), (config_of(seed=1), 3, 7)):
        assert script.draw_visits(*other, groups, 4) != first


def test_the_31_noises_are_torchs_own_of_the_seeds_0_to_30(make_slider):
    visits = many_visits()
    assert {visit.noise for visit in visits} == set(range(31))
    noise = script.draw_noise(visits[0]._replace(noise=17), (16, 64))
    expected = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(17))
    assert torch.equal(noise, expected[0])
    fresh = many_visits(50, num_noise_seeds=None)
    assert len({visit.noise for visit in fresh}) == 50
    both = [script.draw_noise(visit, (16, 64)) for visit in fresh[:2]]
    assert not torch.equal(*both) and abs(both[0].std() - 1) < 0.1
    assert torch.equal(both[0], script.draw_noise(fresh[0], (16, 64)))


def test_pairs_and_steps_are_drawn_evenly_and_both_ends_are_included():
    visits = many_visits(4000, start_step=3, end_step=9)
    assert {v.step_index for v in visits} == set(range(3, 10))
    steps = np.bincount([v.step_index for v in visits])[3:] / len(visits)
    assert abs(steps - 1 / 7).max() < 0.02
    pairs = np.bincount([v.pair for v in visits]) / len(visits)
    assert len(pairs) == 3 and abs(pairs - 1 / 3).max() < 0.025


def test_pairs_of_several_shapes_are_as_likely_and_never_mixed():
    groups = [[0, 2, 3], [1], [0, 2, 3], [0, 2, 3]]
    visits = many_visits(3000, 2, groups)
    for a, b in zip(visits[::2], visits[1::2], strict=True):
        assert b.pair in groups[a.pair]
    share = np.bincount([v.pair for v in visits]) / len(visits)
    assert abs(share - 0.25).max() < 0.03


def test_a_larger_batch_spreads_its_sigmas_evenly():
    for step in range(50):
        visits = script.draw_visits(config_of(), 1, step, [[0]], 4)
        assert [v.step_index // 7 for v in visits] == [0, 1, 2, 3]
    everything = many_visits(2000, 4)
    share = np.bincount([v.step_index for v in everything]) / len(everything)
    assert len(share) == 28 and abs(share - 1 / 28).max() < 0.01
