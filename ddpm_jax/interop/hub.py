"""Download models from the Hugging Face hub."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpm_jax.interop import tensors

# A list with the token of this process, or an empty list for the default of huggingface_hub.
_tokens: list[str] = []


def use_token(token: str | None) -> None:
  """Use a token for the hub in all later downloads of this process.

  Error messages never contain the token.

  Args:
    token: the token. None for the default of huggingface_hub: the environment variable HF_TOKEN, or the token that the
      command `hf auth login` has saved.

  Raises:
    ValueError: if the token is empty or has characters that are not allowed in a token.
  """
  if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
    raise ValueError(
      "Got a token for the hub that is empty or has spaces or non-ASCII characters (it is not shown here); expected"
      " a token such as hf_..., from the settings of your account. Copy it again."
    )
  _tokens[:] = [] if token is None else [token]


def download(name: str, patterns: Sequence[str], revision: str = "") -> Path:
  """Download the files of a repository that match patterns, and return their folder.

  Args:
    name: the name of the repository, such as "google/ddpm-cifar10-32".
    patterns: the patterns of the files' paths, such as "*.json".
    revision: a branch, a tag or a commit. Empty for the main branch.

  Raises:
    ValueError: if huggingface_hub is not installed, or the download fails.
  """
  try:
    import huggingface_hub
  except ImportError as error:
    raise ValueError(
      f"Got {name}, which is not a folder. To load this name from the Hugging Face hub, run pip install"
      " 'ddpm_jax[hub]'."
    ) from error
  options: dict[str, Any] = {"revision": revision} if revision else {}
  options |= {"token": _tokens[0]} if _tokens else {}
  try:
    return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns), **options))
  except Exception as error:
    is_secret = any(token in f"{error!s} {error!r}" for token in _tokens)
    reason = type(error).__name__ if is_secret else tensors.first_line(error)
    raise ValueError(f"Got {name}, which is not a folder and cannot be downloaded from the hub: {reason}") from (
      None if is_secret else error
    )
