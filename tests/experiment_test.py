"""Whole experiments on a tiny model: what a config can ask for, runs, and leaves a run directory."""

import importlib.util
import re

import jax
import numpy as np
import pytest
import tiny
from federation import assert_same
from ml_collections import ConfigDict

from fedjax_peft import adapters, experiment, ground, loop, methods, metrics, one_client, records, rounds
from fedjax_peft import stage as stages
from fedjax_peft.algorithms import fedprompt
from fedjax_peft.data import federated


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """(changes) -> config of one short run."""
    path = tiny.write_config(tmp_path_factory.mktemp("experiment"))
    spec = importlib.util.spec_from_file_location("tiny_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def config(changes):
        config = module.get_config()
        short = {"rounds": 1, "evaluate.every": 1, "algorithm.name": "fedit", "widths": 1, "dropout_rate": 0.0}
        config.update_from_flattened_dict(short | changes)
        return config

    return config


VARIANTS = {
    "full fine-tuning": {"adapter.kind": "full", "run.chunk": 1},
    "bfloat16, loop over layers, remat": {"model.dtype": "bfloat16", "run.scan": True, "run.remat": True},
    "a split base": {"run.mesh.clients": 2, "run.mesh.model": 2, "run.chunk": 2, "train.group_by_length": False},
    "epochs, clipping, schedule, server optimizer": {
        "train.steps": None,
        "train.epochs": 1,
        "train.batch": 64,
        "optimizer.clip": 1.0,
        "optimizer.weight_decay": 0.01,
        "schedule.name": "cosine",
        "server.name": "adam",
        "model.dropout": 0.1,
        "adapter.dropout": 0.1,
        "model.trim_vocabulary": False,
    },
}
# What these two need of the data is not in the contract that all algorithms pass.
VARIANTS |= {name: {"algorithm.name": name} for name in ("centralized", "local_only")}


@pytest.mark.parametrize("name", VARIANTS)
def test_it_runs_and_leaves_a_run_directory(name, load, tmp_path):
    summary = experiment.run(load(VARIANTS[name]), str(tmp_path / "run"))
    assert np.isfinite(summary["pools"]["seen"]["personal"]["loss"]["mean"])
    assert summary["pools"]["seen"]["personal"]["examples"] == 1147
    assert summary == metrics.read_json(tmp_path / "run" / "summary.json")
    manifest = metrics.read_json(tmp_path / "run" / "manifest.json")
    assert set(manifest["sha256"]) == {"base", "train", "test"}
    (line,) = metrics.read_lines(tmp_path / "run" / "rounds.jsonl")
    assert np.isfinite(line["loss"]) and line["not_finite"] == []


def test_trimming_the_vocabulary_changes_nothing(load, tmp_path):
    losses = []
    for trim in (True, False):
        experiment.run(load({"model.trim_vocabulary": trim}), str(tmp_path / str(trim)))
        losses.append([row["loss"] for row in metrics.read_rows(tmp_path / str(trim) / "clients.parquet")])
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_ffa_sends_half(load, tmp_path):
    sent = {}
    for name in ("ffa_lora", "fedit"):
        run = tmp_path / name
        experiment.run(load({"algorithm.name": name, "adapter.head": "frozen"}), str(run))
        sent[name] = metrics.read_lines(run / "rounds.jsonl")[0]["bytes_up"]
    assert 2 * sent["ffa_lora"] == sent["fedit"] > 0


def test_ranks_of_weights_and_correlations_are_recorded(load, tmp_path):
    changes = {"algorithm.name": "pf2lora", "evaluate.spectra": True, "task.mcc": True, "adapter.rank": 3}
    summary = experiment.run(load(changes), str(tmp_path))
    found = summary["pools"]["seen"]["personal"]
    assert list(found)[2:] == ["loss", "mcc", "accuracy", "rank_common", "rank_personal", "rank_sum"]
    assert 0 < found["rank_sum"]["mean"] <= 5 and found["rank_personal"]["mean"] <= 2
    assert "global" in summary["pools"]["seen"]  # as after each round, before a client adapts any further
    rows = metrics.read_rows(tmp_path / "strategies.parquet")
    assert {len(row["singular_sum"]) for row in rows} == {5} and {row["rank_personal"] for row in rows} <= {0, 1, 2}
    end = summary["rounds"]
    assert {(row["round"], row["point"]) for row in rows} == {(0, "global"), (end, "global"), (end, "personal")}
    assert not any(any(row["singular_sum"]) for row in rows if not row["round"])


def test_personalization_may_go_on_where_training_ended(load):
    encoded = federated.Encoded(np.arange(2, 42, dtype=np.int32), None, np.arange(41))
    store = federated.build(encoded, np.arange(40) % 2, [np.arange(30), np.arange(30, 40)])
    pools = {"seen": np.arange(2, dtype=np.int32)}
    federation = federated.Federation(store, store, ("a", "b"), ("a", "b"), pools, ("x", "y"))
    walks = {}
    for begun in (0, 3):
        config = load({"cohort": 2, "personalize.batch": 4, "personalize.round": begun})
        support = stages._points(config, federation, 0, {}, None, [])["personal"].support
        walks[begun] = support(np.arange(2)).inputs["tokens"]
        training = ground.clients(config, federation, 0, {}).training(begun, np.arange(2))
        np.testing.assert_array_equal(walks[begun], training.inputs["tokens"])
    assert (walks[0] != walks[3]).any()


MINE = """
from fedjax_peft.algorithms import fedavg

def mine(model, task, init_adapters, optimizer, *, share=0.5):
    federated = fedavg.fedit(model, task, init_adapters, optimizer)

    def server_update(server, sums):
        new, metrics = federated.server_update(server, sums)
        return new, metrics | {"share": share}

    return federated._replace(server_update=server_update)
"""


def test_a_method_in_a_file_of_ones_own(load, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    config = load({})
    config.algorithm = {"name": f"{tmp_path}/mine.py:mine", "share": 0.25}
    experiment.run(config, str(tmp_path / "run"))
    (line,) = metrics.read_lines(tmp_path / "run" / "rounds.jsonl")
    assert line["share"] == 0.25 and np.isfinite(line["loss"])
    methods._read.cache_clear()
    (tmp_path / "mine.py").write_text(MINE.replace("0.5", "0.75"))
    with pytest.raises(ValueError, match="sha256.algorithm was"):
        experiment.run(config, str(tmp_path / "run"))
    config.algorithm.name = f"{tmp_path}/mine.py:yours"
    with pytest.raises(ValueError, match="mine.py has no function yours"):
        experiment.run(config, str(tmp_path / "other"))


def test_what_a_method_of_ones_own_observes_may_depend_on_all_of_its_settings():
    own = {"name": "mine.py:mine", "layers": 2}
    assert stages._observing(ConfigDict({"algorithm": own})) == own
    assert stages._observing(ConfigDict({"algorithm": own | {"name": "fedp2eft"}})) == {"name": "fedp2eft"}


def test_a_method_without_schedules_is_refused_one_that_changes_something(load, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    config = load({"schedule.name": "linear"})
    config.algorithm = {"name": f"{tmp_path}/mine.py:mine"}
    with pytest.raises(ValueError, match="schedule.name is 'linear', which mine has no use for"):
        experiment.run(config, str(tmp_path / "run"))


STAGES = {
    "base": {"name": "fedit", "seed": 42, "rounds": 1, "cohort": 3, "train": {"steps": 2}},
    "adapter": {"rank": 4, "targets": "all-linear", "head": "lora"},
    "personalize": {"budgets": (1, 4)},
    "data": {"test_fraction": 0.05},
    "points": {"lora": {"algorithm": {"name": "lora"}, "personalize": {"budgets": (1,)}}},
}


def staged(load, **changes):
    """A config of three stages with sections changed; `algorithm` and `points` are replaced."""
    config = load({})
    config.algorithm = {"name": "fedp2eft"}
    for settings in (STAGES, changes):
        for key, value in settings.items():
            if isinstance(value, dict) and key not in ("algorithm", "points"):
                config[key].update(value)
            else:
                config[key] = value
    return config


NONE = {"name": "pretrained"}


def kept(workdir) -> dict[str, set[int]]:
    """point -> numbers of ranks that clients keep in all."""
    totals: dict[tuple, int] = {}
    for row in metrics.read_rows(workdir / "strategies.parquet"):
        totals[row["point"], row["client"]] = totals.get((row["point"], row["client"]), 0) + row["ranks"]
    return {point: {total for (of, _), total in totals.items() if of == point} for point, _ in totals}


def test_three_stages_are_one_command_and_a_finished_one_is_not_run_again(load, tmp_path):
    config, workdir = staged(load, base={"adapter": {"rank": 2}}), tmp_path / "run"
    summary = experiment.run(config, str(workdir))
    assert list(summary["pools"]["seen"]) == ["base", "fedp2eft r1", "fedp2eft r4", "lora r1"]
    assert set(summary["pools"]) == {"seen", "unseen"}
    sites = len({row["site"] for row in metrics.read_rows(workdir / "strategies.parquet")})
    assert kept(workdir) == {"fedp2eft r1": {sites}, "fedp2eft r4": {4 * sites}, "lora r1": {sites}}
    lines = (workdir / "base" / "rounds.jsonl").read_text()
    # Another seed on the same base: stage 1 is found finished.
    shared = {"base_workdir": str(workdir / "base")}
    again = staged(load, base={"adapter": {"rank": 2}}, seed=1, run=shared)
    other = experiment.run(again, str(tmp_path / "again"))
    assert (workdir / "base" / "rounds.jsonl").read_text() == lines and not (tmp_path / "again" / "base").exists()
    assert other["pools"]["seen"]["base"] == summary["pools"]["seen"]["base"]
    assert other["pools"]["seen"]["lora r1"] != summary["pools"]["seen"]["lora r1"]


@pytest.mark.parametrize("base", ["feddpa", "dept"])
def test_bases_may_differ_per_client(base, load, tmp_path):
    own = {"name": base} | ({"adapter": {"rank": 2}} if base == "feddpa" else {})
    summary = experiment.run(staged(load, base=own, personalize={"budgets": (1,)}, points={}), str(tmp_path))
    # Only clients that took part in stage 1 have such a base.
    assert list(summary["pools"]) == ["seen"] and list(summary["pools"]["seen"]) == ["base", "fedp2eft r1"]
    sites = len({row["site"] for row in metrics.read_rows(tmp_path / "strategies.parquet")})
    assert kept(tmp_path) == {"fedp2eft r1": {sites}}
    assert summary["pools"]["seen"]["fedp2eft r1"]["loss"] != summary["pools"]["seen"]["base"]["loss"]
    check_parts(experiment.rebuilt(tmp_path), tmp_path, base)


def check_parts(run, workdir, base):
    """Client k has part k of what stage 1 left, and of the ranks that it is evaluated with these are the first."""
    (first, _), count = experiment._stages(run.config), len(run.ground.federation.names)
    stage = stages.Stage.make(first, ground.load(run.config, first.seed))
    server, people = loop.final(stage.algorithm, stage.mesh, count, workdir / "base")
    assert people.known.sum() == 3
    expected = rounds.make_parts(stage.algorithm)(server, people.states, people.known)
    assert_same(run.ground.parts, expected)
    clients = np.append(np.flatnonzero(people.known)[::-1], np.flatnonzero(~people.known)[0])
    given = run.stage.points["fedp2eft r1"].support(clients).constants["part"]
    assert_same(given, jax.tree.map(lambda leaf: leaf[clients], expected))
    if base == "dept":
        tables = {path[-1]: np.abs(node.embedding).max((1, 2)) for path, node in adapters.nodes(given).items()}
        assert (tables["word_embeddings"][:3] > 0).all() and not any(table[3] for table in tables.values())
        return
    tuned = adapters.nodes(one_client.adapt(run, workdir, int(clients[0])))
    for path, own in adapters.nodes(given).items():
        assert own.b[:3].any((1, 2, 3)).all() and not own.b[3].any()
        np.testing.assert_array_equal(tuned[path].b[..., : own.b.shape[-2], :], own.b[0])
        np.testing.assert_array_equal(tuned[path].a[..., : own.a.shape[-1]], own.a[0])


def test_an_interrupted_evaluation_goes_on_with_the_points_that_lack(load, tmp_path, monkeypatch):
    original, done = records.rows, []

    def fail(scores, clients, index, pool, point, averaged):
        if point == "lora r1":
            raise KeyboardInterrupt
        return original(scores, clients, index, pool, point, averaged)

    def note(*arguments):
        done.append(arguments[4])
        return original(*arguments)

    config = staged(load, base=NONE, personalize={"budgets": (1,)})
    monkeypatch.setattr(records, "rows", fail)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(config, str(tmp_path))
    before = metrics.read_rows(tmp_path / "clients.parquet")
    monkeypatch.setattr(records, "rows", note)
    summary = experiment.run(config, str(tmp_path))
    assert set(done) == {"lora r1"} and list(summary["pools"]["seen"]) == ["base", "fedp2eft r1", "lora r1"]
    assert metrics.read_rows(tmp_path / "clients.parquet")[: len(before)] == before
    with pytest.raises(ValueError, match="adapter.targets was 'all-linear' and is 'query'"):
        experiment.run(staged(load, base=NONE, adapter={"targets": "query"}), str(tmp_path))


MISTAKES = {
    "base.name is 'gpt', expected pretrained, fedavg, fedit, feddpa, dept": {"base": {"name": "gpt"}},
    "base.roundz is no key of a config": {"base": {"roundz": 3}},
    "base.train.stepz is no key of a config": {"base": {"train": {"stepz": 3}}},
    "base.optimizer is 3, expected what optimizer is in a config": {"base": {"optimizer": 3}},
    "^base: .*batch": {"base": {"train": {"batch": "many"}}},
    "cohrt is no key of a config; is cohort meant": {"cohrt": 3},
    "adapter.rnk is no key of a config; is rank meant": {"adapter": {"rnk": 3}},
    "data table needs 'source'": {"data": {"name": "table"}},
    "data.train_limit is 'many', expected a whole number or None": {"data": {"train_limit": "many"}},
    "evaluate.every is None, expected 1 or more rounds": {"evaluate": {"every": None}},
    "base.model cannot be set: stage 1 has data, model and speed of the experiment": {
        "base": {"model": {"dropout": 0.3}}
    },
    "base.points cannot be set": {"base": {"points": {}}},
    "base.rounds is 0, expected 1 or more": {"base": {"rounds": 0}},
    "^base: optimizer.learning_rate is -1.0": {"base": {"optimizer": {"learning_rate": -1.0}}},
    "^max_length is 0": {"max_length": 0},
    "evaluate.generate is 5, but nobody writes answers to 'chatterbot', expected 0": {"evaluate": {"generate": 5}},
    "base.algorithm.name is 'fedp2eft', which trains no model that all clients share": {
        "base": {"algorithm": {"name": "fedp2eft"}}
    },
    "algorithm fedmutual cannot go on from a base of feddpa: its pair": {
        "base": {"name": "feddpa"},
        "algorithm": {"name": "fedmutual"},
    },
    "adapter.kind 'full' cannot go on from a base of feddpa": {"base": {"name": "feddpa"}, "adapter": {"kind": "full"}},
    "virtual tokens make texts longer: they cannot be merged": {
        "base": {"algorithm": {"name": "fedprompt", "prompt": (3, 4)}}
    },
    "^optimizer.momentum is 0.9, but optimizer.name is 'adamw', expected 'sgd', or optimizer.momentum at its default": {
        "optimizer": {"momentum": 0.9}
    },
    "^base.optimizer.momentum is 0.9, but base.optimizer.name is 'adamw'": {"base": {"optimizer": {"momentum": 0.9}}},
    "server.momentum is 0.5, but server.name is 'average', expected 'momentum' or 'adam'": {
        "server": {"momentum": 0.5}
    },
    "algorithm.server_optimizer is 'adam', which a method gets from the section server": {
        "algorithm": {"name": "fedit", "server_optimizer": "adam"}
    },
}


def test_a_section_that_a_file_replaces_has_its_types_checked(load, tmp_path):
    config = load({})
    config.train = {"batch": "8", "steps": 4}
    with pytest.raises(ValueError, match="^train: batch is 8 of type str, expected type int"):
        experiment.run(config, str(tmp_path))


def test_words_of_a_prompt_keep_their_embeddings(load, tmp_path):
    """Also those that no text has: the base is left with the embeddings of what occurs."""
    config = load({})
    config.algorithm = {"name": "fedprompt", "prompt": "~^`|}{"}
    loaded = ground.load(config, 0)
    tokens = ground.prompt(config)
    plain = load({})
    assert not np.isin(tokens, ground.load(plain, 0).kept).all()
    stage = stages.Stage.make(config, loaded)
    nodes = adapters.nodes(jax.jit(stage.algorithm.init)(jax.random.key(0)).adapters).values()
    (words,) = [node.ids for node in nodes if isinstance(node, fedprompt.Prompt)]
    np.testing.assert_array_equal(loaded.kept[np.asarray(words)], tokens)


@pytest.fixture(scope="module")
def built(load):
    """(changes) -> the stage of a config that has no stage 1."""
    loaded = ground.load(staged(load), 0)

    def make(**changes):
        return stages.Stage.make(staged(load, **{"base": NONE, "points": {}} | changes), loaded)

    make.base = loaded.pretrained.base
    return make


LORA = {"lora": {"algorithm": {"name": "lora"}, "personalize": {"budgets": (1,)}}}
PLAIN = {"algorithm": {"name": "fedit"}, "personalize": {"budgets": ()}}


def point(algorithm=None, **sections):
    return {"points": {"x": sections | ({"algorithm": algorithm} if algorithm else {})}}


REFUSED = {
    "algorithm.name asks for the file mine.py, which does not exist": {"algorithm": {"name": "mine.py:mine"}},
    "algorithm.tap_dtype is 'int8'": {"algorithm": {"name": "fedp2eft", "tap_dtype": "int8"}},
    "algorithm.keep_optimizer is not a setting of fedp2eft": {
        "algorithm": {"name": "fedp2eft", "keep_optimizer": True}
    },
    "algorithm.clients is 2, but the data have ": PLAIN | {"algorithm": {"name": "hetlora", "clients": 2}},
    "evaluate.spectra is of LoRAs, expected False with algorithm fedmutual, whose clients have pairs of them": PLAIN
    | {"algorithm": {"name": "fedmutual"}, "evaluate": {"spectra": True}, "points": {}},
    "algorithm fedprompt needs 'prompt'": {"algorithm": {"name": "fedprompt"}},
    "^a budget is 5 ranks a site, expected 1 to adapter.rank, which is 4": {"personalize": {"budgets": (5,)}},
    "points.x: fedit learns in rounds, so it needs a run of its own": point({"name": "fedit"}),
    "points.x.personalize.stepz is no key of a config": point({"name": "lora"}, personalize={"stepz": 3}),
    "points.x.data cannot differ, only algorithm, optimizer and personalize": point(data={}),
    "points.x goes on from what the run trained, which does not fit its settings": PLAIN
    | {"algorithm": {"name": "perfedavg"}}
    | point(optimizer={"name": "sgd"}),
    "^personalize.budgets is (1, 4), but fedit selects no ranks, expected ()": {"algorithm": {"name": "fedit"}},
    "^points.x: personalize.budgets is (1, 4), but local_only selects no ranks": point({"name": "local_only"}),
    "^points.x: a budget is 64 ranks a site, expected 1 to adapter.rank, which is 4": point(
        {"name": "lora"}, personalize={"budgets": (64,)}
    ),
    "^points.x: a budget is 1.5 ranks a site": point({"name": "lora"}, personalize={"budgets": (1.5,)}),
    "^points.x.personalize: .*budgets": point({"name": "lora"}, personalize={"budgets": 2}),
    "^points.x.optimizer: .*learning_rate": point({"name": "lora"}, optimizer={"learning_rate": "much"}),
    "^two results of this run would be called 'fedp2eft r1'": {"points": {"fedp2eft": {"algorithm": {"name": "lora"}}}},
    "^two results of this run would be called 'base'": {
        "points": {"base": {"algorithm": {"name": "lora"}, "personalize": {"budgets": ()}}}
    },
    "^two results of this run would be called 'personal'": PLAIN
    | {"points": {"personal": {"algorithm": {"name": "lora"}}}},
    "^points.x.algorithm.tap_mask_padding cannot differ": point({"tap_mask_padding": False}),
    "^points.x.algorithm.tap_dtype cannot differ": point({"tap_dtype": "bfloat16"}),
    "^server.name is 'adam', which fedp2eft has no use for": {"server": {"name": "adam"}},
    "^server.learning_rate is 0.5, which fedp2eft has no use for": {"server": {"learning_rate": 0.5}},
    "^points.x: algorithm.initial is 'two', expected a number": point({"name": "adalora", "initial": "two"}),
    "^schedule.name is 'cosine', which fedl2p has no use for": {
        "algorithm": {"name": "fedl2p"},
        "schedule": {"name": "cosine"},
    },
    "^points.x.optimizer.momentum is 0.5, but points.x.optimizer.name is 'adamw'": point(optimizer={"momentum": 0.5}),
    "^algorithm.rate is 'fast', expected a number": {"algorithm": {"name": "fedp2eft", "rate": "fast"}},
    "^algorithm.proximal is 'x', expected a number": PLAIN | {"algorithm": {"name": "fedit", "proximal": "x"}},
    "^model.dtype is 'bfloat16', in which the differences of algorithm.hvp 'fd' are lost": PLAIN
    | {"algorithm": {"name": "pf2lora", "hvp": "fd"}, "model": {"dtype": "bfloat16"}},
    "^task.dtype is 'bfloat16', in which the differences of algorithm.order 'hf' are lost": PLAIN
    | {"algorithm": {"name": "perfedavg", "order": "hf"}, "task": {"dtype": "bfloat16"}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_would_change_nothing_or_something_else_is_refused(message, built):
    with pytest.raises(ValueError, match=re.sub(r"[()]", r"\\\g<0>", message)):
        built(**REFUSED[message])


def test_a_server_optimizer_is_of_the_method_that_trains_in_rounds(built):
    stage = built(**PLAIN, server={"name": "adam"}, schedule={"name": "linear"}, points=LORA)
    assert jax.tree.leaves(jax.eval_shape(stage.algorithm.init, jax.random.key(0)).optimizer)
    assert list(stage.points) == ["personal", "lora r1"]


@pytest.mark.parametrize("name", ["fedit", "pf2lora", "fedmutual"])
def test_budgets_of_points_alone_have_their_ranks_recorded(name, built):
    stage = built(**PLAIN | {"algorithm": {"name": name}}, points=LORA)
    assert list(stage.points) == ["personal", "lora r1"]
    for method, support, _ in stage.points.values():
        server = jax.eval_shape(method.init, jax.random.key(0))
        client = rounds.client_states(method, server)
        batches = jax.tree.map(lambda leaf: leaf[0], support(np.arange(1)).replace(widths=()))
        adapted = jax.eval_shape(method.personalize, built.base, server, client, batches, jax.random.key(0))
        assert jax.eval_shape(stage.strategy.describe, adapted)["ranks"].shape == (len(stage.strategy.sites),)


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_found_before_anything_is_compiled(message, load, tmp_path):
    with pytest.raises(ValueError, match=message):
        experiment.run(staged(load, **MISTAKES[message]), str(tmp_path))
    assert not (tmp_path / "base").exists()
