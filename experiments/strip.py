"""Join parts of the figures in docs/figures into the strip of pictures at the top of the README.

python experiments/strip.py [--output=docs/figures/strip.png]

The figures show samples of models that the recipes trained, and images that these models edited. The page that shows a
figure also has the command that makes the figure.
"""

import argparse
from pathlib import Path

from PIL import Image

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
# The tile size of each figure in pixels, including its margin, and the number of columns and rows of tiles to show.
PANELS = {
  "guidance_digits": (50, 6, 6),
  "cascade_digits": (34, 6, 6),
  "cascade_color": (34, 8, 6),
  "edit_inpaint": (50, 5, 6),
  "edit_colorize": (50, 6, 6),
}
MARGIN = 2  # between the tiles of a figure
TILE = 48
GAP = 24  # between panels


def panel(name):
  """Return the tiles in the upper left part of a figure as one picture.

  Each tile is enlarged or reduced to TILE x TILE pixels.
  """
  size, columns, rows = PANELS[name]
  picture = Image.open(FIGURES / f"{name}.png").convert("RGB")
  result = Image.new("RGB", (columns * (TILE + MARGIN) - MARGIN, rows * (TILE + MARGIN) - MARGIN), "white")
  for row in range(rows):
    for column in range(columns):
      left, top = MARGIN + column * size, MARGIN + row * size
      tile = picture.crop((left, top, left + size - MARGIN, top + size - MARGIN))
      tile = tile.resize((TILE, TILE), Image.Resampling.NEAREST)
      result.paste(tile, (column * (TILE + MARGIN), row * (TILE + MARGIN)))
  return result


def main(output):
  """Write the strip as a PNG file."""
  panels = [panel(name) for name in PANELS]
  width = sum(one.width for one in panels) + GAP * (len(panels) - 1)
  strip = Image.new("RGB", (width, panels[0].height), "white")
  left = 0
  for one in panels:
    strip.paste(one, (left, 0))
    left += one.width + GAP
  strip.save(output, optimize=True)


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--output", type=Path, default=FIGURES / "strip.png")
  main(parser.parse_args().output)
