"""Damaged and hostile files for every reader, and faults of the system for every program."""
