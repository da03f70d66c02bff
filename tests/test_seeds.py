"""The examples of the three documents this project answers, as they stand in tests/seeds/.

Only paths, device numbers, the model's name, the resolution (64 px) and the number of steps are
replaced. Each data example trains: converted and, where the grammar is ours, as it is.
"""

import ast
import inspect
import json
import re
import shlex
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run
from PIL import Image
from safetensors.torch import load_file

import train_qwen_edit as script
from utils import UserError, load_config, load_tool

SEEDS, tool = ROOT / "tests" / "seeds", load_tool("convert_config")
QUICK = {
    "data.num_workers": 0,
    "train.max_train_steps": 2,
    "train.mixed_precision": "no",
    "train.gradient_checkpointing": False,
    "lr_scheduler.warmup_steps": 0,
}


def overrides(values):
    """As one types them: text without quotes."""
    for key, value in values.items():
        plain = isinstance(value, str | Path)
        yield f"--{key}={value if plain else json.dumps(value)}"


def text_of(name):
    return (SEEDS / name).read_text()


def written(path, config):
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


def picture(file, seed):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (64, 72, 3), np.uint8)
    Image.fromarray(pixels).save(file)


def suffix_pictures(folder, suffixes):
    """name_T.png, name_T.txt, ... for every suffix."""
    for number in range(3):
        for place, suffix in enumerate(sorted(suffixes)):
            picture(folder / f"sample{number}{suffix}.png", 100 * number + place)
            (folder / f"sample{number}{suffix}.txt").write_text(f"from {suffix} to T")
    return str(folder)


def folder_pictures(root, folders, samples=3):
    """The same names in every folder, a text with two captions beside the first one's."""
    for number in range(samples):
        for place, folder in enumerate(folders):
            picture(root / folder / f"{number}.png", 100 * number + place)
        (root / folders[0] / f"{number}.txt").write_text("make it snow\nlet snow fall\n")
    return root / folders[0]


def trained(file, tmp_path, checkpoint, **changes):
    """The trainer after a run of a config file, audited as the command does it."""
    changes = {
        "model.pretrained_model_name_or_path": checkpoint,
        "logging.output_dir": tmp_path / "out",
        "cache.cache_dir": tmp_path / "cache",
        **changes,
    }
    argv = ["--config", str(file), *overrides(QUICK | changes)]
    trainer = script.QwenImageEditTrainer(load_config(script.Config, argv, script.audit))
    trainer.fit()
    lora = load_file(tmp_path / "out" / script.LORA_FILE)
    assert trainer.global_step == 2
    assert any(tensor.any() for name, tensor in lora.items() if "lora_B" in name)
    return trainer


def converted(kind, tmp_path, *sources):
    """Settings that the converter makes of these files."""
    files = [written(tmp_path / f"{number}.json", s) for number, s in enumerate(sources)]
    config = tool.convert(kind, files, lambda key, text: None)
    return config.model_dump(mode="json", exclude_defaults=True)


# --- T2ITrainer -----------------------------------------------------------------------------------


def small_data_set(folder):
    """The document's fragments, put together as it describes; some end in a comma."""
    folder.mkdir()
    data = {"train_data_dir": suffix_pictures(folder, ("_T", "_R", "_D")), "resolution": "512"}
    for kind in ("image", "target", "reference", "caption", "batch"):
        text = text_of(f"000_{kind}_configs.json").strip().removesuffix(",")
        (folder / "fragment.json").write_text(text)
        data[f"{kind}_configs"] = tool.read_json(folder / "fragment.json")
    return {**data, "recreate_cache": True, "repeats": 2}


def long_example(folder):
    """The document's second example, on pictures with its suffixes."""
    source = tool.read_json(SEEDS / "000_dataset_configs.json")
    for ds in source["dataset_configs"]:
        suffixes = {image["suffix"] for image in ds["image_configs"].values()}
        name = ds["train_data_dir"].rsplit("/", 1)[1]
        ds["train_data_dir"] = suffix_pictures(folder / name, suffixes)
    return source


def as_it_is(source, tmp_path):
    """Its data sets as they are written; 1 MP pictures take a CPU too long."""
    data = {**json.loads(json.dumps(source)), "reference_area": "target"}
    return at_64_px({"data": data}, tmp_path)


def through_the_converter(source, tmp_path):
    """Block 59, that it freezes, is none of a tiny model's."""
    ours = converted("t2itrainer", tmp_path, {**source, "validation_ratio": 0})
    assert "(?!(59)" in ours["model"]["lora"]["target_modules"]
    return at_64_px(ours, tmp_path)


