"""Test user paths and the cache folder."""

import pytest

from ddpm_jax.storage import places


def test_tilde_is_expanded_to_the_home_folder(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert places.user_path("~/a b") == tmp_path / "a b"
  with pytest.raises(ValueError, match="Got --input=~nobody-of-this-name/x, but there is no home folder ~nobody"):
    places.user_path("~nobody-of-this-name/x", "--input=")


@pytest.mark.parametrize("uri", ["gs://bucket/x", "s3://bucket/x", "file:///tmp/x", "https://host/x"])
def test_a_uri_is_refused(uri):
  with pytest.raises(ValueError, match=f"Got --output={uri}, a URI; .*Mount the bucket"):
    places.user_path(uri, "--output=")


def test_without_a_home_folder_there_is_no_cache(tmp_path, monkeypatch):
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.setattr(places.os.path, "expanduser", lambda path: path)  # Python's result without a home folder
  assert places.cache_folder("xla") is None
  file = tmp_path / "file"
  file.write_text("")
  monkeypatch.setenv("XDG_CACHE_HOME", str(file))
  assert places.cache_folder("xla") is None
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert places.cache_folder("xla") == tmp_path / "ddpm_jax" / "xla"
