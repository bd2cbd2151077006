"""Which neurons form an expert, which router chooses among them, and which share of the mass each layer keeps."""
