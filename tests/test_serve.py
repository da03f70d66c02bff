"""tools/serve.py: its pictures are generate.py's; the page in a real browser; mistakes."""

import importlib.metadata
import socket
import time
import types

import numpy as np
import pytest
import tiny
import torch
from conftest import PAIRS, ROOT, run
from PIL import Image
from safetensors.torch import save_file
from test_pages import CHROMIUM, DRIVER, FLAGS  # noqa: F401
from test_pages import browser as browser  # the fixture

import generate
import train_qwen_edit
import utils
from utils import UserError, load_tool

tool = load_tool("serve")
PHOTO = PAIRS / "coffee2_R.png"
QWEN = ROOT / "demo/qwen_edit_base"
FAMILIES = ("qwen", "flux", "sd")
STEPS = ["--num_inference_steps", 3]
QUICK = {
    "qwen": [*STEPS, "--true_cfg_scale", 1.5, "--negative_prompt", "grey"],
    "flux": [*STEPS, "--skip", 0, "--resolution", 64, "--max_sequence_length", 16],
    "sd": [*STEPS, "--skip", 0.34, "--guidance_scale", 2],
}


@pytest.fixture(scope="module")
def models(checkpoints, tmp_path_factory):
    """{family: (base, its LoRA)}; Qwen-Image-Edit: the base of the demo."""
    folder = tmp_path_factory.mktemp("loras")
    tiny.save_sd_lora(checkpoints["sd"], folder / "sd.safetensors")
    config = utils.read_model_json(str(QWEN), "transformer/config.json")
    layers = dict(train_qwen_edit.empty_transformer(config).named_modules())
    names = [name for name in layers if name.endswith((".to_q", ".to_v", ".to_out.0"))]
    factors = tiny.random_factors(types.SimpleNamespace(named_modules=layers.items), 0, names)
    tensors = {
        f"transformer.{name}.lora_{end}.weight": factor * 0.5
        for name, pair in factors.items()
        for end, factor in zip("AB", pair, strict=True)
    }
    about = {"reference_area": "target", "resolution": 64, "prompts": ["make it snow"]}
    about |= {"vision_area": 4096, "flavour": "edit-2511"}
    utils.save_tensors(folder / "qwen.safetensors", tensors, image_edit_lora=about)
    flux = tiny.save_sliders(checkpoints["flux"], folder / "flux")
    bases = {"qwen": QWEN, "flux": checkpoints["flux"], "sd": checkpoints["sd"]}
    return {name: (base, folder / f"{name}.safetensors") for name, base in bases.items()}
