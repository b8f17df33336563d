"""The register of what is relied upon in libraries without their promise, held against them and against the source."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import re
import sys
import tomllib

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from nybble.couplings import check
from nybble.couplings.check import first_incompatibility, is_tested, missing_symbols, resolve
from nybble.couplings.coupling import AT_START, BY_TESTS, TESTED, Coupling
from nybble.couplings.table import COUPLINGS
from nybble.errors import EngineError, ModelError, ServeError, TrainingError
from tests.conftest import ROOT

SOURCE = ROOT / "src" / "nybble"
REGISTER = SOURCE / "couplings"
OWN = {"nybble", *sys.stdlib_module_names}
FIELDS_OF_ROWS = {"_id"}  # what data sets call a column
PRIVATE = re.compile(r"_[a-zA-Z]\w*")  # not __dunder__, and not the name _ alone


def named(coupling: Coupling) -> str:
    return coupling.name


def module_of(symbol: str) -> str:
    return symbol.partition(":")[0].split(".")[0]


def is_there(coupling: Coupling) -> bool:
    return all(importlib.util.find_spec(module_of(symbol)) for symbol in coupling.symbols)


# The register against the libraries.


@pytest.mark.parametrize("coupling", COUPLINGS, ids=named)
def test_every_symbol_of_the_register_exists(coupling):
    if not is_there(coupling):
        pytest.skip(f"{coupling.library} is not installed")
    assert not list(missing_symbols(coupling))
    for symbol in coupling.symbols:
        if "#" in symbol:
            owner, _, attribute = symbol.partition("#")
            assert sets(resolve(owner), attribute), symbol


def sets(kind: type, attribute: str) -> bool:
    """Whether a class's instances have an attribute: of the class, a field, or set by one of its methods."""
    attribute = attribute.removeprefix(f"_{kind.__name__}")  # as Python hides a name with two underscores
    if hasattr(kind, attribute) or attribute in getattr(kind, "__annotations__", {}):
        return True
    pattern = re.compile(rf"(\w+\.|_buffer\(\"|__dict__\[['\"]|super\(\)\.__setattr__\(['\"]){attribute}\b")
    return any(pattern.search(inspect.getsource(base)) for base in kind.__mro__[:-1])


ROWS, BOUNDS = "query key value", "cum_seq_q cum_seq_k max_q max_k dropout_p is_causal"
KERNELS = {
    "_scaled_dot_product_flash_attention_for_cpu": (f"{ROWS} dropout_p is_causal", 2),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (f"grad_out {ROWS} out logsumexp dropout_p is_causal", 3),
    "_scaled_dot_product_cudnn_attention": (f"{ROWS} attn_bias compute_log_sumexp dropout_p is_causal", 9),
    "_scaled_dot_product_cudnn_attention_backward": (
        f"grad_out {ROWS} out logsumexp philox_seed philox_offset attn_bias {BOUNDS}", 3),
    "_flash_attention_forward": (f"{ROWS} {BOUNDS} return_debug_mask", 5),
    "_flash_attention_backward": (f"grad_out {ROWS} out logsumexp {BOUNDS} rng_state unused", 3),
    "_efficient_attention_forward": (
        f"{ROWS} bias cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p custom_mask_type compute_log_sumexp", 6),
    "_efficient_attention_backward": (
        f"grad_out_ {ROWS} bias out cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k logsumexp dropout_p philox_seed "
        "philox_offset custom_mask_type bias_requires_grad", 4),
}  # fmt: skip
"""Attention's kernels: the arguments that they are given in order, and how many results they have."""


@pytest.mark.parametrize("name", KERNELS)
def test_arguments_of_attentions_kernels(name):
    given, results = KERNELS[name]
    schema = getattr(torch.ops.aten, name).default._schema
    names = [argument.name for argument in schema.arguments]
    assert names[: len(given.split())] == given.split()
    assert all(argument.has_default_value() for argument in schema.arguments[len(given.split()) :])
    assert len(schema.returns) == results


