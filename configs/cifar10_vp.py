"""Train DDPM on CIFAR-10 with the settings of Ho et al. 2020.

Prepare the data once, then train. Preparation needs TensorFlow (1.8 GB); training does not.

pip install '.[prepare]'
python -m ddpm_jax.main --mode=prepare --config=configs/cifar10_vp.py
python -m ddpm_jax.main --config=configs/cifar10_vp.py --workdir=/tmp/cifar10_vp

To train on a folder of images instead, with sub-folders train/<class>/ and test/<class>/, or only <class>/:

python -m ddpm_jax.main --config=configs/cifar10_vp.py --workdir=/tmp/folder \
  --config.data.source=folder --config.data.source.path=<folder>

Network: 35.7M parameters, trained for 800,000 steps with 128 images each.
Hardware: one GPU or a TPU slice. The paper trained for 10.6 hours on a TPU v3-8. On a CPU a step takes a minute.
Score: in the paper, FID 3.17 of 50,000 samples against the training set. Not yet reproduced with this code.
"""

from ddpm_jax.config import default_config


def get_config():
  # The default config is this recipe.
  return default_config()
