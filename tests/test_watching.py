"""Test profiler traces of training steps."""

import jax
import pytest

from ddpm_jax.devices import watching


@pytest.mark.parametrize(("last_step", "traced"), [(20, 3), (12, 2)])
def test_a_trace_reports_the_number_of_traced_steps(last_step, traced, tmp_path, monkeypatch, capsys):
  """If training ends early, the trace has fewer steps than requested."""
  monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
  trace = watching.Trace(tmp_path, start=10, count=3)
  for step in range(1, last_step + 1):
    trace.before_step(step)
  trace.close()
  assert f"trace of {traced} steps" in "".join(capsys.readouterr())
