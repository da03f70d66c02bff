"""Turn a FLUX.1 LoRA of PairEdit or Concept Sliders into one for diffusers and PEFT, or back.

Page: docs/generate.md

    python tools/convert_lora.py age.pt age.safetensors                  # for diffusers and others
    python tools/convert_lora.py age.safetensors age.pt                  # for the original programs
    python tools/convert_lora.py age.pt age.safetensors --original       # their names, no pickle
    ... --model DIR                                                      # layers of another FLUX

Every format that generate.py loads is read. The strength stays the same in every loader: diffusers
files say nothing of alpha, so it counts as the rank; the original programs take 1 / rank whatever
the file says, so the upper factor is multiplied by the rank (exact for a power of two, as 16 is).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from generate import PUBLISHED_FLUX, flux_layers, read_factors
from utils import UserError, check_setup, load_script, run_script, save_atomic

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


def convert(source: Path, target: Path, original: bool, model: str) -> int:
    """Read, check against the model's layers, write; returns how many layers. Raises UserError."""
    if target.suffix not in (".pt", ".safetensors"):
        raise UserError(f"{target}: wanted a name that ends in .pt or .safetensors")
    if source.resolve() == target.resolve():
        raise UserError(f"{target}: source and target are one file; name another target")
    if target.exists():
        raise UserError(f"{target} is there already; name another target")
    if problems := check_setup(writes={"target": target.parent}, loras=[source]):
        raise UserError(problems[0])
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
    parser.add_argument("--model", default=PUBLISHED_FLUX, help="FLUX checkpoint (its config)")
    given = parser.parse_args()
    layers = convert(given.source, given.target, given.original, given.model)
    print(f"{given.target}: {layers} layers")


if __name__ == "__main__":
    run_script(main)
