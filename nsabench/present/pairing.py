"""How much faster a cell is than another of its shape: the ratio over rounds in which both were measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nsabench.present.frame import Compared, Order, Row, baselines, conditions_of, dense_rows
from nsabench.stats import Interval, paired_ratios

if TYPE_CHECKING:
    import pandas as pd

_KINDS = {"": 0, "emit": 1, "plain": 2}

_ROUND_BITS = 32
"""Of a round's number within a run: below them is its number within its process, above them the process."""

_Key = tuple[str, str]


@dataclass(frozen=True)
class Rounds:
    """A cell's rounds by ascending number: time of a step in ms, and the place the cell had in the round."""

    numbers: npt.NDArray[np.int64]
    ms: npt.NDArray[np.float64]
    positions: npt.NDArray[np.float64]

    def only(self, places: Any) -> "Rounds":
        """Those at these places, a slice or indices."""
        return Rounds(self.numbers[places], self.ms[places], self.positions[places])


class Shared(NamedTuple):
    """Rounds that two cells share: the times of each in ms, and which process measured the pair."""

    a: npt.NDArray[np.float64]
    b: npt.NDArray[np.float64]
    processes: npt.NDArray[np.int64]


def compare(rows: Sequence[Row], samples: "pd.DataFrame | None" = None, order: Order = ()) -> list[Compared]:
    """Each row, in order, with what it is compared with; see `Compared`.

    Intervals come from samples paired by (process, round). Without samples, or when the two cells were not
    measured interleaved, the point is the ratio of the two medians and there is no interval. `order`: the
    routes as asked for.
    """
    base, dense = baselines(rows, order), dense_rows(rows)
    rounds = {} if samples is None or samples.empty else rounds_of(rows, samples)
    speed, x_dense = _speeds(rows, base, rounds), _speeds(rows, dense, rounds)
    return [Compared(*parts) for parts in zip(rows, base, speed, dense, x_dense, strict=True)]


def _speeds(
    rows: Sequence[Row], others: Sequence[Row | None], rounds: Mapping[_Key, Rounds]
) -> list[Interval | None]:
    """For each row, the other's time over its own."""
    found: list[Interval | None] = []
    places: list[int] = []
    pairs = []
    for row, other in zip(rows, others, strict=True):
        found.append(None)
        if other is None or other is row or not (_timed(row) and _timed(other)):
            continue
        if conditions_of(row) != conditions_of(other):
            continue
        found[-1] = Interval(other["ms_total"] / row["ms_total"], None, None, 0)
        pair = shared_rounds(*(rounds.get((r["run_id"], r["cell_id"])) for r in (other, row)))
        if pair is not None:
            places.append(len(found) - 1)
            pairs.append(pair)
    ratios = paired_ratios([(pair.a, pair.b) for pair in pairs], processes=[pair.processes for pair in pairs])
    for place, interval in zip(places, ratios, strict=True):
        found[place] = interval
    return found


def _timed(row: Row) -> bool:
    return bool(row["status"] == "ok" and row["ms_total"])


def shared_rounds(a: Rounds | None, b: Rounds | None) -> Shared | None:
    """The two cells' times in the rounds they share; None where those prove nothing."""
    if a is None or b is None:
        return None
    if not np.array_equal(a.numbers, b.numbers):
        _, in_a, in_b = np.intersect1d(a.numbers, b.numbers, assume_unique=True, return_indices=True)
        a, b = a.only(in_a), b.only(in_b)
    # Two arms at one place of one round were not visited in turn: the pairs of such rounds prove nothing.
    if not len(a.numbers) or (a.positions == b.positions).any():
        return None
    return Shared(a.ms, b.ms, a.numbers >> _ROUND_BITS)


def rounds_of(rows: Sequence[Row], samples: "pd.DataFrame") -> dict[_Key, Rounds]:
    """The rounds of every cell that count; decode's two kinds of step weighted as they occur."""
    from nsabench.present.disturbances import is_dropped  # it needs pandas, which drawing does without

    samples = samples[~is_dropped(samples) & samples["process"].notna() & samples["round"].notna()]
    keys: dict[_Key, int] = {}
    names = zip(samples["run_id"].tolist(), samples["cell_id"].tolist(), strict=True)
    cell = np.array([keys.setdefault(name, len(keys)) for name in names], dtype=np.int64)
    process, within = (samples[name].to_numpy(dtype=np.int64) for name in ("process", "round"))
    place, ms = (samples[name].to_numpy(dtype=np.float64) for name in ("position", "ms"))
    kind = np.array([_KINDS.get(variant, 0) for variant in samples["variant"].tolist()], dtype=np.int64)

    number = (process << _ROUND_BITS) + within
    order = np.lexsort((number, cell))
    cell, number, place, ms, kind = (part[order] for part in (cell, number, place, ms, kind))
    first = _firsts(cell, number)
    of_round, numbers, in_round = cell[first], number[first], np.cumsum(first) - 1

    times = np.full((len(of_round), len(_KINDS)), np.nan)
    timed = ms > 0
    slots, medians = _medians(in_round[timed] * len(_KINDS) + kind[timed], ms[timed])
    times.ravel()[slots] = medians
    stride = {(row["run_id"], row["cell_id"]): row["d"] or np.nan for row in rows}
    total = _step_ms(times, of_round, np.array([stride.get(key, np.nan) for key in keys])[of_round])

    # The sort is stable, so the first place a sample names is the first one it was measured at.
    placed = ~np.isnan(place)
    named = np.unique(in_round[placed], return_index=True)
    positions = np.full(len(of_round), np.nan)
    positions[named[0]] = place[placed][named[1]]

    known = ~np.isnan(total) & ~np.isnan(positions)
    rounds = Rounds(numbers[known], total[known], positions[known])
    ends = np.searchsorted(of_round[known], np.arange(len(keys) + 1))
    return {
        key: rounds.only(slice(start, end)) for key, start, end in zip(keys, ends[:-1], ends[1:], strict=True)
    }


def _firsts(*keys: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Where a new combination begins, of keys that are sorted together."""
    first = np.ones(len(keys[0]), dtype=bool)
    first[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    return first


def _medians(
    groups: npt.NDArray[np.int64], values: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    """The groups, ascending, and the median of each."""
    order = np.lexsort((values, groups))
    groups, values = groups[order], values[order]
    starts = np.flatnonzero(_firsts(groups))
    ends = np.append(starts, len(groups))[1:]
    return groups[starts], (values[(starts + ends - 1) // 2] + values[(starts + ends) // 2]) / 2


def _step_ms(
    times: npt.NDArray[np.float64], cell: npt.NDArray[np.int64], stride: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Mean time of a step in each round: where told apart, one in `stride` emits a compressed token.

    `times` has a column for each kind of step, `cell` says whose round it is.
    """
    single, emit, plain = times.T
    emits = np.zeros(cell.max(initial=0) + 1, dtype=bool)
    emits[cell[~np.isnan(emit)]] = True
    mixed = emit / stride + np.where(stride == 1, 0, plain * (1 - 1 / stride))
    # Below one compression block no step emits a token: then the plain ones are all there is.
    return np.where(emits[cell], mixed, np.where(np.isnan(plain), single, plain))
