"""``torch.compile(model, backend="prunepath")``: torch finds it by name, through an entry point."""
