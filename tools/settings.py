"""Every setting of a script, as --help shows it and as docs/settings_*.md have it.

python train_qwen_edit.py --help [SECTION | all]        # what the scripts do with it
python tools/settings.py page train_qwen_edit.py        # all of them as Markdown, also of a fork
python tools/settings.py docs                           # writes docs/settings_*.md
"""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import Section, UserError, load_script, nearest, run_script, save_text, settings

ROOT = Path(__file__).resolve().parent.parent

ROLLOUT = [f"rollout_{end}" for end in ("steps", "span", "probability", "warmup_steps", "target")]
RECREATE = [f"recreate_cache_{kind}" for kind in ("target", "reference", "caption")]
FRAMES = ("frames", "even_frames", "fit_steps", "fit_rank", "fit_learning_rate")

GONE = {  # names that users may expect: what to do instead
    **dict.fromkeys(("hf_dataset", "hf_split"), "tools/pair_table.py writes a table"),
    **dict.fromkeys(("count", "draws"), "tools/pair_table.py writes a row per choice"),
    **dict.fromkeys(ROLLOUT, "experiments/rollout.patch"),
    **dict.fromkeys(RECREATE, "entries are named by their content; recreate_cache encodes all"),
    **dict.fromkeys(FRAMES, "python tools/interpolate_sd.py draws between two pictures"),
    "instruction": "the system prompt is the model's own",
    "buckets": "every size in steps of 32 px",
    "memory_mb": "entries are read when they are needed",
    "ema_update_interval": "the average is updated every step",
    "selected_control_indexes": "tools/pair_table.py chooses references",
    "conditioning_multidataset_sampling": "tools/pair_table.py writes a line per combination",
    "mask_loss": "loss.mask: file",
    "sigmoid_scale": "logit_normal with logit_std is the same",
    "quantize": "model.base_model_precision: fp8-quanto",
    "quantize_via": "blocks are quantised where they live",
    "quantize_activations": "only weights are quantised",
    "tracker_project_name": "trackers show the name of logging.output_dir",
    "reference_dropout": "reference_list.dropout is that of the text encoder's pictures",
    "from_image_mode": "from_image always leads to the target (bridge)",
    "step_rules": "take another lr_scheduler.scheduler_type",
    "max_tokens_per_batch": "batches have one shape; set data.batch_size",
    "ema_device": "the average lies beside the adapter",
    "mode_scale": "logit_normal or uniform; sample_sigma() is the place for another density",
    "difference_threshold": "loss.mask: file, with masks of your own",
    **dict.fromkeys(("stages", "stage_scales"), "train a slider for each step and combine them"),
    "enable_xformers_memory_efficient_attention": "torch's own fused attention is used",
    "dataloader_num_workers": "latents are cached; nothing is decoded during training",
    "video": "python tools/video_pairs.py VIDEO writes before/ and after/ folders",
    "frame_gap": "python tools/video_pairs.py VIDEO --frame_gap N",
    "exclude_blocks": "target_modules takes a regular expression",
}

OTHERS = {  # names in other trainers: ours, of which a script has one
    "learning_rate lr": "optimizer.init_args learning_rate",
    "rank lora_rank network_dim lora_r network_rank r": "model.lora.r rank lora_rank",
    "alpha lora_alpha network_alpha": "model.lora.lora_alpha alpha",
    "steps max_train_steps max_steps num_steps iterations train_iteration": (
        "train.max_train_steps train_iteration max_train_steps num_inference_steps"
    ),
    "epochs num_epochs num_train_epochs max_train_epochs": "train.num_epochs num_train_epochs",
    "batch_size train_batch_size": "data.batch_size batch_size train_batch_size",
    "gradient_accumulation grad_accum gradient_accumulation_steps": (
        "train.gradient_accumulation_steps gradient_accumulation_steps"
    ),
    "image_dir dataset dataset_dir dataset_path data_dir train_data_dir instance_data_dir": (
        "data.dataset_configs.*.train_data_dir datasets_folder before_data_dir"
    ),
    "control_dir source_dir conditioning_data_dir reference_dir before_dir": (
        "data.dataset_configs.*.reference_dirs source_folder before_data_dir"
    ),
    "base_model model_name model_path model pretrained_model model_name_or_path": (
        "model.pretrained_model_name_or_path pretrained_model_name_or_path"
    ),
    "output output_path save_dir output_folder output_dir": (
        "logging.output_dir output_folder output_dir"
    ),
    "resume resume_from save_state": "train.resume_from_checkpoint resume_from_checkpoint",
    "save_every save_steps save_every_n_steps checkpointing_steps": (
        "train.checkpointing_steps save_per_steps checkpointing_steps"
    ),
    "precision quant quantization": "model.base_model_precision base_model_precision",
    "resolution size image_size": "data.dataset_configs.*.resolution resolution",
    "caption_dropout dropout": "data.caption_dropout_rate",
    "num_inference_steps sample_steps": "validation.num_inference_steps num_inference_steps",
}

