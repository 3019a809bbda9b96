"""pgflow's TypeScript client looks at runs that the worker has done."""

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from tests.database.conftest import Session
from tests.typescript.conftest import answer

Node = Callable[..., "subprocess.Popen[str]"]
View = dict[str, Any]
Follow = Callable[[str, object], tuple[View, View]]

FLOW = """
    flow = Flow("wordCount", max_attempts=1)

    @flow.array("findWords")
    def find_words(flow_input):
        return flow_input["words"]

    @flow.map("countLetters", over=find_words)
    def count_letters(word):
        if not word:
            raise ValueError("an empty word")
        return len(word)

    @flow.step
    def total(count_letters):
        return sum(count_letters)
"""

ERROR = "ValueError: an empty word (flows_of_test.py:12, in count_letters)"


@pytest.fixture
def follow(session: Session, node: Node) -> Follow:
    """Lets the client start a run and the worker do it; what the client saw before and after."""
    # The part of Supabase that brings pgflow's events to the client.
    session.run(
        """create or replace function realtime.send(
            payload jsonb, event text, topic text, private boolean default true
        ) returns void language sql as $$
            select pg_notify('realtime', json_build_object(
                'payload', payload, 'event', event, 'topic', topic)::text)
        $$"""
    )

    def run_to_its_end(flow_slug: str, flow_input: object) -> tuple[View, View]:
        client = node("client.js", flow_slug, json.dumps(flow_input))
        assert client.stdout is not None
        if not (line := client.stdout.readline()):
            answer(client)
        session.work(flow_slug, mode="drain")
        return json.loads(line), answer(client)

    return run_to_its_end


def step(status: str, output: object = None, error: str | None = None) -> View:
    return {"status": status, "output": output, "error": error}


def test_a_run_that_the_client_starts_is_begun(session: Session, follow: Follow) -> None:
    session.deploy(FLOW)
    begun, _ = follow("wordCount", {"words": ["a"]})
    run = session.value("select run_id from pgflow.runs")
    assert begun == {
        "run_id": str(run),
        "status": "started",
        "output": None,
        "error": None,
        "remaining": 3,
        "steps": {
            "findWords": step("started"),
            "countLetters": step("created"),
            "total": step("created"),
        },
    }


def test_the_client_sees_a_run_completed_with_its_output(session: Session, follow: Follow) -> None:
    session.deploy(FLOW)
    _, seen = follow("wordCount", {"words": ["down", "the", "rabbit-hole"]})
    completed = {
        "status": "completed",
        "output": {"total": 18},
        "error": None,
        "remaining": 0,
        "steps": {
            "findWords": step("completed", ["down", "the", "rabbit-hole"]),
            "countLetters": step("completed", [4, 3, 11]),
            "total": step("completed", 18),
        },
    }
    assert seen["started"] == completed
    assert seen["watched"] == completed


def test_getrun_of_a_completed_run_has_its_output(session: Session, follow: Follow) -> None:
    session.deploy(FLOW)
    _, seen = follow("wordCount", {"words": ["down"]})
    assert seen["later"] == {
        "status": "completed",
        "output": {"total": 4},
        "error": None,
        "remaining": 0,
        # The client knows outputs of steps from events only.
        "steps": {slug: step("completed") for slug in ("findWords", "countLetters", "total")},
    }


def test_events_come_in_order(session: Session, follow: Follow) -> None:
    session.deploy(FLOW)
    _, seen = follow("wordCount", {"words": ["down", "the"]})
    assert seen["events"] == [
        "run:started",
        "step:started findWords",
        "step:completed findWords",
        "step:started countLetters",
        "step:completed countLetters",
        "step:started total",
        "step:completed total",
        "run:completed",
    ]


def test_the_client_sees_a_run_failed_with_the_error(session: Session, follow: Follow) -> None:
    session.deploy(FLOW)
    _, seen = follow("wordCount", {"words": ["down"] * 3 + [""]})
    for view in (seen["started"], seen["watched"]):
        assert (view["status"], view["error"], view["output"]) == ("failed", ERROR, None)
        assert view["steps"] == {
            "findWords": step("completed", ["down"] * 3 + [""]),
            "countLetters": step("failed", error=ERROR),
            "total": step("created"),
        }
    assert seen["events"][-2:] == ["step:failed countLetters", "run:failed"]


def test_getrun_of_a_failed_run_has_the_error_of_its_step(session: Session, follow: Follow) -> None:
    session.deploy(FLOW)
    _, seen = follow("wordCount", {"words": [""]})
    assert seen["later"]["status"] == "failed"
    assert seen["later"]["steps"]["countLetters"] == step("failed", error=ERROR)
