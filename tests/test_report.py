import base64
import configparser
import html.parser
import io
import json
import re
from fnmatch import fnmatch

import numpy as np
import pytest
from PIL import Image
from plotly.offline import get_plotlyjs

from ddpm_jax import report
from ddpm_jax.report import formatting, page, pictures, training
from ddpm_jax.storage import images
from tests import reports
from tests.conftest import ROOT

SECTIONS = [
  "scores",
  "samples",
  "denoising",
  "neighbors",
  "steps",
  "training",
  "schedule",
  "bound",
  "likelihood",
  "config",
  "provenance",
]
FOLDER = ROOT / "ddpm_jax" / "report"


class Parsed(html.parser.HTMLParser):
  """Parse a page into its elements, their attributes, and the text outside scripts and styles."""

  def __init__(self, source):
    super().__init__()
    self.elements, self.strings, self.scripts, self._inside = [], [], [], None
    self.feed(source)
    self.text = re.sub(r"\s+", " ", " ".join(self.strings))

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    self._inside = tag if tag in ("script", "style") else None

  def handle_endtag(self, tag):
    self._inside = None

  def handle_data(self, data):
    if self._inside == "script":
      self.scripts.append(data)
    elif self._inside is None:
      self.strings.append(data)

  def sections(self):
    return [attributes["id"] for tag, attributes in self.elements if tag == "section"]


def decode_png(uri):
  assert uri.startswith("data:image/png;base64,")
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


@pytest.fixture(scope="module")
def full_page():
  return Parsed(page.render(reports.content()))


def test_sections_are_in_order_and_linked(full_page):
  assert full_page.sections() == SECTIONS
  links = [attributes["href"] for tag, attributes in full_page.elements if tag == "a"]
  assert links == [f"#{name}" for name in SECTIONS]
  assert ("html", {"lang": "en"}) in full_page.elements
  assert all("alt" in attributes for tag, attributes in full_page.elements if tag == "img")
  assert "Not in this report" not in full_page.text


def test_scores_are_shown_with_the_floor_and_their_meaning(full_page):
  assert (
    "Fréchet distance ↓ lower is better between Gaussians fitted to the features of both sets 0.730 0.454"
    in full_page.text
  )
  assert "0.0031 ± 0.0011" in full_page.text
  assert "kid_std" not in full_page.text
  assert re.search(r"Precision ↑ higher is better .* 0\.970", full_page.text)
  assert "odd_score 4.000 4.000" in full_page.text
  assert "500 samples; reference: held-out digits; features: classifier" in full_page.text
  assert "3.104 ± 0.021" in full_page.text


def test_config_and_provenance_are_shown_completely(full_page):
  """The names of components are shown with their arguments."""
  config = (
    "network.component networks.UNet",
    "network.multipliers 1, 2, 2",
    "source.path /data/digits",
    "sampler none",
  )
  for text in (*config, "weights EMA", "sampling.arguments.variance large", "num_steps 100", "9f86d0"):
    assert text in full_page.text.replace(". ", ".")


def test_the_page_loads_nothing(full_page):
  for tag, attributes in full_page.elements:
    for name in ("src", "href", "srcset", "action", "poster", "data", "data-sprite"):
      assert attributes.get(name, "#").startswith(("#", "data:")), (tag, name)
  assert not re.search(r"@import|url\(", (FOLDER / "page.css").read_text())
  policy = next(a["content"] for _, a in full_page.elements if a.get("http-equiv") == "Content-Security-Policy")
  assert policy.startswith("default-src 'none'")
  assert "unsafe-inline' script" not in policy
  assert "http" not in policy


def test_text_from_users_is_escaped():
  bad = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
  content = reports.content(title=bad, config={bad: {bad: bad}, "b": bad}, facts=[(bad, bad)])
  for point in content.evaluation["curve"]:
    point["sampler"] = bad
    point["scores"][bad] = 1.0
  content.evaluation["scores"]["generated"][bad] = 1.0
  content.evaluation["likelihood"][bad] = {"bits": 1.0, bad: 2.0}
  content.evaluation["reference"] = content.evaluation[bad] = bad
  content.metrics[0][bad] = content.metrics[0][f"{bad}_by_log_snr/{bad}"] = 1.0
  source = page.render(content)
  parsed = Parsed(source)
  assert [tag for tag, _ in parsed.elements].count("script") == 3
  assert not any("onerror" in attributes for _, attributes in parsed.elements)
  assert parsed.text.count("<script>alert(1)</script>") > 10
  assert "<" not in parsed.scripts[0]
  # Plotly reads names as HTML, so they are escaped for it too.
  names = [trace.get("name", "") for figure in json.loads(parsed.scripts[0]).values() for trace in figure["data"]]
  assert any("&lt;script&gt;" in name for name in names)
  assert not any("<" in name for name in names)


