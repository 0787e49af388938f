"""Define the samplers under test, the orders of deterministic rules, and functions that run samplers."""

import itertools
import math

import jax
import jax.numpy as jnp
import pytest

from ddpm_jax import randomness, sampling
from tests.flags import OPTIMIZED
from tests.oracles import PROCESSES

# Deterministic rules, each with the order of its error in the step size, for smooth flows.
ORDERS = {
  "ddim": (sampling.ddim, 1),
  "euler": (sampling.euler, 1),
  "heun": (sampling.heun, 2),
  "heun_scaled": (lambda process: sampling.heun(process, scaled=True), 2),
  "dpm_solver_1": (lambda process: sampling.dpm_solver(process, 1), 1),
  "dpm_solver_2": (lambda process: sampling.dpm_solver(process, 2), 2),
  "dpm_solver_3": (lambda process: sampling.dpm_solver(process, 3), 3),
  "dpmpp_2s": (sampling.dpmpp_2s, 2),
  "dpmpp_2m": (sampling.dpmpp_2m, 2),
  "dpmpp_3m": (sampling.dpmpp_3m, 3),
  "deis_1": (lambda process: sampling.deis(process, 1), 1),
  "deis_2": (lambda process: sampling.deis(process, 2), 2),
  "deis_3": (lambda process: sampling.deis(process, 3), 3),
  # The corrector raises the predictor's order by one.
  "unipc_1": (lambda process: sampling.unipc(process, 1), 2),
  "unipc_2": (lambda process: sampling.unipc(process, 2), 3),
  "unipc_2_bh1": (lambda process: sampling.unipc(process, 2, "bh1"), 3),
  "unipc_3": (lambda process: sampling.unipc(process, 3), 4),
  # The weights are those of order 4 for x / alpha as a function of a variable with equal steps, and sigma / alpha is
  # another variable.
  "plms": (sampling.plms, 2),
}
STOCHASTIC = {
  "ancestral": sampling.ancestral,
  "ancestral_large": lambda process: sampling.ancestral(process, "large"),
  "ddim_half": lambda process: sampling.ddim(process, 0.5),
  "ddim_one": lambda process: sampling.ddim(process, 1.0),
  "euler_ancestral": sampling.euler_ancestral,
  "euler_maruyama": sampling.euler_maruyama,
  "reverse_diffusion": sampling.reverse_diffusion,
  "sde": sampling.sde,
  "sde_decreasing": lambda process: sampling.sde(process, "decreasing"),
  "euler_churn": lambda process: sampling.euler(process, s_churn=20.0, s_min=0.05, s_max=20.0),
  "heun_churn": lambda process: sampling.heun(process, s_churn=20.0, s_min=0.05, s_max=20.0),
  "dpmpp_2s_ancestral": lambda process: sampling.dpmpp_2s(process, eta=1.0),
  "dpmpp_sde": sampling.dpmpp_sde,
  "dpmpp_sde_half": lambda process: sampling.dpmpp_sde(process, eta=0.5),
  "dpmpp_2m_sde": sampling.dpmpp_2m_sde,
  "dpmpp_2m_sde_heun": lambda process: sampling.dpmpp_2m_sde(process, solver="heun"),
  "langevin_ancestral": lambda process: sampling.with_langevin(sampling.ancestral(process), process),
  "langevin_heun": lambda process: sampling.with_langevin(sampling.heun(process), process, num_steps=2),
  "langevin_unipc": lambda process: sampling.with_langevin(sampling.unipc(process), process),
  "langevin_heun_churn": lambda process: sampling.with_langevin(
    sampling.heun(process, s_churn=10.0), process, snr=0.05
  ),
}
# Rules of second order in the network's estimate. They need fewer steps than stochastic rules of first order.
SECOND_ORDER_STOCHASTIC = (
  "heun_churn",
  "dpmpp_2s_ancestral",
  "dpmpp_sde",
  "dpmpp_sde_half",
  "dpmpp_2m_sde",
  "dpmpp_2m_sde_heun",
  "langevin_heun",
  "langevin_unipc",
  "langevin_heun_churn",
)
# Each of these rules equals another rule on every process, so the long tests leave them out.
# See `test_rules_with_equal_formulas_give_the_same_samples`.
DUPLICATES = ("euler", "dpm_solver_1", "deis_1", "ddim_one", "euler_ancestral")
# The `denoise` of multistep_consistency is a consistency function, so only the tests of the common contract include
# this rule.
SAMPLERS = (
  {name: make for name, (make, _) in ORDERS.items()}
  | STOCHASTIC
  | {"multistep_consistency": sampling.multistep_consistency}
)
DISTINCT = [name for name in SAMPLERS if name not in DUPLICATES]
# One process of each kind: variance-preserving, constant alpha, straight path, and a discrete process with zero SNR.
KINDS = ("vp", "edm", "rectified_flow", "zero_snr")
REPRESENTATIVE = ("ancestral", "heun", "dpmpp_3m", "unipc_3")


def rotate(names, processes):
  """Assign one of the processes to each name, in rotation, and return the set of pairs (name, process)."""
  return {(name, processes[i % len(processes)]) for i, name in enumerate(names)}


