"""Compare our DiT with diffusers' and with the formulas of the original code, and test its files."""

import argparse
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from flax import traverse_util
from torch.nn import functional as F

from ddpm_jax import interop, processes
from ddpm_jax.interop import dit, dit_checkpoints, network_folders, tensors
from ddpm_jax.networks import DiT, loops
from ddpm_jax.networks.patches import position_table
from tests.test_interop_files import try_wrong_values

SMALL = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "num_embeds_ada_norm": 5}
CONFIGS = {
  "256, learned variance": SMALL | {"sample_size": 8, "out_channels": 8},
  "larger patches and another epsilon": SMALL | {"sample_size": 8, "patch_size": 4, "in_channels": 3, "norm_eps": 0.1},
}
BATCH = 3


def random_peer(changes, seed=0):
  """Return a `DiTTransformer2DModel` with random parameters, and with equal embedders in all blocks."""
  torch.manual_seed(seed)
  peer = DiTTransformer2DModel(**changes).eval()
  with torch.no_grad():
    for parameter in peer.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  for block in peer.transformer_blocks[1:]:
    block.norm1.emb.load_state_dict(peer.transformer_blocks[0].norm1.emb.state_dict())
  return peer


@functools.cache
def peer_of(name):
  """Return the model of CONFIGS[name] in diffusers. All tests share it and must not change it."""
  return random_peer(CONFIGS[name])


def inputs_of(channels, sides=(8, 8), out_channels=None, seed=1):
  """Return x, times, classes and a weight for each value of the output."""
  rng = np.random.default_rng(seed)
  x, weight = (rng.standard_normal((BATCH, *sides, c)).astype(np.float32) for c in (channels, out_channels or channels))
  return x, np.array([3.0, 977.0, 500.0], np.float32), np.array([0, 5, 2], np.int32), weight


def to_torch(x):
  return torch.tensor(np.moveaxis(np.asarray(x), -1, 1))


def from_torch(x):
  return np.moveaxis(x.detach().numpy(), 1, -1)


def values_of_peer(function, x, time, classes, weight):
  """Return the output of a function of tensors, and the gradient of sum(output * weight) with respect to x."""
  x = to_torch(x).requires_grad_()
  output = function(x, torch.tensor(time), torch.tensor(classes).long())
  (output * to_torch(weight)).sum().backward()
  return from_torch(output), from_torch(x.grad)


def values_of(network, params, x, time, classes, weight):
  """Return the same values as `values_of_peer` for our network."""

  def loss(x, params):
    output = network.apply({"params": params}, x, time, classes=classes)
    return jnp.sum(output * weight), output

  gradient, output = jax.jit(jax.grad(loss, has_aux=True))(x, params)
  return output, gradient


def assert_close(ours, theirs):
  """Assert that arrays differ by at most 1e-4 of their scale."""
  for value, expected in zip(ours, theirs, strict=True):
    assert value.shape == expected.shape
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-4 * np.std(expected))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("class_name", ["DiTTransformer2DModel", "Transformer2DModel"])
def test_outputs_and_input_gradients_match_diffusers(name, class_name, tmp_path):
  peer = peer_of(name)
  peer.save_pretrained(tmp_path)
  rename(tmp_path, class_name)
  network, params = interop.diffusers.load_network(tmp_path)
  inputs = inputs_of(peer.config.in_channels, out_channels=network.out_channels)
  theirs = values_of_peer(lambda x, t, y: peer(x, t, y).sample, *inputs)
  assert_close(values_of(network, params, *inputs), theirs)


