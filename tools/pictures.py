"""Pictures that are not plain 8-bit sRGB, read as the others are; used by utils.to_rgb()."""

from __future__ import annotations

import functools
import io
import logging
import unicodedata

import numpy as np
from PIL import Image, ImageCms, ImageFont, ImageOps

SRGB = ImageCms.createProfile("sRGB")
SRGB_GAMMA = 0.45455
DARK = "its 16-bit values end below 16,384, as 12- and 14-bit data do; scale them"

log = logging.getLogger("pictures")


def plain(file: Image.Image) -> Image.Image:
    """Return a picture upright, with 8 bits, in sRGB; transparency is kept.

    Of 16 bits, 65,535 is white. Raises ValueError where it has frames, or values without a white.
    """
    frames = getattr(file, "n_frames", 1)
    if frames > 1 and file.format != "MPO":  # MPO: a phone's JPEG
        raise ValueError(f"{frames} frames or pages; save the one that is meant")
    rawmode = str(getattr(file, "tile", None))  # "RGB;16B": 16 bits, of which Pillow keeps 8
    image: Image.Image = ImageOps.exif_transpose(file)
    deep = image.mode.startswith("I;16") or ";16" in rawmode
    if image.mode in ("I", "F") and not deep:
        raise ValueError("32-bit values, of which none is white; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, np.float32) / 257).round().astype(np.uint8))
    if deep and 0 < np.asarray(image.convert("RGB")).max() < 64:
        raise ValueError(DARK)
    return to_srgb(image)


@functools.lru_cache
def is_srgb(profile: bytes) -> bool:
    """Return whether a profile leaves colours as they are (its name proves nothing)."""
    colours = np.stack(np.meshgrid(*[np.arange(0, 256, 51, dtype=np.uint8)] * 3), -1)
    image = Image.fromarray(colours.reshape(6, 36, 3))
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if opened.profile.xcolor_space.strip() != "RGB":
        return False
    found = ImageCms.profileToProfile(image, opened, SRGB)
    return bool(np.abs(np.asarray(found).astype(int) - np.asarray(image)).max() <= 2)


def to_srgb(image: Image.Image) -> Image.Image:
    """Return the picture in sRGB where it has a colour profile of another space."""
    if not (data := image.info.get("icc_profile")):
        gamma = image.info.get("gamma", SRGB_GAMMA)
        if abs(gamma - SRGB_GAMMA) > 0.01 and "srgb" not in image.info:
            raise ValueError(f"its gamma is {gamma:g}, of sRGB 0.45455; save it as sRGB")
        return image
    if is_srgb(data):
        return image
    profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
    transparent = "A" in image.getbands() or "transparency" in image.info
    alpha = image.convert("RGBA").getchannel("A") if transparent else None
    mode = {"1": "L", "LA": "L"}.get(image.mode, image.mode)
    opaque = image.convert(mode if mode in ("L", "CMYK", "LAB") else "RGB")
    try:
        image = ImageCms.profileToProfile(opaque, profile, SRGB, outputMode="RGB") or opaque
    except ImageCms.PyCMSError as error:
        text = f"its colour profile ({error}) is not one for {mode} pictures; save it as sRGB"
        raise ValueError(text) from error
    if alpha:
        image.putalpha(alpha)
    return image


def font_of(text: str, usual: ImageFont.FreeTypeFont) -> ImageFont.FreeTypeFont:
    """Return a font that has the letters of a text, of this system or matplotlib's, else `usual`.

    Pillow's own is Latin without accents; what no font has stays a box.
    """
    try:
        from matplotlib import font_manager
    except ImportError:  # only evaluate.py needs it
        return usual
    wanted = {ord(letter) for letter in unicodedata.normalize("NFC", text) if not letter.isspace()}
    own = font_manager.findfont("DejaVu Sans")  # comes with matplotlib
    files = [own] if wanted <= letters_of(own) else [own, *sorted(font_manager.findSystemFonts())]
    missing = {file: len(wanted - letters_of(file)) for file in files}
    best = min(missing, key=lambda file: missing[file])  # the first of equal ones
    if missing[best]:
        warn_of_boxes()
    return ImageFont.truetype(best, usual.size)


@functools.cache
def warn_of_boxes() -> None:
    """Warn, the first time, that a sheet has letters without a font."""
    log.warning("boxes on sheets are letters that no font here has (fonts-noto-cjk has Chinese)")


@functools.cache
def letters_of(file: str) -> frozenset[int]:
    """Return the letters that a font can draw; none where it cannot be read."""
    from matplotlib import ft2font

    try:
        return frozenset(ft2font.FT2Font(file).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
