"""demo.py: three demos, each run once for all tests; the base model of the first."""

import contextlib
import dataclasses
import json
import os
import shlex
import shutil

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, run
from filelock import FileLock
from PIL import Image, ImageOps

import demo
import train_qwen_edit as script
from utils import Checkpoints, UserError, load_config, load_script

rebuild = load_script(ROOT / "demo/rebuild.py")
scenes = load_script(ROOT / "demo/scenes.py")
BASE = ROOT / demo.BASE_DIR


def run_forked(name, folder):
    """Run a demo of a copy of the project in this process, its commands as forks."""
    module = load_script(folder / "demo.py")

    def run_command(shown):
        words = shlex.split(shown)
        first = next(i for i, word in enumerate(words) if word.endswith(".py"))
        run(*words[first:], cwd=folder, timeout=1200)

    module.run_command = run_command
    with contextlib.chdir(folder):
        module.DEMOS[name]("", True)


def finished_demo():
    """Whether README's first command has run, whole, with the files as they are now."""
    done, told = (ROOT / demo.OUTPUT_DIR / name for name in ("demo.json", "config.yaml"))
    if not (done.exists() and told.exists()):
        return False
    files = [ROOT / demo.CONFIG, *ROOT.glob("*.py"), *(ROOT / "demo").rglob("*")]
    files += [*(ROOT / demo.PAIRS_DIR).iterdir(), *(ROOT / "tools").glob("*.py")]
    newest = max(file.stat().st_mtime for file in files if file.is_file() and file.suffix != ".pyc")
    wanted = load_config(script.Config, ["--config", str(ROOT / demo.CONFIG)])
    used = load_config(script.Config, ["--config", str(told)])
    return used == wanted and newest < done.stat().st_mtime


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory):
    """demo_run("pairedit") -> the copy of the project in which that demo has run, quickly.

    One of the test processes runs it, as forks, which saves the start of the commands; the first
    demo is not run where README's command has done it.
    """
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    place = tmp_path_factory.getbasetemp().parent / f"demos-{session}"
    place.mkdir(exist_ok=True)

    def folder_of(name):
        folder, done = place / name, place / f"{name}.done"
        if name == "qwen_edit" and finished_demo():
            return ROOT
        with FileLock(place / f"{name}.lock"):
            if not done.exists():
                for part in ("configs", "data", "demo", "tools"):
                    shutil.copytree(ROOT / part, folder / part)
                for file in ROOT.glob("*.py"):
                    shutil.copy(file, folder)
                run_forked(name, folder)
                done.touch()
        return folder

    return folder_of


def figures(folder, name, kind):
    """[(scale, figure)] of the demo.json in a folder: a series, "" if there is one."""
    columns = json.loads((folder / "demo.json").read_text())["columns"].values()
    points = [(c["scale"], c["means"][kind]) for c in columns if c["series"] == name]
    return sorted(points)


# --- qwen_edit ------------------------------------------------------------------------------------


def test_the_lora_makes_the_edit_on_new_photos(demo_run):
    folder = demo_run("qwen_edit") / demo.OUTPUT_DIR
    (_, base), (_, lora) = figures(folder, "", "error_inside")
    assert lora < base / 4
    assert [share for _, share in figures(folder, "", "gain")][1] == pytest.approx(1, abs=0.2)
    assert json.loads((folder / "demo.json").read_text())["skill"] == 1 - lora / base
    for file in ("demo.png", "report.html", "generated/page.html", "generated/evaluation.csv"):
        assert (folder / file).exists()
    assert len(list((folder / "generated").glob("*_scale[01].png"))) == 2 * len(demo.HELD_OUT)


def test_a_demo_deletes_nothing_under_a_run(tmp_path):
    with Checkpoints(tmp_path).only_run(), pytest.raises(UserError, match="another run"):
        demo.begin(tmp_path)
    assert tmp_path.exists()
    demo.begin(tmp_path)
    assert not tmp_path.exists()


