"""What a program costs is read from its text; a plan compiles the real round for TPUs that are not there."""

import json
import sys

import decoder
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from fedjax_peft import experiment
from fedjax_peft.benchmarks import jobs as bench_jobs
from fedjax_peft.planning import hlo, jobs, plan, topologies


@pytest.fixture(scope="module")
def libtpu():
    pytest.importorskip("libtpu", reason="TPU programs are compiled by the package libtpu: pip install 'jax[tpu]'")


def config(folder, **changes):
    """A tiny BERT of which there is nothing but the sizes."""
    fields = json.loads((tiny.write_model(folder) / "config.json").read_text())
    for file in folder.iterdir():
        file.unlink()
    (folder / "config.json").write_text(json.dumps(fields | changes))
    own = experiment.default_config()
    own.model.source, own.model.pool = str(folder), "pooler"
    own.cohort, own.max_length, own.adapter.rank = 8, 16, 2
    own.train.steps, own.train.batch = 2, 4
    own.run.chunk = 2
    return own


def make_job(own, **settings):
    return jobs.make_job(own, **{"classes": 4, "steps": None, "remat": False} | settings)


def decoder_config(folder, **changes):
    """A tiny Llama that answers prompts, of which there is nothing but the sizes."""
    own = config(folder)
    (folder / "config.json").write_text(json.dumps(decoder.config() | changes))
    own.model.pool, own.data.name, own.adapter.targets = None, "dolly", "all-linear"
    return own


def test_loops_count_as_often_as_they_turn():
    def step(x, matrix):
        inner = jax.lax.scan(lambda carry, _: (carry @ matrix, None), x, None, length=3)[0]
        return jnp.sum(jax.lax.scan(lambda carry, _: (jnp.sin(inner * carry) @ matrix, None), x, None, length=5)[0])

    text = jax.jit(step).lower(jnp.ones((8, 16)), jnp.ones((16, 16))).compile().as_text()
    cost = hlo.cost(text)
    assert (cost.flops, cost.unknown, cost.collectives) == (8 * 2 * 8 * 16 * 16, 0, ())


def test_the_dearest_branch_counts():
    def step(index, x):
        return jax.lax.switch(index, [lambda x: x[:2] @ x.T[:, :2], lambda x: (x @ x.T)[:2, :2]], x)

    text = jax.jit(step).lower(0, jnp.ones((64, 32))).compile().as_text()
    assert hlo.cost(text).flops == 2 * 64 * 64 * 32


TPU = """
%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[], f32[8,16]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,16]{1,0:T(8,128)S(1)} get-tuple-element(%p), index=1
  %w = f32[16,16]{1,0} constant({...})
  %y = f32[8,16]{1,0} convolution(%x, %w), window={}, dim_labels=bf_io->bf, backend_config={"estimated_cycles":"7"}
  %g = f32[8,64]{1,0} all-gather(%y), dimensions={1}, replica_groups=[2,4]<=[4,2]T(1,0), use_global_device_ids=true
  ROOT %t = (s32[], f32[8,16]{1,0}) tuple(%i, %y)
}
%condition (q: (s32[], f32[8,16])) -> pred[] {
  %q = (s32[], f32[8,16]{1,0}) parameter(0)
  %n = s32[]{:T(128)} constant(12)
  %i = s32[] get-tuple-element(%q), index=0
  ROOT %less = pred[] compare(%i, %n), direction=LT
}
ENTRY %main (a: f32[2,8,4]) -> f32[2,4] {
  %a = f32[2,8,4]{2,1,0} parameter(0)
  %b = f32[2,4,6]{2,1,0} parameter(1)
  %c = f32[2,8,6]{2,1,0} convolution(%a, %b), window={size=2 lhs_dilate=2}, dim_labels=0bf_0io->0bf
  %l = (s32[], f32[8,16]{1,0}) while(%z), condition=%condition, body=%body
  %s = (f32[10]{0}, f32[]) all-reduce-start(%d, %e), replica_groups=mesh['x'=4,'y'=2] {'x'}, to_apply=%add
  %d = f32[10]{0} parameter(2)
  %e = f32[] parameter(3)
  ROOT %f = f32[10]{0} all-reduce-done(%s)
}
"""


