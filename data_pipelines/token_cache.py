"""Tokens of a frozen encoder in ArrayRecord files, for sets too large to be mapped as one array.

A cache is a folder of one split: `manifest.json` says what the tokens are of, and the files hold
them in record order, a fixed number in each. A record is the raw bytes of one picture's [N, D]. See
`token_cache_writer` for how it is made and `features` for sets that fit on one disk.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader

from fastdrive_jax.errors import UserError
from fastdrive_jax.files import read_json

FORMAT = 1
MANIFEST = "manifest.json"
DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
_THREADS = 16  # that open files at once, which waits for the disk or the network


@dataclass(frozen=True)
class CacheIdentity:
    """What the tokens of a cache are; its JSON object is the manifest.

    Attributes:
        encoder: Digest of the encoder.
        data: Digest of the data set, see `Shards`.
        split: The split.
        image_size: Height and width of the encoded pictures.
        resize: How they were resized, see `decode_image`.
        dtype: A name of `DTYPES`.
        grid: Token rows and columns; N is their product.
        dim: Token size D.
        records: Pictures of the split.
        records_per_file: Of every file but the last.
        format: Of the files.
    """

    encoder: str
    data: str
    split: str
    image_size: tuple[int, int]
    resize: str
    dtype: str
    grid: tuple[int, int]
    dim: int
    records: int
    records_per_file: int
    format: int = FORMAT

    @property
    def shape(self) -> tuple[int, int]:
        """N, D of a record."""
        return self.grid[0] * self.grid[1], self.dim

    @property
    def record_bytes(self) -> int:
        """Size of a record."""
        return self.shape[0] * self.shape[1] * DTYPES[self.dtype].itemsize

    def files(self) -> dict[str, int]:
        """Names of the files in order and how many records each holds."""
        step, total = self.records_per_file, self.records
        starts = range(0, total, step)
        return {
            f"tokens.array_record-{k:05d}-of-{len(starts):05d}": min(step, total - start)
            for k, start in enumerate(starts)
        }


@dataclass(frozen=True)
class TokenCache:
    """Random access to the tokens of a whole cache; can be pickled.

    Attributes:
        path: Its folder.
        identity: What the tokens are.
        source: The records' bytes.
    """

    path: Path
    identity: CacheIdentity
    source: ArrayRecordDataSource = field(repr=False, compare=False)

    def __len__(self) -> int:
        return self.identity.records

    def __getitem__(self, record: int) -> np.ndarray:
        """Tokens [N, D] of a record of the split, read-only.

        Raises:
            IndexError: There is no such record.
            UserError: Its bytes are damaged.
        """
        if not 0 <= record < len(self):
            raise IndexError(record)
        try:
            data = self.source[record]
            tokens = np.frombuffer(data, DTYPES[self.identity.dtype])
            return tokens.reshape(self.identity.shape)
        except Exception as error:  # whatever array_record says, or a record of another size
            name = list(self.identity.files())[record // self.identity.records_per_file]
            raise UserError(
                f"Record {record} of the token cache cannot be read from {self.path / name} "
                f"({error}); delete that file and write the cache again."
            ) from error


def open_token_cache(folder: Path) -> TokenCache:
    """Opens a cache after checking that all of its files are there.

    Raises:
        UserError: It is none, or a file is missing or damaged.
    """
    folder = Path(folder)
    identity = read_identity(folder)
    files = identity.files()
    if faults := list(file_faults(folder, identity, list(files)).values()):
        more = f" (and {len(faults) - 1} more are)" if len(faults) > 1 else ""
        raise UserError(
            f"{faults[0]}{more}; write the cache again, which makes only what is not there."
        )
    # With their ranges, so that array_record does not open all of them once more.
    paths = [f"{folder / name}[0:{count}]" for name, count in files.items()]
    return TokenCache(folder, identity, ArrayRecordDataSource(paths))


def read_identity(folder: Path) -> CacheIdentity:
    """The manifest of a cache, whole or not.

    Raises:
        UserError: There is none, or it is damaged or of another format.
    """
    path = Path(folder) / MANIFEST
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is no token cache of format {FORMAT}; write it again.")
    try:
        pairs = {name: tuple(content[name]) for name in ("image_size", "grid")}
        identity = CacheIdentity(**content | pairs)
        numbers = (*identity.grid, identity.dim, identity.records, identity.records_per_file)
        if identity.dtype not in DTYPES or min(numbers) < 1:
            raise ValueError("its numbers make no sense")
        return identity
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); write the cache again.") from error


def file_faults(folder: Path, identity: CacheIdentity, names: Sequence[str]) -> dict[str, str]:
    """What is wrong with files of a cache, by name; those that are whole are left out."""
    counts = identity.files()
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _fault(folder / name, counts[name]), names)
        return {name: fault for name, fault in zip(names, found, strict=True) if fault}


def _fault(path: Path, records: int) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    try:
        reader = ArrayRecordReader(str(path))
        found = reader.num_records()
        reader.close()
    except Exception as error:  # whatever array_record says of a file that is none
        return f"{path} is damaged ({error})"
    return None if found == records else f"{path} holds {found} of {records} records"
