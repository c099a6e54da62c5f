"""From planned cells to stored rows: build, check against the specification, measure in rounds, append."""

from nsabench.run.drive import Observer, run_plan
from nsabench.run.policy import Policy

__all__ = ["Observer", "Policy", "run_plan"]
