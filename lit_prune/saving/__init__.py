"""Hugging Face directories of pruned models: written whole, checked, read back bit for bit."""

from lit_prune.saving.formats import refuse_format
from lit_prune.saving.load import load_pruned
from lit_prune.saving.models import register
from lit_prune.saving.save import save_pruned
from lit_prune.saving.staging import refuse_target, staged

register()  # so that `AutoModelForCausalLM` knows pruned models once lit_prune is imported

__all__ = ["load_pruned", "refuse_format", "refuse_target", "save_pruned", "staged"]
