"""Convert the parameter names of transformers' text encoders."""

import re
from collections.abc import Collection

from ddpm_jax.interop import tensors
from ddpm_jax.interop.text_configs import TextEncoder
from ddpm_jax.networks.text import CLIPText, T5Encoder

# The names that transformers has for our modules. {} is the number of a layer.
_CLIP = {
  "tokens": "text_model.embeddings.token_embedding",
  "positions": "text_model.embeddings.position_embedding",
  "layer/norm1": "text_model.encoder.layers.{}.layer_norm1",
  "layer/attention/query": "text_model.encoder.layers.{}.self_attn.q_proj",
  "layer/attention/key": "text_model.encoder.layers.{}.self_attn.k_proj",
  "layer/attention/value": "text_model.encoder.layers.{}.self_attn.v_proj",
  "layer/attention/out": "text_model.encoder.layers.{}.self_attn.out_proj",
  "layer/norm2": "text_model.encoder.layers.{}.layer_norm2",
  "layer/fc1": "text_model.encoder.layers.{}.mlp.fc1",
  "layer/fc2": "text_model.encoder.layers.{}.mlp.fc2",
  "norm": "text_model.final_layer_norm",
  "projection": "text_projection",
}
_T5 = {
  "tokens": "shared",
  "distances": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
  "layer/norm1": "encoder.block.{}.layer.0.layer_norm",
  "layer/attention/query": "encoder.block.{}.layer.0.SelfAttention.q",
  "layer/attention/key": "encoder.block.{}.layer.0.SelfAttention.k",
  "layer/attention/value": "encoder.block.{}.layer.0.SelfAttention.v",
  "layer/attention/out": "encoder.block.{}.layer.0.SelfAttention.o",
  "layer/norm2": "encoder.block.{}.layer.1.layer_norm",
  "layer/fc1": "encoder.block.{}.layer.1.DenseReluDense.wi",
  "layer/fc2": "encoder.block.{}.layer.1.DenseReluDense.wo",
  "norm": "encoder.final_layer_norm",
}
_GATED = {
  "layer/gate": "encoder.block.{}.layer.1.DenseReluDense.wi_0",
  "layer/fc1": "encoder.block.{}.layer.1.DenseReluDense.wi_1",
}
_BERT = {
  "tokens": "embeddings.word_embeddings",
  "types": "embeddings.token_type_embeddings",
  "positions": "embeddings.position_embeddings",
  "norm": "embeddings.LayerNorm",
  "layer/attention/query": "encoder.layer.{}.attention.self.query",
  "layer/attention/key": "encoder.layer.{}.attention.self.key",
  "layer/attention/value": "encoder.layer.{}.attention.self.value",
  "layer/attention/out": "encoder.layer.{}.attention.output.dense",
  "layer/norm1": "encoder.layer.{}.attention.output.LayerNorm",
  "layer/fc1": "encoder.layer.{}.intermediate.dense",
  "layer/fc2": "encoder.layer.{}.output.dense",
  "layer/norm2": "encoder.layer.{}.output.LayerNorm",
  "pooler": "pooler.dense",
}
# Tensors of old files that are not parameters. Files of T5 may also contain a decoder.
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
_DECODER = ("decoder.", "lm_head.")
_TABLE, _SAME_TABLE = "shared.weight", "encoder.embed_tokens.weight"


def layout(encoder: TextEncoder, names_in_file: Collection[str] = ()) -> tensors.Layout:
  """Return the layout of transformers' weight files for an encoder.

  Args:
    encoder: the encoder.
    names_in_file: the names of all tensors in the file, needed only for reading. If a T5 file contains the token
      embeddings twice, the second copy is ignored.
  """
  if isinstance(encoder, CLIPText):
    names = _CLIP
  elif isinstance(encoder, T5Encoder):
    names = _T5 | (_GATED if encoder.gated else {})
  else:
    names = _BERT

  def name_of(path: str) -> str:
    number = re.search(r"layer_(\d+)", path)
    module = re.sub(r"layer_\d+", "layer", path.rpartition("/")[0])
    return f"{names[module].format(number and number[1])}.{tensors.leaf_name(path)}"

  def is_ignored(name: str) -> bool:
    if not isinstance(encoder, T5Encoder):
      return name.endswith(_BUFFERS)
    return name.startswith(_DECODER) or (name == _SAME_TABLE and _TABLE in names_in_file)

  return tensors.Layout(name_of, is_ignored=is_ignored)


def modern_names(encoder: TextEncoder, names: Collection[str]) -> dict[str, str]:
  """Map names in files of other versions of transformers to the names of `layout`.

  Some files of CLIP lack the prefix "text_model.". Some files of T5 contain the token embeddings under another name.
  Very old files of BERT use other names for the scales and shifts of normalization layers.
  """
  if isinstance(encoder, CLIPText):
    parts = ("embeddings.", "encoder.", "final_layer_norm.")
    renamed = {name: f"text_model.{name}" for name in names if name.startswith(parts)}
  elif isinstance(encoder, T5Encoder):
    renamed = {_SAME_TABLE: _TABLE}
  else:
    renamed = {name: re.sub(r"gamma$", "weight", re.sub(r"beta$", "bias", name)) for name in names}
  # Keep both names if a file has both, because two tensors for one parameter are an error.
  return {old: new for old, new in renamed.items() if old in names and new not in names}
