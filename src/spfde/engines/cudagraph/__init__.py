"""Forward and backward pass captured once and replayed: a training step without waiting for kernel launches."""
