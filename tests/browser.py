"""A headless Chromium, driven by its own protocol over a pipe: nothing to install but the browser."""

import base64
import contextlib
import fcntl
import io
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

_FLAGS = (
  "--headless",
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--disable-dev-shm-usage",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  "--hide-scrollbars",
  "--remote-debugging-pipe",
)

# The browser reads its protocol from file 3 and answers in file 4.
_LAUNCH = """
import os, sys
for end, place in zip(map(int, sys.argv[1:3]), (3, 4)):
  os.dup2(end, place)
  os.close(end)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
  """One page in a browser. `errors` holds what its console complained of, `requests` every address it asked for."""

  def __init__(self, process, to_browser, from_browser):
    self._process, self._to, self._from = process, to_browser, from_browser
    self._buffer, self._count, self._session = b"", 0, None
    self.errors, self.requests, self._loaded = [], [], False
    target = self.call("Target.createTarget", url="about:blank")["targetId"]
    self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"):
      self.call(f"{domain}.enable")

  def open(self, path, width, height, *, scheme="light", motion="no-preference"):
    """Opens a file as a screen of this size would, with these preferences."""
    self.errors, self.requests, self._loaded = [], [], False
    self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
    self.call("Emulation.setTouchEmulationEnabled", enabled=width < 500)
    self.prefer(scheme, motion)
    self.call("Page.navigate", url=path.as_uri())
    self._until(lambda: self._loaded, "the page to load")

  def prefer(self, scheme, motion="no-preference", media=""):
    features = [
      {"name": "prefers-color-scheme", "value": scheme},
      {"name": "prefers-reduced-motion", "value": motion},
    ]
    self.call("Emulation.setEmulatedMedia", features=features, media=media)

  def run(self, script):
    """The value of a JavaScript expression; promises are awaited."""
    answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
    assert "exceptionDetails" not in answer, answer
    return answer["result"].get("value")

  def wait(self, script, seconds=20):
    """Returns once an expression is true."""
    deadline = time.monotonic() + seconds
    while not self.run(script):
      assert time.monotonic() < deadline, f"waited {seconds} s in vain for {script}"
      time.sleep(0.05)

  def press(self, key, code, text=""):
    for kind in ("keyDown", "keyUp"):
      self.call(
        "Input.dispatchKeyEvent",
        type=kind,
        key=key,
        code=key if key != " " else "Space",
        windowsVirtualKeyCode=code,
        text=text,
      )

  def photograph(self, whole=False):
    """The window, or the whole page, as an array [H, W, 3]."""
    clip = {}
    if whole:
      size = self.call("Page.getLayoutMetrics")["cssContentSize"]
      clip = {"captureBeyondViewport": True, "clip": size | {"x": 0, "y": 0, "scale": 1}}
    png = base64.b64decode(self.call("Page.captureScreenshot", format="png", **clip)["data"])
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))

  def call(self, method, **parameters):
    """One command of the protocol, and its answer."""
    self._count += 1
    message = {"id": self._count, "method": method, "params": parameters}
    if self._session:
      message["sessionId"] = self._session
    self._to.write(json.dumps(message).encode() + b"\0")
    self._to.flush()
    number, answer = self._count, []

    def arrived():
      return bool(answer)

    self._until(arrived, method, lambda m: answer.append(m) if m.get("id") == number else None)
    assert "error" not in answer[0], (method, answer[0]["error"])
    return answer[0]["result"]

  def close(self):
    self._session = None
    self.call("Browser.close")

  def _until(self, done, what, take=lambda message: None, seconds=90):
    deadline = time.monotonic() + seconds
    while not done():
      while b"\0" not in self._buffer:
        ready = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))[0]
        assert ready, f"the browser did not answer within {seconds} s to {what}"
        read = os.read(self._from, 1 << 16)
        assert read, f"the browser ended while it should answer to {what}"
        self._buffer += read
      message, self._buffer = self._buffer.split(b"\0", 1)
      message = json.loads(message)
      self._note(message)
      take(message)

  def _note(self, message):
    method, parameters = message.get("method"), message.get("params", {})
    if method == "Page.loadEventFired":
      self._loaded = True
    elif method == "Runtime.exceptionThrown":
      self.errors.append(str(parameters["exceptionDetails"]))
    elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
      self.errors.append(str(parameters["args"]))
    elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
      self.errors.append(parameters["entry"]["text"])
    elif method == "Network.requestWillBeSent":
      self.requests.append(parameters["request"]["url"][:200])


@contextlib.contextmanager
def browser():
  """A browser of its own profile, gone at the end."""
  program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
  assert program, "Found no Chromium to open the report in: apt-get install chromium"
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
    their_end, to_browser = os.pipe()
    from_browser, their_answer = os.pipe()
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (their_end, their_answer)]
    process = subprocess.Popen(
      [sys.executable, "-c", _LAUNCH, *map(str, ends), program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
      pass_fds=ends,
      stderr=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
    )
    for end in (their_end, their_answer, *ends):
      os.close(end)
    try:
      with os.fdopen(to_browser, "wb") as sender:
        page = Browser(process, sender, from_browser)
        yield page
        with contextlib.suppress(AssertionError, OSError):
          page.close()
    finally:
      os.close(from_browser)
      process.terminate()
      try:
        process.wait(20)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
