"""Settings of the tests that need no server."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from pgflow_worker.process import Process
from tests.unit.fakes import FakeFlags, process_with

# Without a database of examples: the checkout may be read-only for whoever runs the tests.
settings.register_profile("unit", deadline=None, max_examples=60, database=None, print_blob=True)
settings.load_profile("unit")


@pytest.fixture
def flags() -> FakeFlags:
    """What PostgreSQL wants of the process."""
    return FakeFlags()


@pytest.fixture
def notes() -> list[str]:
    """What the process has told."""
    return []


@pytest.fixture
def process(flags: FakeFlags, notes: list[str]) -> Iterator[Process]:
    """This process as a backend in which handlers run."""
    with process_with(flags, notes) as process:
        yield process
