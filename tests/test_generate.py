"""generate.py: what is drawn where, settings in pictures, forks; edits equal the trainer's own."""

import json
import re
import sys
from unittest.mock import ANY

import diffusers
import numpy as np
import pytest
import torch
from conftest import PAIRS, ROOT, read_page, run, small_config, with_lora_noise, write_config
from PIL import Image
from safetensors.torch import load_file, save_file

import generate
import train_qwen_edit as script
from utils import UserError, load_config

QUICK = ["--num_inference_steps", 2, "--true_cfg_scale", 1]
SMALL = ["--width", 64, "--height", 64, "--reference_area", "target"]
REFERENCE = PAIRS / "chelsea1_R.png"


def trained(checkpoints, folder, **changes):
    """(trainer, file): a LoRA at 64 px, by default with references at target size."""
    settings = small_config(checkpoints["2511"], folder, **changes)
    argv = ["--config", str(write_config(folder, settings))]
    trainer = script.QwenImageEditTrainer(load_config(script.Config, argv))
    trainer.setup_accelerator()
    trainer.find_data()
    trainer.set_lora()
    with_lora_noise(trainer.transformer)
    return trainer, trainer.save_lora(folder / "lora.safetensors")


@pytest.fixture(scope="session")
def lora(checkpoints, tmp_path_factory):
    settings = {"model.lora.lora_alpha": 8.0}
    return trained(checkpoints, tmp_path_factory.mktemp("lora"), **settings)


@pytest.fixture
def call(call_generate):
    """call(model, *arguments) -> as call_generate."""
    name = "--pretrained_model_name_or_path"
    return lambda model, *args, check=True: call_generate(name, model, *args, check=check)


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


# --- one picture, many pictures -------------------------------------------------------------------


def test_one_picture_says_what_it_is_and_is_not_made_twice(lora, checkpoints, tmp_path):
    """As a command; the settings are the whole config, so one that changes makes a new picture."""
    output = tmp_path / "out" / "a.png"
    model = ["generate.py", "--pretrained_model_name_or_path", checkpoints["2511"]]
    command = [*model, "--lora", f"{lora[1]}:0.5", "--image", REFERENCE, "--seed", 7]
    command += ["--prompt", "make it: blue", "--output", output, *QUICK]
    run(*command)
    picture = Image.open(output)
    assert picture.size == script.nearest_bucket(320, 224, 64)  # the LoRA's training size
    about = json.loads(picture.info["image_edit"])
    assert (about["name"], about["run"], about["scale"], about["seed"]) == ("a", "", 1, 7)
    assert about["prompt"] == "make it: blue" and about["images"][0]["file"] == str(REFERENCE)
    assert about["settings"]["loras"][0]["scale"] == 0.5
    assert about["settings"]["reference_area"] == "target"
    written = output.stat().st_mtime_ns
    assert "1 already there" in run(*command).stdout and output.stat().st_mtime_ns == written
    command[command.index(7)] = 8
    run(*command)
    assert output.stat().st_mtime_ns != written


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (generate.EditPainter, {"negative_prompt": "x", "true_cfg_scale": 2.0, "dtype": "bf16"}),
        (generate.SliderPainter, {"guidance_scale": 1.0, "base_model_precision": "int8-quanto"}),
        (generate.ChangePainter, {"inversion": "ddim", "skip": 0.5, "restore_detail": True}),
    ],
)
def test_no_setting_can_reuse_a_stale_picture(kind, changes, tmp_path):
    """Every setting that is no path and no place is in the picture's settings."""
    settings = {"pretrained_model_name_or_path": "x", "output": "o.png", "lora": ["l.safetensors"]}
    settings |= {"image": ["photo.png"], "device": "cpu"}
    module = generate.utils.load_script(ROOT / kind.script_name)
    strip = generate.Strip("o", "a", 0, (64, 64), (1.0,), ())

    def of(**given):
        config = kind.config_class.model_validate(settings | given)
        return generate.picture_settings(kind(config, module), strip, 1.0)["settings"]

    usual = of()
    fields = kind.config_class.model_fields.keys() - generate.JobsConfig.model_fields.keys()
    assert fields - {"mask", "inversion_lora", "offload", "allow_pickle"} <= usual.keys()
    for name, value in changes.items():
        assert of(**{name: value}) != usual, name
    assert of(html=True, output="p.png") == usual


