"""Fixtures of every test: the shared pool of workers, and one thread a process so that sums are the same everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests.pool import Pool

# An example takes as long as the machine's other work lets it.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four workers, started at the first use."""
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.fixture
def spawn(pool: Pool) -> Callable[..., list[Any]]:
    """`spawn(fn, dp_size, timeout=60, **kwargs)` -> what `fn(group, **kwargs)` returned on each rank."""
    return pool.spawn


@pytest.fixture
def spawn_raises(pool: Pool) -> Callable[..., list[str]]:
    """`spawn_raises(fn, dp_size, match=...)` -> the message of each rank; every rank must raise."""
    return pool.spawn_raises


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
