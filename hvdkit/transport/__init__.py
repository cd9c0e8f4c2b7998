"""How bytes travel: MPI, threads of one process (for tests), memory that ranks share."""
