"""Who we are: one process without a launcher, and a clear word where there are fewer GPUs than processes."""

from __future__ import annotations

import pytest
import torch

from launch.ranks import launched_ranks


def test_without_torchrun_there_is_one_process_and_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with launched_ranks() as ranks:
        assert (ranks.rank, ranks.world_size, ranks.device) == (0, 1, torch.device("cpu"))
        assert not torch.distributed.is_initialized()
        assert ranks.sum(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
        assert ranks.gather("mine") == ["mine"]


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="local rank 1: found 1 GPUs"), launched_ranks():
        pass
