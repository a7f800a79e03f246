"""JSON Schemas that can be held to the letter: everything that is enforced is known here, everything else is refused.

A schema is read as draft 2020-12 and rewritten for the matching library: only keywords that it enforces, patterns and
formats as regular expressions of ours, annotations left out. Unknown keywords are refused too: a misspelt one would be
a rule that silently does not hold. Pure data, any thread, linear time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

from server.runner.refusal import Refused
from server.runner.regexes import translate

MAX_DEPTH = 32
"""Schemas inside schemas, and values inside `const` and `enum`."""
MAX_PARTS = 20_000
"""Subschemas, properties and constants in all; of the size that the library takes 1 s for."""
MAX_OPTIONAL_PROPERTIES = 200
"""In one object: any of the optional ones may come next, and the parser keeps four states for each."""
EXACT = 2**53
"""Larger numbers are not exact as floating-point numbers, which is what bounds are computed with."""

_ANNOTATIONS = frozenset(
    "title description default examples example deprecated readOnly writeOnly $comment discriminator "
    "contentMediaType contentEncoding".split()
)
_ROOT_ANNOTATIONS = frozenset(("$schema", "$id"))
_NUMBERS = frozenset("minimum maximum exclusiveMinimum exclusiveMaximum multipleOf".split())
_COUNTS = frozenset("minLength maxLength minItems maxItems minProperties maxProperties".split())
_LISTS = frozenset("anyOf oneOf allOf prefixItems".split())
_MAPS = frozenset("properties $defs definitions".split())
_IN_PLACE = ("const", "enum", "$ref", "allOf", "anyOf", "oneOf")
"""They go last: the library compiles what stands between two of them on its own."""

_DAYS = (
    r"(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    r"|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
)
_DATE = r"(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})-.{5}"
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_FORMATS: Mapping[str, tuple[dict[str, Any], ...]] = {
    "date": ({"pattern": f"^{_DAYS}$"}, {"pattern": f"^{_DATE}$"}),
    "time": ({"pattern": f"^{_TIME}$"},),
    "date-time": ({"pattern": f"^{_DAYS}T{_TIME}$"}, {"pattern": f"^{_DATE}T.*$"}),
    "hostname": ({"format": "hostname", "maxLength": 253},),
    **{name: ({"format": name},) for name in ("duration", "email", "ipv4", "ipv6", "uuid", "uri")},
}
"""What each format becomes. The library's own dates have a 29th of February in all years, its minutes a 60th second."""


