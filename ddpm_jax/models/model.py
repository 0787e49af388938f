"""Define `Model`, which holds all parts of a diffusion model except its parameters."""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import guidance, predictions
from ddpm_jax.models import conditions as conditions_module
from ddpm_jax.models.codecs import Codec, frozen_shapes, load_frozen
from ddpm_jax.models.conditions import Condition
from ddpm_jax.models.networks import Network
from ddpm_jax.predictions import Denoise, Prediction
from ddpm_jax.processes import Process
from ddpm_jax.sampling import Sampler

Array = jax.Array
PyTree = Any


class SamplingDefaults(NamedTuple):
  """Hold the default sampler of a model, and the settings of this sampler.

  Attributes:
    name: the sampler's name, for messages and reports.
    sampler: the step rule.
    times: `times(num_steps) -> grid` returns num_steps + 1 times. For a scheduler of diffusers whose last step would
      have length 0, this step is left out, and the grid has only num_steps times.
    steps: the number of steps.
    clip: A wrapper of the denoiser that clips its estimates, such as `guidance.clip`. None leaves the estimates
      unchanged.
    guidance_scale: the scale of classifier-free guidance.
    scheduler: the scheduler config of a model that was read from a folder in diffusers' format. `interop` needs the
      config to save the model in this format. None for other models.
  """

  name: str
  sampler: Sampler
  times: Callable[[int], np.ndarray]
  steps: int
  clip: Callable[[Denoise], Denoise] | None = None
  guidance_scale: float = 1.0
  scheduler: Mapping[str, Any] | None = None


