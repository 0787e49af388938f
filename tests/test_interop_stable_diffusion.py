"""Compare models of text pipelines with diffusers' pipelines, live, from the same noise."""

import functools

import diffusers
import jax
import numpy as np
import pytest

from ddpm_jax import guidance, interop, sampling
from ddpm_jax.interop import schedulers
from ddpm_jax.models import guided, inputs
from ddpm_jax.models.guided import Parameters
from ddpm_jax.storage import images
from tests import text_pipelines
from tests.test_interop_pipelines import assert_one_gray_level
from tests.text_pipelines import SD, as_torch, noise

PROMPTS = ["a red fox in snow!", "An oil painting of 7 ships"]
SAMPLERS = {
  "own": None,
  "ddim": diffusers.DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
  "euler": text_pipelines.EULER,
  "dpmpp_2m": diffusers.DPMSolverMultistepScheduler(**SD, timestep_spacing="leading", steps_offset=1),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """Return a function that makes a pipeline once, and returns it, its folder, our model and its parameters."""

  @functools.cache
  def write(name):
    root = tmp_path_factory.mktemp(name)
    pipeline = text_pipelines.make(name, root)
    pipeline.save_pretrained(root / "pipeline")
    model, params = interop.diffusers.load(root / "pipeline")
    return pipeline, root / "pipeline", model, Parameters(params, model.load_frozen())

  return write


@functools.cache
def compiled(model, scheduler_name, steps, names):
  """Return a compiled function that samples from noise by the scheduler of a name in `SAMPLERS`."""
  scheduler = SAMPLERS[scheduler_name]
  defaults = model.defaults
  if scheduler is not None:
    schedule = schedulers.from_config(dict(scheduler.config) | {"_class_name": type(scheduler).__name__})
    defaults = schedule.defaults(model.process)
  times = defaults.times(steps)

  @functools.partial(jax.jit, static_argnames="rule")
  def run(parameters, batch, x, rule):
    keys = jax.random.split(jax.random.key(0), len(x))
    denoise = guided.denoise(model, rule, keys, batch, parameters)
    return model.decode(sampling.sample(keys, defaults.sampler, denoise, x, times), parameters.frozen)

  return run


def sample_ours(written, name, scheduler, scale, steps=4, **batch):
  pipeline, _, model, parameters = written
  batch = inputs.host_items(model.conditions, batch)
  rule = _rule(scale)
  run = _run_of(name, model, scheduler, steps)
  return images.to_uint8(run(parameters, batch, noise(), rule))


RUNS = {}


def _run_of(name, model, scheduler, steps):
  key = name, scheduler, steps
  if key not in RUNS:
    RUNS[key] = compiled.__wrapped__(model, scheduler, steps, None)
  return RUNS[key]


@functools.cache
def _rule(scale):
  return functools.partial(guidance.classifier_free, scale=scale)


def sample_peer(pipeline, scheduler, scale, steps=4, **options):
  own = pipeline.scheduler
  try:
    pipeline.scheduler = SAMPLERS[scheduler] or own
    call = {"num_inference_steps": steps, "guidance_scale": scale, "output_type": "np", **options}
    pictures = pipeline(latents=as_torch(noise()), **call).images
  finally:
    pipeline.scheduler = own
  return np.round(pictures * 255).astype(np.uint8)


@pytest.mark.parametrize("scheduler", SAMPLERS)
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_samples_match_the_pipeline(scheduler, scale, written):
  one = written("sd1")
  ours = sample_ours(one, "sd1", scheduler, scale, text=PROMPTS)
  assert_one_gray_level(ours, sample_peer(one[0], scheduler, scale, prompt=PROMPTS))


def test_negative_prompts_match_the_pipeline(written):
  one, negative = written("sd1"), ["blurry", ""]
  ours = sample_ours(one, "sd1", "own", 7.5, text=PROMPTS, negative_text=negative)
  theirs = sample_peer(one[0], "own", 7.5, prompt=PROMPTS, negative_prompt=negative)
  assert_one_gray_level(ours, theirs)


def test_predictions_of_v_match_the_pipeline(written):
  one = written("sd2")
  ours = sample_ours(one, "sd2", "own", 7.5, text=PROMPTS)
  assert_one_gray_level(ours, sample_peer(one[0], "own", 7.5, prompt=PROMPTS))
