"""The shape of the code: who may import whom, who may import heavy packages, how long things may grow, and what no file may mention.

Sources are read, not run, except where a fresh process must show what an import really loads. What a module does is tested elsewhere.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from aapt_deploy import profiles

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "aapt_deploy"
FILES = sorted(PACKAGE.rglob("*.py"))
PRESETS = sorted((ROOT / "profiles").glob("*.toml"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# From the top. A module may import from lower tiers and from its own unit (its first name: `engine` for `engine.ort`), nothing else.
TIERS = (
    ("__main__",),
    ("cli",),
    ("export", "build", "latency", "doctor", "stream", "initialise", "train"),
    ("rollout", "starts"),
    ("models", "engine", "video", "controls", "graph_file"),
    ("ops",),
    ("signature", "bundle", "camera", "reports"),
    ("rope", "prompts", "machine", "assets", "console"),
    ("profiles",),
    ("errors",),
)
TIER = {unit: tier for tier, units in enumerate(TIERS) for unit in units}
BRIDGES = {("engine.eager", "models")}  # the one place where an engine knows the networks
NAMES_TYPES_OF_UPPER_TIERS = "reports"  # and never runs them: under TYPE_CHECKING only

HEAVY = set(PYPROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-module-level-imports"])
HEAVY_SUBMODULES = {"safetensors.torch": "torch"}  # light packages whose submodule loads a heavy one
HEAVY_ROWS = sorted(row for row, rules in PYPROJECT["tool"]["ruff"]["lint"]["per-file-ignores"].items() if "TID253" in rules)

LONGEST_FILE = 420  # lines
LONGEST_FUNCTION = 60

# Paths of one machine, and hosts that only an installer should know. Spelt so that no pattern matches itself.
PRIVATE = re.compile(
    r"(?<![\w./-])/(?:root|work|opt/(?:wheels|pypi))\b"
    r"|\b(?:pypi|test\.pypi|pythonhosted|anaconda|npmjs|crates)\.(?:org|com|io)\b"
    r"|\b(?:download\.pytorch|pypi\.nvidia|pypi\.ngc)\.\w+"
)


def module_of(path: Path) -> str:
    """Dotted name below the package; "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def statements(tree: ast.AST, inside_functions: bool, inside_type_checking: bool) -> Iterator[ast.AST]:
    """All nodes of `tree`, leaving out what is only run later or never."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not inside_functions:
            continue
        if is_type_checking(node) and not inside_type_checking:
            continue
        yield node
        yield from statements(node, inside_functions, inside_type_checking)


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Dotted names of what `nodes` import; `from a import b` counts as a.b, which may be a module."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are written in full"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def upward_imports(module: str, source: str) -> list[str]:
    """Units that `module` imports and may not."""
    unit = module.split(".")[0]
    nodes = statements(ast.parse(source), inside_functions=True, inside_type_checking=unit != NAMES_TYPES_OF_UPPER_TIERS)
    targets = {name.split(".")[1] for name in imported(nodes) if name.startswith("aapt_deploy.")}
    known = targets & TIER.keys()  # anything else is a name of aapt_deploy/__init__.py
    return sorted(t for t in known - {unit} if TIER[t] <= TIER[unit] and (module, t) not in BRIDGES)


def heavy_imports(source: str) -> set[str]:
    """Heavy packages that are imported when the module is."""
    names = set(imported(statements(ast.parse(source), inside_functions=False, inside_type_checking=False)))
    through = {heavy for name in names for light, heavy in HEAVY_SUBMODULES.items() if f"{name}.".startswith(f"{light}.")}
    return {name.split(".")[0] for name in names} & HEAVY | through


def heavy_files() -> dict[str, set[str]]:
    files = [path for folder in ("aapt_deploy", "tests", "bench") for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): found for path in files if (found := heavy_imports(path.read_text()))}


def files_of_the_project() -> list[Path]:
    """What git tracks or would offer to track; everything beside this file's folder where there is no git, as in a source archive."""
    if not (ROOT / ".git").exists():
        return [path for path in sorted(ROOT.rglob("*")) if path.is_file() and not {".venv", "__pycache__"} & set(path.parts)]
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    return [path for name in listed if name and (path := ROOT / name).is_file()]


def private_mentions(text: str) -> list[str]:
    return [f"line {number}: {found[0]}" for number, line in enumerate(text.splitlines(), 1) for found in PRIVATE.finditer(line)]


# Tiers


