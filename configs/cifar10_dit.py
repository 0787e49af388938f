"""Train a class-conditional diffusion transformer on CIFAR-10 (Peebles and Xie 2023).

python -m ddpm_jax.main --mode=prepare --config=configs/cifar10_dit.py
python -m ddpm_jax.main --config=configs/cifar10_dit.py --workdir=/tmp/cifar10_dit
python -m ddpm_jax.main --mode=sample --workdir=/tmp/cifar10_dit --num_samples=100 --guidance_scale=2

Network: DiT-S/2 with 32.5M parameters, on pixels. In training, the class of an image is hidden with a probability of
10%. To prepare the data, or to train on a folder of images, see configs/cifar10_vp.py. The paper has no settings for
CIFAR-10. The process and the prediction are those of configs/cifar10_cond.py, for comparison with the U-Net.

Hardware: one GPU or a TPU slice.
Score: none yet, because the recipe was not yet trained in full.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  config.model.process = spec("processes.discrete", betas=spec("schedules.cosine"))
  config.model.prediction = spec("predictions.V")
  config.objective = spec("losses.denoising", weighting=spec("losses.snr_plus_one"))
  config.model.conditions.classes = spec("conditions.classes", number=10, dropout=0.1)
  config.model.network = spec("networks.DiT", channels=384, layers=12, heads=6, patch=2, dropout=0.1, dtype="bfloat16")
  config.sampler = spec("sampling.ddim")
  config.sampling.update({"num_steps": 100})
  return config
