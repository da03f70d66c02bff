"""tools/convert_config.py: configs of three other tools, and that no key of them is lost."""

import copy
import json
import re
import sys

import pytest
import yaml
from conftest import ROOT, run

from train_qwen_edit import Config, DatasetConfig, matches
from utils import UserError, load_config, load_script, run_script, settings

TOOL = ROOT / "tools" / "convert_config.py"
tool = load_script(TOOL)


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
ST_BASE = {"model_flavour": "edit-v2"}
ST_DATA = [
    {"id": "qwen-edit-images", "instance_data_dir": "/images", "conditioning_data": ["a", "b"]},
    {"id": "a", "dataset_type": "conditioning", "instance_data_dir": "/a"},
    {"id": "b", "dataset_type": "conditioning", "instance_data_dir": "/b"},
]
QF_BASE = {"data": {"init_args": {"dataset_path": "photos", "processor": {"init_args": {}}}}}
FLY_BASE = {"data_config": {"img_dir": "after", "control_dir": "before"}}
PROCESSOR = "data.init_args.processor.init_args"

# every key of their trainers, with a value that is neither their default nor ours
T2I_KEYS = """
pretrained_model_name_or_path: models/qwen_image_edit_2511
mixed_precision: fp8
{model_path: x, output_dir: y, logging_dir: logs, save_name: qwen, train_data_dir: others}
{resolution: '768', repeats: 3, train_batch_size: 2, num_train_epochs: 7, seed: 7}
{gradient_accumulation_steps: 4, gradient_checkpointing: true, learning_rate: 3e-4}
{optimizer: prodigy, lr_scheduler: linear, lr_warmup_steps: 9, cosine_restarts: 3}
{rank: 64, use_lokr: true, rank_alpha: 8.0, lokr_factor: 8.0, blocks_to_swap: 20}
{lora_layers: 'attn.to_q, attn.to_k', freeze_transformer_layers: '0-10, 50-58'}
{caption_dropout: 0.3, weighting_scheme: cosmap, logit_mean: 0.5, logit_std: 2.0, mode_scale: 1.0}
{nln_method: default, nln_samples: 5, nln_scale: 0.1, validation_ratio: 0.2, validation_epochs: 2}
{save_model_epochs: 2, save_model_steps: 50, skip_epoch: 1, skip_step: 100, allow_tf32: true}
{resume_from_checkpoint: out/qwen-3-300, report_to: comet_ml, something_new: 1}
# parsed by its trainer, used nowhere
{use_8bit_adam: 1, adam_beta1: 1, adam_beta2: 1, adam_weight_decay: 1, adam_epsilon: 1}
{adam_weight_decay_text_encoder: 1, prodigy_beta3: 1, prodigy_decouple: 1, prodigy_d_coef: 1}
{prodigy_use_bias_correction: 1, prodigy_safeguard_warmup: 1, max_grad_norm: 1, mask_dropout: 1}
{vae_path: 1, use_debias: 1, snr_gamma: 1, max_time_steps: 1, guidance_scale: 1, noise_offset: 1}
{reg_ratio: 1, reg_timestep: 1, use_two_captions: 1, slider_positive_scale: 1}
{slider_negative_scale: 1, recreate_cache: 1, recreate_cache_target: 1}
{recreate_cache_reference: 1, recreate_cache_caption: 1}
"""
T2I_DATA_KEYS = """
{resolution: '768', repeats: 8, recreate_cache: true, recreate_cache_target: true}
{recreate_cache_reference: true, recreate_cache_caption: true, something_new: 1}
{image_configs.T.prefix: mask_, target_configs.T.0.from_image: R, target_configs.T.0.resize: 1024}
{target_configs.T.0.sample_type: from_subdir, reference_configs.R.0.sample_type: from_subdir}
{reference_configs.R.0.resize: 512, reference_configs.R.0.suffix: _style}
{reference_configs.R.0.count: 2, caption_configs.c.ext: .caption, caption_configs.c.instruction: a}
{caption_configs.c.reference_list.resize: 512, caption_configs.c.reference_list.dropout: 0.2}
{caption_configs.c.reference_list.min_length: 2, batch_configs.0.caption_dropout: 0.2}
{batch_configs.0.reference_dropout: 0.2, batch_configs.0.weight: 0.5}
{batch_configs.0.reference_config_extra: {dropout: 0.1, min: 1}}
"""
ST_KEYS = """
{model_flavour: edit-v1, pretrained_model_name_or_path: models/mine, train_batch_size: 2}
{gradient_accumulation_steps: 4, validation_resolution: 768x768, validation_guidance: 3.5}
{validation_guidance_real: 3.0, validation_num_inference_steps: 40, validation_step_interval: 10}
{validation_epoch_interval: 1, validation_seed: 3, validation_negative_prompt: blurry}
{validation_prompt: a cat, validation_prompt_library: true, user_prompt_library: prompts.json}
{validation_input: inputs.json, validation_preview: true, validation_using_datasets: true}
{num_eval_images: 9, eval_dataset_id: qwen-edit-images, eval_steps_interval: 10}
{eval_timesteps: 28, disable_benchmark: true, mixed_precision: fp16, gradient_checkpointing: false}
{gradient_checkpointing_interval: 2, base_model_precision: int8-sdnq, quantize_via: pipeline}
{text_encoder_1_precision: int8-quanto, quantize_activations: true, musubi_blocks_to_swap: 10}
{ramtorch: true, flow_schedule_shift: 1.73, flow_schedule_auto_shift: true}
{flow_sigmoid_scale: 2.0, flow_use_uniform_schedule: true, flow_use_beta_schedule: true}
{loss_type: smooth_l1, huber_c: 0.2, huber_schedule: snr, masked_loss_probability: 0.5}
{data_backend_config: data.json, data_backend_sampling: uniform, caption_dropout_probability: 0.2}
{conditioning_multidataset_sampling: random, resolution: 512, resolution_type: area}
{aspect_bucket_rounding: 3, compress_disk_cache: true, vae_cache_ondemand: true}
{vae_cache_disable: true, vae_cache_clear_each_epoch: true, override_dataset_config: true}
{conditioning_image_embed_batch_size: 4, use_ema: true, ema_decay: 0.9, ema_device: cpu}
{ema_cpu_only: true, ema_update_interval: 10, ema_validation: ema_only, lora_rank: 64}
{lora_alpha: 32, lora_dropout: 0.1, lora_type: lycoris, lora_format: comfyui}
{lycoris_config: lycoris.json, use_dora: true, peft_lora_target_modules: [to_q]}
{init_lora: before.safetensors, optimizer: optimi-lion, optimizer_config: betas=0.9}
{learning_rate: 5e-5, lr_scheduler: sine, lr_warmup_steps: 10, lr_num_cycles: 2, lr_power: 2.0}
{max_grad_norm: 0.01, grad_clip_method: value, max_train_steps: 100, num_train_epochs: 5}
{checkpointing_steps: 50, checkpoint_step_interval: 50, checkpoint_epoch_interval: 1}
{checkpoints_total_limit: 2, checkpointing_rolling_steps: 10, checkpointing_use_tempdir: true}
{delete_invalid_checkpoints: true, resume_from_checkpoint: latest, report_to: swanlab}
{scheduled_sampling_max_step_offset: 5, scheduled_sampling_strategy: biased_early}
{scheduled_sampling_probability: 0.7, scheduled_sampling_prob_start: 0.1}
{scheduled_sampling_prob_end: 0.8, scheduled_sampling_ramp_steps: 100}
{scheduled_sampling_ramp_shape: cosine, scheduled_sampling_sampler: unipc}
{scheduled_sampling_reflexflow: true, tracker_project_name: mine, tracker_run_name: first}
{output_dir: elsewhere, seed: 7, --disable_bucket_pruning: true, something_new: 1}
"""
BACKEND_KEYS = """
{resolution: 768, resolution_type: pixel, repeats: 4, caption_strategy: filename}
{instance_prompt: make it snow, prepend_instance_prompt: true, disable_multiline_split: true}
{caption_shuffle: {enable: true}, crop: true, crop_style: random, crop_aspect: square}
{cache_dir_vae: cache/vae, conditioning_image_embeds: embeds, minimum_image_size: 512}
{maximum_image_size: 2048, target_downsample_size: 1024, probability: 0.5, max_num_samples: 10}
{is_regularisation_data: true, vae_cache_clear_each_epoch: true, disable_validation: true}
{instance_data_dir: /elsewhere, something_new: 1}
"""
QF_KEYS = f"""
{{trainer: QwenImageEditPlus, resume: out/v0/checkpoint-last, mode: fit, something.new: 1}}
{{model.pretrained_model_name_or_path: a/b, model.pretrained_embeddings: {{text_encoder: x}}}}
{{model.quantize: true, model.use_vlm_prompt_enhancer: true, model.rank: 32, model.lora.r: 8}}
{{model.lora.lora_alpha: 32, model.lora.init_lora_weights: normal, model.lora.adapter_name: a}}
{{model.lora.target_modules: [to_k], model.lora.pretrained_weight: before.safetensors}}
{{data.class_path: x, data.batch_size: 2, data.num_workers: 5, data.shuffle: false}}
{{data.init_args.dataset_path: [one.csv, {{repo_id: a/b, split: test}}]}}
{{data.init_args.image_size: [832, 576], data.init_args.caption_dropout_rate: 0.1}}
{{data.init_args.cache_drop_rate: 0.2, data.init_args.prompt_image_dropout_rate: 0.1}}
{{data.init_args.cache_dir: x, data.init_args.use_cache: true, data.init_args.use_edit_mask: true}}
{{data.init_args.prompt_empty_drop_keys: [a], data.init_args.selected_control_indexes: [2]}}
{{data.init_args.processor.class_path: x, {PROCESSOR}.process_type: center_padding}}
{{{PROCESSOR}.resize_mode: lanczos, {PROCESSOR}.target_size: [832, 576]}}
{{{PROCESSOR}.controls_size: [[512, 512]], {PROCESSOR}.target_pixels: 512*512}}
{{{PROCESSOR}.controls_pixels: [256*256], {PROCESSOR}.multi_resolutions: [512*512, 768*768]}}
{{{PROCESSOR}.max_aspect_ratio: 2.0, {PROCESSOR}.resize_controls_mask_to_image: true}}
{{logging.output_dir: elsewhere, logging.logging_dir: logs, logging.report_to: swanlab}}
{{logging.tracker_project_name: mine, logging.tags: [a], logging.notes: b}}
{{optimizer.class_path: bitsandbytes.optim.Adam8bit, optimizer.init_args: {{lr: 2e-4}}}}
{{lr_scheduler.scheduler_type: cosine, lr_scheduler.warmup_steps: 10, lr_scheduler.num_cycles: 1}}
{{lr_scheduler.power: 2.0, train.train_batch_size: 2, train.gradient_accumulation_steps: 2}}
{{train.max_train_steps: 10000, train.num_epochs: 3, train.checkpointing_steps: 250}}
{{train.checkpoints_total_limit: 10, train.max_grad_norm: 2.0, train.mixed_precision: fp16}}
{{train.gradient_checkpointing: false, train.low_memory: true, train.fit_device: {{dit: 'cuda:1'}}}}
{{cache.vae_encoder_device: 'cuda:1', cache.text_encoder_device: 'cuda:2', cache.use_cache: false}}
{{cache.devices.vae: 'cuda:1', cache.devices.text_encoder: 'cuda:2', cache.cache_dir: elsewhere}}
{{cache.devices.text_encoder_2: 'cuda:2', cache.prompt_empty_drop_keys: [a]}}
{{predict.devices.vae: 'cuda:5', predict.devices.text_encoder: 'cuda:6'}}
{{predict.devices.dit: 'cuda:7', predict.devices.transformer: 'cuda:7'}}
{{predict.devices.prompt_enhancer: 'cuda:7', loss.mask_loss: true, loss.forground_weight: 3.0}}
{{loss.background_weight: 0.5, loss.class_path: qflux.losses.MaskEditLoss}}
{{loss.init_args.forground_weight: 4.0, validation.enabled: true, validation.steps: 50}}
{{validation.max_samples: 2, validation.seed: 3, validation.dataset.class_path: x}}
{{validation.dataset.init_args.dataset_path: held_out}}
{{validation.samples: [{{prompt: x, images: [a.png], controls_size: [[1, 1]]}}]}}
"""
FLY_KEYS = """
{pretrained_model_name_or_path: Qwen/Qwen-Image-Edit, data_config.train_batch_size: 2}
{data_config.num_workers: 4, data_config.img_size: 1024, data_config.caption_dropout_rate: 0.1}
{data_config.img_dir: targets, data_config.control_dir: controls, data_config.random_ratio: true}
{data_config.caption_type: caption, report_to: wandb, train_batch_size: 1, output_dir: elsewhere}
{logging_dir: logs, tracker_project_name: mine, max_train_steps: 3000, num_train_epochs: 2}
{learning_rate: 2e-4, lr_scheduler: cosine_with_restarts, lr_warmup_steps: 10, adam_beta1: 0.8}
{adam_beta2: 0.9, adam_weight_decay: 0.1, adam_epsilon: 1.0e-6, max_grad_norm: 2.0}
{mixed_precision: fp16, checkpointing_steps: 250, checkpoints_total_limit: 10, rank: 32}
{resume_from_checkpoint: latest, gradient_accumulation_steps: 4, quantize: true, adam8bit: true}
{precompute_text_embeddings: true, precompute_image_embeddings: true, save_cache_on_disk: false}
{use_8bit_adam: true, freeze_text_encoder: true, something_new: 1}
"""


