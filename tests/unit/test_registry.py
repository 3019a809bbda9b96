"""The extension's own tables, and the locks that a session holds."""

import pytest

from pgflow_worker.database import Row
from pgflow_worker.errors import DatabaseError
from pgflow_worker.pgflow import Claim
from pgflow_worker.registry import LeftBehind, Registry
from tests.unit.fakes import Answer, FakeDatabase

LOCK, UNLOCK = "pg_try_advisory_lock", "pg_advisory_unlock"
SUSPECTS = 77
FREE: dict[str, Answer] = {
    LOCK: [{"locked": True}],
    "pgflow_worker/suspects": [{"lock_key": SUSPECTS}],
}


# Locks


def test_locks_are_released_in_the_reverse_order() -> None:
    database = FakeDatabase(FREE)
    registry = Registry(database)
    for key in (1, 2, 3):
        assert registry.try_lock(key)
    registry.unlock(2)
    registry.unlock_all()
    registry.unlock_all()
    assert database.ran(UNLOCK) == [(2,), (3,), (1,)]


def test_a_lock_that_another_session_has_is_not_ours_to_release() -> None:
    database = FakeDatabase({LOCK: [{"locked": False}]})
    registry = Registry(database)
    assert not registry.try_lock(1)
    registry.unlock_all()
    assert database.ran(UNLOCK) == []


def test_a_lock_that_cannot_be_released_is_still_known() -> None:
    database = FakeDatabase(FREE)
    registry = Registry(database)
    registry.try_lock(1)
    database.answers[UNLOCK] = DatabaseError("disk full", "53100")
    with pytest.raises(DatabaseError):
        registry.unlock_all()
    del database.answers[UNLOCK]
    registry.unlock_all()
    assert database.ran(UNLOCK) == [(1,)] * 2


def test_what_handlers_have_left_is_what_is_not_ours() -> None:
    told: list[tuple[str, list[int]]] = []

    def look(keys: list[int]) -> list[Row]:
        told.append(("look", list(keys)))
        return [{"lost": False, "locks": 2, "temporary": True}]

    def release(keys: list[int]) -> list[Row]:
        told.append(("release", list(keys)))
        return []

    registry = Registry(
        FakeDatabase(FREE | {"_left_behind($1)": look, "_release_locks($1)": release})
    )
    assert registry.left_behind() == LeftBehind(lost=False, locks=2, temporary=True)
    registry.try_lock(1)
    registry.try_lock_suspects()
    registry.left_behind()
    registry.release_foreign_locks()
    registry.unlock_suspects()
    registry.left_behind()
    assert told == [
        *(("look", []), ("look", [1, SUSPECTS]), ("release", [1, SUSPECTS]), ("look", [1]))
    ]


def test_the_suspects_lock_is_taken_once_and_is_one_of_ours() -> None:
    database = FakeDatabase(FREE)
    registry = Registry(database)
    registry.unlock_suspects()
    assert database.events == []
    assert registry.try_lock_suspects()
    assert registry.try_lock_suspects()
    assert database.ran(LOCK) == [(SUSPECTS,)]
    registry.unlock_suspects()
    registry.unlock_suspects()
    assert database.ran(UNLOCK) == [(SUSPECTS,)]
    assert registry.try_lock_suspects()
    registry.unlock_all()
    assert database.ran(UNLOCK) == [(SUSPECTS,)] * 2
    assert len(database.ran("pgflow_worker/suspects")) == 1


def test_the_suspects_lock_may_be_anothers() -> None:
    database = FakeDatabase(FREE | {LOCK: [{"locked": False}]})
    registry = Registry(database)
    assert not registry.try_lock_suspects()
    assert not registry.try_lock_suspects()
    registry.unlock_suspects()
    assert database.ran(UNLOCK) == []


# Deaths

CLAIM = Claim("run", "step", 3, None, 2, 1, 42, 3, 60)


@pytest.mark.parametrize("outcome", ["died", "suspected", "crashed"])
def test_attempts_are_counted_by_their_outcome(outcome: str) -> None:
    database = FakeDatabase({"as attempts from": [{"attempts": 5}]})
    assert Registry(database).count_attempts(CLAIM, outcome) == 5
    assert database.ran("as attempts from") == [("run", "step", 3, outcome)]


def test_an_attempt_may_have_had_no_worker() -> None:
    database = FakeDatabase()
    Registry(database).record_attempt("f", CLAIM, "suspected", error="left")
    [args] = database.ran("insert into pgflow_worker.attempts")
    assert args == ("f", "run", "step", 3, None, 2, "suspected", None, "left", None, None)


@pytest.mark.parametrize("living", [True, False])
def test_the_living_are_known(living: bool) -> None:
    database = FakeDatabase({"as living": [{"living": living}]})
    registry = Registry(database)
    registry.set_living("worker")
    assert registry.is_living("worker") is living
    assert database.ran("into pgflow_worker.living") == [("worker",)]


def test_a_flow_can_be_paused() -> None:
    database = FakeDatabase()
    Registry(database).pause("f", "reason")
    assert database.ran("pgflow_worker.pause") == [("f", "reason")]
