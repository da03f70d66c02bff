"""How many pairs, steps and rank an edit wants: skill on held-out pairs, as a table and a picture.

    python benchmarks/curve.py                                  # the demo's base and its edit
    python benchmarks/curve.py --config configs/qwen_edit_pairs.yaml --pairs 3 10 30 100 \\
        --ranks 16 32 --steps 500 1000 2000 --output_dir outputs/curve [--a.b overrides]

Trains a config once for each number of pairs and rank, at its learning rate, constant, and
measures the checkpoints. Skill: 1 - squared error / that of the unchanged before, mean over the
config's held-out pairs. Without --config the pairs are crops of the demo's ten photos.
"""

import argparse
import contextlib
import io
import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
from PIL import Image

import demo
import train_qwen_edit as script
from utils import UserError, load_config, run_script, uniform

DEMO = ["--config", str(demo.ROOT / demo.CONFIG)]
DEMO += ["--model.pretrained_model_name_or_path", str(demo.ROOT / demo.BASE_DIR)]
DEMO += ["--data.dataset_configs.0.views=1", "--data.dataset_configs.0.view_scale=1"]


def write_crops(folder, count, side_px, seed=0):
    """Write `count` square crops of the demo's photos, and the held-out photos, as pairs."""
    rng, source = np.random.RandomState(seed), demo.ROOT / demo.PAIRS_DIR
    names = sorted(file.name[:-6] for file in source.glob("*_R.png"))
    trained = [name for name in names if name not in demo.HELD_OUT]
    wanted = [(trained[n % len(trained)], f"crop{n:03}") for n in range(count)]
    wanted += zip(demo.HELD_OUT, demo.HELD_OUT, strict=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name, new in wanted:
        x, y = rng.rand(2)
        for end in "RT":
            with Image.open(next(source.glob(f"{name}_{end}.[pj][np]g"))) as picture:
                left, top = int(x * (picture.width - side_px)), int(y * (picture.height - side_px))
                crop = picture.crop((left, top, left + side_px, top + side_px))
                (picture if new == name else crop).convert("RGB").save(folder / f"{new}_{end}.png")
        (folder / f"{new}_T.txt").write_text((source / f"{name}_T.txt").read_text())


def read(argv, **settings):
    """The checked config of these flags and settings ("a.b": value)."""
    texts = {n: v if isinstance(v, str) else json.dumps(v) for n, v in settings.items()}
    argv = [*argv, *(f"--{name}={text}" for name, text in texts.items())]
    return load_config(script.Config, argv, check=script.audit)


def measure(trainer, names, folders):
    """Skill of the LoRA in each folder on the held-out pairs of these names."""
    trainer.setup_predict()
    examples = [trainer.data.resolve(script.Draw(0, n)) for n in trainer.data.held_out]
    examples = [example for example in examples if example.name in names]
    skills = []
    for folder in folders:
        trainer.load_lora(folder)
        shares = []
        for example in examples:
            how = trainer.config.validation
            images = [script.load_picture(example.pictures[k][0]) for k in ("control", "pixel")]
            images.append(script.draw_edit(trainer, example, how, trainer.through_cache))
            before, after, edited = (np.asarray(image.convert("RGB"), float) for image in images)
            if before.shape != after.shape:
                raise UserError("set data.reference_area to target: skill compares pixels")
            shares.append(((edited - after) ** 2).sum() / ((before - after) ** 2).sum())
        skills.append(1 - float(np.mean(shares)))
    return skills


def draw(path, rows, steps):
    """Two panels: skill over pairs, a line for each rank; over steps, one for each number."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    ranks, pairs = ([*dict.fromkeys(row[n] for row in rows)] for n in (1, 0))
    for rank in ranks:
        best = [max(skills) for count, own, skills in rows if own == rank]
        left.plot(pairs, best, "o-", label=f"rank {rank}")
    for count in pairs:
        both = [skills for own, rank, skills in rows if (own, rank) == (count, ranks[-1])]
        right.plot(steps, both[0], "o-", label=f"{count} pairs")
    left.set(xscale="log", xlabel="pairs (best checkpoint)", ylabel="skill on held-out pairs")
    left.set_xticks(pairs, map(str, pairs), minor=False)
    right.set(xlabel=f"steps (rank {ranks[-1]})")
    left.legend()
    right.legend()
    figure.savefig(path, dpi=100, bbox_inches="tight")


def main():
    """Print a row for each number of pairs and rank; write curve.json and curve.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--pairs", type=int, nargs="+", default=[3, 10, 30, 100])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 200, 400, 800])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/curve"))
    args, argv = parser.parse_known_args()
    out, every = args.output_dir, math.gcd(*args.steps)
    if "--config" not in argv:
        write_crops(out / "pairs", max(args.pairs), 160)
        argv = [*DEMO, f"--data.dataset_configs.0.train_data_dir={out / 'pairs'}", *argv]
    run = {
        "cache.cache_dir": str(out / "cache"),
        "train.max_train_steps": max(args.steps),
        "train.checkpointing_steps": every,
        "train.checkpoints_total_limit": None,
        "lr_scheduler.scheduler_type": "constant",
        "validation.steps": None,
    }
    first = read(argv, **run, **{"logging.output_dir": str(out / "all")})
    flavour = script.detect_flavour(first.model.pretrained_model_name_or_path)
    data = script.find_samples(first, flavour)[0]
    held_out = [data.samples[n].name for n in data.held_out]
    names = [sample.name for sample in data.samples if sample.name not in held_out]
    names.sort(key=lambda name: uniform("curve", name))
    rows = []
    print(f"| pairs | rank | {' | '.join(f'{n} steps' for n in args.steps)} | s/step |")
    print(f"|---|---|{'---|' * len(args.steps)}---|")
    for count in args.pairs:
        for rank in args.ranks:
            folder = out / f"{count}_pairs_rank_{rank}"
            kept = {"data.dataset_configs.0.holdout": held_out + names[count:]}
            kept |= {"model.lora.r": rank, "logging.output_dir": str(folder)}
            trainer = script.QwenImageEditTrainer(read(argv, **run, **kept))
            start = time.monotonic()
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.fit()
            pace = (time.monotonic() - start) / max(args.steps)
            skills = measure(trainer, held_out, [folder / f"checkpoint-{n}" for n in args.steps])
            rows.append((count, rank, skills))
            shown = " | ".join(f"{skill:.3f}" for skill in skills)
            print(f"| {count} | {rank} | {shown} | {pace:.2f} |", flush=True)
    (out / "curve.json").write_text(json.dumps({"steps": args.steps, "rows": rows}))
    draw(out / "curve.png", rows, args.steps)
    print(f"picture: {out / 'curve.png'}")


if __name__ == "__main__":
    run_script(main)