def with_key(base, key, value):
    """A copy of a nested config with one dotted key set."""
    place = whole = copy.deepcopy(base)
    *parents, last = key.split(".")
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
    place[last] = value
    return whole


@pytest.mark.parametrize(
    ("kind", "sources", "keys", "place", "said"),
    [
        ("t2itrainer", [T2I_BASE], T2I_KEYS, "", ""),
        ("t2itrainer", [T2I_BASE], T2I_DATA_KEYS, "dataset_configs.0.", ""),
        ("simpletuner", [ST_BASE, ST_DATA], ST_KEYS, "", ""),
        ("simpletuner", [ST_BASE, ST_DATA], BACKEND_KEYS, "0.", "qwen-edit-images."),
        ("simpletuner", [ST_BASE, ST_DATA], BACKEND_KEYS, "1.", "a."),
        ("qwen-image-finetune", [QF_BASE], QF_KEYS, "", ""),
        ("qwen-image-finetune", [FLY_BASE], FLY_KEYS, "", ""),
    ],
)
def test_every_key_is_in_the_output_or_named(kind, sources, keys, place, said, tmp_path):
    before, _ = converted(kind, tmp_path, *sources)
    lost = []
    for line in filter(None, keys.splitlines()):
        for key, value in (yaml.safe_load(line) or {}).items():
            which = 1 if place in ("0.", "1.") else 0
            changed = list(sources)
            changed[which] = with_key(sources[which], f"{place}{key}", value)
            output, lines = converted(kind, tmp_path, *changed)
            if output == before and not named(lines, f"{said}{key.lstrip('-')}"):
                lost.append(key)
    assert not lost


