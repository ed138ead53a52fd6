"""The rules of the code's own form: who imports whom, where heavy packages come in, how long things get, and what no file may mention.

The tables below are the design's (docs/design.md, "Who may import whom"). A new module needs a row; that is the moment to decide where it belongs.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.commands import ROOT

PACKAGE = ROOT / "aapt_deploy"

# From the top down. A module imports from lower tiers only; "name/" stands for a package and everything in it.
TIERS = (
    ("cli", "__main__"),
    ("cli_train", "cli_doctor"),
    ("build_tensorrt",),  # made of build, plan and parity_tensorrt
    (
        "export",
        "quantize",
        "build",
        "latency",
        "plan",
        "profile_diff",
        "quality",
        "stream",
        "doctor",
        "initialise",
        "train/",
        "parity_tensorrt",
        "probes",
        "doctor_tensorrt",
    ),
    ("rollout", "starts", "parity"),
    ("models/", "engine/", "video", "controls", "graph_file", "graph_bf16", "lower_tensorrt", "probe_graphs"),
    ("scales",),
    ("ops/",),
    ("profiles", "signature", "bundle", "lock", "camera", "prompts", "rope", "machine", "assets/", "console", "reports", "options", "proofs"),
    ("errors", "__init__"),
)
GROUND = len(TIERS) - 2  # the nouns may build upon each other, as long as it is not in a circle
BRIDGES = {  # inside one tier: the entry point, torch modules run as an engine, a graph in two steps
    ("__main__", "cli"), ("engine/eager", "models/"), ("lower_tensorrt", "graph_bf16"),
    *((f"engine/torch_{name}", "models/") for name in ("calibrate", "cuda", "decoder", "step")),
}  # fmt: skip

# Heavy package -> modules that may import it while they are imported, and modules that may do so inside a function.
AT_MODULE_LEVEL = {
    "torch": (
        "export",
        "parity",
        "quantize",
        "initialise",
        "plan",
        "engine/eager",
        "engine/torch_calibrate",
        "engine/torch_cuda",
        "engine/torch_decoder",
        "engine/torch_kernels",
        "engine/torch_lane",
        "engine/torch_step",
        "ops/fused",
        "ops/fused_triton",
        "models/",
        "train/",
        "ops/block_causal_attention/torch_op",
        "ops/block_causal_attention/cuda_op",
        "ops/block_causal_attention/triton_op",
    ),
    "onnx": (
        "export",
        "parity",
        "build",
        "graph_file",
        "graph_bf16",
        "lower_tensorrt",
        "probe_graphs",
        "ops/block_causal_attention/onnx_function",
        "ops/block_causal_attention/onnx_tensorrt",
    ),
    "onnxscript": ("export",),
    "onnxruntime": ("parity", "engine/ort"),
    "av": ("video",),
    "tensorrt": ("engine/trt_api", "engine/trt_probe_plugin", "ops/block_causal_attention/trt_plugin", "ops/block_causal_attention/trt_plugin_aot"),
}
IN_FUNCTIONS = {
    "modelopt": ("quantize",),
    "onnxruntime": ("build", "doctor", "parity_tensorrt"),
    "cuda": ("ops/block_causal_attention/kernels", "engine/cuda"),
    "matplotlib": ("train/evaluate", "quality"),
}
HEAVY = ("torch", "tensorrt", "onnx", "onnxscript", "onnxruntime", "av", "cuda", "modelopt", "matplotlib")
HEAVY_SUBMODULES = {"safetensors.torch": "torch"}  # light packages with a heavy corner
WITHOUT_NUMPY = ("cli", "cli_train", "cli_doctor", "options", "__main__", "__init__", "profiles", "errors", "bundle")

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


class Import(NamedTuple):
    target: str  # as in the source: "torch.nn", "aapt_deploy.video"
    line: int
    at_module_level: bool  # runs when the module is imported


def imports(source: str) -> list[Import]:
    """All imports of a module but those under `if TYPE_CHECKING`, which never run."""

    def visit(node: ast.AST, at_module_level: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, at_module_level) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import"
            yield from (Import(f"{node.module}.{alias.name}", node.lineno, at_module_level) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.orelse:
                yield from visit(child, at_module_level)
        else:
            inner = at_module_level and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, inner)

    return list(visit(ast.parse(source), at_module_level=True))


def name_of(path: Path) -> str:
    """aapt_deploy/engine/ort.py -> engine/ort; aapt_deploy/engine/__init__.py -> engine/."""
    name = path.relative_to(PACKAGE).with_suffix("").as_posix()
    return name.removesuffix("__init__") or "__init__"


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
IMPORTS = {name: imports(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def covers(row: str, name: str) -> bool:
    return name.startswith(row) if row.endswith("/") else name == row


def among(rows: tuple[str, ...], name: str) -> bool:
    return any(covers(row, name) for row in rows)


def tier(name: str) -> int:
    found = [depth for depth, rows in enumerate(TIERS) if among(rows, name)]
    assert len(found) == 1, f"aapt_deploy/{name} has {len(found)} rows in TIERS; say where it belongs"
    return found[0]


def own(target: str) -> str | None:
    """The module of this package that an imported dotted name means, as in FILES; None for other packages."""
    if target.split(".")[0] != "aapt_deploy":
        return None
    parts = target.split(".")[1:]
    for length in range(len(parts), -1, -1):
        path = "/".join(parts[:length])
        for candidate in (path, f"{path}/" if path else "__init__"):
            if candidate in FILES:
                return candidate
    raise AssertionError(f"{target} is imported and is not in the package")


def upward(name: str, other: str) -> bool:
    """Whether module `name` must not import `other`."""
    above, below = tier(name), tier(other)
    same_package = "/" in name and name.split("/")[0] == other.split("/")[0] and "/" in other
    bridge = any(covers(source, name) and covers(target, other) for source, target in BRIDGES)
    return above > below or (above == below and above < GROUND and not same_package and not bridge)


def heavy(target: str) -> str | None:
    if target in HEAVY_SUBMODULES or target.rsplit(".", 1)[0] in HEAVY_SUBMODULES:
        return HEAVY_SUBMODULES.get(target) or HEAVY_SUBMODULES[target.rsplit(".", 1)[0]]
    top = target.split(".")[0]
    return top if top in HEAVY else None


# --- who imports whom ---


def test_imports_go_downward() -> None:
    wrong = [
        f"aapt_deploy/{name}, line {found.line}: {found.target}"
        for name in FILES
        for found in IMPORTS[name]
        if (other := own(found.target)) and upward(name, other)
    ]
    assert not wrong, "imports of the own tier or a higher one:\n" + "\n".join(wrong)


def test_the_tables_name_no_module_that_is_gone() -> None:
    rows = [row for rows in (*TIERS, *AT_MODULE_LEVEL.values(), *IN_FUNCTIONS.values(), WITHOUT_NUMPY) for row in rows]
    assert [row for row in rows if not any(covers(row, name) for name in FILES)] == []


def test_no_circle_of_imports() -> None:
    graph = {name: {other for i in found if i.at_module_level and (other := own(i.target)) and other != name} for name, found in IMPORTS.items()}
    graph = {name: others - {"__init__"} for name, others in graph.items()}
    while leaves := {name for name, others in graph.items() if not others}:
        graph = {name: others - leaves for name, others in graph.items() if name not in leaves}
    assert graph == {}


@pytest.mark.parametrize(
    ("name", "target", "wrong"),
    [
        ("export", "aapt_deploy.build", True), ("bundle", "aapt_deploy.signature", False), ("bundle", "aapt_deploy.ops", True),
        ("engine/ort", "aapt_deploy.models.vae", True), ("engine/eager", "aapt_deploy.models.vae", False), ("errors", "aapt_deploy.profiles", True),
        ("engine/ort", "aapt_deploy.engine.Engine", False), ("train/stages", "aapt_deploy.train.loop", False), ("video", "aapt_deploy.rollout", True),
        ("train/loop", "aapt_deploy.latency", True), ("ops/block_causal_attention/torch_op", "aapt_deploy.models", True),
        ("rollout", "aapt_deploy.engine", False), ("rollout", "aapt_deploy.stream", True), ("rollout", "aapt_deploy.starts", True),
        ("stream", "aapt_deploy.cli.main", True), ("cli", "aapt_deploy.stream", False), ("machine", "aapt_deploy.__version__", False),
    ],
)  # fmt: skip
def test_the_rule_itself(name: str, target: str, wrong: bool) -> None:
    other = own(target)
    assert other is not None
    assert upward(name, other) is wrong


def test_the_import_finder_itself() -> None:
    source = "import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import never\nelse:\n    import e\n"
    source += "class K:\n    import f\n    def g(self):\n        import h\n"
    source += "try:\n    import i\nexcept ImportError:\n    i = None\nasync def j():\n    from k import l\n"
    found = [(i.target, i.at_module_level) for i in imports(source)]
    assert found == [("a.b", True), ("c.d", True), ("e", True), ("f", True), ("h", False), ("i", True), ("k.l", False)]
    assert [heavy(t) for t in ("torch.nn", "torchvision", "safetensors.torch.load_file", "safetensors.numpy", "onnx", "onnxruntime.x")] == [
        "torch", None, "torch", None, "onnx", "onnxruntime",
    ]  # fmt: skip


# --- heavy packages ---


def misplaced(name: str, found: Import) -> bool:
    """Whether module `name` must not import that package there."""
    if package := heavy(found.target):
        inside = () if found.at_module_level else IN_FUNCTIONS.get(package, ())
        return not among(AT_MODULE_LEVEL.get(package, ()) + inside, name)
    numpy = found.target.split(".")[0] == "numpy"
    return numpy and found.at_module_level and name in WITHOUT_NUMPY


def test_heavy_packages_come_in_only_where_their_job_is() -> None:
    wrong = [f"aapt_deploy/{name}, line {found.line}: {found.target}" for name in FILES for found in IMPORTS[name] if misplaced(name, found)]
    assert not wrong, "see AT_MODULE_LEVEL and IN_FUNCTIONS:\n" + "\n".join(wrong)


def test_ruff_knows_the_same_table() -> None:
    """ruff tells while one types; its exceptions are per file and not per package, so this test stays the judge."""
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    globs = {glob for glob, codes in ruff["per-file-ignores"].items() if "TID253" in codes and glob.startswith("aapt_deploy/")}
    rows = {row for rows in AT_MODULE_LEVEL.values() for row in rows}
    assert globs == {f"aapt_deploy/{row}*" if row.endswith("/") else f"aapt_deploy/{row}.py" for row in rows}
    assert set(ruff["flake8-tidy-imports"]["banned-module-level-imports"]) == {*HEAVY, *HEAVY_SUBMODULES}


def loaded_by(modules: str) -> set[str]:
    code = f"import {modules}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_command_line_starts_without_any_heavy_package() -> None:
    loaded = loaded_by("aapt_deploy.cli")
    assert "aapt_deploy.cli" in loaded
    assert loaded & {*HEAVY, "numpy", "safetensors"} == set()


def test_a_stream_needs_neither_torch_nor_onnx() -> None:
    loaded = loaded_by("aapt_deploy.stream, aapt_deploy.latency, aapt_deploy.engine.ort, aapt_deploy.video")
    assert {"onnxruntime", "av", "numpy"} <= loaded
    assert loaded & {"torch", "onnx", "onnxscript", "tensorrt", "safetensors"} == set()


def test_a_tensorrt_engine_loads_nothing_heavy_before_it_is_opened() -> None:
    assert loaded_by("aapt_deploy.engine.trt") & {*HEAVY, "safetensors"} == set()


# --- form ---


def unreadable(source: str) -> Iterator[str]:
    """What is wrong with the form of one module."""
    tree = ast.parse(source)
    if not ast.get_docstring(tree):
        yield "no docstring"
    if (lines := len(source.splitlines())) > MAX_FILE_LINES:
        yield f"{lines} lines"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{node.name} has {length} lines"


def test_a_module_says_what_it_is_for_and_stays_readable() -> None:
    found = {name: [*unreadable(path.read_text(encoding="utf-8"))] for name, path in FILES.items()}
    assert len(found) > 50
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def test_the_measure_itself() -> None:
    long = "def f():\n" + "    pass\n" * MAX_FUNCTION_LINES
    assert [*unreadable('"""Says so."""\n' + long.replace("    pass\n", "", 1))] == []
    assert [*unreadable(long)] == ["no docstring", f"f has {MAX_FUNCTION_LINES + 1} lines"]
    assert [*unreadable('"""."""\n' + "a = 1\n" * MAX_FILE_LINES)] == [f"{MAX_FILE_LINES + 1} lines"]


def test_every_other_python_file_says_what_it_is_for() -> None:
    others = [*ROOT.glob("tests/*.py"), *ROOT.glob("bench/*.py")]
    assert len(others) > 10
    assert [str(path) for path in others if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))] == []


# --- what no file may mention ---

# Paths of one machine, and names of package hosts: both make a file useless elsewhere. Split, so that this file passes its own test.
MACHINE_PATHS = ("/wo" + "rk/", "/ro" + "ot/", "/ho" + r"me/\w", "/Use" + r"rs/\w", "/opt/" + "wheels", "/opt/" + "pypi")
PACKAGE_HOSTS = ("pyp" + r"i\.org", "pythonhost" + r"ed\.org", "pytor" + r"ch\.org/whl", "pyp" + r"i\.nvidia", "npm" + r"js\.", "deb" + r"\.debian")
FORBIDDEN = re.compile("|".join(MACHINE_PATHS + PACKAGE_HOSTS).encode())


def repository_files() -> list[Path]:
    """Everything that is tracked, or would be with the next `git add .`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def test_no_file_names_a_machine_path_or_a_package_host() -> None:
    files = repository_files()
    assert Path(__file__) in files
    found = [f"{path.relative_to(ROOT)}: {match[0].decode()}" for path in files for match in FORBIDDEN.finditer(path.read_bytes())]
    assert found == []


@pytest.mark.parametrize("line", ["cd /wo" + "rk/main", "/ro" + "ot/scratch", "https://pyp" + "i.org/simple", "/ho" + "me/me/video.mp4"])
def test_the_search_itself(line: str) -> None:
    assert FORBIDDEN.search(line.encode())
    assert not FORBIDDEN.search(b"tests/root.py workspace/ a homepage")
