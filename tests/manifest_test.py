import pytest

from fedjax_peft import manifest, metrics, rounds

EXPERIMENT = {"seed": 0, "adapter": {"rank": 8, "targets": "query,value"}}


def write(workdir, **hashes):
    manifest.write(workdir, EXPERIMENT, {"chunk": 4}, hashes=hashes, mesh=rounds.make_mesh(2, 2), sizes={"clients": 3})


def test_it_says_what_a_repetition_needs(tmp_path):
    write(tmp_path / "run", base="b", data="d")
    content = metrics.read_json(tmp_path / "run" / "manifest.json")
    assert content["experiment"] == EXPERIMENT and content["sha256"] == {"base": "b", "data": "d"}
    assert content["mesh"] == {"clients": 2, "model": 2} and len(content["devices"]) == 4
    assert content["packages"]["jax"] and content["packages"]["fedjax_peft"]


def test_only_the_same_experiment_goes_on(tmp_path):
    manifest.check(tmp_path / "run", EXPERIMENT)
    write(tmp_path / "run", base="b")
    manifest.check(tmp_path / "run", EXPERIMENT, {"base": "b"})
    with pytest.raises(ValueError, match="adapter.rank was 8 and is 4; choose"):
        manifest.check(tmp_path / "run", EXPERIMENT | {"adapter": {"rank": 4, "targets": "query,value"}})
    with pytest.raises(ValueError, match="sha256.base was 'b' and is 'c'"):
        manifest.check(tmp_path / "run", EXPERIMENT, {"base": "c"})
    with pytest.raises(ValueError, match="rounds was None and is 3"):
        manifest.check(tmp_path / "run", EXPERIMENT | {"rounds": 3})
