"""Documents and conversations on their way to batches: shards -> packing -> loader, and mixture
for chats.
"""
