"""train_dreambooth_pairs.py: what pairs teach, the commands of the user's document, mistakes."""

import json
import math
import shutil

import diffusers
import pytest
import torch
from conftest import LAUNCH, PAIRS, ROOT, run
from PIL import Image
from safetensors.torch import load_file

import train_dreambooth_pairs as script
from utils import UserError, load_config

NAMES = ("chelsea0", "coffee0", "hubble0")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """before/, after/ and single/ of three photos."""
    folder = tmp_path_factory.mktemp("pictures")
    for place, role in (("before", "R"), ("after", "T"), ("single", "T")):
        (folder / place).mkdir()
        for name in NAMES:
            file = next(f for f in PAIRS.glob(f"{name}_{role}.*") if f.suffix != ".txt")
            Image.open(file).convert("RGB").save(folder / place / f"{name}.png")
    return folder


@pytest.fixture
def make(checkpoints, pictures, tmp_path):
    """make(**flags) -> trainer on the pairs, CPU, fp32, 64 px."""

    def build(folder=tmp_path, **changes):
        settings = {
            "pretrained_model_name_or_path": checkpoints["sd"],
            "use_image_pairs": True,
            "before_data_dir": pictures / "before",
            "after_data_dir": pictures / "after",
            "instance_prompt": "a photo",
            "output_dir": folder / "out",
            "cache_dir": folder / "cache",
            "resolution": 64,
            "train_batch_size": 2,
            "max_train_steps": 4,
            "checkpointing_steps": 2,
            "learning_rate": 1e-2,
            **changes,
        }
        argv = [
            f"--{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in settings.items()
        ]
        config = load_config(script.Config, [a for a in argv if not a.endswith("=None")])
        return script.DreamBoothPairsTrainer(config)

    return build


def loaded(trainer):
    """The trainer with data, cache and models."""
    trainer.cache_embeddings()
    trainer.load_models()
    return trainer


