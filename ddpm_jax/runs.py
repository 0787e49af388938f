"""What the command line does with a config and a folder: train, sample, evaluate, export.

Each first builds and checks all that the config names, and writes nothing until that has gone well.
"""

import functools
import itertools
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

import ddpm_jax
from ddpm_jax import (
  build,
  checkpoint,
  data,
  evaluate,
  images,
  optim,
  parallel,
  pretrained,
  randomness,
  records,
  train,
  workdir,
)

PyTree = Any
_GRID_IMAGES = 64
# Of a model whose cost is not known, so few at a time on a CPU that there is progress to see.
_CPU_BATCH = 16


def run_train(config: ConfigDict, folder: Path) -> None:
  """Trains, or goes on where the folder's run stopped; then samples, scores, and says where everything lies.

  Raises:
    ValueError: if the config or the folder does not allow it.
  """
  resuming = checkpoint.Checkpoints.exist(workdir.checkpoint_folder(folder))
  asked = config
  config, model = pretrained.of_run(config, folder, resuming=resuming)
  workdir.check_same_run(folder, config.to_dict())
  mesh, c = parallel.data_mesh(), config.training
  parallel.check_batch(c.batch_size, mesh.size)
  optimizer, loss_fn = build.build_optimizer(config), build.build_loss(config)
  preview = _preview(config, mesh)
  build.build_generate(config, mesh)
  source, held_out = build.build_data(config)
  _check_evaluation(config, source, held_out)
  init, template = _state(config, optimizer, mesh, None if model is None else model.params)
  workdir.check_writable(folder)

  shape, num_params = build.image_shape(config), sum(leaf.size for leaf in jax.tree.leaves(template.params))
  say(f"{len(source):,} training images of {'x'.join(map(str, shape))}, {len(held_out or ()):,} held out")
  say(f"{num_params:,} parameters on {mesh.size} {jax.default_backend()} device(s)")
  if config.init_from:
    taken = pretrained.changes(asked, config)
    say("\n  ".join([f"network, process and prediction from {config.init_from}{':' if taken else ''}", *taken]))
  if not resuming:
    workdir.write_config(folder, config.to_dict())
  checkpoints = checkpoint.Checkpoints(workdir.checkpoint_folder(folder), c.keep_checkpoints)
  batches = data.batches(
    source,
    c.batch_size,
    seed=config.seed,
    flip=config.data.flip,
    put=lambda batch: jax.device_put(batch, parallel.split(mesh)),
    num_threads=config.data.num_threads,
    num_workers=config.data.num_workers,
  )
  if not resuming:
    state = init()
  else:
    state, position = checkpoints.restore(template)
    batches.restore(position)
    # Only now: what may have changed in the config holds from here on.
    workdir.write_config(folder, config.to_dict())
    say(f"resuming from the checkpoint of step {int(state.step):,}")

  if int(state.step) < c.steps:
    writer = records.Records(folder, int(state.step))
    step = functools.partial(train.train_step, loss_fn=loss_fn, optimizer=optimizer)
    shapes = {
      "image": jax.ShapeDtypeStruct((c.batch_size, *shape), jnp.float32),
      "label": jax.ShapeDtypeStruct((c.batch_size,), jnp.int32),
    }
    compiled = compile_aloud("the train step", parallel.jit_step(step, mesh).lower(template, shapes))

    def draw(number: int, state: train.TrainState) -> None:
      picture = preview(optim.ema_params(state.opt_state))
      images.save_grid(_samples(folder) / f"step_{number:07d}.png", picture)
      writer.image(number, "samples", images.grid(picture))

    try:
      state = train.fit(
        state,
        compiled,
        batches,
        num_steps=c.steps,
        log=writer.scalars,
        log_every=c.log_every,
        callbacks=(
          train.Callback(c.checkpoint_every, lambda number, state: checkpoints.save(number, state, batches.state)),
          train.Callback(c.sample_every, draw),
        ),
      )
    finally:
      batches.close()
      checkpoints.close()
      writer.close()
  else:
    say(f"training is complete at step {int(state.step):,}")
    checkpoints.close()
  _evaluate(config, folder, mesh, state, source, held_out, config.seed)
  say(
    f"\nconfig       {workdir.config_path(folder)}\ncheckpoints  {workdir.checkpoint_folder(folder)}\n"
    f"metrics      {folder / 'metrics.jsonl'}\nTensorBoard  {folder / 'tensorboard'}"
  )


def run_eval(config: ConfigDict, folder: Path, *, seed: int) -> None:
  """Scores samples of the EMA weights of a run, into eval.json.

  Raises:
    ValueError: if there is no checkpoint, or the config does not allow it.
  """
  mesh, config = parallel.data_mesh(), _trained(config, folder)
  build.build_generate(config, mesh)
  source, held_out = build.build_data(config)
  if held_out is None:
    raise ValueError("Got no held-out images to score against; set --config.data.eval_split or --config.data.hold_out.")
  _check_evaluation(config, source, held_out)
  workdir.check_writable(folder)
  _evaluate(config, folder, mesh, _restore(config, folder, mesh), source, held_out, seed)


