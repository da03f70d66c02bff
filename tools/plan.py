"""What a run would be: data, tokens, memory, disk and time. Loads no model, downloads none.

    python train_qwen_edit.py --config configs/x.yaml --plan      # the same for the other trainers
    python tools/plan.py --script my_fork.py --config my.yaml     # any of them, or a fork

Every figure is computed from shapes and settings; peaks are estimates.
"""

from __future__ import annotations

import argparse
import logging
import math
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cards import BITS, REACH, card_lines, fit_lines, two, weights_gb

from utils import FileIndex, load_config, load_script, read_model_json, run_script

CONTEXT_GB = 1.0  # what CUDA and its libraries keep for themselves


def plan(script: Any, config: Any, cache_dir: Path | None = None) -> str:
    """Return the plan of a run of a training script (its module) with this config.

    cache_dir: where the cache will lie, if not where the config says.
    """
    if hasattr(script, "QwenImageEditTrainer"):
        return plan_qwen(script, config, cache_dir or config.cache.cache_dir)
    return (plan_flux if hasattr(script, "PairEditTrainer") else plan_sd)(script, config)


def planned(script: Any, argv: Sequence[str]) -> str:
    """Read the settings in argv, audit them, plan the run. Raises UserError; writes no file."""
    moved: list[Any] = []

    def audit(config: Any) -> list[str]:
        moved.append(elsewhere(config, Path(place)))
        return script.audit(moved[0])

    with tempfile.TemporaryDirectory() as place:
        config = load_config(script.Config, argv, check=audit)
        logging.disable(logging.WARNING)  # the audit has said it
        try:
            return plan(script, moved[0], cache_dir_of(config))
        finally:
            logging.disable(logging.NOTSET)


def cache_dir_of(config: Any) -> Path:
    """Return the folder of the cache, of a config with or without sections."""
    return config.cache.cache_dir if hasattr(config, "cache") else config.cache_dir


def elsewhere(config: Any, place: Path) -> Any:
    """Return a config whose output and cache are in another folder, with what is known of files."""
    cache, output = place / "cache", place / "output"
    cache.mkdir()
    if (index := cache_dir_of(config) / "index.jsonl").is_file():
        shutil.copy(index, cache)
    if hasattr(config, "logging"):
        logs = config.logging.model_copy(update={"output_dir": output})
        caching = config.cache.model_copy(update={"cache_dir": cache})
        return config.model_copy(update={"logging": logs, "cache": caching})
    name = "output_dir" if hasattr(config, "output_dir") else "output_folder"
    return config.model_copy(update={name: output, "cache_dir": cache})


# --- Qwen-Image-Edit ------------------------------------------------------------------------------

# bf16: of Qwen-Image-Edit (Qwen2.5-VL-7B) and of 2.1 (Qwen3-VL-8B)
ENCODERS_GB = {"Qwen2VLProcessor": (16.6, 0.25), "Qwen3VLProcessor": (17.5, 0.68)}
BLOCK_WEIGHTS = {  # that a token passes, in width^2 (Qwen-Image has as many for the other kind)
    "QwenImageTransformer2DModel": 12,
    "QwenImage21Transformer2DModel": 13,
}
# per token, block and channel: saved for the backward pass, fp32 LoRA in bf16 autocast
ACTIVATION_BYTES = 49  # measured: 48 and 49 without checkpointing, 512 and 1024 px, H200


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


def text_tokens(example: Any, flavour: Any) -> tuple[int, int]:
    """Estimate the tokens of an instruction, and those of its pictures beside it."""
    sizes, px = [picture.size for picture in example.pictures["vision"]], flavour.vision_px
    seen = sum(round(w / px) * round(h / px) for w, h in sizes)
    return 5 + math.ceil(len(example.caption) / 4) + 6 * len(sizes), seen


def flavour_of(script: Any, config: Any) -> Any:
    """Return what the base model is."""
    return script.detect_flavour(config.model.pretrained_model_name_or_path)


def planned_transformer(script: Any, config: Any) -> Any:
    """Return the transformer without weights: of the checkpoint, or as published."""
    name = config.model.pretrained_model_name_or_path
    if name in script.PUBLISHED:
        return script.empty_transformer(script.PUBLISHED[name].transformer)
    return script.empty_transformer(read_model_json(name, "transformer/config.json"))


def qwen_weights_gb(script: Any, config: Any, transformer: Any) -> float:
    """Return the size of the transformer in the precision asked for."""
    plain = 2 if config.train.mixed_precision == "bf16" else 4
    return weights_gb(transformer, config.model.base_model_precision, plain, script.MODULATION)


