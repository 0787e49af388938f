"""Noise-aware classifier of the 8x8 digits, for classifier guidance of configs/digits_vp.py (Dhariwal and Nichol 2021, section 4).

python -m ddpm_jax.main --config=configs/digits_classifier.py --workdir=/tmp/digits_classifier

Hardware: 2 CPU cores. Time: 2 minutes, compilation and scoring included.
Score: accuracy on the 500 held-out digits 0.99 at log-SNR 4, 0.98 at 2, 0.79 at 0, 0.36 at -2, 0.17 at -4 (chance 0.13); cross-entropy
0.02, 0.07, 0.58, 1.86, 2.25 nats (2.30). A Parzen estimate from the training digits, its width chosen on the held-out ones, has 0.07,
0.11, 0.56, 1.86, 2.25.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  config.task = "classify"
  config.objective = "classification"
  # The data and the process of the model to be guided, so that the classifier knows its noise and has not seen more images.
  config.data.source = spec("data.digits")
  config.data.update({"image_size": 8, "channels": 1, "flip": False, "hold_out": 500})
  config.model.process = spec("processes.discrete", betas=spec("schedules.cosine"))
  config.model.network = spec(
    "networks.Classifier",
    out_channels=10,
    channels=32,
    multipliers=(1, 2),
    blocks=1,
    attention_levels=(),
    middle_attention=False,
    groups=8,
    heads=4,
    dropout=0.3,
  )
  # A small net, dropout and decay: 1,297 images are soon known by heart.
  config.optimizer.update(
    {"name": "adamw", "arguments": "weight_decay=0.05", "learning_rate": 1e-3, "warmup_steps": 50}
  )
  config.ema.decay = 0.995
  config.training.update(
    {
      "batch_size": 64,
      "steps": 4000,
      "log_every": 50,
      "checkpoint_every": 500,
    }
  )
  config.sampling.batch_size = 125
  config.evaluation.num_samples = 500
  return config