def rename(folder, class_name):
  """Write the config of a folder with another name of the class, as old versions of diffusers did."""
  config = json.loads((folder / "config.json").read_text()) | {"_class_name": class_name}
  if class_name != "DiTTransformer2DModel":
    config |= {"attention_type": "default", "cross_attention_dim": None, "num_vector_embeds": None}
  (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("scan", [False, True])
def test_saved_folders_are_the_files_of_diffusers(scan, tmp_path):
  peer = peer_of("256, learned variance")
  peer.save_pretrained(tmp_path / "theirs")
  network, params = interop.diffusers.load_network(tmp_path / "theirs")
  if scan:
    network, params = network.clone(scan=True), loops.stack(network, params)
  network_folders.save_network(tmp_path / "ours", network, params, (8, 8))
  again = DiTTransformer2DModel.from_pretrained(tmp_path / "ours")
  assert {k: v for k, v in again.config.items() if k[0] != "_"} == {k: v for k, v in peer.config.items() if k[0] != "_"}
  for name, value in peer.state_dict().items():
    torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)
  if scan:
    loaded = network_folders.load_params(tmp_path / "ours", network, 4)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_different_embedders_in_the_blocks_are_an_error(tmp_path):
  """Each block of diffusers uses its own copy, and our network has one."""
  peer = random_peer(CONFIGS["256, learned variance"])
  with torch.no_grad():
    peer.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight[2, 3] += 0.5
  peer.save_pretrained(tmp_path)
  with pytest.raises(ValueError, match=r"different values of transformer_blocks\.\{\}\.norm1\.emb\.class_embedder"):
    interop.diffusers.load_network(tmp_path)


@functools.cache
def published():
  """Return our network of DiT-XL/2, the shapes of its parameters, and the shapes of diffusers' tensors."""
  with torch.device("meta"):
    peer = DiTTransformer2DModel(out_channels=8)
  network = dit.from_config(peer.config)
  return network, dit.template(network, 4), {key: tuple(value.shape) for key, value in peer.state_dict().items()}


def test_the_published_network_has_the_names_shapes_and_count_of_the_peers():
  network, template, expected = published()
  layout = dit.layout(network)
  flat = tensors.flatten(template)
  shapes = {name: layout.shape_of(path, leaf.shape) for path, leaf in flat.items() for name in layout.names_of(path)}
  assert shapes == expected
  assert sum(math.prod(shape) for shape in shapes.values()) == 749_826_464
  assert sum(leaf.size for leaf in flat.values()) == 674_834_720
  # The file of the original code also has the table of positions.
  original = dit_checkpoints._layout(network)
  sizes = {original.name_of(path): original.shape_of(path, leaf.shape) for path, leaf in flat.items()}
  assert sum(math.prod(shape) for shape in sizes.values()) + 16 * 16 * 1152 == 675_129_632


def test_the_defaults_are_those_of_the_class():
  with torch.device("meta"):
    config = DiTTransformer2DModel(num_layers=1).config
  assert {key: value for key, value in config.items() if key[0] != "_"} == dit.DEFAULTS | {"num_layers": 1}


def test_wrong_values_in_configs_are_errors_that_name_the_key(tmp_path):
  peer_of("256, learned variance").save_pretrained(tmp_path)
  accepted = {}
  for key, value, message in try_wrong_values(tmp_path, "config.json", lambda: network_folders.read_network(tmp_path)):
    if message is None:
      accepted.setdefault(key, []).append(value)
    else:
      assert "config.json" in message, (key, value, message)
  allowed = {"out_channels": [None], "upcast_attention": [True, None], "attention_bias": [True]}
  # These two have no effect.
  assert {k: v for k, v in accepted.items() if k not in ("norm_num_groups", "_class_name")} == allowed


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"norm_type": "ada_norm_single"}, "norm_type='ada_norm_single'"),
    ({"activation_fn": "geglu"}, "activation_fn='geglu'"),
    ({"sample_size": 9}, "9 x 9 for patches of side 2"),
    ({"num_layers": 0}, "num_layers=0; expected at least 1"),
    ({"caption_channels": 4096}, "caption_channels=4096"),
    ({"_class_name": "UNet2DModel"}, "class UNet2DModel"),
  ],
)
def test_unsupported_configs_are_errors(changes, message):
  with pytest.raises(ValueError, match=message):
    dit.from_config(SMALL | changes)


