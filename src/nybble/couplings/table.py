"""The register. `tests/test_couplings.py` checks it, for example with a new version of a library.

Each symbol must exist in the installed version with the parameters that nybble relies on, each file must mention it, and nothing
private may be used in `src` without an entry.
"""

from __future__ import annotations

from nybble.couplings.adapters_table import ADAPTERS
from nybble.couplings.coupling import Coupling
from nybble.couplings.others_table import OTHERS
from nybble.couplings.torch_table import TORCH
from nybble.couplings.transformers_table import TRANSFORMERS

COUPLINGS: tuple[Coupling, ...] = (*TORCH, *TRANSFORMERS, *ADAPTERS, *OTHERS)
