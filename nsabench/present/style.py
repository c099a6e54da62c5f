"""How every figure looks: colours, sizes, ticks, and one way to write a file."""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from nsabench.present.wording import tokens_text

WIDTH_INCHES = 8.0

_STYLE: Any = {
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.titley": 1.0,  # where it goes anyway, without a search for what it might meet
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "svg.hashsalt": "nsabench",
    "svg.fonttype": "path",
}

# Safe for colour-blind eyes: Okabe and Ito's colours, less the yellow that white swallows; then Tol's muted.
_KNOWN = {
    "auto": "#0072B2",
    "sdpa": "#E69F00",
    "gather": "#009E73",
    "triton": "#D55E00",
    "fa2": "#CC79A7",
    "flex": "#56B4E9",
    "reference": "#000000",
    "dense": "#661100",
}
_OTHERS = ("#882255", "#999933", "#332288", "#44AA99", "#AA4499", "#117733", "#888888")
_MARKERS = "osD^vP*X<>"
RUN_DASHES: tuple[Any, ...] = ("-", "--", ":", "-.")
GREY = "#555555"

STAGE_COLOURS = {
    "proj": "#332288",
    "compress": "#88CCEE",
    "cmp": "#44AA99",
    "score": "#117733",
    "sel": "#DDCC77",
    "win": "#CC6677",
    "gate": "#AA4499",
    "other": "#BBBBBB",
}


@dataclass(frozen=True)
class RouteStyle:
    color: str
    marker: str


@contextmanager
def figure_style() -> Iterator[None]:
    """Inside, figures look the same whatever the user's own settings of matplotlib are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def route_styles(routes: Iterable[str]) -> dict[str, RouteStyle]:
    """A colour and a marker for each route.

    A backend's name has one colour for good. Another route's depends on its own text, and on the other routes
    only where two would get the same.
    """
    styles: dict[str, RouteStyle] = {}
    slots: dict[int, str] = {}
    for route in dict.fromkeys(routes):
        if route in _KNOWN:
            styles[route] = RouteStyle(_KNOWN[route], _MARKERS[list(_KNOWN).index(route)])
            continue
        slot = zlib.crc32(route.encode())
        free = len(slots) < len(_OTHERS)
        while free and slot % len(_OTHERS) in slots:
            slot += 1
        slots[slot % len(_OTHERS)] = route
        styles[route] = RouteStyle(_OTHERS[slot % len(_OTHERS)], _MARKERS[slot % len(_MARKERS)])
    return styles


def lay_out(figure: Figure) -> None:
    """Settle where everything stands, once: a file must not depend on which others are written."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
    figure.set_layout_engine("none")


def size_axis(axes: Axes, sizes: Sequence[int]) -> None:
    """S on a base-2 logarithmic x axis, ticks at measured sizes as 512, 1k, 2k, as many as have room."""
    axes.set_xscale("log", base=2)
    axes.set_xlim(sizes[0] / 2**0.25, sizes[-1] * 2**0.25)
    apart = math.log2(sizes[-1] / sizes[0]) / 11
    ticks: list[int] = []
    # The rounder sizes first: those that more powers of two divide.
    for size in sorted(sizes, key=lambda s: (-(s & -s), s)):
        if all(abs(math.log2(size / tick)) >= apart for tick in ticks):
            ticks.append(size)
    axes.xaxis.set_major_locator(FixedLocator(sorted(map(float, ticks))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens_text(round(value))))
    axes.set_xlabel("S, tokens")


def value_axis(
    axes: Axes,
    values: Sequence[float],
    direction: str,
    text: Callable[[float], str],
    *,
    binary: bool,
    zero: bool,
) -> None:
    """The axis of values ("x" or "y"): logarithmic when `binary` or when they span more than a factor of 8.

    A linear one begins at 0 if `zero`. Ticks are written by `text`, less trailing zeros.
    """
    axis = axes.yaxis if direction == "y" else axes.xaxis
    set_limits = axes.set_ylim if direction == "y" else axes.set_xlim
    lo, hi = min(values), max(values)
    if binary or hi > 8 * lo:
        base = 2 if binary else 10
        (axes.set_yscale if direction == "y" else axes.set_xscale)("log", base=base)
        margin = (hi / lo) ** 0.06 * 1.15
        set_limits(lo / margin, hi * margin)
        subs = (1.0,) if binary or hi > 300 * lo else (1.0, 2.0, 5.0)
        axis.set_major_locator(LogLocator(base, subs=subs, numticks=9))
        axis.set_minor_locator(NullLocator())
    else:
        room = (hi - lo) * 0.1 or hi * 0.1
        set_limits(*((0.0, hi * 1.08) if zero else (lo - room, hi + room)))
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))

    def tick_text(value: float, _: int | None = None) -> str:
        number, *unit = text(value).split()
        return " ".join([f"{float(number):g}", *unit])

    axis.set_major_formatter(FuncFormatter(tick_text))


def room_above(axes: Axes, part: float) -> None:
    """Raise the upper end of the y axis so that what was drawn fills all but `part` of its height."""
    scale = axes.yaxis.get_transform()
    lo, hi = scale.transform(axes.get_ylim())
    axes.set_ylim(top=float(scale.inverted().transform([lo + (hi - lo) / (1 - part)])[0]))
