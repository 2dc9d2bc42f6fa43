"""Where videos are found, and which list each belongs to."""
