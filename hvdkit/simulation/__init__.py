"""What would happen on ranks that nobody has: the real schedules, played in time on a model."""
