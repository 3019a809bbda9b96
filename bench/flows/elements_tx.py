"""A step whose result is the run's input, and a map over it, with a transaction each."""

from pgflow_worker import Flow, Transaction

flow = Flow("elements_tx")


@flow.array
def everything(flow_input: list[int], tx: Transaction) -> list[int]:  # noqa: ARG001
    return flow_input


@flow.map(over=everything)
def each(element: int, tx: Transaction) -> int:  # noqa: ARG001
    return 1