def test_every_rule_leads_to_a_setting():
    known = {path for path, _ in settings(Config)} | {"optimizer"}
    backend = set(DatasetConfig.model_fields)
    for kind, table in tool.tables().items():
        for path in [rule.to for rule in table.get("keys", {}).values() if rule.to]:
            path = re.sub(r"^optimizer\.init_args\..*", "optimizer.init_args", path)
            path = re.sub(r"\.0\.", ".*.", path).removesuffix(".0")
            assert path in known, f"{kind}: {path}"
        assert {rule.to for rule in table.get("backend_keys", {}).values()} <= backend | {""}


# --- what values become ---------------------------------------------------------------------------


def test_t2itrainer_values(tmp_path):
    """The values its samples and its document use, and what changes on the way."""
    source = yaml.safe_load("""
        {resolution: '768', repeats: 2, rank: 32, learning_rate: 0.0002, lr_scheduler: constant,
        lr_warmup_steps: 0, num_train_epochs: 10, freeze_transformer_layers: '0-10, 50-58',
        logit_mean: 0.5, validation_ratio: 0.2, save_model_steps: 100,
        gradient_checkpointing: true}
    """)
    source["dataset_configs"] = [{**T2I_BASE["dataset_configs"][0], "repeats": "8"}]
    output, _ = converted("t2itrainer", tmp_path, source)
    data = output["data"]["dataset_configs"][0]
    assert data["resolution"] == 768 and data["repeats"] == 16
    assert data["holdout_ratio"] == 0.2 and output["validation"] == {"steps": 100}
    assert output["data"]["caption_dropout_rate"] == 0.1  # not in the file: its own default
    assert output["data"]["caption_dropout_mode"] == "zero"
    assert output["data"]["reference_area"] == "target"
    pattern = output["model"]["lora"].pop("target_modules")
    assert output["model"]["lora"] == {"r": 32} and len(tool.T2I_LAYERS) == 10
    blocks = {n for n in range(60) if matches(f"transformer_blocks.{n}.attn.to_q", pattern)}
    assert blocks == set(range(11, 50))  # its trainer freezes block 59, always
    assert all(matches(f"transformer_blocks.20.{n}", pattern) for n in tool.T2I_LAYERS)
    assert not matches("transformer_blocks.20.img_mod.1", pattern)
    steps = {"max_train_steps": 1_000_000, "num_epochs": 10, "checkpointing_steps": 100}
    assert output["train"] == steps
    arguments = {"betas": [0.9, 0.99], "lr": 2e-4}
    optimizer = {"class_path": "bitsandbytes.optim.AdamW8bit", "init_args": arguments}
    assert output["optimizer"] == optimizer
    assert output["loss"] == {"timestep_shift": 1.0, "logit_mean": -0.5}
    assert "lr_scheduler" not in output  # constant without warm-up is our default


