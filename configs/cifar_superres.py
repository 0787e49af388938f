"""Train SR3 to enlarge color images from 16x16 to 32x32 (Saharia et al. 2021, Ho et al. 2022).

python -m ddpm_jax.main --config=configs/cifar_superres.py --workdir=/tmp/cifar_superres \
  --config.data.source.path=<folder>
python -m ddpm_jax.main --mode=sample --workdir=/tmp/cifar16_cond --upsampler=/tmp/cifar_superres \
  --num_samples=60 --guidance_scale=3

Data: the folder, or CIFAR-10 from TFDS, as in configs/cifar16_cond.py. The 16x16 images are resized
to 32x32 by interpolation, and then noise is added (conditioning augmentation).
Hardware: 2 CPU cores for a first look, one GPU for good pictures.
Time: 8 minutes, while other programs ran on the same cores.
Score (real images in parentheses): Frechet distance in pixel space 50 (178), precision 1.0 (0.75), recall 1.0 (0.67),
for 200 held-out images that were downsampled and enlarged again with 30 steps of DDIM. The images of CIFAR-10 were
re-encoded as JPEG. The reference images are the originals of the enlarged images, so the scores may be better
than the scores of other real images.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  # Set the path with --config.data.source.path=<folder>. --mode=plan needs no path.
  config.data.source = spec("data.folder", path="")
  config.data.update({"image_size": 32})
  config.model.process = spec("processes.discrete", betas=spec("schedules.cosine"))
  config.model.prediction = spec("predictions.V")
  config.objective = spec("losses.denoising", weighting=spec("losses.snr_plus_one"))
  config.model.conditions.low = spec("conditions.low_resolution", factor=2, noise=0.3, sample_noise=0.05)
  config.model.network.update(
    {
      "channels": 32,
      "multipliers": (1, 2, 2),
      "blocks": 1,
      "attention_levels": (),
      "middle_attention": True,
      "groups": 8,
      "dropout": 0.0,
    }
  )
  config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 100})
  config.ema.decay = 0.99
  config.training.update(
    {"batch_size": 32, "steps": 400, "log_every": 100, "checkpoint_every": 200, "sample_every": 400}
  )
  config.sampler = spec("sampling.ddim")
  config.sampling.update({"num_steps": 30, "batch_size": 100})
  # The scores in the docstring were computed with these settings. Compare only scores of equally many samples.
  config.evaluation.update({"num_samples": 200, "features": "pixels", "allow_singular": True})
  return config