class Model(NamedTuple):
  """Hold everything that defines a diffusion model, except its parameters.

  Attributes:
    network: the functions of the network.
    process: the forward process.
    prediction: the meaning of the network's output.
    conditions: the conditions by name.
    codec: the conversion between data and x, the array that the network denoises.
    data_shape: the shape of one sample of data, such as [H, W, C].
    shape: the shape of one sample of x.
    time_input: A function from times to the network's time input. None uses the process's function.
    defaults: the default sampler and its settings. None if the model has no defaults.
    origin: for a model that was read from a pipeline, the pipeline's parts. `interop` needs them to save the model in
      the same format. None for other models.
  """

  network: Network
  process: Process
  prediction: Prediction
  conditions: Mapping[str, Condition]
  codec: Codec
  data_shape: tuple[int, ...]
  shape: tuple[int, ...]
  time_input: Callable[[Array], Array] | None = None
  defaults: SamplingDefaults | None = None
  origin: Any = None

  def init(self, key: Array) -> PyTree:
    """Initialize the parameters of the network."""
    x, time = jnp.zeros((1, *self.shape)), jnp.zeros((1,))
    return self.network.init(key, x, time, conditions_module.example(self.conditions))

  def load_frozen(self, mesh: jax.sharding.Mesh | None = None) -> dict[str, PyTree]:
    """Read the frozen parameters of the codec and the conditions from their sources.

    Args:
      mesh: the devices over which the parameters are sharded (see `codecs.load_frozen`). None for the default device.

    Returns:
      A dict `{"codec": ..., "conditions": {name: ...}}`, with entries only for parts that have frozen parameters.
    """
    return self._read_frozen(lambda load: load_frozen(load, mesh))

  def frozen_shapes(self) -> dict[str, PyTree]:
    """Return the shapes of the parameters that `load_frozen` reads."""
    return self._read_frozen(frozen_shapes)

  def _read_frozen(self, read: Callable[[Callable[[], PyTree]], PyTree]) -> dict[str, PyTree]:
    # A condition that uses the codec has the codec's loader, so both share the parameters.
    read = functools.cache(read)
    frozen = {} if self.codec.load is None else {"codec": read(self.codec.load)}
    by_name = {name: read(condition.load) for name, condition in self.conditions.items() if condition.load is not None}
    return frozen | ({"conditions": by_name} if by_name else {})

  def encode_conditions(
    self, keys: Array, batch: Mapping[str, Array], frozen: Mapping[str, PyTree] | None = None, *, train: bool = False
  ) -> dict[str, PyTree]:
    """Encode the conditions of a batch, and return their values by name (see `conditions.encode`)."""
    return conditions_module.encode(self.conditions, (frozen or {}).get("conditions", {}), keys, batch, train=train)

  def drop_conditions(
    self,
    given: Mapping[str, PyTree],
    frozen: Mapping[str, PyTree] | None = None,
    *,
    names: Collection[str] | None = None,
  ) -> dict[str, PyTree]:
    """Return `given` with conditions replaced by their null values (see `conditions.drop`)."""
    return conditions_module.drop(self.conditions, (frozen or {}).get("conditions", {}), given, names)

  def encode(self, keys: Array, data: Array, frozen: Mapping[str, PyTree] | None = None) -> Array:
    """Convert data [B, ...] to x, with a key for each sample [B]."""
    return self.codec.encode((frozen or {}).get("codec"), keys, data)

  def expand(self, keys: Array, compact: Array, frozen: Mapping[str, PyTree] | None = None) -> Array:
    """Convert entries [B, ...] of a latent data set to x, with a key for each sample [B].

    Raises:
      ValueError: if the codec has no latent data sets.
    """
    if self.codec.expand is None:
      raise ValueError(
        "Got an entry of a latent data set for a codec that does not support latent data sets; expected the original data."
        " Pass the data to `encode`."
      )
    return self.codec.expand((frozen or {}).get("codec"), keys, compact)

  def decode(self, x: Array, frozen: Mapping[str, PyTree] | None = None) -> Array:
    """Convert x [B, ...] to data."""
    return self.codec.decode((frozen or {}).get("codec"), x)

  def conditional(self, params: PyTree) -> guidance.Conditional:
    """Return `conditional(x_t, t, given) -> x_0 estimate`, for rules of guidance.

    Raises:
      ValueError: if x_0 cannot be computed from the prediction at the process's t_max. The returned function raises
        a ValueError if `given` does not match the conditions.
    """
    predictions.check_prediction(self.process, self.prediction)

    def conditional(x_t, t, given):
      conditions_module.check_given(self.conditions, given)

      def apply(x, time):
        return self.network.apply(params, x, time, given)

      return predictions.denoiser(apply, self.process, self.prediction, time_input=self.time_input)(x_t, t)

    return conditional

  def denoise(self, params: PyTree, given: Mapping[str, PyTree] | None = None, *, clip: bool = True) -> Denoise:
    """Return `denoise(x_t, t) -> x_0 estimate`, for samplers.

    Args:
      params: the parameters of the network.
      given: the values of the conditions by name, arrays [B, ...].
      clip: whether to clip estimates with `defaults.clip`, if the model has it.

    Raises:
      ValueError: if `given` does not match the conditions, or x_0 cannot be computed from the prediction at the
        process's t_max.
    """
    conditional, values = self.conditional(params), dict(given or {})
    conditions_module.check_given(self.conditions, values)

    def denoise(x_t, t):
      return conditional(x_t, t, values)

    return self.defaults.clip(denoise) if clip and self.defaults and self.defaults.clip else denoise

  def classify(self, params: PyTree) -> Callable[[Array, Array], Array]:
    """Return `log_probs(x_t, t) -> log p(class | x_t)` [B, K], for a network that assigns noisy data to K classes."""

    def apply(x, time):
      return self.network.apply(params, x, time, {})

    scale = self.prediction.input_scale
    return predictions.classifier(apply, self.process, time_input=self.time_input, input_scale=scale)

  def output_channels(self) -> int:
    """Return the size of the last axis of the network's output.

    For a classifier, it is the number of classes.
    """

    def call(key):
      x, time, given = jnp.zeros((1, *self.shape)), jnp.zeros((1,)), conditions_module.example(self.conditions)
      return self.network.apply(self.init(key), x, time, given)

    return jax.eval_shape(call, jax.random.key(0)).shape[-1]

  def times(self, num_steps: int) -> np.ndarray:
    """Return the model's default grid of times [num_steps + 1].

    Raises:
      ValueError: if the model has no defaults.
    """
    if self.defaults is None:
      raise ValueError(
        "Got a model without defaults; expected a model with a default grid. Use a grid of sampling.grids instead."
      )
    return self.defaults.times(num_steps)
