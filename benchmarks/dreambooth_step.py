"""What a step of Stable Diffusion 1.5 costs: the loop against bare steps, and seconds in full size.

    python benchmarks/dreambooth_step.py --config configs/demo_dreambooth.yaml [--a value overrides]
    python benchmarks/dreambooth_step.py --full [--mixed_precision bf16] [--compile]

The first form runs the real loop (draws, noise, losses, log lines, metrics) and bare steps of the
same fused batch (forward, backward, AdamW) in turn, in one process, and prints the ratio of the
medians. The second one trains a few steps of the full UNet with random weights on 512 px latents,
at batch 1 and 4, and prints seconds a step; DreamBooth LoRA at batch 1 is published with 0.18 s.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import torch
import torch.nn.functional as F

import train_dreambooth_pairs as script
from utils import MetricLog, StopSignal, load_config, run_script

BLOCKS, STEPS = 5, 100
SCHEDULER = {
    "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "steps_offset": 1, "set_alpha_to_one": False,
    "skip_prk_steps": True, "num_train_timesteps": 1000, "prediction_type": "epsilon",
}  # fmt: skip


def quiet(trainer):
    """The loop without saves and pictures: they are not what a step costs."""
    trainer.save_checkpoint = trainer.validate = lambda: None
    return trainer


def bare_steps(trainer, count):
    """`count` steps of one fixed fused batch, with nothing around them."""
    config, unet = trainer.config, trainer.models["unet"]
    turns = script.draw_turns(config, 0, trainer.scenes, trainer.batches)
    t = torch.tensor([script.draw_timestep(config, turn.visit) for turn in turns])
    noised, _ = trainer.noised(turns, t)
    terms = script.OBJECTIVES[config.objective](noised)
    noisy, target = (torch.cat([term[k] for term in terms]) for k in (1, 2))
    times, lanes = t.to(trainer.device).repeat(len(terms)), [term.lane for term in terms]
    embeds = trainer.entry(config.instance_prompt)["embed"].to(trainer.device)[None]
    fused = trainer.device.type == "cuda"
    optimizer = torch.optim.AdamW(trainer.trained, lr=1e-9, fused=fused)
    sides = torch.cat([noised.high, noised.low])
    for _ in range(count):
        if config.objective == "difference":
            noised.base(sides)  # its target is a pass of the base model
        F.mse_loss(trainer.predict(unet, noisy, times, embeds, lanes), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def compare(argv):
    """The ratio of the loop to bare steps."""
    folder = Path(tempfile.mkdtemp())
    argv = [*argv, "--output_dir", str(folder), "--max_train_steps", str(STEPS)]
    config = load_config(script.Config, script.repeat_flags(argv), script.audit)
    trainer = quiet(script.DreamBoothPairsTrainer(config))
    trainer.cache_embeddings()
    trainer.load_models()
    metrics = MetricLog(folder / "metrics.jsonl", 0)

    def loop_block():
        trainer.step = 0
        with StopSignal() as stop:
            trainer._loop(stop, metrics)

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
    print(f"{config.objective}, batch {config.train_batch_size}, {trainer.device}")
    print(f"bare {bare:.2f} ms/step, loop {loop:.2f} ms/step")
    print(f"ratio {statistics.median(ratios):.3f} (blocks {min(ratios):.3f} to {max(ratios):.3f})")


def write_checkpoint(folder):
    """The UNet of Stable Diffusion 1.5 with random weights, its scheduler, no encoders."""
    import diffusers

    unet = diffusers.UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8,
        block_out_channels=(320, 640, 1280, 1280),
    )  # fmt: skip
    unet.save_pretrained(folder / "unet")
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULER))


class RandomData(script.DreamBoothPairsTrainer):
    """Latents and text of the true shapes, without pictures and encoders."""

    def noised(self, turns, t):
        low, high, noise = torch.randn(3, len(turns), 4, 64, 64, device=self.device)
        alphas = self.alphas[t].to(self.device)
        ones = torch.ones(len(turns), device=self.device)
        sides = (script.add_noise_sd(x, noise, alphas) for x in (low, high))
        return script.Noised(*sides, -ones, ones, noise, lambda x: x), None

    def embeds(self, prompts, lanes, models):
        return torch.randn(len(prompts), 77, 768, device=self.device, dtype=self.dtype)


def full_size(argv):
    """Seconds a step and peak memory at batch 1 and 4, of single pictures and of pairs."""
    with tempfile.TemporaryDirectory() as place:
        write_checkpoint(Path(place))
        print("objective  batch   s/step  peak GB", flush=True)
        for objective in ("instance", "slider"):
            for batch in (1, 4):
                given = ["--pretrained_model_name_or_path", place, "--train_batch_size", str(batch)]
                given += ["--use_image_pairs"] if objective == "slider" else []
                given += ["--max_train_steps", "20", *argv]
                trainer = RandomData(load_config(script.Config, given))
                trainer.setup_accelerator()
                trainer.load_models()
                turns = [script.Turn(n, 0, 0, 1, False) for n in range(batch)]
                seconds = []
                for step in range(20):
                    started = time.perf_counter()
                    losses = trainer.training_loss(turns)
                    trainer.accelerator.backward(torch.stack(list(losses.values())).sum())
                    trainer.optimizer.step()
                    trainer.optimizer.zero_grad(set_to_none=True)
                    if trainer.device.type == "cuda":
                        torch.cuda.synchronize(trainer.device)
                    seconds += [time.perf_counter() - started] if step > 4 else []
                gb = script.memory_gb(trainer.device)
                print(
                    f"{objective:10} {batch:5} {statistics.median(seconds):8.4f} {gb:8.2f}",
                    flush=True,
                )


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--full", action="store_true")
    args, overrides = parser.parse_known_args()
    full_size(overrides) if args.full else compare(overrides)


if __name__ == "__main__":
    run_script(main)
