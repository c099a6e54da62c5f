"""How much faster a cell is than another of its shape: the ratio over rounds in which both were measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from nsabench.present.disturbances import is_dropped
from nsabench.present.frame import Order, Row, baselines, conditions_of, dense_rows
from nsabench.present.wording import arm_text
from nsabench.stats import Interval, paired_ratios

_KINDS = {"emit": 1, "plain": 2}

_ROUND_BITS = 32
"""Of a round's number within a run: below them is its number within its process, above them the process."""

_Key = tuple[str, str]


@dataclass(frozen=True)
class Compared:
    """A cell, what it is compared with, and its speed relative to that: above 1 it is the faster one.

    `base` is the first route of its shape and `dense` the fastest dense attention of its shape; each may be
    the cell itself, and is None where there is none. `speed` and `x_dense` are None for the cell itself, and
    unless both cells are ok and were timed in one regime, cache state and way.
    """

    row: Row
    base: Row | None
    speed: Interval | None
    dense: Row | None
    x_dense: Interval | None

    @property
    def dense_name(self) -> str:
        """Which dense attention that is; empty where none is ok."""
        return arm_text(self.dense) if self.dense is not None and self.dense["status"] == "ok" else ""


@dataclass(frozen=True)
class Rounds:
    """A cell's rounds by ascending number: time of a step in ms, and the place the cell had in the round."""

    numbers: npt.NDArray[np.int64]
    ms: npt.NDArray[np.float64]
    positions: npt.NDArray[np.float64]


class Shared(NamedTuple):
    """Rounds that two cells share: the times of each in ms, and which process measured the pair."""

    a: npt.NDArray[np.float64]
    b: npt.NDArray[np.float64]
    processes: npt.NDArray[np.int64]


def compare(rows: Sequence[Row], samples: pd.DataFrame | None = None, order: Order = ()) -> list[Compared]:
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
    _, in_a, in_b = np.intersect1d(a.numbers, b.numbers, assume_unique=True, return_indices=True)
    # Two arms at one place of one round were not visited in turn: the pairs of such rounds prove nothing.
    if not len(in_a) or (a.positions[in_a] == b.positions[in_b]).any():
        return None
    return Shared(a.ms[in_a], b.ms[in_b], a.numbers[in_a] >> _ROUND_BITS)


def rounds_of(rows: Sequence[Row], samples: pd.DataFrame) -> dict[_Key, Rounds]:
    """The rounds of every cell that count; decode's two kinds of step weighted as they occur."""
    samples = samples[~is_dropped(samples)]
    cell = samples.groupby(["run_id", "cell_id"], sort=False).ngroup().to_numpy()
    kind = samples["variant"].map(_KINDS).fillna(0).to_numpy()
    times = pd.DataFrame(
        {name: samples[name].to_numpy() for name in ("process", "round", "position", "ms")}
    ).assign(cell=cell, kind=kind)
    in_round = ["cell", "process", "round"]
    ms = times[times["ms"] > 0].groupby([*in_round, "kind"])["ms"].median().unstack("kind")
    place = times.groupby(in_round)["position"].first().reindex(ms.index).to_numpy(dtype=float)

    keys = list(samples[["run_id", "cell_id"]].drop_duplicates().itertuples(index=False, name=None))
    stride = {(row["run_id"], row["cell_id"]): row["d"] or np.nan for row in rows}
    of_round = ms.index.get_level_values("cell").to_numpy()
    total = _step_ms(ms, of_round, np.array([stride.get(key, np.nan) for key in keys])[of_round])

    known = ~np.isnan(total) & ~np.isnan(place)
    numbers = (
        ms.index.get_level_values("process").to_numpy(dtype=np.int64) << _ROUND_BITS
    ) + ms.index.get_level_values("round").to_numpy(dtype=np.int64)
    ends = np.searchsorted(of_round[known], np.arange(len(keys) + 1))
    parts = (numbers[known], total[known], place[known])
    return {
        key: Rounds(*(part[start:end] for part in parts))
        for key, start, end in zip(keys, ends[:-1], ends[1:], strict=True)
    }


def _step_ms(
    ms: pd.DataFrame, cell: npt.NDArray[np.int64], stride: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Mean time of a step in each round: where told apart, one in `stride` emits a compressed token."""
    single, emit, plain = (
        ms[kind].to_numpy() if kind in ms else np.full(len(ms), np.nan) for kind in (0, 1, 2)
    )
    emits = np.zeros(cell.max(initial=0) + 1, dtype=bool)
    emits[cell[~np.isnan(emit)]] = True
    mixed = emit / stride + np.where(stride == 1, 0, plain * (1 - 1 / stride))
    # Below one compression block no step emits a token: then the plain ones are all there is.
    return np.where(emits[cell], mixed, np.where(np.isnan(plain), single, plain))
