"""Turn sliders of FLUX.1 from one format into another, and a DoRA of Qwen-Image into ComfyUI's.

Page: docs/generate.md

    python tools/convert_lora.py age.pt age.safetensors                  # for diffusers and others
    python tools/convert_lora.py age.safetensors age.pt                  # for the original programs
    python tools/convert_lora.py age.pt age.safetensors --original       # their names, no pickle
    ... --model DIR                                                      # layers of another FLUX
    python tools/convert_lora.py dora.safetensors comfy.safetensors --to comfyui --model DIR

Every format that generate.py loads is read. The strength stays the same in every loader: diffusers
files say nothing of alpha, so it counts as the rank; the original programs take 1 / rank whatever
the file says, so the upper factor is multiplied by the rank (exact for a power of two, as 16 is).

Of a layer's weights W a DoRA with magnitudes m makes m (W + B A) / |W + B A|, with the norm of each
row; ComfyUI makes dora_scale (W + B A) / |W|. So dora_scale = m |W| / |W + B A| gives the same
weights there, at strength 1. It hangs on the base, which is read layer by layer.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from generate import PUBLISHED_FLUX, flux_layers, read_about, read_factors
from utils import (
    UserError,
    check_setup,
    fetch_checkpoint,
    load_script,
    load_tool,
    named,
    progress,
    read_model_json,
    run_script,
    save_atomic,
    save_tensors,
)

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]  # {layer: (down (r, in), up (out, r))}


def to_diffusers(factors: Factors) -> dict[str, torch.Tensor]:
    """Rename to transformer.<layer>.lora_A and lora_B."""
    tensors = {}
    for layer, (down, up) in factors.items():
        tensors[f"transformer.{layer}.lora_A.weight"] = down.contiguous()
        tensors[f"transformer.{layer}.lora_B.weight"] = up.contiguous()
    return tensors


def to_original(factors: Factors) -> dict[str, torch.Tensor]:
    """Rename to lora_unet_<layer with _> with lora_down, lora_up and alpha = 1."""
    tensors = {}
    for layer, (down, up) in factors.items():
        name = "lora_unet_" + layer.replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = down.contiguous()
        tensors[f"{name}.lora_up.weight"] = up * down.shape[0]
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    return tensors


def dora_scale(weight: torch.Tensor, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return m |W| / |W + B A|, (out, 1), of a DoRA whose strength is folded into B."""
    whole = weight + parts["lora_B.weight"] @ parts["lora_A.weight"]
    share = weight.norm(dim=1, keepdim=True) / whole.norm(dim=1, keepdim=True)
    return parts["lora_magnitude_vector"][:, None] * share


@torch.no_grad()
def to_comfyui(source: Path, target: Path, model: str | None) -> int:
    """Write a DoRA of Qwen-Image for ComfyUI; returns how many layers. Raises UserError."""
    check_files(source, target, [".safetensors"])
    about, names = read_about(source), load_tool("lora_names")
    if not any("magnitude" in name for name in names.read_tensors(source)[0]):
        text = "is no DoRA of PEFT: ComfyUI loads LoRA and LoKr files of these scripts as they are"
        raise UserError(f"{source} {text}")
    if not (model := model or about.get("base_model")):
        raise UserError(f"{source} does not say its base; name it: --model DIR")
    script = load_script(Path(__file__).resolve().parent.parent / "train_qwen_edit.py")
    script.detect_flavour(model)
    empty = script.empty_transformer(read_model_json(model, "transformer/config.json"))
    layers = names.read_layers(source, empty, "QwenImageEditPlusPipeline")
    for layer, parts in layers.items():
        if wrong := names.misfit(parts, empty.get_submodule(layer)):
            raise UserError(f"{source} is of another model than {model}: {layer} {wrong}")
    folder = fetch_checkpoint(model, "transformer/*") / "transformer"
    place: dict[str, Path] = {}
    tensors: dict[str, torch.Tensor] = {}
    with named(f"{folder} cannot be read"):
        for file in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                place |= dict.fromkeys(opened.keys(), file)
        for layer, parts in progress(layers.items(), "dora_scale", unit="layer", leave=False):
            key = f"{layer}.weight"
            with safe_open(place[key], framework="pt") as opened:
                parts["dora_scale"] = dora_scale(opened.get_tensor(key).float(), parts)
            del parts["lora_magnitude_vector"]
            tensors |= {f"transformer.{layer}.{name}": x for name, x in parts.items()}
    save_tensors(target, tensors, image_edit_lora=about | {"for": "ComfyUI"})
    return len(layers)


def check_files(source: Path, target: Path, ends: list[str]) -> None:
    """Raise UserError where the target cannot be written, or the source is no sound LoRA."""
    if target.suffix not in ends:
        raise UserError(f"{target}: wanted a name that ends in {' or '.join(ends)}")
    if source.resolve() == target.resolve():
        raise UserError(f"{target}: source and target are one file; name another target")
    if target.exists():
        raise UserError(f"{target} is there already; name another target")
    if problems := check_setup(writes={"target": target.parent}, loras=[source]):
        raise UserError(problems[0])


def convert(source: Path, target: Path, original: bool, model: str) -> int:
    """Read, check against the model's layers, write; returns how many layers. Raises UserError."""
    check_files(source, target, [".pt", ".safetensors"])
    script = load_script(Path(__file__).resolve().parent.parent / "train_pairedit.py")
    transformer = flux_layers(script, model)
    factors = read_factors(source, transformer)  # of a pickle only tensors are read
    # names layers that do not fit
    script.add_slider(transformer, script.AdapterSwitch(), "checked", factors, 1.0)
    pickled = target.suffix == ".pt"
    tensors = to_original(factors) if original or pickled else to_diffusers(factors)
    write = torch.save if pickled else save_file
    save_atomic(target, lambda file: write(tensors, file))
    return len(factors)


def main() -> None:
    """Read the names of the two files, write the second one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, help=".pt: the original format; .safetensors")
    parser.add_argument("--original", action="store_true", help="original names in a .safetensors")
    text = "comfyui: of a DoRA of Qwen-Image the file that ComfyUI computes right"
    parser.add_argument("--to", choices=["comfyui"], help=text)
    text = "checkpoint: FLUX.1 (its config), of a DoRA the base (its transformer's weights)"
    parser.add_argument("--model", help=text)
    given = parser.parse_args()
    if given.to and given.original:
        parser.error("--original is for sliders, --to comfyui for a DoRA")
    if given.to:
        layers = to_comfyui(given.source, given.target, given.model)
    else:
        model = given.model or PUBLISHED_FLUX
        layers = convert(given.source, given.target, given.original, model)
    print(f"{given.target}: {layers} layers")


if __name__ == "__main__":
    run_script(main)
