"""What the package offers by name."""

import importlib

import pytest

import ddpm_jax


@pytest.mark.parametrize("name", [name for name in ddpm_jax.__all__ if name != "load"])
def test_public_modules_come_by_name(name):
  assert getattr(ddpm_jax, name) is importlib.import_module(f"ddpm_jax.{name}")


def test_all_names_are_listed_and_models_are_loaded_by_one():
  assert set(dir(ddpm_jax)) == {*ddpm_jax.__all__, "__version__"}
  assert ddpm_jax.load is importlib.import_module("ddpm_jax.runs.loading").load


def test_an_unknown_name_says_what_there_is():
  with pytest.raises(AttributeError, match="sampling, schedules"):
    ddpm_jax.sampler  # noqa: B018
