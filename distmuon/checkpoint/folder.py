"""A checkpoint as a folder: written aside, summed file by file, marked complete last, put in place by one rename.

Decides which files a checkpoint has, when a folder counts as one, and which is the newest. Knows no tensor.

    step-00000100/                       the last digits of the name are the step, by which the newest is found
      __0_0.distcp, __1_0.distcp, ...    tensors, one file a rank, in torch.distributed.checkpoint's format
      .metadata                          for other readers of that format; distmuon never opens it, it is a pickle
      rank-00000.json, ...               which box of which tensor lies where in that rank's file
      rank-00000.pt, ...                 what differs by rank (RNG, data position); shared.pt: what does not
      manifest.json                      format, versions, what was trained; size and sha256 of every file above
      COMPLETE                           sha256 of manifest.json
    .step-00000120.<id>.saving/          a save under way, or one that was killed; WRITER says whose it is

[Note: what a kill leaves] Every file is on the disk before `manifest.json` names it, that is before `COMPLETE` sums it,
and only then the folder gets its name. So a folder with a name is whole, whatever moment the power failed; sums are
for disks and people who change bytes afterwards.

[Note: whose save is it] Several optimizers and several runs may save into one folder. A folder aside is therefore
removed only if its own name says that it belongs to the series that is tidied, and if nobody writes it any more: the
process that WRITER names has ended, or, where it ran on another machine, nothing in the folder has changed for
`UNTOUCHED_S`, by the file system's own clock.

[Note: looking again] A reader lists the folder first and opens what it found later. Meanwhile a run with `keep_last`
may have put a newer checkpoint there and taken away all that was listed; and a listing that overlaps with both renames
may show neither. So what has gone is no finding: the reader looks again, and answers "nothing" only once several looks
in a row saw the same.
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
LOOKS, LOOK_S = 3, 0.02  # so many equal looks, so far apart, are an answer
MOST_LOOKS = 1000  # at a folder that changes all the time and never holds a complete checkpoint

_LOG = logging.getLogger("distmuon")
_ASIDE = re.compile(r"\.(?P<final>.+)\.[0-9a-f]{8}\.saving(\.begun|\.deleted)?", re.DOTALL)
_DELETED = re.compile(r"\.(?P<final>.+)\.deleted", re.DOTALL)
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}


def fault_point(stage: str) -> None:
    """Called between the stages of a save; does nothing. Tests stop a save here."""


# ---------------------------------------------------------------------------------------------- writing


def aside_of(final: Path, save_id: str) -> Path:
    """The folder that a save of `final` is written into; `save_id`: 8 hexadecimal digits."""
    return final.with_name(f".{final.name}.{save_id}.saving")


def begin(final: Path, save_id: str) -> None:
    """Rank 0: make the folder aside. Raises where a complete checkpoint of that name exists already; anything else of
    that name is renamed, never deleted."""
    aside = aside_of(final, save_id)
    try:
        if os.path.lexists(final):
            _make_way(final, save_id)
        begun = aside.with_name(f"{aside.name}.begun")  # no folder aside is ever seen without its writer
        begun.mkdir(parents=True)
        write_file(begun / WRITER, json.dumps(_this_process()).encode())
        os.rename(begun, aside)
    except OSError as error:
        raise problem(
            str(final.parent),
            found=f"no folder can be made there ({reason_of(error)})",
            needed="the right to write is needed",
            cure=INTACT,
        ) from error
    with suppress(OSError, ValueError):  # a folder that may be written but not listed
        for stale in _stale_in(final.parent, lambda name: name == final.name, (aside / WRITER).stat().st_mtime):
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
            needed="a name of its own is needed",
            cure="name it by its step, or remove the old one",
        )


def check_shared(final: Path, save_id: str) -> None:
    """Other ranks: raise unless the folder of rank 0 is there."""
    if not aside_of(final, save_id).is_dir():
        raise problem(
            str(final.parent),
            found="this rank does not see the folder that rank 0 made",
            needed="one file system of all ranks is needed",
            cure="save to a shared folder, given by the same path everywhere",
        )


def commit(final: Path, save_id: str, manifest: Manifest, keep_last: int | None) -> None:
    """Rank 0, once all files are on the disk: manifest, marker, rename; then `keep_last`.

    Up to the rename whatever fails is raised. After it the checkpoint is complete, and what fails is logged.
    """
    aside = aside_of(final, save_id)
    text = json.dumps(asdict(manifest), indent=1).encode()
    fault_point("before manifest")
    summed = write_file(aside / MANIFEST, text)
    fault_point("before marker")
    write_file(aside / MARKER, summed.sha256.encode())
    (aside / WRITER).unlink(missing_ok=True)
    _sync_folder(aside)
    fault_point("before rename")
    with naming(final, "put in place"):
        os.rename(aside, final)
    try:
        _sync_folder(final.parent)
    except ValueError as error:
        _LOG.warning("%s is complete, but a power failure now may lose it: %s", final, error)
    fault_point("after rename")
    if keep_last is not None:
        try:
            _retain(final, keep_last)
        except (OSError, ValueError) as error:
            _LOG.warning("%s is complete, but older ones could not be looked through: %s", final, error)


def abandon(final: Path, save_id: str) -> None:
    """Remove what a failed save left aside; quietly, for its own error is on the way."""
    aside = aside_of(final, save_id)
    for folder in (aside, aside.with_name(f"{aside.name}.begun")):
        shutil.rmtree(folder, ignore_errors=True)


def series_of(name: str) -> str:
    """A series has names that differ in their last digits only: two optimizers may save into one folder."""
    return name.rstrip("0123456789")


def _retain(just_saved: Path, keep_last: int) -> None:
    """Keep `just_saved` and the newest complete others of its series, `keep_last` in all; tidy up after killed saves.

    See [Note: whose save is it].
    """
    series = [path for path in steps_in(just_saved.parent) if series_of(path.name) == series_of(just_saved.name)]
    complete = [path for path in series if path != just_saved and why_incomplete(path) is None]
    for old in complete[max(0, keep_last - 1) :]:
        _remove(old)
    ours, now = series_of(just_saved.name), (just_saved / MARKER).stat().st_mtime
    for stale in _stale_in(just_saved.parent, lambda name: series_of(name) == ours, now):
        _remove(stale)


def _remove(folder: Path) -> None:
    """Never leaves a half-deleted folder under a good name. What cannot be removed stays, and is logged."""
    doomed = folder
    if not folder.name.endswith(".deleted"):
        doomed = folder.with_name(f".{folder.name.removeprefix('.')}.deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        try:
            os.rename(folder, doomed)
        except FileNotFoundError:
            return  # another run was faster
        except OSError as error:
            _LOG.warning("%s could not be removed (%s) and stays", folder, reason_of(error))
            return
    fault_point("while deleting")
    shutil.rmtree(doomed, ignore_errors=True)
    if os.path.lexists(doomed):
        _LOG.warning("%s could not be removed wholly; the next save tries again", doomed)


def _sync_folder(folder: Path) -> None:
    """Bring the names in `folder` to the disk, on file systems that can."""
    with naming(folder, "brought to the disk"):
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
    return {"machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}


def _machine() -> list[str]:
    """What tells machines, their boots, and containers with process numbers of their own apart."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return parts


