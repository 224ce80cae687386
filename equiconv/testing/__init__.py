"""check_equivariance(): how equivariant is a module, group element by group element, and what in it is not?"""
from .check import check_equivariance, evaluation
from .faults import EquivarianceWarning
from .result import EquivarianceResult

__all__ = ["EquivarianceResult", "EquivarianceWarning", "check_equivariance", "evaluation"]
