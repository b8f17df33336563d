"""Data sets on the Hugging Face Hub, read by Datasets."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

from nybble.data.rows.readers import Row
from nybble.data.rows.readers.cells import UNREADABLE
from nybble.errors import DataError

# The base class of every fault of the HTTP client: httpx's under huggingface_hub 1, httpx2's under 2.
CLIENT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
# What ends a stream before its end: the network, a file that cannot be unpacked (zlib.error) or parsed, a cell without a value.
BROKEN_OFF = (OSError, *UNREADABLE, zlib.error, DatasetsError, CLIENT_ERROR)


@dataclass(frozen=True)
class Place:
    """One split of a data set."""

    id: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    """Read over the network as rows are asked for, for data larger than the disk."""


def read(place: Place) -> Iterator[Row]:
    """Its rows in order."""
    rows = iter(_open(place))
    for number in itertools.count(1):
        origin = f"{place.id}[{place.split}]:row {number}"
        try:
            values = next(rows)
        except StopIteration:
            return
        except BROKEN_OFF as error:
            raise DataError(
                f"reading stopped: {error}",
                where=origin,
                fix="check the network, and the data set's page for its files",
            ) from error
        yield Row(dict(values), origin)


def fingerprint(place: Place) -> str:
    """What Datasets knows of the files and their commit."""
    if place.streaming:
        return f"{place.id} {place.subset} {place.split} {_commit(place)}"
    found: str = _open(place)._fingerprint
    return found


def licence(place: Place) -> str | None:
    """The licence its card names, where the Hub answers."""
    try:
        card = HfApi().dataset_info(place.id, revision=place.revision).card_data
    except (OSError, CLIENT_ERROR):
        return None
    named: Any = getattr(card, "license", None)
    return ", ".join(named) if isinstance(named, list) else named


def _open(place: Place) -> Dataset | IterableDataset:
    try:
        return load_dataset(
            place.id, place.subset, split=place.split, revision=_commit(place), streaming=place.streaming
        )
    except (DatasetNotFoundError, ConnectionError, HfHubHTTPError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, DatasetNotFoundError) or status in (401, 403, 404):
            raise DataError(
                f"{place.id} is neither a local file nor a Hub data set that this login can read",
                fix="check the name; for a private or gated one: hf auth login, and accept its terms on its page",
            ) from error
        raise DataError(
            f"{place.id} is not a file here, and the Hub could not be read: {error}",
            fix="check the network, or the path if a file or folder was meant",
        ) from error
    except (DatasetsError, RuntimeError) as error:  # no data files, files that cannot be parsed, a loading script
        why = error.__cause__ or error  # DatasetGenerationError says no more than its name
        raise DataError(f"{place.id} cannot be read: {why}", fix="use a data set of plain files") from error
    except ValueError as error:  # an unknown split or subset: the message lists those that exist
        raise DataError(f"{place.id}: {error}", fix="set data.split and data.subset") from error


def _commit(place: Place) -> str | None:
    """The commit a revision stands for now; as it was written where the Hub does not answer.

    Given a name, Datasets 5.2 may take another revision's rows from its cache when the Hub stumbles, and only warns.
    """
    try:
        return HfApi().dataset_info(place.id, revision=place.revision).sha
    except RevisionNotFoundError as error:
        raise DataError(
            f"{place.id} has no revision {place.revision}", fix="set data.revision to one of its branches or tags"
        ) from error
    except (OSError, CLIENT_ERROR):
        return place.revision
