"""generate.py with Stable Diffusion: parity with diffusers and the trainer, inversion, mistakes."""

import json
import math
import shutil

import diffusers
import numpy as np
import pytest
import torch
from conftest import PAIRS, read_page
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

import generate
import train_dreambooth_pairs as script
from utils import RunLog, load_config

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
        *("--lora_rank", "4", "--lora_alpha", "2", "--train_text_encoder"),
        *("--validation_prompt", "a person", "--num_validation_images", "2"),
        *("--validation_inference_steps", str(STEPS), "--validation_scales=-1,0,1"),
    ]
    trainer = script.SDTrainer(load_config(script.Config, argv))
    trainer.setup_accelerator()
    trainer.find_data()
    trainer.cache_embeddings()
    trainer.load_models()
    draw = torch.Generator().manual_seed(0)
    for parameter in trainer.trained:
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1
    script.save_result(trainer, calibrated=False)
    trainer.run_log = RunLog(trainer.accelerator, trainer.config.output_dir, trainer.config, 0)
    script.validate(trainer)
    tensors = script.adapter_tensors(trainer.models, "change", 1.0)
    about = script.about_run(trainer)
    script.save_lora(trainer.config.output_dir / "peft.safetensors", tensors, about, "peft")
    old = {}  # diffusers' older names
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
    names = {"peft": "peft.safetensors", "kohya": script.LORA_FILE}
    return {
        k: trained.config.output_dir / v for k, v in (names | {"old": "old.safetensors"}).items()
    }


@pytest.fixture
def call(sd, call_generate):
    """call(*flags) -> as call_generate; the tiny model, few steps."""
    model = ["--pretrained_model_name_or_path", sd, "--num_inference_steps", STEPS]
    return lambda *args, check=True: call_generate(*model, *args, check=check)


def planned(sd, *prompts, load=True, **changes):
    """(painter, strips) of settings, on the CPU."""
    settings = {"pretrained_model_name_or_path": str(sd), "num_inference_steps": STEPS}
    settings |= {"prompt": [*prompts], "device": "cpu", "resolution": 64, "output": "o.png"}
    painter = generate.ChangePainter(generate.ChangeConfig(**settings | changes), script)
    strips, problems = generate.plan_jobs(painter)
    assert not problems
    if load:
        painter.load(list({strip.prompt for strip in strips}))
    return painter, strips


def drawn(painter, strip, *scales):
    """The pictures of a strip at some scales."""
    return [image for _, image, _ in painter.draw(strip, scales)]


def levels_between(a, b):
    """Largest difference of two pictures, 0..255."""
    return np.abs(np.asarray(a).astype(int) - np.asarray(b)).max()


# --- pictures of prompts --------------------------------------------------------------------------