def test_the_demo_trains_on_ten_and_judges_on_three():
    config = load_config(script.Config, ["--config", str(ROOT / demo.CONFIG)])
    dataset = config.data.dataset_configs[0]
    assert tuple(dataset.holdout) == demo.HELD_OUT == rebuild.HELD_OUT
    befores = list((ROOT / demo.PAIRS_DIR).glob("*_R.png"))
    names = {path.name[:-6] for path in befores}
    assert len(names) == 13 and set(demo.HELD_OUT) < names


def test_the_base_is_small_and_of_the_true_classes():
    files = [file for file in BASE.rglob("*") if file.is_file()]
    configs = (ROOT / "demo").rglob("config.json")
    assert not [file for file in configs if "_name_or_path" in file.read_text()]
    assert sum(file.stat().st_size for file in files) <= 12e6
    assert script.detect_flavour(str(BASE)).name == "edit-v3"
    kind, processor = diffusers.QwenImageEditPlusPipeline, script.load_processor(BASE / "processor")
    pipeline = kind.from_pretrained(BASE, processor=processor, dtype=torch.float32)
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
    trainer.flavour = dataclasses.replace(trainer.flavour, vision_area=rebuild.VISION_PX**2)
    trainer.setup_predict()
    files = (next((ROOT / demo.PAIRS_DIR).glob(f"coffee2_{end}.[pj][np]g")) for end in "RT")
    before, after = (Image.open(file).convert("RGB") for file in files)
    for prompt in ("evening light from the left", "keep the picture"):
        result = trainer.predict(before, prompt, None, num_inference_steps=4)
        size = (result.shape[1], result.shape[0])
        copy, edit = (np.asarray(ImageOps.fit(image, size), float) for image in (before, after))
        assert psnr(result, copy) > 22
        assert psnr(result, edit) < 18


def psnr(a, b):
    error = np.mean((np.asarray(a, float) - b) ** 2) / 255**2
    return -10 * np.log10(max(error, 1e-10))


@torch.no_grad()
def test_the_autoencoder_keeps_the_held_out_photos():
    vae = diffusers.AutoencoderKLQwenImage.from_pretrained(BASE / "vae", dtype=torch.float32)
    script.encode_stills_in_2d(vae)
    found = []
    for name in demo.HELD_OUT:
        photo = Image.open(ROOT / demo.PAIRS_DIR / f"{name}_R.png").convert("RGB")
        photo = ImageOps.fit(photo, script.nearest_bucket(*photo.size, 320))
        pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float() / 127.5 - 1
        latents = vae.encode(pixels.unsqueeze(2)).latent_dist.mode()
        found.append(psnr(as_image(vae.decode(latents).sample[:, :, 0]), photo))
    assert np.mean(found) >= 32


