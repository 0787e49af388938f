"""Train a classifier of noisy 8x8 digits to guide configs/digits_vp.py (Dhariwal and Nichol 2021, section 4).

python -m ddpm_jax.main --config=configs/digits_classifier.py --workdir=/tmp/digits_classifier

Hardware: 2 CPU cores. Time: 2 minutes, including compilation and scoring.
Score: on the 500 held-out digits at log-SNR 4, 2, 0, -2 and -4,
accuracy 0.99, 0.98, 0.79, 0.36, 0.17 (chance 0.13);
cross-entropy 0.02, 0.07, 0.58, 1.86, 2.25 nats (chance 2.30).
For comparison, a Parzen (kernel density) estimate from the training digits has a cross-entropy of 0.07, 0.11, 0.56,
1.86, 2.25 nats at the same log-SNRs. Its kernel width was chosen on the held-out digits.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  config.task = "classify"
  config.objective = "classification"
  # The same data and process as the model to guide: the same noise levels and the same held-out images.
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
  # A small network, dropout and weight decay, because 1,297 images are easily memorized.
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
