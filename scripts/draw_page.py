"""Take the docs' pictures of the page: `python scripts/draw_page.py FOLDER`, the folder that the quickstart wrote.

Needs Chromium with its driver, and the extra `test`.
"""

from __future__ import annotations

import io
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from PIL import Image
from selenium import webdriver

DOCS = Path(__file__).resolve().parents[1] / "docs"
FOX = "match?img={row}&t=a+fox+in+the+snow&t=an+orange+animal&t=a+vegetable&t=a+way+to+travel"
# Of each picture: address, window, whether it is dark, the size that it is stored in.
PICTURES = {
    "page-match.png": (FOX, (1180, 650), False, (900, 495)),
    "page-classify.png": ("classes?c=animal&c=food&c=vehicle", (1180, 748), True, (900, 570)),
    "page-search.png": ("search?q=a+wild+animal", (390, 800), False, (300, 615)),
}


def main(folder: Path) -> None:
    """Serve the run, open each address, and store what is seen."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "litune", "serve", folder / "run", "--images", folder / "features"]
    server = subprocess.Popen([*map(str, command), "--port", str(port)])
    try:
        address = f"http://127.0.0.1:{port}/"
        wait_for(address + "health", server)
        for name, (state, size, dark, stored) in PICTURES.items():
            take(address + "#" + state.format(row=row_of("fox", folder)), size, dark).resize(
                stored, Image.Resampling.LANCZOS
            ).quantize(128, dither=Image.Dither.NONE).save(DOCS / name, optimize=True)
            print(DOCS / name)
    finally:
        server.terminate()
        server.wait()


def row_of(caption: str, folder: Path) -> int:
    """The first image of the store that has this caption."""
    from litune.store.store import FeatureStore

    captions = FeatureStore(folder / "features").metadata["captions"].to_pylist()
    return next(i for i, one in enumerate(captions) if caption in one)


def wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until the server answers."""
    while server.poll() is None:
        try:
            urllib.request.urlopen(address)
            return
        except OSError:
            time.sleep(0.2)
    sys.exit(f"the server ended with {server.returncode}")


def take(address: str, size: tuple[int, int], dark: bool) -> Image.Image:
    """What Chromium shows of an address once its pictures are there."""
    options = webdriver.ChromeOptions()
    for flag in ("headless=new", "no-sandbox", "hide-scrollbars", "force-device-scale-factor=2"):
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options=options)
    try:
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 2, "mobile": size[0] < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        browser.get(address)
        time.sleep(5)  # the texts are encoded, the bars have moved
        return Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    finally:
        browser.quit()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
