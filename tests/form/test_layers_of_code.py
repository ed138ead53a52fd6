"""The rules of the code's own form.

Who imports whom, where heavy packages come in, how long things get, and what no file may mention.

The tables below are the design's (docs/design.md, "Who may import whom"). A new room needs a row; a
new file needs a line in its room's `__init__`.
"""

import ast
import fnmatch
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "aapt_deploy"

# Thirteen rooms. A room imports from rooms of a lower rank only; rooms of one rank never import
# each other. Anyone may import `assets`.
RANKS = {
    "cli": 9,
    "train": 8,
    "export": 7,
    "measure": 7,
    "stream": 7,
    "backends": 6,
    "rollout": 5,
    "models": 4,
    "bundle": 3,
    "ops": 2,
    "profiles": 1,
    "video": 1,
    "errors": 0,
}
BESIDE = {
    "__main__": "cli",
    "__init__": "errors",
    "sections": "profiles",
}  # files at the root that are no room: `python -m aapt_deploy`, the version
ANYONE = ("assets",)

# Files -> heavy packages that they may import while they are imported. ruff's exceptions are these
# nine globs.
AT_MODULE_LEVEL = {
    "models/*": ("torch",),
    "train/*": ("torch",),
    "export/*": ("torch", "onnx", "onnxscript", "onnxruntime"),
    "video/*": ("av",),
    "bundle/graph_file": ("onnx",),
    "backends/ort/*": ("onnx", "onnxruntime"),
    "backends/torch_*": ("torch",),
    "backends/trt/*": ("onnx", "tensorrt"),
    "ops/{fused*,*_op,*/onnx_function}": ("torch", "onnx"),
}
# Files -> heavy packages that they may import inside a function.
IN_FUNCTIONS = {
    "backends/ort/*": ("onnxruntime",),
    "backends/trt/cuda": ("cuda",),
    "backends/trt/parity": ("onnxruntime",),
    "export/calibrate": ("modelopt",),
    "export/text_encoder": ("transformers", "tokenizers"),
    "measure/doctor": ("onnxruntime",),
    "measure/quality": ("matplotlib",),
    "ops/*/kernels": ("cuda",),
    "train/judge/evaluate": ("matplotlib",),
}
HEAVY = (
    "torch",
    "tensorrt",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "av",
    "cuda",
    "modelopt",
    "matplotlib",
    "transformers",
    "tokenizers",
)
HEAVY_SUBMODULES = {"safetensors.torch": "torch"}  # light packages with a heavy corner
NUMPY_ONLY = (
    "models/aapt/{signature,camera,prompts,rope}",
    "models/{sampler,vectors,family}",
    "ops/*/{__init__,reference,hopper_fp8,emulator}",
)  # no heavy package at all
WITHOUT_NUMPY = (
    "cli/{commands,train,doctor,options}",
    "__main__",
    "__init__",
    "profiles",
    "sections",
    "errors",
    "bundle/bundle",
)

# Where modules are chosen by name: its strings go between rooms as any import does, and make no
# circle inside its own room.
CHOOSES = ("backends/table",)

MAX_FILE_LINES = 380
MAX_FUNCTION_LINES = 60


class Import(NamedTuple):
    target: str  # as in the source: "torch.nn", "aapt_deploy.video"
    line: int
    at_module_level: bool  # runs when the module is imported
    named: bool = False  # a string that names a module, to be imported by whoever reads it


def imports(source: str) -> list[Import]:
    """Return all imports of a module, and all strings that name a module of the package.

    Imports under `if TYPE_CHECKING` never run and are left out.
    """

    def visit(node: ast.AST, at_module_level: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, at_module_level) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import"
            yield from (
                Import(f"{node.module}.{alias.name}", node.lineno, at_module_level)
                for alias in node.names
            )
        elif isinstance(node, ast.If) and ast.unparse(node.test) in (
            "TYPE_CHECKING",
            "typing.TYPE_CHECKING",
        ):
            for child in node.orelse:
                yield from visit(child, at_module_level)
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, str) and re.fullmatch(
                r"aapt_deploy(\.\w+)+(:\w+)?", node.value
            ):
                yield Import(node.value.replace(":", "."), node.lineno, False, named=True)
        else:
            inner = at_module_level and not isinstance(
                node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
            )
            for child in ast.iter_child_nodes(node):
                yield from visit(child, inner)

    return list(visit(ast.parse(source), at_module_level=True))


