"""Read LoRA files of any trainer, at the strength they were trained with; for generate.py.

Page: docs/generate.md

A layer, transformer_blocks.0.attn.to_q, is called

    transformer.<layer>.lora_A.weight       this project, diffusers, SimpleTuner (strength: PEFT's
                                            settings in the metadata, else 1)
    diffusion_model.<layer>.lora_A.weight   ai-toolkit (1)
    <layer>.lora_A.default.weight           DiffSynth-Studio (1)
    <layer>.lora_down.weight                Qwen-Image-Lightning (.alpha / rank, as all below)
    transformer.<layer>.lora_down.weight    OneTrainer, which also knows lora_transformer_<layer>
    lora_unet_<layer>.lora_down.weight      musubi-tuner, kohya, PairEdit; _ for the dots in <layer>
    lycoris_<layer>.lora_down.weight        LyCORIS and SimpleTuner, also .lokr_w1
    base_model.model.<layer>.lora_A.weight  PEFT (strength: adapter_config.json beside the file)

What is left, or another kind of adapter, is refused by name: nothing is dropped.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import UserError, from_tool, listed, named, read_text

Parts = dict[str, torch.Tensor]  # of a layer: "down" (r, in), "up" (out, r), "alpha" ...
ENDS = {
    ".lora_A.weight": "down",
    ".lora_down.weight": "down",
    ".lora_B.weight": "up",
    ".lora_up.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
    ".alpha": "alpha",
}
LOKR = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")
ENDS |= {f".lokr_{part}": part for part in LOKR}
DOTTED = ("", "transformer.", "diffusion_model.", "base_model.model.", "pipe.dit.")
FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")
LOST = re.compile(r"^lora_te|^text_encoder")  # what diffusers' conversion leaves out
KINDS = {  # names of tensors of adapters that are not read anywhere here
    r"\.dora_scale$": "a DoRA with dora_scale, from which programs compute different weights",
    r"\.hada_": "a LoHa (LyCORIS)",
    r"\.b?oft_": "an OFT or BOFT (LyCORIS, OneTrainer)",
    r"\.(diff|diff_b|w_norm|b_norm|set_weight)$": "differences of whole weights, not a LoRA",
    r"\.lokr_t2$": "a LoKr of convolutions (LyCORIS)",
    r"\.lora_mid\.": "a LoCon with a middle factor (LyCORIS)",
    r"\.[ab][12]\.weight$": "a GLoRA (LyCORIS)",
    r"\.on_input$": "an IA3 (LyCORIS)",
}
EDITS = {r"\.lokr_": "a LoKr", r"magnitude": "a DoRA"}  # that only Qwen-Image takes


def check_kind(path: Path, names: Iterable[str], edits: bool) -> None:
    """Raise UserError, with its kind, for a file of an adapter that is not read here."""
    kinds = KINDS if edits else KINDS | EDITS
    for name in sorted(names):
        if kind := next((kind for part, kind in kinds.items() if re.search(part, name)), None):
            way = "take the file it was converted from, or merge it with the program it is for"
            raise UserError(f"LoRA {path} is {kind}: {name}; not read here. What to do: {way}")


def read_tensors(path: Path) -> tuple[Parts, dict[str, str]]:
    """Return tensors and metadata of a .safetensors file or a pickle of tensors; UserError."""
    if path.suffix == ".safetensors":
        with named(f"LoRA {path} cannot be read"), safe_open(path, framework="pt") as file:
            names = file.keys()  # not a dict
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    tensors = None
    with contextlib.suppress(Exception):  # torch's advice would be to run what is in the file
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict) or not all(torch.is_tensor(x) for x in tensors.values()):
        raise UserError(f"LoRA {path}: no pickle of tensors by their names, and of nothing else")
    with named(f"LoRA {path}"):
        from_tool("check", "check_factors", None, tensors)
    return tensors, {}


def sort_keys(tensors: Parts, transformer: Any) -> tuple[dict[str, Parts], list[str]]:
    """Return {layer: parts} and the names that belong to no layer here.

    KEEP: flat names are made from the layers; underscores cannot be turned back into dots.
    """
    names: dict[str, str] = {}
    for path, _ in transformer.named_modules():
        names |= {f"{before}{path}": path for before in DOTTED}
        names |= {before + path.replace(".", "_"): path for before in FLAT}
    found: dict[str, Parts] = {}
    left = []
    for key, tensor in tensors.items():
        end = next((end for end in ENDS if key.endswith(end)), None)
        layer = names.get(key.removesuffix(end)) if end else None
        parts = found.setdefault(layer, {}) if end and layer else None
        if end and parts is not None and ENDS[end] not in parts:
            parts[ENDS[end]] = tensor
        else:  # of no layer here, or the same part under two names
            left.append(key)
    return found, left


def read_settings(path: Path, names: Iterable[str], metadata: dict[str, str]) -> dict[str, Any]:
    """Return PEFT's settings of a file: in its metadata, or beside a file of PEFT. UserError."""
    names, beside = [*names], path.with_name("adapter_config.json")
    text = metadata.get("lora_adapter_metadata", "{}")
    of_peft = any(name.startswith("base_model.model.") for name in names)
    if of_peft and text == "{}" and not any(name.endswith(".alpha") for name in names):
        with named(f"LoRA {path} is of PEFT, whose strength stands in {beside.name} beside it"):
            text = read_text(beside)
    with named(f"LoRA {path}: its settings cannot be read"):
        settings = dict(json.loads(text))
        patterns = [
            p for n in ("alpha_pattern", "rank_pattern") for p in dict(settings.get(n) or {})
        ]
    if of_peft:  # those in the metadata are looked at with the file
        said = {f"{beside}: {text!r}": text for text in patterns}
        if problems := from_tool("check", "check_patterns", [], said):
            raise UserError(problems[0])
    return {key.removeprefix("transformer."): value for key, value in settings.items()}


