"""Test every sampler and wrapper under JAX's strict settings, for all float types, with and without x64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import editing, floats, guidance, likelihood, losses, predictions, sampling
from tests import commands
from tests.oracles import MIXTURE, PREDICTIONS, PROCESSES
from tests.samplers import SAMPLERS

X64 = {"float32": False, "bfloat16": False, "float16": False, "float32 in x64": True, "float64": True}
KEY = jax.eval_shape(lambda: jax.random.key(0))


# Types that behave almost like another type, so their tests are marked as slow.
RARE = ("float16", "float32 in x64")


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow if name in RARE else ()) for name in X64])
def dtype(request):
  """Return a dtype for the data, and apply JAX's strict settings."""
  with (
    jax.enable_x64(X64[request.param]),
    jax.numpy_dtype_promotion("strict"),
    jax.numpy_rank_promotion("raise"),
  ):
    yield jnp.dtype(request.param.partition(" ")[0])


def type_of(function, dtype, shape=(4, 2)):
  """Return the dtype of the result of `function(key, x)` for an x of type `dtype`.

  This neither compiles nor runs the function.
  """
  return jax.eval_shape(function, KEY, jax.ShapeDtypeStruct(shape, dtype)).dtype


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_keeps_the_type_of_the_data(name, dtype):
  process = PROCESSES["vp"]
  times = sampling.grids.uniform(process, 3)
  for grid in (times, np.asarray(times, np.float32)):

    def sample(key, x, grid=grid):
      return sampling.sample(key, SAMPLERS[name](process), MIXTURE.denoise(process), x, grid)

    assert type_of(sample, dtype) == dtype


def samples_of(make_sampler):
  def sample(key, x, process):
    times = sampling.grids.uniform(process, 3)
    return sampling.sample(key, make_sampler(process), MIXTURE.denoise(process), x, times)

  return sample


def estimate_of(make_denoiser):
  def estimate(key, x, process):
    return make_denoiser(MIXTURE.denoise(process), process)(x, process.t_max / 2)

  return estimate


def conditional(denoise):
  return lambda x, t, condition: denoise(x, t)


def samples_of_cfg_plus_plus(key, x, process):
  denoise = guidance.cfg_plus_plus(conditional(MIXTURE.denoise(process)), CLASSES, CLASSES, 0.6)
  return sampling.sample(key, sampling.euler(process), denoise, x, sampling.grids.uniform(process, 3))


KNOWN, KEEP, CLASSES = np.zeros(2, np.float32), np.array([True, False]), jnp.zeros(4, jnp.int32)
FUNCTIONS = {
  "replace": samples_of(lambda process: editing.replace(sampling.heun(process), process, KNOWN, KEEP)),
  "repaint": samples_of(lambda process: editing.repaint(sampling.ancestral(process), process, KNOWN, KEEP, 2, 2)),
  "dps": samples_of(lambda process: editing.dps(sampling.ddim(process), process, lambda x: x[:, :1], KNOWN[:1])),
  "posterior": estimate_of(
    lambda denoise, process: editing.posterior(denoise, process, lambda x: x[:, :1], KNOWN[:1], 0.1)
  ),
  "clip": estimate_of(lambda denoise, process: guidance.clip(denoise)),
  "dynamic_threshold": estimate_of(lambda denoise, process: guidance.dynamic_threshold(denoise)),
  "classifier_free": estimate_of(
    lambda denoise, process: guidance.classifier_free(conditional(denoise), CLASSES, CLASSES, 2.0, rescale=0.5)
  ),
  "interval": estimate_of(
    lambda denoise, process: guidance.classifier_free(
      conditional(denoise), CLASSES, CLASSES, guidance.interval(process, 2.0, 0.1, 5.0)
    )
  ),
  "classifier": estimate_of(
    lambda denoise, process: guidance.classifier(denoise, lambda x, t: jnp.sum(x, axis=1), process, 2.0)
  ),
  "one_scale_per_sample": estimate_of(
    lambda denoise, process: guidance.classifier_free(
      conditional(denoise), CLASSES, CLASSES, lambda t: jnp.linspace(0.0, 3.0, 4, dtype=jnp.float32)
    )
  ),
  "cfg_plus_plus": samples_of_cfg_plus_plus,
  "autoguidance": estimate_of(lambda denoise, process: guidance.autoguidance(denoise, denoise)),
  "prior": lambda key, x, process: process.prior(key, x.shape, x.dtype),
  "posterior_of_a_step": lambda key, x, process: process.posterior(x, x, 0.5, 0.25)[0],
  "img2img": lambda key, x, process: editing.img2img(
    key, sampling.ddim(process), MIXTURE.denoise(process), process, x, sampling.grids.uniform(process, 4), 0.5
  ),
  "interpolate": lambda key, x, process: editing.interpolate(
    sampling.ddim(process), MIXTURE.denoise(process), process, x, x, sampling.grids.uniform(process, 4), [0.0, 0.5]
  ),
  "integrate": lambda key, x, process: sampling.integrate(process, MIXTURE.denoise(process), x, 1.0, 1e-3)[0],
  "ode": lambda key, x, process: sampling.solve(
    jax.random.split(key, 4), sampling.ode(process), MIXTURE.denoise(process), x, np.array([1.0, 1e-3, 0.0])
  )[0],
  "wrapped_ode": samples_of(
    lambda process: editing.repaint(sampling.with_langevin(sampling.ode(process), process), process, KNOWN, KEEP, 2, 2)
  ),
  "solve": lambda key, x, process: sampling.solve(
    key, sampling.heun(process), MIXTURE.denoise(process), x, sampling.grids.uniform(process, 3)
  )[0],
}


