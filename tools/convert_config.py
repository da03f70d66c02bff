"""Turn a config of T2ITrainer, SimpleTuner or qwen-image-finetune into one of train_qwen_edit.py.

Page: docs/convert_config.md

    python tools/convert_config.py t2itrainer config.json > my.yaml
    python tools/convert_config.py simpletuner config.json multidatabackend.json > my.yaml
    python tools/convert_config.py qwen-image-finetune config.yaml > my.yaml    # FlyMyAI's too

The config goes to stdout: only what differs from our defaults, checked by train_qwen_edit.Config.
Every key that changes its meaning or has no counterpart gets a line on stderr:
"key: what it meant there -> what happens here". Nothing is dropped without one. Which key goes
where stands in convert_config.yaml; here is what a table cannot say.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import operator
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_qwen_edit import SIZE_MULTIPLE, Config, DatasetConfig, ValidationSample
from utils import Section, UserError, load_config, named, read_text, run_script, settings

Settings = dict[str, Any]  # theirs by key, ours by dotted path
Say = Callable[[str, str], None]  # say(key, "what it meant there -> what happens here")
UNKNOWN = "no counterpart -> nothing happens here"


# --- 1. values ------------------------------------------------------------------------------------

T2I_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]
T2I_LAYERS = [f"attn.{n}" for n in (*T2I_LAYERS, "to_add_out")] + ["img_mlp.net.2", "txt_mlp.net.2"]
MEGAPIXEL_SIDES = {0.25: 512, 0.5: 768, 1.0: 1024, 2.0: 1536, 4.0: 2048}  # SimpleTuner's "area"


def layers_outside(names: str, frozen: str) -> str:
    """Return layers ("attn.to_q, ...", or "all" ten) outside blocks ("0-10, 50") as a pattern."""
    blocks = {59}  # which T2ITrainer always freezes
    for part in filter(None, re.split(r"\s*,\s*", frozen.strip())):
        first, _, last = part.partition("-")
        blocks |= set(range(int(first), int(last or first) + 1))
    ends = T2I_LAYERS if names in ("", "all") else re.split(r"\s*,\s*", names.strip())
    frozen, wanted = "|".join(map(str, sorted(blocks))), "|".join(map(re.escape, ends))
    return rf"transformer_blocks\.(?!({frozen})\.)\d+\.(.*\.)?({wanted})"


def side_px(size: Any, kind: str) -> float:
    """Return the side of the square of the same area, px; `kind` "area" counts megapixels."""
    size = float(size)
    return MEGAPIXEL_SIDES.get(size, 1024 * math.sqrt(size)) if kind == "area" else size


def first_side_px(sizes: Any) -> int:
    """Return the side, px, of a square of the first size's area: "1024x768,512", megapixels."""
    sides = [float(side) for side in str(sizes).split(",")[0].split("x")]
    if len(sides) == 1:
        sides = [side_px(sides[0], "area" if sides[0] < 16 else "")]
    return round(math.sqrt(sides[0] * sides[-1]))


def area_px(size: Any) -> int:
    """Return the pixels of [H, W], "H*W" or a number."""
    sides = size if isinstance(size, list) else str(size).split("*")
    return math.prod(int(side) for side in sides)


def resolution_of(side: float) -> int:
    """Return the nearest resolution that a data set takes, px."""
    return max(64, SIZE_MULTIPLE * round(side / SIZE_MULTIPLE))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "": lambda value: value,
    "number": float,
    "whole": int,
    "negated": lambda number: -number,
    "one_more": lambda number: int(number) + 1,
    "dotted": lambda name: f".{name}",
    "listed": lambda names: [names] if isinstance(names, str) else names,
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
    """Return what a YAML file holds, typed as those tools read it. Raises UserError."""
    with named(str(path)):
        return yaml.safe_load(read_text(path))


@functools.cache
def tables() -> dict[str, dict[str, Any]]:
    """Return convert_config.yaml, its rules as {key: Rule}."""
    found = read_yaml(Path(__file__).with_suffix(".yaml"))
    for tool in found.values():
        for part in [name for name in tool if name.endswith("keys")]:
            tool[part] = {
                key: Rule.model_validate({"to": rule} if isinstance(rule, str) else rule)
                for keys, rule in tool[part].items()
                for key in keys.split()
            }
    return found


