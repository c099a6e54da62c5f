"""The scorecard: the rules of the attention, put to every backend, the whole layer and installed peers."""

from nsabench.verify.scorecard import run_scorecard
from nsabench.verify.subjects import Case, LayerCase, Subject

__all__ = ["Case", "LayerCase", "Subject", "run_scorecard"]
