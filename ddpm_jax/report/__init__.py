"""One HTML file that shows an evaluation: scores, samples, neighbours, curves and where they come from, with no network at all.

Pure presentation: it is given arrays and dicts, and knows of no config, process or run.
"""

import os
from pathlib import Path

from ddpm_jax.report.content import Content as Content
from ddpm_jax.report.content import Neighbours as Neighbours
from ddpm_jax.report.content import check


def write(path: str | Path, content: Content) -> None:
  """Writes the report of `content` to `path`, whole or not at all; missing folders are made.

  Raises:
    ValueError: if shapes in `content` do not fit together. What is absent (None, empty) is left out, and the page says so.
  """
  check(content)
  # Only here: plotly takes half a second to import.
  from ddpm_jax.report import page

  path = Path(path)
  # A path in a config may hold bytes that are no text, which Python keeps as lone surrogates.
  html = page.render(content).encode("utf-8", "backslashreplace")
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + ".tmp")
  try:
    temporary.write_bytes(html)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
