"""Measurements: see bench/__main__.py for the commands."""
