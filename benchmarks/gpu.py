"""Full-size training steps on a GPU, and what must be right there: a row at a time.

    python benchmarks/gpu.py --minutes 8 --out gpu.json   # run again: finished rows are skipped
    python benchmarks/gpu.py --dry                        # every row, tiny, on this machine
    python benchmarks/gpu.py --table gpu.json             # a Markdown page of a file of rows

Rows come in the order of their worth; the file is written again after each. A row that fails says
so, and the next one runs. No model is written to disk: transformers get random weights on the
device, block by block, through the trainers' own code (placement, quantisation, hooks). s/step is
the median of 5 steps after 2; reach is TFLOP (as --plan counts them) over time and card.
"""

import argparse
import collections
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT)]
import torch
from dreambooth_step import SCHEDULER as SD_SCHEDULER
from dreambooth_step import random_batch as sd_batch
from dreambooth_step import random_text as sd_text
from noise_levels import batch_of
from pairedit_step import SCHEDULER as FLUX_SCHEDULER
from train_step import SCHEDULER as QWEN_SCHEDULER
from train_step import TEXT, random_batch

import train_dreambooth_pairs
import train_pairedit
import train_qwen_edit
from utils import ahead, load_config, load_tool, open_rgb

CUDA = torch.cuda.is_available()
PROFILE = False  # --profile
DEVICE = torch.device("cuda" if CUDA else "cpu")
PAIRS = ROOT / "data/photo_pairs"
QWEN = {"in_channels": 64, "out_channels": 16, "zero_cond_t": True}
QWEN_DRY = {"num_layers": 4, "num_attention_heads": 2, "joint_attention_dim": 64}
QWEN_21 = {"_class_name": "QwenImage21Transformer2DModel"}
QWEN_21_DRY = {"num_layers": 4, "num_attention_heads": 2, "context_in_dim": 64}
FLUX_DRY = {
    "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
}  # fmt: skip
UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
UNET_DRY = {
    "block_out_channels": (32, 64), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
plan = load_tool("plan")


# --- models with random weights -------------------------------------------------------------------


def random_tensor(name, shape, device, dtype):
    """Normal 0.02; a norm's weight is one."""
    if len(shape) == 1 and name.endswith("weight"):
        return torch.ones(shape, device=device, dtype=dtype)
    return torch.empty(shape, device=DEVICE, dtype=dtype).normal_(0, 0.02).to(device)


def random_parts(script):
    """In place of fill_parts() of a trainer: random weights where the files would be read."""

    def fill(model, folder, dtype, parts, precision):
        for part, device in parts.items():
            empty = {n: t for n, t in model.state_dict().items() if n.startswith(f"{part}.")}
            tensors = {n: random_tensor(n, t.shape, device, dtype) for n, t in empty.items()}
            model.load_state_dict(tensors, strict=False, assign=True)
            tensors.clear()
            if part[-1].isdigit() and precision != "no_change":
                script.quantize_block(model.get_submodule(part), precision)
        model.eval().requires_grad_(False)

    return fill


def random_model(cls, dtype, *args, **settings):
    """Any other model, made on the device; buffers as the class makes them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            model = cls(*args, **settings)
    finally:
        torch.set_default_dtype(before)
    for name, parameter in model.named_parameters():
        parameter.data = random_tensor(name, parameter.shape, DEVICE, dtype)
    return model.eval().requires_grad_(False)


def base_folder(place, pipeline, transformer, scheduler):
    """A checkpoint of settings alone."""
    for part, settings in (("transformer", transformer), ("scheduler", scheduler)):
        (place / part).mkdir(parents=True, exist_ok=True)
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        (place / part / name).write_text(json.dumps(settings))
    (place / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    return place


def clock(step, warm=2, count=5):
    """Median seconds of step() and the peak, GB (without a GPU 0)."""
    seconds = []
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    for number in range(warm + count):
        started = time.perf_counter()
        step()
        if CUDA:
            torch.cuda.synchronize()
        seconds += [time.perf_counter() - started] if number >= warm else []
    return statistics.median(seconds), torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0


def profiled(step):
    """What one more step spends on the GPU: its kernels, milliseconds, and of the largest."""
    if not (CUDA and PROFILE):
        return {}
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    kernels = [k for k in profiler.key_averages() if k.self_device_time_total]
    kernels.sort(key=lambda k: -k.self_device_time_total)
    largest = {k.key[:90]: [k.self_device_time_total / 1e3, k.count] for k in kernels[:14]}
    total = sum(k.self_device_time_total for k in kernels) / 1e3
    return {"kernels_ms": total, "kernels": sum(k.count for k in kernels), "largest": largest}


# --- a. the card ----------------------------------------------------------------------------------


def card(place, dry):
    """bf16 matrix product and copies."""
    n = 256 if dry else 8192
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    seconds, _ = clock(lambda: a @ b, 3, 10)
    data = torch.empty(2**20 if dry else 2**32, dtype=torch.uint8, device=DEVICE)
    copying, _ = clock(lambda: data.clone(), 2, 5)
    return {
        "card": torch.cuda.get_device_name() if CUDA else "cpu",
        "memory_gb": torch.cuda.mem_get_info()[1] / 1e9 if CUDA else 0.0,
        "torch": torch.__version__,
        "matmul_tflops": 2 * n**3 / seconds / 1e12,
        "copy_gb_s": 2 * len(data) / copying / 1e9,
    }


# --- b. right on CUDA -----------------------------------------------------------------------------


@functools.cache
def tiny_base(place):
    """A tiny Qwen-Image-Edit-2511 of the true classes."""
    import tiny

    return tiny.build_all(place / "bases")["2511"]


def forget_processes():
    """accelerate holds one state per process; rows differ in precision."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def tiny_trainer(place, name, *flags):
    """A trainer of the tiny base on four photo pairs."""
    forget_processes()
    stems = ("coffee0", "hubble0", "chelsea0", "astronaut3")
    data = place / "pairs"
    if not data.exists():
        for stem in stems:
            for kind, side in (("R", "before"), ("T", "after")):
                (data / side).mkdir(parents=True, exist_ok=True)
                open_rgb(PAIRS / f"{stem}_{kind}.png").save(data / side / f"{stem}.png")
            (data / "after" / f"{stem}.txt").write_text("make it a duotone")
    settings = {
        "model.pretrained_model_name_or_path": tiny_base(place),
        "model.lora.r": 4,
        "data.dataset_configs.0.train_data_dir": data,
        "data.dataset_configs.0.target_dir": "after",
        "data.dataset_configs.0.reference_dirs": "[before]",
        "data.dataset_configs.0.resolution": 64,
        "data.reference_area": "target",
        "data.num_workers": 0,
        "optimizer.init_args.lr": 1e-2,
        "logging.output_dir": place / name,
        "cache.cache_dir": place / "cache",
        "train.max_train_steps": 4,
        "train.checkpointing_steps": 2,
    }
    argv = [*(f"--{key}={value}" for key, value in settings.items()), *flags]
    config = load_config(train_qwen_edit.Config, argv, train_qwen_edit.audit)
    return train_qwen_edit.QwenImageEditTrainer(config)


def lora_of(place, name):
    """The tensors of a finished run's LoRA."""
    from safetensors.torch import load_file

    return load_file(place / name / train_qwen_edit.LORA_FILE)


def apart(one, other):
    """The largest difference of two dicts of tensors, and the largest value."""
    worst = max((one[n].float() - other[n].float()).abs().max().item() for n in one)
    return worst, max(t.abs().max().item() for t in other.values())


def on_cpu_and_gpu(place, dry):
    """Loss and gradients of one batch, on both: fp32, and bf16 on the device."""
    found, batch = {}, None
    torch.backends.cuda.matmul.allow_tf32 = False
    for name, device, precision in (("cpu", "cpu", "no"), ("fp32", "", "no"), ("bf16", "", "bf16")):
        device = [f"--model.devices=[{device or DEVICE.type}]"]
        trainer = tiny_trainer(
            place, f"one-{name}", f"--train.mixed_precision={precision}", *device
        )
        trainer.setup_accelerator()
        trainer.find_data()
        trainer.cache_embeddings()
        trainer.set_lora()
        for number, parameter in enumerate(trainer.trainable()):  # B starts at zero
            chance = torch.Generator().manual_seed(number)
            noise = torch.randn(parameter.shape, generator=chance) * 0.05
            parameter.data += noise.to(parameter.device)
        if batch is None:
            [[batch, *_], *_] = trainer.train_dataloader()
        loss = trainer.training_step(dict(batch))
        loss.backward()
        gradients = {str(i): p.grad.cpu() for i, p in enumerate(trainer.trainable())}
        found[name] = {"loss": loss.detach().cpu()[None], **gradients}
    row = {}
    for name, most in (("fp32", 1e-4), ("bf16", 0.1)):
        worst, largest = apart(found[name], found["cpu"])
        row[f"{name}_difference"] = worst / largest
        assert worst / largest < most, f"{name}: {worst / largest}"
    return row


def resumed(place, dry):
    """Two steps, stopped, resumed to four = four steps: the same bits."""
    tiny_trainer(place, "straight").fit()
    tiny_trainer(place, "parted", "--train.max_train_steps=2").fit()
    tiny_trainer(place, "parted", "--train.resume_from_checkpoint=latest").fit()
    worst, _ = apart(lora_of(place, "parted"), lora_of(place, "straight"))
    assert worst == 0, f"difference {worst}"
    return {"difference": worst}


def swapped(place, dry):
    """Blocks that visit the device = blocks that stay: the same bits."""
    for name, count in (("stay", 0), ("swap", 1)):
        trainer = tiny_trainer(place, name, f"--model.blocks_to_swap={count}")
        trainer.fit()
        streams = getattr(trainer.bare_transformer(), "block_swap", None)
    worst, _ = apart(lora_of(place, "swap"), lora_of(place, "stay"))
    assert worst == 0 and (streams or not CUDA), f"difference {worst}, {streams}"
    return {"difference": worst}


def quantised(place, dry):
    """Velocity of int8 and fp8 against bf16."""
    row, plain = {}, None
    for precision in ("no_change", "int8-quanto", "fp8-quanto"):
        trainer = tiny_trainer(place, f"q-{precision}", f"--model.base_model_precision={precision}")
        trainer.setup_accelerator()
        trainer.find_data()
        trainer.cache_embeddings()
        trainer.set_lora()
        [[batch, *_], *_] = trainer.train_dataloader()
        batch = trainer.to_device(dict(batch))
        clean, sigma = batch["pixel_latent"], batch["sigma"]
        noisy = train_qwen_edit.add_noise(clean, batch["noise"], sigma)
        with torch.no_grad(), trainer.accelerator.autocast():
            batch["prompt_embed"] = batch["prompt_embed"].to(trainer.weight_dtype)
            predict = train_qwen_edit.predict_velocity
            velocity = predict(trainer.transformer, noisy, sigma, batch).float()
        plain = velocity if plain is None else plain
        error = ((velocity - plain).norm() / plain.norm()).item()
        row[f"{precision} error"] = error
        assert error < 0.02 or dry, f"{precision}: {error}"
    return row


def own_kernel(place, dry):
    """Does quanto's own fp8 kernel, which it compiles first, still leave out the bias?"""
    from optimum import quanto

    linear = torch.nn.Linear(256, 256, device=DEVICE, dtype=torch.bfloat16)
    linear.bias.data.fill_(10)  # the rest is below 2
    layer = quanto.QLinear.from_module(linear, weights=quanto.qfloat8)
    layer.freeze()
    seen = layer(torch.ones(32, 256, device=DEVICE, dtype=torch.bfloat16))
    return {"keeps_bias": bool(seen.min() > 5)}


def same_gradients(place, dry):
    """Gradients with the attention that CUDA takes = with plain matrix products, heads of 128."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def differ(parameters, loss):
        for number, parameter in enumerate(parameters):  # B starts at zero
            chance = torch.Generator().manual_seed(number)
            parameter.data += (torch.randn(parameter.shape, generator=chance) * 0.05).to(DEVICE)
        found = []
        fast = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
        slow = [SDPBackend.MATH]
        for backends in (slow, [*fast, SDPBackend.EFFICIENT_ATTENTION, *slow]):
            with sdpa_kernel(backends):
                loss().backward()
            found.append(torch.cat([p.grad.flatten() for p in parameters]))
            for parameter in parameters:
                parameter.grad = None
        plain, ours = found
        return ((ours - plain).norm() / plain.norm()).item()

    row = {}
    for newer in (False, True):
        forget_processes()
        trainer = qwen_trainer(place, True, (), newer)
        if newer:
            batch = batch_of(1, 1, 256, 64)
        else:  # padded; 704 tokens: 64 beyond a multiple of 128
            one = random_batch(256, 256, 64)
            two = {n: torch.cat([one[n]] * 2) for n in ("pixel_latent", "noise", "sigma")}
            seen = torch.arange(192) < torch.tensor([[192], [150]])
            embeds = torch.cat([one["prompt_embed"][:, :192]] * 2) * seen[..., None]
            controls = [torch.cat(one["control_latent"] * 2)]
            batch = two | {"prompt_embed": embeds, "prompt_embeds_mask": seen.long()}
            batch |= {"control_latent": controls, "names": ["a", "b"]}
        batch = trainer.to_device(batch)
        name = "2.1" if newer else "qwen, padded"
        row[name] = differ(trainer.trainable(), lambda b=batch, t=trainer: t.training_step(dict(b)))
    forget_processes()
    settings = train_pairedit.PUBLISHED_TRANSFORMER | FLUX_DRY
    trainer = flux_trainer(place, settings | {"num_single_layers": 2}, (), 256, 64)
    samples, batch = train_pairedit.next_batch(trainer)
    loss = functools.partial(train_pairedit.training_loss, trainer, samples, batch)
    row["pairedit"] = differ(trainer.trained, lambda: loss()[0])
    assert max(row.values()) < 0.05, row
    return row


def no_waiting(place, dry):
    """Places where ten steps between two log lines wait for the GPU: none of ours."""
    trainer = tiny_trainer(place, "sync", "--train.max_train_steps=10", "--logging.log_every=99")
    trainer.setup_accelerator()
    trainer.find_data()
    trainer.cache_embeddings()
    trainer.set_lora()
    trainer.configure_optimizers()
    prepare = trainer.accelerator.prepare
    trainer.transformer, trainer.optimizer = prepare(trainer.transformer, trainer.optimizer)
    batches = list(trainer.train_dataloader())
    train_qwen_edit.train_step(trainer, batches[0])
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        if CUDA:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            for step in batches[1:]:
                train_qwen_edit.train_step(trainer, step)
        finally:
            if CUDA:
                torch.cuda.set_sync_debug_mode("default")
    said = [w for w in waits if "synchronizing" in str(w.message)]
    places = collections.Counter(f"{Path(w.filename).name}:{w.lineno}" for w in said)
    assert not any(str(ROOT) in w.filename for w in said), dict(places)
    return {"steps": len(batches) - 1, "places": dict(places)}


def previews(place, dry):
    """predict() = the diffusers pipeline, fp32, noise of the CPU."""
    import diffusers
    import numpy as np

    flags = ["--train.mixed_precision=no", "--data.reference_area=1mp"]
    trainer = tiny_trainer(place, "preview", *flags)
    trainer.setup_accelerator()
    trainer.setup_predict()
    photo = open_rgb(PAIRS / "coffee0_R.png").resize((128, 96))
    how = {"num_inference_steps": 3, "true_cfg_scale": 2.0, "height": 64, "width": 96}
    ours = trainer.predict(photo, "blue", " ", **how, seed=3)
    kind = diffusers.QwenImageEditPlusPipeline
    parts = {"dtype": torch.float32, "processor": trainer.processor}
    pipeline = kind.from_pretrained(tiny_base(place), **parts).to(DEVICE)
    chance = torch.Generator().manual_seed(3)
    theirs = pipeline([photo], prompt="blue", negative_prompt=" ", generator=chance, **how).images[
        0
    ]
    levels = int(np.abs(ours.astype(int) - np.asarray(theirs)).max())
    assert levels <= 2, f"{levels} levels"
    return {"levels": levels}


# --- c. Qwen-Image-Edit ---------------------------------------------------------------------------


def qwen_trainer(place, dry, flags, newer=False):
    """A trainer of random weights, ready for train_step(); newer: Qwen-Image-2.1."""
    kind, whole, tiny = "QwenImageEditPlusPipeline", QWEN, QWEN_DRY
    if newer:
        kind, whole, tiny = "QwenImage21Pipeline", QWEN_21, QWEN_21_DRY
    folder = base_folder(place / kind, kind, whole | (tiny if dry else {}), QWEN_SCHEDULER)
    argv = [f"--model.pretrained_model_name_or_path={folder}", "--train.max_train_steps=99"]
    argv += [f"--cache.cache_dir={place / 'none'}", f"--logging.output_dir={place / 'o'}"]
    argv += ["--loss.guidance=1", *(DRY.get(flag, flag) if dry else flag for flag in flags)]
    trainer = train_qwen_edit.QwenImageEditTrainer(load_config(train_qwen_edit.Config, argv))
    trainer.set_lora()
    trainer.configure_optimizers()
    prepare = trainer.accelerator.prepare
    trainer.transformer, trainer.optimizer = prepare(trainer.transformer, trainer.optimizer)
    return trainer


def qwen_row(size, other, *flags, newer=False):
    """A row: training steps of 20.4 billion parameters, or of the 7.1 of Qwen-Image-2.1."""

    def run(place, dry):
        started = time.perf_counter()
        trainer = qwen_trainer(place, dry, flags, newer)
        load_s, config, bare = time.perf_counter() - started, trainer.config, trainer.transformer
        pixels = (size // 8, other // 8) if dry else (size, other)
        levels = config.loss.noise_levels_per_sample
        if newer:
            batch = batch_of(levels, 1, pixels[0], bare.config.context_in_dim)
        else:
            batch = random_batch(*pixels, bare.config.joint_attention_dim)

        def step():
            train_qwen_edit.train_step(trainer, [trainer.to_device(dict(batch))])

        compiled = config.train.compile == "blocks"
        seconds, gb = clock(step, 3 if compiled else 2, 1 if dry else 5)
        load = plan.Load(tuple((p, p) for p in pixels), TEXT, 1)
        tokens, pairs = plan.sample_tokens(config, bare, load)
        trained = sum(p.numel() for p in trainer.trainable())
        peak = plan.qwen_peak_gb(train_qwen_edit, config, bare, trained, tokens)
        tflop = plan.qwen_step_tflop(config, bare, tokens, pairs)
        row = {"s_step": seconds, "peak_gb": gb, "plan_gb": peak, "tflop": tflop, "load_s": load_s}
        return row | profiled(step)

    return run


# --- e. f. PairEdit, Stable Diffusion -------------------------------------------------------------


def flux_trainer(place, settings, flags, side, length):
    """A PairEdit trainer of random weights, pictures and text, ready for train_step()."""
    script = train_pairedit
    folder = base_folder(place / "flux", "FluxPipeline", settings, FLUX_SCHEDULER)
    (folder / "vae").mkdir(exist_ok=True)
    (folder / "vae/config.json").write_text(json.dumps({"block_out_channels": [1] * 4}))
    argv = ["--pretrained_model_name_or_path", str(folder), "--output_folder", str(place / "s")]
    config = load_config(script.Config, [*argv, "--preview=false", *flags])
    trainer = script.PairEditTrainer(config)
    trainer.setup_accelerator()
    wide = settings.get("joint_attention_dim", 4096), settings.get("pooled_projection_dim", 768)
    text = {"embed": torch.randn(1, length, wide[0]), "pooled": torch.randn(1, wide[1])}
    trainer.cached = lambda job: {k: x.to(trainer.dtype) for k, x in text.items()}
    trainer.folder = folder
    sample = script.Sample("random", (), (side, side))
    trainer.data = {name: [sample] for name in config.datasets}
    trainer.start_run(script.all_runs(config)[0])
    trainer.tokens = {sample: torch.randn(2, (side // 16) ** 2, 64)}
    return trainer


def flux_row(*flags):
    """A row: PairEdit on FLUX.1-dev, 512 px."""

    def run(place, dry):
        script = train_pairedit
        settings = script.PUBLISHED_TRANSFORMER | (FLUX_DRY if dry else {})
        side, length = (64, 8) if dry else (512, 512)
        started = time.perf_counter()
        trainer = flux_trainer(place, settings, flags, side, length)
        load_s, config = time.perf_counter() - started, trainer.config
        step = functools.partial(script.train_step, trainer)
        seconds, gb = clock(step, 2, 1 if dry else 5)
        tokens = (side // 16) ** 2 + length
        parts = plan.flux_memory(script, config, plan.planned_flux(script, config), tokens)
        row = {"s_step": seconds, "minutes_500": seconds * 500 / 60, "peak_gb": gb}
        return row | {"plan_gb": sum(parts.values()), "load_s": load_s} | profiled(step)

    return run


def sd(place, dry, *flags):
    """Stable Diffusion 1.5, 512 px, batch 4."""
    import diffusers

    script, folder = train_dreambooth_pairs, base_folder(place / "sd", "x", {}, SD_SCHEDULER)
    load_part = script.load_part
    channels = UNET_DRY if dry else {"block_out_channels": (320, 640, 1280, 1280)}
    kind = diffusers.UNet2DConditionModel

    def part(folder, name, dtype, device):
        if name == "unet":
            model = random_model(kind, dtype, **UNET, **channels)
            return model.to(memory_format=torch.channels_last)
        return load_part(folder, name, dtype, device)

    script.load_part, script.noised_batch, script.encode_prompts = part, sd_batch, sd_text
    argv = ["--pretrained_model_name_or_path", str(folder), "--train_batch_size", "4"]
    argv += ["--instance_data_dir", "a", "--instance_prompt", "a", "--max_train_steps", "20"]
    argv += ["--mixed_precision", "no" if dry else "bf16", *(() if dry else flags)]
    trainer = script.SDTrainer(load_config(script.Config, argv))
    trainer.setup_accelerator()
    trainer.folder, trainer.samples = folder, [None] * 4
    trainer.load_models()
    draws = [script.Draw(number, None, 0, 1) for number in range(4)]

    def step():
        losses = script.compute_losses(trainer, draws)
        trainer.accelerator.backward(torch.stack(list(losses.values())).sum())
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)

    seconds, gb = clock(step, *(1, 1) if dry else (3, 10))
    return {"s_step": seconds, "peak_gb": gb} | profiled(step)


# --- g. caching -----------------------------------------------------------------------------------


def latents(place, dry):
    """Pictures of 1024 px through the true VAE, read one by one, and read ahead."""
    import diffusers

    trainer = tiny_trainer(place, "latents")
    trainer.setup_accelerator()
    settings = {"base_dim": 8} if dry else {}
    trainer.vae = random_model(diffusers.AutoencoderKLQwenImage, trainer.weight_dtype, **settings)
    train_qwen_edit.encode_stills_in_2d(trainer.vae)
    side = 64 if dry else 1024
    file = place / "photo.jpg"
    open_rgb(PAIRS / "coffee0_T.png").resize((4 * side, 3 * side)).save(file, quality=92)
    facts = {"content": "x", "size": (side, side), "box": (0.125, 0.0, 0.875, 1.0)}
    job = train_qwen_edit.Job("latent", (train_qwen_edit.Picture(file, **facts),))
    both, gb = clock(lambda: trainer.encode(job), 1, 2 if dry else 5)
    reading, _ = clock(lambda: trainer.load(job), 0, 2)
    jobs = [job] * (4 if dry else 24)

    def all_ahead():
        for images in ahead(trainer.load, jobs):
            trainer.encode(job, shown=images)

    seconds = clock(all_ahead, 0, 1)[0] / len(jobs)
    row = {"pictures_s": 1 / both, "share_of_reading": reading / both, "peak_gb": gb}
    return row | {"pictures_s_ahead": 1 / seconds}


def prompts(place, dry):
    """Prompts with a picture through Qwen2.5-VL 7B."""
    import transformers

    trainer = tiny_trainer(place, "prompts")
    trainer.setup_accelerator()
    trainer.load_model(["text_encoder"])
    if not dry:
        config = trainer.qwen_vl.config
        text, vision = config.text_config, config.vision_config
        sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
        sizes |= {"num_attention_heads": 28, "num_key_value_heads": 4}
        rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
        sizes["layer_types"] = ["full_attention"] * sizes["num_hidden_layers"]
        for name, value in (sizes | {"rope_parameters": rope, "rope_scaling": rope}).items():
            setattr(text, name, value)
        seen = {"hidden_size": 1280, "depth": 32, "num_heads": 16, "intermediate_size": 3420}
        seen |= {"out_hidden_size": 3584, "fullatt_block_indexes": [7, 15, 23, 31]}
        for name, value in seen.items():
            setattr(vision, name, value)
        kind = transformers.Qwen2_5_VLForConditionalGeneration
        model = random_model(kind, torch.bfloat16, config)
        trainer.qwen_vl = trainer.text_pipeline.text_encoder = model
    photo = open_rgb(PAIRS / "coffee0_T.png").resize((64, 64) if dry else (384, 384))
    encode = trainer.encode_prompt_image_embedding
    seconds, gb = clock(lambda: encode("make it a duotone", photo), 1, 1 if dry else 5)
    return {"prompts_s": 1 / seconds, "peak_gb": gb}


KEEP = "--train.gradient_checkpointing=false"
INT8 = "--model.base_model_precision=int8-quanto"
COMPILE = "--train.compile=blocks"
SWAP = "--model.blocks_to_swap=30"
DRY = {SWAP: "--model.blocks_to_swap=2", COMPILE: "--train.compile=none"}  # compiling takes long


def qwen_21(levels, *flags):
    """A row of Qwen-Image-2.1."""
    return qwen_row(1024, 1024, f"--loss.noise_levels_per_sample={levels}", *flags, newer=True)


ROWS = {  # name: (seconds it takes on an H100, estimated; GB it needs; what runs)
    "card": (5, 9, card),
    "loss and gradients = CPU's": (15, 1, on_cpu_and_gpu),
    "resumed = straight": (10, 1, resumed),
    "block swap = none": (8, 1, swapped),
    "gradients = plain attention's": (15, 1, same_gradients),
    "qwen 1024 + 1 MP bf16": (25, 50, qwen_row(1024, 1024)),
    "qwen 512 + 512 bf16": (15, 45, qwen_row(512, 512)),
    "qwen 512 + 512 int8": (25, 26, qwen_row(512, 512, INT8)),
    "pairedit 512 px bf16": (20, 28, flux_row()),
    "qwen 2.1 1024 + 1 MP bf16": (12, 24, qwen_21(1)),
    "sd 1.5 512 px batch 4": (10, 6, sd),
    "int8, fp8 near bf16": (10, 1, quantised),
    "no waiting for the GPU": (5, 1, no_waiting),
    "previews = pipeline": (6, 1, previews),
    "qwen 512 + 512 bf16, no checkpointing": (15, 62, qwen_row(512, 512, KEEP)),
    "qwen 1024 + 1 MP int8": (30, 30, qwen_row(1024, 1024, INT8)),
    "qwen 1024 + 1 MP bf16, no checkpointing": (25, 110, qwen_row(1024, 1024, KEEP)),
    "qwen 1024 + 1 MP bf16, compiled": (75, 50, qwen_row(1024, 1024, COMPILE)),
    "qwen 512 + 512 bf16, compiled": (70, 45, qwen_row(512, 512, COMPILE)),
    "qwen 2.1 1024 + 1 MP bf16, compiled": (60, 24, qwen_21(1, COMPILE)),
    "qwen 512 + 512 bf16, compiled, no checkpointing": (70, 62, qwen_row(512, 512, KEEP, COMPILE)),
    "pairedit 512 px bf16, no checkpointing": (20, 45, flux_row("--gradient_checkpointing=false")),
    "qwen 2.1 1024 + 1 MP bf16, 2 noise levels": (12, 26, qwen_21(2)),
    "latents of 1024 px": (15, 6, latents),
    "prompts with a picture": (20, 20, prompts),
    "qwen 2.1 1024 + 1 MP bf16, 4 noise levels": (15, 30, qwen_21(4)),
    "qwen 1024 + 1 MP bf16, 30 blocks swapped": (60, 32, qwen_row(1024, 1024, SWAP)),
    "sd 1.5 512 px batch 4, compiled": (90, 6, lambda *at: sd(*at, "--compile=true")),
    "quanto's own fp8 kernel": (150, 1, own_kernel),
}


def commit():
    """The commit of the code, if git tells."""
    done = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def table(rows):
    """A Markdown page of a file of rows."""
    card = rows.get("card", {})
    about = f"{card.get('card', '?')}, torch {card.get('torch', '?')}, {card.get('date', '?')}"
    lines = [f"# {about}, commit {card.get('commit', '?')}", "", "| row | figures |", "|---|---|"]
    for name, row in rows.items():
        hidden = ("date", "commit", "card", "torch", "largest")
        shown = {k: v for k, v in row.items() if k not in hidden}
        if "tflop" in row and card.get("matmul_tflops"):
            reach = row["tflop"] / row["s_step"] / card["matmul_tflops"]
            shown |= {"reach": f"{100 * reach:.0f} %"}
        said = ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()
        )
        lines.append(f"| {name} | {said} |")
    for name in (name for name, row in rows.items() if "largest" in row):
        lines += [
            "",
            f"## {name}: the largest kernels",
            "",
            "| ms | times | kernel |",
            "|---|---|---|",
        ]
        kernels = sorted(rows[name]["largest"].items(), key=lambda kernel: -kernel[1][0])
        lines += [f"| {ms:.0f} | {count} | `{kernel}` |" for kernel, (ms, count) in kernels]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--rows", nargs="*", default=[""], help="parts of their names")
    parser.add_argument("--once", action="store_true", help="leave out the rows that failed")
    parser.add_argument("--profile", action="store_true", help="kernels of a step, in the file")
    args = parser.parse_args()
    global PROFILE
    PROFILE = args.profile
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return 0
    if not (CUDA or args.dry):
        print("no CUDA device; --dry runs the same rows on a CPU", file=sys.stderr)
        return 2
    started = time.monotonic()
    done = json.loads(args.out.read_text()) if args.out.exists() else {}
    for script in (train_qwen_edit, train_pairedit):
        real = script.fill_parts
        script.fill_parts = lambda model, folder, *rest, real=real, script=script: (
            real if list(folder.glob("*.safetensors")) else random_parts(script)
        )(model, folder, *rest)
    with tempfile.TemporaryDirectory() as folder:
        for name, (seconds, gb, run) in ROWS.items():
            failed = "error" in done.get(name, {}) and not args.once
            if (name in done and not failed) or not any(part in name for part in args.rows):
                continue
            left = args.minutes * 60 - (time.monotonic() - started)
            room = torch.cuda.mem_get_info()[0] / 1e9 if CUDA else 1e9
            if left < seconds or room < gb:
                said = f"{left:.0f} s, {room:.0f} GB left" if CUDA else f"{left:.0f} s left"
                print(f"{name}: skipped, needs about {seconds} s, {gb} GB; {said}", flush=True)
                continue
            begun = time.monotonic()
            forget_processes()
            torch.compiler.reset()  # or the second size of a class is compiled for any size
            try:
                row = run(Path(folder), args.dry)
            except Exception as error:  # reported; the others run
                traceback.print_exc(limit=-4)
                row = {"error": f"{type(error).__name__}: {error}"[:300]}
            row |= {"seconds": round(time.monotonic() - begun, 1)}
            if name == "card":
                row |= {"date": time.strftime("%Y-%m-%d"), "commit": commit()}
            done[name] = row
            args.out.write_text(json.dumps(done, indent=1))
            print(f"{name}: {json.dumps(row)}", flush=True)
            if "CUDA error" in row.get("error", ""):  # nothing runs any more in this process
                minutes = args.minutes - (time.monotonic() - started) / 60
                argv = [*sys.argv, "--once", "--minutes", str(minutes)]
                os.execv(sys.executable, [sys.executable, *argv])
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()
    return int(any("error" in row for row in done.values()))


if __name__ == "__main__":
    sys.exit(main())
