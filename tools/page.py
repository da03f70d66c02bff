"""Pages that open from disk: pictures side by side with a divider, and the report of a run.

Page: docs/pages.md

    python tools/page.py report OUTPUT_DIR    # draw report.html again, also while the run goes on

generate.py --html and evaluate.py --html call write_page(); the training scripts call
write_report() at their end. Nothing is loaded from elsewhere.
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
import json
import math
import mimetypes
import os
import re
import string
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import yaml
from PIL import Image
from safetensors import SafetensorError, safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import UserError, open_rgb, run_script, save_text


class PageRow(NamedTuple):
    """One view of a page: pictures of one scene, and what is known of them."""

    name: str
    columns: Mapping[str, Path]  # label: picture; the divider starts between the first and `right`
    prompt: str = ""
    seed: int | None = None
    figures: Mapping[str, float] = {}
    right: str = ""  # a label; "": the last


def write_page(path: Path, title: str, rows: Sequence[PageRow], embed: bool = False) -> None:
    """Write a page that compares the pictures of each row, to be opened from disk.

    Pictures stay where they are and are linked relative to `path`; with `embed` they are copied
    into the page, which can then be sent as one file. Nothing is loaded from elsewhere.

    Raises UserError: a picture cannot be read, or what lies at `path` is no page of this tool.
    """
    if path.exists() and PAGE[:200] not in path.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{path} is no page of this tool; move it")
    _save_page(path, title, "".join(_row_html(row, path.parent, embed) for row in rows))


def views_of(rows: Sequence[Any], ranking: Mapping[str, Any]) -> list[PageRow]:
    """Return a view per name, seed and prompt: before, every column, after; the best one on show.

    A row has name, seed, prompt, column, edited, before, after and figures, as evaluate.Result.
    ranking: "by" is the figure that is shown, or None, and "columns" has the best one first.
    """
    found, by = [], ranking["by"]
    order = ranking["columns"] if by else ranking["columns"][::-1]
    for name in dict.fromkeys(row.name for row in rows):
        its = [row for row in rows if row.name == name]
        views = dict.fromkeys((row.seed, row.prompt) for row in its if row.seed is not None)
        for view in views or [(None, None)]:  # what has no seed stands beside each of them
            there = [row for row in its if row.seed is None or (row.seed, row.prompt) == view]
            first = there[0]
            files = {"before": first.before, **{row.column: row.edited for row in there}}
            files = {label: file for label, file in {**files, "after": first.after}.items() if file}
            figures = {f"{by}, {r.column}": r.figures[by] for r in there if by in r.figures}
            best = next(column for column in order if column in files)
            prompt = view[1] or first.prompt or ""
            found.append(PageRow(name, files, prompt, view[0], figures, best))
    return found


def write_report(output_dir: Path) -> Path:
    """Write report.html of a run: curves, sheets over time, settings; returns where.

    Draws what metrics.jsonl, samples/ and run.json hold, also while the run goes on; what is
    missing is left out.

    Raises:
        UserError: the folder holds no run.
    """
    series = _read_series(output_dir / "metrics.jsonl")
    about = read_record(output_dir)
    if not (series or about):
        raise UserError(f"{output_dir}: no run here (no metrics.jsonl, no run.json)")
    sheets = sorted(output_dir.glob("samples/*.png"))
    steps = {int(m[1]): s for s in sheets if (m := re.fullmatch(r"step[_-](\d+)", s.stem))}
    views = {
        "What the model sees": {s.stem: s for s in sheets if s.stem in ("first_batch", "pairs")},
        "Validation over time": {f"step {step}": steps[step] for step in sorted(steps)},
    }
    reached = [f"step {max(points[-1][0] for points in series.values())}"] if series else []
    facts = [*reached, *(str(about[key]) for key in ("device", "started") if key in about)]
    body = f"<p>{html.escape(' · '.join(facts))}</p>\n{_charts_html(series)}"
    body += "".join(_row_html(PageRow(n, c), output_dir, False) for n, c in views.items() if c)
    rest = {key: value for key, value in about.items() if key not in ("config", "earlier")}
    for name, part in {"Settings": about.get("config"), "Command, code, versions": rest}.items():
        if part:
            text = html.escape(yaml.safe_dump(part, sort_keys=False, allow_unicode=True))
            body += f"<details><summary>{name}</summary><pre>{text}</pre></details>\n"
    path = output_dir / "report.html"
    _save_page(path, f"Run {output_dir.resolve().name}", body)
    write_card(output_dir)
    return path


CARD = """---
base_model: {base_model}
license: {license}
library_name: diffusers
tags: [image-to-image, lora, qwen-image-edit, {flavour}]
---
# LoRA for {base_model}