def test_generated_pixels_are_the_trainers(lora, make_trainer, checkpoints, call, tmp_path):
    """generate.py on the stock pipeline = the trainer's own sampling, 2-D VAE and all."""
    file = lora[1]
    trainer = make_trainer(**{"model.lora.pretrained_weight": str(file)})
    trainer.setup_accelerator()
    trainer.find_data()
    image = PAIRS / "hubble0_R.png"
    command = ["--lora", file, "--image", image, "--prompt", "a duotone", "--seed", 42, *QUICK]
    call(checkpoints["2511"], *command, "--output", tmp_path / "a.png")
    trainer.setup_predict()
    with Image.open(image) as picture:
        ours = trainer.predict(picture.convert("RGB"), "a duotone", None, 2, 1.0, seed=42)
    theirs = pixels(tmp_path / "a.png")
    assert ours.shape == theirs.shape and np.abs(ours.astype(int) - theirs).max() <= 1


def test_a_strip_over_scales_starts_at_the_base(lora, checkpoints, call, tmp_path):
    command = ["--lora", lora[1], "--scales", "0,0.5,1", "--output", tmp_path / "s.png"]
    command += ["--image", REFERENCE, "--prompt", "blue", *QUICK]
    call(checkpoints["2511"], *command)
    rows = [pixels(tmp_path / f"s_scale{scale}.png") for scale in ("0", "0.5", "1")]
    change = [np.abs(row - rows[0]).mean() for row in rows]
    assert Image.open(tmp_path / "s.png").width == 4 * 264 + 8
    assert 0 == change[0] < change[1] < change[2]


def test_several_loras_add_up_and_several_references_count(lora, checkpoints, call, tmp_path):
    one = ["--image", REFERENCE, "--prompt", "blue", *QUICK, *SMALL]
    two = ["--image", PAIRS / "coffee0_R.png", *one]
    twice = ["--lora", f"{lora[1]}:0.25", f"{lora[1]}:0.75"]
    for name, case in {"1": [*one, "--lora", lora[1]], "2": [*twice, *one]}.items():
        call(checkpoints["2511"], *case, "--output", tmp_path / f"{name}.png")
    call(checkpoints["2511"], "--lora", lora[1], *two, "--output", tmp_path / "3.png")
    one, both, more = (pixels(tmp_path / f"{i}.png") for i in (1, 2, 3))
    assert np.abs(one - both).max() <= 1 and np.abs(one - more).max() > 1


def test_lokr_files_act_alone_and_beside_a_lora(lora, checkpoints, tmp_path):
    trainer, _ = trained(checkpoints, tmp_path, **{"model.lora.method": "lokr"})
    for parameter in trainer.trainable():
        parameter.data += 0.1
    file = trainer.save_lora(tmp_path / "lokr.safetensors")
    settings = {"pretrained_model_name_or_path": str(checkpoints["2511"]), "device": "cpu"}
    settings |= {"image": [REFERENCE], "output": tmp_path / "o.png"}
    config = generate.EditConfig(**settings, lora=[str(lora[1]), str(file)])
    painter = generate.EditPainter(config, script)
    painter.load(["x"])
    layer = painter.pipeline.transformer.get_submodule("transformer_blocks.0.attn.to_q")
    x = torch.randn(1, 3, layer.in_features)

    @torch.no_grad()
    def output(*scales, times=1.0):
        painter.set_scales([generate.Lora(file, scale) for scale in scales], times)
        return layer(x)

    base = output(1, 1, times=0.0)
    one, other = output(1, 0) - base, output(0, 1) - base
    assert one.norm() > 0.1 and other.norm() > 0.1
    torch.testing.assert_close(output(1, 1) - base, one + other, atol=1e-5, rtol=0)
    torch.testing.assert_close(output(1, 1, times=0.5) - base, (one + other) / 2, atol=1e-5, rtol=0)


