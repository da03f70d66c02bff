"""Make the tiny base models of the demos, and the pairs of two of them, from nothing.

How faces are drawn, and what is measured in them (hair, and the rest), is here, too.

    python demo/rebuild.py qwen_edit     # demo/qwen_edit_base, afters of data/photo_pairs
    python demo/rebuild.py pairedit      # demo/flux_slider_base, demo/slider_pairs
    python demo/rebuild.py dreambooth    # demo/sd_pairs_base, demo/hair_pairs

The same seed gives the same bits on the same machine (demo/qwen_edit_base, 40 minutes on one core,
was made stage by stage: a rebuilt one is not the same to the bit). tests/tiny.py builds its random
models with the functions here.
"""

from __future__ import annotations

import argparse
import colorsys
import functools
import json
import math
import re
import string
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from tqdm.auto import tqdm
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from demo import (
    BASE_DIR,
    FACE_PAIRS_DIR,
    FLUX_BASE_DIR,
    HAIR_PAIRS_DIR,
    HELD_OUT,
    PAIRS_DIR,
    ROOT,
    SD_BASE_DIR,
)
from train_qwen_edit import encode_stills_in_2d, load_processor  # needs no torchvision
from utils import UserError, load_script, run_script

scenes: Any = load_script(Path(__file__).with_name("scenes.py"))

SIZES_PX = ((288, 288), (352, 224), (256, 320))  # (W, H) of what the base is taught with
VISION_PX = 64  # side of the picture shown to the text encoder
LATENT_CHANNELS = 16
FACE_PX = 64
PAIR_AGES, HAIR_AGES = {"source": 0.4, "target": 0.6}, {"before": 0.2, "after": 0.6}
TEXT_TOKENS = 16  # max_sequence_length of configs/demo_pairedit.yaml
DARK_HAIR, WHITE_HAIR = np.array([0.2, 0.13, 0.1]), np.array([0.95, 0.95, 0.95])
PALE_SKIN, BROWN_SKIN = np.array([1.0, 0.85, 0.74]), np.array([0.62, 0.42, 0.3])
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
Coder = Callable[[torch.Tensor], torch.Tensor]
SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]


# --- 1. Qwen-Image-Edit: text encoder, tokenizer, processor ---------------------------------------


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


def build_processor(tokenizer: Any) -> Any:
    """Pictures down to 56 x 56 px (4 tokens) are taken."""
    pictures = transformers.Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
    with tempfile.TemporaryDirectory() as folder:
        parts = SimpleNamespace(tokenizer=tokenizer, image_processor=pictures)
        save_processor(parts, Path(folder))
        processor = load_processor(Path(folder))
    processor.tokenizer = tokenizer  # the one that was read would be saved with where it lay
    return processor


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


