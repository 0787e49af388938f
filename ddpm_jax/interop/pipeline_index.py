"""Read and write model_index.json, the file that lists the parts of a text pipeline."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ddpm_jax.storage import jsonfiles

NAME = "model_index.json"
# The libraries of parts. "stable_diffusion", a folder in diffusers, is the library of the safety checker.
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
# Parts that no model needs here.
_IGNORED_PARTS = ("safety_checker", "feature_extractor", "image_encoder", "watermark")
ENCODERS = ("text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
_REQUIRED = ("unet", "vae", "scheduler")
_PARTS = (*_REQUIRED, *ENCODERS, *TOKENIZERS)
# The supported classes by name of the part. For the scheduler, its loader checks the class in the config.
_CLASSES = {
  "unet": ("UNet2DConditionModel",),
  "vae": ("AutoencoderKL",),
  "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
  "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
  "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
  "text_encoder_2": ("CLIPTextModelWithProjection",),
}
# Options of pipelines that change samples, with their types.
_OPTIONS: dict[str, jsonfiles.Kinds] = {
  "force_zeros_for_empty_prompt": (bool,),
  "requires_aesthetics_score": (bool,),
}


class Pipeline(NamedTuple):
  """Describe a class of text pipelines.

  Attributes:
    is_xl: whether the network takes the pooled embedding of the text, and sizes, as in Stable Diffusion XL.
    guidance_scale: the default scale of classifier-free guidance.
    options: the defaults for options that model_index.json omits.
    edits: whether the pipeline edits its image condition according to an instruction, the text.
    steps: the default number of sampling steps. 0 for the default of the scheduler.
  """

  is_xl: bool
  guidance_scale: float
  options: Mapping[str, Any] = {}
  edits: bool = False
  steps: int = 0


_XL_OPTIONS = {"force_zeros_for_empty_prompt": True}
_REFINER_OPTIONS = _XL_OPTIONS | {"requires_aesthetics_score": False}
PIPELINES = {
  "StableDiffusionPipeline": Pipeline(False, 7.5),
  "StableDiffusionImg2ImgPipeline": Pipeline(False, 7.5),
  "StableDiffusionInpaintPipeline": Pipeline(False, 7.5),
  "StableDiffusionInstructPix2PixPipeline": Pipeline(False, 7.5, edits=True, steps=100),
  "StableDiffusionXLPipeline": Pipeline(True, 5.0, _XL_OPTIONS),
  "StableDiffusionXLImg2ImgPipeline": Pipeline(True, 5.0, _REFINER_OPTIONS),
  "StableDiffusionXLInpaintPipeline": Pipeline(True, 7.5, _REFINER_OPTIONS),
}


class Index(NamedTuple):
  """Hold the content of a text pipeline's index.

  Attributes:
    name: the name of the pipeline's class.
    encoders: the names of the parts that are text encoders.
    tokenizers: the names of the parts that are tokenizers, one for each encoder.
    options: all options of the pipeline.
  """

  name: str
  encoders: tuple[str, ...]
  tokenizers: tuple[str, ...]
  options: Mapping[str, Any]

  @property
  def pipeline(self) -> Pipeline:
    """Return the description of the pipeline's class."""
    return PIPELINES[self.name]


def is_text_pipeline(folder: Path) -> bool:
  """Return whether a folder contains a pipeline that has a text encoder or whose class needs one.

  Raises:
    ValueError: if the index cannot be read.
  """
  path = folder / NAME
  if not path.is_file():
    return False
  content = jsonfiles.read(path)
  return content.get("_class_name") in list(PIPELINES) or any(name in content for name in ENCODERS)


