"""Train the base model of a cascade, a class-conditional DDPM on MNIST digits at 8x8 (Ho et al. 2022).

pip install '.[mnist]'
python -m ddpm_jax.main --config=configs/mnist8_cond.py --workdir=/tmp/mnist8_cond

`configs/mnist_superres.py` enlarges the samples to 32x32.

Hardware: 2 CPU cores. Time: 6 minutes, while other programs ran on the same cores.
Score (real images in parentheses): Frechet distance in pixel space 0.16 (0.12), precision 0.95 (0.97), recall 0.90
(0.95), for 500 samples with 50 steps of DDIM.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  # Digits of 28x28 are padded by 2 pixels, then averaged over boxes of 4x4 pixels.
  config.data.source = spec("data.mnist")
  config.data.update({"image_size": 8, "channels": 1, "flip": False, "hold_out": 500})
  config.model.process = spec("processes.discrete", betas=spec("schedules.cosine"))
  config.model.prediction = spec("predictions.V")
  config.objective = spec("losses.denoising", weighting=spec("losses.snr_plus_one"))
  config.model.conditions.classes = spec("conditions.classes", number=10, dropout=0.1)
  config.model.network.update(
    {
      "channels": 32,
      "multipliers": (1, 2),
      "blocks": 1,
      "attention_levels": (),
      "middle_attention": True,
      "groups": 8,
      "dropout": 0.0,
    }
  )
  config.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 50})
  config.ema.decay = 0.995
  config.training.update(
    {"batch_size": 64, "steps": 4000, "log_every": 50, "checkpoint_every": 500, "sample_every": 1000}
  )
  config.sampler = spec("sampling.ddim")
  config.sampling.update({"num_steps": 50, "batch_size": 125})
  # The scores in the docstring were computed with these settings.
  config.evaluation.update({"num_samples": 500, "features": "pixels"})
  return config
