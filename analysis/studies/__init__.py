"""What ``sparsekern study …`` runs: a file for each study, which writes a page, its pictures and all numbers.

To add one: its options in ``options``, its ``study(...)`` in a file of its own, its command in ``sparsekern.cli``.
``saes`` trains what the studies of harvested activations share, ``page`` writes what all of them write.
"""
