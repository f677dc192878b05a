"""What `examples.end_to_end` is made of: data, training, and what is reported of it."""
