"""Keys that say whether a published table still matches the current code and weights.

A section's key has two parts. The first is a hash of the code: the section's function, the definitions of its module
that it uses, and every module of this repository that these import, transitively. The second is a hash of the weight
files that the section reads. Comments, docstrings and formatting do not change a key.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dcdd_core", "dcdd_pico")
_DIGITS = 12

#: The key of numbers that were measured before keys were recorded.
NO_KEY = "none"


@dataclass(frozen=True)
class Provenance:
    """Where the numbers of a section come from.

    Attributes:
        section: name of the section.
        commit: the commit they were measured at, as `git describe` names it.
        key: the section's key at that time (`TableOptions.key`).
    """

    section: str
    commit: str
    key: str

    def __str__(self) -> str:
        """The line published below a table."""
        return f"Section `{self.section}`, measured at commit `{self.commit}`, key `{self.key}`."

    @classmethod
    def all_in(cls, text: str) -> list[Provenance]:
        """All such lines in a text."""
        lines = re.findall(r"^Section `([^`]+)`, measured at commit `([^`]+)`, key `([^`]+)`\.$", text, re.MULTILINE)
        return [cls(*found) for found in lines]


def code_hash(*functions: Callable[..., Any], root: Path = ROOT) -> str:
    """Hash of functions of one module, including everything of this repository that they use.

    Args:
        root: folder of the packages.
    """
    module, used = _used_definitions(functions, root)
    digest = hashlib.sha256()
    for node in used:
        digest.update(f"{module}\n{_canonical(node)}\n".encode())
    for imported in sorted(imported_modules(*functions, root=root)):
        digest.update(f"{imported}\n{_canonical(_tree(_path(imported, root)))}\n".encode())
    return digest.hexdigest()[:_DIGITS]


def imported_modules(*functions: Callable[..., Any], root: Path = ROOT) -> set[str]:
    """The modules of this repository that functions of one module import, transitively."""
    module, used = _used_definitions(functions, root)
    return _closure({name for node in used for name in _imports(node, module, root)}, root)


def files_hash(paths: Iterable[Path]) -> str:
    """Hash of files, and of all files in folders."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                name = file.relative_to(path.parent).as_posix()
                digest.update(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:_DIGITS]


def _path(module: str, root: Path) -> Path | None:
    """File of a module of this repository; None for any other."""
    if module.split(".")[0] not in PACKAGES:
        return None
    path = root / Path(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None


def _tree(path: Path) -> ast.Module:
    return _parsed(path, path.stat().st_mtime_ns)


@cache
def _parsed(path: Path, _: int) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def _used_definitions(functions: Sequence[Callable[..., Any]], root: Path) -> tuple[str, list[ast.stmt]]:
    """The functions' module, and its top-level statements that they depend on, including themselves and imports."""
    (module,) = {function.__module__ for function in functions}
    tree = _tree(_path(module, root))
    defines: dict[str, list[int]] = {}
    for i, node in enumerate(tree.body):
        for defined in _defined(node):
            defines.setdefault(defined, []).append(i)
    found: set[int] = set()
    waiting = [place for function in functions for place in defines[function.__name__]]
    while waiting:
        i = waiting.pop()
        if i not in found:
            found.add(i)
            names = {node.id for node in ast.walk(tree.body[i]) if isinstance(node, ast.Name)}
            waiting += [place for used in names for place in defines.get(used, ())]
    return module, [tree.body[i] for i in sorted(found)]


def _defined(node: ast.stmt) -> Iterator[str]:
    """Names that a top-level statement defines; for a block, all names that anything in it defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)
    else:
        yield from (n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


def _imports(tree: ast.AST, module: str, root: Path) -> Iterator[str]:
    """Modules of this repository that a tree imports, or names in strings, as `registry` does."""
    file = _path(module, root)
    package = module if file is not None and file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"(\.[^\W\d]\w*)+", node.value)
        ):
            names = [package + node.value]
        else:
            continue
        yield from (name for name in names if _path(name, root) is not None)


def _closure(modules: Iterable[str], root: Path) -> set[str]:
    """Modules, everything they import, and the packages they are in."""
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module in found or _path(module, root) is None:
            continue
        found.add(module)
        parts = module.split(".")
        waiting += [".".join(parts[:k]) for k in range(1, len(parts))]
        waiting += _imports(_tree(_path(module, root)), module, root)
    return found


def _canonical(node: Any) -> str:
    """A syntax tree as text, without docstrings and positions; the same in every Python version."""
    if isinstance(node, list):
        return "[" + " ".join(map(_canonical, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name, value in ast.iter_fields(node):
        if name in ("kind", "type_comment", "type_ignores", "ctx"):
            continue
        if name == "body" and isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            value = [part for part in value if not _is_text(part)]
        if value is not None and value != []:
            fields.append(f"{name}={_canonical(value)}")
    return f"{type(node).__name__}({' '.join(fields)})"


def _is_text(node: ast.stmt) -> bool:
    """Whether a statement is a bare string: a docstring, or a description below an attribute."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
