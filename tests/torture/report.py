"""One table of what the parts left behind, on standard output and in build/torture/report.md."""

from __future__ import annotations

import json
import sys

from outcome import RESULTS


def main(parts: list[str]) -> None:
    lines = ["| part | command | seconds | counts | defects |", "|---|---|---|---|---|"]
    for part in parts:
        path = RESULTS / f"{part}.json"
        if not path.exists():
            lines.append(f"| {part} | | | | ended early |")
            continue
        facts = json.loads(path.read_text())
        counts = ", ".join(f"{number:,} {what}" for what, number in facts["counts"].items())
        lines.append(f"| {part} | `{facts['command']}` | {facts['seconds']:.0f} | {counts} | {len(facts['defects'])} |")
        lines += [f"| | | | {defect.replace('|', '/')} | |" for defect in facts["defects"]]
    table = "\n".join(lines) + "\n"
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "report.md").write_text(table)
    print("\n" + table, end="")


if __name__ == "__main__":
    main(sys.argv[1:])