def renamed(start="transformer.", down=".lora_A.weight", up=".lora_B.weight", dots="."):
    """How another program would call a tensor of ours."""

    def rename(name):
        layer, end = re.split(r"(?=\.lora_)", name.removeprefix("transformer."))
        return start + layer.replace(".", dots) + {".lora_A.weight": down}.get(end, up)

    return rename


KOHYA = {"down": ".lora_down.weight", "up": ".lora_up.weight"}
NAMES = {
    "bare": renamed(""),
    "PEFT": renamed("base_model.model."),
    "with the adapter's name": renamed(down=".lora_A.default.weight", up=".lora_B.default.weight"),
    "down and up": renamed(**KOHYA),
    "bare down and up": renamed("", **KOHYA),
    "old diffusers": renamed(down=".lora.down.weight", up=".lora.up.weight"),
    "ComfyUI": renamed("diffusion_model."),
    "kohya": renamed("lora_unet_", dots="_", **KOHYA),
    "OneTrainer": renamed("lora_transformer_", dots="_", **KOHYA),
    "LyCORIS": renamed("lycoris_", dots="_", **KOHYA),
    "unknown": renamed("model.x."),
    "text encoder": renamed("text_encoder."),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("alpha", [False, True])
def test_names_of_other_programs_mean_the_same_or_are_refused(
    name, alpha, lora, checkpoints, tmp_path
):
    tensors = {NAMES[name](key): tensor for key, tensor in load_file(lora[1]).items()}
    if alpha:  # twice the strength
        downs = {key: t for key, t in tensors.items() if re.search("lora_A|down", key)}
        ends = r"\.lora_(A|down).*|\.lora\.down.*"
        tensors |= {re.sub(ends, ".alpha", k): torch.tensor(2.0 * len(t)) for k, t in downs.items()}
    save_file(tensors, tmp_path / "other.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 4}')  # of PEFT
    settings = {"pretrained_model_name_or_path": str(checkpoints["2511"]), "device": "cpu"}
    settings |= {"image": [REFERENCE], "output": tmp_path / "o.png"}
    deltas = []
    for file in (tmp_path / "other.safetensors", lora[1]):
        painter = generate.EditPainter(generate.EditConfig(**settings, lora=[str(file)]), script)
        strip = generate.Strip("o", "a", 0, (64, 64), (1.0,), (), loras=tuple(painter.loras))
        if name in ("unknown", "text encoder") and file != lora[1]:
            assert "no part of a LoRA" in "".join(painter.problems([strip]))
            return
        assert painter.problems([strip]) == []
        painter.load(["x"])
        layers = painter.pipeline.transformer.named_modules()
        deltas.append({n: m.get_delta_weight("lora0") for n, m in layers if hasattr(m, "lora_A")})
    assert deltas[0].keys() == deltas[1].keys()
    for layer, delta in deltas[1].items():
        torch.testing.assert_close(deltas[0][layer], delta * (2 if alpha else 1))


@pytest.mark.parametrize("change", ["names", "shapes"])
def test_a_lora_that_does_not_fit_says_what_it_was_trained_on(change, lora, checkpoints, tmp_path):
    tensors = load_file(lora[1])
    if change == "names":
        tensors = {f"other.{name}": tensor for name, tensor in tensors.items()}
    else:
        tensors = {n: t.repeat(1, 1 + ("lora_A" in n)) for n, t in tensors.items()}
    about = {"image_edit_lora": json.dumps({"base_model": "somebody/another-base"})}
    save_file(tensors, tmp_path / "other.safetensors", about)
    settings = {"pretrained_model_name_or_path": str(checkpoints["2511"]), "device": "cpu"}
    settings |= {"image": [REFERENCE], "output": tmp_path / "o.png", "prompt": "a"}
    settings |= {"lora": [str(tmp_path / "other.safetensors")]}
    painter = generate.EditPainter(generate.EditConfig(**settings), script)
    strip = generate.Strip("o", "a", 0, (64, 64), (1.0,), (), loras=tuple(painter.loras))
    assert "it was trained on somebody/another-base" in "".join(painter.problems([strip]))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "folder"])
