"""Sample a Gaussian mixture with its exact denoiser, without a network or a config.

python experiments/gaussian_mixture.py
"""

import jax
import jax.numpy as jnp

from ddpm_jax import processes, sampling, schedules

WEIGHTS = jnp.array([0.2, 0.3, 0.5])
MEANS = jnp.array([[-0.8, 0.0], [0.6, 0.6], [0.4, -0.7]])
STD = 0.1


def exact_denoiser(process):
  """Return the function E[x_0 | x_t] of the mixture, in place of a trained network."""

  def denoise(x, t):
    alpha, sigma = process.alpha(t), process.sigma(t)
    variance = alpha**2 * STD**2 + sigma**2
    difference = x[:, None, :] - alpha * MEANS
    responsibility = jax.nn.softmax(jnp.log(WEIGHTS) - 0.5 * jnp.sum(difference**2, -1) / variance)
    return jnp.einsum("bk,bkd->bd", responsibility, MEANS + alpha * STD**2 / variance * difference)

  return denoise


def main(count: int = 20_000) -> dict[str, jax.Array]:
  """Print the weight, mean and standard deviation of each component for every sampler, and return the samples."""
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

  print(f"{'exact values':<28}{'weights':<20}{'means':<50}standard deviations")
  print_row("", WEIGHTS, MEANS, jnp.full(3, STD))
  for name, x in results.items():
    nearest = jnp.argmin(jnp.linalg.norm(x[:, None] - MEANS, axis=-1), axis=1)
    groups = [x[nearest == k] for k in range(3)]
    print_row(
      name,
      jnp.array([len(group) / count for group in groups]),
      jnp.stack([group.mean(0) for group in groups]),
      jnp.stack([group.std(0).mean() for group in groups]),
    )
  return results


def print_row(name, weights, means, stds):
  weights, stds = ("  ".join(f"{value:.3f}" for value in values) for values in (weights, stds))
  means = "  ".join(f"({a:+.2f}, {b:+.2f})" for a, b in means.tolist())
  print(f"{name:<28}{weights:<20}{means:<50}{stds}")


if __name__ == "__main__":
  main()
