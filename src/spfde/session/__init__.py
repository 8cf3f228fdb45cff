"""A recipe at work in a training loop: the only room that executes what the others decide."""
