"""Run folders: what a run leaves behind, and what it goes on from."""
