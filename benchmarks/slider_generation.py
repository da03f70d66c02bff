"""What a strip costs against its pictures drawn one by one.

    python benchmarks/slider_generation.py --pretrained_model_name_or_path DIR --lora FILE \\
        [--scales 0,0.2,0.4,0.6,0.8,1 --skip 14 --num_inference_steps 28 ...]

All flags of generate.py's strips. Draws the strip, then every picture alone, in turn, in one
process (loading counts for neither), and prints the ratio of the medians and of the samples that
the transformer saw.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import generate
from utils import load_config, run_script

ROUNDS = 7
SCALES = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


def seconds(draw):
    start = time.perf_counter()
    draw()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    argv = ["--output", "strip.png", *sys.argv[1:]]  # nothing is written
    config = load_config(generate.StripConfig, argv, generate.check_sliders)
    strip = generate.plan_strips(config)[0][0]
    positions = config.scales or SCALES
    painter = generate.Painter(config, [strip.prompt])
    samples = []
    painter.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: samples.append(len(kwargs["hidden_states"])), with_kwargs=True
    )

    def together():
        painter.draw(strip, positions)

    def alone():
        for position in positions:
            painter.draw(strip, [position])

    counts, times = [], {together: [], alone: []}
    for draw in (together, alone):  # warm up, and count
        samples.clear()
        draw()
        counts.append(sum(samples))
    for _ in range(ROUNDS):
        for draw, taken in times.items():
            taken.append(seconds(draw))
    one, many = (statistics.median(taken) for taken in times.values())
    print(f"{len(positions)} scales, skip {config.skip} of {config.num_inference_steps}")
    print(f"strip {one:.3f} s, {counts[0]} samples; alone {many:.3f} s, {counts[1]} samples")
    print(f"ratio {one / many:.3f} (samples {counts[0] / counts[1]:.3f})")


if __name__ == "__main__":
    run_script(main)
