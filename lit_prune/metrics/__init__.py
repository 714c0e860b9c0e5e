"""What people read: perplexity or accuracy, latency, footprint."""

from lit_prune.metrics.classification import ClassificationResult, classification_of
from lit_prune.metrics.device import device_words
from lit_prune.metrics.footprint import Footprint, FootprintResult, footprint_of
from lit_prune.metrics.gain import Gain, gain_words, gains
from lit_prune.metrics.latency import Latency, LatencyResult, measure_latency
from lit_prune.metrics.peak import PeakMemory, measure_peak
from lit_prune.metrics.perplexity import Perplexity, PerplexityResult, perplexity_of
from lit_prune.metrics.quality import Quality, quality_of
from lit_prune.metrics.speedup import LatencyComparison, Speedup, compare
from lit_prune.metrics.sub_block_latency import SubBlockLatency, measure_sub_blocks
from lit_prune.metrics.waiting import BUSY

__all__ = [
    "BUSY",
    "ClassificationResult",
    "Footprint",
    "FootprintResult",
    "Gain",
    "Latency",
    "LatencyComparison",
    "LatencyResult",
    "PeakMemory",
    "Perplexity",
    "PerplexityResult",
    "Quality",
    "Speedup",
    "SubBlockLatency",
    "classification_of",
    "compare",
    "device_words",
    "footprint_of",
    "gain_words",
    "gains",
    "measure_latency",
    "measure_peak",
    "measure_sub_blocks",
    "perplexity_of",
    "quality_of",
]
