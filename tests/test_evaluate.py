"""evaluate.py: figures against their libraries and closed forms, folders of every layout."""

import csv
import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import skimage.metrics
import torch
import torch.nn.functional as F
import transformers
from conftest import PAIRS, ROOT, read_page, run
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import evaluate
from evaluate import Config, Metric, Result
from utils import UserError, hash_file, load_config, load_script, load_tool

OFFLINE = "psnr,ssim,region,gain"
NAMES = ("chelsea1", "coffee2", "hubble0")  # one after is a JPEG
CPU = torch.device("cpu")


def noise(seed, shape=(48, 64, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def photo(name, size=(96, 64)):
    file = next(PAIRS.glob(f"{name}.[pj][np]g"))
    return evaluate.ImageOps.fit(evaluate.open_rgb(file), size)


def save(path, array, name=None, **about):
    """A picture; with a name it is one that generate.py wrote."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"run": "", "scale": None, "seed": 0, "prompt": "", "images": [], **about}
    text = json.dumps({"name": name, **about} if name else None)
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    if path.suffix == ".jpg":
        image.save(path, quality=95, comment=text.encode())
    else:
        info = PngInfo()
        info.add_itxt("image_edit", text)
        image.save(path, pnginfo=info)
    return path


def unit(array):
    return evaluate.to_tensor(Image.fromarray(array), CPU)


def measure(*flags):
    """evaluate.py in this process; what its JSON holds."""
    config = load_config(Config, [str(flag) for flag in flags], evaluate.check_comparison)
    rows, notes, _ = evaluate.find_comparisons(config)
    evaluate.evaluate(config, rows, notes)
    return json.loads((evaluate.output_folder(config) / "evaluation.json").read_text())


# --- figures --------------------------------------------------------------------------------------


def test_psnr_and_ssim_are_those_of_scikit_image():
    cat, coffee = (np.asarray(photo(name, (320, 224))) for name in ("chelsea0_R", "coffee0_R"))
    near = np.clip(cat.astype(int) + noise(2, cat.shape) // 32 - 4, 0, 255).astype(np.uint8)
    flat = np.full((48, 64, 3), 200, np.uint8)
    odd = (noise(0, (11, 37, 3)), noise(1, (11, 37, 3)))
    how = {"data_range": 1, "channel_axis": -1, "gaussian_weights": True, "sigma": 1.5}
    for a, b in ((noise(0), noise(1)), (cat, near), (cat, coffee), (flat, flat + 1), odd):
        psnr = skimage.metrics.peak_signal_noise_ratio(a / 255, b / 255, data_range=1)
        ssim = skimage.metrics.structural_similarity(
            a / 255, b / 255, use_sample_covariance=False, **how
        )
        assert float(evaluate.psnr(unit(a), unit(b))) == pytest.approx(psnr, abs=1e-4)
        assert float(evaluate.ssim(unit(a), unit(b))) == pytest.approx(ssim, abs=1e-6)
    same, small = unit(cat), unit(noise(0, (8, 8, 3)))
    assert float(evaluate.psnr(same, same)) == 100  # JSON has no infinity
    assert float(evaluate.ssim(same, same)) == pytest.approx(1)
    assert np.isnan(evaluate.ssim(small, small))


def test_half_of_the_change_has_gain_one_half_and_leaves_the_outside_alone():
    before = np.full((40, 60, 3), 50, np.uint8)
    after, sideways = before.copy(), before.copy()
    after[10:20, 10:40] = 150  # 300 of 2400 pixels
    sideways[30:] = 90  # a change that was not wanted is no gain
    half = ((before.astype(int) + after) // 2).astype(np.uint8)

    def figures(edited, before=before, after=after):
        images = {"edited": edited, "before": before, "after": after}
        images = {kind: Image.fromarray(array) for kind, array in images.items()}
        inputs = evaluate.pixel_inputs(images, 0.1, CPU)
        return evaluate.figures_of(inputs, ["region", "gain"])

    found = figures(half)
    assert found.pop("error_outside") == found.pop("change_outside") == 0
    assert found == pytest.approx(
        {
            "error_inside": (50 / 255) ** 2,
            "region_share": 300 / 2400,
            "change": 50 / 255 * (300 / 2400) ** 0.5,
            "change_inside": 50 / 255,
            "gain": 0.5,
        }
    )
    gains = [figures(edited)["gain"] for edited in (before, after, sideways)]
    assert gains == pytest.approx([0, 1, 0], abs=1e-6)
    nothing = figures(half, after=before)  # no change is wanted: what is undefined is left out
    assert nothing.keys() == {"error_outside", "region_share", "change", "change_outside"}


def test_a_figure_and_its_before_are_of_different_pictures():
    inputs = {"edited": noise(0), "before": noise(1), "after": noise(0)}
    inputs = {kind: unit(array) for kind, array in inputs.items()}
    inputs |= {"lpips.edited": 0.0, "lpips.before": 0.2, "lpips.after": 0.1}
    found = evaluate.figures_of(inputs, ["lpips", "psnr", "ssim"])
    assert (found["lpips"], found["lpips_before"]) == (0.1, 0.2)
    assert found["psnr"] == 100 > found["psnr_before"] and found["ssim"] > found["ssim_before"]


def test_a_mask_says_where_the_edit_belongs(tmp_path):
    before, edited = noise(0), noise(0)
    edited[:, :32] = 255 - edited[:, :32]
    mask = np.zeros((96, 128), np.uint8)  # twice the size: fitted to the edited picture
    mask[:, :64] = 255
    flags = []
    for name, array in (("before", before), ("edited", edited), ("mask", mask)):
        save(tmp_path / name / "a.png", array)
        flags += [f"--{name}_dir", tmp_path / name]
    report = measure(*flags, "--metrics", "region", "--output_dir", tmp_path / "out")
    means = report["columns"]["edited"]["means"]
    assert means["region_share"] == 0.5 and means["change_outside"] == 0
    wanted = np.sqrt(np.mean(((before[:, :32] / 127.5) - 1) ** 2))
    assert means["change_inside"] == pytest.approx(wanted, rel=1e-4)


def test_before_and_after_are_cut_to_the_edited_picture(tmp_path):
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 255  # the middle third is what a square shows
    edited = save(tmp_path / "e.png", np.full((20, 20, 3), 255, np.uint8))
    row = Result("", None, "a", None, None, edited, save(tmp_path / "b.png", wide))
    before = np.asarray(evaluate.open_images(row)["before"])
    assert before.shape == (20, 20, 3) and before[:, 4:-4].min() > 250


def test_one_entry_is_all_that_a_metric_takes(tmp_path, monkeypatch, capsys):
    """It is asked for, printed, ranked by, and in all that is written."""
    metric = Metric(lambda edited: edited.mean(), "edited", 1, "mean of the picture, 0..1")
    monkeypatch.setitem(evaluate.METRICS, "brightness", metric)
    for level in (50, 200):
        save(tmp_path / f"{level}/a.png", np.full((20, 20, 3), level, np.uint8))
    folders = [x for level in (50, 200) for x in ("--edited_dir", tmp_path / str(level))]
    out = tmp_path / "out"
    report = measure(
        *folders, "--before_dir", tmp_path / "50", "--metrics", "brightness", "--output_dir", out
    )
    assert report["ranking"] == {"by": "brightness", "columns": ["200", "50"]}
    assert report["columns"]["200"]["means"] == pytest.approx({"brightness": 200 / 255})
    assert report["figures"]["brightness"]["text"] == "mean of the picture, 0..1"
    assert "brightness" in capsys.readouterr().out
    with (out / "evaluation.csv").open() as file:
        assert [float(row["brightness"]) for row in csv.DictReader(file)] == [
            pytest.approx(200 / 255),
            pytest.approx(50 / 255),
        ]


# --- networks -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Folders of a CLIP and a DINOv2 of random weights."""
    place = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    tokenizer = load_script(ROOT / "demo/rebuild.py").build_clip_tokenizer()
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


def figures_with(network, networks, pictures, prompts):
    """Figures of pictures, each {edited, before, after: array}, by a network of NETWORKS."""
    flag = f"{network}_model"
    config = Config(results=["r"], **{flag: str(networks / network)})
    images = [{kind: Image.fromarray(a) for kind, a in its.items()} for its in pictures]
    said = evaluate.NETWORKS[network](config, CPU)(images, prompts)
    inputs = [{f"{network}.{kind}": value for kind, value in its.items()} for its in said]
    return [evaluate.figures_of(its, config.metrics) for its in inputs]


def triple(before, edited, after, shape=(48, 64, 3)):
    seeds = {"edited": edited, "before": before, "after": after}
    return {kind: noise(seed, shape) for kind, seed in seeds.items()}


def test_clip_figures_are_transformers_own(networks):
    """Pictures of two sizes; a prompt that is too long is cut; without one there is no figure."""
    pictures = [triple(0, 1, 2), triple(3, 4, 5, (70, 50, 3)), triple(0, 2, 2), triple(0, 0, 2)]
    prompts = ["a cat", "the sky " * 40, None, "a cat"]
    got, long, right, none = figures_with("clip", networks, pictures, prompts)
    model = transformers.CLIPModel.from_pretrained(networks / "clip").eval()
    processor = transformers.CLIPImageProcessorPil.from_pretrained(networks / "clip")
    tokenizer = transformers.AutoTokenizer.from_pretrained(networks / "clip")
    images = [Image.fromarray(noise(k)) for k in (0, 1, 2)]
    with torch.inference_mode():
        out = model(
            **processor(images, return_tensors="pt"), **tokenizer(["a cat"], return_tensors="pt")
        )
    b, e, a = out.image_embeds
    assert got == pytest.approx(
        {
            "clip_image": (e @ a).item(),
            "clip_image_before": (e @ b).item(),
            "clip_text": (out.logits_per_image[1] - out.logits_per_image[0]).item(),
            "clip_direction": F.cosine_similarity(e - b, a - b, dim=0).item(),
        },
        abs=1e-4,
    )
    assert long.keys() == got.keys() and long["clip_text"] != 0
    assert "clip_text" not in right and right["clip_direction"] == pytest.approx(1, abs=1e-4)
    assert "clip_direction" not in none and none["clip_text"] == pytest.approx(0, abs=1e-4)


def test_dino_is_the_class_token(networks):
    (got,) = figures_with("dino", networks, [triple(0, 1, 2)], [None])
    model = transformers.Dinov2Model.from_pretrained(networks / "dino").eval()
    processor = transformers.BitImageProcessorPil.from_pretrained(networks / "dino")
    images = [Image.fromarray(noise(k)) for k in (0, 1, 2)]
    with torch.inference_mode():
        tokens = model(**processor(images, return_tensors="pt")).pooler_output
    b, e, a = F.normalize(tokens, dim=-1)
    assert got == pytest.approx({"dino": (e @ a).item(), "dino_before": (e @ b).item()}, abs=1e-5)


@pytest.mark.parametrize(
    "damage", ["other network", "weights missing", "no weights", "no words", "no processor"]
)
def test_a_network_that_is_not_whole_is_skipped_not_faked(damage, networks, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "clip"
    folder.mkdir()
    for file in (networks / ("dino" if damage == "other network" else "clip")).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if damage == "weights missing":
        weights = load_file(folder / "model.safetensors")
        del weights["visual_projection.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    lost = {"no weights": "model.safetensors", "no words": "*token*", "no processor": "prepro*"}
    for file in folder.glob(lost.get(damage, "nothing")):
        file.unlink()
    with pytest.raises(UserError, match="--clip_model"):
        evaluate.NETWORKS["clip"](Config(results=["r"], clip_model=str(folder)), CPU)


def test_lpips_orders_pictures(tmp_path, monkeypatch):
    """Where torchvision is: AlexNet of random weights, in the place of the trained ones."""
    models = pytest.importorskip("torchvision.models")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    torch.manual_seed(0)
    (tmp_path / "checkpoints").mkdir()
    name = evaluate.ALEXNET.rsplit("/", 1)[1]
    assert models.AlexNet_Weights.IMAGENET1K_V1.url == evaluate.ALEXNET
    torch.save(models.alexnet().state_dict(), tmp_path / "checkpoints" / name)
    lpips = evaluate.load_lpips(Config(results=["r"]), CPU)
    a, b = noise(0), noise(1)
    half = (a // 2 + b // 2).astype(np.uint8)
    images = {"edited": a, "before": b, "after": half}
    small = {kind: array[:20] for kind, array in images.items()}
    found, none = lpips(
        [{k: Image.fromarray(x) for k, x in its.items()} for its in (images, small)], [None, None]
    )
    assert found["edited"] == 0 < found["after"] < found["before"] and none == {}


# --- folders --------------------------------------------------------------------------------------


def mixtures(name, shares):
    """Pictures on the way from before to after, with a little noise of their own."""
    before, after = (np.asarray(photo(f"{name}_{end}"), float) for end in "RT")
    grain = np.random.default_rng(0).normal(0, 3, before.shape)
    made = (before + share * (after - before) + grain for share in shares)
    return [np.clip(array, 0, 255).round().astype(np.uint8) for array in made]


PAIRED = [
    *("--before_dir", PAIRS, "--before_suffix", "_R"),
    *("--after_dir", PAIRS, "--after_suffix", "_T"),
]


@pytest.mark.parametrize("kind", ["table", "folder"])
def test_the_demos_results_are_ranked_true_after_lora_base(kind, tmp_path, capsys):
    """Names as in the table; from a folder of photos they still end in _R."""
    for name in NAMES:
        before = PAIRS / f"{name}_R.png"
        images = [{"file": str(before), "blake2b": hash_file(before)}]
        own = name if kind == "table" else f"{name}_R"
        for scale, array in enumerate(mixtures(name, (0.05, 0.8))):
            about = {"scale": scale, "seed": 3, "prompt": "sunset", "images": images}
            save(tmp_path / "out" / f"{own}_scale{scale}.png", array, own, **about)
        save(tmp_path / "true" / f"{name}.png", photo(f"{name}_T"))
    save(tmp_path / "out" / "sheet.png", noise(0))
    flags = [*PAIRED[4:], "--before_suffix", "_R"] if kind == "table" else PAIRED
    flags = ["--results", tmp_path / "out", *flags, "--metrics", OFFLINE, "--html"]
    flags += ["--edited_dir", f"true={tmp_path / 'true'}"]
    if kind == "table":
        printed = run("evaluate.py", *flags).stdout
    else:
        measure(*flags)
        printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out/evaluation.json").read_text())
    ranking = report["ranking"]
    assert ranking["by"] == "error_inside"
    assert ranking["columns"] == ["true", "out scale 1", "out scale 0"]
    places = [printed.index(f"{column} ") for column in ranking["columns"]]
    assert places == sorted(places)
    errors = [report["columns"][column]["means"]["error_inside"] for column in ranking["columns"]]
    assert errors[0] < 1e-3 < errors[1] < errors[2] / 4
    assert {row["name"] for row in report["rows"]} == set(NAMES)
    for row in report["rows"]:
        if row["scale"] == 1:
            assert row["prompt"] == "sunset" and row["seed"] == 3
            assert row["before"] == str(PAIRS / f"{row['name']}_R.png")
            assert row["figures"]["gain"] == pytest.approx(0.8, abs=0.02)
    with (tmp_path / "out/evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 and {row["column"] for row in rows} == set(report["columns"])
    assert float(rows[0]["psnr"]) == report["rows"][0]["figures"]["psnr"]
    assert Image.open(tmp_path / "out/evaluation.png").width > 600
    views = read_page(tmp_path / "out/evaluation.html")
    assert [name for name, _ in views] == list(NAMES)
    for _, files in views:
        assert list(files) == ["before", "out scale 0", "out scale 1", "true", "after"]
    text = (tmp_path / "out/evaluation.html").read_text()
    assert "<title>evaluation of out</title>" in text
    # each view opens on before and the best result, not on the after
    pairs = re.findall("<p><b>(.*?)</b> <b>(.*?)</b></p>", text)
    assert pairs == [("before", "true")] * len(NAMES)


def test_folders_side_by_side_are_compared_on_the_pictures_all_have(tmp_path):
    for name in NAMES:
        for model, array in zip(("base", "lora"), mixtures(name, (0.2, 0.9)), strict=True):
            if (model, name) != ("base", "hubble0"):
                save(tmp_path / model / f"{name}.png", array)
        save(tmp_path / "before" / f"{name}.png", photo(f"{name}_R"))
        save(tmp_path / "after" / f"{name}.jpg.png", noise(0))  # no partner
        save(tmp_path / "after" / f"{name}.png", photo(f"{name}_T"))
    report = measure(
        "--before_dir", tmp_path / "before", "--after_dir", tmp_path / "after",
        "--edited_dir", f"base={tmp_path / 'base'}", "--edited_dir", tmp_path / "lora",
        "--metrics", OFFLINE, "--output_dir", tmp_path / "figures",
    )  # fmt: skip
    assert report["ranking"]["columns"] == ["lora", "base"]
    assert {c: d["pictures"] for c, d in report["columns"].items()} == {"base": 2, "lora": 2}
    assert len(report["notes"]) == 1
    assert not (tmp_path / "base/evaluation.json").exists()


def test_the_tree_of_sliders_is_read_and_runs_are_columns(tmp_path):
    """JPEG comments hold the settings; scale 0 is the before; two runs, two seeds, three scales."""
    for run_name, times in (("full", 1.0), ("ablation", 0.5)):
        for seed in (6666, 6667):
            for scale in (0.0, 0.2, 1.2):
                array = noise(seed, (32, 32, 3)) // 2
                array[:16] += np.uint8(scale * times * 100)
                place = tmp_path / "age" / run_name / str(seed)
                about = {"run": f"age/{run_name}", "scale": scale, "seed": seed, "prompt": "eyes"}
                save(place / f"scale{scale:.2f}.jpg", array, f"{seed}_eyes", **about)
                save(place.parent / f"{seed}_0.00-1.20.jpg", array)  # a sheet
    mask = np.zeros((32, 32), np.uint8)
    mask[:16] = 255
    for seed in (6666, 6667):
        save(tmp_path / "masks" / f"{seed}_eyes.png", mask)
    flags = ["--mask_dir", tmp_path / "masks", "--metrics", OFFLINE]
    report = measure("--results", tmp_path / "age", *flags)
    full = [f"age/full scale {scale}" for scale in ("0", "0.2", "1.2")]
    assert [column for column in report["columns"] if "full" in column] == full
    change = [report["columns"][column]["means"]["change_inside"] for column in full]
    assert change == pytest.approx([0, 20 / 255, 120 / 255], abs=0.01)
    assert all("scale0.00" in row["before"] for row in report["rows"])
    assert report["ranking"]["by"] is None
    assert report["skipped"].keys() == {"gain", "lpips", "dino"} | {
        name for name in evaluate.METRICS if name in ("clip_image", "clip_text", "clip_direction")
    }
    curve = report["curve"]
    assert (curve["strength"], curve["content"]) == ("change", "change_outside")
    assert len(curve["series"]) == 2 and all(len(p) == 3 for p in curve["series"].values())
    (matched,) = curve["matched"]  # as far as the weaker of the two goes
    assert matched["strength"] == pytest.approx(60 / 255 / 2**0.5, abs=0.01)
    alone = measure("--results", tmp_path / "age/full", *flags)
    assert list(alone["columns"]) == ["scale 0", "scale 0.2", "scale 1.2"]  # one run is no series


def test_seeds_and_prompts_are_told_apart_and_each_has_its_own_scale_0(tmp_path):
    for seed, prompt in ((0, "old"), (1, "old"), (0, "young")):
        for scale in (-1, 0, 0.5):
            about = {"scale": scale, "seed": seed, "prompt": prompt}
            save(tmp_path / f"{prompt}{seed}_scale{scale}.png", noise(seed), "a", **about)
    rows, notes, problems = evaluate.find_comparisons(Config(results=[str(tmp_path)]))
    assert len(rows) == 9 and not notes and not problems
    assert [row.scale for row in rows] == [-1] * 3 + [0] * 3 + [0.5] * 3
    assert all(row.before == tmp_path / f"{row.prompt}{row.seed}_scale0.png" for row in rows)


def test_the_before_is_the_reference_unless_it_has_changed(tmp_path):
    reference = save(tmp_path / "a.png", noise(0))
    images = [{"file": str(reference), "blake2b": hash_file(reference)}]
    assert evaluate.reference_of({"images": images}) == reference
    save(reference, noise(1))
    evaluate.hash_of.cache_clear()  # another run
    assert evaluate.reference_of({"images": images}) is None


# --- means, ranking, curve, page ------------------------------------------------------------------


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
    for column in columns.values():  # of a cosine, what it lacks of 1
        column["means"]["dino_before"] = 1 - column["means"].pop("change_outside")
    found = evaluate.curve(columns, None)
    assert found["content"] == "dino_before"
    contents = [point["content"] for point in found["series"]["careful"]]
    assert contents == pytest.approx([0.0, 0.1, 0.3])


def test_means_and_ranking_leave_out_what_is_undefined():
    figures = {"a": {"psnr": 20.0, "ssim": 0.5}, "b": {"psnr": 30.0}}
    rows = [Result("", 1.0, n, 0, None, Path(n), figures=f) for n, f in figures.items()]
    columns = evaluate.means_by_column(rows)
    assert columns["scale 1"]["means"] == {"psnr": 25.0, "ssim": 0.5}
    assert columns["scale 1"]["pictures"] == 2
    means = {"a": {"error_inside": 0.1, "psnr": 20}, "b": {"psnr": 30}}
    ranking = evaluate.rank({name: {"means": mean} for name, mean in means.items()})
    assert ranking == {"by": "psnr", "columns": ["b", "a"]}  # both have it


def test_a_name_is_the_same_in_every_unicode_form(tmp_path):
    """As file systems of a Mac write it (NFD), and as it is typed (NFC)."""
    typed, stored = (unicodedata.normalize(form, "café 雪") for form in ("NFC", "NFD"))
    save(tmp_path / "out/1.png", noise(0), stored, scale=1, prompt=f"make it {typed}")
    save(tmp_path / f"before/{stored}.png", noise(1))
    save(tmp_path / f"after/{typed}.png", noise(2))
    places = ["--before_dir", tmp_path / "before", "--after_dir", tmp_path / "after"]
    measure("--results", tmp_path / "out", *places, "--metrics", "psnr", "--html")
    page = tmp_path / "out/evaluation.html"
    [(name, files)] = read_page(page)
    assert name == typed and list(files) == ["before", "scale 1", "after"]
    assert f"make it {typed} <span>" in page.read_text(encoding="utf-8")


def test_a_page_has_a_view_for_every_seed_and_prompt():
    def row(series, seed, prompt, value):
        scale, file = None if series == "true" else 1.0, Path(f"{series}{seed}{prompt}.png")
        figures, after = {"psnr": value}, Path("after.png")
        return Result(series, scale, "a", seed, prompt, file, after=after, figures=figures)

    rows = [row("x", *view) for view in ((0, "snow", 0), (0, "rain", 1), (1, "snow", 2))]
    views = load_tool("page").views_of
    ranking = {"by": "psnr", "columns": ["true", "x scale 1"]}
    views = views([*rows, row("true", None, None, 3)], ranking)
    assert [(view.seed, view.prompt) for view in views] == [(0, "snow"), (0, "rain"), (1, "snow")]
    for number, view in enumerate(views):
        assert list(view.columns) == ["x scale 1", "true", "after"]
        assert view.columns["x scale 1"] == rows[number].edited
        assert view.right == "true"
        assert view.figures == {"psnr, x scale 1": number, "psnr, true": 3}


# --- what is not there, and mistakes --------------------------------------------------------------


def test_a_metric_without_weights_is_skipped_with_its_reason(networks, tmp_path, monkeypatch):
    for scale in (0, 1):
        about = {"scale": scale, "prompt": "a cat"}
        save(tmp_path / f"out/a_scale{scale}.png", noise(scale), "a", **about)
    save(tmp_path / "after" / "a.png", noise(2))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    report = measure(
        "--results", tmp_path / "out", "--after_dir", tmp_path / "after",
        "--clip_model", networks / "clip", "--dino_model", "nobody/nothing",
    )  # fmt: skip
    assert "dino" in report["skipped"].keys() <= {"dino", "lpips"}
    assert "nobody/nothing" in report["skipped"]["dino"]
    means = report["columns"]["scale 1"]["means"]
    assert {"clip_image", "clip_text", "clip_direction", "psnr", "gain"} <= means.keys()
    assert not {"dino", "dino_before"} & means.keys()


def test_wrong_settings_are_named_at_once(tmp_path):
    flags = ["--edited_dir", "a", "--after_suffix", "_T", "--dino_model", "./no/such"]
    done = run("evaluate.py", *flags, "--metrics", "ssm,psnr,beauty", check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for text in ("'ssm', did you mean 'ssim'", "'beauty'", "./no/such", "--after_dir"):
        assert text in done.stderr, text


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], ["nothing to compare"]),
        (["--batch_size", "0", "--region_threshold", "2"], ["batch_size", "region_threshold"]),
        (["--edited_dir", "e"], ["--after_dir or --before_dir"]),
        (["--results", "r", "--after_suffix", "_T"], ["--after_suffix belongs to --after_dir"]),
        (["--edited_dir", "e", "--edited_dir", "x/e", "--after_dir", "e"], ["two folders", " e;"]),
        (["--edited_dir", "e", "--after_dir", "r"], ["no after of that name (a)", "b_scale1"]),
        (["--edited_dir", "e", "--after_dir", "e", "--after_suffix", "_X"], ["_X"]),
        (["--results", "e"], ["e: nothing of generate.py", "--edited_dir"]),
        (["--results", "r", "--device", "cuda:99"], ["cuda:99"]),
        (
            ["--results", "two", "--after_dir", "none"],
            ["two: no such folder", "none: no such folder"],
        ),
        (["--edited_dir", "bad", "--after_dir", "e"], ["bad/a.png"]),
        (["--edited_dir", "twice", "--after_dir", "e"], ["several pictures are called a"]),
        (["--results", "r", "--output_dir", "e/a.png/x"], ["cannot write"]),
    ],
)
def test_a_mistake_is_told(flags, named, tmp_path, monkeypatch):
    for file in ("e/a.png", "x/e/a.png", "twice/a.png", "twice/a.bmp", "bad/a.png"):
        save(tmp_path / file, noise(0))
    save(tmp_path / "r/b_scale1.png", noise(0), "b", scale=1)
    (tmp_path / "bad/a.png").write_bytes((tmp_path / "e/a.png").read_bytes()[:300])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        load_config(Config, flags, evaluate.check_comparison)
    for text in named:
        assert text in str(error.value)
