"""bench/mutants.py finds the tests of a module by imports, wherever they are."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tests.support import ROOT


@pytest.fixture(scope="module")
def mutants() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "bench" / "mutants.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FILES = {
    "aapt_deploy/__init__.py": "",
    "aapt_deploy/low.py": "",
    "aapt_deploy/high.py": "from aapt_deploy.low import x\n",
    "tests/__init__.py": "",
    "tests/room/test_low.py": "from aapt_deploy.low import x\nfrom aapt_deploy import high\n",
    "tests/room/test_other.py": "from aapt_deploy import low\n",
    "tests/room/test_child.py": 'CODE = """\nfrom aapt_deploy.low import x\n"""\n',
    "tests/room/test_high.py": "from aapt_deploy import high\n",
    "tests/room/test_helped.py": "from tests.support.helper import made\n",
    "tests/support/helper.py": "import aapt_deploy.low\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, source in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    return tmp_path


def test_the_file_of_the_module_s_own_name_comes_first_and_indirect_ones_last(
    mutants: ModuleType, tree: Path
) -> None:
    near, far = mutants.tests_of("aapt_deploy/low.py", mutants.import_graph(tree))
    assert near[0] == "tests/room/test_low.py" and near[-1] == "tests/room/test_helped.py"
    assert set(near[1:-1]) == {"tests/room/test_other.py", "tests/room/test_child.py"}
    assert far == ["tests/room/test_high.py"]


def test_every_module_of_the_package_is_reached_by_some_test(mutants: ModuleType) -> None:
    graph = mutants.import_graph()
    package = [
        name
        for name in graph
        if name.startswith("aapt_deploy/") and (ROOT / name).read_text().strip()
    ]
    assert [name for name in package if mutants.tests_of(name, graph) == ([], [])] == []


def test_the_score_counts_no_equivalents(mutants: ModuleType) -> None:
    states = ["killed", "timeout", "survived", "equivalent"]
    record = {"mutants": {str(index): {"state": state} for index, state in enumerate(states)}}
    assert mutants.score(record) == "2 of 3 found, 66.7%; 1 equivalent"
    assert mutants.score({"mutants": {}}) == "0 of 0 found, -; 0 equivalent"
