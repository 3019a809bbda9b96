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
