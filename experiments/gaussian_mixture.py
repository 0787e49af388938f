"""Samples a Gaussian mixture with its closed-form denoiser: no network, no config, only the public functions.

python experiments/gaussian_mixture.py
"""

import jax
import jax.numpy as jnp

from ddpm_jax import processes, sampling, schedules

WEIGHTS = jnp.array([0.2, 0.3, 0.5])
MEANS = jnp.array([[-0.8, 0.0], [0.6, 0.6], [0.4, -0.7]])
STD = 0.1


def exact_denoiser(process):
  """E[x_0 | x_t] under the mixture, the function that a network would learn."""

  def denoise(x, t):
    alpha, sigma = process.alpha(t), process.sigma(t)
    variance = alpha**2 * STD**2 + sigma**2
    difference = x[:, None, :] - alpha * MEANS
    responsibility = jax.nn.softmax(jnp.log(WEIGHTS) - 0.5 * jnp.sum(difference**2, -1) / variance)
    return jnp.einsum("bk,bkd->bd", responsibility, MEANS + alpha * STD**2 / variance * difference)

  return denoise


def main(count: int = 20_000) -> dict[str, jax.Array]:
  """Prints, for each sampler, the share, mean and spread of the samples of each component; returns the samples."""
  vp, ddpm = processes.vp(), processes.discrete(schedules.linear(1000))
  grids = sampling.grids
  runs = {
    "ancestral, 250 steps": (ddpm, sampling.ancestral(ddpm), grids.trailing(ddpm, 250)),
    "DDIM, 100 steps": (ddpm, sampling.ddim(ddpm), grids.trailing(ddpm, 100)),
    "Euler-Maruyama, 500 steps": (vp, sampling.euler_maruyama(vp), grids.uniform(vp, 500, t_min=1e-3)),
    "Heun, 25 steps": (vp, sampling.heun(vp), grids.log_snr(vp, 25)),
  }
  results = {}
  for name, (process, sampler, times) in runs.items():
    start, noise = jax.random.split(jax.random.key(0))
    x = process.prior(start, (count, 2))
    results[name] = jax.jit(sampling.sample, static_argnums=(1, 2))(noise, sampler, exact_denoiser(process), x, times)
  x, nfe = sampling.integrate(vp, exact_denoiser(vp), vp.prior(jax.random.key(0), (count, 2)), vp.t_max, vp.t_min)
  results[f"adaptive ODE, {nfe} calls"] = exact_denoiser(vp)(x, vp.t_min)

  print(f"{'truth':<28}{'shares':<20}{'means':<50}spread")
  describe("", WEIGHTS, MEANS, jnp.full(3, STD))
  for name, x in results.items():
    nearest = jnp.argmin(jnp.linalg.norm(x[:, None] - MEANS, axis=-1), axis=1)
    groups = [x[nearest == k] for k in range(3)]
    describe(
      name,
      jnp.array([len(group) / count for group in groups]),
      jnp.stack([group.mean(0) for group in groups]),
      jnp.stack([group.std(0).mean() for group in groups]),
    )
  return results


def describe(name, shares, means, spread):
  columns = ("  ".join(f"{value:.3f}" for value in values) for values in (shares, spread))
  shares, spread = columns
  centers = "  ".join(f"({a:+.2f}, {b:+.2f})" for a, b in means.tolist())
  print(f"{name:<28}{shares:<20}{centers:<50}{spread}")


if __name__ == "__main__":
  main()
