"""Three steps that do nothing."""

from pgflow_worker import Flow

flow = Flow("chain")


@flow.step
def first(flow_input: object) -> int:  # noqa: ARG001
    return 1


@flow.step
def second(first: int) -> int:
    return first


@flow.step
def third(second: int) -> int:
    return second
