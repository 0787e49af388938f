"""Compare our outputs for checkpoints of guided-diffusion with outputs of the original code."""

import warnings

import jax
import numpy as np
import pytest
import safetensors.torch
import torch

from ddpm_jax import interop, predictions, processes, schedules

with warnings.catch_warnings():
  # guided_diffusion uses decorators that PyTorch has deprecated.
  warnings.simplefilter("ignore")
  from guided_diffusion import gaussian_diffusion
  from guided_diffusion.unet import EncoderUNetModel, SuperResModel, UNetModel

SMALL = {
  "image_size": 16,
  "in_channels": 3,
  "model_channels": 32,
  "out_channels": 3,
  "num_res_blocks": 1,
  "attention_resolutions": (2,),
  "channel_mult": (1, 2),
}
SHAPE = (16, 16, 3)
ADM = {"use_scale_shift_norm": True, "resblock_updown": True, "num_head_channels": 16, "out_channels": 6}
UNETS = {
  "improved": ({"num_heads": 4, "num_res_blocks": 2}, {"heads": 4}),
  "improved, learned variance": (
    {"num_heads": 2, "out_channels": 6, "use_scale_shift_norm": True, "channel_mult": (1, 1, 2)},
    {"heads": 2},
  ),
  "adm": (ADM | {"channel_mult": (1, 2, 3), "attention_resolutions": (2, 4)}, {"head_channels": 16}),
  "adm, class-conditional, new order": (
    ADM | {"num_classes": 7, "use_new_attention_order": True, "attention_resolutions": (1, 2)},
    {"head_channels": 16, "new_attention_order": True},
  ),
  "adm 512: first level halved": (
    ADM | {"model_channels": 64, "channel_mult": (0.5, 1, 1), "attention_resolutions": (4,)},
    {"head_channels": 16},
  ),
  "audio": (ADM | {"dims": 1, "channel_mult": (1, 2, 2), "attention_resolutions": (4,)}, {"head_channels": 16}),
  "audio, by convolutions": ({"dims": 1, "num_heads": 2}, {"heads": 2}),
  "volumes, one level": (
    {"dims": 3, "num_heads": 2, "channel_mult": (1,), "attention_resolutions": (1,)},
    {"heads": 2},
  ),
  "no attention but the middle's": ({"attention_resolutions": (), "num_heads": 1}, {"heads": 1}),
}
CLASSIFIERS = {
  "by residual blocks": ({"resblock_updown": True, "channel_mult": (1, 2, 2), "num_res_blocks": 2}, {"blocks": 2}),
  "by convolutions": ({"channel_mult": (1, 2, 3), "attention_resolutions": (2, 4)}, {}),
  "new order": ({"use_new_attention_order": True}, {"new_attention_order": True}),
}


def randomize(model):
  """Perturb every parameter, because new models have zeros in their last layers."""
  torch.manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  return model.eval()


SIZES = {1: (16,), 2: (16, 16), 3: (4, 6, 5)}


def assert_same_output(peer, ours, params, **batch):
  """Assert that `peer` and our network have equal outputs for the conditions in `batch`.

  The possible names of conditions are `classes` and `low_resolution`.
  """
  x = np.random.default_rng(1).standard_normal((3, *ours.shape)).astype(np.float32)
  t = np.array([0.0, 333.0, 998.5], np.float32)
  names = {"classes": "y", "low_resolution": "low_res"}
  peer_conditions = {
    names[name]: torch.tensor(np.moveaxis(value, -1, 1) if value.ndim > 1 else value) for name, value in batch.items()
  }
  conditions = ours.encode_conditions(jax.random.split(jax.random.key(0), 3), batch)
  with torch.no_grad():
    expected = peer(torch.tensor(np.moveaxis(x, -1, 1)), torch.tensor(t), **peer_conditions).numpy()
  actual = jax.jit(lambda params: ours.network.apply(params, x, t, conditions))(params)
  expected = np.moveaxis(expected, 1, -1) if expected.ndim > 2 else expected
  assert np.std(expected) > 1e-3
  np.testing.assert_allclose(actual, expected, atol=1e-4 * np.std(expected), rtol=0)


