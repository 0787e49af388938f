"""Other people's weights and formats: `diffusers` folders, `guided_diffusion` checkpoints and `inception` weights; `tensors` reads their files."""

import importlib

__all__ = ["diffusers", "guided_diffusion", "inception", "tensors"]


def __getattr__(name: str):
  if name in __all__:
    return importlib.import_module(f"{__name__}.{name}")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