def stock(sd, seeds, lora=None, **options):
    """diffusers' own pipeline, DDIM."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(sd)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(
        pipeline.scheduler.config, clip_sample=False
    )
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        pipeline.load_lora_weights(str(lora))
    images = []
    for seed in seeds:
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        settings = {"num_inference_steps": STEPS, "latents": noise, "guidance_scale": 7.5}
        images += pipeline("a person", **settings | options).images
    return images


def test_scale_0_is_the_base_bit_for_bit_and_the_stock_pipelines_picture(sd, loras):
    painter, strips = planned(sd, "a person", lora=[str(loras["peft"])], seed=[0, 1])
    bare, plain = planned(sd, "a person", seed=[0, 1])
    for strip, other, theirs in zip(strips, plain, stock(sd, [0, 1]), strict=True):
        zero, moved = drawn(painter, strip, 0.0, 1.0)
        [base] = drawn(bare, other, 0.0)
        assert zero.tobytes() == base.tobytes()
        assert (
            levels_between(zero, theirs) <= 1
        )  # the pipeline draws both sides of guidance at once
        assert levels_between(zero, moved) > 10


def test_the_pipeline_draws_the_same_with_the_lora(sd, loras):
    """The strength of a file is that of diffusers, text encoder and guidance included."""
    painter, [strip] = planned(sd, "a person", lora=[str(loras["peft"])], negative_prompt="eyes")
    [ours] = drawn(painter, strip, 1.0)
    [theirs] = stock(sd, [0], lora=loras["peft"], negative_prompt="eyes")
    assert levels_between(ours, theirs) <= 1
    assert levels_between(ours, stock(sd, [0], negative_prompt="eyes")[0]) > 3


def test_the_trainers_validation_pictures_are_these(sd, trained, loras):
    painter, strips = planned(sd, "a person", lora=[str(loras["peft"])], seed=[0, 1])
    sheet = Image.open(trained.config.output_dir / "samples/step-000000.png")
    for row, strip in enumerate(strips):
        for column, image in enumerate(drawn(painter, strip, -1.0, 0.0, 1.0)):
            x, y = 8 + column * 264, 24 + row * (256 + 32)
            cell = ImageOps.contain(image, (256, 256))  # as the sheet shows it
            assert levels_between(cell, sheet.crop((x, y, x + 256, y + 256))) <= 1


def test_every_format_draws_the_same_and_several_add_up(sd, loras):
    def at(*texts, scale=1.0):
        painter, [strip] = planned(sd, "a person", lora=[str(text) for text in texts])
        return drawn(painter, strip, scale)[0]

    half = at(loras["peft"], scale=0.5)
    for texts in ([f"{loras['kohya']}:0.5"], [f"{loras['old']}:0.5"],
                  [f"{loras['peft']}:0.25", f"{loras['kohya']}:0.25"]):  # fmt: skip
        assert levels_between(half, at(*texts)) <= 1
    assert levels_between(half, at(loras["peft"])) > 3


def test_a_strip_is_made_once_and_a_new_scale_adds_its_pictures(call, loras, tmp_path):
    output = tmp_path / "out/strip.png"
    command = ["--lora", loras["peft"], "--prompt", "a person", "--prompt", "eyes"]
    command += ["--seed", "0,1"]
    command += ["--output", output]
    assert "8 picture(s), 0 already there" in call(*command, "--scales=-1,0")
    names = {
        f"strip_prompt{p}_seed{s}_scale{x}.png" for p in (0, 1) for s in (0, 1) for x in (-1, 0)
    }
    assert {p.name for p in output.parent.iterdir()} == names | {"strip.png"}
    assert "8 picture(s), 8 already there" in call(*command, "--scales=-1,0")
    assert "12 picture(s), 8 already there" in call(*command, "--scales=-1,0,1")
    assert Image.open(output).size == (3 * 264 + 8, 24 + 4 * (256 + 32))
    about = generate.read_settings(output.parent / "strip_prompt1_seed1_scale1.png")
    assert (about["name"], about["prompt"], about["scale"]) == ("strip", "eyes", 1)
    assert about["settings"]["guidance_scale"] == 7.5 and about["settings"]["size"] == [64, 64]


def test_what_is_not_given_is_what_the_lora_was_trained_with(sd, loras):
    def strip(name="peft", *prompts, **changes):
        settings = {"lora": [str(loras[name])], "load": False, "resolution": None}
        return planned(sd, *prompts, **settings | changes)[1][0]

    usual, own = strip(), strip("peft", "eyes", resolution=128)
    assert (usual.prompt, usual.size, usual.scales) == ("a photo of a person", (64, 64), (1.0,))
    assert (own.prompt, own.size) == ("eyes", (128, 128))
    assert strip("kohya") == usual._replace(loras=strip("kohya").loras)
    assert strip("old", "eyes").size == (64, 64)  # the base's own size
    with pytest.raises(AssertionError, match="no prompt"):
        strip("old")


# --- photos ---------------------------------------------------------------------------------------


SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def test_levels_are_those_of_ddim_and_end_at_the_lowest_noise():
    levels = script.sd_levels(SCHEDULE | {"steps_offset": 1}, 50)
    timesteps, alphas, following = (list(column) for column in zip(*levels, strict=True))
    assert timesteps[:2] == [981, 961] and timesteps[-1] == 1 and len(levels) == 50
    assert [alphas[-1], following[-1]] == pytest.approx([0.998296, 0.999150], abs=2e-6)
    assert alphas == sorted(alphas) and alphas[1:] == following[:-1]
    assert script.sd_levels(SCHEDULE | {"steps_offset": 1}, 50, 0.5) == levels[25:]


def test_a_step_is_that_of_the_scheduler():
    scheduler = diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(10)
    x, noise = torch.randn(2, 1, 4, 8, 8).double()
    levels = {t: alphas for t, *alphas in script.sd_levels(scheduler.config, 10)}
    for eta in (0.0, 1.0):
        none = torch.zeros_like(x)
        theirs = scheduler.step(noise, 600, x, eta=eta, variance_noise=none).prev_sample
        ours = script.step_mean(x, noise, *levels[600], eta)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def gaussian(levels, change=0.0):
    """The exact denoiser of the prior N(change, I): e = s (x - a change)."""
    table = {t: alpha for t, alpha, _ in levels}

    def predict(x, t):
        return math.sqrt(1 - table[t]) * (x - math.sqrt(table[t]) * change)

    return predict


def edited(photo, change, levels, eta, strength=1.0, mask=1.0):
    """A photo moved by a denoiser whose prior is translated by `change`."""
    predict, draw = gaussian(levels), torch.Generator().manual_seed(5)
    noises = torch.randn(len(levels), *photo.shape, generator=draw).to(photo)
    path = script.ddim_path(photo, levels, predict)
    if eta:
        path = script.ddpm_path(photo, levels, noises)
    means = script.path_means(path, levels, predict, eta)
    moved = gaussian(levels, strength * change)
    return script.follow_path(path, means, levels, moved, eta, mask)


@pytest.mark.parametrize(("eta", "gain"), [(0.0, lambda a: 1 - a**0.5), (1.0, lambda a: 1 - a)])
@pytest.mark.parametrize("start", [980, 780, 620, 480, 280, 80])
def test_the_share_of_a_change_by_depth(eta, gain, start):
    """DDIM from noise level t gets 1 - sqrt(alphas_cumprod), DDPM 1 - alphas_cumprod."""
    levels = script.sd_levels(SCHEDULE | {"steps_offset": 1}, 250, 1 - (start - 1) / 1000)
    photo, change = torch.randn(2, 1, 4, 4, 4).double()
    result = edited(photo, change, levels, eta)
    share = ((result - photo) * change).sum() / change.square().sum()
    assert share.item() == pytest.approx(gain(levels[0][1]), abs=0.012)
    torch.testing.assert_close(result - photo, share * change, atol=1e-9, rtol=0)
    half = edited(photo, change, levels, eta, 0.5)
    torch.testing.assert_close(half - photo, 0.5 * share * change, atol=1e-9, rtol=0)


def test_ddim_alone_nearly_comes_back_and_its_residuals_are_the_rest():
    """On the Gaussian denoiser 50 steps there and back miss by 8e-4."""
    levels = script.sd_levels(SCHEDULE | {"steps_offset": 1}, 50)
    photo, predict = torch.randn(1, 4, 8, 8).double(), gaussian(levels)
    path = script.ddim_path(photo, levels, predict)
    x = path[0]
    for t, alpha, following in levels:
        x = script.step_mean(x, predict(x, t), alpha, following, 0.0)
    assert ((x - photo).norm() / photo.norm()).item() == pytest.approx(8.08e-4, rel=0.01)
    assert x.norm() != photo.norm() and path[-1] is photo


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_without_a_change_the_photo_comes_back_and_outside_a_mask_always(eta):
    levels = script.sd_levels(SCHEDULE, 20)
    photo, change = torch.randn(2, 1, 4, 8, 8).double()
    assert (edited(photo, change, levels, eta, 0.0) - photo).abs().max() < 1e-12
    mask = torch.zeros(1, 1, 8, 8).double()
    mask[..., 4:] = 1
    result = edited(photo, change, levels, eta, mask=mask)
    assert torch.equal(result[..., :4], photo[..., :4])
    torch.testing.assert_close(
        result[..., 4:], edited(photo, change, levels, eta)[..., 4:], atol=1e-9, rtol=0
    )


def of_photo(sd, loras, photos, **changes):
    """(painter, strip) of a photo."""
    settings = {"lora": [str(loras["peft"])], "image": [photos / "coffee0.png"]}
    painter, [strip] = planned(sd, "a person", **settings | changes)
    return painter, strip


@pytest.mark.parametrize("inversion", ["ddpm", "ddim"])
@pytest.mark.parametrize("guidance", [1, 3])
def test_scale_0_is_the_photo_as_the_vae_gives_it_back(sd, loras, photos, inversion, guidance):
    painter, strip = of_photo(sd, loras, photos, inversion=inversion, guidance_scale=guidance)
    (_, zero, facts), (_, one, _), (_, minus, _) = painter.draw(strip, [0.0, 1.0, -1.0])
    pixels = script.to_pixels(generate.fit_photo(strip.images[0], strip.size))
    kept = script.decode_sd(painter.vae, script.encode_sd(painter.vae, pixels))
    assert facts["scale0_db"] > 60
    assert facts["vae_db"] == pytest.approx(generate.decibels(pixels, kept), abs=0.06)
    assert levels_between(zero, script.to_image(kept[0])) <= 1
    assert levels_between(one, zero) > 10 and levels_between(minus, one) > 10


def test_detail_is_restored_and_skipping_keeps_more(sd, loras, photos):
    results = []
    for skip in (0.0, 0.75):
        painter, strip = of_photo(sd, loras, photos, restore_detail=True, skip=skip)
        zero, one = drawn(painter, strip, 0.0, 1.0)
        assert levels_between(zero, generate.fit_photo(strip.images[0], strip.size)) <= 1
        results.append(np.abs(np.asarray(one).astype(int) - np.asarray(zero)).mean())
    assert results[1] < 0.7 * results[0]


def test_scales_of_a_batch_are_each_alone(sd, loras, photos):
    painter, strip = of_photo(sd, loras, photos)
    together = drawn(painter, strip, 0.5, -1.0, 1.0)
    alone = [drawn(painter, strip, scale)[0] for scale in (0.5, -1.0, 1.0)]
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
    ddim = [*command, "--scales", "0,1", "--inversion", "ddim", "--skip", 0.25]
    assert "6 picture(s), 0 already there" in call(*ddim)
    sizes = {p.name: Image.open(p).size for p in out.glob("*_scale1.png")}
    square = {f"{name}_scale1.png": (128, 128) for name in PHOTOS}
    assert sizes == square | {"wide_scale1.png": (192, 64)}
    assert Image.open(out / "contact_sheet.png").width == 3 * 264 + 8  # photo, 0, 1
    about = generate.read_settings(out / "wide_scale1.png")
    assert about["scale0_db"] > 60 and about["prompt"] == "a photo of a person"
    assert "6 picture(s), 6 already there" in call(*ddim, "--html")
    page = dict(read_page(out / "page.html"))
    assert list(page["wide"]) == ["before", "scale 0", "scale 1"]
    assert page["wide"]["scale 1"] == out / "wide_scale1.png"
    assert "6 picture(s), 0 already there" in call(*command, "--scales", "0,1")


# --- mistakes -------------------------------------------------------------------------------------


def test_one_report_of_everything_wrong(call, loras, photos, tmp_path):
    tensors = load_file(loras["peft"])
    wide = {k: x.repeat(1, 2) if "lora_A" in k else x for k, x in tensors.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    other = {k.replace("up_blocks.1", "up_blocks.7"): x for k, x in tensors.items()}
    save_file(other, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(loras["peft"].read_bytes()[:1000])
    torch.save({"a": 1}, tmp_path / "old.pt")
    Image.new("L", (7, 7)).save(tmp_path / "mask.png")
    (tmp_path / "cut.png").write_bytes((photos / "coffee0.png").read_bytes()[:2000])
    text = call(
        "--skipp", 1, "--offload", "model", "--gamma", 1, "--image", tmp_path / "cut.png",
        "--output", tmp_path / "o.jpg", "--height", 64, "--negative_prompt", "c", check=False,
    )  # fmt: skip
    for words in ("skipp", "'skip'", "offload is a setting of Qwen", "gamma is a setting of FLUX"):
        assert words in text, words
    names = ("nowhere", "wide", "cut", "other")
    files = [tmp_path / f"{name}.safetensors" for name in names] + [tmp_path / "old.pt"]
    text = call(
        "--lora", *files, f"{loras['peft']}:strong", f"{loras['peft']}:1:3",
        "--image", tmp_path / "cut.png", "--device", "cuda:7", "--output", tmp_path / "o.png",
        "--mask", tmp_path / "mask.png", "--scales", "1,1", "--prompt", "a", check=False,
    )  # fmt: skip
    for file in [*files, tmp_path / "cut.png"]:
        assert str(file) in text, file
    for words in (":strong", ":1:3", "cuda:7", "up_blocks.7", "two results are called", "mask:"):
        assert words.replace(".", "_") in text.replace(".", "_"), words
    text = call(
        "--lora", loras["peft"], "--image", photos / "coffee0.png", "--mask",
        tmp_path / "mask.png", "--output", tmp_path / "o.png", check=False,
    )  # fmt: skip
    assert "7 x 7" in text and "1 problem" in text


@pytest.mark.parametrize(
    "wrong",
    [
        ["--prompt", "x", "--skip", 0.5],
        ["--image", "a.png", "--skip", 0.99, "--lora", "x.safetensors"],
        ["--image", "a.png"],
        ["--prompt", "x", "--mask", __file__],
        ["--image", "a.png", "--mask", "no.png", "--lora", "x.safetensors"],
        ["--image", "a.png", "--inversion", "ddim", "--seed", "0,1", "--lora", "x.safetensors"],
        ["--image", "a.png", "--negative_prompt", "c", "--lora", "x.safetensors"],
        ["--prompt", "x", "--seed", "-1"],
        ["--prompt", "x", "--seed", 2**63],
        ["--prompt", "x", "--height", 64],
    ],
)
def test_settings_that_do_not_go_together_are_refused(call, wrong):
    text = call(*wrong, "--output", "o.png", check=False)
    assert "1 problem(s), nothing was loaded" in text and "x.safetensors" not in text


def test_a_base_that_predicts_something_else_is_refused(sd, call, tmp_path):
    shutil.copytree(sd, tmp_path / "v")
    file = tmp_path / "v/scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    command = ["--prompt", "x", "--output", tmp_path / "o.png"]
    text = call(*command, "--pretrained_model_name_or_path", tmp_path / "v", check=False)
    assert "v_prediction" in text and "epsilon" in text
