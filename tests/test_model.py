"""The base and its adapter: loading, precision, LoRA kinds, devices, swapped blocks."""

import contextlib
import itertools
import json
import shutil
import sys

import accelerate.utils
import diffusers
import pytest
import torch
from conftest import ROOT, run, with_lora_noise
from peft.utils import get_peft_model_state_dict
from qwen import a_batch, assert_same
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef

import train_qwen_edit as script
from benchmarks import load_quantized
from utils import UserError, load_script

CPU = torch.device("cpu")
PRECISIONS = ["int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto", "nf4-bnb"]
METHODS = ["lora", "dora", "lokr"]
OTHER_PARTS = ("vae", "text_encoder", "tokenizer", "processor", "scheduler")
WEIGHTS = "diffusion_pytorch_model.safetensors"
AGAIN = {"train.gradient_checkpointing": True}


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
def make_deep(deep, make_trainer, monkeypatch):
    """make_trainer on the 6 blocks, with devices cpu:0, cpu:1: to torch other ones than cpu."""
    placement = script.placement

    def numbered(transformer, devices, swap):
        devices = [torch.device(device.type, n) for n, device in enumerate(devices)]
        return placement(transformer, devices, swap)

    monkeypatch.setattr(script, "placement", numbered)

    def make(**changes):
        return make_trainer(**{"model.pretrained_model_name_or_path": str(deep), **changes})

    return make


def load(folder, dtype=torch.float32, precision="no_change"):
    return script.load_transformer(folder / "transformer", dtype, precision, [CPU], 0)


def velocity(transformer, dtype=torch.float32):
    batch = a_batch(seed=7)
    batch["prompt_embed"] = batch["prompt_embed"].to(dtype)
    with torch.no_grad():
        noisy = batch["noise"].to(dtype)
        return script.predict_velocity(transformer, noisy, batch["sigma"].to(dtype), batch)


def loss_and_gradients(trainer, batch=None):
    """Of one training step, with an adapter that does something; each parameter has a gradient."""
    trainer.set_lora()
    generator = torch.Generator().manual_seed(3)
    for parameter in trainer.trainable():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    loss = trainer.training_step(batch or a_batch())
    loss.backward()
    gradients = {n: p.grad for n, p in trainer.transformer.named_parameters() if p.requires_grad}
    assert gradients and all(g is not None and g.any() for g in gradients.values())
    assert all(g.dtype == torch.float32 for g in gradients.values())
    return loss.detach(), gradients


def assert_same_step(ours, theirs):
    assert torch.equal(ours[0], theirs[0])
    assert_same(ours[1], theirs[1])


def difference(ours, theirs):
    """Of two lists of tensors, relative to the second."""
    ours, theirs = (torch.cat([t.float().flatten() for t in each]) for each in (ours, theirs))
    return (ours - theirs).norm() / theirs.norm()


def whole_weight(layer):
    """The weight of a layer, dequantised."""
    weight = getattr(layer, "base_layer", layer).weight
    if not hasattr(weight, "quant_state"):
        return getattr(weight, "dequantize", lambda: weight)()
    import bitsandbytes

    return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)


# -- loading


