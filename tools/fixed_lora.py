"""A second LoRA, not trained, that previews of train_qwen_edit.py are drawn with (few steps)."""

from __future__ import annotations

import re
import warnings
from typing import Any

from utils import UserError, expanded, listed, load_tool, named


def load(transformer: Any, pipeline_class: str, text: str) -> float:
    """Load validation.fixed_lora as the adapter "fixed"; return its scale. Raises UserError.

    Takes what generate.py takes, at the same strength.
    """
    name, _, number = text.rpartition(":")
    what, tool = f"validation.fixed_lora {text}", load_tool("lora_names")
    try:
        with named(what), warnings.catch_warnings(action="ignore"):
            numeric = re.fullmatch(r"-?[\d.]+", number)
            name, scale = (name, float(number)) if numeric else (text, 1.0)
            if not scale:
                raise ValueError("at scale 0 it changes nothing; leave it out")
            if not (file := expanded(name)).is_file():
                raise ValueError(f"no file {file}")
            layers = tool.read_layers(file, transformer, pipeline_class)
            fits = {n: tool.misfit(x, transformer.get_submodule(n)) for n, x in layers.items()}
            if wrong := [f"{layer}: {misfit}" for layer, misfit in fits.items() if misfit]:
                raise ValueError(f"{len(wrong)} layers do not fit\n{listed(wrong, 3)}")
            if transformer.device.type != "meta":  # preflight() only compares
                tensors = {
                    f"transformer.{n}.{k}": x for n, p in layers.items() for k, x in p.items()
                }
                transformer.load_lora_adapter(tensors, adapter_name="fixed")
    except UserError as error:
        raise error if what in str(error) else UserError(f"{what}: {error}") from error
    return scale
