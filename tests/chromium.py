"""A headless Chromium, where one is installed, driven by its own protocol over a WebSocket.

Enough of it to open a page in a window of some size, press keys, ask for values, take a picture, and hear of errors and
of requests that leave the machine::

    with Browser() as browser:
        browser.open(page.as_uri(), width=390, dark=True)
        browser.press("ArrowRight")
        assert not browser.errors

Left out: anything that needs a display, and other browsers.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
#: Seconds that a busy machine may take for one answer.
_PATIENCE = 120
_KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "Home": 36, "End": 35, " ": 32}


def find_chromium() -> str | None:
    """The program, or None."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One window with one page at a time.

    Attributes:
        errors: What the page has complained of since it was opened: exceptions, errors on the console, files that are
            not there.
        requests: Addresses it has asked for that are neither on the disk nor in the page itself.
    """

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._count = 0

    def __enter__(self) -> Self:
        program = find_chromium()
        assert program, f"none of {NAMES} is installed"
        self._closing = contextlib.ExitStack()
        self._folder = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        flags += [
            "--disable-dev-shm-usage",
            "--remote-debugging-port=0",
            f"--user-data-dir={self._folder.name}",
        ]
        self._process = subprocess.Popen(
            [program, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        port, path = self._address()
        address = f"ws://127.0.0.1:{port}{path}"
        self._socket = self._closing.enter_context(connect(address, max_size=None, open_timeout=_PATIENCE))
        self._session = None
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()
        self._process.terminate()
        self._process.wait(timeout=_PATIENCE)
        self._folder.cleanup()

    def _address(self) -> tuple[str, str]:
        file = Path(self._folder.name) / "DevToolsActivePort"
        limit = time.monotonic() + _PATIENCE
        while time.monotonic() < limit:
            lines = file.read_text().split() if file.exists() else []
            if len(lines) == 2:
                return lines[0], lines[1]
            time.sleep(0.05)
        raise TimeoutError("Chromium did not say where it listens")

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        event = json.loads(self._socket.recv(timeout=_PATIENCE))
        params = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description", details["text"]))
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "assert"):
                self.errors.append(str([argument.get("value") for argument in params["args"]]))
            case "Network.requestWillBeSent":
                url = params["request"]["url"]
                if not url.startswith(("file:", "data:", "about:", "blob:")):
                    self.requests.append(url)
            case "Page.loadEventFired":
                self._loaded = True
        return event

    def open(self, url: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Open a page in a window of this size and wait until it is there."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._ask("Emulation.setEmulatedMedia", features=scheme)
        self._ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        self.errors, self.requests, self._loaded = [], [], False
        self._ask("Page.navigate", url=url)
        while not self._loaded:
            self._next()

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self._ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, condition: str) -> bool:
        """Wait until an expression in the page is true; False where it has not become so in good time."""
        limit = time.monotonic() + _PATIENCE
        while time.monotonic() < limit:
            with contextlib.suppress(AssertionError):  # between two pages there is none to ask
                if self.evaluate(condition):
                    return True
            time.sleep(0.05)
        return False

    def press(self, key: str) -> None:
        """Press a key, by its name in the DOM."""
        code = _KEYS.get(key, ord(key[0].upper()))
        text = {"text": key} if len(key) == 1 else {}
        self._ask("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        self._ask("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def screenshot(self, file: Path, whole: bool = True) -> None:
        """Write a PNG of the whole page, or of the window."""
        data = self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        Path(file).write_bytes(base64.b64decode(data))
