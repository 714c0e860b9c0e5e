"""Format ``gguf``: one file that llama.cpp runs."""

from lit_prune.saving.gguf.prepared import gguf, require_gguf

__all__ = ["gguf", "require_gguf"]
