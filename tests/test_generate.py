"""generate.py as a command, and equal to the trainer's own sampling."""

import json

import diffusers
import numpy as np
import pytest
import torch
from conftest import PAIRS, read_page, run, with_lora_noise
from PIL import Image
from safetensors.torch import save_file

import generate

QUICK = ["--num_inference_steps", 2, "--true_cfg_scale", 1]
REFERENCE = PAIRS / "chelsea1_R.png"


@pytest.fixture
def lora(make_trainer, tmp_path):
    """(trainer, file): a LoRA trained at 64 px with references at target size."""
    trainer = make_trainer(**{"model.lora.lora_alpha": 8.0})
    trainer.setup_accelerator()
    trainer.find_data()
    trainer.set_lora()
    with_lora_noise(trainer.transformer)
    return trainer, trainer.save_lora(tmp_path / "lora.safetensors")


def make(checkpoint, *args, check=True):
    command = ["generate.py", "--pretrained_model_name_or_path", checkpoint, *args]
    return run(*command, check=check)


def test_one_picture_carries_its_settings_and_is_not_made_twice(lora, checkpoints, tmp_path):
    output = tmp_path / "out" / "a.png"
    command = [checkpoints["2511"], "--lora", f"{lora[1]}:0.5", "--image", REFERENCE]
    command += ["--prompt", "make it: blue", "--seed", 7, "--output", output, *QUICK]
    done = make(*command)
    assert "references: target, as the LoRA was trained" in done.stdout
    picture = Image.open(output)
    assert picture.size == generate.nearest_bucket(320, 224, 64)  # the LoRA's training size
    settings = json.loads(picture.info["image_edit"])
    assert settings["prompt"] == "make it: blue" and settings["seed"] == 7
    assert settings["loras"][0]["scale"] == 0.5 and settings["reference_area"] == "target"
    written = output.stat().st_mtime_ns
    assert "1 already there" in make(*command).stdout and output.stat().st_mtime_ns == written
    command[command.index(7)] = 8
    assert "0 already there" in make(*command).stdout and output.stat().st_mtime_ns != written


def test_generated_pixels_are_the_trainers(lora, checkpoints, tmp_path):
    """generate.py on the stock pipeline = the validation path on cached latents."""
    trainer, file = lora
    output = tmp_path / "a.png"
    make(
        checkpoints["2511"], "--lora", file, "--image", PAIRS / "hubble0_R.png",
        "--prompt", "give it a sunset duotone", "--seed", 42, "--output", output, *QUICK,
    )  # fmt: skip
    number = next(i for i, s in enumerate(trainer.samples) if s.name == "hubble0")
    trainer.samples[number] = trainer.samples[number]._replace(held_out=True)
    trainer.cache_embeddings()
    _, batch = trainer._validation_batch(number)
    height, width = (8 * side for side in batch["pixel_latent"].shape[-2:])
    references, embeds = batch["control_latent"], batch["prompt_embed"]
    trainer.transformer.eval()
    latents = trainer._sample(height, width, references, embeds, None, 2, 1.0, 42)
    ours = trainer.decode_vae_latent(latents)[0].astype(int)
    theirs = np.asarray(Image.open(output)).astype(int)
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 1  # 2-D against 3-D VAE


def test_a_strip_over_scales_starts_at_the_base(lora, checkpoints, tmp_path):
    command = ["--image", REFERENCE, "--prompt", "blue", *QUICK]
    make(
        checkpoints["2511"],
        "--lora",
        lora[1],
        "--scales",
        "0,0.5,1",
        "--output",
        tmp_path / "s.png",
        *command,
    )
    strip = Image.open(tmp_path / "s.png")
    pictures = [Image.open(tmp_path / f"s_scale{s}.png") for s in ("0", "0.5", "1")]
    rows = [np.asarray(p).astype(float) for p in pictures]
    assert strip.width == 4 * 264 + 8
    change = [np.abs(row - rows[0]).mean() for row in rows]
    assert 0 == change[0] < change[1] < change[2]


