"""Ranks without their imports: processes forked from two that have torch and the recipe in memory.

An interpreter computes for 6 s before the first line of a rank; a fork starts in 0.01 s. `start` forks one process,
`torchrun` all ranks of a module, as `torchrun --standalone -m` does. There are two to fork from, so that neighbouring
ranks hash strings differently, as ranks do that start apart: an order taken from a set still differs between them.
What torchrun itself does (restarts, signals, reports) is tested under the real one.

    python -m tests.forks FD       # what `_Source` starts: it serves requests from that socket until it is closed
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import os
import pickle
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed import TCPStore

ROOT = Path(__file__).parents[1]
LIBRARY = ("distmuon",)
RECIPE = ("distmuon", "launch.pretrain", "transformers.models.llama.modeling_llama")
LEAVE_S = 30.0  # what torchrun gives the other ranks after one has failed


class Forked:
    """A process that was forked, as far as its starter may ask; it is no child of this process."""

    def __init__(self, source: _Source, pid: int) -> None:
        self._source = source
        self.pid = pid
        self._code: int | None = None

    @property
    def exitcode(self) -> int | None:
        """None while it runs; negative for a signal."""
        if self._code is None:
            self._source.listen(0.0)
            self._code = self._source.codes.get(self.pid)
        return self._code

    def is_alive(self) -> bool:
        return self.exitcode is None

    def join(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while self.is_alive() and time.monotonic() < deadline:
            self._source.listen(deadline - time.monotonic())

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class _Source:
    """A process that imports, and forks what it is told to."""

    def __init__(self) -> None:
        self._connection: Connection | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.codes: dict[int, int] = {}

    def begin(self) -> None:
        """Start the process if it does not run; it imports what is always needed while others are asked."""
        if self._connection is None:
            ours, theirs = socket.socketpair()
            command = [sys.executable, "-m", "tests.forks", str(theirs.fileno())]
            # an import that looks for GPUs would otherwise keep forked processes from using them
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
            fds = [theirs.fileno()]
            self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, pass_fds=fds)
            theirs.close()
            self._connection = Connection(ours.detach())
            atexit.register(self.close)

    def fork(self, request: dict[str, Any], handles: Sequence[int]) -> Forked:
        """`request` goes to `_child`; the child inherits `handles`."""
        assert self._connection is not None and self._process is not None
        self._connection.send_bytes(pickle.dumps({**request, "handles": len(handles)}))
        for handle in handles:
            send_handle(self._connection, handle, self._process.pid)
        while (pid := self._listen_once(None)) is None:
            pass
        return Forked(self, pid)

    def _listen_once(self, timeout: float | None) -> int | None:
        """The pid of a process that was started; an exit code is noted."""
        if self._connection is None or not self._connection.poll(timeout):
            return None
        what, pid, code = self._connection.recv()
        if what == "started":
            self.codes.pop(pid, None)  # of a process that had this number before
            return int(pid)
        self.codes[pid] = code
        return None

    def listen(self, timeout: float) -> None:
        self._listen_once(timeout)

    def close(self) -> None:
        """End it, and with it whatever it has forked."""
        if self._connection is not None and self._process is not None:
            self._connection.close()
            self._process.wait()
            self._connection = self._process = None


_sources = [_Source(), _Source()]


def start(
    fn: Callable[..., object],
    *args: Any,
    rank: int = 0,
    handles: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
    output: int | None = None,
    preload: Collection[str] = LIBRARY,
) -> Forked:
    """`fn(*handles, *args)` in a process forked from one that has imported `preload`; it ends with status 0 or 1.

    `environment` is all of it, this process's if it is None; stdout and stderr go to the file descriptor `output`.
    """
    request = {
        "call": pickle.dumps((fn, args)),
        "main": _name_of_main(),
        "environment": dict(os.environ if environment is None else environment),
        "output": output is not None,
        "path": sys.path,
        "preload": list(preload),
    }
    for source in _sources:
        source.begin()
    return _sources[rank % len(_sources)].fork(request, [*([] if output is None else [output]), *handles])


def torchrun(
    module: str,
    *arguments: str,
    nproc: int,
    environment: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
    timeout: float = 300.0,
) -> subprocess.CompletedProcess[str]:
    """What `torchrun --standalone --nproc_per_node=nproc -m module arguments` comes to; stdout is all that ranks print.

    `environment` is added to this process's; PYTHONWARNINGS=error there makes warnings errors. Each rank calls `before`
    first.
    """
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    common |= {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc), "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
    common |= {"TORCHELASTIC_RUN_ID": "forked", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0"}
    common |= {"ROLE_NAME": "default", "ROLE_WORLD_SIZE": str(nproc)}
    names = ("RANK", "LOCAL_RANK", "ROLE_RANK")
    by_rank = [{**common, **dict.fromkeys(names, str(rank)), **(environment or {})} for rank in range(nproc)]
    return _run(module, arguments, by_rank, timeout, before)


def python(module: str, *arguments: str, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
    """What `python -m module arguments` comes to, in one process without a group."""
    return _run(module, arguments, [{}], timeout)


def _run(
    module: str,
    arguments: Sequence[str],
    by_rank: list[dict[str, str]],
    timeout: float,
    before: Callable[[], None] | None = None,
) -> subprocess.CompletedProcess[str]:
    """One process for each entry of `by_rank`, which is added to this process's environment."""
    with tempfile.TemporaryFile("w+") as output:
        ranks = []
        for rank, own in enumerate(by_rank):
            environment = {**os.environ, "OMP_NUM_THREADS": "1", **own}
            given = {"environment": environment, "output": output.fileno(), "preload": RECIPE}
            ranks.append(start(_run_module, module, arguments, before, rank=rank, **given))  # type: ignore[arg-type]
        code = _until_all_end(ranks, timeout)
        output.seek(0)
        return subprocess.CompletedProcess([module, *arguments], code, output.read(), "")


