"""Reads a log and the samples to compute features for, and divides both by user into parts that fit in memory.

    log      columns user, item, timestamp, and action or value, or neither
    samples  columns user, item, timestamp, and any others, which are carried through

Each is a .csv or .parquet file, a folder of such files, or a glob. Timestamps are whole numbers in one unit (seconds,
say), or a timestamp type of Parquet; if only one of the two tables has such a type, numbers of the other are seconds.
A row that cannot be used is an error that names file, row, column and reason.

DuckDB sorts both tables on disk, within a memory limit. Of the log, only the events of users who have samples remain,
in one order: (user, timestamp, item id), with numeric ids as numbers, then action. That is also the order of
`learn prepare`, so ties never depend on the order of a file.

    parts.json              the number of samples and events of each part; written last
    events-000000.parquet   user, ts, item, action: of all users of the part, in order
    samples-000000.parquet  record, user, ts, item, and the columns of the samples, in the order of `user` and `ts`

`item` is the row of the item in the catalogue, or one of the negative `MISSING` numbers. `action` is 0 if it is not
known, else 1 + its position in `ACTIONS`. `record` numbers the samples from 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from learn.atomic_file import replacing
from learn.data import DataError, log_checks, sql
from learn.data.actions import LIKED, ActionThresholds
from learn.data.actions import number as number_of
from learn.data.layouts import Columns, Log, check_quotes, read_error
from learn.serving.feature_tables import Table, files, open_table

PARTS = "parts.json"
# What stands in `item` for an item that is not in the catalogue, and for one that was rejected there.
UNKNOWN_ITEM, INVALID_ITEM = -1, -2
# Our own columns in the table of samples; a dot keeps them apart from the names that people give.
RECORD, USER, TS, ITEM = "midemb.record", "midemb.user", "midemb.ts", "midemb.item"


@dataclass(frozen=True)
class HistoryRules:
    """How events become a history, which has to be what callers send to a server.

    Where the log has values instead of actions, the last two fields are the `ActionThresholds`.
    """

    actions: tuple[str, ...]
    keeps: Literal["all", "liked"]
    liked_from: float | None = None
    disliked_to: float | None = None


@dataclass(frozen=True)
class SortConfig:
    """How DuckDB sorts, and how large a part is. A user is never divided, so one user's events may exceed a part."""

    memory_mb: int = 256
    threads: int = 1
    part_samples: int = 50_000
    part_events: int = 500_000


@dataclass(frozen=True)
class Part:
    """The samples and the events of some users."""

    number: int
    n_samples: int
    n_events: int


@dataclass(frozen=True)
class Catalogue:
    """The ids of the items that have records, in the order of these, and of those that were rejected."""

    batches: Iterable[pa.Table]
    rejected: list[str]


def divide(
    log: str, samples: str, items: Catalogue, rules: HistoryRules, out: Path, config: SortConfig, reserved: set[str]
) -> list[Part]:
    """Writes the parts to the empty folder `out`, and returns them. Samples may not have a column of `reserved`."""
    sources, wanted = [open_table(path) for path in files(log)], [open_table(path) for path in files(samples)]
    _check_samples(wanted, reserved)
    _check_actions(sources, rules)
    ticks = 1_000_000 if any(source.has_time_type for source in (*sources, *wanted)) else 1
    settings = {"memory_limit": f"{config.memory_mb}MB", "temp_directory": str(out / "spill")}
    db = duckdb.connect(str(out / "sorting.duckdb"), config=settings | {"threads": config.threads})
    db.execute("SET enable_progress_bar = false")
    try:
        _load_catalogue(db, items)
        _load_samples(db, wanted, ticks)
        _load_events(db, sources, ticks, rules)
        _number_parts(db, config)
        parts = _write_parts(db, out, wanted[0].columns)
    except duckdb.OutOfMemoryException as error:
        reason = f"memory_mb is {config.memory_mb}, too little; raise it: {str(error).splitlines()[0]}"
        raise ValueError(reason) from error
    finally:
        db.close()
        (out / "sorting.duckdb").unlink(missing_ok=True)
    with replacing(out / PARTS) as partial:
        partial.write_text(json.dumps([asdict(part) for part in parts]) + "\n")
    return parts


