"""Train SiT-XL/2, a latent transformer with flow matching, on ImageNet 256x256 (Ma et al. 2024).

python -m ddpm_jax.main --mode=prepare --config=configs/imagenet256_sit_xl2.py --output=<latents> \
  --config.data.source.path=<folder> --config.model.codec.path=<autoencoder>
python -m ddpm_jax.main --config=configs/imagenet256_sit_xl2.py --workdir=/tmp/imagenet256_sit_xl2 \
  --config.data.source.path=<folder> --config.model.codec.path=<autoencoder> --config.data.latents=<latents>

Network: that of configs/imagenet256_dit_xl2.py without a learned variance, 674.8M parameters for latents of 32x32x4.
The network predicts the velocity of the linear interpolant, at uniform times. One compiled loop runs the 28 blocks. The
network computes in bfloat16 and recomputes activations.
Data: the folder has train/<class>/ and val/<class>/ with the original images of ImageNet. As in the paper's code, box
filters repeatedly halve the size of an image, which is then resized with bicubic interpolation and cropped
(data.resize=adm). <autoencoder> is a folder of diffusers such as stabilityai/sd-vae-ft-ema, the autoencoder of the
paper.
Settings, as in the paper: 7,000,000 steps with 256 images each, AdamW with a constant learning rate of 1e-4 and no
weight decay, an EMA of 0.9999, and classes hidden with a probability of 10%. Two settings differ: the time input is
1000 t (t in the paper's code), and the last sampling step returns the estimate of the data (a step of the SDE without
noise in the code).
Hardware: a TPU slice or 8 GPUs. --mode=plan shows where a step fits (see docs/plan.md).
Score: in the paper, FID 8.3 without guidance, and 2.06 with guidance, for 50,000 samples with 250 steps of the SDE. The
paper guides three of the four channels: --config.guidance="classifier_free(scale=1.5, channels=3)". This recipe has not
been run.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  # The flags --config.data.source.path and --config.model.codec.path set the two empty paths.
  config.data.source = spec("data.folder", path="", train_split="train", eval_split="val")
  config.data.update({"image_size": 256, "channels": 3, "flip": True, "resize": "adm", "num_threads": 16})
  config.model.codec = spec("codecs.autoencoder", path="")
  config.model.conditions.classes = spec("conditions.classes", number=1000, dropout=0.1)
  config.model.process = spec("processes.rectified_flow")
  config.model.prediction = spec("predictions.VELOCITY")
  config.objective = spec("losses.denoising", weighting=spec("losses.velocity"))
  # The defaults of the network are those of SiT-XL/2.
  config.model.network = spec("networks.DiT", scan=True, dtype="bfloat16", remat="blocks")
  config.optimizer.update({"name": "adamw", "arguments": "weight_decay=0.0", "learning_rate": 1e-4})
  config.optimizer.update({"warmup_steps": 0, "clip_norm": 0.0})
  config.ema.decay = 0.9999
  config.training.update({"batch_size": 256, "steps": 7_000_000})
  config.sampler = spec("sampling.sde", diffusion="sigma")
  config.sampling.update({"num_steps": 250, "batch_size": 64})
  # As in the paper, the last step goes from t = 0.04 to 0.
  config.sampling.grid = spec("grids.uniform", t_min=0.04)
  # Latents have no range, so estimates are not clipped.
  config.sampling.clip = None
  return config
