"""Turn a config of T2ITrainer, SimpleTuner or qwen-image-finetune into one of train_qwen_edit.py.

Page: docs/convert_config.md

    python tools/convert_config.py t2itrainer config.json > my.yaml
    python tools/convert_config.py simpletuner config.json multidatabackend.json > my.yaml
    python tools/convert_config.py qwen-image-finetune config.yaml > my.yaml    # FlyMyAI's too

The config goes to stdout: only what differs from our defaults, checked by train_qwen_edit.Config.
Every key that changes its meaning or has no counterpart gets a line on stderr:
"key: what it meant there -> what happens here". Nothing is dropped without one.

Which key goes where stands in convert_config.yaml; here is what a table cannot say.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_qwen_edit import SIZE_MULTIPLE, Config, DatasetConfig, ValidationSample, parse_blocks
from utils import Section, UserError, load_config, parse_args, run_script, settings

Settings = dict[str, Any]
Say = Callable[[str, str], None]  # say(key, "what it meant there -> what happens here")
UNKNOWN = "no counterpart -> nothing happens here"


# --- 1. values ------------------------------------------------------------------------------------

T2I_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]
T2I_LAYERS = [f"attn.{n}" for n in (*T2I_LAYERS, "to_add_out")] + ["img_mlp.net.2", "txt_mlp.net.2"]
MEGAPIXEL_SIDES = {0.25: 512, 0.5: 768, 1.0: 1024, 2.0: 1536, 4.0: 2048}  # SimpleTuner's "area"


def side_px(size: Any, kind: str) -> float:
    """Side of the square of the same area, px; `kind` "area" counts megapixels."""
    size = float(size)
    return MEGAPIXEL_SIDES.get(size, 1024 * math.sqrt(size)) if kind == "area" else size


def first_side_px(sizes: Any) -> int:
    """ "1024x768,512" or megapixels -> side of the square with the first one's area, px."""
    sides = [float(side) for side in str(sizes).split(",")[0].split("x")]
    if len(sides) == 1:
        sides = [side_px(sides[0], "area" if sides[0] < 16 else "")]
    return round(math.sqrt(sides[0] * sides[-1]))


def area_px(size: Any) -> int:
    """[H, W], "H*W", a number, or a list of one of them -> the (first one's) pixels."""
    if isinstance(size, list) and not (len(size) == 2 and all(isinstance(n, int) for n in size)):
        return area_px(size[0])
    return math.prod(
        int(side) for side in (size if isinstance(size, list) else str(size).split("*"))
    )


def resolution_of(side: float) -> int:
    """The nearest resolution that a data set takes, px."""
    return max(64, SIZE_MULTIPLE * round(side / SIZE_MULTIPLE))


def layers(names: str) -> list[str]:
    """T2ITrainer's lora_layers: a comma list, or all of its ten."""
    return T2I_LAYERS if names in ("", "all") else re.split(r"\s*,\s*", names.strip())


CHANGES: dict[str, Callable[[Any], Any]] = {
    "": lambda value: value,
    "number": float,
    "whole": int,
    "negated": lambda number: -number,
    "one_more": lambda number: int(number) + 1,
    "listed": lambda names: [names] if isinstance(names, str) else names,
    "layers": layers,
    "blocks": lambda text: text if 59 in parse_blocks(text) else f"{text}, 59".lstrip(", "),
    "first_side_px": first_side_px,
    "area_px": area_px,
}


# --- 2. tables: their key -> our setting ----------------------------------------------------------


class Rule(Section):
    """Where a key goes."""

    to: str = ""
    """Our setting, dotted; "": none."""
    note: str = ""
    """What changes; "": nothing."""
    values: dict[Any, Any] = {}
    """{theirs: ours}; "*" takes the values that are not named, and says so."""
    change: str = ""
    """A name of CHANGES, for what `values` cannot list."""


def read_yaml(path: Path) -> Any:
    """Any YAML file of `name: value` pairs. Raises UserError."""
    data, _, problems = parse_args(["--config", str(path)], set())
    if problems:
        raise UserError(problems[0].removeprefix("--config "))
    return data


@functools.cache
def tables() -> dict[str, dict[str, Any]]:
    """convert_config.yaml: {tool: {"defaults": ..., "keys": {key: Rule}}}."""
    found = read_yaml(Path(__file__).with_suffix(".yaml"))
    for tool in found.values():
        for part in [name for name in tool if name.endswith("keys")]:
            tool[part] = {
                key: Rule.model_validate({"to": rule} if isinstance(rule, str) else rule)
                for keys, rule in tool[part].items()
                for key in keys.split()
            }
    return found


