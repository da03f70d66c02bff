"""What the start of train_qwen_edit.py costs with many pairs: CPU seconds and memory.

    python benchmarks/start.py 2000 50000

The pictures are 32 px, hard links to twenty files. The first start looks at all of them; measured
is the second, up to the point where the cache would be filled: audit, pairing, the names of all
cache entries, the order of the first epoch.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def make_pairs(folder, count):
    """count pairs in before/ and after/, a caption each."""
    import numpy as np
    from PIL import Image

    sources = []
    for number in range(20):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)
        sources.append(folder / f"source{number}.png")
        Image.fromarray(pixels).save(sources[-1])
    for side in ("before", "after"):
        (folder / side).mkdir()
        for number in range(count):
            source = sources[number % 10 + 10 * (side == "after")]
            os.link(source, folder / side / f"{number:06d}.png")
            (folder / side / f"{number:06d}.txt").write_text("make it blue")


def start(folder, base):
    """One start, in this process."""
    import train_qwen_edit as script
    from utils import load_config

    flags = {
        "model.pretrained_model_name_or_path": base,
        "data.dataset_configs.0.train_data_dir": folder,
        "data.dataset_configs.0.target_dir": "after",
        "data.dataset_configs.0.reference_dirs": "[before]",
        "data.dataset_configs.0.resolution": 64,
        "logging.output_dir": folder / "../out",
        "cache.cache_dir": folder / "../cache",
    }
    argv = [f"--{name}={value}" for name, value in flags.items()]
    trainer = script.QwenImageEditTrainer(load_config(script.Config, argv, script.audit))
    trainer.setup_accelerator()
    trainer.find_data()
    trainer.cache_jobs()
    next(iter(trainer.step_plan()))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{time.process_time():.1f} s CPU, {peak_mb:.0f} MB")


def told(*arguments):
    """The last line of a process of this file."""
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split(
        "\n"
    )[-2]


def main():
    from utils import run_script

    if sys.argv[1] == "base":  # here: a process that it starts would inherit its peak of memory
        import tiny

        print(tiny.build_all(Path(sys.argv[2]))["2511"])
        return
    if sys.argv[1] == "start":
        run_script(lambda: start(Path(sys.argv[2]), sys.argv[3]))
        return
    with tempfile.TemporaryDirectory() as place:
        base = told("base", Path(place, "bases"))
        for count in map(int, sys.argv[1:]):
            folder = Path(place, f"{count}/data")
            folder.mkdir(parents=True)
            make_pairs(folder, count)
            for which in ("first", "second"):
                print(f"{count} pairs, {which} start: {told('start', folder, base)}", flush=True)


if __name__ == "__main__":
    main()
