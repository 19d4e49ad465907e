"""Raw data sets -> a prepared folder -> sequences and splits. Other packages import these names from here.

dataset          the types: Dataset, Sequence, Event, DataError
actions          what users can do with items
item_text        the six fields of an item -> the prompt that the encoder reads
sources          the files of a table: folders, globs, object stores
layouts          how the log of a data set is read (neutral_layout: the neutral format)
known_layouts    which data set a folder contains
timestamp_unit   whether whole numbers are seconds, milliseconds, microseconds or nanoseconds
catalogue        the items of each data set, and their text
preparation      raw files -> a prepared folder, streaming
log_checks       how each record of a log is validated
keywords         tags that predate the split -> keywords
prepared_folder  a prepared folder -> Dataset, memory-mapped
splits           which events are for training, validation and test
neutral          the neutral format, for every other data set
"""

from learn.data.catalogue import movie_text, plain_title
from learn.data.dataset import DataError, Dataset, Event, Events, Interaction, Sequence
from learn.data.known_layouts import find_layout
from learn.data.neutral import COLUMNS, INTERACTIONS, ITEMS, read_movielens, read_neutral, write_neutral
from learn.data.preparation import PrepareConfig, prepare
from learn.data.prepared_folder import (
    Prepared,
    PreparedSequences,
    has_own_actions,
    read_meta,
    read_prepared,
    verify_prepared,
)
from learn.data.sources import NeutralFiles
from learn.data.splits import Split, SplitConfig, TimeSplitConfig, sample_events, split

__all__ = [
    "COLUMNS",
    "INTERACTIONS",
    "ITEMS",
    "DataError",
    "Dataset",
    "Event",
    "Events",
    "Interaction",
    "NeutralFiles",
    "PrepareConfig",
    "Prepared",
    "PreparedSequences",
    "Sequence",
    "Split",
    "SplitConfig",
    "TimeSplitConfig",
    "find_layout",
    "has_own_actions",
    "movie_text",
    "plain_title",
    "prepare",
    "read_meta",
    "read_movielens",
    "read_neutral",
    "read_prepared",
    "sample_events",
    "split",
    "verify_prepared",
    "write_neutral",
]
