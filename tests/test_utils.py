"""utils.py: config, randomness, files, cache entries, run record."""

import json
import os
import subprocess
import sys
from typing import Literal

import pytest
import torch
from conftest import ROOT
from pydantic import Field, field_validator

import utils
from utils import Section, UserError, load_config


class Inner(Section):
    """Inner."""

    rank: int = Field(16, ge=1)
    """Rank."""
    name: str = "a"
    """Name."""


class Need(Section):
    """Need."""

    name: str


class Outer(Section):
    """Outer."""

    inner: Inner = Inner()
    rows: list[Inner] = []
    table: dict[str, Inner] = {}
    rate: float = 0.1
    """Rate."""
    flip: bool = False
    args: dict = {}
    text: str = ""
    files: list[str] = []


def problems_of(argv, check=None):
    with pytest.raises(UserError) as error:
        load_config(Outer, argv, check)
    return str(error.value)


def test_overrides_win_whatever_their_order(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("inner: {rank: 32}\nrate: 1e-4\nargs: {lr: 1e-4, word: no}\n")
    config = load_config(Outer, ["--inner.rank=8", "--config", str(file), "--flip", "--text", "no"])
    assert (config.inner.rank, config.rate, config.flip, config.text) == (8, 1e-4, True, "no")
    assert config.args == {"lr": 1e-4, "word": "no"}  # YAML 1.1 reads "1e-4" and False


def test_lists_grow_by_dotted_overrides_and_repeated_flags():
    config = load_config(
        Outer, ["--rows.0.rank", "2", "--rows.1.name", "b", "--files", "x", "--files", "y"]
    )
    assert [row.rank for row in config.rows] == [2, 16] and config.rows[1].name == "b"
    assert config.files == ["x", "y"]
    assert load_config(Outer, ["--files", "x"]).files == ["x"]
    assert load_config(Outer, ["--rate", "1", "--rate", "2"]).rate == 2  # else the last one counts


@pytest.mark.parametrize(
    "text", ["make it: red", "red # now", "010", "12:30", "2026-11-21", "a\nb", "- x", "no", ""]
)
def test_text_stays_as_typed(text, tmp_path):
    assert load_config(Outer, ["--text", text]).text == text
    file = tmp_path / "c.yaml"
    file.write_text(f"text: {text}\n" if text in ("010", "12:30", "2026-11-21", "no") else "")
    assert load_config(Outer, ["--config", str(file)]).text in (text, "")


def test_merge_keys_work(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("table:\n  a: &a {rank: 3, name: x}\n  b: {<<: *a, name: y}\n")
    table = load_config(Outer, ["--config", str(file)]).table
    assert (table["b"].rank, table["b"].name) == (3, "y")


def test_the_rest_is_checked_whatever_is_wrong(tmp_path):
    class Choice(Section):
        area: int | str = 1
        side: Literal["a", "b"] | int = 1
        need: Inner | None = None
        rows: list[Need] = []

    seen = []
    with pytest.raises(UserError) as error:
        load_config(
            Choice,
            ["--side", "foo", "--rows.0.nam", "x", "--need.rank", "0"],
            lambda config: seen.append(config) or ["no folder z"],
        )
    text = str(error.value)
    assert seen and "no folder z" in text and "side: Input should be 'a' or 'b'" in text
    assert "rows.0.name: Field required" in text and "need.rank: Input should be" in text
    assert "5 problem(s)" in text  # nam, name, side, need.rank, folder


def test_an_index_in_use_by_one_process_is_open_to_another(tmp_path):
    """A fill of hours must not lock the others out between its commits."""
    first, second = utils.FileIndex(tmp_path), utils.FileIndex(tmp_path)
    file = tmp_path / "a"
    file.write_text("x")
    first.put(file, file.stat(), {"content": "1"})
    second._db.execute("PRAGMA busy_timeout = 100")
    second.put(tmp_path, tmp_path.stat(), {"content": "2"})
    second.commit()  # the first has not committed yet
    first.commit()
    third = utils.FileIndex(tmp_path)
    assert third.known(file) == {"content": "1"} and third.known(tmp_path) == {"content": "2"}


def test_a_damaged_index_is_made_anew(tmp_path):
    (tmp_path / "index.sqlite").write_bytes(b"no database" * 100)
    index = utils.FileIndex(tmp_path)
    file = tmp_path / "a"
    file.write_text("x")
    index.put(file, file.stat(), {"content": "y"})
    index.commit()
    assert utils.FileIndex(tmp_path).get(file, file.stat()) == {"content": "y"}


def test_every_problem_is_named_at_once_with_its_path(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("inner: {rnk: 3}\nrows: [{rank: four}]\ntable: {x: {nam: y}}\n")
    text = problems_of(["--config", str(file), "--ratt", "1"], lambda config: ["no folder z"])
    assert "inner.rnk: unknown setting, did you mean 'rank'?" in text
    assert "rows.0.rank" in text and "table.x.nam: unknown setting, did you mean 'name'?" in text
    assert "ratt: unknown setting, did you mean 'rate'?" in text
    assert "no folder z" in text  # the data is checked although the config is wrong


def test_a_wrong_value_in_a_list_that_a_validator_cuts_is_named():
    class Strip(Section):
        """Strip."""

        scales: list[float] = []

        @field_validator("scales", mode="before")
        @classmethod
        def _split(cls, value):
            return value[0].split(",")

    with pytest.raises(UserError, match=r"scales: Input should be a valid number.*got 'x'"):
        load_config(Strip, ["--scales", "0,x"])


@pytest.mark.parametrize("value", [".nan", ".inf", "nan", "-inf"])
def test_a_setting_is_a_finite_number(value):
    assert "rate: Input should be a finite number" in problems_of(["--rate", value])


@pytest.mark.parametrize(
    "text", ["a: 1\na: 2\n", "- 1\n", "a: [\n", "inner:\n  rank: 1\n  rank: 2\n"]
)
def test_bad_yaml_is_a_message(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert str(file) in problems_of(["--config", str(file)])


def test_print_config_can_be_loaded_again(tmp_path, capsys):
    with pytest.raises(SystemExit):
        load_config(Outer, ["--rows.0.rank", "2", "--print_config", "--text", "no"])
    file = tmp_path / "c.yaml"
    file.write_text(capsys.readouterr().out)
    again = load_config(Outer, ["--config", str(file)])
    assert again == load_config(Outer, ["--rows.0.rank", "2", "--text", "no"])


def test_help_shows_every_setting_with_its_meaning(capsys):
    with pytest.raises(SystemExit):
        load_config(Outer, ["--help"])
    text = capsys.readouterr().out
    assert "--inner.rank  int  = 16\n        Rank." in text and "--rows.*.rank" in text


def test_draws_belong_to_their_parts_and_not_to_the_order_of_calls():
    first = [utils.uniform(1, "a", i) for i in range(5)]
    assert first == [utils.uniform(1, "a", i) for i in reversed(range(5))][::-1]
    assert utils.uniform(1, "a", 0) != utils.uniform(1, "b", 0) != utils.uniform(2, "b", 0)
    state = torch.random.get_rng_state()
    noise = utils.normal((1000,), 1, "noise", 3)
    assert torch.equal(noise, utils.normal((1000,), 1, "noise", 3))
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    assert torch.equal(state, torch.random.get_rng_state())  # no global generator is touched
    many = [utils.uniform("u", i) for i in range(4000)]
    assert min(many) >= 0 and max(many) < 1 and abs(sum(many) / 4000 - 0.5) < 0.02
    assert sorted(utils.shuffled(9, 1)) == list(range(9)) != utils.shuffled(9, 1)


def test_draws_are_the_same_in_another_process():
    code = "import utils; print(utils.draw_key(1, 'x'), utils.normal((2,), 1).tolist())"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.split()[0] == str(utils.draw_key(1, "x"))
    assert str(utils.normal((2,), 1).tolist()) in out.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_entries_keep_every_bit(tmp_path, dtype):
    tensors = {"a": torch.randn(3, 5).to(dtype), "b": torch.zeros(0, 2).to(dtype)}
    path = utils.write_entry(tmp_path, "ab" * 16, tensors)
    assert path == tmp_path / "ab" / "ab" / f"{'ab' * 16}.safetensors"
    again = utils.read_entry(path)
    assert all(torch.equal(again[k], v) and again[k].dtype == dtype for k, v in tensors.items())


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "gone"])
def test_a_damaged_entry_is_noticed_and_named(tmp_path, harm):
    path = utils.write_entry(tmp_path, "ab" * 16, {"a": torch.arange(100.0)})
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes({"flip": bytes(data), "cut": bytes(data[:-9]), "empty": b""}[harm])
    with pytest.raises(ValueError, match="ab" * 16):
        utils.read_entry(path)


def test_every_input_changes_a_cache_key():
    keys = {
        utils.cache_key("latent", a=1),
        utils.cache_key("latent", a=2),
        utils.cache_key("prompt", a=1),
        utils.cache_key("latent", b=1),
        utils.cache_key("latent", a=[1]),
    }
    assert len(keys) == 5
    assert utils.cache_key("x", a=1, b=2) == utils.cache_key("x", b=2, a=1)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.txt"
    utils.save_atomic(file, lambda f: f.write_text("old"))

    def fail(f):
        f.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        utils.save_atomic(file, fail)
    assert file.read_text() == "old" and [f.name for f in tmp_path.iterdir()] == ["a.txt"]
    with pytest.raises(RuntimeError):
        utils.save_folder_atomic(tmp_path / "c", lambda f: fail(f / "x"))
    assert not (tmp_path / "c").exists()
    utils.save_folder_atomic(tmp_path / "c", lambda f: (f / "x").write_text("new"))
    assert (tmp_path / "c" / "x").read_text() == "new"


def test_the_index_forgets_a_file_that_changed(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"one")
    index = utils.FileIndex(tmp_path / "cache")
    index.put(file, file.stat(), {"content": "x"})
    index.commit()
    again = utils.FileIndex(tmp_path / "cache")
    assert again.get(file, file.stat()) == {"content": "x"}
    os.utime(file, ns=(1, 1))
    assert again.get(file, file.stat()) is None


def test_metrics_of_steps_that_run_again_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    log = utils.MetricLog(file, 0)
    for step in (1, 2, 3):
        log.write(step, loss=step)
    log.close()
    file.write_text(file.read_text() + '{"step": 4, "lo')  # cut off by a kill
    log = utils.MetricLog(file, 2)
    log.write(3, loss=30)
    log.close()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 1}, {"step": 2, "loss": 2}, {"step": 3, "loss": 30}]


def test_utils_needs_no_model_library():
    heavy = ("diffusers", "transformers", "peft", "accelerate")
    code = f"import sys, utils; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("script", "words"), [("train_x.py", "resume_from_checkpoint"), ("generate.py", "run it again")]
)
def test_ctrl_c_says_how_to_go_on(script, words, monkeypatch, capsys):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit) as stopped:
        utils.run_script(stop)
    assert stopped.value.code == 130 and words in capsys.readouterr().err
