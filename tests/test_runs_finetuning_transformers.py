"""Train a small Stable Diffusion 3 from its folder to a folder that diffusers opens."""

import diffusers
import jax
import numpy as np
import pytest
from PIL import Image

import ddpm_jax
from ddpm_jax import interop
from tests import test_interop_sd3_pipelines as sd3
from tests.test_runs_finetuning import CAPTIONS, RATE, STEPS, flags_for, largest_change, write_images

pytestmark = pytest.mark.usefixtures("on_one_device", "unscored")


@pytest.mark.slow
def test_stable_diffusion_3_is_fine_tuned_sampled_and_exported(tmp_path, run_command):
  folder, run, exported = (tmp_path / name for name in ("pipeline", "run", "exported"))
  sd3.make("without T5", sd3.make_tokenizers(tmp_path)).save_pretrained(folder)
  write_images(tmp_path / "images")
  flags = [*flags_for(tmp_path), f"--config.init_from={folder}"]
  run_command(*flags, f"--workdir={run}")
  _, params, _ = ddpm_jax.load(run)
  _, start = interop.diffusers.load(folder)
  assert 0 < largest_change(params, start) < 1.1 * STEPS * RATE
  run_command("--mode=sample", f"--workdir={run}", f"--prompt={CAPTIONS[0]}", "--num_samples=2")
  pictures = [Image.open(path) for path in sorted(run.glob("samples/*/*.png"))]
  assert [picture.info["prompt"] for picture in pictures] == [CAPTIONS[0]] * 2
  run_command("--mode=export", f"--workdir={run}", f"--output={exported}")
  absent = {"text_encoder_3": None, "tokenizer_3": None}
  peer = diffusers.StableDiffusion3Pipeline.from_pretrained(exported, **absent)
  assert peer.scheduler.config.shift == 3.0
  _, same = interop.diffusers.load(exported)
  jax.tree.map(np.testing.assert_array_equal, same, jax.tree.map(np.asarray, params))
