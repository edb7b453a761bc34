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

from distmuon.errors import names, problem
from launch.config import DataConfig
from launch.tokenization import first_line, tokenizer_of

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
# (magic, version) of a header -> tokens behind it, and who writes it
HEADERS = {
    (20240520, 1): ("<u2", "llm.c for GPT-2, modded-nanogpt"),
    (20240801, 7): ("<u4", "llm.c for Llama 3"),
}


def shard_paths(pattern: str, key: str) -> list[Path]:
    """The token shards a glob names, in sorted order."""
    paths = sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise ValueError(f"{key}: found no file for {pattern!r}; at least one shard is needed; correct the glob")
    return [Path(path) for path in paths]


def read_shard(path: Path) -> TokenArray:
    """One shard of tokens, memory-mapped: raw uint16 as nanoGPT writes it, or behind a header of `HEADERS`.

    A header is 256 int32: magic, version, number of tokens, zeros. A file without one is raw.
    """
    size = path.stat().st_size
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if not _is_header(header):
        if header[:2].tobytes().startswith(b"\x93NUMPY"):
            raise problem(
                str(path),
                found="found an array of NumPy's own format (.npy)",
                needed="a token shard is needed",
                cure="write it by tokens.astype(numpy.uint16).tofile(path)",
            )
        if size == 0 or size % 2:
            raise problem(
                str(path),
                found=f"found {size} bytes",
                needed="uint16 tokens take 2 each",
                cure="this is not a token shard, or torn; copy it again",
            )
        return np.memmap(path, dtype="<u2", mode="r")
    magic, version, num_tokens = (int(number) for number in header[:3])
    if (magic, version) not in HEADERS:
        known = ", ".join(f"{magic} version {version} ({writer})" for (magic, version), (_, writer) in HEADERS.items())
        raise problem(
            str(path),
            found=f"found a header of magic {magic}, version {version}",
            needed=f"{known}, or raw uint16 tokens are needed",
            cure="write the shard in one of these formats",
        )
    dtype = np.dtype(HEADERS[magic, version][0])
    expected = 4 * HEADER_INTS + dtype.itemsize * num_tokens
    if size != expected:
        raise problem(
            str(path),
            found=f"found {size} bytes",
            needed=f"the header promises {num_tokens} tokens, that is {expected} bytes",
            cure="the file is torn, copy it again",
        )
    return np.memmap(path, dtype=dtype, mode="r", offset=4 * HEADER_INTS, shape=(num_tokens,))


def _is_header(start: npt.NDArray[np.int32]) -> bool:
    """Whether a file begins with a header, known or not: three numbers and zeros, which no text is in tokens."""
    is_known = len(start) > 0 and int(start[0]) in {magic for magic, _ in HEADERS}
    return is_known or (len(start) == HEADER_INTS and start[0] != 0 and not start[3:].any())


# ---- Hugging Face text


class TextStream:
    """A streamed Hugging Face dataset as token lists, one a document, each ending in a separator.

    The first `val_documents` documents are the validation split; training streams everything behind them, in the
    dataset's own order (published corpora are shuffled already).
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.tokenizer: Any = tokenizer_of(config)
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
            tokens += self.encode(self._text(example))
        return np.asarray(tokens, dtype=np.uint32)

    def training_documents(self, state: dict[str, Any] | None) -> Iterator[list[int]]:
        """Token lists from the first training document on, or from where `state` was taken."""
        self._training = self._open().skip(self.config.val_documents)
        if state is not None:
            self._training.load_state_dict(state)
        return (self.encode(self._text(example)) for example in self._training)

    def state_dict(self) -> dict[str, Any]:
        """Where the iterator of the last `training_documents` call stands: behind the last document it gave."""
        state: dict[str, Any] = self._training.state_dict()
        return state

    def _text(self, example: dict[str, Any]) -> str:
        text = example.get(self.config.text_field)
        if not isinstance(text, str):
            columns = [name for name, value in example.items() if isinstance(value, str)]
            raise problem(
                "data.text_field",
                found=f"found {self.config.text_field!r}, which is "
                + (f"a {type(text).__name__}" if self.config.text_field in example else "no column of the dataset"),
                needed=f"a column of text is needed: {names(columns) if columns else 'the dataset has none'}",
                cure="set data.text_field",
            )
        return text

    def encode(self, text: str) -> list[int]:
        """Tokens of one document and the separator behind it."""
        if self.config.tokenizer == "bytes":
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
        try:
            return load_dataset(config.dataset, config.subset, data_files=config.files, split=split, streaming=True)
        except (OSError, ValueError, RuntimeError) as error:
            given = f"found {config.dataset!r}" + (f" with data.files {config.files!r}" if config.files else "")
            raise problem(
                "data.dataset",
                found=f"{given}, split {split!r}, for which datasets says: {first_line(error)}",
                needed="a dataset or files that it can open are needed",
                cure="correct data.dataset, data.subset, data.files or data.train",
            ) from error
