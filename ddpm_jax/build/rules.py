"""Step rules of a config."""

from ml_collections import ConfigDict

from ddpm_jax import sampling
from ddpm_jax.build.model import build_process
from ddpm_jax.schema import choose

_RULES = {
  "ancestral": lambda c, process: sampling.ancestral(process, c.variance),
  "ddim": lambda c, process: sampling.ddim(process, c.eta),
  "deis": lambda c, process: sampling.deis(process, c.order),
  "dpm_solver": lambda c, process: sampling.dpm_solver(process, c.order),
  "dpmpp_2m": lambda c, process: sampling.dpmpp_2m(process),
  "dpmpp_2m_sde": lambda c, process: sampling.dpmpp_2m_sde(process),
  "dpmpp_2s": lambda c, process: sampling.dpmpp_2s(process),
  "dpmpp_3m": lambda c, process: sampling.dpmpp_3m(process),
  "dpmpp_sde": lambda c, process: sampling.dpmpp_sde(process),
  "euler": lambda c, process: sampling.euler(process, **_churn(c)),
  "euler_ancestral": lambda c, process: sampling.euler_ancestral(process),
  "euler_maruyama": lambda c, process: sampling.euler_maruyama(process),
  "heun": lambda c, process: sampling.heun(process, **_churn(c)),
  "ode": lambda c, process: sampling.ode(process, rtol=c.tolerance, atol=c.tolerance),
  "reverse_diffusion": lambda c, process: sampling.reverse_diffusion(process),
  "unipc": lambda c, process: sampling.unipc(process, c.order),
}
SAMPLERS = tuple(_RULES)


def _churn(c: ConfigDict) -> dict[str, float]:
  return {name: c[name] for name in ("s_churn", "s_min", "s_max", "s_noise")}


def build_step_rule(config: ConfigDict) -> sampling.Sampler:
  """The step rule of a config, its corrector included.

  Raises:
    ValueError: if there is no such sampler, or its arguments are wrong.
  """
  c, process = config.sampling, build_process(config)
  sampler = choose(c.sampler, _RULES, "a sampler")(c, process)
  if c.corrector_steps:
    return sampling.with_langevin(sampler, process, snr=c.corrector_snr, num_steps=c.corrector_steps)
  return sampler
