"""What is fuzzed of the Python half: targets, each a function that is given bytes and finds fault or does not."""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from estargz.errors import EstargzError

ROOT = Path(__file__).resolve().parents[3]
CORPUS = Path(__file__).resolve().parent / "corpus"
NO_TIME = ("modtime", "1970-01-01T00:00:00Z")
"""What a table says of an entry of the epoch, or leaves out."""

Check = Callable[[bytes], None]
Shape = Literal["bytes", "json", "tar"]
Found = TypeVar("Found")


class Fault(AssertionError):
    """Something was read that should not be, or otherwise than somebody else reads it."""


@dataclass(frozen=True, slots=True)
class Target:
    """``check`` raises for input that is not dealt with as it should be; its corpus is in corpus/NAME."""

    name: str
    check: Check
    shape: Shape
    """How inputs are changed: as bytes, as JSON documents, or as tars whose headers keep right checksums."""
    words: tuple[str, ...]
    """What inputs are likely to hold."""
    most: int
    """Bytes of an input."""
    runs: int
    """Executions of the quick share, a second's worth."""


TARGETS: dict[str, Target] = {}


def target(
    name: str, *words: str, shape: Shape = "bytes", most: int = 512, runs: int = 10_000
) -> Callable[[Check], Check]:
    """Makes a function a target."""

    def register(check: Check) -> Check:
        TARGETS[name] = Target(name, check, shape, words, most, runs)
        return check

    return register


def expect(condition: object, what: str) -> None:
    if not condition:
        raise Fault(what)


def accepted(
    read: Callable[..., Found], *arguments: Any, refusal: type[Exception] = EstargzError, **options: Any
) -> Found | None:
    """What is read; None when it is refused by one of the package's errors, or as is documented, in words that say why."""
    try:
        return read(*arguments, **options)
    except (EstargzError, refusal) as error:
        expect(str(error), f"{type(error).__name__} does not say what is wrong")
        return None


class Peer:
    """A process of the Go program in tests/peer, asked about one kind of input as often as one likes."""

    def __init__(self, kind: str) -> None:
        program = subprocess.run([ROOT / "scripts" / "peer"], capture_output=True, text=True, check=True).stdout.strip()
        self._process = subprocess.Popen([program, "judge", kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, data: bytes) -> Any:
        """What Go makes of it; None when it refuses it."""
        return self.answer(data).get("found")

    def answer(self, data: bytes) -> dict[str, Any]:
        """The same as "found", or the reason why it refuses as "error"."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(struct.pack(">I", len(data)) + data)
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


@cache
def peer(kind: str) -> Peer:
    """The process that judges inputs of a kind; judge.go has the kinds."""
    return Peer(kind)
