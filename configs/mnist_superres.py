"""Train SR3 to enlarge MNIST digits from 8x8 to 32x32 (Saharia et al. 2021).

pip install '.[mnist]'
python -m ddpm_jax.main --config=configs/mnist_superres.py --workdir=/tmp/mnist_superres
python -m ddpm_jax.main --mode=sample --workdir=/tmp/mnist8_cond --upsampler=/tmp/mnist_superres \
  --num_samples=100 --guidance_scale=2

Network: trained with conditioning augmentation (Ho et al. 2022), so that it also works on samples of
configs/mnist8_cond.py.
Hardware: 2 CPU cores. Time: 15 minutes, while another run trained on the same cores.
Score (real images in parentheses): Frechet distance in pixel space 12.8 (22.9), precision 1.0 (0.96), recall 1.0
(0.95), for 500 held-out digits that were downsampled and enlarged again with 30 steps of DDIM. The reference
images are the originals of the enlarged digits, so the scores may be better than the scores of real images.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  config.data.source = spec("data.mnist")
  config.data.update({"image_size": 32, "channels": 1, "flip": False, "hold_out": 500})
  config.model.process = spec("processes.discrete", betas=spec("schedules.cosine"))
  config.model.prediction = spec("predictions.V")
  config.objective = spec("losses.denoising", weighting=spec("losses.snr_plus_one"))
  # Samples of the base model differ from downsampled real digits. Noise hides a part of the difference.
  config.model.conditions.low = spec("conditions.low_resolution", factor=4, noise=0.4, sample_noise=0.1)
  config.model.network.update(
    {
      "channels": 24,
      "multipliers": (1, 2, 2),
      "blocks": 1,
      "attention_levels": (),
      "middle_attention": True,
      "groups": 8,
      "dropout": 0.0,
    }
  )
  config.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 100})
  config.ema.decay = 0.99
  config.training.update(
    {"batch_size": 48, "steps": 800, "log_every": 100, "checkpoint_every": 200, "sample_every": 400}
  )
  config.sampler = spec("sampling.ddim")
  config.sampling.update({"num_steps": 30, "batch_size": 125})
  # The scores in the docstring were computed with these settings. Compare only scores of equally many samples.
  config.evaluation.update({"num_samples": 500, "features": "pixels", "allow_singular": True})
  return config
