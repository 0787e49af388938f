"""Run every sampler on a ring of eight Gaussians, and take 1,000 samples with each sampler."""

import jax
import jax.numpy as jnp

from ddpm_jax import processes, sampling

process = processes.vp()
STD, MEANS = 0.05, 0.8 * jnp.stack([jnp.cos(jnp.arange(8) * jnp.pi / 4), jnp.sin(jnp.arange(8) * jnp.pi / 4)], -1)


def denoise(x_t, t):  # E[x_0 | x_t], in place of a trained network
  alpha, sigma = process.alpha(t), process.sigma(t)
  spread = (alpha * STD) ** 2 + sigma**2
  share = jax.nn.softmax(-jnp.sum((x_t[:, None] - alpha * MEANS) ** 2, -1) / (2 * spread))
  return (sigma**2 * share @ MEANS + alpha * STD**2 * x_t) / spread


def consistency(x_t, t):  # the end of the flow through x_t, in place of a trained consistency model
  return denoise(sampling.integrate(process, denoise, x_t, t, process.t_min)[0], process.t_min)


RULES = ["ancestral", "ddim", "deis", "dpm_solver", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s", "dpmpp_3m", "dpmpp_sde"]
RULES += ["euler", "euler_ancestral", "euler_maruyama", "heun", "multistep_consistency", "ode", "reverse_diffusion"]
RULES += ["plms", "unipc"]
samplers = {name: getattr(sampling, name)(process) for name in RULES}
samplers["heun, churned"] = sampling.heun(process, s_churn=10.0, s_min=0.05, s_max=50.0)
samplers["ddim, corrected"] = sampling.with_langevin(sampling.ddim(process), process, snr=0.16)
times, x, results = sampling.grids.log_snr(process, 25), process.prior(jax.random.key(0), (1000, 2)), {}
for name, rule in samplers.items():
  function, grid = (consistency, times[::8]) if name == "multistep_consistency" else (denoise, times)
  grid = sampling.grids.for_sampler(rule, process, 25) if name == "ode" else grid
  results[name] = sampling.solve(jax.random.key(1), rule, function, x, grid)
for name, (samples, evaluations) in results.items():
  distance = jnp.min(jnp.linalg.norm(samples[:, None] - MEANS, axis=-1), axis=1)
  print(
    f"{name:21} {int(evaluations):4} network calls, standard deviation {jnp.sqrt(jnp.mean(distance**2) / 2):.3f} (0.050)"
  )
