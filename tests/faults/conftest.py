"""What the tests of faults share with those of the database."""

from tests.database.conftest import background, other, role, session

__all__ = ["background", "other", "role", "session"]
