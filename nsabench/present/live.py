"""A sweep as it runs: a table that grows on a terminal, plain lines in a pipe."""

import json
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import pandas as pd
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nsabench.plan.cells import Cell
from nsabench.present.cell_text import cell_line, compare, plain_row
from nsabench.present.frame import Row, cell_rows
from nsabench.present.tables import cells_table
from nsabench.present.wording import MISSING, count_text, duration_text, fields_text


class SweepView:
    """What the person at the console sees of a sweep of `total` cells. Use it in a `with`, or call `close`.

    On a terminal: a table of the cells that fit, with progress and time left, replaced by the whole table at
    the end, also after Ctrl-C. Anywhere else: one plain line per finished cell. With `json_lines`, the
    console's file gets one JSON object per finished cell and nothing else; all the rest goes to stderr.

    The table is drawn anew only when something is reported, never by a clock: a thread that redraws would
    take its share of the processor from what is being measured.
    """

    def __init__(
        self,
        console: Console,
        *,
        total: int,
        json_lines: bool = False,
        order: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`order`: the routes as asked for; the first of a shape is what the others' speed is relative to."""
        self._json = console.file if json_lines else None
        self._console = Console(stderr=True) if json_lines else console
        self._total, self._order, self._clock = total, order, clock
        self._rows: list[Row] = []
        self._where = self._activity = ""
        self._started = clock()
        self._closed = False
        self._table: list[Table] = []
        self._live: Live | None = None
        # A table would tear JSON on the same terminal; a forced colour does not make a pipe a terminal.
        drawn = self._console.is_interactive and self._console.file.isatty()
        if drawn and not (self._json and self._json.isatty()):
            self._live = Live(
                console=self._console, auto_refresh=False, transient=True, vertical_overflow="crop"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def note(self, text: str) -> None:
        """A line that stays: a warning, where the results are."""
        self._print(text)

    def begin(self, group: list[Cell], activity: str) -> None:
        """The cells of one shape are next."""
        first = group[0]
        routes = f"{len(group)} routes" if len(group) > 1 else first.route
        self._where = f"{fields_text(first.to_dict(), ('phase', 'passes', 'S', 'B'))}, {routes}"
        self.activity(activity)

    def activity(self, text: str) -> None:
        """What is being done with the present cells; shown on a terminal only."""
        self._activity = text
        self._draw()

    def row(self, row: dict[str, Any]) -> None:
        """A cell is finished: `row` is its row of cells.csv, numbers missing as None, NaN or ""."""
        (clean,) = cell_rows([row])
        self._rows.append(clean)
        if self._json is not None:
            self._json.write(json.dumps(plain_row(clean), allow_nan=False) + "\n")
            self._json.flush()
        if self._live is None:
            line = cell_line(compare(self._rows, order=self._order)[-1])
            width = len(str(self._total))
            self._print(f"[{len(self._rows):{width}}/{self._total}] {line}")
            return
        self._table = self._fitting_table()
        self._draw()

    def close(self, samples: pd.DataFrame | None = None) -> None:
        """Leave the whole table (on a terminal) and a closing line; any further call does nothing.

        With the run's `samples` the speeds of that table have their intervals.
        """
        if self._closed:
            return
        self._closed = True
        if self._live is not None:
            self._live.stop()
            if self._rows:
                self._console.print(self._cells_table(samples))
        counts = f" ({count_text(self._rows)})" if self._rows else ""
        took = duration_text(self._clock() - self._started)
        self._print(f"{len(self._rows)} of {self._total} cells{counts} in {took}")

    def _print(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True, highlight=False)

    def _draw(self) -> None:
        if self._live is None or self._closed:
            return
        if not self._live.is_started:
            self._live.start()
        self._live.update(Group(*self._table, self._progress(), Text(self._activity_line())), refresh=True)

    def _cells_table(self, samples: pd.DataFrame | None = None, last: int | None = None) -> Table:
        return cells_table(self._rows, samples, order=self._order, last=last, width=self._console.width)

    def _fitting_table(self) -> list[Table]:
        """The last cells, as many as leave room for the two lines below."""
        room = max(1, self._console.height - 3)
        last = min(len(self._rows), room)
        while last:
            table = self._cells_table(last=last)
            too_many = len(self._console.render_lines(table)) - room
            if too_many <= 0:
                return [table]
            last -= min(last, too_many)
        return []

    def _progress(self) -> Table:
        grid = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=max(1, self._total), completed=len(self._rows), width=30)
        elapsed = self._clock() - self._started
        left = elapsed / len(self._rows) * (self._total - len(self._rows)) if self._rows else None
        text = f"{duration_text(elapsed)}, about {MISSING if left is None else duration_text(left)} left"
        grid.add_row(bar, Text(f"{len(self._rows)}/{self._total}"), Text(text))
        return grid

    def _activity_line(self) -> str:
        return ": ".join(part for part in (self._where, self._activity) if part)
