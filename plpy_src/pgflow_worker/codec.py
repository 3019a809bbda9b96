"""JSON in and out: what a handler gets and what may come back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from datetime import date
from decimal import Decimal
from json.encoder import encode_basestring_ascii
from uuid import UUID

from pgflow_worker.tracebacks import reason

# PostgreSQL's limits: jsonb holds its lengths in 28 bits, numeric at most 131,072 digits before
# and 16,383 after the decimal point. The depth is ours: well below Python's recursion limit.
MAX_BYTES = (1 << 28) - 1
MAX_DIGITS_BEFORE = 131_072
MAX_DIGITS_AFTER = 16_383
MAX_DEPTH = 400
# Of one array, of one object: with more, jsonb's parser wants a piece of memory of over 1 GB.
MAX_ELEMENTS = 1 << 24
MAX_MEMBERS = 1 << 23


class NotJson(ValueError):
    """A value cannot be stored as jsonb; the message names its JSON path and the reason."""


def decode(text: str) -> object:
    """Parse JSON as PostgreSQL wrote it. Raises NotJson where Python cannot hold it."""
    try:
        value: object = _DECODER.raw_decode(text)[0]  # PostgreSQL writes no space around it
    except (ValueError, RecursionError) as error:
        raise NotJson(f"the input cannot be read as JSON: {error}") from None
    return value


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:20]}... is too large a number for Python's float")
    return value


_DECODER = json.JSONDecoder(parse_float=_finite)


def encode(value: object) -> str:
    """Write a value as JSON, in ASCII.

    Takes what JSON has, tuples, Decimal (as a number), date and datetime (ISO 8601), UUID and
    dataclasses. Raises NotJson, such as "$.items[3].score is NaN", for everything else and for
    what jsonb would refuse.
    """
    try:
        text = "".join(_Encoder().write(value, "$"))
    except RecursionError:
        raise NotJson("$ is nested too deep for Python's stack") from None
    if len(text) > MAX_BYTES:
        raise NotJson(f"$ takes {len(text)} bytes as JSON, the limit is {MAX_BYTES}")
    return text


def check_text(value: str, path: str) -> None:
    """Refuse what PostgreSQL's text cannot hold. Raises ValueError, which names the path."""
    if "\0" in value:
        raise ValueError(f"{path} has the character \\u0000, which PostgreSQL cannot store")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path} has half of a surrogate pair, which is no character") from None


class _Encoder:
    def __init__(self) -> None:
        self._open: list[int] = []

    def write(self, value: object, path: str) -> Iterator[str]:
        if value is None:
            yield "null"
        elif value is True:
            yield "true"
        elif value is False:
            yield "false"
        elif isinstance(value, str):
            yield self._string(value, path)
        elif isinstance(value, int):
            yield self._integer(value, path)
        elif isinstance(value, float):
            yield self._float(value, path)
        elif isinstance(value, Decimal):
            yield self._decimal(value, path)
        elif isinstance(value, Mapping):
            yield from self._object(value.items, value, path)
        elif isinstance(value, list | tuple):
            yield from self._array(value, path)
        elif isinstance(value, date):  # datetime is a date
            yield f'"{value.isoformat()}"'
        elif isinstance(value, UUID):
            yield f'"{value}"'
        elif is_dataclass(value) and not isinstance(value, type):
            names = [field.name for field in fields(value)]
            yield from self._object(
                lambda: [(name, getattr(value, name)) for name in names], value, path
            )
        else:
            raise NotJson(f"{path} is of type {type(value).__name__}, which JSON does not have")

    def _object(
        self, members: Callable[[], Iterable[tuple[object, object]]], owner: object, path: str
    ) -> Iterator[str]:
        self._enter(owner, path)
        try:
            pairs = list(members())
        except Exception as error:  # code of the handler's own
            raise NotJson(f"{path} cannot be read: {reason(error)}") from error
        if len(pairs) > MAX_MEMBERS:
            raise NotJson(f"{path} has {len(pairs)} members, the limit is {MAX_MEMBERS}")
        separator = "{"
        for key, value in pairs:
            if not isinstance(key, str):
                raise NotJson(f"{path} has the key {key!r}, and JSON's keys are text")
            inner = f"{path}.{key}" if key.isidentifier() else f"{path}[{json.dumps(key)}]"
            yield f"{separator}{self._string(key, inner)}:"
            yield from self.write(value, inner)
            separator = ","
        yield "{}" if separator == "{" else "}"
        self._open.pop()

    def _array(self, values: list[object] | tuple[object, ...], path: str) -> Iterator[str]:
        if len(values) > MAX_ELEMENTS:
            raise NotJson(f"{path} has {len(values)} elements, the limit is {MAX_ELEMENTS}")
        self._enter(values, path)
        separator = "["
        for index, value in enumerate(values):
            yield separator
            yield from self.write(value, f"{path}[{index}]")
            separator = ","
        yield "[]" if separator == "[" else "]"
        self._open.pop()

    def _enter(self, container: object, path: str) -> None:
        if id(container) in self._open:
            raise NotJson(f"{path} contains itself")
        if len(self._open) >= MAX_DEPTH:
            raise NotJson(f"{path[:60]}... is nested more than {MAX_DEPTH} levels deep")
        self._open.append(id(container))

    def _string(self, value: str, path: str) -> str:
        try:
            check_text(value, path)
        except ValueError as error:
            raise NotJson(str(error)) from None
        return encode_basestring_ascii(value)

    def _integer(self, value: int, path: str) -> str:
        # log10(2) > 0.301: a cheap lower bound before Python refuses to print the number.
        if value.bit_length() * 0.301 > MAX_DIGITS_BEFORE:
            raise NotJson(f"{path} has more than {MAX_DIGITS_BEFORE} digits")
        try:
            return int.__repr__(value)
        except ValueError as error:
            raise NotJson(f"{path} cannot be written: {error}") from None

    def _float(self, value: float, path: str) -> str:
        if value != value:
            raise NotJson(f"{path} is NaN")
        if value in (float("inf"), float("-inf")):
            raise NotJson(f"{path} is {'Infinity' if value > 0 else '-Infinity'}")
        return float.__repr__(value)

    def _decimal(self, value: Decimal, path: str) -> str:
        if not value.is_finite():
            raise NotJson(f"{path} is {value}")
        exponent = value.as_tuple().exponent
        assert isinstance(exponent, int)
        if value.adjusted() >= MAX_DIGITS_BEFORE or -exponent > MAX_DIGITS_AFTER:
            raise NotJson(f"{path} has more digits than PostgreSQL's numeric")
        return str(value)
