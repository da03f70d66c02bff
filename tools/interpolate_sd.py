"""Draw the way from one picture to another with Stable Diffusion 1.5; nothing is trained before.

Page: docs/interpolate_sd.md

    python tools/interpolate_sd.py --pretrained_model_name_or_path DIR --image a.png b.png \\
        --prompt "a photo" --frames 9 --output outputs/between.gif
    ... --prompt "a cat" --prompt "a dog"       # what each of the two shows
    ... --fit_steps 100 --even_frames false     # faster
    ... --help | --help fit

Writes between_frame00.png, between_frame01.png ..., the sheet between.png, and of a .gif the
animation, there and back. Run again it draws nothing, or
all frames where one is missing or made with other settings.

DiffMorpher (Zhang et al. 2023, arXiv 2312.07409) with three changes. The products of the two LoRAs
are interpolated, not their factors (which differ by a (1 - a) (B0 - B1)(A0 - A1)). Every step gets
the residuals of both inversions, so the first and the last frame are the two pictures. Frames are
spaced by the distance of pictures.

Shapes: H W pixels in [-1, 1], latents (1, 4, h, w), h w = H/8 W/8, text (1, 77, 768).
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from generate import decibels, fit_photo, read_settings, save_picture
from utils import (
    Section,
    UserError,
    cache_key,
    check_setup,
    contact_sheet,
    hash_file,
    load_config,
    load_script,
    load_tool,
    normal,
    open_rgb,
    progress,
    read_model_json,
    run_script,
    save_atomic,
    uniform,
)

ENDS = ("first", "last")  # adapters, one fitted to each picture


# --- 1. between two latents -----------------------------------------------------------------------


def slerp(first: torch.Tensor, last: torch.Tensor, share: float) -> torch.Tensor:
    """Return (sin((1 - a) w) first + sin(a w) last) / sin(w), w the angle between the tensors.

    Noises keep their length on the way, which a straight line shortens (Shoemake 1985). fp64
    inside; norms are not made equal.
    """
    a, b = first.double(), last.double()
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = cosine.clamp(-1 + 1e-7, 1 - 1e-7).acos()
    mixed = torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b
    return (mixed / torch.sin(angle)).to(first.dtype)


def adain(x: torch.Tensor, first: torch.Tensor, last: torch.Tensor, share: float) -> torch.Tensor:
    """Return x (1, C, h, w) with each channel's mean and std between those of the ends."""
    mean, std = (
        torch.lerp(f(first), f(last), share)
        for f in (lambda z: z.mean((2, 3), keepdim=True), lambda z: z.std((2, 3), keepdim=True))
    )
    return (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True) * std + mean


def even_shares(shares: Sequence[float], distances: Sequence[float]) -> list[float]:
    """Return new places of frames, equally far apart; distances: between neighbours at `shares`.

    Inverts the distance from the first frame, taken as linear between two frames.
    """
    way = np.concatenate([[0.0], np.cumsum(distances)])
    if way[-1] == 0:
        return list(shares)
    return np.interp(np.linspace(0, way[-1], len(shares)), way, shares).tolist()


class EndsAttention:
    """Self-attention of one layer whose keys and values may come from both ends' hidden states.

    role 0 or 1: this is an end, remember what it looks at; a share: look at the mix of both.
    """

    def __init__(self, plain: Any) -> None:
        self.plain = plain
        self.seen: dict[int, torch.Tensor] = {}
        self.role: int | float | None = None

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, **rest: Any
    ) -> torch.Tensor:
        """Return what the layer's own processor makes of it; hidden_states (B, S, C)."""
        if isinstance(self.role, int):
            self.seen[self.role] = hidden_states
        elif self.role is not None:
            encoder_hidden_states = torch.lerp(self.seen[0], self.seen[1], self.role)
        return self.plain(attn, hidden_states, encoder_hidden_states, **rest)


# --- 2. a LoRA for each of the two pictures -------------------------------------------------------


class FitConfig(Section):
    """The LoRA that is fitted to each of the two pictures; it is kept beside output."""

    fit_steps: int = Field(200, ge=1, le=100_000)
    """Steps of AdamW on the LoRA that is fitted to each picture."""
    fit_rank: int = Field(16, ge=1, le=4096)
    """Rank of the LoRA that is fitted to each picture."""
    fit_learning_rate: float = Field(2e-4, gt=0)
    """Learning rate of the LoRA that is fitted to each picture."""


