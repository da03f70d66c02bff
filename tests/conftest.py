"""Shared fixtures: tiny checkpoints of the true classes, small data sets, real commands."""

import atexit
import functools
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from html import unescape
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes share two cores
torch.set_num_threads(1)

PAIRS = ROOT / "data" / "photo_pairs"

BROWSER_FLAGS = (
    "headless=new no-sandbox disable-gpu disable-background-networking window-size=900,900"
)
BROWSER_FLAGS += " no-first-run force-device-scale-factor=1 force-color-profile=srgb"
# environment that a forked command can be given
FORKED = {"OMP_NUM_THREADS", "ACCELERATE_USE_FSDP", "FSDP_VERSION", "HF_TOKEN"}
FORKED |= {"HF_ENDPOINT", "HF_HUB_DISABLE_XET", "HF_HUB_OFFLINE"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # as accelerate launch sets it


class Done(NamedTuple):
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str


@functools.cache
def zygote():
    """Start the process whose forks are the commands of this test process."""
    command = [sys.executable, str(ROOT / "tests/zygote.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes, env=os.environ)
    atexit.register(process.kill)
    return process


def run(*args, cwd=ROOT, processes=1, check=True, timeout=300, env=None, real=False):
    """Run a script of the project; on an unexpected exit code show what it printed.

    It is a fork of a process that has imported the libraries, which saves seconds; `real`, or an
    environment that they read, starts a new Python.
    """
    command, env = [str(arg) for arg in args], env or {}
    if real or env.keys() - FORKED or not command[0].endswith(".py"):
        assert processes == 1
        done = subprocess.run(
            [sys.executable, *command],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **env},
        )
    else:
        done = fork(command, cwd, processes, {**os.environ, **env}, timeout)
    if check:
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


def fork(command, cwd, processes, env, timeout):
    """Run a command in a fork of the zygote, or in several that form a process group."""
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        request = {"argv": command, "cwd": str(cwd), "env": env, "processes": processes}
        request |= {"out": str(out), "err": str(err), "timeout": timeout}
        print(json.dumps(request), file=zygote().stdin, flush=True)
        code = int(zygote().stdout.readline())
        texts = [p.read_text(errors="replace") if p.exists() else "" for p in (out, err)]
    if code == 124:
        raise subprocess.TimeoutExpired(command, timeout, *texts)
    return Done(code, *texts)


def launch(*args, **options):
    """`accelerate launch ...`, for good."""
    module = "accelerate.commands.accelerate_cli"
    return run("-m", module, "launch", *args, real=True, **options)


def small_config(checkpoint, folder, **changes):
    """Settings of a quick CPU run on four real pairs; `changes` are dotted overrides."""
    settings = {
        "model.pretrained_model_name_or_path": str(checkpoint),
        "model.lora.r": 4,
        "logging.output_dir": str(folder / "out"),
        "cache.cache_dir": str(folder / "cache"),
        "data.batch_size": 2,
        "data.num_workers": 0,
        "data.reference_area": "target",
        "data.dataset_configs": [suffix_dataset(PAIRS)],
        "train.mixed_precision": "no",
        "train.gradient_checkpointing": False,
        "train.max_train_steps": 4,
        "train.checkpointing_steps": 2,
        "optimizer.init_args": {"lr": 1e-2},
        **changes,
    }
    nested: dict = {}
    for key, value in settings.items():
        *parents, last = key.split(".")
        place = nested
        for part in parents:
            place = place.setdefault(part, {})
        place[last] = value
    return nested


def suffix_dataset(folder, **changes):
    """A data set in the suffix layout: _R (and _D) before, _T after, 64 px."""
    return {
        "train_data_dir": str(folder),
        "resolution": 64,
        "image_configs": {"after": {"suffix": "_T"}, "before": {"suffix": "_R"}},
        "target_configs": {"after": [{"image": "after"}]},
        "reference_configs": {"before": [{"image": "before"}]},
        "caption_configs": {
            "text": {
                "image": "after",
                "ext": ".txt",
                "reference_list": {"reference_config": "before", "resize": 64},
            }
        },
        "batch_configs": [
            {"target_config": "after", "reference_config": "before", "caption_config": "text"}
        ],
        **changes,
    }


def write_config(folder, config):
    """JSON is YAML: one file for --config."""
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    return path


def copy_pairs(folder, names=("astronaut1", "chelsea0", "coffee0", "hubble0")):
    """Some of the photo pairs, with both references, in a folder of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        for file in PAIRS.glob(f"{name}_*"):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def read_page(path):
    """[(name, {label: file})] of the rows of a page that tools/page.py wrote."""
    rows = []
    for section in path.read_text(encoding="utf-8").split("<section ")[1:]:
        name = re.search("<h2>(.*?) <small>", section)[1]
        pictures = re.findall('<img .*? src="(.*?)" alt="(.*?)"', section)
        files = {unescape(label): path.parent / unquote(link) for link, label in pictures}
        assert all(file.is_file() for file in files.values())
        rows.append((unescape(name), {label: file.resolve() for label, file in files.items()}))
    return rows


def with_lora_noise(transformer, seed=0):
    """Give B random values, so that an adapter changes the output."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return transformer


def concept(folder, names=("7000", "7001", "7002"), size=(64, 64), stages=("source", "target")):
    """A concept of PairEdit's kind: the same scene in every stage, with a patch that grows."""
    for number, name in enumerate(names):
        scene = np.random.default_rng(number).integers(0, 160, (4, 4, 3), np.uint8)
        for place, stage in enumerate(stages):
            image = Image.fromarray(scene).resize(size, Image.Resampling.BICUBIC)
            (x, y), side = (size[0] // 3, size[1] // 3), min(size) // 6 * (1 + place)
            image.paste((250, 220, 40 * number), (x, y, x + side, y + side))
            (folder / stage).mkdir(parents=True, exist_ok=True)
            image.save(folder / stage / f"{name}.png")
    return folder


def slider_settings(checkpoint, folder, **changes):
    """Settings of a quick slider on a CPU; train_pairedit.py has no sections."""
    return {
        "pretrained_model_name_or_path": str(checkpoint),
        "device": "cpu",
        "mixed_precision": "no",
        "gradient_checkpointing": False,
        "max_sequence_length": 16,
        "datasets_folder": str(folder / "datasets"),
        "output_folder": str(folder / "out"),
        "cache_dir": str(folder / "cache"),
        "resolution": 64,
        "train_iteration": 4,
        "save_per_steps": 2,
        "preview": False,
        **changes,
    }


def quick_settings(script, checkpoints, folder):
    """Settings of four quick steps of a trainer, on a CPU."""
    concept(folder / "datasets/age")
    if script == "train_qwen_edit.py":
        return small_config(checkpoints["2511"], folder)
    if script == "train_pairedit.py":
        return slider_settings(checkpoints["flux"], folder)
    sides = {"before": "source", "after": "target"}
    sides = {f"{n}_data_dir": str(folder / "datasets/age" / s) for n, s in sides.items()}
    own = {"use_image_pairs": True, "resolution": 64, "max_train_steps": 4, "train_batch_size": 1}
    base = {"pretrained_model_name_or_path": str(checkpoints["sd"]), "instance_prompt": "a photo"}
    places = {"output_dir": str(folder / "out"), "cache_dir": str(folder / "cache")}
    return {**base, **sides, **own, **places}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """{"2508" | "2509" | "2511" | "flux": folder} of tiny random checkpoints."""
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import tiny

    gc.freeze()  # unload() collects garbage: not among what is imported
    return tiny.build_all(tmp_path_factory.getbasetemp().parent / "checkpoints")


@pytest.fixture(autouse=True)
def fresh_state():
    """Tests in one process may use different precisions, and load scripts by their paths."""
    scripts = {path.stem: sys.modules.get(path.stem) for path in ROOT.glob("*.py")}
    yield
    sys.modules.update({name: module for name, module in scripts.items() if module})
    gc.set_threshold(700)  # a script sets its own
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Headless Chromium that notes every error."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        # optional on a user's machine, as it comes from the system; .ci/run installs it
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*BROWSER_FLAGS.split(), f"user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield window
    window.quit()


@pytest.fixture
def make_trainer(checkpoints, tmp_path):
    """make_trainer("2511", **overrides) -> trainer on real pairs, CPU, fp32."""
    import train_qwen_edit as script
    from utils import load_config

    def make(kind="2511", **changes):
        file = write_config(tmp_path, small_config(checkpoints[kind], tmp_path, **changes))
        return script.QwenImageEditTrainer(load_config(script.Config, ["--config", str(file)]))

    return make


@pytest.fixture
def call_generate(monkeypatch, capsys, tmp_path):
    """call_generate(*arguments) -> what generate.py prints, or its UserError's text; no fork."""
    import generate
    from utils import UserError

    def call(*args, check=True, cwd=tmp_path):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, args)])
        try:
            generate.main()
        except UserError as error:
            assert not check, error
            return str(error)
        assert check, "it should have failed"
        return capsys.readouterr().out

    return call


@pytest.fixture
def make_slider(checkpoints, tmp_path):
    """make_slider(**changes) -> audited trainer of a slider on three drawn pairs, CPU, fp32."""
    import train_pairedit as script
    from utils import load_config

    def make(**changes):
        if not (tmp_path / "datasets/age").exists():
            concept(tmp_path / "datasets/age")
        file = write_config(tmp_path, slider_settings(checkpoints["flux"], tmp_path, **changes))
        config = load_config(script.Config, ["--config", str(file)], script.audit)
        return script.PairEditTrainer(config)

    return make
