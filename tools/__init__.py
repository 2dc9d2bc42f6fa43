"""Commands that are run by path, each a few lines over a tested function."""
