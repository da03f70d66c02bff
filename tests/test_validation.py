"""Validation: what is drawn, what is measured, what it costs, and what it must never change."""

import json
from functools import partial

import diffusers
import numpy as np
import pytest
import torch
from conftest import LAUNCH, copy_pairs, run, small_config, suffix_dataset, write_config
from PIL import Image, ImageFont
from safetensors.torch import load_file

import train_qwen_edit as script
from utils import UserError, load_config, normal

CELL, HEAD, CAPTION = 264, 24, 32  # px: a cell with its gap, the heads, the line under a row


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """Five pairs and a cache that all runs here fill and share."""
    folder = tmp_path_factory.mktemp("validation")
    names = ("astronaut1", "chelsea0", "coffee0", "hubble0", "hubble1")
    return copy_pairs(folder / "data", names), folder / "cache"


@pytest.fixture
def config_file(checkpoints, shared, tmp_path):
    """config_file(name, kind, **changes) -> a run of 4 steps, hubble0 and hubble1 held out."""
    data, cache = shared

    def write(name, kind="2511", **changes):
        dataset = suffix_dataset(data, holdout=["hubble0", "hubble1"])
        if kind == "2508":
            dataset["caption_configs"]["text"]["reference_list"] = None
        settings = {
            "cache.cache_dir": str(cache),
            "logging.output_dir": str(tmp_path / name),
            "data.dataset_configs": [dataset],
            "model.lora.target_modules": ["to_q", "to_v", "img_mlp.net.2"],
            "train.checkpointing_steps": 100,
            "validation.steps": 4,
            "validation.num_inference_steps": 2,
            "validation.true_cfg_scale": 2.0,
            **changes,
        }
        return write_config(tmp_path, small_config(checkpoints[kind], tmp_path, **settings))

    return write


@pytest.fixture
def make(config_file):
    """make(name, kind, **changes) -> trainer."""

    def trainer(name="out", kind="2511", **changes):
        file = config_file(name, kind, **changes)
        return script.QwenImageEditTrainer(load_config(script.Config, ["--config", str(file)]))

    return trainer


def photo(shared, name):
    return shared[0] / name


def metrics_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if "validation_loss" in row}


def sheet_of(folder, step):
    return Image.open(folder / "samples" / f"step_{step:06d}.png")


def same_lora(ours, theirs, name=script.LORA_FILE):
    ours, theirs = load_file(ours / name), load_file(theirs / name)
    return ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items())


def drawn(trainer, edit):
    with torch.no_grad():
        return np.asarray(trainer._validation_picture(edit, trainer._edit_inputs(edit)))


# -- pictures


@pytest.mark.parametrize("area", ["target", 96 * 96])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("kind", ["2508", "2511"])
def test_pictures_are_what_predict_gives(kind, precision, area, make, shared):
    """Held-out pairs and samples, with a guided negative prompt, bit for bit."""
    photos = [photo(shared, "coffee0_R.png"), photo(shared, "chelsea0_R.png")]
    photos = photos[:1] if kind == "2508" else photos
    sample = {"prompt": "a sunset", "images": [str(p) for p in photos]}
    own = {"negative_prompt": "blurry", "true_cfg_scale": 3, "seed": 5, "num_inference_steps": 3}
    trainer = make(
        kind=kind,
        **{
            "data.reference_area": area,
            "train.mixed_precision": precision,
            "validation.negative_prompt": "dull",
            "validation.samples": [
                {**sample, **own, "height": 80, "width": 112},
                *([sample] if area == "target" else []),  # else drawn at 1 MP
            ],
        },
    )
    trainer.fit()
    edits = trainer.validation_edits()
    ours = [drawn(trainer, edit) for edit in edits]
    trainer.setup_predict()
    settings = trainer.config.validation
    for edit, picture in zip(edits, ours, strict=True):
        asked = {"negative_prompt": "dull", "true_cfg_scale": 2, "seed": settings.seed}
        asked["num_inference_steps"] = 2
        if edit.has_target:
            images = [Image.open(photo(shared, f"{edit.example.name}_R.png"))]
            if area != "target":  # training crops what shows the target's frame, predict() does not
                images = [script.crop(images[0], edit.example.references[0].box)]
            size = edit.example.target.size
            asked |= {"width": size[0], "height": size[1]}
        else:
            images = [Image.open(p) for p in photos]
            asked |= own | {"width": 112, "height": 80} if edit is edits[2] else {}
        theirs = trainer.predict(images, edit.example.caption, **asked)
        assert picture.shape == theirs.shape and np.array_equal(picture, theirs)
        assert picture.std() > 1
    assert edits[2].example.target.size == (112, 80)


