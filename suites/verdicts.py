"""How often the verdicts are right, by simulation: `python suites/verdicts.py` (three minutes, any machine).

Each row is a kind of session that spoils measurements, each column a true difference. A cell says how often
the verdict was FASTER, SLOWER, SAME, INCONCLUSIVE and INVALID, and how often the interval held the truth.

The second table has processes that differ: each arm's time varies by so much from one process to the next.
`rounds` takes the rounds of all processes for independent, `processes` is what comparisons do.
"""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from nsabench.stats import VERDICTS
from nsabench.stats.simulate import TROUBLES, Rates, Trouble, rates

DIFFERENCES = (0.0, 0.01, 0.02, 0.05)
APART = (0.0, 0.005, 0.01)
PROCESSES = (3, 6, 12)


def words(found: Rates) -> str:
    """Verdicts that fell, most frequent first, and the coverage."""
    fell = sorted(((found.verdicts[name], name) for name in VERDICTS if found.verdicts[name]), reverse=True)
    said = "\n".join(f"{name.lower()} {100 * part:.0f}%" for part, name in fell)
    return f"{said}\nheld {100 * found.covered:.0f}%"


def troubles(given: argparse.Namespace) -> Table:
    """Every kind of trouble, interleaved and one by one."""
    table = Table(title=_title(given, 3), title_justify="left", show_lines=True)
    for header in ("session", "arms", *(f"truly {100 * d:g} % slower" for d in DIFFERENCES)):
        table.add_column(header)
    for name, trouble in TROUBLES.items():
        for interleaved in (True, False):
            cells = [
                _rates(given, trouble, difference, interleaved=interleaved) for difference in DIFFERENCES
            ]
            table.add_row(name, "interleaved" if interleaved else "one by one", *map(words, cells))
    return table


def processes(given: argparse.Namespace) -> Table:
    """Processes that differ, their rounds pooled and not."""
    title = "Processes that differ: " + _title(given)
    table = Table(title=title, title_justify="left", show_lines=True)
    for header in ("apart", "processes", "judged by", *(f"truly {100 * d:g} % slower" for d in DIFFERENCES)):
        table.add_column(header)
    for apart in APART:
        for count in PROCESSES:
            for pooled in (True, False):
                trouble = Trouble(process=apart)
                cells = [_rates(given, trouble, d, processes=count, pooled=pooled) for d in DIFFERENCES]
                judged_by = "rounds" if pooled else "processes"
                table.add_row(f"{100 * apart:g} %", str(count), judged_by, *map(words, cells))
    return table


def _rates(given: argparse.Namespace, trouble: Trouble, difference: float, **more: Any) -> Rates:
    shared = {"rounds": given.rounds, "sessions": given.sessions, "delta": given.delta, "seed": given.seed}
    return rates(trouble, ratio=1 + difference, **shared, **more)


def _title(given: argparse.Namespace, count: int | None = None) -> str:
    of = f"{count} processes with " if count else ""
    return f"{given.sessions} sessions of {of}{given.rounds} rounds, margin {100 * given.delta:g} %"


def main() -> None:
    """Parse, simulate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--delta", type=float, default=0.01, help="the margin, a fraction")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for table in (troubles, processes):
        Console().print(table(given))


if __name__ == "__main__":
    main()
