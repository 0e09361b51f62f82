"""Fuzzes what reads bytes and texts of strangers, guided by the code that is reached."""

from __future__ import annotations

import sys

from fuzzing import compiled, python_parsers
from outcome import Outcome, parser

QUICK_SECONDS = 25.0


def main() -> int:
    options = parser("fuzz", __doc__)
    options.add_argument("--seconds", type=float, default=3600.0, help="for each half; default: %(default)s")
    options.add_argument("--keep", action="store_true", help="put what the compiled half has reached into its corpora")
    chosen = options.parse_args()
    if chosen.keep:
        compiled.keep()
        return 0
    outcome = Outcome("fuzz", chosen.quick)
    for half in (python_parsers, compiled):
        half.run(outcome, quick=chosen.quick, seconds=QUICK_SECONDS if chosen.quick else chosen.seconds)
    return outcome.close()


if __name__ == "__main__":
    sys.exit(main())
