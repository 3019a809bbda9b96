"""Settings of the tests that need no server."""

from hypothesis import settings

# Without a database of examples: the checkout may be read-only for whoever runs the tests.
settings.register_profile("unit", deadline=None, max_examples=60, database=None, print_blob=True)
settings.load_profile("unit")
