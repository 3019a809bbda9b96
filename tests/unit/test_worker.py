"""The call as a whole, where it takes a database that fails at the right moment."""

import asyncio
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from pgflow_worker import Flow
from pgflow_worker.database import Row
from pgflow_worker.errors import DatabaseError, QueryCanceled
from pgflow_worker.report import Report
from pgflow_worker.worker import Worker
from tests.unit.fakes import FakeDatabase, FakeFlags, process_with

SOON = 5  # seconds until a handler gives up; no test needs them
COMPLETE, SEVERAL = "_complete_task(", "_complete_tasks("
FAIL, REQUEUE = "pgflow.fail_task", "set status = 'queued'"
SHOW = "_set_visibility($1, $2, $3)"
# A look at the server: for a pause, or new code.
LOOK = "as pause_reason"


class FakePgflow:
    """Messages of one step, from 1, with a run for each.

    failing: raised by the second call of start_tasks. paused: the flow is, from the next look on.
    timeout: the step's. held: the tasks that are started, by the number of their message.
    """

    def __init__(
        self,
        number: int = 3,
        max_attempts: int = 3,
        failing: BaseException | None = None,
        timeout: int = 60,
    ) -> None:
        self.queue = list(range(1, number + 1))
        self.max_attempts = max_attempts
        self.failing = failing
        self.timeout = timeout
        self.paused = False
        self.starts = 0
        self.held: set[int] = set()
        self.database = FakeDatabase(
            {
                "_slots($1)": [
                    {"slot": 1, "enabled": True, "worker_id": "w", "lock_key": 1, "pid": None}
                ],
                "pg_try_advisory_lock": [{"locked": True}],
                "_left_behind($1)": [{"lost": False, "locks": 0, "temporary": False}],
                "as living": [{"living": True}],
                LOOK: lambda _: [
                    {"pause_reason": "paused" if self.paused else None, "revision": ""}
                ],
                "select opt_max_attempts": [{}],
                "select step.step_slug": [
                    {
                        "step_slug": "step",
                        "step_type": "single",
                        "dependencies": [],
                        "queue_name": "f",
                    }
                ],
                "as ready": lambda: [{"ready": bool(self.queue)}],
                "pgmq.read": self.read,
                "pgflow.start_tasks": self.start,
                "task.last_worker_id = $3": self.started,
                "from pgflow.runs where run_id = $1 for update": [{"status": "started"}],
                "state.status as step_status": self.claimed,
                REQUEUE: self.end,
                SHOW: self.show,
                COMPLETE: self.complete,
                SEVERAL: self.complete_several,
                FAIL: self.fail,
            }
        )

    def read(self, _flow: str, _visibility: int, quantity: int) -> list[Row]:
        taken, self.queue = self.queue[:quantity], self.queue[quantity:]
        return [
            {"msg_id": n, "step_slug": "step", "seconds_ahead": -1.0, "crashed": None}
            for n in taken
        ]

    def start(self, _flow: str, ids: list[int], _worker: str) -> list[Row]:
        self.starts += 1
        if self.starts == 2 and self.failing is not None:
            raise self.failing
        self.held.update(ids)
        return [
            {
                "run_id": f"run {n}",
                "step_slug": "step",
                "task_index": 0,
                "input": f'{{"run": {n}}}',
                "flow_input": None,
            }
            for n in ids
        ]

    def started(self, _flow: str, ids: list[int], _worker: str) -> list[Row]:
        return [
            {
                "message_id": n,
                "run_id": f"run {n}",
                "step_slug": "step",
                "task_index": 0,
                "worker_id": "w",
                "attempts_count": 1,
                "started_us": 1,
                "max_attempts": self.max_attempts,
                "timeout": self.timeout,
            }
            for n in ids
        ]

    def claimed(self, run_id: str, *_: object) -> list[Row]:
        number = number_of(run_id)
        row = {"message_id": number, "step_status": "started"}
        return [row] if number in self.held else []

    def end(self, run_id: str, *_: object) -> list[Row]:
        """A task that is started is not any more; no row for another."""
        rows = self.claimed(run_id)
        self.held.discard(number_of(run_id))
        return rows

    def complete(self, _flow: str, _worker: str, run_id: str, *_: object) -> list[Row]:
        return [{"answer": "completed" if self.end(run_id) else "lost"}]

    def complete_several(self, _flow: str, _worker: str, runs: list[str], *_: object) -> list[Row]:
        ended = [place for place, run_id in enumerate(runs, 1) if self.end(run_id)]
        return [{"place": place, "answer": "completed"} for place in ended]

    def fail(self, run_id: str, *_: object) -> list[Row]:
        self.end(run_id)
        return [{"status": "failed" if self.max_attempts == 1 else "queued"}]

    def show(self, _flow: str, ids: list[int], seconds: list[int]) -> list[Row]:
        self.queue += [n for n, after in zip(ids, seconds, strict=True) if after == 0]
        return []

    @property
    def completed(self) -> list[int]:
        """The numbers of the tasks that were completed."""
        several = [list_of(args[2]) for args in self.database.kept(SEVERAL)]
        alone = [[args[2]] for args in self.database.kept(COMPLETE)]
        return [number_of(run_id) for runs in several + alone for run_id in runs]

    @property
    def failed(self) -> list[tuple[int, object]]:
        """The numbers of the tasks whose attempt has failed, and their errors."""
        return [(number_of(args[0]), args[3]) for args in self.database.kept(FAIL)]

    @property
    def shown(self) -> list[int]:
        """The numbers of the messages that were made visible again, given back or requeued."""
        return [
            number
            for _, numbers, seconds in self.database.kept(SHOW)
            for number, after in zip(list_of(numbers), list_of(seconds), strict=True)
            if after == 0
        ]

    def place(self, text: str) -> int:
        """When a statement that contains the text was executed first."""
        return next(n for n, (sql, _) in enumerate(self.database.executed) if text in sql)


