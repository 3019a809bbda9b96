"""What the server may trust of the file system: what only root and its own user can change."""

from __future__ import annotations

import os
import stat


def belongs_to_others(status: os.stat_result) -> bool:
    """Whether another user than root and the server's own owns it."""
    return status.st_uid not in (0, os.geteuid())


def others_may_write(status: os.stat_result, *, is_parent: bool = False) -> bool:
    """Whether its mode lets others write to it; for a parent, replace what is in it."""
    # In a sticky directory such as /tmp others cannot replace what is not theirs.
    sticky = is_parent and status.st_mode & stat.S_ISVTX
    return bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)) and not sticky


def distrust(
    path: object, status: os.stat_result, *, is_parent: bool, recursively: bool = False
) -> tuple[str, str] | None:
    """How others could change a directory, and a sentence with the command that ends it.

    is_parent: of what is to be trusted. recursively: whether the command is for all that is in it.
    """
    option = "-R " if recursively else ""
    if belongs_to_others(status):
        return (
            f'"{path}" belongs to another user',
            f"Give it to root: chown {option}root {quoted(path)}",
        )
    if others_may_write(status, is_parent=is_parent):
        return (
            f'"{path}" can be written by others',
            f"Take that away: chmod {option}go-w {quoted(path)}",
        )
    return None


def quoted(path: object) -> str:
    """A path for a shell's command line."""
    import shlex

    return shlex.quote(str(path))