def shaken(trainer, seed=0):
    """The adapters with values that change the output."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in trainer.trained:
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1
    return trainer


def turns_of(trainer, batch=0):
    return script.draw_turns(trainer.config, batch, trainer.scenes, trainer.groups)


# --- formulas -------------------------------------------------------------------------------------


def noised(low, high, t=600, base=None, progress=0.0):
    alphas = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).alphas_cumprod
    noise = torch.randn(low.shape, generator=torch.Generator().manual_seed(1))
    alpha = alphas[t].expand(len(low))
    scales = torch.full((len(low),), -1.0), torch.full((len(low),), 1.0)
    both = (script.add_noise_sd(x, noise, alpha) for x in (low, high))
    return script.Noised(*both, *scales, noise, base or (lambda x: x * 0), progress), alphas[t]


def test_alphas_and_snr_weights_are_those_of_stable_diffusion():
    alphas = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).alphas_cumprod.double()
    known = {0: 0.999150, 20: 0.981314, 200: 0.753692, 500: 0.276333, 999: 0.004660}
    for t, value in known.items():
        assert alphas[t].item() == pytest.approx(value, abs=2e-6)
    five, one = (script.snr_weight(alphas, gamma) for gamma in (5, 1))
    assert five[[0, 1, 20]].tolist() == pytest.approx([0.00425, 0.00853, 0.09521], abs=1e-5)
    assert (five[200:] == 1).all() and (one[380:] == 1).all()
    assert one[[20, 200, 300]].tolist() == pytest.approx([0.01904, 0.32680, 0.69348], abs=2e-5)
    assert (script.snr_weight(alphas, None) == 1).all()


def test_with_one_noise_the_sides_differ_by_the_change_alone():
    low, high = torch.randn(2, 2, 4, 8, 8)
    n, alpha = noised(low, high)
    torch.testing.assert_close(n.low, n.high - alpha.sqrt() * (high - low))


def test_the_objectives_are_their_formulas():
    low, high = torch.randn(2, 2, 4, 8, 8)
    n, _ = noised(low, high, base=lambda x: 3 * x)
    after, before = script.slider(n)
    assert torch.equal(after.noisy, n.high) and torch.equal(after.target, n.noise)
    assert torch.equal(before.noisy, n.low) and torch.equal(before.target, n.noise)
    assert after.lane[0].scale.tolist() == [1, 1] and before.lane[0].scale.tolist() == [-1, -1]
    forward, backward = script.difference(n)
    assert torch.equal(forward.noisy, n.high) and torch.equal(forward.target, 3 * n.low)
    assert torch.equal(backward.noisy, n.low) and torch.equal(backward.target, 3 * n.high)
    assert forward.lane[0].scale.tolist() == [1, 1] and backward.lane[0].scale.tolist() == [-1, -1]
    (first,) = script.copier(n)
    (second,) = script.copier(n._replace(progress=0.5))
    assert torch.equal(first.noisy, n.low) and [on.adapter for on in first.lane] == ["copied"]
    assert torch.equal(second.noisy, n.high) and second.lane[0].frozen
    assert [on.adapter for on in second.lane] == ["copied", "change"]
    assert {id(term.target) for term in (*script.joint(n), first, second)} == {id(n.noise)}
    assert [term.lane[0].scale for term in script.joint(n)] == [1.0, 1.0]


def test_huber_is_the_square_near_zero_and_a_line_far_away():
    small, large = torch.tensor([1e-3]).double(), torch.tensor([100.0])
    assert script.huber_error(small, 0.1).item() == pytest.approx(1e-6, rel=1e-2)
    slope = script.huber_error(large + 1, 0.1) - script.huber_error(large, 0.1)
    assert slope.item() == pytest.approx(0.2, rel=1e-3)


def test_region_weights_have_mean_one_and_follow_the_change():
    change = torch.zeros(1, 1, 4, 4)
    change[..., :2, :2] = 0.5
    assert torch.equal(script.region_weights(change, 0.0), torch.ones_like(change))
    weights = script.region_weights(change, 1.0)
    assert weights.mean().item() == pytest.approx(1) and weights[0, 0, 3, 3] == 0
    assert script.region_weights(change, 0.5)[0, 0, 3, 3].item() == pytest.approx(0.5)
    error = torch.rand(1, 1, 4, 4)
    other = error.clone()
    other[..., 2:, :] = 9  # outside the region nothing counts
    assert torch.equal((weights * error).sum(), (weights * other).sum())


def test_timesteps_are_spread_over_the_range_and_never_collapse(make):
    config = make(timestep_min=200, timestep_max=399).config
    drawn = [script.draw_timestep(config, visit) for visit in range(1000)]
    assert min(drawn) < 203 and max(drawn) > 396 and min(drawn) >= 200 and max(drawn) <= 399
    for start in range(0, 1000, 10):
        assert sorted((t - 200) // 20 for t in drawn[start : start + 10]) == list(range(10))
    assert len(set(drawn)) > 190
    ends = make(timestep_min=999, timestep_max=999).config
    assert {script.draw_timestep(ends, visit) for visit in range(20)} == {999}


# --- the adapter ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_unet():
    """The UNet of Stable Diffusion 1.5 without weights."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        return lambda: diffusers.UNet2DConditionModel(
            cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
        )


@pytest.mark.parametrize(
    ("targets", "layers", "per_rank"), [("attention", 128, 199_296), ("transformer", 192, 423_936)]
)
def test_layers_and_parameters_of_stable_diffusion(targets, layers, per_rank, full_unet):
    from accelerate import init_empty_weights

    with init_empty_weights():
        unet = full_unet()
        script.add_adapter(unet, script.Switchboard(), "change", script.TARGETS[targets], 4, 4)
    found = script.adapted_layers(unet, "change")
    numbers = sum(x.down["change"].numel() + x.up["change"].numel() for x in found.values())
    assert len(found) == layers and numbers == 4 * per_rank


def test_an_empty_adapter_changes_no_bit_at_any_strength(make):
    trainer = loaded(make(target_modules="self-attention+conv"))
    noisy, t = torch.randn(2, 4, 8, 8), torch.tensor([600, 20])
    embeds = torch.randn(1, 77, 32)
    unet = trainer.bare["unet"]
    plain = trainer.predict(unet, noisy, t, embeds, [()])
    for scale in (1.0, -3.0):
        assert torch.equal(
            plain, trainer.predict(unet, noisy, t, embeds, [(script.On("change", scale),)])
        )
    shaken(trainer)
    moved = trainer.predict(unet, noisy, t, embeds, [(script.On("change", 1.0),)])
    assert not torch.equal(plain, moved)
    assert torch.equal(plain, trainer.predict(unet, noisy, t, embeds, [()]))