def sample_tokens(config: Any, transformer: Any, load: Load) -> tuple[int, int]:
    """Return the tokens of a sample in a pass, and how many pairs of them attention looks at.

    2.1 is causal: a reference sees itself and what stands before it; a further noise level adds
    its target.
    """
    if not getattr(transformer.config, "causal_condition", False):
        return load.tokens, load.tokens**2
    target, *references = [w // 16 * (h // 16) for w, h in load.sizes]
    further = (config.loss.noise_levels_per_sample - 1) * target
    pairs, seen = (target + further) * load.tokens, load.text
    for tokens in references:
        seen += tokens
        pairs += tokens * seen
    return load.tokens + further, pairs


def qwen_step_tflop(config: Any, transformer: Any, tokens: int, pairs: int | None = None) -> float:
    """Return the TFLOP of one sample: forward and backward through a frozen base.

    pairs: of tokens that attention looks at; by default all.
    """
    layers, width = len(transformer.transformer_blocks), transformer.inner_dim
    weights = BLOCK_WEIGHTS[type(transformer).__name__] * width**2
    linear = 2 * layers * tokens * weights
    attention = 4 * layers * (tokens**2 if pairs is None else pairs) * width
    again = config.train.gradient_checkpointing
    return (linear * (3 if again else 2) + attention * (4.5 if again else 3.5)) / 1e12


def further_passes(config: Any, flavour: Any) -> float:
    """Return the passes of the second targets (loss.guidance, loss.preserve), in whole ones."""
    loss, texts = config.loss, config.loss.captions(flavour)
    forward = 1 / (3 if config.train.gradient_checkpointing else 2)
    kept = (loss.preserve > 0) * (forward + ("kept" in texts)) / loss.preserve_every
    return forward * ("unguided" in texts) + kept


def qwen_peak_gb(script: Any, config: Any, transformer: Any, trained: int, tokens: int) -> float:
    """Estimate the peak of a training step on the (first) device, GB; tokens: of a whole pass."""
    layers, width = len(transformer.transformer_blocks), transformer.inner_dim
    weights, swapped = qwen_weights_gb(script, config, transformer), config.model.blocks_to_swap
    weights -= max(0, swapped - 2) * weights / layers
    # the input of every block and one block computed again, or all
    kept = layers * 2 + ACTIVATION_BYTES
    if not config.train.gradient_checkpointing:
        kept = layers * ACTIVATION_BYTES
    # bf16 keys and values, with gradients, of a prefix: taken to be as long as one target
    levels = config.loss.noise_levels_per_sample
    kept += 8 * layers / (levels + 1) * (levels > 1)
    adapter = trained * (16 + 4 * config.train.use_ema) / 1e9  # weight, gradient, Adam's moments
    encoders = () if config.cache.use_cache else encoder_sizes(config, flavour_of(script, config))
    own = weights + tokens * width * kept / 1e9 + adapter
    return own / max(1, len(config.model.devices)) + sum(encoders) + CONTEXT_GB


def encoder_sizes(config: Any, flavour: Any) -> tuple[float, float]:
    """Return the GB of the text encoder and of the VAE."""
    folder = Path(config.model.pretrained_model_name_or_path)
    if not folder.is_dir():
        return ENCODERS_GB[flavour.processor_class]
    parts = (folder / name for name in ("text_encoder", "vae"))
    text, vae = (sum(f.stat().st_size for f in p.glob("*.safetensors")) / 1e9 for p in parts)
    return text, vae


def look_ahead(script: Any, config: Any, width: int) -> Outlook:
    """Return shapes, tokens, cache size of the data; width: channels of a prompt embedding."""
    flavour = flavour_of(script, config)
    data, _ = script.find_samples(config, flavour)
    loads: Counter[tuple[Any, int]] = Counter()
    numbers: dict[str, dict[str, int]] = {"latent": {}, "prompt": {}, "region": {}}  # in an entry
    for draw in data.possible_draws():
        example, sample = data.resolve(draw), data.samples[draw.sample]
        text, seen = text_tokens(example, flavour)
        stored, text = text + seen, text + seen * (not flavour.prefix_is_constant)  # 2.1: in place
        jobs = [job for several in script.jobs_of(example).values() for job in several]
        captions = [c for texts in config.loss.captions(flavour).values() for c in texts]
        jobs += [j._replace(caption=c) for j in jobs if j.kind == "prompt" for c in captions]
        for job in jobs:
            w, h = job.pictures[0].size if job.pictures else (0, 0)
            size = stored * width if job.kind == "prompt" else w * h // 4
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
    """Return settings that need less memory than the config's, from cheapest to dearest."""

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


def qwen_data_lines(config: Any, outlook: Outlook, cache_dir: Path) -> list[str]:
    """Return lines: samples per data set, shapes, cache."""
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
        place = cache_dir.absolute()
        free = next(shutil.disk_usage(p).free for p in (place, *place.parents) if p.exists()) / 1e9
        entries = f"{outlook.latents} latents, {outlook.prompts} prompts"
        lines.append(f"Cache        {entries}: {outlook.cache_gb:.2f} GB on disk ({free:.0f} free)")
    return lines


def plan_qwen(script: Any, config: Any, cache_dir: Path) -> str:
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
    flavour, settings = flavour_of(script, config), plain.config
    outlook = look_ahead(
        script, config, settings.get("joint_attention_dim") or settings.context_in_dim
    )
    loads = outlook.loads
    visits = sum(load.visits for load in loads)

    def work(config: Any, loads: Any) -> tuple[int, float]:
        """Return the most tokens of a sample, the mean TFLOP."""
        sizes = [sample_tokens(config, plain, load) for load in loads]
        each = [qwen_step_tflop(config, plain, *size) for size in sizes]
        average = sum(a * o.visits for a, o in zip(each, loads, strict=True)) / visits
        average *= 1 + further_passes(config, flavour)
        return max((tokens for tokens, _ in sizes), default=0), average

    heaviest, mean = work(config, loads)
    per_step = config.data.batch_size * train.gradient_accumulation_steps
    epoch = math.ceil(visits / per_step)
    steps = min(train.max_train_steps, epoch * (train.num_epochs or 10**9))
    here, (encoder, vae) = "the training device", encoder_sizes(config, flavour)
    when = "while the cache is filled, then freed" if cache.use_cache else "all the time"
    swap = f", {model.blocks_to_swap} blocks in CPU memory" if model.blocks_to_swap else ""
    batch = config.data.batch_size
    peak = qwen_peak_gb(script, config, plain, trained, heaviest * batch)
    lines = [
        *qwen_data_lines(config, outlook, cache_dir),
        f"Steps        {steps} of {per_step} sample(s) on each process, {epoch} an epoch; "
        f"{two(mean * per_step)} TFLOP a step",
        "",
        f"Transformer  {parameters:,} parameters, {model.base_model_precision}: {two(weights)} GB",
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
        most, computed = work(other, loads)
        peak_gb = qwen_peak_gb(script, other, plain, trained, most * other.data.batch_size)
        ways[words] = peak_gb, computed / mean
        loads = outlook.loads
    needed = peak if cache.text_encoder_device else max(peak, encoder + CONTEXT_GB + 1)
    lines += card_lines(needed, mean * per_step, steps, REACH)
    return "\n".join([*lines, *fit_lines(peak, ways)])


# --- FLUX.1, PairEdit -----------------------------------------------------------------------------

FLUX_ENCODERS_GB = 9.8  # T5-XXL and CLIP-L of FLUX.1-dev in bf16


def planned_flux(script: Any, config: Any) -> Any:
    """Return the transformer without weights; the published one needs no network."""
    name = config.pretrained_model_name_or_path
    if name == script.PUBLISHED_MODEL and not Path(name).is_dir():
        return script.empty_flux(script.PUBLISHED_TRANSFORMER)
    return script.empty_flux(read_model_json(name, "transformer/config.json"))


def token_area_px(config: Any) -> int:
    """Return the pixels behind one token: 2 x 2 latents of the VAE's 8 x 8."""
    name, levels = config.pretrained_model_name_or_path, 4
    if Path(name).is_dir():
        levels = len(read_model_json(name, "vae/config.json")["block_out_channels"])
    return (2 * 2 ** (levels - 1)) ** 2


def flux_forward_tflop(transformer: Any, tokens: int) -> float:
    """Return TFLOP of one sample: 2 FLOP per weight and token, 4 n^2 width per block (attention).

    A token passes half of a double block's weights (the other half is for text, or for pictures);
    modulation runs once per sample and is left out.
    """

    def weights(blocks: Any) -> float:
        layers = (m for name, m in blocks.named_modules() if "norm" not in name)
        return sum(m.weight.numel() for m in layers if isinstance(m, torch.nn.Linear))

    double, single = transformer.transformer_blocks, transformer.single_transformer_blocks
    linear = 2 * tokens * (weights(double) / 2 + weights(single))
    attention = 4 * tokens**2 * transformer.inner_dim * (len(double) + len(single))
    return (linear + attention) / 1e12


def passes_of(script: Any, objective: str) -> int:
    """Return how many slices the fused batch of an objective has for each sample."""
    x = torch.ones(1, 2, 4)
    batch = script.PairBatch(x, x, x, torch.ones(1, 1, 1), 1.0, 1.0, (x, x, x))
    return len(script.LOSSES[objective](batch))


def adapter_numbers(script: Any, config: Any, transformer: Any) -> int:
    """Return the numbers in one adapter."""
    layers = script.target_layers(transformer, config.train_method).values()
    return sum(config.rank * (layer.in_features + layer.out_features) for layer in layers)


def flux_memory(script: Any, config: Any, transformer: Any, tokens: int) -> dict[str, float]:
    """Estimate GB of a training step, by what it is for; tokens: of a sample, text included.

    A block keeps 13 numbers per token and channel for the backward pass (measured on an H200); with
    gradient checkpointing only its input, and one block at a time the rest.
    """
    rows = config.batch_size * passes_of(script, config.python_name)
    size = 4 if config.mixed_precision == "no" else 2
    blocks = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
    kept = (blocks + 13) if config.gradient_checkpointing else 13 * blocks
    adapters = adapter_numbers(script, config, transformer)
    adapters *= len(script.adapters_of(config.python_name))
    fine = script.MODULATION
    return {
        "weights": weights_gb(transformer, config.base_model_precision, size, fine),
        "adapters": adapters * 16 / 1e9,  # fp32: weight, gradient, two moments
        "activations": rows * tokens * transformer.inner_dim * kept * size / 1e9,
    }


def plan_flux(script: Any, config: Any) -> str:
    """Return the plan of train_pairedit.py, or of a fork of it."""
    transformer, runs = planned_flux(script, config), script.all_runs(config)
    index, sizes = FileIndex(config.cache_dir), Counter[tuple[int, int]]()
    for dataset in config.datasets:
        sizes.update(sample.size for sample in script.find_pairs(config, dataset, index)[0])
    tokens = max(w * h for w, h in sizes) // token_area_px(config) + config.max_sequence_length
    rows = config.batch_size * passes_of(script, config.python_name)
    forward = rows * flux_forward_tflop(transformer, tokens)
    tflop = forward * (3 if config.gradient_checkpointing else 2)
    if config.python_name == "slider_text":  # the way to its noise level, and three teachers
        tflop += forward * ((config.start_step + config.end_step) / 2 + 3)
    steps, names = config.train_iteration, script.adapters_of(config.python_name)
    numbers = adapter_numbers(script, config, transformer)
    layers = len(script.target_layers(transformer, config.train_method))
    lora_gb, saves = numbers * len(names) / 1e9, math.ceil(steps / config.save_per_steps)
    files = 4 * lora_gb * (2 if config.save_original_format else 1) * saves * len(runs)
    parts = flux_memory(script, config, transformer, tokens)
    said = ", ".join(f"{name} {two(gb)}" for name, gb in parts.items())
    peak, ways = sum(parts.values()), dict[str, tuple[float, float]]()
    choices: list[tuple[str, Any]] = [("gradient_checkpointing", True)]
    choices += [("base_model_precision", kind) for kind in ("int8-quanto", "nf4-bnb")]
    for name, value in choices:
        other = config.model_copy(update={name: value})
        words = f"{name}: {str(value).lower()}"
        gb = sum(flux_memory(script, other, transformer, tokens).values())
        again = name == "gradient_checkpointing" and not config.gradient_checkpointing
        ways[words] = gb, 1.5 if again else 1.0
    lines = [
        f"Runs         {len(runs)} of {steps} steps ({config.python_name})",
        *(f"  {script.run_folder(config, run).name}" for run in runs[:5]),
        *([f"  ... and {len(runs) - 5} more"] if len(runs) > 5 else []),
        f"Pictures     {', '.join(f'{n} of {w} x {h} px' for (w, h), n in sizes.items())}",
        f"Tokens       {tokens}, {config.max_sequence_length} of them text; {rows} rows a step",
        f"Transformer  {sum(p.numel() for p in transformer.parameters()) / 1e9:.2f} billion "
        f"parameters ({config.base_model_precision}); {' and '.join(names)} adapter on "
        f"{layers} layers, {numbers / 1e6:.1f} million each",
        f"Disk         {files:.2f} GB of LoRA files, {12 * lora_gb:.2f} GB a checkpoint",
        f"Compute      {two(tflop)} TFLOP a step",
        f"Memory       about {two(peak)} GB while training ({said}); before that the VAE,",
        f"             then the text encoders ({FLUX_ENCODERS_GB} GB), alone",
        *card_lines(max(peak, FLUX_ENCODERS_GB), tflop, steps * len(runs), REACH),
    ]
    return "\n".join([*lines, *fit_lines(peak, ways)])


# --- Stable Diffusion, DreamBooth -----------------------------------------------------------------


def empty_unet(name: str) -> Any:
    """Return UNet2DConditionModel without weights."""
    import diffusers
    from accelerate import init_empty_weights

    with init_empty_weights():
        return diffusers.UNet2DConditionModel.from_config(read_model_json(name, "unet/config.json"))


def unet_cost(unet: Any, side: int) -> tuple[float, float]:
    """Return (TFLOP of a forward pass, GB in 16 bit kept for backward) of side^2 latents.

    Both are counted on a pass that computes nothing: the UNet has no weights.
    """
    from torch.utils.flop_counter import FlopCounterMode

    noisy = torch.empty(1, unet.config.in_channels, side, side, device="meta")
    text = torch.empty(1, 77, unet.config.cross_attention_dim, device="meta")
    known, kept = {id(p.untyped_storage()) for p in unet.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # a GPU keeps no attention maps
        square = tensor.dim() > 2 and tensor.shape[-2] == tensor.shape[-1] >= 256
        if id(storage) not in known and not square:
            kept[id(storage)] = storage, storage.nbytes() / tensor.element_size()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, hooks:
        unet(noisy.requires_grad_(), torch.zeros(1, device="meta"), encoder_hidden_states=text)
    gb = sum(numbers for _, numbers in kept.values()) * 2 / 1e9
    return counter.get_total_flops() / 1e12, gb


def plan_sd(script: Any, config: Any) -> str:
    """Return the plan of train_dreambooth_pairs.py, or of a fork of it."""
    unet, index = empty_unet(config.pretrained_model_name_or_path), FileIndex(config.cache_dir)
    samples = script.check_samples(config, script.match_pictures(config)[0], index)[0]
    sizes = Counter(sample.size for sample in samples)
    ends = script.TARGETS[config.target_modules]
    script.add_adapter(unet, script.AdapterSwitch(), "change", ends, config.lora_rank, 1)
    layers = script.adapted_layers(unet, "change").values()
    adapter = sum(x.down["change"].numel() + x.up["change"].numel() for x in layers)
    weights = sum(p.numel() for p in unet.parameters()) - adapter
    rows = config.train_batch_size * (1 if config.objective == "instance" else 2)
    rows += config.train_batch_size if config.with_prior_preservation else 0
    area = max((w * h for w, h in sizes), default=config.resolution**2)
    side = round(math.sqrt(area) / script.SIZE_MULTIPLE) * script.SIZE_MULTIPLE // 8
    size = 4 if config.mixed_precision == "no" else 2
    tflop, activations = (rows * figure for figure in unet_cost(unet, side))
    passes = 4 if config.gradient_checkpointing else 3
    tflop *= passes + (config.objective == "difference")  # the base's own prediction
    parts = {"weights": weights * size / 1e9, "adapter": adapter * 16 / 1e9}
    parts["activations"] = activations
    said, peak = ", ".join(f"{k} {gb:.2f}" for k, gb in parts.items()), sum(parts.values())
    epoch = math.ceil(len(samples) / config.train_batch_size)
    steps = config.max_train_steps or epoch * config.num_train_epochs
    lines = [
        f"Samples      {', '.join(f'{n} of {w} x {h} px' for (w, h), n in sizes.items())}",
        f"UNet         {weights / 1e6:.0f} million parameters; adapter on {len(layers)} layers, "
        f"{adapter / 1e6:.2f} million",
        f"Step         {rows} rows of {config.objective}, {two(tflop)} TFLOP",
        f"Memory       about {two(peak)} GB while training ({said})",
        *card_lines(peak, tflop, steps, 0.25),
    ]
    return "\n".join([*lines, *fit_lines(peak, {})])


def main() -> None:
    """Load the script, and plan a run of its config."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--script", type=Path, required=True, help="a training script, or a fork")
    given, settings = parser.parse_known_args()
    script = load_script(given.script)
    print(planned(script, settings))


if __name__ == "__main__":
    run_script(main)
