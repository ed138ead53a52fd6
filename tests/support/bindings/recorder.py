"""Strict fakes of the classes that need a GPU: builder, parser, runtime, engine, context.

They are made from the type stubs of the real bindings.

A fake refuses what the real class would refuse: an unknown method or property, a wrong number of
arguments, an unknown keyword, an enum of another kind, a number for an enum, a write to a read-only
property. It notes every call and every write in a journal, which a test compares with a golden one.
What a method returns is scripted by the test, or follows from its return type; fakes compute
nothing.
"""

import ast
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

Script = dict[str, Any]  # "OnnxParser.parse_from_file" -> a value, or a function of the arguments


class Stubs:
    """The type stubs of one release, as far as a fake needs them."""

    def __init__(self, file: Path) -> None:
        self.classes = {
            node.name: node
            for node in ast.parse(file.read_text(encoding="utf-8")).body
            if isinstance(node, ast.ClassDef)
        }

    def line(self, kind: str) -> list[str]:
        """`kind` and its bases."""
        return [
            kind,
            *(
                up
                for base in self.classes[kind].bases
                if (name := ast.unparse(base)) in self.classes
                for up in self.line(name)
            ),
        ]

    def definitions(self, kind: str, name: str) -> list[ast.FunctionDef]:
        """All overloads of a method; both halves of a property."""
        for owner in self.line(kind):
            found = [
                entry
                for entry in self.classes[owner].body
                if isinstance(entry, ast.FunctionDef) and entry.name == name
            ]
            if found:
                return found
        return []

    def plain(self, kind: str, name: str) -> str | None:
        """The type of a read-write attribute that the stub writes as `name: type`."""
        for owner in self.line(kind):
            for entry in self.classes[owner].body:
                if isinstance(entry, ast.AnnAssign) and ast.unparse(entry.target) == name:
                    return ast.unparse(entry.annotation)
        return None

    def is_enum(self, kind: str) -> bool:
        return kind in self.classes and self.plain(kind, "__members__") is not None


