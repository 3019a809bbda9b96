"""Third-party packages from a virtual environment of the server's Python."""

from __future__ import annotations

import os
import site
import sys
from pathlib import Path

from pgflow_worker.errors import EnvironmentRefused
from pgflow_worker.files import distrust, quoted

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


def site_packages(path: str) -> Path:
    """The directory of a virtual environment that holds its packages.

    Raises EnvironmentRefused if it is none of this Python's.
    """
    if not os.path.isabs(path):
        raise EnvironmentRefused(
            f'environment "{path}" is not an absolute path', hint="Give the whole path."
        )
    # os.path, because it takes what cannot be read for missing where Path raises an error.
    if not os.path.isfile(os.path.join(path, "pyvenv.cfg")):
        raise EnvironmentRefused(
            f'"{path}" is not a virtual environment that the server can read',
            hint="Make one where the server's user may read, as root or as that user: "
            f"python{VERSION} -m venv {quoted(path)}",
        )
    directory = Path(path, "lib", f"python{VERSION}", "site-packages")
    if not directory.is_dir():
        found = ", ".join(sorted(p.name for p in Path(path, "lib").glob("python*"))) or "none"
        raise EnvironmentRefused(
            f'environment "{path}" is not for Python {VERSION}, which this server runs',
            detail=f"It has packages for: {found}.",
            hint=f"Make it again: python{VERSION} -m venv --clear {quoted(path)}",
        )
    return directory


def check(path: str) -> None:
    """Refuse an environment that is not this Python's or that others may change.

    Its code runs as the operating system's user of the server. Only root and that user may be
    able to write to it, to any file in it, and to the directories above it.
    """
    packages = site_packages(path)
    _check_tree(Path(path))
    # Links are followed where packages are imported from; the programs in bin never run here.
    pending = [packages, *_named_in_pth_files(packages)]
    seen: set[Path] = set()
    for root in pending:
        try:
            real = root.resolve(strict=True)
        except (OSError, RuntimeError):  # a link that leads nowhere or to itself
            continue
        if real not in seen:
            seen.add(real)
            pending += _check_tree(real)


def activate(path: str | None) -> None:
    """Make the environment's packages importable in this process, and no other environment's.

    They come after the standard library and before the system's packages.
    """
    sys.path[:] = [entry for entry in sys.path if entry not in _active]
    _active.clear()
    if path is None:
        return
    directory = site_packages(path)
    before = list(sys.path)
    site.addsitedir(str(directory))
    _active.extend(entry for entry in sys.path if entry not in before)
    first_other = next(
        (i for i, entry in enumerate(before) if entry.endswith(("-packages", "-packages/"))),
        len(before),
    )
    sys.path[:] = [*before[:first_other], *_active, *before[first_other:]]


_active: list[str] = []


def _check_tree(root: Path) -> list[Path]:
    """Check a file or directory, what is in it and what is above it; the links in it."""
    real = root.resolve()
    for parent in real.parents:
        _check_writers(parent, is_parent=True)
    _check_writers(real)
    links = []
    for folder, folders, files in os.walk(real, onerror=_raise) if real.is_dir() else ():
        for entry in (Path(folder, name) for name in (*folders, *files)):
            if entry.is_symlink():
                links.append(entry)
            else:
                _check_writers(entry)
    return links


def _named_in_pth_files(packages: Path) -> list[Path]:
    """The directories that the environment adds to Python's path, as editable installs do."""
    lines = [
        line.strip()
        for file in sorted(packages.glob("*.pth"))
        for line in file.read_text(errors="replace").splitlines()
    ]
    return [packages / line for line in lines if line and (packages / line).exists()]


def _check_writers(path: Path, *, is_parent: bool = False) -> None:
    found = distrust(path, path.lstat(), is_parent=is_parent, recursively=True)
    if found is not None:
        problem, hint = found
        raise EnvironmentRefused(f"{problem}, who could change what the server runs", hint=hint)


def _raise(error: OSError) -> None:
    raise EnvironmentRefused(
        f'"{error.filename}" cannot be read by the server: {error.strerror}',
        hint=f"Let the server's user read the environment: chmod -R a+rX {quoted(error.filename)}",
    )