def test_every_module_has_a_tier_and_every_tier_its_modules() -> None:
    units = {module_of(path).split(".")[0] for path in FILES} - {""}
    assert units == set(TIER), "a new module needs a place in TIERS, a deleted one leaves it"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_downwards(path: Path) -> None:
    if module := module_of(path):
        assert upward_imports(module, path.read_text()) == []
    else:
        assert list(imported(ast.walk(ast.parse(path.read_text())))) == [], "the package itself imports nothing"


@pytest.mark.parametrize(
    ("module", "source", "refused"),
    [
        ("profiles", "from aapt_deploy.bundle import Bundle", ["bundle"]),
        ("export", "def f():\n    import aapt_deploy.build", ["build"]),  # jobs do not know each other
        ("engine.ort", "from aapt_deploy.models.vae import Vae", ["models"]),
        ("engine.eager", "from aapt_deploy.models.vae import Vae", []),
        ("models.graphs", "from aapt_deploy import __version__, engine", ["engine"]),
        ("train.data", "from aapt_deploy.train.worlds import World", []),
        ("reports", "if TYPE_CHECKING:\n    from aapt_deploy.build import Built", []),
        ("reports", "from aapt_deploy.build import Built", ["build"]),
        ("bundle", "if TYPE_CHECKING:\n    from aapt_deploy.export import Parity", ["export"]),
        ("rollout", "from aapt_deploy.engine import Engines\nfrom aapt_deploy.starts import Start", ["starts"]),
    ],
)
def test_the_tier_rule_bites(module: str, source: str, refused: list[str]) -> None:
    assert upward_imports(module, source) == refused


# Heavy packages


def test_heavy_packages_are_imported_where_pyproject_says() -> None:
    found = heavy_files()
    elsewhere = {name: heavy for name, heavy in found.items() if not any(fnmatch(name, row) for row in HEAVY_ROWS)}
    assert elsewhere == {}
    stale = [row for row in HEAVY_ROWS if not any(fnmatch(name, row) for name in found)]
    assert stale == [], "rows of per-file-ignores that nothing needs"


@pytest.mark.parametrize(
    ("source", "heavy"),
    [
        ("import torch.nn.functional as F", {"torch"}),
        ("from onnx import helper", {"onnx"}),
        ("try:\n    import av\nexcept ImportError:\n    pass", {"av"}),
        ("class A:\n    import tensorrt", {"tensorrt"}),
        ("from safetensors.torch import load_file", {"torch"}),
        ("from safetensors.numpy import load_file", set()),
        ("def f():\n    import torch", set()),
        ("if TYPE_CHECKING:\n    import torch", set()),
    ],
)
def test_the_heavy_rule_sees_module_level_imports(source: str, heavy: set[str]) -> None:
    assert heavy_imports(source) == heavy


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("aapt_deploy.cli", {*HEAVY, "numpy"}),
        ("aapt_deploy.profiles, aapt_deploy.bundle, aapt_deploy.doctor, aapt_deploy.reports", {*HEAVY, "numpy"}),
        ("aapt_deploy.stream, aapt_deploy.engine.ort", HEAVY - {"onnxruntime", "av"}),
        ("aapt_deploy.train.data", HEAVY),
    ],
)
def test_an_import_loads_no_more_than_it_needs(modules: str, absent: set[str]) -> None:
    program = f"import sys, {modules}; print(*sorted(sys.modules.keys() & {sorted(absent)}))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


# Size and words


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_module_says_what_it_is_for_and_stays_short(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module opens with what it is for"
    assert len(text.splitlines()) <= LONGEST_FILE
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions if node.end_lineno is not None}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION} == {}


def test_no_file_names_a_machine_or_a_registry() -> None:
    files = files_of_the_project()
    assert Path(__file__).resolve() in files
    found = {}
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and pictures
        if mentions := private_mentions(text):
            found[path.relative_to(ROOT).as_posix()] = mentions
    assert found == {}


@pytest.mark.parametrize(
    "parts", [("/ro", "ot/x"), ("'/wo", "rk/main/a.py'"), ("see /opt/wh", "eels"), ("https://py", "pi.org/simple"), ("files.python", "hosted.org")]
)
def test_private_names_are_recognised(parts: tuple[str, str]) -> None:
    assert private_mentions("".join(parts))


@pytest.mark.parametrize("text", ["network/root/x", "bundle/work/part", "a rooted tree, /workers", "pypi is a word", "https://onnx.ai"])
def test_ordinary_words_are_not_private(text: str) -> None:
    assert not private_mentions(text)


# Presets


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_of_the_repository_loads_under_its_own_name(path: Path) -> None:
    assert profiles.load(str(path)).name == path.stem


def test_there_are_presets() -> None:
    assert PRESETS