def converted(key: str, value: Any, rule: Rule, say: Say) -> Any:
    """Return the value as ours. Raises UserError where it cannot be read."""
    try:
        if not rule.values:
            return CHANGES[rule.change](value)
        if value not in rule.values and "*" in rule.values:
            say(key, f"{value} has no counterpart -> {rule.values['*']}")
            value = "*"
        return copy.deepcopy(rule.values[value])
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
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
            ours[rule.to] = converted(where + key, value, rule, say)
    for key in [key for key in source if key not in table]:
        if any(name.startswith(f"{key}.") for name in table):
            raise UserError(f"{where}{key}: wanted a section of names and values")
        groups = [name for name in table if name.endswith("*") and key.startswith(name[:-1])]
        say(where + key, table[groups[0]].note if groups else UNKNOWN)


def begin(tool: str, source: Settings, say: Say) -> tuple[Settings, Settings]:
    """Return (source with what it leaves out, which means what it means there; ours so far)."""
    table, source = tables()[tool], dict(source)
    given = {key for key, value in source.items() if value not in (None, "")}
    if source.get("lr_scheduler") != "cosine_with_restarts" and table.get("cycles") in given:
        say(table["cycles"], "counts with cosine_with_restarts alone -> left out")
        del source[table["cycles"]]
    for key in [key for key in table["missing"] if key not in given]:
        say(key, table["missing"][key])
    filled = {key: value for key, value in table["defaults"].items() if key not in given}
    if filled:
        text = ", ".join(f"{key} {value}" for key, value in filled.items())
        say("not in the file", f"its own defaults -> the same: {text}")
    return source | filled, dict(table["fixed"])


def drop_unknown(part: Any, kind: Any, where: str, say: Say) -> None:
    """Take keys out of `part` that our class `kind` lacks, at any depth; they are named."""
    try:
        TypeAdapter(kind).validate_python(part)
    except ValidationError as error:
        for item in error.errors():
            *parents, last = item["loc"] or [""]
            if item["type"] == "extra_forbidden":
                del functools.reduce(operator.getitem, parents, part)[last]
                say(".".join([where, *map(str, item["loc"])]), UNKNOWN)


# --- 3. T2ITrainer (train_qwen_image_edit_new.py) -------------------------------------------------


def from_t2itrainer(source: Any, say: Say) -> Settings:
    """Convert config.json to our settings. Raises UserError where it is none."""
    if not isinstance(source, dict) or not isinstance(source.get("dataset_configs"), list):
        raise UserError("no config of T2ITrainer: it has no list dataset_configs")
    source, ours = begin("t2itrainer", source, say)
    held_out, every = source["validation_ratio"], int(source.get("save_model_steps") or 0)
    ours["data.dataset_configs"] = [
        t2i_data_set(ds, source, f"dataset_configs.{i}", say)
        for i, ds in enumerate(source["dataset_configs"])
    ]
    layers, frozen = source["lora_layers"], source["freeze_transformer_layers"]
    ours["model.lora.target_modules"] = layers_outside(str(layers), str(frozen))
    if every > 0:
        ours["train.checkpointing_steps"] = every
    if held_out:
        ours["validation.steps"] = every if every > 0 else 500
    if source.get("use_lokr") and "rank_alpha" in source:
        ours["model.lora.lora_alpha"] = source.pop("rank_alpha")
    follow(tables()["t2itrainer"]["keys"], source, ours, say)
    return ours


