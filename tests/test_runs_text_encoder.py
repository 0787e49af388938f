"""Test runs of networks that read the outputs of a frozen text encoder."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import ddpm_jax
from ddpm_jax import config as configs
from ddpm_jax import runs
from ddpm_jax.commands import flags
from ddpm_jax.config import spec
from ddpm_jax.devices import parallel
from ddpm_jax.models import inputs
from ddpm_jax.runs import frozen, latents, reading, scoring, stepping, training
from tests import user_components
from tests.parameters import one_device
from tests.recipes import newest_state, tiny_config, tree_of
from tests.tokenizer_folders import WORDS, write_bert

pytestmark = pytest.mark.usefixtures("on_one_device")

CAPTIONS = ("a red fox", "a bear left of a fox", "", "a fox and a bear")
COUNT = 24
NETWORK = {"channels": 8, "multipliers": (1,), "blocks": 1, "attention_levels": (0,), "heads": 1, "groups": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """Return a folder with captioned images and a text encoder."""
  root = tmp_path_factory.mktemp("text")
  (root / "images").mkdir()
  pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8), np.uint8)
  lines = [{"file_name": f"{index:02}.png", "text": CAPTIONS[index % 4]} for index in range(COUNT)]
  for index, line in enumerate(lines):
    Image.fromarray(pixels[index]).save(root / "images" / line["file_name"])
  (root / "images" / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
  write_bert(root / "bert")
  shutil.copy(user_components.__file__, root / "mine.py")
  return root


def tree_for(root, **keys):
  config = tiny_config()
  config.data.source = spec("data.folder", path=str(root / "images"))
  config.data.hold_out = 8
  config.data.fields.text = "text"
  config.model.network = spec(f"{root / 'mine.py'}:Reader")
  config.model.conditions.text = spec("conditions.text", path=str(root / "bert"), length=8, dropout=0.3)
  config.training.update({"batch_size": 8, "steps": 2, "checkpoint_every": 2, "sample_every": 10, "log_every": 1})
  config.sampling.update({"num_steps": 2, "batch_size": 8})
  config.evaluation.update({"num_samples": 4, "k": 2})
  tree = tree_of(config)
  for name, value in keys.items():
    tree = configs.replace(tree, name.replace("__", "."), value)
  return tree


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
  folder = tmp_path_factory.mktemp("run") / "run"
  with pytest.MonkeyPatch.context() as patch, one_device():
    patch.setattr(scoring.Scorer, "score", lambda *_: None)
    runs.run_train(tree_for(root), folder)
  return folder


@pytest.fixture
def unscored(monkeypatch):
  monkeypatch.setattr(scoring.Scorer, "score", lambda *_: None)


def losses_of(folder):
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return [line["loss"] for line in lines if "loss" in line]


def test_a_model_of_a_run_attends_to_the_text(root, trained):
  model, params, frozen = ddpm_jax.load(trained)
  assert model.network.module.context_features == 16
  assert len(losses_of(trained)) == 2
  keys = jax.random.split(jax.random.key(0), 2)
  batch = inputs.host_items(model.conditions, {"text": ["a red fox", "a bear"]})
  given = model.encode_conditions(keys, batch, frozen)
  x = model.denoise(params, given)(jnp.ones((2, *model.shape)), 0.5)
  assert not np.allclose(x[0], x[1], atol=1e-6)
  # Checkpoints do not hold the encoder.
  assert jax.tree.structure(newest_state(trained).params) == jax.tree.structure(params)


def change_weights(folder):
  tensors = load_file(folder / "model.safetensors")
  save_file({name: tensor + 1e-3 for name, tensor in tensors.items()}, folder / "model.safetensors")


def test_another_encoder_is_refused(root, trained, tmp_path):
  tree = tree_for(root)
  other = write_bert(tmp_path / "bert")
  change_weights(other)
  tree = configs.replace(tree, "model.conditions.text.path", str(other))
  with pytest.raises(ValueError, match=r"frozen parameters \(conditions\) that differ"):
    runs.run_train(tree, trained)


def swap_words(folder):
  """Swap two words of a tokenizer, so that the vocabulary keeps its size."""
  words = (folder / "vocab.txt").read_text()
  (folder / "vocab.txt").write_text(words.replace("fox\nbear", "bear\nfox"))


def test_another_tokenizer_is_refused(root, trained, tmp_path, run_command):
  other = shutil.copytree(root / "bert", tmp_path / "bert")
  swap_words(other)
  tree = configs.replace(tree_for(root), "model.conditions.text.path", str(other))
  with pytest.raises(ValueError, match=r"Got tokenizers that differ from those of earlier training in .*run; expected"):
    runs.run_train(tree, trained)
  with pytest.raises(ValueError, match="Got tokenizers that differ"):
    run_command(
      "--mode=sample", f"--workdir={trained}", f"--config.model.conditions.text.path={other}", "--prompt=a fox"
    )


def test_captions_that_are_cut_are_counted_once(root, capsys):
  tree = configs.replace(tree_for(root), "model.conditions.text.length", 7)
  reading.read_data(configs.build(tree))
  lines = [line for line in capsys.readouterr().err.splitlines() if "more tokens than fit" in line]
  # A quarter of the captions has six words, and five fit.
  (line,) = lines
  assert re.search(r"^warning: [1-6] of 16 training texts .* such as 'fox' of the text 'a bear left of a fox'$", line)
  reading.read_data(configs.build(tree_for(root)))
  assert "more tokens" not in capsys.readouterr().err


def test_a_network_with_its_own_embedding_trains(root, tmp_path, unscored):
  words = {"component": "conditions.words", "vocabulary": WORDS, "length": 8}
  network = {"component": "networks.ConditionalUNet", **NETWORK}
  runs.run_train(tree_for(root, model__network=network, model__conditions__text=words), tmp_path / "run")
  model, params, frozen = ddpm_jax.load(tmp_path / "run")
  assert params["tokens"]["embedding"].shape == (len(WORDS) + 3, 32)
  assert not frozen
  assert all(np.isfinite(losses_of(tmp_path / "run")))


def newest_samples(folder):
  path = max((folder / "samples").glob("*_nfe*.npz"), key=lambda path: path.stat().st_mtime_ns)
  with np.load(path) as arrays:
    return path.with_suffix(""), dict(arrays)


def test_prompts_are_short_forms_and_pictures_keep_them(trained, tmp_path, run_command):
  sample = ["--mode=sample", f"--workdir={trained}", "--guidance_scale=2"]
  first, second = "a red fox", "größe 🦊, a fox"
  run_command(*sample, "--given", f"text={first}", "--given", f"text={second}")
  _, expected = newest_samples(trained)
  assert list(expected["text"]) == [first, second]
  run_command(*sample, "--prompt", first, "--prompt", second, "--num_samples=3")
  folder, arrays = newest_samples(trained)
  assert list(arrays["text"]) == [first, second, first]
  np.testing.assert_array_equal(arrays["samples"][:2], expected["samples"])
  pictures = [Image.open(path) for path in sorted(folder.glob("*.png"))]
  assert [picture.info["prompt"] for picture in pictures] == [first, second, first]
  assert {name: pictures[1].info[name] for name in ("seed", "index", "sampler", "num_steps", "guidance_scale")} == {
    "seed": "0",
    "index": "1",
    "sampler": "ddim(eta=0.0)",
    "num_steps": "2",
    "guidance_scale": "2.0",
  }
  np.testing.assert_array_equal(np.asarray(pictures[2]), arrays["samples"][2, :, :, 0])
  # One image for each line of a file.
  (tmp_path / "prompts.txt").write_text(f"{first}\n\n  {second}\n", encoding="utf-8")
  run_command(*sample, f"--prompts={tmp_path / 'prompts.txt'}", "--negative_prompt", "a bear")
  folder, arrays = newest_samples(trained)
  assert list(arrays["text"]) == [first, second]
  assert Image.open(folder / "00001.png").info["negative_prompt"] == "a bear"
  assert (arrays["samples"] != expected["samples"]).any()


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--prompt=a", "--prompts={file}"], "Got --prompt and --prompts; expected only one"),
    (["--prompts={missing}"], "Cannot read --prompts=.*missing"),
    (["--prompts={empty}"], "with no text; expected a file with one text in each line"),
    (["--prompts={binary}"], "Pass a text file in UTF-8"),
    (["--prompts={large}"], "with more than 16 bytes; expected a file with one text in each line"),
  ],
)
def test_wrong_prompts_are_errors(words, message, trained, tmp_path, run_command, monkeypatch):
  monkeypatch.setattr(flags, "_MAX_PROMPT_BYTES", 16)
  files = {name: tmp_path / name for name in ("file", "missing", "empty", "binary", "large")}
  # Byte 17 is inside a character.
  files["large"].write_text("€" * 6, encoding="utf-8")
  files["file"].write_text("a\n")
  files["empty"].write_text("\n \n")
  files["binary"].write_bytes(b"\xff\xfe\xff")
  with pytest.raises(ValueError, match=message):
    run_command("--mode=sample", f"--workdir={trained}", *(word.format(**files) for word in words))


def test_scores_say_which_captions_the_samples_have(trained, run_command, capsys):
  run_command("--mode=eval", f"--workdir={trained}", "--config.evaluation.report=false")
  texts = json.loads((trained / "eval.json").read_text())["texts"]["text"]
  assert texts.startswith("captions of 4 held-out images chosen at random, ")
  assert texts in capsys.readouterr().out


def test_only_texts_of_both_the_data_and_the_model_are_read_from_the_data(root, tmp_path):
  tree = tree_for(root, model__codec=f"{root / 'mine.py'}:tiny_autoencoder", sampling__clip=None)
  runs.run_prepare(configs.build(tree), tmp_path / "prepared")
  tree = configs.replace(tree, "data.latents", str(tmp_path / "prepared"))
  source, _ = reading.read_data(configs.build(tree))
  # The data have one text: no text of the first model, and one of two texts of the second model.
  unconditional = configs.replace(tree, "model.network", {"component": "networks.UNet", **NETWORK})
  without = configs.replace(unconditional, "model.conditions.text", None)
  other = {"component": "conditions.text", "path": str(root / "bert"), "length": 6, "dropout": 0.1}
  for changed, stored in ((without, set()), (configs.replace(tree, "model.conditions.other", other), {"text"})):
    experiment = configs.build(changed)
    opened, full = latents.open_latents(experiment, source), experiment.model.load_frozen()
    latents.check_codec(experiment, opened, full)
    hosts = {name: one.host for name, one in experiment.model.conditions.items()}
    trained = latents.with_stored_texts(experiment, opened).model
    assert {name for name, one in trained.conditions.items() if one.host is not hosts[name]} == stored
    needed = latents.without_encoders(experiment, opened, full)
    assert jax.tree.structure(needed) == jax.tree.structure(trained.frozen_shapes())
    again = latents.with_encoders(experiment, opened, needed, parallel.make_mesh(devices=jax.devices()[:1]))
    jax.tree.map(np.testing.assert_array_equal, again, full)


def test_prepared_states_give_the_losses_of_the_encoder_without_loading_it(root, tmp_path, unscored, monkeypatch):
  autoencoder = f"{root / 'mine.py'}:tiny_autoencoder"
  latent = {"model__codec": autoencoder, "sampling__clip": None}
  runs.run_train(tree_for(root, **latent), tmp_path / "encoder")
  prepared = tmp_path / "prepared"
  runs.run_prepare(configs.build(tree_for(root, **latent)), prepared)
  tree = tree_for(root, data__latents=str(prepared), **latent)
  found, made, loaded = [], [], []
  step, make, load = stepping.encode, training._Trainer.parameters, frozen.load_conditions

  def record(model, frozen, keys, batch):
    found.append((set(frozen["conditions"]["text"]), set(batch)))
    return step(model, frozen, keys, batch)

  def record_parameters(trainer, state):
    made.append(make(trainer, state))
    assert made[-1].frozen["codec"] is trainer.frozen["codec"]
    return made[-1]

  def record_loading(experiment, names, mesh):
    loaded.append(list(names))
    return load(experiment, names, mesh)

  monkeypatch.setattr(stepping, "encode", record)
  monkeypatch.setattr(training._Trainer, "parameters", record_parameters)
  monkeypatch.setattr(frozen, "load_conditions", record_loading)
  monkeypatch.setattr(scoring.Scorer, "training_scores", lambda *_: {})
  runs.run_train(configs.replace(tree, "evaluation.every", 2), tmp_path / "run")
  # The scores and the preview after the last step share the encoder. The scores of the run load it again.
  assert loaded == [["text"]] * 2
  assert [set(parameters.frozen["conditions"]["text"]) for parameters in made] == [{"encoders", "computed"}] * 2
  assert found
  for parts, batch in found:
    assert parts == {"computed"}
    assert {"text.states", "text.mask", "latent"} <= batch
  losses = [losses_of(tmp_path / name) for name in ("encoder", "run")]
  np.testing.assert_allclose(*losses, rtol=1e-5)
  # Runs on images and runs on prepared data both record the encoder, so a run may change from one to the other.
  assert (tmp_path / "run" / "frozen.json").exists()
  runs.run_train(configs.replace(configs.replace(tree, "data.latents", ""), "training.steps", 3), tmp_path / "run")
  # Another length or another encoder is refused.
  changed = configs.replace(tree, "model.conditions.text.length", 6)
  with pytest.raises(ValueError, match=r"encoded with text\.text=.*'length': 8.*; expected text\.text=.*'length': 6"):
    runs.run_train(changed, tmp_path / "other")
  write_bert(tmp_path / "bert")
  change_weights(tmp_path / "bert")
  changed = configs.replace(tree, "model.conditions.text.path", str(tmp_path / "bert"))
  with pytest.raises(ValueError, match="with texts encoded by another encoder than the one in config.model.conditions"):
    runs.run_train(changed, tmp_path / "other")
  swap_words(tmp_path / "bert")
  with pytest.raises(ValueError, match=r"encoded with text\.text\.tokenizers=.*; expected text\.text\.tokenizers="):
    runs.run_train(changed, tmp_path / "other")
