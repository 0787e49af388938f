"""Define conditions of text: outputs of frozen text encoders, or token ids that the network itself embeds."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.data import Host, Tokenizer, Tokens, prompts
from ddpm_jax.data.prompts import WeightedTokens
from ddpm_jax.data.tokens import check_texts
from ddpm_jax.devices.progress import warn
from ddpm_jax.models.codecs import Loader, frozen_shapes, load_frozen
from ddpm_jax.models.conditions import Condition, check_dropout
from ddpm_jax.models.emphasis import weigh
from ddpm_jax.storage.frozen_file import COMPUTED

Array = jax.Array
PyTree = Any
# `encode(params, tokens) -> values` [B, ...] for the tokens [B, L] of each tokenizer by name.
Encode = Callable[[PyTree, Mapping[str, Any]], PyTree]

# The key of the encoders' parameters in a condition's frozen parameters.
ENCODERS = "encoders"
# The name of the only tokenizer of a condition.
ONLY = "text"
# The number of characters of a text in reports.
_SHOWN = 80


def text(
  name: str,
  tokenizers: Mapping[str, Tokenizer],
  encode: Encode,
  load: Callable[[], PyTree],
  *,
  kind: PyTree = "tokens",
  dropout: float = 0.0,
  null_text: str | None = "",
  takes_weights: bool = False,
) -> Condition:
  """Return a text condition whose values are the outputs of frozen text encoders.

  The items are strings. With dropout, the null value is the encoded `null_text`. It is computed once, when the
  encoders' parameters are loaded. The frozen parameters are a dict: "encoders" contains the parameters of the encoders,
  and "computed" contains the null value.

  Args:
    name: the condition's name.
    tokenizers: the tokenizers by name. `encode` finds the tokens of each tokenizer under the same name.
    encode: `encode(params, tokens) -> values` [B, ...]. `params` are the parameters of the encoders, and `tokens` is a
      dict of `data.Tokens` with the names of `tokenizers`.
    load: `load() -> params` reads the parameters of the encoders (see `codecs.Loader`).
    kind: how the network receives the values (see `Condition`): one kind, or a pytree of kinds that is a tree prefix of
      the values. For tokens and a pooled vector, use {"tokens": "tokens", "vector": "vector"}.
    dropout: the share of samples trained with the null value, in [0, 1) (Ho and Salimans 2022, algorithm 1). For a
      model that was trained elsewhere, pass the share from its training, such as 0.1. Guidance needs a share above 0.
    null_text: the text of the null value. If None, the null value is zeros, as in Stable Diffusion XL.
    takes_weights: whether `encode` also takes `data.prompts.WeightedTokens` in place of `data.Tokens`, as `read_tokens`
      does. If True, the condition's field `weighted` is set.

  Raises:
    ValueError: if there is no tokenizer, or `dropout` is outside [0, 1).
  """
  check_dropout(dropout, name)
  if not tokenizers:
    raise ValueError(f"Got no tokenizer of {name}; expected one or more. Pass tokenizers={{{ONLY!r}: ...}}.")
  by_part = dict(tokenizers)
  make = functools.partial(_encoded, name, encode=encode, load=load, kind=kind, dropout=dropout, null_text=null_text)
  parts = tuple(by_part.values())
  plain = make(_Tokenize(by_part), parse=functools.partial(_parse, name, parts))

  def weighted(texts: Sequence[str]) -> Condition:
    # All texts get equally many chunks, because both branches of guidance need the same shape.
    tokens = [prompts.tokenize(one, [*texts, null_text or ""]) for one in by_part.values()]
    chunks = max(one.ids.shape[1] for one in tokens)
    return make(functools.partial(_tokenize_weighted, by_part, chunks), parse=_check_text)

  return plain._replace(unread=functools.partial(_unread, parts), weighted=weighted if takes_weights else None)


def _encoded(
  name: str,
  host: Host,
  *,
  parse: Callable[[str], str],
  encode: Encode,
  load: Callable[[], PyTree],
  kind: PyTree,
  dropout: float,
  null_text: str | None,
) -> Condition:
  """Return the condition of `text` with `host` as its host function.

  `host` returns a dict from the tokenizers' names to dicts of the fields of `data.Tokens` or `WeightedTokens`.
  """
  null_tokens = host(np.array([null_text or ""]))

  def values(params: PyTree, arrays: Mapping[str, Mapping[str, Any]]) -> PyTree:
    kinds = {part: WeightedTokens if "weights" in one else Tokens for part, one in arrays.items()}
    return encode(params, {part: kinds[part](**one) for part, one in arrays.items()})

  def null_value(params: PyTree) -> PyTree:
    encoded = values(params, null_tokens)
    return jax.tree.map(lambda leaf: leaf[0] if null_text is not None else jnp.zeros_like(leaf[0]), encoded)

  def with_null(params: PyTree) -> PyTree:
    return {ENCODERS: params} | ({COMPUTED: jax.jit(null_value)(params)} if dropout else {})

  def shapes() -> PyTree:
    params = frozen_shapes(load)
    return {ENCODERS: params} | ({COMPUTED: jax.eval_shape(null_value, params)} if dropout else {})

  return Condition(
    kind=kind,
    shape=jax.eval_shape(null_value, frozen_shapes(load)),
    encode=lambda frozen, keys, batch, train: values(frozen[ENCODERS], cast(Any, batch[name])),
    null=(lambda frozen: frozen[COMPUTED]) if dropout else None,
    dropout=dropout,
    parse=parse,
    show=shorten,
    load=Loader(lambda: with_null(load()), shapes, lambda mesh: with_null(load_frozen(load, mesh))),
    host=host,
  )


def states(encoder: Any, *, layer: int = -1, normed: bool = True, masked: bool = True) -> Encode:
  """Make the argument `encode` of `text` for one encoder of `networks.text`.

  The result is a function that returns one vector for each token. These vectors are called states.

  Args:
    encoder: the encoder, a Linen module. The function receives the parameters of this module as `params`.
    layer: the number of layers after which to take the states. -1 is the last layer.
    normed: whether the encoder's final normalization is applied to the states.
    masked: whether padding is masked, so that neither the encoder nor the network attends to it. Models that use CLIP's
      text encoder attend to padding, so they need False. If True, the values are a dict of "states" [B, L, C] and
      "mask", booleans [B, L]. If False, the values are an array [B, L, C], and the function also accepts weighted
      tokens (see `read_tokens`).
  """

  def encode(params: PyTree, tokens: Mapping[str, Any]) -> PyTree:
    def apply(ids: Array, mask: Array | None = None) -> Any:
      return encoder.apply({"params": params}, ids, mask, layer=layer, normed=normed)

    if not masked:
      return read_tokens(apply, tokens[ONLY])[0]
    ids, mask = tokens[ONLY]
    return {"states": apply(ids, mask).tokens, "mask": mask}

  return encode


def read_tokens(apply: Callable[[Array], Any], tokens: Tokens | WeightedTokens) -> tuple[Array, Array | None]:
  """Return the states [B, L, D] of tokens, and the pooled vectors [B, P] of the texts.

  The second value is None if the encoder has no pooled vectors. A weighted text consists of C chunks of L tokens. The
  encoder reads the chunks independently. The states of weighted texts have the shape [B, C L, D], and are multiplied by
  the weights (see `emphasis.encode_weighted`). The pooled vector of a weighted text comes from its first chunk, without
  weights.

  Args:
    apply: `apply(ids [N, L]) -> output` calls an encoder of `networks.text`. The output has the attributes `tokens`
      [N, L, D] and `pooled` [N, P] or None.
    tokens: the tokens of B texts, with or without weights.
  """
  if isinstance(tokens, Tokens):
    found = apply(jnp.asarray(tokens.ids))
    return found.tokens, found.pooled
  batch, chunks, length = tokens.ids.shape
  found = apply(jnp.reshape(tokens.ids, (batch * chunks, length)))
  pooled = None if found.pooled is None else found.pooled.reshape(batch, chunks, -1)[:, 0]
  return weigh(found.tokens, jnp.asarray(tokens.weights)), pooled


def token_ids(name: str, tokenizer: Tokenizer, dropout: float = 0.0) -> Condition:
  """Return a text condition of token ids, for a network with a trained embedding of its own.

  The network's argument `tokens` is a dict of "ids" [B, L] and "mask", booleans [B, L]. The network's option
  `vocabulary` is the number of ids (see `networks.ConditionalUNet`). With dropout, the null value is the ids of the
  empty text.

  Args:
    name: the condition's name.
    tokenizer: the tokenizer, such as `data.tokenizers.words(...)`.
    dropout: the share of samples trained without their text, in [0, 1).

  Raises:
    ValueError: if `dropout` is outside [0, 1).
  """
  check_dropout(dropout, name)
  host = _Tokenize({ONLY: tokenizer})
  null = {part: array[0] for part, array in host([""])[ONLY].items()}
  return Condition(
    kind="tokens",
    shape={part: jax.ShapeDtypeStruct(array.shape, array.dtype) for part, array in null.items()},
    encode=lambda frozen, keys, batch, train: dict(batch[name][ONLY]),
    null=(lambda frozen: null) if dropout else None,
    dropout=dropout,
    vocabulary=tokenizer.vocabulary,
    parse=functools.partial(_parse, name, (tokenizer,)),
    show=shorten,
    host=host,
    unread=functools.partial(_unread, (tokenizer,)),
  )


def is_storable(condition: Condition) -> bool:
  """Return whether the values of a condition can be stored, so that training needs no encoder (see `text`)."""
  if condition.host is None or condition.load is None:
    return False
  shapes = frozen_shapes(condition.load)
  return isinstance(shapes, Mapping) and ENCODERS in shapes


def stored(name: str, condition: Condition) -> Condition:
  """Replace the encoders of a condition with values from the batch, and return the new condition.

  The batch contains the encoded values under the names that `stored_items` returns. The new condition has the same
  frozen parameters except for the parameters of the encoders (see `without_encoders`).
  """
  load = condition.load
  assert load is not None
  names = jax.tree_util.tree_map_with_path(lambda path, _: _item_name(name, path), condition.shape)
  return condition._replace(
    host=None,
    from_data=lambda batch: jax.tree.map(lambda item: batch[item], names),
    encode=lambda frozen, keys, batch, train: batch[name],
    load=Loader(lambda: without_encoders(load()), lambda: without_encoders(frozen_shapes(load))),
  )


def stored_items(name: str, values: PyTree) -> dict[str, Any]:
  """Return a dict from names such as "text.states" to the arrays of a condition's values."""
  return {_item_name(name, path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(values)}


def without_encoders(frozen: Mapping[str, PyTree]) -> dict[str, PyTree]:
  """Return a condition's frozen parameters without the parameters of its encoders."""
  return {part: leaves for part, leaves in frozen.items() if part != ENCODERS}


def _item_name(name: str, path: Any) -> str:
  return f"{name}.{jax.tree_util.keystr(path, simple=True, separator='.') or 'value'}"


def shorten(text: Any) -> str:
  """Return a text, shortened if it is too long for a report."""
  shown = str(text)
  return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}..."


