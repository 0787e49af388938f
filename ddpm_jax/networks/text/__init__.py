"""Provide the text encoders of CLIP, T5 and BERT in Flax Linen.

Each encoder maps the ids of tokens [B, N] and a mask [B, N] to `TextStates`. A state is the vector of a token after a
layer. Tokenizers make the ids (see `data`).
"""

from ddpm_jax.networks.text.bert import BERT
from ddpm_jax.networks.text.blocks import TextStates, sentence_vector
from ddpm_jax.networks.text.clip import CLIPText
from ddpm_jax.networks.text.t5 import T5Encoder

__all__ = ["BERT", "CLIPText", "T5Encoder", "TextStates", "sentence_vector"]
