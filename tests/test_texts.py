"""Test conditions of text with tiny random encoders, live against transformers."""

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from ddpm_jax import data, models
from ddpm_jax.models import conditions, inputs, texts
from ddpm_jax.models.codecs import frozen_shapes
from ddpm_jax.models.guided import Parameters
from ddpm_jax.networks import ConditionalUNet
from ddpm_jax.networks.kernels.attention import mask_bias
from ddpm_jax.networks.text import blocks
from ddpm_jax.networks.text.bert import EncoderLayer
from ddpm_jax.runs import conditions as choices
from ddpm_jax.runs import scoring
from ddpm_jax.storage import frozen_file
from tests.parameters import random_like
from tests.tokenizer_folders import WORDS, write_bert

TEXTS = ["a red fox", "", "a bear left of a fox and a bear and a fox", "unknown words"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def condition(folder):
  """Return a condition of 8 tokens."""
  return choices.text("text", str(folder), length=8, dropout=0.5)


@pytest.fixture(scope="module")
def frozen(condition):
  return condition.load()


def encode(condition, frozen, items, *, train=False):
  batch = inputs.host_items({"text": condition}, {"text": items})
  return conditions.encode({"text": condition}, {"text": frozen}, jax.random.key(0), batch, train=train)["text"]


def test_states_equal_those_of_transformers(folder, condition, frozen):
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  peer = transformers.BertModel.from_pretrained(folder).eval()
  tokens = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=8, return_tensors="pt")
  with torch.no_grad():
    expected = peer(**tokens).last_hidden_state.numpy()
  values = encode(condition, frozen, TEXTS)
  np.testing.assert_array_equal(values["mask"], tokens["attention_mask"].numpy() == 1)
  np.testing.assert_allclose(values["states"], expected, atol=1e-5)


def test_the_null_value_is_that_of_the_empty_text(condition, frozen):
  values = encode(condition, frozen, TEXTS)
  jax.tree.map(
    lambda null, value: np.testing.assert_allclose(null, value[1], atol=3e-5), condition.null(frozen), values
  )
  dropped = conditions.drop({"text": condition}, {"text": frozen}, {"text": values})["text"]
  np.testing.assert_allclose(dropped["states"][2], values["states"][1], atol=3e-5)
  # In training, a random share of the samples gets the null value.
  trained = np.asarray(encode(condition, frozen, [TEXTS[0]] * 64, train=True)["states"])
  is_null = (np.abs(trained - np.asarray(values["states"][1])) < 3e-5).all((1, 2))
  np.testing.assert_allclose(
    trained[~is_null], np.broadcast_to(values["states"][0], trained[~is_null].shape), atol=3e-5
  )
  assert 16 < is_null.sum() < 48


def test_shapes_are_known_without_the_weights(condition, frozen):
  shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), frozen_shapes(condition.load))
  assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), frozen)
  assert jax.tree.map(jnp.shape, condition.null(frozen)) == jax.tree.map(lambda leaf: leaf.shape, condition.shape)


def test_the_null_value_has_no_digest(frozen, tmp_path):
  frozen_file.write(tmp_path, frozen_file.compute({"conditions": {"text": frozen}}))
  changed = {**frozen, "computed": jax.tree.map(lambda leaf: leaf + 1, frozen["computed"]["states"])}
  frozen_file.check(tmp_path, frozen_file.compute({"conditions": {"text": changed}}))
  encoders = jax.tree.map(lambda leaf: leaf + 1, frozen["encoders"])
  with pytest.raises(ValueError, match=r"frozen parameters \(conditions\) that differ"):
    frozen_file.check(tmp_path, frozen_file.compute({"conditions": {"text": {**frozen, "encoders": encoders}}}))
  # So the digest that identifies samples does not depend on it either.
  parts = (frozen, changed, {**frozen, "encoders": encoders})
  digests = [scoring.digest(Parameters({"w": jnp.ones(2)}, {"conditions": {"text": part}})) for part in parts]
  assert digests[0] == digests[1] != digests[2]
  assert scoring.digest(Parameters({"w": jnp.zeros(2)}, {"conditions": {"text": frozen}})) != digests[0]


def test_several_encoders_give_tokens_and_a_vector():
  first, second = (data.tokenizers.words(WORDS, length) for length in (6, 4))

  def values(params, tokens):
    states = params["a"][tokens["a"].ids]
    return {"tokens": states, "vector": params["b"][tokens["b"].ids].mean(1)}

  def load():
    rows = np.random.default_rng(0).normal(size=(len(WORDS) + 3, 5)).astype(np.float32)
    return {"a": jnp.asarray(rows), "b": jnp.asarray(2 * rows)}

  kind = {"tokens": "tokens", "vector": "vector"}
  for null_text in ("", None):
    condition = texts.text("text", {"a": first, "b": second}, values, load, kind=kind, dropout=0.1, null_text=null_text)
    frozen = condition.load()
    found = encode(condition, frozen, TEXTS)
    assert {name: leaf.shape for name, leaf in found.items()} == {"tokens": (4, 6, 5), "vector": (4, 5)}
    arguments = models.network_arguments.keywords({"text": condition}, {"text": found}, frozenset({"tokens", "vector"}))
    np.testing.assert_array_equal(arguments["vector"], found["vector"])
    expected = found["vector"][1] if null_text == "" else np.zeros(5)
    np.testing.assert_allclose(condition.null(frozen)["vector"], expected, atol=3e-5)


