"""Training runs that are hurt on purpose: what goes on afterwards must end with the same bits.

    python tests/faults/run.py --runs 200 [--seed 0]    # prints a table; exit code 1: bits differ

Each run takes a trainer, a fault and a moment by chance. After the fault it is started again with
resume_from_checkpoint: latest until it ends, and its LoRAs are compared with an undisturbed run's.
"""

import argparse
import itertools
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tiny
from conftest import (
    ROOT,
    concept,
    copy_pairs,
    run,
    slider_settings,
    small_config,
    suffix_dataset,
    write_config,
)
from safetensors.torch import load_file

from utils import Checkpoints, read_entry

FAULTY = """
import errno, itertools, os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import {script} as script
import utils

calls, written = itertools.count(), utils._fsync

def hurt(path):
    call = next(calls)
    if call >= {moment} and {fault!r} == "full disk":
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    locked = list(Path({place!r}).rglob(".writer"))  # earlier the second one may come first
    if call == {moment} and {fault!r} == "two runs" and locked:
        if not (child := os.fork()):
            utils._fsync = written
            utils.run_script(script.main)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print("the second run:", code, file=sys.stderr)
    for name in {signals!r} if call == {moment} else ():
        os.kill(os.getpid(), getattr(signal, name))
    return written(path)

utils._fsync = hurt
utils.run_script(script.main)
"""
SIGNALS = {"SIGKILL": ["SIGKILL"], "SIGTERM": ["SIGTERM"], "SIGINT twice": ["SIGINT", "SIGINT"]}
BETWEEN = ("a flipped byte", "a removed file", "a cut file")  # between a SIGKILL and the next start
FAULTS = (*SIGNALS, *BETWEEN, "full disk", "two runs")
TRAINERS = {  # script: (flags of the places and of resuming, LoRAs of a finished run)
    "train_qwen_edit": ("logging.output_dir", "cache.cache_dir", "train.resume_from_checkpoint"),
    "train_pairedit": ("output_folder", "cache_dir", "resume_from_checkpoint"),
    "train_dreambooth_pairs": ("output_dir", "cache_dir", "resume_from_checkpoint"),
}


def configs(checkpoints, folder):
    """{script: config file} of runs of 6 steps with a checkpoint every 2."""
    photos = ("chelsea0", "coffee0", "hubble0", "astronaut1")
    data = suffix_dataset(copy_pairs(folder / "pairs", photos))
    steps = {"train.max_train_steps": 6, "train.checkpointing_steps": 2, "train.use_ema": True}
    qwen = small_config(checkpoints["2511"], folder, **{"data.dataset_configs": [data]}, **steps)
    concept(folder / "datasets/age")
    slider = slider_settings(checkpoints["flux"], folder, train_iteration=6, save_per_steps=2)
    sides = {
        f"{n}_data_dir": str(folder / f"datasets/age/{s}")
        for n, s in (("before", "source"), ("after", "target"))
    }
    sd = {"pretrained_model_name_or_path": str(checkpoints["sd"]), "use_image_pairs": True, **sides}
    sd |= {
        "instance_prompt": "a photo",
        "resolution": 64,
        "train_batch_size": 1,
        "learning_rate": 1e-2,
    }
    sd |= {"max_train_steps": 6, "checkpointing_steps": 2}
    files = {}
    for name, settings in zip(TRAINERS, (qwen, slider, sd), strict=True):
        (folder / name).mkdir()
        files[name] = write_config(folder / name, settings)
    return files


def command(script, config, place, cache, resume=False):
    output_dir, cache_dir, resuming = TRAINERS[script]
    flags = ["--config", config, f"--{output_dir}={place}", f"--{cache_dir}={cache}"]
    return [*flags, *([f"--{resuming}=latest"] if resume else [])]


def loras(place):
    """{file: {tensor: bytes}} of what a finished run leaves, but for its checkpoints."""
    files = [f for f in place.rglob("*.safetensors") if "checkpoint-" not in str(f)]
    found = {str(file.relative_to(place)): load_file(file) for file in sorted(files)}
    return {f: {name: x.numpy().tobytes() for name, x in its.items()} for f, its in found.items()}