def test_own_settings_go_over_the_common_ones(make, shared):
    sample = {"prompt": "x", "images": [str(photo(shared, "coffee0_R.png"))]}
    own = {"seed": 0, "negative_prompt": "grey", "true_cfg_scale": 1, "num_inference_steps": 5}
    trainer = make(**{"validation.samples": [sample, sample | own]})
    trainer.setup_accelerator()
    trainer.find_data()
    plain, special = trainer.validation_edits()[2:]
    assert (plain.settings.seed, plain.settings.num_inference_steps) == (42, 2)
    assert plain.negative.caption == "" and plain.negative.vision == plain.example.vision
    assert (special.settings.seed, special.settings.num_inference_steps) == (0, 5)
    assert special.negative is None  # a scale of 1 is no guidance


def test_each_setting_changes_the_picture(make, shared):
    """Guidance, negative prompt, steps and seed are heard; the same settings draw the same."""
    trainer = make()
    trainer.setup_accelerator()
    trainer.find_data()
    trainer.cache_embeddings()
    trainer.set_lora()
    edit = trainer.validation_edits()[0]
    plain = drawn(trainer, edit)
    assert np.array_equal(drawn(trainer, edit), plain)
    for change in (
        {"true_cfg_scale": 6.0},
        {"negative_prompt": "a dull, grey and blurry photo"},
        {"num_inference_steps": 3},
        {"seed": 7},
    ):
        other = edit._replace(settings=edit.settings.model_copy(update=change))
        assert not np.array_equal(drawn(trainer, other), plain), change


def test_resolution_is_an_area_in_the_right_aspect(make, shared):
    wide = {
        "prompt": "x",
        "images": [str(photo(shared, f"{n}_R.png")) for n in ("hubble0", "coffee0")],
    }
    changes = {"validation.samples": [wide], "validation.max_samples": 1}
    sizes = {}
    for side in (None, 128):
        trainer = make(**changes, **{"validation.resolution": side})
        trainer.setup_accelerator()
        trainer.find_data()
        pair, sample = trainer.validation_edits()
        sizes[side] = pair.example.target.size, sample.example.target.size
        # references as large as the target: they follow it
        assert pair.example.references[0].size == pair.example.target.size
    with Image.open(photo(shared, "coffee0_R.png")) as last:
        aspect = last.width / last.height
    assert sizes[128][1] == script.pick_size(128 * 128, aspect)
    assert sizes[128][0] == script.nearest_bucket(320, 320, 128)
    assert sizes[None] == (
        script.nearest_bucket(320, 320, 64),
        script.nearest_bucket(last.width, last.height, 64),
    )


def test_the_sheet_has_a_column_for_everything_there_is(make, shared, tmp_path):
    """references | base | LoRA | EMA | target; cells that a row lacks are empty."""
    images = [str(photo(shared, f"{name}_R.png")) for name in ("coffee0", "chelsea0")]
    trainer = make(
        **{
            "validation.samples": [{"prompt": "two pictures", "images": images}],
            "validation.max_samples": 1,
            "train.use_ema": True,
            "train.ema_decay": 0.5,
        }
    )
    trainer.fit()
    start, end = (np.asarray(sheet_of(tmp_path / "out", step)) for step in (0, 4))
    assert start.shape == end.shape and start.shape[1] == 6 * CELL + 8

    def cell(sheet, row, column):
        top = HEAD + row * (256 + CAPTION)
        return sheet[top : top + 60, 8 + column * CELL : (column + 1) * CELL]

    white = [[bool((cell(end, row, column) == 255).all()) for column in range(6)] for row in (0, 1)]
    assert white == [[False, True, *[False] * 4], [*[False] * 5, True]]
    for row in (0, 1):
        base, lora, ema = ([cell(s, row, c) for s in (start, end)] for c in (2, 3, 4))
        assert np.array_equal(*base)  # the base is drawn once
        assert np.array_equal(base[0], lora[0]) and np.array_equal(base[0], ema[0])
        assert not np.array_equal(base[1], lora[1]) and not np.array_equal(lora[1], ema[1])


