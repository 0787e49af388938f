"""DDPM on CelebA 64x64 with the settings of DDIM's paper (Song et al. 2021, appendix D): 78.7M parameters.

pip install '.[prepare]'
python -m ddpm_jax.main --mode=prepare --config=configs/celeba64_vp.py
python -m ddpm_jax.main --config=configs/celeba64_vp.py --workdir=/tmp/celeba64_vp

TFDS's celeb_a, 162,770 training images of 178x218: the central 140x140 are resized to 64x64, as score_sde does (by antialiased
bicubic here, bilinear there). DDIM's own code takes a 128x128 square a little lower, so scores need the same crop to be
compared. The decoded training set takes 2 GB, so it is read as it goes; --output=<new folder> with --mode=prepare packs it as
64x64 records, for --config.data.source=packed --config.data.source.path=<new folder>.
Hardware: one GPU or a TPU slice; the paper trained 500,000 steps of 128 images.
Score: FID 3.26 in the paper by 1000 ancestral steps of the large variance, 6.53 by 100 of DDIM; not yet repeated with this code.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  config.data.source = spec("data.tfds", name="celeb_a")
  config.data.update({"image_size": 64, "crop": 140})
  # Attention at 16x16, as everywhere in the paper.
  config.model.network.update({"multipliers": (1, 2, 2, 2, 4), "attention_levels": (2,)})
  config.training.steps = 500_000
  return config
