"""`make soak`: load, while workers and their server are killed; then the books are checked."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from threading import Event, Lock
from uuid import UUID, uuid4

import psycopg
from psycopg.types.json import Jsonb

from bench.cluster import Cluster, Database, throw_away_cluster
from tests.faults.books import Counts, counted, errors_in, failures, name_of, wrong
from tests.faults.killer import Killer

SOURCE = Path(__file__).with_name("flows.py")
APPLICATION_NAME = "soak worker"
# By flow: its slots, and how many sessions call its worker.
WORKERS = {"orders": (2, 3), "pages": (2, 2), "letters": (1, 1)}
# So many runs of a flow may be open at a time: what a small machine does in a few seconds.
OPEN_RUNS = 12
# If nothing has changed for so long after the load, nothing is going to.
PATIENCE_SECONDS = 120
REPORT_SECONDS = 60

Loop = Callable[[Event], None]


def soak(
    cluster: Cluster, database: Database, *, seconds: float, kill_every: float, seed: int
) -> Counts:
    """Put load on a server for so many seconds, with a fault every so often, and check the books.

    database: with pgflow_worker and no flows. It tells on stdout what it does.
    """
    return _Soak(cluster, database, seed).run(seconds, kill_every)


class _Soak:
    def __init__(self, cluster: Cluster, database: Database, seed: int) -> None:
        self._database = database
        self._rng = random.Random(seed)
        self._log = cluster.log
        self._letters = cluster.directory / "letters"
        self._deploys = 0
        self._resumed = 0
        self._lock = Lock()  # of the next two
        self._calls: Counter[str] = Counter()
        self._acknowledged: set[UUID] = set()
        self._killer = Killer(cluster, database, APPLICATION_NAME, self._deploy, self._rng, _say)

    def run(self, seconds: float, kill_every: float) -> Counts:
        self._set_up()
        with self._threads(*self._workers(), *self._starters()):
            self._kill(seconds, kill_every)
        _say("no more load, no more faults")
        self._let_a_minute_pass()
        with self._threads(*self._workers()):
            self._wait_until_nothing_is_left()
        return self._counts()

    def _counts(self) -> Counts:
        log = self._log.read_text(errors="replace").splitlines()
        return Counts(
            faults=self._killer.counts,
            calls=self._calls,
            resumed=self._resumed,
            runs=counted(self._database, "status", "pgflow.runs"),
            tasks=counted(self._database, "status", "pgflow.step_tasks"),
            attempts=counted(self._database, "outcome", "pgflow_worker.attempts"),
            effects=self._database.rows("select count(*) from effects")[0][0],
            failed=failures(self._database),
            errors=errors_in(log),
            wrong=wrong(
                self._database,
                acknowledged=self._acknowledged,
                sent=self._letters.read_text().split(),
                log=log,
            ),
        )

    def _set_up(self) -> None:
        self._database.run(
            """create table effects (
                run_id uuid not null, step_slug text not null, task_index int not null,
                attempt int not null, pid int not null default pg_backend_pid(),
                written_at timestamptz not null default clock_timestamp()
            )""",
            # Everybody is killed here, and nobody is to blame for it.
            "insert into pgflow_worker.settings (name, value) values ('max_deaths', '100')",
        )
        self._letters.touch()
        self._deploy()
        for flow_slug, (slots, _) in WORKERS.items():
            self._database.run(
                f"update pgflow_worker.flows set workers = {slots} where flow_slug = '{flow_slug}'"
            )

    def _deploy(self) -> None:
        self._deploys += 1
        source = f"{SOURCE.read_text()}# {self._deploys}\n"
        self._database.rows("select pgflow_worker.deploy('soak', %s)", source)

    def _kill(self, seconds: float, kill_every: float) -> None:
        began = last_report = time.monotonic()
        while (now := time.monotonic()) - began < seconds:
            time.sleep(kill_every * self._rng.uniform(0.5, 1.5))
            self._killer.strike()
            self._resume()
            if now - last_report > REPORT_SECONDS:
                last_report = now
                runs = counted(self._database, "status", "pgflow.runs")
                _say(f"{now - began:.0f} of {seconds:.0f} s; runs: {dict(runs)}")

    @contextmanager
    def _threads(self, *loops: Loop) -> Iterator[None]:
        """Let the loops go on until the block has ended, and wait for theirs."""
        end = Event()
        with ThreadPoolExecutor(len(loops)) as pool:
            futures = [pool.submit(loop, end) for loop in loops]
            try:
                yield
            finally:
                end.set()
        for future in futures:
            future.result()

    def _workers(self) -> list[Loop]:
        return [
            partial(self._work, flow_slug, random.Random(self._rng.random()))
            for flow_slug, (_, sessions) in WORKERS.items()
            for _ in range(sessions)
        ]

    def _work(self, flow_slug: str, rng: random.Random, end: Event) -> None:
        """Call the worker again and again, as pg_cron does in a new session each time."""
        while not end.is_set():
            call = (
                f"call pgflow_worker.work('{flow_slug}', "
                f"mode => '{rng.choice(['batch', 'drain', 'drain', 'wait'])}', "
                f"batch_size => {rng.randint(1, 20)}, max_concurrent => {rng.randint(1, 8)}, "
                f"max_duration => '{rng.uniform(0.5, 5):.1f} seconds')"
            )
            try:
                with self._database.connect(application_name=APPLICATION_NAME) as connection:
                    [[report]] = connection.execute(call.encode()).fetchall()
                end_of_call = report["status"]
            except psycopg.Error as error:
                end_of_call = _name_of(error)
            with self._lock:
                self._calls[end_of_call] += 1
            end.wait(rng.uniform(0, 0.3))

    def _starters(self) -> list[Loop]:
        return [
            partial(self._start, flow_slug, random.Random(self._rng.random()))
            for flow_slug in WORKERS
        ]

    def _start(self, flow_slug: str, rng: random.Random, end: Event) -> None:
        """Start runs. One whose start was not acknowledged may be there or not."""
        while not end.wait(rng.uniform(0.1, 0.5)):
            run_id = uuid4()
            flow_input = {"n": rng.randint(0, 20), "file": str(self._letters)}
            try:
                [[open_runs]] = self._database.rows(
                    "select count(*) from pgflow.runs where flow_slug = %s and status = 'started'",
                    flow_slug,
                )
                if open_runs < OPEN_RUNS:
                    self._database.rows(
                        "select run_id from pgflow.start_flow(%s, %s, %s)",
                        *(flow_slug, Jsonb(flow_input), run_id),
                    )
                    with self._lock:
                        self._acknowledged.add(run_id)
            except psycopg.OperationalError:
                pass  # The server is down, or went down.

    def _resume(self) -> None:
        """Resume what the worker has paused by itself."""
        for (flow_slug,) in self._database.rows("select flow_slug from pgflow_worker.pauses"):
            self._database.rows("select pgflow_worker.resume(%s)", flow_slug)
            self._resumed += 1
            _say(f"resumed {flow_slug}")

    def _let_a_minute_pass(self) -> None:
        """Show what dead workers had read, as a minute would while nobody works.

        What is hidden for longer stays so: nothing may be.
        """
        for flow_slug in WORKERS:
            shown = self._database.rows(
                f"""update pgmq.q_{flow_slug} set vt = clock_timestamp()
                where vt between clock_timestamp() and clock_timestamp() + interval '65 seconds'
                returning msg_id"""
            )
            _say(f"{flow_slug}: {len(shown)} messages were hidden")

    def _wait_until_nothing_is_left(self) -> None:
        before, since = None, time.monotonic()
        while time.monotonic() - since < PATIENCE_SECONDS:
            [now] = self._database.rows(
                """select
                    (select count(*) from pgflow.runs where status = 'started'),
                    (select count(*) from pgflow.step_tasks where status = 'started'),
                    (select count(*) from pgflow_worker.attempts)"""
            )
            if now[:2] == (0, 0):
                return
            if now != before:
                before, since = now, time.monotonic()
            time.sleep(0.2)
            self._resume()


def _name_of(error: psycopg.Error) -> str:
    if error.sqlstate is None:
        return "the connection was lost or refused"
    return f"{error.sqlstate} {name_of(error.diag.message_primary or '')}"


def _say(text: str) -> None:
    print(f"{datetime.now():%H:%M:%S.%f} {text}", flush=True)


def main() -> int:
    options = _options()
    # So that the server is stopped and removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with throw_away_cluster(os.environ["PG_CONFIG"]) as cluster:
        database = cluster.create_with_pgflow("soak", Path(os.environ["PGFLOW_MIGRATIONS"]))
        is_clean = False
        try:
            _say(f"seed {options.seed}")
            counts = soak(
                cluster,
                database,
                seconds=options.seconds,
                kill_every=options.kill_every,
                seed=options.seed,
            )
            print(counts)
            is_clean = counts.is_clean
        finally:
            if options.keep_log or not is_clean:
                kept = Path(tempfile.mkdtemp(prefix="pgflow_worker_soak_", dir="/var/tmp")) / "log"
                shutil.copyfile(cluster.log, kept)
                _say(f"the server's log: {kept}")
    return 0 if is_clean else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="of load; 600")
    parser.add_argument("--kill-every", type=float, default=5, help="seconds, on average; 5")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the faults")
    parser.add_argument(
        "--keep-log", action="store_true", help="of the server, even if nothing was wrong"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