def enforceable(text: str) -> dict[str, Any] | bool:
    """The schema in the JSON `text` as the library enforces it. Raises Refused with the place and the keyword."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        raise Refused("the schema is not valid JSON") from None
    return _Reader().read(schema)


class _Reader:
    def __init__(self) -> None:
        self._parts = 0
        self._known: set[str] = set()
        self._references: list[tuple[str, str]] = []
        self._keywords: Mapping[str, Callable[[str, Any, str, int], Any]] = {
            "type": _same,
            "required": _same,
            "const": self._constant,
            "enum": self._constant,
            "pattern": self._pattern,
            "$ref": self._reference,
            "items": self._schema_of,
            "additionalProperties": self._schema_of,
            "patternProperties": self._pattern_properties,
            **dict.fromkeys(_NUMBERS, self._number),
            **dict.fromkeys(_COUNTS, _count),
            **dict.fromkeys(_LISTS, self._list),
            **dict.fromkeys(_MAPS, self._map),
        }

    def read(self, schema: Any) -> dict[str, Any] | bool:
        found = self._schema(schema, "#", 0)
        for where, target in self._references:
            if target not in self._known:
                raise Refused(f"{where}/$ref: only references to a schema inside this one are supported")
        return found

    def _schema(self, schema: Any, where: str, depth: int) -> dict[str, Any] | bool:
        self._count_part(where, depth)
        self._known.add(where)
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise Refused(f"{where}: a schema must be an object or a boolean")
        _check_objects(schema, where)
        plain: dict[str, Any] = {}
        in_place: dict[str, Any] = {}
        for key, value in schema.items():
            if key in _ANNOTATIONS or key.startswith("x-") or (depth == 0 and key in _ROOT_ANNOTATIONS):
                continue
            if key == "uniqueItems" and value is False:
                continue
            if key == "format":
                in_place.setdefault("allOf", []).extend(_format(value, where))
                continue
            if key not in self._keywords:
                raise Refused(f"{where}: the keyword {key[:64]!r} is not supported")
            found = self._keywords[key](key, value, where, depth)
            if key == "allOf":
                in_place.setdefault("allOf", []).extend(found)
            else:
                (in_place if key in _IN_PLACE else plain)[key] = found
        return plain | in_place

    def _schema_of(self, key: str, value: Any, where: str, depth: int) -> Any:
        if isinstance(value, list):
            raise Refused(f"{where}: 'items' as a list is not supported; use 'prefixItems'")
        return self._schema(value, f"{where}/{key}", depth + 1)

    def _list(self, key: str, value: Any, where: str, depth: int) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise Refused(f"{where}/{key}: must be a list of at least one schema")
        return [self._schema(item, f"{where}/{key}/{index}", depth + 1) for index, item in enumerate(value)]

    def _map(self, key: str, value: Any, where: str, depth: int) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise Refused(f"{where}/{key}: must be an object of schemas")
        return {
            name: self._schema(inner, f"{where}/{key}/{_pointer(name)}", depth + 1) for name, inner in value.items()
        }

    def _pattern_properties(self, key: str, value: Any, where: str, depth: int) -> dict[str, Any]:
        found = self._map(key, value, where, depth)
        return {self._pattern(key, pattern, where, depth): schema for pattern, schema in found.items()}

    def _pattern(self, key: str, value: Any, where: str, depth: int) -> str:
        if not isinstance(value, str):
            raise Refused(f"{where}/{key}: must be a string")
        try:
            return translate(value, whole=False)
        except Refused as refused:
            raise Refused(f"{where}/{key}: {refused}") from None

    def _reference(self, key: str, value: Any, where: str, depth: int) -> str:
        if not isinstance(value, str) or not value.startswith("#"):
            raise Refused(f"{where}/$ref: only references to a schema inside this one are supported")
        self._references.append((where, unquote(value.rstrip("/") if value == "#/" else value)))
        return value

    def _number(self, key: str, value: Any, where: str, depth: int) -> int | float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Refused(f"{where}/{key}: must be a number")
        return _exact(value, f"{where}/{key}")

    def _constant(self, key: str, value: Any, where: str, depth: int) -> Any:
        if key == "enum" and (not isinstance(value, list) or not value):
            raise Refused(f"{where}/enum: must be a list of at least one value")
        self._check_value(value, f"{where}/{key}", depth)
        return value

    def _check_value(self, value: Any, where: str, depth: int) -> None:
        self._count_part(where, depth)
        if isinstance(value, str):
            if any((character < " " and character not in "\b\f\n\r\t") or character == "\x7f" for character in value):
                raise Refused(f"{where}: control characters are not supported")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            _exact(value, where)
        elif isinstance(value, list):
            for item in value:
                self._check_value(item, where, depth + 1)
        elif isinstance(value, dict):
            for item in value.values():
                self._check_value(item, where, depth + 1)

    def _count_part(self, where: str, depth: int) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise Refused(f"the schema has more than {MAX_PARTS} parts")
        if depth > MAX_DEPTH:
            raise Refused(f"{where[:200]}: the schema is nested more than {MAX_DEPTH} deep")


def _same(key: str, value: Any, where: str, depth: int) -> Any:
    return value


def _count(key: str, value: Any, where: str, depth: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= EXACT:
        raise Refused(f"{where}/{key}: must be a whole number from 0")
    return value


def _exact(value: int | float, where: str) -> int | float:
    if not math.isfinite(value) or abs(value) > EXACT or (value and abs(value) < 1e-12):
        raise Refused(f"{where}: numbers must be 0 or of a size from 1e-12 to 2^53")
    return value


def _format(name: Any, where: str) -> list[dict[str, Any]]:
    if name not in _FORMATS:
        raise Refused(f"{where}: the format {str(name)[:64]!r} is not supported; there are: {', '.join(_FORMATS)}")
    return list(_FORMATS[name])


def _check_objects(schema: dict[str, Any], where: str) -> None:
    """Rules about several keywords: keys may repeat where they have no name in the schema, so counting them is not
    counting properties; and each optional property costs the parser at every step."""
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise Refused(f"{where}/required: must be a list of strings")
    least = schema.get("minProperties", 0)
    if isinstance(least, int) and least > len(set(required)) + 1:
        raise Refused(f"{where}/minProperties: only up to one more than 'required' has is supported")
    properties = schema.get("properties", {})
    if isinstance(properties, dict) and len(properties.keys() - set(required)) > MAX_OPTIONAL_PROPERTIES:
        raise Refused(f"{where}: more than {MAX_OPTIONAL_PROPERTIES} optional properties in one object")


def _pointer(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
