"""The evaluations, one file each, and the command that runs them."""
