import pytest

from fedjax_peft import manifest, metrics, rounds
from fedjax_peft.config import check_keys, complete, default_config, identity

EXPERIMENT = identity(default_config())


def write(workdir, **hashes):
    manifest.write(workdir, EXPERIMENT, {"chunk": 4}, hashes=hashes, mesh=rounds.make_mesh(2, 2), sizes={"clients": 3})


def changed(section, **keys):
    return EXPERIMENT | {section: EXPERIMENT[section] | keys}


def test_it_says_what_a_repetition_needs(tmp_path):
    write(tmp_path / "run", base="b", data="d")
    content = metrics.read_json(tmp_path / "run" / "manifest.json")
    assert content["experiment"]["train"] == EXPERIMENT["train"] and content["run"] == {"chunk": 4}
    assert content["sha256"] == {"base": "b", "data": "d"}
    assert content["mesh"] == {"clients": 2, "model": 2} and len(content["devices"]) == 4
    assert content["packages"]["jax"] and content["packages"]["fedjax_peft"]


def test_only_the_same_experiment_goes_on(tmp_path):
    manifest.check(tmp_path / "run", EXPERIMENT)
    write(tmp_path / "run", base="b")
    manifest.check(tmp_path / "run", EXPERIMENT, {"base": "b"})
    with pytest.raises(ValueError, match="adapter.rank was 8 and is 4; choose"):
        manifest.check(tmp_path / "run", changed("adapter", rank=4))
    with pytest.raises(ValueError, match="sha256.base was 'b' and is 'c'"):
        manifest.check(tmp_path / "run", EXPERIMENT, {"base": "c"})
    with pytest.raises(ValueError, match="algorithm.mode was None and is 'fo'"):
        manifest.check(tmp_path / "run", changed("algorithm", mode="fo"))


def test_defaults_of_another_release_are_noticed(tmp_path):
    def settings(**arguments):
        return {"algorithm": {"weighting": "examples", **arguments}}

    mesh = rounds.make_mesh(1, 1)
    manifest.write(tmp_path, EXPERIMENT, {}, hashes={}, mesh=mesh, sizes={}, unset=settings(gone=1))
    manifest.check(tmp_path, EXPERIMENT, {}, settings(new=(2, 3)))
    with pytest.raises(ValueError, match="algorithm.weighting was 'examples' and is 'uniform'"):
        manifest.check(tmp_path, EXPERIMENT, {}, settings(weighting="uniform"))


def test_what_was_read_may_lie_elsewhere_if_it_is_the_same(tmp_path):
    write(tmp_path, base="b")
    moved = changed("model", source="/elsewhere")
    manifest.check(tmp_path, moved, {"base": "b"})
    with pytest.raises(ValueError, match="sha256.base was 'b' and is 'c'; choose"):
        manifest.check(tmp_path, moved, {"base": "c"})


def test_a_run_that_goes_on_keeps_what_is_written_of_its_start(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setattr("sys.argv", ["fedjax-peft", "run", "again"])
    write(tmp_path)
    content = metrics.read_json(tmp_path / "manifest.json")
    assert "again" not in content["command"] and [start["command"][-1] for start in content["resumed"]] == ["again"]
    assert content["resumed"][0]["packages"] == content["packages"]
    metrics.write_json(tmp_path / "summary.json", {})
    write(tmp_path)
    assert metrics.read_json(tmp_path / "manifest.json") == content
    moved = changed("data", source="/there") | changed("model", source="/elsewhere")
    manifest.write(tmp_path, moved, {"chunk": 8}, hashes={}, mesh=rounds.make_mesh(1, 1), sizes={})
    found = metrics.read_json(tmp_path / "manifest.json")
    assert found["experiment"]["model"]["source"] == "/elsewhere" and found["run"] == {"chunk": 8}
    assert "source" not in found["experiment"]["data"] and "resumed" in found


def test_where_there_is_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("FEDJAX_PEFT_COMMIT", raising=False)
    assert manifest.environment()["commit"] is None
    monkeypatch.setenv("FEDJAX_PEFT_COMMIT", "abc1234")
    assert manifest.environment()["commit"] == "abc1234"


def test_runs_of_older_releases_go_on_while_new_keys_keep_their_defaults(tmp_path):
    write(tmp_path)
    content = metrics.read_json(tmp_path / "manifest.json")
    del content["experiment"]["evaluate"]["decoding"], content["experiment"]["cohort"], content["run"]["chunk"]
    metrics.write_json(tmp_path / "manifest.json", content)
    manifest.check(tmp_path, EXPERIMENT)
    found = manifest.read(tmp_path)
    assert found["experiment"]["evaluate"]["decoding"] == EXPERIMENT["evaluate"]["decoding"]
    assert found["experiment"]["cohort"] == EXPERIMENT["cohort"] and found["run"]["chunk"] == 0
    decoding = EXPERIMENT["evaluate"]["decoding"] | {"no_repeat": 2}
    with pytest.raises(ValueError, match="evaluate.decoding.no_repeat was 0 and is 2"):
        manifest.check(tmp_path, changed("evaluate", decoding=decoding))


def test_arguments_of_functions_are_not_completed():
    settings = complete({"algorithm": {"name": "mine"}, "train": {"steps": 3}, "server": {"name": "adam"}})
    assert settings["algorithm"] == {"name": "mine"} and settings["data"] == EXPERIMENT["data"]
    assert settings["train"] == EXPERIMENT["train"] | {"steps": 3}
    assert settings["server"] == EXPERIMENT["server"] | {"name": "adam"}


def test_keys_that_no_config_has():
    check_keys(EXPERIMENT | {"algorithm": {"name": "mine", "new": 1}})
    for settings, sentence in (
        ({"droput_rate": 0.1}, "droput_rate is no key of a config; is dropout_rate meant"),
        ({"run": {"mesh": {"client": 2}}}, "run.mesh.client is no key of a config; is clients meant"),
        ({"evaluate": 3}, "evaluate is 3, expected what evaluate is in a config"),
        ({"rounds": {"many": 3}}, "expected what rounds is"),
    ):
        with pytest.raises(ValueError, match=sentence):
            check_keys(settings)
