"""Files and folders appear whole or not at all, and say the same in the same bytes."""

import hashlib
import os
import stat

import pytest

from moult.errors import MoultError, some
from moult.files import (
    atomic_file,
    atomic_folder,
    canonical,
    glance,
    read_json,
    read_jsonl,
    sha256_file,
    sha256_folder,
    write_json,
    write_jsonl,
)


def names(folder) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# --- whole or not at all ----------------------------------------------------------------------------------------------


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path):
    with atomic_file(tmp_path / "deep/a.txt") as partial:
        partial.write_text("new")
        assert not (tmp_path / "deep/a.txt").exists()
        assert partial.parent == tmp_path / "deep"  # the same file system: a rename is one step
    assert (tmp_path / "deep/a.txt").read_text() == "new"
    assert names(tmp_path) == ["deep", "deep/a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_file_that_was_not_finished_leaves_the_old_one(tmp_path, error):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(error), atomic_file(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        raise error
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_rows_that_fail_midway_leave_no_file(tmp_path):
    def rows():
        yield {"a": 1}
        raise ValueError

    with pytest.raises(ValueError):
        write_jsonl(tmp_path / "a.jsonl", rows())
    with pytest.raises(ValueError):
        write_jsonl(tmp_path / "b.jsonl", [{"a": 1}, {"a": float("nan")}])
    assert names(tmp_path) == []


def test_a_folder_takes_the_place_of_the_old_one_when_it_is_whole(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old.txt").write_text("old")
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "sub").mkdir()
        (partial / "sub/new.txt").write_text("new")
        assert names(tmp_path / "out") == ["old.txt"]
    assert names(tmp_path) == ["out", "out/sub", "out/sub/new.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_folder_that_was_not_finished_leaves_the_old_one(tmp_path, error):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old.txt").write_text("old")
    with pytest.raises(error), atomic_folder(tmp_path / "out") as partial:
        (partial / "new.txt").write_text("half")
        raise error
    assert names(tmp_path) == ["out", "out/old.txt"]


def test_what_a_killed_process_left_is_no_part_of_the_next_folder(tmp_path):
    stale = tmp_path / f"out.tmp-{os.getpid()}"
    stale.mkdir()
    (stale / "stale.txt").write_text("stale")
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "new.txt").write_text("new")
    assert names(tmp_path) == ["out", "out/new.txt"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_readable_as_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_json(tmp_path / "a.json", {})
        with atomic_folder(tmp_path / "out") as partial:
            (partial / "plain").write_text("x")
            (partial / "sub").mkdir()
            (partial / "sub/secretive").write_text("x")
            (partial / "sub/secretive").chmod(0o600)  # as safetensors writes its files
    finally:
        os.umask(before)
    files = [tmp_path / name for name in ("a.json", "out/plain", "out/sub/secretive")]
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [mode] * 3
    assert os.umask(before) == before  # asking for it did not change it


# --- the same bytes ---------------------------------------------------------------------------------------------------


def test_json_has_one_spelling(tmp_path):
    assert canonical({"b": [1, {"d": None, "c": "ü"}], "a": True}) == '{"a":true,"b":[1,{"c":"ü","d":null}]}'
    write_json(tmp_path / "a.json", {"b": 1, "a": "ü"})
    write_json(tmp_path / "b.json", {"a": "ü", "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert (tmp_path / "a.json").read_text() == '{\n  "a": "ü",\n  "b": 1\n}\n'
    write_jsonl(tmp_path / "a.jsonl", [{"b": "x\u2028y", "a": 1}, [2]])
    assert (tmp_path / "a.jsonl").read_text() == '{"a":1,"b":"x\u2028y"}\n[2]\n'
    assert list(read_jsonl(tmp_path / "a.jsonl")) == [{"a": 1, "b": "x\u2028y"}, [2]]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_json_is_refused(tmp_path, number):
    with pytest.raises(ValueError):
        canonical({"a": [number]})
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"a": [number]})
    assert names(tmp_path) == []


def test_hashes(tmp_path):
    (tmp_path / "d/sub").mkdir(parents=True)
    (tmp_path / "d/sub/b").write_bytes(b"b")
    (tmp_path / "d/a").write_bytes(b"")
    (tmp_path / "d/.snakemake_timestamp").touch()
    expected = {"a": hashlib.sha256(b"").hexdigest(), "sub/b": hashlib.sha256(b"b").hexdigest()}
    assert sha256_folder(tmp_path / "d") == expected
    assert sha256_file(tmp_path / "d/sub/b") == expected["sub/b"]


# --- reading what is not there ----------------------------------------------------------------------------------------


def test_a_missing_and_a_cut_file_are_said_so(tmp_path):
    with pytest.raises(MoultError, match=r"no\.json does not exist\n  -> run the stage that writes it"):
        read_json(tmp_path / "no.json")
    (tmp_path / "cut.json").write_text('{\n "a": ')
    with pytest.raises(MoultError, match=r"cut\.json:2: not JSON \(Expecting value\)\n  -> delete it and run again"):
        read_json(tmp_path / "cut.json")
    for name, data in {"bytes.json": b"\xff", "deep.json": b"[" * 100_000}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(MoultError, match=rf"{name}: not JSON .*\n  -> delete it and run again"):
            read_json(tmp_path / name)


@pytest.mark.parametrize(
    ("items", "text"),
    [([], ""), ([1, 2], "1, 2"), (range(5), "0, 1, 2, 3, 4"), (range(1005), "0, 1, 2, 3, 4 and 1,000 more")],
)
def test_a_long_list_is_shown_in_part(items, text):
    assert some(items) == text


def test_a_glance_tells_files_apart(tmp_path):
    path = tmp_path / "weights"
    seen = set()
    for content in (b"", b"a", b"ab", bytes(10_000_000), b"\1" + bytes(9_999_999), bytes(9_999_999) + b"\1"):
        path.write_bytes(content)
        seen.add(glance(path))
    assert len(seen) == 6
    assert glance(tmp_path / "none") == glance(tmp_path) == ""