def test_the_versions_are_those_that_are_declared_and_pinned():
    """`make lock` brings new versions: hold them against the register, then enter them in it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [
        *project["dependencies"],
        *(line for lines in project["optional-dependencies"].values() for line in lines),
    ]
    windows = {found.name: found.specifier for found in map(Requirement, declared)}
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.M))
    assert {coupling.library for coupling in COUPLINGS} == TESTED.keys()
    for library, (low, high) in TESTED.items():
        assert pins[library] == high, library
        if library in windows:  # tokenizers comes with transformers
            assert any(each.operator == ">=" and Version(each.version) == Version(low) for each in windows[library]), (
                library
            )


# The register against the source.


@pytest.mark.parametrize("coupling", COUPLINGS, ids=named)
def test_each_file_mentions_its_symbols(coupling):
    texts = coupling.written or tuple(re.split(r"[:.#]", symbol)[-1] for symbol in coupling.symbols)
    contents = {file: (SOURCE / file).read_text() for file in coupling.files}
    for file, content in contents.items():
        assert any(text in content for text in texts), f"{file} mentions none of {texts}"
    unused = [text for text in texts if not any(text in content for content in contents.values())]
    assert not unused, f"nobody mentions {unused}"


def test_names_are_unique():
    assert len({coupling.name for coupling in COUPLINGS}) == len(COUPLINGS)


def test_nothing_private_is_used_without_an_entry():
    own = own_names()
    found, missing = set(), []
    for file in sorted(SOURCE.rglob("*.py")):
        if file.is_relative_to(REGISTER):
            continue
        path = file.relative_to(SOURCE).as_posix()
        known = {
            part for each in COUPLINGS if path in each.files for text in (*each.symbols, *each.written)
            for part in PRIVATE.findall(text)
        }  # fmt: skip
        for name, line in foreign_names(ast.parse(file.read_text()), own):
            found.add(name)
            if name not in known | FIELDS_OF_ROWS:
                missing.append(f"src/nybble/{path}:{line} uses {name}")
    assert not missing, "enter these in a table of nybble/couplings:\n" + "\n".join(missing)
    assert {"_version", "_run_epoch", "_prepare_inputs", "_compile_jinja_template", "_active_adapter"} <= found


def test_the_search_finds_each_kind_of_use():
    text = """
from torch import _C as hidden
import transformers._private
from transformers import Trainer
class Own(Trainer):
    def _clip_grad_norm(self): return self._prepare_inputs({})
    def _mine(self): return self._mine
def use(module):
    getattr(module, "_hidden"); module._attribute; module._own
    super()._run_epoch()
"""
    found = {name for name, _ in foreign_names(ast.parse(text), {"_own", "_mine"})}
    assert found == {"_C", "_private", "_clip_grad_norm", "_prepare_inputs", "_hidden", "_attribute", "_run_epoch"}


def own_names() -> set[str]:
    """Private names that nybble defines: functions, classes, constants, attributes, fields, parameters."""
    found = set()
    for file in SOURCE.rglob("*.py"):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                    found.add(node.name)
                case ast.Name(id=name, ctx=ast.Store()):
                    found.add(name)
                case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                    found.add(name)
    return found


def foreign_names(tree: ast.Module, own: set[str]):
    """Private names of libraries that a file uses, with their lines."""
    homes = imported(tree)
    parts_of_texts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if id(node) in parts_of_texts:
            continue
        match node:
            case ast.Import(names=names):
                yield from (
                    (part, node.lineno) for each in names for part in each.name.split(".") if PRIVATE.fullmatch(part)
                )
            case ast.ImportFrom(module=str(module), names=names) if module.split(".")[0] not in OWN:
                parts = [*module.split("."), *(each.name for each in names)]
                yield from ((part, node.lineno) for part in parts if PRIVATE.fullmatch(part))
            case ast.Attribute(attr=name, value=value) if PRIVATE.fullmatch(name):
                is_super = isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "super"
                is_known = isinstance(value, ast.Name) and value.id in {"self", "cls", *sys.stdlib_module_names}
                if is_super or (not is_known and name not in own):
                    yield name, node.lineno
            case ast.Constant(value=str(name)) if PRIVATE.fullmatch(name) and name not in own:
                yield name, node.lineno
            case ast.ClassDef(bases=bases):
                yield from overridden(node, [kind for base in bases if (kind := class_of(base, homes)) is not None])


def overridden(node: ast.ClassDef, bases: list[type]):
    """Private names of a foreign base class that a class defines or asks itself for."""
    for inner in ast.walk(node):
        match inner:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                used = name
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                used = name
            case _:
                continue
        if PRIVATE.fullmatch(used) and any(hasattr(base, used) for base in bases):
            yield used, inner.lineno


def imported(tree: ast.Module) -> dict[str, str]:
    """What each imported name of a file stands for, as `module:name`; of libraries only."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] not in OWN:
            found |= {each.asname or each.name: f"{node.module}:{each.name}" for each in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                each.asname or each.name: f"{each.name}:" for each in node.names if each.name.split(".")[0] not in OWN
            }
    return found


