"""Test flows without a server: `run_flow` runs one in this process, the way pgflow would.

from pgflow_worker.testing import run_flow

def test_greets():
    run = run_flow(flow, {"name": "Ada"})
    assert run.output == {"hello": "Hello, Ada"}
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any, Literal

from pgflow_worker import attempt, codec
from pgflow_worker.attempt import Failure, Success
from pgflow_worker.conditions import When
from pgflow_worker.context import Context
from pgflow_worker.definition import with_defaults
from pgflow_worker.errors import SecretUnavailable
from pgflow_worker.executors import Executors
from pgflow_worker.flow import Flow, Handler, Step
from pgflow_worker.secrets import given
from pgflow_worker.tracebacks import hiding

MAX_SNOOZES = 100  # of one task, before run_flow() takes it for one that never ends

Answer = Sequence[Mapping[str, Any]] | Exception
Answers = Callable[[str, Sequence[object]], Answer]


@dataclass(frozen=True)
class Executed:
    """A statement that a handler ran through `tx`."""

    sql: str
    args: tuple[object, ...]


class RecordingTransaction:
    """A Transaction that runs no SQL: it records the statements and answers as it is told.

    answers: called with the SQL and its arguments, returns the rows or an exception to raise;
    without it every statement returns no rows.
    """

    def __init__(self, answers: Answers | None = None) -> None:
        self.executed: list[Executed] = []
        self._answers = answers

    def execute(self, sql: str, args: Sequence[object] = ()) -> list[dict[str, Any]]:
        self.executed.append(Executed(sql, tuple(args)))
        answer = self._answers(sql, args) if self._answers is not None else ()
        if isinstance(answer, Exception):
            raise answer
        return [dict(row) for row in answer]

    def stream(
        self, sql: str, args: Sequence[object] = (), size: int = 1000
    ) -> Iterator[dict[str, Any]]:
        if size < 1:
            raise ValueError(f"size must be at least 1, not {size}")
        yield from self.execute(sql, args)


@dataclass
class Run:
    """What became of a run.

    status: completed or failed. output: the results of the steps nothing depends on, by slug.
    outputs: every finished step's result by slug. executed: the statements of the tasks that
    completed. skipped: why a step was skipped, by slug, in pgflow's words: condition_unmet,
    dependency_skipped or handler_failed. attempts: how many each step has made, all its tasks
    together. error, traceback: of the last attempt that failed, None if none did; or of the
    condition that failed the run. log: lines of every attempt.
    """

    flow_slug: str
    status: Literal["completed", "failed"] = "completed"
    output: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    executed: list[Executed] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    error: str | None = None
    traceback: str | None = None
    log: list[str] = field(default_factory=list)


def run_flow(
    flow: Flow,
    flow_input: object,
    *,
    handlers: Mapping[str, Handler] | None = None,
    answers: Answers | None = None,
    secrets: Mapping[str, str] | None = None,
) -> Run:
    """Run a flow in this process: no delays before retries, results checked as JSON.

    handlers: replacements by step slug, called with the same arguments as the step's own.
    answers: what `tx` answers, see RecordingTransaction; the statements are in `run.executed`.
    secrets: the values of those that the flow declares.
    Raises FlowError for a wrong flow, KeyError for a replacement of an unknown step and for a
    secret that the flow does not declare, SecretUnavailable for one that is missing. A failing
    handler raises nothing: it gives a run whose status is failed.
    """
    handlers = handlers or {}
    unknown = [slug for slug in handlers if slug not in flow.steps]
    if unknown:
        raise KeyError(f'flow "{flow.slug}" has no step "{unknown[0]}"')
    values = dict(secrets or {})
    undeclared = [name for name in values if name not in flow.secrets]
    if undeclared:
        raise KeyError(f'flow "{flow.slug}" does not declare secret "{undeclared[0]}"')
    missing = [name for name in flow.secrets if name not in values]
    if missing:
        raise SecretUnavailable(
            f'flow "{flow.slug}" needs secret "{missing[0]}": '
            f'run_flow(..., secrets={{"{missing[0]}": "..."}})'
        )
    simulation = _Simulation(flow, codec.encode(flow_input), handlers, answers)
    with hiding(), given(flow.slug, values):
        return simulation.run()


class _Failed(Exception):
    pass


class _Exhausted(Exception):
    """A task has no attempt left."""


class _Simulation:
    """A run, whose steps go through the states that pgflow has for them."""

    def __init__(
        self, flow: Flow, flow_input: str, handlers: Mapping[str, Handler], answers: Answers | None
    ) -> None:
        self._flow = flow
        self._flow_input = flow_input
        self._handlers = handlers
        self._answers = answers
        self._run_id = uuid.uuid4()
        self._executors = Executors(1)
        self._run = Run(flow.slug, attempts=dict.fromkeys(flow.steps, 0))
        # In the order of the flow, as they are left.
        self._created = dict(flow.steps)
        self._started: list[Step] = []

    def run(self) -> Run:
        try:
            self._start_ready()
            while self._started:
                self._run_step(self._started.pop(0))
                self._start_ready()
        except _Failed:
            self._run.status = "failed"
            return self._run
        finally:
            self._executors.shutdown(wait=True)
        depended_on = {slug for step in self._flow.steps.values() for slug in step.dependencies}
        self._run.output = {
            slug: output for slug, output in self._run.outputs.items() if slug not in depended_on
        }
        return self._run

    def _ready(self) -> list[Step]:
        """The steps whose dependencies are done, one way or the other."""
        done = {*self._run.outputs, *self._run.skipped}
        return [step for step in self._created.values() if done.issuperset(step.dependencies)]

    def _start_ready(self) -> None:
        self._resolve_conditions()
        # Maps of nothing have no task. pgflow starts what comes after them without a look at its
        # conditions.
        while empty := [step for step in self._ready() if self._elements(step) == []]:
            for step in empty:
                self._run.outputs[step.slug] = []
                del self._created[step.slug]
        started = self._ready()
        for step in started:
            del self._created[step.slug]
        order = list(self._flow.steps)
        self._started = sorted([*self._started, *started], key=lambda step: order.index(step.slug))

    def _resolve_conditions(self) -> None:
        """Skip the ready steps whose conditions are not met, until nothing new becomes ready."""
        while True:
            unmet: dict[When, list[Step]] = {"fail": [], "skip": [], "skip-cascade": []}
            for step in self._ready():
                if not step.conditions.are_met(self._condition_input(step)):
                    unmet[step.conditions.when_unmet].append(step)
            if unmet["fail"]:
                self._run.error = f'condition of step "{unmet["fail"][0].slug}" not met'
                self._run.traceback = None
                raise _Failed
            for step in [*unmet["skip"], *unmet["skip-cascade"]]:
                self._skip(step, "condition_unmet", step.conditions.when_unmet)
            if not unmet["skip"]:
                return

    def _condition_input(self, step: Step) -> object:
        return self._inputs(step) if step.dependencies else codec.decode(self._flow_input)

    def _skip(self, step: Step, why: str, mode: When) -> None:
        self._created.pop(step.slug, None)
        self._run.skipped[step.slug] = why
        if mode == "skip-cascade":
            for dependent in tuple(self._created.values()):
                if step.slug in dependent.dependencies:
                    self._skip(dependent, "dependency_skipped", mode)

    def _inputs(self, step: Step) -> dict[str, object]:
        """The results of a step's dependencies; one that was skipped has none."""
        outputs = self._run.outputs
        return {slug: outputs[slug] for slug in step.dependencies if slug in outputs}

    def _elements(self, step: Step) -> list[object] | None:
        """What a map step maps."""
        if step.kind != "map":
            return None
        if step.dependencies:
            elements = self._run.outputs.get(step.dependencies[0], [])
        else:
            elements = codec.decode(self._flow_input)
        if not isinstance(elements, list):
            raise TypeError(f'flow "{self._flow.slug}" maps the run\'s input, which must be a list')
        return elements

    def _run_step(self, step: Step) -> None:
        elements = self._elements(step)
        try:
            if elements is None:
                self._run.outputs[step.slug] = self._run_task(step, 0, self._inputs(step))
            else:
                self._run.outputs[step.slug] = [
                    self._run_task(step, index, element) for index, element in enumerate(elements)
                ]
        except _Exhausted:
            if step.conditions.when_exhausted == "fail":
                raise _Failed from None
            self._skip(step, "handler_failed", step.conditions.when_exhausted)

    def _run_task(self, step: Step, task_index: int, task_input: object) -> object:
        defaults = with_defaults(self._flow.options)
        max_attempts = step.options.max_attempts or defaults.max_attempts or 1
        number, snoozes = 1, 0
        while number <= max_attempts and snoozes <= MAX_SNOOZES:
            self._run.attempts[step.slug] += 1
            context = Context(
                run_id=self._run_id,
                flow_slug=self._flow.slug,
                step_slug=step.slug,
                task_index=task_index,
                attempt=number,
                max_attempts=max_attempts,
                timeout=step.options.timeout or defaults.timeout or 60,
            )
            transaction = RecordingTransaction(self._answers)
            outcome = self._attempt(step, task_input, context, transaction)
            self._run.log += context.log_text.splitlines()
            if not isinstance(outcome, Failure):
                self._run.executed += transaction.executed
                return codec.decode(outcome.output)
            self._run.error, self._run.traceback = outcome.error, outcome.traceback
            if outcome.final:
                break
            if outcome.is_snooze:
                snoozes += 1
            else:
                number += 1
        raise _Exhausted

    def _attempt(
        self, step: Step, task_input: object, context: Context, transaction: RecordingTransaction
    ) -> Success | Failure:
        # Every attempt gets values of its own, as it would from the database.
        inputs = codec.decode(codec.encode(task_input)), codec.decode(self._flow_input)
        handler = self._handlers.get(step.slug)
        if step.is_async:
            future = self._executors.event_loop.submit(
                attempt.run_async, step, *inputs, context, handler
            )
        elif step.thread:
            future = self._executors.threads.submit(
                attempt.run, step, *inputs, context, None, handler
            )
        else:
            tx = transaction if step.is_transactional else None
            return attempt.run(step, *inputs, context, tx, handler)
        try:
            return future.result()
        except CancelledError:
            return attempt.CANCELLED
