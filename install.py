"""Installs this checkout into .venv: python3 install.py [EXTRA ...]. The Makefile calls it too.

It uses only the standard library and old syntax, because a Python that is too old must get as far as being refused.
Where there is no NVIDIA driver it installs PyTorch's CPU build, which saves gigabytes of CUDA packages.
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
# To download with all extras that the Makefile wants, with and without CUDA; tests/test_install.py adds it up.
CUDA_GB, CPU_GB = 3.2, 0.9


def main(extras):
    check_python()
    make_venv()
    install_torch()
    run([*PIP, *PINS, "-e", ".[{}]".format(",".join(extras))])


def check_python():
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        window = "{}.{} to {}.{}".format(*OLDEST, *NEWEST)
        stop(
            "nybble needs Python {}; this is Python {} ({})".format(window, platform.python_version(), sys.executable),
            "choose another one: make demo PYTHON=python3.13, or python3.13 install.py",
        )


def make_venv():
    """Make .venv, or keep one that this version of Python made."""
    here = "{}.{}".format(*sys.version_info[:2])
    if PYTHON.exists():
        made_by = answer("import sys; print('{}.{}'.format(*sys.version_info[:2]))")
        if made_by != here:
            stop(".venv was made by Python {}; this is Python {}".format(made_by or "(gone)", here), "rm -rf .venv")
    if not answer("import pip; print('here')"):
        run([sys.executable, "-m", "venv", str(HERE / ".venv")])


def install_torch():
    """Install torch's CPU build where no CUDA can be used; otherwise torch comes with the other packages."""
    pin = re.search(r"^torch==(\S+)", (HERE / "constraints.txt").read_text(), re.MULTILINE).group(1)
    installed = answer("from importlib.metadata import version; print(version('torch'))")
    if installed.split("+")[0] == pin:
        return
    if platform.system() != "Linux":  # elsewhere the package index has no CUDA build
        print("Installing PyTorch: up to {} GB to download.".format(CPU_GB), flush=True)
    elif has_nvidia_driver():
        print("NVIDIA driver found: installing PyTorch with CUDA, {} GB to download.".format(CUDA_GB), flush=True)
    else:
        print("No NVIDIA driver: installing PyTorch's CPU build, up to {} GB to download.".format(CPU_GB), flush=True)
        if not install_cpu_build("torch=={}+cpu".format(pin)):
            print("PyTorch's CPU build cannot be reached from here. Installing the default build instead: it includes")
            print("CUDA and runs on a CPU too. {} GB to download; Ctrl-C stops.".format(CUDA_GB), flush=True)


def has_nvidia_driver():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def install_cpu_build(build):
    """Install it from where pip is told to look, else from PyTorch's own index, which uv knows; False if neither has it."""
    if succeeds([*PIP, "--no-deps", build]):
        return True
    run([*PIP, *PINS, "uv"])
    return succeeds([*UV, "--no-deps", "--torch-backend", "cpu", build])


def answer(code):
    """What .venv's Python prints, or nothing if it cannot."""
    if not PYTHON.exists():
        return ""
    command = [str(PYTHON), "-c", code]
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True, check=False
    ).stdout.strip()


def succeeds(command):
    quiet = subprocess.DEVNULL
    return subprocess.run(command, cwd=str(HERE), stdout=quiet, stderr=quiet, check=False).returncode == 0


def run(command):
    if subprocess.run(command, cwd=str(HERE), check=False).returncode:
        stop("this command failed (see above): {}".format(" ".join(command)), "run it again once that is mended")


def stop(what, fix):
    sys.exit("error: {}\n  fix:   {}".format(what, fix))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on from here.")
