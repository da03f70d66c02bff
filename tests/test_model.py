"""Section 4: loading, quantising, LoRA kinds, devices, block swap."""

import logging
import multiprocessing
import shutil

import diffusers
import pytest
import torch
from conftest import with_lora_noise
from safetensors.torch import load_file, save_file

import demo
import train_qwen_edit as script
from utils import UserError

CPU = torch.device("cpu")
ONE_CPU = script.Layout([CPU])
PRECISIONS = ["int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto", "nf4-bnb"]


@pytest.fixture(scope="session")
def deep(checkpoints, tmp_path_factory):
    """The 2511 checkpoint with 6 blocks instead of 2."""
    folder = tmp_path_factory.mktemp("deep") / "2511"
    shutil.copytree(checkpoints["2511"], folder)
    torch.manual_seed(1)
    transformer = demo.build_transformer(zero_cond_t=True, layers=6, heads=2, head_dim=32)
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
    trainer.set_lora()
    with pytest.raises(UserError, match="before"):
        trainer.quantize_model(trainer.transformer)


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
    files[0].write_bytes(sound[files[0]][:-7] + b"damaged")
    files[1].write_bytes(b"")
    files[2].unlink()
    times = {file: file.stat().st_mtime_ns for file in files[3:]}
    with caplog.at_level(logging.WARNING):
        again = load(deep, torch.bfloat16, "int8-quanto", cache=tmp_path)
    assert caplog.text.count("it is built again") == 2 and files[0].name in caplog.text
    assert {file: file.read_bytes() for file in files} == sound
    assert {file: file.stat().st_mtime_ns for file in files[3:]} == times
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
