"""Whether a card is lost: after some errors nothing can be computed on it until the process has ended."""

from __future__ import annotations

import torch


def why_card_is_lost(error: BaseException | None) -> str | None:
    """The first line of an error after which the card answers nothing; None for other errors.

    Args:
        error: what a step failed with.
    """
    if not isinstance(error, torch.AcceleratorError):
        return None
    try:
        torch.cuda.synchronize()
    except torch.AcceleratorError as again:
        return (str(again).splitlines() or ["no message"])[0]
    return None
