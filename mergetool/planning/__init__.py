"""Recipe + headers -> Plan: everything that can be known without reading a weight."""

from mergetool.planning.build import make_plan
from mergetool.planning.graph import Plan, Step

__all__ = ["Plan", "Step", "make_plan"]
