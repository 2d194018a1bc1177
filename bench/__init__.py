"""Benchmarks: kernels and full training steps against named baselines, and quality against a peer.

``sparsekern bench`` runs :mod:`~sparsekern.bench.run`, which drives one :mod:`~sparsekern.bench.worker` process for
each of the :mod:`~sparsekern.bench.contenders`; :mod:`~sparsekern.bench.table` and :mod:`~sparsekern.bench.plot` show
a record again. :mod:`~sparsekern.bench.gpu` measures a GPU, :mod:`~sparsekern.bench.gpu_table` shows that record.
:mod:`~sparsekern.bench.versus_sparsify` compares what is learned.
"""
