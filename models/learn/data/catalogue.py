"""Readers for the catalogue of each known data set. They yield one item at a time: (row of the file, id, text).

Memory does not grow with the catalogue. A reader raises `DataError` with the row that it cannot read. Duplicate ids are
found by `prepare`, which sees the whole catalogue.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from learn.data.dataset import DataError
from learn.data.item_record import record_id, record_text
from learn.data.item_text import LIST_FIELDS, STRING_FIELDS, ItemText
from learn.data.sources import AnyPath, parquet_source

Item = tuple[int, str, ItemText]
FIELDS = (*STRING_FIELDS, *LIST_FIELDS)

# --- lines of text ---------------------------------------------------------------------------------------------------


def lines(path: AnyPath, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, line without its line ending) of a text file, plain or .gz."""
    row = 0
    try:
        with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
            for row, line in enumerate(file, start=1):
                yield row, line.decode(encoding).rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(path, row, None, f"not {encoding.upper()} at byte {error.start} of the line") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(path, row + 1, None, getattr(error, "strerror", None) or str(error)) from error


def header(path: Path) -> list[str]:
    """The column names of a CSV file."""
    for _row, line in lines(path, "utf-8-sig"):
        return next(csv.reader([line]), [])
    return []


def require_columns(path: Path, found: list[str], names: list[str]) -> None:
    """Raises `DataError` for the first of `names` that is missing from the header `found`, or in it more than once."""
    for name in names:
        if found.count(name) != 1:
            problem = "names this column twice" if name in found else "does not name this column"
            raise DataError(path, 1, name, f"the header {problem}; it has {found}")


def find_unclosed_quote(path: Path) -> int | None:
    """The number of the CSV record (the header is 1) whose quote is still open at the end of the file, if any.

    DuckDB 2.0 silently drops such a record and everything after the quote. Only a file with an odd number of quotes
    is parsed; any other file costs one fast pass.
    """
    with path.open("rb") as file:
        n_quotes = sum(part.count(b'"') for part in iter(lambda: file.read(1 << 20), b""))
    if n_quotes % 2 == 0:
        return None
    records = csv.reader((f"{line}\n" for _row, line in lines(path)), strict=True)
    row = 1
    try:
        while next(records, None) is not None:
            row += 1
    except csv.Error:
        return row
    return None


def find_mixed_line_ending(path: Path) -> int | None:
    """The number of the first line whose ending (LF or CRLF) differs from that of line 1, if any.

    DuckDB cannot read such a file.
    """
    first = None
    with path.open("rb") as file:
        for row, line in enumerate(file, start=1):
            is_crlf = line.endswith(b"\r\n")
            if first is not None and is_crlf != first and line.endswith(b"\n"):
                return row
            first = is_crlf if first is None else first
    return None


def json_objects(path: AnyPath) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object) of a JSON Lines file, skipping empty lines."""
    for row, line in lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(path, row, None, f"not JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(path, row, None, f"expected a JSON object, got {line[:40]!r}")
        yield row, record


# --- the neutral format ----------------------------------------------------------------------------------------------


def neutral_jsonl(path: AnyPath) -> Iterator[Item]:
    """Records `{"id", "text": {..}}`, or `{"id", ..}` with any of the six fields beside the id."""
    for row, record in json_objects(path):
        yield _neutral_item(path, row, record)


def neutral_parquet(path: AnyPath) -> Iterator[Item]:
    """Columns `id` and `text` (a struct), or `id` and any of the six fields."""
    try:
        with pyarrow.parquet.ParquetFile(parquet_source(path)) as file:
            row = 0
            for batch in file.iter_batches(batch_size=4096):
                for record in batch.to_pylist():
                    row += 1
                    yield _neutral_item(path, row, record)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(path, None, None, str(error)) from error


def neutral_csv(path: Path) -> Iterator[Item]:
    """A header with `id` and any of the six fields. In a field that is a list, `|` stands between its entries."""
    require_columns(path, header(path), ["id"])
    reader = csv.DictReader((line + "\n" for _row, line in lines(path, "utf-8-sig")), strict=True)
    try:
        for row, record in enumerate(reader, start=2):
            if None in record or None in record.values():
                raise DataError(path, row, None, f"expected {len(reader.fieldnames or [])} fields, as in the header")
            given: dict[str, Any] = {name: value for name, value in record.items() if value}
            for name in LIST_FIELDS:
                if name in given:
                    given[name] = [entry for entry in given[name].split("|") if entry]
            yield _neutral_item(path, row, given)
    except csv.Error as error:
        raise DataError(path, reader.line_num, None, f"malformed: {error}") from error


def _neutral_item(path: AnyPath, row: int, record: dict[str, Any]) -> Item:
    field = "id"
    try:
        identifier = record_id(record)
        field = "text"
        return row, identifier, record_text(record)
    except ValueError as error:
        raise DataError(path, row, field, str(error)) from error


# --- MovieLens -------------------------------------------------------------------------------------------------------

_ARTICLES = (
    "The|A|An|Le|La|Les|L'|Il|Lo|I|Gli|El|Los|Las|Der|Die|Das|Den|Det|En|Ett|O|Os|As|Un|Une|Una|Uno|Ein|Eine|De|Het"
)
_TRAILING_ARTICLE = re.compile(rf"([^()]+), ({_ARTICLES})(?=\s*[()]|\s*$)")
# The 19 flags of u.item, in the order of u.genre in MovieLens 100K. "unknown" carries no information about a film.
_FLAGS_100K = [
    *(
        "unknown",
        "Action",
        "Adventure",
        "Animation",
        "Children's",
        "Comedy",
        "Crime",
        "Documentary",
        "Drama",
        "Fantasy",
    ),
    *("Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
]


def plain_title(title: str) -> str:
    """Moves a trailing article to the front, inside brackets too: `Matrix, The (1999)` -> `The Matrix (1999)`."""

    def swap(match: re.Match[str]) -> str:
        name, article = match.groups()
        return f"{article}{'' if article.endswith(chr(39)) else ' '}{name}"

    return _TRAILING_ARTICLE.sub(swap, title.strip())


def movie_text(title: str, genres: str) -> ItemText:
    """The text of a film. MovieLens has no brand, price or attributes; `prepare` can add keywords from users' tags."""
    names = [] if genres in ("", "(no genres listed)") else genres.split("|")
    return ItemText(title=plain_title(title), category=", ".join(names))


