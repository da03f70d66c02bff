"""utils.py: config, signals, randomness, pictures, the file index, cache entries, a run's files."""

import json
import os
import signal
import sys
import time
import unicodedata
from functools import partial
from types import SimpleNamespace
from typing import Literal
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import Field

import utils
from train_qwen_edit import Argument
from utils import Checkpoints, FileIndex, Section, UserError, load_config


class Inner(Section):
    """Inner."""

    rank: int = Field(16, ge=1)
    """Rank of it."""
    name: str = "a"


class Outer(Section):
    """Outer."""

    inner: Inner = Inner()
    rows: list[Inner] = []
    table: dict[str, Inner] = {}
    need: Inner | None = None
    side: Literal["a", "b"] | int = 1
    rate: float = 0.1
    flip: bool = False
    args: dict[str, Argument] = {}
    text: str | None = ""
    files: list[str] = []

    def rules(self):
        return {"rate: too much": self.rate > 1, "flip: needs text": self.flip and not self.text}


def problems_of(argv, check=None):
    with pytest.raises(UserError) as error:
        load_config(Outer, argv, check)
    return str(error.value).splitlines()


def given(folder, text):
    (folder / "c.yaml").write_text(text)
    return ["--config", str(folder / "c.yaml")]


def test_overrides_win_whatever_their_order(tmp_path):
    yaml = "inner: {rank: 32}\nrate: 1e-4\nargs: {lr: 1e-4, word: no}\n"
    argv = ["--inner.rank=8", *given(tmp_path, yaml), "--flip", "--text", "no"]
    config = load_config(Outer, argv)
    assert (config.inner.rank, config.rate, config.flip, config.text) == (8, 1e-4, True, "no")
    assert config.args["lr"] == 1e-4
    assert load_config(Outer, [*argv, "--rate", "1", "--rate", "0.2"]).rate == 0.2
    merged = given(tmp_path, "table:\n  a: &a {rank: 3, name: x}\n  b: {<<: *a, name: y}\n")
    assert load_config(Outer, merged).table["b"] == Inner(rank=3, name="y")
    assert load_config(Outer, given(tmp_path, '{"rate": 0.5, "flip": false}')).rate == 0.5


@pytest.mark.parametrize(
    "argv",
    ["--files x --files y", "--files x y", "--files=[x,y]", "--files.0 x --files.1=y", "--files x"],
)
def test_lists_are_given_as_one_likes(argv):
    assert load_config(Outer, argv.split()).files == ["x", "y"][: 1 + ("y" in argv)]
    rows = load_config(Outer, ["--rows.0.rank", "2", "--rows.1.name", "b"]).rows
    assert [(row.rank, row.name) for row in rows] == [(2, "a"), (16, "b")]


@pytest.mark.parametrize("text", ["010", "12:30", "2026-11-21", "1e-4", "no", "~x", "a #b: c", ""])
def test_text_stays_as_typed(text, tmp_path):
    assert load_config(Outer, ["--text", text]).text == text
    quoted = f"'{text}'" if text in ("", "a #b: c") else text  # YAML 1.1 sees other types
    assert load_config(Outer, given(tmp_path, f"text: {quoted}\n")).text == text
    assert load_config(Outer, ["--text", "null"]).text is None


@pytest.mark.parametrize(
    "text", ["a: 1\na: 2\n", "- 1\n", "a: [\n", "inner:\n  rank: 1\n  rank: 2\n", "\x00"]
)
def test_a_file_that_is_no_config_is_named(text, tmp_path):
    assert str(tmp_path / "c.yaml") in "".join(problems_of(given(tmp_path, text)))
    assert "gone.yaml" in "".join(problems_of(["--config", "gone.yaml"]))


def test_every_wrong_setting_is_named_at_once_with_its_path(tmp_path):
    file = given(tmp_path, "inner: {rnk: 3}\nrows: [{rank: four}]\ntable: {x: {nam: y}}\n")
    argv = [*file, "--ratt", "1", "--side", "foo", "--need.rank", "0", "--rate", ".nan"]
    head, *lines = problems_of([*argv, "--flip", "1", "2"], lambda config: pytest.fail("checked"))
    wanted = {  # path: what was meant
        "inner.rnk": "'rank'",
        "rows.0.rank": "four",
        "table.x.nam": "'name'",
        "ratt": "'rate'",
        "need.rank": "0",
        "rate": "nan",
        "--flip": "1 2",
    }
    for path, meant in wanted.items():
        assert any(f"- {path}: " in line and meant in line for line in lines), path
    assert sum("side" in line for line in lines) == 2  # a or b, or a number
    assert len(lines) == 9 and head.startswith("9 ")
    assert len(problems_of(["--rate", "2", "--flip"])) == 3  # two rules
    assert "no folder z" in problems_of(["--rate", "1"], lambda config: ["no folder z"])[1]


