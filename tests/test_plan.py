"""--plan: parameters, tokens, memory and time of full-size models without loading anything."""

import re
import resource

import pytest
from conftest import PAIRS, ROOT, run, slider_settings, small_config, suffix_dataset, write_config
from PIL import Image

import train_qwen_edit as script
from utils import load_tool

tool = load_tool("plan")
MODEL = "Qwen/Qwen-Image-Edit-2511"
FLAVOUR = script.PUBLISHED[MODEL]
TOKENS = 8492  # 1024 x 1024 px, one reference of that size, 300 tokens of text


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
    return tool.planned_transformer(script, script.Config())


def test_a_plan_of_the_real_model_in_ten_seconds_of_work_without_a_download(tmp_path):
    file = write_config(tmp_path, settings(tmp_path))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    blocked = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    done = run("train_qwen_edit.py", "--plan", "--config", file, env=blocked)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 15
    for figure in ("20,430,401,088", "23,592,960", "no_change: 40.9 GB", "13 samples, 1 held out"):
        assert figure in done.stdout, f"{figure}\n{done.stdout}"
    assert "1024x1024 + 1024x1024" in done.stdout and "nf4-bnb: " in done.stdout
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("size", "tokens"),
    [((384, 384), 196), ((384, 480), 238), ((432, 480), 255), ((512, 512), 324), ((512, 640), 414)],
)
def test_tokens_of_pictures_for_the_text_encoder(size, tokens):
    example = script.Example("a", "", {"vision": (script.Picture(PAIRS, "x", size),)})
    assert tool.text_tokens(example, FLAVOUR) == (11, tokens)  # 5 of the turn, 6 around a picture


def test_text_tokens_are_near_the_tokenizers(make_trainer):
    """The estimate against the real template and processor (captions of ten words)."""
    trainer = make_trainer(**{"model.pretrained_model_name_or_path": "demo/qwen_edit_base"})
    images, words = [Image.new("RGB", (384, 384))] * 2, "give it the look of a photo"
    embed, _ = trainer.encode_prompt_image_embedding(words, images)
    pictures = (script.Picture(images[0], "x", (384, 384)),) * 2
    example = script.Example("a", words, {"vision": pictures})
    assert sum(tool.text_tokens(example, FLAVOUR)) == pytest.approx(embed.shape[1], rel=0.05)


def test_tokens_operations_and_memory_of_the_books(full_size):
    """peers' counts: 585.5 TFLOP with, 416.9 without checkpointing; an H200's peaks in bf16."""
    config, without = script.Config(), script.Config(train={"gradient_checkpointing": False})
    assert tool.Load(((1024, 1024), (1024, 1024)), 300, 1).tokens == TOKENS
    assert tool.Load(((1024, 1024), *[(1024, 1024)] * 3), 720, 1).tokens == 17104
    assert tool.qwen_step_tflop(config, full_size, TOKENS) == pytest.approx(585.5, rel=1e-3)
    assert tool.qwen_step_tflop(without, full_size, TOKENS) == pytest.approx(416.9, rel=1e-3)
    for settings, gb, within in ((config, 46.5, 1), (without, 119.7, 2)):
        peak = tool.qwen_peak_gb(script, settings, full_size, 23_592_960, TOKENS)
        assert peak == pytest.approx(gb, abs=within)


@pytest.mark.parametrize(
    ("precision", "gb"),
    [("no_change", 40.86), ("int8-quanto", 20.5), ("fp8-quanto", 20.5), ("nf4-bnb", 14.5)],
)
def test_size_of_the_quantised_model(precision, gb, full_size):
    """Modulation, 6.8 of 20.4 billion parameters, is 8-bit in every quantised base."""
    config = script.Config(model={"base_model_precision": precision})
    assert tool.qwen_weights_gb(script, config, full_size) == pytest.approx(gb, abs=0.1)


@pytest.mark.parametrize(("precision", "area", "text"), [("int8-quanto", 512, 330),
                                                         ("nf4-bnb", 1024, 330)])  # fmt: skip
def test_the_recipes_for_24_gb_fit(precision, area, text, full_size):
    config = script.Config(model={"base_model_precision": precision})
    load = tool.Load(((area, area), (area, area)), text, 1)
    peak = tool.qwen_peak_gb(script, config, full_size, 23_592_960, load.tokens)
    assert peak < 24 * 1.0737 - 1  # GiB in GB; a GB for the display


