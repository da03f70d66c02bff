"""Pages in a real browser, reports and model cards of real runs, trackers read back.

The browser tests want Chromium with its driver (Debian: chromium, chromium-driver) and selenium.
"""

import http.server
import io
import json
import re
import shutil
import threading
import time

import numpy as np
import pytest
from conftest import PAIRS, ROOT, concept, read_page, slider_settings, small_config, suffix_dataset
from PIL import Image

import train_pairedit
import train_qwen_edit
from utils import UserError, load_tool

tool = load_tool("page")
PageRow, write_page, write_report = tool.PageRow, tool.write_page, tool.write_report
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = [
    *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
    *("disable-background-networking", "disable-component-update", "disable-sync"),
    *("force-device-scale-factor=1", "force-color-profile=srgb", "window-size=900,900"),
]
EVIL = "</script><script>document.title='taken'</script> \"'><img src=x onerror=alert(1)> & ü"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium that notes every request."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    if not (CHROMIUM and DRIVER):
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


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
    browser.get_log("performance")
    browser.get(path.as_uri())
    settle(browser)


def settle(browser):
    """Wait until the pictures in view are drawn."""
    browser.execute_async_script(
        """const done = arguments[0], seen = [...document.images].filter(picture => {
             const box = picture.getBoundingClientRect();
             return box.height && box.bottom > 0 && box.top < innerHeight; });
           Promise.all(seen.map(p => p.decode().catch(() => 0))).then(
             () => requestAnimationFrame(() => setTimeout(done, 50)));"""
    )


def pixels(browser, row=0):
    """The view of a row as the user sees it, (H, W, 3) int."""
    settle(browser)
    shot = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    box = browser.execute_script(
        "const b = document.querySelectorAll('figure')[arguments[0]].getBoundingClientRect();"
        "return [b.left, b.top, b.right, b.bottom]",
        row,
    )
    return inner(shot.crop([int(edge + 0.5) for edge in box]))  # rounded as Chromium does


def inner(image):
    """(H, W, 3) int; 0 at the rim, which the page may put between two pixels of the screen."""
    values = np.asarray(image).astype(int)
    values[[0, 1, -2, -1]] = values[:, [0, 1, -2, -1]] = 0
    return values


def array(file):
    return inner(Image.open(file))


def drag(browser, start, end, kind="mouse"):
    """Press at `start`, a share of the first view's width, and move to `end`."""
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.actions.pointer_input import PointerInput

    figure = browser.find_element("css selector", "figure")
    device = ActionBuilder(browser, mouse=PointerInput(kind, kind))
    hand = device.pointer_action
    hand.move_to(figure, round((start - 0.5) * 600), 60).pointer_down()
    hand.move_to(figure, round((end - 0.5) * 600), 60).pointer_up()
    device.perform()
    if kind == "mouse":
        hover(browser, "h1")


def hover(browser, place):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).move_to_element(browser.find_element("css selector", place)).perform()
    time.sleep(0.3)  # captions fade in and out


def press(browser, *keys):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    chain = ActionChains(browser)
    for key in keys:
        shift, _, name = key.rpartition("+")
        chain = chain.key_down(Keys.SHIFT) if shift else chain
        chain = chain.send_keys(getattr(Keys, name))
        chain = chain.key_up(Keys.SHIFT) if shift else chain
    chain.perform()


def labels(browser, row=0):
    code = "return [...rows[arguments[0]].querySelectorAll('b')].map(b => b.textContent)"
    return browser.execute_script(code, row)


def divider(browser, row=0):
    code = "return rows[arguments[0]].querySelector('i').getAttribute('aria-valuenow')"
    return float(browser.execute_script(code, row))


# --- the comparison page --------------------------------------------------------------------------


