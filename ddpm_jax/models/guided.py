"""A model led to what samples are to show: its conditions, other models beside it, and a rule of `guidance` that joins them."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import guidance, predictions, sampling
from ddpm_jax.models import conditions
from ddpm_jax.models.model import Model
from ddpm_jax.predictions import Denoise, Denoised

Array = jax.Array
PyTree = Any

# Names of what is asked for, of samples that are to show something else than this.
NEGATIVE_PREFIX = "negative_"


class Guides(NamedTuple):
  """Other models that guide, at most one of them.

  Attributes:
    classifier: tells the classes of noisy data apart.
    weak: a weaker model of the same data.
  """

  classifier: Model | None = None
  weak: Model | None = None


# No other model guides.
NO_GUIDES = Guides()


class Parameters(NamedTuple):
  """All parameters that samples follow from.

  Attributes:
    params: the model's.
    frozen: its frozen ones (`Model.load_frozen`).
    guides: those of each guide by its name in `Guides`: pairs of parameters and frozen ones.
  """

  params: PyTree
  frozen: Mapping[str, PyTree] = {}
  guides: Mapping[str, tuple[PyTree, PyTree]] = {}


def argument_names(rule: Callable) -> frozenset[str]:
  """Return what a rule of guidance takes: names of `classifier_free` and the like, and of `classifier` or `autoguidance`."""
  return frozenset(inspect.signature(rule).parameters)


def is_neutral(rule: Callable) -> bool:
  """Return whether a rule leaves the conditional model as it is."""
  function, options = (rule.func, rule.keywords) if isinstance(rule, functools.partial) else (rule, {})
  return function is guidance.classifier_free and options.get("scale", 1.0) == 1


def has_two_estimates(model: Model, rule: Callable) -> bool:
  """Return whether a rule of guidance gives two estimates, of data and of noise, as `guidance.cfg_plus_plus` does.

  Raises:
    ValueError: if the rule refuses its options.
  """
  given = conditions.example(model.conditions)

  def nothing(x_t, t, given=None):
    return x_t

  def log_prob(x_t, t):
    return jnp.zeros(x_t.shape[:1])

  offered: dict[str, Any] = {"denoise": nothing, "conditional": nothing, "weak": nothing, "log_prob": log_prob}
  offered |= {"condition": given, "negative": given}
  names = argument_names(rule)
  made = rule(**{name: value for name, value in offered.items() if name in names})
  found = jax.eval_shape(made, jnp.zeros((1, *model.shape)), jnp.ones((1,)))
  return isinstance(found, Denoised) and found.unguided is not None


def denoise(
  model: Model,
  rule: Callable,
  keys: Array,
  batch: Mapping[str, Array],
  parameters: Parameters,
  guides: Guides = NO_GUIDES,
) -> Denoise:
  """Return the denoiser of a model, given its conditions and guided; its estimates are not clipped.

  Args:
    model: the model.
    rule: a rule of `guidance` with its options.
    keys: a key for each sample [B].
    batch: what is asked for, arrays [B, ...] by the names of conditions; one that is missing stands for none, if it can. With "negative_" before
      the name what is to be guided away from.
    parameters: all of them.
    guides: the other models.
  """
  conditional, given = model.conditional(parameters.params), _given(model, keys, batch, parameters.frozen)

  def alone(x_t, t):
    return conditional(x_t, t, given)

  if is_neutral(rule):
    return alone
  names = argument_names(rule)
  offered: dict[str, Any] = {"denoise": alone, "conditional": conditional, "condition": given}
  if "negative" in names:
    unwanted = {
      name.removeprefix(NEGATIVE_PREFIX): value for name, value in batch.items() if name.startswith(NEGATIVE_PREFIX)
    }
    if unwanted:
      offered["negative"] = _given(model, keys, {**batch, **unwanted}, parameters.frozen)
    else:
      offered["negative"] = model.drop_conditions(given, parameters.frozen)
  if "weak" in names:
    assert guides.weak is not None
    params, frozen = parameters.guides["weak"]
    weak, weak_given = guides.weak.conditional(params), _given(guides.weak, keys, batch, frozen)
    offered["weak"] = lambda x_t, t: weak(x_t, t, weak_given)
  if "log_prob" in names:
    assert guides.classifier is not None
    log_probs = guides.classifier.classify(parameters.guides["classifier"][0])

    def log_prob(x_t, t):
      return jnp.take_along_axis(log_probs(x_t, t), batch["classes"][:, None], axis=1)[:, 0]

    offered["log_prob"] = log_prob
  return rule(**{name: value for name, value in offered.items() if name in names})


def _given(model: Model, keys: Array, batch: Mapping[str, Array], frozen: Mapping[str, PyTree]) -> dict[str, PyTree]:
  """Return what the network is given; a condition that the batch lacks stands for none, if it can."""
  missing = {
    name: one
    for name, one in model.conditions.items()
    if name not in batch and not one.is_source_image and one.null is not None
  }
  asked = {name: one for name, one in model.conditions.items() if name not in missing}
  own = frozen.get("conditions", {})
  found = conditions.encode(asked, own, keys, batch, train=False)
  return found | conditions.null_values(missing, own, keys.shape[0])


def check(
  model: Model, rule: Callable, two_estimates: bool, guides: Guides = NO_GUIDES, *, negative: bool = False
) -> None:
  """Raise a ValueError unless a model can be guided by a rule.

  Args:
    model: the model.
    rule: a rule of `guidance` with its options.
    two_estimates: whether the sampler knows CFG++'s two estimates.
    guides: the other models.
    negative: whether something is asked to be guided away from.
  """
  names, guided = argument_names(rule), not is_neutral(rule)
  if guides.classifier is not None and guides.weak is not None:
    raise ValueError("Got --classifier and --weak; expected one guide.")
  for flag, name, other in (("classifier", "log_prob", guides.classifier), ("weak", "weak", guides.weak)):
    if name in names and other is None:
      raise ValueError(f"Got config.guidance={_name(rule)} without --{flag}; expected --{flag}=<run folder> beside it.")
    if name not in names and other is not None:
      raise ValueError(
        f"Got --{flag} with config.guidance={_name(rule)}, which does not take {name}; expected a rule that does."
      )
  if guides.weak is not None and _options(rule).get("scale") == 1:
    raise ValueError("Got --weak with a guidance scale of 1, which does not guide; expected --guidance_scale=2 or so.")
  if negative and (not guided or "negative" not in names):
    raise ValueError(
      "Got what to guide away from (--negative_classes) without classifier-free guidance; expected a model with conditions and"
      " --guidance_scale=3 or so, without another guide."
    )
  if "negative" in names and guided:
    if not model.conditions or all(_is_shared(condition) for condition in model.conditions.values()):
      raise ValueError(
        f"Got guidance by {_name(rule)} ({_shown(rule)}) for a model that was trained without conditions to guide by; expected one of"
        " configs/*_cond.py, or a guide: --classifier=<run folder> or --weak=<run folder>."
      )
    if not negative:
      given = conditions.example(model.conditions)
      jax.eval_shape(lambda frozen: model.drop_conditions(given, frozen), model.frozen_shapes())
  # Which lets the rule check its own options too.
  if has_two_estimates(model, rule) and not two_estimates:
    raise ValueError(
      f"Got guidance by {_name(rule)}, which takes data and noise from two estimates, for a sampler that knows one; expected --sampler=ddim or"
      " another of sampling.Sampler with two_estimates, without corrector steps."
    )
  if guides.classifier is not None:
    _check_same_noise("--classifier", model, guides.classifier)
    own, known = model.conditions.get("classes"), guides.classifier.output_channels()
    if own is not None and own.num_choices != known:
      raise ValueError(
        f"Got a classifier of {known} classes for a model of {own.num_choices}; expected the same classes."
      )
  if guides.weak is not None:
    _check_same_noise("--weak", model, guides.weak, time_input=False)
    if jax.tree.map(_shape, _shapes(model)) != jax.tree.map(_shape, _shapes(guides.weak)) or _numbers(
      model
    ) != _numbers(guides.weak):
      raise ValueError(
        f"Got --weak, a model of the conditions {_conditions(guides.weak)}, for one of {_conditions(model)}; expected one that takes the"
        " same."
      )


def check_sampler(model: Model, sampler: sampling.Sampler, times: Any) -> None:
  """Let a sampler refuse a model that lacks what it takes, such as a learned variance, by a network that stands in for the model's."""
  twice = 2 if model.prediction.learned_variance else 1

  def draw(key):
    def apply(x, time):
      return jnp.zeros((*x.shape[:-1], twice * x.shape[-1]), x.dtype)

    denoise = predictions.denoiser(apply, model.process, model.prediction, time_input=model.time_input)
    return sampling.solve(key[None], sampler, denoise, jnp.zeros((1, *model.shape)), times)

  jax.eval_shape(draw, jax.random.key(0))


