"""Other systems and launchers: what they lack, and what they set, changes no result."""

import pytest
import torch
from conftest import ROOT, copy_pairs, run, small_config, suffix_dataset, write_config
from safetensors.torch import load_file

import train_qwen_edit
import utils

ABSENT = """
import builtins, os, runpy, signal, sys

imported, opened = builtins.__import__, os.open

def lacking(name, names=None, *rest, **how):
    place = (names or {}).get("__file__", "")
    ours = place.startswith(ROOT) and "site-packages" not in place
    if name in ("resource", "fcntl") and ours:
        raise ImportError(f"No module named {name!r}")  # libraries have ways of their own
    return imported(name, names, *rest, **how)

def only_files(path, *args, **how):
    if isinstance(path, (str, os.PathLike)) and os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return opened(path, *args, **how)

sys.argv = sys.argv[1:]
ROOT = os.path.dirname(sys.argv[0])
sys.path.insert(0, ROOT)
del signal.alarm
builtins.__import__, os.open = lacking, only_files
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def config(checkpoints, tmp_path):
    data = suffix_dataset(copy_pairs(tmp_path / "data"))
    changes = {"data.dataset_configs": [data], "train.max_train_steps": 2}
    return write_config(tmp_path, small_config(checkpoints["2511"], tmp_path, **changes))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--help"], ["--plan"], []], ids=["help", "plan", "train"])
def test_a_system_without_the_modules_of_unix(flags, config, tmp_path):
    (tmp_path / "absent.py").write_text(ABSENT)
    script = ROOT / "train_qwen_edit.py"
    run(tmp_path / "absent.py", script, "--config", config, *flags, real=True)
    assert (tmp_path / "out/checkpoint-2/state.json").exists() == (not flags)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["图", "café"])
def test_names_and_messages_where_the_locale_is_none(text, config, tmp_path):
    """LC_ALL=C without UTF-8 mode: the script starts itself again in it."""
    (tmp_path / "data/coffee0_R.png").rename(tmp_path / f"data/{text}_R.png")
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run(ROOT / "train_qwen_edit.py", "--config", config, check=False, env=env, real=True)
    assert done.returncode == 2 and f"'{text}'" in done.stderr, done.stderr


def test_what_accelerate_config_may_set_changes_no_bit(make_trainer, monkeypatch, tmp_path):
    loras = []
    for name, value in (("plain", None), ("set", "4")):
        if value:
            monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
            monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", value)
        trainer = make_trainer(**{"logging.output_dir": str(tmp_path / name)})
        trainer.fit()
        loras.append(load_file(tmp_path / name / train_qwen_edit.LORA_FILE))
    assert loras[0].keys() == loras[1].keys()
    assert all(torch.equal(loras[0][name], loras[1][name]) for name in loras[0])


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM"])
def test_another_kind_of_run_is_refused(kind, config, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(utils.UserError, match=f"ACCELERATE_USE_{kind}"):
        utils.load_config(train_qwen_edit.Config, ["--config", str(config)], train_qwen_edit.audit)