def put(ours: Settings, path: str, value: Any) -> None:
    """Set a dotted path."""
    *parents, last = path.split(".")
    for part in parents:
        ours = ours.setdefault(part, {})
    ours[last] = value


def converted(key: str, value: Any, rule: Rule, say: Say) -> Any:
    """The value as ours. Raises UserError where it cannot be read."""
    try:
        if not rule.values:
            return CHANGES[rule.change](value)
        if value not in rule.values and "*" in rule.values:
            say(key, f"{value} has no counterpart -> {rule.values['*']}")
            value = "*"
        return copy.deepcopy(rule.values[value])
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(f"{key}: cannot convert {value!r} ({error})") from error


def follow(
    table: dict[str, Rule], source: Settings, ours: Settings, say: Say, where: str = ""
) -> None:
    """Carry `source` over, in the table's order; what the table does not know is named."""
    for key in [key for key in table if source.get(key) not in (None, "")]:
        rule, value = table[key], source[key]
        if rule.note:
            say(where + key, rule.note)
        if rule.to:
            put(ours, rule.to, converted(where + key, value, rule, say))
    for key in source.keys() - table.keys():
        say(where + key, UNKNOWN)


def with_defaults(source: Settings, tool: str, say: Say) -> Settings:
    """What a file leaves out means what it means there."""
    defaults = tables()[tool]["defaults"]
    missing = {k: value for k, value in defaults.items() if source.get(k) in (None, "")}
    if missing:
        text = ", ".join(f"{key} {value}" for key, value in missing.items())
        say("not in the file", f"its own defaults -> the same: {text}")
    return source | missing


def only_known(value: Any, kind: Any, where: str, say: Say) -> Any:
    """`value` without the keys that our config class lacks, at any depth; they are named."""
    if isinstance(kind, type) and issubclass(kind, Section) and isinstance(value, dict):
        fields = kind.model_fields
        for key in value.keys() - fields.keys():
            say(f"{where}.{key}", UNKNOWN)
        known = {key: fields[key].annotation for key in value if key in fields}
        return {k: only_known(value[k], kind, f"{where}.{k}", say) for k, kind in known.items()}
    inner = [arg for arg in get_args(kind) if arg is not type(None)][-1:]
    if inner and isinstance(value, list):
        return [only_known(v, inner[0], f"{where}.{i}", say) for i, v in enumerate(value)]
    if get_origin(kind) is dict and isinstance(value, dict):
        return {k: only_known(v, inner[0], f"{where}.{k}", say) for k, v in value.items()}
    return only_known(value, inner[0], where, say) if inner else value


# --- 3. T2ITrainer (train_qwen_image_edit_new.py) -------------------------------------------------


def from_t2itrainer(source: Any, say: Say) -> Settings:
    """config.json -> our settings. Raises UserError where it is none."""
    if not isinstance(source, dict) or not isinstance(source.get("dataset_configs"), list):
        raise UserError("no config of T2ITrainer: it has no list dataset_configs")
    for key in [key for key in ("train_data_dir", "resolution") if source.get(key)]:
        say(key, "for data sets that do not say it -> written into each")
    source = with_defaults(source, "t2itrainer", say)
    ours: Settings = {
        "data": {"caption_dropout_mode": "zero", "reference_area": "target"},
        "loss": {"timestep_shift": 1},
        "train": {"max_train_steps": 1_000_000},  # num_epochs ends the run
    }
    say("dataset_configs", "one of its shapes, often not the nearest -> the nearest (table)")
    say("dataset_configs", "references as large as resolution -> reference_area: target")
    shared = {key: source.pop(key, None) for key in ("train_data_dir", "resolution", "repeats")}
    if shared["repeats"]:
        say("repeats", "all data sets once more -> a factor of each one's repeats")
    held_out, every = source.pop("validation_ratio"), int(source.pop("save_model_steps", None) or 0)
    ours["data"]["dataset_configs"] = [
        {**t2i_data_set(ds, shared, f"dataset_configs.{i}", say), "holdout_ratio": held_out}
        for i, ds in enumerate(source.pop("dataset_configs"))
    ]
    if every > 0:
        put(ours, "train.checkpointing_steps", every)
    if held_out:
        put(ours, "validation.steps", every if every > 0 else 500)
    if source.get("use_lokr") and "rank_alpha" in source:
        put(ours, "model.lora.lora_alpha", source.pop("rank_alpha"))
    follow(tables()["t2itrainer"]["keys"], source, ours, say)
    return ours


