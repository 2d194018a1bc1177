"""Small networks of our own, whose weights come with the package, and the scripts that trained them.

- ``docstrings-relu-0``, ``-1``, ``-2`` and ``docstrings-swiglu-0``: causal language models of 4 layers and width 128,
  by :mod:`~sparsekern.analysis.models.language`. ``sparsekern.data.load_model("docstrings-relu-0", causal=True)`` gives
  tokenizer and model, and every command that takes the name of a model takes theirs.
- :func:`~sparsekern.analysis.models.digits.digits_net`: a ReLU network for the 8 × 8 digits of scikit-learn.

``weights/`` has a folder a model, with its card, its loss curve and what it was trained on.
"""
