"""Spectra: singular values from factors against dense ones, ranks, and what is recorded of a client."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import toy

from fedjax_peft import adapters, ranks, spectra
from fedjax_peft.reports import plots, spectrum_plots


def lora(rank: int, seed: int = 0, shape=(2, 9, 7)) -> adapters.LoRA:
    *layers, inputs, outputs = shape
    rng = np.random.default_rng(seed)
    draw = (rng.normal(size=size).astype(np.float32) for size in ((*layers, inputs, rank), (*layers, rank, outputs)))
    return adapters.LoRA(*draw, np.linspace(0.5, 2, rank, dtype=np.float32) * np.ones((*layers, 1), np.float32))


def dense(node: adapters.LoRA) -> np.ndarray:
    return (node.a * node.scale[..., None, :]) @ node.b


def test_singular_values_are_those_of_the_dense_product():
    for rank in (1, 3, 12):  # more ranks than inputs or outputs, too
        node = lora(rank)
        found, expected = spectra.singular_values(node), np.linalg.svd(dense(node), compute_uv=False)
        kept = min(rank, 7)
        np.testing.assert_allclose(found[..., :kept], expected[..., :kept], rtol=1e-4, atol=1e-5)
        assert np.all(np.asarray(found[..., kept:]) < 1e-4)


def test_the_dense_product_is_never_formed():
    node = lora(3, shape=(2, 50, 40))
    pattern = r"\[(\d+,)*(50,40|40,50)(,\d+)*\]"
    assert re.search(pattern, str(jax.make_jaxpr(lambda node: (node.a * node.scale[..., None, :]) @ node.b)(node)))
    program = str(jax.make_jaxpr(spectra.singular_values)(node))
    assert "qr" in program and not re.search(pattern, program)


def test_nothing_has_no_rank():
    node = lora(3)
    nothing = node.replace(b=0 * node.b)
    assert not spectra.numerical_rank(spectra.singular_values(nothing), 1e-2).any()
    assert not spectra.singular_values(node.replace(a=node.a[..., :0], b=node.b[:, :0], scale=node.scale[:, :0])).any()


def test_small_values_do_not_count():
    values = jnp.array([[2.0, 1.0, 0.021, 0.019], [1.0, 0.0, 0.0, 0.0]])
    assert spectra.numerical_rank(values, 1e-2).tolist() == [3, 1]
    assert spectra.numerical_rank(values, 0.6).tolist() == [1, 1]


def test_a_client_is_described_by_site_and_level():
    shapes = jax.eval_shape(toy.model().init, jax.random.key(0))
    init = functools.partial(adapters.init, shapes=shapes, targets="all-linear", head="lora", alpha=4.0)
    common, personal = init(jax.random.key(0), rank=3), init(jax.random.key(1), rank=2)
    full = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), common)
    layout = ranks.layout(common)
    found = spectra.describe(layout, adapters.concat(full, personal), 1e-3)
    assert [found[name].tolist() for name in spectra.RANKS] == [[3, 3, 3], [0, 0, 0], [3, 3, 3]]
    node = adapters.nodes(full)["encoder", "layer", "query"]
    expected = np.linalg.svd(dense(jax.device_get(node)), compute_uv=False)[:, :3]
    assert layout.names[:2] == ("encoder.layer.0.query", "encoder.layer.1.query")
    np.testing.assert_allclose(found["singular_common"][:2, :3], expected, rtol=1e-4, atol=1e-5)
    alone = spectra.describe(layout, full, 1e-3)
    assert alone["singular_personal"].shape == (3, 1) and alone["rank_sum"].tolist() == [3, 3, 3]


def test_pictures_of_spectra(tmp_path):
    rows = [
        {"round": at, "client": k, "name": f"c{k}", "pool": "seen", "point": "global"}
        | {"rank_common": at, "rank_personal": 1.0, "rank_sum": at + k}
        for at in (0, 2, 4)
        for k in range(3)
    ]
    plots.write_spectra(tmp_path / "few", rows, recorded((4, "personal")), algorithm="pf2lora", point="personal")
    assert {path.stem for path in (tmp_path / "few").iterdir()} == {"numerical_ranks", "singular_values"}
    found = recorded((0, "global"), (2, "global"), (4, "global"), (4, "personal"))
    plots.write_spectra(tmp_path / "all", rows, found, algorithm="pf2lora", point="personal")
    assert {path.stem for path in (tmp_path / "all").iterdir()} == {"numerical_ranks", "singular_values", "spectra"}


def recorded(*points):
    """Rows of strategies.parquet; at round r the sum of client k of three has the values r and r (k + 1) / 4."""
    return [
        {"round": at, "pool": pool, "point": point, "singular_common": [at, at / 2], "singular_personal": [0.0]}
        | {"singular_sum": [float(at), at * (k + 1) / 4, 0.0]}
        for at, point in points
        for pool in ("seen", "unseen")
        for k in range(3)
    ]


def test_lines_of_singular_values_are_medians_of_rounds():
    panels = spectrum_plots.values_over_rounds(recorded((4, "global"), (0, "global"), (2, "global")), "title").axes
    drawn = {panel.get_title(): [line.get_xydata().T.tolist() for line in panel.get_lines()] for panel in panels}
    rounds = [0, 2, 4]
    assert drawn["sum"] == [[rounds, [0, 1, 1]], [rounds, [0, 0.5, 0.5]], [rounds, [0, 0, 0]]]
    assert drawn["common"] == drawn["sum"][:2] and drawn["personal"] == drawn["sum"][2:]
