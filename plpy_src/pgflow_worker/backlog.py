"""What a worker has taken and not finished, and which of it may be started next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from math import inf
from typing import TYPE_CHECKING

from pgflow_worker.attempt import CANCELLED, Failure, took_too_long
from pgflow_worker.definition import with_defaults
from pgflow_worker.flow import Flow
from pgflow_worker.pgflow import Claim, Message, Task
from pgflow_worker.runner import Result

if TYPE_CHECKING:
    from concurrent.futures import Future

# A task is started only if it can probably begin within so many seconds: from then on pgflow takes
# it for running, and a worker that dies loses an attempt of it.
HORIZON = 1.0
# What cannot begin within so many seconds is better left to another worker, if there is one.
FAR = 5.0
ASYNC_GRACE = 2.0  # seconds for an async handler to end after it was cancelled
# What a task takes besides its handler, and how much a new duration counts against former ones.
OVERHEAD = 0.001
WEIGHT = 0.3


class Backlog:
    """Messages that wait, started tasks that have not begun, and tasks that run.

    A handler that runs takes one of `max_concurrent` places. The main thread needs one too, for
    one handler after another; the others are for concurrent handlers.

    is_held: whether a step's tasks are not to be started yet. claims: of all tasks that are
    started and not done(). main: those for the main thread.
    """

    def __init__(
        self, flow: Flow, max_concurrent: int, is_held: Callable[[str], bool] = lambda _: False
    ) -> None:
        self._flow = flow
        self._places = max_concurrent
        self._is_held = is_held
        most = with_defaults(flow.options).max_attempts
        self._once = {
            slug for slug, step in flow.steps.items() if (step.options.max_attempts or most) == 1
        }
        self._has_concurrent_steps = any(step.is_concurrent for step in flow.steps.values())
        self._seconds: dict[str, float] = {}  # how long a step's handler takes, as far as known
        # With the time when it has begun.
        self._running: dict[Future[Result], tuple[Task, float]] = {}
        self._concurrent: deque[Task] = deque()
        self.main: deque[Task] = deque()
        self.claims: dict[tuple[object, ...], Claim] = {}
        self._has_suspect = False
        self.waiting: list[Message] = []

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left to start, to run or to collect."""
        return not (self.waiting or self.main or self._concurrent or self._running)

    @property
    def has_running(self) -> bool:
        """Whether a concurrent handler runs."""
        return bool(self._running)

    @property
    def has_running_here(self) -> bool:
        """Whether one runs in this process, see running()."""
        return any(began < inf for _, began in self._running.values())

    @property
    def has_free_place(self) -> bool:
        """Whether more messages than those that wait could begin now."""
        if self._has_suspect or any(message.suspect for message in self.waiting):
            return False
        if self.main and not self._has_concurrent_steps:
            return False
        return self._taken < self._places

    def learn(self, step_slug: str, seconds: float) -> None:
        """Note how long a handler took."""
        former = self._seconds.get(step_slug, seconds)
        self._seconds[step_slug] = former + WEIGHT * (seconds - former)

    @property
    def brief_steps(self) -> frozenset[str]:
        """The steps that are known to take less than about a second."""
        return frozenset(slug for slug, seconds in self._seconds.items() if seconds < HORIZON)

    def startable(self) -> list[Message]:
        """The messages whose tasks can begin within about a second, oldest first.

        One that may have killed a worker is started when nothing else is, and alone.
        """
        if not self.waiting or self._has_suspect:
            return []
        taken = self._taken
        main_waits = self._work(self.main)
        # Only if it pays: to start some more of what is in the queue already takes a transaction.
        main_is_full = main_waits > HORIZON / 2
        ahead = self._concurrent_work / self._places
        chosen: list[Message] = []
        for message in self.waiting:
            slug = message.step_slug or ""
            if self._is_held(slug):
                continue
            if message.suspect:
                # It waits until nothing else runs; those behind it need not.
                if self.claims or chosen:
                    continue
                return [message]
            seconds = self._expected(slug)
            # With one attempt, what has been started is never started again.
            at_once = slug in self._once
            if self._flow.steps[slug].is_concurrent:
                may_queue = not at_once and main_waits == 0.0
                may_queue = may_queue and ahead + seconds / self._places < HORIZON
                if taken >= self._places and not may_queue:
                    continue
                taken += 1
                ahead += seconds / self._places
            else:
                if main_waits == 0.0:
                    if taken >= self._places:
                        continue
                    taken += 1
                elif at_once or main_is_full or main_waits >= HORIZON:
                    continue
                main_waits += seconds
            chosen.append(message)
        return chosen

    def far(self) -> list[Message]:
        """The messages whose tasks will probably not begin for several seconds."""
        main_waits = self._work(self.main)
        ahead = self._concurrent_work / self._places
        found = []
        for message in self.waiting:
            slug = message.step_slug or ""
            concurrent = self._flow.steps[slug].is_concurrent
            if slug in self._seconds and (ahead if concurrent else main_waits) > FAR:
                found.append(message)
            elif concurrent:
                ahead += self._expected(slug) / self._places
            else:
                main_waits += self._expected(slug)
        return found

    def forget(self, messages: Sequence[Message]) -> None:
        """Forget messages that wait, because they are given back or have become tasks."""
        gone = {message.message_id for message in messages}
        self.waiting = [m for m in self.waiting if m.message_id not in gone]

    def add(self, messages: Sequence[Message], tasks: Sequence[Task]) -> None:
        """Take the tasks that these messages have become; what was not started is forgotten."""
        self.forget(messages)
        self._has_suspect = bool(tasks) and any(message.suspect for message in messages)
        for task in tasks:
            self.claims[task.claim.fence] = task.claim
            concurrent = self._flow.steps[task.claim.step_slug].is_concurrent
            (self._concurrent if concurrent else self.main).append(task)

    def done(self, claims: Sequence[Claim]) -> None:
        """Forget claims whose tasks are finished or given back."""
        for claim in claims:
            del self.claims[claim.fence]
        self._has_suspect = self._has_suspect and bool(self.claims)

    def drop_unbegun(self) -> list[Claim]:
        """Forget the started tasks that have not begun; they are to be given back."""
        unbegun = [task.claim for task in (*self.main, *self._concurrent)]
        self.main.clear()
        self._concurrent.clear()
        self.done(unbegun)
        return unbegun

    def drop_late(self) -> list[Claim]:
        """The same for those that turn out not to begin for seconds: the step has become slow."""
        late = []
        while len(self.main) > 1 and self._work(self.main) > FAR:
            late.append(self.main.pop().claim)
        free = self._places - len(self._running)
        while len(self._concurrent) > free and self._work(self._concurrent) > FAR * self._places:
            late.append(self._concurrent.pop().claim)
        self.done(late)
        return late

    @property
    def running_steps(self) -> set[str]:
        """The steps of concurrent handlers that run."""
        return {task.claim.step_slug for task, _ in self._running.values()}

    def running_claims(self) -> list[Claim]:
        """The claims of concurrent handlers that run."""
        return [task.claim for task, _ in self._running.values()]

    def next_concurrent(self) -> Iterator[Task]:
        """The tasks for which a place is free; each is to be passed to running()."""
        while self._concurrent and len(self._running) + bool(self.main) < self._places:
            yield self._concurrent.popleft()

    @property
    def main_may_run(self) -> bool:
        """Whether a task waits for the main thread, and a place is free for it."""
        return bool(self.main) and len(self._running) < self._places

    def running(self, task: Task, future: Future[Result], now: float) -> None:
        """Note that a task has begun. now: infinity for one whose time another process keeps."""
        self._running[future] = task, now

    def collect(self, timeout: float) -> list[Result]:
        """The results of concurrent handlers, after at most `timeout` seconds without any."""
        if not self._running:
            return []
        from concurrent.futures import FIRST_COMPLETED, wait

        done, _ = wait(self._running, timeout, FIRST_COMPLETED)
        # In the order in which they have begun.
        ended = [future for future in self._running if future in done]
        return [_result_of(future, self._running.pop(future)[0]) for future in ended]

    def abandon(self, now: float) -> list[Result]:
        """Fail those that have run for longer than they may, and forget them: they cannot be
        stopped. An async handler was cancelled when its time was up, and has refused."""
        late = []
        for future, (task, began) in list(self._running.items()):
            step = self._flow.steps[task.claim.step_slug]
            grace = ASYNC_GRACE if step.is_async else 0.0
            if now - began > task.claim.timeout + grace and not future.done():
                del self._running[future]
                late.append(Result(task.claim, took_too_long(step.slug, task.claim.timeout)))
        return late

    @property
    def _taken(self) -> int:
        return len(self._running) + len(self._concurrent) + bool(self.main)

    @property
    def _concurrent_work(self) -> float:
        return self._work(self._concurrent) + self._work(
            [task for task, _ in self._running.values()]
        )

    def _work(self, tasks: Sequence[Task] | deque[Task]) -> float:
        """Seconds that these take one after another."""
        return sum(self._expected(task.claim.step_slug) for task in tasks)

    def _expected(self, step_slug: str) -> float:
        return self._seconds.get(step_slug, HORIZON) + OVERHEAD


def _result_of(future: Future[Result], task: Task) -> Result:
    from concurrent.futures import CancelledError

    try:
        return future.result()
    except CancelledError:
        return Result(task.claim, CANCELLED)
    except BaseException as error:  # a MemoryError while another was being described
        out_of_memory = isinstance(error, MemoryError)
        return Result(task.claim, Failure(type(error).__name__, out_of_memory=out_of_memory))
