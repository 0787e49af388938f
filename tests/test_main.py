"""Test the command line from start to end: complete runs, killed and resumed runs, and invalid input."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from ddpm_jax.storage import workdir
from tests import commands
from tests.commands import DENSE, RECIPE, assert_refused, call, start
from tests.recipes import kill_environment, newest_state


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Return the folder and the output of a finished run of the tiny recipe."""
  folder = tmp_path_factory.mktemp("run")
  code, output = commands.run_process(RECIPE, f"--workdir={folder}", "--config.evaluation.report=true")
  assert code == 0, output
  return folder, output


def test_training_writes_all_files_and_prints_progress(run):
  folder, output = run
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [3, 6, 9, 12]
  assert all(line["loss"] > 0 and line["grad_norm"] > 0 and line["images_per_second"] > 0 for line in lines)
  assert sorted(path.name for path in (folder / "samples").glob("*.png")) == [
    "final.png",
    "step_0000006.png",
    "step_0000012.png",
  ]
  assert Image.open(folder / "samples" / "step_0000006.png").size == (402, 402)  # 8 tiles of 48, and 9 gaps of 2
  assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["12", "8"]
  assert list((folder / "tensorboard").glob("events*"))
  assert json.loads((folder / "config.json").read_text())["training"]["steps"] == 12
  report = json.loads((folder / "eval.json").read_text())
  assert set(report["scores"]) == {"generated", "floor"}
  assert report["num_samples"] == 40
  assert report["step"] == 12
  assert report["sampling"]["nfe"] == 4
  assert "compiling the train step" in output
  assert commands.NOWHERE not in output, "XLA's log is silenced"
  assert "images/s" in output
  for name in ("final.npz", "final.png", "eval.json", "checkpoints", "metrics.jsonl", "floor", "report.html"):
    assert name in output


def test_samples_are_saved_and_do_not_depend_on_their_number_or_the_devices(run):
  folder, _ = run
  code, output = call(
    "--mode=sample", f"--workdir={folder}", "--num_samples=21", "--sampler=euler", "--num_steps=3", "--seed=5"
  )
  assert code == 0, output
  with np.load(folder / "samples" / "euler_nfe3_seed5.npz") as file:
    samples = file["samples"]
  assert samples.shape == (21, 8, 8, 1)
  assert samples.dtype == np.uint8
  assert (folder / "samples" / "euler_nfe3_seed5.png").exists()
  # Sample i does not depend on the number of samples or devices.
  code, output = call(
    "--mode=sample", f"--workdir={folder}", "--num_samples=5", "--sampler=euler", "--num_steps=3", "--seed=5", devices=8
  )
  assert code == 0, output
  with np.load(folder / "samples" / "euler_nfe3_seed5_2.npz") as file:
    assert np.max(np.abs(file["samples"].astype(int) - samples[:5])) <= 1


def test_multistep_consistency_adds_noise_between_steps(run):
  """The last step adds no noise, so a single step equals a step of DDIM."""
  folder, _ = run
  steps = {"multistep_consistency": (1, 2), "ddim": (1,)}
  for sampler, counts in steps.items():
    for count in counts:
      flags = [f"--sampler={sampler}", f"--num_steps={count}", "--seed=8", "--num_samples=3"]
      code, output = call("--mode=sample", f"--workdir={folder}", *flags)
      assert code == 0, output

  def samples(name):
    with np.load(folder / "samples" / f"{name}_seed8.npz") as file:
      return file["samples"].astype(int)

  one, two = samples("multistep_consistency_nfe1"), samples("multistep_consistency_nfe2")
  assert np.max(np.abs(one - samples("ddim_nfe1"))) <= 1
  assert np.mean(one != two) > 0.3


def test_eval_again_gives_the_same_scores(run):
  folder, _ = run
  before = json.loads((folder / "eval.json").read_text())
  code, output = call("--mode=eval", f"--workdir={folder}")
  assert code == 0, output
  after = json.loads((folder / "eval.json").read_text())
  assert after["scores"] == before["scores"]


def test_a_finished_run_is_not_trained_again(run):
  folder, _ = run
  code, output = call(RECIPE, f"--workdir={folder}")
  assert code == 0, output
  assert "training is complete at step 12" in output
  assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4


