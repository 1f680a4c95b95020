"""The command line, one module per command. A command parses options, calls the API and prints the result."""
