"""A real Dask scheduler and workers on loopback, which have Dask and none of our code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Connection
from tests.database.conftest import Session, background, other, role, session

__all__ = ["background", "other", "role", "session"]

SECONDS = 30.0
# Virtual environments with another version of Dask, if that is to be tried.
OF_SERVER = os.environ.get("DASK_OF_SERVER", sys.prefix)
OF_CLUSTER = os.environ.get("DASK_OF_CLUSTER", sys.prefix)
# One that has another than both.
OTHER = os.environ.get("OTHER_DASK")


class Dask:
    """A scheduler and its workers: processes that can be killed, stopped and started again."""

    def __init__(self, directory: Path, environment: str = OF_CLUSTER) -> None:
        self._directory = directory
        self._python = f"{environment}/bin/python"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._environment = {
            # Not what this process has: no PYTHONPATH, no checkout as working directory.
            **{name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ},
            "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1",
            "DASK_DISTRIBUTED__WORKER__DAEMON": "False",
        }
        self.protocol = "tcp"
        self.port = 0
        self.scheduler: subprocess.Popen[bytes]
        self.workers: list[subprocess.Popen[bytes]] = []

    @property
    def address(self) -> str:
        return f"{self.protocol}://127.0.0.1:{self.port}"

    def encrypt(self) -> dict[str, str]:
        """Take TLS, with a key that everybody has; Dask's settings for those who connect."""
        self.protocol = "tls"
        key, certificate = self._directory / "key", self._directory / "certificate"
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
                *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
                *("-keyout", key, "-out", certificate),
            ],
            check=True,
            capture_output=True,
        )
        prefix = "DASK_DISTRIBUTED__COMM__"
        settings = {f"{prefix}TLS__CA_FILE": str(certificate)}
        for part in ("SCHEDULER", "WORKER", "CLIENT"):
            settings[f"{prefix}TLS__{part}__KEY"] = str(key)
            settings[f"{prefix}TLS__{part}__CERT"] = str(certificate)
        self._environment |= settings
        return settings

    def start_scheduler(self) -> None:
        """At the port it had before, if there was one."""
        file = self._directory / "scheduler.json"
        file.unlink(missing_ok=True)
        self.scheduler = self._start(
            *("dask_scheduler", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--protocol", self.protocol, "--no-dashboard", "--scheduler-file", str(file)),
        )
        until(file.exists)
        address = until(lambda: json.loads(file.read_text() or "{}").get("address"))
        self.port = int(address.rpartition(":")[2])

    def start_worker(self, *options: str, threads: int = 1) -> subprocess.Popen[bytes]:
        worker = self._start(
            *("dask_worker", self.address, "--host", "127.0.0.1", "--no-dashboard", "--no-nanny"),
            *("--nthreads", str(threads), "--memory-limit", "0", "--death-timeout", "60"),
            *("--local-directory", str(self._directory), *options),
        )
        self.workers.append(worker)
        log = self._directory / "log"
        until(lambda: log.read_text().count("Registered to:") == len(self.workers))
        return worker

    def stop(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()

    def _start(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self._directory / "log").open("ab") as log:
            process = subprocess.Popen(
                [self._python, "-m", f"distributed.cli.{program}", *arguments],
                cwd=self._directory,
                env=self._environment,
                stdout=log,
                stderr=log,
            )
        self._processes.append(process)
        return process


def until(true: Callable[[], Any]) -> Any:
    """What the function returns when that is true at last."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if answer := true():
            return answer
        time.sleep(0.02)
    pytest.fail(f"still not true after {SECONDS:g} s")


@pytest.fixture(scope="module")
def shared_dask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dask]:
    """One that a module's tests leave as it is: two workers."""
    yield from _running(tmp_path_factory.mktemp("dask"))


@pytest.fixture
def own_dask(tmp_path: Path) -> Iterator[Dask]:
    """One that a test may break."""
    yield from _running(tmp_path)


def _running(directory: Path) -> Iterator[Dask]:
    dask = Dask(directory)
    try:
        dask.start_scheduler()
        dask.start_worker()
        dask.start_worker()
        yield dask
    finally:
        dask.stop()


@pytest.fixture
def with_dask(db: Connection) -> None:
    """The server's Python finds Dask in the environment of the tests."""
    db.execute("select pgflow_worker.set_environment(%s)", [OF_SERVER])


class Flows(Session):
    """A session whose flows run on a cluster."""

    def deploy_to(self, dask: Dask, source: str, flow_slug: str = "flow", **options: Any) -> None:
        self.deploy(source)
        named = "".join(f", {name} => %s" for name in options)
        self.run(
            f"select pgflow_worker.set_executor(%s, %s{named})",
            flow_slug,
            dask.address,
            *options.values(),
        )

    def output(self, run_id: str) -> Any:
        return self.value("select output from pgflow.runs where run_id = %s", run_id)


@pytest.fixture
def flows(session: Session, with_dask: None) -> Iterator[Flows]:
    yield Flows(session.connection)
    if not session.connection.closed:  # for those who read of a test that failed
        print(session.rows("select outcome, error from pgflow_worker.attempts"))
