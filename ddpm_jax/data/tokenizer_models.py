"""Make tokenizers of the package `tokenizers` from the files of a folder.

Code in the files never runs. The content of the files is checked before the package reads it, because some malformed
content makes the package abort with a stack trace.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from ddpm_jax.data import tokenizer_settings
from ddpm_jax.data.tokenizer_settings import Settings, check_size
from ddpm_jax.storage import jsonfiles

JSON, VOCABULARY, MERGES, SENTENCEPIECE, WORDPIECE = (
  "tokenizer.json",
  "vocab.json",
  "merges.txt",
  "spiece.model",
  "vocab.txt",
)
# Ids are int32, and a network has an embedding for each.
_MAX_ID = 1 << 24
# The end of a word in CLIP's vocabulary.
_WORD_END = "</w>"
# CLIP's words (https://github.com/openai/CLIP, clip/simple_tokenizer.py): special tokens, English endings, runs of
# letters, single digits, and runs of other characters.
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_NUM_EXTRA_IDS = 100
_UNIGRAM = 1
_CONTROL, _USER_DEFINED = 3, 4


class Backend(NamedTuple):
  """Hold a tokenizer of the package `tokenizers`.

  Attributes:
    tokenizer: the package's tokenizer.
    length: the maximum number of tokens of a text according to tokenizer.json, or None.
    pad: the id of the padding token according to tokenizer.json, or None.
    frame: the ids that tokenizer.json puts before and after each text, or None to use `kind_frame`.
  """

  tokenizer: Any
  length: int | None = None
  pad: int | None = None
  frame: tuple[tuple[int, ...], tuple[int, ...]] | None = None


def library() -> Any:
  """Return the package `tokenizers`.

  Raises:
    ValueError: if the package is not installed.
  """
  try:
    import tokenizers
  except ImportError as error:
    raise ValueError(
      "Tokenizers of text encoders need the package tokenizers, which is not installed. Install it: pip install"
      " 'ddpm_jax[text]'."
    ) from error
  return tokenizers


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
  """Turn errors of the package `tokenizers` into a ValueError that starts with `what`."""
  try:
    yield
  except BaseException as error:
    # The package is written in Rust. Its panics derive from BaseException alone.
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
      raise ValueError(f"{what}: {str(error).splitlines()[0] if str(error) else type(error).__name__}.") from error
    raise


def read(folder: Path, settings: Settings) -> tuple[Backend, Settings]:
  """Return the tokenizer of a folder, and the settings with the kind of the tokenizer.

  The vocabulary comes from the first of these files that exists: tokenizer.json, vocab.json with merges.txt (CLIP),
  spiece.model (T5), vocab.txt (BERT). If the settings name the class of the tokenizer, the files of other classes are
  ignored.

  Raises:
    ValueError: if the folder has none of these files, or only files of other classes, or a file is damaged or too
      large.
  """
  if (folder / JSON).is_file():
    return _read_json(folder / JSON), settings
  readers: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "clip": ((VOCABULARY, MERGES), _read_clip),
    "t5": ((SENTENCEPIECE,), _read_sentencepiece),
    "bert": ((WORDPIECE,), _read_wordpiece),
  }
  for kind, (names, reader) in readers.items():
    is_other = settings.class_name is not None and settings.kind != kind
    if is_other or not all((folder / name).is_file() for name in names):
      continue
    settings = settings if settings.kind else tokenizer_settings.with_kind(settings, kind)
    return Backend(reader(*(check_size(folder / name) for name in names), settings)), settings
  found = sorted(file.name for file in folder.iterdir())
  raise ValueError(
    f"Got {folder} with {jsonfiles.shorten(found)} for a tokenizer of the class {settings.class_name}; expected"
    f" {JSON}, or {VOCABULARY} with {MERGES} (CLIP), {SENTENCEPIECE} (T5) or {WORDPIECE} (BERT). Save the tokenizer"
    " with transformers' save_pretrained."
  )


def _read_clip(vocabulary_path: Path, merges_path: Path, settings: Settings) -> Any:
  """Return CLIP's tokenizer, as in transformers 5.

  The tokenizer applies byte-level BPE to each lower-case word. Text is converted to Unicode's form NFC, and each run of
  white space becomes one space. Unlike in OpenAI's code, the package ftfy does not repair the text.
  """
  vocabulary = jsonfiles.read(vocabulary_path)
  with jsonfiles.named_errors(vocabulary_path):
    _check_vocabulary(vocabulary)
    if not any(token.endswith(_WORD_END) for token in vocabulary):
      raise ValueError(
        f"Got a vocabulary without tokens that end with {_WORD_END}; expected CLIP's. Save other tokenizers as {JSON}."
      )
  with jsonfiles.named_errors(merges_path):
    lines = jsonfiles.read_text(merges_path).removesuffix("\n").split("\n")
    # The first line is the version.
    first = 1 if lines[0].startswith("#version") else 0
    merges = [line.split(" ") for line in lines[first:]]
    _check_merges(merges, vocabulary, "", first_line=first + 1)
  unknown = settings.named.get("unk_token", {}).get("content")
  if unknown not in vocabulary:
    unknown = None
  tokenizers = library()
  with library_errors(f"Cannot make a tokenizer of {vocabulary_path} and {merges_path.name}"):
    model = tokenizers.models.BPE(
      vocab=vocabulary, merges=list(map(tuple, merges)), end_of_word_suffix=_WORD_END, unk_token=unknown
    )
    tokenizer = tokenizers.Tokenizer(model)
    normalizers, pre_tokenizers = tokenizers.normalizers, tokenizers.pre_tokenizers
    tokenizer.normalizer = normalizers.Sequence(
      [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
      [
        pre_tokenizers.Split(tokenizers.Regex(_CLIP_WORDS), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
      ]
    )
  return tokenizer


def _read_sentencepiece(path: Path, settings: Settings) -> Any:
  """Return T5's tokenizer from a SentencePiece model, as in transformers 5.

  The pieces `<extra_id_99>` to `<extra_id_0>` come after the pieces of the file.
  """
  tokenizers = library()
  model = _parse_sentencepiece(path)
  trainer, normalizer = model.trainer_spec, model.normalizer_spec
  with jsonfiles.named_errors(path):
    if trainer.model_type != _UNIGRAM:
      raise ValueError(f"Got a SentencePiece model of type {trainer.model_type}; expected 1 (unigram), as for T5.")
    if not all(math.isfinite(piece.score) for piece in model.pieces):
      raise ValueError("Got pieces whose scores are not finite; expected finite scores. Download the file again.")
    num_extra = settings.options.get("extra_ids", _NUM_EXTRA_IDS)
    if not 0 <= num_extra <= 10_000:
      raise ValueError(f"Got extra_ids={num_extra}; expected 0 to 10000. Correct {tokenizer_settings.CONFIG}.")
  names = {piece.piece for piece in model.pieces}
  extra = [name for index in reversed(range(num_extra)) if (name := f"<extra_id_{index}>") not in names]
  pieces = [(piece.piece, piece.score) for piece in model.pieces] + [(name, 0.0) for name in extra]
  pre_tokenizers, added = tokenizers.pre_tokenizers, tokenizers.AddedToken
  with library_errors(f"Cannot make a tokenizer of {path}"):
    tokenizer = tokenizers.Tokenizer(
      tokenizers.models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    )
    if normalizer.precompiled_charsmap:
      tokenizer.normalizer = tokenizers.normalizers.Precompiled(normalizer.precompiled_charsmap)
    scheme = "always" if normalizer.add_dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
      [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=True)]
    )
    tokenizer.add_tokens(
      [
        added(piece.piece, normalized=False, special=piece.type == _CONTROL)
        for piece in model.pieces
        if piece.type in (_CONTROL, _USER_DEFINED)
      ]
    )
    tokenizer.add_special_tokens([added(name, normalized=False, special=True) for name in extra])
  return tokenizer


def _parse_sentencepiece(path: Path) -> Any:
  try:
    from sentencepiece import sentencepiece_model_pb2 as messages
  except ImportError as error:
    raise ValueError(
      f"Got {path}, which needs the packages sentencepiece and protobuf, which are not installed. Install them: pip"
      " install 'ddpm_jax[text]'."
    ) from error
  # The module makes its classes when it is imported, so type checkers do not see them.
  model = cast(Any, messages).ModelProto()
  try:
    model.ParseFromString(path.read_bytes())
  except Exception as error:  # google.protobuf.message.DecodeError, or an error of text that is not UTF-8
    raise ValueError(
      f"Cannot read {path} as a SentencePiece model: {error}. The file is damaged; download it again."
    ) from error
  if not model.pieces:
    raise ValueError(f"Got {path} without pieces; expected a SentencePiece model. Download the file again.")
  return model


def _read_wordpiece(path: Path, settings: Settings) -> Any:
  """Return BERT's tokenizer from a file with one word piece per line."""
  lines = jsonfiles.read_text(path).removesuffix("\n").split("\n")
  vocabulary = {line: index for index, line in enumerate(lines)}
  unknown = settings.named.get("unk_token", {}).get("content")
  if unknown not in vocabulary:
    raise ValueError(
      f"Got {path} without the token for unknown words, {unknown}; expected a line with it. Download the file again."
    )
  tokenizers, options = library(), settings.options
  with library_errors(f"Cannot make a tokenizer of {path}"):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token=unknown))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(
      clean_text=True,
      handle_chinese_chars=options.get("tokenize_chinese_chars", True),
      strip_accents=options.get("strip_accents"),
      lowercase=options.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  return tokenizer


def _read_json(path: Path) -> Backend:
  """Return the tokenizer in a tokenizer.json."""
  content = jsonfiles.read(check_size(path))
  with jsonfiles.named_errors(path):
    _check_json(content)
  with library_errors(f"Cannot read {path} as a tokenizer"):
    tokenizer = library().Tokenizer.from_str(jsonfiles.read_text(path))
    if content["model"].get("dropout"):
      tokenizer.model.dropout = None  # It would make tokens random, which is only for training of a text encoder.
    length = (tokenizer.truncation or {}).get("max_length")
    pad = (tokenizer.padding or {}).get("pad_id")
    tokenizer.no_truncation()
    tokenizer.no_padding()
  with jsonfiles.named_errors(path):
    check_ids(tokenizer, {token["id"]: token["content"] for token in content.get("added_tokens") or []})
    frame = _frame(tokenizer) if content.get("post_processor") else None
  return Backend(tokenizer, length, pad, frame)


def _check_json(content: Mapping[str, Any]) -> None:
  jsonfiles.check_types(content, {"model": (dict,)}, "tokenizer", required=True)
  jsonfiles.check_types(content, {"added_tokens": ([dict], type(None))}, "tokenizer")
  for token in content.get("added_tokens") or []:
    jsonfiles.check_types(token, {"id": (int,), "content": (str,)}, "token", required=True)
  model = content["model"]
  jsonfiles.check_types(model, {"vocab": (dict, list)}, "model of a tokenizer", required=True)
  vocabulary = model["vocab"]
  if isinstance(vocabulary, list):
    pairs = all(isinstance(pair, list) and len(pair) == 2 for pair in vocabulary)
    if not pairs or not all(
      jsonfiles.matches(name, str) and jsonfiles.matches(score, float) for name, score in vocabulary
    ):
      raise ValueError(
        "Got a vocabulary whose entries are not all [token, score]; expected such pairs. Download the file again."
      )
    return
  _check_vocabulary(vocabulary)
  if "merges" in model:
    jsonfiles.check_types(
      model, {"merges": (list,), "continuing_subword_prefix": (str, type(None))}, "model of a tokenizer"
    )
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    _check_merges(merges, vocabulary, model.get("continuing_subword_prefix") or "", allow_none=True)


def _check_vocabulary(vocabulary: Mapping[str, Any]) -> None:
  wrong = [
    token
    for token, index in vocabulary.items()
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < _MAX_ID
  ]
  if wrong or not vocabulary or len(set(vocabulary.values())) < len(vocabulary):
    problem = f"{wrong[0]!r:.40} as {jsonfiles.shorten(vocabulary[wrong[0]])}" if wrong else "no token or an id twice"
    raise ValueError(
      f"Got a vocabulary with {problem}; expected a different id for each token, from 0 to {_MAX_ID - 1}. Download the"
      " file again."
    )


def _check_merges(
  merges: Sequence[Any], vocabulary: Mapping[str, int], prefix: str, *, first_line: int = 1, allow_none: bool = False
) -> None:
  """Check that each merge is a pair of tokens, and that the vocabulary has both tokens and the merged token."""
  if not merges and not allow_none:
    raise ValueError("Got no merges; expected pairs of tokens, one a line. Download the file again.")
  for number, merge in enumerate(merges, first_line):
    if not isinstance(merge, list) or len(merge) != 2 or not all(isinstance(part, str) and part for part in merge):
      raise ValueError(
        f"Got the merge {jsonfiles.shorten(merge)} (number {number}); expected two tokens. Download the file again."
      )
    left, right = merge
    unknown = [token for token in (left, right, left + right.removeprefix(prefix)) if token not in vocabulary]
    if unknown:
      raise ValueError(
        f"Got the merge {left!r:.40} {right!r:.40} (number {number}) with {unknown[0]!r:.80}, which is not in the"
        " vocabulary; expected the merges that belong to the vocabulary. Download both files again."
      )


def check_ids(tokenizer: Any, tokens: Mapping[int, str]) -> None:
  """Check that each token has the same id in the tokenizer and in `tokens`.

  Raises:
    ValueError: if a token has different ids in the tokenizer and in `tokens`.
  """
  for index, content in tokens.items():
    actual = tokenizer.token_to_id(content)
    if actual != index:
      raise ValueError(
        f"Got the id {index} for the token {content!r:.40}, whose place in the vocabulary is {actual}; expected the"
        " same number. The settings and the vocabulary belong to different tokenizers."
      )


def _frame(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Return the ids that the post-processor puts before and after each text."""
  with library_errors("Cannot add special tokens"):
    content = tokenizer.encode("a", add_special_tokens=False).ids
    encoding = tokenizer.encode("a", add_special_tokens=True)
  is_special = encoding.special_tokens_mask
  start = next((index for index, flag in enumerate(is_special) if not flag), len(is_special))
  prefix, suffix = encoding.ids[:start], encoding.ids[start + len(content) :]
  if not content or [*prefix, *content, *suffix] != encoding.ids:
    raise ValueError(
      "Got a tokenizer that adds special tokens within a text; expected special tokens only before and after it. Use"
      " another tokenizer."
    )
  return tuple(prefix), tuple(suffix)


def kind_frame(settings: Settings, tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Return the ids that tokenizers of a kind put before and after each text.

  Raises:
    ValueError: if a special token is not in the vocabulary.
  """
  before = {"clip": ["bos_token"], "bert": ["cls_token"]}.get(settings.kind or "", [])
  after = {"clip": ["eos_token"], "t5": ["eos_token"], "bert": ["sep_token"]}.get(settings.kind or "", [])
  prefix, suffix = ([token_id(tokenizer, settings, role) for role in roles] for roles in (before, after))
  return tuple(prefix), tuple(suffix)


def token_id(tokenizer: Any, settings: Settings, role: str) -> int:
  """Return the id of the special token that has the role `role`, such as "pad_token".

  Raises:
    ValueError: if no token has this role, or the token is not in the vocabulary.
  """
  token = settings.named.get(role)
  index = tokenizer.token_to_id(token["content"]) if token else None
  if index is None:
    shown = repr(token["content"]) if token else "none"
    raise ValueError(
      f"Got a tokenizer with {role}={shown}; expected a token of its vocabulary. Add {role} to"
      f" {tokenizer_settings.CONFIG}."
    )
  return index
