"""Test samplers with guided denoisers: CFG++ as in its paper, and every wrapper with every rule."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import guidance, processes, sampling
from tests.samplers import DISTINCT, REPRESENTATIVE, SAMPLERS, run
from tests.test_guidance import NONE, component, conditional, log_posterior, repeat_class
from tests.test_sampling import TRACES


def cfg_plus_plus(process, model, x, times, c, scale):
  """Sample with algorithm 2 of Chung et al. 2024, for any alpha and sigma."""

  @jax.jit
  def step(x, t, s):
    alpha_t, alpha_s = process.alpha(t), process.alpha(s)
    sigma_t, sigma_s = process.sigma(t), process.sigma(s)
    noise = [(x - alpha_t * model(x, t, repeat_class(k, len(x)))) / sigma_t for k in (c, NONE)]
    guided = noise[1] + scale * (noise[0] - noise[1])
    return alpha_s * (x - sigma_t * guided) / alpha_t + sigma_s * noise[1]

  for t, s in itertools.pairwise(times):
    x = step(x, t, s)
  return x


@pytest.mark.parametrize("scale", [0.0, 0.4, 1.0])
def test_cfg_plus_plus_equals_the_algorithm_of_the_paper(scale, x64):
  process = processes.vp()
  x = jax.random.normal(jax.random.key(0), (40, 2), jnp.float64)
  times = sampling.grids.uniform(process, 12)
  model = conditional(process)
  denoise = guidance.cfg_plus_plus(model, repeat_class(0, 40), repeat_class(NONE, 40), scale)
  expected = cfg_plus_plus(process, model, x, times, 0, scale)
  for sampler in (sampling.ddim(process), sampling.euler(process)):
    np.testing.assert_allclose(run(sampler, denoise, x, times), expected, rtol=1e-6, atol=1e-8)
  # A step of CFG++ equals a step of DDIM with classifier-free guidance, if the scale depends on the step.
  step = times[3], times[4]
  (alpha_t, alpha_s), (sigma_t, sigma_s) = (
    np.asarray(process.alpha(np.asarray(step))),
    np.asarray(process.sigma(np.asarray(step))),
  )
  guided_by_step = guidance.classifier_free(
    model, repeat_class(0, 40), repeat_class(NONE, 40), scale / (1 - sigma_s * alpha_t / (alpha_s * sigma_t))
  )
  np.testing.assert_allclose(
    run(sampling.ddim(process), denoise, x, np.array(step)),
    run(sampling.ddim(process), guided_by_step, x, np.array(step)),
    rtol=1e-6,
  )


@pytest.mark.parametrize("name", ["ddim_half", "ancestral", "heun", "dpmpp_2m", "unipc_3", "deis_3", "langevin_heun"])
def test_cfg_plus_plus_is_refused_by_rules_that_would_ignore_its_noise(name):
  process = processes.vp()
  denoise = guidance.cfg_plus_plus(conditional(process), repeat_class(0, 4), repeat_class(NONE, 4), 0.5)
  times = sampling.grids.uniform(process, 4)
  if name == "ddim_half":  # DDIM uses the noise, so it accepts CFG++.
    assert np.all(np.isfinite(run(SAMPLERS[name](process), denoise, jnp.ones((4, 2)), times)))
    return
  with pytest.raises(ValueError, match=r"CFG\+\+"):
    run(SAMPLERS[name](process), denoise, jnp.ones((4, 2)), times)


def wrapped(process, trace):
  """Return a dict that maps the name of each guidance wrapper to a wrapped denoiser.

  Each call of the network appends its batch size to `trace`.
  """
  model = conditional(process)

  def counted(x_t, t, classes):
    trace.append(len(x_t))
    return model(x_t, t, classes)

  target, none = repeat_class(0, 4), repeat_class(NONE, 4)

  def unconditional(x_t, t):
    return counted(x_t, t, none)

  return {
    "classifier_free": guidance.classifier_free(counted, target, none, 3.0, rescale=0.5),
    "autoguidance": guidance.autoguidance(unconditional, component(0).denoise(process), 2.0),
    "classifier": guidance.classifier(unconditional, functools.partial(log_posterior, process, 0), process, 2.0),
    "clip": guidance.clip(unconditional),
    "dynamic_threshold": guidance.dynamic_threshold(unconditional, 0.9),
  }


WRAPPERS = ("classifier_free", "classifier", "autoguidance", "clip", "dynamic_threshold")


# By default every rule runs with one wrapper, and every wrapper with several rules. The other pairs are marked as slow.
ROTATION = {name: WRAPPERS[i % len(WRAPPERS)] for i, name in enumerate(DISTINCT)}
# A sampler treats all denoisers alike, so most rules run with the first wrapper only, and are only traced with the
# other wrappers. These rules run with all wrappers.
RUN_WITH_ALL = (*REPRESENTATIVE, "heun_churn")


@pytest.mark.parametrize(
  ("name", "wrapper"),
  [
    pytest.param(name, wrapper, marks=[] if ROTATION[name] == wrapper else pytest.mark.slow)
    for name in DISTINCT
    for wrapper in WRAPPERS
  ],
)
def test_every_wrapper_works_with_every_sampler_and_is_traced_once_per_call_site(name, wrapper):
  process, trace = processes.vp(), []
  times, x = sampling.grids.uniform(process, 5, t_min=1e-3), jnp.ones((4, 2))
  sampler, denoise = SAMPLERS[name](process), wrapped(process, trace)[wrapper]
  if wrapper == WRAPPERS[0] or name in RUN_WITH_ALL:
    got = run(sampler, denoise, x, times)
    assert np.all(np.isfinite(got))
  else:
    got = jax.eval_shape(lambda x: sampling.sample(jax.random.key(0), sampler, denoise, x, times), x)
  assert (got.shape, got.dtype) == (x.shape, x.dtype)
  assert len(trace) == TRACES.get(name, 1)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapper_works_with_the_adaptive_ode(wrapper):
  process = processes.vp()
  denoise = wrapped(process, [])[wrapper]
  x, _ = jax.jit(lambda x: sampling.integrate(process, denoise, x, 1.0, 1e-3, rtol=1e-3, atol=1e-3))(jnp.ones((4, 2)))
  assert np.all(np.isfinite(x))
