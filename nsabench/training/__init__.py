"""Training a small byte-level decoder on NSA, and watching it: the model, its data, what it has learned."""