def test_samples_have_the_classes_of_the_flag(tmp_path):
  model = ["--config.model.conditions.classes=classes(number=10, dropout=0.1)", "--config.training.steps=3"]
  code, output = call(RECIPE, f"--workdir={tmp_path}", *model)
  assert code == 0, output
  code, output = call("--mode=sample", f"--workdir={tmp_path}", "--num_samples=5", "--classes=3,7")
  assert code == 0, output
  with np.load(next((tmp_path / "samples").glob("ddim*.npz"))) as file:
    np.testing.assert_array_equal(file["classes"], [3, 7, 3, 7, 3])
  code, output = call("--mode=sample", f"--workdir={tmp_path}", "--num_samples=5", "--classes=3")
  assert code == 0, output
  assert len(list((tmp_path / "samples").glob("ddim*.npz"))) == 2, "nothing is overwritten"
  for wrong in ("10", "a", "-1", "3,,7"):
    code, output = call("--mode=sample", f"--workdir={tmp_path}", f"--classes={wrong}")
    assert_refused(code, output, "Got classes '.*'; expected integers from 0 to 9, such as --classes=0")


def test_importance_sampling_takes_arguments_from_flags_and_resumes_exactly(tmp_path, dense):
  options = [
    "--config.objective.times=importance",
    "--config.objective.times.size=2",
    "--config.model.process.betas.num_steps=4",
  ]
  folders = unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
  for folder, steps in ((unbroken, 20), (resumed, 12), (resumed, 20)):
    code, output = call(DENSE, f"--workdir={folder}", *options, f"--config.training.steps={steps}")
    assert code == 0, output
  assert "resuming from the checkpoint of step 12" in output
  states = [newest_state(folder) for folder in folders]
  # The records of losses are full, so they set the sampling probabilities.
  np.testing.assert_array_equal(states[0].memory.counts, [2, 2, 2, 2])
  assert np.all(states[0].memory.history > 0)
  for a, b in zip(*map(jax.tree.leaves, states), strict=True):
    np.testing.assert_array_equal(a, b)
  times = json.loads((unbroken / "config.json").read_text())["objective"]["times"]
  assert times == {"component": "losses.importance", "size": 2, "uniform_share": 0.001}


def test_a_killed_and_resumed_run_ends_bit_for_bit_the_same(tmp_path, dense):
  options = [
    "--config.training.steps=24",
    "--config.training.checkpoint_every=8",
    "--config.training.sample_every=1000",
  ]
  unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
  process = start(DENSE, f"--workdir={resumed}", *options, **kill_environment(resumed / "checkpoints" / "8", step=15))
  code, output = process.finish()
  assert code == -signal.SIGKILL, output
  assert not (resumed / "eval.json").exists()
  code, output = call(DENSE, f"--workdir={resumed}", *options)
  assert code == 0, output
  assert "resuming from the checkpoint of step" in output
  code, output = call(DENSE, f"--workdir={unbroken}", *options)
  assert code == 0, output
  for a, b in zip(*(jax.tree.leaves(newest_state(folder)) for folder in (unbroken, resumed)), strict=True):
    np.testing.assert_array_equal(a, b)

  def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}, len(lines)

  (first, num_lines), (second, num_lines_resumed) = metrics(unbroken), metrics(resumed)
  assert set(first) == set(second)
  assert num_lines == num_lines_resumed, "no line is written twice"
  # Only the first mean after resuming may differ, because it may average fewer steps.
  assert sum(first[step] != second[step] for step in first) <= 1


def test_sigterm_saves_at_once_and_sets_the_exit_code(tmp_path):
  options = ["--config.training.steps=100000", "--config.training.checkpoint_every=100000"]
  process = start(DENSE, f"--workdir={tmp_path}", *options, "--config.training.sample_every=100000")
  commands.wait_for(tmp_path / "metrics.jsonl", process)
  process.send_signal(signal.SIGTERM)
  code, output = process.finish()
  assert code == 128 + signal.SIGTERM, output
  step = int(re.search(r"saved at step ([\d,]+); run the same command again", output)[1].replace(",", ""))
  assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(step)]
  code, output = call(DENSE, f"--workdir={tmp_path}", f"--config.training.steps={step + 2}", "--resume=must")
  assert code == 0, output
  assert f"resuming from the checkpoint of step {step:,}" in output


