"""Run a task's handler once more, on what is recorded of the task, and undo its SQL."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from pgflow_worker import attempt, codec
from pgflow_worker.attempt import Failure, Success
from pgflow_worker.backlog import Backlog
from pgflow_worker.database import Statement, confirmed
from pgflow_worker.errors import DatabaseError, InvalidArgument, QueryCanceled
from pgflow_worker.flow import Flow, Step
from pgflow_worker.pgflow import Claim, Task
from pgflow_worker.process import CALL_ENDED
from pgflow_worker.registry import Registry
from pgflow_worker.runner import Result, Runner
from pgflow_worker.transaction import DatabaseTransaction
from pgflow_worker.worker import LISTEN_SECONDS

if TYPE_CHECKING:
    from pgflow_worker.adapter import JoinedDatabase
    from pgflow_worker.process import Process

_RECORDED_INPUT = Statement(
    """select flow_slug, run_input, input, attempt, max_attempts, timeout, is_started
    from pgflow_worker._recorded_input($1, $2, $3)""",
    ("uuid", "text", "integer"),
)
# A new file alone says nothing: another session may have given the table one.
_TABLES = Statement(
    """select class.oid,
        pg_catalog.format('%I.%I', namespace.nspname, class.relname) as name,
        class.relfilenode as file,
        class.oid in (
            select lock.relation from pg_catalog.pg_locks as lock
            where lock.relation is not null and lock.pid = pg_catalog.pg_backend_pid()
                and lock.mode = 'AccessExclusiveLock'
        ) as locked,
        pg_catalog.pg_stat_get_xact_tuples_inserted(class.oid) as inserted,
        pg_catalog.pg_stat_get_xact_tuples_updated(class.oid) as updated,
        pg_catalog.pg_stat_get_xact_tuples_deleted(class.oid) as deleted
    from pg_catalog.pg_class as class
    join pg_catalog.pg_namespace as namespace on namespace.oid = class.relnamespace
    where class.relkind = 'r'
        and namespace.nspname not in ('pg_catalog', 'information_schema', 'pg_toast')"""
)
# An error undoes SET CONSTRAINTS. The end of the subtransaction around it would not: PostgreSQL
# restores only what was set in that one itself, and plpy runs every statement in one of its own.
_FULFILLED = "PW000"
_CHECK_CONSTRAINTS = f"""do $$
begin
    set constraints all immediate;
    raise exception using errcode = '{_FULFILLED}', message = 'all constraints are fulfilled';
