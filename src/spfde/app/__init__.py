"""The trainer behind the command line: a user of the library like any other."""