def class_of(base: ast.expr, homes: dict[str, str]) -> type | None:
    """The foreign class that an expression names; None where it is nybble's own, or its library is not installed."""
    first, _, rest = ast.unparse(base).partition(".")
    if first not in homes:
        return None
    module, _, path = homes[first].partition(":")
    try:
        start = importlib.import_module(module)
        return functools.reduce(getattr, filter(None, [*path.split("."), *rest.split(".")]), start)
    except (ImportError, AttributeError):
        return None


# The guards.


def test_a_missing_symbol_stops_with_the_versions(monkeypatch):
    assert first_incompatibility("engine", "weights", "training", "model", "data", "serve") is None
    gone = Coupling("a test", "torch", ("torch:Tensor._gone",), ("engine/x.py",), "numbers would be wrong", AT_START)
    changed = dataclasses.replace(gone, symbols=("torch.nn:Module._apply",), parameters=("self", "recurse", "fn"))
    for coupling, lack in ((gone, "torch.Tensor._gone"), (changed, "torch.nn.Module._apply with fn")):
        monkeypatch.setattr(check, "COUPLINGS", (coupling,))
        found = first_incompatibility("engine")
        assert found is not None
        assert f"has no {lack}, which nybble uses (tested with 2.11 to 2.13.0): numbers would be wrong" in found.what
        assert found.requirement == "'torch>=2.11,<=2.13.0'"
        assert first_incompatibility("serve") is None


def test_couplings_with_other_guards_do_not_stop(monkeypatch):
    elsewhere = Coupling("a test", "torch", ("torch:Tensor._gone",), ("engine/x.py",), "a tracker's key", BY_TESTS)
    monkeypatch.setattr(check, "COUPLINGS", (elsewhere,))
    assert first_incompatibility("engine") is None


@pytest.mark.parametrize("room, error", [
    ("engine", EngineError), ("model", ModelError), ("training", TrainingError), ("serve", ServeError),
])  # fmt: skip
def test_a_command_says_what_to_install(room, error, monkeypatch, tiny_llama, rows, quiet, tmp_path):
    gone = Coupling("a test", "torch", ("torch:Tensor._gone",), (f"{room}/x.py",), "numbers would be wrong", AT_START)
    monkeypatch.setattr(check, "COUPLINGS", (gone,))
    with pytest.raises(error, match=r"has no torch\.Tensor\._gone") as caught:
        START[room](tiny_llama, rows, quiet, tmp_path)
    assert "install 'torch>=2.11,<=2.13.0'" in str(caught.value)
    assert not list(tmp_path.glob("run*"))


def begin_training(model, rows, quiet, tmp_path):
    from nybble.recipe import load_recipe
    from nybble.training.train import train

    words = [f"model.path={model}", f"data.path={rows}", f"out={tmp_path / 'run'}", "model.device=cpu"]
    train(load_recipe(None, words), console=quiet, cache=tmp_path / "cache")


def begin_fusing(model, rows, quiet, tmp_path):
    import nybble

    nybble.fuse(torch.nn.Linear(2, 2))


def begin_serving(model, rows, quiet, tmp_path):
    from nybble.serve.metrics import Metrics
    from nybble.serve.server import load_engine

    load_engine("pipeline", [], Metrics(), device="cpu", queue=1)


def begin_loading(model, rows, quiet, tmp_path):
    from nybble.model.base.checkpoint import find_checkpoint
    from nybble.model.base.load import load_base
    from nybble.recipe import ModelOptions

    load_base(find_checkpoint(str(model)), ModelOptions(), torch.float32, torch.device("cpu"), tmp_path / "cache")


START = {"training": begin_training, "engine": begin_fusing, "serve": begin_serving, "model": begin_loading}


@pytest.mark.parametrize("installed, expected", [
    ("3.5.1", False), ("3.6.0", True), ("3.7.1", True), ("3.7.9", True), ("3.8.0", False), (None, False),
])  # fmt: skip
def test_which_versions_are_tested(installed, expected, monkeypatch):
    def version(library: str) -> str:
        if installed is None:
            raise check.PackageNotFoundError(library)
        return installed

    monkeypatch.setattr(check, "version", version)
    is_tested.cache_clear()
    assert is_tested("triton") is expected
    monkeypatch.undo()
    is_tested.cache_clear()