def test_t2itrainer_lokr_prodigy_and_ambiguous_words(tmp_path):
    source = copy.deepcopy(T2I_BASE) | {
        **{"use_lokr": True, "rank_alpha": 2.0, "lokr_factor": 8.0, "optimizer": "prodigy"},
        **{"learning_rate": 1.0, "lora_layers": "to_q, to_k", "weighting_scheme": "sigma_sqrt"},
    }
    ds = source["dataset_configs"][0]
    ds["target_configs"]["T"][0]["from_image"] = "R"
    ds["caption_configs"]["c"]["reference_list"] |= {"dropout": 0.1, "min_length": 1}
    ds["caption_configs"]["plain"] = {"image": "T"}
    output, lines = converted("t2itrainer", tmp_path, source)
    lora = output["model"]["lora"]
    assert lora["method"] == "lokr" and lora["lora_alpha"] == 2 and lora["lokr_factor"] == 8
    layers = [f"transformer_blocks.{n}.attn.{end}" for n in (0, 59) for end in ("to_q", "to_v")]
    assert [n for n in layers if matches(n, lora["target_modules"])] == layers[:1]
    assert output["optimizer"]["init_args"]["d_coef"] == 2
    assert output["loss"]["timestep_density"] == "uniform"
    target = output["data"]["dataset_configs"][0]["target_configs"]["T"]
    assert target == [{"image": "T", "from_image": "R"}]
    for key in ("from_image", "dropout", "min_length", "caption_configs.plain"):
        assert named(lines, key), key


