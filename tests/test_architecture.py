"""The house as docs/architecture.md draws it: its tree, and which way imports run."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

from tests.conftest import ROOT

SOURCE = ROOT / "src" / "nybble"
PUBLIC = SOURCE / "__init__.py"  # it names everything, for type checkers, and imports nothing
# A room may import rooms of lower rank only; rooms of equal rank do not know each other.
RANK = {
    "__main__": 13, "cli": 12, "demo": 11, "export": 11, "sweep": 11, "training": 10, "preflight": 9, "evaluate": 8, "serve": 8,
    "chat": 7, "objective": 6, "generate": 6, "data": 5, "model": 5, "engine": 5, "weights": 4, "run": 4, "plan": 3, "recipe": 2,
    "kernels": 2, "distributed": 1, "files": 1, "errors": 0, "couplings": 0, "isolated": 0,
    "installed": 0, "markdown": 0, "terminal": 0,
    "version": 0, "__init__": 0,
}  # fmt: skip
OPTIONAL = {
    "gguf", "tensorboard", "mlflow", "trackio", "lm_eval", "fastapi", "starlette", "uvicorn", "prometheus_client",
    "vllm", "llama_cpp", "llguidance", "optuna", "sqlalchemy",
}  # fmt: skip


def room(path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node


def test_imports_run_one_way():
    for file in set(SOURCE.rglob("*.py")) - {PUBLIC}:
        here = room(file)
        for name, node in imports(ast.parse(file.read_text())):
            parts = name.split(".")
            if parts[0] != "nybble" or len(parts) < 2 or parts[1] == here:
                continue
            place = f"{file.relative_to(ROOT)}:{node.lineno}"
            assert RANK[parts[1]] < RANK[here], f"{place} imports {name}: {here} may not know {parts[1]}"


def test_imports_stand_at_the_top_but_where_cli_loads_a_room():
    for file in set(SOURCE.rglob("*.py")) - {PUBLIC}:
        tree = ast.parse(file.read_text())
        attempts = [inner for node in tree.body if isinstance(node, ast.Try) for inner in node.body]
        top = {id(node) for node in [*tree.body, *attempts]}
        late = [node for _, node in imports(tree) if id(node) not in top]
        assert not late or room(file) == "cli", f"{file.relative_to(ROOT)}:{late[0].lineno} imports inside"


def test_kernels_know_torch_triton_the_register_and_each_other():
    for file in (SOURCE / "kernels" / "triton").glob("*.py"):
        for name, node in imports(ast.parse(file.read_text())):
            allowed = name.split(".")[0] in {
                "__future__",
                "collections",
                "typing",
                "torch",
                "triton",
            } or name.startswith(
                ("nybble.kernels.triton", "nybble.kernels.reference", "nybble.kernels.scaled", "nybble.couplings")
            )
            assert allowed, f"{file.relative_to(ROOT)}:{node.lineno} imports {name}"


def test_an_optional_package_has_one_home_which_only_cli_knows():
    homes = {
        "nybble.evaluate.harness": {"lm_eval"},
        "nybble.export.gguf.writer": {"gguf"},
        "nybble.export.gguf.llama": {"llama_cpp"},
        "nybble.serve.app": {"fastapi", "starlette"},
        "nybble.serve.connection": {"h11", "starlette", "uvicorn"},
        "nybble.serve.grammar": {"llguidance"},
        "nybble.serve.guard": {"starlette"},
        "nybble.serve.metrics": {"prometheus_client"},
        "nybble.serve.replies": {"fastapi", "starlette"},
        "nybble.serve.server": {"uvicorn"},
        "nybble.serve.wellformed": {"starlette"},
        "nybble.sweep.study": {"optuna", "sqlalchemy"},
    }
    for file in SOURCE.rglob("*.py"):
        names = {name for name, _ in imports(ast.parse(file.read_text()))}
        here = ".".join(file.relative_to(SOURCE.parent).with_suffix("").parts)
        found = {name.split(".")[0] for name in names} & OPTIONAL - homes.get(here, set())
        assert not found, f"{file.relative_to(ROOT)} imports {found}"
        others = {name for name in names & homes.keys() if name.split(".")[1] != room(file)}
        assert room(file) == "cli" or not others, file


def test_the_rooms_in_the_docs_are_the_rooms():
    drawn = re.search(r"```rooms\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(), re.DOTALL)[1]
    found, stack = set(), []
    for line in drawn.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        stack[depth:] = [name.rstrip("/")]
        found.add("/".join(stack))
    packages = {file.parent for file in SOURCE.rglob("__init__.py")} - {SOURCE}
    leaves = {file for file in SOURCE.glob("*.py") if not file.name.startswith("__")}
    assert found == {path.relative_to(SOURCE).as_posix() for path in packages | leaves}


def test_every_file_says_what_it_is_for():
    for file in SOURCE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(file.read_text())), file.relative_to(ROOT)


def test_no_class_name_stands_twice():
    names = [
        node.name
        for file in SOURCE.rglob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert len(names) == len(set(names)), {name for name in names if names.count(name) > 1}


def test_files_stay_small():
    for file in [*SOURCE.rglob("*.py")]:
        assert len(file.read_text().splitlines()) <= 400, file


def test_the_public_names_are_all_there_load_no_torch_before_their_use_and_warn_of_nothing():
    probe = (
        "import sys, nybble; assert 'torch' not in sys.modules; assert set(nybble._HOMES) == set(nybble.__all__);"
        "nybble.load_recipe(); assert 'torch' not in sys.modules;"
        "print([name for name in nybble.__all__ if not hasattr(nybble, name)], hasattr(nybble, 'nothing'))"
    )
    strict = ["-W", "error", "-W", "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"]
    result = subprocess.run([sys.executable, *strict, "-c", probe], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "[] False", result.stderr
