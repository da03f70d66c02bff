"""utils.py: config, signals, randomness, pictures, the file index, cache entries, a run's files."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from pydantic import Field

import utils
from utils import Checkpoints, FileIndex, Section, UserError, load_config


class Inner(Section):
    """Inner."""

    rank: int = Field(16, ge=1)
    """Rank of it."""
    name: str = "a"
    """Name of it."""


class Outer(Section):
    """Outer."""

    inner: Inner = Inner()
    rows: list[Inner] = []
    table: dict[str, Inner] = {}
    need: Inner | None = None
    side: Literal["a", "b"] | int = 1
    rate: float = 0.1
    """Rate of it."""
    flip: bool = False
    args: dict[str, bool | float | str] = {}
    text: str | None = ""
    files: list[str] = []

    def rules(self):
        """Return {problem: whether it is there}."""
        return {"rate: too much": self.rate > 1, "flip: needs text": self.flip and not self.text}


def problems_of(argv, check=None):
    with pytest.raises(UserError) as error:
        load_config(Outer, argv, check)
    return str(error.value).splitlines()


def given(folder, text):
    file = folder / "c.yaml"
    file.write_text(text)
    return ["--config", str(file)]


# --- config ---------------------------------------------------------------------------------------


def test_overrides_win_whatever_their_order(tmp_path):
    file = given(tmp_path, "inner: {rank: 32}\nrate: 1e-4\nargs: {lr: 1e-4, word: no}\n")
    config = load_config(Outer, ["--inner.rank=8", *file, "--flip", "--text", "no"])
    assert (config.inner.rank, config.rate, config.flip, config.text) == (8, 1e-4, True, "no")
    assert config.args["lr"] == 1e-4
    assert load_config(Outer, [*file, "--rate", "1", "--rate", "0.2"]).rate == 0.2


@pytest.mark.parametrize(
    ("argv", "files"),
    [
        (["--files", "x", "--files", "y"], ["x", "y"]),
        (["--files", "x", "y"], ["x", "y"]),
        (["--files", "[x, y]"], ["x", "y"]),
        (["--files.0", "x", "--files.1=y"], ["x", "y"]),
        (["--files", "x"], ["x"]),
    ],
)
def test_lists_are_given_as_one_likes(argv, files):
    assert load_config(Outer, argv).files == files
    rows = load_config(Outer, ["--rows.0.rank", "2", "--rows.1.name", "b"]).rows
    assert [(row.rank, row.name) for row in rows] == [(2, "a"), (16, "b")]


@pytest.mark.parametrize(
    "text",
    [
        "make it: red",
        "red # now",
        "010",
        "12:30",
        "2026-11-21",
        "1e-4",
        "a\nb",
        "- x",
        "no",
        "",
        "~x",
    ],
)
def test_text_stays_as_typed(text, tmp_path):
    assert load_config(Outer, ["--text", text]).text == text
    if text in ("010", "12:30", "2026-11-21", "1e-4", "no", "~x"):  # YAML 1.1 sees other types
        assert load_config(Outer, given(tmp_path, f"text: {text}\n")).text == text
    assert load_config(Outer, ["--text", "null"]).text is None


def test_json_and_merge_keys_are_read(tmp_path):
    yaml = "table:\n  a: &a {rank: 3, name: x}\n  b: {<<: *a, name: y}\n"
    table = load_config(Outer, given(tmp_path, yaml)).table
    assert (table["b"].rank, table["b"].name) == (3, "y")
    found = load_config(Outer, given(tmp_path, '{"rate": 0.5, "flip": false, "text": "x"}'))
    assert (found.rate, found.flip, found.text) == (0.5, False, "x")


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


def test_rules_are_checked_together_and_data_only_after_the_settings():
    lines = problems_of(["--rate", "2", "--flip"])
    assert len(lines) == 3 and "rate" in lines[1] and "flip" in lines[2]
    assert "no folder z" in problems_of(["--rate", "1"], lambda config: ["no folder z"])[1]


def test_what_is_printed_can_be_loaded_again(tmp_path, capsys):
    argv = ["--rows.0.rank", "2", "--text", "no", "--args", "{a: 010, b: true}"]
    with pytest.raises(SystemExit) as ended:
        load_config(Outer, [*argv, "--print_config"], lambda config: pytest.fail("checked"))
    again = load_config(Outer, given(tmp_path, capsys.readouterr().out))
    assert ended.value.code == 0 and again == load_config(Outer, argv)


@pytest.mark.parametrize("wanted", [[], ["all"], ["inner"], ["innr"]])
def test_help_shows_settings_with_type_default_and_meaning(wanted, capsys):
    with pytest.raises((SystemExit, UserError)) as ended:
        load_config(Outer, ["--help", *wanted])
    text = capsys.readouterr().out
    if wanted == ["innr"]:
        assert "'inner'" in str(ended.value)
        return
    place = text.index("--inner.rank  (whole number; 16)")
    assert "Rank of it." in text[place:] and ended.value.code == 0
    assert ("--rate  (number; 0.1)" in text) == (wanted != ["inner"])
    assert ("--rows.*.name" in text) == (wanted != ["inner"])


# --- errors and signals ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [(UserError("no folder z"), 2, "no folder z"), (KeyboardInterrupt(), 130, "latest")],
)
def test_a_script_ends_with_its_exit_code(error, code, words, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setattr(sys, "argv", ["train_x.py"])
    with pytest.raises(SystemExit) as ended:
        utils.run_script(fail)
    assert ended.value.code == code and words in capsys.readouterr().err


def test_the_first_signal_is_noted_the_second_stops():
    before = signal.getsignal(signal.SIGTERM)
    alone = SimpleNamespace(num_processes=1)
    with utils.StopSignal() as stop:
        assert not stop.agreed(alone, ask=False)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and stop.agreed(alone, ask=False)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before
    told = []
    two = SimpleNamespace(
        num_processes=2, set_trigger=lambda: told.append(1), check_trigger=lambda: bool(told)
    )
    assert not stop.agreed(two, ask=False) and not told  # the others are not waited for
    assert stop.agreed(two, ask=True)


# --- randomness -----------------------------------------------------------------------------------


def test_draws_belong_to_their_parts_and_not_to_the_order_of_calls():
    first = [utils.uniform(1, "a", i) for i in range(5)]
    assert first == [utils.uniform(1, "a", i) for i in reversed(range(5))][::-1]
    assert utils.uniform(1, "a", 0) != utils.uniform(1, "b", 0) != utils.uniform(2, "b", 0)
    state = torch.random.get_rng_state()
    noise = utils.normal((1000,), 1, "noise", 3)
    assert torch.equal(noise, utils.normal((1000,), 1, "noise", 3))
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    assert sorted(utils.shuffled(9, 1)) == list(range(9)) != utils.shuffled(9, 1)
    assert torch.equal(state, torch.random.get_rng_state())  # no global generator is touched
    many = [utils.uniform("u", i) for i in range(4000)]
    assert min(many) >= 0 and max(many) < 1 and abs(sum(many) / 4000 - 0.5) < 0.02


def test_another_process_draws_the_same_and_needs_no_model_library():
    heavy = ("diffusers", "transformers", "peft", "accelerate")
    code = f"import sys, utils; print(utils.draw_key(1, 'x'), *({{*{heavy}}} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == [str(utils.draw_key(1, "x"))]


# --- pictures and files ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode", ["L", "RGB", "RGBA", "LA", "P", "PA", "CMYK", "I;16", "F", "1", "exif"]
)
def test_every_kind_of_picture_opens_as_upright_rgb(mode, tmp_path):
    ramp = np.linspace(0, 255, 64 * 32).reshape(32, 64).astype(np.uint8)
    image, options, ending = Image.fromarray(ramp), {}, ".png"
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
    elif mode == "exif":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6  # turn by 90 degrees
    elif mode == "PA":  # a palette of which black is transparent
        image, options["transparency"] = image.convert("P"), 0
    elif mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(Image.new("L", image.size, 0))  # invisible: white
    else:
        ending = {"CMYK": ".jpg", "F": ".tiff"}.get(mode, ".png")
        image = image.convert(mode)
    image.save(tmp_path / f"a{ending}", **options)
    pixels = np.asarray(utils.open_rgb(tmp_path / f"a{ending}")).astype(int)
    facts = utils.look_at_picture(tmp_path / f"a{ending}")
    assert pixels.shape == (facts["height"], facts["width"], 3)
    wanted = {"exif": np.rot90(ramp, -1), "1": np.where(ramp > 127, 255, 0)}.get(mode, ramp)
    wanted = np.full_like(ramp, 255) if mode in ("RGBA", "LA") else wanted
    wanted = np.where(ramp == 0, 255, ramp) if mode == "PA" else wanted
    if mode == "1":  # dithered
        assert set(np.unique(pixels)) == {0, 255} and abs(pixels.mean() - ramp.mean()) < 4
    else:
        assert np.abs(pixels - wanted[..., None]).max() <= 4


@pytest.mark.parametrize("data", [b"", b"no picture", "half"])
def test_a_picture_that_cannot_be_read_is_named(data, tmp_path):
    file = tmp_path / "a.png"
    Image.effect_noise((64, 64), 50).save(file)
    file.write_bytes(file.read_bytes()[:2000] if data == "half" else data)
    with pytest.raises(UserError, match=str(file)):
        utils.open_rgb(file)


def test_a_sheet_keeps_aspects_and_cuts_long_text():
    row = [Image.new("RGB", (80, 40), "red"), None, Image.new("RGB", (40, 80), "blue")]
    sheet = utils.contact_sheet([row], ["before", "", "after"], ["word " * 200], 100)
    assert sheet.size == (3 * 108 + 8, 24 + 100 + 8 + 24)
    assert sheet.getpixel((8 + 99, 24 + 49)) == (255, 0, 0)  # fitted, from the left top
    assert sheet.getpixel((8 + 99, 24 + 51)) == sheet.getpixel((8 + 108, 30)) == (255, 255, 255)
    assert sheet.getpixel((8 + 216, 24 + 99)) == (0, 0, 255)
    assert (np.asarray(sheet)[:, -8:] == 255).all()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.txt"
    utils.save_text(file, "old")

    def fail(temporary):
        temporary.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        utils.save_atomic(file, fail)
    assert file.read_text() == "old" and [f.name for f in tmp_path.iterdir()] == ["a.txt"]


def test_the_index_looks_at_new_and_changed_files_only(tmp_path):
    files = [tmp_path / name for name in ("a", "b", "c")]
    for file in files:
        file.write_text(file.name)
    seen = []

    def look(path):
        seen.append(path.name)
        if path.name == "c":
            raise UserError("c is damaged")
        return {"text": path.read_text()}

    def update():
        seen.clear()
        index = FileIndex(tmp_path / "cache")
        return index, index.update(files, look), sorted(seen)

    assert update()[1:] == (["c is damaged"], ["a", "b", "c"])
    index, problems, looked = update()
    assert (problems, looked) == (["c is damaged"], ["c"]) and index[files[0]] == {"text": "a"}
    files[0].write_text("x")
    os.utime(files[0], ns=(1, 1))
    files.pop()
    index, problems, looked = update()
    assert (problems, looked) == ([], ["a"]) and index[files[0]] == {"text": "x"}
    # two processes append at the same time; one of them is killed in the middle of a line
    other, third = FileIndex(tmp_path / "cache"), tmp_path / "d"
    third.write_text("d")
    other.update([third], look)
    index.update([tmp_path / "c"], lambda path: {"text": "mended"})
    with (tmp_path / "cache/index.jsonl").open("a") as file:
        file.write('["cut of')
    files += [third, tmp_path / "c"]
    assert update()[1:] == ([], [])
    FileIndex(None).update(files, look)  # in memory
    assert update()[1:] == (["c is damaged"], [])[:0] or update()[1:] == ([], [])


# --- cache ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_entries_keep_every_bit(dtype, tmp_path):
    tensors = {"a": torch.randn(3, 5).to(dtype), "b": torch.zeros(0, 2).to(dtype)}
    path = utils.write_entry(tmp_path, "ab" * 16, tensors)
    assert path == tmp_path / "ab" / "ab" / f"{'ab' * 16}.safetensors"
    again = utils.read_entry(path)
    assert all(torch.equal(again[k], v) and again[k].dtype == dtype for k, v in tensors.items())


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "gone"])
def test_a_damaged_entry_is_noticed_and_named(harm, tmp_path):
    path = utils.write_entry(tmp_path, "ab" * 16, {"a": torch.arange(100.0)})
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes({"flip": bytes(data), "cut": bytes(data[:-9]), "empty": b""}[harm])
    with pytest.raises(ValueError, match="ab" * 16):
        utils.read_entry(path)


def test_every_input_changes_a_cache_key(monkeypatch):
    inputs = [{"a": 1}, {"a": 2}, {"b": 1}, {"a": [1]}, {"a": "1"}]
    keys = {utils.cache_key(kind, **each) for kind in ("x", "y") for each in inputs}
    assert len(keys) == 10
    assert utils.cache_key("x", a=1, b=2) == utils.cache_key("x", b=2, a=1)
    monkeypatch.setattr(utils, "CACHE_FORMAT", utils.CACHE_FORMAT + 1)
    assert utils.cache_key("x", a=1) not in keys


# --- a run ----------------------------------------------------------------------------------------


def saved(checkpoints, *steps, **trained_as):
    for step in steps:
        write = lambda folder, step=step: (folder / "weights").write_text(str(step))  # noqa: E731
        checkpoints.save(step, {"lr": 1, **trained_as}, {"step": step}, write)
    return checkpoints


def test_checkpoints_are_found_pruned_and_passed_over(tmp_path):
    checkpoints = saved(Checkpoints(tmp_path, limit=2), 1, 9, 10)
    names = ["checkpoint-9", "checkpoint-10"]  # in the order of numbers
    assert [folder.name for folder in checkpoints.folders()] == names
    assert checkpoints.find("latest", {"lr": 1}) == (tmp_path / "checkpoint-10", 10)
    assert torch.load(tmp_path / "checkpoint-10/training_state.pt") == {"step": 10}
    assert checkpoints.find(None, {}) is None
    with pytest.raises(UserError, match="checkpoint-10"):  # 9 is not mixed with newer ones
        checkpoints.find("checkpoint-9", {"lr": 1})
    with pytest.raises(UserError, match=r"batch: was None, is 2\n.*lr: was 1, is 3"):
        checkpoints.find("latest", {"lr": 3, "batch": 2})
    with pytest.raises(UserError, match="checkpoint-8.*checkpoint-9"):
        checkpoints.find("checkpoint-8", {"lr": 1})


@pytest.mark.parametrize("harm", [b"\xff\xfe\x00", b"[]", b'{"files": 3}', b"", "altered", "gone"])
def test_a_damaged_checkpoint_is_passed_over(harm, tmp_path):
    checkpoints = saved(Checkpoints(tmp_path, limit=1), 1)
    checkpoints.limit = 2
    saved(checkpoints, 2)
    if harm == "gone":
        (tmp_path / "checkpoint-2/weights").unlink()
    elif harm == "altered":
        (tmp_path / "checkpoint-2/weights").write_text("3")
    else:
        (tmp_path / "checkpoint-2/state.json").write_bytes(harm)
    assert checkpoints.state(tmp_path / "checkpoint-2") is None
    assert checkpoints.find("latest", {"lr": 1}) == (tmp_path / "checkpoint-1", 1)
    with pytest.raises(UserError, match="checkpoint-2"):
        checkpoints.find("checkpoint-2", {"lr": 1})
    checkpoints.limit = 1
    saved(checkpoints, 2)  # written again, and 1 may go
    assert checkpoints.find("latest", {"lr": 1}) == (tmp_path / "checkpoint-2", 2)
    assert len(checkpoints.folders()) == 1


def test_a_checkpoint_is_complete_or_absent(tmp_path):
    checkpoints = saved(Checkpoints(tmp_path, limit=1), 1)

    def fail(folder):
        (folder / "weights").write_text("half")
        raise OSError("disk full")

    with pytest.raises(UserError, match="checkpoint-2.*disk full"):
        checkpoints.save(2, {}, {}, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    with checkpoints.only_run(), pytest.raises(UserError, match=str(tmp_path)):
        with Checkpoints(tmp_path).only_run():
            pytest.fail("two runs write into one folder")


def test_an_earlier_run_is_set_aside(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for number in (1, 2):
        saved(checkpoints, 3)
        (tmp_path / "x.safetensors").write_text(str(number))
        checkpoints.set_aside("*.safetensors")
        assert (tmp_path / f"earlier-{number}/x.safetensors").read_text() == str(number)
        assert (tmp_path / f"earlier-{number}/checkpoint-3/state.json").exists()
    assert not checkpoints.folders()
    checkpoints.set_aside("*.safetensors")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_run_leaves_what_it_was(tmp_path):
    fork = tmp_path / "my_fork.py"
    fork.write_text("print(1)")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/run.json").write_text('{"a": ')  # cut off by a kill
    config = load_config(Outer, ["--text", "größer"])
    utils.run_record(tmp_path / "out", config, fork)
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["config"]["text"] == "größer" and record["argv"] == sys.argv
    assert record["code_blake2b"]["my_fork.py"] == utils.hash_file(tmp_path / "out/my_fork.py")
    assert (tmp_path / "out/utils.py").read_bytes() == (ROOT / "utils.py").read_bytes()
    assert load_config(Outer, ["--config", str(tmp_path / "out/config.yaml")]) == config


@pytest.mark.parametrize("step", [0, 2, 3, 4])
def test_metrics_go_on_from_the_step_of_the_checkpoint(step, tmp_path):
    told = []
    accelerator = SimpleNamespace(
        is_main_process=True, trackers=[], init_trackers=lambda *a: None, log=lambda *a, **k: told
    )
    lines = [json.dumps({"step": n, "loss": n}) + "\n" for n in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 4, "lo')  # cut off by a kill
    utils.RunLog(accelerator, tmp_path, Outer(), step).values(step + 1, {"loss": 30})
    rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    kept = [{"step": n, "loss": n} for n in range(1, min(step, 3) + 1)]
    assert rows == [*kept, {"step": step + 1, "loss": 30}]
    (tmp_path / "metrics.jsonl").unlink()
    utils.RunLog(accelerator, tmp_path, Outer(), step)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
