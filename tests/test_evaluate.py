"""evaluate.py: figures against their libraries and closed forms, folders of every layout."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import skimage.metrics
import torch
import torch.nn.functional as F
import transformers
from conftest import PAIRS, run
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import evaluate
from evaluate import Config, Result

OFFLINE = "psnr,ssim,region,gain"
NAMES = ("chelsea1", "coffee2", "hubble0")  # one after is a JPEG
CPU = torch.device("cpu")


def noise(seed, shape=(48, 64, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def photo(name, size=None):
    file = next(PAIRS.glob(f"{name}.[pj][np]g"))
    return evaluate.fit_photo(file, size) if size else Image.open(file).convert("RGB")


def save(path, array, settings=None):
    """A PNG, with settings as generate.py writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    if settings is not None:
        info.add_itxt(evaluate.SETTINGS_KEY, json.dumps(settings))
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(path, pnginfo=info)
    return path


def unit(array):
    return evaluate.unit_pixels(Image.fromarray(array))


def measure(*flags):
    """evaluate.py in this process."""
    argv = [str(flag) for flag in flags]
    evaluate.evaluate(evaluate.load_config(Config, argv, evaluate.check_comparison))


def report_of(folder):
    return json.loads((folder / "evaluation.json").read_text())


def shots_of(before, edited, after, tmp_path, prompt="a cat"):
    """One open shot of three arrays."""
    files = [save(tmp_path / f"{k}.png", a) for k, a in enumerate((before, edited, after))]
    row = Result("", None, "a", None, prompt, files[1], files[0], files[2])
    return evaluate.open_shot(row, 0.1, CPU)


# --- figures against their libraries --------------------------------------------------------------


