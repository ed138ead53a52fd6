"""Mutation score: plant one small mistake at a time, and see whether the tests find it.

    make mutants MODULE=aapt_deploy/stream/controls.py     every mutant of one module
    make mutants                                    mutants on the lines that differ from `main`
    python bench/mutants.py --sample 300 --seed 0 --out record.json

The mistakes are those of mutmut (an operator, number, name, argument or assignment changed), but
for its changes of texts: what a person reads is checked by the golden files. `train` is left out.

Each mutant is planted in a copy of the tree. The tests that run are found by imports, so no table
has to be kept: first the files that import the module, the one of its own name before the others,
on a shared bundle of the unchanged code; then, if none fails, those that use it, with their own;
then the files that reach the module through one other. The record is written after each mutant, and
a second call with the same record goes on where the first stopped. A survivor that cannot be told
from the original is marked by hand: --equivalent ID --reason TEXT.
"""

import argparse
import ast
import contextlib
import difflib
import hashlib
import json
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
COPIED = ("aapt_deploy", "tests", "bench", "plugins", "profiles", "docs")
NOT_MUTATED = ("aapt_deploy/train/", "aapt_deploy/assets/", "aapt_deploy/cli/train")
SKIPPED_OPERATORS = ("operator_string", "operator_dict_arguments")
SKIPPED_CALLS = ("len", "isinstance", "super", "cast", "TypeVar")
KILLED, SURVIVED, TIMEOUT, EQUIVALENT = "killed", "survived", "timeout", "equivalent"
LARGE = 1000  # one more would be no mistake that anything could notice: twice as much is
SHARED = re.compile(
    r"\b(?:bundle|copied|bare|made|exported|calibrated)\b: "
)  # fixtures that are made once
NO_TESTS, ALL_SELECTED = 5, "not slow and not gpu"


class Mutant(NamedTuple):
    """One mistake: which change of which operator at which place."""

    module: str  # "aapt_deploy/stream/controls.py"
    line: int
    column: int
    operator: str
    number: int  # of this operator's changes at this place

    @property
    def key(self) -> str:
        return hashlib.sha256(repr(tuple(self)).encode()).hexdigest()[:12]


def changes(source: str) -> Iterator[tuple[tuple[int, int, str, int], Any, Any]]:
    """Yield ((line, column, operator, number), old node, new node) for every mutant of `source`."""
    import libcst
    from libcst.metadata import MetadataWrapper, PositionProvider
    from mutmut.mutation.mutators import mutation_operators

    wrapper = MetadataWrapper(libcst.parse_module(source), unsafe_skip_copy=True)
    places = wrapper.resolve(PositionProvider)

    def visit(node: Any) -> Iterator[Any]:
        if isinstance(
            node, libcst.Annotation | libcst.Decorator | libcst.Import | libcst.ImportFrom
        ):
            return
        if isinstance(node, libcst.If) and "TYPE_CHECKING" in wrapper.module.code_for_node(
            node.test
        ):
            return
        called = node.func if isinstance(node, libcst.Call) else None
        plain = isinstance(called, libcst.Name) and called.value in SKIPPED_CALLS
        for kind, operator in mutation_operators:
            if plain or operator.__name__ in SKIPPED_OPERATORS or not isinstance(node, kind):
                continue
            for number, mutated in enumerate(operator(node)):
                if (
                    isinstance(node, libcst.Integer | libcst.Float)
                    and node.evaluated_value >= LARGE
                ):
                    mutated = node.with_changes(value=repr(2 * node.evaluated_value))
                start = places[node].start
                yield (start.line, start.column, operator.__name__, number), node, mutated
        for child in node.children:
            yield from visit(child)

    for place, old, new in visit(wrapper.module):
        yield place, old, (wrapper.module, new)


def all_mutants(module: str) -> list[Mutant]:
    source = (ROOT / module).read_text(encoding="utf-8")
    return list(dict.fromkeys(Mutant(module, *place) for place, _, _ in changes(source)))


def planted(mutant: Mutant) -> str:
    """The source of the mutant's module with the mistake in it."""
    source = (ROOT / mutant.module).read_text(encoding="utf-8")
    for place, old, (module, new) in changes(source):
        if (mutant.module, *place) == tuple(mutant):
            code: str = module.deep_replace(old, new).code
            return code
    raise LookupError(f"{mutant} is not in the source any more")


# --- which tests ---


def modules_named(source: str, folder: Path = ROOT) -> set[str]:
    """Return the files of the package and of tests/ that a source imports.

    Imports in text for a child process count too.
    """
    names = set(re.findall(r"\b(?:from|import|-m)[ \"',]+((?:aapt_deploy|tests)[\w.]*)", source))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= {node.value} if re.fullmatch(r"aapt_deploy(\.\w+)+", node.value) else set()
    found = set()
    for name in names:
        parts = name.split(".")
        for path in (Path(*parts), Path(*parts[:-1])):  # a module, or a name in one
            files = [path.with_suffix(".py"), path / "__init__.py"] if path.name else []
            found |= {file.as_posix() for file in files if (folder / file).is_file()}
    return found


