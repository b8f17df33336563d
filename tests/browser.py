"""Headless Chromium, driven over its debugging pipe: no package beyond the browser."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import time
from collections.abc import Iterator

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page:
    """One tab."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._number, self._rest = 0, b""
        self.requested: list[str] = []
        self.complaints: list[str] = []
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters) -> dict:
        return self._call(method, parameters, self._session)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def run(self, script: str):
        """The value of an expression; promises are awaited."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, script: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"never true: {script}; {self.complaints}"
            time.sleep(0.05)

    def key(self, key: str, text: str = "", modifiers: int = 0) -> None:
        common = {"key": key, "code": key, "windowsVirtualKeyCode": {"Enter": 13, "Escape": 27, "Tab": 9}.get(key, 0)}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, modifiers=modifiers, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", modifiers=modifiers, **common)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def window(self, width: int, height: int, scheme: str) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, file: pathlib.Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def _call(self, method: str, parameters: dict, session: str | None = None) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        os.write(self._write, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> dict:
        while b"\0" not in self._rest:
            part = os.read(self._read, 1 << 16)
            assert part, "the browser is gone"
            self._rest += part
        raw, self._rest = self._rest.split(b"\0", 1)
        message = json.loads(raw)
        parameters = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requested.append(parameters["request"]["url"])
        if message.get("method") == "Log.entryAdded":
            self.complaints.append(parameters["entry"]["text"])
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(parameters["exceptionDetails"]))
        return message


@contextlib.contextmanager
def browser(profile: pathlib.Path) -> Iterator[Page]:
    to_browser, write = os.pipe()
    read, from_browser = os.pipe()
    # the browser reads from descriptor 3 and writes to 4
    script = f'exec 3<&{to_browser} 4>&{from_browser}; exec "$@"'
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
               "--disable-background-networking", f"--user-data-dir={profile}"]  # fmt: skip
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", CHROMIUM, *options],
        pass_fds=(to_browser, from_browser),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Page(write, read)
    finally:
        process.terminate()
        process.wait(20)
        os.close(write)
        os.close(read)
