"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to, in the folder of `path`, which is made; when the block ends it becomes `path`.

    Where the block fails, what it wrote is removed, and what was at `path` stays.

    Raises:
        OSError: if the block cannot write, such as on a full disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(path.parent).free / 1e9
        raise OSError(
            f"{path} could not be written ({error}): {free:.1f} GB are free there; make room and do the same again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Writes a text file whole or not at all; makes its folder.

    Raises:
        OSError: as `whole_file`.
    """
    with whole_file(path) as temporary:
        temporary.write_text(text, "utf-8")
    return path