def test_what_is_printed_can_be_loaded_again(tmp_path, capsys):
    argv = ["--rows.0.rank", "2", "--text", "no", "--args", "{a: 010, b: true}"]
    with pytest.raises(SystemExit) as ended:
        load_config(Outer, [*argv, "--print_config"], lambda config: pytest.fail("checked"))
    again = load_config(Outer, given(tmp_path, capsys.readouterr().out))
    assert ended.value.code == 0 and again == load_config(Outer, argv)


@pytest.mark.parametrize("wanted", [[], ["all"], ["inner"]])
def test_help_shows_settings_with_type_default_and_meaning(wanted, capsys):
    with pytest.raises(SystemExit) as ended:
        load_config(Outer, ["--help", *wanted])
    text = capsys.readouterr().out
    place = text.index("--inner.rank  (whole number; 16)")
    assert "Rank of it." in text[place:] and ended.value.code == 0
    assert ("--rate  (number; 0.1)" in text) == (wanted != ["inner"])
    assert ("--rows.*.name" in text) == (wanted != ["inner"])
    with pytest.raises(UserError, match="'inner'"):
        load_config(Outer, ["--help", "innr"])


@pytest.mark.parametrize(("error", "code"), [(UserError("x latest"), 2), (KeyboardInterrupt, 130)])
def test_a_script_ends_with_its_exit_code_and_words(error, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_x.py"])
    with pytest.raises(SystemExit) as ended:
        utils.run_script(Mock(side_effect=error))
    assert ended.value.code == code and "latest" in capsys.readouterr().err


def test_the_first_signal_is_noted_ctrl_c_after_it_stops():
    before = signal.getsignal(signal.SIGTERM)
    alone, trigger = SimpleNamespace(num_processes=1), []
    with utils.StopSignal() as stop:
        assert not stop.agreed(alone, ask=False)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed(alone, ask=False)
        os.kill(os.getpid(), signal.SIGTERM)  # the machine's and the launcher's
        assert stop.agreed(alone, ask=False)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before
    two = SimpleNamespace(num_processes=2, check_trigger=lambda: bool(trigger))
    two.set_trigger = lambda: trigger.append(1)
    assert not stop.agreed(two, ask=False) and not trigger  # the others are not waited for
    assert stop.agreed(two, ask=True)


def test_draws_belong_to_their_parts_and_not_to_the_order_of_calls():
    many = [utils.uniform(1, "u", i) for i in range(4000)]
    assert many[:9] == [utils.uniform(1, "u", i) for i in reversed(range(9))][::-1]
    assert min(many) >= 0 and max(many) < 1 and abs(sum(many) / 4000 - 0.5) < 0.02
    assert utils.uniform(1, "a", 0) != utils.uniform(1, "b", 0) != utils.uniform(2, "b", 0)
    state = torch.random.get_rng_state()
    noise = utils.normal((1000,), 1, "noise", 3)
    assert torch.equal(noise, utils.normal((1000,), 1, "noise", 3))
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    assert sorted(utils.shuffled(9, 1)) == list(range(9)) != utils.shuffled(9, 1)
    assert torch.equal(state, torch.random.get_rng_state())  # no global generator is touched


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "PA", "CMYK", "I;16", "exif"])
def test_every_kind_of_picture_opens_as_upright_rgb(mode, tmp_path):
    ramp = np.linspace(0, 255, 64 * 32).reshape(32, 64).astype(np.uint8)
    image, options, file = Image.fromarray(ramp), {}, tmp_path / "a.png"
    wanted = np.where(ramp == 0, 255, ramp) if mode == "PA" else ramp
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
    elif mode == "exif":
        options["exif"], wanted = Image.Exif(), np.rot90(ramp, -1)
        options["exif"][0x0112] = 6  # turn by 90 degrees
    elif mode == "PA":  # a palette of which black is transparent
        image, options["transparency"] = image.convert("P"), 0
    else:
        image, file = image.convert(mode), file.with_suffix(".jpg" if mode == "CMYK" else ".png")
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.new("L", image.size, 0))  # invisible: white
        wanted = np.full_like(ramp, 255)
    image.save(file, **options)
    pixels, facts = np.asarray(utils.open_rgb(file)).astype(int), utils.look_at_picture(file)
    assert pixels.shape == (facts["height"], facts["width"], 3)
    assert np.abs(pixels - wanted[..., None]).max() <= 4


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.txt"
    utils.save_text(file, "old")
    with pytest.raises(UserError, match=r"a.txt cannot be written: .*no number"):
        utils.save_atomic(file, lambda half: half.write_text("half") and int("no number"))
    assert file.read_text() == "old" and [f.name for f in tmp_path.iterdir()] == ["a.txt"]


