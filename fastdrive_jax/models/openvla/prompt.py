"""Instructions to token ids: as published, by a checkpoint's tokenizer, or word by word."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.hf_files import read_tokenizer
from fastdrive_jax.models.openvla.config import OpenVLAConfig
from fastdrive_jax.models.prompts import Encoded, padded

PROMPT = "In: What action should the robot take to {}?\nOut:"
PROMPT_V01 = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: What action should the "
    "robot take to {}? ASSISTANT:"
)
_EMPTY_ID = 29_871  # Llama's id of a lone space, which training had between prompt and action
_FIRST_WORD = 4  # behind padding, BOS, stop and the mark that ends a prompt
_OUT_ID = 3


@dataclass(frozen=True)
class LlamaPrompts:
    """The published prompts.

    Attributes:
        tokenizer: Of the library `tokenizers`; it puts BOS in front.
        template: With a place for the instruction.
        length: L; None takes the longest prompt's. A fixed one keeps one compiled program.
    """

    tokenizer: Tokenizer
    template: str = PROMPT
    length: int | None = None

    def encode(self, instructions: Sequence[str]) -> Encoded:
        """See `Prompts.encode`; instructions are put in lower case, as in training.

        Raises:
            UserError: A prompt is longer than `length`.
        """
        prompts = []
        for instruction in instructions:
            ids = self.tokenizer.encode(self.template.format(instruction.lower())).ids
            prompts.append(ids if ids[-1] == _EMPTY_ID else [*ids, _EMPTY_ID])
        return padded(prompts, self.length, instructions)


def read_prompts(
    checkpoint_dir: Path, config: OpenVLAConfig, v01: bool = False, length: int | None = None
) -> LlamaPrompts:
    """The prompts of a checkpoint.

    Args:
        checkpoint_dir: Holds `tokenizer.json`.
        config: Of the model.
        v01: Whether it is openvla-v01, which talks as Vicuna does.
        length: See `LlamaPrompts`.

    Raises:
        UserError: There is no tokenizer, or it does not put the model's BOS in front.
    """
    tokenizer = read_tokenizer(Path(checkpoint_dir))
    if tokenizer.encode("In:").ids[:1] != [config.bos_id]:
        raise UserError(
            f"The tokenizer in {checkpoint_dir} does not begin a text with id {config.bos_id}; "
            "take the checkpoint's own."
        )
    return LlamaPrompts(tokenizer, PROMPT_V01 if v01 else PROMPT, length)


@dataclass(frozen=True)
class WordPrompts:
    """Prompts of a small model: BOS, an id for each word of the instruction, and a mark.

    Attributes:
        words: All that it knows, each once.
        length: L.
        bos_id: First of every prompt.
    """

    words: tuple[str, ...]
    length: int
    bos_id: int = 1

    def encode(self, instructions: Sequence[str]) -> Encoded:
        """See `Prompts.encode`.

        Raises:
            UserError: A word is not known, or a prompt is longer than `length`.
        """
        ids = {word: _FIRST_WORD + number for number, word in enumerate(self.words)}
        prompts = []
        for instruction in instructions:
            own = words_of(instruction)
            if unknown := sorted(set(own) - set(ids)):
                raise UserError(
                    f"The instruction {instruction!r} has words that the model was not trained on: "
                    f"{', '.join(unknown)}."
                )
            prompts.append([self.bos_id, *(ids[word] for word in own), _OUT_ID])
        return padded(prompts, self.length, instructions)


def word_prompts(
    instructions: Sequence[str], config: OpenVLAConfig, length: int | None = None
) -> WordPrompts:
    """Prompts for all words of a suite's instructions.

    Args:
        instructions: All that the model will be given.
        config: Of the model.
        length: L; None fits the longest of them.

    Raises:
        UserError: There are more words than the vocabulary has ids beside the actions'.
    """
    words = tuple(sorted({word for text in instructions for word in words_of(text)}))
    room = config.action_vocab_size - config.bins - _FIRST_WORD
    if len(words) > room:
        raise UserError(
            f"The instructions have {len(words)} words, but a vocabulary of "
            f"{config.text.vocab_size} ids has room for {max(room, 0)} beside {config.bins} "
            "actions; raise text.vocab_size."
        )
    longest = max((len(words_of(text)) for text in instructions), default=0)
    return WordPrompts(words, longest + 2 if length is None else length, config.bos_id)


def words_of(instruction: str) -> list[str]:
    """Its words in lower case, without punctuation."""
    return re.findall(r"[a-z0-9']+", instruction.lower())
