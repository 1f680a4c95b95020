"""The command line: one module for each command. Commands parse, call and print."""