@pytest.mark.parametrize("name", UNETS)
def test_the_unet_matches_the_peer(name, tmp_path):
  changes, options = UNETS[name]
  model = randomize(UNetModel(**(SMALL | changes)))
  torch.save(model.state_dict(), tmp_path / "model.pt")
  shape = (*SIZES[changes.get("dims", 2)], 3)
  ours, params = interop.guided_diffusion.load(tmp_path / "model.pt", shape=shape, **options)
  assert (ours.shape, ours.data_shape, ours.prediction.learned_variance) == (
    shape,
    shape,
    changes.get("out_channels", 3) == 6,
  )
  assert_same_output(model, ours, params, **({"classes": np.array([0, 6, 3])} if "num_classes" in changes else {}))


def test_parameters_that_require_gradients_are_read(tmp_path):
  """guided-diffusion's trainer saves averaged weights as parameters that require gradients."""
  model = UNetModel(**SMALL)
  torch.save(dict(model.named_parameters()), tmp_path / "ema.pt")
  _, params = interop.guided_diffusion.load(tmp_path / "ema.pt", shape=SHAPE, heads=1)
  np.testing.assert_array_equal(params["conv_in"]["bias"], model.input_blocks[0][0].bias.detach().numpy())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_network_is_found_behind_its_prefix(suffix, tmp_path):
  """DistributedDataParallel and torch.compile add a prefix to parameter names, and trainers also save other values."""
  model = UNetModel(**SMALL)
  state = {f"module._orig_mod.{name}": value for name, value in model.state_dict().items()} | {"step": torch.ones(1)}
  path = tmp_path / f"model{suffix}"
  if suffix == ".pt":
    torch.save({"state_dict": state, "epoch": 3}, path)
  else:
    safetensors.torch.save_file(state, path)
  _, params = interop.guided_diffusion.load(path, shape=SHAPE, heads=1)
  np.testing.assert_array_equal(params["conv_in"]["bias"], model.input_blocks[0][0].bias.detach().numpy())


def test_super_resolution_takes_a_small_image(tmp_path):
  model = randomize(SuperResModel(**(SMALL | ADM)))
  safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
  path, small = (
    tmp_path / "model.safetensors",
    np.random.default_rng(2).standard_normal((3, 4, 4, 3)).astype(np.float32),
  )
  ours, params = interop.guided_diffusion.load(path, shape=SHAPE, head_channels=16)
  # The peer enlarges the image inside the model.
  assert_same_output(model, ours, params, low_resolution=small)
  with pytest.raises(ValueError, match="factor=5"):
    interop.guided_diffusion.load(path, shape=SHAPE, head_channels=16, factor=5)
  wide = {"out.2.weight": torch.zeros(8, *model.out[2].weight.shape[1:]), "out.2.bias": torch.zeros(8)}
  torch.save(model.state_dict() | wide, tmp_path / "other.pt")
  with pytest.raises(ValueError, match="takes 2 input channels in addition to the 4"):
    interop.guided_diffusion.load(tmp_path / "other.pt", shape=(16, 16, 4), head_channels=16)


TRAINED = {
  # The shape, our options, and the peer's schedule, number of steps and rescale_timesteps.
  "default, small": ((16, 16, 3), {}, ("cosine", 1000, False)),
  "default, large": ((72, 4, 3), {}, ("linear", 1000, False)),
  "4000 steps": (
    (16, 16, 3),
    {"process": processes.discrete(schedules.cosine(4000)), "rescale_timesteps": True},
    ("cosine", 4000, True),
  ),
}


