"""How a model is computed: the engines, their protocol, and which one is taken."""
