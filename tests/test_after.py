"""tools/after.py: the end of a run names its report, its pictures, and commands that work."""

import shlex

import pytest
from conftest import ROOT, quick_settings, run, write_config
from PIL import Image

QUICK = {
    "train_qwen_edit.py": "--num_inference_steps 2 --true_cfg_scale 1 --width 64 --height 64",
    "train_pairedit.py": "--device cpu --image {photo}",
    "train_dreambooth_pairs.py": "--num_inference_steps 2",
}


def last_words(text):
    """{"report" | "pictures" | "to go on" | "to try it": what is said last of it}."""
    pairs = (line.partition(": ") for line in text.splitlines())
    names = ("report", "pictures", "to go on", "to try it")
    return {name: said.strip() for name, _, said in pairs if name.strip() in names}


@pytest.mark.slow
@pytest.mark.parametrize("script", QUICK)
def test_a_run_ends_with_commands_that_work(script, checkpoints, tmp_path):
    config = write_config(tmp_path, quick_settings(script, checkpoints, tmp_path))
    said = last_words(run(ROOT / script, "--config", config).stdout)
    assert {*said} == {"report", "pictures", "to try it"}
    assert said["report"].endswith("report.html") and said["pictures"].endswith(".png")
    photo = next((tmp_path / "datasets").rglob("*.png"))
    command = shlex.split(f"{said['to try it']} {QUICK[script].format(photo=photo)}")
    assert command[:2] == ["python", "generate.py"]
    command = [word for word in command if word != ""]
    run(ROOT / "generate.py", *command[2:], cwd=tmp_path)
    picture = tmp_path / command[command.index("--output") + 1]
    assert Image.open(picture).width > 3 * 64


@pytest.mark.slow
@pytest.mark.parametrize("script", QUICK)
def test_a_stopped_run_ends_with_the_command_that_goes_on(script, checkpoints, tmp_path):
    config = write_config(tmp_path, quick_settings(script, checkpoints, tmp_path))
    name = script.removesuffix(".py")
    program = tmp_path / f"{name}_stopped.py"
    program.write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import {name} as script
step = script.train_step
def stopped(trainer, *args):
    if trainer.global_step == 1:
        os.kill(os.getpid(), signal.SIGINT)
    return step(trainer, *args)
script.train_step = stopped
script.utils.run_script(script.main)
""")
    said = last_words(run(program, "--config", config).stdout)
    assert {*said} >= {"report", "to go on"} and "to try it" not in said
    command = shlex.split(said["to go on"])
    assert command[0] == "python" and command[-1] == "latest"
    [record] = tmp_path.rglob("run.json")  # the terminal is gone
    assert last_words(run(ROOT / "tools/after.py", record.parent).stdout) == said
    command[1] = str(ROOT / script)
    assert "to try it" in last_words(run(*command[1:]).stdout)


def test_it_is_said_again_of_a_folder_that_holds_a_run(tmp_path):
    done = run(ROOT / "tools/after.py", tmp_path, check=False)
    assert done.returncode == 2 and "usage" in done.stderr
