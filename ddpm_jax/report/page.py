"""The page: what each section shows, and all of it in one HTML file that fetches nothing."""

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

from ddpm_jax.report import figures, pictures, training, words
from ddpm_jax.report.content import Content, Neighbors
from ddpm_jax.report.figures import Figure

# A training image is near if it is nearer than this share of the median distance of held-out images. Some of these have one too.
NEAR = 0.5
_ESTIMATES = {
  "bound": "Variational bound",
  "ode": "Probability-flow ODE",
  "continuous": "Bound in continuous time",
}
_PARTS = {"nfe": "NFE"}
# Keys of an evaluation that have sections of their own.
_SHOWN = ("scores", "curve", "likelihood")


class Row(NamedTuple):
  """A score in the table: its values by column, each with its error ("" for none)."""

  score: words.Score
  values: list[tuple[str, str]]


class Match(NamedTuple):
  """A sample beside its nearest training images, each with its distance in words, and whether that is near."""

  sample: str
  nearest: list[tuple[str, str]]
  near: bool


def render(content: Content) -> str:
  """The whole page."""
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
  drawn = _all_figures(sections)
  specs = {f"plot-{index}": figure.spec for index, figure in enumerate(drawn)}
  names = {id(figure): f"plot-{index}" for index, figure in enumerate(drawn)}
  library, script = _inline(get_plotlyjs() if drawn else ""), _inline(_file("page.js"))
  return environment.get_template("page.html.j2").render(
    sections,
    title=content.title,
    facts=content.facts,
    style=Markup(_file("page.css")),
    library=Markup(library),
    script=Markup(script),
    # Only these two scripts run, whatever names and paths in the page may hold.
    hashes=" ".join(f"'sha256-{_digest(code)}'" for code in (library, script)),
    figures=Markup(_inline_json(specs)),
    plot_id=lambda figure: names[id(figure)],
    number=words.number,
  )


def _sections(content: Content) -> dict[str, Any]:
  """All that the template shows; what is absent is None or empty."""
  evaluation = content.evaluation
  scores = {name: row for name, row in (evaluation.get("scores") or {}).items() if isinstance(row, Mapping)}
  curve, likelihood = evaluation.get("curve") or [], evaluation.get("likelihood") or {}
  groups = pictures.by_class(content.samples, content.classes) if len(content.samples) else []
  main, small = training.curves(content.metrics)
  sections = {
    "columns": [_column(name) for name in _columns(scores)],
    "rows": _rows(scores),
    "basis": _basis(evaluation),
    "groups": groups,
    "tile": pictures.tile_of(content.samples) if groups else None,
    "shown": sum(len(group.pictures) for group in groups),
    "total": len(content.samples),
    "film": _film(content),
    "neighbors": _neighbors(content.neighbors),
    "curve": figures.against_nfe(curve, scores.get("floor", {})) if curve else [],
    "curve_table": _curve_table(curve),
    "training": main,
    "training_small": small,
    "schedule": figures.of_schedule(content.schedule) if content.schedule else [],
    "bound": _bound(content.bound_terms),
    "likelihood": _likelihood(likelihood),
    "config": _config(content.config),
    "provenance": words.flat({key: value for key, value in evaluation.items() if key not in _SHOWN}),
  }
  return sections | {"missing": _missing(sections)}


def _missing(sections: Mapping[str, Any]) -> list[str]:
  """What the page lacks, and for want of what."""
  reasons = {
    "rows": "scores (none were computed)",
    "groups": "samples (there are none)",
    "film": "denoising (no trajectory was recorded)",
    "neighbors": "nearest training images (none were searched)",
    "curve": "score against steps (one setting was scored)",
    "training": "training curves (no metrics.jsonl was found)",
    "schedule": "schedules (no table was given)",
    "bound": "terms of the bound (not computed)",
    "likelihood": "likelihood (not computed)",
    "config": "configuration (none was given)",
  }
  return [reason for name, reason in reasons.items() if not sections[name] and not sections.get(f"{name}_small")]


def _columns(scores: Mapping[str, Any]) -> list[str]:
  return [name for name in ("generated", "floor") if name in scores] + [
    name for name in scores if name not in ("generated", "floor")
  ]


def _column(name: str) -> str:
  return {"generated": "generated", "floor": "real against real"}.get(name, words.plain(name))


def _rows(scores: Mapping[str, Mapping[str, Any]]) -> list[Row]:
  keys = words.in_order(list(dict.fromkeys(key for name in _columns(scores) for key in scores[name])))
  return [
    Row(
      words.score(key),
      [words.with_error(scores[name].get(key), scores[name].get(f"{key}_std")) for name in _columns(scores)],
    )
    for key in keys
  ]


def _basis(evaluation: Mapping[str, Any]) -> str:
  """What the scores were computed from, in a sentence or two."""
  parts = []
  if evaluation.get("num_samples"):
    parts.append(f"{words.number(evaluation['num_samples'])} samples")
  if evaluation.get("reference"):
    parts.append(f"reference: {words.text(evaluation['reference'])}")
  if evaluation.get("features"):
    parts.append(f"features: {words.text(evaluation['features'])}")
  if evaluation.get("floor_num"):
    parts.append(f"real against real: the same scores of {words.number(evaluation['floor_num'])} real images")
  return "; ".join(parts)


