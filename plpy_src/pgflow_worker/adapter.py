"""PL/Python's `plpy` as the Database that the worker sees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from time import perf_counter
from typing import TYPE_CHECKING, Any

from pgflow_worker.database import Column, Row, Statement
from pgflow_worker.errors import DatabaseError, InTransaction, QueryCanceled

if TYPE_CHECKING:
    from pgflow_worker.process import Process

_PREPARED = "pgflow_worker_statement"
_FIND_PREPARED = f"""select parameter_types::pg_catalog.text[] as types
    from pg_catalog.pg_prepared_statements where name operator(pg_catalog.=) '{_PREPARED}'"""
# spi.h: SPI_OK_SELECT, and INSERT, DELETE, UPDATE and MERGE with RETURNING.
_WITH_ROWS = (5, 11, 12, 13, 18)

# What a handler's SQL meets, and may leave changed for the rest of the session.
_SETTINGS = (
    *("search_path", "lock_timeout", "default_transaction_isolation", "datestyle"),
    "synchronous_commit",
)
# And what else is compared after every handler; all others only after one that may have set them.
_WATCHED = (
    *_SETTINGS,
    *("role", "default_transaction_read_only", "intervalstyle", "timezone", "bytea_output"),
    *("row_security", "session_replication_role", "standard_conforming_strings", "work_mem"),
    *("client_encoding", "statement_timeout", "extra_float_digits", "default_tablespace"),
)
_GET_SETTINGS = Statement(
    "select session_user::pg_catalog.text as session_user, "
    + ", ".join(f"pg_catalog.current_setting('{name}') as {name}" for name in _WATCHED)
)
_GET_SESSIONS = Statement(
    """select setting.name, setting.setting as value from pg_catalog.pg_settings as setting
    where setting.source operator(pg_catalog.=) 'session'
        and setting.name operator(pg_catalog.!~~) 'transaction%'"""
)
# Types with their schema, since this runs on the search_path that a handler has left.
_SET = Statement(
    "select pg_catalog.set_config($1, $2, $3)", ("pg_catalog.text", "pg_catalog.text", "boolean")
)
_SET_SETTINGS = Statement(
    "select "
    + ", ".join(
        f"pg_catalog.set_config('{name}', ${number}, $6)"
        for number, name in enumerate(_SETTINGS, 1)
    ),
    # With their schema, because this runs under the caller's search_path; boolean is a keyword.
    (*["pg_catalog.text"] * len(_SETTINGS), "boolean"),
)
_GET_NAME = Statement("select pg_catalog.current_setting('application_name') as name")
_NAME_LENGTH = 63  # what PostgreSQL shows of application_name
_ANALYZE = Statement("select pgflow_worker._analyze($1)", ("regclass",))
# A lock_timeout of the role's is for its own statements: bookkeeping must not give up.
_OUR_SETTINGS = "set local search_path = pg_catalog, pg_temp; set local lock_timeout = 0"
_HANDLERS_SQL = "A handler runs SQL through tx: Transaction, not through plpy."


class _Undo(Exception):
    pass


class PlpyDatabase(ABC):
    """A Database on `plpy`, but for its transactions.

    The search_path of its creation is the caller's, which handlers' SQL gets. process: told when
    PostgreSQL takes over, and when it is done.
    """

    is_autonomous: bool

    def __init__(self, plpy: Any, process: Process | None = None) -> None:
        self.plpy = plpy
        self.sql = _Sql(plpy, process)
        self._plans: dict[str, Any] = {}
        self._callers_plans: dict[str, Any] = {}
        self._types: dict[str, list[str]] = {}
        self._callers_name: str | None = None  # None: nothing was shown yet
        self._shown: str | None = None  # None: that is not known
        self.callers = self.settings()
        # ISO, so that Python can parse dates. Whether days or months come first stays.
        self.handlers = self.callers | {"datestyle": "ISO"}

    @property
    def seconds_in_sql(self) -> float:
        return self.sql.seconds

    @abstractmethod
    def transaction(self, *, durable: bool = False) -> AbstractContextManager[None]:
        """See Database."""

    def execute(self, statement: Statement, *args: object) -> list[Row]:
        with self.sql:
            plan = self._plans.get(statement.sql)
            if plan is None:
                plan = self.plpy.prepare(statement.sql, list(statement.types))
                self._plans[statement.sql] = plan
            return list(self.plpy.execute(plan, list(args)))

    def query(self, sql: str, args: Sequence[object]) -> tuple[list[Row], list[Column]]:
        with self.sql:
            result = self._execute(sql, args)
            return list(result), _columns(result)

    def stream(
        self, sql: str, args: Sequence[object], size: int
    ) -> Iterator[tuple[list[Row], list[Column]]]:
        # A cursor's results do not tell their types; the same query without rows does.
        query = sql.strip().rstrip(";")
        with self.sql:
            columns = _columns(
                self._execute(f"select * from (\n{query}\n) as streamed limit 0", args)
            )
            if args:
                cursor = self.plpy.cursor(self._callers_plan(sql), list(args))
            else:
                cursor = self.plpy.cursor(sql)
        try:
            while True:
                with self.sql:
                    rows = list(cursor.fetch(size))
                if not rows:
                    return
                yield rows, columns
        finally:
            # Not left to the commit, which would read it to its end. It may be gone already.
            with suppress(Exception), self.sql:
                cursor.close()

    def parameter_types(self, sql: str) -> list[str]:
        types = self._types.get(sql)
        if types is None:
            # plpy.prepare() wants to be told the types; SQL's PREPARE finds them.
            with self.sql:
                try:
                    self._prepare(sql)
                    [row] = self.plpy.execute(_FIND_PREPARED)
                finally:
                    # It is there even if a later statement of the SQL has failed.
                    if len(self.plpy.execute(_FIND_PREPARED)) > 0:
                        self.plpy.execute(f"deallocate {_PREPARED}")
            types = list(row["types"])
            self._types[sql] = types
        return types

    def run(self, sql: str) -> None:
        """Run SQL without parameters and results."""
        with self.sql:
            self.plpy.execute(sql)

    def show(self, text: str) -> None:
        if text == self._shown:
            return
        if self._callers_name is None:
            self._callers_name = self.execute(_GET_NAME)[0]["name"]
        # SET and not set_config(), which takes a snapshot.
        scope = "" if self.is_autonomous else "local "
        self.run(f"set {scope}application_name = '{text[:_NAME_LENGTH]}'")
        self._shown = text

    def restore_name(self) -> None:
        """Undo show()."""
        if self._callers_name is not None:
            self.execute(_SET, "application_name", self._callers_name, not self.is_autonomous)

    def discard_temporary(self) -> None:
        with self.transaction():
            self.run("discard temp")

    def check_interrupts(self) -> None:
        self.run("select pg_catalog.pg_sleep(0)")

    def settings(self) -> Row:
        return self.execute(_GET_SETTINGS)[0]

    def mend_settings(self, *, local: bool) -> None:
        """Take back what a handler has changed of the most important settings, and its role."""
        now = self.settings()
        if now == self.handlers:
            return
        user = self.handlers["session_user"]
        if now["session_user"] != user:
            # Back to who has logged in, who alone may become somebody else again.
            self.run("set session authorization default")
            if self.settings()["session_user"] != user:
                self.execute(_SET, "session_authorization", user, local)
            now = self.settings()
        for name in _WATCHED:
            if now[name] != self.handlers[name]:
                self.execute(_SET, name, self.handlers[name], local)

    def apply(self, settings: Row, *, local: bool) -> None:
        self.execute(_SET_SETTINGS, *(settings[name] for name in _SETTINGS), local)

    def _execute(self, sql: str, args: Sequence[object]) -> Any:
        if args:
            return self.plpy.execute(self._callers_plan(sql), list(args))
        return self.plpy.execute(sql)

    def _prepare(self, sql: str) -> None:
        # SQL of several statements would run all but the first of them here: that is undone. What
        # PREPARE has prepared stays, because it is no part of a transaction.
        with suppress(_Undo), self.plpy.subtransaction():
            self.plpy.execute(f"prepare {_PREPARED} as {sql}")
            raise _Undo

    def _callers_plan(self, sql: str) -> Any:
        plan = self._callers_plans.get(sql)
        if plan is None:
            plan = self.plpy.prepare(sql, self.parameter_types(sql))
            self._callers_plans[sql] = plan
        return plan


class AutonomousDatabase(PlpyDatabase):
    """For a procedure that was called on its own, and may commit.

    The caller's settings hold for the whole call, as handlers' SQL gets them, because to set them
    would cost every handler's transaction some time. Transactions of ours set their own.
    """

    is_autonomous = True

    def __init__(self, plpy: Any, process: Process | None = None) -> None:
        super().__init__(plpy, process)
        self._sessions: dict[str, str] = {}
        self._forgetful = self.callers["synchronous_commit"] == "off"
        # The protocol needs read committed. It can only be set as the default of the transactions
        # to come: plpy runs SET inside a subtransaction, where no isolation level can be chosen.
        self.handlers["default_transaction_isolation"] = "read committed"
        self.apply(self.handlers, local=False)
        self.handlers = self.settings()
        try:
            self.plpy.commit()
        except self.plpy.SPIError:
            raise InTransaction(
                "work() cannot run inside a transaction, because it commits every task",
                hint="Call it as the only statement of a command: call pgflow_worker.work(...). "
                "Inside a transaction: select pgflow_worker.work_batch(...).",
            ) from None

    def transaction(self, *, durable: bool = False) -> AbstractContextManager[None]:
        # SET takes no snapshot, and a handler in Python runs without one.
        settings = _OUR_SETTINGS
        if durable and self._forgetful:
            settings += "; set local synchronous_commit = on"
        return _Transaction(self, settings)

    def handlers_transaction(self) -> AbstractContextManager[None]:
        if not self._sessions:
            self._sessions = self._sessions_settings()
            self.end(None)
        return _HandlersTransaction(self)

    def end(self, error: BaseException | None) -> None:
        """Commit the transaction, or after an error roll it back and raise SQL's as ours."""
        shown, self._shown = self._shown, None  # what is rolled back is not shown any more
        try:
            with self.sql:
                if error is None:
                    self.plpy.commit()
                    self._shown = shown
                else:
                    self.plpy.rollback()
        except DatabaseError as failure:
            if failure.sqlstate == "2D000":
                # It ends with the call. Until then nothing can be committed.
                text = "a handler has left a subtransaction open"
                raise DatabaseError(text, "2D000", hint=_HANDLERS_SQL) from None
            raise
        if isinstance(error, self.plpy.SPIError):
            raise _converted(error) from error

    def end_handlers_part(self, *, used: bool, may_set: bool = False) -> None:
        if used:
            self.run("set constraints all immediate")
            self.mend_settings(local=False)
            if may_set:
                self._mend_others()
                self._shown = None
        if self.handlers["lock_timeout"] != "0":
            self.run("set local lock_timeout = 0")

    def _sessions_settings(self) -> dict[str, str]:
        return {row["name"]: row["value"] for row in self.execute(_GET_SESSIONS)}

    def _mend_others(self) -> None:
        """Take back every other SET. Settings that no extension has defined are not listed."""
        now = self._sessions_settings()
        for name in now.keys() - self._sessions.keys():
            self.run(f"reset {name}")
        for name, value in self._sessions.items():
            if now.get(name) != value:
                self.execute(_SET, name, value, False)

    def analyze(self, tables: Sequence[str]) -> None:
        for table in tables:
            with self.transaction():
                self.execute(_ANALYZE, table)

    def restore_session(self) -> None:
        with self.transaction():
            self.apply(self.callers, local=False)
            self.restore_name()


