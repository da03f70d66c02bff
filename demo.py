"""See it work on a laptop: cache, train a LoRA, generate, score, in minutes on two CPU cores.

    python demo.py              # edits: the real commands, picture: outputs/demo/demo.png
    python demo.py pairedit     # a slider from 3 pairs: outputs/demo_pairedit/demo.png
    python demo.py dreambooth   # a change from 10 pairs: outputs/demo_dreambooth/demo.png
    python demo.py ... --rebuild    # make its tiny base model in demo/ again from nothing

qwen_edit: the base is a real QwenImageEditPlusPipeline (2511 type) with 2 million parameters that
can only copy its reference. The LoRA learns the edit from ten photo pairs; three others judge it.
pairedit: the base is a real FluxPipeline with 1 million parameters that draws faces. The slider
learns to turn hair grey, from three pairs; faces of other seeds, and a drawn one, judge it.
dreambooth: the base is a real StableDiffusionPipeline with 1.5 million parameters that draws larger
faces; the change is learned from ten pairs and judged on other seeds and on eight drawn photos.
"""

from __future__ import annotations

import argparse
import colorsys
import json
import math
import re
import shlex
import shutil
import string
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw, ImageFont, ImageOps
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
NUM_INFERENCE_STEPS = 4
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
FLUX_BASE_DIR = Path("demo/flux_slider_base")
FACE_PAIRS_DIR = Path("demo/slider_pairs")
FACE_PX = 32
PAIR_AGES = {"source": 0.4, "target": 0.6}
FACE_CONFIG = Path("configs/demo_pairedit.yaml")
FACE_OUTPUT_DIR = Path("outputs/demo_pairedit")
SD_BASE_DIR = Path("demo/sd_pairs_base")
HAIR_PAIRS_DIR = Path("demo/hair_pairs")
PHOTO_PX = 64
HAIR_AGES = {"before": 0.2, "after": 0.6}
HAIR_CONFIG = Path("configs/demo_dreambooth.yaml")
HAIR_OUTPUT_DIR = Path("outputs/demo_dreambooth")
HAIR_SCALES, PHOTO_SCALES = (-1.0, -0.5, 0.0, 0.5, 1.0), (0.0, 0.5, 1.0)
HAIR_PROMPT = "picture of a person"
HAIR_COUNT = 8  # seeds, and held-out photos
HAIR_STEPS, HAIR_GUIDANCE = 25, 1.0  # DDIM
LORAS = {
    "lora": HAIR_SCALES,
    "after_only": (0.0, 1.0, 2.0, 4.0),
}  # folder in HAIR_OUTPUT_DIR: its strips
TEXT_TOKENS = 16  # max_sequence_length of configs/demo_pairedit.yaml
DARK_HAIR, WHITE_HAIR = np.array([0.2, 0.13, 0.1]), np.array([0.95, 0.95, 0.95])
AGE_PROMPTS = (
    "",
    "image of a person",
    "picture of a person",
    "picture of a young person",
    "picture of an old person",
)
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


# --- 1. text encoder, tokenizer, processor --------------------------------------------------------


def build_tokenizer() -> Any:
    """Qwen2Tokenizer whose small vocabulary holds every word of the Plus pipeline's template.

    The pipeline drops the first 64 tokens (the system prompt), so those words must be whole tokens.
    """
    pipeline: Any = diffusers.QwenImageEditPlusPipeline(*[None] * 6)
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
    merges: list[Any] = [tuple(pair) for pair in model["merges"]]
    vocab = model["vocab"] | {t: len(model["vocab"]) + i for i, t in enumerate(SPECIAL_TOKENS)}
    return transformers.Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
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