# --- 2. autoencoders: a linear transform inside the stock classes ---------------------------------


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
        down, wide = [inner] * 2, [width] * 2
        self.conv_in = Convolution(3, inner)
        self.down = nn.ModuleList(Convolution(inner, n, stride=2) for n in (*down, LATENT_CHANNELS))
        self.to_latents = Convolution(LATENT_CHANNELS, LATENT_CHANNELS)
        self.from_latents = Convolution(LATENT_CHANNELS, width)
        self.up = nn.ModuleList(Convolution(width, half) for _ in range(3))
        self.widen = nn.ModuleList(Convolution(half, n, kernel=1) for n in (*wide, inner // 2))
        self.conv_out = Convolution(inner // 2, 3)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 16, H / 8, W / 8)."""
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


def build_vae(base_dim: int = 8) -> Any:
    """Random AutoencoderKLQwenImage with one channel width and no residual blocks in its levels."""
    vae: Any = diffusers.AutoencoderKLQwenImage(
        base_dim=base_dim,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=0,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    return vae.eval()


def stack_pixels(images: list[np.ndarray]) -> torch.Tensor:
    """(H, W, 3) arrays in [-1, 1] -> (B, 3, H, W)."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


class FlatMuon:
    """Muon on weights as matrices (outputs, the rest), kernels too; Adam on 1-D and not `of`.

    After 140 steps it leaves half of AdamW's error at the highest noise levels.
    """

    def __init__(
        self, module: nn.Module, rate: float, steps: int, of: Sequence[Any] = (), rest: float = 2e-3
    ) -> None:
        parameters = [p for p in module.parameters() if p.requires_grad]
        matrices = {id(p) for p in of or parameters if p.numel() > len(p)}
        self.module, self.weights = module, [p for p in parameters if id(p) in matrices]
        self.matrices = [nn.Parameter(last_slice(p.data).flatten(1)) for p in self.weights]
        others = [p for p in parameters if id(p) not in matrices]
        self.optimizers = [
            torch.optim.Muon(self.matrices, lr=rate, weight_decay=0.0),
            torch.optim.AdamW(others, lr=rest, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        decay = torch.optim.lr_scheduler.PolynomialLR
        self.decay = [decay(o, steps, power=1.3) for o in self.optimizers]

    def minimise(self, loss: torch.Tensor) -> None:
        """One step."""
        self.module.zero_grad()
        loss.backward()
        for matrix, weight in zip(self.matrices, self.weights, strict=True):
            if weight.grad is not None:  # as of what no output depends on
                matrix.grad = last_slice(weight.grad).flatten(1)
        for part in (*self.optimizers, *self.decay):
            part.step()  # type: ignore[attr-defined]
        for matrix, weight in zip(self.matrices, self.weights, strict=True):
            kernel = last_slice(weight.data)
            kernel.copy_(matrix.data.view(kernel.shape))


def last_slice(kernel: torch.Tensor) -> torch.Tensor:
    """What a still sees of a causal 3-D convolution's kernel; other kernels as they are."""
    return kernel[:, :, -1] if kernel.dim() == 5 else kernel


def draw_windows(
    rng: np.random.RandomState, leaves: list[np.ndarray], photos: list[Image.Image], count: int = 16
) -> torch.Tensor:
    """Windows of 64 px of synthetic pictures and, if there are photos, mostly of them."""
    windows = []
    for _ in range(count):
        if photos and rng.rand() < 0.8:
            windows.append(scenes.recoloured_crop(rng, photos, (64, 64)))
            continue
        top, left = rng.randint(0, 33, 2)
        windows.append(leaves[rng.randint(len(leaves))][top : top + 64, left : left + 64])
    return stack_pixels(windows)


def fit_autoencoder(
    model: LinearAutoencoder, windows: Callable[[int], torch.Tensor], steps: int
) -> None:
    """Least squares on windows(16) of pictures.

    Muon instead of Adam: every layer is ill conditioned because low frequencies dominate pictures.
    """
    optimizer, bar = FlatMuon(model, 0.02, steps), tqdm(range(steps), "autoencoder")
    for _ in bar:
        batch = windows(16)
        loss = F.mse_loss(model(batch), batch)
        optimizer.minimise(loss)
        bar.set_postfix(db=f"{10 * math.log10(4 / loss.item()):.1f}", refresh=False)


@torch.no_grad()
def principal_axes(encode: Coder, decode: Coder, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Find the latents' principal axes, measured in pixels; returns rotation, mean and std.

    New latents are rotation @ (old - mean). The std (16,) that the pipeline divides by is the
    square root of the axes' own deviation: a prediction error that is equal in all channels then
    costs the fewest pixel errors.
    """
    latents = encode(pixels)
    mean = latents.mean((0, 2, 3))
    centred = (latents - mean[:, None, None]).transpose(0, 1).flatten(1)  # (16, B h w)
    covariance = centred @ centred.T / centred.shape[1]
    some, size = latents[:16], 0.3 * covariance.diagonal().sqrt()
    footprints, usual = [], decode(some)
    for channel in range(LATENT_CHANNELS):  # of a small change in the middle
        changed = some.clone()
        changed[:, channel, some.shape[2] // 2, some.shape[3] // 2] += size[channel]
        footprints.append(((decode(changed) - usual) / size[channel]).flatten())
    footprint = torch.stack(footprints) / math.sqrt(len(some))  # (16, B pixels)
    metric = torch.linalg.cholesky(footprint @ footprint.T).T  # |metric z|^2: pixel energy of z
    variance, axes = torch.linalg.eigh(metric @ covariance @ metric.T)
    rotation = axes.flip(1).T @ metric
    deviation = variance.flip(0).clamp_min(1e-12).sqrt()
    std = deviation.sqrt()
    std *= (deviation / std).square().mean().sqrt()  # all normalised latents: variance 1
    return rotation, mean, std


@torch.no_grad()
def turn_latents(encoder: Any, decoder: Any, rotation: torch.Tensor, mean: torch.Tensor) -> None:
    """Put a rotation of the latents into the last encoder and the first decoder convolution."""
    kernel, n = decoder.weight.view(decoder.weight.shape[0], len(mean), -1), len(mean)
    decoder.bias += kernel.sum(2) @ mean
    turned = torch.einsum("oly,lk->oky", kernel, torch.linalg.inv(rotation))
    decoder.weight.copy_(turned.reshape(decoder.weight.shape))
    encoder.weight[:n] = (rotation @ encoder.weight[:n].flatten(1)).view_as(encoder.weight[:n])
    encoder.bias[:n] = rotation @ (encoder.bias[:n] - mean)


@torch.no_grad()
def to_stock_vae(model: LinearAutoencoder) -> Any:
    """The same transform as an AutoencoderKLQwenImage.

    Its residual blocks become zero. Before conv_out stand an RMS norm and a SiLU, undone so: one
    channel is a large constant, which makes the norm a constant factor, and the others come in
    pairs (x, -x), because silu(x) - silu(-x) = x.
    """
    width = model.conv_in.shape[0] + 1
    vae = build_vae(width)
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


@torch.no_grad()
def encode_stills(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1] -> latents (B, 16, H / 8, W / 8), not normalised."""
    return vae.quant_conv(vae.encoder(pixels.unsqueeze(2)))[:, :LATENT_CHANNELS, 0]


def decode_stills(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """The way back, not clipped."""
    return vae.decoder(vae.post_quant_conv(latents.unsqueeze(2)))[:, :, 0]


def fit_qwen_vae(windows: Callable[[int], torch.Tensor], steps: Sequence[int]) -> Any:
    """AutoencoderKLQwenImage by squared error on windows(n): linear, all of it, its decoder.

    A random network of this size learns pictures far too slowly. The residual branches join at
    zero; attention stays there, as a window is no whole picture. Alone, the decoder learns to
    leave out the ripples that the linear one draws around edges.
    """
    linear = LinearAutoencoder(48)
    fit_autoencoder(linear, windows, steps[0])
    vae: Any = encode_stills_in_2d(to_stock_vae(linear))
    branches = []
    for name, weight in vae.named_parameters():
        weight.requires_grad_("attentions" not in name and "time_conv" not in name)
        if name.endswith("conv1.weight"):
            kernel = last_slice(weight.data)
            kernel.copy_(nn.init.orthogonal_(torch.empty_like(kernel).flatten(1)).view_as(kernel))
        if name.endswith(("conv1.weight", "conv2.weight")):
            branches.append(weight)
    fit_branches(vae, windows, FlatMuon(vae, 0.007, steps[1], branches, 8e-4), steps[1])
    with torch.no_grad():
        vae.quant_conv.weight[LATENT_CHANNELS:] = 0
        vae.quant_conv.bias[LATENT_CHANNELS:] = -20  # log-variance: no noise
    coders = functools.partial(encode_stills, vae), functools.partial(decode_stills, vae)
    rotation, mean, std = principal_axes(*coders, windows(64))
    turn_latents(vae.quant_conv, vae.post_quant_conv, rotation, mean)
    vae.register_to_config(latents_std=[round(v, 6) for v in std.tolist()])
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    branches = [weight for weight in branches if weight.requires_grad]
    fit_branches(vae, windows, FlatMuon(vae, 0.005, steps[2], branches, 5e-4), steps[2], 0.1)
    return vae.requires_grad_(False)


def fit_branches(
    vae: Any,
    windows: Callable[[int], torch.Tensor],
    optimizer: FlatMuon,
    steps: int,
    absolute: float = 0.0,
) -> None:
    """Squared error, and a share of the absolute one: it counts where pictures are smooth."""
    bar = tqdm(range(steps), "residual branches")
    for _ in bar:
        pixels = windows(8)
        difference = decode_stills(vae, encode_stills(vae, pixels)) - pixels
        error = difference.square().mean()
        optimizer.minimise(error + absolute * difference.abs().mean())
        bar.set_postfix(db=f"{10 * math.log10(4 / error.item()):.1f}", refresh=False)


# --- 3. Qwen-Image-Edit: a transformer that copies, and knows three lights ------------------------


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


@torch.no_grad()
def draw_edit_latents(
    rng: np.random.RandomState, vae: Any, photos: list[Image.Image], count: int = 90
) -> list[torch.Tensor]:
    """Normalised latents of random pictures, plain and under each of scenes.LIGHTS.

    One tensor (1 + lights, count, 16, h, w) for each of SIZES_PX.
    """
    std = torch.tensor(vae.config.latents_std).view(-1, 1, 1)
    pools = []
    for width, height in SIZES_PX:
        pool = []
        for _ in tqdm(range(count), f"pictures {width} x {height}", leave=False):
            picture = scenes.recoloured_crop(rng, photos, (width, height))
            if rng.rand() < 0.15:
                picture = scenes.draw_leaves(rng, max(width, height))[:height, :width]
            relit = [scenes.relight(picture / 2 + 0.5, each) for each in scenes.LIGHTS.values()]
            pool.append(
                encode_stills(vae, stack_pixels([picture, *(view * 2 - 1 for view in relit)])) / std
            )
        pools.append(torch.stack(pool, 1))
    return pools


@torch.no_grad()
def embed_prompts(
    rng: np.random.RandomState, pipeline: Any, photos: list[Image.Image], count: int = 8
) -> list[tuple[int, torch.Tensor]]:
    """(what to do, embeddings with `count` pictures (count, T, D)) for neutral prompts and lights.

    What to do: 0 copies, n is the nth of scenes.LIGHTS. Neutral are also sentences of random words:
    what the base was not taught it shall leave undone.
    """
    words = sorted({word for prompt in NEUTRAL_PROMPTS for word in prompt.split()})
    words += ["".join(rng.choice(list(string.ascii_lowercase), 6)) for _ in words]
    random = [" ".join(rng.choice(words, rng.randint(2, 8))) for _ in range(32)]
    asked = [(0, prompt) for prompt in (*NEUTRAL_PROMPTS, *random)]
    asked += [(n, prompt) for n, prompt in enumerate(scenes.LIGHTS, 1)] * 8
    embeds = []
    for what, prompt in asked:
        crops = [scenes.recoloured_crop(rng, photos, (VISION_PX, VISION_PX)) for _ in range(count)]
        images = [Image.fromarray(((crop + 1) * 127.5).astype(np.uint8)) for crop in crops]
        shown = torch.cat([pipeline.encode_prompt(prompt, [image])[0] for image in images])
        embeds.append((what, shown))
    return embeds


def edit_loss(
    transformer: Any, latents: torch.Tensor, reference: torch.Tensor, embeds: torch.Tensor
) -> torch.Tensor:
    """Flow-matching loss of an edit; latents (B, 16, h, w)."""
    tokens, shown = pack(latents), pack(reference)
    noise = torch.randn_like(tokens)
    sigma = torch.sigmoid(torch.randn(len(tokens)) * 1.2 + 0.4).clamp_min(1e-3)
    noisy = tokens + sigma[:, None, None] * (noise - tokens)
    grid = (1, latents.shape[2] // 2, latents.shape[3] // 2)
    velocity = transformer(
        hidden_states=torch.cat([noisy, shown], dim=1),
        encoder_hidden_states=embeds,
        timestep=sigma,
        img_shapes=[[grid, grid]] * len(tokens),
        return_dict=False,
    )[0][:, : tokens.shape[1]]
    return F.mse_loss(velocity, noise - tokens)


def teach_edits(
    rng: np.random.RandomState,
    transformer: Any,
    pools: list[torch.Tensor],
    embeds: list[tuple[int, torch.Tensor]],
    steps: int,
    whole: bool,
) -> None:
    """Whole pictures, or windows of 8 x 8 latents (finding the same place is learned there)."""
    optimizer, bar = FlatMuon(transformer, 0.01 if whole else 0.02, steps), tqdm(range(steps))
    for _ in bar:
        pool, (what, text) = pools[rng.randint(len(pools))], embeds[rng.randint(len(embeds))]
        if not whole:
            top, left = (2 * rng.randint(0, (side - 8) // 2 + 1) for side in pool.shape[3:])
            latents = pool[:, rng.randint(0, pool.shape[1], 48), :, top : top + 8, left : left + 8]
        else:
            latents = pool[:, rng.randint(0, pool.shape[1], 4)]
        shown = text[rng.randint(0, len(text), latents.shape[1])]
        loss = edit_loss(transformer, latents[what], latents[0], shown)
        optimizer.minimise(loss)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


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
            config = folder / name / "config.json"
            if config.is_file():  # it shall not say the folder it came from
                settings = json.loads(config.read_text(encoding="utf-8"))
                settings.pop("_name_or_path", None)
                config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def rebuild_qwen(
    output_dir: Path,
    seed: int = 0,
    autoencoder_steps: Sequence[int] = (800, 1000, 2000),
    edit_steps: Sequence[int] = (1500, 1400),
) -> None:
    """Write the base model; it sees synthetic pictures and the befores that are not held out."""
    torch.manual_seed(seed)
    rng = np.random.RandomState(seed)
    befores = sorted((ROOT / PAIRS_DIR).glob("*_R.png"))
    photos = [Image.open(p).convert("RGB") for p in befores if p.name[:-6] not in HELD_OUT]
    leaves = [scenes.draw_leaves(rng, 96) for _ in tqdm(range(200), "synthetic pictures")]
    relit = [
        scenes.relight_photo(photo, each) for each in scenes.LIGHTS.values() for photo in photos
    ]
    windows = functools.partial(draw_windows, rng, leaves, photos * 2 + relit)
    vae = fit_qwen_vae(windows, autoencoder_steps)
    tokenizer = build_tokenizer()
    pipeline: Any = diffusers.QwenImageEditPlusPipeline(
        scheduler=build_scheduler(),
        vae=vae,
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        processor=build_processor(tokenizer),
        transformer=build_transformer(zero_cond_t=True),
    )
    embeds = embed_prompts(rng, pipeline, photos)
    pools = draw_edit_latents(rng, vae, photos)
    for steps, whole in zip(edit_steps, (False, True), strict=True):
        teach_edits(rng, pipeline.transformer, pools, embeds, steps, whole)
    save_pipeline(pipeline, output_dir)


# --- 4. faces with one continuous attribute -------------------------------------------------------


class Face(NamedTuple):
    """What a picture shows; lengths in 1/32 of its side, colours RGB in 0..1."""

    age: float  # the attribute: hair from dark, 0, to white, 1
    background: tuple[float, ...]
    clothes: tuple[float, ...]
    skin: float  # from pale, 0, to brown, 1
    x: float  # centre of the head
    y: float
    width: float  # half of the head's
    eye: float  # half height
    mouth: float  # half width


def random_face(rng: np.random.RandomState) -> Face:
    """Everything varies independently; ages are triangular about 0.4, from 0 to 0.8."""

    def colour(least: float, most: float, value: float) -> tuple[float, ...]:
        return colorsys.hsv_to_rgb(rng.rand(), rng.uniform(least, most), value)

    age, background = 0.4 * (rng.rand() + rng.rand()), colour(0.15, 0.4, 0.9)
    lows, highs = (0.0, 14.5, 14.5, 8.0, 1.2, 2.2), (1.0, 17.5, 16.5, 9.5, 1.6, 3.4)
    return Face(age, background, colour(0.3, 0.6, 0.6), *rng.uniform(lows, highs))


def pixel_centres() -> np.ndarray:
    """(2, side, side): y and x of every pixel's centre, in 1/32 of the side."""
    return (np.mgrid[0:FACE_PX, 0:FACE_PX] + 0.5) * (32 / FACE_PX)


def draw_face(face: Face) -> np.ndarray:
    """(64, 64, 3) in 0..1: a head and shoulders, of ellipses with soft edges."""
    y, x = pixel_centres() - np.array([face.y, face.x])[:, None, None]
    picture = np.linspace(1.06, 0.86, FACE_PX)[:, None, None] * face.background
    picture = np.repeat(picture, FACE_PX, axis=1)

    def paint(
        left: float, top: float, radii: Any, colour: Any, lowest: float = 32, soft: float = 0.75,
        cover: float = 1,
    ) -> None:  # fmt: skip
        distance = (np.hypot((x - left) / radii[0], (y - top) / radii[1]) - 1) * min(radii)
        inside = np.clip(0.5 - np.maximum(distance, y - lowest) / soft, 0, 1)[..., None]
        picture[:] += cover * inside * (np.asarray(colour) - picture)

    w, r, skin = face.width, face.eye, PALE_SKIN + face.skin * (BROWN_SKIN - PALE_SKIN)
    hair = DARK_HAIR + face.age * (WHITE_HAIR - DARK_HAIR)
    paint(0, 20, (1.35 * w, 9.5), face.clothes)
    paint(0, 10.5, (0.36 * w, 5.5), 0.82 * skin)  # neck
    paint(0, -2.2, (1.02 * w, 1.1 * w), hair, lowest=0.6)
    for side in (-1, 1):
        paint(side * 0.84 * w, 2.2, (1.2, 1.9), 0.9 * skin)  # ear
    paint(0, 1.6, (0.82 * w, 1.02 * w), skin)
    paint(0, -5, (0.86 * w, 0.62 * w), hair, lowest=-3.4)  # fringe
    for side in (-1, 1):
        paint(side * 3.6, -1.2, (1.9, 0.45), DARK_HAIR, cover=0.8)  # brow
        paint(side * 3.6, 1.4, (1.35 * r, r), (0.97, 0.97, 0.97))
        paint(side * 3.6, 1.4, (0.8 * r, 0.85 * r), (0.12, 0.1, 0.12))
        paint(side * 4.6, 5, (2, 1.5), (0.95, 0.5, 0.45), soft=2.5, cover=0.25)  # cheek
    paint(0, 4, (0.9, 1.1), 0.82 * skin, soft=1.2)  # nose
    paint(0, 7.3, (face.mouth, 0.95), (0.85, 0.16, 0.2))
    return picture.clip(0, 1)


def draw_many(rng: np.random.RandomState, count: int) -> tuple[list[Face], torch.Tensor]:
    """`count` faces, and their pictures (N, 3, H, W) in [-1, 1]."""
    faces = [random_face(rng) for _ in range(count)]
    drawn = [draw_face(face).astype(np.float32) for face in tqdm(faces, "draw faces")]
    return faces, stack_pixels(drawn) * 2 - 1


def draw_face_pairs(folder: Path, seed: int, count: int, ages: dict[str, float]) -> None:
    """Write <stage>/<n>.png of every stage in `ages`: the same face at another age."""
    rng = np.random.RandomState(seed)
    for n in range(count):
        face = random_face(rng)
        for stage, age in ages.items():
            write_picture(draw_face(face._replace(age=age)), folder / stage / f"{n}.png")


def from_centre(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of every pixel seen from the centre of the head, in 1/32 of the side.

    The mouth tells where that is: nothing else is so red. Heads are drawn within narrow limits.
    """
    y, x = pixel_centres()
    red = np.clip(picture[..., 0] - picture[..., 1:].max(-1) - 0.48, 1e-9, None)
    red /= red.sum()
    return x - np.clip((red * x).sum(), 14, 18), y - np.clip((red * y).sum() - 7.3, 14, 17)


def face_age(picture: np.ndarray, place: tuple[np.ndarray, np.ndarray]) -> float:
    """Of a patch of hair: its mean as a share of the way from DARK_HAIR, 0, to WHITE_HAIR, 1.

    place: of from_centre, in a series that of the unedited picture.
    """
    patch = (abs(place[0]) <= 3) & (abs(place[1] + 7.5) <= 1.5)
    axis = WHITE_HAIR - DARK_HAIR
    return float((picture[patch].mean(0) - DARK_HAIR) @ axis / (axis @ axis))


def content_change(
    before: np.ndarray, after: np.ndarray, place: tuple[np.ndarray, np.ndarray]
) -> float:
    """Mean absolute difference (pictures in 0..1) outside the box that holds the hair."""
    rest = (abs(place[0]) > 12) | (place[1] > 1.2)
    return float(abs(before - after)[rest].mean())


def write_picture(picture: np.ndarray, path: Path) -> None:
    """(H, W, 3) in 0..1 as a file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((picture * 255).round().astype(np.uint8)).save(path, quality=95)


def build_face_vae(channels: int, **settings: Any) -> Any:
    """Random AutoencoderKL: sides / 4; 0.17 million parameters."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 32),
        latent_channels=channels,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=FACE_PX,
        **settings,
    )


def fit_face_vae(
    rng: np.random.RandomState, vae: Any, pixels: torch.Tensor, steps: int
) -> torch.Tensor:
    """Fit on pixels (N, 3, H, W); return their latents, scaled to a deviation of 1.

    Squared error and a little of the Kullback-Leibler term.
    """
    optimizer, bar = FlatMuon(vae.train(), 0.02, steps), tqdm(range(steps), "autoencoder")
    for _ in bar:
        batch = pixels[rng.randint(0, len(pixels), 16)]
        posterior = vae.encode(batch).latent_dist
        error = F.mse_loss(vae.decode(posterior.sample()).sample, batch)
        optimizer.minimise(error + 2e-4 * posterior.kl().mean() / posterior.mean[0].numel())
        bar.set_postfix(db=f"{10 * math.log10(4 / error.item()):.1f}", refresh=False)
    vae.eval()
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pixels.split(500)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return latents * vae.config.scaling_factor


# --- 5. FLUX.1: a base that draws faces -----------------------------------------------------------


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
    optimizer = FlatMuon(pipeline.transformer, 0.04, steps, rest=1e-3)
    bar = tqdm(range(steps), "faces")
    for _ in bar:
        pick = rng.randint(0, len(latents), 16)
        says = prompts[pick, rng.randint(0, prompts.shape[1], 16)]
        loss = face_loss(pipeline, latents[pick], text[says], pooled[says])
        optimizer.minimise(loss)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def rebuild_flux(
    output_dir: Path, seed: int = 0, vae_steps: int = 600, face_steps: int = 5000
) -> None:
    """Write the base model of the slider demo."""
    torch.manual_seed(seed)
    rng = np.random.RandomState(seed)
    faces, pixels = draw_many(rng, 12000)
    plain = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.0}
    vae = build_face_vae(LATENT_CHANNELS, **plain)
    latents = fit_face_vae(rng, vae, pixels, vae_steps)
    pipeline = build_flux(vae)
    true_of = [[0, 1, 2, 3 + (face.age > 0.4)] for face in faces]
    teach_faces(rng, pipeline, latents, np.array(true_of), face_steps)
    pipeline.to(torch.bfloat16).save_pretrained(output_dir)


# --- 6. Stable Diffusion 1.5: a base that draws faces, too ----------------------------------------


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
            sample_size=FACE_PX // 4,
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
    output_dir: Path, seed: int = 0, vae_steps: int = 1500, face_steps: Sequence[int] = (2400, 1400)
) -> None:
    """Write the base model of the pairs demo."""
    torch.manual_seed(seed)
    rng = np.random.RandomState(seed)
    faces, pixels = draw_many(rng, 8000)
    vae = build_face_vae(4)
    latents = fit_face_vae(rng, vae, pixels, vae_steps)
    pipeline = build_sd(vae)
    ages = [3 + (face.age > 0.4) for face in faces]
    true_of = [[0, 1, 1, 2, 2, says, says] for says in ages]  # 1 of 7: no prompt
    for power, steps in zip((0.5, 0.25), face_steps, strict=True):  # colours, then details
        prompts = np.array(true_of)
        teach_sd_faces(rng, pipeline, latents, prompts, steps, power)
    pipeline.to(torch.bfloat16).save_pretrained(output_dir)


def rebuild(demo: str, seed: int = 0) -> None:
    """Write the base model of a demo, and its pairs where they are drawn. Raises UserError."""
    if not hasattr(torch.optim, "Muon"):
        raise UserError("torch 2.9 or newer is needed (the demos themselves run with older ones)")
    if demo == "qwen_edit":
        scenes.relight_pairs(ROOT / PAIRS_DIR)
        rebuild_qwen(ROOT / BASE_DIR, seed)
    elif demo == "pairedit":
        draw_face_pairs(ROOT / FACE_PAIRS_DIR / "age", seed + 1, 3, PAIR_AGES)
        rebuild_flux(ROOT / FLUX_BASE_DIR, seed)
    else:
        draw_face_pairs(ROOT / HAIR_PAIRS_DIR, seed + 1, 10, HAIR_AGES)
        rebuild_sd(ROOT / SD_BASE_DIR, seed)


def main() -> None:
    """Rebuild what the command line names."""
    parser = argparse.ArgumentParser(description="The base models and pairs of the demos.")
    parser.add_argument("demo", choices=("qwen_edit", "pairedit", "dreambooth"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rebuild(args.demo, args.seed)


if __name__ == "__main__":
    run_script(main)
