"""Where the cache is: variables, home, and who has none."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from efficli.errors import OutputError
from efficli.store import default_root


@pytest.fixture
def bare(monkeypatch):
    for name in ("EFFICLI_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def homeless(bare, tmp_path):
    """A user with no home, and a folder for temporary files."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    bare.setattr(Path, "home", no_home)
    bare.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"efficli-cache-{os.geteuid()}"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"EFFICLI_CACHE_DIR": "/fast/cache", "XDG_CACHE_HOME": "/x"}, "/fast/cache/steps"),
        ({"EFFICLI_CACHE_DIR": "~/fast"}, "/home/me/fast/steps"),
        ({"EFFICLI_CACHE_DIR": "", "XDG_CACHE_HOME": "/x"}, "/x/efficli/steps"),
        ({"XDG_CACHE_HOME": "not/absolute"}, "/home/me/.cache/efficli/steps"),
        ({"XDG_CACHE_HOME": ""}, "/home/me/.cache/efficli/steps"),
        ({}, "/home/me/.cache/efficli/steps"),
    ],
)
def test_variables_come_first(bare, variables, expected):
    bare.setenv("HOME", "/home/me")
    for name, value in variables.items():
        bare.setenv(name, value)
    assert default_root() == Path(expected)


def test_a_relative_folder_is_that_of_the_run(bare, tmp_path):
    bare.chdir(tmp_path)
    bare.setenv("EFFICLI_CACHE_DIR", "cache")
    assert default_root() == tmp_path / "cache" / "steps"


def test_without_a_home_a_private_folder_is_made_once(homeless):
    assert default_root() == default_root() == homeless / "steps"
    assert stat.S_IMODE(homeless.stat().st_mode) == 0o700


@pytest.mark.parametrize("taken", ["link", "writable", "file"])
def test_a_name_that_others_can_write_to_is_not_used(homeless, taken):
    if taken == "link":
        homeless.symlink_to(homeless.parent)
    elif taken == "file":
        homeless.write_text("")
    else:
        homeless.mkdir()
        homeless.chmod(0o777)
    with pytest.raises(OutputError) as told:
        default_root()
    assert told.value.line == f"no home directory, and {homeless} is not a folder that only this user can write to"
    assert told.value.hint == "set EFFICLI_CACHE_DIR to a folder of your own"


def test_without_a_home_and_without_a_folder_for_temporary_files(homeless):
    homeless.parent.rmdir()
    with pytest.raises(OutputError, match=r"no home directory, and .* cannot be made: No such file or directory"):
        default_root()
