"""Rows that a quantization is calibrated on: of train only, because val and test have to say how good it has become."""

import heapq
from pathlib import Path

from moult.data.token_file import rows_of
from moult.errors import MoultError
from moult.files import sha256_text


def calibration_rows(train: Path, count: int) -> list[list[int]]:
    """The token ids of `count` rows of train.parquet (all if it has no more), whole: (tokens,) each.

    They are those with the lowest hashes of their ids: a random sample that is the same every time, and in which most rows
    stay when the dataset grows.
    """
    rows = rows_of(train)
    if not rows:
        raise MoultError(f"{train}: not a row to calibrate on", "run encode again")
    hashes = [(sha256_text(row["id"]), place) for place, row in enumerate(rows)]
    return [rows[place]["input_ids"] for _, place in heapq.nsmallest(count, hashes)]
