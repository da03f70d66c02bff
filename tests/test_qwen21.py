"""Qwen-Image-2.1 in train_qwen_edit.py and generate.py against the diffusers pipeline."""

import diffusers
import numpy as np
import pytest
import torch
from conftest import PAIRS, run, small_config, suffix_dataset, with_lora_noise, write_config
from PIL import Image
from qwen import assert_same, assert_same_files, ready
from safetensors.torch import load_file

import train_qwen_edit as script
import utils


def pipeline_of(trainer):
    """The diffusers pipeline of the trainer's models."""
    trainer.load_model()
    parts = ("scheduler", "vae", "processor", "transformer")
    parts = {name: getattr(trainer, name) for name in parts}
    return diffusers.QwenImage21Pipeline(text_encoder=trainer.qwen_vl, **parts)


def transparent(name):
    """A photo of 96 x 64 px whose right half is clear."""
    image = Image.open(PAIRS / f"{name}_R.png").convert("RGBA").resize((96, 64))
    image.putalpha(Image.fromarray(np.uint8([[255] * 48 + [40] * 48] * 64)))
    return image


@pytest.fixture
def small(monkeypatch):
    """1 MP is 96^2 px."""
    monkeypatch.setattr(script, "AREA_1MP", 96 * 96)
    return {"output_resolution": 96}


@pytest.mark.parametrize(
    ("names", "guidance", "lora", "size"),
    [
        (["hubble0"], None, True, (None, None)),
        (["astronaut0", "chelsea1"], None, True, (128, 96)),
        (["coffee0"] * 3, 3.0, False, (64, 64)),
    ],
)
def test_predict_gives_the_pipelines_pixels(names, guidance, lora, size, make_trainer, small):
    trainer = make_trainer("2.1", **{"data.reference_area": "1mp"})
    trainer.setup_predict()
    if lora:
        trainer.set_lora()
        with_lora_noise(trainer.transformer).eval()
    images = [transparent(name) for name in names]
    how = {"num_inference_steps": 3, "width": size[0], "height": size[1]}
    ours = trainer.predict(images, "make it blue", seed=3, true_cfg_scale=guidance, **how)
    if guidance:
        how |= {"true_cfg_scale": guidance, "negative_prompt": ""}
    generator = torch.Generator().manual_seed(3)
    prompt = {"prompt": "make it blue", "generator": generator}
    theirs = pipeline_of(trainer)(image=images, **prompt, **how, **small).images[0]
    assert ours.shape[2] == 4 and ours.std() > 5
    np.testing.assert_array_equal(ours, np.asarray(theirs))


def test_the_schedule_of_the_checkpoint_is_used(make_trainer, small, monkeypatch):
    trainer = make_trainer("2.1", **{"data.reference_area": "1mp"})
    trainer.setup_predict()
    sigmas = [1.0, 0.7, 0.2]
    read = utils.read_model_json
    more = {"sample_sigmas": sigmas}
    monkeypatch.setattr(utils, "read_model_json", lambda *a: read(*a) | more)
    ours = trainer.predict(transparent("hubble0"), "make it blue", seed=1)
    how = {"prompt": "make it blue", "generator": torch.Generator().manual_seed(1)}
    image = transparent("hubble0")
    theirs = pipeline_of(trainer)(image=image, sigmas=sigmas, **how, **small).images[0]
    np.testing.assert_array_equal(ours, np.asarray(theirs))


