"""What loss.preserve costs and keeps, on the demo's base: the edit, and another instruction.

    python benchmarks/preserve.py [--steps 650] [--weights 0 1] [--every 1]

Trains configs/demo_qwen_edit.yaml with each weight. On the photos that were never trained: skill of
the edit (1 - error / error of the unchanged photo), and how far the answers to two instructions
move from the base's (mean of |difference|, 8-bit levels): one of preserve_prompts, and one that
no training has seen.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np

import train_qwen_edit as script
from utils import load_config

EDIT = "evening light from the left"
KEPT = ["keep the picture as it is", "copy this", "make the sky darker", "add a red circle"]
UNSEEN = "remove the cup from the table"


def levels(images):
    """Pictures as arrays of 0 to 255."""
    return [np.asarray(image.convert("RGB"), float) for image in images]


def trained(weight, steps, every, place, **more):
    """A trainer that has run, and its seconds per step (of the first weight with the encoders').

    more: settings beside the demo's.
    """
    flags = {
        "logging.output_dir": place / f"out{weight}",
        "cache.cache_dir": place / "cache",
        "train.max_train_steps": steps,
        "train.checkpointing_steps": steps,
        "validation.steps": "null",
        "loss.preserve_every": every,
        **more,
    }
    argv = ["--config", "configs/demo_qwen_edit.yaml"]
    argv += [f"--{name}={value}" for name, value in flags.items()]
    if weight:
        argv += [f"--loss.preserve={weight}", "--loss.preserve_prompts", *KEPT]
    trainer = script.QwenImageEditTrainer(load_config(script.Config, argv, check=script.audit))
    start = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.fit()
    return trainer, (time.monotonic() - start) / steps


def measure(trainer):
    """Skill of the edit; distance of the other answers from the base's."""
    trainer.setup_predict()
    how = script.SamplingConfig(num_inference_steps=4, true_cfg_scale=1)
    examples = [trainer.data.resolve(script.Draw(0, n)) for n in trainer.data.held_out]

    def draw(prompt, on):
        script.use_adapters(trainer, trained=on)
        shown = [example._replace(caption=prompt) for example in examples]
        images = [script.draw_edit(trainer, each, how, trainer.encode) for each in shown]
        script.use_adapters(trainer)
        return levels(images)

    edited = draw(EDIT, True)
    wanted = levels(script.load_picture(e.pictures["pixel"][0]) for e in examples)
    before = levels(script.load_picture(e.pictures["control"][0]) for e in examples)
    pairs = zip(edited, wanted, before, strict=True)
    skill = np.mean([1 - ((a - b) ** 2).sum() / ((c - b) ** 2).sum() for a, b, c in pairs])
    moved = []
    for prompt in (KEPT[0], UNSEEN):
        both = zip(draw(prompt, True), draw(prompt, False), strict=True)
        moved.append(np.mean([np.abs(a - b).mean() for a, b in both]))
    return skill, *moved


def main():
    """Print a row for each weight."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=650)
    parser.add_argument("--weights", type=float, nargs="+", default=[0, 1])
    parser.add_argument("--every", type=int, default=1)
    args = parser.parse_args()
    print(f'| preserve | skill | "{KEPT[0]}" moves | "{UNSEEN}" (unseen) moves | s/step |')
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for weight in args.weights:
            trainer, pace = trained(weight, args.steps, args.every, Path(folder))
            skill, kept, unseen = measure(trainer)
            print(
                f"| {weight:g} | {skill:.3f} | {kept:.2f} | {unseen:.2f} | {pace:.3f} |", flush=True
            )


if __name__ == "__main__":
    main()
