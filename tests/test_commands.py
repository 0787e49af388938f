"""Test help, recipe names and flags of every mode."""

import os
import shlex
import subprocess
import sys

import pytest

import ddpm_jax
from ddpm_jax.commands import MODES, command, command_line, flags, jax_setup, parser
from ddpm_jax.config import recipes
from ddpm_jax.storage import places
from tests import commands
from tests.conftest import ROOT


@pytest.mark.parametrize("mode", MODES)
def test_help_shows_what_a_mode_does_its_flags_and_two_examples(mode):
  module, text = command(mode), command_line.answer([f"--mode={mode}", "--help"])
  assert module.__doc__.partition("\n")[0] in text
  for group in module.FLAGS:
    for flag in group.flags:
      assert f"--{flag.name} " in text
  assert len(module.EXAMPLES) >= 2
  for example in module.EXAMPLES:
    assert f"ddpm-jax {example}" in text
    args = command_line.parse(shlex.split(example))
    if getattr(args, "config", None):
      assert args.config in places.recipes()
  assert any(command_line.parse(shlex.split(example)).mode == mode for example in module.EXAMPLES)


def test_help_has_one_line_for_each_mode():
  text = command_line.answer(["--help"])
  for mode in MODES:
    assert f"\n  {mode:<9}{command(mode).__doc__.split()[0]}" in text
  assert command_line.answer(["-h"]) == text
  assert command_line.answer(["--version"]) == f"ddpm_jax {ddpm_jax.__version__}"
  assert command_line.answer(["--config=digits_vp", "--workdir=/tmp/x"]) is None


def test_the_list_of_recipes_has_one_line_for_each_recipe():
  listed = command_line.answer(["--config=list"]).splitlines()
  files = sorted((ROOT / "configs").glob("*.py"))
  assert [one.split()[0] for one in listed] == [path.stem for path in files]
  assert all(len(one.split()) > 3 for one in listed)


@pytest.mark.parametrize("flag", ["--help", "--version", "--config=list", "--mode=plan --help"])
def test_all_ways_to_start_the_program_print_the_same_text(flag):
  """Each process prints without importing JAX, because the import takes a second."""
  forms = [["-m", "ddpm_jax"], ["-m", "ddpm_jax.main"], ["-c", "from ddpm_jax.main import main; main()"]]
  environment = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
  outputs = []
  for form in forms:
    words = [sys.executable, *form, *flag.split()]
    result = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    outputs.append(result.stdout)
    assert " jax\n" not in result.stderr
  assert outputs == [command_line.answer(flag.split()) + "\n"] * 3


def test_a_recipe_is_found_by_its_name_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert recipes.read("digits_vp") == recipes.read(str(ROOT / "configs" / "digits_vp.py"))
  # A file takes precedence over a recipe of the same name.
  (tmp_path / "digits_vp").write_text((ROOT / "configs" / "digits_sde.py").read_text())
  assert recipes.read("digits_vp") == recipes.read(str(ROOT / "configs" / "digits_sde.py"))
  for wrong, message in (
    ("digit_vp", "Got --config=digit_vp, neither a file nor the name of a recipe; .*Did you mean digits_vp?"),
    ("configs/digits_vp.py", "Did you mean digits_vp?"),
    ("qqqq", "Choose one of celeba256_latent, .*mnist_vp"),
  ):
    with pytest.raises(ValueError, match=message):
      recipes.read(wrong)


