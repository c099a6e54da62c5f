"""Which cells stand together in one figure, what that figure's title says, and what it leaves out."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nsabench.present.frame import PLANNED, Compared, PresentError, is_dense, planned_routes
from nsabench.present.naming import (
    WITHIN,
    Member,
    created_at,
    file_names,
    machine_of,
    regime_of,
    run_names,
    subtitle_of,
    title_of,
)
from nsabench.present.pairing import compare
from nsabench.present.wording import arm_text, count_text
from nsabench.store import Run, RunCells

if TYPE_CHECKING:
    import pandas as pd

MOST_PANELS = 8
"""Shapes drawn unless more are asked for."""

MOST_RUNS = 4
"""Runs in one figure: as many as there are dashes to tell them apart by."""

MOST_LINES = 12
"""Lines in one figure that can still be told apart."""

_SPLIT = [f for f in PLANNED if f not in WITHIN]

Keep = Callable[["pd.DataFrame"], "pd.Series[bool]"]


@dataclass(frozen=True)
class Series:
    """The cells of one route or implementation in one run, by ascending S. `run` counts the figure's runs."""

    label: str
    arm: str
    run: int
    cells: tuple[Compared, ...]


@dataclass(frozen=True)
class Panel:
    """All cells that may stand in one figure: one shape but for S, one machine, one regime.

    `runs` are the runs' names. `left_out` says in words which runs and routes are not among the series, for
    there would be too many lines to tell apart; the subtitle repeats it.
    """

    name: str
    title: str
    subtitle: tuple[str, ...]
    series: tuple[Series, ...]
    runs: tuple[str, ...]
    left_out: str

    @property
    def sizes(self) -> list[int]:
        """Every S, ascending."""
        return sorted({c.row["S"] for s in self.series for c in s.cells})


class _Place(NamedTuple):
    """Where a cell to draw is found, and what decides on whether it is shown."""

    run: int
    row: int
    machine: str
    size: int
    status: str


@dataclass(frozen=True)
class _Group:
    """The places of one figure's cells, and how many older runs had some too."""

    places: Sequence[_Place]
    older_runs: int


def make_panels(
    runs: Sequence[RunCells], keep: Keep | None = None, most: int = MOST_PANELS
) -> tuple[list[Panel], list[str]]:
    """The figures' material, in the order of the runs, and in words what none of them shows.

    `keep` takes a frame of cells and tells which to draw; what they are compared with may be left out. Shapes
    without an ok cell are left out, and shapes beyond `most`, those with the fewest sizes first. Of more than
    `MOST_RUNS` runs of one shape the latest are shown. PresentError when there is no run, or no ok cell in
    any.
    """
    if not runs:
        raise PresentError("there is no run to plot")
    # A merged run is taken apart, and only here is all of it needed: of others, what is drawn is read later.
    runs = [part for run in runs for part in (run.whole().parts() if "sources" in run.info else [run])]
    places = _places(runs, keep)
    groups = _groups(places.values(), runs)
    if not groups:
        raise PresentError(
            _nothing_to_plot(runs, [place.status for same in places.values() for place in same])
        )
    shown = _widest(groups, most)
    left_out = []
    if len(shown) < len(groups):
        left_out.append(
            f"{len(groups) - len(shown)} of {len(groups)} shapes: --most and --where choose others"
        )
    material = _material(runs, shown)
    parts = [(part, group) for group in shown for part in _by_regime(_members(material, group))]
    panels = [
        _panel(name, part, group)
        for name, (part, group) in zip(file_names([part for part, _ in parts]), parts, strict=True)
    ]
    return panels, left_out + [f"{panel.name}: {panel.left_out}" for panel in panels if panel.left_out]


def _places(runs: Sequence[RunCells], keep: Keep | None) -> dict[tuple[Any, ...], list[_Place]]:
    """Every cell to draw, by what decides on its figure, in the order of appearance."""
    found: dict[tuple[Any, ...], list[_Place]] = {}
    for number, run in enumerate(runs):
        sizes, states = run.column("S"), run.column("status")
        devices = [str(device) for device in run.column("device")]
        machines = {device: machine_of(run.info, device) for device in dict.fromkeys(devices)}
        # A twin shows how much two measurements of one cell differ; as a line it would hide the first.
        twins = [(twin or 0) > 0 for twin in run.column("twin")]
        shapes = list(zip(*map(run.column, _SPLIT), strict=True))
        for row in range(len(sizes)) if keep is None else np.flatnonzero(keep(run.cells)).tolist():
            if not twins[row]:
                machine = machines[devices[row]]
                place = _Place(number, row, machine, sizes[row], states[row])
                found.setdefault((*shapes[row], machine), []).append(place)
    return found


def _groups(places: Iterable[Sequence[_Place]], runs: Sequence[RunCells]) -> list[_Group]:
    """The cells of each figure that has an ok one, from the latest runs, in the order of appearance."""
    created = [(created_at(run), number) for number, run in enumerate(runs)]
    found = []
    for same in places:
        good = {place.run for place in same if place.status == "ok"}
        if good:
            latest = sorted({place.run for place in same}, key=lambda run: (run in good, created[run]))
            kept = set(latest[-MOST_RUNS:])
            found.append(_Group([place for place in same if place.run in kept], len(latest) - len(kept)))
    return found


