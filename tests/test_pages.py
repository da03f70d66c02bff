"""Pages in a real browser, reports and model cards of real runs, trackers read back."""

import base64
import io
import json
import re
import time
import unicodedata

import accelerate
import numpy as np
import pytest
from conftest import PAIRS, ROOT, read_page, suffix_dataset
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from tensorboard.backend.event_processing import event_accumulator

import train_qwen_edit
import utils
from utils import UserError, load_tool

tool = load_tool("page")
PageRow, write_page, write_report = tool.PageRow, tool.write_page, tool.write_report
EVIL = "</script><script>document.title='taken'</script> \"'><img src=x onerror=alert(1)> & ü"


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Four pictures of 600 x 400 px: {label: file}; file names need quoting."""
    folder = tmp_path_factory.mktemp("pictures #1 100%")
    files = {}
    for number, label in enumerate(("before", "scale 0.5", "scale 1", "after")):
        draw = np.random.default_rng(number).integers(0, 255, (4, 6, 3), np.uint8)
        files[label] = folder / f"{label} ü.png"
        Image.fromarray(draw).resize((600, 400), Image.Resampling.BICUBIC).save(files[label])
    return files


@pytest.fixture
def page(browser, scene, tmp_path):
    """Three rows of the scene, opened."""
    rows = [
        PageRow("first", scene, f"make it snow {EVIL}", 7, {"ssim": 0.912345}),
        PageRow(EVIL, scene),
        PageRow("last", {"before": scene["before"], EVIL: scene["after"]}),
    ]
    write_page(tmp_path / "page.html", f"A test {EVIL}", rows)
    show(browser, tmp_path / "page.html")
    return browser


def show(browser, path):
    browser.get_log("browser")  # what pages before it said
    browser.get(path.as_uri())
    settle(browser)


def settle(browser):
    """Wait until the pictures are drawn."""
    browser.execute_async_script(
        "for (const p of document.images) p.loading = 'eager';"
        "Promise.all([...document.images].map(p => p.decode().catch(() => 0))).then("
        "() => requestAnimationFrame(() => setTimeout(arguments[0], 50)))"
    )


def pixels(browser):
    """The first view as the user sees it, without its rim, which may lie between pixels."""
    settle(browser)
    shot = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    box = browser.execute_script(
        "const b = document.querySelector('figure').getBoundingClientRect();"
        "return [b.left, b.top, b.right, b.bottom].map(edge => Math.floor(edge + 0.5))"
    )
    return inner(shot.crop(box))


def inner(image):
    return np.asarray(image).astype(int)[2:-2, 2:-2]


def drag(browser, start, end):
    """Press at `start`, a share of the first view's width, and move to `end`."""
    figure, hand = browser.find_element("css selector", "figure"), ActionChains(browser)
    hand.move_to_element_with_offset(figure, round((start - 0.5) * 600), 60).click_and_hold()
    hand.move_to_element_with_offset(figure, round((end - 0.5) * 600), 60).release()
    hand.move_to_element(browser.find_element("css selector", "h1")).perform()
    time.sleep(0.3)  # the caption fades out


def press(browser, *keys):
    for key in keys:
        chain, (shift, _, name) = ActionChains(browser), key.rpartition("+")
        chain = chain.key_down(Keys.SHIFT) if shift else chain
        chain.send_keys(getattr(Keys, name)).key_up(Keys.SHIFT).perform()


def labels(browser, row=0):
    code = "return [...rows[arguments[0]].querySelectorAll('b')].map(b => b.textContent)"
    return browser.execute_script(code, row)


def test_two_divider_positions_differ_only_between_them(page, scene):
    drag(page, 0.5, 0.25)
    left = pixels(page)
    drag(page, 0.25, 0.75)
    right = pixels(page)
    differs = (left != right).any(axis=2).any(axis=0)  # (W,)
    near = np.abs(np.arange(2, 598)[:, None] - [150, 450]).min(axis=1) <= 20  # line and handle
    between = (np.arange(2, 598) > 150) & (np.arange(2, 598) < 450)
    assert differs[between & ~near].all() and not differs[~between & ~near].any()
    before, after = (inner(Image.open(scene[name])) for name in ("before", "after"))
    for seen, at in ((left, 150), (right, 450)):  # each side is its picture, pixel by pixel
        assert (seen[:, : at - 20] == before[:, : at - 20]).all()
        assert (seen[:, at + 20 :] == after[:, at + 20 :]).all()