def test_text_that_is_not_valid_unicode_does_not_stop_a_report(tmp_path):
  report.write(tmp_path / "report.html", reports.bare()._replace(config={"path": "/data/\udcff"}))
  assert "/data/\\udcff" in (tmp_path / "report.html").read_text("utf-8")


def test_missing_sections_are_left_out_and_listed():
  source = page.render(reports.bare())
  assert len(source) < 50_000, "the plotting library is left out too"
  parsed = Parsed(source)
  assert parsed.sections() == ["provenance"]
  for reason in ("no trajectory was recorded", "none were searched", "no metrics.jsonl was found"):
    assert reason in parsed.text
  absent = {"denoising": None, "denoising_times": None, "classes": None, "neighbors": None, "metrics": []}
  content = reports.content(**absent, schedule=None, bound_terms=None)
  for key in ("curve", "likelihood"):
    del content.evaluation[key]
  del content.evaluation["scores"]["floor"]
  assert "dashed line" in Parsed(page.render(reports.content())).text
  content.evaluation["curve"] = reports.evaluation()["curve"]
  assert "dashed line" not in Parsed(page.render(content)).text
  del content.evaluation["curve"]
  parsed = Parsed(page.render(content))
  assert parsed.sections() == ["scores", "samples", "config", "provenance"]
  assert "real against real 0" not in parsed.text


def test_numbers_that_are_not_finite_are_named_or_skipped():
  content = reports.content()
  content.evaluation["scores"]["generated"]["frechet_distance"] = float("nan")
  content.evaluation["curve"][0]["scores"]["frechet_distance"] = float("inf")
  content.evaluation["likelihood"]["bound"]["bits"] = float("inf")
  content.metrics[3]["loss"] = float("nan")
  content.metrics[5]["loss"] = None
  parsed = Parsed(page.render(content._replace(bound_terms=np.array([1.0, 0.0, -1.0, np.nan]))))
  assert "not finite 0.454" in parsed.text
  json.loads(parsed.scripts[0], parse_constant=pytest.fail)


def test_a_page_is_small(tmp_path):
  # Noise does not compress, so no other images need more space.
  rng = np.random.default_rng(0)

  def noise(*shape):
    return rng.integers(0, 256, (*shape, 32, 32, 3), dtype=np.uint8)

  neighbors = report.Neighbors(noise(16), noise(16, 5), rng.uniform(1, 2, (16, 5)), np.ones(9))
  content = reports.content(samples=noise(500), classes=None, neighbors=neighbors, metrics=reports.metrics(20_000))
  report.write(tmp_path / "r.html", content._replace(denoising=noise(100, 16), denoising_times=np.linspace(1, 0, 100)))
  assert (tmp_path / "r.html").stat().st_size - len(get_plotlyjs()) < 2e6


