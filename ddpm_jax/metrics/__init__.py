"""Define feature spaces, and scores that compare the features of generated and real images."""

from ddpm_jax.metrics.classes import ClassStatistics, class_statistics, inception_score, merge_classes
from ddpm_jax.metrics.classifier import (
  CLASSIFIER_FEATURES,
  cached_classifier,
  classifier_space,
  load_classifier,
  pixel_space,
  save_classifier,
  train_classifier,
)
from ddpm_jax.metrics.features import FeatureSpace, check_images, check_memory, extractor
from ddpm_jax.metrics.frechet import check_rank, frechet_distance
from ddpm_jax.metrics.inception import check_colors, inception_space, resize_clean, resize_tf1
from ddpm_jax.metrics.kernel import KernelDistance, kernel_distance, mmd
from ddpm_jax.metrics.moments import Gaussian, Moments, MomentSum, gaussian, merge, moments
from ddpm_jax.metrics.neighbors import Neighborhoods, nearest, neighborhoods, precision_recall
from ddpm_jax.metrics.pairs import psnr, ssim
from ddpm_jax.metrics.statistics import Statistics, load_statistics, save_statistics
from ddpm_jax.storage.sealed import digest

__all__ = [
  "CLASSIFIER_FEATURES",
  "ClassStatistics",
  "FeatureSpace",
  "Gaussian",
  "KernelDistance",
  "MomentSum",
  "Moments",
  "Neighborhoods",
  "Statistics",
  "cached_classifier",
  "check_colors",
  "check_images",
  "check_memory",
  "check_rank",
  "class_statistics",
  "classifier_space",
  "digest",
  "extractor",
  "frechet_distance",
  "gaussian",
  "inception_score",
  "inception_space",
  "kernel_distance",
  "load_classifier",
  "load_statistics",
  "merge",
  "merge_classes",
  "mmd",
  "moments",
  "nearest",
  "neighborhoods",
  "pixel_space",
  "precision_recall",
  "psnr",
  "resize_clean",
  "resize_tf1",
  "save_classifier",
  "save_statistics",
  "ssim",
  "train_classifier",
]
