"""What the examples share: data, the training loop, tables and pictures. Not part of the library."""
