"""Train a classifier of noisy MNIST digits to guide configs/mnist_vp.py (Dhariwal and Nichol 2021, section 4).

pip install '.[mnist]'
python -m ddpm_jax.main --config=configs/mnist_classifier.py --workdir=/tmp/mnist_classifier

Hardware: 2 CPU cores. Time: 13 minutes, while another run trained on the same cores.
Score: on the 500 held-out digits,
accuracy 0.98 at log-SNR 4, 0.98 at 0, 0.72 at -2, 0.33 at -4, 0.16 at -6 (chance 0.12);
cross-entropy 0.05 nats at log-SNR 4, 0.09 at 0, 0.84 at -2, 1.94 at -4, 2.26 at -6 (chance 2.30).
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  config.task = "classify"
  config.objective = "classification"
  # The same data and process as the model to guide: the same noise levels and the same held-out images.
  config.data.source = spec("data.mnist")
  config.data.update({"image_size": 28, "channels": 1, "flip": False, "hold_out": 500})
  config.model.process = spec("processes.discrete", betas=spec("schedules.cosine"))
  config.model.network = spec(
    "networks.Classifier",
    out_channels=10,
    channels=32,
    multipliers=(1, 2, 2),
    blocks=1,
    attention_levels=(),
    middle_attention=False,
    groups=8,
    heads=4,
    dropout=0.2,
  )
  config.optimizer.update(
    {"name": "adamw", "arguments": "weight_decay=0.05", "learning_rate": 1e-3, "warmup_steps": 50}
  )
  config.ema.decay = 0.995
  config.training.update(
    {
      "batch_size": 64,
      "steps": 1500,
      "log_every": 50,
      "checkpoint_every": 250,
    }
  )
  config.sampling.batch_size = 125
  config.evaluation.num_samples = 500
  return config
