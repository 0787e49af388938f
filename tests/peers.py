"""Running diffusers and k-diffusion on the problems of `test_peers`: our denoiser, start, times and noise, in torch."""

import functools
import importlib.util
import inspect
import itertools
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from ddpm_jax import predictions, processes, randomness, sampling, schedules
from tests.oracles import MIXTURE, network_of

SHAPE, SEED = (4, 2), 3
DISCRETE = processes.discrete(schedules.linear(1000))
EDM = processes.edm(0.002, 80.0)


def load_k_diffusion():
  """The file k_diffusion/sampling.py alone: its package imports torchvision and more, of which samplers use one function."""
  path = Path(importlib.util.find_spec("k_diffusion").origin).with_name("sampling.py")
  source = path.read_text()
  assert source.count("from . import utils") == 1
  module = types.ModuleType("k_diffusion_sampling")
  module.utils = types.SimpleNamespace(append_dims=lambda x, ndim: x[(...,) + (None,) * (ndim - x.ndim)])
  exec(compile(source.replace("from . import utils", ""), path, "exec"), vars(module))
  return module


k_diffusion = load_k_diffusion()


class Doubled:
  """A module (torch or NumPy) whose `float32` is float64."""

  def __init__(self, module):
    self._module = module

  def __getattr__(self, name):
    return getattr(self._module, "float64" if name == "float32" else name)


def noise(dtype, *indices):
  """What our samplers draw in step i: the key folded with i (and again, by the rule that draws twice a step)."""
  key = functools.reduce(jax.random.fold_in, indices, jax.random.key(SEED))
  return np.asarray(randomness.normal(key, SHAPE, dtype))


def start(process, t, dtype):
  x_0, eps = np.random.default_rng(0).standard_normal((2, *SHAPE))
  return np.asarray(process.alpha(t) * 0.5 * x_0 + process.sigma(t) * eps, dtype)


def trajectory(sampler, process, x, times, data=MIXTURE):
  """All our states [K + 1, B, D]."""
  denoise = data.denoise(process)

  def run(x):
    return sampling.sample(jax.random.key(SEED), sampler, denoise, x, times, return_trajectory=True)

  return np.asarray(jax.jit(run)(x))


def as_torch(function):
  """A JAX function of a state and a time as torch sees it."""
  compiled = jax.jit(function)
  return lambda x, t: torch.tensor(np.asarray(compiled(x.numpy(), np.asarray(t, x.numpy().dtype))))


@functools.cache
def eps_network():
  return as_torch(network_of(DISCRETE, predictions.EPS, MIXTURE.denoise(DISCRETE)))


@functools.cache
def k_model():
  return as_torch(MIXTURE.denoise(EDM))


def run_diffusers(scheduler, process, network, x, times, *, before=None, **options):
  """The start and the state after each call of the network, which happen at `times`: those of the scheduler's labels."""
  np.testing.assert_allclose(scheduler.timesteps, process.time_input(times), rtol=1e-5, atol=1e-3)
  scale = getattr(scheduler, "scale_model_input", lambda x, time: x)
  states = [torch.tensor(x)]
  for i, (label, t) in enumerate(zip(scheduler.timesteps, times, strict=True)):
    if before is not None:
      before(i)
    output = network(scale(states[-1], label), t)
    states.append(scheduler.step(output, label, states[-1], return_dict=False, **options)[0])
  return np.stack([state.numpy() for state in states])


def whole_steps_of_heun(states):
  """The states after both calls of each step; the last step, to 0, has one call."""
  return np.concatenate([states[::2], states[-1:]])


def run_k_diffusion(rule, x, sigmas, draws, **options):
  """All states of the peer, which uses `draws` in turn.

  The rules that may churn ask torch.randn_like for noise and show it the state; the others show it to a callback.
  """
  states, draws = [], iter([torch.tensor(draw) for draw in draws])

  def randn_like(x):
    states.append(x)
    return next(draws)

  with pytest.MonkeyPatch.context() as patch:
    if "s_churn" in inspect.signature(rule).parameters:
      patch.setattr(torch, "randn_like", randn_like)
    else:
      options["callback"] = lambda info: states.append(info["x"])
    if "noise_sampler" in inspect.signature(rule).parameters:
      options["noise_sampler"] = lambda sigma, sigma_next: next(draws)
    end = rule(k_model(), torch.tensor(x), torch.tensor(sigmas), disable=True, **options)
  return np.stack([state.numpy() for state in (*states, end)])


def draws_of_dpmpp_sde(sigmas, eta, dtype):
  """What `dpmpp_sde` uses, at unit variance: the noise of the first half, and that of the whole step, which holds it."""
  step = k_diffusion.get_ancestral_step
  for i, (t, s) in enumerate(itertools.pairwise(sigmas[:-1].astype(np.float64))):
    first, second, u = noise(dtype, i, 0), noise(dtype, i, 1), (t * s) ** 0.5
    up, carried = step(t, s, eta)[1], step(t, u, eta)[1] * step(u, s, eta)[0] / u
    yield first
    yield ((carried * first + (up**2 - carried**2) ** 0.5 * second) / up).astype(dtype)


def third_order_mended():
  """k-diffusion's DPM-Solver++(3M) with the whole second difference.

  With u from 0 to h in lambda, their x_0 is D(u) = D(0) + d1 u/h + d2 (u/h)^2: d2 is h^2 D''/2. The integral of
  exp(u - h) (u/h)^2 is 1 - 2 phi_2 / h, which is -2 phi_3; they take -phi_3, as do diffusers' multistep rule and its source,
  the authors' code, where the singlestep rule has the 2. What is missing is of order h^3 in each step.
  """
  rule = k_diffusion.sample_dpmpp_3m_sde
  source, names = inspect.getsource(rule), dict(vars(k_diffusion))
  assert source.count("- phi_3 * d2") == 1
  exec(source.replace("- phi_3 * d2", "- 2 * phi_3 * d2"), names)
  return names[rule.__name__]
