"""Training data: shards -> packing -> loader for documents, mixture for conversations."""
