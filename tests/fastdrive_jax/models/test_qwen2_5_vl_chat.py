import json

import numpy as np
import pytest
from tiny_checkpoint import MARKS, TEMPLATE, write_tokenizer

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.qwen2_5_vl.chat import read_chat, user_message
from fastdrive_jax.models.qwen2_5_vl.impromptu import planning_prompt


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return tmp_path


def test_pictures_stand_where_the_text_marks_them(folder):
    chat = read_chat(folder)
    message = user_message("See <image> and <image>.")
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    text = chat.render([message])
    assert f"See {picture} and {picture}." in text.replace("\n", "")
    assert text.endswith("<|im_start|>assistant\n")
    assert not chat.render([message], answer=False).endswith("assistant\n")
    ids = chat.encode([message])
    assert ids.count(chat.tokenizer.token_to_id("<|image_pad|>")) == 2


def test_decoding_leaves_the_marks_out(folder):
    chat = read_chat(folder)
    ids = chat.tokenizer.encode("Grüße, 東京 [1.0, -2.5]<|im_end|>").ids
    assert chat.decode(ids) == "Grüße, 東京 [1.0, -2.5]"


def test_the_first_template_file_counts(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))
    assert read_chat(folder).template == TEMPLATE
    (folder / "chat_template.jinja").write_text("jinja")
    assert read_chat(folder).template == "jinja"
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").unlink()
    assert read_chat(folder).template == "config"
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="no chat template"):
        read_chat(folder)


def test_bad_files_and_messages_are_refused(folder):
    with pytest.raises(UserError, match="nobody is called robot"):
        read_chat(folder).render([{"role": "robot", "content": "beep"}])
    (folder / "chat_template.json").write_text("{")
    with pytest.raises(UserError, match=r"chat_template\.json cannot be read"):
        read_chat(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read"):
        read_chat(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        read_chat(folder)


@pytest.fixture
def both(tmp_path):
    transformers = pytest.importorskip("transformers", reason="extra: parity")
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), additional_special_tokens=list(MARKS)
    )
    theirs.chat_template = TEMPLATE
    theirs.save_pretrained(tmp_path / "saved")
    return read_chat(tmp_path), read_chat(tmp_path / "saved"), theirs


@pytest.mark.parametrize("answer", [True, False])
def test_prompts_are_those_of_transformers_token_for_token(both, answer):
    past = np.array([[-3.3, 0.1], [-1.5, 0.0], [0.0, 0.0]])
    talk = [
        {"role": "system", "content": "You drive.  Grüße\n"},
        user_message(planning_prompt(past, views="6v")),
        {"role": "assistant", "content": "東京 {% raw %}"},
        user_message("<image> and then?"),
    ]
    *ours, theirs = both
    expected = theirs.apply_chat_template(
        talk, add_generation_prompt=answer, tokenize=True, return_dict=False
    )
    for chat in ours:
        assert chat.encode(talk, answer) == list(expected)
        assert chat.render(talk, answer) == theirs.apply_chat_template(
            talk, add_generation_prompt=answer, tokenize=False
        )
        assert chat.decode(expected) == theirs.decode(expected, skip_special_tokens=True)


def test_lengths_of_the_training_neither_cut_nor_fill_up(folder):
    want = read_chat(folder).encode([user_message("See <image>.")])
    tokenizer = read_chat(folder).tokenizer
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert read_chat(folder).encode([user_message("See <image>.")]) == want
    assert len(want) > 3


def test_of_named_templates_the_default_is_taken(folder):
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": TEMPLATE}]
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": named}))
    assert read_chat(folder).template == TEMPLATE
