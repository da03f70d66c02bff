"""LoRA files between programs: ours in every loader, those of other trainers in generate.py.

A loader is written here from what it does: which names it knows, what weight it computes.
"""

import copy
import json
import re

import diffusers
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import generate
import train_dreambooth_pairs as sd
import train_pairedit
import train_qwen_edit as qwen
from utils import UserError, load_script, load_tool

tool = load_script(generate.Path(generate.__file__).parent / "tools/convert_lora.py")
PARTS = ("vae", "text_encoder", "tokenizer", "processor", "scheduler")


# --- the loaders ----------------------------------------------------------------------------------


FACTORS = {  # up: down, after the name of a layer, as ComfyUI and Forge look for them
    ".lora_up.weight": ".lora_down.weight",
    "_lora.up.weight": "_lora.down.weight",
    ".lora_B.weight": ".lora_A.weight",
    ".lora.up.weight": ".lora.down.weight",
    ".lora_linear_layer.up.weight": ".lora_linear_layer.down.weight",
    ".lora_B.default.weight": ".lora_A.default.weight",
}


def flat(name):
    return name.replace(".", "_")


def comfyui(tensors, names, weights):
    """(used keys, {layer: weight at strength 1}); names: {what a layer may be called: layer}."""
    used, made = set(), {}

    def take(key):
        used.update({key} & tensors.keys())
        return tensors.get(key)

    for name, layer in names.items():
        alpha, scale, weight = take(f"{name}.alpha"), take(f"{name}.dora_scale"), weights[layer]
        w1, w2, w2_a, w2_b = (take(f"{name}.lokr_{part}") for part in ("w1", "w2", "w2_a", "w2_b"))
        up = next((f"{name}{end}" for end in FACTORS if f"{name}{end}" in tensors), None)
        if up:
            end = next(end for end in FACTORS if up.endswith(end))
            up, down = take(up), take(name + FACTORS[end])
            change = up.flatten(1) @ down.flatten(1)
            change = change * (1 if alpha is None else alpha.item() / len(down))
        elif w1 is not None:
            strength = 1 if alpha is None or w2_b is None else alpha.item() / len(w2_b)
            change = torch.kron(w1, w2_a @ w2_b if w2 is None else w2) * strength
        else:
            continue
        changed = weight + change.reshape(weight.shape)
        if scale is not None:  # divides by the norm of the weight alone
            assert len(scale) == len(weight)
            changed = changed * scale / (weight.norm(dim=1, keepdim=True) + 1e-7)
        made[layer] = changed
    return used, made


def musubi(tensors, weights):
    """As comfyui(), of musubi-tuner's converter and merge: LoRA only, alpha is the rank."""
    used, made = set(), {}
    for layer, weight in weights.items():
        for start in ("transformer.", "diffusion_model."):
            a, b = (f"{start}{layer}.lora_{side}.weight" for side in "AB")
            if {a, b} <= tensors.keys():
                used |= {a, b}
                made[layer] = weight + tensors[b] @ tensors[a]
    return used, made


def sd_scripts(tensors, models):
    """As comfyui(): linear layers and convolutions inside the classes it replaces."""
    used, made = set(), {}
    replaced = {"unet": "Transformer2DModel ResnetBlock2D Downsample2D Upsample2D"}
    replaced["text_encoder"] = "CLIPAttention CLIPMLP"
    for part, model in models.items():
        start = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part]
        for path, module in model.named_modules():
            if type(module).__name__ not in replaced[part].split():
                continue
            for child, layer in module.named_modules():
                where = ".".join(filter(None, (path, child)))
                name = start + flat(sd.path_in_file(part, where))
                keys = [
                    f"{name}{end}" for end in (".lora_down.weight", ".lora_up.weight", ".alpha")
                ]
                if type(layer).__name__ in ("Linear", "Conv2d") and keys[0] in tensors:
                    down, up, alpha = (tensors[key] for key in keys)
                    if layer.weight.ndim == 4:  # both are convolutions there, the second of 1 x 1
                        assert down.shape[2:] == layer.weight.shape[2:] and up.shape[2:] == (1, 1)
                    change = alpha / len(down) * (up.flatten(1) @ down.flatten(1))
                    made[part, where] = layer.weight + change.reshape(layer.weight.shape)
                    used |= {*keys}
    return used, made


