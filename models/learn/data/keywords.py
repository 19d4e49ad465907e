"""MovieLens' tags -> keywords of a film, without a word from the events that a split holds out.

Of each film the tags that most users gave it, lower-cased and stripped; ties by name. Which tags count:

- Leave-last-out: a tag of user u that is older than u's first held-out event. Users with two or more events, but too
  few for this split, count up to their second event: no split with fewer held-out events can begin earlier. A user
  with one event or none is never held out from, so such a tag counts if it is older than the last rating of the data.
- By time: a tag that is older than the first cut, whoever gave it.

So a later split fits if it holds out at most as many events a user, or cuts no earlier; `splits.split` checks that.
"""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np

from learn.data import sql
from learn.data.prepared_folder import KeywordBoundary
from learn.data.splits import SplitConfig, TimeSplitConfig, cut_timestamps

# Users looked at in one go.
CHUNK = 1 << 18


def count(db: duckdb.DuckDBPyConnection, folder: Path, split: SplitConfig | TimeSplitConfig, n: int) -> KeywordBoundary:
    """Tables tags(user, item, fine, value) and users -> keywords(item, tags), at most n a film.

    `folder` has the sorted timestamps and offsets already.
    """
    timestamps, offsets = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("timestamps", "offsets"))
    db.execute("CREATE TABLE boundaries (user_index BIGINT, before BIGINT)")
    if isinstance(split, TimeSplitConfig):
        before_all = cut_timestamps(timestamps, split)[0]
        boundary = KeywordBoundary(cut=before_all)
    else:
        before_all = int(timestamps.max())
        boundary = KeywordBoundary(held_out=split.held_out)
        _fill_boundaries(db, timestamps, offsets, split.held_out)
    db.execute(f"""
        CREATE TABLE keywords AS
        WITH counted AS (
            SELECT t.item, t.value AS tag, count(DISTINCT t."user") AS n_users
            FROM tags t LEFT JOIN users u ON u."user" = t."user" LEFT JOIN boundaries b ON b.user_index = u.rowid
            WHERE t.fine < coalesce(b.before, {before_all}) AND t.value <> ''
            GROUP BY t.item, t.value
            QUALIFY row_number() OVER (PARTITION BY t.item ORDER BY n_users DESC, tag) <= {n}
        )
        SELECT item, list(tag ORDER BY n_users DESC, tag) AS tags FROM counted GROUP BY item
    """)
    return boundary


def _fill_boundaries(db: duckdb.DuckDBPyConnection, timestamps: np.ndarray, offsets: np.ndarray, held_out: int) -> None:
    """The timestamp of each user's first held-out event, or of the second event if that is later."""
    if not held_out:
        return
    for begin in range(0, len(offsets) - 1, CHUNK):
        own = np.asarray(offsets[begin : begin + CHUNK + 1])
        lengths = np.diff(own)
        user = np.flatnonzero(lengths >= 2)
        position = own[user] + np.maximum(lengths[user] - held_out, 1)
        sql.insert(db, "boundaries", {"user_index": user + begin, "before": timestamps[position]})
