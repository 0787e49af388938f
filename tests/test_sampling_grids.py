"""Test the ends and the spacing of grids of times, and compare them with diffusers."""

import functools

import diffusers
import jax
import numpy as np
import pytest

from ddpm_jax import processes, sampling
from tests.oracles import PROCESSES, ZERO_SNR
from tests.samplers import SAMPLERS

GRIDS = {
  "uniform": sampling.grids.uniform,
  "quadratic": sampling.grids.quadratic,
  "log_snr": sampling.grids.log_snr,
  "karras": sampling.grids.karras,
  "flow_match": functools.partial(sampling.grids.flow_match, shift=3.0),
  "trailing": sampling.grids.trailing,
  "leading": sampling.grids.leading,
  "linspace": sampling.grids.linspace,
}


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", GRIDS)
def test_grids_decrease_from_the_prior_to_0(name, process):
  process_name, process = process, PROCESSES[process]
  if process.num_steps is None and name in ("trailing", "leading", "linspace"):
    with pytest.raises(ValueError, match="continuous process"):
      GRIDS[name](process, 10)
    return
  if name in ("log_snr", "karras") and process_name in ZERO_SNR:
    with pytest.raises(ValueError, match="zero terminal SNR.*t_max, such as 0.999"):
      GRIDS[name](process, 10)
    assert GRIDS[name](process, 10, t_max=0.999)[0] == 0.999
    return
  # log_snr and karras pad the times to a multiple of 512, and compile a program for each multiple.
  for steps in (2, 7, 50, 500 if name in ("log_snr", "karras") else 999):
    times = GRIDS[name](process, steps)
    assert times.shape == (steps + 1,)
    assert times.dtype == np.float64
    assert times[-1] == 0
    assert np.all(np.diff(times) < 0)
    assert times[0] == process.t_max or name == "leading"
  with pytest.raises(ValueError, match="num_steps=0"):
    GRIDS[name](process, 0)
  if process.num_steps:
    ends = process._replace(t_max=0.999)
    assert GRIDS[name](ends, 10)[0] <= 0.999, "the error at zero SNR recommends this t_max"


