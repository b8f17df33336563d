"""The package on Windows and macOS: nothing that these systems lack is needed to import it, or to lock a run."""

from __future__ import annotations

import subprocess
import sys

PROBE = """
import importlib, os, pathlib, pkgutil, signal, sys

import nybble

# Once as it is, so that the libraries are loaded: what they do on another system is theirs.
names, skipped = [], []
for module in pkgutil.walk_packages(nybble.__path__, "nybble.", onerror=lambda name: None):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
        names.append(module.name)
    except ModuleNotFoundError as error:
        assert not (error.name or "").startswith("nybble"), error
        skipped.append(module.name)
for name in [name for name in sys.modules if name.partition(".")[0] == "nybble"]:
    del sys.modules[name]

# Then as the other systems would have it, Windows in a fork: to load the libraries takes ten seconds.
child = os.fork()
if child:
    assert os.waitpid(child, 0)[1] == 0, "what is above was said on Windows"
sys.platform = "darwin" if child else "win32"
lacking = {"darwin": ["triton"], "win32": ["triton", "fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix"]}
for name in lacking[sys.platform]:
    for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == name]:
        del sys.modules[loaded]
    sys.modules[name] = None
if sys.platform == "win32":
    unix = {name: getattr(os, name) for name in ("O_NOFOLLOW", "O_NONBLOCK")}
    for name in (*unix, "pread", "pathconf", "fork", "killpg", "geteuid", "getuid", "mkfifo"):
        delattr(os, name)
    for name in ("SIGALRM", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1", "SIGUSR2", "setitimer", "ITIMER_REAL"):
        delattr(signal, name)
for name in names:
    if not name.startswith("nybble.kernels.triton"):
        importlib.import_module(name)
print(sys.platform, len(names), "skipped", skipped)

from nybble.files.locks import hold, holder
from nybble.files.paths import check_writable
if sys.platform == "win32":
    vars(os).update(unix)  # filelock has Windows's own way there, and here needs them
lock = pathlib.Path(sys.argv[1]) / sys.platform / "lock"
with hold(lock, "trained", lock.parent):
    assert holder(lock).pid == os.getpid(), holder(lock)
check_writable(lock.parent, "the run", "out=ANOTHER")
"""


def test_everything_imports_on_another_system(tmp_path):
    for platform in ("win32", "darwin"):
        (tmp_path / platform).mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PROBE, tmp_path], capture_output=True, text=True, check=False, timeout=500
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[:4000]
    lines = {line.split()[0]: line.split() for line in done.stdout.splitlines()}
    for platform in ("win32", "darwin"):
        assert int(lines[platform][1]) > 150, "the package was walked through"