def comfy_qwen(weights):
    """ComfyUI's names of Qwen-Image; gate_layer and proj of 2.1 are one there, with fewer names."""
    names = {}
    for layer in weights:
        names |= {layer: layer, f"transformer.{layer}": layer, f"lycoris_{flat(layer)}": layer}
        if not layer.endswith(("img_mlp.gate_layer", "img_mlp.proj")):
            names |= {f"diffusion_model.{layer}": layer, f"lora_unet_{flat(layer)}": layer}
    return names


def comfy_flux(weights):
    """ComfyUI's and Forge's names of FLUX.1's attention."""
    double = r"transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
    known = rf"{double}|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)"
    layers = [layer for layer in weights if re.fullmatch(known, layer)]
    return {f"transformer.{layer}": layer for layer in layers}


def comfy_sd(weights):
    """ComfyUI's and Forge's names of Stable Diffusion 1.x; weights: {(part, layer): weight}."""
    known = r"conv_(in|out)|time_embedding\.linear_[12]|.*\.(down|up)samplers\.0\.conv"
    known += r"|.*\.resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)"
    block = r"transformer_blocks\.\d+\.(attn[12]\.to_([qkv]|out\.0)|ff\.net\.(0\.proj|2))"
    known += rf"|.*\.attentions\.\d+\.(proj_in|proj_out|{block})"
    names = {}
    for part, layer in weights:
        where = sd.path_in_file(part, layer)
        if part == "text_encoder":
            if re.fullmatch(r".*\.(self_attn\.([qkv]|out)_proj|mlp\.fc[12])", where):
                names |= dict.fromkeys([f"lora_te_{flat(where)}", f"text_encoder.{where}"],
                                       (part, layer))  # fmt: skip
        elif re.fullmatch(known, where):
            old = where.replace(".to_", ".processor.to_")
            old = old.removesuffix(".0") if old.endswith(".to_out.0") else old
            names |= dict.fromkeys([f"lora_unet_{flat(where)}", f"unet.{old}", old], (part, layer))
    return names


# --- our files in these loaders -------------------------------------------------------------------


def weights_of(model):
    """{layer: weight} without adapters."""
    kinds = torch.nn.Linear | torch.nn.Conv2d
    layers = model.named_modules()
    return {n: m.weight.detach().clone() for n, m in layers if isinstance(m, kinds)}


def random_adapter(model, pattern="lora_|lokr_|magnitude", seed=0):
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if re.search(pattern, name):
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.data = (1 + 0.3 * noise) if "magnitude" in name else noise * 0.1


@pytest.fixture(scope="module")
def transformers(checkpoints):
    """transformers(kind) -> a new transformer of the tiny checkpoint."""
    kinds = {
        "2.1": diffusers.QwenImage21Transformer2DModel,
        "flux": diffusers.FluxTransformer2DModel,
    }
    found = {}

    def new(kind="2511"):
        if kind not in found:
            cls = kinds.get(kind, diffusers.QwenImageTransformer2DModel)
            found[kind] = cls.from_pretrained(checkpoints[kind] / "transformer")
        return copy.deepcopy(found[kind])

    return new


def trained(transformer, file, method, alpha=6.0, targets="all-linear"):
    """Write a random adapter as the trainer does -> ({layer: weight} of the base, and merged)."""
    base = weights_of(transformer)
    how = {"r": 4, "lora_alpha": alpha, "method": method, "target_modules": targets}
    qwen.add_lora(transformer, qwen.LoraConfig(**how), seed=0)
    random_adapter(transformer)
    qwen.save_lora_file(file, transformer, {"base_model": "", "method": method})
    transformer.fuse_lora()
    transformer.unload_lora()
    return base, weights_of(transformer)