def movies_csv(path: Path) -> Iterator[Item]:
    """latest-small, 20M, 25M, 32M: movieId,title,genres with a header."""
    columns = ["movieId", "title", "genres"]
    require_columns(path, header(path), columns)
    reader = csv.DictReader((line + "\n" for _row, line in lines(path, "utf-8-sig")), strict=True)
    try:
        for row, record in enumerate(reader, start=2):
            empty = [name for name in columns if not record[name]]
            if empty:
                raise DataError(path, row, empty[0], "empty")
            if None in record:
                raise DataError(path, row, None, f"more fields than the header's {len(reader.fieldnames or [])}")
            yield row, record["movieId"], movie_text(record["title"], record["genres"])
    except csv.Error as error:
        raise DataError(path, reader.line_num, None, f"malformed: {error}") from error


def movies_dat(path: Path) -> Iterator[Item]:
    """1M (latin-1) and 10M (UTF-8): id::title::genres. A title may itself contain `::`."""
    encoding = text_encoding(path)
    for row, line in lines(path, encoding):
        identifier, _, rest = line.partition("::")
        title, separator, genres = rest.rpartition("::")
        if not (identifier and title.strip() and separator):
            raise DataError(path, row, None, f"expected id::title::genres, got {line[:80]!r}")
        yield row, identifier, movie_text(title, genres)


def u_item(path: Path) -> Iterator[Item]:
    """100K: id|title|release date|video release date|URL and 19 flags, in latin-1."""
    for row, line in lines(path, "latin-1"):
        fields = line.split("|")
        if len(fields) != 5 + len(_FLAGS_100K):
            raise DataError(path, row, None, f"expected {5 + len(_FLAGS_100K)} fields, found {len(fields)}")
        if not fields[0] or not fields[1].strip():
            raise DataError(path, row, "title" if fields[0] else "movie id", "empty")
        if set(fields[5:]) - {"0", "1"}:
            raise DataError(path, row, "genres", f"expected flags of 0 and 1, got {fields[5:]}")
        genres = [name for name, flag in zip(_FLAGS_100K, fields[5:], strict=True) if flag == "1" and name != "unknown"]
        yield row, fields[0], movie_text(fields[1], "|".join(genres))


def text_encoding(path: Path) -> str:
    """utf-8 if the whole file decodes as such (MovieLens 10M), else latin-1 (1M), which can decode any bytes."""
    try:
        for _line in lines(path):
            pass
    except DataError:
        return "latin-1"
    return "utf-8"


# --- Amazon reviews --------------------------------------------------------------------------------------------------


def _string_list(value: Any) -> list[str]:
    return [entry.strip() for entry in value if isinstance(entry, str) and entry.strip()] if value else []


def _string(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


def amazon_2018(path: Path) -> Iterator[Item]:
    """Reads asin, title, category (a path from general to specific), brand, price and feature.

    In this crawl the price is sometimes the page's style sheet, so only a value that starts with a currency sign and
    a digit is kept.
    """
    for row, record in json_objects(path):
        price = _string(record.get("price"))
        yield _amazon_item(path, row, record, "asin", {
            "title": _string(record.get("title")),
            "category": ", ".join(_string_list(record.get("category"))),
            "brand": _string(record.get("brand")),
            "price": price if re.match(r"[$€£]\s*\d", price) else "",
            "attributes": tuple(_string_list(record.get("feature"))),
        })  # fmt: skip


def amazon_2023(path: Path) -> Iterator[Item]:
    """Reads parent_asin, title, main_category, categories, store (the brand), price (US dollars) and features."""
    for row, record in json_objects(path):
        price = str(record.get("price") if record.get("price") is not None else "").strip().removeprefix("$")
        categories = _string_list(record.get("categories")) or _string_list([record.get("main_category")])
        yield _amazon_item(path, row, record, "parent_asin", {
            "title": _string(record.get("title")),
            "category": ", ".join(categories),
            "brand": _string(record.get("store")),
            "price": f"${price}" if re.match(r"\d", price) else "",
            "attributes": tuple(_string_list(record.get("features"))),
        })  # fmt: skip


def _amazon_item(path: Path, row: int, record: dict[str, Any], key: str, fields: dict[str, Any]) -> Item:
    identifier = record.get(key)
    if not isinstance(identifier, str) or not identifier:
        raise DataError(path, row, key, f"expected a non-empty string, got {identifier!r}")
    return row, identifier, ItemText(**fields)


ReadItems = Callable[[Path], Iterator[Item]]
