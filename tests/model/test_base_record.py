"""A run records the bits of the base it was trained on; whoever loads the base for it again holds them against that."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil

import pytest
import torch

from nybble.chat.loading import load_answerer
from nybble.errors import ModelError
from nybble.files import cache as kept
from nybble.model.base import bits
from nybble.model.base.checkpoint import Checkpoint, find_checkpoint, fingerprint
from nybble.model.base.load import load_base
from nybble.recipe import ModelOptions
from nybble.run.folder import open_run
from nybble.run.identity import check_unchanged
from nybble.run.start import Start
from tests.conftest import tuned, write_llama
from tests.corpus.caches import flipped, zeroed
from tests.corpus.cases import nybble
from tests.training.test_train import interrupted, recipe_for

CPU = torch.device("cpu")
MADE = {"dtype": "bfloat16", "bitsandbytes": "0.49.0", "torch": "2.9.0"}


@pytest.fixture(scope="module")
def trained(peaky_llama, rows, tmp_path_factory) -> pathlib.Path:
    """A folder with a base, a run on it, and the cache that the run filled."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(peaky_llama, folder / "base")
    tuned(folder / "base", rows, folder / "run", 8, folder / "cache")
    return folder


@pytest.fixture
def place(trained, tmp_path) -> pathlib.Path:
    """A copy of them, to be changed; the run names the copy's base."""
    shutil.copytree(trained, tmp_path / "copy")
    for name in ("recipe.yaml", "start.json"):
        file = tmp_path / "copy" / "run" / name
        file.write_text(file.read_text().replace(str(trained), str(tmp_path / "copy")))
    (tmp_path / "copy" / "run" / "adapter" / "COMPLETE").unlink()  # it was changed on purpose
    shutil.rmtree(tmp_path / "copy" / "cache" / "digests")
    fingerprint(find_checkpoint(str(tmp_path / "copy" / "base")), tmp_path / "copy" / "cache")
    return tmp_path / "copy"


def entry_of(place: pathlib.Path) -> pathlib.Path:
    (entry,) = (place / "cache" / "base").iterdir()
    return entry


def record(place: pathlib.Path, **changes) -> None:
    file = place / "run" / "start.json"
    start = json.loads(file.read_text())
    start["quantized_base"] |= changes
    file.write_text(json.dumps(start))


def answer_of(place: pathlib.Path, *words: object) -> str:
    said = nybble("chat", place / "run", "--prompt", "say red", "--max-new-tokens", 8, *words, cache=place / "cache")
    assert said.status == 0, said.text
    return said.text


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_a_base_has_the_same_digest_quantised_cached_or_not_cached(
    tiny_llama, tmp_path, quantization, monkeypatch
) -> None:
    dtype = torch.bfloat16 if quantization == "int8" else torch.float32
    options = ModelOptions(path=str(tiny_llama), quantization=quantization)
    checkpoint = find_checkpoint(str(tiny_llama))
    bases = [load_base(checkpoint, options, dtype, CPU, tmp_path) for _ in range(2)]
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)._replace(free=0)
        patch.setattr("nybble.model.base.cached.shutil.disk_usage", lambda _: usage)
        bases.append(load_base(checkpoint, options, dtype, CPU, tmp_path / "full"))
    if quantization == "none":
        assert [base.bits for base in bases] == [None] * 3, "its fingerprint says which bits these are"
        return
    assert "is not cached" in bases[2].notices[0]
    assert [base.from_cache for base in bases] == [False, True, False]
    assert len({base.bits.digest for base in bases}) == 1
    assert bases[0].bits.made == bits.made_by(CPU, dtype)
    other = write_llama(tmp_path / "other", initializer_range=0.1)
    assert load_base(find_checkpoint(str(other)), options, dtype, CPU, tmp_path).bits.digest != bases[0].bits.digest


def test_a_run_records_the_bits_of_its_base(trained) -> None:
    start = json.loads((trained / "run" / "start.json").read_text())["quantized_base"]
    assert start == json.loads((trained / "run" / "summary.json").read_text())["base"]["quantized"]
    assert start == load_answerer(trained / "run", trained / "cache").bits.as_json()
    assert start["made"] == bits.made_by(CPU, torch.float32).as_json()


def resealed(place: pathlib.Path) -> None:
    """Other weights in the cache, with digests that fit them: only the run knows better."""
    entry = entry_of(place)
    zeroed("down_proj.weight")(entry / "model.safetensors")
    facts = {**kept.read_note(entry / kept.MANIFEST)["facts"], "tensors": bits.digests_of_files(entry)}
    (entry / kept.MANIFEST).unlink()
    kept.seal(entry, entry, facts, frozenset({"model.safetensors"}))


