"""A page to try LoRAs: drop a picture, type, move the strength, compare before and after.

Page: docs/serve.md

    python tools/serve.py --pretrained_model_name_or_path DIR --lora FILE
    ... --lora A.safetensors:0.8 B.safetensors      # a strength for each
    ... --num_inference_steps 8 --resolution 512    # settings of generate.py, for all pictures
    ... --port 8000                                 # http://127.0.0.1:8000, for this machine alone
    ... --host 0.0.0.0                              # for the network; --share: a public address

Takes what generate.py takes: Qwen-Image-Edit, FLUX.1 sliders, Stable Diffusion 1.x. With the same
settings it draws the same picture. Needs Gradio: pip install "gradio>=6,<7"
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.metadata
import importlib.util
import itertools
import math
import os
import re
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from pydantic import Field, ValidationError, create_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from utils import Section, UserError, load_config, load_script, load_tool, open_rgb

ROOT = Path(__file__).resolve().parent.parent
# settings of generate.py that the page has instead, or that are about one picture
ON_PAGE = {"scales", "image", "input_dir", "table", "output", "output_dir", "html", "mask"}
OF_PHOTOS = {"inversion", "skip", "restore_detail"}  # with Stable Diffusion


class ServeConfig(Section):
    """Where the page is; all other settings are those of generate.py."""

    host: str = "127.0.0.1"
    """Address to listen on: 127.0.0.1 is this machine alone, 0.0.0.0 every network it is in."""
    port: int = Field(7860, ge=1, le=65535)
    """Port to listen on."""
    share: bool = False
    """Ask gradio.live for a public address; the pictures then go through its machines."""


class Stopped(UserError):
    """Somebody pressed Stop."""


# --- 1. drawing -----------------------------------------------------------------------------------


class Session:
    """Draws pictures one at a time, with a model that stays loaded.

    generate: the module; kind: one of its painters' classes; settings: those of generate.py that
    were given; place: folder of what is drawn.
    """

    def __init__(
        self, generate: Any, kind: Any, script: Any, settings: dict[str, Any], place: Path
    ) -> None:
        self.generate, self.kind, self.script = generate, kind, script
        self.settings, self.place = settings, place
        self.painter: Any = None  # with the model; its settings are those of the last picture
        self.base: tuple[Any, Any] = None, None  # (prompt, seed), its picture without LoRAs
        self.lock, self.stopped = threading.Lock(), False
        self.on_call: Callable[[], None] = lambda: None

    @property
    def loras(self) -> list[tuple[Path, float, int | None]]:
        """Return (file, strength, skip) of every LoRA, as given. Raises UserError."""
        return [self.generate.parse_lora(text) for text in self.settings.get("lora", [])]

    def plan(
        self, images: Sequence[Path], prompt: str, seed: int | None, strengths: Sequence[float]
    ) -> tuple[Any, Any]:
        """Return (painter without a model, strip) of one picture. Raises UserError."""
        pairs = zip(self.loras, strengths, strict=True)
        parts = [[file, strength, skip] for (file, _, skip), strength in pairs]
        loras = [":".join(str(part) for part in its if part is not None) for its in parts]
        output = Path(tempfile.mkdtemp(dir=self.place), [*images, Path("picture")][0].stem + ".png")
        asked = {"image": [*images], "prompt": [prompt], "seed": [seed], "lora": loras}
        settings = {**self.settings, **asked, "output": output}
        if not images and self.kind is self.generate.ChangePainter:
            settings = {name: value for name, value in settings.items() if name not in OF_PHOTOS}
        try:
            config = self.kind.config_class.model_validate(settings)
        except ValidationError as error:
            lines = load_tool("settings").explain(self.kind.config_class, settings, error)
            raise UserError("; ".join(lines)) from error
        painter = self.kind(config, self.script)
        strips, problems = self.generate.plan_jobs(painter)
        if not images and getattr(getattr(painter, "flavour", None), "most_references", 0) == 1:
            problems.append("a picture is missing: 2508 draws none from text")
        if problems := problems + utils.check_setup(texts={"prompt": prompt}):
            raise UserError("; ".join(dict.fromkeys(problems)))
        return painter, strips[0]

    def first(self) -> tuple[Any, Any]:
        """Plan a first picture: what is wrong with the settings shows. Raises UserError."""
        probe = self.place / "picture.png"
        Image.new("RGB", (512, 512), "white").save(probe)
        photo = self.loras or self.kind is self.generate.EditPainter
        prompt = [*self.settings.get("prompt", []), "a picture"][0]
        return self.plan([probe] if photo else [], prompt, 0, [x for _, x, _ in self.loras])

    def load(self) -> str:
        """Load the model and the LoRAs; return the prompt to begin with."""
        painter, _ = self.first()
        learnt = [prompt for about in painter.about for prompt in about.get("prompts", [])]
        prompts = [*self.settings.get("prompt", []), *learnt, painter.usual_prompt or ""]
        painter.load(prompts[:1])
        models = getattr(painter, "models", {})
        model = models.get("unet") or getattr(painter, "pipeline", painter).transformer
        model.register_forward_pre_hook(lambda *_: self.on_call())
        self.painter = painter
        return prompts[0]

    def draw(
        self,
        images: Sequence[Path],
        prompt: str,
        seed: int | None,
        strengths: Sequence[float],
        tell: Callable[[int, int], None] = lambda done, total: None,
    ) -> tuple[Image.Image, Path]:
        """Return (before, the result's file). Before: the photo, else the base model's picture.

        tell: is called with the model's calls so far and in all. Raises UserError: stop(), too.
        """
        with self.lock:
            self.stopped = False
            painter, strip = self.plan(images, prompt, seed, strengths)
            vars(self.painter).update(vars(painter))  # its settings; the model stays
            wanted = None if images or not self.loras else (prompt, seed)
            new = wanted is not None and wanted != self.base[0]
            calls, total = itertools.count(1), count_calls(painter, strip) * (1 + new)

            def on_call() -> None:
                if self.stopped:
                    raise Stopped("stopped")
                tell(min(next(calls), total), total)

            self.on_call = on_call
            self.encode(prompt)
            scale = strip.scales[0]
            about = self.generate.picture_settings(self.painter, strip, scale)
            [(_, after, facts)] = self.painter.draw(strip, [scale])
            self.generate.save_picture(strip.files[0], after, about | facts)
            if new:
                [(_, plain, _)] = self.painter.draw(strip, [0.0])
                self.base = wanted, plain
            before = fit(open_rgb(images[0]), after.size) if images else self.base[1]
            return before or after, strip.files[0]

    def stop(self) -> None:
        """End the drawing at its next step."""
        self.stopped = True

    def encode(self, prompt: str) -> None:
        """Encode a prompt that is new; the pipeline of Qwen-Image-Edit does it itself."""
        painter, script, texts = self.painter, self.script, getattr(self.painter, "texts", None)
        if texts is None or prompt in texts:
            return
        dtype, device = painter.dtype, painter.device
        if self.kind is self.generate.SliderPainter:
            length = painter.config.max_sequence_length
            painter.transformer.to("cpu")  # KEEP: not in memory together with the encoders
            try:
                texts |= script.encode_texts(painter.folder, [prompt], length, dtype, device)
            finally:
                gc.collect()
                painter.transformer.to(device)
        else:
            folder = script.fetch_sd(painter.config.pretrained_model_name_or_path)
            texts |= script.encode_prompts(folder, [prompt], dtype, device)


def count_calls(painter: Any, strip: Any) -> int:
    """Return how often the model is called for one picture of a strip."""
    config, steps = painter.config, painter.config.num_inference_steps
    if painter.family == "FLUX.1":  # its guidance costs nothing; a photo is edited from `skip` on
        photo = strip.images and not strip.inversion
        return steps - (min(lora.start for lora in strip.loras) if photo else 0)
    if painter.family == "Stable Diffusion" and strip.images:  # inversion, and scales 0 and 1
        steps = (steps - round(config.skip * steps)) * (4 if config.inversion == "ddim" else 3)
    guidance = getattr(config, "true_cfg_scale", None) or config.guidance_scale
    return steps * (2 if guidance > 1 else 1)


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return a photo in the size of its result: cropped if the shapes are near, as page.py does."""
    near = abs(math.log(image.width * size[1] / (image.height * size[0]))) < 0.15
    return (ImageOps.fit if near else ImageOps.pad)(image, size, Image.Resampling.LANCZOS)


# --- 2. the page ----------------------------------------------------------------------------------


def build(session: Session, gr: Any, prompt: str, seed: int) -> Any:
    """Return the page (gr.Blocks): settings on the left, the divider on the right."""
    flavour = getattr(session.painter, "flavour", None)
    several = bool(flavour and flavour.vision_area)  # Qwen-Image-Edit, but 2508

    @contextlib.contextmanager
    def shown() -> Iterator[None]:
        """Show a mistake on the page, and files by their names alone."""
        try:
            yield
        except UserError as error:
            text = re.sub(rf"{re.escape(str(session.place))}\S*/", "", str(error))
            raise gr.Error(text, duration=None, print_exception=False) from error

    def paths(files: Any) -> list[Path]:
        return [Path(file) for file in ([files] if isinstance(files, str) else files or [])]

    def show(files: Any) -> Any:
        with shown():
            photos = [open_rgb(path) for path in paths(files)[:1]]
        for photo in photos:
            photo.thumbnail((1536, 1536))
        return tuple(photos * 2) or None

    def draw(progress: Any = gr.Progress(), *values: Any) -> Any:  # noqa: B008
        files, prompt, seed, *strengths = values

        def tell(done: int, total: int) -> None:
            progress((done, total), desc="drawing")

        with shown(), contextlib.suppress(Stopped):
            return session.draw(paths(files), prompt, seed, strengths, tell)
        return gr.skip()

    with gr.Blocks(title="Try a LoRA", fill_width=True, analytics_enabled=False) as page, gr.Row():
        with gr.Column(min_width=320):
            files = gr.File(
                label="Pictures, in order" if several else "Picture",
                file_count="multiple" if several else "single",
                file_types=[*utils.IMAGE_SUFFIXES],
            )
            text = gr.Textbox(prompt, label="Instruction" if flavour else "What it shows")
            sliders = []
            for file, strength, _ in session.loras:
                name = "/".join(file.with_suffix("").parts[-2:])
                least, most = min(0.0 if flavour else -2.0, strength), max(2.0, strength)
                sliders.append(gr.Slider(least, most, strength, step=0.05, label=name))
            number = gr.Number(seed, label="Seed", precision=0, minimum=0)
            with gr.Row():
                start = gr.Button("Draw", variant="primary", min_width=80)
                stop = gr.Button("Stop", min_width=80)
        with gr.Column(min_width=320, scale=2):
            view = gr.ImageSlider(label="before | result", format="png", max_height=720)
        files.change(show, files, view)
        inputs = [files, text, number, *sliders]
        gr.on([start.click, text.submit], draw, inputs, view, concurrency_limit=1)
        stop.click(session.stop, queue=False)
    return page


def open_page(config: Any, session: Session) -> tuple[Any, str]:
    """Load the model, serve the page; return (page, its address)."""
    # Gradio then tells nobody of it, and keeps its files where they are deleted
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(session.place)}
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
    os.environ["no_proxy"] = f"{known},localhost,127.0.0.1,{config.host}"  # it asks its own page
    gr: Any = importlib.import_module("gradio")
    page = build(session, gr, session.load(), config.seed[0])
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # of the system
    theme = gr.themes.Default(primary_hue="blue", **fonts)
    where = {"server_name": config.host, "server_port": config.port, "share": config.share}
    less = {"quiet": True, "footer_links": [], "run_history": False, "ssr_mode": False}
    more = {"show_error": True, "prevent_thread_lock": True, "theme": theme}
    _, local, public = page.queue().launch(**where, **less, **more)
    return page, public or local


