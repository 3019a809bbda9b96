"""JSON in and out: what may cross, and how the rest is refused."""

import json
import math
from collections import OrderedDict, namedtuple
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import IntEnum, StrEnum
from types import MappingProxyType
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgflow_worker import codec
from pgflow_worker.codec import NotJson, decode, encode

Point = namedtuple("Point", ["x", "y"])


@dataclass
class Page:
    title: str
    tags: tuple[str, ...] = ()


@dataclass
class Book:
    pages: list[Page]
    price: Decimal | None = None


class Colour(StrEnum):
    RED = "red"


class Size(IntEnum):
    LARGE = 3


class Text(str):
    def __str__(self) -> str:
        return "not this"


def error_of(value: object) -> str:
    with pytest.raises(NotJson) as caught:
        encode(value)
    return str(caught.value)


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


# What may cross


@pytest.mark.parametrize(
    "value", [None, False, True, 0, 0.0, -0.0, "", [], {}, [[]], [{}], {"": 0}]
)
def test_falsy_and_empty_values_stay_what_they_are(value: object) -> None:
    assert encode(value) == json.dumps(value, separators=(",", ":"))
    again = decode(encode(value))
    assert again == value
    assert type(again) is type(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ((), "[]"),
        ((1, (2,)), "[1,[2]]"),
        (Point(1, 2), "[1,2]"),
        (date(2024, 2, 29), '"2024-02-29"'),
        (datetime(2024, 2, 29, 12, 30, 0, 5), '"2024-02-29T12:30:00.000005"'),
        (
            datetime(2024, 2, 29, 12, tzinfo=timezone(timedelta(hours=2))),
            '"2024-02-29T12:00:00+02:00"',
        ),
        (
            UUID("12345678-1234-5678-1234-567812345678"),
            '"12345678-1234-5678-1234-567812345678"',
        ),
        (Page("Home"), '{"title":"Home","tags":[]}'),
        (
            Book([Page("One", ("a", "b"))], Decimal("9.90")),
            '{"pages":[{"title":"One","tags":["a","b"]}],"price":9.90}',
        ),
        (OrderedDict(b=1, a=2), '{"b":1,"a":2}'),
        (MappingProxyType({"a": 1}), '{"a":1}'),
        (Colour.RED, '"red"'),
        (Size.LARGE, "3"),
        (Text("this"), '"this"'),
        ({Colour.RED: 1}, '{"red":1}'),
        ('"\\\n\x7fä€😀', '"\\"\\\\\\n\\u007f\\u00e4\\u20ac\\ud83d\\ude00"'),
        (1e22, "1e+22"),
        (10**4000, "1" + "0" * 4000),
    ],
)
def test_values_and_their_text(value: object, text: str) -> None:
    assert encode(value) == text


@pytest.mark.parametrize(
    "text",
    ["0.1", "1.10", "-0", "1E+3", "1E-16383", "123456789012345678901234567890.5", "9E+131071"],
)
def test_a_decimal_is_written_exactly_and_as_a_number(text: str) -> None:
    assert encode(Decimal(text)) == text
    assert json.loads(encode([Decimal(text)]), parse_float=Decimal, parse_int=Decimal) == [
        Decimal(text)
    ]


def test_one_object_may_be_there_twice() -> None:
    shared = {"a": 1}
    assert encode([shared, {"again": shared}, shared]) == '[{"a":1},{"again":{"a":1}},{"a":1}]'


def test_the_deepest_value() -> None:
    assert encode(nested(codec.MAX_DEPTH)) == "[" * 400 + "]" * 400


# What may not cross


class Unordered:
    pass


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "$ is NaN"),
        ({"items": [0, 1, 2, {"score": float("nan")}]}, "$.items[3].score is NaN"),
        ([float("inf")], "$[0] is Infinity"),
        ([float("-inf")], "$[0] is -Infinity"),
        ({"a": Decimal("NaN")}, "$.a is NaN"),
        ({"a": Decimal("-Infinity")}, "$.a is -Infinity"),
        ({"a": "x\0y"}, "$.a has the character \\u0000, which PostgreSQL cannot store"),
        ({"\0": 1}, '$["\\u0000"] has the character \\u0000, which PostgreSQL cannot store'),
        (["\ud800"], "$[0] has half of a surrogate pair, which is no character"),
        ({"\udfff": 1}, '$["\\udfff"] has half of a surrogate pair, which is no character'),
        ({1: "a"}, "$ has the key 1, and JSON's keys are text"),
        ({"a": {None: 1}}, "$.a has the key None, and JSON's keys are text"),
        ({"a": {("b",): 1}}, "$.a has the key ('b',), and JSON's keys are text"),
        ({"a": {1, 2}}, "$.a is of type set, which JSON does not have"),
        ([b"bytes"], "$[0] is of type bytes, which JSON does not have"),
        ([time(12)], "$[0] is of type time, which JSON does not have"),
        ([timedelta(1)], "$[0] is of type timedelta, which JSON does not have"),
        ([1j], "$[0] is of type complex, which JSON does not have"),
        (Unordered(), "$ is of type Unordered, which JSON does not have"),
        (Page, "$ is of type type, which JSON does not have"),
        ((n for n in [1]), "$ is of type generator, which JSON does not have"),
        (Book([Page("a"), Page("b\0")]), "$.pages[1].title has the character"),
        ({"two words": [float("nan")]}, '$["two words"][0] is NaN'),
        ({"1st": {"ä": float("nan")}}, '$["1st"].ä is NaN'),
        ([[0, float("nan")]], "$[0][1] is NaN"),
    ],
)
def test_what_json_or_jsonb_does_not_have_is_named_with_its_path(
    value: object, message: str
) -> None:
    assert error_of(value).startswith(message)


