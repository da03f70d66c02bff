"""Fill, check, prune or measure a cache ahead of training, on one process or many.

Page: docs/cache_embeddings.md

    python cache_embeddings.py --config configs/x.yaml             # fill
    accelerate launch --multi_gpu --num_processes 4 cache_embeddings.py --config configs/x.yaml
    python cache_embeddings.py --config configs/x.yaml --stats     # count, change nothing
    python cache_embeddings.py --config configs/x.yaml --verify    # check all, mend the damaged
    python cache_embeddings.py --config configs/x.yaml --prune     # drop what is not used
    ... --script train_pairedit.py                # another training script, or a fork of one

Takes the same --config and overrides as the training script.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from utils import UserError, load_config, load_script, progress, read_entry, run_script

MODES = ("--stats", "--verify", "--prune")


def split_args(argv: list[str]) -> tuple[Path, set[str], list[str]]:
    """Return own flags apart from the training script's: (script, modes, rest)."""
    args = [part for arg in argv for part in (arg.split("=", 1) if "--script=" in arg else [arg])]
    modes = {arg for arg in args if arg in MODES}
    rest = [arg for arg in args if arg not in MODES]
    script = Path(__file__).with_name("train_qwen_edit.py")
    if "--script" in rest:
        at = rest.index("--script")
        script = Path("".join(rest[at + 1 : at + 2]))
        del rest[at : at + 2]
    return script, modes, rest


def make_trainer(path: Path, argv: list[str]) -> Any:
    """Return the trainer of a training script for this config, audited. Raises UserError."""
    script = load_script(path)
    trainers = [value for name, value in vars(script).items() if name.endswith("Trainer")]
    if not trainers or not hasattr(script, "Config") or not hasattr(script, "audit"):
        raise UserError(f"--script {path}: wanted a training script with Config, audit, ...Trainer")
    if hasattr(script, "with_named_config"):  # it knows --c NAME
        argv = script.with_named_config(argv)
    config = load_config(script.Config, argv, check=script.audit)
    if hasattr(config, "cache") and not config.cache.use_cache:
        raise UserError("cache.use_cache is false: this config wants no cache")
    return trainers[0](config)


def entry_files(cache_dir: Path) -> list[Path]:
    """Return every entry of a cache."""
    return sorted(cache_dir.glob("??/??/*.safetensors"))


def stats(trainer: Any) -> None:
    """Print what is there, what this config uses and what is missing."""
    files = {file.stem: file.stat().st_size for file in entry_files(trainer.cache_dir)}
    jobs = trainer.cache_jobs()
    used = {key: files[key] for key in jobs if key in files}
    print(f"cache {trainer.cache_dir}: {len(files)} entries, {sum(files.values()) / 1e6:.1f} MB")
    print(f"  used by this config: {len(used)}, {sum(used.values()) / 1e6:.1f} MB")
    print(f"  missing: {len(jobs) - len(used)} of {len(jobs)}")
    print(f"  not used by this config: {len(files) - len(used)} (--prune drops them)")


def verify(trainer: Any) -> None:
    """Read every entry and delete the damaged ones."""
    damaged = 0
    for file in progress(entry_files(trainer.cache_dir), "verify"):
        try:
            read_entry(file)
        except UserError as error:
            damaged += 1
            print(f"deleted: {error}")
            file.unlink()
    print(f"verified: {damaged} damaged")


def prune(trainer: Any) -> None:
    """Delete the entries that this config cannot ask for."""
    used = trainer.cache_jobs()
    unused = [file for file in entry_files(trainer.cache_dir) if file.stem not in used]
    size = sum(file.stat().st_size for file in unused)
    for file in unused:
        file.unlink()
    print(f"pruned: {len(unused)} entries, {size / 1e6:.1f} MB")


def main() -> None:
    """Check the config, then do what the flags say; without flags: fill."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    script, modes, rest = split_args(sys.argv[1:])
    if {"-h", "--help"} & set(rest):  # the training script's settings follow
        print(f"{__doc__}\n")
    trainer = make_trainer(script, rest)
    trainer.setup_accelerator()
    trainer.find_data()
    main_process = trainer.accelerator.is_main_process
    if main_process and "--verify" in modes:
        verify(trainer)
    if main_process and "--prune" in modes:
        prune(trainer)
    trainer.accelerator.wait_for_everyone()
    if not modes or "--verify" in modes:  # what was damaged is built again
        count = trainer.cache_embeddings()
        print(f"process {trainer.accelerator.process_index}: {count} entries encoded")
    if main_process and "--stats" in modes:
        stats(trainer)


if __name__ == "__main__":
    run_script(main)
