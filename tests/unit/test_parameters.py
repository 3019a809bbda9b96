"""A handler's parameters: how they are recognised, and what a wrong one is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pgflow_worker.flow import Flow
from pgflow_worker.parameters import Role
from tests.unit.flows import defined, error_of, roles

if TYPE_CHECKING:
    import pgflow_worker as worker
    from pgflow_worker import Context, Transaction


def test_context_and_transaction_are_recognised_when_imported_for_types_only() -> None:
    # This file has `from __future__ import annotations` and imports them under TYPE_CHECKING.
    flow = Flow("f")

    @flow.step
    def save(tx: Transaction, ctx: Context) -> None: ...

    @flow.step
    def load(tx: worker.Transaction, ctx: worker.Context) -> None: ...

    for step in flow.steps.values():
        assert roles(step) == {"tx": Role.TRANSACTION, "ctx": Role.CONTEXT}


@pytest.mark.parametrize(
    "annotation",
    [
        "Context",
        "pgflow_worker.Context",
        "'Context'",
        '"pgflow_worker.Context"',
        "pgflow_worker.context.Context",
    ],
)
@pytest.mark.parametrize("future", ["", "from __future__ import annotations"])
def test_context_is_recognised_however_it_is_written(annotation: str, future: str) -> None:
    source = f"{future}\n@flow.step\ndef a(anything: {annotation}): ..."
    assert roles(defined(source).steps["a"]) == {"anything": Role.CONTEXT}


def test_transaction_is_recognised_under_an_alias() -> None:
    step = defined("Tx = Transaction\n@flow.step\ndef a(db: Tx): ...").steps["a"]
    assert roles(step) == {"db": Role.TRANSACTION}


def test_an_annotation_goes_before_a_steps_name() -> None:
    flow = defined("""
        @flow.step
        def ctx(): ...
        @flow.step
        def a(ctx: Context): ...
        @flow.step
        def b(ctx): ...
    """)
    assert roles(flow.steps["a"]) == {"ctx": Role.CONTEXT}
    assert roles(flow.steps["b"]) == {"ctx": Role.DEPENDENCY}


@pytest.mark.parametrize("annotation", ["Any", "object", "'Context | None'"])
def test_a_wrong_annotation_is_not_called_a_missing_one(annotation: str) -> None:
    error = error_of(f"@flow.step\ndef a(ctx: {annotation}): ...")
    assert 'parameter "ctx"' in str(error)
    assert "has no annotation" not in str(error)
    assert error.hint == "Write ctx: Context, with: from pgflow_worker import Context"


@pytest.mark.parametrize(
    "parameters",
    ["*, element", "flow_input", "ctx: Context", "tx: Transaction", "tx: Transaction, element"],
)
def test_a_maps_first_parameter_can_only_be_the_element(parameters: str) -> None:
    error = error_of(f"@flow.map\ndef a({parameters}): ...")
    assert str(error).startswith('flow "f", step "a": a map step\'s first parameter is the element')


def test_a_step_is_not_suggested_to_itself() -> None:
    error = error_of("@flow.step\ndef summary(sumary): ...")
    assert 'Did you mean "summary"' not in (error.hint or "")