def run_sample(
  config: ConfigDict,
  folder: Path,
  *,
  num_samples: int,
  seed: int,
  labels: list[int] | None,
  model: pretrained.Pretrained | None = None,
) -> None:
  """Samples from the EMA weights of a run, or from a pretrained model, into samples/: an .npz (uint8, NHWC) and a picture.

  Raises:
    ValueError: if there is no checkpoint, or the config, the number of samples or the labels do not allow it.
  """
  if num_samples < 1:
    raise ValueError(f"Got --num_samples={num_samples}; wanted at least 1.")
  mesh = parallel.data_mesh()
  config = _trained(config, folder) if model is None else ConfigDict(config.to_dict())
  classes = build.build_labels(config, labels, num_samples)
  # No more than are wanted at a time: a sample does not depend on the batch.
  most = -(-num_samples // mesh.size) * mesh.size
  if model is not None and jax.default_backend() == "cpu":
    most = min(most, _CPU_BATCH * mesh.size)
  config.sampling.batch_size = min(config.sampling.batch_size, most)
  generate = build.build_generate(config, mesh)
  workdir.check_writable(folder)
  if model is None:
    params = optim.ema_params(_restore(config, folder, mesh).opt_state)
  else:
    params = model.params
    say(
      f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters on {mesh.size} {jax.default_backend()} device(s)"
    )
  say(f"sampling {num_samples:,} images with {config.sampling.sampler} ...")
  samples, nfe = _draw(config, generate, params, seed, num_samples, classes)
  say(f"{num_samples:,} samples, {nfe:,} network evaluations each")
  _write_samples(_free(_samples(folder) / f"{config.sampling.sampler}_nfe{nfe}_seed{seed}"), samples, classes)


def run_export(config: ConfigDict, folder: Path, output: Path, *, ema: bool) -> None:
  """Writes the model of a run as a folder that diffusers opens.

  Raises:
    ValueError: if there is no checkpoint, diffusers cannot express the model, or the output folder is not empty.
  """
  config = _trained(config, folder)
  pretrained.check_output(output)
  state = _restore(config, folder, parallel.data_mesh())
  params = optim.ema_params(state.opt_state) if ema else state.params
  weights = "EMA" if ema else "raw"
  pretrained.export(config, folder, output, params, step=int(state.step), weights=weights)
  say(
    f"model        {output} ({weights} weights), for diffusers and for --pretrained\nmodel card   {output / 'README.md'}"
  )


def say(text: str) -> None:
  """Prints a line, above a progress bar if there is one."""
  tqdm.write(text)


def compile_aloud(what: str, lowered: Any) -> Callable:
  """Compiles, and says so before and after."""
  tqdm.write(f"compiling {what} ...", end=" ")
  start = time.perf_counter()
  compiled = lowered.compile()
  say(f"{time.perf_counter() - start:.1f} s")
  return compiled


def _samples(folder: Path) -> Path:
  return folder / "samples"


def _state(
  config: ConfigDict, optimizer: Any, mesh: jax.sharding.Mesh, params: PyTree = None
) -> tuple[Callable[[], train.TrainState], train.TrainState]:
  """A function that makes the first state, from new parameters or those given, and the state's shapes and layout."""
  init, whole = build.build_params_init(config), parallel.replicated(mesh)

  def start(params):
    make = init if params is None else lambda key: params
    return train.init_state(jax.random.key(config.seed), make, optimizer)

  compiled = jax.jit(start, out_shardings=whole)
  return functools.partial(compiled, params), checkpoint.abstract(jax.eval_shape(start, params), whole)


def _restore(config: ConfigDict, folder: Path, mesh: jax.sharding.Mesh) -> train.TrainState:
  _, template = _state(config, build.build_optimizer(config), mesh)
  checkpoints = checkpoint.Checkpoints(workdir.checkpoint_folder(folder))
  state, _ = checkpoints.restore(template)
  checkpoints.close()
  say(f"checkpoint of step {int(state.step):,} from {checkpoints.folder}")
  return state


def _trained(config: ConfigDict, folder: Path) -> ConfigDict:
  """The config of the finished or unfinished run in a folder; a ValueError if there is none, or it is another's."""
  if not checkpoint.Checkpoints.exist(workdir.checkpoint_folder(folder)):
    raise ValueError(
      f"Got --workdir={folder}, which holds no checkpoint; wanted the folder of a run. Train first: --mode=train."
    )
  # A copy: what is changed of it is not the caller's.
  config = pretrained.adopt_run(ConfigDict(config.to_dict()), folder)
  workdir.check_same_run(folder, config.to_dict())
  return config


def _check_evaluation(config: ConfigDict, source: data.Source, held_out: data.Source | None) -> None:
  count = config.evaluation.num_samples
  if held_out is not None and not config.evaluation.k < count <= min(len(source), len(held_out)):
    raise ValueError(
      f"Got evaluation.num_samples={count} with {len(source)} training and {len(held_out)} held-out images; wanted more"
      f" than evaluation.k={config.evaluation.k} and no more than either, so that sets of one size are compared."
    )


def _preview(config: ConfigDict, mesh: jax.sharding.Mesh) -> Callable[[PyTree], np.ndarray]:
  """A function from parameters to a few samples (uint8), always from the same noise, by a few steps of DDIM."""
  quick = ConfigDict(config.to_dict())
  quick.sampling.update({"sampler": "ddim", "eta": 0.0, "num_steps": config.sampling.preview_steps, "grid": ""})
  quick.sampling.batch_size = -(-_GRID_IMAGES // mesh.size) * mesh.size
  generate, classes = build.build_generate(quick, mesh), build.build_labels(config, None, _GRID_IMAGES)
  return lambda params: _draw(quick, generate, params, config.seed, _GRID_IMAGES, classes)[0]


def _draw(
  config: ConfigDict, generate: Callable, params: PyTree, seed: int, count: int, classes: np.ndarray | None
) -> tuple[np.ndarray, int]:
  """`count` samples (uint8), and the network evaluations each took (at most).

  Sample i follows from the seed and i alone, but for the sampler `ode`, which controls its error over a batch.
  """
  # Folded with 2: a training run of the same seed uses what 0 and 1 would give.
  size, key = config.sampling.batch_size, jax.random.fold_in(jax.random.key(seed), 2)
  parts, most = [], 0
  with tqdm(total=count, desc=f"sampling ({config.sampling.sampler})", unit=" images", disable=count <= size) as bar:
    for first in range(0, count, size):
      indices = jnp.arange(first, first + size)
      wanted = None if classes is None else np.resize(classes[first : first + size], size)
      x, nfe = generate(params, randomness.sample_keys(key, indices), wanted)
      if not np.all(np.isfinite(x)):
        raise FloatingPointError(
          f"The samples are not finite, by {config.sampling.sampler} in {config.sampling.num_steps} steps. Take another sampler or more"
          " steps, or clip (config.sampling.clip); or the model is broken."
        )
      parts.append(images.to_uint8(x))
      most = max(most, int(nfe))
      bar.update(min(size, count - first))
  return np.concatenate(parts)[:count], most


def _free(path: Path) -> Path:
  """The path, or with _2, _3, ... behind it the first whose samples do not exist yet."""
  names = itertools.chain([path], (path.with_name(f"{path.name}_{number}") for number in itertools.count(2)))
  return next(name for name in names if not Path(f"{name}.npz").exists())


def _write_samples(path: Path, samples: np.ndarray, classes: np.ndarray | None) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  arrays: dict[str, Any] = {"samples": samples} if classes is None else {"samples": samples, "labels": classes}
  np.savez_compressed(f"{path}.npz", **arrays)
  images.save_grid(f"{path}.png", samples[:_GRID_IMAGES])
  say(f"samples      {path}.npz\npicture      {path}.png")


def _evaluate(
  config: ConfigDict,
  folder: Path,
  mesh: jax.sharding.Mesh,
  state: train.TrainState,
  source: data.Source,
  held_out: data.Source | None,
  seed: int,
) -> None:
  """Samples from the EMA weights into samples/final, and their scores into eval.json where there are held-out images."""
  count = config.evaluation.num_samples
  generate, start = build.build_generate(config, mesh), time.perf_counter()
  say(f"sampling {count:,} images from the EMA weights with {config.sampling.sampler} ...")
  classes = build.build_labels(config, None, count)
  samples, nfe = _draw(config, generate, optim.ema_params(state.opt_state), seed, count, classes)
  seconds = time.perf_counter() - start
  say(f"{nfe:,} network evaluations each, {seconds:.1f} s with compilation")
  _write_samples(_samples(folder) / "final", samples, classes)
  if held_out is None:
    say("no scores: the config holds no images back (config.data.eval_split or config.data.hold_out)")
    return

  def real(of: data.Source) -> np.ndarray:
    return data.read(of, np.random.default_rng(0).permutation(len(of))[:count])["image"]

  scores = evaluate.score(samples, real(held_out), real(source), config.evaluation.k)
  report = {
    "scores": scores,
    "features": "pixels in [-1, 1]",
    "num_samples": count,
    "neighbour": config.evaluation.k,
    "reference": "held-out images; the floor is as many training images",
    "step": int(state.step),
    "weights": "EMA",
    "sampling": {**config.sampling.to_dict(), "nfe": nfe},
    "seed": seed,
    "backend": jax.default_backend(),
    "versions": {"ddpm_jax": ddpm_jax.__version__}
    | {name: metadata.version(name) for name in ("jax", "flax", "numpy")},
    "date": datetime.now(UTC).isoformat(timespec="seconds"),
  }
  path = folder / "eval.json"
  path.write_text(json.dumps(report, indent=2) + "\n")
  say(f"\n{evaluate.table(scores)}\n\nscores       {path}")
