from __future__ import annotations

import numpy as np

from learn.padding import pad


def test_rows_are_padded_on_the_right_and_the_mask_marks_real_entries():
    padded, mask = pad([[5, 6], np.array([7, 8, 9], np.int32), []], 2)
    assert padded.tolist() == [[5, 6, 2], [7, 8, 9], [2, 2, 2]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1], [0, 0, 0]]
    assert padded.dtype == mask.dtype == np.int64


def test_the_padded_width_is_never_below_the_minimum():
    assert pad([[], []])[0].tolist() == [[0], [0]]
    assert pad([[3]], least=3)[0].tolist() == [[3, 0, 0]]
    assert pad([])[0].shape == (0, 1)
