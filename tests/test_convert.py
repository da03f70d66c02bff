"""tools/convert_config.py: configs of three other tools, and that no key of them is lost."""

import importlib.util
import json
import re
import sys

import pytest
import yaml
from conftest import ROOT, run

from train_qwen_edit import Config, DatasetConfig
from utils import load_config, run_script, settings

TOOL = ROOT / "tools" / "convert_config.py"
spec = importlib.util.spec_from_file_location("convert_config", TOOL)
tool = importlib.util.module_from_spec(spec)
sys.modules["convert_config"] = tool  # pydantic looks Rule's annotations up there
spec.loader.exec_module(tool)


def converted(kind, folder, *sources):
    """(our settings as they are printed, what is said) of files with these contents."""
    files = []
    for number, source in enumerate(sources):
        files.append(folder / f"{number}.json")  # JSON is YAML
        files[-1].write_text(source if isinstance(source, str) else json.dumps(source))
    lines = []
    config = tool.convert(kind, files, lambda key, text: lines.append(f"{key}: {text}"))
    return config.model_dump(mode="json", exclude_defaults=True), lines


def named(lines, key):
    """What is said about a key."""
    return [line for line in lines if f".{key}." in f".{line.split(': ')[0]}."]


# --- nothing is lost ------------------------------------------------------------------------------

