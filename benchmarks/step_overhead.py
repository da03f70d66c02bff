"""What the training loop costs beyond a bare forward + backward + optimizer step.

    python benchmarks/step_overhead.py --config configs/demo_qwen_edit.yaml [--a.b overrides]

Runs the real loop (loader, noise, clipping, schedule, metrics, log lines) and bare steps of the
same model on one of its batches in turn, and prints the ratio of the medians: one process, one
run, so the machine's speed cancels out. All samples must have one shape (the demo's square ones
are taken).
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
    bare_optimizer = torch.optim.AdamW(trainer.trainable(), **trainer.config.optimizer.init_args)
    run_log = RunLog(accelerator, folder, trainer.config, 0)

    def bare_block():
        for _ in range(STEPS):
            trainer._compute_loss(batch).mean().backward()
            bare_optimizer.step()
            bare_optimizer.zero_grad(set_to_none=True)

    def loop_block():
        part = itertools.islice(loader, STEPS)
        with StopSignal() as stop:
            script.train_loop(trainer, part, run_log, stop)

    seconds = {bare_block: [], loop_block: []}
    for number in range(BLOCKS + 1):
        for block, times in seconds.items():
            started = time.perf_counter()
            block()
            if trainer.device.type == "cuda":
                torch.cuda.synchronize(trainer.device)
            times += [time.perf_counter() - started] if number else []  # the first one warms up
    bare, loop = (statistics.median(times) / STEPS * 1e3 for times in seconds.values())
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    print(f"batch {tuple(batch['pixel_latent'].shape)}, {len(SQUARE)} pairs, {trainer.device}")
    print(f"bare {bare:.2f} ms/step, loop {loop:.2f} ms/step")
    print(f"ratio {statistics.median(ratios):.3f} (blocks {min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    run_script(main)
