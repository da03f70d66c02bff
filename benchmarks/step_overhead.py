"""What the training loop costs beyond a bare forward + backward + optimizer step.

    python benchmarks/step_overhead.py --config configs/demo_qwen_edit.yaml [--a.b overrides]

Runs the real loop (loader, noise, clipping, schedule, metrics, log lines) and bare steps of the
same model on one of its batches in turn. In both, the whole time is divided by the time inside
forward pass, backward pass and optimizer of the same steps, so that the machine's speed cancels
out; printed is the loop's quotient over the bare step's. On a GPU each of the three is waited for.
All samples must have one shape (the demo's square ones are taken).
"""

import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch

import train_qwen_edit as script
from utils import RunLog, StopSignal, load_config, run_script

BLOCKS, STEPS = 8, 60  # long blocks: a run opens its progress bar once, not every 20 steps
SQUARE = ("astronaut3", "chelsea0", "coffee0", "hubble0")


def square_pairs(folder):
    """The pairs of one shape, in a folder of their own."""
    for name in SQUARE:
        for file in (ROOT / "data" / "photo_pairs").glob(f"{name}_*"):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def main():
    folder = Path(tempfile.mkdtemp())
    (folder / "data").mkdir()
    argv = [*sys.argv[1:], "--logging.output_dir", str(folder / "out"), "--cache.cache_dir"]
    argv += [
        str(folder / "cache"),
        "--validation.steps",
        "null",
        "--train.max_train_steps",
        "99999",
    ]
    argv += ["--data.dataset_configs.0.train_data_dir", str(square_pairs(folder / "data"))]
    argv += ["--data.dataset_configs.0.holdout", "[]", "--train.checkpointing_steps", "99999"]
    trainer = script.QwenImageEditTrainer(load_config(script.Config, argv, script.audit))
    trainer.cache_embeddings()
    trainer.set_lora()
    trainer.configure_optimizers()
    accelerator = trainer.accelerator
    trainer.transformer, trainer.optimizer = accelerator.prepare(
        trainer.transformer, trainer.optimizer
    )
    loader = iter(trainer.train_dataloader())
    [batch] = next(loader)
    batch = trainer.to_device(batch)
    run_log = RunLog(accelerator, folder, trainer.config, 0)
    inside = 0.0  # seconds in forward, backward and optimizer

    def wait():
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        return time.perf_counter()

    def timed(function):
        def call(*args, **kwargs):
            nonlocal inside
            started = wait()
            try:
                return function(*args, **kwargs)
            finally:
                inside += wait() - started

        return call

    trainer._compute_loss = timed(trainer._compute_loss)
    accelerator.backward = timed(accelerator.backward)
    optimizer = trainer.optimizer.optimizer
    optimizer.step = timed(optimizer.step)

    def bare_block():
        for _ in range(STEPS):
            accelerator.backward(trainer._compute_loss(batch).mean())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def loop_block():
        part = itertools.islice(loader, STEPS)
        with StopSignal() as stop:
            script.train_loop(trainer, part, run_log, stop)

    ratios = {bare_block: [], loop_block: []}
    whole_ms = {bare_block: [], loop_block: []}
    for number in range(BLOCKS + 1):
        for block, found in ratios.items():
            inside, started = 0.0, wait()
            block()
            whole = wait() - started
            found += [whole / inside] if number else []  # the first one warms up
            whole_ms[block] += [whole / STEPS * 1e3] if number else []
    bare, loop = (statistics.median(found) for found in ratios.values())
    both = [b / a for a, b in zip(*ratios.values(), strict=True)]
    print(f"batch {tuple(batch['pixel_latent'].shape)}, {len(SQUARE)} pairs, {trainer.device}")
    bare_ms, loop_ms = (statistics.median(times) for times in whole_ms.values())
    print(f"bare {bare_ms:.2f} ms/step, {bare:.4f} of its inside")
    print(f"loop {loop_ms:.2f} ms/step, {loop:.4f} of its inside")
    print(f"ratio {statistics.median(both):.4f} (blocks {min(both):.4f} to {max(both):.4f})")


if __name__ == "__main__":
    run_script(main)
