import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fedjax_peft import checkpoint, rounds

STATE = {"server": {"a": jnp.arange(8.0), "round": jnp.int32(3)}, "states": (), "known": np.array([True, False])}


def test_the_newest_comes_back_with_its_types(tmp_path):
    checkpoints = checkpoint.manager(tmp_path)
    for index in (1, 2, 3):
        server = {"a": jnp.arange(8.0) * index, "round": jnp.int32(index)}
        checkpoint.save(checkpoints, index, STATE | {"server": server})
    restored = checkpoint.restore(checkpoint.manager(tmp_path), STATE)
    assert restored.round == 3 and restored.state["states"] == ()
    np.testing.assert_array_equal(restored.state["server"]["a"], np.arange(8.0) * 3)
    assert restored.state["server"]["round"].dtype == jnp.int32
    assert restored.state["known"].tolist() == [True, False]
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [2, 3]


def test_an_empty_folder_has_none(tmp_path):
    assert checkpoint.restore(checkpoint.manager(tmp_path), STATE) is None


# Orbax leaves coroutines unawaited when a file is missing.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["cut", "emptied", "missing files"])
def test_a_damaged_one_is_passed_over_with_a_warning(damage, tmp_path, caplog):
    checkpoints = checkpoint.manager(tmp_path)
    for index in (1, 2):
        checkpoint.save(checkpoints, index, STATE)
    for path in (tmp_path / "checkpoints" / "2").rglob("*"):
        if path.is_file() and damage == "missing files":
            path.unlink()
        elif path.is_file():
            os.truncate(path, 0 if damage == "emptied" else path.stat().st_size // 2)
    restored = checkpoint.restore(checkpoint.manager(tmp_path), STATE)
    assert restored.round == 1
    assert "checkpoint of round 2 cannot be read" in caplog.text


def test_if_none_can_be_read_nothing_is_lost(tmp_path):
    checkpoint.save(checkpoint.manager(tmp_path), 1, STATE)
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        checkpoint.restore(checkpoint.manager(tmp_path), STATE | {"more": jnp.zeros(3, jnp.float32)})
    assert checkpoint.restore(checkpoint.manager(tmp_path), STATE).round == 1


def test_one_that_cannot_be_read_is_written_again(tmp_path):
    for index in (1, 2):
        checkpoint.save(checkpoint.manager(tmp_path), index, STATE)
    for path in (tmp_path / "checkpoints" / "2").rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    checkpoints = checkpoint.manager(tmp_path)
    assert checkpoint.restore(checkpoints, STATE).round == 1
    checkpoint.save(checkpoints, 2, STATE)
    assert checkpoint.restore(checkpoint.manager(tmp_path), STATE).round == 2


def test_it_moves_to_another_mesh(tmp_path):
    def on(mesh):
        sharding = NamedSharding(mesh, PartitionSpec())
        return STATE | {"server": jax.device_put(STATE["server"], sharding)}

    checkpoint.save(checkpoint.manager(tmp_path), 1, on(rounds.make_mesh(4)))
    restored = checkpoint.restore(checkpoint.manager(tmp_path), on(rounds.make_mesh(1, 2)))
    assert len(restored.state["server"]["a"].sharding.device_set) == 2
