"""Several processes: DDP and FSDP2 train as one does, on one machine or two."""

import os
import re
import shlex
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import (
    FSDP,
    ROOT,
    copy_pairs,
    run,
    slider_settings,
    small_config,
    suffix_dataset,
    write_config,
)
from qwen import assert_same_files, curve

import train_dreambooth_pairs
import train_pairedit
import train_qwen_edit as script
from utils import Checkpoints, UserError, load_config, load_tool

CLOSE = (
    1e-4  # measured: 1.2e-5 of weights up to 0.06; Adam at rate 0.01 widens what rounding leaves
)
LAUNCHERS = {"ddp.yaml": {}, "fsdp2.yaml": FSDP}
PROGRAM = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train_qwen_edit as script
import utils

original, add, stops = script.train_step, script.add_lora, "--stop" in sys.argv
sys.argv = [word for word in sys.argv if word != "--stop"]

def step(trainer, batches):
    if trainer.global_step == 3 and stops and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return original(trainer, batches)

def held(transformer, *how):
    add(transformer, *how)
    if transformer.device.type == "meta":  # before the run, to see that the settings fit
        return
    frozen = [p for p in transformer.transformer_blocks.parameters() if not p.requires_grad]
    mine = [p.to_local() if hasattr(p, "to_local") else p for p in frozen]
    share = sum(p.numel() for p in mine) / sum(p.numel() for p in frozen)
    print(f"share of frozen weights {{share:.3f}}")

