"""Where tokens come from: the interpreter's own source text, token shards on disk, or a Hugging Face text stream.

Each reader hands back plain tokens, split once and for all into training and validation. Decides formats and splits;
knows nothing of windows, batches, epochs or ranks.

Byte-level text has a vocabulary of 256: a token is a byte, and byte 0, which no Python source may contain, ends every
document.
"""

from __future__ import annotations

import glob
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from launch.config import DataConfig

TokenArray: TypeAlias = npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

BYTE_VOCAB_SIZE = 256
SEPARATOR = b"\0"

# ---- the standard library's source text

VAL_PERCENT = 5
# Other people's packages, the tests (absent from many distributions), and folders of generated tables.
EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
)
# Written when the interpreter was built, with that machine's paths in it.
EXCLUDED_PREFIX = "_sysconfigdata"


def stdlib_files(root: Path) -> list[Path]:
    """The library's own *.py files, relative to `root` and sorted by their posix path."""
    found = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = (
        path for path in found if EXCLUDED_FOLDERS.isdisjoint(path.parts) and not path.name.startswith(EXCLUDED_PREFIX)
    )
    return sorted(kept, key=Path.as_posix)


def is_validation(path: Path) -> bool:
    """Whether a file belongs to the validation split: a stable hash of its relative path decides, nothing else."""
    return zlib.crc32(path.as_posix().encode()) % 100 < VAL_PERCENT


def read_stdlib() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Training and validation bytes of the running interpreter's standard library, split by file."""
    root = Path(sysconfig.get_path("stdlib"))
    texts: dict[bool, list[bytes]] = {False: [], True: []}
    for path in stdlib_files(root):
        texts[is_validation(path)].append((root / path).read_bytes().replace(SEPARATOR, b"") + SEPARATOR)
    if not texts[False] or not texts[True]:
        found = len(texts[False]) + len(texts[True])
        raise ValueError(
            f"data.source stdlib: found {found} source files under {root}; the library's *.py files are needed; use an "
            "interpreter that ships them, or source bin"
        )
    train, val = (np.frombuffer(b"".join(texts[split]), dtype=np.uint8) for split in (False, True))
    return train, val


# ---- token shards

HEADER_INTS = 256
HEADER_MAGIC = 20240520
HEADER_VERSION = 1


def read_shards(pattern: str, key: str) -> list[TokenArray]:
    """The token shards a glob names, in sorted order, memory-mapped."""
    paths = sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise ValueError(f"{key}: found no file for {pattern!r}; at least one shard is needed; correct the glob")
    return [read_shard(Path(path)) for path in paths]


def read_shard(path: Path) -> TokenArray:
    """One shard of uint16 tokens, memory-mapped: raw as nanoGPT writes it, or with modded-nanogpt's header.

    The header is 256 int32: magic 20240520, version 1, number of tokens, zeros. A file that does not begin with the
    magic is raw.
    """
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise ValueError(f"{path}: found {size} bytes; uint16 tokens take 2 each; this is not a token shard, or torn")
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if header[0] != HEADER_MAGIC:
        return np.memmap(path, dtype="<u2", mode="r")
    version, num_tokens = int(header[1]), int(header[2])
    if version != HEADER_VERSION:
        raise ValueError(
            f"{path}: found shard version {version}; version {HEADER_VERSION} is known; write it with that version"
        )
    expected = 4 * HEADER_INTS + 2 * num_tokens
    if size != expected:
        raise ValueError(
            f"{path}: found {size} bytes; the header promises {num_tokens} tokens, that is {expected} bytes; the file "
            "is torn, copy it again"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER_INTS, shape=(num_tokens,))


# ---- Hugging Face text


class TextStream:
    """A streamed Hugging Face dataset as token lists, one a document, each ending in a separator.

    The first `val_documents` documents are the validation split; training streams everything behind them, in the
    dataset's own order (published corpora are shuffled already).
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        if config.tokenizer == "bytes":
            self.tokenizer = None
            self.vocab_size = BYTE_VOCAB_SIZE
        else:
            from transformers import AutoTokenizer  # here: byte-level runs need no tokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
            self.vocab_size = len(self.tokenizer)
            if self.tokenizer.eos_token_id is None:
                raise ValueError(
                    f"data.tokenizer: found no end-of-text token in {config.tokenizer!r}; one must part the documents; "
                    "choose a tokenizer with an eos_token"
                )
        self._open()

    def validation_tokens(self) -> npt.NDArray[np.uint32]:
        """All validation documents back to back."""
        tokens: list[int] = []
        for example in self._open().take(self.config.val_documents):
            tokens += self.encode(example[self.config.text_field])
        return np.asarray(tokens, dtype=np.uint32)

    def training_documents(self, state: dict[str, Any] | None) -> Iterator[list[int]]:
        """Token lists from the first training document on, or from where `state` was taken."""
        self._training = self._open().skip(self.config.val_documents)
        if state is not None:
            self._training.load_state_dict(state)
        return (self.encode(example[self.config.text_field]) for example in self._training)

    def state_dict(self) -> dict[str, Any]:
        """Where the iterator of the last `training_documents` call stands: behind the last document it gave."""
        state: dict[str, Any] = self._training.state_dict()
        return state

    def encode(self, text: str) -> list[int]:
        """Tokens of one document and the separator behind it."""
        if self.tokenizer is None:
            return list(text.encode().replace(SEPARATOR, b"") + SEPARATOR)
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]

    def _open(self) -> Any:  # datasets.IterableDataset, an optional package
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ImportError(
                "data.source hf: found no `datasets` package; it reads Hugging Face datasets; pip install datasets"
            ) from error
        config = self.config
        split = config.train or "train"
        return load_dataset(config.dataset, config.subset, data_files=config.files, split=split, streaming=True)
