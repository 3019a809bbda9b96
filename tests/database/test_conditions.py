"""Conditions: patterns mean what PostgreSQL's containment means."""

import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgflow_worker.conditions import contains
from tests.database.conftest import Session

# Few scalars, so that equal ones meet, and what is equal in one language and not in the other.
SCALARS = st.sampled_from([None, True, False, 0, 1, -0.0, 1.0, 1.5, 10**17, 1e17, "", "1", "a"])
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2)
    ),
    max_leaves=6,
)


@st.composite
def parts(draw: st.DrawFn, value: Any) -> Any:
    """Something that a value contains, or nearly so."""
    if isinstance(value, dict):
        return {key: draw(parts(inner)) for key, inner in value.items() if draw(st.booleans())}
    if isinstance(value, list):
        chosen = draw(st.lists(st.sampled_from(value), max_size=3)) if value else []
        return [draw(parts(element)) for element in chosen]
    return draw(st.one_of(st.just(value), st.just(value), SCALARS))


PAIRS = st.tuples(JSON, JSON) | JSON.flatmap(lambda value: st.tuples(st.just(value), parts(value)))


def test_containment_is_that_of_jsonb(session: Session) -> None:
    met: list[bool] = []

    @settings(
        max_examples=1000,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(PAIRS)
    def same(pair: tuple[Any, Any]) -> None:
        there = session.value("select %s::jsonb @> %s::jsonb", *map(json.dumps, pair))
        assert contains(*pair) is there
        met.append(there)

    same()
    assert 100 < sum(met) < len(met) - 100
