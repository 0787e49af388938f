"""Train DDPM on LSUN Bedroom 256x256 with the settings of Ho et al. 2020.

pip install '.[prepare]'
python -m ddpm_jax.main --mode=prepare --config=configs/lsun_bedroom_vp.py
python -m ddpm_jax.main --config=configs/lsun_bedroom_vp.py --workdir=/tmp/lsun_bedroom_vp

Network: 113.7M parameters, trained for 2.4 million steps with 64 images per step.
Data: lsun/bedroom of TFDS, 3 million images (43 GB). Their shorter side has 256 pixels, and the longer side is cropped
at the center. Worker processes decode images during training (data.num_workers). The validation split has 300 images,
too few for scores, so 2,000 training images are held out instead. For other categories, set
--config.data.source.name=lsun/church_outdoor or lsun/cat.
Hardware: a TPU slice or several GPUs. The paper trained on a TPU v3-8 at 2.2 steps per second.
Score: in the paper, FID 6.36 for 50,000 samples with 1000 ancestral steps. Not yet reproduced with this code.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  # The paper flips the images of all data sets but this one.
  config.data.source = spec("data.tfds", name="lsun/bedroom", eval_split="")
  config.data.update({"image_size": 256, "flip": False})
  config.data.update({"hold_out": 2000, "num_workers": 8})
  config.model.network.update({"multipliers": (1, 1, 2, 2, 4, 4), "attention_levels": (4,), "dropout": 0.0})
  config.optimizer.learning_rate = 2e-5
  config.training.update({"batch_size": 64, "steps": 2_400_000})
  config.sampling.batch_size = 64
  return config
