"""Installs this checkout into .venv: python3 install.py [EXTRA ...]. The Makefile calls it too.

Where there is no NVIDIA driver, it installs PyTorch's CPU build, which saves gigabytes of CUDA packages. It uses only the
standard library and no syntax newer than Python 3.6, so that a Python that is too old gets the message that refuses it.
"""

import ctypes
import pathlib
import platform
import re
import subprocess
import sys

OLDEST, NEWEST = (3, 11), (3, 14)  # as in pyproject.toml
HERE = pathlib.Path(__file__).resolve().parent
PYTHON = HERE / ".venv" / "bin" / "python"
PIP = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
UV = [str(PYTHON), "-m", "uv", "pip", "install", "--quiet", "--python", str(PYTHON)]
PINS = ["-c", "constraints.txt"]
# What is downloaded with all extras that the Makefile names, with and without CUDA; tests/test_install.py adds it up.
CUDA_GB, CPU_GB = 3.2, 0.9


def main(extras):
    check_python()
    make_venv()
    install_torch()
    say("Installing into .venv. This takes a few minutes and shows no progress.")
    run([*PIP, *PINS, "-e", f".[{','.join(extras)}]" if extras else "."])


def check_python():
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        window = "{}.{} to {}.{}".format(*OLDEST, *NEWEST)
        version = "{}.{}.{}".format(*sys.version_info[:3])
        stop(
            f"nybble needs Python {window}; this is Python {version} ({sys.executable})",
            "use another Python: make demo PYTHON=python3.13, or python3.13 install.py",
        )


def make_venv():
    """Make .venv, or keep one that this version of Python made."""
    version = "{}.{}".format(*sys.version_info[:2])
    if PYTHON.is_symlink() or PYTHON.exists():
        made_by = (
            output_of("import sys; print('Python {}.{}'.format(*sys.version_info[:2]))") or "a Python that is gone"
        )
        if made_by != f"Python {version}":
            stop(f".venv was made by {made_by}; this is Python {version}", "rm -rf .venv, then the same command again")
    if not output_of("import pip; print('found')"):
        run([sys.executable, "-m", "venv", str(HERE / ".venv")])


def install_torch():
    """Install torch's CPU build where CUDA cannot be used. Elsewhere torch is installed with the other packages."""
    pin = re.search(r"^torch==(\S+)", (HERE / "constraints.txt").read_text(), re.MULTILINE).group(1)
    if output_of("import importlib.metadata as m; print(m.version('torch'))").split("+")[0] == pin:
        return
    if platform.system() != "Linux":  # for which the package index has no CUDA build
        say(f"Installing PyTorch: up to {CPU_GB} GB to download.")
    elif has_nvidia_driver():
        say(f"NVIDIA driver found: installing PyTorch with CUDA, {CUDA_GB} GB to download.")
    else:
        say(f"No NVIDIA driver: installing PyTorch's CPU build, up to {CPU_GB} GB to download.")
        if not install_cpu_build(f"torch=={pin}+cpu"):
            say("PyTorch's CPU build cannot be reached from here. Installing the default build instead, which includes")
            say(f"CUDA and also runs without a GPU: {CUDA_GB} GB to download. Ctrl-C cancels.")


def has_nvidia_driver():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def install_cpu_build(build):
    """Take it from where pip is configured to look, else from PyTorch's own index, which uv knows. False if both fail."""
    if succeeds([*PIP, "--no-deps", build]):
        return True
    return succeeds([*PIP, *PINS, "uv"]) and succeeds([*UV, "--no-deps", "--torch-backend", "cpu", build])


def output_of(code):
    """What .venv's Python prints when it runs this code; empty if it fails."""
    if not PYTHON.exists():
        return ""
    return subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, check=False).stdout.strip()


def succeeds(command):
    return subprocess.run(command, cwd=str(HERE), capture_output=True, check=False).returncode == 0


def run(command):
    if subprocess.run(command, cwd=str(HERE), check=False).returncode:
        stop(
            f"this command failed, for the reason above: {' '.join(command)}", "solve that, then the same command again"
        )


def say(line):
    print(line, flush=True)


def stop(what, fix):
    sys.exit(f"error: {what}\n  fix:   {fix}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command continues from here.")
