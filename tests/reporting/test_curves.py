"""Curves are the same bytes for the same values, keep their means, and hide nothing below a legend."""

from __future__ import annotations

import numpy as np
import pytest

from medsam2.reporting.curves import Diagram, Line, draw_diagrams, to_png, to_svg


def test_a_figure_names_every_diagram_and_line_and_is_reproducible() -> None:
    diagrams = [
        Diagram("Loss & more", (Line("training", range(30), [1.0 + 1 / (i + 1) for i in range(30)]),), smooth=True),
        Diagram(
            "DSC", tuple(Line(f"line {i}", [0, 1], [0.1 * i, 0.5]) for i in range(6)), limits=(0, 1), y_label="DSC"
        ),
        Diagram("Norm", (Line("", [0, 1], [1.0, 0.01]),), log=True),
    ]
    drawn = to_svg(draw_diagrams(diagrams))
    for text in ("Loss &amp; more", "training", "line 0", "line 5", "Norm"):
        assert text in drawn.decode(), text
    assert drawn == to_svg(draw_diagrams(diagrams))
    assert to_png(draw_diagrams(diagrams[:1], shared_legend=True)).startswith(b"\x89PNG")


def test_long_curves_are_averaged_and_keep_their_mean() -> None:
    values = [float(step % 7) for step in range(10_000)]
    (drawn,) = draw_diagrams([Diagram("", (Line("", range(10_000), values),))]).axes[0].lines
    x, y = np.asarray(drawn.get_xdata()), np.asarray(drawn.get_ydata())
    assert len(x) == 400 and x[-1] == 9_999 and y.mean() == pytest.approx(np.mean(values))


def test_a_running_mean_begins_at_the_first_value_and_stays_within_the_values() -> None:
    line = Line("", range(40), [0.0] * 20 + [1.0] * 20)
    faint, strong = draw_diagrams([Diagram("", (line,), smooth=True)]).axes[0].lines
    assert list(faint.get_ydata()) == line.y
    smooth = list(strong.get_ydata())
    assert smooth == sorted(smooth) and smooth[0] == 0 and 0.8 < smooth[-1] < 1