def test_a_copy_that_differs_from_the_runs_base_is_rebuilt(trained, place, caplog) -> None:
    whole = answer_of(trained)
    resealed(place)
    assert answer_of(place) == whole
    (told,) = caplog.messages
    print(told)
    assert "damaged (it is not the one that the run was trained on) and will be rebuilt" in told
    caplog.clear()
    assert answer_of(place) == whole
    assert not caplog.records


def test_bits_that_cannot_be_reproduced_are_an_error(place) -> None:
    record(place, digest="0" * 32)
    export = ("export", place / "run", "--to", "merged")
    for words in (("chat", place / "run", "--prompt", "x"), ("eval", place / "run", "--tasks", "none"), export):
        said = nybble(*words, cache=place / "cache")
        print(said.text)
        plain = " ".join(said.text.split())
        assert said.status == 1
        assert "the quantised base is not the one that the run was trained on: its digest is" in plain
        assert f"but was {'0' * 32} in training, made in the same way (device cpu" in plain
        assert "download or copy the base again" in plain
    assert not (place / "run" / "export").exists()


def test_bits_that_were_made_in_another_way_give_a_notice(trained, place, caplog) -> None:
    whole = answer_of(trained)
    record(place, digest="0" * 32, made={**MADE, "device": "NVIDIA H100"})
    assert answer_of(place) == whole
    (told,) = caplog.messages
    print(told)
    then = "device NVIDIA H100, dtype bfloat16, bitsandbytes 0.49.0, torch 2.9.0"
    assert f"in training, where it was made with {then}; this one was made with device cpu" in told


def test_a_run_without_a_record_is_not_compared_with_one(trained, place, caplog) -> None:
    file = place / "run" / "start.json"
    start = json.loads(file.read_text())
    del start["quantized_base"]
    file.write_text(json.dumps(start))
    assert answer_of(place) == answer_of(trained)
    assert not caplog.records
    now = json.loads(file.read_text()) | {"quantized_base": {"digest": "1", "made": {**MADE, "device": "cpu"}}}
    check_unchanged(open_run(place / "run"), Start.model_validate(now))


@pytest.mark.parametrize("stored", ["text", 7, [], {"digest": "1"}, {"digest": "1", "made": []}])
def test_a_damaged_record_is_named(place, stored) -> None:
    file = place / "run" / "start.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantized_base": stored}))
    said = nybble("chat", place / "run", "--prompt", "x", cache=place / "cache")
    print(said.text)
    assert said.status == 1
    assert "the record of the quantised base is damaged: quantized_base is" in " ".join(said.text.split())
    assert str(file) in said.text.replace("\n", "")


