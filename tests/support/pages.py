"""Pages of docs/ that are made from the program: `make docs` writes them, a test compares them.

docs/commands.md has the help of every command and the exit codes, docs/messages.md every error with
its hint. Both are read off the code: the parser, the docstring of errors.py, and the places that
raise. No module of the package is named here but these two, so moving one changes no page.
"""

import ast
import functools
import html
import re
from collections.abc import Iterator
from textwrap import fill
from typing import Any, NamedTuple

import typer.main

from aapt_deploy import errors
from aapt_deploy.cli.commands import app
from tests.support import ROOT

WIDTH = 100  # columns
FIRST = ("export", "build-engine", "profile", "stream")  # in the order of a deployment
RENEW = "make docs"
COMPUTED = "{...}"
NOTE = f"<!-- Made from the program by `{RENEW}`; a test compares. Do not edit. -->"

COMMANDS_INTRO = (
    "Frames and `--json` go to stdout. Everything for people goes to stderr. The exit code is the "
    "verdict. The help texts below are what `aapt COMMAND --help` prints."
)
FAILURE = (
    "Every failure is one `error:` line, one `hint:` line and an exit code. A traceback is a bug: "
    "please report it. [messages.md](messages.md) lists all errors with their hints."
)
MESSAGES_INTRO = (
    "Every error that a command raises, and the hint that it prints below. A word in braces stands "
    "for a name or a value, `{...}` for a computed one. *as printed*: the hint depends on the case."
)
REMEDIES_INTRO = (
    "When TensorRT gives up, its own last words follow the error. The first pattern below that "
    "matches them chooses the hint. Without a match, the hint asks for a report."
)


class Raised(NamedTuple):
    """One place in the code that raises an error for the user."""

    exit_code: int
    message: str
    hint: str


def commands() -> str:
    """Return docs/commands.md."""
    parts = ["# Commands", NOTE, fill(COMMANDS_INTRO, WIDTH), "## Exit codes", exit_codes()]
    parts += ["## Messages", fill(FAILURE, WIDTH)]
    for path, command in walk("aapt", typer.main.get_command(app)):
        parts += [f"## {path}", f"```text\n{help_text(path, command)}\n```"]
    return "\n\n".join(parts) + "\n"


@functools.cache
def messages() -> str:
    """Return docs/messages.md."""
    parts = ["# Messages", NOTE, fill(MESSAGES_INTRO, WIDTH)]
    package = parsed()
    found = sorted(set(raised(package)))
    for code, meaning in meanings().items():
        rows = [(row.message, row.hint) for row in found if row.exit_code == code]
        if rows:
            parts += [f"## Exit {code}: {meaning}", table("message", rows)]
    parts += ["## What TensorRT says", fill(REMEDIES_INTRO, WIDTH)]
    return "\n\n".join([*parts, table("pattern", remedies(package))]) + "\n"


