"""What may be started next: places, durations, and what waits."""

import asyncio
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from math import inf
from typing import Any

import pytest

from pgflow_worker import Flow
from pgflow_worker.attempt import Failure, Success
from pgflow_worker.backlog import ASYNC_GRACE, FAR, HORIZON, WEIGHT, Backlog
from pgflow_worker.executors import EventLoopExecutor
from pgflow_worker.pgflow import Claim, Message, Task
from pgflow_worker.runner import Result

PLACES = 4


def mixed_flow() -> Flow:
    flow = Flow("f")

    @flow.step
    def main() -> None: ...

    @flow.step
    def other_main() -> None: ...

    @flow.step
    async def loop() -> None: ...

    @flow.step(thread=True)
    def thread() -> None: ...

    return flow


def main_flow() -> Flow:
    flow = Flow("f")
    flow.step("main")(lambda: 1)
    return flow


def backlog(flow: Flow | None = None, **seconds: float) -> Backlog:
    """A backlog that knows how long these steps take."""
    backlog = Backlog(flow or mixed_flow(), PLACES)
    for step_slug, known in seconds.items():
        backlog.learn(step_slug, known)
    return backlog


def messages(*step_slugs: str, first: int = 1) -> list[Message]:
    return [Message(number, slug) for number, slug in enumerate(step_slugs, first)]


def task(step_slug: str, number: int = 1) -> Task:
    return Task(Claim("run", step_slug, number, "worker", 1, 5, number, 3, 60), "{}")


def startable(backlog: Backlog, *step_slugs: str) -> list[int]:
    """The numbers of those of the messages, from 1, that may be started."""
    backlog.waiting = messages(*step_slugs)
    return [message.message_id for message in backlog.startable()]


def start(backlog: Backlog, *step_slugs: str) -> None:
    """Take these tasks as started."""
    backlog.add([], [task(slug, number) for number, slug in enumerate(step_slugs, 1)])


def begin(backlog: Backlog, now: float = 0.0) -> list[Future[Result]]:
    """Let as many concurrent handlers begin as may."""
    futures = []
    for begun in backlog.next_concurrent():
        futures.append(Future[Result]())
        backlog.running(begun, futures[-1], now)
    return futures


def run(backlog: Backlog, *step_slugs: str) -> list[Future[Result]]:
    """Let these concurrent handlers run."""
    start(backlog, *step_slugs)
    futures = begin(backlog)
    assert len(futures) == len(step_slugs)
    return futures


def numbers(tasks: Iterable[Task]) -> list[tuple[str, int]]:
    return claimed(task.claim for task in tasks)


def claimed(claims: Iterable[Claim]) -> list[tuple[str, int]]:
    return [(claim.step_slug, claim.task_index) for claim in claims]


# What may be started


def test_nothing_waits_nothing_may_start() -> None:
    assert startable(backlog()) == []


def test_of_an_unknown_step_of_the_main_thread_one_task_starts() -> None:
    assert startable(backlog(), *["main"] * 20) == [1]


def test_of_a_slow_step_of_the_main_thread_one_task_starts() -> None:
    assert startable(backlog(main=5), *["main"] * 20) == [1]


@pytest.mark.parametrize(("seconds", "expected"), [(0.3, 4), (0.6, 2), (0.01, 91)])
def test_of_a_fast_step_of_the_main_thread_as_many_start_as_begin_within_a_second(
    seconds: float, expected: int
) -> None:
    assert len(startable(backlog(main=seconds), *["main"] * 200)) == expected


def test_an_unknown_step_behind_fast_ones_may_be_the_last() -> None:
    assert startable(backlog(main=0.3), "main", "other_main", "main", "main") == [1, 2]


def test_more_for_the_main_thread_is_started_when_half_of_it_is_done() -> None:
    lagging = backlog(main=0.1)
    start(lagging, *["main"] * 5)
    assert startable(lagging, *["main"] * 20) == []
    lagging.main.popleft()
    assert len(startable(lagging, *["main"] * 20)) == 6


@pytest.mark.parametrize("step", ["loop", "thread"])
def test_concurrent_handlers_fill_the_places(step: str) -> None:
    assert startable(backlog(), *[step] * 20) == [1, 2, 3, 4]


def test_concurrent_handlers_that_run_and_that_are_about_to_take_their_places() -> None:
    busy = backlog()
    run(busy, "loop")
    start(busy, "thread")
    assert startable(busy, *["loop"] * 20) == [1, 2]


def test_the_main_thread_takes_one_place() -> None:
    busy = backlog()
    start(busy, "main")
    assert startable(busy, *["loop"] * 20) == [1, 2, 3]


