"""generate.py with Stable Diffusion: parity with diffusers and the trainer, inversion, mistakes."""

import copy
import itertools
import json
import math
import shutil
import sys

import diffusers
import numpy as np
import pytest
import torch
from conftest import PAIRS, read_page
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

import generate
import train_dreambooth_pairs as trainer_script
from utils import UserError, load_config

PHOTOS = ("chelsea0", "coffee0")
STEPS = 4


@pytest.fixture(scope="session")
def sd(checkpoints):
    return checkpoints["sd"]


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of two square photos and a wide one."""
    folder = tmp_path_factory.mktemp("photos")
    for name in PHOTOS:
        Image.open(PAIRS / f"{name}_R.png").convert("RGB").save(folder / f"{name}.png")
    wide = Image.open(PAIRS / "hubble0_R.png").convert("RGB").resize((192, 64))
    wide.save(folder / "wide.png")
    return folder


@pytest.fixture(scope="session")
def trained(sd, photos, tmp_path_factory):
    """A trainer whose adapters act, its LoRA saved in all formats and a validation sheet drawn."""
    folder = tmp_path_factory.mktemp("trained")
    for place, factor in (("before", 1.0), ("after", 0.5)):
        (folder / place).mkdir()
        for name in PHOTOS:
            image = Image.open(photos / f"{name}.png").point(lambda v, f=factor: int(v * f))
            image.save(folder / place / f"{name}.png")
    argv = [
        *("--pretrained_model_name_or_path", str(sd), "--use_image_pairs"),
        *("--before_data_dir", str(folder / "before"), "--after_data_dir", str(folder / "after")),
        *("--instance_prompt", "a photo of a person", "--resolution", "64"),
        *("--output_dir", str(folder / "out"), "--cache_dir", str(folder / "cache")),
        *("--lora_rank", "4", "--lora_alpha", "2", "--train_text_encoder", "--export", "kohya"),
        *("--validation_prompt", "a person", "--num_validation_images", "2"),
        *("--validation_inference_steps", str(STEPS), "--validation_scales=-1,0,1"),
    ]
    trainer = trainer_script.DreamBoothPairsTrainer(load_config(trainer_script.Config, argv))
    trainer.cache_embeddings()
    trainer.load_models()
    draw = torch.Generator().manual_seed(0)
    for parameter in trainer.trained:
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1
    trainer.save_result(calibrated=False)
    trainer.validate()
    old = {}  # diffusers' older names
    tensors = load_file(trainer.config.output_dir / trainer_script.LORA_FILE)
    for name, tensor in tensors.items():
        text = name.startswith("text_encoder.")
        down, up = (".lora_linear_layer.down", ".lora_linear_layer.up") if text else (
            ".lora.down", ".lora.up"
        )  # fmt: skip
        old[name.replace(".lora_A", down).replace(".lora_B", up)] = tensor
    save_file(old, trainer.config.output_dir / "old.safetensors")
    return trainer


@pytest.fixture(scope="session")
def loras(trained):
    """{"peft" | "kohya" | "old": file}: the same LoRA in three formats."""
    names = {"peft": trainer_script.LORA_FILE, "kohya": trainer_script.KOHYA_FILE}
    return {
        k: trained.config.output_dir / v for k, v in (names | {"old": "old.safetensors"}).items()
    }


@pytest.fixture
def call(sd, tmp_path, monkeypatch, capsys):
    """call(*flags) -> what generate.py prints; the tiny model, few steps."""

    def build(*args, check=True):
        model = ["--pretrained_model_name_or_path", sd, "--num_inference_steps", STEPS]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, [*model, *args])])
        try:
            generate.main()
        except UserError as error:
            assert not check, error
            return str(error)
        assert check
        return "".join(capsys.readouterr())

    return build


def configured(sd, **changes):
    """A config with its LoRA's wishes."""
    settings = {"pretrained_model_name_or_path": str(sd), "num_inference_steps": STEPS}
    settings |= {"prompt": ["a person"], "device": "cpu", "resolution": 64}
    return generate.with_lora_wishes(generate.SDConfig(**settings | changes))