T2I_BASE = {
    "dataset_configs": [
        {
            "train_data_dir": "photos",
            "image_configs": {"T": {"suffix": "_T"}, "R": {"suffix": "_R"}},
            "target_configs": {"T": [{"image": "T"}]},
            "reference_configs": {"R": [{"image": "R"}]},
            "caption_configs": {"c": {"image": "T", "reference_list": {"reference_config": "R"}}},
            "batch_configs": [
                {"target_config": "T", "caption_config": "c", "reference_config": "R"}
            ],
        }
    ]
}
UNREAD = """
use_8bit_adam adam_beta1 adam_beta2 adam_weight_decay adam_weight_decay_text_encoder adam_epsilon
prodigy_beta3 prodigy_decouple prodigy_use_bias_correction prodigy_safeguard_warmup prodigy_d_coef
max_grad_norm mask_dropout vae_path use_debias snr_gamma max_time_steps guidance_scale noise_offset
reg_ratio reg_timestep use_two_captions slider_positive_scale slider_negative_scale recreate_cache
recreate_cache_target recreate_cache_reference recreate_cache_caption
"""  # parsed by its trainer, used nowhere
# every top-level key of its trainer, with a value that is neither its default nor ours
T2I_KEYS = {
    "pretrained_model_name_or_path": "models/qwen_image_edit_2511",
    "model_path": "transformer.safetensors",
    "output_dir": "elsewhere",
    "logging_dir": "logs",
    "save_name": "qwen",
    "train_data_dir": "others",
    "resolution": "768",
    "repeats": 3,
    "train_batch_size": 2,
    "num_train_epochs": 7,
    "gradient_accumulation_steps": 4,
    "gradient_checkpointing": True,
    "mixed_precision": "fp8",
    "learning_rate": "3e-4",
    "optimizer": "prodigy",
    "lr_scheduler": "linear",
    "lr_warmup_steps": 9,
    "cosine_restarts": 3,
    "rank": 64,
    "use_lokr": True,
    "rank_alpha": 8.0,
    "lokr_factor": 8.0,
    "lora_layers": "attn.to_q, attn.to_k",
    "freeze_transformer_layers": "0-10, 50-58",
    "blocks_to_swap": 20,
    "caption_dropout": 0.3,
    "weighting_scheme": "cosmap",
    "logit_mean": 0.5,
    "logit_std": 2.0,
    "mode_scale": 1.0,
    "nln_method": "default",
    "nln_samples": 5,
    "nln_scale": 0.1,
    "validation_ratio": 0.2,
    "validation_epochs": 2,
    "save_model_epochs": 2,
    "save_model_steps": 50,
    "skip_epoch": 1,
    "skip_step": 100,
    "resume_from_checkpoint": "out/qwen-3-300",
    "report_to": "comet_ml",
    "seed": 7,
    "allow_tf32": True,
    **dict.fromkeys(UNREAD.split(), 0.5),
    "something_new": 1,
}
ST_BASE = {"model_flavour": "edit-v2"}
ST_KEYS = {
    "model_flavour": "edit-v1",
    "pretrained_model_name_or_path": "models/mine",
    "train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "validation_resolution": "768x768",
    "validation_guidance": 3.5,
    "validation_guidance_real": 3.0,
    "validation_num_inference_steps": 40,
    "validation_step_interval": 10,
    "validation_epoch_interval": 1,
    "validation_seed": 3,
    "validation_negative_prompt": "blurry",
    "validation_prompt": "a cat",
    "validation_prompt_library": True,
    "user_prompt_library": "prompts.json",
    "validation_input": "inputs.json",
    "validation_preview": True,
    "validation_using_datasets": True,
    "num_eval_images": 9,
    "eval_dataset_id": "qwen-edit-images",
    "eval_steps_interval": 10,
    "eval_timesteps": 28,
    "disable_benchmark": True,
    "mixed_precision": "fp16",
    "gradient_checkpointing": False,
    "gradient_checkpointing_interval": 2,
    "base_model_precision": "int8-sdnq",
    "text_encoder_1_precision": "int8-quanto",
    "quantize_via": "pipeline",
    "musubi_blocks_to_swap": 10,
    "ramtorch": True,
    "flow_schedule_shift": 1.73,
    "flow_schedule_auto_shift": True,
    "flow_sigmoid_scale": 2.0,
    "flow_use_uniform_schedule": True,
    "flow_use_beta_schedule": True,
    "loss_type": "smooth_l1",
    "huber_c": 0.2,
    "huber_schedule": "snr",
    "masked_loss_probability": 0.5,
    "data_backend_config": "multidatabackend.json",
    "data_backend_sampling": "uniform",
    "caption_dropout_probability": 0.2,
    "conditioning_multidataset_sampling": "random",
    "resolution": 512,
    "resolution_type": "area",
    "aspect_bucket_rounding": 3,
    "compress_disk_cache": True,
    "vae_cache_ondemand": True,
    "vae_cache_disable": True,
    "vae_cache_clear_each_epoch": True,
    "conditioning_image_embed_batch_size": 4,
    "override_dataset_config": True,
    "use_ema": True,
    "ema_decay": 0.9,
    "ema_device": "cpu",
    "ema_cpu_only": True,
    "ema_update_interval": 10,
    "ema_validation": "ema_only",
    "lora_rank": 64,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "lora_type": "lycoris",
    "lora_format": "comfyui",
    "lycoris_config": "lycoris.json",
    "use_dora": True,
    "peft_lora_target_modules": ["to_q"],
    "init_lora": "before.safetensors",
    "optimizer": "optimi-lion",
    "optimizer_config": "betas=0.9",
    "learning_rate": "5e-5",
    "lr_scheduler": "sine",
    "lr_warmup_steps": 10,
    "lr_num_cycles": 2,
    "lr_power": 2.0,
    "max_grad_norm": 0.01,
    "grad_clip_method": "value",
    "max_train_steps": 100,
    "num_train_epochs": 5,
    "checkpointing_steps": 50,
    "checkpoint_step_interval": 50,
    "checkpoint_epoch_interval": 1,
    "checkpoints_total_limit": 2,
    "checkpointing_rolling_steps": 10,
    "checkpointing_use_tempdir": True,
    "delete_invalid_checkpoints": True,
    "resume_from_checkpoint": "latest",
    "scheduled_sampling_max_step_offset": 5,
    "scheduled_sampling_strategy": "biased_early",
    "scheduled_sampling_probability": 0.7,
    "scheduled_sampling_prob_start": 0.1,
    "scheduled_sampling_prob_end": 0.8,
    "scheduled_sampling_ramp_steps": 100,
    "scheduled_sampling_ramp_shape": "cosine",
    "scheduled_sampling_sampler": "unipc",
    "scheduled_sampling_reflexflow": True,
    "report_to": "swanlab",
    "tracker_project_name": "mine",
    "tracker_run_name": "first",
    "output_dir": "elsewhere",
    "seed": 7,
    "--disable_bucket_pruning": True,
    "something_new": 1,
}
ST_DATA = [
    {"id": "qwen-edit-images", "instance_data_dir": "/images", "conditioning_data": ["a", "b"]},
    {"id": "a", "dataset_type": "conditioning", "instance_data_dir": "/a"},
    {"id": "b", "dataset_type": "conditioning", "instance_data_dir": "/b"},
]
BACKEND_KEYS = {
    "resolution": 768,
    "resolution_type": "pixel",
    "repeats": 4,
    "caption_strategy": "filename",
    "instance_prompt": "make it snow",
    "prepend_instance_prompt": True,
    "disable_multiline_split": True,
    "caption_shuffle": {"enable": True},
    "crop": True,
    "crop_style": "random",
    "crop_aspect": "square",
    "cache_dir_vae": "cache/vae",
    "conditioning_image_embeds": "embeds",
    "minimum_image_size": 512,
    "maximum_image_size": 2048,
    "target_downsample_size": 1024,
    "probability": 0.5,
    "max_num_samples": 10,
    "is_regularisation_data": True,
    "vae_cache_clear_each_epoch": True,
    "disable_validation": True,
    "type": "huggingface",
    "disabled": True,
    "dataset_type": "eval",
    "something_new": 1,
}
REFERENCE_KEYS = {
    **{k: v for k, v in BACKEND_KEYS.items() if k not in ("type", "disabled", "dataset_type")},
    "conditioning_type": "reference_loose",
    "instance_data_dir": "/elsewhere",
}
QF_BASE = {"data": {"init_args": {"dataset_path": "photos", "processor": {"init_args": {}}}}}
PROCESSOR = "data.init_args.processor."
QF_KEYS = {  # both generations
    "trainer": "QwenImageEditPlus",
    "resume": "out/v0/checkpoint-last",
    "mode": "fit",
    "model.pretrained_model_name_or_path": "ovedrive/qwen-image-edit-4bit",
    "model.pretrained_embeddings": {"text_encoder": "x"},
    "model.quantize": True,
    "model.use_vlm_prompt_enhancer": True,
    "model.rank": 32,
    "model.lora.r": 8,
    "model.lora.lora_alpha": 32,
    "model.lora.init_lora_weights": "normal",
    "model.lora.target_modules": ["to_k"],
    "model.lora.pretrained_weight": "before.safetensors",
    "model.lora.adapter_name": "lora_edit",
    "data.class_path": "qflux.data.dataset.ImageDataset",
    "data.batch_size": 2,
    "data.num_workers": 5,
    "data.shuffle": False,
    "data.init_args.dataset_path": ["one.csv", {"repo_id": "a/b", "split": "test"}],
    "data.init_args.image_size": [832, 576],
    "data.init_args.caption_dropout_rate": 0.1,
    "data.init_args.cache_drop_rate": 0.2,
    "data.init_args.prompt_image_dropout_rate": 0.1,
    "data.init_args.cache_dir": "x",
    "data.init_args.use_cache": True,
    "data.init_args.prompt_empty_drop_keys": ["prompt_embed"],
    "data.init_args.use_edit_mask": True,
    "data.init_args.selected_control_indexes": [2],
    f"{PROCESSOR}class_path": "qflux.data.preprocess.ImageProcessor",
    f"{PROCESSOR}init_args.process_type": "center_padding",
    f"{PROCESSOR}init_args.resize_mode": "lanczos",
    f"{PROCESSOR}init_args.target_size": [832, 576],
    f"{PROCESSOR}init_args.controls_size": [[512, 512]],
    f"{PROCESSOR}init_args.target_pixels": "512*512",
    f"{PROCESSOR}init_args.controls_pixels": ["256*256"],
    f"{PROCESSOR}init_args.multi_resolutions": ["512*512", "768*768"],
    f"{PROCESSOR}init_args.max_aspect_ratio": 2.0,
    f"{PROCESSOR}init_args.resize_controls_mask_to_image": True,
    "logging.output_dir": "elsewhere",
    "logging.logging_dir": "logs",
    "logging.report_to": "swanlab",
    "logging.tracker_project_name": "mine",
    "logging.tags": ["a"],
    "logging.notes": "b",
    "optimizer.class_path": "bitsandbytes.optim.Adam8bit",
    "optimizer.init_args": {"lr": 2e-4, "betas": [0.9, 0.99]},
    "lr_scheduler.scheduler_type": "cosine",
    "lr_scheduler.warmup_steps": 10,
    "lr_scheduler.num_cycles": 1.5,
    "lr_scheduler.power": 2.0,
    "train.train_batch_size": 2,
    "train.gradient_accumulation_steps": 2,
    "train.max_train_steps": 10000,
    "train.num_epochs": 3,
    "train.checkpointing_steps": 250,
    "train.checkpoints_total_limit": 10,
    "train.max_grad_norm": 2.0,
    "train.mixed_precision": "fp16",
    "train.gradient_checkpointing": False,
    "train.low_memory": True,
    "train.fit_device": {"dit": "cuda:1"},
    "cache.vae_encoder_device": "cuda:1",
    "cache.text_encoder_device": "cuda:2",
    "cache.devices.vae": "cuda:1",
    "cache.devices.text_encoder": "cuda:2",
    "cache.devices.text_encoder_2": "cuda:2",
    "cache.use_cache": False,
    "cache.cache_dir": "elsewhere",
    "cache.prompt_empty_drop_keys": ["prompt_embed"],
    "predict.devices.vae": "cuda:5",
    "predict.devices.text_encoder": "cuda:6",
    "predict.devices.dit": "cuda:7",
    "predict.devices.transformer": "cuda:7",
    "predict.devices.prompt_enhancer": "cuda:7",
    "loss.mask_loss": True,
    "loss.forground_weight": 3.0,
    "loss.background_weight": 0.5,
    "loss.class_path": "qflux.losses.MaskEditLoss",
    "loss.init_args.forground_weight": 4.0,
    "validation.enabled": True,
    "validation.steps": 50,
    "validation.max_samples": 2,
    "validation.seed": 3,
    "validation.dataset.class_path": "x",
    "validation.dataset.init_args.dataset_path": "held_out",
    "validation.samples": [{"prompt": "x", "images": ["a.png"], "controls_size": [[1, 1]]}],
    "something.new": 1,
}
FLY_BASE = {"data_config": {"img_dir": "after", "control_dir": "before"}}
FLY_KEYS = {
    "pretrained_model_name_or_path": "Qwen/Qwen-Image-Edit",
    "data_config.train_batch_size": 2,
    "data_config.num_workers": 4,
    "data_config.img_size": 1024,
    "data_config.caption_dropout_rate": 0.1,
    "data_config.img_dir": "targets",
    "data_config.control_dir": "controls",
    "data_config.random_ratio": True,
    "data_config.caption_type": "caption",
    "report_to": "wandb",
    "train_batch_size": 1,
    "output_dir": "elsewhere",
    "logging_dir": "logs",
    "tracker_project_name": "mine",
    "max_train_steps": 3000,
    "num_train_epochs": 2,
    "learning_rate": 2e-4,
    "lr_scheduler": "cosine_with_restarts",
    "lr_warmup_steps": 10,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_weight_decay": 0.1,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 2.0,
    "mixed_precision": "fp16",
    "checkpointing_steps": 250,
    "checkpoints_total_limit": 10,
    "resume_from_checkpoint": "latest",
    "gradient_accumulation_steps": 4,
    "rank": 32,
    "precompute_text_embeddings": True,
    "precompute_image_embeddings": True,
    "save_cache_on_disk": False,
    "quantize": True,
    "adam8bit": True,
    "use_8bit_adam": True,
    "freeze_text_encoder": True,
    "something_new": 1,
}