def test_the_text_of_a_tpu_program():
    cost = hlo.cost(TPU)
    # Two clients side by side are a window over a dilated axis: one tap of two meets data.
    assert cost.flops == 2 * (2 * 8 * 4 * 6) + 12 * 2 * 8 * 16 * 16
    assert (cost.cycles, cost.unknown) == (12 * 7, 0)
    gathered, reduced = cost.collectives
    assert gathered == ("all-gather", ((0, 2, 4, 6), (1, 3, 5, 7)), 4 * 8 * 16 * 4, 12)
    assert reduced == ("all-reduce", ((0, 2, 4, 6), (1, 3, 5, 7)), 44, 1)
    assert plan.axis_of(gathered.groups, model=2) == "clients"
    assert plan.axis_of(((0, 1), (2, 3)), model=2) == "model"
    assert plan.axis_of(((0, 1, 2, 3),), model=2) == plan.axis_of((), model=2) == "clients and model"


def test_a_text_that_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.cost("nothing")


def test_least_work_is_that_of_the_benchmark(tmp_path):
    job = make_job(config(tmp_path))
    texts = np.ones((1, 2, 4))
    data = job.batches.replace(inputs={"mask": np.ones((1, 2, 4, 16), bool)}, weights=texts)
    assert job.flops == bench_jobs.minimum_flops(job.base, job.adapters, data)
    assert job.tokens == 2 * 4 * 16


def test_full_fine_tuning_needs_gradients_of_weights(tmp_path):
    own = config(tmp_path)
    own.adapter.kind = "full"
    texts, tokens, width, inner = 2 * 4, 16, tiny.WIDTH, tiny.INNER
    layer = 6 * (4 * width**2 + 2 * width * inner) + 12 * width * tokens
    assert make_job(own).flops == texts * (tokens * tiny.LAYERS * layer + 6 * width**2 + 6 * width * 4)


def test_a_plan_needs_no_weights_and_names_what_it_misses(tmp_path):
    own = config(tmp_path / "model")
    own.train.steps, own.train.epochs = None, 1
    with pytest.raises(ValueError, match="--steps"):
        make_job(own)
    assert make_job(own, steps=3).tokens == 3 * 4 * 16
    own.model.source = str(tmp_path)
    with pytest.raises(ValueError, match=r"no config\.json"):
        make_job(own, steps=3)


def test_this_machine_can_be_planned_for(tmp_path, capsys):
    own = config(tmp_path)
    content = plan.main(own, ["cpu"], classes=4, output=str(tmp_path / "plan.json"))
    (name,) = content
    found = json.loads((tmp_path / "plan.json").read_text())[name]["plan"]
    assert found["fits"] and found["slots"] == 8 and found["candidate"]["chunk"] == 2
    base = sum(leaf.size * 4 for leaf in jax.tree.leaves(make_job(own).base))
    assert found["parts"]["base"] == base < found["needed"]
    said = capsys.readouterr().out
    assert "largest chunk that fits" in said and "ok: over clients goes one sum" in said and "does not know" in said


def test_exchanges_in_a_loop_are_pointed_out(tmp_path):
    job = make_job(config(tmp_path))
    four = ((0, 1, 2, 3),)
    made = plan.Plan(plan.Candidate(2, 1, False), 8, 1.0, True, {}, hlo.Cost(1.0, 1.0, (), 0), 1.0, 1.0, 0.0)
    for kind, size, times, word in (
        ("all-gather", 10, 6, "is gathered inside a loop"),
        ("all-reduce", 10, 6, "MB go over clients"),
        ("all-reduce", 10**8, 1, "MB go over clients"),
    ):
        cost = made.cost._replace(collectives=(hlo.Collective(kind, four, size, times),))
        said = plan.checks(made._replace(cost=cost), job)
        assert [line for line in said if line.startswith("look") and word in line]
    assert not [said for said in plan.checks(made, job) if "look" in said]


