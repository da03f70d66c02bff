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
from utils import RunLog, StopSignal, load_config, memory_gb, run_script

BLOCKS, STEPS = 5, 100
SCHEDULER = {
    "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "steps_offset": 1, "set_alpha_to_one": False,
    "skip_prk_steps": True, "num_train_timesteps": 1000, "prediction_type": "epsilon",
}  # fmt: skip


def bare_steps(trainer, count):
    """`count` steps of one fixed fused batch, with nothing around them."""
    config, unet = trainer.config, trainer.models["unet"]
    draws = script.draw_batch(trainer, 0)
    t = torch.tensor([script.draw_timestep(config, draw.visit) for draw in draws])
    noised, _ = script.noised_batch(trainer, draws, t)
    passes = script.OBJECTIVES[config.objective](noised)
    noisy, target = (torch.cat([x[k] for x in passes]) for k in (1, 2))
    times, parts = t.to(trainer.device).repeat(len(passes)), [x.active for x in passes]
    embeds = trainer.embeds([config.instance_prompt] * len(noisy), parts)
    optimizer = torch.optim.AdamW(trainer.trained, lr=1e-9, fused=trainer.device.type == "cuda")
    sides = torch.cat([noised.high, noised.low])
    for _ in range(count):
        if config.objective == "difference":
            noised.base(sides)  # its target is a pass of the base model
        trainer.switch.parts = parts
        F.mse_loss(script.predict_noise(unet, noisy, times, embeds), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def compare(argv):
    """The ratio of the loop to bare steps."""
    folder = Path(tempfile.mkdtemp())
    argv = [*argv, "--output_dir", str(folder), "--max_train_steps", str(STEPS)]
    config = load_config(script.Config, argv, script.audit)
    script.validate = lambda trainer: None  # saves and pictures are not what a step costs
    trainer = script.SDTrainer(config)
    trainer.save_checkpoint = lambda: None
    trainer.setup_accelerator()
    trainer.find_data()
    trainer.cache_embeddings()
    trainer.load_models()
    trainer.run_log = RunLog(trainer.accelerator, folder, config, 0)

    def loop_block():
        trainer.global_step = 0
        with StopSignal() as stop:
            script.train_loop(trainer, stop)

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


def random_batch(trainer, draws, t):
    """Latents of the true shapes, without pictures."""
    low, high, noise = torch.randn(3, len(draws), 4, 64, 64, device=trainer.device)
    alphas, ones = trainer.put(trainer.alphas[t]), torch.ones(len(draws), device=trainer.device)
    sides = (script.mix_noise(x, noise, alphas) for x in (low, high))
    return script.Noised(*sides, -ones, ones, noise, lambda x: x), None


def random_text(folder, prompts, dtype, device):
    """Text of the true shapes, without an encoder."""
    embeds = torch.randn(1, 77, 768, device=device, dtype=dtype)
    return {prompt: (torch.zeros(1, 77), embeds) for prompt in prompts}


def full_size(argv):
    """Seconds a step and peak memory at batch 1 and 4, of single pictures and of pairs."""
    with tempfile.TemporaryDirectory() as place:
        write_checkpoint(Path(place))
        script.noised_batch, script.encode_prompts = random_batch, random_text
        print("objective  batch   s/step  peak GB", flush=True)
        for objective in ("instance", "slider"):
            for batch in (1, 4):
                given = ["--pretrained_model_name_or_path", place, "--train_batch_size", str(batch)]
                sides = ["--use_image_pairs", "--before_data_dir", "a", "--after_data_dir", "b"]
                single = ["--instance_data_dir", "a", "--instance_prompt", "a photo"]
                given += sides if objective == "slider" else single
                given += ["--max_train_steps", "20", *argv]
                trainer = script.SDTrainer(load_config(script.Config, given))
                trainer.setup_accelerator()
                trainer.folder, trainer.samples = Path(place), [None] * batch
                trainer.load_models()
                draws = [script.Draw(n, None, 0, 1) for n in range(batch)]
                seconds = []
                for step in range(20):
                    started = time.perf_counter()
                    losses = script.compute_losses(trainer, draws)
                    trainer.accelerator.backward(torch.stack(list(losses.values())).sum())
                    trainer.optimizer.step()
                    trainer.optimizer.zero_grad(set_to_none=True)
                    if trainer.device.type == "cuda":
                        torch.cuda.synchronize(trainer.device)
                    seconds += [time.perf_counter() - started] if step > 4 else []
                gb = memory_gb(trainer.device)
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
