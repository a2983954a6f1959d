"""pi0's prompts: BOS, the instruction as PaliGemma's tokenizer has it, and a new line.

openpi's form, which lerobot's is too: the new line is a token of its own, where the answer began in
PaliGemma's training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.hf_files import TOKENIZER_FILE, read_tokenizer
from fastdrive_jax.models.pi0.config import Pi0Config
from fastdrive_jax.models.prompts import Encoded, padded

PROMPT_TOKENS = 48  # of pi0 as published
SOURCE = "google/paligemma-3b-pt-224"
_BOS = "<bos>"
_ADDED = 64  # rows that transformers' PaliGemma has behind those of openpi, for "<image>"


@dataclass(frozen=True)
class PaliGemmaPrompts:
    """The published prompts.

    Attributes:
        tokenizer: Of the library `tokenizers`; special tokens of its own are not asked for.
        bos_id: First of every prompt.
        end_id: Last of every prompt, the new line.
        length: L.
    """

    tokenizer: Tokenizer
    bos_id: int
    end_id: int
    length: int = PROMPT_TOKENS

    def encode(self, instructions: Sequence[str]) -> Encoded:
        """See `Prompts.encode`; capitals stay.

        Raises:
            UserError: A prompt is longer than `length`, where openpi would cut it off.
        """
        prompts = [
            [self.bos_id, *_ids(self.tokenizer, clean(one)), self.end_id] for one in instructions
        ]
        return padded(prompts, self.length, instructions)


def clean(instruction: str) -> str:
    """An instruction on one line, with blanks where names have underscores."""
    return instruction.strip().replace("_", " ").replace("\n", " ")


def read_prompts(folder: Path, config: Pi0Config, length: int = PROMPT_TOKENS) -> PaliGemmaPrompts:
    """The prompts of a checkpoint.

    Args:
        folder: Holds `tokenizer.json`, which openpi's and most of lerobot's folders lack.
        config: Of the model.
        length: See `PaliGemmaPrompts`.

    Raises:
        UserError: There is no tokenizer, or it is not PaliGemma's.
    """
    path = Path(folder) / TOKENIZER_FILE
    if not path.exists():
        raise UserError(
            f"{folder} holds no {TOKENIZER_FILE}; pi0's is that of {SOURCE} on the Hugging Face "
            "Hub: copy it there."
        )
    tokenizer = read_tokenizer(Path(folder))
    bos, end = tokenizer.token_to_id(_BOS), _ids(tokenizer, "\n")
    most = config.prefix.vocab_size + _ADDED
    if bos is None or len(end) != 1 or tokenizer.get_vocab_size() > most:
        raise UserError(
            f"{path} is not PaliGemma's: it must know {_BOS} and a new line as one token each, "
            f"among {most} at most; take that of {SOURCE}."
        )
    return PaliGemmaPrompts(tokenizer, bos, end[0], length)


def _ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids
