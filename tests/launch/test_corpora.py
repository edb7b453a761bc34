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


def _bin(folder: Path, **files: bytes) -> DataConfig:
    for name, content in files.items():
        (folder / f"{name}.bin").write_bytes(content)
    return DataConfig(source="bin", train=str(folder / "train*.bin"), val=str(folder / "val.bin"))


def _header(magic: int, version: int, count: int) -> bytes:
    start = np.zeros(256, "<i4")
    start[:3] = magic, version, count
    return start.tobytes()


def test_llama_3s_shards_of_llm_c_are_read(tmp_path: Path) -> None:
    """They were taken for raw uint16, header and all, and trained on as garbage."""
    tokens = np.random.default_rng(0).integers(0, 128_000, 500).astype("<u4")
    (tmp_path / "a.bin").write_bytes(_header(20240801, 7, 500) + tokens.tobytes())
    shard = corpora.read_shard(tmp_path / "a.bin")
    assert shard.dtype == np.uint32
    np.testing.assert_array_equal(shard, tokens)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (_header(20990101, 1, 3) + bytes(6), "found a header of magic 20990101, version 1; 20240520 version 1"),
        (_header(7, 1, 3) + bytes(6), "found a header of magic 7, version 1"),
        (_header(20240801, 1, 3) + bytes(12), "found a header of magic 20240801, version 1"),
        (b"\x93NUMPY" + bytes(range(250)) * 8, r"found an array of NumPy's own format \(.npy\)"),
        (b"", "found 0 bytes"),
    ],
)
def test_a_file_that_is_no_shard_is_refused(content: bytes, named: str, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.bin: {named}"):
        corpora.read_shard(tmp_path / "a.bin")


def test_a_raw_shard_of_few_bytes_or_of_zeros_is_no_header(tmp_path: Path) -> None:
    """A shard of two bytes once ended in an IndexError."""
    for content in (b"\x01\x00", bytes(4096), np.arange(1000, dtype="<u2").tobytes()):
        (tmp_path / "a.bin").write_bytes(content)
        assert corpora.read_shard(tmp_path / "a.bin").tobytes() == content


def test_shards_without_a_window_are_named(tmp_path: Path) -> None:
    long, short = np.arange(100, dtype="<u2").tobytes(), np.arange(5, dtype="<u2").tobytes()
    data = _bin(tmp_path, train_0=long, train_1=short, val=long)
    corpus = open_corpus(Config(model=ModelConfig(seq_len=8), data=data))
    (text,) = corpus.warnings
    assert text == f"shorter than a window of 9 tokens and never read: {tmp_path / 'train_1.bin'} (5 tokens)"
    data = _bin(tmp_path, train_0=short, train_1=short, val=long)
    with pytest.raises(ValueError, match=r"train_0\.bin, .*train_1\.bin: found 10 tokens in 2 arrays; 9 in a row"):
        open_corpus(Config(model=ModelConfig(seq_len=8), data=data))


def test_a_token_beyond_the_vocabulary_is_named_with_its_file_and_position(tmp_path: Path) -> None:
    """It ended in "index out of range in self", from deep inside torch; on CUDA in a device assert."""
    tokens = np.zeros(100, "<u2")
    tokens[43] = 256
    data = _bin(tmp_path, train_0=np.zeros(100, "<u2").tobytes(), train_1=tokens.tobytes(), val=tokens.tobytes())
    corpus = open_corpus(Config(model=ModelConfig(seq_len=8), data=data))
    corpus.check_ids_below(257)
    corpus.train.next_batch(24, 0, 1)
    corpus.check_ids_below(256)
    with pytest.raises(
        ValueError, match=r"train_1\.bin: found token 256 at position 43; the model has a vocabulary of 256"
    ):
        corpus.train.next_batch(24, 0, 1)
    with pytest.raises(ValueError, match=r"val\.bin: found token 256 at position 43"):
        corpus.val.gather(range(12))


def test_what_datasets_and_tokenizers_do_not_find_is_said_in_a_line(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    path = tmp_path / "text.json"
    path.write_text('{"body": "abc", "author": "x", "id": 1}\n' * 5)

    def read(**keys: str) -> None:
        config = DataConfig(source="hf", **{"dataset": "json", "files": str(path), **keys})  # type: ignore[arg-type]
        corpora.TextStream(config).validation_tokens()

    read(text_field="body")
    with pytest.raises(
        ValueError, match=r"data\.text_field: found 'text', which is no column .* is needed: body, author;"
    ):
        read()
    with pytest.raises(ValueError, match=r"data\.text_field: found 'id', which is a int"):
        read(text_field="id")
    with pytest.raises(ValueError, match=r"data\.dataset: found 'json' with data\.files '.*none.json', split 'train'"):
        read(files=str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"data\.dataset: found 'json' .*, split 'test', for which datasets says"):
        read(train="test")
    with pytest.raises(ValueError, match=r"data\.tokenizer: found '.*/nowhere', for which transformers says"):
        read(tokenizer=str(tmp_path / "nowhere"))