def _name_of_main() -> str:
    """Of the module that `python -m` runs here and whose functions may be asked for; none where that is pytest."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return "" if spec is None or spec.name.endswith("__main__") else str(spec.name)


def _until_all_end(ranks: list[Forked], timeout: float) -> int:
    """The status of the first that failed, or 0. The others are then told to leave, and killed if they do not."""
    deadline, code = time.monotonic() + timeout, 0
    while running := [rank for rank in ranks if rank.is_alive()]:
        if not code and (code := next((rank.exitcode for rank in ranks if rank.exitcode), 0)):
            deadline = min(deadline, time.monotonic() + LEAVE_S)
            for rank in running:
                rank.kill(signal.SIGTERM)
        if time.monotonic() > deadline:
            for rank in running:
                rank.kill()
            code = code or -signal.SIGKILL
        running[0].join(0.05)
    return code or next((rank.exitcode for rank in ranks if rank.exitcode), 0)


def _run_module(module: str, arguments: Sequence[str], before: Callable[[], None] | None) -> None:
    if before is not None:
        before()
    sys.argv = [module, *arguments]
    os.chdir(ROOT)
    if os.environ.get("PYTHONWARNINGS") == "error":
        warnings.simplefilter("error")
    sys.modules.pop(module, None)  # it runs as __main__
    runpy.run_module(module, run_name="__main__", alter_sys=True)


# ------------------------------------------------------------------------------------------- the process that forks


def _serve(connection: Connection) -> None:
    """Fork for each request; report what was started and what has ended."""
    noted, note = os.pipe()
    os.set_blocking(note, False)
    signal.set_wakeup_fd(note, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    running: set[int] = set()
    for name in LIBRARY:
        importlib.import_module(name)
    with selectors.DefaultSelector() as selector:
        selector.register(connection.fileno(), selectors.EVENT_READ)
        selector.register(noted, selectors.EVENT_READ)
        while True:
            ready = [key.fd for key, _ in selector.select()]
            if noted in ready:
                os.read(noted, 4096)
                for pid in list(running):
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if ended:
                        running.discard(pid)
                        connection.send(("ended", pid, os.waitstatus_to_exitcode(status)))
            if connection.fileno() in ready:
                try:
                    request = pickle.loads(connection.recv_bytes())
                except EOFError:
                    break
                handles = [recv_handle(connection) for _ in range(request["handles"])]
                for name in request["preload"]:
                    importlib.import_module(name)
                gc.freeze()  # so that no child's collections look through what all of them share
                if (pid := os.fork()) == 0:
                    selector.close()
                    connection.close()
                    _child(request, handles)
                running.add(pid)
                connection.send(("started", pid, 0))
                for handle in handles:
                    os.close(handle)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)  # as a worker of the pool leaves


def _child(request: dict[str, Any], handles: list[int]) -> NoReturn:
    """One call; ends the process without the interpreter's own farewell, which has nothing left to do."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 1
    try:
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.path[:] = request["path"]
        if request["output"]:
            for stream in (1, 2):
                os.dup2(handles[0], stream)
            os.close(handles.pop(0))
        if request["main"]:
            sys.modules["__main__"] = importlib.import_module(request["main"])
        fn, args = pickle.loads(request["call"])
        fn(*handles, *args)
        status = 0
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