FIRST = {  # of each script the settings that --help shows first
    "train_qwen_edit.py": (
        "model.pretrained_model_name_or_path data.dataset_configs.*.train_data_dir "
        "data.dataset_configs.*.target_dir data.dataset_configs.*.reference_dirs "
        "data.dataset_configs.*.resolution logging.output_dir train.max_train_steps "
        "model.lora.r optimizer.init_args model.base_model_precision"
    ),
    "train_pairedit.py": (
        "pretrained_model_name_or_path base_model_precision datasets_folder datasets "
        "python_name cfg_eta noise_scales train_iteration scales skips"
    ),
    "train_dreambooth_pairs.py": (
        "pretrained_model_name_or_path use_image_pairs before_data_dir after_data_dir "
        "instance_data_dir instance_prompt output_dir pair_objective lora_rank "
        "max_train_steps"
    ),
    "generate.py": (
        "pretrained_model_name_or_path lora scales prompt image input_dir table seed output "
        "output_dir"
    ),
    "evaluate.py": (
        "results edited_dir before_dir after_dir before_suffix after_suffix metrics mask_dir html "
        "output_dir"
    ),
    "pair_table.py": "hf_dataset table target_dir reference_dirs caption output",
    "interpolate_sd.py": "pretrained_model_name_or_path image prompt frames output",
}


DRAWS = "EditConfig SliderConfig ChangeConfig"
PAGES = {  # script: page that describes it, and the config classes of its settings
    "train_qwen_edit.py": ("train_qwen_edit.md", "Config"),
    "train_pairedit.py": ("train_pairedit.md", "Config"),
    "train_dreambooth_pairs.py": ("train_dreambooth_pairs.md", "Config"),
    "generate.py": ("generate.md", DRAWS),
    "evaluate.py": ("evaluate.md", "Config"),
    "tools/serve.py": ("serve.md", "ServeConfig"),
    "tools/pair_table.py": ("pair_table.md", "Config"),
    "tools/interpolate_sd.py": ("interpolate_sd.md", "Config"),
}


class Part(NamedTuple):
    """A section of the settings: a key of a nested config, a class of a flat one."""

    name: str
    about: str
    fields: dict[str, Any]


def sections(cls: type[Section]) -> dict[str, Part]:
    """Return the sections of a config by name; in a flat config a class is a section."""
    found: dict[str, Part] = {}
    for path, field in settings(cls):
        name, dot, _ = path.partition(".")
        owner = next(c for c in cls.__mro__ if name in inspect.get_annotations(c))
        kind = cls.model_fields[name].annotation if dot else owner
        section = name if dot else owner.__name__.removesuffix("Config").lower() or "general"
        about = "The rest." if section == "general" else str(inspect.getdoc(kind))
        found.setdefault(section, Part(section, " ".join(about.split()), {})).fields[path] = field
    return {n: part._replace(about="") for n, part in found.items()} if len(found) == 1 else found


WORDS = {bool: "true | false", int: "whole number", float: "number", str: "text", Path: "path"}


def type_in_words(kind: Any) -> str:
    """Return what a setting takes: "whole number", "mse | huber", "list of texts"."""
    inner = [type_in_words(arg) for arg in get_args(kind) if arg is not type(None)]
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if hasattr(kind, "__metadata__"):  # Annotated
        return type_in_words(get_args(kind)[0])
    if get_origin(kind) is list:
        return f"list of {inner[0]}s"
    if inner and get_origin(kind) is not dict:
        return " | ".join(dict.fromkeys(inner))
    return WORDS.get(kind, "{name: value, ...}")


def default_of(field: Any) -> str:
    """Return a setting's default as YAML has it, or "required"."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value) or '""'


def explain(cls: type[Section], data: Any, errors: Any) -> list[str]:
    """Return what a ValidationError says, one line each, with the path as the config has it."""
    return [line for error in errors.errors() for line in explain_one(cls, data, error)]


def explain_one(cls: type[Section], data: Any, error: Any) -> list[str]:
    """Return what one of pydantic's errors says, one line each."""
    place: list[str] = []
    for part in error["loc"]:  # pydantic adds the tags of union members
        data = dict(enumerate(data)) if isinstance(data, list) else data
        if isinstance(data, dict) and part in data:
            place, data = [*place, str(part)], data[part]
    missing, text = error["type"] == "missing", error["msg"].removeprefix("Value error, ")
    where = ".".join(place + [str(part) for part in error["loc"][-1:] if missing])
    if error["type"] == "extra_forbidden":
        text = instead(cls, ".".join(place))
    elif not (missing or isinstance(error["input"], dict | Section)):
        text = "\n".join(f"{line} (got {str(error['input'])[:60]!r})" for line in text.splitlines())
    return [f"{where}: {line}".removeprefix(": ") for line in text.splitlines()]


