"""Section 4: loading, quantising, LoRA kinds, devices, block swap."""

import contextlib
import itertools
import json
import logging
import multiprocessing
import shutil
import sys

import accelerate.utils
import diffusers
import pytest
import torch
from conftest import LAUNCH, ROOT, copy_pairs, run, small_config, with_lora_noise, write_config
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef

import generate
import train_qwen_edit as script
from benchmarks import load_quantized
from utils import UserError, load_script

CPU = torch.device("cpu")
ONE_CPU = script.Layout([CPU])
PRECISIONS = ["int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto", "nf4-bnb"]


@pytest.fixture(scope="session")
def deep(checkpoints, tmp_path_factory):
    """The 2511 checkpoint with 6 blocks instead of 2."""
    folder = tmp_path_factory.mktemp("deep") / "2511"
    shutil.copytree(checkpoints["2511"], folder)
    torch.manual_seed(1)
    rebuild = load_script(ROOT / "demo/rebuild.py")
    transformer = rebuild.build_transformer(zero_cond_t=True, layers=6, heads=2, head_dim=32)
    shutil.rmtree(folder / "transformer")
    transformer.save_pretrained(folder / "transformer")
    return folder


@pytest.fixture
def make_deep(deep, make_trainer):
    """make_trainer on the 6 blocks; losses and gradients of one batch are those of `step`."""

    def make(**changes):
        return make_trainer(**{"model.pretrained_model_name_or_path": str(deep), **changes})

    return make


def a_batch(seed=0, size=8):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "pixel_latent": normal(2, 16, 1, size, size),
        "control_latent": [normal(2, 16, 1, size, size)],
        "prompt_embed": normal(2, 6, 64),
        "noise": normal(2, 16, 1, size, size),
        "sigma": torch.tensor([0.3, 0.7]),
    }


def loss_and_gradients(trainer, batch=None):
    """Of one training step, with an adapter that does something."""
    trainer.set_lora()
    with_lora_noise(trainer.transformer)
    loss = trainer.training_step(batch or a_batch())
    loss.backward()
    gradients = {n: p.grad for n, p in trainer.transformer.named_parameters() if p.requires_grad}
    assert gradients and all(g is not None for g in gradients.values())
    return loss.detach(), gradients


def assert_same_step(ours, theirs):
    assert torch.equal(ours[0], theirs[0])
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in ours[1].items():
        assert torch.equal(gradient, theirs[1][name]), name


