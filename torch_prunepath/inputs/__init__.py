"""From whatever the caller has to what runs through the model, and what enters its FFNs."""
