"""How often the verdicts are right, by simulation: `python suites/verdicts.py` (a minute, any machine).

Each row is a kind of session that spoils measurements, each column a true difference. A cell says how often
the verdict was FASTER, SLOWER, SAME, INCONCLUSIVE and INVALID, and how often the interval held the truth.
"""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from nsabench.stats import VERDICTS
from nsabench.stats.simulate import TROUBLES, Rates, rates

DIFFERENCES = (0.0, 0.01, 0.02, 0.05)


def words(found: Rates) -> str:
    """Verdicts that fell, most frequent first, and the coverage."""
    fell = sorted(((found.verdicts[name], name) for name in VERDICTS if found.verdicts[name]), reverse=True)
    said = "\n".join(f"{name.lower()} {100 * part:.0f}%" for part, name in fell)
    return f"{said}\nheld {100 * found.covered:.0f}%"


def main() -> None:
    """Parse, simulate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--delta", type=float, default=0.01, help="the margin, a fraction")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    title = f"{given.sessions} sessions of {given.rounds} rounds, margin {100 * given.delta:g} %"
    table = Table(title=title, title_justify="left", show_lines=True)
    for header in ("session", "arms", *(f"truly {100 * d:g} % slower" for d in DIFFERENCES)):
        table.add_column(header)
    for name, trouble in TROUBLES.items():
        for interleaved in (True, False):
            cells = [
                rates(
                    trouble,
                    ratio=1 + difference,
                    rounds=given.rounds,
                    sessions=given.sessions,
                    interleaved=interleaved,
                    delta=given.delta,
                    seed=given.seed,
                )
                for difference in DIFFERENCES
            ]
            table.add_row(name, "interleaved" if interleaved else "one by one", *map(words, cells))
    Console().print(table)


if __name__ == "__main__":
    main()
