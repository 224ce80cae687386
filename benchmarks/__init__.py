"""Timing of equiconv beside escnn and plain torch: python -m benchmarks.run, then python -m benchmarks.report."""
import warnings

warnings.filterwarnings("ignore", message=".*py3nj.*")  # escnn's, at import

import equiconv  # noqa: E402  (before escnn, which it gives Wigner matrices where lie_learn is missing)
