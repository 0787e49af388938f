"""Render a report as one HTML file that loads nothing from the internet."""

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
from plotly.offline import get_plotlyjs

from ddpm_jax.report import figures, formatting, pictures, training
from ddpm_jax.report.content import Content, Neighbors, Reconstructions
from ddpm_jax.report.figures import Figure

# A sample may be a copy if its distance to a training image is below this fraction of the median distance of held-out
# images. A few held-out images are below it too.
NEAR = 0.5
_ESTIMATES = {
  "bound": "Variational bound",
  "ode": "Probability-flow ODE",
  "continuous": "Bound in continuous time",
}
# Display names for details of a likelihood estimate. Other details are shown by their key, with spaces instead of
# underscores.
_DETAIL_NAMES = {"nfe": "NFE"}
# Keys of an evaluation that have their own section.
_SECTION_KEYS = ("scores", "curve", "likelihood")


class Row(NamedTuple):
  """Hold one row of the score table.

  Attributes:
    score: the description of the score.
    values: for each column, the formatted score and its formatted error. The error is "" if it is unknown.
  """

  score: formatting.Score
  values: list[tuple[str, str]]


class Match(NamedTuple):
  """Hold a sample and its nearest training images.

  Attributes:
    sample: the sample, as a data URI.
    nearest: the nearest training images as data URIs, each with its formatted distance.
    is_near: whether the sample may be a copy of the nearest training image.
  """

  sample: str
  nearest: list[tuple[str, str]]
  is_near: bool


def render(content: Content) -> str:
  """Return the HTML of the page."""
  from jinja2 import Environment, PackageLoader, StrictUndefined
  from markupsafe import Markup

  environment = Environment(
    loader=PackageLoader("ddpm_jax.report", ""),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  sections = _sections(content)
  plots = _all_figures(sections)
  specs = {f"plot-{index}": figure.spec for index, figure in enumerate(plots)}
  names = {id(figure): f"plot-{index}" for index, figure in enumerate(plots)}
  library, script = _inline(get_plotlyjs() if plots else ""), _inline(_read_file("page.js"))
  return environment.get_template("page.html.j2").render(
    sections,
    title=content.title,
    facts=content.facts,
    style=Markup(_read_file("page.css")),
    library=Markup(library),
    script=Markup(script),
    # The browser runs only scripts with these hashes, even if a name or path in the page contains a script.
    hashes=" ".join(f"'sha256-{_sha256(code)}'" for code in (library, script)),
    figures=Markup(_inline_json(specs)),
    plot_id=lambda figure: names[id(figure)],
    number=formatting.format_number,
  )


def _sections(content: Content) -> dict[str, Any]:
  """Return the variables of the template.

  A variable without content is None or empty.
  """
  evaluation = content.evaluation
  scores = {name: row for name, row in (evaluation.get("scores") or {}).items() if isinstance(row, Mapping)}
  curve, likelihood = evaluation.get("curve") or [], evaluation.get("likelihood") or {}
  groups = pictures.group_by_class(content.samples, content.classes) if len(content.samples) else []
  large, small = training.plot_metrics(content.metrics)
  sections = {
    "columns": [_column_title(name) for name in _columns(scores)],
    "rows": _rows(scores),
    "basis": _basis(evaluation),
    "groups": groups,
    "tile": pictures.tile_size(content.samples) if groups else None,
    "shown": sum(len(group.pictures) for group in groups),
    "total": len(content.samples),
    "film": _film(content),
    "reconstructions": _reconstructions(content.reconstructions),
    "neighbors": _neighbors(content.neighbors),
    "curve": figures.plot_curve(curve, scores.get("floor", {})) if curve else [],
    "curve_table": _curve_table(curve),
    "training": large,
    "training_small": small,
    "schedule": figures.plot_schedule(content.schedule) if content.schedule else [],
    "bound": _bound(content.bound_terms),
    "likelihood": _likelihood(likelihood),
    "config": _config(content.config),
    "provenance": formatting.flatten({key: value for key, value in evaluation.items() if key not in _SECTION_KEYS}),
  }
  return sections | {"missing": _missing(sections, content.reconstructions is not None)}


def _missing(sections: Mapping[str, Any], is_autoencoder: bool) -> list[str]:
  """Return the names of the sections that are missing, each with the reason.

  Sections about samples are not listed for an autoencoder.
  """
  reasons = {
    "rows": "scores (none were computed)",
    "groups": "samples (there are none)",
    "film": "denoising (no trajectory was recorded)",
    "neighbors": "nearest training images (none were searched)",
    "curve": "score against steps (only one setting was scored)",
    "training": "training curves (no metrics.jsonl was found)",
    "schedule": "schedule (no table was provided)",
    "bound": "terms of the bound (not computed)",
    "likelihood": "likelihood (not computed)",
    "config": "configuration (none was provided)",
  }
  names = ("rows", "training", "config") if is_autoencoder else tuple(reasons)
  return [reasons[name] for name in names if not sections[name] and not sections.get(f"{name}_small")]


def _columns(scores: Mapping[str, Any]) -> list[str]:
  first = ("generated", "reconstructed", "floor")
  return [name for name in first if name in scores] + [name for name in scores if name not in first]


def _column_title(name: str) -> str:
  return {"generated": "generated", "floor": "real against real"}.get(name, formatting.to_words(name))


def _rows(scores: Mapping[str, Mapping[str, Any]]) -> list[Row]:
  keys = formatting.sort_scores(list(dict.fromkeys(key for name in _columns(scores) for key in scores[name])))
  return [
    Row(
      formatting.describe_score(key),
      [
        formatting.format_with_error(scores[name].get(key), scores[name].get(f"{key}_std")) for name in _columns(scores)
      ],
    )
    for key in keys
  ]


def _basis(evaluation: Mapping[str, Any]) -> str:
  """Describe what the scores were computed from, in one line."""
  parts = []
  if evaluation.get("num_samples"):
    kind = "reconstructions" if "reconstructed" in (evaluation.get("scores") or {}) else "samples"
    parts.append(f"{formatting.format_number(evaluation['num_samples'])} {kind}")
  if evaluation.get("reference"):
    parts.append(f"reference: {formatting.format_value(evaluation['reference'])}")
  if evaluation.get("features"):
    parts.append(f"features: {formatting.format_value(evaluation['features'])}")
  if evaluation.get("floor_num"):
    parts.append(
      f"real against real: the same scores for {formatting.format_number(evaluation['floor_num'])} real images"
    )
  return "; ".join(parts)


def _film(content: Content) -> pictures.Film | None:
  if content.denoising is None or not content.denoising.size or content.denoising_times is None:
    return None
  return pictures.render_film(content.denoising, np.asarray(content.denoising_times, np.float64))


def _reconstructions(reconstructions: Reconstructions | None) -> dict[str, Any] | None:
  """Return the template's variables for the section on reconstructions.

  Each row has an original, its reconstruction and the channels of its latents.
  """
  if reconstructions is None or not len(reconstructions.images):
    return None
  originals, others, latents = reconstructions
  channels = latents.shape[-1]
  columns = [pictures.thumbnails(originals), pictures.thumbnails(others)]
  columns += [pictures.thumbnails(latents[..., channel : channel + 1]) for channel in range(channels)]
  return {
    "rows": list(zip(*columns, strict=True)),
    "names": ["original", "reconstruction", *(f"channel {channel}" for channel in range(channels))],
    "tile": pictures.tile_size(originals, max_side=108),
    "channels": channels,
  }


def _neighbors(neighbors: Neighbors | None, max_samples: int = 12, max_images: int = 3) -> dict[str, Any] | None:
  """Return the template's variables for the section on neighbors.

  The section shows the samples that are closest to a training image. It counts the samples that are much closer to a
  training image than held-out images usually are.
  """
  if neighbors is None or not len(neighbors.samples):
    return None
  distances, real_distances = (np.asarray(d, np.float64) for d in (neighbors.distances, neighbors.real_distances))
  typical = float(np.median(real_distances)) if len(real_distances) else 0.0
  has_reference = math.isfinite(typical) and typical > 0
  relative = distances / typical if has_reference else distances
  order = np.argsort(relative[:, 0], kind="stable")[:max_samples]
  matches = []
  for index in order:
    thumbnails = pictures.thumbnails(neighbors.nearest[index, :max_images])
    captions = [
      f"{value:.2f}\N{MULTIPLICATION SIGN}" if has_reference else formatting.format_number(value)
      for value in relative[index, :max_images]
    ]
    is_near = has_reference and bool(relative[index, 0] < NEAR)
    sample = pictures.thumbnails(neighbors.samples[index : index + 1])[0]
    matches.append(Match(sample, list(zip(thumbnails, captions, strict=True)), is_near))
  num_near = int(np.sum(relative[:, 0] < NEAR)) if has_reference else 0
  real_share = float(np.mean(real_distances < NEAR * typical)) if has_reference else 0.0
  expected = real_share * len(distances)
  return {
    "matches": matches,
    "tile": pictures.tile_size(neighbors.samples, max_side=108),  # so that two fit side by side
    "num_near": num_near,
    # Warn if the number exceeds the expected number by more than two standard deviations.
    "warn": has_reference and num_near > expected + 2 * math.sqrt(max(expected, 1)),
    "real_share": f"{real_share:.1%}",
    "share": f"{num_near / len(distances):.1%}",
    "total": len(distances),
    "has_reference": has_reference,
    "typical": formatting.format_number(typical),
    "median": f"{np.median(relative[:, 0]):.2f}",
    "threshold": f"{NEAR:g}",
  }


def _curve_table(curve: list[Mapping[str, Any]]) -> dict[str, Any]:
  keys = formatting.sort_scores(list(dict.fromkeys(key for point in curve for key in point.get("scores", {}))))
  rows = [
    [
      formatting.format_value(point.get("sampler")),
      *(formatting.format_number(point.get(key)) for key in ("num_steps", "nfe")),
      *(formatting.format_number(point.get("scores", {}).get(key)) for key in keys),
    ]
    for point in curve
  ]
  return {"head": ["sampler", "steps", "NFE", *(formatting.describe_score(key).name for key in keys)], "rows": rows}


def _bound(terms: np.ndarray | None) -> dict[str, Any] | None:
  if terms is None or not np.size(terms):
    return None
  terms = np.asarray(terms, np.float64)
  return {
    "figure": figures.plot_bound(terms),
    "sum": formatting.format_number(float(np.nansum(terms))),
    "steps": f"{len(terms):,}",
  }


def _likelihood(likelihood: Mapping[str, Any]) -> dict[str, Any] | None:
  estimates = {key: row for key, row in likelihood.items() if isinstance(row, Mapping)}
  if not estimates:
    return None
  rows = []
  for key, row in estimates.items():
    details = ", ".join(
      f"{_DETAIL_NAMES.get(name, formatting.to_words(name))} {formatting.format_number(value)}"
      for name, value in row.items()
      if name not in ("bits", "standard_error", "num_images")
    )
    bits, error = formatting.format_with_error(row.get("bits"), row.get("standard_error"))
    rows.append((_ESTIMATES.get(key, key), details, bits, error, formatting.format_number(row.get("num_images"))))
  return {"rows": rows, "figure": figures.plot_likelihood(estimates, _ESTIMATES)}


def _config(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
  """Return the sections of the config as pairs of a name and the formatted values.

  Top-level keys come first, as a section with the name "".
  """
  top = formatting.flatten({key: value for key, value in config.items() if not isinstance(value, Mapping)})
  nested = [(key, formatting.flatten(value)) for key, value in config.items() if isinstance(value, Mapping)]
  return ([("", top)] if top else []) + nested


def _all_figures(sections: Mapping[str, Any]) -> list[Figure]:
  in_lists = [figure for name in ("curve", "training", "training_small", "schedule") for figure in sections[name]]
  single = [sections[name]["figure"] for name in ("bound", "likelihood") if sections[name]]
  return in_lists + [figure for figure in single if figure is not None]


def _inline(code: str) -> str:
  """Make a script safe to embed, so that no text in it closes the <script> element.

  Line ends and null characters are replaced too. Otherwise a browser would change them, and the script would no longer
  match its hash.
  """
  return code.replace("\r\n", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--").replace("\0", "\\0")


def _inline_json(value: Any) -> str:
  """Return a value as JSON with the characters `<`, `>` and `&` escaped."""
  text = json.dumps(value, allow_nan=False, separators=(",", ":"))
  return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _sha256(code: str) -> str:
  return base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()


@cache
def _read_file(name: str) -> str:
  return resources.files("ddpm_jax.report").joinpath(name).read_text("utf-8")
