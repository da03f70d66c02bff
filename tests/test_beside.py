"""benchmarks/beside.py: our commands beside others' for the same work."""

import re
import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import beside

import generate
import train_dreambooth_pairs
from utils import UserError, load_config


def test_the_ratios_are_those_of_the_commands(capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(beside, "seconds", lambda command: command[0] + command[1] * command[2])
        beside.compare(lambda n, _: (5, 1, n), lambda n, _: (6, 4, n), (1, 6), 3, "nap")
    whole, each = (float(ratio) for ratio in re.findall(r"ratio (.*)", capsys.readouterr().out))
    assert (whole, each) == (0.37, 0.25)  # 11 / 30, 1 / 4
    assert beside.seconds(["-c", "import time; time.sleep(0.2)"]) >= 0.2
    with pytest.raises(UserError, match=r"exit code 1: ValueError: no"):
        beside.seconds(["-c", "raise ValueError('no')"])


@pytest.mark.parametrize("way", ["train", "draw"])
def test_both_get_the_same_work(way, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(beside, "compare", lambda *rest: seen.extend(rest))
    args = {"train": (tmp_path / "theirs.py", tmp_path, 1), "draw": (tmp_path, 1)}[way]
    getattr(beside, way)(*args)
    ours, theirs, (_, size), *_ = seen
    command = [str(part) for part in ours(size, tmp_path / "o")]
    if way == "train":
        config = load_config(train_dreambooth_pairs.Config, command[1:])
        assert (config.max_train_steps, config.lora_rank, config.resolution) == (size, 4, 64)
        assert len([*config.instance_data_dir.iterdir()]) == 13
        assert [str(part) for part in theirs(size, tmp_path / "o")][1:] == command[1:]
    else:
        config = load_config(generate.EditConfig, command[1:])
        assert len([*config.input_dir.iterdir()]) == size
        _, bare, folder, _ = theirs(size, tmp_path / "o")
        assert bare == "--bare" and folder == config.input_dir
