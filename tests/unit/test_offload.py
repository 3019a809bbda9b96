"""What a worker knows of the steps that run on clusters, without one."""

import asyncio
import json
from threading import Event
from typing import Any

import pytest

from pgflow_worker import Flow
from pgflow_worker.attempt import Failure, Success
from pgflow_worker.cluster import Evaluation, NotRun
from pgflow_worker.offload import (
    GRACE_SECONDS,
    LOAD_AND_RUN,
    RUN,
    Code,
    Offload,
    _result,
    placed,
    unfit,
)
from pgflow_worker.pgflow import Claim, Task
from pgflow_worker.registry import Placement

CLAIM = Claim("run", "far", 0, "worker", 1, 0, 1, 3, 60)
HERE, THERE = Placement("tcp://a:1", False), Placement("tcp://b:1", True)


def flow() -> Flow:
    flow = Flow("f")

    @flow.step(thread=True)
    def far(flow_input: object) -> None: ...

    @flow.step
    async def also_far(flow_input: object) -> None: ...

    @flow.step
    def near(flow_input: object) -> None: ...

    return flow


def test_which_steps_run_there() -> None:
    assert placed(flow(), {None: HERE}) == {"far": HERE, "also_far": HERE}
    assert placed(flow(), {None: HERE, "far": THERE}) == {"far": THERE, "also_far": HERE}
    assert placed(flow(), {"far": THERE, "near": HERE, "gone": HERE}) == {"far": THERE}
    assert placed(flow(), {None: HERE, "far": None}) == {"also_far": HERE}
    assert unfit(flow(), None) is None
    assert unfit(flow(), "near") == 'step "near" of flow "f" runs in the server'


@pytest.mark.parametrize(
    ("known", "outcome"),
    [
        ({}, Success("[1]")),
        ({"failure": Failure("wrong", final=True)._asdict()}, Failure("wrong", final=True)),
    ],
)
def test_answers(known: dict[str, Any], outcome: object) -> None:
    text = json.dumps({"duration_ms": 2.5, "log": "line", **known})
    result = _result(CLAIM, (text, "[1]"))
    assert (result.claim, result.outcome) == (CLAIM, outcome)
    assert (result.duration_ms, result.log) == (2.5, "line")


def test_an_answer_that_nothing_was_run() -> None:
    with pytest.raises(NotRun, match=r"^not here$"):
        _result(CLAIM, (json.dumps({"refused": "not here"}), ""))


@pytest.mark.parametrize("answer", [7, ("{", ""), ("{}", ""), ('{"failure": {"x": 1}}', "")])
def test_answers_that_are_none(answer: object) -> None:
    outcome = _result(CLAIM, answer).outcome
    assert isinstance(outcome, Failure)
    assert outcome.error.startswith("the cluster's answer cannot be read: ")


class Cluster:
    """Answers in turn, and remembers what it was asked."""

    def __init__(self, *answers: object) -> None:
        self._answers = list(answers)
        self.asked: list[tuple[str, str | None, bool]] = []

    async def evaluate(self, wanted: Evaluation) -> object:
        assert wanted.seconds == CLAIM.timeout + GRACE_SECONDS
        self.asked.append((wanted.expression, wanted.worker, wanted.once))
        return self._answers.pop(0)


ANSWER = (json.dumps({"duration_ms": 1, "log": ""}), "7")


@pytest.mark.parametrize(
    ("answers", "asked"),
    [
        ([ANSWER], [(RUN, None, False)]),
        # Who has not got the code gets it, and no other.
        (["tcp://w:1", ANSWER], [(RUN, None, False), (LOAD_AND_RUN, "tcp://w:1", False)]),
    ],
)
def test_the_code_goes_to_who_has_not_got_it(
    answers: list[object], asked: list[tuple[object, ...]]
) -> None:
    cluster = Cluster(*answers)
    code = Code("f", "m", {"m": ""})
    offload = Offload(flow(), code, {"far": HERE}, {}, 1000, lambda: None)
    result = asyncio.run(offload._ask(cluster, Task(CLAIM, "{}", "{}")))  # type: ignore[arg-type]
    assert result.outcome == Success("7")
    assert cluster.asked == asked


def test_an_input_that_is_too_large() -> None:
    offload = Offload(flow(), Code("f", "m", {"m": ""}), {"far": HERE}, {}, 100, lambda: None)
    sent = Event()
    task = Task(CLAIM, json.dumps({"first": "x" * 100}), "{}")
    result = asyncio.run(offload._run(Cluster(), task, sent))  # type: ignore[arg-type]
    assert sent.is_set()
    assert result.outcome == Failure(
        'input of step "far" takes 115 characters as JSON, and to a cluster at most 100'
    )
