"""What our commands take beside others' for the same work: whole runs, and what a step adds.

    python benchmarks/beside.py                    # generate.py beside a bare pipeline loop
    python benchmarks/beside.py --theirs FILE      # a DreamBooth LoRA trainer beside ours

FILE is diffusers' examples/dreambooth/train_dreambooth_lora.py (it needs torchvision), or any
script with its flags. Both train the UNet of a tiny Stable Diffusion checkpoint on the same
pictures: fp32, batch 1, rank 4. Every command is a process of its own, in turn with the other's, a
short and a long one: the difference is what a step or picture adds.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from utils import UserError, open_rgb, run_script

PHOTOS = sorted((ROOT / "data/photo_pairs").glob("*_R.png"))
BASE, PROMPT = ROOT / "demo/qwen_edit_base", "give it the light of the evening"
SHORT, LONG, STEPS, SIDE = 2, 6, 4, 160  # pictures, of 4 steps and 160 px
FEW, MANY = 20, 520  # steps


def seconds(command):
    """The wall time of a command. Raises UserError: it failed."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise UserError(f"{command[0]}: exit code {done.returncode}: {said[-1] if said else ''}")
    return time.perf_counter() - started


def compare(ours, theirs, sizes, rounds, unit):
    """Print seconds of both, and the ratios; ours, theirs: (size, folder) -> command."""
    times = {(name, size): [] for name in ("ours", "theirs") for size in sizes}
    for _ in range(rounds):
        for (name, size), found in times.items():
            with tempfile.TemporaryDirectory() as folder:
                command = (ours if name == "ours" else theirs)(size, Path(folder))
                found.append(seconds(command))
    short, long = sizes
    whole = {name: statistics.median(times[name, long]) for name in ("ours", "theirs")}
    less = {name: statistics.median(times[name, short]) for name in whole}
    each = {name: (whole[name] - less[name]) / (long - short) for name in whole}
    for what, found in ((f"{long} {unit}s, s", whole), (f"a {unit} more, s", each)):
        ratio = found["ours"] / found["theirs"]
        print(f"{what}: ours {found['ours']:.3f}, theirs {found['theirs']:.3f}, ratio {ratio:.2f}")


def train(theirs, place, rounds):
    """A DreamBooth LoRA by both."""
    import tiny

    tiny.build_sd(place / "base")
    (place / "pictures").mkdir()
    for photo in PHOTOS:
        open_rgb(photo).resize((64, 64)).save(place / "pictures" / photo.name)
    flags = ["--pretrained_model_name_or_path", place / "base", "--instance_data_dir"]
    flags += [place / "pictures", "--instance_prompt", "a photo", "--resolution", 64]
    flags += ["--train_batch_size", 1, "--learning_rate", 1e-4, "--rank", 4, "--seed", 0]

    def command(script):
        return lambda steps, out: [script, *flags, "--output_dir", out, "--max_train_steps", steps]

    compare(
        command(ROOT / "train_dreambooth_pairs.py"), command(theirs), (FEW, MANY), rounds, "step"
    )


def draw(place, rounds):
    """Edits of a folder, by generate.py and by a bare loop."""
    for count in (SHORT, LONG):
        (place / str(count)).mkdir()
        for photo in PHOTOS[:count]:
            open_rgb(photo).resize((SIDE, SIDE)).save(place / str(count) / photo.name)

    def ours(count, out):
        base = ["--pretrained_model_name_or_path", BASE, "--input_dir", place / str(count)]
        flags = ["--num_inference_steps", STEPS, "--height", SIDE, "--width", SIDE]
        flags += ["--dtype", "fp32"]
        return [ROOT / "generate.py", *base, "--prompt", PROMPT, "--output_dir", out, *flags]

    compare(ours, lambda count, out: [__file__, "--bare", place / str(count), out],
            (SHORT, LONG), rounds, "picture")  # fmt: skip


def bare(pictures, out):
    """Draw what generate.py draws, in a loop over the pipeline and no more."""
    import torch
    from diffusers import DiffusionPipeline

    from train_qwen_edit import load_processor  # without torchvision there is no other

    processor = load_processor(BASE / "processor")
    pipeline = DiffusionPipeline.from_pretrained(BASE, dtype=torch.float32, processor=processor)
    for file in sorted(Path(pictures).iterdir()):
        photo, draw = open_rgb(file), torch.Generator().manual_seed(0)
        how = {"width": SIDE, "height": SIDE, "num_inference_steps": STEPS, "generator": draw}
        drawn = pipeline(image=[photo], prompt=PROMPT, negative_prompt=" ", **how)
        drawn.images[0].save(Path(out) / file.name)


def main():
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--theirs", type=Path, help="a script with the flags of diffusers' example")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bare", nargs=2, help="(used by the script itself)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        if args.bare:
            bare(*args.bare)
        elif args.theirs:
            train(args.theirs, Path(place), args.rounds)
        else:
            draw(Path(place), args.rounds)


if __name__ == "__main__":
    run_script(main)
