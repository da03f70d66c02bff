"""Validation: what is drawn, what is measured, what it costs, and what it must never change."""

import json
import weakref

import numpy as np
import pytest
import torch
from conftest import copy_pairs, suffix_dataset
from PIL import Image
from qwen import assert_same_files, ready

import train_qwen_edit as script
import utils
from utils import UserError, normal

CELL, HEAD, CAPTION = 264, 24, 32  # px: a cell with its gap, the heads, the line under a row


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """Five pairs and a cache that all runs here fill and share."""
    folder = tmp_path_factory.mktemp("validation")
    names = ("astronaut1", "chelsea0", "coffee0", "hubble0", "hubble1")
    return copy_pairs(folder / "data", names), folder / "cache"


@pytest.fixture
def make(make_trainer, shared, tmp_path):
    """make(name, kind, **changes) -> trainer of 2 steps, hubble0 and hubble1 held out."""
    data, cache = shared

    def trainer(name="out", kind="2511", **changes):
        dataset = suffix_dataset(data, holdout=["hubble0", "hubble1"])
        dataset["caption_configs"]["text"]["reference_list"] = None
        settings = {
            "cache.cache_dir": str(cache),
            "logging.output_dir": str(tmp_path / name),
            "data.dataset_configs": [dataset],
            "train.max_train_steps": 2,
            "validation.steps": 2,
            "validation.num_inference_steps": 2,
            "validation.true_cfg_scale": 2.0,
        }
        return make_trainer(kind, **settings | changes)

    return trainer


def photo(shared, name):
    return str(shared[0] / f"{name}_R.png")


def metrics_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if "validation_loss" in row}


def sheet_of(folder, step):
    return np.asarray(Image.open(folder / "samples" / f"step_{step:06d}.png"))


def cell(sheet, row, column, height=60):
    top = HEAD + row * (256 + CAPTION)
    return sheet[top : top + height, 8 + column * CELL : (column + 1) * CELL]


# -- pictures


@pytest.mark.parametrize(
    ("kind", "precision", "area"),
    [("2508", "no", "target"), ("2511", "bf16", "target"), ("2511", "no", 96 * 96)],
)
def test_pictures_are_what_predict_gives(kind, precision, area, make, shared):
    """Held-out pairs and samples, with a guided negative prompt, bit for bit."""
    photos = [photo(shared, "coffee0"), photo(shared, "chelsea0")][: 1 if kind == "2508" else 2]
    changes = {"data.reference_area": area, "train.mixed_precision": precision}
    changes |= {"validation.negative_prompt": "dull", "validation.resolution": 96}
    changes |= {"validation.samples": [{"prompt": "a sunset", "images": photos}]}
    trainer = ready(make(kind=kind, **changes, **{"validation.seed": 5}))
    trainer.transformer.eval()
    examples = [example for example, _ in script.validation_edits(trainer)]
    ours = script.draw_edits(trainer, examples)
    trainer.setup_predict()
    for example, picture in zip(examples, ours, strict=True):
        shown, size = example.pictures["control"], example.pictures["pixel"][0].size
        images = [utils.open_rgb(part.source) for part in shown]
        if len(images) == 1 and area != "target":  # predict() does not know the target's frame
            box = np.multiply(shown[0].box, images[0].size * 2).round()
            images = [images[0].crop(tuple(map(int, box)))]
        how = {"width": size[0], "height": size[1], "seed": 5}
        theirs = trainer.predict(images, example.caption, "dull", 2, 2.0, **how)
        assert np.array_equal(np.asarray(picture), theirs) and theirs.std() > 1
    pairs = [Image.open(next(shared[0].glob(f"hubble{n}_T.*g"))).size for n in (0, 1)]
    with Image.open(photos[-1 if kind == "2511" else 0]) as last:
        sizes = [script.nearest_bucket(*pair, 96) for pair in pairs]
        sizes += [script.pick_size(96 * 96, last.width / last.height)]
    assert [example.pictures["pixel"][0].size for example in examples] == sizes


def test_the_sheet_has_a_column_for_everything_there_is(make, shared, tmp_path):
    """references | base | LoRA | EMA | target; cells that a row lacks are empty."""
    images = [photo(shared, name) for name in ("coffee0", "chelsea0")]
    changes = {"validation.samples": [{"prompt": "two pictures", "images": images}]}
    changes |= {"validation.max_samples": 1, "train.use_ema": True, "train.ema_decay": 0.5}
    make(**changes).fit()
    start, end = (sheet_of(tmp_path / "out", step) for step in (0, 2))
    assert start.shape == end.shape and start.shape[1] == 6 * CELL + 8
    white = [[bool((cell(end, row, column) == 255).all()) for column in range(6)] for row in (0, 1)]
    assert white == [[False, True, *[False] * 4], [*[False] * 5, True]]
    for row in (0, 1):
        base, lora, ema = ([cell(s, row, c) for s in (start, end)] for c in (2, 3, 4))
        assert np.array_equal(*base)  # the base never changes
        assert np.array_equal(base[0], lora[0]) and np.array_equal(base[0], ema[0])
        assert not np.array_equal(base[1], lora[1]) and not np.array_equal(lora[1], ema[1])


def test_a_loader_of_ones_own_gets_the_samples_drawn(make, shared, tmp_path):
    picture = Image.open(photo(shared, "coffee0")).resize((64, 64))
    batch = {"image": [picture], "control": [picture], "prompt": ["x"]}
    sample = {"prompt": "a sunset", "images": [photo(shared, "coffee0")]}
    changes = {"validation.samples": [sample], "data.dataset_configs": []}
    changes |= {"data.reference_area": 4096, "validation.resolution": 64}
    for cached in (True, False):
        make(str(cached), **changes, **{"cache.use_cache": cached}).fit([batch])
    sheets = [sheet_of(tmp_path / name, 2) for name in ("True", "False")]
    assert sheets[0].shape[1] == 3 * CELL + 8  # reference, base, LoRA
    assert np.array_equal(*sheets)