def test_a_pair_is_shown_and_embedded_as_the_pipeline_does(make_trainer, pairs):
    trainer = make_trainer("2.1", **{"data.dataset_configs": [pairs]})
    trainer.setup_accelerator()
    trainer.find_data()
    example = trainer.data.resolve(script.Draw(0, 0))
    [job] = script.jobs_of(example)["prompt_embed"]
    [latent] = script.jobs_of(example)["control_latent"]
    picture = script.load_picture(latent.pictures[0], "RGBA")
    pipeline = pipeline_of(trainer)
    embeds, mask, slots = pipeline.encode_prompt(example.caption, image=[picture])
    stored = trainer.through_cache(job)
    assert mask is None and torch.equal(stored[:, :-1], embeds[0])
    assert torch.equal(stored[:, -1] > 0, slots[0])
    pixels = pipeline.image_processor.preprocess(picture).unsqueeze(2)
    expected = pipeline._encode_vae_image(pixels, None)[0]
    torch.testing.assert_close(trainer.through_cache(latent), expected, rtol=0, atol=1e-5)
    assert expected.shape == (64, 1, picture.height // 16, picture.width // 16)


def cached_batch(trainer, names):
    """A batch of the named samples with fixed noise."""
    numbers = [[s.name for s in trainer.data.samples].index(name) for name in names]
    return trainer.data.batch([script.Draw(7 + n, n) for n in numbers])


def gradients(trainer):
    """The adapter's gradients, taken away."""
    named = {
        n: p.grad.clone() for n, p in trainer.transformer.named_parameters() if p.requires_grad
    }
    trainer.transformer.zero_grad()
    return named


@pytest.fixture
def pairs(tmp_path):
    """Four pairs of one shape whose captions are of two lengths; the rest of the tiny data set."""
    rng = np.random.default_rng(0)
    for number, text in enumerate(("blue", "make it a very blue picture", "blue", "red")):
        for end in "TR":
            pixels = rng.integers(0, 255, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{number}_{end}.png")
        (tmp_path / f"{number}_T.txt").write_text(text)
    dataset = suffix_dataset(tmp_path)
    dataset["caption_configs"]["text"]["reference_list"] = None
    return dataset | {"resolution": 64}


def test_a_batch_is_its_samples_whatever_the_length_of_the_text(make_trainer, pairs):
    trainer = ready(make_trainer("2.1", **{"data.dataset_configs": [pairs]}))
    names = ["0", "1", "2", "3"]
    loss = script.compute_loss(trainer, cached_batch(trainer, names))
    loss.mean().backward()
    whole = gradients(trainer)
    parts = [script.compute_loss(trainer, cached_batch(trainer, [name]))[0] for name in names]
    torch.stack(parts).mean().backward()
    torch.testing.assert_close(loss, torch.stack(parts), rtol=0, atol=1e-6)
    assert_same(gradients(trainer), whole, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_k_noise_levels_are_k_samples(checkpointing, make_trainer, pairs):
    settings = {"data.dataset_configs": [pairs], "loss.noise_levels_per_sample": 3}
    settings["train.gradient_checkpointing"] = checkpointing
    trainer = ready(make_trainer("2.1", **settings))
    batch = cached_batch(trainer, ["0", "1"])
    assert batch["noise"].shape == (3, 2, 64, 1, 4, 4) and batch["sigma"].shape == (3, 2)
    loss = script.compute_loss(trainer, batch)
    loss.mean().backward()
    together = gradients(trainer)
    alone = [
        script.compute_loss(trainer, batch | {"noise": noise, "sigma": sigma})
        for noise, sigma in zip(batch["noise"], batch["sigma"], strict=True)
    ]
    torch.stack(alone).mean().backward()
    torch.testing.assert_close(loss, torch.stack(alone).mean(0), rtol=0, atol=1e-5)
    assert_same(gradients(trainer), together, atol=1e-5)
    one = make_trainer("2.1", **settings | {"loss.noise_levels_per_sample": 1})
    one.setup_accelerator()
    one.find_data()
    first = cached_batch(one, ["0", "1"])
    assert torch.equal(first["noise"], batch["noise"][0])


@pytest.fixture(scope="module")
def straight(checkpoints, tmp_path_factory):
    """Six steps with two noise levels and validation: (folder, config file)."""
    folder = tmp_path_factory.mktemp("q21")
    changes = {
        "loss.noise_levels_per_sample": 2,
        "loss.preserve": 0.5,
        "loss.preserve_prompts": ["make it green"],
        "loss.preserve_every": 2,
        "model.lora.target_modules": "attn+mlp",
        "train.max_train_steps": 6,
        "train.checkpointing_steps": 3,
        "train.use_ema": True,
        "validation.steps": 6,
        "validation.num_inference_steps": 2,
    }
    settings = small_config(checkpoints["2.1"], folder, **changes)
    dataset = settings["data"]["dataset_configs"][0]
    dataset["caption_configs"]["text"]["reference_list"] = None
    dataset["holdout"] = ["hubble0"]
    file = write_config(folder, settings)
    run(script.__file__, "--config", file)
    return folder, file


def test_a_run_learns_resumes_and_loads_everywhere(straight, tmp_path, checkpoints, call_generate):
    folder, file = straight
    out = folder / "out"
    sheet = Image.open(out / "samples/step_000006.png")
    assert sheet.mode == "RGB"
    assert "license_name: qwen-research" in (out / "README.md").read_text()
    flags = ["--config", file, "--logging.output_dir", tmp_path / "out"]
    run(script.__file__, *flags, "--train.max_train_steps", 3)
    run(script.__file__, *flags, "--train.resume_from_checkpoint", "latest")
    assert_same_files(tmp_path / "out", out)
    two = ["--config", file, "--logging.output_dir", tmp_path / "two", "--data.batch_size", 1]
    run(script.__file__, *two, processes=2)
    assert_same_files(tmp_path / "two", out, atol=2e-4)
    names = load_file(out / script.LORA_FILE)
    assert any(".img_mlp.gate_layer." in name for name in names)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        checkpoints["2.1"],
        processor=script.load_processor(checkpoints["2.1"] / "processor", "Qwen3VLProcessor"),
    )
    pipeline.load_lora_weights(str(out), weight_name=script.LORA_FILE)
    how = {"num_inference_steps": 2, "width": 96, "height": 64, "output_resolution": 96}
    for photo in (PAIRS / "chelsea1_R.png", None):  # None: the prompt alone
        call_generate(
            *("--pretrained_model_name_or_path", checkpoints["2.1"], "--seed", 5),
            *("--lora", out / script.LORA_FILE, "--prompt", "make it blue", "--dtype", "fp32"),
            *(["--image", photo] if photo else []),
            *("--num_inference_steps", 2, "--width", 96, "--height", 64),
            *("--reference_area", 96 * 96, "--output", tmp_path / "made.png"),
        )
        how["generator"] = torch.Generator().manual_seed(5)
        image = [Image.open(photo).convert("RGBA")] if photo else None
        [expected] = pipeline(image=image, prompt="make it blue", **how).images
        made = np.asarray(Image.open(tmp_path / "made.png"))
        np.testing.assert_array_equal(made, np.asarray(expected))


@pytest.mark.parametrize("kind", ["2511", "2.1"])
def test_pictures_without_references_are_trained_beside_edits(kind, make_trainer, tmp_path):
    """By the pipeline's own template without pictures; in folders and in tables."""
    rng = np.random.default_rng(0)
    for name in ("edits/before/a", "edits/after/a", "plain/after/b", "plain/after/c"):
        file = tmp_path / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(file)
    rows = "target,references,prompt\nafter/b.png,,a blue cat\nafter/c.png,,a red dog\n"
    (tmp_path / "plain/t.csv").write_text(rows)
    common = {"resolution": 64}
    edits = {"train_data_dir": str(tmp_path / "edits"), "target_dir": "after", **common}
    plain = {"train_data_dir": str(tmp_path / "plain"), "loss_weight": 0.5, **common}
    folders = plain | {"target_dir": "after", "reference_dirs": [], "caption": "a blue cat"}
    table = plain | {"table": str(tmp_path / "plain/t.csv")}
    for other in (folders, table):
        both = [edits | {"reference_dirs": ["before"], "caption": "make it blue"}, other]
        trainer = ready(make_trainer(kind, **{"data.dataset_configs": both}))
        shapes = [trainer.data.shape(script.Draw(0, n)) for n in range(3)]
        assert [len(dict(s[:1])) if not s else len(s[0]) - 1 for s in shapes] == [1, 0, 0]
        batch = trainer.data.batch([script.Draw(4, 1), script.Draw(5, 2)])
        assert batch["control_latent"] == [] and batch["loss_weight"].tolist() == [0.5, 0.5]
        assert script.compute_loss(trainer, batch).isfinite().all()
        example = trainer.data.resolve(script.Draw(0, 1))
        [job] = script.jobs_of(example)["prompt_embed"]
        trainer.load_model(["text_encoder"])
        expected = trainer.text_pipeline.encode_prompt(prompt=example.caption, device="cpu")[0][0]
        assert torch.equal(trainer.through_cache(job)[:, : expected.shape[1]], expected)
        assert any("1: 2 sample(s) have no reference" in n for n in script.notes_on(trainer.data))
        sheet = script.edit_sheet([example], [[None]], ["target"])
        assert sheet.width < 300


def test_a_picture_from_a_prompt_alone_is_the_pipelines(make_trainer, small, tmp_path):
    trainer = make_trainer("2.1", **{"data.reference_area": "1mp"})
    trainer.setup_predict()
    flat = script.Picture(Image.new("RGB", (96, 96)), "x", (96, 96))
    example = script.Example("", "a blue cat", {"pixel": (flat,), "control": (), "vision": ()})
    how = script.SamplingConfig(num_inference_steps=3, seed=2)
    ours = script.draw_edit(trainer, example, how, trainer.encode)
    generator = torch.Generator().manual_seed(2)
    settings = {"num_inference_steps": 3, "generator": generator, **small}
    theirs = pipeline_of(trainer)(prompt="a blue cat", **settings).images[0]
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
