"""Environments: which are refused and why, and what one does to sys.path."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgflow_worker import environment
from pgflow_worker.environment import VERSION, activate, check, site_packages
from pgflow_worker.errors import EnvironmentRefused


@pytest.fixture(autouse=True)
def untouched_path() -> Iterator[None]:
    before, umask = list(sys.path), os.umask(0o022)
    yield
    activate(None)
    sys.path[:] = before
    os.umask(umask)


def make(path: Path, version: str = VERSION) -> Path:
    """A virtual environment with one package."""
    packages = path / "lib" / f"python{version}" / "site-packages"
    packages.mkdir(parents=True)
    (path / "pyvenv.cfg").write_text("home = /usr/bin\n")
    (path / "lib64").symlink_to("lib")
    (path / "bin").mkdir()
    (path / "bin" / "python").symlink_to(sys.executable)
    (packages / f"package_of_{path.name}").mkdir()
    (packages / f"package_of_{path.name}" / "__init__.py").write_text(f"name = {path.name!r}\n")
    return path


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    return make(tmp_path / "venv")


def packages_of(path: Path) -> str:
    return str(path / "lib" / f"python{VERSION}" / "site-packages")


def refused(path: Path | str) -> EnvironmentRefused:
    with pytest.raises(EnvironmentRefused) as caught:
        check(str(path))
    assert caught.value.sqlstate == "PW008"
    return caught.value


# What is an environment


def test_an_environment_of_this_python(venv: Path) -> None:
    assert str(site_packages(str(venv))) == packages_of(venv)
    check(str(venv))


@pytest.mark.parametrize("path", ["venv", "./venv", "~/venv", ""])
def test_a_relative_path(path: str) -> None:
    error = refused(path)
    assert str(error) == f'environment "{path}" is not an absolute path'
    assert error.hint == "Give the whole path."


def test_no_environment(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        error = refused(path)
        assert str(error) == f'"{path}" is not a virtual environment that the server can read'
        assert error.hint == (
            "Make one where the server's user may read, as root or as that user: "
            f"python{VERSION} -m venv {path}"
        )


def test_an_environment_of_another_python(tmp_path: Path) -> None:
    error = refused(make(tmp_path / "old", "3.1"))
    assert str(error) == (
        f'environment "{tmp_path}/old" is not for Python {VERSION}, which this server runs'
    )
    assert error.detail == "It has packages for: python3.1."
    assert error.hint == f"Make it again: python{VERSION} -m venv --clear {tmp_path}/old"


def test_an_environment_without_packages(tmp_path: Path) -> None:
    (tmp_path / "pyvenv.cfg").touch()
    assert refused(tmp_path).detail == "It has packages for: none."


# Who may change it

OPEN = "can be written by others, who could change what the server runs"


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
@pytest.mark.parametrize("name", [".", "lib", "bin", "lib/python{}/site-packages/package_of_venv"])
def test_a_directory_that_others_may_write_to(venv: Path, name: str, mode: int) -> None:
    path = venv / name.format(VERSION)
    path.chmod(mode)
    error = refused(venv)
    assert str(error) == f'"{path}" {OPEN}'
    assert error.hint == f"Take that away: chmod -R go-w {path}"
    path.chmod(0o755)
    check(str(venv))


@pytest.mark.parametrize(
    "name", ["pyvenv.cfg", "lib/python{}/site-packages/package_of_venv/__init__.py"]
)
def test_a_file_that_others_may_write_to(venv: Path, name: str) -> None:
    path = venv / name.format(VERSION)
    path.chmod(0o666)
    assert str(refused(venv)).startswith(f'"{path}" {OPEN}')


def test_a_directory_above_it_that_others_may_write_to(tmp_path: Path) -> None:
    venv = make(tmp_path / "open" / "venv")
    (tmp_path / "open").chmod(0o777)
    assert str(refused(venv)).startswith(f'"{tmp_path}/open" {OPEN}')


def test_in_a_sticky_directory_others_cannot_replace_it(tmp_path: Path) -> None:
    venv = make(tmp_path / "sticky" / "venv")
    (tmp_path / "sticky").chmod(0o1777)
    check(str(venv))


def test_inside_the_environment_sticky_does_not_help(venv: Path) -> None:
    (venv / "lib").chmod(0o1777)
    assert str(refused(venv)).startswith(f'"{venv}/lib" {OPEN}')


def test_a_file_of_another_user(venv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = venv / "pyvenv.cfg"
    lstat = Path.lstat
    stranger = os.geteuid() + 12345

    def as_if_chowned(self: Path) -> os.stat_result:
        status = lstat(self)
        if self != path:
            return status
        values = list(status)
        values[4] = stranger
        return os.stat_result(values)

    monkeypatch.setattr(Path, "lstat", as_if_chowned)
    error = refused(venv)
    assert str(error) == f'"{path}" belongs to another user, who could change what the server runs'
    assert error.hint == f"Give it to root: chown -R root {path}"


def test_roots_files_are_fine_for_any_server(venv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lstat = Path.lstat

    def as_if_roots(self: Path) -> os.stat_result:
        values = list(lstat(self))
        values[4] = 0
        return os.stat_result(values)

    monkeypatch.setattr(Path, "lstat", as_if_roots)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    check(str(venv))


@pytest.mark.parametrize("linked", ["site-packages", "package"])
def test_what_a_link_leads_to_must_be_as_safe(tmp_path: Path, venv: Path, linked: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    elsewhere.chmod(0o777)
    packages = Path(packages_of(venv))
    if linked == "site-packages":
        packages.rename(packages.with_name("moved"))
        packages.symlink_to(elsewhere)
    else:
        (packages / "package").symlink_to(elsewhere)
    assert str(refused(venv)).startswith(f'"{elsewhere}" {OPEN}')


def test_links_that_lead_in_circles_or_nowhere_are_no_obstacle(venv: Path) -> None:
    packages = Path(packages_of(venv))
    (packages / "circle").symlink_to(packages)
    (packages / "nowhere").symlink_to(packages / "missing")
    (packages / "itself").symlink_to("itself")
    check(str(venv))


def test_a_link_to_a_safe_place_is_fine(tmp_path: Path) -> None:
    venv = make(tmp_path / "venv")
    (tmp_path / "link").symlink_to(venv)
    check(str(tmp_path / "link"))


def test_a_directory_that_cannot_be_read(venv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As root can read everything, the system's answer is made up.
    scandir = os.scandir

    def refusing(path: str) -> object:
        if str(path) == f"{venv}/bin":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    error = refused(venv)
    assert str(error) == f'"{venv}/bin" cannot be read by the server: Permission denied'
    assert error.hint is not None
    assert "chmod -R a+rX" in error.hint


# sys.path


def test_packages_come_after_the_standard_library_and_before_the_systems(
    venv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = [
        "/x/pgflow_worker",
        "/x/lib/python",
        "/x/lib/python/dist-packages",
        "/y/site-packages/",
    ]
    monkeypatch.setattr(sys, "path", list(system))
    activate(str(venv))
    assert sys.path == [*system[:2], packages_of(venv), *system[2:]]
    activate(None)
    assert sys.path == system


def test_without_system_packages_they_come_last(
    venv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", ["/x/lib/python"])
    activate(str(venv))
    assert sys.path == ["/x/lib/python", packages_of(venv)]


def test_a_package_can_be_imported_until_the_environment_is_taken_away(venv: Path) -> None:
    before = list(sys.path)
    activate(str(venv))
    try:
        assert __import__("package_of_venv").name == "venv"
    finally:
        sys.modules.pop("package_of_venv", None)
    activate(None)
    assert sys.path == before
    with pytest.raises(ModuleNotFoundError):
        __import__("package_of_venv")


def test_another_environment_takes_its_place(tmp_path: Path) -> None:
    before = list(sys.path)
    one, two = make(tmp_path / "one"), make(tmp_path / "two")
    activate(str(one))
    activate(str(two))
    assert [entry for entry in sys.path if entry not in before] == [packages_of(two)]
    activate(str(two))
    assert [entry for entry in sys.path if entry not in before] == [packages_of(two)]


def test_pth_files_are_followed_and_forgotten(tmp_path: Path, venv: Path) -> None:
    before = list(sys.path)
    (tmp_path / "sources").mkdir()
    Path(packages_of(venv), "editable.pth").write_text(f"{tmp_path}/sources\n")
    activate(str(venv))
    assert [entry for entry in sys.path if entry not in before] == [
        packages_of(venv),
        f"{tmp_path}/sources",
    ]
    activate(None)
    assert sys.path == before


def test_a_path_that_is_no_environment_any_more_leaves_none_active(
    tmp_path: Path, venv: Path
) -> None:
    before = list(sys.path)
    activate(str(venv))
    with pytest.raises(EnvironmentRefused):
        activate(str(tmp_path / "missing"))
    assert sys.path == before


def test_the_version_is_that_of_the_interpreter() -> None:
    assert ".".join(map(str, sys.version_info[:2])) == environment.VERSION