def at_64_px(config, tmp_path):
    for ds in config["data"]["dataset_configs"]:
        assert int(ds["resolution"]) == 512
        ds["resolution"] = 64
    return written(tmp_path / "my.yaml", config)


WAYS = pytest.mark.parametrize("way", [as_it_is, through_the_converter])


@WAYS
def test_the_small_example_names_its_mistake_and_trains_without_it(way, checkpoints, tmp_path):
    ds = small_data_set(tmp_path / "photos")
    with pytest.raises(UserError, match="did you mean 'reference_train'"):
        trained(way({"dataset_configs": [ds]}, tmp_path), tmp_path, checkpoints["2511"])
    ds["batch_configs"][0]["reference_config"] = "reference_train"
    file = way({"dataset_configs": [ds]}, tmp_path)
    samples = trained(file, tmp_path, checkpoints["2511"]).data.samples
    assert len(samples) == 3
    for sample in samples:
        (variant,) = sample.variants
        assert Path(variant.target).stem.endswith("_T") and variant.caption == "from _T to T"
        assert [Path(r.path).stem[-2:] for r in variant.references] == ["_R", "_D"]
        assert variant.caption_dropout == 0.1
        assert [r.area for r in variant.vision] == [384**2] * 2


def test_two_orders_of_references_are_two_combinations(checkpoints, tmp_path):
    ds = small_data_set(tmp_path / "photos")
    (tmp_path / "two.json").write_text(
        text_of("000_reference_configs_two_orders.json").strip("\n,")
    )
    ds["reference_configs"] = tool.read_json(tmp_path / "two.json")
    ds["caption_configs"]["train_caption"].pop("reference_list")
    batch = {"target_config": "target_train", "caption_config": "train_caption"}
    ds["batch_configs"] = [batch | {"reference_config": name} for name in ds["reference_configs"]]
    file = as_it_is({"dataset_configs": [ds]}, tmp_path)
    sample = trained(file, tmp_path, checkpoints["2511"]).data.samples[0]
    orders = [[Path(r.path).stem[-1] for r in v.references] for v in sample.variants]
    assert orders == [["R", "D"], ["D", "R"]]


@WAYS
def test_the_long_example_trains_every_single_reference_towards_t(way, checkpoints, tmp_path):
    trainer = trained(way(long_example(tmp_path), tmp_path), tmp_path, checkpoints["2511"])
    assert [len(s.variants) for s in trainer.data.samples] == [6] * 3 + [5] * 3
    for sample in trainer.data.samples:
        for variant in sample.variants:
            (reference,) = variant.references
            assert Path(variant.target).stem.endswith("_T")
            assert variant.vision[0].path == reference.path
            assert variant.caption == f"from _{Path(reference.path).stem.rsplit('_')[-1]} to T"
            assert variant.caption_dropout == 0.1
            assert variant.weight == pytest.approx(1 / len(sample.variants))
            start = Path(variant.start).stem.rsplit("_")[-1] if variant.start else None
            assert start == (None if sample.dataset == 0 else "DT")
    assert trainer.step_plan().steps_per_epoch == 3 * 8 + 3 * 30


# --- SimpleTuner ----------------------------------------------------------------------------------


def simpletuner_example(version, tmp_path, **changes):
    """(config.json, multidatabackend.json), the folders of its data sets filled."""
    source = tool.read_json(SEEDS / "002_config.jsonc") | changes
    text = text_of(f"002_multidatabackend_edit_{version}.jsonc")
    data = json.loads(text.replace('"/datasets', f'"{tmp_path}').replace("1024", "64"))
    folders = [d["instance_data_dir"] for d in data if "instance_data_dir" in d]
    folder_pictures(tmp_path, folders)
    return source, data


AS_LARGE = {"data.reference_area": 64 * 64}


