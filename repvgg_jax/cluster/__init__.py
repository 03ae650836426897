"""Processes that start together, agree, and notice each other's loss. Knows nothing of networks."""
