"""Pipeline schedules as data: generators of instructions, and their proof, timing and picture."""