def _film(content: Content) -> pictures.Film | None:
  if content.denoising is None or not content.denoising.size or content.denoising_times is None:
    return None
  return pictures.film(content.denoising, np.asarray(content.denoising_times, np.float64))


def _neighbors(neighbors: Neighbors | None, most: int = 12, each: int = 3) -> dict[str, Any] | None:
  """The samples that are nearest to a training image, nearest first, and in words how many are nearer than real ones."""
  if neighbors is None or not len(neighbors.samples):
    return None
  distances, usual = (np.asarray(values, np.float64) for values in (neighbors.distances, neighbors.real_distances))
  typical = float(np.median(usual)) if len(usual) else 0.0
  known = math.isfinite(typical) and typical > 0
  relative = distances / typical if known else distances
  order = np.argsort(relative[:, 0], kind="stable")[:most]
  matches = []
  for index in order:
    thumbnails = pictures.thumbnails(neighbors.nearest[index, :each])
    said = [f"{value:.2f}\N{MULTIPLICATION SIGN}" if known else words.number(value) for value in relative[index, :each]]
    near = known and bool(relative[index, 0] < NEAR)
    sample = pictures.thumbnails(neighbors.samples[index : index + 1])[0]
    matches.append(Match(sample, list(zip(thumbnails, said, strict=True)), near))
  count = int(np.sum(relative[:, 0] < NEAR)) if known else 0
  share = float(np.mean(usual < NEAR * typical)) if known else 0.0
  expected = share * len(distances)
  return {
    "matches": matches,
    "tile": pictures.tile_of(neighbors.samples, largest=108),  # two beside each other
    "near": count,
    # By more than two standard deviations of chance.
    "alarm": known and count > expected + 2 * math.sqrt(max(expected, 1)),
    "share": f"{share:.1%}",
    "own_share": f"{count / len(distances):.1%}",
    "total": len(distances),
    "known": known,
    "typical": words.number(typical),
    "median": f"{np.median(relative[:, 0]):.2f}",
    "threshold": f"{NEAR:g}",
  }


def _curve_table(curve: list[Mapping[str, Any]]) -> dict[str, Any]:
  keys = words.in_order(list(dict.fromkeys(key for point in curve for key in point.get("scores", {}))))
  rows = [
    [
      words.text(point.get("sampler")),
      *(words.number(point.get(key)) for key in ("num_steps", "nfe")),
      *(words.number(point.get("scores", {}).get(key)) for key in keys),
    ]
    for point in curve
  ]
  return {"head": ["sampler", "steps", "NFE", *(words.score(key).name for key in keys)], "rows": rows}


def _bound(terms: np.ndarray | None) -> dict[str, Any] | None:
  if terms is None or not np.size(terms):
    return None
  terms = np.asarray(terms, np.float64)
  return {"figure": figures.of_bound(terms), "sum": words.number(float(np.nansum(terms))), "steps": f"{len(terms):,}"}


def _likelihood(likelihood: Mapping[str, Any]) -> dict[str, Any] | None:
  known = {key: row for key, row in likelihood.items() if isinstance(row, Mapping)}
  if not known:
    return None
  rows = []
  for key, row in known.items():
    others = {name: value for name, value in row.items() if name not in ("bits", "standard_error", "num_images")}
    rest = ", ".join(f"{_PARTS.get(name, words.plain(name))} {words.number(value)}" for name, value in others.items())
    bits, error = words.with_error(row.get("bits"), row.get("standard_error"))
    rows.append((_ESTIMATES.get(key, key), rest, bits, error, words.number(row.get("num_images"))))
  return {"rows": rows, "figure": figures.of_likelihood(known, _ESTIMATES)}


def _config(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
  """Sections with their keys; what is at the top comes first, without a section."""
  top = words.flat({key: value for key, value in config.items() if not isinstance(value, Mapping)})
  nested = [(key, words.flat(value)) for key, value in config.items() if isinstance(value, Mapping)]
  return ([("", top)] if top else []) + nested


def _all_figures(sections: Mapping[str, Any]) -> list[Figure]:
  several = [drawn for name in ("curve", "training", "training_small", "schedule") for drawn in sections[name]]
  single = [sections[name]["figure"] for name in ("bound", "likelihood") if sections[name]]
  return several + [drawn for drawn in single if drawn is not None]


def _inline(code: str) -> str:
  """A script that cannot end its element, whatever is in it, and whose digest a browser finds the same."""
  return code.replace("\r\n", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--").replace("\0", "\\0")


def _inline_json(value: Any) -> str:
  """JSON that holds no markup: `<`, `>` and `&` as escapes."""
  written = json.dumps(value, allow_nan=False, separators=(",", ":"))
  return written.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(code: str) -> str:
  return base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()


@cache
def _file(name: str) -> str:
  return resources.files("ddpm_jax.report").joinpath(name).read_text("utf-8")
