"""Damaged runs and checkpoints: of a finished run, and of one that was killed after step 3 of 4 with checkpoints of 1, 2 and 3.

Of the checkpoints, 2 has the best validation loss, so that 3 refers to it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import random
import shutil
import zipfile
from collections.abc import Callable

from tests.corpus.cases import Case

Damage = Callable[[pathlib.Path], object]
CHECKPOINT_FILES = (
    "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json",
    "training_args.bin", "README.md",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RunCase(Case):
    """A run that something became of, and the command that reads it."""

    command: str = "resume"
    """resume, chat, eval or export; resume of the interrupted run, the others of the finished one."""


def flipped(seed: int) -> Damage:
    """One bit, anywhere in the file."""

    def damage(file: pathlib.Path) -> None:
        content, chance = bytearray(file.read_bytes()), random.Random(seed)
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)

    return damage


def exchanged(old: bytes, new: bytes) -> Damage:
    return lambda file: file.write_bytes(file.read_bytes().replace(old, new, 1))


def rewritten(content: bytes) -> Damage:
    return lambda file: file.write_bytes(content)


def cut(share: float) -> Damage:
    return lambda file: file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


def zeroed(file: pathlib.Path) -> None:
    """As long as before, without its content: as a power cut leaves a file that was never synchronised."""
    file.write_bytes(bytes(file.stat().st_size))


def removed(file: pathlib.Path) -> None:
    file.unlink()


def folder_instead(file: pathlib.Path) -> None:
    file.unlink()
    file.mkdir()


def pipe_instead(file: pathlib.Path) -> None:
    file.unlink()
    os.mkfifo(file)


def as_utf_16(file: pathlib.Path) -> None:
    file.write_bytes(file.read_text(encoding="utf-8").encode("utf-16"))


def changed(**values: object) -> Damage:
    """Keys of a JSON object with other values; None removes one."""

    def damage(file: pathlib.Path) -> None:
        kept = {**json.loads(file.read_text()), **values}
        file.write_text(json.dumps({key: value for key, value in kept.items() if value is not None}))

    return damage


def line(number: int, text: str | None) -> Damage:
    """Another line in place of one, counted from 1; None removes it."""

    def damage(file: pathlib.Path) -> None:
        lines = file.read_text().splitlines()
        lines[number - 1 : number] = [] if text is None else [text]
        file.write_text("\n".join(lines) + "\n")

    return damage


def at(place: str, *damages: Damage) -> Damage:
    """The same for a file inside the run."""

    def damage(run: pathlib.Path) -> None:
        for one in damages:
            one(run / place)

    return damage


def both(*damages: Damage) -> Damage:
    def damage(run: pathlib.Path) -> None:
        for one in damages:
            one(run)

    return damage


def of_0_5_1(run: pathlib.Path) -> None:
    """Its checkpoints were marked by an empty file."""
    for file in run.glob("checkpoints/*/COMPLETE"):
        file.write_bytes(b"")


def of_0_6_0(run: pathlib.Path) -> None:
    """Its marks named no files."""
    for file in run.glob("checkpoints/*/COMPLETE"):
        file.write_text(json.dumps({"seconds": 1.0, "peak_memory": 1}))


def unmarked(run: pathlib.Path) -> None:
    """As a copy that leaves out empty files makes of a run of 0.5.1."""
    for file in run.glob("checkpoints/*/COMPLETE"):
        file.unlink()


def in_all(name: str, damage: Damage) -> Damage:
    def every(run: pathlib.Path) -> None:
        for file in sorted(run.glob(f"checkpoints/checkpoint-*/{name}")):
            damage(file)

    return every


def renamed(old: str, new: str) -> Damage:
    return lambda run: (run / "checkpoints" / old).rename(run / "checkpoints" / new)


def copied(old: str, new: str) -> Damage:
    return lambda run: shutil.copytree(run / "checkpoints" / old, run / "checkpoints" / new)


def gone(name: str) -> Damage:
    return lambda run: shutil.rmtree(run / "checkpoints" / name)


def resumed(name: str, damage: Damage, checkpoint: str, *names: str) -> RunCase:
    """A run that goes on from a checkpoint."""
    return RunCase(f"checkpoint-{name}", damage, 0, (f"resuming from {checkpoint}", *names))


def refused(name: str, damage: Damage, *names: str) -> RunCase:
    return RunCase(f"checkpoint-{name}", damage, 1, names)


def _single_faults() -> list[RunCase]:
    """Of the newest checkpoint one file: named, and the one before it is taken."""
    cases = []
    for seed, file in enumerate(CHECKPOINT_FILES):
        place = f"checkpoints/checkpoint-3/{file}"
        digest = f"checkpoint-3: {file} is not what was written (its digest differs)"
        cases.append(resumed(f"bit-{file}", at(place, flipped(seed)), "checkpoint-2", digest))
        cases.append(resumed(f"no-{file}", at(place, removed), "checkpoint-2", f"checkpoint-3: there is no {file}"))
    newest = "checkpoints/checkpoint-3"
    cases += [
        resumed("cut", at(f"{newest}/optimizer.pt", cut(0.5)), "checkpoint-2", "checkpoint-3: optimizer.pt has", "bytes, but"),
        resumed("empty", at(f"{newest}/scheduler.pt", rewritten(b"")), "checkpoint-2", "scheduler.pt has 0 bytes"),
        resumed("zeroed", at(f"{newest}/adapter_model.safetensors", zeroed), "checkpoint-2", "adapter_model.safetensors is not"),
        resumed("folder", at(f"{newest}/optimizer.pt", folder_instead), "checkpoint-2", "there is no optimizer.pt"),
        resumed("pipe", at(f"{newest}/rng_state.pth", pipe_instead), "checkpoint-2", "there is no rng_state.pth"),
        resumed(
            "extra-loaded", at(f"{newest}/adapter_model.bin", rewritten(b"x")), "checkpoint-2",
            "checkpoint-3: adapter_model.bin was not written with it",
        ),
        resumed("extra-note", at(f"{newest}/notes.txt", rewritten(b"mine")), "checkpoint-3"),
        resumed(
            "two-files", both(at(f"{newest}/optimizer.pt", removed), at(f"{newest}/scheduler.pt", removed)), "checkpoint-2",
            "there is no optimizer.pt (and 1 more)",
        ),
    ]  # fmt: skip
    return cases


def _marks() -> list[RunCase]:
    mark = "checkpoints/checkpoint-3/COMPLETE"
    return [
        resumed("mark-lost", at(mark, removed), "checkpoint-2", "checkpoint-3: it is not marked as complete"),
        resumed("mark-garbled", at(mark, rewritten(b"{")), "checkpoint-2", "checkpoint-3: COMPLETE is not valid JSON"),
        resumed("mark-list", at(mark, rewritten(b"[]")), "checkpoint-2", "checkpoint-3: COMPLETE is not a JSON object"),
        resumed("mark-zeros", at(mark, zeroed), "checkpoint-2", "checkpoint-3: COMPLETE is empty"),
        resumed("mark-types", at(mark, changed(files=["a"])), "checkpoint-2", "checkpoint-3: files in COMPLETE: should"),
        resumed(
            "mark-seconds", at(mark, changed(seconds="long")), "checkpoint-2",
            "seconds in COMPLETE: should be a number, not 'long'",
        ),
        resumed("mark-files", at(mark, changed(files={})), "checkpoint-2", "was not written with it"),
        resumed("mark-folder", at(mark, folder_instead), "checkpoint-2", "COMPLETE is a folder, not a file"),
        resumed("mark-pipe", at(mark, pipe_instead), "checkpoint-2", "COMPLETE is a pipe, not a file"),
        resumed("mark-utf-16", at(mark, as_utf_16), "checkpoint-2", "COMPLETE is not UTF-8: byte 0xff"),
    ]  # fmt: skip


def no_folder(instead: Damage) -> Damage:
    """Something else in place of all checkpoints."""

    def damage(run: pathlib.Path) -> None:
        shutil.rmtree(run / "checkpoints")
        instead(run / "checkpoints")

    return damage


def _whole_runs() -> list[RunCase]:
    best = "checkpoints/checkpoint-2/adapter_model.safetensors"
    return [
        resumed("untouched", both(), "checkpoint-3"),
        resumed("foreign-folders", both(
            copied("checkpoint-3", "checkpoint-best"), copied("checkpoint-3", "checkpoint-foo"),
            copied("checkpoint-3", "checkpoint-3-old"), copied("checkpoint-3", "checkpoint-03"),
        ), "checkpoint-3"),
        resumed("file-of-that-name", lambda run: (run / "checkpoints" / "checkpoint-9").write_text("mine"), "checkpoint-3"),
        resumed("other-step", renamed("checkpoint-3", "checkpoint-40"), "checkpoint-2", "checkpoint-40: it is of step 3"),
        resumed("best-damaged", at(best, flipped(1)), "checkpoint-1",
                "checkpoint-3: the best checkpoint before it, checkpoint-2, is damaged", "checkpoint-2: adapter_model"),
        resumed("best-gone", gone("checkpoint-2"), "checkpoint-1", "the best checkpoint before it is missing: checkpoint-2"),
        resumed("oldest-damaged", at("checkpoints/checkpoint-1/optimizer.pt", removed), "checkpoint-3"),
        resumed("none-at-all", lambda run: shutil.rmtree(run / "checkpoints"), "the beginning"),
        refused("file-for-all", no_folder(lambda place: place.write_text("mine")), "checkpoints is not a folder", "mv "),
        refused("link-for-all", no_folder(lambda place: place.symlink_to("nowhere")), "checkpoints is not a folder"),
        resumed("empty-folder", lambda run: (run / "checkpoints" / "checkpoint-4").mkdir(), "checkpoint-3", "checkpoint-4: it"),
        refused("all-bits", in_all("optimizer.pt", flipped(3)), "no checkpoint can be resumed from:",
                "checkpoint-3: optimizer.pt is not what was written", "checkpoint-2: optimizer.pt", "checkpoint-1: optimizer.pt",
                "copy a complete checkpoint into"),
        refused("all-unmarked", unmarked, "checkpoint-3: it is not marked as complete", "checkpoint-1: it is not marked",
                "if its files are complete and a copy only lost the empty COMPLETE: touch"),
        refused("all-unmarked-and-damaged", both(unmarked, in_all("optimizer.pt", removed)), "checkpoint-3: it is not marked"),
        refused("all-cut", in_all("adapter_model.safetensors", cut(0.5)), "checkpoint-3: adapter_model.safetensors has"),
    ]  # fmt: skip


def _older_versions() -> list[RunCase]:
    """Without digests: by what each file's format says. Torch's files hold checksums of their tensors."""
    garbled = "is cut off or garbled"
    damages = {
        "no-rng": ("rng_state.pth", removed, "there is no rng_state*.pth"),
        "cut-optimizer": ("optimizer.pt", cut(0.5), f"optimizer.pt {garbled}"),
        "cut-adapter": ("adapter_model.safetensors", cut(0.9), f"adapter_model.safetensors {garbled}"),
        "list": ("trainer_state.json", rewritten(b"[]"), f"trainer_state.json {garbled}"),
        "no-step": ("trainer_state.json", changed(global_step=None), f"trainer_state.json {garbled}"),
        "pipe": ("scheduler.pt", pipe_instead, f"scheduler.pt {garbled}"),
        "bit-optimizer": ("optimizer.pt", tensor_bit, f"optimizer.pt {garbled}"),
        "bit-rng": ("rng_state.pth", tensor_bit, f"rng_state.pth {garbled}"),
        "bit-scheduler": ("scheduler.pt", tensor_bit, f"scheduler.pt {garbled}"),
    }
    cases = []
    for version, marks in (("0.5.1", of_0_5_1), ("0.6.0", of_0_6_0)):
        cases.append(resumed(f"{version}-whole", marks, "checkpoint-3"))
        for name, (file, damage, told) in damages.items():
            both_of_them = both(marks, at(f"checkpoints/checkpoint-3/{file}", damage))
            cases.append(resumed(f"{version}-{name}", both_of_them, "checkpoint-2", f"checkpoint-3: {told}"))
    return cases


def tensor_bit(file: pathlib.Path) -> None:
    """One bit in the middle of the largest part of what torch saved; between the parts is padding."""
    with zipfile.ZipFile(file) as archive:
        part = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(file.read_bytes())
    head = content[part.header_offset :]
    name, extra = (int.from_bytes(head[place : place + 2], "little") for place in (26, 28))
    content[part.header_offset + 30 + name + extra + part.file_size // 2] ^= 1
    file.write_bytes(content)


def _records() -> list[RunCase]:
    """metrics.jsonl and samples.jsonl of a run that goes on: a line for the evaluation before the first step, then two a step."""
    log = "metrics.jsonl"
    return [
        RunCase("log-garbled", at(log, line(2, '{"step": 1, "lo')), 1, ("metrics.jsonl:2", "not valid JSON", "sed -i 2d")),
        RunCase("log-list", at(log, line(3, "[1, 2]")), 1, ("metrics.jsonl:3", "metrics.jsonl is not a JSON object")),
        RunCase("log-no-step", at(log, line(2, '{"loss": 1.0}')), 1, ("metrics.jsonl:2", "metrics.jsonl has no step")),
        RunCase("log-text-step", at(log, line(2, '{"step": "1"}')), 1, ("metrics.jsonl:2", "step in metrics.jsonl: should be")),
        RunCase("log-digits", at(log, line(2, '{"step": ' + "9" * 5000 + "}")), 1, ("metrics.jsonl:2", "more than 4,300 digits")),
        RunCase("log-deep", at(log, line(2, "[" * 50_000)), 1, ("metrics.jsonl:2", "nested too deeply")),
        RunCase("log-nul", at(log, line(2, "\0" * 80)), 1, ("metrics.jsonl:2", "is not valid JSON")),
        RunCase("log-latin", at(log, lambda f: f.write_bytes(b"\xe9" + f.read_bytes())), 1, ("metrics.jsonl:1", "byte 0xe9")),
        RunCase("log-pipe", at(log, pipe_instead), 1, ("metrics.jsonl is a pipe, not a file",)),
        RunCase("log-folder", at(log, folder_instead), 1, ("metrics.jsonl is a folder, not a file",)),
        RunCase("log-cut-at-the-end", at(log, lambda f: f.write_text(f.read_text() + '{"step": 4, "lo')), 0,
                ("from checkpoint-3",)),
        RunCase("log-gone", at(log, removed), 0, ("resuming from checkpoint-3",)),
        RunCase("samples-garbled", at("samples.jsonl", lambda f: f.write_text('x\n{"step": 1}\n')), 1, ("samples.jsonl:1",)),
    ]  # fmt: skip


INNER = {
    "start.json": {"recipe": {"model": 7, "data": {}}},
    "summary.json": {"base": {"name": "m", "fingerprint": None, "quantization": "nf4", "parameters": 1}},
    "template.json": {"bos": True, "day": "2026-13-01"},
    "evaluation.json": {"tasks": [{"name": "arc", "base": {"mean": "high"}, "tuned": {"mean": 1.0}}]},
}
INNER_TOLD = {
    "start.json": ("recipe.model in start.json: should be a mapping, not 7",),
    "summary.json": ("base.fingerprint in summary.json: should be text, not None",),
    "template.json": ("day in template.json: month must be in 1..12", "'2026-13-01'"),
    "evaluation.json": ("tasks.0.base.mean in evaluation.json: should be a number, not 'high'",),
}


def _objects() -> list[RunCase]:
    """start.json, template.json, summary.json and evaluation.json, read by the commands that need them."""
    cases = []
    for command, name, key in (
        ("chat", "start.json", "versions"),
        ("chat", "summary.json", "data"),
        ("chat", "template.json", "source"),
        ("export", "evaluation.json", "tasks"),
    ):
        damages = {
            "empty": (rewritten(b""), f"{name} is empty"),
            "zeros": (zeroed, f"{name} is empty"),
            "garbled": (
                rewritten(b'{\n"a": 1\n"b": 2}'),
                f"{name} is not valid JSON: Expecting ',' delimiter",
                f"{name}:3",
            ),
            "list": (rewritten(b"[1]"), f"{name} is not a JSON object"),
            "utf-16": (as_utf_16, f"{name} is not UTF-8: byte 0xff", f"{name}:1"),
            "deep": (rewritten(b'{"a":' * 50_000), f"{name} is nested too deeply"),
            "digits": (rewritten(b'{\n"a": ' + b"7" * 4301 + b"}"), f"{name} has a number of more than", f"{name}:2"),
            "no-key": (changed(**{key: None}), f"{name} has no {key}"),
            "type": (changed(**{key: 7}), f"{key} in {name}: should be", "not 7"),
            "inner-type": (changed(**INNER[name]), *INNER_TOLD[name]),
            "folder": (folder_instead, f"{name} is a folder, not a file"),
            "pipe": (pipe_instead, f"{name} is a pipe, not a file"),
        }
        for kind, (damage, *names) in damages.items():
            cases.append(RunCase(f"{name}-{kind}", at(name, damage), 1, tuple(names), command))
    return cases  # fmt: skip


def without_end(recipe: pathlib.Path) -> None:
    """A copy that stopped halfway: what is left is good YAML, with the defaults of every option that is gone."""
    recipe.write_text(recipe.read_text().partition("train:")[0])


def other_seed(recipe: pathlib.Path) -> None:
    """Other rows would be held out."""
    recipe.write_text(recipe.read_text().replace("seed: 5", "seed: 6"))


def other_base(start: pathlib.Path) -> None:
    start.write_text(json.dumps({**json.loads(start.read_text()), "base": f"sha256:{7:064}"}))


def moved_data(recipe: pathlib.Path) -> None:
    recipe.write_text(recipe.read_text().replace("rows.jsonl", "elsewhere.jsonl"))


def _recipes_and_adapters() -> list[RunCase]:
    recipe, weights = "recipe.yaml", "adapter/adapter_model.safetensors"

    def put(damage: Damage, status: int, *names: str) -> tuple[Damage, int, tuple[str, ...]]:
        return at(recipe, damage), status, names

    recipes = {
        "gone": put(removed, 1, "is neither a run nor an adapter"),
        "zeros": put(zeroed, 2, "a character that YAML does not allow: 0x0", "recipe.yaml:1"),
        "garbled": put(rewritten(b"model: [\n"), 2, "not valid YAML", "recipe.yaml:2"),
        "list": put(rewritten(b"- a\n"), 2, "a recipe is a mapping of sections"),
        "utf-16": put(as_utf_16, 2, "recipe.yaml is not UTF-8"),
        "deep": put(rewritten(b"model: " + b"[" * 5000), 2, "recipe.yaml is nested too deeply"),
        "digits": put(
            rewritten(b"data:\n  max_length: " + b"9" * 5000), 2, "data.max_length: should be a whole number"
        ),
        "empty": put(rewritten(b""), 1, "recipe.yaml is not the recipe that this run was started with", "model.path: "),
        "lost-its-end": put(without_end, 1, "train.learning_rate: 0.02 -> 0.0002", "restore it from a copy of the run"),
        "other-seed": put(other_seed, 1, "train.seed: 5 -> 6", "compared with start.json"),
        "moved": put(moved_data, 0),
        "tag": put(
            rewritten(b"model: {path: !!bool x}\nx: !!timestamp y\n"), 2, "a value that cannot be read", "recipe.yaml:2"
        ),
        "list-as-key": put(rewritten(b"? [a]\n: b\n"), 2, "a key must be text", "restore it from a copy of the run"),
        "type": put(rewritten(b"lora:\n  r: many\n"), 2, "lora.r: should be a whole number", "recipe.yaml:2"),
        "folder": put(folder_instead, 2, "recipe.yaml is a folder, not a file"),
        "pipe": put(pipe_instead, 2, "recipe.yaml is a pipe, not a file"),
    }
    cases = [
        RunCase(f"recipe-{name}", damage, status, names, "chat") for name, (damage, status, names) in recipes.items()
    ]
    differs = "adapter_model.safetensors is not what was written (its digest differs)"
    told = (differs, "nybble train --resume", "if you changed it yourself: rm ")
    cases += [
        *(RunCase(f"adapter-bit-{word}", at(weights, flipped(5)), 1, told, word) for word in ("chat", "eval", "export")),
        RunCase("adapter-cut", at(weights, cut(0.9)), 1, ("adapter_model.safetensors has",), "chat"),
        RunCase("adapter-gone", at(weights, removed), 1, ("there is no adapter_model.safetensors",), "chat"),
        RunCase("adapter-config-bit", at("adapter/adapter_config.json", flipped(6)), 1, ("adapter_config.json is not",), "chat"),
        RunCase("adapter-mark-garbled", at("adapter/COMPLETE", cut(0.5)), 1, ("COMPLETE is not valid JSON",), "chat"),
        RunCase("adapter-mark-emptied", at("adapter/COMPLETE", rewritten(b"")), 1, ("COMPLETE lists no files", "rm "), "chat"),
        RunCase("adapter-mark-of-nothing", at("adapter/COMPLETE", changed(files=None)), 1, ("lists no files",), "export"),
        RunCase("export-summary-gone", at("summary.json", removed), 0, ("parity", "passed"), "export"),
        RunCase("export-other-base", both(at("summary.json", removed), at("start.json", other_base)), 1,
                ("this is not the base that the adapter was trained on",), "export"),
        RunCase("adapter-card-rewritten", at("adapter/README.md", rewritten(b"mine")), 0, (), "chat"),
        RunCase("adapter-changed-on-purpose", at("adapter", alpha_doubled), 0, (), "chat"),
        *(
            RunCase(f"{file}-{word}", at(file, exchanged(b"ent", b"tne")), 1,
                    (f"the run is damaged: {file} is not what", 'delete "files" from'), word)
            for file, word in (("template.json", "chat"), ("template.json", "eval"), ("tokenizer/chat_template.jinja", "export"))
        ),
        RunCase("tokenizer-setting", at("tokenizer/tokenizer_config.json", changed(model_max_length=9)), 1,
                ("the run is damaged: tokenizer/tokenizer_config.json has",), "chat"),
        RunCase("template-changed-on-purpose",
                both(at("template.json", exchanged(b"{", b" {")), at("start.json", changed(files=None))), 0, (), "chat"),
        RunCase("eval-log-garbled", at("metrics.jsonl", line(2, "{")), 1, ("metrics.jsonl:2", "sed -i 2d"), "eval"),
        RunCase("eval-summary", at("summary.json", changed(dtype="float")), 1, ("dtype in summary.json: should",), "eval"),
    ]  # fmt: skip
    return cases


def alpha_doubled(adapter: pathlib.Path) -> None:
    """What a user may do, and says by removing the mark."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"]}))
    (adapter / "COMPLETE").unlink()


CASES: list[RunCase] = [
    *_single_faults(),
    *_marks(),
    *_whole_runs(),
    *_older_versions(),
    *_records(),
    *_objects(),
    *_recipes_and_adapters(),
]
