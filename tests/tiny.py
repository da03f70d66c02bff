"""Tiny random checkpoints of the true classes, made offline in seconds."""

import os
import shutil

import diffusers
import torch

import demo

KINDS = {
    "2508": "QwenImageEditPipeline",
    "2509": "QwenImageEditPlusPipeline",
    "2511": "QwenImageEditPlusPipeline",
}


def build(kind, folder):
    """Save a pipeline of one kind ("2508", "2509", "2511") into `folder`."""
    torch.manual_seed(0)
    tokenizer = demo.build_tokenizer()
    pipeline = getattr(diffusers, KINDS[kind])(
        scheduler=demo.build_scheduler(),
        vae=demo.build_vae(),
        text_encoder=demo.build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        processor=demo.build_processor(tokenizer),
        transformer=demo.build_transformer(
            zero_cond_t=kind == "2511", layers=2, heads=2, head_dim=32
        ),
    )
    demo.save_pipeline(pipeline, folder)


def build_all(folder):
    """{"2508" | "2509" | "2511": folder}; made once, whichever test process comes first."""
    found = {kind: folder / kind for kind in KINDS}
    for kind, place in found.items():
        if not place.exists():
            part = folder / f"{kind}.{os.getpid()}"
            build(kind, part)
            try:
                part.rename(place)
            except OSError:  # the other test process was first
                shutil.rmtree(part)
    return found
