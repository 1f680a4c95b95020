"""Models for measurements and tests: fetched, random, and synthetic ones in the shape of large models."""
