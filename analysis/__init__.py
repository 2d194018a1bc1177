"""Analyses of trained SAEs, on sparsekern's public surface. One module a subject."""