def test_the_main_thread_takes_one_place_whatever_it_has_to_do() -> None:
    many = ["main"] * 5
    assert startable(backlog(main=0.001), *many, *["loop"] * 20) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_the_oldest_go_first_and_others_pass_those_that_cannot_begin() -> None:
    assert startable(backlog(), "main", "main", "loop", "loop", "loop", "loop") == [1, 3, 4, 5]
    assert startable(backlog(), "loop", "loop", "loop", "loop", "main") == [1, 2, 3, 4]


def test_without_a_free_place_nothing_begins_in_the_main_thread() -> None:
    busy = backlog(main=0.001)
    run(busy, *["loop"] * PLACES)
    assert startable(busy, "main", "main") == []


def test_short_concurrent_handlers_are_queued_ahead() -> None:
    busy = backlog(loop=0.5)
    run(busy, *["loop"] * PLACES)
    # Half a second each at four places, of which a second's worth is taken.
    assert startable(busy, *["loop"] * 20) == [1, 2, 3]


@pytest.mark.parametrize("seconds", [None, 1.0, 5.0])
def test_unknown_and_long_concurrent_handlers_are_not_queued_ahead(seconds: float | None) -> None:
    busy = backlog() if seconds is None else backlog(loop=seconds)
    run(busy, *["loop"] * PLACES)
    assert startable(busy, *["loop"] * 20) == []


def test_behind_a_handler_in_the_main_thread_nothing_is_queued_ahead() -> None:
    busy = backlog(loop=0.01, main=0.01)
    start(busy, "main")
    assert startable(busy, *["loop"] * 20) == [1, 2, 3]


def test_behind_one_that_is_about_to_start_in_the_main_thread_nothing_is_queued_ahead() -> None:
    # One place is the main thread's, three are free.
    assert startable(backlog(loop=0.01), "main", *["loop"] * 10) == [1, 2, 3, 4]


# Steps with one attempt


def once_flow() -> Flow:
    """Steps that are never to run twice; of `loop` there may be a second attempt."""
    flow = Flow("f", max_attempts=1)

    @flow.step
    def main() -> None: ...

    @flow.step(thread=True)
    def thread() -> None: ...

    @flow.step(max_attempts=2)
    async def loop() -> None: ...

    return flow


def test_with_one_attempt_only_what_begins_at_once_is_started() -> None:
    quick = backlog(once_flow(), main=0.001, thread=0.001)
    assert startable(quick, "main", "main", *["thread"] * 5, "main") == [1, 3, 4, 5]


def test_with_one_attempt_nothing_is_started_behind_another() -> None:
    busy = backlog(once_flow(), main=0.001, thread=0.001, loop=0.001)
    start(busy, "main")
    assert startable(busy, "main") == []
    busy = backlog(once_flow(), main=0.001, thread=0.001, loop=0.001)
    run(busy, *["loop"] * PLACES)
    assert startable(busy, "thread", "main", "loop", "loop") == [3, 4]


def test_the_steps_own_number_of_attempts_counts() -> None:
    flow = Flow("f")

    @flow.step(max_attempts=1)
    def main() -> None: ...

    @flow.step
    def other_main() -> None: ...

    quick = backlog(flow, main=0.001, other_main=0.001)
    assert startable(quick, *["main", "other_main"] * 3) == [1, 2, 4, 6]


# What workers have died with


def suspect(number: int, step_slug: str = "main") -> Message:
    return Message(number, step_slug, suspect=True)


def chosen(backlog: Backlog) -> list[int]:
    return [message.message_id for message in backlog.startable()]


@pytest.mark.parametrize("step", ["main", "loop", "thread"])
def test_a_suspect_is_started_alone(step: str) -> None:
    some = backlog(main=0.001, loop=0.001, thread=0.001)
    some.waiting = [suspect(1, step), *messages("main", "loop", step, first=2), suspect(5, step)]
    assert chosen(some) == [1]


@pytest.mark.parametrize("step", ["main", "loop"])
def test_beside_a_suspect_nothing_is_started_or_read_until_it_is_done(step: str) -> None:
    some = backlog(main=0.001, loop=0.001)
    some.waiting = [suspect(1, step), *messages("main", "loop", "loop", first=2)]
    some.add(some.startable(), [task(step)])
    assert numbers([*some.main, *some.next_concurrent()]) == [(step, 1)]
    some.main.clear()
    assert chosen(some) == []
    assert not some.has_free_place
    some.done([task(step).claim])
    assert chosen(some) == [2, 3, 4]
    assert some.has_free_place


def test_a_suspect_waits_for_what_is_started_and_not_what_comes_behind_it() -> None:
    some = backlog(main=0.001, loop=0.001)
    some.waiting = [*messages("main", "loop"), suspect(3), *messages("main", "loop", first=4)]
    assert chosen(some) == [1, 2, 4, 5]
    started = [task(slug, n) for slug, n in (("main", 1), ("loop", 2), ("main", 4), ("loop", 5))]
    some.add(some.startable(), started)
    for one in started:
        assert chosen(some) == []
        some.done([one.claim])
    assert chosen(some) == [3]


def test_a_suspect_waits_for_a_handler_that_runs() -> None:
    some = backlog()
    [future] = run(some, "loop")
    some.waiting = [suspect(2, "loop")]
    assert chosen(some) == []
    result = Result(task("loop").claim, Success("1"))
    future.set_result(result)
    assert some.collect(60) == [result]
    # Its result is still to be stored.
    assert chosen(some) == []
    some.done([result.claim])
    assert chosen(some) == [2]


def test_suspects_are_started_one_after_another() -> None:
    some = backlog(main=0.001)
    some.waiting = [suspect(1), suspect(2)]
    for number in (1, 2):
        assert chosen(some) == [number]
        some.add(some.startable(), [task("main", number)])
        some.done(some.drop_unbegun()[1:])
    assert some.is_empty


def test_a_suspect_that_was_not_really_started_blocks_nothing() -> None:
    some = backlog(main=0.001)
    some.waiting = [suspect(1), *messages("main", first=2)]
    some.add(some.startable(), [])
    assert chosen(some) == [2]
    assert some.has_free_place


# What others may have


def far(backlog: Backlog, *step_slugs: str) -> list[int]:
    """The numbers of those of the messages, from 1, that will not begin for several seconds."""
    backlog.waiting = messages(*step_slugs)
    return [message.message_id for message in backlog.far()]


def test_what_will_begin_soon_is_not_far() -> None:
    assert far(backlog(main=0.01), *["main"] * 100) == []
    assert far(backlog(loop=0.01), *["loop"] * 1000) == []
    assert far(backlog()) == []


def test_what_the_main_thread_will_not_come_to_for_seconds_is_far() -> None:
    busy = backlog(main=2.0)
    assert far(busy, *["main"] * 6) == [4, 5, 6]
    start(busy, "main", "main", "main")
    assert far(busy, "main", "loop", "main") == [1, 3]


def test_what_no_place_will_be_free_for_for_seconds_is_far() -> None:
    busy = backlog(loop=30.0)
    assert far(busy, *["loop"] * 3) == [2, 3]
    run(busy, "loop")
    assert far(busy, "loop", "main", "loop") == [1, 3]


def test_what_nothing_is_known_of_is_not_far() -> None:
    busy = backlog(main=30.0, loop=30.0)
    run(busy, "loop")
    start(busy, "main")
    assert far(busy, "thread", "other_main", "loop", "main") == [3, 4]


def test_what_is_forgotten_waits_no_more() -> None:
    some = backlog()
    some.waiting = messages("main", "loop", "main")
    some.forget(some.waiting[:2])
    assert some.waiting == messages("main", first=3)
    some.forget(some.waiting)
    assert some.is_empty


# What is known of a step


def test_a_steps_duration_follows_what_is_learned() -> None:
    learning = backlog(main=5.0)
    assert learning.brief_steps == set()
    for _ in range(20):
        learning.learn("main", 0.1)
    assert learning.brief_steps == {"main"}
    learning.learn("main", 5.0)
    assert learning.brief_steps == set()


def test_one_duration_that_stands_out_does_not_count_alone() -> None:
    learning = backlog(main=0.1)
    learning.learn("main", 2.0)
    assert learning.brief_steps == {"main"}


def test_brief_is_what_is_known_to_take_less_than_a_second() -> None:
    known = backlog(main=HORIZON, loop=0.99, thread=0.0)
    assert known.brief_steps == {"loop", "thread"}


# Places


def test_a_new_backlog_is_empty() -> None:
    new = backlog()
    assert new.is_empty
    assert new.has_free_place
    assert not new.has_running
    assert not new.main_may_run


def test_what_waits_or_is_started_or_runs_is_something_left() -> None:
    left = backlog()
    left.waiting = messages("main")
    assert not left.is_empty
    left.add(left.waiting, [task("main")])
    assert left.waiting == []
    assert not left.is_empty
    left.main.popleft()
    assert left.is_empty
    [future] = run(left, "loop")
    assert not left.is_empty
    assert left.has_running
    future.set_result(Result(task("loop").claim, Success("1")))
    left.collect(0)
    assert left.is_empty
    assert not left.has_running


