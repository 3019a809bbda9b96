"""Three steps that do nothing, with a transaction each."""

from pgflow_worker import Flow, Transaction

flow = Flow("chain_tx")


@flow.step
def first(flow_input: object, tx: Transaction) -> int:  # noqa: ARG001
    return 1


@flow.step
def second(first: int, tx: Transaction) -> int:  # noqa: ARG001
    return first


@flow.step
def third(second: int, tx: Transaction) -> int:  # noqa: ARG001
    return second
