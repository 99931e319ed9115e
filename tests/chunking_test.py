import jax
import jax.numpy as jnp
import pytest

from fedjax_peft import chunking, metrics


@pytest.mark.parametrize(("clients", "expected"), [(1, [1]), (4, [1, 2, 4]), (5, [1, 2, 4, 8])])
def test_candidates_are_powers_of_two_that_end_with_all_clients(clients, expected):
    assert chunking.candidates(clients) == expected


def test_the_choice_is_measured_once_and_kept(tmp_path):
    tried = []

    def prepare(size):
        tried.append(size)
        return jax.jit(lambda x: x + 1, donate_argnums=0), lambda: (jnp.zeros(size, jnp.float32),)

    first = chunking.choose(tmp_path, [1, 2], prepare)
    (devices,) = metrics.read_json(tmp_path / "chunk.json")
    assert devices == "4 x cpu" and first in tried
    tried.clear()
    assert chunking.choose(tmp_path, [1, 2], prepare) == first and not tried


def test_other_devices_are_measured_anew_and_both_are_kept(tmp_path):
    sizes, prepare = [1], lambda size: (jax.jit(lambda x: x + 1), lambda: (jnp.zeros(size, jnp.float32),))
    other = {"8 x TPU v5 lite": {"chunk": 64, "seconds": {"64": 1.0}}}
    metrics.write_json(tmp_path / "chunk.json", other)
    assert chunking.choose(tmp_path, sizes, prepare) == 1
    found = metrics.read_json(tmp_path / "chunk.json")
    assert found | other == found and found["4 x cpu"]["chunk"] == 1


def test_what_does_not_fit_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(chunking, "_free_bytes", lambda: 1000)
    ran = []

    def prepare(size):
        return jax.jit(lambda x: jnp.tile(x, 2)), lambda: ran.append(size) or (jnp.zeros(100 * size, jnp.float32),)

    assert chunking.choose(tmp_path, [1, 2, 4], prepare) == 1
    assert ran.count(1) == 3 and ran.count(2) == 1 and 4 not in ran
    with pytest.raises(ValueError, match="not even 2 clients"):
        chunking.choose(tmp_path / "other", [2], prepare)
