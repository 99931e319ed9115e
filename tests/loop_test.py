"""The loop over rounds: what it records, whom it leaves out, and when it stops."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from fedjax_peft import adapters, loop, metrics, records, rounds, runs, tasks
from fedjax_peft.algorithms import fedavg
from fedjax_peft.data import batches, federated
from fedjax_peft.types import Cohort

CLIENTS, ROUNDS = 5, 4


def store(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 7, 60)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    encoded = federated.Encoded(rng.integers(0, toy.VOCABULARY, offsets[-1]).astype(np.int32), None, offsets)
    labels = encoded.tokens[offsets[:-1]] % toy.CLASSES
    return federated.build(encoded, labels, np.split(np.arange(60), [4, 20, 30, 50]))


def clients(dropped=lambda index, ids: np.zeros(len(ids), bool)) -> runs.Clients:
    train, test = store(0), store(1)
    pure = {"seed": 0, "widths": (3, 6), "batch": 4}
    return runs.Clients(
        names=tuple("abcde"),
        groups=("x", "x", "y", "y", "y"),
        examples=federated.sizes(train),
        majority=np.full(CLIENTS, 0.5),
        pools={"seen": np.arange(4, dtype=np.int32), "unseen": np.array([4], np.int32)},
        sample=lambda index: federated.sample(0, index, 4, 3),
        dropped=dropped,
        training=lambda index, ids: batches.cohort(train, ids, round=index, steps=2, **pure),
        nothing=lambda ids: batches.cohort(train, ids, round=0, steps=0, **pure),
        tests=lambda ids: batches.items(test, ids, batch=4, pack=4, widths=(3, 6)),
        tokens=batches.waste,
    )


def points(method) -> dict[str, runs.Point]:
    pure = {"seed": 0, "widths": (3, 6), "batch": 4}
    return {"personal": runs.Point(method, lambda ids: batches.cohort(store(0), ids, round=0, steps=2, **pure))}


def problem(broken=()) -> runs.Problem:
    """FedIT on the toy; the uploads of clients in `broken` are not finite."""
    model, task = toy.model(), tasks.classification()
    base = model.init(jax.random.key(0))
    init = functools.partial(adapters.init, shapes=base, rank=2, targets="query")
    # The client keeps its id, which is all that a method may know of who it is.
    algorithm = fedavg.fedit(model, task, init, optax.sgd(0.3))

    def init_client(server, client_id, key):
        return {"id": client_id}

    def client_update(base, server, client, batches, key):
        _, upload, scores = algorithm.client_update(base, server, fedavg.Client(_none(server), ()), batches, key)
        bad = jnp.isin(client["id"], jnp.array(broken, jnp.int32)) if broken else jnp.bool_(False)
        return client, jax.tree.map(lambda leaf: jnp.where(bad, jnp.nan, leaf), upload), scores

    def personalize(base, server, client, batches, key):
        return algorithm.personalize(base, server, fedavg.Client(_none(server), ()), batches, key)

    method = algorithm._replace(init_client=init_client, client_update=client_update, personalize=personalize)
    mesh = rounds.make_mesh(2)
    return runs.Problem(mesh, method, model, task, rounds.shard_base(base, mesh))


def _none(server):
    return jax.tree.map(lambda leaf: None, server.adapters)


def run(workdir, people=None, broken=(), total=ROUNDS, **settings):
    speed = {"chunk": 2, "evaluations": runs.Evaluations(2), "checkpoint_every": 2, "keep_checkpoints": 2} | settings
    whole = problem(broken)
    return loop.run(whole, people or clients(), points(whole.algorithm), workdir, seed=0, total=total, **speed)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, run(workdir)


def test_a_line_a_round_says_what_moved(finished):
    workdir, _ = finished
    lines = metrics.read_lines(workdir / "rounds.jsonl")
    assert [line["round"] for line in lines] == list(range(ROUNDS))
    first = lines[0]
    assert (first["clients"], first["reported"], first["not_finite"]) == (3, 3, [])
    parameters = 2 * 2 * (toy.WIDTH * 2) + toy.WIDTH * toy.CLASSES + toy.CLASSES
    assert first["bytes_up"] == first["bytes_down"] == 3 * 4 * parameters
    assert 0 <= first["padding_waste"] < 1 and first["tokens"] <= first["tokens_computed"]
    assert first["tokens_per_second"] > 0 and first["peak_bytes"] > 0


def test_rows_hold_every_client_and_point(finished):
    workdir, summary = finished
    rows = metrics.read_rows(workdir / "clients.parquet")
    points = [(row["round"], row["point"]) for row in rows if row["client"] == 4]
    assert points == [(0, "global"), (2, "global"), (4, "global"), (4, "personal")]
    assert {row["pool"] for row in rows if row["client"] == 4} == {"unseen"}
    assert summary == metrics.read_json(workdir / "summary.json")
    assert summary["rounds"] == ROUNDS and set(summary["pools"]) == {"seen", "unseen"}
    seen = summary["pools"]["seen"]
    assert set(seen) == {"base", "global", "personal"} and set(seen["global"]["loss"]["groups"]) == {"x", "y"}
    last = [row["accuracy"] for row in rows if (row["round"], row["point"], row["pool"]) == (4, "global", "seen")]
    assert seen["global"]["accuracy"]["mean"] == pytest.approx(np.mean(last))


def test_points_on_the_way_are_shown_on_demand_and_change_nothing(finished, tmp_path):
    summary = run(tmp_path, evaluations=runs.Evaluations(2, points=True))
    assert summary == finished[1]
    rows, plain = (metrics.read_rows(workdir / "clients.parquet") for workdir in (tmp_path, finished[0]))
    early = [row for row in rows if row["point"] == "personal" and row["round"] < ROUNDS]
    assert [row["round"] for row in early if row["client"] == 4] == [0, 2]
    assert [row for row in rows if row not in early] == plain
    assert len({row["loss"] for row in rows if row["client"] == 4}) == 6


def test_the_base_is_evaluated_on_demand(finished, tmp_path):
    summary = run(tmp_path, evaluations=runs.Evaluations(2, base=False))
    rows, plain = (metrics.read_rows(workdir / "clients.parquet") for workdir in (tmp_path, finished[0]))
    assert rows == [row for row in plain if row["round"] > 0]
    without = {pool: {point: of[point] for point in of if point != "base"} for pool, of in finished[1]["pools"].items()}
    assert summary["pools"] == without


def test_points_of_their_own_are_not_evaluated_on_the_way(tmp_path):
    whole = problem()
    own = {name: point._replace(trained=False) for name, point in points(whole.algorithm).items()}
    speed = {"chunk": 2, "checkpoint_every": 2, "keep_checkpoints": 2}
    evaluations = runs.Evaluations(1, points=True)
    loop.run(whole, clients(), own, tmp_path, seed=0, total=2, evaluations=evaluations, **speed)
    rows = metrics.read_rows(tmp_path / "clients.parquet")
    assert {row["round"] for row in rows if row["point"] == "personal"} == {2}


def test_speed_settings_change_nothing(finished, tmp_path):
    run(tmp_path, chunk=1, checkpoint_every=3)
    tables = [metrics.read_rows(workdir / "clients.parquet") for workdir in (finished[0], tmp_path)]
    losses = [[row["loss"] for row in rows] for rows in tables]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_the_fastest_chunk_is_kept(tmp_path):
    run(tmp_path, chunk=None, total=2)
    assert metrics.read_json(tmp_path / "chunk.json")["4 x cpu"]["chunk"] in (1, 2)


def test_a_client_that_turns_nan_is_named_and_left_out(finished, tmp_path):
    run(tmp_path, broken=(0,))
    lines = metrics.read_lines(tmp_path / "rounds.jsonl")
    sampled = [0 in clients().sample(index) for index in range(ROUNDS)]
    assert any(sampled)
    assert [line["not_finite"] for line in lines] == [["a"] if here else [] for here in sampled]
    assert [line["reported"] for line in lines] == [2 if here else 3 for here in sampled]
    assert all(np.isfinite(line["loss"]) for line in lines)


def test_it_stops_when_all_clients_turn_nan(tmp_path):
    with pytest.raises(ValueError, match="round 0: the numbers of all 3 clients that trained are not finite"):
        run(tmp_path, broken=(0, 1, 2, 3))


def test_a_round_in_which_everybody_drops_out_goes_by(tmp_path):
    people = clients(dropped=lambda index, ids: np.full(len(ids), index == 1))
    run(tmp_path, people, total=3)
    lines = metrics.read_lines(tmp_path / "rounds.jsonl")
    assert [line["reported"] for line in lines] == [3, 0, 3]
    assert lines[1]["loss"] is None and lines[1]["bytes_up"] == 0


def test_a_host_step_follows_every_round(tmp_path):
    given = problem()

    def host_step(server):
        assert not isinstance(server.round, jax.core.Tracer)
        return server.replace(round=server.round + 10)

    given = given._replace(algorithm=given.algorithm._replace(host_step=host_step))
    speed = {"chunk": 2, "evaluations": runs.Evaluations(2), "checkpoint_every": 2, "keep_checkpoints": 2}
    loop.run(given, clients(), points(given.algorithm), tmp_path, seed=0, total=2, **speed)
    server, _ = loop.final(given.algorithm, given.mesh, CLIENTS, tmp_path)
    assert int(server.round) == 32


def test_clients_that_never_report_keep_no_state(tmp_path):
    people = clients(dropped=lambda index, ids: np.asarray(ids) == 1)
    run(tmp_path, people)
    _, after = loop.final(problem().algorithm, problem().mesh, CLIENTS, tmp_path)
    met = {int(i) for index in range(ROUNDS) for i in people.sample(index)} - {1}
    assert set(np.flatnonzero(after.known)) == met
    assert all(after.states["id"][i] == i for i in met)


def test_bytes_are_those_that_clients_name():
    values = np.array([10.0, 20.0, 40.0, 80.0], np.float32)
    told = {"loss": np.ones(4), "received": values, "sent": values / 2}
    outcome = {"clients": told, "server": {}, "finite": np.ones(4, bool)}
    cohort = Cohort(np.array([0, 1, 2, 3]), np.ones(4), np.array([True, True, False, False]))
    who = types.SimpleNamespace(names=("a", "b", "c"))
    pending = records.Pending(0, (400, 400), cohort, outcome, np.ones((1, 3)))
    line = records.line(pending, who, 0.0)
    # The third client dropped out after it had received something, the fourth slot is empty.
    assert (line["bytes_down"], line["bytes_up"]) == (4 * 30 + 400, 4 * 15)
    assert "sent" not in line and line["loss"] == 1.0
    del told["sent"]
    line = records.line(pending, who, 0.0)
    assert (line["bytes_down"], line["bytes_up"]) == (1200, 800)
