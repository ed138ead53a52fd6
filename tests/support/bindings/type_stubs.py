"""Type stubs of the bindings, made from the bindings themselves.

The type checker uses them, and the strict fakes in recorder.py.

pybind11-stubgen reads the loaded module. What it writes needs mending before a parser takes it: a
parameter named `in`, types it could not name, a required parameter behind an optional one, and a
module attribute `bool` that hides the builtin. A tuple is accepted wherever the real bindings
convert one to `Dims`. `tensorrt.plugin` is Python without annotations; its stub says that anything
goes, because its behaviour is run for real.
"""

import ast
import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support import ROOT
from tests.support.bindings import wheels

CONVERTED = {  # what the real bindings take in the place of a type
    "Dims": "Dims | collections.abc.Sequence[int]",
    "FallbackString": "FallbackString | str",
    "PluginFieldCollection_": "PluginFieldCollection_ | PluginFieldCollection",
    "typing.SupportsInt": "int",
    "typing_extensions.Buffer": "typing_extensions.Buffer | numpy.ndarray",
}
ADDED = """
__version__: str
def volume(iterable: collections.abc.Iterable[int]) -> int: ...
def nptype(trt_type: DataType) -> type[typing.Any]: ...
"""
# What stubgen could not name because it is defined later: (class, method) -> parameter or
# "return" -> type.
NAMED = {
    ("OnnxParser", "get_error"): {"return": "ParserError"},
    ("OnnxParser", "set_flag"): {"flag": "OnnxParserFlag"},
    ("IPluginV3", "get_capability_interface"): {"type": "PluginCapabilityType"},
    ("IPluginV3OneRuntime", "attach_to_context"): {"resource_context": "IPluginResourceContext"},
    ("IPluginCreatorV3One", "create_plugin"): {"phase": "TensorRTPhase"},
}
NULLABLE = {  # answer None when they fail, and do not say so
    "Builder.build_serialized_network", "Runtime.deserialize_cuda_engine",
    "ICudaEngine.create_execution_context",
    "IBuilderConfig.create_timing_cache", "IPluginRegistry.get_creator", ".get_plugin_registry",
}  # fmt: skip
METHODS = {  # that the C++ side supplies and stubgen does not see
    "IHostMemory": "def __buffer__(self, flags: int, /) -> memoryview: ...",
    "Dims": "def __iter__(self) -> collections.abc.Iterator[int]: ...",
}


def type_stubs(release: str) -> Path:
    """The folder to put on MYPYPATH for `release`; it holds `tensorrt/__init__.pyi`."""
    bindings = wheels.bindings(release)
    folder = (
        bindings / f"types-{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]}"
    )  # made anew when this file changes
    if not (folder / "tensorrt").is_dir():
        with tempfile.TemporaryDirectory(dir=bindings, prefix=".types-") as new:
            subprocess.run(
                [sys.executable, "-m", __spec__.name, release, new],
                cwd=ROOT,
                check=True,
                capture_output=True,
                text=True,
            )
            package = Path(new, "tensorrt")
            (package / "plugin").mkdir(parents=True)
            raw = Path(new, "tensorrt_bindings", "tensorrt.pyi").read_text(encoding="utf-8")
            (package / "__init__.pyi").write_text(mended(raw), encoding="utf-8")
            (package / "plugin" / "__init__.pyi").write_text(
                "import typing\ndef __getattr__(name: str) -> typing.Any: ...\n", encoding="utf-8"
            )
            folder.mkdir(exist_ok=True)
            package.rename(folder / "tensorrt")
    return folder


def mended(raw: str) -> str:
    """pybind11-stubgen's output as valid, checkable source without the documentation."""
    raw = re.sub(r"\btensorrt_bindings\.tensorrt\.", "", re.sub(r"\bin: ", "in_: ", raw))
    raw = re.sub(
        r"(?m)^( *def \w+\()(.*)(\) -> .*:)$",
        lambda found: found[1] + _all_optional_behind_the_first(found[2]) + found[3],
        raw,
    )
    tree = ast.fix_missing_locations(_Mend().visit(ast.parse(raw)))
    tree.body += ast.parse(ADDED).body
    return f"# mypy: ignore-errors\n{ast.unparse(tree)}\n"


def _all_optional_behind_the_first(parameters: str) -> str:
    """`a: X = None, b: dict[Y, Z]` is no Python; the real function takes `b` by keyword."""
    mended: list[str] = []
    for part in re.split(r", (?=\*{0,2}\w+(?:: |=|$|,))", parameters):
        optional = any(" = " in before or "*" in before for before in mended)
        mended.append(
            f"{part} = ..." if optional and " = " not in part and "*" not in part else part
        )
    return ", ".join(mended)


class _Mend(ast.NodeTransformer):
    owner = ""

    def visit_Module(self, node: ast.Module) -> ast.Module:
        node.body = [
            entry
            for entry in node.body
            if not (isinstance(entry, ast.AnnAssign) and ast.unparse(entry.target) == "bool")
        ]
        self.generic_visit(node)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        node.body = _undocumented(node.body)
        node.body += ast.parse(METHODS.get(node.name, "")).body
        self.owner = node.name
        for method in (entry for entry in node.body if isinstance(entry, ast.FunctionDef)):
            for name, kind in NAMED.get((node.name, method.name), {}).items():
                if name == "return":
                    method.returns = ast.Name(kind)
                for argument in (entry for entry in method.args.args if entry.arg == name):
                    argument.annotation = ast.Name(kind)
        self.generic_visit(node)
        self.owner = ""
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.body = _undocumented(node.body)
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            argument.annotation = argument.annotation and _type(argument.annotation)
        if node.returns and ast.unparse(node.returns) != "Dims":
            node.returns = _type(node.returns)
            if f"{self.owner}.{node.name}" in NULLABLE:
                node.returns = ast.BinOp(node.returns, ast.BitOr(), ast.Constant(None))
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        if ast.unparse(node.annotation) != "Dims":
            node.annotation = _type(node.annotation)
        return node


def _undocumented(body: list[ast.stmt]) -> list[ast.stmt]:
    return [
        entry
        for entry in body
        if not (isinstance(entry, ast.Expr) and isinstance(entry.value, ast.Constant))
    ] or [ast.Expr(ast.Constant(...))]


class _Type(ast.NodeTransformer):
    """Mends the types of an annotation.

    `...` inside one is a type that could not be named; some types stand for what is converted to
    them.
    """

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return ast.parse("typing.Any", mode="eval").body if node.value is ... else node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.parse(CONVERTED[node.id], mode="eval").body if node.id in CONVERTED else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        return (
            ast.parse(CONVERTED[name], mode="eval").body
            if (name := ast.unparse(node)) in CONVERTED
            else node
        )


def _type(annotation: ast.expr) -> ast.expr:
    changed = _Type().visit(annotation)
    assert isinstance(changed, ast.expr)
    return changed


if __name__ == "__main__":
    from tests.support.bindings import load

    load.load(wheels.bindings(sys.argv[1]))
    import pybind11_stubgen

    sys.argv = [
        "pybind11-stubgen",
        "tensorrt_bindings.tensorrt",
        "--ignore-all-errors",
        "--output-dir",
        sys.argv[2],
    ]
    pybind11_stubgen.main()