def test_any_text_is_an_item_and_its_lost_end_is_a_warning(condition, capsys):
  for text in ("", "größe 🦊", "a fox"):
    assert condition.parse(text) == text
  assert capsys.readouterr().err == ""
  for _ in range(2):
    condition.parse("a red fox left of a bear and a fox")
  message = capsys.readouterr().err
  assert message.count("has more tokens than fit") == 1
  assert "'bear and a fox'" in message
  assert condition.show("a" * 100) == "a" * 77 + "..."
  with pytest.raises(ValueError, match="not valid Unicode"):
    condition.parse("\ud800")


def test_workers_receive_the_tokenizer_by_pickle(condition):
  host = cloudpickle.loads(cloudpickle.dumps(condition.host))
  expected = condition.host(np.array(TEXTS))
  jax.tree.map(np.testing.assert_array_equal, host(np.array(TEXTS)), expected)


def test_a_network_embeds_token_ids_itself():
  condition = choices.words("text", WORDS, length=6, dropout=0.1)
  derived = models.network_arguments.derived_arguments({"text": condition}, (8, 8, 1), 1)
  assert (derived["vocabulary"], derived["context_features"], derived["num_classes"]) == (len(WORDS) + 3, 0, 0)
  options = {"channels": 8, "multipliers": (1,), "blocks": 1, "attention_levels": (0,), "heads": 1, "groups": 4}
  vocabulary = derived["vocabulary"]
  network = ConditionalUNet(1, vocabulary=vocabulary, vocabulary_layers=1, context_features=12, **options)
  given = {"text": encode(condition, None, TEXTS)}
  wrapped = models.networks.from_linen(network, {"text": condition})
  apply = jax.jit(wrapped.apply)
  x, time = jax.random.normal(jax.random.key(1), (4, 8, 8, 1)), jnp.full((4,), 3.0)
  params = random_like(jax.eval_shape(wrapped.init, jax.random.key(0), x, time, given))
  found = apply(params, x, time, given)
  # Compute the states of the words here, and pass them to a network without a vocabulary.
  own = ("tokens", "token_positions", "token_layer_0")
  table, positions, layer_params = (params[name] for name in own)
  embedded = table["embedding"][given["text"]["ids"]] + positions["embedding"][None]
  layer = EncoderLayer(1, 48, "gelu", 1e-5, blocks.Options(jnp.float32, None, "plain"))
  states = layer.apply({"params": layer_params}, embedded, mask_bias(given["text"]["mask"]))
  plain = ConditionalUNet(1, context_features=12, **options)
  rest = {name: leaf for name, leaf in params.items() if name not in own}
  tokens = {"states": states, "mask": given["text"]["mask"]}
  np.testing.assert_allclose(found, jax.jit(plain.apply)({"params": rest}, x, time, tokens), atol=1e-5)
  with pytest.raises(ValueError, match="Got tokens without ids for a network with vocabulary"):
    network.apply({"params": params}, x, time, tokens)
  with pytest.raises(ValueError, match="Got vocabulary_layers=1 without a vocabulary"):
    ConditionalUNet(vocabulary_layers=1).check_input((8, 8, 4))
  with pytest.raises(ValueError, match="Got tokens of 12 features with heads=5"):
    network.clone(heads=5).check_input((8, 8, 1))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"path": ""}, r"Got an empty path of text; .* Set --config\.model\.conditions\.text\.path=<folder>"),
    ({"length": 99}, "Got length=99 for a text encoder of 16 positions; expected 16 or less"),
    ({"length": 2}, "Got length=2 of a tokenizer with 2 special tokens"),
    ({"dtype": "float16"}, "Got 'float16' as config.model.conditions.text.dtype; expected"),
    ({"dropout": 1.0}, "Got dropout=1.0 of text; expected a share"),
    ({"layer": 7}, "Got layer=7 for a text encoder with 2 layers"),
    ({"part": "text_encoder"}, "which has no config.json of a text encoder"),
  ],
)
def test_wrong_arguments_are_errors(folder, arguments, message):
  with pytest.raises(ValueError, match=message):
    choices.text(**{"name": "text", "path": str(folder), **arguments})


def test_a_pipeline_has_its_tokenizer_beside_the_encoder(folder, condition, tmp_path):
  for part in ("text_encoder", "tokenizer"):
    (tmp_path / part).mkdir()
    for file in folder.iterdir():
      if (part == "tokenizer") == (file.name in ("vocab.txt", "tokenizer_config.json")):
        (tmp_path / part / file.name).write_bytes(file.read_bytes())
  found = choices.text("text", str(tmp_path), part="text_encoder", length=8, dropout=0.5)
  assert found.shape == condition.shape