# --- 2. autoencoder: a linear transform inside the stock class ------------------------------------


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

    def __init__(self, width: int, levels: int = 3) -> None:
        super().__init__()
        inner, half = width - 1, width // 2  # the last channel is needed by to_stock_vae
        down, wide = [inner] * (levels - 1), [width] * (levels - 1)
        self.conv_in = Convolution(3, inner)
        self.down = nn.ModuleList(Convolution(inner, n, stride=2) for n in (*down, LATENT_CHANNELS))
        self.to_latents = Convolution(LATENT_CHANNELS, LATENT_CHANNELS)
        self.from_latents = Convolution(LATENT_CHANNELS, width)
        self.up = nn.ModuleList(Convolution(width, half) for _ in range(levels))
        self.widen = nn.ModuleList(Convolution(half, n, kernel=1) for n in (*wide, inner // 2))
        self.conv_out = Convolution(inner // 2, 3)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 16, H / 2^levels, W / 2^levels)."""
        x = self.conv_in(pixels)
        for layer in self.down:
            x = layer(x)
        return self.to_latents(x)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The way back, linear as well."""
        x = self.from_latents(latents)
        for up, widen in zip(self.up, self.widen, strict=True):
            x = widen(up(F.interpolate(x, scale_factor=2.0, mode="nearest-exact")))
        return self.conv_out(x)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Reconstruction, (B, 3, H, W)."""
        return self.decode(self.encode(pixels))


def build_vae(base_dim: int = 8, latents_std: tuple[float, ...] | None = None) -> Any:
    """Random AutoencoderKLQwenImage with one channel width and no residual blocks in its levels."""
    vae: Any = diffusers.AutoencoderKLQwenImage(
        base_dim=base_dim,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=0,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=list(latents_std or [1.0] * LATENT_CHANNELS),
    )
    return vae.eval()


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


def stack_pixels(images: list[np.ndarray]) -> torch.Tensor:
    """(H, W, 3) arrays in [-1, 1] -> (B, 3, H, W)."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices, the rest)."""
    parameters = list(module.parameters())
    return [p for p in parameters if p.dim() == 2], [p for p in parameters if p.dim() != 2]


def fit_autoencoder(
    rng: np.random.RandomState, steps: int, width: int, levels: int = 3
) -> LinearAutoencoder:
    """Least squares on synthetic images.

    Muon instead of Adam: every layer is ill conditioned because low frequencies dominate pictures.
    """
    leaves = stack_pixels([draw_leaves(rng, 96) for _ in tqdm(range(600), "synthetic images")])
    model = LinearAutoencoder(width, levels)
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
def use_principal_axes(model: LinearAutoencoder, pixels: torch.Tensor) -> torch.Tensor:
    """Turn the latents to their principal axes, measured in pixels; returns the std, (16,).

    The std that the pipeline divides by is the square root of the axes' own deviation: a prediction
    error that is equal in all channels then costs the fewest pixel errors.
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
    rotation = axes.flip(1).T @ metric  # new latents = rotation @ (old - mean)
    encoder, decoder = model.to_latents, model.from_latents
    encoder.weight.copy_(rotation @ encoder.weight)
    encoder.bias.copy_(rotation @ (encoder.bias - mean))
    decoder.bias.add_(decoder.kernel().sum((2, 3)) @ mean)
    inverse = torch.linalg.inv(rotation)
    decoder.weight.copy_(torch.einsum("olyx,lk->okyx", decoder.kernel(), inverse).flatten(1))
    deviation = variance.flip(0).clamp_min(1e-12).sqrt()
    std = deviation.sqrt()
    return std * (deviation / std).square().mean().sqrt()  # all normalised latents: variance 1


@torch.no_grad()
def to_stock_vae(model: LinearAutoencoder, std: torch.Tensor) -> Any:
    """The same transform as an AutoencoderKLQwenImage.

    Its residual blocks become zero. Before conv_out stand an RMS norm and a SiLU, undone so: one
    channel is a large constant, which makes the norm a constant factor, and the others come in
    pairs (x, -x), because silu(x) - silu(-x) = x.
    """
    width = model.conv_in.shape[0] + 1
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
    put("encoder.conv_out", unpaired(model.to_latents.kernel()), model.to_latents.bias)
    weights["encoder.conv_out.bias"][LATENT_CHANNELS:] = -20  # log-variance: no noise
    for name, size in (("quant_conv", 2 * LATENT_CHANNELS), ("post_quant_conv", LATENT_CHANNELS)):
        put(name, torch.eye(size)[..., None, None], torch.zeros(size))
    put("decoder.conv_in", model.from_latents.kernel(), model.from_latents.bias)
    for i, (up, widen) in enumerate(zip(model.up, model.widen, strict=True)):
        put(f"decoder.up_blocks.{i}.upsamplers.0.resample.1", up.kernel(), up.bias)  # type: ignore
        name = f"decoder.up_blocks.{i + 1}.resnets.0.conv_shortcut"
        put(name, widen.kernel(), widen.bias, paired=i == 2)  # type: ignore
    put("decoder.conv_out", unpaired(model.conv_out.kernel()), model.conv_out.bias)
    vae.load_state_dict(weights)
    return vae


# --- 3. transformer: taught to copy its reference -------------------------------------------------


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
def draw_copy_latents(
    rng: np.random.RandomState,
    autoencoder: LinearAutoencoder,
    std: torch.Tensor,
    photos: list[Image.Image],
    count: int = 300,
) -> list[torch.Tensor]:
    """Normalised latents of random pictures, one tensor (count, 16, h, w) for each of SIZES_PX."""
    pools = []
    for width, height in SIZES_PX:
        pool = []
        for _ in tqdm(range(count), f"pictures {width} x {height}", leave=False):
            if rng.rand() < 0.75:
                picture = recoloured_crop(rng, photos, (width, height))
            else:
                picture = draw_leaves(rng, max(width, height))[:height, :width]
            pool.append(autoencoder.encode(stack_pixels([picture])) / std[:, None, None])
        pools.append(torch.cat(pool))
    return pools


@torch.no_grad()
def embed_neutral_prompts(
    rng: np.random.RandomState, pipeline: Any, photos: list[Image.Image], count: int = 12
) -> list[torch.Tensor]:
    """For each neutral prompt its embeddings with `count` pictures, (count, T, D)."""
    embeds = []
    for prompt in NEUTRAL_PROMPTS:
        crops = [recoloured_crop(rng, photos, (VISION_PX, VISION_PX)) for _ in range(count)]
        images = [Image.fromarray(((crop + 1) * 127.5).astype(np.uint8)) for crop in crops]
        embeds.append(torch.cat([pipeline.encode_prompt(prompt, [image])[0] for image in images]))
    return embeds


def copy_loss(transformer: Any, latents: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    """Flow-matching loss with the target as its own reference; latents (B, 16, h, w)."""
    tokens = pack(latents)
    noise = torch.randn_like(tokens)
    sigma = torch.sigmoid(torch.randn(len(tokens)) * 1.2 + 0.4).clamp_min(1e-3)
    noisy = tokens + sigma[:, None, None] * (noise - tokens)
    grid = (1, latents.shape[2] // 2, latents.shape[3] // 2)
    velocity = transformer(
        hidden_states=torch.cat([noisy, tokens], dim=1),
        encoder_hidden_states=embeds,
        timestep=sigma,
        img_shapes=[[grid, grid]] * len(tokens),
        return_dict=False,
    )[0][:, : tokens.shape[1]]
    return F.mse_loss(velocity, noise - tokens)


def teach_copy(
    rng: np.random.RandomState,
    transformer: Any,
    pools: list[torch.Tensor],
    embeds: list[torch.Tensor],
    steps: int,
) -> None:
    """Windows of 8 x 8 latents first (quick: finding the same place is learned there), then whole.

    Learning rate: 50 steps warm-up, constant, linear decay over the last 70 %.
    """
    optimizer = torch.optim.AdamW(
        transformer.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0
    )

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 50, (1 - step / steps) / 0.7)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    bar = tqdm(range(steps), "copy")
    for step in bar:
        pool, text = pools[rng.randint(len(pools))], embeds[rng.randint(len(embeds))]
        if step < 0.6 * steps:
            top, left = (2 * rng.randint(0, (side - 8) // 2 + 1) for side in pool.shape[2:])
            latents = pool[rng.randint(0, len(pool), 48), :, top : top + 8, left : left + 8]
        else:
            latents = pool[rng.randint(0, len(pool), 8)]
        loss = copy_loss(transformer, latents, text[rng.randint(0, len(text), len(latents))])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


# --- 4. rebuild: the base model from nothing ------------------------------------------------------


def build_scheduler() -> Any:
    """With the settings of the released Qwen-Image-Edit models."""
    return diffusers.FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        base_shift=0.5,
        max_image_seq_len=8192,
        max_shift=0.9,
        shift_terminal=0.02,
        use_dynamic_shifting=True,
    )


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """Weights in bf16, the Hub's layout; model_index.json names stock classes only."""
    index: dict[str, Any] = {
        "_class_name": type(pipeline).__name__,
        "_diffusers_version": diffusers.__version__,
    }
    for name, part in sorted(pipeline.components.items()):
        if isinstance(part, nn.Module):
            part.to(torch.bfloat16)
        if name == "processor":
            save_processor(part, folder / name)
            index[name] = ["transformers", "Qwen2VLProcessor"]
        else:
            part.save_pretrained(folder / name)
            index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def load_base(folder: Path) -> Any:
    """In fp32, without need of torchvision."""
    processor = ImageOnlyQwen2VLProcessor.from_pretrained(folder / "processor")
    return diffusers.QwenImageEditPlusPipeline.from_pretrained(
        folder, processor=processor, dtype=torch.float32
    )


def psnr_db(pictures: list[np.ndarray], truths: list[np.ndarray]) -> float:
    """Of the mean squared error over pairs of (H, W, 3) arrays in 0..1."""
    errors = [np.mean((a - b) ** 2) for a, b in zip(pictures, truths, strict=True)]
    return -10 * math.log10(np.mean(errors))


def rebuild(
    output_dir: Path, seed: int = 0, autoencoder_steps: int = 1200, copy_steps: int = 3000
) -> None:
    """Write the base model; it sees synthetic pictures and the befores that are not held out."""
    torch.manual_seed(seed)
    rng = np.random.RandomState(seed)
    befores = {p.name[:-6]: open_photo(p) for p in sorted((ROOT / PAIRS_DIR).glob("*_R.png"))}
    photos = [photo for name, photo in befores.items() if name not in HELD_OUT]
    autoencoder = fit_autoencoder(rng, autoencoder_steps, width=48)
    std = use_principal_axes(autoencoder, stack_pixels([draw_leaves(rng, 96) for _ in range(64)]))
    tokenizer = build_tokenizer()
    pipeline: Any = diffusers.QwenImageEditPlusPipeline(
        scheduler=build_scheduler(),
        vae=to_stock_vae(autoencoder, std),
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        processor=build_processor(tokenizer),
        transformer=build_transformer(zero_cond_t=True),
    )
    embeds = embed_neutral_prompts(rng, pipeline, photos)
    pools = draw_copy_latents(rng, autoencoder, std, photos)
    teach_copy(rng, pipeline.transformer, pools, embeds, copy_steps)
    save_pipeline(pipeline, output_dir)
    report_copy(load_base(output_dir), photos)
    size = sum(file.stat().st_size for file in output_dir.rglob("*") if file.is_file())
    print(f"{output_dir}: {size / 1e6:.1f} MB")


def report_copy(pipeline: Any, photos: list[Image.Image]) -> None:
    """Print how well the autoencoder, and the whole base model, give back a photo."""
    crops = [cover(photo, nearest_size(photo)) for photo in photos]
    befores = [to_array(crop) for crop in crops]
    decoded = [reconstruct(pipeline.vae, before) for before in befores]
    print(f"autoencoder: {psnr_db(decoded, befores):.1f} dB")
    plus = sys.modules[type(pipeline).__module__]
    plus.CONDITION_IMAGE_SIZE = VISION_PX**2  # type: ignore[attr-defined]
    copies = []
    for crop in tqdm(crops, "copies"):
        plus.VAE_IMAGE_SIZE = crop.width * crop.height  # type: ignore[attr-defined]
        pipeline.set_progress_bar_config(disable=True)
        copy = pipeline(
            image=[crop],
            prompt=NEUTRAL_PROMPTS[0],
            true_cfg_scale=1.0,
            num_inference_steps=NUM_INFERENCE_STEPS,
            width=crop.width,
            height=crop.height,
            generator=torch.Generator().manual_seed(0),
        ).images[0]
        copies.append(to_array(copy))
    print(f"copy of the base model: {psnr_db(copies, befores):.1f} dB")


# --- 5. pictures ----------------------------------------------------------------------------------


def open_photo(path: Path) -> Image.Image:
    """RGB, loaded."""
    with Image.open(path) as image:
        return image.convert("RGB")


def nearest_size(image: Image.Image) -> tuple[int, int]:
    """The one of SIZES_PX whose aspect is nearest."""
    aspect = math.log(image.width / image.height)
    return min(SIZES_PX, key=lambda size: abs(aspect - math.log(size[0] / size[1])))


def cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Centre crop of the aspect of `size`, resized to it."""
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def to_array(image: Image.Image) -> np.ndarray:
    """(H, W, 3) in 0..1."""
    return np.asarray(image, np.float64) / 255


def write_picture(picture: np.ndarray, path: Path) -> None:
    """(H, W, 3) in 0..1 as a file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((picture * 255).round().astype(np.uint8)).save(path)


@torch.no_grad()
def reconstruct(vae: Any, picture: np.ndarray) -> np.ndarray:
    """Through the VAE and back, (H, W, 3) in 0..1."""
    pixels = stack_pixels([picture.astype(np.float32) * 2 - 1])
    if isinstance(vae, diffusers.AutoencoderKLQwenImage):
        pixels = pixels.unsqueeze(2)  # one frame
    decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.view(3, *picture.shape[:2])
    return (decoded.permute(1, 2, 0).clamp(-1, 1).numpy().astype(np.float64) + 1) / 2


# --- 6. run: the real commands --------------------------------------------------------------------


def run_command(shown: str, module: str | None = None) -> None:
    """Print a command, run it with this interpreter; SystemExit with its code if it fails.

    module: what stands for the first word, e.g. "accelerate.commands.accelerate_cli".
    """
    print(f"\n$ {shown}", flush=True)
    words = shlex.split(shown)
    start = [sys.executable, "-m", module] if module else [sys.executable]
    done = subprocess.run([*start, *words[1:]], cwd=ROOT, check=False)
    if done.returncode:
        print(f"demo: stopped, exit code {done.returncode} from: {shown}", file=sys.stderr)
        raise SystemExit(done.returncode)


def after_path(name: str) -> Path:
    """The after of a pair, .png or .jpg."""
    return next((ROOT / PAIRS_DIR).glob(f"{name}_T.[pj][np]g"))


def write_table(path: Path) -> None:
    """One row per held-out photo for generate.py."""
    rows = []
    for name in HELD_OUT:
        prompt = (ROOT / PAIRS_DIR / f"{name}_T.txt").read_text(encoding="utf-8").strip()
        image = (PAIRS_DIR / f"{name}_R.png").as_posix()
        rows.append(json.dumps({"images": [image], "prompt": prompt, "name": name}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def run_demo() -> None:
    """Cache, train, generate with and without the LoRA, score, draw."""
    start = time.perf_counter()
    if (ROOT / OUTPUT_DIR).exists():
        print(f"deleting {OUTPUT_DIR} of an earlier demo")  # the trainer would not overwrite it
        shutil.rmtree(ROOT / OUTPUT_DIR)
    accelerate = "accelerate.commands.accelerate_cli"
    run_command(f"accelerate launch cache_embeddings.py --config {CONFIG}", accelerate)
    run_command(f"accelerate launch train_qwen_edit.py --config {CONFIG}", accelerate)
    table = OUTPUT_DIR / "held_out.jsonl"
    write_table(ROOT / table)
    run_command(
        f"python generate.py --pretrained_model_name_or_path {BASE_DIR}"
        f" --lora {OUTPUT_DIR}/pytorch_lora_weights.safetensors --table {table}"
        f" --output_dir {OUTPUT_DIR}/generated --scales 0,1 --seed 0 --html"
        f" --num_inference_steps {NUM_INFERENCE_STEPS} --true_cfg_scale 1"
    )
    photos = {name: open_results(name) for name in HELD_OUT}
    figures = score(photos)
    figures["seconds"] = round(time.perf_counter() - start, 1)
    (ROOT / OUTPUT_DIR / "demo.json").write_text(json.dumps(figures, indent=2) + "\n")
    draw_sheet(photos).save(ROOT / OUTPUT_DIR / "demo.png")
    print(
        f"\n{len(photos)} photos that were never trained on, {figures['seconds']:.0f} s in all:\n"
        f"  squared error to the true after: LoRA {figures['mse_lora']:.4f}, base model"
        f" {figures['mse_base']:.4f}, flat colour {figures['mse_flat']:.4f},"
        f" before {figures['mse_before']:.4f}\n"
        f"  skill {figures['skill']:.3f} (1: perfect, 0: no better than the best of the others),"
        f" luminance correlation {figures['luminance_correlation']:.3f}\n"
        f"  PSNR {figures['psnr_db']:.1f} dB (autoencoder alone: {figures['vae_psnr_db']:.1f} dB)\n"
        f"picture: {OUTPUT_DIR / 'demo.png'}, figures: {OUTPUT_DIR / 'demo.json'}\n"
        f"to compare: {OUTPUT_DIR}/generated/page.html, the run: {OUTPUT_DIR}/report.html"
    )


# --- 7. score and sheet ---------------------------------------------------------------------------


def open_results(name: str) -> dict[str, Image.Image]:
    """before, base, LoRA, after of one photo, all at the size that was generated."""
    folder = ROOT / OUTPUT_DIR / "generated"
    base, lora = (open_photo(folder / f"{name}_scale{scale}.png") for scale in (0, 1))
    before, after = (
        cover(open_photo(path), lora.size)
        for path in (ROOT / PAIRS_DIR / f"{name}_R.png", after_path(name))
    )
    return {"before": before, "base": base, "LoRA": lora, "after": after}


def score(photos: dict[str, dict[str, Image.Image]]) -> dict[str, Any]:
    """Errors (squared, 0..1 scale) against the true afters: per photo, their means, the skill."""
    names = [path.name[:-6] for path in (ROOT / PAIRS_DIR).glob("*_R.png")]
    trained = [to_array(open_photo(after_path(name))) for name in sorted({*names} - {*HELD_OUT})]
    flat = np.mean([picture.mean((0, 1)) for picture in trained], axis=0)
    vae = diffusers.AutoencoderKLQwenImage.from_pretrained(
        ROOT / BASE_DIR / "vae", dtype=torch.float32
    )
    luma = np.array([0.299, 0.587, 0.114])
    rows = []
    for name, images in photos.items():
        arrays = {kind: to_array(image) for kind, image in images.items()}
        after = arrays["after"]
        others = {"base": arrays["base"], "flat": flat, "before": arrays["before"]}
        others |= {"lora": arrays["LoRA"], "vae": reconstruct(vae, after)}
        row: dict[str, Any] = {"name": name, "size": list(images["LoRA"].size)}
        row |= {f"mse_{kind}": np.mean((picture - after) ** 2) for kind, picture in others.items()}
        lumas = [(picture @ luma).ravel() for picture in (arrays["LoRA"], after)]
        rows.append(row | {"luminance_correlation": np.corrcoef(*lumas)[0, 1]})
    keys = [key for key in rows[0] if key not in ("name", "size")]
    means: dict[str, Any] = {key: float(np.mean([row[key] for row in rows])) for key in keys}
    rival = min(means["mse_base"], means["mse_flat"], means["mse_before"])
    means["skill"] = 1 - means["mse_lora"] / rival
    means["psnr_db"] = -10 * math.log10(means["mse_lora"])
    means["vae_psnr_db"] = -10 * math.log10(means.pop("mse_vae"))
    return means | {"photos": rows}


def draw_sheet(photos: dict[str, dict[str, Image.Image]]) -> Image.Image:
    """before | base | LoRA | after, twice the size, one row per photo."""
    font, label = ImageFont.load_default(size=20), ImageFont.load_default(size=14)
    gap, head = 16, 40
    column = 2 * max(images["LoRA"].width for images in photos.values()) + gap
    heights = [2 * images["LoRA"].height + head for images in photos.values()]
    sheet = Image.new("RGB", (4 * column + gap, head + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    top = head
    for (name, images), height in zip(photos.items(), heights, strict=True):
        for i, (kind, image) in enumerate(images.items()):
            large = image.resize((2 * image.width, 2 * image.height), Image.Resampling.LANCZOS)
            left = gap + i * column
            if top == head:
                draw.text((left, 10), kind, "black", font)
            sheet.paste(large, (left, top))
        draw.text((gap, top + height - head + 6), name, "dimgray", label)
        top += height
    return sheet


# --- 8. pairedit, dreambooth: faces with one continuous attribute ---------------------------------


class Face(NamedTuple):
    """What a picture shows; lengths in 1/32 of its side, colours RGB in 0..1."""

    age: float  # the attribute: hair from dark, 0, to white, 1
    background: tuple[float, ...]
    skin: tuple[float, ...]
    x: float  # centre of the head
    y: float
    width: float  # half of the head's
    eye: float  # radius
    mouth: float  # half width


def random_face(rng: np.random.RandomState) -> Face:
    """Everything varies independently; ages are triangular about 0.4, from 0 to 0.8."""

    def colour(least: float, most: float) -> tuple[float, ...]:
        return colorsys.hsv_to_rgb(rng.rand(), rng.uniform(least, most), 0.9)

    age, background, skin = 0.4 * (rng.rand() + rng.rand()), colour(0.25, 0.5), colour(0.1, 0.35)
    lows, highs = (13.5, 15.0, 8.5, 1.4, 2.0), (18.5, 17.5, 10.5, 2.2, 4.0)
    return Face(age, background, skin, *rng.uniform(lows, highs))


def pixel_centres(side_px: int) -> np.ndarray:
    """(2, side, side): y and x of every pixel's centre, in 1/32 of the side."""
    return (np.mgrid[0:side_px, 0:side_px] + 0.5) * (FACE_PX / side_px)


def draw_face(face: Face, side_px: int = FACE_PX) -> np.ndarray:
    """(side, side, 3) in 0..1: hair, skin, mouth, eyes; edges are 1.5/32 of the side soft."""
    y, x = pixel_centres(side_px) - np.array([face.y, face.x])[:, None, None]
    picture = np.ones((side_px, side_px, 3)) * face.background

    def paint(left: float, top: float, radii: Any, colour: Any, lowest: float = FACE_PX) -> None:
        distance = (np.hypot((x - left) / radii[0], (y - top) / radii[1]) - 1) * min(radii)
        cover = np.clip(0.5 - np.maximum(distance, y - lowest) / 1.5, 0, 1)[..., None]
        picture[:] += cover * (np.asarray(colour) - picture)

    w, r = face.width, face.eye
    paint(0, -3, (w, 1.05 * w), DARK_HAIR + face.age * (WHITE_HAIR - DARK_HAIR), lowest=0)
    paint(0, 2, (0.85 * w, 0.9 * w), face.skin)
    paint(0, 7, (face.mouth, 1.3), (0.9, 0.15, 0.2))
    paint(-4, 1.5, (r, r), (0.1, 0.1, 0.1))
    paint(4, 1.5, (r, r), (0.1, 0.1, 0.1))
    return picture


def from_centre(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of every pixel seen from the centre of the head, in 1/32 of the side.

    The mouth tells where that is: nothing else is so red. Heads are drawn within narrow limits.
    """
    y, x = pixel_centres(len(picture))
    red = np.clip(picture[..., 0] - picture[..., 1:].max(-1) - 0.48, 1e-9, None)
    red /= red.sum()
    return x - np.clip((red * x).sum(), 13, 19), y - np.clip((red * y).sum() - 7, 14.5, 18)


def face_age(picture: np.ndarray, place: tuple[np.ndarray, np.ndarray]) -> float:
    """Of a patch of hair: its mean as a share of the way from DARK_HAIR, 0, to WHITE_HAIR, 1.

    place: of from_centre, in a series that of the unedited picture.
    """
    patch = (abs(place[0]) <= 3) & (abs(place[1] + 9.6) <= 1.5)
    axis = WHITE_HAIR - DARK_HAIR
    return float((picture[patch].mean(0) - DARK_HAIR) @ axis / (axis @ axis))


def content_change(
    before: np.ndarray, after: np.ndarray, place: tuple[np.ndarray, np.ndarray]
) -> float:
    """Mean absolute difference (pictures in 0..1) outside the box that holds the hair."""
    rest = (abs(place[0]) > 12) | (place[1] > 1)
    return float(abs(before - after)[rest].mean())


# --- 9. pairedit: a base of FLUX.1's type ---------------------------------------------------------


def build_clip_tokenizer(words: Sequence[str] = ()) -> Any:
    """CLIP's tokenizer: letters, and these words, put together letter by letter."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    merges: list[Any] = [
        (word[:k], word[k] + ("</w>" if k == len(word) - 1 else ""))
        for word in words
        for k in range(1, len(word))
    ]
    merges = list(dict.fromkeys(merges))
    symbols += ["".join(pair) for pair in merges]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def build_clip(tokenizer: Any, width: int) -> Any:
    """CLIP's text encoder with two layers of random weights."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, projection_dim=width,
        num_hidden_layers=2, num_attention_heads=4, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return transformers.CLIPTextModel(config).eval()


def age_words() -> list[str]:
    """The words of AGE_PROMPTS."""
    return sorted({word for prompt in AGE_PROMPTS for word in prompt.split()})


def build_flux_tokenizers() -> tuple[Any, Any]:
    """CLIP's and T5's tokenizers: letters, and for T5 also the words of AGE_PROMPTS."""
    clip, words = build_clip_tokenizer(), age_words()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(c, -8.0) for c in string.printable if not c.isspace()]
    pieces += [(f"▁{word}", -4.0) for word in words]
    t5 = transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
    return clip, t5


def build_flux(vae: Any, heads: int = 3, text_width: int = 32) -> Any:
    """FluxPipeline of random weights with the scheduler of FLUX.1-dev, around a VAE."""
    clip, t5 = build_flux_tokenizers()
    t5_config = transformers.T5Config(
        vocab_size=len(t5), d_model=text_width, d_ff=64, d_kv=8, num_heads=4, num_layers=2,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            base_image_seq_len=256, base_shift=0.5, max_image_seq_len=4096, max_shift=1.15,
            shift=3.0, use_dynamic_shifting=True,
        ),
        vae=vae,
        text_encoder=build_clip(clip, text_width),
        tokenizer=clip,
        text_encoder_2=transformers.T5EncoderModel(t5_config).eval(),
        tokenizer_2=t5,
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=4 * LATENT_CHANNELS, num_layers=2, num_single_layers=2,
            attention_head_dim=32, num_attention_heads=heads, joint_attention_dim=text_width,
            pooled_projection_dim=text_width, guidance_embeds=True, axes_dims_rope=(4, 14, 14),
        ),
    )  # fmt: skip


@torch.no_grad()
def to_flux_vae(model: LinearAutoencoder, std: torch.Tensor, scaling_factor: float) -> Any:
    """The same transform, latents divided by `std`, as an AutoencoderKL that halves the sides.

    As in to_stock_vae, but the constant comes as a pair, too: a GroupNorm takes the mean away.
    """
    width = model.conv_in.shape[0] + 1
    vae: Any = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(width, width),
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=FACE_PX,
        scaling_factor=scaling_factor,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    weights = vae.state_dict()
    for name, value in weights.items():
        value.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    constant = 1024.0
    factor = constant * math.sqrt(2 / width)  # what the norm divides by

    def put(name: str, kernel: torch.Tensor, bias: torch.Tensor, paired: bool = False) -> None:
        weight, offset = weights[f"{name}.weight"], weights[f"{name}.bias"]
        if paired:
            kernel, bias = torch.cat([kernel, -kernel]), torch.cat([bias, -bias])
            offset[-2:] = torch.tensor([constant, -constant])
        weight[: kernel.shape[0], : kernel.shape[1]], offset[: len(bias)] = kernel, bias

    def unpaired(kernel: torch.Tensor) -> torch.Tensor:
        return torch.cat([kernel, -kernel], dim=1) * factor

    down, up, widen = (cast(Convolution, part[0]) for part in (model.down, model.up, model.widen))
    to_latents, from_latents = model.to_latents, model.from_latents
    put("encoder.conv_in", model.conv_in.kernel(), model.conv_in.bias)
    put("encoder.down_blocks.0.downsamplers.0.conv", down.kernel(), down.bias, paired=True)
    latents = unpaired(to_latents.kernel()) / std.view(-1, 1, 1, 1)
    put("encoder.conv_out", latents, to_latents.bias / std)
    weights["encoder.conv_out.bias"][LATENT_CHANNELS:] = -20  # log-variance: no noise
    put("decoder.conv_in", from_latents.kernel() * std.view(-1, 1, 1), from_latents.bias)
    kernel = torch.einsum("oi,ikyx->okyx", widen.weight, up.kernel())  # both in one convolution
    bias = widen.weight @ up.bias + widen.bias
    put("decoder.up_blocks.0.upsamplers.0.conv", kernel, bias, paired=True)
    put("decoder.conv_out", unpaired(model.conv_out.kernel()), model.conv_out.bias)
    vae.load_state_dict(weights)
    return vae.eval()


def face_loss(
    pipeline: Any, latents: torch.Tensor, text: torch.Tensor, pooled: torch.Tensor
) -> torch.Tensor:
    """Flow matching with sigma over the whole range; latents (B, 16, h, w)."""
    tokens = pack(latents)
    noise = torch.randn_like(tokens)
    sigma = torch.sigmoid(torch.randn(len(tokens)) * 1.4)
    grid = latents.shape[2] // 2, latents.shape[3] // 2
    places = torch.cartesian_prod(torch.zeros(1), *(torch.arange(float(n)) for n in grid))
    velocity = pipeline.transformer(
        hidden_states=tokens + sigma[:, None, None] * (noise - tokens),
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=sigma,
        guidance=torch.full((len(tokens),), 3.5),
        img_ids=places,  # (h/2 * w/2, 3)
        txt_ids=torch.zeros(text.shape[1], 3),
        return_dict=False,
    )[0]
    return F.mse_loss(velocity, noise - tokens)


def teach_faces(
    rng: np.random.RandomState,
    pipeline: Any,
    latents: torch.Tensor,
    prompts: np.ndarray,
    steps: int,
) -> None:
    """Flow matching on latents (N, 16, h, w), each with one of the prompts (N, P) true of it."""
    with torch.no_grad():
        text, pooled, _ = pipeline.encode_prompt(
            list(AGE_PROMPTS), None, max_sequence_length=TEXT_TOKENS
        )
    matrices, rest = split_parameters(pipeline.transformer)
    optimizers = [
        torch.optim.Muon(matrices, lr=0.04, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    decay = [torch.optim.lr_scheduler.PolynomialLR(o, steps, power=1.3) for o in optimizers]
    bar = tqdm(range(steps), "faces")
    for _ in bar:
        pick = rng.randint(0, len(latents), 16)
        says = prompts[pick, rng.randint(0, prompts.shape[1], 16)]
        loss = face_loss(pipeline, latents[pick], text[says], pooled[says])
        pipeline.transformer.zero_grad()
        loss.backward()
        for step in (*optimizers, *decay):
            step.step()  # type: ignore[attr-defined]
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def rebuild_flux(
    output_dir: Path, seed: int = 0, autoencoder_steps: int = 600, face_steps: int = 5000
) -> None:
    """Write the base model and, of other faces, the pairs."""
    torch.manual_seed(seed)
    rng = np.random.RandomState(seed)
    autoencoder = fit_autoencoder(rng, autoencoder_steps, width=34, levels=1)
    std = use_principal_axes(autoencoder, stack_pixels([draw_leaves(rng, 96) for _ in range(64)]))
    faces = [random_face(rng) for _ in tqdm(range(12000), "faces", leave=False)]
    pixels = stack_pixels([draw_face(face).astype(np.float32) * 2 - 1 for face in faces])
    with torch.no_grad():
        latents = torch.cat([autoencoder.encode(part) for part in pixels.split(500)])
    latents /= std.view(-1, 1, 1)
    scaling_factor = round(1 / latents.std().item(), 4)
    pipeline = build_flux(to_flux_vae(autoencoder, std, scaling_factor))
    true_of = [[0, 1, 2, 3 + (face.age > 0.4)] for face in faces]
    teach_faces(rng, pipeline, latents * scaling_factor, np.array(true_of), face_steps)
    pipeline.to(torch.bfloat16).save_pretrained(output_dir)
    size = sum(file.stat().st_size for file in output_dir.rglob("*") if file.is_file())
    print(f"{output_dir}: {size / 1e6:.1f} MB")


def draw_face_pairs(
    folder: Path, seed: int, count: int, ages: dict[str, float], side_px: int = FACE_PX
) -> None:
    """Write <stage>/<n>.png of every stage in `ages`: the same face at another age."""
    rng = np.random.RandomState(seed)
    for n in range(count):
        face = random_face(rng)
        for stage, age in ages.items():
            picture = draw_face(face._replace(age=age), side_px)
            write_picture(picture, folder / stage / f"{n}.png")


# --- 10. pairedit: the slider ---------------------------------------------------------------------


def run_pairedit() -> None:
    """Train a slider on three pairs, draw strips, edit a picture, measure, draw the sheet."""
    start = time.perf_counter()
    if (ROOT / FACE_OUTPUT_DIR).exists():
        print(f"deleting {FACE_OUTPUT_DIR} of an earlier demo")
        shutil.rmtree(ROOT / FACE_OUTPUT_DIR)
    accelerate = "accelerate.commands.accelerate_cli"
    run_command(f"accelerate launch train_pairedit.py --config {FACE_CONFIG}", accelerate)
    run_command(f"python generate.py --config {FACE_CONFIG} --image_format png --html")
    photo = FACE_OUTPUT_DIR / "photo.png"
    write_picture(draw_face(random_face(np.random.RandomState(7))), ROOT / photo)
    lora = next((ROOT / FACE_OUTPUT_DIR).glob("models/age/*/*_500epoch.safetensors"))
    scales = sorted(open_strips()[0])
    run_command(
        f"python generate.py --pretrained_model_name_or_path {FLUX_BASE_DIR}"
        f" --lora {lora.relative_to(ROOT).as_posix()} --image {photo.as_posix()} --resolution 32"
        f' --max_sequence_length {TEXT_TOKENS} --skip 10 --prompt "image of a person"'
        f" --scales {','.join(f'{scale:g}' for scale in scales)}"
        f" --output {(FACE_OUTPUT_DIR / 'photo_strip.png').as_posix()}"
    )
    strips = [*open_strips(), open_photo_strip(scales)]
    figures = [measure_strip(strip) for strip in strips[:-1]]
    means = {
        name: [float(np.mean([figure[name][k] for figure in figures])) for k in range(len(scales))]
        for name in ("age_change", "content_change")
    }
    seconds = round(time.perf_counter() - start, 1)
    result = {"scales": scales, **means, "pair_change": PAIR_AGES["target"] - PAIR_AGES["source"]}
    result |= {"photo": measure_strip(strips[-1]), "seconds": seconds}
    (ROOT / FACE_OUTPUT_DIR / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
    draw_face_sheet(strips, scales).save(ROOT / FACE_OUTPUT_DIR / "demo.png")
    print(f"\n{len(figures)} faces of other seeds, {seconds:.0f} s in all:")
    for scale, age, content in zip(scales, *means.values(), strict=True):
        share = age / result["pair_change"]
        print(f"  scale {scale:3g}: hair {share:5.2f} of the pairs' change, the rest {content:.4f}")
    print(f"picture: {FACE_OUTPUT_DIR / 'demo.png'}, figures: {FACE_OUTPUT_DIR / 'demo.json'}")
    pages = sorted((ROOT / FACE_OUTPUT_DIR).glob("*/age/*/*.html"), key=lambda page: page.name)
    compare, report = (page.relative_to(ROOT) for page in pages)
    print(f"to compare: {compare}, the run: {report}")


def open_strips() -> list[dict[float, np.ndarray]]:
    """{scale: picture} of every seed that generate.py has drawn."""
    folders = sorted((ROOT / FACE_OUTPUT_DIR).glob("strips/age/*/origin/*"))
    return [
        {
            float(file.name.split("_scale")[1].split("_")[0]): to_array(open_photo(file))
            for file in folder.glob("*.png")
        }
        for folder in folders
    ]


def open_photo_strip(scales: list[float]) -> dict[float, np.ndarray]:
    """{scale: picture} of the edited photo."""
    folder = ROOT / FACE_OUTPUT_DIR
    return {s: to_array(open_photo(folder / f"photo_strip_scale{s:g}.png")) for s in scales}


def measure_strip(strip: dict[float, np.ndarray]) -> dict[str, list[float]]:
    """Against scale 0: change of age, and mean absolute change outside the hair, by scale."""
    place = from_centre(strip[0.0])
    ages = [face_age(strip[scale], place) for scale in sorted(strip)]
    return {
        "age_change": [age - face_age(strip[0.0], place) for age in ages],
        "content_change": [content_change(strip[0.0], strip[s], place) for s in sorted(strip)],
    }


def draw_face_sheet(strips: list[dict[float, np.ndarray]], scales: list[float]) -> Image.Image:
    """The three pairs above, a strip per row below, the edited photo last."""
    pairs = [to_array(open_photo(file)) for n in range(3) for file in pair_files(n)]
    rows = [[strip[scale] for scale in scales] for strip in [*strips[:5], strips[-1]]]
    return draw_sections(
        [
            (["before and after, three pairs: hair turns grey"], [pairs]),
            ([f"scale {scale:g}" for scale in scales], rows[:-1]),
            (["a given picture, edited without training for it"], rows[-1:]),
        ],
        large=96,
    )


def draw_sections(
    sections: list[tuple[list[str], list[list[np.ndarray]]]], large: int
) -> Image.Image:
    """Rows of pictures under heads, one or one for each column; pixels stay visible."""
    font, gap, head = ImageFont.load_default(size=15), 6, 26
    columns = max(len(row) for _, rows in sections for row in rows)
    height = sum(head + (large + gap) * len(rows) for _, rows in sections)
    sheet = Image.new("RGB", ((large + gap) * columns + gap, height + gap), "white")
    draw, top = ImageDraw.Draw(sheet), gap
    for heads, rows in sections:
        for column, text in enumerate(heads):
            draw.text((gap + column * (large + gap), top + 3), text, "black", font)
        top += head
        for row in rows:
            for column, picture in enumerate(row):
                image = Image.fromarray((picture * 255).round().astype(np.uint8))
                left = gap + column * (large + gap)
                sheet.paste(image.resize((large, large), Image.Resampling.NEAREST), (left, top))
            top += large + gap
    return sheet


def pair_files(number: int) -> list[Path]:
    """Before and after."""
    return [ROOT / FACE_PAIRS_DIR / "age" / s / f"{number}.png" for s in ("source", "target")]


# --- 11. dreambooth: a base of Stable Diffusion 1.5's type ----------------------------------------


def build_sd_vae() -> Any:
    """Random AutoencoderKL: sides / 4, 4 channels; 0.17 million parameters."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 32),
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=PHOTO_PX,
    )


def build_sd(vae: Any, text_width: int = 32) -> Any:
    """StableDiffusionPipeline of random weights with the scheduler of 1.5, around a VAE."""
    tokenizer = build_clip_tokenizer(age_words())
    scheduler: Any = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1,
    )  # fmt: skip
    scheduler.register_to_config(clip_sample=False)  # KEEP, as 1.5: DDIM would clip latents to 1
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=build_clip(tokenizer, text_width),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(
            sample_size=PHOTO_PX // 4,
            block_out_channels=(32, 64, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=text_width,
            attention_head_dim=4,
            norm_num_groups=4,
        ),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


class FlatMuon:
    """Muon on every weight as a matrix (outputs, the rest), kernels too; Adam on what is 1-D.

    After 140 steps it leaves half of AdamW's error at the highest noise levels.
    """

    def __init__(self, module: nn.Module, rate: float, steps: int) -> None:
        parameters = list(module.parameters())
        self.module, self.weights = module, [p for p in parameters if p.dim() > 1]
        self.matrices = [nn.Parameter(p.data.flatten(1)) for p in self.weights]  # same memory
        rest = [p for p in parameters if p.dim() == 1]
        self.optimizers = [
            torch.optim.Muon(self.matrices, lr=rate, weight_decay=0.0),
            torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        decay = torch.optim.lr_scheduler.PolynomialLR
        self.decay = [decay(o, steps, power=1.3) for o in self.optimizers]

    def minimise(self, loss: torch.Tensor) -> None:
        """One step."""
        self.module.zero_grad()
        loss.backward()
        for matrix, weight in zip(self.matrices, self.weights, strict=True):
            matrix.grad = weight.grad.flatten(1)  # type: ignore[union-attr]
        for part in (*self.optimizers, *self.decay):
            part.step()  # type: ignore[attr-defined]


def fit_sd_vae(rng: np.random.RandomState, vae: Any, pixels: torch.Tensor, steps: int) -> None:
    """Squared error and a little of the Kullback-Leibler term, on pixels (N, 3, H, W)."""
    optimizer, bar = FlatMuon(vae.train(), 0.02, steps), tqdm(range(steps), "autoencoder")
    for _ in bar:
        batch = pixels[rng.randint(0, len(pixels), 16)]
        posterior = vae.encode(batch).latent_dist
        error = F.mse_loss(vae.decode(posterior.sample()).sample, batch)
        optimizer.minimise(error + 2e-4 * posterior.kl().mean() / posterior.mean[0].numel())
        bar.set_postfix(db=f"{10 * math.log10(4 / error.item()):.1f}", refresh=False)
    vae.eval()


def teach_sd_faces(
    rng: np.random.RandomState,
    pipeline: Any,
    latents: torch.Tensor,
    prompts: np.ndarray,
    steps: int,
    power: float,
) -> None:
    """Noise prediction on latents (N, 4, h, w), each with one of the prompts (N, P) true of it.

    Errors count by alphas_cumprod^(-2 power), half of it by how often a noise level is drawn:
    colours are decided at high ones, where small errors of the noise are large ones of the picture.
    """
    with torch.no_grad():
        text, _ = pipeline.encode_prompt(list(AGE_PROMPTS), "cpu", 1, False)  # (P, 77, D)
    noising = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    weight = noising.alphas_cumprod**-power
    weight /= weight.mean()
    unet = pipeline.unet.train()
    optimizer, bar = FlatMuon(unet, 0.04, steps), tqdm(range(steps), "faces")
    for _ in bar:
        pick = rng.randint(0, len(latents), 16)
        says = prompts[pick, rng.randint(0, prompts.shape[1], 16)]
        noise, t = torch.randn(16, *latents.shape[1:]), torch.multinomial(weight, 16, True)
        noisy = noising.add_noise(latents[pick], noise, t)
        error = (unet(noisy, t, text[says], return_dict=False)[0] - noise).square()
        loss = (weight[t].view(-1, 1, 1, 1) * error).mean()
        optimizer.minimise(loss)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    unet.eval()


def rebuild_sd(
    output_dir: Path, seed: int = 0, vae_steps: int = 450, face_steps: Sequence[int] = (1600, 900)
) -> None:
    """Write the base model of the pairs demo."""
    torch.manual_seed(seed)
    rng = np.random.RandomState(seed)
    faces = [random_face(rng) for _ in range(8000)]
    drawn = [draw_face(face, PHOTO_PX).astype(np.float32) for face in tqdm(faces, "draw")]
    pixels = stack_pixels(drawn) * 2 - 1
    vae = build_sd_vae()
    fit_sd_vae(rng, vae, pixels, vae_steps)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pixels.split(500)])
    scaling_factor = round(1 / latents.std().item(), 4)
    vae.register_to_config(scaling_factor=scaling_factor)
    pipeline = build_sd(vae)
    ages = [3 + (face.age > 0.4) for face in faces]
    true_of = [[0, 1, 1, 2, 2, says, says] for says in ages]  # 1 of 7: no prompt
    for power, steps in zip((0.5, 0.25), face_steps, strict=True):  # colours, then details
        prompts = np.array(true_of)
        teach_sd_faces(rng, pipeline, latents * scaling_factor, prompts, steps, power)
    pipeline.to(torch.bfloat16).save_pretrained(output_dir)
    size = sum(file.stat().st_size for file in output_dir.rglob("*") if file.is_file())
    print(f"{output_dir}: {size / 1e6:.1f} MB")


# --- 12. dreambooth: a change from ten pairs ------------------------------------------------------


def run_dreambooth() -> None:
    """Train on ten pairs (and on their afters alone), draw strips, edit photos, measure."""
    start = time.perf_counter()
    if (ROOT / HAIR_OUTPUT_DIR).exists():
        print(f"deleting {HAIR_OUTPUT_DIR} of an earlier demo")
        shutil.rmtree(ROOT / HAIR_OUTPUT_DIR)
    folder, accelerate = HAIR_OUTPUT_DIR.as_posix(), "accelerate.commands.accelerate_cli"
    train = f"accelerate launch train_dreambooth_pairs.py --config {HAIR_CONFIG}"
    run_command(train, accelerate)
    run_command(  # as DreamBooth is trained: over all noise levels
        f"{train} --output_dir {folder}/after_only --use_image_pairs false --before_data_dir null"
        f" --after_data_dir null --pair_objective slider --timestep_min 0"
        f" --instance_data_dir {HAIR_PAIRS_DIR / 'after'}",
        accelerate,
    )
    draw = f"python generate.py --pretrained_model_name_or_path {SD_BASE_DIR}"
    draw += f" --num_inference_steps {HAIR_STEPS} --guidance_scale {HAIR_GUIDANCE:g}"
    draw += f" --batch_size {HAIR_COUNT} --lora {folder}/{{}}/pytorch_lora_weights.safetensors"
    seeds = ",".join(map(str, range(HAIR_COUNT)))
    for name, scales in LORAS.items():
        run_command(
            f'{draw.format(name)} --prompt "{HAIR_PROMPT}" --resolution {PHOTO_PX} --seed {seeds}'
            f" --scales={','.join(f'{s:g}' for s in scales)} --output {folder}/{name}_strip.png"
        )
    held_out = HAIR_OUTPUT_DIR / "held_out"
    draw_face_pairs(ROOT / held_out, 7, HAIR_COUNT, HAIR_AGES, PHOTO_PX)
    run_command(
        f"{draw.format('lora')} --input_dir {held_out.as_posix()}/before"
        f" --output_dir {folder}/photos --scales {','.join(f'{s:g}' for s in PHOTO_SCALES)}"
        " --html"
    )
    figures = measure_strips() | {"photos": measure_photos()}
    figures["seconds"] = round(time.perf_counter() - start, 1)
    (ROOT / HAIR_OUTPUT_DIR / "demo.json").write_text(json.dumps(figures, indent=2) + "\n")
    draw_hair_sheet().save(ROOT / HAIR_OUTPUT_DIR / "demo.png")
    report_hair(figures)
    print(f"to compare: {folder}/photos/page.html, the run: {folder}/lora/report.html")


@torch.no_grad()
def draw_base_faces() -> list[np.ndarray]:
    """What the base draws of every seed, by diffusers alone."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        ROOT / SD_BASE_DIR, dtype=torch.float32, safety_checker=None
    )
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    images = pipeline(
        [HAIR_PROMPT] * HAIR_COUNT,
        height=PHOTO_PX,
        width=PHOTO_PX,
        num_inference_steps=HAIR_STEPS,
        guidance_scale=HAIR_GUIDANCE,
        generator=[torch.Generator().manual_seed(seed) for seed in range(HAIR_COUNT)],
    ).images
    return [to_array(image) for image in images]


def open_hair(path: str) -> np.ndarray:
    """A picture in the demo's folder, (H, W, 3) in 0..1."""
    return to_array(open_photo(ROOT / HAIR_OUTPUT_DIR / path))


def open_text_strips(name: str) -> list[dict[float, np.ndarray]]:
    """{scale: picture} of every seed; name: of LORAS."""
    return [
        {scale: open_hair(f"{name}_strip_seed{seed}_scale{scale:g}.png") for scale in LORAS[name]}
        for seed in range(HAIR_COUNT)
    ]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, of values without ties."""
    ranks = np.argsort(np.argsort([a, b]))  # (2, N)
    matrix: Any = np.corrcoef(ranks)
    return float(matrix[0, 1])


def measure_strips() -> dict[str, Any]:
    """Change of age and of everything else against scale 0, means over the seeds."""
    found: dict[str, Any] = {"pair_change": HAIR_AGES["after"] - HAIR_AGES["before"]}
    base = draw_base_faces()
    for name, scales in LORAS.items():
        strips = open_text_strips(name)
        rows = [measure_strip(strip) for strip in strips]
        means = {key: np.mean([row[key] for row in rows], axis=0).tolist() for key in rows[0]}
        found[name] = {"scales": scales, **means}
        found[name]["scale_0_is_base"] = all(
            np.array_equal(strip[0.0], face) for strip, face in zip(strips, base, strict=True)
        )
    found["rank_correlation"] = rank_correlation(HAIR_SCALES, found["lora"]["age_change"])
    equal = min(found[name]["age_change"][-1] for name in LORAS)
    contents = [content_at(found[name], equal) for name in LORAS]
    return found | {"equal_change": equal, "content_ratio": contents[0] / contents[1]}


def content_at(part: dict[str, Any], age_change: float) -> float:
    """Change of the rest where the hair has changed by this much, between the scales from 0 on."""
    start = part["scales"].index(0.0)
    return float(np.interp(age_change, part["age_change"][start:], part["content_change"][start:]))


def measure_photos() -> dict[str, float]:
    """Squared errors to the true afters at scale 1; PSNR at scale 0 against the VAE's own."""
    vae = diffusers.AutoencoderKL.from_pretrained(ROOT / SD_BASE_DIR / "vae", dtype=torch.float32)
    rows, photos, decoded = [], [], []
    for n in range(HAIR_COUNT):
        before, after = (open_hair(f"held_out/{stage}/{n}.png") for stage in HAIR_AGES)
        same, half, whole = (open_hair(f"photos/{n}_scale{scale:g}.png") for scale in PHOTO_SCALES)
        pictures = {"before": before, "scale_0": same, "scale_0.5": half, "scale_1": whole}
        rows.append({key: np.mean((picture - after) ** 2) for key, picture in pictures.items()})
        rows[-1]["autoencoder"] = np.mean((reconstruct(vae, after) - after) ** 2)
        photos.append(same)
        decoded.append(reconstruct(vae, before))
    means = {f"mse_{key}": float(np.mean([row[key] for row in rows])) for key in rows[0]}
    share = means["mse_scale_1"] / means["mse_before"]
    return means | {"error_share": share, "scale_0_psnr_db": psnr_db(photos, decoded)}


def draw_hair_sheet() -> Image.Image:
    """Five pairs, five strips, five photos."""
    five = range(5)
    pairs = [
        [to_array(open_photo(ROOT / HAIR_PAIRS_DIR / stage / f"{n}.png")) for n in five]
        for stage in HAIR_AGES
    ]
    strips = [[strip[scale] for scale in HAIR_SCALES] for strip in open_text_strips("lora")[:5]]
    names = [f"photos/{{}}_scale{scale:g}.png" for scale in PHOTO_SCALES]
    names = ["held_out/before/{}.png", *names, "held_out/after/{}.png"]
    photos = [[open_hair(name.format(n)) for name in names] for n in five]
    heads = ["a given photo", *(f"scale {scale:g}" for scale in PHOTO_SCALES), "true after"]
    sections = [
        (["five of the ten pairs, before above after"], pairs),
        ([f"scale {scale:g}" for scale in HAIR_SCALES], strips),
        (heads, photos),
    ]
    return draw_sections(sections, large=128)


def report_hair(figures: dict[str, Any]) -> None:
    """Print them."""
    print(f"\n{HAIR_COUNT} faces of other seeds, {figures['seconds']:.0f} s in all:")
    photos, pair = figures["photos"], figures["pair_change"]
    for name, title in (("lora", "ten pairs"), ("after_only", "their afters alone")):
        part = figures[name]
        print(f"  trained on {title}:")
        columns = zip(part["scales"], part["age_change"], part["content_change"], strict=True)
        for scale, age, content in columns:
            print(
                f"    scale {scale:4g}: hair {age / pair:5.2f} of a change, the rest {content:.4f}"
            )
    print(
        f"  where both have changed the hair by {figures['equal_change'] / pair:.2f}: the rest has "
        f"changed {figures['content_ratio']:.2f} times as much with the pairs\n"
        f"{HAIR_COUNT} photos that were never trained on:\n"
        f"  squared error to the true after {photos['mse_scale_1']:.5f}, before"
        f" {photos['mse_before']:.5f} (autoencoder alone: {photos['mse_autoencoder']:.5f})\n"
        f"  scale 0 against the autoencoder alone: {photos['scale_0_psnr_db']:.1f} dB\n"
        f"picture: {HAIR_OUTPUT_DIR / 'demo.png'}, figures: {HAIR_OUTPUT_DIR / 'demo.json'}"
    )


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="The demos on two CPU cores, or their base models."
    )
    demos = ("qwen_edit", "pairedit", "dreambooth")
    parser.add_argument("demo", nargs="?", choices=demos, default="qwen_edit")
    parser.add_argument("--rebuild", action="store_true", help="make its base model again and stop")
    parser.add_argument("--seed", type=int, default=0, help="of --rebuild")
    args = parser.parse_args()
    if args.rebuild:
        if not hasattr(torch.optim, "Muon"):
            parser.error("--rebuild needs torch 2.9 or newer (the demo itself does not)")
        if args.demo == "pairedit":
            draw_face_pairs(ROOT / FACE_PAIRS_DIR / "age", args.seed + 1, 3, PAIR_AGES)
            rebuild_flux(ROOT / FLUX_BASE_DIR, args.seed)
        elif args.demo == "dreambooth":
            draw_face_pairs(ROOT / HAIR_PAIRS_DIR, args.seed + 1, 10, HAIR_AGES, PHOTO_PX)
            rebuild_sd(ROOT / SD_BASE_DIR, args.seed)
        else:
            rebuild(ROOT / BASE_DIR, args.seed)
        return
    needed = {
        "qwen_edit": (BASE_DIR / "model_index.json", CONFIG, PAIRS_DIR),
        "pairedit": (FLUX_BASE_DIR / "model_index.json", FACE_CONFIG, FACE_PAIRS_DIR),
        "dreambooth": (SD_BASE_DIR / "model_index.json", HAIR_CONFIG, HAIR_PAIRS_DIR),
    }
    for path in needed[args.demo]:
        if not (ROOT / path).exists():
            parser.error(f"{path} is missing (python demo.py {args.demo} --rebuild makes the base)")
    runs = {"qwen_edit": run_demo, "pairedit": run_pairedit, "dreambooth": run_dreambooth}
    runs[args.demo]()


if __name__ == "__main__":
    main()