def import_graph(folder: Path = ROOT) -> dict[str, set[str]]:
    """What each file of the package and of the tests imports."""
    files = [
        path for top in ("aapt_deploy", "tests") for path in sorted((folder / top).rglob("*.py"))
    ]
    graph = {}
    for path in files:
        named = modules_named(path.read_text(encoding="utf-8"), folder)
        if path.name.startswith("test_"):  # runs the contracts beside it in a process of its own
            named |= {
                beside.relative_to(folder).as_posix()
                for beside in path.parent.glob("contract_*.py")
            }
        graph[path.relative_to(folder).as_posix()] = named
    return graph


def tests_of(module: str, graph: dict[str, set[str]]) -> tuple[list[str], list[str]]:
    """Return the test files that import `module`, and those that are one step further.

    Imports through tests/support count. One step further is a module that imports `module`.
    """
    tests = [name for name in graph if Path(name).name.startswith("test_")]

    def reached(test: str) -> set[str]:
        found, fresh = set[str](), {test}
        while fresh:
            found |= fresh
            named = set().union(*(graph.get(name, set()) for name in fresh))
            fresh = {name for name in named if name.startswith("tests/")} - found
        return set().union(*(graph.get(name, set()) for name in found))

    seen = {
        test: {name for name in reached(test) if name.startswith("aapt_deploy/")} for test in tests
    }
    own = {f"test_{Path(module).stem}.py", f"test_{Path(module).parent.name}.py"}
    rank = lambda test: (Path(test).name not in own, module not in graph[test], len(seen[test]))
    near = sorted((test for test in tests if module in seen[test]), key=rank)
    users = {
        name for name, named in graph.items() if module in named and name.startswith("aapt_deploy/")
    }
    far = sorted((test for test in tests if seen[test] & users and test not in near), key=rank)
    return near, far


# --- one mutant ---


