"""Compare our transformer of Stable Diffusion 3 with diffusers' `SD3Transformer2DModel`, and read and write folders."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel

from ddpm_jax import interop
from ddpm_jax.interop import sd3
from ddpm_jax.networks import MMDiT, trainable_mask
from tests.parameters import random_like
from tests.test_interop_files import try_wrong_values

SMALL = {
  "sample_size": 8,
  "in_channels": 4,
  "out_channels": 4,
  "num_layers": 2,
  "num_attention_heads": 2,
  "attention_head_dim": 12,
  "caption_projection_dim": 24,
  "joint_attention_dim": 10,
  "pooled_projection_dim": 7,
  "pos_embed_max_size": 6,
}
# The height and width of the data, and the options. The table has room for 12 x 12 pixels in patches of 2 x 2.
CONFIGS = {
  "3, medium": ((8, 12), SMALL),
  "3.5, medium": ((10, 4), SMALL | {"num_layers": 3, "qk_norm": "rms_norm", "dual_attention_layers": (0,)}),
  "3.5, large": ((12, 12), SMALL | {"qk_norm": "rms_norm"}),
  "patches of one pixel, more output channels": (
    (3, 5),
    SMALL | {"patch_size": 1, "out_channels": 6, "dual_attention_layers": (1, 7), "sample_size": 5},
  ),
}
BATCH, TOKENS = 2, 5


@functools.cache
def peer_of(name):
  """Return the model of CONFIGS[name] in diffusers, with all parameters random.

  The table of positions is random too, because it is part of the file. All tests share the model and must not change
  it.
  """
  torch.manual_seed(0)
  peer = SD3Transformer2DModel(**CONFIGS[name][1]).eval()
  with torch.no_grad():
    for value in [*peer.parameters(), *peer.buffers()]:
      value.add_(0.1 * torch.randn_like(value))
  return peer


def inputs_of(name):
  """Return random inputs of our network. The key "weight" has a random weight for each value of the output."""
  (height, width), peer = CONFIGS[name][0], peer_of(name)
  rng = np.random.default_rng(1)
  inputs = {
    "x": rng.standard_normal((BATCH, height, width, 4)),
    "time": np.array([3.0, 977.5]),
    "tokens": rng.standard_normal((BATCH, TOKENS, 10)),
    "vector": rng.standard_normal((BATCH, 7)),
    "weight": rng.standard_normal((BATCH, height, width, peer.out_channels)),
  }
  return {name: value.astype(np.float32) for name, value in inputs.items()}


GRADIENTS = ("x", "tokens", "vector")


def run_peer(peer, inputs):
  """Return the output of diffusers, and the gradients of sum(output * weight) with respect to `GRADIENTS`."""
  t = {name: torch.tensor(value) for name, value in inputs.items()}
  for name in GRADIENTS:
    t[name].requires_grad_()
  output = peer(t["x"].moveaxis(-1, 1), t["tokens"], t["vector"], t["time"]).sample.moveaxis(1, -1)
  (output * t["weight"]).sum().backward()
  return {"output": output.detach().numpy(), **{name: t[name].grad.numpy() for name in GRADIENTS}}


def run_ours(network, params, inputs):
  """Return the same values as `run_peer`."""

  @jax.jit
  def run(params, inputs):
    def loss(values):
      given = inputs | values
      weight = given.pop("weight")
      output = network.apply({"params": params}, **given)
      return jnp.sum(output * weight), output

    gradients, output = jax.grad(loss, has_aux=True)({name: inputs[name] for name in GRADIENTS})
    return {"output": output, **gradients}

  return run(params, inputs)


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_input_gradients_match_the_peer(name, tmp_path):
  peer, inputs = peer_of(name), inputs_of(name)
  peer.save_pretrained(tmp_path)
  network, params = interop.diffusers.load_network(tmp_path)
  theirs, ours = run_peer(peer, inputs), run_ours(network, params, inputs)
  for key, expected in theirs.items():
    assert ours[key].shape == expected.shape
    np.testing.assert_allclose(ours[key], expected, atol=1e-4 * np.std(expected), rtol=0, err_msg=key)


@pytest.mark.parametrize("name", ["3, medium", "3.5, medium"])
def test_round_trips_are_exact(name, tmp_path):
  peer, inputs = peer_of(name), inputs_of(name)
  peer.save_pretrained(tmp_path / "a")
  network, params = interop.diffusers.load_network(tmp_path / "a")
  interop.diffusers.save_network(tmp_path / "b", network, params)
  again = SD3Transformer2DModel.from_pretrained(tmp_path / "b").eval()
  for key, value in peer.state_dict().items():
    assert torch.equal(value, again.state_dict()[key])
  np.testing.assert_array_equal(run_peer(peer, inputs)["output"], run_peer(again, inputs)["output"])
  other, same = interop.diffusers.load_network(tmp_path / "b")
  assert other == network
  jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), same, params)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_configs_are_read_back_unchanged(name):
  peer = peer_of(name)
  network = sd3.from_config(peer.config)
  template = sd3.template(network, 4)
  config = sd3.to_config(network, template)
  assert sd3.from_config(config) == network
  assert config["sample_size"] == peer.config.sample_size
  assert config["in_channels"] == 4
  # The size only sets the size that diffusers generates.
  assert sd3.to_config(network, template, (6, 10)) == config | {"sample_size": 10}


@pytest.mark.parametrize(("side", "size"), [(6, 8), (5, 12)])
def test_a_new_table_of_positions_is_that_of_the_peer(side, size):
  """Without a file, the table follows from a formula."""
  options = SMALL | {"pos_embed_max_size": side, "sample_size": size}
  network, expected = sd3.from_config(options), SD3Transformer2DModel(**options).pos_embed.pos_embed
  table = network._new_table(jax.random.key(0), (1, side**2, 24), jnp.float32)
  np.testing.assert_allclose(table, expected, atol=1e-6, rtol=0)


_LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
# The configs of published models, and the numbers of their parameters without the tables of positions.
PUBLISHED = {
  "3, medium": (
    {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
    2_028_328_000,
  ),
  "3.5, medium": (
    {
      "num_layers": 24,
      "num_attention_heads": 24,
      "caption_projection_dim": 1536,
      "pos_embed_max_size": 384,
      "qk_norm": "rms_norm",
      "dual_attention_layers": list(range(13)),
    },
    2_243_171_520,
  ),
  "3.5, large": (_LARGE | {"pos_embed_max_size": 192, "qk_norm": "rms_norm"}, 8_056_627_520),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_the_names_and_shapes_of_the_peer(name):
  options, count = PUBLISHED[name]
  # The peer computes the table of positions even on the device "meta", so it has a small one here.
  side = options["pos_embed_max_size"]
  with torch.device("meta"):
    peer = SD3Transformer2DModel(**options | {"pos_embed_max_size": 2})
  network = sd3.from_config(options)
  template, layout = sd3.template(network, 16), sd3.layout(network)
  shapes = {
    layout.name_of(path): layout.shape_of(path, tuple(leaf.shape))
    for path, leaf in interop.tensors.flatten(template).items()
  }
  table = {"pos_embed.pos_embed": (1, side**2, network.channels)}
  assert shapes == {key: tuple(value.shape) for key, value in peer.state_dict().items()} | table
  is_trained = trainable_mask(template)
  sizes = jax.tree.map(lambda leaf, trained: leaf.size if trained else 0, template, is_trained)
  assert sum(jax.tree.leaves(sizes)) == count == sum(value.numel() for value in peer.parameters())


def test_defaults_are_those_of_the_classes():
  with torch.device("meta"):
    config = SD3Transformer2DModel().config
  assert {key: value for key, value in config.items() if key[0] != "_"} == sd3.DEFAULTS
  assert sd3.from_config(PUBLISHED["3, medium"][0]) == MMDiT()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"_class_name": "FluxTransformer2DModel"}, "class FluxTransformer2DModel; expected SD3Transformer2DModel"),
    ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm', which is not supported; expected null or 'rms_norm'"),
    ({"caption_projection_dim": 20}, "caption_projection_dim=20, which is not supported; expected 24"),
    ({"sample_size": 7}, "sample_size=7, which is not supported; expected a multiple of patch_size=2"),
    ({"sample_size": [8, 8]}, r"sample_size=\[8, 8\]; expected an integer"),
    ({"pos_embed_max_size": None}, "pos_embed_max_size=None; expected an integer"),
    ({"num_layers": 0}, "num_layers=0; expected 1 or more"),
    ({"dual_attention_layers": 3}, "dual_attention_layers=3; expected a list"),
    ({"attention_head_dim": 13, "caption_projection_dim": 26}, "channels=26 with heads=2"),
    ({"sampling": "conv"}, "sampling='conv', which is not supported"),
  ],
)
def test_unsupported_options_are_refused_by_name(changes, message):
  with pytest.raises(ValueError, match=message):
    sd3.from_config(SMALL | changes)


def test_values_of_wrong_types_are_errors_that_name_the_file(tmp_path):
  peer_of("3.5, medium").save_config(tmp_path)
  accepted = {}
  for key, value, message in try_wrong_values(
    tmp_path, "config.json", lambda: interop.network_folders.read_network(tmp_path)
  ):
    if message is None:
      accepted.setdefault(key, []).append(value)
    else:
      assert f"{tmp_path / 'config.json'}" in message, (key, value, message)
  assert accepted == {"out_channels": [None], "qk_norm": [None], "dual_attention_layers": [[]]}


def test_weights_that_do_not_match_are_described(tmp_path):
  peer_of("3, medium").save_pretrained(tmp_path)
  config = json.loads((tmp_path / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(config | {"qk_norm": "rms_norm"}))
  with pytest.raises(ValueError, match=r"8 missing: transformer_blocks\.0\.attn\.norm_added_k\.weight"):
    interop.diffusers.load_network(tmp_path)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"time_features": 64}, "time_features=64; expected 256"),
    ({"epsilon": 1e-5}, "epsilon=1e-05; expected 1e-06"),
  ],
)
def test_networks_that_cannot_be_saved_are_errors(options, message, tmp_path):
  network = sd3.from_config(SMALL).clone(**options)
  params = random_like(sd3.template(network, 4))
  with pytest.raises(ValueError, match=message):
    interop.diffusers.save_network(tmp_path, network, params)


def test_a_network_without_a_vector_cannot_be_saved(tmp_path):
  network = sd3.from_config(SMALL).clone(vector_features=0)
  params = random_like({name: leaf for name, leaf in sd3.template(network, 4).items() if name != "vector"})
  with pytest.raises(ValueError, match="Got a network without a vector; expected one"):
    interop.diffusers.save_network(tmp_path, network, params)
