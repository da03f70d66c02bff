"""Libraries are silent about what nobody can act on; own warnings come once; colours on request."""

import io
import logging
import warnings

import pytest
import tqdm.auto
from conftest import PAIRS, run
from PIL import Image

from utils import load_tool

quiet = load_tool("quiet")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_only_the_named_lines_and_bars_are_left_out(capsys):
    said = []

    class Kept(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    logger, handler = logging.getLogger("transformers.utils.import_utils"), Kept()
    logger.addHandler(handler)
    try:
        with quiet.quiet():
            logger.warning("`XImageProcessor` requires torchvision (not installed); falling back")
            logger.warning("the weights of x were not used")
            list(tqdm.auto.tqdm([1], desc="Loading weights"))
            list(tqdm.auto.tqdm([1], desc="Downloading"))
        logger.warning("requires torchvision (not installed)")
    finally:
        logger.removeHandler(handler)
    assert said == ["the weights of x were not used", "requires torchvision (not installed)"]
    drawn = capsys.readouterr().err
    assert "Downloading" in drawn and "Loading weights" not in drawn


def test_a_warning_of_our_own_comes_once(caplog):
    log = logging.getLogger("utils")
    with quiet.quiet():
        for name in ("a", "a", "b"):
            log.warning("%s is left out", name)
    assert [record.getMessage() for record in caplog.records] == ["a is left out", "b is left out"]


def test_a_warning_that_is_not_named_is_still_said(recwarn):
    with quiet.quiet():
        warnings.warn("`broadcast_buffers` is deprecated. Use another", FutureWarning, stacklevel=1)
        warnings.warn("something else is deprecated", FutureWarning, stacklevel=1)
    assert [str(w.message) for w in recwarn] == ["something else is deprecated"]


def test_other_processes_warn_of_their_cache_alone(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("RANK", "1")
    with quiet.quiet():
        logging.getLogger("utils").info("starting from step 0")
        for text in ("note: two pairs", "entry x is damaged; it is built again"):
            logging.getLogger("train_qwen_edit").warning(text)
    assert [record.getMessage()[:7] for record in caplog.records] == ["entry x"]


@pytest.mark.parametrize("none", ["NO_COLOR", "TERM"])
def test_colours_where_the_terminal_takes_them(none, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert quiet.paint("wrong", "red", Terminal()) == "\x1b[31mwrong\x1b[0m"
    assert quiet.paint("wrong", "red", io.StringIO()) == "wrong"
    monkeypatch.setenv(none, "dumb")
    assert quiet.paint("wrong", "red", Terminal()) == "wrong"


@pytest.mark.slow
def test_a_run_says_one_line_a_stage_and_nothing_of_libraries(checkpoints, tmp_path):
    """Also that a pair of two shapes is named, before the model loads."""
    for place, size in (("before", (96, 64)), ("after", (64, 64))):
        (tmp_path / place).mkdir()
        with Image.open(PAIRS / "coffee0_R.png") as photo:
            turned = photo.convert("RGB").resize(size)
        turned.putpixel((0, 0), (0, 0, len(place)))
        turned.save(tmp_path / place / "a.png")
    (tmp_path / "after/a.txt").write_text("make it snow")
    done = run(
        "train_qwen_edit.py",
        *("--model.pretrained_model_name_or_path", checkpoints["2511"], "--seed", 0),
        *("--data.dataset_configs.0.train_data_dir", tmp_path, "--data.num_workers", 0),
        *("--data.dataset_configs.0.target_dir", "after", "--data.reference_area", "target"),
        *("--data.dataset_configs.0.reference_dirs", "[before]", "--train.max_train_steps", 1),
        *("--data.dataset_configs.0.resolution", 64, "--cache.cache_dir", tmp_path / "cache"),
        *("--logging.output_dir", tmp_path / "out"),
    )
    lines = [line.split("\r")[-1] for line in (done.stdout + done.stderr).splitlines()]
    ours = ("note", "  - ", str(tmp_path), "cache:", "LoRA:", "edit-v3", "step ", "report:")
    ours += ("pictures:", "to try it:", "done at", "encode ", "load ", "train:")
    assert not [line for line in lines if line.strip() and not line.startswith(ours)]
    assert sum("after/a.png" in line and "aspect" in line for line in lines) == 1