class JoinedDatabase(PlpyDatabase):
    """For a function inside a transaction of its caller's, which keeps its own settings."""

    is_autonomous = False

    @contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[None]:  # noqa: ARG002
        with _Errors(self.plpy), self.plpy.subtransaction():
            self.run(_OUR_SETTINGS)
            yield
            self.apply(self.callers, local=True)

    @contextmanager
    def handlers_transaction(self) -> Iterator[None]:
        with _Errors(self.plpy), self.plpy.subtransaction():
            self.apply(self.handlers, local=True)
            self.handlers = self.settings()  # as PostgreSQL writes them
            yield
            self.apply(self.callers, local=True)

    def end_handlers_part(self, *, used: bool, may_set: bool = False) -> None:  # noqa: ARG002
        if used:
            # Constraints are left to the caller's commit: some may be the caller's own.
            self.mend_settings(local=True)
        self.run("set local lock_timeout = 0")

    def analyze(self, tables: Sequence[str]) -> None:
        pass

    def restore_session(self) -> None:
        self.restore_name()


class _Errors:
    """PL/Python's SQL errors as ours."""

    def __init__(self, plpy: Any) -> None:
        self._class = plpy.SPIError

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, self._class):
            raise _converted(error) from error


class _Sql(_Errors):
    """The same, and measures the time in SQL. A class, because every statement needs it."""

    def __init__(self, plpy: Any, process: Process | None) -> None:
        super().__init__(plpy)
        self._process = process
        self._depth = 0
        # Seconds, and since when there are more: replaced as one, because other threads ask.
        self._spent: tuple[float, float | None] = 0.0, None

    @property
    def seconds(self) -> float:
        """So far. Another thread may ask before the main thread has noted that it is back."""
        seconds, since = self._spent
        return seconds if since is None else seconds + perf_counter() - since

    def __enter__(self) -> None:
        if self._depth == 0:
            self._spent = self._spent[0], perf_counter()
            if self._process is not None:
                self._process.enter_sql()
        self._depth += 1

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._spent = self.seconds, None
            if self._process is not None:
                self._process.leave_sql()
        super().__exit__(kind, error, traceback)


