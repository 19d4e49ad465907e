"""Prepares the data of a study, unless its folder already has what the same raw files give with the same settings.

FOLDER/prepared-from.json has the raw files with sizes and times of change, the settings, a digest of the code that
prepares, and that of the result.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from learn import data
from learn.atomic_file import replacing
from learn.toml_config import as_read

STAMP = "prepared-from.json"
# They change how fast the folder is made, not what is in it.
WITHOUT_EFFECT = ("memory_mb", "threads")


def prepare_once(source: Path | str, folder: Path, config: data.PrepareConfig) -> data.Prepared:
    """Like `data.prepare`, which it calls only if a raw file, a setting, the code or the folder is not as it was.

    As `make` does, it takes a file for unchanged if size and time of change are the same.
    """
    if isinstance(source, str):
        return data.prepare(source, folder, config)  # Of an object store, nothing is known without reading it.
    wanted = _origin(source, config)
    stamp = folder / STAMP
    if stamp.is_file():
        try:
            found = data.read_meta(folder)
            if json.loads(stamp.read_text()) == wanted | {"digest": found.digest}:
                print(f"{folder} is up to date: {found}")
                return found
        except ValueError:  # DataError is one: an interrupted preparation has left no meta.json.
            pass
    found = data.prepare(source, folder, config)
    with replacing(stamp) as partial:
        partial.write_text(json.dumps(wanted | {"digest": found.digest}, indent=1) + "\n")
    return found


def _origin(source: Path, config: data.PrepareConfig) -> dict[str, Any]:
    paths = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    files = {str(path.relative_to(source)): [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}
    settings = {name: value for name, value in asdict(config).items() if name not in WITHOUT_EFFECT}
    return as_read({"source": str(source.resolve()), "files": files, "settings": settings, "code": _code()})


def _code() -> str:
    """SHA-256 over the sources of the package that reads and prepares."""
    found = hashlib.sha256()
    for path in sorted(Path(data.__file__).parent.iterdir()):
        if path.suffix in (".py", ".jinja"):
            found.update(path.read_bytes())
    return found.hexdigest()
