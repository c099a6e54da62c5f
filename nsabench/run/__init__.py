"""From planned cells to stored rows: build, check against the specification, measure in rounds, append."""

from nsabench.run.policy import Policy
from nsabench.run.session import Observer, run_plan

__all__ = ["Observer", "Policy", "run_plan"]
