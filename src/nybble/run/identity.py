"""Checks that a run is unchanged since it started, and the same in all processes: template, recipe, data, base and versions."""

from __future__ import annotations

import json
import socket
from typing import Any

from nybble.distributed.group import all_gather, broadcast
from nybble.distributed.launcher import rank
from nybble.errors import RunError
from nybble.files.digests import faults
from nybble.files.reading import RESTORE
from nybble.recipe import absolute_tree
from nybble.run.folder import Run
from nybble.run.start import FILES, Start, differences, ignore_places, ignore_split, with_defaults


def check_template_and_tokenizer(run: Run) -> None:
    """Compare tokenizer and template with their digests in start.json, which versions before 0.7 did not record.

    Raises:
        RunError: naming the file, or the record is damaged.
    """
    record = run.folder / "start.json"
    if run.is_bare_adapter or not record.exists():
        return
    if wrong := faults(run.folder, {name: dict(entry) for name, entry in (run.start().files or {}).items()}):
        raise RunError(
            f"the run is damaged: {wrong[0]}",
            where=str(run.folder),
            fix=f'{RESTORE}; if you changed it yourself: delete "{FILES}" from {record}',
        )


def check_unchanged(run: Run, now: Start) -> None:
    """Compare a run that is resumed with its start.json, written by any version of nybble.

    Raises:
        RunError: listing what changed, from what to what.
    """
    before, after = _compared(run.start()), _compared(now)
    ignore_split(before["recipe"], after["recipe"])
    if changes := differences(before, after):
        raise RunError(
            "the run cannot be resumed, because these changed since it was started:\n"
            + "\n".join(f"  - {change}" for change in changes),
            where=str(run.folder / "start.json"),
            fix="undo these changes, or start a new run: nybble train -c RUN/recipe.yaml out=ANOTHER",
        )


def check_agreement(own: Start) -> None:
    """Compare what the processes of a run are about to train: each machine has read recipe, data and base by itself.

    Raises:
        RunError: in all processes, listing how others differ from the first one.
    """
    then, now = (_compared(start) | {"bits": _bits(start)} for start in (broadcast(own), own))
    ignore_places(then["recipe"], now["recipe"])
    others = all_gather([(rank(), socket.gethostname(), change) for change in differences(then, now)])
    if others:
        raise RunError(
            "the processes of this run would not train the same:\n"
            + "\n".join(f"  - process {number} on {host}: {change}" for number, host, change in others),
            where="compared with process 0",
            fix="the same command, data, base and versions on each machine",
        )


def _bits(start: Start) -> str | None:
    return start.quantized_base.digest if start.quantized_base is not None else None


def _compared(start: Start) -> dict[str, Any]:
    """What must be equal. Tokenizer, template and the quantised base are checked separately; nybble itself may be newer."""
    recipe = with_defaults(absolute_tree(start.recipe.as_json()))  # before 0.6 paths were recorded as typed
    packages = {name: version for name, version in start.versions.items() if name != "nybble"}
    return {
        "recipe": json.loads(json.dumps(recipe)),
        "data": start.data,
        "base": start.base,
        "versions": packages,
    }
