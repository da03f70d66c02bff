"""generate.py with FLUX.1: what a slider does, the files it takes, the seed's paths, mistakes."""

import json
import shutil

import diffusers
import numpy as np
import pytest
import tiny
import torch
import yaml
from conftest import PAIRS, ROOT, read_page, run
from PIL import Image
from safetensors.torch import load_file, save_file

import generate
import train_pairedit
from tools import convert_lora as tool
from utils import UserError, load_config

STEPS, SIZE, LENGTH = 6, 64, 16
PHOTO = PAIRS / "chelsea1_R.png"


@pytest.fixture(scope="session")
def flux(checkpoints):
    return checkpoints["flux"]


@pytest.fixture(scope="session")
def bare(flux):
    """The tiny transformer without weights."""
    return generate.flux_layers(train_pairedit, str(flux))


@pytest.fixture(scope="session")
def loras(flux, tmp_path_factory):
    """{"a" | "b": file} as train_pairedit.py writes them, a .pt beside each in old/."""
    folder = tmp_path_factory.mktemp("loras")
    return {
        name: tiny.save_sliders(flux, folder / name, folder / "old" / name, seed)
        for seed, name in enumerate("ab")
    }


def painter_of(flux, prompts=(), **changes):
    """A painter on the CPU; with prompts its models are loaded."""
    settings = {"num_inference_steps": STEPS, "max_sequence_length": LENGTH, "device": "cpu"}
    settings |= {"pretrained_model_name_or_path": str(flux), "output": "o.png", **changes}
    made = generate.SliderPainter(generate.SliderConfig(**settings), train_pairedit)
    if prompts:
        made.load(prompts)
    return made


@pytest.fixture(scope="session")
def painter(flux):
    return painter_of(flux, ["a person", ""])


def strip(*sliders, **changes):
    """A strip of (file, start) sliders."""
    loras = tuple(generate.Lora(file, 1.0, start) for file, start in sliders)
    made = generate.Strip("s", "a person", 3, (SIZE, 48), (1.0,), (), loras)
    return made._replace(**changes)


@pytest.fixture(scope="session")
def pipeline(flux):
    return diffusers.FluxPipeline.from_pretrained(flux, dtype=torch.float32)


def stock(pipeline, **changes):
    """What diffusers draws with the settings of `painter` and `strip`."""
    settings = {
        "prompt": "a person",
        "num_inference_steps": STEPS,
        "guidance_scale": 3.5,
        "width": SIZE,
        "height": 48,
        "max_sequence_length": LENGTH,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(3),
    }
    return pipeline(**settings | changes).images


# -- what is drawn


def test_scale_0_is_the_stock_pipeline_and_no_lora_at_all_bit_for_bit(painter, pipeline, loras):
    moved = painter.draw_tokens(strip((loras["a"], 2)), [0.0, 1.0])
    none = painter.draw_tokens(strip(), [0.0])
    assert torch.equal(moved[:1], none)
    assert torch.equal(none, stock(pipeline))
    assert (moved[1] - moved[0]).abs().max() > 0.1
    picture = stock(pipeline, output_type="np", generator=torch.Generator().manual_seed(3))[0]
    [(_, ours, _)] = painter.draw(strip(), [0.0])
    ours = np.asarray(ours).astype(float)
    assert np.abs(ours - picture * 255).max() <= 0.51  # rounded to a byte


