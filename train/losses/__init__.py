"""The loss terms of the method, one file each."""
