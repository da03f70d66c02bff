"""See it work on a laptop: cache, train a LoRA, generate, score, in minutes on two CPU cores.

    python demo.py              # the whole demo with the real commands; picture: outputs/demo/demo.png
    python demo.py --rebuild    # make the tiny base model in demo/qwen_edit_base again, from nothing

The base is a real QwenImageEditPlusPipeline (2511 type) with 2 million parameters. It can only copy
its reference; the edit is learned by the LoRA from ten photo pairs and judged on three other photos.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from tqdm.auto import tqdm
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

ROOT = Path(__file__).resolve().parent
PAIRS_DIR = Path("data/photo_pairs")
BASE_DIR = Path("demo/qwen_edit_base")
CONFIG = Path("configs/demo_qwen_edit.yaml")
OUTPUT_DIR = Path("outputs/demo")
HELD_OUT = ("astronaut0", "chelsea1", "coffee2")  # neither the base nor the LoRA ever sees them
SIZES_PX = ((160, 160), (192, 128), (128, 192))  # (W, H) buckets of configs/demo_qwen_edit.yaml
VISION_PX = 64  # side of the picture shown to the text encoder
NUM_INFERENCE_STEPS = 6
LATENT_CHANNELS = 16
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
NEUTRAL_PROMPTS = (
    "keep the picture as it is",
    "copy this",
    "a photo of a cat on the table",
    "make the sky darker",
    "replace the background",
    "add a red circle",
    "remove the cup from the table",
    "change the style of the picture",
)


# --- 1. text encoder, tokenizer, processor ---------------------------------------------------------


def build_tokenizer() -> Any:
    """Qwen2Tokenizer whose small vocabulary holds every word of the Plus pipeline's template.

    The pipeline drops the first 64 tokens (the system prompt), so those words must be whole tokens.
    """
    pipeline = diffusers.QwenImageEditPlusPipeline(*[None] * 6)
    template = pipeline.prompt_template_encode.replace("{}", "")
    pieces = [piece for piece in re.split(r"<\|[a-z_]+\|>", template) if piece]
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=0,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator([*pieces, *NEUTRAL_PROMPTS, "Picture 1: ", "Picture 2: "], trainer)
    model = json.loads(bpe.to_str())["model"]
    vocab = model["vocab"] | {t: len(model["vocab"]) + i for i, t in enumerate(SPECIAL_TOKENS)}
    return transformers.Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS[1:],
        model_max_length=131072,
    )


def build_text_encoder(tokenizer: Any, hidden: int = 64, layers: int = 2) -> Any:
    """Random Qwen2.5-VL (language and vision), embeddings of width `hidden`; 0.2 M parameters."""
    token_id = tokenizer.convert_tokens_to_ids
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": math.ceil(len(tokenizer) / 64) * 64,
            "hidden_size": hidden,
            "intermediate_size": hidden * 2,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 16,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [2, 3, 3],
                "rope_theta": 1e6,
            },
            "bos_token_id": token_id("<|endoftext|>"),
            "eos_token_id": token_id("<|im_end|>"),
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


class ImageOnlyQwen2VLProcessor(transformers.Qwen2VLProcessor):
    """Qwen2VLProcessor for stills: the stock one wants torchvision for videos."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
    ) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        transformers.ProcessorMixin.__init__(
            self, image_processor, tokenizer, chat_template=chat_template
        )


def build_processor(tokenizer: Any) -> ImageOnlyQwen2VLProcessor:
    """Pictures down to 56 x 56 px (4 tokens) are taken."""
    pictures = transformers.Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
    return ImageOnlyQwen2VLProcessor(image_processor=pictures, tokenizer=tokenizer)


def save_processor(processor: Any, folder: Path) -> None:
    """The Hub's layout, with a video config, so that the stock class loads it too."""
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["processor_class"] = "Qwen2VLProcessor"
    pictures = settings | {"image_processor_type": "Qwen2VLImageProcessor"}
    videos = {k: v for k, v in settings.items() if k != "image_processor_type"}
    videos["video_processor_type"] = "Qwen2VLVideoProcessor"
    for name, content in (("preprocessor", pictures), ("video_preprocessor", videos)):
        (folder / f"{name}_config.json").write_text(json.dumps(content, indent=2) + "\n")


# --- 2. autoencoder: a linear transform inside the stock class -------------------------------------


