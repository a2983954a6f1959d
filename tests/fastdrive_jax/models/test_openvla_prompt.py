import numpy as np
import pytest
from small_openvla import write_tokenizer
from tokenizers import processors

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.openvla.config import OPENVLA_7B, TINY_OPENVLA
from fastdrive_jax.models.openvla.prompt import WordPrompts, read_prompts, word_prompts

SUITE = ["Pick up the red cube", "push the red cube, then stop"]


def test_the_published_prompt(tmp_path):
    names = write_tokenizer(tmp_path)
    ids, lengths = read_prompts(tmp_path, OPENVLA_7B).encode(["Pick up cube", "pick cube"])
    assert ids.dtype == lengths.dtype == np.int32
    text = "<s> In : What action should the robot take to pick up cube ? Out :"
    assert " ".join(names[i] for i in ids[0][:-1]) == text
    assert ids[0, -1] == 29_871
    assert lengths.tolist() == [17, 16]
    assert ids[1, lengths[1] - 1] == 29_871
    assert (ids[1, lengths[1] :] == 0).all()


def test_the_first_release_talks_as_vicuna(tmp_path):
    names = write_tokenizer(tmp_path)
    prompts = read_prompts(tmp_path, OPENVLA_7B, v01=True, length=100)
    ids, lengths = prompts.encode(["pick up cube"])
    assert ids.shape == (1, 100)
    text = " ".join(names[i] for i in ids[0, : lengths[0] - 1])
    end = "USER : What action should the robot take to pick up cube ? ASSISTANT :"
    assert text.endswith(end)
    assert ids[0, lengths[0] - 1] == 29_871


def test_an_empty_token_that_is_there_is_not_put_twice(tmp_path):
    write_tokenizer(tmp_path)
    prompts = read_prompts(tmp_path, OPENVLA_7B)
    prompts.tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <e>", special_tokens=[("<s>", 1), ("<e>", 29_871)]
    )
    ids, lengths = prompts.encode(["pick up cube"])
    assert (ids == 29_871).sum() == 1
    assert ids[0, lengths[0] - 1] == 29_871


def test_what_is_no_tokenizer_of_the_model(tmp_path):
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        read_prompts(tmp_path, OPENVLA_7B)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read"):
        read_prompts(tmp_path, OPENVLA_7B)
    write_tokenizer(tmp_path, bos=False)
    with pytest.raises(UserError, match="does not begin a text with id 1"):
        read_prompts(tmp_path, OPENVLA_7B)


def test_words_of_a_suite():
    prompts = word_prompts(SUITE, TINY_OPENVLA)
    assert prompts.words == ("cube", "pick", "push", "red", "stop", "the", "then", "up")
    ids, lengths = prompts.encode(SUITE)
    assert lengths.tolist() == [7, 8]
    assert ids.tolist()[0] == [1, 5, 11, 9, 7, 4, 3, 0]
    assert ids.max() < TINY_OPENVLA.action_vocab_size - TINY_OPENVLA.bins


def test_words_that_are_too_many_or_unknown():
    with pytest.raises(UserError, match="300 words, but a vocabulary of 512 ids has room for 252"):
        word_prompts([f"word{number}" for number in range(300)], TINY_OPENVLA)
    prompts = WordPrompts(("cube", "lift"), length=3)
    with pytest.raises(UserError, match=r"not trained on: sphere\."):
        prompts.encode(["lift sphere"])
    with pytest.raises(UserError, match="'lift cube' has 4 tokens, more than length=3"):
        prompts.encode(["lift cube"])
    with pytest.raises(UserError, match="no instruction"):
        prompts.encode([])
