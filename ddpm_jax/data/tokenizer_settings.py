"""Read the settings of a tokenizer's folder: special tokens, the maximum length and the padding side."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ddpm_jax.storage import jsonfiles

CONFIG = "tokenizer_config.json"
# The largest sizes of files in bytes. Published vocabularies have at most 34 MB, published settings 2 MB.
LARGEST_VOCABULARY = 48 << 20
_LARGEST_SETTINGS = 4 << 20
# transformers writes 1e30 for "no limit".
_NO_LIMIT = 1_000_000
# The kinds of tokenizers by transformers' class names.
_KINDS = {
  f"{name}{suffix}": kind
  for name, kind in (("CLIPTokenizer", "clip"), ("T5Tokenizer", "t5"), ("BertTokenizer", "bert"))
  for suffix in ("", "Fast")
}
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# The special tokens of each kind if the folder does not name them.
_DEFAULTS: dict[str, dict[str, str]] = {
  "clip": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>") | {"bos_token": "<|startoftext|>"},
  "t5": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
  "bert": {
    role: f"[{role[:-6].upper()}]" for role in ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
  },
}
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")

# The arguments of the class AddedToken of the package tokenizers.
Token = dict[str, Any]


class Settings(NamedTuple):
  """Hold the settings of a tokenizer's folder.

  Attributes:
    kind: "clip", "t5" or "bert"; None if the folder names no class.
    class_name: the name of the tokenizer's class in transformers, or None.
    named: a dict from role, such as "pad_token", to the special token that has this role.
    added: a dict from id to token, for all tokens whose ids are in the settings.
    others: the special tokens that have no role.
    length: the maximum number of tokens of a text; None for no limit.
    padding_side: "right" or "left".
    options: other keys of tokenizer_config.json.
  """

  kind: str | None
  class_name: str | None
  named: dict[str, Token]
  added: dict[int, Token]
  others: list[Token]
  length: int | None
  padding_side: str
  options: Mapping[str, Any]


def check_size(path: Path, largest: int = LARGEST_VOCABULARY) -> Path:
  """Return `path` if the file has an allowed size.

  Raises:
    ValueError: if the file is empty or has more than `largest` bytes.
  """
  size = path.stat().st_size
  if not 0 < size <= largest:
    problem = "is empty" if size == 0 else f"has {size:,} bytes"
    raise ValueError(
      f"Got {path}, which {problem}; expected a file of 1 to {largest:,} bytes. Download the tokenizer again."
    )
  return path


def _read(folder: Path, name: str) -> dict[str, Any]:
  """Return the content of a settings file, or {} if there is no such file."""
  path = folder / name
  return jsonfiles.read(check_size(path, _LARGEST_SETTINGS)) if path.is_file() else {}


def read(folder: Path) -> Settings:
  """Read tokenizer_config.json, special_tokens_map.json and added_tokens.json, if they exist.

  As in transformers, special_tokens_map.json and added_tokens.json count only if tokenizer_config.json has no
  `added_tokens_decoder`. Settings that are paths of files are ignored, because a path could point outside of the
  folder.

  Raises:
    ValueError: if a file is too large, is not JSON, or has values of a wrong type; or if the tokenizer needs Python
      code from the folder.
  """
  config = _read(folder, CONFIG)
  with jsonfiles.named_errors(folder / CONFIG):
    _refuse_code(folder, config)
    jsonfiles.check_types(
      config,
      {
        "tokenizer_class": (str, type(None)),
        "added_tokens_decoder": (dict,),
        "do_lower_case": (bool,),
        "tokenize_chinese_chars": (bool,),
        "strip_accents": (bool, type(None)),
        "extra_ids": (int,),
      },
      "tokenizer",
    )
    _check_special(config)
    class_name = config.get("tokenizer_class")
    added = {
      _id(key): _token(value, key, special=False) for key, value in config.get("added_tokens_decoder", {}).items()
    }
    padding_side = _side(config, "padding_side", ("right", "left"))
    _side(config, "truncation_side", ("right",))
    length = _length(config.get("model_max_length"))
  if "added_tokens_decoder" not in config:
    with jsonfiles.named_errors(folder / "special_tokens_map.json"):
      config = config | _check_special(_read(folder, "special_tokens_map.json"))
    with jsonfiles.named_errors(folder / "added_tokens.json"):
      specials = {_content(config[role]) for role in _ROLES if config.get(role)} | set(map(_content, _others(config)))
      for content, number in _read(folder, "added_tokens.json").items():
        is_special = content in specials
        added[_id(number)] = {"content": content, "normalized": not is_special, "special": is_special}
  with jsonfiles.named_errors(folder / CONFIG):
    kind = _KINDS.get(class_name or "")
    by_content = {token["content"]: token for token in added.values()}
    values = {role: config.get(role, _DEFAULTS.get(kind or "", {}).get(role)) for role in _ROLES}
    named = {role: _token(value, role) for role, value in values.items() if value is not None}
    named = {role: by_content.get(token["content"], token) for role, token in named.items()}
    others = [_token(value, "extra_special_tokens") for value in _others(config)]
  return Settings(kind, class_name, named, added, others, length, padding_side, config)


def with_kind(settings: Settings, kind: str) -> Settings:
  """Return a copy of the settings with the kind `kind`, for a folder that names no class.

  Roles that the folder does not set get the default special tokens of this kind.
  """
  missing = {role: content for role, content in _DEFAULTS[kind].items() if role not in settings.options}
  defaults = {role: _token(content, role) for role, content in missing.items()}
  return settings._replace(kind=kind, named=defaults | settings.named)


def _refuse_code(folder: Path, config: Mapping[str, Any]) -> None:
  keys = [key for key in ("auto_map", "trust_remote_code") if config.get(key)]
  # Files with a tokenizer's code have these names. Other scripts, such as the train_script.py of sentence encoders, do
  # not matter.
  sources = sorted(file.name for file in folder.glob("tokenization_*") if file.suffix in (".py", ".pyc", ".so"))
  if keys or sources:
    asked = f"{keys[0]}={jsonfiles.shorten(config[keys[0]])}" if keys else f"the file {sources[0]}"
    raise ValueError(
      f"Got {folder} with {asked}, which is for a tokenizer with its own code; expected only data, because code from"
      " folders never runs here. Save the tokenizer as tokenizer.json, and remove this key or file."
    )


def _check_special(content: dict[str, Any]) -> dict[str, Any]:
  """Check the types of the special tokens in the content of a settings file, and return the content."""
  kinds = {
    "additional_special_tokens": ([str, dict], type(None)),
    "extra_special_tokens": ([str, dict], dict, type(None)),
  }
  jsonfiles.check_types(content, kinds, "tokenizer")
  for role in _ROLES:
    if content.get(role) is not None:
      _token(content[role], role)
  for value in _others(content):
    _token(value, "extra_special_tokens")
  return content


def _others(config: Mapping[str, Any]) -> list[Any]:
  """Return the special tokens that have no role."""
  more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
  return list(more.values()) if isinstance(more, dict) else list(more)


def _content(value: Any) -> str:
  return _token(value, "special token")["content"]


def _token(value: Any, name: str, *, special: bool = True) -> Token:
  """Return the arguments of the class AddedToken for a token in the settings.

  The token is a string, or a JSON object with flags. If the object has no flag `special`, the argument `special` is
  used.
  """
  if isinstance(value, str):
    return {"content": value, "special": True}
  if not isinstance(value, dict) or not isinstance(value.get("content"), str):
    raise ValueError(
      f"Got {name}={jsonfiles.shorten(value)}; expected a token: a string, or an object with the string 'content'."
      " Correct the file."
    )
  jsonfiles.check_types(value, {flag: (bool,) for flag in _FLAGS}, f"token {value['content']!r:.40}")
  return {"special": special} | {key: value[key] for key in ("content", *_FLAGS) if key in value}


def _id(value: Any) -> int:
  if isinstance(value, str) and value.isdecimal() and len(value) < 9:
    return int(value)
  if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**8:
    return value
  raise ValueError(f"Got the token id {jsonfiles.shorten(value)}; expected an integer from 0. Correct the file.")


def _side(config: Mapping[str, Any], name: str, sides: tuple[str, ...]) -> str:
  side = config.get(name, "right")
  if side not in sides:
    raise ValueError(
      f"Got {name}={jsonfiles.shorten(side)}; expected {' or '.join(map(repr, sides))}. Correct the file."
    )
  return side


def _length(value: Any) -> int | None:
  """Return the maximum length that `model_max_length` in the settings sets, or None for no limit."""
  is_number = isinstance(value, int | float) and not isinstance(value, bool) and value == value
  if value is not None and (not is_number or value < 1):
    raise ValueError(
      f"Got model_max_length={jsonfiles.shorten(value)}; expected a number of tokens, 1 or more. Correct the file."
    )
  return None if value is None or value > _NO_LIMIT else int(value)
