"""Build guided denoisers from a model, its conditions, other models and a rule of `guidance`."""

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

# The entry "negative_<name of a condition>" of a batch holds items of this condition to guide away from.
NEGATIVE_PREFIX = "negative_"


class Guides(NamedTuple):
  """Hold another model that guides the sampled model.

  At most one field is set.

  Attributes:
    classifier: A classifier of noisy data.
    weak: A weaker model of the same data.
  """

  classifier: Model | None = None
  weak: Model | None = None


NO_GUIDES = Guides()


class Parameters(NamedTuple):
  """Hold all parameters that sampling needs.

  Attributes:
    params: the model's parameters.
    frozen: the model's frozen parameters (see `Model.load_frozen`).
    guides: a dict by field names of `Guides`. Each entry is a pair: the guide's parameters, and its frozen parameters.
  """

  params: PyTree
  frozen: Mapping[str, PyTree] = {}
  guides: Mapping[str, tuple[PyTree, PyTree]] = {}


def argument_names(rule: Callable) -> frozenset[str]:
  """Return the argument names of a rule of guidance, such as `guidance.classifier_free`."""
  return frozenset(inspect.signature(rule).parameters)


def is_neutral(rule: Callable) -> bool:
  """Return whether a rule is `guidance.classifier_free` with a scale of 1.

  This rule leaves the conditional model unchanged.
  """
  function, options = (rule.func, rule.keywords) if isinstance(rule, functools.partial) else (rule, {})
  return function is guidance.classifier_free and options.get("scale", 1.0) == 1


def has_two_estimates(model: Model, rule: Callable) -> bool:
  """Return whether a rule of guidance uses separate estimates for data and noise, like `guidance.cfg_plus_plus`.

  Raises:
    ValueError: if the rule rejects its options.
  """
  given = conditions.example(model.conditions)

  def identity(x_t, t, given=None):
    return x_t

  def log_prob(x_t, t):
    return jnp.zeros(x_t.shape[:1])

  arguments: dict[str, Any] = {"denoise": identity, "conditional": identity, "weak": identity, "log_prob": log_prob}
  arguments |= {"condition": given, "partial": given, "negative": given}
  names = argument_names(rule)
  guided = rule(**{name: value for name, value in arguments.items() if name in names})
  estimate = jax.eval_shape(guided, jnp.zeros((1, *model.shape)), jnp.ones((1,)))
  return isinstance(estimate, Denoised) and estimate.unguided is not None


def denoise(
  model: Model,
  rule: Callable,
  keys: Array,
  batch: Mapping[str, Array],
  parameters: Parameters,
  guides: Guides = NO_GUIDES,
) -> Denoise:
  """Return the guided denoiser of a model for the conditions of a batch.

  The denoiser does not clip estimates.

  Args:
    model: the model.
    rule: A rule of `guidance` with its options.
    keys: A key for each sample [B].
    batch: the items of conditions, arrays [B, ...] by name. A missing condition gets its null value if it has one. An
      entry with the prefix "negative_" holds items to guide away from. Guidance by a classifier needs the entry
      "classes".
    parameters: the parameters of the model and the guides.
    guides: the other model that guides, if the rule uses one.
  """
  conditional, given = model.conditional(parameters.params), _encode_batch(model, keys, batch, parameters.frozen)

  def unguided(x_t, t):
    return conditional(x_t, t, given)

  if is_neutral(rule):
    return unguided
  names = argument_names(rule)
  arguments: dict[str, Any] = {"denoise": unguided, "conditional": conditional, "condition": given}
  if "negative" in names:
    negative = {
      name.removeprefix(NEGATIVE_PREFIX): value for name, value in batch.items() if name.startswith(NEGATIVE_PREFIX)
    }
    if negative:
      # Conditions that the user need not give are null, such as the aesthetic score of Stable Diffusion XL's refiner.
      rest = {name: value for name, value in batch.items() if not _is_known(model, name)}
      arguments["negative"] = _encode_batch(model, keys, {**rest, **negative}, parameters.frozen, is_negative=True)
    else:
      arguments["negative"] = model.drop_conditions(given, parameters.frozen)
    if "partial" in names:
      kept = _droppable_images(model)
      arguments["partial"] = arguments["negative"] | {name: given[name] for name in kept}
      arguments["negative"] = model.drop_conditions(arguments["negative"], parameters.frozen, names=kept)
  if "weak" in names:
    assert guides.weak is not None
    params, frozen = parameters.guides["weak"]
    weak, weak_given = guides.weak.conditional(params), _encode_batch(guides.weak, keys, batch, frozen)
    arguments["weak"] = lambda x_t, t: weak(x_t, t, weak_given)
  if "log_prob" in names:
    assert guides.classifier is not None
    log_probs = guides.classifier.classify(parameters.guides["classifier"][0])

    def log_prob(x_t, t):
      return jnp.take_along_axis(log_probs(x_t, t), batch["classes"][:, None], axis=1)[:, 0]

    arguments["log_prob"] = log_prob
  return rule(**{name: value for name, value in arguments.items() if name in names})


