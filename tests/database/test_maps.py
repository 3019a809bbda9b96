"""Maps: their tasks are started and completed in sets, with the same rows as one by one."""

import json
import textwrap
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgflow_worker.testing import run_flow
from tests.conftest import Connection
from tests.database.conftest import WAITING, Session, counts, flow_of

Background = Callable[..., "Future[Any]"]

FLOWS = """
    root = Flow("root", max_attempts=2, base_delay=1)

    @root.map
    def each(element, flow_input, ctx: Context):
        if ctx.attempt == 1 and ctx.task_index in (3, 5):
            raise ValueError("not at once")
        return {"element": element, "of": len(flow_input)}

    chain = Flow("chain", max_attempts=2, base_delay=1)

    @chain.array
    def first(flow_input):
        return flow_input

    @chain.map(over=first)
    def second(element, ctx: Context):
        if ctx.attempt == 1 and ctx.task_index in (3, 5):
            raise ValueError("not at once")
        return [element]

    @chain.map(over=second)
    def third(element):
        return element * 2

    @chain.step
    def last(third):
        return len(third)
"""
# In a session's Python: pgflow's own functions are called.
ONE_BY_ONE = """
    select pgflow_worker._load();
    do language plpython3u $$
        import pgflow_worker.dialect
        pgflow_worker.dialect.TESTED_BODIES = ()
    $$
"""
ELEMENTS = st.lists(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=5)
    | st.lists(st.integers(0, 9), max_size=2)
    | st.dictionaries(st.sampled_from("ab"), st.integers(0, 9), max_size=2),
    max_size=12,
)
# Everything that pgflow keeps of a run, but for ids and times.
STATE = """
    select 'run', null, null::int, status, remaining_steps, null::int, null, input, output
    from pgflow.runs where run_id = %(run)s
    union all
    select 'step', step_slug, initial_tasks, status, remaining_tasks, remaining_deps,
        error_message, to_jsonb(array[started_at is null, completed_at is null, failed_at is null]),
        null
    from pgflow.step_states where run_id = %(run)s
    union all
    select 'task', step_slug, task_index, status, attempts_count, null,
        split_part(error_message, ' (', 1),
        to_jsonb(array[started_at is null, completed_at is null, failed_at is null]), output
    from pgflow.step_tasks where run_id = %(run)s
    union all
    select 'queued', message ->> 'step_slug', (message ->> 'task_index')::int, null, null, null,
        null, null, null
    from pgmq.{queue} where message ->> 'run_id' = %(run)s::text
    union all
    select 'archived', message ->> 'step_slug', (message ->> 'task_index')::int, null, null, null,
        null, null, null
    from pgmq.{archive} where message ->> 'run_id' = %(run)s::text
    union all
    select 'event ' || event, payload ->> 'step_slug', null, payload ->> 'status', null, null,
        payload ->> 'error_message', payload -> 'output', null
    from public.events where payload ->> 'run_id' = %(run)s::text
    order by 1, 2, 3, 4
"""


def state(session: Session, flow: str, run: str) -> list[tuple[Any, ...]]:
    query = STATE.format(queue=f"q_{flow}", archive=f"a_{flow}")
    return session.connection.execute(query, {"run": run}).fetchall()


@pytest.fixture
def events(session: Session) -> None:
    """Keeps pgflow's events, for which there is only a stand-in."""
    session.run("""
        create table public.events (payload jsonb, event text);
        create or replace function realtime.send(
            payload jsonb, event text, topic text, private boolean default true
        ) returns void language sql as 'insert into public.events values (payload, event)'
    """)


def calls_of(session: Session, function: str) -> int:
    """How often a function was called, since track_functions was set."""
    session.run("select pg_stat_force_next_flush()")
    number: int = session.value(
        "select coalesce(sum(calls), 0)::int from pg_stat_user_functions where funcname = %s",
        function,
    )
    return number


def work_to_the_end(session: Session, flow: str, batch_size: int) -> None:
    while session.value(f"select count(*) > 0 from pgmq.q_{flow}"):
        session.run(f"update pgmq.q_{flow} set vt = now()")  # delays of retries
        session.work(flow, mode="drain", batch_size=batch_size)


