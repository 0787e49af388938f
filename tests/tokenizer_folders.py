"""Write tokenizer folders like those of published models, and make prompts that are hard to split into tokens."""

import gzip
import importlib.util
import io
import json
import random
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]

START, END = "<|startoftext|>", "<|endoftext|>"
NUM_MERGES = 48_894


def package_path(name):
  """Return the folder of an installed package without importing it."""
  return Path(importlib.util.find_spec(name).origin).parent


def write_json(path, content):
  path.write_text(json.dumps(content))


def byte_characters():
  """Return the 256 characters that stand for bytes in GPT-2's and CLIP's vocabularies, in the order of token ids.

  A byte with a printable character in Latin-1 has this character. The other bytes have characters from 256 on.
  """
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  return [*map(chr, printable), *(chr(256 + index) for index in range(len(others)))]


def write_clip(folder):
  """Write vocab.json and merges.txt of CLIP from the list of merges in the package open_clip."""
  text = gzip.decompress((package_path("open_clip") / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
  lines = text.split("\n")[1 : NUM_MERGES + 1]
  characters = byte_characters()
  tokens = [*characters, *(f"{one}</w>" for one in characters), *(line.replace(" ", "") for line in lines), START, END]
  folder.mkdir(exist_ok=True)
  write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
  (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))
  return folder


def clip_token(content, normalized):
  flags = {"lstrip": False, "rstrip": False, "single_word": False}
  return {"content": content, "normalized": normalized, **flags}


def sd1_settings():
  """Return the settings of Stable Diffusion 1's tokenizer by file name."""
  named = {"bos_token": clip_token(START, True), "eos_token": clip_token(END, True), "unk_token": clip_token(END, True)}
  return {
    "tokenizer_config.json": {
      **{role: {"__type": "AddedToken", **token} for role, token in named.items()},
      "pad_token": END,
      "add_prefix_space": False,
      "do_lower_case": True,
      "errors": "replace",
      "model_max_length": 77,
      "tokenizer_class": "CLIPTokenizer",
    },
    "special_tokens_map.json": {**named, "pad_token": END},
  }


def sd2_settings():
  """Return the settings of Stable Diffusion 2's tokenizer, which pads with "!"."""
  settings = sd1_settings()
  for content in settings.values():
    content["pad_token"] = "!"
  return settings


def sdxl_settings():
  """Return the settings of Stable Diffusion XL's second tokenizer, which lists "!" as an added token."""
  added = {
    "0": clip_token("!", False) | {"special": True},
    "49406": clip_token(START, True) | {"special": True},
    "49407": clip_token(END, True) | {"special": True},
  }
  return {
    "tokenizer_config.json": {
      "added_tokens_decoder": added,
      "bos_token": START,
      "eos_token": END,
      "pad_token": "!",
      "unk_token": END,
      "model_max_length": 77,
      "tokenizer_class": "CLIPTokenizer",
    }
  }


def write_settings(folder, settings):
  for name, content in settings.items():
    write_json(folder / name, content)
  return folder


SENTENCES = (
  "A photo of a cat on a mat, seen from above.",
  "An astronaut rides a horse over the red hills of Mars at 7 in the morning!",
  "Ein kleines Café in Zürich, gemalt wie von Monet.",
  "The quick brown fox jumps over the lazy dog: 0123456789.",
  "Oil painting of seven ships; (a storm) is near, isn't it?",
  "一只猫坐在垫子上。",
)


def train_sentencepiece(folder):
  """Write the spiece.model of a unigram model with T5's special ids."""
  import sentencepiece

  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([*SENTENCES * 5, *(ROOT / "README.md").read_text().splitlines()]),
    model_writer=model,
    vocab_size=500,
    hard_vocab_limit=False,
    model_type="unigram",
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    minloglevel=2,
  )
  folder.mkdir(exist_ok=True)
  (folder / "spiece.model").write_bytes(model.getvalue())
  return folder


