"""The readers: the split of the standard library, and both shard formats byte for byte."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import pytest

from launch import corpora
from launch.config import Config, DataConfig, ModelConfig
from launch.data import open_corpus


def write_raw(path: Path, tokens: np.ndarray) -> None:
    tokens.astype("<u2").tofile(path)


def write_with_header(path: Path, tokens: np.ndarray, *, version: int = 1, promised: int | None = None) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, version, len(tokens) if promised is None else promised
    with path.open("wb") as file:
        file.write(header.tobytes() + tokens.astype("<u2").tobytes())


def test_stdlib_split_is_by_file_and_stable() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    files = corpora.stdlib_files(root)
    assert files == sorted(files, key=Path.as_posix)
    assert Path("argparse.py") in files
    assert not [path for path in files if {"site-packages", "test", "tests"} & set(path.parts)]
    # the hash, not the machine, decides: these never change sides
    sides = {
        name: corpora.is_validation(Path(name)) for name in ("argparse.py", "json/decoder.py", "os.py", "typing.py")
    }
    assert sides == {"argparse.py": False, "json/decoder.py": False, "os.py": False, "typing.py": False}
    assert [str(path) for path in files if corpora.is_validation(path)][:1] != []
    share = sum(map(corpora.is_validation, files)) / len(files)
    assert 0.02 < share < 0.09


def test_stdlib_text_is_the_files_with_a_separator_behind_each() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    train, val = corpora.read_stdlib()
    files = corpora.stdlib_files(root)
    for tokens, side in ((train, False), (val, True)):
        documents = tokens.tobytes().split(b"\0")
        paths = [path for path in files if corpora.is_validation(path) is side]
        assert documents.pop() == b""
        assert documents == [(root / path).read_bytes() for path in paths]


def test_both_shard_formats_round_trip(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 2**16, 5000)
    write_raw(tmp_path / "a_raw.bin", tokens)
    write_with_header(tmp_path / "b_header.bin", tokens)
    for name in ("a_raw.bin", "b_header.bin"):
        shard = corpora.read_shard(tmp_path / name)
        assert isinstance(shard, np.memmap)
        assert shard.dtype == np.uint16
        np.testing.assert_array_equal(shard, tokens)
    paths = corpora.shard_paths(str(tmp_path / "*.bin"), "data.train")
    assert [path.name for path in paths] == ["a_raw.bin", "b_header.bin"]


def test_a_corpus_of_mixed_shards(tmp_path: Path) -> None:
    write_raw(tmp_path / "train_0.bin", np.arange(0, 33))
    write_with_header(tmp_path / "train_1.bin", np.arange(1000, 1017))
    write_raw(tmp_path / "val.bin", np.arange(9))
    data = DataConfig(source="bin", train=str(tmp_path / "train_*.bin"), val=str(tmp_path / "val.bin"))
    corpus = open_corpus(Config(model=ModelConfig(seq_len=8), data=data))
    assert corpus.vocab_size is None
    assert (corpus.about["train_windows"], corpus.about["val_windows"]) == (6, 1)
    starts = sorted(row[0] for row in corpus.train.next_batch(6, 0, 1).tolist())
    assert starts == [0, 8, 16, 24, 1000, 1008]


def test_torn_and_foreign_shards_are_refused(tmp_path: Path) -> None:
    tokens = np.arange(100)
    (tmp_path / "odd.bin").write_bytes(b"abc")
    write_with_header(tmp_path / "torn.bin", tokens, promised=200)
    write_with_header(tmp_path / "new.bin", tokens, version=7)
    with pytest.raises(ValueError, match=r"odd\.bin: found 3 bytes"):
        corpora.read_shard(tmp_path / "odd.bin")
    with pytest.raises(ValueError, match=r"torn\.bin: found 1224 bytes; the header promises 200 tokens, that is 1424"):
        corpora.read_shard(tmp_path / "torn.bin")
    with pytest.raises(ValueError, match=r"new\.bin: found a header of magic 20240520, version 7; 20240520 version 1"):
        corpora.read_shard(tmp_path / "new.bin")
    with pytest.raises(ValueError, match=r"data\.val: found no file for"):
        corpora.shard_paths(str(tmp_path / "none_*.bin"), "data.val")


def test_an_interpreter_without_its_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a zipped or stripped installation has none."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "argparse.py").write_text("one file is one side of the split only")
    with pytest.raises(
        ValueError, match=r"data\.source stdlib: found 1 source files under .*; use an interpreter that"
    ):
        corpora.read_stdlib()


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path: Path) -> None:
    """Nothing would part one document from the next."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"data\.tokenizer: found no end-of-text token in .*; choose a tokenizer with an"
    ):
        corpora.TextStream(DataConfig(source="hf", dataset="text", tokenizer=str(tmp_path)))
