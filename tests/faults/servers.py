"""Servers of their own, made as copies of the tests' server: to be filled up, promoted, misled."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from pytest_postgresql.executors import PostgreSQLExecutor

from tests.conftest import Connection

BINDIR = Path(
    subprocess.check_output(
        [os.environ.get("PG_CONFIG", "pg_config"), "--bindir"], text=True
    ).strip()
)


class Copy:
    """A server that was started on a base backup; reached through its socket only."""

    def __init__(self, directory: Path, user: str) -> None:
        self.directory = directory
        self._user = user

    @property
    def data(self) -> Path:
        return self.directory / "data"

    def connect(self, dbname: str, **kwargs: Any) -> Connection:
        return psycopg.connect(
            host=str(self.directory),
            user=self._user,
            dbname=dbname,
            autocommit=True,
            prepare_threshold=None,
            **kwargs,
        )


@contextmanager
def copy_of(
    server: PostgreSQLExecutor,
    *,
    standby: bool = False,
    options: str = "",
    environment: Mapping[str, str] | None = None,
    wrapper: Sequence[str] = (),
) -> Iterator[Copy]:
    """A copy of the server with all its databases, or a standby of it.

    wrapper: a program that runs what follows it, such as `env`.
    """
    # Not below pytest's directory: a socket's path may not be long.
    directory = Path(tempfile.mkdtemp(prefix="pgflow_worker_", dir="/tmp"))
    copy = Copy(directory, server.user)
    try:
        subprocess.run(
            [
                *(BINDIR / "pg_basebackup", "-h", server.host, "-p", str(server.port)),
                *("-U", server.user, "-D", copy.data, "--checkpoint=fast", "--no-sync"),
                *(["--write-recovery-conf"] if standby else []),
            ],
            check=True,
        )
        started = subprocess.run(
            [
                *wrapper,
                *(BINDIR / "pg_ctl", "-D", copy.data, "-w", "-l", directory / "log", "start", "-o"),
                f"-c listen_addresses= -k {directory} -c port=5432 -c shared_preload_libraries= "
                # A standby wants as many connections as its primary.
                f"-c max_connections=200 -c fsync=off {options}",
            ],
            env=os.environ | (environment or {}),
            stdout=subprocess.DEVNULL,
        )
        assert started.returncode == 0, (directory / "log").read_text()
        try:
            yield copy
        finally:
            subprocess.run(
                [BINDIR / "pg_ctl", "-D", copy.data, "-w", "-m", "immediate", "stop"],
                check=True,
                stdout=subprocess.DEVNULL,
            )
    finally:
        shutil.rmtree(directory)
