"""The command line's trainer: an ordinary user of the library."""
