"""pi0's prompts, letter by letter."""

import json

import numpy as np
import pytest
from tiny_pi0 import BOS, LETTERS, LINE, SIZES, write_tokenizer
from tokenizers import Tokenizer, models

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.pi0.prompt import clean, read_prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pi0")
    write_tokenizer(folder)
    return folder


def test_bos_then_the_clean_text_then_a_new_line(folder):
    given = ["put_the bowl\non it ", "\n  open the C and B", "a  b"]
    texts = ["put▁the▁bowl▁on▁it", "open▁the▁C▁and▁B", "a▁▁b"]
    ids, lengths = read_prompts(folder, SIZES).encode(given)
    assert ids.shape == (3, 48)
    assert ids.dtype == lengths.dtype == np.int32
    for row, length, text in zip(ids, lengths, texts, strict=True):
        expected = [BOS, *(LETTERS[letter] for letter in text), LINE]
        assert length == len(expected)
        np.testing.assert_array_equal(row, expected + [0] * (48 - length))


def test_cleaning_is_in_the_published_order():
    # Blanks are taken from the ends before underscores become some.
    assert clean(" _pick up\nthis_ ") == " pick up this "


def test_a_length_that_is_too_short_is_refused(folder):
    with pytest.raises(UserError, match=r"'open it' has 9 tokens, more than length=8"):
        read_prompts(folder, SIZES, 8).encode(["open it"])


def test_another_tokenizer_is_refused_and_none_is_asked_for(folder, tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json; .*google/paligemma-3b-pt-224"):
        read_prompts(tmp_path, SIZES)
    other = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "<unk>": 2}, unk_token="<unk>"))
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="is not PaliGemma's"):
        read_prompts(tmp_path, SIZES)
    # Gemma 3 has the same marks and twice as many words.
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"word{number}": 64 + number for number in range(128)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="among 128 at most"):
        read_prompts(tmp_path, SIZES)