def test_every_way_out_is_a_valid_config_and_lowers_the_peak(full_size):
    config = script.Config(train={"gradient_checkpointing": False}, data={"batch_size": 4})
    peak = tool.qwen_peak_gb(script, config, full_size, 0, 4 * TOKENS)
    ways = dict(tool.ways_out(config, 60))
    assert set(ways) == {
        "train.gradient_checkpointing: true",
        "data.batch_size: 1",
        "data.reference_area: target",
        "model.base_model_precision: int8-quanto",
        "model.base_model_precision: nf4-bnb",
        "model.blocks_to_swap: 50, train.gradient_checkpointing: true",
    }
    for words, other in ways.items():
        tokens = (TOKENS - 3000 if "reference_area" in words else TOKENS) * other.data.batch_size
        assert tool.qwen_peak_gb(script, other, full_size, 0, tokens) < peak - 1, words


@pytest.mark.parametrize(
    ("model", "offered"),
    [
        ({"base_model_precision": "int8-quanto"}, {"nf4-bnb"}),
        ({"lora": {"method": "lokr"}}, {"int8-quanto"}),
        ({"lora": {"method": "dora"}}, {"nf4-bnb"}),
    ],
)
def test_a_plan_offers_only_what_goes_together(model, offered):
    config = script.Config(model=model)
    found = {other.model.base_model_precision for _, other in tool.ways_out(config, 60)}
    assert found - {config.model.base_model_precision} == offered


def test_the_plans_cache_is_what_gets_cached(checkpoints, tmp_path):
    """Entries and bytes of the estimate against a cache that was filled."""
    dataset = suffix_dataset(PAIRS, views=2, view_scale=0.6)
    dataset["batch_configs"][0]["caption_dropout"] = 0.1
    raw = small_config(checkpoints["2511"], tmp_path, **{"data.dataset_configs": [dataset]})
    config = script.Config.model_validate(raw)
    outlook = tool.look_ahead(script, config, 64)
    trainer = script.QwenImageEditTrainer(config)
    trainer.cache_embeddings()
    kinds = [job.kind for job in trainer.cache_jobs().values()]
    assert (outlook.latents, outlook.prompts) == (kinds.count("latent"), kinds.count("prompt"))
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    payload = sum(file.stat().st_size - 200 for file in files) / 1e9  # without the headers
    # the tiny tokenizer cuts captions into more tokens than the real one
    assert outlook.cache_gb == pytest.approx(payload, rel=0.25)


def test_a_plan_names_mistakes_like_a_run(tmp_path):
    file = write_config(tmp_path, settings(tmp_path, **{"model.lora.rr": 1}))
    done = run("train_qwen_edit.py", "--plan", "--config", file, check=False)
    assert done.returncode == 2 and "model.lora.rr" in done.stderr
    raw = settings(tmp_path)
    raw["data"]["dataset_configs"][0]["train_data_dir"] = "nowhere"
    done = run("train_qwen_edit.py", "--plan", "--config", write_config(tmp_path, raw), check=False)
    assert done.returncode == 2
    assert "folder nowhere does not exist" in done.stderr


def test_times_are_written_in_the_unit_they_are_read_in():
    written = [load_tool("cards").duration(seconds) for seconds in (0.002, 59, 90, 7200)]
    assert written == ["0.0020 s", "59.0 s", "1.5 min", "2.0 h"]


