"""Tasks of dead workers: queued again, or failed when they have cost too many."""

import pytest

from pgflow_worker.database import Row
from pgflow_worker.errors import QueryCanceled
from pgflow_worker.pgflow import Claim, Pgflow
from pgflow_worker.registry import Registry, Slot
from pgflow_worker.report import Report
from pgflow_worker.rescue import Rescuer
from tests.unit.fakes import Answer, FakeDatabase

OWN = Slot(1, True, "own worker", 101, 4711)

COUNT = "as attempts from pgflow_worker.attempts"

NAMES = {
    "pg_try_advisory_lock": "lock slot",
    "pg_advisory_unlock": "unlock slot",
    "from pgflow.runs where run_id = $1 for update": "lock run",
    "state.status as step_status": "lock claim",
    "set status = 'queued'": "requeue",
    "pgflow.fail_task": "fail",
    "insert into pgflow_worker.attempts": "record",
}


def orphan(**fields: object) -> dict[str, object]:
    return {
        "message_id": 42,
        "run_id": "run",
        "step_slug": "a",
        "task_index": 0,
        "worker_id": "worker",
        "attempts_count": 1,
        "started_us": 5,
        "max_attempts": 3,
        "timeout": 60,
        **fields,
    }


def database_with(
    orphans: dict[str, list[dict[str, object]]], answers: dict[str, Answer] | None = None
) -> FakeDatabase:
    """What is started, by the worker's name."""
    usual: dict[str, Answer] = {
        "task.last_worker_id = $2": lambda _, worker: orphans.get(worker, []),
        "for update": [{"status": "started", "step_status": "started"}],
        COUNT: [{"attempts": 1}],
        "as living": [{"living": True}],
        "set status = 'queued'": [{"message_id": 42}],
        "pgflow.fail_task": [{"status": "failed"}],
        "pg_try_advisory_lock": [{"locked": True}],
    }
    first = answers or {}
    return FakeDatabase(first | {text: usual[text] for text in usual if text not in first})


def rescue(database: FakeDatabase) -> Report:
    report = Report("completed", "f", "batch", 10, 5)
    Rescuer(database, Pgflow(database, "f"), Registry(database), report).rescue(OWN)
    return report


def told(database: FakeDatabase) -> list[str]:
    return [name for event in database.events for text, name in NAMES.items() if text in event]


def test_nothing_to_rescue_is_nothing_written() -> None:
    database = database_with({})
    assert not rescue(database).did_something
    assert told(database) == []


def test_an_orphan_is_queued_again_and_the_death_noted() -> None:
    database = database_with({"own worker": [orphan()]})
    assert rescue(database).rescued == 1
    assert told(database) == ["lock run", "lock claim", "record", "requeue"]
    [args] = database.ran("insert into pgflow_worker.attempts")
    assert args[6] == "died"
    assert args[8] == "the worker died while it ran this task (attempt 1)"


def test_of_several_orphans_each_is_suspected_and_none_counted_as_a_death() -> None:
    recorded: list[object] = []
    several = [orphan(task_index=index, message_id=index) for index in range(3)]

    def record(*args: object) -> list[Row]:
        recorded.append(args[6])
        return []

    database = database_with(
        {"own worker": several},
        {
            COUNT: lambda *_: [{"attempts": recorded.count("died")}],
            "insert into pgflow_worker.attempts": record,
            "from pgflow_worker.settings": [{"name": "max_deaths", "value": "1"}],
        },
    )
    assert rescue(database).rescued == 3
    assert told(database) == ["lock run", "lock claim", "record", "requeue"] * 3
    assert recorded == ["suspected"] * 3
    assert {args[8] for args in database.kept("insert into pgflow_worker.attempts")} == {
        "the worker died while it had this task (attempt 1)"
    }


def test_of_several_orphans_those_with_one_attempt_fail() -> None:
    several = [orphan(max_attempts=attempts, task_index=attempts) for attempts in (1, 2)]
    report = rescue(database := database_with({"own worker": several}))
    assert (report.rescued, report.failed) == (1, 1)
    assert [args[2] for args in database.ran("pgflow.fail_task")] == [1]
    outcomes = [args[6] for args in database.ran("insert into pgflow_worker.attempts")]
    assert outcomes == ["suspected"] * 2


