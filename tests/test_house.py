"""The layout keeps its limits: few files at the root, imports that run one way, a training loop on one page."""

from tests.house import (
    PACKAGE,
    closure,
    function_lines,
    imported,
    modules,
    outside_imports,
    room_cycles,
    root_files,
)

LOOP = f"{PACKAGE}.train.loop"


def test_folders_import_each_other_one_way():
    assert room_cycles() == []


def test_limits():
    known = modules()
    assert len(root_files()) <= 10, root_files()
    assert function_lines(LOOP, "train") <= 80
    assert len(imported(known[LOOP], known)) <= 14
    assert len(closure(f"{PACKAGE}.model.mpdit")) <= 12


def test_one_module_imports_orbax():
    found = [name for name, path in modules().items() if outside_imports(path) & {"orbax", "etils"}]
    assert found == [f"{PACKAGE}.io.storage"]


def test_a_cycle_would_be_found(tmp_path, monkeypatch):
    """A cycle of two folders, one of whose imports is inside a function, is found."""
    from tests import house

    for name, text in (
        ("a/x.py", "from mpdit_jax.b import y\n"),
        ("b/y.py", "def f():\n    from mpdit_jax.a.x import z\n"),
        ("c.py", "import mpdit_jax.a.x\n"),
    ):
        path = tmp_path / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(house, "ROOT", tmp_path)
    assert house.room_cycles() == [["a", "b"]]
    assert house.room_imports()["b"] == {"a": {"mpdit_jax.b.y -> mpdit_jax.a.x"}}
