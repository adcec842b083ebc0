"""The model: its configuration, weights and forward pass, and how they run on devices."""
