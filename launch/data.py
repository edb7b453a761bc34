"""In which order a run reads its windows, and which of them this rank reads.

A window is `seq_len + 1` consecutive tokens; windows overlap by one token, so every token is predicted once. There is
ONE global order of windows, fixed by the seed, and each step takes the next `global_batch` of them; only then is that
batch cut by rank. So the samples of a step do not depend on how many ranks there are, no window is read twice in an
epoch, and a run resumed from `state_dict()` on another number of ranks goes on exactly where the first one stopped.
Knows nothing of files (`launch.corpora` does) and calls no collective.

    epoch 0: permutation 0 of all windows        epoch 1: permutation 1 ...
    |--- step 1 ---|--- step 2 ---|--- step 3 ---|--- step 4 ---|
    | rank 0| rank 1| rank 0| rank 1| ...               a batch may run over the end of an epoch
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distmuon.errors import names, problem
from launch.config import Config
from launch.corpora import BYTE_VOCAB_SIZE, TextStream, TokenArray, read_shard, read_stdlib, shard_paths
from launch.tokenization import tokenizer_of

State: TypeAlias = dict[str, Any]


class TrainingWindows(Protocol):
    """Training data as a run sees it: an endless sequence of global batches."""

    def next_batch(self, global_batch: int, rank: int, world_size: int) -> Tensor:
        """This rank's (global_batch / world_size, seq_len + 1) int64 tokens of the next global batch."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