def read_parts(out: Path) -> list[Part] | None:
    """Returns the parts that `divide` wrote, or None if it did not finish."""
    path = out / PARTS
    return [Part(**part) for part in json.loads(path.read_text())] if path.is_file() else None


def events_of(out: Path, part: Part) -> Path:
    """Returns the file of the part's events."""
    return out / f"events-{part.number:06}.parquet"


def samples_of(out: Path, part: Part) -> Path:
    """Returns the file of the part's samples."""
    return out / f"samples-{part.number:06}.parquet"


def _check_samples(sources: list[Table], reserved: set[str]) -> None:
    first = sources[0]
    for source in sources:
        if source.columns != first.columns:
            reason = f"its columns are not those of {first.path}, which are {', '.join(first.columns)}"
            raise DataError(source.path, None, None, reason)
        for name in source.columns:
            if name in reserved or name in (RECORD, USER, TS, ITEM):
                raise DataError(source.path, None, name, "the features have a column of this name; rename this one")


def _check_actions(sources: list[Table], rules: HistoryRules) -> None:
    """Raises DataError for a log that does not say what the bundle's histories need."""
    needs = [f"reads the actions {', '.join(rules.actions)}"] if rules.actions else []
    needs += ["keeps only liked items"] if rules.keeps == "liked" else []
    for source in sources:
        if not needs or source.has("action"):
            continue
        if not source.has("value"):
            reason = f"the bundle {needs[0]}, so the log needs a column `action`, or `value` with thresholds"
            raise DataError(source.path, None, "action", reason)
        if rules.liked_from is None:
            reason = (
                f"the bundle {needs[0]}, and the log has values instead of actions: say from which value on a user "
                "likes an item (--liked-from, and --disliked-to), as callers of the server do"
            )
            raise DataError(source.path, None, "value", reason)


def _load_catalogue(db: duckdb.DuckDBPyConnection, items: Catalogue) -> None:
    db.execute("CREATE TABLE found (id VARCHAR, item INTEGER)")
    n_items = 0
    for batch in items.batches:
        db.register("batch", batch)
        db.execute(f"INSERT INTO found SELECT id, {n_items} + row_number() OVER () - 1 FROM batch")
        db.unregister("batch")
        n_items += len(batch)
    if items.rejected:
        sql.insert(db, "found", {"id": items.rejected, "item": [INVALID_ITEM] * len(items.rejected)})
    # Where an id occurs more than once, its last usable row counts, as the newest text of an id does in a server.
    db.execute("CREATE TABLE catalogue AS SELECT id, max(item) AS item FROM found GROUP BY id")


def _insert(
    db: duckdb.DuckDBPyConnection, table: str, source: Table, log: Log, select: Mapping[str, str], keep: str
) -> None:
    """Appends a file's rows, given as column -> SQL over the relation `r` of `log`; the first bad row is an error."""
    columns = log.columns
    checks = log_checks.broken_record() + log_checks.empty_fields(columns) + log_checks.invalid_timestamp("timestamp")
    checks += log_checks.invalid_value(columns.value)
    checks += log_checks.unknown_action("action" if source.has("action") else None)
    problem = log_checks.first_problem(checks)
    fields = ", ".join(f"{value} AS {sql.name(name)}" for name, value in select.items())
    join = 'LEFT JOIN users u ON u."user" = r."user"' if table == "events" else ""
    join += " LEFT JOIN catalogue c ON c.id = r.item"
    try:
        db.execute(f"""
            CREATE OR REPLACE TEMP TABLE staged AS SELECT *
            FROM (SELECT r.record, {fields}, {problem} AS problem FROM ({log.sql}) r {join})
            WHERE problem IS NOT NULL OR ({keep})
        """)
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        raise read_error(log, error) from error
    check_quotes(log)
    bad = sql.first_row(db, "SELECT record, problem FROM staged WHERE problem IS NOT NULL ORDER BY record LIMIT 1")
    if bad:
        column, _, reason = bad[1].partition(log_checks.SEPARATOR)
        raise log.problem(bad[0], column or None, reason)
    kept = "SELECT * EXCLUDE (record, problem) FROM staged"
    exists = sql.first_row(db, f"SELECT 1 FROM duckdb_tables() WHERE table_name = {sql.text(table)}")
    db.execute(f"INSERT INTO {table} {kept}" if exists else f"CREATE TABLE {table} AS {kept}")
    db.execute("DROP TABLE staged")


