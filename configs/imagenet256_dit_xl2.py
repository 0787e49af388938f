"""Train DiT-XL/2, a latent diffusion transformer, on ImageNet 256x256 (Peebles and Xie 2023).

python -m ddpm_jax.main --mode=prepare --config=configs/imagenet256_dit_xl2.py --output=<latents> \
  --config.data.source.path=<folder> --config.model.codec.path=<autoencoder>
python -m ddpm_jax.main --config=configs/imagenet256_dit_xl2.py --workdir=/tmp/imagenet256_dit_xl2 \
  --config.data.source.path=<folder> --config.model.codec.path=<autoencoder> --config.data.latents=<latents>

Network: 674.8M parameters for latents of 32x32x4. One compiled loop runs the 28 blocks. The network computes in
bfloat16 and recomputes activations.
Data: the folder has train/<class>/ and val/<class>/ with the original images of ImageNet. As in the paper's code, box
filters repeatedly halve the size of an image, which is then resized with bicubic interpolation and cropped
(data.resize=adm). <autoencoder> is a folder of diffusers such as stabilityai/sd-vae-ft-ema, the autoencoder of the
paper.
Settings, as in the paper: 7,000,000 steps with 256 images each, AdamW with a constant learning rate of 1e-4 and no
weight decay, an EMA of 0.9999, classes hidden with a probability of 10%, 1000 steps with linear betas, and a learned
variance.
Export: the network has the constants of the paper's code. diffusers' class has others, so train with
--config.model.network.frequency_shift=1.0 and --config.model.network.mlp_epsilon=1e-5 to use --mode=export later.
Hardware: a TPU slice or 8 GPUs. --mode=plan shows where a step fits (see docs/plan.md).
Score: in the paper, FID 9.62 without guidance, and 2.27 with guidance, for 50,000 samples with 250 steps. The paper
guides three of the four channels: --config.guidance="classifier_free(scale=1.5, channels=3)". This recipe has not been
run.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  # The flags --config.data.source.path and --config.model.codec.path set the two empty paths.
  config.data.source = spec("data.folder", path="", train_split="train", eval_split="val")
  config.data.update({"image_size": 256, "channels": 3, "flip": True, "resize": "adm", "num_threads": 16})
  config.model.codec = spec("codecs.autoencoder", path="")
  config.model.conditions.classes = spec("conditions.classes", number=1000, dropout=0.1)
  config.model.process = spec("processes.discrete", betas=spec("schedules.linear"))
  config.model.prediction = spec("predictions.learned_range", prediction=spec("predictions.EPS"))
  # The defaults of the network are those of DiT-XL/2.
  config.model.network = spec("networks.DiT", scan=True, dtype="bfloat16", remat="blocks")
  config.optimizer.update({"name": "adamw", "arguments": "weight_decay=0.0", "learning_rate": 1e-4})
  config.optimizer.update({"warmup_steps": 0, "clip_norm": 0.0})
  config.ema.decay = 0.9999
  config.training.update({"batch_size": 256, "steps": 7_000_000})
  config.sampler = spec("sampling.ancestral", variance="learned")
  config.sampling.update({"num_steps": 250, "batch_size": 64})
  config.sampling.grid = spec("grids.linspace")
  # Latents have no range, so estimates are not clipped.
  config.sampling.clip = None
  return config