def walk(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Yield every command with its full name, the four steps of a deployment first."""
    below = getattr(command, "commands", None)
    if below is None:
        yield path, command
        return
    for name in sorted(below, key=lambda name: (*FIRST, name).index(name)):
        yield from walk(f"{path} {name}", below[name])


def help_text(path: str, command: Any) -> str:
    """Return what `--help` prints on a terminal of WIDTH columns."""
    width = {"terminal_width": WIDTH, "max_content_width": WIDTH}
    with command.make_context(path, [], resilient_parsing=True, **width) as context:
        return "\n".join(line.rstrip() for line in command.get_help(context).splitlines())


def kinds() -> dict[str, int]:
    """Return name -> exit code of every error in errors.py."""
    found = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    return {n: k.exit_code for n, k in found.items() if issubclass(k, errors.AaptError)}


def meanings() -> dict[int, str]:
    """Return exit code -> meaning, from the tree in the docstring of errors.py."""
    rows = re.findall(r"[├└]── \w+ +(\d+) +(.+)", errors.__doc__ or "")
    assert {int(code) for code, _ in rows} == {*kinds().values()} - {1}
    return {int(code): meaning.strip() for code, meaning in rows}


def exit_codes() -> str:
    """Return the table of exit codes."""
    rows = {"0": "done; what was measured is within its limits"}
    rows |= {str(code): meaning for code, meaning in meanings().items()}
    rows["130, 143"] = "stopped by Ctrl-C or SIGTERM; a streamed file is complete"
    lines = [f"| {code} | {meaning} |" for code, meaning in rows.items()]
    return "\n".join(["| exit | meaning |", "|---|---|", *lines])


def table(what: str, rows: list[tuple[str, str]]) -> str:
    """Return a table of messages and hints, as Markdown."""
    lines = [f"| {what} | hint |", "|---|---|"]
    for said, hint in rows:
        told = "*as printed*" if hint == COMPUTED else html.escape(hint, quote=False)
        cells = [cell.replace("|", "\\|") for cell in (f"`{said}`", told)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def remedies(package: "Package") -> list[tuple[str, str]]:
    """Return what TensorRT says, as patterns, and the hint for each."""
    found = []
    for call, scopes in package.calls({"Remedy"}):
        said, hint = (package.text(argument, scopes) for argument in call.args[:2])
        found.append((said, hint))
    assert found, "the package has no Remedy(said, hint)"
    return found


def raised(package: "Package") -> Iterator[Raised]:
    """Yield every error with a message of its own that the package raises for a user."""
    codes = kinds()
    for call, scopes in package.calls(set(codes)):
        if len(call.args) < 2:
            continue  # no hint: an answer of one process to another
        message, hint = (package.text(argument, scopes) for argument in call.args[:2])
        if message != COMPUTED and hint:
            yield Raised(codes[getattr(call.func, "id", "")], message, hint)


class Package:
    """The parsed source of the package, and what its string expressions say."""

    def __init__(self) -> None:
        files = sorted((ROOT / "aapt_deploy").rglob("*.py"))
        self.modules = [ast.parse(path.read_text(encoding="utf-8")) for path in files]

    def calls(self, names: set[str]) -> Iterator[tuple[ast.Call, list[ast.AST]]]:
        """Yield every call of one of `names` with its module and the functions around it."""
        for module in self.modules:
            pending: list[tuple[ast.AST, list[ast.AST]]] = [(module, [module])]
            while pending:
                node, scopes = pending.pop()
                if isinstance(node, ast.Call) and getattr(node.func, "id", None) in names:
                    yield node, scopes
                inner = [*scopes, node] if isinstance(node, ast.FunctionDef) else scopes
                pending += [(child, inner) for child in reversed([*ast.iter_child_nodes(node)])]

    def text(self, node: ast.AST | None, scopes: list[ast.AST]) -> str:
        """Return the string that `node` makes, with {name} for every value inside it."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return " ".join(node.value.split()) if node.value.strip() else node.value
        if isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else p for p in node.values)
            return "".join(p if isinstance(p, str) else self.text(p, scopes) for p in parts)
        if isinstance(node, ast.FormattedValue):
            known = self.text(node.value, scopes)
            return known if known != COMPUTED else placeholder(node.value)
        if isinstance(node, ast.Name):
            return self.assigned(node.id, scopes)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return self.returned(node.func.id)
        return COMPUTED

    def assigned(self, name: str, scopes: list[ast.AST]) -> str:
        """Return the one string that is assigned to `name`, looking outward from `scopes`."""
        for scope in reversed(scopes):
            values = _assignments(scope, name)
            if values or name in _arguments(scope):
                return self.text(values[0], scopes) if len(values) == 1 else COMPUTED
        values = [value for module in self.modules for value in _assignments(module, name)]
        told = {self.text(value, []) for value in values if _is_text(value)}
        return told.pop() if len(told) == 1 else COMPUTED  # else an import that we do not follow

    def returned(self, name: str) -> str:
        """Return the string that function `name` returns, if it does nothing else."""
        for module in self.modules:
            for node in module.body:
                if not isinstance(node, ast.FunctionDef) or node.name != name:
                    continue
                last = node.body[-1]
                if isinstance(last, ast.Return) and _is_text(last.value) and len(node.body) <= 2:
                    return self.text(last.value, [module, node])
        return COMPUTED


@functools.cache
def parsed() -> Package:
    """Return the package, parsed once a process."""
    return Package()


def placeholder(node: ast.AST) -> str:
    """Return {name} for a plain variable or attribute, else {...}."""
    name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", "...")
    return f"{{{name.strip('_').lower()}}}"


def _assignments(scope: ast.AST, name: str) -> list[ast.expr]:
    """Return what is assigned to `name` in a function, or at the top level of a module."""
    inside = ast.iter_child_nodes(scope) if isinstance(scope, ast.Module) else ast.walk(scope)
    found = [node for node in inside if isinstance(node, ast.Assign)]
    return [n.value for n in found for t in n.targets if isinstance(t, ast.Name) and t.id == name]


def _arguments(scope: ast.AST) -> set[str]:
    if not isinstance(scope, ast.FunctionDef):
        return set()
    every = [*scope.args.posonlyargs, *scope.args.args, *scope.args.kwonlyargs]
    return {argument.arg for argument in every}


def _is_text(node: ast.AST | None) -> bool:
    whole = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return whole or isinstance(node, ast.JoinedStr)


PAGES = {"docs/commands.md": commands, "docs/messages.md": messages}

if __name__ == "__main__":
    for page, make in PAGES.items():
        (ROOT / page).write_text(make(), encoding="utf-8")
        print(page)