class Convolution(nn.Module):
    """3x3 (or 1x1) convolution; its weight is a matrix, which is what Muon wants."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.shape, self.stride = (outputs, inputs, kernel, kernel), stride
        self.weight = nn.Parameter(torch.empty(outputs, inputs * kernel * kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.orthogonal_(self.weight)

    def kernel(self) -> torch.Tensor:
        """(outputs, inputs, k, k)."""
        return self.weight.view(self.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        padding = self.shape[-1] // 2
        if self.stride == 2:  # as the stock class pads
            x, padding = F.pad(x, (0, 1, 0, 1)), 0
        return F.conv2d(x, self.kernel(), self.bias, self.stride, padding)


class LinearAutoencoder(nn.Module):
    """AutoencoderKLQwenImage of one channel width without its norms, activations and residuals.

    A random network of this size learns pictures far too slowly; this linear part of it is fitted
    in two minutes and then copied into the stock class, which computes the same.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        inner, half = width - 1, width // 2  # the last channel is needed by to_stock_vae
        self.conv_in = Convolution(3, inner)
        self.down = nn.ModuleList(
            Convolution(inner, n, stride=2) for n in (inner, inner, LATENT_CHANNELS)
        )
        self.to_latents = Convolution(LATENT_CHANNELS, LATENT_CHANNELS)
        self.from_latents = Convolution(LATENT_CHANNELS, width)
        self.up = nn.ModuleList(Convolution(width, half) for _ in range(3))
        self.widen = nn.ModuleList(
            Convolution(half, n, kernel=1) for n in (width, width, inner // 2)
        )
        self.conv_out = Convolution(inner // 2, 3)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 16, H/8, W/8)."""
        x = self.conv_in(pixels)
        for layer in self.down:
            x = layer(x)
        return self.to_latents(x)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, 16, h, w) -> (B, 3, 8h, 8w)."""
        x = self.from_latents(latents)
        for up, widen in zip(self.up, self.widen, strict=True):
            x = widen(up(F.interpolate(x, scale_factor=2.0, mode="nearest-exact")))
        return self.conv_out(x)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Reconstruction, (B, 3, H, W)."""
        return self.decode(self.encode(pixels))


def build_vae(base_dim: int = 8, latents_std: tuple[float, ...] | None = None) -> Any:
    """Random AutoencoderKLQwenImage with one channel width and no residual blocks in its levels."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=base_dim,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=0,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=list(latents_std or [1.0] * LATENT_CHANNELS),
    ).eval()


def pink_noise(rng: np.random.RandomState, side_px: int, slope: float) -> np.ndarray:
    """(side, side) texture of unit deviation, amplitude ~ 1 / frequency^slope."""
    fy, fx = np.fft.fftfreq(side_px)[:, None], np.fft.rfftfreq(side_px)[None]
    amplitude = np.maximum(np.hypot(fy, fx), 1 / side_px) ** -slope
    texture = np.fft.irfft2(np.fft.rfft2(rng.randn(side_px, side_px)) * amplitude)
    return (texture / texture.std()).astype(np.float32)


def draw_leaves(rng: np.random.RandomState, side_px: int, leaves: int = 40) -> np.ndarray:
    """Shaded ellipses and boxes hiding each other: the statistics of photos without any photo.

    Returns (side, side, 3) in [-1, 1].
    """
    y, x = np.mgrid[0:side_px, 0:side_px].astype(np.float32)
    textures = [pink_noise(rng, side_px, rng.uniform(1.0, 1.6))[..., None] for _ in range(3)]
    image = rng.uniform(-0.8, 0.8, 3) + textures[0] * rng.uniform(0, 0.3)
    for _ in range(leaves):
        radius = min(0.6 * side_px, 2.5 / (rng.rand() + 0.02) ** 0.8)
        angle, aspect = rng.uniform(0, np.pi), rng.uniform(0.3, 1)
        dx, dy = x - rng.uniform(0, side_px), y - rng.uniform(0, side_px)
        u = dx * np.cos(angle) + dy * np.sin(angle)
        v = (dy * np.cos(angle) - dx * np.sin(angle)) / aspect
        distance = np.hypot(u, v) if rng.rand() < 0.6 else np.maximum(abs(u), abs(v))
        cover = np.clip(0.5 - (distance - radius) / rng.uniform(0.7, 4), 0, 1)[..., None]
        colour = rng.uniform(-0.9, 0.9) + rng.randn(3) * 0.25 * rng.rand()
        shade = (u * rng.randn() + v * rng.randn())[..., None] / (0.6 * side_px)
        colour = colour + shade + textures[rng.randint(3)] * rng.uniform(0, 0.12)
        image = image * (1 - cover) + cover * colour
    return np.clip(image, -1, 1).astype(np.float32)


def to_pixels(images: list[np.ndarray]) -> torch.Tensor:
    """(H, W, 3) arrays in [-1, 1] -> (B, 3, H, W)."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices, the rest)."""
    parameters = list(module.parameters())
    return [p for p in parameters if p.dim() == 2], [p for p in parameters if p.dim() != 2]


def fit_autoencoder(rng: np.random.RandomState, steps: int, width: int) -> LinearAutoencoder:
    """Least squares on synthetic images.

    Muon instead of Adam: every layer is ill conditioned because low frequencies dominate pictures.
    """
    leaves = to_pixels([draw_leaves(rng, 96) for _ in tqdm(range(600), "synthetic images")])
    model = LinearAutoencoder(width)
    matrices, biases = split_parameters(model)
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0)
    adam = torch.optim.Adam(biases, lr=1e-3)
    decay = [torch.optim.lr_scheduler.PolynomialLR(o, steps, power=1.3) for o in (muon, adam)]
    bar = tqdm(range(steps), "autoencoder")
    for _ in bar:
        top, left = rng.randint(0, 33, 2)
        batch = leaves[rng.randint(0, len(leaves), 16), :, top : top + 64, left : left + 64]
        loss = F.mse_loss(model(batch), batch)
        model.zero_grad()
        loss.backward()
        for step in (muon, adam, *decay):
            step.step()  # type: ignore[attr-defined]
        bar.set_postfix(db=f"{10 * math.log10(4 / loss.item()):.1f}", refresh=False)
    return model


