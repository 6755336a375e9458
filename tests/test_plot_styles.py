"""Series of one plot are distinguishable, however many there are."""

import pytest

from domainbed_reasoning.plot_styles import series

KINDS = 20


def test_no_two_of_72_series_share_color_and_marker_and_no_neighbours_either_of_them():
    assert len({series(number)[:2] for number in range(72)}) == 72
    assert len({series(number) for number in range(288)}) == 288
    for number in range(71):
        assert all(one != other for one, other in zip(series(number)[:2], series(number + 1)[:2], strict=True))


def looks(axes):
    """Return (color, marker) of the named lines of a plot."""
    return [(line.get_color(), line.get_marker()) for line in axes.lines if not line.get_label().startswith("_")]


@pytest.mark.parametrize("plot", ["rounds", "faithfulness"])
def test_an_analysis_of_many_kinds_of_jobs_draws_each_in_its_own_way(monkeypatch, tmp_path, plot):
    pytest.importorskip("matplotlib")
    from domainbed_reasoning.analysis import plots

    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure.axes[0]))
    monkeypatch.setattr(plots, "kinds_of", lambda rows: [row["models"] for row in rows])
    rows = [
        {"models": f"kind {n:02}", "job": str(n), "stage": n % 2, "target": 0.5, "what": "w", "share": 0.5}
        | {"low": 0.4, "high": 0.6}
        for n in range(KINDS)
    ]
    getattr(plots, plot)(rows, "title", tmp_path / "plot.png")
    assert len(set(looks(drawn[0]))) == len(looks(drawn[0])) == KINDS


def test_a_report_of_many_rows_draws_each_in_its_own_way(monkeypatch):
    pytest.importorskip("matplotlib")
    from domainbed_reasoning.results.report import plots

    drawn = []
    monkeypatch.setattr(plots, "_figure", lambda canvas, *texts: drawn.append(canvas.axes[0]))

    class Trained:
        sweep = ""

        def __init__(self, number):
            self.args = {"dataset": "PACS", "test_envs": [0], "algorithm": f"A{number:02}"}
            self.evaluations = [{"step": step, "env0_in_acc": 0.1} for step in (0, 10)]

    plots.training([Trained(number) for number in range(KINDS)], "PACS")
    assert len(set(looks(drawn[0]))) == len(looks(drawn[0])) == KINDS
