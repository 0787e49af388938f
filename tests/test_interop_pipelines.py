"""Load models of diffusers, and compare our samples with those of diffusers' pipelines."""

import itertools

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.pipelines.ddim import pipeline_ddim
from diffusers.pipelines.ddpm import pipeline_ddpm
from diffusers.schedulers import scheduling_ddpm

from ddpm_jax import interop, randomness, sampling
from ddpm_jax.storage import images
from tests.test_interop_diffusers import SHAPE, initial_noise, write_pipeline
from tests.test_interop_unet import DOWN, levels

# Options of a network that is fast enough for a thousand calls.
PLAIN = {"block_out_channels": (16,), "add_attention": False, **levels(DOWN)}


def as_torch(x):
  return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))


def sample_ours(model, params, sampler, num_steps):
  denoise, times = model.denoise(params), model.times(num_steps)
  run = jax.jit(lambda x: sampling.sample(jax.random.key(2), sampler, denoise, x, times))
  return images.to_uint8(run(initial_noise()))


def clipping_range(model):
  """Return the range to which the model clips x_0, or None if the model does not clip."""
  if model.defaults.clip is None:
    return None
  limits = model.defaults.clip(lambda x_t, t: x_t)(np.float32([[-1e9], [1e9]]), 0.5)
  return tuple(map(float, limits[:, 0]))


def sample_peer(pipeline, **options):
  pipeline.set_progress_bar_config(disable=True)
  pictures = pipeline(batch_size=len(initial_noise()), output_type="np", **options).images
  return np.round(pictures * 255).astype(np.uint8)


def assert_one_gray_level(a, b):
  """Assert that images differ by at most one gray level."""
  assert a.shape == b.shape
  assert np.ptp(a) > 100, "the picture is almost uniform"
  assert np.max(np.abs(a.astype(int) - b.astype(int))) <= 1


@pytest.mark.parametrize(
  ("variance", "steps"),
  [("fixed_small", 1000), ("learned_range", 200), pytest.param("learned_range", 1000, marks=pytest.mark.slow)],
)
def test_all_steps_of_ddpm_match_the_pipeline(variance, steps, tmp_path, monkeypatch):
  learned = {"out_channels": 6} if variance == "learned_range" else {}
  write_pipeline(tmp_path, diffusers.DDPMScheduler(steps, variance_type=variance), **PLAIN, **learned)
  model, params = interop.diffusers.load(tmp_path)
  assert (model.shape, clipping_range(model)) == ((8, 8, 3), (-1, 1))
  sample_noise = jax.jit(lambda i: randomness.normal(jax.random.fold_in(jax.random.key(2), i), SHAPE, np.float32))
  noise = (as_torch(sample_noise(i)) for i in itertools.count())
  monkeypatch.setattr(pipeline_ddpm, "randn_tensor", lambda *args, **kwargs: as_torch(initial_noise()))
  monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: next(noise))
  pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path)
  defaults = model.defaults
  assert (defaults.name, defaults.steps) == ("ancestral", steps)
  assert_one_gray_level(
    sample_ours(model, params, defaults.sampler, steps), sample_peer(pipeline, num_inference_steps=steps)
  )


@pytest.mark.parametrize(("prediction", "spacing"), [("epsilon", "leading"), ("v_prediction", "trailing")])
def test_fifty_steps_of_ddim_match_the_pipeline(prediction, spacing, tmp_path, monkeypatch):
  scheduler = diffusers.DDIMScheduler(
    timestep_spacing=spacing, prediction_type=prediction, beta_schedule="scaled_linear"
  )
  write_pipeline(tmp_path, scheduler)
  model, params = interop.diffusers.load(tmp_path)
  monkeypatch.setattr(pipeline_ddim, "randn_tensor", lambda *args, **kwargs: as_torch(initial_noise()))
  pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path)
  # We always compute the noise from the clipped estimate. diffusers does so only with use_clipped_model_output=True.
  samples = sample_ours(model, params, sampling.ddim(model.process), 50)
  assert_one_gray_level(samples, sample_peer(pipeline, num_inference_steps=50, use_clipped_model_output=True))


def test_ddim_without_clipping_matches_the_pipeline(tmp_path, monkeypatch):
  write_pipeline(
    tmp_path, diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing")
  )
  model, params = interop.diffusers.load(tmp_path)
  assert clipping_range(model) is None
  monkeypatch.setattr(pipeline_ddim, "randn_tensor", lambda *args, **kwargs: as_torch(initial_noise()))
  pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path)
  assert_one_gray_level(
    sample_ours(model, params, sampling.ddim(model.process), 50), sample_peer(pipeline, num_inference_steps=50)
  )


def test_twenty_steps_of_a_solver_match_the_pipeline(tmp_path, monkeypatch):
  write_pipeline(tmp_path, diffusers.DPMSolverMultistepScheduler(prediction_type="v_prediction"))
  model, params = interop.diffusers.load(tmp_path)
  assert (model.defaults.name, clipping_range(model)) == ("dpmpp_2m", None)
  monkeypatch.setattr(pipeline_ddpm, "randn_tensor", lambda *args, **kwargs: as_torch(initial_noise()))
  pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path)
  samples = sample_ours(model, params, model.defaults.sampler, 20)
  assert_one_gray_level(samples, sample_peer(pipeline, num_inference_steps=20))