@pytest.mark.parametrize("name", TRAINED)
def test_the_process_matches_the_peer(name, tmp_path):
  """The alphas, the time inputs, and the mean and variance of a reverse step match guided-diffusion's own code."""
  shape, options, (schedule, steps, rescaled) = TRAINED[name]
  peer = randomize(UNetModel(**(SMALL | ADM)))
  torch.save(peer.state_dict(), tmp_path / "model.pt")
  model, params = interop.guided_diffusion.load(tmp_path / "model.pt", shape=shape, head_channels=16, **options)
  peer_process = gaussian_diffusion.GaussianDiffusion(
    betas=gaussian_diffusion.get_named_beta_schedule(schedule, steps),
    model_mean_type=gaussian_diffusion.ModelMeanType.EPSILON,
    model_var_type=gaussian_diffusion.ModelVarType.LEARNED_RANGE,
    loss_type=gaussian_diffusion.LossType.RESCALED_MSE,
    rescale_timesteps=rescaled,
  )
  step = np.arange(1, steps + 1)
  t = (step / steps).astype(np.float32)
  np.testing.assert_allclose(model.process.alpha(t), peer_process.sqrt_alphas_cumprod, rtol=1e-4, atol=1e-6)
  time = (model.time_input or model.process.time_input)(t)
  np.testing.assert_allclose(time, peer_process._scale_timesteps(torch.tensor(step - 1)).numpy(), rtol=1e-5, atol=1e-3)
  # guided-diffusion's scripts sample with clipping.
  x, n = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32), steps // 2
  with torch.no_grad():
    out = peer_process.p_mean_variance(
      peer, torch.tensor(np.moveaxis(x, -1, 1)), torch.full((2,), n - 1), clip_denoised=True
    )
  estimate = jax.jit(model.denoise(params))(x, n / steps)
  expected = np.moveaxis(out["pred_xstart"].numpy(), 1, -1)
  np.testing.assert_allclose(estimate.x_0, expected, atol=2e-4)
  low, high = peer_process.posterior_log_variance_clipped[n - 1], np.log(peer_process.betas)[n - 1]
  fraction = (np.moveaxis(out["log_variance"].numpy(), 1, -1) - low) / (high - low)
  np.testing.assert_allclose(estimate.fraction, fraction, atol=2e-2)
  assert (model.defaults.name, model.defaults.steps) == ("ancestral", 250)
  times = model.times(250)
  assert (len(times), times[0], times[-1]) == (251, 1, 0)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_classifier_matches_the_peer(name, tmp_path):
  changes, options = CLASSIFIERS[name]
  options = {"head_channels": 16} | options
  config = SMALL | {"use_scale_shift_norm": True, "num_head_channels": 16, "pool": "attention", "out_channels": 10}
  model = randomize(EncoderUNetModel(**(config | changes)))
  torch.save(model.state_dict(), tmp_path / "model.pt")
  ours, params = interop.guided_diffusion.load_classifier(tmp_path / "model.pt", **options)
  assert ours.shape == SHAPE
  assert_same_output(model, ours, params)
  if name != "new order":
    return
  # Guidance needs log-probabilities at a time of the process.
  x = np.random.default_rng(1).standard_normal((3, *SHAPE)).astype(np.float32)
  with torch.no_grad():
    logits = model(torch.tensor(np.moveaxis(x, -1, 1)), torch.full((3,), 499.0))
  log_probs = jax.jit(ours.classify(params))(x, 0.5)
  np.testing.assert_allclose(log_probs, torch.log_softmax(logits, -1).numpy(), atol=1e-3)


