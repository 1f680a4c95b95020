"""Memory use of the commands."""