def with_key(base, key, value):
    """A copy of a nested config with one dotted key set."""
    copy = json.loads(json.dumps(base))
    *parents, last = key.split(".")
    place = copy
    for part in parents:
        place = place.setdefault(part, {})
    place[last] = value
    return copy


@pytest.mark.parametrize(
    ("kind", "base", "keys"),
    [
        ("t2itrainer", T2I_BASE, T2I_KEYS),
        ("simpletuner", ST_BASE, ST_KEYS),
        ("qwen-image-finetune", QF_BASE, QF_KEYS),
        ("qwen-image-finetune", FLY_BASE, FLY_KEYS),
    ],
    ids=["t2itrainer", "simpletuner", "qwen-image-finetune", "flymyai"],
)
def test_every_key_is_in_the_output_or_named(kind, base, keys, tmp_path):
    more = [ST_DATA] if kind == "simpletuner" else []
    before, _ = converted(kind, tmp_path, base, *more)
    lost = []
    for key, value in keys.items():
        source = {**base, key: value} if kind == "simpletuner" else with_key(base, key, value)
        output, lines = converted(kind, tmp_path, source, *more)
        if output == before and not named(lines, key.lstrip("-")):
            lost.append(key)
    assert not lost


@pytest.mark.parametrize("place", [0, 1], ids=["pictures", "references"])
def test_every_key_of_a_simpletuner_data_set_is_in_the_output_or_named(place, tmp_path):
    base = json.loads(json.dumps(ST_DATA))
    before, _ = converted("simpletuner", tmp_path, ST_BASE, base)
    lost = []
    for key, value in (BACKEND_KEYS, REFERENCE_KEYS)[place].items():
        data = json.loads(json.dumps(ST_DATA))
        data[place][key] = value
        output, lines = converted("simpletuner", tmp_path, ST_BASE, data)
        name = data[place]["id"]
        whole = [line for line in lines if line.startswith(f"{name}: ")]
        if output == before and not named(lines, f"{name}.{key}") and not whole:
            lost.append(key)
    assert not lost


