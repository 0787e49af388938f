"""One HTML file that shows an evaluation: scores, samples, neighbors, curves and where they come from, with no network at all.

Pure presentation: it is given arrays and dicts, and knows of no config, process or run.
"""

from pathlib import Path

from ddpm_jax.report.content import Content as Content
from ddpm_jax.report.content import Neighbors as Neighbors
from ddpm_jax.report.content import check
from ddpm_jax.storage import files


def write(path: str | Path, content: Content) -> None:
  """Write the report of `content` to `path`, whole or not at all.

  What is absent (None, empty) is left out, and the page says so. Missing folders are made.

  Raises:
    ValueError: if shapes in `content` do not fit together.
    WriteError: if the file cannot be written.
  """
  check(content)
  # Only here: plotly takes half a second to import.
  from ddpm_jax.report import page

  files.write_text(path, page.render(content))
