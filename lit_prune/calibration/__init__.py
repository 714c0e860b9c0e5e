"""What a pass over the text remembers."""

from lit_prune.calibration.bypass import RecordedRun, Unit, bypass_units
from lit_prune.calibration.calibration import Calibration
from lit_prune.calibration.collect import collect_rows
from lit_prune.calibration.inputs import real_tokens
from lit_prune.calibration.moments import ChannelMoments
from lit_prune.calibration.observer import Observer
from lit_prune.calibration.replay import Replayed, replay
from lit_prune.calibration.rows import Batch, Row, RowSet

__all__ = [
    "Batch",
    "Calibration",
    "ChannelMoments",
    "Observer",
    "RecordedRun",
    "Replayed",
    "Row",
    "RowSet",
    "Unit",
    "bypass_units",
    "collect_rows",
    "real_tokens",
    "replay",
]
