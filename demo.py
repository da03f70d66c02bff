"""See it work on a laptop: cache, train a LoRA, generate, measure, in minutes on two CPU cores.

    python demo.py              # edits: the real commands, picture: outputs/demo/demo.png
    python demo.py pairedit     # a slider from 3 pairs: outputs/demo_pairedit/demo.png
    python demo.py dreambooth   # a change from 10 pairs: outputs/demo_dreambooth/demo.png
    python demo.py ... --quick      # trains and draws less: worse results, the same to see
    python demo.py pairedit --train_iteration 1000    # other settings for the training
    python demo.py ... --rebuild    # make its tiny base model in demo/ again from nothing

qwen_edit: the base is a real QwenImageEditPlusPipeline (2511 type) with 2 million parameters
that copies its reference and knows three other lights by name. The LoRA learns evening light from
one side, which no curve of colours makes, from ten photo pairs; three others judge it.
pairedit: the base is a real FluxPipeline with 1 million parameters that draws faces. The slider
learns to turn hair grey, from three pairs; faces of other seeds and a drawn one judge it.
dreambooth: the base is a real StableDiffusionPipeline with 1.5 million parameters that draws
faces, too. The change is learned from ten pairs; other seeds and eight drawn photos judge it.

All figures are evaluate.py's; the demos of faces add two metrics to it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
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
    Checkpoints,
    UserError,
    contact_sheet,
    load_script,
    open_rgb,
    read_config,
    run_script,
    save_text,
)

ROOT = Path(__file__).resolve().parent

CONFIG, OUTPUT_DIR = Path("configs/demo_qwen_edit.yaml"), Path("outputs/demo")
PAIRS_DIR = Path("data/photo_pairs")
BASE_DIR = Path("demo/qwen_edit_base")
HELD_OUT = ("astronaut0", "chelsea1", "coffee2")  # neither base nor LoRA ever sees them

FACE_CONFIG = Path("configs/demo_pairedit.yaml")
FACE_OUTPUT_DIR = Path("outputs/demo_pairedit")
FACE_PAIRS_DIR, FLUX_BASE_DIR = Path("demo/slider_pairs"), Path("demo/flux_slider_base")

HAIR_CONFIG = Path("configs/demo_dreambooth.yaml")
HAIR_OUTPUT_DIR = Path("outputs/demo_dreambooth")
HAIR_PAIRS_DIR, SD_BASE_DIR = Path("demo/hair_pairs"), Path("demo/sd_pairs_base")
HAIR_PROMPT = "picture of a person"
HAIR_COUNT = 8  # seeds, and held-out photos
HAIR_SCALES = (-1.0, -0.5, 0.0, 0.5, 1.0)
PHOTO_SCALES = (0.0, 0.5, 1.0)
LORAS = {  # {folder: scales of its strips}
    "lora": HAIR_SCALES,
    "after_only": (0.0, 1.0, 2.0, 4.0),
}


# --- 1. commands, figures, sheets -----------------------------------------------------------------


def begin(output_dir: Path) -> float:
    """Delete what an earlier demo left; return the time. Raises UserError: it still runs."""
    if output_dir.exists():
        with Checkpoints(output_dir).only_run():
            pass
        print(f"deleting {output_dir} of an earlier demo")
        shutil.rmtree(output_dir)
    return time.monotonic()


def run_command(shown: str) -> None:
    """Print a command, run it with this interpreter; SystemExit with its code if it fails."""
    print(f"\n$ {shown}", flush=True)
    with subprocess.Popen([sys.executable, *shlex.split(shown)[1:]]) as process:
        try:
            code = process.wait()
        except BaseException:  # Ctrl-C, which it got, too, or SIGTERM
            process.terminate()
            raise
    if code:
        print(f"demo: stopped, exit code {code} from: {shown}", file=sys.stderr)
        raise SystemExit(code)


def joined(scales: Sequence[float]) -> str:
    """Join numbers with commas: [0.0, 0.5] -> "0,0.5"."""
    return ",".join(f"{scale:g}" for scale in scales)


def measure_edits(results: Path, befores: Path, afters: Path, **suffixes: str) -> Any:
    """Return (evaluate.py's report, its rows) over pictures whose true afters are known."""
    evaluate = load_script(Path("evaluate.py"))
    config = evaluate.Config(
        results=[str(results)],
        before_dir=befores,
        after_dir=afters,
        metrics=["psnr", "ssim", "region", "gain"],
        **suffixes,
    )
    rows, notes, problems = evaluate.find_comparisons(config)
    if problems:
        raise UserError("; ".join(problems))
    return evaluate.evaluate(config, rows, notes), rows


def measure_faces(
    faces: Any, results: Path, ages: dict[str, float], series: Callable[[str], str]
) -> dict[str, Any]:
    """Return evaluate.py's report over strips: hair and the rest, compared with scale 0.

    faces: demo/rebuild.py.
    ages: of the two sides of a training pair; hair of 1 is one such change.
    series: name of a picture -> what it is shown as; "" leaves it out.
    """
    evaluate: Any = load_script(Path("evaluate.py"))
    young, old = ages.values()

    def arrays(*pixels: torch.Tensor) -> list[np.ndarray]:
        return [x.permute(1, 2, 0).double().numpy() for x in pixels]

    def hair(*pixels: torch.Tensor) -> float:
        edited, before = arrays(*pixels)
        place = faces.from_centre(before)
        change = faces.face_age(edited, place) - faces.face_age(before, place)
        return change / (old - young)

    def rest(*pixels: torch.Tensor) -> float:
        edited, before = arrays(*pixels)
        return faces.content_change(before, edited, faces.from_centre(before))

    needs = "edited before"
    evaluate.METRICS["hair"] = evaluate.Metric(hair, needs, 0, "of the pairs' change")
    evaluate.METRICS["rest"] = evaluate.Metric(rest, needs, 0, "mean absolute change")
    evaluate.STRENGTHS, evaluate.CONTENTS = ("hair",), ("rest",)

    config = evaluate.Config(results=[str(results)], metrics=["hair", "rest"])
    rows = evaluate.find_results(config, "", results, edited=False)
    rows = [row._replace(series=series(row.name), before=None) for row in rows]
    rows = [row for row in rows if row.series]
    rows.sort(key=lambda row: (row.series, row.scale))
    rows = evaluate.match(rows, {}, [])  # without a before: that is scale 0
    return evaluate.evaluate(config, rows, [])


def write_figures(output_dir: Path, start: float, figures: dict[str, Any]) -> None:
    """Write demo.json; say where the results are."""
    figures["seconds"] = round(time.monotonic() - start, 1)
    save_text(output_dir / "demo.json", json.dumps(figures, indent=2) + "\n")
    print(f"{figures['seconds']:.0f} s in all")
    print(f"picture: {output_dir / 'demo.png'}, figures: {output_dir / 'demo.json'}")


def strips_of(report: dict[str, Any], series: str) -> list[list[Path]]:
    """Return the files of evaluate.py's report, a list for each name and seed, by scale."""
    found: dict[Any, list[Path]] = {}
    for row in report["rows"]:
        if row["series"] == series:
            found.setdefault((row["name"], row["seed"]), []).append(row["edited"])
    return list(found.values())


def draw_faces(path: Path, sections: Sequence[tuple[Sequence[str], Any]]) -> None:
    """Draw each (heads, rows of files) below the one before; pixels stay visible."""
    side = 128
    sheets = []
    for heads, rows in sections:
        images = [
            [open_rgb(file).resize((side, side), Image.Resampling.NEAREST) for file in row]
            for row in rows
        ]
        sheets.append(contact_sheet(images, heads, cell_px=side))
    width = max(sheet.width for sheet in sheets)
    whole = Image.new("RGB", (width, sum(sheet.height for sheet in sheets)), "white")
    for number, sheet in enumerate(sheets):
        whole.paste(sheet, (0, sum(above.height for above in sheets[:number])))
    whole.save(path)


# --- 2. qwen_edit: an edit from ten pairs ---------------------------------------------------------


def run_qwen_edit(settings: str, quick: bool) -> None:
    """Cache, train, generate with and without the LoRA, measure, draw."""
    start = begin(OUTPUT_DIR)
    if quick:
        settings = f" --train.max_train_steps 150 --validation.steps null{settings}"
    for script in ("cache_embeddings.py", "train_qwen_edit.py"):
        run_command(f"python {script} --config {CONFIG}{settings}")

    lines = []
    for name in HELD_OUT:
        prompt = (PAIRS_DIR / f"{name}_T.txt").read_text(encoding="utf-8").strip()
        image = (PAIRS_DIR / f"{name}_R.png").as_posix()
        lines.append(json.dumps({"images": [image], "prompt": prompt, "name": name}))
    save_text(OUTPUT_DIR / "held_out.jsonl", "\n".join(lines) + "\n")
    run_command(
        f"python generate.py --pretrained_model_name_or_path {BASE_DIR}"
        f" --lora {OUTPUT_DIR}/pytorch_lora_weights.safetensors"
        f" --table {OUTPUT_DIR}/held_out.jsonl --output_dir {OUTPUT_DIR}/generated"
        " --scales 0,1 --seed 0 --html --num_inference_steps 4 --true_cfg_scale 1"
    )

    ends = {"before_suffix": "_R", "after_suffix": "_T"}
    report, rows = measure_edits(OUTPUT_DIR / "generated", PAIRS_DIR, PAIRS_DIR, **ends)
    base, lora = (report["columns"][f"scale {scale}"]["means"] for scale in (0, 1))
    skill = 1 - lora["error_inside"] / base["error_inside"]
    draw_photos(OUTPUT_DIR / "demo.png", rows)
    print(
        f"\n{len(HELD_OUT)} photos that were never trained on: where the edit belongs, the LoRA"
        f" takes away {skill:.1%} of the squared error that the base leaves"
    )
    figures = {"skill": skill, "psnr_db": lora["psnr"], "columns": report["columns"]}
    write_figures(OUTPUT_DIR, start, figures)
    print(f"to compare: {OUTPUT_DIR}/generated/page.html, the run: {OUTPUT_DIR}/report.html")


def draw_photos(path: Path, rows: list[Any]) -> None:
    """Draw before | base | LoRA | after, one row per photo."""
    edited = {(row.name, row.scale): row for row in rows}
    images = []
    for name in HELD_OUT:
        base, lora = (edited[name, scale] for scale in (0, 1))
        size = open_rgb(lora.edited).size
        files = lora.before, base.edited, lora.edited, lora.after
        images.append([ImageOps.fit(open_rgb(file), size) for file in files])
    heads = ("before", "base", "LoRA", "after")
    contact_sheet(images, heads, HELD_OUT, cell_px=320).save(path)


# --- 3. pairedit: a slider from three pairs -------------------------------------------------------


def run_pairedit(settings: str, quick: bool) -> None:
    """Train a slider on three pairs, draw strips, edit a picture, measure, draw the sheet."""
    start = begin(FACE_OUTPUT_DIR)
    faces = load_script(Path("demo/rebuild.py"))
    if quick:
        settings = f" --train_iteration 200 --save_per_steps 200 --count_gen 4{settings}"
    run_command(f"python train_pairedit.py --config {FACE_CONFIG}{settings}")
    run_command(f"python generate.py --config {FACE_CONFIG}{settings} --image_format png --html")

    photo = FACE_OUTPUT_DIR / "photo.png"
    face = faces.random_face(np.random.RandomState(7))
    faces.write_picture(faces.draw_face(face), photo)
    lora = sorted(FACE_OUTPUT_DIR.glob("models/age/*/*epoch.safetensors"))[-1]
    run_command(
        f"python generate.py --pretrained_model_name_or_path {FLUX_BASE_DIR}"
        f" --lora {lora.as_posix()} --image {photo.as_posix()} --resolution {faces.FACE_PX}"
        f' --max_sequence_length {faces.TEXT_TOKENS} --skip 10 --prompt "image of a person"'
        f" --scales {read_config(str(FACE_CONFIG))['scales']}"
        f" --output {(FACE_OUTPUT_DIR / 'photo_strip.png').as_posix()}"
    )

    print("\nhair (as a share of the pairs' change) and the rest, of other seeds and a photo:")
    names = {"photo_strip": "photo"}
    report = measure_faces(
        faces, FACE_OUTPUT_DIR, faces.PAIR_AGES, lambda name: names.get(name, "seeds")
    )

    scales = sorted({row["scale"] for row in report["rows"]})
    hair = [report["columns"][f"seeds scale {scale:g}"]["means"]["hair"] for scale in scales]
    whole = float(np.interp(1, hair, scales))
    print(f"one whole change of the pairs lies at scale {whole:.2f} of other seeds")

    heads = [f"scale {scale:g}" for scale in scales]
    stages = [(stage, n) for n in range(3) for stage in faces.PAIR_AGES]
    sections = [
        (("before", "after") * 3, [[FACE_PAIRS_DIR / f"age/{s}/{n}.png" for s, n in stages]]),
        (heads, strips_of(report, "seeds")[:5]),
        (["photo, scale 0", *heads[1:]], strips_of(report, "photo")),
    ]
    draw_faces(FACE_OUTPUT_DIR / "demo.png", sections)
    figures = {name: report[name] for name in ("columns", "curve")} | {"whole_change_at": whole}
    write_figures(FACE_OUTPUT_DIR, start, figures)
    pages = sorted(FACE_OUTPUT_DIR.glob("*/age/*/*.html"), key=lambda page: page.name)
    print(f"to compare: {pages[0]}, the run: {pages[-1]}")


# --- 4. dreambooth: a change from ten pairs -------------------------------------------------------


def run_dreambooth(settings: str, quick: bool) -> None:
    """Train on ten pairs (and on their afters alone), draw strips, edit photos, measure."""
    start = begin(HAIR_OUTPUT_DIR)
    faces = load_script(Path("demo/rebuild.py"))
    folder, count, steps = HAIR_OUTPUT_DIR.as_posix(), HAIR_COUNT, 25
    if quick:
        settings = f" --max_train_steps 80 --checkpointing_steps 80{settings}"
        count, steps = 4, 12
    train = f"python train_dreambooth_pairs.py --config {HAIR_CONFIG}{settings}"
    run_command(train)
    run_command(  # as DreamBooth is trained: over all noise levels
        f"{train} --output_dir {folder}/after_only --use_image_pairs false"
        " --before_data_dir null --after_data_dir null"
        f" --instance_data_dir {HAIR_PAIRS_DIR}/after"
        " --pair_objective slider --timestep_min 0"
    )

    draw = (
        f"python generate.py --pretrained_model_name_or_path {SD_BASE_DIR}"
        f" --num_inference_steps {steps} --guidance_scale 1"
        f" --lora {folder}/{{}}/pytorch_lora_weights.safetensors"
    )
    seeds = ",".join(map(str, range(count)))
    for name, scales in LORAS.items():
        run_command(
            f'{draw.format(name)} --prompt "{HAIR_PROMPT}" --resolution {faces.FACE_PX}'
            f" --seed {seeds} --scales={joined(scales)}"
            f" --output {folder}/{name}_strip.png"
        )

    held_out = HAIR_OUTPUT_DIR / "held_out"
    faces.draw_face_pairs(held_out, 7, count, faces.HAIR_AGES)
    run_command(
        f"{draw.format('lora')} --input_dir {held_out.as_posix()}/before"
        f" --output_dir {folder}/photos --scales {joined(PHOTO_SCALES)} --html"
    )

    print("\nhair (as a share of the pairs' change) and the rest, of other seeds:")
    names = {f"{name}_strip": name for name in LORAS}
    report = measure_faces(
        faces, HAIR_OUTPUT_DIR, faces.HAIR_AGES, lambda name: names.get(name, "")
    )
    (at,) = report["curve"]["matched"]
    ratio = at["content"]["lora"] / at["content"]["after_only"]
    print(f"at equal hair the pairs change the rest {ratio:.2f} times as much as the afters")

    print(f"\n{count} photos that were never trained on:")
    afters = held_out / "after"
    edits, rows = measure_edits(HAIR_OUTPUT_DIR / "photos", held_out / "before", afters)
    draw_changes(faces, report, rows)
    figures = {name: report[name] for name in ("columns", "curve")}
    figures |= {"content_ratio": ratio, "photos": edits["columns"]}
    write_figures(HAIR_OUTPUT_DIR, start, figures)
    print(f"to compare: {folder}/photos/page.html, the run: {folder}/lora/report.html")


def draw_changes(faces: Any, report: dict[str, Any], rows: list[Any]) -> None:
    """Draw five pairs, five strips, five photos."""
    pairs = [[HAIR_PAIRS_DIR / f"{s}/{n}.png" for n in range(5)] for s in faces.HAIR_AGES]
    photos = []
    for name in sorted({row.name for row in rows})[:5]:
        its = [row for row in rows if row.name == name]  # by scale
        photos.append([its[0].before, *(row.edited for row in its), its[0].after])
    scales, photo_scales = (
        [f"scale {scale:g}" for scale in found] for found in (HAIR_SCALES, PHOTO_SCALES)
    )
    sections = [
        (["five of ten", "pairs"], pairs),
        (scales, strips_of(report, "lora")[:5]),
        (["a photo", *photo_scales, "true after"], photos),
    ]
    draw_faces(HAIR_OUTPUT_DIR / "demo.png", sections)


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
    parser.add_argument("--quick", action="store_true", help="train and draw less: worse results")
    parser.add_argument("--rebuild", action="store_true", help="make its base model again and stop")
    parser.add_argument("--seed", type=int, default=0, help="of --rebuild")
    args, settings = parser.parse_known_args()
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # its command ends with it
    if args.rebuild:
        load_script(Path("demo/rebuild.py")).rebuild(args.demo, args.seed)
        return
    if missing := [str(path) for path in NEEDED[args.demo] if not path.exists()]:
        how = f"python demo.py {args.demo} --rebuild makes the base"
        raise UserError(f"{', '.join(missing)} is missing ({how})")
    DEMOS[args.demo]("".join(f" {shlex.quote(setting)}" for setting in settings), args.quick)


if __name__ == "__main__":
    run_script(main)
