"""Train the autoencoder of latent diffusion on ImageNet 256x256, with down-sampling by 8 (Rombach et al. 2022).

python -m ddpm_jax.main --config=configs/imagenet256_autoencoder.py --workdir=/tmp/imagenet256_autoencoder \
  --config.data.source.path=<folder> --config.objective.perceptual.weights=<file>

Network: 83.7M parameters, with the settings of kl-f8 in the paper's appendix G and code: latents with 4 channels, an L1
loss, a perceptual loss, and a KL divergence of weight 1e-6. From step 50,000, the loss also contains the adversarial
loss of a patch discriminator, with 0.5 times the adaptive weight of Esser et al. 2021. The network computes in bfloat16
and recomputes activations.
Differences from the paper: the perceptual loss compares features of VGG16 without the learned weights of LPIPS. It is
the mean over feature maps instead of the sum. The discriminator has group normalization. Gradients of the autoencoder
are clipped.
Data: the folder has train/<class>/ and val/<class>/ with the original images of ImageNet. The paper trained on
OpenImages. <file> is torchvision's state dict of VGG16.
Hardware: 8 GPUs or a TPU slice. The paper trained for about 250,000 steps.
Score: in the paper's repository, reconstructions have FID 0.90 and PSNR 24.2 dB. Not yet reproduced with this code.
"""

from ddpm_jax.config import default_config, spec


def get_config():
  config = default_config()
  config.task = "autoencode"
  # Set the path with --config.data.source.path=<folder>. --mode=plan needs no path and no weights.
  config.data.source = spec("data.folder", path="", train_split="train", eval_split="val")
  config.data.update({"image_size": 256, "num_threads": 16})
  config.model.network = spec("networks.Autoencoder", dtype="bfloat16", remat="blocks")
  config.objective = spec(
    "losses.autoencoding",
    error="l1",
    kl_weight=1e-6,
    perceptual=spec("features.vgg", weights=""),
    perceptual_weight=1.0,
    discriminator=spec("networks.PatchDiscriminator", channels=64, levels=3),
    adversarial_weight=0.5,
    adversarial_start=50_000,
  )
  # The learning rate is 4.5e-6 for each image of the batch.
  config.optimizer.update({"arguments": "b1=0.5, b2=0.9", "learning_rate": 4.3e-4, "warmup_steps": 0})
  config.training.update({"batch_size": 96, "steps": 250_000})
  # Set --inception_weights=<file> for an FID. Without it, only PSNR, SSIM and scores in pixel space are computed.
  config.evaluation.update({"num_samples": 50_000, "batch_size": 16, "pairwise_samples": 2000})
  return config
