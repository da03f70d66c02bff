"""What comes after a run: its report, its pictures, and the command to type next.

python tools/after.py OUTPUT_DIR     # says it again; of a run that was killed how to go on
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import UserError, from_tool, list_images, load_tool, run_script, save_text

RESUME = "resume_from_checkpoint"


def tell(output_dir: Path, stopped: bool = False, command: str = "", into: str = "") -> None:
    """Write the report; print it, the newest sheet, and what to type next; upload.

    command: draws with the result; "" is what the LoRA file and the run's record lead to. into:
    folder of the repository, of one of several runs, which an upload that fails does not stop.
    """
    record = read_record(output_dir) | {"finished": not stopped}
    save_text(output_dir / "run.json", json.dumps(record, indent=2))
    lines = {"report": str(load_tool("page").write_report(output_dir))}
    sheets = sorted(output_dir.glob("samples/*.png"), key=lambda file: file.stat().st_mtime_ns)
    if sheets:
        lines["pictures"] = str(sheets[-1])
    if stopped:
        lines["to go on"] = resume_command(record)
    elif command or (command := generate_command(output_dir, record["config"])):
        lines["to try it"] = command
    for name, text in lines.items():
        say(name, text)
    config = record["config"]
    repo = config.get("logging", config).get("push_to_hub")
    if repo and not stopped:
        try:
            say("uploaded", load_tool("publish").publish(output_dir, repo, into=into))
        except UserError as error:
            if not into:
                raise
            say("not uploaded", str(error))


def read_record(output_dir: Path) -> dict[str, Any]:
    """Return run.json of a run."""
    return dict(json.loads((output_dir / "run.json").read_text(encoding="utf-8")))


def say(name: str, text: str) -> None:
    """Print a line with its name in front, which is bold on a terminal."""
    head = f"{name + ':':10}"
    print(from_tool("quiet", "paint", head, head, "bold", sys.stdout), text, flush=True)


def resume_command(record: dict[str, Any]) -> str:
    """Return the command that goes on with a run."""
    argv = [word for word in record["argv"] if not re.match(rf"--(train\.)?{RESUME}=", word)]
    for flag in (f"--{RESUME}", f"--train.{RESUME}"):
        if flag in argv:
            del argv[argv.index(flag) : argv.index(flag) + 2]
    count = int(os.environ.get("WORLD_SIZE", "1"))
    start = ["accelerate", "launch", "--num_processes", str(count)] if count > 1 else ["python"]
    if count > 1 and "FSDP_VERSION" in os.environ:  # which the launcher has set
        start += ["--use_fsdp", "--fsdp_version", "2"]
    flag = f"--train.{RESUME}" if "train" in record["config"] else f"--{RESUME}"
    return shlex.join([*start, *argv, flag, "latest"])


def generate_command(output_dir: Path, config: dict[str, Any]) -> str:
    """Return a command that edits a picture of the data with the newest LoRA; "" without one."""
    loras = sorted(output_dir.glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
    if not loras:
        return ""
    with safe_open(loras[-1], framework="pt") as file:
        about = json.loads((file.metadata() or {}).get("image_edit_lora", "{}"))
    base = about.get("base_model") or about.get("pretrained_model_name_or_path") or "BASE"
    prompts = about.get("prompts") or [config.get("instance_prompt") or ""]
    picture = first_picture(config)
    words = ["python", "generate.py", "--pretrained_model_name_or_path", base]
    words += ["--lora", str(loras[-1]), *(["--image", str(picture)] if picture else [])]
    words += ["--prompt", prompts[0], "--scales", "0,0.5,1"]
    return shlex.join([*words, "--output", str(output_dir / "strip.png")])


def first_picture(config: dict[str, Any]) -> Path | None:
    """Return the first before of a run's data."""
    folders: list[tuple[Path, str]] = []
    for ds in config.get("data", {}).get("dataset_configs", []):
        root = Path(ds["train_data_dir"])
        if ds["target_dir"]:
            folders += [(root / folder, "") for folder in ds["reference_dirs"]]
        for items in ds["reference_configs"].values():
            images = ds["image_configs"]
            folders += [(root, images[item["image"]]["suffix"]) for item in items]
    folders += [(Path(config["before_data_dir"]), "")] if config.get("before_data_dir") else []
    with contextlib.suppress(UserError):
        for folder, suffix in folders:
            found = [its[0] for stem, its in list_images(folder).items() if stem.endswith(suffix)]
            if found:
                return found[0]
    return None


def main() -> None:
    """Say it of the run whose folder is named."""
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "run.json").is_file():
        raise UserError("usage: python tools/after.py OUTPUT_DIR (of a run)")
    folder = Path(sys.argv[1])
    tell(folder, stopped=not read_record(folder).get("finished"))


if __name__ == "__main__":
    run_script(main)
