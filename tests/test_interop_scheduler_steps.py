"""Compare trajectories of our samplers with those of diffusers' schedulers, for the same scheduler configs.

The network is exact for data from a mixture of Gaussians. diffusers' schedulers (the peers) call the network through
NumPy. In the float64 tests, the peers also compute their tables in float64.
"""

import itertools
import json
import sys

import diffusers
import jax
import numpy as np
import pytest
import torch

from ddpm_jax import sampling
from ddpm_jax.interop import schedulers
from tests.oracles import MIXTURE, network_of
from tests.peers import SEED, Doubled, as_torch, noise, run_diffusers, start, states_of_heun_steps

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING = {"timestep_spacing": "trailing"}
SKIP = {"skip_prk_steps": True}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", **TRAILING}
PLAIN = {"clip_sample": False}
# Eager operations compile for each number of steps, so few cases have the usual 50.
ALL_STEPS = (1, 2, 5, 20)
# The name of the class without "Scheduler", the options, and the numbers of steps. The "linspace" grids of Euler and
# Heun need two steps. diffusers' DDIM and PNDM with K steps go from n to n - 1000 // K. On "trailing" grids, this is
# the next time of the grid only if K divides 1000. Below 15 steps, diffusers lowers the order of multistep rules in a
# last step that ends above 0.
CASES = {
  "pndm_of_sd_1": ("PNDM", SD | SKIP | {"steps_offset": 1}, (1, 2, 3, 4, 5, 50)),
  "pndm_to_0": ("PNDM", SKIP | {"set_alpha_to_one": True, "steps_offset": 1}, ALL_STEPS),
  "pndm_trailing": ("PNDM", SD | SKIP | TRAILING, ALL_STEPS),
  "pndm_without_offset": ("PNDM", SD | SKIP, ALL_STEPS[2:]),
  "ddim_of_sd_2": (
    "DDIM",
    SD | PLAIN | {"set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "v_prediction"},
    (1, 2, 5, 50),
  ),
  "ddim_without_offset": ("DDIM", SD | PLAIN | {"set_alpha_to_one": False}, ALL_STEPS[1:]),
  "ddim_zero_snr": ("DDIM", SD | PLAIN | ZERO_SNR, ALL_STEPS),
  "ddpm_offset": ("DDPM", PLAIN | {"steps_offset": 1}, (2, 20)),
  "euler_of_sdxl": ("EulerDiscrete", SD | LEADING, (1, 2, 5, 50)),
  "euler_linspace": ("EulerDiscrete", SD, (*ALL_STEPS[1:], 30)),
  "euler_trailing": ("EulerDiscrete", SD | TRAILING, ALL_STEPS),
  "euler_above_0": ("EulerDiscrete", SD | LEADING | {"final_sigmas_type": "sigma_min"}, ALL_STEPS),
  "euler_linspace_above_0": ("EulerDiscrete", {"final_sigmas_type": "sigma_min"}, ALL_STEPS[1:]),
  "euler_karras": ("EulerDiscrete", SD | LEADING | {"use_karras_sigmas": True}, ALL_STEPS[1:]),
  "euler_karras_above_0": (
    "EulerDiscrete",
    SD | LEADING | {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
    (5,),
  ),
  "euler_exponential": ("EulerDiscrete", SD | {"use_exponential_sigmas": True}, (5, 20)),
  "euler_zero_snr": ("EulerDiscrete", SD | ZERO_SNR, ALL_STEPS),
  "euler_sample": ("EulerDiscrete", LEADING | {"prediction_type": "sample"}, (5,)),
  "ancestral_linspace": ("EulerAncestralDiscrete", SD, ALL_STEPS[1:]),
  "ancestral_leading": ("EulerAncestralDiscrete", SD | LEADING, ALL_STEPS),
  "ancestral_zero_snr": ("EulerAncestralDiscrete", SD | ZERO_SNR, (5,)),
  "heun_linspace": ("HeunDiscrete", SD, ALL_STEPS[1:]),
  "heun_leading": ("HeunDiscrete", SD | LEADING, ALL_STEPS),
  "heun_karras": ("HeunDiscrete", SD | {"use_karras_sigmas": True}, (5,)),
  "heun_clipped": ("HeunDiscrete", SD | TRAILING | {"clip_sample": True, "clip_sample_range": 0.6}, (5, 20)),
  "dpmpp_2m_leading": ("DPMSolverMultistep", SD | LEADING, ALL_STEPS),
  "dpmpp_2m_linspace": ("DPMSolverMultistep", SD, ALL_STEPS),
  "dpmpp_2m_above_0": ("DPMSolverMultistep", SD | LEADING | {"final_sigmas_type": "sigma_min"}, (20,)),
  "dpmpp_2m_zero_snr": ("DPMSolverMultistep", SD | ZERO_SNR, ALL_STEPS),
  "dpmpp_2m_sde": ("DPMSolverMultistep", SD | LEADING | {"algorithm_type": "sde-dpmsolver++"}, (20,)),
  "unipc_leading": ("UniPCMultistep", SD | LEADING, ALL_STEPS),
  "deis_leading": ("DEISMultistep", SD | LEADING, (20,)),
}
# These cases combine options that the other cases test one by one.
SLOW = (
  "pndm_to_0",
  "pndm_trailing",
  "ddim_without_offset",
  "ddpm_offset",
  "euler_linspace_above_0",
  "euler_karras_above_0",
  "euler_exponential",
  "euler_sample",
  "ancestral_zero_snr",
  "heun_leading",
  "heun_karras",
  "dpmpp_2m_linspace",
  "dpmpp_2m_above_0",
  "dpmpp_2m_zero_snr",
  "dpmpp_2m_sde",
  "unipc_leading",
)
# Schedulers whose state is x / alpha.
SCALED = ("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete")
# The largest deviation from the peer's state, relative to the largest entry of that state. The first step divides the
# rounding of the noise by alpha, which is small at the start. The second number is the tolerance of that rounding.
TOLERANCE = {"float64": (1e-8, 0), "float32": (1e-5, 2e-6)}


@pytest.fixture(params=[pytest.param("float32", marks=pytest.mark.slow), "float64"])
def dtype(request):
  with jax.enable_x64(request.param == "float64"):
    yield request.param


def read_schedule(name):
  """Return the schedule that our package reads from the scheduler config of CASES[name]."""
  kind, options, _ = CASES[name]
  scheduler = getattr(diffusers, f"{kind}Scheduler")(**options)
  return schedulers.from_config(json.loads(scheduler.to_json_string()))


def peer_trajectory(name, network, process, x, times, steps):
  """Run diffusers' scheduler from `x`, and return its states at `times` and its number of network calls.

  The scheduler uses our noise and computes in the precision of `x`. `run_diffusers` checks the times of the network
  calls.
  """
  kind, options, _ = CASES[name]
  scheduler, dtype = getattr(diffusers, f"{kind}Scheduler"), str(x.dtype)
  module, noises = sys.modules[scheduler.__module__], (torch.tensor(noise(dtype, i)) for i in itertools.count())
  alpha = np.asarray(process.alpha(times), dtype)[:, None, None] if kind in SCALED else np.ones((1, 1, 1), dtype)
  # The peer takes a last step of no length, and our grid leaves it out.
  has_empty_step = len(times) == steps
  calls = times if has_empty_step else times[:-1]
  if kind == "HeunDiscrete":
    calls = np.repeat(calls, 2)[1:]
  repeats_second = kind == "PNDM" and steps > 1
  if repeats_second:
    calls = np.insert(calls, 2, times[1])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(noises), raising=False)
    if dtype == "float64":
      for attribute in ("torch", "np"):
        patch.setattr(module, attribute, Doubled(getattr(module, attribute)))
    peer = scheduler(**options)
    peer.set_timesteps(steps)
    states = run_diffusers(peer, process, network, x / alpha[0], calls)
  if kind == "HeunDiscrete":
    states = states_of_heun_steps(states)
  if repeats_second:
    states = np.delete(states, 1, axis=0)
  if has_empty_step:
    np.testing.assert_allclose(states[-1], states[-2], rtol=1e-6)
    states = states[:-1]
  return states * alpha, len(calls) - has_empty_step


def trajectory(sampler, denoise, x, times):
  """Return the states of our sampler at `times`.

  Each step runs the same compiled program.
  """
  rule = sampler if sampler.prepare is None else sampler.prepare(len(times) - 1)
  step = jax.jit(rule.step, static_argnums=1)
  states, memory = [x], rule.init(x)
  for i, (t, s) in enumerate(itertools.pairwise(np.asarray(times, x.dtype))):
    key = jax.random.fold_in(jax.random.key(SEED), i)
    state, memory = step(key, denoise, states[-1], memory, t, s)
    states.append(np.asarray(state))
  return np.stack(states)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES])
def test_trajectories_match_diffusers(name, dtype):
  """Each state, each time input of the network and the number of calls agree, for all numbers of steps."""
  schedule = read_schedule(name)
  process, prediction = schedule.make_process(), schedule.make_prediction()
  defaults, exact = schedule.defaults(process), MIXTURE.denoise(process)
  denoise = exact if defaults.clip is None else defaults.clip(exact)
  network = as_torch(network_of(process, prediction, exact))
  for steps in CASES[name][2]:
    times = defaults.times(steps)
    x = start(process, times[0], dtype)
    theirs, calls = peer_trajectory(name, network, process, x, times, steps)
    ours = trajectory(defaults.sampler, denoise, x, times)
    assert ours.shape == theirs.shape
    deviations = np.max(np.abs(ours - theirs), axis=(1, 2)) / np.max(np.abs(theirs), axis=(1, 2))
    tolerance, rounding = TOLERANCE[dtype]
    # Networks for processes that start at alpha = 0 predict v, so nothing is divided by alpha.
    alpha = float(process.alpha(times[0])) or 1.0
    assert np.all(deviations < tolerance + rounding / alpha), (steps, deviations)
    assert sampling.nfe(defaults.sampler, process, times) == calls