@pytest.mark.usefixtures("events")
def test_in_sets_and_one_by_one_are_the_same(
    session: Session, connect: Callable[..., Connection]
) -> None:
    session.deploy(FLOWS)
    others = FLOWS.replace('"root"', '"root_1"').replace('"chain"', '"chain_1"')
    session.deploy(others, module="others")
    one_by_one = Session(connect())
    one_by_one.run(ONE_BY_ONE)
    session.run("set track_functions = 'all'")

    @settings(
        max_examples=25,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(ELEMENTS, st.sampled_from(["root", "chain"]), st.integers(1, 13))
    def same(elements: list[Any], flow: str, batch_size: int) -> None:
        if flow == "chain":
            elements = [element for element in elements if isinstance(element, int | str)]
        runs = [session.start(flow, elements), session.start(f"{flow}_1", elements)]
        work_to_the_end(session, flow, batch_size)
        work_to_the_end(one_by_one, f"{flow}_1", batch_size)
        assert state(session, flow, runs[0]) == state(session, f"{flow}_1", runs[1])

    same()
    assert calls_of(session, "_start_map_tasks") > 0
    assert calls_of(session, "_complete_map_tasks") > 0
    one_by_one.run("set track_functions = 'all'")
    before = calls_of(one_by_one, "_start_map_tasks")
    one_by_one.start("root_1", [1])
    work_to_the_end(one_by_one, "root_1", 1)
    assert calls_of(one_by_one, "_start_map_tasks") == before


class Pair:
    """Two runs of one map, whose tasks are brought to their end in sets and one by one."""

    WORKERS = tuple(f"00000000-0000-0000-0000-00000000000{n}" for n in (1, 2))

    def __init__(self, session: Session, elements: int) -> None:
        self.session = session
        self.runs = [session.start("pair", list(range(elements))) for _ in range(2)]
        for n, worker in enumerate(self.WORKERS):
            session.run(
                "insert into pgflow.workers (worker_id, queue_name, function_name) "
                "values (%s, 'pair', 'test') on conflict do nothing",
                worker,
            )
            messages = (
                "select array_agg(message_id) from pgflow.step_tasks "
                f"where run_id = %s and task_index %% 2 = {n}"
            )
            session.run(
                f"select pgflow_worker._start_map_tasks('pair', ({messages}), %s)",
                self.runs[0],
                worker,
            )
            session.run(
                f"select pgflow.start_tasks('pair', ({messages}), %s)", self.runs[1], worker
            )

    def claims(
        self, session: Session, run: str, worker: int, indexes: list[int]
    ) -> list[tuple[Any, ...]]:
        return session.rows(
            "select task_index, attempts_count, "
            "coalesce((extract(epoch from started_at) * 1000000)::bigint, 0) "
            "from pgflow.step_tasks where run_id = %s and task_index = any(%s) "
            "and task_index %% 2 = %s order by task_index",
            run,
            indexes,
            worker,
        )

    def complete(self, session: Session, in_sets: bool, worker: int, indexes: list[int]) -> None:
        run = self.runs[0 if in_sets else 1]
        claims = self.claims(session, run, worker, indexes)
        if in_sets and claims:
            session.rows(
                "select pgflow_worker._complete_map_tasks("
                "'pair', %s, %s::uuid[], %s, %s, %s, %s, %s, %s, %s)",
                *(self.WORKERS[worker], [run] * len(claims), ["each"] * len(claims)),
                *(list(column) for column in zip(*claims, strict=True)),
                [json.dumps({"n": claim[0]}) for claim in claims],
                [1.0] * len(claims),
                ["log"] * len(claims),
            )
            return
        for index, attempt, started in claims:
            session.rows(
                "select pgflow_worker._complete_task("
                "'pair', %s, %s, 'each', %s, %s, %s, %s, 1.0, 'log')",
                *(self.WORKERS[worker], run, index, attempt, started),
                json.dumps({"n": index}),
            )

    def fail(self, session: Session, in_sets: bool, worker: int, indexes: list[int]) -> None:
        run = self.runs[0 if in_sets else 1]
        for index, *_ in self.claims(session, run, worker, indexes)[:1]:
            session.run("select from pgflow.runs where run_id = %s for update", run)
            session.rows("select pgflow.fail_task(%s, 'each', %s, 'failed')", run, index)


OPERATION = st.tuples(
    st.sampled_from(["complete", "complete", "fail"]), st.lists(st.integers(0, 9), min_size=1)
)


@pytest.mark.usefixtures("events")
@pytest.mark.parametrize("attempts", [1, 2])
def test_two_sessions_and_a_failing_sibling(
    session: Session, other: Session, background: Background, attempts: int
) -> None:
    session.deploy(f"""
        flow = Flow("pair", max_attempts={attempts}, base_delay=1)

        @flow.map
        def each(element): pass
    """)

    @settings(
        max_examples=20,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(st.integers(2, 10), st.lists(st.tuples(OPERATION, OPERATION, st.booleans()), max_size=5))
    def same(elements: int, rounds: list[Any]) -> None:
        pair = Pair(session, elements)
        for first, second, keep in rounds:
            for in_sets in (True, False):
                # The first worker holds the run while the second one wants it.
                with session.connection.transaction(force_rollback=not keep):
                    session.run(
                        "select from pgflow.runs where run_id = %s for update",
                        pair.runs[0 if in_sets else 1],
                    )
                    call = background(getattr(pair, second[0]), other, in_sets, 1, second[1])
                    getattr(pair, first[0])(session, in_sets, 0, first[1])
                call.result()
            assert state(session, "pair", pair.runs[0]) == state(session, "pair", pair.runs[1])

    same()


# When it is not used


@pytest.mark.parametrize("function", ["start_tasks", "complete_task", "fail_task"])
def test_functions_that_were_not_tested_are_called(session: Session, function: str) -> None:
    session.deploy('flow = Flow("f")\n@flow.map\ndef each(element): return element\n')
    # Another version of it, as far as anybody can tell.
    [[definition]] = session.rows(
        "select pg_get_functiondef(oid) from pg_proc "
        "where pronamespace = 'pgflow'::regnamespace and proname = %s",
        function,
    )
    session.connection.execute(
        definition.rstrip().removesuffix("$function$") + "-- new\n$function$"
    )
    session.run("set track_functions = 'all'")
    session.start("f", list(range(20)))
    assert counts(session.work("f", mode="drain")) == {"completed": 20}
    assert calls_of(session, "_start_map_tasks") == 0
    assert calls_of(session, "_complete_map_tasks") == 0
    assert session.value("select output from pgflow.runs") == {"each": list(range(20))}


def test_tasks_with_tx_are_not_completed_in_sets(session: Session) -> None:
    session.deploy(
        'flow = Flow("f")\n@flow.map\ndef each(element, tx: Transaction): return element\n'
    )
    session.run("set track_functions = 'all'")
    session.start("f", list(range(5)))
    assert counts(session.work("f", mode="drain")) == {"completed": 5}
    assert calls_of(session, "_complete_map_tasks") == 0


@pytest.mark.parametrize("function", ["_start_map_tasks", "_complete_map_tasks"])
def test_on_a_surprise_it_goes_task_by_task(session: Session, function: str) -> None:
    session.deploy('flow = Flow("f")\n@flow.map\ndef each(element): return element\n')
    [[signature]] = session.rows(
        "select oid::regprocedure::text from pg_proc where proname = %s", function
    )
    session.connection.execute(f"alter function {signature} rename to gone")
    session.start("f", list(range(20)))
    report = session.work("f", mode="drain")
    assert counts(report) == {"completed": 20}
    [note] = report["notes"]
    assert function in note or note == "tasks were stored one by one after an error (42883)"
    assert session.value("select output from pgflow.runs") == {"each": list(range(20))}


def test_a_result_that_cannot_be_stored_fails_only_its_task(session: Session) -> None:
    session.deploy("""
        flow = Flow("f", max_attempts=2, base_delay=1)

        @flow.map
        def each(element):
            return 10 ** 5000 if element == 7 else element
    """)
    session.run("alter table pgflow.step_tasks add check (length(output::text) < 1000)")
    session.start("f", list(range(20)))
    assert counts(session.work("f", mode="drain")) == {"completed": 19, "retried": 1}


def test_a_lost_claim_is_not_completed(
    session: Session, other: Session, background: Background
) -> None:
    session.deploy("""
        import time
        flow = Flow("f")

        @flow.map
        def each(element):
            time.sleep(element)
    """)
    session.start("f", [0, 0, 0, 0.005])
    with other.connection.transaction():
        other.run("select from pgflow.runs for update")
        call = background(session.work, "f", mode="drain")
        Session.until(other, WAITING, 1)
        other.run("update pgflow.step_tasks set attempts_count = 7 where task_index = 0")
    report = call.result()
    assert report["discarded"] >= 1
    assert session.value("select count(*) from pgflow.step_tasks where status = 'completed'") == 3
    assert session.value("select remaining_tasks from pgflow.step_states") == 1


def test_nothing_is_completed_in_a_run_that_another_step_has_failed(
    session: Session, other: Session, background: Background
) -> None:
    session.deploy('flow = Flow("f")\n@flow.map\ndef each(element): return element\n')
    session.start("f", [0, 1, 2, 3])
    with other.connection.transaction():
        # The map's own step goes on being started: only the run tells.
        other.run("select from pgflow.runs for update")
        call = background(session.work, "f")
        Session.until(other, WAITING, 1)
        other.run("update pgflow.runs set status = 'failed', failed_at = now()")
    assert "completed" not in counts(call.result())
    assert session.value("select count(*) from pgflow.step_tasks where status = 'completed'") == 0


def test_the_elements_of_a_long_array_arrive_at_their_tasks(session: Session) -> None:
    session.deploy("""
        flow = Flow("f")

        @flow.array
        def words(flow_input):
            return [f"{n} " * 20 for n in range(flow_input)]

        @flow.map(over=words)
        def each(word, ctx: Context):
            return word.split()[0] == str(ctx.task_index)
    """)
    session.start("f", 3000)
    assert counts(session.work("f", batch_size=200, mode="drain")) == {"completed": 3001}
    assert session.value(
        "select bool_and(output = 'true') from pgflow.step_tasks where step_slug = 'each'"
    )


# What may be mapped, and what comes of it: in the database as with run_flow()

LAST = """
    @flow.step
    def last(flow_input, {steps}):
        return {{"input": flow_input, "results": [{steps}]}}
"""
# Steps, the first of which puts every element into a list of its own.
SHAPES = {
    "the run's input": ("each", "@flow.map\ndef each(element): return [element]"),
    "a step": (
        "each, first",
        "@flow.step\ndef first(flow_input): return flow_input\n"
        "@flow.map(over=first)\ndef each(element): return [element]",
    ),
    "an array step": (
        "each, first",
        "@flow.array\ndef first(flow_input): return flow_input\n"
        "@flow.map(over=first)\ndef each(element): return [element]",
    ),
    "a map of a step": (
        "again, each",
        "@flow.array\ndef first(flow_input): return flow_input\n"
        "@flow.map(over=first)\ndef each(element): return element\n"
        "@flow.map(over=each)\ndef again(element): return [element]",
    ),
    "a map of a map": (
        "three, two, one",
        "@flow.map\ndef one(element): return element\n"
        "@flow.map(over=one)\ndef two(element): return {'of': element}\n"
        "@flow.map(over=two)\ndef three(element): return [element['of']]",
    ),
    "two maps of one step": (
        "each, other",
        "@flow.step\ndef first(flow_input): return flow_input\n"
        "@flow.map(over=first)\ndef other(element, ctx: Context): return ctx.task_index\n"
        "@flow.map(over=first)\ndef each(element): return [element]",
    ),
}


@pytest.mark.parametrize(
    "elements",
    [
        [],
        [None],
        [None, None],
        ["text", "", 0, 0.5, False, True, None, [], {}, [1, [None]], {"a": {"b": [0]}}],
        [[]],
        [[[]], [[1, 2], [3]]],
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_element_arrives_and_every_result_comes_back(
    session: Session, shape: str, elements: list[Any]
) -> None:
    steps, source = SHAPES[shape]
    source = f"""flow = Flow("f")\n{source}\n{textwrap.dedent(LAST.format(steps=steps))}"""
    flow = flow_of(source)
    session.deploy(source)
    session.start("f", elements)
    report = session.work("f", mode="drain", batch_size=4)
    assert counts(report) == {"completed": sum(run_flow(flow, elements).attempts.values())}
    [[status, output]] = session.rows("select status, output from pgflow.runs")
    assert status == "completed"
    assert same_json(output, run_flow(flow, elements).output)
    assert same_json(output["last"]["input"], elements)
    assert same_json(output["last"]["results"][0], [[element] for element in elements])


def same_json(one: object, other: object) -> bool:
    """Equal, and of the same types: for Python 0 is False."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


@pytest.mark.parametrize(
    ("shape", "flow_input"),
    [("the run's input", {"a": 1}), ("a map of a map", "text"), ("the run's input", None)],
)
def test_a_run_whose_input_is_no_array_does_not_start(
    session: Session, shape: str, flow_input: object
) -> None:
    source = f"""flow = Flow("f")\n{SHAPES[shape][1]}"""
    session.deploy(source)
    with pytest.raises(psycopg.errors.RaiseException, match="input is not an array") as caught:
        session.rows("select pgflow.start_flow('f', %s)", json.dumps(flow_input))
    assert str(caught.value).startswith("Flow f has root map steps but input is not an array (got")
    assert session.value("select count(*) from pgflow.runs") == 0
    with pytest.raises(TypeError, match="must be a list"):
        run_flow(flow_of(source), flow_input)


def test_ten_thousand_elements(session: Session) -> None:
    session.deploy(
        """
        flow = Flow("f")

        @flow.map
        def each(number): return number + 1

        @flow.map(over=each)
        def again(number): return number % 2

        @flow.step
        def last(each, again): return [sum(each), sum(again)]
        """
    )
    session.start("f", list(range(10_000)))
    report = session.work("f", mode="drain", batch_size=500, max_duration="10 minutes")
    assert counts(report) == {"completed": 20_001}
    assert session.value("select output from pgflow.runs") == {"last": [50_005_000, 5_000]}
