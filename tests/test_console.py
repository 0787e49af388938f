"""Test output in any encoding, output to closed pipes, and output without streams."""

import json
import shlex
import subprocess
import sys

import pytest

from tests import commands
from tests.conftest import ROOT
from tests.forked import PATIENCE
from tests.parameters import write_run
from tests.recipes import tiny_config

PRINTS = """
import sys, warnings
from tqdm import tqdm
from ddpm_jax.commands import console
with console.safe_output():
  for stream in (sys.stdout, sys.stderr):
    print("0.5 ± 0.1 \\udcff 中", file=stream)
    tqdm.write("1 \\N{MINUS SIGN} 2 \\N{MULTIPLICATION SIGN} 3", file=stream)
  for _ in tqdm(range(2), desc="±"):
    pass
  warnings.warn("±")
"""


def run(script, *, stdout=subprocess.PIPE, **environment):
  options = {"stdout": stdout, "stderr": subprocess.PIPE, "timeout": PATIENCE, "check": False, "cwd": ROOT}
  return subprocess.run([sys.executable, "-c", script], env=commands.environment_for(1) | environment, **options)


@pytest.mark.parametrize(
  ("encoding", "first", "second"),
  [
    ("ascii", rb"0.5 +- 0.1 \udcff \u4e2d", b"1 - 2 x 3"),
    ("ascii:strict", rb"0.5 +- 0.1 \udcff \u4e2d", b"1 - 2 x 3"),
    ("latin-1", b"0.5 \xb1 0.1 \\udcff \\u4e2d", b"1 - 2 \xd7 3"),
    ("utf-8", "0.5 ± 0.1 \\udcff 中".encode(), "1 \N{MINUS SIGN} 2 \N{MULTIPLICATION SIGN} 3".encode()),
  ],
)
def test_any_text_can_be_printed_in_any_encoding(encoding, first, second):
  result = run(PRINTS, PYTHONIOENCODING=encoding)
  assert result.returncode == 0, result.stderr
  assert result.stdout == first + b"\n" + second + b"\n"
  assert result.stderr.startswith(first + b"\n" + second + b"\n")


@pytest.mark.parametrize("streams", [">&- 2>&-", "> /dev/full 2> /dev/full"])
def test_output_to_closed_or_full_streams_is_dropped(streams, tmp_path):
  script = f"{PRINTS}\nopen({str(tmp_path / 'done')!r}, 'w')"
  command = f"exec {shlex.join([sys.executable, '-c', script])} {streams}"
  assert subprocess.run(command, shell=True, env=commands.environment_for(1), cwd=ROOT, check=False).returncode == 0
  assert (tmp_path / "done").exists()


def read_one_line(command):
  """Read one line of a command's output, and then close the output.

  Return the line, the exit code and the text that the command wrote to stderr.
  """
  options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT}
  options["env"] = commands.environment_for(1) | {"PYTHONUNBUFFERED": ""}
  with subprocess.Popen([sys.executable, *command], **options) as process:
    line = process.stdout.readline()
    process.stdout.close()
    # The command may wait for its input to end.
    process.stdin.close()
    return line, process.wait(PATIENCE), process.stderr.read()


@pytest.mark.parametrize(
  ("script_end", "code"),
  [
    # The output fails in print, in tqdm, and at exit, when Python flushes its buffers.
    ("for _ in range(10**6): print('x' * 99)", 141),
    ("for _ in range(10**6): tqdm.write('x' * 99)", 141),
    ("sys.stdin.read(); print('x')", 0),
    ("sys.stdin.read(); print('x'); sys.exit(3)", 3),
  ],
)
def test_a_program_ends_silently_when_its_reader_is_gone(script_end, code):
  script = f"import sys\nfrom tqdm import tqdm\nfrom ddpm_jax.commands import console\nwith console.safe_output():\n  print(1, flush=True)\n  {script_end}"
  assert read_one_line(["-c", script]) == (b"1\n", code, b"")


def test_a_broken_pipe_other_than_the_output_is_an_error():
  result = run(
    "from ddpm_jax.commands import console\nwith console.safe_output():\n  raise BrokenPipeError('of a server')"
  )
  assert result.returncode == 1
  assert b"BrokenPipeError: of a server" in result.stderr


def test_the_command_line_ends_silently_when_its_reader_is_gone(tmp_path):
  line, _, error = read_one_line(["-m", "ddpm_jax.main", "--mode=sample", "--help"])
  assert line.startswith(b"usage: ddpm-jax --mode=sample")
  assert error == b""
  process = subprocess.Popen(
    [sys.executable, "-m", "ddpm_jax.main", "--mode=eval", f"--workdir={tmp_path}"],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    cwd=ROOT,
    env=commands.environment_for(1),
  )
  process.stdout.close()
  with process:
    assert process.wait(PATIENCE) == 141
    assert process.stderr.read() == b""


def test_an_evaluation_prints_to_an_ascii_terminal(tmp_path, dense):
  config = tiny_config()
  write_run(config, tmp_path)
  arguments = [commands.DENSE, "--mode=eval", f"--workdir={tmp_path}", "--config.evaluation.report=true"]
  arguments += ["--config.evaluation.likelihood=('continuous',)", "--config.evaluation.likelihood_images=6"]
  command = [sys.executable, "-m", "ddpm_jax.main", *arguments]
  environment = commands.environment_for(1) | {"PYTHONIOENCODING": "ascii"}
  result = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False, cwd=ROOT, env=environment)
  assert result.returncode == 0, result.stderr
  assert b" +- " in result.stdout
  assert "likelihood" in json.loads((tmp_path / "eval.json").read_text())
  assert (tmp_path / "report.html").read_bytes().decode("utf-8")
