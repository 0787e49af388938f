"""Train a class-conditional DDPM on CIFAR-10 for classifier-free guidance (Ho et al. 2020, Ho and Salimans 2022).

python -m ddpm_jax.main --mode=prepare --config=configs/cifar10_cond.py
python -m ddpm_jax.main --config=configs/cifar10_cond.py --workdir=/tmp/cifar10_cond
python -m ddpm_jax.main --mode=sample --workdir=/tmp/cifar10_cond --num_samples=100 --guidance_scale=3

In training, the class of an image is hidden with a probability of 10%. To prepare the data, or to train on a folder of
images, see configs/cifar10_vp.py.

Hardware: one GPU or a TPU slice. On a CPU a step takes a minute.
Score: none yet, because the recipe was not yet trained in full.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  config.model.process = spec("processes.discrete", betas=spec("schedules.cosine"))
  config.model.prediction = spec("predictions.V")
  config.objective = spec("losses.denoising", weighting=spec("losses.snr_plus_one"))
  config.model.conditions.classes = spec("conditions.classes", number=10, dropout=0.1)
  config.sampler = spec("sampling.ddim")
  config.sampling.update({"num_steps": 100})
  return config