def test_a_loader_of_ones_own_gets_the_samples_drawn(make, shared, tmp_path):
    picture = Image.open(photo(shared, "coffee0_R.png")).resize((64, 64))
    batch = {"image": [picture], "control": [picture], "prompt": ["x"]}
    sample = {"prompt": "a sunset", "images": [str(photo(shared, "coffee0_R.png"))]}
    trainer = make(
        **{
            "validation.samples": [sample],
            "data.dataset_configs": [],
            "data.reference_area": 4096,
            "validation.resolution": 64,
        }
    )
    trainer.fit([batch])
    assert sheet_of(tmp_path / "out", 4).width == 3 * CELL + 8  # reference, base, LoRA


def test_without_a_cache_it_draws_and_measures_the_same(make, tmp_path):
    for name, cached in (("cached", True), ("uncached", False)):
        make(name, **{"cache.use_cache": cached}).fit()
    for step in (0, 4):
        ours, theirs = (sheet_of(tmp_path / name, step) for name in ("cached", "uncached"))
        assert ours.tobytes() == theirs.tobytes()
    assert metrics_of(tmp_path / "cached") == metrics_of(tmp_path / "uncached")


# -- memory: encoders and cache


def test_the_text_encoder_is_gone_before_the_transformer_comes(make, shared, tmp_path, monkeypatch):
    """Prompts of the validation are encoded with the others; a warm cache needs no encoder."""
    loaded = []

    def load(trainer, parts, original):
        loaded.extend(parts)
        original(parts)
        assert trainer.qwen_vl is None or trainer.transformer is None

    sample = {"prompt": "never trained", "images": [str(photo(shared, "coffee0_R.png"))]}
    changes = {
        "validation.samples": [sample],
        "validation.negative_prompt": "ugly",
        "cache.cache_dir": str(tmp_path / "cache"),
    }
    for cold in (True, False):
        trainer = make(**changes)
        monkeypatch.setattr(
            trainer, "load_model", partial(load, trainer, original=trainer.load_model)
        )
        loaded.clear()
        trainer.fit()
        assert ("text_encoder" in loaded) == cold and "vae" in loaded  # the VAE decodes


def test_validation_needs_the_references_and_two_prompts_of_each_row(make):
    trainer = make()
    trainer.setup_accelerator()
    trainer.find_data()
    jobs = trainer.validation_jobs()
    assert jobs.keys() <= trainer.cache_jobs().keys()
    assert len(jobs) == 2 * 3  # the reference, the instruction, the empty instruction
    trainer.config = trainer.config.model_copy(update={"validation": script.ValidationConfig()})
    assert trainer.validation_jobs() == {}


# -- losses


def test_the_loss_is_the_mean_over_fixed_sigmas_and_noise(make, tmp_path):
    """Quarter by quarter, computed here by hand; neither dropout nor shift nor steps change it."""
    trainer = make(**{"train.use_ema": True})
    trainer.fit()
    first, last = (metrics_of(tmp_path / "out")[step] for step in (0, 4))
    quarters = {1: [], 2: [], 3: [], 4: []}
    transformer = trainer.bare_transformer()
    for number in (3, 4):
        name, batch = trainer._validation_batch(number)
        x0 = batch["pixel_latent"]
        for quarter, sigma in zip((1, 1, 2, 2, 3, 3, 4, 4), np.arange(1, 16, 2) / 16, strict=True):
            noise = normal(x0.shape, 42, name, float(sigma))
            noisy = (1 - sigma) * x0 + sigma * noise
            with torch.no_grad():
                velocity = script.predict_velocity(
                    transformer,
                    noisy.float(),
                    batch["control_latent"],
                    batch["prompt_embed"],
                    None,
                    torch.tensor([sigma], dtype=torch.float32),
                )
            quarters[quarter].append((velocity - (noise - x0)).square().mean().item())
    for quarter, losses in quarters.items():
        assert last[f"validation_loss_q{quarter}"] == pytest.approx(np.mean(losses), rel=1e-5)
    means = [last[f"validation_loss_q{q}"] for q in (1, 2, 3, 4)]
    assert last["validation_loss"] == pytest.approx(np.mean(means))
    assert first["validation_loss_ema"] == first["validation_loss"]
    assert last["validation_loss_ema"] != last["validation_loss"] != first["validation_loss"]
    assert last.keys() == {"step"} | {
        f"validation_loss{ema}{q}" for ema in ("", "_ema") for q in ("", "_q1", "_q2", "_q3", "_q4")
    }
    make("other", **{"data.caption_dropout_rate": 1.0, "loss.timestep_shift": 3.0}).fit()
    again = metrics_of(tmp_path / "other")[0]
    assert again == {key: value for key, value in first.items() if "ema" not in key}


