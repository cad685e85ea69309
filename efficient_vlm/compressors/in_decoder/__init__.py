"""Methods that drop or merge visual tokens between layers of the decoder."""