def velocity(transformer, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((1, 16, 1, 8, 8), (1, 16, 1, 8, 8), (1, 9, 64))
    noisy, reference, embeds = (torch.randn(s, generator=generator).to(dtype) for s in sizes)
    sigma = torch.tensor([0.5], dtype=dtype)
    with torch.no_grad():
        return script.predict_velocity(transformer, noisy, [reference], embeds, None, sigma)


def load(folder, dtype=torch.float32, precision="no_change", layout=ONE_CPU, cache=None, via="cpu"):
    return script.TransformerLoader(folder / "transformer", dtype, precision, cache).load(
        layout, via
    )


# -- loading


@pytest.mark.parametrize("kind", ["2509", "2511"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_equals_from_pretrained_bit_for_bit(kind, dtype, checkpoints, tmp_path):
    theirs = diffusers.QwenImageTransformer2DModel.from_pretrained(
        checkpoints[kind] / "transformer", dtype=dtype
    ).eval()
    sharded = tmp_path / "transformer"
    diffusers.QwenImageTransformer2DModel.from_pretrained(
        checkpoints[kind] / "transformer"
    ).save_pretrained(sharded, max_shard_size="300KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for folder in (checkpoints[kind], tmp_path):
        ours = load(folder, dtype)
        assert not any(p.requires_grad for p in ours.parameters()) and not ours.training
        assert ours.config.num_layers == 2 and ours.dtype == dtype
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], tensor), name
        assert torch.equal(ours.pos_embed.pos_freqs, theirs.pos_embed.pos_freqs)
        assert torch.equal(ours.pos_embed.neg_freqs, theirs.pos_embed.neg_freqs)
        assert torch.equal(velocity(ours, dtype), velocity(theirs, dtype))


def test_weights_that_do_not_fit_are_named(checkpoints, tmp_path):
    folder = tmp_path / "transformer"
    shutil.copytree(checkpoints["2511"] / "transformer", folder)
    file = folder / script.WEIGHTS_FILE
    tensors = load_file(file)
    tensors["proj_out.bias"] = tensors["proj_out.bias"][:-1].clone()
    tensors["proj_outt.bias"] = tensors.pop("img_in.bias")
    save_file(tensors, file)
    with pytest.raises(UserError) as error:
        load(tmp_path)
    text = str(error.value)
    assert "1 missing:\n  - img_in.bias" in text and "1 unexpected:\n  - proj_outt.bias" in text
    assert "1 of another shape:\n  - proj_out.bias" in text
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=rf"{file.name} cannot be read"):
        load(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=rf"{file.name} cannot be read"):
        load(tmp_path)


# -- precision


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_blocks_are_near_the_originals(precision, dtype, deep):
    plain, quantised = load(deep, dtype), load(deep, dtype, precision)
    assert quantised.quantized_to == precision
    kept, changed = 0, 0
    layers = dict(quantised.named_modules())
    for name, layer in plain.named_modules():
        if not isinstance(layer, torch.nn.Linear):
            continue
        other = layers[name]
        inside = name.startswith("transformer_blocks.") and "_mod." not in name
        if not inside:  # embedders, modulation, norms, output
            assert type(other) is torch.nn.Linear and torch.equal(other.weight, layer.weight)
            kept += 1
            continue
        weight = other.weight
        if precision == "nf4-bnb":
            import bitsandbytes as bnb

            weight = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        else:
            weight = weight.dequantize()
        error = (weight.float() - layer.weight.float()).norm() / layer.weight.float().norm()
        limit = {"int8": 0.01, "int4": 0.1, "int2": 0.5, "fp8": 0.04, "nf4": 0.12}
        assert 0 < error < limit[precision.split("-")[0]], (name, error)
        assert torch.equal(other.bias, layer.bias)
        changed += 1
    assert changed == 6 * 12 and kept == 6 * 2 + 6
    ours, theirs = (velocity(model, dtype).float() for model in (quantised, plain))
    assert torch.isfinite(ours).all()
    limit = {"int8": 0.02, "int4": 0.3, "int2": 1.0, "fp8": 0.1, "nf4": 0.3}
    assert (ours - theirs).norm() / theirs.norm() < limit[precision.split("-")[0]]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mixed", ["no", "bf16"])
def test_a_lora_trains_on_every_precision(precision, mixed, make_deep, tmp_path):
    """The gradients are those of the LoRA on the dequantised base."""
    trainer = make_deep(
        **{
            "model.base_model_precision": precision,
            "model.lora.target_modules": "attn+mlp",
            "train.mixed_precision": mixed,
            "train.gradient_checkpointing": True,
        }
    )
    loss, gradients = loss_and_gradients(trainer)
    assert all(g.dtype == torch.float32 and g.abs().sum() > 0 for g in gradients.values())
    layer = trainer.transformer.transformer_blocks[0].attn.to_q
    assert type(layer).__name__ == ("Linear4bit" if precision == "nf4-bnb" else "Linear")
    # the same base, dequantised
    other = make_deep(
        **{
            "model.lora.target_modules": "attn+mlp",
            "train.mixed_precision": mixed,
            "train.gradient_checkpointing": True,
        }
    )
    other.load_model(["transformer"])
    for name, part in other.transformer.named_modules():
        if isinstance(part, torch.nn.Linear) and name.startswith("transformer_blocks"):
            if "_mod." in name:
                continue
            layer = trainer.transformer.get_submodule(name)
            weight = getattr(layer, "base_layer", layer).weight
            if precision == "nf4-bnb":
                import bitsandbytes as bnb

                weight = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            else:
                weight = weight.dequantize()
            part.weight.data = weight.detach()
    expected, wanted = loss_and_gradients(other)
    torch.testing.assert_close(loss, expected, rtol=1e-4 if mixed == "no" else 0.02, atol=1e-6)
    ours, theirs = (torch.cat([g.flatten() for g in gs.values()]) for gs in (gradients, wanted))
    assert (ours - theirs).norm() / theirs.norm() < (1e-3 if mixed == "no" else 0.1)
    with pytest.raises(UserError, match="quantised"):
        trainer.merge_lora()


def test_quantize_true_means_fp8(make_trainer):
    for given in ("config", "attribute"):
        trainer = make_trainer(**({"model.quantize": True} if given == "config" else {}))
        trainer.quantize = True
        trainer.load_model(["transformer"])
        assert trainer.transformer.quantized_to == "fp8-quanto"
    trainer = make_trainer()
    trainer.load_model(["transformer"])
    assert trainer.quantize_model(trainer.transformer) is trainer.transformer
    assert trainer.transformer.quantized_to == "fp8-quanto"
    trainer = make_trainer()
    trainer.load_model(["transformer"])
    trainer.quantize = True  # late: it is quantised in place
    trainer.set_lora()
    assert trainer.transformer.quantized_to == "fp8-quanto"
    with pytest.raises(UserError, match="before"):
        trainer.quantize_model(trainer.transformer)


@pytest.mark.parametrize("precision", ["int4-quanto", "int2-quanto"])
def test_no_extension_is_compiled(precision, deep, monkeypatch):
    from optimum import quanto

    def never(**options):
        raise AssertionError("a compiler was called")

    known = [name for name in script.QUANTO_EXTENSIONS if quanto.is_extension_available(name)]
    assert known  # quanto's names for them
    for extension in map(quanto.get_extension, known):
        monkeypatch.setattr(sys.modules[type(extension).__module__], "load", never)
        monkeypatch.setattr(extension, "_lib", None)
    model = load(deep, torch.float32, precision)
    packed = model.transformer_blocks[2].attn.to_k.weight._data
    bits = int(precision[3])
    values = torch.arange(64 * 32, dtype=torch.uint8).view(64, 32) % 2**bits
    assert torch.equal(script.unpack_bits(type(packed).pack(values, bits)._data, bits), values)
    assert torch.isfinite(velocity(model)).all()


def test_a_missing_package_is_named_before_anything_loads(make_trainer, monkeypatch):
    found = script.importlib.util.find_spec
    absent = {"optimum.quanto", "bitsandbytes"}
    monkeypatch.setattr(
        script.importlib.util, "find_spec", lambda name: None if name in absent else found(name)
    )
    for precision, package in (("int8-quanto", "optimum-quanto"), ("nf4-bnb", "bitsandbytes")):
        trainer = make_trainer(**{"model.base_model_precision": precision})
        for method in (trainer.fit, trainer.load_model):
            with pytest.raises(UserError, match=f"pip install {package}"):
                method()
        assert trainer.transformer is None


# -- the cache of quantised weights


def as_bytes(tensor):
    return tensor.detach().flatten().view(torch.uint8)


def kept_files(cache):
    return sorted((cache / "quantized").glob("*/*.safetensors"))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_start_reads_only_the_cache(precision, dtype, deep, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = load(deep, dtype, precision, cache=cache)
    files = kept_files(cache)
    assert len({file.parent for file in files}) == 1
    assert len(files) == 6 + 6 and not list(cache.rglob("*.tmp"))  # blocks, other parts

    def never(folder):
        raise AssertionError("the original weights were opened")

    monkeypatch.setattr(script, "find_weights", never)
    second = load(deep, dtype, precision, cache=cache)
    ours, theirs = second.state_dict(), first.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(as_bytes(tensor), as_bytes(theirs[name])), name
    assert torch.equal(velocity(second, dtype), velocity(first, dtype))
    assert [type(m) for m in second.modules()] == [type(m) for m in first.modules()]


def test_another_precision_dtype_or_model_has_its_own_cache(deep, checkpoints, tmp_path):
    load(deep, torch.float32, "int8-quanto", cache=tmp_path)
    load(deep, torch.bfloat16, "int8-quanto", cache=tmp_path)
    load(deep, torch.float32, "int4-quanto", cache=tmp_path)
    load(checkpoints["2511"], torch.float32, "int8-quanto", cache=tmp_path)
    assert len({file.parent for file in kept_files(tmp_path)}) == 4
    load(deep, torch.float32, "no_change", cache=tmp_path)
    assert len({file.parent for file in kept_files(tmp_path)}) == 4


def test_damaged_or_missing_parts_are_built_again(deep, tmp_path, caplog):
    first = load(deep, torch.bfloat16, "int8-quanto", cache=tmp_path)
    files = kept_files(tmp_path)
    sound = {file: file.read_bytes() for file in files}
    hurt = [next(f for f in files if f.stem == f"transformer_blocks.{n}") for n in (1, 3, 4)]
    hurt[0].write_bytes(sound[hurt[0]][:-7] + b"damaged")
    hurt[1].write_bytes(b"")
    hurt[2].unlink()
    times = {file: file.stat().st_mtime_ns for file in files if file not in hurt}
    with caplog.at_level(logging.WARNING):
        again = load(deep, torch.bfloat16, "int8-quanto", cache=tmp_path)
    assert caplog.text.count("it is built again") == 2 and hurt[0].name in caplog.text
    assert {file: file.read_bytes() for file in files} == sound
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert torch.equal(velocity(again, torch.bfloat16), velocity(first, torch.bfloat16))


def test_two_processes_may_fill_one_cache(deep, tmp_path):
    context = multiprocessing.get_context("fork")
    arguments = (deep, torch.float32, "int8-quanto", ONE_CPU, tmp_path)
    both = [context.Process(target=load, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(kept_files(tmp_path)) == 12 and not list(tmp_path.rglob("*.tmp"))
    alone = load(deep, torch.float32, "int8-quanto")
    assert torch.equal(velocity(load(*arguments)), velocity(alone))


def test_without_cache_nothing_is_kept(make_trainer, tmp_path):
    for use in (False, True):
        trainer = make_trainer(
            **{"model.base_model_precision": "int8-quanto", "cache.use_cache": use}
        )
        trainer.load_model(["transformer"])
        assert bool(kept_files(tmp_path / "cache")) == use


# -- targets and methods

T2I_TRAINER = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj"]
T2I_TRAINER += ["attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]
T2I_TRAINER += ["img_mlp.net.2", "txt_mlp.net.2"]


@pytest.fixture
def full_size():
    """Qwen-Image-Edit-2511 without weights."""
    settings = {"num_layers": 60, "attention_head_dim": 128, "num_attention_heads": 24}
    settings |= {"joint_attention_dim": 3584, "in_channels": 64, "out_channels": 16}
    return script.empty_transformer({**settings, "zero_cond_t": True})


def adapted(transformer):
    """Layers with an adapter."""
    names = script.lora_tensors(transformer)
    return {name.replace(".lokr_", ".lora_").split(".lora_")[0] for name in names}


@pytest.mark.parametrize(
    ("targets", "excluded", "rank", "parameters"),
    [
        ("attn-image", "", 16, 23_592_960),
        (T2I_TRAINER, "59", 16, 75_399_168),
        (T2I_TRAINER, "59", 32, 150_798_336),
        (T2I_TRAINER, "59", 64, 301_596_672),
    ],
)
def test_full_size_parameter_counts(targets, excluded, rank, parameters, full_size):
    assert sum(p.numel() for p in full_size.parameters()) == 20_430_401_088
    lora = script.LoraConfig(r=rank, target_modules=targets, exclude_blocks=excluded)
    script.add_lora(full_size, lora, 0)
    assert sum(p.numel() for p in full_size.parameters() if p.requires_grad) == parameters
    layers = adapted(full_size)
    assert len(layers) == (240 if targets == "attn-image" else 59 * 10)
    assert not [n for n in layers if n.startswith("transformer_blocks.59.")] or not excluded


@pytest.mark.parametrize(
    ("targets", "per_block", "dead"),
    [("attn-image", 4, 0), ("attn-all", 8, 2), ("attn+mlp", 12, 4), ("all-linear", 14, 4)],
)
@pytest.mark.parametrize("method", ["lora", "dora", "lokr"])
def test_named_sets_leave_out_what_nothing_depends_on(targets, per_block, dead, method, make_deep):
    trainer = make_deep(
        **{
            "model.lora.target_modules": targets,
            "model.lora.method": method,
            "model.lora.exclude_blocks": "1, 3-4",
        }
    )
    trainer.set_lora()
    layers = adapted(trainer.transformer)
    assert len(layers) == 3 * per_block - dead
    assert {name.split(".")[1] for name in layers} == {"0", "2", "5"}
    with_lora_noise(trainer.transformer)
    for parameter in trainer.trainable():
        assert parameter.dtype == torch.float32
        parameter.data += 0.1
    trainer.training_step(a_batch()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainer.trainable())


def test_wrong_targets_and_blocks_are_named(make_deep, deep):
    trainer = make_deep(**{"model.lora.target_modules": "attn-img"})
    with pytest.raises(UserError, match=r"attn-img; there are the sets attn-image, attn-all.*to_q"):
        trainer.set_lora()
    trainer = make_deep(**{"model.lora.exclude_blocks": "0-5"})
    with pytest.raises(UserError, match="no layer is left to train"):
        trainer.preflight()
    config = make_deep(**{"model.lora.exclude_blocks": "0, 6-9"}).config
    assert "model.lora.exclude_blocks: no block 6, the last is 5" in script.audit(config)


METHODS = {"model.lora.target_modules": "all-linear", "model.lora.r": 4}


def with_noise_everywhere(trainer):
    """An adapter, all of whose parts matter."""
    trainer.set_lora()
    generator = torch.Generator().manual_seed(3)
    for parameter in trainer.trainable():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return velocity(trainer.transformer)


@pytest.mark.parametrize("alpha", [4.0, 8.0, 6.0])
@pytest.mark.parametrize("method", ["dora", "lokr"])
def test_dora_and_lokr_files_load_at_their_strength(
    method, alpha, make_trainer, tmp_path, checkpoints
):
    """In this script, in a fresh diffusers model, merged, and as a start for training."""
    settings = {**METHODS, "model.lora.method": method, "model.lora.lora_alpha": alpha}
    trainer = make_trainer(**settings)
    expected = with_noise_everywhere(trainer)
    with torch.no_grad():
        trainer.transformer.disable_adapters()
        base = velocity(trainer.transformer)
        trainer.transformer.enable_adapters()
    assert (expected - base).abs().max() > 0.02
    file = trainer.save_lora(tmp_path / "trained.safetensors")
    # alpha / r is folded in; a power of two commutes with rounding
    tolerance = {"rtol": 0, "atol": 3e-6 if alpha == 6 else 0}
    again = make_trainer()
    again.load_lora(file)
    torch.testing.assert_close(velocity(again.transformer), expected, **tolerance)

    start = make_trainer(**settings, **{"model.lora.pretrained_weight": str(file)})
    start.set_lora()
    torch.testing.assert_close(velocity(start.transformer), expected, **tolerance)

    folder = checkpoints["2511"]
    pipeline = diffusers.QwenImageEditPlusPipeline.from_pretrained(
        folder, processor=script.load_processor(folder / "processor")
    )
    if method == "dora":
        pipeline.load_lora_weights(file)
    else:
        with pytest.raises(ValueError, match="lora"):
            pipeline.load_lora_weights(file)
        namespace = {"pipe": pipeline}
        exec(script.LOAD_LOKR.format(file=file), namespace)  # what README of the run says
    torch.testing.assert_close(velocity(pipeline.transformer), expected, **tolerance)

    trainer.merge_lora()
    assert not adapted_layers(trainer.transformer)
    torch.testing.assert_close(velocity(trainer.transformer), expected, rtol=1e-4, atol=1e-5)


def adapted_layers(transformer):
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [m for m in transformer.modules() if isinstance(m, BaseTunerLayer)]


@pytest.mark.parametrize("mixed", ["no", "bf16"])
@pytest.mark.parametrize("method", ["lora", "dora", "lokr"])
def test_every_method_starts_as_the_base_model_and_learns(method, mixed, make_deep):
    settings = {**METHODS, "model.lora.method": method, "train.mixed_precision": mixed}
    trainer = make_deep(**settings, **{"train.gradient_checkpointing": True})
    trainer.set_lora()
    with torch.no_grad():
        adapter = trainer.training_step(a_batch())
        trainer.transformer.disable_adapters()
        base = trainer.training_step(a_batch())
        trainer.transformer.enable_adapters()
    torch.testing.assert_close(adapter, base, rtol=1e-6 if mixed == "no" else 1e-3, atol=0)
    optimizer = torch.optim.AdamW(trainer.trainable(), lr=1e-2)
    for _ in range(20):
        trainer.training_step(a_batch()).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert trainer.training_step(a_batch()) < 0.95 * base


def test_lokr_factor_is_the_size_of_the_small_matrix(make_trainer):
    trainer = make_trainer(**{"model.lora.method": "lokr", "model.lora.lokr_factor": 4})
    trainer.set_lora()
    shapes = {
        tuple(t.shape)
        for n, t in script.lora_tensors(trainer.transformer).items()
        if n.endswith("lokr_w1")
    }
    assert shapes == {(4, 4)}


@pytest.mark.parametrize("method", ["dora", "lokr"])
def test_a_start_of_another_method_or_rank_is_refused(method, make_trainer, tmp_path):
    trainer = make_trainer(**{"model.lora.method": method})
    trainer.set_lora()
    file = trainer.save_lora(tmp_path / "start.safetensors")
    for change in ({"model.lora.method": "lora"}, {"model.lora.r": 8}):
        settings = {"model.lora.method": method, "model.lora.pretrained_weight": str(file)}
        other = make_trainer(**{**settings, **change})
        with pytest.raises(UserError, match=f"it is a {method} of rank 4"):
            other.preflight()


@pytest.mark.parametrize(
    ("method", "precision", "fine"),
    [
        ("dora", "int8-quanto", False),
        ("dora", "nf4-bnb", True),
        ("lokr", "nf4-bnb", False),
        ("lokr", "int4-quanto", True),
    ],
)
def test_methods_on_quantised_bases(method, precision, fine, make_deep):
    trainer = make_deep(
        **METHODS,
        **{
            "model.lora.method": method,
            "model.base_model_precision": precision,
            "train.mixed_precision": "bf16",
        },
    )
    problems = script.check_model(trainer.config, precision)
    assert (not problems) == fine and all("model.lora.method" in p for p in problems)
    if fine:
        trainer.set_lora()
        for parameter in trainer.trainable():
            parameter.data += 0.1
        trainer.training_step(a_batch()).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainer.trainable())


def test_generate_applies_lokr_files_alone_and_beside_a_lora(make_trainer, tmp_path, checkpoints):
    files, expected = {}, {}
    for method in ("lora", "lokr"):
        trainer = make_trainer(**METHODS, **{"model.lora.method": method})
        expected[method] = with_noise_everywhere(trainer)
        files[method] = trainer.save_lora(tmp_path / f"{method}.safetensors")
        trainer.transformer.disable_adapters()
    base = velocity(trainer.transformer)
    settings = {"pretrained_model_name_or_path": str(checkpoints["2511"]), "device": "cpu"}
    for scales in ((1, 0), (0, 1), (1, 1)):
        texts = [f"{files[m]}:{s}" for m, s in zip(files, scales, strict=True)]
        config = generate.Config(**settings, lora=texts)
        pipeline = generate.load_pipeline(config)
        generate.set_scales(pipeline, config, 1.0)
        seen = velocity(pipeline.transformer)
        if sum(scales) == 1:
            wanted = expected["lora" if scales[0] else "lokr"]
            torch.testing.assert_close(seen, wanted, rtol=0, atol=2e-6)
        else:
            assert min((seen - v).abs().max() for v in (base, *expected.values())) > 0.05
        generate.set_scales(pipeline, config, 0.0)
        assert torch.equal(velocity(pipeline.transformer), base)


# -- memory


def test_loading_int8_never_holds_more_than_two_blocks_in_full_precision(tmp_path):
    """Resident memory of a fresh process, own and mapped pages, sampled every millisecond."""
    whole, block = load_quantized.write_random_transformer(
        tmp_path / "transformer", load_quantized.SMALL
    )
    assert whole > 800 * 2**20
    places = [tmp_path / "transformer", tmp_path / "cache"]
    command = [load_quantized.__file__, "--precision", "int8-quanto", "--measure", *places]
    for start in ("first", "from the cache"):
        found = json.loads(run(*command).stdout.splitlines()[-1])
        assert 0.65 * whole < found["size"] < 0.69 * whole  # a third (modulation) stays bf16
        assert found["cpu"] <= found["size"] + 2 * block < whole, start
        assert found["cpu"] >= found["size"], "the sampling missed something"


# -- quantised activations


def activations_trainer(make, precision="int8-quanto", quantise=True, **changes):
    return make(
        **{
            "model.base_model_precision": precision,
            "model.quantize_activations": quantise,
            "model.lora.target_modules": "attn+mlp",
            "train.gradient_checkpointing": True,
            **changes,
        }
    )


@pytest.mark.parametrize("mixed", ["no", "bf16"])
@pytest.mark.parametrize("precision", ["int8-quanto", "fp8-quanto"])
def test_activations_are_quantised_and_the_lora_still_learns(precision, mixed, make_deep):
    steps = {}
    for quantise in (True, False):
        trainer = activations_trainer(
            make_deep, precision, quantise, **{"train.mixed_precision": mixed}
        )
        trainer.set_lora()
        trainer.calibrate([[a_batch(1), a_batch(2)], a_batch(0)])
        steps[quantise] = loss_and_gradients(trainer)
    (loss, gradients), (expected, wanted) = steps[True], steps[False]
    assert loss != expected
    torch.testing.assert_close(loss, expected, rtol=0.03, atol=0)
    ours, theirs = (torch.cat([g.flatten() for g in gs.values()]) for gs in (gradients, wanted))
    similarity = torch.nn.functional.cosine_similarity(ours, theirs, dim=0)
    assert similarity > (0.98 if precision == "int8-quanto" else 0.95)


def test_what_enters_a_layer_is_rounded_to_its_scale(make_deep):
    trainer = activations_trainer(make_deep)
    trainer.set_lora()
    trainer.calibrate([a_batch()])
    layer = trainer.transformer.transformer_blocks[3].attn.to_q.base_layer
    inputs = 0.3 * torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    rounded = (inputs / layer.input_scale).round().clamp(-127, 127) * layer.input_scale
    expected = torch.nn.functional.linear(rounded, layer.weight.dequantize(), layer.bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs), expected, rtol=1e-4, atol=1e-5)


def input_scales(transformer):
    from optimum.quanto import QLinear

    layers = [m for m in transformer.modules() if isinstance(m, QLinear)]
    return torch.stack([layer.input_scale for layer in layers])


def test_scales_are_the_largest_inputs_of_the_first_steps(make_deep):
    found = []
    for batches in ([a_batch(0), a_batch(1)], [a_batch(1), a_batch(0)], [a_batch(0)]):
        trainer = activations_trainer(make_deep)
        trainer.set_lora()
        trainer.calibrate(batches)
        found.append(input_scales(trainer.transformer))
        before = found[-1].clone()
        trainer.calibrate([a_batch(2)])  # once is enough
        assert torch.equal(input_scales(trainer.transformer), before)
    assert torch.equal(found[0], found[1]) and (found[0] >= found[2]).all()
    assert (found[0] > found[2]).any() and (found[2] > 0).all() and not (found[2] == 1).any()
    seen = []
    trainer = activations_trainer(make_deep, quantise=False)
    trainer.set_lora()
    layer = trainer.transformer.transformer_blocks[0].attn.to_q.base_layer
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].abs().max()))
    with torch.no_grad():
        trainer.training_step(a_batch(0))
    assert found[2][list(quanto_names(trainer)).index("transformer_blocks.0.attn.to_q")] == (
        seen[0] / 127
    )


