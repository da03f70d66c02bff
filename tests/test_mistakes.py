"""What users get wrong ends in a message before anything is loaded, never in a traceback."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import PAIRS, ROOT, suffix_dataset
from test_data import problems_of
from test_grammar import COMBINATION, folders, many_roles, picture, three_roles

import train_dreambooth_pairs
import train_pairedit
import train_qwen_edit
import utils

TWICE = [suffix_dataset(PAIRS, id="two")] * 2  # two data sets of one name
GONE = utils.load_tool("settings").GONE


@pytest.mark.parametrize("name", GONE)
def test_a_setting_that_went_says_what_to_do_instead(name, capsys):
    for script in (train_qwen_edit, train_pairedit, train_dreambooth_pairs):
        with pytest.raises(SystemExit) as ended:
            utils.run_script(lambda: utils.load_config(script.Config, [f"--{name}", "1"]))  # noqa: B023
        said = capsys.readouterr().err
        assert ended.value.code == 2 and f"- {name}: " in said and GONE[name] in said


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model.pretrained_model_name_or_path": "no/such/folder"}, "no/such/folder"),
        ({"data.dataset_configs": []}, "data.dataset_configs"),
        ({"data.reference_area": -5}, "data.reference_area"),
        ({"logging.output_dir": "/dev/null/x"}, "logging.output_dir"),
        ({"cache.cache_dir": "/dev/null/x"}, "cache.cache_dir"),
        ({"cache.vae_encoder_device": "cuda:99"}, "cache.vae_encoder_device"),
        ({"predict.devices.vae": "gpu"}, "predict.devices.vae"),
        ({"model.lora.pretrained_weight": "no.safetensors"}, "no.safetensors"),
        ({"model.blocks_to_swap": 3, "train.gradient_checkpointing": True}, "2 blocks"),
        ({"model.blocks_to_swap": 1}, "gradient_checkpointing"),
        ({"model.lora.method": "dora", "model.base_model_precision": "int8-quanto"}, "dora"),
        ({"validation.steps": 2}, "validation.steps"),
        ({"validation.eval_dataset_id": ["pair"]}, "photo_pairs"),
        ({"data.dataset_configs": TWICE, "validation.eval_dataset_id": ["two"]}, "'two'"),
        ({"loss.loss_type": "hubr"}, "'huber'"),
        ({"loss.mask": "file"}, "loss.mask"),
    ],
)
def test_a_setting_that_cannot_be_is_the_one_named(changes, named, checkpoints, tmp_path):
    lines = problems_of(checkpoints["2511"], tmp_path, **changes)
    assert lines and all(named in line for line in lines)


@pytest.mark.parametrize(
    ("change", "place", "named"),
    [
        ({"caption": "make it snow"}, "0", "caption"),
        ({"mask_dir": "masks"}, "0", "mask_dir"),
        ({"target_dir": "t", "reference_dirs": ["r"]}, "0", "table"),
        ({"batch_configs": []}, "0", "batch_configs"),
        ({"batch_configs": [COMBINATION | {"weight": w} for w in (0.7, 0.6)]}, "0", "weights"),
        ({"batch_configs": [COMBINATION | {"reference_config": "T"}]}, "0", "RD"),
        ({"target_configs": {"T": [{"image": "X"}]}}, "0", "target_configs.T.0.image"),
        ({"reference_configs": {"RD": []}}, "0.reference_configs.RD", ""),
        ({"caption_configs": {"c": {"image": "T", "ext": "txt"}}}, "0.caption_configs.c.ext", ""),
        ({"resolution": 100}, "0.resolution", "100"),
        ({"holdout": list("abcd")}, "0", "d"),
        ({"train_data_dir": "no/such"}, "0", "no/such"),
    ],
)
def test_a_mistake_in_a_data_set_has_its_place(change, place, named, checkpoints, tmp_path):
    dataset = three_roles(many_roles(tmp_path / "d")) | change
    lines = problems_of(checkpoints["2511"], tmp_path, **{"data.dataset_configs": [dataset]})
    assert any(f"data.dataset_configs.{place}: " in line and named in line for line in lines)
    assert len(lines) <= 2


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("t.csv", "target,reference_1,prompt\na.png,b.png,red, then blue\n", "row 1"),
        ("t.csv", f"target,reference_1,prompt\n{'x' * 300}.png,b.png,p\n", "xxx.png"),
        ("t.csv", "target,references,prompt\na.png,b.png,\n", "a.png"),
        ("t.csv", "target,references,prompt\n", "no rows"),
        ("t.jsonl", '{"target": "a.png", "references": ["b.png", null], "prompt": "x"}', "row 1"),
        (
            "t.jsonl",
            '{"references": ["b.png"], "prompt": "x"}',
            "no column 'target': its columns are prompt, references",
        ),
        ("t.jsonl", '{"target": "", "references": ["b.png"], "prompt": "x"}', "row 1: no target"),
        ("t.csv", "target;prompt\na.png;x\n", "no column 'target': its columns are target;prompt"),
        ("t.csv", "target,reference_1,reference_2,prompt\na.png,,b.png,x\n", "row 1: no reference"),
        ("t.jsonl", '{"target": "a.png", "prompt": "x"}', "row 1: no reference"),
        ("t.jsonl", '{"target": 3, "references": 4, "prompt": 5}', "row 1"),
        ("t.jsonl", '{"target": ', "t.jsonl"),
        ("t.jsonl", None, "t.jsonl"),
    ],
)
def test_a_bad_table_is_named_with_its_row(name, text, says, checkpoints, tmp_path):
    for file in ("a.png", "b.png"):
        picture(tmp_path / file)
    if text is not None:
        (tmp_path / name).write_text(text)
    data = [{"table": name, "train_data_dir": str(tmp_path), "resolution": 64}]
    [line] = problems_of(checkpoints["2511"], tmp_path, **{"data.dataset_configs": data})
    assert says in line


def test_masks_without_their_target_and_masks_of_another_frame(checkpoints, tmp_path):
    for name in ("t/a", "r/a", "t/b", "r/b", "m/a", "m/typo"):
        picture(tmp_path / f"{name}.png")
    changes = {"data.dataset_configs": [folders(tmp_path, mask_dir="m")], "loss.mask": "file"}
    [line] = problems_of(checkpoints["2511"], tmp_path, **changes)
    assert "typo" in line
    (tmp_path / "m/typo.png").unlink()
    assert not problems_of(checkpoints["2511"], tmp_path, **changes)
    picture(tmp_path / "m/a.png", size=(64, 64))
    [line] = problems_of(checkpoints["2511"], tmp_path, **changes)
    assert str(tmp_path / "m/a.png") in line


@pytest.mark.parametrize("change", ["none", "two", "area", "dropout", "other"])
def test_2508_takes_one_reference_as_it_is(change, checkpoints, tmp_path):
    dataset = three_roles(many_roles(tmp_path / "d"))
    shown = [{"image": "R", "resize": 128 if change == "area" else None}]
    shown += [{"image": "D"}] if change == "two" else []
    dataset["reference_configs"] = {"RD": shown, "D": [{"image": "D"}]}
    seen = {"reference_config": "D" if change == "other" else "RD"}
    seen |= {"dropout": 0.5, "min_length": 0} if change == "dropout" else {}
    dataset["caption_configs"]["c"]["reference_list"] = seen
    lines = problems_of(checkpoints["2508"], tmp_path, **{"data.dataset_configs": [dataset]})
    assert ["data.dataset_configs.0: 2508" in line for line in lines] == [True] * (change != "none")


def test_a_checkpoint_that_lacks_a_part(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["2511"], tmp_path / "model")
    for part in ("vae", "tokenizer"):
        shutil.rmtree(folder / part)
    lines = problems_of(folder, tmp_path)
    assert len(lines) == 2 and all(
        sum(f"{folder / part}: " in line for line in lines) == 1 for part in ("vae", "tokenizer")
    )
    (folder / "transformer/config.json").write_text("{")
    [line] = problems_of(folder, tmp_path)
    assert str(folder / "transformer/config.json") in line


def test_without_a_network_a_published_model_is_a_message(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    name = "Qwen/Qwen-Image-Edit-2511"
    with pytest.raises(utils.UserError, match=name):
        make_trainer(**{"model.pretrained_model_name_or_path": name}).fit()


def test_help_may_be_cut_off():
    command = f"{sys.executable} train_qwen_edit.py --help all | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert "train_qwen_edit.py" in done.stdout and not done.stderr


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--max_train_step", "3"], "did you mean 'train.max_train_steps'"),
        (["--on_missing", "skip"], "there is data.dataset_configs.0.on_missing"),
        (["configs/x.yaml"], "a file: --config FILE"),
        (["--config", "configs/no.yaml"], "configs/no.yaml: no such file"),
        (["--data.dataset_configs.0.resolution=64", "--data.dataset_configs.x.mask_dir=a"], "list"),
        (["--optimizer.init_args.lr", "fast"], "lr must be a number"),
    ],
)
def test_a_slip_on_the_command_line_leads_to_the_whole_name(argv, named):
    with pytest.raises(utils.UserError, match=named) as error:
        config = utils.load_config(train_qwen_edit.Config, argv)
        train_qwen_edit.make_optimizer(config.optimizer, [])
    assert "Errno" not in str(error.value)


def test_a_section_in_a_section_is_helped_with(capsys):
    with pytest.raises(SystemExit):
        utils.load_config(train_qwen_edit.Config, ["--help", "lora"])
    assert "--model.lora.r " in capsys.readouterr().out


def test_a_folder_that_is_missing_is_one_problem(checkpoints, tmp_path):
    dataset = {"train_data_dir": str(tmp_path), "target_dir": "aftr", "reference_dirs": ["before"]}
    for number in range(3):
        picture(tmp_path / f"before/{number}.png")
        picture(tmp_path / f"after/{number}.png")
    lines = problems_of(checkpoints["2511"], tmp_path, **{"data.dataset_configs": [dataset]})
    assert len(lines) == 1 and "aftr does not exist" in lines[0]


def test_few_pairs_are_the_reason_named_where_nothing_is_held_out(checkpoints, tmp_path):
    dataset = suffix_dataset(PAIRS, id="few", holdout_ratio=0.01)
    changes = {"data.dataset_configs": [dataset], "validation.steps": 2}
    [line] = problems_of(checkpoints["2511"], tmp_path, **changes)
    assert "few pairs" in line and "null" in line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--config", "configs/demo_qwen.yaml"],
            "no such file, did you mean 'demo_qwen_edit.yaml'",
        ),
        (["--data.dataset_configs.0.train_data_dir", "data/photo_pair"], "mean 'photo_pairs'"),
        (["--data.dataset_configs.0.train_data_dir", "dat/a/b"], "(nor dat/a (nor dat, did you"),
        (["--config", "a\0b/" + "c" * 300], "no such file"),
        (["--data.dataset_configs.0.train_data_dir", "configs/demo_qwen_edit.yaml"], "is a file"),
        (["--data.dataset_configs.0.target_dir", "aftr"], "aftr does not exist, did you mean"),
        (["--model.pretrained_model_name_or_path", "./demo/qwen_edt"], "did you mean 'qwen_edit"),
    ],
)
def test_a_missing_place_is_told_its_nearest_name(flags, said, tmp_path, monkeypatch):
    for name in (
        "data/photo_pairs/after",
        "data/photo_pairs/before",
        "configs",
        "demo/qwen_edit_base",
    ):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "configs/demo_qwen_edit.yaml").touch()
    monkeypatch.chdir(tmp_path)
    given = ["--data.dataset_configs.0.train_data_dir", "data/photo_pairs", *flags]
    given += ["--data.dataset_configs.0.reference_dirs", "[before]"]
    given += [] if "aftr" in flags else ["--data.dataset_configs.0.target_dir", "after"]
    with pytest.raises(utils.UserError, match=re.escape(said)):
        utils.load_config(train_qwen_edit.Config, given, train_qwen_edit.audit)
