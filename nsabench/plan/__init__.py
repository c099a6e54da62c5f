"""What to run: axes and suites become a list of cells. Needs neither torch nor nsa."""

from nsabench.plan.axes import PlanError, parse_ints, parse_routes
from nsabench.plan.cells import Cell, groups, sweep

__all__ = ["Cell", "PlanError", "groups", "parse_ints", "parse_routes", "sweep"]
