"""What torch.compile runs as it stands.

Imported when something is traced: not before, because it loads all of torch's compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


@torch.compiler.disable
def run(function: Callable[P, R], *args: P.args, **named: P.kwargs) -> R:
    """``function(*args, **named)``, untraced: a graph ends before it, another begins after."""
    return function(*args, **named)