def test_every_key_inside_a_t2itrainer_data_set_is_in_the_output_or_named(tmp_path):
    before, _ = converted("t2itrainer", tmp_path, T2I_BASE)
    places = {
        "resolution": "768",
        "repeats": 8,
        "recreate_cache": True,
        "recreate_cache_target": True,
        "recreate_cache_reference": True,
        "recreate_cache_caption": True,
        "image_configs.T.prefix": "mask_",
        "target_configs.T.0.from_image": "R",
        "target_configs.T.0.resize": "1024",
        "target_configs.T.0.sample_type": "from_subdir",
        "reference_configs.R.0.sample_type": "from_subdir",
        "reference_configs.R.0.resize": 512,
        "reference_configs.R.0.suffix": "_style",
        "reference_configs.R.0.count": 2,
        "caption_configs.c.ext": ".caption",
        "caption_configs.c.instruction": "Describe.",
        "caption_configs.c.reference_list.resize": "512",
        "caption_configs.c.reference_list.dropout": 0.2,
        "caption_configs.c.reference_list.min_length": 2,
        "batch_configs.0.caption_dropout": 0.2,
        "batch_configs.0.reference_dropout": 0.2,
        "batch_configs.0.reference_config_extra": {"dropout": 0.1, "min": 1},
        "batch_configs.0.weight": 0.5,
        "something_new": 1,
    }
    lost = []
    for key, value in places.items():
        source = json.loads(json.dumps(T2I_BASE))
        *parents, last = key.split(".")
        place = source["dataset_configs"][0]
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place[part]
        place[last] = value
        output, lines = converted("t2itrainer", tmp_path, source)
        if output == before and not named(lines, key):
            lost.append(key)
    assert not lost