@pytest.mark.parametrize(("kind", "dtype"), [("2509", torch.float32), ("2511", torch.bfloat16)])
def test_loading_equals_from_pretrained_bit_for_bit(kind, dtype, checkpoints, tmp_path):
    """One file or shards; zero_cond_t of 2511 is heard."""
    kind_of = diffusers.QwenImageTransformer2DModel
    theirs = kind_of.from_pretrained(checkpoints[kind] / "transformer", dtype=dtype).eval()
    whole = kind_of.from_pretrained(checkpoints[kind] / "transformer")
    whole.save_pretrained(tmp_path / "transformer", max_shard_size="300KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 2
    for folder in (checkpoints[kind], tmp_path):
        ours = load(folder, dtype)
        assert not any(p.requires_grad for p in ours.parameters()) and not ours.training
        assert ours.config.zero_cond_t == (kind == "2511") and ours.dtype == dtype
        assert_same(dict(ours.state_dict()), dict(theirs.state_dict()))
        assert torch.equal(ours.pos_embed.pos_freqs, theirs.pos_embed.pos_freqs)
        assert torch.equal(velocity(ours, dtype), velocity(theirs, dtype))


def test_weights_that_do_not_fit_are_named(checkpoints, tmp_path):
    shutil.copytree(checkpoints["2511"] / "transformer", tmp_path / "transformer")
    file = tmp_path / "transformer" / WEIGHTS
    sound = load_file(file)
    renamed = {n.replace("img_in.bias", "img_inn.bias"): t for n, t in sound.items()}
    other = {**sound, "proj_out.bias": sound["proj_out.bias"][:-1].clone()}
    damages = [lambda: save_file(renamed, file), lambda: save_file(other, file)]
    damages += [lambda: file.write_bytes(file.read_bytes()[:1000]), file.unlink]
    named = [r"img_in\.bias\n.*img_inn\.bias", "size mismatch", str(tmp_path), str(tmp_path)]
    for damage, text in zip(damages, named, strict=True):
        damage()
        with pytest.raises(UserError, match=text):
            load(tmp_path)


# -- precision


@pytest.mark.parametrize("precision", PRECISIONS)
def test_quantised_blocks_are_near_the_originals(precision, deep, monkeypatch):
    """Modulation is 8-bit in all of them, what lies outside of the blocks stays as it is.

    And no compiler is called, as quanto does when it first unpacks 4 or 2 bits.
    """
    from optimum import quanto

    for name in ("quanto_cpp", "quanto_cuda"):
        if quanto.is_extension_available(name):
            extension = quanto.get_extension(name)
            module = sys.modules[type(extension).__module__]
            monkeypatch.setattr(module, "load", lambda **how: pytest.fail("a compiler was called"))
            monkeypatch.setattr(extension, "_lib", None)
    dtype = torch.float32 if precision in ("int4-quanto", "fp8-quanto") else torch.bfloat16
    plain, quantised = load(deep, dtype), load(deep, dtype, precision)
    limits = {"int8": 0.01, "int4": 0.1, "int2": 0.5, "fp8": 0.04, "nf4": 0.12}
    changed, layers = 0, dict(quantised.named_modules())
    for name, layer in plain.named_modules():
        if not isinstance(layer, torch.nn.Linear):
            continue
        other = layers[name]
        assert torch.equal(other.bias, layer.bias)
        if not name.startswith("transformer_blocks."):  # embedders, norm, output
            assert type(other) is torch.nn.Linear and torch.equal(other.weight, layer.weight)
            continue
        kind = precision.split("-")[0]
        if "_mod." in name:
            kind = "fp8" if kind == "fp8" else "int8"
            assert other.weight.qtype.bits == 8 and other.weight._data.dtype.itemsize == 1
        assert 0 < difference([whole_weight(other)], [layer.weight]) < limits[kind], name
        changed += 1
    assert changed == 6 * 14
    limit = {"int8": 0.02, "fp8": 0.1, "int2": 1.0}.get(precision.split("-")[0], 0.3)
    assert 0 < difference([velocity(quantised, dtype)], [velocity(plain, dtype)]) < limit


@pytest.mark.parametrize(
    ("precision", "mixed", "method"),
    [
        ("int8-quanto", "no", "lora"),
        ("int4-quanto", "no", "lokr"),
        ("nf4-bnb", "no", "dora"),
        ("fp8-quanto", "bf16", "lora"),
    ],
)
def test_the_gradients_are_those_of_the_dequantised_base(precision, mixed, method, make_trainer):
    settings = {**AGAIN, "train.mixed_precision": mixed, "model.lora.method": method}
    settings |= {"model.lora.target_modules": "attn+mlp"}
    trainer = make_trainer(**settings, **{"model.base_model_precision": precision})
    loss, gradients = loss_and_gradients(trainer)
    other = make_trainer(**settings)
    other.load_model(["transformer"])
    for name, part in other.transformer.transformer_blocks.named_modules():
        if isinstance(part, torch.nn.Linear):
            layer = trainer.transformer.transformer_blocks.get_submodule(name)
            part.weight.data = whole_weight(layer).detach().to(part.weight.dtype)
    expected, wanted = loss_and_gradients(other)
    torch.testing.assert_close(loss, expected, rtol=1e-4 if mixed == "no" else 0.02, atol=1e-6)
    assert difference(gradients.values(), wanted.values()) < (1e-3 if mixed == "no" else 0.1)
    with pytest.raises(UserError, match="quantised"):
        trainer.merge_lora()


@pytest.mark.parametrize(
    ("method", "precision", "mixed", "less"),
    [
        ("lora", "no_change", "bf16", True),
        ("lora", "int8-quanto", "bf16", True),
        ("lokr", "no_change", "bf16", True),
        ("dora", "no_change", "bf16", False),
        ("lora", "no_change", "no", False),
    ],
)
def test_autocast_alone_casts_what_goes_into_the_adapter(
    method, precision, mixed, less, make_trainer
):
    """The bits are those of PEFT's cast to fp32 and back, which leaves each layer its own copy."""
    settings = {"model.lora.method": method, "model.lora.target_modules": "attn+mlp"}
    settings |= {"model.base_model_precision": precision, "train.mixed_precision": mixed}
    trainer, found, kept = make_trainer("2511", **settings), [], []

    def keep(tensor):
        storages[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return tensor

    for peft_casts in (False, True):
        trainer.set_lora()
        for layer in trainer.transformer.modules():
            if hasattr(layer, "cast_input_dtype_enabled"):
                assert peft_casts or layer.cast_input_dtype_enabled == (method == "dora")
                layer.cast_input_dtype_enabled |= peft_casts
        batch, storages = a_batch(), {}
        batch["control_latent"][0].requires_grad_()
        trainer.transformer.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, gradients = loss_and_gradients(trainer, batch)
        inputs = {"control": batch["control_latent"][0].grad}
        found.append((loss, {n: g.clone() for n, g in gradients.items()} | inputs))
        kept.append(sum(storages.values()))
    assert_same_step(*found)
    assert found[0][1]["control"].any()
    assert 0 < kept[0] < kept[1] if less else kept[0] == kept[1]


def precision_of(trainer):
    weight = trainer.bare_transformer().transformer_blocks[0].attn.to_q
    weight = getattr(weight, "base_layer", weight).weight
    return str(getattr(weight, "qtype", weight.dtype))


def test_the_transformer_is_loaded_again_where_precision_or_devices_differ(make_trainer):
    """With its adapter; trainer.quantize means fp8; what is where it should be stays."""
    trainer = make_trainer(**{"model.lora.lora_alpha": 8.0})
    trainer.set_lora()
    with_lora_noise(trainer.transformer)
    expected = velocity(trainer.transformer)
    for quantize, device, stays in ((0, "cpu", True), (1, "cpu", False), (0, "cpu", False)):
        before, trainer.quantize = trainer.transformer, bool(quantize)
        trainer.place_transformer(device)
        assert (trainer.transformer is before) == stays
        assert ("qfloat8" in precision_of(trainer)) == bool(quantize)
        found = velocity(trainer.transformer)
        assert 0 < difference([found], [expected]) < 0.1 if quantize else found.equal(expected)
    trainer.place_transformer("meta")  # any other device
    assert trainer.transformer.device.type == "meta"
    trainer = make_trainer()  # a loaded one is quantised in place, but not under an adapter
    trainer.load_model(["transformer"])
    assert trainer.quantize_model(trainer.transformer, "cpu") is trainer.transformer
    assert "qfloat8" in precision_of(trainer)
    trainer.set_lora()
    with pytest.raises(UserError, match="before"):
        trainer.quantize_model(trainer.transformer)


@pytest.mark.slow
def test_loading_int8_holds_the_quantised_model_and_at_most_two_blocks(tmp_path):
    """Resident memory of a process of its own, own and mapped pages, sampled every millisecond."""
    settings = {**load_quantized.SMALL, "num_layers": 6, "num_attention_heads": 6}
    whole, block = load_quantized.write_random_transformer(tmp_path / "transformer", settings)
    command = [load_quantized.__file__, "--precision", "int8-quanto", "--measure"]
    found = json.loads(run(*command, tmp_path / "transformer").stdout.splitlines()[-1])
    assert 0.5 * whole < found["size"] < 0.53 * whole
    assert found["size"] <= found["cpu"] <= found["size"] + 2 * block < whole


# -- the adapter: its layers, its kinds, its file


def adapted(transformer):
    """Layers with an adapter."""
    return {n.split(".lo")[0] for n in get_peft_model_state_dict(transformer)}


@pytest.mark.parametrize(
    ("targets", "layers", "method"),
    [
        ("attn-image", 4 * 6, "lora"),
        ("attn-all", 8 * 6 - 2, "lora"),
        ("attn+mlp", 12 * 6 - 4, "lora"),
        *(("all-linear", 14 * 6 - 4, method) for method in METHODS),
        (["to_q", "txt_mlp.net.2"], 2 * 6 - 1, "lora"),
        (r".*blocks\.[15]\.attn.*", 2 * 8 - 2, "lora"),  # fits norms, too
    ],
)
def test_every_trained_parameter_gets_a_gradient(targets, layers, method, make_deep):
    """Nothing depends on the last block's text outputs; DDP would wait for them forever.

    Without training an adapter changes nothing.
    """
    trainer = make_deep(**{"model.lora.target_modules": targets, "model.lora.method": method})
    trainer.set_lora()
    assert len(adapted(trainer.transformer)) == layers
    fresh = velocity(trainer.transformer)
    trainer.transformer.disable_adapters()
    torch.testing.assert_close(fresh, velocity(trainer.transformer), rtol=0, atol=1e-6)
    trainer.transformer.enable_adapters()
    loss_and_gradients(trainer)


def test_targets_that_match_nothing_are_named_with_what_there_is(make_trainer):
    for targets in ("attn-img", ["to_q", "to_qq"], "(", []):
        trainer = make_trainer(**{"model.lora.target_modules": targets})
        trainer.setup_accelerator()
        with pytest.raises(UserError, match=r"target_modules: .*attn-image.*attn\.add_k_proj"):
            trainer.preflight()
        assert trainer.transformer is None


def comfy_weights(tensors, transformer):
    """{layer: weight} after ComfyUI's and kohya's rule: W += B A, times alpha / r if there is one.

    Their key map knows `transformer.<layer>` for `diffusion_model.<layer>.weight`.
    """
    known = {f"transformer.{name.removesuffix('.weight')}" for name in transformer.state_dict()}
    stems = {name.rsplit(".lora_", 1)[0] for name in tensors}
    assert stems <= known and not [name for name in tensors if name.endswith(".alpha")]
    for stem in stems:
        layer = transformer.get_submodule(stem.removeprefix("transformer."))
        change = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
        yield stem.removeprefix("transformer."), layer.weight + change


@pytest.mark.parametrize(
    ("method", "alpha"),
    [("lora", 8.0), ("lora", 6.0), ("dora", 1.0), ("dora", 6.0), ("lokr", 8.0), ("lokr", 6.0)],
)
def test_a_file_has_the_same_strength_in_every_loader(
    method, alpha, make_trainer, tmp_path, checkpoints
):
    """Here, in a stock pipeline, in ComfyUI's key map, merged, and as a start for training."""
    settings = {"model.lora.target_modules": "all-linear", "model.lora.method": method}
    settings |= {"model.lora.lora_alpha": alpha}
    trainer = make_trainer(**settings)
    loss_and_gradients(trainer)  # all of its parts matter
    expected = velocity(trainer.transformer)
    file = trainer.save_lora(tmp_path / "trained.safetensors")
    # alpha / r is folded in; a power of two commutes with rounding
    tolerance = {"rtol": 0, "atol": 3e-6 if alpha == 6 else 0}
    again = make_trainer()
    again.load_lora(file)
    torch.testing.assert_close(velocity(again.transformer), expected, **tolerance)
    with pytest.raises(UserError, match="no LoRA file"):
        again.load_lora(tmp_path / "missing")

    start = make_trainer(**settings, **{"model.lora.pretrained_weight": str(file)})
    start.setup_accelerator()
    start.preflight()  # no weights are needed to see that it fits
    assert start.transformer is None
    start.set_lora()
    torch.testing.assert_close(velocity(start.transformer), expected, **tolerance)

    stock = load(checkpoints["2511"])
    kind = diffusers.QwenImageEditPlusPipeline
    pipeline = kind(transformer=stock, **dict.fromkeys(OTHER_PARTS))
    if method == "lokr":  # the pipeline's own loader does not know it, the model's does
        found, about = kind.lora_state_dict(str(file), return_lora_metadata=True)
        stock.load_lora_adapter(found, metadata=about)
    else:
        pipeline.load_lora_weights(file)
    torch.testing.assert_close(velocity(stock), expected, **tolerance)

    if method == "lora":
        bare = load(checkpoints["2511"])
        for name, weight in list(comfy_weights(load_file(file), bare)):
            bare.get_submodule(name).weight.data = weight
        torch.testing.assert_close(velocity(bare), expected, rtol=1e-4, atol=1e-5)
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["image_edit_lora"])
    assert (about["method"], about["r"], about["lora_alpha"]) == (method, 4, alpha)
    assert (about["flavour"], about["reference_area"]) == ("edit-v3", "target")

    trainer.merge_lora()
    assert not getattr(trainer.transformer, "peft_config", None)
    torch.testing.assert_close(velocity(trainer.transformer), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_start_of_another_method_rank_or_layers_is_refused(method, make_trainer, tmp_path):
    trainer = make_trainer(**{"model.lora.method": method})
    trainer.set_lora()
    file = trainer.save_lora(tmp_path / "start.safetensors")
    other_method = METHODS[METHODS.index(method) - 1]
    changes = [{"method": other_method}, {"target_modules": "attn-all"}]
    changes += [{"r": 8}] if method != "lokr" else []  # of such a small layer it has no rank
    for change in changes:
        settings = {"method": method, "pretrained_weight": str(file), **change}
        other = make_trainer(**{f"model.lora.{k}": v for k, v in settings.items()})
        other.setup_accelerator()
        with pytest.raises(UserError, match="pretrained_weight"):
            other.preflight()
        assert other.transformer is None


# -- devices and swapped blocks


def test_blocks_are_spread_evenly_over_devices_and_depth():
    blocks = torch.nn.ModuleList([torch.nn.Linear(1, 1)] * 60)
    ends = {name: torch.nn.Linear(1, 1) for name in ("img_in", "proj_out")}
    model = torch.nn.ModuleDict({**ends, "transformer_blocks": blocks})
    model.transformer_blocks = blocks
    devices = [torch.device("cuda", number) for number in range(7)]
    places = script.placement(model, devices, 0)
    names = [f"transformer_blocks.{number}" for number in range(60)]
    computing = [places[name][1].index for name in names]
    sizes = [computing.count(number) for number in range(7)]
    assert computing == sorted(computing) and max(sizes) - min(sizes) <= 1
    assert places["img_in"][1] == devices[0] and places["proj_out"][1] == devices[-1]
    for count in (0, 1, 7, 30, 59, 60):
        places = script.placement(model, devices[:1], count)
        swapped = [number for number, name in enumerate(names) if places[name][0] == CPU]
        gaps = [after - before for before, after in itertools.pairwise(swapped)] or [0]
        assert len(swapped) == count and max(gaps) - min(gaps) <= 1
        assert all(places[name][1] == devices[0] for name in names)


@pytest.mark.parametrize(
    ("method", "again"), [("lora", False), ("lora", True), ("dora", True), ("lokr", True)]
)
def test_two_devices_give_the_same_bits(method, again, make_deep, monkeypatch):
    settings = {"model.lora.method": method, "train.gradient_checkpointing": again}
    settings |= {"model.lora.target_modules": "all-linear"}
    expected = loss_and_gradients(make_deep(**settings))
    sent, carried = [], accelerate.utils.send_to_device
    monkeypatch.setattr(
        accelerate.utils,
        "send_to_device",
        lambda value, device, **how: sent.append(device) or carried(value, device, **how),
    )
    trainer = make_deep(**settings, **{"model.devices": ["cpu", "cpu"]})
    assert_same_step(loss_and_gradients(trainer), expected)
    first, second = torch.device("cpu:0"), torch.device("cpu:1")
    sent = [device for device in sent if device.index is not None]
    # args and kwargs of six blocks and of norm_out, then the result; in the backward pass blocks
    assert sent[:15] == [first] * 2 * 3 + [second] * 2 * 4 + [first]
    assert sent[15:] == again * ([second] * 2 * 3 + [first] * 2 * 3)


def test_devices_and_swapping_train_sample_merge_and_load_the_same(make_deep, tmp_path):
    found, photo = [], torch.arange(64 * 64 * 3).remainder(256).view(64, 64, 3).byte().numpy()
    for number, way in enumerate(({}, {"devices": ["cpu", "cpu"]}, {"blocks_to_swap": 4})):
        out = tmp_path / str(number)
        changes = {**AGAIN, **{f"model.{name}": value for name, value in way.items()}}
        trainer = make_deep(**changes, **{"logging.output_dir": str(out)})
        trainer.fit([a_batch(seed=0), a_batch(seed=1)])
        trainer.setup_predict()
        picture = torch.tensor(trainer.predict(photo, "sunset", num_inference_steps=2))
        other = make_deep(**changes)
        other.load_lora(out)
        sampled = [velocity(model) for model in (trainer.bare_transformer(), other.transformer)]
        trainer.merge_lora()
        sampled += [velocity(trainer.bare_transformer()), picture]
        found.append(dict(enumerate(sampled)) | load_file(out / script.LORA_FILE))
    for ours in found[1:]:
        assert_same(ours, found[0])


class Residents:
    """Counts the blocks whose copies are in memory, whoever holds them (module or autograd)."""

    def __init__(self, monkeypatch):
        self.storages, self.most = {}, 0
        fetch = script.BlockSwap._fetch

        def counted(swap, number):
            before = number in swap.here
            fetch(swap, number)
            if not before:
                copies, inner = swap.here[number][0], []
                for copy in copies:
                    script.map_tensor(copy, lambda t: inner.append(t) or t)
                self.storages[number] = [StorageWeakRef(t.untyped_storage()) for t in inner]
            self.most = max(self.most, len(self.now()))

        monkeypatch.setattr(script.BlockSwap, "_fetch", counted)

    def now(self):
        return {n for n, refs in self.storages.items() if not all(ref.expired() for ref in refs)}


SWAP = {**AGAIN, "model.lora.target_modules": "attn+mlp"}


@pytest.mark.parametrize(
    ("precision", "mixed"),
    [("no_change", "no"), ("int8-quanto", "bf16"), ("int2-quanto", "no"), ("fp8-quanto", "no")],
)
def test_swapping_changes_no_bit_and_keeps_few_blocks(precision, mixed, make_deep, monkeypatch):
    settings = {**SWAP, "model.base_model_precision": precision, "train.mixed_precision": mixed}
    expected = loss_and_gradients(make_deep(**settings))
    residents = Residents(monkeypatch)
    for count in (1, 4):
        trainer = make_deep(**settings, **{"model.blocks_to_swap": count})
        residents.most = 0
        for _ in range(2):  # the second step begins where the first one ended
            assert_same_step(loss_and_gradients(trainer), expected)
            trainer.transformer.zero_grad()
        assert residents.most == min(count, 2)  # the one at work and the next
        assert not residents.now()  # between the steps


def test_a_pass_that_breaks_off_does_no_harm(make_deep, monkeypatch):
    """As where a validation picture runs out of memory; training goes on."""
    expected = loss_and_gradients(make_deep(**SWAP))
    residents = Residents(monkeypatch)
    trainer = make_deep(**SWAP, **{"model.blocks_to_swap": 6})
    trainer.set_lora()
    for number in (0, 5):
        block = trainer.transformer.transformer_blocks[number]
        handle = block.attn.register_forward_hook(lambda *_: exec("raise MemoryError"))
        with pytest.raises(MemoryError):
            trainer.training_step(a_batch())
        handle.remove()
    assert_same_step(loss_and_gradients(trainer), expected)
    assert residents.most <= 3 and not residents.now()


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


@pytest.mark.parametrize(
    ("changes", "environment", "named"),
    [
        ({"devices": ["cpu", "cuda:9"]}, {}, "model.devices.1: 'cuda:9'"),
        ({"devices": ["cpu", "cpu"], "blocks_to_swap": 1}, {}, "model.blocks_to_swap: "),
        ({"devices": ["cpu", "cpu"]}, {"WORLD_SIZE": "2"}, "model.devices: "),
        ({"base_model_precision": "nf4-bnb", "blocks_to_swap": 1}, {}, "model.blocks_to_swap: "),
        ({"base_model_precision": "nf4-bnb", "lora.method": "lokr"}, {}, "model.lora.method: "),
        ({"base_model_precision": "int8-quanto", "lora.method": "dora"}, {}, "model.lora.method: "),
    ],
)
def test_the_audit_names_what_does_not_go_together(
    changes, environment, named, make_deep, monkeypatch
):
    monkeypatch.setattr(script.os, "environ", {**script.os.environ, **environment})
    trainer = make_deep(**AGAIN, **{f"model.{name}": value for name, value in changes.items()})
    problems = script.audit(trainer.config)
    assert len(problems) == 1 and named in problems[0]
