"""Reports as a browser shows them."""

import numpy as np
import pytest

from ddpm_jax import report
from tests import reports
from tests.browser import browser

PHONE, DESKTOP = (390, 844), (1280, 900)
LIT = {"light": (250, 256), "dark": (0, 40)}


@pytest.fixture(scope="module")
def chromium():
  with browser() as page:
    yield page


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp("report") / "report.html"
  report.write(path, reports.content())
  return path


@pytest.fixture(scope="module")
def film(tmp_path_factory):
  """A report of the animation alone, which opens at once."""
  path = tmp_path_factory.mktemp("film") / "report.html"
  frames, times = reports.denoising()
  report.write(path, reports.bare()._replace(denoising=frames, denoising_times=times))
  return path


def assert_drawn(page, count):
  """Every plot has drawn lines or points within its own bounds, and the browser had nothing to complain of."""
  plots = page.run("""[...document.querySelectorAll(".plot > div")].map((plot) => {
    const outer = plot.getBoundingClientRect();
    const svg = plot.querySelector("svg.main-svg")?.getBoundingClientRect();
    const marks = [...plot.querySelectorAll(".scatterlayer path.js-line, .scatterlayer .point")];
    const drawn = marks.filter((mark) => mark.getBoundingClientRect().width > 0);
    return [svg?.width ?? 0, svg?.height ?? 0, outer.width, outer.height, drawn.length];
  })""")
  assert len(plots) == count
  for width, height, outer_width, outer_height, marks in plots:
    assert width > 200
    assert height > 100
    assert width <= outer_width
    assert height <= outer_height
    assert marks > 0
  assert page.errors == []


@pytest.mark.parametrize(
  ("size", "scheme"),
  [(PHONE, "light"), (PHONE, "dark"), (DESKTOP, "light"), (DESKTOP, "dark")],
)
def test_it_looks_right_on_phones_and_desktops_by_day_and_night(chromium, path, size, scheme):
  chromium.open(path, *size, scheme=scheme)
  # Seven scores against steps, loss twice, four other curves, two schedules, bound, likelihood.
  assert_drawn(chromium, 17)
  assert chromium.run("document.scrollingElement.scrollWidth <= innerWidth && innerWidth") == size[0]
  assert all(address.startswith(("file:", "data:")) for address in chromium.requests)
  picture = chromium.photograph()
  assert picture.shape == (size[1], size[0], 3)
  low, high = LIT[scheme]
  corners = picture[[2, 2, -3, -3], [2, -3, 2, -3]]
  assert np.all((low <= corners) & (corners < high))
  # Something is written on it, in a colour that stands out.
  assert np.ptp(picture.astype(int)) > 150
  assert chromium.run("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")


def grid_color(page):
  return page.run("getComputedStyle(document.querySelector('.plot .gridlayer path')).stroke")


def test_plots_follow_the_page_when_night_falls(chromium, path):
  chromium.open(path, *DESKTOP)
  day = grid_color(chromium)
  chromium.prefer("dark")
  chromium.wait(f"getComputedStyle(document.querySelector('.plot .gridlayer path')).stroke !== {day!r}")
  night = grid_color(chromium)
  assert max(map(int, night[4:-1].split(","))) < 100 < min(map(int, day[4:-1].split(",")))
  # Paper is white at night too.
  chromium.prefer("dark", media="print")
  chromium.wait(f"getComputedStyle(document.querySelector('.plot .gridlayer path')).stroke === {day!r}")
  assert chromium.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
  chromium.prefer("light")


FRAME = "Number(document.getElementById('player').dataset.frame)"
CANVAS = "document.querySelector('#player canvas').toDataURL()"


def test_the_animation_plays_and_stops(chromium, film):
  chromium.open(film, *DESKTOP)
  chromium.wait(f"{FRAME} < 8")
  assert chromium.run("document.querySelector('#player button').textContent") == "Pause"
  frame, early = chromium.run(f"[{FRAME}, {CANVAS}]")
  chromium.wait(f"{FRAME} !== {frame}")
  assert chromium.run(CANVAS) != early
  chromium.run("document.querySelector('#player button').click()")
  still = chromium.run(f"[{FRAME}, {CANVAS}]")
  # Longer than a frame stays.
  chromium.run("new Promise((done) => setTimeout(done, 900))")
  assert chromium.run(f"[{FRAME}, {CANVAS}]") == still
  assert chromium.errors == []


def test_reduced_motion_is_respected_and_keys_move_the_animation(chromium, film):
  chromium.open(film, *PHONE, motion="reduce")
  chromium.run("new Promise((done) => setTimeout(done, 600))")
  assert chromium.run(FRAME) == 8
  assert chromium.run("document.querySelector('#player button').textContent") == "Play"
  chromium.run("document.querySelector('#player button').focus()")
  chromium.press("Tab", 9)
  assert chromium.run("document.activeElement.type") == "range"
  chromium.press("ArrowLeft", 37)
  chromium.wait(f"{FRAME} === 7")
  assert chromium.run("document.querySelector('#player output').textContent") == "t = 0.125"
  assert chromium.run("document.activeElement.getAttribute('aria-valuetext')") == "t = 0.125"
  # Who asks for motion gets it.
  chromium.run("document.querySelector('#player button').focus()")
  chromium.press(" ", 32, " ")
  chromium.wait(f"{FRAME} < 7")


def test_scripts_in_names_do_not_run(chromium, tmp_path):
  bad = "</script><script>hacked=1</script><img src=x onerror=hacked=1>"
  content = reports.content(title=bad, config={bad: bad}, facts=[(bad, bad)])
  content.evaluation["curve"][0]["sampler"] = content.evaluation[bad] = bad
  content.metrics[0][bad] = 1.0
  report.write(tmp_path / "report.html", content)
  chromium.open(tmp_path / "report.html", 360, 640)
  assert_drawn(chromium, 18)
  assert chromium.run("typeof hacked") == "undefined"
  assert chromium.run("document.title") == bad
  assert bad in chromium.run("document.querySelector('.plot .legend').textContent")
  assert chromium.run("document.scrollingElement.scrollWidth <= innerWidth")


def test_the_policy_of_the_page_forbids_other_scripts_and_the_network(chromium, film):
  chromium.open(film, *DESKTOP)
  chromium.run("""(() => {
    const script = document.createElement("script");
    script.textContent = "hacked = 1";
    document.body.append(script);
    return fetch("data:,").then(() => { hacked = 1; }, () => null);
  })()""")
  assert chromium.run("typeof hacked") == "undefined"
  assert any("Content Security Policy" in error for error in chromium.errors)


def test_the_barest_report_opens_too(chromium, tmp_path):
  report.write(tmp_path / "report.html", reports.bare())
  chromium.open(tmp_path / "report.html", *PHONE)
  assert_drawn(chromium, 0)
  assert "Not in this report" in chromium.run("document.body.innerText")


def test_a_missing_browser_is_asked_for(monkeypatch):
  monkeypatch.setenv("PATH", "/nowhere")
  with pytest.raises(AssertionError, match="apt-get install chromium"), browser():
    pass
