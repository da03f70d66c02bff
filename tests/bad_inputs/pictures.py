"""Pictures that a folder of pairs may hold: (name, what writes it, what is said of it, or None)."""

import os
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms

RAMP = np.linspace(0, 255, 64 * 32).reshape(32, 64)  # (H, W), 0..255


def ramp(dtype=np.uint8, scale=1.0):
    return Image.fromarray((RAMP * scale).astype(dtype))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(path, size, bits, data):
    """A PNG of three channels as Pillow would not write it; size: (W, H)."""
    head = struct.pack(">IIBBBBB", *size, bits, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def png16(path, scale):
    values = np.repeat((RAMP * scale)[..., None], 3, 2).astype(">u2")
    png(path, (64, 32), 16, zlib.compress(b"".join(b"\0" + row.tobytes() for row in values)))


def frames(path, **how):
    colours = [Image.new("RGB", (64, 32), colour) for colour in ("red", "green", "blue")]
    colours[0].save(path, save_all=True, append_images=colours[1:], **how)


def profile(name):
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes()


def cut(path):
    ramp().convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:-90])


NOT_READ = "cannot be read"
REFUSED = {
    "empty.png": (lambda p: p.write_bytes(b""), NOT_READ),
    "text.png": (lambda p: p.write_text("no picture"), NOT_READ),
    "cut.png": (cut, NOT_READ),
    "cut.jpg": (cut, NOT_READ),
    "cut.webp": (cut, NOT_READ),
    "script.png": (
        lambda p: p.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        NOT_READ,
    ),
    "drawing.png": (lambda p: p.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"), NOT_READ),
    "icon.png": (lambda p: ramp().save(p, format="ICO"), NOT_READ),
    "portable.png": (lambda p: ramp().save(p, format="PPM"), NOT_READ),
    "document.png": (lambda p: ramp().save(p, format="PDF"), NOT_READ),
    "huge.png": (lambda p: png(p, (20_000, 20_000), 8, b""), "20000 x 20000 px.*MAX_PIXELS"),
    "moving.gif": (frames, "3 frames"),
    "moving.webp": (lambda p: frames(p, lossless=True), "3 frames"),
    "moving.png": (frames, "3 frames"),
    "pages.tiff": (frames, "3 frames"),
    "twelve_bits.png": (lambda p: ramp(np.uint16, 16).save(p), "12- and 14-bit"),
    "twelve_bits.tiff": (lambda p: ramp(np.uint16, 16).save(p), "12- and 14-bit"),
    "twelve_bit_colours.png": (lambda p: png16(p, 16), "12- and 14-bit"),
    "fractions.tiff": (lambda p: ramp(np.float32, 1 / 255).save(p), "32-bit values"),
    "floats.tiff": (lambda p: ramp(np.float32).save(p), "32-bit values"),
    "nan.tiff": (lambda p: ramp(np.float32, np.nan).save(p), "32-bit values"),
    "integers.tiff": (lambda p: ramp(np.int32).save(p), "32-bit values"),
    "negative.tiff": (lambda p: ramp(np.int32, -1).save(p), "32-bit values"),
    "broken_profile.png": (lambda p: ramp().save(p, icc_profile=b"none"), "profile"),
    "lab_profile.png": (lambda p: ramp().save(p, icc_profile=profile("LAB")), "transform"),
    "pipe.png": (os.mkfifo, "pipe or device"),
    "device.png": (lambda p: p.symlink_to("/dev/zero"), "pipe or device"),
    "thread.png": (lambda p: Image.new("RGB", (3000, 8)).save(p), "3000 x 8"),
}


def grey16(path):
    ramp(np.uint16, 257).save(path)


def turned(path):
    """A TIFF that is stored on its side, which Pillow maps into memory."""
    Image.fromarray(np.rot90(RAMP).astype(np.uint8).copy()).save(path, tiffinfo={0x112: 6})


def invisible(path):
    image = ramp().convert("RGBA")
    image.putalpha(0)
    image.save(path)


READ = {  # what writes it, and its grey values as they must arrive
    "grey16.png": (grey16, RAMP),
    "grey16.tiff": (grey16, RAMP),
    "colours16.png": (lambda p: png16(p, 257), RAMP),
    "one_frame.gif": (lambda p: ramp().save(p), RAMP),
    "photo.jfif": (lambda p: ramp().save(p, format="JPEG"), RAMP),
    "photo.avif": (lambda p: ramp().convert("RGB").save(p, quality=100), RAMP),
    "turned.tiff": (turned, RAMP),
    "cmyk.tiff": (lambda p: ramp().convert("CMYK").save(p), RAMP),
    "invisible.png": (invisible, np.full_like(RAMP, 255)),
    "standard.png": (lambda p: ramp().save(p, icc_profile=profile("sRGB")), RAMP),
    "LAST.TIF": (lambda p: ramp().save(p), RAMP),
}
