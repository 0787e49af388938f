"""Train Stable Diffusion 1.5 further on a folder of captioned images (Rombach et al. 2022).

python -m ddpm_jax.main --mode=prepare --config=configs/sd15_finetune.py --output=<folder for latents> \
  --config.init_from=<pipeline> --config.data.source.path=<folder>
python -m ddpm_jax.main --config=configs/sd15_finetune.py --workdir=<run> --config.init_from=<pipeline> \
  --config.data.source.path=<folder> --config.data.latents=<folder for latents>
python -m ddpm_jax.main --mode=sample --workdir=<run> --prompt="a red fox in snow"
python -m ddpm_jax.main --mode=export --workdir=<run> --output=<new pipeline>

Data: a folder of images with captions in metadata.jsonl. <pipeline> is the folder of a Stable Diffusion 1.5 pipeline,
or its name on the Hugging Face hub. The autoencoder and the text encoder are frozen, and only the U-Net is trained.
The first command is optional. If you skip it, leave out --config.data.latents in the second command. Each train step
then encodes images and captions.
To train a U-Net from random weights, leave init_from out, and set model.codec.path and model.conditions.text.path to
the pipeline.
Hardware: a GPU or a TPU with 32 GB, or several devices with --config.parallel.fsdp. Time: unknown, because the recipe
has not been run at full size.
Score: not measured.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  # Set the paths of the data and of the pipeline with the flags above. With init_from, the model of the pipeline
  # replaces the model below, except for the dropout of the text, and the network's dtype, dropout, remat and attention.
  config.data.source = spec("data.folder", path="")
  config.data.fields.text = "text"
  config.data.update({"image_size": 512, "channels": 3, "flip": False})
  config.model.codec = spec("codecs.autoencoder", path="")
  config.model.conditions.text = spec("conditions.text", path="", part="text_encoder", length=77, dropout=0.1)
  # The defaults of this network are those of Stable Diffusion 1.
  config.model.network = spec("networks.ConditionalUNet", dtype="bfloat16", remat="blocks")
  config.model.process = spec("processes.discrete", betas=spec("schedules.scaled_linear"))
  config.model.prediction = spec("predictions.EPS")
  config.objective = spec("losses.denoising", weighting=spec("losses.simple"))
  config.optimizer.update({"name": "adamw", "arguments": "weight_decay=0.01", "learning_rate": 1e-5})
  config.optimizer.update({"warmup_steps": 500, "clip_norm": 1.0})
  config.ema.decay = 0.9999
  config.training.update(
    {"batch_size": 32, "steps": 15_000, "log_every": 50, "checkpoint_every": 1000, "sample_every": 1000}
  )
  config.sampler = spec("sampling.ddim")
  config.sampling.update({"num_steps": 50, "batch_size": 4})
  # Latents have no range, so estimates are not clipped.
  config.sampling.clip = None
  config.guidance = spec("guidance.classifier_free", scale=7.5)
  config.evaluation.update({"num_samples": 64, "features": "pixels"})
  return config
