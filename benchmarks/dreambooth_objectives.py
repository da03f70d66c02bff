"""What each pair objective learns from 1, 10 and 100 pairs, on the demo's faces.

    python benchmarks/dreambooth_objectives.py [--pairs 1 10 100] [--steps 100 300 1000]
        [--objectives slider difference copier joint after-only] [--output docs/x.png]

Trains with the settings of configs/demo_dreambooth.yaml at a constant rate, one pair a step, and
measures at each number of steps (copier, whose halves differ, is trained anew for each). Seeds:
change of the hair at scale 1 as a share of the pairs' change, change of the rest (demo/rebuild.py),
rank correlation over scales -1 to 1, means over 8. Photos, edited at scale 1: the share of the true
change that arrives, and the squared error to the true after as a share of the before's own, over 8.
Prints the table of docs/train_dreambooth_pairs.md and draws its picture.
"""

import argparse
import contextlib
import io
import logging
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import demo
from utils import load_config, load_script

rebuild = load_script(ROOT / "demo/rebuild.py")
FORK = tempfile.TemporaryDirectory()  # the trainer with the objective `copier`
files = [f"{FORK.name}/fork.py", "train_dreambooth_pairs.py", "experiments/dreambooth_copier.patch"]
subprocess.run(["patch", "-s", "-o", *files], cwd=ROOT, check=True)
script = load_script(Path(FORK.name) / "fork.py")

OBJECTIVES = ("slider", "difference", "copier", "joint", "after-only")
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#7f7f7f")
MEASURES = {  # figure: (head of its column, title in the picture, most shown)
    "gain": ("hair, of the pairs' change", "new seeds: hair moved", 2.0),
    "content": ("the rest", "new seeds: the rest moved", 0.1),
    "rank": ("rank correlation", "", 1.0),
    "photo_gain": ("photos: of the change", "photos: change that arrives", 2.0),
    "photo_error": ("photos: error left", "photos: error left", 2.0),
}
SHOWN = ("gain", "content", "photo_error")


class Recorder(script.SDTrainer):
    """Keeps the LoRA, as it would be saved at the end, of every checkpoint that is wanted."""

    steps = ()

    def save_checkpoint(self):
        if self.global_step in self.steps:
            script.save_result(self, calibrated=True)
            folder = self.config.output_dir
            shutil.copy(folder / script.LORA_FILE, folder / f"{self.global_step}.safetensors")


def train(objective, pairs, steps, folder):
    """{steps: LoRA file} of one run, checked at all of `steps`."""
    alone = objective == "after-only"
    flags = {
        "output_dir": folder / "lora", "cache_dir": folder.parent / "cache",
        "pretrained_model_name_or_path": ROOT / demo.SD_BASE_DIR, "train_batch_size": 1,
        "use_image_pairs": not alone, "lr_scheduler": "constant", "max_train_steps": max(steps),
        "before_data_dir": "null" if alone else pairs / "before",
        "after_data_dir": "null" if alone else pairs / "after",
        "instance_data_dir": pairs / "after" if alone else "null",
        "pair_objective": "slider" if alone else objective,
        "checkpointing_steps": math.gcd(*steps), "logging_steps": max(steps),
    }  # fmt: skip
    argv = [f"--{name}={value}" for name, value in flags.items()]
    config = load_config(script.Config, ["--config", str(ROOT / demo.HAIR_CONFIG), *argv])
    trainer = Recorder(config)
    trainer.steps = steps
    trainer.fit()
    return {n: folder / "lora" / f"{n}.safetensors" for n in steps}


def draw(**settings):
    """generate.py's pictures."""
    settings |= {"pretrained_model_name_or_path": ROOT / demo.SD_BASE_DIR}
    settings |= {"resolution": rebuild.FACE_PX, "num_inference_steps": 25, "guidance_scale": 1}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, str(ROOT / "generate.py"), *flags]
    subprocess.run(command, check=True, capture_output=True)


def measure_strip(strip):
    """Against scale 0: change of age, and mean absolute change outside the hair, by scale."""
    place = rebuild.from_centre(strip[0.0])
    ages = [rebuild.face_age(strip[scale], place) for scale in sorted(strip)]
    return {
        "age_change": [age - rebuild.face_age(strip[0.0], place) for age in ages],
        "content_change": [
            rebuild.content_change(strip[0.0], strip[scale], place) for scale in sorted(strip)
        ],
    }


def rank_correlation(a, b):
    """Spearman's, of values without ties."""
    return float(np.corrcoef(np.argsort(np.argsort([a, b])))[0, 1])


