"""Evaluations of a run: which tables they write at which point, and whose losses they warn of."""

import types

import numpy as np
import pytest

from fedjax_peft import evaluate, judging, metrics, runs

CLIENTS = 7


def judged(workdir, monkeypatch, *, averaged=(), losses=(1.0,) * CLIENTS, examples=(3,) * CLIENTS):
    """The rows of strategies.parquet after evaluations of two points, without any model."""
    ids = np.arange(CLIENTS, dtype=np.int32)
    described = {"rank_sum": np.ones((CLIENTS, 2), np.int32), "singular_sum": np.ones((CLIENTS, 2, 4), np.float32)}
    scores = evaluate.Scores(ids, np.array(examples), {"loss": np.array(losses)}, {}, described)
    monkeypatch.setattr(evaluate, "make_evaluate", lambda *arguments, **settings: lambda *arguments: scores)
    task = types.SimpleNamespace(derived=None)
    strategy = runs.Strategy(("first", "second"), lambda adapters: described, averaged)
    problem = runs.Problem(None, None, None, task, None, strategy)
    clients = types.SimpleNamespace(
        names=tuple("abcdefg"),
        groups=("x",) * CLIENTS,
        examples=np.full(CLIENTS, 10),
        majority=np.full(CLIENTS, 0.5),
        pools={"seen": ids},
        tests=None,
    )
    judge = judging.make_judge(problem, clients, workdir, lambda algorithm: None, chunk=1, root=None)
    for index, point in ((0, "global"), (2, "global"), (2, "personal")):
        judge(None, None, index, {point: runs.Point("method", None)})
    return metrics.read_rows(workdir / "strategies.parquet")


def test_spectra_are_kept_of_every_evaluation(tmp_path, monkeypatch):
    rows = judged(tmp_path, monkeypatch, averaged=("rank_sum",))
    assert len(rows) == 3 * CLIENTS * 2
    assert {(row["round"], row["point"]) for row in rows} == {(0, "global"), (2, "global"), (2, "personal")}
    assert all(row["singular_sum"] == [1.0] * 4 for row in rows)
    assert [row["rank_sum"] for row in metrics.read_rows(tmp_path / "clients.parquet")] == [1.0] * 3 * CLIENTS


def test_what_else_is_described_is_kept_of_personalized_clients(tmp_path, monkeypatch):
    rows = judged(tmp_path, monkeypatch)
    assert {(row["round"], row["point"]) for row in rows} == {(2, "personal")}


@pytest.mark.parametrize(("broken", "named"), [(1, "b"), (6, "b, c, d, e, f ..")])
def test_losses_that_are_not_finite_are_told(broken, named, tmp_path, monkeypatch, caplog):
    losses = np.where((np.arange(CLIENTS) > 0) & (np.arange(CLIENTS) <= broken), np.inf, 1.0)
    judged(tmp_path, monkeypatch, losses=losses)
    sentences = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(sentences) == 3
    assert sentences[2] == f"personal at round 2: the loss of {broken} clients is not finite ({named})"


def test_clients_without_tests_have_no_loss_to_tell(tmp_path, monkeypatch, caplog):
    judged(tmp_path, monkeypatch, losses=(np.nan, *[1.0] * (CLIENTS - 1)), examples=(0, *[3] * (CLIENTS - 1)))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
