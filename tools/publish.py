"""Upload a finished run to the Hugging Face Hub: LoRA, model card, settings, sheets.

    python tools/publish.py OUTPUT_DIR USER/NAME              # private; --public for everybody
    python tools/publish.py OUTPUT_DIR USER/NAME --into smile # a folder of it, beside others

A trainer's push_to_hub does the same at its end. After an interruption type it again: files that
have arrived are not sent a second time.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import UserError, named, run_script

FILES = ["*.safetensors", "README.md", "config.yaml", "samples/*.png"]


def publish(folder: Path, repo: str, private: bool = True, into: str = "") -> str:
    """Upload what lies in a run's folder (no checkpoints); return the address. Raises UserError.

    A repository that exists keeps what it is, private or public. into: a folder of it.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    words = shlex.join([str(folder), repo, *(["--into", into] if into else [])])
    again = f"it is safe in {folder}; python tools/publish.py {words} goes on"
    with named(f"push_to_hub {repo} ({again})"):
        api = HfApi(library_name="image-edit-loras")
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        files = [file for pattern in FILES for file in sorted(folder.glob(pattern))]
        add = [
            CommitOperationAdd(
                Path(into, file.relative_to(folder)).as_posix(),
                card_of(file) if file.name == "README.md" else file,
            )
            for file in files
        ]
        api.create_commit(name, add, commit_message=f"LoRA of {folder.resolve().name}")
    return f"{api.endpoint}/{name}"


def card_of(file: Path) -> bytes:
    """Return a model card for readers elsewhere, who have none of the folders of this machine.

    The Hub refuses a card whose base_model is no USER/NAME.
    """
    text = file.read_text(encoding="utf-8").replace(f" {file.parent}/", " ")
    found = re.search(r"^base_model: (.*)\n", text, re.MULTILINE)
    if found and (Path(found[1]).is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", found[1])):
        text = text.replace(found[0], "", 1)
    return text.encode()


def main() -> None:
    """Read the command line, upload, print the address."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="output folder of a run")
    parser.add_argument("repo", help="USER/NAME")
    parser.add_argument("--public", action="store_true", help="for everybody to see")
    parser.add_argument("--into", default="", help="folder of the repository; default: its top")
    args = parser.parse_args()
    if not list(args.folder.glob("*.safetensors")):
        raise UserError(f"no LoRA (*.safetensors) in {args.folder}")
    print(publish(args.folder, args.repo, not args.public, args.into))


if __name__ == "__main__":
    run_script(main)
