"""Train EDM on CIFAR-10 with the DDPM++ network (Karras et al. 2022, table 1 and appendix F).

python -m ddpm_jax.main --config=configs/cifar10_ddpmpp.py --workdir=/tmp/cifar10_ddpmpp

Network: 55,733,891 parameters. As in the paper, the network has 9 inputs that describe how an image was augmented. This
recipe only flips images and uses no other augmentations, so these 9 inputs are zero.
Data: as in configs/cifar10_vp.py, prepared once with --mode=prepare.
Hardware: one GPU or a TPU slice. The paper trained 390,625 steps with 512 images each, 200 million images in total.
Score: in the paper, FID 1.97 with augmentation and 18 steps of Heun (35 network evaluations). Not yet reproduced with
this code.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  config.model.process = spec("processes.edm")
  config.model.prediction = spec("predictions.edm", sigma_data=0.5)
  config.objective = spec(
    "losses.denoising", times=spec("losses.log_normal"), weighting=spec("losses.edm", sigma_data=0.5)
  )
  config.model.network.update(
    {
      "multipliers": (2, 2, 2),
      "blocks": 4,
      "dropout": 0.13,
      "downsample": "residual",
      "upsample": "residual",
      "score_sde": True,
      "augmentation_features": 9,
    }
  )
  config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 20_000, "clip_norm": 0.0})
  config.ema.update({"kind": "half_life", "half_life": 500_000, "ramp_up": 0.05})
  config.training.update({"batch_size": 512, "steps": 390_625})
  config.sampler = spec("sampling.heun")
  config.sampling.update({"num_steps": 18})
  config.sampling.clip = None
  return config