def t2i_data_set(ds: Any, top: Settings, where: str, say: Say) -> Settings:
    """Convert one of dataset_configs: the same grammar; the top level fills its gaps."""
    if not isinstance(ds, dict):
        raise UserError(f"{where}: wanted a data set, got {ds!r}")
    for key, note in tables()["t2itrainer"]["inside"].items():
        if f'"{key}"' in json.dumps(ds):
            say(key, note)
    for name, caption in ds.get("caption_configs", {}).items():
        if "reference_list" not in caption:
            say(f"caption_configs.{name}", "text alone -> text with the batch's references")
    folder = ds.get("train_data_dir") or top.get("train_data_dir")
    if not folder:
        raise UserError(f"{where}.train_data_dir is missing")
    ds = copy.deepcopy(ds)
    drop_unknown(ds, DatasetConfig, where, say)
    return ds | {
        "train_data_dir": folder,
        "resolution": ds.get("resolution") or top["resolution"],
        "repeats": int(ds.get("repeats") or 1) * int(top.get("repeats") or 1),
        "holdout_ratio": top["validation_ratio"],
    }


# --- 4. SimpleTuner -------------------------------------------------------------------------------


def from_simpletuner(source: Any, backends: Any, say: Say) -> Settings:
    """Convert config.json and multidatabackend.json to our settings. Raises UserError."""
    if not isinstance(source, dict) or not isinstance(backends, list):
        raise UserError("wanted SimpleTuner's config.json and its list of data sets")
    source = {key.lstrip("-"): value for key, value in source.items()}
    for key, wanted in (("model_family", "qwen_image"), ("model_type", "lora")):
        if (given := source.pop(key, wanted)) != wanted:
            raise UserError(f"{key}: wanted {wanted}, not {given}")
    source, ours = begin("simpletuner", source, say)
    by_size = source.pop("flow_schedule_auto_shift", False)
    if by_size:
        say("flow_schedule_auto_shift", "if flow_schedule_shift is 0 -> timestep_shift: model")
    shift = float(source.pop("flow_schedule_shift") or 0)
    ours["loss.timestep_shift"] = shift or ("model" if by_size else 1)
    source |= {f"model_kwargs.{k}": v for k, v in source.pop("model_kwargs", {}).items()}
    ours["data.dataset_configs"] = st_data_sets(backends, source, ours, say)
    follow(tables()["simpletuner"]["keys"], source, ours, say)
    if not ours.get("validation.eval_dataset_id") and ours.pop("validation.steps", None):
        say("validation_step_interval", "edits of training samples -> none: nothing is held out")
    return ours


def st_data_sets(backends: list[Any], top: Settings, ours: Settings, say: Say) -> list[Settings]:
    """Return every data set of pictures, with the conditioning ones that belong to it."""
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
    """Convert a data set of pictures and its conditioning ones to one in the folders layout."""
    name, table = b["id"], tables()["simpletuner"]["backend_keys"]
    kind = b.get("resolution_type") or top.get("resolution_type", "pixel_area")
    size = b.get("resolution") or top.get("resolution", 1024)
    ds: Settings = {"resolution": resolution_of(side_px(size, kind)), "reference_dirs": []}
    if len(conditions) > 1 and top.get("conditioning_multidataset_sampling") != "combined":
        text = "random, one of them -> all of them (tools/pair_table.py writes one a line)"
        say("conditioning_multidataset_sampling", text)
    crops = {}
    for other, c in conditions.items():
        folder, crop = c.pop("instance_data_dir", ""), c.pop("conditioning_type", "auto")
        if crop in ("mask", "segmentation"):
            ds["mask_dir"] = folder
            ours |= {"loss.mask": "file", "loss.foreground_weight": 1, "loss.background_weight": 0}
            say(f"{other}.conditioning_type", "a factor -> divided by the mask's mean")
        else:
            ds["reference_dirs"].append(folder)
            crops[other] = crop
        if c.pop("resolution", size) != size:
            say(f"{other}.resolution", "of this reference -> data.reference_area, of all")
        for key in [key for key in c if key not in ("id", "type", "dataset_type")]:
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
    return ds


# --- 5. qwen-image-finetune, both generations, and FlyMyAI ----------------------------------------

TARGETS = ("training_images", "images", "target_images", "target", "targets")
REFERENCES = ("control_images", "control", "condition_images", "controls")
TARGET_SIZES = ("image_size", "target_size", "target_pixels", "multi_resolutions", "target")
REFERENCE_SIZES = ("controls_size", "controls_pixels", "controls")


