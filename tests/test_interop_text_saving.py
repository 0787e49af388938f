"""Test how text pipelines are saved."""

import pytest

from ddpm_jax.interop import text_saving


@pytest.mark.parametrize(
  ("file", "is_t5", "name"),
  [
    ("spiece.model", True, "T5Tokenizer"),
    ("tokenizer.json", True, "T5TokenizerFast"),
    ("tokenizer.json", False, "CLIPTokenizer"),
  ],
)
def test_the_class_of_a_tokenizer_can_read_its_files(file, is_t5, name, tmp_path):
  (tmp_path / file).touch()
  assert text_saving._tokenizer_class(tmp_path, is_t5) == name
