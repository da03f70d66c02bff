"""configs/: each loads with its script, says why, finds its data, fits the card of its name."""

import functools
import itertools
import re

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import train_dreambooth_pairs
import train_pairedit
import train_qwen_edit as script
from utils import load_config, load_tool

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
RECIPES = [file for file in CONFIGS if "_lora" in file.stem or "multi_reference" in file.stem]
KINDS = {"pairedit": train_pairedit, "dreambooth": train_dreambooth_pairs, "qwen": script}
tool = load_tool("plan")


def load(file):
    [kind] = [KINDS[kind] for kind in KINDS if kind in file.stem]
    return load_config(kind.Config, ["--config", str(file)])


@functools.cache
def full_size(name):
    model = {"pretrained_model_name_or_path": name}
    transformer = tool.planned_transformer(script, script.Config.model_validate({"model": model}))
    script.add_lora(transformer, script.LoraConfig(), 0)
    trained = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    return tool.planned_transformer(script, script.Config.model_validate({"model": model})), trained


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_with_its_script(file):
    config = load(file)
    assert type(config).model_validate(config.model_dump(mode="json")) == config


def unexplained(lines):
    """Yield settings without a comment on their line, above it, or on the block they belong to."""
    explained: list[int] = []  # indents of blocks with a comment
    for above, line in itertools.pairwise(lines):
        indent = len(line) - len(line.lstrip(" -"))
        explained = [place for place in explained if place < indent]
        if "#" in line or above.lstrip().startswith("#"):
            explained += [indent] * (indent > 0)
        elif not explained and re.search(r": \S", line):
            yield line


@pytest.mark.parametrize("file", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_says_why_finds_its_data_and_fits_its_card(file, tmp_path, monkeypatch):
    text = file.read_text()
    assert not list(unexplained(text.splitlines()))
    monkeypatch.chdir(tmp_path)
    config = load(file)
    for number in range(10):
        for ds in config.data.dataset_configs:
            files = [f"{number}{role.suffix}" for role in ds.image_configs.values()]
            for name in files or [f"{folder}/{number}" for folder in ("after", "before")]:
                path = ds.train_data_dir / f"{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                noise = np.random.default_rng([number, *name.encode()]).integers(
                    0, 255, (64, 64, 3)
                )
                Image.fromarray(noise.astype(np.uint8)).save(path)
                path.with_suffix(".txt").write_text(f"edit {name}")
    everything = script.utils.check_setup
    monkeypatch.setattr(script.utils, "check_setup", lambda packages=(), **what: everything(**what))
    assert script.audit(config) == []
    flavour = script.detect_flavour(config.model.pretrained_model_name_or_path)
    data, _ = script.find_samples(config, flavour)
    held_out = round(10 * config.data.dataset_configs[0].holdout_ratio)
    assert len(data.samples) == 10 * len(config.data.dataset_configs)
    assert len(data.held_out) == held_out and (held_out > 0) == bool(config.validation.steps)
    transformer, of_rank_16 = full_size(config.model.pretrained_model_name_or_path)
    loads = tool.look_ahead(script, config, 1).loads
    tokens = max(tool.sample_tokens(config, transformer, load)[0] for load in loads)
    trained = of_rank_16 * config.model.lora.r // 16
    peak = tool.qwen_peak_gb(script, config, transformer, trained, config.data.batch_size * tokens)
    card = re.search(r"_(\d+)g|$", file.stem)
    assert peak < int(card[1] or 32) * 1.0737 - 0.5  # GiB of the card in GB
    assert peak == pytest.approx(float(re.search(r"bout (\d+)", text)[1]), abs=1)
    if "_lora" in file.stem:  # the recipes of the three models differ in their model alone
        twin = load(file.with_name(re.sub("v1|v2", "2511", file.name))).model_dump()
        twin["model"]["pretrained_model_name_or_path"] = config.model.pretrained_model_name_or_path
        twin["logging"] = config.model_dump()["logging"]
        assert twin == config.model_dump()


def test_the_readmes_table_of_cards_says_what_the_files_say():
    rows = re.findall(
        r"\| (\d+) GB \|.*`(\w+\.yaml)` \| (\d+) GB \|", (ROOT / "README.md").read_text()
    )
    assert len(rows) >= 6 and {int(card) for card, _, _ in rows} >= {16, 24, 48, 80}
    for card, name, peak in rows:
        text = (ROOT / "configs" / name).read_text()
        assert int(peak) == int(re.search(r"bout (\d+)", text)[1]) < int(card) * 1.0737 - 0.5, name


def test_the_page_of_cards_says_what_plan_computes():
    """Rows of Qwen models: peak and operations of one sample, with one reference of its size."""
    text, checked = (ROOT / "docs/cards.md").read_text(), 0
    lines = [line for line in text.splitlines() if re.match(r"\| \d+ GB \| Qwen", line)]
    for line in lines:
        card, model, size, _, peak, tflop, how = (c.strip() for c in line.strip("| ").split("|"))
        file, flags = re.findall(r"`([^`]+)`", how)[0], re.findall(r"`(--[^`]+)`", how)
        argv = ["--config", str(ROOT / "configs" / file), *" ".join(flags).split()]
        config = load_config(script.Config, argv)
        transformer, trained = full_size(config.model.pretrained_model_name_or_path)
        side, flavour = int(size.split()[0]), tool.flavour_of(script, config)
        text_tokens = 60 if flavour.prefix_is_constant else 300
        load = tool.Load(((side, side), (side, side)), text_tokens, 1)
        tokens, pairs = tool.sample_tokens(config, transformer, load)
        found = tool.qwen_peak_gb(
            script, config, transformer, trained, tokens * config.data.batch_size
        )
        assert found == pytest.approx(float(peak.split()[0]), abs=1), line
        assert found < int(card.split()[0]) * 1.0737 - 0.5, line
        if tflop:
            own = tool.qwen_step_tflop(config, transformer, tokens, pairs)
            own *= 1 + tool.further_passes(config, flavour)
            assert own == pytest.approx(float(tflop), abs=1), line
        assert ("2.1" in model) == flavour.prefix_is_constant
        checked += 1
    assert checked >= 10
