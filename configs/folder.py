"""Train a discrete DDPM on any folder of images at 64x64 (Ho et al. 2020, Nichol and Dhariwal 2021).

python -m ddpm_jax.main --config=configs/folder.py --workdir=/tmp/folder --config.data.source.path=<folder>

The model has the cosine schedule and v-prediction. The folder may have subfolders of any depth. Images are resized and
cropped to 64x64; set --config.data.image_size for another size. If the folder has train/ and test/, the images in test/
are held out for evaluation. Otherwise a tenth of all images is held out, but at most 500. To choose the number of
held-out images, set --config.data.hold_out=<count>; 0 holds out no images and disables scores.
For a large folder, it is faster to decode all images once into records:
python -m ddpm_jax.main --mode=prepare --config=configs/folder.py \
  --config.data.source.path=<folder> --output=<new folder>
Then train with --config.data.source=packed --config.data.source.path=<new folder>.

Hardware: one GPU. On a CPU a step takes seconds; try --config.data.image_size=16 --config.model.network.channels=32.
Score: depends on the folder. The run prints the score of its samples and the score of real images (the floor).
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  # Set the path with --config.data.source.path=<folder>. --mode=plan needs no path.
  config.data.source = spec("data.folder", path="")
  config.data.update({"image_size": 64, "channels": 3, "hold_out": -1, "broken": "skip"})
  config.model.process = spec("processes.discrete", betas=spec("schedules.cosine"))
  config.model.prediction = spec("predictions.V")
  config.objective = spec("losses.denoising", weighting=spec("losses.snr_plus_one"))
  config.model.network.update(
    {
      "channels": 64,
      "multipliers": (1, 2, 2, 4),
      "blocks": 2,
      # Attention only in the middle block, where images are small.
      "attention_levels": (),
      "dropout": 0.1,
    }
  )
  config.optimizer.update({"learning_rate": 2e-4, "warmup_steps": 1000})
  config.ema.decay = 0.999
  config.training.update({"batch_size": 64, "steps": 100_000, "checkpoint_every": 1000, "sample_every": 1000})
  config.sampler = spec("sampling.ddim")
  config.sampling.update({"num_steps": 100})
  config.evaluation.num_samples = 500
  return config