def _is_shared(condition: Any) -> bool:
  """Return whether a condition is the same in both branches of guidance whatever was trained, as a small image is."""
  return condition.null is None and condition.parse is None


def _numbers(model: Model) -> dict[str, int]:
  return {name: condition.num_choices for name, condition in model.conditions.items()}


def _shapes(model: Model) -> dict[str, PyTree]:
  return {name: condition.shape for name, condition in model.conditions.items()}


def _shape(leaf: Any) -> tuple[Any, ...]:
  return (*leaf.shape, leaf.dtype)


def _conditions(model: Model) -> str:
  return ", ".join(f"{name} ({number})" if number else name for name, number in _numbers(model).items()) or "none"


def _options(rule: Callable) -> Mapping[str, Any]:
  return rule.keywords if isinstance(rule, functools.partial) else {}


def _name(rule: Callable) -> str:
  return getattr(rule.func if isinstance(rule, functools.partial) else rule, "__name__", "a rule")


def _shown(rule: Callable) -> str:
  return ", ".join(
    f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
    for name, value in _options(rule).items()
    if name != "process"
  )


def _check_same_noise(flag: str, model: Model, other: Model, *, time_input: bool = True) -> None:
  """Raise a ValueError unless a guide knows the noisy data that the model makes."""
  if model.shape != other.shape:
    raise ValueError(
      f"Got {flag}, a model of data of shape {other.shape}, for one of {model.shape}; expected the same shape."
    )
  a, b = model.process, other.process
  same = math.isclose(a.t_max, b.t_max)
  with jax.ensure_compile_time_eval():
    times = jnp.linspace(0.0, a.t_max, 21)[1:]
    for name in ("alpha", "sigma", "time_input") if time_input else ("alpha", "sigma"):
      first, second = (np.asarray(getattr(process, name)(times)) for process in (a, b))
      same = same and np.allclose(first, second, rtol=1e-3, atol=1e-4)
  if not same:
    raise ValueError(
      f"Got {flag}, a model trained on another process ({_process(b)}), for one trained on {_process(a)}; expected the same noise at every"
      " time. Train one with the same config.model.process."
    )


def _process(process: Any) -> str:
  steps = f", {process.num_steps} steps" if process.num_steps else ""
  half, end = (float(process.log_snr(jnp.asarray(share * process.t_max))) for share in (0.5, 1))
  return f"log-SNR {half:.3g} halfway and {end:.3g} at the end{steps}"