def test_a_plan_writes_no_file_and_says_which_cards_it_fits(tmp_path):
    file = write_config(tmp_path, settings(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    said = run(ROOT / "train_qwen_edit.py", "--plan", "--config", file, cwd=tmp_path).stdout
    assert sorted(tmp_path.rglob("*")) == before
    assert re.search(r"RTX 4090 +25\.2 GB  does not fit", said)
    # 585.5 TFLOP of a sample at 0.45 of 790 TFLOPS; measured on an H200: 1.65 s
    assert re.search(r"H100 80 GB +85\.0 GB  fits, 1\.6 s a step", said)
    assert re.search(r"int8-quanto: \d\d\.\d GB, 1\.00 x the computation", said)
    assert re.search(
        r"blocks_to_swap: 50: \d+\.\d GB, 1\.00 x the computation, blocks travel", said
    )
    assert said.count("enlarged") == 0


def test_numbers_have_two_digits_at_least():
    numbers = (0.0123, 0.5, 1, 43.78, 585.49)
    assert [tool.two(n) for n in numbers] == ["0.012", "0.50", "1.0", "43.8", "585.5"]


@pytest.mark.parametrize("model", sorted(script.PUBLISHED))
def test_a_plan_of_a_published_model_never_asks_the_hub(model, tmp_path, monkeypatch):
    import utils

    monkeypatch.setattr(utils, "fetch_checkpoint", lambda *_: pytest.fail("the Hub was asked"))
    raw = settings(tmp_path, **{"model.pretrained_model_name_or_path": model})
    if raw["model"]["pretrained_model_name_or_path"].endswith("-2.1"):
        raw["data"]["dataset_configs"][0]["conditioning_type"] = "reference_loose"
    config = script.Config.model_validate(raw)
    assert script.audit(config) == []
    count = "7,115,124,736" if model.endswith("-2.1") else "20,430,401,088"
    assert f"{count} parameters" in tool.plan(script, config)


@pytest.mark.parametrize(("levels", "tflop"), [(1, 330), (2, 500), (4, 853)])
def test_operations_of_qwen_image_21(levels, tflop):
    """peers' count: 330 TFLOP without and 474 with checkpointing, at 1024 px + 1 MP; 14.2 GB."""
    model = {"pretrained_model_name_or_path": "Qwen/Qwen-Image-2.1"}
    loss = {"noise_levels_per_sample": levels}
    load = tool.Load(((1024, 1024), (1024, 1024)), 60, 1)
    for again, wanted in ((False, tflop), (True, tflop * 474 / 330)):
        train = {"gradient_checkpointing": again}
        config = script.Config.model_validate({"model": model, "loss": loss, "train": train})
        transformer = tool.planned_transformer(script, config)
        size = tool.sample_tokens(config, transformer, load)
        found = tool.qwen_step_tflop(config, transformer, *size)
        assert found == pytest.approx(wanted, rel=0.02)
    assert tool.qwen_weights_gb(script, config, transformer) == pytest.approx(14.2, abs=0.05)


def test_a_plan_of_flux_as_published(tmp_path):
    """23.8 GB and 11.9 billion parameters; two rows of 1,536 tokens."""
    from conftest import concept

    import train_pairedit as script

    concept(tmp_path / "datasets/age", size=(512, 512))
    published = "black-forest-labs/FLUX.1-dev"
    raw = slider_settings(published, tmp_path, resolution=512, max_sequence_length=512)
    raw |= {"mixed_precision": "bf16", "gradient_checkpointing": True}
    config = script.Config.model_validate(raw)
    text = tool.plan(script, config)
    assert "11.90 billion" in text and "1536, 512 of them text; 2 rows" in text
    transformer = tool.planned_flux(script, config)
    assert tool.flux_memory(script, config, transformer, 1536)["weights"] == pytest.approx(
        23.8, 0.01
    )
    int8 = config.model_copy(update={"base_model_precision": "int8-quanto"})
    assert tool.flux_memory(script, int8, transformer, 1536)["weights"] == pytest.approx(12, 0.02)


def test_a_plan_of_stable_diffusion_counts_a_pass(checkpoints):
    """Operations against torch's counter on a pass that computes."""
    import diffusers
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    unet = tool.empty_unet(str(checkpoints["sd"]))
    tflop, gb = tool.unet_cost(unet, 8)
    real = diffusers.UNet2DConditionModel.from_pretrained(checkpoints["sd"] / "unet")
    text = torch.zeros(1, 77, real.config.cross_attention_dim)
    with FlopCounterMode(display=False) as counter:
        real(torch.zeros(1, 4, 8, 8), torch.zeros(1), encoder_hidden_states=text)
    # torch does not count the CPU's attention kernel
    assert tflop * 1e12 == pytest.approx(counter.get_total_flops(), rel=0.1) and gb > 0


def test_a_plan_of_a_fork_by_its_path(tmp_path):
    config = ["--config", "configs/demo_dreambooth.yaml", "--cache_dir", tmp_path]
    done = run("tools/plan.py", "--script", "train_dreambooth_pairs.py", *config)
    assert "57 layers" in done.stdout and "H100" in done.stdout
    for flags, said in ((["--script", "nothing.py"], "nothing.py"), ([], "--script")):
        done = run("tools/plan.py", *flags, *config, check=False)
        assert done.returncode == 2 and said in done.stderr
