"""Compare whole trajectories of our samplers with those of diffusers' schedulers, for the same scheduler config.

The network is the exact one of a mixture. The peers call it through NumPy. In float64, the modules of the peers compute
in float64 too, so these comparisons show the rules, and not the rounding of tables.
"""

import functools
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
ALL_STEPS = (1, 2, 5, 20, 50)
# The class without "Scheduler", the options, and the numbers of steps. The grid "linspace" needs two steps. In grids of
# DDIM and PNDM, the number must divide 1000: only then is n - 1000 // K the next step. Below 15 steps, diffusers lowers
# the order of multistep rules in a last step that ends above 0.
CASES = {
  "pndm_of_sd_1": ("PNDM", SD | SKIP | {"steps_offset": 1}, (1, 2, 3, 4, 5, 20, 30, 50)),
  "pndm_to_0": ("PNDM", SKIP | {"set_alpha_to_one": True, "steps_offset": 1}, ALL_STEPS),
  "pndm_trailing": ("PNDM", SD | SKIP | TRAILING, ALL_STEPS),
  "pndm_without_offset": ("PNDM", SD | SKIP, ALL_STEPS[2:]),
  "ddim_of_sd_2": (
    "DDIM",
    SD | PLAIN | {"set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "v_prediction"},
    (*ALL_STEPS, 30),
  ),
  "ddim_without_offset": ("DDIM", SD | PLAIN | {"set_alpha_to_one": False}, ALL_STEPS[1:]),
  "ddim_zero_snr": ("DDIM", SD | PLAIN | ZERO_SNR, ALL_STEPS),
  "ddpm_offset": ("DDPM", PLAIN | {"steps_offset": 1}, (2, 20)),
  "euler_of_sdxl": ("EulerDiscrete", SD | LEADING, ALL_STEPS),
  "euler_linspace": ("EulerDiscrete", SD, (*ALL_STEPS[1:], 300)),
  "euler_trailing": ("EulerDiscrete", SD | TRAILING, ALL_STEPS),
  "euler_above_0": ("EulerDiscrete", SD | LEADING | {"final_sigmas_type": "sigma_min"}, ALL_STEPS),
  "euler_linspace_above_0": ("EulerDiscrete", {"final_sigmas_type": "sigma_min"}, ALL_STEPS[1:]),
  "euler_karras": ("EulerDiscrete", SD | LEADING | {"use_karras_sigmas": True}, ALL_STEPS[1:]),
  "euler_karras_above_0": (
    "EulerDiscrete",
    SD | LEADING | {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
    (5,),
  ),
  "euler_exponential": ("EulerDiscrete", SD | {"use_exponential_sigmas": True}, (5, 50)),
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
  "dpmpp_2m_above_0": ("DPMSolverMultistep", SD | LEADING | {"final_sigmas_type": "sigma_min"}, (20, 50)),
  "dpmpp_2m_zero_snr": ("DPMSolverMultistep", SD | ZERO_SNR, ALL_STEPS),
  "dpmpp_2m_sde": ("DPMSolverMultistep", SD | LEADING | {"algorithm_type": "sde-dpmsolver++"}, (20,)),
  "unipc_leading": ("UniPCMultistep", SD | LEADING, ALL_STEPS),
  "deis_leading": ("DEISMultistep", SD | LEADING, (20, 50)),
}
# Combinations of what the other cases show one by one.
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
# The largest deviation from the peer's state, relative to the largest entry of that state.
TOLERANCE = {"float64": 1e-8, "float32": 1e-5}


@pytest.fixture(params=[pytest.param("float32", marks=pytest.mark.slow), "float64"])
def dtype(request):
  with jax.enable_x64(request.param == "float64"):
    yield request.param


@functools.cache
def schedule_of(name):
  """Return the schedule that our package reads from the saved config of the peer."""
  kind, options, _ = CASES[name]
  scheduler = getattr(diffusers, f"{kind}Scheduler")(**options)
  return schedulers.from_config(json.loads(scheduler.to_json_string()))


def make_peer(name, dtype, monkeypatch):
  """Return the peer with our noise, and with the precision `dtype`."""
  kind, options, _ = CASES[name]
  scheduler = getattr(diffusers, f"{kind}Scheduler")
  module, noises = sys.modules[scheduler.__module__], (torch.tensor(noise(dtype, i)) for i in itertools.count())
  monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(noises), raising=False)
  if dtype == "float64":
    for attribute in ("torch", "np"):
      monkeypatch.setattr(module, attribute, Doubled(getattr(module, attribute)))
  return scheduler(**options)


def trajectory(sampler, denoise, x, times, steps):
  """Run `sample` one step at a time, so that grids of all lengths share the programs `steps` by number of steps."""
  rule = sampler if sampler.prepare is None else sampler.prepare(len(times) - 1)
  single = sampler.prepare is not None and len(times) == 2
  if single not in steps:
    steps[single] = jax.jit(lambda key, x, memory, t, s: rule.step(key, denoise, x, memory, t, s))
  states, memory = [x], rule.init(x)
  for i, (t, s) in enumerate(itertools.pairwise(np.asarray(times, x.dtype))):
    x, memory = steps[single](jax.random.fold_in(jax.random.key(SEED), i), states[-1], memory, t, s)
    states.append(np.asarray(x))
  return np.stack(states)


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES]
)
def test_trajectories_match_diffusers(name, dtype, monkeypatch):
  """Each state and each time input of the network agrees, for all numbers of steps."""
  kind, _, all_steps = CASES[name]
  schedule = schedule_of(name)
  process, prediction = schedule.make_process(), schedule.make_prediction()
  defaults = schedule.defaults(process)
  exact = MIXTURE.denoise(process)
  denoise = exact if defaults.clip is None else defaults.clip(exact)
  network, programs = as_torch(network_of(process, prediction, exact)), {}
  for steps in all_steps:
    peer = make_peer(name, dtype, monkeypatch)
    peer.set_timesteps(steps)
    times = defaults.times(steps)
    calls = times[:-1]
    if len(times) == steps:  # the peer takes a last step of no length
      calls = times
    if kind == "PNDM" and steps > 1:
      calls = np.insert(calls, 2, times[1])
    if kind == "HeunDiscrete":
      calls = np.repeat(calls, 2)[1:]
    x = start(process, times[0], dtype)
    alpha = np.asarray(process.alpha(times), dtype)[:, None, None] if kind in SCALED else np.ones((1, 1, 1), dtype)
    theirs = run_diffusers(peer, process, network, x / alpha[0], calls)
    if kind == "PNDM" and steps > 1:
      theirs = np.delete(theirs, 1, axis=0)
    if kind == "HeunDiscrete":
      theirs = states_of_heun_steps(theirs)
    if len(times) == steps:
      np.testing.assert_allclose(theirs[-1], theirs[-2], rtol=1e-6)
      theirs = theirs[:-1]
    ours = trajectory(defaults.sampler, denoise, x, times, programs)
    theirs = theirs * alpha
    assert ours.shape == theirs.shape
    deviations = np.max(np.abs(ours - theirs), axis=(1, 2)) / np.max(np.abs(theirs), axis=(1, 2))
    assert np.all(deviations < TOLERANCE[dtype]), (steps, deviations)
    nfe = sampling.nfe(defaults.sampler, process, times)
    assert nfe == len(calls) - (len(times) == steps)