def test_several_loras_add_up_and_several_references_count(lora, checkpoints, tmp_path):
    command = ["--prompt", "blue", *QUICK, "--width", 64, "--height", 64]
    one = ["--image", REFERENCE, *command]
    make(checkpoints["2511"], "--lora", lora[1], *one, "--output", tmp_path / "1.png")
    twice = ["--lora", f"{lora[1]}:0.25", "--lora", f"{lora[1]}:0.75"]
    make(checkpoints["2511"], *twice, *one, "--output", tmp_path / "2.png")
    two = ["--image", PAIRS / "coffee0_R.png", *one]
    make(checkpoints["2511"], "--lora", lora[1], *two, "--output", tmp_path / "3.png")
    one, both, refs = (np.asarray(Image.open(tmp_path / f"{i}.png")).astype(int) for i in (1, 2, 3))
    assert np.abs(one - both).max() <= 1 and np.abs(one - refs).max() > 1


@pytest.mark.parametrize("kind", ["jsonl", "csv", "folder"])
def test_many_rows_skip_what_is_done_and_end_in_a_contact_sheet(kind, checkpoints, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("coffee0", "hubble0"):
        Image.open(PAIRS / f"{name}_R.png").resize((64, 64)).save(photos / f"{name}.png")
    rows = [
        {"images": [f"photos/{n}.png"], "prompt": f"{n}, blue", "name": n}
        for n in ("coffee0", "hubble0")
    ]
    source = ["--table", tmp_path / f"t.{kind}"]
    if kind == "jsonl":
        source[1].write_text("\n".join(json.dumps(row) for row in rows))
    elif kind == "csv":
        lines = [f'{r["images"][0]},"{r["prompt"]}",{r["name"]},3' for r in rows]
        source[1].write_text("\n".join(["images,prompt,name,seed", *lines]))
    else:
        source = ["--input_dir", photos, "--prompt", "blue"]
    command = [*source, "--output_dir", tmp_path / "out", "--width", 64, "--height", 64]
    command += ["--reference_area", "target", *QUICK]
    done = make(checkpoints["2509"], *command)
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {"coffee0.png", "hubble0.png", "contact_sheet.png"}
    assert "2 picture(s), 0 already there" in done.stdout
    make(checkpoints["2509"], *command, "--html")
    rows = read_page(out / "page.html")
    assert [name for name, _ in rows] == ["coffee0", "hubble0"]
    for name, files in rows:
        assert files == {"reference 1": photos / f"{name}.png", "scale 1": out / f"{name}.png"}
    kept = (out / "hubble0.png").stat().st_mtime_ns
    (out / "coffee0.png").unlink()
    assert "2 picture(s), 1 already there" in make(checkpoints["2509"], *command).stdout
    assert (out / "hubble0.png").stat().st_mtime_ns == kept and (out / "coffee0.png").exists()


def test_everything_wrong_is_named_at_once(tmp_path):
    (tmp_path / "t.jsonl").write_text(
        '{"imges": ["x.png"]}\n{"images": ["none.png"], "prompt": "a"}\n'
    )
    (tmp_path / "l.bin").write_bytes(b"")
    done = make(
        tmp_path, "--table", tmp_path / "t.jsonl", "--lora", tmp_path / "l.bin", "--sed", 3,
        "--num_inference_steps", 1, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for words in (
        "sed: unknown setting, did you mean 'seed'?",
        "num_inference_steps",
        "unknown column 'imges', did you mean 'images'?",
        "no picture",
        "--input_dir and --table need --output_dir",
        "only .safetensors files are loaded",
        "no diffusers checkpoint",
    ):
        assert words in done.stderr, words


def test_results_never_overwrite_references_or_leave_their_folder(checkpoints, tmp_path):
    photo = tmp_path / "a b é.png"
    Image.open(REFERENCE).save(photo)
    before = photo.read_bytes()
    cases = [
        ["--input_dir", tmp_path, "--output_dir", tmp_path],
        ["--image", photo, "--output", photo],
    ]
    for case in cases:
        done = make(checkpoints["2511"], *case, "--prompt", "x", *QUICK, check=False)
        assert done.returncode == 2 and "would be overwritten" in done.stderr
        assert photo.read_bytes() == before
    table = tmp_path / "t.jsonl"
    rows = [
        {"images": [photo.name], "prompt": "x", "name": "../escape"},
        {"images": [photo.name], "prompt": "x", "name": "contact_sheet"},
        {"images": [photo.name], "prompt": "x", "seed": "abc"},
        ["a list"],
        {"images": ["junk.png"], "prompt": "x"},
    ]
    (tmp_path / "junk.png").write_bytes(b"junk")
    table.write_text("\n".join(json.dumps(row) for row in rows))
    place = ["--output_dir", tmp_path / "out"]
    done = make(checkpoints["2511"] / "typo", "--table", table, *place, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for words in (
        "'../escape': a name must stay inside",
        "contact_sheet.png",
        "row 3: seed 'abc' is no whole number",
        "row 4: wanted",
        "junk.png cannot be read",
        "--pretrained_model_name_or_path: no folder",
    ):
        assert words in done.stderr, f"{words}\n{done.stderr}"


def test_a_lora_of_another_model_is_refused_before_loading(checkpoints, tmp_path):
    file = tmp_path / "unet.safetensors"
    command = ["--image", REFERENCE, "--prompt", "x", "--output", tmp_path / "o.png"]
    down, attention = "unet.down_blocks.0.", "attentions.0.transformer_blocks.0.attn1.to_q."
    for layer, words in ((down, "no LoRA for this transformer"), (down + attention, "has no UNet")):
        save_file({f"{layer}lora_A.weight": torch.zeros(1)}, file)
        done = make(checkpoints["2511"], "--lora", file, *command, check=False)
        assert done.returncode == 2 and words in done.stderr


def test_loras_of_different_reference_sizes_need_a_decision(lora, make_trainer, tmp_path):
    other = make_trainer(**{"data.reference_area": "1mp"})
    other.set_lora()
    file = other.save_lora(tmp_path / "other.safetensors")
    settings = {"pretrained_model_name_or_path": "x", "lora": [str(lora[1]), str(file)]}
    with pytest.raises(generate.UserError, match="different reference_area"):
        generate.reference_rule(generate.Config(**settings))
    rule = generate.reference_rule(generate.Config(**settings, reference_area="1mp"))
    assert rule.reference_area == "1mp" and "--reference_area" in rule.why


def test_without_a_rule_it_is_the_stock_pipeline(checkpoints):
    """The sizes are put back, and 1mp means the pipeline's own constants."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

    config = generate.Config(pretrained_model_name_or_path="x")
    assert generate.reference_rule(config)[:2] == ("1mp", None)
    folder = checkpoints["2511"]
    processor = generate.load_processor(folder / "processor")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, processor=processor)
    with generate.reference_sizes(pipeline, generate.AREA_1MP, None):
        inside = plus.VAE_IMAGE_SIZE, plus.CONDITION_IMAGE_SIZE
    assert inside == (1024 * 1024, 384 * 384) == (plus.VAE_IMAGE_SIZE, plus.CONDITION_IMAGE_SIZE)
    with generate.reference_sizes(pipeline, 4096, 1024):
        assert (plus.VAE_IMAGE_SIZE, plus.CONDITION_IMAGE_SIZE) == (4096, 1024)
    assert plus.VAE_IMAGE_SIZE == 1024 * 1024


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("a.safetensors", ("a.safetensors", 1.0)), ("a.safetensors:0.5", ("a.safetensors", 0.5))],
)
def test_lora_with_a_scale(text, parsed):
    path, scale = generate.parse_lora(text)
    assert (str(path), scale) == parsed


def test_2508_runs_with_one_reference(checkpoints, tmp_path):
    command = ["--image", REFERENCE, "--prompt", "blue", "--width", 96, "--height", 64]
    command += ["--reference_area", 64 * 64, "--output", tmp_path / "a.png", *QUICK]
    make(checkpoints["2508"], *command)
    assert Image.open(tmp_path / "a.png").size == (96, 64)


def test_no_torch_generator_but_the_seed_decides(checkpoints, tmp_path):
    command = ["--image", REFERENCE, "--prompt", "blue", "--width", 64, "--height", 64, *QUICK]
    command += ["--reference_area", "target", "--seed", "1,2", "--output", tmp_path / "a.png"]
    make(checkpoints["2511"], *command)
    first, second = (np.asarray(Image.open(tmp_path / f"a_seed{i}.png")) for i in (1, 2))
    assert (first != second).any() and Image.open(tmp_path / "a.png").height > 2 * 256
    torch.manual_seed(99)
    (tmp_path / "a_seed1.png").unlink()
    make(checkpoints["2511"], *command)
    assert (np.asarray(Image.open(tmp_path / "a_seed1.png")) == first).all()
