"""PairEdit's ablations on the demo's faces: how far the attribute moves, and what else changes.

    python benchmarks/pairedit_ablation.py [--variants train_image train_image_fm ...] [--count 3]

Trains every variant `count` times (versions, with other draws) and draws strips over scales, with
the real commands. Age is measured in the hair, content change outside (demo/rebuild.py); both
are means over 16 seeds. The last columns are read off the strip where the age has moved by exactly
the pairs' difference. Prints the table of docs/train_pairedit.md.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np
from PIL import Image

from utils import load_script

rebuild = load_script(ROOT / "demo/rebuild.py")

VARIANTS = (
    "train_image",
    "train_image_wocontent",
    "train_image_wocfg",
    "train_image_fm",
    "train_image_sliders",
)
SCALES = (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 9, 12)
PAIR = rebuild.PAIR_AGES["target"] - rebuild.PAIR_AGES["source"]


def strips(folder):
    """(seeds, scales, 2): age and content change of every picture against scale 0."""
    rows = []
    for place in sorted(folder.glob("origin/*")):
        files = {float(f.name.split("_scale")[1].split("_")[0]): f for f in place.glob("*.png")}
        pictures = [np.asarray(Image.open(files[scale]), float) / 255 for scale in SCALES]
        head = rebuild.from_centre(pictures[0])
        ages = [rebuild.face_age(picture, head) for picture in pictures]
        rows.append(
            [
                (age - ages[0], rebuild.content_change(pictures[0], picture, head))
                for age, picture in zip(ages, pictures, strict=True)
            ]
        )
    return np.array(rows)


def at_one_change(age, content):
    """(scale, content) where the mean age first equals the pairs' difference; nan if never."""
    for k in range(1, len(SCALES)):
        if age[k] >= PAIR:
            share = (PAIR - age[k - 1]) / (age[k] - age[k - 1])
            return tuple(
                float(x[k - 1] + share * (x[k] - x[k - 1])) for x in (np.array(SCALES), content)
            )
    return float("nan"), float("nan")


def measure(variant, count, folder, more):
    """Train and draw -> (count, 5): by version age and content at 1, scale, content, rises."""
    flags = ["--config", str(ROOT / "configs/demo_pairedit.yaml"), "--python_name", variant]
    flags += ["--train_count", str(count), "--output_folder", str(folder / "models")]
    flags += ["--output_folder_gen", str(folder / "strips"), "--preview", "false", *more]
    flags += ["--scales", ",".join(map(str, SCALES)), "--count_gen", "16"]
    subprocess.run([sys.executable, "train_pairedit.py", *flags], cwd=ROOT, check=True)
    drawing = [sys.executable, "generate.py", *flags, "--image_format", "png"]
    subprocess.run(drawing, cwd=ROOT, check=True)
    found = []
    for place in sorted((folder / "strips/age").glob(f"*_v{variant}_*")):
        rows = strips(place)
        age, content = rows[..., 0].mean(0), rows[..., 1].mean(0)
        one = SCALES.index(1)
        rises = np.mean(np.diff(rows[:, : one + 1, 0], axis=1) > 0)
        found.append((age[one] / PAIR, content[one], *at_one_change(age, content), rises))
    return np.array(found)


def cell(values, digits):
    """Mean and deviation of the versions that have a value, and how many have."""
    there = values[~np.isnan(values)]
    if not len(there):
        return "never"
    text = f"{there.mean():.{digits}f} ± {there.std():.{digits}f}"
    return text if len(there) == len(values) else f"{text} ({len(there)} of {len(values)})"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--variants", nargs="*", default=VARIANTS)
    parser.add_argument("--count", type=int, default=3)
    args, more = parser.parse_known_args()
    heads = (
        "`python_name`", "age at scale 1, of the pairs' change", "content change there",
        "scale of one whole change", "content change there", "steps that rise up to scale 1",
    )  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    with tempfile.TemporaryDirectory() as place:
        for variant in args.variants:
            found = measure(variant, args.count, Path(place), more)
            cells = [cell(column, n) for column, n in zip(found.T, (2, 4, 2, 4, 2), strict=True)]
            lines.append(f"| `{variant}` | {' | '.join(cells)} |")
            print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
