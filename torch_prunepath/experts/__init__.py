"""Building experts: which neurons form one, how routers start, and how much router mass each layer keeps."""
