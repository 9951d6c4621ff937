"""launch/environment.sh through launch/test.sh: which Python, which .venv, and when to install."""

import pytest


def test_installs_what_is_pinned_with_the_extras_asked_for(checkout):
    result = checkout.run("launch/test.sh")
    assert result.returncode == 0, result.stderr
    (install,) = checkout.installs()
    assert install[-4:] == ["-r", "requirements.txt", "-e", ".[test]"]
    assert "Installing mpdit_jax[test]" in result.stdout
    assert not (checkout.root / ".venv/mpdit_jax.unfinished").exists()


def test_second_run_installs_nothing(checkout):
    checkout.run("launch/test.sh")
    result = checkout.run("launch/test.sh")
    assert result.returncode == 0
    assert checkout.installs() == []
    assert "Installing" not in result.stdout
    assert "venv" not in [call[0] for call in checkout.modules()]


@pytest.mark.parametrize("name", ["requirements.txt", "setup.py"])
def test_changed_requirements_install_again_and_keep_the_extras(checkout, name):
    checkout.run("launch/test.sh", "--parity")
    with (checkout.root / name).open("a") as file:
        file.write("# changed\n")
    checkout.run("launch/test.sh")
    assert [call[-1] for call in checkout.installs()] == [".[test,parity]"]


def test_extras_add_up_and_never_go(checkout):
    checkout.run("launch/quickstart.sh")
    assert [call[-1] for call in checkout.installs()] == ["."]
    checkout.run("launch/test.sh")
    assert [call[-1] for call in checkout.installs()] == [".[test]"]
    checkout.run("launch/test.sh", "--parity")
    assert [call[-1] for call in checkout.installs()] == [".[test,parity]"]
    checkout.run("launch/quickstart.sh")
    assert checkout.installs() == []


def test_moved_checkout_is_installed_again(checkout):
    checkout.run("launch/test.sh")
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))
    checkout.run("launch/test.sh")
    assert len(checkout.installs()) == 1


def test_first_installation_that_broke_off_starts_over(checkout):
    failed = checkout.run("launch/test.sh", STUB_PIP_STATUS="1", STUB_PIP_OUTPUT="ERROR: no space left")
    assert failed.returncode == 1
    assert "ERROR: no space left" in failed.stderr
    assert "pip could not install" in failed.stderr
    leftover = checkout.root / ".venv/half-written"
    leftover.touch()
    result = checkout.run("launch/test.sh")
    assert result.returncode == 0
    assert "half-made" in result.stdout
    assert not leftover.exists()
    assert len(checkout.installs()) == 1


def test_update_that_broke_off_keeps_the_venv_and_is_repeated(checkout):
    checkout.run("launch/test.sh")
    users_own = checkout.root / ".venv/users-own"
    users_own.touch()
    (checkout.root / "requirements.txt").write_text("changed\n")
    assert checkout.run("launch/test.sh", STUB_PIP_STATUS="1").returncode == 1
    assert checkout.run("launch/test.sh").returncode == 0
    assert len(checkout.installs()) == 1
    assert users_own.exists()


def test_no_network_is_named(checkout):
    output = "WARNING: Retrying after connection broken by 'NewConnectionError(...: Network is unreachable)'"
    result = checkout.run("launch/test.sh", STUB_PIP_STATUS="1", STUB_PIP_OUTPUT=output)
    assert result.returncode == 1
    assert "package index is out of reach" in result.stderr


def test_only_old_pythons(checkout):
    result = checkout.run("launch/test.sh", STUB_VERSION="3.9")
    assert result.returncode == 1
    assert "needs Python 3.11 or newer, but found python3 is 3.9" in result.stderr
    assert "set PYTHON=" in result.stderr
    assert not (checkout.root / ".venv").exists()


def test_old_python3_is_passed_over_for_a_newer_name(checkout):
    (checkout.names / "python3").write_text("#!/bin/sh\necho 2.7\n")
    result = checkout.run("launch/test.sh")
    assert result.returncode == 0, result.stderr


def test_untested_python_is_used_with_a_word(checkout):
    result = checkout.run("launch/test.sh", STUB_VERSION="3.15")
    assert result.returncode == 0
    assert "python3 is Python 3.15; tested are 3.11 to 3.14" in result.stdout


def test_tested_python_is_preferred_to_an_untested_one(checkout):
    (checkout.names / "python3").write_text("#!/bin/sh\necho 3.15\n")
    result = checkout.run("launch/test.sh")
    assert "Making .venv with Python 3.12" in result.stdout


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PYTHON": "no-such-python"}, "PYTHON=no-such-python does not run"),
        ({"PYTHON": "python3", "STUB_VERSION": "3.10"}, "PYTHON=python3 is Python 3.10, but mpdit_jax needs 3.11"),
        ({"STUB_VENV_MISSING": "1"}, "sudo apt install python3.12-venv"),
    ],
)
def test_unusable_python_is_explained(checkout, variables, message):
    result = checkout.run("launch/test.sh", **variables)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert not (checkout.root / ".venv").exists()


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("#!/bin/sh\nexit 127\n", "is broken: its Python does not run"),
        ("#!/bin/sh\necho 3.10\n", "has Python 3.10, but mpdit_jax needs 3.11 or newer"),
        ('#!/bin/sh\ncase "$2" in *pip*) exit 1 ;; esac\necho 3.12\n', "has no pip"),
    ],
)
def test_unusable_venv_is_explained_and_left_alone(checkout, python, message):
    checkout.run("launch/test.sh")
    (checkout.root / ".venv/bin/python").write_text(python)
    result = checkout.run("launch/test.sh")
    assert result.returncode == 1
    assert message in result.stderr
    assert "rm -r .venv" in result.stderr
    assert (checkout.root / ".venv/bin/python").read_text() == python


def test_venv_of_another_python_than_asked_for_is_explained(checkout):
    checkout.run("launch/test.sh")
    (checkout.names / "python3.13").write_text("#!/bin/sh\necho 3.13\n")
    result = checkout.run("launch/test.sh", PYTHON="python3.13")
    assert result.returncode == 1
    assert "has Python 3.12, but PYTHON=python3.13 is 3.13" in result.stderr
    assert checkout.run("launch/test.sh").returncode == 0


def test_another_folder_for_another_python(checkout):
    checkout.run("launch/test.sh")
    (checkout.names / "python3.13").write_text((checkout.names / "python3.13").read_text().replace("3.12", "3.13"))
    result = checkout.run("launch/test.sh", PYTHON="python3.13", VENV=".venv-newer")
    assert result.returncode == 0, result.stderr
    assert "Making .venv-newer with Python 3.13" in result.stdout
    assert len(checkout.installs()) == 1
    assert checkout.run("launch/test.sh").returncode == 0
    assert checkout.installs() == []
