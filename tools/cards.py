"""Which cards a run fits on, and how long it takes there: computed, for plan.py."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

CARDS = {  # GB that programs see, TFLOPS in bf16 (published, H100: of a large product; T4: none)
    "T4": (15.6, None),
    "L4": (23.5, 121),
    "A10G": (23.5, 70),
    "RTX 4090": (25.2, 165),
    "A100 40 GB": (42.3, 312),
    "H100 80 GB": (85.0, 790),
}
REACH = 0.45  # of that speed: Qwen-Image-Edit, 1024 px, H200; the other transformers: assumed
BITS = {"int8": 8.01, "fp8": 8.01, "int4": 4.25, "int2": 2.25, "nf4": 4.5}  # of a weight and scale


def two(number: float) -> str:
    """Write a number with at least two digits."""
    return f"{number:.1f}" if number >= 1 else f"{number:#.2g}"


def duration(seconds: float) -> str:
    """Write a time in the unit in which it is a number from 1 on, at most in hours."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{two(seconds / length)} {unit}"
    return f"{two(seconds)} s"


def card_lines(peak_gb: float, tflop: float, steps: int, share: float) -> list[str]:
    """Say on which cards a run fits, and how long it takes there, at a share of their speed."""
    lines = [f"Cards        times at {share:g} of the published speed, if the CPU keeps up"]
    for name, (gb, speed) in CARDS.items():
        said = "does not fit"
        if peak_gb < gb and speed:
            seconds = tflop / (speed * share)
            said = f"fits, {two(seconds)} s a step, {duration(steps * seconds)}"
        elif peak_gb < gb:
            said = "fits; it has no bf16, its time is not known"
        lines.append(f"  {name:10} {gb:5.1f} GB  {said}")
    return lines


def weights_gb(model: Any, precision: str, plain_bytes: int, fine: Sequence[str]) -> float:
    """Return the size of a transformer whose blocks are quantised, modulation (`fine`) to 8 bit."""
    bits = BITS.get(precision.partition("-")[0])
    total = sum(parameter.numel() for parameter in model.parameters()) * plain_bytes
    for name, module in model.named_modules():
        if bits and isinstance(module, torch.nn.Linear) and "transformer_blocks." in name:
            inside = name.split("transformer_blocks.")[1].partition(".")[2]
            own = max(bits, 8.01) if inside.startswith(tuple(fine)) else bits
            total -= module.weight.numel() * (plain_bytes - own / 8)
    return total / 1e9


def room_gb() -> float | None:
    """Return the memory of the smallest CUDA device here, or None."""
    devices = range(torch.cuda.device_count())
    rooms = [torch.cuda.get_device_properties(i).total_memory / 1e9 for i in devices]
    return min(rooms, default=None)


def pick(choices: dict[float, str], gb: float | None = None) -> str:
    """Return the choice of the largest memory (GB) that is there; gb: None is that of this machine.

    Raises SystemExit where no card is, or too small a one.
    """
    there = gb or room_gb()
    fitting = [need for need in choices if there and need <= there]
    if not fitting:
        found = f"it has {there:.1f} GB" if there else "there is none"
        raise SystemExit(f"a CUDA device with {min(choices)} GB is needed; {found}")
    return choices[max(fitting)]


def fit_lines(peak_gb: float, ways: dict[str, tuple[float, float]]) -> list[str]:
    """Say whether a run fits here, and which ways out ({words: (GB, x computation)}) lower it."""
    room = room_gb()
    lines = ["  this machine has no CUDA device; tiny bases train on a CPU, in mixed_precision: no"]
    if room is not None:
        word = "fits" if peak_gb < room else "DOES NOT FIT"
        lines = [f"  {word}: the smallest CUDA device here has {room:.1f} GB"]
    lower = {words: way for words, way in ways.items() if way[0] < peak_gb - 0.05}
    lines += ["What would lower it"] if lower else []
    for words, (gb, times) in lower.items():
        fits = ", fits" if room and gb < room else ""
        lacks = "nf4-bnb" in words and not importlib.util.find_spec("bitsandbytes")
        install = ", pip install bitsandbytes" if lacks else ""
        cost = f"{times:.2f} x the computation" + ", blocks travel" * ("swap" in words)
        lines.append(f"  {words}: {two(gb)} GB, {cost}{fits}{install}")
    return lines
