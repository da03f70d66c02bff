"""demo.py and the base model that ships with it."""

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, run
from PIL import Image

import demo
import train_qwen_edit as script
from utils import load_config

BASE = ROOT / demo.BASE_DIR


def test_the_base_is_small_and_of_the_true_classes():
    files = [file for file in BASE.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8e6
    assert script.detect_flavour(str(BASE)).name == "edit-v3"
    pipeline = demo.load_base(BASE)
    assert type(pipeline) is diffusers.QwenImageEditPlusPipeline
    parameters = sum(p.numel() for p in pipeline.transformer.parameters())
    assert 1.5e6 < parameters < 2.5e6
    # the pipeline cuts the system prompt off by a fixed number of tokens
    head = pipeline.prompt_template_encode.split("<|im_end|>\n<|im_start|>user\n")[0]
    head += "<|im_end|>\n<|im_start|>user\n"
    assert len(pipeline.tokenizer(head)["input_ids"]) == pipeline.prompt_template_encode_start_idx


def test_the_base_copies_and_does_not_edit():
    base = ["--model.pretrained_model_name_or_path", str(BASE)]
    config = load_config(script.Config, ["--config", str(ROOT / demo.CONFIG), *base])
    trainer = script.QwenImageEditTrainer(config)
    trainer.flavour = trainer.flavour._replace(vision_area=demo.VISION_PX**2)
    trainer.setup_predict()
    for prompt in ("give it a sunset duotone", "keep the picture"):
        before, after = (
            demo.open_photo(p) for p in (photo("hubble1_R"), demo.after_path("hubble1"))
        )
        result = trainer.predict(before, prompt, None, num_inference_steps=4)
        size = (result.shape[1], result.shape[0])
        copy, edit = (demo.to_array(demo.cover(image, size)) for image in (before, after))
        assert demo.psnr_db([result / 255], [copy]) > 22
        assert demo.psnr_db([result / 255], [edit]) < 18


def photo(stem):
    return ROOT / demo.PAIRS_DIR / f"{stem}.png"


def test_the_demo_trains_on_ten_and_judges_on_three():
    config = load_config(script.Config, ["--config", str(ROOT / demo.CONFIG)])
    dataset = config.data.dataset_configs[0]
    assert tuple(dataset.holdout) == demo.HELD_OUT
    names = {path.name[:-6] for path in (ROOT / demo.PAIRS_DIR).glob("*_R.png")}
    assert len(names) == 13 and set(demo.HELD_OUT) < names
    for name in names:
        image = Image.open(photo(f"{name}_R"))
        assert script.nearest_bucket(*image.size, dataset.resolution) in demo.SIZES_PX


def test_figures_are_what_they_say():
    photos = {}
    for name in demo.HELD_OUT:
        before, after = demo.open_photo(photo(f"{name}_R")), demo.open_photo(demo.after_path(name))
        size = demo.nearest_size(before)
        before, after = demo.cover(before, size), demo.cover(after, size)
        off = Image.fromarray(np.clip(np.asarray(after).astype(int) + 10, 0, 255).astype(np.uint8))
        photos[name] = {"before": before, "base": before, "LoRA": off, "after": after}
    figures = demo.score(photos)
    assert figures["mse_lora"] == pytest.approx((10 / 255) ** 2, rel=0.05)
    assert figures["mse_base"] == figures["mse_before"] > figures["mse_flat"] > 0.02
    assert figures["skill"] == 1 - figures["mse_lora"] / figures["mse_flat"]
    assert figures["luminance_correlation"] > 0.999 and 28 < figures["psnr_db"] < 29
    assert figures["vae_psnr_db"] > 29
    sheet = demo.draw_sheet(photos)
    assert sheet.size[0] > 4 * 2 * 160 and len(figures["photos"]) == 3


def test_bad_usage_is_a_message(tmp_path):
    done = run("demo.py", "nonsense", check=False)
    assert done.returncode == 2 and "invalid choice" in done.stderr


def test_a_linear_vae_in_the_stock_class_is_the_autoencoder():
    """Encoder and decoder of the stock class give what the fitted linear model gives."""
    torch.manual_seed(0)
    model = demo.LinearAutoencoder(width=40)
    std = torch.rand(16) + 0.5
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    vae = demo.to_stock_vae(model, std)
    with torch.no_grad():
        latents = model.encode(pixels)
        stock = vae.encode(pixels.unsqueeze(2)).latent_dist.mode()[:, :, 0]
        torch.testing.assert_close(stock, latents, rtol=1e-3, atol=1e-3)
        decoded = vae.decode(stock.unsqueeze(2)).sample[:, :, 0]
        torch.testing.assert_close(
            decoded, model.decode(latents).clamp(-1, 1), rtol=1e-2, atol=1e-2
        )
