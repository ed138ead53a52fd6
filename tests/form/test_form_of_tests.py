"""A test file imports the package and tests/support, never another test file."""

import ast
import re
from pathlib import Path

from tests.support import ROOT

TESTS = ROOT / "tests"
OTHERS = ("aapt_deploy", "onnx", "torch", "numpy")
THIS = Path(__file__).relative_to(TESTS).as_posix()  # has the wrong ones as text
A_TEST_FILE = re.compile(r"(?:^|\.)(?:(?:test|contract)_\w+|conftest)(?:\.|$)")


def imported(source: str) -> list[str]:
    """Every dotted name that `source` imports, in code or in text that another process runs."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            lines = re.findall(r"^\s*(?:import|from) +([\w.]+)", node.value, re.MULTILINE)
            found += [line for line in lines if "test" in line]
    return found


def of_another_test(source: str) -> list[str]:
    """The imports of `source` that lead to a test file."""
    ours = [name for name in imported(source) if name.split(".")[0] not in OTHERS]
    return [name for name in ours if A_TEST_FILE.search(name) and ".support." not in name]


def test_no_test_file_imports_another() -> None:
    files = sorted(TESTS.rglob("*.py"))
    assert len(files) > 60
    found = [(path.relative_to(TESTS).as_posix(), path.read_text()) for path in files]
    wrong = {name: of_another_test(source) for name, source in found if name != THIS}
    wrong = {name: names for name, names in wrong.items() if names}
    assert not wrong, f"put what they share into tests/support: {wrong}"


def test_the_search_itself() -> None:
    wrong = ["import test_a", "from tests.test_a import b", "from tests.room.test_a import b"]
    wrong += [
        "from tests.conftest import b",
        "from contract_a import b",
        "from tests import test_a",
    ]
    wrong += ['CODE = """\nimport test_a as t\n"""', "def f():\n    from test_a import b"]
    right = ["import pytest", "from tests.support.tiny import frames_of", "import latest_one"]
    assert [source for source in wrong if not of_another_test(source)] == []
    assert [source for source in right if of_another_test(source)] == []


def test_every_folder_of_tests_that_is_imported_is_a_package() -> None:
    packages = {path.parent for path in TESTS.rglob("__init__.py")}
    wanted = {TESTS, *(Path(path) for path in (TESTS / "support").rglob("*") if path.is_dir())}
    holds_python = {path for path in wanted if list(path.glob("*.py"))}
    assert holds_python <= packages