def quanto_names(trainer):
    from optimum.quanto import QLinear

    for name, module in trainer.transformer.named_modules():
        if isinstance(module, QLinear):
            yield name.removesuffix(".base_layer")


def folders_dataset(folder):
    """Four photo pairs in the folders layout."""
    copy_pairs(folder)
    for end, name in (("T", "after"), ("R", "before")):
        (folder / name).mkdir()
        for file in folder.glob(f"*_{end}.*"):
            file.rename(folder / name / file.name.replace(f"_{end}", ""))
    data = {"train_data_dir": str(folder), "resolution": 64}
    return {**data, "target_dir": "after", "reference_dirs": ["before"]}


def test_a_resumed_run_has_the_same_scales_and_ends_bit_equal(make_deep, tmp_path):
    changes = {
        "data.dataset_configs": [folders_dataset(tmp_path / "data")],
        "train.resume_from_checkpoint": "latest",
    }
    straight = activations_trainer(make_deep, **changes)
    straight.fit()  # 4 steps, checkpoints at 2 and 4
    out = tmp_path / "out"
    trained = load_file(out / script.LORA_FILE)
    shutil.rmtree(out / "checkpoint-4")
    resumed = activations_trainer(make_deep, **changes)
    resumed.fit()
    assert resumed.global_step == 4
    ours, theirs = (input_scales(t.bare_transformer()) for t in (resumed, straight))
    assert torch.equal(ours, theirs)
    again = load_file(out / script.LORA_FILE)
    assert again.keys() == trained.keys()
    for name, tensor in again.items():
        assert torch.equal(tensor, trained[name]), name


