"""Recipe + headers -> Plan: everything that can be known without reading a weight."""

from mergetool.planner.build import make_plan
from mergetool.planner.model import Plan, Step

__all__ = ["Plan", "Step", "make_plan"]
