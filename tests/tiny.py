"""Tiny random checkpoints of the true classes, made offline in seconds."""

import functools
import json
import math
import os
import shutil
import string

import diffusers
import torch
import transformers
from conftest import ROOT
from tokenizers import pre_tokenizers

from utils import load_script

KINDS = {
    "2508": "QwenImageEditPipeline",
    "2509": "QwenImageEditPlusPipeline",
    "2511": "QwenImageEditPlusPipeline",
}
SYSTEM_TEMPLATE = (  # what Qwen3-VL's makes of a system message
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for c in m.content %}{{ c.text }}{% endfor %}<|im_end|>\n{% endfor %}"
)


def build(kind, folder):
    """Save a pipeline of one kind ("2508", "2509", "2511") into `folder`."""
    rebuild = load_script(ROOT / "demo/rebuild.py")
    torch.manual_seed(0)
    tokenizer = rebuild.build_tokenizer()
    pipeline = getattr(diffusers, KINDS[kind])(
        scheduler=rebuild.build_scheduler(),
        vae=rebuild.build_vae(),
        text_encoder=rebuild.build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        processor=rebuild.build_processor(tokenizer),
        transformer=rebuild.build_transformer(
            zero_cond_t=kind == "2511", layers=2, heads=2, head_dim=32
        ),
    )
    rebuild.save_pipeline(pipeline, folder)


def build_21(folder):
    """Save a QwenImage21Pipeline of random weights: 2 blocks, RGBA VAE of 16x, Qwen3-VL."""
    rebuild, qwen = load_script(ROOT / "demo/rebuild.py"), load_script(ROOT / "train_qwen_edit.py")
    torch.manual_seed(0)
    tokenizer = rebuild.build_tokenizer()
    pictures = transformers.Qwen2VLImageProcessorPil(
        min_pixels=32 * 32, max_pixels=2**24, patch_size=16, merge_size=2
    )
    tokenizer.save_pretrained(folder / "processor")
    pictures.save_pretrained(folder / "processor")
    (folder / "processor/chat_template.jinja").write_text(SYSTEM_TEMPLATE)
    processor = qwen.load_processor(folder / "processor", "Qwen3VLProcessor")
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    image, video, start, end = (tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names)
    text = {
        "vocab_size": math.ceil(len(tokenizer) / 64) * 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
            "rope_theta": 5e6,
        },
    }
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    vision |= {"out_hidden_size": 64, "deepstack_visual_indexes": [0]}
    tokens = {"image_token_id": image, "video_token_id": video}
    tokens |= {"vision_start_token_id": start, "vision_end_token_id": end}
    config = transformers.Qwen3VLConfig(
        text_config=text, vision_config=vision | {"num_position_embeddings": 64}, **tokens
    )
    shape = {"num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2}
    pipeline = diffusers.QwenImage21Pipeline(
        scheduler=rebuild.build_scheduler(),
        vae=diffusers.AutoencoderKLQwenImage21(base_dim=8, decoder_base_dim=8, num_res_blocks=1),
        text_encoder=transformers.Qwen3VLForConditionalGeneration(config),
        processor=processor,
        transformer=diffusers.QwenImage21Transformer2DModel(
            context_in_dim=64, axes_dims_rope=(8, 12, 12), **shape
        ),
    )
    index = {"_class_name": "QwenImage21Pipeline", "_diffusers_version": diffusers.__version__}
    for name, part in pipeline.components.items():
        kind = "Qwen3VLProcessor" if name == "processor" else type(part).__name__
        index[name] = [type(part).__module__.partition(".")[0], kind]
        if name != "processor":
            part.save_pretrained(folder / name)
    index["processor"][0] = "transformers"
    (folder / "model_index.json").write_text(json.dumps(index))


class Checkpoints(dict):
    """{"2508", "2509", "2511", "2.1", "flux", "sd": folder}; made when asked for, once."""

    def __init__(self, folder):
        self.folder = folder

    def __missing__(self, kind):
        builders = {"flux": build_flux, "sd": build_sd, "2.1": build_21}
        place, part = self.folder / kind, self.folder / f"{kind}.{os.getpid()}"
        if not place.exists():
            builders.get(kind, functools.partial(build, kind))(part)
            try:
                part.rename(place)
            except OSError:  # the other test process was first
                shutil.rmtree(part)
        self[kind] = place
        return place


build_all = Checkpoints


def build_tokenizers():
    """CLIP's and T5's tokenizer with small vocabularies."""
    words = ["a photo of a person", "smiling happy frowning", "image picture male female eyes"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate([*alphabet, *(b + "</w>" for b in alphabet)])}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    clip = transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(c, -8.0) for c in string.printable if not c.isspace()]
    pieces += [(f"▁{word}", -4.0) for word in sorted({w for text in words for w in text.split()})]
    t5 = transformers.T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)
    return clip, t5


