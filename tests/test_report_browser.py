"""Test how a browser shows reports."""

import numpy as np
import pytest

from ddpm_jax import report
from tests import browser, reports

PHONE, DESKTOP = (390, 844), (1280, 900)
BACKGROUNDS = {"light": (250, 256), "dark": (0, 40)}


@pytest.fixture(scope="module")
def chromium():
  with browser.launch() as running:
    yield running


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp("report") / "report.html"
  report.write(path, reports.content())
  return path


@pytest.fixture(scope="module")
def film(tmp_path_factory):
  """Write a report that contains only the animation, so that it opens fast."""
  path = tmp_path_factory.mktemp("film") / "report.html"
  frames, times = reports.denoising()
  report.write(path, reports.bare()._replace(denoising=frames, denoising_times=times))
  return path


def assert_rendered(view, count):
  """Assert that `count` plots fit in their frames and show lines or points, and that the console has no errors."""
  plots = view.run("""[...document.querySelectorAll(".plot > div")].map((plot) => {
    const frame = plot.getBoundingClientRect();
    const svg = plot.querySelector("svg.main-svg")?.getBoundingClientRect();
    const marks = [...plot.querySelectorAll(".scatterlayer path.js-line, .scatterlayer .point")];
    const visible = marks.filter((mark) => mark.getBoundingClientRect().width > 0);
    return [svg?.width ?? 0, svg?.height ?? 0, frame.width, frame.height, visible.length];
  })""")
  assert len(plots) == count
  for width, height, frame_width, frame_height, marks in plots:
    assert width > 200
    assert height > 100
    assert width <= frame_width
    assert height <= frame_height
    assert marks > 0
  assert view.errors == []


@pytest.mark.parametrize(
  ("size", "scheme"),
  [
    (PHONE, "light"),
    (DESKTOP, "dark"),
    pytest.param(PHONE, "dark", marks=pytest.mark.slow),
    pytest.param(DESKTOP, "light", marks=pytest.mark.slow),
  ],
)
def test_pages_render_on_phones_and_desktops_in_light_and_dark(chromium, path, size, scheme):
  with browser.open_page(chromium, path, size, scheme=scheme) as view:
    # There are seven plots of scores against steps, two of the loss, four of other curves, two of the schedule, one of
    # the bound and one of the likelihood.
    assert_rendered(view, 17)
    assert view.run("document.scrollingElement.scrollWidth <= innerWidth && innerWidth") == size[0]
    assert all(address.startswith(("file:", "data:")) for address in view.requests)
    picture = view.screenshot()
    assert picture.shape == (size[1], size[0], 3)
    low, high = BACKGROUNDS[scheme]
    corners = picture[[2, 2, -3, -3], [2, -3, 2, -3]]
    assert np.all((low <= corners) & (corners < high))
    # The page is not blank: some pixels differ strongly from the background.
    assert np.ptp(picture.astype(int)) > 150
    assert view.run("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")


GRID_COLOR = "getComputedStyle(document.querySelector('.plot .gridlayer path')).stroke"


def test_plots_change_colors_with_the_page(chromium, path):
  with browser.open_page(chromium, path, DESKTOP) as view:
    light = view.run(GRID_COLOR)
    view.page.emulate_media(color_scheme="dark")
    view.wait(f"{GRID_COLOR} !== {light!r}")
    dark = view.run(GRID_COLOR)
    assert max(map(int, dark[4:-1].split(","))) < 100 < min(map(int, light[4:-1].split(",")))
    # Printing uses light colors even if the page is dark.
    view.page.emulate_media(color_scheme="dark", media="print")
    view.wait(f"{GRID_COLOR} === {light!r}")
    assert view.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


FRAME = "Number(document.getElementById('player').dataset.frame)"
CANVAS = "document.querySelector('#player canvas').toDataURL()"
BUTTON = "document.querySelector('#player button')"


def test_the_animation_plays_and_stops(chromium, film):
  with browser.open_page(chromium, film, DESKTOP) as view:
    view.wait(f"{FRAME} < 8")
    assert view.run(f"{BUTTON}.textContent") == "Pause"
    frame, early = view.run(f"[{FRAME}, {CANVAS}]")
    # Check frame and canvas in one expression. On a slow machine the animation may return to `frame` between two calls.
    view.wait(f"{FRAME} !== {frame} && {CANVAS} !== {early!r}")
    view.run(f"{BUTTON}.click()")
    still = view.run(f"[{FRAME}, {CANVAS}]")
    # Wait longer than the animation shows a frame.
    view.run("new Promise((done) => setTimeout(done, 900))")
    assert view.run(f"[{FRAME}, {CANVAS}]") == still
    assert view.errors == []


def test_reduced_motion_is_respected_and_keys_control_the_animation(chromium, film):
  with browser.open_page(chromium, film, PHONE, motion="reduce") as view:
    view.run("new Promise((done) => setTimeout(done, 600))")
    assert view.run(FRAME) == 8
    assert view.run(f"{BUTTON}.textContent") == "Play"
    view.run(f"{BUTTON}.focus()")
    view.page.keyboard.press("Tab")
    assert view.run("document.activeElement.type") == "range"
    view.page.keyboard.press("ArrowLeft")
    view.wait(f"{FRAME} === 7")
    assert view.run("document.querySelector('#player output').textContent") == "t = 0.125"
    assert view.run("document.activeElement.getAttribute('aria-valuetext')") == "t = 0.125"
    # The button still starts the animation.
    view.run(f"{BUTTON}.focus()")
    view.page.keyboard.press("Space")
    view.wait(f"{FRAME} < 7")


def test_scripts_in_names_do_not_run(chromium, tmp_path):
  bad = "</script><script>hacked=1</script><img src=x onerror=hacked=1>"
  content = reports.content(title=bad, config={bad: bad}, facts=[(bad, bad)])
  content.evaluation["curve"][0]["sampler"] = content.evaluation[bad] = bad
  content.metrics[0][bad] = 1.0
  report.write(tmp_path / "report.html", content)
  with browser.open_page(chromium, tmp_path / "report.html", (360, 640)) as view:
    assert_rendered(view, 18)
    assert view.run("typeof hacked") == "undefined"
    assert view.run("document.title") == bad
    assert bad in view.run("document.querySelector('.plot .legend').textContent")
    assert view.run("document.scrollingElement.scrollWidth <= innerWidth")


def test_the_security_policy_forbids_other_scripts_and_the_network(chromium, film):
  with browser.open_page(chromium, film, DESKTOP) as view:
    view.run("""(() => {
      const script = document.createElement("script");
      script.textContent = "hacked = 1";
      document.body.append(script);
      return fetch("data:,").then(() => { hacked = 1; }, () => null);
    })()""")
    assert view.run("typeof hacked") == "undefined"
    assert any("Content Security Policy" in error for error in view.errors)


def test_a_minimal_report_opens(chromium, tmp_path):
  report.write(tmp_path / "report.html", reports.bare())
  with browser.open_page(chromium, tmp_path / "report.html", PHONE) as view:
    assert_rendered(view, 0)
    assert "Not in this report" in view.run("document.body.innerText")


def test_browser_tests_are_skipped_without_a_browser(monkeypatch):
  monkeypatch.setenv("PATH", "/nowhere")
  with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"):
    browser.find_browser()