def assert_loaded(loaded, tensors, base, merged, tolerance=1e-5):
    """Every key is used, and every weight is what PEFT makes of it."""
    used, made = loaded
    assert not tensors.keys() - used
    changed = {layer for layer in merged if not torch.equal(merged[layer], base[layer])}
    assert made.keys() == changed
    for layer in changed:
        torch.testing.assert_close(made[layer], merged[layer], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("kind", "method"),
    [("2511", "lora"), ("2511", "lokr"), ("2511", "dora"), ("2.1", "lora"), ("2.1", "dora"),
     ("2.1", "lokr")],
)  # fmt: skip
def test_a_qwen_file_in_comfyui_and_musubi(kind, method, transformers, checkpoints, tmp_path):
    file = tmp_path / "l.safetensors"
    base, merged = trained(transformers(kind), file, method)
    if method == "dora":  # as PEFT names it, ComfyUI would take it for a plain LoRA
        plain = load_file(file)
        _, wrong = comfyui(plain, comfy_qwen(base), base)
        missing = torch.cat([(wrong[k] - merged[k]).flatten() for k in wrong]).norm()
        change = torch.cat([(base[k] - merged[k]).flatten() for k in wrong]).norm()
        assert missing > 0.1 * change
        file = tmp_path / "comfy.safetensors"
        layers = tool.to_comfyui(tmp_path / "l.safetensors", file, str(checkpoints[kind]))
        tensors = load_file(file)
        assert layers == len(wrong) == len(tensors) / 3
        assert all(t.shape[1] == 1 for n, t in tensors.items() if "dora_scale" in n)
    tensors = load_file(file)
    assert_loaded(comfyui(tensors, comfy_qwen(base), base), tensors, base, merged)
    if method == "lora" and kind == "2511":
        assert_loaded(musubi(tensors, base), tensors, base, merged)


def test_a_slider_in_comfyui(checkpoints, tmp_path, transformers):
    file = tiny.save_sliders(checkpoints["flux"], tmp_path / "slider")
    base, tensors = weights_of(transformers("flux")), load_file(file)
    factors = generate.read_factors(file, transformers("flux"))
    merged = {k: w + factors[k][1] @ factors[k][0] if k in factors else w for k, w in base.items()}
    assert {*factors} == {*train_pairedit.target_layers(transformers("flux"), "full")}
    assert_loaded(comfyui(tensors, comfy_flux(base), base), tensors, base, merged)


@pytest.fixture(scope="module")
def sd_files(checkpoints, tmp_path_factory):
    """sd_files(targets, export) -> (tensors of the file, models, base weights, merged ones)."""

    def write(targets, export):
        place = checkpoints["sd"], torch.float32, torch.device("cpu")
        models = {p: sd.load_part(place[0], p, *place[1:]) for p in ("unet", "text_encoder")}
        bare = {part: copy.deepcopy(model) for part, model in models.items()}
        base = {(p, k): w for p, m in models.items() for k, w in weights_of(m).items()}
        merged, switch = dict(base), sd.AdapterSwitch()
        for part, model in models.items():
            ends = sd.TARGETS[targets if part == "unet" else part]
            sd.add_adapter(model, switch, "change", ends, 4, 2.0)
            random_adapter(model, r"(down|up)\.change")
            for path, layer in sd.adapted_layers(model, "change").items():
                change = layer.up["change"].flatten(1) @ layer.down["change"].flatten(1) / 2
                merged[part, path] = base[part, path] + change.detach().view_as(base[part, path])
        file = tmp_path_factory.mktemp("sd") / sd.LORA_FILE
        sd.save_lora(file, sd.adapter_tensors(models, "change", 1.0), {}, export)
        return load_file(file), bare, base, merged

    return write