def build_flux(folder):
    """Save a FluxPipeline of random weights with FLUX.1-dev's scheduler and 8x VAE."""
    torch.manual_seed(0)
    clip, t5 = build_tokenizers()
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    ids = {f"{name}_token_id": getattr(clip, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    clip_config = transformers.CLIPTextConfig(
        vocab_size=len(clip), intermediate_size=64, projection_dim=32, **sizes, **ids
    )
    t5_config = transformers.T5Config(
        vocab_size=len(t5), d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=2,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    pipeline = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            base_image_seq_len=256, base_shift=0.5, max_image_seq_len=4096, max_shift=1.15,
            shift=3.0, use_dynamic_shifting=True,
        ),
        vae=diffusers.AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[8, 16, 16, 16], layers_per_block=1, latent_channels=16,
            norm_num_groups=4, sample_size=64, scaling_factor=0.3611, shift_factor=0.1159,
            use_quant_conv=False, use_post_quant_conv=False,
        ),
        text_encoder=transformers.CLIPTextModel(clip_config),
        tokenizer=clip,
        text_encoder_2=transformers.T5EncoderModel(t5_config),
        tokenizer_2=t5,
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=32,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
            guidance_embeds=True, axes_dims_rope=(8, 12, 12),
        ),
    )  # fmt: skip
    pipeline.save_pretrained(folder)


def build_sd(folder):
    """Save a StableDiffusionPipeline of random weights with SD 1.5's layer types and scheduler."""
    torch.manual_seed(0)
    clip, _ = build_tokenizers()
    ids = {f"{name}_token_id": getattr(clip, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    clip_config = transformers.CLIPTextConfig(
        vocab_size=len(clip), hidden_size=32, intermediate_size=64, projection_dim=32,
        num_hidden_layers=2, num_attention_heads=4, **ids,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[8, 16, 16, 16], layers_per_block=1, latent_channels=4,
            norm_num_groups=4, sample_size=64, scaling_factor=0.18215,
        ),
        text_encoder=transformers.CLIPTextModel(clip_config),
        tokenizer=clip,
        unet=diffusers.UNet2DConditionModel(
            sample_size=8, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32, attention_head_dim=8,
        ),
        scheduler=diffusers.PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
            skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)


def random_factors(transformer, seed=0, layers=None, rank=4):
    """Of a slider, {layer: (down, up)}: large enough that a picture changes visibly."""
    import train_pairedit

    draw = torch.Generator().manual_seed(seed)
    modules = dict(transformer.named_modules())
    return {
        path: (
            torch.randn(rank, modules[path].in_features, generator=draw) * 0.1,
            torch.randn(modules[path].out_features, rank, generator=draw),
        )
        for path in layers or train_pairedit.target_layers(transformer, "full")
    }


def save_sliders(checkpoint, stem, original=None, seed=0):
    """A random slider as train_pairedit.py writes it: <stem>.safetensors, <original or stem>.pt."""
    import train_pairedit

    transformer = diffusers.FluxTransformer2DModel.from_pretrained(checkpoint / "transformer")
    switch = train_pairedit.AdapterSwitch()
    factors = random_factors(transformer, seed)
    train_pairedit.add_slider(transformer, switch, "semantic", factors, 1 / 4)
    train_pairedit.save_slider(stem.with_suffix(".safetensors"), transformer, "semantic", {})
    train_pairedit.save_original((original or stem).with_suffix(".pt"), transformer, "semantic")
    return stem.with_suffix(".safetensors")


def save_sd_lora(checkpoint, file, resolution=64):
    """A random LoRA on the attention of the UNet, as train_dreambooth_pairs.py writes it."""
    import train_dreambooth_pairs as script

    unet = diffusers.UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    ends = script.TARGETS["attention"]
    script.add_adapter(unet, script.AdapterSwitch(), "change", ends, 4, 4)
    draw = torch.Generator().manual_seed(0)
    for layer in script.adapted_layers(unet, "change").values():
        for factor in (layer.down["change"], layer.up["change"]):
            factor.data = torch.randn(factor.shape, generator=draw) * 0.1
    about = {"instance_prompt": "a photo of a person", "resolution": resolution}
    tensors = script.adapter_tensors({"unet": unet}, "change", 1.0)
    script.save_lora(file, tensors, about)
