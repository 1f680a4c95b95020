"""Text from a model: the engine that runs many sequences, sampling, streams of text, chats."""
