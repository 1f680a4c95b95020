"""Tasks in lm-eval's form, whose data ships with the package: they need no network."""