def copy(folder, target, *names):
  """Copy a folder, or only some of its files."""
  target.mkdir(parents=True, exist_ok=True)
  for file in folder.iterdir():
    if file.is_file() and (not names or file.name in names):
      shutil.copy(file, target)
  return target


# Parts of prompts: emoji with joiners, flags and skin tones, accents in both normal forms, stacked marks, scripts with
# and without spaces, right-to-left text, control characters, white space of all kinds, and special tokens.
PARTS = (
  "a photo of a cat", "A PHOTO", "!", "!!", "!!!???", "hello!", "don't we'll I'm they'd it's you've we're", "DON'T",
  "\u2019s", "\N{GRINNING FACE}", "\N{WOMAN}\u200d\N{ROCKET}", "\N{THUMBS UP SIGN}\U0001f3fd",
  "\U0001f1e9\U0001f1ea", "cafe\u0301", "café", "ÀÉÎÕÜ", "Z\u0351\u036b\u0343a\u0315lgo", "İstanbul ıŞ", "ﬁne ﬂow", "ﬃ",
  "straße STRASSE", "猫の写真", "一只猫坐在垫子上", "고양이 사진", "صورة قطة", "תמונה", "хороший кот", "ΦΩΣ ςσ", "हिन्दी", "ไทย",
  "①②³½", "\uff11\uff12\uff13", "0123456789", "3.14159", "1,000,000", "\uff17", "v1.5-final_v2", "#hashtag @user", "https://a.b/c?d=e&f",
  "\x00", "\x07\x1b[0m", "\u200b", "\u200e\u202e", "\ufeff", "\ufffd", "\x7f\x85", "\t", "\n", "\r\n", "  ", "\u00a0", "\u3000",
  "\u2028", "…", "—\u2013-", "“quoted”", "\u2018x\u2019", "(a:1.3) [b] {c}", "\\( \\)", "<|endoftext|>", "<|startoftext|>",
  "<|ENDOFTEXT|>", "x<|endoftext|>y", "</s>", "<pad>", "<unk>", "<extra_id_0>", "<extra_id_99>", "[CLS]", "[SEP]",
  "[MASK]", "[UNK]", "[PAD]", "▁", "▁▁x", "##ing", "</w>", "Ġ", "w" * 120, "lorem ipsum " * 30, "猫" * 100, "!" * 90,
)  # fmt: skip


def awkward_prompts(count=300):
  """Return the empty prompt, each of `PARTS` alone, and random sequences of `PARTS` with and without spaces."""
  draw = random.Random(0)
  prompts = ["", " ", *PARTS]
  while len(prompts) < count:
    separator = draw.choice(["", " ", " ", ", ", "\n"])
    prompts.append(separator.join(draw.choices(PARTS, k=draw.randint(2, 8))))
  return prompts[:count]


# The words of `write_bert`.
WORDS = ("a", "red", "fox", "bear", "left", "of", "and")


def write_bert(folder):
  """Write a tiny BERT of random weights with its tokenizer, whose words are `WORDS`."""
  import jax
  import jax.numpy as jnp

  from ddpm_jax import interop
  from ddpm_jax.networks.text import BERT

  tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
  encoder = BERT(len(tokens), channels=16, layers=2, heads=2, hidden_channels=32, positions=16)
  params = encoder.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
  # Large weights, so that texts differ in more than rounding.
  params = jax.tree.map(lambda leaf: leaf * 5 if leaf.ndim > 1 else leaf, params)
  folder.mkdir(exist_ok=True)
  interop.transformers.save_text_encoder(folder, encoder, params)
  (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
  write_json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "model_max_length": 16})
  return folder


def tiny_clip(folder):
  """Write a tokenizer folder in CLIP's layout with few tokens, so that tests can damage many copies fast."""
  tokens = ["c", "a", "t", "c</w>", "a</w>", "t</w>", "ca", "cat</w>", START, END]
  write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
  (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
  write_json(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
  return folder
