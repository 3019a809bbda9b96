"""Run a task's handler: what it gets, how long it takes, what it leaves behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from pgflow_worker import attempt, codec
from pgflow_worker.attempt import Failure, Success
from pgflow_worker.context import Context
from pgflow_worker.flow import Flow, Step
from pgflow_worker.pgflow import Claim, Task
from pgflow_worker.transaction import DatabaseTransaction

if TYPE_CHECKING:
    from pgflow_worker.process import Process

Clock = Callable[[], float]


class Result(NamedTuple):
    """What a handler did with a claim's task, still to be stored."""

    claim: Claim
    outcome: Success | Failure
    duration_ms: float = 0.0
    log: str = ""


class Runner:
    """Calls the handlers of one flow.

    clock: seconds in which other threads than the main one could run.
    """

    def __init__(self, flow: Flow, process: Process, clock: Clock) -> None:
        self._flow = flow
        self._process = process
        self._clock = clock

    def run(self, task: Task, transaction: DatabaseTransaction | None = None) -> Result:
        """Call a handler on the main thread. Raises QueryCanceled and nothing else."""

        def call(function: Callable[[], object]) -> object:
            if transaction is not None:
                function = partial(transaction.watch, function)
            return self._process.call(
                function, task.claim.timeout, runs_sql=transaction is not None
            )

        return self._run(task, transaction, call)

    def run_in_thread(self, task: Task) -> Result:
        """Call a handler in this thread, where it cannot be interrupted."""
        return self._run(task, None, attempt.directly)

    async def run_async(self, task: Task) -> Result:
        """Call a handler on the running event loop."""
        step = self._flow.steps[task.claim.step_slug]
        try:
            inputs = decoded(task.input, task.run_input)
        except codec.NotJson as error:
            return Result(task.claim, Failure(str(error)))
        context = self._context(step, task.claim)
        started = time.perf_counter()
        outcome = await attempt.run_async(step, *inputs, context)
        return self._result(task, outcome, started, context)

    def _run(
        self, task: Task, transaction: DatabaseTransaction | None, call: attempt.Caller
    ) -> Result:
        step = self._flow.steps[task.claim.step_slug]
        try:
            inputs = decoded(task.input, task.run_input)
        except codec.NotJson as error:
            return Result(task.claim, Failure(str(error)))
        context = self._context(step, task.claim)
        started = time.perf_counter()
        outcome = attempt.run(step, *inputs, context, transaction, call=call)
        return self._result(task, outcome, started, context)

    def _result(
        self, task: Task, outcome: Success | Failure, started: float, context: Context
    ) -> Result:
        self._process.leave_if_forked()
        if isinstance(outcome, Failure) and outcome.out_of_memory:
            self._process.has_no_memory()
        duration_ms = (time.perf_counter() - started) * 1000
        return Result(task.claim, outcome, duration_ms, context.log_text)

    def _context(self, step: Step, claim: Claim) -> Context:
        return Context(
            run_id=claim.run_id,
            flow_slug=self._flow.slug,
            step_slug=claim.step_slug,
            task_index=claim.task_index,
            attempt=claim.attempt,
            max_attempts=claim.max_attempts,
            timeout=claim.timeout,
            clock=self._clock if step.is_concurrent else time.monotonic,
        )


def decoded(task_input: str, run_input: str | None) -> tuple[object, object]:
    """A Task's own input and the run's, from their JSON. Raises NotJson."""
    own = codec.decode(task_input)
    if run_input is not None:
        return own, codec.decode(run_input)
    return own, own.get("run") if isinstance(own, dict) else None