TICKS = "TRY_CAST(TRY_CAST(trim(r.timestamp) AS BIGINT) * CAST(r.ticks AS HUGEINT) AS BIGINT)"
ITEM_ROW = f"coalesce(c.item, {UNKNOWN_ITEM})"


def _load_samples(db: duckdb.DuckDBPyConnection, sources: list[Table], ticks: int) -> None:
    n_samples = 0
    for source in sources:
        select = {RECORD: f"r.record - 1 + {n_samples}", USER: 'r."user"', TS: TICKS, ITEM: ITEM_ROW}
        select |= {name: f"r.{sql.name('carried.' + name)}" for name in source.columns}
        log = source.log(ticks, source.columns)
        # An empty value of a column that is only carried through is no error.
        log = Log(log.path, log.sql, Columns(value=None), log.first_row, log.kind)
        _insert(db, "samples", source, log, select, "TRUE")
        n_samples = sql.first_row(db, "SELECT count(*) FROM samples")[0]
    if not n_samples:
        raise DataError(sources[0].path, None, None, "there are no samples")
    for source in sources[:1]:
        if source.is_csv:
            _find_types(db, [name for name in source.columns if name not in ("user", "item")])
    user = sql.name(USER)
    db.execute(f"""
        CREATE TABLE users AS
        SELECT {user} AS "user", row_number() OVER (ORDER BY {user}) - 1 AS number, count(*) AS n_samples
        FROM samples GROUP BY {user}
    """)


def _find_types(db: duckdb.DuckDBPyConnection, columns: list[str]) -> None:
    """Makes columns of numbers in CSV numbers, if each is written as the number is: "7" is one, and "007" a text."""
    for column in map(sql.name, columns):
        for kind in ("BIGINT", "DOUBLE"):
            is_same = f"CAST(TRY_CAST({column} AS {kind}) AS VARCHAR) = {column}"
            as_written = is_same if kind == "BIGINT" else f"TRY_CAST({column} AS DOUBLE) IS NOT NULL"
            others = f"SELECT 1 FROM samples WHERE {column} <> '' AND NOT coalesce({as_written}, false) LIMIT 1"
            leading_zero = f"SELECT 1 FROM samples WHERE regexp_full_match({column}, '-?0[0-9].*') LIMIT 1"
            if sql.first_row(db, others) is None and sql.first_row(db, leading_zero) is None:
                db.execute(f"ALTER TABLE samples ALTER {column} TYPE {kind} USING CAST(nullif({column}, '') AS {kind})")
                break


def _load_events(db: duckdb.DuckDBPyConnection, sources: list[Table], ticks: int, rules: HistoryRules) -> None:
    for source in sources:
        select = {"user": "u.number", "ts": TICKS, "id": "r.item", "item": ITEM_ROW}
        select["action"] = _action(source, rules)
        # Quoted, because SQL has a function of that name.
        keep = '"user" IS NOT NULL'
        if rules.keeps == "liked":
            liked = ", ".join(str(number_of(name)) for name in LIKED)
            keep += f" AND action IN ({liked})"
        _insert(db, "events", source, source.log(ticks), select, keep)


