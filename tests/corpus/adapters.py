"""Adapters that are damaged, odd or of another kind, each made from a good one: q, v and down of two layers, r 4, alpha 6."""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import struct
from collections.abc import Callable

import torch
from safetensors.torch import load_file, save_file

from tests.corpus.cases import Case

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model.model.layers"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{7:064}\nsize 20277\n"
State = dict[str, torch.Tensor]
Make = Callable[[pathlib.Path], object]
GOOD = "6 LoRA modules, all non-zero"


def at(layer: int, module: str, part: str) -> str:
    """The name of a tensor in the file."""
    return f"{PREFIX}.{layer}.{module}.lora_{part}.weight"


Q0A, Q0B, Q1A, Q1B = (at(layer, "self_attn.q_proj", part) for layer in (0, 1) for part in "AB")
DOWN = at(1, "mlp.down_proj", "B")


def config(**changes: object) -> Make:
    """Fields set; `...` removes one."""

    def make(folder: pathlib.Path) -> None:
        fields = {**json.loads((folder / CONFIG).read_text()), **changes}
        (folder / CONFIG).write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))

    return make


def written(name: str, content: bytes | str) -> Make:
    """A file of this content."""
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw)


def tensors(change: Callable[[State], State]) -> Make:
    """The tensors changed."""

    def make(folder: pathlib.Path) -> None:
        state = {name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}
        save_file({name: tensor.contiguous() for name, tensor in change(state).items()}, folder / TENSORS)

    return make


def only(test: Callable[[str], bool]) -> Make:
    """Those tensors whose names pass."""
    return tensors(lambda state: {name: tensor for name, tensor in state.items() if test(name)})


def one(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Make:
    """One tensor changed."""
    return tensors(lambda state: {**state, name: change(state[name])})


def each(change: Callable[[torch.Tensor], torch.Tensor]) -> Make:
    """Every tensor changed."""
    return tensors(lambda state: {name: change(tensor) for name, tensor in state.items()})


def also(**more: torch.Tensor) -> Make:
    """More tensors, under names with / for dots."""
    return tensors(lambda state: {**state, **{name.replace("/", "."): tensor for name, tensor in more.items()}})


def renamed(old: str, new: str) -> Make:
    """Part of each name replaced."""
    return tensors(lambda state: {name.replace(old, new): tensor for name, tensor in state.items()})


def both(*makes: Make) -> Make:
    """One damage after another."""

    def make(folder: pathlib.Path) -> None:
        for each_make in makes:
            each_make(folder)

    return make


def raw(change: Callable[[bytes], bytes], name: str = TENSORS) -> Make:
    """A file's bytes changed."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def header(change: Callable[[dict], object]) -> Make:
    """The header of the safetensors file changed, its tensors left where they are."""

    def cut(content: bytes) -> bytes:
        length = struct.unpack("<Q", content[:8])[0]
        entries = json.loads(content[8 : 8 + length])
        text = json.dumps(change(entries) or entries).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return raw(cut)


def entry(name: str, **changes: object) -> Make:
    """Fields of one tensor in the header."""
    return header(lambda entries: entries[name].update(changes))


def as_pickle(change: Callable[[State], object] = lambda state: state, **how: object) -> Make:
    """adapter_model.bin in place of safetensors, of what `change` makes of the tensors."""

    def make(folder: pathlib.Path) -> None:
        state = load_file(folder / TENSORS)
        (folder / TENSORS).unlink()
        torch.save(change({name: tensor.clone() for name, tensor in state.items()}), folder / PICKLE, **how)

    return make


class Runs:
    """What runs a command where pickles are loaded with trust."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/nybble-was-here",)


def instead(name: str, put: Callable[[pathlib.Path], object]) -> Make:
    """Something else in the place of a file."""

    def make(folder: pathlib.Path) -> None:
        (folder / name).unlink()
        put(folder / name)

    return make


def tidy(name: str) -> Make:
    """A file removed."""
    return lambda folder: (folder / name).unlink()


def refused(name: str, make: Make, *names: str) -> Case:
    """An adapter that is not loaded."""
    return Case(name, make, 1, names)


def taken(name: str, make: Make, *names: str) -> Case:
    """An adapter that is loaded, with what is told of it."""
    return Case(name, make, 0, names or (GOOD,))