@pytest.mark.parametrize("targets", ["attention", "transformer", "self-attention+conv"])
def test_a_stable_diffusion_file_in_comfyui_forge_and_sd_scripts(targets, sd_files):
    tensors, models, base, merged = sd_files(targets, "kohya")
    assert sum(not torch.equal(merged[k], base[k]) for k in base) == len(tensors) / 3
    assert_loaded(comfyui(tensors, comfy_sd(base), base), tensors, base, merged, 1e-6)
    assert_loaded(sd_scripts(tensors, models), tensors, base, merged, 1e-6)


def test_under_pefts_names_comfyui_finds_no_attention_of_stable_diffusion(sd_files):
    """Why kohya's are the default."""
    for targets, attention_only in (("attention", True), ("self-attention+conv", False)):
        tensors, models, base, _ = sd_files(targets, "peft")
        _, made = comfyui(tensors, comfy_sd(base), base)
        unet = {layer for part, layer in made if part == "unet"}
        assert not any("attn" in layer for layer in unet) and bool(unet) != attention_only
        assert not sd_scripts(tensors, models)[0]


# --- a DoRA for ComfyUI: mistakes -----------------------------------------------------------------


def test_what_cannot_be_converted_for_comfyui_is_named(transformers, checkpoints, tmp_path):
    lora, dora = tmp_path / "lora.safetensors", tmp_path / "dora.safetensors"
    trained(transformers(), lora, "lora", targets="attn-image")
    trained(transformers("2.1"), dora, "dora", targets="attn-image")
    out, model = tmp_path / "out.safetensors", str(checkpoints["2511"])
    for source, target, base, words in [
        (lora, out, model, "is no DoRA of PEFT"),
        (dora, out, None, "--model DIR"),
        (dora, out, str(tmp_path), "model_index.json"),
        (dora, out, str(checkpoints["flux"]), "FluxPipeline"),
        (dora, lora, model, "is there already"),
        (dora, tmp_path / "out.pt", model, "ends in .safetensors"),
        (tmp_path / "none.safetensors", out, model, "none.safetensors"),
    ]:
        with pytest.raises(UserError, match=re.escape(words)):
            tool.to_comfyui(source, target, base)
    assert not out.exists()


# --- files of other trainers in generate.py -------------------------------------------------------


LAYERS = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_out.0"]
LAYERS += ["transformer_blocks.1.img_mlp.net.0.proj", "transformer_blocks.0.attn.add_k_proj"]
LAYERS_21 = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mlp.gate_layer"]


def layout(start, down=".lora_A.weight", up=".lora_B.weight", alpha=None, dotted=True):
    """A writer of LoRA files: (layer, down, up) -> tensors; alpha None writes none."""

    def write(layer, a, b):
        name = start + (layer if dotted else flat(layer))
        tensors = {f"{name}{down}": a, f"{name}{up}": b}
        return tensors if alpha is None else tensors | {f"{name}.alpha": torch.tensor(alpha)}

    return write


KOHYA = {"down": ".lora_down.weight", "up": ".lora_up.weight"}
DEFAULT = {"down": ".lora_A.default.weight", "up": ".lora_B.default.weight"}
TOLD = {"transformer.r": 4, "transformer.lora_alpha": 8}
LAYOUTS = {  # rank 4: (writer, metadata or adapter_config.json, strength)
    "ai-toolkit": (layout("diffusion_model."), None, 1.0),
    "musubi-tuner": (layout("lora_unet_", **KOHYA, alpha=2.0, dotted=False), None, 0.5),
    "DiffSynth": (layout("", **DEFAULT), None, 1.0),
    "DiffSynth, whole names": (layout("pipe.dit.", **DEFAULT), None, 1.0),
    "Lightning": (layout("", **KOHYA, alpha=8.0), None, 2.0),
    "OneTrainer": (layout("transformer.", **KOHYA, alpha=1.0), None, 0.25),
    "OneTrainer, flat": (layout("lora_transformer_", **KOHYA, alpha=1.0, dotted=False), None, 0.25),
    "SimpleTuner": (layout("transformer."), None, 1.0),
    "SimpleTuner, alpha": (layout("transformer."), {"metadata": TOLD}, 2.0),
    "LyCORIS": (layout("lycoris_", **KOHYA, alpha=2.0, dotted=False), None, 0.5),
    "PEFT": (layout("base_model.model."), {"beside": {"r": 4, "lora_alpha": 6}}, 1.5),
    "PEFT, rslora": (
        layout("base_model.model."),
        {"beside": {"r": 4, "lora_alpha": 6, "use_rslora": True}},
        3.0,
    ),
    "PEFT, patterns": (
        layout("base_model.model."),
        {"beside": {"r": 4, "lora_alpha": 2, "alpha_pattern": {"(to|add|net|img).*": 6}}},
        1.5,
    ),
}


