"""Fused kernels for steerable and regular group convolutions, as modules that replace escnn's."""
import warnings

from . import wigner

wigner.provide()

try:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`py3nj` package not found")  # `equiconv info` says what that costs
        import escnn.nn
        from escnn.group import _numerical
except ModuleNotFoundError as error:
    if error.name != "escnn":
        raise
    raise ModuleNotFoundError("equiconv needs escnn: pip install --no-deps escnn==1.0.11", name="escnn") from error

from . import library, pickling, pytree  # noqa: E402  (after escnn's dependencies)

library.load()
pickling.install()
pytree.install()

from . import layout, nn, ops, testing  # noqa: E402  (the native ops must be registered first)
from .acceleration import accelerate, acceleration_report, convert_sync_batchnorm  # noqa: E402
from .autotuning import autotune  # noqa: E402
from .precompilation import precompile  # noqa: E402

# scikit-learn's refuses the np.matrix that escnn passes it; without it escnn takes SciPy's exact one.
_numerical.randomized_svd = None

__version__ = "0.1.0"
__all__ = ["accelerate", "acceleration_report", "autotune", "convert_sync_batchnorm", "layout", "nn", "ops",
           "precompile", "testing"]