Trained with {script} to step {step}; {method}, r {r}, alpha {lora_alpha} (folded into the weights:
load it at scale 1). References were encoded with `reference_area: {reference_area}`; generate.py
applies that by itself. ComfyUI loads lora and lokr as they are, and dora after
`tools/convert_lora.py --to comfyui`.

```python
import torch
from diffusers import {pipeline_class}

pipe = {pipeline_class}.from_pretrained("{base_model}", torch_dtype=torch.bfloat16)
{load}
```

Instructions it was trained with:
{listed}
"""
LORA = 'pipe.load_lora_weights("{file}")'
LOKR = """tensors, about = pipe.lora_state_dict("{file}", return_lora_metadata=True)
pipe.transformer.load_lora_adapter(tensors, metadata=about)  # LoKr has no loader of its own"""


def write_card(output_dir: Path) -> None:
    """Write README.md, the model card, from what a LoRA of Qwen-Image-Edit says about itself."""
    about: dict[str, Any] = {}
    file = output_dir / "pytorch_lora_weights.safetensors"
    with contextlib.suppress(OSError, SafetensorError), safe_open(file, framework="pt") as lora:
        about = json.loads((lora.metadata() or {}).get("image_edit_lora", "{}"))
    if "flavour" in about:
        about["listed"] = "\n".join(f"- {prompt}" for prompt in about["prompts"])
        about["load"] = (LOKR if about["method"] == "lokr" else LORA).format(file=file.name)
        save_text(output_dir / "README.md", CARD.format(**about))


def _save_page(path: Path, title: str, body: str) -> None:
    save_text(path, string.Template(PAGE).substitute(title=html.escape(title), body=body))


def _row_html(row: PageRow, folder: Path, embed: bool) -> str:
    """Return a section of the page: all pictures in one place, two of them shown."""
    labels, last = [html.escape(label) for label in row.columns], len(row.columns) - 1
    shown = [*row.columns].index(row.right) if row.right else last
    try:
        sizes = [_picture_size(file) for file in row.columns.values()]
        links = [_link(file, folder, embed) for file in row.columns.values()]
    except OSError as error:  # missing, no picture
        raise UserError(f"page row '{row.name}': {error}") from error
    width, height = sizes[-1]
    pictures = ""
    for number, (label, link, (w, h)) in enumerate(zip(labels, links, sizes, strict=True)):
        # a photo that was cropped to its bucket lies on the result; another aspect is shown whole
        fit = ["cover"] * (abs(math.log(w * height / (h * width))) < 0.15)
        classes = " ".join(["left"] * (number == 0) + ["right"] * (number == shown) + fit)
        pictures += f'<img class="{classes}" src="{link}" alt="{label}" loading="lazy">\n'
    about = html.escape(row.prompt) + ("" if row.seed is None else f" <span>seed {row.seed}</span>")
    figures = " · ".join(f"{html.escape(name)} {value:.4g}" for name, value in row.figures.items())
    return (
        f'<section class="{"" if last else "single"}" '
        f'style="--x: 50%; --w: {width}; --h: {height}; --n: {last + 1}">\n'
        f"<h2>{html.escape(row.name)} <small>{figures}</small></h2>\n"
        f"<p><b>{labels[0]}</b> <b>{labels[shown]}</b></p>\n<figure>\n{pictures}"
        '<i role="slider" tabindex="0" aria-label="divider, percent" aria-valuemin="0" '
        f'aria-valuemax="100" aria-valuenow="50"></i>\n<figcaption>{about}</figcaption></figure>\n'
        f'<input type="range" max="{last}" value="{shown}" aria-label="right picture">\n'
        f"<ol>{''.join(f'<li>{label}' for label in labels)}</ol>\n</section>\n"
    )


