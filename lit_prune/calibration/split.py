"""Three sides of the same text: calibrate, choose, score. Decided by content alone."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

Side = Literal["calibrate", "choose", "score"]
SIDES: tuple[Side, ...] = get_args(Side)
# upper end of each side's interval on [0, 1)
_ENDS: dict[Side, float] = {"calibrate": 0.6, "choose": 0.8, "score": 1.0}


def row_digest(ids: Tensor) -> str:
    """Return the identity of a sample: a hash of its real token ids, ``[tokens]``."""
    return hashlib.blake2b(
        ids.cpu().long().numpy().astype("<i8").tobytes(), digest_size=16
    ).hexdigest()


def side_of(digest: str) -> Side:
    """Return the side of a sample: 60 % calibrate, 20 % choose, 20 % score.

    The same in every order, batch size, padding and rank; repeats fall on one side; a stream needs
    no second pass.

    Example:
        >>> side_of("00" * 16), side_of("ff" * 16)
        ('calibrate', 'score')
    """
    place = int(digest[:12], 16) / 16**12
    return next(side for side in SIDES if place < _ENDS[side])