def test_another_base_is_refused(place) -> None:
    other = write_llama(place / "other", dtype=torch.bfloat16, initializer_range=0.1)
    shutil.copytree(place / "base", place / "more", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    for file in (place / "more").iterdir():
        shutil.copy(file, other)
    said = nybble("chat", place / "run", "--prompt", "x", "--base", other, cache=place / "cache")
    print(said.text)
    assert said.status == 1
    assert "this is not the base that the run was trained on: sha256:" in " ".join(said.text.split())


def test_the_same_weights_in_other_files_are_the_same_base(trained, place) -> None:
    moved = write_again(place / "base", place / "moved")
    assert answer_of(place, "--base", moved) == answer_of(trained)


def write_again(folder: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """The same tensors under another description: another fingerprint."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "transformers_version": "5.0.0"}))
    return target


def test_the_bits_of_a_resumed_runs_base_are_checked(tiny_llama, rows, tmp_path, quiet, monkeypatch) -> None:
    recipe = recipe_for(tiny_llama, rows, tmp_path / "run", "train.max_steps=6", "train.evaluate_every=2")
    with monkeypatch.context() as patch:
        interrupted(patch, 3, recipe, quiet, tmp_path / "cache")
    record(tmp_path, digest="0" * 32)
    said = nybble("train", "--resume", tmp_path / "run", cache=tmp_path / "cache")
    print(said.text)
    assert said.status == 1
    assert "the quantised base is not the one that the run was trained on" in " ".join(said.text.split())
    assert list((tmp_path / "run" / "checkpoints").iterdir()), "nothing was touched"


def changed(file: pathlib.Path) -> None:
    """One bit of the weights; size and time stay."""
    flipped(0.9)(file)


def believed(file: pathlib.Path, cache: pathlib.Path) -> None:
    """What a disk does that loses a bit: no time of the file says so."""
    (note,) = (note for note in (cache / "digests").iterdir())
    status = file.stat()
    now = {"mtime": status.st_mtime_ns, "ctime": status.st_ctime_ns, "inode": status.st_ino}
    kept.write_note(note, {**kept.read_note(note), **now})


def test_a_base_that_changed_with_the_same_size_and_time_is_noticed(tiny_llama, tmp_path, caplog) -> None:
    folder, cache = tmp_path / "base", tmp_path / "cache"
    shutil.copytree(tiny_llama, folder)
    checkpoint, file = find_checkpoint(str(folder)), folder / "model.safetensors"
    whole = fingerprint(checkpoint, cache)
    plain = hashlib.sha256((folder / "config.json").read_bytes())
    plain.update(f"model.safetensors:{hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
    assert whole == f"sha256:{plain.hexdigest()}", "as every run before recorded it"
    os.utime(file)
    assert fingerprint(checkpoint, cache) == whole
    assert not caplog.records
    changed(file)
    now = fingerprint(checkpoint, cache)
    assert now != whole
    assert f"{file} changed, although its size and modification time did not" in caplog.text
    changed(file)
    assert fingerprint(checkpoint, cache) == whole
    changed(file)
    believed(file, cache)
    assert fingerprint(checkpoint, cache) == whole, "the note is believed where nothing depends on it"
    assert fingerprint(checkpoint, cache, prove=True) == now
    assert fingerprint(checkpoint, cache) == now


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_weights_are_verified_when_they_are_read(tiny_llama, tmp_path, quantization) -> None:
    folder, cache = tmp_path / "base", tmp_path / "cache"
    shutil.copytree(tiny_llama, folder)
    options = ModelOptions(path=str(folder), quantization=quantization)
    whole = load_base(find_checkpoint(str(folder)), options, torch.float32, CPU, cache)
    changed(folder / "model.safetensors")
    believed(folder / "model.safetensors", cache)
    if quantization == "nf4":
        assert load_base(find_checkpoint(str(folder)), options, torch.float32, CPU, cache).bits == whole.bits
        shutil.rmtree(cache / "base")
    now = load_base(find_checkpoint(str(folder)), options, torch.float32, CPU, cache)
    assert now.fingerprint != whole.fingerprint


@pytest.mark.parametrize("rots", [False, True])
def test_export_and_resume_refuse_a_base_whose_bytes_changed(place, rots) -> None:
    changed(place / "base" / "model.safetensors")
    if rots:
        believed(place / "base" / "model.safetensors", place / "cache")
    said = nybble("export", place / "run", "--to", "merged", cache=place / "cache")
    print(said.text)
    assert said.status == 1
    assert "this is not the base that the adapter was trained on: sha256:" in " ".join(said.text.split())
    changed(place / "base" / "model.safetensors")
    assert nybble("export", place / "run", "--to", "adapter", cache=place / "cache").status == 0
    changed(place / "base" / "model.safetensors")
    if rots:
        believed(place / "base" / "model.safetensors", place / "cache")
    shutil.rmtree(place / "run" / "adapter")
    said = nybble("train", "--resume", place / "run", cache=place / "cache")
    print(said.text)
    assert said.status == 1
    assert "base: 'sha256:" in " ".join(said.text.split())


def test_a_file_of_the_hub_is_compared_with_the_digest_in_its_name(tiny_llama, tmp_path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    shutil.copytree(tiny_llama, folder)
    blobs.mkdir()
    file = folder / "model.safetensors"
    blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
    file.rename(blob)
    file.symlink_to(blob)
    checkpoint = Checkpoint("owner/name", folder, "1", json.loads((folder / "config.json").read_text()))
    for prove in (True, True):
        assert fingerprint(checkpoint, tmp_path / "cache", prove=prove) == "owner/name@1"
    changed(blob)
    assert fingerprint(checkpoint, tmp_path / "cache") == "owner/name@1"
    with pytest.raises(ModelError) as caught:
        fingerprint(checkpoint, tmp_path / "cache", prove=True)
    print(caught.value)
    assert "model.safetensors is damaged: its SHA-256 is" in caught.value.what
    assert caught.value.fix == f"rm {file} {blob}, and run the command again: it downloads the file"