class Tree:
    """A copy of the tree to plant mistakes in, and its shared bundle of the unchanged code."""

    def __init__(self, folder: Path, limit_s: float) -> None:
        self.folder, self.once, self.limit_s = folder / "tree", folder / "once", limit_s
        self.folder.mkdir(parents=True)
        for name in COPIED:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, self.folder / name, ignore=ignored)
        for file in [path for path in ROOT.iterdir() if path.is_file()]:
            shutil.copy2(file, self.folder / file.name)
        (self.folder / "build").symlink_to(ROOT / "build")  # what was downloaded before
        self.once.mkdir()
        warm = next(path for path in self.folder.rglob("test_export.py"))
        self.pytest([warm.relative_to(self.folder).as_posix()], self.once, 600)
        self.clean = shutil.copytree(self.once, folder / "clean")

    def pytest(self, files: list[str], once: Path | None, limit_s: float) -> str:
        """Run `files` until the first failure."""
        own = {
            "PYTHONPATH": os.pathsep.join([str(self.folder), *sys.path[1:]]),
            "OMP_NUM_THREADS": "1",
        }
        own |= {"PYTHONDONTWRITEBYTECODE": "1"} | ({"TESTS_ONCE": str(once)} if once else {})
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
        ]
        process = subprocess.Popen(
            [*command, "-m", ALL_SELECTED, *files], cwd=self.folder, env=os.environ | own,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return TIMEOUT
        finally:
            with_children(process)
        return SURVIVED if code in (0, NO_TESTS) else KILLED

    def judge(self, mutant: Mutant, near: list[str], far: list[str]) -> tuple[str, str]:
        """Plant the mistake, run its tests ring by ring, and take it out again."""
        file = self.folder / mutant.module
        original = file.read_text(encoding="utf-8")
        file.write_text(planted(mutant), encoding="utf-8")
        alone = [
            name for name in near if SHARED.search((self.folder / name).read_text(encoding="utf-8"))
        ]
        rings = (("near", near, True), ("near, alone", alone, False), ("far", far, False))
        try:
            for ring, files, shared in rings:
                if shared:
                    shutil.rmtree(self.once)
                    shutil.copytree(self.clean, self.once)
                result = (
                    self.pytest(files, self.once if shared else None, self.limit_s)
                    if files
                    else SURVIVED
                )
                if result != SURVIVED:
                    return result, ring
            return SURVIVED, ""
        finally:
            file.write_text(original, encoding="utf-8")


def with_children(process: "subprocess.Popen[bytes]") -> None:
    """End what is left of a process and of those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# --- the run ---


def changed_lines(base: str) -> dict[str, set[int]]:
    """The lines of the package that differ from where the branch left `base`."""
    command = ["git", "diff", "--merge-base", "-U0", base, "--", "aapt_deploy"]
    found: dict[str, set[int]] = {}
    name = ""
    for line in subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines():
        if line.startswith("+++ b/"):
            name = line.removeprefix("+++ b/")
        elif match := re.match(r"@@ \S+ \+(\d+)(?:,(\d+))? @@", line):
            first, count = int(match[1]), int(match[2] or 1)
            found.setdefault(name, set()).update(range(first, first + count))
    return found


def wanted(options: argparse.Namespace) -> list[Mutant]:
    if options.module:
        return [mutant for module in options.module for mutant in all_mutants(module)]
    package = sorted(
        path.relative_to(ROOT).as_posix() for path in (ROOT / "aapt_deploy").rglob("*.py")
    )
    package = [name for name in package if not name.startswith(NOT_MUTATED)]
    if options.changed:
        lines = changed_lines(options.changed)
        chosen = [name for name in package if name in lines]
        return [
            mutant for name in chosen for mutant in all_mutants(name) if mutant.line in lines[name]
        ]
    everything = [mutant for name in package for mutant in all_mutants(name)]
    print(f"{len(everything)} mutants in {len(package)} files", file=sys.stderr)
    return random.Random(options.seed).sample(everything, min(options.sample, len(everything)))


def score(record: dict[str, Any]) -> str:
    states = [entry["state"] for entry in record["mutants"].values()]
    found, equal = states.count(KILLED) + states.count(TIMEOUT), states.count(EQUIVALENT)
    counted = len(states) - equal
    share = f"{found / counted:.1%}" if counted else "-"
    return f"{found} of {counted} found, {share}; {equal} equivalent"


def revision() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()


def difference(mutant: Mutant) -> list[str]:
    before = (ROOT / mutant.module).read_text(encoding="utf-8").splitlines()
    lines = difflib.unified_diff(before, planted(mutant).splitlines(), n=0, lineterm="")
    return [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--module", action="append", help="every mutant of this file; may be repeated"
    )
    parser.add_argument(
        "--changed", nargs="?", const="main", metavar="BASE", help="mutants on changed lines"
    )
    parser.add_argument(
        "--sample", type=int, default=300, help="this many of the package, at random"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, help="only the first N of those that are left")
    parser.add_argument("--limit-s", type=float, default=300.0, help="for one run of the tests")
    parser.add_argument("--jobs", type=int, default=1, help="trees to plant in at the same time")
    parser.add_argument(
        "--again", action="store_true", help="only the survivors of the record, with today's tests"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "mutants.json", help="the record"
    )
    parser.add_argument("--equivalent", metavar="ID", help="mark a survivor of the record")
    parser.add_argument("--reason", default="", help="why it cannot be told from the original")
    options = parser.parse_args()
    record: dict[str, Any] = (
        json.loads(options.out.read_text()) if options.out.exists() else {"mutants": {}}
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save = lambda: options.out.write_text(
        json.dumps(record | {"score": score(record)}, indent=1) + "\n"
    )
    if options.equivalent:
        record["mutants"][options.equivalent] |= {"state": EQUIVALENT, "reason": options.reason}
        save()
        return
    graph = import_graph()
    if options.again:
        survivors = [e for e in record["mutants"].values() if e["state"] == SURVIVED]
        left = [Mutant(*(entry[name] for name in Mutant._fields)) for entry in survivors]
    else:
        left = [mutant for mutant in wanted(options) if mutant.key not in record["mutants"]]
    left = left[: options.first]
    record |= {"sample": options.sample, "seed": options.seed, "revision": revision()}

    trees = queue.SimpleQueue[Tree]()

    def judge(mutant: Mutant) -> tuple[Mutant, dict[str, Any]]:
        tree, began = trees.get(), time.monotonic()
        try:
            state, ring = tree.judge(mutant, *tests_of(mutant.module, graph))
        finally:
            trees.put(tree)
        entry = {"state": state, "ring": ring, "seconds": round(time.monotonic() - began, 1)}
        return mutant, entry | mutant._asdict() | {"diff": difference(mutant)}

    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for number in range(options.jobs if left else 0):
            trees.put(Tree(Path(folder) / str(number), options.limit_s))
        with ThreadPoolExecutor(options.jobs) as pool:
            for done in as_completed([pool.submit(judge, mutant) for mutant in left]):
                mutant, entry = done.result()
                record["mutants"][mutant.key] = entry
                save()
                place = f"{mutant.module}:{mutant.line} {mutant.operator}"
                print(
                    f"{entry['state']:<9} {entry['seconds']:6.1f} s  {place}  ({score(record)})",
                    file=sys.stderr,
                )
    print(score(record))


if __name__ == "__main__":
    main()
