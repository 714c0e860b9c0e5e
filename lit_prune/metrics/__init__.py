"""What people read: perplexity, latency, footprint."""

from lit_prune.metrics.footprint import Footprint, FootprintResult, footprint_of
from lit_prune.metrics.latency import Latency, LatencyResult, measure_latency
from lit_prune.metrics.peak import PeakMemory, measure_peak
from lit_prune.metrics.perplexity import Perplexity, PerplexityResult, perplexity_of
from lit_prune.metrics.speedup import LatencyComparison, Speedup, compare

__all__ = [
    "Footprint",
    "FootprintResult",
    "Latency",
    "LatencyComparison",
    "LatencyResult",
    "PeakMemory",
    "Perplexity",
    "PerplexityResult",
    "Speedup",
    "compare",
    "footprint_of",
    "measure_latency",
    "measure_peak",
    "perplexity_of",
]
