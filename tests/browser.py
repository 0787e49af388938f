"""The system's Chromium, driven by Playwright."""

import contextlib
import io
import shutil
import time
from typing import NamedTuple

import numpy as np
import playwright.sync_api as playwright
import pytest
from PIL import Image

# Playwright's own limit is 30 s; a busy machine may draw a page of plots more slowly.
_PATIENCE_MS = 3_600_000
_COMPLAINTS = ("error", "warning", "assert")


class View(NamedTuple):
  """A page that a browser shows."""

  page: playwright.Page
  errors: list[str]  # what the console complained of
  requests: list[str]  # every address that the page asked for

  def run(self, script):
    """Return the value of a JavaScript expression, of a promise once it is kept."""
    return self.page.evaluate(script)

  def wait(self, script):
    """Return once an expression is true. Playwright's own wait evaluates text in the page, which our pages forbid."""
    deadline = time.monotonic() + _PATIENCE_MS / 1000
    while not self.run(script):
      assert time.monotonic() < deadline, f"waited in vain for {script}"
      self.page.wait_for_timeout(50)

  def photograph(self):
    """Return the window as an array [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(self.page.screenshot())).convert("RGB"))


def find():
  """Return the path of the system's Chromium or Chrome. Skip the test where there is none."""
  path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
  if path is None:
    pytest.skip("No Chromium or Chrome on this machine; install one: apt-get install chromium")
  return path


@contextlib.contextmanager
def launch():
  """Start a browser and end it afterwards."""
  path = find()
  # Chromium's sandbox does not start for root, as which CI runs.
  with (
    playwright.sync_playwright() as driver,
    driver.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=_PATIENCE_MS) as browser,
  ):
    yield browser


@contextlib.contextmanager
def show(browser, path, size, *, scheme="light", motion="no-preference"):
  """Open a file on a screen of this size, with these preferences."""
  phone = size[0] < 500
  with browser.new_context(
    viewport={"width": size[0], "height": size[1]},
    is_mobile=phone,
    has_touch=phone,
    color_scheme=scheme,
    reduced_motion=motion,
  ) as context:
    page = context.new_page()
    page.set_default_timeout(_PATIENCE_MS)
    view = View(page, [], [])
    page.on("console", lambda message: view.errors.append(message.text) if message.type in _COMPLAINTS else None)
    page.on("pageerror", lambda error: view.errors.append(str(error)))
    page.on("request", lambda request: view.requests.append(request.url[:200]))
    page.goto(path.as_uri())
    yield view
