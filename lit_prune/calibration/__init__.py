"""What a pass over the text remembers."""

from lit_prune.calibration.bypass import RecordedRun, Unit, bypass_units
from lit_prune.calibration.calibration import Calibration
from lit_prune.calibration.collect import collect_rows
from lit_prune.calibration.covariance import ChannelCovariance
from lit_prune.calibration.data_name import data_notes
from lit_prune.calibration.divergence import Divergence
from lit_prune.calibration.images import LEFT_OUT, NOTHING_LEFT
from lit_prune.calibration.inputs import CAPPED, by_token, real_tokens
from lit_prune.calibration.moments import ChannelMoments
from lit_prune.calibration.needs import Needs
from lit_prune.calibration.observer import Observer
from lit_prune.calibration.out_of_memory import out_of_memory_in
from lit_prune.calibration.regression import RegressionMoments
from lit_prune.calibration.replay import Replayed, covariance_groups, replay, replay_within
from lit_prune.calibration.residuals import measure_residuals
from lit_prune.calibration.rows import Batch, Row, RowSet
from lit_prune.calibration.sensitivity import SENSITIVITIES, measure_sensitivities
from lit_prune.calibration.split import Side
from lit_prune.calibration.streams import TwoStreams, inputs_of, regression_of, two_streams
from lit_prune.calibration.taylor import TAYLOR_SCORES, measure_taylor

__all__ = [
    "CAPPED",
    "LEFT_OUT",
    "NOTHING_LEFT",
    "SENSITIVITIES",
    "TAYLOR_SCORES",
    "Batch",
    "Calibration",
    "ChannelCovariance",
    "ChannelMoments",
    "Divergence",
    "Needs",
    "Observer",
    "RecordedRun",
    "RegressionMoments",
    "Replayed",
    "Row",
    "RowSet",
    "Side",
    "TwoStreams",
    "Unit",
    "by_token",
    "bypass_units",
    "collect_rows",
    "covariance_groups",
    "data_notes",
    "inputs_of",
    "measure_residuals",
    "measure_sensitivities",
    "measure_taylor",
    "out_of_memory_in",
    "real_tokens",
    "regression_of",
    "replay",
    "replay_within",
    "two_streams",
]
