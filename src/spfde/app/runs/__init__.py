"""The folder of a run: what is in it, and checkpoints that are whole or not there."""