def _started(pid: int) -> str | None:
    """When a process of this machine began, as its kernel counts; "" where that is not told, None if it has ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:  # somebody else's
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return None if fields[0] in "ZX" else fields[19]


def _final_of(path: Path) -> str | None:
    """The name of the checkpoint that a folder aside was to become, or that a half-deleted one was."""
    match = _ASIDE.fullmatch(path.name) or _DELETED.fullmatch(path.name)
    return match["final"] if match else None


def _stale_in(folder: Path, is_ours: Callable[[str], bool], now: float) -> list[Path]:
    """What killed saves and removals of the names that are ours left; see [Note: whose save is it].

    `now`: by the clock of the file system.
    """
    found = [path for path in _listed(folder) if (final := _final_of(path)) is not None and is_ours(final)]
    return [path for path in found if path.name.endswith(".deleted") or not _is_written(path, now)]


def _is_written(aside: Path, now: float) -> bool:
    """Whether somebody still writes this folder, as far as can be told from here."""
    try:
        writer = json.loads((aside / WRITER).read_bytes())
        machine, pid, started = writer["machine"], int(writer["pid"]), writer["started"]
    except (OSError, ValueError, KeyError, TypeError):
        machine, pid, started = None, 0, None  # about to be renamed, or of an older version
    if machine == _machine() and pid > 0:
        return bool(_started(pid) == started)
    try:
        inside = list(aside.iterdir())
        if not inside and aside.name.endswith(".saving"):
            return False
        return now - max(path.stat().st_mtime for path in (aside, *inside)) < UNTOUCHED_S
    except OSError:
        return True


# ---------------------------------------------------------------------------------------------- reading


def _listed(folder: Path) -> list[Path]:
    """What is in `folder`; nothing where there is none. Raises `ValueError` naming it where that cannot be known."""
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise problem(
            str(folder),
            found=f"it cannot be listed ({reason_of(error)})",
            needed="a folder of checkpoints is needed",
            cure="see to its rights and its file system",
        ) from error


def steps_in(folder: Path) -> list[Path]:
    """The folders in `folder` whose names end in a number, the highest first, complete or not."""
    numbered = [
        (int(match[1]), path.name, path)
        for path in _listed(folder)
        if not path.name.startswith(".") and (match := re.search(r"([0-9]+)$", path.name)) and os.path.isdir(path)
    ]
    return [path for _, _, path in sorted(numbered, reverse=True)]


def is_checkpoint(root: Path) -> bool:
    """Whether `root` is itself what is to be loaded, and not a folder of checkpoints."""
    return os.path.isfile(root) or any(os.path.lexists(root / name) for name in (MANIFEST, MARKER, ".metadata"))


def unfinished_in(root: Path) -> list[Path]:
    """What saves that are under way, or were killed, have left."""
    return sorted(path for path in _listed(root) if path.name.startswith(".") and path.name.endswith(".saving"))


class Looking:
    """Looks for the newest complete checkpoint in a folder that others change; see [Note: looking again].

    Each turn lists `candidates`, tries one after another, and asks `again` after each that failed and at the end.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._before: list[Path] | None = None
        self._equal = self._looks = 0

    def candidates(self) -> list[Path]:
        """The newest first."""
        listed = steps_in(self._root)
        self._equal = self._equal + 1 if listed == self._before else 1
        self._before = listed
        return listed

    def again(self, gone: bool = False) -> bool:
        """Whether to start anew, because a candidate has `gone` or because the last looks were not all equal."""
        self._looks += 1
        if gone:
            self._equal = 0
        if self._equal >= LOOKS or self._looks >= MOST_LOOKS:
            return False
        if not gone:
            time.sleep(LOOK_S)
        return True


def log_skipped(reason: object) -> None:
    """Where everybody can see it: resuming from an older step must not go unnoticed."""
    _LOG.warning("checkpoint skipped: %s", reason)


def why_incomplete(path: Path) -> str | None:
    """None for a checkpoint whose marker, manifest and file sizes are right; else what is wrong. Reads no data."""
    try:
        manifest = read_manifest(path)
        for name in manifest.files:
            check_size(path, manifest, name)
    except ValueError as error:
        return str(error)
    return None


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint in `folder`, None if there is none; what is skipped is logged with the reason.

    Looks at marker, manifest and sizes; `load_checkpoint(folder)` also compares the sums and goes back further if need
    be. The newest is the one whose name ends in the highest number. Others may save, and remove, meanwhile: None takes
    a few looks (0.04 s) that all saw nothing. Raises `ValueError` for a folder that cannot be listed.
    """
    looking = Looking(Path(folder))
    while True:
        skipped = list[str]()
        newest, gone = None, False
        for path in looking.candidates():
            reason = why_incomplete(path)
            if reason is None:
                newest = path
                break
            if gone := not path.exists():
                break
            skipped.append(reason)
        if newest is not None or not looking.again(gone):
            for reason in skipped:
                log_skipped(reason)
            return newest
