"""tools/interpolate_sd.py: the frames between two pictures, and that the ends are the pictures."""

import copy
import itertools

import numpy as np
import pytest
import torch
from conftest import PAIRS, ROOT, read_page, run
from PIL import Image, ImageOps

from utils import UserError, load_config, load_script

TOOL = ROOT / "tools" / "interpolate_sd.py"
tool = load_script(TOOL)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name in ("coffee0", "chelsea0"):
        Image.open(PAIRS / f"{name}_R.png").convert("RGB").save(folder / f"{name}.png")
    return [folder / "coffee0.png", folder / "chelsea0.png"]


def configured(checkpoints, photos, output, *flags):
    """A config on the tiny model, audited."""
    argv = ["--pretrained_model_name_or_path", checkpoints["sd"], "--image", *photos]
    argv += ["--output", output, "--resolution", 64, "--device", "cpu", *flags]
    return load_config(tool.Config, list(map(str, argv)), check=tool.check)


# --- the formulas ---------------------------------------------------------------------------------


def test_slerp_and_adain_are_their_formulas():
    def mix(a, b, share):
        return tool.slerp(torch.tensor(a), torch.tensor(b), share).tolist()

    assert mix([1.0, 0.0], [0.0, 1.0], 0.25) == pytest.approx([0.92387953, 0.38268343])
    assert mix([2.0, 0, 0], [0, 3.0, 0], 0.5) == pytest.approx([1.41421356, 2.12132034, 0])
    assert mix([1.0, 2.0], [1.0, 2.0], 0.3) == pytest.approx([1, 2], abs=1e-3)
    first, last = torch.randn(1, 4, 8, 8), 3 * torch.randn(1, 4, 8, 8) + 2
    x = tool.adain(tool.slerp(first, last, 0.3), first, last, 0.3)
    for of in (torch.mean, torch.std):
        wanted = 0.7 * of(first, (2, 3)) + 0.3 * of(last, (2, 3))
        torch.testing.assert_close(of(x, (2, 3)), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tool.adain(first, first, last, 0.0), first, atol=1e-5, rtol=1e-5)


def test_frames_become_evenly_spaced():
    shares = np.linspace(0, 1, 9)

    def way(share):  # a picture that changes late
        return np.asarray(share) ** 4

    before = np.diff(way(shares))
    after = np.diff(way(tool.even_shares(shares, before)))
    assert before.max() / before.mean() > 3 and after.max() / after.mean() < 1.4
    assert tool.even_shares(shares, np.diff(shares)) == pytest.approx(shares)
    assert tool.even_shares([0, 0.5, 1], [0, 0]) == [0, 0.5, 1]


# --- a morph --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def morph(checkpoints, photos, tmp_path_factory):
    """A quiet UNet, LoRAs of a few steps."""
    output = tmp_path_factory.mktemp("morph") / "o.png"
    flags = ["--frames", 5, "--fit_steps", 40, "--fit_learning_rate", 5e-3, "--fit_rank", 4]
    flags += ["--prompt", "a person", "--num_inference_steps", 10, "--seed", 3]
    config = configured(checkpoints, photos, output, *flags)
    sd = tool.sd_script(None)
    load = sd.load_part

    def load_quietly(folder, part, dtype, device):
        model = load(folder, part, dtype, device)
        if part == "unet":
            model.conv_out.weight.data *= 0.1  # random weights make any path chaotic
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sd, "load_part", load_quietly)
        return tool.Morph(sd, config)


def test_a_fitted_lora_learns_its_picture(morph):
    sd = morph.sd

    @torch.no_grad()
    def loss(*active):
        morph.switch.parts = [active]
        draw, errors = torch.Generator().manual_seed(0), []
        for t in range(25, 1000, 25):
            noise = torch.randn(morph.latents[0].shape, generator=draw)
            noisy = sd.mix_noise(morph.latents[0], noise, morph.alphas[[t]])
            predicted = sd.predict_noise(morph.unet, noisy, torch.tensor([t]), morph.embeds[0])
            errors.append((predicted - noise).square().mean().item())
        return np.mean(errors)

    assert loss(sd.Active("first")) < 0.995 * loss()


def test_the_products_of_the_loras_are_interpolated(morph):
    """Not their factors: those differ by a (1 - a) (B0 - B1)(A0 - A1)."""
    share = 0.3
    with torch.no_grad():
        morph.predict(morph.latents[0], 500, share)  # turns the switch
    layer = morph.unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
    layer = copy.deepcopy(layer)
    layer.switch.parts = morph.switch.parts
    factors = [part[end] for end in tool.ENDS for part in (layer.down, layer.up)]
    a0, b0, a1, b1 = (x.data.normal_() for x in factors)
    x = torch.randn(7, a0.shape[1])
    with torch.no_grad():
        ours = layer(x[None])[0] - layer.base(x)
    product = torch.lerp(b0 @ a0, b1 @ a1, share)
    factors = torch.lerp(b0, b1, share) @ torch.lerp(a0, a1, share)
    torch.testing.assert_close(ours, x @ product.T, atol=1e-3, rtol=1e-4)
    gap = share * (1 - share) * (b0 - b1) @ (a0 - a1)
    torch.testing.assert_close(product - factors, gap, atol=1e-4, rtol=1e-4)
    assert gap.norm() > 0.05 * product.norm()


