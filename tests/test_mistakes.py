"""What users get wrong ends in a message before anything is loaded, never in a traceback."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import PAIRS, ROOT, copy_pairs, run, small_config, suffix_dataset, write_config
from PIL import Image

import generate
import train_qwen_edit as script
from utils import FileIndex, UserError, load_config, run_record


def problems_of(checkpoint, folder, data=None, **changes):
    """What the audit says about a small config, as text; "" if all is well."""
    settings = {"data.dataset_configs": data} if data else {}
    file = write_config(folder, small_config(checkpoint, folder, **settings, **changes))
    try:
        load_config(script.Config, ["--config", str(file)], check=script.audit)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("t.csv", "target,control,prompt\na.png,b.png,red, then blue\n", "more cells than columns"),
        ("t.csv", f"target,control,prompt\n{'x' * 300}.png,b.png,p\n", "name too long"),
        ("t.jsonl", json.dumps({"target": "a", "references": ["b", None]}), "row 1: no reference"),
    ],
)
def test_a_bad_row_of_a_table(name, text, says, checkpoints, tmp_path):
    (tmp_path / name).write_text(text)
    data = [{"table": str(tmp_path / name), "resolution": 64}]
    assert says in problems_of(checkpoints["2511"], tmp_path, data)


def test_a_hub_data_set_without_pictures(checkpoints, tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {"target_image": ["a.png"], "control_images": [["b.png", None]], "prompt": ["x"]}
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "hub"))
    data = [{"hf_dataset": str(tmp_path / "hub"), "resolution": 64}]
    assert "row 1: no reference" in problems_of(checkpoints["2511"], tmp_path, data)
    columns["control_images"] = [["b.png"]]
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "hub2"))
    data = [{"hf_dataset": str(tmp_path / "hub2"), "resolution": 64}]
    assert "no file a.png" in problems_of(checkpoints["2511"], tmp_path, data)


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("data.reference_area", -5, "greater than or equal to"),
        ("data.reference_area", True, "data.reference_area"),
        ("model.devices", ["meta"], "no such device"),
        ("cache.vae_encoder_device", "xpu", "no such device"),
        ("model.lora.target_modules", "attn[", "no regular expression"),
        ("logging.output_dir", "/proc", "cannot write there"),
    ],
)
def test_a_setting_that_cannot_be(setting, value, says, checkpoints, tmp_path):
    assert says in problems_of(checkpoints["2511"], tmp_path, **{setting: value})


def test_numbers_of_references_count_from_1(checkpoints, tmp_path):
    data = [{"table": "t.csv", "resolution": 64, "selected_control_indexes": [0]}]
    found = problems_of(checkpoints["2511"], tmp_path, data)
    assert "selected_control_indexes.0: Input should be greater than or equal to 1" in found


def test_an_extension_has_a_dot(checkpoints, tmp_path):
    data = [suffix_dataset(tmp_path, caption_configs={"text": {"image": "after", "ext": "txt"}})]
    assert "'txt' is no extension such as .txt" in problems_of(checkpoints["2511"], tmp_path, data)


def test_nothing_left_to_train_and_a_name_of_two_data_sets(checkpoints, tmp_path):
    one = suffix_dataset(copy_pairs(tmp_path / "pairs"))
    validation = {"validation.eval_dataset_id": ["pairs"], "validation.steps": 2}
    found = problems_of(checkpoints["2511"], tmp_path, [one], **validation)
    assert "every sample is held out" in found
    found = problems_of(checkpoints["2511"], tmp_path, [one, one], **validation)
    assert "several data sets are 'pairs'; set id" in found


@pytest.mark.parametrize("text", [b"\xff\xfe\x00", b"[]", b'{"files": 3}', b""])
def test_a_state_file_of_any_garbage_is_a_damaged_checkpoint(text, tmp_path):
    (tmp_path / "state.json").write_bytes(text)
    assert script.valid_checkpoint(tmp_path) is None


def test_a_cut_off_run_record_is_written_anew(tmp_path):
    (tmp_path / "run.json").write_text('{"a": ')
    run_record(tmp_path, script.Config(), tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text())["earlier"] == []


def test_an_index_that_cannot_be_written_is_a_message(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"x")
    index = FileIndex(tmp_path)
    index._db.execute("PRAGMA query_only = ON")  # what a read-only cache folder does
    index.put(file, file.stat(), {"width": 1})
    with pytest.raises(UserError, match=r"index.sqlite of the cache cannot be written"):
        index.commit()


@pytest.mark.parametrize(
    "change",
    [
        {"caption": "make it snow"},
        {"conditioning_multidataset_sampling": "random"},
        {"selected_control_indexes": [1]},
        {"mask_dir": "masks"},
    ],
)
def test_what_the_layout_does_not_read_is_an_error(change, checkpoints, tmp_path):
    data = [suffix_dataset(copy_pairs(tmp_path / "pairs"), **change)]
    found = problems_of(checkpoints["2511"], tmp_path, data)
    assert f"{next(iter(change))}: not read beside image_configs" in found


def test_batch_configs_beside_folders_are_an_error(checkpoints, tmp_path):
    combination = {"target_config": "a", "caption_config": "b"}
    data = {"target_dir": "t", "reference_dirs": ["r"], "batch_configs": [combination]}
    found = problems_of(checkpoints["2511"], tmp_path, [data])
    assert "batch_configs: not read beside target_dir" in found


def test_2508_cannot_resize_only_what_the_vae_gets(checkpoints, tmp_path):
    data = suffix_dataset(
        copy_pairs(tmp_path / "pairs"),
        reference_configs={"before": [{"image": "before", "resize": 128}]},
        caption_configs={"text": {"image": "after"}},
    )
    found = problems_of(checkpoints["2508"], tmp_path, [data])
    assert "2508 shows its encoder the picture that the VAE gets" in found


def test_what_changes_no_result_does_not_stop_a_resume(make_trainer):
    parts = ("", "_target", "_reference", "_caption")
    again = suffix_dataset("pairs", **{f"recreate_cache{part}": True for part in parts})
    plain = make_trainer(**{"data.dataset_configs": [suffix_dataset("pairs")]})
    other = make_trainer(**{"data.dataset_configs": [again], "data.max_tokens_per_batch": 99})
    assert plain.trained_as() == other.trained_as()


def folders(root, names=("a", "b"), **changes):
    """A data set in the folders layout: one reference each, a second one for the first sample."""
    for name in names:
        for place in ("t", "r"):
            (root / place).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64)).save(root / place / f"{name}.png")
    Image.new("RGB", (64, 64)).save(root / "r" / f"{names[0]}_control_1.png")
    data = {"train_data_dir": str(root), "target_dir": "t", "reference_dirs": ["r"]}
    return [{**data, "caption": "x", "resolution": 64, **changes}]


def test_a_number_without_its_value_is_named(checkpoints, tmp_path):
    file = write_config(tmp_path, small_config(checkpoints["2511"], tmp_path))
    with pytest.raises(UserError, match=r"validation.steps: wanted a number"):
        load_config(script.Config, ["--config", str(file), "--validation.steps"])
    argv = ["--config", str(file), "--train.use_ema", "--data.shuffle", "false"]
    config = load_config(script.Config, argv)
    assert config.train.use_ema and not config.data.shuffle


def test_a_setting_in_the_wrong_place_is_told_where_it_belongs(checkpoints, tmp_path):
    data = [{**suffix_dataset(PAIRS), "suffix": "_T"}]
    text = problems_of(checkpoints["2511"], tmp_path, data)
    assert "not a setting here, but there is data.dataset_configs.*.image_configs.*.suffix" in text


def test_fewer_references_than_selected(checkpoints, tmp_path):
    data = folders(tmp_path / "d", selected_control_indexes=[1, 2])
    text = problems_of(checkpoints["2511"], tmp_path, data)
    assert "b.png has 1 reference(s), selected_control_indexes asks for number 2" in text
    data[0]["on_missing"] = "allow_fewer"
    assert not problems_of(checkpoints["2511"], tmp_path, data)


def test_a_mask_loss_without_any_mask(checkpoints, tmp_path):
    data, masked = folders(tmp_path / "d"), {"loss.mask": "file"}
    assert "no sample has a mask" in problems_of(checkpoints["2511"], tmp_path, data, **masked)
    Image.new("L", (64, 64)).save(tmp_path / "d/t/a_mask.png")
    assert not problems_of(checkpoints["2511"], tmp_path, data, **masked)


def test_a_mask_without_a_target_is_named(checkpoints, tmp_path):
    (tmp_path / "d/m").mkdir(parents=True)
    for name in ("a", "typo"):
        Image.new("L", (64, 64)).save(tmp_path / f"d/m/{name}.png")
    data = folders(tmp_path / "d", mask_dir="m")
    text = problems_of(checkpoints["2511"], tmp_path, data, **{"loss.mask": "file"})
    assert "typo.png has no target of its name" in text and "m/a.png" not in text


def test_a_column_that_is_not_read_is_named(checkpoints, tmp_path, caplog):
    folders(tmp_path)
    row = {"target": "t/a.png", "control": "r/a.png", "control_1": "r/b.png", "prompt": "x"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row | {"masc": "m.png"}))
    data = [{"table": "t.jsonl", "train_data_dir": str(tmp_path), "resolution": 64}]
    assert not problems_of(checkpoints["2511"], tmp_path, data)
    assert "columns not read: masc" in caplog.text and "control_1" not in caplog.text


def test_a_checkpoint_that_lacks_a_part(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["2511"], tmp_path / "model")
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "tokenizer")
    assert f"{folder} has no tokenizer, vae folder" in problems_of(folder, tmp_path)


def test_the_first_sheet_shows_masks_and_from_images(make_trainer, tmp_path):
    folder = copy_pairs(tmp_path / "data", ("coffee0", "hubble0"))
    for name in ("coffee0", "hubble0"):
        Image.new("L", Image.open(folder / f"{name}_R.png").size, 255).save(
            folder / f"{name}_M.png"
        )
    dataset = suffix_dataset(folder)
    dataset["image_configs"] |= {"mask": {"suffix": "_M"}, "tones": {"suffix": "_D"}}
    dataset["target_configs"]["after"][0]["from_image"] = "tones"
    dataset["batch_configs"][0]["mask"] = "mask"
    changes = {"data.dataset_configs": [dataset], "loss.mask": "file", "train.max_train_steps": 1}
    make_trainer(**changes).fit()
    sheet = Image.open(tmp_path / "out/samples/first_batch.png")
    assert sheet.width == 4 * 264 + 8  # reference | from | mask | target
    assert sheet.getpixel((8 + 2 * 264 + 128, 24 + 128)) == (255, 255, 255)


def test_generate_names_a_device_and_a_lora_that_do_not_fit(make_trainer, checkpoints, tmp_path):
    trainer = make_trainer()
    trainer.set_lora()
    file = trainer.save_lora(tmp_path / "a.safetensors")
    image = ["--image", PAIRS / "coffee0_R.png", "--prompt", "x", "--output", tmp_path / "x.png"]
    model = ["--pretrained_model_name_or_path", checkpoints["2511"], "--device", "cuda:99"]
    done = run("generate.py", *model, *image, check=False)
    assert done.returncode == 2 and "'cuda:99', but this machine has" in done.stderr
    other = ["--pretrained_model_name_or_path", "demo/qwen_edit_base", "--lora", file]
    done = run("generate.py", *other, *image, check=False)
    assert done.returncode == 2 and "does not fit this model" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_may_be_cut_off():
    command = f"{sys.executable} train_qwen_edit.py --help | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert "train_qwen_edit.py" in done.stdout and "Traceback" not in done.stderr


def test_without_a_network_a_published_model_is_a_message(tmp_path):
    """The plan needs none; a run says what it could not fetch."""
    file = write_config(tmp_path, small_config("Qwen/Qwen-Image-Edit-2511", tmp_path))
    away = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    for program in ("train_qwen_edit.py", "cache_embeddings.py"):
        done = run(program, "--config", file, check=False, env=away)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert "Qwen/Qwen-Image-Edit-2511" in done.stderr and "Hub" in done.stderr
    image = ["--image", PAIRS / "coffee0_R.png", "--prompt", "x", "--output", tmp_path / "x.png"]
    model = ["--pretrained_model_name_or_path", "Qwen/Qwen-Image-Edit-2511"]
    done = run("generate.py", *model, *image, check=False, env=away)
    assert done.returncode == 2 and "cannot be fetched from the Hub" in done.stderr


def test_a_folder_or_a_scale_that_is_no_number_as_lora(tmp_path):
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a folder; .*pytorch_lora_weights.safetensors"):
        generate.read_lora_about(tmp_path)
    path, scale = generate.parse_lora("a.safetensors:strong")
    assert scale == 1.0
    with pytest.raises(ValueError, match="a number is wanted"):
        generate.read_lora_about(path)
