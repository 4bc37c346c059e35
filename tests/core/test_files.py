import hashlib
import json
from pathlib import Path

import pytest

from bevel.core.files import atomic, sha256, write_json, write_text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_name_appears_only_when_the_content_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.bin"
    with atomic(path) as temporary:
        temporary.write_bytes(b"content")
        assert not path.exists()
        assert temporary.suffix == ".bin"  # exporters look at it
    assert path.read_bytes() == b"content"
    assert path.stat().st_mode & 0o777 == 0o644


def test_sha256_and_json(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"b": 1, "a": "ü"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"b": 1, "a": "ü"}
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_json_that_no_parser_reads_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"loss": float("nan")})
    assert not path.exists()
