"""What the package offers by name."""

import importlib

import pytest

import ddpm_jax


@pytest.mark.parametrize("name", ddpm_jax.__all__)
def test_public_modules_come_by_name(name):
  assert getattr(ddpm_jax, name) is importlib.import_module(f"ddpm_jax.{name}")


def test_an_unknown_name_says_what_there_is():
  with pytest.raises(AttributeError, match="sampling, schedules"):
    ddpm_jax.sampler  # noqa: B018
