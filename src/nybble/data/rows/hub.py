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

# The base class of the HTTP client's errors: httpx's with huggingface_hub 1, httpx2's with 2.
CLIENT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
# Errors that interrupt a stream: of the network, of a file that cannot be unpacked (zlib.error) or parsed, of an unreadable cell.
STREAM_ERRORS = (OSError, *UNREADABLE, zlib.error, DatasetsError, CLIENT_ERROR)


@dataclass(frozen=True)
class HubSplit:
    """One split of a data set, looked up and opened once, so that licence, fingerprint and rows are of the same commit."""

    id: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    """Read rows over the network when they are needed, for data larger than the disk."""

    def rows(self) -> Iterator[Row]:
        """The split's rows, in order."""
        rows = iter(self._dataset)
        for number in itertools.count(1):
            origin = f"{self.id}[{self.split}]:row {number}"
            try:
                values = next(rows)
            except StopIteration:
                return
            except STREAM_ERRORS as error:
                raise DataError(
                    f"reading stopped: {error}",
                    where=origin,
                    fix="check the network, and the data set's page for its files",
                ) from error
            yield Row(dict(values), origin)

    @property
    def fingerprint(self) -> str:
        """Datasets' fingerprint of the files, or in a stream their commit."""
        if self.streaming:
            return f"{self.id} {self.subset} {self.split} {self._commit}"
        fingerprint: str = self._dataset._fingerprint
        return fingerprint

    @property
    def licence(self) -> str | None:
        """The licence that its card names; None if it names none or the Hub does not answer."""
        card = self._info.card_data if isinstance(self._info, DatasetInfo) else None
        licence: Any = getattr(card, "license", None)
        return ", ".join(licence) if isinstance(licence, list) else licence

    @property
    def _commit(self) -> str | None:
        """The commit that the revision names now; the revision itself if the Hub does not answer.

        If it is given a name, Datasets 5.2 may use another revision's rows from its cache when the Hub fails, and only warns.
        """
        if isinstance(self._info, RevisionNotFoundError):
            raise DataError(
                f"{self.id} has no revision {self.revision}", fix="set data.revision to one of its branches or tags"
            ) from self._info
        return self._info.sha if isinstance(self._info, DatasetInfo) else self.revision

    @functools.cached_property
    def _info(self) -> DatasetInfo | Exception:
        """The Hub's information about the data set, or the error of the request."""
        try:
            return HfApi().dataset_info(self.id, revision=self.revision)
        except (OSError, CLIENT_ERROR) as error:
            return error

    @functools.cached_property
    def _dataset(self) -> Dataset | IterableDataset:
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
            why = error.__cause__ or error  # a DatasetGenerationError has no useful message
            raise DataError(f"{self.id} cannot be read: {why}", fix="use a data set of plain files") from error
        except ValueError as error:  # an unknown split or subset: the message lists those that exist
            raise DataError(f"{self.id}: {error}", fix="set data.split and data.subset") from error
