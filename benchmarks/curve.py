"""How many pairs, steps and rank an edit wants: skill on held-out pairs, as a table and a picture.

    python benchmarks/curve.py                                  # the demo's base and its edit
    python benchmarks/curve.py --config configs/qwen_edit_pairs.yaml --pairs 3 10 30 100 \\
        --ranks 16 32 --steps 500 1000 2000 --output_dir outputs/curve [--a.b overrides]

Trains a config once for each number of pairs and rank, at its learning rate, constant, and measures
the moving average of the weights at every number of steps. Skill: 1 - squared error / that of the
unchanged before, mean over the held-out pairs. Without --config: crops of the demo's photos.
"""

import argparse
import contextlib
import io
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

import demo
import train_qwen_edit as script
from utils import UserError, load_config, run_script, uniform

DEMO = ["--config", str(demo.ROOT / demo.CONFIG)]
DEMO += ["--model.pretrained_model_name_or_path", str(demo.ROOT / demo.BASE_DIR)]
DEMO += ["--data.dataset_configs.0.views=1", "--data.dataset_configs.0.view_scale=1"]
DEMO += ["--data.dataset_configs.0.resolution=160"]


def write_crops(folder, count, side_px=160, seed=0):
    """Write `count` square crops of the demo's photos, and one of each held-out photo, as pairs."""
    rng, source = np.random.RandomState(seed), demo.ROOT / demo.PAIRS_DIR
    trained = sorted({file.name[:-6] for file in source.glob("*_R.png")} - {*demo.HELD_OUT})
    wanted = [(trained[n % len(trained)], f"crop{n:03}") for n in range(count)]
    wanted += [(name, name) for name in demo.HELD_OUT]
    folder.mkdir(parents=True, exist_ok=True)
    for name, new in wanted:
        x, y = rng.rand(2)
        for end in "RT":
            with Image.open(next(source.glob(f"{name}_{end}.[pj][np]g"))) as picture:
                left, top = int(x * (picture.width - side_px)), int(y * (picture.height - side_px))
                crop = picture.convert("RGB").crop((left, top, left + side_px, top + side_px))
                crop.save(folder / f"{new}_{end}.png")
        (folder / f"{new}_T.txt").write_text((source / f"{name}_T.txt").read_text())


def read(argv, settings):
    """The checked config of these flags and settings {"a.b": value}."""
    texts = {n: v if isinstance(v, str) else json.dumps(v) for n, v in settings.items()}
    flags = (f"--{name}={text}" for name, text in texts.items())
    return load_config(script.Config, [*argv, *flags], check=script.audit)


def measure(trainer, names, folders):
    """Skill of the LoRA in each folder on the held-out pairs of these names."""
    trainer.setup_predict()
    examples = [trainer.data.resolve(script.Draw(0, n)) for n in trainer.data.held_out]
    examples = [example for example in examples if example.name in names]
    how, encode, skills = trainer.config.validation, trainer.through_cache, []
    for folder in folders:
        trainer.load_lora(folder / script.EMA_FILE)
        shares = []
        for example in examples:
            images = [script.load_picture(example.pictures[k][0]) for k in ("control", "pixel")]
            images.append(script.draw_edit(trainer, example, how, encode))
            before, after, edited = (np.asarray(image.convert("RGB"), float) for image in images)
            if before.shape != after.shape:
                raise UserError("set data.reference_area to target: skill compares pixels")
            shares.append(((edited - after) ** 2).sum() / ((before - after) ** 2).sum())
        skills.append(1 - float(np.mean(shares)))
    return skills


def draw(path, rows, steps):
    """Two panels: skill over pairs, a line for each rank; over steps, one for each number."""
    figure = Figure(figsize=(9, 3.4))
    left, right = figure.subplots(1, 2, sharey=True)
    ranks, pairs = ([*dict.fromkeys(row[n] for row in rows)] for n in (1, 0))
    for rank in ranks:
        best = [max(skills) for count, own, skills in rows if own == rank]
        left.plot(pairs, best, "o-", label=f"rank {rank}")
    for count in pairs:
        [skills] = [skills for own, rank, skills in rows if (own, rank) == (count, ranks[-1])]
        right.plot(steps, skills, "o-", label=f"{count} pairs")
    left.set(xscale="log", xlabel="pairs (best checkpoint)", ylabel="skill on held-out pairs")
    right.set(xlabel=f"steps (rank {ranks[-1]})", xscale="log")
    left.set_xticks(pairs, map(str, pairs))
    right.set_xticks(steps, map(str, steps))
    for panel in (left, right):
        panel.minorticks_off()
        panel.legend()
    figure.savefig(path, dpi=100, bbox_inches="tight")


def main():
    """Print a row for each number of pairs and rank; write curve.json and curve.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--pairs", type=int, nargs="+", default=[3, 10, 30, 100])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 100, 200, 400])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/curve"))
    args, argv = parser.parse_known_args()
    out = args.output_dir
    if "--config" not in argv:
        write_crops(out / "pairs", max(args.pairs))
        argv = [*DEMO, f"--data.dataset_configs.0.train_data_dir={out / 'pairs'}", *argv]
    run = {
        "cache.cache_dir": str(out / "cache"),
        "train.max_train_steps": max(args.steps),
        "train.checkpointing_steps": math.gcd(*args.steps),
        "train.checkpoints_total_limit": None,
        "train.use_ema": True,
        "lr_scheduler.scheduler_type": "constant",
        "validation.steps": None,
    }
    first = read(argv, run | {"logging.output_dir": str(out / "all")})
    flavour = script.detect_flavour(first.model.pretrained_model_name_or_path)
    data = script.find_samples(first, flavour)[0]
    held_out = [data.samples[n].name for n in data.held_out]
    names = sorted({sample.name for sample in data.samples} - {*held_out})
    names.sort(key=lambda name: uniform("curve", name))
    if len(names) < max(args.pairs):
        raise UserError(f"--pairs: the config's data has {len(names)} beside the held-out ones")
    rows = []
    print(f"| pairs | rank | {' | '.join(f'{n} steps' for n in args.steps)} |")
    print(f"|---|---|{'---|' * len(args.steps)}")
    for count in args.pairs:
        for rank in args.ranks:
            folder = out / f"{count}_pairs_rank_{rank}"
            kept = {"data.dataset_configs.0.holdout": held_out + names[count:]}
            kept |= {"model.lora.r": rank, "logging.output_dir": str(folder)}
            trainer = script.QwenImageEditTrainer(read(argv, run | kept))
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.fit()
            skills = measure(trainer, held_out, [folder / f"checkpoint-{n}" for n in args.steps])
            rows.append((count, rank, skills))
            shown = count, rank, *(f"{skill:.3f}" for skill in skills)
            print(f"| {' | '.join(map(str, shown))} |", flush=True)
    (out / "curve.json").write_text(json.dumps({"steps": args.steps, "rows": rows}))
    draw(out / "curve.png", rows, args.steps)
    print(f"picture: {out / 'curve.png'}")


if __name__ == "__main__":
    run_script(main)