def t2i_data_set(ds: Any, shared: Settings, where: str, say: Say) -> Settings:
    """One of dataset_configs: the same grammar; what stands at the top fills its gaps."""
    if not isinstance(ds, dict):
        raise UserError(f"{where}: wanted a data set, got {ds!r}")
    ds = only_known(ds, DatasetConfig, where, say)
    folder = ds.get("train_data_dir") or shared["train_data_dir"]
    if not folder:
        raise UserError(f"{where}.train_data_dir is missing")
    return ds | {
        "train_data_dir": folder,
        "resolution": ds.get("resolution") or shared["resolution"],
        "repeats": int(ds.get("repeats") or 1) * int(shared["repeats"] or 1),
        "buckets": "table",
    }


def t2i_remarks(config: Config, say: Say) -> None:
    """What changes its meaning inside the data sets."""
    for ds in config.data.dataset_configs:
        if any(item.from_image for items in ds.target_configs.values() for item in items):
            say(
                "from_image",
                "since 2026-01-24 the target itself, before that noised in its place -> noised in "
                "its place, as its manual says; from_image_mode: replace for the other",
            )
        for name, caption in ds.caption_configs.items():
            shown = caption.reference_list
            if shown is None:
                say(f"caption_configs.{name}", "text alone -> text with the batch's references")
            elif shown.dropout:
                say(f"{name}.reference_list.dropout", "drawn once -> at every visit")
                say(f"{name}.reference_list.min_length", "one more than it says -> as it says")


# --- 4. SimpleTuner -------------------------------------------------------------------------------


def from_simpletuner(source: Any, backends: Any, say: Say) -> Settings:
    """config.json and multidatabackend.json -> our settings. Raises UserError."""
    if not isinstance(source, dict) or not isinstance(backends, list):
        raise UserError("wanted SimpleTuner's config.json and its list of data sets")
    source = {key.lstrip("-"): value for key, value in source.items()}
    for key, wanted in (("model_family", "qwen_image"), ("model_type", "lora")):
        if (given := source.pop(key, wanted)) != wanted:
            raise UserError(f"{key}: wanted {wanted}, not {given}")
    source = with_defaults(source, "simpletuner", say)
    if "learning_rate" not in source:
        say("learning_rate", "4e-7 by default, too little to learn from -> 1e-4")
    if "caption_dropout_probability" not in source:
        say("caption_dropout_probability", "0.1 by default, its guide advises 0 -> 0")
    ours: Settings = {"loss": st_noise(source, say)}
    options = source.pop("model_kwargs", {})
    if options.pop("match_target_res", False):
        put(ours, "data.reference_area", "target")
    for key in options:
        say(f"model_kwargs.{key}", UNKNOWN)
    if source.get("use_ema"):
        source.setdefault("ema_device", "cpu")
    put(ours, "data.dataset_configs", st_data_sets(backends, source, ours, say))
    follow(tables()["simpletuner"]["keys"], source, ours, say)
    validation = ours.get("validation", {})
    if not validation.get("eval_dataset_id") and validation.pop("steps", None):
        say("validation_step_interval", "edits of training samples -> none: nothing is held out")
    return ours


def st_noise(source: Settings, say: Say) -> Settings:
    """Noise levels and scheduled sampling."""
    uniform = source.pop("flow_use_uniform_schedule", False)
    by_size = source.pop("flow_schedule_auto_shift", False)
    shift = float(source.pop("flow_schedule_shift") or 0)
    if by_size:
        say("flow_schedule_auto_shift", "if flow_schedule_shift is 0 -> timestep_shift: model")
    loss = {
        "timestep_density": "uniform" if uniform else "sigmoid",
        "timestep_shift": shift or ("model" if by_size else 1),
    }
    rollout = {"rollout_span": 1e-3, "rollout_target": "plain"}
    return loss | (rollout if source.get("scheduled_sampling_max_step_offset") else {})


