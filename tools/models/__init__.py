"""Models to measure and test with: fetched, random, and in the shape of large ones."""
