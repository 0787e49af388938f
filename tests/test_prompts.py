"""Test prompts with weights, long prompts, and their encoding."""

import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import models
from ddpm_jax.data import prompts, tokenizers
from ddpm_jax.data.prompts import Piece
from ddpm_jax.models import conditions, inputs, texts
from ddpm_jax.networks import ConditionalUNet
from ddpm_jax.networks.text import TextStates

WORDS = ("red", "fox", "in", "snow", "a", "(", ")", "[", "]", ":", ",", "b", "c", "d")
TOKENIZER = tokenizers.words(WORDS, length=8)._replace(prefix=(1,), vocabulary=20)
CAPACITY = 6


def random_prompt(draw, depth=0, weight=1.0):
  """Return the text of a random prompt, and a list of pairs (character, weight)."""
  text, expected = "", []
  for _ in range(draw.randint(1, 4)):
    kind = draw.choice(("text", "text", "escape", "round", "square", "number") if depth < 4 else ("text",))
    if kind == "text":
      part = "".join(draw.choices("ab ,é猫!", k=draw.randint(1, 5)))
      text += part
      expected += [(one, weight) for one in part]
    elif kind == "escape":
      one = draw.choice("()[]\\")
      text += "\\" + one
      expected.append((one, weight))
    else:
      number = draw.choice(("0.5", "1.25", "2", ".75", "-1"))
      factor = {"round": 1.1, "square": 1 / 1.1, "number": float(number)}[kind]
      inner, more = random_prompt(draw, depth + 1, weight * factor)
      text += {"round": f"({inner})", "square": f"[{inner}]", "number": f"({inner}:{number})"}[kind]
      expected += more
  return text, expected


def test_weights_of_nested_brackets_multiply():
  draw = random.Random(0)
  for _ in range(200):
    text, expected = random_prompt(draw)
    pieces = prompts.parse(text)
    actual = [(one, piece.weight) for piece in pieces for one in piece.text]
    assert [one for one, _ in actual] == [one for one, _ in expected], text
    np.testing.assert_allclose([weight for _, weight in actual], [weight for _, weight in expected], rtol=1e-12)
    assert all(first.weight != second.weight for first, second in itertools.pairwise(pieces))


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("", []),
    ("a cat", [("a cat", 1)]),
    ("a (cat:1.3)", [("a ", 1), ("cat", 1.3)]),
    ("a (cat : 1.3 )", [("a ", 1), ("cat ", 1.3)]),
    ("(((a)))", [("a", 1.1**3)]),
    ("a (b", [("a ", 1), ("b", 1.1)]),
    ("a [b", [("a ", 1), ("b", 1 / 1.1)]),
    ("a) b]", [("a) b]", 1)]),
    ("a:1.3) b", [("a:1.3) b", 1)]),
    ("a: b, 16:9", [("a: b, 16:9", 1)]),
    (r"a \(b:1.3\) c", [("a (b:1.3) c", 1)]),
    (r"a\b", [("ab", 1)]),
    ("(a)(b)", [("ab", 1.1)]),
    ("()", []),
    ("(a:0)", [("a", 0)]),
    ("(a:+.5)", [("a", 0.5)]),
  ],
)
def test_pieces_of_prompts(text, expected):
  pieces = prompts.parse(text)
  assert [piece.text for piece in pieces] == [text for text, _ in expected]
  np.testing.assert_allclose([piece.weight for piece in pieces], [weight for _, weight in expected])


@pytest.mark.parametrize("text", ["[cat:dog:0.5]", "[cat:10]", "[word:1.3]", "a [cat|dog]", "[(cat):dog:0.5]"])
def test_text_that_changes_between_steps_is_refused(text):
  with pytest.raises(ValueError, match="change between steps"):
    prompts.parse(text)


def test_huge_weights_are_refused():
  for text in ("(a:101)", "((((a:90):90)))", f"(a:{'9' * 400})"):
    with pytest.raises(ValueError, match="expected -100 to 100"):
      prompts.parse(text)


