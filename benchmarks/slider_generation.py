"""What a strip costs against its pictures drawn one by one.

    python benchmarks/slider_generation.py --config configs/demo_pairedit.yaml [--a value overrides]

Takes scales, skips and num_inference_steps of a config of train_pairedit.py, and an adapter as it
starts (its values cost nothing). Draws the strip, then every picture alone, in turn, in one process
(loading and the VAE count for neither), and prints the ratio of the medians and of the samples that
the transformer saw.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import train_pairedit as script
from utils import load_config, run_script

ROUNDS = 7


def seconds(draw, device):
    start = time.perf_counter()
    draw()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    argv = [*sys.argv[1:], "--output_folder", tempfile.mkdtemp()]
    config = load_config(script.Config, argv, script.audit)
    trainer = script.PairEditTrainer(config)
    trainer.setup_accelerator()
    trainer.find_data()
    trainer.cache_embeddings()
    trainer.start_run(script.all_runs(config)[0])
    size, skip, positions = (config.resolution, config.resolution), config.skips[0], config.scales
    predict = trainer.predictor(trainer.texts[trainer.prompts[0]], size)
    channels = trainer.bare.config.in_channels // 4
    noise = script.first_noise(0, channels, trainer.grid(size), trainer.dtype, trainer.device)
    slider = script.Slider(script.adapters_of(config.python_name)[-1], start=skip + 1)
    sigmas, samples = trainer.sigmas(size).tolist(), []
    trainer.bare.register_forward_pre_hook(
        lambda module, args, kwargs: samples.append(len(kwargs["hidden_states"])), with_kwargs=True
    )

    @torch.no_grad()
    def together():
        script.draw_strip(predict, noise, sigmas, positions, [slider])

    @torch.no_grad()
    def alone():
        for position in positions:
            script.draw_strip(predict, noise, sigmas, [position], [slider])

    counts, times = [], {together: [], alone: []}
    for draw in (together, alone):  # warm up, and count
        samples.clear()
        draw()
        counts.append(sum(samples))
    for _ in range(ROUNDS):
        for draw, taken in times.items():
            taken.append(seconds(draw, trainer.device))
    one, many = (statistics.median(taken) for taken in times.values())
    print(f"{len(positions)} scales, skip {skip} of {config.num_inference_steps}")
    print(f"strip {one:.3f} s, {counts[0]} samples; alone {many:.3f} s, {counts[1]} samples")
    print(f"ratio {one / many:.3f} (samples {counts[0] / counts[1]:.3f})")


if __name__ == "__main__":
    run_script(main)
