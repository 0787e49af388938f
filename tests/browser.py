"""Control the system's Chromium with Playwright."""

import contextlib
import io
import shutil
import time
from typing import NamedTuple

import numpy as np
import playwright.sync_api as playwright
import pytest
from PIL import Image

# A busy machine may need more than Playwright's default limit of 30 s to render a page of plots.
_PATIENCE_MS = 3_600_000
_PROBLEMS = ("error", "warning", "assert")


class View(NamedTuple):
  """Hold a page that is open in a browser.

  Attributes:
    page: playwright's page.
    errors: the errors and warnings on the console.
    requests: the URLs that the page requested.
  """

  page: playwright.Page
  errors: list[str]
  requests: list[str]

  def run(self, script):
    """Return the value of a JavaScript expression.

    If the value is a promise, wait for it and return its result.
    """
    return self.page.evaluate(script)

  def wait(self, script):
    """Wait until a JavaScript expression is true.

    Playwright's own wait evaluates text as code in the page, and the content security policy of our pages forbids that.
    """
    deadline = time.monotonic() + _PATIENCE_MS / 1000
    while not self.run(script):
      assert time.monotonic() < deadline, f"never became true: {script}"
      self.page.wait_for_timeout(50)

  def screenshot(self):
    """Return a screenshot of the window as an array [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(self.page.screenshot())).convert("RGB"))


def find_browser():
  """Return the path of the system's Chromium or Chrome, or skip the test if neither is installed."""
  path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
  if path is None:
    pytest.skip("No Chromium or Chrome on this machine; install one: apt-get install chromium")
  return path


@contextlib.contextmanager
def launch():
  """Start a browser, and stop it at the end of the context."""
  path = find_browser()
  # CI runs as root, and Chromium's sandbox does not start for root.
  with (
    playwright.sync_playwright() as driver,
    driver.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=_PATIENCE_MS) as browser,
  ):
    yield browser


@contextlib.contextmanager
def open_page(browser, path, size, *, scheme="light", motion="no-preference"):
  """Open a file in a window of a given size, with simulated preferences for colors and motion.

  A window of less than 500 pixels in width simulates a phone.
  """
  is_phone = size[0] < 500
  with browser.new_context(
    viewport={"width": size[0], "height": size[1]},
    is_mobile=is_phone,
    has_touch=is_phone,
    color_scheme=scheme,
    reduced_motion=motion,
  ) as context:
    page = context.new_page()
    page.set_default_timeout(_PATIENCE_MS)
    view = View(page, [], [])
    page.on("console", lambda message: view.errors.append(message.text) if message.type in _PROBLEMS else None)
    page.on("pageerror", lambda error: view.errors.append(str(error)))
    page.on("request", lambda request: view.requests.append(request.url[:200]))
    page.goto(path.as_uri())
    yield view