@dataclasses.dataclass(frozen=True, eq=False)
class _Tokenize:
  """Convert texts to tokens with each tokenizer.

  The result is a dict from the tokenizers' names to dicts of the fields of `data.Tokens`.
  """

  tokenizers: Mapping[str, Tokenizer]

  def __call__(self, texts: Sequence[str] | np.ndarray) -> dict[str, dict[str, Any]]:
    items = [str(text) for text in texts]
    return {part: tokenizer(items)._asdict() for part, tokenizer in self.tokenizers.items()}


def tokenizer_digests(condition: Condition) -> list[str]:
  """Return the digests of the tokenizers of a condition, or an empty list if the condition is not a text."""
  host = condition.host
  return [one.digest for one in host.tokenizers.values()] if isinstance(host, _Tokenize) else []


def _tokenize_weighted(
  tokenizers: Mapping[str, Tokenizer], chunks: int, texts: Sequence[str] | np.ndarray
) -> dict[str, dict[str, Any]]:
  items = [str(text) for text in texts]
  return {part: prompts.tokenize(one, items, chunks=chunks)._asdict() for part, one in tokenizers.items()}


def _check_text(text: str) -> str:
  check_texts([text])
  return text


def _parse(name: str, tokenizers: Sequence[Tokenizer], text: str) -> str:
  check_texts([text])
  (dropped,) = _unread(tokenizers, [text])
  if dropped:
    _warn_once(
      f"the {name} {shorten(text)!r} has more tokens than fit, so the model does not read its end, {shorten(dropped)!r}"
    )
  return text


def _unread(tokenizers: Sequence[Tokenizer], texts: Sequence[str]) -> list[str]:
  rows = zip(*(tokenizer.dropped(texts) for tokenizer in tokenizers), strict=True)
  return [max(row, key=len) for row in rows]


@functools.lru_cache(maxsize=1024)
def _warn_once(message: str) -> None:
  warn(message)
