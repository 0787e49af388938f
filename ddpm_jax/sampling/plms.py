"""Provide PLMS, the linear multistep rule of PNDM and the default sampler of Stable Diffusion 1."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.arguments import check_types
from ddpm_jax.processes import Process
from ddpm_jax.sampling.core import Sampler, estimate
from ddpm_jax.sampling.euler import ddim, step_along_noise

# The weights of the Adams-Bashforth rules for equal steps, for the newest estimate first. Row k is for a step with k
# earlier estimates, and the last row for 3 or more.
_WEIGHTS = np.array(
  [
    [1, 0, 0, 0],
    [3 / 2, -1 / 2, 0, 0],
    [23 / 12, -16 / 12, 5 / 12, 0],
    [55 / 24, -59 / 24, 37 / 24, -9 / 24],
  ]
)


class _Past(NamedTuple):
  """Hold the estimates of the noise in the three latest steps, the newest first, and the number of steps so far."""

  values: tuple[jax.Array, jax.Array, jax.Array]
  steps: jax.Array


@check_types
def plms(process: Process) -> Sampler:
  """Build PLMS, the pseudo linear multistep rule of PNDM without Runge-Kutta steps.

  The noise is constant within each step, as in `ddim`. It is the Adams-Bashforth combination of the network's four
  latest estimates of the noise, or of fewer estimates in the first steps. On every grid, the rule uses the weights
  for steps of equal length. The rule has order 2 on grids whose step lengths vary smoothly. Source: Liu et al. 2022,
  section 3. PLMS is the PNDMScheduler of diffusers with skip_prk_steps=True.

  A step calls the network once. If the grid has several steps, the first step calls the network twice, because it
  averages the estimates at its start and at its end, as Heun's rule does.
  """

  def step(key, denoise, x_t, memory: _Past, t, s):
    t, s = jnp.asarray(t), jnp.asarray(s)
    is_twice = (memory.steps == 0) & (process.sigma(s) > 0)

    def call(carry, is_needed):
      # Estimate the data and the noise at `carry`, and go with them from x_t to x_s for the next call.
      def run(carry):
        x_0, eps = (one.astype(x_t.dtype) for one in estimate(process, denoise, *carry))
        x_s = step_along_noise(process, x_t, x_0, eps, t, s).astype(x_t.dtype)
        return (x_s, s.astype(t.dtype)), (x_0, eps)

      return jax.lax.cond(is_needed, run, lambda carry: (carry, (x_t, x_t)), carry)

    # A loop compiles the network once. Two calls in the code would compile it twice.
    calls = jnp.stack([jnp.array(True), is_twice])
    _, (x_0, eps) = jax.lax.scan(call, (x_t, t), calls)
    values = (eps[0], *memory.values)
    weights = jnp.asarray(_WEIGHTS, x_t.dtype)[jnp.minimum(memory.steps, 3)]
    combined = sum(weight * value for weight, value in zip(weights, values, strict=True))
    mean = jnp.where(is_twice, 0.5 * (eps[0] + eps[1]), combined)
    return step_along_noise(process, x_t, x_0[0], mean, t, s), _Past(values[:3], memory.steps + 1)

  def init(x):
    return _Past((jnp.zeros_like(x),) * 3, jnp.array(0))

  def prepare(num_steps: int) -> Sampler:
    # As in diffusers, a grid with a single step calls the network only once.
    return ddim(process) if num_steps == 1 else rule._replace(prepare=None)

  rule = Sampler(init, step, process, reversible=True, first_calls=1, prepare=prepare, spacing=ddim(process).spacing)
  return rule