def test_a_folder_in_use_is_refused_while_its_process_is_alive(tmp_path):
  process = start(DENSE, f"--workdir={tmp_path}", "--config.training.steps=100000")
  commands.wait_for(tmp_path / "checkpoints" / "4", process)
  code, output = call(DENSE, f"--workdir={tmp_path}", "--config.training.steps=100000")
  assert_refused(code, output, f"but process {process.pid} on .* trains in this folder")
  process.send_signal(signal.SIGKILL)
  process.finish()
  code, output = call(DENSE, f"--workdir={tmp_path}", "--config.training.steps=4")
  assert code == 0, output


def test_plan_prints_costs_and_memory(tmp_path):
  code, output = call(RECIPE, "--mode=plan", "--devices=4", "--config.parallel.fsdp=4")
  assert code == 0, output
  for text in ("4 x cpu", "FLOPs an image", "reduce-scatter", "all-gather", "state", "temporaries"):
    assert text in output


def test_training_uses_all_devices(tmp_path):
  code, output = call(RECIPE, f"--workdir={tmp_path}", "--config.training.steps=3", devices=8)
  assert code == 0, output
  assert "on 8 cpu device(s)" in output


def test_a_finished_run_resumes_with_more_steps(run, tmp_path):
  folder = tmp_path / "longer"
  shutil.copytree(run[0], folder)
  code, output = call(RECIPE, f"--workdir={folder}", "--config.training.steps=15")
  assert code == 0, output
  assert "resuming from the checkpoint of step 12" in output
  assert json.loads((folder / "eval.json").read_text())["step"] == 15


def folder_with_a_broken_image(tmp_path):
  folder = tmp_path / "images"
  folder.mkdir()
  rng = np.random.default_rng(0)
  for index in range(30):
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{index:02d}.png")
  (folder / "17.png").write_bytes((folder / "17.png").read_bytes()[:60])
  return folder


