"""Tiny random checkpoints of the true classes, made offline in seconds."""

import json

import diffusers
import torch

import demo

KINDS = {
    "2508": "QwenImageEditPipeline",
    "2509": "QwenImageEditPlusPipeline",
    "2511": "QwenImageEditPlusPipeline",
}


def build_scheduler():
    """The values of the published checkpoints."""
    return diffusers.FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        max_image_seq_len=8192,
        base_shift=0.5,
        max_shift=0.9,
        shift_terminal=0.02,
        use_dynamic_shifting=True,
        time_shift_type="exponential",
    )


def build(kind, folder):
    """Save a pipeline of one kind ("2508", "2509", "2511") into `folder`."""
    torch.manual_seed(0)
    tokenizer = demo.build_tokenizer()
    processor = demo.build_processor(tokenizer)
    pipeline = getattr(diffusers, KINDS[kind])(
        scheduler=build_scheduler(),
        vae=demo.build_vae(),
        text_encoder=demo.build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        processor=processor,
        transformer=demo.build_transformer(
            zero_cond_t=kind == "2511", layers=2, heads=2, head_dim=32
        ),
    )
    pipeline.save_pretrained(folder)
    demo.save_processor(processor, folder / "processor")  # as on the Hub
    index = json.loads((folder / "model_index.json").read_text())
    index["processor"] = ["transformers", "Qwen2VLProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def build_all(folder):
    """{"2508" | "2509" | "2511": folder}; made once, whichever test process comes first."""
    found = {}
    for kind in KINDS:
        found[kind] = folder / kind
        if not found[kind].exists():
            part = folder / f"{kind}.{id(found)}"
            build(kind, part)
            if not found[kind].exists():
                part.rename(found[kind])
    return found
