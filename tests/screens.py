"""Pages as a wide and a narrow screen show them, light and dark: one picture for docs/.

python tests/screens.py outputs/demo/report.html --out docs/report_screens.jpg [--wait 2]
python tests/screens.py http://127.0.0.1:7860 --out docs/serve_screens.jpg
"""

import argparse
import io
import shutil
import tempfile
import time
from pathlib import Path

from conftest import BROWSER_FLAGS
from PIL import Image
from selenium import webdriver

WIDTHS_PX, HEIGHT_PX, GAP_PX = (1200, 420), 900, 12


def chromium(profile):
    """A headless window."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in [*BROWSER_FLAGS.split(), f"user-data-dir={profile}"]:
        options.add_argument(f"--{flag}")
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))


def draw_screens(window, file, wait_s=1.0):
    """Write the page that is open: for each width, light and dark."""
    found = []
    for width in WIDTHS_PX:
        for scheme in ("light", "dark"):
            feature = {"name": "prefers-color-scheme", "value": scheme}
            window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
            size = {"width": width, "height": HEIGHT_PX, "deviceScaleFactor": 1, "mobile": False}
            window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            time.sleep(wait_s)
            across = window.execute_script("return document.documentElement.scrollWidth")
            if across > width:
                print(f"{across} px wide on a screen of {width} px ({scheme})")
            shot = Image.open(io.BytesIO(window.get_screenshot_as_png()))
            found.append(shot.convert("RGB"))
    width = sum(shot.width + GAP_PX for shot in found) - GAP_PX
    sheet, x = Image.new("RGB", (width, HEIGHT_PX), "gray"), 0
    for shot in found:
        sheet.paste(shot, (x, 0))
        x += shot.width + GAP_PX
    sheet.resize((width // 2, HEIGHT_PX // 2), Image.Resampling.LANCZOS).save(file, quality=88)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", help="a file or an address")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wait", type=float, default=1, help="seconds until it is drawn")
    given = parser.parse_args()
    page = given.page if "://" in given.page else Path(given.page).resolve().as_uri()
    with tempfile.TemporaryDirectory() as profile:
        window = chromium(profile)
        window.get(page)
        draw_screens(window, given.out, given.wait)
        window.quit()


if __name__ == "__main__":
    main()
