"""Measures of the layout: `python -m tests.house` prints them, and tests/test_house.py holds the limits."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "mpdit_jax"


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: Mapping[str, Path], *, lazy: bool = True) -> set[str]:
    """The package's modules that a file imports, by dotted name.

    Args:
        path: the file.
        known: every module, see `modules`.
        lazy: count imports inside functions and under TYPE_CHECKING too.
    """
    tree = ast.parse(path.read_text())
    nodes: Iterator[ast.AST] = ast.walk(tree) if lazy else iter(tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == PACKAGE:
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                found.add(module if module in known else node.module)
    return found


def outside_imports(path: Path) -> set[str]:
    """The top-level names of all packages that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def room(module: str) -> str:
    """Return the folder of a module; a module at the root counts as a folder of its own."""
    return module.removeprefix(f"{PACKAGE}.").partition(".")[0]


def room_imports() -> dict[str, dict[str, set[str]]]:
    """Return the folders that each folder imports, with the imports ("a.b -> c.d"); lazy imports count.

    The package's `__init__.py`, which imports names of every folder, is left out.
    """
    known = modules()
    found: dict[str, dict[str, set[str]]] = {room(module): {} for module in known if module != PACKAGE}
    for module, path in known.items():
        if module == PACKAGE:
            continue
        for other in imported(path, known) - {PACKAGE}:
            if room(other) != room(module):
                found[room(module)].setdefault(room(other), set()).add(f"{module} -> {other}")
    return found


def room_cycles() -> list[list[str]]:
    """Return the groups of folders that import each other in a circle (strongly connected components)."""
    graph = {name: set(others) for name, others in room_imports().items()}
    reach = {name: _reachable(graph, name) for name in graph}
    groups = {frozenset({name, *(other for other in reach[name] if name in reach[other])}) for name in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def closure(module: str) -> set[str]:
    """Return the modules of the package that importing one loads, itself included, without `__init__` files."""
    known = modules()
    found, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        waiting.extend(imported(known[name], known, lazy=False) - {PACKAGE})
    return {name for name in found if known[name].name != "__init__.py"}


def function_lines(module: str, name: str) -> int:
    """Lines of a module-level function, docstring included."""
    for node in ast.parse(modules()[module].read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            assert node.end_lineno is not None
            return node.end_lineno - node.lineno + 1
    raise KeyError(f"{module} has no function {name}")


def package_lines() -> int:
    """Lines of Python in the package, docstrings and blank lines included."""
    return sum(len(path.read_text().splitlines()) for path in modules().values())


def root_files() -> list[str]:
    """Python files that lie directly in the package's folder."""
    return sorted(path.name for path in (ROOT / PACKAGE).glob("*.py"))


def _reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for other in graph.get(waiting.pop(), ()):
            if other not in found:
                found.add(other)
                waiting.append(other)
    return found


def main() -> None:
    """Print every measure."""
    known = modules()
    loop = f"{PACKAGE}.train.loop"
    print(f"Python files at the package's root  {len(root_files())}  ({', '.join(root_files())})")
    print(f"lines of package Python             {package_lines()}")
    print(f"lines of train()                    {function_lines(loop, 'train')}")
    print(f"own imports of train/loop.py        {len(imported(known[loop], known))}")
    print(f"import closure of model.mpdit       {len(closure(f'{PACKAGE}.model.mpdit'))}")
    cycles = room_cycles()
    print(f"cycles of folders                   {len(cycles)}")
    links = room_imports()
    for group in cycles:
        print(f"  {' <-> '.join(group)}")
        for name in group:
            for other in sorted(set(links[name]) & set(group)):
                print(f"    {name} -> {other}: {', '.join(sorted(links[name][other]))}")


if __name__ == "__main__":
    main()