def test_many_rows_skip_what_is_done_and_end_in_a_contact_sheet(kind, checkpoints, call, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for name in ("coffee0", "hubble0"):
        Image.open(PAIRS / f"{name}_R.png").resize((64, 64)).save(photos / f"{name}.png")
        (photos / f"{name}.txt").write_text("blue")
    source = ["--input_dir", photos]
    if kind != "folder":
        source = ["--table", tmp_path / f"t.{kind}"]
        rows = [{"images": [f"photos/{n}.png"], "name": n} for n in ("coffee0", "hubble0")]
        lines = [json.dumps(row | {"prompt": "blue"}) for row in rows]
        if kind == "csv":
            named = [f"{r['images'][0]},blue,{r['name']},3" for r in rows]
            lines = ["images,prompt,name,seed", *named]
        source[1].write_text("\n".join(lines))
    command = [checkpoints["2509"], *source, "--output_dir", out, *SMALL, *QUICK]
    call(*command)
    assert {p.name for p in out.iterdir()} == {"coffee0.png", "hubble0.png", "contact_sheet.png"}
    about = generate.read_settings(out / "coffee0.png")
    assert about["prompt"] == "blue" and about["seed"] == (3 if kind == "csv" else 0)
    kept = (out / "hubble0.png").stat().st_mtime_ns
    (out / "coffee0.png").unlink()
    assert "2 picture(s), 1 already there" in call(*command, "--html")
    assert (out / "hubble0.png").stat().st_mtime_ns == kept and (out / "coffee0.png").exists()
    for name, files in read_page(out / "page.html"):
        assert files == {"before": photos / f"{name}.png", "scale 0": out / f"{name}.png"}


def test_a_text_of_several_lines_stays_whole(tmp_path):
    """As Excel and JSON write it; a comma without quotes is named."""
    table = tmp_path / "t.csv"
    table.write_text('image,prompt\na.png,"make it snow\nand rain"\nb.png,one, two\n')
    [row], problems = generate.read_jobs(table)
    (tmp_path / "large.csv").write_text(
        f"image,prompt\na.png,{'x' * 2**18}\n"
    )  # for the csv module
    assert generate.read_jobs(tmp_path / "large.csv") == ([], [ANY])
    assert row["prompt"] == "make it snow\nand rain"
    assert len(problems) == 1 and "quote" in problems[0] and "row 2" in problems[0]
    lines = json.dumps({"image": "a.png", "prompt": "one\u2028two"}, ensure_ascii=False)
    (tmp_path / "t.jsonl").write_text(lines, encoding="utf-8")
    assert generate.read_jobs(tmp_path / "t.jsonl")[0][0]["prompt"] == "one\u2028two"


def test_rows_may_have_different_numbers_of_references(checkpoints, call, tmp_path):
    images = [[str(REFERENCE)], [str(REFERENCE), str(PAIRS / "coffee0_R.png")]]
    rows = [json.dumps({"images": its, "prompt": "x", "name": f"n{len(its)}"}) for its in images]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    command = ["--table", tmp_path / "t.jsonl", "--output_dir", tmp_path / "out", *SMALL, *QUICK]
    call(checkpoints["2511"], *command, "--html")
    columns = [list(files) for _, files in read_page(tmp_path / "out/page.html")]
    assert columns == [["before", "scale 0"], ["reference 1", "reference 2", "scale 0"]]
    assert Image.open(tmp_path / "out/contact_sheet.png").width == 3 * 264 + 8


def test_no_torch_generator_but_the_seed_decides(checkpoints, call, tmp_path):
    command = ["--image", REFERENCE, "--prompt", "blue", *SMALL, *QUICK, "--seed", "1,2"]
    command += ["--output", tmp_path / "a.png"]
    call(checkpoints["2511"], *command)
    first, second = (pixels(tmp_path / f"a_seed{seed}.png") for seed in (1, 2))
    assert (first != second).any() and Image.open(tmp_path / "a.png").height > 2 * 256
    torch.manual_seed(99)
    (tmp_path / "a_seed1.png").unlink()
    call(checkpoints["2511"], *command)
    assert (pixels(tmp_path / "a_seed1.png") == first).all()


def test_2508_runs_with_one_reference(checkpoints, call, tmp_path):
    command = ["--image", REFERENCE, "--prompt", "blue", "--width", 96, "--height", 64, *QUICK]
    command += ["--reference_area", 64 * 64, "--output", tmp_path / "a.png"]
    call(checkpoints["2508"], *command)
    assert Image.open(tmp_path / "a.png").size == (96, 64)
    two = call(checkpoints["2508"], "--image", PAIRS / "coffee0_R.png", *command, check=False)
    assert "takes 1 reference(s) at most" in two


def test_a_prompt_alone_is_drawn_as_it_is_trained(lora, make_trainer, checkpoints, call, tmp_path):
    """Text to image with the template of Edit-Plus; 2508, whose template has a slot, says no."""
    command = [
        "--lora",
        lora[1],
        "--prompt",
        "a blue cat",
        "--negative_prompt",
        "grey",
        "--seed",
        4,
    ]
    command += ["--num_inference_steps", 2, "--true_cfg_scale", 3, "--output", tmp_path / "a.png"]
    assert "text to image" in call(checkpoints["2511"], *command)
    trainer = make_trainer(**{"model.lora.pretrained_weight": str(lora[1])})
    trainer.setup_predict()
    flat = script.Picture(Image.new("RGB", (64, 64)), "x", (64, 64))
    example = script.Example("", "a blue cat", {"pixel": (flat,), "control": (), "vision": ()})
    how = {"num_inference_steps": 2, "true_cfg_scale": 3, "negative_prompt": "grey", "seed": 4}
    ours = script.draw_edit(trainer, example, script.SamplingConfig(**how), trainer.encode)
    drawn = pixels(tmp_path / "a.png")
    assert np.abs(np.asarray(ours).astype(int) - drawn).max() <= 1 and drawn.std() > 5
    call(checkpoints["2511"], *command, "--width", 96, "--height", 64)
    assert Image.open(tmp_path / "a.png").size == (96, 64)
    command = ["--prompt", "a blue cat", "--output", tmp_path / "b.png"]
    assert "image: is missing" in call(checkpoints["2508"], *command, check=False)


# --- sizes of references --------------------------------------------------------------------------


def test_loras_of_different_reference_sizes_need_a_decision():
    abouts = {"a": {"reference_area": "target", "resolution": 64}, "b": {"reference_area": "1mp"}}
    with pytest.raises(UserError, match=r"reference_area[\s\S]*a: target[\s\S]*b: 1mp"):
        generate.reference_rule("lora", abouts)
    rule = generate.reference_rule("1mp", abouts)
    assert rule[:3] == ("1mp", None, 64)
    assert generate.reference_rule("4096", {"a": {}})[:2] == (4096, None)
    assert generate.reference_rule("lora", {"a": {}})[:3] == ("1mp", None, None)


def test_without_a_rule_it_is_the_stock_pipeline(checkpoints):
    """The sizes are put back, and 1mp means the pipeline's own constants."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

    folder = checkpoints["2511"]
    processor = script.load_processor(folder / "processor")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, processor=processor)
    with generate.reference_sizes(pipeline, generate.AREA_1MP, None):
        inside = plus.VAE_IMAGE_SIZE, plus.CONDITION_IMAGE_SIZE
    assert inside == (1024 * 1024, 384 * 384) == (plus.VAE_IMAGE_SIZE, plus.CONDITION_IMAGE_SIZE)
    with generate.reference_sizes(pipeline, 4096, 1024):
        assert (plus.VAE_IMAGE_SIZE, plus.CONDITION_IMAGE_SIZE) == (4096, 1024)
    assert plus.VAE_IMAGE_SIZE == 1024 * 1024


# --- forks, families, help ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"), [("flux", "train_pairedit.py"), ("sd", "train_dreambooth_pairs.py")]
)
def test_a_forks_own_sampling_is_used(kind, name, checkpoints, tmp_path):
    """The fork turns the sign of the latents that it draws."""
    text, drawn = (ROOT / name).read_text(), "return torch.stack([drawn["
    assert text.count(drawn) == 1
    fork = text.replace(drawn, drawn.replace("return ", "return -"))
    (tmp_path / "my_fork.py").write_text(fork)
    (tmp_path / "utils.py").write_text((ROOT / "utils.py").read_text())
    command = ["generate.py", "--pretrained_model_name_or_path", checkpoints[kind]]
    command += ["--prompt", "a person", "--num_inference_steps", 3, "--resolution", 64]
    command += ["--max_sequence_length", 16] if kind == "flux" else []
    output = ["--output", tmp_path / "o.png"]
    run(*command, *output)
    usual = pixels(tmp_path / "o.png")
    done = run(*command, *output, "--script", tmp_path / "my_fork.py")
    assert "0 already there" in done.stdout and (pixels(tmp_path / "o.png") != usual).any()
    for other in (tmp_path / "none.py", ROOT / "train_qwen_edit.py"):
        done = run(*command, *output, "--script", other, check=False)
        assert done.returncode == 2 and other.name in done.stderr and "Traceback" not in done.stderr


def test_the_checkpoint_or_a_setting_picks_the_family(checkpoints):
    def family(**given):
        return generate.pick_painter(given).config_class

    name = "pretrained_model_name_or_path"
    assert family(**{name: str(checkpoints["sd"])}, seed="0") is generate.ChangeConfig
    assert family(**{name: str(checkpoints["flux"])}, prompt="a") is generate.SliderConfig
    assert family(**{name: str(checkpoints["2511"])}) is generate.EditConfig
    assert family(**{name: "./nowhere"}, inversion="ddim") is generate.ChangeConfig
    assert family(gamma=3) is generate.SliderConfig
    assert family(python_name="train_image") is generate.SliderConfig
    assert family(**{name: "./nowhere"}, true_cfg_scale=3) is generate.EditConfig


def test_help_shows_each_family(call, capsys, monkeypatch):
    text = run("generate.py", "--help").stdout
    shown = {"edit": "--true_cfg_scale", "slider": "--inversion_lora", "runs": "--noise_scales"}
    for name, setting in (shown | {"change": "--restore_detail"}).items():
        assert name in text
        monkeypatch.setattr(sys, "argv", ["generate.py", "--help", name])
        generate.main()
        assert setting in capsys.readouterr().out
    assert run("generate.py", "--help", "sliders", check=False).returncode == 2


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("a.safetensors", ("a.safetensors", 1.0, None)),
        ("a.safetensors:0.5", ("a.safetensors", 0.5, None)),
        ("a:b.safetensors:1:-1", ("a:b.safetensors", 1.0, -1)),
        ("a.safetensors:strong", None),
        ("a.safetensors:nan", None),
        ("a.safetensors:1:1.5", None),
        ("a" * 300 + ":1", None),
    ],
)
def test_a_lora_with_its_numbers(text, parsed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b.safetensors").touch()
    if parsed:
        path, *numbers = generate.parse_lora(text)
        assert (str(path), *numbers) == parsed
    else:
        with pytest.raises(UserError, match=text):
            generate.parse_lora(text)


# --- mistakes -------------------------------------------------------------------------------------


def test_all_wrong_settings_then_all_wrong_files_are_named_at_once(checkpoints, call, tmp_path):
    (tmp_path / "t.jsonl").write_text(
        '{"imges": ["x.png"]}\n{"images": ["none.png"], "prompt": "a"}\n'
    )
    (tmp_path / "l.bin").write_bytes(b"")
    wrong = ["--table", tmp_path / "t.jsonl", "--lora", tmp_path / "l.bin"]
    text = call("./no", *wrong, "--sed", 3, "--num_inference_steps", 1, "--skip", 3, check=False)
    for words in ("sed", "'seed'", "num_inference_steps", "skip is a setting of FLUX.1"):
        assert words in text, words
    wrong += ["--output_dir", tmp_path / "out", "--device", "cuda:7"]
    text = call("./no", *wrong, check=False)
    for words in ("'imges'", "'images'", "none.png", "l.bin", "no folder ./no", "cuda:7"):
        assert words in text, words
    text = call(checkpoints["2511"], *QUICK, "--height", 64, check=False)
    for words in ("output", "height"):
        assert words in text
    assert not (tmp_path / "out").exists()


def test_results_never_overwrite_references_or_leave_their_folder(checkpoints, call, tmp_path):
    photo = tmp_path / "a b é.png"
    Image.open(REFERENCE).save(photo)
    before = photo.read_bytes()
    for case in (["--input_dir", tmp_path, "--output_dir", tmp_path],
                 ["--image", photo, "--output", photo]):  # fmt: skip
        text = call(checkpoints["2511"], *case, "--prompt", "x", *QUICK, check=False)
        assert re.search("would be (overwritten|read next time)", text)
        assert photo.read_bytes() == before
    (tmp_path / "junk.png").write_bytes(b"junk")
    (tmp_path / "latin.png").write_bytes(photo.read_bytes())
    (tmp_path / "latin.txt").write_bytes("schön".encode("latin-1"))
    rows = [
        {"images": [photo.name], "prompt": "x", "name": "../escape"},
        {"images": [photo.name], "prompt": "x", "name": "contact_sheet"},
        {"images": [photo.name], "prompt": "x", "seed": "abc"},
        ["a list"],
        {"images": ["junk.png"], "prompt": "x"},
        {"images": [photo.name], "name": "silent"},
        {"images": f"{photo.name};", "prompt": "x"},
        {"images": [photo.name], "prompt": ["x", "y"]},
        {"images": [photo.name], "prompt": "x", "seed": 10**20},
        {"images": [photo.name], "prompt": "x", "seed": "²"},
        {"images": ["latin.png"]},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    command = ["--table", tmp_path / "t.jsonl", "--output_dir", tmp_path / "out"]
    text = call("./typo", *command, check=False)
    for words in ("../escape", "contact_sheet.png", "junk.png", "./typo", "silent: no prompt"):
        assert words in text, words
    assert all(f"row {number}:" in text for number in (3, 4, 7, 8, 9, 10)) and "latin.txt" in text
    words = call(checkpoints["2511"], *command, "--prompt", "make", "it", "snow", check=False)
    assert "quotes" in words


@pytest.mark.parametrize("kind", ["flux", "sd", "2508"])
def test_a_row_of_two_pictures_is_too_much_for_some_models(kind, checkpoints, call, tmp_path):
    row = {"images": [str(REFERENCE)] * 2, "prompt": "x"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    command = ["--table", tmp_path / "t.jsonl", "--output_dir", tmp_path / "out"]
    text = call(checkpoints[kind], *command, "--lora", "none.safetensors", check=False)
    assert "image: " in text and "2 problem(s)" in text


@pytest.mark.parametrize("lora", ["", ".", "folder"])
def test_a_lora_that_is_no_file_is_named(lora, checkpoints, call, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/l.safetensors").touch()
    edit = ["--lora", lora, "--image", REFERENCE, "--prompt", "x", "--output", "o.png"]
    text = call(checkpoints["2511"], *edit, check=False)
    assert "1 problem(s)" in text and ("l.safetensors" in text) == (lora == "folder")


@pytest.mark.parametrize("place", ["file/o.png", "folder.png", "x" * 240 + ".png"])
def test_where_nothing_can_be_written_is_named_before_a_model_loads(
    place, checkpoints, call, tmp_path
):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    edit = ["--image", REFERENCE, "--prompt", "x", "--output", place]
    text = call(checkpoints["2511"], *edit, check=False)
    assert "nothing was loaded" in text and place.partition("/")[0] in text


def test_a_lora_of_another_model_is_refused_before_loading(lora, checkpoints, call, tmp_path):
    file = tmp_path / "l.safetensors"
    command = [
        "--lora",
        file,
        "--image",
        REFERENCE,
        "--prompt",
        "x",
        "--output",
        tmp_path / "o.png",
    ]
    tensors = load_file(lora[1])
    name = next(name for name in tensors if ".lora_A." in name)
    cases = [
        {"unet.down_blocks.0.attentions.0.attn1.to_q.lora_A.weight": torch.zeros(4, 4)},
        tensors | {name: torch.zeros(4, 7)},
        tensors | {name.replace("blocks.0", "blocks.9"): torch.zeros(4, 4)},
    ]
    for case in cases:
        save_file(case, file)
        text = call(checkpoints["2511"], *command, check=False)
        assert "1 problem" in text and str(file) in text
    file.write_bytes(b"cut")
    assert str(file) in call(checkpoints["2511"], *command, check=False)
