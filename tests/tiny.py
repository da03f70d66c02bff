"""Tiny random checkpoints of the true classes, made offline in seconds."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import demo


def build(kind, folder):
    """Save a pipeline of one kind ("2508", "2509", "2511") into `folder`."""
    import diffusers

    torch.manual_seed(0)
    tokenizer = demo.build_tokenizer()
    names = {"2508": "QwenImageEditPipeline"}
    pipeline = getattr(diffusers, names.get(kind, "QwenImageEditPlusPipeline"))(
        scheduler=demo.build_scheduler(),
        vae=demo.build_vae(),
        text_encoder=demo.build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        processor=demo.build_processor(tokenizer),
        transformer=demo.build_transformer(
            zero_cond_t=kind == "2511", layers=2, heads=2, head_dim=32
        ),
    )
    pipeline.save_pretrained(folder)


def build_all(folder):
    """{"2508" | "2509" | "2511": folder}; made once, whichever test process comes first."""
    found = {}
    for kind in ("2508", "2509", "2511"):
        found[kind] = folder / kind
        if not (found[kind] / "model_index.json").exists():
            build(kind, found[kind])
    return found
