"""Recipe + headers -> Plan: everything that can be known without reading a weight."""

from mergetool.plan.build import make_plan
from mergetool.plan.model import Plan, Step

__all__ = ["Plan", "Step", "make_plan"]
