"""What node runs, in a directory of the test's: pgflow's compiler and client, and Mermaid."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Connection
from tests.database.conftest import Session, session

__all__ = ["session"]

SCRIPTS = Path(__file__).parent


@pytest.fixture
def node(tmp_path: Path, db: Connection) -> Callable[..., "subprocess.Popen[str]"]:
    """Starts a script of this directory: node("client.js", "flow", "{}"); it knows the database."""
    home = Path(os.environ.get("PGFLOW_TYPESCRIPT") or ROOT / ".dev/typescript")
    if not (home / "node_modules").is_dir():
        pytest.fail(f"the npm packages are not in {home}: run make dev-deps")
    # node looks for packages from where a script lies, and these are installed elsewhere.
    (tmp_path / "node_modules").symlink_to(home / "node_modules")
    for name in ("package.json", "compile.js", "client.js", "mermaid.js"):
        shutil.copy(SCRIPTS / name, tmp_path)
    environment = os.environ | {
        "PGHOST": db.info.host,
        "PGPORT": str(db.info.port),
        "PGUSER": db.info.user,
        "PGDATABASE": db.info.dbname,
    }

    def start(script: str, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [home / "node", tmp_path / script, *arguments],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return start


def answer(process: "subprocess.Popen[str]", stdin: str | None = None) -> Any:
    """What a script says in the end; the test fails if the script does."""
    stdout, stderr = process.communicate(stdin, timeout=30)
    if process.returncode:
        pytest.fail(f"{process.args!r} failed:\n{stderr}")
    return json.loads(stdout)


@pytest.fixture
def compile_flow(
    session: Session, node: Callable[..., "subprocess.Popen[str]"]
) -> Callable[[str], None]:
    """Brings a flow written in TypeScript into the database, as pgflow's own compiler does."""

    def compile_and_run(typescript: str) -> None:
        for statement in answer(node("compile.js"), typescript):
            session.run(statement)

    return compile_and_run


@pytest.fixture
def mermaid(node: Callable[..., "subprocess.Popen[str]"]) -> Iterator[Callable[[str], Any]]:
    """Reads a Mermaid diagram: its nodes, edges and classes; the test fails if Mermaid cannot."""
    process = node("mermaid.js")
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None

    def read(text: str) -> Any:
        print(json.dumps(text), file=stdin, flush=True)
        line = stdout.readline()
        answer = json.loads(line) if line else {"error": process.communicate()[1]}
        assert "error" not in answer, f"{answer['error']}\n{text}"
        return answer

    yield read
    process.communicate()
