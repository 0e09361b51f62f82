"""What one part of scripts/torture did: its counts, its defects, its seconds, kept as build/torture/PART.json."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "build" / "torture"


@dataclass
class Outcome:
    """Counts and defects of a part; ``close`` prints them, keeps them, and gives the status to exit with."""

    part: str
    quick: bool
    """A bounded share, of a minute or so, as continuous integration runs it."""
    counts: dict[str, int] = field(default_factory=dict)
    """What was done how often, in the words of the table: "fault points", "kills", "executions"."""
    defects: list[str] = field(default_factory=list)
    """One line for each thing that went wrong: with what, and how to run it again."""
    begun: float = field(default_factory=time.monotonic)

    def count(self, what: str, number: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + number

    def defect(self, what: str) -> None:
        self.defects.append(what)
        print(f"{self.part}: DEFECT: {what}", file=sys.stderr, flush=True)

    def close(self) -> int:
        """Who has done nothing has found nothing, which proves nothing."""
        if not any(self.counts.values()) and not self.defects:
            self.defect("nothing was done")
        command = shlex.join(["scripts/torture", *(["--quick"] if self.quick else []), self.part])
        facts = {
            "part": self.part,
            "command": command,
            "seconds": round(time.monotonic() - self.begun, 1),
            "counts": self.counts,
            "defects": self.defects,
        }
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{self.part}.json").write_text(json.dumps(facts, indent=1) + "\n")
        counts = ", ".join(f"{number:,} {what}" for what, number in self.counts.items()) or "nothing"
        print(f"{self.part}: {counts}; {len(self.defects)} defects; {facts['seconds']} s", flush=True)
        return 1 if self.defects else 0


def parser(part: str, about: str | None) -> argparse.ArgumentParser:
    """The options that every part takes; a part adds its own."""
    arguments = argparse.ArgumentParser(prog=f"tests/torture/{part}.py", description=about)
    arguments.add_argument("--quick", action="store_true", help="a bounded share, as in continuous integration")
    return arguments
