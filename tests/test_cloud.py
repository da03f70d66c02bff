"""Runs whose output folder is a mounted bucket, on machines that are taken away (cloud/)."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from string import Template

import pytest
import yaml
from conftest import ROOT, run
from faults.run import TRAINERS, command, configs, loras

from utils import Checkpoints

REFUSALS = ("ENOTSUP", "EINVAL", "ENOSYS")  # of flock()
MOUNTED = """
import errno, fcntl, os, pathlib, signal, stat, sys
sys.path.insert(0, {root!r})
import {script} as script
import utils

fsync, rename = os.fsync, os.rename

def refuse(number):
    def call(*args, **how):
        raise OSError(number, os.strerror(number))
    return call

def fsync_files(descriptor):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, "Invalid argument")
    return fsync(descriptor)

def rename_files(old, new, **how):
    if os.path.isdir(old):
        raise OSError(errno.ENOSYS, "Function not implemented")
    return rename(old, new, **how)

fcntl.flock, os.link = refuse(errno.{flock}), refuse(errno.EPERM)
os.fsync, os.rename = fsync_files, rename_files
original = script.train_step

def step(*args):
    stopped, first = pathlib.Path({stopped!r}), pathlib.Path({out!r}).rglob("checkpoint-2")
    if not stopped.exists() and list(first):
        stopped.touch()
        os.kill(os.getpid(), signal.SIGTERM)
    return original(*args)

script.train_step = step
utils.run_script(script.main)
"""


@pytest.fixture(scope="module")
def straight(checkpoints, tmp_path_factory):
    """{trainer: (config, LoRAs of an undisturbed run, its cache)}."""
    folder, found = tmp_path_factory.mktemp("straight"), {}
    for script, file in configs(checkpoints, folder).items():
        out, cache = folder / script / "out", folder / script / "cache"
        run(ROOT / f"{script}.py", *command(script, file, out, cache))
        found[script] = file, loras(out), cache
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("script", "flock"), [*zip(TRAINERS, REFUSALS, strict=True)])
def test_checkpoints_go_to_a_bucket_and_runs_go_on_from_it(script, flock, straight, tmp_path):
    """No locks, links, fsync of folders, folders that can be renamed; SIGTERM on the way."""
    (config, expected, cache), out = straight[script], tmp_path / "bucket"
    names = {"script": script, "root": str(ROOT), "out": str(out), "flock": flock}
    program = tmp_path / f"{script}_mounted.py"
    program.write_text(MOUNTED.format(**names, stopped=str(tmp_path / "stopped")))
    saved = []
    for _ in range(2):
        done = run(program, *command(script, config, out, cache, resume=True))
        assert len(re.findall("has no locks", done.stderr)) == 1, done.stderr
        saved.append(max(int(f.name.split("-")[1]) for f in out.rglob("checkpoint-*")))
    assert 2 < saved[0] < saved[1] == 6 and (tmp_path / "stopped").exists()
    assert all(Checkpoints.state(f) for f in out.rglob("checkpoint-*"))
    found = loras(out)
    assert {name: found.get(name) for name in expected} == expected
    assert not list(out.rglob("*.tmp"))


# -- the files of cloud/

RCLONE = """#!/bin/bash
case $1 in
    mkdir) mkdir -p "$2" ;;
    copy) [[ -d $2 ]] && mkdir -p "$3" && cp -r "$2/." "$3" && rm -f "$3/.lock" ;;
esac
"""
SLOW = """
import sys, time
sys.path.insert(0, {root!r})
import train_qwen_edit as script
import utils

original = script.train_step

def step(trainer, batches):
    if trainer.global_step == 3:
        open({ready!r}, "w").close()
        time.sleep(1)
    return original(trainer, batches)

script.train_step = step
utils.run_script(script.main)
"""


@pytest.fixture
def machine(tmp_path):
    """machine(name) -> a clone on a new machine, with an rclone whose buckets are folders."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "rclone").write_text(RCLONE)
    (programs / "rclone").chmod(0o755)

    def make(name):
        place = tmp_path / name
        (place / "cloud").mkdir(parents=True)
        shutil.copy(ROOT / "cloud/cloud_init.sh", place / "cloud")
        for part in ("train_qwen_edit.py", "utils.py", "tools"):
            (place / part).symlink_to(ROOT / part)
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        return place, {**os.environ, "PATH": path, "PYTHON": sys.executable, "EVERY": "1"}

    return make


@pytest.mark.slow
def test_another_machine_goes_on_where_one_was_taken_away(straight, machine, tmp_path):
    config, expected, cache = straight["train_qwen_edit"]
    flags = command("train_qwen_edit", config, "out", cache, resume=True)
    bucket, ready = tmp_path / "bucket", tmp_path / "ready"
    place, env = machine("first")
    (place / "train_slowly.py").write_text(SLOW.format(root=str(ROOT), ready=str(ready)))
    words = ["bash", "cloud/cloud_init.sh", str(bucket), "out"]
    first = subprocess.Popen([*words, "train_slowly.py", *map(str, flags)], cwd=place, env=env)
    while not ready.exists() and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 143
    assert Checkpoints(bucket).folders()[-1].name == "checkpoint-4"
    shutil.rmtree(place)
    place, env = machine("second")
    words += ["train_qwen_edit.py", *map(str, flags)]
    assert subprocess.run(words, cwd=place, env=env, timeout=60).returncode == 0
    found = loras(bucket)
    assert {name: found.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "usage"),
        (["b", "out", "none.py"], "no script"),
        (["b", "out", "train_qwen_edit.py", "--config", "x"], "resume_from_checkpoint latest"),
    ],
)
def test_cloud_init_refuses_what_would_lose_a_run(words, said, machine):
    place, env = machine("one")
    words = ["bash", "cloud/cloud_init.sh", *words]
    done = subprocess.run(words, cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr


@pytest.mark.slow
def test_the_skypilot_task_runs(straight, tmp_path):
    """Its `run` with tiny values, in a folder in place of the mounted bucket."""
    task = yaml.safe_load((ROOT / "cloud/skypilot.yaml").read_text())
    assert task["resources"]["use_spot"] and task["file_mounts"].keys() == {"/bucket"}
    names = re.findall(r"[\w/]+\.(?:txt|py|yaml)\b", str(task))
    assert len(names) == 3 and all((ROOT / name).exists() for name in names)
    config, _, cache = straight["train_qwen_edit"]
    lines = task["run"].replace("/bucket/", f"{tmp_path}/").splitlines()
    assert lines[0] == ". .venv/bin/activate"  # which `setup` makes
    values = {**task["envs"], "BUCKET": "tiny", "CONFIG": str(config), "STEPS": "6"}
    python, *words = shlex.split(Template(lines[1]).substitute(values))
    assert python == "python"
    run(*words, "--cache.cache_dir", cache)
    for steps, code in (("6", 0), ("7", 1)):  # 1: stopped before its end, SkyPilot starts it again
        env = {**os.environ, **values, "STEPS": steps}
        rest = "\n".join(lines[2:])
        assert subprocess.run(["bash", "-e", "-c", rest], env=env).returncode == code
    assert Checkpoints.state(tmp_path / "run/checkpoint-6")["step"] == 6


def test_shell_scripts_have_no_mistakes_of_grammar():
    for file in ROOT.glob("cloud/*.sh"):
        subprocess.run(["bash", "-n", file], check=True)
