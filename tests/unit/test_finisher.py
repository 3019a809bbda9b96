"""What becomes of tasks: shared commits, failures, handlers with `tx`, and the order of locks."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import pytest

from pgflow_worker import DatabaseError, Fail, Flow, Snooze, Transaction, finisher
from pgflow_worker.attempt import Failure, Success
from pgflow_worker.database import CONFLICT_TRIES, Row
from pgflow_worker.errors import Interrupted, QueryCanceled
from pgflow_worker.finisher import Finisher
from pgflow_worker.flow import Handler
from pgflow_worker.pgflow import Claim, Pgflow, Task
from pgflow_worker.registry import Registry
from pgflow_worker.report import Report
from pgflow_worker.runner import Result, Runner
from tests.unit.fakes import Answer, FakeDatabase, process_with

RUN_ID = "12345678-1234-5678-1234-567812345678"
ANOTHER_RUN_ID = "87654321-1234-5678-1234-567812345678"
STARTED_US = 1_700_000_000_000_000

# Short names for what the worker says to pgflow; the first that fits an event is its name.
NAMES = {
    "from pgflow.runs where run_id = $1 for update": "lock run",
    "state.status as step_status": "lock claim",
    "pgflow_worker._complete_task(": "complete",
    "pgflow_worker._complete_tasks(": "complete several",
    "pgflow_worker._complete_map_tasks(": "complete map",
    "pgflow.fail_task": "fail",
    "update pgflow.step_tasks set attempts_count": "set attempts",
    "set status = 'queued'": "requeue",
    "_set_visibility": "show",
    "insert into pgflow_worker.attempts": "record",
}
COMPLETE, SEVERAL, MAP, FAIL = (
    "pgflow_worker._complete_task(",
    "pgflow_worker._complete_tasks(",
    "pgflow_worker._complete_map_tasks(",
    "pgflow.fail_task",
)
LOCK_RUN = "from pgflow.runs where run_id = $1 for update"
LOCK_CLAIM = "state.status as step_status"
RECORD = "insert into pgflow_worker.attempts"
SHOW = "_set_visibility"


def completing(*answers: str) -> Callable[..., list[Row]]:
    """Completes as many tasks as are given, but for those that have another answer.

    Those that are lost are not mentioned.
    """

    def answer(*args: Any) -> list[Row]:
        rest = ["completed"] * (len(args[4]) - len(answers))
        told = enumerate((*answers, *rest), 1)
        return [{"place": place, "answer": answer} for place, answer in told if answer != "lost"]

    return answer


WELL: dict[str, Answer] = {
    LOCK_RUN: [{"status": "started"}],
    LOCK_CLAIM: [{"step_status": "started"}],
    COMPLETE: [{"answer": "completed"}],
    SEVERAL: completing(),
    MAP: completing(),
    FAIL: [{"status": "queued"}],
    "set status = 'queued'": [{"message_id": 42}],
    SHOW: lambda _, messages, __: [{} for _ in messages],
}
# pgflow._complete_task() has locked the run and the claim.
FAILED = ["[begin]", "lock run", "lock claim", "fail", "record", "[commit]"]


def claim(index: int = 0, step_slug: str = "only", run_id: str = RUN_ID) -> Claim:
    return Claim(run_id, step_slug, index, "worker", 1, STARTED_US, 42, 3, 60)


def success(index: int = 0, step_slug: str = "only", run_id: str = RUN_ID) -> Result:
    return Result(claim(index, step_slug, run_id), Success(f'"{index}"'), 1.5)


def failure(index: int = 0, *, final: bool = False) -> Result:
    return Result(claim(index), Failure("broken", "Traceback", final=final), 1.5, "log")


class Finished:
    """A finisher, what it did with the database, and what it counted."""

    def __init__(
        self,
        answers: Mapping[str, Answer] | None = None,
        *,
        handler: Handler = lambda: 1,
        in_sets: frozenset[str] = frozenset(),
        errors_at: Mapping[int, BaseException] | None = None,
    ) -> None:
        self.database = FakeDatabase(WELL | dict(answers or {}), errors_at=errors_at)
        self.report = Report("completed", "f", "batch", 10, 5)
        self.flow = Flow("f")
        self.flow.step("only")(handler)
        self.pgflow = Pgflow(self.database, "f")
        self.pgflow.in_sets = in_sets

    @contextmanager
    def finisher(self) -> Iterator[Finisher]:
        with process_with() as process:
            yield Finisher(
                self.database,
                self.flow,
                self.pgflow,
                Registry(self.database),
                Runner(self.flow, process, time.monotonic),
                self.report,
            )

    def finish(self, results: list[Result]) -> None:
        with self.finisher() as finisher:
            finisher.finish(results)

    def run(self, run_input: str = "1") -> bool:
        """Run the handler, with `tx`; whether it has used it."""
        with self.finisher() as finisher:
            return finisher.run_transactional(Task(claim(), f'{{"run": {run_input}}}'))

    @property
    def counts(self) -> dict[str, int]:
        names = ("completed", "retried", "snoozed", "failed", "discarded", "rescued")
        return {name: getattr(self.report, name) for name in names if getattr(self.report, name)}

    @property
    def told(self) -> list[str]:
        """What was done, in short names."""
        return [
            next((name for text, name in NAMES.items() if text in event), event)
            for event in self.database.events
        ]

    @property
    def recorded(self) -> list[tuple[object, object]]:
        """Outcome and error of the attempts that were stored beside the completed ones."""
        return [(args[6], args[8]) for args in self.database.kept(RECORD)]

    @property
    def stored(self) -> list[object]:
        """The indexes of the tasks that were completed or failed, each as often as it was."""
        several = [*self.database.kept(SEVERAL), *self.database.kept(MAP)]
        indexes: list[Any] = [index for args in several for index in list_of(args[4])]
        indexes += [args[4] for args in self.database.kept(COMPLETE)]
        indexes += [args[2] for args in self.database.kept(FAIL)]
        return sorted(indexes)


def list_of(value: object) -> list[Any]:
    assert isinstance(value, list)
    return value


def finished(
    *results: Result,
    answers: Mapping[str, Answer] | None = None,
    in_sets: frozenset[str] = frozenset(),
) -> Finished:
    finished = Finished(answers, in_sets=in_sets)
    left = list(results)
    finished.finish(left)
    assert left == []
    return finished


def ran(handler: Handler, answers: Mapping[str, Answer] | None = None) -> Finished:
    """A handler with `tx` was run."""
    finished = Finished(answers, handler=handler)
    finished.run('{"url": "http://x"}')
    return finished


def once(error: BaseException, answer: Answer) -> Callable[..., Any]:
    """Raises the error at its first call, then answers."""
    errors = [error]

    def answering(*args: object) -> Any:
        if errors:
            raise errors.pop()
        return answer(*args) if callable(answer) else answer

    return answering


# One task


def test_a_task_is_completed_in_a_transaction_of_its_own() -> None:
    one = finished(success())
    assert one.counts == {"completed": 1}
    assert one.told == ["[begin]", "complete", "[commit]"]
    assert one.database.ran(COMPLETE) == [
        ("f", "worker", RUN_ID, "only", 0, 1, STARTED_US, '"0"', 1.5, None)
    ]


def test_a_failed_attempt_is_reported_with_its_traceback() -> None:
    one = finished(failure())
    assert one.counts == {"retried": 1}
    assert one.told == FAILED
    assert one.database.ran(FAIL) == [(RUN_ID, "only", 0, "broken")]
    assert one.database.ran(RECORD) == [
        ("f", RUN_ID, "only", 0, "worker", 1, "failed", 1.5, "broken", "Traceback", "log")
    ]


@pytest.mark.parametrize(("after", "seconds"), [(0, 0), (1.5, 2), (60, 60)])
def test_a_task_that_asks_for_it_is_called_later_and_has_not_used_an_attempt(
    after: float, seconds: int
) -> None:
    one = finished(Result(claim(), Failure("not yet", "Traceback", after=after, is_snooze=True)))
    assert one.counts == {"snoozed": 1}
    assert one.told == [
        "[begin]",
        "lock run",
        "lock claim",
        "requeue",
        "show",
        "record",
        "[commit]",
    ]
    assert one.database.ran(SHOW) == [("f", [42], [seconds])]
    assert one.recorded == [("snoozed", "not yet")]
    [args] = one.database.ran(RECORD)
    assert args[9] is None  # it is not an error


def test_a_task_that_chooses_when_its_next_attempt_begins() -> None:
    one = finished(Result(claim(), Failure("busy", after=1.5)))
    assert one.counts == {"retried": 1}
    assert one.told == ["[begin]", "lock run", "lock claim", "fail", "show", "record", "[commit]"]
    assert one.database.ran(SHOW) == [("f", [42], [2])]
    assert one.recorded == [("failed", "busy")]


def test_a_task_without_attempts_that_are_left_chooses_in_vain() -> None:
    one = finished(
        Result(claim(), Failure("busy", after=5)), answers={FAIL: [{"status": "failed"}]}
    )
    assert one.counts == {"failed": 1}
    assert one.told == FAILED


@pytest.mark.parametrize("answers", [{LOCK_CLAIM: []}, {LOCK_RUN: [{"status": "failed"}]}])
def test_a_claim_that_is_lost_or_a_run_that_has_ended_is_not_called_later(
    answers: dict[str, Answer],
) -> None:
    snoozed = Result(claim(), Failure("not yet", after=5, is_snooze=True))
    one = finished(snoozed, answers=answers)
    assert one.counts == {"discarded": 1}
    assert "requeue" not in one.told


def test_the_claim_of_a_failed_attempt_is_checked_whole() -> None:
    assert finished(failure()).database.ran(LOCK_CLAIM) == [
        (RUN_ID, "only", 0, "worker", 1, STARTED_US)
    ]


def test_the_last_attempt_is_failed_for_good() -> None:
    assert finished(failure(), answers={FAIL: [{"status": "failed"}]}).counts == {"failed": 1}


def test_a_final_failure_takes_the_attempts_that_are_left() -> None:
    one = finished(failure(final=True), answers={FAIL: [{"status": "failed"}]})
    assert one.counts == {"failed": 1}
    assert one.told == [*FAILED[:3], "set attempts", "fail", "set attempts", *FAILED[4:]]
    assert [args[3] for args in one.database.ran("set attempts_count")] == [3, 1]


def test_a_lost_claim_is_discarded() -> None:
    one = finished(success(), answers={COMPLETE: [{"answer": "lost"}], LOCK_CLAIM: []})
    assert one.counts == {"discarded": 1}
    assert one.told == ["[begin]", "complete", "lock run", "lock claim", "record", "[commit]"]
    assert one.recorded == [("discarded", "another worker had taken the task")]


def test_a_failure_whose_claim_is_lost_is_discarded() -> None:
    one = finished(failure(), answers={LOCK_CLAIM: []})
    assert one.counts == {"discarded": 1}
    assert "fail" not in one.told


@pytest.mark.parametrize("result", [success(), failure()], ids=["success", "failure"])
@pytest.mark.parametrize("status", ["failed", "completed"])
def test_in_a_run_that_has_ended_no_task_stays_started(status: str, result: Result) -> None:
    ended: dict[str, Answer] = {LOCK_RUN: [{"status": status}], COMPLETE: [{"answer": "lost"}]}
    one = finished(result, answers=ended)
    error = f"the run had ended ({status}) before the handler did"
    assert one.counts == {"discarded": 1}
    assert one.database.kept(FAIL) == [(RUN_ID, "only", 0, error)]
    assert one.recorded == [("discarded", error)]


def test_a_run_that_is_gone_is_discarded() -> None:
    gone: dict[str, Answer] = {LOCK_RUN: [], LOCK_CLAIM: [], COMPLETE: [{"answer": "lost"}]}
    assert finished(success(), answers=gone).counts == {"discarded": 1}


def test_a_completion_that_pgflow_refuses_silently_is_a_failed_attempt() -> None:
    one = finished(success(), answers={COMPLETE: [{"answer": "refused"}]})
    assert one.counts == {"retried": 1}
    assert one.told == ["[begin]", "complete", "[rollback]", *FAILED]
    assert one.recorded == [("failed", 'result of step "only": pgflow refused it')]


def test_a_deadlock_stores_again() -> None:
    deadlock = DatabaseError("deadlock detected", "40P01")
    one = finished(success(), answers={COMPLETE: once(deadlock, [{"answer": "completed"}])})
    assert one.counts == {"completed": 1}
    assert one.told == ["[begin]", "complete", "[rollback]", "[begin]", "complete", "[commit]"]


def test_a_deadlock_that_stays_ends_the_call() -> None:
    one = Finished({COMPLETE: DatabaseError("deadlock detected", "40P01")})
    with pytest.raises(DatabaseError, match="deadlock detected"):
        one.finish([success()])
    assert one.told.count("complete") == CONFLICT_TRIES
    assert one.counts == {}


@pytest.mark.parametrize("sqlstate", ["53100", "55P03", "57P03", "XX000", "42501"])
def test_trouble_of_the_servers_ends_the_call(sqlstate: str) -> None:
    with pytest.raises(DatabaseError, match="trouble"):
        finished(success(), answers={COMPLETE: DatabaseError("trouble", sqlstate)})


@pytest.mark.parametrize("sqlstate", ["22P02", "23514", "54000", "P0001"])
def test_a_result_that_postgresql_refuses_is_the_tasks_failure(sqlstate: str) -> None:
    one = finished(success(), answers={COMPLETE: DatabaseError("too long", sqlstate)})
    assert one.counts == {"retried": 1}
    assert one.recorded == [("failed", 'result of step "only": too long')]


def test_nothing_to_finish_is_nothing_done() -> None:
    assert finished().told == []


# Several tasks


def test_completions_share_a_commit() -> None:
    three = finished(success(0), success(1), success(2, run_id=ANOTHER_RUN_ID))
    assert three.counts == {"completed": 3}
    assert three.told == ["[begin]", "complete several", "[commit]"]
    assert three.database.ran(SEVERAL) == [
        (
            *("f", "worker", [RUN_ID, RUN_ID, ANOTHER_RUN_ID], ["only"] * 3, [0, 1, 2]),
            *([1] * 3, [STARTED_US] * 3, ['"0"', '"1"', '"2"'], [1.5] * 3, [None] * 3),
        )
    ]


def test_failures_are_stored_each_alone_after_the_shared_commit() -> None:
    several = finished(success(0), failure(1), success(2), failure(3))
    assert several.counts == {"completed": 2, "retried": 2}
    assert several.told == ["[begin]", "complete several", "[commit]", *FAILED, *FAILED]
    assert several.stored == [0, 1, 2, 3]


ONE_BY_ONE = ["[begin]", "complete", "[commit]"] * 2


@pytest.mark.parametrize("place", [SEVERAL, "[commit]"])
@pytest.mark.parametrize("sqlstate", ["22P02", "40P01", "53100"])
def test_what_cannot_be_committed_together_is_stored_one_by_one(place: str, sqlstate: str) -> None:
    error = once(DatabaseError("trouble", sqlstate), completing() if place == SEVERAL else [])
    two = finished(success(0), success(1), answers={place: error})
    assert two.counts == {"completed": 2}
    assert two.report.notes == [f"tasks were stored one by one after an error ({sqlstate})"]
    assert two.told[two.told.index("[rollback]") + 1 :] == ONE_BY_ONE
    assert two.stored == [0, 1]


def test_a_group_in_which_pgflow_refuses_one_is_undone_and_stored_one_by_one() -> None:
    def answer(*args: Any) -> list[Row]:
        return [{"answer": "refused" if args[4] == 1 else "completed"}]

    refusing: dict[str, Answer] = {SEVERAL: completing("completed", "refused"), COMPLETE: answer}
    three = finished(success(0), success(1), success(2), answers=refusing)
    assert three.told[:3] == ["[begin]", "complete several", "[rollback]"]
    assert three.counts == {"completed": 2, "retried": 1}
    assert three.recorded == [("failed", 'result of step "only": pgflow refused it')]
    assert three.stored == [0, 1, 2]
    assert three.report.notes == []


def test_a_claim_that_is_lost_in_a_group_does_not_undo_the_others() -> None:
    losing: dict[str, Answer] = {
        SEVERAL: completing("completed", "lost"),
        COMPLETE: [{"answer": "lost"}],
        LOCK_CLAIM: [],
    }
    three = finished(success(0), success(1), success(2), answers=losing)
    assert three.counts == {"completed": 2, "discarded": 1}
    assert three.told[:3] == ["[begin]", "complete several", "[commit]"]
    assert [args[3] for args in three.database.kept(RECORD)] == [1]
    assert "[rollback]" not in three.told


def test_trouble_that_stays_keeps_what_was_stored_before() -> None:
    def answer(*args: Any) -> list[Row]:
        if args[4] == 1:
            raise DatabaseError("disk full", "53100")
        return [{"answer": "completed"}]

    three = Finished({SEVERAL: DatabaseError("disk full", "53100"), COMPLETE: answer})
    results = [success(0), success(1), success(2)]
    with pytest.raises(DatabaseError, match="disk full"):
        three.finish(results)
    assert three.stored == [0]
    assert three.counts == {"completed": 1}
    assert results == [success(1), success(2)]


def test_trouble_with_one_group_keeps_no_other_from_being_stored() -> None:
    trouble: dict[str, Answer] = {
        SEVERAL: DatabaseError("disk full", "53100"),
        COMPLETE: DatabaseError("disk full", "53100"),
    }
    several = Finished(trouble, in_sets=frozenset({"each"}))
    results = [failure(0), success(1), success(2, "each"), success(3), success(4, "each")]
    with pytest.raises(DatabaseError, match="disk full"):
        several.finish(results)
    assert several.stored == [0, 2, 4]
    assert several.counts == {"completed": 2, "retried": 1}
    assert results == [success(1), success(3)]


def test_the_first_of_several_errors_is_raised() -> None:
    numbers = iter(range(3))

    def fail(*_: object) -> NoReturn:
        raise DatabaseError(f"trouble {next(numbers)}", "53100")

    three = Finished({FAIL: fail})
    results = [failure(0), failure(1), success(2), failure(3)]
    with pytest.raises(DatabaseError, match="trouble 0"):
        three.finish(results)
    assert three.stored == [2]
    assert results == [failure(0), failure(1), failure(3)]


def test_what_was_left_can_be_stored_later() -> None:
    two = Finished({FAIL: once(DatabaseError("trouble", "53100"), [{"status": "queued"}])})
    results = [failure(0), success(1)]
    with pytest.raises(DatabaseError, match="trouble"):
        two.finish(results)
    two.finish(results)
    assert results == []
    assert two.stored == [0, 1]
    assert two.counts == {"completed": 1, "retried": 1}


# The tasks of a map

EACH = frozenset({"each", "all"})


def test_a_maps_tasks_are_completed_together_for_each_run_and_step() -> None:
    one, two, three = (RUN_ID, "each"), (ANOTHER_RUN_ID, "each"), (RUN_ID, "all")
    order = [one, two, one, three, two, one]
    results = [success(n, step, run) for n, (run, step) in enumerate(order)]
    several = finished(*results, success(6), in_sets=EACH)
    assert several.counts == {"completed": 7}
    told = [
        (set(zip(list_of(args[2]), list_of(args[3]), strict=True)), args[4])
        for args in several.database.kept(MAP)
    ]
    assert sorted(told, key=lambda one: list_of(one[1])) == [
        ({one}, [0, 2, 5]),
        ({two}, [1, 4]),
        ({three}, [3]),
    ]
    assert several.told.count("complete map") == 3
    assert several.told[-3:] == ["[begin]", "complete", "[commit]"]


def test_a_maps_task_alone_is_completed_as_one_of_a_map() -> None:
    one = finished(success(0, "each"), in_sets=EACH)
    assert one.told == [
        "[begin]",
        "complete map",
        "[commit]",
    ]


def test_a_maps_failures_are_stored_each_alone() -> None:
    broken = Result(claim(1, "each"), Failure("broken"))
    two = finished(success(0, "each"), broken, in_sets=EACH)
    assert two.told == ["[begin]", "complete map", "[commit]", *FAILED]
    assert two.counts == {"completed": 1, "retried": 1}


def test_a_maps_task_that_was_not_completed_with_the_others_is_looked_at_alone() -> None:
    losing: dict[str, Answer] = {
        MAP: [{"place": place, "answer": "completed"} for place in (3, 1)],
        COMPLETE: [{"answer": "lost"}],
        LOCK_CLAIM: [],
    }
    three = finished(*(success(n, "each") for n in range(3)), answers=losing, in_sets=EACH)
    assert three.counts == {"completed": 2, "discarded": 1}
    assert [args[3] for args in three.database.kept(RECORD)] == [1]


def test_a_map_whose_last_task_pgflow_refuses_is_undone_and_stored_one_by_one() -> None:
    refusing = {MAP: completing("completed", "refused")}
    two = finished(success(0, "each"), success(1, "each"), answers=refusing, in_sets=EACH)
    assert two.told == ["[begin]", "complete map", "[rollback]", *ONE_BY_ONE]


def test_a_maps_tasks_that_cannot_be_committed_together_are_stored_one_by_one() -> None:
    error = DatabaseError("too long", "54000")
    two = finished(success(0, "each"), success(1, "each"), answers={MAP: error}, in_sets=EACH)
    assert two.told == ["[begin]", "complete map", "[rollback]", *ONE_BY_ONE]
    assert two.stored == [0, 1]
    assert two.report.notes == ["tasks were stored one by one after an error (54000)"]


@pytest.mark.parametrize("sqlstate", ["40001", "40P01", "22P02", "23514", "54000", "P0001"])
def test_after_a_conflict_and_what_is_the_results_fault_maps_are_still_completed_in_sets(
    sqlstate: str,
) -> None:
    results = [success(n, "each") for n in range(2)]
    two = finished(*results, answers={MAP: DatabaseError("no", sqlstate)}, in_sets=EACH)
    assert two.pgflow.in_sets == EACH


@pytest.mark.parametrize("sqlstate", ["42501", "42703", "53100", "XX000"])
def test_after_another_error_maps_are_not_completed_in_sets_any_more(sqlstate: str) -> None:
    four = finished(
        *(success(n, "each") for n in range(2)),
        *(success(n, "each", ANOTHER_RUN_ID) for n in range(2, 4)),
        answers={MAP: once(DatabaseError("no", sqlstate), completing())},
        in_sets=EACH,
    )
    assert four.pgflow.in_sets == frozenset()
    assert four.told == [
        *("[begin]", "complete map", "[rollback]", *ONE_BY_ONE),
        *("[begin]", "complete several", "[commit]"),
    ]
    assert four.stored == [0, 1, 2, 3]
    assert four.report.notes == [f"tasks were stored one by one after an error ({sqlstate})"]


# Cancels

MIXED = (
    *(success(0), failure(1), success(2)),
    *(success(3, "each"), success(4, "each"), success(5, "each", ANOTHER_RUN_ID)),
)


def places(answers: Mapping[str, Answer] | None = None) -> list[int]:
    """Where a cancel can be met while they are finished."""
    events = finished(*MIXED, answers=answers, in_sets=EACH).database.events
    return [number for number, event in enumerate(events, 1) if event != "[rollback]"]


@pytest.mark.parametrize("at", places())
def test_a_cancel_is_raised_when_everything_is_stored_once(at: int) -> None:
    one = Finished(in_sets=EACH, errors_at={at: QueryCanceled("now")})
    results = list(MIXED)
    with pytest.raises(QueryCanceled, match="now"):
        one.finish(results)
    assert results == []
    assert one.stored == [0, 1, 2, 3, 4, 5]
    assert one.counts == {"completed": 5, "retried": 1}


TROUBLE: dict[str, Answer] = {
    SEVERAL: DatabaseError("too long", "54000"),
    MAP: DatabaseError("too long", "54000"),
}


@pytest.mark.parametrize("at", places(TROUBLE))
def test_a_cancel_while_tasks_are_stored_one_by_one_stores_none_twice(at: int) -> None:
    one = Finished(TROUBLE, in_sets=EACH, errors_at={at: QueryCanceled("now")})
    with pytest.raises(QueryCanceled):
        one.finish(list(MIXED))
    assert one.stored == [0, 1, 2, 3, 4, 5]
    assert one.counts == {"completed": 5, "retried": 1}


@pytest.mark.parametrize("first", places()[:-1])
@pytest.mark.parametrize("later", [1, 2, 4])
def test_a_second_cancel_gives_up(first: int, later: int) -> None:
    cancels = {first: QueryCanceled("first"), first + later: QueryCanceled("second")}
    one = Finished(in_sets=EACH, errors_at=cancels)
    # One at what is not done any more is never met.
    results = list(MIXED)
    with pytest.raises(QueryCanceled) as caught:
        one.finish(results)
    if str(caught.value) == "second":
        assert len(one.database.events) <= first + later + 1
        assert len(one.stored) < len(MIXED)
    assert len(set(one.stored)) == len(one.stored) == sum(one.counts.values())
    left = {result.claim.task_index for result in results}
    assert left == {0, 1, 2, 3, 4, 5}.difference(one.stored)


def test_a_second_cancel_is_the_one_that_is_raised() -> None:
    one = Finished({COMPLETE: QueryCanceled("again")})
    with pytest.raises(QueryCanceled, match="again"):
        one.finish([success()])
    assert one.told == ["[begin]", "complete", "[rollback]"] * 2


# With tx


def saving(flow_input: Any, tx: Transaction) -> Any:
    tx.execute("insert into t default values")
    return flow_input


def failing_with_tx(tx: Transaction) -> NoReturn:
    tx.execute("insert into t default values")
    raise ValueError("broken")


def test_a_handlers_sql_and_its_completion_are_one_transaction() -> None:
    one = ran(saving)
    assert one.counts == {"completed": 1}
    assert one.told == ["[begin handler's]", "[end handler's part]", "complete", "[commit]"]
    assert one.database.queries == [("insert into t default values", [])]
    [args] = one.database.ran(COMPLETE)
    assert args[7] == '{"url":"http://x"}'


def test_a_handler_that_ran_no_sql_has_nothing_to_check() -> None:
    def handler(tx: Transaction) -> None: ...

    assert "[end unused handler's part]" in ran(handler).told


def test_it_is_told_whether_a_handler_has_used_tx() -> None:
    def handler(flow_input: bool, tx: Transaction) -> None:
        if flow_input:
            tx.execute("insert into t default values")

    one = Finished(handler=handler)
    assert [one.run("true"), one.run("false")] == [True, False]


@pytest.mark.parametrize("answer", ["lost", "refused"])
def test_a_handler_whose_sql_was_undone_has_used_tx_all_the_same(answer: str) -> None:
    # It may have released a lock, which is not undone.
    for handler in (saving, failing_with_tx):
        one = Finished({COMPLETE: [{"answer": answer}]}, handler=handler)
        assert one.run()


def test_a_handler_that_used_tx_only_before_a_conflict_has_used_it() -> None:
    calls: list[int] = []

    def handler(tx: Transaction) -> None:
        calls.append(1)
        if len(calls) == 1:
            tx.execute("select pg_advisory_unlock_all()")
            raise DatabaseError("conflict", "40001")

    one = Finished(handler=handler)
    assert one.run()
    assert len(calls) == 2


UNDONE = ["[begin handler's]", "[rollback]"]


def test_a_failed_handlers_sql_is_rolled_back_before_the_failure_is_stored() -> None:
    one = ran(failing_with_tx)
    assert one.counts == {"retried": 1}
    assert one.told == [*UNDONE, *FAILED]
    [(_, error)] = one.recorded
    assert str(error).startswith("ValueError: broken (test_finisher.py:")


def test_a_handler_with_tx_can_fail_for_good() -> None:
    def handler(tx: Transaction) -> None:
        raise Fail("never")

    one = ran(handler, {FAIL: [{"status": "failed"}]})
    assert one.counts == {"failed": 1}
    assert [args[3] for args in one.database.ran("set attempts_count")] == [3, 1]


def test_a_handler_with_tx_can_be_called_later() -> None:
    def handler(tx: Transaction) -> None:
        tx.execute("insert into t default values")
        raise Snooze("not yet", after=5)

    one = ran(handler)
    assert one.counts == {"snoozed": 1}
    assert one.told[:2] == UNDONE
    [(outcome, error)] = one.recorded
    assert outcome == "snoozed"
    assert str(error).startswith("not yet (test_finisher.py:")


def test_a_lost_claim_rolls_the_handlers_sql_back() -> None:
    one = ran(saving, {COMPLETE: [{"answer": "lost"}], LOCK_CLAIM: []})
    assert one.counts == {"discarded": 1}
    assert one.told == [
        *("[begin handler's]", "[end handler's part]", "complete", "[rollback]"),
        *("[begin]", "lock run", "lock claim", "record", "[commit]"),
    ]


def test_what_was_undone_is_never_stored_as_a_success() -> None:
    # Should the claim be ours again when it is looked at the second time.
    one = ran(saving, {COMPLETE: [{"answer": "lost"}]})
    assert one.counts == {"retried": 1}
    assert one.told.count("complete") == 1
    assert one.recorded == [
        ("failed", "the task was not completed, and the handler's SQL was undone")
    ]


def test_a_refused_completion_rolls_the_handlers_sql_back() -> None:
    one = ran(saving, {COMPLETE: [{"answer": "refused"}]})
    assert one.told.index("[rollback]") < one.told.index("fail")
    assert one.recorded == [("failed", 'result of step "only": pgflow refused it')]


def test_a_deferred_constraint_is_the_handlers_failure() -> None:
    violation = DatabaseError("violates foreign key constraint", "23503")
    one = ran(saving, {"[end handler's part]": violation})
    assert one.counts == {"retried": 1}
    [(kind, error)] = one.recorded
    assert kind == "failed"
    assert str(error).startswith("DatabaseError: violates foreign key constraint")
    assert "complete" not in one.told


@pytest.mark.parametrize("sqlstate", ["40001", "40P01"])
def test_after_a_conflict_and_a_pause_the_handler_runs_again(
    sqlstate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[int] = []
    monkeypatch.setattr(finisher, "pause_before_retry", pauses.append)
    calls: list[int] = []

    def handler(tx: Transaction) -> int:
        calls.append(1)
        if len(calls) < 3:
            raise DatabaseError("conflict", sqlstate)
        return len(calls)

    one = ran(handler)
    assert (one.counts, len(calls)) == ({"completed": 1}, 3)
    assert one.recorded == []
    assert pauses == [1, 2]


@pytest.mark.parametrize("place", ["[end handler's part]", COMPLETE, "[commit]"])
def test_after_a_conflict_with_its_completion_the_handler_runs_again(place: str) -> None:
    calls: list[int] = []

    def handler(tx: Transaction) -> None:
        tx.execute("insert into t default values")
        calls.append(1)

    conflict = DatabaseError("conflict", "40001")
    one = ran(handler, {place: once(conflict, [{"answer": "completed"}])})
    assert (one.counts, len(calls)) == ({"completed": 1}, 2)


def test_a_conflict_that_stays_is_a_failed_attempt() -> None:
    calls: list[int] = []

    def handler(tx: Transaction) -> None:
        calls.append(1)
        raise DatabaseError("conflict", "40P01")

    one = ran(handler)
    assert (one.counts, len(calls)) == ({"retried": 1}, CONFLICT_TRIES)
    [(_, error)] = one.recorded
    assert str(error).startswith("DatabaseError: conflict")


@pytest.mark.parametrize("sqlstate", ["0A000", "25001", "42501", "P0001"])
def test_a_transaction_in_which_nothing_can_be_completed_is_the_handlers(sqlstate: str) -> None:
    one = ran(saving, {"[commit]": once(DatabaseError("no", sqlstate), [])})
    assert one.counts == {"retried": 1}
    assert one.recorded == [("failed", "completing the task: no")]


@pytest.mark.parametrize("sqlstate", ["08006", "53100", "55P03", "57P03", "58030", "XX000"])
def test_trouble_of_the_servers_after_a_handler_with_tx_ends_the_call(sqlstate: str) -> None:
    one = Finished({"[commit]": DatabaseError("trouble", sqlstate)}, handler=saving)
    with pytest.raises(DatabaseError, match="trouble"):
        one.run()
    assert one.counts == {}
    assert "fail" not in one.told


def test_tx_is_closed_when_its_handler_has_returned() -> None:
    kept: list[Transaction] = []

    def handler(tx: Transaction) -> None:
        kept.append(tx)

    ran(handler)
    with pytest.raises(RuntimeError, match="tx was used after its handler had returned"):
        kept[0].execute("select 1")


def test_a_cancel_in_a_handlers_sql_fails_the_attempt_and_ends_the_call() -> None:
    def handler(tx: Transaction) -> None:
        raise QueryCanceled("canceling statement")

    one = Finished(handler=handler)
    with pytest.raises(QueryCanceled):
        one.run()
    assert one.told == [*UNDONE, *FAILED]
    assert one.recorded == [("failed", "canceled: canceling statement")]
    assert one.counts == {"retried": 1}


def test_a_cancel_while_a_handlers_task_is_completed_fails_the_attempt() -> None:
    one = Finished({COMPLETE: QueryCanceled("canceling statement")}, handler=saving)
    with pytest.raises(QueryCanceled):
        one.run()
    assert one.told[-len(FAILED) :] == FAILED
    assert one.stored == [0]


def test_a_cancel_that_a_handler_did_not_let_through_is_one_all_the_same() -> None:
    def handler(tx: Transaction) -> str:
        with suppress(QueryCanceled):
            tx.execute("select 1")
        return "done"

    one = Finished({"select 1": QueryCanceled("canceling statement")}, handler=handler)
    with pytest.raises(QueryCanceled):
        one.run()
    assert one.told == [*UNDONE, *FAILED]
    assert one.recorded == [("failed", "canceled: canceling statement")]


@pytest.mark.parametrize(("answer", "text"), [("own", "due to statement timeout"), (None, "so")])
def test_postgresql_says_why_a_handler_was_interrupted(answer: str | None, text: str) -> None:
    def handler(tx: Transaction) -> None:
        raise Interrupted("so")

    answers: dict[str, Answer] = {"[check interrupts]": QueryCanceled(text)} if answer else {}
    one = Finished(answers, handler=handler)
    with pytest.raises(QueryCanceled, match=text):
        one.run()
    assert one.told == [*UNDONE, "[check interrupts]", *FAILED]
    assert one.recorded == [("failed", f"canceled: {text}")]
