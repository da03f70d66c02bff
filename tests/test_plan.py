"""--plan: parameters, tokens and memory of the full-size model without loading anything."""

import json
import resource
import time

import pytest
from conftest import PAIRS, run, small_config, suffix_dataset, write_config

import train_qwen_edit as script

MODEL = "Qwen/Qwen-Image-Edit-2511"


def settings(tmp_path, **changes):
    dataset = suffix_dataset(PAIRS, resolution=1024, holdout=["coffee0"], repeats=2)
    dataset["caption_configs"]["text"]["reference_list"] = None
    basic = {
        "data.dataset_configs": [dataset],
        "data.reference_area": "1mp",
        "data.batch_size": 1,
        "train.mixed_precision": "bf16",
        "train.gradient_checkpointing": True,
        "model.lora.r": 16,
    }
    return small_config(MODEL, tmp_path, **(basic | changes))


@pytest.fixture(scope="module")
def full_size():
    config = script.Config()
    return script.planned_transformer(config)


def test_a_plan_of_the_real_model_in_ten_seconds_without_a_download(tmp_path):
    file = write_config(tmp_path, settings(tmp_path))
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    blocked = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    done = run("train_qwen_edit.py", "--plan", "--config", file, env=blocked)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # ten seconds of work; beside another test process the clock may show more
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    assert time.monotonic() - begin < 20
    for words in (
        "20,430,401,088 parameters",
        "23,592,960 parameters",
        "no_change: 40.9 GB",
        "13 samples, 1 held out, x 2 repeats",
        "1024x1024 + 1024x1024",
        "What would lower it",
    ):
        assert words in done.stdout, f"{words}\n{done.stdout}"
    assert not list(tmp_path.rglob("*.safetensors"))


def test_tokens_of_the_case_in_the_books():
    load = script.Load(((1024, 1024), (1024, 1024)), 300, 1)
    assert load.tokens == 8492
    assert script.Load(((512, 512), (512, 512)), 300, 1).tokens == 2348
    assert script.Load(((1024, 1024), *[(1024, 1024)] * 3), 720, 1).tokens == 17104


@pytest.mark.parametrize(
    ("size", "tokens"),
    [((384, 384), 196), ((384, 480), 238), ((432, 480), 255), ((512, 512), 324), ((512, 640), 414)],
)
def test_vision_tokens(size, tokens):
    picture = script.Picture(PAIRS, "x", size)
    example = script.Example("a", picture, (), (picture,), "")
    assert script.text_tokens(example) - 11 == tokens  # 5 of the turn, 6 around a picture


def test_text_tokens_are_near_the_tokenizers(make_trainer):
    """The estimate against the real template and processor (captions of ten words)."""
    trainer = make_trainer(**{"model.pretrained_model_name_or_path": "demo/qwen_edit_base"})
    from PIL import Image

    images = [Image.new("RGB", (384, 384))] * 2
    embed, _ = trainer.encode_prompt_image_embedding("give it the look of a photo", images)
    picture = script.Picture(images[0], "x", (384, 384))
    example = script.Example("a", picture, (), (picture,) * 2, "give it the look of a photo")
    assert script.text_tokens(example) == pytest.approx(embed.shape[1], rel=0.05)


def test_operations_and_memory_of_the_books(full_size):
    """peers' counts: 585.5 TFLOP with, 416.9 without checkpointing; 45 to 47 GB in bf16."""
    config = script.Config()
    load = script.Load(((1024, 1024), (1024, 1024)), 300, 1)
    without = script.Config(train={"gradient_checkpointing": False})
    assert script.step_tflop(config, full_size, 8492) == pytest.approx(585.5, rel=1e-3)
    assert script.step_tflop(without, full_size, 8492) == pytest.approx(416.9, rel=1e-3)
    assert script.peak_gb(config, full_size, 23_592_960, [load]) == pytest.approx(46, abs=1)
    assert script.peak_gb(without, full_size, 23_592_960, [load]) == pytest.approx(111, abs=4)


