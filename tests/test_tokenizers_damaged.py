"""Test damaged and malicious folders of tokenizers: one clear message each, and no code runs."""

import json
import re
import sys

import pytest

from ddpm_jax.data import tokenizers
from tests import tokenizer_folders as folders
from tests.tokenizer_folders import END, copy, tiny_clip, write_json, write_settings


@pytest.fixture(scope="module")
def t5_files(tmp_path_factory):
  return folders.train_sentencepiece(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
  return write_settings(folders.write_clip(tmp_path_factory.mktemp("sd1")), folders.sd1_settings())


VOCABULARY = {
  "c": 0,
  "a": 1,
  "t": 2,
  "c</w>": 3,
  "a</w>": 4,
  "t</w>": 5,
  "ca": 6,
  "cat</w>": 7,
  folders.START: 8,
  END: 9,
}
DEEP = '{"a":' * 100_000
MODEL = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "<p>": 3}, "merges": ["a b"]}
CONFIG = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
PADDED = {"version": "1.0", "padding": None, "truncation": None, "added_tokens": []}


def tokenizer_json(model, **parts):
  return PADDED | {"model": MODEL | model} | parts


DAMAGED = [
  ("vocab.json", "", "is empty"),
  ("vocab.json", "{}", "no token"),
  ("vocab.json", "[]", "expected a JSON object"),
  ("vocab.json", "{", "as JSON"),
  ("vocab.json", DEEP, "as JSON"),
  ("vocab.json", b"\xff\xfe{}", "Cannot read"),
  ("vocab.json", VOCABULARY | {"ca": "6"}, "'ca' as '6'"),
  ("vocab.json", VOCABULARY | {"ca": 6.0}, "'ca' as 6.0"),
  ("vocab.json", VOCABULARY | {"ca": True}, "'ca' as True"),
  ("vocab.json", VOCABULARY | {"ca": -1}, "'ca' as -1"),
  ("vocab.json", VOCABULARY | {"ca": 2**40}, "'ca' as 1099511627776"),
  ("vocab.json", '{"ca": 1' + "0" * 5000 + "}", "as JSON"),
  ("vocab.json", VOCABULARY | {"ca": 7}, "an id twice"),
  ("vocab.json", {"a": 0, END: 1}, "tokens that end with </w>"),
  ("vocab.json", {name: index for name, index in VOCABULARY.items() if name != "ca"}, "not in the vocabulary"),
  ("vocab.json", {name: index for name, index in VOCABULARY.items() if name != "cat</w>"}, "'cat</w>'"),
  ("merges.txt", "", "is empty"),
  ("merges.txt", "#version: 0.2\n", "no merges"),
  ("merges.txt", "#version: 0.2\nc a\nx y\n", "(number 3) with 'x'"),
  ("merges.txt", "#version: 0.2\nc a t\n", "(number 2); expected two tokens"),
  ("merges.txt", "#version: 0.2\nc a\n\nca t</w>\n", "expected two tokens"),
  ("merges.txt", b"#version: 0.2\n\xff\xff \xfe\n", "Cannot read"),
  ("tokenizer_config.json", "", "is empty"),
  ("tokenizer_config.json", [], "expected a JSON object"),
  ("tokenizer_config.json", CONFIG | {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}, "code from folders never runs"),
  ("tokenizer_config.json", CONFIG | {"trust_remote_code": True}, "trust_remote_code=True"),
  ("tokenization_clip.py", "raise SystemExit", "the file tokenization_clip.py"),
  ("tokenizer_config.json", CONFIG | {"model_max_length": 10**30}, "Pass length"),
  ("tokenizer_config.json", CONFIG | {"model_max_length": 1e30}, "Pass length"),
  ("tokenizer_config.json", {}, "Pass length"),
  ("tokenizer_config.json", CONFIG | {"model_max_length": "77"}, "model_max_length='77'"),
  ("tokenizer_config.json", CONFIG | {"model_max_length": -5}, "model_max_length=-5"),
  ("tokenizer_config.json", CONFIG | {"model_max_length": 2}, "expected 3 or more"),
  ("tokenizer_config.json", '{"model_max_length": NaN}', "model_max_length=nan"),
  ("tokenizer_config.json", CONFIG | {"padding_side": "up"}, "padding_side='up'"),
  ("tokenizer_config.json", CONFIG | {"truncation_side": "left"}, "truncation_side='left'"),
  ("tokenizer_config.json", CONFIG | {"tokenizer_class": "GPT2Tokenizer"}, "of the class GPT2Tokenizer"),
  ("tokenizer_config.json", CONFIG | {"tokenizer_class": 7}, "tokenizer_class=7"),
  ("tokenizer_config.json", CONFIG | {"pad_token": 7}, "pad_token=7"),
  ("tokenizer_config.json", CONFIG | {"pad_token": {"content": ["!"]}}, "expected a token"),
  ("tokenizer_config.json", CONFIG | {"pad_token": {"content": "!", "lstrip": 1}}, "lstrip=1"),
  ("tokenizer_config.json", CONFIG | {"pad_token": None}, "pad_token=none"),
  ("tokenizer_config.json", CONFIG | {"added_tokens_decoder": {"x": "!"}}, "the token id 'x'"),
  ("tokenizer_config.json", CONFIG | {"added_tokens_decoder": {"1": "cat</w>"}}, "place in the vocabulary is 7"),
  ("tokenizer_config.json", CONFIG | {"added_tokens_decoder": {"99999": "new"}}, "place in the vocabulary is 10"),
  ("tokenizer_config.json", CONFIG | {"added_tokens_decoder": []}, "added_tokens_decoder=[]"),
  ("tokenizer_config.json", CONFIG | {"extra_special_tokens": [1]}, "extra_special_tokens=[1]"),
  ("special_tokens_map.json", {"eos_token": 5}, "eos_token=5"),
  ("added_tokens.json", {"new": "many"}, "the token id 'many'"),
  ("added_tokens.json", {"new": 2**70}, "the token id"),
  ("tokenizer.json", "", "is empty"),
  ("tokenizer.json", "{", "as JSON"),
  ("tokenizer.json", DEEP, "as JSON"),
  ("tokenizer.json", {"version": "1.0"}, "without model"),
  ("tokenizer.json", tokenizer_json({"vocab": 7}), "vocab=7"),
  ("tokenizer.json", tokenizer_json({"vocab": {"a": 0, "b": 1}}), "'ab', which is not in the vocabulary"),
  ("tokenizer.json", tokenizer_json({"merges": [["a", 1]]}), "expected two tokens"),
  ("tokenizer.json", tokenizer_json({"merges": {"a": "b"}}), "merges="),
  ("tokenizer.json", tokenizer_json({"type": "Unigram", "vocab": [["a", "high"]]}), "[token, score]"),
  ("tokenizer.json", tokenizer_json({"type": "Magic"}), "Cannot read"),
  ("tokenizer.json", tokenizer_json({}, normalizer={"type": "Magic"}), "Cannot read"),
  ("tokenizer.json", tokenizer_json({}, normalizer={"type": "Precompiled", "precompiled_charsmap": "QUFB"}), "Cannot read"),
  ("tokenizer.json", tokenizer_json({}, added_tokens=[{"id": 1, "content": "ab"}]), "Cannot read"),
  ("tokenizer.json", tokenizer_json({}, added_tokens=["ab"]), "added_tokens=['ab']"),
  (
    "tokenizer.json",
    tokenizer_json({}, post_processor={"type": "RobertaProcessing", "sep": ["</s>", 10**6], "cls": ["<s>", 1],
                                       "trim_offsets": True, "add_prefix_space": False}),
    "the id 1000000 of a special token",
  ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED)
def test_damaged_folders(name, content, message, tmp_path):
  folder = tiny_clip(tmp_path)
  path = folder / name
  if isinstance(content, bytes):
    path.write_bytes(content)
  else:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
  with pytest.raises(ValueError, match=re.escape(message)) as error:
    tokenizers.load(folder)
  assert str(folder) in str(error.value)


def test_scripts_that_are_not_the_tokenizer_s_are_ignored(tmp_path):
  """Published folders of sentence encoders have a train_script.py."""
  folder = tiny_clip(tmp_path)
  (folder / "train_script.py").write_text("raise SystemExit")
  assert tokenizers.load(folder)(["cat"]).ids[0, 1] == VOCABULARY["cat</w>"]


def test_large_files_are_refused_without_reading(tmp_path, monkeypatch):
  folder = tiny_clip(tmp_path)
  for name in ("vocab.json", "tokenizer_config.json"):
    with (folder / name).open("r+b") as file:
      size = file.seek(0, 2)
      file.truncate(10**12)  # a sparse file
    with pytest.raises(ValueError, match=r"has 1,000,000,000,000 bytes"):
      tokenizers.load(folder)
    with (folder / name).open("r+b") as file:
      file.truncate(size)
  tokenizers.load(folder)


def test_patterns_that_take_forever_are_stopped(tmp_path):
  split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
  write_json(tmp_path / "tokenizer.json", tokenizer_json({}, pre_tokenizer=split))
  write_json(tmp_path / "tokenizer_config.json", {"pad_token": "<p>", "model_max_length": 50})
  with pytest.raises(ValueError, match="Cannot tokenize 'aaa"):
    tokenizers.load(tmp_path)(["a" * 60 + "b"])


def test_random_merges_are_switched_off(tmp_path):
  write_json(tmp_path / "tokenizer.json", tokenizer_json({"dropout": 0.9}))
  write_json(tmp_path / "tokenizer_config.json", {"pad_token": "<p>", "model_max_length": 50})
  assert (tokenizers.load(tmp_path)(["ab"] * 50).ids[:, 0] == 2).all()


@pytest.mark.parametrize("content", [b"", b"garbage" * 9, b"\x0a\x03\x0a\x01\xff", b"\x1a\x00"])
def test_damaged_sentencepiece_models(content, tmp_path):
  (tmp_path / "spiece.model").write_bytes(content)
  with pytest.raises(ValueError, match="spiece.model"):
    tokenizers.load(tmp_path, length=20)


def test_changed_sentencepiece_models(t5_files, tmp_path):
  from sentencepiece import sentencepiece_model_pb2

  def write(change):
    model = sentencepiece_model_pb2.ModelProto.FromString((t5_files / "spiece.model").read_bytes())
    change(model)
    (tmp_path / "spiece.model").write_bytes(model.SerializeToString())

  def set_type(model):
    model.trainer_spec.model_type = 2

  def set_score(model):
    model.pieces[9].score = float("nan")

  def set_unknown(model):
    model.trainer_spec.unk_id = 10**6

  def set_map(model):
    model.normalizer_spec.precompiled_charsmap = b"\xff" * 50

  def remove_end(model):
    model.pieces[1].piece = "<end>"

  for change, message in (
    (set_type, r"expected 1 \(unigram\)"),
    (set_score, "not finite"),
    (set_unknown, "Cannot make a tokenizer"),
    (set_map, "Cannot make a tokenizer"),
  ):
    write(change)
    with pytest.raises(ValueError, match=message):
      tokenizers.load(tmp_path, length=20)
  (tmp_path / "spiece.model").write_bytes((t5_files / "spiece.model").read_bytes())
  write_json(tmp_path / "tokenizer_config.json", {"extra_ids": 10**9})
  with pytest.raises(ValueError, match="extra_ids=1000000000"):
    tokenizers.load(tmp_path, length=20)


def test_embeddings_of_another_model(sd1, t5_files):
  for embeddings in (49407, 49409, 1000, 32128):
    with pytest.raises(ValueError, match="belong to different models"):
      tokenizers.load(sd1, embeddings=embeddings)
  # T5 rounds its 32,100 tokens up to 32,128 embeddings, a multiple of 128.
  tokens = tokenizers.load(t5_files, length=8).vocabulary
  most = -(-tokens // 128) * 128
  for embeddings in (tokens, most):
    tokenizers.load(t5_files, length=8, embeddings=embeddings)
  for embeddings in (tokens - 1, most + 1):
    with pytest.raises(ValueError, match="belong to different models"):
      tokenizers.load(t5_files, length=8, embeddings=embeddings)


def test_folders_without_a_tokenizer(tmp_path, sd1):
  with pytest.raises(ValueError, match="is not a folder"):
    tokenizers.load(tmp_path / "missing")
  with pytest.raises(ValueError, match=r"expected tokenizer.json, or vocab.json with merges.txt"):
    tokenizers.load(tmp_path, length=77)
  with pytest.raises(ValueError, match="expected tokenizer.json"):
    tokenizers.load(copy(sd1, tmp_path / "half", "vocab.json"), length=77)
  for length in (0, -3, 2, 77.0, True, "77"):
    with pytest.raises(ValueError, match="length="):
      tokenizers.load(sd1, length=length)


@pytest.mark.parametrize("package", ["tokenizers", "sentencepiece"])
def test_a_missing_package_names_the_extra(package, t5_files, monkeypatch):
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(ValueError, match=r"ddpm_jax\[text\]"):
    tokenizers.load(t5_files, length=20)