class _Transaction:
    """A transaction that is committed at its end, or rolled back. Classes, as above, for speed."""

    def __init__(self, database: AutonomousDatabase, settings: str) -> None:
        self._database = database
        self._settings = settings

    def __enter__(self) -> None:
        self._database.run(self._settings)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._database.end(error)


class _HandlersTransaction:
    """A transaction inside whose subtransaction PL/Python refuses to commit."""

    def __init__(self, database: AutonomousDatabase) -> None:
        self._database = database
        self._subtransaction = database.plpy.subtransaction()

    def __enter__(self) -> None:
        with self._database.sql:
            self._subtransaction.__enter__()

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            with self._database.sql:
                self._subtransaction.__exit__(kind, error, traceback)
        except BaseException as failure:
            self._database.end(failure)
            raise
        self._database.end(error)


def _converted(error: Any) -> BaseException:
    """A plpy.SPIError as ours. Custom SQLSTATEs have no class: they are packed in `spidata`."""
    packed, detail, hint, _, _, schema, *_ = getattr(error, "spidata", None) or (0, *[None] * 5)
    sqlstate = getattr(error, "sqlstate", None) or _unpacked(packed)
    if sqlstate == QueryCanceled.sqlstate:
        return QueryCanceled(str(error))
    if "SPI_ERROR_TRANSACTION" in str(error):
        return DatabaseError("a handler cannot commit or roll back", "2D000", hint=_HANDLERS_SQL)
    return DatabaseError(str(error), sqlstate, detail, hint, schema)


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
