"""The edit of the first demo: light from one side, drawn from a photo alone.

python demo/scenes.py    # writes the afters of data/photo_pairs again
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from demo import PAIRS_DIR, ROOT
from utils import save_text


def pink_noise(rng: np.random.RandomState, side_px: int, slope: float) -> np.ndarray:
    """(side, side) texture of unit deviation, amplitude ~ 1 / frequency^slope."""
    fy, fx = np.fft.fftfreq(side_px)[:, None], np.fft.rfftfreq(side_px)[None]
    amplitude = np.maximum(np.hypot(fy, fx), 1 / side_px) ** -slope
    texture = np.fft.irfft2(np.fft.rfft2(rng.randn(side_px, side_px)) * amplitude)
    return (texture / texture.std()).astype(np.float32)


def draw_leaves(rng: np.random.RandomState, side_px: int, leaves: int = 40) -> np.ndarray:
    """Shaded ellipses and boxes hiding each other: the statistics of photos without any photo.

    Returns (side, side, 3) in [-1, 1].
    """
    y, x = np.mgrid[0:side_px, 0:side_px].astype(np.float32)
    textures = [pink_noise(rng, side_px, rng.uniform(1.0, 1.6))[..., None] for _ in range(3)]
    image = rng.uniform(-0.8, 0.8, 3) + textures[0] * rng.uniform(0, 0.3)
    for _ in range(leaves):
        radius = min(0.6 * side_px, 2.5 / (rng.rand() + 0.02) ** 0.8)
        angle, aspect = rng.uniform(0, np.pi), rng.uniform(0.3, 1)
        dx, dy = x - rng.uniform(0, side_px), y - rng.uniform(0, side_px)
        u = dx * np.cos(angle) + dy * np.sin(angle)
        v = (dy * np.cos(angle) - dx * np.sin(angle)) / aspect
        distance = np.hypot(u, v) if rng.rand() < 0.6 else np.maximum(abs(u), abs(v))
        cover = np.clip(0.5 - (distance - radius) / rng.uniform(0.7, 4), 0, 1)[..., None]
        colour = rng.uniform(-0.9, 0.9) + rng.randn(3) * 0.25 * rng.rand()
        shade = (u * rng.randn() + v * rng.randn())[..., None] / (0.6 * side_px)
        colour = colour + shade + textures[rng.randint(3)] * rng.uniform(0, 0.12)
        image = image * (1 - cover) + cover * colour
    return np.clip(image, -1, 1).astype(np.float32)


def recoloured_crop(
    rng: np.random.RandomState, photos: list[Image.Image], size: tuple[int, int]
) -> np.ndarray:
    """A random crop of a random photo under a random colour change, (H, W, 3) in [-1, 1]."""
    photo = photos[rng.randint(len(photos))]
    scale = min(rng.uniform(0.7, 1.25), photo.width / size[0], photo.height / size[1])
    width, height = size[0] * scale, size[1] * scale
    left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
    box = (left, top, left + width, top + height)
    pixels = np.asarray(photo.resize(size, Image.Resampling.LANCZOS, box), np.float32) / 127.5 - 1
    if rng.rand() < 0.5:
        pixels = pixels @ (np.eye(3) + 0.35 * rng.randn(3, 3))
        pixels = pixels * rng.uniform(0.5, 1.2) + rng.uniform(-0.4, 0.4, 3)
    pixels = np.clip(pixels, -1, 1).astype(np.float32)
    return pixels[:, ::-1] if rng.rand() < 0.5 else pixels


class Light(NamedTuple):
    """How relight paints; colours RGB in 0..1."""

    angle: float  # where it comes from, degrees: 0 right, 90 above, 180 left
    dark: tuple[float, ...]  # what black becomes
    pale: tuple[float, ...]  # what white becomes
    glow: tuple[float, ...]  # the light itself


EVENING = Light(153, (0.08, 0.05, 0.22), (0.58, 0.48, 0.70), (1.0, 0.62, 0.18))
EVENING_PROMPT = "evening light from the left"
LIGHTS = {  # what the base learns; the demo's LoRA learns EVENING
    "moonlight": Light(45, (0.02, 0.06, 0.08), (0.45, 0.62, 0.60), (0.7, 0.95, 1.0)),
    "a campfire below": Light(270, (0.10, 0.02, 0.0), (0.50, 0.36, 0.30), (1.0, 0.25, 0.1)),
    "neon": Light(0, (0.0, 0.10, 0.05), (0.70, 0.75, 0.55), (0.5, 1.0, 0.3)),
}


def blur(plane: torch.Tensor, sigma_px: float) -> torch.Tensor:
    """(H, W) under a Gaussian; the border continues."""
    reach = math.ceil(3 * sigma_px)
    kernel = torch.exp(-torch.arange(-reach, reach + 1.0).square() / (2 * sigma_px**2))
    kernel = (kernel / kernel.sum())[None, None, None]
    padded = F.pad(plane[None, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel), kernel.mT)[0, 0]


def relight(picture: np.ndarray, light: Light) -> np.ndarray:
    """Light a photo from one side; (H, W, 3) in 0..1.

    Brightness is taken for height: slopes that face the light glow, the others lie in shadow. No
    curve of colours does that: the same grey glows here and is dark there.
    """
    luminance = picture @ np.array([0.299, 0.587, 0.114])
    side, slope = math.sqrt(luminance.size), np.zeros_like(luminance)
    for sigma, share in ((0.01, 6.0), (0.03, 12.0)):  # of the side
        heights = blur(torch.from_numpy(np.float32(luminance)), sigma * side).numpy()
        down, right = np.gradient(heights)
        angle = math.radians(light.angle)
        slope += share * sigma * side * (math.sin(angle) * down - math.cos(angle) * right)
    lit, shade = (np.clip(part, 0, 1)[..., None] for part in (slope, -slope))
    level, dark, pale, glow = luminance[..., None], *(np.array(c) for c in light[1:])
    dusk = 0.75 * (dark + (pale - dark) * level) + 0.25 * picture
    lighted = dusk * (1 - 0.6 * shade) + lit * glow * (0.35 + 0.65 * level)
    return np.clip(lighted, 0, 1).astype(np.float32)


def to_image(picture: np.ndarray) -> Image.Image:
    """(H, W, 3) in 0..1 -> a picture."""
    return Image.fromarray((picture * 255).round().astype(np.uint8))


def relight_photo(photo: Image.Image, light: Light) -> Image.Image:
    """relight of a picture."""
    return to_image(relight(np.asarray(photo.convert("RGB"), np.float32) / 255, light))


def relight_pairs(folder: Path) -> None:
    """Write x_T beside every x_R.png, its caption, and x_D.png, eight of its tones."""
    for file in sorted(folder.glob("*_R.png")):
        name = file.name.removesuffix("_R.png")
        with Image.open(file) as photo:
            after = relight_photo(photo, EVENING)
        after.save(next(folder.glob(f"{name}_T.[jp][pn]g"), folder / f"{name}_T.png"), quality=95)
        colours = np.asarray(after, float).reshape(-1, 3) / 255
        parts = np.array_split(colours[colours.sum(-1).argsort()], 8)
        tones = np.repeat([part.mean(0) for part in parts], 16, 0)
        to_image(np.tile(tones, (32, 1, 1))).save(folder / f"{name}_D.png")
        save_text(folder / f"{name}_T.txt", EVENING_PROMPT + "\n")


if __name__ == "__main__":
    relight_pairs(ROOT / PAIRS_DIR)