def test_a_strip_is_each_of_its_pictures_alone(painter, loras):
    positions = [-1.0, 0.0, 0.3, 1.0, 1.5]
    knobs = strip((loras["a"], 1), (loras["b"], 4))
    together = painter.draw_tokens(knobs, positions)
    alone = torch.cat([painter.draw_tokens(knobs, [position]) for position in positions])
    assert torch.allclose(together, alone, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1  # a negative scale acts


def test_diffusers_draws_the_same_with_the_lora_on_in_all_steps(painter, pipeline, loras):
    ours = painter.draw_tokens(strip((loras["a"], 0)), [1.0])
    pipeline.load_lora_weights(str(loras["a"]))
    theirs = stock(pipeline)
    pipeline.unload_lora_weights()
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert not torch.allclose(ours, stock(pipeline), atol=1e-2)


@pytest.mark.parametrize("precision", ["int8-quanto", "nf4-bnb"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_quantised_base_draws_nearly_the_same(precision, dtype, flux, loras, painter):
    small = painter_of(flux, ["a person"], base_model_precision=precision, dtype=dtype)
    drawn = strip((loras["a"], 2), size=(SIZE, SIZE))
    ours, exact = (p.draw_tokens(drawn, [0.0, 1.0]).float() for p in (small, painter))
    kinds = {type(m).__name__ for m in small.transformer.modules()}
    assert ("Linear4bit" if precision == "nf4-bnb" else "QLinear") in kinds
    if dtype == "fp32":  # bf16 starts from other noise, as the pipeline does
        assert 0 < (ours - exact).norm() / exact.norm() < 0.2
    assert (ours[1] - ours[0]).norm() > 0.2 * (exact[1] - exact[0]).norm()


def test_a_slider_leaves_nothing_behind_for_the_next(painter, bare, loras, tmp_path):
    few = tmp_path / "few.safetensors"
    factors = tiny.random_factors(bare, 7, LAYERS)
    save_file(tool.to_diffusers(factors), few)
    for file, layers in ((loras["a"], 22), (few, 2)):
        painter.draw_tokens(strip((file, 0)), [1.0])
        assert len(train_pairedit.adapted_layers(painter.transformer, "slider0")) == layers


def parts_of_steps(painter, drawn, positions):
    """[(samples, parts of the batch)] of every pass of the real transformer."""
    seen = []

    def look(module, args, kwargs):
        seen.append((len(kwargs["hidden_states"]), list(painter.switch.parts)))

    hook = painter.transformer.register_forward_pre_hook(look, with_kwargs=True)
    painter.draw_tokens(drawn, positions)
    hook.remove()
    return seen


def planned(flux, **settings):
    """The strips of flags."""
    strips, problems = generate.plan_jobs(painter_of(flux, **settings))
    assert not problems
    return strips


def test_skip_counts_as_pairedit_does_in_both_modes(painter, loras, flux, tmp_path):
    """Prompts: on where i > skip. Real photos: on where i >= skip."""
    settings = {"prompt": ["a person"], "seed": [3], "width": SIZE, "height": 48}
    [drawn] = planned(flux, skip=2, lora=[str(loras["a"])], **settings)
    seen = parts_of_steps(painter, drawn, [1.0])
    assert [parts != [()] for _, parts in seen] == [False, False, False, True, True, True]
    [drawn] = planned(flux, skip=2, lora=[str(loras["a"])], inversion_lora=loras["b"], **settings)
    seen = parts_of_steps(painter, drawn, [1.0])
    assert [len(parts) for _, parts in seen] == [1, 1, 2, 2, 2, 2]
    assert all(parts[0] == (train_pairedit.Active("content"),) for _, parts in seen)
    both = [f"{loras['a']}:0.5:-1", f"{loras['b']}:1:4"]
    [drawn] = planned(flux, lora=both, **settings)
    seen = parts_of_steps(painter, drawn, [1.0])
    assert [len(parts[0]) for _, parts in seen] == [1, 1, 1, 1, 1, 2]
    real = {"python_name": "train_image_real", "image_ids": ["1"], "semantic_lora_path": "s"}
    for changes, start in (({}, 11), (real, 10)):  # the trainer's file
        strips, _ = planned_runs(flux, tmp_path, skips=[10], **changes)
        assert {lora.start for s in strips for lora in s.loras} == {start}


def test_six_scales_at_skip_14_of_28_take_93_samples(painter, loras):
    config = painter.config
    painter.config = config.model_copy(update={"num_inference_steps": 28})
    seen = parts_of_steps(painter, strip((loras["a"], 15)), [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    painter.config = config
    assert sum(samples for samples, _ in seen) == 15 + 6 * 13 == 93


def test_real_photos_blend_velocities(painter, loras):
    """v = v_c + gamma (v_s - v_c), each of the two with its own LoRA only; 0: the inversion."""
    drawn = strip((loras["a"], 2), inversion=loras["b"], gamma=0.75)
    ours = painter.draw_tokens(drawn, [0.0, 1.0, -0.5])
    predict, sigmas = painter.predictor(drawn), painter.sigmas(drawn)
    on, grid = train_pairedit.Active, painter.grid(drawn)
    for scale, result in zip([0.0, 1.0, -0.5], ours, strict=True):
        z = train_pairedit.first_noise(3, 16, grid, torch.float32, torch.device("cpu"))
        for i in range(STEPS):
            with torch.no_grad():
                v = predict(z, sigmas[i], [(on("content"),)])
                if i >= 2 and scale:
                    v += 0.75 * (predict(z, sigmas[i], [(on("slider0", scale),)]) - v)
            z = z + (sigmas[i + 1] - sigmas[i]) * v
        assert torch.allclose(result, z[0], atol=1e-4)


def test_editing_a_photo_follows_its_formula():
    """A slider whose velocity is constant moves the photo by its sum over the steps; no more."""
    x, change = torch.randn(2, 1, 5, 8)
    sigmas = [1.0, 0.9, 0.6, 0.4, 0.0]

    def predict(tokens, sigma, parts):
        scale = sum(active.scale for active in parts[0])
        return (tokens * 3).sin() * 0 + sigma + scale.view(-1, 1, 1) * change

    sliders = [train_pairedit.Slider("a", start=1), train_pairedit.Slider("b", 2.0, start=3)]
    scales = [0.5, 0.0, -1.0]
    drawn = generate.edit_photo(train_pairedit, predict, x, sigmas, scales, sliders, seed=0)
    assert torch.equal(drawn[1], x[0])
    moved = -(0.9 * 1 + 0.4 * 2)  # sum of (sigma' - sigma) times the scales that are on
    assert torch.allclose(drawn[0], x[0] + 0.5 * moved * change[0], atol=1e-5)
    assert torch.allclose(drawn[2], x[0] - moved * change[0], atol=1e-5)


def test_a_slider_that_does_nothing_leaves_the_photo_as_it_is(painter, loras):
    photo = strip((loras["a"], 2), images=(PHOTO,), size=(SIZE, SIZE))
    edited = painter.draw_tokens(photo, [0.0, 1e-7, 1.0])
    assert torch.allclose(edited[0], edited[1], atol=1e-3)
    assert (edited[2] - edited[0]).abs().max() > 0.05
    pixels = train_pairedit.to_pixels(generate.fit_photo(PHOTO, (SIZE, SIZE)))
    latents = train_pairedit.encode_pixels(painter.vae, pixels)
    assert torch.equal(edited[0], train_pairedit.pack_tokens(latents)[0])
    seen = parts_of_steps(painter, photo, [0.0, 0.5, 1.0])
    assert [samples for samples, _ in seen] == [3] * (STEPS - 2)  # the photo's own, and two


def test_the_trainers_preview_is_generates_picture(flux, tmp_path, monkeypatch):
    settings = {
        "pretrained_model_name_or_path": str(flux), "mixed_precision": "no", "device": "cpu",
        "python_name": "slider_text", "datasets": ["smile"], "train_iteration": 1, "rank": 4,
        "max_sequence_length": LENGTH, "resolution": SIZE, "num_inference_steps": STEPS,
        "end_step": STEPS - 1, "scales": "0,2", "skips": [1], "start_seed_gen": 5,
        "count_gen": 1, "prompt": ["a person"], "output_folder": str(tmp_path / "out"),
        "output_folder_gen": str(tmp_path / "eval"), "cache_dir": str(tmp_path / "cache"),
        "image_format": "png", "gradient_checkpointing": False,
    }  # fmt: skip
    file = tmp_path / "smile.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in settings.items() if k != "image_format"}))
    trainer = train_pairedit.PairEditTrainer(
        load_config(train_pairedit.Config, ["--config", str(file)])
    )
    trainer.fit()
    monkeypatch.setattr("sys.argv", ["generate.py", "--config", str(file), "--image_format", "png"])
    generate.main()
    [sheet] = (tmp_path / "eval").glob("*/*/5_*.png")
    [theirs] = (tmp_path / "out").rglob("step-000001.png")
    ours, theirs = (np.asarray(Image.open(path)).astype(int) for path in (sheet, theirs))
    assert ours.shape == theirs.shape and np.abs(ours - theirs)[24:-28].max() <= 1  # no caption


# -- LoRA files


def changes_of(factors):
    """{layer: up down}"""
    return {layer: up @ down for layer, (down, up) in factors.items()}


def same_changes(found, wanted):
    found, wanted = changes_of(found), changes_of(wanted)
    assert found.keys() == wanted.keys()
    return all(torch.allclose(found[k], wanted[k], atol=1e-5) for k in wanted)


LAYERS = ["transformer_blocks.1.attn.to_out.0", "single_transformer_blocks.0.proj_mlp"]


@pytest.mark.parametrize(
    "kind", ["peft", "patterns", "bare", "alpha", "original.pt", "original.safetensors"]
)
def test_every_format_is_read_at_its_strength(kind, bare, tmp_path):
    """Written by hand; alpha 2 and rank 4 mean 1/2, whatever place says so."""
    factors = tiny.random_factors(bare, 0, LAYERS)
    strength = {"peft": 2.0, "alpha": 0.5, "bare": 1.0}.get(kind, 0.5)
    wanted = {k: (down, up * strength) for k, (down, up) in factors.items()}
    tensors, metadata = {}, {}
    for layer, (down, up) in factors.items():
        if kind.startswith("original"):
            name = "lora_unet_" + layer.replace(".", "_")
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
            continue
        name = layer if kind == "bare" else f"transformer.{layer}"
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        if kind == "alpha":
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
    settings = {"transformer.r": 4, "transformer.lora_alpha": 8}
    if kind == "patterns":
        settings["transformer.alpha_pattern"] = {"to_out.0": 2}
        wanted = {k: (d, u * (0.5 if "to_out" in k else 2.0)) for k, (d, u) in factors.items()}
    if kind in ("peft", "patterns"):
        metadata = {"lora_adapter_metadata": json.dumps(settings)}
    file = tmp_path / f"l{'.pt' if kind.endswith('pt') else '.safetensors'}"
    if file.suffix == ".pt":
        torch.save(tensors, file)
    else:
        save_file(tensors, file, metadata=metadata)
    assert same_changes(generate.read_factors(file, bare), wanted)


def test_kohyas_own_names_are_read_through_diffusers(bare, tmp_path):
    draw = torch.Generator().manual_seed(0)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    width = dict(bare.named_modules())["transformer_blocks.0.attn.to_q"].in_features
    down, up = torch.randn(4, width, generator=draw), torch.randn(3 * width, 4, generator=draw)
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    save_file({**tensors, f"{name}.alpha": torch.tensor(2.0)}, tmp_path / "k.safetensors")
    found = changes_of(generate.read_factors(tmp_path / "k.safetensors", bare))
    layers = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    assert torch.allclose(torch.cat([found[k] for k in layers]), up @ down / 2, atol=1e-5)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("transformer.nowhere.lora_A.weight", "nowhere"),
        ("lora_te1_text_model.lora_down.weight", "lora_te1"),
        ("transformer.x_embedder.lora_A.weight", "x_embedder"),  # its upper factor is missing
    ],
)
def test_what_cannot_be_used_is_named_not_dropped(extra, words, bare, loras, tmp_path):
    save_file(load_file(loras["a"]) | {extra: torch.zeros(4, 64)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=f"1 of .* tensors are no part of a LoRA.*\n.*{words}"):
        generate.read_factors(tmp_path / "x.safetensors", bare)


@pytest.mark.parametrize("end", ["lora_magnitude_vector", "lokr_w1", "dora_scale", "hada_w1_a"])
def test_what_is_no_lora_is_named_by_its_kind(end, bare, loras, tmp_path):
    tensors = load_file(loras["a"]) | {f"transformer.x_embedder.{end}": torch.zeros(4, 64)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(
        UserError, match=rf"is a (DoRA|LoKr|LoHa).*: transformer\.x_embedder\.{end}"
    ):
        generate.read_factors(tmp_path / "x.safetensors", bare)


@pytest.mark.parametrize(("rank", "alpha"), [(16, 1.0), (6, 4.0)])
def test_converting_there_and_back_keeps_the_strength(rank, alpha, flux, bare, pipeline, tmp_path):
    """.pt -> diffusers -> .pt; the original programs take 1 / rank, whatever alpha says."""
    factors = tiny.random_factors(bare, 0, rank=rank)
    names = {layer: "lora_unet_" + layer.replace(".", "_") for layer in factors}
    tensors = {f"{names[k]}.lora_down.weight": down for k, (down, _) in factors.items()}
    tensors |= {f"{names[k]}.lora_up.weight": up for k, (_, up) in factors.items()}
    tensors |= {f"{names[k]}.alpha": torch.tensor(alpha) for k in factors}
    torch.save(tensors, tmp_path / "a.pt")
    wanted = {k: (down, up * alpha / rank) for k, (down, up) in factors.items()}

    def convert(source, target, original=False):
        return tool.convert(tmp_path / source, tmp_path / target, original, str(flux))

    save_file({"transformer.old.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "a.safetensors")
    assert convert("a.pt", "b.safetensors") == len(factors)  # not what lies beside a.pt
    assert same_changes(generate.read_factors(tmp_path / "b.safetensors", bare), wanted)
    convert("b.safetensors", "c.pt")
    convert("c.pt", "d.safetensors", original=True)
    assert load_file(tmp_path / "d.safetensors").keys() == tensors.keys()
    back = torch.load(tmp_path / "c.pt", weights_only=True)
    for layer, (down, up) in wanted.items():
        assert back[f"{names[layer]}.alpha"] == 1
        found = back[f"{names[layer]}.lora_up.weight"] @ back[f"{names[layer]}.lora_down.weight"]
        assert torch.allclose(found / rank, up @ down, atol=1e-5)
    if rank == 16:
        assert all(torch.equal(back[key], value) for key, value in tensors.items())
        pipeline.load_lora_weights(str(tmp_path / "b.safetensors"))
        layer = pipeline.transformer.get_submodule(LAYERS[0])
        adapter = next(iter(layer.scaling))
        theirs = layer.get_delta_weight(adapter)
        pipeline.unload_lora_weights()
        assert torch.allclose(theirs, changes_of(wanted)[LAYERS[0]], atol=1e-5)


def test_a_file_is_not_converted_into_itself_or_to_where_nothing_can_be_written(flux, tmp_path):
    file, blocked = tmp_path / "a.safetensors", tmp_path / "file"
    for path in (file, blocked):
        path.write_text("x")
    for target in (file, blocked / "b.safetensors"):
        with pytest.raises(UserError, match=str(target.parent)):
            tool.convert(file, target, False, str(flux))
    assert file.read_text() == "x"


# -- the training file


QUICK = ["--device", "cpu", "--resolution", SIZE, "--max_sequence_length", LENGTH]


def place_of(flux, folder):
    """A copy of the seed's files beside generate.py, in a place of its own."""
    (folder / "configs").mkdir()
    for name in ("train_image", "train_image_real"):
        text = (ROOT / "tests/seeds" / f"001_{name}.yaml").read_text()
        if name == "train_image_real":
            head = (ROOT / "tests/seeds/001_train_image.yaml").read_text()
            text = head.replace("train_image_fm", "train_image_real") + text
            text = text.replace("  - age\n  - smile", "  - real_person")
        (folder / "configs" / f"{name}.yaml").write_text(text)
    return ["--pretrained_model_name_or_path", flux, *QUICK]


def test_the_seeds_gen_image_script_with_its_own_paths(call_generate, flux, loras, tmp_path):
    """`python gen_image_script.py --c=train_image` of the document; only the sizes are ours."""
    settings = [*place_of(flux, tmp_path), "--count_gen", 2]
    command = ["--c=train_image", *settings]
    done = run(ROOT / "generate.py", *command, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for name in ("age", "smile"):
        stem = (
            f"{name}_vtrain_image_fm_4.0eta_1.0ns_full_base_v1/{name}_4.0eta_1.0ns_28inf_500epoch"
        )
        assert f"LoRA output/models/image/{name}/{stem}.safetensors" in done.stderr
        file = tmp_path / "output/models/image" / name / f"{stem}.safetensors"
        file.parent.mkdir(parents=True)
        shutil.copy(loras["a"], file)
    assert "16 picture(s), 0 already" in run(ROOT / "generate.py", *command, cwd=tmp_path).stdout
    out = tmp_path / "output/eval/image/age/age_vtrain_image_fm_4.0eta_1.0ns_full_base_v1"
    head, tail = "6001_age_skip10_500epoch", "image_of_a_person.jpg"
    pictures = {f"{head}_scale{scale}_{tail}" for scale in ("0.00", "0.80", "1.00", "1.20")}
    assert {p.name for p in (out / "origin/6001").iterdir()} == pictures
    assert {p.name for p in out.glob("*.jpg")} == {
        f"600{n}_age_skip10_500epoch_0.00-1.20_{tail}" for n in (0, 1)
    }
    pixels = [
        np.asarray(Image.open(out / "origin/6001" / p)).astype(float) for p in sorted(pictures)
    ]
    moved = [np.abs(p - pixels[0]).mean() for p in pixels]
    assert moved[0] == 0 < moved[1] < moved[2] < moved[3]
    files = sorted((tmp_path / "output/eval").rglob("*.jpg"))
    before = [path.stat().st_mtime_ns for path in files]
    done = call_generate(*command, cwd=tmp_path)
    assert "16 picture(s), 16 already there" in done and "sheet" not in done
    assert before == [path.stat().st_mtime_ns for path in files] and len(files) == 20


def test_the_seeds_gen_image_real_script(call_generate, flux, loras, tmp_path):
    """A LoRA per photo, the pickled slider of the document, the photo's own shape."""
    settings = [*place_of(flux, tmp_path), "--count_gen", 1, "--num_inference_steps", 4]
    settings += ["--skips", "[1]", "--scales=-1,0,1", "--image_format", "png"]
    command = ["--c", "train_image_real", *settings]
    done = call_generate(*command, cwd=tmp_path, check=False)
    assert "no picture 610.* in datasets/real_person/source" in done
    assert "LoRA output/models/pretrained/elf.pt" in done
    assert "real_person_1743_4inf_500epoch.safetensors" in done
    source = tmp_path / "datasets/real_person/source"
    source.mkdir(parents=True)
    shutil.copy(PHOTO, source / "610.png")
    Image.open(PHOTO).convert("L").resize((64, 64)).save(source / "1743.jpg")
    for number in ("610", "1743"):
        run_folder = f"real_person_{number}_vtrain_image_real_base_v1"
        file = f"{run_folder}/real_person_{number}_4inf_500epoch.safetensors"
        path = tmp_path / "output/models/image/real_person" / file
        path.parent.mkdir(parents=True)
        shutil.copy(loras["b"], path)
    pretrained = tmp_path / "output/models/pretrained"
    pretrained.mkdir(parents=True)
    shutil.copy(loras["a"].parent / "old/a.pt", pretrained / "elf.pt")
    assert "elf.pt" in call_generate(*command, cwd=tmp_path, check=False)
    call_generate(*command, "--allow_pickle", cwd=tmp_path)
    out = tmp_path / "output/eval/image/real_person"
    for number, size in (("610", (80, 48)), ("1743", (64, 64))):
        folder = out / f"real_person_{number}_vtrain_image_real_base_v1/origin/6000"
        names = [f"6000_real_person_skip1_500epoch_scale{s}" for s in ("-1.00", "0.00", "1.00")]
        images = [Image.open(folder / f"{name}_image_of_a_person.png") for name in names]
        assert all(image.size == size for image in images)
        minus, zero, plus = (np.asarray(image).astype(int) for image in images)
        assert (minus != zero).any() and (plus != zero).any() and (plus != minus).any()


def planned_runs(flux, folder, **changes):
    """(strips, problems) of a file of the trainer."""
    settings = {
        "pretrained_model_name_or_path": str(flux), "python_name": "train_image",
        "output_folder": folder / "models", "output_folder_gen": folder / "eval",
        "count_gen": 3, **changes,
    }  # fmt: skip
    config = generate.runs_class(train_pairedit)(**settings)
    return generate.plan_runs(painter_of(flux), config)


def test_drawn_seeds_and_prompts_belong_to_the_seed(flux, tmp_path):
    drawn = {"use_random_seed": 1, "use_prompts_file": 1, "datasets": ["age", "elf"]}
    drawn |= {"count_gen": 12, "skips": [2, 14]}
    strips, problems = planned_runs(flux, tmp_path, **drawn)
    assert not problems and len(strips) == 2 * 2 * 12
    again, _ = planned_runs(flux, tmp_path, **drawn)
    other, _ = planned_runs(flux, tmp_path, **drawn | {"seed": 1, "skips": [2]})
    assert [s.seed for s in strips] == [s.seed for s in again]
    assert [s.seed for s in strips[:12]] == [s.seed for s in strips[12:24]]  # of every skip
    assert [s.seed for s in strips[:12]] != [s.seed for s in other[:12]]
    assert len({s.seed for s in strips}) == 12 and all(0 <= s.seed <= 32768 for s in strips)
    lines = yaml.safe_load((ROOT / "configs/prompts/prompts-person.yaml").read_text())
    assert len(lines) == 10 and len({s.prompt for s in strips}) > 3
    assert {s.prompt for s in strips} <= set(lines)


@pytest.mark.parametrize("prompt", ["a/b ../c", "x" * 5000, "线条 画" * 300, " \n two\tlines "])
def test_every_prompt_fits_a_file_name(prompt, flux, tmp_path):
    strips, _ = planned_runs(flux, tmp_path, prompt=[prompt])
    folder = tmp_path / "eval/age/age_vtrain_image_4.0eta_1.0ns_full_base_v1"
    assert all(s.sheet.parent == folder for s in strips)
    for file in strips[0].files:
        assert file.parent == folder / "origin/6666"
        generate.save_picture(file, Image.new("RGB", (8, 8)), {"prompt": prompt})
        assert generate.read_settings(file) == {"prompt": prompt}  # in the comment of a JPEG
    other, _ = planned_runs(flux, tmp_path, prompt=[prompt + "!"])
    assert not {f for s in strips for f in s.files} & {f for s in other for f in s.files}


# -- commands


@pytest.fixture
def make(call_generate, flux):
    """call_generate() with the tiny model."""
    model = ["--pretrained_model_name_or_path", flux, *QUICK, "--num_inference_steps", 4]
    return lambda *args, check=True: call_generate(*model, "--skip", 1, *args, check=check)


def test_a_strip_by_flags_is_made_once_and_a_new_scale_adds_one_picture(make, loras, tmp_path):
    output = tmp_path / "out/strip.png"
    both = ["--lora", f"{loras['a']}:0.5", f"{loras['b']}:1:2", "--prompt", "a person"]
    command = [*both, "--seed", "0,1", "--output", output]
    assert "4 picture(s), 0 already there" in make(*command, "--scales", "0,1")
    names = {f"strip_seed{seed}_scale{scale}.png" for seed in (0, 1) for scale in (0, 1)}
    assert {p.name for p in output.parent.iterdir()} == names | {"strip.png"}
    sheet = output.stat().st_mtime_ns
    assert "4 picture(s), 4 already there" in make(*command, "--scales", "0,1", "--html")
    assert output.stat().st_mtime_ns == sheet
    folder = output.parent
    assert read_page(folder / "strip.html") == [
        ("strip", {f"scale {k}": folder / f"strip_seed{seed}_scale{k}.png" for k in (0, 1)})
        for seed in (0, 1)
    ]
    assert "<title>strip</title>" in (folder / "strip.html").read_text()
    assert "6 picture(s), 4 already there" in make(*command, "--scales", "0,0.5,1")
    assert Image.open(output).size == (3 * 264 + 8, 24 + 2 * (256 + 32))
    about = generate.read_settings(output.parent / "strip_seed1_scale0.5.png")
    assert about["name"] == "strip" and about["scale"] == 0.5
    assert [lora["start"] for lora in about["settings"]["loras"]] == [2, 3]


def test_photos_of_a_folder_are_edited_without_training(make, loras, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    shutil.copy(PHOTO, photos / "wide.png")
    Image.open(PHOTO).rotate(90, expand=True).convert("RGBA").save(photos / "tall.png")
    out = tmp_path / "out"
    make("--lora", loras["a"], "--input_dir", photos, "--output_dir", out, "--scales", "0,1")
    sizes = {p.name: Image.open(p).size for p in out.glob("*_scale1.png")}
    assert sizes == {"wide_scale1.png": (80, 48), "tall_scale1.png": (48, 80)}
    for name in ("wide", "tall"):
        before, after = (Image.open(out / f"{name}_scale{s}.png") for s in (0, 1))
        assert np.abs(np.asarray(before).astype(int) - np.asarray(after)).max() > 3
    assert Image.open(out / "contact_sheet.png").width == 3 * 264 + 8  # photo, 0, 1


def test_velocities_of_several_sliders_are_blended(painter, loras, flux):
    settings = {"lora": [str(loras["a"]), str(loras["b"])], "skip": 1, "prompt": ["a person"]}
    settings |= {"width": SIZE, "height": 48}
    [plain] = planned(flux, **settings)
    [blended] = planned(flux, **settings, compose="blend", gamma=0.5)
    one, two = (painter.draw_tokens(drawn, [1.0]) for drawn in (plain, blended))
    assert (one - two).abs().max() > 0.01
    assert [n for n, _ in parts_of_steps(painter, blended, [1.0])] == [1, 1, 3, 3, 3, 3]


def test_an_inversion_lora_alone_draws_its_photo_in_the_photos_size(make, loras, tmp_path):
    out = tmp_path / "o.png"
    make("--inversion_lora", loras["a"], "--image", PHOTO, "--prompt", "x", "--output", out)
    assert Image.open(out).size == (80, 48)


# -- mistakes


def test_one_report_of_everything_wrong_with_a_strip(make, loras, tmp_path):
    tensors = load_file(loras["a"])
    wide = {k: v.repeat(1, 2) if "lora_A" in k else v for k, v in tensors.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(loras["a"].read_bytes()[:1000])
    torch.save({"a": 1}, tmp_path / "old.pt")
    (tmp_path / "cut.png").write_bytes(PHOTO.read_bytes()[:2000])
    text = make(
        "--gama", 1, "--offload", "model", "--image", tmp_path / "cut.png", "--gamma", 0.5,
        "--output", tmp_path / "o.jpg", "--height", 64, "--skips", 3, check=False,
    )  # fmt: skip
    for words in ("gama", "'gamma'", "offload is a setting of Qwen", "skips", "'skip'"):
        assert words in text, words
    files = [tmp_path / f"{name}.safetensors" for name in ("nowhere", "wide", "cut")]
    text = make(
        "--lora", *files, tmp_path / "old.pt", f"{loras['a']}:strong", f"{loras['a']}:1:99",
        "--image", tmp_path / "cut.png", "--device", "cuda:7", "--output", tmp_path / "o.png",
        "--scales", "1,1", check=False,
    )  # fmt: skip
    for file in (*files, tmp_path / "old.pt", tmp_path / "cut.png"):
        assert str(file) in text
    for words in (":strong", "step 100", "cuda:7", "two results are called", "allow_pickle"):
        assert words in text, words
    text = make(
        "--lora", tmp_path / "old.pt", "--allow_pickle", "--prompt", "a",
        "--output", tmp_path / "o.png", check=False,
    )  # fmt: skip
    assert "1 problem" in text and "old.pt" in text


@pytest.mark.parametrize(
    "wrong",
    [
        ["--compose", "merge", "--prompt", "a"],
        ["--image", PHOTO],
        ["--lora", "a.safetensors", "--gamma", 0.5],
        ["--scales", "0,1"],
        ["--lora", "a.safetensors", "--output_dir", "out"],
    ],
)
def test_settings_that_do_not_go_together_are_refused(make, wrong, tmp_path):
    text = make(*wrong, "--output", tmp_path / "o.png", check=False)
    assert "1 problem(s), nothing was loaded" in text and "a.safetensors" not in text


def test_one_report_of_everything_wrong_with_a_file(call_generate, flux, loras, tmp_path):
    file = tmp_path / "c.yaml"
    settings = {"pretrained_model_name_or_path": str(tmp_path), "python_name": "train_image"}
    settings |= {"datasets": ["age", "elf"], "learning_rate": 1e-3, "end_step": 99}
    file.write_text(yaml.safe_dump(settings | {"scales": "0,one", "skip": [3]}))
    text = call_generate("--config", file, check=False)
    assert all(words in text for words in ("skip", "'skips'", "scales"))
    assert "end_step" not in text and "learning_rate" not in text  # training only
    wrong = {"prompts_file": ["none.yaml"], "use_prompts_file": 1, "skips": [30, -2]}
    file.write_text(yaml.safe_dump(settings | wrong | {"device": "gpu"}))
    text = call_generate("--config", file, check=False)
    for words in ("none.yaml", str(tmp_path), "step 31", "step -1", "'gpu'", "/age/", "/elf/"):
        assert words in text, words
    assert "configs/nowhere.yaml" in call_generate("--c", "nowhere", check=False)
    for changes in (
        {"python_name": "train_image_real", "image_ids": ["1"]},
        {"image_ids": ["1"], "semantic_lora_path": "s"},
        {"use_trained_lora_path": 1},
    ):
        file.write_text(yaml.safe_dump(settings | changes))
        assert "1 problem(s)" in call_generate("--config", file, check=False)


def test_the_safetensors_beside_a_pickle_is_taken(flux, loras, tmp_path):
    trained = {"use_trained_lora_path": 1, "datasets": ["age"]}
    trained["trained_lora_path"] = str(loras["a"]).replace(".safetensors", ".pt")
    strips, problems = planned_runs(flux, tmp_path, **trained)
    painter = painter_of(flux, num_inference_steps=28)
    assert not problems and not painter.problems(strips)


def test_a_photo_that_the_base_cannot_draw_is_named(painter, loras, tmp_path, capsys):
    file = tmp_path / "photo.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (48, SIZE, 3), np.uint8)).save(file)
    [_] = painter.draw(strip((loras["a"], 1), images=(file,)), [0.0])
    said = capsys.readouterr().out
    assert f"{file}: this base cannot draw such a picture" in said
    pixels = train_pairedit.to_pixels(Image.open(ROOT / "demo/slider_pairs/age/source/0.png"))
    vae = train_pairedit.load_vae(ROOT / "demo/flux_slider_base", torch.device("cpu"))
    kept = train_pairedit.decode_latents(vae, train_pairedit.encode_pixels(vae, pixels))
    assert generate.photo_db(file, kept, pixels) > 30
    assert not capsys.readouterr().out
