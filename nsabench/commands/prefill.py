"""`nsabench prefill`: a whole prompt of S tokens, forward and backward, at each S and route."""

from __future__ import annotations

import typer

from nsabench.commands import _options as o
from nsabench.commands._console import one_line_errors


def prefill(
    axes: o.AxisOptions,
    prompt: o.PromptOptions,
    measure: o.MeasureOptions,
    output: o.OutputOptions,
    sweep: o.SweepOptions,
    capture: o.CaptureOptions,
) -> None:
    """Time a whole prompt of S tokens: forward into a KV cache, backward, or both.

    Every mode gives the same result.
    """
    with one_line_errors():
        from nsabench.commands._planned import carry_out
        from nsabench.plan import Suite

        suite = Suite.of_options("prefill", o.axes_given(axes, prompt), o.option_of)
        if capture.save_selection is not None:
            from nsabench.commands._capture import save_selection_of

            code = save_selection_of(suite, measure, output, sweep, capture.save_selection)
        else:
            code = carry_out(suite, measure, output, sweep)
    raise typer.Exit(code)