def test_a_report_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / "new" / "report.html"
  report.write(path, reports.bare())
  before = path.read_bytes()
  assert before.startswith(b"<!DOCTYPE html>")

  def fail(*_):
    raise OSError("No space left on device")

  monkeypatch.setattr("os.replace", fail)
  with pytest.raises(OSError, match="No space"):
    report.write(path, reports.content())
  assert path.read_bytes() == before
  assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"samples": np.zeros((4, 8, 8, 1))},
      r"samples of shape \(4, 8, 8, 1\) and dtype float64; expected uint8 \[N, H, W, C\]",
    ),
    ({"samples": np.zeros((8, 8, 1), np.uint8)}, r"samples of shape \(8, 8, 1\)"),
    ({"classes": np.zeros(3)}, "for 500 samples; expected one class per sample"),
    ({"denoising_times": None}, "denoising_times of shape None for 9 frames"),
    ({"denoising_times": np.zeros(4)}, r"shape \(4,\) for 9 frames"),
    ({"schedule": {"t": np.zeros(3), "alpha": np.zeros(3)}}, "expected t, alpha, sigma and log_snr"),
    ({"neighbors": reports.neighbors()._replace(distances=np.zeros((8, 2)))}, "expected one distance per image"),
    (
      {"neighbors": reports.neighbors()._replace(samples=np.zeros((8, 4, 4, 1), np.uint8))},
      "neighbors.nearest of shape",
    ),
    (
      {"reconstructions": report.Reconstructions(*(np.zeros((2, side, side, 1), np.uint8) for side in (8, 4, 4)))},
      "expected reconstructions of the images' shape",
    ),
    ({"bound_terms": np.zeros((2, 3))}, r"expected \[N\], one term per step"),
    ({"metrics": [{"loss": 1.0}]}, "a line of metrics without a numeric step"),
    ({"metrics": [{"step": "3", "loss": 1.0}]}, "a line of metrics without a numeric step"),
  ],
)
def test_inconsistent_shapes_are_refused(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    report.write(tmp_path / "report.html", reports.content(**changes))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_pictures_contain_the_pixels_of_all_channels(channels):
  image = np.random.default_rng(0).integers(0, 256, (6, 4, channels), dtype=np.uint8)
  picture = decode_png(pictures.data_uri(image))
  if channels in (1, 3, 4):
    np.testing.assert_array_equal(picture.reshape(image.shape), image)
  else:
    planes = [picture[top : top + 6, left : left + 4] for top in range(0, picture.shape[0], 7) for left in (0, 5, 10)]
    planes = [plane for plane in planes if plane.shape == (6, 4)]
    np.testing.assert_array_equal(np.stack(planes[:channels], -1), image)


@pytest.mark.parametrize("shape", [(12, 8, 1), (8, 16, 3), (8, 8, 5), (8, 16, 4)])
def test_images_of_any_shape_are_shown(shape):
  height, width, channels = shape
  rng = np.random.default_rng(0)

  def noise(*lead):
    return rng.integers(0, 256, (*lead, *shape), dtype=np.uint8)

  neighbors, samples = reports.neighbors(), noise(40)
  content = reports.bare()._replace(
    samples=samples,
    classes=np.arange(40) % 2,
    denoising=noise(9, 3),
    denoising_times=np.linspace(1, 0, 9),
    neighbors=neighbors._replace(samples=noise(8), nearest=noise(8, 3)),
  )
  parsed = Parsed(page.render(content))
  assert parsed.sections() == ["samples", "denoising", "neighbors", "provenance"]
  # Five channels are shown as three planes above two, with a line between them.
  png_height, png_width = (17, 26) if channels == 5 else (height, width)
  tiles = [attributes for tag, attributes in parsed.elements if tag == "img" and "width" in attributes]
  assert len(tiles) == 40
  assert int(tiles[0]["width"]) * png_height == int(tiles[0]["height"]) * png_width, "images keep their aspect ratio"
  first = decode_png(tiles[0]["src"])
  assert first.shape[:2] == (png_height, png_width)
  np.testing.assert_array_equal(first[:8, :8], samples[0, :8, :8, 0] if channels in (1, 5) else samples[0, :8, :8])
  (sprite,) = (attributes["data-sprite"] for _, attributes in parsed.elements if "data-sprite" in attributes)
  (canvas,) = (attributes for tag, attributes in parsed.elements if tag == "canvas")
  assert decode_png(sprite).shape[:2] == (9 * int(canvas["height"]), int(canvas["width"]))


def test_samples_are_grouped_by_class():
  samples, classes = reports.digits()
  groups = pictures.group_by_class(samples, classes)
  assert [group.caption for group in groups] == [str(digit) for digit in range(10)]
  for digit, group in enumerate(groups):
    members = samples[classes == digit]
    assert group.total == len(members)
    np.testing.assert_array_equal(decode_png(group.pictures[1]), members[1, ..., 0])
  assert sum(len(group.pictures) for group in groups) <= 300
  # With too many classes, or only one, there are no groups.
  for ungrouped in (np.arange(len(samples)), np.zeros(len(samples)), None):
    (group,) = pictures.group_by_class(samples, ungrouped)
    assert group.caption == ""
    assert 100 < len(group.pictures) <= 300
  # A row of tall, narrow images has more images than the size limit allows.
  (group,) = pictures.group_by_class(np.zeros((30, 256, 60, 3), np.uint8), None)
  assert len(group.pictures) == 24


def test_a_film_includes_the_first_and_the_last_frame():
  frames, times = reports.denoising(frames=900)
  film = pictures.render_film(frames, times)
  sprite = decode_png(film.sprite)
  assert 8 < film.num_frames < 100
  assert sprite.shape == (film.height * film.num_frames, film.width)
  assert (film.times[0], film.times[-1]) == ("1", "0")
  for index, original in ((0, 0), (film.num_frames - 1, 899)):
    frame = images.grid(frames[original], 6, tile=64)[..., 0]
    np.testing.assert_array_equal(sprite[index * film.height :][: film.height], frame)


def test_large_images_are_downscaled_by_averaging():
  large = np.random.default_rng(0).integers(0, 256, (1, 300, 200, 3), dtype=np.uint8)
  small = decode_png(pictures.thumbnails(large)[0])
  assert max(small.shape) <= 128
  np.testing.assert_allclose(small[5, 7], large[0, 15:18, 21:24].mean((0, 1)), atol=0.5)


def test_possible_copies_are_marked():
  for copied, sentence in (
    (4, "Samples may be copies: 4 of 8 samples (50.0%)"),
    (0, "No sign of copies: 0 of 8 samples (0.0%)"),
  ):
    parsed = Parsed(page.render(reports.bare()._replace(neighbors=reports.neighbors(copied))))
    assert sentence in parsed.text
    assert parsed.text.count("Possible copy: much closer than typical") == copied
    assert ("0.05\N{MULTIPLICATION SIGN}" in parsed.text) == (copied > 0)
  # Half of the held-out images are just as close to training images, so there is no sign of copies.
  distances = np.repeat([0.1, 2.0], [49, 51])
  parsed = Parsed(
    page.render(reports.bare()._replace(neighbors=reports.neighbors(4)._replace(real_distances=distances)))
  )
  assert "No sign of copies: 4 of 8 samples (50.0%) are closer" in parsed.text
  assert "49.0% of the held-out images are that close" in parsed.text
  unknown = reports.neighbors(2)._replace(real_distances=np.zeros(0))
  parsed = Parsed(page.render(reports.bare()._replace(neighbors=unknown)))
  assert "copies cannot be detected" in parsed.text


def test_a_running_mean_is_the_mean_of_a_window():
  rng = np.random.default_rng(0)
  y = rng.normal(size=50)
  y[7] = np.nan
  for index, value in enumerate(training._running_mean(y, 10)):
    np.testing.assert_allclose(value, np.nanmean(y[max(0, index - 5) : index + 6]))


def test_curves_of_long_runs_are_averaged():
  lines = [{"step": step, "loss": float(step % 7)} for step in range(1, 10_001)]
  x, y = training._points(lines, "loss")
  assert len(x) <= 800
  np.testing.assert_allclose([y[0], x[0]], [np.mean([s % 7 for s in range(1, 14)]), 7])


def test_noise_levels_are_in_order():
  large, small = training.plot_metrics(reports.metrics())
  assert [figure.title for figure in large] == ["Loss", "Loss by noise level"]
  assert [trace["name"] for trace in large[1].spec["data"]] == [
    "below \N{MINUS SIGN}5",
    "\N{MINUS SIGN}5 to 0",
    "0 to 5",
    "above 5",
  ]
  assert [figure.title for figure in small][:2] == ["Fréchet distance during training", "Learning rate"]


@pytest.mark.parametrize(
  ("value", "error", "expected"),
  [
    (3.10449, 0.0213, ("3.104", "0.021")),
    (-0.00041, 0.00123, ("\N{MINUS SIGN}0.0004", "0.0012")),
    (2.0, None, ("2.000", "")),
    (500, 0.0, ("500", "")),
  ],
)
def test_the_error_determines_the_number_of_digits(value, error, expected):
  assert formatting.format_with_error(value, error) == expected


def css_colors():
  """Return two dicts from color variables to colors, for the light page and for the dark page."""
  light, dark = (FOLDER / "page.css").read_text().split("@media screen", 1)
  return [dict(re.findall(r"(--[\w-]+): (#\w{6});", part)) for part in (light, dark)]


def test_colors_are_readable():
  # WCAG 2.2 requires a contrast of 4.5 for text and 3 for lines.
  def luminance(color):
    channels = np.array([int(color[index : index + 2], 16) for index in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]

  def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)

  for colors in css_colors():
    for name, minimum in (("ink", 7), ("muted", 4.5), ("accent", 4.5), ("alarm", 4.5)):
      assert contrast(colors[f"--{name}"], colors["--page"]) >= minimum
      assert contrast(colors[f"--{name}"], colors["--panel"]) >= minimum
    assert contrast(colors["--alarm"], colors["--alarm-panel"]) >= 4.5
    for name, color in colors.items():
      if name.startswith(("--series", "--level")):
        assert contrast(color, colors["--page"]) >= 3, name


def test_the_style_sheet_defines_all_colors_of_the_plots(full_page):
  used = set(re.findall(r"var\((--[\w-]+)\)", full_page.scripts[0]))
  assert {"--series-1", "--level-6", "--muted"} <= used
  for colors in css_colors():
    assert used <= set(colors)


def test_the_files_of_the_page_are_packaged():
  settings = configparser.ConfigParser()
  settings.read(ROOT / "setup.cfg")
  patterns = settings["options.package_data"]["ddpm_jax.report"].split(", ")
  files = [path.name for path in FOLDER.iterdir() if path.is_file() and path.suffix != ".py"]
  assert files
  assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in files)
