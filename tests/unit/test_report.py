"""The report of a call."""

import json
from typing import get_args

import pytest

from pgflow_worker.report import Outcome, Report


def report() -> Report:
    return Report("completed", "site", "batch", 10, 5)


def test_a_new_report_as_json() -> None:
    assert json.loads(report().json()) == {
        "status": "completed",
        "flow_slug": "site",
        "mode": "batch",
        "batch_size": 10,
        "max_concurrent": 5,
        "worker_id": None,
        "slot": None,
        "completed": 0,
        "retried": 0,
        "snoozed": 0,
        "failed": 0,
        "discarded": 0,
        "rescued": 0,
        "parked": 0,
        "duration_ms": 0,
        "frozen_ms": 0,
        "notes": [],
    }


@pytest.mark.parametrize("outcome", get_args(Outcome))
def test_outcomes_are_counted(outcome: Outcome) -> None:
    counted = report()
    assert not counted.did_something
    counted.count(outcome)
    counted.count(outcome)
    assert counted.did_something
    expected = json.loads(report().json()) | {outcome: 2}
    assert json.loads(counted.json()) == expected


def test_frozen_time_is_told_in_whole_milliseconds_and_is_nothing_done() -> None:
    frozen = report()
    for _ in range(3):
        frozen.frozen_ms += 1.6
    assert '"frozen_ms":5,' in frozen.json()
    assert not frozen.did_something


def test_parked_messages_are_something_done() -> None:
    counted = report()
    counted.parked = 1
    assert counted.did_something


def test_a_note_is_kept_once_and_is_nothing_done() -> None:
    noted = report()
    for text in ("first", "second", "first"):
        noted.note(text)
    assert noted.notes == ["first", "second"]
    assert not noted.did_something


def test_reports_do_not_share_their_notes() -> None:
    report().note("x")
    assert report().notes == []


def test_an_error_goes_into_the_json() -> None:
    text = report().json(error="it broke", sqlstate="PW001")
    assert json.loads(text) | {"error": "it broke", "sqlstate": "PW001"} == json.loads(text)


def test_an_error_that_postgresql_cannot_store_does_not_lose_the_report() -> None:
    text = report().json(error="nul \0 and surrogate \ud800")
    assert "\\u0000" not in text
    assert json.loads(text)["error"].startswith("nul ")
