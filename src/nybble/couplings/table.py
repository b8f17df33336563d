"""The register. A library's new version is held against it first: `tests/test_couplings.py` walks it.

Each symbol is there in the installed version with the parameters that are relied upon, each file mentions it, and nothing private
is used in `src` without an entry.
"""

from __future__ import annotations

from nybble.couplings.adapters_table import ADAPTERS
from nybble.couplings.coupling import Coupling
from nybble.couplings.others_table import OTHERS
from nybble.couplings.torch_table import TORCH
from nybble.couplings.transformers_table import TRANSFORMERS

COUPLINGS: tuple[Coupling, ...] = (*TORCH, *TRANSFORMERS, *ADAPTERS, *OTHERS)
