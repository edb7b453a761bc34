"""A checkpoint as a folder: written to a staging folder, summed file by file, marked complete, renamed last.

This module decides which files a checkpoint has, when a folder counts as a checkpoint, and which is the newest. It
knows no tensor.

    step-00000100/                       the last digits of the name are the step, by which the newest is found
      __0_0.distcp, __1_0.distcp, ...    tensors, one file a rank, in torch.distributed.checkpoint's format
      .metadata                          for other readers of that format; distmuon never opens it, it is a pickle
      rank-00000.json, ...               which box of which tensor lies where in that rank's file
      rank-00000.pt, ...                 small state that differs by rank (RNG, data position)
      shared.pt                          small state that does not
      manifest.json                      format, versions, trained parameters; size and sha256 of every file above
      COMPLETE                           sha256 of manifest.json
    .step-00000120.<id>.saving/          staging folder of a save under way, or a killed save; WRITER names its process

[Note: after a kill] Every file is synced to the disk before `manifest.json` lists it, `manifest.json` before `COMPLETE`
holds its sum, and the folder gets its final name only after that. So a folder with a final name is complete, at
whatever moment the power failed; the sums detect later changes.

[Note: stale saves] Several optimizers and several runs may save into one folder. A staging folder is therefore removed
only if its name belongs to the series that is tidied up, and if no process writes it any more: the process that WRITER
names has ended, or, if it ran on another machine, nothing in the folder has changed for `UNTOUCHED_S` by the file
system's clock.

[Note: looking again] A reader lists the folder first and opens the checkpoints later. Meanwhile a run with `keep_last`
may have added a newer checkpoint and removed all those listed; and a listing that overlaps with both renames may show
neither. So a checkpoint that has gone proves nothing: the reader looks again, and answers "nothing" only after several
equal looks in a row.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from distmuon.checkpoint.manifest import (
    INTACT,
    MANIFEST,
    MARKER,
    Manifest,
    check_files,
    check_size,
    naming,
    read_manifest,
    reason_of,
    write_file,
)
from distmuon.errors import problem

WRITER = "WRITER"
UNTOUCHED_S = 3600.0  # twice as long as a save waits for its ranks
LOOKS = 3  # so many equal looks in a row are an answer
LOOK_S = 0.02  # time between looks
MOST_LOOKS = 1000  # limit for a folder that changes all the time and never holds a complete checkpoint

_LOG = logging.getLogger("distmuon")
_STAGING = re.compile(r"\.(?P<final>.+)\.[0-9a-f]{8}\.saving(\.begun|\.deleted)?", re.DOTALL)
_DELETED = re.compile(r"\.(?P<final>.+)\.deleted", re.DOTALL)
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}


def fault_point(stage: str) -> None:
    """Do nothing; called between the stages of a save, so that tests can stop a save there."""


# ---------------------------------------------------------------------------------------------- writing


def staging_folder(final: Path, save_id: str) -> Path:
    """The folder that a save of `final` is written to; `save_id` has 8 hexadecimal digits."""
    return final.with_name(f".{final.name}.{save_id}.saving")


def begin(final: Path, save_id: str) -> None:
    """Make the staging folder, on rank 0. Raises if `final` is a complete checkpoint; any other `final` is renamed."""
    staging = staging_folder(final, save_id)
    try:
        if os.path.lexists(final):
            _make_way(final, save_id)
        begun = staging.with_name(f"{staging.name}.begun")  # a staging folder never appears without WRITER
        begun.mkdir(parents=True)
        write_file(begun / WRITER, json.dumps(_this_process()).encode())
        os.rename(begun, staging)
    except OSError as error:
        raise problem(
            str(final.parent),
            found=f"no folder can be made there ({reason_of(error)})",
            needed="permission to write is needed",
            cure=INTACT,
        ) from error
    with suppress(OSError, ValueError):  # the folder may be writable but not readable
        for stale in _stale_in(final.parent, lambda name: name == final.name, (staging / WRITER).stat().st_mtime):
            _remove(stale)


def _make_way(final: Path, save_id: str) -> None:
    try:
        check_files(final, read_manifest(final))
    except ValueError as damaged:
        away = final.with_name(f"{final.name}.{save_id}.damaged")
        _LOG.warning("%s is renamed to %s: %s", final, away.name, damaged)
        with naming(final, "renamed"):
            os.rename(final, away)
    else:
        raise problem(
            str(final),
            found="a complete checkpoint of this name exists",
            needed="a new name is needed",
            cure="name the checkpoint by its step, or remove the old one",
        )


def check_shared(final: Path, save_id: str) -> None:
    """Raise, on ranks other than 0, unless rank 0's folder is visible."""
    if not staging_folder(final, save_id).is_dir():
        raise problem(
            str(final.parent),
            found="this rank does not see the folder that rank 0 made",
            needed="all ranks must see the same file system",
            cure="save to a shared folder, given by the same path everywhere",
        )