def test_pictures_are_drawn_in_eval_mode_and_steps_taken_in_train_mode(make, monkeypatch):
    modes = []
    for original in (script.draw_edits, script.train_step):

        def watched(trainer, *args, original=original, **how):
            modes.append(trainer.bare_transformer().training)
            return original(trainer, *args, **how)

        monkeypatch.setattr(script, original.__name__, watched)
    make(**{"validation.max_samples": 1}).fit()
    assert modes == [False, False, True, True, False]  # base, LoRA | 2 steps | LoRA


# -- memory


def test_encoders_and_transformer_are_never_in_memory_together(make, shared, tmp_path, monkeypatch):
    """What validation shows is encoded with the others; a warm cache needs no text encoder."""
    sample = {"prompt": "never trained", "images": [photo(shared, "coffee0")]}
    changes = {"validation.samples": [sample], "validation.negative_prompt": "ugly"}
    changes |= {"validation.max_samples": 1, "cache.cache_dir": str(tmp_path / "cache")}
    alive, met = weakref.WeakSet(), []
    original = script.QwenImageEditTrainer.load_model

    def watched(self, *args):
        original(self, *args)
        alive.update({getattr(self, name) for name in ("vae", "qwen_vl", "transformer")} - {None})
        met.append({type(model).__name__ for model in alive})

    monkeypatch.setattr(script.QwenImageEditTrainer, "load_model", watched)
    encoder = "Qwen2_5_VLForConditionalGeneration"
    for cold in (True, False):
        met.clear()
        make(**changes).fit()
        assert any(encoder in models for models in met) == cold
        assert all(models == {encoder} for models in met if encoder in models), met


# -- losses


def test_the_loss_is_the_mean_over_fixed_sigmas_and_noise(make, tmp_path):
    """Quarter by quarter, computed here by hand; neither dropout nor shift nor steps change it."""
    trainer = make(**{"train.use_ema": True})
    trainer.fit()
    first, last = (metrics_of(tmp_path / "out")[step] for step in (0, 2))
    quarters = {1: [], 2: [], 3: [], 4: []}
    for number in trainer.data.held_out:
        example = trainer.data.resolve(script.Draw(0, number))
        batch = script.encoded([example], trainer.through_cache)
        x0 = batch["pixel_latent"]
        for quarter, sigma in zip((1, 1, 2, 2, 3, 3, 4, 4), np.arange(1, 16, 2) / 16, strict=True):
            noise = normal(x0.shape, 42, example.name, float(sigma))
            noisy = (1 - sigma) * x0 + sigma * noise
            level = torch.tensor([sigma], dtype=torch.float32)
            with torch.no_grad():
                transformer = trainer.bare_transformer()
                velocity = script.predict_velocity(transformer, noisy.float(), level, batch)
            quarters[quarter].append((velocity - (noise - x0)).square().mean().item())
    for quarter, losses in quarters.items():
        assert last[f"validation_loss_q{quarter}"] == pytest.approx(np.mean(losses), rel=1e-5)
    means = [last[f"validation_loss_q{q}"] for q in (1, 2, 3, 4)]
    assert last["validation_loss"] == pytest.approx(np.mean(means))
    assert first["validation_loss_ema"] == first["validation_loss"]
    assert last["validation_loss_ema"] != last["validation_loss"] != first["validation_loss"]
    make("other", **{"data.caption_dropout_rate": 1.0, "loss.timestep_shift": 3.0}).fit()
    again = metrics_of(tmp_path / "other")[0]
    assert again == {key: value for key, value in first.items() if "ema" not in key}


# -- out of memory


def test_out_of_memory_leaves_a_cell_empty_and_the_weights_alone(make, tmp_path, monkeypatch):
    """Of the base, or of the average."""
    changes = {"train.use_ema": True, "validation.max_samples": 1}
    make("enough", **changes).fit()
    original, calls = script.draw_edit, []
    for call in (0, 2):

        def draw(*args, call=call):
            calls.append(1)
            if len(calls) == call + 1:
                raise torch.OutOfMemoryError("pretended")
            return original(*args)

        calls.clear()
        monkeypatch.setattr(script, "draw_edit", draw)
        make(f"short{call}", **changes).fit()
        assert_same_files(tmp_path / "enough", tmp_path / f"short{call}")
        assert metrics_of(tmp_path / "enough") == metrics_of(tmp_path / f"short{call}")
        sheets = [sheet_of(tmp_path / name, 0) for name in ("enough", f"short{call}")]
        for column in range(5):
            ours, theirs = (cell(sheet, 0, column) for sheet in sheets)
            assert np.array_equal(ours, theirs) == (column != call + 1)
            assert (theirs == 255).all() == (column == call + 1)


# -- mistakes


def test_unreadable_samples_are_in_the_audit(make, shared):
    broken = shared[0].parent / "broken.png"
    broken.write_bytes(b"no picture")
    sample = {"prompt": "x", "images": [str(broken), str(shared[0] / "missing.png")]}
    for steps, count in ((2, 2), (None, 0)):
        trainer = make(**{"validation.samples": [sample], "validation.steps": steps})
        problems = script.audit(trainer.config)
        assert len(problems) == count
        assert all("broken.png" in p or "missing.png" in p for p in problems)
    with pytest.raises(UserError, match=str(broken)):  # a loader of one's own is not audited
        make(**{"validation.samples": [sample]}).fit([{}])