@pytest.mark.parametrize(
    ("kind", "base", "key"),
    [("t2itrainer", [T2I_BASE], "cosine_restarts"), ("simpletuner", [ST_BASE], "lr_num_cycles")],
)
def test_restarts_bend_no_other_schedule(kind, base, key, tmp_path):
    """A cosine of one cycle would end where it began."""
    more = [ST_DATA] if kind == "simpletuner" else []
    for schedule, cycles in (("cosine", None), ("cosine_with_restarts", 3)):
        source = {**base[0], "lr_scheduler": schedule, key: 3}
        output, lines = converted(kind, tmp_path, source, *more)
        assert output["lr_scheduler"].get("num_cycles") == cycles
        assert bool(named(lines, key)) == (cycles is None)


@pytest.mark.parametrize(
    ("key", "value", "resolution", "area"),
    [
        ("target_size", [832, 576], 704, None),
        ("target_pixels", "512*512", 512, None),
        ("multi_resolutions", [262144, 589824], 512, None),
        ("multi_resolutions", {"target": ["768*768"], "controls": [["512*512"]]}, 768, 512 * 512),
        ("controls_size", [[384, 672], [512, 512]], 1024, 384 * 672),
        ("controls_pixels", [262144, 262144], 1024, 262144),
    ],
)
def test_sizes_of_qwen_image_finetune(key, value, resolution, area, tmp_path):
    source = with_key(QF_BASE, f"{PROCESSOR}.{key}", value)
    output, lines = converted("qwen-image-finetune", tmp_path, source)
    (ds,) = output["data"]["dataset_configs"]
    assert ds.get("resolution", 1024) == resolution and named(lines, key)
    assert output["data"]["reference_area"] == (area or "target")


