"""tools/serve.py: its pictures are generate.py's; the page in a real browser; mistakes."""

import base64
import importlib.metadata
import socket
import time
import types
import urllib.request

import numpy as np
import pytest
import tiny
from conftest import PAIRS, ROOT, run
from PIL import Image

import generate
import train_qwen_edit
import utils
from utils import UserError, load_tool

tool = load_tool("serve")
PHOTO = PAIRS / "coffee2_R.png"
QWEN = ROOT / "demo/qwen_edit_base"
STEPS = ["--num_inference_steps", 3]
QUICK = {
    "qwen": [*STEPS, "--true_cfg_scale", 1.5, "--negative_prompt", "grey"],
    "flux": [*STEPS, "--skip", 0, "--resolution", 64, "--max_sequence_length", 16],
    "sd": [*STEPS, "--skip", 0.34, "--guidance_scale", 2],
}


@pytest.fixture(scope="module")
def models(checkpoints, tmp_path_factory):
    """{family: (base, its LoRA)}; Qwen-Image-Edit: the base of the demo."""
    folder = tmp_path_factory.mktemp("loras")
    tiny.save_sd_lora(checkpoints["sd"], folder / "sd.safetensors")
    config = utils.read_model_json(str(QWEN), "transformer/config.json")
    layers = dict(train_qwen_edit.empty_transformer(config).named_modules())
    names = [name for name in layers if name.endswith((".to_q", ".to_v", ".to_out.0"))]
    factors = tiny.random_factors(types.SimpleNamespace(named_modules=layers.items), 0, names)
    tensors = {
        f"transformer.{name}.lora_{end}.weight": factor * 0.5
        for name, pair in factors.items()
        for end, factor in zip("AB", pair, strict=True)
    }
    about = {"reference_area": "target", "resolution": 64, "prompts": ["make it snow"]}
    about |= {"vision_area": 4096, "flavour": "edit-v3"}
    utils.save_tensors(folder / "qwen.safetensors", tensors, image_edit_lora=about)
    tiny.save_sliders(checkpoints["flux"], folder / "flux")
    bases = {"qwen": QWEN, "flux": checkpoints["flux"], "sd": checkpoints["sd"]}
    return {name: (base, folder / f"{name}.safetensors") for name, base in bases.items()}


def pixels(file):
    with Image.open(file) as image:
        return np.asarray(image)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def flags(models, family, *more):
    base, lora = models[family]
    argv = ["--pretrained_model_name_or_path", base, "--lora", lora, "--device", "cpu"]
    return [*map(str, [*argv, *QUICK[family], *more])]


@pytest.fixture(params=QUICK)
def family(request):
    return request.param


@pytest.fixture
def session(models, family, tmp_path):
    """Of a family, with its model."""
    made = tool.prepare(flags(models, family, "--port", free_port()), tmp_path)[1]
    made.load()
    return made


@pytest.fixture
def theirs(models, call_generate, tmp_path):
    """theirs(family, name, *flags) -> the picture that generate.py draws of a LoRA at 0.7."""

    def draw(family, name, *args):
        argv = flags(models, family, *args, "--seed", 3, "--output", tmp_path / "theirs" / name)
        if family == "sd" and "--image" not in args:
            argv[argv.index("--skip") : argv.index("--skip") + 2] = []
        lora = str(models[family][1])
        call_generate(*(f"{lora}:0.7" if word == lora else word for word in argv))
        return tmp_path / "theirs" / name

    return draw


def test_pictures_are_those_of_generate(session, theirs, family):
    """Pixels and settings; prompts that come later, steps as they are told, Stop."""
    wanted = theirs(family, "coffee2_R.png", "--image", PHOTO, "--prompt", "a cup")
    told = []

    def stop(done, total):
        told.append((done, total))
        session.stop()

    with pytest.raises(UserError, match="stopped"):
        session.draw([PHOTO], "a cup", 3, [0.7], stop)
    total = told[0][1]
    assert told == [(1, total)]
    told.clear()
    before, after = session.draw([PHOTO], "a cup", 3, [0.7], lambda *step: told.append(step))
    assert told == [(k + 1, total) for k in range(total)]
    assert (pixels(after) == pixels(wanted)).all() and before.size == Image.open(after).size
    ours, usual = (generate.read_settings(file)["settings"] for file in (after, wanted))
    assert ours == usual
    weaker = session.draw([PHOTO], "a cup", 3, [0.1])[1]
    assert (pixels(weaker) != pixels(wanted)).any()
    wanted = theirs(family, "p.png", "--prompt", "a house", "--scales", "0,1")
    for strength in (0.1, 0.7):  # the base's picture is drawn once
        told.clear()
        before, after = session.draw([], "a house", 3, [strength], lambda *step: told.append(step))
        assert told[-1][0] == told[-1][1] == len(told)
    assert (pixels(after) == pixels(wanted.with_stem("p_scale1"))).all()
    assert (np.asarray(before) == pixels(wanted.with_stem("p_scale0"))).all()


