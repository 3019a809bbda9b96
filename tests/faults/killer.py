"""What can happen to workers and their server, done to them at random."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psycopg

from bench.cluster import Cluster, Database

# How long a server may need to be there again, and backends to notice that they have none.
RECOVERY_SECONDS = 300
ORPHAN_SECONDS = 20


class Killer:
    """Does one fault after the other, in random order, each as often as its weight says.

    application_name: of the workers' sessions. deploy: deploys the flows again. say: is told what
    was done.
    """

    def __init__(
        self,
        cluster: Cluster,
        database: Database,
        application_name: str,
        deploy: Callable[[], None],
        rng: random.Random,
        say: Callable[[str], None],
    ) -> None:
        self._cluster = cluster
        self._database = database
        self._application_name = application_name
        self._rng = rng
        self._say = say
        self._faults: dict[str, tuple[Callable[[], str | None], int]] = {
            "pg_terminate_backend": (lambda: self._signal("pg_terminate_backend"), 3),
            "pg_cancel_backend": (lambda: self._signal("pg_cancel_backend"), 3),
            "kill -9 of a worker": (self._kill_worker, 2),
            "immediate restart": (lambda: self._cluster.restart("immediate"), 2),
            "fast restart": (lambda: self._cluster.restart("fast"), 1),
            "kill -9 of the postmaster": (self._kill_postmaster, 1),
            "deploy": (deploy, 1),
        }
        self._deck: list[str] = []
        self.counts: Counter[str] = Counter()

    def strike(self) -> None:
        """Do the next fault, and wait until the server can be reached again."""
        if not self._deck:
            self._deck = [name for name, (_, weight) in self._faults.items() for _ in range(weight)]
            self._rng.shuffle(self._deck)
        name = self._deck.pop()
        fault, _ = self._faults[name]
        detail = fault()
        self._wait_for_server()
        self.counts[name] += 1
        self._say(f"{name}: {detail}" if detail else name)

    def _signal(self, function: str) -> str:
        with self._database.connect() as connection:
            while True:
                pid = self._worker()
                query = f"select {function}(%s)".encode()
                if connection.execute(query, [pid]).fetchall() == [(True,)]:
                    return f"pid {pid}"

    def _kill_worker(self) -> str:
        with self._database.connect() as witness:
            while True:
                pid = self._worker()
                if pid not in _children(self._postmaster):
                    continue  # Its call has ended.
                try:
                    os.kill(pid, signal.SIGKILL)
                    # The postmaster ends all sessions when it notices, unless it was too late.
                    witness.execute("select pg_sleep(5)")
                except ProcessLookupError:
                    continue
                except psycopg.OperationalError:
                    return f"pid {pid}"

    def _kill_postmaster(self) -> str:
        """Backends without a postmaster go on until they want to read from their client."""
        postmaster = self._postmaster
        # Stopped, it makes no more children than those that are found.
        os.kill(postmaster, signal.SIGSTOP)
        while _processes()[postmaster][0] != "T":
            time.sleep(0.01)
        orphans = _children(postmaster)
        os.kill(postmaster, signal.SIGKILL)
        orphans = self._wait_for_end(orphans, ORPHAN_SECONDS)
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)
        if self._wait_for_end({postmaster, *orphans}, RECOVERY_SECONDS):
            raise TimeoutError("a server that was killed is still there")
        # To PostgreSQL a process that has ended and that nobody took notice of is still there.
        sockets = self._cluster.directory.glob(".s.PGSQL.*.lock")
        for lock in (self._cluster.data / "postmaster.pid", *sockets):
            lock.unlink()
        self._cluster.start()
        return f"pid {postmaster}, and of {len(orphans)} backends that went on without it"

    def _wait_for_end(self, pids: set[int], seconds: float) -> set[int]:
        """Those of the processes that have not ended in time."""
        deadline = time.monotonic() + seconds
        while (pids := pids & _running()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return pids

    @property
    def _postmaster(self) -> int:
        return int((self._cluster.data / "postmaster.pid").read_text().split()[0])

    def _worker(self) -> int:
        """The pid of a worker in the middle of a call."""
        deadline = time.monotonic() + RECOVERY_SECONDS
        while time.monotonic() < deadline:
            rows = self._database.rows(
                # While it works, a worker has a name of its own.
                "select pid from pg_stat_activity where state = 'active' "
                "and (application_name = %s or starts_with(application_name, 'pgflow_worker '))",
                self._application_name,
            )
            if rows:
                return int(self._rng.choice(rows)[0])
            time.sleep(0.02)
        raise TimeoutError("no worker is working")

    def _wait_for_server(self) -> None:
        deadline = time.monotonic() + RECOVERY_SECONDS
        while True:
            try:
                self._database.run("select 1")
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
            else:
                return


def _running() -> set[int]:
    """Every process that has not ended; one whose parent has not taken notice has."""
    return {pid for pid, (state, _) in _processes().items() if state != "Z"}


def _children(parent: int) -> set[int]:
    return {pid for pid, (_, of) in _processes().items() if of == parent}


def _processes() -> dict[int, tuple[str, int]]:
    """State and parent of every process."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            stat = (directory / "stat").read_text()
        except OSError:
            continue  # It has ended.
        # The command, in parentheses, may contain anything.
        state, parent, *_ = stat.rpartition(")")[2].split()
        found[int(directory.name)] = state, int(parent)
    return found
