"""DBOS Transact: workflows on a queue without limits, as its tutorial has it.

The clock starts when DBOS has been launched. A queue is polled every second by default; here
ten times as often, so that waiting for the first poll does not count as work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import psycopg
from dbos import DBOS, DBOSConfig

from bench.external import wait_until

QUEUE = "jobs"


class _Countdown:
    """Jobs that are left to run."""

    def __init__(self, number: int) -> None:
        self._left = number
        self._lock = threading.Lock()
        self.over = threading.Event()

    def one_less(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self.over.set()


def _configure(url: str, countdown: _Countdown) -> dict[str, Callable[[], int]]:
    """Returns the workflows by their names."""
    config: DBOSConfig = {
        "name": "bench",
        "system_database_url": url,
        "log_level": "ERROR",
        "application_version": "1",
    }
    DBOS(config=config)

    def step() -> int:
        return 1

    def one_step() -> int:
        countdown.one_less()
        return 1

    def chain() -> int:
        for _ in range(3):
            durable_step()
        countdown.one_less()
        return 1

    durable_step = DBOS.step(name="step")(step)
    return {
        "one_step": DBOS.workflow(name="one_step")(one_step),
        "chain": DBOS.workflow(name="chain")(chain),
    }


def install(url: str) -> None:
    _configure(url, _Countdown(0))
    DBOS.launch()
    DBOS.register_queue(QUEUE, polling_interval_sec=0.1)
    DBOS.destroy()


def enqueue(url: str, kind: str, number: int) -> None:
    workflows = _configure(url, _Countdown(number))
    DBOS.listen_queues([])
    DBOS.launch()
    for _ in range(number):
        DBOS.enqueue_workflow(QUEUE, workflows[kind])
    DBOS.destroy()


def work(url: str, kind: str, number: int, go: Callable[[], None]) -> None:  # noqa: ARG001
    countdown = _Countdown(number)
    _configure(url, countdown)
    with psycopg.connect(url, autocommit=True) as connection:
        DBOS.launch()
        go()
        countdown.over.wait()
        # The last ones have run; now they have to be recorded.
        wait_until(
            connection,
            "select not exists (select from dbos.workflow_status where status <> 'SUCCESS')",
        )
    DBOS.destroy()
