"""How much memory the commands take."""
