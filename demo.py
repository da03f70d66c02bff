"""See it work on a laptop: cache, train a LoRA, generate, measure, in minutes on two CPU cores.

    python demo.py              # edits: the real commands, picture: outputs/demo/demo.png
    python demo.py pairedit     # a slider from 3 pairs: outputs/demo_pairedit/demo.png
    python demo.py dreambooth   # a change from 10 pairs: outputs/demo_dreambooth/demo.png
    python demo.py pairedit --train_iteration 1000    # other settings for the training
    python demo.py ... --rebuild    # make its tiny base model in demo/ again from nothing

qwen_edit: the base is a real QwenImageEditPlusPipeline (2511 type) with 2 million parameters that
can only copy its reference. The LoRA learns the edit from ten photo pairs; three others judge it.
pairedit: the base is a real FluxPipeline with 1 million parameters that draws faces. The slider
learns to turn hair grey, from three pairs; faces of other seeds, and a drawn one, judge it.
dreambooth: the base is a real StableDiffusionPipeline with 1.5 million parameters that draws larger
faces; the change is learned from ten pairs and judged on other seeds and on eight drawn photos.

All figures are evaluate.py's; the demos of faces add two metrics to it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from utils import (
    UserError,
    contact_sheet,
    load_script,
    open_rgb,
    read_config,
    run_script,
    save_text,
)

ROOT = Path(__file__).resolve().parent
ACCELERATE = "accelerate.commands.accelerate_cli"

CONFIG, OUTPUT_DIR = Path("configs/demo_qwen_edit.yaml"), Path("outputs/demo")
PAIRS_DIR, BASE_DIR = Path("data/photo_pairs"), Path("demo/qwen_edit_base")
HELD_OUT = ("astronaut0", "chelsea1", "coffee2")  # neither the base nor the LoRA ever sees them

FACE_CONFIG, FACE_OUTPUT_DIR = Path("configs/demo_pairedit.yaml"), Path("outputs/demo_pairedit")
FACE_PAIRS_DIR, FLUX_BASE_DIR = Path("demo/slider_pairs"), Path("demo/flux_slider_base")

HAIR_CONFIG = Path("configs/demo_dreambooth.yaml")
HAIR_OUTPUT_DIR = Path("outputs/demo_dreambooth")
HAIR_PAIRS_DIR, SD_BASE_DIR = Path("demo/hair_pairs"), Path("demo/sd_pairs_base")
HAIR_PROMPT = "picture of a person"
HAIR_COUNT = 8  # seeds, and held-out photos
HAIR_SCALES, PHOTO_SCALES = (-1.0, -0.5, 0.0, 0.5, 1.0), (0.0, 0.5, 1.0)
LORAS = {"lora": HAIR_SCALES, "after_only": (0.0, 1.0, 2.0, 4.0)}  # {folder: scales of its strips}


# --- 1. commands, figures, sheets -----------------------------------------------------------------


def begin(output_dir: Path) -> float:
    """Delete what an earlier demo left, since no trainer overwrites it; return the time."""
    if output_dir.exists():
        print(f"deleting {output_dir} of an earlier demo")
        shutil.rmtree(output_dir)
    return time.monotonic()


def run_command(shown: str, module: str = "") -> None:
    """Print a command, run it with this interpreter; SystemExit with its code if it fails.

    module: what stands for the first word, e.g. "accelerate.commands.accelerate_cli".
    """
    print(f"\n$ {shown}", flush=True)
    start = [sys.executable, "-m", module] if module else [sys.executable]
    done = subprocess.run([*start, *shlex.split(shown)[1:]], check=False)
    if done.returncode:
        print(f"demo: stopped, exit code {done.returncode} from: {shown}", file=sys.stderr)
        raise SystemExit(done.returncode)


def joined(scales: Sequence[float]) -> str:
    """[0.0, 0.5] -> "0,0.5"."""
    return ",".join(f"{scale:g}" for scale in scales)


def measure_edits(
    results: Path, befores: Path, afters: Path, ends: Sequence[str] = ("", "")
) -> Any:
    """(evaluate.py's report, its rows) over pictures whose true afters are known."""
    evaluate = load_script(Path("evaluate.py"))
    config = evaluate.Config(
        results=[str(results)],
        before_dir=befores,
        after_dir=afters,
        before_suffix=ends[0],
        after_suffix=ends[1],
        metrics=["psnr", "ssim", "region", "gain"],
    )
    rows, notes, problems = evaluate.find_comparisons(config)
    if problems:
        raise UserError("; ".join(problems))
    return evaluate.evaluate(config, rows, notes), rows


def measure_faces(
    faces: Any, results: Path, ages: dict[str, float], series: Callable[[str], str]
) -> dict[str, Any]:
    """evaluate.py's report over strips: hair and the rest, compared with scale 0 of the strip.

    faces: demo/rebuild.py; ages: of the two sides of a training pair, hair of 1 is one such change;
    series: name of a picture -> what it is shown as, "" leaves it out.
    """
    evaluate: Any = load_script(Path("evaluate.py"))
    young, old = ages.values()

    def arrays(*pixels: torch.Tensor) -> list[np.ndarray]:
        return [x.permute(1, 2, 0).double().numpy() for x in pixels]

    def hair(*pixels: torch.Tensor) -> float:
        edited, before = arrays(*pixels)
        place = faces.from_centre(before)
        return (faces.face_age(edited, place) - faces.face_age(before, place)) / (old - young)

    def rest(*pixels: torch.Tensor) -> float:
        edited, before = arrays(*pixels)
        return faces.content_change(before, edited, faces.from_centre(before))

    evaluate.METRICS["hair"] = evaluate.Metric(hair, "edited before", 0, "of the pairs' change")
    evaluate.METRICS["rest"] = evaluate.Metric(rest, "edited before", 0, "mean absolute change")
    evaluate.STRENGTHS, evaluate.CONTENTS = ("hair",), ("rest",)
    config = evaluate.Config(results=[str(results)], metrics=["hair", "rest"])
    rows = evaluate.find_results(config, "", results, edited=False)
    rows = [row._replace(series=series(row.name), before=None) for row in rows]
    rows = evaluate.match([row for row in rows if row.series], {}, [])  # the before: scale 0
    rows.sort(key=lambda row: (row.series, row.scale))
    return evaluate.evaluate(config, rows, [])


def write_figures(output_dir: Path, start: float, figures: dict[str, Any]) -> None:
    """Write demo.json; say where the results are."""
    figures["seconds"] = round(time.monotonic() - start, 1)
    save_text(output_dir / "demo.json", json.dumps(figures, indent=2) + "\n")
    print(f"{figures['seconds']:.0f} s in all")
    print(f"picture: {output_dir / 'demo.png'}, figures: {output_dir / 'demo.json'}")


def strips_of(report: dict[str, Any], series: str) -> list[list[Path]]:
    """Files of evaluate.py's report, a list for each name and seed, by scale."""
    found: dict[Any, list[Path]] = {}
    for row in report["rows"]:
        if row["series"] == series:
            found.setdefault((row["name"], row["seed"]), []).append(row["edited"])
    return list(found.values())


def draw_faces(path: Path, sections: Sequence[tuple[Sequence[str], list[list[Path]]]]) -> None:
    """Rows of faces under heads, section below section; pixels stay visible."""
    side, sheets = 128, []
    for heads, rows in sections:
        images = [[open_rgb(file).resize((side, side), 0) for file in row] for row in rows]
        sheets.append(contact_sheet(images, heads, cell_px=side))
    width, height = max(s.width for s in sheets), sum(s.height for s in sheets)
    whole = Image.new("RGB", (width, height), "white")
    for number, sheet in enumerate(sheets):
        whole.paste(sheet, (0, sum(above.height for above in sheets[:number])))
    whole.save(path)


# --- 2. qwen_edit: an edit from ten pairs ---------------------------------------------------------


def run_qwen_edit(settings: str) -> None:
    """Cache, train, generate with and without the LoRA, measure, draw."""
    start, accelerate = begin(OUTPUT_DIR), f"accelerate launch {{}} --config {CONFIG}{settings}"
    run_command(accelerate.format("cache_embeddings.py"), ACCELERATE)
    run_command(accelerate.format("train_qwen_edit.py"), ACCELERATE)
    rows = []
    for name in HELD_OUT:
        prompt = (PAIRS_DIR / f"{name}_T.txt").read_text(encoding="utf-8").strip()
        image = (PAIRS_DIR / f"{name}_R.png").as_posix()
        rows.append(json.dumps({"images": [image], "prompt": prompt, "name": name}))
    save_text(OUTPUT_DIR / "held_out.jsonl", "\n".join(rows) + "\n")
    run_command(
        f"python generate.py --pretrained_model_name_or_path {BASE_DIR}"
        f" --lora {OUTPUT_DIR}/pytorch_lora_weights.safetensors"
        f" --table {OUTPUT_DIR}/held_out.jsonl --output_dir {OUTPUT_DIR}/generated"
        " --scales 0,1 --seed 0 --html --num_inference_steps 4 --true_cfg_scale 1"
    )
    ends = "_R", "_T"
    report, rows = measure_edits(OUTPUT_DIR / "generated", PAIRS_DIR, PAIRS_DIR, ends)
    base, lora = (report["columns"][f"scale {scale}"]["means"] for scale in (0, 1))
    skill = 1 - lora["error_inside"] / base["error_inside"]
    draw_edits(OUTPUT_DIR / "demo.png", rows)
    print(
        f"\n{len(HELD_OUT)} photos that were never trained on: where the edit belongs, the LoRA"
        f" takes away {skill:.1%} of the squared error that the base leaves"
    )
    write_figures(OUTPUT_DIR, start, {"skill": skill, "columns": report["columns"]})
    print(f"to compare: {OUTPUT_DIR}/generated/page.html, the run: {OUTPUT_DIR}/report.html")


def draw_edits(path: Path, rows: list[Any]) -> None:
    """before | base | LoRA | after, one row per photo."""
    edited = {(row.name, row.scale): row for row in rows}
    images = []
    for name in HELD_OUT:
        base, lora = (edited[name, scale] for scale in (0, 1))
        size = open_rgb(lora.edited).size
        files = lora.before, base.edited, lora.edited, lora.after
        images.append([ImageOps.fit(open_rgb(file), size) for file in files])
    contact_sheet(images, ("before", "base", "LoRA", "after"), HELD_OUT, cell_px=320).save(path)


# --- 3. pairedit: a slider from three pairs -------------------------------------------------------


def run_pairedit(settings: str) -> None:
    """Train a slider on three pairs, draw strips, edit a picture, measure, draw the sheet."""
    start, faces = begin(FACE_OUTPUT_DIR), load_script(Path("demo/rebuild.py"))
    train = f"accelerate launch train_pairedit.py --config {FACE_CONFIG}{settings}"
    run_command(train, ACCELERATE)
    run_command(f"python generate.py --config {FACE_CONFIG}{settings} --image_format png --html")
    photo = FACE_OUTPUT_DIR / "photo.png"
    faces.write_picture(faces.draw_face(faces.random_face(np.random.RandomState(7))), photo)
    lora = sorted(FACE_OUTPUT_DIR.glob("models/age/*/*epoch.safetensors"))[-1]
    run_command(
        f"python generate.py --pretrained_model_name_or_path {FLUX_BASE_DIR}"
        f" --lora {lora.as_posix()} --image {photo.as_posix()} --resolution {faces.FACE_PX}"
        f' --max_sequence_length {faces.TEXT_TOKENS} --skip 10 --prompt "image of a person"'
        f" --scales {read_config(str(FACE_CONFIG))['scales']}"
        f" --output {(FACE_OUTPUT_DIR / 'photo_strip.png').as_posix()}"
    )
    print("\nhair as a share of the pairs' change, and the rest, of other seeds and of a photo:")
    report = measure_faces(
        faces,
        FACE_OUTPUT_DIR,
        faces.PAIR_AGES,
        lambda name: "photo" if name == "photo_strip" else "seeds",
    )
    scales = [f"scale {scale:g}" for scale in sorted({row["scale"] for row in report["rows"]})]
    pairs = [FACE_PAIRS_DIR / f"age/{stage}/{n}.png" for n in range(3) for stage in faces.PAIR_AGES]
    sections = [
        (("before", "after") * 3, [pairs]),
        (scales, strips_of(report, "seeds")[:5]),
        (["a photo", *scales[1:]], strips_of(report, "photo")),
    ]
    draw_faces(FACE_OUTPUT_DIR / "demo.png", sections)
    write_figures(FACE_OUTPUT_DIR, start, {"columns": report["columns"], "curve": report["curve"]})
    pages = sorted(FACE_OUTPUT_DIR.glob("*/age/*/*.html"), key=lambda page: page.name)
    print(f"to compare: {pages[0]}, the run: {pages[-1]}")


# --- 4. dreambooth: a change from ten pairs -------------------------------------------------------


def run_dreambooth(settings: str) -> None:
    """Train on ten pairs (and on their afters alone), draw strips, edit photos, measure."""
    start, faces = begin(HAIR_OUTPUT_DIR), load_script(Path("demo/rebuild.py"))
    folder = HAIR_OUTPUT_DIR.as_posix()
    train = f"accelerate launch train_dreambooth_pairs.py --config {HAIR_CONFIG}{settings}"
    run_command(train, ACCELERATE)
    run_command(  # as DreamBooth is trained: over all noise levels
        f"{train} --output_dir {folder}/after_only --use_image_pairs false --before_data_dir null"
        f" --after_data_dir null --pair_objective slider --timestep_min 0"
        f" --instance_data_dir {HAIR_PAIRS_DIR / 'after'}",
        ACCELERATE,
    )
    draw = f"python generate.py --pretrained_model_name_or_path {SD_BASE_DIR}"
    draw += f" --num_inference_steps 25 --guidance_scale 1 --batch_size {HAIR_COUNT}"
    draw += f" --lora {folder}/{{}}/pytorch_lora_weights.safetensors"
    seeds = ",".join(map(str, range(HAIR_COUNT)))
    for name, scales in LORAS.items():
        run_command(
            f'{draw.format(name)} --prompt "{HAIR_PROMPT}" --resolution {faces.PHOTO_PX}'
            f" --seed {seeds} --scales={joined(scales)} --output {folder}/{name}_strip.png"
        )
    held_out, photos = HAIR_OUTPUT_DIR / "held_out", HAIR_OUTPUT_DIR / "photos"
    faces.draw_face_pairs(held_out, 7, HAIR_COUNT, faces.HAIR_AGES, faces.PHOTO_PX)
    run_command(
        f"{draw.format('lora')} --input_dir {held_out.as_posix()}/before"
        f" --output_dir {folder}/photos --scales {joined(PHOTO_SCALES)} --html"
    )
    print("\nhair as a share of the pairs' change, and the rest, of other seeds:")
    names = {f"{name}_strip": name for name in LORAS}
    report = measure_faces(
        faces, HAIR_OUTPUT_DIR, faces.HAIR_AGES, lambda name: names.get(name, "")
    )
    (at,) = report["curve"]["matched"]
    ratio = at["content"]["lora"] / at["content"]["after_only"]
    print(f"for an equal change of the hair, the pairs change the rest {ratio:.2f} times as much")
    print(f"\n{HAIR_COUNT} photos that were never trained on:")
    edits, rows = measure_edits(photos, held_out / "before", held_out / "after")
    five = [str(n) for n in range(5)]
    files = {(row.name, row.scale): row.edited for row in rows}
    sections = [
        (
            ["five of ten", "pairs"],
            [[HAIR_PAIRS_DIR / f"{s}/{n}.png" for n in five] for s in faces.HAIR_AGES],
        ),
        ([f"scale {scale:g}" for scale in HAIR_SCALES], strips_of(report, "lora")[:5]),
        (
            ["a photo", *(f"scale {scale:g}" for scale in PHOTO_SCALES), "true after"],
            [
                [
                    held_out / f"before/{n}.png",
                    *(files[n, s] for s in PHOTO_SCALES),
                    held_out / f"after/{n}.png",
                ]
                for n in five
            ],
        ),
    ]
    draw_faces(HAIR_OUTPUT_DIR / "demo.png", sections)
    figures = {"columns": report["columns"], "curve": report["curve"], "content_ratio": ratio}
    write_figures(HAIR_OUTPUT_DIR, start, figures | {"photos": edits["columns"]})
    print(f"to compare: {folder}/photos/page.html, the run: {folder}/lora/report.html")


# --- 5. main --------------------------------------------------------------------------------------

DEMOS = {"qwen_edit": run_qwen_edit, "pairedit": run_pairedit, "dreambooth": run_dreambooth}
NEEDED = {
    "qwen_edit": (BASE_DIR, CONFIG, PAIRS_DIR),
    "pairedit": (FLUX_BASE_DIR, FACE_CONFIG, FACE_PAIRS_DIR),
    "dreambooth": (SD_BASE_DIR, HAIR_CONFIG, HAIR_PAIRS_DIR),
}


def main() -> None:
    """Run a demo, or make its base model again."""
    about = "The demos on two CPU cores; other flags go to the training commands."
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("demo", nargs="?", choices=DEMOS, default="qwen_edit")
    parser.add_argument("--rebuild", action="store_true", help="make its base model again and stop")
    parser.add_argument("--seed", type=int, default=0, help="of --rebuild")
    args, settings = parser.parse_known_args()
    os.chdir(ROOT)
    if args.rebuild:
        load_script(Path("demo/rebuild.py")).rebuild(args.demo, args.seed)
        return
    if missing := [str(path) for path in NEEDED[args.demo] if not path.exists()]:
        raise UserError(
            f"{', '.join(missing)} is missing (python demo.py {args.demo} --rebuild makes the base)"
        )
    DEMOS[args.demo]("".join(f" {shlex.quote(setting)}" for setting in settings))


if __name__ == "__main__":
    run_script(main)
