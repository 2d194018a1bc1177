"""Polytope codes: which side of every unit's threshold a sample is on, and where a line through the data changes sides.

A net of linear maps and ReLUs is linear on pieces, and a piece is named by the units that are on in it.
:func:`polytope_codes` gives these names as bits, for smooth activations the nearest thing to them.
"""

from sparsekern.analysis.polytope.codes import PolytopeCodes, polytope_codes

__all__ = ["PolytopeCodes", "polytope_codes"]
