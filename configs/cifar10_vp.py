"""DDPM on CIFAR-10 with the settings of Ho et al. 2020 (35.7M parameters, 800,000 steps of 128 images).

Prepare the data once (1.8 GB of TensorFlow, needed for nothing else), then train:

pip install '.[prepare]'
python -m ddpm_jax.main --mode=prepare --config=configs/cifar10_vp.py
python -m ddpm_jax.main --config=configs/cifar10_vp.py --workdir=/tmp/cifar10_vp

Or on a folder of images, with train/<class>/ and test/<class>/ or with classes alone:

python -m ddpm_jax.main --config=configs/cifar10_vp.py --workdir=/tmp/folder \
  --config.data.source=folder --config.data.source.path=<folder>

Hardware: one GPU or a TPU slice; the paper trained 10.6 hours on a TPU v3-8. On a CPU a step takes a minute.
Score: FID 3.17 in the paper, with 50,000 samples against the training set; not yet repeated with this code.
"""

from ddpm_jax.config import default_config


def get_config():
  # The defaults are this recipe.
  return default_config()