def _widest(groups: Sequence[_Group], most: int) -> list[_Group]:
    """The `most` groups with the most sizes, in their order."""
    by_sizes = sorted(range(len(groups)), key=lambda i: -len({place.size for place in groups[i].places}))
    return [groups[i] for i in sorted(by_sizes[:most])]


def _material(runs: Sequence[RunCells], groups: Sequence[_Group]) -> dict[int, tuple[Run, list[Compared]]]:
    """The runs that are drawn, by their number, with all their cells."""
    numbers = dict.fromkeys(place.run for group in groups for place in group.places)
    whole = {number: runs[number].whole() for number in numbers}
    return {
        number: (run, compare(run.rows, run.samples, planned_routes(run.info)))
        for number, run in whole.items()
    }


def _members(material: Mapping[int, tuple[Run, list[Compared]]], group: _Group) -> list[Member]:
    return [
        Member(material[place.run][0], place.machine, material[place.run][1][place.row])
        for place in group.places
    ]


def _by_regime(group: Sequence[Member]) -> list[list[Member]]:
    """The group split by regime and cache state, which are never compared; each part has the failed cells."""
    regimes = dict.fromkeys(regime_of(m.row) for m in group if m.ok)
    return [[m for m in group if not m.ok or regime_of(m.row) == regime] for regime in regimes]


def _nothing_to_plot(runs: Sequence[RunCells], states: Sequence[str]) -> str:
    names = [run.run_id for run in runs]
    who = ", ".join(names) if len(names) <= 4 else f"{len(names)} runs"
    if all(run.cells.empty for run in runs):
        return f"{who}: no cell is finished, so there is nothing to plot"
    if not states:
        return f"{who}: no cell is as asked for, so there is nothing to plot"
    counts = count_text({"status": status} for status in states)
    return f"{who}: no cell is ok ({counts}), so there is nothing to plot"


def _panel(name: str, part: Sequence[Member], group: _Group) -> Panel:
    runs = list({id(m.run): m.run for m in part}.values())
    arms = _arms(runs, part)
    older = group.older_runs
    if older:
        # Of a long history the latest runs, with all routes; but a few runs are there to be compared.
        by_time = sorted(runs, key=lambda run: (any(m.ok for m in part if m.run is run), created_at(run)))
        latest = by_time[-max(1, MOST_LINES // len(arms)) :]
        older += len(runs) - len(latest)
        runs = [run for run in runs if any(run is other for other in latest)]
        part = [m for m in part if any(m.run is run for run in runs)]
    shown = _shown(arms, max(1, MOST_LINES // len(runs)), {m.cell.dense_name for m in part})
    left_out = [f"{older} earlier runs"] if older else []
    if len(shown) < len(arms):
        hidden = [arm for arm in arms if arm not in shown]
        more = f" and {len(hidden) - 3} more" if len(hidden) > 3 else ""
        left_out.append(f"{len(hidden)} of {len(arms)} routes ({'; '.join(hidden[:3])}{more})")
    said = f"left out: {', '.join(left_out)}" if left_out else ""
    names = run_names(runs)
    return Panel(
        name,
        title_of(part),
        (*subtitle_of(part, runs), *filter(None, [said])),
        _series(part, runs, names, shown),
        tuple(names),
        said,
    )


def _arms(runs: Sequence[Run], part: Sequence[Member]) -> list[str]:
    """What was measured, in the order asked for; what NSA is compared with comes last."""
    sparse = dict.fromkeys(arm_text(m.row) for m in part if not is_dense(m.row))
    planned = [route for run in runs for route in planned_routes(run.info) if route in sparse]
    dense = [arm_text(m.row) for m in part if is_dense(m.row)]
    return list(dict.fromkeys([*planned, *sparse, *dense]))


def _shown(arms: Sequence[str], most: int, compared_with: Collection[str]) -> list[str]:
    """The first `most`, but always what the others are compared with, as far as there is room for more."""
    needed = [arm for arm in arms if arm in compared_with][: most - 1]
    rest = [arm for arm in arms if arm not in needed][: most - len(needed)]
    return [arm for arm in arms if arm in needed or arm in rest]


def _series(
    part: Sequence[Member], runs: Sequence[Run], run_names: Sequence[str], arms: Sequence[str]
) -> tuple[Series, ...]:
    places = {arm: place for place, arm in enumerate(arms)}
    numbers = {id(run): number for number, run in enumerate(runs)}
    lines: dict[tuple[int, int], list[Compared]] = {}
    for member in part:
        arm = arm_text(member.row)
        if arm in places:
            lines.setdefault((places[arm], numbers[id(member.run)]), []).append(member.cell)
    series = []
    for (place, number), cells in sorted(lines.items(), key=lambda item: item[0]):
        label = f"{arms[place]} @ {run_names[number]}" if len(runs) > 1 else arms[place]
        by_size = sorted(cells, key=lambda cell: cell.row["S"])
        series.append(Series(label, arms[place], number, tuple(by_size)))
    return tuple(series)
