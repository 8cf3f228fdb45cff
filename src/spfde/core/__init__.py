"""What every room knows: errors, techniques and their registry, numbers, files and the clock."""