def test_the_index_looks_at_new_and_changed_files_only(tmp_path):
    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.write_text(file.name)

    def update(files=files, damaged="", place=tmp_path / "cache"):
        index, seen = FileIndex(place), []

        def look(path):
            seen.append(path.name)
            if path.name == damaged:
                raise UserError(f"{path} is damaged")
            return {"text": path.read_text()}

        return index.update(files, look), sorted(seen), index[files[0]]["text"]

    assert update(damaged="c") == ([f"{files[2]} is damaged"], ["a", "b", "c"], "a")
    assert update() == ([], ["c"], "a")
    files[0].write_text("x")
    os.utime(files[0], ns=(1, 1))
    with (tmp_path / "cache/index.jsonl").open("a") as file:
        file.write('["cut of')  # by a kill
    assert update() == ([], ["a"], "x")
    first, second = FileIndex(tmp_path / "cache"), tmp_path / "d"
    second.write_text("d")
    update([second])  # another process appends
    first.update([tmp_path], lambda path: {})
    assert update([*files, second]) == ([], [], "x")
    # a place that cannot be written costs only time
    assert update(place=second / "cache") == ([], ["a", "b", "c"], "x")


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "gone"])
def test_entries_keep_every_bit_and_damage_is_noticed_and_named(harm, tmp_path):
    kinds = (torch.float32, torch.bfloat16, torch.int64)
    tensors = {str(kind): torch.randn(3, 5).to(kind) for kind in kinds}
    path = utils.entry_path(tmp_path, "ab" * 16)
    utils.save_tensors(path, tensors | {"none": torch.zeros(0, 2)})
    again = utils.read_entry(path)
    assert all(torch.equal(again[k], v) and again[k].dtype == v.dtype for k, v in tensors.items())
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes({"flip": bytes(data), "cut": bytes(data[:-9]), "empty": b""}[harm])
    with pytest.raises(UserError, match="ab" * 16):
        utils.read_entry(path)


def test_every_input_changes_a_cache_key(monkeypatch):
    inputs = [{"a": 1}, {"a": 2}, {"b": 1}, {"a": [1]}, {"a": "1"}]
    keys = {utils.cache_key(kind, **each) for kind in ("x", "y") for each in inputs}
    assert len(keys) == 10
    assert utils.cache_key("x", a=1, b=2) == utils.cache_key("x", b=2, a=1)
    monkeypatch.setattr(utils, "CACHE_FORMAT", utils.CACHE_FORMAT + 1)
    assert utils.cache_key("x", a=1) not in keys


def saved(checkpoints, *steps):
    for step in steps:
        write = lambda folder: (folder / "weights").write_text(folder.name)  # noqa: E731
        checkpoints.save(step, {"lr": 1}, {"step": step}, write)
    return checkpoints


def test_checkpoints_are_found_pruned_and_refused(tmp_path):
    checkpoints = saved(Checkpoints(tmp_path, limit=2), 1, 9, 10)
    names = ["checkpoint-9", "checkpoint-10"]  # in the order of numbers
    assert [folder.name for folder in checkpoints.folders()] == names
    assert checkpoints.find("latest", {"lr": 1}) == (tmp_path / "checkpoint-10", 10)
    assert torch.load(tmp_path / "checkpoint-10/training_state.pt") == {"step": 10}
    assert checkpoints.find(None, {}) is None
    for wanted, trained_as, named in (
        ("checkpoint-9", {"lr": 1}, "checkpoint-10"),  # is not mixed with newer ones
        ("latest", {"lr": 3, "batch": 2}, r"batch: was None, is 2\n.*lr: was 1, is 3"),
        ("checkpoint-8", {"lr": 1}, "checkpoint-8.*checkpoint-9"),
    ):
        with pytest.raises(UserError, match=named):
            checkpoints.find(wanted, trained_as)
    with checkpoints.only_run(), pytest.raises(UserError, match=str(tmp_path)):
        Checkpoints(tmp_path).only_run().__enter__()
    write = partial(utils.save_atomic, write=Mock(side_effect=OSError(28, "No space left")))
    with pytest.raises(UserError, match=r"checkpoint-11.*No space left") as full:
        checkpoints.save(11, {}, {}, lambda folder: write(folder / "x"))  # complete or absent
    said = utils.load_tool("check").room(f"train.py: {full.value}")
    assert "the disk is full" in said and f"MB are free in {tmp_path};" in said
    assert {path.name for path in tmp_path.iterdir()} - {".writer"} == {*names, ".lock"}
    checkpoints.set_aside()
    assert not checkpoints.folders() and (tmp_path / "earlier-1/checkpoint-9").is_dir()


