"""The page that a run of mmengine renews."""

import signal

import pytest
from small_run import SEED, Killed, assert_same, content, kill, send, train

from litvit.processes import EXIT_INTERRUPTED

pytestmark = pytest.mark.usefixtures("mmengine_scope")


@pytest.mark.parametrize("by_epoch", [True, False])
def test_a_run_leaves_a_page(by_epoch, tmp_path):
    assert train(tmp_path, by_epoch=by_epoch, **SEED) == 0
    page = (tmp_path / "report.html").read_text(encoding="ascii")
    assert "<h3>Loss" in page
    assert "<h3>Metrics" in page
    assert ("epoch 3\nsum: " if by_epoch else "sum: ") in page
    assert "optim_wrapper.optimizer.lr" in page


def test_it_is_renewed_after_every_validation_and_by_a_resumed_run(tmp_path):
    with pytest.raises(Killed):
        train(tmp_path, {("before_train_iter", 8): kill}, **SEED)
    page = (tmp_path / "report.html").read_text()
    assert "epoch 1\nsum: " in page
    assert "epoch 2\nsum: " not in page
    assert train(tmp_path, **SEED) == 0
    page = (tmp_path / "report.html").read_text()
    for epoch in (1, 2, 3):
        assert page.count(f"epoch {epoch}\nsum: ") == 1
        assert page.count(f"iteration {6 * epoch}\nloss: ") == 1


def test_a_page_that_cannot_be_written_is_a_warning(undisturbed, tmp_path, capfd):
    (tmp_path / "report.html").mkdir()
    assert train(tmp_path, **SEED) == 0
    assert "cannot write report.html" in capfd.readouterr().out
    assert_same(undisturbed(), content(tmp_path))


def test_a_run_that_is_stopped_shows_where(tmp_path):
    hooks = {"default_hooks": {"logger": {"type": "LoggerHook", "interval": 2}}}
    assert train(tmp_path, {("before_train_iter", 4): send(signal.SIGTERM)}, **SEED, **hooks) == EXIT_INTERRUPTED
    assert "iteration 4\nloss: " in (tmp_path / "report.html").read_text()
