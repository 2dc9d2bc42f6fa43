"""Data sets: they find the videos on disk and match them with the official lists."""