@pytest.mark.parametrize("harm", [b"\xff\xfe\x00", b"[]", b'{"files": 3}', b"", "altered", "gone"])
def test_a_damaged_checkpoint_is_passed_over(harm, tmp_path):
    checkpoints, damaged = saved(Checkpoints(tmp_path), 1, 2), tmp_path / "checkpoint-2"
    if harm == "gone":
        (damaged / "weights").unlink()
    else:
        file, data = ("weights", b"3") if harm == "altered" else ("state.json", harm)
        (damaged / file).write_bytes(data)
    assert checkpoints.find("latest", {"lr": 1}) == (tmp_path / "checkpoint-1", 1)
    with pytest.raises(UserError, match="checkpoint-2"):
        checkpoints.find("checkpoint-2", {"lr": 1})
    checkpoints.limit = 1
    saved(checkpoints, 1)  # what was just saved stays, although 2 lies there
    assert checkpoints.find("latest", {"lr": 1}) == (tmp_path / "checkpoint-1", 1)
    saved(checkpoints, 2)  # written again, and 1 may go
    assert checkpoints.find("latest", {"lr": 1}) == (damaged, 2) and len(checkpoints.folders()) == 1


@pytest.mark.parametrize("step", [0, 2, 3, 4])
def test_metrics_go_on_from_the_step_of_the_checkpoint(step, tmp_path):
    accelerator = SimpleNamespace(is_main_process=True, trackers=[])
    accelerator.init_trackers = accelerator.log = lambda *args, **options: None
    lines = [json.dumps({"step": n, "loss": n}) + "\n" for n in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 4, "lo')  # cut off by a kill
    utils.RunLog(accelerator, tmp_path, Outer(), step).values(step + 1, {"loss": 30})
    rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    kept = [{"step": n, "loss": n} for n in range(1, min(step, 3) + 1)]
    assert rows == [*kept, {"step": step + 1, "loss": 30}]
    (tmp_path / "metrics.jsonl").unlink()
    utils.RunLog(accelerator, tmp_path, Outer(), step)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_captions_of_a_sheet_have_their_accents():
    def drawn(text):
        return utils.contact_sheet([[None, None]], ["before", text], [text]).tobytes()

    accented, unknown = "caf\u00e9", "caf\U0010fffd"
    assert drawn(accented) == drawn(unicodedata.normalize("NFD", accented)) != drawn(unknown)


def test_ahead_keeps_order_runs_before_it_is_asked_and_stays_near():
    begun = []

    def double(number):
        begun.append(number)
        if number == 30:
            raise UserError("thirty")
        return 2 * number

    found = utils.ahead(double, iter(range(100)))
    assert [next(found) for _ in range(5)] == [0, 2, 4, 6, 8]
    time.sleep(0.2)  # the threads have done what they may
    assert sorted(begun) == list(range(20))  # five taken, fifteen waiting
    assert [next(found) for _ in range(25)] == list(range(10, 60, 2))
    with pytest.raises(UserError, match="thirty"):
        next(found)
    assert list(utils.ahead(double, [])) == []


def test_ahead_reads_while_the_consumer_works():
    def seconds(results):
        started = time.perf_counter()
        for _ in results:
            time.sleep(0.02)  # an encoder on a GPU
        return time.perf_counter() - started

    def read(number):
        time.sleep(0.02)  # a decoder without the interpreter's lock

    together, alone = seconds(utils.ahead(read, range(20))), seconds(map(read, range(20)))
    assert together < 0.75 * alone


def test_an_empty_bar_is_not_drawn_and_another_is(capsys, monkeypatch):
    for total, drawn in ((0, False), (2, True)):
        assert list(utils.progress(iter(range(total)), "read", total=total)) == [*range(total)]
        assert ("read" in capsys.readouterr().err) == drawn
    monkeypatch.setenv("RANK", "1")
    assert utils.progress(None, "read", total=2).disable


def test_what_a_library_says_keeps_the_file_and_loses_the_number(tmp_path):
    with pytest.raises(UserError) as error, utils.named("part"):
        (tmp_path / "gone").read_text(encoding="utf-8")
    assert str(error.value) == f"part: No such file or directory: '{tmp_path / 'gone'}'"