def test_edit_v1_trains_by_the_manual_command(checkpoints, tmp_path):
    """`simpletuner train --config A --data B` -> convert_config.py simpletuner A B, then train."""
    sources = simpletuner_example("v1", tmp_path)
    words = shlex.split(text_of("002_train_config.sh").replace("\\\n", " "))
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert list(given) == ["--config", "--data"]
    for name, content in zip(given.values(), sources, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        written(tmp_path / name, content)
    command = (ROOT / "tools" / "convert_config.py", "simpletuner", *given.values())
    (tmp_path / "my.yaml").write_text(run(*command, cwd=tmp_path).stdout)
    model = {"model.pretrained_model_name_or_path": checkpoints["2508"]}
    flags = ["--config", "my.yaml", *overrides(QUICK | AS_LARGE | model)]
    run(script.__file__, *flags, cwd=tmp_path)
    assert (tmp_path / "outputs" / "qwen_edit" / script.LORA_FILE).exists()
    config = load_config(script.Config, ["--config", str(tmp_path / "my.yaml")])
    assert config.model.pretrained_model_name_or_path == "Qwen/Qwen-Image-Edit"
    assert config.model.base_model_precision == "int8-quanto"
    assert config.loss.timestep_shift == 1.73 and config.validation.resolution == 1024
    data, problems = script.find_samples(config, script.detect_flavour("Qwen/Qwen-Image-Edit"))
    assert len(data.samples) == 3 and not problems
    for sample in data.samples:  # a caption in each line of the text file
        assert [v.caption for v in sample.variants] == ["make it snow", "let snow fall"]
        for variant in sample.variants:
            assert Path(variant.target).parent.name == "images"
            assert [Path(r.path).parent.name for r in variant.references] == ["reference"]


def test_edit_v2_trains_with_all_three_references_as_large_as_the_target(checkpoints, tmp_path):
    changes = {"model_flavour": "edit-v2", **tool.read_json(SEEDS / "002_model_kwargs.jsonc")}
    ours = converted("simpletuner", tmp_path, *simpletuner_example("v2", tmp_path, **changes))
    assert ours["data"]["reference_area"] == "target"
    trainer = trained(written(tmp_path / "my.yaml", ours), tmp_path, checkpoints["2509"])
    expected = ["reference_a", "reference_b", "reference_c"]
    for sample in trainer.data.samples:
        for variant in sample.variants:
            assert [Path(r.path).parent.name for r in variant.references] == expected
    shown = trainer.data.resolve(script.Draw(0, 0)).pictures
    assert {picture.size for picture in shown["control"]} == {shown["pixel"][0].size}


def test_eval_dataset_id_is_drawn_and_never_trained(checkpoints, tmp_path):
    changes = tool.read_json(SEEDS / "002_eval_dataset_id.jsonc")
    source, data = simpletuner_example("v1", tmp_path, **changes, validation_step_interval=1)
    text = json.dumps(data[:2]).replace("qwen-edit-", "qwen-edit-val-").replace("images", "held")
    held_out = json.loads(text)
    held_out[0] |= {"id": "qwen-edit-val", "instance_data_dir": f"{tmp_path}/val"}
    held_out[1] |= {"instance_data_dir": f"{tmp_path}/val_reference"}
    folder_pictures(tmp_path, ["val", "val_reference"], samples=2)
    ours = converted("simpletuner", tmp_path, source, data + held_out)
    changes = {"validation.resolution": 64, "validation.num_inference_steps": 2, **AS_LARGE}
    file = written(tmp_path / "my.yaml", ours)
    trainer = trained(file, tmp_path, checkpoints["2508"], **changes)
    assert [s.held_out for s in trainer.data.samples] == [False] * 3 + [True] * 2
    assert (tmp_path / "out" / "samples" / "step_000001.png").exists()


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_examples_commands_have_a_recipe_that_trains(version, checkpoints, tmp_path):
    """`simpletuner train example=NAME` -> the recipe that docs/convert_config.md names."""
    name = f"qwen_image.edit-{version}-lora"
    assert f"simpletuner train example={name}" in text_of("002_train_example.sh").splitlines()
    page = (ROOT / "docs" / "convert_config.md").read_text()
    [recipe] = re.findall(rf"\| `example={name}` \| `(configs/\S+)` \|", page)
    folder_pictures(tmp_path, ["after", "before"], samples=6)
    changes = {"data.dataset_configs.0.train_data_dir": tmp_path, **AS_LARGE}
    changes |= {"data.dataset_configs.0.resolution": 64, "validation.num_inference_steps": 2}
    kind = checkpoints["2508" if version == "v1" else "2509"]
    trainer = trained(ROOT / recipe, tmp_path, kind, **changes)
    assert trainer.flavour.name == f"edit-{version}"
    assert sum(not s.held_out for s in trainer.data.samples) == 5


# --- QwenImageEditTrainer -------------------------------------------------------------------------


@pytest.fixture
def notebook(checkpoints, tmp_path, monkeypatch):
    """The modules that the document imports, its config file, and a loader of batches."""
    (tmp_path / "configs").mkdir()
    text = text_of("003_config.yaml").replace("/path/to/cache", str(tmp_path / "cache"))
    config_file = tmp_path / "configs" / "qwen_image_edit_config.yaml"
    config_file.write_text(re.sub(r"cuda:\d", "cpu", text))
    named = {
        "model.pretrained_model_name_or_path": checkpoints["2511"],
        "logging.output_dir": tmp_path / "out",
        "train.max_train_steps": 2,
        "train.mixed_precision": "no",  # these CPUs are slower in bf16
        "data.reference_area": "target",
        "data.dataset_configs.0.target_dir": folder_pictures(tmp_path, ["after", "before"]),
        "data.dataset_configs.0.reference_dirs": ["before"],
        "data.dataset_configs.0.resolution": 64,  # what predict draws
    }

    def load(path):
        return load_config(script.Config, ["--config", path, *overrides(named)])

    trainer = types.ModuleType("qwen_image_edit_trainer")
    trainer.QwenImageEditTrainer = script.QwenImageEditTrainer
    config = types.ModuleType("data.config")
    config.load_config_from_yaml = load
    for module in (trainer, types.ModuleType("data"), config):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    photos = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), np.uint8)
    batch = {"image": [photos[0]], "control": [[photos[1]]], "prompt": ["make it snow"]}
    return {"train_dataloader": [batch, batch], "prompt_image": photos[1], "prompt": "snow"}


