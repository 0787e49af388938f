"""Compare every state of samplers with diffusers and k-diffusion, for the same denoiser, start, times and noise.

The denoiser is the exact denoiser of MIXTURE. diffusers and k-diffusion (the peers) call it through NumPy. Deviations
are relative to the largest entry of the peer's state at the same step. In float32 the peers run unchanged. The
schedulers of diffusers store their tables and some of their states in float32, even if the input is float64. In the
float64 tests, `float32` therefore means float64 inside the modules of diffusers, so that the tests compare the rules
and not the rounding of tables.
"""

import itertools
import sys

import diffusers
import jax
import numpy as np
import pytest
import torch

from ddpm_jax import processes, sampling
from tests.oracles import MIXTURE, gaussian, gaussian_flow
from tests.peers import (
  DISCRETE,
  EDM,
  Doubled,
  as_torch,
  eps_network,
  fixed_dpmpp_3m,
  k_diffusion,
  k_model,
  noise,
  noise_of_dpmpp_sde,
  run_diffusers,
  run_k_diffusion,
  start,
  states_of_heun_steps,
  trajectory,
)

# The largest measured deviations in float32 are 4e-5 near step 1, from diffusers' float32 tables, and 3e-6 elsewhere.
# In float64 they are 2e-10 where DDPMScheduler has a standard deviation of 1e-10 and ours is 0, and 2e-12 elsewhere.
TOLERANCE = {"float32": 1e-3, "float64": 1e-8}
VP = processes.vp()
time_of = jax.jit(DISCRETE.time_of)


@pytest.fixture(params=[pytest.param("float32", marks=pytest.mark.slow), "float64"])
def dtype(request):
  """Set the precision of our samplers and of the peers.

  With float32, a test is marked slow unless it has `in_both`.
  """
  with jax.enable_x64(request.param == "float64"):
    yield request.param


in_both = pytest.mark.parametrize("dtype", TOLERANCE, indirect=True)


@pytest.fixture
def build(monkeypatch, dtype):
  """Return the function `build(scheduler, **config)`.

  The function makes a scheduler of diffusers that computes in `dtype` with our noise. Schedulers with betas get the
  betas of DISCRETE.
  """

  def build(scheduler, **config):
    module, noises = sys.modules[scheduler.__module__], (torch.tensor(noise(dtype, i)) for i in itertools.count())
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(noises), raising=False)
    if dtype == "float64":
      for name in ("torch", "np"):
        monkeypatch.setattr(module, name, Doubled(getattr(module, name)))
    if "FlowMatch" not in scheduler.__name__:
      config |= {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "prediction_type": "epsilon"}
    return scheduler(**config)

  return build


def assert_same(ours, theirs, dtype):
  assert ours.dtype == theirs.dtype == dtype
  assert ours.shape == theirs.shape
  deviations = np.max(np.abs(ours - theirs), axis=(1, 2)) / np.max(np.abs(theirs), axis=(1, 2))
  assert np.all(deviations < TOLERANCE[dtype]), deviations


# diffusers.


@pytest.mark.parametrize(
  ("sampler", "scheduler", "config", "options"),
  [
    (sampling.ancestral(DISCRETE), diffusers.DDPMScheduler, {"timestep_spacing": "trailing"}, {}),
    (sampling.ancestral(DISCRETE, "large"), diffusers.DDPMScheduler, {"variance_type": "fixed_large"}, {}),
    (sampling.ddim(DISCRETE), diffusers.DDIMScheduler, {"timestep_spacing": "trailing"}, {}),
    (sampling.ddim(DISCRETE, 0.5), diffusers.DDIMScheduler, {}, {"eta": 0.5}),
    (sampling.ddim(DISCRETE, 1.0), diffusers.DDIMScheduler, {"timestep_spacing": "trailing"}, {"eta": 1.0}),
  ],
  ids=["ancestral", "ancestral_large", "ddim", "ddim_half", "ddim_one"],
)
@in_both
def test_ancestral_and_ddim_match_diffusers(build, dtype, sampler, scheduler, config, options):
  """With 10 steps, diffusers' previous timestep, n - 1000 // 10, is the next time of the grid.

  The large variance is tested on a "leading" grid. On a "trailing" grid, diffusers adds noise in the last step too,
  unless the last timestep is 0.
  """
  config = {"timestep_spacing": "leading", "clip_sample": False} | config
  peer = build(scheduler, **config)
  peer.set_timesteps(10)
  times = getattr(sampling.grids, config["timestep_spacing"])(DISCRETE, 10)
  x = start(DISCRETE, times[0], dtype)
  theirs = run_diffusers(peer, DISCRETE, eps_network(), x, times[:-1], **options)
  assert_same(trajectory(sampler, DISCRETE, x, times), theirs, dtype)