def damage(fault, place, cache, chance):
    """Hurt a file of the newest checkpoint or of the cache."""
    there = [*place.rglob("checkpoint-*/*")] if chance.random() < 0.7 else []
    there = there or [*cache.rglob("*.safetensors")]
    if not there:
        return
    file = chance.choice(sorted(there))
    data = bytearray(file.read_bytes())
    if fault == "a removed file":
        file.unlink()
    elif fault == "a cut file":
        file.write_bytes(data[: len(data) // 2])
    else:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)


def hurt(script, fault, config, expected, warm, folder, chance):
    """One run: what it says of itself, "" if it ended with the expected bits and left nothing."""
    place, cache = folder / "out", folder / "cache"
    if chance.random() < 0.7:
        shutil.copytree(warm, cache)
    signals = SIGNALS.get(fault, SIGNALS["SIGKILL"] if fault in BETWEEN else [])
    settings = {
        "root": str(ROOT),
        "place": str(place),
        "script": script,
        "fault": fault,
        "signals": signals,
    }
    text = FAULTY.format(moment=chance.randrange(40), **settings)
    (folder / f"{script}_hurt.py").write_text(text)
    done = run(folder / f"{script}_hurt.py", *command(script, config, place, cache), check=False)
    if "Traceback" in done.stderr and "KeyboardInterrupt" not in done.stderr:
        return f"traceback: {done.stderr[-600:]}"
    if fault == "full disk" and done.returncode not in (0, 2):
        return f"exit {done.returncode}: {done.stderr[-300:]}"
    if "the second run:" in done.stderr and "the second run: 2" not in done.stderr:
        return f"the second run was not refused: {done.stderr[-300:]}"
    if fault in BETWEEN:
        damage(fault, place, cache, chance)
    for _ in range(3):
        done = run(ROOT / f"{script}.py", *command(script, config, place, cache, True), check=False)
        if done.returncode == 0:
            break
    if done.returncode:
        return f"does not go on: {done.stderr[-400:]}"
    found = loras(place)  # one that was stopped has saved more
    if wrong := [name for name, tensors in expected.items() if found.get(name) != tensors]:
        return f"other bits: {wrong}"
    if left := [str(f) for f in itertools.chain(place.rglob("*.tmp"), cache.rglob("*.tmp"))]:
        stale = [name for name in left if not signals or "checkpoint" in name]
        return f"left behind: {stale}" if stale else ""
    for file in cache.rglob("*.safetensors"):
        read_entry(file)
    newest = [f for f in place.rglob("checkpoint-6") if "earlier-" not in str(f)]
    whole = newest and all(map(Checkpoints.state, newest))
    return "" if whole else "the last checkpoint is damaged"


def run_all(runs, seed, checkpoints, folder):
    """Yield (trainer, fault, what is wrong) of each run."""
    files, straight = configs(checkpoints, folder), {}
    for script, config in files.items():
        place, warm = folder / script / "straight", folder / script / "cache"
        run(ROOT / f"{script}.py", *command(script, config, place, warm))
        straight[script] = config, loras(place), warm
        assert straight[script][1]
    pairs = list(itertools.product(TRAINERS, FAULTS))
    for number in range(runs):
        chance = random.Random(f"{seed} {number}")
        script, fault = pairs[(number + 7 * seed) % len(pairs)]
        with tempfile.TemporaryDirectory(dir=folder) as own:
            yield script, fault, hurt(script, fault, *straight[script], Path(own), chance)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    start, count, wrong = time.monotonic(), Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = tiny.build_all(Path(folder, "checkpoints"))
        for script, fault, said in run_all(given.runs, given.seed, checkpoints, Path(folder)):
            count[script, fault] += 1
            wrong += [f"{script}, {fault}: {said}"] if said else []
    print("| fault |", " | ".join(TRAINERS), "|\n|---|" + "---:|" * len(TRAINERS))
    for fault in FAULTS:
        print(f"| {fault} |", " | ".join(str(count[script, fault]) for script in TRAINERS), "|")
    print(f"{given.runs} runs in {time.monotonic() - start:.0f} s, {len(wrong)} with other results")
    print("\n".join(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
