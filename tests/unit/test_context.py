"""What a handler is told about its task, and the log it may write."""

import logging
from typing import Any
from uuid import UUID

import pytest

from pgflow_worker import log
from pgflow_worker.context import Context

RUN_ID = UUID("12345678-1234-5678-1234-567812345678")


def context(**fields: Any) -> Context:
    return Context(run_id=RUN_ID, flow_slug="site", step_slug="page", **fields)


def test_what_a_context_tells() -> None:
    ctx = context(task_index=3, attempt=2, max_attempts=5, timeout=30)
    assert (ctx.run_id, ctx.flow_slug, ctx.step_slug) == (RUN_ID, "site", "page")
    assert (ctx.task_index, ctx.attempt, ctx.max_attempts, ctx.timeout) == (3, 2, 5, 30)


def test_a_run_given_as_text_is_a_uuid() -> None:
    ctx = Context(run_id=str(RUN_ID), flow_slug="site", step_slug="page")
    assert ctx.run_id == RUN_ID
    assert ctx.idempotency_key == f"{RUN_ID}/page/0"


def test_the_idempotency_key_is_the_same_in_every_attempt() -> None:
    keys = {context(task_index=3, attempt=attempt).idempotency_key for attempt in (1, 2, 3)}
    assert keys == {f"{RUN_ID}/page/3"}
    assert context(task_index=4).idempotency_key == f"{RUN_ID}/page/4"


def test_remaining_counts_down_and_below_zero() -> None:
    now = [1000.0]
    ctx = context(timeout=30, clock=lambda: now[0])
    assert ctx.remaining() == 30
    now[0] += 10
    assert ctx.remaining() == 20
    now[0] += 25
    assert ctx.remaining() == -5


def test_remaining_counts_the_time_of_the_world_unless_told_otherwise() -> None:
    ctx = context(timeout=30)
    first, second = ctx.remaining(), ctx.remaining()
    assert 29 < second <= first < 30


def test_a_log_keeps_its_lines() -> None:
    ctx = context()
    assert ctx.log_text == ""
    ctx.log.info("fetched %s", "http://x")
    ctx.log.warning("slow")
    first, second = ctx.log_text.splitlines()
    assert first.endswith(" INFO fetched http://x")
    assert second.endswith(" WARNING slow")
    assert ctx.log_text == ctx.log_text


def test_every_level_is_kept() -> None:
    ctx = context()
    for level in (logging.DEBUG, logging.INFO, logging.CRITICAL):
        ctx.log.log(level, "line")
    assert len(ctx.log_text.splitlines()) == 3


def test_an_exception_is_logged_with_its_traceback() -> None:
    ctx = context()
    try:
        raise ValueError("reason")
    except ValueError:
        ctx.log.exception("failed")
    assert " ERROR failed\nTraceback (most recent call last):" in ctx.log_text
    assert "ValueError: reason" in ctx.log_text


def test_attempts_do_not_share_a_log_and_nothing_leaks_into_the_process(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = context(), context()
    one.log.error("only here")
    assert two.log_text == ""
    assert caplog.records == []
    assert capsys.readouterr() == ("", "")
    assert "site.page" not in logging.Logger.manager.loggerDict


def test_a_wrong_log_call_does_not_fail_the_task() -> None:
    ctx = context()
    ctx.log.info("%d pages", "many")
    ctx.log.info("next")
    assert "%d pages" in ctx.log_text
    assert ctx.log_text.endswith(" INFO next")


def test_an_argument_that_cannot_be_shown_does_not_fail_the_task() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise LookupError

    ctx = context()
    ctx.log.info("page %s", Broken())
    assert "page %s" in ctx.log_text


def test_the_last_lines_of_a_long_log_are_kept() -> None:
    ctx = context()
    for number in range(1000):
        ctx.log.info("line %03d", number)
    lines = ctx.log_text.splitlines()
    assert lines[-1].endswith(" INFO line 999")
    kept = len(lines) - 1
    assert lines[0] == f"... {1000 - kept} earlier lines ..."
    assert lines[1].endswith(f" INFO line {1000 - kept}")
    text = "\n".join(lines[1:])
    assert log.MAX_CHARACTERS - len(lines[1]) - 1 <= len(text) <= log.MAX_CHARACTERS


def test_a_line_longer_than_the_log_is_cut() -> None:
    ctx = context()
    ctx.log.info("first")
    ctx.log.info("x" * 100_000)
    assert len(ctx.log_text) <= log.MAX_CHARACTERS + 100
    assert "first" not in ctx.log_text
    ctx.log.info("last")
    assert ctx.log_text.endswith(" INFO last")
    assert len(ctx.log_text) <= log.MAX_CHARACTERS + 100
