"""Running a packed file: the model, its key-value cache, sampling and text."""