def commit(final: Path, save_id: str, manifest: Manifest, keep_last: int | None) -> None:
    """Complete a save, on rank 0, once all files are on the disk: manifest, marker, rename; then apply `keep_last`.

    Errors up to the rename are raised. After it the checkpoint is complete, and errors are only logged.
    """
    staging = staging_folder(final, save_id)
    text = json.dumps(asdict(manifest), indent=1).encode()
    fault_point("before manifest")
    summed = write_file(staging / MANIFEST, text)
    fault_point("before marker")
    write_file(staging / MARKER, summed.sha256.encode())
    _sync_folder(staging)
    fault_point("before rename")
    with naming(final, "put in place"):
        os.rename(staging, final)
    with suppress(OSError):  # not before: a staging folder without it would seem to be written for an hour after a kill
        (final / WRITER).unlink()
    try:
        _sync_folder(final.parent)
    except ValueError as error:
        _LOG.warning("%s is complete, but a power failure now may lose it: %s", final, error)
    fault_point("after rename")
    if keep_last is not None:
        try:
            _retain(final, keep_last)
        except (OSError, ValueError) as error:
            _LOG.warning("%s is complete, but older checkpoints could not be examined: %s", final, error)


def abandon(final: Path, save_id: str) -> None:
    """Remove the staging folder of a failed save, without errors: the save's error is being raised."""
    staging = staging_folder(final, save_id)
    for folder in (staging, staging.with_name(f"{staging.name}.begun")):
        shutil.rmtree(folder, ignore_errors=True)


def series_of(name: str) -> str:
    """The series of a checkpoint: its name without the last digits. Two optimizers may save into one folder."""
    return name.rstrip("0123456789")


def _retain(just_saved: Path, keep_last: int) -> None:
    """Keep `just_saved` and the newest complete checkpoints of its series, `keep_last` in all; remove stale saves.

    See [Note: stale saves].
    """
    series = [path for path in steps_in(just_saved.parent) if series_of(path.name) == series_of(just_saved.name)]
    complete = [path for path in series if path != just_saved and why_incomplete(path) is None]
    for old in complete[max(0, keep_last - 1) :]:
        _remove(old)
    now = (just_saved / MARKER).stat().st_mtime
    for stale in _stale_in(just_saved.parent, lambda name: series_of(name) == series_of(just_saved.name), now):
        _remove(stale)


