"""`nsabench decode`: one token after S, at each S and route."""

from __future__ import annotations

import typer

from nsabench.commands import _options as o
from nsabench.commands._console import one_line_errors


def decode(
    axes: o.AxisOptions,
    measure: o.MeasureOptions,
    output: o.OutputOptions,
    sweep: o.SweepOptions,
) -> None:
    """Time one decode step at each length S: shares, memory, tokens read, route beside route.

    The KV cache is preallocated and one step is replayed at a frozen length.
    Steps that complete a compressed block and steps that do not are timed apart
    and combined by how often each happens.
    """
    with one_line_errors():
        from nsabench.commands._planned import carry_out
        from nsabench.plan import Suite

        suite = Suite.of_options("decode", o.axes_given(axes), o.option_of)
        code = carry_out(suite, measure, output, sweep)
    raise typer.Exit(code)
