"""A family entry found by running the layers of a model, where there is none to go by."""

from lit_prune.decoder.infer.whole import infer_family

__all__ = ["infer_family"]
