"""Train an autoencoder from the 8x8 digits of scikit-learn to 4x4 latents of 2 channels (Rombach et al. 2022).

python -m ddpm_jax.main --config=configs/digits_autoencoder.py --workdir=/tmp/digits_autoencoder

Data: 1,797 handwritten digits, which need no download.
Hardware: 2 CPU cores. Time: 1 min 30 s on a shared machine, including compilation and scoring.
Score: for the reconstructions of the 500 held-out digits, PSNR 28.0 dB and SSIM 0.991. In the features of a small
classifier, the Frechet distance between reconstructions and originals is 0.02 (real training digits: 0.53). With
--config.model.network.bottleneck=vq --config.model.network.num_codes=64, the PSNR is 24.4 dB, and all codes are used.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  config.task = "autoencode"
  config.data.source = spec("data.digits")
  config.data.update({"image_size": 8, "channels": 1, "flip": False, "hold_out": 500})
  config.model.network = spec(
    "networks.Autoencoder",
    latent_channels=2,
    channels=16,
    multipliers=(1, 2),
    blocks=1,
    middle_attention=False,
    groups=4,
  )
  config.objective = spec("losses.autoencoding", kl_weight=1e-4)
  config.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 50, "schedule": "cosine"})
  config.ema.decay = 0.99
  config.training.update(
    {"batch_size": 64, "steps": 1000, "log_every": 50, "checkpoint_every": 500, "sample_every": 500}
  )
  config.evaluation.num_samples = 500
  return config