def test_a_prompt_without_marks_has_the_tokens_of_the_tokenizer():
  texts = ["a red fox in snow", "", "a"]
  expected = TOKENIZER(texts)
  for weighted in (True, False):
    tokens = prompts.tokenize(TOKENIZER, texts, weighted=weighted)
    np.testing.assert_array_equal(tokens.ids[:, 0], expected.ids)
    np.testing.assert_array_equal(tokens.mask[:, 0], expected.mask)
    np.testing.assert_array_equal(tokens.weights, np.ones((3, 1, 8)))


@pytest.mark.parametrize("side", ["right", "left"])
def test_tokens_have_the_weights_of_their_pieces(side):
  tokenizer = TOKENIZER._replace(padding_side=side)
  ids, mask, weights = prompts.tokenize(tokenizer, ["a (red fox:1.5) [in] snow"])
  assert ids[mask].tolist() == [1, 7, 3, 4, 5, 6, 1]
  np.testing.assert_allclose(weights[mask], [1, 1, 1.5, 1.5, 1 / 1.1, 1, 1], rtol=1e-6)
  assert (weights[~mask] == 1).all()


def test_without_weights_brackets_are_text():
  tokens = prompts.tokenize(TOKENIZER, ["(red)"], weighted=False)
  assert tokens.ids[0, 0].tolist() == [1, 8, 3, 9, 1, 0, 0, 0]


def test_chunks_together_hold_all_tokens():
  texts = ["a (b c:2) d " * count for count in range(6)]
  ids, mask, weights = prompts.tokenize(TOKENIZER, texts)
  assert ids.shape == mask.shape == weights.shape == (6, 4, 8)  # 20 tokens in chunks of 6
  for count in range(6):
    content = [row[1:-1] for row in (ids[count, chunk][mask[count, chunk]] for chunk in range(4))]
    assert np.concatenate(content).tolist() == [7, 14, 15, 16] * count
    # A prompt fills one chunk after another. The chunks after its last token are empty.
    assert [len(row) for row in content] == [min(6, max(0, 4 * count - 6 * chunk)) for chunk in range(4)]
    row_weights = weights[count][mask[count] & (ids[count] > 2)]
    np.testing.assert_array_equal(row_weights, np.tile([1, 2, 2, 1], count))
  assert (ids[mask][ids[mask] < 3] == 1).all()


def test_tokens_beyond_the_last_chunk_are_dropped():
  texts = ["a (b c:2) d " * 3, "a"]
  tokens = prompts.tokenize(TOKENIZER, texts, chunks=1)
  np.testing.assert_array_equal(tokens.ids[:, 0], prompts.tokenize(TOKENIZER, texts).ids[:, 0])
  assert prompts.dropped(TOKENIZER, texts, 1) == ["c d a b c d", ""]
  assert prompts.dropped(TOKENIZER, texts, 2) == ["", ""]
  assert prompts.tokenize(TOKENIZER, ["a"], chunks=3).ids.shape == (1, 3, 8)


def test_wrong_arguments():
  for items, chunks in (([], None), (["a"], 0)):
    with pytest.raises(ValueError, match="expected at least one chunk and one prompt"):
      prompts.tokenize(TOKENIZER, items, chunks=chunks)
  with pytest.raises(ValueError, match="Pass \\[text\\]"):
    prompts.tokenize(TOKENIZER, "a cat")


TABLE = jax.random.normal(jax.random.key(0), (20, 3)) + 2


@jax.jit
def encode(ids):
  """Return, for each token, the mean of the embeddings up to this token."""
  return jnp.cumsum(TABLE[ids], axis=1) / jnp.arange(1.0, ids.shape[1] + 1)[:, None]


def encode_by_hand(ids, weights, keep_mean):
  """Encode each chunk separately, and apply its weights in float64."""
  states = []
  for row, row_weights in zip(ids, weights, strict=True):
    chunks = []
    for chunk, chunk_weights in zip(row, row_weights, strict=True):
      z = np.asarray(encode(chunk[None])[0], np.float64)
      weighted = z * chunk_weights[:, None]
      chunks.append(weighted * z.mean() / weighted.mean() if keep_mean else weighted)
    states.append(np.concatenate(chunks))
  return np.stack(states)