@torch.no_grad()
def latent_basis(
    model: LinearAutoencoder, pixels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Principal axes of the latents, measured in pixels: (mean (16,), rotation (16, 16), std (16,)).

    New latents are rotation @ (old - mean). The std that the pipeline divides by is the square root
    of the axes' own deviation: a prediction error that is equal in all channels then costs the
    fewest pixel errors.
    """
    latents = model.encode(pixels)
    mean = latents.mean((0, 2, 3))
    centred = (latents - mean[:, None, None]).transpose(0, 1).flatten(1)  # (16, B h w)
    covariance = centred @ centred.T / centred.shape[1]
    impulses = torch.zeros(LATENT_CHANNELS, LATENT_CHANNELS, 9, 9)
    impulses[range(LATENT_CHANNELS), range(LATENT_CHANNELS), 4, 4] = 1
    footprint = (model.decode(impulses) - model.decode(impulses * 0)).flatten(1)  # (16, pixels)
    metric = torch.linalg.cholesky(footprint @ footprint.T).T  # |metric z|^2: pixel energy of z
    variance, axes = torch.linalg.eigh(metric @ covariance @ metric.T)
    deviation = variance.flip(0).clamp_min(1e-12).sqrt()
    std = deviation.sqrt()
    std = std * (deviation / std).square().mean().sqrt()  # normalised latents: variance 1 in all
    return mean, axes.flip(1).T @ metric, std


@torch.no_grad()
def to_stock_vae(model: LinearAutoencoder, pixels: torch.Tensor, width: int) -> Any:
    """The same transform as an AutoencoderKLQwenImage; `pixels` decide its latent axes.

    Its residual blocks become zero. Before conv_out stand an RMS norm and a SiLU, undone so: one
    channel is a large constant, which makes the norm a constant factor, and the others come in
    pairs (x, -x), because silu(x) - silu(-x) = x.
    """
    mean, rotation, std = latent_basis(model, pixels)
    vae = build_vae(width, tuple(round(v, 6) for v in std.tolist()))
    weights = vae.state_dict()
    for name, value in weights.items():
        value.fill_(1.0 if name.endswith("gamma") else 0.0)
    constant = 1024.0
    factor = constant / math.sqrt(width)  # what the RMS norm divides by

    def put(name: str, kernel: torch.Tensor, bias: torch.Tensor, paired: bool = False) -> None:
        weight, offset = weights[f"{name}.weight"], weights[f"{name}.bias"]
        if weight.dim() == 5:
            weight = weight[:, :, -1]  # the causal convolution sees a still through this slice
        outputs, inputs = kernel.shape[:2]
        weight[:outputs, :inputs], offset[:outputs] = kernel, bias
        if paired:
            weight[outputs : 2 * outputs, :inputs], offset[outputs : 2 * outputs] = -kernel, -bias
            offset[-1] = constant

    def unpaired(kernel: torch.Tensor) -> torch.Tensor:
        return torch.cat([kernel, -kernel], dim=1) * factor

    put("encoder.conv_in", model.conv_in.kernel(), model.conv_in.bias)
    for i, down in enumerate(model.down):
        put(f"encoder.down_blocks.{i}.resample.1", down.kernel(), down.bias, paired=i == 2)  # type: ignore
    rotated = torch.einsum("kl,lcyx->kcyx", rotation, model.to_latents.kernel())
    put("encoder.conv_out", unpaired(rotated), rotation @ (model.to_latents.bias - mean))
    weights["encoder.conv_out.bias"][LATENT_CHANNELS:] = -20  # log-variance: no noise
    put("quant_conv", torch.eye(32)[..., None, None], torch.zeros(32))
    put("post_quant_conv", torch.linalg.inv(rotation)[..., None, None], mean)
    put("decoder.conv_in", model.from_latents.kernel(), model.from_latents.bias)
    for i, (up, widen) in enumerate(zip(model.up, model.widen, strict=True)):
        put(f"decoder.up_blocks.{i}.upsamplers.0.resample.1", up.kernel(), up.bias)  # type: ignore
        name = f"decoder.up_blocks.{i + 1}.resnets.0.conv_shortcut"
        put(name, widen.kernel(), widen.bias, paired=i == 2)  # type: ignore
    put("decoder.conv_out", unpaired(model.conv_out.kernel()), model.conv_out.bias)
    vae.load_state_dict(weights)
    return vae


# --- 3. transformer: taught to copy its reference --------------------------------------------------


def build_transformer(
    zero_cond_t: bool, layers: int = 3, heads: int = 4, head_dim: int = 32, text_width: int = 64
) -> Any:
    """Random QwenImageTransformer2DModel; zero_cond_t marks the 2511 type. head_dim: 8 n."""
    height_dim = head_dim * 3 // 8 // 2 * 2
    return diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=LATENT_CHANNELS * 4,
        out_channels=LATENT_CHANNELS,
        num_layers=layers,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=text_width,
        guidance_embeds=False,
        axes_dims_rope=(head_dim - 2 * height_dim, height_dim, height_dim),
        zero_cond_t=zero_cond_t,
    )


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(B, 16, h, w) -> tokens (B, h/2 * w/2, 64), as the pipelines pack."""
    b, c, h, w = latents.shape
    tokens = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(b, h * w // 4, c * 4)


def recoloured_crop(
    rng: np.random.RandomState, photos: list[Image.Image], size: tuple[int, int]
) -> np.ndarray:
    """A random crop of a random photo under a random colour change, (H, W, 3) in [-1, 1]."""
    photo = photos[rng.randint(len(photos))]
    scale = min(photo.width / size[0], photo.height / size[1]) * rng.uniform(0.5, 1)
    width, height = size[0] * scale, size[1] * scale
    left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
    box = (left, top, left + width, top + height)
    pixels = np.asarray(photo.resize(size, Image.Resampling.LANCZOS, box), np.float32) / 127.5 - 1
    if rng.rand() < 0.7:
        pixels = pixels @ (np.eye(3) + 0.5 * rng.randn(3, 3))
        pixels = pixels * rng.uniform(0.5, 1.2) + rng.uniform(-0.4, 0.4, 3)
    pixels = np.clip(pixels, -1, 1).astype(np.float32)
    return pixels[:, ::-1] if rng.rand() < 0.5 else pixels


@torch.no_grad()
def copy_pool(
    rng: np.random.RandomState, vae: Any, model: LinearAutoencoder, photos: list[Image.Image]
) -> list[torch.Tensor]:
    """Normalised latents of crops, one tensor (N, 16, h, w) for each of SIZES_PX."""
