"""What a PairEdit step costs: the loop against bare fused steps, and each precision in full size.

    python benchmarks/pairedit_step.py --config configs/demo_pairedit.yaml [--a value overrides]
    python benchmarks/pairedit_step.py --full [--precision no_change int8-quanto ...]

The first form runs the real loop (draws, noise, losses, log lines, metrics) and bare steps of the
same fused batch (forward, backward, AdamW) in turn, in one process, and prints the ratio of the
medians. The second one trains a few steps of FLUX.1-dev with random weights (24 GB of disk) on
512 px pairs and prints seconds a step and peak memory; every precision is a process of its own.
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
import torch.nn.functional as F

import train_pairedit as script
from utils import RunLog, StopSignal, load_config, run_script

BLOCKS, STEPS = 5, 100
PRECISIONS = ("no_change", "int8-quanto", "fp8-quanto", "nf4-bnb")
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "base_image_seq_len": 256,
    "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0,
    "use_dynamic_shifting": True,
}  # fmt: skip


def bare_steps(trainer, count):
    """`count` steps of one fixed fused batch, with nothing around them."""
    samples, batch = script.next_batch(trainer)
    passes = script.LOSSES[trainer.config.python_name](batch)
    noisy = torch.cat([part.noisy for part in passes])
    target = torch.cat([part.target for part in passes])
    sigmas, parts = batch.sigma.flatten().repeat(len(passes)), [part.active for part in passes]
    text = trainer.texts[trainer.prompts[0]]
    predict = trainer.predictor(text, samples[0].size, trainer.transformer)
    optimizer = torch.optim.AdamW(trainer.trained, lr=1e-9)
    for _ in range(count):
        F.mse_loss(predict(noisy, sigmas, parts), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def compare(argv):
    """The ratio of the loop to bare steps."""
    folder = Path(tempfile.mkdtemp())
    argv = [*argv, "--output_folder", str(folder), "--train_iteration", str(STEPS)]
    config = load_config(script.Config, argv, script.audit)
    # saves and previews are not what a step costs
    script.save_run = script.validate = lambda *args: None
    trainer = script.PairEditTrainer(config)
    trainer.setup_accelerator()
    trainer.find_data()
    trainer.cache_embeddings()
    trainer.start_run(script.all_runs(config)[0])
    run_log = RunLog(trainer.accelerator, folder, config, 0)

    def loop_block():
        trainer.global_step = 0
        with StopSignal() as stop:
            script.train_loop(trainer, run_log, stop)

    blocks = {"bare": lambda: bare_steps(trainer, STEPS), "loop": loop_block}
    seconds = {name: [] for name in blocks}
    # on a CPU its own time: other processes would blur the ratio
    clock = time.perf_counter if trainer.device.type == "cuda" else time.process_time
    for number in range(BLOCKS + 1):
        for name, block in blocks.items():
            started = clock()
            block()
            if trainer.device.type == "cuda":
                torch.cuda.synchronize(trainer.device)
            seconds[name] += [clock() - started] if number else []  # 0 warms up
    bare, loop = (statistics.median(times) / STEPS * 1e3 for times in seconds.values())
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    print(f"{config.python_name}, {len(trainer.samples)} pairs, {trainer.device}")
    print(f"bare {bare:.2f} ms/step, loop {loop:.2f} ms/step")
    print(f"ratio {statistics.median(ratios):.3f} (blocks {min(ratios):.3f} to {max(ratios):.3f})")


def write_checkpoint(folder):
    """FLUX.1-dev's transformer with random weights in bf16, its scheduler, no encoders."""
    import diffusers
    from accelerate.utils import set_seed

    set_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = diffusers.FluxTransformer2DModel(**script.PUBLISHED_TRANSFORMER)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "transformer", max_shard_size="2GB")
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [1] * 4}))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))


def measure(folder, precision, overrides):
    """Train a few steps in full size in this process -> seconds a step, peak GB."""
    argv = ["--pretrained_model_name_or_path", str(folder), "--base_model_precision", precision]
    config = load_config(script.Config, [*argv, "--train_iteration", "8", *overrides])
    trainer = script.PairEditTrainer(config)
    trainer.setup_accelerator()
    text = {"embed": torch.randn(1, 512, 4096), "pooled": torch.randn(1, 768)}
    trainer.cached = lambda job: {k: x.to(trainer.dtype) for k, x in text.items()}
    trainer.folder = folder
    sample = script.Sample("random", (), (512, 512))
    trainer.data = {name: [sample] for name in config.datasets}
    started = time.perf_counter()
    trainer.start_run(script.all_runs(config)[0])
    load_s = time.perf_counter() - started
    trainer.tokens = {sample: torch.randn(2, 1024, 64)}
    seconds = []
    for step in range(config.train_iteration):
        started = time.perf_counter()
        _, losses = script.train_step(trainer)
        assert torch.isfinite(losses["loss"])  # waits for the GPU
        seconds += [time.perf_counter() - started] if step > 2 else []
    gb = script.utils.memory_gb(trainer.device)
    return {"load_s": load_s, "s": statistics.median(seconds), "gb": gb}


def full_size(precisions, overrides):
    """A table: a line per precision."""
    with tempfile.TemporaryDirectory() as place:
        write_checkpoint(Path(place))
        print("precision     load s   s/step  500 steps, min  peak GB", flush=True)
        for precision in precisions:
            command = [sys.executable, __file__, "--measure", place, "--precision", precision]
            done = subprocess.run([*command, *overrides], capture_output=True, text=True)
            if done.returncode:
                print(f"{precision:12} {(done.stderr.strip().splitlines() or ['?'])[-1]}")
                continue
            now = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{precision:12} {now['load_s']:7.1f} {now['s']:8.3f} {now['s'] * 500 / 60:15.1f} "
                f"{now['gb']:8.2f}",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--precision", nargs="*", default=PRECISIONS)
    parser.add_argument("--measure", help="(used by the script itself)")
    args, overrides = parser.parse_known_args()
    if args.measure:
        print(json.dumps(measure(Path(args.measure), args.precision[0], overrides)))
    elif args.full:
        full_size(args.precision, overrides)
    else:
        compare(overrides)


if __name__ == "__main__":
    run_script(main)