def test_keys_slider_labels_and_left_picture(page, scene):
    press(page, "ARROW_DOWN", "ARROW_UP", "ARROW_LEFT")
    assert labels(page) == ["before", "scale 1"]
    assert (pixels(page)[:, 330:] == inner(Image.open(scene["scale 1"]))[:, 330:]).all()
    press(page, "ARROW_LEFT", "ARROW_LEFT", "ARROW_LEFT")  # the last one finds the end
    assert labels(page) == ["before", "before"]
    assert (pixels(page) == inner(Image.open(scene["before"]))).all()  # without a divider
    press(page, "ARROW_DOWN", "ARROW_LEFT", "shift+ARROW_RIGHT", "shift+ARROW_RIGHT")
    assert labels(page, 1) == ["before", "scale 1"]
    places = "return rows.map(r => +r.querySelector('i').getAttribute('aria-valuenow'))"
    assert page.execute_script(places) == [50, 54, 50] and labels(page) == ["before", "before"]
    press(page, "ARROW_UP")
    page.find_elements("css selector", "li")[1].click()
    slider = page.find_element("css selector", "input")
    assert (labels(page)[1], slider.get_attribute("value")) == ("scale 0.5", "1")
    assert slider.get_attribute("aria-valuetext") == "scale 0.5"
    page.find_element("css selector", "select").send_keys("after")
    assert labels(page) == ["after", "scale 0.5"]
    assert labels(page, 2)[0] == "before"  # this row has no such picture
    assert (pixels(page)[:, :270] == inner(Image.open(scene["after"]))[:, :270]).all()


