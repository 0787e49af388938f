"""Train Improved DDPM on CIFAR-10, with learned variance and the hybrid loss (Nichol and Dhariwal 2021).

python -m ddpm_jax.main --config=configs/cifar10_iddpm.py --workdir=/tmp/cifar10_iddpm

Network: 52.5M parameters. The time embedding scales and shifts the features. Attention at 16x16 and 8x8 has 4 heads.
Process: the cosine schedule with 4000 steps.
Data: as in configs/cifar10_vp.py, prepared once with --mode=prepare.
Hardware: one GPU or a TPU slice. The paper trained 500,000 steps with 128 images each.
Score: in the paper, FID 3.19 of 50,000 samples against the training set, with 4000 sampling steps. Not yet reproduced
with this code.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  config.model.process = spec("processes.discrete", betas=spec("schedules.cosine", num_steps=4000))
  config.model.prediction = spec("predictions.learned_range", prediction=spec("predictions.EPS"))
  config.model.network.update(
    {
      "blocks": 3,
      "attention_levels": (1, 2),
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
  config.sampler = spec("sampling.ancestral", variance="learned")
  config.sampling.update({"num_steps": 4000})
  return config
