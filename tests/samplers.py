"""Every sampler under test: how it is made, the order it claims, and how the tests walk over them."""

import jax
import jax.numpy as jnp

from ddpm_jax import sampling
from tests.flags import OPTIMIZED
from tests.oracles import PROCESSES

# Deterministic rules and the order of their error in the step, for smooth flows.
ORDERS = {
  "ddim": (sampling.ddim, 1),
  "euler": (sampling.euler, 1),
  "heun": (sampling.heun, 2),
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
}
STOCHASTIC = {
  "ancestral": sampling.ancestral,
  "ancestral_large": lambda process: sampling.ancestral(process, "large"),
  "ddim_half": lambda process: sampling.ddim(process, 0.5),
  "ddim_one": lambda process: sampling.ddim(process, 1.0),
  "euler_ancestral": sampling.euler_ancestral,
  "euler_maruyama": sampling.euler_maruyama,
  "reverse_diffusion": sampling.reverse_diffusion,
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
# Rules of the second order in the network's estimate, which need fewer steps than the first.
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
# Which `test_rules_that_are_one` shows to be another one on every process: the long laws leave them out.
SAME = ("euler", "dpm_solver_1", "deis_1", "ddim_one", "euler_ancestral")
# `denoise` is here a consistency function, so the laws of the others do not apply to it; the contract does.
SAMPLERS = (
  {name: make for name, (make, _) in ORDERS.items()}
  | STOCHASTIC
  | {"multistep_consistency": sampling.multistep_consistency}
)
DISTINCT = [name for name in SAMPLERS if name not in SAME]
# One process of each kind: tied alpha and sigma, a fixed alpha, a straight path, a table that ends at zero SNR.
KINDS = ("vp", "edm", "rectified_flow", "zero_snr")
FEW = ("ancestral", "heun", "dpmpp_3m", "unipc_3")


def on_processes(names):
  """Pairs (sampler, process): all rules on a process of each kind, a few on every one; a rule knows only alpha and sigma."""
  return [(name, process) for process in PROCESSES for name in names if process in KINDS or name in FEW]


def run(sampler, denoise, x, times, key=None, *, compiler_options=None, **kwargs):
  """`sample`, jitted."""
  key = jax.random.key(0) if key is None else key

  def draw(key, x, times):
    return sampling.sample(key, sampler, denoise, x, times, **kwargs)

  return jax.jit(draw, compiler_options=compiler_options)(key, x, times)


def run_many(*arguments):
  """`run` for so many samples or steps that optimizing the program pays."""
  return run(*arguments, compiler_options=OPTIMIZED)


def run_from_exact_start(sampler, denoise, states, times, steps):
  """The state after `steps` steps of a deterministic rule whose first steps are replaced by exact `states`.

  That is how the order of a multistep rule is defined: its first steps, of lower order, would hide it.
  """
  key, memory = jax.random.key(0), sampler.init(states[0])
  for k in range(len(states) - 1):
    _, memory = sampler.step(key, denoise, states[k], memory, times[k], times[k + 1])
    if hasattr(memory, "predicted"):  # UniPC compares its prediction with where the next step starts
      memory = memory._replace(predicted=states[k + 1])

  def body(k, carry):
    return sampler.step(key, denoise, *carry, times[k], times[k + 1])

  # A loop of traced length: one program serves all numbers of steps.
  return jax.lax.fori_loop(len(states) - 1, steps, body, (states[-1], memory))[0]


def padded(times, size):
  """A grid at the front of an array of a fixed size."""
  return jnp.pad(jnp.asarray(times), (0, size - len(times)))