@pytest.mark.parametrize(
    ("precision", "gb"),
    [("no_change", 40.86), ("int8-quanto", 27.3), ("int4-quanto", 20.9), ("nf4-bnb", 21.4)],
)
def test_size_of_the_quantised_model(precision, gb, full_size):
    """Modulation (6.8 of 20.4 billion parameters) stays in bf16."""
    config = script.Config(model={"base_model_precision": precision})
    assert script.weights_gb(config, full_size)[0] == pytest.approx(gb, abs=0.2)


def test_every_way_out_is_a_valid_config_and_lowers_the_peak(full_size):
    config = script.Config(
        train={"gradient_checkpointing": False}, data={"batch_size": 4, "reference_area": "1mp"}
    )
    load = script.Load(((512, 512), (1024, 1024)), 300, 1)
    peak = script.peak_gb(config, full_size, 0, [load])
    ways = dict(script.ways_out(config, 60))
    assert set(ways) == {
        "train.gradient_checkpointing: true",
        "data.batch_size: 1",
        "data.reference_area: target",
        "model.base_model_precision: int8-quanto",
        "model.base_model_precision: nf4-bnb",
        "model.blocks_to_swap: 50, train.gradient_checkpointing: true",
    }
    for words, other in ways.items():
        smaller = script.Load(((512, 512), (512, 512)), 300, 1)
        now = smaller if "reference_area" in words else load
        assert script.peak_gb(other, full_size, 0, [now]) < peak - 1, words


def test_the_plans_cache_is_what_gets_cached(checkpoints, tmp_path):
    """Entries and bytes of the estimate against a cache that was filled."""
    dataset = suffix_dataset(PAIRS, views=2, view_scale=0.6)
    dataset["batch_configs"][0]["caption_dropout"] = 0.1
    raw = small_config(checkpoints["2511"], tmp_path, **{"data.dataset_configs": [dataset]})
    config = script.Config.model_validate(raw)
    flavour = script.detect_flavour(str(checkpoints["2511"]))
    outlook = script.look_ahead(config, flavour, 64)
    trainer = script.QwenImageEditTrainer(config)
    trainer.cache_embeddings()
    jobs = trainer.cache_jobs().values()
    prompts = sum(isinstance(job, script.Example) for job in jobs)
    assert (outlook.latents, outlook.prompts) == (len(jobs) - prompts, prompts)
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    payload = sum(file.stat().st_size - 200 for file in files) / 1e9  # without the headers
    # the tiny tokenizer cuts captions into more tokens than the real one
    assert outlook.cache_gb == pytest.approx(payload, rel=0.25)


def test_a_plan_names_mistakes_like_a_run(tmp_path):
    config = settings(tmp_path, **{"model.lora.rr": 1})
    file = write_config(tmp_path, config)
    done = run("train_qwen_edit.py", "--plan", "--config", file, check=False)
    assert done.returncode == 2 and "model.lora.rr: unknown setting" in done.stderr
    assert json.loads((tmp_path / "out/audit.json").read_text())["samples"] == 13


def test_a_plan_offers_only_what_goes_together():
    def offers(model):
        config = script.Config(model=model)
        return {other.model.precision for _, other in script.ways_out(config, 60)}

    assert "nf4-bnb" in offers({"base_model_precision": "int8-quanto"})
    quantised = {"base_model_precision": "int8-quanto", "quantize_activations": True}
    assert "nf4-bnb" not in offers(quantised)
    assert "nf4-bnb" not in offers({"lora": {"method": "lokr"}})
    assert "int8-quanto" not in offers({"lora": {"method": "dora"}})


@pytest.mark.parametrize("model", sorted(script.PUBLISHED))
def test_a_plan_of_a_published_model_never_asks_the_hub(model, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "fetch_from_hub", lambda *args: pytest.fail("the Hub was asked"))
    raw = settings(tmp_path, **{"model.pretrained_model_name_or_path": model})
    config = script.Config.model_validate(raw)
    assert script.audit(config) == []
    assert "20,430,401,088 parameters" in script.plan(config)
    beyond = {"model.lora.exclude_blocks": "60", "model.pretrained_model_name_or_path": model}
    config = script.Config.model_validate(settings(tmp_path, **beyond))
    assert any("no block 60, the last is 59" in problem for problem in script.audit(config))
