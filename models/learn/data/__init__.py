"""Raw data sets -> a prepared folder -> sequences and splits. The rest of the code imports its names from here.

dataset          the types: Dataset, Sequence, Event, DataError
item_text        six fields of an item -> the one prompt that the encoder reads
layouts          which data set lies in a folder, and how its log is read
catalogue        the items of each data set, and their text
preparation      raw files -> a prepared folder, streaming (log_checks: what may be wrong in a log)
keywords         tags -> keywords, as far as they predate the split
prepared_folder  a prepared folder -> Dataset, memory-mapped
splits           what is trained on, what is predicted
neutral          the neutral format: how any other data set comes in
"""

from learn.data.catalogue import movie_text, plain_title
from learn.data.dataset import DataError, Dataset, Event, Interaction, Sequence
from learn.data.layouts import find_layout
from learn.data.neutral import COLUMNS, INTERACTIONS, ITEMS, read_movielens, read_neutral, write_neutral
from learn.data.preparation import PrepareConfig, prepare
from learn.data.prepared_folder import Prepared, PreparedSequences, read_meta, read_prepared, verify_prepared
from learn.data.splits import Split, SplitConfig, TimeSplitConfig, split

__all__ = [
    "COLUMNS",
    "INTERACTIONS",
    "ITEMS",
    "DataError",
    "Dataset",
    "Event",
    "Interaction",
    "PrepareConfig",
    "Prepared",
    "PreparedSequences",
    "Sequence",
    "Split",
    "SplitConfig",
    "TimeSplitConfig",
    "find_layout",
    "movie_text",
    "plain_title",
    "prepare",
    "read_meta",
    "read_movielens",
    "read_neutral",
    "read_prepared",
    "split",
    "verify_prepared",
    "write_neutral",
]
