"""Compare our transformer of PixArt with diffusers' `PixArtTransformer2DModel`, and read and write folders."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import PixArtTransformer2DModel

from ddpm_jax import interop
from ddpm_jax.interop import pixart
from ddpm_jax.networks import PixArt
from tests.parameters import random_like
from tests.test_interop_files import try_wrong_values

SMALL = {
  "num_layers": 2,
  "num_attention_heads": 2,
  "attention_head_dim": 12,
  "cross_attention_dim": 24,
  "caption_channels": 10,
}
# The height and width of the data, the options, and the height and width of the image or None.
CONFIGS = {
  "alpha, 512": ((8, 8), SMALL | {"sample_size": 8}),
  "alpha, 256": ((4, 10), SMALL | {"sample_size": 6, "interpolation_scale": 0.5, "norm_eps": 1e-3}),
  "alpha, 1024": ((8, 6), SMALL | {"sample_size": 128}),
  "sigma, 1024": ((6, 8), SMALL | {"sample_size": 128, "use_additional_conditions": False, "upcast_attention": True}),
  "sigma, 512, patches of one pixel": (
    (3, 5),
    SMALL | {"sample_size": 5, "patch_size": 1, "use_additional_conditions": True, "out_channels": None},
  ),
}
BATCH, TOKENS = 2, 5
MASK = np.array([[True, True, True, True, False], [True, False, False, False, False]])


def random_peer(options):
  """Return a `PixArtTransformer2DModel` with all parameters random."""
  torch.manual_seed(0)
  peer = PixArtTransformer2DModel(**options).eval()
  with torch.no_grad():
    for parameter in peer.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  return peer


@functools.cache
def peer_of(name):
  """Return the model of CONFIGS[name] in diffusers.

  All tests share the model and must not change it.
  """
  return random_peer(CONFIGS[name][1])


def inputs_of(name):
  """Return random inputs of our network. The key "weight" has a random weight for each value of the output."""
  (height, width), peer = CONFIGS[name][0], peer_of(name)
  rng = np.random.default_rng(1)
  inputs = {
    "x": rng.standard_normal((BATCH, height, width, 4)),
    "tokens": rng.standard_normal((BATCH, TOKENS, 10)),
    "time": np.array([3.0, 977.0]),
    "weight": rng.standard_normal((BATCH, height, width, peer.out_channels)),
  }
  if peer.use_additional_conditions:
    inputs["sizes"] = np.array([[1024, 768, 1024 / 768], [512, 640, 512 / 640]])
  return {name: value.astype(np.float32) for name, value in inputs.items()}


def run_peer(peer, inputs):
  """Return the output of diffusers, and the gradients of sum(output * weight) with respect to x and the tokens."""
  t = {name: torch.tensor(value) for name, value in inputs.items()}
  x, tokens = t["x"].moveaxis(-1, 1).requires_grad_(), t["tokens"].requires_grad_()
  sizes = t.get("sizes")
  added = {"resolution": None, "aspect_ratio": None}
  added = added if sizes is None else {"resolution": sizes[:, :2], "aspect_ratio": sizes[:, 2:]}
  output = peer(
    x, tokens, timestep=t["time"], added_cond_kwargs=added, encoder_attention_mask=torch.tensor(MASK)
  ).sample
  (output * t["weight"].moveaxis(-1, 1)).sum().backward()
  return {
    "output": output.detach().moveaxis(1, -1).numpy(),
    "x": x.grad.moveaxis(1, -1).numpy(),
    "tokens": tokens.grad.numpy(),
  }


def run_ours(network, params, inputs):
  """Return the same values as `run_peer`."""

  @jax.jit
  def run(params, inputs):
    def loss(values):
      given = inputs | values
      x, time, weight, tokens = (given.pop(name) for name in ("x", "time", "weight", "tokens"))
      output = network.apply({"params": params}, x, time, {"states": tokens, "mask": MASK}, **given)
      return jnp.sum(output * weight), output

    gradients, output = jax.grad(loss, has_aux=True)({name: inputs[name] for name in ("x", "tokens")})
    return {"output": output, **gradients}

  return run(params, dict(inputs))


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_input_gradients_match_the_peer(name, tmp_path):
  peer, inputs = peer_of(name), inputs_of(name)
  peer.save_pretrained(tmp_path)
  network, params = interop.diffusers.load_network(tmp_path)
  theirs, ours = run_peer(peer, inputs), run_ours(network, params, inputs)
  for key, expected in theirs.items():
    assert ours[key].shape == expected.shape
    np.testing.assert_allclose(ours[key], expected, atol=1e-4 * np.std(expected), rtol=0, err_msg=key)


@pytest.mark.parametrize("name", ["alpha, 256", "alpha, 1024"])
def test_round_trips_are_exact(name, tmp_path):
  peer, inputs = peer_of(name), inputs_of(name)
  peer.save_pretrained(tmp_path / "a")
  network, params = interop.diffusers.load_network(tmp_path / "a")
  interop.diffusers.save_network(tmp_path / "b", network, params)
  again = PixArtTransformer2DModel.from_pretrained(tmp_path / "b").eval()
  for key, value in peer.state_dict().items():
    assert torch.equal(value, again.state_dict()[key])
  np.testing.assert_array_equal(run_peer(peer, inputs)["output"], run_peer(again, inputs)["output"])
  other, same = interop.diffusers.load_network(tmp_path / "b")
  assert other == network
  jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), same, params)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_configs_are_read_back_unchanged(name):
  """The size of the data has no effect on the config, because positions depend on sample_size."""
  peer = peer_of(name)
  network = pixart.from_config(peer.config)
  again = pixart.to_config(network, pixart.template(network, 4), (20, 30))
  assert pixart.from_config(again) == network
  assert again["sample_size"] == peer.config.sample_size
  rebuilt = PixArtTransformer2DModel(**again)
  assert rebuilt.use_additional_conditions == peer.use_additional_conditions
  assert rebuilt.pos_embed.interpolation_scale == peer.pos_embed.interpolation_scale


# The options of published models, which both papers describe.
PUBLISHED = {
  "alpha, XL/2 512": {"sample_size": 64, "caption_channels": 4096},
  "alpha, XL/2 1024": {"sample_size": 128, "caption_channels": 4096},
  "sigma, XL/2 1024": {"sample_size": 128, "caption_channels": 4096, "use_additional_conditions": False},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_the_names_and_shapes_of_the_peer(name):
  with torch.device("meta"):
    peer = PixArtTransformer2DModel(**PUBLISHED[name])
  network = pixart.from_config(peer.config)
  assert network.size_features == (256 if "alpha, XL/2 1024" in name else 0)
  template, layout = pixart.template(network, 4), pixart.layout(network)
  shapes = {
    layout.name_of(path): layout.shape_of(path, tuple(leaf.shape))
    for path, leaf in interop.tensors.flatten(template).items()
  }
  assert shapes == {key: tuple(value.shape) for key, value in peer.state_dict().items()}
  assert sum(leaf.size for leaf in jax.tree.leaves(template)) == sum(value.numel() for value in peer.parameters())


def test_defaults_are_those_of_the_classes():
  with torch.device("meta"):
    config = PixArtTransformer2DModel().config
  assert {key: value for key, value in config.items() if key[0] != "_"} == pixart.DEFAULTS
  assert pixart.from_config({"sample_size": 64, "caption_channels": 4096}) == PixArt()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"_class_name": "DiTTransformer2DModel"}, "class DiTTransformer2DModel; expected PixArtTransformer2DModel"),
    ({"caption_channels": None}, "caption_channels=None, which is not supported; expected the number of features"),
    ({"cross_attention_dim": 20}, "cross_attention_dim=20, which is not supported; expected 24"),
    ({"cross_attention_dim": None}, "cross_attention_dim=None; expected an integer"),
    ({"sample_size": 7}, "sample_size=7, which is not supported; expected a multiple of patch_size=2"),
    ({"sample_size": [8, 8]}, r"sample_size=\[8, 8\]; expected an integer"),
    ({"norm_type": "ada_norm_zero"}, "norm_type='ada_norm_zero', which is not supported; expected 'ada_norm_single'"),
    ({"attention_bias": False}, "attention_bias=False"),
    ({"activation_fn": "geglu"}, "activation_fn='geglu'"),
    ({"dropout": 0.1}, "dropout=0.1"),
    ({"norm_elementwise_affine": True}, "norm_elementwise_affine=True"),
    ({"attention_type": "gated"}, "attention_type='gated'"),
    ({"in_channels": 0}, "in_channels=0; expected a number above 0"),
    ({"interpolation_scale": -1}, "interpolation_scale=-1; expected a number above 0"),
    ({"attention_head_dim": 13, "cross_attention_dim": 26}, "channels=26 with heads=2"),
    ({"attention_head_dim": 16, "cross_attention_dim": 32, "sample_size": 128}, "expected a multiple of 3"),
    ({"sampling": "conv"}, "sampling='conv', which is not supported"),
  ],
)
def test_unsupported_options_are_refused_by_name(changes, message):
  with pytest.raises(ValueError, match=message):
    pixart.from_config(SMALL | {"sample_size": 8} | changes)


def test_values_of_wrong_types_are_errors_that_name_the_file(tmp_path):
  peer_of("alpha, 512").save_config(tmp_path)
  accepted = {}
  for key, value, message in try_wrong_values(
    tmp_path, "config.json", lambda: interop.network_folders.read_network(tmp_path)
  ):
    if message is None:
      accepted.setdefault(key, []).append(value)
    else:
      assert f"{tmp_path / 'config.json'}" in message, (key, value, message)
  nullable = {key: [None] for key in ("out_channels", "interpolation_scale")}
  flags = {key: [True, None] for key in ("use_additional_conditions", "upcast_attention")}
  assert accepted == nullable | flags | {"attention_bias": [True]}


def test_folders_of_the_old_class_are_read(tmp_path):
  """The first published folders have a config of Transformer2DModel, with its keys, and a tensor without use."""
  name = "alpha, 256"
  peer_of(name).save_pretrained(tmp_path)
  expected = interop.diffusers.load_network(tmp_path)
  config = json.loads((tmp_path / "config.json").read_text())
  old = {"_class_name": "Transformer2DModel", "num_vector_embeds": None, "double_self_attention": False}
  (tmp_path / "config.json").write_text(json.dumps(config | old))
  weights = tmp_path / "diffusion_pytorch_model.safetensors"
  state = safetensors.torch.load_file(weights) | {"caption_projection.y_embedding": torch.ones(TOKENS, 10)}
  safetensors.torch.save_file(state, weights, {"format": "pt"})
  network, params = interop.diffusers.load_network(tmp_path)
  assert network == expected[0]
  jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), params, expected[1])
  again = PixArtTransformer2DModel.from_pretrained(tmp_path).eval()
  np.testing.assert_array_equal(*(run_peer(peer, inputs_of(name))["output"] for peer in (peer_of(name), again)))


def test_weights_that_do_not_match_are_described(tmp_path):
  peer = peer_of("alpha, 512")
  peer.save_pretrained(tmp_path)
  config = json.loads((tmp_path / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(config | {"use_additional_conditions": True}))
  with pytest.raises(ValueError, match=r"8 missing: adaln_single\.emb\.aspect_ratio_embedder\.linear_1\.bias"):
    interop.diffusers.load_network(tmp_path)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"frequency_shift": 1.0}, r"frequency_shift=1\.0; expected 0"),
    ({"size_features": 8}, "size_features=8; expected 0 or 256"),
  ],
)
def test_networks_that_cannot_be_saved_are_errors(options, message, tmp_path):
  network = PixArt(channels=24, layers=2, heads=2, context_features=10, **options)
  params = random_like(pixart.template(network, 4))
  with pytest.raises(ValueError, match=message):
    interop.diffusers.save_network(tmp_path, network, params)
