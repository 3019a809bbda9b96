"""Flows as a user would write them."""

from textwrap import dedent
from typing import Any

import pytest

import pgflow_worker
from pgflow_worker.errors import FlowError
from pgflow_worker.flow import Flow, Step
from pgflow_worker.parameters import Role


def defined(source: str, slug: str = "f", **options: Any) -> Flow:
    """The flow that a module's text defines; it has the options unless it makes one itself."""
    namespace: dict[str, Any] = {
        "__name__": "defined",
        "flow": Flow(slug, **options),
        "Context": pgflow_worker.Context,
        "Transaction": pgflow_worker.Transaction,
        "pgflow_worker": pgflow_worker,
        "Any": Any,
    }
    exec(compile(dedent(source), "defined.py", "exec", dont_inherit=True), namespace)
    flow = namespace["flow"]
    assert isinstance(flow, Flow)
    return flow


def error_of(source: str) -> FlowError:
    with pytest.raises(FlowError) as caught:
        _ = defined(source).steps
    return caught.value


def roles(step: Step) -> dict[str, Role]:
    return {parameter.name: parameter.role for parameter in step.parameters}
