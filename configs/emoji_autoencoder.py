"""Train an autoencoder of 64x64 color emoji with 4 channels of latents at a quarter of the resolution.

python -m ddpm_jax.main --config=configs/emoji_autoencoder.py --workdir=/tmp/emoji --config.data.source.path=<folder>

Data: a folder with train/ and test/, such as 1,599 Fluent emoji on white.
Hardware: 2 CPU cores. Time: 25 minutes.
Score: PSNR.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  config.task = "autoencode"
  config.data.source = spec("data.folder", path="")
  config.data.update({"image_size": 64, "channels": 3, "hold_out": -1})
  config.model.network = spec(
    "networks.Autoencoder",
    latent_channels=4,
    channels=32,
    multipliers=(1, 2, 4),
    blocks=1,
    middle_attention=False,
    groups=8,
  )
  config.objective = spec("losses.autoencoding", kl_weight=1e-6)
  config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 100, "schedule": "cosine"})
  config.ema.decay = 0.995
  config.training.update(
    {"batch_size": 16, "steps": 3000, "log_every": 50, "checkpoint_every": 500, "sample_every": 500}
  )
  config.sampling.batch_size = 64
  config.evaluation.num_samples = 199
  return config
