"""A program that cannot go on says why: once, on rank 0, in one line, last; and a dry run finds it before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch

from distmuon.errors import problem
from launch import pretrain
from launch.config import parse
from launch.failures import is_meant_for_the_reader, run_program
from tests.launch.test_pretrain import ROOT, SHORT, TINY, records

RUN = ["--config", str(ROOT / "configs/quickstart.yaml"), *TINY, *SHORT]


def _ours() -> NoReturn:
    raise problem("a", found="b", needed="c", cure="d")


def _numpys() -> None:
    np.zeros(3).reshape(2)


def _torchs() -> None:
    torch.zeros(3).view(2)


def test_an_error_of_ours_is_a_line_on_rank_0_and_torchrun_gets_it_from_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.failures.OURS", ("tests", "distmuon"))
    for rank, printed in (("0", "error: a: b; c; d\n"), ("1", "")):
        path = tmp_path / rank
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
        with pytest.raises(SystemExit) as left:
            run_program(_ours)
        assert left.value.code == 1
        assert capsys.readouterr().err == printed
        assert json.loads(path.read_text())["message"]["extraInfo"]["py_callstack"] == "a: b; c; d"


@pytest.mark.parametrize("other", [_numpys, _torchs])
def test_an_error_of_a_library_keeps_its_traceback(other: NoReturn) -> None:
    with pytest.raises(Exception) as caught:
        run_program(other)
    assert not isinstance(caught.value, SystemExit) and not is_meant_for_the_reader(caught.value)


def _interrupted() -> None:
    raise KeyboardInterrupt


def test_an_interrupted_program_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run_program(_interrupted)
    assert left.value.code == 130 and capsys.readouterr().err.startswith("interrupted; nothing was saved")


WRONG = "--train.stepz=6"
REASON = "unrecognized arguments: --train.stepz=6; did you mean train.steps?"


def _two_ranks(launcher: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", launcher, "--nproc_per_node=2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_two_ranks_give_the_reason_once_and_torchrun_has_it_too(tmp_path: Path) -> None:
    """It was 139 lines for a misspelt key, the reason in lines 49 and 98."""
    done = _two_ranks("torch.distributed.run", tmp_path, "-m", "launch.pretrain", *RUN, WRONG)
    lines = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 1
    assert [line for line in lines if line.startswith("error:")] == [f"error: {REASON}"]
    assert "usage" not in done.stderr and done.stderr.count("Traceback") == 1, "torchrun's own"
    assert any(REASON in line and "traceback :" in line for line in lines[-12:])


@pytest.mark.parametrize(
    ("arguments", "status", "last"),
    [
        # by day torchrun's own report has this reason, in the test above
        pytest.param((WRONG,), 2, f"error: {REASON}", marks=pytest.mark.slow),
        (("--train.global_batch=15",), 1, "error: train.global_batch: found 15 for 2 ranks of micro_batch 2"),
    ],
)
def test_our_torchrun_ends_with_the_reason(arguments: tuple[str, ...], status: int, last: str, tmp_path: Path) -> None:
    """torchrun's own adds 38 lines to it."""
    given = ("-m", "launch.pretrain", *RUN, f"--log.dir={tmp_path}", *arguments)
    done = _two_ranks("launch.torchrun", tmp_path, *given)
    assert done.returncode == status
    *loading, reason = done.stderr.splitlines()
    assert loading == ["loading launch.torchrun ...", "loading launch.pretrain ..."] and reason.startswith(last)


def test_our_torchrun_names_a_rank_that_ends_without_a_word(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import os, time\nos.environ['RANK'] == '1' and os.kill(os.getpid(), 9)\ntime.sleep(20)\n")
    done = _two_ranks("launch.torchrun", tmp_path, str(program))
    assert done.returncode == 137 and "\nerror: rank 1: Signal 9 (SIGKILL)" in done.stderr, done.stderr


@pytest.mark.parametrize("warmup", [2, 20])
def test_a_run_no_longer_than_its_warm_up_warns(
    warmup: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shortening a run is the first thing one does, and it was refused."""
    given = ["--train.schedule=cosine", f"--train.warmup_steps={warmup}", "--train.steps=2", f"--log.dir={tmp_path}"]
    pretrain.main([*RUN, *given])
    assert (
        f"warning: the run ends in its warm-up: train.steps 2, train.warmup_steps {warmup}" in capsys.readouterr().out
    )
    rates = [record["lr"]["muon"] for record in records(tmp_path) if record["kind"] == "train"]
    assert rates == pytest.approx([1e-2 / warmup, 2e-2 / warmup])
    assert parse([*RUN, "--train.schedule=constant", "--train.warmup_steps=5", "--train.steps=6"]).warnings() == []


def test_a_dry_run_checks_everything_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    dry = [*RUN, f"--log.dir={folder}", "--dry-run", "4"]
    pretrain.main(dry)
    text = capsys.readouterr().out
    assert "llama: 37,024 parameters" in text
    assert "ranks: 4 (1 replicas x 4 shards x tp 1), sharding zero1" in text
    assert "step: 256 tokens, 1 micro-batches of 2 sequences a rank" in text
    assert "the optimizer sends" in text and f"log.dir {folder}: a new run" in text
    assert not folder.exists()
    pretrain.main([*dry, "--parallel.shard=hsdp", "--parallel.replicas=2", "--train.global_batch=16"])
    assert "ranks: 4 (2 replicas x 2 shards x tp 1), sharding hsdp" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--train.global_batch=6"], r"train\.global_batch: found 6 for 4 ranks"),
        (["--model.arch=llamma"], r"model\.arch: found 'llamma'; .*did you mean llama"),
        (["--model.arch=zzz"], r"model\.arch: found 'zzz'"),
        (["--data.source=bin", "--data.train=none", "--data.val=none"], r"data\.train: found no file"),
        (["--parallel.shard=fsdp2", "--parallel.tp=4"], r"parallel\.tp: found 4 for num_attention_heads 2"),
        (['--optimizer.routes=[{"pattern": "none", "rule": "muon"}]'], "none"),
        (["--model.seq_len=10000000"], r"data: found \d+ tokens"),
    ],
)
def test_a_dry_run_raises_what_the_run_would(arguments: list[str], named: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=named):
        pretrain.main([*RUN, f"--log.dir={tmp_path}", *arguments, "--dry-run", "4"])


def test_the_first_words_come_before_the_imports() -> None:
    """Ten seconds of imports and building were silent; and a program that imports the package says nothing of it."""
    command = [sys.executable, "-X", "importtime", "-m", "launch.pretrain", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    lines = done.stderr.splitlines()
    assert lines.index("loading launch.pretrain ...") < next(n for n, line in enumerate(lines) if "torch" in line)
    for arguments, environment in ((["-c", "import launch"], {}), (["-m", "launch"], {"RANK": "1"})):
        command, env = [sys.executable, *arguments], {**os.environ, **environment}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert "loading" not in done.stderr
