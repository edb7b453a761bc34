"""A checkpoint as a folder: written aside, summed file by file, marked complete last, put in place by one rename.

Decides which files a checkpoint has, when a folder counts as one, and which is the newest. Knows no tensor.

    step-00000100/                       the last digits of the name are the step, by which the newest is found
      __0_0.distcp, __1_0.distcp, ...    tensors, one file a rank, in torch.distributed.checkpoint's format
      .metadata                          for other readers of that format; distmuon never opens it, it is a pickle
      rank-00000.json, ...               which box of which tensor lies where in that rank's file
      rank-00000.pt, ...                 what differs by rank (RNG, data position); shared.pt: what does not
      manifest.json                      format, versions, what was trained; size and sha256 of every file above
      COMPLETE                           sha256 of manifest.json
    .step-00000120.<id>.saving/          a save under way, or one that was killed

[Note: what a kill leaves] Every file is on the disk before `manifest.json` names it, that is before `COMPLETE` sums it,
and only then the folder gets its name. So a folder with a name is whole, whatever moment the power failed; sums are
for disks and people who change bytes afterwards.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

from distmuon.errors import problem
from distmuon.manifest import INTACT, MANIFEST, MARKER, Manifest, check_files, check_size, read_manifest, write_file

_LOG = logging.getLogger("distmuon")


def reached(stage: str) -> None:
    """Called between the stages of a save; does nothing. Tests stop a save here."""


# ---------------------------------------------------------------------------------------------- writing


def aside_of(final: Path, number: str) -> Path:
    """The folder that a save of `final` is written into."""
    return final.with_name(f".{final.name}.{number}.saving")


def begin(final: Path, number: str) -> None:
    """Rank 0: make the folder aside. Raises where a complete checkpoint of that name exists already; anything else of
    that name is renamed, never deleted."""
    try:
        if final.exists():
            _make_way(final, number)
        for stale in final.parent.glob(f".{final.name}.*.saving"):
            _remove(stale)
        aside_of(final, number).mkdir(parents=True)
    except OSError as error:
        raise problem(
            str(final.parent), f"no folder can be made there ({error.strerror})",
            "the right to write is needed", INTACT,
        ) from error  # fmt: skip


def _make_way(final: Path, number: str) -> None:
    try:
        check_files(final, read_manifest(final))
    except ValueError as damaged:
        away = final.with_name(f"{final.name}.{number}.damaged")
        _LOG.warning("%s is renamed to %s: %s", final, away.name, damaged)
        os.rename(final, away)
    else:
        raise problem(
            str(final), "a complete checkpoint of this name exists", "a name of its own is needed",
            "name it by its step, or remove the old one",
        )  # fmt: skip


def check_shared(final: Path, number: str) -> None:
    """Other ranks: raise unless the folder of rank 0 is there."""
    if not aside_of(final, number).is_dir():
        raise problem(
            str(final.parent), "this rank does not see the folder that rank 0 made",
            "one file system of all ranks is needed", "save to a shared folder, given by the same path everywhere",
        )  # fmt: skip


def commit(final: Path, number: str, manifest: Manifest, keep_last: int | None) -> None:
    """Rank 0, once all files are on the disk: manifest, marker, rename; then `keep_last`."""
    aside = aside_of(final, number)
    text = json.dumps(asdict(manifest), indent=1).encode()
    reached("before manifest")
    summed = write_file(aside / MANIFEST, text)
    reached("before marker")
    write_file(aside / MARKER, summed.sha256.encode())
    _sync_folder(aside)
    reached("before rename")
    os.rename(aside, final)
    _sync_folder(final.parent)
    reached("after rename")
    if keep_last is not None:
        _retain(final, keep_last)


def abandon(final: Path, number: str) -> None:
    """Remove what a failed save left aside; quietly, for its own error is on the way."""
    shutil.rmtree(aside_of(final, number), ignore_errors=True)


def _retain(just_saved: Path, keep_last: int) -> None:
    """Keep `just_saved` and the newest complete others of its series, `keep_last` in all; tidy up after killed saves.

    A series has names that differ in their last digits only: two optimizers may save into one folder.
    """
    stem = just_saved.name.rstrip("0123456789")
    series = [path for path in steps_in(just_saved.parent) if path.name.rstrip("0123456789") == stem]
    complete = [path for path in series if path != just_saved and why_incomplete(path) is None]
    for old in complete[max(0, keep_last - 1) :]:
        _remove(old)
    left = re.compile(rf"\.{re.escape(stem)}\d*\.(.*\.)?(saving|deleted)")
    for stale in just_saved.parent.iterdir():
        if left.fullmatch(stale.name):
            shutil.rmtree(stale, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Never leaves a half-deleted folder under a good name."""
    doomed = folder.with_name(f".{folder.name.lstrip('.')}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    reached("while deleting")
    shutil.rmtree(doomed, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------- reading


def steps_in(folder: Path) -> list[Path]:
    """The folders in `folder` whose names end in a number, the highest first, complete or not."""
    numbered = [
        (int(match[1]), path.name, path)
        for path in folder.iterdir()
        if not path.name.startswith(".") and (match := re.search(r"(\d+)$", path.name)) and path.is_dir()
    ]
    return [path for _, _, path in sorted(numbered, reverse=True)]


def candidates(root: Path) -> tuple[list[Path], list[Path]]:
    """What may be loaded from `root`: itself, or the folders in it, the newest first; and what killed saves left."""
    if not root.is_dir() or any((root / name).exists() for name in (MANIFEST, MARKER, ".metadata")):
        return ([root] if root.exists() else []), []
    return steps_in(root), sorted(root.glob(".*.saving"))


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
    be. The newest is the one whose name ends in the highest number.
    """
    root = Path(folder)
    for path in steps_in(root) if root.is_dir() else []:
        reason = why_incomplete(path)
        if reason is None:
            return path
        log_skipped(reason)
    return None
