"""Provide samplers: step rules, the loop that runs them, adaptive integration of the flow, and grids of times."""

from ddpm_jax.sampling import grids
from ddpm_jax.sampling.adaptive import integrate, ode, rk45
from ddpm_jax.sampling.core import Sampler, estimate, nfe, sample, solve
from ddpm_jax.sampling.dpm_solver import dpm_solver, dpmpp_2m, dpmpp_2m_sde, dpmpp_2s, dpmpp_3m, dpmpp_sde
from ddpm_jax.sampling.euler import ddim, euler, euler_ancestral, heun
from ddpm_jax.sampling.langevin import with_langevin
from ddpm_jax.sampling.multistep import deis, unipc
from ddpm_jax.sampling.plms import plms
from ddpm_jax.sampling.stochastic import ancestral, euler_maruyama, multistep_consistency, reverse_diffusion, sde

__all__ = [
  "Sampler",
  "ancestral",
  "ddim",
  "deis",
  "dpm_solver",
  "dpmpp_2m",
  "dpmpp_2m_sde",
  "dpmpp_2s",
  "dpmpp_3m",
  "dpmpp_sde",
  "estimate",
  "euler",
  "euler_ancestral",
  "euler_maruyama",
  "grids",
  "heun",
  "integrate",
  "multistep_consistency",
  "nfe",
  "ode",
  "plms",
  "reverse_diffusion",
  "rk45",
  "sample",
  "sde",
  "solve",
  "unipc",
  "with_langevin",
]
