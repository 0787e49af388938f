"""Train LDM-4, a latent diffusion model, on faces at 256x256 (Rombach et al. 2022, table 12).

python -m ddpm_jax.main --config=configs/celeba256_latent.py --workdir=/tmp/celeba256_latent \
  --config.data.source.path=<folder> --config.model.codec.path=<autoencoder>

Data: a folder of CelebA-HQ's 30,000 faces at 256x256 or larger. The autoencoder turns images into latents of 64x64x3.
To train an autoencoder with the paper's codebook, use configs/imagenet256_autoencoder.py with
--config.model.network.multipliers=1,2,4 --config.model.network.latent_channels=3
--config.model.network.bottleneck=vq --config.model.network.num_codes=8192.
Encode the faces once with --mode=prepare (see docs/latents.md).

Settings, as in the paper: 274M parameters, 410,000 steps with 48 images each, a learning rate of 9.6e-5, betas from
0.0015 to 0.0195 whose square roots increase linearly, and no conditions.
Hardware: one accelerator with 40 GB of memory or more.
Score: in the paper, FID 5.11 for 50,000 samples with 500 steps of DDIM. This recipe has not been run.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  # Set the paths with --config.data.source.path=<folder> and --config.model.codec.path=<autoencoder>.
  config.data.source = spec("data.folder", path="")
  config.data.update({"image_size": 256, "channels": 3, "flip": True, "hold_out": 500, "num_workers": 8})
  config.model.codec = spec("codecs.autoencoder", path="")
  betas = spec("schedules.scaled_linear", num_steps=1000, beta_start=0.0015, beta_end=0.0195)
  config.model.process = spec("processes.discrete", betas=betas)
  config.model.prediction = spec("predictions.EPS")
  config.model.network.update(
    {
      "channels": 224,
      "multipliers": (1, 2, 3, 4),
      "blocks": 2,
      # At 32x32, 16x16 and 8x8, with heads of 32 channels.
      "attention_levels": (1, 2, 3),
      "head_channels": 32,
      "epsilon": 1e-5,
      "time_embedding": "cos_sin",
      "frequency_shift": 0.0,
      "symmetric_padding": True,
      "dropout": 0.0,
      "dtype": "bfloat16",
    }
  )
  config.optimizer.update({"name": "adamw", "arguments": "weight_decay=0.01", "learning_rate": 9.6e-5})
  config.optimizer.update({"warmup_steps": 0, "clip_norm": 0.0})
  config.ema.decay = 0.9999
  config.training.update({"batch_size": 48, "steps": 410_000})
  config.sampler = spec("sampling.ddim")
  config.sampling.update({"num_steps": 500, "batch_size": 48})
  # Latents have no range, so estimates are not clipped.
  config.sampling.clip = None
  return config
