"""What the trainers compute, as fingerprints that must not move while the code around it does.

    python tests/golden.py --against REV    # the same commands with REV's code: equal bits?
    python tests/golden.py --write          # tests/golden.json, which test_golden.py compares

Bits depend on the processor, so `--against` runs both codes on one machine; the file holds sums
that are equal on all machines to a small tolerance.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from conftest import (
    ROOT,
    concept,
    copy_pairs,
    run,
    slider_settings,
    small_config,
    suffix_dataset,
    write_config,
)
from PIL import Image
from safetensors.torch import load_file

FILE = ROOT / "tests/golden.json"
STEPS = 20
TARGETS = ["to_q", "to_k", "to_out.0", "to_add_out", "img_mlp.net.2", "txt_mlp.net.2", "img_mod.1"]


def qwen_settings(folder):
    """{name: (kind of checkpoint, changes to small_config)}."""
    pairs = copy_pairs(
        folder / "pairs", ("astronaut1", "chelsea0", "coffee0", "hubble0", "hubble1")
    )
    for file in sorted(pairs.glob("*_R.png")):  # a second reference
        Image.open(file).rotate(180).save(file.with_name(file.name.replace("_R", "_D")))
    common = {"train.max_train_steps": STEPS, "train.checkpointing_steps": 10}
    usual = common | {
        "data.dataset_configs": [
            suffix_dataset(pairs, holdout=["hubble1"], views=2, view_scale=0.7, view_flip=True)
        ],
        "data.caption_dropout_rate": 0.3,
        "model.lora.target_modules": TARGETS,
        "lr_scheduler.scheduler_type": "constant_with_warmup",
        "lr_scheduler.warmup_steps": 2,
        "validation.steps": 10,
        "validation.num_inference_steps": 2,
        "validation.true_cfg_scale": 2.0,
        "train.use_ema": True,
    }
    rich = suffix_dataset(pairs)
    rich["image_configs"] |= {"second": {"suffix": "_D"}}
    rich["target_configs"]["after"] = [{"image": "after", "from_image": "before"}]
    rich["reference_configs"]["before"] = [{"image": "before"}, {"image": "second", "resize": 64}]
    rich["batch_configs"][0]["mask"] = "second"
    rich["batch_configs"] += [{**rich["batch_configs"][0], "weight": 0.4}]
    rich["caption_configs"]["text"]["reference_list"] |= {"dropout": 0.3, "min_length": 1}
    rich = common | {
        "data.dataset_configs": [rich],
        "data.batch_size": 1,
        "train.gradient_accumulation_steps": 2,
        "train.gradient_checkpointing": True,
        "model.lora.lora_alpha": 8,
        "model.lora.target_modules": "attn+mlp",
        "loss.loss_type": "huber",
        "loss.mask": "file",
        "loss.timestep_density": "uniform",
    }
    plain = common | {"data.dataset_configs": [suffix_dataset(pairs)]}
    plain_2508 = suffix_dataset(pairs)
    plain_2508["caption_configs"]["text"]["reference_list"] = None
    return {
        "qwen": ("2511", usual),
        "qwen uncached": ("2511", usual | {"cache.use_cache": False}),
        "qwen resumed": ("2511", usual),
        "qwen two processes": ("2511", usual | {"data.batch_size": 1}),
        "qwen rich": ("2509", rich),
        "qwen 2508": ("2508", common | {"data.dataset_configs": [plain_2508]}),
        "qwen dora": ("2511", plain | {"model.lora.method": "dora"}),
        "qwen lokr": ("2511", plain | {"model.lora.method": "lokr"}),
        "qwen int8": ("2511", plain | {"model.base_model_precision": "int8-quanto"}),
    }


def slider_runs(folder):
    """{name: changes to slider_settings}."""
    concept(folder / "datasets/age")
    common = {
        "train_iteration": STEPS,
        "save_per_steps": 10,
        "datasets_folder": str(folder / "datasets"),
    }
    usual = common | {
        "preview": True,
        "scales": [0, 1],
        "num_inference_steps": 6,
        "end_step": 5,
        "skips": [1],
    }
    return {
        "slider": usual,
        "slider resumed": usual,
        "slider two processes": common,
        "slider batch": common | {"batch_size": 2},
        "slider wocontent": common | {"python_name": "train_image_wocontent", "noise_scales": [2]},
        "slider wocfg": common | {"python_name": "train_image_wocfg"},
        "slider fm": common | {"python_name": "train_image_fm", "num_noise_seeds": None},
        "slider sliders": common | {"python_name": "train_image_sliders"},
        "slider real": common | {"python_name": "train_image_real", "image_ids": ["7001"]},
        "slider text": common
        | {"python_name": "slider_text", "num_inference_steps": 4, "end_step": 3},
        "slider int8": common | {"base_model_precision": "int8-quanto"},
    }


def sd_runs(folder):
    """{name: settings} of train_dreambooth_pairs.py."""
    concept(folder / "sd-data", stages=("before", "after"))
    common = {
        "resolution": 64,
        "train_batch_size": 2,
        "max_train_steps": STEPS,
        "checkpointing_steps": 10,
        "instance_prompt": "a photo of a person",
    }
    pairs = common | {
        "use_image_pairs": True,
        "before_data_dir": str(folder / "sd-data/before"),
        "after_data_dir": str(folder / "sd-data/after"),
    }
    single = common | {"instance_data_dir": str(folder / "sd-data/after")}
    rich = {"noise_offset": 0.1, "snr_gamma": 5, "region_weight": 0.5, "random_flip": True}
    drawn = {
        "validation_prompt": "a person",
        "num_validation_images": 1,
        "validation_scales": [0, 1],
    }
    drawn |= {"validation_inference_steps": 2}
    prior = {"with_prior_preservation": True, "class_prompt": "a person", "num_class_images": 2}
    prior |= {"class_data_dir": str(folder / "class"), "sample_batch_size": 2}
    conv = {"target_modules": "self-attention+conv", "lr_scheduler": "cosine", "loss_type": "huber"}
    return {
        "sd": pairs | rich | drawn,
        "sd resumed": pairs | rich | drawn,
        "sd two processes": pairs | {"train_batch_size": 1},
        "sd difference": pairs | conv | {"pair_objective": "difference"},
        "sd joint": pairs | {"pair_objective": "joint", "gradient_accumulation_steps": 2},
        "sd single": single | {"train_text_encoder": True},
        "sd prior": single | prior,
    }


def commands(root, checkpoints, folder):
    """{name: (its results' folder, [command, ...])}."""
    found = {}
    for name, (kind, changes) in qwen_settings(folder).items():
        place = folder / name.replace(" ", "-")
        place.mkdir()
        file = write_config(place, small_config(checkpoints[kind], place, **changes))
        command = [root / "train_qwen_edit.py", "--config", file]
        found[name] = place, command
    for name, changes in slider_runs(folder).items():
        place = folder / name.replace(" ", "-")
        place.mkdir()
        settings = slider_settings(checkpoints["flux"], place, **changes)
        file = write_config(place, settings)
        found[name] = place, [root / "train_pairedit.py", "--config", file]
    for name, changes in sd_runs(folder).items():
        place = folder / name.replace(" ", "-")
        place.mkdir()
        places = {"output_dir": str(place / "out"), "cache_dir": str(place / "cache")}
        base = {"pretrained_model_name_or_path": str(checkpoints["sd"])}
        file = write_config(place, base | places | changes)
        found[name] = place, [root / "train_dreambooth_pairs.py", "--config", file]
    return {name: (place, parts(name, command)) for name, (place, command) in found.items()}


HALF = {  # the settings that end a run after half of its steps, and those that go on
    "qwen": ("train.max_train_steps", "train.resume_from_checkpoint"),
    "slider": ("train_iteration", "resume_from_checkpoint"),
    "sd": ("max_train_steps", "resume_from_checkpoint"),
}


def parts(name, command):
    """The commands of an experiment: one, or half and the rest."""
    if "resumed" not in name:
        return [command]
    length, resume = HALF[name.split()[0]]
    return [[*command, f"--{length}", STEPS // 2], [*command, f"--{resume}", "latest"]]


def run_all(root, checkpoints, folder, only=None):
    """Run the experiments with the code in `root` -> {name: folder of the results}."""
    found = {}
    for name, (place, work) in commands(root, checkpoints, folder).items():
        if not only or name in only:
            for command in work:
                run(*command, processes=1 + ("two processes" in name), env={"OMP_NUM_THREADS": "1"})
            found[name] = place
    return found


def results(place):
    """The LoRA files and pictures that an experiment left, without what was in checkpoints."""
    files = sorted((place / "out").rglob("*.safetensors")) + sorted((place / "out").rglob("*.png"))
    return [f for f in files if "checkpoint-" not in str(f) and "first_batch" not in f.name]


KOHYA = {"lora_unet_": "unet_", "lora_te_": "text_encoder_", "lora_down": "lora_A"}
KOHYA |= {"lora_up": "lora_B"}


def lora_tensors(file):
    """{name: tensor} of a LoRA file; of Stable Diffusion the same for kohya's names and PEFT's."""
    found = {}
    for name, tensor in load_file(file).items():
        for theirs, ours in KOHYA.items():
            name = name.replace(theirs, ours)
        if not name.endswith(".alpha"):  # the rank
            found[name if name.startswith("transformer.") else name.replace(".", "_")] = tensor
    return found


def bits(place):
    """{file or "cache keys": hash of the tensors, the pixels or the names}."""
    found = {}
    for file in results(place):
        digest = hashlib.blake2b(digest_size=8)
        if file.suffix == ".png":
            digest.update(Image.open(file).tobytes())
        else:
            for name, tensor in sorted(lora_tensors(file).items()):
                digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        found[str(file.relative_to(place / "out"))] = digest.hexdigest()
    keys = sorted(f.stem for f in (place / "cache").glob("??/??/*.safetensors"))
    if keys:
        found["cache keys"] = hashlib.blake2b("\n".join(keys).encode(), digest_size=8).hexdigest()
        found["cache entries"] = str(len(keys))
    return found


def sums(place):
    """{file: figures that are equal on every machine to a small tolerance}."""
    found = {}
    for file in results(place):
        name = str(file.relative_to(place / "out"))
        if file.suffix == ".png":
            found[name] = [float(x) for x in np.asarray(Image.open(file), float).mean((0, 1))]
            continue
        tensors = lora_tensors(file)  # without lora_A: it starts at random and hardly moves
        moved = [tensors[name].flatten() for name in sorted(tensors) if "lora_A" not in name]
        values = torch.cat(moved).double()
        slope = torch.linspace(-1, 1, len(values)).double()
        found[name] = [len(tensors), values.norm().item(), slope.dot(values).item()]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", metavar="REV")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", nargs="*")
    given = parser.parse_args()
    import tiny

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoints = tiny.build_all(folder / "checkpoints")
        (folder / "now").mkdir()
        now = run_all(ROOT, checkpoints, folder / "now", given.only)
        if given.write:
            FILE.write_text(json.dumps({n: sums(p) for n, p in now.items()}, indent=1) + "\n")
        if given.against:
            tree = folder / "then-code"
            subprocess.run(
                ["git", "worktree", "add", "-q", "--detach", tree, given.against],
                cwd=ROOT,
                check=True,
            )
            try:
                (folder / "then").mkdir()
                then = run_all(tree, checkpoints, folder / "then", given.only)
            finally:
                subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
            equal = True
            for name in now:
                a, b = bits(now[name]), bits(then[name])
                wrong = sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))
                equal &= not wrong
                print(f"{'same' if not wrong else 'OTHER':6}{name:24}{', '.join(wrong)}")
            sys.exit(not equal)


if __name__ == "__main__":
    main()
