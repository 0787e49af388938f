"""Run the research scripts and the notebooks from start to end."""

import base64
import io
import json
import os
import runpy
import subprocess
import sys

import jax
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from ddpm_jax import data, sampling
from tests.conftest import CACHE, ROOT
from tests.flags import FAST_COMPILE


def test_the_mixture_script_samples_the_mixture(capsys):
  names = runpy.run_path(str(ROOT / "experiments" / "gaussian_mixture.py"))
  results = names["main"](5000)
  assert "standard deviations" in capsys.readouterr().out
  assert len(results) == 5
  for samples in results.values():
    nearest = np.argmin(np.linalg.norm(np.asarray(samples)[:, None] - names["MEANS"], axis=-1), axis=1)
    np.testing.assert_allclose(np.bincount(nearest) / 5000, names["WEIGHTS"], atol=0.04)
    for k in range(3):
      np.testing.assert_allclose(samples[nearest == k].mean(0), names["MEANS"][k], atol=0.03)
      np.testing.assert_allclose(samples[nearest == k].std(0), 0.1, atol=0.02)


def test_the_script_of_all_samplers_is_short_and_every_sampler_finds_the_ring():
  path = ROOT / "experiments" / "samplers.py"
  assert len(path.read_text().splitlines()) < 40
  names = runpy.run_path(str(path))
  assert set(names["RULES"]) <= set(sampling.__all__)
  for name, (samples, _) in names["results"].items():
    distance = np.linalg.norm(np.asarray(samples)[:, None] - names["MEANS"], axis=-1)
    assert np.mean(distance.min(1) < 0.25) > 0.99, name
    assert np.bincount(distance.argmin(1), minlength=8).min() > 1000 / 8 / 2, name


def test_the_mixture_script_uses_neither_flax_nor_a_config():
  code = "import runpy, sys; runpy.run_path('experiments/gaussian_mixture.py'); "
  code += "print([name for name in ('flax', 'ml_collections', 'grain', 'orbax') if name in sys.modules])"
  result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
  assert result.stdout.strip() == "[]"


def test_the_strip_of_the_readme_shows_the_present_figures(tmp_path):
  names = runpy.run_path(str(ROOT / "experiments" / "strip.py"))
  names["main"](tmp_path / "strip.png")
  with Image.open(tmp_path / "strip.png") as made, Image.open(names["FIGURES"] / "strip.png") as shown:
    np.testing.assert_array_equal(np.asarray(made), np.asarray(shown))


# Replacements that make the quickstart notebook fast. The last line shortens the training of the classifier.
REPLACEMENTS = {
  "channels=32,": "channels=8,",
  "multipliers=(1, 2),": "multipliers=(1,),",
  "jax.random.key(2), 500)": "jax.random.key(2), 100)",
  "(500, 8, 8, 1)": "(100, 8, 8, 1)",
  "range(500)": "range(100)",
  '["image"][:500]': '["image"][:100]',
  'train_items["classes"], 10)': 'train_items["classes"], 10, steps=20)',
}


def execute(name, steps, replacements):
  """Run a notebook after replacing parts of its text.

  Return the notebook's pictures and the text that it prints.
  """
  environment = os.environ | {
    "DDPM_JAX_NOTEBOOK_STEPS": str(steps),
    "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_FLAGS": FAST_COMPILE,
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
  }
  source = (ROOT / "experiments" / name).read_text()
  for text, small in replacements.items():
    text, small = (json.dumps(value)[1:-1] for value in (text, small))
    assert source.count(text) == 1, text
    source = source.replace(text, small)
  notebook = nbformat.reads(source, as_version=4)
  client = NotebookClient(notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
  client.execute(env=environment)
  outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
  pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
  arrays = [np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("L")) for picture in pictures]
  return arrays, "".join(output.get("text", "") for output in outputs)


@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs_from_start_to_end():
  pictures, text = execute("colab_quickstart.ipynb", 30, REPLACEMENTS)
  assert len(pictures) == 6
  assert all(picture.std() > 5 for picture in pictures)
  assert "real images (floor)" in text
  assert jax.default_backend() in text.lower()


@pytest.mark.filterwarnings("ignore")
def test_the_notebook_of_latent_diffusion_runs_from_start_to_end():
  pictures, text = execute("latent_diffusion.ipynb", 2, {"model.times(50)": "model.times(4)"})
  assert len(pictures) == 3
  assert all(picture.std() > 5 for picture in pictures)
  assert "latents" in text


@pytest.mark.filterwarnings("ignore")
def test_the_notebook_of_captions_runs_from_start_to_end():
  network = '"model.network.multipliers": "(1,)", "model.network.attention_levels": "(0,)"'
  smaller = {
    "model.times(25)": "model.times(2)",
    '"training.batch_size": "64"': f'"training.batch_size": "8", {network}',
  }
  smaller |= {"(0.0, 1.0, 2.0, 5.0)": "(2.0, 5.0)"}
  pictures, text = execute("text_to_image.ipynb", 2, smaller)
  assert len(pictures) == 5
  assert all(picture.std() > 5 for picture in pictures)
  assert "guidance scale 5.0" in text


def test_every_score_gets_worse_for_degraded_images():
  names = runpy.run_path(str(ROOT / "experiments" / "score_sanity.py"))
  for rows in names["run"](data.read_digits(), 25, held_out=400).values():
    real, noise, blurred, few, copies = rows.values()
    for degraded in (noise, blurred, few, copies):
      assert degraded["frechet_distance"] > 1.5 * real["frechet_distance"]
      assert degraded["kernel_distance"] > real["kernel_distance"] + real["kernel_distance_std"]
      assert degraded["coverage"] < real["coverage"] - 0.1
    assert noise["precision"] < real["precision"] - 0.2
    assert noise["density"] < 0.5 * real["density"]
    assert few["precision"] > 0.8
    assert few["recall"] < real["recall"] - 0.2
    assert copies["precision"] > 0.8
    assert copies["recall"] < real["recall"] - 0.2
    if "class_score" in real:
      assert few["class_score"] < real["class_score"]
