"""Test that configs compile with every sampler, and that samples depend neither on the batch nor on the devices."""

import itertools
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.config import slots, spec
from ddpm_jax.config.sections import Root, keys_of
from ddpm_jax.devices import parallel
from ddpm_jax.models.guided import Parameters
from ddpm_jax.runs import programs
from tests.conftest import ROOT
from tests.parameters import random_params
from tests.recipes import experiment_of, tiny_config

# The usual prediction for each process. Samplers are tested on these processes in rotation.
USUAL = {
  "discrete": "V",
  "vp": "EPS",
  "sub_vp": "SCORE",
  "ve": "SCORE",
  "edm": "edm",
  "rectified_flow": "VELOCITY",
  "cosine": "V",
}
SAMPLERS = slots.names(next(key.slot for key in keys_of(Root) if key.name == "sampler"))
PAIRS = [*zip(SAMPLERS, itertools.cycle(USUAL), strict=False), ("ode", "discrete"), ("ancestral", "zero_snr")]
# Compile one step rule and the adaptive solver for two batch sizes, and the other samplers for one.
IN_TWO_SIZES = ("ddim", "ode")
ARGUMENTS = {"ode": {"rtol": 1e-3, "atol": 1e-3}, "with_langevin": {"sampler": spec("sampling.ddim")}}


def one_device():
  return parallel.make_mesh(devices=jax.devices()[:1])


def config_of(sampler, process):
  config = tiny_config()
  if process == "zero_snr":
    betas = spec("schedules.zero_terminal_snr", betas=spec("schedules.linear"))
    config.model.process = spec("processes.discrete", betas=betas)
  else:
    betas = {"betas": spec("schedules.linear")} if process == "discrete" else {}
    config.model.process = spec(f"processes.{process}", **betas)
    config.model.prediction = spec(f"predictions.{USUAL[process]}")
  config.sampler = spec(f"sampling.{sampler}", **ARGUMENTS.get(sampler, {}))
  config.sampling.update({"num_steps": 5, "batch_size": 8})
  config.model.conditions.classes = spec("conditions.classes", number=3)
  return config


@pytest.mark.parametrize(("sampler", "process"), PAIRS)
def test_samples_of_every_sampler_do_not_depend_on_the_batch(sampler, process, dense):
  """Samples with equal keys are equal in another batch and at another index."""
  config = config_of(sampler, process)
  parameters, mesh = Parameters(random_params(config)), one_device()
  generate = programs.generate(experiment_of(config), mesh)
  classes = np.arange(16, dtype=np.int32) % 3
  samples, nfe = generate(parameters, 1, 0, {"classes": classes[:8]})
  size = 4 if sampler in IN_TWO_SIZES else 8
  if size != 8:
    config.sampling.batch_size = size
    generate = programs.generate(experiment_of(config), mesh)
  shifted, _ = generate(parameters, 1, 4, {"classes": classes[4 : 4 + size]})
  assert samples.shape == (8, 8, 8, 1)
  assert jnp.all(jnp.isfinite(samples))
  assert np.max(np.abs(samples[4:] - samples[:4])) > 0.01
  difference = np.abs(samples[4:] - shifted[:4])
  # Batches of other sizes round differently. If this changes the solver's steps, samples differ by its tolerance.
  assert np.mean(difference) < 1e-3 if sampler == "ode" else np.max(difference) < 1e-4
  calls = {"heun": 9, "dpmpp_2s": 9, "dpmpp_sde": 9, "dpm_solver": 13 if process != "rectified_flow" else 11, "plms": 6}
  assert np.all(nfe == calls.get(sampler, 10 if sampler == "with_langevin" else 5)) or sampler == "ode"


def test_samples_are_bit_for_bit_equal_on_any_number_of_devices():
  config = runpy.run_path(str(ROOT / "configs" / "digits_vp.py"))["get_config"]()
  config.sampling.num_steps = 4
  params, each = random_params(config), 4

  def samples(mesh):
    config.sampling.batch_size = each * mesh.size
    laid_out = Parameters(jax.device_put(params, parallel.state_shardings(mesh, params)))
    return np.asarray(programs.generate(experiment_of(config), mesh)(laid_out, 0, 0, {})[0][:each])

  one = samples(one_device())
  for fsdp in (1, 4):
    np.testing.assert_array_equal(samples(parallel.make_mesh(fsdp=fsdp)), one)


def test_the_ancestral_sampler_uses_a_learned_variance(dense):
  config = tiny_config()
  config.model.prediction = spec("predictions.learned_range", prediction=spec("predictions.V"))
  ancestral = spec("sampling.ancestral", variance="learned")
  config.sampler = spec("sampling.with_langevin", sampler=ancestral, num_steps=1)
  config.sampling.update({"num_steps": 4, "batch_size": 4})
  parameters = Parameters(random_params(config))
  images, nfe = programs.generate(experiment_of(config), one_device())(parameters, 0, 0, {})
  assert images.shape == (4, 8, 8, 1)
  assert np.all(nfe == 8)
