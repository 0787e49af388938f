"""Train an autoencoder from 64x64 color emoji to 16x16 latents of 4 channels (Rombach et al. 2022).

python -m ddpm_jax.main --config=configs/emoji_autoencoder.py --workdir=/tmp/emoji_autoencoder \
  --config.data.source.path=<folder>

Data: a folder with train/ and test/. `experiments/emoji.py` makes such a folder with 1,599 emoji on a white background.
Hardware: 2 CPU cores. Time: 16 minutes, including compilation and scoring.
Score: for the 199 emoji of test/, PSNR 31.5 dB, SSIM 0.93.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  config.task = "autoencode"
  # Set the path with --config.data.source.path=<folder>. --mode=plan needs no path.
  config.data.source = spec("data.folder", path="")
  config.data.update({"image_size": 64, "channels": 3, "hold_out": -1})
  # Few features at full resolution, where convolutions take most of the time on a CPU.
  config.model.network = spec(
    "networks.Autoencoder",
    latent_channels=4,
    channels=16,
    multipliers=(1, 2, 4),
    blocks=1,
    middle_attention=False,
    groups=8,
  )
  # A larger KL divergence than for photographs: latents of few images are easier to model if they are smooth.
  config.objective = spec("losses.autoencoding", kl_weight=1e-3)
  config.optimizer.update({"learning_rate": 3e-3, "warmup_steps": 50, "schedule": "cosine"})
  config.ema.decay = 0.99
  config.training.update(
    {
      "batch_size": 16,
      "steps": 2500,
      "log_every": 50,
      "checkpoint_every": 500,
      "sample_every": 500,
    }
  )
  config.evaluation.update({"num_samples": 199, "batch_size": 64})
  return config
