"""Compiled programs are kept where nobody else can write, or not at all."""

import os
import pwd

import jax
import pytest

from jaxlm import program_cache

SETTINGS = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")


@pytest.fixture
def keep(monkeypatch, caplog, tmp_path):
    """program_cache.keep() with a cache of its own -> (where jax keeps them, lines)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_MAX_SIZE", raising=False)
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", lambda _: None)
    caplog.set_level("INFO", "jaxlm")
    old = {name: getattr(jax.config, name) for name in SETTINGS}

    def keep():
        jax.config.update("jax_compilation_cache_dir", None)
        caplog.clear()
        program_cache.keep()
        return jax.config.jax_compilation_cache_dir, caplog.messages

    yield keep
    for name, value in old.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_a_closed_directory(keep, tmp_path):
    folder = tmp_path / "cache" / "jaxlm" / "programs"
    umask = os.umask(0)
    try:
        assert keep() == (str(folder), [])
    finally:
        os.umask(umask)
    for path in (folder, folder.parent, folder.parent.parent):
        assert path.stat().st_mode & 0o777 == 0o700
    assert 1e9 < jax.config.jax_compilation_cache_max_size < 1e11
    assert keep() == (str(folder), [])


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o707, 0o1777])
def test_a_directory_that_is_open_to_others_is_refused(keep, tmp_path, mode):
    folder = tmp_path / "cache" / "jaxlm" / "programs"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    line = (
        f"compiled programs are not kept: {folder} is open to others (mode {mode:04o}); remove it"
    )
    assert keep() == (None, [line])


def test_a_directory_of_another_user_is_refused(keep, tmp_path, monkeypatch):
    keep()
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    where, lines = keep()
    assert where is None and lines[0].endswith("programs belongs to another user; remove it")


def test_a_directory_that_others_can_replace_is_refused(keep, tmp_path):
    keep()
    (tmp_path / "cache").chmod(0o777)
    where, lines = keep()
    assert where is None
    assert f"{tmp_path}/cache, which holds " in lines[0] and "chmod go-w" in lines[0]
    (tmp_path / "cache").chmod(0o1777)  # as /tmp: what is in it can be replaced by its owner only
    assert keep()[0]


def test_a_link_is_judged_by_what_it_points_to(keep, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o755)
    (tmp_path / "cache" / "jaxlm").mkdir(parents=True)
    (tmp_path / "cache" / "jaxlm" / "programs").symlink_to(tmp_path / "elsewhere")
    assert keep()[0] is None
    (tmp_path / "elsewhere").chmod(0o700)
    assert keep() == (str(tmp_path / "elsewhere"), [])


def test_a_file_in_its_place_and_a_missing_home_are_one_line(keep, tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "jaxlm").write_text("")
    folder = tmp_path / "cache" / "jaxlm" / "programs"
    assert keep() == (None, [f"compiled programs are not kept: {folder}: Not a directory"])
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: {}["no such user"])
    assert keep()[1][0].endswith("set HOME or XDG_CACHE_HOME to a directory")


def test_a_cache_that_is_no_absolute_path_is_not_made_in_the_working_directory(
    keep, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for text in ("relative", "~/cache", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", text)
        assert keep() == (str(tmp_path / "home" / ".cache" / "jaxlm" / "programs"), [])
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_links_in_a_circle_and_what_cannot_be_removed_are_one_line(keep, tmp_path):
    (tmp_path / "cache").symlink_to(tmp_path / "cache")
    where, lines = keep()
    assert where is None and lines[0].startswith("compiled programs are not kept: ")
    (tmp_path / "cache").unlink()
    folder = tmp_path / "cache" / "jaxlm" / "programs"
    assert keep()[0] == str(folder)
    (folder / "a-cache").mkdir()
    where, lines = keep()
    assert where is None and f"{folder}/a-cache: " in lines[0]


def test_what_the_user_chose_is_left_alone(keep, tmp_path, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", "chosen")
    program_cache.keep()
    assert jax.config.jax_compilation_cache_dir == "chosen"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "-1")
    jax.config.update("jax_compilation_cache_max_size", -1)
    assert keep()[0] and jax.config.jax_compilation_cache_max_size == -1


def test_a_program_that_a_kill_cut_off_is_compiled_again(keep, tmp_path):
    folder = tmp_path / "cache" / "jaxlm" / "programs"
    keep()
    for name in ("a-cache", "a-atime", "b-cache"):
        (folder / name).write_bytes(b"half")
    keep()
    assert sorted(path.name for path in folder.iterdir()) == ["a-atime", "a-cache"]
