"""Files and folders that are replaced whole, whatever happens in between."""

import errno
import hashlib
import os
import stat
import subprocess
import sys

import pytest
import torch

from gspn_core.runs import files
from gspn_core.runs.errors import WriteError
from gspn_core.runs.files import (
    check_record,
    hash_file,
    locked,
    make_folder,
    read_json,
    read_tensors,
    replacing,
    replacing_folder,
    write_json,
    write_tensors,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_or_stays(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def interrupted():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (path.read_text(), names(tmp_path)) == ("old", ["a.txt"])
    write_text(path, "né\u2028w")
    assert path.read_bytes() == "né\u2028w".encode()


def test_a_folder_is_replaced_or_stays(tmp_path):
    path = tmp_path / "model"
    for content in ("old", "new"):
        with replacing_folder(path) as temporary:
            (temporary / content).write_text(content)
    assert names(path) == ["new"]

    def broken():
        with replacing_folder(path) as temporary:
            (temporary / "half").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert (names(path), names(tmp_path)) == (["new"], ["model"])


def test_names_of_writers_do_not_collide_and_keep_a_suffix(tmp_path):
    with replacing(tmp_path / "m.onnx", ".onnx") as one:
        assert one.suffix == ".onnx" and str(os.getpid()) in one.name
        one.write_text("x")


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_files_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
        write_json(tmp_path / "a.json", [1])
        with replacing_folder(tmp_path / "folder") as temporary:
            files.store_tensors(temporary / "b.safetensors", {"x": torch.zeros(2)})
    finally:
        os.umask(before)
    for path in ("a.safetensors", "a.json", "folder/b.safetensors"):
        assert stat.S_IMODE((tmp_path / path).stat().st_mode) == 0o666 & ~mask


def test_a_full_disk(tmp_path):
    """On a file system of 32 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        write_tensors(disk / "a.safetensors", {"x": torch.zeros(5000)})
        with pytest.raises(WriteError, match=r"cannot write .*a\.safetensors: .*No space left"):
            write_tensors(disk / "a.safetensors", {"x": torch.ones(5000)})
        with (
            pytest.raises(WriteError, match=r"cannot write .*model: .*No space left"),
            replacing_folder(disk / "model") as temporary,
        ):
            files.store_tensors(temporary / "a.safetensors", {"x": torch.ones(5000)})
        assert names(disk) == ["a.safetensors"]
        assert torch.equal(read_tensors(disk / "a.safetensors")["x"], torch.zeros(5000))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_errors_of_the_system_name_the_file(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(WriteError, match=r"cannot write .*a\.txt: .*Input/output error"):
        write_text(tmp_path / "a.txt", "text")
    assert names(tmp_path) == []


def test_reading(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json is damaged"):
        read_json(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match=r"no a\.safetensors in"):
        read_tensors(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"damage")
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged"):
        read_tensors(tmp_path / "a.safetensors")


def test_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(ValueError, match="out must name a folder, got the file"):
        make_folder(tmp_path / "out")


def test_records(tmp_path):
    record = tmp_path / "out" / "settings.json"
    settings = {"seed": 1, "size": [2, 3], "source": "a"}
    check_record(record, settings)
    write_json(record, settings)
    check_record(record, settings)
    check_record(record, settings | {"source": "b"}, free=("source",))
    with pytest.raises(ValueError, match="holds results of other settings: seed was 1, is 2; give another folder as"):
        check_record(record, settings | {"seed": 2})


def test_a_folder_is_written_by_one_run_at_a_time(tmp_path):
    """The lock ends with its process, even if that is killed; the message names the owner."""
    program = (
        "import sys, time; from pathlib import Path; from gspn_core.runs.files import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    message = rf"run is being written by process {holder.pid} on .+; wait for it, or give another folder as `out`"
    with pytest.raises(ValueError, match=message), locked(folder):
        pass
    holder.kill()
    holder.communicate()
    with locked(folder):
        pass
    with locked(folder):
        pass


def test_only_the_main_process_locks(tmp_path, monkeypatch):
    with locked(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with locked(tmp_path):
            pass


def test_hash_of_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 3_000_000)
    assert hash_file(tmp_path / "file") == hashlib.sha256(b"x" * 3_000_000).hexdigest()
