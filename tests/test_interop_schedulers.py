"""Compare the betas, noise levels and samplers of diffusers' scheduler configs with ours, after reading and writing."""

import json

import diffusers
import jax
import numpy as np
import pytest

from ddpm_jax import predictions, processes, schedules
from ddpm_jax.interop import schedulers


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"_class_name": "PNDMScheduler"}, "class PNDMScheduler"),
    ({"thresholding": True}, "thresholding=True"),
    ({"beta_schedule": "laplace"}, "beta_schedule='laplace'"),
    ({"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
    ({"variance_type": "learned"}, "variance_type='learned'"),
    ({"steps_offset": 1}, "steps_offset=1"),
    ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, r"\('dpmsolver', 2\)"),
    ({"_class_name": "DPMSolverMultistepScheduler", "solver_type": "heun"}, "solver_type='heun'"),
    ({"_class_name": "UniPCMultistepScheduler", "use_beta_sigmas": True}, "use_beta_sigmas=True"),
    ({"_class_name": "UniPCMultistepScheduler", "disable_corrector": [0]}, r"disable_corrector=\[0\]"),
    ({"_class_name": "EulerDiscreteScheduler", "sigma_min": 0.1}, "sigma_min=0.1"),
    ({"_class_name": "DPMSolverSinglestepScheduler"}, "class DPMSolverSinglestepScheduler"),
    ({"new_option": "on"}, "new_option='on'"),
    ({"num_train_timesteps": None}, "num_train_timesteps=None; expected an integer"),
    ({"beta_start": "low"}, "beta_start='low'; expected a finite number in the range of float32"),
    ({"clip_sample_range": None}, "clip_sample_range=None"),
    ({"variance_type": 1}, "variance_type=1"),
    ({"_class_name": "DDIMScheduler", "set_alpha_to_one": False}, "set_alpha_to_one=False"),
    ({"timestep_spacing": "quadratic"}, "timestep_spacing='quadratic'"),
  ],
)
def test_unsupported_schedulers_are_refused_by_name(config, message):
  with pytest.raises(ValueError, match=message):
    schedulers.from_config(config)


CLASSES = {
  "DDPMScheduler": {"beta_schedule": "sigmoid"},
  "DDIMScheduler": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
  "DPMSolverMultistepScheduler": {"beta_schedule": "squaredcos_cap_v2"},
  "UniPCMultistepScheduler": {"num_train_timesteps": 300},
  "DEISMultistepScheduler": {"beta_end": 0.01},
  "EulerDiscreteScheduler": {},
  "EulerAncestralDiscreteScheduler": {"trained_betas": [0.1, 0.2, 0.3]},
  "HeunDiscreteScheduler": {},
}


@pytest.mark.parametrize("name", CLASSES)
def test_the_process_has_the_betas_of_the_scheduler(name):
  scheduler = getattr(diffusers, name)(**CLASSES[name])
  changed = {key: value for key, value in scheduler.config.items() if key in CLASSES[name] or key[0] == "_"}
  for config in (json.loads(scheduler.to_json_string()), {"_class_name": name, **changed}):
    schedule = schedulers.from_config(config)
    np.testing.assert_allclose(schedule.betas, scheduler.betas.numpy(), rtol=1e-4, atol=3e-7)
    n = len(schedule.betas)
    alpha_bar = np.asarray(schedule.make_process().alpha(np.arange(1, n + 1) / n)) ** 2
    np.testing.assert_allclose(alpha_bar, scheduler.alphas_cumprod.numpy(), rtol=1e-3, atol=2e-7)


@pytest.mark.parametrize(
  ("name", "options", "sampler", "spacing"),
  [
    ("DPMSolverMultistepScheduler", {}, "dpmpp_2m", "linspace_open"),
    ("DPMSolverMultistepScheduler", {"timestep_spacing": "leading"}, "dpmpp_2m", "leading_open"),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}, "dpmpp_3m", "karras"),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde", "linspace_open"),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, "dpmpp_2m", "log_snr"),
    ("UniPCMultistepScheduler", {}, "unipc", "linspace_open"),
    ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}, "unipc", "trailing"),
    ("DEISMultistepScheduler", {}, "deis", "linspace_open"),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "euler", "karras"),
    ("HeunDiscreteScheduler", {}, "heun", "linspace"),
  ],
)
def test_the_sampler_and_its_grid_match_the_scheduler(name, options, sampler, spacing):
  """The grid has the same noise levels as the steps of the peer."""
  scheduler = getattr(diffusers, name)(**options)
  schedule = schedulers.from_config(json.loads(scheduler.to_json_string()))
  assert (schedule.sampler, schedule.spacing) == (sampler, spacing)
  scheduler.set_timesteps(10)
  process = schedule.make_process()
  t = schedule.times(process)(10)[:-1]
  actual = np.asarray(process.sigma(t)) / np.asarray(process.alpha(t))
  # diffusers lists both evaluations of a Heun step. Our grid has one entry per step.
  expected = scheduler.sigmas.numpy()[:-1][:: 2 if sampler == "heun" else 1]
  assert len(actual) == len(expected) == 10
  np.testing.assert_allclose(actual, expected, rtol=1e-3)


PROCESSES = {
  "linear": lambda: processes.discrete(schedules.linear(1000)),
  "scaled_linear": lambda: processes.discrete(schedules.scaled_linear(300)),
  "squaredcos_cap_v2": lambda: processes.discrete(schedules.cosine(500)),
  "rescaled": lambda: processes.discrete(schedules.zero_terminal_snr(schedules.linear(1000))),
  "table": lambda: processes.discrete(schedules.sigmoid(100)),
}


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("clip", [None, 1.0, 2.0])
def test_saved_schedules_are_read_back_unchanged(name, clip):
  process = PROCESSES[name]()
  config = schedulers.to_config(process, predictions.V, clip=clip, variance="small")
  reloaded = schedulers.from_config(config)
  with jax.enable_x64(True):
    times = np.arange(1, process.num_steps + 1) / process.num_steps
    np.testing.assert_allclose(reloaded.make_process().alpha(times), process.alpha(times), rtol=1e-9, atol=1e-12)
  assert reloaded.make_prediction() == predictions.V
  assert reloaded.clip == clip
  assert (config["trained_betas"] is None) == (name != "table")
  if name in ("linear", "scaled_linear", "squaredcos_cap_v2"):
    assert config["beta_schedule"] == name
  # The peer accepts the config too, and has the same alphas.
  config.pop("_class_name")
  alpha_bar = diffusers.DDPMScheduler(**config).alphas_cumprod.numpy()
  np.testing.assert_allclose(alpha_bar, np.asarray(process.alpha(times.astype(np.float32))) ** 2, rtol=2e-3, atol=1e-6)


def test_a_continuous_model_becomes_a_table_at_its_time_inputs():
  """The discrete model has the log-SNR of the continuous model at each time input."""
  process = processes.vp()
  discrete = schedulers.from_config(schedulers.to_config(process, predictions.EPS)).make_process()
  steps = np.arange(1, 1001)
  inputs = np.asarray(discrete.time_input(steps / 1000))
  np.testing.assert_allclose(inputs, steps - 1, atol=1e-3)
  times = np.maximum(inputs / 999, 1e-3)
  np.testing.assert_allclose(discrete.log_snr(steps / 1000), process.log_snr(times), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("process", [processes.ve(), processes.edm(), processes.rectified_flow(), processes.sub_vp()])
def test_processes_unknown_to_diffusers_are_errors(process):
  with pytest.raises(ValueError, match="cannot sample"):
    schedulers.to_config(process, predictions.EPS)
