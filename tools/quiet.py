"""What libraries print and nobody can act on is left out, line by line; colours on a terminal.

utils.run_script() runs a script in quiet() where this file was copied along.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import tqdm.auto

LINES = {  # logger: what the line contains
    # a faster 4-bit product on CPUs, from a package that is none of ours; said on every import
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # the Pillow processor is the one we want: its pixels are those that the tests compare
    "transformers.utils.import_utils": "requires torchvision (not installed)",
    # every request to the Hub, at level INFO; what fails is raised
    "httpx": "HTTP Request: ",
}
BARS = {  # bars of libraries, by their label; ours say what is loaded
    "Loading weights",  # transformers: tensors of an encoder, in a fraction of a second
    "Loading pipeline components...",  # diffusers: the parts of a pipeline
    "Loading checkpoint shards",  # transformers and diffusers: the files of one part
}
WARNINGS = [  # what a warning begins with
    # accelerate hands our setting to torch, under the name that torch had before
    "`broadcast_buffers` is deprecated"
]
TRAINERS = ("train_qwen_edit", "train_pairedit", "train_dreambooth_pairs")
OURS = ("utils", "check", "pair_rows", *TRAINERS)  # loggers
COLOURS = {"red": "\x1b[31m", "yellow": "\x1b[33m", "bold": "\x1b[1m"}


class Bar(tqdm.auto.tqdm):  # type: ignore[misc]
    """A bar that is not drawn where its label is in BARS."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["disable"] = kwargs.get("desc") in BARS or kwargs.get("disable", False)
        super().__init__(*args, **kwargs)


def takes_colour(stream: Any) -> bool:
    """Return whether a stream is a terminal that shows colours (https://no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not plain and (os.name != "nt" or "WT_SESSION" in os.environ)


def paint(text: str, colour: str, stream: Any) -> str:
    """Return a text in a colour, where the stream takes it."""
    return f"{COLOURS[colour]}{text}\x1b[0m" if takes_colour(stream) else text


def is_wanted(record: logging.LogRecord) -> bool:
    """Return whether a library's line is not one of LINES."""
    return LINES[record.name] not in record.getMessage()


class Once(logging.Filter):
    """Lets each warning through once, in yellow; of processes but the first what only they know."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a line is new."""
        text, first = record.getMessage(), os.environ.get("RANK", "0") == "0"
        if record.levelno >= logging.ERROR or (record.levelno < logging.WARNING and first):
            return True
        if text in self.said or not (first or "built again" in text):
            return False
        self.said.add(text)
        record.msg, record.args = paint(text, "yellow", sys.stderr), ()
        return True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out what is listed above, and say each warning of our own once, inside `with`."""
    filters: dict[str, Any] = dict.fromkeys(LINES, is_wanted) | dict.fromkeys(OURS, Once())
    before = tqdm.auto.tqdm
    try:
        for name, its in filters.items():
            logging.getLogger(name).addFilter(its)
        tqdm.auto.tqdm = Bar  # both libraries look it up there for every bar
        with warnings.catch_warnings():
            for text in WARNINGS:
                warnings.filterwarnings("ignore", message=text)
            yield
    finally:
        tqdm.auto.tqdm = before
        for name, its in filters.items():
            logging.getLogger(name).removeFilter(its)
