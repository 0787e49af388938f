"""Train ADM on class-conditional ImageNet 64x64 (Dhariwal and Nichol 2021, table 11).

python -m ddpm_jax.main --mode=prepare --config=configs/imagenet64_adm.py \
  --config.data.source.path=<folder> --output=<new folder>
python -m ddpm_jax.main --config=configs/imagenet64_adm.py --workdir=/tmp/imagenet64_adm \
  --config.data.source=packed --config.data.source.path=<new folder>

Network: 296M parameters. The network computes in bfloat16. The backward pass recomputes activations to save memory
(model.network.remat).
Data: the folder has train/<class>/ and val/<class>/ with the original images of ImageNet. As in the paper's code, box
filters repeatedly halve the size of an image, which is then resized with bicubic interpolation and cropped
(data.resize=adm). The packed images take 14 GB, and training on them decodes no JPEG. Training also works on the
original folder, but only as fast as the host decodes JPEG.
To read imagenet2012 from TFDS instead, put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into the folder
downloads/manual of TFDS. In both commands, replace --output and all --config.data.source flags by
--config.data.source="tfds(name='imagenet2012', eval_split='validation')".
To resize images as in the down-sampled ImageNet of Chrabaszcz et al. 2017, add --config.data.resize=box.
Hardware: a TPU slice or 8 GPUs. The paper trained for 540,000 steps with 2048 images per step.
Score: in the paper, FID 2.07 without guidance, for 50,000 samples with 250 steps. Not yet reproduced with this code.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  # Set the path with --config.data.source.path=<folder>. --mode=plan needs no path.
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
