"""Check that an argument of a wrong type gives one clear message before anything is traced."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import editing, guidance, likelihood, losses, predictions, processes, sampling, schedules
from ddpm_jax.arguments import check_types

KEY, X, TIMES = jax.random.key(0), jnp.zeros((4, 2)), np.array([1.0, 0.5, 0.0])
PROCESS = processes.vp()
DDIM, CLASSES = sampling.ddim(PROCESS), jnp.zeros(4, jnp.int32)
UNCALLED = (
  "Got the function processes.vp as process of {}; expected a Process, such as processes.vp(). Call processes.vp(...)"
)


def denoise(x, t):
  return x


def loss(prediction=predictions.EPS, x_0=X, **options):
  options = {"times": losses.uniform(PROCESS)} | options
  return losses.denoising_loss(KEY, denoise, PROCESS, prediction, x_0, **options)


def hybrid(x_0):
  process, learned = processes.discrete(np.full(4, 0.1)), predictions.learned_range(predictions.EPS)
  return losses.hybrid_loss(KEY, lambda x, t: jnp.tile(x, 2), process, learned, x_0, times=losses.uniform(process))


def classify(x_0):
  classes = CLASSES[: len(x_0)]
  return losses.classification_loss(KEY, denoise, PROCESS, x_0, classes, times=losses.uniform(PROCESS))


EMPTY = "Got data of shape (0, 2); expected a batch [B, ...] of at least one sample."
WRONG = {
  "empty batch": (lambda: loss(x_0=X[:0]), EMPTY),
  "empty batch, hybrid": (lambda: hybrid(X[:0]), EMPTY),
  "empty batch, classes": (lambda: classify(X[:0]), EMPTY),
  "empty batch, likelihood": (lambda: likelihood.ode_bits(KEY, PROCESS, denoise, X[:0]), EMPTY),
  "list, loss": (
    lambda: loss(x_0=[1.0]),
    "Got a list as x_0 of losses.denoising_loss; expected an array, such as jnp.",
  ),
  "list, sample": (
    lambda: sampling.sample(KEY, DDIM, denoise, [1.0], TIMES),
    "Got a list as x of sampling.sample; expected",
  ),
  "number, sample": (lambda: sampling.sample(KEY, DDIM, denoise, 1.0, TIMES), "Got a float as data; expected an array"),
  "number, loss": (lambda: loss(x_0=1.0), "Got a float as data; expected an array"),
  "list, ode": (lambda: sampling.integrate(PROCESS, denoise, [1.0], 1.0, 0.1), "Got a list as x of sampling.integrate"),
  "list, slerp": (lambda: editing.slerp([1.0], [1.0], 0.5), "Got a list as a of editing.slerp"),
  "list, likelihood": (
    lambda: likelihood.ode_bits(KEY, PROCESS, denoise, [1.0]),
    "Got a list as x_0 of likelihood.ode_bits",
  ),
  "string as x": (lambda: loss(x_0="images"), "Got 'images' as x_0 of losses.denoising_loss; expected an array"),
  "sampler": (
    lambda: sampling.sample(KEY, sampling.ddim, denoise, X, TIMES),
    "Got the function sampling.ddim as sampler of sampling.sample; expected a Sampler, such as sampling.ddim(process). Call sampling.ddim(...)",
  ),
  "sampler's name": (lambda: sampling.sample(KEY, "ddim", denoise, X, TIMES), "Got 'ddim' as sampler"),
  "nfe": (
    lambda: sampling.nfe(sampling.heun, PROCESS, TIMES),
    "Got the function sampling.heun as sampler of sampling.nfe",
  ),
  "with_langevin": (lambda: sampling.with_langevin(sampling.ddim, PROCESS), "as sampler of sampling.with_langevin"),
  "invert": (lambda: editing.invert(sampling.ddim, denoise, PROCESS, X, TIMES), "as sampler of editing.invert"),
  "repaint": (lambda: editing.repaint(sampling.ancestral, PROCESS, X, X > 0), "as sampler of editing.repaint"),
  "process": (lambda: sampling.ddim(processes.vp), UNCALLED.format("sampling.ddim")),
  "process, grid": (lambda: sampling.grids.log_snr(processes.vp, 4), UNCALLED.format("sampling.grids.log_snr")),
  "process, times": (lambda: losses.uniform(processes.vp), UNCALLED.format("losses.uniform")),
  "process, weighting": (lambda: losses.likelihood(processes.vp), UNCALLED.format("losses.likelihood")),
  "process, denoiser": (
    lambda: predictions.denoiser(denoise, processes.vp, predictions.EPS),
    UNCALLED.format("predictions.denoiser"),
  ),
  "process, interval": (lambda: guidance.interval(processes.vp, 2.0), UNCALLED.format("guidance.interval")),
  "process, replace": (lambda: editing.replace(DDIM, processes.vp, X, X > 0), UNCALLED.format("editing.replace")),
  "process, bound": (
    lambda: likelihood.continuous_bound(KEY, processes.vp, denoise, X),
    UNCALLED.format("likelihood.continuous_bound"),
  ),
  "schedule uncalled": (
    lambda: processes.discrete(schedules.linear),
    "Got the function linear as betas; expected a table of numbers. Pass the result of a schedule, such as schedules.linear(1000).",
  ),
  "schedule's name": (
    lambda: schedules.zero_terminal_snr("linear"),
    "Got 'linear' as betas; expected a table of numbers",
  ),
  "process's name": (lambda: sampling.heun("vp"), "Got 'vp' as process of sampling.heun; expected a Process"),
  "prediction's name": (
    lambda: loss("eps"),
    "Got 'eps' as prediction of losses.denoising_loss; expected a Prediction, such as predictions.EPS.",
  ),
  "prediction uncalled": (
    lambda: loss(predictions.edm),
    "Got the function predictions.edm as prediction of losses.denoising_loss; expected a Prediction, such as predictions.EPS. Call"
    " predictions.edm(...)",
  ),
  "learned_range": (lambda: predictions.learned_range("v"), "Got 'v' as prediction of predictions.learned_range"),
  "times uncalled": (lambda: loss(times=losses.uniform), "itself as an argument, call it first: losses.uniform(...)"),
  "times' name": (
    lambda: loss(times="uniform"),
    "Got 'uniform' as times of losses.denoising_loss; expected a function.",
  ),
  "weighting uncalled": (
    lambda: loss(weighting=losses.min_snr),
    "Got an array of shape (4,) as gamma of losses.min_snr; expected a number. If you passed losses.min_snr itself as an argument, call"
    " it first: losses.min_snr(...).",
  ),
  "weighting's name": (lambda: loss(weighting="min_snr"), "Got 'min_snr' as weighting"),
  "network's output": (
    lambda: losses.denoising_loss(KEY, X, PROCESS, predictions.EPS, X, times=losses.uniform(PROCESS)),
    "Got an array of shape (4, 2) as apply of losses.denoising_loss; expected a function.",
  ),
  "estimate": (
    lambda: sampling.sample(KEY, DDIM, X, X, TIMES),
    "Got an array of shape (4, 2) as denoise of sampling.sample",
  ),
  "swapped": (
    lambda: sampling.sample(KEY, denoise, DDIM, X, TIMES),
    "Got the function denoise as sampler of sampling.sample",
  ),
  "two denoisers": (
    lambda: guidance.classifier_free(denoise, denoise, 2.0),
    "in a condition; expected arrays [B, ...]",
  ),
  "two estimates": (
    lambda: guidance.classifier_free(X, X, 2.0),
    "Got an array of shape (4, 2) as conditional of guidance.classifier_free; expected a function.",
  ),
  "scale for a condition": (lambda: guidance.classifier_free(denoise, CLASSES, 2.0), "Got 2.0 in a condition"),
  "cfg_plus_plus": (lambda: guidance.cfg_plus_plus(denoise, denoise, 0.6), "in a condition"),
  "scale's name": (
    lambda: guidance.classifier_free(denoise, CLASSES, CLASSES, "3"),
    "Got '3' as scale of guidance.classifier_free; expected a number or a function.",
  ),
  "autoguidance": (
    lambda: guidance.autoguidance(denoise, 2.0),
    "Got 2.0 as weak of guidance.autoguidance; expected a function.",
  ),
  "clip's arguments": (lambda: guidance.clip(X), "Got an array of shape (4, 2) as denoise of guidance.clip"),
  "dps": (lambda: editing.dps(DDIM, PROCESS, X, X), "Got an array of shape (4, 2) as operator of editing.dps"),
  "number": (lambda: sampling.ddim(PROCESS, "1"), "Got '1' as eta of sampling.ddim; expected a number."),
  "beta": (lambda: processes.vp("0.1"), "Got '0.1' as beta_min of processes.vp; expected a number."),
  "None": (lambda: sampling.ddim(PROCESS, None), "Got None as eta of sampling.ddim; expected a number."),
  "string": (lambda: sampling.ancestral(PROCESS, 1), "Got 1 as variance of sampling.ancestral; expected a string."),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_argument_of_a_wrong_type_gives_one_message(name):
  call, message = WRONG[name]
  with pytest.raises(ValueError, match=re.escape(message)):
    call()


def test_public_functions_check_the_types_of_their_arguments():
  """All public functions that take a process, a prediction or a sampler have the decorator `check_types`."""
  nouns = {processes.Process, predictions.Prediction, sampling.Sampler}
  for package in (predictions, guidance, losses, sampling, sampling.grids, editing, likelihood):
    public = getattr(package, "__all__", None) or [
      name for name, value in vars(package).items() if getattr(value, "__module__", "") == package.__name__
    ]
    internal = {"coefficients", "network_input", "apply_network", "check_prediction"}
    for name in {name for name in public if name[0] != "_"} - internal:
      function = getattr(package, name)
      kinds = getattr(function, "__annotations__", {})
      if callable(function) and not isinstance(function, type) and nouns & {*kinds.values()} - {kinds.get("return")}:
        assert hasattr(function, "__wrapped__"), f"{package.__name__}.{name} lacks @check_types"


def test_numbers_and_arrays_of_every_type_are_accepted():
  @check_types
  def function(process: processes.Process, x: jax.Array, eta: float = 0.0, t: float | None = None, name: str = ""):
    return eta

  assert function(PROCESS, X, np.float32(0.5)) == 0.5
  assert function(PROCESS, np.zeros(3), jnp.ones(()), t=1) == 1
  assert jax.jit(lambda eta: function(PROCESS, X, eta))(2.0) == 2
  with pytest.raises(TypeError, match=r"function\(\) missing 1 required positional argument: 'x'"):
    function(PROCESS)
