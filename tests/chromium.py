"""Headless Chromium over the pipe of its DevTools protocol: real time, a phone's screen, keys, what it complains of."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
]  # fmt: skip
KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "Home": 36, "End": 35, "Tab": 9, "Enter": 13}


@contextmanager
def chromium(profile: Path) -> Iterator["Chromium"]:
    """A browser with a profile of its own; it is gone at the end of the block."""
    read, its_write = os.pipe()
    its_read, write = os.pipe()
    # the protocol's pipes are descriptors 3 (in) and 4 (out) of the browser
    shell = f'exec "$@" 3<&{its_read} 4>&{its_write}'
    arguments = [*FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
    process = subprocess.Popen(
        ["bash", "-c", shell, "bash", str(CHROMIUM), *arguments],
        pass_fds=(its_read, its_write),
        stderr=subprocess.DEVNULL,
    )
    os.close(its_read)
    os.close(its_write)
    with open(read, "rb", buffering=0) as incoming, open(write, "wb", buffering=0) as outgoing:
        browser = Chromium(incoming, outgoing)
        try:
            yield browser
        finally:
            browser.call("Browser.close")
            process.wait(timeout=30)


class Chromium:
    """A running browser."""

    def __init__(self, incoming: Any, outgoing: Any) -> None:
        self._incoming, self._outgoing = incoming, outgoing
        self._buffer, self._number = b"", 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The answer to one command; events that come before it are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        self._outgoing.write(json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def wait_for(self, event: str, session: str) -> dict[str, Any]:
        """The next event of that name, or one that came already."""
        seen = 0
        while True:
            for one in self.events[seen:]:
                if one.get("method") == event and one.get("sessionId") == session:
                    return one["params"]
            seen = len(self.events)
            self.events.append(self._next())

    def page(self, width: int, height: int = 900, *, dark: bool = False) -> "Page":
        """An empty page on a screen of that size; below 600 pixels it is a phone."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        page.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        return page

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            read = self._incoming.read(1 << 20)
            if not read:
                raise RuntimeError("Chromium ended")
            self._buffer += read
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


class Page:
    """One page of it."""

    def __init__(self, browser: Chromium, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol."""
        return self._browser.call(method, self._session, **parameters)

    def open(self, file: Path) -> None:
        """Load the file and wait for its load event."""
        self.call("Page.navigate", url=file.as_uri())
        self._browser.wait_for("Page.loadEventFired", self._session)

    def run(self, script: str) -> Any:
        """The value of an expression there; a promise is awaited."""
        answer = self.call(
            "Runtime.evaluate",
            expression=script,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key where the focus is."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=KEYS[key],
            )

    def type(self, text: str) -> None:
        """Write into the element that has the focus."""
        self.call("Input.insertText", text=text)

    def screenshot(self, file: Path, *, whole: bool = True) -> None:
        """Save what is to be seen, or all of the page."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(answer["data"]))

    def seconds(self) -> float:
        """Processor time of the page's thread so far; needs `Performance.enable` before the file is opened."""
        metrics = self.call("Performance.getMetrics")["metrics"]
        return next(one["value"] for one in metrics if one["name"] == "TaskDuration")

    def complaints(self) -> list[str]:
        """Uncaught errors, and errors and warnings on the console."""
        found = []
        for method, of in self._own():
            if method == "Runtime.exceptionThrown":
                found.append(of["exceptionDetails"].get("exception", of["exceptionDetails"]))
            if method == "Runtime.consoleAPICalled" and of["type"] in ("error", "warning"):
                found.append(of["args"])
            if method == "Log.entryAdded" and of["entry"]["level"] in ("error", "warning"):
                found.append(of["entry"])
        return [json.dumps(one) for one in found]

    def requests(self) -> list[str]:
        """Addresses that were asked for; `data:` and `blob:` need no network."""
        asked = [
            of["request"]["url"]
            for method, of in self._own()
            if method == "Network.requestWillBeSent"
        ]
        return [url for url in asked if not url.startswith(("data:", "blob:"))]

    def _own(self) -> list[tuple[str, dict[str, Any]]]:
        self.run("0")  # what was sent before has come then
        return [
            (one["method"], one["params"])
            for one in self._browser.events
            if one.get("sessionId") == self._session
        ]