def test_two_divider_positions_differ_only_between_them(page, scene):
    drag(page, 0.5, 0.25)
    left = pixels(page)
    drag(page, 0.25, 0.75)
    right = pixels(page)
    differs = (left != right).any(axis=2).any(axis=0)  # (W,)
    near = np.abs(np.arange(600)[:, None] - [150, 450]).min(axis=1) <= 20  # line and handle
    between = (np.arange(600) > 150) & (np.arange(600) < 450)
    assert differs[between & ~near].all() and not differs[~between & ~near].any()
    before, after = array(scene["before"]), array(scene["after"])
    for seen, at in ((left, 150), (right, 450)):  # each side is its picture, pixel by pixel
        assert (seen[:, : at - 20] == before[:, : at - 20]).all()
        assert (seen[:, at + 20 :] == after[:, at + 20 :]).all()
    drag(page, 0.75, 0.3, kind="touch")
    assert divider(page) == 30


def test_pictures_of_other_frames_lie_on_the_result(browser, scene, tmp_path):
    """A photo a little wider than its bucket, one of another aspect, one turned by EXIF."""
    result = Image.open(scene["after"])
    photo = Image.new("RGB", (660, 400))
    photo.paste(result, (30, 0))
    photo.save(tmp_path / "photo.png")
    Image.new("RGB", (100, 400)).save(tmp_path / "tall.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (300, 200), "navy").save(tmp_path / "turned.jpg", exif=exif)
    columns = {"photo": tmp_path / "photo.png", "tall": tmp_path / "tall.png"}
    rows = [PageRow("x", columns | {"result": scene["after"]})]
    rows.append(PageRow("y", {"a": tmp_path / "turned.jpg"}))
    write_page(tmp_path / "p.html", "t", rows)
    show(browser, tmp_path / "p.html")
    seen, wanted = pixels(browser), inner(result)
    assert (seen[:, :270] == wanted[:, :270]).all() and (seen[:, 330:] == wanted[:, 330:]).all()
    press(browser, "ARROW_LEFT")  # another aspect is shown whole, in the middle
    assert not pixels(browser)[:, 330:345].any() and pixels(browser)[2:-2, 355:-2].all()
    browser.execute_script("rows[1].scrollIntoView()")
    box = "const b = rows[1].querySelector('figure').getBoundingClientRect();"
    ratio = browser.execute_script(box + "return b.height / b.width")
    assert ratio == pytest.approx(1.5, abs=0.01)


def test_keys_slider_labels_and_left_picture(page, scene):
    from selenium.webdriver.support.select import Select

    press(page, "ARROW_DOWN", "ARROW_UP", "ARROW_LEFT")
    assert labels(page) == ["before", "scale 1"]
    assert (pixels(page)[:, 330:] == array(scene["scale 1"])[:, 330:]).all()
    press(page, "ARROW_LEFT", "ARROW_LEFT", "ARROW_LEFT")  # the last one finds the end
    assert labels(page) == ["before", "before"]
    assert (pixels(page) == array(scene["before"])).all()  # without a divider
    press(page, "ARROW_DOWN", "ARROW_LEFT", "shift+ARROW_RIGHT", "shift+ARROW_RIGHT")
    assert labels(page, 1) == ["before", "scale 1"] and divider(page, 1) == 54
    assert labels(page) == ["before", "before"] and divider(page) == 50
    press(page, "ARROW_UP")
    page.find_elements("css selector", "li")[1].click()
    slider = page.find_element("css selector", "input")
    assert (labels(page)[1], slider.get_attribute("value")) == ("scale 0.5", "1")
    assert slider.get_attribute("aria-valuetext") == "scale 0.5"
    Select(page.find_element("css selector", "select")).select_by_visible_text("after")
    assert labels(page) == ["after", "scale 0.5"]
    assert labels(page, 2)[0] == "before"  # this row has no such picture
    assert (pixels(page)[:, :270] == array(scene["after"])[:, :270]).all()


def test_prompt_and_seed_show_on_hover_and_to_the_keyboard(page):
    caption = page.find_element("css selector", "figcaption")
    opacity = "return Number(getComputedStyle(arguments[0]).opacity)"
    for place, shown in (("h1", 0), ("figure", 1), ("h1", 0)):
        hover(page, place)
        assert page.execute_script(opacity, caption) == shown
    press(page, "TAB", "TAB")  # the choice of the left picture, the first divider
    time.sleep(0.3)
    assert page.execute_script(opacity, caption) == 1
    press(page, "ARROW_LEFT")
    assert divider(page) == 48  # a divider in focus takes the arrows


def test_text_of_the_user_stays_text_and_dark_is_dark(page):
    texts = "return [rows[1].querySelector('h2'), rows[2].querySelector('b + b')]"
    assert page.title == f"A test {EVIL}"
    assert page.execute_script(f"{texts}.map(e => e.innerText)") == [EVIL, EVIL]
    assert len(page.execute_script("return [...document.images]")) == 10
    caption = page.execute_script("return document.querySelector('figcaption').textContent")
    assert caption == f"make it snow {EVIL} seed 7"
    assert not [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    colours = """const c = getComputedStyle(document.body);
        return [c.backgroundColor, c.color].map(t => t.match(/\\d+/g)[1])"""
    for scheme, sign in (("light", 1), ("dark", -1)):
        wanted = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", wanted)
        back, ink = map(int, page.execute_script(colours))
        assert sign * (back - ink) > 180
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def requests(browser):
    """Every address asked for since the page was opened, embedded data aside."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    addresses = {e["params"]["request"]["url"] for e in events if e["method"].endswith("BeSent")}
    return {address for address in addresses if not address.startswith("data:")}


def test_nothing_is_asked_of_the_network_and_an_embedded_page_is_one_file(browser, scene, tmp_path):
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)

    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    outside = f"http://127.0.0.1:{server.server_port}"
    rows = [PageRow("first", scene, outside)]
    write_page(tmp_path / "page.html", outside, rows)
    show(browser, tmp_path / "page.html")
    assert {address[:8] for address in requests(browser)} == {"file:///"}
    browser.execute_async_script(  # nor can it: the page forbids it to itself
        "const done = arguments[1]; new Image().src = arguments[0] + '/picture';"
        "fetch(arguments[0] + '/data').catch(() => 0).finally(() => setTimeout(done, 200))",
        outside,
    )
    server.shutdown()
    assert asked == []
    write_page(tmp_path / "a/page.html", "one file", rows, embed=True)
    show(browser, (tmp_path / "a/page.html").rename(tmp_path / "moved.html"))
    assert (pixels(browser)[:, :270] == array(scene["before"])[:, :270]).all()
    assert requests(browser) == {(tmp_path / "moved.html").as_uri()}


def test_500_rows_open_at_once_and_load_what_is_near(browser, tmp_path):
    for number in range(30):
        Image.new("RGB", (512, 512), (8 * number, 0, 0)).save(tmp_path / f"{number}.png")
    rows = []
    for number in range(500):
        columns = {str(k): tmp_path / f"{(number + k) % 30}.png" for k in range(3)}
        rows.append(PageRow(f"row {number}", columns, "a prompt " * 10, number))
    write_page(tmp_path / "page.html", "500 rows", rows)
    show(browser, tmp_path / "page.html")
    opened = "return performance.getEntriesByType('navigation')[0].loadEventEnd"
    assert browser.execute_script(opened) < 5000  # ms; the machine may be busy
    code = "return [...document.images].filter(p => p.complete && p.naturalWidth).length"
    assert 2 <= browser.execute_script(code) < 100
    browser.execute_script("scrollTo(0, document.documentElement.scrollHeight)")
    settle(browser)
    shown = "return rows.filter(r => r.getBoundingClientRect().bottom > 0).map(r => r.innerText)"
    assert "row 499" in browser.execute_script(shown)[-1]
    press(browser, "ARROW_LEFT")  # keys act on a row in view
    moved = "return rows.flatMap((r, n) => r.querySelector('input').value < 2 ? [n] : [])"
    assert browser.execute_script(moved)[0] >= 498


def test_the_example_of_the_page_about_pages_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "a_05", "a_1"):
        Image.new("RGB", (8, 8)).save(f"{name}.png")
    text = (ROOT / "docs/pages.md").read_text()
    exec(re.search("```python\n(.*?)```", text, re.DOTALL)[1], {})
    [(name, files)] = read_page(tmp_path / "page.html")
    assert name == "a" and list(files) == ["before", "scale 0.5", "scale 1"]


@pytest.mark.parametrize("text", [None, "no picture"])
def test_pictures_that_are_missing_are_named(text, scene, tmp_path):
    if text:
        (tmp_path / "gone.png").write_text(text)
    columns = {"before": scene["before"], "after": tmp_path / "gone.png"}
    with pytest.raises(UserError, match=r"'x'.*gone\.png"):
        write_page(tmp_path / "page.html", "x", [PageRow("x", columns)])
    assert not (tmp_path / "page.html").exists()


# --- the report and the card ----------------------------------------------------------------------


def charts(path):
    """{title: [[(x, y) of a curve]]} of a report."""
    found = {}
    for part in path.read_text(encoding="utf-8").split("<div><h2>")[1:]:
        curves = re.findall('points="(.*?)"', part)
        points = [[tuple(map(float, p.split(","))) for p in curve.split()] for curve in curves]
        found[part.partition("<")[0].partition(" (")[0]] = points
    return found


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def told(folder, *lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 99, "lo')  # is being written
    return charts(write_report(folder))


def test_curves_have_the_heights_and_places_of_their_values(tmp_path):
    steps = ((10, 4.0), (20, 2.0), (40, 1.0), (50, float("nan")))
    names = ("loss", "validation_loss", "memory_gb")
    lines = [{"step": n, **{k: v ** (4 if "_loss" in k else 1) for k in names}} for n, v in steps]
    found = told(tmp_path, *lines)
    # no number: left out, not drawn as 0; losses of more than a decade on a logarithmic scale
    falls = {"loss": 2 / 3, "validation loss": 1 / 2, "memory, GB": 2 / 3}
    assert found.keys() == falls.keys()
    for title, fall in falls.items():
        [((x1, y1), (x2, y2), (x3, y3))] = found[title]
        assert (y2 - y1) / (y3 - y1) == pytest.approx(fall, abs=0.01) and y3 > y1
        assert (x2 - x1) / (x3 - x1) == pytest.approx(1 / 3, abs=0.01)
    assert (y1, y3) == (16, pytest.approx(16 + 190 * 3 / 4, abs=0.1))  # levels start at zero


def test_a_long_curve_is_thinned_to_means(tmp_path):
    [points] = told(tmp_path, *({"step": n, "loss": n % 2} for n in range(1200)))["loss"]
    assert len(points) == 400
    assert tool.thinned([(1, 0), (2, 1), (3, 5), (4, 7)], 2) == [(1.5, 0.5), (3.5, 6)]
    with pytest.raises(UserError, match=str(tmp_path / "samples")):
        write_report(tmp_path / "samples")


@pytest.fixture(scope="module")
def edit_run(checkpoints, tmp_path_factory):
    """A run of train_qwen_edit.py with validation at steps 0, 2 and 4, told to TensorBoard."""
    folder = tmp_path_factory.mktemp("edit")
    changes = {
        "data.dataset_configs": [suffix_dataset(PAIRS, holdout=["hubble0"])],
        "logging.log_every": 1,
        "logging.report_to": "tensorboard",
        "validation.steps": 2,
        "validation.num_inference_steps": 2,
        "model.lora.target_modules": ["to_q"],
    }
    settings = small_config(checkpoints["2511"], folder, **changes)
    config = train_qwen_edit.Config.model_validate(settings)
    train_qwen_edit.QwenImageEditTrainer(config).fit()
    return folder / "out"


def test_a_run_ends_with_its_report_and_card(edit_run, browser):
    found, rows = charts(edit_run / "report.html"), dict(read_page(edit_run / "report.html"))
    assert [len(points) for points in found["loss"]] == [4]
    assert [len(points) for points in found["validation loss"]] == [3] * 5  # mean, q1-q4
    assert {"learning rate", "seconds per step", "memory, GB"} <= found.keys()
    assert list(rows["Validation over time"]) == ["step 0", "step 2", "step 4"]
    assert list(rows["What the model sees"]) == ["first_batch"]
    whole = (edit_run / "report.html").read_text()
    assert "log_every: 1\n" in whole and "train_qwen_edit.py" in whole
    show(browser, edit_run / "report.html")
    assert labels(browser, 1) == ["step 0", "step 4"]
    drawn = "[...document.querySelectorAll('polyline')].every(p => p.getTotalLength() > 50)"
    assert browser.execute_script(f"return {drawn}")
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    card = (edit_run / "README.md").read_text()
    assert "QwenImageEditPlusPipeline" in card and "pytorch_lora_weights.safetensors" in card
    (edit_run / "report.html").unlink()  # again, on demand
    tool.sys.argv[1:], before = ["report", str(edit_run)], tool.sys.argv[1:]
    tool.main()
    tool.sys.argv[1:] = before
    assert (edit_run / "report.html").read_text() == whole


# --- trackers -------------------------------------------------------------------------------------


def read_board(folder):
    """({name: {step: value}}, {(name, step): pixels}) of TensorBoard's event files."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = loader.EventAccumulator(str(folder), {"images": 0, "scalars": 0})
    board.Reload()
    scalars = {n: {e.step: e.value for e in board.Scalars(n)} for n in board.Tags()["scalars"]}
    images = {
        (name, event.step): np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
        for name in board.Tags()["images"]
        for event in board.Images(name)
    }
    return scalars, images


def read_wandb(folder):
    """The same of the one offline run of Weights & Biases in a folder (LevelDB's log format)."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its service process has written everything
    [file] = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, record = file.read_bytes(), 7, b""
    scalars, images = {}, {}
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # no room for a head: the block's end is empty
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record, at = record + data[at + 7 : at + 7 + size], at + 7 + size
        if kind not in (1, 4):  # whole, or the last part
            continue
        parsed, record = wandb_internal_pb2.Record.FromString(record), b""
        for item in parsed.history.item:
            name, step = "/".join(item.nested_key), parsed.history.step.num
            value = json.loads(item.value_json)
            if isinstance(value, int | float):
                scalars.setdefault(item.key or name, {})[step] = value
            elif name.endswith("/filenames"):
                shown = np.asarray(Image.open(file.parent / "files" / value[0]))
                images[name.removesuffix("/filenames"), step] = shown
    return scalars, images


def assert_same_as_the_run_left(scalars, images, folder):
    for line in metrics_of(folder):
        step = line.pop("step")
        for name, value in line.items():
            assert scalars[name][step] == pytest.approx(value, rel=1e-5), (name, step)
    for file in folder.glob("samples/*.png"):
        step = re.search(r"\d+", file.stem)
        key = ("validation", int(step[0])) if step else (file.stem, 0)
        assert (images.pop(key) == np.asarray(Image.open(file))).all()
    assert not images


def test_tensorboard_gets_figures_and_pictures(edit_run):
    assert_same_as_the_run_left(*read_board(edit_run.parent), edit_run)


def test_wandb_gets_the_figures_and_pictures_of_each_slider(checkpoints, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    settings = {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false"}
    settings |= {"_DISABLE_STATS": "true", "_SERVICE_WAIT": "120"}  # s; the machine may be busy
    for name, value in settings.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.chdir(tmp_path)
    concept(tmp_path / "datasets/age")
    changes = {"report_to": "wandb", "log_every": 1, "preview": True, "scales": [0, 1]}
    changes |= {"noise_scales": [1, 2], "num_inference_steps": 4}
    config = slider_settings(checkpoints["flux"], tmp_path, **changes)
    train_pairedit.PairEditTrainer(train_pairedit.Config.model_validate(config)).fit()
    runs = [path.parent for path in tmp_path.glob("out/**/metrics.jsonl")]
    assert len(runs) == 2 and not (tmp_path / "wandb").exists()  # nothing outside output_dir
    for folder in runs:
        assert_same_as_the_run_left(*read_wandb(folder), folder)
        assert [len(points) for points in charts(folder / "report.html")["loss"]] == [4, 4, 4]
        assert "README.md" in {path.name for path in folder.iterdir()}
