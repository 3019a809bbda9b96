"""PL/Python's `plpy` as the Database that the worker sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from pgflow_worker.database import Column, Row, Statement
from pgflow_worker.errors import DatabaseError, InTransaction, QueryCanceled

_PREPARED = "pgflow_worker_statement"
_FIND_PREPARED = f"""select parameter_types::pg_catalog.text[] as types
    from pg_catalog.pg_prepared_statements where name operator(pg_catalog.=) '{_PREPARED}'"""
# spi.h: SPI_OK_SELECT, and INSERT, DELETE, UPDATE and MERGE with RETURNING.
_WITH_ROWS = (5, 11, 12, 13, 18)

_SESSION = Statement(
    """select pg_catalog.current_setting('search_path') as search_path,
    pg_catalog.current_setting('datestyle') as datestyle,
    pg_catalog.current_setting('lock_timeout') as lock_timeout,
    pg_catalog.current_setting('default_transaction_isolation') as isolation,
    pg_catalog.current_setting('synchronous_commit') as synchronous_commit"""
)
_SET_LOCAL = Statement(
    """select pg_catalog.set_config('search_path', $1, true),
    pg_catalog.set_config('datestyle', $2, true),
    pg_catalog.set_config('lock_timeout', $3, true)""",
    ("text", "text", "text"),
)
_SET_SESSION = Statement(
    """select pg_catalog.set_config('search_path', $1, false),
    pg_catalog.set_config('default_transaction_isolation', $2, false)""",
    ("text", "text"),
)
_SEARCH_PATH = "pg_catalog, pg_temp"
# A lock_timeout of the role's is for its own statements: bookkeeping must not give up.
_OUR_SETTINGS = f"set local search_path = {_SEARCH_PATH}; set local lock_timeout = 0"


class _Undo(Exception):
    pass


class PlpyDatabase:
    """A Database on `plpy`, with the search_path of its creation as the caller's.

    autonomous: whether this call may commit, as a procedure may that was called on its own.
    """

    def __init__(self, plpy: Any, *, autonomous: bool) -> None:
        self._plpy = plpy
        self._autonomous = autonomous
        self._plans: dict[Statement, Any] = {}
        self._callers_plans: dict[str, Any] = {}
        self._types: dict[str, list[str]] = {}
        [row] = self.execute(_SESSION)
        self._search_path: str = row["search_path"]
        self._datestyle: str = row["datestyle"]
        self._lock_timeout: str = row["lock_timeout"]
        self._isolation: str = row["isolation"]
        self._forgetful: bool = row["synchronous_commit"] == "off"
        if autonomous:
            self._begin_session()

    def execute(self, statement: Statement, *args: object) -> list[Row]:
        with self._errors():
            plan = self._plans.get(statement)
            if plan is None:
                plan = self._plpy.prepare(statement.sql, list(statement.types))
                self._plans[statement] = plan
            return list(self._plpy.execute(plan, list(args)))

    def query(self, sql: str, args: Sequence[object]) -> tuple[list[Row], list[Column]]:
        with self._errors():
            result = self._execute(sql, args)
            return list(result), _columns(result)

    def stream(
        self, sql: str, args: Sequence[object], size: int
    ) -> Iterator[tuple[list[Row], list[Column]]]:
        # A cursor's results do not tell their types; the same query without rows does.
        query = sql.strip().rstrip(";")
        with self._errors():
            columns = _columns(
                self._execute(f"select * from (\n{query}\n) as streamed limit 0", args)
            )
            if args:
                cursor = self._plpy.cursor(self._callers_plan(sql), list(args))
            else:
                cursor = self._plpy.cursor(sql)
        while True:
            with self._errors():
                rows = list(cursor.fetch(size))
            if not rows:
                return
            yield rows, columns

    def parameter_types(self, sql: str) -> list[str]:
        types = self._types.get(sql)
        if types is None:
            # plpy.prepare() wants to be told the types; SQL's PREPARE finds them.
            with self._errors():
                try:
                    self._prepare(sql)
                    [row] = self._plpy.execute(_FIND_PREPARED)
                finally:
                    # It is there even if a later statement of the SQL has failed.
                    if len(self._plpy.execute(_FIND_PREPARED)) > 0:
                        self._plpy.execute(f"deallocate {_PREPARED}")
            types = list(row["types"])
            self._types[sql] = types
        return types

    @contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[None]:
        if not self._autonomous:
            with self._joined_transaction():
                yield
            return
        # SET takes no snapshot, and a handler in Python runs without one.
        settings = _OUR_SETTINGS
        if durable and self._forgetful:
            settings += "; set local synchronous_commit = on"
        with self._errors():
            self._plpy.execute(settings)
            try:
                yield
            except BaseException:
                self._plpy.rollback()
                raise
            self._plpy.commit()

    @contextmanager
    def subtransaction(self) -> Iterator[None]:
        with self._errors(), self._plpy.subtransaction():
            yield

    @contextmanager
    def callers_settings(self) -> Iterator[None]:
        self.execute(_SET_LOCAL, self._search_path, "ISO", self._lock_timeout)
        yield
        self.execute(_SET_LOCAL, _SEARCH_PATH, self._datestyle, "0")

    def restore_session(self) -> None:
        """Undo what this call and its handlers' SQL have set in a session that may go on."""
        if self._autonomous:
            with self.transaction():
                self.execute(_SET_SESSION, self._search_path, self._isolation)

    def _begin_session(self) -> None:
        # The protocol needs read committed. It can only be set as the default of the transactions
        # to come: plpy runs SET inside a subtransaction, where no isolation level can be chosen.
        self.execute(_SET_SESSION, self._search_path, "read committed")
        try:
            self._plpy.commit()
        except self._plpy.SPIError:
            raise InTransaction(
                "work() cannot run inside a transaction, because it commits every task",
                hint="Call it as the only statement of a command: call pgflow_worker.work(...). "
                "Inside a transaction: select pgflow_worker.work_batch(...).",
            ) from None

    @contextmanager
    def _joined_transaction(self) -> Iterator[None]:
        """A subtransaction of the caller's transaction, which keeps its own settings."""
        with self.subtransaction():
            self._plpy.execute(_OUR_SETTINGS)
            yield
            self.execute(_SET_LOCAL, self._search_path, self._datestyle, self._lock_timeout)

    def _execute(self, sql: str, args: Sequence[object]) -> Any:
        if args:
            return self._plpy.execute(self._callers_plan(sql), list(args))
        return self._plpy.execute(sql)

    def _prepare(self, sql: str) -> None:
        # SQL of several statements would run all but the first of them here: that is undone. What
        # PREPARE has prepared stays, because it is no part of a transaction.
        with suppress(_Undo), self._plpy.subtransaction():
            self._plpy.execute(f"prepare {_PREPARED} as {sql}")
            raise _Undo

    def _callers_plan(self, sql: str) -> Any:
        plan = self._callers_plans.get(sql)
        if plan is None:
            plan = self._plpy.prepare(sql, self.parameter_types(sql))
            self._callers_plans[sql] = plan
        return plan

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """PL/Python's SQL errors as ours."""
        try:
            yield
        except self._plpy.SPIError as error:
            raise _converted(error) from error


def _converted(error: Any) -> BaseException:
    """A plpy.SPIError as ours. Custom SQLSTATEs have no class: they are packed in `spidata`."""
    packed, detail, hint, *_ = getattr(error, "spidata", None) or (0, None, None)
    sqlstate = getattr(error, "sqlstate", None) or _unpacked(packed)
    if sqlstate == QueryCanceled.sqlstate:
        return QueryCanceled(str(error))
    if "SPI_ERROR_TRANSACTION" in str(error):
        return DatabaseError("a handler cannot commit or roll back", "2D000")
    return DatabaseError(str(error), sqlstate, detail, hint)


def _unpacked(packed: int) -> str:
    """MAKE_SQLSTATE of PostgreSQL's elog.h backwards: six bits a character, from "0" on."""
    return "".join(chr((packed >> (6 * place) & 0x3F) + ord("0")) for place in range(5))


def _columns(result: Any) -> list[Column]:
    """The columns of a result; those of a statement that is no query are none."""
    if result.status() not in _WITH_ROWS:
        return []
    return [
        Column(name, type_oid)
        for name, type_oid in zip(result.colnames(), result.coltypes(), strict=True)
    ]
