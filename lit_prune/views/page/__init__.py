"""The parts of ``report.html``; `lit_prune.views.html` puts them together."""