def flat(section: Settings, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of every leaf; the optimizer's init_args and a path stay whole."""
    for key, item in section.items():
        here = f"{path}.{key}".lstrip(".")
        if isinstance(item, dict) and not here.endswith(("optimizer.init_args", "dataset_path")):
            yield from flat(item, here)
        else:
            yield here, item


def interpolated(source: Settings) -> Settings:
    """Resolve OmegaConf's ${a.b}, where it is a whole value."""
    names = {key: re.fullmatch(r"\$\{([\w.]+)\}", str(value)) for key, value in source.items()}
    return {k: source.get(name[1], v) if (name := names[k]) else v for k, v in source.items()}


def from_qwen_image_finetune(source: Any, say: Say) -> Settings:
    """Convert the YAML of either generation, or of FlyMyAI. Raises UserError where it is none."""
    if not isinstance(source, dict) or not {"data_config", *Config.model_fields} & source.keys():
        raise UserError("no config of qwen-image-finetune (data ...) or FlyMyAI (data_config)")
    source = interpolated(dict(flat(source)))
    if any(key.startswith("data_config.") for key in source):
        source, ours = begin("flymyai", source, say)
        follow(tables()["flymyai"]["keys"], source, ours, say)
        return ours
    newer = "trainer" in source or any(".processor." in key for key in source)
    trainer = source.pop("trainer", "QwenImageEdit")
    if trainer not in ("QwenImageEdit", "QwenImageEditPlus"):
        raise UserError(f"trainer: wanted QwenImageEdit or QwenImageEditPlus, not {trainer}")
    source, ours = begin("qwen-image-finetune", source, say)
    if rank := source.pop("model.rank", None):
        say("model.rank", "overrules lora.r and lora_alpha -> both are set to it")
        source |= {"model.lora.r": rank, "model.lora.lora_alpha": rank}
    if newer and source.pop("train.num_epochs", None):
        say("train.num_epochs", "was ignored -> left out")
    ours["data.dataset_configs"] = qf_data_sets(source, ours if newer else {}, say)
    if source.pop("validation.enabled", False):
        say("validation.enabled", "20 steps without guidance -> the same, in validation")
        ours |= {"validation.steps": 100, "validation.true_cfg_scale": 1}
        samples = source.get("validation.samples") or []
        drop_unknown(samples, list[ValidationSample], "validation.samples", say)
    else:
        for key in ("validation.steps", "validation.samples"):
            if source.pop(key, None):
                say(key, "nothing without validation.enabled -> left out")
    same = {path.partition(".*")[0] for path, _ in settings(Config)}
    rules = {path: Rule(to=path) for path in same} | tables()["qwen-image-finetune"]["keys"]
    follow(rules, source, ours, say)
    return ours


def qf_area(source: Settings, names: tuple[str, ...], say: Say) -> int | None:
    """Take the sizes out of `source`; return the first one's pixels."""
    areas = []
    for key in [k for k in source if k.startswith("data.init_args") and k.split(".")[-1] in names]:
        value = first = source.pop(key)
        while isinstance(first, list) and (isinstance(first[0], list) or not key.endswith("size")):
            first = first[0]
        areas.append(converted(key, first, Rule(change="area_px"), say))
        say(key, f"{value} -> the area of the first one, {areas[0]} px, and each aspect kept")
    return areas[0] if areas else None


def qf_data_sets(source: Settings, ours: Settings, say: Say) -> list[Settings]:
    """Convert data.init_args.* to data sets; the size of references goes into `ours`."""
    paths = source.pop("data.init_args.dataset_path", None)
    area = qf_area(source, TARGET_SIZES, say)
    reference = qf_area(source, REFERENCE_SIZES, say) or area
    ours["data.reference_area"] = "target" if reference == area else reference
    extra = source.pop("data.init_args.selected_control_indexes", None) or []
    numbers = " ".join(["1", *(str(index + 1) for index in extra)])
    chosen = f" --selected_control_indexes {numbers}" if extra else ""
    if extra:
        say("data.init_args.selected_control_indexes", "extra ones -> all, the main one is 1")
    resolution = resolution_of(math.sqrt(area)) if area else 1024
    paths = paths if isinstance(paths, list) else [paths]
    return [qf_data_set(p, chosen, say) | {"resolution": resolution} for p in paths if p]


def qf_data_set(path: Any, chosen: str, say: Say) -> Settings:
    """Convert a folder with its usual names; tools/pair_table.py makes a table of all else."""
    split = f" --hf_split {path.get('split', 'train')}" if isinstance(path, dict) else ""
    path = path["repo_id"] if isinstance(path, dict) else path
    root, flags = Path(path), f"--hf_dataset {path}{split}"
    if path.endswith(".csv"):
        flags = f"--table {path}"
    elif root.exists() or not re.fullmatch(r"[\w-]+/[\w-]+", path):
        target, reference = (
            next((name for name in names if (root / name).is_dir()), names[0])
            for names in (TARGETS, REFERENCES)
        )
        say(path, f"the first folder there is of each kind -> {target} and {reference}")
        if not chosen and not any((root / reference).rglob("*_control_[0-9]*")):
            folders = {"train_data_dir": path, "target_dir": target, "reference_dirs": [reference]}
            return folders | {"caption_lines": False, "on_missing": "skip"}
        flags = f"--train_data_dir {path} --target_dir {target} --reference_dirs {reference}"
        flags += " --caption_lines false"
    table = f"{root.stem}_pairs.jsonl"
    command = f"python tools/pair_table.py {flags}{chosen} --on_missing skip --output {table}"
    say(path, f"read as it is -> a table, once this has written it: {command}")
    return {"table": table}


# --- 6. files -------------------------------------------------------------------------------------

TEXT = r'"(?:\\.|[^"\\])*"'


def read_json(path: Path) -> Any:
    """Read JSON with comments and trailing commas, or `"key": value` alone. Raises UserError."""
    with named(str(path)):
        text = read_text(path).strip()
        text = f"{{{text}}}" if text.startswith('"') else text  # as manuals show a part
        text = re.sub(rf"({TEXT})|//[^\n]*|/\*.*?\*/", r"\1", text, flags=re.DOTALL)
        return json.loads(re.sub(rf"({TEXT})|,(?=\s*[\]}}])", r"\1", text))


def convert(tool: str, files: list[Path], say: Say) -> Config:
    """Convert a tool's files to our config. Raises UserError: unreadable, no config, invalid."""
    try:
        if tool == "qwen-image-finetune":
            ours = from_qwen_image_finetune(read_yaml(files[0]), say)
        elif tool == "t2itrainer":
            ours = from_t2itrainer(read_json(files[0]), say)
        else:
            ours = from_simpletuner(read_json(files[0]), read_json(files[1]), say)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{files[0]} is not shaped like a config of {tool}: {error}") from error
    if "model.pretrained_model_name_or_path" not in ours:
        say("pretrained_model_name_or_path", "not in the file -> our default, 2511")
    if ours.get("model.blocks_to_swap") and not ours.get("train.gradient_checkpointing", True):
        say("blocks_to_swap", "without gradient_checkpointing -> with it")
        del ours["train.gradient_checkpointing"]  # true by default
    if ours.get("model.lora.lora_alpha") == ours.get("model.lora.r", 16):
        ours.pop("model.lora.lora_alpha", None)  # our default
    texts = {key: v if isinstance(v, str) else json.dumps(v) for key, v in ours.items()}
    return load_config(Config, [f"--{key}={text}" for key, text in texts.items()])


def main() -> None:
    """Print the config to stdout, what changed to stderr."""
    match sys.argv[1:]:
        case ["t2itrainer" | "qwen-image-finetune" as tool, config]:
            files = [Path(config)]
        case ["simpletuner" as tool, config, data_sets]:
            files = [Path(config), Path(data_sets)]
        case _:
            raise UserError(f"usage:\n{(__doc__ or '').split(chr(10) * 2)[2]}")
    lines: dict[str, None] = {}  # each once, in order
    found = convert(tool, files, lambda key, text: lines.update({f"{key}: {text}": None}))
    for line in lines:
        print(line, file=sys.stderr)
    ours = found.model_dump(mode="json", exclude_defaults=True)
    print(yaml.safe_dump(ours, sort_keys=False, allow_unicode=True), end="")


if __name__ == "__main__":
    run_script(main)