def test_every_rule_leads_to_a_setting():
    known = {path for path, _ in settings(Config)} | {"optimizer"}
    backend = set(DatasetConfig.model_fields)
    for kind, table in tool.tables().items():
        for key, rule in table.get("keys", {}).items():
            path = re.sub(r"^optimizer\.init_args\..*", "optimizer.init_args", rule.to)
            assert not rule.to or path in known, f"{kind}: {key} -> {rule.to}"
        assert {rule.to for rule in table.get("backend_keys", {}).values()} <= backend | {""}


# --- what values become ---------------------------------------------------------------------------


def test_t2itrainer_values(tmp_path):
    """The values its samples and its document use, and what changes on the way."""
    source = {
        **T2I_BASE,
        "resolution": "768",
        "repeats": 2,
        "rank": 32,
        "learning_rate": 2e-4,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "num_train_epochs": 10,
        "freeze_transformer_layers": "0-10, 50-58",
        "logit_mean": 0.5,
        "validation_ratio": 0.2,
        "save_model_steps": 100,
        "gradient_checkpointing": True,
    }
    source["dataset_configs"] = [{**T2I_BASE["dataset_configs"][0], "repeats": "8"}]
    output, _ = converted("t2itrainer", tmp_path, source)
    data = output["data"]["dataset_configs"][0]
    assert data["resolution"] == 768 and data["repeats"] == 16 and data["buckets"] == "table"
    assert data["holdout_ratio"] == 0.2 and output["validation"] == {"steps": 100}
    assert output["data"]["caption_dropout_rate"] == 0.1  # not in the file: its own default
    assert output["data"]["caption_dropout_mode"] == "zero"
    assert output["data"]["reference_area"] == "target"
    assert output["model"]["lora"] == {
        "r": 32,
        "target_modules": tool.T2I_LAYERS,
        "exclude_blocks": "0-10, 50-58, 59",
    }
    assert len(tool.T2I_LAYERS) == 10
    assert output["train"] == {
        "max_train_steps": 1_000_000,
        "num_epochs": 10,
        "checkpointing_steps": 100,
    }
    assert output["optimizer"] == {
        "class_path": "adamw8bit",
        "init_args": {"betas": [0.9, 0.99], "lr": 2e-4},
    }
    assert output["loss"] == {"timestep_shift": 1.0, "logit_mean": -0.5}
    assert "lr_scheduler" not in output  # constant without warm-up is our default