def st_data_sets(backends: list[Any], top: Settings, ours: Settings, say: Say) -> list[Settings]:
    """Every data set of pictures, with the conditioning ones that belong to it."""
    if wrong := [b for b in backends if not isinstance(b, dict) or "id" not in b]:
        raise UserError(f"a data set without an id: {wrong[0]!r}")
    by_id: dict[str, Settings] = {b["id"]: dict(b) for b in backends}
    links: dict[str, list[str]] = {name: [] for name in by_id}
    for name, b in by_id.items():
        links[name] += CHANGES["listed"](b.pop("conditioning_data", []))
        if owner := b.pop("source_dataset_id", None):
            links.setdefault(owner, []).append(name)
    linked = {name for names in links.values() for name in names}
    if unknown := sorted((linked | links.keys()) - by_id.keys()):
        raise UserError(f"no data set {unknown[0]}; there is: {', '.join(by_id)}")
    data_sets = []
    for name, b in by_id.items():
        kind, place = b.pop("dataset_type", "image"), b.pop("type", "local")
        if b.pop("disabled", False) or place != "local":
            say(name, f"disabled, or of type {place} -> left out")
        elif kind in ("image", "eval"):
            conditions = {n: dict(by_id[n]) for n in dict.fromkeys(links[name])}
            data_sets.append(st_data_set(b, conditions, top, ours, say))
            if kind == "eval":
                say(name, "loss alone -> validation.eval_dataset_id, loss and pictures")
                top["eval_dataset_id"] = [*CHANGES["listed"](top.get("eval_dataset_id", [])), name]
        elif name not in linked:
            say(name, f"{kind} data set -> left out; caches lie in cache.cache_dir")
    return data_sets


def st_data_set(
    b: Settings, conditions: dict[str, Settings], top: Settings, ours: Settings, say: Say
) -> Settings:
    """A data set of pictures and its conditioning ones -> one in the folders layout."""
    name, table = b["id"], tables()["simpletuner"]["backend_keys"]
    kind = b.pop("resolution_type", None) or top.get("resolution_type", "pixel_area")
    size = b.pop("resolution", None) or top.get("resolution", 1024)
    ds: Settings = {"resolution": resolution_of(side_px(size, kind)), "reference_dirs": []}
    if ds["resolution"] != size:
        say(f"{name}.resolution", f"{size} -> the area of a square of {ds['resolution']} px")
    if kind == "pixel":
        say(f"{name}.resolution_type", "pixel: the shorter side -> the side of the equal square")
    sampling = top.get("conditioning_multidataset_sampling", "combined")
    if len(conditions) > 1 and "conditioning_multidataset_sampling" not in top:
        say("conditioning_multidataset_sampling", "random by default -> combined, all of them")
    crops = {}
    for other, c in conditions.items():
        folder, crop = c.pop("instance_data_dir", ""), c.pop("conditioning_type", "auto")
        if crop in ("mask", "segmentation"):
            ds["mask_dir"] = folder
            ours["loss"] |= {"mask": "file", "foreground_weight": 1, "background_weight": 0}
            say(f"{other}.conditioning_type", "a factor -> divided by the mask's mean")
        else:
            ds["reference_dirs"].append(folder)
            crops[other] = crop
        if c.pop("resolution", size) != size:
            say(f"{other}.resolution", "of this reference -> data.reference_area, of all")
        for key in c.keys() - {"id", "type", "dataset_type"}:
            say(f"{other}.{key}", table.get(key, Rule()).note or "its own -> the target's")
    kinds = set(crops.values())
    ds["conditioning_type"] = kinds.pop() if len(kinds) == 1 else "auto"
    for other in crops if kinds else ():
        say(f"{other}.conditioning_type", "of this reference -> auto, for all")
    strategy, prompt = b.pop("caption_strategy", "textfile"), b.pop("instance_prompt", None)
    if prompt and (b.pop("only_instance_prompt", False) or strategy == "instanceprompt"):
        ds["caption"] = prompt[0] if isinstance(prompt, list) else prompt
    elif strategy != "textfile" or prompt:
        say(f"{name}.caption_strategy", f"{strategy} -> text files beside the pictures")
        say(f"{name}.instance_prompt", f"{prompt} -> not used")
    follow(table, b, ds, say, f"{name}.")
    return ds | {"conditioning_multidataset_sampling": sampling}


# --- 5. qwen-image-finetune, both generations, and FlyMyAI ----------------------------------------

TARGETS = ("training_images", "images", "target_images", "target", "targets")
REFERENCES = ("control_images", "control", "condition_images", "controls")
READ_ALIKE = {"caption_lines": False, "on_missing": "skip"}
TARGET_SIZES = ("image_size", "target_size", "target_pixels", "multi_resolutions", "target")
REFERENCE_SIZES = ("controls_size", "controls_pixels", "controls")