def test_each_dead_workers_tasks_are_counted_for_themselves() -> None:
    orphans = {
        "own worker": [orphan(task_index=1)],
        "dead": [orphan(task_index=index) for index in (2, 3)],
        "retired": [orphan(task_index=4)],
    }
    database = database_with(orphans, {"_slots($1)": SLOTS})
    assert rescue(database).rescued == 4
    recorded = [(args[3], args[6]) for args in database.ran("insert into pgflow_worker.attempts")]
    assert recorded == [(1, "died"), (2, "suspected"), (3, "suspected"), (4, "died")]


def stalled(**fields: object) -> dict[str, Answer]:
    """What another kind of worker has left started."""
    return {"_stalled_tasks($1)": [orphan(**fields)]}


@pytest.mark.parametrize("worker_id", ["stranger", None])
def test_what_another_kind_of_worker_has_left_is_queued_again_and_only_suspected(
    worker_id: str | None,
) -> None:
    max_deaths = {"from pgflow_worker.settings": [{"name": "max_deaths", "value": "1"}]}
    answers = stalled(worker_id=worker_id) | dict[str, Answer](max_deaths) | {COUNT: MANY}
    database = database_with({}, answers)
    assert rescue(database).rescued == 1
    assert told(database) == ["lock run", "lock claim", "record", "requeue"]
    [args] = database.ran("insert into pgflow_worker.attempts")
    assert (args[4], args[6]) == (worker_id, "suspected")
    assert args[8] == "another worker left this task started (attempt 1)"


def test_what_another_kind_of_worker_has_left_never_runs_twice_if_it_must_not() -> None:
    database = database_with({}, stalled(max_attempts=1))
    assert rescue(database).failed == 1
    [args] = database.ran("pgflow.fail_task")
    assert args[3] == "another worker left this task started (attempt 1)"


# The server's crash

CRASHED: dict[str, Answer] = {"as living": [{"living": False}]}
MANY: Answer = [{"attempts": 100}]


@pytest.mark.parametrize("number", [1, 3])
def test_what_was_started_when_the_server_crashed_is_queued_again(number: int) -> None:
    orphans = [orphan(task_index=index) for index in range(number)]
    database = database_with({"own worker": orphans}, CRASHED)
    assert rescue(database).rescued == number
    assert told(database) == ["lock run", "lock claim", "record", "requeue"] * number
    recorded = database.ran("insert into pgflow_worker.attempts")
    assert {args[6] for args in recorded} == {"crashed"}
    assert {args[8] for args in recorded} == {
        "the server crashed while this task was started (attempt 1)"
    }
    assert database.ran("pgflow_worker.pause") == []
    assert database.ran(COUNT) == [("run", "a", index, "crashed") for index in range(number)]


@pytest.mark.parametrize(
    ("crashes", "settings", "fails"),
    [
        (1, [], False),
        (2, [], True),
        (1, [{"name": "max_crashes", "value": "1"}], True),
        (4, [{"name": "max_crashes", "value": "5"}], False),
        (2, [{"name": "max_deaths", "value": "1"}, {"name": "max_crashes", "value": "3"}], False),
    ],
)
def test_what_has_crashed_the_server_too_often_fails_and_its_flow_is_paused(
    crashes: int, settings: list[Row], fails: bool
) -> None:
    answers: dict[str, Answer] = {
        COUNT: [{"attempts": crashes}],
        "from pgflow_worker.settings": settings,
    }
    report = rescue(database := database_with({"own worker": [orphan()]}, CRASHED | answers))
    assert (report.rescued, report.failed) == (1 - fails, fails)
    if fails:
        [args] = database.kept("pgflow_worker.pause")
        assert args[0] == "f"
        assert args[1] == (
            f'the server crashed {crashes} times while step "a" ran (run run); paused by the worker'
        )
        [args] = database.kept("pgflow.fail_task")
        assert args[3] == (
            f"the server crashed while this task was started (attempt 1); crashes: {crashes}"
        )


def test_a_task_with_one_attempt_fails_at_the_servers_first_crash() -> None:
    database = database_with({"own worker": [orphan(max_attempts=1)]}, CRASHED)
    assert rescue(database).failed == 1
    assert database.ran("pgflow_worker.pause") == []


def test_whether_the_server_has_crashed_is_asked_only_of_a_worker_that_left_something() -> None:
    database = database_with({"dead": [orphan()]}, {"_slots($1)": SLOTS})
    rescue(database)
    assert database.ran("as living") == [("dead",)]


