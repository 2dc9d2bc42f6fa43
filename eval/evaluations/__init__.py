"""The evaluations of eval/main.py, a file each: settings, measurement, report."""
