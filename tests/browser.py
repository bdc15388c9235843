"""A page in Chromium, without a network: by the browser's own protocol, over a local socket."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser")) if p), None)
PATIENCE = 60.0  # seconds


class Page:
    """One tab. `errors`: what console and scripts complained of; `asked`: what was loaded."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._number = socket, 0
        self.errors: list[str] = []
        self.asked: list[str] = []
        self.loaded = False
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """A command's answer; what happens meanwhile is noted."""
        self._number += 1
        told = {"id": self._number, "method": method, "params": parameters}
        self._socket.send(json.dumps(told))
        while True:
            said = self._hear()
            if said.get("id") == self._number:
                if "error" in said:
                    raise RuntimeError(f"{method}: {said['error']}")
                return said["result"]

    def open(self, url: str) -> None:
        """Load a page to its end."""
        self.loaded = False
        self.call("Page.navigate", url=url)
        while not self.loaded:
            self._hear()

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        told = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in told:
            raise RuntimeError(json.dumps(told["exceptionDetails"])[:2000])
        return told["result"].get("value")

    def click(self, script: str) -> None:
        """Click on the middle of an element, as a person does."""
        place = self.run(
            f"(() => {{ const e = {script}; e.scrollIntoView({{block: 'center', behavior: "
            "'instant'}); const r = e.getBoundingClientRect(); "
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        button = {"x": place[0], "y": place[1], "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **button)

    def picture(self, file: Path, whole: bool = False) -> None:
        """The window, or the whole page, as a PNG."""
        told = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(told["data"]))

    def paper(self) -> bytes:
        """The page as it prints: a PDF."""
        told = self.call("Page.printToPDF", printBackground=True, preferCSSPageSize=True)
        return base64.b64decode(told["data"])

    def _hear(self) -> dict[str, Any]:
        said: dict[str, Any] = json.loads(self._socket.recv(timeout=PATIENCE))
        told = said.get("params", {})
        match said.get("method"):
            case "Page.loadEventFired":
                self.loaded = True
            case "Network.requestWillBeSent":
                self.asked.append(told["request"]["url"])
            case "Runtime.exceptionThrown":
                self.errors.append(json.dumps(told["exceptionDetails"])[:500])
            case "Log.entryAdded":
                self.errors.append(told["entry"]["text"])
            case "Runtime.consoleAPICalled":
                self.errors.append(json.dumps(told["args"])[:500])
        return said


@contextmanager
def browser() -> Iterator[Page]:
    """A tab of a browser that resolves no name."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        arguments = [
            *(str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--remote-debugging-port=0", f"--user-data-dir={home}", "--hide-scrollbars"),
            *("--disable-dev-shm-usage", "--disable-background-networking", "--mute-audio"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", "about:blank"),
        ]
        process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            with connect(_address(Path(home)), max_size=None, proxy=None) as socket:
                yield Page(socket)
        finally:
            process.terminate()
            process.wait(PATIENCE)


def _address(home: Path) -> str:
    """Where the first tab listens, once it does."""
    import urllib.request

    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        told = home / "DevToolsActivePort"
        if told.exists() and len(lines := told.read_text().splitlines()) == 2:
            with urllib.request.urlopen(f"http://127.0.0.1:{lines[0]}/json/list") as answer:
                tabs = [tab for tab in json.load(answer) if tab["type"] == "page"]
            if tabs:
                return str(tabs[0]["webSocketDebuggerUrl"])
        time.sleep(0.1)
    raise TimeoutError("the browser does not answer")