@pytest.mark.parametrize("process", ["vp", "discrete_linear"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_keeps_the_type_of_the_data(name, process, dtype):
  assert type_of(lambda key, x: FUNCTIONS[name](key, x, PROCESSES[process]), dtype) == dtype


@pytest.mark.parametrize("prediction", ["EPS", "V", "VELOCITY", "edm"])
def test_losses_and_likelihoods_have_at_least_32_bits(prediction, dtype):
  prediction, process = PREDICTIONS[prediction], PROCESSES["discrete_linear"]
  learned = predictions.learned_range(prediction)

  def denoise(x, t):
    return x / 2

  def apply_learned_variance(x, t):
    return jnp.concatenate([x, x], -1)

  times = losses.uniform(process)
  functions = [
    lambda key, x: losses.denoising_loss(key, denoise, process, prediction, x, times=times)[0],
    lambda key, x: losses.hybrid_loss(key, apply_learned_variance, process, learned, x, times=times)[0],
    lambda key, x: losses.classification_loss(key, denoise, process, x, CLASSES, times=times)[0],
    lambda key, x: likelihood.variational_bound(key, process, denoise, x, num_evaluations=8).bits,
    lambda key, x: likelihood.continuous_bound(key, process, denoise, x, num_evaluations=4).bits,
    lambda key, x: likelihood.ode_bits(key, process, denoise, x).bits,
    lambda key, x: likelihood.ode_bits(key, process, denoise, x, exact_trace=True, reverse_mode=True).bits,
  ]
  for function in functions:
    assert jnp.finfo(type_of(function, dtype)).bits >= 32


def test_numbers_and_arrays_are_widened():
  assert floats.widest() == floats.widest(np.int64(3), jnp.bfloat16(1)) == jnp.float32
  a, b = floats.widen(jnp.bfloat16(1.5), np.arange(2))
  assert a.dtype == b.dtype == jnp.float32
  with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
    assert floats.widest(jnp.float32(1), np.float64(1)) == jnp.float64


def test_a_run_works_under_the_strict_settings(tmp_path):
  strict = {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}
  likelihoods = "('bound','continuous','ode')"
  options = (
    commands.RECIPE,
    f"--workdir={tmp_path}",
    "--config.training.steps=2",
    "--config.evaluation.num_samples=10",
    "--config.evaluation.features=classifier",
    "--config.evaluation.classifier_steps=2",
    f"--config.evaluation.likelihood={likelihoods}",
    "--config.evaluation.likelihood_images=2",
    "--config.evaluation.bound_steps=4",
    "--config.evaluation.likelihood_tolerance=0.1",
    "--config.sampler=unipc",
  )
  code, output = commands.call(*options, **strict)
  assert code == 0, output
