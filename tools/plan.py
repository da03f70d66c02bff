"""What a run would be: data, tokens, memory, disk and time. Loads no model, downloads none.

    python train_qwen_edit.py --config configs/x.yaml --plan      # the same for the other trainers
    python tools/plan.py --script my_fork.py --config my.yaml     # a fork of one

Every figure is computed from shapes and settings; peaks are estimates.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import UserError, load_config, load_script, read_model_json, run_script

TFLOPS = {"RTX 4090": 165, "A100": 312, "H100, H200": 790}  # 16 bit, dense, as published
CONTEXT_GB = 1.0  # what CUDA and its libraries keep for themselves
BITS = {"int8": 8.01, "fp8": 8.01, "int4": 4.25, "int2": 2.25, "nf4": 4.5}  # of a weight and scale


def plan(script: Any, config: Any) -> str:
    """Return the plan of a run of a training script (its module) with this config."""
    if hasattr(script, "QwenImageEditTrainer"):
        return plan_qwen(script, config)
    return (
        plan_flux(script, config) if hasattr(script, "PairEditTrainer") else plan_sd(script, config)
    )


def time_lines(tflop: float, steps: int, share: float) -> list[str]:
    """Return how long steps take on known cards, at a share of their speed."""
    words = {0.5: "half its", 0.25: "a quarter of its"}[share]
    lines = []
    for name, speed in TFLOPS.items():
        seconds = tflop / (speed * share)
        total = f"{steps * seconds / 3600:.1f} h"
        lines.append(f"  {name} at {words} speed: {seconds:.2f} s a step, {total}")
    return lines


def weights_gb(model: Any, precision: str, plain_bytes: int, fine: Sequence[str]) -> float:
    """Return the size of a transformer whose blocks are quantised, modulation (`fine`) to 8 bit."""
    bits = BITS.get(precision.partition("-")[0])
    total = sum(parameter.numel() for parameter in model.parameters()) * plain_bytes
    for name, module in model.named_modules():
        if bits and isinstance(module, torch.nn.Linear) and "transformer_blocks." in name:
            inside = name.split("transformer_blocks.")[1].partition(".")[2]
            own = max(bits, 8.01) if inside.startswith(tuple(fine)) else bits
            total -= module.weight.numel() * (plain_bytes - own / 8)
    return total / 1e9


def room_gb() -> float | None:
    """Return the memory of the smallest CUDA device here, or None."""
    devices = range(torch.cuda.device_count())
    rooms = [torch.cuda.get_device_properties(i).total_memory / 1e9 for i in devices]
    return min(rooms, default=None)


def fit_lines(peak_gb: float, ways: dict[str, float]) -> list[str]:
    """Say whether a run fits here, and which of the ways out ({words: GB}) lower its peak."""
    room = room_gb()
    lines = ["  this machine has no CUDA device; the figures are for one of them"]
    if room is not None:
        word = "fits" if peak_gb < room else "DOES NOT FIT"
        lines = [f"  {word}: the smallest CUDA device here has {room:.1f} GB"]
    lower = {words: gb for words, gb in ways.items() if gb < peak_gb - 0.05}
    lines += ["What would lower it"] if lower else []
    for words, gb in lower.items():
        lines.append(f"  {words}: {gb:.1f} GB{', fits' if room and gb < room else ''}")
    return lines


# --- Qwen-Image-Edit ------------------------------------------------------------------------------

TEXT_ENCODER_GB, VAE_GB = 16.6, 0.25  # Qwen2.5-VL-7B and the VAE of the three checkpoints, bf16
# per token, block and channel: saved for the backward pass, fp32 LoRA in bf16 autocast
ACTIVATION_BYTES = 44


class Load(NamedTuple):
    """How large one kind of sample is."""

    sizes: tuple[tuple[int, int], ...]  # (W, H) px of target and references
    text: int  # tokens
    visits: float  # per epoch

    @property
    def tokens(self) -> int:
        """Return the tokens of target, references and text together."""
        return sum(w // 16 * (h // 16) for w, h in self.sizes) + self.text


class Outlook(NamedTuple):
    """What a run will see: its samples, and what the cache will hold."""

    samples: list[Any]
    loads: list[Load]
    latents: int  # entries
    prompts: int
    cache_gb: float


def text_tokens(example: Any) -> int:
    """About how many tokens an instruction with its pictures has: 28 x 28 px are one token."""
    sizes = [picture.size for picture in example.pictures["vision"]]
    seen = sum(round(w / 28) * round(h / 28) + 6 for w, h in sizes)
    return 5 + math.ceil(len(example.caption) / 4) + seen


def planned_transformer(script: Any, config: Any) -> Any:
    """Return the transformer without weights: of the checkpoint, or as published."""
    name = config.model.pretrained_model_name_or_path
    if name in script.PUBLISHED:  # diffusers' defaults are its sizes
        return script.empty_transformer({"zero_cond_t": script.PUBLISHED[name].name == "edit-v3"})
    return script.empty_transformer(read_model_json(name, "transformer/config.json"))


def qwen_weights_gb(script: Any, config: Any, transformer: Any) -> float:
    """Return the size of the transformer in the precision asked for."""
    plain = 2 if config.train.mixed_precision == "bf16" else 4
    return weights_gb(transformer, config.model.base_model_precision, plain, script.MODULATION)


def qwen_step_tflop(config: Any, transformer: Any, tokens: int) -> float:
    """Operations of one sample: forward and backward through a frozen base."""
    layers, width = len(transformer.transformer_blocks), transformer.inner_dim
    linear, attention = layers * tokens * 24 * width**2, layers * 4 * tokens**2 * width
    again = config.train.gradient_checkpointing
    return (linear * (3 if again else 2) + attention * (4.5 if again else 3.5)) / 1e12


def qwen_peak_gb(script: Any, config: Any, transformer: Any, trained: int, tokens: int) -> float:
    """Estimated peak of a training step on the (first) device; tokens: of a whole pass."""
    layers, width = len(transformer.transformer_blocks), transformer.inner_dim
    weights, swapped = qwen_weights_gb(script, config, transformer), config.model.blocks_to_swap
    weights -= max(0, swapped - 2) * weights / layers
    # the input of every block and one block computed again, or all
    kept = layers * 2 + ACTIVATION_BYTES
    if not config.train.gradient_checkpointing:
        kept = layers * ACTIVATION_BYTES
    adapter = trained * (16 + 4 * config.train.use_ema) / 1e9  # weight, gradient, Adam's moments
    beside = 0.0 if config.cache.use_cache else sum(encoder_sizes(config))
    own = weights + tokens * width * kept / 1e9 + adapter
    return own / max(1, len(config.model.devices)) + beside + CONTEXT_GB


def encoder_sizes(config: Any) -> tuple[float, float]:
    """GB of the text encoder and of the VAE."""
    folder = Path(config.model.pretrained_model_name_or_path)
    if not folder.is_dir():
        return TEXT_ENCODER_GB, VAE_GB
    parts = (folder / name for name in ("text_encoder", "vae"))
    text, vae = (sum(f.stat().st_size for f in p.glob("*.safetensors")) / 1e9 for p in parts)
    return text, vae


def look_ahead(script: Any, config: Any, width: int) -> Outlook:
    """Shapes, tokens and cache size of the data; width: channels of a prompt's embedding."""
    flavour = script.detect_flavour(config.model.pretrained_model_name_or_path)
    data, _ = script.find_samples(config, flavour)
    loads: Counter[tuple[Any, int]] = Counter()
    numbers: dict[str, dict[str, int]] = {"latent": {}, "prompt": {}, "region": {}}  # in an entry
    for draw in data.possible_draws():
        example, sample = data.resolve(draw), data.samples[draw.sample]
        text = text_tokens(example)
        for jobs in script.jobs_of(example).values():
            for job in jobs:
                w, h = job.pictures[0].size if job.pictures else (0, 0)
                size = text * width if job.kind == "prompt" else w // 8 * (h // 8) * 16
                numbers[job.kind][job.key(dict.fromkeys(numbers, ""))] = size
        if not (sample.held_out or draw.view or draw.dropped):
            pictures = example.pictures["pixel"] + example.pictures["control"]
            chance = sample.variants[draw.variant].weight / sum(v.weight for v in sample.variants)
            kind = tuple(picture.size for picture in pictures), -(-text // 64) * 64
            loads[kind] += data.dataset(draw).repeats * chance  # type: ignore[assignment]
    size = 2 if config.train.mixed_precision == "bf16" else 4
    total = sum(sum(numbers[kind].values()) for kind in ("latent", "prompt")) * size / 1e9
    found = [Load(sizes, text, visits) for (sizes, text), visits in loads.most_common()]
    return Outlook(data.samples, found, len(numbers["latent"]), len(numbers["prompt"]), total)


def ways_out(config: Any, n_blocks: int) -> Iterator[tuple[str, Any]]:
    """Settings that need less memory than the config's, from the cheapest to the dearest."""

    def changed(**settings: Any) -> tuple[str, Any]:
        data, words = config.model_dump(), []
        for path, value in settings.items():
            section, name = path.split("__")
            if data[section][name] != value:
                data[section][name] = value
                words.append(f"{section}.{name}: {str(value).lower()}")
        return ", ".join(words), type(config).model_validate(data)

    model, bits = config.model, BITS.get(config.model.base_model_precision.partition("-")[0], 16)
    if not config.train.gradient_checkpointing:
        yield changed(train__gradient_checkpointing=True)
    if config.data.batch_size > 1:
        yield changed(data__batch_size=1)
    if config.data.reference_area == "1mp":
        yield changed(data__reference_area="target")
    if bits > BITS["int8"] and model.lora.method != "dora" and not model.blocks_to_swap:
        yield changed(model__base_model_precision="int8-quanto")
    if bits > BITS["nf4"] and model.lora.method != "lokr" and not model.blocks_to_swap:
        yield changed(model__base_model_precision="nf4-bnb")
    if model.base_model_precision != "nf4-bnb" and not model.blocks_to_swap:
        swap = {"model__blocks_to_swap": n_blocks * 5 // 6, "model__devices": []}
        yield changed(**swap, train__gradient_checkpointing=True)


def qwen_data_lines(config: Any, outlook: Outlook) -> list[str]:
    """Samples per data set, shapes, cache."""
    lines = ["Data"]
    for number, ds in enumerate(config.data.dataset_configs):
        mine = [s for s in outlook.samples if s.dataset == number]
        held = sum(s.held_out for s in mine)
        combinations = max((len(s.variants) for s in mine), default=0)
        lines.append(
            f"  {ds.name}: {len(mine)} samples, {held} held out, x {ds.repeats} repeats, "
            f"{combinations} combination(s), {ds.views} view(s)"
        )
    lines.append(
        "Shapes       target + references (px): text tokens, tokens in all, visits an epoch"
    )
    for load in outlook.loads[:8]:
        sizes = " + ".join(f"{w}x{h}" for w, h in load.sizes)
        lines.append(f"  {sizes}: {load.text}, {load.tokens}, {load.visits:g}")
    if len(outlook.loads) > 8:
        lines.append(f"  ... and {len(outlook.loads) - 8} more")
    if config.cache.use_cache:
        place = config.cache.cache_dir.absolute()
        free = next(shutil.disk_usage(p).free for p in (place, *place.parents) if p.exists()) / 1e9
        entries = f"{outlook.latents} latents, {outlook.prompts} prompts"
        lines.append(f"Cache        {entries}: {outlook.cache_gb:.2f} GB on disk ({free:.0f} free)")
    return lines


def plan_qwen(script: Any, config: Any) -> str:
    """Return the plan of train_qwen_edit.py, or of a fork of it."""
    from accelerate import init_empty_weights

    model, cache, train = config.model, config.cache, config.train
    transformer = planned_transformer(script, config)
    parameters = sum(p.numel() for p in transformer.parameters())
    weights = qwen_weights_gb(script, config, transformer)
    with init_empty_weights():
        script.add_lora(transformer, model.lora, config.seed)
    trained = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    plain, n_blocks = planned_transformer(script, config), len(transformer.transformer_blocks)
    outlook = look_ahead(script, config, transformer.config.joint_attention_dim)
    loads, heaviest = outlook.loads, max((load.tokens for load in outlook.loads), default=0)
    visits = sum(load.visits for load in loads)
    mean = sum(qwen_step_tflop(config, plain, o.tokens) * o.visits for o in loads) / visits
    per_step = config.data.batch_size * train.gradient_accumulation_steps
    epoch = math.ceil(visits / per_step)
    steps = min(train.max_train_steps, epoch * (train.num_epochs or 10**9))
    here, (encoder, vae) = "the training device", encoder_sizes(config)
    when = "while the cache is filled, then freed" if cache.use_cache else "all the time"
    swap = f", {model.blocks_to_swap} blocks in CPU memory" if model.blocks_to_swap else ""
    batch = config.data.batch_size
    peak = qwen_peak_gb(script, config, plain, trained, heaviest * batch)
    lines = [
        *qwen_data_lines(config, outlook),
        f"Steps        {steps} of {per_step} sample(s) on each process, {epoch} an epoch; "
        f"{mean * per_step:.1f} TFLOP a step",
        *time_lines(mean * per_step, steps, 0.5),
        "",
        f"Transformer  {parameters:,} parameters, {model.base_model_precision}: {weights:.1f} GB",
        f"Adapter      {trained:,} parameters ({model.lora.method}, fp32)",
        "",
        f"Text encoder on {cache.text_encoder_device or here} {when}",
        f"VAE          on {cache.vae_encoder_device or here} {when}",
        f"Transformer  on {', '.join(model.devices) or here}{swap}",
        "",
        "Estimated peak of GPU memory",
        f"  cache     {max(encoder, vae) + CONTEXT_GB + 1:5.1f} GB: one encoder at a time"
        if cache.use_cache
        else f"  encoders  {encoder + vae:5.1f} GB, beside the transformer (use_cache: false)",
        f"  training  {peak:5.1f} GB, {batch} x {heaviest} tokens a pass",
    ]
    ways = {}
    for words, other in ways_out(config, n_blocks):
        if other.data.reference_area != config.data.reference_area:
            loads = look_ahead(script, other, 1).loads
        most = max((load.tokens for load in loads), default=0) * other.data.batch_size
        ways[words] = qwen_peak_gb(script, other, plain, trained, most)
        loads = outlook.loads
    return "\n".join([*lines, *fit_lines(peak, ways)])