def test_what_was_not_really_started_is_forgotten() -> None:
    some = backlog()
    some.waiting = messages("loop", "loop", "main")
    some.add(some.waiting[:2], [task("loop", 2)])
    assert some.waiting == messages("main", first=3)
    assert numbers(list(some.next_concurrent())) == [("loop", 2)]


def test_as_many_concurrent_handlers_begin_as_there_are_places() -> None:
    full = backlog()
    start(full, *["loop"] * 6)
    assert len(begin(full)) == PLACES
    assert begin(full) == []
    assert not full.has_free_place


def test_a_place_is_kept_for_the_main_thread() -> None:
    full = backlog()
    start(full, "main", *["loop"] * 6)
    assert len(begin(full)) == PLACES - 1
    assert full.main_may_run
    assert not full.has_free_place
    full.main.popleft()
    assert len(begin(full)) == 1


def test_the_main_thread_waits_for_a_place() -> None:
    full = backlog()
    futures = run(full, *["loop"] * PLACES)
    start(full, "main")
    assert not full.main_may_run
    futures[0].set_result(Result(task("loop").claim, Success("1")))
    full.collect(0)
    assert full.main_may_run


def test_with_the_main_thread_alone_there_is_one_place() -> None:
    alone = backlog(main_flow())
    assert alone.has_free_place
    start(alone, "main")
    assert not alone.has_free_place


def test_tasks_begin_in_the_order_in_which_they_were_started() -> None:
    some = backlog()
    start(some, "loop", "main", "thread", "loop")
    assert numbers(list(some.next_concurrent())) == [("loop", 1), ("thread", 3), ("loop", 4)]
    assert numbers(list(some.main)) == [("main", 2)]


def test_what_has_not_begun_is_dropped() -> None:
    some = backlog()
    run(some, "loop", "loop", "loop")
    start(some, "main", "loop", "thread", "main")
    dropped = some.drop_unbegun()
    assert claimed(dropped) == [("main", 1), ("main", 4), ("loop", 2), ("thread", 3)]
    assert some.drop_unbegun() == []
    assert some.has_running
    assert not some.main_may_run


def test_claims_are_known_until_they_are_done() -> None:
    some = backlog()
    run(some, "loop")
    start(some, "main", "thread")
    running, *unbegun = some.claims.values()
    assert claimed([running, *unbegun]) == [("loop", 1), ("main", 1), ("thread", 2)]
    assert some.claims == {claim.fence: claim for claim in [running, *unbegun]}
    assert some.drop_unbegun() == unbegun
    assert list(some.claims.values()) == [running]
    some.done([running])
    assert some.claims == {}


def test_only_handlers_that_have_begun_are_running() -> None:
    some = backlog()
    assert some.running_claims() == []
    [future, _] = run(some, "loop", "thread")
    start(some, "main", "loop")
    assert claimed(some.running_claims()) == [("loop", 1), ("thread", 2)]
    future.set_result(Result(task("loop").claim, Success("1")))
    some.collect(60)
    assert claimed(some.running_claims()) == [("thread", 2)]


def test_what_was_started_too_early_for_a_step_that_has_become_slow_is_dropped() -> None:
    some = backlog(main=0.1, loop=0.1)
    run(some, *["loop"] * (PLACES - 1))
    start(some, *["main"] * 4, *["loop"] * 4)
    assert some.drop_late() == []
    some.learn("main", FAR / 0.7)
    # Three of them would take more than FAR: the latest are dropped, and the first goes on.
    assert claimed(some.drop_late()) == [("main", 4), ("main", 3)]
    assert numbers(some.main) == [("main", 1), ("main", 2)]
    some.learn("loop", 3 * FAR / WEIGHT)
    assert claimed(some.drop_late()) == [("loop", 8), ("loop", 7), ("loop", 6)]
    assert claimed(some.running_claims()) == [("loop", 1), ("loop", 2), ("loop", 3)]
    assert len(some.claims) == PLACES - 1 + 2 + 1
    assert some.drop_late() == []


def test_the_next_of_the_main_thread_is_not_dropped_however_slow() -> None:
    some = backlog(main=10 * FAR)
    start(some, "main", "main")
    assert claimed(some.drop_late()) == [("main", 2)]
    assert some.main_may_run


# Results


def test_without_a_handler_that_runs_nothing_is_waited_for() -> None:
    assert backlog().collect(60) == []