def number_of(run_id: object) -> int:
    return int(str(run_id).removeprefix("run "))


def list_of(value: object) -> list[Any]:
    assert isinstance(value, list)
    return value


def worked(
    pgflow: FakePgflow,
    flow: Flow,
    *,
    mode: str = "drain",
    max_concurrent: int = 2,
    flags: FakeFlags | None = None,
) -> Report:
    report = Report("completed", "f", mode, 10, max_concurrent)
    with process_with(flags, report.notes) as process:
        Worker(pgflow.database, process, flow, "", report, seconds=SOON).run()
    return report


def waiting_flow(max_attempts: int = 3) -> Flow:
    """The first task's handler returns at once, the others' do not before they are cancelled."""
    flow = Flow("f", max_attempts=max_attempts)

    @flow.step
    async def step(flow_input: int) -> None:
        await asyncio.sleep(0 if flow_input == 1 else SOON)

    return flow


def main_flow(handler: Callable[[int], None]) -> Flow:
    flow = Flow("f")

    @flow.step
    def step(flow_input: int) -> None:
        handler(flow_input)

    return flow


# The end with an error, when one handler is done, one runs, and one is about to be started


def test_a_cancel_fails_the_attempt_of_the_handler_that_runs() -> None:
    pgflow = FakePgflow(failing=QueryCanceled("now"))
    with pytest.raises(QueryCanceled, match="now"):
        worked(pgflow, waiting_flow())
    assert pgflow.completed == [1]
    assert pgflow.failed == [(2, "canceled: now")]
    assert pgflow.shown == [3]
    assert pgflow.held == set()


def test_another_error_gives_it_back() -> None:
    pgflow = FakePgflow(failing=DatabaseError("no", "42501"))
    with pytest.raises(DatabaseError, match="no"):
        worked(pgflow, waiting_flow())
    assert pgflow.completed == [1]
    assert pgflow.failed == []
    assert pgflow.shown == [2, 3]
    assert pgflow.held == set()


def test_another_error_fails_what_must_never_run_twice() -> None:
    pgflow = FakePgflow(max_attempts=1, failing=DatabaseError("no", "42501"))
    with pytest.raises(DatabaseError, match="no"):
        worked(pgflow, waiting_flow(max_attempts=1))
    assert pgflow.completed == [1]
    assert pgflow.failed == [(2, "the call ended with an error")]
    assert pgflow.shown == [3]
    assert pgflow.held == set()