def of_layer(settings: dict[str, Any], patterns: str, usual: str, layer: str) -> Any:
    """Return a setting of a layer; PEFT's patterns are endings of its name, and expressions."""
    own = (settings.get(patterns) or {}).items()
    fits = (value for ending, value in own if re.fullmatch(rf"(.*\.)?({ending})", layer))
    return next(fits, settings.get(usual))


def lora_strength(layer: str, parts: Parts, settings: dict[str, Any]) -> float:
    """Return alpha / rank: by the file's own .alpha, else its PEFT settings, else 1."""
    rank = parts["down"].shape[0]
    if "alpha" in parts:
        return float(parts["alpha"]) / rank
    alpha = of_layer(settings, "alpha_pattern", "lora_alpha", layer)
    root = math.sqrt(rank) if settings.get("use_rslora") else rank
    return 1.0 if alpha is None else alpha / root


def lokr_strength(layer: str, parts: Parts, settings: dict[str, Any], musubi: bool) -> float:
    """Return alpha / rank of a LoKr; where both matrices are whole, it is 1.

    musubi-tuner takes the longer side of a whole second matrix as its rank, LyCORIS, ComfyUI and
    ai-toolkit no strength at all; PEFT has one strength for all layers.
    """
    ranks = [len(parts[part]) for part in ("w2_b", "w1_b") if part in parts]
    if musubi and "w2" in parts:
        ranks = [max(parts["w2"].shape)]
    if "alpha" in parts:
        return float(parts["alpha"]) / ranks[0] if ranks else 1.0
    alpha = of_layer(settings, "alpha_pattern", "alpha", layer)
    return 1.0 if alpha is None else alpha / of_layer(settings, "rank_pattern", "r", layer)


