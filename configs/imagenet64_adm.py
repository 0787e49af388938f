"""ADM on class-conditional ImageNet 64x64 (Dhariwal and Nichol 2021, table 11): 296M parameters.

python -m ddpm_jax.main --mode=prepare --config=configs/imagenet64_adm.py --config.data.source.path=<folder> --output=<new folder>
python -m ddpm_jax.main --config=configs/imagenet64_adm.py --workdir=/tmp/imagenet64_adm \
  --config.data.source=packed --config.data.source.path=<new folder>

The folder has train/<class>/ and val/<class>/ with the images as ImageNet gives them. They are halved by box filters, then resized
by bicubic and cropped, as the paper's code does (data.resize=adm), once: the packed images take 14 GB, and no JPEG is decoded in
training. Without the first line the folder itself will do, at the rate at which the host decodes JPEG.
The same by TFDS, whose imagenet2012 wants ILSVRC2012_img_train.tar and _val.tar in its downloads/manual folder: in both
commands --config.data.source="tfds(name='imagenet2012', eval_split='validation')" in place of the folder.
For the down-sampled ImageNet of Chrabaszcz et al. 2017: --config.data.resize=box.
Hardware: a TPU slice or 8 GPUs; the paper trained 540,000 steps of 2048 images. Activations are computed again in the backward
pass (model.network.remat) and in bfloat16.
Score: FID 2.07 in the paper without guidance, with 50,000 samples by 250 steps; not yet repeated with this code.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  # --config.data.source.path=<folder> says where it lies; --mode=plan needs none.
  config.data.source = spec("data.folder", path="", train_split="train", eval_split="val")
  config.data.update(
    {
      "image_size": 64,
      "resize": "adm",
      "num_threads": 16,
    }
  )
  config.model.conditions.classes = spec("conditions.classes", number=1000)
  config.model.process = spec("processes.discrete", betas=spec("schedules.cosine"))
  config.model.prediction = spec("predictions.learned_range", prediction=spec("predictions.EPS"))
  config.model.network.update(
    {
      "channels": 192,
      "multipliers": (1, 2, 3, 4),
      "blocks": 3,
      "attention_levels": (1, 2, 3),
      "head_channels": 64,
      "epsilon": 1e-5,
      "dropout": 0.1,
      "time_embedding": "cos_sin",
      "frequency_shift": 0.0,
      "scale_shift": True,
      "downsample": "residual",
      "upsample": "residual",
      "dtype": "bfloat16",
      "remat": "blocks",
    }
  )
  config.optimizer.update({"learning_rate": 3e-4, "warmup_steps": 0})
  config.training.update({"batch_size": 2048, "steps": 540_000})
  config.sampler = spec("sampling.ancestral", variance="learned")
  config.sampling.update({"num_steps": 250})
  return config
