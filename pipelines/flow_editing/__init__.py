"""Edits that follow the difference between the velocities of a source and a target prompt."""