class TokenWindows:
    """Random access to the windows of some token arrays; none crosses from one array into the next.

    `vocab_size`, once it is set, bounds the ids: a larger one is named with its file and position.
    """

    def __init__(self, arrays: Sequence[TokenArray], seq_len: int, files: Sequence[Path] = ()) -> None:
        self.arrays = arrays
        self.seq_len = seq_len
        self.files = files
        self.vocab_size: int | None = None
        # starts[i] is the first window of array i; the last entry is the number of windows
        self.starts = [0, *accumulate(max(0, (len(array) - 1) // seq_len) for array in arrays)]
        if len(self) == 0:
            found = sum(map(len, arrays))
            where = names(files) if files else "data"
            raise ValueError(
                f"{where}: found {found} tokens in {len(arrays)} arrays; {seq_len + 1} in a row are needed for one "
                "window; add data or lower model.seq_len"
            )

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        which = int(np.searchsorted(self.starts, index, side="right")) - 1
        begin = (index - self.starts[which]) * self.seq_len
        tokens = np.asarray(self.arrays[which][begin : begin + self.seq_len + 1], dtype=np.int64)
        if self.vocab_size is not None and tokens.max() >= self.vocab_size:
            raise problem(
                str(self.files[which]) if self.files else "data",
                found=f"found token {tokens.max()} at position {begin + int(tokens.argmax())}",
                needed=f"the model has a vocabulary of {self.vocab_size}",
                cure="set model.config.vocab_size to that of the tokenizer that wrote the tokens",
            )
        return tokens

    def unread(self) -> list[str]:
        """The files that are too short for one window."""
        return [
            f"{path} ({len(array)} tokens)"
            for path, array in zip(self.files, self.arrays)
            if len(array) <= self.seq_len
        ]

    def gather(self, indices: Sequence[int]) -> Tensor:
        """The (len(indices), seq_len + 1) int64 tokens of these windows."""
        return torch.from_numpy(np.stack([self[index] for index in indices]))

    def spread(self, count: int) -> list[int]:
        """At most `count` window indices, evenly spaced over the whole: a fixed sample for validation."""
        count = min(count, len(self))
        return [index * len(self) // count for index in range(count)]


@dataclass
class WindowOrder:
    """The global order: epoch after epoch, each a permutation of its own drawn from (seed, epoch)."""

    num_windows: int
    seed: int
    epoch: int = 0
    position: int = 0
    """Windows of this epoch already taken."""
    _permutation: npt.NDArray[np.int64] | None = field(default=None, repr=False)

    def take(self, count: int) -> list[int]:
        """The next `count` window indices."""
        taken: list[int] = []
        while len(taken) < count:
            if self._permutation is None:
                self._permutation = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_windows)
            part = self._permutation[self.position : self.position + count - len(taken)]
            taken.extend(part.tolist())
            self.position += len(part)
            if self.position == self.num_windows:
                self.epoch, self.position, self._permutation = self.epoch + 1, 0, None
        return taken

    def state_dict(self) -> State:
        return {"num_windows": self.num_windows, "seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: State) -> None:
        mine = self.state_dict()
        for key in ("num_windows", "seed"):
            if state[key] != mine[key]:
                raise ValueError(
                    f"data order: found {key} {state[key]} in the saved state and {mine[key]} in this run; they must "
                    "be equal for a resume to go on exactly; use the data, seq_len and seed of the first run"
                )
        self.epoch, self.position, self._permutation = state["epoch"], state["position"], None


class ShuffledWindows:
    """Training windows with random access, reshuffled at every epoch."""

    def __init__(self, windows: TokenWindows, seed: int) -> None:
        self.windows = windows
        self.order = WindowOrder(len(windows), seed)

    def next_batch(self, global_batch: int, rank: int, world_size: int) -> Tensor:
        part = rank_part(global_batch, rank, world_size)
        return self.windows.gather(self.order.take(global_batch)[part])

    def state_dict(self) -> State:
        return self.order.state_dict()

    def load_state_dict(self, state: State) -> None:
        self.order.load_state_dict(state)


class StreamedWindows:
    """Training windows of a text stream, in the stream's own order, epoch after epoch.

    Every rank walks the whole stream and keeps its part: where a window ends is only known once the documents before
    it are tokens. That repeats the tokenizer's work on every rank, the price of an order free of the number of ranks;
    for long runs write token shards once and read those (`source: bin`).
    """

    def __init__(self, stream: TextStream, seq_len: int) -> None:
        self.stream = stream
        self.seq_len = seq_len
        self.epoch = 0
        self.position = 0
        self._load(tail=[], stream_state=None)

    def next_batch(self, global_batch: int, rank: int, world_size: int) -> Tensor:
        part = rank_part(global_batch, rank, world_size)
        return torch.tensor([self._next_window() for _ in range(global_batch)][part], dtype=torch.int64)

    def state_dict(self) -> State:
        tail, stream_state = list(self.tail), self.stream.state_dict()
        return {"epoch": self.epoch, "position": self.position, "tail": tail, "stream": stream_state}

    def load_state_dict(self, state: State) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self._load(tail=state["tail"], stream_state=state["stream"])

    def _load(self, *, tail: list[int], stream_state: State | None) -> None:
        self.tail = list(tail)  # tokens read and not yet in a finished window
        self.documents: Iterator[list[int]] = self.stream.training_documents(stream_state)

    def _next_window(self) -> list[int]:
        while len(self.tail) <= self.seq_len:
            document = next(self.documents, None)
            if document is not None:
                self.tail += document
                continue
            if self.position == 0:
                raise ValueError(
                    f"data.dataset: found fewer than {self.seq_len + 1} training tokens in the whole stream; one "
                    "window is needed; lower data.val_documents or model.seq_len"
                )
            self.epoch, self.position = self.epoch + 1, 0
            self._load(tail=[], stream_state=None)
        window = self.tail[: self.seq_len + 1]
        del self.tail[: self.seq_len]
        self.position += 1
        return window


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What a run reads: endless training batches, and validation windows by index."""

    train: TrainingWindows
    val: TokenWindows
    vocab_size: int | None
    """None: the shards do not say; the model's own vocabulary then decides."""
    about: dict[str, object]
    """Counts for the log."""
    tokenizer: Any | None
    """Of transformers; None: nobody knows how to read the tokens."""
    warnings: tuple[str, ...] = ()

    def check_ids_below(self, vocab_size: int) -> None:
        """From now on refuse tokens that a model with this vocabulary does not have, as they are read."""
        self.val.vocab_size = vocab_size
        if isinstance(self.train, ShuffledWindows):
            self.train.windows.vocab_size = vocab_size


def rank_part(global_batch: int, rank: int, world_size: int) -> slice:
    """The rows of a global batch that one rank reads: consecutive equal parts."""
    if global_batch % world_size:
        raise ValueError(
            f"global batch: found {global_batch} rows for {world_size} ranks; equal parts are needed; take a multiple"
        )
    rows = global_batch // world_size
    return slice(rank * rows, (rank + 1) * rows)


def open_corpus(config: Config) -> Corpus:
    """The corpus a config describes. Raises ValueError naming the key when there is nothing to read."""
    data, seq_len, seed = config.data, config.model.seq_len, config.train.seed
    if data.source == "hf":
        stream = TextStream(data)
        val = TokenWindows([stream.validation_tokens()], seq_len)
        about: dict[str, object] = {"source": f"hf {data.dataset}", "val_tokens": sum(map(len, val.arrays))}
        return Corpus(
            train=StreamedWindows(stream, seq_len),
            val=val,
            vocab_size=stream.vocab_size,
            about=about,
            tokenizer=stream.tokenizer,
        )
    if data.source == "bin":
        vocab_size = None
        train, val = (_shards(data.train, "data.train", seq_len), _shards(data.val, "data.val", seq_len))
    else:
        train_text, val_text = read_stdlib()
        vocab_size = BYTE_VOCAB_SIZE
        train, val = TokenWindows([train_text], seq_len), TokenWindows([val_text], seq_len)
    about = {
        "source": data.source,
        "train_tokens": sum(map(len, train.arrays)),
        "train_windows": len(train),
        "val_tokens": sum(map(len, val.arrays)),
        "val_windows": len(val),
    }
    short = [*train.unread(), *val.unread()]
    warnings = (f"shorter than a window of {seq_len + 1} tokens and never read: {names(short)}",) if short else ()
    return Corpus(
        train=ShuffledWindows(train, seed),
        val=val,
        vocab_size=vocab_size,
        about=about,
        tokenizer=tokenizer_of(data),
        warnings=warnings,
    )


def _shards(pattern: str, key: str, seq_len: int) -> TokenWindows:
    paths = shard_paths(pattern, key)
    return TokenWindows([read_shard(path) for path in paths], seq_len, paths)