@pytest.mark.parametrize(
  ("changes", "size", "message"),
  [
    ({"frequency_shift": 0.0}, (8, 8), "frequency_shift=0.0; expected frequency_shift=1.0"),
    ({"positions": "rotary"}, (8, 8), "positions='rotary'"),
    ({"num_classes": 0}, (8, 8), "num_classes=0"),
    ({}, (8, 4), "size of 8 x 4"),
    ({}, None, "Got no size"),
  ],
)
def test_networks_that_diffusers_cannot_represent_are_errors(changes, size, message):
  network = dit.from_config(SMALL).clone(**changes)
  with pytest.raises(ValueError, match=message):
    dit.to_config(network, dit.template(network, 4), size)


def original(state, x, time, classes, *, heads, epsilon=1e-6):
  """Compute a DiT from the equations of Peebles and Xie (2023, sections 3.1 and 3.2), with the names of their files."""

  def linear(x, name):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

  def norm(x):
    centered = x - x.mean(-1, keepdim=True)
    return centered / torch.sqrt((centered**2).mean(-1, keepdim=True) + epsilon)

  def modulate(x, shift, scale):
    return norm(x) * (1 + scale[:, None]) + shift[:, None]

  weight = state["x_embedder.proj.weight"]
  patch, (batch, _, height, width) = weight.shape[-1], x.shape
  h = F.conv2d(x, weight, state["x_embedder.proj.bias"], stride=patch).flatten(2).transpose(1, 2) + state["pos_embed"]
  angles = time[:, None] * torch.exp(-math.log(10000) / 128 * torch.arange(128, dtype=torch.float32))
  waves = torch.cat([angles.cos(), angles.sin()], -1)
  c = linear(F.silu(linear(waves, "t_embedder.mlp.0")), "t_embedder.mlp.2")
  c = F.silu(c + state["y_embedder.embedding_table.weight"][classes])
  for index in range(1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))):
    block = f"blocks.{index}"
    b1, a1, g1, b2, a2, g2 = linear(c, f"{block}.adaLN_modulation.1").chunk(6, -1)
    joint = linear(modulate(h, b1, a1), f"{block}.attn.qkv")
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in joint.chunk(3, -1))
    weights = torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, -1)
    h = h + g1[:, None] * linear((weights @ v).transpose(1, 2).flatten(2), f"{block}.attn.proj")
    hidden = F.gelu(linear(modulate(h, b2, a2), f"{block}.mlp.fc1"), approximate="tanh")
    h = h + g2[:, None] * linear(hidden, f"{block}.mlp.fc2")
  h = linear(modulate(h, *linear(c, "final_layer.adaLN_modulation.1").chunk(2, -1)), "final_layer.linear")
  pixels = h.reshape(batch, height // patch, width // patch, patch, patch, -1)
  return pixels.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, width)


FEATURES, HEADS = 16, 2


@functools.cache
def random_state(sides=(8, 8), out_channels=8, seed=0):
  """Return random tensors with the names and shapes of the original code, for x of 4 channels and patches of 2."""
  shapes = {
    "x_embedder.proj": (FEATURES, 4, 2, 2),
    "t_embedder.mlp.0": (FEATURES, 256),
    "t_embedder.mlp.2": (FEATURES, FEATURES),
    "final_layer.linear": (4 * out_channels, FEATURES),
    "final_layer.adaLN_modulation.1": (2 * FEATURES, FEATURES),
  }
  for index in range(2):
    shapes |= {
      f"blocks.{index}.attn.qkv": (3 * FEATURES, FEATURES),
      f"blocks.{index}.attn.proj": (FEATURES, FEATURES),
      f"blocks.{index}.mlp.fc1": (4 * FEATURES, FEATURES),
      f"blocks.{index}.mlp.fc2": (FEATURES, 4 * FEATURES),
      f"blocks.{index}.adaLN_modulation.1": (6 * FEATURES, FEATURES),
    }
  torch.manual_seed(seed)
  state = {f"{name}.weight": 0.2 * torch.randn(shape) for name, shape in shapes.items()}
  state |= {f"{name}.bias": 0.2 * torch.randn(shape[0]) for name, shape in shapes.items()}
  # Libraries round the frequencies differently, which changes the sines of times near 1000 by up to 6e-5. Larger
  # weights would amplify this difference.
  state["t_embedder.mlp.0.weight"] *= 0.2
  state["y_embedder.embedding_table.weight"] = torch.randn(6, FEATURES)
  return state | {"pos_embed": torch.tensor(positions(sides))[None]}