def _encode_batch(
  model: Model,
  keys: Array,
  batch: Mapping[str, Array],
  frozen: Mapping[str, PyTree],
  *,
  is_negative: bool = False,
) -> dict[str, PyTree]:
  """Encode the conditions of a batch.

  A condition that is missing from the batch gets its null value if it has one. There are two exceptions: images to
  enlarge, and, if `is_negative` is False, conditions whose `is_known` is True. `Condition.from_data` computes these.
  """
  missing = {
    name: condition
    for name, condition in model.conditions.items()
    if name not in batch and not condition.is_source_image and condition.null is not None
  }
  if not is_negative:
    missing = {name: condition for name, condition in missing.items() if not condition.is_known}
  present = {name: condition for name, condition in model.conditions.items() if name not in missing}
  condition_params = frozen.get("conditions", {})
  given = conditions.encode(present, condition_params, keys, batch, train=False)
  return given | conditions.null_values(missing, condition_params, keys.shape[0])


def check(
  model: Model, rule: Callable, two_estimates: bool, guides: Guides = NO_GUIDES, *, negative: bool = False
) -> None:
  """Check that a model, a rule of guidance, a sampler and a guide fit together.

  Args:
    model: the model.
    rule: A rule of `guidance` with its options.
    two_estimates: whether the sampler supports the two estimates of CFG++.
    guides: the other model that guides, if any.
    negative: whether the user gives conditions to guide away from.

  Raises:
    ValueError: if the parts do not fit together, or a required model or condition is missing.
  """
  names, is_guided = argument_names(rule), not is_neutral(rule)
  if guides.classifier is not None and guides.weak is not None:
    raise ValueError("Got --classifier and --weak; expected one guide. Leave one out.")
  for flag, name, other in (("classifier", "log_prob", guides.classifier), ("weak", "weak", guides.weak)):
    if name in names and other is None:
      raise ValueError(f"Got config.guidance={_name(rule)} without --{flag}; expected --{flag}=<run folder>.")
    if name not in names and other is not None:
      raise ValueError(
        f"Got --{flag} with config.guidance={_name(rule)}, a rule without the argument {name!r}; expected a rule with this argument. Set another rule,"
        f" or leave --{flag} out."
      )
  if guides.weak is not None and _options(rule).get("scale") == 1:
    raise ValueError(
      "Got --weak with a guidance scale of 1, which has no effect; expected another scale, such as --guidance_scale=2."
    )
  if negative and (not is_guided or "negative" not in names):
    raise ValueError(
      "Got conditions to guide away from (--negative_classes, --negative_prompt) without classifier-free guidance; expected a model with"
      " conditions and a scale such as --guidance_scale=3. Set the scale, and leave --classifier and --weak out."
    )
  if "negative" in names and is_guided:
    if not model.conditions or all(_is_shared(condition) for condition in model.conditions.values()):
      raise ValueError(
        f"Got guidance by {_name(rule)} ({_format_options(rule)}) for a model without classes or another condition to guide"
        " by; expected a conditional model, such as a run of configs/digits_cond.py. Or guide with another model: set"
        " --classifier=<run folder> or --weak=<run folder>."
      )
    if "partial" in names and not _droppable_images(model):
      raise ValueError(
        f"Got guidance by {_name(rule)} for a model without an image condition that has a null value; expected such a"
        " model, such as InstructPix2Pix. Set --config.guidance=classifier_free."
      )
    if not negative:
      given = conditions.example(model.conditions)
      jax.eval_shape(lambda frozen: model.drop_conditions(given, frozen), model.frozen_shapes())
  # This call also lets the rule check its options.
  if has_two_estimates(model, rule) and not two_estimates:
    raise ValueError(
      f"Got guidance by {_name(rule)} with a sampler that takes data and noise from the same estimate. The rule returns two"
      " estimates, one for the data and one for the noise; expected a sampler with two_estimates, without corrector steps."
      " Set --sampler=ddim, for example."
    )
  if guides.classifier is not None:
    _check_same_noise("--classifier", model, guides.classifier)
    classes, num_classes = model.conditions.get("classes"), guides.classifier.output_channels()
    if classes is not None and classes.num_choices != num_classes:
      raise ValueError(
        f"Got a classifier of {num_classes} classes for a model of {classes.num_choices} classes; expected the same number of classes."
      )
  if guides.weak is not None:
    _check_same_noise("--weak", model, guides.weak, time_input=False)
    if jax.tree.map(_shape, _shapes(model)) != jax.tree.map(_shape, _shapes(guides.weak)) or _num_choices(
      model
    ) != _num_choices(guides.weak):
      raise ValueError(
        f"Got --weak, a model with the conditions {_format_conditions(guides.weak)}, for a model with {_format_conditions(model)};"
        " expected a weak model with the same conditions."
      )