def test_networks_have_the_published_sizes():
  """The numbers of parameters match Dhariwal and Nichol 2021, table 12.

  The numbers are 296M, 422M, 554M and 559M for images of 64, 128, 256 and 512 pixels.
  """
  adm = {
    "in_channels": 3,
    "out_channels": 6,
    "num_head_channels": 64,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
  }
  table = {
    64: (296, {"model_channels": 192, "num_res_blocks": 3, "channel_mult": (1, 2, 3, 4)}),
    128: (422, {"model_channels": 256, "num_res_blocks": 2, "channel_mult": (1, 1, 2, 3, 4)}),
    256: (554, {"model_channels": 256, "num_res_blocks": 2, "channel_mult": (1, 1, 2, 2, 4, 4)}),
    512: (559, {"model_channels": 256, "num_res_blocks": 2, "channel_mult": (0.5, 1, 1, 2, 2, 4, 4)}),
  }
  for size, (millions, changes) in table.items():
    with torch.device("meta"):
      model = UNetModel(
        image_size=size,
        attention_resolutions=[size // side for side in (32, 16, 8)],
        num_classes=1000,
        **adm,
        **changes,
      )
    state = model.state_dict()
    file = interop.tensors.TensorFile.__new__(interop.tensors.TensorFile)
    file.path, file.shapes = f"{size}.pt", {name: tuple(value.shape) for name, value in state.items()}
    network, template = interop.guided_diffusion.infer_network(file, head_channels=64)
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(template))
    assert count == sum(value.numel() for value in state.values())
    assert round(count / 1e6) == millions, network


def test_missing_or_wrong_options_are_errors(tmp_path):
  torch.save(UNetModel(**SMALL).state_dict(), tmp_path / "model.pt")
  path = tmp_path / "model.pt"
  with pytest.raises(ValueError, match="expected one of them: head_channels=64"):
    interop.guided_diffusion.load(path)
  for options, message in (
    ({"head_channels": 64}, "expected one of them"),
    ({}, r"does not contain the image size; pass shape=, such as shape=\(64, 64, 3\)"),
    (
      {"shape": (16, 16, 1)},
      r"shape=\(16, 16, 1\) for .*out_channels=3; expected 2 spatial axes and a last axis of 3 channels",
    ),
    ({"shape": (15, 15, 3)}, "divisible by 2"),
    (
      {"shape": SHAPE, "prediction": predictions.learned_range(predictions.EPS)},
      "with a learned variance for a network without",
    ),
    ({"shape": SHAPE, "process": processes.vp(), "rescale_timesteps": True}, "expected a discrete process"),
  ):
    with pytest.raises(ValueError, match=message):
      interop.guided_diffusion.load(path, heads=4, **options)
  model, _ = interop.guided_diffusion.load(path, heads=4, shape=SHAPE, process=processes.vp(), prediction=predictions.V)
  assert model.prediction == predictions.V
  assert model.process.num_steps is None
  config = SMALL | {"pool": "attention", "num_head_channels": 16, "resblock_updown": True, "attention_resolutions": ()}
  torch.save(EncoderUNetModel(**(config | {"channel_mult": (1, 1, 1)})).state_dict(), tmp_path / "classifier.pt")
  with pytest.raises(ValueError, match="Pass one of them as blocks="):
    interop.guided_diffusion.load_classifier(tmp_path / "classifier.pt", head_channels=16)


def test_other_files_are_errors(tmp_path):
  torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
  with pytest.raises(ValueError, match="a state dict of a model of improved-diffusion"):
    interop.guided_diffusion.load(tmp_path / "other.pt", heads=1)
  torch.save(UNetModel(**SMALL).state_dict(), tmp_path / "unet.pt")
  with pytest.raises(ValueError, match="classifier_pool attention"):
    interop.guided_diffusion.load_classifier(tmp_path / "unet.pt")
  with pytest.raises(ValueError, match="does not exist"):
    interop.guided_diffusion.load(tmp_path / "none.pt", heads=1)
  (tmp_path / "a.onnx").write_text("")
  with pytest.raises(ValueError, match=r"ending in \.safetensors"):
    interop.guided_diffusion.load(tmp_path / "a.onnx", heads=1)
  state = UNetModel(**SMALL).state_dict()
  state.pop("out.2.bias")
  torch.save(state, tmp_path / "model.pt")
  with pytest.raises(ValueError, match=r"1 missing: out\.2\.bias"):
    interop.guided_diffusion.load(tmp_path / "model.pt", shape=SHAPE, heads=1)