def measure(lora, held_out, folder):
    """The figures of MEASURES."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    scales, seeds = demo.HAIR_SCALES, range(demo.HAIR_COUNT)
    settings = {"lora": lora, "prompt": demo.HAIR_PROMPT}
    both = {"scales": demo.joined(scales), "seed": demo.joined(seeds)}
    draw(**settings, **both, output=folder / "s.png")
    draw(**settings, scales="0,1", input_dir=held_out / "before", output_dir=folder)

    def read(path):
        return np.asarray(Image.open(path).convert("RGB"), float) / 255

    strips = [{s: read(folder / f"s_seed{n}_scale{s:g}.png") for s in scales} for n in seeds]
    rows = [measure_strip(strip) for strip in strips]
    age, content = (np.mean([row[key] for row in rows], axis=0) for key in rows[0])
    errors = []
    for n in seeds:
        before, after = (read(held_out / stage / f"{n}.png") for stage in rebuild.HAIR_AGES)
        same, edit = (read(folder / f"{n}_scale{s}.png") for s in (0, 1))
        change = after - before
        gain = ((edit - same) * change).sum() / (change**2).sum()
        errors.append((gain, ((edit - after) ** 2).mean(), (change**2).mean()))
    gain, error, most = np.mean(errors, axis=0)
    pair = rebuild.HAIR_AGES["after"] - rebuild.HAIR_AGES["before"]
    rank = rank_correlation(scales, age)
    found = (age[-1] / pair, content[-1], rank, gain, error / most)
    return dict(zip(MEASURES, map(float, found), strict=True))


def chart(found, pairs, steps, objectives):
    """A column per number of pairs, a row per figure of SHOWN, a line per objective."""
    font, wide, high, left, head = ImageFont.load_default(size=14), 260, 170, 50, 30
    size = left + (wide + left) * len(pairs), 2 * head + (high + 2 * head) * len(SHOWN)
    image = Image.new("RGB", size, "white")
    ink = ImageDraw.Draw(image)
    for k, name in enumerate(objectives):
        colour = COLOURS[OBJECTIVES.index(name)]
        ink.text((left + 110 * k, 8), name, colour, font)
    for row, key in enumerate(SHOWN):
        most = MEASURES[key][2]
        for column, count in enumerate(pairs):
            x0, y0 = left + column * (wide + left), 2 * head + row * (high + 2 * head)
            ink.text((x0, y0 - 20), f"{MEASURES[key][1]}, {count} pair(s)", "black", font)
            ink.rectangle((x0, y0, x0 + wide, y0 + high), outline="lightgray")
            ink.text((x0 - 30, y0 - 4), f"{most:g}", "gray", font)
            ink.text((x0 - 12, y0 + high - 12), "0", "gray", font)
            places = [x0 + 20 + (wide - 40) * k / max(1, len(steps) - 1) for k in range(len(steps))]
            for x, n in zip(places, steps, strict=True):
                ink.text((x - 10, y0 + high + 3), str(n), "gray", font)
            for name in objectives:
                values = [found[name, count, n][key] for n in steps]
                heights = [y0 + high * (1 - min(max(v / most, 0), 1)) for v in values]
                points = [*zip(places, heights, strict=True)]
                colour = COLOURS[OBJECTIVES.index(name)]
                ink.line(points, colour, 3)
                for x, y in points:
                    ink.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
    return image


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/dreambooth_objectives.png")
    args = parser.parse_args()
    logging.getLogger().setLevel(logging.WARNING)
    torch.set_num_threads(1)
    found = {}
    print("| pairs | objective | steps |", *(f"{head} |" for head, *_ in MEASURES.values()))
    print("|---" * (3 + len(MEASURES)) + "|")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rebuild.draw_face_pairs(folder / "held_out", 7, 8, rebuild.HAIR_AGES)
        for count in args.pairs:
            pairs = folder / str(count)
            rebuild.draw_face_pairs(pairs, 1, count, rebuild.HAIR_AGES)
            for name in args.objectives:
                runs = [[n] for n in args.steps] if name == "copier" else [args.steps]
                for steps in runs:
                    run = folder / f"{name}-{count}-{steps[-1]}"
                    with contextlib.redirect_stdout(io.StringIO()):
                        files = train(name, pairs, steps, run)
                    for n, file in files.items():
                        with contextlib.redirect_stdout(io.StringIO()):
                            row = measure(file, folder / "held_out", folder / "drawn")
                        found[name, count, n] = row
                        cells = " | ".join(f"{value:.3f}" for value in row.values())
                        print(f"| {count} | `{name}` | {n} | {cells} |", flush=True)
    chart(found, args.pairs, args.steps, args.objectives).save(args.output)


if __name__ == "__main__":
    main()