class Recorder:
    """Makes fakes that write into one `journal`.

    `trt` is the real module, whose enums and plain classes the fakes ask for.
    """

    def __init__(self, trt: ModuleType, stubs: Stubs, script: Script) -> None:
        self.trt, self.stubs, self.script = trt, stubs, script
        self.journal: list[str] = []

    def constructor(self, kind: str) -> Callable[..., "Fake"]:
        """Stands for the class `kind` itself."""

        def construct(*arguments: Any, **keywords: Any) -> Fake:
            self.check(f"{kind}()", self.stubs.definitions(kind, "__init__"), arguments, keywords)
            return Fake(self, kind)

        return construct

    def make(self, kind: str, **values: Any) -> "Fake":
        """A fake whose properties have these values."""
        fake = Fake(self, kind)
        for name, value in values.items():
            assert self.stubs.plain(kind, name) is not None or self.stubs.definitions(kind, name), (
                f"{kind} has no {name}"
            )
            fake.written[name] = value
        return fake

    def check(
        self,
        what: str,
        overloads: list[ast.FunctionDef],
        arguments: Sequence[Any],
        keywords: dict[str, Any],
    ) -> ast.FunctionDef:
        """Note a call, and return the overload that takes it.

        Raises TypeError, as the bindings do.
        """
        shown = [
            *map(self.show, arguments),
            *(f"{name}={self.show(value)}" for name, value in keywords.items()),
        ]
        reasons = [self._misfit(overload, arguments, keywords) for overload in overloads]
        if None not in reasons:
            given, why = ", ".join(shown), "; ".join(map(str, reasons))
            raise TypeError(f"{what}: incompatible arguments ({given}): {why}")
        self.journal.append(f"{what.removesuffix('()')}({', '.join(shown)})")
        return overloads[reasons.index(None)]

    def _misfit(
        self, overload: ast.FunctionDef, arguments: Sequence[Any], keywords: dict[str, Any]
    ) -> str | None:
        parameters = [entry for entry in overload.args.args if entry.arg != "self"]
        optional = (
            {entry.arg for entry in parameters[len(parameters) - len(overload.args.defaults) :]}
            if overload.args.defaults
            else set()
        )
        if len(arguments) > len(parameters):
            return f"takes {len(parameters)}"
        given = dict(zip((entry.arg for entry in parameters), arguments, strict=False))
        if wrong := [
            name
            for name in keywords
            if name in given or name not in {entry.arg for entry in parameters}
        ]:
            return f"no keyword {wrong[0]}"
        given |= keywords
        if missing := [
            entry.arg
            for entry in parameters
            if entry.arg not in given and entry.arg not in optional
        ]:
            return f"needs {missing[0]}"
        wrong = [
            entry.arg
            for entry in parameters
            if entry.arg in given
            and entry.annotation
            and not self.fits(given[entry.arg], entry.annotation)
        ]
        return f"{wrong[0]} is of another type" if wrong else None

    def fits(self, value: Any, annotation: ast.expr) -> bool:
        """Whether the bindings would take `value`."""
        if isinstance(annotation, ast.BinOp):
            return self.fits(value, annotation.left) or self.fits(value, annotation.right)
        name = ast.unparse(annotation)
        simple: dict[str, Any] = {
            "str": str,
            "bool": bool,
            "int": int,
            "float": (int, float),
            "None": type(None),
        }
        if name in simple:
            return isinstance(value, simple[name]) and (
                name == "bool" or not isinstance(value, bool)
            )
        if name.endswith("Buffer"):
            return (
                isinstance(value, bytes | bytearray | memoryview)
                or getattr(value, "kind", "") == "IHostMemory"
            )
        if name.startswith("collections.abc.Sequence"):
            return isinstance(value, Sequence) and not isinstance(value, str)
        if name.split(".")[0] in self.stubs.classes:  # also ILogger.Severity
            if isinstance(value, Fake):
                return name in self.stubs.line(value.kind)
            real: Any = self.trt
            for part in name.split("."):
                real = getattr(real, part)
            return isinstance(value, real)
        return name == "typing.Any"

    def reply(
        self, key: str, returns: ast.expr | None, arguments: Sequence[Any], keywords: dict[str, Any]
    ) -> Any:
        if key in self.script:
            scripted = self.script[key]
            return (
                scripted(*arguments, **keywords)
                if callable(scripted) and not isinstance(scripted, Fake)
                else scripted
            )
        kind = ast.unparse(returns).removesuffix(" | None") if returns else "None"
        plain = {"None": None, "bool": True, "int": 0, "str": ""}
        if kind in plain:
            return plain[kind]
        if kind in self.stubs.classes and not self.stubs.is_enum(kind):
            return Fake(self, kind)
        raise AssertionError(f"script what {key} returns ({kind})")

    def show(self, value: Any) -> str:
        if isinstance(value, Fake):
            return value.kind
        if isinstance(value, bytes | bytearray | memoryview):
            return f"<{memoryview(value).nbytes} bytes>"
        if type(value).__module__.startswith("tensorrt"):
            return str(value)
        return (
            repr(value)
            if isinstance(value, str | int | float | bool | list | tuple | None)
            else type(value).__name__
        )


class Fake:
    """An object of class `kind`, as strict as the real one."""

    def __init__(self, recorder: Recorder, kind: str) -> None:
        object.__setattr__(self, "recorder", recorder)
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "written", {})

    kind: str
    recorder: Recorder
    written: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        recorder, key = self.recorder, f"{self.kind}.{name}"
        definitions = recorder.stubs.definitions(self.kind, name)
        annotation = recorder.stubs.plain(self.kind, name)
        is_property = definitions and any(
            ast.unparse(mark) == "property" for mark in definitions[0].decorator_list
        )
        if annotation is not None or is_property:
            if name in self.written:
                return self.written[name]
            returns = (
                definitions[0].returns
                if is_property
                else ast.parse(str(annotation), mode="eval").body
            )
            return recorder.reply(key, returns, (), {})
        if not definitions:
            raise AttributeError(f"'{self.kind}' object has no attribute '{name}'")

        def call(*arguments: Any, **keywords: Any) -> Any:
            fitting = recorder.check(key, definitions, arguments, keywords)
            return recorder.reply(key, fitting.returns, arguments, keywords)

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        recorder, key = self.recorder, f"{self.kind}.{name}"
        definitions = recorder.stubs.definitions(self.kind, name)
        setters = [
            entry
            for entry in definitions
            if any(ast.unparse(mark).endswith(".setter") for mark in entry.decorator_list)
        ]
        plain = recorder.stubs.plain(self.kind, name)
        wanted = (
            setters[0].args.args[1].annotation
            if setters
            else ast.parse(plain, mode="eval").body
            if plain
            else None
        )
        if wanted is None:
            raise AttributeError(f"{key} {'is read-only' if definitions else 'does not exist'}")
        if not recorder.fits(value, wanted):
            raise TypeError(f"{key} = {recorder.show(value)}: it wants {ast.unparse(wanted)}")
        recorder.journal.append(f"{key} = {recorder.show(value)}")
        self.written[name] = value
