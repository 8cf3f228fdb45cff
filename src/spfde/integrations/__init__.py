"""Trainers that own the loop: one file each, imported when it is asked for."""
