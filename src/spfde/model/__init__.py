"""What a network computes: its trace, what it is called with, and its blocks."""
