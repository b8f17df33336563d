"""Data sets on the Hugging Face Hub, read by Datasets."""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub import DatasetInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

from nybble.data.rows.readers import Row
from nybble.data.rows.readers.cells import UNREADABLE
from nybble.errors import DataError

# The base class of every fault of the HTTP client: httpx's under huggingface_hub 1, httpx2's under 2.
CLIENT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
# What ends a stream before its end: the network, a file that cannot be unpacked (zlib.error) or parsed, a cell without a value.
BROKEN_OFF = (OSError, *UNREADABLE, zlib.error, DatasetsError, CLIENT_ERROR)


@dataclass(frozen=True)
class HubSplit:
    """One split of a data set, looked up and opened once: licence, fingerprint and rows are of the same commit."""

    id: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    """Read over the network as rows are asked for, for data larger than the disk."""

    def rows(self) -> Iterator[Row]:
        """Its rows in order."""
        rows = iter(self._opened)
        for number in itertools.count(1):
            origin = f"{self.id}[{self.split}]:row {number}"
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

    @property
    def fingerprint(self) -> str:
        """What Datasets knows of the files and their commit."""
        if self.streaming:
            return f"{self.id} {self.subset} {self.split} {self._commit}"
        found: str = self._opened._fingerprint
        return found

    @property
    def licence(self) -> str | None:
        """The licence its card names, where the Hub answers."""
        card = self._found.card_data if isinstance(self._found, DatasetInfo) else None
        named: Any = getattr(card, "license", None)
        return ", ".join(named) if isinstance(named, list) else named

    @property
    def _commit(self) -> str | None:
        """The commit that its revision means now; the revision as given if the Hub does not answer.

        Given a name, Datasets 5.2 may take another revision's rows from its cache when the Hub stumbles, and only warns.
        """
        if isinstance(self._found, RevisionNotFoundError):
            raise DataError(
                f"{self.id} has no revision {self.revision}", fix="set data.revision to one of its branches or tags"
            ) from self._found
        return self._found.sha if isinstance(self._found, DatasetInfo) else self.revision

    @functools.cached_property
    def _found(self) -> DatasetInfo | Exception:
        """What the Hub says of it, or why it says nothing."""
        try:
            return HfApi().dataset_info(self.id, revision=self.revision)
        except (OSError, CLIENT_ERROR) as error:
            return error

    @functools.cached_property
    def _opened(self) -> Dataset | IterableDataset:
        commit = self._commit
        try:
            return load_dataset(self.id, self.subset, split=self.split, revision=commit, streaming=self.streaming)
        except (DatasetNotFoundError, ConnectionError, HfHubHTTPError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if isinstance(error, DatasetNotFoundError) or status in (401, 403, 404):
                raise DataError(
                    f"{self.id} is neither a local file nor a Hub data set that this login can read",
                    fix="check the name; for a private or gated one: hf auth login, and accept its terms on its page",
                ) from error
            raise DataError(
                f"{self.id} is not a file here, and the Hub could not be read: {error}",
                fix="check the network, or the path if a file or folder was meant",
            ) from error
        except (DatasetsError, RuntimeError) as error:  # no data files, files that cannot be parsed, a loading script
            why = error.__cause__ or error  # DatasetGenerationError says no more than its name
            raise DataError(f"{self.id} cannot be read: {why}", fix="use a data set of plain files") from error
        except ValueError as error:  # an unknown split or subset: the message lists those that exist
            raise DataError(f"{self.id}: {error}", fix="set data.split and data.subset") from error
