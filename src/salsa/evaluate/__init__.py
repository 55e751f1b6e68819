"""Evaluation: what the policies say on held-out prompts, and how sure the comparison is."""