def test_2508_draws_nothing_from_text(checkpoints, tmp_path):
    argv = ["--pretrained_model_name_or_path", checkpoints["2508"], "--device", "cpu"]
    session = tool.prepare([*map(str, [*argv, "--port", free_port()])], tmp_path)[1]
    with pytest.raises(UserError, match="a picture is missing"):
        session.plan([], "a cup", 3, [])


def test_a_picture_dropped_in_a_browser(models, browser, theirs, tmp_path, monkeypatch):
    """Drop, type, move the strength, press: generate.py's picture; mistakes in one sentence."""
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR", "no_proxy"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # of the office: not for the page
    wanted = theirs("qwen", "coffee2_R.png", "--image", PHOTO, "--prompt", "turn it blue é 雪")
    argv = flags(models, "qwen", "--port", free_port())
    page, address = tool.open_page(*tool.prepare(argv, tmp_path))
    try:
        assert address.startswith("http://127.0.0.1:")
        browser.get_log("browser")
        browser.get(address)
        upload = wait(lambda: browser.find_element("css selector", "input[type=file]"))
        text = wait(lambda: browser.find_element("css selector", "[data-testid=textbox]"))
        assert text.get_property("value") == "make it snow"  # what the LoRA was trained with
        (tmp_path / "no.png").write_text("no picture")
        upload.send_keys(str(tmp_path / "no.png"))
        said = wait(lambda: browser.find_element("css selector", ".toast-body").text)
        assert "picture no.png cannot be read" in said and "Traceback" not in said
        browser.get(address)
        upload = wait(lambda: browser.find_element("css selector", "input[type=file]"))
        browser.execute_script(DROP, upload, base64.b64encode(PHOTO.read_bytes()).decode())
        wait(lambda: shown(browser))
        fill(browser, "[data-testid=textbox]", "turn it blue é 雪")
        strength, seed = browser.find_elements("css selector", "input[type=number]")
        fill(browser, strength, 0.7)
        fill(browser, seed, 3)
        browser.find_element("css selector", "button.primary").click()
        link = wait(lambda: [x for x in shown(browser) if x.endswith("/coffee2_R.png")])[0]
        with urllib.request.urlopen(link) as answer:
            (tmp_path / "ours.png").write_bytes(answer.read())
        assert (pixels(tmp_path / "ours.png") == pixels(wanted)).all()
        code = "return performance.getEntriesByType('resource').map(entry => entry.name)"
        assert all(link.startswith(address) for link in browser.execute_script(code))
        assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    finally:
        page.close(verbose=False)


DROP = """
const files = new DataTransfer(), bytes = Uint8Array.from(atob(arguments[1]), c => c.charCodeAt(0));
files.items.add(new File([bytes], "coffee2_R.png", {type: "image/png"}));
arguments[0].dispatchEvent(new DragEvent("drop", {dataTransfer: files, bubbles: true}));
"""


def wait(look, seconds=60):
    """What `look` returns, once that is something."""
    end = time.monotonic() + seconds
    while True:
        try:
            if found := look():
                return found
        except Exception:
            if time.monotonic() > end:
                raise
        assert time.monotonic() < end
        time.sleep(0.1)


def shown(browser):
    code = "return [...document.images].filter(i => i.naturalWidth).map(i => i.src)"
    return browser.execute_script(code)


def fill(browser, field, value):
    """Put a value into a field, as typing does."""
    field = browser.find_element("css selector", field) if isinstance(field, str) else field
    code = "arguments[0].value = arguments[1]; for (const kind of ['input', 'change', 'blur'])"
    code += " arguments[0].dispatchEvent(new Event(kind, {bubbles: true}))"
    browser.execute_script(code, field, value)


def test_mistakes_are_named_before_a_model_loads(models, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port, lora = taken.getsockname()[1], tmp_path / "gone.safetensors"
        argv = flags(models, "qwen", "--port", port)
        done = run("tools/serve.py", *argv, check=False)
        assert done.returncode == 2 and f"127.0.0.1:{port}" in done.stderr
        assert "Traceback" not in done.stderr
    cases = {
        "gone.safetensors is no file": ["--lora", lora],
        "no part of a LoRA": ["--lora", models["flux"][1]],
        "no folder .*gone": ["--pretrained_model_name_or_path", tmp_path / "gone"],
        "output: no setting here": ["--output", "x.png"],
        "give both or none": ["--height", "64"],
        "unknown setting": ["--prot", "1"],
    }
    for text, more in cases.items():
        with pytest.raises(UserError, match=text):
            tool.prepare(flags(models, "qwen", "--port", free_port(), *more), tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.49.1")
    with pytest.raises(UserError, match="pip install"):
        tool.prepare(flags(models, "qwen", "--port", free_port()), tmp_path)
