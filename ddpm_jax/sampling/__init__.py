"""Samplers: step rules, the loop that runs them, the adaptive ODE and grids of times."""

from ddpm_jax.sampling import grids
from ddpm_jax.sampling.adaptive import ode
from ddpm_jax.sampling.core import Sampler, sample
from ddpm_jax.sampling.deterministic import ddim, heun
from ddpm_jax.sampling.stochastic import ancestral, euler_maruyama

__all__ = ["Sampler", "ancestral", "ddim", "euler_maruyama", "grids", "heun", "ode", "sample"]