def pictures():
    """Pairs of pictures: noise, near, equal, photos, a flat one, one of odd size."""
    cat, coffee = (np.asarray(photo(name, (320, 224))) for name in ("chelsea0_R", "coffee0_R"))
    near = np.clip(cat.astype(int) + noise(2, cat.shape) // 32 - 4, 0, 255).astype(np.uint8)
    flat = np.full((48, 64, 3), 200, np.uint8)
    return {
        "noise": (noise(0), noise(1)),
        "near": (cat, near),
        "photos": (cat, coffee),
        "flat": (flat, flat + 1),
        "flat, noise": (flat, noise(0)),
        "odd": (noise(0, (11, 37, 3)), noise(1, (11, 37, 3))),
    }


@pytest.mark.parametrize("kind", sorted(pictures()))
def test_psnr_and_ssim_are_those_of_scikit_image(kind):
    a, b = pictures()[kind]
    psnr = skimage.metrics.peak_signal_noise_ratio(a / 255, b / 255, data_range=1)
    ssim = skimage.metrics.structural_similarity(
        a / 255,
        b / 255,
        data_range=1,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert evaluate.signal_to_noise(unit(a), unit(b)) == pytest.approx(psnr, abs=1e-4)
    assert evaluate.ssim(unit(a), unit(b)) == pytest.approx(ssim, abs=1e-6)


def test_equal_pictures_have_figures_that_json_can_hold():
    a = unit(noise(0))
    assert evaluate.signal_to_noise(a, a) == 100 and evaluate.ssim(a, a) == pytest.approx(1)


def test_a_picture_smaller_than_the_window_has_no_ssim():
    assert np.isnan(evaluate.ssim(*(unit(noise(k, (8, 8, 3))) for k in (0, 1))))


def test_half_of_the_change_has_gain_one_half_and_leaves_the_outside_alone(tmp_path):
    before = np.full((40, 60, 3), 50, np.uint8)
    after = before.copy()
    after[10:20, 10:40] = 150  # a ninth of the picture less a bit: 300 of 2400 pixels
    edited = ((before.astype(int) + after) // 2).astype(np.uint8)
    shot = shots_of(before, edited, after, tmp_path)
    figures = evaluate.region_figures(shot)
    assert figures["region_share"] == pytest.approx(300 / 2400)
    assert figures["error_outside"] == figures["change_outside"] == 0
    assert figures["error_inside"] == pytest.approx((50 / 255) ** 2, rel=1e-5)
    assert figures["change_inside"] == pytest.approx(50 / 255, rel=1e-5)
    assert figures["change"] == pytest.approx(50 / 255 * (300 / 2400) ** 0.5, rel=1e-5)
    for share, made in ((0, before), (0.5, edited), (1, after)):
        assert evaluate.gain(*map(unit, (made, before, after))) == pytest.approx(share, abs=1e-6)
    sideways = before.copy()
    sideways[30:] = 90  # a change that was not wanted is no gain
    assert evaluate.gain(*map(unit, (sideways, before, after))) == pytest.approx(0, abs=1e-6)
    assert np.isnan(evaluate.gain(*map(unit, (edited, before, before))))


def test_a_mask_says_where_the_edit_belongs(tmp_path):
    before, edited = noise(0), noise(0)
    edited[:, :32] = 255 - edited[:, :32]
    for name, array in (("before", before), ("edited", edited)):
        save(tmp_path / name / "a.png", array)
    mask = np.zeros((96, 128), np.uint8)  # twice the size: fitted to the edited picture
    mask[:, :64] = 255
    save(tmp_path / "mask" / "a.png", mask)
    flags = [f"--{k}_dir" for k in ("before", "edited", "mask")]
    paths = [tmp_path / k for k in ("before", "edited", "mask")]
    command = [part for pair in zip(flags, paths, strict=True) for part in pair]
    measure(*command, "--metrics", "region", "--output_dir", tmp_path / "out")
    means = report_of(tmp_path / "out")["columns"]["edited"]["means"]
    assert means["region_share"] == 0.5 and means["change_outside"] == 0
    wanted = np.sqrt(np.mean(((before[:, :32] / 127.5) - 1) ** 2))
    assert means["change_inside"] == pytest.approx(wanted, rel=1e-4)


# --- networks -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def networks(checkpoints, tmp_path_factory):
    """Folders of a CLIP and a DINOv2 of random weights."""
    place = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoints["sd"] / "tokenizer")
    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    width |= {"num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, **width}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = {"image_size": 32, "patch_size": 8, **width}
    clip = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    transformers.CLIPModel(clip).save_pretrained(place / "clip")
    tokenizer.save_pretrained(place / "clip")
    side = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessorPil(**side).save_pretrained(place / "clip")
    dino = transformers.Dinov2Config(image_size=28, patch_size=7, mlp_ratio=2, **width)
    transformers.Dinov2Model(dino).save_pretrained(place / "dino")
    side = {"size": {"shortest_edge": 30}, "crop_size": {"height": 28, "width": 28}}
    transformers.BitImageProcessorPil(**side).save_pretrained(place / "dino")
    for name, kind in (("clip", "CLIPImageProcessor"), ("dino", "BitImageProcessor")):
        file = place / name / "preprocessor_config.json"  # as the Hub has it
        file.write_text(json.dumps(json.loads(file.read_text()) | {"image_processor_type": kind}))
    return place


def direct_clip(folder, images, prompt):
    """(unit vectors of pictures, logits), by transformers alone."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    pixels = transformers.CLIPImageProcessorPil.from_pretrained(folder)(images, return_tensors="pt")
    tokens = transformers.AutoTokenizer.from_pretrained(folder)([prompt], return_tensors="pt")
    with torch.inference_mode():
        out = model(**pixels, **tokens)
    return out.image_embeds, out.logits_per_image[:, 0]


def test_clip_figures_are_transformers_own(networks, tmp_path):
    """A batch of two pictures of different sizes and prompts; the longer prompt is cut."""
    clip = evaluate.Clip(str(networks / "clip"), CPU)
    first = shots_of(noise(0), noise(1), noise(2), tmp_path / "1", "a cat")
    second = shots_of(*(noise(k, (70, 50, 3)) for k in (3, 4, 5)), tmp_path / "2", "the sky " * 40)
    got = evaluate.clip_figures([first, second], clip)
    before, edited, after = (Image.fromarray(noise(k)) for k in (0, 1, 2))
    (b, e, a), logits = direct_clip(networks / "clip", [before, edited, after], "a cat")
    assert got[0]["clip_image"] == pytest.approx((e @ a).item(), abs=1e-5)
    assert got[0]["clip_image_before"] == pytest.approx((e @ b).item(), abs=1e-5)
    assert got[0]["clip_text"] == pytest.approx((logits[1] - logits[0]).item(), abs=1e-4)
    direction = F.cosine_similarity(e - b, a - b, dim=0).item()
    assert got[0]["clip_direction"] == pytest.approx(direction, abs=1e-4)
    assert got[1].keys() == got[0].keys() and got[1]["clip_text"] != 0


def test_an_edit_that_is_the_after_points_the_right_way_and_none_points_nowhere(networks, tmp_path):
    clip = evaluate.Clip(str(networks / "clip"), CPU)
    right = shots_of(noise(0), noise(2), noise(2), tmp_path / "1")
    none = shots_of(noise(0), noise(0), noise(2), tmp_path / "2")
    right, none = evaluate.clip_figures([right, none], clip)
    assert right["clip_direction"] == pytest.approx(1, abs=1e-4)
    assert np.isnan(none["clip_direction"]) and none["clip_text"] == pytest.approx(0, abs=1e-4)


def test_dino_is_the_class_token(networks, tmp_path):
    dino = evaluate.Dino(str(networks / "dino"), CPU)
    (got,) = evaluate.dino_figures([shots_of(noise(0), noise(1), noise(2), tmp_path)], dino)
    model = transformers.Dinov2Model.from_pretrained(networks / "dino").eval()
    processor = transformers.BitImageProcessorPil.from_pretrained(networks / "dino")
    images = [Image.fromarray(noise(k)) for k in (0, 1, 2)]
    with torch.inference_mode():
        tokens = model(**processor(images, return_tensors="pt")).pooler_output
    b, e, a = F.normalize(tokens, dim=-1)
    assert got["dino"] == pytest.approx((e @ a).item(), abs=1e-5)
    assert got["dino_before"] == pytest.approx((e @ b).item(), abs=1e-5)


@pytest.mark.parametrize(
    "damage", ["other network", "weights missing", "no weights", "no words", "no processor"]
)
def test_a_network_that_is_not_whole_is_skipped_not_faked(damage, networks, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "clip"
    folder.mkdir()
    source = networks / ("dino" if damage == "other network" else "clip")
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if damage == "weights missing":
        weights = load_file(folder / "model.safetensors")
        del weights["visual_projection.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif damage == "no weights":
        (folder / "model.safetensors").unlink()
    elif damage == "no words":
        for file in folder.glob("*token*"):
            file.unlink()
    elif damage == "no processor":
        (folder / "preprocessor_config.json").unlink()
    wanted = {
        "other network": "dinov2",
        "weights missing": "visual_projection",
        "no words": "words",
    }.get(damage, "")
    with pytest.raises(evaluate.Skipped, match=f"{wanted}.*--clip_model"):
        evaluate.Clip(str(folder), CPU)


def test_lpips_orders_pictures_and_says_where_its_weights_go(tmp_path, monkeypatch):
    """Where torchvision is: AlexNet of random weights, in the place of the trained ones."""
    models = pytest.importorskip("torchvision.models")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    torch.manual_seed(0)
    (tmp_path / "checkpoints").mkdir()
    url = models.AlexNet_Weights.IMAGENET1K_V1.url
    torch.save(models.alexnet().state_dict(), tmp_path / "checkpoints" / url.rsplit("/", 1)[1])
    lpips = evaluate.load_lpips(CPU)
    a, b = unit(noise(0)), unit(noise(1))
    assert lpips(a, a) == 0 and lpips(a, b) == pytest.approx(lpips(b, a))
    assert 0 < lpips(a, (a + b) / 2) < lpips(a, b)
    assert np.isnan(lpips(a[:, :20], b[:, :20]))


# --- folders --------------------------------------------------------------------------------------


def mixtures(name, shares):
    """{share: picture} on the way from before to after, with a little noise of its own."""
    before = np.asarray(photo(f"{name}_R", (96, 64)), float)
    after = np.asarray(photo(f"{name}_T", (96, 64)), float)
    grain = np.random.default_rng(0).normal(0, 3, before.shape)
    return {
        share: np.clip(before + share * (after - before) + grain, 0, 255).round().astype(np.uint8)
        for share in shares
    }


PAIRED = [
    *("--before_dir", PAIRS, "--before_suffix", "_R"),
    *("--after_dir", PAIRS, "--after_suffix", "_T"),
]


@pytest.mark.parametrize("kind", ["table", "folder"])
def test_the_demos_results_are_ranked_true_after_lora_base(kind, tmp_path):
    """Names with _scale, afters with _T; from a folder of photos the names still end in _R."""
    for name in NAMES:
        before = PAIRS / f"{name}_R.png"
        made = mixtures(name, (0.05, 0.8))
        for scale, array in zip((0, 1), made.values(), strict=True):
            stem = name if kind == "table" else f"{name}_R"
            hashed = evaluate.hash_file(before)
            about = {"seed": 3, "times": scale, "prompt": "sunset"}
            about["images"] = [{"file": str(before), "blake2b": hashed}]
            save(tmp_path / "out" / f"{stem}_scale{scale}.png", array, about)
        save(tmp_path / "true" / f"{name}.png", photo(f"{name}_T", (96, 64)))
    save(tmp_path / "out" / "contact_sheet.png", noise(0))
    save(tmp_path / "out" / "sheet.png", noise(0), {"pictures": "123"})
    flags = PAIRED if kind == "folder" else [*PAIRED[4:], "--before_suffix", "_R"]
    done = run(
        "evaluate.py", "--results", tmp_path / "out", *flags, "--edited_dir",
        f"true={tmp_path / 'true'}", "--metrics", OFFLINE, "--html",
    )  # fmt: skip
    report = report_of(tmp_path / "out")
    assert report["ranking"]["by"] == "error_inside"
    page = (tmp_path / "out/evaluation.html").read_text()
    for name in NAMES:  # a view of each: before, the columns, after, with their figures
        assert f"{name}_R.png" in page and f"{name}_T." in page
    assert page.count("<section ") == len(NAMES)
    assert page.count("error_inside, ") == 3 * len(NAMES)
    order = [title.removeprefix("out ") for title in report["ranking"]["columns"]]
    assert order == ["true", "scale 1", "scale 0"]
    first = done.stdout.index("true"), done.stdout.index("scale 1"), done.stdout.index("scale 0")
    assert list(first) == sorted(first)
    errors = [report["columns"][c]["means"]["error_inside"] for c in report["ranking"]["columns"]]
    assert errors[0] < 1e-3 < errors[1] < errors[2] / 4
    assert {row["name"] for row in report["rows"]} == set(NAMES)
    edited = [row for row in report["rows"] if row["scale"] == 1]
    assert all(row["prompt"] == "sunset" and row["seed"] == 3 for row in edited)
    assert all(row["before"] == str(PAIRS / f"{row['name']}_R.png") for row in edited)
    assert all(row["figures"]["gain"] == pytest.approx(0.8, abs=0.02) for row in edited)
    with (tmp_path / "out/evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 and {row["column"] for row in rows} == set(report["columns"])
    assert float(rows[0]["psnr"]) == report["rows"][0]["figures"]["psnr"]
    assert Image.open(tmp_path / "out/evaluation.png").width > 600


def test_folders_side_by_side_are_compared_on_the_pictures_all_have(tmp_path, capsys):
    for name in NAMES:
        made = mixtures(name, (0.2, 0.9))
        for model, array in zip(("base", "lora"), made.values(), strict=True):
            if (model, name) != ("base", "hubble0"):
                save(tmp_path / model / f"{name}.png", array)
        save(tmp_path / "before" / f"{name}.png", photo(f"{name}_R"))
        save(tmp_path / "after" / f"{name}.jpg.png", noise(0))  # no partner
        save(tmp_path / "after" / f"{name}.png", photo(f"{name}_T"))
    measure(
        "--before_dir", tmp_path / "before", "--after_dir", tmp_path / "after",
        "--edited_dir", f"base={tmp_path / 'base'}", "--edited_dir", tmp_path / "lora",
        "--metrics", OFFLINE, "--output_dir", tmp_path / "figures",
    )  # fmt: skip
    report = report_of(tmp_path / "figures")
    assert report["ranking"]["columns"] == ["lora", "base"]
    assert {c: d["pictures"] for c, d in report["columns"].items()} == {"base": 2, "lora": 2}
    assert "1 picture(s) left out: their names are not in every column" in capsys.readouterr().out
    assert not (tmp_path / "base/evaluation.json").exists()


def test_the_tree_of_sliders_is_read_and_runs_are_columns(tmp_path):
    """JPEG comments hold the settings; scale 0 is the before; two runs, two seeds, three scales."""
    for run_name, times in (("v_full", 1.0), ("v_ablation", 0.5)):
        for seed in (6666, 6667):
            for scale in (0.0, 0.2, 1.2):
                array = noise(seed, (32, 32, 3)) // 2
                array[:16] += np.uint8(scale * times * 100)
                about = {"seed": seed, "position": scale, "prompt": "image of a person"}
                place = tmp_path / "age" / run_name / "origin" / str(seed)
                place.mkdir(parents=True, exist_ok=True)
                head = f"{seed}_age_skip14_500epoch"
                name = f"{head}_scale{scale:.2f}_image_of_a_person.jpg"
                comment = json.dumps(about).encode()
                image = Image.fromarray(array)
                image.save(place / name, quality=95, comment=comment)
                image.save(place.parent.parent / f"{head}_0.00-1.20_image_of_a_person.jpg")
    mask = np.zeros((32, 32), np.uint8)
    mask[:16] = 255
    for seed in (6666, 6667):
        save(tmp_path / "masks" / f"{seed}_image_of_a_person.png", mask)
    measure(
        "--results", tmp_path / "age", "--mask_dir", tmp_path / "masks",
        "--metrics", OFFLINE,
    )  # fmt: skip
    report = report_of(tmp_path / "age")
    full = [f"v_full/age_skip14_500epoch scale {s}" for s in ("0", "0.2", "1.2")]
    assert [c for c in report["columns"] if "full" in c] == full
    change = [report["columns"][c]["means"]["change_inside"] for c in full]
    assert change == pytest.approx([0, 20 / 255, 120 / 255], abs=0.01)
    assert {row["seed"] for row in report["rows"]} == {6666, 6667}
    assert all("scale0.00" in row["before"] for row in report["rows"])
    assert "after" in report["skipped"]["gain"] and report["ranking"]["by"] is None
    curve = report["curve"]
    assert (curve["strength"], curve["content"]) == ("change", "change_outside")
    assert len(curve["series"]) == 2 and all(len(p) == 3 for p in curve["series"].values())
    assert report["skipped"].keys() == {"gain", "lpips", "dino"} | {
        name for name in evaluate.METRICS if name.startswith("clip")
    }
    (matched,) = curve["matched"]  # as far as the weaker of the two goes
    assert matched["strength"] == pytest.approx(60 / 255 / 2**0.5, abs=0.01)


def test_seeds_are_told_apart_and_each_has_its_own_scale_0(tmp_path):
    for seed in (0, 1):
        for scale in ("-1", "0", "0.5"):
            save(tmp_path / f"a_seed{seed}_scale{scale}.png", noise(seed))
    for k, prompt in enumerate(("old", "young")):
        for scale in (0, 1):
            about = {"seed": 0, "position": scale, "prompt": prompt}
            save(tmp_path / f"prompts/b_prompt{k}_scale{scale}.png", noise(k), about)
    prompts, _, _ = evaluate.find_comparisons(Config(results=[str(tmp_path / "prompts")]))
    assert {r.name for r in prompts} == {"b"} and len({r.before for r in prompts}) == 2
    assert all(str(r.before)[:-5] == str(r.edited)[:-5] for r in prompts)
    (tmp_path / "prompts").rename(tmp_path / ".prompts")
    config = Config(results=[str(tmp_path)])
    rows, notes, problems = evaluate.find_comparisons(config)
    assert not notes and not problems
    assert [(r.scale, r.seed) for r in rows] == [(s, k) for s in (-1, 0, 0.5) for k in (0, 1)]
    assert {r.name for r in rows} == {"a"}
    assert all(r.before == tmp_path / f"a_seed{r.seed}_scale0.png" for r in rows)


def test_the_before_is_the_reference_unless_it_has_changed(tmp_path):
    reference = save(tmp_path / "a.png", noise(0))
    images = [{"file": str(reference), "blake2b": evaluate.hash_file(reference)}]
    assert evaluate.reference_of({"images": images}) == reference
    save(reference, noise(1))
    assert evaluate.reference_of({"images": images}) is None


def test_before_and_after_are_cut_to_the_edited_picture(tmp_path):
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 255  # the middle third is what a square shows
    edited = save(tmp_path / "e.png", np.full((20, 20, 3), 255, np.uint8))
    row = Result("", None, "a", None, None, edited, save(tmp_path / "b.png", wide))
    shot = evaluate.open_shot(row, 0.1, CPU)
    assert shot.images["before"].size == (20, 20) and shot.pixels["before"].min() == 1


# --- means, ranking, curve ------------------------------------------------------------------------


def columns_of(**curves):
    """{series: [(scale, strength, content)]} as means by column."""
    return {
        f"{name} scale {scale}": {
            "series": name,
            "scale": scale,
            "means": {"gain": strength, "change_outside": content},
        }
        for name, points in curves.items()
        for scale, strength, content in points
    }


def test_content_is_compared_at_the_same_strength():
    columns = columns_of(
        careful=[(0, 0.0, 0.0), (1, 0.5, 0.1), (2, 1.5, 0.3)], rough=[(0, 0.0, 0.0), (1, 0.8, 0.8)]
    )
    found = evaluate.curve(columns, None)
    assert found["strength"] == "gain" and found["content"] == "change_outside"
    (at,) = found["matched"]
    assert at["strength"] == pytest.approx(0.8)  # the largest that both reach
    assert at["content"] == pytest.approx({"careful": 0.1 + 0.3 * 0.2, "rough": 0.8})
    found = evaluate.curve(columns, [0.25, 1.0])
    assert [m["content"]["careful"] for m in found["matched"]] == pytest.approx([0.05, 0.2])
    assert found["matched"][0]["content"]["rough"] == pytest.approx(0.25)
    assert found["matched"][1]["content"]["rough"] is None  # not reached: not made up
    del columns["rough scale 0"], columns["rough scale 1"]
    assert evaluate.curve(columns, None)["matched"][0]["strength"] == 1


def test_means_leave_out_what_is_undefined():
    rows = [Result("", 1.0, name, 0, None, evaluate.Path(name)) for name in "ab"]
    columns = evaluate.means_by_column(rows, [{"psnr": 20.0, "ssim": 0.5}, {"psnr": 30.0}])
    assert columns["scale 1"]["means"] == {"psnr": 25.0, "ssim": 0.5}
    assert columns["scale 1"]["pictures"] == 2


def test_a_page_has_a_view_for_every_seed_and_prompt():
    def row(column, seed, prompt):
        scale = None if column == "true" else 1.0
        file = Path(f"{column}{seed}{prompt}.png")
        return evaluate.Result(column, scale, "a", seed, prompt, file, after=Path("after.png"))

    rows = [row("x", *view) for view in ((0, "snow"), (0, "rain"), (1, "snow"))]
    rows.append(row("true", None, None))
    views = evaluate.comparison_rows(rows, [{"psnr": float(n)} for n in range(4)], "psnr")
    assert [(view.seed, view.prompt) for view in views] == [(0, "snow"), (0, "rain"), (1, "snow")]
    for number, view in enumerate(views):
        assert list(view.columns) == ["x scale 1", "true", "after"]
        assert view.columns["x scale 1"] == rows[number].edited
        assert view.figures == {"psnr, x scale 1": number, "psnr, true": 3}


def test_ranking_takes_a_figure_that_all_have():
    means = [{"error_inside": 0.1, "psnr": 20}, {"psnr": 30}]
    columns = {name: {"means": m} for name, m in zip("ab", means, strict=True)}
    assert evaluate.rank(columns)["by"] == "psnr" and evaluate.rank(columns)["columns"] == [
        "b",
        "a",
    ]


# --- what is not there, and mistakes --------------------------------------------------------------


def test_a_metric_without_weights_is_skipped_with_its_reason(networks, tmp_path):
    for scale in (0, 1):
        about = {"seed": 0, "times": scale, "prompt": "a cat"}
        save(tmp_path / "out" / f"a_scale{scale}.png", noise(scale), about)
    save(tmp_path / "after" / "a.png", noise(2))
    done = run(
        "evaluate.py", "--results", tmp_path / "out", "--after_dir", tmp_path / "after",
        "--clip_model", networks / "clip", "--dino_model", "nobody/nothing",
        env={"HF_HUB_OFFLINE": "1", "TORCH_HOME": str(tmp_path)},
    )  # fmt: skip
    report = report_of(tmp_path / "out")
    assert report["skipped"].keys() <= {"dino", "lpips"} and "dino" in report["skipped"]
    assert "nobody/nothing" in report["skipped"]["dino"]
    assert "--dino_model" in report["skipped"]["dino"]
    assert done.stdout.count("skipped dino") == 1
    means = report["columns"]["scale 1"]["means"]
    assert {"clip_image", "clip_text", "clip_direction", "psnr", "gain"} <= means.keys()
    assert not {"dino", "dino_before"} & means.keys()
    if not evaluate.importlib.util.find_spec("torchvision"):
        assert "pip install torchvision" in report["skipped"]["lpips"] and "lpips" not in means


def test_mistakes_are_named_at_once(tmp_path):
    done = run(
        "evaluate.py", "--results", tmp_path / "none", "--after_dir", tmp_path / "nowhere",
        "--metrics", "ssm,psnr,beauty", "--device", "cuda:99", "--dino_model", "./no/such",
        "--batch_size", "0", check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for text in (
        f"no folder {tmp_path / 'none'}",
        f"no folder {tmp_path / 'nowhere'}",
        "no 'ssm', did you mean 'ssim'?",
        "no 'beauty', there are psnr, ssim",
        "cuda:99",
        "no folder ./no/such",
        "batch_size",
    ):
        assert text in done.stderr, text


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ([], "nothing to compare"),
        (["--edited_dir", "e"], "needs --after_dir or --before_dir"),
        (["--results", "r", "--after_suffix", "_T"], "--after_suffix belongs to --after_dir"),
        (["--edited_dir", "e", "--after_dir", "r"], "no after of that name (a); there is b_scale1"),
        (["--edited_dir", "e", "--after_dir", "e", "--after_suffix", "_X"], "name ends with _X"),
        (["--edited_dir", "e", "--edited_dir", "x/e"], "two folders are called e"),
        (["--results", "e"], "no result of generate.py"),
        (["--results", "two"], "no folder two"),
        (["--edited_dir", "bad", "--after_dir", "e"], "cannot be read"),
        (["--edited_dir", "twice", "--after_dir", "e"], "several pictures are called a"),
        (["--results", "r", "--output_dir", "e/a.png/x"], "results cannot be written"),
    ],
)
def test_a_mistake_is_told(flags, text, tmp_path, monkeypatch, capsys):
    save(tmp_path / "e/a.png", noise(0))
    save(tmp_path / "x/e/a.png", noise(0))
    save(tmp_path / "r/b_scale1.png", noise(0))
    save(tmp_path / "twice/a.png", noise(0))
    save(tmp_path / "twice/a.bmp", noise(0))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.png").write_bytes((tmp_path / "e/a.png").read_bytes()[:300])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(evaluate.UserError) as error:
        evaluate.load_config(Config, flags, evaluate.check_comparison)
    assert text in str(error.value)
