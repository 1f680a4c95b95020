"""The thread pool, its barrier, and the number of cores."""
