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
from nsabench.present.cell_text import last_line, plain_row
from nsabench.present.disturbances import row_notes
from nsabench.present.frame import Row, cell_rows, is_dense, is_nsa, shape_key
from nsabench.present.pairing import compare
from nsabench.present.tables import cells_table
from nsabench.present.wording import MISSING, arm_text, count_text, digits, duration_text, fields_text

_RECENT = 300
"""So many of the last cells are at hand for the growing table, which is made anew for every row."""

MOST_LISTED = 400
"""The last table has at most so many cells; beyond, the run's files serve better."""


class SweepView:
    """What the person at the console sees of a sweep of `total` cells. Use it in a `with`, or call `close`.

    On a terminal: a table of the cells that fit, with progress and time left, replaced by the whole table at
    the end, also after Ctrl-C; below it what each worker is doing. Anywhere else: one plain line per finished
    cell. With `json_lines`, the console's file gets one JSON object per finished cell and nothing else; all
    the rest goes to stderr.

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
        self._by_shape: dict[tuple[Any, ...], list[Row]] = {}
        self._doing: dict[int, tuple[str, str]] = {}
        self._left: dict[int, set[str]] = {}
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

    def begin(self, group: list[Cell], activity: str, worker: int = 0) -> None:
        """The cells of one shape are next, on that worker."""
        self._doing[worker] = (_group_text(group), activity)
        self._left[worker] = {cell.cell_id for cell in group}
        self._draw()

    def activity(self, text: str, worker: int = 0) -> None:
        """What the worker is doing with its present cells, empty for nothing; shown on a terminal only."""
        where, _ = self._doing.get(worker, ("", ""))
        self._doing[worker] = (where, text) if text else ("", "")
        self._draw()

    def row(self, row: dict[str, Any], worker: int = 0) -> None:
        """A cell is finished: `row` is its row of cells.csv, numbers missing as None, NaN or ""."""
        (clean,) = cell_rows([row])
        self._rows.append(clean)
        same_shape = self._by_shape.setdefault(shape_key(clean), [])
        same_shape.append(clean)
        left = self._left.get(worker, set())
        left.discard(clean["cell_id"])
        if not left and len(self._doing) > 1:
            self._doing[worker] = ("", "")
        if self._json is not None:
            self._json.write(json.dumps(plain_row(clean), allow_nan=False) + "\n")
            self._json.flush()
        if self._live is None:
            line = last_line(compare(same_shape, order=self._order), complete=not left)
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
                self._console.print(self._cells_table(self._rows, samples, last=MOST_LISTED))
            if len(self._rows) > MOST_LISTED:
                self._print(f"these are the last {MOST_LISTED} cells; nsabench results shows all")
        else:
            for text in row_notes(self._rows):
                self._print(text)
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
        self._live.update(Group(*self._table, *self._status()), refresh=True)

    def _cells_table(self, rows: Sequence[Row], samples: pd.DataFrame | None, last: int) -> Table:
        return cells_table(rows, samples, order=self._order, last=last, width=self._console.width)

    def _fitting_table(self) -> list[Table]:
        """The last cells, as many as leave room for the lines below."""
        room = max(1, self._console.height - 2 - max(1, len(self._doing)))
        rows = self._rows[-_RECENT:]
        last = min(len(rows), room)
        while last:
            table = self._cells_table(rows, None, last)
            too_many = len(self._console.render_lines(table)) - room
            if too_many <= 0:
                return [table]
            # A cell takes up to four lines; better a few tries than a table without cells.
            last -= min(last, max(1, too_many // 4))
        return []

    def _status(self) -> list[Table | Text]:
        """Progress, and a line for each worker."""
        lines = [
            (f"worker {worker}: " if len(self._doing) > 1 else "")
            + (": ".join(filter(None, doing)) or "idle")
            for worker, doing in sorted(self._doing.items())
        ]
        room = self._console.height - 2
        if len(lines) > room:
            lines = [*lines[: room - 1], f"and {len(lines) - room + 1} workers more"]
        return [self._progress(), *(Text(line, no_wrap=True, overflow="ellipsis") for line in lines or [""])]

    def _progress(self) -> Table:
        """How far, since when, how much longer, how fast, and what failed."""
        grid = Table.grid(padding=(0, 2))
        done = len(self._rows)
        bar = ProgressBar(total=max(1, self._total), completed=done, width=min(30, self._console.width // 4))
        elapsed = self._clock() - self._started
        left = elapsed / done * (self._total - done) if done else None
        words = [f"{duration_text(elapsed)}, about {MISSING if left is None else duration_text(left)} left"]
        if done and elapsed > 0:
            words.append(f"{digits(done * 60 / elapsed, 2)} cells/min")
        failed = [row for row in self._rows if row["status"] != "ok"]
        text = Text(", ".join(words), no_wrap=True, overflow="ellipsis")
        if failed:
            text.append(", ").append(count_text(failed), style="red")
        grid.add_row(bar, Text(f"{done}/{self._total}"), text)
        return grid


def _group_text(group: Sequence[Cell]) -> str:
    """The shape of the cells that are measured together, and what is measured of it."""
    fields = group[0].to_dict()
    cells = [cell.to_dict() for cell in group]
    routes = [cell["route"] for cell in cells if is_nsa(cell)]
    peers = [arm_text(cell) for cell in cells if not is_nsa(cell) and not is_dense(cell)]
    dense = [arm_text(cell) for cell in cells if is_dense(cell)]
    dense = [f"{len(dense)} dense attentions"] if len(dense) > 3 else dense
    arms = [f"{len(routes)} routes"] if len(routes) > 1 else routes
    core = " core" if fields["scope"] == "core" else ""
    return f"{fields_text(fields, ('phase', 'passes', 'S', 'B'))}{core}, {', '.join(arms + peers + dense)}"