WRONG = {
  "another mode's": (
    "--mode=stats --sampler=heun",
    "Got --sampler in mode stats; expected it in mode train, plan, sample, ",
  ),
  "the default mode's": ("--seed=3", "Got --seed in mode train; expected it in mode sample, edit or eval only"),
  "one mode's": ("--mode=eval --task=inpaint", "Got --task in mode eval; expected it in mode plan or edit only"),
  "no run": ("--mode=prepare --workdir=/tmp/x", "Got --workdir in mode prepare; expected it in mode train, plan, "),
  "no mode": ("--mode=evaluate", "Got 'evaluate' as --mode; .*eval, .*Did you mean 'eval'"),
  "an empty mode": ("--mode=", "Got '' as --mode"),
  "no mode, with help": ("--mode=smaple --help", "Did you mean 'sample'"),
  "no flag": ("--mode=sample --num_sample=3", "Got --num_sample; .*Did you mean --num_samples"),
  "part of a flag": ("--mode=sample --num=3", "Got --num; expected a flag of mode sample"),
  "no value": ("--mode=sample --seed", "Got --seed without a value; expected --seed=<value>"),
  "no number": ("--mode=sample --guidance_scale=much", "Got --guidance_scale=much; expected a number"),
  "no switch": ("--mode=sample --ema=no", "Got --ema=no; expected true or false"),
  "a large seed": (f"--mode=sample --seed={2**32}", f"Got --seed={2**32}; expected an integer from 0 to {2**32 - 1}"),
  "no count": ("--mode=sample --num_samples=0", "Got --num_samples=0; expected 1 or more"),
  "no counts": ("--mode=eval --num_steps=3,x", "Got --num_steps=3,x; expected integers of 1 or more"),
  "a list for one": ("--mode=sample --num_steps=3,4", "Got --num_steps=3,4; expected an integer"),
  "a key without a config": ("--mode=convert --config.seed=3", "Got --config.seed in mode convert, which reads no"),
  "a word": ("--mode=sample 3", "Got '3' on the command line; expected flags only"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_flags_are_refused(name):
  words, message = WRONG[name]
  with pytest.raises(ValueError, match=message):
    command_line.answer(words.split()) or command_line.parse(words.split())


def test_a_mistake_ends_the_program_with_code_2():
  for words in (["--mode=plan", "--sampler=heun"], ["--mode=trian"], ["--config=digit_vp", "--workdir=/tmp/x"]):
    code, output = commands.call(*words)
    assert code == 2
    assert output.count("error: ") == 1, output
    assert "Traceback" not in output


def test_all_forms_of_flags_are_parsed():
  args = command_line.parse(
    ["--mode", "sample", "--seed", "3", "--ema", "--given=a=1", "--given", "b=x,y", "--classes=3,7", "--workdir="]
  )
  assert (args.mode, args.seed, args.ema, args.classes, args.workdir) == ("sample", 3, True, ["3", "7"], None)
  steering = flags.steering(args)
  assert steering.given == {"classes": ["3", "7"], "a": ["1"], "b": ["x,y"]}
  assert command_line.parse(["--mode=sample", "--ema=false"]).ema is False
  compared = command_line.parse(
    ["--mode=eval", "--sampler=heun(s_churn=40, s_noise=1),ddim", "--sampler=euler", "--num_steps=5,9"]
  )
  names = ["heun(s_churn=40, s_noise=1)", "ddim", "euler"]
  assert flags.variants(compared) == [{"sampler": name, "sampling__num_steps": n} for name in names for n in (5, 9)]


def test_short_forms_set_config_keys():
  args = command_line.parse(
    ["--mode=edit", "--sampler=heun", "--strength=0.5", "--guidance_scale=2", "--config.seed=3"]
  )
  assert flags.config_keys(args) == {"seed": "3", "sampler": "heun", "editing.strength": "0.5"}
  for key in ("sampler", "sampler.s_churn", "guidance.scale", "editing.strength"):
    args.keys = {key: "1"}
    with pytest.raises(ValueError, match=rf"and --config\.{key}; expected only one of them"):
      flags.config_keys(args)


def test_sampling_ignores_the_mesh_of_the_config():
  args = command_line.parse(["--mode=sample", "--seed=1"])
  assert flags.sampling_keys(args) == {"parallel.data": "0", "parallel.fsdp": "1"}
  args = command_line.parse(["--mode=eval", "--fsdp=4", "--config.parallel.data=2"])
  assert flags.sampling_keys(args, num_samples=3) == {
    "parallel.data": "2",
    "parallel.fsdp": "4",
    "evaluation.num_samples": "3",
  }


def test_flags_of_the_same_name_are_parsed_alike():
  """A flag is parsed in the same way in all modes, except for flags that accept several values in one mode."""
  parsers: dict[str, set] = {}
  for mode in MODES:
    for group in command(mode).FLAGS:
      for flag in group.flags:
        parsers.setdefault(flag.name, set()).add(flag.parse)
  different = {name for name, functions in parsers.items() if len(functions) > 1}
  assert different == {"sampler", "num_steps"}
  assert parsers["num_steps"] == {parser.count, parser.counts}


MISTAKES = {
  "--mode=train": "Got no --workdir",
  "--mode=train --workdir=/tmp/x --resume=yes": "Got 'yes' as --resume",
  "--mode=sample": "Got no --workdir",
  "--mode=sample --workdir=/tmp/x --given=3": "Got --given 3; expected a condition",
  "--mode=sample --workdir=/tmp/x --sampler=ddim --config.sampler=heun": "Got --sampler and --config.sampler",
  "--mode=edit --workdir=/tmp/x --task=img": "Got 'img' as --task; .*Did you mean 'img2img'",
  "--mode=edit --workdir=/tmp/x --task=invert --strength=0.5": "Got --strength with --task=invert",
  "--mode=eval --workdir=/tmp/x --num_steps=3 --config.sampling.num_steps=4": "Got --num_steps and",
  "--mode=export --workdir=/tmp/x": "Got no --output",
  "--mode=stats --config=digits_vp": "Got no --output",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_flags_are_checked_before_devices_are_initialized(words, monkeypatch):
  def start(args):
    raise AssertionError("Devices were initialized.")

  monkeypatch.setattr(jax_setup, "join_processes", start)
  monkeypatch.setattr(jax_setup, "start_devices", start)
  args = command_line.parse(words.split())
  with pytest.raises(ValueError, match=MISTAKES[words]):
    command(args.mode).run(args)
