"""A few words of the WebDriver protocol over plain HTTP, enough to try the page in headless Chromium."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class Browser:
    """One session of one page."""

    def __init__(self, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}/session"
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--disable-dev-shm-usage",
        ]
        capabilities = {
            "alwaysMatch": {"goog:chromeOptions": {"args": options}, "goog:loggingPrefs": {"browser": "ALL"}}
        }
        self.root += "/" + self._call("POST", "", {"capabilities": capabilities})["sessionId"]

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.root + path, data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())["value"]

    def open(self, page: Path, width: int, height: int, dark: bool = False) -> None:
        phone = width < 600
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self.cdp("Emulation.setDeviceMetricsOverride", size)
        self.cdp("Emulation.setTouchEmulationEnabled", {"enabled": phone})
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", {"features": [scheme]})
        self._call("POST", "/url", {"url": page.resolve().as_uri()})

    def cdp(self, command: str, parameters: dict[str, Any]) -> Any:
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def js(self, script: str, *arguments: Any) -> Any:
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def text(self, css: str) -> str:
        return self.js("return document.querySelector(arguments[0]).textContent", css)

    def count(self, css: str) -> int:
        return self.js("return document.querySelectorAll(arguments[0]).length", css)

    def focus(self, css: str) -> None:
        self.js("document.querySelector(arguments[0]).focus()", css)

    def press(self, key: str) -> None:
        """A key on whatever has the focus, as a keyboard sends it."""
        codes = {"ArrowRight": 39, "ArrowLeft": 37, "Home": 36, "End": 35, "Enter": 13, "Tab": 9}
        for kind in ("keyDown" if key == "Enter" else "rawKeyDown", "keyUp"):
            event = {"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.cdp("Input.dispatchKeyEvent", event | text)

    def middle(self, css: str) -> tuple[float, float]:
        """Where an element's first line is in the window, after scrolling it into view."""
        script = (
            "const e = document.querySelector(arguments[0]); e.scrollIntoView({block: 'center'});"
            "const r = e.getClientRects()[0], v = window.visualViewport;"
            "return [r.x + r.width / 2 - v.offsetLeft, r.y + r.height / 2 - v.offsetTop]"
        )
        x, y = self.js(script, css)
        return x, y

    def mouse(self, css: str, click: bool = True, to: float | None = None) -> None:
        """Move to an element and press there; with ``to``, drag to that share of the element's width."""
        x, y = self.middle(css)
        events = [("mouseMoved", x)] + ([("mousePressed", x)] if click else [])
        if to is not None:
            left, width = self.js(
                "const r = document.querySelector(arguments[0]).getBoundingClientRect(); return [r.x, r.width]",
                css,
            )
            events += [("mouseMoved", left + to * width), ("mouseReleased", left + to * width)]
        elif click:
            events.append(("mouseReleased", x))
        for kind, at in events:
            button = (
                {}
                if kind == "mouseMoved" and to is None
                else {"button": "left", "clickCount": 1, "buttons": 1}
            )
            self.cdp("Input.dispatchMouseEvent", {"type": kind, "x": at, "y": y, **button})

    def tap(self, css: str) -> None:
        x, y = self.middle(css)
        self.cdp("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]})
        self.cdp("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    def becomes(self, script: str, value: Any, seconds: float = 5.0) -> bool:
        """Whether a script comes to return ``value``: the click that follows a tap arrives later."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.js(script) == value:
                return True
            time.sleep(0.05)
        return False

    def errors(self) -> list[str]:
        """Messages that the page left in the console, warnings and errors."""
        entries = self._call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries]

    def screenshot(self, path: Path) -> None:
        shot = self.cdp("Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"})
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self._call("DELETE", "")


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser that is gone afterwards; skips the test where chromedriver is not installed."""
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("chromedriver is not installed; the page is tried without a browser only")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        browser = _connect(port)
        yield browser
        browser.close()
    finally:
        process.terminate()
        process.wait(timeout=20)


def _connect(port: int) -> Browser:
    for _ in range(100):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5):
                return Browser(port)
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("chromedriver does not answer")