def test_the_ends_are_the_pictures_and_the_rest_lies_between(morph):
    shares = [0.0, 0.25, 0.5, 0.75, 1.0]
    frames = morph.draw(shares)
    assert tool.decibels(frames[0], morph.kept[0]) > 80
    assert tool.decibels(frames[-1], morph.kept[1]) > 80
    span = (frames[0] - frames[-1]).square().mean().sqrt()
    for end, order in ((0, 1), (-1, -1)):
        away = [(x - frames[end]).square().mean().sqrt().item() for x in frames]
        assert away[::order] == sorted(away) and max(away) <= span
    steps = [(b - a).square().mean().sqrt().item() for a, b in itertools.pairwise(frames)]
    moved = morph.draw(tool.even_shares(shares, steps))
    even = [(b - a).square().mean().sqrt().item() for a, b in itertools.pairwise(moved)]
    assert np.std(even) / np.mean(even) < np.std(steps) / np.mean(steps)


def test_frames_look_at_both_ends_in_the_first_steps_only(morph):
    seen = []
    layer = next(iter(morph.attention.values()))
    plain = layer.plain

    def look(attn, hidden_states, encoder_hidden_states=None, **rest):
        seen.append((layer.role, encoder_hidden_states is not None))
        return plain(attn, hidden_states, encoder_hidden_states, **rest)

    layer.plain = look
    morph.draw([0.0, 0.5, 1.0])
    layer.plain = plain
    steps = [seen[k : k + 3] for k in range(0, len(seen), 3)]
    assert steps == [[(0, False), (1, False), (0.5, True)]] * 6 + [[(None, False)] * 3] * 4
    assert all("up_blocks" in name and ".attn1." in name for name in morph.attention)


# --- the command ----------------------------------------------------------------------------------


def test_a_morph_is_made_once_and_its_loras_are_kept(checkpoints, photos, tmp_path):
    output = tmp_path / "out/m.gif"
    argv = ["--pretrained_model_name_or_path", checkpoints["sd"], "--resolution", 64]
    argv += ["--image", *photos, "--prompt", "a cup", "--prompt", "a cat", "--restore_detail"]
    argv += ["--frames", 4, "--fit_steps", 2, "--num_inference_steps", 4, "--output", output]
    run(TOOL, *argv, "--html", cwd=tmp_path)
    frames = [f"m_frame0{n}.png" for n in range(4)]

    def times():
        return {file.name: file.stat().st_mtime_ns for file in output.parent.iterdir()}

    before = times()
    fitted = {name for name in before if "fitted" in name}
    assert len(fitted) == 2 and before.keys() - fitted == {"m.gif", "m.png", "m.html", *frames}
    for frame, photo in ((frames[0], photos[0]), (frames[3], photos[1])):
        with Image.open(photo) as picture:
            wanted = np.asarray(ImageOps.fit(picture, (64, 64), Image.Resampling.LANCZOS), int)
        assert np.abs(np.asarray(Image.open(output.with_name(frame))) - wanted).max() <= 1
    assert Image.open(output).n_frames == 6
    [(_, columns)] = read_page(output.with_name("m.html"))
    assert [file.name for file in columns.values()] == frames
    run(TOOL, *argv, cwd=tmp_path)
    assert all(times()[name] == before[name] for name in [*frames, *fitted])
    run(TOOL, *argv, "--even_frames", "false", cwd=tmp_path)
    assert all(times()[name] > before[name] for name in frames)
    assert {name for name in times() if "fitted" in name} == fitted
    assert all(times()[name] == before[name] for name in fitted)


def test_mistakes_are_named_before_a_model_loads(checkpoints, photos, tmp_path):
    def said(images, output, *flags):
        with pytest.raises(UserError) as error:
            configured(checkpoints, images, tmp_path / output, *flags)
        return str(error.value)

    text = said(photos[:1], "o.jpg", *["--prompt", "x"] * 3)
    assert "image: two" in text and "prompt: one" in text and "o.jpg" in text
    text = said([photos[0], tmp_path / "no.png"], "o.png", "--device", "cuda:9")
    assert f"{tmp_path / 'no.png'}" in text and "cuda:9" in text
    frame = tmp_path / "o_frame01.png"
    frame.write_bytes(photos[0].read_bytes())
    assert str(frame) in said([photos[0], frame], "o.png")
    assert "pretrained_model_name_or_path" in said(
        photos, "o.png", "--pretrained_model_name_or_path", checkpoints["2511"]
    )
    assert "no.py" in said(photos, "o.png", "--script", "no.py")
