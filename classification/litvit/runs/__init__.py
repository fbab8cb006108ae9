"""A run: its folder and files, how far it has come, and what it reports."""
