"""Structured pruning: plan what to remove, remove it, and prove that nothing else changed."""
