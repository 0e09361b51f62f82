"""What strict verification has to say of a blob, and to which runtimes it matters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from estargz.errors import UsageError

__all__ = [
    "BBOLT",
    "CONTAINERS_STORAGE",
    "FAMILIES",
    "FULL_PULL",
    "MEMORY",
    "RUNTIMES",
    "Finding",
    "Findings",
    "families",
]

# The snapshotter keeps what a TOC says in one of two stores, which do not read it alike: metadata/memory/reader.go, and
# cmd/containerd-stargz-grpc/db/reader.go behind `metadata_store = "db"`.
MEMORY = "stargz-snapshotter/memory"
BBOLT = "stargz-snapshotter/bbolt"
CONTAINERS_STORAGE = "containers-storage"
FULL_PULL = "full-pull"
RUNTIMES = (MEMORY, BBOLT, CONTAINERS_STORAGE, FULL_PULL)
FAMILIES = ("stargz-snapshotter", "containers-storage", "full-pull")

KEPT_MAX = 100  # findings of one code and severity; a blob of a million faults must not fill memory with them
_SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be.

    severity:  "error": wrong for everyone: a full pull fails, or two readers may see different things in the same bytes;
               "warning": some runtime refuses it or shows something else than a full pull does; "note": worth knowing
    code:      what it is, in words joined by hyphens; docs/format.md lists them
    entry:     the name of the entry, as the TOC has it; None when it concerns the blob
    message:   the same for readers, with offsets
    runtimes:  those of RUNTIMES that refuse the layer for it, or show something else than a full pull does
    """

    severity: str
    code: str
    entry: str | None
    message: str
    runtimes: tuple[str, ...] = ()


def families(names: Iterable[str]) -> frozenset[str]:
    """The names of runtimes that must accept a layer. Raises UsageError for others than FAMILIES."""
    chosen = frozenset(names)
    for name in sorted(chosen.difference(FAMILIES)):
        raise UsageError(f"no runtime is called {name!r}; there are {', '.join(FAMILIES)}")
    return chosen


class Findings:
    """Findings as they come: all of them counted, the first KEPT_MAX of each code kept.

    required: of FAMILIES; what one of them refuses is an error
    """

    def __init__(self, required: frozenset[str] = frozenset()) -> None:
        self.counts: Counter[str] = Counter()
        self._required = required
        self._kept: dict[tuple[str, str], list[Finding]] = {}
        self._refused: set[str] = set()

    def add(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            if not self._required.isdisjoint(runtime.partition("/")[0] for runtime in finding.runtimes):
                finding = replace(finding, severity="error")
            self.counts[finding.code] += 1
            self._refused.update(finding.runtimes)
            kept = self._kept.setdefault((finding.severity, finding.code), [])
            if len(kept) < KEPT_MAX:
                kept.append(finding)

    @property
    def kept(self) -> tuple[Finding, ...]:
        """Errors first, then warnings and notes; each in the order in which they were found."""
        return tuple(
            finding
            for severity in _SEVERITIES
            for (kept_severity, _), kept in self._kept.items()
            if kept_severity == severity
            for finding in kept
        )

    @property
    def accepted(self) -> dict[str, bool]:
        """For each of RUNTIMES whether it takes the layer and shows what a full pull shows."""
        return {runtime: runtime not in self._refused for runtime in RUNTIMES}
