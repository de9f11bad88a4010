"""Policies: pure functions from (state, now) to the tasks to start now, the same live and simulated."""

from tetriserve.policies.policy import Policy
from tetriserve.policies.registry import POLICIES, PolicySpec, make_policy

__all__ = ["POLICIES", "Policy", "PolicySpec", "make_policy"]
