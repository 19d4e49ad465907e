"""Any data set known here -> a prepared folder, in memory that does not grow with the log.

DuckDB does the work on disk, within `PrepareConfig.memory_mb`:

    items      read one at a time (`catalogue`), checked, kept as a table
    log        one pass over the file: each record typed, checked, joined with the items; the first bad one is raised
    core       optional: users and items with too few events leave until none is left
    events     sorted by (user, timestamp, item id) and written batch by batch as .npy files
    keywords   optional: MovieLens' tags, as far as they predate the split
    meta       SHA-256 of every file; meta.json comes last and atomically

Here nothing else grows but with the number of users, by 8 bytes each where keywords are counted. Whoever reads the
folder holds its catalogue.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow
from tqdm import tqdm

from learn.data import keywords, log_checks, prepared_folder, sql
from learn.data.dataset import DataError
from learn.data.item_text import ItemText
from learn.data.layouts import TEXT_FIELDS, Layout, Log, check_quotes, explain, find_layout
from learn.data.prepared_folder import ArrayWriter, KeywordBoundary, Prepared
from learn.data.splits import SplitConfig, TimeSplitConfig


@dataclass(frozen=True)
class PrepareConfig:
    """How raw files become a prepared folder. The defaults leave nothing out."""

    # The split that keywords from tags must predate. Without keywords any split may follow.
    split: SplitConfig | TimeSplitConfig = field(default_factory=SplitConfig)
    # Tags of MovieLens as keywords: at most so many an item; 0 = none. 8 fit the prompt well.
    max_keywords: int = 0
    # Users and items with fewer events leave, again and again until all have as many (k-core).
    min_user_events: int = 0
    # None: 1 for Amazon, whose catalogue holds much that nobody reviewed, else 0.
    min_item_events: int | None = None
    # None: title, category and brand for public data, as LEARN has it, and all six for the neutral format.
    text_fields: tuple[str, ...] | None = None
    # What DuckDB may hold; the process needs about 150 MB beside it. More makes large logs faster.
    memory_mb: int = 1024
    threads: int = 2

    def __post_init__(self) -> None:
        bounds = {"max_keywords": 0, "min_user_events": 0, "min_item_events": 0, "memory_mb": 64, "threads": 1}
        for key, least in bounds.items():
            value = getattr(self, key)
            if value is not None and value < least:
                raise ValueError(f"{key} is {value}; expected {least} or more")
        unknown = sorted(set(self.text_fields or ()) - set(TEXT_FIELDS))
        if unknown:
            raise ValueError(f"text_fields has {unknown[0]!r}; expected some of {', '.join(TEXT_FIELDS)}")


def prepare(source: Path, out: Path, config: PrepareConfig | None = None) -> Prepared:
    """Reads the data set in `source`, whatever its layout, leaves a prepared folder in `out` and prints its counts.

    Raises `DataError` for what is wrong in a file and ValueError for what is wrong in the config. What an earlier call
    left in `out` stays until the new files are complete.
    """
    meta = build(source, out, config or PrepareConfig())
    print(meta)
    return meta


def build(source: Path, out: Path, config: PrepareConfig) -> Prepared:
    """`prepare` without a word."""
    if source.resolve() == out.resolve():
        raise ValueError(f"{out} is the folder of the raw files; expected another one to prepare into")
    layout = find_layout(source)
    _check_tags(layout, config, source)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".preparing-", dir=out) as work:
        meta = _Preparation(layout, config, Path(work)).run()
        _publish(Path(work), out, meta)
    return meta


def _check_tags(layout: Layout, config: PrepareConfig, source: Path) -> None:
    if not config.max_keywords:
        return
    if layout.tags is None:
        reason = f"max_keywords is {config.max_keywords}, but {layout.name} has no tags here"
        raise DataError(source, None, None, reason)
    if layout.log.columns.timestamp is None:
        raise DataError(source, None, None, "without timestamps of the ratings no tag can be said to predate the split")


def _publish(work: Path, out: Path, meta: Prepared) -> None:
    """Moves the files in, meta.json last: whoever finds it finds the rest."""
    (out / prepared_folder.META).unlink(missing_ok=True)
    (work / prepared_folder.META).write_text(meta.to_json(), encoding="utf-8")
    for file in (*prepared_folder.FILES, prepared_folder.META):
        (work / file).replace(out / file)


class _Preparation:
    """One run, with its tables in a DuckDB file inside `work`."""

    def __init__(self, layout: Layout, config: PrepareConfig, work: Path) -> None:
        given = {} if config.min_item_events is None else {"min_item_events": config.min_item_events}
        self.layout, self.config, self.work = replace(layout, **given), config, work
        self.fields = config.text_fields or layout.text_fields
        self.dropped: dict[str, int] = {}
        self.boundary: KeywordBoundary | None = None
        settings = {"memory_limit": f"{config.memory_mb}MB", "temp_directory": str(work / "spill")}
        settings |= {"threads": config.threads, "preserve_insertion_order": True}
        self.db = duckdb.connect(str(work / "log.duckdb"), config=settings)
        # DuckDB 2.0 draws its bar on standard output, in the middle of what is printed there.
        self.db.execute("SET enable_progress_bar = false")

    def run(self) -> Prepared:
        """All steps; the folder's files lie in `work` then."""
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
            reason = f"memory_mb is {self.config.memory_mb}, which is too little here: {str(error).splitlines()[0]}"
            raise ValueError(reason) from error
        finally:
            self.db.close()

    def load_items(self) -> None:
        """items(row, id, text): the text as JSON, cut to the wanted fields."""
        self.db.execute("CREATE TABLE items (row BIGINT, id VARCHAR, text VARCHAR)")
        batch: list[tuple[int, str, str]] = []
        for row, identifier, item_text in self.layout.read_items(self.layout.items):
            given = {key: value for key, value in item_text.to_json().items() if value and key in self.fields}
            if ItemText.from_json(given).is_empty:
                self._without_text(row, identifier)
                continue
            batch.append((row, identifier, json.dumps(given, ensure_ascii=False)))
            if len(batch) == sql.BATCH:
                self._insert_items(batch)
                batch = []
        self._insert_items(batch)
        self._find_copies()

    def _insert_items(self, batch: list[tuple[int, str, str]]) -> None:
        if batch:
            columns = [list(column) for column in zip(*batch, strict=True)]
            sql.insert(self.db, "items", dict(zip(("row", "id", "text"), columns, strict=True)))

    def _find_copies(self) -> None:
        copies = "FROM items QUALIFY row_number() OVER (PARTITION BY id ORDER BY row) > 1"
        if self.layout.is_lenient:
            self._keep("items", f"row NOT IN (SELECT row {copies})", "items that stand there a second time")
            return
        found = sql.first_row(self.db, f"SELECT row, id {copies} ORDER BY row LIMIT 1")
        if found:
            raise DataError(self.layout.items, found[0], "id", f"{found[1]!r} stands here a second time")

    def _without_text(self, row: int, identifier: str) -> None:
        if not self.layout.is_lenient:
            reason = f"{identifier!r} has no text at all, so nothing can be encoded"
            raise DataError(self.layout.items, row, "text", reason)
        self._count("items without text", 1)

    def _count(self, what: str, count: int) -> None:
        if count:
            self.dropped[what] = self.dropped.get(what, 0) + count

    def _keep(self, table: str, condition: str, what: str) -> int:
        """Writes the table anew with the rows that fit, and returns how many did not."""
        count = f"SELECT count(*) FROM {table}"
        before = sql.first_row(self.db, count)[0]
        self.db.execute(f"CREATE OR REPLACE TABLE {table} AS SELECT * FROM {table} WHERE {condition}")
        gone = before - sql.first_row(self.db, count)[0]
        self._count(what, gone)
        return gone

    def load_log(self) -> None:
        """log(record, user, item, fine, value): `item` is the row of items, `fine` the finest time that orders."""
        log = self.layout.log
        value = "1" if log.columns.value is None else "TRY_CAST(r.value AS FLOAT)"
        self._load("log", log, f"CAST({value} AS FLOAT)", log_checks.is_no_value(log.columns.value))
        if self.layout.is_lenient:
            self._keep("log", "item IS NOT NULL", "events of items without text")

    def _load(self, table: str, log: Log, value: str, value_checks: list[log_checks.Check]) -> None:
        columns = log.columns
        wrong = log_checks.is_broken() + log_checks.is_empty(columns)
        if not self.layout.is_lenient:
            wrong += log_checks.is_unknown(columns.item, self.layout.items.name)
        wrong += log_checks.is_no_time(columns.timestamp) + value_checks
        fine = "r.record" if columns.timestamp is None else "TRY_CAST(trim(r.timestamp) AS BIGINT)"
        try:
            self.db.execute(f"""
                CREATE TABLE {table} AS
                SELECT
                    r.record, r."user", i.row AS item, {fine} AS fine, {value} AS value,
                    {log_checks.first_problem(wrong)} AS problem
                FROM ({log.sql}) r LEFT JOIN items i ON i.id = r.item
            """)
        except duckdb.OutOfMemoryException:
            raise
        except duckdb.Error as error:
            raise explain(log, error) from error
        check_quotes(log)
        bad = f"SELECT record, problem FROM {table} WHERE problem IS NOT NULL ORDER BY record LIMIT 1"
        found = sql.first_row(self.db, bad)
        if found:
            column, _, reason = found[1].partition(log_checks.SEPARATOR)
            raise log.problem(found[0], column or None, reason)

    def keep_core(self) -> None:
        """Takes out users and items with too few events until nothing changes."""
        least_user, least_item = self.config.min_user_events, self.layout.min_item_events
        enough = "{0} IN (SELECT {0} FROM log GROUP BY {0} HAVING count(*) >= {1})"
        what = "events of users or items with too few events"
        gone = 1
        while gone:
            gone = self._keep("log", enough.format("item", least_item), what) if least_item > 1 else 0
            gone += self._keep("log", enough.format('"user"', least_user), what) if least_user > 1 else 0
        if least_item:
            self._keep("items", "row IN (SELECT DISTINCT item FROM log)", "items with too few events")

    def number(self) -> None:
        """users in the order of their ids, rowid being the index; catalogue in the order of its file."""
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
            raise DataError(self.layout.log.path, None, None, "no events" + (" are left" if self.dropped else ""))

    def write_users(self) -> None:
        """users.txt, users_ends.npy and offsets.npy."""
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
        """items.npy, values.npy and timestamps.npy.

        Behind (user, timestamp, item id) the value decides, so that the order of a file with timestamps never counts.
        """
        query = """
            SELECT u.rowid AS user_index, c.idx AS item, l.value, l.fine
            FROM log l JOIN users u ON u."user" = l."user" JOIN catalogue c ON c.row = l.item
            ORDER BY user_index, l.fine, c.rank, l.value
        """
        offsets = np.load(self.work / "offsets.npy", mmap_mode="r")
        items, values, timestamps = (self._array(key, self.n_events) for key in ("items", "values", "timestamps"))
        begin = 0
        with items, values, timestamps:
            for batch in sql.batches(self.db, query):
                items.write(batch["item"].to_numpy())
                values.write(batch["value"].to_numpy())
                timestamps.write(self._seconds(batch, begin, offsets))
                begin += len(batch)

    def _seconds(self, batch: pyarrow.RecordBatch, begin: int, offsets: np.ndarray) -> np.ndarray:
        if self.layout.log.columns.timestamp is None:
            return np.arange(begin, begin + len(batch)) - offsets[batch["user_index"].to_numpy()]
        return batch["fine"].to_numpy() // self.layout.ticks_per_second

    def count_keywords(self) -> None:
        """The table keywords(item, tags); see the module `keywords` for which tags count."""
        # A tag of nothing but spaces tells nothing, and is no reason to stop.
        columns = replace(self.layout.tags.columns, value=None)
        self._load("tags", replace(self.layout.tags, columns=columns), r"lower(trim(r.value, e' \t\r\n'))", [])
        self.boundary = keywords.count(self.db, self.work, self.config.split, self.config.max_keywords)

    def write_catalogue(self) -> None:
        """catalogue.jsonl, with the keywords."""
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
        """Counts and digests of what lies in `work`."""
        files = {file: prepared_folder.file_digest(self.work / file) for file in prepared_folder.FILES}
        settings = {"split": asdict(self.config.split), "text_fields": list(self.fields)}
        settings |= {key: getattr(self.config, key) for key in ("max_keywords", "min_user_events")}
        return Prepared(
            layout=self.layout.name,
            n_users=self.n_users,
            n_items=self.n_items,
            n_events=self.n_events,
            has_timestamps=self.layout.log.columns.timestamp is not None,
            digest=prepared_folder.content_digest(files),
            dropped=self.dropped,
            keywords=self.boundary,
            config=settings | {"min_item_events": self.layout.min_item_events},
            files=files,
        )

    def _array(self, key: str, length: int) -> ArrayWriter:
        return ArrayWriter(self.work / f"{key}.npy", prepared_folder.ARRAYS[key], length)