@pytest.mark.slow
def test_two_processes_share_the_work_and_see_the_same(config_file, shared, tmp_path):
    samples = [
        {"prompt": f"number {i}", "images": [str(photo(shared, "coffee0_R.png"))]} for i in range(3)
    ]
    file = config_file("one", **{"validation.samples": samples, "train.use_ema": True})
    run(script.__file__, "--config", file)
    launch = [*LAUNCH, "--multi_gpu", "--num_processes", "2"]
    pair = ["--logging.output_dir", tmp_path / "two", "--data.batch_size", 1]
    run(script.__file__, "--config", file, *pair, launch=launch, env={"CUDA_VISIBLE_DEVICES": ""})
    one, two = (metrics_of(tmp_path / name) for name in ("one", "two"))
    assert one[0] == two[0] and one.keys() == two.keys()
    assert two[4]["validation_loss"] == pytest.approx(one[4]["validation_loss"], abs=1e-3)
    ours, theirs = (sheet_of(tmp_path / name, 0) for name in ("one", "two"))
    assert ours.height > 5 * (171 + CAPTION)  # two pairs and three samples
    assert ours.tobytes() == theirs.tobytes()


# -- out of memory


def run_out(trainer, monkeypatch, fits):
    """Let the VAE run out of memory unless fits(width in px, tiled); returns what was tried."""
    tried, original = [], script.decode_latents_qwen

    def decode(vae, latents):
        tried.append((latents.shape[-1] * 8, vae.use_tiling))
        if not fits(*tried[-1]):
            raise torch.OutOfMemoryError("pretended")
        return original(vae, latents)

    monkeypatch.setattr(script, "decode_latents_qwen", decode)
    trainer.fit()
    monkeypatch.setattr(script, "decode_latents_qwen", original)
    return tried


@pytest.mark.parametrize(
    ("fits", "ladder", "note"),
    [
        (lambda px, tiled: tiled, [(128, False), (128, True)], "VAE in tiles"),
        (lambda px, tiled: px < 128, [(128, False), (128, True), (96, True)], "half the area"),
        (
            lambda px, tiled: px < 96,
            [(128, False), (128, True), (96, True), (64, True)],
            "a quarter of the area",
        ),
        (lambda px, tiled: False, [(128, False), (128, True), (96, True), (64, True)], "left out"),
    ],
)
def test_out_of_memory_goes_down_a_ladder_once(
    fits, ladder, note, make, tmp_path, monkeypatch, capsys
):
    changes = {"validation.max_samples": 1, "validation.steps": 2, "validation.resolution": 128}
    make("enough", **changes).fit()
    capsys.readouterr()
    trainer = make("short", **changes)
    tried = run_out(trainer, monkeypatch, fits)
    # at step 0 the base goes down to where it fits; then the LoRA there at steps 0, 2 and 4
    assert tried == ladder + [ladder[-1]] * (0 if note == "left out" else 3)
    steps = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    notes = ["VAE in tiles", "half the area", "a quarter of the area", "left out"]
    told = notes[: notes.index(note) + 1]
    assert [text.rpartition(": ")[2] for text in steps] == told
    # training never noticed
    assert same_lora(tmp_path / "enough", tmp_path / "short")
    assert metrics_of(tmp_path / "enough") == metrics_of(tmp_path / "short")
    sheet = np.asarray(sheet_of(tmp_path / "short", 4))
    column = sheet[HEAD : HEAD + 256, 8 + 2 * CELL : 3 * CELL]
    assert (column == 255).all() == (note == "left out")


@pytest.mark.parametrize("call", range(4))
def test_out_of_memory_anywhere_leaves_the_weights_alone(call, make, tmp_path, monkeypatch):
    """In the base's, the LoRA's or the average's denoising, and in the next row."""
    changes = {"train.use_ema": True, "optimizer.init_args": {"lr": 1e-2}}
    make("enough", **changes).fit()
    original, calls = script.denoise, []

    def denoise(*args):
        calls.append(1)
        if len(calls) == call + 1:
            raise torch.OutOfMemoryError("pretended")
        return original(*args)

    monkeypatch.setattr(script, "denoise", denoise)
    make("short", **changes).fit()
    assert same_lora(tmp_path / "enough", tmp_path / "short")
    assert same_lora(tmp_path / "enough", tmp_path / "short", script.EMA_FILE)
    assert metrics_of(tmp_path / "enough") == metrics_of(tmp_path / "short")
    ours, theirs = (sheet_of(tmp_path / name, 4) for name in ("enough", "short"))
    rows = [np.asarray(sheet)[: HEAD + 256] for sheet in (ours, theirs)]
    assert np.array_equal(*rows)  # 64 px are one tile: the same picture


