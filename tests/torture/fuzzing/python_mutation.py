"""Changes to JSON documents and tars that leave them JSON documents and tars: what is wrong then lies deeper."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

Slot = tuple[Any, int]
"""A list, or the pairs of an object, and a place in it."""

_MOST_SLOTS = 2000
_BLOCK = 512


class Pairs(list[tuple[str, Any]]):
    """An object; its keys may come more than once."""


class Raw(str):
    """JSON as it stands."""


DIGEST = "sha256:" + "0123456789abcdef" * 4
_DEEP = Raw("[" * 100 + "]" * 100)
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 255, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63), 10**25, 1.5, "", "a", "a/b", "/", "..",
    "../..", ".", "//a", "a\0b", "\ud800", "\U0001f600", "é", "\u017f", ".wh.a", ".wh..wh..opq", ".wh.", "latest", "linux",
    "amd64", "A" * 300, "1970-01-01T00:00:00Z", "0000-00-00T00:00:00Z", "9999-12-31T23:59:60+24:00", "YQ==", "YQ", "x=y", "reg",
    "chunk", "hardlink", DIGEST, DIGEST.upper(), "sha512:" + "0" * 128, "sha384:" + "0" * 96,
    Raw("-0"), Raw("1.0"), Raw("1e2"), Raw("1e999"), Raw("NaN"), Raw("Infinity"), Raw("01"), Raw("9" * 5000), _DEEP,
    Raw('"\\ud83d\\ude00"'), Raw('"\\uDC00"'), Raw('"\\/"'), Raw('"\\x"'), Raw("tru"), Raw(""),
)  # fmt: skip


def change_json(data: bytes, seed: int) -> bytes | None:
    """The document with some places changed; None when it is none, or nested too deeply."""
    try:
        document = [json.loads(data, object_pairs_hook=Pairs)]
        return spelled(*_changed(document, random.Random(seed))).encode()
    except (ValueError, RecursionError):
        return None


def _changed(document: list[Any], dice: random.Random) -> tuple[Any, bool]:
    """And whether it is to be indented."""
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        slots = list(_slots(document))
        dice.choice(_CHANGES)(dice.choice(slots), slots, dice)
        document = document or [0]
    return document[0], dice.random() < 0.7


def _slots(document: list[Any]) -> Iterator[Slot]:
    waiting: list[list[Any]] = [document]
    count = 0
    while waiting and count < _MOST_SLOTS:
        holder = waiting.pop()
        for at in range(len(holder)):
            count += 1
            yield holder, at
            value = _value((holder, at))
            if isinstance(value, list):
                waiting.append(value)


def _value(slot: Slot) -> Any:
    holder, at = slot
    return holder[at][1] if isinstance(holder, Pairs) else holder[at]


def _set(slot: Slot, value: Any) -> None:
    holder, at = slot
    holder[at] = (holder[at][0], value) if isinstance(holder, Pairs) else value


def _replace(slot: Slot, slots: list[Slot], dice: random.Random) -> None:
    _set(slot, dice.choice(_VALUES))


def _copy(slot: Slot, slots: list[Slot], dice: random.Random) -> None:
    """One value to the place of another, which may hold it."""
    _set(slot, copy.deepcopy(_value(dice.choice(slots))))


def _remove(slot: Slot, slots: list[Slot], dice: random.Random) -> None:
    del slot[0][slot[1]]


def _repeat(slot: Slot, slots: list[Slot], dice: random.Random) -> None:
    holder, at = slot
    holder.insert(dice.randrange(len(holder) + 1), copy.deepcopy(holder[at]))


def _rename(slot: Slot, slots: list[Slot], dice: random.Random) -> None:
    holder, at = slot
    if isinstance(holder, Pairs):
        key, value = holder[at]
        others = [other[0][other[1]][0] for other in slots if isinstance(other[0], Pairs)]
        spellings = (
            key.upper(),
            key.title(),
            key.replace("s", "\u017f"),
            key.replace("k", "\u212a"),
            dice.choice(others),
        )
        holder[at] = (dice.choice(spellings), value)


def _wrap(slot: Slot, slots: list[Slot], dice: random.Random) -> None:
    value = _value(slot)
    _set(slot, dice.choice(([value], Pairs([("a", value)]))))


def _edit(slot: Slot, slots: list[Slot], dice: random.Random) -> None:
    """A character of a text, or the size of a number."""
    value = _value(slot)
    if isinstance(value, str):
        at = dice.randrange(len(value) + 1)
        _set(slot, value[:at] + dice.choice('a/.:@-_ \\"\0\n[*?\ud800é=0') + value[at + dice.randrange(2) :])
    elif isinstance(value, int):
        _set(slot, value + dice.choice((-1, 1, -512, 512, 1 << 32)))


Change = Callable[[Slot, list[Slot], random.Random], None]
_CHANGES: tuple[Change, ...] = (_replace, _replace, _copy, _remove, _repeat, _rename, _wrap, _edit, _edit)


def spelled(value: Any, pretty: bool, depth: int = 0) -> str:
    """JSON, indented as Go does it or without white space."""
    if isinstance(value, Raw):
        return str(value)
    if not isinstance(value, list):
        return json.dumps(value)
    colon = ": " if pretty else ":"
    items = [
        (json.dumps(item[0]) + colon if isinstance(value, Pairs) else "")
        + spelled(item[1] if isinstance(value, Pairs) else item, pretty, depth + 1)
        for item in value
    ]
    begin, end = "{}" if isinstance(value, Pairs) else "[]"
    if not pretty or not items:
        return begin + ",".join(items) + end
    line = "\n" + "\t" * depth
    return begin + ",".join(f"{line}\t{item}" for item in items) + line + end


def mend_tar(data: bytes) -> bytes:
    """Blocks that look like headers get the checksums that they should have."""
    blocks = [bytearray(data[at : at + _BLOCK]) for at in range(0, len(data), _BLOCK)]
    for block in blocks:
        if len(block) == _BLOCK and re.match(rb"ustar", block[257:262]):
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(blocks)
