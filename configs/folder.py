"""Any folder of images: a discrete DDPM with the cosine schedule and v-prediction, at 64x64 (Ho et al. 2020; Nichol and Dhariwal 2021).

python -m ddpm_jax.main --config=configs/folder.py --workdir=/tmp/folder --config.data.source.path=<folder>

The folder is searched to any depth; images of any size are resized and cropped. With train/ and test/ in it the latter are held
out, otherwise a tenth of the images is, at most 500 (--config.data.hold_out=<count>, 0 for none and no scores). Another size:
--config.data.image_size.
A large folder decodes once into records: --mode=prepare --config=configs/folder.py --config.data.source.path=<folder> --output=<new folder>,
then --config.data.source=packed --config.data.source.path=<new folder>.

Hardware: one GPU. On a CPU a step takes seconds; try --config.data.image_size=16 --config.model.network.channels=32 there.
Score: depends on the folder; the run prints it beside its floor.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  # --config.data.source.path=<folder> says where it lies; --mode=plan needs none.
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
      # None but in the middle, which is small whatever the size.
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