def test_simpletuner_values(tmp_path):
    source = yaml.safe_load("""
        {model_flavour: edit-v3, learning_rate: '1e-4', lora_rank: 32, lora_alpha: 32,
        flow_schedule_shift: 0, flow_schedule_auto_shift: true, use_ema: true,
        validation_resolution: '1024x512,768', validation_guidance: 3.5,
        validation_step_interval: 100, base_model_precision: nf4-bnb, optimizer: prodigy,
        model_kwargs: {match_target_res: true, other: 1}, eval_dataset_id: val}
    """)
    data = yaml.safe_load("""
        - {id: train, instance_data_dir: /images, conditioning_data: a, resolution: 0.5,
           resolution_type: area, repeats: 2, caption_strategy: instanceprompt,
           instance_prompt: [make it snow, snow]}
        - {id: a, dataset_type: conditioning, instance_data_dir: /a,
           conditioning_type: reference_loose}
        - {id: m, dataset_type: conditioning, instance_data_dir: /masks, conditioning_type: mask,
           source_dataset_id: train}
        - {id: val, instance_data_dir: /val, conditioning_data: [va]}
        - {id: va, dataset_type: conditioning, instance_data_dir: /va}
        - {id: held, dataset_type: eval, instance_data_dir: /held, conditioning_data: [va]}
        - {id: text, dataset_type: text_embeds, cache_dir: cache/text}
        - {id: hub, type: huggingface, instance_data_dir: /hub}
        - {id: idle, disabled: true, instance_data_dir: /idle}
    """)
    output, lines = converted("simpletuner", tmp_path, source, data)
    assert output["data"].pop("dataset_configs") == [
        {
            **{"id": "train", "target_dir": "/images", "reference_dirs": ["/a"]},
            **{"mask_dir": "/masks", "conditioning_type": "reference_loose", "repeats": 3},
            **{"resolution": 768, "caption": "make it snow"},
        },
        {"id": "val", "target_dir": "/val", "reference_dirs": ["/va"]},
        {"id": "held", "target_dir": "/held", "reference_dirs": ["/va"]},
    ]
    assert output["data"] == {"reference_area": "target"}
    # alpha = rank is the default here too
    assert output["model"] == {"base_model_precision": "nf4-bnb", "lora": {"r": 32}}
    assert output["train"]["use_ema"]
    loss = output["loss"]
    assert loss.get("timestep_density", "logit_normal") == "logit_normal"
    assert "timestep_shift" not in loss  # the model's
    assert loss["mask"] == "file" and loss["background_weight"] == 0
    assert output["validation"] == {
        **{"steps": 100, "eval_dataset_id": ["val", "held"], "resolution": 724},
        **{"num_inference_steps": 30, "true_cfg_scale": 3.5},
    }
    assert output["optimizer"]["class_path"] == "prodigyopt.Prodigy"
    assert output["optimizer"]["init_args"]["lr"] == 1e-4
    assert all(named(lines, key) for key in ("model_kwargs.other", "text", "hub", "idle", "held"))


def test_simpletuner_flavours_and_optimizers(tmp_path):
    flavours = {"edit-v1": "", "edit-v2": "-2509", "edit-v2+": "-2509", "edit-v3": "-2511"}
    for flavour, end in flavours.items():
        output, _ = converted("simpletuner", tmp_path, {"model_flavour": flavour}, ST_DATA)
        name = output.get("model", {}).get("pretrained_model_name_or_path")
        assert name == (f"Qwen/Qwen-Image-Edit{end}" if end != "-2511" else None)  # our default
    optimizers = {"bnb-adamw8bit": "bitsandbytes.optim.AdamW8bit", "adafactor": "Adafactor"}
    for name, path in optimizers.items():
        output, _ = converted("simpletuner", tmp_path, {**ST_BASE, "optimizer": name}, ST_DATA)
        assert output["optimizer"]["class_path"].endswith(path)


