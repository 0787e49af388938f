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
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
# Options of pipelines that change samples, with their types.
_OPTIONS: dict[str, jsonfiles.Kinds] = {
  "force_zeros_for_empty_prompt": (bool,),
  "requires_aesthetics_score": (bool,),
}


class Family(NamedTuple):
  """Describe pipelines with the same parts.

  Attributes:
    network: the name of the part that is the network.
    classes: maps the name of each part but the scheduler to the names of the supported classes. The scheduler's loader
      checks the class in the scheduler's config.
    encoders: the text encoders that every such pipeline has. Empty if one of several encoders is enough.
    absent: the parts whose absence is written into the index.
  """

  network: str
  classes: Mapping[str, tuple[str, ...]]
  encoders: tuple[str, ...] = ()
  absent: tuple[str, ...] = ()

  @property
  def required(self) -> tuple[str, ...]:
    """Return the names of the parts that every such pipeline has, without text encoders and tokenizers."""
    return (self.network, "vae", "scheduler")

  @property
  def parts(self) -> tuple[str, ...]:
    """Return the names of all parts."""
    return (*self.required, *(name for name in self.classes if name not in self.required))


_VAE = {"vae": ("AutoencoderKL",)}
_CLIP_TOKENIZER, _T5_TOKENIZER = ("CLIPTokenizer", "CLIPTokenizerFast"), ("T5Tokenizer", "T5TokenizerFast")
_PROJECTED, _T5 = ("CLIPTextModelWithProjection",), ("T5EncoderModel",)
_UNET_CLASSES = _VAE | {
  "unet": ("UNet2DConditionModel",),
  "text_encoder": ("CLIPTextModel", *_PROJECTED),
  "text_encoder_2": _PROJECTED,
  "tokenizer": _CLIP_TOKENIZER,
  "tokenizer_2": _CLIP_TOKENIZER,
}
_SD3_CLASSES = _VAE | {
  "transformer": ("SD3Transformer2DModel",),
  "text_encoder": _PROJECTED,
  "text_encoder_2": _PROJECTED,
  "text_encoder_3": _T5,
  "tokenizer": _CLIP_TOKENIZER,
  "tokenizer_2": _CLIP_TOKENIZER,
  "tokenizer_3": _T5_TOKENIZER,
}
# Old folders have the class Transformer2DModel.
_PIXART_CLASSES = _VAE | {
  "transformer": ("PixArtTransformer2DModel", "Transformer2DModel"),
  "text_encoder": _T5,
  "tokenizer": _T5_TOKENIZER,
}
_IMAGES = ("feature_extractor", "image_encoder")
FAMILIES = {
  "sd": Family("unet", _UNET_CLASSES, absent=(*_IMAGES, "safety_checker")),
  "xl": Family("unet", _UNET_CLASSES, absent=(*_IMAGES, *ENCODERS[:2], *TOKENIZERS[:2])),
  "sd3": Family("transformer", _SD3_CLASSES, ENCODERS[:2], absent=(*_IMAGES, ENCODERS[2], TOKENIZERS[2])),
  "pixart": Family("transformer", _PIXART_CLASSES, ENCODERS[:1]),
}


class Pipeline(NamedTuple):
  """Describe a class of text pipelines.

  Attributes:
    kind: the name of its family in `FAMILIES`. The networks of "xl" (Stable Diffusion XL) and "sd3" take the pooled
      embedding of the text too.
    guidance_scale: the default scale of classifier-free guidance.
    options: the defaults for options that model_index.json omits.
    edits: whether the pipeline edits its image condition according to an instruction, the text.
    steps: the default number of sampling steps. 0 for the default of the scheduler.
    lengths: the numbers of tokens of tokenizers for which the pipeline, not the tokenizer's folder, sets the number.
  """

  kind: str
  guidance_scale: float
  options: Mapping[str, Any] = {}
  edits: bool = False
  steps: int = 0
  lengths: Mapping[str, int] = {}

  @property
  def family(self) -> Family:
    """Return the description of the pipeline's parts."""
    return FAMILIES[self.kind]

  @property
  def is_xl(self) -> bool:
    """Return whether the network takes the pooled embedding of the text, and sizes, as in Stable Diffusion XL."""
    return self.kind == "xl"


_XL_OPTIONS = {"force_zeros_for_empty_prompt": True}
_REFINER_OPTIONS = _XL_OPTIONS | {"requires_aesthetics_score": False}
_SD3_LENGTHS = {"tokenizer_3": 256}
PIPELINES = {
  "StableDiffusionPipeline": Pipeline("sd", 7.5),
  "StableDiffusionImg2ImgPipeline": Pipeline("sd", 7.5),
  "StableDiffusionInpaintPipeline": Pipeline("sd", 7.5),
  "StableDiffusionInstructPix2PixPipeline": Pipeline("sd", 7.5, edits=True, steps=100),
  "StableDiffusionXLPipeline": Pipeline("xl", 5.0, _XL_OPTIONS),
  "StableDiffusionXLImg2ImgPipeline": Pipeline("xl", 5.0, _REFINER_OPTIONS),
  "StableDiffusionXLInpaintPipeline": Pipeline("xl", 7.5, _REFINER_OPTIONS),
  "StableDiffusion3Pipeline": Pipeline("sd3", 7.0, steps=28, lengths=_SD3_LENGTHS),
  "StableDiffusion3Img2ImgPipeline": Pipeline("sd3", 7.0, steps=50, lengths=_SD3_LENGTHS),
  "PixArtAlphaPipeline": Pipeline("pixart", 4.5, steps=20, lengths={"tokenizer": 120}),
  "PixArtSigmaPipeline": Pipeline("pixart", 4.5, steps=20, lengths={"tokenizer": 300}),
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
  family = PIPELINES[name].family
  needed = family.encoders or (() if encoders else ENCODERS[:1])
  missing = [part for part in (*family.required, *needed, *tokenizers) if part not in parts]
  if missing:
    expected = [TOKENIZERS[ENCODERS.index(part)] for part in family.encoders or ENCODERS[:1]]
    expected = [*family.required, *(family.encoders or ENCODERS[:1]), *expected]
    raise ValueError(
      f"Got {path}, a {name} without {missing[0]}; expected the parts {', '.join(expected)}. Download the folder again."
    )
  absent = [part for part in (*family.required, *encoders, *tokenizers) if not (folder / part).is_dir()]
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
  absent: dict[str, Any] = {part: [None, None] for part in index.pipeline.family.absent}
  if "safety_checker" in absent:
    absent["requires_safety_checker"] = False
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
  family = PIPELINES[name].family
  lists = {key: value for key, value in content.items() if key in family.parts or isinstance(value, list)}
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
    if key not in family.parts:
      raise ValueError(
        f"Got a {name} with the part {key}; expected only {', '.join((*family.parts, *_IGNORED_PARTS))}. Use a pipeline"
        " without this part."
      )
    classes = family.classes.get(key, (value[1],))
    if value[1] not in classes:
      raise ValueError(f"Got a {name} whose {key} is a {jsonfiles.shorten(value[1])}; expected {' or '.join(classes)}.")
    parts.append(key)
  return parts
