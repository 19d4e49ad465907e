"""A data set of any known layout -> a prepared folder, in memory that does not grow with the log.

DuckDB does the work on disk, within `PrepareConfig.memory_mb`:

    items      read one at a time (`catalogue`), checked, kept as a table
    log        one pass over the file: each record is cast, checked and joined with its item; the first bad one is an
               error
    core       optional: users and items with too few events are removed, repeatedly, until every one has enough
    events     sorted by (user, timestamp, item id) and written batch by batch as .npy files
    keywords   optional: MovieLens' tags that predate the split
    meta       SHA-256 of every file; meta.json is moved into place last, atomically

Beyond that, memory grows only if keywords are counted, by 8 bytes per user. Reading the folder later loads the whole
catalogue into memory.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import duckdb
import numpy as np
import pyarrow
from tqdm import tqdm

from learn.data import catalogue, keywords, log_checks, prepared_folder, sources, sql, timestamp_unit
from learn.data.dataset import DataError
from learn.data.item_text import ItemText
from learn.data.known_layouts import find_layout
from learn.data.layouts import TEXT_FIELDS, Layout, Log, check_quotes, read_error
from learn.data.prepared_folder import ArrayWriter, KeywordBoundary, Prepared
from learn.data.sources import NeutralFiles
from learn.data.splits import SplitConfig, TimeSplitConfig


@dataclass(frozen=True)
class PrepareConfig:
    """How raw files become a prepared folder. The defaults keep every user and event."""

    # Keywords are taken only from tags that predate this split. Without keywords, any split can be used later.
    split: SplitConfig | TimeSplitConfig = field(default_factory=SplitConfig)
    # The most MovieLens tags per item to use as keywords; 0 = none. 8 fit well into the prompt.
    max_keywords: int = 0
    # Users and items with fewer events are removed, repeatedly, until all have this many (k-core).
    min_user_events: int = 0
    # None: 1 for Amazon, whose catalogue has many items that nobody reviewed, else 0.
    min_item_events: int | None = None
    # None: title, category and brand for public data sets, as in LEARN, and all six for the neutral format.
    text_fields: tuple[str, ...] | None = None
    # DuckDB's memory limit; the process needs about 150 MB in addition. More makes large logs faster.
    memory_mb: int = 1024
    threads: int = 2

    def __post_init__(self) -> None:
        bounds = {"max_keywords": 0, "min_user_events": 0, "min_item_events": 0, "memory_mb": 64, "threads": 1}
        for key, minimum in bounds.items():
            value = getattr(self, key)
            if value is not None and value < minimum:
                raise ValueError(f"{key} is {value}; expected {minimum} or more")
        unknown = sorted(set(self.text_fields or ()) - set(TEXT_FIELDS))
        if unknown:
            raise ValueError(f"text_fields has {unknown[0]!r}; expected names from {', '.join(TEXT_FIELDS)}")


Source: TypeAlias = Path | str | NeutralFiles


def prepare(source: Source, out: Path, config: PrepareConfig | None = None) -> Prepared:
    """Reads the data set in `source`, of any known layout, writes a prepared folder to `out` and prints its counts.

    `source` is a folder, a URL of an object store (s3:// or gs://), or two tables that are named (`sources`).

    Raises `DataError` if a file is invalid, and ValueError if the config is. Files of an earlier call stay in `out`
    until the new ones are complete.
    """
    meta = build(source, out, config or PrepareConfig())
    print(meta)
    return meta


def build(source: Source, out: Path, config: PrepareConfig) -> Prepared:
    """Like `prepare`, but prints nothing."""
    if isinstance(source, Path | str) and Path(source).resolve() == out.resolve():
        raise ValueError(f"{out} is the folder of the raw files; prepare into another folder")
    layout = find_layout(source)
    _check_tags(layout, config, source)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".preparing-", dir=out) as work:
        meta = _Preparation(layout, config, Path(work)).run()
        _publish(Path(work), out, meta)
    return meta


def _check_tags(layout: Layout, config: PrepareConfig, source: Source) -> None:
    if not config.max_keywords:
        return
    if layout.tags is None:
        reason = f"max_keywords is {config.max_keywords}, but this {layout.name} data set has no tags; set it to 0"
        raise DataError(source, None, None, reason)
    if layout.log.columns.timestamp is None:
        reason = "the ratings have no timestamps, so no tag is known to predate the split; set max_keywords to 0"
        raise DataError(source, None, None, reason)


def _publish(work: Path, out: Path, meta: Prepared) -> None:
    """Moves the files into `out`, meta.json last, so that a folder with meta.json is complete."""
    (out / prepared_folder.META).unlink(missing_ok=True)
    (work / prepared_folder.META).write_text(meta.to_json(), encoding="utf-8")
    for file in (*meta.files, prepared_folder.META):
        (work / file).replace(out / file)


class _Preparation:
    """One preparation, with its tables in a DuckDB file inside `work`."""

    def __init__(self, layout: Layout, config: PrepareConfig, work: Path) -> None:
        overrides = {} if config.min_item_events is None else {"min_item_events": config.min_item_events}
        self.layout, self.config, self.work = replace(layout, **overrides), config, work
        self.fields = config.text_fields or layout.text_fields
        self.dropped: dict[str, int] = {}
        self.boundary: KeywordBoundary | None = None
        settings = {"memory_limit": f"{config.memory_mb}MB", "temp_directory": str(work / "spill")}
        settings |= {"threads": config.threads, "preserve_insertion_order": True}
        self.db = duckdb.connect(str(work / "log.duckdb"), config=settings)
        # DuckDB 2.0 draws its progress bar on standard output, where it would mix with our own output.
        self.db.execute("SET enable_progress_bar = false")
        self.unit = timestamp_unit.UNITS[0]
        # The first row of each file of the catalogue, which are numbered together.
        self.item_files: list[tuple[int, sources.AnyPath]] = []

    def run(self) -> Prepared:
        """Runs all steps; afterwards the files of the prepared folder are in `work`."""
        steps: list[Callable[[], None]] = [self.load_items, self.load_log, self.keep_core, self.number]
        steps += [self.write_users, self.write_events]
        steps += [self.count_keywords] if self.config.max_keywords else []
        steps += [self.write_catalogue]
        try:
            for step in (progress := tqdm(steps, desc="prepare", unit="step", leave=False)):
                progress.set_postfix_str(step.__name__)
                step()
            return self.meta()
        except duckdb.OutOfMemoryException as error:
            reason = f"memory_mb is {self.config.memory_mb}, too little; raise it: {str(error).splitlines()[0]}"
            raise ValueError(reason) from error
        finally:
            self.db.close()

    def load_items(self) -> None:
        """Creates items(row, id, text), where the text is JSON with the configured fields only."""
        self.db.execute("CREATE TABLE items (row BIGINT, id VARCHAR, text VARCHAR)")
        batch: list[tuple[int, str, str]] = []
        for row, identifier, item_text in self._numbered_items():
            given = {key: value for key, value in item_text.to_json().items() if value and key in self.fields}
            if ItemText.from_json(given).is_empty:
                self._reject_item_without_text(row, identifier)
                continue
            batch.append((row, identifier, json.dumps(given, ensure_ascii=False)))
            if len(batch) == sql.BATCH:
                self._insert_items(batch)
                batch = []
        self._insert_items(batch)
        self._reject_duplicate_items()

    def _numbered_items(self) -> Iterator[catalogue.Item]:
        """The items of all files, with rows that go on from file to file."""
        first = 0
        for path in self.layout.items_files or (self.layout.items,):
            self.item_files.append((first, path))
            row = 0
            for row, identifier, item_text in self.layout.read_items(path):
                yield first + row, identifier, item_text
            first += row

    def _item_error(self, row: int, column: str, reason: str) -> DataError:
        # Of files that begin at the same row, all but the last one are empty.
        first, path = next(file for file in reversed(self.item_files) if file[0] < row)
        return DataError(path, row - first, column, reason)

    def _insert_items(self, batch: list[tuple[int, str, str]]) -> None:
        if batch:
            columns = [list(column) for column in zip(*batch, strict=True)]
            sql.insert(self.db, "items", dict(zip(("row", "id", "text"), columns, strict=True)))

    def _reject_duplicate_items(self) -> None:
        duplicates = "FROM items QUALIFY row_number() OVER (PARTITION BY id ORDER BY row) > 1"
        if self.layout.is_lenient:
            self._keep("items", f"row NOT IN (SELECT row {duplicates})", "items that stand there a second time")
            return
        found = sql.first_row(self.db, f"SELECT row, id {duplicates} ORDER BY row LIMIT 1")
        if found:
            raise self._item_error(found[0], "id", f"{found[1]!r} occurs a second time; ids must be unique")

    def _reject_item_without_text(self, row: int, identifier: str) -> None:
        if not self.layout.is_lenient:
            reason = f"{identifier!r} has no text to encode; give at least one of {', '.join(self.fields)}"
            raise self._item_error(row, "text", reason)
        self._count_dropped("items without text", 1)

    def _count_dropped(self, what: str, count: int) -> None:
        if count:
            self.dropped[what] = self.dropped.get(what, 0) + count

    def _keep(self, table: str, condition: str, what: str) -> int:
        """Removes the rows that do not meet `condition`, counts them in `dropped[what]`, and returns their number."""
        count = f"SELECT count(*) FROM {table}"
        before = sql.first_row(self.db, count)[0]
        self.db.execute(f"CREATE OR REPLACE TABLE {table} AS SELECT * FROM {table} WHERE {condition}")
        n_removed = before - sql.first_row(self.db, count)[0]
        self._count_dropped(what, n_removed)
        return n_removed

    def load_log(self) -> None:
        """Creates log(record, user, item, sort_key, value, action, problem).

        `item` is the row of the item. `sort_key` is the timestamp in the unit of the file, or else the record number.
        """
        log = self.layout.log
        value = "1" if log.columns.value is None else "TRY_CAST(r.value AS FLOAT)"
        self._load("log", log, f"CAST({value} AS FLOAT)", log_checks.invalid_value(log.columns.value))
        if self.layout.is_lenient:
            self._keep("log", "item IS NOT NULL", "events of items without text")
        if log.columns.timestamp is not None and self.layout.ticks_per_second is None:
            self._recognise_unit(log)

    def _recognise_unit(self, log: Log) -> None:
        try:
            self.unit = timestamp_unit.recognise(self.db, "log")
        except timestamp_unit.MixedUnits as error:
            raise log.problem(error.record, log.columns.timestamp, str(error)) from error

    def _load(self, table: str, log: Log, value: str, value_checks: list[log_checks.Check]) -> None:
        columns = log.columns
        checks = log_checks.broken_record() + log_checks.empty_fields(columns)
        if not self.layout.is_lenient:
            checks += log_checks.unknown_item(columns.item, self.layout.items.name)
        checks += log_checks.invalid_timestamp(columns.timestamp, timestamp_unit.whole_number("r.timestamp"))
        checks += value_checks
        checks += log_checks.unknown_action(columns.action)
        sources.register(self.db, tuple(file.path for file in log.files or (log,)))
        sort_key = "r.record" if columns.timestamp is None else "TRY_CAST(trim(r.timestamp) AS BIGINT)"
        try:
            self.db.execute(f"""
                CREATE TABLE {table} AS
                SELECT
                    r.record, r."user", i.row AS item, {sort_key} AS sort_key, {value} AS value,
                    {log_checks.action_number(columns.action)} AS action,
                    {log_checks.first_problem(checks)} AS problem
                FROM ({log.sql}) r LEFT JOIN items i ON i.id = r.item
            """)
        except duckdb.OutOfMemoryException:
            raise
        except duckdb.Error as error:
            raise read_error(log, error) from error
        check_quotes(log)
        first_bad = f"SELECT record, problem FROM {table} WHERE problem IS NOT NULL ORDER BY record LIMIT 1"
        found = sql.first_row(self.db, first_bad)
        if found:
            column, _, reason = found[1].partition(log_checks.SEPARATOR)
            raise log.problem(found[0], column or None, reason)

    def keep_core(self) -> None:
        """Removes users and items with too few events until nothing changes."""
        min_user, min_item = self.config.min_user_events, self.layout.min_item_events
        enough = "{0} IN (SELECT {0} FROM log GROUP BY {0} HAVING count(*) >= {1})"
        what = "events of users or items with too few events"
        is_changed = True
        while is_changed:
            n_removed = 0
            if min_item > 1:
                n_removed += self._keep("log", enough.format("item", min_item), what)
            if min_user > 1:
                n_removed += self._keep("log", enough.format('"user"', min_user), what)
            is_changed = n_removed > 0
        if min_item:
            self._keep("items", "row IN (SELECT DISTINCT item FROM log)", "items with too few events")

    def number(self) -> None:
        """Numbers users in the order of their ids (the rowid is the index) and items in the order of their file."""
        user_order, item_order = (sql.id_order(column) for column in ('"user"', "id"))
        self.db.execute(
            f'CREATE TABLE users AS SELECT "user", count(*) AS n_events FROM log GROUP BY "user" ORDER BY {user_order}'
        )
        self.db.execute(f"""
            CREATE TABLE catalogue AS
            SELECT
                row, id, text, row_number() OVER (ORDER BY row) - 1 AS idx,
                row_number() OVER (ORDER BY {item_order}) AS rank
            FROM items
        """)
        counts = "SELECT (SELECT count(*) FROM users), (SELECT count(*) FROM catalogue), (SELECT count(*) FROM log)"
        self.n_users, self.n_items, self.n_events = sql.first_row(self.db, counts)
        if not self.n_events:
            reason = "no events"
            if self.dropped:
                left_out = ", ".join(f"{count} {what}" for what, count in self.dropped.items())
                reason = f"no events are left; left out: {left_out}"
            raise DataError(self.layout.log.path, None, None, reason)

    def write_users(self) -> None:
        """Writes users.txt, users_ends.npy and offsets.npy."""
        byte_end = event_end = 0
        offsets, ends = self._array("offsets", self.n_users + 1), self._array("users_ends", self.n_users)
        with offsets, ends, (self.work / prepared_folder.USERS).open("wb") as ids:
            offsets.write(np.zeros(1))
            for batch in sql.batches(self.db, 'SELECT "user", n_events FROM users ORDER BY rowid'):
                encoded = [user.encode() for user in batch["user"].to_pylist()]
                ids.writelines(encoded)
                byte_ends = np.cumsum([len(user) for user in encoded]) + byte_end
                event_ends = np.cumsum(batch["n_events"].to_numpy()) + event_end
                ends.write(byte_ends)
                offsets.write(event_ends)
                byte_end, event_end = int(byte_ends[-1]), int(event_ends[-1])

    def write_events(self) -> None:
        """Writes items.npy, values.npy, timestamps.npy and, if the log has actions, actions.npy.

        Ties in (user, timestamp, item id) are broken by value, then by action, so the order of a file with timestamps
        never matters.
        """
        query = """
            SELECT u.rowid AS user_index, c.idx AS item, l.value, l.sort_key, l.action
            FROM log l JOIN users u ON u."user" = l."user" JOIN catalogue c ON c.row = l.item
            ORDER BY user_index, l.sort_key, c.rank, l.value, l.action
        """
        offsets = np.load(self.work / "offsets.npy", mmap_mode="r")
        items, values, timestamps = (self._array(key, self.n_events) for key in ("items", "values", "timestamps"))
        actions = self._array(prepared_folder.ACTIONS, self.n_events) if self._has_actions else None
        begin = 0
        with items, values, timestamps, actions or contextlib.nullcontext():
            for batch in sql.batches(self.db, query):
                items.write(batch["item"].to_numpy())
                values.write(batch["value"].to_numpy())
                timestamps.write(self._seconds(batch, begin, offsets))
                if actions is not None:
                    actions.write(batch["action"].to_numpy())
                begin += len(batch)

    @property
    def _has_actions(self) -> bool:
        return self.layout.log.columns.action is not None

    def _seconds(self, batch: pyarrow.RecordBatch, begin: int, offsets: np.ndarray) -> np.ndarray:
        if self.layout.log.columns.timestamp is None:
            return np.arange(begin, begin + len(batch)) - offsets[batch["user_index"].to_numpy()]
        return batch["sort_key"].to_numpy() // (self.layout.ticks_per_second or self.unit.per_second)

    def count_keywords(self) -> None:
        """Creates keywords(item, tags); see the module `keywords` for which tags count."""
        # An empty tag is ignored, not an error, so the check for empty fields must not see the tag column.
        columns = replace(self.layout.tags.columns, value=None)
        self._load("tags", replace(self.layout.tags, columns=columns), r"lower(trim(r.value, e' \t\r\n'))", [])
        self.boundary = keywords.count(self.db, self.work, self.config.split, self.config.max_keywords)

    def write_catalogue(self) -> None:
        """Writes catalogue.jsonl, with the keywords if there are any."""
        tags = "NULL" if self.boundary is None else "k.tags"
        join = "" if self.boundary is None else "LEFT JOIN keywords k ON k.item = c.row"
        query = f"SELECT c.id, c.text, {tags} AS tags FROM catalogue c {join} ORDER BY c.idx"
        with (self.work / prepared_folder.CATALOGUE).open("w", encoding="utf-8") as file:
            for batch in sql.batches(self.db, query):
                for record in batch.to_pylist():
                    item_text = json.loads(record["text"])
                    if record["tags"]:
                        item_text["keywords"] = record["tags"]
                    file.write(json.dumps({"id": record["id"], "text": item_text}, ensure_ascii=False) + "\n")

    def meta(self) -> Prepared:
        """The content of meta.json, for the files in `work`."""
        files = {
            file: prepared_folder.file_digest(self.work / file) for file in prepared_folder.files(self._has_actions)
        }
        settings = {"split": asdict(self.config.split), "text_fields": list(self.fields)}
        settings |= {key: getattr(self.config, key) for key in ("max_keywords", "min_user_events")}
        return Prepared(
            layout=self.layout.name,
            n_users=self.n_users,
            n_items=self.n_items,
            n_events=self.n_events,
            has_timestamps=self.layout.log.columns.timestamp is not None,
            has_actions=self._has_actions,
            has_values=self.layout.log.columns.value is not None,
            timestamp_unit=self.unit.name,
            digest=prepared_folder.content_digest(files),
            dropped=self.dropped,
            keywords=self.boundary,
            config=settings | {"min_item_events": self.layout.min_item_events},
            files=files,
        )

    def _array(self, key: str, length: int) -> ArrayWriter:
        kinds = prepared_folder.ARRAYS | prepared_folder.ARRAYS_OF_SOME_LOGS
        return ArrayWriter(self.work / f"{key}.npy", kinds[key], length)