def fields(name: str, *values: object, said: str) -> list[Case]:
    """One field of the configuration with values that cannot be right."""
    return [
        refused(f"{name} {type(value).__name__} {str(value)[:24]}", config(**{name: value}), name, said, CONFIG)
        for value in values
    ]


NAN, INF = float("nan"), float("inf")
EYE = torch.eye(4)
FIELDS = [
    *fields("r", "16", 0, -4, 2.5, None, True, [8], 10**9, 10**400, said="a whole number from 1"),
    *fields("lora_alpha", "16", NAN, INF, None, False, {}, 1e300, said="a number"),
    *fields("lora_dropout", 2, -0.1, "0.1", NAN, None, said="a number from 0 to 1"),
    *fields("use_rslora", "false", 1, None, said="true or false"),
    *fields("use_dora", "no", 0, said="true or false"),
    *fields("lora_bias", "none", said="true or false"),
    *fields("fan_in_fan_out", "x", said="true or false"),
    *fields("bias", "some", True, None, said="none, all or lora_only"),
    *fields("target_modules", [], "", 3, {"q_proj": 1}, ["q_proj", 2], True, said="a list of names"),
    *fields("exclude_modules", 3, [None], said="a list of names"),
    *fields("modules_to_save", "lm_head", {"lm_head": 1}, [3], said="a list of names"),
    *fields("layers_to_transform", "0", [-1], [0.5], said="a layer's number"),
    *fields("layers_pattern", 4, said="a list of names"),
    *fields("rank_pattern", ["q_proj"], {"q_proj": "4"}, {"q_proj": 0}, said="an object of whole numbers"),
    *fields("alpha_pattern", 3, {"q_proj": NAN}, {"q_proj": "x"}, said="an object of numbers"),
    *fields("trainable_token_indices", "3", [-1], ["3"], {"embed_tokens": 3}, said="a list of token ids"),
    *fields("base_model_name_or_path", 3, ["x"], said="base_model_name_or_path is"),
    *fields("target_modules", "(", "*q", "q_proj(?P<", "[z-a]", "(a{1,99999999999})", said="regular expression"),
    *fields("exclude_modules", "(?P<a>x)(?P<a>y)", said="regular expression"),
    *fields("rank_pattern", {"(": 4}, said="regular expression"),
    *fields("alpha_pattern", {"[": 4}, said="regular expression"),
    *fields("layers_pattern", "(", said="regular expression"),
]
EXPLODES = r"(\w+\.?)+!"  # its time doubles with each letter
PATTERNS = [
    refused(f"{field} explodes", config(**{field: value}), f"{field} contains a regular expression", "still running")
    for field, value in (
        ("target_modules", EXPLODES),
        ("exclude_modules", EXPLODES),
        ("modules_to_save", [EXPLODES]),
        ("rank_pattern", {EXPLODES: 4}),
        ("alpha_pattern", {EXPLODES: 4}),
    )
]
KINDS = [
    refused("no kind", config(peft_type=...), "no peft_type"),
    refused("kind null", config(peft_type=None), "no peft_type"),
    *(
        refused(f"kind {kind}", config(peft_type=kind), "the adapter is", str(kind), "not LORA")
        for kind in ("IA3", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "ADALORA", "LOHA", "OFT", "lora", 7)
    ),
    refused("a list as kind", config(peft_type=["LORA"]), "the adapter is"),
    refused("a classifier", config(task_type="SEQ_CLS"), "SEQ_CLS", "CAUSAL_LM"),
    refused("task unknown", config(task_type="POETRY"), "POETRY"),
    *(
        refused(f"start {start}", config(init_lora_weights=start), name, "changes the base")
        for start, name in (
            ("pissa", "PiSSA"),
            ("pissa_niter_4", "PiSSA"),
            ("loftq", "LoftQ"),
            ("olora", "OLoRA"),
            ("corda", "CorDA"),
            ("lora_ga", "LoRA-GA"),
        )
    ),
    refused("start unknown", config(init_lora_weights="magic"), "magic", "does not support"),
    refused("start a list", config(init_lora_weights=["pissa"]), "init_lora_weights"),
    refused("layers repeated", config(layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    refused("aLoRA", config(alora_invocation_tokens=[5, 6]), "alora_invocation_tokens"),
    refused("BD-LoRA", config(use_bdlora={"nblocks": 2}), "use_bdlora"),
    refused("KaSA", config(kasa_config={"beta": 1}), "kasa_config"),
    refused("QALoRA", config(use_qalora=True), "use_qalora"),
    refused("parameters as targets", config(target_parameters=["self_attn.q_proj.weight"]), "target_parameters"),
    refused("a module to import", config(megatron_config={"x": 1}, megatron_core="antigravity"), "megatron_config"),
    taken("megatron's name alone", config(megatron_core="antigravity")),
    taken("start by EVA", config(init_lora_weights="eva", eva_config={"rho": 2.0})),
    taken("start orthogonal", config(init_lora_weights="orthogonal")),
    taken("LoftQ's settings without it", config(loftq_config={"loftq_bits": 4})),
    taken("fields of a later PEFT", config(shiny=3, shinier={"a": [1]}, peft_version="9.9.9"), GOOD, "shinier, shiny"),
    taken("fields of a later PEFT at rest", config(shiny=None, shinier={}, dull=False)),
    taken("auto_mapping", config(auto_mapping={"base_model_class": "X", "parent_library": "os"})),
    taken("runtime_config", config(runtime_config={"ephemeral_gpu_offload": True})),
    taken("fan in, fan out", config(fan_in_fan_out=True)),
    taken("no task", config(task_type=None)),
    taken("base unknown", config(base_model_name_or_path=None)),
]
WRITING = [
    refused("config missing", tidy(CONFIG), CONFIG),
    refused("config empty", written(CONFIG, ""), CONFIG),
    refused(
        "config cut off", raw(lambda text: text[: len(text) // 2], CONFIG), f"{CONFIG} is not valid JSON", f"{CONFIG}:"
    ),
    refused("config zeros", raw(lambda text: bytes(len(text)), CONFIG), CONFIG),
    refused("config binary", written(CONFIG, bytes(range(256))), CONFIG),
    refused("config UTF-16", raw(lambda text: text.decode().encode("utf-16"), CONFIG), "is not UTF-8"),
    refused("config Latin-1", written(CONFIG, '{"peft_type": "Löra"}'.encode("latin-1")), "is not UTF-8"),
    refused("config a list", written(CONFIG, "[1, 2]"), "not a JSON object"),
    refused("config a number", written(CONFIG, "3"), "not a JSON object"),
    refused("config null", written(CONFIG, "null"), "not a JSON object"),
    refused("config nested", written(CONFIG, "[" * 100_000), CONFIG),
    refused("config digits", written(CONFIG, '{"r": ' + "9" * 5000 + "}"), "digits"),
    refused("config a pointer", written(CONFIG, POINTER), "git-lfs pointer", "lfs pull"),
    refused("config a folder", instead(CONFIG, pathlib.Path.mkdir), f"{CONFIG} is a folder, not a file"),
    refused("config a pipe", instead(CONFIG, os.mkfifo), f"{CONFIG} is a pipe, not a file"),
    refused(
        "config a device",
        instead(CONFIG, lambda file: file.symlink_to("/dev/zero")),
        f"{CONFIG} is a device, not a file",
    ),
    refused("config a dead link", instead(CONFIG, lambda file: file.symlink_to("gone")), CONFIG),
    refused("config of nothing", written(CONFIG, "{}"), "no peft_type"),
]
FILES = [
    refused("tensors missing", tidy(TENSORS), "no adapter weights", TENSORS),
    refused("tensors empty", written(TENSORS, b""), f"{TENSORS} is empty"),
    refused("tensors a pointer", written(TENSORS, POINTER), "git-lfs pointer", "lfs pull"),
    refused("tensors a folder", instead(TENSORS, pathlib.Path.mkdir), TENSORS, "not a file"),
    refused("tensors a pipe", instead(TENSORS, os.mkfifo), TENSORS, "not a file"),
    refused("tensors a device", instead(TENSORS, lambda file: file.symlink_to("/dev/zero")), TENSORS, "not a file"),
    refused("tensors a dead link", instead(TENSORS, lambda file: file.symlink_to("gone")), TENSORS),
    refused("tensors cut off", raw(lambda content: content[: len(content) // 2]), TENSORS, "cut off"),
    refused("tensors cut in the header", raw(lambda content: content[:100]), TENSORS),
    refused("tensors of four bytes", raw(lambda content: content[:4]), TENSORS),
    refused("tensors too long", raw(lambda content: content + bytes(9)), TENSORS),
    refused("tensors HTML", written(TENSORS, "<!DOCTYPE html><title>404</title>" * 9), "not a safetensors file"),
    refused("tensors zeros", raw(lambda content: bytes(len(content))), TENSORS),
    refused("tensors a pickle by another name", lambda folder: torch.save({"x": EYE}, folder / TENSORS), TENSORS),
    refused("header beyond the file", raw(lambda content: struct.pack("<Q", 1 << 60) + content[8:]), TENSORS),
    refused("header not JSON", raw(lambda content: content[:8] + b"{" * 64 + content[72:]), TENSORS),
    refused("header nested", written(TENSORS, struct.pack("<Q", 5000) + b'{"a":' + b"[" * 4995), TENSORS),
    refused("header a list", header(lambda entries: [entries]), TENSORS),
    refused("header without tensors", written(TENSORS, struct.pack("<Q", 2) + b"{}"), "contains no tensors"),
    refused("offsets negative", entry(Q0A, data_offsets=[-4, 0]), TENSORS),
    refused("offsets huge", entry(Q0A, data_offsets=[1 << 62, (1 << 62) + 1024]), TENSORS),
    refused("offsets overlap", header(lambda e: e[Q0A].update(data_offsets=e[Q1A]["data_offsets"])), TENSORS),
    refused("offsets swapped", header(lambda e: e[Q0A]["data_offsets"].reverse()), TENSORS),
    refused("shape negative", entry(Q0A, shape=[-4, -64]), TENSORS),
    refused("shape too large", entry(Q0A, shape=[4, 65]), TENSORS),
    refused("type unknown", entry(Q0A, dtype="F33"), TENSORS),
    refused("pickle runs a command", as_pickle(lambda state: {**state, "x": Runs()}), PICKLE, "system", "refused"),
    refused("pickle of a model", as_pickle(lambda state: torch.nn.Linear(2, 2)), PICKLE, "torch.nn", "Linear"),
    refused("pickle plain", both(tidy(TENSORS), written(PICKLE, pickle.dumps({"a": 1}))), PICKLE),
    refused("pickle that runs, plain", both(tidy(TENSORS), written(PICKLE, pickle.dumps(Runs()))), PICKLE, "refused"),
    refused("pickle a list", as_pickle(lambda state: list(state.values())), PICKLE, "list"),
    refused("pickle a tensor", as_pickle(lambda state: state[Q0A]), PICKLE, "Tensor"),
    refused("pickle nested", as_pickle(lambda state: {"state_dict": state}), PICKLE, "state_dict", "dict"),
    refused("pickle with a text", as_pickle(lambda state: {**state, "author": "me"}), PICKLE, "author"),
    refused("pickle with a number as name", as_pickle(lambda state: {**state, 3: EYE}), PICKLE, "3"),
    refused("pickle sparse", as_pickle(lambda state: {**state, Q0A: state[Q0A].to_sparse()}), "q_proj.lora_A"),
    refused("pickle cut off", both(as_pickle(), raw(lambda content: content[:3000], PICKLE)), PICKLE),
    refused("pickle empty", both(as_pickle(), written(PICKLE, b"")), f"{PICKLE} is empty"),
    refused("pickle a pointer", both(as_pickle(), written(PICKLE, POINTER)), "git-lfs pointer"),
    refused("old pickle cut off", both(as_pickle(_use_new_zipfile_serialization=False),
                                       raw(lambda content: content[: len(content) // 2], PICKLE)), PICKLE),
    taken("a pickle", as_pickle()),
    taken("an old pickle", as_pickle(_use_new_zipfile_serialization=False)),
    taken("both files, the pickle damaged", written(PICKLE, b"junk")),
    refused("both files, safetensors damaged", both(lambda folder: torch.save(load_file(folder / TENSORS), folder / PICKLE),
                                                    written(TENSORS, b"junk")), TENSORS),
    taken("a note beside them", written("adapter_model.safetensors.bak", b"junk")),
]  # fmt: skip
PLACES = [
    refused("only A", only(lambda name: "lora_A" in name), "is missing model.layers.0.self_attn.q_proj.lora_B.weight", "5 more"),
    refused("only B", only(lambda name: "lora_B" in name), "is missing", "lora_A", "and 5 more"),
    refused("one layer", only(lambda name: "layers.0" in name), "is missing", "layers.1.", "and 5 more"),
    refused("one tensor gone", only(lambda name: name != Q1B), "is missing model.layers.1.self_attn.q_proj.lora_B.weight"),
    refused("one module gone", only(lambda name: "1.mlp.down_proj" not in name), "is missing", "layers.1.mlp.down_proj.lora_A"),
    refused("one tensor only", only(lambda name: name == Q0A), "is missing", "and 10 more"),
    refused("foreign names", renamed("base_model.model.", ""), "is missing", "contains model.layers.0", "has no place"),
    refused("names of no model", renamed("layers", "blocks"), "is missing", "blocks.0", "no place"),
    refused("names of another program", renamed("lora_A", "lora_down"), "lora_down", "no place"),
    refused("names with the adapter's", renamed("lora_A.weight", "lora_A.default.weight"), "lora_A.default", "no place"),
    refused("names in capitals", renamed("q_proj", "Q_PROJ"), "Q_PROJ", "no place"),
    refused("a layer too many", tensors(lambda state: {**state, **{name.replace("layers.1", "layers.2"): tensor.clone()
            for name, tensor in state.items() if "layers.1" in name}}), "contains model.layers.2.", "and 5 more", "--base PATH"),
    refused("a module too many", tensors(lambda state: {**state, **{name.replace("q_proj", "k_proj"): tensor.clone()
            for name, tensor in state.items() if "q_proj" in name}}), "k_proj", "no place"),
    refused("a stranger", tensors(lambda state: {**state, "hello": EYE}), "contains hello", "no place"),
    refused("a norm of the base", tensors(lambda state: {**state, "base_model.model.model.norm.weight": torch.ones(64)}),
            "contains model.norm.weight", "no place"),
    refused("a weight of the base", tensors(lambda state: {
        **state, f"{PREFIX}.0.self_attn.k_proj.weight": torch.ones(32, 64)}), "k_proj.weight", "no place"),
    refused("optimiser's state", tensors(lambda state: {**state, "exp_avg.0": EYE}), "exp_avg.0", "no place"),
    refused("target too few", config(target_modules=["q_proj", "v_proj"]), "down_proj", "no place"),
    refused("target too many", config(target_modules=["q_proj", "v_proj", "down_proj", "o_proj"]), "is missing", "o_proj"),
    refused("target of all", config(target_modules="all-linear"), "is missing", "and 15 more"),
    refused("target null", config(target_modules=None), "down_proj", "no place"),
    refused("target unknown", config(target_modules=["query_key_value"]), "query_key_value", "does not fit this base"),
    refused("target everything", config(target_modules=".*"), "Target module LlamaModel is not supported"),
    refused("target a norm", config(target_modules=["norm"]), "does not fit this base"),
    refused("target excluded", config(exclude_modules=["v_proj"]), "v_proj", "no place"),
    refused("layers chosen", config(layers_to_transform=[0]), "layers.1", "no place"),
    refused("layers that are not there", config(layers_to_transform=[7]), "does not fit this base"),
    refused("rank by pattern", config(rank_pattern={"q_proj": 8}), "q_proj", "has rank 4", "says 8"),
    refused("rank in the configuration", config(r=16), "has rank 4", "says 16", "and 11 more"),
    refused("rank beyond all layers", config(r=100_000), "100,000"),
    refused("rank beyond all layers by pattern", config(rank_pattern={"q_proj": 1_000_000}), "1,000,000"),
    refused("rank in the tensors", one(Q0A, lambda tensor: tensor[:2]), "q_proj.lora_A.weight has rank 2", "says 4"),
    refused("another width", one(Q0A, lambda tensor: tensor[:, :32]), "is 4 x 32 in the adapter, but 4 x 64 in the base"),
    refused("transposed", one(DOWN, lambda tensor: tensor.T), "down_proj.lora_B", "4 x 64", "64 x 4"),
    refused("all transposed", each(lambda tensor: tensor.T), "in the base", "and 11 more"),
    refused("flat", one(Q0A, torch.flatten), "is 256 in the adapter"),
    refused("a third axis", one(Q0A, lambda tensor: tensor[None]), "1 x 4 x 64"),
    refused("of nothing", one(Q0A, lambda tensor: tensor[:0]), "q_proj.lora_A.weight has rank 0"),
    refused("a single number", one(Q0A, lambda tensor: tensor[0, 0]), "a single number"),
    refused("DoRA without magnitudes", config(use_dora=True), "is missing", "lora_magnitude_vector", "and 5 more"),
    refused("magnitudes without DoRA", tensors(lambda state: {
        **state, f"{PREFIX}.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(64)}), "lora_magnitude_vector", "no place"),
    refused("bias of B missing", config(lora_bias=True), "is missing", "lora_B.bias"),
    refused("bias of B too many", tensors(lambda state: {**state, Q0B.replace("weight", "bias"): torch.ones(64)}),
            "lora_B.bias", "no place"),
    refused("whole module missing", config(modules_to_save=["lm_head"]), "is missing lm_head.weight"),
    refused("whole module too many", config(modules_to_save=["down_proj"]), "adapter"),
    refused("tokens missing", config(trainable_token_indices=[3, 4]), "is missing", "trainable_tokens"),
    refused("tokens that the base lacks", config(trainable_token_indices=[3, 400]), "token 400", "0 to 399"),
    refused("embedding of more tokens", tensors(lambda state: {
        **state, "base_model.model.model.embed_tokens.weight": torch.ones(405, 64)}), "405 x 64", "400 x 64", "resize"),
]  # fmt: skip
NUMBERS = [
    *(refused(f"{kind} in {name[21:45]}", one(name, lambda tensor, value=value: tensor.index_fill(0, torch.tensor(1), value)),
              name, "contains NaN or infinity")
      for kind, value, name in (("NaN", NAN, Q0A), ("NaN", NAN, DOWN), ("infinity", INF, Q1B), ("minus infinity", -INF, Q1A))),
    refused("NaN everywhere", each(lambda tensor: tensor * NAN), "contains NaN or infinity", "and 11 more"),
    refused("NaN in bfloat16", each(lambda tensor: (tensor * NAN).bfloat16()), "contains NaN or infinity"),
    refused("beyond float32", one(Q0A, lambda tensor: tensor.double() * 1e300), Q0A, "contains NaN or infinity"),
    refused("NaN in a pickle", as_pickle(lambda state: {**state, Q0A: state[Q0A] * NAN}), Q0A, "contains NaN or infinity"),
    *(refused(f"{kind} numbers", one(Q0A, lambda tensor, kind=kind: tensor.to(kind)), Q0A, str(kind).split(".")[1])
      for kind in (torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)),
    taken("float64", each(torch.Tensor.double)),
    taken("float16", each(torch.Tensor.half)),
    taken("bfloat16", each(torch.Tensor.bfloat16)),
    taken("one in float64", one(Q0A, torch.Tensor.double)),
    taken("one B zero", one(Q0B, torch.zeros_like), "1 of 6 LoRA modules is zero"),
    taken("one A zero", one(DOWN.replace("_B", "_A"), torch.zeros_like), "1 of 6 LoRA modules is zero"),
    taken("one layer zero", tensors(lambda state: {n: t * ("layers.0" in n) for n, t in state.items()}),
          "3 of 6 LoRA modules are zero"),
    taken("every B zero", tensors(lambda state: {n: t * ("lora_A" in n) for n, t in state.items()}),
          "all 6 LoRA modules are zero: it answers like the base"),
    taken("all zero", each(torch.zeros_like), "all 6 LoRA modules are zero: it answers like the base"),
    taken("alpha zero", config(lora_alpha=0), "all 6 LoRA modules are zero"),
    taken("alpha zero for one", config(alpha_pattern={"q_proj": 0}), "2 of 6 LoRA modules are zero"),
    taken("alpha negative", config(lora_alpha=-6), "6 subtracted (alpha is negative)"),
    taken("alpha not whole", config(lora_alpha=6.5)),
    taken("alpha by pattern", config(alpha_pattern={"q_proj": 12, "1.mlp.down_proj": 3.5})),
    taken("dropout of all", config(lora_dropout=1.0)),
    taken("rank unused", config(r=8, rank_pattern={".*_proj": 4})),
    taken("rsLoRA", config(use_rslora=True)),
    taken("target by a regular expression", config(target_modules=r".*(q_proj|v_proj|down_proj)")),
    taken("target with more than there is", config(target_modules=["q_proj", "v_proj", "down_proj", "query_key_value"])),
    taken("no patterns", config(rank_pattern=None, alpha_pattern=None)),
    taken("whole head", both(config(modules_to_save=["lm_head"]), tensors(lambda state: {
        **state, "base_model.model.lm_head.weight": torch.ones(400, 64)})), f"{GOOD}; lm_head trained in full"),
    taken("biases of a base without any", config(bias="all")),
]  # fmt: skip
CASES = [*FIELDS, *PATTERNS, *KINDS, *WRITING, *FILES, *PLACES, *NUMBERS]