def read(folder: Path) -> Index:
  """Read the index of a text pipeline.

  Raises:
    ValueError: if the class or a part is not supported, a part is missing, or the index names code that diffusers
      would download or run.
  """
  path = folder / NAME
  content = jsonfiles.read(path)
  with jsonfiles.named_errors(path):
    _check_code(content)
    jsonfiles.check_types(content, {"_class_name": (str,)}, "pipeline", required=True)
    name = content["_class_name"]
    if name not in PIPELINES:
      raise ValueError(f"Got a {name}, which is not supported; expected one of the pipelines {', '.join(PIPELINES)}.")
    parts = _parts(content, name)
    jsonfiles.check_types(content, _OPTIONS, "pipeline")
  encoders = tuple(part for part in ENCODERS if part in parts)
  tokenizers = tuple(TOKENIZERS[ENCODERS.index(part)] for part in encoders)
  missing = [part for part in (*_REQUIRED, *tokenizers) if part not in parts]
  if missing or not encoders:
    raise ValueError(
      f"Got {path}, a {name} without {missing[0] if missing else 'text_encoder'}; expected the parts"
      f" {', '.join((*_REQUIRED, 'text_encoder', 'tokenizer'))}. Download the folder again."
    )
  absent = [part for part in (*_REQUIRED, *encoders, *tokenizers) if not (folder / part).is_dir()]
  if absent:
    raise ValueError(
      f"Got {folder}, which lacks the folder {absent[0]}/ that {NAME} lists; expected all parts of a {name}. Download the"
      " folder again."
    )
  options = {**PIPELINES[name].options, **{key: content[key] for key in _OPTIONS if key in content}}
  return Index(name, encoders, tokenizers, options)


def to_content(index: Index, classes: Mapping[str, list[str]]) -> dict[str, Any]:
  """Return the content of model_index.json.

  Args:
    index: the index.
    classes: maps each part to the name of its library and the name of its class.
  """
  absent: dict[str, Any] = {"feature_extractor": [None, None], "image_encoder": [None, None]}
  if not index.pipeline.is_xl:
    absent |= {"safety_checker": [None, None], "requires_safety_checker": False}
  else:
    absent |= {part: [None, None] for part in (*ENCODERS, *TOKENIZERS)}
  return {"_class_name": index.name, **absent, **index.options, **classes}


def _check_code(content: Mapping[str, Any]) -> None:
  """Raise a ValueError if an index names code that diffusers would download or run."""
  libraries = {
    name: value[0]
    for name, value in content.items()
    if isinstance(value, list) and value and isinstance(value[0], str) and name != "_class_name"
  }
  code = [f"{name}={jsonfiles.shorten(content[name])}" for name, one in libraries.items() if one not in _LIBRARIES]
  keys = ("custom_pipeline", "custom_pipelines", "auto_map", "trust_remote_code")
  code += [f"{key}={jsonfiles.shorten(content[key])}" for key in keys if content.get(key)]
  if isinstance(content.get("_class_name"), list):
    code.append(f"_class_name={jsonfiles.shorten(content['_class_name'])}")
  if code:
    raise ValueError(
      f"Got a pipeline with {code[0]}, which refers to code in the folder or on the hub. ddpm_jax never runs such code;"
      " expected only parts of diffusers and transformers. Use a model without custom code."
    )


def _parts(content: Mapping[str, Any], name: str) -> list[str]:
  """Return the names of the parts that are present."""
  # A value of null stands for an absent part in some old indices.
  lists = {key: value for key, value in content.items() if key in _PARTS or isinstance(value, list)}
  jsonfiles.check_types(lists, {key: ([str, type(None)], type(None)) for key in lists}, "pipeline")
  parts = []
  for key, value in lists.items():
    if value is None or value == [None, None] or key in _IGNORED_PARTS:
      continue
    if len(value) != 2 or None in value:
      raise ValueError(
        f"Got a {name} with {key}={jsonfiles.shorten(value)}; expected the name of a library and the name of a class."
        f" Correct {NAME}."
      )
    if key not in _PARTS:
      raise ValueError(
        f"Got a {name} with the part {key}; expected only {', '.join((*_PARTS, *_IGNORED_PARTS))}. Use a pipeline without"
        " this part."
      )
    if value[1] not in _CLASSES.get(key, (value[1],)):
      raise ValueError(
        f"Got a {name} whose {key} is a {jsonfiles.shorten(value[1])}; expected {' or '.join(_CLASSES[key])}."
      )
    parts.append(key)
  return parts
