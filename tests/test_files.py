"""Writing whole or not at all, and paths as people type them."""

from pathlib import Path
from typing import Any

import pytest

from mlx_fastforward.files import replace, replacing, write_text


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("there", [False, True])
def test_what_breaks_off_leaves_nothing(
    tmp_path: Path, there: bool, error: Any
) -> None:
    """But the old file, where there was one."""
    file = tmp_path / "a.json"
    if there:
        file.write_text("old")
    with pytest.raises(error), replacing(file) as half:
        half.write_text("ne")
        assert half.parent == tmp_path and file.exists() == there
        raise error
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"] * there


def test_what_is_written_takes_the_files_place(tmp_path: Path) -> None:
    file = tmp_path / "not" / "there" / "a.json"
    for text in ("first", "Grüße"):
        write_text(file, text)
        assert file.read_text(encoding="utf-8") == text
    replace(file, lambda half: half.write_bytes(b"second"))
    assert [p.read_bytes() for p in file.parent.iterdir()] == [b"second"]
