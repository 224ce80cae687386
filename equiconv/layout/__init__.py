"""From escnn's field types and bases to tables: irreps, harmonics, paths, and the plan of a layer's filter."""
from .factorised import FactorisedPlan, factorise
from .geometry import Geometry
from .harmonics import decompose, find_harmonics
from .paths import Path, find_paths
from .plan import PAIR, FilterPlan, Pair, basis_block, build_plan, plan_of, plan_of_key
from .representations import FieldsOf, IrrepSlot, RepresentationLayout, group_fields

__all__ = ["PAIR", "FactorisedPlan", "FieldsOf", "FilterPlan", "Geometry", "IrrepSlot", "Pair", "Path",
           "RepresentationLayout", "basis_block", "build_plan", "decompose", "factorise", "find_harmonics",
           "find_paths", "group_fields", "plan_of", "plan_of_key"]