def test_two_lanes_are_two_passes(make):
    trainer = shaken(loaded(make()))
    unet, embeds, t = trainer.bare["unet"], torch.randn(1, 77, 32), torch.tensor([600])
    x = torch.randn(2, 4, 8, 8)
    lanes = [(script.On("change", 1.0),), (script.On("change", -1.0),)]
    together = trainer.predict(unet, x, t.repeat(2), embeds, lanes)
    alone = [trainer.predict(unet, x[i : i + 1], t, embeds, [lanes[i]]) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


def gradients(trainer, losses):
    torch.stack(list(losses.values())).sum().backward()
    found = [p.grad.clone() for p in trainer.trained]
    for parameter in trainer.trained:
        parameter.grad = None
    return found


def test_difference_starts_at_the_bases_own_difference_and_needs_a_change(make):
    trainer = loaded(make(pair_objective="difference"))
    turns = turns_of(trainer)
    t = torch.tensor([script.draw_timestep(trainer.config, turn.visit) for turn in turns])
    n, _ = trainer.noised(turns, t)
    expected = (n.base(n.high) - n.base(n.low)).square().mean()
    losses = trainer.training_loss(turns)
    assert losses["forward"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert losses["backward"].item() == pytest.approx(expected.item(), rel=1e-4)
    same = [scene._replace(files=scene.files[:1] * 2) for scene in trainer.scenes]
    trainer.scenes = same
    losses = trainer.training_loss(turns)
    assert all(loss.item() < 1e-12 for loss in losses.values())
    assert all(g.abs().max() < 1e-9 for g in gradients(trainer, losses))


def test_the_halves_of_a_slider_cancel_where_nothing_changes(make):
    trainer = loaded(make())
    trainer.scenes = [s._replace(files=s.files[:1] * 2) for s in trainer.scenes]
    losses = trainer.training_loss(turns_of(trainer))
    one = gradients(trainer, {"after": losses["after"]})
    losses = trainer.training_loss(turns_of(trainer))
    both = [g.abs().max() for g in gradients(trainer, losses)]
    names = [n for n, p in trainer.bare["unet"].named_parameters() if p.requires_grad]
    most = {"down": 0.0, "up": 0.0}
    for name, gradient in zip(names, one, strict=True):
        end = name.split(".")[-2]
        most[end] = max(most[end], gradient.abs().max().item())
    assert most["up"] > 1e-4 and most["down"] == 0  # up is zero, so down has no gradient yet
    assert max(both) < 1e-6


def test_the_copied_adapter_gets_no_gradient_in_the_second_phase(make):
    trainer = shaken(loaded(make(pair_objective="copier")))
    trainer.step = trainer.total_steps() - 1
    losses = trainer.training_loss(turns_of(trainer))
    losses["change"].backward()
    for name, parameter in trainer.bare["unet"].named_parameters():
        if name.endswith("copied"):
            assert parameter.grad is None
        elif name.endswith("change"):
            assert parameter.grad.abs().max() > 0


# --- whole runs -----------------------------------------------------------------------------------


def same_files(a, b):
    ours, theirs = load_file(a), load_file(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("objective", ["slider", "difference", "copier", "joint"])
def test_resume_is_bit_exact(objective, make, tmp_path):
    make(tmp_path / "a", pair_objective=objective).fit()
    make(tmp_path / "b", pair_objective=objective).fit()
    shutil.rmtree(tmp_path / "b/out/checkpoint-4")
    make(tmp_path / "b", pair_objective=objective, resume_from_checkpoint="latest").fit()
    name = script.LORA_FILE
    assert same_files(tmp_path / "a/out" / name, tmp_path / "b/out" / name)
    lines = (tmp_path / "b/out/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]


@pytest.mark.parametrize("export", ["pytorch_lora_weights", "pytorch_lora_weights_kohya"])
def test_both_formats_load_in_diffusers_at_the_trained_strength(export, make, checkpoints):
    trainer = make(lora_rank=4, lora_alpha=2, train_text_encoder=True, export="kohya")
    trainer = shaken(loaded(trainer))
    trainer.save_result(calibrated=False)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(checkpoints["sd"])
    pipeline.load_lora_weights(str(trainer.config.output_dir), weight_name=f"{export}.safetensors")
    ids = script.tokenize(pipeline.tokenizer, ["a photo"])
    lane = [(script.On("change", 1.0),)]
    noisy, t = torch.randn(1, 4, 8, 8), torch.tensor([600])
    with torch.no_grad():
        theirs = pipeline.text_encoder(ids)[0]
        ours = trainer.embeds(["a photo"], lane, trainer.bare)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
        moved = pipeline.unet(noisy, t, encoder_hidden_states=theirs).sample
        mine = trainer.predict(trainer.bare["unet"], noisy, t, theirs, lane)
        plain = trainer.predict(trainer.bare["unet"], noisy, t, theirs, [()])
    torch.testing.assert_close(mine, moved, atol=1e-4, rtol=1e-3)
    assert (plain - mine).abs().max() > 1e-2
    if "kohya" in export:
        found = load_file(trainer.config.output_dir / f"{export}.safetensors")
        alphas = {value.item() for name, value in found.items() if name.endswith(".alpha")}
        assert alphas == {2.0} and all(
            name.startswith(("lora_unet_", "lora_te_")) for name in found
        )


DOCUMENT = """
--use_image_pairs --before_data_dir="{data}/before" --after_data_dir="{data}/after"
--instance_prompt="a photo showing the transformation from before to after state"
--resolution=64 --train_batch_size=1 --max_train_steps=3 --learning_rate=2e-4 --lora_rank=16
"""


def test_the_documents_two_commands(checkpoints, pictures, tmp_path):
    base = ["train_dreambooth_pairs.py", "--pretrained_model_name_or_path", checkpoints["sd"]]
    places = ["--cache_dir", tmp_path / "cache"]
    pairs = [
        word.replace('"', "").format(data=pictures)
        for word in DOCUMENT.replace(" --", "\n--").splitlines()
        if word
    ]
    run(*base, *pairs, *places, "--output_dir", tmp_path / "pairs", launch=LAUNCH)
    single = [
        f"--instance_data_dir={pictures / 'single'}", "--instance_prompt=a photo of [cls]",
        "--resolution=64", "--train_batch_size=1", "--max_train_steps=3", "--learning_rate=2e-4",
        "--lora_rank=16",
    ]  # fmt: skip
    run(*base, *single, *places, "--output_dir", tmp_path / "single", launch=LAUNCH)
    for kind in ("pairs", "single"):
        tensors = load_file(tmp_path / kind / script.LORA_FILE)
        assert next(t for n, t in tensors.items() if ".lora_A." in n).shape[0] == 16
        assert any(t.abs().max() > 0 for n, t in tensors.items() if ".lora_B." in n)


def test_class_pictures_are_drawn_and_keep_the_class(make, pictures, tmp_path):
    trainer = make(
        use_image_pairs=False,
        before_data_dir=None,
        after_data_dir=None,
        instance_data_dir=pictures / "single",
        class_data_dir=tmp_path / "class",
        class_prompt="a thing",
        with_prior_preservation=True,
        num_class_images=3,
        sample_batch_size=2,
    )
    trainer.fit()
    assert len(list((tmp_path / "class").glob("*.png"))) == 3
    turns = turns_of(trainer)
    half = trainer.training_loss(turns)
    assert set(half) == {"instance", "class"}
    trainer.config = trainer.config.model_copy(update={"prior_loss_weight": 0.5})
    assert trainer.training_loss(turns)["class"].item() == pytest.approx(half["class"].item() / 2)


def test_a_sequence_trains_all_its_times(make, pictures, tmp_path):
    shutil.copytree(pictures / "single", tmp_path / "third")
    for file in (tmp_path / "third").glob("*.png"):
        Image.open(file).rotate(180).save(file)
    (tmp_path / "third" / "coffee0.png").unlink()  # a sequence may have holes
    folders = [
        str(folder) for folder in (pictures / "before", pictures / "after", tmp_path / "third")
    ]
    argv = script.repeat_flags(["--sequence_dirs", *folders, "--sequence_scales", "-1,0,1"])
    other = make(before_data_dir=None, after_data_dir=None).config
    config = load_config(
        script.Config,
        [
            *argv,
            *(
                f"--{k}={getattr(other, k)}"
                for k in other.model_fields_set
                if k != "use_image_pairs"
            ),
            "--use_image_pairs",
        ],
    )
    scenes, _, problems = script.find_scenes(config)
    assert not problems and [s.scales for s in scenes] == [(-1, 0, 1), (-1, 0), (-1, 0, 1)]
    trainer = script.DreamBoothPairsTrainer(config)
    trainer.fit()
    turns = [turn for batch in range(20) for turn in turns_of(trainer, batch)]
    assert {(t.low, t.high) for t in turns} == {(0, 1), (0, 2), (1, 2)}


def problems_of(make, **changes):
    config = make(**changes).config
    return "\n".join(script.audit(config))


def test_mistakes_are_named_before_a_model_loads(make, pictures, tmp_path):
    text = problems_of(make, after_data_dir=pictures / "before")
    assert "before and after must differ" in text
    (tmp_path / "empty").mkdir()
    text = problems_of(make, after_data_dir=tmp_path / "empty")
    assert "No matching image pairs found: 3 stems in" in text and "0 stems in" in text
    text = problems_of(make, before_data_dir=tmp_path / "nowhere")
    assert f"Before/After images root doesn't exist: {tmp_path / 'nowhere'}" in text
    shutil.copytree(pictures / "before", tmp_path / "copy")
    assert text.count("\n") == 0
    text = problems_of(make, after_data_dir=tmp_path / "copy")
    assert text.count("are the same picture: no change to learn") == 3
    (tmp_path / "copy/coffee0.png").write_bytes(b"")
    (tmp_path / "copy/chelsea0.png").unlink()
    text = problems_of(make, after_data_dir=tmp_path / "copy", timestep_min=500, timestep_max=100)
    for part in ("chelsea0.* in", "coffee0.png cannot be read", "timestep_min", "hubble0.png and"):
        assert part in text
    with pytest.raises(UserError, match="unknown setting, did you mean 'before_data_dir'"):
        make(before_data_dirs="x")


def test_a_video_that_is_not_there_is_named(make, tmp_path):
    missing = {"before_data_dir": None, "after_data_dir": None, "video": tmp_path / "no.mp4"}
    assert problems_of(make, **missing) == f"video: no file {tmp_path / 'no.mp4'}"


def test_validation_draws_what_the_pipeline_draws(make, checkpoints):
    flags = {"validation_prompt": "a photo", "num_validation_images": 1}
    trainer = shaken(loaded(make(**flags, validation_inference_steps=3)))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(checkpoints["sd"])
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = pipeline(
        "a photo", num_inference_steps=3, guidance_scale=7.5, latents=noise, output_type="latent"
    ).images
    predict = trainer.guided(["a photo", ""])
    ours = script.draw_sd(predict, noise, trainer.scheduler_config, 3, [-1.0, 0.0, 1.0])
    torch.testing.assert_close(ours[1:2], theirs, atol=1e-4, rtol=1e-3)
    assert (ours[0] - ours[1]).abs().max() > 0.1 and (ours[0] - ours[2]).abs().max() > 0.1
    trainer.validate()
    sheet = Image.open(trainer.config.output_dir / "samples/step-000000.png")
    cells = [sheet.crop((8 + k * 264, 24, 72 + k * 264, 88)).tobytes() for k in range(5)]
    assert len(set(cells)) == 5


def test_a_mistake_ends_with_exit_code_2(checkpoints, tmp_path):
    done = run(
        ROOT / "train_dreambooth_pairs.py",
        "--pretrained_model_name_or_path", checkpoints["flux"],
        "--use_image_pairs", "--before_data_dir", tmp_path / "a",
        "--after_data_dir", tmp_path / "b", cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "is a FluxPipeline; wanted Stable Diffusion" in done.stderr
    assert "Before/After images root doesn't exist" in done.stderr


def test_calibration_finds_the_strength_of_one_full_change(make):
    """A base whose score is linear, and an adapter that moves it by a known share of the change."""
    trainer = loaded(make(pair_objective="difference"))
    alpha = trainer.alphas[600]
    scenes = trainer.scenes

    def predict(unet, noisy, t, embeds, lanes):
        strength = lanes[0][0].scale if lanes[0] else 0.0
        turn = script.Turn(0, 0, 0, 1, flip=False)
        pair = [
            trainer.entry(p)["latent"]
            for p in script.fit_scene(trainer.config, scenes[0], trainer.index)
        ]
        change = pair[turn.high] - pair[turn.low]
        share = (1 - alpha) * strength / 2  # at strength 2 the whole change
        return torch.zeros_like(noisy) - share * change * (alpha / (1 - alpha)).sqrt()

    trainer.predict, trainer.scenes = predict, scenes[:1]
    assert trainer.full_change() == pytest.approx(2.0, rel=1e-3)
    assert math.isclose(trainer.config.pair_multiplier, 1.0)