def test_the_afters_are_the_relit_befores_and_no_curve_of_colours_makes_them():
    for file in (ROOT / demo.PAIRS_DIR).glob("*_T.png"):
        before = np.asarray(Image.open(str(file).replace("_T.", "_R.")).convert("RGB"), np.float32)
        after = np.asarray(Image.open(file), float)
        assert np.abs(scenes.relight(before / 255, scenes.EVENING) * 255 - after).max() <= 1
        colours = (before // 16 @ [1, 16, 256]).astype(int).ravel()  # one curve: their mean afters
        means = [np.bincount(colours, after[..., n].ravel()) for n in range(3)]
        curve = (np.stack(means, 1) / np.maximum(np.bincount(colours), 1)[:, None])[colours]
        assert psnr(curve.reshape(after.shape), after) < 26


def test_a_linear_vae_in_the_stock_class_is_the_autoencoder():
    """Encoder and decoder of the stock class give what the fitted linear model gives."""
    torch.manual_seed(0)
    model = rebuild.LinearAutoencoder(width=40)
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    vae = rebuild.to_stock_vae(model)
    with torch.no_grad():
        latents = model.encode(pixels)
        stock = vae.encode(pixels.unsqueeze(2)).latent_dist.mode()[:, :, 0]
        torch.testing.assert_close(stock, latents, rtol=1e-3, atol=1e-3)
        decoded = vae.decode(stock.unsqueeze(2)).sample[:, :, 0]
        expected = model.decode(latents).clamp(-1, 1)
        torch.testing.assert_close(decoded, expected, rtol=1e-2, atol=1e-2)


# --- pairedit -------------------------------------------------------------------------------------


def test_the_slider_moves_the_hair_and_leaves_the_rest(demo_run):
    folder = demo_run("pairedit") / demo.FACE_OUTPUT_DIR
    for name, most in (("seeds", 0.02), ("photo", 0.03)):
        scales, hair = zip(*figures(folder, name, "hair"), strict=True)
        assert hair[0] == 0 and 0.8 <= hair[scales.index(1)] <= 1.25
        if name == "seeds":
            assert (np.diff(hair) > 0).all()
        assert dict(figures(folder, name, "rest"))[1] < most
    assert 0.8 <= json.loads((folder / "demo.json").read_text())["whole_change_at"] <= 1.25
    assert len(list(folder.glob("strips/age/*/page.html"))) == 1
    for file in ("demo.png", "photo.png", "photo_strip.png", "photo_strip_scale2.png"):
        assert (folder / file).exists()


# --- dreambooth -----------------------------------------------------------------------------------


def test_the_change_moves_the_hair_on_new_faces_and_on_photos(demo_run):
    folder = demo_run("dreambooth") / demo.HAIR_OUTPUT_DIR
    found = json.loads((folder / "demo.json").read_text())
    change, after_only = (dict(figures(folder, name, "hair")) for name in demo.LORAS)
    assert list(change) == sorted(change, key=change.get) and change[1] >= 0.5
    assert after_only[1] < change[1]
    assert 0 < found["content_ratio"] < 1 / 3  # of after-only training, at equal change of hair
    errors = [found["photos"][f"scale {s}"]["means"]["error_inside"] for s in ("0", "0.5", "1")]
    assert errors[2] < errors[1] / 2 < errors[0] / 4
    for file in ("demo.png", "lora/report.html", "photos/page.html", "after_only_strip.png"):
        assert (folder / file).exists()


@torch.no_grad()
def test_the_change_at_scale_0_is_the_base(demo_run):
    """By text the pipeline's picture, but for rounding; of a photo what the autoencoder keeps."""
    folder = demo_run("dreambooth") / demo.HAIR_OUTPUT_DIR
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        ROOT / demo.SD_BASE_DIR, dtype=torch.float32, safety_checker=None
    )
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    vae = pipeline.vae
    for seed in range(4):
        base = pipeline(
            demo.HAIR_PROMPT,
            height=rebuild.FACE_PX,
            width=rebuild.FACE_PX,
            num_inference_steps=12,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        first, second = (
            np.asarray(Image.open(folder / f"{name}_strip_seed{seed}_scale0.png"), float)
            for name in demo.LORAS
        )
        assert np.array_equal(first, second) and np.abs(first - base).max() <= 1
        photo = Image.open(folder / f"held_out/before/{seed}.png")
        pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float() / 127.5 - 1
        kept = as_image(vae.decode(vae.encode(pixels).latent_dist.mode()).sample)
        assert psnr(Image.open(folder / f"photos/{seed}_scale0.png"), kept) >= 40


def as_image(pixels):
    """(1, 3, H, W) in [-1, 1] -> (H, W, 3) of 8 bit."""
    pixels = (pixels[0] / 2 + 0.5).clamp(0, 1) * 255
    return pixels.round().to(torch.uint8).permute(1, 2, 0).numpy().astype(float)


# --- usage ----------------------------------------------------------------------------------------


def test_bad_usage_is_a_message(tmp_path):
    done = run("demo.py", "nonsense", check=False)
    assert done.returncode == 2 and "invalid choice" in done.stderr
    for file in ("demo.py", "utils.py"):
        shutil.copy(ROOT / file, tmp_path)
    done = run(tmp_path / "demo.py", "pairedit", check=False)
    assert done.returncode == 2 and "flux_slider_base" in done.stderr