def write_file(folder, tensors, told=None):
    told = told or {}
    metadata = {"lora_adapter_metadata": json.dumps(told["metadata"])} if "metadata" in told else {}
    if "beside" in told:
        (folder / "adapter_config.json").write_text(json.dumps(told["beside"]))
    tensors = {name: x.contiguous().clone() for name, x in tensors.items()}
    save_file(tensors, folder / "other.safetensors", metadata or None)
    return folder / "other.safetensors"


class Painter(generate.EditPainter):
    """Its checks without settings."""

    def __init__(self):
        pass


def changes_in_generate(file, transformer):
    """{layer: change of its weights} of a LoRA that generate.py has checked and loaded."""
    Painter().check_lora(file, transformer)
    kind = diffusers.QwenImageEditPlusPipeline  # that of 2.1 loads with the same functions
    pipeline = kind(transformer=transformer, **dict.fromkeys(PARTS))
    generate.load_edit_lora(pipeline, file, "a")
    base = {n.removesuffix(".base_layer"): w for n, w in weights_of(transformer).items()}
    transformer.fuse_lora(adapter_names=["a"])
    transformer.unload_lora()
    made = weights_of(transformer)
    return {n: w - base[n] for n, w in made.items() if not torch.equal(w, base[n])}


def assert_changes(found, wanted):
    assert found.keys() == wanted.keys()
    for layer, change in wanted.items():
        torch.testing.assert_close(found[layer], change, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["2511", "2.1"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_lora_of_another_trainer_has_its_strength(name, kind, transformers, tmp_path):
    write, told, strength = LAYOUTS[name]
    transformer = transformers(kind)
    layers = LAYERS if kind == "2511" else LAYERS_21
    factors = tiny.random_factors(transformer, 0, layers)
    tensors = {}
    for layer, pair in factors.items():
        tensors |= write(layer, *pair)
    file = write_file(tmp_path, tensors, told)
    wanted = {layer: strength * up @ down for layer, (down, up) in factors.items()}
    assert_changes(changes_in_generate(file, transformer), wanted)


def test_layers_of_different_ranks_keep_their_strength(transformers, tmp_path):
    """As musubi-tuner and extractions write them; alpha is 2 in all of them."""
    transformer, tensors, wanted = transformers(), {}, {}
    write = layout("lora_unet_", **KOHYA, alpha=2.0, dotted=False)
    for rank, layer in enumerate(LAYERS, 1):
        [(down, up)] = tiny.random_factors(transformer, rank, [layer], rank).values()
        tensors |= write(layer, down, up)
        wanted[layer] = 2.0 / rank * up @ down
    assert_changes(changes_in_generate(write_file(tmp_path, tensors), transformer), wanted)


def kron_parts(weight, outer=(4, 4), seed=0):
    """Two matrices whose Kronecker product has the shape of a weight."""
    draw = torch.Generator().manual_seed(seed)
    inner = [side // part for side, part in zip(weight.shape, outer, strict=True)]
    return torch.randn(outer, generator=draw) * 0.3, torch.randn(inner, generator=draw) * 0.3


@pytest.mark.parametrize("start", ["lycoris_", "diffusion_model.", "transformer.", "lora_unet_"])
@pytest.mark.parametrize("way", ["whole", "product", "both products", "musubi"])
def test_a_lokr_of_another_trainer_has_its_strength(way, start, transformers, tmp_path):
    transformer = transformers()
    weights, tensors, wanted = weights_of(transformer), {}, {}
    for layer in LAYERS:
        w1, w2 = kron_parts(weights[layer])
        name = start + (layer if start.endswith(".") else flat(layer))
        if way == "both products":
            tensors |= {f"{name}.lokr_w1_a": w1[:, :2], f"{name}.lokr_w1_b": w1[:2]}
            w1 = w1[:, :2] @ w1[:2]
        else:
            tensors[f"{name}.lokr_w1"] = w1
        if "product" in way:
            tensors |= {f"{name}.lokr_w2_a": w2[:, :2], f"{name}.lokr_w2_b": w2[:2]}
            w2 = w2[:, :2] @ w2[:2]
        else:
            tensors[f"{name}.lokr_w2"] = w2
        tensors[f"{name}.alpha"] = torch.tensor(3.0)
        strength = {"whole": 1.0, "musubi": 3.0 / max(w2.shape)}.get(way, 1.5)
        wanted[layer] = strength * torch.kron(w1, w2)
    if way == "musubi":
        tensors["lokr_factor"] = torch.tensor(4)
    assert_changes(changes_in_generate(write_file(tmp_path, tensors), transformer), wanted)


@pytest.mark.parametrize("method", ["lora", "dora", "lokr"])
def test_our_own_file_has_its_strength(method, transformers, tmp_path):
    base, merged = trained(transformers(), tmp_path / "l.safetensors", method)
    found = changes_in_generate(tmp_path / "l.safetensors", transformers())
    wanted = {k: merged[k] - base[k] for k in base if not torch.equal(merged[k], base[k])}
    assert_changes(found, wanted)


def test_a_dora_of_peft_has_its_strength(transformers, tmp_path):
    base, merged = trained(transformers(), tmp_path / "l.safetensors", "dora", targets="attn-image")
    tensors = load_file(tmp_path / "l.safetensors")
    names = {n: n.replace("transformer.", "base_model.model.", 1) for n in tensors}
    halved = {names[n]: x / 2 if "lora_B" in n else x for n, x in tensors.items()}
    told = {"beside": {"r": 4, "lora_alpha": 8, "use_dora": True}}
    found = changes_in_generate(write_file(tmp_path, halved, told), transformers())
    wanted = {k: merged[k] - base[k] for k in base if not torch.equal(merged[k], base[k])}
    assert_changes(found, wanted)


def lora(start="transformer.", **more):
    """A sound LoRA of one layer of 64 x 64, and more tensors of it."""
    return {
        f"{start}{LAYERS[0]}.{name}": tensor
        for name, tensor in {
            "lora_A.weight": torch.ones(4, 64),
            "lora_B.weight": torch.ones(64, 4),
            **more,
        }.items()
    }


LOKR_SIZES = {"w1": (4, 4), "w2_a": (16, 3), "w2_b": (2, 16)}
ODD = kron_parts(torch.empty(64, 64), (32, 2))
REFUSED = {  # tensors, and what the message says
    "DoRA of OneTrainer": (lora(dora_scale=torch.ones(64, 1)), "dora_scale"),
    "LoHa": ({f"lycoris_{flat(LAYERS[0])}.hada_w1_a": torch.ones(64, 4)}, "LoHa"),
    "OFT": ({f"transformer.{LAYERS[0]}.oft_R.weight": torch.ones(4, 4)}, "OFT"),
    "whole differences": (lora("diffusion_model.", diff_b=torch.ones(64)), "differences of whole"),
    "PEFT without its settings": (lora("base_model.model."), "adapter_config.json"),
    "a text encoder": ({f"text_encoder.layers.0.{n}": x for n, x in lora("").items()}, "text_enc"),
    "another model": ({n.replace("_blocks", "_parts"): x for n, x in lora().items()}, "_parts"),
    "other sizes": (lora(**{"lora_A.weight": torch.ones(4, 32)}), r"\[64, 32\], here .*\[64, 64\]"),
    "two ranks": (lora(**{"lora_A.weight": torch.ones(2, 64)}), "ranks 2 and 4"),
    "LoKr of other sizes": (
        {f"transformer.{LAYERS[0]}.lokr_{n}": torch.ones(4, 4) for n in ("w1", "w2")},
        r"\[16, 16\]",
    ),
    "LoKr that PEFT cannot have": (
        {f"transformer.{LAYERS[0]}.lokr_{n}": x for n, x in zip(("w1", "w2"), ODD, strict=True)},
        "LoKr with these sizes",
    ),
    "convolutions": (
        lora(
            **{"lora_A.weight": torch.ones(4, 64, 1, 1), "lora_B.weight": torch.ones(64, 4, 1, 1)}
        ),
        r"\[64, 64, 1, 1, 1, 1\]",
    ),
    "one factor twice": (lora(**{"lora_down.weight": torch.ones(4, 64)}), "lora_down"),
    "two alphas": (lora(alpha=torch.ones(2)), "strength"),
    "magnitudes of other sizes": (
        lora(lora_magnitude_vector=torch.ones(3)),
        r"magnitudes of \[3\]",
    ),
    "factors of a LoKr that do not fit": (
        {f"transformer.{LAYERS[0]}.lokr_{n}": torch.ones(*x) for n, x in LOKR_SIZES.items()},
        "product of its factors",
    ),
    "half of a LoKr": ({f"transformer.{LAYERS[0]}.lokr_w1": torch.ones(4, 4)}, "has only w1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_name_before_a_model_loads(name, checkpoints, tmp_path):
    tensors, words = REFUSED[name]
    file = write_file(tmp_path, tensors)
    config = qwen.utils.read_model_json(str(checkpoints["2511"]), "transformer/config.json")
    with pytest.raises(UserError, match=words) as refused:
        Painter().check_lora(file, qwen.empty_transformer(config))
    assert str(file) in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    ['{"lora_alpha": "x"}', '{"alpha_pattern": {"(": 2}}', '{"alpha_pattern": [1]}', "[1]", "x"],
)
def test_strange_settings_of_peft_are_refused(settings, checkpoints, tmp_path):
    file = write_file(tmp_path, lora("base_model.model."))
    (tmp_path / "adapter_config.json").write_text(settings)
    config = qwen.utils.read_model_json(str(checkpoints["2511"]), "transformer/config.json")
    with pytest.raises(UserError, match=r"other\.safetensors|adapter_config\.json"):
        Painter().check_lora(file, qwen.empty_transformer(config))


def test_a_strange_file_of_stable_diffusion(checkpoints, tmp_path):
    """Old processors' names are read, other kinds of adapters are named."""
    unet = sd.load_part(checkpoints["sd"], "unet", torch.float32, torch.device("cpu"))
    block = "mid_block.attentions.0.transformer_blocks.0.attn1"
    factors = {"to_q": (torch.ones(2, 64), torch.ones(64, 2))} | {
        "to_out": (torch.ones(3, 64), torch.ones(64, 3))
    }
    tensors = {}
    for end, (down, up) in factors.items():
        start = f"unet.{block}.processor.{end}_lora"
        tensors |= {f"{start}.down.weight": down, f"{start}.up.weight": up}
    file = write_file(tmp_path, tensors)
    sd.load_adapter({"unet": unet}, sd.AdapterSwitch(), "x", file)
    found = sd.adapted_layers(unet, "x")
    assert {*found} == {f"{block}.to_q", f"{block}.to_out.0"}
    assert all(layer.strength["x"] == 1 for layer in found.values())
    for end, kind in (("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr"), ("dora_scale", "DoRA")):
        file = write_file(tmp_path, {f"lora_unet_{flat(block)}_to_q.{end}": torch.ones(4, 4)})
        with pytest.raises(UserError, match=f"{kind}.*{end}"):
            load_tool("lora_names").check_kind(file, load_file(file), edits=False)
