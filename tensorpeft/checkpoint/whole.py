"""A file that is replaced as a whole: whoever reads it meets the old one or the new one, whenever its writer dies."""

from __future__ import annotations

import os
from contextlib import suppress
from glob import escape
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file, or make it. It keeps its permissions; an error leaves the one that was there.

    It is written as a draft beside it, locked meanwhile. The draft of a writer that was killed is locked by nobody: the next
    writer removes it.

    Raises:
        OSError: the file cannot be written.
    """
    for left in path.parent.glob(f".{escape(path.name)}.{'[0-9a-f]' * 16}"):
        _remove_unlocked(left)
    while not _replaced(path, content):
        pass
    _sync(path.parent)


def _replaced(path: Path, content: bytes) -> bool:
    """Try to replace it; False if another writer took the draft for an abandoned one, between its making and its lock."""
    draft = path.with_name(f".{path.name}.{token_hex(8)}")
    try:
        with draft.open("xb") as file:
            with suppress(OSError):  # a drive without locks, from which no draft is removed either
                _lock(file)
            if path.exists():
                draft.chmod(path.stat().st_mode & 0o7777)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            draft.replace(path)
            return True
        return False
    finally:
        draft.unlink(missing_ok=True)


def _remove_unlocked(draft: Path) -> None:
    with suppress(OSError), draft.open("rb") as file:
        _lock(file)
        draft.unlink()


def _lock(file: BinaryIO) -> None:
    """Lock a file until it is closed; an OSError where another has done so. Windows removes no open file: no need to ask."""
    if os.name == "posix":
        import fcntl

        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sync(folder: Path) -> None:
    """Put a folder on disk too, else a loss of power may take the new name away; where system and drive know how."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
