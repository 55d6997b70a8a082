"""A real browser for tests: Debian's Chromium without a window, driven by selenium; a test that asks for it is skipped without."""

from __future__ import annotations

import io
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TEXT = "return document.body.innerText"


class Browser:
    """Chromium.

    Args:
        folder: of its screenshots, one for each page that was looked at.
    """

    def __init__(self, folder: Path) -> None:
        webdriver = pytest.importorskip("selenium.webdriver")
        program, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
        if program is None or driver is None:
            pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
        options = webdriver.ChromeOptions()
        options.binary_location = program
        for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1600,1200"):
            options.add_argument(f"--{flag}")
        self.folder = folder
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.quit()

    def pretend(self, width: int, height: int, *, dark: bool) -> None:
        """Be a telephone of this size, in points, from now on."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": True}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def look(self, name: str, address: str, *words: str, inside: str | None = None, seconds: float = 180) -> str:
        """Open a page, wait for its words, and return its text. Its screenshot is kept, and must show something.

        Args:
            name: of the screenshot. words: that must appear. inside: words that must appear in a frame of the page.
        """
        self.driver.get("about:blank")  # or two places of one page would not be two visits
        self.driver.get(address)
        self.wait_for(words, seconds)
        if inside is not None:
            self._wait_for_frame(inside, seconds)
        self.picture(name)
        return self.text()

    def text(self) -> str:
        """Return the text that the page shows."""
        return self.driver.execute_script(TEXT) or ""

    def wait_for(self, words: tuple[str, ...], seconds: float = 180) -> None:
        """Wait until the page shows all of these words."""
        deadline = time.monotonic() + seconds
        while missing := [word for word in words if word not in self.text()]:
            if time.monotonic() > deadline:
                self.driver.save_screenshot(str(self.folder / "failed.png"))
                pytest.fail(f"{self.driver.current_url} does not show {missing}:\n{self.text()[:3000]}")
            time.sleep(0.5)

    def _wait_for_frame(self, words: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            for frame in self.driver.find_elements("tag name", "iframe"):
                self.driver.switch_to.frame(frame)
                found = words in self.text()
                self.driver.switch_to.default_content()
                if found:
                    return
            if time.monotonic() > deadline:
                pytest.fail(f"no frame of {self.driver.current_url} shows {words!r}")
            time.sleep(0.5)

    def picture(self, name: str) -> np.ndarray:
        """Keep a screenshot and return it, (H, W, 3), 0 to 255; it is more than one colour and a spinner."""
        content = self.driver.get_screenshot_as_png()
        (self.folder / f"{name}.png").write_bytes(content)
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
        assert len(colours) > 50 and counts.max() < 0.99 * counts.sum(), f"{name} is blank"
        return pixels
