"""How much of a device other processes may use before a verdict is doubted, and before there is none.

Who takes a part u of the cores slows what needs all of them by 1 / (1 - u), and what leaves a core free not
at all: so far may the ratio of two arms be moved, in every round alike, and the control, which is like the
first side, shows nothing of it.
"""

LOUD_PCT = 10.0
"""Above it the ratio may be off by more than 11 %: a warning, and rounds first wait for the others to end."""

SPOILT_PCT = 25.0
"""Above it by more than 33 %, and threads that wait for each other lose more: such a verdict is INVALID."""
