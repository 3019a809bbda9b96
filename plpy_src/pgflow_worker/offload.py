"""Concurrent handlers that run on Dask clusters, where an administrator has sent them.

A cluster's machines need Python and Dask. The code goes there by value: this package and the
stored modules, with the first task that meets a process without them. What runs there is in
remote.py. Imported only by calls whose flow has such steps; see set_executor() in SQL.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
import zlib
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from pgflow_worker.attempt import Failure, Success, took_too_long
from pgflow_worker.cluster import (
    CLOSE_SECONDS,
    REST_SECONDS,
    SEND_SECONDS,
    Cluster,
    Evaluation,
    Lost,
    NoPlace,
    NotRun,
    TooLong,
)
from pgflow_worker.errors import InvalidArgument
from pgflow_worker.executors import EventLoopExecutor
from pgflow_worker.modules import imported
from pgflow_worker.runner import Result
from pgflow_worker.tracebacks import printable, reason

if TYPE_CHECKING:
    from pgflow_worker.flow import Flow
    from pgflow_worker.pgflow import Claim, Task
    from pgflow_worker.registry import Placement

GRACE_SECONDS = 5.0  # for a handler to end on the cluster after its time was up
# Dask calls eval(), which every Python has. Where the code is not, it answers with the worker.
RUN = (
    "found.run(request) if (found := __import__('sys').modules.get(name)) "
    "else __import__('distributed').get_worker().address"
)
# The name of a file of the package's, so that tracebacks leave it out.
_BOOT = "exec(compile(boot, f'/{name}/boot.py', 'exec'))"
LOAD_AND_RUN = f"{_BOOT} or load(name, code).run(request)"
LOAD_AND_EXAMINE = f"{_BOOT} or examine(name, code)"

ADDRESS = re.compile(r"(tcp|tls|ws|wss|ucx)://[^\s/]+:[0-9]{1,5}")
FIT = "What may run on a cluster is async def or has thread=True, and no transaction."

Expression = tuple[str, dict[str, object]]


class Code:
    """What a flow's handlers need on a cluster, as text: this package, and the stored modules

    that the flow's imports. name: of the package there. Other code has another, and so has
    another flow.
    """

    def __init__(self, flow_slug: str, module: str, modules: Mapping[str, str]) -> None:
        content = {
            "package": _package(),
            "modules": imported(module, modules),
            "module": module,
            "flow_slug": flow_slug,
        }
        self._text = json.dumps(content, sort_keys=True).encode()
        self.name = f"_pgflow_worker_{hashlib.sha256(self._text).hexdigest()[:32]}"

    def to_run(self, request: str) -> Expression:
        """An expression and its variables, for a process that probably has the code."""
        return RUN, {"name": f"{self.name}.ready", "request": request}

    def to_load_and_run(self, request: str) -> Expression:
        """The same for one that has not."""
        return LOAD_AND_RUN, {**self._names, "request": request}

    def to_examine(self) -> Expression:
        """The same for remote.examine()."""
        return LOAD_AND_EXAMINE, self._names

    @property
    def _names(self) -> dict[str, object]:
        return {"name": self.name, "code": self._compressed, "boot": _package()["boot"]}

    @cached_property
    def _compressed(self) -> bytes:
        return zlib.compress(self._text)


@cache
def _package() -> dict[str, str]:
    """The text of this package's modules by name."""
    return {path.stem: path.read_text() for path in Path(__file__).parent.glob("*.py")}


def check(flow: Flow, step_slug: str | None, address: str | None) -> None:
    """Refuse an address that is none, and a step that cannot run on a cluster. None: no address.

    Raises InvalidArgument.
    """
    if address is not None and not ADDRESS.fullmatch(address):
        raise InvalidArgument(
            f'"{address}" is no address of a Dask scheduler',
            hint="It has a protocol, a host and a port: tcp://10.0.0.7:8786.",
        )
    problem = unfit(flow, step_slug)
    if problem is not None:
        raise InvalidArgument(problem, hint=FIT)


