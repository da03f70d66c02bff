"""Fill, check, prune or measure a cache ahead of training, on one process or many.

Page: docs/cache_embeddings.md

    accelerate launch cache_embeddings.py --config configs/x.yaml             # fill
    accelerate launch --multi_gpu --num_processes 4 cache_embeddings.py --config configs/x.yaml
    python cache_embeddings.py --config configs/x.yaml --stats     # count, change nothing
    python cache_embeddings.py --config configs/x.yaml --verify    # check all, mend the damaged
    python cache_embeddings.py --config configs/x.yaml --prune     # drop what is not used
    ... --script train_pairedit.py                # another training script, or a fork of one

Takes the same --config and overrides as the training script.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm.auto import tqdm

from utils import UserError, load_config, read_entry, run_script

MODES = ("--stats", "--verify", "--prune")


def split_args(argv: list[str]) -> tuple[Path, set[str], list[str]]:
    """Own flags apart from the training script's: (script, modes, rest)."""
    args = [part for arg in argv for part in (arg.split("=", 1) if "--script=" in arg else [arg])]
    modes = {arg for arg in args if arg in MODES}
    rest = [arg for arg in args if arg not in MODES]
    script = Path(__file__).with_name("train_qwen_edit.py")
    if "--script" in rest:
        at = rest.index("--script")
        script = Path(rest[at + 1]) if at + 1 < len(rest) else Path()
        del rest[at : at + 2]
    return script, modes, rest


def load_script(path: Path) -> ModuleType:
    """Import a training script (or a fork of one) by its path. Raises UserError."""
    if not path.is_file():
        raise UserError(f"--script: no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--script {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # KEEP: pydantic and pickle look classes up there
    spec.loader.exec_module(module)
    trainers = [name for name in vars(module) if name.endswith("Trainer")]
    if not trainers or not hasattr(module, "Config") or not hasattr(module, "audit"):
        raise UserError(f"--script {path}: wanted a training script with Config, audit, ...Trainer")
    return module


def make_trainer(module: ModuleType, argv: list[str]) -> Any:
    """The script's trainer for this config, audited."""
    for name in ("with_named_config", "repeat_flags"):  # it knows --c NAME, or --dirs a b c
        argv = getattr(module, name, lambda given: given)(argv)
    config = load_config(module.Config, argv, check=module.audit)
    name = next(name for name in vars(module) if name.endswith("Trainer"))
    if hasattr(config, "cache") and not config.cache.use_cache:
        raise UserError("cache.use_cache is false: this config wants no cache")
    return getattr(module, name)(config)


def entry_files(cache_dir: Path) -> list[Path]:
    """Every entry of a cache."""
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
    for kept in ("quantized", "hub"):  # weights and pictures that a run writes there itself
        size = sum(f.stat().st_size for f in (trainer.cache_dir / kept).rglob("*") if f.is_file())
        if size:
            print(f"  {kept}/: {size / 1e6:.1f} MB (made again when it is deleted)")


def verify(trainer: Any) -> int:
    """Read every entry, delete the damaged ones; returns how many there were."""
    damaged = 0
    for file in tqdm(entry_files(trainer.cache_dir), "verify"):
        try:
            read_entry(file)
        except ValueError as error:
            damaged += 1
            tqdm.write(f"deleted: {error}")
            file.unlink()
    print(f"verified: {damaged} damaged")
    return damaged


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
    trainer = make_trainer(load_script(script), rest)
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
