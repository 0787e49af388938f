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
from ddpm_jax.report import page, pictures, training, words
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
  """A page as a browser's parser has it: elements with their attributes, and the text outside of scripts and styles."""

  def __init__(self, source):
    super().__init__()
    self.elements, self.words, self.scripts, self._inside = [], [], [], None
    self.feed(source)
    self.text = re.sub(r"\s+", " ", " ".join(self.words))

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    self._inside = tag if tag in ("script", "style") else None

  def handle_endtag(self, tag):
    self._inside = None

  def handle_data(self, data):
    if self._inside == "script":
      self.scripts.append(data)
    elif self._inside is None:
      self.words.append(data)

  def sections(self):
    return [attributes["id"] for tag, attributes in self.elements if tag == "section"]


def decoded(uri):
  assert uri.startswith("data:image/png;base64,")
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


@pytest.fixture(scope="module")
def full():
  return Parsed(page.render(reports.content()))


def test_every_section_is_there_in_order_and_linked(full):
  assert full.sections() == SECTIONS
  links = [attributes["href"] for tag, attributes in full.elements if tag == "a"]
  assert links == [f"#{name}" for name in SECTIONS]
  assert ("html", {"lang": "en"}) in full.elements
  assert all("alt" in attributes for tag, attributes in full.elements if tag == "img")
  assert "Not in this report" not in full.text


def test_scores_stand_beside_the_floor_and_say_what_they_mean(full):
  assert (
    "Fréchet distance ↓ lower is better between Gaussians fitted to the features of both sets 0.730 0.454" in full.text
  )
  assert "0.0031 ± 0.0011" in full.text
  assert "kid_std" not in full.text
  assert re.search(r"Precision ↑ higher is better .* 0\.970", full.text)
  assert "odd_score 4.000 4.000" in full.text
  assert "500 samples; reference: held-out digits; features: classifier" in full.text
  assert "3.104 ± 0.021" in full.text


def test_config_and_provenance_are_shown_whole(full):
  """Components too: their names beside their arguments."""
  config = (
    "network.component networks.UNet",
    "network.multipliers 1, 2, 2",
    "source.path /data/digits",
    "sampler none",
  )
  for words_of_it in (*config, "weights EMA", "sampling.arguments.variance large", "num_steps 100", "9f86d0"):
    assert words_of_it in full.text.replace(". ", ".")


def test_nothing_is_fetched(full):
  for tag, attributes in full.elements:
    for name in ("src", "href", "srcset", "action", "poster", "data", "data-sprite"):
      assert attributes.get(name, "#").startswith(("#", "data:")), (tag, name)
  assert not re.search(r"@import|url\(", (FOLDER / "page.css").read_text())
  policy = next(a["content"] for _, a in full.elements if a.get("http-equiv") == "Content-Security-Policy")
  assert policy.startswith("default-src 'none'")
  assert "unsafe-inline' script" not in policy
  assert "http" not in policy


def test_whatever_users_write_stays_text():
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
  # Plotly reads names as markup, unless they are escaped for it too.
  names = [trace.get("name", "") for figure in json.loads(parsed.scripts[0]).values() for trace in figure["data"]]
  assert any("&lt;script&gt;" in name for name in names)
  assert not any("<" in name for name in names)


def test_text_that_is_no_text_does_not_stop_a_report(tmp_path):
  report.write(tmp_path / "report.html", reports.bare()._replace(config={"path": "/data/\udcff"}))
  assert "/data/\\udcff" in (tmp_path / "report.html").read_text("utf-8")


def test_what_is_absent_is_left_out_and_named():
  source = page.render(reports.bare())
  assert len(source) < 50_000  # without the plotting library too
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


def test_numbers_that_are_not_finite_are_said_or_skipped():
  content = reports.content()
  content.evaluation["scores"]["generated"]["frechet_distance"] = float("nan")
  content.evaluation["curve"][0]["scores"]["frechet_distance"] = float("inf")
  content.evaluation["likelihood"]["bound"]["bits"] = float("inf")
  content.metrics[3]["loss"] = float("nan")
  content.metrics[5]["loss"] = None
  parsed = Parsed(page.render(content._replace(bound_terms=np.array([1.0, 0.0, -1.0, np.nan]))))
  assert "not finite 0.454" in parsed.text
  json.loads(parsed.scripts[0], parse_constant=pytest.fail)


def test_a_page_is_light(tmp_path):
  # Noise does not compress: no images are heavier.
  rng = np.random.default_rng(0)

  def noise(*shape):
    return rng.integers(0, 256, (*shape, 32, 32, 3), dtype=np.uint8)

  neighbors = report.Neighbors(noise(16), noise(16, 5), rng.uniform(1, 2, (16, 5)), np.ones(9))
  content = reports.content(samples=noise(500), classes=None, neighbors=neighbors, metrics=reports.metrics(20_000))
  report.write(tmp_path / "r.html", content._replace(denoising=noise(100, 16), denoising_times=np.linspace(1, 0, 100)))
  assert (tmp_path / "r.html").stat().st_size - len(get_plotlyjs()) < 2e6