def unfit(flow: Flow, step_slug: str | None) -> str | None:
    """Why nothing of the flow, or the step, could run on a cluster."""
    if step_slug is None:
        if any(step.is_concurrent for step in flow.steps.values()):
            return None
        return f'flow "{flow.slug}" has no step that could run on a cluster'
    if step_slug not in flow.steps:
        return f'flow "{flow.slug}" has no step "{step_slug}"'
    if flow.steps[step_slug].is_concurrent:
        return None
    return f'step "{step_slug}" of flow "{flow.slug}" runs in the server'


def placed(flow: Flow, rows: Mapping[str | None, Placement | None]) -> dict[str, Placement]:
    """The steps that run on clusters. rows: see Registry.placements()."""
    found = {
        slug: rows[slug] if slug in rows else rows.get(None)
        for slug, step in flow.steps.items()
        if step.is_concurrent
    }
    return {slug: placement for slug, placement in found.items() if placement is not None}


def examine(
    flow: Flow, code: Code, address: str, step_slugs: Collection[str]
) -> str | tuple[list[str], list[str]]:
    """What keeps steps of a flow from running on a cluster, and its workers that are busy.

    A text if it cannot be reached.
    """
    loop = EventLoopExecutor()
    try:
        cluster = Cluster(address, f"pgflow_worker/{flow.slug}")
        found = loop.submit(cluster.examine, *code.to_examine()).result()
    finally:
        loop.shutdown()
    if isinstance(found, str):
        return found
    busy = sorted(worker for worker, known in found.items() if known is None)
    looked_at = {worker: known for worker, known in found.items() if known is not None}
    problems = [
        f"Dask worker {worker} cannot run it: {problem}"
        for worker, (problem, _) in sorted(looked_at.items())
        if problem is not None
    ]
    for slug in () if busy else step_slugs:
        wanted = flow.steps[slug].resources
        if not any(
            all(offered.get(name, 0) >= quantity for name, quantity in wanted.items())
            for _, offered in looked_at.values()
        ):
            problems.append(
                f'no worker of Dask scheduler {address} has what step "{slug}" needs: {wanted}'
            )
    return problems, busy


