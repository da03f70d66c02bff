"""Seconds and peak memory of a training step in each precision, random weights.

    python benchmarks/train_step.py [--full] [--precision no_change int8-quanto ...]
                                    [--resolution 1024] [--reference 1024] [--a.b overrides]

The real trainer (loading, LoRA, loss, backward, clipping, optimizer), fed with random latents: a
target, one reference and 300 text tokens, batch 1. --full is the true 20-billion-parameter model
(41 GB of disk); without it two narrow blocks. Every precision is a process of its own. Reach: TFLOP
a step over the time; --plan counts the same.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import torch
from load_quantized import FULL, PRECISIONS, write_random_transformer

import train_qwen_edit as script
from utils import load_config, load_tool, memory_gb

plan = load_tool("plan")

SMALL = {"num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 64}
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "base_image_seq_len": 256,
    "max_image_seq_len": 8192, "base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02,
    "use_dynamic_shifting": True, "time_shift_type": "exponential",
}  # fmt: skip
TEXT, WARM_UP, STEPS = 300, 2, 5


def write_checkpoint(folder, settings):
    """A checkpoint folder with a random transformer, a scheduler, and no encoders."""
    write_random_transformer(folder / "transformer", settings)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    index = {"_class_name": "QwenImageEditPlusPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))


def random_batch(resolution, reference, width):
    """One sample on the CPU, as the loader gives it."""
    side, other = resolution // 8, reference // 8
    latents = [torch.randn(1, 16, 1, n, n, dtype=torch.bfloat16) for n in (side, other)]
    return {
        "pixel_latent": latents[0],
        "control_latent": [latents[1]],
        "prompt_embed": torch.randn(1, TEXT, width, dtype=torch.bfloat16),
        "noise": torch.randn(1, 16, 1, side, side),
        "sigma": torch.tensor([0.5]),
        "names": ["random"],
    }


def measure(folder, precision, resolution, reference, overrides):
    """Train a few steps in this process -> seconds a step, peak GB, TFLOP."""
    argv = ["--model.pretrained_model_name_or_path", str(folder), *overrides]
    argv += ["--model.base_model_precision", precision, "--train.max_train_steps", "99"]
    argv += ["--cache.cache_dir", str(folder / "cache"), "--logging.output_dir", str(folder / "o")]
    trainer = script.QwenImageEditTrainer(load_config(script.Config, argv))
    started = time.perf_counter()
    trainer.set_lora()
    load_s = time.perf_counter() - started
    trainer.configure_optimizers()
    width = trainer.transformer.config.joint_attention_dim
    trainer.transformer, trainer.optimizer = trainer.accelerator.prepare(
        trainer.transformer, trainer.optimizer
    )
    seconds = []
    for number in range(WARM_UP + STEPS):
        batch = random_batch(resolution, reference, width)
        started = time.perf_counter()
        _, losses = script.train_step(trainer, [batch])
        assert torch.isfinite(losses["loss"])  # waits for the GPU
        seconds += [time.perf_counter() - started] if number >= WARM_UP else []
    shape = ((resolution, resolution), (reference, reference))
    tokens = plan.Load(shape, TEXT, 1).tokens
    tflop = plan.qwen_step_tflop(trainer.config, trainer.bare_transformer(), tokens)
    return {
        "load_s": load_s,
        "s": statistics.median(seconds),
        "gb": memory_gb(trainer.device),
        "tflop": tflop,
        "tokens": tokens,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--precision", nargs="*", default=PRECISIONS)
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--reference", type=int, default=1024)
    parser.add_argument("--measure", help="(used by the script itself)")
    args, overrides = parser.parse_known_args()
    if args.measure:
        found = measure(
            Path(args.measure), args.precision[0], args.resolution, args.reference, overrides
        )
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as place:
        write_checkpoint(Path(place), FULL if args.full else SMALL)
        print("precision    tokens  load s   s/step  peak GB  TFLOP  TFLOP/s")
        for precision in args.precision:
            command = [sys.executable, __file__, "--precision", precision, "--measure", place]
            command += ["--resolution", str(args.resolution), "--reference", str(args.reference)]
            done = subprocess.run([*command, *overrides], capture_output=True, text=True)
            if done.returncode:
                print(f"{precision:12} {(done.stderr.strip().splitlines() or ['?'])[-1]}")
                continue
            now = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{precision:12} {now['tokens']:6} {now['load_s']:7.1f} {now['s']:8.3f} "
                f"{now['gb']:8.2f} {now['tflop']:6.2f} {now['tflop'] / now['s']:8.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