def test_a_report_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
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
    ({"classes": np.zeros(3)}, "for 500 samples; expected one class a sample"),
    ({"denoising_times": None}, "denoising_times of shape None for 9 frames"),
    ({"denoising_times": np.zeros(4)}, r"shape \(4,\) for 9 frames"),
    ({"schedule": {"t": np.zeros(3), "alpha": np.zeros(3)}}, "expected t, alpha, sigma and log_snr"),
    ({"neighbors": reports.neighbors()._replace(distances=np.zeros((8, 2)))}, "expected one distance an image"),
    (
      {"neighbors": reports.neighbors()._replace(samples=np.zeros((8, 4, 4, 1), np.uint8))},
      "neighbors.nearest of shape",
    ),
    ({"bound_terms": np.zeros((2, 3))}, r"expected \[N\], a term a step"),
    ({"metrics": [{"loss": 1.0}]}, "whose step is no number"),
    ({"metrics": [{"step": "3", "loss": 1.0}]}, "whose step is no number"),
  ],
)
def test_what_does_not_fit_together_is_refused(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    report.write(tmp_path / "report.html", reports.content(**changes))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_pictures_hold_the_pixels_of_any_number_of_channels(channels):
  image = np.random.default_rng(0).integers(0, 256, (6, 4, channels), dtype=np.uint8)
  drawn = decoded(pictures.data_uri(image))
  if channels in (1, 3, 4):
    np.testing.assert_array_equal(drawn.reshape(image.shape), image)
  else:
    planes = [drawn[top : top + 6, left : left + 4] for top in range(0, drawn.shape[0], 7) for left in (0, 5, 10)]
    planes = [plane for plane in planes if plane.shape == (6, 4)]
    np.testing.assert_array_equal(np.stack(planes[:channels], -1), image)


@pytest.mark.parametrize("shape", [(12, 8, 1), (8, 16, 3), (8, 8, 5), (8, 16, 4)])
def test_a_page_of_images_of_any_shape(shape):
  height, width, channels = shape
  rng = np.random.default_rng(0)

  def noise(*lead):
    return rng.integers(0, 256, (*lead, *shape), dtype=np.uint8)

  found, samples = reports.neighbors(), noise(40)
  content = reports.bare()._replace(
    samples=samples,
    classes=np.arange(40) % 2,
    denoising=noise(9, 3),
    denoising_times=np.linspace(1, 0, 9),
    neighbors=found._replace(samples=noise(8), nearest=noise(8, 3)),
  )
  parsed = Parsed(page.render(content))
  assert parsed.sections() == ["samples", "denoising", "neighbors", "provenance"]
  # Five channels are three planes above two, with a line between.
  high, wide = (17, 26) if channels == 5 else (height, width)
  drawn = [attributes for tag, attributes in parsed.elements if tag == "img" and "width" in attributes]
  assert len(drawn) == 40
  assert int(drawn[0]["width"]) * high == int(drawn[0]["height"]) * wide, "the sides' ratio"
  first = decoded(drawn[0]["src"])
  assert first.shape[:2] == (high, wide)
  np.testing.assert_array_equal(first[:8, :8], samples[0, :8, :8, 0] if channels in (1, 5) else samples[0, :8, :8])
  (sprite,) = (attributes["data-sprite"] for _, attributes in parsed.elements if "data-sprite" in attributes)
  (canvas,) = (attributes for tag, attributes in parsed.elements if tag == "canvas")
  assert decoded(sprite).shape[:2] == (9 * int(canvas["height"]), int(canvas["width"]))


def test_samples_are_grouped_by_class():
  samples, labels = reports.digits()
  groups = pictures.by_class(samples, labels)
  assert [group.label for group in groups] == [str(digit) for digit in range(10)]
  for digit, group in enumerate(groups):
    members = samples[labels == digit]
    assert group.total == len(members)
    np.testing.assert_array_equal(decoded(group.pictures[1]), members[1, ..., 0])
  assert sum(len(group.pictures) for group in groups) <= 300
  # Too many classes to tell apart, and one that tells nothing.
  for others in (np.arange(len(samples)), np.zeros(len(samples)), None):
    (group,) = pictures.by_class(samples, others)
    assert group.label == ""
    assert 100 < len(group.pictures) <= 300


def test_a_film_runs_from_the_first_frame_to_the_last():
  frames, times = reports.denoising(frames=900)
  film = pictures.film(frames, times)
  sprite = decoded(film.sprite)
  assert 8 < film.frames < 100
  assert sprite.shape == (film.height * film.frames, film.width)
  assert (film.times[0], film.times[-1]) == ("1", "0")
  for place, frame in ((0, 0), (film.frames - 1, 899)):
    strip = images.grid(frames[frame], 6, tile=64)[..., 0]
    np.testing.assert_array_equal(sprite[place * film.height :][: film.height], strip)


def test_large_images_are_averaged():
  large = np.random.default_rng(0).integers(0, 256, (1, 300, 200, 3), dtype=np.uint8)
  small = decoded(pictures.thumbnails(large)[0])
  assert max(small.shape) <= 128
  np.testing.assert_allclose(small[5, 7], large[0, 15:18, 21:24].mean((0, 1)), atol=0.5)


def test_samples_far_nearer_than_typical_are_named():
  for copied, sentence in (
    (4, "Samples may be copies: 4 of 8 samples (50.0%)"),
    (0, "No sign of copies: 0 of 8 samples (0.0%)"),
  ):
    parsed = Parsed(page.render(reports.bare()._replace(neighbors=reports.neighbors(copied))))
    assert sentence in parsed.text
    assert parsed.text.count("Looks copied: far nearer than typical") == copied
    assert ("0.05\N{MULTIPLICATION SIGN}" in parsed.text) == (copied > 0)
  # As near as real images are.
  usual = np.repeat([0.1, 2.0], [49, 51])
  parsed = Parsed(page.render(reports.bare()._replace(neighbors=reports.neighbors(4)._replace(real_distances=usual))))
  assert "No sign of copies: 4 of 8 samples (50.0%) are nearer" in parsed.text
  assert "49.0% of which are as near" in parsed.text
  unknown = reports.neighbors(2)._replace(real_distances=np.zeros(0))
  parsed = Parsed(page.render(reports.bare()._replace(neighbors=unknown)))
  assert "none can be told to be a copy" in parsed.text


def test_a_running_mean_is_the_mean_of_what_is_near():
  rng = np.random.default_rng(0)
  y = rng.normal(size=50)
  y[7] = np.nan
  for index, value in enumerate(training._running_mean(y, 10)):
    np.testing.assert_allclose(value, np.nanmean(y[max(0, index - 5) : index + 6]))


def test_long_runs_are_thinned_by_means():
  lines = [{"step": step, "loss": float(step % 7)} for step in range(1, 10_001)]
  x, y = training._points(lines, "loss")
  assert len(x) <= 800
  np.testing.assert_allclose([y[0], x[0]], [np.mean([s % 7 for s in range(1, 14)]), 7])


def test_noise_levels_are_in_order():
  main, small = training.curves(reports.metrics())
  assert [figure.title for figure in main] == ["Loss", "Loss by noise level"]
  assert [trace["name"] for trace in main[1].spec["data"]] == [
    "below \N{MINUS SIGN}5",
    "\N{MINUS SIGN}5 to 0",
    "0 to 5",
    "above 5",
  ]
  assert [figure.title for figure in small][:2] == ["Fréchet distance, while training", "Learning rate"]


@pytest.mark.parametrize(
  ("value", "error", "expected"),
  [
    (3.10449, 0.0213, ("3.104", "0.021")),
    (-0.00041, 0.00123, ("\N{MINUS SIGN}0.0004", "0.0012")),
    (2.0, None, ("2.000", "")),
    (500, 0.0, ("500", "")),
  ],
)
def test_errors_decide_how_many_digits_are_shown(value, error, expected):
  assert words.with_error(value, error) == expected


def variables():
  """The style sheet's colors, of the light page and of the dark one."""
  light, dark = (FOLDER / "page.css").read_text().split("@media screen", 1)
  return [dict(re.findall(r"(--[\w-]+): (#\w{6});", part)) for part in (light, dark)]


def test_colors_are_readable():
  # WCAG 2.2: 4.5 for text, 3 for lines.
  def luminance(color):
    channels = np.array([int(color[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]

  def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)

  for colors in variables():
    for name, least in (("ink", 7), ("muted", 4.5), ("accent", 4.5), ("alarm", 4.5)):
      assert contrast(colors[f"--{name}"], colors["--page"]) >= least
      assert contrast(colors[f"--{name}"], colors["--panel"]) >= least
    assert contrast(colors["--alarm"], colors["--alarm-panel"]) >= 4.5
    for name, color in colors.items():
      if name.startswith(("--series", "--level")):
        assert contrast(color, colors["--page"]) >= 3, name


def test_plots_use_colors_that_the_style_sheet_has(full):
  used = set(re.findall(r"var\((--[\w-]+)\)", full.scripts[0]))
  assert {"--series-1", "--level-6", "--muted"} <= used
  for colors in variables():
    assert used <= set(colors)


def test_the_files_of_the_page_are_packaged():
  settings = configparser.ConfigParser()
  settings.read(ROOT / "setup.cfg")
  patterns = settings["options.package_data"]["ddpm_jax.report"].split(", ")
  files = [path.name for path in FOLDER.iterdir() if path.is_file() and path.suffix != ".py"]
  assert files
  assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in files)
