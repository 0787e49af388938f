"""Compare flow matching schedulers with diffusers' FlowMatchEulerDiscreteScheduler: options, grids and samples."""

import inspect
import json

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

from ddpm_jax import predictions, processes, sampling
from ddpm_jax.interop import flow_schedulers, schedulers
from ddpm_jax.interop.scheduler_classes import FLOW
from tests.oracles import MIXTURE, network_of
from tests.peers import as_torch

# The options of each case, and the number of patches of the image.
CASES = {
  "default": ({}, 0),
  "stable diffusion 3": ({"shift": 3.0}, 4096),
  "other number of steps": ({"shift": 0.5, "num_train_timesteps": 500}, 0),
  "dynamic": ({"use_dynamic_shifting": True}, 1000),
  "dynamic and linear": ({"use_dynamic_shifting": True, "time_shift_type": "linear", "max_shift": 2.0}, 300),
  "terminal": ({"shift": 2.0, "shift_terminal": 0.1}, 0),
}


def peer_of(options, tokens, steps):
  """Return diffusers' scheduler with its times set, as in StableDiffusion3Pipeline."""
  peer = diffusers.FlowMatchEulerDiscreteScheduler(**options)
  c = peer.config
  limits = c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift
  peer.set_timesteps(steps, **({"mu": calculate_shift(tokens, *limits)} if c.use_dynamic_shifting else {}))
  return peer


def read(peer):
  return schedulers.from_config(json.loads(peer.to_json_string()))


def test_the_options_are_those_of_the_peer():
  signature = inspect.signature(diffusers.FlowMatchEulerDiscreteScheduler.__init__).parameters
  assert {key: one.default for key, one in signature.items() if key != "self"} == flow_schedulers.OPTIONS


@pytest.mark.parametrize("name", CASES)
def test_the_grid_and_the_time_inputs_match_the_peer(name):
  options, tokens = CASES[name]
  for steps in (2, 7, 28):
    peer = peer_of(options, tokens, steps)
    schedule = read(peer)
    process = schedule.make_process()
    times = schedule.defaults(process, tokens).times(steps)
    np.testing.assert_allclose(process.sigma(times), peer.sigmas, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(process.time_input(times[:-1]), peer.timesteps, rtol=1e-5)


def test_samples_match_the_peer():
  """The network is exact for a mixture of Gaussians."""
  peer = peer_of({"shift": 3.0}, 0, 10)
  schedule = read(peer)
  process, x = schedule.make_process(), np.random.default_rng(0).standard_normal((4, 2, 2)).astype(np.float32)
  defaults, exact = schedule.defaults(process), MIXTURE.denoise(process)
  times = defaults.times(10)
  run = jax.jit(lambda x: sampling.sample(jax.random.key(0), defaults.sampler, exact, x, times))
  network, state = as_torch(network_of(process, schedule.make_prediction(), exact)), torch.tensor(x)
  for timestep, t in zip(peer.timesteps, times[:-1], strict=True):
    state = peer.step(network(state, t), timestep, state, return_dict=False)[0]
  np.testing.assert_allclose(run(x), state.numpy(), atol=1e-4 * np.abs(state.numpy()).max())
  assert (defaults.name, defaults.steps, defaults.clip) == ("euler", 28, None)


def test_a_config_is_written_back_unless_the_model_changed():
  source = {"_class_name": FLOW, "shift": 3.0, "_diffusers_version": "0.30.0"}
  schedule = schedulers.from_config(source)
  process, velocity = schedule.make_process(), schedule.make_prediction()
  assert schedulers.to_config(process, velocity, clip=None, source=source) == source
  for changed in (processes.vp(), processes.rectified_flow()._replace(time_input=processes.as_time)):
    with pytest.raises(ValueError, match="another process or prediction"):
      schedulers.to_config(changed, velocity, clip=None, source=source)
  with pytest.raises(ValueError, match="another process or prediction"):
    schedulers.to_config(process, predictions.EPS, clip=None, source=source)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"invert_sigmas": True}, "invert_sigmas=True"),
    ({"stochastic_sampling": True}, "stochastic_sampling=True"),
    ({"use_karras_sigmas": True}, "use_karras_sigmas=True"),
    ({"use_beta_sigmas": True}, "use_beta_sigmas=True"),
    ({"time_shift_type": "cubic"}, "time_shift_type='cubic'"),
    ({"new_option": 1}, "new_option=1"),
    ({"shift": "3"}, "shift='3'; expected a finite number"),
    ({"shift": 0.0}, "shift=0.0; expected a number above 0"),
    ({"shift_terminal": 2.0}, "shift_terminal=2.0; expected a number from 0 to below 1"),
    ({"shift_terminal": -0.5}, "shift_terminal=-0.5; expected a number from 0 to below 1"),
    ({"num_train_timesteps": 1}, "num_train_timesteps=1; expected at least 2"),
    ({"max_image_seq_len": 256}, "expected the second to be larger"),
  ],
)
def test_unsupported_options_are_refused_by_name(options, message):
  with pytest.raises(ValueError, match=message):
    schedulers.from_config({"_class_name": FLOW, **options})


def test_a_shift_by_size_needs_the_number_of_patches():
  schedule = schedulers.from_config({"_class_name": FLOW, "use_dynamic_shifting": True})
  with pytest.raises(ValueError, match="use_dynamic_shifting=True for a network that does not split"):
    schedule.defaults(schedule.make_process())