# -- several devices


def test_blocks_are_split_evenly_in_order():
    assert script.split_blocks(6, ["a", "b"]) == ["a"] * 3 + ["b"] * 3
    assert script.split_blocks(60, ["a"]) == ["a"] * 60
    for n, k in ((60, 7), (5, 3), (3, 5)):
        places = script.split_blocks(n, list(range(k)))
        sizes = [places.count(i) for i in range(k)]
        assert len(places) == n and places == sorted(places) and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora", "lokr"])
def test_two_devices_give_the_same_bits(method, checkpointing, make_deep, monkeypatch):
    sent = []
    carried = accelerate.utils.send_to_device

    def send(value, device):
        sent.append(device)
        return carried(value, device)

    monkeypatch.setattr(accelerate.utils, "send_to_device", send)
    settings = {"model.lora.method": method, "train.gradient_checkpointing": checkpointing}
    expected = loss_and_gradients(make_deep(**METHODS, **settings))
    trainer = make_deep(**METHODS, **settings, **{"model.devices": ["cpu", "cpu"]})
    assert_same_step(loss_and_gradients(trainer), expected)
    passes = (2 * (6 + 1) + 1) + checkpointing * 2 * 6  # blocks, norm_out; output; blocks again
    assert len(sent) == passes and set(sent) == {CPU}

    trainer = make_deep(**METHODS, **settings)
    trainer.set_lora()
    first, second = torch.device("cpu:0"), torch.device("cpu:1")
    script.carry_activations(trainer.transformer, [first, second])
    sent.clear()
    assert_same_step(loss_and_gradients(trainer), expected)
    assert sent[:15] == [first] * 2 * 3 + [second] * 2 * 4 + [first]
    assert sent[15:] == checkpointing * ([second] * 2 * 3 + [first] * 2 * 3)


