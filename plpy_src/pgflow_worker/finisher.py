"""Store what became of tasks: completions that share a commit, failures, handlers with `tx`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from pgflow_worker import attempt
from pgflow_worker.attempt import Failure, Success
from pgflow_worker.database import (
    CONFLICT_TRIES,
    CONFLICTS,
    Database,
    confirmed,
    pause_before_retry,
    retrying,
)
from pgflow_worker.errors import DatabaseError, QueryCanceled
from pgflow_worker.flow import Flow, Step
from pgflow_worker.pgflow import Completion, Pgflow, Task
from pgflow_worker.registry import Registry
from pgflow_worker.report import Outcome, Report
from pgflow_worker.runner import Result, Runner
from pgflow_worker.tracebacks import printable
from pgflow_worker.transaction import DatabaseTransaction

# SQLSTATE classes that tell of the result: data exceptions, constraints, limits, and what triggers
# of the user's raise.
RESULT_AT_FAULT = ("22", "23", "54", "P0")
# Those that tell of the server's state: connection, resources, locks, operator intervention,
# system and internal errors. In a handler's own transaction every other error is the handler's.
SERVER_AT_FAULT = ("08", "53", "55", "57", "58", "XX")
# Whose constraints tell of the books: of a clock that was set back, say.
BOOKS = ("pgflow", "pgmq", "pgflow_worker")


class _RolledBack(Exception):
    """Ends a transaction so that nothing of it stays; `result` is stored in the next one."""

    def __init__(self, result: Result) -> None:
        super().__init__()
        self.result = result


class _Refused(Exception):
    """Ends a shared commit: pgflow refused one of its completions."""


class Finisher:
    """Brings started tasks of one flow to their end, and counts them in the report."""

    def __init__(
        self,
        database: Database,
        flow: Flow,
        pgflow: Pgflow,
        registry: Registry,
        runner: Runner,
        report: Report,
    ) -> None:
        self._database = database
        self._flow = flow
        self._pgflow = pgflow
        self._registry = registry
        self._runner = runner
        self._report = report
        self._tx_was_used = False

    def finish(self, results: list[Result]) -> None:
        """Complete or fail the tasks, and take those that are stored out of the list.

        Raises DatabaseError if the bookkeeping fails, after trying the others; what is left in the
        list is then still started. Raises QueryCanceled when all is stored: a cancel that arrives
        here was meant for a handler, which does not see it while it is in Python.
        """
        left = {id(result): result for result in results}
        errors: list[DatabaseError | QueryCanceled] = []
        try:
            for group in self._groups(results):
                try:
                    self._store_and_count(group, left)
                except DatabaseError as error:
                    errors.append(error)
                except QueryCanceled as error:
                    if errors and isinstance(errors[0], QueryCanceled):
                        raise
                    errors.insert(0, error)
                    rest = [result for result in group if id(result) in left]
                    try:
                        self._store_and_count(rest, left)
                    except DatabaseError as another:
                        errors.append(another)
        finally:
            results[:] = left.values()
        if errors:
            raise errors[0]

    def run_transactional(self, task: Task) -> bool:
        """Run a handler with `tx` and complete its task in one transaction; whether it used it.

        Raises QueryCanceled, after the attempt it interrupted has been failed, and DatabaseError
        as finish() does.
        """
        self._tx_was_used = False
        try:
            result = self._run_and_complete(task)
        except QueryCanceled as error:
            canceled = confirmed(self._database, error)
            self.finish([Result(task.claim, Failure(f"canceled: {canceled}"))])
            raise canceled from None
        if result is None:
            self._report.count("completed")
        else:
            self.finish([result])
        return self._tx_was_used

    def _store_and_count(self, group: Sequence[Result], left: dict[int, Result]) -> None:
        for result, outcome in self._store(group):
            self._report.count(outcome)
            del left[id(result)]

    def _run_and_complete(self, task: Task) -> Result | None:
        """None if the task is completed, else what is to be stored now that nothing is left."""
        step = self._flow.steps[task.claim.step_slug]
        for tries in range(CONFLICT_TRIES):
            if tries:
                pause_before_retry(tries)
            try:
                with self._database.handlers_transaction():
                    self._complete_with_handler(step, task)
                return None
            except _RolledBack as rolled_back:
                result = rolled_back.result
            except DatabaseError as error:
                if error.sqlstate.startswith(SERVER_AT_FAULT) or error.schema in BOOKS:
                    raise
                # The handler has left a transaction behind in which nothing can be completed.
                failure = Failure(f"completing the task: {error}", sqlstate=error.sqlstate)
                result = Result(task.claim, failure)
            if not (isinstance(result.outcome, Failure) and result.outcome.sqlstate in CONFLICTS):
                break
            if result.outcome.sqlstate == "40001" and not self._database.is_autonomous:
                # On the caller's snapshot it would fail again: the caller has to begin anew.
                raise DatabaseError(result.outcome.error, "40001")
        return result

    def _complete_with_handler(self, step: Step, task: Task) -> None:
        transaction = DatabaseTransaction(self._database)
        result = self._runner.run(task, transaction)
        transaction.close()
        self._tx_was_used |= transaction.used
        if isinstance(result.outcome, Failure):
            raise _RolledBack(result)
        try:
            # A deferred constraint is the handler's failure, not the commit's.
            self._database.end_handlers_part(used=transaction.used, may_set=transaction.may_set)
        except DatabaseError as error:
            raise _RolledBack(
                result._replace(outcome=attempt.failure(error, step.handler))
            ) from None
        if not self._complete(result, result.outcome):
            # Never to be stored as a success later: the handler's SQL is undone.
            lost = Failure("the task was not completed, and the handler's SQL was undone")
            raise _RolledBack(result._replace(outcome=lost))

    def _groups(self, results: Sequence[Result]) -> list[list[Result]]:
        """What is stored together: the tasks of a map, all other completions; failures alone.

        Failures come last: after one that fails its run, no task of the run can be completed.
        """
        completed: list[Result] = []
        mapped: list[Result] = []
        failed: list[list[Result]] = []
        for result in results:
            if isinstance(result.outcome, Failure):
                failed.append([result])
            elif result.claim.step_slug in self._pgflow.in_sets:
                mapped.append(result)
            else:
                completed.append(result)
        mapped.sort(key=_step_of_run)
        groups = [list(group) for _, group in groupby(mapped, key=_step_of_run)]
        if completed:
            groups.append(completed)
        return groups + failed

    def _store(self, group: Sequence[Result]) -> Iterator[tuple[Result, Outcome]]:
        """Store a group, in one commit if that can be done.

        Yields each result when it is committed, so that a cancel in between leaves the others.
        """
        alone = list(group)
        in_sets = group[0].claim.step_slug in self._pgflow.in_sets
        completions = [
            _completion(result, result.outcome)
            for result in group
            if isinstance(result.outcome, Success)
        ]
        if completions and (len(completions) > 1 or in_sets):
            complete = self._pgflow.complete_map if in_sets else self._pgflow.complete_several
            try:
                with self._database.transaction():
                    answers = complete(completions)
                    if "refused" in answers:
                        raise _Refused
            except _Refused:
                pass  # Alone, each task meets its own trouble.
            except DatabaseError as error:
                self._report.note(f"tasks were stored one by one after an error ({error.sqlstate})")
                if in_sets and not error.sqlstate.startswith((*CONFLICTS, *RESULT_AT_FAULT)):
                    self._pgflow.in_sets = frozenset()
            else:
                alone = []
                for result, answer in zip(group, answers, strict=True):
                    if answer == "completed":
                        yield result, "completed"
                    else:
                        alone.append(result)
        for result in alone:
            yield result, self._store_one(result)

    def _store_one(self, result: Result) -> Outcome:
        """Complete or fail a task in a transaction of its own."""

        def store() -> Outcome:
            with self._database.transaction():
                return self._finish(result)

        try:
            return retrying(store)
        except _RolledBack as rolled_back:
            return self._store_one(rolled_back.result)
        except DatabaseError as error:
            if isinstance(result.outcome, Failure) or not _is_at_fault(error):
                raise
            # The commit has refused the result.
            refused = Failure(f"completing the task: {error}", sqlstate=error.sqlstate)
            return self._store_one(result._replace(outcome=refused))

    def _finish(self, result: Result) -> Outcome:
        """Complete or fail a task, after locking its run and then its claim.

        Raises _RolledBack with a failure in place of a result that cannot be stored.
        """
        if isinstance(result.outcome, Success) and self._complete(result, result.outcome):
            return "completed"
        claim = result.claim
        run_status = self._pgflow.lock_run(claim.run_id)
        step_status = self._pgflow.lock_claim(claim)
        if run_status != "started" or step_status != "started":
            if run_status is None:
                error = "the run had been deleted"
            elif run_status != "started":
                error = f"the run had ended ({run_status}) before the handler did"
            elif step_status is None:
                error = "another worker had taken the task"
            else:
                error = f"the step had ended ({step_status}) before the handler did"
            if step_status is not None:
                # pgflow before 0.15.1 would leave the task started for ever.
                self._pgflow.fail(claim, error, final=True)
            self._record(result, "discarded", error)
            return "discarded"
        failure = result.outcome
        assert isinstance(failure, Failure)
        error = printable(failure.error)
        if failure.is_snooze:
            self._pgflow.requeue(claim, failure.after or 0)
            self._record(result, "snoozed", error)
            return "snoozed"
        failed = self._pgflow.fail(claim, error, final=failure.final, after=failure.after)
        self._record(result, "failed", error, failure.traceback)
        return "failed" if failed else "retried"

    def _complete(self, result: Result, success: Success) -> bool:
        """Complete a task; False if its claim is lost or its run has ended."""
        try:
            answer = self._pgflow.complete(_completion(result, success))
            reason = "pgflow refused it"
        except DatabaseError as error:
            if not _is_at_fault(error):
                raise
            answer, reason = "refused", str(error)
        if answer == "refused":
            refused = Failure(f'result of step "{result.claim.step_slug}": {reason}')
            raise _RolledBack(result._replace(outcome=refused))
        return answer == "completed"

    def _record(self, result: Result, outcome: str, error: str, traceback: str = "") -> None:
        self._registry.record_attempt(
            self._flow.slug,
            result.claim,
            outcome,
            duration_ms=result.duration_ms,
            error=error,
            traceback=traceback,
            log=result.log,
        )


def _is_at_fault(error: DatabaseError) -> bool:
    """Whether an error tells of the result, and not of the books."""
    return error.sqlstate.startswith(RESULT_AT_FAULT) and error.schema not in BOOKS


def _completion(result: Result, success: Success) -> Completion:
    return Completion(result.claim, success.output, result.duration_ms, result.log)


def _step_of_run(result: Result) -> tuple[str, str]:
    return result.claim.run_id, result.claim.step_slug