@pytest.mark.parametrize("tested", [True, False])
def test_an_untested_version_of_triton_launches_kernels_in_the_ordinary_way(tested, monkeypatch):
    launch = pytest.importorskip("nybble.kernels.triton.launch")
    ran = []

    class Compiled:
        function, packed_metadata = 7, "metadata"

        @staticmethod
        def run(*arguments):
            ran.append(("own end", arguments))

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: ran.append(("Triton's way", arguments)) or Compiled

    class Driver:
        class active:  # noqa: N801 - Triton's name
            get_current_device = staticmethod(lambda: 0)
            get_current_stream = staticmethod(lambda device: 5)

    monkeypatch.setattr(launch, "is_tested", lambda library: tested)
    monkeypatch.setattr(launch, "driver", Driver)
    launcher = launch.Launcher(Kernel())
    tensor = torch.zeros(1)
    launcher((2,), tensor, 2)
    launcher((2,), tensor, 2)
    assert ran[0] == ("Triton's way", (tensor, 2))
    assert ran[1] == (("own end", (2, 1, 1, 5, 7, "metadata", None, None, None, tensor, 2)) if tested else ran[0])


def test_a_kernel_is_launched_on_the_device_of_its_first_tensor(monkeypatch):
    launch = pytest.importorskip("nybble.kernels.triton.launch")
    current, ran = [0], []

    class Elsewhere:
        get_device = staticmethod(lambda: 1)

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: ran.append(current[0])

    @contextlib.contextmanager
    def device(index):
        current[0] = index
        yield
        current[0] = 0

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    launch.Launcher(Kernel())((2,), Elsewhere(), 3)
    assert (ran, current) == ([1], [0])


@pytest.fixture
def quantised():
    """A LoRA layer on a 4-bit one, whole."""
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig, inject_adapter_in_model

    model = torch.nn.Sequential(Linear4bit(64, 64, bias=False, quant_type="nf4")).to("cpu")
    return inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), model)[0]


@pytest.mark.parametrize("name", ["_disable_adapters", "merged_adapters", "lora_variant", "lora_B"])
def test_a_lora_layer_without_an_attribute_is_an_error(name, quantised):
    from nybble.weights.structure import check_lora

    check_lora(quantised)
    del (quantised._modules if name.startswith("lora_B") else quantised.__dict__)[name]
    with pytest.raises(EngineError, match=rf"of peft \S+ has no {name}, .*tested with 0\.21 to 0\.21\.2") as caught:
        check_lora(quantised)
    assert "install 'peft>=0.21,<=0.21.2'" in str(caught.value)


def test_a_quantised_weight_without_an_attribute_is_an_error(quantised):
    from nybble.weights.structure import check_state

    state = quantised.base_layer.weight.quant_state
    check_state(state)
    del state.offset
    with pytest.raises(EngineError, match=r"of bitsandbytes \S+ has no offset"):
        check_state(state)


@pytest.mark.parametrize("name", ["compute_dtype", "quant_state"])
def test_a_4_bit_layer_without_an_attribute_is_an_error(name, quantised):
    from nybble.weights.structure import check_quantised

    layer = quantised.base_layer
    check_quantised(layer, layer.weight)
    del (layer if name == "compute_dtype" else layer.weight).__dict__[name]
    with pytest.raises(EngineError, match=rf"4-bit layer of bitsandbytes \S+ has no {name}"):
        check_quantised(layer, layer.weight)


def test_the_setting_against_repacking_must_exist(quantised):
    from nybble.weights.on_cpu import stay_unpacked

    stay_unpacked(quantised)
    del quantised.base_layer.support_avx512bf16_for_cpu
    with pytest.raises(EngineError, match=r"4-bit layer of bitsandbytes .* has no support_avx512bf16_for_cpu"):
        stay_unpacked(quantised)


def test_the_engine_stops_at_a_layer_without_an_attribute():
    """Through `nybble.fuse`: not a notice that a layer is passed over, and not an AttributeError."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    import nybble

    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj"]))
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    layer.is_switched_off = layer.__dict__.pop("_disable_adapters")
    with pytest.raises(EngineError, match=r"LoRA layer of peft .* has no _disable_adapters"):
        nybble.fuse(model)
