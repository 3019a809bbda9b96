"""What `make` and pip install, and that they take it away again."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pytest_postgresql.executors import PostgreSQLExecutor

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "plpy_src/pgflow_worker"


def make(*arguments: str, **environment: str) -> str:
    run = subprocess.run(
        ["make", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if run.returncode:
        pytest.fail(f"make {' '.join(arguments)} failed:\n{run.stdout}")
    return run.stdout


def files(directory: Path) -> set[str]:
    return {str(f.relative_to(directory)) for f in directory.rglob("*") if f.is_file()}


def test_install_puts_the_package_under_its_version_and_uninstall_removes_it(
    tmp_path: Path,
) -> None:
    unrelated = tmp_path / "unrelated"
    unrelated.touch()
    make("install", f"DESTDIR={tmp_path}")

    [control] = tmp_path.rglob("pgflow_worker.control")
    sharedir = control.parent.parent
    [version] = (sharedir / "pgflow_worker").iterdir()
    assert f"default_version = '{version.name}'" in control.read_text()
    assert (control.parent / f"pgflow_worker--{version.name}.sql").is_file()

    installed = files(version / "pgflow_worker")
    sources = {name for name in files(PACKAGE) if name.endswith(".py") or name == "py.typed"}
    assert {name for name in installed if not name.endswith(".pyc")} == sources
    assert any(name.endswith(".pyc") for name in installed)

    make("uninstall", f"DESTDIR={tmp_path}")
    assert files(tmp_path) == {"unrelated"}


def test_a_second_install_leaves_no_file_of_the_first(
    tmp_path: Path,
) -> None:
    make("install", f"DESTDIR={tmp_path}")
    before = files(tmp_path)
    [package] = tmp_path.glob("**/pgflow_worker/*/pgflow_worker")
    (package / "renamed_since.py").touch()
    make("install", f"DESTDIR={tmp_path}")
    assert files(tmp_path) == before


def test_installcheck(server: PostgreSQLExecutor) -> None:
    differences = ROOT / "tests/regress/regression.diffs"
    try:
        make("installcheck", PGHOST=server.host, PGPORT=str(server.port), PGUSER=server.user)
    finally:
        if differences.exists():
            print(differences.read_text())


def test_pip_installs_the_package_alone(tmp_path: Path) -> None:
    # pip leaves its build directory next to the source.
    source = tmp_path / "source"
    shutil.copytree(ROOT / "plpy_src", source / "plpy_src")
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    target = tmp_path / "target"
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--target", target),
            *("--no-index", "--no-deps", "--no-build-isolation", source),
        ],
        check=True,
    )
    installed = files(target / "pgflow_worker")
    assert "py.typed" in installed
    # -I: nothing but the interpreter's own and what this adds.
    script = f"import sys; sys.path.insert(0, {str(target)!r}); import pgflow_worker"
    subprocess.run(["/usr/bin/python3", "-I", "-c", script], check=True)
