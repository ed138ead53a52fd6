"""A pytest plugin for the process in which the real bindings of one release are loaded.

Call it as `pytest -p tests.support.bindings.inside --release 11.4 contract_*.py`.

test_tensorrt.py starts one such process a release. A stub factory returns nothing, so the registry
is a small fake here; everything that subclasses or fills TensorRT's own classes runs against the
real ones.
"""

from types import ModuleType
from typing import Any

import pytest

from tests.support.bindings import load, wheels
from tests.support.errors import errors_in_words as errors_in_words


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--release", required=True, choices=list(wheels.RELEASES))
    parser.addoption(
        "--write-golden",
        action="store_true",
        help="write the golden call logs anew; read the difference before you keep it",
    )


def pytest_configure(config: pytest.Config) -> None:
    load.load(wheels.bindings(config.getoption("--release")))


@pytest.fixture
def release(request: pytest.FixtureRequest) -> str:
    """The first two numbers of the bindings' version."""
    return str(request.config.getoption("--release"))


@pytest.fixture
def trt() -> ModuleType:
    """The real bindings."""
    import tensorrt

    return tensorrt


class Registry:
    """A plugin registry that keeps what it is given."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, plugin_namespace: str = "") -> bool:
        return (
            self.creators.setdefault(
                (creator.name, creator.plugin_version, plugin_namespace), creator
            )
            is creator
        )

    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> Any:
        return self.creators.get((type, version, plugin_namespace))


@pytest.fixture
def registry(trt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry in the place of the one that the stubs lack."""
    made = Registry()
    monkeypatch.setattr(trt, "get_plugin_registry", lambda: made)
    return made


class Builder:
    """An expression builder that remembers how an expression was made.

    It computes the expression when all its parts are known.
    """

    def __init__(self, trt: ModuleType) -> None:
        class Expression(trt.IDimensionExpr):  # type: ignore[misc]
            made: Any
            value: int | None

            def is_constant(self) -> bool:
                return self.value is not None

            def get_constant_value(self) -> int:
                assert self.value is not None
                return self.value

            def is_size_tensor(self) -> bool:
                return False

        self.kind, self.trt = Expression, trt

    def _make(self, made: Any, value: int | None) -> Any:
        expression = self.kind.__new__(self.kind)  # the real class has no constructor
        expression.made, expression.value = made, value
        return expression

    def constant(self, value: int) -> Any:
        return self._make(value, value)

    def operation(self, kind: Any, first: Any, second: Any) -> Any:
        known = {
            "SUM": lambda a, b: a + b,
            "PROD": lambda a, b: a * b,
            "CEIL_DIV": lambda a, b: -(-a // b),
            "FLOOR_DIV": lambda a, b: a // b,
        }
        known |= {"SUB": lambda a, b: a - b}
        assert isinstance(kind, self.trt.DimensionOperation)
        value = (
            None
            if None in (first.value, second.value)
            else known[kind.name](first.value, second.value)
        )
        return self._make((kind.name, first.made, second.made), value)


@pytest.fixture
def builder(trt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Builder:
    """An expression builder.

    `DimsExprs` becomes a list: the real one may crash when fake expressions are read back.
    """

    class DimsExprs(list[Any]):
        def __init__(self, start: Any = ()) -> None:
            super().__init__([None] * start if isinstance(start, int) else start)

    monkeypatch.setattr(trt, "DimsExprs", DimsExprs)
    return Builder(trt)