def _picture_size(file: Path) -> tuple[int, int]:
    """Return (W, H) of a picture, px, upright."""
    with Image.open(file) as image:
        exif = Image.Image.getexif(image)  # KEEP: a PNG's own getexif() decodes the picture
        turned = exif.get(0x0112, 1) >= 5  # orientation: by 90 degrees
        return image.size[::-1] if turned else image.size


def _link(file: Path, folder: Path, embed: bool) -> str:
    """Return what an <img> takes: the way from `folder` to the file, or the file itself."""
    data = io.BytesIO()
    if tiff := file.suffix.lower() in (".tif", ".tiff"):  # browsers show none
        open_rgb(file).save(data, "PNG")
    elif not embed:
        return quote(Path(os.path.relpath(file, folder)).as_posix())
    kind = "image/png" if tiff else mimetypes.guess_type(file.name)[0]
    return f"data:{kind};base64,{base64.b64encode(data.getvalue() or file.read_bytes()).decode()}"


CHARTS = {  # values of metrics.jsonl whose names begin so share a chart of this title
    "loss": "loss",
    "validation_loss": "validation loss (q1: the least noise)",
    "validation_loss_ema": "validation loss of the moving average",
    "last_": "loss of the last step, by term",
    "lr": "learning rate",
    "seconds_per_step": "seconds per step",
    "memory_gb": "memory, GB",
}