end
$$"""
_COUNTS = Statement("select pg_catalog.current_setting('track_counts')::boolean as counts")


class _Undo(Exception):
    """Ends a subtransaction so that nothing of it stays."""


class _Table(NamedTuple):
    """A table, and how many of its rows this transaction has written so far."""

    name: str
    file: int
    locked: bool
    inserted: int
    updated: int
    deleted: int


class Replay:
    """One more run of a task's handler, in a subtransaction that is always rolled back.

    flow_slug: the run's flow. has_used_event_loop: whether the handler ran on one, which has ended.
    Raises DatabaseError for a task that is unknown or has no input yet.
    """

    def __init__(
        self,
        database: JoinedDatabase,
        process: Process,
        run_id: str,
        step_slug: str,
        task_index: int,
    ) -> None:
        self.database = database
        self._process = process
        with database.transaction():
            [row] = database.execute(_RECORDED_INPUT, run_id, step_slug, task_index)
        self.flow_slug: str = row["flow_slug"]
        claim = Claim(
            run_id=run_id,
            step_slug=step_slug,
            task_index=task_index,
            worker_id=None,
            attempt=row["attempt"],
            started_us=0,
            message_id=0,
            max_attempts=row["max_attempts"],
            timeout=row["timeout"],
        )
        self._task = Task(claim, row["input"], row["run_input"])
        self._notes: list[str] = []
        if row["is_started"]:
            self._notes.append("the task is started: a worker may be running it at the same time")
        self._result: Result | None = None
        self._rows: dict[str, dict[str, object]] | None = {}
        self.has_used_event_loop = False

    def run(self, flow: Flow) -> None:
        """Run the handler. Raises InvalidArgument if there is none, and QueryCanceled."""
        step = flow.steps.get(self._task.claim.step_slug)
        if step is None:
            raise InvalidArgument(
                f'step "{self._task.claim.step_slug}" has no handler in the deployed module',
                hint=f'Deploy a module whose flow "{flow.slug}" has this step. Steps with a '
                f"handler: {', '.join(flow.steps)}.",
            )
        runner = Runner(flow, self._process, self._clock)
        if step.is_transactional:
            self._result = self._run_transactional(runner, step)
        elif step.is_concurrent:
            self._result = self._run_concurrent(runner, flow, step)
        else:
            self._result = runner.run(self._task)

    def json(self, notes: Iterable[str]) -> str:
        """What became of it, as the row of replay_task(). After run().

        notes: the process's.
        """
        assert self._result is not None
        outcome = self._result.outcome
        failure = outcome if isinstance(outcome, Failure) else None
        processes = [note.replace(CALL_ENDED, "go on in a new session") for note in notes]
        known = {
            "outcome": _outcome(outcome),
            "error": failure and failure.error,
            "traceback": (failure and failure.traceback) or None,
            "log": self._result.log or None,
            # Of what has failed nothing would be written.
            "rows_written": None if failure else self._rows,
            "duration_ms": round(self._result.duration_ms, 3),
            "attempt": self._task.claim.attempt,
            "notes": list(dict.fromkeys([*self._notes, *processes])),
        }
        # Not read and written again: they are as large as they may be.
        texts = {"input": self._task.input}
        if isinstance(outcome, Success):
            texts["output"] = outcome.output
        more = "".join(f', "{name}": {text}' for name, text in texts.items())
        return codec.encode(known).removesuffix("}") + more + "}"

    def _run_transactional(self, runner: Runner, step: Step) -> Result:
        registry = Registry(self.database)
        callers = self._violation()
        if callers is not None:
            self._notes.append(
                f"deferred constraints were not checked: this transaction violates one: {callers}"
            )
        with self.database.transaction():
            locks = registry.left_behind().locks
            before = self._tables()
        try:
            with self.database.handlers_transaction():
                transaction = DatabaseTransaction(self.database)
                result = runner.run(self._task, transaction)
                transaction.close()
                if isinstance(result.outcome, Success) and callers is None:
                    violation = self._violation()
                    if violation is not None:
                        outcome = attempt.failure(violation, step.handler)
                        result = result._replace(outcome=outcome)
                with self.database.transaction():
                    self._rows = _written(before, self._tables())
                raise _Undo
        except _Undo:
            pass
        except QueryCanceled as error:
            raise confirmed(self.database, error) from None
        finally:
            with self.database.transaction():
                left = registry.left_behind().locks
                if left > locks == 0:
                    registry.release_foreign_locks()
                elif left != locks:
                    self._notes.append(
                        "the handler has changed which advisory locks the session holds"
                    )
        return result

    def _violation(self) -> DatabaseError | None:
        """What the commit would say of the deferred constraints, if it would fail."""
        try:
            self.database.run(_CHECK_CONSTRAINTS)
        except DatabaseError as error:
            return None if error.sqlstate == _FULFILLED else error
        raise AssertionError("the check has not been undone")

    def _tables(self) -> dict[int, _Table] | None:
        """Every table by its OID; None if the server does not count."""
        if not self.database.execute(_COUNTS)[0]["counts"]:
            return None
        return {row.pop("oid"): _Table(**row) for row in self.database.execute(_TABLES)}

    def _run_concurrent(self, runner: Runner, flow: Flow, step: Step) -> Result:
        """Run a handler as a worker does that has nothing else to run."""
        from pgflow_worker.executors import Executors

        self._process.has_threads()
        executors = Executors(1)
        backlog = Backlog(flow, 1)
        has_ended = False
        try:
            if step.is_async:
                future = executors.event_loop.submit(runner.run_async, self._task)
            else:
                future = executors.threads.submit(runner.run_in_thread, self._task)
            backlog.running(self._task, future, self._clock())
            while True:
                results = backlog.collect(LISTEN_SECONDS)
                if results:
                    has_ended = True
                    return results[0]
                late = backlog.abandon(self._clock())
                if late:
                    self._process.distrust("a handler whose time was up could not be stopped")
                    return late[0]
                if self._process.interrupts.dying:
                    executors.shutdown(wait=False)
                if self._process.interrupts.wanted:
                    self.database.check_interrupts()
        finally:
            self.has_used_event_loop = executors.has_event_loop
            self._process.has_no_more_handlers()
            executors.shutdown(wait=has_ended)

    def _clock(self) -> float:
        return time.monotonic() - self.database.seconds_in_sql


def _outcome(outcome: Success | Failure) -> str:
    if isinstance(outcome, Success):
        return "completed"
    return "snoozed" if outcome.is_snooze else "failed"


def _written(
    before: dict[int, _Table] | None, after: dict[int, _Table] | None
) -> dict[str, dict[str, object]] | None:
    """What was written in between, by table; None if that is unknown."""
    if before is None or after is None:
        return None
    written: dict[str, dict[str, object]] = {}
    for oid, table in after.items():
        former = before.get(oid, table._replace(inserted=0, updated=0, deleted=0))
        rows: dict[str, object] = {
            "inserted": table.inserted - former.inserted,
            "updated": table.updated - former.updated,
            "deleted": table.deleted - former.deleted,
            "rewritten": table.locked and table.file != former.file,
        }
        if any(rows.values()):
            written[table.name] = {kind: number for kind, number in rows.items() if number}
    return written
