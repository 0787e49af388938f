"""Test that damaged lines of a log are skipped and counted, and never raise an error."""

import json

import pytest

from ddpm_jax.storage import records

GOOD = [b'{"step": 1, "loss": 0.5}', b'{"step": 2, "loss": NaN}', b'{"step": 30, "loss": 1e-3, "skipped": 2}\r']
BAD = {
  "cut": b'{"step": 40, "lo',
  "no JSON": b"step 40",
  "two in one line": b'{"step": 40}{"step": 50}',
  "a list": b"[40, 0.5]",
  "a number": b"40",
  "null": b"null",
  "no step": b'{"loss": 0.5}',
  "a step in words": b'{"step": "40", "loss": 0.5}',
  "a step that is true": b'{"step": true, "loss": 0.5}',
  "a step that is no integer": b'{"step": 1.5}',
  "a step that is not a number": b'{"step": NaN}',
  "a step below zero": b'{"step": -1}',
  "a step that is null": b'{"step": null}',
  "a value in words": b'{"step": 2, "loss": "high"}',
  "a value that is a list": b'{"step": 2, "loss": [0.5]}',
  "a value beyond floats": b'{"step": 2, "loss": 1' + b"0" * 400 + b"}",
  "a number of too many digits": b'{"step": 2, "loss": 1' + b"0" * 5000 + b"}",
  "not UTF-8": b'{"step": 2, "lo\xffs": 0.5}',
  "UTF-16": '{"step": 2}'.encode("utf-16"),
  "zeros": b"\0" * 100,
  "a zero in a name": b'{"step": 2, "lo\0ss": 1}',
  "too deep": b"[" * 10**5,
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("position", [0, 1, 3])
def test_a_damaged_line_is_skipped_at_any_position(tmp_path, capsys, name, position):
  path = tmp_path / "metrics.jsonl"
  lines = [*GOOD[:position], BAD[name], *GOOD[position:]]
  path.write_bytes(b"\n".join(lines) + (b"" if position == 3 else b"\n\n"))
  assert [line["step"] for line in records.read(path)] == [1, 2, 30]
  error = capsys.readouterr().err
  assert error.count("warning: ") == error.count("\n") == 1
  assert f"warning: 1 line(s) of {path} cannot be read" in error


def test_valid_lines_are_read_without_a_warning(tmp_path, capsys):
  path = tmp_path / "metrics.jsonl"
  assert records.read(path) == []
  path.write_bytes(b"\n".join(GOOD))
  assert records.read(path)[0] == {"step": 1, "loss": 0.5}
  assert len(records.read(path)) == 3
  assert capsys.readouterr().err == ""


def test_a_log_that_is_not_a_file_is_ignored(tmp_path, capsys):
  (tmp_path / "metrics.jsonl").mkdir()
  assert records.read(tmp_path / "metrics.jsonl") == []
  assert "metrics.jsonl (Is a directory); continuing without it" in capsys.readouterr().err


def test_a_resumed_log_drops_damaged_lines_and_keeps_a_copy(tmp_path, capsys):
  path = tmp_path / "metrics.jsonl"
  original = b"\n".join([GOOD[0], *BAD.values(), *GOOD[1:]])
  path.write_bytes(original)
  log = records.MetricLog(tmp_path, 2)
  log.scalars(3, {"loss": 0.25})
  log.close()
  error = capsys.readouterr().err
  assert f"{len(BAD)} line(s) of {path} cannot be read" in error
  assert error.count("warning: ") == 1
  # Valid lines keep their exact bytes. Lines after the step are dropped.
  assert path.read_bytes() == b"\n".join([*GOOD[:2], b'{"step": 3, "loss": 0.25}', b""])
  assert (tmp_path / "damaged" / "metrics.jsonl").read_bytes() == original
  assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