class Offload:
    """The steps of one flow that run on clusters, during one call of work().

    placements: by the steps' slugs. secrets: the flow's. max_bytes: of an input and of a result.
    prepare: called before there are threads. notes: what the report is to say.
    """

    def __init__(
        self,
        flow: Flow,
        code: Code,
        placements: Mapping[str, Placement],
        secrets: Mapping[str, str],
        max_bytes: int,
        prepare: Callable[[], None],
    ) -> None:
        self._flow = flow
        self._code = code
        self._placements = placements
        self._secrets = dict(secrets)
        self._max_bytes = max_bytes
        self._prepare = prepare
        self._topic = f"pgflow_worker/{flow.slug}"
        self._loop: EventLoopExecutor | None = None
        self._clusters: dict[str, Cluster] = {}
        self.notes: list[str] = []
        # Steps whose tasks found no place: until when they are left alone, and why.
        self._resting: dict[str, tuple[float, str]] = {}

    def __contains__(self, step_slug: object) -> bool:
        return step_slug in self._placements

    def is_held(self, step_slug: str) -> bool:
        """Whether the step's tasks cannot be sent to its cluster now, or that is not known yet.

        The first question opens the connection.
        """
        if step_slug not in self:
            return False
        return self._cluster(step_slug)[1].is_connecting or self.trouble(step_slug) is not None

    def trouble(self, step_slug: str) -> str | None:
        """Why the step's tasks cannot be sent to its cluster now, if so."""
        if step_slug not in self:
            return None
        until, why = self._resting.get(step_slug, (0.0, ""))
        if time.monotonic() < until:
            return why
        return self._cluster(step_slug)[1].trouble

    def submit(self, task: Task, sent: Event) -> Future[Result]:
        """Run the task on its step's cluster. What was not run there is snoozed.

        sent: set when the task is on its way.
        """
        loop, cluster = self._cluster(task.claim.step_slug)
        return loop.submit(self._run, cluster, task, sent)

    def shutdown(self) -> None:
        """Leave the clusters, which then drop what they were to run."""
        loop, self._loop = self._loop, None
        if loop is not None:
            for future in [loop.submit(cluster.close) for cluster in self._clusters.values()]:
                # One that does not answer is left.
                with suppress(Exception, CancelledError):
                    future.result(CLOSE_SECONDS + 1)
            loop.shutdown()

    def _cluster(self, step_slug: str) -> tuple[EventLoopExecutor, Cluster]:
        if self._loop is None:
            self._prepare()
            self._loop = EventLoopExecutor()
        address = self._placements[step_slug].address
        if address not in self._clusters:
            self._clusters[address] = Cluster(address, self._topic)
            self._loop.submit(self._clusters[address].keep)
        return self._loop, self._clusters[address]

    async def _run(self, cluster: Cluster, task: Task, sent: Event) -> Result:
        claim = task.claim
        size = len(task.input) + len(task.run_input or "")
        if size > self._max_bytes:
            text = f'input of step "{claim.step_slug}" takes {size} characters as JSON'
            sent.set()
            return Result(claim, Failure(f"{text}, and to a cluster at most {self._max_bytes}"))
        # Dask writes to the scheduler when this has given way to it.
        asyncio.get_running_loop().call_later(2 * SEND_SECONDS, sent.set)
        try:
            return await self._ask(cluster, task)
        except NotRun as error:
            if isinstance(error, NoPlace):
                self._resting[claim.step_slug] = time.monotonic() + REST_SECONDS, str(error)
            return self._not_run(claim, str(error))
        except Lost as error:
            if claim.max_attempts == 1:
                return Result(claim, Failure(f"{error}, and the task must not run twice"))
            return self._not_run(claim, str(error))
        except TooLong:
            return Result(claim, took_too_long(claim.step_slug, claim.timeout))
        except CancelledError:
            return Result(claim, Failure("canceled on the Dask cluster"))
        except Exception as error:
            if type(error).__name__ == "KilledWorker":
                return Result(
                    claim, Failure(f"Dask workers died while they ran this task: {error}")
                )
            return self._not_run(claim, f"Dask could not run the task: {reason(error)}")

    def _not_run(self, claim: Claim, why: str) -> Result:
        """Leave the task alone for a while, without an attempt."""
        why = printable(why)
        note = (
            f'step "{claim.step_slug}" has tasks that were not run, they rest for {REST_SECONDS} s '
            f"at a time, without an attempt: {why}"
        )
        if note not in self.notes:
            self.notes.append(note)
        return Result(claim, Failure(why, is_snooze=True, after=REST_SECONDS))

    async def _ask(self, cluster: Cluster, task: Task) -> Result:
        claim = task.claim
        step = self._flow.steps[claim.step_slug]
        request = self._request(task)
        key = f"{self._flow.slug}.{step.slug}-{claim.run_id}-{claim.task_index}-{claim.started_us}"

        wanted = Evaluation(
            key,
            *self._code.to_run(request),
            resources=step.resources,
            seconds=claim.timeout + GRACE_SECONDS,
            once=claim.max_attempts == 1,
        )
        answer = await cluster.evaluate(wanted)
        if isinstance(answer, str):
            # To the same worker: others may have it, and this one is to have it the next time.
            expression, variables = self._code.to_load_and_run(request)
            wanted = wanted._replace(
                key=f"{key}-code", expression=expression, variables=variables, worker=answer
            )
            answer = await cluster.evaluate(wanted)
        return _result(claim, answer)

    def _request(self, task: Task) -> str:
        claim = task.claim
        has_secrets = not self._secrets or self._placements[claim.step_slug].send_secrets
        return json.dumps(
            {
                "topic": self._topic,
                "step_slug": claim.step_slug,
                "input": task.input,
                "run_input": task.run_input,
                "context": {
                    "run_id": claim.run_id,
                    "task_index": claim.task_index,
                    "attempt": claim.attempt,
                    "max_attempts": claim.max_attempts,
                    "timeout": claim.timeout,
                },
                "secrets": self._secrets if has_secrets else None,
                "max_bytes": self._max_bytes,
            }
        )


def _result(claim: Claim, answer: Any) -> Result:
    """What remote.run() has answered."""
    try:
        text, output = answer
        known: dict[str, Any] = json.loads(text)
        if "refused" in known:
            raise NotRun(known["refused"])
        failure = known.get("failure")
        outcome = Success(str(output)) if failure is None else Failure(**failure)
        return Result(claim, outcome, float(known["duration_ms"]), str(known["log"]))
    except (TypeError, ValueError, KeyError) as error:
        return Result(claim, Failure(f"the cluster's answer cannot be read: {reason(error)}"))