DPM, UNIPC, DEIS = (
  diffusers.DPMSolverMultistepScheduler,
  diffusers.UniPCMultistepScheduler,
  diffusers.DEISMultistepScheduler,
)
MULTISTEP = {
  "dpmpp_2m": (sampling.dpmpp_2m(DISCRETE), DPM, {"final_sigmas_type": "zero"}),
  "dpmpp_2m_above_0": (sampling.dpmpp_2m(DISCRETE), DPM, {}),
  "dpmpp_2m_sde": (
    sampling.dpmpp_2m_sde(DISCRETE),
    DPM,
    {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "zero"},
  ),
  "dpmpp_2m_sde_heun": (
    sampling.dpmpp_2m_sde(DISCRETE, solver="heun"),
    DPM,
    {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
  ),
  "unipc_2_to_0": (sampling.unipc(DISCRETE, 2), UNIPC, {"final_sigmas_type": "zero", "lower_order_final": True}),
  **{
    f"unipc_{order}_{variant}": (
      sampling.unipc(DISCRETE, order, variant),
      UNIPC,
      {"solver_order": order, "solver_type": variant},
    )
    for order in (1, 2, 3)
    for variant in ("bh1", "bh2")
  },
  **{f"deis_{order}": (sampling.deis(DISCRETE, order), DEIS, {"solver_order": order}) for order in (1, 2, 3)},
}


@pytest.mark.parametrize("name", MULTISTEP)
def test_multistep_rules_match_diffusers(build, dtype, name):
  """Most rules run from step 1000 to step 1 (diffusers' "sigma_min"), with the full order to the end.

  diffusers' `lower_order_final`, the default below 15 steps, is not part of the rules. With order 3 it changes the last
  two steps. The last step to 0 has order 1 both here and in diffusers, so rules of order 2 can also run to 0. With
  "bh1", diffusers' UniPC is NaN at 0. Ours is finite.
  """
  sampler, scheduler, config = MULTISTEP[name]
  config = {"final_sigmas_type": "sigma_min", "lower_order_final": False} | config
  to_zero = config["final_sigmas_type"] == "zero"
  if scheduler is DEIS:  # DEIS always ends at sigma_min
    del config["final_sigmas_type"]
  peer = build(scheduler, timestep_spacing="trailing", **config)
  peer.set_timesteps(10)
  times = sampling.grids.trailing(DISCRETE, 10)
  times[-1] = 0 if to_zero else 1 / 1000
  x = start(DISCRETE, times[0], dtype)
  theirs = run_diffusers(peer, DISCRETE, eps_network(), x, times[:-1])
  assert_same(trajectory(sampler, DISCRETE, x, times), theirs, dtype)


@pytest.mark.filterwarnings("ignore:.*algorithm_type `dpmsolver` is deprecated:FutureWarning")
@pytest.mark.parametrize(
  ("sampler", "order", "algorithm"),
  [
    (sampling.dpm_solver(DISCRETE, 2), 2, "dpmsolver"),
    (sampling.dpm_solver(DISCRETE, 3), 3, "dpmsolver"),
    (sampling.dpmpp_2s(DISCRETE), 2, "dpmsolver++"),
  ],
  ids=["dpm_solver_2", "dpm_solver_3", "dpmpp_2s"],
)
@in_both
def test_singlestep_rules_match_diffusers(build, dtype, sampler, order, algorithm):
  """diffusers evaluates the points inside a step at times of its grid.

  The grid of diffusers therefore contains our times and the inner points of each step, at equal distances in log-SNR.
  The grid ends above 0, because diffusers' last steps to 0 have lower order. Lu et al.'s step of order 3 uses the
  "heun" rule for its second evaluation and the "midpoint" rule for its end. diffusers has one setting for both, so the
  test switches it within each step.
  """
  peer = build(
    diffusers.DPMSolverSinglestepScheduler,
    solver_order=order,
    algorithm_type=algorithm,
    final_sigmas_type="sigma_min",
    lower_order_final=False,
  )

  def before(i):
    peer.register_to_config(solver_type="heun" if order == 3 and i % 3 == 1 else "midpoint")

  times = np.linspace(0.9, 0.05, 6)
  log_snr = np.interp(np.arange(5 * order + 1) / order, np.arange(6), DISCRETE.log_snr(times))
  inner = np.array(time_of(np.resize(log_snr, 16)))[: len(log_snr)]  # one program for all orders
  peer.set_timesteps(5 * order)
  peer.timesteps = torch.tensor(np.asarray(DISCRETE.time_input(inner[:-1])))
  peer.sigmas = torch.tensor(np.exp(-log_snr / 2).astype(dtype))
  x = start(DISCRETE, times[0], dtype)
  theirs = run_diffusers(peer, DISCRETE, eps_network(), x, inner[:-1], before=before)[::order]
  assert_same(trajectory(sampler, DISCRETE, x, times), theirs, dtype)


@in_both
def test_euler_matches_diffusers(build, dtype):
  """diffusers' state is x / alpha. The Euler step of diffusers in sigma / alpha equals our step in alpha and sigma."""
  peer = build(diffusers.EulerDiscreteScheduler, timestep_spacing="trailing")
  peer.set_timesteps(10)
  times = sampling.grids.trailing(DISCRETE, 10)
  alpha = np.asarray(DISCRETE.alpha(times), dtype)[:, None, None]
  x = start(DISCRETE, times[0], dtype)
  theirs = run_diffusers(peer, DISCRETE, eps_network(), x / alpha[0], times[:-1])
  assert_same(trajectory(sampling.euler(DISCRETE), DISCRETE, x, times), theirs * alpha, dtype)


@in_both
def test_heun_matches_diffusers(build, dtype):
  """diffusers' Heun step averages slopes in sigma / alpha, and our Heun step averages slopes in alpha and sigma.

  If alpha varies, these are two different rules of order 2. Our rule therefore runs on the EDM process of x / alpha,
  where the two rules are equal. The peer still calls the network of the discrete process.
  """
  peer = build(diffusers.HeunDiscreteScheduler, timestep_spacing="trailing")
  peer.set_timesteps(10)
  times = sampling.grids.trailing(DISCRETE, 10)
  process, sigmas = processes.edm(0.002, 200.0), np.asarray(DISCRETE.sigma(times) / DISCRETE.alpha(times))
  x = start(process, sigmas[0], dtype)
  theirs = run_diffusers(peer, DISCRETE, eps_network(), x, np.repeat(times[:-1], 2)[1:])
  assert_same(trajectory(sampling.heun(process), process, x, sigmas), states_of_heun_steps(theirs), dtype)


@pytest.mark.parametrize("rule", ["euler", "heun"])
@in_both
def test_flow_matching_rules_match_diffusers(build, dtype, rule):
  """The straight path starts at t = 1 without data. The network predicts the velocity eps - x_0."""
  process, times = processes.rectified_flow(), np.append(np.linspace(1, 1 / 1000, 8), 0)
  denoise = MIXTURE.denoise(process)
  network, x = as_torch(lambda x, t: (x - denoise(x, t)) / t), start(process, 1.0, dtype)
  if rule == "euler":
    peer, calls = build(diffusers.FlowMatchEulerDiscreteScheduler), times[:-1]
  else:
    peer, calls = build(diffusers.FlowMatchHeunDiscreteScheduler), np.repeat(times[:-1], 2)[1:]
  peer.set_timesteps(8)
  theirs = run_diffusers(peer, process, network, x, calls)
  theirs = states_of_heun_steps(theirs) if rule == "heun" else theirs
  assert_same(trajectory(getattr(sampling, rule)(process), process, x, times), theirs, dtype)


# k-diffusion. Its state is x / alpha and its time is sigma / alpha, like x and t of our EDM process.


OURS = {"s_churn": 2.0, "s_noise": 1.003, "s_min": 0.1, "s_max": 50.0}
THEIRS = {"s_churn": 2.0, "s_noise": 1.003, "s_tmin": 0.1, "s_tmax": 50.0}
K_DIFFUSION = {
  "euler": (sampling.euler, "euler", {}),
  "euler_churn": (lambda process: sampling.euler(process, **OURS), "euler", THEIRS),
  "heun": (sampling.heun, "heun", {}),
  "heun_churn": (lambda process: sampling.heun(process, **OURS), "heun", THEIRS),
  "euler_ancestral": (sampling.euler_ancestral, "euler_ancestral", {}),
  "euler_ancestral_half": (lambda process: sampling.euler_ancestral(process, 0.5), "euler_ancestral", {"eta": 0.5}),
  "dpmpp_2s": (sampling.dpmpp_2s, "dpmpp_2s_ancestral", {"eta": 0.0}),
  "dpmpp_2s_ancestral": (lambda process: sampling.dpmpp_2s(process, 1.0), "dpmpp_2s_ancestral", {}),
  "dpmpp_2m": (sampling.dpmpp_2m, "dpmpp_2m", {}),
  "dpmpp_sde": (sampling.dpmpp_sde, "dpmpp_sde", {}),
  "dpmpp_sde_half": (lambda process: sampling.dpmpp_sde(process, 0.5), "dpmpp_sde", {"eta": 0.5}),
  "dpmpp_2m_sde": (sampling.dpmpp_2m_sde, "dpmpp_2m_sde", {}),
  "dpmpp_2m_sde_heun": (
    lambda process: sampling.dpmpp_2m_sde(process, 0.5, "heun"),
    "dpmpp_2m_sde",
    {"eta": 0.5, "solver_type": "heun"},
  ),
}
ALSO_ON_VP = ["euler_churn", "dpmpp_2s_ancestral", "dpmpp_2m", "dpmpp_sde", "dpmpp_2m_sde"]


@pytest.mark.parametrize(
  ("name", "process"),
  [pytest.param(name, EDM, id=name) for name in K_DIFFUSION]
  + [pytest.param(name, VP, id=f"{name}_on_vp") for name in ALSO_ON_VP],
)
def test_rules_match_k_diffusion(dtype, name, process):
  """All rules except Heun's (see `test_heun_matches_diffusers`) are the same in x / alpha and in x.

  They therefore agree on VP too. The churn adds noise only in a range of sigmas that excludes the first step. In this
  step on EDM, k-diffusion would add noise beyond t_max, and our rule would add none.
  """
  sampler, rule, options = K_DIFFUSION[name]
  times = sampling.grids.karras(process, 8, t_min=0.02, t_max=80.0 if process is EDM else 0.9)
  alpha = np.asarray(process.alpha(times), dtype)[:, None, None]
  x, sigmas = start(process, times[0], dtype), np.asarray(process.sigma(times), dtype) / alpha[:, 0, 0]
  noises = [noise(dtype, i) for i in range(8)]
  if rule == "dpmpp_sde":
    noises = noise_of_dpmpp_sde(sigmas, options.get("eta", 1.0), dtype)
  theirs = run_k_diffusion(getattr(k_diffusion, f"sample_{rule}"), x / alpha[0], sigmas, noises, **options)
  assert_same(trajectory(sampler(process), process, x, times), theirs * alpha, dtype)


@pytest.mark.parametrize("order", [1, 2, 3])
@in_both
def test_dpm_solver_matches_k_diffusion(dtype, order):
  """k-diffusion uses the time -log(sigma). The points inside a step are the defaults. The grid ends above 0."""
  times = sampling.grids.karras(EDM, 8, t_min=0.02)[:-1]
  x = start(EDM, times[0], dtype)
  step, states = getattr(k_diffusion.DPMSolver(k_model()), f"dpm_solver_{order}_step"), [torch.tensor(x)]
  for t, s in itertools.pairwise(-torch.tensor(times.astype(dtype)).log()):
    states.append(step(states[-1], t, s)[0])
  ours = trajectory(sampling.dpm_solver(EDM, order), EDM, x, times)
  assert_same(ours, np.stack([state.numpy() for state in states]), dtype)


@in_both
def test_dpmpp_3m_is_the_fixed_rule(dtype):
  times = sampling.grids.karras(EDM, 8, t_min=0.02).astype(dtype)
  x = start(EDM, times[0], dtype)
  theirs = run_k_diffusion(fixed_dpmpp_3m(), x, times, [], eta=0.0)
  assert_same(trajectory(sampling.dpmpp_3m(EDM), EDM, x, times), theirs, dtype)


@pytest.mark.usefixtures("x64")
def test_dpmpp_3m_is_of_order_3_and_the_peer_of_order_2():
  """The test compares our rule and k-diffusion's rule with the exact flow of Gaussian data.

  The grid starts at a large sigma, so that the lower order of the first steps has no effect.
  """
  data, x = gaussian(), 80.0 * np.linspace(-2, 2, 9)[:, None]
  exact = gaussian_flow(EDM, 0.3, 0.4, x, 80.0, 0.1)
  model, errors = as_torch(data.denoise(EDM)), []
  for n in (100, 200):
    times = np.geomspace(80.0, 0.1, n + 1)
    theirs = k_diffusion.sample_dpmpp_3m_sde(model, torch.tensor(x), torch.tensor(times), disable=True, eta=0.0)
    ours = trajectory(sampling.dpmpp_3m(EDM), EDM, x, times, data)[-1]
    errors.append([np.max(np.abs(end - exact)) for end in (theirs.numpy(), ours)])
  np.testing.assert_allclose(np.log2(np.divide(*errors)), [2, 3], atol=0.25)
