"""A compiled variant against its definition, tensor by tensor."""