def test_t2itrainer_lokr_prodigy_and_ambiguous_words(tmp_path):
    source = json.loads(json.dumps(T2I_BASE)) | {
        **{"use_lokr": True, "rank_alpha": 2.0, "lokr_factor": 8.0, "optimizer": "prodigy"},
        **{"learning_rate": 1.0, "lora_layers": "to_q, to_k", "weighting_scheme": "sigma_sqrt"},
    }
    ds = source["dataset_configs"][0]
    ds["target_configs"]["T"][0]["from_image"] = "R"
    ds["caption_configs"]["c"]["reference_list"]["dropout"] = 0.1
    ds["caption_configs"]["plain"] = {"image": "T"}
    output, lines = converted("t2itrainer", tmp_path, source)
    lora = output["model"]["lora"]
    assert lora["method"] == "lokr" and lora["lora_alpha"] == 2 and lora["lokr_factor"] == 8
    assert lora["target_modules"] == ["to_q", "to_k"]
    assert output["optimizer"]["init_args"]["d_coef"] == 2
    assert output["loss"]["timestep_density"] == "uniform"
    target = output["data"]["dataset_configs"][0]["target_configs"]["T"]
    assert target == [{"image": "T", "from_image": "R"}]  # bridge, the default here
    for key in ("from_image", "min_length", "caption_configs.plain", "weighting_scheme"):
        assert named(lines, key), key


def test_simpletuner_values(tmp_path):
    source = {
        "model_flavour": "edit-v3",
        "learning_rate": "1e-4",
        "lora_rank": 32,
        "lora_alpha": 32,
        "flow_schedule_shift": 0,
        "flow_schedule_auto_shift": True,
        "use_ema": True,
        "validation_resolution": "1024x512,768",
        "validation_guidance": 3.5,
        "validation_step_interval": 100,
        "base_model_precision": "nf4-bnb",
        "model_kwargs": {"match_target_res": True, "other": 1},
        "eval_dataset_id": "val",
        "scheduled_sampling_max_step_offset": 5,
    }
    data = [
        {
            "id": "train",
            "instance_data_dir": "/images",
            "conditioning_data": "a",
            "resolution": 0.5,
            "resolution_type": "area",
            "repeats": 2,
            "caption_strategy": "instanceprompt",
            "instance_prompt": ["make it snow", "snow"],
        },
        {
            "id": "a",
            "dataset_type": "conditioning",
            "instance_data_dir": "/a",
            "conditioning_type": "reference_loose",
        },
        {
            "id": "m",
            "dataset_type": "conditioning",
            "instance_data_dir": "/masks",
            "conditioning_type": "mask",
            "source_dataset_id": "train",
        },
        {"id": "val", "instance_data_dir": "/val", "conditioning_data": ["va"]},
        {"id": "va", "dataset_type": "conditioning", "instance_data_dir": "/va"},
        {"id": "text", "dataset_type": "text_embeds", "cache_dir": "cache/text"},
    ]
    output, lines = converted("simpletuner", tmp_path, source, data)
    train, val = output["data"]["dataset_configs"]
    assert train["target_dir"] == "/images" and train["reference_dirs"] == ["/a"]
    assert train["mask_dir"] == "/masks" and train["conditioning_type"] == "reference_loose"
    assert train["resolution"] == 768 and train["repeats"] == 3
    assert train["caption"] == "make it snow"
    assert val == {"id": "val", "target_dir": "/val", "reference_dirs": ["/va"]}
    assert output["model"] == {
        "base_model_precision": "nf4-bnb",
        "lora": {"r": 32},  # alpha = rank is the default here too
    }
    assert output["data"]["reference_area"] == "target" and named(lines, "model_kwargs.other")
    assert output["train"]["use_ema"] and output["train"]["ema_device"] == "cpu"
    loss = output["loss"]
    assert loss["timestep_density"] == "sigmoid" and "timestep_shift" not in loss  # the model's
    assert loss["rollout_steps"] == 5 and loss["rollout_span"] == 1e-3
    assert loss["mask"] == "file" and loss["background_weight"] == 0
    assert output["validation"] == {
        "steps": 100,
        "eval_dataset_id": ["val"],
        "resolution": 724,
        "num_inference_steps": 30,
        "true_cfg_scale": 3.5,
    }
    assert output["optimizer"] == {"init_args": {"lr": 1e-4}} and named(lines, "text")


@pytest.mark.parametrize(
    ("flavour", "model"),
    [
        ("edit-v1", "Qwen/Qwen-Image-Edit"),
        ("edit-v2", "Qwen/Qwen-Image-Edit-2509"),
        ("edit-v2+", "Qwen/Qwen-Image-Edit-2509"),
        ("edit-v3", "Qwen/Qwen-Image-Edit-2511"),
    ],
)
def test_simpletuner_flavours(flavour, model, tmp_path):
    config = {"model_flavour": flavour}
    files = [tmp_path / "config.json", tmp_path / "data.json"]
    for file, content in zip(files, (config, ST_DATA), strict=True):
        file.write_text(json.dumps(content))
    found = tool.convert("simpletuner", files, lambda key, text: None)
    assert found.model.pretrained_model_name_or_path == model