def test_other_errors_still_end_the_run(make, monkeypatch):
    def broken(*args):
        raise RuntimeError("a real mistake")

    monkeypatch.setattr(script, "denoise", broken)
    with pytest.raises(RuntimeError, match="a real mistake"):
        make().fit()


def test_tiles_and_two_dimensional_convolutions_go_together(checkpoints):
    """Tiles decode the same with both kinds of convolution, and nearly what the whole gives."""
    vae = diffusers.AutoencoderKLQwenImage.from_pretrained(checkpoints["2511"], subfolder="vae")
    flat = diffusers.AutoencoderKLQwenImage.from_pretrained(checkpoints["2511"], subfolder="vae")
    script.encode_stills_in_2d(flat)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 16, 6, 8, generator=generator)
    latents = torch.nn.functional.interpolate(coarse, (48, 64), mode="bicubic")[:, :, None]
    whole = script.decode_latents_qwen(flat, latents)
    with script.tiled_decoding(flat, True), script.tiled_decoding(vae, True):
        tiles = script.decode_latents_qwen(flat, latents)
        deep = script.decode_latents_qwen(vae, latents)
    assert tiles.shape == whole.shape == (1, 3, 384, 512)
    torch.testing.assert_close(tiles, deep, rtol=0, atol=2e-5)
    assert not torch.equal(tiles, whole) and (tiles - whole).abs().mean() < 2 / 255
    assert torch.equal(script.decode_latents_qwen(flat, latents), whole)  # off again


# -- mistakes


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"height": 64}, "give height and width, or neither"),
        ({"images": []}, "images: .*at least 1 item"),
        ({"height": 70, "width": 64}, "height: .*multiple of 16"),
        ({"true_cfg_scale": 0.5}, "true_cfg_scale: .*greater than or equal to 1"),
    ],
)
def test_bad_samples_are_told_with_the_config(sample, message, tmp_path):
    whole = {"prompt": "x", "images": ["a.png"], **sample}
    file = write_config(tmp_path, {"validation": {"samples": [whole]}})
    with pytest.raises(
        UserError, match=f"validation.samples.0.{message}|validation.samples.0: .*{message}"
    ):
        load_config(script.Config, ["--config", str(file)])


def test_what_validation_lacks_is_in_the_audit(config_file, shared):
    broken = shared[0].parent / "broken.png"
    broken.write_bytes(b"no picture")
    images = [str(broken), str(shared[0] / "missing.png")]
    sample = {"prompt": "x", "images": images}

    def problems(kind="2511", **changes):
        file = config_file("out", kind, **changes)
        return "\n".join(script.audit(load_config(script.Config, ["--config", str(file)])))

    found = problems("2508", **{"validation.samples": [sample]})
    assert "broken.png cannot be read" in found and "missing.png cannot be read" in found
    assert "validation.samples.0.images: 2508 takes one reference" in found
    assert problems(**{"validation.samples": [sample], "validation.steps": None}) == ""
    nothing = {"data.dataset_configs": [suffix_dataset(shared[0])]}
    assert "validation.samples is empty" in problems(**nothing)
    good = {"prompt": "x", "images": [str(photo(shared, "coffee0_R.png"))]}
    assert problems(**nothing, **{"validation.samples": [good]}) == ""


# -- the sheet itself


def test_long_captions_end_in_an_ellipsis_inside_the_sheet():
    font = ImageFont.load_default(size=15)
    text = "make the sky\n  a little   warmer " * 40
    short = script.shorten(text, font, 500)
    assert short.endswith("…") and "\n" not in short and font.getlength(short) <= 500
    longer = " ".join(text.split())[: len(short)] + "…"
    assert font.getlength(longer) > 500 - 16  # nothing more would have fitted
    assert script.shorten("short", font, 500) == "short"
    cells = [[Image.new("RGB", (300, 200), "red"), None], [None, Image.new("RGB", (10, 10), "red")]]
    sheet = script.contact_sheet(cells, ["a head that is much too long for a cell"] * 2, [text, ""])
    assert sheet.size == (2 * CELL + 8, HEAD + 171 + CAPTION + 256 + CAPTION)
    pixels = np.asarray(sheet)
    assert (pixels[:, -8:] == 255).all() and (pixels[HEAD : HEAD + 171, CELL:] == 255).all()