def test_qwen_image_finetune_first_generation(tmp_path):
    """As its example has it: sizes stretched there, everything else as written."""
    (tmp_path / "photos" / "images").mkdir(parents=True)
    (tmp_path / "photos" / "control").mkdir()
    source = f"""
model: {{pretrained_model_name_or_path: Qwen/Qwen-Image-Edit, rank: 32, quantize: true}}
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
train: {{max_train_steps: 3000, num_epochs: 3, checkpointing_steps: 250, mixed_precision: no}}
cache:
  vae_encoder_device: cuda:1
  cache_dir: ${{logging.output_dir}}
logging: {{output_dir: /runs/one}}
predict: {{devices: {{vae: "cuda:5", text_encoder: "cuda:6", transformer: "cuda:7"}}}}
"""
    output, _ = converted("qwen-image-finetune", tmp_path, source)
    folders = {"target_dir": "images", "reference_dirs": ["control"]}
    assert output["data"]["dataset_configs"] == [
        {
            **{"train_data_dir": f"{tmp_path}/photos", "resolution": 704},  # 832 x 576 px
            **{"on_missing": "skip", "caption_lines": False, **folders},
        }
    ]
    assert output["model"]["lora"] == {"r": 32}
    assert output["model"]["base_model_precision"] == "fp8-quanto"
    assert output["optimizer"]["init_args"] == {"lr": 2e-4, "betas": [0.9, 0.99]}
    assert output["train"] == {
        **{"max_train_steps": 3000, "num_epochs": 3, "gradient_accumulation_steps": 4},
        **{"checkpointing_steps": 250, "mixed_precision": "no"},
    }
    assert output["cache"] == {"cache_dir": "/runs/one", "vae_encoder_device": "cuda:1"}
    assert output["predict"]["devices"]["transformer"] == "cuda:7"
    assert output["loss"] == {"timestep_density": "uniform", "timestep_shift": 1.0}
    assert "reference_area" not in output["data"]  # 1 MP, as there


def test_qwen_image_finetune_second_generation(tmp_path):
    """What the trainer does not read itself becomes a table; its command is said, and runs."""
    for name in ("images/a.png", "control/a.png", "control/a_control_1.png"):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).touch()
    (tmp_path / "p/images/a.txt").write_text("snow")
    source = yaml.safe_load(f"""
        trainer: QwenImageEditPlus
        model: {{lora: {{r: 32}}}}
        data:
          init_args:
            dataset_path: [train.csv, Owner/face, {{repo_id: a/b, split: x}}, {tmp_path}/p]
            selected_control_indexes: [1]
            processor: {{init_args: {{target_size: [832, 576], controls_size: [[384, 672]]}}}}
        loss: {{class_path: qflux.losses.MaskEditLoss, init_args: {{forground_weight: 3}}}}
        train: {{num_epochs: 3}}
        validation:
          enabled: true
          steps: 50
          samples: [{{prompt: snow, images: [a.png], guidance_scale: 2.5}}]
    """)
    output, lines = converted("qwen-image-finetune", tmp_path, source)
    tables = [f"{name}_pairs.jsonl" for name in ("train", "face", "b", "p")]
    assert output["data"]["dataset_configs"] == [{"table": t, "resolution": 704} for t in tables]
    commands = [line.partition("python ")[2].split() for line in lines if "pair_table.py" in line]
    sources = ["--table train.csv", "--hf_dataset Owner/face", "--hf_dataset a/b --hf_split x"]
    for command, flags in zip(commands, sources, strict=False):
        assert " ".join(command[1:]).startswith(f"{flags} --selected_control_indexes 1 2 ")
    run(ROOT / commands[3][0], *commands[3][1:], cwd=tmp_path)
    [pair] = map(json.loads, (tmp_path / tables[3]).read_text().splitlines())
    assert len(pair["references"]) == 2 and pair["prompt"] == "snow"
    assert output["data"]["reference_area"] == 384 * 672
    assert output["model"]["lora"] == {"r": 32, "lora_alpha": 16.0}  # its default is not r
    assert output["loss"]["mask"] == "file" and output["loss"]["foreground_weight"] == 3
    assert "num_epochs" not in output["train"] and named(lines, "train.num_epochs")
    assert output["validation"]["steps"] == 50 and output["validation"]["true_cfg_scale"] == 1
    assert output["validation"]["samples"] == [{"prompt": "snow", "images": ["a.png"]}]
    assert named(lines, "guidance_scale")