def test_a_handler_that_is_done_when_the_error_comes_has_a_result() -> None:
    flow = Flow("f")
    go_on = threading.Event()

    @flow.step
    async def step(flow_input: int) -> None:
        while flow_input > 1 and not go_on.is_set():
            await asyncio.sleep(0.001)

    def start(*args: Any) -> list[Row]:
        if pgflow.starts == 1:
            go_on.set()
            time.sleep(0.1)
        return pgflow.start(*args)

    pgflow = FakePgflow(failing=QueryCanceled("now"))
    pgflow.database.answers["pgflow.start_tasks"] = start
    with pytest.raises(QueryCanceled):
        worked(pgflow, flow)
    assert pgflow.completed == [1, 2]
    assert pgflow.failed == []
    assert pgflow.shown == [3]


@pytest.mark.parametrize("error", [QueryCanceled("now"), DatabaseError("no", "42501")])
def test_results_are_stored_before_anything_is_given_back(error: BaseException) -> None:
    pgflow = FakePgflow(failing=error)
    with pytest.raises(type(error)):
        worked(pgflow, waiting_flow())
    assert pgflow.place(COMPLETE) < pgflow.place(REQUEUE)
    if isinstance(error, QueryCanceled):
        assert pgflow.place(FAIL) < pgflow.place(REQUEUE)


def test_what_is_left_is_given_back_though_results_cannot_be_stored() -> None:
    pgflow = FakePgflow(failing=DatabaseError("no", "42501"))
    pgflow.database.answers[COMPLETE] = DatabaseError("disk full", "53100")
    with pytest.raises(DatabaseError):
        worked(pgflow, waiting_flow())
    assert pgflow.completed == []
    assert pgflow.shown == [1, 2, 3]
    assert pgflow.held == set()


def test_a_cancel_in_the_main_thread_fails_that_attempt_and_gives_the_others_back() -> None:
    def handler(number: int) -> None:
        # So quick that the others are started together.
        if number == 2:
            raise QueryCanceled("now")

    pgflow = FakePgflow(number=4)
    with pytest.raises(QueryCanceled, match="now"):
        worked(pgflow, main_flow(handler))
    assert pgflow.completed == [1]
    assert pgflow.failed == [(2, "canceled: now")]
    assert pgflow.shown == [3, 4]
    assert pgflow.held == set()


# Looks at the server


def test_the_server_is_looked_at_once_a_second_while_the_main_queue_is_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pgflow_worker.intake.LOOK_SECONDS", 0.02)
    looks: list[int] = []

    def handler(number: int) -> None:
        time.sleep(0.015)
        looks.append(len(pgflow.database.ran(LOOK)))

    pgflow = FakePgflow(number=10)
    assert worked(pgflow, main_flow(handler)).completed == 10
    # The first is started alone, all others together.
    assert pgflow.starts == 2
    assert looks[-1] - looks[1] >= 3


def test_between_two_looks_the_server_is_left_alone() -> None:
    looks: list[int] = []

    def handler(number: int) -> None:
        time.sleep(0.015)
        looks.append(len(pgflow.database.ran(LOOK)))

    pgflow = FakePgflow(number=10)
    assert worked(pgflow, main_flow(handler)).completed == 10
    assert looks[1:] == looks[1:2] * 9


def test_what_such_a_look_finds_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgflow_worker.intake.LOOK_SECONDS", 0.01)

    def handler(number: int) -> None:
        time.sleep(0.015)
        pgflow.paused = number == 3

    pgflow = FakePgflow(number=6)
    report = worked(pgflow, main_flow(handler))
    assert (report.status, report.completed) == ("paused", 3)
    assert pgflow.shown == [4, 5, 6]
    assert pgflow.held == set()


# Messages that wait


@pytest.mark.parametrize(("visibility", "shown"), [(60, [2, 3]), (5, [])])
def test_what_others_may_have_already_is_not_given_back(
    monkeypatch: pytest.MonkeyPatch, visibility: int, shown: list[int]
) -> None:
    # Messages are too old five seconds before others can see them.
    monkeypatch.setattr("pgflow_worker.intake.READ_VISIBILITY", visibility)

    def handler(number: int) -> None:
        raise QueryCanceled("now")

    pgflow = FakePgflow()
    with pytest.raises(QueryCanceled):
        worked(pgflow, main_flow(handler))
    assert pgflow.failed == [(1, "canceled: now")]
    assert pgflow.shown == shown