def strips_of(config):
    strips, problems = generate.plan_sd(config)
    assert not problems
    return strips


def levels_between(a, b):
    """Largest difference of two pictures, 0..255."""
    return np.abs(np.asarray(a).astype(int) - np.asarray(b)).max()


# --- pictures of prompts --------------------------------------------------------------------------


def stock(sd, seeds, **options):
    """diffusers' own pipeline, DDIM."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(sd)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(
        pipeline.scheduler.config, clip_sample=False
    )
    pipeline.set_progress_bar_config(disable=True)
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=draw) for draw in draws])
    return pipeline(
        ["a person"] * len(seeds),
        num_inference_steps=STEPS,
        latents=noise,
        **{"guidance_scale": 7.5, "output_type": "pil", **options},
    ).images


def test_scale_0_is_the_stock_pipeline_bit_for_bit(sd, loras, tmp_path):
    settings = {"seed": [0, 1], "output": tmp_path / "o.png"}
    config = configured(sd, lora=[str(loras["peft"])], scales=[-1, 0, 1], **settings)
    painter = generate.SDPainter(config)
    draw, _ = painter.open(strips_of(config))
    moved, zero = draw(1.0), draw(0.0)
    bare_config = configured(sd, **settings)
    bare, _ = generate.SDPainter(bare_config).open(strips_of(bare_config))
    latents = stock(sd, [0, 1], output_type="latent")
    theirs = [generate.decode_sd(painter.vae, x[None])[0] for x in latents]
    for a, b, c, d in zip(zero, bare(0.0), theirs, moved, strict=True):
        assert a.tobytes() == b.tobytes() == generate.to_image(c).tobytes()
        assert levels_between(a, d) > 10
    for a, b in zip(zero, stock(sd, [0, 1]), strict=True):  # which decodes both at once
        assert levels_between(a, b) <= 1


def test_the_trainers_validation_pictures_are_these(sd, trained, loras, tmp_path):
    config = configured(
        sd, lora=[str(loras["peft"])], scales=[-1, 0, 1], seed=[0, 1], output=tmp_path / "o.png"
    )
    draw, _ = generate.SDPainter(config).open(strips_of(config))
    sheet = Image.open(trained.config.output_dir / "samples/step-000000.png")
    for column, scale in enumerate([-1.0, 0.0, 1.0]):
        for row, image in enumerate(draw(scale)):
            x, y = 8 + column * 264, 24 + row * (256 + 32)
            cell = ImageOps.contain(image, (256, 256))  # as the sheet shows it
            assert levels_between(cell, sheet.crop((x, y, x + 256, y + 256))) <= 1


def test_every_format_draws_the_same(sd, loras, tmp_path):
    drawn = {}
    for name, file in loras.items():
        config = configured(sd, lora=[f"{file}:0.5"], scales=[1], output=tmp_path / "o.png")
        drawn[name] = generate.SDPainter(config).open(strips_of(config))[0](1.0)[0]
    assert levels_between(drawn["peft"], drawn["kohya"]) <= 1
    assert levels_between(drawn["peft"], drawn["old"]) <= 1
    config = configured(sd, lora=[str(loras["peft"])], scales=[0.5], output=tmp_path / "o.png")
    half = generate.SDPainter(config).open(strips_of(config))[0](0.5)[0]
    assert levels_between(drawn["peft"], half) <= 1


def test_a_strip_is_made_once_and_a_new_scale_adds_its_pictures(call, loras, tmp_path):
    output = tmp_path / "out/strip.png"
    command = ["--lora", loras["peft"], "--prompt", "a person", "--prompt", "eyes"]
    command += ["--seed", "0,1", "--batch_size", 3, "--output", output]
    assert "8 picture(s), 0 already there" in call(*command, "--scales=-1,0")
    names = {
        f"strip_prompt{p}_seed{s}_scale{x}.png" for p in (0, 1) for s in (0, 1) for x in (-1, 0)
    }
    assert {p.name for p in output.parent.iterdir()} == names | {"strip.png"}
    assert "8 picture(s), 8 already there" in call(*command, "--scales=-1,0")
    assert "12 picture(s), 8 already there" in call(*command, "--scales=-1,0,1")
    assert Image.open(output).size == (3 * 264 + 8, 24 + 4 * (256 + 32))
    settings = generate.read_settings(output.parent / "strip_prompt1_seed1_scale1.png")
    assert settings["prompt"] == "eyes" and settings["loras"][0]["scale"] == 1
    assert settings["guidance_scale"] == 7.5 and (settings["width"], settings["height"]) == (64, 64)


def test_what_is_not_given_is_what_the_lora_was_trained_with(sd, loras, tmp_path):
    base = {"pretrained_model_name_or_path": str(sd), "output": tmp_path / "o.png"}
    config = generate.SDConfig(**base, lora=[str(loras["peft"])])
    [drawn] = strips_of(generate.with_lora_wishes(config))
    assert (drawn.prompt, drawn.size, drawn.positions) == ("a photo of a person", (64, 64), (1.0,))
    own = config.model_copy(update={"prompt": ["eyes"], "resolution": 128})
    [drawn] = strips_of(generate.with_lora_wishes(own))
    assert (drawn.prompt, drawn.size) == ("eyes", (128, 128))
    kohya = generate.with_lora_wishes(generate.SDConfig(**base, lora=[str(loras["kohya"])]))
    assert kohya.resolution == 64 and not kohya.prompt  # the base's own size
    assert any("no prompt" in text for text in generate.check_sd_ways(kohya, set()))


# --- photos ---------------------------------------------------------------------------------------


SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def test_levels_are_those_of_ddim_and_end_at_the_lowest_noise():
    levels = generate.sd_levels(SCHEDULE | {"steps_offset": 1}, 50)
    assert levels.timesteps[:2] == [981, 961] and levels.timesteps[-1] == 1
    assert len(levels.alphas) == 51
    assert levels.alphas[-2:] == pytest.approx([0.998296, 0.999150], abs=2e-6)
    assert levels.alphas == sorted(levels.alphas)
    half = generate.sd_levels(SCHEDULE | {"steps_offset": 1}, 50, 0.5)
    assert half == generate.Levels(levels.timesteps[25:], levels.alphas[25:])


def test_a_step_is_that_of_the_scheduler():
    scheduler = diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(10)
    x, noise = torch.randn(2, 1, 4, 8, 8).double()
    levels = generate.sd_levels(scheduler.config, 10)
    for eta in (0.0, 1.0):
        none = torch.zeros_like(x)
        theirs = scheduler.step(noise, 600, x, eta=eta, variance_noise=none).prev_sample
        k = levels.timesteps.index(600)
        ours = generate.step_mean(x, noise, levels.alphas[k], levels.alphas[k + 1], eta)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def gaussian(levels, change=0.0):
    """The exact denoiser of the prior N(change, I): e = s (x - a change)."""
    table = dict(zip(levels.timesteps, levels.alphas, strict=False))

    def predict(x, t):
        return math.sqrt(1 - table[t]) * (x - math.sqrt(table[t]) * change)

    return predict


def edited(photo, change, levels, eta, strength=1.0, mask=1.0):
    """A photo moved by a denoiser whose prior is translated by `change`."""
    predict = gaussian(levels)
    noises = torch.randn(
        len(levels.timesteps), *photo.shape, generator=torch.Generator().manual_seed(5)
    ).to(photo)
    path = (
        generate.ddpm_path(photo, levels, noises)
        if eta
        else generate.ddim_path(photo, levels, predict)
    )
    means = generate.path_means(path, levels, predict, eta)
    moved = gaussian(levels, strength * change)
    return generate.follow_path(path, means, levels, moved, eta, mask)


@pytest.mark.parametrize(("eta", "gain"), [(0.0, lambda a: 1 - a**0.5), (1.0, lambda a: 1 - a)])
@pytest.mark.parametrize("start", [980, 780, 620, 480, 280, 80])
def test_the_share_of_a_change_by_depth(eta, gain, start):
    """DDIM from noise level t gets 1 - sqrt(alphas_cumprod), DDPM 1 - alphas_cumprod."""
    levels = generate.sd_levels(SCHEDULE | {"steps_offset": 1}, 250, 1 - (start - 1) / 1000)
    photo, change = torch.randn(2, 1, 4, 4, 4).double()
    result = edited(photo, change, levels, eta)
    share = ((result - photo) * change).sum() / change.square().sum()
    assert share.item() == pytest.approx(gain(levels.alphas[0]), abs=0.012)
    torch.testing.assert_close(result - photo, share * change, atol=1e-9, rtol=0)
    half = edited(photo, change, levels, eta, 0.5)
    torch.testing.assert_close(half - photo, 0.5 * share * change, atol=1e-9, rtol=0)


def test_ddim_alone_nearly_comes_back_and_its_residuals_are_the_rest():
    """On the Gaussian denoiser 50 steps there and back miss by 8e-4."""
    levels = generate.sd_levels(SCHEDULE | {"steps_offset": 1}, 50)
    photo, predict = torch.randn(1, 4, 8, 8).double(), gaussian(levels)
    path = generate.ddim_path(photo, levels, predict)
    x = path[0]
    for k, t in enumerate(levels.timesteps):
        x = generate.step_mean(x, predict(x, t), levels.alphas[k], levels.alphas[k + 1], 0.0)
    assert ((x - photo).norm() / photo.norm()).item() == pytest.approx(8.08e-4, rel=0.01)
    assert x.norm() != photo.norm() and path[-1] is photo


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_without_a_change_the_photo_comes_back_and_outside_a_mask_always(eta):
    levels = generate.sd_levels(SCHEDULE, 20)
    photo, change = torch.randn(2, 1, 4, 8, 8).double()
    assert (edited(photo, change, levels, eta, 0.0) - photo).abs().max() < 1e-12
    mask = torch.zeros(1, 1, 8, 8).double()
    mask[..., 4:] = 1
    result = edited(photo, change, levels, eta, mask=mask)
    assert torch.equal(result[..., :4], photo[..., :4])
    torch.testing.assert_close(
        result[..., 4:], edited(photo, change, levels, eta)[..., 4:], atol=1e-9, rtol=0
    )


def photo_config(sd, loras, photos, **changes):
    settings = {"lora": [str(loras["peft"])], "output": photos / "none.png", "scales": [0, 1]}
    return configured(sd, **settings | {"image": [photos / "coffee0.png"]} | changes)


@pytest.mark.parametrize("inversion", ["ddpm", "ddim"])
@pytest.mark.parametrize("guidance", [1, 3])
def test_scale_0_is_the_photo_as_the_vae_gives_it_back(sd, loras, photos, inversion, guidance):
    config = photo_config(sd, loras, photos, inversion=inversion, guidance_scale=guidance)
    painter = generate.SDPainter(config)
    [strip] = strips_of(config)
    draw, [about] = painter.open([strip])
    pixels = generate.to_pixels(generate.fit_photo(strip.photo, strip.size))
    kept = generate.decode_sd(painter.vae, generate.encode_sd(painter.vae, pixels))
    assert about["scale0_db"] > 60
    assert about["vae_db"] == pytest.approx(generate.psnr(pixels, kept), abs=0.06)
    assert levels_between(draw(0.0)[0], generate.to_image(kept[0])) <= 1
    assert levels_between(draw(1.0)[0], draw(0.0)[0]) > 10
    assert levels_between(draw(-1.0)[0], draw(1.0)[0]) > 10


def test_detail_is_restored_and_skipping_keeps_more(sd, loras, photos):
    results = []
    for skip in (0.0, 0.75):
        config = photo_config(sd, loras, photos, restore_detail=True, skip=skip)
        [strip] = strips_of(config)
        draw, _ = generate.SDPainter(config).open([strip])
        zero, one = draw(0.0)[0], draw(1.0)[0]
        assert levels_between(zero, generate.fit_photo(strip.photo, strip.size)) <= 1
        results.append(np.abs(np.asarray(one).astype(int) - np.asarray(zero)).mean())
    assert results[1] < 0.7 * results[0]


def test_photos_of_a_batch_are_each_alone(sd, loras, photos, tmp_path):
    config = photo_config(
        sd, loras, photos, image=[], input_dir=photos, output=None, output_dir=tmp_path
    )
    strips = strips_of(config)[:2]
    painter = generate.SDPainter(config)
    together = painter.open(strips)[0](1.0)
    alone = [painter.open([strip])[0](1.0)[0] for strip in strips]
    assert all(levels_between(a, b) <= 1 for a, b in zip(together, alone, strict=True))


def test_a_mask_says_what_may_change(call, loras, photos, tmp_path):
    mask = Image.new("L", Image.open(photos / "coffee0.png").size)
    mask.paste(255, (mask.width // 2, 0, *mask.size))
    mask.save(tmp_path / "mask.png")
    photo = ["--image", photos / "coffee0.png", "--lora", loras["peft"], "--scales", "0,1"]
    call(*photo, "--output", tmp_path / "o.png", "--mask", tmp_path / "mask.png")
    call(*photo, "--output", tmp_path / "all.png")
    zero, one, whole = (
        np.asarray(Image.open(tmp_path / name)).astype(int)
        for name in ("o_scale0.png", "o_scale1.png", "all_scale1.png")
    )
    assert np.array_equal(one[:, :28], zero[:, :28]) and np.abs(one - zero)[:, 32:].mean() > 3
    assert np.abs(whole - zero)[:, :32].mean() > 3


def test_photos_of_a_folder(call, loras, photos, tmp_path):
    out = tmp_path / "out"
    command = ["--lora", loras["peft"], "--input_dir", photos, "--output_dir", out]
    command += ["--resolution", 128]
    text = call(*command, "--scales", "0,1", "--inversion", "ddim", "--skip", 0.25)
    assert "6 picture(s), 0 already there" in text
    assert text.count("scale 0 is decode(encode(photo)) at") == 3
    sizes = {p.name: Image.open(p).size for p in out.glob("*_scale1.png")}
    square = {f"{name}_scale1.png": (128, 128) for name in PHOTOS}
    assert sizes == square | {"wide_scale1.png": (192, 64)}
    assert Image.open(out / "contact_sheet.png").width == 3 * 264 + 8  # photo, 0, 1
    settings = generate.read_settings(out / "wide_scale1.png")
    assert settings["scale0_db"] > 60 and settings["prompt"] == "a photo of a person"
    again = call(*command, "--scales", "0,1", "--inversion", "ddim", "--skip", 0.25, "--html")
    pages = dict(read_page(out / "page.html"))
    assert list(pages["wide, seed 0"]) == ["photo", "scale 0", "scale 1"]
    assert pages["wide, seed 0"]["scale 1"] == out / "wide_scale1.png"
    assert "6 picture(s), 6 already there" in again and "scale 0 is" not in again
    assert "6 picture(s), 0 already there" in call(*command, "--scales", "0,1")


# --- mistakes -------------------------------------------------------------------------------------


def test_one_report_of_everything_wrong(call, loras, photos, checkpoints, tmp_path):
    tensors = load_file(loras["peft"])
    wide = {k: x.repeat(1, 2) if "lora_A" in k else x for k, x in tensors.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    other = {k.replace("up_blocks.1", "up_blocks.7"): x for k, x in tensors.items()}
    save_file(other, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(loras["peft"].read_bytes()[:1000])
    torch.save({"a": 1}, tmp_path / "old.pt")
    Image.new("L", (7, 7)).save(tmp_path / "mask.png")
    (tmp_path / "cut.png").write_bytes((photos / "coffee0.png").read_bytes()[:2000])
    done = call(
        "--lora", tmp_path / "nowhere.safetensors", "--lora", f"{loras['peft']}:strong",
        "--lora", tmp_path / "wide.safetensors", "--lora", tmp_path / "cut.safetensors",
        "--lora", tmp_path / "old.pt", "--lora", tmp_path / "other.safetensors", "--skipp", 1,
        "--image", tmp_path / "cut.png", "--offload", "model", "--gamma", 1, "--device", "cuda:7",
        "--mask", tmp_path / "mask.png", "--output", tmp_path / "o.jpg", "--height", 64,
        "--prompt", "a", "--prompt", "b", "--negative_prompt", "c", check=False,
    )  # fmt: skip
    for words in (
        "skipp: unknown setting, did you mean 'skip'?",
        "offload: a setting of Qwen-Image-Edit, not of Stable Diffusion",
        "gamma: a setting of FLUX.1, not of Stable Diffusion",
        "no LoRA file",
        "after the colon a number is wanted",
        "wide.safetensors: ",
        "do not fit this UNet",
        "cut.safetensors",
        "only .safetensors files are loaded",
        "up_blocks.7",
        "no such layer",
        "cut.png cannot be read",
        "or the photo, cannot be read",
        "cuda:7",
        "wanted a .png",
        "give both --height and --width",
        "--prompt: one for photos",
        "--negative_prompt needs guidance",
    ):
        assert words in done, f"{words}\n{done}"
    done = call(
        "--input_dir", tmp_path / "none", "--skip", 0.99, "--seed", "0,1", "--inversion", "ddim",
        "--scales", "1,1", "--mask", "no.png", "--output", tmp_path / "o.png", check=False,
    )  # fmt: skip
    for words in (
        "a photo needs a --lora",
        "--input_dir needs --output_dir",
        "--output goes with --image",
        "no folder",
        "leaves none of 4 steps",
        "ddim inversion draws nothing",
        "--mask goes with --image",
        "no file no.png",
    ):
        assert words in done, f"{words}\n{done}"
    (tmp_path / "file").write_text("")
    done = call(
        "--prompt", "x", "--skip", 0.5, "--scales", "1,1", "--lora", loras["peft"],
        "--output", tmp_path / "file/o.png", check=False,
    )  # fmt: skip
    for words in ("only photos are inverted", "two results are called", "cannot be written to"):
        assert words in done, f"{words}\n{done}"
    done = call("--prompt", "x", "--output", "x" * 240 + ".png", check=False)
    assert "at most 230 bytes" in done
    done = call("--prompt", "x", "--output", "o.png", "--seed", f"-1,{2**63}", check=False)
    assert "greater than or equal to 0" in done and "less than 9223372036854775808" in done


def test_the_checkpoint_or_a_setting_picks_the_family(sd, checkpoints, tmp_path):
    def family(**given):
        return generate.pick_family(given).__name__

    name = "pretrained_model_name_or_path"
    assert family(**{name: str(sd)}) == "SDConfig"
    assert family(**{name: str(sd)}, batch_size=2, prompt=["x"], seed="0") == "SDConfig"
    assert family(**{name: str(checkpoints["flux"])}) == "StripConfig"
    assert family(**{name: str(checkpoints["2511"])}) == "Config"
    assert family(**{name: "nowhere"}, inversion="ddim") == "SDConfig"
    assert family(skip=3) == "StripConfig" and family(python_name="train_image") == "SliderConfig"
    settings = json.loads((sd / "scheduler/scheduler_config.json").read_text())
    copy = tmp_path / "v"
    shutil.copytree(sd, copy)
    settings["prediction_type"] = "v_prediction"
    (copy / "scheduler/scheduler_config.json").write_text(json.dumps(settings))
    argv = [f"--{name}={copy}", "--prompt=x", f"--output={tmp_path / 'o.png'}"]
    with pytest.raises(UserError, match="predicts v_prediction; wanted epsilon"):
        load_config(generate.SDConfig, argv, generate.check_sd)


# --- between two pictures -------------------------------------------------------------------------


def test_slerp_and_adain_are_their_formulas():
    def mix(a, b, share):
        return generate.slerp(torch.tensor(a), torch.tensor(b), share).tolist()

    assert mix([1.0, 0.0], [0.0, 1.0], 0.25) == pytest.approx([0.92387953, 0.38268343])
    assert mix([2.0, 0, 0], [0, 3.0, 0], 0.5) == pytest.approx([1.41421356, 2.12132034, 0])
    assert mix([1.0, 2.0], [1.0, 2.0], 0.3) == pytest.approx([1, 2], abs=1e-3)
    first, last = torch.randn(1, 4, 8, 8), 3 * torch.randn(1, 4, 8, 8) + 2
    x = generate.adain(generate.slerp(first, last, 0.3), first, last, 0.3)
    for of in (torch.mean, torch.std):
        wanted = 0.7 * of(first, (2, 3)) + 0.3 * of(last, (2, 3))
        torch.testing.assert_close(of(x, (2, 3)), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(generate.adain(first, first, last, 0.0), first, atol=1e-5, rtol=1e-5)


def test_frames_become_evenly_spaced():
    shares = np.linspace(0, 1, 9)

    def way(share):  # a picture that changes late
        return np.asarray(share) ** 4

    before = np.diff(way(shares))
    after = np.diff(way(generate.even_shares(shares, before)))
    assert before.max() / before.mean() > 3 and after.max() / after.mean() < 1.4
    again = generate.even_shares(shares, np.diff(shares))
    assert again == pytest.approx(shares) and generate.even_shares([0, 0.5, 1], [0, 0]) == [
        0,
        0.5,
        1,
    ]


@pytest.fixture(scope="session")
def morph(sd, photos, tmp_path_factory):
    """(morph, its config): a quiet UNet, LoRAs of a few steps."""
    output = tmp_path_factory.mktemp("morph") / "o.png"
    images = [photos / f"{name}.png" for name in PHOTOS]
    settings = {"frames": 5, "fit_steps": 40, "fit_learning_rate": 5e-3, "fit_rank": 4}
    config = configured(
        sd, image=images, output=output, num_inference_steps=10, seed=[3], **settings
    )
    painter = generate.SDPainter(config)
    painter.unet.conv_out.weight.data *= 0.1  # random weights make any path chaotic
    [strip], problems = generate.plan_between(config)
    assert not problems
    return generate.Morph(painter, strip), config


def test_a_fitted_lora_learns_its_picture(morph):
    made, _ = morph
    alphas = made.painter.pipeline.scheduler.alphas_cumprod
    [latents] = made.paths[0][-1:]

    @torch.no_grad()
    def loss(weights):
        made.unet.set_adapters(["first", "last"], weights)
        draw, errors = torch.Generator().manual_seed(0), []
        for t in range(25, 1000, 25):
            noise = torch.randn(latents.shape, generator=draw)
            noisy = alphas[t].sqrt() * latents + (1 - alphas[t]).sqrt() * noise
            predicted = made.unet(noisy, t, encoder_hidden_states=made.embeds[0]).sample
            errors.append((predicted - noise).square().mean().item())
        return np.mean(errors)

    assert loss([1.0, 0.0]) < 0.995 * loss([0.0, 0.0])


def test_the_products_of_the_loras_are_interpolated(morph):
    """Not their factors: those differ by a (1 - a) (B0 - B1)(A0 - A1)."""
    made, _ = morph
    share = 0.3
    made.unet.set_adapters(["first", "last"], [1 - share, share])
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = copy.deepcopy(made.unet.get_submodule(name))
    factors = [
        part[end].weight for end in ("first", "last") for part in (layer.lora_A, layer.lora_B)
    ]
    a0, b0, a1, b1 = (x.data.normal_() for x in factors)
    x = torch.randn(7, layer.in_features)
    with torch.no_grad():
        ours = layer(x) - layer.base_layer(x)
        product = torch.lerp(b0 @ a0, b1 @ a1, share)
        factors = torch.lerp(b0, b1, share) @ torch.lerp(a0, a1, share)
        torch.testing.assert_close(ours, x @ product.T, atol=1e-3, rtol=1e-4)
        gap = share * (1 - share) * (b0 - b1) @ (a0 - a1)
        torch.testing.assert_close(product - factors, gap, atol=1e-4, rtol=1e-4)
        assert gap.norm() > 0.05 * product.norm()


def test_the_ends_are_the_pictures_and_the_rest_lies_between(morph):
    made, _ = morph
    shares = [0.0, 0.25, 0.5, 0.75, 1.0]
    frames = made.draw(shares)
    assert generate.psnr(frames[0], made.kept[0]) > 80
    assert generate.psnr(frames[-1], made.kept[1]) > 80
    span = (frames[0] - frames[-1]).square().mean().sqrt()
    for end, order in ((0, 1), (-1, -1)):
        away = [(x - frames[end]).square().mean().sqrt().item() for x in frames]
        assert away[::order] == sorted(away) and max(away) <= span
    steps = [(b - a).square().mean().sqrt().item() for a, b in itertools.pairwise(frames)]
    moved = made.draw(generate.even_shares(shares, steps))
    even = [(b - a).square().mean().sqrt().item() for a, b in itertools.pairwise(moved)]
    assert np.std(even) / np.mean(even) < np.std(steps) / np.mean(steps)


def test_frames_look_at_both_ends_in_the_first_steps_only(morph):
    made, _ = morph
    seen = []
    layer = next(iter(made.attention.values()))
    plain = layer.plain

    def look(attn, hidden_states, encoder_hidden_states=None, **rest):
        seen.append((layer.role, encoder_hidden_states is not None))
        return plain(attn, hidden_states, encoder_hidden_states, **rest)

    layer.plain = look
    made.draw([0.0, 0.5, 1.0])
    layer.plain = plain
    steps = [seen[k : k + 3] for k in range(0, len(seen), 3)]
    assert steps == [[(0, False), (1, False), (0.5, True)]] * 6 + [[(None, False)] * 3] * 4
    assert all("up_blocks" in name and ".attn1." in name for name in made.attention)


def test_a_morph_is_made_once_and_its_loras_are_kept(call, photos, tmp_path):
    output = tmp_path / "out/m.gif"
    command = ["--image", photos / "coffee0.png", "--image", photos / "chelsea0.png"]
    command += ["--prompt", "a cup", "--prompt", "a cat", "--resolution", 64, "--restore_detail"]
    command += ["--frames", 4, "--fit_steps", 2, "--output", output]
    text = call(*command)
    assert "not all already there" in text and "the ends are the pictures at" in text
    names = {p.name for p in output.parent.iterdir()}
    fitted = {name for name in names if "fitted" in name}
    assert len(fitted) == 2
    assert names - fitted == {"m.gif", "m.png", *(f"m_frame0{n}.png" for n in range(4))}
    for number, name in ((0, "coffee0"), (3, "chelsea0")):
        photo = generate.fit_photo(photos / f"{name}.png", (64, 64))
        assert levels_between(Image.open(output.with_name(f"m_frame0{number}.png")), photo) <= 1
    assert Image.open(output).n_frames == 6
    times = {name: (output.parent / name).stat().st_mtime_ns for name in fitted}
    assert "4 frame(s), all already there" in call(*command)
    assert "not all already there" in call(*command, "--even_frames", "false")
    assert times == {name: (output.parent / name).stat().st_mtime_ns for name in times}
    assert len([p for p in output.parent.iterdir() if "fitted" in p.name]) == 2


def test_mistakes_of_frames(call, loras, photos, tmp_path):
    one = ["--image", photos / "coffee0.png", "--frames", 3, "--prompt", "a"]
    text = call(*one, "--output", tmp_path / "o.png", "--lora", loras["peft"], check=False)
    assert "takes two --image (given: 1)" in text and "does not read lora" in text
    two = [*one, "--image", tmp_path / "no.png", "--seed", "0,1"]
    text = call(*two, "--output", tmp_path / "o.jpg", check=False)
    assert f"no picture {tmp_path / 'no.png'}" in text and "one --seed" in text
    assert "wanted a .png" in text
    frame = tmp_path / "o_frame01.png"
    shutil.copy(photos / "coffee0.png", frame)
    text = call(*one, "--image", frame, "--output", tmp_path / "o.png", check=False)
    assert f"{frame} would be overwritten" in text
    text = call("--prompt", "a", "--fit_rank", 4, "--output", tmp_path / "o.png", check=False)
    assert "fit_rank: read with --frames" in text