def positions(sides):
  """Return the table of positions: the sines and cosines of the column, then of the row."""
  rows, columns = np.divmod(np.arange(math.prod(side // 2 for side in sides)), sides[1] // 2)
  frequencies = 10000.0 ** (-np.arange(FEATURES // 4) / (FEATURES // 4))
  angles = [np.outer(index, frequencies) for index in (columns, rows)]
  return np.concatenate([wave(a) for a in angles for wave in (np.sin, np.cos)], 1).astype(np.float32)


def write(path, content):
  torch.save(content, path)
  return path


@pytest.mark.parametrize(("sides", "scan"), [((8, 8), True), ((4, 12), False)])
def test_a_checkpoint_of_dit_computes_the_original_function(sides, scan, tmp_path):
  state = random_state(sides)
  path = write(tmp_path / "model.pt", state)
  shape = None if sides[0] == sides[1] else (*sides, 4)
  model, params = dit_checkpoints.load_dit(path, heads=HEADS, shape=shape, scan=scan)
  assert model.shape == model.data_shape == (*sides, 4)
  assert model.conditions["classes"].num_choices == 5
  inputs = inputs_of(4, sides, out_channels=8)
  theirs = values_of_peer(lambda x, t, y: original(state, x, t, y, heads=HEADS), *inputs)
  assert_close(values_of(model.network.module, params, *inputs), theirs)
  # The network of step n of the process gets n - 1, and half of its output is eps.
  x, _, classes, _ = inputs
  t = jnp.full(BATCH, 0.5)
  eps = from_torch(original(state, to_torch(x), torch.full((BATCH,), 499.0), torch.tensor(classes).long(), heads=HEADS))
  mean = (x - model.process.sigma(0.5) * eps[..., :4]) / model.process.alpha(0.5)
  estimate = jax.jit(lambda params: model.denoise(params, {"classes": classes})(x, t))(params)
  np.testing.assert_allclose(estimate.x_0, mean, atol=1e-4 * np.std(mean))


def test_the_differences_between_the_original_and_diffusers_are_options():
  """The frequencies and the constant before feed-forward layers differ. The other constants are the same."""
  state, inputs = random_state(), inputs_of(4, out_channels=8)
  network = DiT(channels=FEATURES, layers=2, heads=HEADS, num_classes=6)
  layout = dit_checkpoints._layout(network)
  paths = tensors.flatten(dit.template(network, 4))
  flat = {path: layout.from_file(path, state[layout.name_of(path)].numpy()) for path in paths}
  params = traverse_util.unflatten_dict(flat, sep="/")
  config = SMALL | {"sample_size": 8, "out_channels": 8, "norm_eps": 0.1}
  peer, theirs = DiTTransformer2DModel(**config), dit.layout(network)
  names = {name: path for path in paths for name in theirs.names_of(path)}
  peer.load_state_dict({name: torch.tensor(tensors.to_torch(path, flat[path])) for name, path in names.items()})
  values = {
    "original": values_of_peer(lambda x, t, y: original(state, x, t, y, heads=HEADS), *inputs),
    "another epsilon": values_of_peer(lambda x, t, y: original(state, x, t, y, heads=HEADS, epsilon=0.1), *inputs),
    "diffusers": values_of_peer(lambda x, t, y: peer(x, t, y).sample, *inputs),
  }
  options = {
    "original": {},
    "another epsilon": {"epsilon": 0.1},
    "diffusers": {"frequency_shift": 1.0, "mlp_epsilon": 0.1},
  }
  for name, changes in options.items():
    assert_close(values_of(network.clone(**changes), params, *inputs), values[name])
  for name in ("another epsilon", "diffusers"):
    assert np.max(np.abs(values[name][0] - values["original"][0])) > 0.01


def test_a_codec_belongs_to_a_checkpoint(tmp_path):
  """The autoencoder determines the shape of the images, and must have the latents that the network denoises."""
  path = write(tmp_path / "model.pt", random_state())
  options = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
  options |= {
    f"{way}_block_types": (f"{way.title()}{kind}Block2D",) * 2 for way, kind in (("down", "Encoder"), ("up", "Decoder"))
  }
  for channels in (4, 3):
    AutoencoderKL(**options, latent_channels=channels).save_pretrained(tmp_path / str(channels))
  load = functools.partial(dit_checkpoints.load_sit, path, time_direction="data_at_1", time_scale=1.0, heads=HEADS)
  model, _ = load(codec=tmp_path / "4")
  assert (model.shape, model.data_shape) == ((8, 8, 4), (16, 16, 3))
  assert model.codec.shape(model.data_shape) == model.shape
  with pytest.raises(ValueError, match="latent_channels=3, for a network of 4 input channels"):
    load(codec=tmp_path / "3")


@pytest.mark.parametrize("wrapper", ["ema", "model", "state_dict", "training"])
def test_wrapped_checkpoints_are_read_and_the_average_is_preferred(wrapper, tmp_path):
  state, other = random_state(), random_state(seed=1)
  content = {wrapper: state}
  if wrapper == "training":
    flags = argparse.Namespace(model="DiT-XL/2", epochs=1400)
    content = {"model": other, "ema": state, "opt": {"state": {0: {"step": 3}}}, "args": flags}
  path = write(tmp_path / "model.pt", content)
  _, params = dit_checkpoints.load_dit(path, heads=HEADS)
  np.testing.assert_array_equal(params["classes"]["embedding"], state["y_embedder.embedding_table.weight"])


def test_the_projectors_of_repa_are_ignored(tmp_path):
  state = random_state()
  path = write(tmp_path / "model.pt", {"ema": state | {"projectors.0.0.weight": torch.ones(2, 2)}})
  _, params = dit_checkpoints.load_sit(path, heads=HEADS, time_direction="noise_at_1", time_scale=1.0)
  np.testing.assert_array_equal(params["classes"]["embedding"], state["y_embedder.embedding_table.weight"])


@pytest.mark.parametrize("direction", ["data_at_1", "noise_at_1"])
@pytest.mark.parametrize(("scale", "make"), [(1.0, processes.rectified_flow), (1000.0, processes.gvp)])
def test_a_checkpoint_of_sit_is_a_velocity_of_our_times(direction, scale, make, tmp_path):
  """The checkpoint's velocity is the derivative of the path in its own time, and half of its output is dropped."""
  state, process = random_state(), make()
  path = write(tmp_path / "model.pt", {"ema": state})
  model, params = dit_checkpoints.load_sit(
    path, heads=HEADS, time_direction=direction, time_scale=scale, process=process
  )
  assert model.network.module.out_channels == 4
  x, _, classes, _ = inputs_of(4)
  t = np.array([0.1, 0.5, 0.9], np.float32)
  time = scale * (1 - t if direction == "data_at_1" else t)
  velocity = from_torch(original(state, to_torch(x), torch.tensor(time), torch.tensor(classes).long(), heads=HEADS))
  # The path is alpha x_0 + sigma eps, and x_t and its velocity determine x_0.
  slope = velocity[..., :4] * (-1 if direction == "data_at_1" else 1)
  alpha, sigma, alpha_slope, sigma_slope = (value[:, None, None, None] for value in path_of(make, t))
  expected = (sigma_slope * x - sigma * slope) / (alpha * sigma_slope - alpha_slope * sigma)
  estimate = jax.jit(lambda params: model.denoise(params, {"classes": classes})(x, t))(params)
  np.testing.assert_allclose(estimate, expected, atol=2e-4 * np.std(expected))


def path_of(make, t):
  """Return alpha, sigma and their derivatives with respect to t."""
  if make is processes.rectified_flow:
    return 1 - t, t, -np.ones_like(t), np.ones_like(t)
  angle, rate = np.pi * t / 2, np.pi / 2
  return np.cos(angle), np.sin(angle), -rate * np.sin(angle), rate * np.cos(angle)


def test_sit_without_learned_variance_is_read(tmp_path):
  state = random_state(out_channels=4)
  path = write(tmp_path / "model.pt", state)
  options = {"heads": HEADS, "time_scale": 1.0}
  _, ours = dit_checkpoints.load_sit(path, time_direction="noise_at_1", **options)
  _, reversed_ = dit_checkpoints.load_sit(path, time_direction="data_at_1", **options)
  np.testing.assert_array_equal(ours["proj_out"]["kernel"].T, state["final_layer.linear.weight"])
  np.testing.assert_array_equal(reversed_["proj_out"]["kernel"], -ours["proj_out"]["kernel"])
  np.testing.assert_array_equal(reversed_["proj_out"]["bias"], -ours["proj_out"]["bias"])
  np.testing.assert_array_equal(reversed_["modulation_out"]["bias"], ours["modulation_out"]["bias"])


def without(state, name):
  return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
  ("change", "options", "message"),
  [
    (lambda state: state, {"heads": None}, "expected heads="),
    (lambda state: state, {"heads": 3}, "multiple of heads"),
    (lambda state: state, {"shape": (8, 4, 4)}, r"pos_embed \(1, 16, 16\) is not the sine-cosine table"),
    (lambda state: state, {"shape": (7, 8, 4)}, "7 x 8 for patches of side 2"),
    (lambda state: state, {"shape": (8, 8, 3)}, r"expected \(H, W, 4\)"),
    (lambda state: without(state, "pos_embed"), {}, "pass shape="),
    (lambda state: state | {"pos_embed": state["pos_embed"] + 0.1}, {}, "Trained positions"),
    (lambda state: without(state, "blocks.1.attn.proj.bias"), {}, "1 missing: blocks.1.attn.proj.bias"),
    (lambda state: state | {"rope.freqs": torch.zeros(3)}, {}, "1 extra: rope.freqs"),
    (lambda state: without(state, "y_embedder.embedding_table.weight"), {}, "y_embedder"),
    (lambda state: without(state, "x_embedder.proj.weight"), {}, "state dict of a DiT"),
    (lambda state: random_state(out_channels=5), {}, "5 output channels"),
    (lambda state: state, {"codec": "no such folder"}, "no such folder"),
  ],
)
def test_other_checkpoints_and_arguments_are_errors(change, options, message, tmp_path):
  path = write(tmp_path / "model.pt", change(random_state()))
  with pytest.raises(ValueError, match=message):
    dit_checkpoints.load_dit(path, **({"heads": HEADS} | options))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"time_direction": "forward", "time_scale": 1.0}, "time_direction; expected one of data_at_1, noise_at_1"),
    ({"time_direction": "data_at_1", "time_scale": 0.0}, "time_scale=0.0"),
    (
      {"time_direction": "data_at_1", "time_scale": 1.0, "process": processes.discrete(np.full(10, 0.1))},
      "num_steps=10",
    ),
  ],
)
def test_wrong_arguments_of_sit_are_errors(options, message, tmp_path):
  path = write(tmp_path / "model.pt", random_state())
  with pytest.raises(ValueError, match=message):
    dit_checkpoints.load_sit(path, heads=HEADS, **options)
  with pytest.raises(TypeError, match="time_direction"):
    dit_checkpoints.load_sit(path, heads=HEADS, time_scale=1.0)


def test_our_table_of_positions_is_that_of_the_formula():
  np.testing.assert_allclose(position_table([range(2), range(6)], FEATURES), positions((4, 12)), atol=1e-6)


def test_the_average_under_a_wrapper_is_preferred(tmp_path):
  state, other = random_state(), random_state(seed=1)
  path = write(tmp_path / "model.pt", {"model": {"module": other}, "ema": {"module": state}})
  _, params = dit_checkpoints.load_dit(path, heads=HEADS)
  np.testing.assert_array_equal(params["classes"]["embedding"], state["y_embedder.embedding_table.weight"])
