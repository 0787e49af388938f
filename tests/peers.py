"""Run diffusers and k-diffusion on the problems of `test_peers`, with the denoiser, times and noise of our samplers."""

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
  """Load the file k_diffusion/sampling.py without its package.

  The package imports torchvision and other libraries, but the samplers need only the function `append_dims` of its
  other files.
  """
  path = Path(importlib.util.find_spec("k_diffusion").origin).with_name("sampling.py")
  source = path.read_text()
  assert source.count("from . import utils") == 1
  module = types.ModuleType("k_diffusion_sampling")
  module.utils = types.SimpleNamespace(append_dims=lambda x, ndim: x[(...,) + (None,) * (ndim - x.ndim)])
  exec(compile(source.replace("from . import utils", ""), path, "exec"), vars(module))
  return module


k_diffusion = load_k_diffusion()


class Doubled:
  """Wrap a module (torch or NumPy) so that its `float32` is float64."""

  def __init__(self, module):
    self._module = module

  def __getattr__(self, name):
    return getattr(self._module, "float64" if name == "float32" else name)


def noise(dtype, *indices):
  """Return the noise that our samplers use after they fold `indices` into the key.

  The first index is the step. A rule with two noises per step also folds in a second index.
  """
  key = functools.reduce(jax.random.fold_in, indices, jax.random.key(SEED))
  return np.asarray(randomness.normal(key, SHAPE, dtype))


def start(process, t, dtype):
  x_0, eps = np.random.default_rng(0).standard_normal((2, *SHAPE))
  return np.asarray(process.alpha(t) * 0.5 * x_0 + process.sigma(t) * eps, dtype)


def trajectory(sampler, process, x, times, data=MIXTURE):
  """Run our sampler for K steps on a batch x [B, D], and return all states [K + 1, B, D]."""
  denoise = data.denoise(process)

  def run(x):
    return sampling.sample(jax.random.key(SEED), sampler, denoise, x, times, return_trajectory=True)

  return np.asarray(jax.jit(run)(x))


def as_torch(function):
  """Convert a JAX function of a state and a time into a function of torch tensors."""
  compiled = jax.jit(function)
  return lambda x, t: torch.tensor(np.asarray(compiled(x.numpy(), np.asarray(t, x.numpy().dtype))))


@functools.cache
def eps_network():
  return as_torch(network_of(DISCRETE, predictions.EPS, MIXTURE.denoise(DISCRETE)))


@functools.cache
def k_model():
  return as_torch(MIXTURE.denoise(EDM))


def run_diffusers(scheduler, process, network, x, times, *, before=None, **options):
  """Run a scheduler of diffusers, and return an array with the start and the state after each network call.

  The function calls the network at `times`, so `times` must match the scheduler's timesteps.
  """
  np.testing.assert_allclose(scheduler.timesteps, process.time_input(times), rtol=1e-5, atol=1e-3)
  scale = getattr(scheduler, "scale_model_input", lambda x, time: x)
  states = [torch.tensor(x)]
  for i, (timestep, t) in enumerate(zip(scheduler.timesteps, times, strict=True)):
    if before is not None:
      before(i)
    output = network(scale(states[-1], timestep), t)
    states.append(scheduler.step(output, timestep, states[-1], return_dict=False, **options)[0])
  return np.stack([state.numpy() for state in states])


def states_of_heun_steps(states):
  """Return an array with the start and the state after each Heun step.

  `states` is an array with the start and the state after each network call. Each step makes two calls, except that the
  last step, to 0, makes only one call.
  """
  return np.concatenate([states[::2], states[-1:]])


def run_k_diffusion(rule, x, sigmas, noises, **options):
  """Run a rule of k-diffusion that uses the arrays `noises` in order, and return all states.

  For a rule with churn, a replacement of torch.randn_like records the states. For every other rule, a callback records
  them.
  """
  states, noises = [], iter([torch.tensor(array) for array in noises])

  def randn_like(x):
    states.append(x)
    return next(noises)

  with pytest.MonkeyPatch.context() as patch:
    if "s_churn" in inspect.signature(rule).parameters:
      patch.setattr(torch, "randn_like", randn_like)
    else:
      options["callback"] = lambda info: states.append(info["x"])
    if "noise_sampler" in inspect.signature(rule).parameters:
      options["noise_sampler"] = lambda sigma, sigma_next: next(noises)
    end = rule(k_model(), torch.tensor(x), torch.tensor(sigmas), disable=True, **options)
  return np.stack([state.numpy() for state in (*states, end)])


def noise_of_dpmpp_sde(sigmas, eta, dtype):
  """Yield two unit-variance noises for each `dpmpp_sde` step: one for its first half, then one for the entire step.

  The noise of the entire step is a weighted sum of the noise of the first half and an independent noise.
  """
  step = k_diffusion.get_ancestral_step
  for i, (t, s) in enumerate(itertools.pairwise(sigmas[:-1].astype(np.float64))):
    first, second, u = noise(dtype, i, 0), noise(dtype, i, 1), (t * s) ** 0.5
    up, shared_std = step(t, s, eta)[1], step(t, u, eta)[1] * step(u, s, eta)[0] / u
    yield first
    yield ((shared_std * first + (up**2 - shared_std**2) ** 0.5 * second) / up).astype(dtype)


def fixed_dpmpp_3m():
  """Return k-diffusion's DPM-Solver++(3M) with the missing factor 2 in the term of the second difference.

  A step has length h in lambda. At the distance u from its start, the rule's estimate of x_0 is
  D(u) = D(0) + d1 u/h + d2 (u/h)^2, with d2 = h^2 D''/2. The integral of exp(u - h) (u/h)^2 from 0 to h is
  1 - 2 phi_2 / h = -2 phi_3. k-diffusion uses -phi_3 instead. The multistep rule in diffusers and the multistep rule in
  the code of the paper's authors have the same error. The singlestep rule of the authors has the factor 2. The missing
  term is of order h^3 in each step.
  """
  rule = k_diffusion.sample_dpmpp_3m_sde
  source, names = inspect.getsource(rule), dict(vars(k_diffusion))
  assert source.count("- phi_3 * d2") == 1
  exec(source.replace("- phi_3 * d2", "- 2 * phi_3 * d2"), names)
  return names[rule.__name__]
