"""Run one started task: its handler, the fence, then its completion or its failure."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from uuid import UUID

from pgflow_worker import attempt, codec
from pgflow_worker.attempt import Failure, Success
from pgflow_worker.context import Context
from pgflow_worker.database import (
    CONFLICT_TRIES,
    CONFLICTS,
    Database,
    Statement,
    pause_before_retry,
    retrying,
)
from pgflow_worker.errors import DatabaseError, QueryCanceled
from pgflow_worker.flow import Flow, Role, Step
from pgflow_worker.pgflow import Claim, Pgflow, Task
from pgflow_worker.registry import Registry
from pgflow_worker.report import Outcome
from pgflow_worker.tracebacks import printable
from pgflow_worker.transaction import DatabaseTransaction

# SQLSTATE classes that tell of the result: data exceptions, constraints, limits, and what triggers
# of the user's raise.
RESULT_AT_FAULT = ("22", "23", "54", "P0")
# Those that tell of the server's state: connection, resources, locks, operator intervention,
# system and internal errors. In a handler's own transaction every other error is the handler's.
SERVER_AT_FAULT = ("08", "53", "55", "57", "58", "XX")

_CHECK_CONSTRAINTS = Statement("set constraints all immediate")


@dataclass(frozen=True)
class _Result:
    """What a handler did."""

    outcome: Success | Failure
    duration_ms: float = 0.0
    log: str = ""


class _RolledBack(Exception):
    """Ends a transaction so that nothing of it stays; `result` is stored in the next one."""

    def __init__(self, result: _Result) -> None:
        super().__init__()
        self.result = result


class TaskRunner:
    """Runs started tasks of one flow."""

    def __init__(self, database: Database, flow: Flow, pgflow: Pgflow, registry: Registry) -> None:
        self._database = database
        self._flow = flow
        self._pgflow = pgflow
        self._registry = registry

    def run(self, task: Task) -> Outcome:
        """Run a task to its end.

        Raises QueryCanceled, after the attempt it interrupted has been failed, and DatabaseError
        if the bookkeeping fails; the task is then still started.
        """
        step = self._flow.steps[task.claim.step_slug]
        try:
            if step.wants(Role.TRANSACTION):
                return self._run_transactional(step, task)
            result = self._call(step, task, None)
        except QueryCanceled as error:
            self._store(task.claim, _Result(Failure(f"canceled: {error}")))
            raise
        try:
            return self._store(task.claim, result)
        except QueryCanceled:
            # It was meant for the handler, which does not see it while it is in Python.
            self._store(task.claim, result)
            raise

    def _run_transactional(self, step: Step, task: Task) -> Outcome:
        """Run a handler with `tx` and complete its task in one transaction."""
        for tries in range(CONFLICT_TRIES):
            if tries:
                pause_before_retry(tries)
            try:
                # Inside a subtransaction nobody can commit, not even the handler through plpy.
                with self._database.transaction(), self._database.subtransaction():
                    return self._complete_with_handler(step, task)
            except _RolledBack as rolled_back:
                result = rolled_back.result
                if not (
                    isinstance(result.outcome, Failure) and result.outcome.sqlstate in CONFLICTS
                ):
                    break
            except DatabaseError as error:
                if error.sqlstate.startswith(SERVER_AT_FAULT):
                    raise
                # The handler has left a transaction behind in which nothing can be completed.
                result = _Result(Failure(f"completing the task: {error}", sqlstate=error.sqlstate))
                if error.sqlstate not in CONFLICTS:
                    break
        return self._store(task.claim, result)

    def _complete_with_handler(self, step: Step, task: Task) -> Outcome:
        transaction = DatabaseTransaction(self._database)
        with self._database.callers_settings():
            result = self._call(step, task, transaction)
            transaction.close()
            if isinstance(result.outcome, Failure):
                raise _RolledBack(result)
            try:
                # A deferred constraint is the handler's failure, not the commit's.
                self._database.execute(_CHECK_CONSTRAINTS)
            except DatabaseError as error:
                failure = attempt.failure(error, step.handler)
                raise _RolledBack(replace(result, outcome=failure)) from None
        outcome = self._finish(task.claim, result)
        if outcome != "completed":
            # Never to be stored as a success later: the handler's SQL is undone.
            lost = Failure("the task was not completed, and the handler's SQL was undone")
            raise _RolledBack(replace(result, outcome=lost))
        return outcome

    def _call(self, step: Step, task: Task, transaction: DatabaseTransaction | None) -> _Result:
        claim = task.claim
        context = Context(
            run_id=UUID(claim.run_id),
            flow_slug=self._flow.slug,
            step_slug=claim.step_slug,
            task_index=claim.task_index,
            attempt=claim.attempt,
            max_attempts=claim.max_attempts,
            timeout=claim.timeout,
        )
        try:
            task_input = codec.decode(task.input)
            if task.run_input is not None:
                flow_input = codec.decode(task.run_input)
            else:
                flow_input = task_input.get("run") if isinstance(task_input, dict) else None
        except codec.NotJson as error:
            return _Result(Failure(str(error)))
        started = time.perf_counter()
        outcome = attempt.run(step, task_input, flow_input, context, transaction)
        duration_ms = (time.perf_counter() - started) * 1000
        return _Result(outcome, duration_ms, printable(context.log_text))

    def _store(self, claim: Claim, result: _Result) -> Outcome:
        """Complete or fail a task in a transaction of its own."""

        def store() -> Outcome:
            with self._database.transaction():
                return self._finish(claim, result)

        try:
            return retrying(store)
        except _RolledBack as rolled_back:
            return self._store(claim, rolled_back.result)

    def _finish(self, claim: Claim, result: _Result) -> Outcome:
        """Lock the run, then the claim, then complete or fail the task, in this order.

        Raises _RolledBack with a failure in place of a result that cannot be stored.
        """
        run_status = self._pgflow.lock_run(claim.run_id)
        ours = self._pgflow.lock_claim(claim)
        if not ours or run_status != "started":
            error = "another worker had taken the task"
            if ours:
                # pgflow would leave the task started for ever in a run that has failed.
                error = f"the run had ended ({run_status}) before the handler did"
                self._pgflow.fail(claim, error, final=True)
            self._record(claim, "discarded", result, error)
            return "discarded"
        if isinstance(result.outcome, Failure):
            failed = self._pgflow.fail(claim, result.outcome.error, final=result.outcome.final)
            self._record(claim, "failed", result, result.outcome.error, result.outcome.traceback)
            return "failed" if failed else "retried"
        try:
            completed = self._pgflow.complete(claim, result.outcome.output)
            reason = "pgflow refused it"
        except DatabaseError as error:
            if not error.sqlstate.startswith(RESULT_AT_FAULT):
                raise
            completed, reason = False, str(error)
        if not completed:
            refused = Failure(f'result of step "{claim.step_slug}": {reason}')
            raise _RolledBack(replace(result, outcome=refused))
        self._record(claim, "completed", result)
        return "completed"

    def _record(
        self,
        claim: Claim,
        outcome: str,
        result: _Result,
        error: str | None = None,
        traceback: str | None = None,
    ) -> None:
        self._registry.record_attempt(
            self._flow.slug,
            claim,
            outcome,
            duration_ms=result.duration_ms,
            error=error,
            traceback=traceback,
            log=result.log,
        )
