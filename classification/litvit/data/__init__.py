"""Images from files to normalised batches on the device, and the soft labels of their tokens."""
