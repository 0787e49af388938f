"""Measure the error of each restoration method against the exact posterior of Gaussian data.

python experiments/posterior_errors.py

The images have 2 by 4 correlated pixels. The measurement is the left half (inpainting) or the mean of each block of 2
by 2 pixels (super-resolution). The posterior assumes noise of standard deviation 0.02 in the measurement. The table
lists the errors of the samples' mean and covariance. Each error is divided by the same error of the prior: 0 is exact,
and 1 is as bad as without a measurement.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import editing, processes, sampling

SHAPE, NOISE_STD = (2, 4, 1), 0.02
PROCESS = processes.vp()
_ROWS, _COLUMNS = np.divmod(np.arange(8), 4)
_DISTANCE = np.hypot(_ROWS[:, None] - _ROWS, _COLUMNS[:, None] - _COLUMNS)
MEAN, COVARIANCE = np.linspace(-0.3, 0.3, 8), 0.25 * np.exp(-_DISTANCE / 2)
KEEP = np.arange(4)[None, :, None] < 2  # the left half
TRUTH = np.array([[0.5, 0.3, 0.1, -0.5], [0.2, 0.6, 0.4, 0.1]]).reshape(1, *SHAPE)


def denoise(x, t):
  """Compute E[x_0 | x_t], in place of a trained network."""
  values, vectors = np.linalg.eigh(COVARIANCE)
  alpha, sigma = PROCESS.alpha(t), PROCESS.sigma(t)
  shrink = alpha * values / (alpha**2 * values + sigma**2)
  difference = x.reshape(len(x), 8) - alpha * MEAN
  return (MEAN + (difference @ vectors * shrink) @ vectors.T).astype(x.dtype).reshape(x.shape)


def exact_posterior(operator):
  """Return three values: the posterior mean of x_0, its posterior covariance, and the measurement y [1, ...].

  The posterior assumes y = A x_0 + noise, where A is the operator. The value of y is A applied to `TRUTH`, without
  noise.
  """
  matrix = np.asarray(operator(jnp.eye(8).reshape(8, *SHAPE)), np.float64).reshape(8, -1).T
  y = matrix @ TRUTH.ravel()
  gain = COVARIANCE @ matrix.T @ np.linalg.inv(matrix @ COVARIANCE @ matrix.T + NOISE_STD**2 * np.eye(len(y)))
  mean = MEAN + gain @ (y - matrix @ MEAN)
  return mean, COVARIANCE - gain @ matrix @ COVARIANCE, operator(jnp.asarray(TRUTH, jnp.float32))


def methods(operator, y, inpainting, resamples=(2, 5, 10, 20), jumps=(5,), scales=(0.03, 0.1, 0.3, 1.0)):
  """Return a dict from each method's name to its pair (sampler, denoiser).

  All step rules have order 2, so their discretization errors are small compared to the errors of the methods.
  """
  rule, flow = sampling.dpmpp_sde(PROCESS), sampling.heun(PROCESS)
  image = jnp.asarray(TRUTH, jnp.float32)
  samplers = {"no measurement": (rule, denoise)}
  if inpainting:
    samplers["replacement"] = (editing.replace(rule, PROCESS, image, KEEP), denoise)
    for count in resamples:
      samplers[f"RePaint, {count} resamples"] = (editing.repaint(rule, PROCESS, image, KEEP, count), denoise)
    for jump in jumps:
      samplers[f"RePaint, 5 resamples, jump {jump}"] = (editing.repaint(rule, PROCESS, image, KEEP, 5, jump), denoise)
  for scale in scales:
    samplers[f"DPS, scale {scale:g}"] = (editing.dps(rule, PROCESS, operator, y, scale), denoise)
  for name, covariance in (("PiGDM", "isotropic"), ("Tweedie", "tweedie")):
    wrapped = editing.posterior(denoise, PROCESS, operator, y, NOISE_STD, covariance)
    samplers[f"{name}, SDE"], samplers[f"{name}, ODE"] = (rule, wrapped), (flow, wrapped)
  return samplers


def errors(sampler, denoiser, mean, covariance, count, times):
  """Return the errors of the samples' mean and covariance, each divided by the same error of the prior."""
  x = PROCESS.prior(jax.random.key(0), (count, *SHAPE))
  run = jax.jit(lambda x: sampling.sample(jax.random.key(1), sampler, denoiser, x, times))
  samples = np.asarray(run(x), np.float64).reshape(count, 8)
  norm = np.linalg.norm
  return (
    norm(samples.mean(0) - mean) / norm(MEAN - mean),
    norm(np.cov(samples.T) - covariance) / norm(COVARIANCE - covariance),
  )


def main(count: int = 20_000, steps: int = 50, **kwargs) -> dict[tuple[str, str], tuple[float, float]]:
  """Print a table, and return a dict from (problem, method) to (error of the mean, error of the covariance)."""
  times, results = sampling.grids.log_snr(PROCESS, steps), {}
  print(
    "| problem | method | network calls | error of the mean | error of the covariance |\n| --- | --- | ---: | ---: | ---: |"
  )
  for problem, operator in (("inpainting", editing.mask_operator(KEEP)), ("super-resolution", editing.downsample(2))):
    mean, covariance, y = exact_posterior(operator)
    for name, (sampler, denoiser) in methods(operator, y, problem == "inpainting", **kwargs).items():
      results[problem, name] = errors(sampler, denoiser, mean, covariance, count, times)
      calls = sampling.nfe(sampler, PROCESS, times)
      print(
        f"| {problem} | {name} | {calls} | {results[problem, name][0]:.3f} | {results[problem, name][1]:.3f} |",
        flush=True,
      )
  return results


if __name__ == "__main__":
  main()
