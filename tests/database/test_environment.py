"""Third-party packages from a virtual environment."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from tests.conftest import Connection
from tests.database.conftest import Session

# A package that these tests' own environment has and the system's Python does not need to have.
FLOW = """
    import sortedcontainers
    flow = Flow("f")

    @flow.step
    def step(flow_input):
        return [list(sortedcontainers.SortedList(flow_input)), sortedcontainers.__file__]
"""


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    path = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", path], check=True)
    return path


def test_a_real_package(session: Session, connect: Callable[..., Connection]) -> None:
    session.run("select pgflow_worker.set_environment(%s)", sys.prefix)
    session.deploy(FLOW)
    session.start("f", [3, 1, 2])
    Session(connect()).work("f")
    [numbers, file] = session.value("select output from pgflow.step_tasks")
    assert numbers == [1, 2, 3]
    assert file.startswith(sys.prefix)


def test_without_the_environment_the_hint_names_it(session: Session) -> None:
    with pytest.raises(psycopg.Error) as caught:
        session.deploy(FLOW)
    assert caught.value.sqlstate == "PW005"
    assert "pgflow_worker.set_environment()" in (caught.value.diag.message_hint or "")


def test_null_takes_it_away(session: Session) -> None:
    session.run("select pgflow_worker.set_environment(%s)", sys.prefix)
    session.run("select pgflow_worker.set_environment(null)")
    with pytest.raises(psycopg.Error, match="No module named 'sortedcontainers'"):
        session.deploy(FLOW)


def test_an_environment_of_another_python_is_refused(session: Session, environment: Path) -> None:
    [packages] = (environment / "lib").iterdir()
    packages.rename(packages.with_name("python3.1"))
    with pytest.raises(psycopg.Error) as caught:
        session.run("select pgflow_worker.set_environment(%s)", str(environment))
    diag = caught.value.diag
    version = ".".join(map(str, sys.version_info[:2]))
    assert diag.sqlstate == "PW008"
    assert diag.message_primary == (
        f'environment "{environment}" is not for Python {version}, which this server runs'
    )
    assert diag.message_detail == "It has packages for: python3.1."
    assert diag.message_hint == f"Make it again: python{version} -m venv --clear {environment}"


@pytest.mark.parametrize("what", ["", "lib", "pyvenv.cfg", ".."])
def test_an_environment_that_others_may_write_is_refused(
    session: Session, environment: Path, what: str
) -> None:
    loose = (environment / what).resolve()
    mode = loose.stat().st_mode
    loose.chmod(mode | 0o022)
    with pytest.raises(psycopg.Error) as caught:
        session.run("select pgflow_worker.set_environment(%s)", str(environment))
    diag = caught.value.diag
    assert diag.sqlstate == "PW008"
    assert diag.message_primary == (
        f'"{loose}" can be written by others, who could change what the server runs'
    )
    assert diag.message_hint == f"Take that away: chmod -R go-w {loose}"
    loose.chmod(mode)
    session.run("select pgflow_worker.set_environment(%s)", str(environment))


def test_an_environment_that_has_gone_is_named(session: Session, environment: Path) -> None:
    session.run("select pgflow_worker.set_environment(%s)", str(environment))
    session.deploy('flow = Flow("f")\n@flow.step\ndef step(): pass\n')
    session.start("f")
    environment.rename(environment.with_name("elsewhere"))
    with pytest.raises(psycopg.Error, match="is not a virtual environment") as caught:
        session.work("f")
    assert caught.value.sqlstate == "PW008"
    session.run("select pgflow_worker.set_environment(null)")
    assert session.work("f")["completed"] == 1
