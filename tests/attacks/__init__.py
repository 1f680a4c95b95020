"""One small generator for each rule of docs/safety.md that a file can break."""
