"""Cut a video into before/after pairs, for train_dreambooth_pairs.py and train_qwen_edit.py.

    python tools/video_pairs.py clip.mp4 --output_dir data/clip --frame_gap 24

Writes before/ and after/ with PNGs of equal names, e.g. 00012-00036.png: frames 12 and 36. Pairs
overlap by half. Left out are pairs with a cut between their frames, and those where nothing
changes. Needs: pip install av.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import UserError, check_setup, listed, progress, run_script

SIZE = 32  # px of the small frames that are compared
STILL = 0.004  # mean difference (0 to 1) of two frames below which nothing changes
CUT = 0.15  # difference of neighbours from which there is a cut
USUAL = 8  # ... or so many times the usual one, if that is more


def read_frames(video: Path) -> Iterator[Image.Image]:
    """Yield every frame of a video, upright: a telephone stores by how much to turn them.

    Raises:
        UserError: it is no video, or cannot be decoded.
    """
    import av

    try:
        with av.open(str(video)) as container:
            total = container.streams.video[0].frames or None
            for frame in progress(container.decode(video=0), "decode video", total=total):
                yield frame.to_image().rotate(frame.rotation, expand=True)
    except (av.error.FFmpegError, IndexError) as error:
        raise UserError(f"video {video} cannot be read: {error}") from error


def choose(small: np.ndarray, gap: int) -> tuple[list[tuple[int, int]], list[str]]:
    """Return (pairs of frames, what was left out and why); small (frames, SIZE, SIZE, 3), uint8."""
    small = small.astype(np.float32) / 255
    steps = [float(np.abs(b - a).mean()) for a, b in itertools.pairwise(small)]
    cut = max(CUT, USUAL * float(np.median(steps))) if steps else CUT
    pairs, left_out = [], []
    for first in range(0, len(small) - gap, max(1, gap // 2)):
        last = first + gap
        if max(steps[first:last]) > cut:
            left_out.append(f"frames {first} to {last}: there is a cut between them")
        elif np.abs(small[last] - small[first]).mean() < STILL:
            left_out.append(f"frames {first} to {last}: nothing changes")
        else:
            pairs.append((first, last))
    return pairs, left_out


def cut_video(video: Path, output_dir: Path, gap: int) -> tuple[int, list[str]]:
    """Write the pairs; return (how many, what was left out). Decodes once. Raises UserError."""
    stride, small = max(1, gap // 2), []
    frames = output_dir / ".frames"  # those that may be needed, while it is not known which are
    shutil.rmtree(frames, ignore_errors=True)
    frames.mkdir(parents=True)
    try:
        for number, image in enumerate(read_frames(video)):
            small.append(np.asarray(image.resize((SIZE, SIZE))))
            if number % stride == 0 or (number >= gap and (number - gap) % stride == 0):
                image.save(frames / f"{number:05d}.png")
        pairs, left_out = choose(np.array(small), gap)
        for first, last in pairs:
            for side, number in (("before", first), ("after", last)):
                (output_dir / side).mkdir(exist_ok=True)
                target = output_dir / side / f"{first:05d}-{last:05d}.png"
                shutil.copyfile(frames / f"{number:05d}.png", target)
    except OSError as error:
        raise UserError(f"{output_dir} cannot be written: {error}") from error
    finally:
        shutil.rmtree(frames, ignore_errors=True)
    if not pairs:
        text = f"no pair in {video}: {len(small)} frames, --frame_gap {gap}"
        raise UserError("\n".join([text, listed(left_out)]).strip())
    return len(pairs), left_out


def main() -> None:
    """Check what was given, then cut."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("video", type=Path)
    parser.add_argument("--output_dir", type=Path, required=True, help="gets before/ and after/")
    parser.add_argument("--frame_gap", type=int, default=24, help="frames from before to after")
    given = parser.parse_args()
    problems = [] if given.video.is_file() else [f"no video {given.video}"]
    problems += [] if given.frame_gap >= 1 else ["--frame_gap: 1 or more"]
    if any((given.output_dir / side).exists() for side in ("before", "after")):
        problems.append(f"{given.output_dir} holds pairs already: name another folder")
    problems += check_setup(packages=["av"], writes={"--output_dir": given.output_dir})
    if problems:
        raise UserError(f"nothing was written\n{listed(problems)}")
    count, left_out = cut_video(given.video, given.output_dir, given.frame_gap)
    if left_out:
        print(f"left out {len(left_out)} pairs\n{listed(left_out)}")
    folders = (
        f"--before_data_dir {given.output_dir}/before --after_data_dir {given.output_dir}/after"
    )
    print(f"{count} pairs; train_dreambooth_pairs.py --use_image_pairs {folders}")


if __name__ == "__main__":
    run_script(main)