def name_of(path: Path) -> str:
    """Name a file as the tables do.

    aapt_deploy/backends/ort/engine.py -> backends/ort/engine; aapt_deploy/models/__init__.py ->
    models/__init__.
    """
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
IMPORTS = {name: imports(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def alternatives(glob: str) -> list[str]:
    """`a/{b,c}` -> a/b, a/c."""
    match = re.search(r"\{(.*?)\}", glob)
    return (
        [glob[: match.start()] + part + glob[match.end() :] for part in match[1].split(",")]
        if match
        else [glob]
    )


def among(globs: tuple[str, ...], name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, one) for glob in globs for one in alternatives(glob))


def allowed(table: dict[str, tuple[str, ...]], name: str) -> set[str]:
    """The packages that a table's rows give to module `name`."""
    return {
        package for glob, packages in table.items() if among((glob,), name) for package in packages
    }


def room_of(name: str) -> str:
    """The room of a module; itself for what is no room."""
    first = name.split("/")[0]
    return BESIDE.get(first, first)


def own(target: str) -> str | None:
    """Return the module of this package that an imported dotted name means, as in FILES.

    None for other packages.
    """
    if target.split(".")[0] != "aapt_deploy":
        return None
    parts = target.split(".")[1:]
    for length in range(len(parts), -1, -1):
        path = "/".join(parts[:length])
        for candidate in (path, f"{path}/__init__" if path else "__init__"):
            if candidate in FILES:
                return candidate
    raise AssertionError(f"{target} is imported and is not in the package")


def upward(name: str, other: str) -> bool:
    """Whether module `name` must not import `other`."""
    importer, imported = room_of(name), room_of(other)
    return (
        importer != imported
        and imported not in ANYONE
        and (importer in ANYONE or RANKS[importer] <= RANKS[imported])
    )


def heavy(target: str) -> str | None:
    if target in HEAVY_SUBMODULES or target.rsplit(".", 1)[0] in HEAVY_SUBMODULES:
        return HEAVY_SUBMODULES.get(target) or HEAVY_SUBMODULES[target.rsplit(".", 1)[0]]
    top = target.split(".")[0]
    return top if top in HEAVY else None


# --- who imports whom ---


def test_every_file_is_in_a_room() -> None:
    assert len(RANKS) == 13
    assert [name for name in FILES if room_of(name) not in {*RANKS, *ANYONE}] == []
    assert [
        room for room in (*RANKS, *ANYONE) if room not in {room_of(name) for name in FILES}
    ] == []


def test_imports_go_downward() -> None:
    found = ((name, i) for name, rows in IMPORTS.items() for i in rows)
    wrong = [
        f"aapt_deploy/{name}.py:{i.line} imports {i.target}"
        for name, i in found
        if (other := own(i.target)) and upward(name, other)
    ]
    assert wrong == [], "\n".join(["imports of a room of the same rank or a higher one:", *wrong])


def circle(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Take from a graph whatever has no arrow out of it or none into it.

    Its circles are left, and what lies between them.
    """
    while ends := {name for name, others in graph.items() if not others} | graph.keys() - {
        other for others in graph.values() for other in others
    }:
        graph = {name: others - ends for name, others in graph.items() if name not in ends}
    return graph


def test_no_circle_of_imports() -> None:
    graph: dict[str, set[str]] = {}
    for name, rows in IMPORTS.items():
        counted = (
            own(i.target)
            for i in rows
            if i.at_module_level or (i.named and not among(CHOOSES, name))
        )
        graph[name] = {other for other in counted if other and other not in (name, "__init__")}
    assert circle(graph) == {}


def test_the_tables_name_no_file_that_is_gone() -> None:
    rows = (*AT_MODULE_LEVEL, *IN_FUNCTIONS, *NUMPY_ONLY, *WITHOUT_NUMPY, *CHOOSES)
    assert [
        one
        for row in rows
        for one in alternatives(row)
        if not any(among((one,), name) for name in FILES)
    ] == []


@pytest.mark.parametrize(
    ("name", "other", "wrong"),
    [
        ("export/export", "backends/build", False), ("bundle/bundle", "bundle/signature", False),
        ("bundle/bundle", "ops/__init__", False),
        ("backends/ort/engine", "models/checkpoint", False),
        ("models/checkpoint", "backends/table", True), ("errors", "profiles", True),
        ("export/export", "measure/latency", True), ("stream/stream", "measure/latency", True),
        ("video/sinks", "rollout/loop", True), ("profiles", "video/sinks", True),
        ("train/loop", "measure/latency", False), ("ops/fused", "models/checkpoint", True),
        ("rollout/loop", "backends/table", True), ("rollout/starts", "rollout/loop", False),
        ("stream/stream", "cli/commands", True), ("cli/commands", "stream/stream", False),
        ("measure/machine", "__init__", False), ("__main__", "cli/commands", False),
        ("cli/commands", "__main__", False), ("errors", "__init__", False),
        ("bundle/files", "assets/__init__", False),
        ("assets/__init__", "profiles", True),
    ],
)  # fmt: skip
def test_the_rule_itself(name: str, other: str, wrong: bool) -> None:
    assert upward(name, other) is wrong


def test_the_finder_of_circles_itself() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == {}
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == {"b": {"c"}, "c": {"b"}}


def test_the_import_finder_itself() -> None:
    source = '"""aapt_deploy.errors is told of in prose, which is no import."""\n'
    source += (
        "import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import never\nelse:\n    import e\n"
    )
    source += "class K:\n    import f\n    def g(self):\n        import h\n"
    source += "try:\n    import i\nexcept ImportError:\n    i = None\n"
    source += "async def j():\n    from k import l\n"
    source += "ROWS = {'x': ('aapt_deploy.errors', 'errors', 'aapt_deploy')}\n"
    source += "def m():\n    import_module('aapt_deploy.bundle.files:whole')\n"
    found = [(i.target, i.at_module_level) for i in imports(source)]
    assert found == [
        ("a.b", True), ("c.d", True), ("e", True), ("f", True), ("h", False), ("i", True),
        ("k.l", False), ("aapt_deploy.errors", False),
        ("aapt_deploy.bundle.files.whole", False),
    ]  # fmt: skip
    names = ("torch.nn", "torchvision", "safetensors.torch.load_file", "safetensors.numpy")
    assert [heavy(t) for t in (*names, "onnx", "onnxruntime.x")] == [
        "torch", None, "torch", None, "onnx", "onnxruntime",
    ]  # fmt: skip


# --- heavy packages ---


def test_heavy_packages_come_in_only_where_their_job_is() -> None:
    wrong = []
    for name, rows in IMPORTS.items():
        everywhere = allowed(AT_MODULE_LEVEL, name)
        inside = everywhere | allowed(IN_FUNCTIONS, name)
        for i in rows:
            package = heavy(i.target)
            misplaced = package and (
                among(NUMPY_ONLY, name)
                or package not in (everywhere if i.at_module_level else inside)
            )
            if misplaced or (
                i.target.split(".")[0] == "numpy"
                and i.at_module_level
                and among(WITHOUT_NUMPY, name)
            ):
                wrong.append(f"aapt_deploy/{name}.py:{i.line} imports {i.target}")
    assert wrong == [], "\n".join(
        ["see AT_MODULE_LEVEL, IN_FUNCTIONS, NUMPY_ONLY and WITHOUT_NUMPY:", *wrong]
    )


def test_ruff_knows_the_same_table() -> None:
    """ruff tells while one types, but its exceptions are per file and not per package.

    So this test stays the judge.
    """
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    globs = {
        glob
        for glob, codes in ruff["per-file-ignores"].items()
        if "TID253" in codes and glob.startswith("aapt_deploy/")
    }
    assert globs == {
        f"aapt_deploy/{row}" if row.endswith("*") else f"aapt_deploy/{row}.py"
        for row in AT_MODULE_LEVEL
    }
    assert set(ruff["flake8-tidy-imports"]["banned-module-level-imports"]) == {
        *HEAVY,
        *HEAVY_SUBMODULES,
    }


def loaded_by(*names: str) -> set[str]:
    """What importing modules of the package loads."""
    modules = ", ".join(f"aapt_deploy.{name.rstrip('/').replace('/', '.')}" for name in names)
    code = f"import {modules}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_command_line_starts_without_any_heavy_package() -> None:
    loaded = loaded_by("cli/commands")
    assert "aapt_deploy.cli" in loaded
    assert loaded & {*HEAVY, "numpy", "safetensors"} == set()


def test_a_stream_needs_neither_torch_nor_onnx() -> None:
    loaded = loaded_by("stream/stream", "measure/latency", "backends/ort/engine", "video/sinks")
    assert {"onnxruntime", "av", "numpy"} <= loaded
    assert loaded & {"torch", "onnx", "onnxscript", "tensorrt", "safetensors"} == set()


def test_a_tensorrt_engine_loads_nothing_heavy_before_it_is_opened() -> None:
    assert loaded_by("backends/trt/engine") & {*HEAVY, "safetensors"} == set()


# --- form ---


def test_a_module_says_what_it_is_for_and_stays_readable() -> None:
    wrong = []
    for name, path in FILES.items():
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        if not ast.get_docstring(tree):
            wrong.append(f"aapt_deploy/{name}.py has no docstring")
        if (lines := len(source.splitlines())) > MAX_FILE_LINES:
            wrong.append(f"aapt_deploy/{name}.py has {lines} lines, more than {MAX_FILE_LINES}")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    wrong.append(
                        f"aapt_deploy/{name}.py:{node.lineno} {node.name} has {length} lines, "
                        f"more than {MAX_FUNCTION_LINES}"
                    )
    assert wrong == [], "\n".join(wrong)


def test_every_room_lists_its_files() -> None:
    """In the docstring of its `__init__`, or, for a folder inside it, in that folder's."""
    wrong = []
    for folder in sorted({path.parent for path in FILES.values()} - {PACKAGE}):
        first = folder.relative_to(PACKAGE).parts[0]
        if first not in RANKS:
            continue
        said = " ".join(
            ast.get_docstring(ast.parse((place / "__init__.py").read_text(encoding="utf-8"))) or ""
            for place in {folder, PACKAGE / first}
        )
        there = {path.name for path in folder.glob("*.py")} - {"__init__.py"} | {
            f"{path.parent.name}/" for path in folder.glob("*/__init__.py")
        }
        place = folder.relative_to(PACKAGE).as_posix()
        wrong += [
            f"aapt_deploy/{place}/__init__.py does not list {name}"
            for name in sorted(there)
            if not re.search(rf"(?<!\w){re.escape(name)}", said)
        ]
        known = {path.name for path in (PACKAGE / first).rglob("*.py")}
        wrong += [
            f"aapt_deploy/{place}/__init__.py lists {name}, which is gone"
            for name in sorted(set(re.findall(r"\b\w+\.py\b", said)) - known)
        ]
    assert wrong == [], "\n".join(wrong)


def test_every_other_python_file_says_what_it_is_for() -> None:
    others = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    assert len(others) > 10
    assert [
        str(path)
        for path in others
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ] == []


# --- what no file may mention ---

# Paths of one machine, and names of package hosts: both make a file useless elsewhere. They are
# split, so that this file passes its own test.
MACHINE_PATHS = (
    "/wo" + "rk/",
    "/ro" + "ot/",
    "/ho" + r"me/\w",
    "/Use" + r"rs/\w",
    "/opt/" + "wheels",
    "/opt/" + "pypi",
)
PACKAGE_HOSTS = (
    "pyp" + r"i\.org",
    "pythonhost" + r"ed\.org",
    "pytor" + r"ch\.org/whl",
    "pyp" + r"i\.nvidia",
    "npm" + r"js\.",
    "deb" + r"\.debian",
)
FORBIDDEN = re.compile("|".join(MACHINE_PATHS + PACKAGE_HOSTS).encode())


def repository_files() -> list[Path]:
    """Everything that is tracked, or would be with the next `git add .`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [
        path
        for name in done.stdout.decode().split("\0")
        if name and (path := ROOT / name).is_file()
    ]


def test_no_file_names_a_machine_path_or_a_package_host() -> None:
    files = repository_files()
    assert Path(__file__) in files
    found = [
        f"{path.relative_to(ROOT)}: {match[0].decode()}"
        for path in files
        for match in FORBIDDEN.finditer(path.read_bytes())
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "cd /wo" + "rk/main",
        "/ro" + "ot/scratch",
        "https://pyp" + "i.org/simple",
        "/ho" + "me/me/video.mp4",
    ],
)
def test_the_search_itself(line: str) -> None:
    assert FORBIDDEN.search(line.encode())
    assert not FORBIDDEN.search(b"tests/root.py workspace/ a homepage")
