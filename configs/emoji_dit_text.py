"""Train a latent diffusion transformer that draws a 64x64 emoji from its name (Peebles and Xie 2023).

python experiments/emoji.py --packages=<packages> --output=<folder>
python -m ddpm_jax.main --config=configs/emoji_autoencoder.py --workdir=/tmp/emoji_autoencoder \
  --config.data.source.path=<folder>
python -m ddpm_jax.main --mode=prepare --config=configs/emoji_dit_text.py --output=/tmp/emoji_dit_text_latents \
  --config.data.source.path=<folder> --config.model.codec.path=/tmp/emoji_autoencoder \
  --config.model.conditions.text.path=<folder of all-MiniLM-L6-v2>
python -m ddpm_jax.main --config=configs/emoji_dit_text.py --workdir=/tmp/emoji_dit_text \
  --config.data.source.path=<folder> --config.model.codec.path=/tmp/emoji_autoencoder \
  --config.model.conditions.text.path=<folder of all-MiniLM-L6-v2> --config.data.latents=/tmp/emoji_dit_text_latents
python -m ddpm_jax.main --mode=sample --workdir=/tmp/emoji_dit_text --prompt="red apple" --prompt="fox" --num_samples=64

Data: 1,400 emoji to train on and 199 held out (see docs/data.md), with their names as captions. The folder that
--mode=prepare writes also contains the text encoder's output for each caption, so training does not run the text
encoder.
The settings are those of configs/emoji_text.py, with a transformer instead of the U-Net: each block attends to the
patches and then to the tokens of the text. Latents of 16x16x4 are 64 patches.
Hardware: 2 CPU cores.
Score: none yet, because the recipe was not yet trained in full.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  # Set the paths of the data, the run of the autoencoder and the text encoder with the flags above.
  config.data.source = spec("data.folder", path="")
  config.data.fields.text = "text"
  config.data.update({"image_size": 64, "channels": 3, "flip": False})
  config.model.codec = spec("codecs.autoencoder", path="")
  config.model.process = spec("processes.discrete", betas=spec("schedules.cosine"))
  config.model.prediction = spec("predictions.V")
  config.objective = spec("losses.denoising", weighting=spec("losses.snr_plus_one"))
  config.model.conditions.text = spec("conditions.text", path="", length=16, dropout=0.1)
  config.model.network = spec("networks.DiT", channels=128, layers=6, heads=4, patch=2)
  config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 100, "schedule": "cosine", "clip_norm": 1.0})
  config.ema.decay = 0.999
  config.training.update(
    {"batch_size": 32, "steps": 4000, "log_every": 100, "checkpoint_every": 1000, "sample_every": 1000}
  )
  config.sampler = spec("sampling.dpmpp_2m")
  config.sampling.update({"num_steps": 30, "batch_size": 64})
  # Latents have no range, so estimates are not clipped.
  config.sampling.clip = None
  config.guidance = spec("guidance.classifier_free", scale=3.0)
  # The Frechet distance needs more images than an image has values, so it is not computed.
  config.evaluation.update({"num_samples": 199, "features": "pixels"})
  return config
