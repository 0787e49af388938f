"""Continuous VP SDE on scikit-learn's 1,797 digits of 8x8, sampled by the probability-flow ODE (Song et al. 2021).

python -m ddpm_jax.main --config=configs/digits_sde.py --workdir=/tmp/digits_sde
"""

from ddpm_jax import build


def get_config():
  config = build.default_config()
  config.data.update({"source": "digits", "image_size": 8, "channels": 1, "flip": False, "hold_out": 500})
  config.data.eval_split = ""
  config.process.name = "vp"
  config.prediction = "v"
  config.loss.weighting = "snr_plus_one"
  config.network.update(
    {
      "channels": 32,
      "multipliers": (1, 2),
      "blocks": 1,
      "attention_resolutions": (),
      "middle_attention": False,
      "groups": 8,
      "dropout": 0.0,
    }
  )
  config.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 50, "ema_decay": 0.995})
  config.training.update(
    {
      "batch_size": 64,
      "steps": 2400,
      "log_every": 50,
      "checkpoint_every": 400,
      "sample_every": 400,
    }
  )
  config.sampling.update({"sampler": "ode", "clip": False, "tolerance": 1e-4, "batch_size": 500})
  config.evaluation.num_samples = 500
  return config
