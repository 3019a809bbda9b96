"""pgflow's TypeScript: its compiler and its client, run by node in a directory of the test's."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
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
        pytest.fail(f"pgflow's npm packages are not in {home}: run make dev-deps")
    # node looks for packages from where a script lies, and these are installed elsewhere.
    (tmp_path / "node_modules").symlink_to(home / "node_modules")
    for name in ("package.json", "compile.js", "client.js"):
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
