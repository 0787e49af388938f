"""Improved DDPM on CIFAR-10 (Nichol and Dhariwal 2021): cosine schedule of 4000 steps, learned variance, hybrid loss.

python -m ddpm_jax.main --config=configs/cifar10_iddpm.py --workdir=/tmp/cifar10_iddpm

Data as in cifar10_vp.py, prepared once by --mode=prepare. 52.5M parameters, time by scale and shift, attention of 4 heads at
16x16 and 8x8.
Hardware: one GPU or a TPU slice; the paper trained 500,000 steps of 128 images.
Score: FID 3.19 in the paper, with 50,000 samples against the training set by 4000 steps; not yet repeated with this code.
"""

from ddpm_jax.schema import default_config


def get_config():
  config = default_config()
  config.process.update({"schedule": "cosine", "num_steps": 4000})
  config.learned_variance = True
  config.network.update(
    {
      "blocks": 3,
      "attention_resolutions": (16, 8),
      "heads": 4,
      "epsilon": 1e-5,
      "dropout": 0.3,
      "time_embedding": "cos_sin",
      "frequency_shift": 0.0,
      "scale_shift": True,
      "symmetric_padding": True,
    }
  )
  config.optimizer.update({"learning_rate": 1e-4, "warmup_steps": 0})
  config.training.steps = 500_000
  config.sampling.update({"variance": "learned", "num_steps": 4000})
  return config