def test_a_circle_is_named() -> None:
    items: list[Any] = []
    value = {"items": items}
    items.append(value)
    assert error_of(value) == "$.items[0] contains itself"
    items[:] = [items]
    assert error_of(items) == "$[0] contains itself"


def test_a_circle_of_dataclasses_is_named() -> None:
    book = Book([])
    book.pages.append(book)  # type: ignore[arg-type]
    assert error_of(book) == "$.pages[0] contains itself"


def test_too_deep_is_named_with_a_short_path() -> None:
    assert (
        error_of(nested(401)) == f"{'$' + '[0]' * 400:.60}... is nested more than 400 levels deep"
    )
    endless: dict[str, Any] = {}
    for _ in range(100_000):
        endless = {"a": endless}
    assert error_of(endless).endswith("... is nested more than 400 levels deep")


@pytest.mark.parametrize("stack", [300, 600])
def test_the_depth_does_not_depend_on_who_asks(stack: int) -> None:
    def deeper(levels: int) -> str:
        return deeper(levels - 1) if levels else encode(nested(codec.MAX_DEPTH))

    with suppress(NotJson):  # at least it is the value's failure
        assert deeper(stack) == "[" * 400 + "]" * 400


@pytest.mark.parametrize("exponent", [5000, 131_072, 200_000])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_integer_too_long_to_be_written(exponent: int, sign: int) -> None:
    assert error_of({"n": sign * 10**exponent}).startswith("$.n ")


def test_an_integer_longer_than_numeric_is_not_even_tried() -> None:
    assert error_of([1 << 1_000_000]) == "$[0] has more than 131072 digits"


@pytest.mark.parametrize("text", ["1E+131072", "1E-16384", "0." + "0" * 16383 + "1", "1E+999999"])
def test_a_decimal_longer_than_numeric(text: str) -> None:
    assert error_of([Decimal(text)]) == "$[0] has more digits than PostgreSQL's numeric"


def test_too_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_BYTES", 10)
    assert encode("x" * 8) == '"xxxxxxxx"'
    assert error_of("x" * 9) == "$ takes 11 bytes as JSON, the limit is 10"


def test_too_many_elements_or_members(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_ELEMENTS", 2)
    monkeypatch.setattr(codec, "MAX_MEMBERS", 2)
    assert encode([[1, 2], {"a": 1, "b": 2}]) == '[[1,2],{"a":1,"b":2}]'
    assert error_of({"a": [1, 2, 3]}) == "$.a has 3 elements, the limit is 2"
    assert error_of([{"a": 1, "b": 2, "c": 3}]) == "$[0] has 3 members, the limit is 2"


@dataclass
class Unfinished:
    done: int
    left: int = field(init=False)


class Broken(Mapping[str, int]):
    def __getitem__(self, key: str) -> int:
        raise LookupError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(["a"])

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize("value", [Unfinished(1), Broken()], ids=["dataclass", "mapping"])
def test_an_object_that_cannot_be_read_is_named(value: object) -> None:
    assert error_of([value]).startswith("$[0]")


# Decoding


def test_decode_reads_what_postgresql_writes() -> None:
    assert decode('{"a": [1, 2.5, null, true, "ä"]}') == {"a": [1, 2.5, None, True, "ä"]}


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000 + "]" * 100_000,
        "1" * 5000,
        pytest.param("1" + "0" * 400 + ".5", id="a number that would be Infinity"),
        pytest.param("[-1" + "0" * 400 + ".5]", id="a number that would be -Infinity"),
        "{",
        "",
    ],
    ids=lambda text: text[:10] or "nothing",
)
def test_decode_names_what_python_cannot_hold(text: str) -> None:
    with pytest.raises(NotJson, match="the input cannot be read as JSON: "):
        decode(text)


# Arbitrary JSON

characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(characters)
)
arbitrary_json = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(characters), inner),
    max_leaves=30,
)


@given(arbitrary_json)
def test_what_goes_out_comes_back(value: object) -> None:
    assert json.loads(encode(value)) == value
    assert decode(encode(value)) == value


@given(arbitrary_json)
def test_the_text_is_that_of_json_dumps_in_ascii(value: object) -> None:
    text = encode(value)
    assert text.isascii()
    assert text == json.dumps(value, separators=(",", ":"), allow_nan=False)


@given(st.decimals(allow_nan=False, allow_infinity=False))
def test_every_decimal_is_exact(value: Decimal) -> None:
    text = encode(value)
    assert json.loads(text, parse_float=Decimal, parse_int=Decimal) == value


@given(
    st.recursive(
        st.sampled_from([math.nan, math.inf, "\0", "\ud800", b"", 1j]),
        lambda inner: st.lists(inner, min_size=1) | st.dictionaries(st.text(), inner, min_size=1),
        max_leaves=5,
    )
)
def test_whatever_cannot_cross_is_not_json_and_has_a_path(value: object) -> None:
    message = error_of(value)
    assert message.startswith("$")
    assert "\0" not in message
    message.encode()  # without lone surrogates