def fold(layer: str, parts: Parts, settings: dict[str, Any], musubi: bool) -> Parts:
    """Return the tensors of a layer under PEFT's names, fp32, its strength within them.

    The strength is in lora_B or lokr_w1. The matrices of a LoKr are made whole: PEFT decides by
    itself whether they are products, and the file's author may have decided otherwise.
    """
    parts = {part: tensor.float() for part, tensor in parts.items()}
    if parts.keys() & {"down", "up"}:
        found = {"lora_A.weight": parts["down"]}
        found["lora_B.weight"] = parts["up"] * lora_strength(layer, parts, settings)
        if "magnitude" in parts:
            found["lora_magnitude_vector"] = parts["magnitude"]
        return found
    whole = {}
    for part in ("w1", "w2"):
        factors = part not in parts
        whole[part] = parts[f"{part}_a"] @ parts[f"{part}_b"] if factors else parts[part]
    strength = lokr_strength(layer, parts, settings, musubi)
    return {"lokr_w1": whole["w1"] * strength, "lokr_w2": whole["w2"]}


def is_whole(parts: Parts) -> bool:
    """Return whether a layer has what its kind of adapter is made of, and nothing else."""
    kinds = [{"down", "up"}, {"down", "up", "magnitude"}]
    for first in ({"w1"}, {"w1_a", "w1_b"}):
        kinds += [first | {"w2"}, first | {"w2_a", "w2_b"}]
    return parts.keys() - {"alpha"} in kinds


def read_layers(path: Path, transformer: Any, pipeline: str) -> dict[str, Parts]:
    """Return {layer: its tensors under PEFT's names}, fp32; the strength is folded in.

    Reads the layouts above and what `pipeline.lora_state_dict` converts (kohya, XLabs, Black
    Forest Labs ...).

    Raises:
        UserError: not readable, or tensors in it that are no part of a LoRA for this transformer.
    """
    import diffusers

    tensors, metadata = read_tensors(path)
    check_kind(path, tensors, edits=pipeline.startswith("Qwen"))
    total, musubi = len(tensors), tensors.pop("lokr_factor", None) is not None
    found, left = sort_keys(tensors, transformer)
    if left and not any(LOST.search(key) for key in left):
        with contextlib.suppress(Exception):  # converters raise many kinds; `left` tells the user
            kind = getattr(diffusers, pipeline)
            converted = kind.lora_state_dict(dict(tensors), return_alphas=True)
            converted, alphas = converted if isinstance(converted, tuple) else (converted, None)
            found, left = sort_keys(converted | (alphas or {}), transformer)
    left += [f"{layer} has only {', '.join(x)}" for layer, x in found.items() if not is_whole(x)]
    if left or not found:
        text = f"LoRA {path}: {len(left)} of {total} tensors are no part of a LoRA for this"
        raise UserError(f"{text} transformer{trained_on(path)}\n{listed(left, 3)}")
    settings = read_settings(path, tensors, metadata)
    with named(f"LoRA {path}: its strength, or a product of its factors, cannot be computed"):
        return {layer: fold(layer, parts, settings, musubi) for layer, parts in found.items()}


def trained_on(path: Path) -> str:
    """Return what a LoRA of our trainers says of its base model; "" of another's."""
    with contextlib.suppress(Exception), safe_open(path, framework="pt") as file:  # a pickle, none
        about = json.loads(file.metadata()["image_edit_lora"])
        return f"; it was trained on {about['base_model']}"
    return ""


def misfit(parts: Parts, layer: Any) -> str:
    """Return how the change of read_layers() differs from the weights of a layer; "" if it fits."""
    if "lokr_w1" in parts:
        sides = zip(parts["lokr_w1"].shape, parts["lokr_w2"].shape, strict=False)
        sizes = [one * other for one, other in sides]
    else:
        down, up = parts["lora_A.weight"], parts["lora_B.weight"]
        if up.shape[1] != len(down):
            return f"its factors have the ranks {len(down)} and {up.shape[1]}"
        sizes = [len(up), *down.shape[1:], *up.shape[2:]]
    here = list(getattr(layer, "weight", torch.empty(0)).shape)
    lengths = parts.get("lora_magnitude_vector", torch.empty(here[0])).shape
    if sizes == here and [*lengths] != here[:1]:
        return f"has magnitudes of {[*lengths]}, here they are {here[:1]}"
    return "" if sizes == here else f"changes weights of {sizes}, here they are {here}"
