"""A step whose result is the run's input, and a map over it that does nothing."""

from pgflow_worker import Flow

flow = Flow("elements")


@flow.array
def everything(flow_input: list[int]) -> list[int]:
    return flow_input


@flow.map(over=everything)
def each(element: int) -> int:  # noqa: ARG001
    return 1
