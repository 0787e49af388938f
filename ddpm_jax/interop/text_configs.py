"""Convert the configs of transformers' text encoders."""

from collections.abc import Mapping
from typing import Any

from ddpm_jax.networks.text import BERT, CLIPText, T5Encoder, blocks
from ddpm_jax.storage import jsonfiles

Config = dict[str, Any]
TextEncoder = CLIPText | T5Encoder | BERT
_NONE = type(None)

# The class of a config without "architectures", by model type.
_DEFAULT_CLASSES = {"clip_text_model": "CLIPTextModel", "t5": "T5EncoderModel", "bert": "BertModel"}
# The model type of each class. In some classes, the encoder is only a part.
_MODEL_TYPES = {
  "CLIPTextModel": "clip_text_model",
  "CLIPTextModelWithProjection": "clip_text_model",
  "T5EncoderModel": "t5",
  "T5Model": "t5",
  "T5ForConditionalGeneration": "t5",
  "T5WithLMHeadModel": "t5",
  "BertModel": "bert",
}
# Keys of training, of text generation and of other software. They do not change what an encoder computes, except for
# the last three: CLIP uses eos_token_id, and dense_act_fn and is_gated_act follow from feed_forward_proj. `from_config`
# reads these three.
_IGNORED_KEYS = """
  architectures model_type transformers_version torch_dtype dtype use_cache return_dict output_hidden_states
  output_attentions torchscript use_bfloat16 chunk_size_feed_forward initializer_range initializer_factor
  gradient_checkpointing problem_type id2label label2id num_labels task_specific_params finetuning_task tokenizer_class
  prefix tie_word_embeddings tf_legacy_loss bos_token_id pad_token_id sep_token_id cls_token_id decoder_start_token_id
  max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
  typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
  num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
  remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens output_past n_positions
  attention_dropout dropout dropout_rate hidden_dropout_prob attention_probs_dropout_prob classifier_dropout
  num_decoder_layers scale_decoder_outputs is_encoder_decoder dense_act_fn is_gated_act eos_token_id
"""
_IGNORED = frozenset(_IGNORED_KEYS.split())
# Keys whose values name code.
_CODE = ("auto_map", "custom_pipelines", "trust_remote_code")
# Our name of each of transformers' activations.
_ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_python": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "gelu_accurate": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_python_tanh": "gelu_tanh",
  "quick_gelu": "quick_gelu",
  "relu": "relu",
  "silu": "silu",
  "swish": "silu",
}
# The options of each model type: our name, and the default in transformers. Saved configs may omit options that have
# their defaults.
_OPTIONS: dict[str, dict[str, tuple[str, Any]]] = {
  "clip_text_model": {
    "vocab_size": ("vocabulary", 49408),
    "hidden_size": ("channels", 512),
    "num_hidden_layers": ("layers", 12),
    "num_attention_heads": ("heads", 8),
    "intermediate_size": ("hidden_channels", 2048),
    "max_position_embeddings": ("positions", 77),
    "projection_dim": ("projection", 512),
    "hidden_act": ("activation", "quick_gelu"),
    "layer_norm_eps": ("epsilon", 1e-5),
    "eos_token_id": ("end", 49407),
  },
  "t5": {
    "vocab_size": ("vocabulary", 32128),
    "d_model": ("channels", 512),
    "num_layers": ("layers", 6),
    "num_heads": ("heads", 8),
    "d_kv": ("head_channels", 64),
    "d_ff": ("hidden_channels", 2048),
    "feed_forward_proj": ("activation", "relu"),
    "relative_attention_num_buckets": ("buckets", 32),
    "relative_attention_max_distance": ("max_distance", 128),
    "layer_norm_epsilon": ("epsilon", 1e-6),
  },
  "bert": {
    "vocab_size": ("vocabulary", 30522),
    "hidden_size": ("channels", 768),
    "num_hidden_layers": ("layers", 12),
    "num_attention_heads": ("heads", 12),
    "intermediate_size": ("hidden_channels", 3072),
    "max_position_embeddings": ("positions", 512),
    "type_vocab_size": ("types", 2),
    "hidden_act": ("activation", "gelu"),
    "layer_norm_eps": ("epsilon", 1e-12),
  },
}
# Other options, with the only value that is supported.
_FIXED: dict[str, dict[str, Any]] = {
  "clip_text_model": {},
  "t5": {"is_decoder": False},
  "bert": {
    "is_decoder": False,
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
    "pruned_heads": {},
  },
}
# Our class for each model type.
_ENCODERS: dict[str, type[Any]] = {"clip_text_model": CLIPText, "t5": T5Encoder, "bert": BERT}