script.train_step, script.add_lora = step, held
utils.run_script(script.main)
"""


@pytest.fixture(scope="module")
def one(checkpoints, tmp_path_factory):
    """Six steps in one process, of pictures of three shapes: (folder, config file)."""
    folder = tmp_path_factory.mktemp("one")
    pairs = copy_pairs(folder / "data", ("astronaut1", "chelsea0", "coffee0", "hubble0", "hubble1"))
    changes = {
        "data.dataset_configs": [suffix_dataset(pairs, holdout=["hubble1"])],
        "data.batch_size": 4,
        "model.lora.target_modules": "attn+mlp",
        "train.gradient_checkpointing": True,
        "train.max_train_steps": 6,
        "train.checkpointing_steps": 6,
        "train.use_ema": True,
        "validation.steps": 6,
        "validation.num_inference_steps": 2,
        "logging.log_every": 1,
    }
    file = write_config(folder, small_config(checkpoints["2511"], folder, **changes))
    run("cache_embeddings.py", "--config", file)
    run(script.__file__, "--config", file)
    return folder, file


def flags(one, out):
    return ["--config", one[1], "--logging.output_dir", out, "--data.batch_size", 2]


def assert_as_one(one, out):
    """The losses of every step, of the validation, the LoRA and its average."""
    assert_same_files(out, one[0] / "out", atol=CLOSE)
    for name in ("loss", "validation_loss"):
        ours, theirs = curve(out, name), curve(one[0] / "out", name)
        assert ours == pytest.approx(theirs, rel=1e-5), name


@pytest.mark.slow
def test_sharded_weights_train_stop_and_go_on_as_whole_ones(one, tmp_path):
    """SIGTERM to one of two processes; the rest goes on from there: bits of DDP, nearly of one."""
    program, whole, sharded = tmp_path / "train_told.py", tmp_path / "whole", tmp_path / "sharded"
    program.write_text(PROGRAM.format(root=str(ROOT)))
    for out, env, share in ((whole, {}, "1.000"), (sharded, FSDP, "0.500")):
        stop = ["--stop"] if env else []
        done = run(program, *flags(one, out), *stop, processes=2, env=env)
        assert done.stdout.count(f"share of frozen weights {share}") == 2
    saved = Checkpoints.state(Checkpoints(sharded).folders()[-1])
    assert saved["step"] in (4, 5)
    resumed = ["--train.resume_from_checkpoint", "latest"]
    run(script.__file__, *flags(one, sharded), *resumed, processes=2, env=FSDP)
    assert_same_files(sharded, whole)
    assert curve(sharded, "loss") == curve(whole, "loss")
    assert_as_one(one, sharded)


@pytest.mark.slow
def test_two_machines_learn_as_one(one, tmp_path):
    """Two launchers meet over the loopback address; the commands are those of the page."""
    page = (ROOT / "docs/several_gpus.md").read_text()
    commands = re.findall(r"^accelerate (launch .*--machine_rank \d .*?\.py) ", page, re.MULTILINE)
    assert len(commands) == 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for command in commands:
        here = re.sub(r"(--main_process_ip) \S+", r"\1 127.0.0.1", command)
        here = re.sub(r"(--main_process_port) \S+", rf"\1 {port}", here)
        words = ["-m", "accelerate.commands.accelerate_cli", *shlex.split(here)]
        words += [str(part) for part in flags(one, tmp_path / "out")]
        child = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        children.append(child)
    said = [child.communicate(timeout=120)[0].decode() for child in children]
    assert [child.returncode for child in children] == [0, 0], "\n".join(said)
    assert not any("to encode" in text and "has 0 to" not in text for text in said)
    assert_as_one(one, tmp_path / "out")


def test_processes_take_equally_many_micro_batches():
    """FSDP waits for all of them in every block."""
    plan = object.__new__(script.StepPlan)
    shapes = {0: "wide", 1: "wide", 2: "wide", 3: "wide", 4: "wide", 5: "high"}
    batch = SimpleNamespace(data=SimpleNamespace(batch_size=3))
    plan.data = SimpleNamespace(config=batch, shape=lambda draw: shapes[draw])
    plan.size, plan.processes, plan.steps, plan.first_step, plan.steps_per_epoch = 6, 2, 1, 0, 1
    plan.epoch = lambda epoch: [list(range(6))]
    cut = []
    for plan.rank in range(2):
        cut += list(plan)
    assert [len(batches) for batches in cut] == [2, 2]
    assert sorted(np.concatenate([draws for batches in cut for draws in batches])) == [*range(6)]


# -- what a launcher asks for


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_launchers_configs_ask_for_what_the_tests_run(launcher, monkeypatch):
    file = str(ROOT / "configs/accelerate" / launcher)
    parsed = launch_command_parser().parse_args(["--config_file", file, "train_qwen_edit.py"])
    args = _validate_launch_command(parsed)[0]
    asked = prepare_multi_gpu_env(args)
    assert (args.multi_gpu, args.use_fsdp) == (launcher == "ddp.yaml", launcher == "fsdp2.yaml")
    assert asked.items() >= LAUNCHERS[launcher].items()
    for name in [name for name in asked if "FSDP" in name]:
        monkeypatch.setenv(name, asked[name])
    assert load_tool("check").check_launcher() == []


@pytest.fixture
def sharded(monkeypatch):
    for name, value in {**FSDP, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"base_model_precision": "int8-quanto"}, "base_model_precision"),
        ({"lora.method": "dora"}, "lora.method"),
        ({"blocks_to_swap": "1"}, "blocks_to_swap"),
    ],
)
def test_what_cannot_be_sharded_is_refused(changes, named, one, sharded):
    given = [part for name, value in changes.items() for part in (f"--model.{name}", value)]
    with pytest.raises(UserError, match=rf"1 problem.*\n.*model\.{named}.*FSDP"):
        load_config(script.Config, ["--config", str(one[1]), *given], script.audit)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FSDP_VERSION", "1"),
        ("FSDP_OFFLOAD_PARAMS", "true"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true"),
    ],
)
def test_another_way_of_fsdp_is_refused(name, value, one, sharded, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"1 problem.*\n.*{name}"):
        load_config(script.Config, ["--config", str(one[1])], script.audit)


def test_models_that_fit_one_card_are_not_sharded(checkpoints, sharded, tmp_path):
    slider = write_config(tmp_path, slider_settings(checkpoints["flux"], tmp_path))
    for other, given in (
        (train_pairedit, ["--config", str(slider)]),
        (train_dreambooth_pairs, ["--config", str(ROOT / "configs/demo_dreambooth.yaml")]),
    ):
        with pytest.raises(UserError, match=r"ACCELERATE_USE_FSDP.*ddp\.yaml"):
            load_config(other.Config, given, other.audit)


def test_a_stopped_run_is_continued_as_it_was_started(monkeypatch):
    monkeypatch.setattr(os, "environ", {"WORLD_SIZE": "2", **FSDP})
    record = {"argv": ["train_qwen_edit.py", "--config", "x.yaml"], "config": {"train": {}}}
    command = shlex.split(load_tool("after").resume_command(record))
    args = launch_command_parser().parse_args(command[2:])
    assert args.use_fsdp and args.fsdp_version == "2" and args.num_processes == 2
    assert args.training_script_args[-2:] == ["--train.resume_from_checkpoint", "latest"]
