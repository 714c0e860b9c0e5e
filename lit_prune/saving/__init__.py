"""Hugging Face directories of pruned models: written whole, checked, read back bit for bit."""

from lit_prune.saving.load import load_pruned
from lit_prune.saving.models import register
from lit_prune.saving.save import save_pruned

register()  # so that `AutoModelForCausalLM` knows pruned models once lit_prune is imported

__all__ = ["load_pruned", "save_pruned"]
