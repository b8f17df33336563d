"""Which files are a model's weights, and what Transformers' own report of a loading says."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from nybble.errors import ModelError
from nybble.model.base.checkpoint import find_checkpoint, fingerprint
from nybble.model.base.files import weight_files
from nybble.model.base.load import _read, load_config
from nybble.model.tokenizer.files import FILES
from nybble.model.tokenizer.load import load_tokenizer
from tests.conftest import write_llama
from tests.corpus.models import BIN, HEAD, INDEX, UP, WEIGHTS, altered, config, listens, sharded, tied, with_, without

CPU = torch.device("cpu")
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture
def folder(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "model")


@contextlib.contextmanager
def as_nobody():
    """Root may read everything: another user for a moment."""
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(mine)


def names(folder):
    return [file.name for file in weight_files(folder)]


def loaded(folder):
    """The numbers that Transformers loads."""
    with contextlib.suppress(FileNotFoundError):
        (folder / "adapter_config.json").unlink()
    model = _read(folder, load_config(find_checkpoint(str(folder)), None), None, torch.float32, CPU)
    return model.state_dict()


def test_what_is_hashed_is_what_is_loaded_in_transformers_own_order(folder, tmp_path):
    """One file before shards, safetensors before torch.save, shards by their index: each is taken away in its turn."""
    whole = load_file(folder / WEIGHTS)
    sharded()(folder)
    for file in [*SHARDS, INDEX]:
        shutil.copy(folder / file, tmp_path)
    torch.save({name: tensor + 3 for name, tensor in whole.items()}, folder / BIN)
    save_file({name: tensor + 1 for name, tensor in whole.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    for file in (WEIGHTS.replace("model", "consolidated"), "adapter_model.safetensors", "model.fp16.safetensors"):
        (folder / file).write_bytes(b"of another program")
    for expected, added in ([WEIGHTS], 1), (SHARDS, 0), ([BIN], 3):
        assert names(folder) == expected
        torch.testing.assert_close(loaded(folder)[UP], whole[UP] + added)
        for file in [*expected, INDEX] if expected == SHARDS else expected:
            (folder / file).unlink()
    assert names(folder) == []


def test_the_fingerprint_of_an_ordinary_folder_is_as_it_was_in_0_5_1(folder, tmp_path):
    """One file, or shards with their index, and nothing beside them: runs that recorded it go on."""

    def as_it_was():
        digest = hashlib.sha256((folder / "config.json").read_bytes())
        for file in sorted(folder.glob("*.safetensors")):
            digest.update(f"{file.name}:{hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
        return f"sha256:{digest.hexdigest()}"

    for change in (lambda folder: None, sharded()):
        change(folder)
        before = fingerprint(find_checkpoint(str(folder)), tmp_path)
        assert before == as_it_was()
        (folder / "consolidated.safetensors").write_bytes(b"never loaded")
        assert fingerprint(find_checkpoint(str(folder)), tmp_path) == before
        (folder / "consolidated.safetensors").unlink()


def test_what_a_link_leads_to_is_hashed(folder, tmp_path):
    """As in the Hub's cache; only the name must lie in the folder."""
    before = fingerprint(find_checkpoint(str(folder)), tmp_path)
    (folder / WEIGHTS).rename(tmp_path / "blob")
    (folder / WEIGHTS).symlink_to(tmp_path / "blob")
    assert fingerprint(find_checkpoint(str(folder)), tmp_path) == before
    altered(UP, lambda held: held + 1)(folder)
    assert fingerprint(find_checkpoint(str(folder)), tmp_path) != before


def test_an_index_that_leaves_the_folder_is_refused_before_anything_is_hashed(folder, tmp_path):
    sharded()(folder)
    (folder / SHARDS[0]).rename(tmp_path / "outside.safetensors")
    places = json.loads((folder / INDEX).read_text())
    places["weight_map"] = {
        name: "../outside.safetensors" if file == SHARDS[0] else file for name, file in places["weight_map"].items()
    }
    (folder / INDEX).write_text(json.dumps(places))
    with pytest.raises(ModelError) as caught:
        weight_files(folder)
    print(caught.value)
    assert "'../outside.safetensors', which is not a .safetensors file in this folder" in caught.value.what


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(HEAD), "there is no lm_head.weight"),
        (with_(score__weight=torch.zeros(2, 64)), "the files contain score.weight, which the model of config.json"),
        (altered(UP, torch.t), "mlp.up_proj.weight is 64 x 128 in the file, but 128 x 64 according to config.json"),
        (config(num_hidden_layers=1), "the files contain model.layers.1."),
        (tied(), None),
        (with_(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8)), None),
    ],
    ids=["missing", "foreign", "another shape", "more layers", "tied", "old buffer"],
)
def test_transformers_own_report_is_read_whole(folder, change, message):
    """Whatever the headers said before: the report is of the model as it was built."""
    change(folder)
    settings = load_config(find_checkpoint(str(folder)), None)
    if message is None:
        assert _read(folder, settings, None, torch.float32, CPU) is not None
        return
    with pytest.raises(ModelError) as caught:
        _read(folder, settings, None, torch.float32, CPU)
    print(caught.value)
    assert message in caught.value.what


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "device", "link to nothing"])
def test_a_special_file_instead_of_a_tokenizer_is_refused(folder, name, kind):
    """A pipe would be waited for without end."""
    file = folder / name
    file.unlink(missing_ok=True)
    make = {
        "pipe": os.mkfifo,
        "folder": os.mkdir,
        "socket": listens,
        "device": lambda file: file.symlink_to("/dev/zero"),
    }
    make.get(kind, lambda file: file.symlink_to("nothing"))(file)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(folder)
    print(caught.value)
    assert f"{name} is a {kind}" in caught.value.what
    assert caught.value.where == str(file)
    assert caught.value.fix


def test_what_cannot_be_read_is_named(tiny_llama):
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to others
        pathlib.Path(place).chmod(0o755)
        folder = shutil.copytree(tiny_llama, pathlib.Path(place) / "model")
        folder.chmod(0o755)
        for closed, message in (
            (folder / "config.json", "config.json cannot be read: Permission denied"),
            (folder, "the model's folder cannot be read: Permission denied"),
        ):
            closed.chmod(0)
            with as_nobody(), pytest.raises(ModelError) as caught:
                find_checkpoint(str(folder))
            closed.chmod(0o755)
            print(caught.value)
            assert caught.value.what == message
            assert caught.value.where == str(closed)


def test_an_impossible_file_name_gives_a_message():
    with pytest.raises(ModelError, match="the model's folder cannot be read: File name too long"):
        find_checkpoint("a" * 300)


def test_an_integer_weight_is_reported_in_either_format(tmp_path):
    """torch's names and safetensors' of the same types."""
    folder = write_llama(tmp_path / "model", dtype=torch.bfloat16, safe=False)
    state = torch.load(folder / BIN)
    state[UP] = state[UP].to(torch.int16)
    torch.save(state, folder / BIN)
    from nybble.model.base.soundness import check_tensors

    checkpoint = find_checkpoint(str(folder))
    with pytest.raises(ModelError, match="is stored as int16, not as F32, F16 or BF16"):
        check_tensors(folder, load_config(checkpoint, None), is_quantized=False)
