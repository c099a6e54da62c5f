"""What to run: axes and suites become a list of cells. Needs neither torch nor nsa."""

from nsabench.plan.axes import PlanError, nearest, parse_duration, parse_ints, parse_routes
from nsabench.plan.cells import BASELINES, IMPLS, PEERS, Cell, groups, sweep
from nsabench.plan.declaration import AXES, CACHES, REGIMES, TIMERS
from nsabench.plan.order import informative
from nsabench.plan.suite import Suite, Sweep, cells_of, tags_of, unmeasured
from nsabench.plan.suite_files import (
    find_suite,
    json_schema,
    load_suite,
    parse_suite,
    save_suite,
    suite_files,
    to_toml,
)

__all__ = [
    "AXES",
    "BASELINES",
    "CACHES",
    "IMPLS",
    "PEERS",
    "REGIMES",
    "TIMERS",
    "Cell",
    "PlanError",
    "Suite",
    "Sweep",
    "cells_of",
    "find_suite",
    "groups",
    "informative",
    "json_schema",
    "load_suite",
    "nearest",
    "parse_duration",
    "parse_ints",
    "parse_routes",
    "parse_suite",
    "save_suite",
    "suite_files",
    "sweep",
    "tags_of",
    "to_toml",
    "unmeasured",
]
