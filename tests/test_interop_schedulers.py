"""Test reading and writing diffusers' scheduler configs: betas, noise levels and samplers."""

import inspect
import json

import diffusers
import jax
import numpy as np
import pytest

from ddpm_jax import predictions, processes, schedules
from ddpm_jax.interop import scheduler_classes, schedulers


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"_class_name": "KarrasVeScheduler"}, "class KarrasVeScheduler"),
    ({"_class_name": "PNDMScheduler"}, "PNDMScheduler with skip_prk_steps=False.*expected True"),
    ({"thresholding": True}, "thresholding=True"),
    ({"beta_schedule": "laplace"}, "beta_schedule='laplace'"),
    ({"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
    ({"variance_type": "learned"}, "variance_type='learned'"),
    ({"steps_offset": -1}, "steps_offset=-1; expected 0 or more"),
    ({"steps_offset": 1.5}, "steps_offset=1.5; expected an integer"),
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
    ({"_class_name": "DDIMScheduler", "set_alpha_to_one": "no"}, "set_alpha_to_one='no'"),
    ({"_class_name": "EulerDiscreteScheduler", "interpolation_type": "log_linear"}, "interpolation_type='log_linear'"),
    ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type='continuous'"),
    ({"_class_name": "UniPCMultistepScheduler", "final_sigmas_type": "sigma_min"}, "final_sigmas_type='sigma_min'"),
    ({"_class_name": 1}, "_class_name=1"),
    ({"timestep_spacing": "quadratic"}, "timestep_spacing='quadratic'"),
  ],
)
def test_unsupported_schedulers_are_refused_by_name(config, message):
  with pytest.raises(ValueError, match=message):
    schedulers.from_config(config)


@pytest.mark.parametrize("name", scheduler_classes.CLASSES)
def test_the_options_of_each_class_are_those_of_the_peer(name):
  """Our reader ignores options that a class does not have, because published configs contain such options."""
  signature = inspect.signature(getattr(diffusers, name).__init__).parameters
  options = scheduler_classes.CLASSES[name].options
  assert options == {key: one.default for key, one in signature.items() if key != "self"}
  required = SKIP if name == "PNDMScheduler" else {}
  unread = {key: value for key, value in ANY_OPTIONS.items() if key not in options}
  schedule, same = (schedulers.from_config({"_class_name": name} | required | more) for more in ({}, unread))
  np.testing.assert_array_equal(schedule.betas, same.betas)
  assert schedule._replace(betas=None, config=None) == same._replace(betas=None, config=None)