WRONG = {
  "key": ([RECIPE, "--config.training.step=3"], "Did you mean 'training.steps'"),
  "type": ([RECIPE, "--config.training.steps=many"], "training.steps=many"),
  "mode": ([RECIPE, "--mode=trian"], "Did you mean 'train'"),
  "flag": ([RECIPE, "--smapler=ddim"], "Did you mean --sampler"),
  "word": ([RECIPE, "ddim"], "expected flags only"),
  "sampler": ([RECIPE, "--sampler=dddim"], "Did you mean 'ddim'"),
  "file": (["--config=configs/digits_v.py"], "Did you mean configs/digits_vp.py"),
  "no_config": ([], "holds no run"),
  "size": ([RECIPE, "--config.model.network.multipliers=(1,1,1,1,1)"], "divisible by 16"),
  "betas": ([RECIPE, "--config.model.process.betas.beta_end=3."], r"inside \(0, 1\)"),
  "folder": ([RECIPE, "--config.data.source=folder(path='/none')"], "does not exist"),
  "no_checkpoint": ([RECIPE, "--mode=sample"], "holds no checkpoint"),
  "no_checkpoint_eval": ([RECIPE, "--mode=eval"], "holds no checkpoint"),
  "too_many": ([RECIPE, "--config.evaluation.num_samples=5000"], "evaluation.num_samples=5000"),
  "key_alone": (
    ["--mode=sample", "--config.sampler.eta=0.5"],
    "Got no --config, and .* holds no run; expected a recipe",
  ),
  "mesh": ([RECIPE, "--fsdp=3"], r"data=0 by fsdp=3 on 1 device"),
  "accumulate": ([RECIPE, "--config.training.accumulate=5"], "accumulate=5 with a batch of 16"),
  "optimizer": ([RECIPE, "--config.optimizer.name=adm"], "Did you mean 'adam'"),
  "argument": ([RECIPE, "--config.optimizer.arguments=beta=0.9"], "beta"),
  "remat": ([RECIPE, "--config.model.network.remat=block"], "remat='block'"),
  "schedule": ([RECIPE, "--config.optimizer.schedule=cosin"], "Did you mean 'cosine'"),
  "must": ([RECIPE, "--resume=must"], "--resume=must.*holds no checkpoint"),
  "resume": ([RECIPE, "--resume=yes"], "'yes' as --resume"),
  "processes": ([RECIPE, "--num_processes=2"], "expected all three"),
  "topology": ([RECIPE, "--mode=plan", "--topology=v5e:3x5x7"], "v5e"),
  "generation": ([RECIPE, "--mode=plan", "--topology=v9:2x2"], "Known generations"),
  "small_topology": ([RECIPE, "--mode=plan", "--devices=32"], "batch size of 16 on 32 devices"),
  "seed": ([RECIPE, "--seed=3"], "--seed in mode train; expected it in mode sample, edit or eval only"),
  "two_samplers": (
    [RECIPE, "--mode=sample", "--sampler=heun", "--config.sampler=ddim"],
    "Got --sampler and --config.sampler; expected only one of them",
  ),
  "a_sampler_and_its_key": (
    [RECIPE, "--mode=sample", "--sampler=heun", "--config.sampler.eta=0.5"],
    "Got --sampler and --config.sampler.eta; expected only one of them",
  ),
  "two_numbers_of_steps": (
    [RECIPE, "--mode=sample", "--num_steps=3", "--config.sampling.num_steps=4"],
    "Got --num_steps and --config.sampling.num_steps",
  ),
  "two_scales": (
    [RECIPE, "--mode=sample", "--guidance_scale=3", "--config.guidance.scale=4"],
    "Got --guidance_scale and --config.guidance.scale",
  ),
  "two_strengths": (
    [RECIPE, "--mode=edit", "--task=img2img", "--strength=0.5", "--config.editing.strength=0.7"],
    "Got --strength and --config.editing.strength",
  ),
  "two_numbers_of_samples": (
    [RECIPE, "--mode=eval", "--num_samples=20", "--config.evaluation.num_samples=30"],
    "Got --num_samples and --config.evaluation.num_samples",
  ),
  "sampler_of_a_mode_without_samples": (
    [RECIPE, "--mode=prepare", "--sampler=heun"],
    "Got --sampler in mode prepare; expected it in mode train, plan, sample, edit or eval only",
  ),
  "plan_of_nothing": ([RECIPE, "--mode=plan", "--task=sampling"], "Got 'sampling' as --task; .*Did you mean 'sample'"),
  "classes_of_a_train_step": (
    [RECIPE, "--mode=plan", "--classes=3"],
    "Got --classes with --task=train; expected it with --task=sample only",
  ),
  "sampling_mesh": ([RECIPE, "--mode=sample", "--fsdp=0"], "Got --fsdp=0; expected 1 or more"),
  "two_meshes": (
    [RECIPE, "--mode=sample", "--fsdp=2", "--config.parallel.fsdp=4"],
    "Got --fsdp and --config.parallel.fsdp; expected only one of them",
  ),
  "argument_of_the_sampler": ([RECIPE, "--sampler=heun(s_churm=40)"], "'sampler.s_churm' .*mean 'sampler.s_churn'"),
  "brackets": ([RECIPE, "--sampler=heun(s_churn=40"], r"sampler='heun\(s_churn=40'; expected a name and its arguments"),
  "given": (
    [RECIPE, "--mode=sample", "--given=3"],
    "Got --given 3; expected a condition and its value, such as --given c",
  ),
  "best_metric": ([DENSE, "--config.training.best_metric=los"], "Did you mean 'loss'"),
  "best_score": (
    [RECIPE, "--config.training.keep_best=1", "--config.training.best_metric=eval/fid"],
    "evaluation.every",
  ),
  "output_uri": ([RECIPE, "--mode=export", "--output=gs://bucket/model"], "--output=gs://bucket/model, a URI"),
  "input_uri": ([RECIPE, "--mode=edit", "--task=img2img", "--input=s3://a/b.png"], "--input=s3://a/b.png, a URI"),
  "mask_uri": ([RECIPE, "--mode=edit", "--task=inpaint", "--mask=gs://a/b.png"], "--mask=gs://a/b.png, a URI"),
  "classifier_uri": ([RECIPE, "--mode=sample", "--classifier=gs://a/b"], "--classifier=gs://a/b, a URI"),
  "weak_uri": ([RECIPE, "--mode=sample", "--weak=gs://a/b@3"], "--weak=gs://a/b.*a URI"),
  "upsampler_uri": ([RECIPE, "--mode=sample", "--upsampler=gs://a/b"], "--upsampler=gs://a/b, a URI"),
  "data_uri": (
    [RECIPE, "--config.data.source=arrays(path='gs://a/b')"],
    "data.source.path=gs://a/b, a URI",
  ),
  "stats": ([RECIPE, "--mode=stats", "--output=/dev/null/x.npz"], "Cannot write /dev/null/x.npz: Not a directory"),
  "stats_type": ([RECIPE, "--mode=stats", "--output=/tmp/x.txt"], "expected a new file that ends in .npz"),
  "prepare": (
    [RECIPE, "--mode=prepare", "--config.data.source=folder(path='/')", "--output=/dev/null/x"],
    "Cannot write /dev/null/x: Not a directory",
  ),
  "home": ([RECIPE, "--mode=export", "--output=~nobody-of-this-name/x"], "no home folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_input_gives_one_message_at_once(name, tmp_path):
  arguments, message = WRONG[name]
  workdir = tmp_path / "work"
  folder = [] if {"--mode=stats", "--mode=prepare"} & {*arguments} else [f"--workdir={workdir}"]
  code, output = call(*arguments, *folder)
  assert_refused(code, output, message)
  assert not workdir.exists(), "no folder is created"


@pytest.mark.parametrize("uri", ["gs://bucket/run", "s3://bucket/run", "file:///tmp/run", "hdfs://host:9/run"])
@pytest.mark.parametrize("mode", ["train", "sample", "eval", "plan"])
def test_a_uri_is_refused_as_workdir(uri, mode):
  code, output = call(RECIPE, f"--mode={mode}", f"--workdir={uri}")
  assert_refused(code, output, f"Got --workdir={uri}, a URI; .*Mount the bucket")
  assert not Path(uri.partition("/")[0]).exists()


@pytest.mark.parametrize("name", ["exp[1,2]", "what?", "a*", "a\\b", b"\xff", "exp[1]/run"])
def test_a_path_that_orbax_cannot_read_is_refused_before_training(name, tmp_path):
  workdir = os.path.join(os.fsencode(tmp_path), os.fsencode(name))
  code, output = call(DENSE, f"--workdir={os.fsdecode(workdir)}")
  assert_refused(code, output, "as the checkpoint folder, .*Rename the folder")
  assert not os.listdir(tmp_path)


def test_errors_of_the_operating_system_name_the_path(tmp_path):
  folder = tmp_path / ("x" * 300)
  code, output = call(DENSE, f"--workdir={folder}")
  assert_refused(code, output, f"error: Cannot use {folder}/checkpoints: File name too long. Check that it exists")
  (tmp_path / ".lock").mkdir()
  code, output = call(DENSE, f"--workdir={tmp_path}")
  assert_refused(code, output, f"error: Cannot write {tmp_path}/.lock: Is a directory. Make it writable")


def test_errors_that_native_code_prints_itself_are_silenced(tmp_path):
  """On a full disk, Orbax prints an error for each failed write after the first."""
  config = tmp_path / "config.py"
  config.write_text(
    "import sys\nfrom ddpm_jax.storage import workdir\nfrom tests import recipes\n\n\n"
    "def complain(folder):\n  sys.excepthook(RuntimeError, RuntimeError('Event loop is closed'), None)\n"
    "  raise ValueError('The end.')\n\n\n"
    "def get_config():\n  workdir.checkpoint_steps = complain\n  return recipes.get_config()\n"
  )
  _, output = start(f"--config={config}", f"--workdir={tmp_path}").finish()
  assert output.endswith("error: The end.\n")
  assert "Event loop" not in output


@pytest.mark.parametrize("folder", ["/s3/bucket", "/gs/bucket", "/hf", "logs:/gs:", "xgs:/run"])
def test_a_path_that_orbax_takes_for_a_bucket_is_refused_before_training(folder, tmp_path):
  workdir = tmp_path / folder
  code, output = call(DENSE, f"--workdir={workdir}")
  assert_refused(code, output, "orbax reads this path as a bucket.*Set another --workdir")
  assert not workdir.exists()


def test_any_other_path_works(tmp_path):
  """The path has characters that are special in file systems, shells, URLs or formats, and `..` after a link."""
  (tmp_path / "real" / "deep").mkdir(parents=True)
  (tmp_path / "link").symlink_to("real/deep")
  folder = tmp_path / "link" / ".." / "a b" / "ü%20#:'\"{}|!~$HOME;&\n-x]" / "5.orbax-checkpoint-tmp" / "7"
  options = [DENSE, f"--workdir={folder}", "--config.training.checkpoint_every=2"]
  for arguments in (["--config.training.steps=3"], ["--config.training.steps=5"], ["--mode=sample", "--num_samples=1"]):
    code, output = call(*options, *arguments)
    assert code == 0, output
  assert "checkpoint of step 5" in output
  assert "damaged" not in output
  assert sorted(os.listdir(tmp_path)) == ["link", "real"]


@pytest.mark.parametrize("state", ["nothing", "half a checkpoint", "no config", "half a config", "another config"])
def test_a_run_without_a_checkpoint_restarts(state, tmp_path):
  """A run may be killed at any time before its first checkpoint."""
  folder = tmp_path / "checkpoints"
  folder.mkdir()
  if state == "half a checkpoint":
    (folder / "5.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
  if state == "half a config":
    (tmp_path / "config.json").write_text('{"se')
  if state == "another config":
    workdir.write_config(tmp_path, {"seed": 3})
  code, output = call(DENSE, f"--workdir={tmp_path}", "--config.training.steps=4")
  assert code == 0, output
  assert "starting a new run" in output
  assert workdir.checkpoint_steps(tmp_path) == [4]


def test_a_missing_platform_is_refused(tmp_path):
  code, output = start(DENSE, f"--workdir={tmp_path / 'run'}", JAX_PLATFORMS="cuda").finish()
  assert_refused(
    code, output, "Got JAX_PLATFORMS=cuda, but JAX finds no device.*Set JAX_PLATFORMS to an available platform"
  )


def test_a_killed_worker_ends_the_run_and_it_resumes_exactly(tmp_path, dense):
  unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
  intervals = [f"--config.training.{name}_every=1000000" for name in ("checkpoint", "sample")]
  endless = ["--config.training.steps=1000000", "--config.data.num_workers=2"]
  process = start(DENSE, f"--workdir={resumed}", *intervals, *endless)
  commands.wait_for(resumed / "metrics.jsonl", process)
  children = [path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/children")]
  workers = [pid for pid in " ".join(children).split() if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
  os.kill(int(workers[-1]), signal.SIGKILL)
  code, output = process.finish()
  assert code == 2, output
  assert re.search(r"error: A worker process that decodes images .* has died.*num_workers", output), output
  assert "Traceback" not in output
  step = int(re.search(r"saved at step ([\d,]+); run the same command again", output)[1].replace(",", ""))
  assert workdir.checkpoint_steps(resumed) == [step]
  for folder in (resumed, unbroken):
    code, output = call(DENSE, f"--workdir={folder}", *intervals, f"--config.training.steps={step + 5}")
    assert code == 0, output
  for a, b in zip(*(jax.tree.leaves(newest_state(folder)) for folder in (unbroken, resumed)), strict=True):
    np.testing.assert_array_equal(a, b)


def test_invalid_image_folders_give_one_message(tmp_path):
  images = folder_with_a_broken_image(tmp_path)
  folder = [RECIPE, f"--config.data.source=folder(path={str(images)!r})", "--config.data.hold_out=0"]
  code, output = call(*folder, f"--workdir={tmp_path / 'a'}")
  assert_refused(code, output, r"Cannot decode the image .*17\.png")
  empty = tmp_path / "empty"
  empty.mkdir()
  code, output = call(*folder[:2], f"--config.data.source.path={empty}", f"--workdir={tmp_path / 'a'}")
  assert_refused(code, output, "contains no images")
  assert not (tmp_path / "a").exists()


def test_invalid_workdirs_and_batch_sizes_give_one_message(run, tmp_path):
  folder, _ = run
  before = {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}
  code, output = call(RECIPE, f"--workdir={folder}", "--config.model.network.channels=16", "--config.seed=3")
  assert_refused(code, output, "holds a run of another config")
  assert "model.network.channels: 8 in the folder, 16 now" in output
  assert "seed: 0 in the folder, 3 now" in output
  assert {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))} == before
  code, output = call(RECIPE, f"--workdir={folder / 'eval.json'}")
  assert_refused(code, output, "is not writable")
  code, output = call(RECIPE, "--config.training.batch_size=12", f"--workdir={tmp_path / 'a'}", devices=8)
  assert_refused(code, output, "batch size of 12 on 8 devices")
  code, output = call(RECIPE)
  assert_refused(code, output, "no --workdir")
