"""Upload a finished run to the Hugging Face Hub: LoRA, model card, settings, sheets.

    python tools/publish.py OUTPUT_DIR USER/NAME              # private; --public for everybody

A trainer's push_to_hub does the same at its end. After an interruption type it again: files that
have arrived are not sent a second time.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import UserError, named, run_script

FILES = ["*.safetensors", "README.md", "config.yaml", "samples/*.png"]


def publish(folder: Path, repo: str, private: bool = True) -> str:
    """Upload what lies in a run's folder (no checkpoints); return the address. Raises UserError.

    A repository that exists keeps what it is, private or public.
    """
    from huggingface_hub import HfApi

    again = f"it is safe in {folder}; python tools/publish.py {folder} {repo} goes on"
    with named(f"push_to_hub {repo} ({again})"):
        api = HfApi(library_name="image-edit-loras")
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=FILES,
            ignore_patterns=["checkpoint-*", "earlier-*"],
            commit_message=f"LoRA of {folder.resolve().name}",
        )
    return f"{api.endpoint}/{name}"


def main() -> None:
    """Read the command line, upload, print the address."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="output folder of a run")
    parser.add_argument("repo", help="USER/NAME")
    parser.add_argument("--public", action="store_true", help="for everybody to see")
    args = parser.parse_args()
    if not list(args.folder.glob("*.safetensors")):
        raise UserError(f"no LoRA (*.safetensors) in {args.folder}")
    print(publish(args.folder, args.repo, not args.public))


if __name__ == "__main__":
    run_script(main)
