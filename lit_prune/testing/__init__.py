"""The contract of a decoder family, for everybody: run it on a tiny model of your own family."""

from lit_prune.testing.contract import FamilyContract, check_family

__all__ = ["FamilyContract", "check_family"]