def test_flymyai_values(tmp_path):
    source = yaml.safe_load("""
        {pretrained_model_name_or_path: Qwen/Qwen-Image-Edit, learning_rate: 0.0002, rank: 16,
        data_config: {img_dir: ./images, control_dir: ./control, train_batch_size: 1,
        caption_dropout_rate: 0.1, caption_type: txt, img_size: 1024}, adam8bit: true,
        adam_beta1: 0.9, max_train_steps: 3000, lr_warmup_steps: 10, adam_weight_decay: 0.01}
    """)
    output, _ = converted("qwen-image-finetune", tmp_path, source)
    (ds,) = output["data"]["dataset_configs"]
    assert ds["target_dir"] == "images" and ds["reference_dirs"] == ["control"]
    assert ds["on_missing"] == "skip" and ds["caption_lines"] is False
    arguments = {"lr": 2e-4, "weight_decay": 0.01, "betas": [0.9, 0.999]}
    optimizer = {"class_path": "bitsandbytes.optim.AdamW8bit", "init_args": arguments}
    assert output["optimizer"] == optimizer and output["train"]["max_train_steps"] == 3000
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
        ("t2itrainer", [None], "0.json"),
        ("t2itrainer", ["{"], "0.json"),
        ("t2itrainer", ["[]"], "dataset_configs"),
        ("t2itrainer", ['{"dataset_configs": [1]}'], "dataset_configs.0"),
        ("t2itrainer", ['{"dataset_configs": [{}]}'], "dataset_configs.0.train_data_dir"),
        ("t2itrainer", [{**T2I_BASE, "rank": "many"}], "model.lora.r"),
        ("t2itrainer", [{**T2I_BASE, "freeze_transformer_layers": "five"}], "five"),
        ("t2itrainer", [{**T2I_BASE, "repeats": "x"}], "0.json"),
        ("simpletuner", ["{}", "{}"], "data sets"),
        ("simpletuner", [{"model_family": "flux"}, ST_DATA], "model_family"),
        ("simpletuner", [{"model_type": "full"}, ST_DATA], "model_type"),
        ("simpletuner", [{"model_flavour": "v1.0"}, ST_DATA], "model_flavour"),
        ("simpletuner", [ST_BASE, ST_DATA[:1]], "qwen-edit-images"),
        ("simpletuner", [ST_BASE, [{"type": "local"}]], "id"),
        ("qwen-image-finetune", ["a: [1"], "0.json"),
        ("qwen-image-finetune", ["a: 1"], "qwen-image-finetune"),
        ("qwen-image-finetune", [{**QF_BASE, "trainer": "FluxKontext"}], "FluxKontext"),
        ("simpletuner", [ST_BASE], "usage"),
        ("kohya", [ST_BASE], "usage"),
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


def test_comments_and_trailing_commas_are_read_and_text_is_left_alone(tmp_path):
    file = tmp_path / "x.jsonc"
    file.write_text('{"a": "http://x, }", /* one\ntwo */ "b": [1, 2,], // three\n"c": "\\"//",}')
    assert tool.read_json(file) == {"a": "http://x, }", "b": [1, 2], "c": '"//'}


@pytest.mark.parametrize("text", ["model: []\ndata: {}", "data: 3", "model: {lora: []}\ndata: {}"])
def test_a_section_that_is_none_is_an_error(text, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=r"(model|data|model\.lora): wanted a section"):
        tool.convert("qwen-image-finetune", [tmp_path / "a.yaml"], lambda key, text: None)