def _read_series(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Return {name: [(step, value)]} of metrics.jsonl; leaves out what is no finite number."""
    series: dict[str, list[tuple[int, float]]] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for line in lines:
        with contextlib.suppress(Exception):  # it is being written, or damaged
            values = dict(json.loads(line))
            step = int(values.pop("step"))
            for name, value in values.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    series.setdefault(name, []).append((step, value))
    return series


def _charts_html(series: Mapping[str, list[tuple[int, float]]]) -> str:
    """Draw one chart per title of CHARTS, then one for each other value."""
    charts: dict[str, dict[str, list[tuple[int, float]]]] = {title: {} for title in CHARTS.values()}
    for name, points in series.items():
        start = max((start for start in CHARTS if name.startswith(start)), key=len, default="")
        charts.setdefault(CHARTS.get(start, name.replace("_", " ")), {})[name] = points
    drawn = "".join(_chart_svg(title, lines) for title, lines in charts.items() if lines)
    return f'<div class="charts">\n{drawn}</div>\n'


def _chart_svg(title: str, lines: Mapping[str, list[tuple[int, float]]]) -> str:
    """Draw curves over steps as inline SVG, with a legend that names their last values."""
    drawn = {name: thinned(points, 400) for name, points in lines.items()}
    every = [point for points in drawn.values() for point in points]
    left, right = min(x for x, _ in every), max(x for x, _ in every)
    low, high = min(y for _, y in every), max(y for _, y in every)
    is_loss = "loss" in title
    scale: Callable[[float], float] = math.log10 if is_loss and 0 < 10 * low < high else float
    low = low if is_loss else min(low, 0.0)  # a level is shown from zero
    low, high = (low - 1, high + 1) if low == high else (low, high)
    ticks = _ticks(low, high) if scale is float else _log_ticks(low, high)
    width, height = max(right - left, 1), scale(high) - scale(low)

    def place(x: float, y: float) -> tuple[float, float]:
        y = (scale(y) - scale(low)) / height
        return round(56 + 570 * (x - left) / width, 1), round(206 - 190 * y, 1)

    drawing, legend = "", ""
    for tick in ticks:
        y = place(left, tick)[1]
        drawing += f'<path d="M56 {y}H626"/><text x="50" y="{y}">{tick:.4g}</text>\n'
    for tick in _ticks(left, left + width, 6):
        if tick == int(tick):  # a step
            drawing += f'<text class="x" x="{place(tick, low)[0]}" y="224">{tick:g}</text>\n'
    for number, (name, points) in enumerate(drawn.items()):
        colour, places = f'class="c{number % 6}"', [place(*point) for point in points]
        line = " ".join(f"{x},{y}" for x, y in places)
        drawing += f'<polyline {colour} points="{line}"/>\n'
        for (x, y), (step, value) in zip(places, points, strict=True) if len(points) <= 60 else ():
            drawing += f'<circle {colour} cx="{x}" cy="{y}" r="2.5">'
            drawing += f"<title>step {step:g}: {value:.5g}</title></circle>\n"
        legend += f"<span {colour}>{html.escape(name)} {lines[name][-1][1]:.4g}</span> "
    title = html.escape(title)
    return (
        f'<div><h2>{title}</h2><svg viewBox="0 0 640 232" role="img" aria-label="{title}, steps '
        f'{left:g} to {right:g}">\n{drawing}</svg>\n<p>{legend}</p></div>\n'
    )


def thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Return at most `most` points: each the mean of as many neighbours as that takes."""
    size = math.ceil(len(points) / most)
    groups = (points[at : at + size] for at in range(0, len(points), size))
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about `count` round numbers from low to high."""
    unit = 10.0 ** math.floor(math.log10((high - low) / count))
    unit *= next(factor for factor in (1, 2, 5, 10) if unit * factor * count >= high - low)
    return [n * unit for n in range(math.ceil(low / unit), math.floor(high / unit) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten from low to high; where they are few also 2 and 5 times these."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    factors = (1, 2, 5) if len(decades) < 4 else (1,)
    found = [factor * 10.0**decade for decade in decades for factor in factors]
    return [value for value in found if low <= value <= high]


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src 'self' file: data:;
 style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; --back: #fbfbfa; --ink: #222; --quiet: #6b6b6b; --rule: #e2e2df;
  --c0: #2563a8; --c1: #c2611f; --c2: #2f855a; --c3: #8b4fa8; --c4: #a8842c; --c5: #777;
  --room: min(100vw - 3rem, 1400px); }
@media (prefers-color-scheme: dark) { :root { --back: #191a1b; --ink: #e4e4e2; --quiet: #9b9b98;
  --rule: #35373a; --c0: #74aef0; --c1: #f0a06a; --c2: #77c79b; --c3: #c79be0; --c4: #d9bd6e;
  --c5: #a5a5a5; } }
body { margin: 0 auto; width: var(--room); background: var(--back); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
header { position: sticky; top: 0; z-index: 3; display: flex; gap: 1.5rem; align-items: baseline;
  padding: .6rem 0; background: var(--back); border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
header > * { overflow: hidden; text-overflow: ellipsis; }
header small { flex: 1 999 0; }
select { max-width: 9rem; }
h1, h2 { margin: 0; font-size: 1rem; font-weight: 600; }
small { margin: 0; color: var(--quiet); font-size: .85rem; font-weight: 400; }
section { --ratio: calc(var(--w) / var(--h)); margin: 0 auto; padding: 1rem 0;
  width: var(--width); scroll-margin-top: 3rem;
  --width: min(var(--room), 76vh * var(--ratio), max(480px, var(--w) * 1px));
  content-visibility: auto;
  contain-intrinsic-size: auto calc(var(--width) / var(--ratio) + 8.5rem); }
figure { position: relative; margin: 0; aspect-ratio: var(--ratio);
  overflow: hidden; background: var(--rule); cursor: ew-resize; touch-action: pan-y;
  user-select: none; -webkit-user-select: none; }
.same figure { cursor: default; }
img { display: none; position: absolute; width: 100%; height: 100%; object-fit: contain; }
.cover { object-fit: cover; }
.left, .right { display: block; }
.left { clip-path: inset(0 calc(100% - var(--x)) 0 0); }
.right { clip-path: inset(0 0 0 var(--x)); }
.left.right { clip-path: none; }
section p { display: flex; justify-content: space-between; margin: .3rem 0; font-size: .85rem; }
section b { max-width: 48%; overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  font-weight: 500; }
i { position: absolute; inset: 0 auto 0 var(--x); width: 2px; margin-left: -1px; background: #fff;
  box-shadow: 0 0 2px #000; }
i::after { content: "\\2194"; position: absolute; top: 50%; left: 50%; width: 1.7rem; color: #222;
  font: 1rem/1.7rem system-ui; text-align: center; background: #fff; border-radius: 50%;
  translate: -50% -50%; box-shadow: 0 0 3px #000; }
.same i, .same b + b, .single p, .single input, .single ol { display: none; }
:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; }
figcaption:not(:empty) { position: absolute; inset: auto 0 0 0; padding: .4rem .6rem; color: #fff;
  background: #000b; white-space: pre-wrap; opacity: 0; transition: opacity .15s;
  pointer-events: none; }
figcaption span, h2 small { margin-left: .6rem; opacity: .75; }
figure:hover figcaption, i:focus-visible ~ figcaption { opacity: 1; }
figure:active figcaption { opacity: 0; }
input { display: block; accent-color: var(--c0); margin: .2rem 0 0;
  width: calc(100% * (1 - 1 / var(--n)) + 1rem);
  margin-left: calc(50% / var(--n) - .5rem); }
ol { display: grid; grid-template-columns: repeat(var(--n), minmax(0, 1fr)); margin: 0; padding: 0;
  list-style: none; font-size: .8rem; color: var(--quiet); }
li { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; text-align: center;
  cursor: pointer; }
li:nth-child(1):nth-last-child(n + 16) ~ li:not(.on):not(:last-child) { visibility: hidden; }
li.on { color: var(--ink); font-weight: 600; overflow: visible; }
.charts { display: grid; gap: 1rem 2rem; padding-top: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
svg { width: 100%; overflow: visible; }
svg text { fill: var(--quiet); font-size: max(12px, 24px - 1.5vw); text-anchor: end;
  dominant-baseline: middle; }
svg .x { text-anchor: middle; } path { stroke: var(--rule); }
polyline { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round; }
circle { fill: var(--c); }
.c0 { --c: var(--c0) } .c1 { --c: var(--c1) } .c2 { --c: var(--c2) }
.c3 { --c: var(--c3) } .c4 { --c: var(--c4) } .c5 { --c: var(--c5) }
.charts p { margin: 0; font-size: .8rem; color: var(--quiet); }
.charts span { margin-right: .8rem; white-space: nowrap; }
.charts span::before { content: ""; display: inline-block; width: .7rem; height: .2rem;
  margin-right: .35rem; vertical-align: middle; background: var(--c); }
details { padding: .4rem 0; } summary { cursor: pointer; }
pre { overflow: auto; padding: .8rem; border: 1px solid var(--rule); font-size: .8rem; }
</style>
<header><h1>$title</h1>
<label>left <select></select></label>
<small>drag the divider &nbsp; ← → picture &nbsp; ↑ ↓ row &nbsp; shift ← → divider</small></header>
<main>
$body</main>
<script>
"use strict";
const rows = [...document.querySelectorAll("section")], left = document.querySelector("select");
let current, dragged;

function show(row) { // one picture on each side of the divider
  const pictures = [...row.querySelectorAll("img")], slider = row.querySelector("input");
  const right = pictures[slider.value];
  const before = pictures.find(picture => picture.alt === left.value) || pictures[0];
  for (const picture of pictures) {
    picture.classList.toggle("left", picture === before);
    picture.classList.toggle("right", picture === right);
  }
  row.classList.toggle("same", before === right);
  const [leftLabel, rightLabel] = row.querySelectorAll("b");
  leftLabel.textContent = before.alt;
  rightLabel.textContent = right.alt;
  slider.setAttribute("aria-valuetext", right.alt);
  row.querySelectorAll("li").forEach((label, n) => label.classList.toggle("on", n == slider.value));
}
function choose(row, number) {
  row.querySelector("input").value = number;
  show(use(row));
}
function divide(row, percent) {
  percent = Math.min(100, Math.max(0, percent));
  row.style.setProperty("--x", percent + "%");
  row.querySelector("i").setAttribute("aria-valuenow", Math.round(percent));
}
function drag(event) {
  const box = dragged.querySelector("figure").getBoundingClientRect();
  divide(dragged, 100 * (event.clientX - box.left) / box.width);
}
function use(row) { // all its pictures are fetched: the next one shows at once
  for (const picture of row.querySelectorAll("img")) picture.loading = "eager";
  return current = row;
}
function visible() { // the row that keys act on
  const box = current && current.getBoundingClientRect();
  if (box && box.bottom > 0 && box.top < innerHeight) return current;
  return document.elementFromPoint(innerWidth / 2, innerHeight / 2)?.closest("section");
}
addEventListener("pointerdown", event => {
  const figure = event.target.closest("figure");
  if (!figure || event.button) return;
  figure.setPointerCapture(event.pointerId);
  dragged = use(figure.parentNode);
  drag(event);
});
addEventListener("pointermove", event => dragged && drag(event));
addEventListener("pointerup", () => dragged = null);
addEventListener("pointercancel", () => dragged = null);
addEventListener("dragstart", event => event.preventDefault());
addEventListener("click", event => {
  const label = event.target.closest("li");
  if (label) choose(label.closest("section"), [...label.parentNode.children].indexOf(label));
});
addEventListener("focusin", event => {
  const row = event.target.closest("section");
  if (row) use(row);
});
addEventListener("input", event => {
  const row = event.target.closest("section");
  if (row) choose(row, event.target.value);
});
left.addEventListener("change", () => rows.forEach(show));
addEventListener("keydown", event => {
  const way = {ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1}[event.key];
  const row = way && visible();
  if (!row || event.target === left || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key === "ArrowUp" || event.key === "ArrowDown") {
    const next = rows[rows.indexOf(row) + way];
    if (!next) return;
    next.querySelector("input").focus({preventScroll: true});
    use(next).scrollIntoView();
  } else if (event.shiftKey || event.target.matches("i")) {
    divide(row, parseFloat(row.style.getPropertyValue("--x")) + 2 * way);
  } else {
    choose(row, +row.querySelector("input").value + way);
  }
  event.preventDefault();
});
const divided = document.querySelectorAll("section:not(.single) img");
for (const label of new Set([...divided].map(picture => picture.alt))) left.add(new Option(label));
for (const part of document.querySelectorAll("h1 ~ *")) part.hidden = !divided.length;
rows.forEach(show);
</script>
</html>
"""


def read_record(output_dir: Path) -> dict[str, Any]:
    """Return run.json of a run; {} if there is none yet or it is damaged."""
    with contextlib.suppress(Exception):  # whatever is wrong with it
        return dict(json.loads((output_dir / "run.json").read_text(encoding="utf-8")))
    return {}


def main() -> None:
    """Write the report of the run whose folder is named."""
    if len(sys.argv) != 3 or sys.argv[1] != "report":
        raise UserError("usage: python tools/page.py report OUTPUT_DIR")
    print(write_report(Path(sys.argv[2])))


if __name__ == "__main__":
    run_script(main)