def fit_file(config: Config, end: int, size: tuple[int, int]) -> Path:
    """Return where the LoRA of one picture lies; its name holds all that decides it."""
    names = {*FitConfig.model_fields, "pretrained_model_name_or_path", "dtype", "seed"}
    photo, settings = config.image[end], config.model_dump(mode="json", include=names)
    settings |= {"photo": hash_file(photo), "size": size, "prompt": config.said[end]}
    settings["script"] = hash_file(Path(sd_script(config.script).__file__))
    key = cache_key("fitted", **settings)
    return config.output.with_name(f"{photo.stem}-fitted-{key[:16]}.safetensors")


def fit_lora(morph: Morph, end: int) -> dict[str, torch.Tensor]:
    """Fit a LoRA on attention that draws one picture: plain noise loss; diffusers' names.

    Its draws belong to the seed alone, so the picture's LoRA is the same at either end.
    """
    sd, unet, config = morph.sd, morph.unet, morph.config
    rank, seed, targets = config.fit_rank, config.seed, sd.TARGETS["attention"]
    sd.add_adapter(unet, morph.switch, "fit", targets, rank, rank, seed)
    morph.switch.parts = [(sd.Active("fit"),)]
    layers = sd.adapted_layers(unet, "fit").values()
    factors = [factor for x in layers for factor in (x.down["fit"], x.up["fit"])]
    optimizer = torch.optim.AdamW(factors, lr=config.fit_learning_rate)
    latents, alphas = morph.latents[end], morph.alphas
    for step in progress(range(config.fit_steps), f"fit {ENDS[end]}", unit="step", leave=False):
        t = torch.tensor([int(uniform(seed, "fit level", step) * len(alphas))])
        noise = normal(latents.shape, seed, "fit noise", step).to(latents)
        noisy = sd.mix_noise(latents, noise, alphas[t].to(latents))
        predicted = sd.predict_noise(unet, noisy, t.to(latents.device), morph.embeds[end])
        F.mse_loss(predicted, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
    tensors = sd.adapter_tensors({"unet": unet}, "fit", 1.0)
    for layer in layers:
        del layer.down["fit"], layer.up["fit"], layer.strength["fit"]
    return tensors


# --- 3. the frames --------------------------------------------------------------------------------

ATTENTION_SHARE = 0.6  # EDIT HERE: share of the steps in which frames look at both ends


class FramesConfig(Section):
    """How the way is drawn."""

    frames: int = Field(9, ge=3, le=100_000)
    """Number of frames, the two pictures included."""
    even_frames: bool = True
    """Space the frames equally far apart, which draws them twice."""
    num_inference_steps: int = Field(50, ge=1, le=500)
    """DDIM steps of a picture; more is slower and finer."""
    restore_detail: bool = False
    """Add what the VAE loses of the two pictures, picture - decode(encode(picture))."""


class Morph:
    """Two pictures, inverted with a LoRA of their own each, and what lies between them."""

    @torch.no_grad()
    def __init__(self, sd: Any, config: Config) -> None:
        import diffusers

        folder = sd.fetch_sd(config.pretrained_model_name_or_path)
        self.sd, self.config = sd, config
        device, dtype = pick_device(config.device), torch.float32
        if config.dtype == "bf16" or (config.dtype is None and device.type != "cpu"):
            dtype = torch.bfloat16
        images = [fit_photo(file, frame_size(sd, config)) for file in config.image]
        self.pixels = [sd.to_pixels(image).to(device) for image in images]
        texts = sd.encode_prompts(folder, config.said, dtype, device)
        self.embeds = [texts[prompt][1] for prompt in config.said]
        self.vae = sd.load_part(folder, "vae", dtype, device)
        self.latents = [sd.encode_sd(self.vae, x) for x in self.pixels]
        self.kept = [sd.decode_sd(self.vae, x) for x in self.latents]
        scheduler_config = read_model_json(str(folder), "scheduler/scheduler_config.json")
        self.levels = sd.sd_levels(scheduler_config, config.num_inference_steps)
        self.alphas = diffusers.DDPMScheduler.from_config(scheduler_config).alphas_cumprod
        self.switch = sd.AdapterSwitch()
        self.unet = sd.load_part(folder, "unet", dtype, device)
        self.attach_loras()
        self.attention = self.attach_attention()
        self.paths, self.means = zip(*(self.invert(end) for end in (0, 1)), strict=True)

    @torch.enable_grad()
    def attach_loras(self) -> None:
        """Fit what is not there from an earlier run; give the UNet the adapters of ENDS."""
        for end, name in enumerate(ENDS):
            file = fit_file(self.config, end, frame_size(self.sd, self.config))
            if not file.is_file():
                about = {"photo": self.config.image[end].name}
                self.sd.save_lora(file, fit_lora(self, end), about)
            self.sd.load_adapter({"unet": self.unet}, self.switch, name, file)

    def attach_attention(self) -> dict[str, EndsAttention]:
        """Let the upper half's self-attention look at both ends; return it by layer."""
        plain = self.unet.attn_processors
        upper = [name for name in plain if name.startswith("up_blocks") and ".attn1." in name]
        attention = {name: EndsAttention(plain[name]) for name in upper}
        self.unet.set_attn_processor(plain | attention)
        return attention

    def invert(self, end: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return (path, means) of an end under its own LoRA, DDIM; see follow_path()."""
        predict = functools.partial(self.predict, share=float(end))
        path = self.sd.ddim_path(self.latents[end], self.levels, predict)
        return path, self.sd.path_means(path, self.levels, predict, 0.0)

    def predict(
        self, x: torch.Tensor, t: int, share: float, role: int | float | None = None
    ) -> torch.Tensor:
        """Return the noise of a model that is (1 - share) the first picture's, share the last's."""
        for layer in self.attention.values():
            layer.role = role
        scales = zip(ENDS, (1.0 - share, share), strict=True)
        self.switch.parts = [tuple(self.sd.Active(name, scale) for name, scale in scales)]
        embeds = torch.lerp(self.embeds[0], self.embeds[1], share)
        return self.sd.predict_noise(self.unet, x, torch.tensor([t], device=x.device), embeds)

    @torch.no_grad()
    def draw(self, shares: Sequence[float]) -> list[torch.Tensor]:
        """Return pixels (1, 3, H, W) at every share, from 0 to 1; step by step, the ends first."""
        first, last = (path[0] for path in self.paths)
        frames = [adain(slerp(first, last, a), first, last, a) for a in shares]
        frames[0], frames[-1] = first, last  # the same, but for rounding
        end = len(shares) - 1
        mixed = round(ATTENTION_SHARE * len(self.levels))
        bar = progress(self.levels, "between", unit="step", leave=False)
        for k, (t, alpha, following) in enumerate(bar):
            for n in (0, end, *range(1, end)):
                role = {0: 0, end: 1}.get(n, shares[n]) if k < mixed else None
                noise = self.predict(frames[n], t, shares[n], role)
                mean = self.sd.step_mean(frames[n], noise, alpha, following, 0.0)
                wanted = torch.lerp(self.paths[0][k + 1], self.paths[1][k + 1], shares[n])
                own = torch.lerp(self.means[0][k], self.means[1][k], shares[n])
                frames[n] = wanted + (mean - own)
        pixels = [self.sd.decode_sd(self.vae, x) for x in frames]
        if self.config.restore_detail:
            one, other = (a - b for a, b in zip(self.pixels, self.kept, strict=True))
            pixels = [x + torch.lerp(one, other, a) for x, a in zip(pixels, shares, strict=True)]
        return pixels

    def draw_evenly(self, shares: list[float]) -> tuple[list[float], list[torch.Tensor]]:
        """Return (shares, pixels): drawn, and with even_frames measured and drawn again."""
        pixels = self.draw(shares)
        if self.config.even_frames:
            pairs = itertools.pairwise(pixels)  # EDIT HERE: the distance of two pictures
            shares = even_shares(shares, [(b - a).square().mean().sqrt().item() for a, b in pairs])
            pixels = self.draw(shares)
        return shares, pixels


def pick_device(name: str | None) -> torch.device:
    """Return the named device, or the fastest there is."""
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device(name) if name else here or torch.device("cpu")


def frame_size(sd: Any, config: Config) -> tuple[int, int]:
    """Return (W, H) px of the frames: the bucket of the first picture."""
    first = open_rgb(config.image[0])
    return sd.nearest_bucket(first.width, first.height, config.resolution)


# --- 4. files -------------------------------------------------------------------------------------


def frame_files(config: Config) -> list[Path]:
    """Return the file of every frame."""
    output = config.output
    return [output.with_name(f"{output.stem}_frame{n:02d}.png") for n in range(config.frames)]


def draw_frames(sd: Any, config: Config) -> None:
    """Draw all frames where one is missing, then the sheet, the page, the animation."""
    files, last = frame_files(config), config.frames - 1
    paths = {"image", "output", "script", "html", "device"}
    settings = config.model_dump(mode="json", exclude=paths) | {
        "script": hash_file(Path(sd.__file__))
    }
    images = [{"file": str(file), "blake2b": hash_file(file)} for file in config.image]
    decides = {"settings": settings, "photos": [image["blake2b"] for image in images]}
    plan = [decides | {"frame": n} for n in range(config.frames)]
    pairs = zip(files, plan, strict=True)
    made = all(about.items() <= read_settings(file).items() for file, about in pairs)
    print(f"{len(files)} frame(s), {'all' if made else 'not all'} already there")
    if not made:
        morph = Morph(sd, config)
        shares, pixels = morph.draw_evenly([n / last for n in range(config.frames)])
        wanted = morph.pixels if config.restore_detail else morph.kept
        ends_db = [round(decibels(pixels[end], wanted[end]), 1) for end in (0, -1)]
        kind = "the pictures" if config.restore_detail else "decode(encode(picture))"
        print(f"the ends are {kind} at {ends_db[0]} and {ends_db[1]} dB")
        for n, x in enumerate(pixels):
            about = {"images": images, "share": round(shares[n], 6), "ends_db": ends_db}
            save_picture(files[n], sd.to_image(x[0]), plan[n] | about)
    heads = [file.stem[-7:] for file in files]
    frames = [open_rgb(file) for file in files]
    names = " to ".join(file.name for file in config.image)
    sheet = config.output.with_suffix(".png")
    picture = contact_sheet([frames], heads, [f"{names}, {config.frames} frames"])
    save_picture(sheet, picture, {"pictures": cache_key("sheet", plan=plan)})
    if config.html:
        page = load_tool("page")
        columns = dict(zip(heads, files, strict=True))
        row = page.PageRow(names, columns, " -> ".join(dict.fromkeys(config.said)), config.seed)
        page.write_page(sheet.with_suffix(".html"), sheet.stem, [row])
    if config.output.suffix == ".gif":
        frames += frames[-2:0:-1]  # and back
        options: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "loop": 0}
        options |= {"format": "GIF", "duration": 1000 // 12}  # ms a frame
        save_atomic(config.output, lambda file: frames[0].save(file, **options))
    print(f"{config.output}: {config.frames} frames, sheet {sheet}")


# --- 5. config, main ------------------------------------------------------------------------------


class Config(FramesConfig, FitConfig):
    """interpolate_sd.py: the way from one picture to another, in frames."""

    pretrained_model_name_or_path: str
    """Stable Diffusion 1.x: a folder in diffusers layout, or a Hub id."""
    image: list[Path]
    """The two pictures: --image FIRST LAST."""
    prompt: list[str] = []
    """What the pictures show: one prompt for both, or one for each; [] is the empty one."""
    output: Path
    """FILE.png: the sheet, with the frames beside it. FILE.gif: an animation as well."""
    resolution: int = Field(512, ge=64, le=8192, multiple_of=64)
    """Side of the square whose area the frames have, px; the first picture's aspect is kept."""
    seed: int = 0
    """Seed of the LoRAs that are fitted; nothing else is drawn by chance."""
    html: bool = False
    """Also write a page beside the sheet, .html: a divider to drag, a slider over the frames."""
    device: str | None = None
    """Device, e.g. cuda or cpu; null is the fastest there is."""
    dtype: Literal["bf16", "fp32"] | None = None
    """Precision of the UNet and the text encoder; null is bf16, on a CPU fp32."""
    script: Path | None = None
    """Training script whose Stable Diffusion is used; null is train_dreambooth_pairs.py."""

    @property
    def said(self) -> list[str]:
        """Return the prompt of each picture."""
        return (self.prompt or [""]) * (2 if len(self.prompt) < 2 else 1)

    def rules(self) -> dict[str, Any]:
        """Return {problem: whether it is there}."""
        ends = self.output.suffix in (".png", ".gif")
        results = [self.output, self.output.with_suffix(".png"), *frame_files(self)]
        taken = {file.resolve() for file in results} & {file.resolve() for file in self.image}
        return {
            f"image: two are wanted, not {len(self.image)}": len(self.image) != 2,
            "prompt: one, or one for each picture": len(self.prompt) > 2,
            f"output: {self.output} must end in .png or .gif": not ends,
            f"output: {', '.join(map(str, taken))} would be overwritten": taken,
        }


@functools.cache
def sd_script(path: Path | None) -> Any:
    """Import the training script that draws. Raises UserError."""
    return load_script(path or Path(__file__).parent.parent / "train_dreambooth_pairs.py")


def check(config: Config) -> list[str]:
    """Return what can be known to be wrong before a model loads."""
    problems = sd_script(config.script).check_base(config.pretrained_model_name_or_path)
    problems += check_setup(
        writes={"output": config.output.parent}, devices={"device": config.device}
    )
    for file in config.image:
        try:
            open_rgb(file)
        except UserError as error:
            problems.append(f"image: {error}")
    return problems


def main() -> None:
    """Read the settings, draw the frames."""
    config = load_config(Config, check=check)
    draw_frames(sd_script(config.script), config)


if __name__ == "__main__":
    run_script(main)