def test_discrete_grids_equal_the_grids_of_diffusers():
  """The reference is DDPMScheduler.set_timesteps. For n training steps, its integer timestep at time t is n t - 1."""
  process, n = PROCESSES["discrete_linear"], 1000
  for steps in (3, 10, 30, 50):
    timesteps = {
      "trailing": np.round(np.arange(n, 0, -n / steps)) - 1,
      "leading": (np.arange(0, steps) * (n // steps)).round()[::-1],
      "linspace": np.linspace(0, n - 1, steps).round()[::-1],
    }
    for name, expected in timesteps.items():
      np.testing.assert_allclose(GRIDS[name](process, steps)[:-1] * n - 1, expected, atol=1e-9)


def test_discrete_grids_may_end_above_0_and_have_an_offset():
  """The reference is diffusers' schedulers. For n training steps, their integer timestep at time t is n t - 1."""
  process, n = PROCESSES["discrete_linear"], 1000
  for steps in (1, 3, 10, 30, 50):
    expected = (np.arange(0, steps) * (n // steps)).round()[::-1] + 1
    if steps < 1000:
      np.testing.assert_allclose(GRIDS["leading"](process, steps, offset=1)[:-1] * n - 1, expected, atol=1e-9)
    expected = (np.arange(0, steps + 1) * (n // (steps + 1))).round()[::-1][:-1] + 1
    grid = GRIDS["leading"](process, steps, offset=1, open_end=True, end_step=1)
    np.testing.assert_allclose(grid * n - 1, [*expected, 0], atol=1e-9)
    if steps > 1:
      expected = np.linspace(0, n - 1, steps)[::-1]
      grid = GRIDS["linspace"](process, steps, rounded=False)
      np.testing.assert_allclose(grid * n - 1, [*expected, -1], atol=1e-9)
      # The step from 1 to 1 has no length.
      np.testing.assert_allclose(GRIDS["linspace"](process, steps, rounded=False, end_step=1), grid[:-1])
    for name, options in (("trailing", {}), ("leading", {"offset": 2})):
      ends = GRIDS[name](process, steps, **options)
      np.testing.assert_array_equal(GRIDS[name](process, steps, **options, end_step=2), [*ends[:-1], 2 / n])
  # With one step for each step of the process, the last two times are equal, and one is left out.
  np.testing.assert_array_equal(GRIDS["trailing"](process, n, end_step=1), GRIDS["trailing"](process, n)[:-1])


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda process: GRIDS["leading"](process, 1000, offset=1), "offset=1 with num_steps=1000; expected an offset from 0 to 0"),
    (lambda process: GRIDS["leading"](process, 10, offset=-1), "offset=-1.*expected an offset from 0 to 99"),
    (lambda process: GRIDS["leading"](process, 10, end_step=2), "end_step=2.*expected a step from 0 to 1"),
    (lambda process: GRIDS["trailing"](process, 10, end_step=-1), "end_step=-1"),
    (lambda process: GRIDS["trailing"](process, 1, end_step=1000), "end_step=1000.*below the first one"),
    (lambda process: GRIDS["linspace"](process, 10, end_step=0.5), "end_step=0.5"),
  ],
)  # fmt: skip
def test_wrong_ends_of_discrete_grids_are_errors(make, message):
  with pytest.raises(ValueError, match=message):
    make(PROCESSES["discrete_linear"])


def test_log_snr_and_karras_grids_are_even_in_their_own_variable():
  process = processes.vp()
  with jax.enable_x64(True):
    spacing = np.diff(process.log_snr(sampling.grids.log_snr(process, 20)[:-1]))
    np.testing.assert_allclose(spacing, spacing[0], rtol=1e-6)
    times = sampling.grids.karras(process, 20)[:-1]
    spacing = np.diff((process.sigma(times) / process.alpha(times)) ** (1 / 7))
    np.testing.assert_allclose(spacing, spacing[0], rtol=1e-6)
  with pytest.raises(ValueError, match="t_min=0"):
    sampling.grids.log_snr(process, 10, t_min=0.0)


def test_wrong_options_of_grids_are_errors():
  for rho in (0, -1, float("nan")):
    with pytest.raises(ValueError, match=f"rho={rho}"):
      sampling.grids.karras(processes.vp(), 10, rho=rho)
  with pytest.raises(ValueError, match="num_steps=1; expected 2"):
    sampling.grids.linspace(PROCESSES["discrete_linear"], 1)
  with pytest.raises(ValueError, match="t_max=0.9985"):
    sampling.grids.trailing(PROCESSES["discrete_linear"]._replace(t_max=0.9985), 10)


@pytest.mark.parametrize("shift", [0.4, 1.0, 1.7, 3.0])
def test_flow_match_shifts_the_times_once(shift):
  """The reference is equation 23 of Esser et al. 2024."""
  flow = processes.rectified_flow()
  for steps in (1, 5, 28):
    sigmas = np.linspace(1, 0, steps + 1)
    expected = shift * sigmas / (1 + (shift - 1) * sigmas)
    np.testing.assert_allclose(sampling.grids.flow_match(flow, steps, shift=shift), expected, atol=1e-14)
  np.testing.assert_array_equal(sampling.grids.flow_match(flow, 9), sampling.grids.uniform(flow, 9))
  part = sampling.grids.flow_match(flow, 6, shift=shift, t_min=0.04, t_max=0.8)
  spacing = np.diff(part[:-1] / (part[:-1] + shift * (1 - part[:-1])))
  np.testing.assert_allclose(spacing, spacing[0])
  assert (part[0], part[-2], part[-1], len(part)) == (0.8, 0.04, 0.0, 7)
  # A process with another t_max has the same grid in t / t_max.
  np.testing.assert_allclose(
    sampling.grids.flow_match(PROCESSES["edm"], 7, shift=shift), 80 * sampling.grids.flow_match(flow, 7, shift=shift)
  )


@pytest.mark.parametrize("steps", [1, 4, 28, 50, 1000])
@pytest.mark.parametrize(
  ("config", "mu"),
  [
    ({}, None),
    ({"shift": 3.0}, None),
    ({"shift": 0.5, "num_train_timesteps": 100}, None),
    ({"shift": 3.0, "shift_terminal": 0.1}, None),
    ({"use_dynamic_shifting": True, "shift": 3.0}, 1.15),
    ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 0.7),
    ({"use_dynamic_shifting": True, "shift_terminal": 0.02}, 0.5),
  ],
)
def test_flow_match_diffusers_equals_the_grid_of_diffusers(steps, config, mu):
  """diffusers computes in float32."""
  if steps == 1 and "shift_terminal" in config:
    return  # diffusers divides by 0, and ours raises an error
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
  scheduler.set_timesteps(steps, mu=mu)
  names = {"num_train_timesteps": "num_train_steps"}
  options = {names.get(name, name): value for name, value in config.items() if name != "use_dynamic_shifting"}
  got = sampling.grids.flow_match_diffusers(processes.rectified_flow(), steps, mu=mu, **options)
  np.testing.assert_allclose(got, scheduler.sigmas.numpy(), rtol=1e-5, atol=1e-6)
  time_input = processes.rectified_flow().time_input(got[:-1]) * config.get("num_train_timesteps", 1000) / 1000
  np.testing.assert_allclose(time_input, scheduler.timesteps.numpy(), rtol=1e-5, atol=1e-3)
  assert np.all(np.diff(got) < 0)


def test_a_dynamic_shift_is_a_shift_by_the_exponential():
  flow, steps, mu = processes.rectified_flow(), 20, 0.9
  got = sampling.grids.flow_match_diffusers(flow, steps, mu=mu)
  np.testing.assert_allclose(got, sampling.grids.flow_match(flow, steps, shift=np.exp(mu), t_min=got[-2]), atol=1e-14)
  assert sampling.grids.flow_match_diffusers(flow, 28, shift=3.0)[-2] == pytest.approx(0.008929, abs=5e-7)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"shift": 0.0}, "shift=0.0; expected a finite number above 0"),
    ({"shift": float("inf")}, "shift=inf"),
    ({"mu": 0.0, "time_shift_type": "linear"}, "mu=0.0.*above 0"),
    ({"mu": 100.0}, "mu=100.0.*between -50 and 50"),
    ({"time_shift_type": "cosine"}, "time_shift_type='cosine'; expected 'exponential' or 'linear'"),
    ({"shift_terminal": 1.0}, "shift_terminal=1.0"),
    ({"shift_terminal": 0.1, "num_steps": 1}, "num_steps=1.*at least 2"),
    ({"num_steps": 0}, "num_steps=0"),
    ({"num_train_steps": 1}, "num_train_steps=1"),
    ({"process": processes.edm()}, "t_max=80; expected times in \\[0, 1\\]"),
  ],
)
def test_wrong_options_of_flow_matching_are_errors(options, message):
  options = {"process": processes.rectified_flow(), "num_steps": 10} | options
  with pytest.raises(ValueError, match=message):
    sampling.grids.flow_match_diffusers(**options)
  if "shift" in options:
    with pytest.raises(ValueError, match=message):
      sampling.grids.flow_match(**options)