@pytest.mark.parametrize("keep_mean", [True, False])
def test_states_are_weighted(keep_mean):
  texts = ["a (red:1.5) fox in [snow] , b c d", "(a:0.5)", ""]
  ids, _, weights = prompts.tokenize(TOKENIZER, texts)
  states = models.encode_weighted(encode, ids, weights, keep_mean=keep_mean)
  assert states.shape == (3, 16, 3)
  np.testing.assert_allclose(states, encode_by_hand(ids, weights, keep_mean), rtol=1e-5)
  if keep_mean:
    means = np.asarray(states).reshape(3, 2, 8, 3).mean((2, 3))
    plain = np.asarray(encode(ids.reshape(-1, 8))).mean((1, 2)).reshape(3, 2)
    np.testing.assert_allclose(means, plain, rtol=1e-5)


def test_weights_of_one_leave_the_states_unchanged():
  ids, _, weights = prompts.tokenize(TOKENIZER, ["a red fox", "snow"])
  states = models.encode_weighted(encode, ids, weights)
  np.testing.assert_allclose(states, encode(ids[:, 0]), rtol=1e-6)


def test_states_of_a_prompt_do_not_depend_on_others():
  ids, _, weights = prompts.tokenize(TOKENIZER, ["a (red:1.5) fox", "(snow:0.1)"])
  together = models.encode_weighted(encode, ids, weights)
  alone = models.encode_weighted(encode, ids[:1], weights[:1])
  np.testing.assert_allclose(together[:1], alone, rtol=1e-6)


def test_weights_of_zero_give_finite_states_in_the_encoders_type():
  ids, _, weights = prompts.tokenize(TOKENIZER, ["(a:0)"])
  states = models.encode_weighted(lambda ids: encode(ids).astype(jnp.bfloat16), ids, np.zeros_like(weights))
  assert states.dtype == jnp.bfloat16
  assert not states.any()


def test_wrong_shapes():
  ids = np.zeros((2, 1, 8), np.int32)
  with pytest.raises(ValueError, match=r"expected \[B, C, L\]"):
    models.encode_weighted(encode, ids, np.ones((2, 8)))
  with pytest.raises(ValueError, match="states of all tokens"):
    models.encode_weighted(lambda ids: encode(ids)[:, 0], ids, np.ones(ids.shape))


def test_pieces_are_tuples():
  assert prompts.parse("a (b:2)") == [Piece("a ", 1.0), Piece("b", 2.0)]


def test_a_network_reads_as_many_chunks_as_the_texts_need():
  def read(params, tokens):
    return texts.read_tokens(lambda ids: TextStates(params[ids], None, ()), tokens["words"])[0]

  condition = texts.text("text", {"words": TOKENIZER}, read, lambda: TABLE, dropout=0.1, takes_weights=True)
  prompts_with_weights = ["a (red:1.5) fox in snow , b c d", "snow"]
  weighted = condition.weighted(prompts_with_weights)
  batch, frozen = inputs.host_items({"text": weighted}, {"text": prompts_with_weights}), weighted.load()
  found = weighted.encode(frozen, None, batch, False)
  ids, _, weights = prompts.tokenize(TOKENIZER, prompts_with_weights)
  np.testing.assert_allclose(found, models.encode_weighted(lambda ids: TABLE[ids], ids, weights), rtol=1e-6)
  assert (condition.shape.shape, weighted.shape.shape, weighted.null(frozen).shape) == ((8, 3), (16, 3), (16, 3))
  # The network is built for a condition with one chunk.
  options = {"channels": 8, "multipliers": (1,), "blocks": 1, "attention_levels": (0,), "heads": 1, "groups": 4}
  network = models.networks.from_linen(ConditionalUNet(1, context_features=3, **options), {"text": condition})
  x, time = jnp.zeros((2, 8, 8, 1)), jnp.ones((2,))
  params = jax.eval_shape(network.init, jax.random.key(0), x, time, {"text": jnp.zeros((2, 8, 3))})
  assert jax.eval_shape(network.apply, params, x, time, {"text": found}).shape == x.shape
  conditions.check_given({"text": weighted}, {"text": found})
  with pytest.raises(ValueError, match=r"Got text of shape \(2, 16, 3\); expected \[B, 8, 3\]"):
    conditions.check_given({"text": condition}, {"text": found})