def flat(section: Settings, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every leaf; the optimizer's init_args and a path stay whole."""
    for key, item in section.items():
        here = f"{path}.{key}".lstrip(".")
        if isinstance(item, dict) and not here.endswith(("optimizer.init_args", "dataset_path")):
            yield from flat(item, here)
        else:
            yield here, item


def interpolated(source: Settings) -> Settings:
    """OmegaConf's ${a.b}, where it is a whole value."""
    names = {key: re.fullmatch(r"\$\{([\w.]+)\}", str(value)) for key, value in source.items()}
    return {k: source.get(name[1], v) if (name := names[k]) else v for k, v in source.items()}


def from_qwen_image_finetune(source: Any, say: Say) -> Settings:
    """The YAML of either generation, or of FlyMyAI. Raises UserError where it is none."""
    if not isinstance(source, dict) or not {"data_config", *Config.model_fields} & source.keys():
        raise UserError(
            "no config of qwen-image-finetune (model, data ...) or FlyMyAI (data_config)"
        )
    source = interpolated(dict(flat(source)))
    ours: Settings = {"loss": {"timestep_density": "uniform", "timestep_shift": 1}}
    if any(key.startswith("data_config.") for key in source):
        return from_flymyai(source, ours, say)
    newer = "trainer" in source or any(".processor." in key for key in source)
    trainer = source.pop("trainer", "QwenImageEdit")
    if trainer not in ("QwenImageEdit", "QwenImageEditPlus"):
        raise UserError(f"trainer: wanted QwenImageEdit or QwenImageEditPlus, not {trainer}")
    source = with_defaults(source, "qwen-image-finetune", say)
    if rank := source.pop("model.rank", None):
        say("model.rank", "overrules lora.r and lora_alpha -> both are set to it")
        source |= {"model.lora.r": rank, "model.lora.lora_alpha": rank}
    if newer and source.pop("train.num_epochs", None):
        say("train.num_epochs", "was ignored -> left out")
    put(ours, "data.dataset_configs", qf_data_sets(source, ours if newer else {}, say))
    qf_validation(source, ours, say)
    same = {path: Rule(to=path) for path, _ in settings(Config) if "*" not in path}
    follow(same | tables()["qwen-image-finetune"]["keys"], source, ours, say)
    return ours


def qf_area(source: Settings, names: tuple[str, ...], say: Say) -> int | None:
    """Takes the sizes out of `source`; the first one's pixels."""
    areas = []
    for key in [k for k in source if k.startswith("data.init_args") and k.split(".")[-1] in names]:
        value = source.pop(key)
        areas.append(converted(key, value, Rule(change="area_px"), say))
        say(key, f"{value} -> the first one's area ({areas[0]} px), aspects kept")
    return areas[0] if areas else None


def qf_data_sets(source: Settings, ours: Settings, say: Say) -> list[Settings]:
    """data.init_args.* -> data sets; the size of references goes into `ours`."""
    paths = source.pop("data.init_args.dataset_path", None)
    area = qf_area(source, TARGET_SIZES, say)
    reference = qf_area(source, REFERENCE_SIZES, say) or area
    put(ours, "data.reference_area", "target" if reference == area else reference)
    for key in [key for key in source if ".processor." in key]:
        say(key, f"{source.pop(key)} -> the nearest bucket, cropped in the middle")
    common = {**READ_ALIKE, "resolution": resolution_of(math.sqrt(area)) if area else 1024}
    if chosen := source.pop("data.init_args.selected_control_indexes", None):
        say("data.init_args.selected_control_indexes", "extra ones -> all, the main one is 1")
        common["selected_control_indexes"] = [1, *(index + 1 for index in chosen)]
    return [
        qf_source(p, say) | common for p in (paths if isinstance(paths, list) else [paths]) if p
    ]


def qf_source(path: Any, say: Say) -> Settings:
    """A folder with its usual names, a table, or a data set of the Hub."""
    if isinstance(path, dict):
        return {"hf_dataset": path.get("repo_id"), "hf_split": path.get("split", "train")}
    if path.endswith(".csv"):
        return {"table": path}
    root = Path(path)
    if not root.exists() and re.fullmatch(r"[\w-]+/[\w-]+", path):
        return {"hf_dataset": path}
    target, reference = (
        next((name for name in names if (root / name).is_dir()), names[0])
        for names in (TARGETS, REFERENCES)
    )
    say(path, f"the first folder there is of each kind -> {target} and {reference}")
    return {"train_data_dir": path, "target_dir": target, "reference_dirs": [reference]}


def qf_validation(source: Settings, ours: Settings, say: Say) -> None:
    """validation.* -> pictures of the samples, as there."""
    samples = source.pop("validation.samples", None) or []
    for sample in samples:
        sample["true_cfg_scale"] = sample.pop("guidance_scale", None)
    for key in [key for key in source if key.startswith("validation.dataset.")]:
        say(key, f"{source.pop(key)} -> name such a data set in validation.eval_dataset_id")
    if source.pop("validation.enabled", False):
        samples = only_known(samples, list[ValidationSample], "validation.samples", say)
        ours["validation"] = {"samples": samples, "steps": 100, "true_cfg_scale": 1}
        say("validation.enabled", "20 steps without guidance -> the same, in validation")
    else:
        given = {
            "validation.steps": source.pop("validation.steps", None),
            "validation.samples": samples,
        }
        for key in [key for key in given if given[key]]:
            say(key, "nothing without validation.enabled -> left out")


def from_flymyai(source: Settings, ours: Settings, say: Say) -> Settings:
    """FlyMyAI's flat YAML: one folder of targets with their captions, one of references."""
    betas = [source.pop("adam_beta1", 0.9), source.pop("adam_beta2", 0.999)]
    if betas != [0.9, 0.999]:
        put(ours, "optimizer.init_args.betas", betas)
    ds = {
        "target_dir": source.pop("data_config.img_dir", None),
        "reference_dirs": [source.pop("data_config.control_dir", None)],
        "caption_ext": f".{source.pop('data_config.caption_type', 'txt')}",
    }
    put(ours, "data.dataset_configs", [ds | READ_ALIKE])
    source = with_defaults(source, "flymyai", say)
    follow(tables()["flymyai"]["keys"], source, ours, say)
    return ours


# --- 6. files -------------------------------------------------------------------------------------

TEXT = r'"(?:\\.|[^"\\])*"'


def read_json(path: Path) -> Any:
    """JSON with comments and trailing commas, or `"key": value` alone. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
        text = f"{{{text}}}" if text.startswith('"') else text  # as manuals show a part
        text = re.sub(rf"({TEXT})|//[^\n]*|/\*.*?\*/", r"\1", text, flags=re.DOTALL)
        return json.loads(re.sub(rf"({TEXT})|,(?=\s*[\]}}])", r"\1", text))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: {error}") from error


def convert(tool: str, files: list[Path], say: Say) -> Config:
    """The files of a tool -> our config. Raises UserError: unreadable, no such config, invalid."""
    try:
        if tool == "qwen-image-finetune":
            ours = from_qwen_image_finetune(read_yaml(files[0]), say)
        elif tool == "t2itrainer":
            ours = from_t2itrainer(read_json(files[0]), say)
        else:
            ours = from_simpletuner(read_json(files[0]), read_json(files[1]), say)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # text for a number, ...
        raise UserError(f"{files[0]} is not shaped like a config of {tool}: {error}") from error
    lora = ours.get("model", {}).get("lora", {})
    if lora.get("lora_alpha") == lora.get("r", 16):
        lora.pop("lora_alpha", None)  # our default
    sections = {name: json.dumps(part, ensure_ascii=False) for name, part in ours.items()}
    config = load_config(Config, [f"--{name}={text}" for name, text in sections.items()])
    t2i_remarks(config, say)
    return config


def main() -> None:
    """Config to stdout, what changed to stderr."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("tool", choices=("t2itrainer", "simpletuner", "qwen-image-finetune"))
    parser.add_argument("files", nargs="+", type=Path, help="simpletuner: config and data sets")
    given = parser.parse_args()
    if len(given.files) != 1 + (given.tool == "simpletuner"):
        parser.error("simpletuner takes two files (config, data sets), the others one")
    lines: dict[str, None] = {}  # each once, in order
    config = convert(
        given.tool, given.files, lambda key, text: lines.update({f"{key}: {text}": None})
    )
    for line in lines:
        print(line, file=sys.stderr)
    ours = config.model_dump(mode="json", exclude_defaults=True)
    print(yaml.safe_dump(ours, sort_keys=False, allow_unicode=True), end="")


if __name__ == "__main__":
    run_script(main)
