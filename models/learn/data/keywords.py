"""MovieLens' tags -> keywords of each film, without using any tag from the period that a split holds out.

The keywords of a film are the tags that most users gave it, lower-cased and stripped, with ties in alphabetical order.
Which tags count depends on the split:

- Leave-last-out: a tag of user u counts if it is older than u's first held-out event. For a user with two or more
  events, but too few for this split, it counts if it is older than the second event, because no split that holds out
  fewer events can begin earlier. No event of a user with one event or none is ever held out, so a tag of such a user
  counts if it is older than the last rating of the data set.
- By time: a tag counts if it is older than the first cut, whichever user gave it.

The keywords therefore also suit a split that holds out no more events per user, or that cuts no earlier;
`splits.split` checks this.
"""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np

from learn.data import sql
from learn.data.prepared_folder import KeywordBoundary
from learn.data.splits import SplitConfig, TimeSplitConfig, cut_timestamps

# Users per insert into `boundaries`.
CHUNK = 1 << 18


def count(db: duckdb.DuckDBPyConnection, folder: Path, split: SplitConfig | TimeSplitConfig, n: int) -> KeywordBoundary:
    """Creates the table keywords(item, tags), with at most `n` tags per film, and returns what the tags predate.

    The tables tags(user, item, sort_key, value) and users must exist, and `folder` must already hold timestamps.npy
    and offsets.npy.
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
            WHERE t.sort_key < coalesce(b.before, {before_all}) AND t.value <> ''
            GROUP BY t.item, t.value
            QUALIFY row_number() OVER (PARTITION BY t.item ORDER BY n_users DESC, tag) <= {n}
        )
        SELECT item, list(tag ORDER BY n_users DESC, tag) AS tags FROM counted GROUP BY item
    """)
    return boundary


def _fill_boundaries(db: duckdb.DuckDBPyConnection, timestamps: np.ndarray, offsets: np.ndarray, held_out: int) -> None:
    """Stores the timestamp of each user's first held-out event, or of the second event if that is later."""
    if not held_out:
        return
    for begin in range(0, len(offsets) - 1, CHUNK):
        own = np.asarray(offsets[begin : begin + CHUNK + 1])
        lengths = np.diff(own)
        user = np.flatnonzero(lengths >= 2)
        position = own[user] + np.maximum(lengths[user] - held_out, 1)
        sql.insert(db, "boundaries", {"user_index": user + begin, "before": timestamps[position]})