# --- 3. main --------------------------------------------------------------------------------------


def check_server(config: ServeConfig) -> list[str]:
    """Return what keeps a page from being served."""
    problems, there = [], importlib.util.find_spec("gradio")
    if not there or int(importlib.metadata.version("gradio").partition(".")[0]) < 6:
        problems.append('Gradio 6 is not installed: pip install "gradio>=6,<7"')
    try:
        socket.create_server((config.host, config.port)).close()
    except OSError as error:
        problems.append(f"host, port: {config.host}:{config.port} cannot be had: {error}")
    return problems


def prepare(argv: Sequence[str], place: Path) -> tuple[Any, Session]:
    """Return (config, session without a model). Raises UserError: all that is wrong."""
    generate = load_script(ROOT / "generate.py")
    given = generate.settings_given(argv)
    if taken := ON_PAGE & given.keys():
        raise UserError(f"{', '.join(sorted(taken))}: no setting here; the page has its own")
    kind = generate.pick_painter(given)
    script = load_script(Path(given.get("script") or ROOT / kind.script_name))
    if not hasattr(script, kind.needs):
        raise UserError(f"--script {script.__file__}: no training script of {kind.family}")
    fields = {n: f for n, f in kind.config_class.model_fields.items() if n not in ON_PAGE}
    parts: Any = {name: (field.rebuild_annotation(), field) for name, field in fields.items()}
    made: list[Session] = []

    def check(config: Any) -> list[str]:
        settings = config.model_dump(exclude_unset=True, exclude={*ServeConfig.model_fields})
        made.append(Session(generate, kind, script, settings, place))
        try:
            painter, strip = made[0].first()
        except UserError as error:
            return [*check_server(config), str(error)]
        return check_server(config) + painter.problems([strip])

    settings = create_model("Config", __base__=ServeConfig, __doc__=ServeConfig.__doc__, **parts)
    return load_config(settings, argv, check), made[0]


def main() -> None:
    """Check the settings, load the model, serve the page until Ctrl-C."""
    if "help" in utils.parse_args(sys.argv[1:]):
        own = load_tool("settings").help_text(ServeConfig, "all").rpartition("\n")[0]
        print(f"{__doc__}\n{own}\nand what `generate.py --help edit | slider | change` shows")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory(prefix="serve-") as place:
        page, address = open_page(*prepare(sys.argv[1:], Path(place).resolve()))
        print(f"page: {address} (Ctrl-C ends it)", flush=True)
        page.block_thread()


if __name__ == "__main__":
    utils.run_script(main)
