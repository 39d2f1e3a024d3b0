"""Matplotlib figures of networks and results, and their common style. The modules here parse no command line."""