SKIP = {"skip_prk_steps": True}
# Options that change what a class computes, if it has them.
ANY_OPTIONS = {
  "clip_sample": True,
  "set_alpha_to_one": False,
  "skip_prk_steps": False,
  "thresholding": True,
  "use_karras_sigmas": True,
  "final_sigmas_type": "sigma_min",
  "rescale_betas_zero_snr": True,
  "solver_order": 3,
  "interpolation_type": "log_linear",
}
CLASSES = {
  "DDPMScheduler": {"beta_schedule": "sigmoid"},
  "DDIMScheduler": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
  "DPMSolverMultistepScheduler": {"beta_schedule": "squaredcos_cap_v2"},
  "UniPCMultistepScheduler": {"num_train_timesteps": 300},
  "PNDMScheduler": SKIP | {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
  "DEISMultistepScheduler": {"beta_end": 0.01},
  "EulerDiscreteScheduler": {"rescale_betas_zero_snr": True, "beta_schedule": "scaled_linear"},
  "EulerAncestralDiscreteScheduler": {"trained_betas": [0.1, 0.2, 0.3]},
  "HeunDiscreteScheduler": {},
}


@pytest.mark.parametrize("name", CLASSES)
def test_the_process_has_the_betas_of_the_scheduler(name):
  scheduler = getattr(diffusers, name)(**CLASSES[name])
  changed = {key: value for key, value in scheduler.config.items() if key in CLASSES[name] or key[0] == "_"}
  for config in (json.loads(scheduler.to_json_string()), {"_class_name": name, **changed}):
    schedule = schedulers.from_config(config)
    betas = scheduler.betas.numpy()
    if name == "EulerDiscreteScheduler":  # sets the last alpha_bar to 2^-24, but not the last beta
      betas[-1] = 1 - scheduler.alphas_cumprod[-1] / scheduler.alphas_cumprod[-2]
    np.testing.assert_allclose(schedule.betas, betas, rtol=1e-4, atol=3e-7)
    n = len(schedule.betas)
    alpha_bar = np.asarray(schedule.make_process().alpha(np.arange(1, n + 1) / n)) ** 2
    np.testing.assert_allclose(alpha_bar, scheduler.alphas_cumprod.numpy(), rtol=1e-3, atol=2e-7)


@pytest.mark.parametrize(
  ("name", "options", "sampler"),
  [
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}, "dpmpp_3m"),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde"),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, "dpmpp_2m"),
    ("DPMSolverMultistepScheduler", {"solver_order": 1}, "ddim"),
    ("UniPCMultistepScheduler", {}, "unipc"),
    ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}, "unipc"),
    ("DEISMultistepScheduler", {"use_karras_sigmas": True}, "deis"),
    ("DEISMultistepScheduler", {}, "deis"),
    ("HeunDiscreteScheduler", {"use_exponential_sigmas": True}, "heun"),
  ],
)
def test_the_sampler_and_its_grid_match_the_scheduler(name, options, sampler):
  """The grid has the same noise levels as the steps of diffusers' scheduler.

  `test_interop_scheduler_steps` compares the samples of other configs.
  """
  scheduler = getattr(diffusers, name)(**options)
  schedule = schedulers.from_config(json.loads(scheduler.to_json_string()))
  assert schedule.sampler == sampler
  scheduler.set_timesteps(10)
  process = schedule.make_process()
  t = schedule.defaults(process).times(10)
  actual = np.asarray(process.sigma(t)) / np.asarray(process.alpha(t))
  expected = scheduler.sigmas.numpy()
  if sampler == "heun":  # diffusers lists both evaluations of a step
    expected = np.append(expected[:-1:2], expected[-1])
  # The peer's last step may have no length.
  expected = expected[: len(expected) - (expected[-1] == expected[-2])]
  assert len(actual) == len(expected)
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


FOLDERS = {
  "sd_1": {"_class_name": "PNDMScheduler", "steps_offset": 1, "clip_sample": False, **SKIP},
  "sd_2": {
    "_class_name": "DDIMScheduler",
    "set_alpha_to_one": False,
    "prediction_type": "v_prediction",
    "clip_sample": False,
  },
  "sdxl": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", **SKIP, "set_alpha_to_one": False},
}


@pytest.mark.parametrize("name", FOLDERS)
def test_the_scheduler_of_a_folder_is_written_back(name):
  """The scheduler is replaced only if it disagrees with the model or with an argument of `to_config`."""
  source = FOLDERS[name] | {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
  schedule = schedulers.from_config(source)
  process, prediction = schedule.make_process(), schedule.make_prediction()
  written = schedulers.to_config(process, prediction, clip=None, source=source)
  assert written.items() >= source.items()
  reloaded = schedulers.from_config(written)
  np.testing.assert_array_equal(reloaded.betas, schedule.betas)
  assert reloaded._replace(betas=None, config=None) == schedule._replace(betas=None, config=None)
  # The peer accepts the config too.
  peer = getattr(diffusers, source["_class_name"]).from_config(written)
  assert peer.config.items() >= {key: peer.config[key] for key in source}.items()
  for changes in (
    {"clip": 1.0},
    {"spacing": "trailing"},
    {"process": processes.discrete(schedules.linear(1000))},
    {"prediction": predictions.X0},
  ):
    arguments = {"process": process, "prediction": prediction, "clip": None, "source": source} | changes
    assert schedulers.to_config(**arguments, name="DDIMScheduler")["_class_name"] == "DDIMScheduler"
    assert schedulers.from_config(schedulers.to_config(**arguments)).clip == arguments["clip"]


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