def test_qwen_image_finetune_first_generation(tmp_path):
    """As its example has it: sizes stretched there, everything else as written."""
    (tmp_path / "photos" / "images").mkdir(parents=True)
    (tmp_path / "photos" / "control").mkdir()
    source = f"""
model:
  pretrained_model_name_or_path: Qwen/Qwen-Image-Edit
  rank: 32
  quantize: true
data:
  class_path: src.data.dataset.ImageDataset
  init_args:
    dataset_path: {tmp_path}/photos
    image_size: [832, 576]
    caption_dropout_rate: 0.1
    cache_dir: ${{cache.cache_dir}}
  batch_size: 2
optimizer: {{class_path: bitsandbytes.optim.Adam8bit, init_args: {{lr: 2e-4, betas: [0.9, 0.99]}}}}
lr_scheduler: {{scheduler_type: constant_with_warmup, warmup_steps: 10}}
train:
  max_train_steps: 3000
  num_epochs: 3
  checkpointing_steps: 250
  checkpoints_total_limit: 10
cache:
  vae_encoder_device: cuda:1
  text_encoder_device: cuda:2
  cache_dir: ${{logging.output_dir}}
logging: {{output_dir: /runs/one}}
predict: {{devices: {{vae: "cuda:5", text_encoder: "cuda:6", transformer: "cuda:7"}}}}
"""
    output, _ = converted("qwen-image-finetune", tmp_path, source)
    assert output["data"]["dataset_configs"] == [
        {
            "train_data_dir": f"{tmp_path}/photos",
            "resolution": 704,  # 832 x 576 px
            "on_missing": "skip",
            "caption_lines": False,
            "target_dir": "images",
            "reference_dirs": ["control"],
        }
    ]
    assert output["model"]["lora"] == {"r": 32} and output["model"]["quantize"]
    assert output["optimizer"]["init_args"] == {"lr": 2e-4, "betas": [0.9, 0.99]}
    assert output["train"] == {
        "max_train_steps": 3000,
        "num_epochs": 3,
        "gradient_accumulation_steps": 4,
        "checkpointing_steps": 250,
        "checkpoints_total_limit": 10,
    }
    assert output["cache"]["cache_dir"] == "/runs/one"
    assert output["predict"]["devices"]["transformer"] == "cuda:7"
    assert output["loss"] == {"timestep_density": "uniform", "timestep_shift": 1.0}
    assert "reference_area" not in output["data"]  # 1 MP, as there


def test_qwen_image_finetune_second_generation(tmp_path):
    source = {
        "trainer": "QwenImageEditPlus",
        "model": {"lora": {"r": 32}},
        "data": {
            "init_args": {
                "dataset_path": ["train.csv", "TsienDragon/face", {"repo_id": "a/b", "split": "x"}],
                "selected_control_indexes": [1, 3],
                "processor": {
                    "init_args": {"target_size": [832, 576], "controls_size": [[384, 672]]}
                },
            }
        },
        "loss": {"class_path": "qflux.losses.MaskEditLoss", "init_args": {"forground_weight": 3}},
        "train": {"num_epochs": 3},
        "validation": {
            "enabled": True,
            "steps": 50,
            "samples": [{"prompt": "snow", "images": ["a.png"], "guidance_scale": 2.5}],
        },
    }
    output, lines = converted("qwen-image-finetune", tmp_path, source)
    table, hub, split = output["data"]["dataset_configs"]
    assert table["table"] == "train.csv" and hub["hf_dataset"] == "TsienDragon/face"
    assert split["hf_dataset"] == "a/b" and split["hf_split"] == "x"
    assert table["resolution"] == 704 and table["selected_control_indexes"] == [1, 2, 4]
    assert output["data"]["reference_area"] == 384 * 672
    assert output["model"]["lora"] == {"r": 32, "lora_alpha": 16.0}  # its default is not r
    assert output["loss"]["mask_loss"] and output["loss"]["foreground_weight"] == 3
    assert "num_epochs" not in output["train"] and named(lines, "train.num_epochs")
    assert output["validation"]["steps"] == 50 and output["validation"]["true_cfg_scale"] == 1
    sample = {"prompt": "snow", "images": ["a.png"], "true_cfg_scale": 2.5}
    assert output["validation"]["samples"] == [sample]