def test_quadratic_is_even_in_the_root():
  times = sampling.grids.quadratic(processes.vp(), 10, t_min=0.01)
  np.testing.assert_allclose(np.diff(np.sqrt(times[:-1])), -0.1)
  assert times[-1] == 0


@pytest.mark.parametrize("name", ["uniform", "quadratic", "log_snr", "karras"])
def test_a_grid_of_part_of_the_times_has_its_ends(name):
  times = GRIDS[name](processes.vp(), 5, t_min=0.1, t_max=0.6)
  assert (times[0], times[-2], times[-1], len(times)) == (0.6, 0.1, 0.0, 6)
  for t_min, t_max in ((0.5, 0.5), (0.1, 1.5), (-0.1, 1.0)):
    with pytest.raises(ValueError, match="t_min"):
      GRIDS[name](processes.vp(), 5, t_min=t_min, t_max=t_max)


# EVEN_IN_TIME has the rules with a default grid that is even in time, except on EDM. DEFAULT_GRIDS has, for each
# process, the default grid of these rules and of the other rules.
EVEN_IN_TIME = (
  "ancestral", "ancestral_large", "euler_ancestral", "euler_maruyama", "reverse_diffusion", "sde", "sde_decreasing",
  "langevin_ancestral", "multistep_consistency",
)  # fmt: skip
DDIM = ("ddim", "ddim_half", "ddim_one", "plms")
DEFAULT_GRIDS = {
  "vp": ("uniform to t_min", "log_snr"),
  "sub_vp": ("uniform to t_min", "log_snr"),
  "ve": ("uniform to t_min", "log_snr"),
  "cosine": ("uniform to t_min", "log_snr"),
  "edm": ("karras", "karras"),
  "rectified_flow": ("uniform to t_min", "uniform"),
  "gvp": ("uniform to t_min", "uniform"),
  "shifted": ("uniform to t_min", "uniform"),
  "discrete_linear": ("trailing", "log_snr"),
  "discrete_cosine": ("trailing", "log_snr"),
  "zero_snr": ("trailing", "trailing"),
}


@pytest.mark.parametrize("process", PROCESSES)
def test_every_rule_has_its_default_grid(process):
  even_grid, other_grid = DEFAULT_GRIDS[process]
  process = PROCESSES[process]
  makers = GRIDS | {"uniform to t_min": lambda p, n: sampling.grids.uniform(p, n, t_min=p.t_min)}
  for name, make in SAMPLERS.items():
    # DDIM and PLMS also use the training steps of a discrete model.
    expected_grid = even_grid if name in EVEN_IN_TIME or (name in DDIM and process.num_steps) else other_grid
    got = sampling.grids.for_sampler(make(process), process, 7)
    np.testing.assert_array_equal(got, makers[expected_grid](process, 7), err_msg=name)
    has_short_step = name in EVEN_IN_TIME and not process.num_steps
    assert sampling.grids.default_t_min(make(process), process) == (process.t_min if has_short_step else 0)


@pytest.mark.parametrize(("process", "last"), [("vp", 1e-3), ("ve", 1e-3), ("edm", 0.002), ("discrete_linear", 1e-3)])
def test_a_rule_that_chooses_its_own_steps_gets_only_the_ends(process, last):
  process = PROCESSES[process]
  rule = sampling.ode(process)
  for steps in (1, 1000):
    np.testing.assert_array_equal(sampling.grids.for_sampler(rule, process, steps), [process.t_max, last, 0])
  short = processes.discrete(np.array([0.5]))
  np.testing.assert_array_equal(sampling.grids.for_sampler(sampling.ode(short), short, 5), [1, 0])
  with pytest.raises(ValueError, match="spacing='even'; expected 'time', 'log_snr' or 'ends'"):
    sampling.grids.for_sampler(rule._replace(spacing="even"), process, 5)
