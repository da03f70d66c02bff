"""configs/: each line says why, and each recipe fits the card that its name promises."""

import re

import pytest
import yaml
from conftest import ROOT
from test_seeds import folder_pictures, suffix_pictures, trained

import train_qwen_edit as script
from utils import load_config, load_tool

plan = load_tool("plan")
RECIPES = sorted((ROOT / "configs").glob("qwen_edit_*_lora*.yaml"))
RECIPES.append(ROOT / "configs" / "qwen_edit_multi_reference.yaml")
CARDS_GIB = {"": 32, "_24g": 24, "_80g": 80}
LARGE = "qwen_edit_2511_lora_24g_1024"  # the second way to use 24 GB, for one model


def load(file):
    return load_config(script.Config, ["--config", str(file)])


def unexplained(node, lines, path=""):
    """Settings without a comment on their line, above it, or on the block they belong to."""
    if isinstance(node, yaml.ScalarNode):
        return
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from unexplained(item, lines, path)
        return
    for key, value in node.value:
        here = f"{path}.{key.value}".lstrip(".")
        number = key.start_mark.line
        said = "#" in lines[number] or lines[number - 1].lstrip().startswith("#")
        block = here.count(".") == 0 or here in ("model.lora", "data.dataset_configs")
        if block and not isinstance(value, yaml.ScalarNode):
            yield from unexplained(value, lines, here)
        elif not said:
            yield here


@pytest.mark.parametrize("file", RECIPES, ids=lambda p: p.stem)
def test_every_line_of_a_recipe_says_why(file):
    text = file.read_text()
    assert not list(unexplained(yaml.compose(text), text.splitlines()))


def test_there_is_a_recipe_for_every_model_and_card():
    names = {f"qwen_edit_{kind}_lora{card}" for kind in ("v1", "v2", "2511") for card in CARDS_GIB}
    assert {file.stem for file in RECIPES} == names | {"qwen_edit_multi_reference", LARGE}


@pytest.mark.parametrize("file", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_fits_its_card(file):
    """By the plan's estimate, for square pairs; half a gigabyte is left to the allocator."""
    config = load(file)
    flavour = script.detect_flavour(config.model.pretrained_model_name_or_path)
    transformer = plan.planned_transformer(script, config)
    side = config.data.dataset_configs[0].resolution
    area = side if config.data.reference_area == "target" else 1024
    vision = (area / 28) ** 2 if flavour.vision_area is None else 196
    tokens = plan.Load(((side, side), (area, area)), 100 + round(vision), 1).tokens
    trained = 23_592_960 * config.model.lora.r // 16
    peak = plan.qwen_peak_gb(script, config, transformer, trained, tokens * config.data.batch_size)
    card = re.search(r"_(\d+)g", file.stem)
    assert peak < (int(card[1]) if card else CARDS_GIB[""]) * 1.0737 - 0.5
    named = re.search(r"bout (\d+)", file.read_text())
    assert peak == pytest.approx(float(named[1]), abs=1)


@pytest.mark.parametrize("card", CARDS_GIB)
def test_the_recipes_of_the_three_models_differ_in_their_model_alone(card):
    found = []
    for kind in ("v1", "v2", "2511"):
        config = load(ROOT / "configs" / f"qwen_edit_{kind}_lora{card}.yaml").model_dump()
        config["model"].pop("pretrained_model_name_or_path")
        config["logging"].pop("output_dir")
        found.append(config)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("card", CARDS_GIB)
def test_the_recipe_of_a_card_trains(card, checkpoints, tmp_path):
    folder_pictures(tmp_path, ["after", "before"], samples=6)
    changes = {
        "data.dataset_configs.0.train_data_dir": tmp_path,
        "data.dataset_configs.0.resolution": 64,
        "data.reference_area": "target",
        "train.gradient_checkpointing": True,
        "validation.num_inference_steps": 2,
    }
    recipe = ROOT / "configs" / f"qwen_edit_2511_lora{card}.yaml"
    trainer = trained(recipe, tmp_path, checkpoints["2511"], **changes)
    assert trainer.precision == load(recipe).model.base_model_precision
    assert len(trainer.data.samples) == 6 and len(trainer.data.held_out) == 1


def test_the_recipe_with_many_references_is_the_documents_example(checkpoints, tmp_path):
    changes = {}
    for number, ds in enumerate(load(RECIPES[-1]).data.dataset_configs):
        suffixes = {image.suffix for image in ds.image_configs.values()}
        folder = suffix_pictures(tmp_path / ds.name, suffixes)
        changes[f"data.dataset_configs.{number}.train_data_dir"] = folder
        changes[f"data.dataset_configs.{number}.resolution"] = 64
    trainer = trained(RECIPES[-1], tmp_path, checkpoints["2511"], **changes)
    variants = [v for s in trainer.data.samples for v in s.variants]
    assert len(variants) == 3 * 6 + 3 * 5
    assert all(v.target.stem.endswith("_T") for v in variants)
    assert sum(v.start is not None for v in variants) == 3 * 5
