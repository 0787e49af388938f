"""Write one HTML file that shows an evaluation.

The page shows scores, samples, nearest training images, curves and provenance. It loads nothing from the internet. This
package only presents arrays and dicts. It does not depend on configs, processes or runs.
"""

from pathlib import Path

from ddpm_jax.report.content import Content as Content
from ddpm_jax.report.content import Neighbors as Neighbors
from ddpm_jax.report.content import Reconstructions as Reconstructions
from ddpm_jax.report.content import check_content
from ddpm_jax.storage import files


def write(path: str | Path, content: Content) -> None:
  """Write a report to an HTML file.

  The file is written completely or not at all, and missing folders are created. The page leaves out the sections whose
  content is None or empty, and lists their names.

  Args:
    path: the file to write.
    content: what to show.

  Raises:
    ValueError: if the arrays in `content` have wrong shapes or types, or a line of metrics has no numeric step.
    WriteError: if the file cannot be written.
  """
  check_content(content)
  # Import plotly late, because the import takes half a second.
  from ddpm_jax.report import page

  files.write_text(path, page.render(content))
