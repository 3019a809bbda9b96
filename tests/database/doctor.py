"""What doctor() finds, and its cures, pasted into psql."""

import subprocess
from typing import NamedTuple

from tests.conftest import Connection
from tests.faults.servers import BINDIR


class Finding(NamedTuple):
    """A row of doctor()."""

    severity: str
    what: str
    why: str
    cure: str


OK = [Finding("ok", "nothing to report", "", "")]


def findings(connection: Connection) -> list[Finding]:
    """What doctor() says."""
    rows = connection.execute("select severity, what, why, cure from pgflow_worker.doctor()")
    return [Finding(*row) for row in rows]


def paste(connection: Connection, cure: str) -> str:
    """Type a cure into psql, as the user and in the database of the connection; what it prints."""
    info = connection.info
    done = subprocess.run(
        [
            *(BINDIR / "psql", "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1"),
            *("-h", info.host, "-p", str(info.port), "-U", info.user, "-d", info.dbname),
        ],
        input=cure + "\n",
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, (cure, done.stderr)
    return done.stdout
