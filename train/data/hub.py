"""Data sets of the Hugging Face hub: their splits, and the rows of a split that this process reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from train.hosts.shares import Share

if TYPE_CHECKING:
    from datasets import DatasetDict


def download_splits(name: str, subset: str | None) -> DatasetDict:
    """A hub data set's splits.

    Raises:
      ValueError: the hub is not in reach, or has no such data set or subset.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(name, subset)
    except ConnectionError as error:
        remedy = "check the network, or give local files by data.train and data.validation"
        raise ValueError(f"the Hugging Face hub is not in reach for {name!r}; {remedy}") from error
    except (OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"data set {name!r} can't be loaded; check data.name and data.subset: {reason}") from error


def find_split(splits: Any, name: str, split: str, remedy: str) -> Any:
    """The split `split` of the data set `name`.

    Args:
      splits: from `download_splits`.
      remedy: what to do if there is no such split, for the error.

    Raises:
      ValueError: there is no such split; the message lists those there are.
    """
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}; splits there: {', '.join(map(str, splits))}; {remedy}")
    return splits[split]


def rows_of_split(source: str, split: Any, share: Share) -> range:
    """This process's rows of a hub data set's split; no others are read.

    Raises:
      ValueError: the split is empty, or differs between processes.
    """
    if not len(split):
        raise ValueError(f"{source} holds no rows; choose another split")
    share.agree(source, lambda: [len(split), repr(split[0]), repr(split[-1])])
    return share.cut(len(split))
