"""Time of k noise levels per sample of Qwen-Image-2.1 beside k visits, random weights.

    python benchmarks/noise_levels.py [--blocks 4] [--width 512] [--side 512] [--repeats 5]

The loss and its gradients as the trainer computes them, with gradient checkpointing off and on:
one pass over text and references for k targets, against k passes. Ratios of medians in one run;
computed: the same ratio of operations, of --plan at full size (1024 px, references of 1 MP).
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import diffusers
import torch
from accelerate import Accelerator

import train_qwen_edit as script
from utils import load_tool

plan = load_tool("plan")
TEXT = 60


def batch_of(k, references, side, width):
    """A batch of one sample with k noise levels, latents random."""
    tokens = side // 32 * (side // 32)
    slots = torch.zeros(1, TEXT + references * tokens, 1)
    for number in range(references):
        start = 5 + number * (tokens + 5)
        slots[:, start : start + tokens] = 1
    latent = (1, 64, 1, side // 16, side // 16)
    levels = (k,) if k > 1 else ()
    return {
        "pixel_latent": torch.randn(latent),
        "control_latent": [torch.randn(latent) for _ in range(references)],
        "prompt_embed": torch.cat([torch.randn(1, slots.shape[1], width), slots], -1),
        "noise": torch.randn(*levels, *latent),
        "sigma": torch.rand(*levels, 1) * 0.8 + 0.1,
    }


def seconds(trainer, batches):
    """Time of the loss of each batch and its gradients."""
    start = time.process_time()
    for batch in batches:
        script.compute_loss(trainer, batch, shift=False).mean().backward()
    return time.process_time() - start


def computed(k, references):
    """The ratio of operations at full size."""
    config = script.Config.model_validate({"loss": {"noise_levels_per_sample": k}})
    one = script.Config.model_validate({"loss": {"noise_levels_per_sample": 1}})
    load = plan.Load(((1024, 1024),) * (1 + references), TEXT, 1)
    with torch.device("meta"):
        full = diffusers.QwenImage21Transformer2DModel()
    together, alone = (
        plan.qwen_step_tflop(c, full, *plan.sample_tokens(c, full, load)) for c in (config, one)
    )
    return together / (k * alone)


def main():
    """Print a row for each k, number of references, and checkpointing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("blocks", 4), ("width", 512), ("side", 512), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # CPU seconds, whatever else the machine does
    heads = args.width // 64
    transformer = diffusers.QwenImage21Transformer2DModel(
        num_layers=args.blocks,
        num_attention_heads=heads,
        attention_head_dim=64,
        context_in_dim=args.width,
        axes_dims_rope=(8, 28, 28),
    )
    script.add_lora(transformer, script.LoraConfig(), 0)
    flavour = script.PUBLISHED["Qwen/Qwen-Image-2.1"]
    parts = {"transformer": transformer, "flavour": flavour, "accelerator": Accelerator(cpu=True)}
    trainer = SimpleNamespace(config=SimpleNamespace(loss=script.LossConfig()), **parts)
    print("| references | checkpointing | k | s, k levels / s, k visits | computed, full size |")
    print("|---|---|---|---|---|")
    for references in (1, 2):
        for again in (False, True):
            transformer.train()
            transformer.gradient_checkpointing = False
            if again:
                transformer.enable_gradient_checkpointing()
            single = batch_of(1, references, args.side, args.width)
            for k in (2, 4):
                several = batch_of(k, references, args.side, args.width)
                times = [
                    (seconds(trainer, [several]), seconds(trainer, [single] * k))
                    for _ in range(args.repeats + 1)
                ][1:]
                together, alone = (statistics.median(column) for column in zip(*times, strict=True))
                ratio = f"{together:.2f} / {alone:.2f} = {together / alone:.2f}"
                row = (references, "on" if again else "off", k, ratio)
                print(
                    "|", " | ".join(map(str, row)), f"| {computed(k, references):.2f} |", flush=True
                )


if __name__ == "__main__":
    main()
