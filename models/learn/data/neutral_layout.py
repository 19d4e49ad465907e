"""The neutral format: how its two tables are found and read; `neutral` says what is in them."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pyarrow
import pyarrow.parquet

from learn.data import catalogue, layouts, sources
from learn.data.dataset import DataError
from learn.data.layouts import TEXT_FIELDS, Columns, Layout, Log
from learn.data.sources import AnyPath, NeutralFiles, ObjectPath
from learn.data.sql import first_row, name, text

OPTIONAL = ("timestamp", "value", "action")
ALL = Columns(action="action")


def find(folder: Path) -> Layout | None:
    """The neutral data set in a folder, or None if there is no table of interactions."""
    log, items = _table(folder, "interactions"), _table(folder, "items")
    if log is None:
        return None
    if items is None:
        reason = f"{log.name} has no items.jsonl or items.parquet beside it, nor a folder `items` or another format"
        raise DataError(folder, None, None, reason)
    return named(NeutralFiles(str(log), str(items)))


def _table(folder: Path, stem: str) -> Path | None:
    paths = [folder / f"{stem}{suffix}" for suffix in sources.SUFFIXES]
    found = [path for path in paths if path.is_file()] + ([folder / stem] if (folder / stem).is_dir() else [])
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise DataError(folder, None, None, f"both {names} exist; remove one of them")
    return found[0] if found else None


def named(where: NeutralFiles) -> Layout:
    """The neutral data set in these two tables."""
    files, item_files = sources.find(where.interactions), sources.find(where.items)
    for table, found in ((where.interactions, files), (where.items, item_files)):
        kind = sources.kind_of(found[0])
        if isinstance(found[0], ObjectPath) and (kind == "csv" or (kind == "jsonl" and found is files)):
            reason = f"in an object store, {table} has to be in Parquet: convert it, or copy it to a disk"
            raise DataError(found[0], None, None, reason)
    read_log = {"csv": _csv_log, "jsonl": _json_log, "parquet": _parquet_log}[sources.kind_of(files[0])]
    read_items = {
        "csv": catalogue.neutral_csv,
        "jsonl": catalogue.neutral_jsonl,
        "parquet": catalogue.neutral_parquet,
    }[sources.kind_of(item_files[0])]
    log, ticks = read_log(files)
    return Layout(
        "neutral",
        log,
        item_files[0] if len(item_files) == 1 else _display(where.items),
        read_items,
        text_fields=TEXT_FIELDS,
        ticks_per_second=ticks,
        items_files=item_files,
    )


def _display(where: str) -> AnyPath:
    scheme, _, key = where.partition("://")
    return ObjectPath(scheme, key) if sources.is_url(where) else Path(where)


def _csv_log(files: tuple[AnyPath, ...]) -> tuple[Log, None]:
    header = catalogue.header(files[0])
    columns = Columns(**{column: column if column in header else None for column in OPTIONAL})
    logs = tuple(layouts.csv_log(path, columns) for path in files)
    for path in files[1:]:
        if catalogue.header(path) != header:
            raise DataError(path, 1, None, f"the header is not that of {files[0]}, which is {', '.join(header)}")
        _check_partitions(path, header)
    _check_partitions(files[0], header)
    if len(files) == 1:
        return logs[0], None
    query = layouts.relation(layouts.CsvFormat(names=header).sql(*files), columns)
    return Log(files[0], query, columns, first_row=2, kind="csv", files=logs), None


def _json_log(files: tuple[AnyPath, ...]) -> tuple[Log, None]:
    counts = ", ".join(f"count({name(column)})" for column in OPTIONAL)
    try:
        with duckdb.connect() as db:
            occurs = first_row(db, f"SELECT {counts} FROM {layouts.json_source(ALL, *files)}")
    except duckdb.Error as error:
        logs = tuple(Log(path, layouts.json_sql(ALL, path), ALL, kind="json") for path in files)
        raise layouts.read_error(Log(files[0], logs[0].sql, ALL, kind="json", files=logs), error) from error
    given = {column: column if count else None for column, count in zip(OPTIONAL, occurs, strict=True)}
    columns = Columns(**given)
    for path in files:
        _check_partitions(path, columns.present())
    logs = tuple(Log(path, layouts.json_sql(columns, path), columns, kind="json") for path in files)
    if len(files) == 1:
        return logs[0], None
    return Log(files[0], layouts.json_sql(columns, *files), columns, kind="json", files=logs), None


def _check_partitions(path: AnyPath, columns: list[str]) -> None:
    """Raises `DataError` for a folder such as action=click, which would otherwise be passed over."""
    for key in sources.partitions(path):
        if key in ALL.present() and key not in columns:
            raise DataError(path, None, key, "a folder gives this column, which is read for files of Parquet only")


def _check_clash(path: AnyPath, schema: pyarrow.Schema) -> None:
    """Raises `DataError` if folders are read and also give a column of the file, whose values DuckDB would replace."""
    given = set(sources.partitions(path)) & set(ALL.present())
    if given <= set(schema.names):
        return
    for column in sorted(given & set(schema.names)):
        reason = "a folder gives this column, but the file has it, too; rename the folder, or leave out the column"
        raise DataError(path, None, column, reason)


def _parquet_log(files: tuple[AnyPath, ...]) -> tuple[Log, int | None]:
    """The log in files of Parquet. A column may also be given by folders, as day=2026-01-01 gives a column `day`."""
    schemas = [_schema(path) for path in files]
    first = _present(files[0], schemas[0])
    for path, schema in zip(files, schemas, strict=True):
        _check_types(path, schema)
        _check_clash(path, schema)
        if _present(path, schema) != first:
            reason = f"it has the columns {', '.join(_present(path, schema))}, but {files[0]} has {', '.join(first)}"
            raise DataError(path, None, None, reason)
        if _has_time_type(schema) != _has_time_type(schemas[0]):
            reason = f"the type is {schema.field('timestamp').type}, but that of {files[0]} is another"
            raise DataError(path, None, "timestamp", reason)
    columns = Columns(**{column: column if column in first else None for column in OPTIONAL})
    query = _parquet_sql(files, schemas, columns)
    ticks = 1_000_000 if _has_time_type(schemas[0]) else None
    if len(files) == 1:
        return Log(files[0], query, columns), ticks
    logs = tuple(
        Log(path, _parquet_sql((path,), [schema], columns), columns)
        for path, schema in zip(files, schemas, strict=True)
    )
    return Log(files[0], query, columns, files=logs), ticks


def _schema(path: AnyPath) -> pyarrow.Schema:
    try:
        return pyarrow.parquet.read_schema(sources.parquet_source(path))
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(path, None, None, str(error)) from error


def _present(path: AnyPath, schema: pyarrow.Schema) -> list[str]:
    given = {*schema.names, *sources.partitions(path)}
    return [column for column in ALL.present() if column in given]


def _has_time_type(schema: pyarrow.Schema) -> bool:
    return "timestamp" in schema.names and pyarrow.types.is_timestamp(schema.field("timestamp").type)


def _check_types(path: AnyPath, schema: pyarrow.Schema) -> None:
    present = _present(path, schema)
    for required in ("user", "item"):
        if required not in present:
            raise DataError(path, None, required, f"the schema does not name this column; it has {schema.names}")
    kinds = pyarrow.types
    texts = (kinds.is_string, kinds.is_large_string, kinds.is_string_view, kinds.is_dictionary)
    allowed = {
        "timestamp": (kinds.is_integer, kinds.is_timestamp),
        "value": (kinds.is_integer, kinds.is_floating, kinds.is_boolean, kinds.is_decimal),
        "action": texts,
    }
    for column in present:
        kind = schema.field(column).type if column in schema.names else pyarrow.string()
        is_kinds = texts if column not in schema.names else allowed.get(column, (kinds.is_integer, *texts))
        if not any(is_kind(kind) for is_kind in is_kinds):
            raise DataError(path, None, column, f"the type {kind} is not allowed for this column")


def _parquet_sql(files: tuple[AnyPath, ...], schemas: list[pyarrow.Schema], columns: Columns) -> str:
    in_files = schemas[0].names
    when = name("timestamp")
    if _has_time_type(schemas[0]):
        when = f"epoch_us({when})"
    # What a folder gives is text, which is checked like that of a CSV file.
    value = f"CAST({name('value')} AS DOUBLE)" if "value" in in_files else name("value")
    fields = {
        "timestamp": when if columns.timestamp else "NULL",
        "value": value if columns.value else "NULL",
        "action": "action" if columns.action else "NULL",
    }
    selected = ", ".join(f"{given} AS {name(column)}" for column, given in fields.items())
    names = ", ".join(text(str(path)) for path in files)
    has_folders = any(column not in in_files for column in columns.present())
    types = [[schema.field(column).type for column in columns.present() if column in in_files] for schema in schemas]
    options = f"union_by_name = {any(kinds != types[0] for kinds in types)}, hive_partitioning = {has_folders}"
    options += ", hive_types_autocast = false" if has_folders else ""
    source = f'(SELECT "user", item, {selected} FROM read_parquet([{names}], {options}))'
    return layouts.relation(source, ALL)