def mark_slow(pairs, default):
  """Return test parameters for pairs (sampler, process), with all pairs outside `default` marked as slow."""
  return [pytest.param(*pair, id="-".join(pair), marks=() if pair in default else pytest.mark.slow) for pair in pairs]


def on_processes(names):
  """Return pairs of samplers and processes as test parameters, most of them marked as slow.

  The pairs contain every rule on one process of each kind, and a few representative rules on every process. These pairs
  are enough, because a rule depends only on alpha and sigma. Without the slow tests, each rule runs on one process of
  `KINDS`, in rotation, and one representative rule runs on each process outside `KINDS`.
  """
  representative = [name for name in names if name in REPRESENTATIVE]
  other_processes = [process for process in PROCESSES if process not in KINDS]
  default = rotate(names, KINDS) | {(name, process) for process, name in rotate(other_processes, representative)}
  pairs = [(name, process) for process in PROCESSES for name in names if process in KINDS or name in REPRESENTATIVE]
  return mark_slow(pairs, default)


def jitted(sampler, denoise, *, compiler_options=None, **kwargs):
  """Return `sample` for one rule as a jitted function of (key, x, times), so that its calls share one program."""

  def sample(key, x, times):
    return sampling.sample(key, sampler, denoise, x, times, **kwargs)

  return jax.jit(sample, compiler_options=compiler_options)


def run(sampler, denoise, x, times, key=None, **kwargs):
  """Compile and run `sample`."""
  return jitted(sampler, denoise, **kwargs)(jax.random.key(0) if key is None else key, x, times)


def run_many(*arguments):
  """Compile and run `sample` with XLA's default optimizations.

  This is faster than `run` for many samples or steps.
  """
  return run(*arguments, compiler_options=OPTIMIZED)


def run_uncompiled(sampler, denoise, x, times, key=None, **kwargs):
  """Run `sample` one operation at a time, without compiling it.

  For up to about twenty steps, this is faster than `run`.
  """
  with jax.disable_jit():
    return sampling.sample(jax.random.key(0) if key is None else key, sampler, denoise, x, times, **kwargs)


def run_from_exact_start(sampler, denoise, states, times, steps):
  """Take `steps` steps of a deterministic rule from exact first states, and return the last state.

  The entries of `states` replace the start and the results of the first steps. Without exact states, the first steps of
  a multistep rule would dominate the error, because their order is lower.
  """
  key = jax.random.key(0)

  def body(k, carry):
    x, memory = sampler.step(randomness.fold_in(key, k), denoise, *carry, times[k], times[k + 1])
    x = jnp.where(k + 1 < len(states), states[jnp.minimum(k + 1, len(states) - 1)], x)
    if hasattr(memory, "predicted"):  # UniPC compares its prediction with the start of the next step
      memory = memory._replace(predicted=x)
    return x, memory

  # A loop of traced length lets all numbers of steps share one program.
  return jax.lax.fori_loop(0, steps, body, (states[0], sampler.init(states[0])))[0]


def exact_moments(sampler, denoise, mean, variance, times, steps, digits=(3, 3)):
  """Return the mean and variance of the states after `steps` steps of a sampler, for one-dimensional Gaussian data.

  The arguments `mean` and `variance` describe the Gaussian start. Each step is affine in the state and in each noise.
  So a small batch gives both moments without sampling. The first row of the batch starts at the mean and has no noise.
  The second row starts one standard deviation above the mean and has no noise. Each further row starts at the mean and
  sets one noise to 1.

  A key is a tuple: the number of the step, and then the integers that the sampler folds in. So equal keys give equal
  noise. The i-th of these integers must be at most `digits[i] - 2`.
  """
  rows = jnp.arange(2 + (len(times) - 1) * math.prod(digits))

  def fold_in(key, data):
    return (*key, data)

  def normal(key, shape, dtype):
    index, *folded = key
    assert len(folded) <= len(digits)
    for digit, data in itertools.zip_longest(digits, folded, fillvalue=-1):
      index = index * digit + data + 1
    return (rows == 2 + index).astype(dtype).reshape(shape)

  def body(k, carry):
    return sampler.step((k,), denoise, *carry, times[k], times[k + 1])

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(randomness, "fold_in", fold_in)
    patch.setattr(randomness, "normal", normal)
    x = jnp.where(rows == 1, mean + jnp.sqrt(variance), mean)[:, None]
    ends = jax.lax.fori_loop(0, steps, body, (x, sampler.init(x)))[0][:, 0]
  return ends[0], jnp.sum((ends[1:] - ends[0]) ** 2)


def padded(times, size):
  """Pad a grid with zeros to a fixed size."""
  return jnp.pad(jnp.asarray(times), (0, size - len(times)))


def grid_for(process, steps):
  """Return a grid of times that suits every rule on a process."""
  if process.num_steps is None and process.t_max > 1:
    return sampling.grids.karras(process, steps)
  if float(process.alpha(process.t_max)) == 0:
    return sampling.grids.uniform(process, steps)
  return sampling.grids.uniform(process, steps, t_min=0.0 if process.num_steps else process.t_min)