@pytest.mark.parametrize("algorithm", [{"name": "fedit"}, {"name": "fedamole", "embed_on": "aux"}])
def test_a_causal_model_answers_with_as_many_tokens_as_are_asked_for(tmp_path, algorithm):
    own = decoder_config(tmp_path)
    own.algorithm, own.observe.batch = algorithm, 3
    job = make_job(own, answer=5)
    assert job.batches.labels["targets"].shape == job.batches.inputs["chosen"].shape == (2, 4, 5)
    # Logits of three more tokens of four texts in two steps, whose head is frozen.
    more = make_job(own, answer=8).flops - job.flops
    assert more == 4 * 2 * 3 * 4 * decoder.WIDTH * decoder.VOCABULARY
    if algorithm["name"] == "fedamole":
        # 200 held-out texts of a client in batches of three; a round can be traced with them.
        aux = job.batches.constants["aux"]
        assert aux["inputs"]["tokens"].shape == (67, 3, 16) and aux["labels"]["targets"].shape == (67, 3, 5)
        assert jobs.sums(job, 2).seen.shape == (8,)


def test_of_a_split_base_only_activations_are_exchanged(tmp_path):
    job = make_job(decoder_config(tmp_path))
    made = plan.compile_round(job, topologies.find("cpu"), plan.Candidate(2, 2, False))
    within = [one for one in made.cost.collectives if plan.axis_of(one.groups, 2) == "model" and one.times > 1]
    assert within and {one.kind for one in within} == {"all-reduce"}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm.", 20.5 * 2**30),
        ("RESOURCE_EXHAUSTED: required for temporaries (3.25T) exceeds available HBM (15.75G).", 3.25 * 2**40),
        ("INVALID_ARGUMENT: something else", None),
    ],
)
def test_refusals_of_the_compiler_say_how_much_is_needed(message, expected):
    assert plan.too_much(message) == expected


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("v9:2x2", "topology is 'v9:2x2'"), ("v5e:2x2x2", "3 axes, but a v5e slice has 2"), ("gpu", "no such device")],
)
def test_topologies_that_do_not_exist(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        topologies.find(name)


def test_what_describes_slices_can_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ValueError, match="needs the package libtpu"):
        topologies.find("v5e:2x2")


@pytest.mark.parametrize(("name", "chips"), [("v4:2x2x1", 4), ("v5e:16x16", 256), ("v5p:4x4x4", 64), ("v6e:1x1", 1)])
def test_slices_are_described_without_a_tpu(libtpu, name, chips):
    assert len(topologies.find(name).devices) == chips


@pytest.mark.further
def test_a_round_on_four_chips_is_four_rounds_on_one(libtpu, tmp_path):
    own = config(tmp_path)
    four, job = topologies.find("v5e:2x2"), make_job(own)
    made = plan.compile_round(job, four, plan.Candidate(2, 1, False))
    assert made.fits and made.slots == 8 and made.cost.unknown == 0
    # Nothing is computed that need not be, and only sums of uploads and a few metrics leave a chip.
    assert 1 <= made.cost.flops / made.least < 1.05
    assert all("ok" in said for said in plan.checks(made, job))
    assert {one.kind for one in made.cost.collectives} == {"all-reduce"}
    uploads = jobs.held(jobs.sums(job, 8))
    assert uploads <= sum(one.bytes for one in made.cost.collectives) < 1.5 * uploads
    assert plan.weak_scaling(own, four, made, {"classes": 4}) == pytest.approx(1, abs=0.02)
    assert made.seconds > made.network > 0


@pytest.mark.further
def test_a_base_too_large_for_a_chip_is_refused_and_can_be_split(libtpu, tmp_path):
    own = config(tmp_path, vocab_size=1 << 29)
    job, four = make_job(own), topologies.find("v5e:2x2")
    alone = plan.compile_round(job, four, plan.Candidate(2, 1, False))
    assert not alone.fits and alone.parts["base"] > four.chip.memory
    assert "does not fit" in plan.checks(alone, job)[0]
    assert (
        P("model", None)
        == jobs.arguments(job, plan.make_mesh(four, 4), 8)[0]["embeddings"]["word_embeddings"][
            "embedding"
        ].sharding.spec
    )
