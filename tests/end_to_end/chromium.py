"""A headless Chromium, asked over a pipe what it makes of a page (DevTools protocol)."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--disable-extensions", "--remote-debugging-pipe",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # nothing leaves this machine
)  # fmt: skip
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PICTURES = """
Promise.all([...document.images].map(image => image.decode().catch(() => null))).then(() => {
  const seen = (element) => {
    const box = element.getBoundingClientRect(), style = getComputedStyle(element);
    return box.width > 0 && box.height > 0 && style.visibility === "visible";
  };
  for (const details of document.querySelectorAll("details")) details.open = true;
  return {
    title: document.title,
    text: document.body.innerText,
    pictures: [...document.querySelectorAll("img, svg")].map(element => ({
      kind: element.tagName.toLowerCase(),
      pixels: element.tagName === "IMG" ? element.naturalWidth * element.naturalHeight : null,
      drawn: element.tagName === "IMG" || element.querySelector("path, line, rect, circle, " +
        "polyline, polygon, text, image, use") !== null,
      seen: seen(element),
    })),
  };
})
"""


def find() -> str | None:
    """Where a Chromium is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Visit:
    """What a browser found on a page."""

    errors: list[str] = field(default_factory=list)
    """What the console shows as an error, exceptions and failed requests included."""
    requests: list[str] = field(default_factory=list)
    """Addresses that were asked for, ``data:`` left out."""
    title: str = ""
    text: str = ""
    pictures: list[dict[str, Any]] = field(default_factory=list)


class Chromium:
    """One browser process with an empty profile; closes with the ``with`` block."""

    def __init__(self, profile: Path) -> None:
        binary = find()
        assert binary is not None
        to_browser, self._requests = os.pipe()
        self._answers, from_browser = os.pipe()
        # the browser reads from descriptor 3 and writes to 4
        script = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        words = [binary, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", script, *words],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._number, self._buffer = 0, b""
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(AssertionError, OSError):
            self._call("Browser.close", {})
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # it has many processes
        self._process.wait()
        os.close(self._requests)
        os.close(self._answers)

    def visit(self, page: Path) -> Visit:
        """Open a page of this machine and look at it once it is loaded."""
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})
        session = attached["sessionId"]
        for part in ("Runtime", "Log", "Network", "Page"):
            self._call(f"{part}.enable", {}, session)
        self._events.clear()
        self._call("Page.navigate", {"url": page.resolve().as_uri()}, session)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._read()
        asked = {"expression": PICTURES, "awaitPromise": True, "returnByValue": True}
        found = self._call("Runtime.evaluate", asked, session)["result"]["value"]
        visit = Visit(title=found["title"], text=found["text"], pictures=found["pictures"])
        for event in self._events:
            if event.get("sessionId") == session:
                _note(event["method"], event["params"], visit)
        return visit

    def _call(self, method: str, params: dict[str, Any], session: str | None = None) -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._requests, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self, seconds: float = 120) -> dict[str, Any]:
        """The next message; events are kept."""
        deadline = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], deadline - time.monotonic())
            assert ready, "the browser does not answer"
            block = os.read(self._answers, 1 << 20)
            assert block, "the browser ended"
            self._buffer += block
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self._events.append(message)
        return message


def _note(method: str, params: dict[str, Any], visit: Visit) -> None:
    """Put down what an event says."""
    if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
        visit.errors.append(str([value.get("value") for value in params["args"]]))
    elif method == "Runtime.exceptionThrown":
        visit.errors.append(params["exceptionDetails"]["text"])
    elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
        visit.errors.append(params["entry"]["text"])
    elif method == "Network.requestWillBeSent":
        if not (url := params["request"]["url"]).startswith("data:"):
            visit.requests.append(url)
    elif method == "Network.loadingFailed":
        visit.errors.append(params["errorText"])