def test_two_devices_or_swapping_train_and_predict_the_same(make_deep, tmp_path):
    files, pictures = [], []
    ways = ({}, {"model.devices": ["cpu", "cpu"]}, {"model.blocks_to_swap": 4})
    for number, way in enumerate(ways):
        out = tmp_path / str(number)
        changes = {"logging.output_dir": str(out), "train.gradient_checkpointing": True}
        trainer = make_deep(**way, **changes)
        trainer.fit([a_batch(0), a_batch(1)])
        files.append(load_file(out / script.LORA_FILE))
        trainer.setup_predict()
        photo = torch.arange(64 * 64 * 3).remainder(256).view(64, 64, 3).byte().numpy()
        pictures.append(trainer.predict(photo, "sunset", num_inference_steps=2))
    for file, picture in zip(files, pictures, strict=True):
        assert file.keys() == files[0].keys() and (picture == pictures[0]).all()
        assert all(torch.equal(file[name], files[0][name]) for name in file)


def test_the_audit_names_impossible_devices(make_deep, monkeypatch):
    config = make_deep(**{"model.devices": ["cpu", "cuda:9", "gpu"]}).config
    problems = script.audit(config)
    assert any("model.devices.1: 'cuda:9'" in p for p in problems)
    assert any("model.devices.2: 'gpu' is no device" in p for p in problems)
    config = make_deep(**{"model.devices": ["cpu", "meta"]}).config
    assert any("'meta', but this machine has no such device" in p for p in script.audit(config))
    with monkeypatch.context() as patched:  # as on a machine that has both
        patched.setattr(script, "check_device", lambda name, value: [])
        assert "model.devices: wanted devices of one type" in script.audit(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = make_deep(**{"model.devices": ["cpu", "cpu"]}).config
    assert any("model.devices: for one process" in p for p in script.audit(config))


# -- swapped blocks


def test_swapped_blocks_are_spread_over_the_depth():
    assert script.swapped_blocks(6, 3) == [1, 3, 5]
    assert script.swapped_blocks(60, 0) == [] and script.swapped_blocks(60, 1) == [30]
    assert script.swapped_blocks(60, 60) == list(range(60))
    for count in range(2, 60):
        numbers = script.swapped_blocks(60, count)
        gaps = [after - before for before, after in itertools.pairwise(numbers)]
        assert len(numbers) == count and max(gaps) - min(gaps) <= 1


class Residents:
    """Counts the blocks whose copies are in memory, whoever holds them (module or autograd)."""

    def __init__(self, monkeypatch):
        self.storages, self.most = {}, 0
        fetch = script.BlockSwap._fetch

        def counted(swap, number):
            before = number in swap.here
            fetch(swap, number)
            if not before:
                self.storages[number] = [
                    StorageWeakRef(tensor.untyped_storage())
                    for copy in swap.here[number][0]
                    for tensor in inner_tensors(copy)
                ]
            self.most = max(self.most, len(self.now()))

        monkeypatch.setattr(script.BlockSwap, "_fetch", counted)

    def now(self):
        return {n for n, refs in self.storages.items() if not all(ref.expired() for ref in refs)}


def inner_tensors(tensor):
    found = []
    script.map_tensor(tensor, lambda t: found.append(t) or t)
    return found


SWAP = {"train.gradient_checkpointing": True, "model.lora.target_modules": "attn+mlp"}


@pytest.mark.parametrize("precision", ["no_change", *PRECISIONS[:-1]])
@pytest.mark.parametrize("mixed", ["no", "bf16"])
def test_swapping_changes_no_bit_and_keeps_few_blocks(precision, mixed, make_deep, monkeypatch):
    settings = {**SWAP, "model.base_model_precision": precision, "train.mixed_precision": mixed}
    expected = loss_and_gradients(make_deep(**settings))
    residents = Residents(monkeypatch)
    for count in (1, 2, 4, 6):
        trainer = make_deep(**settings, **{"model.blocks_to_swap": count})
        residents.most = 0
        for _ in range(2):  # the second step begins where the first one ended
            assert_same_step(loss_and_gradients(trainer), expected)
            trainer.transformer.zero_grad()
        assert residents.most == min(count, 2)  # the one at work and the next
        assert not residents.now()  # between the steps


def test_swapped_weights_are_at_home_and_adapters_on_the_device(make_deep):
    trainer = make_deep(**SWAP, **{"model.blocks_to_swap": 3})
    trainer.set_lora()
    blocks = trainer.transformer.transformer_blocks
    swap = trainer.transformer.block_swap
    assert swap.numbers == [1, 3, 5]
    homes = {n: [id(home) for *_, home in swap.homes[n]] for n in swap.numbers}
    seen = []
    for number, block in enumerate(blocks):
        block.attn.to_q.register_forward_pre_hook(
            lambda layer, args, number=number: seen.append((number, id(layer.base_layer.weight)))
        )
    trainer.training_step(a_batch()).backward()
    assert [number for number, _ in seen] == [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0]
    for number, weight in seen:
        assert number not in homes or weight not in homes[number]  # a copy is at work
    for number in swap.numbers:
        now = {id(p) for p in blocks[number].parameters() if not p.requires_grad}
        assert now == set(homes[number])
        assert not now & {id(p) for p in trainer.trainable()}


@pytest.mark.parametrize("method", ["lora", "dora", "lokr"])
def test_swapping_trains_samples_merges_and_loads_the_same(method, make_deep, tmp_path):
    found = []
    for name, count in (("all", 0), ("swapped", 4)):
        trainer = make_deep(
            **SWAP,
            **{
                "model.blocks_to_swap": count,
                "model.lora.method": method,
                "logging.output_dir": str(tmp_path / name),
            },
        )
        trainer.fit([a_batch(0), a_batch(1)])
        transformer = trainer.bare_transformer().eval()
        file = tmp_path / name / script.LORA_FILE
        sampled = [velocity(transformer), velocity(transformer)]
        other = make_deep(**SWAP, **{"model.blocks_to_swap": count})
        other.load_lora(file)
        sampled.append(velocity(other.transformer))
        trainer.merge_lora()
        sampled.append(velocity(transformer))
        found.append((sampled, load_file(file)))
    for ours, theirs in zip(*(sampled for sampled, _ in found), strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = (file for _, file in found)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_pass_that_breaks_off_does_no_harm(make_deep, monkeypatch):
    expected = loss_and_gradients(make_deep(**SWAP))
    residents = Residents(monkeypatch)
    trainer = make_deep(**SWAP, **{"model.blocks_to_swap": 6})
    trainer.set_lora()

    def fail(*args):
        raise KeyboardInterrupt

    for number in (0, 3, 5):
        handle = trainer.transformer.transformer_blocks[number].attn.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            trainer.training_step(a_batch())
        handle.remove()
        assert len(residents.now()) <= 2
    with torch.no_grad():
        trainer.training_step(a_batch())  # no backward pass follows
    assert_same_step(loss_and_gradients(trainer), expected)
    assert residents.most <= 3


def test_streams_wait_for_each_other(make_deep, monkeypatch):
    """The order of events that a GPU would see, with streams that only take notes."""
    expected = loss_and_gradients(make_deep(**SWAP))
    trainer = make_deep(**SWAP, **{"model.blocks_to_swap": 4})
    trainer.set_lora()
    notes = []

    class Stream:
        def wait_stream(self, other):
            notes.append(("copying waits for", other))

        def record_event(self):
            notes.append(("copied", len(notes)))
            return len(notes) - 1

        def wait_event(self, event):
            notes.append(("computing waits for", event))

    computing, swap = Stream(), trainer.transformer.block_swap
    swap.stream = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    assert_same_step(loss_and_gradients(trainer), expected)
    copied = [n for n, (what, _) in enumerate(notes) if what == "copied"]
    assert len(copied) == 4 + 3  # up, and down; the last block stays for its second turn
    for event in copied:
        assert notes[event - 1] == ("copying waits for", computing)
        assert ("computing waits for", event) in notes[event:]


def test_swapped_and_quantised_activations_together(make_deep):
    steps = []
    for count in (0, 3):
        trainer = activations_trainer(make_deep, **{"model.blocks_to_swap": count})
        trainer.set_lora()
        trainer.calibrate([a_batch(1)])
        steps.append(loss_and_gradients(trainer))
    assert_same_step(*steps)


def test_the_audit_names_impossible_swaps(make_deep):
    config = make_deep(**{"model.blocks_to_swap": 7, "train.gradient_checkpointing": False}).config
    problems = script.audit(config)
    assert any("blocks_to_swap: 7 of 6 blocks" in p for p in problems)
    assert any("blocks_to_swap needs train.gradient_checkpointing" in p for p in problems)
    trainer = make_deep(**SWAP, **{"model.blocks_to_swap": 2})
    trainer.load_model(["transformer"])
    with pytest.raises(UserError, match="stays on its device"):
        script.place(trainer.transformer, ONE_CPU)
    trainer = make_deep(**{"model.blocks_to_swap": 7, "train.gradient_checkpointing": True})
    with pytest.raises(UserError, match="7 of 6 blocks"):
        trainer.fit([a_batch()])


# -- several processes


@pytest.mark.slow
def test_two_processes_on_a_quantised_swapped_base_learn_the_same(deep, tmp_path):
    """DDP must neither send nor choke on frozen weights that are quantised or on the CPU."""
    changes = {
        "data.dataset_configs": [folders_dataset(tmp_path / "data")],
        "model.base_model_precision": "int8-quanto",
        "model.blocks_to_swap": 3,
        "model.quantize_activations": True,
        "train.gradient_checkpointing": True,
    }
    config = write_config(tmp_path, small_config(deep, tmp_path, **changes))
    launch = [*LAUNCH, "--multi_gpu", "--num_processes", "2"]
    files = []
    for name, size, launcher in (("one", 2, ()), ("two", 1, launch)):
        out = tmp_path / name
        command = [script.__file__, "--config", config, "--logging.output_dir", out]
        command += ["--data.batch_size", size]
        run(*command, launch=launcher, env={"CUDA_VISIBLE_DEVICES": ""})
        files.append(load_file(out / script.LORA_FILE))
    assert files[0].keys() == files[1].keys()
    learned = [n for n in files[0] if "lora_B" in n]
    ours, theirs = (torch.cat([f[n].flatten() for n in learned]) for f in files)
    assert theirs.norm() > 0.1
    # other batch shapes round other inputs up or down, and Adam's first steps only see signs
    assert (ours - theirs).norm() < 0.05 * theirs.norm()
