"""Messages to token ids and back, by the checkpoint's own tokenizer and chat template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
from tokenizers import Tokenizer

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.hf_files import read_json, read_tokenizer

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", TOKENIZER_CONFIG_FILE)
IMAGE_MARK = "<image>"

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Chat:
    """A checkpoint's tokenizer and chat template.

    Attributes:
        tokenizer: Of the library `tokenizers`.
        template: Jinja source.
    """

    tokenizer: Tokenizer
    template: str

    def render(self, messages: Sequence[Message], answer: bool = True) -> str:
        """The text that the model reads.

        Args:
            messages: Role and content of each turn, see `user_message`.
            answer: Whether to end where the assistant begins.

        Raises:
            UserError: The template refuses the messages.
        """
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        try:
            template = environment.from_string(self.template)
            return template.render(messages=list(messages), add_generation_prompt=answer)
        except jinja2.TemplateError as error:
            raise UserError(f"The chat template cannot render the messages: {error}.") from error

    def encode(self, messages: Sequence[Message], answer: bool = True) -> list[int]:
        """Token ids of `render`, with one image id for each picture."""
        return self.tokenizer.encode(self.render(messages, answer), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer, without the marks of the template."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def read_chat(checkpoint_dir: Path) -> Chat:
    """The tokenizer and template in a checkpoint's folder.

    Raises:
        UserError: A file is missing or damaged.
    """
    folder = Path(checkpoint_dir)
    return Chat(read_tokenizer(folder), _read_template(folder))


def user_message(text: str) -> Message:
    """A turn of the user, with a picture at each mark `<image>` of the text."""
    content: list[dict[str, str]] = []
    for number, part in enumerate(text.split(IMAGE_MARK)):
        if number:
            content.append({"type": "image"})
        if part:
            content.append({"type": "text", "text": part})
    return {"role": "user", "content": content}


def _read_template(folder: Path) -> str:
    for name in TEMPLATE_FILES:
        path = folder / name
        if not path.exists():
            continue
        if path.suffix == ".jinja":
            return path.read_text(encoding="utf-8")
        template = read_json(path).get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {one.get("name"): one.get("template") for one in template}
            template = named.get("default")
        if isinstance(template, str):
            return template
    raise UserError(
        f"{folder} holds no chat template; fetch one of {', '.join(TEMPLATE_FILES)} of the "
        "checkpoint."
    )


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
