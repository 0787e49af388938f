"""Train a class-conditional DDPM on CIFAR-10 at 16x16, the base model of a cascade (Ho et al. 2022).

python -m ddpm_jax.main --config=configs/cifar16_cond.py --workdir=/tmp/cifar16_cond --config.data.source.path=<folder>

The folder has train/<class>/ and test/<class>/ with the images of CIFAR-10. To read CIFAR-10 from TFDS instead, prepare
it as in configs/cifar10_vp.py and add --config.data.source=tfds. The model of configs/cifar_superres.py enlarges the
samples to 32x32.

Hardware: 2 CPU cores for a first look. For good pictures use a GPU, with more --config.training.steps and
--config.model.network.channels.
Time: 20 minutes, while other runs trained on the same cores.
Score (real images in parentheses): Frechet distance in pixel space 28 (30), precision 0.84 (0.81), recall 0.73 (0.71),
for 200 samples with 50 steps of DDIM. The images of CIFAR-10 were re-encoded as JPEG. Scores in pixel space say little
about color images: the samples have the colors and the layout of their class, but no detail yet.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  # Set the path with --config.data.source.path=<folder>. --mode=plan needs no path.
  config.data.source = spec("data.folder", path="")
  config.data.update({"image_size": 16, "resize": "box"})
  config.model.process = spec("processes.discrete", betas=spec("schedules.cosine"))
  config.model.prediction = spec("predictions.V")
  config.objective = spec("losses.denoising", weighting=spec("losses.snr_plus_one"))
  config.model.conditions.classes = spec("conditions.classes", number=10, dropout=0.1)
  config.model.network.update(
    {
      "channels": 48,
      "multipliers": (1, 2, 2),
      "blocks": 1,
      "attention_levels": (1,),
      "groups": 8,
      "dropout": 0.0,
    }
  )
  config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 200})
  config.ema.decay = 0.998
  config.training.update(
    {"batch_size": 64, "steps": 1000, "log_every": 100, "checkpoint_every": 250, "sample_every": 500}
  )
  config.sampler = spec("sampling.ddim")
  config.sampling.update({"num_steps": 50, "batch_size": 100})
  # The scores in the docstring were computed with these settings. Compare only scores of equally many samples.
  config.evaluation.update({"num_samples": 200, "features": "pixels", "allow_singular": True})
  return config
