"""Train DDPM on CelebA 64x64 with the settings of DDIM (Song et al. 2021, appendix D).

pip install '.[prepare]'
python -m ddpm_jax.main --mode=prepare --config=configs/celeba64_vp.py
python -m ddpm_jax.main --config=configs/celeba64_vp.py --workdir=/tmp/celeba64_vp

Network: 78.7M parameters.
Data: the TFDS data set celeb_a, 162,770 training images of 178x218 pixels. The central 140x140 pixels are resized to
64x64, as in the code of score_sde, but with antialiased bicubic instead of bilinear interpolation. The code of DDIM
instead crops a square of 128x128 pixels whose center is a little lower. Scores are comparable only for equal crops.
The decoded training set takes 2 GB. Only sets of at most 1 GiB are decoded once at the start, so here each image is
decoded every time it is read. To decode images only once, pack them as 64x64 records: add --output=<new folder> to
--mode=prepare, then train with --config.data.source=packed --config.data.source.path=<new folder>.
Hardware: one GPU or a TPU slice. The paper trained 500,000 steps with 128 images each.
Score: in the paper, FID 3.26 for 1000 ancestral steps with the large variance, and 6.53 for 100 steps of DDIM. Not
yet reproduced with this code.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  config.data.source = spec("data.tfds", name="celeb_a")
  config.data.update({"image_size": 64, "crop": 140})
  # Attention at 16x16, as in all models of the paper.
  config.model.network.update({"multipliers": (1, 2, 2, 2, 4), "attention_levels": (2,)})
  config.training.steps = 500_000
  return config