def instead(cls: type[Section], path: str) -> str:
    """Return what to do about a setting that is not there; what stands beside it is meant first."""
    *place, name = path.split(".")
    paths = [path for path, _ in settings(cls)]
    if name in GONE:
        return f"no such setting: {GONE[name]}"
    others = [ours for theirs, ours in OTHERS.items() if name in theirs.split()]
    if known := [ours for each in others for ours in each.split() if ours in paths]:
        ours = known[0].replace("*", "0") + ".lr" * known[0].endswith("init_args")
        return f"no such setting here, it is called {ours}"
    if elsewhere := [path for path in paths if path.endswith(f".{name}")]:
        return f"not a setting here, but there is {first_of(elsewhere[0])}"
    split = [path.split(".") for path in paths]
    here = [
        parts for parts in split if all(a in ("*", b) for a, b in zip(parts, place, strict=False))
    ]
    beside = sorted({parts[len(place)] for parts in here if len(parts) > len(place)})

    def likeness(other: str) -> float:
        return difflib.SequenceMatcher(None, name, other).ratio() + 0.1 * (other in beside)

    best = max(sorted({part for parts in split for part in parts}), key=likeness)
    if best not in beside and likeness(best) >= 0.5:  # it is meant, whole
        whole = next(path for path in paths if best in path.split("."))
        return f"unknown setting, did you mean '{first_of(whole)}'?"
    return f"unknown setting{nearest(name, [best] if likeness(best) >= 0.5 else beside)}"


def first_of(path: str) -> str:
    """Return a setting's path with the first data set in place of any."""
    return path.replace("dataset_configs.*", "dataset_configs.0")


def shown(fields: Mapping[str, Any]) -> list[str]:
    """Return the lines of --help on settings."""
    text = []
    for path, field in fields.items():
        text.append(
            f"  --{first_of(path)}  ({type_in_words(field.annotation)}; {default_of(field)})"
        )
        text += [f"      {line}" for line in (field.description or "").splitlines()]
    return text


def first(cls: type[Section], script: str) -> list[str]:
    """Return the lines on the settings that one starts with, at most ten."""
    fields = dict(settings(cls))
    return shown({name: fields[name] for name in FIRST.get(script, " ".join(fields)).split()})


def help_text(cls: type[Section], wanted: str) -> str:
    """Return the settings of one section, of "all", or ("") the newcomer's and the sections.

    Raises:
        UserError: no section of that name.
    """
    every = sections(cls)
    holds = (n for n, part in every.items() if wanted in " ".join(part.fields).split("."))
    wanted = wanted if wanted in every else next(holds, wanted)  # model of lora
    if wanted not in ("", "all", *every):
        raise UserError(f"--help {wanted}: no such section{nearest(wanted, ['all', *every])}")
    text = [] if wanted in every else [str(cls.__doc__), ""]
    if not wanted:
        text += first(cls, str(cls.__doc__).partition(":")[0])
    for part in every.values() if wanted == "all" else [every[wanted]] if wanted else []:
        text += [f"[{part.name}] {part.about}".rstrip(), *shown(part.fields), ""]
    text += [] if wanted else [""]
    text += ["  --config FILE     YAML or JSON file, see configs/"]
    text += ["  --print_config    show what would run"]
    if len(every) == 1:
        return "\n".join([*text, "  --help all        all settings"])
    if wanted:
        return "\n".join([*text, f"  --help SECTION    {', '.join(every)}; or all"])
    text += ["  --help SECTION    one of these, or all", "", *contents(every)]
    return "\n".join(text)


def contents(parts: Mapping[str, Part]) -> list[str]:
    """Return a line per section: its name, its number of settings, what it is about."""
    rows = [(name, len(part.fields), part.about) for name, part in parts.items()]
    return [f"  {name:16}{count:4}  {about}".rstrip() for name, count, about in rows]


def table(fields: Mapping[str, Any]) -> str:
    """Return a Markdown table of settings: name, what it takes, default, meaning."""
    rows = ["| setting | takes | default | meaning |", "|---|---|---|---|"]
    for path, field in fields.items():
        meaning = " ".join((field.description or "").split())
        cells = [f"`{path}`", type_in_words(field.annotation), default_of(field), meaning]
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows)


def page(script: str) -> str:
    """Return the Markdown page of all settings of a script."""
    about, names = PAGES.get(script, ("", "Config"))
    module, parts = load_script(ROOT / script), dict[str, Part]()
    for name in names.split():  # families share their first sections
        parts |= sections(getattr(module, name))
    name = Path(script).name
    text = [f"# Settings of {script}", ""]
    text += [f"What they do together: [{name}]({about})." if about else "", ""]
    text += ["`python tools/settings.py docs` writes this page from the script; a test compares."]
    if len(parts) > 1:
        text += [f"Sections: {', '.join(f'[{part}](#{part})' for part in parts)}."]
    for part in parts.values():
        text += ["", f"## {part.name}", "", *([part.about, ""] if part.about else [])]
        text.append(table(part.fields))
    return "\n".join(text) + "\n"


def page_file(script: str) -> Path:
    """Return where the page of a script lies."""
    return ROOT / f"docs/settings_{Path(script).stem}.md"


def main() -> None:
    """Print the page of a script's settings, or write all of them into docs/."""
    match sys.argv[1:]:
        case ["docs"]:
            for script in PAGES:
                save_text(page_file(script), page(script))
        case ["page", script]:
            print(page(script), end="")
        case _:
            raise UserError("usage: python tools/settings.py page SCRIPT, or: docs")


if __name__ == "__main__":
    run_script(main)