def test_several_orphans_are_suspected_however_many_deaths_there_were() -> None:
    orphans = [orphan(task_index=index) for index in range(2)]
    database = database_with({"own worker": orphans}, {COUNT: MANY})
    assert rescue(database).rescued == 2
    assert database.ran(COUNT) == []


@pytest.mark.parametrize(
    ("deaths", "settings", "rescued"),
    [
        (2, [], 1),
        (3, [], 0),
        (1, [{"name": "max_deaths", "value": "1"}], 0),
        (4, [{"name": "max_deaths", "value": "5"}], 1),
    ],
)
def test_a_task_that_has_cost_too_many_workers_fails(
    deaths: int, settings: list[dict[str, object]], rescued: int
) -> None:
    database = database_with(
        {"own worker": [orphan()]},
        {COUNT: [{"attempts": deaths}], "from pgflow_worker.settings": settings},
    )
    report = rescue(database)
    assert (report.rescued, report.failed) == (rescued, 1 - rescued)
    if not rescued:
        [args] = database.ran("pgflow.fail_task")
        assert str(args[3]).endswith(f"; deaths: {deaths}")


def test_a_task_with_one_attempt_never_runs_twice() -> None:
    report = rescue(database := database_with({"own worker": [orphan(max_attempts=1)]}))
    assert (report.rescued, report.failed) == (0, 1)
    assert "requeue" not in told(database)


def test_a_task_of_a_run_that_has_ended_is_not_queued() -> None:
    run = {"from pgflow.runs where run_id = $1 for update": [{"status": "failed"}]}
    report = rescue(database_with({"own worker": [orphan()]}, dict(run)))
    assert (report.rescued, report.failed) == (0, 1)


def test_a_claim_that_is_no_longer_the_dead_workers_is_left_alone() -> None:
    database = database_with({"own worker": [orphan()]}, {"state.status as step_status": []})
    assert rescue(database).discarded == 1
    assert told(database) == ["lock run", "lock claim"]


SLOTS = [
    {"slot": 1, "enabled": True, "worker_id": "own worker", "lock_key": 101, "pid": 4711},
    {"slot": 2, "enabled": True, "worker_id": "alive", "lock_key": 102, "pid": 4712},
    {"slot": 3, "enabled": True, "worker_id": "dead", "lock_key": 103, "pid": None},
    {"slot": 4, "enabled": False, "worker_id": "retired", "lock_key": 104, "pid": None},
    {"slot": 5, "enabled": True, "worker_id": "idle", "lock_key": 105, "pid": None},
]
EVERYBODYS = {
    "alive": [orphan(message_id=2)],
    "dead": [orphan(message_id=3)],
    "retired": [orphan(message_id=4)],
}


def test_free_slots_are_rescued_under_their_lock_and_held_ones_left_alone() -> None:
    database = database_with(dict(EVERYBODYS), {"_slots($1)": SLOTS})
    assert rescue(database).rescued == 2
    assert database.ran("pg_try_advisory_lock") == [(103,), (104,)]
    assert database.ran("pg_advisory_unlock") == [(103,), (104,)]
    one = ["lock slot", "lock run", "lock claim", "record", "requeue", "unlock slot"]
    assert told(database) == one * 2


def test_a_slot_that_somebody_takes_at_the_moment_is_left_to_him() -> None:
    database = database_with(
        dict(EVERYBODYS), {"_slots($1)": SLOTS, "pg_try_advisory_lock": [{"locked": False}]}
    )
    assert not rescue(database).did_something
    assert "unlock slot" not in told(database)


def test_a_slot_is_unlocked_whatever_happens() -> None:
    database = database_with(dict(EVERYBODYS), {"_slots($1)": SLOTS, COUNT: QueryCanceled("no")})
    with pytest.raises(QueryCanceled, match="no"):
        rescue(database)
    assert database.ran("pg_advisory_unlock") == [(103,)]


def test_what_is_given_back_is_nobodys_death() -> None:
    database = database_with({})
    report = Report("completed", "f", "batch", 10, 5)
    claims = [Claim("run", "a", index, "own worker", 1, 5, 42, 3, 60) for index in range(2)]
    Rescuer(database, Pgflow(database, "f"), Registry(database), report).give_back(claims)
    assert told(database) == ["lock run", "requeue"] * 2
