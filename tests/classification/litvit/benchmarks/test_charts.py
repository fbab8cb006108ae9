"""Charts of LIT's tables."""

import pytest

from litvit.benchmarks.cases import compare
from litvit.benchmarks.charts import draw_charts
from litvit.benchmarks.published import PUBLISHED, TABLES


def rows(numbers, keys):
    """Rows as `benchmark_paper` returns them, with the published figures as measured ones."""
    measured = {}
    for name, published in PUBLISHED.items():
        row = {"model": name, "macs": published.macs * 1e9, "training_images_per_second": 10.0}
        row |= {key: getattr(published, key) or 100 for key in keys}
        measured[name] = row | {"accuracies": {"top1": {"percent": published.top1}}}
    return [
        {"table": number, **measured[name], **compare(measured[name], measured.get(peer))}
        | {"counterpart": peer, "published": PUBLISHED[name]._asdict()}
        for number in numbers
        for name, peer in TABLES[number].counterparts.items()
    ]


@pytest.mark.parametrize(
    ("keys", "panels"),
    [
        (["inference_images_per_second", "training_memory", "test_memory"], 5),
        (["inference_images_per_second"], 3),  # of a CPU
    ],
)
def test_speed_is_drawn_as_far_as_it_is_measured(keys, panels, tmp_path):
    charts = draw_charts(rows([1, 3], keys))
    assert sorted(charts) == ["ablations.png", "accuracy.png", "speed.png"]
    figure = charts["speed.png"]
    assert len(figure.axes) == panels
    inference = [text.get_text() for text in figure.axes[1].texts]
    assert inference == 2 * ["1.29", "1.35", "1.10", "1.15"]  # measured and published
    assert figure.axes[1].get_yticklabels()[0].get_text() == "LIT-Ti / PVT-S"
    for name, chart in charts.items():
        chart.savefig(tmp_path / name)


def test_accuracies_are_drawn_at_their_multiply_adds():
    (chart,) = draw_charts(rows([2], ["inference_images_per_second"])).values()
    multiply_adds, top1, _ = chart.axes
    assert [text.get_text() for text in multiply_adds.texts] == 2 * ["3.6", "3.6", "4.1", "4.1"]
    assert [text.get_text() for text in top1.texts] == 2 * ["80.4", "81.1", "81.3", "81.5"]
