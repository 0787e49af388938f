"""Read U-Nets whose files number the blocks of all levels consecutively, such as "input_blocks.4.1".

improved-diffusion, guided-diffusion and latent diffusion use these names.
"""

import re
from collections.abc import Callable, Collection, Mapping

from ddpm_jax.interop import tensors

_RESIDUAL = {
  "norm1": "in_layers.0",
  "conv1": "in_layers.2",
  "time_emb_proj": "emb_layers.1",
  "norm2": "out_layers.0",
  "conv2": "out_layers.3",
  "conv_shortcut": "skip_connection",
}
_STARTS = {
  "conv_in": "input_blocks.0.0",
  "time_1": "time_embed.0",
  "time_2": "time_embed.2",
  "middle_0": "middle_block.0",
  "middle_attention": "middle_block.1",
  "middle_1": "middle_block.2",
  "norm_out": "out.0",
  "conv_out": "out.2",
}


def names(
  levels: int,
  blocks: int,
  attention_levels: Collection[int],
  starts: Mapping[str, str],
  attention: Mapping[str, str],
) -> Callable[[str], str]:
  """Return a function `name_of(path)` that maps paths of our parameters to the names in a file.

  Args:
    levels: the number of levels.
    blocks: the number of residual blocks per level.
    attention_levels: the levels with attention.
    starts: maps the first part of a path to a name in the file, for the parts whose names depend on the file's format.
    attention: maps each part of an attention block, such as "to_q", to the part's name in the file.
  """
  starts = {**_STARTS, **starts}

  def block_name(head: str) -> str:
    direction, level, part = re.fullmatch(r"(down|up)_(\d+)_(.+)", head).groups()  # type: ignore[union-attr]
    first = int(level) * (blocks + 1) + 1 if direction == "down" else (levels - 1 - int(level)) * (blocks + 1)
    side = "input_blocks" if direction == "down" else "output_blocks"
    if part == "downsample":
      return f"{side}.{first + blocks}.0"
    if part == "upsample":
      return f"{side}.{first + blocks}.{2 if int(level) in attention_levels else 1}"
    index, _, is_attention = part.partition("_")
    return f"{side}.{first + int(index)}.{1 if is_attention else 0}"

  def name_of(path: str) -> str:
    head, *parts = path.split("/")
    residual = {**_RESIDUAL, "conv": "op" if head.endswith("downsample") else "conv"}
    table = attention if head.endswith("_attention") else residual
    return ".".join(
      [starts.get(head) or block_name(head), *(table[part] for part in parts[:-1]), tensors.leaf_name(path)]
    )

  return name_of


def levels_of(file: tensors.TensorFile) -> tuple[int, int]:
  """Return the number of levels and the number of residual blocks per level of a U-Net.

  In the upsampling half, every level but the last ends with an upsampling layer. So the number of levels is the number
  of upsampling layers plus 1.

  Raises:
    ValueError: if the numbers of blocks in the file are not possible for such a U-Net.
  """
  total = count(file, "output_blocks")
  ups = sum(
    has(file, f"output_blocks.{k}.{j}.conv.") or has(file, f"output_blocks.{k}.{j}.in_layers.")
    for k in range(total)
    for j in (1, 2)
  )
  if total % (ups + 1) or count(file, "input_blocks") != total:
    raise ValueError(
      f"Got {file.path} with {total} output_blocks and {count(file, 'input_blocks')} input_blocks for {ups + 1}"
      " levels; expected equal numbers of both, divisible by the number of levels, as in models that resample with"
      " convolutions or residual blocks."
    )
  return ups + 1, total // (ups + 1) - 1


def count(file: tensors.TensorFile, part: str) -> int:
  """Count the numbered children of a part, such as "input_blocks.0" and "input_blocks.1".

  Raises:
    ValueError: if the part has no numbered children, or a number below the largest number is missing.
  """
  found = {match[1] for name in file.shapes if (match := re.match(rf"{re.escape(part)}\.(\d+)\.", name))}
  if not found:
    raise _missing(file, part)
  for number in range(len(found)):
    if str(number) not in found:
      raise _missing(file, f"{part}.{number}")
  return len(found)


def has(file: tensors.TensorFile, prefix: str) -> bool:
  """Return whether the file has a tensor whose name starts with the prefix."""
  return any(name.startswith(prefix) for name in file.shapes)


def shape(file: tensors.TensorFile, name: str) -> tuple[int, ...]:
  """Return the shape of a tensor.

  Raises:
    ValueError: if the file does not have the tensor.
  """
  if name not in file.shapes:
    raise _missing(file, name)
  return file.shapes[name]


def _missing(file: tensors.TensorFile, name: str) -> ValueError:
  return ValueError(
    f"Got {file.path}, which has no {name}; expected a model of improved-diffusion, guided-diffusion or latent diffusion."
  )