def _remove(folder: Path) -> None:
    """Remove a folder, which is renamed first so that no half-deleted folder has a good name; log a failure."""
    doomed = folder
    if not folder.name.endswith(".deleted"):
        doomed = folder.with_name(f".{folder.name.removeprefix('.')}.deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        try:
            os.rename(folder, doomed)
        except FileNotFoundError:
            return  # another run has removed it
        except OSError as error:
            _LOG.warning("%s could not be removed (%s) and stays", folder, reason_of(error))
            return
    fault_point("while deleting")
    shutil.rmtree(doomed, ignore_errors=True)
    if os.path.lexists(doomed):
        _LOG.warning("%s could not be removed completely; the next save tries again", doomed)


def _sync_folder(folder: Path) -> None:
    """Sync the names in `folder` to the disk, on file systems that can."""
    with naming(folder, "synced to the disk"):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in _NO_FOLDER_SYNC:
                raise
        finally:
            os.close(handle)


# ------------------------------------------------------------------------------------ saves of other runs


def _this_process() -> dict[str, object]:
    return {"machine": _machine(), "pid": os.getpid(), "started": _start_time(os.getpid())}


def _machine() -> list[str]:
    """Identity of the machine, its boot, and the namespace of process numbers (containers have their own)."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return parts


def _start_time(pid: int) -> str | None:
    """Start time of a process of this machine, in its kernel's units; "" if unknown, None if it has ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:  # the process exists, but belongs to another user
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return None if fields[0] in "ZX" else fields[19]


def _final_of(path: Path) -> str | None:
    """The checkpoint name that a staging folder would have got, or that a half-deleted folder had; None: neither."""
    match = _STAGING.fullmatch(path.name) or _DELETED.fullmatch(path.name)
    return match["final"] if match else None


def _stale_in(folder: Path, belongs: Callable[[str], bool], now: float) -> list[Path]:
    """Folders left by killed saves and removals whose final name `belongs`; `now` is by the file system's clock.

    See [Note: stale saves].
    """
    found = [path for path in _listed(folder) if (final := _final_of(path)) is not None and belongs(final)]
    return [path for path in found if path.name.endswith(".deleted") or not _is_written(path, now)]


def _is_written(staging: Path, now: float) -> bool:
    """Whether a process still writes this folder, as far as this process can tell."""
    try:
        writer = json.loads((staging / WRITER).read_bytes())
        machine = writer["machine"]
        pid = int(writer["pid"])
        started = writer["started"]
    except (OSError, ValueError, KeyError, TypeError):  # of an older version, or damaged
        machine = started = None
        pid = 0
    if machine == _machine() and pid > 0:
        return bool(_start_time(pid) == started)
    try:
        inside = list(staging.iterdir())
        if not inside and staging.name.endswith(".saving"):
            return False
        return now - max(path.stat().st_mtime for path in (staging, *inside)) < UNTOUCHED_S
    except OSError:
        return True


# ---------------------------------------------------------------------------------------------- reading


def _listed(folder: Path) -> list[Path]:
    """The entries of `folder`, none if it does not exist. Raises `ValueError` naming it if it cannot be listed."""
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise problem(
            str(folder),
            found=f"it cannot be listed ({reason_of(error)})",
            needed="a folder of checkpoints is needed",
            cure="check its permissions and its file system",
        ) from error


def steps_in(folder: Path) -> list[Path]:
    """The folders in `folder` whose names end in a number, highest first, complete or not."""
    numbered = [
        (int(match[1]), path.name, path)
        for path in _listed(folder)
        if not path.name.startswith(".") and (match := re.search(r"([0-9]+)$", path.name)) and os.path.isdir(path)
    ]
    return [path for _, _, path in sorted(numbered, reverse=True)]


def is_checkpoint(root: Path) -> bool:
    """Whether `root` is a checkpoint (or a file), and not a folder of checkpoints."""
    return os.path.isfile(root) or any(os.path.lexists(root / name) for name in (MANIFEST, MARKER, ".metadata"))


def unfinished_in(root: Path) -> list[Path]:
    """The staging folders of saves that are under way or were killed."""
    return sorted(path for path in _listed(root) if path.name.startswith(".") and path.name.endswith(".saving"))


class NewestSearch:
    """Search for the newest complete checkpoint in a folder that other runs change; see [Note: looking again].

    In each look the caller lists `candidates`, tries them in order, and asks `again` if one has gone or none is good.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._before: list[Path] | None = None
        self._equal = self._looks = 0

    def candidates(self) -> list[Path]:
        """The folders to try, newest first."""
        listed = steps_in(self._root)
        self._equal = self._equal + 1 if listed == self._before else 1
        self._before = listed
        return listed

    def again(self, gone: bool = False) -> bool:
        """Whether to look again, because a candidate has `gone` or because the last looks were not all equal."""
        self._looks += 1
        if gone:
            self._equal = 0
        if self._equal >= LOOKS or self._looks >= MOST_LOOKS:
            return False
        if not gone:
            time.sleep(LOOK_S)
        return True


def log_skipped(reason: object) -> None:
    """Warn about a skipped checkpoint: resuming from an older step must not go unnoticed."""
    _LOG.warning("checkpoint skipped: %s", reason)


def why_incomplete(path: Path) -> str | None:
    """The fault of a checkpoint's marker, manifest or file sizes; None if there is no fault. Reads no data."""
    try:
        manifest = read_manifest(path)
        for name in manifest.files:
            check_size(path, manifest, name)
    except ValueError as error:
        return str(error)
    return None


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint in `folder`, or None; skipped checkpoints are logged with the reason.

    Only marker, manifest and sizes are checked; `load_checkpoint(folder)` also compares the sums, and goes back further
    if needed. The newest is the checkpoint whose name ends in the highest number. Other runs may save and remove
    checkpoints meanwhile, so None takes several looks (0.04 s). Raises `ValueError` if `folder` cannot be listed.
    """
    search = NewestSearch(Path(folder))
    while True:
        skipped = list[str]()
        newest, gone = None, False
        for path in search.candidates():
            reason = why_incomplete(path)
            if reason is None:
                newest = path
                break
            if gone := not path.exists():
                break
            skipped.append(reason)
        if newest is not None or not search.again(gone):
            for reason in skipped:
                log_skipped(reason)
            return newest
