"""The order of windows: nothing twice in an epoch, the same for any number of ranks, exact on resume."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launch.config import Config, DataConfig, ModelConfig
from launch.data import ShuffledWindows, TokenWindows, open_corpus, rank_part
from launch.ranks import Ranks
from launch.run import validate


def numbered(num_windows: int, seq_len: int = 4) -> TokenWindows:
    """Windows whose first token tells their index: window i begins with token i * seq_len."""
    return TokenWindows([np.arange(num_windows * seq_len + 1, dtype=np.uint16)], seq_len)


def indices(rows: torch.Tensor, seq_len: int = 4) -> list[int]:
    return [int(token) // seq_len for token in rows[:, 0]]


@given(
    num_windows=st.integers(1, 50),
    rows_per_rank=st.integers(1, 5),
    world_size=st.integers(1, 4),
    seed=st.integers(0, 3),
    steps=st.integers(1, 25),
)
def test_every_window_is_read_once_an_epoch(
    num_windows: int, rows_per_rank: int, world_size: int, seed: int, steps: int
) -> None:
    global_batch = rows_per_rank * world_size
    readers = [ShuffledWindows(numbered(num_windows), seed) for _ in range(world_size)]
    read: list[int] = []
    for _ in range(steps):
        for rank, reader in enumerate(readers):
            read += indices(reader.next_batch(global_batch, rank, world_size))
    # in rank order, step by step, the reads are the global order: whole epochs, then part of one
    for begin in range(0, len(read), num_windows):
        epoch = Counter(read[begin : begin + num_windows])
        assert max(epoch.values()) == 1
        if begin + num_windows <= len(read):
            assert set(epoch) == set(range(num_windows))


@given(
    num_windows=st.integers(2, 60),
    seed=st.integers(0, 3),
    stop=st.integers(0, 12),
    worlds=st.tuples(*[st.sampled_from([1, 2, 3, 4])] * 2),
)
def test_a_resume_on_other_ranks_goes_on_exactly(
    num_windows: int, seed: int, stop: int, worlds: tuple[int, int]
) -> None:
    def steps(readers: list[ShuffledWindows], count: int) -> list[list[int]]:
        size = len(readers)
        return [
            [index for rank, reader in enumerate(readers) for index in indices(reader.next_batch(12, rank, size))]
            for _ in range(count)
        ]

    unbroken = steps([ShuffledWindows(numbered(num_windows), seed)], 20)
    first = [ShuffledWindows(numbered(num_windows), seed) for _ in range(worlds[0])]
    second = [ShuffledWindows(numbered(num_windows), seed) for _ in range(worlds[1])]
    head = steps(first, stop)
    for reader in second:
        reader.load_state_dict(first[0].state_dict())
    assert head + steps(second, 20 - stop) == unbroken


def test_epochs_are_shuffled_differently_and_by_the_seed() -> None:
    def two_epochs(seed: int) -> tuple[list[int], list[int]]:
        reader = ShuffledWindows(numbered(30), seed)
        return indices(reader.next_batch(30, 0, 1)), indices(reader.next_batch(30, 0, 1))

    first, second = two_epochs(0)
    assert sorted(first) == sorted(second) == list(range(30))
    assert first != second
    assert two_epochs(0) == (first, second)
    assert two_epochs(1)[0] != first


def test_a_resume_with_other_data_or_seed_is_refused() -> None:
    state = ShuffledWindows(numbered(30), 0).state_dict()
    with pytest.raises(ValueError, match="found num_windows 30 in the saved state and 31"):
        ShuffledWindows(numbered(31), 0).load_state_dict(state)
    with pytest.raises(ValueError, match="found seed 0 in the saved state and 1"):
        ShuffledWindows(numbered(30), 1).load_state_dict(state)


@given(lengths=st.lists(st.integers(0, 23), min_size=1, max_size=5), seq_len=st.integers(1, 5))
def test_windows_predict_every_token_once_and_never_cross_arrays(lengths: list[int], seq_len: int) -> None:
    arrays = [np.arange(length, dtype=np.uint16) + 100 * number for number, length in enumerate(lengths)]
    expected = [
        array[begin : begin + seq_len + 1].tolist()
        for array in arrays
        for begin in range(0, len(array) - seq_len, seq_len)
    ]
    if not expected:
        with pytest.raises(ValueError, match=f"found {sum(lengths)} tokens"):
            TokenWindows(arrays, seq_len)
        return
    windows = TokenWindows(arrays, seq_len)
    assert [windows[index].tolist() for index in range(len(windows))] == expected
    assert windows.gather(range(len(windows))).tolist() == expected
    with pytest.raises(IndexError, match=rf"window {len(windows)} of {len(windows)}"):
        windows[len(windows)]


def test_spread_is_even_fixed_and_never_too_long() -> None:
    assert numbered(100).spread(4) == [0, 25, 50, 75]
    assert numbered(3).spread(10) == [0, 1, 2]


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    assert rank_part(12, 1, 3) == slice(4, 8)
    with pytest.raises(ValueError, match="found 10 rows for 4 ranks"):
        rank_part(10, 0, 4)


def test_stdlib_corpus_gives_bytes() -> None:
    corpus = open_corpus(Config(model=ModelConfig(seq_len=64)))
    rows = corpus.train.next_batch(8, 1, 2)
    assert rows.shape == (4, 65)
    assert rows.dtype == torch.int64
    assert corpus.vocab_size == 256
    assert rows.max() < 256
    assert len(corpus.val) == corpus.about["val_windows"]


def test_streamed_documents_are_cut_by_rank_and_resumed(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    import json

    texts = [f"document number {number}: " + "ab" * (number % 7) for number in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = DataConfig(source="hf", dataset="json", files=str(tmp_path / "*.jsonl"), val_documents=5)
    config = Config(model=ModelConfig(seq_len=16), data=data)

    corpus = open_corpus(config)
    val_text = b"".join(text.encode() + b"\0" for text in texts[:5])
    assert corpus.val.arrays[0].astype(np.uint8).tobytes() == val_text
    train_text = b"".join(text.encode() + b"\0" for text in texts[5:])
    windows = [list(train_text[begin : begin + 17]) for begin in range(0, len(train_text) - 16, 16)]

    whole = [corpus.train.next_batch(6, 0, 1).tolist() for _ in range(20)]
    flat = [row for batch in whole for row in batch]
    assert flat[: len(windows)] == windows
    assert flat[len(windows) : 2 * len(windows)] == windows[: len(flat) - len(windows)]  # the next epoch, in order

    ranks = [open_corpus(config).train for _ in range(2)]
    for batch in whole[:7]:
        assert [row for rank in range(2) for row in ranks[rank].next_batch(6, rank, 2).tolist()] == batch
    state = json.loads(json.dumps(ranks[0].state_dict()))
    resumed = [open_corpus(config).train for _ in range(3)]
    for reader in resumed:
        reader.load_state_dict(state)
    for batch in whole[7:]:
        assert [row for rank in range(3) for row in resumed[rank].next_batch(6, rank, 3).tolist()] == batch


def test_a_stream_with_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "one.jsonl").write_text('{"text": "only one document, kept for validation"}\n')
    data = DataConfig(source="hf", dataset="json", files=str(tmp_path / "one.jsonl"))
    corpus = open_corpus(Config(model=ModelConfig(seq_len=8), data=data))
    with pytest.raises(ValueError, match=r"lower data\.val_documents"):
        corpus.train.next_batch(1, 0, 1)


def test_a_missing_datasets_package_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        open_corpus(Config(data=DataConfig(source="hf", dataset="json")))


def test_a_rank_without_a_validation_window_is_refused() -> None:
    """Its mean would be 0 / 0; all ranks see the same count, so all raise."""
    windows = numbered(2)
    with pytest.raises(ValueError, match=r"validation: found 2 windows for 3 ranks; each needs one; add data"):
        validate(torch.nn.Identity(), windows, windows.spread(8), 1, Ranks(world_size=3, device=torch.device("cpu")))