def test_what_was_far_and_given_back_is_read_again_before_the_call_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pgflow_worker.backlog.HORIZON", 0.01)
    monkeypatch.setattr("pgflow_worker.backlog.FAR", 0.02)

    def handler(number: int) -> None:
        time.sleep(0.1 if number == 1 else 0)

    pgflow = FakePgflow(number=5)
    assert worked(pgflow, main_flow(handler)).completed == 5
    assert pgflow.shown[:3] == [3, 4, 5]
    assert pgflow.queue == []


# What PostgreSQL wants while handlers run


def wishing(flags: FakeFlags, wish: str) -> Flow:
    """Whose handlers do not end before PostgreSQL wants something."""
    flow = Flow("f")

    @flow.step
    async def step(flow_input: int) -> None:
        setattr(flags, wish, True)
        await asyncio.sleep(SOON)

    return flow


def test_while_it_waits_for_handlers_it_sees_a_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    # It does not look at the server.
    monkeypatch.setattr("pgflow_worker.worker.LOOK_SECONDS", 60)
    flags = FakeFlags()
    pgflow = FakePgflow(number=2)
    pgflow.database.answers["[check interrupts]"] = QueryCanceled("now")
    started = time.monotonic()
    with pytest.raises(QueryCanceled, match="now"):
        worked(pgflow, wishing(flags, "cancel"), flags=flags)
    assert time.monotonic() - started < SOON
    assert pgflow.failed == [(1, "canceled: now"), (2, "canceled: now")]


def test_before_the_process_ends_its_threads_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgflow_worker.worker.LOOK_SECONDS", 60)
    flags = FakeFlags()
    others = set(threading.enumerate())

    def end() -> list[Row]:
        assert set(threading.enumerate()) == others
        raise SystemExit

    pgflow = FakePgflow(number=2)
    pgflow.database.answers["[check interrupts]"] = end
    with pytest.raises(SystemExit):
        worked(pgflow, wishing(flags, "die"), flags=flags)


def test_a_handler_that_is_interrupted_fails_with_postgresqls_reason() -> None:
    flags = FakeFlags()

    def handler(number: int) -> None:
        if number == 2:
            flags.cancel = True
            signal.raise_signal(signal.SIGRTMIN)

    pgflow = FakePgflow(number=4)
    pgflow.database.answers["[check interrupts]"] = QueryCanceled("due to statement timeout")
    with pytest.raises(QueryCanceled, match="due to statement timeout"):
        worked(pgflow, main_flow(handler), flags=flags)
    assert pgflow.completed == [1]
    assert pgflow.failed == [(2, "canceled: due to statement timeout")]
    assert pgflow.shown == [3, 4]
    assert pgflow.held == set()


# A process that is not trusted any more

ENDED = "the call ended, and the next one has a new process"


def test_after_a_handler_that_was_stopped_the_call_ends() -> None:
    def handler(number: int) -> None:
        time.sleep(SOON)

    pgflow = FakePgflow(number=4, timeout=0)
    report = worked(pgflow, main_flow(handler))
    assert pgflow.failed == [(1, 'step "step" took longer than 0 s')]
    assert report.notes == [f"a handler was stopped in the middle of Python: {ENDED}"]
    assert pgflow.shown == [2, 3, 4]
    assert pgflow.held == set()


def test_after_handlers_that_ran_out_of_memory_the_call_ends() -> None:
    def handler(number: int) -> None:
        if number == 1:
            raise MemoryError

    pgflow = FakePgflow(number=3)
    report = worked(pgflow, main_flow(handler))
    assert [number for number, _ in pgflow.failed] == [1]
    assert report.notes == [
        "handlers ran out of memory, of which a call gives them 512 MB "
        f"(memory_mb in pgflow_worker.settings): {ENDED}"
    ]
    assert pgflow.shown == [2, 3]


def test_a_thread_that_cannot_be_stopped_is_left_behind_and_the_call_ends() -> None:
    flow = Flow("f")
    end = threading.Event()

    @flow.step(thread=True)
    def step(flow_input: int) -> None:
        end.wait(SOON)

    pgflow = FakePgflow(number=3, timeout=0)
    started = time.monotonic()
    report = worked(pgflow, flow)
    assert time.monotonic() - started < SOON
    end.set()
    error = 'step "step" took longer than 0 s'
    assert pgflow.failed == [(1, error), (2, error)]
    assert report.notes == [f"a handler whose time was up could not be stopped: {ENDED}"]
    assert pgflow.shown == [3]
    assert pgflow.held == set()
