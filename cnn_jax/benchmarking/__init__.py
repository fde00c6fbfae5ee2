"""A network timed beside the same one written without this package, in linen or PyTorch."""