def _action(source: Table, rules: HistoryRules) -> str:
    if source.has("action"):
        return log_checks.action_number("action")
    if not source.has("value") or rules.liked_from is None:
        return log_checks.action_number(None)
    return ActionThresholds(rules.liked_from, rules.disliked_to).sql("TRY_CAST(r.value AS DOUBLE)")


def _number_parts(db: duckdb.DuckDBPyConnection, config: SortConfig) -> None:
    """Creates the table parts(user, part): whole users, in their order, until a part has enough samples or events."""
    db.execute(f"""
        CREATE TABLE parts AS
        WITH counted AS (
            SELECT number, n_samples, coalesce(n_events, 0) AS n_events
            FROM users LEFT JOIN (SELECT "user", count(*) AS n_events FROM events GROUP BY "user") e
            ON e."user" = number
        ), filled AS (
            SELECT number, greatest(
                (sum(n_samples) OVER before) // {config.part_samples},
                (sum(n_events) OVER before) // {config.part_events}
            ) AS level
            FROM counted WINDOW before AS (ORDER BY number)
        )
        SELECT number AS "user", dense_rank() OVER (ORDER BY level) - 1 AS part FROM filled
    """)


def _write_parts(db: duckdb.DuckDBPyConnection, out: Path, columns: tuple[str, ...]) -> list[Part]:
    db.execute(f"""
        CREATE TABLE ranks AS
        SELECT id, row_number() OVER (ORDER BY {sql.id_order("id")}) AS rank FROM (SELECT DISTINCT id FROM events)
    """)
    own = ", ".join(f"s.{sql.name(name)}" for name in (RECORD, TS, ITEM))
    carried = ", ".join(f"s.{sql.name(name)}" for name in columns)
    n_samples = _write(db, out / "samples", f"""
        SELECT p.part, u.number AS {sql.name(USER)}, {own}, {carried}
        FROM samples s JOIN users u ON u."user" = s.{sql.name(USER)} JOIN parts p ON p."user" = u.number
        ORDER BY u.number, s.{sql.name(TS)}, s.{sql.name(RECORD)}
    """)  # fmt: skip
    n_events = _write(db, out / "events", """
        SELECT p.part, e."user", e.ts, e.item, e.action
        FROM events e JOIN parts p ON p."user" = e."user" JOIN ranks r ON r.id = e.id
        ORDER BY e."user", e.ts, r.rank, e.action
    """)  # fmt: skip
    return [Part(number, count, n_events.get(number, 0)) for number, count in sorted(n_samples.items())]


def _write(db: duckdb.DuckDBPyConnection, stem: Path, query: str) -> dict[int, int]:
    """Writes the rows of a query, which are in the order of `part`, to one file per part; returns their numbers."""
    counts: dict[int, int] = {}
    writer: pq.ParquetWriter | None = None
    for batch in sql.batches(db, query):
        for number, rows in _by_part(batch):
            if number not in counts:
                if writer is not None:
                    writer.close()
                writer = pq.ParquetWriter(stem.with_name(f"{stem.name}-{number:06}.parquet"), rows.schema)
            counts[number] = counts.get(number, 0) + len(rows)
            writer.write_table(rows)
    if writer is not None:
        writer.close()
    return counts


def _by_part(batch: pa.RecordBatch) -> Iterator[tuple[int, pa.Table]]:
    numbers = batch["part"].to_numpy()
    rows = pa.Table.from_batches([batch]).drop_columns(["part"])
    begin = 0
    while begin < len(numbers):
        number = numbers[begin]
        end = int(numbers.searchsorted(number, side="right"))
        yield int(number), rows.slice(begin, end - begin)
        begin = end


def read(path: Path) -> dict[str, Any]:
    """Reads a file of a part as NumPy columns; one that does not exist has no rows."""
    if not path.is_file():
        return {}
    table = pq.read_table(path)
    return {name: table[name].to_numpy() for name in table.column_names}
