"""The command line in processes forked from one that has loaded everything, and killed at a moment that is named.

A new interpreter loads libraries for ten seconds; a fork starts at once. The process that forks has one thread and no OpenMP
threads, so nothing of it is missing in its children. Run as a program this file is that process: a JSON object a line.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import pathlib
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
LIMIT = 120  # seconds a command may take


class Forks:
    """Commands of nybble, each in a process of its own."""

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"OMP_NUM_THREADS": "1", "COLUMNS": "300"},
        )

    def run(
        self,
        root: pathlib.Path,
        words: Sequence[object],
        moment: Any = None,
        processes: int = 1,
        machines: Sequence[object] = (),
    ) -> dict[str, Any]:
        """Run a command, up to a moment or to its end.

        Args:
            root: the folder whose changes are counted and compared with the moment; what is said goes to said.txt there.
            words: of the command line.
            moment: the fields of a `corpus.kills.Moment` or `Elapsed`; None for no kill.
            processes: as a launcher would start them; the moment is one of the first, and the others are killed with it.
            machines: a folder for each process, its working and home folder, as if each were on a machine of its own; none for
                one machine, in the working folder of the tests.

        Returns:
            `status` of the first process, as subprocess has it, and `changes`, how many of the root's files and folders it
            was about to change.
        """
        request = {"root": str(root), "words": [str(word) for word in words], "processes": processes, "moment": moment}
        request["machines"] = [str(folder) for folder in machines]
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def close(self) -> None:
        """End the process that forks."""
        self.server.stdin.close()
        self.server.wait(30)
        self.server.stdout.close()


class Watch:
    """Counts what a process is about to change in a folder, and kills it at its moment."""

    def __init__(self, root: str, moment: dict[str, Any] | None, counter: mmap.mmap) -> None:
        self.root = root
        self.moment = moment
        self.counter = counter
        self.changes = 0
        self.seen = 0
        self.armed = False

    def __call__(self, event: str, words: tuple[Any, ...]) -> None:
        """Before each event that Python audits."""
        if event not in CHANGES or (event == "open" and not (words[2] or 0) & WRITES):
            return
        path = words[1] if event == "os.rename" else words[0]
        if isinstance(path, int):
            return
        path = os.fsdecode(path)
        in_removal = event in ("os.remove", "os.rmdir") and not os.path.isabs(path)  # by rmtree, from an open folder
        if not in_removal and not path.startswith(self.root):
            return
        self.changes += 1
        self.counter[:8] = self.changes.to_bytes(8, "little")
        if self.moment is None:
            return
        if "event" in self.moment:
            self._compare(event, path.removeprefix(self.root), self.moment)
        elif not self.moment["seconds"] and self.changes == self.moment["changes"]:
            os.kill(os.getpid(), signal.SIGKILL)

    def _compare(self, event: str, path: str, moment: dict[str, Any]) -> None:
        if self.armed:
            self.seen += 1
            if self.seen >= moment["later"]:
                os.kill(os.getpid(), signal.SIGKILL)
        is_it = moment["event"] == event and re.search(moment["path"], path) and not self.armed
        self.seen += bool(is_it)
        if not is_it or self.seen < moment["count"]:
            return
        if moment["bytes"]:  # the file that grows beyond them ends the process, in the middle of a write
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (moment["bytes"], moment["bytes"]))
        elif not moment["later"]:
            os.kill(os.getpid(), signal.SIGKILL)
        self.armed, self.seen = bool(moment["later"]), 0


def _child(request: dict[str, Any], rank: int, port: int, counter: mmap.mmap) -> None:
    from nybble import cli

    count = request["processes"]
    log = os.open(f"{request['root']}/said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    if count > 1:
        alone = bool(request["machines"])
        local = {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1} if alone else {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
        numbers = {"RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port, **local}
        os.environ.update({name: str(number) for name, number in numbers.items()}, MASTER_ADDR="127.0.0.1")
    if request["machines"]:
        os.environ["HOME"] = request["machines"][rank]
        os.chdir(request["machines"][rank])
    if not rank:
        sys.addaudithook(Watch(request["root"] + "/", request["moment"], counter))
    sys.argv = ["nybble", *request["words"]]
    status = 0
    try:
        cli.main()
    except SystemExit as end:
        status = int(end.code or 0)
    sys.stdout.flush()
    os._exit(status)  # nothing of the process that forked is to be tidied up here


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    counter = mmap.mmap(-1, 8)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(request["processes"]):
        child = os.fork()
        if not child:
            try:
                _child(request, rank, port, counter)
            finally:
                os._exit(99)
        children.append(child)
    moment = request["moment"] or {}
    began, ended, status = time.time(), 0, 0
    while not ended:
        ended, status = os.waitpid(children[0], os.WNOHANG)
        if not ended and moment.get("seconds") and int.from_bytes(counter[:8], "little") >= moment["changes"]:
            time.sleep(moment["seconds"])
            os.kill(children[0], signal.SIGKILL)
        if not ended and time.time() - began > LIMIT:
            os.kill(children[0], signal.SIGABRT)
        time.sleep(0.001)
    code = os.waitstatus_to_exitcode(status)
    for child in children[1:]:  # a launcher ends the others with the first
        if code:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return {"status": code, "changes": int.from_bytes(counter[:8], "little")}


def _serve() -> None:
    import torch

    import nybble.training.train  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # or every child looks through all that the libraries hold
    answers, sys.stdin = os.fdopen(os.dup(1), "w"), open(0)  # noqa: SIM115 - as long as this process
    for line in sys.stdin:
        answers.write(json.dumps(_answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
