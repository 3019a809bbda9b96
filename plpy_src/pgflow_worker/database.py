"""The database as the worker sees it: the seam between this package and PL/Python."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pgflow_worker.errors import DatabaseError, Interrupted, QueryCanceled

CONFLICTS = ("40001", "40P01")  # serialization failure, deadlock: worth another try
CONFLICT_TRIES = 5

T = TypeVar("T")
Row = dict[str, Any]


@dataclass(frozen=True)
class Statement:
    """An SQL statement of ours with the types of its parameters.

    It runs with search_path set to pg_catalog, and names everything else with its schema.
    """

    sql: str
    types: tuple[str, ...] = ()


@dataclass(frozen=True)
class Column:
    """A result column: its name and the OID of its type."""

    name: str
    type_oid: int


class Database(Protocol):
    """Where SQL goes: PL/Python's `plpy` in the server, a fake in unit tests.

    Only the main thread may use it. SQL errors are DatabaseError, a cancel is QueryCanceled.
    """

    def execute(self, statement: Statement, *args: object) -> list[Row]:
        """Run a statement of ours; the rows it returns, as PL/Python converts them."""
        ...

    def query(self, sql: str, args: Sequence[object]) -> tuple[list[Row], list[Column]]:
        """Run a handler's SQL. The arguments are in the parameters' text form."""
        ...

    def stream(
        self, sql: str, args: Sequence[object], size: int
    ) -> Iterator[tuple[list[Row], list[Column]]]:
        """Run a handler's query through a cursor, `size` rows at a time."""
        ...

    def parameter_types(self, sql: str) -> list[str]:
        """The types that PostgreSQL finds for the parameters of a handler's SQL."""
        ...

    def transaction(self, *, durable: bool = False) -> AbstractContextManager[None]:
        """A transaction of its own: committed at the end, rolled back on an exception.

        In a caller's transaction, where nothing can be committed, a subtransaction. `durable`:
        survives a crash of the server whatever the session's synchronous_commit is.
        """
        ...

    def handlers_transaction(self) -> AbstractContextManager[None]:
        """A transaction for a handler's SQL, which meets the caller's settings.

        Those are its search_path and lock_timeout; dates are written so that they can be parsed.
        Nobody can commit or roll back before its end, not even the handler.
        """
        ...

    def end_handlers_part(self, *, used: bool, may_set: bool = False) -> None:
        """In a handler's transaction, check deferred constraints and go on with the bookkeeping.

        used: whether the handler has run any SQL. may_set: whether that may have set something.
        Raises DatabaseError for a constraint that is violated.
        """
        ...

    def analyze(self, tables: Sequence[str]) -> None:
        """Renew the statistics of tables, given as SQL names, each in a transaction of its own.

        Not if somebody else is at it, and not in a caller's transaction, which would keep locks.
        """
        ...

    def show(self, text: str) -> None:
        """Tell pg_stat_activity what goes on, as the session's application_name.

        text: of letters, digits and punctuation. It costs a statement if it is another than before,
        and outside of transaction() is part of the next transaction.
        """
        ...

    def discard_temporary(self) -> None:
        """Drop the session's temporary objects."""
        ...

    @property
    def is_autonomous(self) -> bool:
        """Whether transactions are the worker's own, and the session with them."""
        ...

    def check_interrupts(self) -> None:
        """Raise QueryCanceled if the call was canceled; end the process if that was asked for."""
        ...

    @property
    def seconds_in_sql(self) -> float:
        """How long this call has been in SQL, where Python's other threads stand still."""
        ...


def retrying(action: Callable[[], T], also: Collection[str] = ()) -> T:
    """Run a transaction again after a deadlock or a serialization failure, a few times.

    also: further SQLSTATEs after which it is worth another try.
    """
    for tries in range(1, CONFLICT_TRIES):
        try:
            return action()
        except DatabaseError as error:
            if error.sqlstate not in CONFLICTS and error.sqlstate not in also:
                raise
        pause_before_retry(tries)
    return action()


def confirmed(database: Database, error: QueryCanceled) -> QueryCanceled:
    """PostgreSQL's own error, which says why, for a cancel that was noticed in Python."""
    if isinstance(error, Interrupted):
        try:
            database.check_interrupts()
        except QueryCanceled as own:
            return own
    return error


def pause_before_retry(tries: int) -> None:
    """Wait a little, longer each time, so that the other side of a conflict gets its turn."""
    import random

    time.sleep(random.uniform(0.5, 1) * 0.02 * 2**tries)