def test_flymyai_values(tmp_path):
    source = {
        "pretrained_model_name_or_path": "Qwen/Qwen-Image-Edit",
        "data_config": {
            **{"img_dir": "./images", "control_dir": "./control", "train_batch_size": 1},
            **{"caption_dropout_rate": 0.1, "caption_type": "txt", "img_size": 1024},
        },
        **{"learning_rate": 2e-4, "rank": 16, "adam8bit": True, "adam_beta1": 0.9},
        **{"max_train_steps": 3000, "lr_warmup_steps": 10, "adam_weight_decay": 0.01},
    }
    output, _ = converted("qwen-image-finetune", tmp_path, source)
    (ds,) = output["data"]["dataset_configs"]
    assert (ds["target_dir"], ds["reference_dirs"]) == ("images", ["control"])
    assert output["optimizer"] == {
        "class_path": "adamw8bit",
        "init_args": {"lr": 2e-4, "weight_decay": 0.01},
    }
    assert output["train"]["max_train_steps"] == 3000
    assert output["data"]["caption_dropout_rate"] == 0.1 and "model" in output


# --- the command ----------------------------------------------------------------------------------


def test_the_command_prints_a_config_that_loads(tmp_path):
    files = [ROOT / "tests/seeds/002_config.jsonc"]
    files += [ROOT / "tests/seeds/002_multidatabackend_edit_v1.jsonc"]
    done = run(TOOL, "simpletuner", *files, cwd=tmp_path)
    (tmp_path / "my.yaml").write_text(done.stdout)
    config = load_config(Config, ["--config", str(tmp_path / "my.yaml")])
    assert config.model_dump(mode="json", exclude_defaults=True) == yaml.safe_load(done.stdout)
    assert config.loss.timestep_shift == 1.73 and config.validation.resolution == 1024
    lines = done.stderr.splitlines()
    assert len(lines) == len(set(lines)) and all(" -> " in line for line in lines)


@pytest.mark.parametrize(
    ("kind", "contents", "words"),
    [
        ("t2itrainer", [None], "No such file"),
        ("t2itrainer", ["{"], "Expecting"),
        ("t2itrainer", ["[]"], "no list dataset_configs"),
        ("t2itrainer", ['{"training_set": []}'], "no list dataset_configs"),
        ("t2itrainer", ['{"dataset_configs": [1]}'], "wanted a data set"),
        ("t2itrainer", ['{"dataset_configs": [{}]}'], "train_data_dir is missing"),
        ("t2itrainer", [{**T2I_BASE, "rank": "many"}], "model.lora.r"),
        ("t2itrainer", [{**T2I_BASE, "freeze_transformer_layers": "5-5"}], "a range goes up"),
        ("t2itrainer", [{**T2I_BASE, "repeats": "x"}], "not shaped like"),
        ("simpletuner", ["{}", "{}"], "list of data sets"),
        ("simpletuner", [{"model_family": "flux"}, ST_DATA], "wanted qwen_image, not flux"),
        ("simpletuner", [{"model_type": "full"}, ST_DATA], "wanted lora, not full"),
        ("simpletuner", [{"model_flavour": "v1.0"}, ST_DATA], "model_flavour: cannot convert"),
        ("simpletuner", [ST_BASE, ST_DATA[:1]], "no data set a; there is: qwen-edit-images"),
        ("simpletuner", [ST_BASE, [{"type": "local"}]], "without an id"),
        ("qwen-image-finetune", ["a: [1"], "expected"),
        ("qwen-image-finetune", ["a: 1"], "no config of qwen-image-finetune"),
        ("qwen-image-finetune", [{**QF_BASE, "trainer": "FluxKontext"}], "not FluxKontext"),
    ],
)
def test_what_cannot_be_converted_says_why(kind, contents, words, tmp_path, monkeypatch, capsys):
    files = [tmp_path / f"{number}.json" for number in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        if content is not None:
            file.write_text(content if isinstance(content, str) else json.dumps(content))
    monkeypatch.setattr(sys, "argv", ["convert_config.py", kind, *map(str, files)])
    with pytest.raises(SystemExit) as stop:
        run_script(tool.main)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and not printed.out and words in printed.err


def test_wrong_arguments_exit_2():
    for arguments in (["simpletuner", "one.json"], ["kohya", "x.json"], []):
        done = run(TOOL, *arguments, check=False)
        assert done.returncode == 2 and "Traceback" not in done.stderr


def test_comments_and_trailing_commas_are_read_and_text_is_left_alone(tmp_path):
    file = tmp_path / "x.jsonc"
    file.write_text('{"a": "http://x, }", /* one\ntwo */ "b": [1, 2,], // three\n"c": "\\"//",}')
    assert tool.read_json(file) == {"a": "http://x, }", "b": [1, 2], "c": '"//'}
