"""Collective algorithms as data: generators of steps, and their proof, cost and picture."""