def from_config(config: Mapping[str, Any]) -> TextEncoder:
  """Create our encoder from transformers' config of a text encoder.

  The classes CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel and BertModel are supported. T5's classes with
  a decoder are supported too, but the decoder is ignored.

  Raises:
    ValueError: if the class or an option is not supported. The message names the class or the option.
  """
  code = [key for key in _CODE if config.get(key)]
  if code:
    raise ValueError(
      f"Got a text encoder with {code[0]}={jsonfiles.shorten(config[code[0]])}, which refers to code in the folder. ddpm_jax"
      f" never runs such code; expected one of the classes {', '.join(_MODEL_TYPES)}. Use a model without custom code."
    )
  name = _class_of(config)
  kind = _MODEL_TYPES[name]
  options = _OPTIONS[kind]
  values = {key: config.get(key, default) for key, (_, default) in options.items()}
  jsonfiles.check_types(values, {key: (type(default),) for key, (_, default) in options.items()}, name)
  _check_other_keys(config, name)
  arguments = {ours: values[key] for key, (ours, _) in options.items()}
  if kind == "t5":
    arguments |= _feed_forward(config, arguments["activation"])
  else:
    arguments["activation"] = _activation(arguments["activation"], "hidden_act")
  if name == "CLIPTextModel":
    arguments["projection"] = 0
  elif name == "CLIPTextModelWithProjection" and arguments["projection"] < 1:
    raise ValueError(f"Got a {name} with projection_dim={arguments['projection']}; expected 1 or more.")
  encoder = _ENCODERS[kind](**arguments)
  blocks.check_network(encoder)
  return encoder


def to_config(encoder: TextEncoder) -> Config:
  """Convert our encoder to the config of the equivalent text encoder in transformers.

  This is the inverse of `from_config`.

  Raises:
    ValueError: if the encoder is not a module of `networks.text`, or transformers has no name for its activation.
  """
  kind = next((kind for kind, network in _ENCODERS.items() if isinstance(encoder, network)), None)
  if kind is None:
    names = ", ".join(network.__name__ for network in _ENCODERS.values())
    raise ValueError(f"Got a {type(encoder).__name__} as text encoder; expected one of networks.text: {names}.")
  name = _DEFAULT_CLASSES[kind]
  config = {key: getattr(encoder, ours) for key, (ours, _) in _OPTIONS[kind].items()}
  if isinstance(encoder, T5Encoder):
    config["feed_forward_proj"] = _feed_forward_name(encoder)
  else:
    config["hidden_act"] = "gelu_new" if encoder.activation == "gelu_tanh" else encoder.activation
  if isinstance(encoder, CLIPText):
    if encoder.projection:
      name = "CLIPTextModelWithProjection"
    else:
      del config["projection_dim"]
  return {"architectures": [name], "model_type": kind, **config}


def _class_of(config: Mapping[str, Any]) -> str:
  """Return the name of the transformers class that a config describes."""
  jsonfiles.check_types(config, {"architectures": ([str], _NONE), "model_type": (str, _NONE)}, "text encoder")
  kind = config.get("model_type")
  classes = config.get("architectures") or [_DEFAULT_CLASSES.get(kind or "", "")]
  name = classes[0] if len(classes) == 1 else ""
  if name not in _MODEL_TYPES:
    shown = f"architectures={jsonfiles.shorten(config.get('architectures'))} and model_type={jsonfiles.shorten(kind)}"
    hint = (
      " UMT5 is not supported, because each of its layers has its own relative positions."
      if "umt5" in shown.lower()
      else ""
    )
    raise ValueError(
      f"Got a text encoder of {shown}; expected one of the classes {', '.join(_MODEL_TYPES)} of transformers.{hint}"
    )
  if kind not in (None, _MODEL_TYPES[name]):
    raise ValueError(
      f"Got a {name} with model_type={jsonfiles.shorten(kind)}; expected {_MODEL_TYPES[name]!r}. The config may describe a model that"
      " contains the text encoder as a part; save the text encoder alone."
    )
  return name


def _check_other_keys(config: Mapping[str, Any], name: str) -> None:
  """Check the values of the keys that `from_config` does not convert."""
  kind = _MODEL_TYPES[name]
  fixed = _FIXED[kind]
  for key, value in config.items():
    if key in _OPTIONS[kind] or key in _IGNORED or key.startswith("_"):
      continue
    is_absent = value is None or value is False or value in ({}, [])
    if value == fixed[key] if key in fixed else is_absent:
      continue
    supported = repr(fixed[key]) if key in fixed else "a config without this key"
    raise ValueError(
      f"Got a {name} with {key}={jsonfiles.shorten(value)}, which is not supported; expected {supported}."
    )


def _activation(name: str, key: str) -> str:
  """Translate transformers' name of an activation to our name."""
  if name not in _ACTIVATIONS:
    raise ValueError(
      f"Got a text encoder with {key}={name!r}, which is not supported; expected one of {', '.join(_ACTIVATIONS)}."
    )
  return _ACTIVATIONS[name]


def _feed_forward(config: Mapping[str, Any], name: str) -> Config:
  """Convert T5's option feed_forward_proj ("<activation>" or "gated-<activation>") to our options."""
  gated = name.startswith("gated-")
  # transformers computes "gated-gelu" with the tanh approximation of GELU, and "gelu" exactly.
  plain = "gelu_new" if name == "gated-gelu" else name.removeprefix("gated-")
  derived = {"dense_act_fn": plain, "is_gated_act": gated}
  for key, value in derived.items():
    if config.get(key, value) != value:
      raise ValueError(
        f"Got a T5 encoder with feed_forward_proj={name!r} and {key}={jsonfiles.shorten(config[key])}; expected {value!r}. Correct the"
        " config."
      )
  return {"activation": _activation(plain, "feed_forward_proj"), "gated": gated}


def _feed_forward_name(encoder: T5Encoder) -> str:
  names = {"gelu_tanh": "gelu_new"}
  if encoder.gated:
    names = {"gelu_tanh": "gelu", "gelu": "gelu_python"}
  name = names.get(encoder.activation, encoder.activation)
  return f"gated-{name}" if encoder.gated else name
