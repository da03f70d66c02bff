"""A second LoRA, not trained, that previews of train_qwen_edit.py are drawn with (few steps)."""

from __future__ import annotations

import re
import warnings
from typing import Any

from safetensors.torch import load_file

from utils import expanded, listed, named


def load(transformer: Any, pipeline_class: str, text: str) -> float:
    """Load validation.fixed_lora as the adapter "fixed"; return its scale. Raises UserError."""
    import diffusers

    name, _, number = text.rpartition(":")
    name, scale = (name, float(number)) if re.fullmatch(r"-?[\d.]+", number) else (text, 1.0)
    with named(f"validation.fixed_lora {text}"), warnings.catch_warnings(action="ignore"):
        file = expanded(name)
        read = getattr(diffusers, pipeline_class).lora_state_dict
        tensors, about = read(load_file(file), return_lora_metadata=True)
        layers = {re.split(r"\.lo(?:ra|kr)_", key)[0].partition(".")[2] for key in tensors}
        if wrong := sorted(layers - {name for name, _ in transformer.named_modules()}):
            raise ValueError(f"{len(wrong)} layers are not in this model\n{listed(wrong, 3)}")
        if transformer.device.type != "meta":  # preflight() only compares
            transformer.load_lora_adapter(tensors, metadata=about, adapter_name="fixed")
    return scale