def test_the_usage_examples_run_as_written(notebook, tmp_path):
    exec(text_of("003_basic_usage.py"), notebook)
    trainer = notebook["trainer"]
    assert trainer.global_step == 2
    assert notebook["image"].shape == (64, 64, 3) and notebook["image"].dtype == np.uint8
    assert trainer.config.predict.devices.transformer == "cpu"
    code = text_of("003_advanced_usage.py").replace("/path/to/lora", str(tmp_path / "lora"))
    later = notebook | {"trainer": script.QwenImageEditTrainer(trainer.config)}
    assert later["trainer"].cache_exist
    exec(code, later)
    trainer = later["trainer"]
    assert trainer.global_step == 2 and (tmp_path / "lora" / script.LORA_FILE).exists()
    weight = trainer.transformer.transformer_blocks[0].attn.to_q.base_layer.weight
    assert trainer.precision == "fp8-quanto" and "qfloat8" in str(weight.qtype)
    assert trainer.transformer.peft_config and later["image"].shape == (64, 64, 3)


def test_the_yaml_is_read_as_written(tmp_path):
    """Of gradient_checkpointing it shows both choices in one block: a duplicate key."""
    config = load_config(script.Config, ["--config", str(SEEDS / "003_config.yaml")])
    assert config.train.gradient_checkpointing and config.train.max_grad_norm == 1
    cache, devices = config.cache, config.predict.devices
    assert (cache.vae_encoder_device, cache.text_encoder_device) == ("cuda:1", "cuda:2")
    assert cache.use_cache and str(cache.cache_dir) == "/path/to/cache"
    found = (devices.vae, devices.text_encoder, devices.transformer)
    assert found == ("cuda:5", "cuda:6", "cuda:7")
    file = SEEDS / "003_gradient_checkpointing.yaml"
    with pytest.raises(UserError, match="duplicate key 'gradient_checkpointing'"):
        load_config(script.Config, ["--config", str(file)])
    *head, first, second = file.read_text().splitlines()
    for line, expected in ((first, True), (second, False)):
        (tmp_path / "one.yaml").write_text("\n".join([*head, line]))
        config = load_config(script.Config, ["--config", str(tmp_path / "one.yaml")])
        assert config.train.gradient_checkpointing is expected


def test_every_method_of_the_document_exists_and_takes_its_arguments():
    listed = 0
    for file in sorted(SEEDS.glob("003_*_methods.py")):
        for name, arguments in re.findall(r"^(\w+)\((.*?)\)", file.read_text(), re.MULTILINE):
            signature = inspect.signature(getattr(script.QwenImageEditTrainer, name))
            names = [argument.strip() for argument in arguments.split(",") if argument.strip()]
            if "..." not in names:  # else not all are named
                signature.bind("self", *names)
            listed += 1
    assert listed == 22


def test_predict_has_the_documents_signature():
    document = ast.parse(text_of("003_predict_signature.py") + "    pass\n").body[0].args
    ours = list(inspect.signature(script.QwenImageEditTrainer.predict).parameters.values())
    names = [argument.arg for argument in document.args]
    assert [p.name for p in ours[: len(names)]] == names
    defaults = [ast.literal_eval(node) for node in document.defaults]
    found = [p.default for p in ours[len(names) - len(defaults) : len(names)]]
    # null is the model's own guidance: 4 as the document says, and none for 2.1, which came later
    assert [script.Flavour.guidance if d is None else d for d in found] == defaults