def test_results_are_collected_once_in_the_order_in_which_their_handlers_began() -> None:
    some = backlog()
    futures = run(some, "loop", "thread", "loop")
    results = [Result(task("loop", n).claim, Success(str(n))) for n in (1, 2, 3)]
    for number in (2, 0):
        futures[number].set_result(results[number])
    assert some.collect(60) == [results[0], results[2]]
    assert some.collect(0) == []
    futures[1].set_result(results[1])
    assert some.collect(60) == [results[1]]


def test_a_result_ends_the_wait() -> None:
    some = backlog()
    [future, _] = run(some, "loop", "loop")
    result = Result(task("loop").claim, Success("1"))
    timer = threading.Timer(0.01, future.set_result, [result])
    timer.start()
    assert some.collect(60) == [result]
    timer.join()


def test_a_wait_without_a_result_ends() -> None:
    some = backlog()
    run(some, "loop")
    assert some.collect(0.01) == []
    assert some.has_running


def test_a_handler_that_cancels_itself_has_failed() -> None:
    async def cancel() -> Any:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()

    some = backlog()
    executor = EventLoopExecutor()
    some.running(task("loop"), executor.submit(cancel), 0.0)
    try:
        assert some.collect(60) == [
            Result(task("loop").claim, Failure("the handler cancelled itself"))
        ]
        assert some.is_empty
    finally:
        executor.shutdown()


# Handlers that do not end


def slow(kind: str, timeout: int = 10) -> tuple[Backlog, Future[Result]]:
    """A handler that runs since 100 s, and may for so long."""
    some = backlog()
    begun = task(kind)
    some.add([], [begun._replace(claim=begun.claim._replace(timeout=timeout))])
    [future] = begin(some, 100.0)
    return some, future


GRACES = [("thread", 0.0), ("loop", ASYNC_GRACE)]


@pytest.mark.parametrize(("kind", "grace"), GRACES)
def test_what_runs_for_longer_than_it_may_has_failed(kind: str, grace: float) -> None:
    some, _ = slow(kind)
    [result] = some.abandon(110.1 + grace)
    assert result.claim.step_slug == kind
    assert result.outcome == Failure(f'step "{kind}" took longer than 10 s')
    assert (result.duration_ms, result.log) == (0, "")
    # Its place is free, but the task is not finished before that is stored.
    assert some.running_claims() == []
    assert claimed(some.claims.values()) == [(kind, 1)]
    assert some.abandon(200.0) == []
    assert some.collect(0) == []


@pytest.mark.parametrize(("kind", "grace"), GRACES)
def test_what_may_still_run_does(kind: str, grace: float) -> None:
    some, _ = slow(kind)
    assert some.abandon(110.0 + grace) == []
    assert claimed(some.running_claims()) == [(kind, 1)]


@pytest.mark.parametrize(("kind", "grace"), GRACES)
def test_what_has_a_result_after_all_has_it(kind: str, grace: float) -> None:
    some, future = slow(kind)
    result = Result(task(kind).claim, Success("1"))
    future.set_result(result)
    assert some.abandon(1000.0) == []
    assert some.collect(0) == [result]


def test_only_what_runs_too_long_is_abandoned() -> None:
    some = backlog()
    some.add([], [task("thread", 1), task("thread", 2)])
    futures = [begin_one(some, now) for now in (0.0, 50.0)]
    assert [result.claim.task_index for result in some.abandon(70.0)] == [1]
    futures[1].set_result(result := Result(task("thread", 2).claim, Success("1")))
    assert some.collect(0) == [result]


def begin_one(some: Backlog, now: float) -> Future[Result]:
    """Let the next concurrent handler begin."""
    future = Future[Result]()
    some.running(next(some.next_concurrent()), future, now)
    return future


def test_what_is_held_is_not_started_and_keeps_nobody_waiting() -> None:
    held = {"thread"}
    backlog = Backlog(mixed_flow(), PLACES, held.__contains__)
    backlog.waiting = [Message(1, "thread", suspect=True), *messages("thread", "loop", first=2)]
    assert [message.message_id for message in backlog.startable()] == [3]
    held.clear()
    backlog.waiting = messages("thread", "loop")
    assert [message.message_id for message in backlog.startable()] == [1, 2]


def test_what_runs_elsewhere_has_its_time_kept_there() -> None:
    backlog = Backlog(mixed_flow(), PLACES)
    future: Future[Result] = Future()
    backlog.add(messages("thread"), [task("thread")])
    [begun] = backlog.next_concurrent()
    backlog.running(begun, future, inf)
    assert (backlog.has_running, backlog.has_running_here) == (True, False)
    assert backlog.abandon(1e9) == []
    future.set_result(Result(begun.claim, Success("1")))
    assert len(backlog.collect(1)) == 1
