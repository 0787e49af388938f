"""`Model`: all that a diffusion model is, as one value that is made once and passed on."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import guidance, predictions
from ddpm_jax.models import conditions as conditions_module
from ddpm_jax.models.codecs import Codec, frozen_shapes
from ddpm_jax.models.conditions import Condition
from ddpm_jax.models.networks import Network
from ddpm_jax.predictions import Denoise, Prediction
from ddpm_jax.processes import Process
from ddpm_jax.sampling import Sampler

Array = jax.Array
PyTree = Any


class SamplingDefaults(NamedTuple):
  """How a model is sampled if nobody says otherwise.

  Attributes:
    name: of the sampler, for people to read.
    sampler: the step rule.
    times: `times(num_steps) -> grid` [num_steps + 1].
    steps: how many.
    clip: wraps the denoiser, such as `guidance.clip`; None for nothing.
  """

  name: str
  sampler: Sampler
  times: Callable[[int], np.ndarray]
  steps: int
  clip: Callable[[Denoise], Denoise] | None = None


class Model(NamedTuple):
  """A diffusion model: its functions, and all that belongs to them.

  Attributes:
    network: its functions.
    process: the forward process.
    prediction: what the network's output means.
    conditions: what it can be given, by name.
    codec: what lies between data and x.
    data_shape: of one sample of data, such as [H, W, C].
    shape: of one sample of x.
    time_input: what the network is told of a time; None for the process's own.
    defaults: how it is sampled if nobody says otherwise; None if it says nothing of that.
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

  def init(self, key: Array) -> PyTree:
    """Return new parameters of the network."""
    x, time = jnp.zeros((1, *self.shape)), jnp.zeros((1,))
    return self.network.init(key, x, time, conditions_module.example(self.conditions))

  def load_frozen(self) -> dict[str, PyTree]:
    """Read the frozen parameters of the codec and the conditions from where they came from: `{"codec": ..., "conditions": {name: ...}}`."""
    return self._frozen(lambda load: load())

  def frozen_shapes(self) -> dict[str, PyTree]:
    """Return the shapes of what `load_frozen` reads."""
    return self._frozen(frozen_shapes)

  def _frozen(self, read: Callable[[Callable[[], PyTree]], PyTree]) -> dict[str, PyTree]:
    frozen = {} if self.codec.load is None else {"codec": read(self.codec.load)}
    found = {name: read(condition.load) for name, condition in self.conditions.items() if condition.load is not None}
    return frozen | ({"conditions": found} if found else {})

  def encode_conditions(
    self, keys: Array, batch: Mapping[str, Array], frozen: Mapping[str, PyTree] | None = None, *, train: bool = False
  ) -> dict[str, PyTree]:
    """Return what the network is given for a batch (see `conditions.encode`)."""
    return conditions_module.encode(self.conditions, (frozen or {}).get("conditions", {}), keys, batch, train=train)

  def drop_conditions(
    self,
    given: Mapping[str, PyTree],
    frozen: Mapping[str, PyTree] | None = None,
    *,
    names: Collection[str] | None = None,
  ) -> dict[str, PyTree]:
    """Return `given` with conditions replaced by what stands for none (see `conditions.drop`)."""
    return conditions_module.drop(self.conditions, (frozen or {}).get("conditions", {}), given, names)

  def encode(self, keys: Array, data: Array, frozen: Mapping[str, PyTree] | None = None) -> Array:
    """Return x of data [B, ...], with a key for each sample [B]."""
    return self.codec.encode((frozen or {}).get("codec"), keys, data)

  def decode(self, x: Array, frozen: Mapping[str, PyTree] | None = None) -> Array:
    """Return the data of x [B, ...]."""
    return self.codec.decode((frozen or {}).get("codec"), x)

  def conditional(self, params: PyTree) -> guidance.Conditional:
    """Return `conditional(x_t, t, given) -> x_0 estimate`, which guidance takes.

    Raises:
      ValueError: if x_0 cannot be told from the prediction at the process's t_max; when called, if `given` does not fit the conditions.
    """
    predictions.check_prediction(self.process, self.prediction)

    def conditional(x_t, t, given):
      conditions_module.check_given(self.conditions, given)

      def apply(x, time):
        return self.network.apply(params, x, time, given)

      return predictions.denoiser(apply, self.process, self.prediction, time_input=self.time_input)(x_t, t)

    return conditional

  def denoise(self, params: PyTree, given: Mapping[str, PyTree] | None = None, *, clip: bool = True) -> Denoise:
    """Return `denoise(x_t, t) -> x_0 estimate`, which samplers take.

    Args:
      params: of the network.
      given: its conditions by name, arrays [B, ...].
      clip: whether estimates are clipped as the model's defaults say.

    Raises:
      ValueError: if `given` does not fit the conditions; otherwise as `conditional`.
    """
    conditional, values = self.conditional(params), dict(given or {})
    conditions_module.check_given(self.conditions, values)

    def denoise(x_t, t):
      return conditional(x_t, t, values)

    return self.defaults.clip(denoise) if clip and self.defaults and self.defaults.clip else denoise

  def classify(self, params: PyTree) -> Callable[[Array, Array], Array]:
    """Return `log_probs(x_t, t) -> log p(class | x_t)` [B, K] of a network that tells classes apart."""

    def apply(x, time):
      return self.network.apply(params, x, time, {})

    scale = self.prediction.input_scale
    return predictions.classifier(apply, self.process, time_input=self.time_input, input_scale=scale)

  def output_channels(self) -> int:
    """Return the size of the network's last axis: of a classifier, how many classes it knows."""

    def call(key):
      x, time, given = jnp.zeros((1, *self.shape)), jnp.zeros((1,)), conditions_module.example(self.conditions)
      return self.network.apply(self.init(key), x, time, given)

    return jax.eval_shape(call, jax.random.key(0)).shape[-1]

  def times(self, num_steps: int) -> np.ndarray:
    """Return the grid of times [num_steps + 1] that suits the model.

    Raises:
      ValueError: if the model says nothing of that.
    """
    if self.defaults is None:
      raise ValueError("Got a model without a grid of its own; take one of sampling.grids.")
    return self.defaults.times(num_steps)