def check_sampler(model: Model, sampler: sampling.Sampler, times: Any) -> None:
  """Check that a sampler supports a model.

  For example, a sampler may need a learned variance. In this check, zeros replace the output of the model's network.

  Raises:
    ValueError: if the sampler rejects the model.
  """
  channel_factor = 2 if model.prediction.learned_variance else 1

  def sample(key):
    def apply(x, time):
      return jnp.zeros((*x.shape[:-1], channel_factor * x.shape[-1]), x.dtype)

    denoise = predictions.denoiser(apply, model.process, model.prediction, time_input=model.time_input)
    return sampling.solve(key[None], sampler, denoise, jnp.zeros((1, *model.shape)), times)

  jax.eval_shape(sample, jax.random.key(0))


def _droppable_images(model: Model) -> list[str]:
  """Return the names of image conditions that have a null value."""
  by_name = model.conditions.items()
  return [name for name, condition in by_name if condition.kind == "image" and condition.null is not None]


def _is_known(model: Model, name: str) -> bool:
  """Return whether the model has a condition with this name, and its `is_known` is True."""
  return name in model.conditions and model.conditions[name].is_known


def _is_shared(condition: Any) -> bool:
  """Return whether a condition, such as a small image, always has the same value in both branches of guidance."""
  return condition.null is None and condition.parse is None


def _num_choices(model: Model) -> dict[str, int]:
  return {name: condition.num_choices for name, condition in model.conditions.items()}


def _shapes(model: Model) -> dict[str, PyTree]:
  return {name: condition.shape for name, condition in model.conditions.items()}


def _shape(leaf: Any) -> tuple[Any, ...]:
  return (*leaf.shape, leaf.dtype)


def _format_conditions(model: Model) -> str:
  return ", ".join(f"{name} ({number})" if number else name for name, number in _num_choices(model).items()) or "none"


def _options(rule: Callable) -> Mapping[str, Any]:
  return rule.keywords if isinstance(rule, functools.partial) else {}


def _name(rule: Callable) -> str:
  return getattr(rule.func if isinstance(rule, functools.partial) else rule, "__name__", "a rule")


def _format_options(rule: Callable) -> str:
  return ", ".join(
    f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
    for name, value in _options(rule).items()
    if name != "process"
  )


def _check_same_noise(flag: str, model: Model, other: Model, *, time_input: bool = True) -> None:
  """Raise a ValueError unless a guide was trained on the same noisy data as the model."""
  if model.shape != other.shape:
    raise ValueError(
      f"Got {flag}, a model whose x has shape {other.shape}, for a model whose x has shape {model.shape}; expected the same shape."
    )
  process, other_process = model.process, other.process
  is_same = math.isclose(process.t_max, other_process.t_max)
  with jax.ensure_compile_time_eval():
    times = jnp.linspace(0.0, process.t_max, 21)[1:]
    for name in ("alpha", "sigma", "time_input") if time_input else ("alpha", "sigma"):
      first, second = (np.asarray(getattr(each, name)(times)) for each in (process, other_process))
      is_same = is_same and np.allclose(first, second, rtol=1e-3, atol=1e-4)
  if not is_same:
    raise ValueError(
      f"Got {flag}, a guide trained on another process ({_format_process(other_process)}), for a model trained on"
      f" {_format_process(process)}; expected equal alpha and sigma at each time. Train a guide with the same"
      " config.model.process."
    )


def _format_process(process: Any) -> str:
  steps = f", {process.num_steps} steps" if process.num_steps else ""
  half, end = (float(process.log_snr(jnp.asarray(share * process.t_max))) for share in (0.5, 1))
  return f"log-SNR {half:.3g} halfway and {end:.3g} at the end{steps}"