def test_text_of_the_user_stays_text(page):
    texts = "return [rows[1].querySelector('h2'), rows[2].querySelector('b + b')]"
    assert page.title == f"A test {EVIL}"
    assert page.execute_script(f"{texts}.map(e => e.innerText)") == [EVIL, EVIL]
    assert len(page.execute_script("return [...document.images]")) == 10
    caption = page.execute_script("return document.querySelector('figcaption').textContent")
    assert caption == f"make it snow {EVIL} seed 7"
    assert not [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_captions_and_tiffs_of_everywhere_are_shown(browser, tmp_path, form):
    """A picture on the right may be named; a TIFF, which browsers show not, is seen as it is."""
    words = unicodedata.normalize(form, "café 雪")
    folder = tmp_path / words
    folder.mkdir()
    draw = np.random.default_rng(0).integers(0, 255, (400, 600, 3), np.uint8)
    columns = {"before": folder / f"{words}.png", words: folder / f"{words}.TIF"}
    columns["after"] = folder / "after.tiff"
    for file, array in zip(columns.values(), (255 - draw, draw, draw // 2), strict=True):
        Image.fromarray(array).save(file)
    row = PageRow(words, columns, f"make it {words}", 7, right=words)
    for embed in (False, True):
        write_page(folder / f"{words}.html", words, [row], embed)
        show(browser, folder / f"{words}.html")
        assert labels(browser) == ["before", words] and browser.title == words
        seen = browser.execute_script(
            "return ['h2', 'figcaption', 'li + li', 'select option + option']"
            ".map(place => document.querySelector(place).textContent)"
        )
        assert seen == [f"{words} ", f"make it {words} seed 7", words, words]
        view = pixels(browser)
        assert (view[:, 320:] == inner(Image.fromarray(draw))[:, 320:]).all()
        assert (view[:, :270] == inner(Image.fromarray(255 - draw))[:, :270]).all()


def test_a_page_asks_nothing_of_the_network(scene, tmp_path):
    for embed in (False, True):
        write_page(tmp_path / "page.html", "https://x", [PageRow("x", scene, "https://x")], embed)
        text = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert "default-src 'none'; img-src 'self' file: data:;" in text  # nor can it
        links = re.findall(r'(?:src|href)="(.*?)"', text)
        assert len(links) == 4 and all((":" in link) == embed for link in links)
    for size in ((660, 400), (100, 400)):  # a little wider than its bucket; another aspect
        Image.new("RGB", size).save(tmp_path / "photo.png")
        columns = {"photo": tmp_path / "photo.png", "result": scene["after"]}
        write_page(tmp_path / "fit.html", "t", [PageRow("x", columns)])
        shown = re.search(r'<img[^>]*alt="photo"', (tmp_path / "fit.html").read_text())[0]
        assert ("cover" in shown) == (size[0] == 660)  # cropped, or whole
    data = [base64.b64decode(link.partition(",")[2]) for link in links]  # embedded: one file
    assert data == [file.read_bytes() for file in scene.values()]


def test_the_example_of_the_page_about_pages_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "a_05", "a_1"):
        Image.new("RGB", (8, 8)).save(f"{name}.png")
    text = (ROOT / "docs/pages.md").read_text()
    exec(re.search("```python\n(.*?)```", text, re.DOTALL)[1], {})
    [(name, files)] = read_page(tmp_path / "page.html")
    assert name == "a" and list(files) == ["before", "scale 0.5", "scale 1"]


def test_pictures_that_cannot_be_shown_are_named(scene, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for name in ("gone", "text"):
        columns = {"before": scene["before"], "after": tmp_path / f"{name}.png"}
        with pytest.raises(UserError, match=rf"'x'.*{name}.png"):
            write_page(tmp_path / "page.html", "x", [PageRow("x", columns)])
    assert not (tmp_path / "page.html").exists()


def charts(path):
    """{title: [[(x, y) of a curve]]} of a report."""
    found = {}
    for part in path.read_text(encoding="utf-8").split("<div><h2>")[1:]:
        curves = re.findall('points="(.*?)"', part)
        points = [[tuple(map(float, p.split(","))) for p in curve.split()] for curve in curves]
        found[part.partition("<")[0].partition(" (")[0]] = points
    return found


def told(folder, lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 99, "lo')  # is being written
    return charts(write_report(folder))


def test_curves_have_the_heights_and_places_of_their_values(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        write_report(tmp_path)
    steps = ((10, 4.0), (20, 2.0), (40, 1.0), (50, float("nan")))
    names = ("loss", "validation_loss", "memory_gb")
    lines = [{"step": n, **{k: v ** (4 if "_loss" in k else 1) for k in names}} for n, v in steps]
    found = told(tmp_path, lines)
    # no number: left out, not drawn as 0; losses of more than a decade on a logarithmic scale
    falls = {"loss": 2 / 3, "validation loss": 1 / 2, "memory, GB": 2 / 3}
    assert found.keys() == falls.keys()
    for title, fall in falls.items():
        [((x1, y1), (x2, y2), (x3, y3))] = found[title]
        assert (y2 - y1) / (y3 - y1) == pytest.approx(fall, abs=0.01) and y3 > y1
        assert (x2 - x1) / (x3 - x1) == pytest.approx(1 / 3, abs=0.01)
    assert (y1, y3) == (16, pytest.approx(16 + 190 * 3 / 4, abs=0.1))  # levels start at zero
    [points] = told(tmp_path, [{"step": n, "loss": n % 2} for n in range(1200)])["loss"]
    assert len(points) == 400  # means of neighbours
    assert tool.thinned([(1, 0), (2, 1), (3, 5), (4, 7)], 2) == [(1.5, 0.5), (3.5, 6)]


def test_a_run_ends_with_its_report_and_card(make_trainer, tmp_path):
    changes = {
        "data.dataset_configs": [suffix_dataset(PAIRS, holdout=["hubble0"])],
        "logging.log_every": 1,
        "validation.steps": 2,
        "validation.num_inference_steps": 2,
    }
    make_trainer(**changes).fit()
    report, card = tmp_path / "out/report.html", (tmp_path / "out/README.md").read_text()
    found, rows, whole = charts(report), dict(read_page(report)), report.read_text()
    assert [len(points) for points in found["loss"]] == [4]
    assert [len(points) for points in found["validation loss"]] == [3] * 5  # mean, q1-q4
    assert {"learning rate", "seconds per step", "memory, GB"} <= found.keys()
    assert list(rows["Validation over time"]) == ["step 0", "step 2", "step 4"]
    assert list(rows["What the model sees"]) == ["first_batch"]
    assert "log_every: 1\n" in whole
    assert "QwenImageEditPlusPipeline" in card and "pytorch_lora_weights.safetensors" in card
    assert write_report(tmp_path / "out").read_text() == whole  # again, on demand


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_gets_figures_and_pictures(tracker, tmp_path, monkeypatch):
    pytest.importorskip(tracker)
    monkeypatch.chdir(tmp_path)
    for name, value in {"MODE": "offline", "SILENT": "true", "_DISABLE_STATS": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    accelerator = accelerate.Accelerator(cpu=True, log_with=tracker, project_dir=tmp_path / "out")
    run_log = utils.RunLog(accelerator, tmp_path / "out", train_qwen_edit.Config(), 0)
    for step, name in enumerate(("first_batch", "step_000001", "step-000002")):
        run_log.picture(name, Image.new("RGB", (8, 8), (step, 0, 0)), step)
    run_log.values(2, {"loss": 0.5})
    accelerator.end_training()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing outside of it
    if tracker == "wandb":
        files = tmp_path.glob("out/wandb/offline-run-*/files/media/images/*.png")
        found = [(file.name.rsplit("_", 2)[0], Image.open(file)) for file in files]
    else:
        board = event_accumulator.EventAccumulator(str(tmp_path / "out/out"), {"images": 0})
        board.Reload()
        assert [(event.step, event.value) for event in board.Scalars("loss")] == [(2, 0.5)]
        events = [(name, e) for name in board.Tags()["images"] for e in board.Images(name)]
        found = [(name, Image.open(io.BytesIO(e.encoded_image_string))) for name, e in events]
        assert [(name, e.step) for name, e in events][1:] == [("validation", 1), ("validation", 2)]
    seen = sorted((name, image.getpixel((0, 0))[0]) for name, image in found)
    assert seen == [("first_batch", 0), ("validation", 1), ("validation", 2)]


def test_letters_without_a_font_are_told_of_once(caplog):
    pictures = load_tool("pictures")
    pictures.warn_of_boxes.cache_clear()
    picture, private = Image.new("RGB", (60, 40)), chr(0x10FFFE)  # of private use: in no font
    for captions in (["ü"], [f"é {private}"], [private]):
        utils.contact_sheet([[picture]], [], captions)
    assert [record.getMessage() for record in caplog.records if "boxes" in record.msg] == [
        "boxes on sheets are letters that no font here has (fonts-noto-cjk has Chinese)"
    ]
